"""Defines the scenarios in which mirrors are written into the settings of pip, conda and uv, restored, or undone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from provision.mirrors import chosen_mirrors, write_config
from provision.mirrors.chosen_mirrors import MirrorChoice, MirrorRecord, MirrorSource
from provision.volume import variables
from provision.volume.changes import keep_backup
from provision.volume.journal import Journal
from tests.torture import scenarios
from tests.torture.scenarios import Field, Reading, Scenario, same

if TYPE_CHECKING:
    from pathlib import Path

    from provision.core.step import Step

_CONDA = MirrorSource("m", "https://m.example/cloud", defaults="https://m.example/pkgs")
_HUB = MirrorSource("m", "https://hub.example")
_PIP, _CONDARC = b"# mine\n[global]\ntimeout = 9\n", b"# mine\nauto_activate_base: false\n"
_CHOSEN = MirrorRecord(
    {
        tool: MirrorChoice("m", (source, MirrorSource("official")), "by test")
        for tool, source in (("pip", MirrorSource("m", "https://m.example/simple")), ("conda", _CONDA), ("hf", _HUB))
    }
)


def files(field: Field) -> list[Path]:
    return [field.home / ".config/pip/pip.conf", field.home / ".condarc"]


def lay(field: Field) -> None:
    """Write the user's pip.conf, with mode 0600, and .condarc; uv has no settings file yet."""
    scenarios.lay_volume(field)
    pip, conda = files(field)
    pip.parent.mkdir(parents=True)
    pip.write_bytes(_PIP)
    pip.chmod(0o600)
    conda.write_bytes(_CONDARC)


def steps(field: Field) -> list[Step]:
    journal = Journal(field.root.journal, "setup")
    prefix = field.root.prefix("diffusers")
    return [write_config.SettingsStep(field.root, prefix, field.home, {}, journal, conda_is_here=True)]


def write(field: Field) -> None:
    """Record the selected mirrors if none are recorded, then write them into the settings of pip, conda and uv."""
    if not (chosen_mirrors.read(field.root) or MirrorRecord()).choices:
        journal = Journal(field.root.journal, "setup")
        keep_backup(chosen_mirrors.record_path(field.root), chosen_mirrors.to_json(_CHOSEN).encode(), journal)
        chosen_mirrors.write(field.root, _CHOSEN)
    scenarios.converge(steps(field))


def restore(field: Field) -> None:
    scenarios.converge(
        write_config.restore_steps(field.root, Journal(field.root.journal, "mirrors restore"), force=False)
    )


def is_written(field: Field, before: Reading, after: Reading) -> None:
    write(field)
    same(field.read(), after)


def is_restored(field: Field, before: Reading, after: Reading) -> None:
    """Write the mirrors again, restore the settings, and assert that every byte is as before the command."""
    write(field)
    restore(field)
    same(field.read(), before)
    assert variables.read(field.root) == {}


def is_taken_back(field: Field, before: Reading, after: Reading) -> None:
    """Restore the settings without writing the mirrors again, and assert that every byte is as before the command."""
    restore(field)
    same(field.read(), before)


def is_undone(field: Field, before: Reading, after: Reading) -> None:
    scenarios.undo_all(field)
    same(field.read(), before)


def is_restored_at_last(field: Field, before: Reading, after: Reading) -> None:
    restore(field)
    same(field.read(), after)


def lay_written(field: Field) -> None:
    lay(field)
    write(field)


def kept(field: Field) -> list[Path]:
    """Return the paths where the user's bytes may be: the settings, their stored originals, and the backups."""
    return [*files(field), field.root.state / "mirrors", field.root.state / "backup"]


_OWNED = (_PIP, _CONDARC)
_FORTH = {"setup": is_written, "restore": is_restored, "undo": is_undone, "restore at once": is_taken_back}
CONFIG: dict[str, Scenario] = {
    "settings": Scenario(lay, write, _FORTH, kept, True, _OWNED),
    "settings, one disk": Scenario(lay, write, _FORTH, kept, False, _OWNED),
    "settings restored": Scenario(lay_written, restore, {"restore": is_restored_at_last}, kept, True, _OWNED),
    "settings undone": Scenario(lay_written, scenarios.undo, {"undo": scenarios.is_undone}, kept, True, _OWNED),
}
