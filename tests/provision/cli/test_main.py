"""Tests the commands of `provision` on small real packages with the real uv and pip."""

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

    from tests.provision.conda_channel import FolderServer


@pytest.fixture
def flags(tmp_path: Path, envs: Path) -> list[object]:
    (tmp_path / "host.toml").write_text("models = []\n")
    return ["--root", tmp_path / "root", "--envs", envs, "--host", tmp_path / "host.toml"]


def sizes_and_times(*folders: Path) -> dict[str, tuple[int, int, int]]:
    """Return {path: (size, modification time, change time)} of all entries in the folders; times in nanoseconds."""
    entries = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            stat = path.lstat()
            entries[str(path)] = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return entries


def states(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return {row["step"]: row["after"] for row in json.loads(done.stdout)["outcomes"]}


def test_second_setup_writes_nothing(tmp_path: Path, home: Path, flags: list[object]) -> None:
    planned = provision("plan", *flags)
    assert planned.returncode == 3, planned.stderr
    assert "would    environment diffusers" in planned.stdout
    assert not (tmp_path / "root").exists(), "a plan writes nothing"

    first = provision("setup", *flags)
    assert first.returncode == 0, first.stdout + first.stderr
    assert (home / ".cache/huggingface/hub").readlink() == tmp_path / "root/cache/huggingface/hub"

    before = sizes_and_times(tmp_path / "root", home)
    again = provision("setup", *flags)
    assert again.returncode == 0
    assert "nothing to change" in again.stdout
    for command in ("status", "plan", "repair"):
        assert provision(command, *flags).returncode == 0, command
    assert sizes_and_times(tmp_path / "root", home) == before, "a second run writes nothing"


def test_json_output_of_setup_is_one_object_with_fixed_keys(flags: list[object]) -> None:
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


def test_commands_without_root_flag_find_the_root_by_the_links_of_the_first_setup(
    tmp_path: Path, home: Path, flags: list[object]
) -> None:
    assert provision("setup", *flags).returncode == 0
    unnamed = flags[2:]
    root = tmp_path / "root"
    status = provision("status", *unnamed, "--json")
    assert (status.returncode, json.loads(status.stdout)["root"]) == (0, str(root))
    assert provision("env", "where", *unnamed[2:]).stdout.strip() == str(root / "envs/diffusers")

    root.rename(tmp_path / "unmounted")
    absent = provision("setup", *unnamed)
    assert absent.returncode == 4
    assert f"{root} is not mounted" in absent.stdout + absent.stderr
    assert not root.exists()
    assert not (home / ".local/share").exists(), "no other root is made instead"
    (tmp_path / "unmounted").rename(root)

    second = provision("plan", "--root", tmp_path / "second", *unnamed)
    assert f"on another root. Name the other root: --root {root}" in second.stdout + second.stderr


def test_cache_link_that_the_user_made_is_not_used_to_find_a_root(
    tmp_path: Path, home: Path, flags: list[object]
) -> None:
    own_target = tmp_path / "theirs/cache/huggingface/hub"
    own_target.mkdir(parents=True)
    (home / ".cache/huggingface").mkdir(parents=True)
    (home / ".cache/huggingface/hub").symlink_to(own_target)
    unnamed = provision("plan", *flags[2:], "--json")
    assert json.loads(unnamed.stdout)["root"] == str(home / ".local/share/firstlight")
    assert "relocate huggingface" not in states(unnamed), "without a root nothing is relocated"
    named = provision("plan", *flags, "--json")
    assert states(named)["relocate huggingface"] == "drifted", "the other folder of the cache can be moved"
    assert "left alone" in json.dumps(json.loads(named.stdout)["fallbacks"])
    (tmp_path / "host.toml").write_text('models = []\nrelocate = ["huggingface"]\n')
    listed = provision("plan", *flags, "--json")
    assert states(listed)["relocate huggingface"] == "blocked", "host.toml names it, so it cannot be ignored"


def test_repair_restores_a_wiped_home(home: Path, flags: list[object]) -> None:
    assert provision("setup", *flags).returncode == 0
    shutil.rmtree(home)
    home.mkdir()
    lost = provision("status", *flags, "--json")
    assert lost.returncode == 3
    assert states(lost)["relocate huggingface"] == "drifted"
    assert provision("repair", *flags, "--dry-run").returncode == 3
    repaired = provision("repair", *flags, env={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""})
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    assert provision("status", *flags).returncode == 0


def test_setup_repair_and_status_are_blocked_while_the_volume_is_unmounted(tmp_path: Path, flags: list[object]) -> None:
    assert provision("setup", *flags).returncode == 0
    (tmp_path / "root").rename(tmp_path / "unmounted")
    for command in ("setup", "repair", "status"):
        done = provision(command, *flags)
        assert done.returncode == 4, command
        assert "is not mounted" in done.stdout + done.stderr
        assert not (tmp_path / "root").exists(), f"{command} wrote into the mount point of an absent volume"
    (tmp_path / "unmounted").rename(tmp_path / "root")
    assert provision("status", *flags).returncode == 0


def test_setup_writes_nothing_more_after_its_volume_is_unmounted(
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
        (tmp_path / "root").mkdir()  # the empty mount point stays

    monkeypatch.setattr(RelocateStep, "apply", apply_then_unmount)
    plan = resolve_host(str(tmp_path / "root"), tmp_path / "host.toml", envs)
    code = run_steps("setup", plan, OutputOptions(json=False, quiet=True, verbose=False, no_color=True))
    assert code is not Exit.GOOD
    output = capsys.readouterr().out
    assert "blocked  environment diffusers" in output
    assert "has no .firstlight marker" in output
    assert [path.name for path in (tmp_path / "root").rglob("*")] == []


def test_repair_without_a_root_is_blocked_and_makes_no_root(tmp_path: Path, flags: list[object]) -> None:
    done = provision("repair", *flags)
    assert done.returncode == 4
    assert "make setup" in done.stderr
    assert not (tmp_path / "root").exists()


def test_verify_finds_one_changed_byte_and_setup_corrects_it(tmp_path: Path, flags: list[object]) -> None:
    assert provision("setup", *flags).returncode == 0
    site = next((tmp_path / "root/envs/diffusers/lib").glob("python*/site-packages"))
    victim = site / "torch/big.txt"
    # The file is a hard link into uv's cache, so a write in place damages both.
    with victim.open("r+") as file:
        file.write("y")
    assert provision("status", *flags).returncode == 0, (
        "the size of the file is right, and a quick check hashes no file"
    )
    verified = provision("verify", *flags)
    assert verified.returncode == 3
    assert "torch/big.txt does not have its recorded content" in verified.stdout
    victim.unlink()
    assert provision("status", *flags).returncode == 3
    assert provision("setup", *flags).returncode == 0
    assert provision("verify", *flags).returncode == 0


def test_repair_restores_a_deleted_package_file_from_uvs_cache_without_a_request(
    tmp_path: Path, flags: list[object], index: FolderServer
) -> None:
    assert provision("setup", *flags).returncode == 0
    index.seen.clear()
    next((tmp_path / "root/envs/diffusers/lib").glob("python*/site-packages/torch/__init__.py")).unlink()
    assert provision("repair", *flags).returncode == 0
    assert index.seen == []
    assert provision("verify", *flags).returncode == 0


def test_repair_after_the_loss_of_uvs_cache_is_blocked_and_suggests_setup(
    tmp_path: Path, flags: list[object], index: FolderServer
) -> None:
    assert provision("setup", *flags).returncode == 0
    shutil.rmtree(tmp_path / "root/cache/uv")
    next((tmp_path / "root/envs/diffusers/lib").glob("python*/site-packages/torch/__init__.py")).unlink()
    done = provision("repair", *flags)
    assert done.returncode == 4, done.stdout
    assert "cannot be completed without the network" in done.stdout
    assert "make setup" in done.stdout


def test_wheel_whose_hash_is_not_in_the_lock_file_is_rejected(flags: list[object], wheels: Path) -> None:
    write_wheel(wheels, "diffusers", "8.8", {"diffusers/__init__.py": "import os  # something else\n"})
    done = provision("setup", *flags)
    assert done.returncode == 1
    assert "hash" in done.stdout.lower()
    assert "diffusers" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models = []\nmirrors = 3\n", "line 2, key mirrors: unknown key"),
        ("\n\nmodels = 7\n", "line 3, key models:"),
        ("models = ['a'\n", "is not valid TOML"),
        ('models = ["nonsense"]\n', "unknown model 'nonsense'; available: none"),
        ('models = []\nvariant = "cu999"\n', "unknown variant 'cu999'; available: cpu"),
        ('models = []\nenv = "other"\n', "unknown environment 'other'; available: diffusers"),
    ],
)
def test_error_in_host_toml_names_its_line_and_key_or_the_available_names(
    tmp_path: Path, flags: list[object], text: str, message: str
) -> None:
    (tmp_path / "host.toml").write_text(text)
    done = provision("status", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_setup_is_blocked_while_another_run_holds_the_lock(tmp_path: Path, flags: list[object]) -> None:
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

    def test_full_disk_blocks_setup(self, disk: Path, flags: list[object]) -> None:
        done = provision("setup", *flags, "--root", disk / "root")
        assert done.returncode == 4
        assert str(disk / "root") in done.stdout
        assert "no space left" in done.stdout
        assert "Traceback" not in done.stderr

    def test_setup_on_a_too_small_disk_is_blocked_with_the_needed_bytes(
        self, disk: Path, flags: list[object], envs: Path
    ) -> None:
        torch = envs / "torch.toml"
        torch.write_text(torch.read_text() + "install_bytes = 5_000_000\n")
        done = provision("setup", *flags, "--root", disk / "root")
        assert done.returncode == 4
        assert "about 5,000,000 are needed" in done.stdout

    def test_environment_build_that_filled_the_disk_succeeds_when_there_is_more_space(
        self, disk: Path, flags: list[object], conda_envs: Path, conda: FolderServer
    ) -> None:
        """Fill the disk while a package is unpacked; with more space, the same command unpacks the package again."""
        subprocess.run(["mount", "-o", "remount,size=12m", disk], check=True)
        command = ["env", "create", "--interpreter", "conda", *flags, "--root", disk / "root"]
        done = provision(*command)
        assert done.returncode == 4, done.stdout
        assert f"{disk / 'root/envs/diffusers'}: no space left" in done.stdout
        assert not list((disk / "root/envs").iterdir())
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        assert provision(*command).returncode == 0
        assert "every byte verified" in provision("verify", *flags, "--root", disk / "root").stdout

    def test_read_only_disk_blocks_setup(self, disk: Path, flags: list[object]) -> None:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        done = provision("setup", *flags, "--root", disk / "root")
        assert done.returncode == 4
        assert "the file system is read-only" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_setup_ended_by_a_signal_while_uv_runs_is_completed_by_the_next_setup(
    tmp_path: Path, flags: list[object], wheels: Path, number: signal.Signals
) -> None:
    # The wheel is large enough that uv runs for a while. The run is ended as soon as uv has started.
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    argv = [sys.executable, "-m", "provision", "setup", *map(str, flags)]
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "uv" in [child.name() for child in parent.children(recursive=True)]:
                process.send_signal(number)
                break
    _, stderr = process.communicate(timeout=600)
    if number is not signal.SIGKILL:
        assert process.returncode in {0, 130}
        assert b"Traceback" not in stderr
    repaired = provision("setup", *flags)
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    assert provision("verify", *flags).returncode == 0


def test_setup_replaces_the_model_of_an_unreachable_hub_by_a_stand_in(
    tmp_path: Path, envs: Path, flags: list[object]
) -> None:
    manifest = '[m]\nrepo = "o/m"\nrevision = "%s"\nlicense = "mit"\narchitecture = "tiny-ddpm"\n' % ("b" * 40)
    (envs / "models.toml").write_text(manifest + 'files = [{path = "a.safetensors"}]\n')
    (tmp_path / "host.toml").write_text('models = ["m"]\n')
    done = provision("setup", *flags, "--json")
    assert done.returncode == 0, done.stderr
    (fallback,) = json.loads(done.stdout)["fallbacks"]
    assert "none of its files is present" in fallback
    assert NOWHERE in fallback
    assert provision("status", *flags).returncode == 0


def test_help_lists_the_main_commands() -> None:
    done = process("--help")
    for command in ("plan", "setup", "status", "verify", "repair", "env"):
        assert command in done.stdout


def test_command_whose_stdout_pipe_is_closed_ends_without_a_traceback(flags: list[object]) -> None:
    """Close the reading end of the pipe before the command prints, as `head` may do."""
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-m", "provision", "status", *map(str, flags)]
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    try:
        done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, env=environment, check=False, timeout=600)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("fields", ['"torch": "2"', '"torch": "2", "diffusers": "0", "device": "cpu", "finite": true'])
def test_smoke_test_runs_again_if_its_stored_result_cannot_be_read(
    tmp_path: Path, flags: list[object], fields: str
) -> None:
    assert provision("setup", *flags).returncode == 0
    kept = tmp_path / "root/.firstlight/smoke.json"
    identity = json.loads(kept.read_text())["identity"]
    kept.write_text(f'{{"schema": 1, "identity": {identity}, {fields}}}')
    status = provision("status", *flags, "--json")
    assert (status.returncode, states(status)["smoke"]) == (3, "drifted"), status.stderr
    assert provision("setup", *flags).returncode == 0
    assert provision("status", *flags).returncode == 0
