"""`provision mirrors`: chosen, written where real tools read it, and taken back to the last byte."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from provision.core.layout import Root
from provision.core.step import State
from provision.fs import atomic
from provision.installers import conda_settings, rattler
from provision.installers import uv as uv_installer
from provision.mirrors import record as mirror_record
from provision.mirrors import write_config
from provision.mirrors.record import MirrorChoice, MirrorRecord, MirrorSource
from provision.mirrors.tools import all_tools
from provision.volume import variables
from provision.volume.journal import Journal
from tests.provision import conda_channel, run_command
from tests.provision.conftest import write_wheel
from tests.provision.http_server import index
from tests.provision.mirrors import test_config_text

if TYPE_CHECKING:
    from pathlib import Path

SHELLS = ("bash", "zsh", "fish", "pwsh")


def provision(*argv: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return run_command.provision(*argv, env=environ)


def overridden(pip: str = "https://m.example/simple") -> MirrorRecord:
    conda = MirrorSource(
        "m",
        "https://m.example/cloud",
        channels={"nvidia": "https://n.example/nvidia"},
        defaults="https://m.example/pkgs",
    )
    named = {"pip": MirrorSource("m", pip), "conda": conda, "hf": MirrorSource("m", "https://hub.example")}
    return MirrorRecord(
        {tool: MirrorChoice("m", (source, MirrorSource("official")), "by test") for tool, source in named.items()}
    )


@pytest.fixture
def root(tmp_path: Path) -> Root:
    found = Root(tmp_path / "root")
    found.state.mkdir(parents=True)
    return found


def apply(root: Root, home: Path) -> write_config.SettingsStep:
    prefix = root.prefix("diffusers")
    step = write_config.SettingsStep(root, prefix, home, os.environ, Journal(root.journal, "t"), conda_is_here=True)
    if step.check().state is State.DRIFTED:
        step.apply()
    assert step.check().state is State.OK
    return step


def take_back(root: Root, *, force: bool = False) -> None:
    for step in write_config.restoring(root, Journal(root.journal, "t"), force=force):
        if step.check().state is State.DRIFTED:
            step.apply()
        assert step.check().state is State.OK


def snapshot(home: Path) -> dict[str, tuple[bytes | None, int]]:
    return {
        str(path.relative_to(home)): (path.read_bytes() if path.is_file() else None, stat.S_IMODE(path.stat().st_mode))
        for path in sorted(home.rglob("*"))
    }


def use_and_restore(base: Path, ini: bytes | None, yaml: bytes | None, toml: bytes | None, mode: int) -> None:
    """Two mirrors one after the other, then back: not one byte, mode or folder is another."""
    home, root = base / "home", Root(base / "root")
    home.mkdir()
    root.state.mkdir(parents=True)
    for name, content in ((".config/pip/pip.conf", ini), (".condarc", yaml), (".config/uv/uv.toml", toml)):
        if content is not None:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(content)
            (home / name).chmod(mode)
    before = snapshot(home)
    mirror_record.write(root, overridden())
    apply(root, home)
    assert snapshot(home) != before
    first = mirror_record.read(root)
    assert first is not None
    mirror_record.write(root, MirrorRecord(overridden("https://other.example").choices, first.written))
    apply(root, home)
    take_back(root)
    assert snapshot(home) == before
    assert variables.read(root) == {}


homes = (
    st.none() | test_config_text.ini(),
    st.none() | test_config_text.yaml(),
    st.none() | test_config_text.toml(),
    st.sampled_from([0o600, 0o644, 0o664]),
)


class TestRestore:
    @hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(*homes)
    def test_use_then_restore_changes_not_one_byte(
        self, tmp_path_factory: pytest.TempPathFactory, ini: bytes, yaml: bytes, toml: bytes, mode: int
    ) -> None:
        use_and_restore(tmp_path_factory.mktemp("h"), ini, yaml, toml, mode)

    @pytest.mark.long
    @hypothesis_settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(*homes)
    def test_a_thousand_times(
        self, tmp_path_factory: pytest.TempPathFactory, ini: bytes, yaml: bytes, toml: bytes, mode: int
    ) -> None:
        use_and_restore(tmp_path_factory.mktemp("h"), ini, yaml, toml, mode)

    def test_what_the_user_changed_since_is_shown_not_lost(self, root: Root, home: Path) -> None:
        (home / ".condarc").write_text("channels: [a]\n")
        mirror_record.write(root, overridden())
        apply(root, home)
        (home / ".condarc").write_text("mine: now\n")
        steps = write_config.restoring(root, Journal(root.journal, "t"), force=False)
        found = next(step.check() for step in steps if "condarc" in step.name)
        assert found.state is State.BLOCKED
        assert "-mine: now" in found.detail
        assert "+channels: [a]" in found.detail
        take_back(root, force=True)
        assert (home / ".condarc").read_text() == "channels: [a]\n"
        assert (home / ".condarc.firstlight-kept-1").read_text() == "mine: now\n"

    def test_after_a_wipe_repair_writes_it_again_and_restore_still_knows(self, root: Root, home: Path) -> None:
        mirror_record.write(root, overridden())
        apply(root, home)
        for path in (home / ".config/pip/pip.conf", home / ".condarc"):
            path.unlink()
        apply(root, home)
        assert b"m.example" in (home / ".condarc").read_bytes()
        take_back(root)
        assert not (home / ".condarc").exists()

    def test_a_file_that_was_wiped_comes_back_with_its_mode(self, root: Root, home: Path) -> None:
        (home / ".condarc").write_text("channels: [a]\n")
        (home / ".condarc").chmod(0o600)
        mirror_record.write(root, overridden())
        apply(root, home)
        (home / ".condarc").unlink()
        take_back(root)
        assert (home / ".condarc").read_text() == "channels: [a]\n"
        assert stat.S_IMODE((home / ".condarc").stat().st_mode) == 0o600

    def test_an_edit_beside_ours_is_kept_when_the_mirror_changes(self, root: Root, home: Path) -> None:
        mirror_record.write(root, overridden())
        apply(root, home)
        file = home / ".config/pip/pip.conf"
        file.write_text(file.read_text() + "[list]\nformat = columns\n")
        record = mirror_record.read(root)
        assert record is not None
        mirror_record.write(root, MirrorRecord(overridden("https://other.example").choices, record.written))
        apply(root, home)
        edited = file.read_text()
        assert "format = columns" in edited
        assert "https://other.example" in edited
        assert "https://m.example" not in edited
        steps = write_config.restoring(root, Journal(root.journal, "t"), force=False)
        found = next(step.check() for step in steps if "pip" in step.name)
        assert found.state is State.BLOCKED, "the edit is the user's"
        take_back(root, force=True)
        assert file.with_name("pip.conf.firstlight-kept-1").read_text() == edited
        assert not file.exists()

    def test_back_at_the_official_one_the_file_is_the_users_alone(self, root: Root, home: Path) -> None:
        (home / ".condarc").write_text("channels: [a]\n")
        mirror_record.write(root, overridden())
        apply(root, home)
        first = mirror_record.read(root)
        assert first is not None
        official = {tool: MirrorChoice("official", (MirrorSource("official"),), "") for tool in ("pip", "conda", "hf")}
        mirror_record.write(root, MirrorRecord(official, first.written))
        apply(root, home)
        assert (home / ".condarc").read_text() == "channels: [a]\n"
        assert not (home / ".config").exists()
        (home / ".condarc").write_text("channels: [b]\n")
        take_back(root)
        assert (home / ".condarc").read_text() == "channels: [b]\n"

    def test_a_wiped_file_comes_back_with_what_the_user_had(self, root: Root, home: Path) -> None:
        (home / ".condarc").write_text("channels: [a]\n")
        mirror_record.write(root, overridden())
        apply(root, home)
        (home / ".condarc").unlink()
        apply(root, home)
        assert "channels: [a]" in (home / ".condarc").read_text()
        take_back(root)
        assert (home / ".condarc").read_text() == "channels: [a]\n"

    def test_a_linked_file_stays_a_link(self, root: Root, home: Path, tmp_path: Path) -> None:
        (tmp_path / "dotfiles").write_text("channels: [a]\n")
        (home / ".condarc").symlink_to(tmp_path / "dotfiles")
        mirror_record.write(root, overridden())
        apply(root, home)
        assert (home / ".condarc").is_symlink()
        take_back(root)
        assert (tmp_path / "dotfiles").read_text() == "channels: [a]\n"

    def test_the_record_goes_before_the_file(self, root: Root, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Killed between the two, the next run knows what was before."""
        (home / ".condarc").write_text("channels: [a]\n")
        mirror_record.write(root, overridden())
        write = atomic.write_atomic

        def killed(path: Path, content: Any, **more: Any) -> None:
            if path.is_relative_to(home):
                raise KeyboardInterrupt
            write(path, content, **more)

        monkeypatch.setattr(write_config, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            apply(root, home)
        monkeypatch.undo()
        monkeypatch.setenv("HOME", str(home))
        apply(root, home)
        take_back(root)
        assert (home / ".condarc").read_text() == "channels: [a]\n"


class TestRealReaders:
    def test_pip_uv_and_conda_read_what_was_written(self, root: Root, home: Path, tmp_path: Path, play: Any) -> None:
        wheel = write_wheel(tmp_path, "hello", "1.0", {"hello.py": ""})
        mirror = play(index([wheel]))
        mirror_record.write(root, overridden(f"{mirror.url}/simple"))
        apply(root, home)
        prefix = tmp_path / "venv"
        subprocess.run([sys.executable, "-m", "venv", prefix], check=True)
        pip: list[str | Path] = [prefix / "bin/python", "-m", "pip", "--disable-pip-version-check"]
        said = subprocess.run([*pip, "install", "hello"], capture_output=True, text=True, check=False)
        assert f"Looking in indexes: {mirror.url}/simple" in said.stdout, said.stderr
        assert "Successfully installed hello-1.0" in said.stdout
        seen = len(mirror.seen)
        uv: list[str | Path] = [
            uv_installer.uv_binary(),
            "pip",
            "install",
            "--reinstall",
            "-v",
            "hello",
            "--python",
            prefix / "bin/python",
        ]
        said = subprocess.run(
            uv, capture_output=True, text=True, check=False, env={**os.environ, "UV_CACHE_DIR": str(tmp_path / "c")}
        )
        assert said.returncode == 0, said.stderr
        assert len(mirror.seen) > seen
        assert conda_settings.mirrors({}, home)["https://conda.anaconda.org/"] == "https://m.example/cloud/"
        assert conda_settings.mirrors({}, home)["https://conda.anaconda.org/nvidia/"] == "https://n.example/nvidia/"

    def test_rattler_installs_through_the_condarc_that_was_written(
        self, root: Root, home: Path, tmp_path: Path, conda: conda_channel.Served, conda_envs: Path
    ) -> None:
        mirror = MirrorSource("m", conda.url, channels={"conda-forge": f"{conda.url}/conda-forge"})
        mirror_record.write(root, MirrorRecord({"conda": MirrorChoice("m", (mirror,), "by test")}))
        apply(root, home)
        lock = conda_envs / "diffusers/conda-lock.yml"
        rattler.install(
            lock,
            conda_channel.PLATFORM,
            tmp_path / "p",
            tmp_path / "pkgs",
            conda_settings.mirrors({}, home),
            final=tmp_path / "p",
        )
        assert (tmp_path / "p/bin/python").exists()
        assert any("python" in path for path in conda.seen)


class TestShellenv:
    HARD = '/vol ume/it\'s "$HOME" `x` \\ % 中'

    @pytest.mark.parametrize("shell", SHELLS)
    def test_every_shell_reads_what_was_meant(self, root: Root, shell: str) -> None:
        import shutil

        if shutil.which(shell) is None:
            pytest.skip(f"no {shell} here")
        name = "powershell" if shell == "pwsh" else shell
        text = variables.script({"ONE": self.HARD, "TWO": "2"}, name)
        show = "[Console]::Out.Write($env:ONE)" if shell == "pwsh" else 'printf %s "$ONE"'
        flag = "-Command" if shell == "pwsh" else "-c"
        done = subprocess.run([shell, flag, text + show.encode()], capture_output=True, check=True)
        assert done.stdout.decode() == self.HARD

    def test_a_path_of_any_bytes_survives(self) -> None:
        hard = os.fsdecode(b"/v\xff'")
        done = subprocess.run(
            ["bash", "-c", variables.script({"A": hard}, "bash") + b'printf %s "$A"'], capture_output=True, check=True
        )
        assert done.stdout == b"/v\xff'"

    def test_the_command_prints_them_in_order_and_nothing_else(self, root: Root) -> None:
        journal = Journal(root.journal, "t")
        for name, value in (("ZED", "z"), *write_config.mirror_variables(overridden()).items()):
            variables.set_value(root, name, value, journal)
        done = provision("shellenv", "--root", root.path, HF_ENDPOINT="")
        assert done.stdout.splitlines() == [
            "export CONDA_CHANNEL_ALIAS='https://m.example/cloud'",
            "export HF_ENDPOINT='https://hub.example'",
            "export HF_HUB_DISABLE_IMPLICIT_TOKEN='1'",
            "export HF_HUB_DISABLE_XET='1'",
            "export PIP_INDEX_URL='https://m.example/simple'",
            "export UV_DEFAULT_INDEX='https://m.example/simple'",
            "export ZED='z'",
        ]
        assert provision("shellenv", "--root", root.path, "--shell", "csh").returncode == 2

    def test_what_the_user_has_set_goes_before(self, root: Root) -> None:
        journal = Journal(root.journal, "t")
        for name, value in write_config.mirror_variables(overridden()).items():
            variables.set_value(root, name, value, journal)
        found = variables.for_child(
            root,
            {"HF_ENDPOINT": "https://mine", "PIP_INDEX_URL": "https://m.example/simple"},
            all_tools.variable_groups(),
        )
        assert not any(name.startswith("HF_") for name in found)
        assert "PIP_INDEX_URL" in found

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_activation_sets_what_is_not_set_and_takes_away_what_it_set(self, tmp_path: Path, shell: str) -> None:
        import shutil

        if shutil.which(shell) is None:
            pytest.skip(f"no {shell} here")
        told = {
            key: value for key, value in write_config.mirror_variables(overridden()).items() if key.startswith("HF_")
        }
        suffix = ".fish" if shell == "fish" else ".sh"
        enter, leave = tmp_path / f"a{suffix}", tmp_path / f"d{suffix}"
        for folder, each, text in variables.hooks(told, all_tools.variable_groups()):
            if each == suffix:
                (enter if folder == "activate.d" else leave).write_text(text)
        show = 'echo "[$HF_ENDPOINT|$HF_HUB_DISABLE_XET]"'
        source = "source" if shell == "fish" else "."
        script = f"{source} {enter}; {show}; {source} {leave}; {show}"
        flags = ["-c"] if shell == "fish" else ["-euc"]
        script = (
            script
            if shell == "fish"
            else script.replace("$HF_ENDPOINT", "${HF_ENDPOINT-}").replace(
                "$HF_HUB_DISABLE_XET", "${HF_HUB_DISABLE_XET-}"
            )
        )
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        done = subprocess.run([shell, *flags, script], capture_output=True, text=True, check=True, env=clean)
        assert done.stdout.split() == ["[https://hub.example|1]", "[|]"]
        own = subprocess.run(
            [shell, *flags, script], capture_output=True, text=True, check=True, env=clean | {"HF_ENDPOINT": "mine"}
        )
        assert own.stdout.split() == ["[mine|]", "[mine|]"]
