"""The command as a person runs it: a real process, real uv and pip, small packages."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from provision.cli.common import OutputOptions, resolve_host, run_steps
from provision.core.errors import Exit
from provision.relocation.step import RelocateStep
from tests.conftest import CHECKOUT, NOWHERE
from tests.provision.conftest import write_wheel
from tests.provision.run_command import process, provision

if TYPE_CHECKING:
    from pathlib import Path

    from tests.provision.conda_channel import Served


@pytest.fixture
def flags(tmp_path: Path, envs: Path) -> list[object]:
    (tmp_path / "host.toml").write_text("models = []\n")
    return ["--root", tmp_path / "root", "--envs", envs, "--host", tmp_path / "host.toml"]


def listing(*folders: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder with its size, modification time and change time, in nanoseconds."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            stat = path.lstat()
            found[str(path)] = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return found


def states(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return {row["step"]: row["after"] for row in json.loads(done.stdout)["outcomes"]}


def test_setup_then_status_then_nothing(tmp_path: Path, home: Path, flags: list[object]) -> None:
    before = provision("plan", *flags)
    assert before.returncode == 3, before.stderr
    assert "would    environment diffusers" in before.stdout
    assert not (tmp_path / "root").exists(), "a plan writes nothing"

    first = provision("setup", *flags)
    assert first.returncode == 0, first.stdout + first.stderr
    assert (home / ".cache/huggingface/hub").readlink() == tmp_path / "root/cache/huggingface/hub"

    seen = listing(tmp_path / "root", home)
    again = provision("setup", *flags)
    assert again.returncode == 0
    assert "nothing to change" in again.stdout
    for command in ("status", "plan", "repair"):
        assert provision(command, *flags).returncode == 0, command
    assert listing(tmp_path / "root", home) == seen, "a second run makes no write"


def test_json_is_one_object_and_nothing_else(flags: list[object]) -> None:
    done = provision("setup", *flags, "--json")
    whole = json.loads(done.stdout)
    assert set(whole) == {"schema", "command", "root", "profile", "outcomes", "fallbacks", "seconds", "exit"}
    assert whole["command"] == "setup"
    assert whole["exit"] == done.returncode == 0
    assert [set(row) for row in whole["outcomes"]] == [
        {"step", "before", "after", "changed", "detail", "error"} for _ in whole["outcomes"]
    ]
    assert {row["before"] for row in whole["outcomes"]} == {"drifted", "ok"}
    assert {row["after"] for row in whole["outcomes"]} == {"ok"}
    assert json.loads(provision("status", *flags, "--json").stdout)["outcomes"][0]["changed"] is False


def test_the_root_is_named_once(tmp_path: Path, home: Path, flags: list[object]) -> None:
    assert provision("setup", *flags).returncode == 0
    unnamed = flags[2:]
    root = tmp_path / "root"
    found = provision("status", *unnamed, "--json")
    assert (found.returncode, json.loads(found.stdout)["root"]) == (0, str(root))
    assert provision("env", "where", *unnamed[2:]).stdout.strip() == str(root / "envs/diffusers")

    root.rename(tmp_path / "unmounted")
    absent = provision("setup", *unnamed)
    assert absent.returncode == 4
    assert f"{root} is not mounted" in absent.stdout + absent.stderr
    assert not root.exists()
    assert not (home / ".local").exists(), "no other root takes its place"
    (tmp_path / "unmounted").rename(root)

    second = provision("plan", "--root", tmp_path / "second", *unnamed)
    assert f"on another root. Name that one: --root {root}" in second.stdout + second.stderr


def test_a_persons_own_link_is_no_root(tmp_path: Path, home: Path, flags: list[object]) -> None:
    theirs = tmp_path / "theirs/cache/huggingface/hub"
    theirs.mkdir(parents=True)
    (home / ".cache/huggingface").mkdir(parents=True)
    (home / ".cache/huggingface/hub").symlink_to(theirs)
    found = provision("plan", *flags[2:], "--json")
    assert json.loads(found.stdout)["root"] == str(home / ".local/share/firstlight")
    assert "relocate huggingface" not in states(found), "without a root nothing is relocated"
    named = provision("plan", *flags, "--json")
    assert states(named)["relocate huggingface"] == "blocked"


def test_repair_brings_back_a_wiped_home(home: Path, flags: list[object]) -> None:
    assert provision("setup", *flags).returncode == 0
    shutil.rmtree(home)
    home.mkdir()
    lost = provision("status", *flags, "--json")
    assert lost.returncode == 3
    assert states(lost)["relocate huggingface"] == "drifted"
    assert provision("repair", *flags, "--dry-run").returncode == 3
    mended = provision("repair", *flags, env={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""})
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert provision("status", *flags).returncode == 0


def test_an_unmounted_volume_is_not_mistaken_for_a_new_one(tmp_path: Path, flags: list[object]) -> None:
    assert provision("setup", *flags).returncode == 0
    (tmp_path / "root").rename(tmp_path / "unmounted")
    for command in ("setup", "repair", "status"):
        done = provision(command, *flags)
        assert done.returncode == 4, command
        assert "is not mounted" in done.stdout + done.stderr
        assert not (tmp_path / "root").exists(), f"{command} wrote below an absent volume"
    (tmp_path / "unmounted").rename(tmp_path / "root")
    assert provision("status", *flags).returncode == 0


def test_a_volume_that_goes_during_the_run_gets_no_more(
    tmp_path: Path,
    flags: list[object],
    envs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    apply = RelocateStep.apply

    def apply_then_unmount(self: RelocateStep) -> None:
        apply(self)
        (tmp_path / "root").rename(tmp_path / "unmounted")
        (tmp_path / "root").mkdir()  # the mount point

    monkeypatch.setattr(RelocateStep, "apply", apply_then_unmount)
    plan = resolve_host(str(tmp_path / "root"), tmp_path / "host.toml", envs)
    code = run_steps("setup", plan, OutputOptions(json=False, quiet=True, verbose=False, no_color=True))
    assert code is not Exit.GOOD
    assert "blocked  environment diffusers" in (told := capsys.readouterr().out)
    assert "has no .firstlight marker" in told
    assert [path.name for path in (tmp_path / "root").rglob("*")] == []


def test_repair_without_a_volume_makes_none(tmp_path: Path, flags: list[object]) -> None:
    done = provision("repair", *flags)
    assert done.returncode == 4
    assert "make setup" in done.stderr
    assert not (tmp_path / "root").exists()


def test_verify_finds_one_changed_byte_and_setup_mends_it(tmp_path: Path, flags: list[object]) -> None:
    assert provision("setup", *flags).returncode == 0
    site = next((tmp_path / "root/envs/diffusers/lib").glob("python*/site-packages"))
    victim = site / "torch/big.txt"
    # In place: the file is a hard link into uv's cache, where the harm spreads.
    with victim.open("r+") as file:
        file.write("y")
    assert provision("status", *flags).returncode == 0, "the size is right, and a quick look hashes nothing"
    found = provision("verify", *flags)
    assert found.returncode == 3
    assert "torch/big.txt does not have its recorded content" in found.stdout
    victim.unlink()
    assert provision("status", *flags).returncode == 3
    assert provision("setup", *flags).returncode == 0
    assert provision("verify", *flags).returncode == 0


def test_repair_puts_back_what_the_cache_holds(tmp_path: Path, flags: list[object], index: Served) -> None:
    assert provision("setup", *flags).returncode == 0
    index.seen.clear()
    next((tmp_path / "root/envs/diffusers/lib").glob("python*/site-packages/torch/__init__.py")).unlink()
    assert provision("repair", *flags).returncode == 0
    assert index.seen == []
    assert provision("verify", *flags).returncode == 0


def test_repair_says_what_it_cannot_put_back(tmp_path: Path, flags: list[object], index: Served) -> None:
    assert provision("setup", *flags).returncode == 0
    shutil.rmtree(tmp_path / "root/cache/uv")
    next((tmp_path / "root/envs/diffusers/lib").glob("python*/site-packages/torch/__init__.py")).unlink()
    done = provision("repair", *flags)
    assert done.returncode == 4, done.stdout
    assert "cannot be made whole without the network" in done.stdout
    assert "make setup" in done.stdout


def test_a_tampered_wheel_is_refused(flags: list[object], wheels: Path) -> None:
    write_wheel(wheels, "diffusers", "8.8", {"diffusers/__init__.py": "import os  # something else\n"})
    done = provision("setup", *flags)
    assert done.returncode == 1
    assert "hash" in done.stdout.lower()
    assert "diffusers" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models = []\nmirrors = 3\n", "line 2, key mirrors: unknown key"),
        ("\n\nmodels = 7\n", "line 3, key models:"),
        ("models = ['a'\n", "is not valid TOML"),
        ('models = ["nonsense"]\n', "unknown model 'nonsense'; there is: none"),
        ('models = []\nvariant = "cu999"\n', "unknown variant 'cu999'; there is: cpu"),
        ('models = []\nenv = "other"\n', "unknown environment 'other'; there is: diffusers"),
    ],
)
def test_bad_input_names_file_line_and_key(tmp_path: Path, flags: list[object], text: str, told: str) -> None:
    (tmp_path / "host.toml").write_text(text)
    done = provision("status", *flags)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_another_run_holds_the_lock(tmp_path: Path, flags: list[object]) -> None:
    import filelock

    (tmp_path / "root/.firstlight").mkdir(parents=True)
    with filelock.FileLock(tmp_path / "root/.firstlight/lock"):
        done = provision("setup", *flags)
    assert done.returncode == 4
    assert "another run holds" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a full or a read-only disk")
class TestDisks:
    @pytest.fixture
    def disk(self, tmp_path: Path) -> Any:
        folder = tmp_path / "disk"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
        yield folder
        subprocess.run(["umount", "-l", folder], check=True)

    def test_a_full_disk(self, disk: Path, flags: list[object]) -> None:
        done = provision("setup", *flags, "--root", disk / "root")
        assert done.returncode == 4
        assert str(disk / "root") in done.stdout
        assert "no space left" in done.stdout
        assert "Traceback" not in done.stderr

    def test_a_disk_that_is_too_small_is_told_with_the_bytes(self, disk: Path, flags: list[object], envs: Path) -> None:
        torch = envs / "torch.toml"
        torch.write_text(torch.read_text() + "install_bytes = 5_000_000\n")
        done = provision("setup", *flags, "--root", disk / "root")
        assert done.returncode == 4
        assert "about 5,000,000 are needed" in done.stdout

    def test_a_disk_that_fills_half_way_through_the_conda_part(
        self, disk: Path, flags: list[object], conda_envs: Path, conda: Served
    ) -> None:
        """What was unpacked in part is not taken for whole once there is room."""
        subprocess.run(["mount", "-o", "remount,size=12m", disk], check=True)
        words = ["env", "create", "--interpreter", "conda", *flags, "--root", disk / "root"]
        done = provision(*words)
        assert done.returncode == 4, done.stdout
        assert f"{disk / 'root/envs/diffusers'}: no space left" in done.stdout
        assert not list((disk / "root/envs").iterdir())
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        assert provision(*words).returncode == 0
        assert "every byte verified" in provision("verify", *flags, "--root", disk / "root").stdout

    def test_a_read_only_disk(self, disk: Path, flags: list[object]) -> None:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        done = provision("setup", *flags, "--root", disk / "root")
        assert done.returncode == 4
        assert "the file system is read-only" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_ended_while_uv_works_goes_on_next_time(
    tmp_path: Path, flags: list[object], wheels: Path, sent: signal.Signals
) -> None:
    # A wheel large enough that uv is at work for a while; the run is ended as soon as uv is there.
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    argv = [sys.executable, "-m", "provision", "setup", *map(str, flags)]
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "uv" in [child.name() for child in parent.children(recursive=True)]:
                process.send_signal(sent)
                break
    _, stderr = process.communicate(timeout=600)
    if sent is not signal.SIGKILL:
        assert process.returncode in {0, 130}
        assert b"Traceback" not in stderr
    mended = provision("setup", *flags)
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert provision("verify", *flags).returncode == 0


def test_models_of_a_silent_hub_are_stand_ins(tmp_path: Path, envs: Path, flags: list[object]) -> None:
    manifest = '[m]\nrepo = "o/m"\nrevision = "%s"\nlicense = "mit"\narchitecture = "tiny-ddpm"\n' % ("b" * 40)
    (envs / "models.toml").write_text(manifest + 'files = [{path = "a.safetensors"}]\n')
    (tmp_path / "host.toml").write_text('models = ["m"]\n')
    done = provision("setup", *flags, "--json")
    assert done.returncode == 0, done.stderr
    (said,) = json.loads(done.stdout)["fallbacks"]
    assert "none of its files is here" in said
    assert NOWHERE in said
    assert provision("status", *flags).returncode == 0


def test_help_names_every_command() -> None:
    done = process("--help")
    for command in ("plan", "setup", "status", "verify", "repair", "env"):
        assert command in done.stdout


def test_a_reader_that_has_enough_is_no_fault(flags: list[object]) -> None:
    """`| head` closes the pipe: nothing more is said, and nothing comes up as a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-m", "provision", "status", *map(str, flags)]
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    try:
        done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, env=environment, check=False, timeout=600)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("rubbish", ['"torch": "2"', '"torch": "2", "diffusers": "0", "device": "cpu", "finite": true'])
def test_a_kept_smoke_result_that_cannot_be_read_is_run_again(
    tmp_path: Path, flags: list[object], rubbish: str
) -> None:
    assert provision("setup", *flags).returncode == 0
    kept = tmp_path / "root/.firstlight/smoke.json"
    identity = json.loads(kept.read_text())["identity"]
    kept.write_text(f'{{"schema": 1, "identity": {identity}, {rubbish}}}')
    looked = provision("status", *flags, "--json")
    assert (looked.returncode, states(looked)["smoke"]) == (3, "drifted"), looked.stderr
    assert provision("setup", *flags).returncode == 0
    assert provision("status", *flags).returncode == 0
