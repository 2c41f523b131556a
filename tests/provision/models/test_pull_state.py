"""What a pull finds in a cache that others use too: their locks, refs and races; and secrets that stay ours."""

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
from provision.models.inventory import others
from provision.models.remove import removal, remove
from tests.conftest import CHECKOUT
from tests.provision import hub_server
from tests.provision.conftest import git_sha1
from tests.provision.http_server import Fault
from tests.provision.hub_server import REVISION
from tests.provision.model_pulls import FILES, REPO, WEIGHTS, gets, is_whole, pull_of, run

if TYPE_CHECKING:
    from pathlib import Path

    from provision.core.layout import Root

TOKEN = "hf_" + "T" * 30
OLD = "2" * 40


class TestLocks:
    @pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC], ids=["not ours", "no space"])
    def test_a_lock_that_cannot_be_had_is_a_fault_and_nothing_is_taken_unverified(
        self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        def refuse(self: blob_lock.BlobLock) -> bool:
            raise OSError(code, os.strerror(code), "a lock")

        monkeypatch.setattr(blob_lock.BlobLock, "take", refuse)
        evil = hub_server.start(play, REPO, {**FILES, "unet/config.json": b'{"a": 6}\n'})
        played = hub_server.start(play, REPO, FILES)
        played.content |= {path: body for path, body in evil.content.items() if "/resolve/" in path}
        work = pull_of(root, played.url)
        with pytest.raises(BlockedError, match="a lock"):
            run(work)
        assert not gets(played, "/resolve/")
        assert not list(work.snapshot.rglob("*.json"))

    def test_waiting_for_another_process_is_said_once(self, root: Root, play: Any) -> None:
        played = hub_server.start(play, REPO, FILES)
        work = pull_of(root, played.url)
        plan = work.plan()
        name = next(each.listed.blob for each in plan.needed if each.file.path == WEIGHTS)
        held = blob_lock.BlobLock(root.hub_in_use / ".locks" / work.spec.folder / f"{name}.lock")
        assert held.take()
        told: list[str] = []

        def tell(text: str) -> None:
            told.append(text)
            held.release()

        work.health.tell = tell
        work.run(plan, lambda *_: None)
        assert is_whole(work)
        assert told == [f"{WEIGHTS} is being fetched by another process; waiting for it"]

    def test_records_of_two_processes_are_both_kept(self, root: Root, play: Any) -> None:
        script = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from pathlib import Path\n"
            "from provision.models import step as models; from provision.models import pins\n"
            "from provision.models.hub_client import ListedFile\n"
            "from provision.core.layout import Root\n"
            "from types import SimpleNamespace\n"
            "root, me = Root(Path(sys.argv[2])), sys.argv[3]\n"
            "for number in range(25):\n"
            "    spec = SimpleNamespace(repo=f'owner/{me}{number}', revision='1' * 40)\n"
            "    pins.keep(root, spec, [ListedFile('a.json', 1, '3' * 40)], 'official')\n"
            "    models.record(root, f'{me}{number}', 'silent')\n"
        )
        running = [
            subprocess.Popen([sys.executable, "-c", script, str(CHECKOUT), str(root.path), name]) for name in "ab"
        ]
        assert [each.wait() for each in running] == [0, 0]
        assert len(step.recorded(root)) == 50
        assert root.model_pins.read_text().count('"from"') == 50

    def test_another_user_may_pull_what_is_whole(self, root: Root, play: Any, tmp_path: Path) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES).url)
        run(work)
        before = {path: path.lstat().st_mtime_ns for path in work.folder.rglob("*")}
        again = pull_of(root, "http://127.0.0.1:9")
        again.run(again.plan(), lambda *_: None)
        assert {path: path.lstat().st_mtime_ns for path in work.folder.rglob("*")} == before, "no write"


class TestMain:
    def other(self, work: Any) -> None:
        snapshot = work.folder / "snapshots" / OLD
        snapshot.mkdir(parents=True)
        (work.folder / "refs").mkdir(exist_ok=True)
        (work.folder / "refs/main").write_text(OLD)
        blob = work.folder / "blobs" / git_sha1(b"old")
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(b"old")
        (snapshot / "old.json").symlink_to(blob)

    def test_what_we_have_named_moves_with_the_manifest(self, root: Root, play: Any) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES).url)
        self.other(work)
        (work.folder / "firstlight-main").write_text(OLD)
        run(work)
        assert (work.folder / "refs/main").read_text() == REVISION

    def test_what_somebody_else_has_named_stays_and_is_said(self, root: Root, play: Any) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES).url)
        self.other(work)
        run(work)
        assert (work.folder / "refs/main").read_text() == OLD
        assert work.notes == [
            "refs/main names 2222222, which is here too: what names no revision loads that; ours is revision=1111111…"
        ]

    @pytest.mark.parametrize("text", ["", "no commit", "3" * 40])
    def test_a_dead_one_is_named_anew(self, root: Root, play: Any, text: str) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES).url)
        (work.folder / "refs").mkdir(parents=True)
        (work.folder / "refs/main").write_text(text)
        run(work)
        assert (work.folder / "refs/main").read_text() == REVISION


class TestRemoval:
    def known(self, root: Root) -> manifest.Manifest:
        return manifest.load(root.path / "models.toml")

    def test_an_older_commit_is_listed_and_can_go(self, root: Root, play: Any) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES).url)
        TestMain().other(work)
        run(work)
        name = f"{REPO}@{OLD[:12]}"
        assert others(root, self.known(root)) == {name: 3}
        remove(root, self.known(root), name)
        assert not (work.folder / "snapshots" / OLD).exists()
        assert is_whole(work)
        assert others(root, self.known(root)) == {}
        with pytest.raises(FirstlightError, match="0 snapshots of that name are here"):
            removal(root, self.known(root), name)
        with pytest.raises(FirstlightError, match="is what m is pinned to"):
            removal(root, self.known(root), f"{REPO}@{REVISION}")

    def test_what_another_commit_shares_stays(self, root: Root, play: Any) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES).url)
        run(work)
        snapshots.link(work.folder, OLD, [("same.safetensors", (work.snapshot / WEIGHTS).readlink().name)])
        remove(root, self.known(root), "m")
        assert (work.folder / "snapshots" / OLD / "same.safetensors").read_bytes() == FILES[WEIGHTS]
        assert not work.snapshot.exists(), "an empty folder would be filled anew from what the other one keeps"

    def test_what_an_unfinished_pull_has_left_can_go(self, root: Root, play: Any) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES, Fault("vae/", status=404), Fault("unet/c", cut=4)).url)
        with pytest.raises(FirstlightError):
            run(work)
        (work.folder / "blobs" / f"{git_sha1(FILES['unet/config.json'])}.firstlight-part").write_bytes(b"{")
        gone = removal(root, self.known(root), "m")
        assert gone.bytes >= len(FILES[WEIGHTS])
        remove(root, self.known(root), "m")
        assert not work.folder.exists()

    def test_what_another_entry_has_begun_stays(self, root: Root, play: Any) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES).url)
        run(work)
        other = {"half.safetensors": b"half" * 100}
        text = hub_server.manifest_entry("m", REPO, FILES) + hub_server.manifest_entry("half", REPO, other)
        (root.path / "models.toml").write_text(text)
        digest = self.known(root).models["half"].files[0].sha256
        part = work.folder / "blobs" / f"{digest}.firstlight-part"
        part.write_bytes(b"half")
        stranger = work.folder / "blobs" / ("7" * 40)
        stranger.write_bytes(b"?")
        remove(root, self.known(root), "m")
        assert part.exists()
        assert stranger.exists()
        assert not list(work.snapshot.rglob("*.json"))

    @pytest.mark.parametrize("pinned", [True, False])
    def test_a_store_that_repositories_share_is_not_ours_to_take(self, root: Root, play: Any, pinned: bool) -> None:
        work = pull_of(root, hub_server.start(play, REPO, FILES).url, pinned=pinned, trust=True)
        run(work)
        root.model_pins.unlink(missing_ok=True)
        blob = next(path for path in (work.folder / "blobs").iterdir() if path.stat().st_size == len(FILES[WEIGHTS]))
        store = root.hub_in_use / "blobs" / "ab" / ("a" * 64)
        store.parent.mkdir(parents=True)
        blob.replace(store)
        blob.symlink_to(store)
        gone = removal(root, self.known(root), "m")
        assert gone.bytes < len(FILES[WEIGHTS]), "what stays frees nothing"
        remove(root, self.known(root), "m")
        assert store.read_bytes() == FILES[WEIGHTS]
        assert not work.folder.exists()


class TestStandIns:
    def test_one_that_lacks_a_part_is_not_there(self, root: Root) -> None:
        folder = stand_ins.folder_of(root, "m")
        named = {"unet/a.json": "1" * 64, "vae/b.json": "2" * 64}
        revision = stand_ins._revision(named)
        for path, blob in named.items():
            (folder / "blobs").mkdir(parents=True, exist_ok=True)
            (folder / "blobs" / blob).write_bytes(b"{}")
            snapshots.link(folder, revision, [(path, blob)])
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(revision)
        assert stand_ins.snapshot_of(root, "m") == folder / "snapshots" / revision
        (folder / "snapshots" / revision / "vae/b.json").unlink()
        assert stand_ins.snapshot_of(root, "m") is None


class TestSecrets:
    def test_none_of_an_address_is_kept(self, root: Root, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        played = hub_server.start(play, REPO, FILES)
        url = played.url.replace("http://", f"http://user:{TOKEN}@")
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
    def test_no_form_of_one_is_shown(self, secret: str) -> None:
        shown = redact(f"before {secret} after")
        for part in ("a" * 34, "eyJ", "b" * 34, "SECRETKEY"):
            assert part not in shown
        assert shown.startswith("before ")
        assert shown.endswith(" after")

    def test_what_is_no_secret_is_left_as_it_is(self) -> None:
        for text in (
            "http://127.0.0.1:8090/owner/name@rev",
            "http://[::1]:8080/owner/name@rev",
            "https://hub.example/a/b@1234567",
            "see hf_hub_download",
        ):
            assert redact(text) == text

    def test_a_token_of_any_form_is_not_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "plain-as-day")
        assert redact("it was plain-as-day here") == "it was hf_… here"

    def test_escapes_of_a_server_do_not_reach_the_terminal(self) -> None:
        assert redact("it answers \x1b[2J\x9b31m403\tGo\n") == "it answers [2J31m403\tGo\n"

    def test_a_password_of_netrc_is_shown_to_no_host_of_a_redirect(self, root: Root, play: Any, home: Path) -> None:
        (home / ".netrc").write_text(f"default login me password {TOKEN}\n")
        far = play({"/data": FILES[WEIGHTS]})
        near = Fault(f"/resolve/{REVISION}/{WEIGHTS}", status=302, headers={"Location": f"{far.url}/data"})
        played = hub_server.start(play, REPO, FILES, near)
        run(pull_of(root, played.url))
        assert {token for _, _, token in [*far.requests, *played.requests]} == {None}

    def test_a_token_that_is_not_to_be_sent_unasked_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        official = official_hub.official_endpoint()
        assert Hub({}, endpoint=official).token == TOKEN
        assert Hub({"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, endpoint=official).token is None
        named = Hub({"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, endpoint=official, token_hosts=[official])
        assert named.token == TOKEN, "the user's own word goes before"

    def test_a_token_that_no_request_can_carry_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_\N{GREEK SMALL LETTER ALPHA}")
        with pytest.raises(FirstlightError, match="characters that no token has"):
            Hub({}, endpoint=official_hub.official_endpoint()).headers()

    @pytest.mark.parametrize(
        ("named", "endpoint", "is_it"),
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
    def test_a_host_is_named_in_any_form(self, named: str, endpoint: str, is_it: bool) -> None:
        assert is_host(named, endpoint) is is_it


def test_one_hub_alone_is_asked_where_one_is_named(root: Root, play: Any) -> None:
    assert [each.endpoint for each in Hubs(root, {}, endpoint="http://127.0.0.1:9").every()] == ["http://127.0.0.1:9"]


class TestCommands:
    @pytest.fixture
    def flags(self, tmp_path: Path, envs: Path, play: Any) -> list[str]:
        played = hub_server.start(play, REPO, FILES, Fault("/resolve/", bytes_a_second=6_000_000))
        self.played = played
        text = hub_server.manifest_entry("m", REPO, FILES) + hub_server.manifest_entry("n", REPO, FILES)
        (envs / "models.toml").write_text(text)
        (tmp_path / "host.toml").write_text("relocate = []\n")
        return ["--host", str(tmp_path / "host.toml"), "--envs", str(envs), "--endpoint", played.url]

    def test_three_commands_at_once_fetch_each_byte_once(self, flags: list[str], home: Path) -> None:
        argv = [sys.executable, "-m", "provision", "models", "pull", "m", "--json", *flags]
        running = [subprocess.Popen(argv, stdout=subprocess.PIPE, env=dict(os.environ)) for _ in range(3)]
        rows = [json.loads(each.communicate()[0])["models"][0] for each in running]
        assert [row["state"] for row in rows] == ["ok"] * 3
        assert sum(row["bytes_fetched"] for row in rows) == sum(map(len, FILES.values()))
        assert gets(self.played, WEIGHTS) == 1

    def test_what_blocks_all_is_told_in_the_object_too(self, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000))
        done = CliRunner().invoke(models.app, ["pull", "m", "n", "--json", *flags])
        told = json.loads(done.stdout)
        assert (done.exit_code, told["exit"]) == (4, 4)
        assert [row["name"] for row in told["models"]] == ["m"], "the next one would not fit either"
        assert "bytes are free" in told["models"][0]["error"]

    def test_a_host_for_the_token_that_is_not_asked_is_told(self, flags: list[str]) -> None:
        done = CliRunner().invoke(models.app, ["pull", "m", "--send-token-to", "huggingface.example", *flags])
        assert done.exit_code == 2
        assert "no hub of this pull is there. Asked are: http://127.0.0.1" in done.stderr

    def test_a_fault_of_ours_shows_no_secret(self, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise ZeroDivisionError(f"with {TOKEN}")

        monkeypatch.setattr("provision.cli.models_run.pull", fail)
        done = CliRunner().invoke(models.app, ["pull", "m", *flags])
        assert done.exit_code == 1
        assert "ZeroDivisionError: with hf_…" in done.stderr
        assert TOKEN not in done.stderr
