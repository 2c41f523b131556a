"""Tests the selection of the source of torch: real folders, real pages on loopback, and real uv."""

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


def env_step(tmp_path: Path, envs: Path, notices: list[str], *variants: Variant, offline: bool = False) -> EnvStep:
    """Return the setup step of the environment diffusers; the step adds its notices for the user to `notices`."""
    root = Root(tmp_path / "root")
    definition = EnvironmentDefinition(
        "diffusers", LockFolder(envs / "diffusers"), variants, MINORS, "system", PLATFORM, "a test"
    )

    def tell(line: str) -> None:
        # This notice depends on the settings of pip on the machine that runs the tests.
        if not line.endswith("packages are locked by hash"):
            notices.append(line)

    return EnvStep(root, definition, tmp_path / "home", Journal(root.journal), offline=offline, tell=tell)


def query(
    source: TorchSource, *wheels: Path, name: str = "torch", version: str = "9.9+tiny"
) -> torch_sources.SourceAnswer:
    """Query one source for a package whose lock pins the hashes of `wheels`, and return the answer."""
    import requests

    hashes = frozenset(hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels)
    (answer,) = torch_sources.query_all([source], PinnedPackage(name, version, hashes, PYTHON), requests.Session, 60)
    return answer


@pytest.fixture
def torch(tmp_path: Path) -> Path:
    """Write a wheel of torch into a folder that pip's settings do not name, and return its path."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return write_wheel(folder, "torch", "9.9+tiny", {"torch/__init__.py": TORCH})


@pytest.fixture
def cuda(tmp_path: Path, envs: Path, wheels: Path) -> Path:
    """Write the wheel and the lock of the fallback variant cu130 where pip finds them, and return the wheel's path."""
    wheel = write_wheel(wheels, "torch", "9.9", {"torch/__init__.py": TORCH})
    (envs / "diffusers/cu130.lock").write_text(lock_text(wheel, next(wheels.glob("diffusers-*.whl"))))
    return wheel


class TestQuery:
    """Tests which sources a query reports to have the pinned wheel of torch."""

    def test_folder_with_the_pinned_torch_wheel_is_accepted(self, torch: Path) -> None:
        assert query(TorchSource("here", str(torch.parent), "find-links"), torch).has is True
        assert query(TorchSource("here", torch.parent.as_uri(), "find-links"), torch).has is True

    def test_folder_whose_torch_wheel_has_another_hash_is_rejected(self, tmp_path: Path, torch: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        write_wheel(other, "torch", "9.9+tiny", {"torch/__init__.py": "evil"})
        answer = query(TorchSource("here", str(other), "find-links"), torch)
        assert answer.has is False
        assert "with another hash" in answer.reason

    @pytest.mark.parametrize("as_json", [True, False])
    def test_index_with_the_pinned_torch_wheel_is_accepted(self, serve: Any, torch: Path, as_json: bool) -> None:
        server = serve(http_server.index([torch], as_json=as_json))
        assert query(TorchSource("index", f"{server.url}/simple"), torch).has is True
        assert query(TorchSource("page", f"{server.url}/simple/torch/", "find-links"), torch).has is True

    def test_index_that_lists_the_torch_wheel_without_a_hash_is_accepted(self, serve: Any, torch: Path) -> None:
        server = serve(http_server.index([torch], hashes=False))
        assert query(TorchSource("index", f"{server.url}/simple"), torch).has is True

    def test_index_in_a_local_folder_is_accepted_for_the_package_that_it_has(self, tmp_path: Path, torch: Path) -> None:
        page = tmp_path / "simple/torch/index.html"
        page.parent.mkdir(parents=True)
        page.write_text(f'<a href="../../elsewhere/{torch.name}">{torch.name}</a>')
        assert query(TorchSource("index", (tmp_path / "simple").as_uri()), torch).has is True
        answer = query(TorchSource("index", (tmp_path / "simple").as_uri()), torch, name="other")
        assert (answer.has, answer.reason) == (False, "does not have other")

    def test_index_that_lists_the_torch_wheel_and_answers_404_for_it_is_rejected(self, serve: Any, torch: Path) -> None:
        server = serve(http_server.index([torch]), Fault("/files/", status=404))
        answer = query(TorchSource("index", f"{server.url}/simple"), torch)
        assert answer.has is False
        assert answer.reason == f"lists {torch.name}, but answers 404 for it"

    def test_index_whose_torch_wheel_has_another_hash_is_rejected(
        self, tmp_path: Path, serve: Any, torch: Path
    ) -> None:
        other = tmp_path / "other"
        other.mkdir()
        wrong = write_wheel(other, "torch", "9.9+tiny", {"torch/__init__.py": "evil"})
        server = serve(http_server.index([wrong]))
        answer = query(TorchSource("index", f"{server.url}/simple"), torch)
        assert answer.has is False
        assert f"has {torch.name} with another hash" in answer.reason

    def test_folder_with_torch_wheels_for_other_systems_only_is_rejected(self, torch: Path) -> None:
        for tag in ("cp39-cp39-manylinux_2_28_x86_64", "cp311-cp311-some_other_system"):
            torch.with_name(f"torch-9.9+tiny-{tag}.whl").write_bytes(torch.read_bytes())
        content = torch.read_bytes()
        torch.unlink()
        answer = query(TorchSource("here", str(torch.parent), "find-links"))
        assert answer.has is False
        assert "no wheel for Python" in answer.reason
        torch.write_bytes(content)
        assert query(TorchSource("here", str(torch.parent), "find-links"), torch).has is True

    @pytest.mark.parametrize(
        ("fault", "has", "reason"),
        [
            (Fault("/simple/", status=404), False, "does not have torch"),
            (Fault("/simple/", status=401), None, "answers 401"),
            (Fault("/simple/", status=503), None, "answers 503"),
            (Fault("/simple/", body=http_server.PORTAL), False, "Campus Network Login"),
        ],
    )
    def test_error_status_or_login_page_of_an_index_is_reported_as_the_reason(
        self, serve: Any, torch: Path, fault: Fault, has: bool | None, reason: str
    ) -> None:
        server = serve(http_server.index([torch]), fault)
        answer = query(TorchSource("index", f"{server.url}/simple"), torch)
        assert answer.has is has
        assert reason in answer.reason

    def test_source_that_does_not_answer_is_neither_accepted_nor_rejected(self, torch: Path) -> None:
        answer = query(TorchSource("index", "http://127.0.0.1:9/simple"), torch)
        assert answer.has is None
        assert "does not answer (" in answer.reason

    def test_users_own_sources_are_the_folders_and_indexes_in_the_settings_of_uv(self) -> None:
        environ = {
            "UV_FIND_LINKS": "/one,/two words",
            "UV_DEFAULT_INDEX": "https://first.example/simple",
            "UV_INDEX": "corp=https://corp.example/simple https://more.example",
            "UV_INDEX_CORP_USERNAME": "me",
            "UV_INDEX_CORP_PASSWORD": "p@ss",
        }
        config = {"index": [{"url": "https://file.example"}, {"url": "https://never.example", "explicit": True}]}
        sources = torch_sources.own_sources(UvSources(environ, (), config))
        assert [source.url for source in sources] == [
            "/one",
            "/two words",
            "https://me:p%40ss@corp.example/simple",
            "https://more.example",
            "https://file.example",
            "https://first.example/simple",
        ]
        assert "p%40ss" not in str([source.name for source in sources])
        without_index = torch_sources.own_sources(UvSources(environ, ("--no-index",), config))
        assert [source.url for source in without_index] == ["/one", "/two words"]


class TestRoutes:
    """Tests from which source real installations take torch."""

    def test_torch_is_installed_from_the_page_of_its_variant_if_no_own_source_has_it(
        self, tmp_path: Path, envs: Path, wheels: Path, serve: Any, cuda: Path
    ) -> None:
        moved = tmp_path / "page"
        moved.mkdir()
        shutil.move(next(wheels.glob("torch-9.9+tiny-*.whl")), moved)
        server = serve(http_server.index(moved.glob("*.whl")))
        page = f"{server.url}/simple/torch/"
        notices: list[str] = []
        step = env_step(tmp_path, envs, notices, CPU.model_copy(update={"find_links": page}), CUDA)
        assert f"torch 9.9+tiny from the page {page}" in step.describe()
        step.apply()
        assert step.check(deep=True).state is State.OK
        assert step.check().fallback is None
        assert notices[0].startswith(f"torch 9.9+tiny from the page {page}; ")

    def test_busy_page_of_torch_is_requested_again_before_the_fallback_variant(
        self, tmp_path: Path, envs: Path, wheels: Path, serve: Any, cuda: Path
    ) -> None:
        moved = tmp_path / "page"
        moved.mkdir()
        shutil.move(next(wheels.glob("torch-9.9+tiny-*.whl")), moved)
        server = serve(http_server.index(moved.glob("*.whl")), Fault("/simple/", status=503, times=1))
        page = f"{server.url}/simple/torch/"
        notices: list[str] = []
        step = env_step(tmp_path, envs, notices, CPU.model_copy(update={"find_links": page}), CUDA)
        step.apply()
        assert step.check(deep=True).state is State.OK
        assert step.check().fallback is None
        assert "answers 503" not in notices[-1]

    def test_fallback_variant_is_announced_with_its_size_before_the_download(
        self, tmp_path: Path, envs: Path, wheels: Path, cuda: Path
    ) -> None:
        next(wheels.glob("torch-9.9+tiny-*.whl")).unlink()
        notices: list[str] = []
        step = env_step(tmp_path, envs, notices, CPU, CUDA)
        step.apply()
        assert step.check().state is State.OK
        assert f"find-links {wheels} does not list torch 9.9+tiny. Fallback: torch 9.9 from find-links" in notices[0]
        assert "about 2.9 GB to download, 0.0 GB on disk" in notices[0]
        assert notices[0].endswith(" GB free")

    def test_fallback_variant_that_does_not_fit_the_disk_is_blocked_before_the_download(
        self, tmp_path: Path, envs: Path, wheels: Path, cuda: Path, small_disk: Path
    ) -> None:
        next(wheels.glob("torch-9.9+tiny-*.whl")).unlink()
        root = Root(small_disk / "root")
        large = CUDA.model_copy(update={"install_bytes": 6_100_000_000})
        definition = EnvironmentDefinition(
            "diffusers", LockFolder(envs / "diffusers"), [CPU, large], MINORS, "system", PLATFORM, "a test"
        )
        step = EnvStep(root, definition, tmp_path / "home", Journal(tmp_path / "journal"), offline=False)
        with pytest.raises(BlockedError, match=r"about 6,100,000,000 are needed for environment diffusers \(cu130: "):
            step.apply()
        assert not (root.cache / "uv").exists()

    def test_full_disk_while_the_fallback_variant_is_installed_leaves_no_files(
        self, tmp_path: Path, envs: Path, wheels: Path, small_disk: Path
    ) -> None:
        next(wheels.glob("torch-9.9+tiny-*.whl")).unlink()
        wheel = write_wheel(wheels, "torch", "9.9", {"torch/__init__.py": TORCH, "torch/large": "x" * 9_000_000})
        (envs / "diffusers/cu130.lock").write_text(lock_text(wheel, next(wheels.glob("diffusers-*.whl"))))
        root = Root(small_disk / "root")
        without_sizes = CUDA.model_copy(update={"install_bytes": None, "download_bytes": None})
        definition = EnvironmentDefinition(
            "diffusers", LockFolder(envs / "diffusers"), [CPU, without_sizes], MINORS, "system", PLATFORM, "a test"
        )
        step = EnvStep(root, definition, tmp_path / "home", Journal(tmp_path / "journal"), offline=False)
        with pytest.raises(BlockedError, match="no space left"):
            step.apply()
        assert list(step.prefix.parent.iterdir()) == []

    def test_page_that_stops_serving_the_torch_wheel_causes_the_fallback_variant(
        self, tmp_path: Path, envs: Path, wheels: Path, serve: Any, cuda: Path
    ) -> None:
        moved = tmp_path / "page"
        moved.mkdir()
        shutil.move(next(wheels.glob("torch-9.9+tiny-*.whl")), moved)
        # The first request for the file is the query; all later ones are answered with 404.
        server = serve(http_server.index(moved.glob("*.whl")), Fault("/files/", status=404, after=1))
        page = f"{server.url}/simple/torch/"
        notices: list[str] = []
        step = env_step(tmp_path, envs, notices, CPU.model_copy(update={"find_links": page}), CUDA)
        step.apply()
        assert step.check().state is State.OK
        assert "lists torch-9.9+tiny-py3-none-any.whl, but answers 404 for it" in str(step.check().fallback)
        assert any(line.startswith("torch 9.9+tiny could not be installed from the page") for line in notices)
        assert notices[-1].startswith("torch 9.9+tiny is not available: ")

    def test_torch_with_another_hash_in_the_users_index_is_replaced_by_that_of_the_page(
        self, tmp_path: Path, envs: Path, wheels: Path, serve: Any, cuda: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wheel = next(wheels.glob("torch-9.9+tiny-*.whl"))
        page = tmp_path / "page"
        page.mkdir()
        shutil.move(wheel, page)
        write_wheel(wheels, "torch", "9.9+tiny", {"torch/__init__.py": "evil"})
        server = serve(http_server.index(wheels.glob("*.whl")))
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        notices: list[str] = []
        step = env_step(tmp_path, envs, notices, CPU.model_copy(update={"find_links": str(page)}), CUDA)
        step.apply()
        assert step.check(deep=True).state is State.OK
        assert "9.9+tiny" in step.check().detail
        assert (step.prefix / "lib").exists()
        assert notices[0].startswith(f"torch 9.9+tiny from the page {page}")

    def test_users_index_that_does_not_serve_torch_is_skipped_for_torch(
        self, tmp_path: Path, envs: Path, wheels: Path, serve: Any, cuda: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wheel = next(wheels.glob("torch-9.9+tiny-*.whl"))
        server = serve(http_server.index(wheels.glob("*.whl")), Fault("/files/torch-9.9+tiny", status=404))
        page = tmp_path / "page"
        page.mkdir()
        shutil.move(wheel, page)
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        step = env_step(tmp_path, envs, [], CPU.model_copy(update={"find_links": str(page)}), CUDA)
        step.apply()
        assert step.check(deep=True).state is State.OK
        assert "torch 9.9+tiny" in step.check().detail

    def test_error_names_all_sources_if_no_source_has_torch(
        self, tmp_path: Path, envs: Path, wheels: Path, cuda: Path
    ) -> None:
        next(wheels.glob("torch-9.9+tiny-*.whl")).unlink()
        cuda.unlink()
        step = env_step(tmp_path, envs, [], CPU.model_copy(update={"find_links": str(tmp_path / "none")}), CUDA)
        with pytest.raises(FirstlightError) as caught:
            step.apply()
        text = str(caught.value)
        assert text.startswith("torch 9.9+tiny is not available: ")
        assert f"find-links {wheels} does not list torch 9.9+tiny" in text
        assert f"the page {tmp_path / 'none'} cannot be read" in text
        assert f"find-links {wheels} does not list torch 9.9." in text
        assert "PIP_FIND_LINKS=" in text
        assert not step.prefix.exists()

    def test_missing_package_other_than_torch_causes_no_fallback_variant(
        self, tmp_path: Path, envs: Path, wheels: Path, cuda: Path
    ) -> None:
        next(wheels.glob("diffusers-*.whl")).unlink()
        notices: list[str] = []
        step = env_step(tmp_path, envs, notices, CPU, CUDA)
        with pytest.raises(FirstlightError, match="diffusers"):
            step.apply()
        assert len(notices) == 1

    def test_cached_fallback_variant_is_installed_offline(
        self, tmp_path: Path, envs: Path, wheels: Path, cuda: Path
    ) -> None:
        next(wheels.glob("torch-9.9+tiny-*.whl")).unlink()
        env_step(tmp_path, envs, [], CPU, CUDA).apply()
        shutil.rmtree(tmp_path / "root/envs")
        step = env_step(tmp_path, envs, [], CPU, CUDA, offline=True)
        step.apply()
        assert step.check().state is State.OK

    def test_damage_in_another_package_causes_no_query_for_torch(self, tmp_path: Path, envs: Path, serve: Any) -> None:
        server = serve({})
        notices: list[str] = []
        step = env_step(tmp_path, envs, notices, CPU.model_copy(update={"find_links": f"{server.url}/torch/"}))
        step.apply()
        server.seen.clear()
        notices.clear()
        next(step.prefix.glob("lib/python*/site-packages/diffusers/__init__.py")).unlink()
        assert "torch 9.9+tiny from" not in step.describe()
        step.apply()
        assert step.check(deep=True).state is State.OK
        assert (server.seen, notices) == ([], [])


def test_needed_space_is_estimated_from_the_download_if_the_installed_size_is_unknown(
    tmp_path: Path, small_disk: Path
) -> None:
    variant = Variant(name="cu128", torch="9.9", download_bytes=4_000_000_000)
    with pytest.raises(BlockedError, match="about 7,200,000,000 are needed for environment x"):
        torch_fallback.need_space(variant, "environment x", Root(small_disk / "root"), tmp_path)
    torch_fallback.need_space(Variant(name="macos", torch="9.9"), "environment x", Root(small_disk / "root"), tmp_path)


def test_unknown_sizes_of_a_variant_are_omitted_from_the_text_about_its_sizes() -> None:
    assert torch_fallback.sizes(CPU) == ""
    assert torch_fallback.sizes(CUDA) == ": about 2.9 GB to download, 0.0 GB on disk"
