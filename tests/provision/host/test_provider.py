"""Tests the detection of the provider by signs and a real mount, and what `provision doctor` reports about it."""

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
from provision.volume.owner import current
from tests.conftest import CHECKOUT
from tests.provision.run_command import provision

if TYPE_CHECKING:
    from collections.abc import Iterator

ENVS = CHECKOUT / "envs"
SHIPPED = provider.load(ENVS)


@pytest.fixture
def top(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder that stands for `/`; file systems that a test mounts in it are unmounted afterwards."""
    folder = tmp_path / "top"
    folder.mkdir()
    yield folder
    lines = Path("/proc/self/mounts").read_text().splitlines()
    for point in sorted((line.split()[1] for line in lines if line.split()[1].startswith(str(folder))), reverse=True):
        subprocess.run(["umount", point], check=True)


def mount(folder: Path) -> None:
    """Mount a tmpfs at a folder, or skip the test without the right to do it."""
    folder.mkdir(parents=True, exist_ok=True)
    completed = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=False, capture_output=True)
    if completed.returncode != 0:
        pytest.skip("no right to mount a tmpfs")


def make_signs(top: Path, profile: host_config.Profile) -> dict[str, str]:
    """Make the signs of a profile: create their paths in `top`, and return {name: value} of their variables."""
    environ = {}
    for sign in (*profile.any[:1], *profile.all):
        if sign.env:
            environ[sign.env] = "1"
        else:
            (top / (sign.path or "").lstrip("/")).mkdir(parents=True, exist_ok=True)
    return environ


def test_every_supported_provider_has_a_profile() -> None:
    assert set(SHIPPED) == {
        "autodl", "gpushare", "featurize", "matpool", "openbayes", "runpod", "vast", "lambda", "paperspace",
        "sagemaker-studio", "sagemaker-notebook", "colab", "kaggle", "generic",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name, profile in SHIPPED.items() if profile.any or profile.all])
def test_provider_profile_matches_a_host_with_its_sign_and_its_mounted_folder(top: Path, name: str) -> None:
    profile = SHIPPED[name]
    environ = make_signs(top, profile)
    folder = top / profile.roots[0].lstrip("/").replace("*", "mine")
    folder.mkdir(parents=True, exist_ok=True)
    profiles = {name: profile}
    unmounted = provider.detect(profiles, environ, top)[0]
    assert unmounted.root is None, "a plain folder is not a volume"
    assert unmounted.signs
    mount(folder)
    match = provider.detect(profiles, environ, top)[0]
    if not profile.environments:
        assert match.root is None
        assert "holds no environments" in match.reason
        return
    assert match.root == folder / profile.folder
    assert provider.detect(profiles, {}, top / "elsewhere")[0].root is None, "a mount without a sign does not match"


def test_mounted_folder_without_a_sign_matches_no_provider_profile(top: Path) -> None:
    mount(top / "root/autodl-tmp")
    assert all(match.root is None for match in provider.detect(SHIPPED, {}, top))


def test_profile_that_requires_all_of_its_signs_does_not_match_without_one(top: Path) -> None:
    mount(top / "storage")
    assert provider.detect({"paperspace": SHIPPED["paperspace"]}, {}, top)[0].root is None
    (top / "notebooks").mkdir()
    assert provider.detect({"paperspace": SHIPPED["paperspace"]}, {}, top)[0].root == top / "storage"


def test_several_mounts_that_match_one_profile_yield_no_root_and_suggest_the_flag_root(top: Path) -> None:
    for name in ("first", "second"):
        mount(top / "lambda/nfs" / name)
    match = provider.detect({"lambda": SHIPPED["lambda"]}, {}, top)[0]
    assert match.root is None
    assert "name one with --root" in match.reason


def test_second_folder_of_a_profile_is_the_root_if_the_first_is_not_a_mount(top: Path) -> None:
    (top / "hy-tmp").mkdir()
    (top / "hy-netdisk").mkdir()
    mount(top / "hy-nas")
    assert provider.detect({"gpushare": SHIPPED["gpushare"]}, {}, top)[0].root == top / "hy-nas"


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    """Make an envs/ folder with one provider profile, whose sign is the variable HERE and whose folder is a mount."""
    folder = tmp_path / "own envs/hosts"
    folder.mkdir(parents=True)
    shared = ("/dev/shm", "/run")  # noqa: S108 (a file system that every Linux has)
    mounted = next(path for path in map(Path, shared) if path.stat().st_dev != Path("/").stat().st_dev)
    text = 'title = "here"\npersists = "p"\nwiped = "w"\nsource = "s"\n'
    lines = f'any = [{{env = "HERE"}}]\nroots = ["{mounted}"]\nfolder = "firstlight-test"\nrelocate = ["pip"]\n'
    (folder / "here.toml").write_text(text + lines)
    return folder.parent


def test_root_is_selected_by_flag_then_host_toml_then_links_then_profile(
    hosts: Path, home: Path, tmp_path: Path
) -> None:
    def chosen(flag: str | None = None, environ: dict[str, str] | None = None, **host: object) -> provider.ResolvedRoot:
        return provider.choose(flag, host_config.HostSpec(**host), hosts, environ or {}, home)  # type: ignore[arg-type]

    default = chosen()
    assert default.root.path == layout.default_root()
    assert default.relocate == []
    assert not default.named
    assert default.warning is None
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


@pytest.mark.parametrize(
    ("relocate", "is_recorded", "has_own_hub"),
    [([], False, True), (["pip"], False, True), (["huggingface"], False, False), ([], True, False)],
)
def test_home_has_its_own_hub_if_neither_its_list_nor_a_record_relocates_it(
    hosts: Path, home: Path, tmp_path: Path, relocate: list[str], is_recorded: bool, has_own_hub: bool
) -> None:
    root = layout.Root(tmp_path / "root")
    root.state.mkdir(parents=True)
    if is_recorded:
        row = {"root": str(root.path), "path": "~/.cache/huggingface", "target": "cache/huggingface"}
        owner = {"host": current(home).host, "home": str(home)}
        root.links.write_text(json.dumps({"schema": 2, "links": [owner | row]}))
    spec = host_config.HostSpec.model_validate({"relocate": relocate})
    assert provider.choose(str(root.path), spec, hosts, {}, home).root.has_own_hub is has_own_hub


def test_sign_of_a_provider_without_its_mounted_folder_yields_a_warning(hosts: Path, home: Path) -> None:
    file = hosts / "hosts/here.toml"
    file.write_text(re.sub(r"roots = .*", 'roots = ["/absent"]', file.read_text()))
    resolved = provider.choose(None, host_config.HostSpec(), hosts, {"HERE": "1"}, home)
    assert resolved.root.path == layout.default_root()
    assert resolved.warning is not None
    assert "found $HERE, but none of /absent is a mount" in resolved.warning


def test_doctor_shows_the_matching_provider_profile_and_why_it_matches(hosts: Path, home: Path, tmp_path: Path) -> None:
    completed = provision("doctor", "--envs", hosts, "--json", env={"HERE": "1"})
    assert completed.returncode == 0, completed.stderr
    report = json.loads(completed.stdout)
    assert report["profile"] == "here"
    texts = {row["thing"]: row["text"] for row in report["findings"]}
    assert "found $HERE" in texts["profile here"]
    assert "is a mount" in texts["profile here"]
    for thing in ("symlink", "hardlink", "execute", "flock", "free space", "free inodes", "file system", "survives"):
        assert thing in texts
    other = provision("doctor", "--envs", hosts, "--root", tmp_path, env={"HERE": "1"})
    assert f"{tmp_path} (--root)" in other.stdout
    assert not list(tmp_path.glob(".firstlight-probe*"))


def test_doctor_reports_a_volume_that_is_not_mounted(home: Path, tmp_path: Path) -> None:
    (home / ".cache/huggingface").mkdir(parents=True)
    (home / ".cache/huggingface/hub").symlink_to(tmp_path / "gone/cache/huggingface/hub")
    completed = provision("doctor")
    assert completed.returncode == 4
    assert "not mounted" in completed.stdout


def test_probe_finds_every_feature_of_a_normal_folder(tmp_path: Path) -> None:
    result = capabilities.probe(tmp_path)
    assert (result.writable, result.symlink, result.hardlink, result.execute, result.flock) == (True,) * 5
    assert list(tmp_path.glob(".firstlight-probe*")) == []


def test_probe_detects_a_noexec_and_a_read_only_mount_and_doctor_reports_noexec(tmp_path: Path, home: Path) -> None:
    folder = tmp_path / "noexec"
    folder.mkdir()
    options = ["-o", "noexec,size=1m"]
    completed = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], check=False, capture_output=True)
    if completed.returncode != 0:
        pytest.skip("no right to mount a tmpfs")
    try:
        result = capabilities.probe(folder)
        assert (result.execute, result.symlink) == (False, True)
        doctor = provision("doctor", "--root", folder)
        assert doctor.returncode == 4
        assert ": no program on it can be started" in doctor.stdout
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        assert not capabilities.probe(folder).writable
    finally:
        subprocess.run(["umount", folder], check=True)


def test_cache_folders_of_each_tool_follow_its_defaults_and_variables(home: Path, tmp_path: Path) -> None:
    root = layout.Root(tmp_path / "root")
    base = home / "miniconda3"
    (base / "conda-meta").mkdir(parents=True)
    folders = tool_caches.places([*tool_caches.NAMES, "conda"], root, {}, home, [base])
    defaults = {
        str(folder.source.relative_to(home))
        for group in folders.values()
        for folder in group
        if home in folder.source.parents
    }
    assert defaults == {
        ".cache/huggingface/hub", ".cache/huggingface/xet", ".cache/huggingface/modules",
        ".cache/huggingface/datasets", ".cache/pip", ".cache/uv", ".cache/torch", ".triton/cache",
        "miniconda3/envs", "miniconda3/pkgs", ".conda/envs", ".conda/pkgs",
    }  # fmt: skip
    environ = {"HF_HOME": "/h", "PIP_CACHE_DIR": "/p", "TRITON_CACHE_DIR": "/t", "XDG_CACHE_HOME": "/x"}
    other = tool_caches.places(["huggingface", "pip", "triton", "uv"], root, environ, home, [])
    assert [str(folder.source) for group in other.values() for folder in group] == [
        "/h/hub",
        "/h/xet",
        "/p",
        "/t",
        "/x/uv",
    ]


def test_folders_named_in_conda_settings_are_relocated(home: Path, tmp_path: Path) -> None:
    text = "envs_dirs:\n- ~/my envs\n- /shared/envs\n- ~/miniconda3/envs\npkgs_dirs: [~/my pkgs]\n"
    (home / ".condarc").write_text(text)
    base = home / "miniconda3"
    base.mkdir()
    environ = {"CONDA_ENVS_DIRS": f"{home}/third:/elsewhere"}
    named = activation.conda_folders(environ, home)
    assert named == [home / "third", home / "my envs", base / "envs", home / "my pkgs"]
    root = layout.Root(tmp_path / "root")
    folders = tool_caches.places(["conda"], root, {}, home, [base], named)["conda"]
    sources = {folder.source for folder in folders}
    assert sources == {*named, base / "pkgs", home / ".conda/envs", home / ".conda/pkgs"}
    assert root.path / "conda/named/my envs" in {folder.target for folder in folders}


@pytest.mark.parametrize(
    ("relocate", "message"),
    [
        ([{"path": "~/a", "to": "x"}, {"path": "~/b", "to": "x"}], "would both move to"),
        ([{"path": "~/a", "to": "x"}, {"path": "~/b", "to": "x/y"}], "would both move to"),
        ([{"path": "~/a", "to": "x"}, {"path": "~/a/b", "to": "y"}], "one lies inside the other"),
        ([{"path": "~/a", "to": "envs"}], "keeps its own files there"),
        ([{"path": "~/a", "to": ".firstlight/x"}], "keeps its own files there"),
        ([{"path": "/", "to": "x"}], "must be an absolute path other than /"),
    ],
)
def test_relocation_of_overlapping_or_reserved_folders_is_rejected(
    home: Path, tmp_path: Path, relocate: list[dict[str, str]], message: str
) -> None:
    with pytest.raises((SpecError, ValueError), match=message):
        tool_caches.places(
            [host_config.Folder(**entry) for entry in relocate], layout.Root(tmp_path / "root"), {}, home, []
        )


def test_root_that_other_users_can_write_is_used_only_if_it_is_trusted(hosts: Path, home: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(0o777)
    flags = ["--root", root, "--envs", ENVS]
    refused = provision("plan", "--offline", *flags)
    assert refused.returncode == 4
    assert f"{root} is writable by every user" in refused.stderr
    assert f"chmod go-w {root}" in refused.stderr
    assert "chmod go-w" in provision("doctor", *flags).stdout
    assert provision("plan", "--offline", *flags, "--trust-volume").returncode == 3
    assert provision("plan", "--offline", *flags, env={"FIRSTLIGHT_TRUST_VOLUME": "1"}).returncode == 3
    trusting = provision("doctor", *flags, env={"FIRSTLIGHT_TRUST_VOLUME": "1"})
    assert "which is trusted: FIRSTLIGHT_TRUST_VOLUME" in trusting.stdout
    (tmp_path / "host.toml").write_text("trust_volume = true\n")
    assert provision("plan", "--offline", *flags, "--host", tmp_path / "host.toml").returncode == 3
    root.chmod(0o755)
    assert provision("plan", "--offline", *flags).returncode == 3


def test_volume_of_a_provider_is_trusted(hosts: Path, home: Path) -> None:
    chosen = provider.choose(None, host_config.HostSpec(), hosts, {"HERE": "1"}, home)
    assert provider.trust_reason(chosen, host_config.HostSpec(), {}) == "one person rents a host of here"
    other = provider.choose(str(home / "root"), host_config.HostSpec(), hosts, {"HERE": "1"}, home)
    assert provider.trust_reason(other, host_config.HostSpec(), {}) is None


@pytest.mark.parametrize("linked", [".cache", ".cache/huggingface", ".cache/huggingface/hub", ".cache/pip"])
def test_root_is_found_behind_a_link_made_by_hand(hosts: Path, home: Path, tmp_path: Path, linked: str) -> None:
    root = layout.Root(tmp_path / "volume")
    folder = root.path / "by hand"
    folder.mkdir(parents=True)
    (home / linked).parent.mkdir(parents=True, exist_ok=True)
    (home / linked).symlink_to(folder)
    chosen = provider.choose(None, host_config.HostSpec(), hosts, {}, home)
    assert chosen.root != root, "a folder without a marker is no root"
    root.state.mkdir()
    root.marker.write_text("{}")
    chosen = provider.choose(None, host_config.HostSpec(), hosts, {}, home)
    assert chosen.root == root
    assert chosen.reason == "the links of this home lead to it"
