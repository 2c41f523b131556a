"""Tests the settings files of the chosen mirrors: real tools read them, and restore returns every byte."""

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
from provision.mirrors import chosen_mirrors, write_config
from provision.mirrors.chosen_mirrors import MirrorChoice, MirrorRecord, MirrorSource
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


def record_of(pip: str = "https://m.example/simple") -> MirrorRecord:
    """Return a record that chooses mirrors for pip, conda and hf."""
    conda = MirrorSource(
        "m",
        "https://m.example/cloud",
        channels={"nvidia": "https://n.example/nvidia"},
        defaults="https://m.example/pkgs",
    )
    sources = {"pip": MirrorSource("m", pip), "conda": conda, "hf": MirrorSource("m", "https://hub.example")}
    return MirrorRecord(
        {tool: MirrorChoice("m", (source, MirrorSource("official")), "by test") for tool, source in sources.items()}
    )


@pytest.fixture
def root(tmp_path: Path) -> Root:
    root = Root(tmp_path / "root")
    root.state.mkdir(parents=True)
    return root


def apply(root: Root, home: Path) -> write_config.SettingsStep:
    prefix = root.prefix("diffusers")
    step = write_config.SettingsStep(root, prefix, home, os.environ, Journal(root.journal, "t"), conda_is_here=True)
    if step.check().state is State.DRIFTED:
        step.apply()
    assert step.check().state is State.OK
    return step


def restore(root: Root, *, force: bool = False) -> None:
    for step in write_config.restore_steps(root, Journal(root.journal, "t"), force=force):
        if step.check().state is State.DRIFTED:
            step.apply()
        assert step.check().state is State.OK


def snapshot(home: Path) -> dict[str, tuple[bytes | None, int]]:
    return {
        str(path.relative_to(home)): (path.read_bytes() if path.is_file() else None, stat.S_IMODE(path.stat().st_mode))
        for path in sorted(home.rglob("*"))
    }


def use_and_restore(base: Path, ini: bytes | None, yaml: bytes | None, toml: bytes | None, mode: int) -> None:
    """Write the settings of two mirrors one after the other, then assert that restore returns every byte and mode.

    `ini`, `yaml` and `toml` are the user's pip.conf, .condarc and uv.toml; None is an absent file.
    """
    home, root = base / "home", Root(base / "root")
    home.mkdir()
    root.state.mkdir(parents=True)
    for name, content in ((".config/pip/pip.conf", ini), (".condarc", yaml), (".config/uv/uv.toml", toml)):
        if content is not None:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(content)
            (home / name).chmod(mode)
    before = snapshot(home)
    chosen_mirrors.write(root, record_of())
    apply(root, home)
    assert snapshot(home) != before
    first = chosen_mirrors.read(root)
    assert first is not None
    chosen_mirrors.write(root, MirrorRecord(record_of("https://other.example").choices, first.written))
    apply(root, home)
    restore(root)
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
    def test_restore_of_mirror_settings_returns_every_byte_and_mode_of_the_users_files(
        self, tmp_path_factory: pytest.TempPathFactory, ini: bytes, yaml: bytes, toml: bytes, mode: int
    ) -> None:
        use_and_restore(tmp_path_factory.mktemp("h"), ini, yaml, toml, mode)

    @pytest.mark.long
    @hypothesis_settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(*homes)
    def test_restore_of_mirror_settings_returns_every_byte_and_mode_in_1000_examples(
        self, tmp_path_factory: pytest.TempPathFactory, ini: bytes, yaml: bytes, toml: bytes, mode: int
    ) -> None:
        use_and_restore(tmp_path_factory.mktemp("h"), ini, yaml, toml, mode)

    def test_settings_file_that_the_user_edited_blocks_restore_and_is_kept_with_force(
        self, root: Root, home: Path
    ) -> None:
        (home / ".condarc").write_text("channels: [a]\n")
        chosen_mirrors.write(root, record_of())
        apply(root, home)
        (home / ".condarc").write_text("mine: now\n")
        steps = write_config.restore_steps(root, Journal(root.journal, "t"), force=False)
        check = next(step.check() for step in steps if "condarc" in step.name)
        assert check.state is State.BLOCKED
        assert "-mine: now" in check.detail
        assert "+channels: [a]" in check.detail
        restore(root, force=True)
        assert (home / ".condarc").read_text() == "channels: [a]\n"
        assert (home / ".condarc.firstlight-kept-1").read_text() == "mine: now\n"

    def test_settings_files_lost_in_a_wipe_are_written_again_and_removed_by_restore(
        self, root: Root, home: Path
    ) -> None:
        chosen_mirrors.write(root, record_of())
        apply(root, home)
        for path in (home / ".config/pip/pip.conf", home / ".condarc"):
            path.unlink()
        apply(root, home)
        assert b"m.example" in (home / ".condarc").read_bytes()
        restore(root)
        assert not (home / ".condarc").exists()

    def test_restore_returns_a_deleted_settings_file_of_the_user_with_its_mode(self, root: Root, home: Path) -> None:
        (home / ".condarc").write_text("channels: [a]\n")
        (home / ".condarc").chmod(0o600)
        chosen_mirrors.write(root, record_of())
        apply(root, home)
        (home / ".condarc").unlink()
        restore(root)
        assert (home / ".condarc").read_text() == "channels: [a]\n"
        assert stat.S_IMODE((home / ".condarc").stat().st_mode) == 0o600

    def test_users_edit_of_a_settings_file_stays_when_the_mirror_changes(self, root: Root, home: Path) -> None:
        chosen_mirrors.write(root, record_of())
        apply(root, home)
        file = home / ".config/pip/pip.conf"
        file.write_text(file.read_text() + "[list]\nformat = columns\n")
        record = chosen_mirrors.read(root)
        assert record is not None
        chosen_mirrors.write(root, MirrorRecord(record_of("https://other.example").choices, record.written))
        apply(root, home)
        edited = file.read_text()
        assert "format = columns" in edited
        assert "https://other.example" in edited
        assert "https://m.example" not in edited
        steps = write_config.restore_steps(root, Journal(root.journal, "t"), force=False)
        check = next(step.check() for step in steps if "pip" in step.name)
        assert check.state is State.BLOCKED, "the file has an edit of the user"
        restore(root, force=True)
        assert file.with_name("pip.conf.firstlight-kept-1").read_text() == edited
        assert not file.exists()

    def test_restore_after_the_official_source_was_chosen_keeps_a_later_edit_of_the_user(
        self, root: Root, home: Path
    ) -> None:
        (home / ".condarc").write_text("channels: [a]\n")
        chosen_mirrors.write(root, record_of())
        apply(root, home)
        first = chosen_mirrors.read(root)
        assert first is not None
        official = {tool: MirrorChoice("official", (MirrorSource("official"),), "") for tool in ("pip", "conda", "hf")}
        chosen_mirrors.write(root, MirrorRecord(official, first.written))
        apply(root, home)
        assert (home / ".condarc").read_text() == "channels: [a]\n"
        assert not (home / ".config").exists()
        (home / ".condarc").write_text("channels: [b]\n")
        restore(root)
        assert (home / ".condarc").read_text() == "channels: [b]\n"

    def test_deleted_settings_file_is_written_again_with_the_users_settings(self, root: Root, home: Path) -> None:
        (home / ".condarc").write_text("channels: [a]\n")
        chosen_mirrors.write(root, record_of())
        apply(root, home)
        (home / ".condarc").unlink()
        apply(root, home)
        assert "channels: [a]" in (home / ".condarc").read_text()
        restore(root)
        assert (home / ".condarc").read_text() == "channels: [a]\n"

    def test_settings_file_that_is_a_link_stays_a_link(self, root: Root, home: Path, tmp_path: Path) -> None:
        (tmp_path / "dotfiles").write_text("channels: [a]\n")
        (home / ".condarc").symlink_to(tmp_path / "dotfiles")
        chosen_mirrors.write(root, record_of())
        apply(root, home)
        assert (home / ".condarc").is_symlink()
        restore(root)
        assert (tmp_path / "dotfiles").read_text() == "channels: [a]\n"

    def test_settings_file_whose_write_was_interrupted_can_be_restored(
        self, root: Root, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Interrupt the write of a file; the record on the volume must already have the original content."""
        (home / ".condarc").write_text("channels: [a]\n")
        chosen_mirrors.write(root, record_of())
        write = atomic.write_atomic

        def interrupted_write(path: Path, content: Any, **options: Any) -> None:
            if path.is_relative_to(home):
                raise KeyboardInterrupt
            write(path, content, **options)

        monkeypatch.setattr(write_config, "write_atomic", interrupted_write)
        with pytest.raises(KeyboardInterrupt):
            apply(root, home)
        monkeypatch.undo()
        monkeypatch.setenv("HOME", str(home))
        apply(root, home)
        restore(root)
        assert (home / ".condarc").read_text() == "channels: [a]\n"


class TestRealTools:
    def test_pip_uv_and_conda_settings_use_the_written_mirror(
        self, root: Root, home: Path, tmp_path: Path, serve: Any
    ) -> None:
        wheel = write_wheel(tmp_path, "hello", "1.0", {"hello.py": ""})
        mirror = serve(index([wheel]))
        chosen_mirrors.write(root, record_of(f"{mirror.url}/simple"))
        apply(root, home)
        prefix = tmp_path / "venv"
        subprocess.run([sys.executable, "-m", "venv", prefix], check=True)
        pip: list[str | Path] = [prefix / "bin/python", "-m", "pip", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "install", "hello"], capture_output=True, text=True, check=False)
        assert f"Looking in indexes: {mirror.url}/simple" in done.stdout, done.stderr
        assert "Successfully installed hello-1.0" in done.stdout
        requests = len(mirror.seen)
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
        done = subprocess.run(
            uv, capture_output=True, text=True, check=False, env={**os.environ, "UV_CACHE_DIR": str(tmp_path / "c")}
        )
        assert done.returncode == 0, done.stderr
        assert len(mirror.seen) > requests
        assert conda_settings.mirrors({}, home)["https://conda.anaconda.org/"] == "https://m.example/cloud/"
        assert conda_settings.mirrors({}, home)["https://conda.anaconda.org/nvidia/"] == "https://n.example/nvidia/"

    def test_rattler_installs_from_the_mirror_in_the_written_condarc(
        self, root: Root, home: Path, tmp_path: Path, conda: conda_channel.FolderServer, conda_envs: Path
    ) -> None:
        mirror = MirrorSource("m", conda.url, channels={"conda-forge": f"{conda.url}/conda-forge"})
        chosen_mirrors.write(root, MirrorRecord({"conda": MirrorChoice("m", (mirror,), "by test")}))
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
    SPECIAL = '/vol ume/it\'s "$HOME" `x` \\ % 中'

    @pytest.mark.parametrize("shell", SHELLS)
    def test_shellenv_value_with_special_characters_is_the_same_in_each_shell(self, root: Root, shell: str) -> None:
        import shutil

        if shutil.which(shell) is None:
            pytest.skip(f"no {shell} here")
        name = "powershell" if shell == "pwsh" else shell
        text = variables.script({"ONE": self.SPECIAL, "TWO": "2"}, name)
        show = "[Console]::Out.Write($env:ONE)" if shell == "pwsh" else 'printf %s "$ONE"'
        flag = "-Command" if shell == "pwsh" else "-c"
        done = subprocess.run([shell, flag, text + show.encode()], capture_output=True, check=True)
        assert done.stdout.decode() == self.SPECIAL

    def test_shellenv_value_that_is_not_utf8_is_the_same_in_bash(self) -> None:
        path = os.fsdecode(b"/v\xff'")
        done = subprocess.run(
            ["bash", "-c", variables.script({"A": path}, "bash") + b'printf %s "$A"'], capture_output=True, check=True
        )
        assert done.stdout == b"/v\xff'"

    def test_shellenv_prints_the_stored_variables_sorted_by_name(self, root: Root) -> None:
        journal = Journal(root.journal, "t")
        for name, value in (("TORCH_HOME", "z"), *write_config.mirror_variables(record_of()).items()):
            variables.set_value(root, name, value, journal)
        done = provision("shellenv", "--root", root.path, HF_ENDPOINT="")
        assert done.stdout.splitlines() == [
            "export CONDA_CHANNEL_ALIAS='https://m.example/cloud'",
            "export HF_ENDPOINT='https://hub.example'",
            "export HF_HUB_DISABLE_IMPLICIT_TOKEN='1'",
            "export HF_HUB_DISABLE_XET='1'",
            "export PIP_INDEX_URL='https://m.example/simple'",
            "export TORCH_HOME='z'",
            "export UV_DEFAULT_INDEX='https://m.example/simple'",
        ]
        assert provision("shellenv", "--root", root.path, "--shell", "csh").returncode == 2

    def test_child_process_gets_no_mirror_variable_of_a_tool_whose_variable_the_user_has_set(self, root: Root) -> None:
        journal = Journal(root.journal, "t")
        for name, value in write_config.mirror_variables(record_of()).items():
            variables.set_value(root, name, value, journal)
        values = variables.for_child(
            root,
            {"HF_ENDPOINT": "https://mine", "PIP_INDEX_URL": "https://m.example/simple"},
            all_tools.variable_groups(),
        )
        assert not any(name.startswith("HF_") for name in values)
        assert "PIP_INDEX_URL" in values

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_activation_sets_only_unset_mirror_variables_and_deactivation_unsets_those(
        self, tmp_path: Path, shell: str
    ) -> None:
        import shutil

        if shutil.which(shell) is None:
            pytest.skip(f"no {shell} here")
        values = {
            name: value for name, value in write_config.mirror_variables(record_of()).items() if name.startswith("HF_")
        }
        suffix = ".fish" if shell == "fish" else ".sh"
        enter, leave = tmp_path / f"a{suffix}", tmp_path / f"d{suffix}"
        for folder, hook_suffix, text in variables.hooks(values, all_tools.variable_groups()):
            if hook_suffix == suffix:
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
