"""Which source torch is taken from: real folders, real pages on loopback, real uv."""

from __future__ import annotations

import hashlib
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest

from provision.config.torch import Variant
from provision.core.errors import BlockedError, FirstlightError
from provision.core.layout import Root
from provision.core.step import State
from provision.environments import torch_fallback, torch_sources
from provision.environments.definition import EnvironmentDefinition
from provision.environments.step import EnvStep
from provision.environments.torch_sources import PinnedPackage, TorchSource
from provision.installers.uv import UvSources
from provision.lockfiles.folder import LockFolder
from provision.volume.journal import Journal
from tests.provision import http_server
from tests.provision.conda_channel import PLATFORM
from tests.provision.conftest import TORCH, lock_text, write_wheel
from tests.provision.http_server import Fault

if TYPE_CHECKING:
    from pathlib import Path

PYTHON = ".".join(map(str, sys.version_info[:3]))
MINORS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
CPU = Variant(name="cpu", torch="9.9+tiny", instead="cu130", instead_cost="the CUDA build, which costs gigabytes")
CUDA = Variant(name="cu130", torch="9.9", download_bytes=2_900_000_000, install_bytes=7_000_000)


def step_of(tmp_path: Path, envs: Path, said: list[str], *variants: Variant, offline: bool = False) -> EnvStep:
    root = Root(tmp_path / "root")
    wanted = EnvironmentDefinition(
        "diffusers", LockFolder(envs / "diffusers"), variants, MINORS, "system", PLATFORM, "a test"
    )

    def tell(line: str) -> None:
        if not line.endswith("packages are locked by hash"):  # this machine's own pip may have such settings
            said.append(line)

    return EnvStep(root, wanted, tmp_path / "home", Journal(root.journal), offline=offline, tell=tell)


def ask(
    place: TorchSource, *wheels: Path, name: str = "torch", version: str = "9.9+tiny"
) -> torch_sources.SourceAnswer:
    import requests

    hashes = frozenset(hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels)
    (answer,) = torch_sources.ask([place], PinnedPackage(name, version, hashes, PYTHON), requests.Session, 60)
    return answer


@pytest.fixture
def torch(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return write_wheel(folder, "torch", "9.9+tiny", {"torch/__init__.py": TORCH})


@pytest.fixture
def cuda(tmp_path: Path, envs: Path, wheels: Path) -> Path:
    """The stand-in's wheel, in the machine's own folder, and its lock."""
    wheel = write_wheel(wheels, "torch", "9.9", {"torch/__init__.py": TORCH})
    (envs / "diffusers/cu130.lock").write_text(lock_text(wheel, next(wheels.glob("diffusers-*.whl"))))
    return wheel


class TestAsking:
    """One place after another."""

    def test_folder_with_the_wheel_has_it(self, torch: Path) -> None:
        assert ask(TorchSource("here", str(torch.parent), "find-links"), torch).has is True
        assert ask(TorchSource("here", torch.parent.as_uri(), "find-links"), torch).has is True

    def test_folder_whose_wheel_has_another_hash_does_not_have_it(self, tmp_path: Path, torch: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        write_wheel(other, "torch", "9.9+tiny", {"torch/__init__.py": "evil"})
        answer = ask(TorchSource("here", str(other), "find-links"), torch)
        assert answer.has is False
        assert "with another hash" in answer.reason

    @pytest.mark.parametrize("as_json", [True, False])
    def test_index_with_the_wheel_has_it(self, play: Any, torch: Path, as_json: bool) -> None:
        server = play(http_server.index([torch], as_json=as_json))
        assert ask(TorchSource("index", f"{server.url}/simple"), torch).has is True
        assert ask(TorchSource("page", f"{server.url}/simple/torch/", "find-links"), torch).has is True

    def test_page_without_hashes_counts(self, play: Any, torch: Path) -> None:
        server = play(http_server.index([torch], hashes=False))
        assert ask(TorchSource("index", f"{server.url}/simple"), torch).has is True

    def test_index_on_this_machine_has_it(self, tmp_path: Path, torch: Path) -> None:
        page = tmp_path / "simple/torch/index.html"
        page.parent.mkdir(parents=True)
        page.write_text(f'<a href="../../elsewhere/{torch.name}">{torch.name}</a>')
        assert ask(TorchSource("index", (tmp_path / "simple").as_uri()), torch).has is True
        answer = ask(TorchSource("index", (tmp_path / "simple").as_uri()), torch, name="other")
        assert (answer.has, answer.reason) == (False, "does not have other")

    def test_listed_wheel_that_is_not_served_is_passed_over(self, play: Any, torch: Path) -> None:
        server = play(http_server.index([torch]), Fault("/files/", status=404))
        answer = ask(TorchSource("index", f"{server.url}/simple"), torch)
        assert answer.has is False
        assert answer.reason == f"lists {torch.name} and does not serve it (status 404)"

    def test_listed_hash_that_is_not_pinned_is_passed_over(self, tmp_path: Path, play: Any, torch: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        wrong = write_wheel(other, "torch", "9.9+tiny", {"torch/__init__.py": "evil"})
        server = play(http_server.index([wrong]))
        answer = ask(TorchSource("index", f"{server.url}/simple"), torch)
        assert answer.has is False
        assert f"has {torch.name} with another hash" in answer.reason

    def test_wheels_of_other_systems_do_not_count(self, torch: Path) -> None:
        for tag in ("cp39-cp39-manylinux_2_28_x86_64", "cp311-cp311-some_other_system"):
            torch.with_name(f"torch-9.9+tiny-{tag}.whl").write_bytes(torch.read_bytes())
        right = torch.read_bytes()
        torch.unlink()
        answer = ask(TorchSource("here", str(torch.parent), "find-links"))
        assert answer.has is False
        assert "no file of it for Python" in answer.reason
        torch.write_bytes(right)
        assert ask(TorchSource("here", str(torch.parent), "find-links"), torch).has is True

    @pytest.mark.parametrize(
        ("fault", "has", "reason"),
        [
            (Fault("/simple/", status=404), False, "does not have torch"),
            (Fault("/simple/", status=401), None, "answers 401"),
            (Fault("/simple/", status=503), None, "answers 503"),
            (Fault("/simple/", body=http_server.PORTAL), False, "Campus Network Login"),
        ],
    )
    def test_page_that_is_none_is_named(
        self, play: Any, torch: Path, fault: Fault, has: bool | None, reason: str
    ) -> None:
        server = play(http_server.index([torch]), fault)
        answer = ask(TorchSource("index", f"{server.url}/simple"), torch)
        assert answer.has is has
        assert reason in answer.reason

    def test_address_that_does_not_answer_is_not_known(self, torch: Path) -> None:
        answer = ask(TorchSource("index", "http://127.0.0.1:9/simple"), torch)
        assert answer.has is None
        assert "does not answer (" in answer.reason

    def test_places_are_those_that_uv_is_given(self) -> None:
        environ = {
            "UV_FIND_LINKS": "/one,/two words",
            "UV_DEFAULT_INDEX": "https://first.example/simple",
            "UV_INDEX": "corp=https://corp.example/simple https://more.example",
            "UV_INDEX_CORP_USERNAME": "me",
            "UV_INDEX_CORP_PASSWORD": "p@ss",
        }
        config = {"index": [{"url": "https://file.example"}, {"url": "https://never.example", "explicit": True}]}
        places = torch_sources.own_places(UvSources(environ, (), config))
        assert [each.url for each in places] == [
            "/one",
            "/two words",
            "https://me:p%40ss@corp.example/simple",
            "https://more.example",
            "https://file.example",
            "https://first.example/simple",
        ]
        assert "p%40ss" not in str([each.name for each in places])
        without = torch_sources.own_places(UvSources(environ, ("--no-index",), config))
        assert [each.url for each in without] == ["/one", "/two words"]


class TestFollowing:
    """The chain, through a real installation."""

    def test_page_of_the_variant_serves_torch_alone(
        self, tmp_path: Path, envs: Path, wheels: Path, play: Any, cuda: Path
    ) -> None:
        moved = tmp_path / "page"
        moved.mkdir()
        shutil.move(next(wheels.glob("torch-9.9+tiny-*.whl")), moved)
        server = play(http_server.index(moved.glob("*.whl")))
        page = f"{server.url}/simple/torch/"
        said: list[str] = []
        step = step_of(tmp_path, envs, said, CPU.model_copy(update={"find_links": page}), CUDA)
        assert f"torch 9.9+tiny from the page {page}" in step.describe()
        step.apply()
        assert step.check(deep=True).state is State.OK
        assert step.check().fallback is None
        assert said[0].startswith(f"torch 9.9+tiny from the page {page}; ")

    def test_page_that_is_busy_for_a_moment_is_no_reason_for_the_stand_in(
        self, tmp_path: Path, envs: Path, wheels: Path, play: Any, cuda: Path
    ) -> None:
        moved = tmp_path / "page"
        moved.mkdir()
        shutil.move(next(wheels.glob("torch-9.9+tiny-*.whl")), moved)
        server = play(http_server.index(moved.glob("*.whl")), Fault("/simple/", status=503, times=1))
        page = f"{server.url}/simple/torch/"
        said: list[str] = []
        step = step_of(tmp_path, envs, said, CPU.model_copy(update={"find_links": page}), CUDA)
        step.apply()
        assert step.check(deep=True).state is State.OK
        assert step.check().fallback is None
        assert "answers 503" not in said[-1]

    def test_stand_in_is_announced_with_its_bytes_before_it_is_fetched(
        self, tmp_path: Path, envs: Path, wheels: Path, cuda: Path
    ) -> None:
        next(wheels.glob("torch-9.9+tiny-*.whl")).unlink()
        said: list[str] = []
        step = step_of(tmp_path, envs, said, CPU, CUDA)
        step.apply()
        assert step.check().state is State.OK
        assert f"find-links {wheels} does not list torch 9.9+tiny. Instead torch 9.9 from find-links" in said[0]
        assert "about 2.9 GB to download, 0.0 GB on disk" in said[0]
        assert said[0].endswith(" GB free")

    def test_stand_in_that_does_not_fit_is_blocked_before_a_byte_is_fetched(
        self, tmp_path: Path, envs: Path, wheels: Path, cuda: Path, small_disk: Path
    ) -> None:
        next(wheels.glob("torch-9.9+tiny-*.whl")).unlink()
        root = Root(small_disk / "root")
        large = CUDA.model_copy(update={"install_bytes": 6_100_000_000})
        wanted = EnvironmentDefinition(
            "diffusers", LockFolder(envs / "diffusers"), [CPU, large], MINORS, "system", PLATFORM, "a test"
        )
        step = EnvStep(root, wanted, tmp_path / "home", Journal(tmp_path / "journal"), offline=False)
        with pytest.raises(BlockedError, match=r"about 6,100,000,000 are needed for environment diffusers \(cu130: "):
            step.apply()
        assert not (root.cache / "uv").exists()

    def test_disk_that_fills_up_in_the_stand_in_is_blocked_and_leaves_nothing(
        self, tmp_path: Path, envs: Path, wheels: Path, small_disk: Path
    ) -> None:
        next(wheels.glob("torch-9.9+tiny-*.whl")).unlink()
        wheel = write_wheel(wheels, "torch", "9.9", {"torch/__init__.py": TORCH, "torch/large": "x" * 9_000_000})
        (envs / "diffusers/cu130.lock").write_text(lock_text(wheel, next(wheels.glob("diffusers-*.whl"))))
        root = Root(small_disk / "root")
        unknown = CUDA.model_copy(update={"install_bytes": None, "download_bytes": None})
        wanted = EnvironmentDefinition(
            "diffusers", LockFolder(envs / "diffusers"), [CPU, unknown], MINORS, "system", PLATFORM, "a test"
        )
        step = EnvStep(root, wanted, tmp_path / "home", Journal(tmp_path / "journal"), offline=False)
        with pytest.raises(BlockedError, match="no space left"):
            step.apply()
        assert list(step.prefix.parent.iterdir()) == []

    def test_page_that_stops_serving_hands_over_to_the_next(
        self, tmp_path: Path, envs: Path, wheels: Path, play: Any, cuda: Path
    ) -> None:
        moved = tmp_path / "page"
        moved.mkdir()
        shutil.move(next(wheels.glob("torch-9.9+tiny-*.whl")), moved)
        # The first request for the file is our look; from then on it is gone.
        server = play(http_server.index(moved.glob("*.whl")), Fault("/files/", status=404, after=1))
        page = f"{server.url}/simple/torch/"
        said: list[str] = []
        step = step_of(tmp_path, envs, said, CPU.model_copy(update={"find_links": page}), CUDA)
        step.apply()
        assert step.check().state is State.OK
        assert "lists torch-9.9+tiny-py3-none-any.whl and does not serve it" in str(step.check().fallback)
        assert any(line.startswith("torch 9.9+tiny could not be installed from the page") for line in said)
        assert said[-1].startswith("torch 9.9+tiny cannot be had: ")

    def test_wheel_with_another_hash_in_the_own_index_is_not_taken(
        self, tmp_path: Path, envs: Path, wheels: Path, play: Any, cuda: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = next(wheels.glob("torch-9.9+tiny-*.whl"))
        page = tmp_path / "page"
        page.mkdir()
        shutil.move(right, page)
        write_wheel(wheels, "torch", "9.9+tiny", {"torch/__init__.py": "evil"})
        server = play(http_server.index(wheels.glob("*.whl")))
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        said: list[str] = []
        step = step_of(tmp_path, envs, said, CPU.model_copy(update={"find_links": str(page)}), CUDA)
        step.apply()
        assert step.check(deep=True).state is State.OK
        assert "9.9+tiny" in step.check().detail
        assert (step.prefix / "lib").exists()
        assert said[0].startswith(f"torch 9.9+tiny from the page {page}")

    def test_own_index_that_does_not_serve_is_left_out_for_torch(
        self, tmp_path: Path, envs: Path, wheels: Path, play: Any, cuda: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = next(wheels.glob("torch-9.9+tiny-*.whl"))
        server = play(http_server.index(wheels.glob("*.whl")), Fault("/files/torch-9.9+tiny", status=404))
        page = tmp_path / "page"
        page.mkdir()
        shutil.move(right, page)
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        step = step_of(tmp_path, envs, [], CPU.model_copy(update={"find_links": str(page)}), CUDA)
        step.apply()
        assert step.check(deep=True).state is State.OK
        assert "torch 9.9+tiny" in step.check().detail

    def test_no_source_at_all_is_one_error_that_names_them(
        self, tmp_path: Path, envs: Path, wheels: Path, cuda: Path
    ) -> None:
        next(wheels.glob("torch-9.9+tiny-*.whl")).unlink()
        cuda.unlink()
        step = step_of(tmp_path, envs, [], CPU.model_copy(update={"find_links": str(tmp_path / "none")}), CUDA)
        with pytest.raises(FirstlightError) as caught:
            step.apply()
        text = str(caught.value)
        assert text.startswith("torch 9.9+tiny cannot be had: ")
        assert f"find-links {wheels} does not list torch 9.9+tiny" in text
        assert f"the page {tmp_path / 'none'} cannot be read" in text
        assert f"find-links {wheels} does not list torch 9.9." in text
        assert "PIP_FIND_LINKS=" in text
        assert not step.prefix.exists()

    def test_missing_other_package_is_no_reason_for_the_stand_in(
        self, tmp_path: Path, envs: Path, wheels: Path, cuda: Path
    ) -> None:
        next(wheels.glob("diffusers-*.whl")).unlink()
        said: list[str] = []
        step = step_of(tmp_path, envs, said, CPU, CUDA)
        with pytest.raises(FirstlightError, match="diffusers"):
            step.apply()
        assert len(said) == 1

    def test_cached_stand_in_is_found_offline(self, tmp_path: Path, envs: Path, wheels: Path, cuda: Path) -> None:
        next(wheels.glob("torch-9.9+tiny-*.whl")).unlink()
        step_of(tmp_path, envs, [], CPU, CUDA).apply()
        shutil.rmtree(tmp_path / "root/envs")
        step = step_of(tmp_path, envs, [], CPU, CUDA, offline=True)
        step.apply()
        assert step.check().state is State.OK

    def test_harm_elsewhere_asks_no_source_for_torch(self, tmp_path: Path, envs: Path, play: Any) -> None:
        server = play({})
        said: list[str] = []
        step = step_of(tmp_path, envs, said, CPU.model_copy(update={"find_links": f"{server.url}/torch/"}))
        step.apply()
        server.seen.clear()
        said.clear()
        next(step.prefix.glob("lib/python*/site-packages/diffusers/__init__.py")).unlink()
        assert "torch 9.9+tiny from" not in step.describe()
        step.apply()
        assert step.check(deep=True).state is State.OK
        assert (server.seen, said) == ([], [])


def test_space_is_judged_by_the_download_where_nothing_better_is_known(tmp_path: Path, small_disk: Path) -> None:
    variant = Variant(name="cu128", torch="9.9", download_bytes=4_000_000_000)
    with pytest.raises(BlockedError, match="about 7,200,000,000 are needed for it"):
        torch_fallback.need_space(variant, "it", Root(small_disk / "root"), tmp_path)
    torch_fallback.need_space(Variant(name="macos", torch="9.9"), "it", Root(small_disk / "root"), tmp_path)


def test_sizes_are_left_out_where_they_are_not_known() -> None:
    assert torch_fallback.sizes(CPU) == ""
    assert torch_fallback.sizes(CUDA) == ": about 2.9 GB to download, 0.0 GB on disk"
