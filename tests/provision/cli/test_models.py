"""The commands of models against a hub on loopback: what is said, what is left, what never leaks."""

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
from provision.models.inventory import CachedModel
from provision.models.verify import FileState
from tests.conftest import CHECKOUT
from tests.provision import hub_server, run_command
from tests.provision.http_server import Fault
from tests.provision.hub_server import REVISION, manifest_entry
from tests.provision.model_pulls import FILES, REPO, WEIGHTS

if TYPE_CHECKING:
    from tests.provision.http_server import Played

TOKEN = "hf_" + "S" * 30
FP16 = {"model_index.json": FILES["model_index.json"], "unet/model.fp16.safetensors": b"half" * 1000}
SMALL = {path: content for path, content in FILES.items() if path != WEIGHTS}


def provision(*argv: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return run_command.provision(*argv, env=environ)


@pytest.fixture
def envs(envs: Path) -> Path:
    extra = 'extras.half = [{path = "unet/model.fp16.safetensors"}]\n'
    text = manifest_entry("m", REPO, SMALL, extra=extra) + manifest_entry("half", REPO, FP16, variant="fp16")
    (envs / "models.toml").write_text(text)
    (envs / "architectures").symlink_to(CHECKOUT / "envs/architectures")
    return envs


@pytest.fixture
def hub(play: Any, monkeypatch: pytest.MonkeyPatch) -> Played:
    played = hub_server.start(play, REPO, {**SMALL, **FP16})
    monkeypatch.setenv("HF_ENDPOINT", played.url)
    return played


@pytest.fixture
def flags(envs: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "host.toml").write_text('relocate = []\nmodels = ["m"]\n')
    return ["--host", tmp_path / "host.toml", "--envs", envs]


def cache(home: Path) -> Path:
    return home / ".cache/huggingface/hub" / f"models--{REPO.replace('/', '--')}"


def test_pull_says_its_plan_then_what_became_of_it(hub: Played, flags: list[object], home: Path) -> None:
    dry = provision("models", "pull", "--dry-run", *flags)
    assert dry.returncode == 3
    total = sum(map(len, SMALL.values()))
    assert f"m: 0 of 3 files are here; {total:,} bytes to fetch from" in dry.stdout
    assert not cache(home).exists()
    done = provision("models", "pull", *flags)
    assert done.returncode == 0, done.stderr
    assert f"3 files from {hub.url}" in done.stdout
    load = f'DiffusionPipeline.from_pretrained("{REPO}", torch_dtype=torch.float16, safety_checker=None)'
    assert f"load it: {load}\n" in done.stdout
    assert (cache(home) / "snapshots" / REVISION / "vae/model.safetensors").read_bytes() == FILES[
        "vae/model.safetensors"
    ]
    again = provision("models", "pull", "--json", *flags)
    row = json.loads(again.stdout)["models"][0]
    assert (row["state"], row["bytes_fetched"], row["bytes_total"], row["load"]) == ("ok", 0, total, load)
    assert {each["state"] for each in row["files"]} == {"ok"}


def test_a_plan_names_a_hub_without_its_password(flags: list[object]) -> None:
    done = provision("plan", *flags, HF_ENDPOINT="http://user:s3cretpw@127.0.0.1:9")
    assert "from http://…@127.0.0.1:9" in done.stdout
    assert "s3cretpw" not in done.stdout + done.stderr


def test_a_size_that_is_not_pinned_is_not_a_number(flags: list[object], envs: Path) -> None:
    (envs / "models.toml").write_text(
        f'[m]\nrepo = "{REPO}"\nrevision = "{REVISION}"\nlicense = "mit"\narchitecture = "tiny-sd"\n'
        'files = [{path = "model_index.json", size = 7}, {path = "unet/model.safetensors"}]\n'
    )
    (row,) = json.loads(provision("models", "list", "--json", *flags).stdout)["models"]
    assert row["bytes"] is None


def test_the_object_of_a_pull(hub: Played, flags: list[object]) -> None:
    hub.faults.append(Fault("vae/", status=404))
    done = provision("models", "pull", "--json", *flags)
    told = json.loads(done.stdout)
    assert (told["schema"], told["command"], told["exit"], done.returncode) == (1, "models pull", 1, 1)
    row = told["models"][0]
    assert (row["name"], row["repo"], row["revision"], row["state"]) == ("m", REPO, REVISION, "failed")
    assert "answers 404" in row["error"]
    assert [each["state"] for each in row["files"] if each["path"].startswith("vae")] == ["missing"]


def test_one_model_that_fails_does_not_hold_up_the_next(hub: Played, flags: list[object]) -> None:
    hub.faults.append(Fault("vae/", status=404))
    done = provision("models", "pull", "m", "half", "--json", *flags)
    assert [row["state"] for row in json.loads(done.stdout)["models"]] == ["failed", "ok"]


class TestVerify:
    @pytest.fixture(autouse=True)
    def _pulled(self, hub: Played, flags: list[object]) -> None:
        assert provision("models", "pull", *flags).returncode == 0
        hub.requests.clear()

    def test_every_byte_without_the_network(self, hub: Played, flags: list[object]) -> None:
        done = provision("models", "verify", *flags)
        assert (done.returncode, hub.requests) == (0, [])
        assert "every hash is right" in done.stdout
        assert "vae/model.safetensors" in done.stdout

    def test_a_flipped_bit_is_found_by_the_hash_alone(self, flags: list[object], home: Path) -> None:
        blob = (cache(home) / "snapshots" / REVISION / "vae/model.safetensors").resolve()
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        blob.write_bytes(content)
        assert provision("models", "verify", "--depth", "size", *flags).returncode == 0
        done = provision("models", "verify", "--json", *flags)
        told = json.loads(done.stdout)["models"][0]
        assert (done.returncode, told["state"]) == (3, "corrupt")
        assert [each["path"] for each in told["files"] if each["state"] == "corrupt"] == ["vae/model.safetensors"]
        assert provision("models", "pull", *flags).returncode == 0
        assert provision("models", "verify", *flags).returncode == 0

    def test_the_header_is_looked_at_between_the_two(self, flags: list[object]) -> None:
        done = provision("models", "verify", "--depth", "header", *flags)
        assert done.returncode == 3
        assert "header" in done.stdout, "the files of this test are no safetensors at all"

    def test_lost_links_and_refs_are_mended_without_the_network(
        self, hub: Played, flags: list[object], home: Path
    ) -> None:
        for name in (
            "refs/main",
            f"snapshots/{REVISION}/unet/config.json",
            f"snapshots/{REVISION}/vae/model.safetensors",
        ):
            (cache(home) / name).unlink()
        assert provision("models", "verify", "--dry-run", *flags).returncode == 3
        done = provision("models", "verify", *flags)
        assert (done.returncode, hub.requests) == (0, [])
        assert "mended" in done.stdout
        assert (cache(home) / "refs/main").read_text() == REVISION

    def test_another_user_reads_a_shared_cache(self, flags: list[object], home: Path, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("it takes root to become somebody else")
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
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=dict(os.environ) | {"HOME": "/"})
        subprocess.run(["chmod", "-R", "u+w", str(cache(home))], check=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith(REVISION)


class TestRemove:
    @pytest.fixture(autouse=True)
    def _pulled(self, hub: Played, flags: list[object]) -> None:
        assert provision("models", "pull", "m", "half", *flags).returncode == 0

    def test_only_what_nothing_else_needs_goes(self, flags: list[object], home: Path) -> None:
        snapshot = cache(home) / "snapshots" / REVISION
        freed = (snapshot / "vae/model.safetensors").stat().st_size + (snapshot / "unet/config.json").stat().st_size
        asked = provision("models", "remove", "m", *flags)
        assert asked.returncode == 2
        assert "--yes" in asked.stderr
        assert provision("models", "remove", "m", "--dry-run", *flags).returncode == 3
        assert (snapshot / "vae/model.safetensors").exists()
        done = provision("models", "remove", "m", "--yes", *flags)
        assert f"{freed:,} bytes come free" in done.stdout
        assert sorted(path.name for path in snapshot.rglob("*") if path.is_file()) == [
            "model.fp16.safetensors",
            "model_index.json",
        ]
        assert provision("models", "verify", "half", *flags).returncode == 0
        assert provision("models", "remove", "half", "--yes", *flags).returncode == 0
        assert not cache(home).exists()

    def test_what_a_user_put_there_stays(self, flags: list[object], home: Path) -> None:
        mine = cache(home) / "snapshots" / REVISION / "mine.txt"
        mine.write_text("keep")
        for name in ("m", "half"):
            assert provision("models", "remove", name, "--yes", *flags).returncode == 0
        assert mine.read_text() == "keep"

    def test_what_another_revision_needs_stays(self, flags: list[object], home: Path) -> None:
        other = cache(home) / "snapshots" / ("2" * 40) / "model_index.json"
        other.parent.mkdir()
        other.symlink_to((cache(home) / "snapshots" / REVISION / "model_index.json").readlink())
        for name in ("m", "half"):
            assert provision("models", "remove", name, "--yes", *flags).returncode == 0
        assert other.read_bytes() == FILES["model_index.json"]

    def test_what_somebody_fetches_is_left_alone(self, flags: list[object], home: Path) -> None:
        import filelock

        blob = (cache(home) / "snapshots" / REVISION / "vae/model.safetensors").resolve()
        with filelock.FileLock(cache(home).parent / ".locks" / cache(home).name / f"{blob.name}.lock"):
            done = provision("models", "remove", "m", "--yes", *flags)
        assert done.returncode == 4
        assert "is being fetched by another run" in done.stderr
        assert blob.exists()


def test_lock_completes_the_manifest_and_keeps_the_rest(
    play: Any, tmp_path: Path, flags: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from provision.cli.models import app
    from provision.mirrors import official
    from provision.models import hub_client

    played = hub_server.start(play, REPO, FILES)
    for module in (hub_client, official):
        monkeypatch.setattr(module, "official_endpoint", lambda: played.url)
    mine = tmp_path / "mine.toml"
    mine.write_text("# mine\n" + manifest_entry("own", REPO, FILES, pinned=False))
    argv = ["lock", "own", "--manifest", str(mine), *map(str, flags)]
    done = CliRunner().invoke(app, argv)
    assert done.exit_code == 0, done.output
    assert mine.read_text().startswith("# mine\n")
    files = load_tables(mine, ModelSpec)["own"].files
    assert all(file.locked and file.size == len(FILES[file.path]) for file in files)
    before = mine.read_bytes()
    assert "pinned already" in CliRunner().invoke(app, argv).output
    assert mine.read_bytes() == before
    other = hub_server.start(play, REPO, {**FILES, WEIGHTS: b"other"})
    for module in (hub_client, official):
        monkeypatch.setattr(module, "official_endpoint", lambda: other.url)
    refused = CliRunner().invoke(app, argv)
    assert refused.exit_code == 1
    assert "Nothing was written" in refused.output
    assert mine.read_bytes() == before


def test_no_token_in_anything_that_is_printed_or_kept(
    hub: Played, flags: list[object], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert any(token for _, _, token in hub.requests), "the token was in play"
    assert [run.returncode for run in runs[:4]] == [1, 0, 0, 0]
    assert not any(TOKEN in run.stdout + run.stderr for run in runs)
    for path in [*home.rglob("*"), *tmp_path.rglob("*")]:
        if path.is_file() and path.stat().st_size < 1_000_000:
            assert TOKEN.encode() not in path.read_bytes(), path


def test_a_root_that_is_not_mounted_is_not_filled(hub: Played, flags: list[object], tmp_path: Path) -> None:
    done = provision("models", "pull", *flags, "--root", tmp_path / "volume")
    assert done.returncode == 4
    assert "not set up, or its volume is not mounted" in done.stderr
    assert not hub.requests


def test_a_link_that_leads_nowhere_is_not_followed(
    hub: Played, flags: list[object], tmp_path: Path, home: Path
) -> None:
    (home / ".cache/huggingface").mkdir(parents=True)
    (home / ".cache/huggingface/hub").symlink_to(tmp_path / "gone/hub")
    done = provision("models", "pull", *flags)
    assert done.returncode == 4
    assert "its volume is not mounted" in done.stderr
    assert not (tmp_path / "gone").exists()


def test_another_host_pulls_from_a_seed(hub: Played, flags: list[object], tmp_path: Path) -> None:
    # A shell that starts us in the background has SIGINT ignored, and the seed would inherit that.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert provision("models", "pull", "m", "half", *flags).returncode == 0
    argv = [sys.executable, "-m", "provision", "models", "seed", "--bind", "127.0.0.1", "--port", "0", *map(str, flags)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as seed:
        try:
            assert seed.stdout is not None
            lines = [seed.stdout.readline() for _ in range(2)]
            url = lines[1].split()[-1]
            other = tmp_path / "other"
            other.mkdir()
            done = provision("models", "pull", "half", "--endpoint", url, *flags, HOME=str(other))
            assert done.returncode == 0, done.stdout + done.stderr
            assert provision("models", "verify", "half", *flags, HOME=str(other)).returncode == 0
            third = tmp_path / "third"
            third.mkdir()
            script = (
                "import sys; from huggingface_hub import snapshot_download\n"
                "print(snapshot_download(sys.argv[1], endpoint=sys.argv[2], token=False))\n"
            )
            client = subprocess.run(
                [sys.executable, "-c", script, REPO, url],
                capture_output=True,
                text=True,
                check=False,
                env=dict(os.environ) | {"HOME": str(third)},
            )
            assert client.returncode == 0, client.stderr
            names = sorted(path.name for path in Path(client.stdout.strip()).rglob("*") if path.is_file())
            assert names == ["config.json", "model.fp16.safetensors", "model.safetensors", "model_index.json"]
        finally:
            signal.signal(signal.SIGINT, heard)
            seed.send_signal(signal.SIGINT)
            try:
                assert seed.wait(600) == 130
            finally:
                seed.kill()  # else leaving it would wait for ever


def test_show_reads_what_is_here_and_else_the_architecture(hub: Played, flags: list[object]) -> None:
    absent = json.loads(provision("models", "show", "m", "--json", *flags).stdout)
    assert (absent["read_from"], absent["pipeline"]) == ("the architecture", "StableDiffusionPipeline")
    assert absent["components"][0]["parameters"] == 200_644
    provision("models", "pull", *flags)
    here = json.loads(provision("models", "show", "m", "--json", *flags).stdout)
    assert here["read_from"] == "the cache"


def test_list_tells_what_is_here(hub: Played, flags: list[object], home: Path) -> None:
    rows = json.loads(provision("models", "list", "--json", *flags).stdout)["models"]
    assert [(row["name"], row["state"]) for row in rows] == [("m", "absent"), ("half", "absent")]
    provision("models", "pull", "m+half", "--trust-mirror", *flags)
    (home / ".cache/huggingface/hub/models--some--other/blobs").mkdir(parents=True)
    told = json.loads(provision("models", "list", "--json", *flags).stdout)
    assert [(row["name"], row["state"]) for row in told["models"]] == [("m+half", "whole"), ("half", "whole")]
    assert told["others"] == {"some/other": 0}
    assert "m+half" in provision("models", "list", *flags).stdout


@pytest.mark.parametrize(("state", "said"), [("ok", "here"), ("missing", "stand-in (no hub)")])
def test_a_whole_model_is_here_whatever_stands_in_for_it(envs: Path, state: str, said: str) -> None:
    model = load_tables(envs / "models.toml", ModelSpec)["m"]
    found = [CachedModel("m", model, [FileState("vae/model.safetensors", 1, state)])]
    assert models_output.list_lines(found, {}, {"m": "no hub"}).endswith(said)
    assert json.loads(models_output.list_json(found, {}, {"m": "no hub"}))["models"][0]["stand_in"]
