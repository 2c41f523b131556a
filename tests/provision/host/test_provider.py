"""Which kind of host it is: by signs and a real mount; and what doctor says of it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from provision.config import host as host_config
from provision.core import layout
from provision.core.errors import SpecError
from provision.environments import activation
from provision.fs import capabilities
from provision.host import provider, tool_caches
from tests.conftest import CHECKOUT
from tests.provision.run_command import provision

if TYPE_CHECKING:
    from collections.abc import Iterator

ENVS = CHECKOUT / "envs"
SHIPPED = provider.load(ENVS)


@pytest.fixture
def top(tmp_path: Path) -> Iterator[Path]:
    """The top of a host's file system, in which real file systems can be mounted."""
    folder = tmp_path / "top"
    folder.mkdir()
    yield folder
    lines = Path("/proc/self/mounts").read_text().splitlines()
    for point in sorted((line.split()[1] for line in lines if line.split()[1].startswith(str(folder))), reverse=True):
        subprocess.run(["umount", point], check=True)


def mount(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=False, capture_output=True)
    if done.returncode != 0:
        pytest.skip("no right to mount a tmpfs")


def show(top: Path, profile: host_config.Profile) -> dict[str, str]:
    """Give a host the signs of a profile: paths in `top`, and the variables that are returned."""
    environ = {}
    for sign in (*profile.any[:1], *profile.all):
        if sign.env:
            environ[sign.env] = "1"
        else:
            (top / (sign.path or "").lstrip("/")).mkdir(parents=True, exist_ok=True)
    return environ


def test_every_host_of_the_table_has_a_profile() -> None:
    assert set(SHIPPED) == {
        "autodl", "gpushare", "featurize", "matpool", "openbayes", "runpod", "vast", "lambda", "paperspace",
        "sagemaker-studio", "sagemaker-notebook", "colab", "kaggle", "generic",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name, each in SHIPPED.items() if each.any or each.all])
def test_a_sign_and_a_mount_make_a_match(top: Path, name: str) -> None:
    profile = SHIPPED[name]
    environ = show(top, profile)
    place = top / profile.roots[0].lstrip("/").replace("*", "mine")
    place.mkdir(parents=True, exist_ok=True)
    only = {name: profile}
    without = provider.detect(only, environ, top)[0]
    assert without.root is None, "a plain folder is no volume"
    assert without.signs
    mount(place)
    found = provider.detect(only, environ, top)[0]
    if not profile.environments:
        assert found.root is None
        assert "holds no environments" in found.reason
        return
    assert found.root == place / profile.folder
    assert provider.detect(only, {}, top / "elsewhere")[0].root is None, "without a sign a mount says nothing"


def test_a_mount_without_a_sign_says_nothing(top: Path) -> None:
    mount(top / "root/autodl-tmp")
    assert all(match.root is None for match in provider.detect(SHIPPED, {}, top))


def test_all_signs_are_needed_where_a_profile_says_so(top: Path) -> None:
    mount(top / "storage")
    assert provider.detect({"paperspace": SHIPPED["paperspace"]}, {}, top)[0].root is None
    (top / "notebooks").mkdir()
    assert provider.detect({"paperspace": SHIPPED["paperspace"]}, {}, top)[0].root == top / "storage"


def test_several_places_are_not_guessed_from(top: Path) -> None:
    for name in ("first", "second"):
        mount(top / "lambda/nfs" / name)
    found = provider.detect({"lambda": SHIPPED["lambda"]}, {}, top)[0]
    assert found.root is None
    assert "name one with --root" in found.reason


def test_the_second_place_where_the_first_is_no_mount(top: Path) -> None:
    (top / "hy-tmp").mkdir()
    (top / "hy-netdisk").mkdir()
    mount(top / "hy-nas")
    assert provider.detect({"gpushare": SHIPPED["gpushare"]}, {}, top)[0].root == top / "hy-nas"


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    """An envs/ folder whose one profile fits this machine, with a root on a real mount."""
    folder = tmp_path / "own envs/hosts"
    folder.mkdir(parents=True)
    shared = ("/dev/shm", "/run")  # noqa: S108 (a file system that every Linux has)
    mounted = next(each for each in map(Path, shared) if each.stat().st_dev != Path("/").stat().st_dev)
    text = 'title = "here"\npersists = "p"\nwiped = "w"\nsource = "s"\n'
    lines = f'any = [{{env = "HERE"}}]\nroots = ["{mounted}"]\nfolder = "firstlight-test"\nrelocate = ["pip"]\n'
    (folder / "here.toml").write_text(text + lines)
    return folder.parent


def test_the_order_in_which_a_root_is_found(hosts: Path, home: Path, tmp_path: Path) -> None:
    def chosen(flag: str | None = None, environ: dict[str, str] | None = None, **host: object) -> provider.ResolvedRoot:
        return provider.choose(flag, host_config.HostSpec(**host), hosts, environ or {}, home)  # type: ignore[arg-type]

    nothing = chosen()
    assert nothing.root.path == layout.default_root()
    assert nothing.relocate == []
    assert not nothing.named
    assert nothing.warning is None
    by_profile = chosen(environ={"HERE": "1"})
    assert by_profile.root.path.name == "firstlight-test"
    assert by_profile.relocate == ["pip"]
    assert by_profile.match is not None
    assert chosen(environ={"HERE": "1"}, relocate=["uv"]).relocate == ["uv"]
    root = layout.Root(tmp_path / "linked")
    (root.cache / "pip").mkdir(parents=True)
    root.state.mkdir()
    root.marker.write_text("{}")
    (home / ".cache").mkdir()
    (home / ".cache/pip").symlink_to(root.cache / "pip")
    assert chosen(environ={"HERE": "1"}).root == root
    assert chosen(environ={"HERE": "1"}, root=str(tmp_path / "spec")).root.path == tmp_path / "spec"
    assert chosen(str(tmp_path / "flag"), root=str(tmp_path / "spec")).root.path == tmp_path / "flag"
    assert chosen(str(tmp_path / "flag")).relocate == ["huggingface"]


def test_a_sign_without_its_mount_is_said(hosts: Path, home: Path) -> None:
    file = hosts / "hosts/here.toml"
    file.write_text(re.sub(r"roots = .*", 'roots = ["/absent"]', file.read_text()))
    found = provider.choose(None, host_config.HostSpec(), hosts, {"HERE": "1"}, home)
    assert found.root.path == layout.default_root()
    assert found.warning is not None
    assert "$HERE is here, but none of /absent is a mount" in found.warning


def test_doctor_says_what_matched_and_why(hosts: Path, home: Path, tmp_path: Path) -> None:
    done = provision("doctor", "--envs", hosts, "--json", env={"HERE": "1"})
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout)
    assert whole["profile"] == "here"
    texts = {row["thing"]: row["text"] for row in whole["findings"]}
    assert "$HERE is here" in texts["profile here"]
    assert "is a mount" in texts["profile here"]
    for thing in ("symlink", "hardlink", "execute", "flock", "free space", "free inodes", "file system", "survives"):
        assert thing in texts
    other = provision("doctor", "--envs", hosts, "--root", tmp_path, env={"HERE": "1"})
    assert f"{tmp_path} (--root)" in other.stdout
    assert not list(tmp_path.glob(".firstlight-probe*"))


def test_doctor_tells_a_volume_that_is_not_mounted(home: Path, tmp_path: Path) -> None:
    (home / ".cache/huggingface").mkdir(parents=True)
    (home / ".cache/huggingface/hub").symlink_to(tmp_path / "gone/cache/huggingface/hub")
    done = provision("doctor")
    assert done.returncode == 4
    assert "not mounted" in done.stdout


def test_what_a_folder_can_do_is_tried(tmp_path: Path, home: Path) -> None:
    found = capabilities.probe(tmp_path, home)
    assert (found.writable, found.symlink, found.hardlink, found.execute, found.flock) == (True,) * 5
    assert found.same_as_home
    assert list(tmp_path.glob(".firstlight-probe*")) == []


def test_a_folder_that_can_not(tmp_path: Path, home: Path) -> None:
    place = tmp_path / "noexec"
    place.mkdir()
    options = ["-o", "noexec,size=1m"]
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", place], check=False, capture_output=True)
    if done.returncode != 0:
        pytest.skip("no right to mount a tmpfs")
    try:
        found = capabilities.probe(place, home)
        assert (found.execute, found.symlink, found.same_as_home) == (False, True, False)
        told = provision("doctor", "--root", place)
        assert told.returncode == 4
        assert "cannot: an environment's programs start from it" in told.stdout
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        assert not capabilities.probe(place, home).writable
    finally:
        subprocess.run(["umount", place], check=True)


def test_where_each_tool_keeps_its_files(home: Path, tmp_path: Path) -> None:
    root = layout.Root(tmp_path / "root")
    base = home / "miniconda3"
    (base / "conda-meta").mkdir(parents=True)
    found = tool_caches.places([*tool_caches.NAMES, "conda"], root, {}, home, [base])
    usual = {
        str(place.source.relative_to(home))
        for group in found.values()
        for place in group
        if home in place.source.parents
    }
    assert usual == {
        ".cache/huggingface/hub", ".cache/huggingface/xet", ".cache/huggingface/modules",
        ".cache/huggingface/datasets", ".cache/pip", ".cache/uv", ".cache/torch", ".triton/cache",
        "miniconda3/envs", "miniconda3/pkgs", ".conda/envs", ".conda/pkgs",
    }  # fmt: skip
    environ = {"HF_HOME": "/h", "PIP_CACHE_DIR": "/p", "TRITON_CACHE_DIR": "/t", "XDG_CACHE_HOME": "/x"}
    other = tool_caches.places(["huggingface", "pip", "triton", "uv"], root, environ, home, [])
    assert [str(place.source) for group in other.values() for place in group] == [
        "/h/hub",
        "/h/xet",
        "/p",
        "/t",
        "/x/uv",
    ]


def test_folders_that_the_user_has_named_to_conda(home: Path, tmp_path: Path) -> None:
    text = "envs_dirs:\n- ~/my envs\n- /shared/envs\n- ~/miniconda3/envs\npkgs_dirs: [~/my pkgs]\n"
    (home / ".condarc").write_text(text)
    base = home / "miniconda3"
    base.mkdir()
    environ = {"CONDA_ENVS_DIRS": f"{home}/third:/elsewhere"}
    named = activation.conda_folders(environ, home)
    assert named == [home / "third", home / "my envs", base / "envs", home / "my pkgs"]
    root = layout.Root(tmp_path / "root")
    found = tool_caches.places(["conda"], root, {}, home, [base], named)["conda"]
    assert {place.source for place in found} == {*named, base / "pkgs", home / ".conda/envs", home / ".conda/pkgs"}
    assert root.path / "conda/named/my envs" in {place.target for place in found}


@pytest.mark.parametrize(
    ("relocate", "message"),
    [
        ([{"path": "~/a", "to": "x"}, {"path": "~/b", "to": "x"}], "would both go to"),
        ([{"path": "~/a", "to": "x"}, {"path": "~/b", "to": "x/y"}], "would both go to"),
        ([{"path": "~/a", "to": "x"}, {"path": "~/a/b", "to": "y"}], "one inside the other"),
        ([{"path": "~/a", "to": "envs"}], "keeps its own things there"),
        ([{"path": "~/a", "to": ".firstlight/x"}], "keeps its own things there"),
        ([{"path": "/", "to": "x"}], "neither absolute nor in the home"),
    ],
)
def test_places_that_cannot_be(home: Path, tmp_path: Path, relocate: list[dict[str, str]], message: str) -> None:
    with pytest.raises((SpecError, ValueError), match=message):
        tool_caches.places(
            [host_config.Folder(**each) for each in relocate], layout.Root(tmp_path / "root"), {}, home, []
        )
