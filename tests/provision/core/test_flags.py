"""Tests that typer reads the fields of a flag record (a dataclass) as flags, and passes the record to the command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from provision.core import flags


@dataclass(frozen=True)
class RootFlags:
    root: Annotated[str | None, typer.Option("--root", metavar="DIR")] = None
    host: Annotated[Path | None, typer.Option("--host")] = None


@dataclass(frozen=True)
class RunFlags(RootFlags):
    out: Annotated[Path, typer.Option("--out", help="Folder of the runs.")] = Path("results")


@dataclass(frozen=True)
class OutputFlags:
    json: Annotated[bool, typer.Option("--json")] = False


@dataclass(frozen=True)
class NameFlags:
    name: Annotated[str, typer.Option("--name")]


def runner_of(command: object) -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command()(command)  # type: ignore[type-var]
    return app


def test_command_with_two_flag_records_receives_each_record_with_the_typed_values() -> None:
    received: list[object] = []

    @flags.expand
    def measure(
        suite: Annotated[str, typer.Argument()] = "quick",
        *,
        run: RunFlags,
        budget: Annotated[float, typer.Option("--budget")] = 1.0,
        output: OutputFlags,
    ) -> None:
        received.extend((suite, run, budget, output))

    arguments = ["tiny", "--json", "--root", "/data", "--budget", "3", "--host", "host.toml"]
    outcome = CliRunner().invoke(runner_of(measure), arguments)
    assert outcome.exit_code == 0, outcome.output
    assert received == ["tiny", RunFlags(root="/data", host=Path("host.toml")), 3.0, OutputFlags(json=True)]


def test_help_lists_the_flags_of_a_record_at_the_place_of_its_parameter() -> None:
    @flags.expand
    def measure(
        *,
        device: Annotated[str, typer.Option("--device")] = "auto",
        run: RunFlags,
        budget: Annotated[float, typer.Option("--budget")] = 1.0,
    ) -> None:
        """Measure a suite."""

    text = CliRunner().invoke(runner_of(measure), ["--help"]).output
    places = [text.index(flag) for flag in ("Measure a suite.", "--device", "--root", "--host", "--out", "--budget")]
    assert places == sorted(places)
    assert "Folder of the runs.  [default: results]" in text
    assert "--root DIR" in text
    assert "--run" not in text


def test_record_field_without_a_default_is_a_required_flag() -> None:
    @flags.expand
    def keep(*, output: OutputFlags, names: NameFlags) -> None:
        typer.echo(f"{names.name} {output.json}")

    assert CliRunner().invoke(runner_of(keep), ["--name", "nightly"]).output == "nightly False\n"
    outcome = CliRunner().invoke(runner_of(keep), [])
    assert outcome.exit_code == 2
    assert "--name" in outcome.output


def test_python_call_of_a_command_without_a_flag_uses_the_default_of_the_flag() -> None:
    @flags.expand
    def measure(*, run: RunFlags, budget: float = 1.0) -> tuple[RunFlags, float]:
        return run, budget

    assert measure(root="/data") == (RunFlags(root="/data"), 1.0)
    with pytest.raises(TypeError, match="'volume'"):
        measure(volume="/data")


def test_record_field_with_the_name_of_another_parameter_is_rejected() -> None:
    def keep(*, root: str = "", run: RunFlags) -> None:
        """Have a parameter `root` beside a record with a field `root`."""

    with pytest.raises(ValueError, match="root"):
        flags.expand(keep)


@dataclass(frozen=True)
class SecondFlags:
    first: int = 1


def test_parameter_of_a_record_may_have_the_name_of_a_field_of_another_record() -> None:
    def describe(*, first: OutputFlags, second: SecondFlags) -> tuple[OutputFlags, SecondFlags]:
        return first, second

    assert flags.expand(describe)(json=True, first=5) == (OutputFlags(json=True), SecondFlags(first=5))
