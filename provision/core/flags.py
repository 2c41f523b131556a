"""Lets several commands share a group of flags: a dataclass of flags becomes single parameters, which typer needs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def expand(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command in which each field of a flag record is a parameter of its own.

    A flag record is a frozen dataclass with fields of the form `name: Annotated[type, typer.Option(...)] = default`.
    `command` takes the record as a keyword-only parameter that is annotated with the dataclass. In the signature of
    the returned command, the fields replace this parameter, in the order of the dataclass. The returned command makes
    the record from the values of the fields, and passes it to `command`. A flag that the user does not pass has its
    default. A field without a default is required.

    All parameters of the returned command are keyword-only. typer passes each value by its name, and a parameter with a
    default may then stand before a parameter without one.

    Raises:
        ValueError: a field has the name of another parameter, or of a field of another record.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    records: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            records[name] = hints[name]
            parameters += _field_parameters(hints[name])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))

    signature = inspect.Signature(parameters)

    @functools.wraps(command)
    def expanded(**flags: object) -> object:
        bound = signature.bind(**flags)
        bound.apply_defaults()
        values = bound.arguments
        collected = {
            name: record(**{field.name: values.pop(field.name) for field in dataclasses.fields(record)})
            for name, record in records.items()
        }
        return command(**values, **collected)

    expanded.__signature__ = signature  # type: ignore[attr-defined]  # inspect reads it
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def _field_parameters(record: type[Any]) -> Iterator[inspect.Parameter]:
    hints = typing.get_type_hints(record, include_extras=True)
    for field in dataclasses.fields(record):
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
        )
