"""Tests the commands `provision models …` against a loopback hub: output, cache, and the secrecy of tokens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from provision.cli import models_output
from provision.config.models import ModelSpec
from provision.config.toml import load_tables
from provision.models.hub_in_use import HubInUse
from provision.models.inventory import CachedModel
from provision.models.verify import FileState
from tests.conftest import CHECKOUT
from tests.provision import hub_server, run_command
from tests.provision.http_server import Fault
from tests.provision.hub_server import REVISION, manifest_entry
from tests.provision.model_pulls import FILES, REPO, WEIGHTS

if TYPE_CHECKING:
    from tests.provision.http_server import Server

TOKEN = "hf_" + "S" * 30
FP16 = {"model_index.json": FILES["model_index.json"], "unet/model.fp16.safetensors": b"half" * 1000}
SMALL = {path: content for path, content in FILES.items() if path != WEIGHTS}


def provision(*argv: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `provision` with added environment variables, and return its output and exit code."""
    return run_command.provision(*argv, env=environ)


@pytest.fixture
def envs(envs: Path) -> Path:
    """Return an envs/ folder with two models; the first has an extra, `half`, which adds a file."""
    extra = 'extras.half = [{path = "unet/model.fp16.safetensors"}]\n'
    text = manifest_entry("m", REPO, SMALL, extra=extra) + manifest_entry("half", REPO, FP16, variant="fp16")
    (envs / "models.toml").write_text(text)
    (envs / "architectures").symlink_to(CHECKOUT / "envs/architectures")
    return envs


@pytest.fixture
def hub(serve: Any, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Start a hub with the files of both models, and set HF_ENDPOINT to its URL."""
    server = hub_server.start(serve, REPO, {**SMALL, **FP16})
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    return server


@pytest.fixture
def flags(envs: Path, tmp_path: Path) -> list[object]:
    """Return the flags for the manifest and a host.toml with the model `m`."""
    (tmp_path / "host.toml").write_text('relocate = []\nmodels = ["m"]\n')
    return ["--host", tmp_path / "host.toml", "--envs", envs]


def cache(home: Path) -> Path:
    """Return the folder of the repository in the hub cache of the home."""
    return home / ".cache/huggingface/hub" / f"models--{REPO.replace('/', '--')}"


def test_dry_run_of_a_pull_prints_the_plan_and_the_pull_prints_the_result(
    hub: Server, flags: list[object], home: Path
) -> None:
    dry_run = provision("models", "pull", "--dry-run", *flags)
    assert dry_run.returncode == 3
    total = sum(map(len, SMALL.values()))
    assert f"m: 0 of 3 files are present; {total:,} bytes to fetch from" in dry_run.stdout
    assert not cache(home).exists()
    completed = provision("models", "pull", *flags)
    assert completed.returncode == 0, completed.stderr
    assert f"3 files from {hub.url}" in completed.stdout
    load = f'DiffusionPipeline.from_pretrained("{REPO}", torch_dtype=torch.float16, safety_checker=None)'
    assert f"load it: {load}\n" in completed.stdout
    assert (cache(home) / "snapshots" / REVISION / "vae/model.safetensors").read_bytes() == FILES[
        "vae/model.safetensors"
    ]
    second = provision("models", "pull", "--json", *flags)
    row = json.loads(second.stdout)["models"][0]
    assert (row["state"], row["bytes_fetched"], row["bytes_total"], row["load"]) == ("ok", 0, total, load)
    assert {file["state"] for file in row["files"]} == {"ok"}


def test_plan_shows_a_hub_without_its_password(flags: list[object]) -> None:
    completed = provision("plan", *flags, HF_ENDPOINT="http://user:s3cretpw@127.0.0.1:9")
    assert "from http://…@127.0.0.1:9" in completed.stdout
    assert "s3cretpw" not in completed.stdout + completed.stderr


def test_json_of_models_list_has_null_bytes_if_the_size_of_a_file_is_unknown(flags: list[object], envs: Path) -> None:
    (envs / "models.toml").write_text(
        f'[m]\nrepo = "{REPO}"\nrevision = "{REVISION}"\nlicense = "mit"\narchitecture = "tiny-sd"\n'
        'files = [{path = "model_index.json", size = 7}, {path = "unet/model.safetensors"}]\n'
    )
    (row,) = json.loads(provision("models", "list", "--json", *flags).stdout)["models"]
    assert row["bytes"] is None


def test_json_of_a_failed_pull_has_the_error_and_the_state_of_each_file(hub: Server, flags: list[object]) -> None:
    hub.faults.append(Fault("vae/", status=404))
    completed = provision("models", "pull", "--json", *flags)
    document = json.loads(completed.stdout)
    assert (document["schema"], document["command"], document["exit"], completed.returncode) == (1, "models pull", 1, 1)
    row = document["models"][0]
    assert (row["name"], row["repo"], row["revision"], row["state"]) == ("m", REPO, REVISION, "failed")
    assert "answers 404" in row["error"]
    assert [file["state"] for file in row["files"] if file["path"].startswith("vae")] == ["missing"]


def test_pull_of_two_models_pulls_the_second_after_the_first_fails(hub: Server, flags: list[object]) -> None:
    hub.faults.append(Fault("vae/", status=404))
    completed = provision("models", "pull", "m", "half", "--json", *flags)
    assert [row["state"] for row in json.loads(completed.stdout)["models"]] == ["failed", "ok"]


class TestVerify:
    @pytest.fixture(autouse=True)
    def _pulled(self, hub: Server, flags: list[object]) -> None:
        assert provision("models", "pull", *flags).returncode == 0
        hub.requests.clear()

    def test_models_verify_hashes_every_file_without_a_request(self, hub: Server, flags: list[object]) -> None:
        completed = provision("models", "verify", *flags)
        assert (completed.returncode, hub.requests) == (0, [])
        assert "every hash matches" in completed.stdout
        assert "vae/model.safetensors" in completed.stdout

    def test_flipped_bit_is_detected_by_verify_with_hashes_and_not_by_size(
        self, flags: list[object], home: Path
    ) -> None:
        blob = (cache(home) / "snapshots" / REVISION / "vae/model.safetensors").resolve()
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        blob.write_bytes(content)
        assert provision("models", "verify", "--depth", "size", *flags).returncode == 0
        completed = provision("models", "verify", "--json", *flags)
        row = json.loads(completed.stdout)["models"][0]
        assert (completed.returncode, row["state"]) == (3, "corrupt")
        assert [file["path"] for file in row["files"] if file["state"] == "corrupt"] == ["vae/model.safetensors"]
        assert provision("models", "pull", *flags).returncode == 0
        assert provision("models", "verify", *flags).returncode == 0

    def test_verify_with_depth_header_reports_a_file_that_is_not_in_safetensors_format(
        self, flags: list[object]
    ) -> None:
        completed = provision("models", "verify", "--depth", "header", *flags)
        assert completed.returncode == 3
        assert "header" in completed.stdout, "the files of this test are not safetensors files"

    def test_models_verify_restores_lost_links_and_refs_without_a_request(
        self, hub: Server, flags: list[object], home: Path
    ) -> None:
        for name in (
            "refs/main",
            f"snapshots/{REVISION}/unet/config.json",
            f"snapshots/{REVISION}/vae/model.safetensors",
        ):
            (cache(home) / name).unlink()
        assert provision("models", "verify", "--dry-run", *flags).returncode == 3
        completed = provision("models", "verify", *flags)
        assert (completed.returncode, hub.requests) == (0, [])
        assert "repaired" in completed.stdout
        assert (cache(home) / "refs/main").read_text() == REVISION

    def test_another_user_loads_a_pulled_model_from_a_read_only_cache(
        self, flags: list[object], home: Path, tmp_path: Path
    ) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root can become another user")
        script = (
            "import os, sys; from huggingface_hub import snapshot_download\n"
            "os.setgid(65534); os.setuid(65534)\n"
            "named = dict(cache_dir=sys.argv[3], allow_patterns=['vae/*', '*.json'], local_files_only=True)\n"
            "found = snapshot_download(sys.argv[1], revision=sys.argv[2], **named)\n"
            "print(len(open(found + '/vae/model.safetensors', 'rb').read()), found)\n"
        )
        subprocess.run(["chmod", "-R", "a-w", str(cache(home))], check=True)
        for folder in (tmp_path, *tmp_path.parents):
            if folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o055)
        argv = [sys.executable, "-c", script, REPO, REVISION, str(cache(home).parent)]
        completed = subprocess.run(
            argv, capture_output=True, text=True, check=False, env=dict(os.environ) | {"HOME": "/"}
        )
        subprocess.run(["chmod", "-R", "u+w", str(cache(home))], check=True)
        assert completed.returncode == 0, completed.stderr
        assert completed.stdout.strip().endswith(REVISION)


class TestRemove:
    @pytest.fixture(autouse=True)
    def _pulled(self, hub: Server, flags: list[object]) -> None:
        assert provision("models", "pull", "m", "half", *flags).returncode == 0

    def test_remove_deletes_only_files_that_no_other_model_needs(self, flags: list[object], home: Path) -> None:
        snapshot = cache(home) / "snapshots" / REVISION
        freed = (snapshot / "vae/model.safetensors").stat().st_size + (snapshot / "unet/config.json").stat().st_size
        refused = provision("models", "remove", "m", *flags)
        assert refused.returncode == 2
        assert "--yes" in refused.stderr
        assert provision("models", "remove", "m", "--dry-run", *flags).returncode == 3
        assert (snapshot / "vae/model.safetensors").exists()
        completed = provision("models", "remove", "m", "--yes", *flags)
        assert f"{freed:,} bytes become free" in completed.stdout
        assert sorted(path.name for path in snapshot.rglob("*") if path.is_file()) == [
            "model.fp16.safetensors",
            "model_index.json",
        ]
        assert provision("models", "verify", "half", *flags).returncode == 0
        assert provision("models", "remove", "half", "--yes", *flags).returncode == 0
        assert not cache(home).exists()

    def test_remove_keeps_a_file_that_the_user_put_into_the_snapshot(self, flags: list[object], home: Path) -> None:
        users_file = cache(home) / "snapshots" / REVISION / "mine.txt"
        users_file.write_text("keep")
        for name in ("m", "half"):
            assert provision("models", "remove", name, "--yes", *flags).returncode == 0
        assert users_file.read_text() == "keep"

    def test_remove_keeps_the_files_of_another_revision(self, flags: list[object], home: Path) -> None:
        link = cache(home) / "snapshots" / ("2" * 40) / "model_index.json"
        link.parent.mkdir()
        link.symlink_to((cache(home) / "snapshots" / REVISION / "model_index.json").readlink())
        for name in ("m", "half"):
            assert provision("models", "remove", name, "--yes", *flags).returncode == 0
        assert link.read_bytes() == FILES["model_index.json"]

    def test_remove_is_blocked_while_another_run_downloads_a_file(self, flags: list[object], home: Path) -> None:
        import filelock

        blob = (cache(home) / "snapshots" / REVISION / "vae/model.safetensors").resolve()
        with filelock.FileLock(cache(home).parent / ".locks" / cache(home).name / f"{blob.name}.lock"):
            completed = provision("models", "remove", "m", "--yes", *flags)
        assert completed.returncode == 4
        assert "is being downloaded by another run" in completed.stderr
        assert blob.exists()


def test_models_lock_adds_hashes_once_and_refuses_a_hub_with_other_hashes(
    serve: Any, tmp_path: Path, flags: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from provision.cli.models import app
    from provision.mirrors import official
    from provision.models import hub_client

    server = hub_server.start(serve, REPO, FILES)
    for module in (hub_client, official):
        monkeypatch.setattr(module, "official_endpoint", lambda: server.url)
    user_manifest = tmp_path / "mine.toml"
    user_manifest.write_text("# mine\n" + manifest_entry("own", REPO, FILES, pinned=False))
    argv = ["lock", "own", "--manifest", str(user_manifest), *map(str, flags)]
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.output
    assert user_manifest.read_text().startswith("# mine\n")
    files = load_tables(user_manifest, ModelSpec)["own"].files
    assert all(file.locked and file.size == len(FILES[file.path]) for file in files)
    before = user_manifest.read_bytes()
    assert "pinned already" in CliRunner().invoke(app, argv).output
    assert user_manifest.read_bytes() == before
    changed_hub = hub_server.start(serve, REPO, {**FILES, WEIGHTS: b"other"})
    for module in (hub_client, official):
        monkeypatch.setattr(module, "official_endpoint", lambda: changed_hub.url)
    refused = CliRunner().invoke(app, argv)
    assert refused.exit_code == 1
    assert "Nothing was written" in refused.output
    assert user_manifest.read_bytes() == before


def test_token_is_never_printed_or_stored(
    hub: Server, flags: list[object], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    host = hub.url.removeprefix("http://")
    hub.faults.append(Fault("vae/", status=403, body=TOKEN.encode(), headers={"X-Error-Code": TOKEN}, times=1))
    runs = [
        provision("models", "pull", "--send-token-to", host, *flags),
        provision("models", "pull", "--send-token-to", host, "--json", *flags),
        provision("models", "verify", *flags),
        provision("models", "list", "--json", *flags),
        provision("models", "pull", "--endpoint", f"http://user:{TOKEN}@127.0.0.1:9", "half", *flags),
    ]
    assert any(token for _, _, token in hub.requests), "the token was sent to the named host"
    assert [run.returncode for run in runs[:4]] == [1, 0, 0, 0]
    assert not any(TOKEN in run.stdout + run.stderr for run in runs)
    for path in [*home.rglob("*"), *tmp_path.rglob("*")]:
        if path.is_file() and path.stat().st_size < 1_000_000:
            assert TOKEN.encode() not in path.read_bytes(), path


def test_pull_into_an_unmounted_root_is_blocked(hub: Server, flags: list[object], tmp_path: Path) -> None:
    completed = provision("models", "pull", *flags, "--root", tmp_path / "volume")
    assert completed.returncode == 4
    assert "not set up, or its volume is not mounted" in completed.stderr
    assert not hub.requests


def test_pull_into_a_hub_cache_that_is_a_dangling_link_is_blocked(
    hub: Server, flags: list[object], tmp_path: Path, home: Path
) -> None:
    (home / ".cache/huggingface").mkdir(parents=True)
    (home / ".cache/huggingface/hub").symlink_to(tmp_path / "gone/hub")
    completed = provision("models", "pull", *flags)
    assert completed.returncode == 4
    assert "its volume is not mounted" in completed.stderr
    assert not (tmp_path / "gone").exists()


def test_other_homes_pull_models_from_the_server_of_models_seed(
    hub: Server, flags: list[object], tmp_path: Path
) -> None:
    # A background job of a shell may ignore SIGINT. Without this handler the server would inherit that.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert provision("models", "pull", "m", "half", *flags).returncode == 0
    argv = [sys.executable, "-m", "provision", "models", "seed", "--bind", "127.0.0.1", "--port", "0", *map(str, flags)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as seed:
        try:
            assert seed.stdout is not None
            lines = [seed.stdout.readline() for _ in range(2)]
            url = lines[1].split()[-1]
            second_home = tmp_path / "other"
            second_home.mkdir()
            completed = provision("models", "pull", "half", "--endpoint", url, *flags, HOME=str(second_home))
            assert completed.returncode == 0, completed.stdout + completed.stderr
            assert provision("models", "verify", "half", *flags, HOME=str(second_home)).returncode == 0
            third_home = tmp_path / "third"
            third_home.mkdir()
            script = (
                "import sys; from huggingface_hub import snapshot_download\n"
                "print(snapshot_download(sys.argv[1], endpoint=sys.argv[2], token=False))\n"
            )
            snapshot_process = subprocess.run(
                [sys.executable, "-c", script, REPO, url],
                capture_output=True,
                text=True,
                check=False,
                env=dict(os.environ) | {"HOME": str(third_home)},
            )
            assert snapshot_process.returncode == 0, snapshot_process.stderr
            names = sorted(path.name for path in Path(snapshot_process.stdout.strip()).rglob("*") if path.is_file())
            assert names == ["config.json", "model.fp16.safetensors", "model.safetensors", "model_index.json"]
        finally:
            signal.signal(signal.SIGINT, handler)
            seed.send_signal(signal.SIGINT)
            try:
                assert seed.wait(600) == 130
            finally:
                seed.kill()  # without it, the end of the `with` block may wait forever


def test_models_show_reads_a_pulled_model_from_the_cache_and_an_absent_one_from_its_architecture(
    hub: Server, flags: list[object]
) -> None:
    absent = json.loads(provision("models", "show", "m", "--json", *flags).stdout)
    assert (absent["read_from"], absent["pipeline"]) == ("the architecture", "StableDiffusionPipeline")
    assert absent["components"][0]["parameters"] == 200_644
    provision("models", "pull", *flags)
    present = json.loads(provision("models", "show", "m", "--json", *flags).stdout)
    assert present["read_from"] == "the cache"


def test_models_list_shows_the_state_of_each_model_before_and_after_a_pull(
    hub: Server, flags: list[object], home: Path
) -> None:
    rows = json.loads(provision("models", "list", "--json", *flags).stdout)["models"]
    assert [(row["name"], row["state"]) for row in rows] == [("m", "absent"), ("half", "absent")]
    provision("models", "pull", "m+half", "--trust-mirror", *flags)
    (home / ".cache/huggingface/hub/models--some--other/blobs").mkdir(parents=True)
    document = json.loads(provision("models", "list", "--json", *flags).stdout)
    assert [(row["name"], row["state"]) for row in document["models"]] == [("m+half", "whole"), ("half", "whole")]
    assert document["others"] == {"some/other": 0}
    assert "m+half" in provision("models", "list", *flags).stdout


@pytest.mark.parametrize(("state", "text"), [("ok", "present"), ("missing", "stand-in (no hub)")])
def test_model_that_has_a_stand_in_is_listed_as_present_if_complete_else_as_stand_in(
    envs: Path, state: str, text: str
) -> None:
    model = load_tables(envs / "models.toml", ModelSpec)["m"]
    cached = [CachedModel("m", model, [FileState("vae/model.safetensors", 1, state)])]
    hub = HubInUse(Path("/hub"), "HF_HUB_CACHE")
    assert models_output.list_lines(hub, cached, {}, {"m": "no hub"}).endswith(text)
    assert json.loads(models_output.list_json(hub, cached, {}, {"m": "no hub"}))["models"][0]["stand_in"]
