"""Tests pulls in a cache that other processes and users share (locks, refs, races), and the secrecy of tokens."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from provision.cli import models
from provision.core.errors import BlockedError, FirstlightError
from provision.core.redact import redact
from provision.mirrors import official as official_hub
from provision.models import blob_lock, manifest, snapshots, stand_ins, step
from provision.models.hub_client import Hub, is_host
from provision.models.hubs import Hubs
from provision.models.inventory import unlisted
from provision.models.remove import removal, remove
from tests.conftest import CHECKOUT
from tests.provision import hub_server
from tests.provision.fake_hub import git_sha1
from tests.provision.http_server import Fault
from tests.provision.hub_server import REVISION
from tests.provision.model_pulls import FILES, REPO, WEIGHTS, count_gets, is_complete, pull_of, run

if TYPE_CHECKING:
    from pathlib import Path

    from provision.core.layout import Root

TOKEN = "hf_" + "T" * 30
OLD = "2" * 40


class TestLocks:
    @pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC], ids=["no permission", "no space"])
    def test_blob_lock_that_cannot_be_created_stops_the_pull_before_a_download(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        def refuse(self: blob_lock.BlobLock) -> bool:
            raise OSError(code, os.strerror(code), "a lock")

        monkeypatch.setattr(blob_lock.BlobLock, "take", refuse)
        evil = hub_server.start(serve, REPO, {**FILES, "unet/config.json": b'{"a": 6}\n'})
        server = hub_server.start(serve, REPO, FILES)
        server.content |= {path: body for path, body in evil.content.items() if "/resolve/" in path}
        work = pull_of(root, server.url)
        with pytest.raises(BlockedError, match="a lock"):
            run(work)
        assert not count_gets(server, "/resolve/")
        assert not list(work.snapshot.rglob("*.json"))

    def test_wait_for_a_file_that_another_process_downloads_is_reported_once(self, root: Root, serve: Any) -> None:
        server = hub_server.start(serve, REPO, FILES)
        work = pull_of(root, server.url)
        plan = work.plan()
        name = next(target.listed.blob for target in plan.needed if target.file.path == WEIGHTS)
        lock = blob_lock.BlobLock(root.hub_in_use / ".locks" / work.spec.folder / f"{name}.lock")
        assert lock.take()
        messages: list[str] = []

        def release_lock(text: str) -> None:
            messages.append(text)
            lock.release()

        work.health.tell = release_lock
        work.run(plan, lambda *_: None)
        assert is_complete(work)
        assert messages == [f"{WEIGHTS} is being downloaded by another process; waiting for it"]

    def test_recorded_hashes_and_stand_ins_of_two_parallel_processes_are_all_kept(self, root: Root, serve: Any) -> None:
        script = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from pathlib import Path\n"
            "from provision.models import step as models; from provision.models import pins\n"
            "from provision.models.hub_client import ListedFile\n"
            "from provision.core.layout import Root\n"
            "from types import SimpleNamespace\n"
            "root, prefix = Root(Path(sys.argv[2])), sys.argv[3]\n"
            "for number in range(25):\n"
            "    spec = SimpleNamespace(repo=f'owner/{prefix}{number}', revision='1' * 40)\n"
            "    pins.keep(root, spec, [ListedFile('a.json', 1, '3' * 40)], 'official')\n"
            "    models.record(root, f'{prefix}{number}', 'silent')\n"
        )
        processes = [
            subprocess.Popen([sys.executable, "-c", script, str(CHECKOUT), str(root.path), name]) for name in "ab"
        ]
        assert [process.wait() for process in processes] == [0, 0]
        assert len(step.recorded(root)) == 50
        assert root.model_pins.read_text().count('"from"') == 50

    def test_pull_of_a_complete_model_writes_nothing(self, root: Root, serve: Any, tmp_path: Path) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES).url)
        run(work)
        mtimes = {path: path.lstat().st_mtime_ns for path in work.folder.rglob("*")}
        next_pull = pull_of(root, "http://127.0.0.1:9")
        next_pull.run(next_pull.plan(), lambda *_: None)
        assert {path: path.lstat().st_mtime_ns for path in work.folder.rglob("*")} == mtimes, "nothing was written"


class TestMain:
    def add_older_commit(self, work: Any) -> None:
        """Add the snapshot of another commit to the repository, and set refs/main to that commit."""
        snapshot = work.folder / "snapshots" / OLD
        snapshot.mkdir(parents=True)
        (work.folder / "refs").mkdir(exist_ok=True)
        (work.folder / "refs/main").write_text(OLD)
        blob = work.folder / "blobs" / git_sha1(b"old")
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(b"old")
        (snapshot / "old.json").symlink_to(blob)

    def test_refs_main_that_firstlight_has_set_changes_to_the_revision_of_the_manifest(
        self, root: Root, serve: Any
    ) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES).url)
        self.add_older_commit(work)
        (work.folder / "firstlight-main").write_text(OLD)
        run(work)
        assert (work.folder / "refs/main").read_text() == REVISION

    def test_refs_main_that_another_program_has_set_stays_and_a_note_is_added(self, root: Root, serve: Any) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES).url)
        self.add_older_commit(work)
        run(work)
        assert (work.folder / "refs/main").read_text() == OLD
        (note,) = work.notes
        assert note.startswith("refs/main is 2222222, which is present too")
        assert note.endswith("To load the pulled files, add the argument revision=1111111…")

    @pytest.mark.parametrize("text", ["", "no commit", "3" * 40])
    def test_invalid_refs_main_is_replaced_by_the_pulled_revision(self, root: Root, serve: Any, text: str) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES).url)
        (work.folder / "refs").mkdir(parents=True)
        (work.folder / "refs/main").write_text(text)
        run(work)
        assert (work.folder / "refs/main").read_text() == REVISION


class TestRemoval:
    def manifest_of(self, root: Root) -> manifest.Manifest:
        """Load `models.toml` of a root, and return the manifest."""
        return manifest.load(root.path / "models.toml")

    def test_commit_that_no_model_pins_is_listed_and_can_be_removed(self, root: Root, serve: Any) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES).url)
        TestMain().add_older_commit(work)
        run(work)
        name = f"{REPO}@{OLD[:12]}"
        assert unlisted(root, self.manifest_of(root)) == {name: 3}
        remove(root, self.manifest_of(root), name)
        assert not (work.folder / "snapshots" / OLD).exists()
        assert is_complete(work)
        assert unlisted(root, self.manifest_of(root)) == {}
        with pytest.raises(FirstlightError, match="matches 0 snapshots in the cache"):
            removal(root, self.manifest_of(root), name)
        with pytest.raises(FirstlightError, match="is the pinned revision of m"):
            removal(root, self.manifest_of(root), f"{REPO}@{REVISION}")

    def test_removal_keeps_a_blob_that_another_commit_shares(self, root: Root, serve: Any) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES).url)
        run(work)
        snapshots.link(work.folder, OLD, [("same.safetensors", (work.snapshot / WEIGHTS).readlink().name)])
        remove(root, self.manifest_of(root), "m")
        assert (work.folder / "snapshots" / OLD / "same.safetensors").read_bytes() == FILES[WEIGHTS]
        assert not work.snapshot.exists(), "an empty folder would be filled again from the blobs of the other commit"

    def test_removal_deletes_the_files_of_an_unfinished_pull(self, root: Root, serve: Any) -> None:
        work = pull_of(
            root, hub_server.start(serve, REPO, FILES, Fault("vae/", status=404), Fault("unet/c", cut=4)).url
        )
        with pytest.raises(FirstlightError):
            run(work)
        (work.folder / "blobs" / f"{git_sha1(FILES['unet/config.json'])}.firstlight-part").write_bytes(b"{")
        plan = removal(root, self.manifest_of(root), "m")
        assert plan.bytes >= len(FILES[WEIGHTS])
        remove(root, self.manifest_of(root), "m")
        assert not work.folder.exists()

    def test_removal_keeps_the_partial_file_of_another_model(self, root: Root, serve: Any) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES).url)
        run(work)
        other = {"half.safetensors": b"half" * 100}
        text = hub_server.manifest_entry("m", REPO, FILES) + hub_server.manifest_entry("half", REPO, other)
        (root.path / "models.toml").write_text(text)
        digest = self.manifest_of(root).models["half"].files[0].sha256
        part = work.folder / "blobs" / f"{digest}.firstlight-part"
        part.write_bytes(b"half")
        unknown_blob = work.folder / "blobs" / ("7" * 40)
        unknown_blob.write_bytes(b"?")
        remove(root, self.manifest_of(root), "m")
        assert part.exists()
        assert unknown_blob.exists()
        assert not list(work.snapshot.rglob("*.json"))

    @pytest.mark.parametrize("pinned", [True, False])
    def test_removal_keeps_a_blob_in_the_store_that_repositories_share(
        self, root: Root, serve: Any, pinned: bool
    ) -> None:
        work = pull_of(root, hub_server.start(serve, REPO, FILES).url, pinned=pinned, trust=True)
        run(work)
        root.model_pins.unlink(missing_ok=True)
        blob = next(path for path in (work.folder / "blobs").iterdir() if path.stat().st_size == len(FILES[WEIGHTS]))
        store = root.hub_in_use / "blobs" / "ab" / ("a" * 64)
        store.parent.mkdir(parents=True)
        blob.replace(store)
        blob.symlink_to(store)
        plan = removal(root, self.manifest_of(root), "m")
        assert plan.bytes < len(FILES[WEIGHTS]), "the shared store does not count as freed"
        remove(root, self.manifest_of(root), "m")
        assert store.read_bytes() == FILES[WEIGHTS]
        assert not work.folder.exists()


class TestStandIns:
    def test_stand_in_without_one_of_its_files_is_not_used(self, root: Root) -> None:
        folder = stand_ins.folder_of(root, "m")
        blobs = {"unet/a.json": "1" * 64, "vae/b.json": "2" * 64}
        revision = stand_ins._revision(blobs)
        for path, blob in blobs.items():
            (folder / "blobs").mkdir(parents=True, exist_ok=True)
            (folder / "blobs" / blob).write_bytes(b"{}")
            snapshots.link(folder, revision, [(path, blob)])
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(revision)
        assert stand_ins.snapshot_of(root, "m") == folder / "snapshots" / revision
        (folder / "snapshots" / revision / "vae/b.json").unlink()
        assert stand_ins.snapshot_of(root, "m") is None


class TestSecrets:
    def test_password_in_an_endpoint_is_never_stored(
        self, root: Root, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = hub_server.start(serve, REPO, FILES)
        url = server.url.replace("http://", f"http://user:{TOKEN}@")
        work = pull_of(root, url, pinned=False, trust=True)
        run(work)
        step.record(root, "m", f"{url} does not answer; {TOKEN}")
        for path in root.path.rglob("*"):
            if path.is_file():
                assert b"T" * 30 not in path.read_bytes(), path
        assert step.recorded(root)

    @pytest.mark.parametrize(
        "secret",
        [
            "hf_" + "a" * 34,
            "hf_oauth_eyJhbGciOi.eyJzdWIi-x_y",
            "hf_jwt_eyJhbGciOi",
            "api_org_" + "b" * 34,
            "https://SECRETKEY@mirror.example/simple",
            "http://user:pa/SECRETKEY@127.0.0.1:80/x",
            "http://user:pa@SECRETKEY@host/x",
            "http://user:SECRETKEY@[::1]:8080/x",
        ],
    )
    def test_redact_removes_every_form_of_secret(self, secret: str) -> None:
        redacted = redact(f"before {secret} after")
        for part in ("a" * 34, "eyJ", "b" * 34, "SECRETKEY"):
            assert part not in redacted
        assert redacted.startswith("before ")
        assert redacted.endswith(" after")

    def test_redact_keeps_text_without_a_secret(self) -> None:
        for text in (
            "http://127.0.0.1:8090/owner/name@rev",
            "http://[::1]:8080/owner/name@rev",
            "https://hub.example/a/b@1234567",
            "see hf_hub_download",
        ):
            assert redact(text) == text

    def test_redact_removes_the_users_token_in_any_form(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "plain-as-day")
        assert redact("it was plain-as-day here") == "it was hf_… here"

    def test_redact_removes_control_characters(self) -> None:
        assert redact("it answers \x1b[2J\x9b31m403\tGo\n") == "it answers [2J31m403\tGo\n"

    def test_password_of_netrc_is_not_sent_to_a_redirect_target(self, root: Root, serve: Any, home: Path) -> None:
        (home / ".netrc").write_text(f"default login me password {TOKEN}\n")
        target_server = serve({"/data": FILES[WEIGHTS]})
        redirect = Fault(
            f"/resolve/{REVISION}/{WEIGHTS}", status=302, headers={"Location": f"{target_server.url}/data"}
        )
        server = hub_server.start(serve, REPO, FILES, redirect)
        run(pull_of(root, server.url))
        assert {token for _, _, token in [*target_server.requests, *server.requests]} == {None}

    def test_token_is_sent_only_to_named_hosts_if_the_implicit_token_is_disabled(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        official = official_hub.official_endpoint()
        assert Hub({}, endpoint=official).token == TOKEN
        assert Hub({"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, endpoint=official).token is None
        hub = Hub({"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, endpoint=official, token_hosts=[official])
        assert hub.token == TOKEN, "a host that the user has named gets the token"

    def test_token_with_a_non_ascii_character_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_\N{GREEK SMALL LETTER ALPHA}")
        with pytest.raises(FirstlightError, match="token contains invalid characters"):
            Hub({}, endpoint=official_hub.official_endpoint()).headers()

    @pytest.mark.parametrize(
        ("named", "endpoint", "is_match"),
        [
            ("mirror.example", "https://mirror.example:8443/hub", True),
            ("MIRROR.example:8443", "https://mirror.example:8443/hub", True),
            ("https://mirror.example:8443/x", "https://mirror.example:8443/hub", True),
            ("mirror.example:80", "https://mirror.example:8443/hub", False),
            ("other.example", "https://mirror.example:8443/hub", False),
            ("example", "https://mirror.example:8443/hub", False),
            ("https://10.0.0.1", "http://10.0.0.1", False),
            ("https://10.0.0.1", "http://10.0.0.1:8090", False),
            ("http://10.0.0.1", "https://10.0.0.1", False),
            ("https://10.0.0.1", "https://10.0.0.1:8443", False),
            ("https://10.0.0.1:443", "https://10.0.0.1", True),
            ("10.0.0.1:443", "https://10.0.0.1", True),
            ("10.0.0.1:80", "https://10.0.0.1", False),
            ("host:abc", "https://host", False),
            ("http://[", "https://host", False),
            (":99999", "https://host", False),
        ],
    )
    def test_host_named_for_the_token_matches_an_endpoint_with_the_same_host_and_port(
        self, named: str, endpoint: str, is_match: bool
    ) -> None:
        assert is_host(named, endpoint) is is_match


def test_endpoint_that_a_flag_names_is_the_only_hub_of_a_pull(root: Root, serve: Any) -> None:
    assert [hub.endpoint for hub in Hubs(root, {}, endpoint="http://127.0.0.1:9").every()] == ["http://127.0.0.1:9"]


class TestCommands:
    @pytest.fixture
    def flags(self, tmp_path: Path, envs: Path, serve: Any) -> list[str]:
        hub = hub_server.start(serve, REPO, FILES, Fault("/resolve/", bytes_a_second=6_000_000))
        self.hub = hub
        text = hub_server.manifest_entry("m", REPO, FILES) + hub_server.manifest_entry("n", REPO, FILES)
        (envs / "models.toml").write_text(text)
        (tmp_path / "host.toml").write_text("relocate = []\n")
        return ["--host", str(tmp_path / "host.toml"), "--envs", str(envs), "--endpoint", hub.url]

    def test_three_parallel_pull_commands_download_each_byte_once(self, flags: list[str], home: Path) -> None:
        argv = [sys.executable, "-m", "provision", "models", "pull", "m", "--json", *flags]
        processes = [subprocess.Popen(argv, stdout=subprocess.PIPE, env=dict(os.environ)) for _ in range(3)]
        rows = [json.loads(process.communicate()[0])["models"][0] for process in processes]
        assert [row["state"] for row in rows] == ["ok"] * 3
        assert sum(row["bytes_fetched"] for row in rows) == sum(map(len, FILES.values()))
        assert count_gets(self.hub, WEIGHTS) == 1

    def test_pull_without_enough_space_is_reported_in_json_and_ends_before_the_next_model(
        self, flags: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000))
        result = CliRunner().invoke(models.app, ["pull", "m", "n", "--json", *flags])
        document = json.loads(result.stdout)
        assert (result.exit_code, document["exit"]) == (4, 4)
        assert [row["name"] for row in document["models"]] == ["m"], "the next model would not fit either"
        assert "bytes are free" in document["models"][0]["error"]

    def test_pull_is_refused_if_no_hub_is_on_the_host_of_send_token_to(self, flags: list[str]) -> None:
        result = CliRunner().invoke(models.app, ["pull", "m", "--send-token-to", "huggingface.example", *flags])
        assert result.exit_code == 2
        assert "this pull uses no hub on that host. Its hubs are: http://127.0.0.1" in result.stderr

    def test_internal_error_of_a_pull_shows_no_token(self, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise ZeroDivisionError(f"with {TOKEN}")

        monkeypatch.setattr("provision.cli.models_run.pull", fail)
        result = CliRunner().invoke(models.app, ["pull", "m", *flags])
        assert result.exit_code == 1
        assert "ZeroDivisionError: with hf_…" in result.stderr
        assert TOKEN not in result.stderr
