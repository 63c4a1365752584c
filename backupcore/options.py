"""`@driver`: a driver's options are the fields of its class; a TOML table becomes a driver object.

::

    @backupcore.driver
    class Folder:
        path: Path = backupcore.option("where the backups lie")
        mode: str = backupcore.option("permissions of new files", default="0600")

The class becomes a frozen dataclass with keyword-only fields. Unknown keys, missing keys and wrong types are all
named at once, by a ConfigError that never shows a value. Building a driver does no I/O. A secret is a path to a file
or a command that prints it, never the secret itself; a value that may hold one (a URL) is marked `secret`, and its
`repr` hides it.

An option's type is one that TOML has (str, int, float, bool, date and time, a list or table of them), a ``Path``, a
``Literal``, an ``Enum``, or one of these and None; ``Annotated[int, msgspec.Meta(ge=1)]`` says what is allowed of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from backupcore.errors import ConfigError, ContractViolation, text_of
from backupcore.plugins import loading

__all__ = ["build", "checked", "driver", "option"]

T = TypeVar("T")


def option(
    help: str,  # noqa: A002 - the field's word for it; nothing here needs the builtin
    *,
    default: Any = MISSING,
    default_factory: Callable[[], Any] | Any = MISSING,
    secret: bool = False,
) -> Any:
    """One option of a driver: what it means, its default (none: required), and whether `repr` must hide its value."""
    metadata = {"help": help, "secret": secret}
    if default_factory is not MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata, repr=not secret)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option,))
def driver(cls: type[T]) -> type[T]:
    """Make `cls` a driver: a frozen, keyword-only dataclass whose fields are its options."""
    # eq=False: pluggy tells plugins apart by hash and identity, and an option may be a list, which has no hash.
    made = dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(cls)
    for field in dataclasses.fields(made):  # type: ignore[arg-type]  # mypy does not see what the line above returns
        if "help" not in field.metadata:
            raise ContractViolation(f"driver {cls.__name__}: field {field.name} is not declared with option(…)")
    return made


def build(cls: type[T], options: Mapping[str, object], *, where: str = "") -> T:
    """A `cls` from a table of options, strictly typed (a path may be a string). ConfigError names every wrong key.

    `where` says where the table stands (``datastores.nas``), for the message.
    """
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        what = getattr(cls, "__name__", f"an object of {type(cls).__name__}")
        raise ContractViolation(f"driver {what} is no class that is decorated with @backupcore.driver")
    values, wrong = checked(cls, options, where=where)
    known = f"The options of this driver are: {', '.join(field.name for field in dataclasses.fields(cls))}."
    if wrong:
        raise ConfigError("; ".join(wrong), known)
    try:
        with loading(f"driver {cls.__name__}" + (f" of {where}" if where else ""), but=(ValueError,)):
            return cls(**values)
    except ValueError as error:  # a driver's own check of its options
        raise ConfigError(f"{where}: {error}" if where else str(error), known) from None


def checked(cls: type, table: Mapping[str, object], *, where: str = "") -> tuple[dict[str, Any], list[str]]:
    """The values of a table for the fields of the dataclass `cls`, and all that is wrong: ``KEY: what``, no value.

    Strictly typed: no number becomes a string, and no string a number; a string may stand for a path.
    """
    from msgspec import ValidationError, convert  # noqa: PLC0415 - the process of a view imports drivers, not this

    try:
        kinds = get_type_hints(cls, include_extras=True)
    except Exception as error:
        raise ContractViolation(
            f"driver {cls.__name__}: the types of its options cannot be looked up: {text_of(error)}",
            "What an option's type is made of must be imported when the program runs, not for the type checker alone.",
        ) from error
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    wrong = []
    before = f"{where}." if where else ""
    for name, value in table.items():
        if name not in fields:
            wrong.append(f"{before}{name}: unknown key")
            continue
        try:
            values[name] = convert(value, kinds[name], dec_hook=_path)
        except ValidationError as error:
            what, _, inside = str(error).partition(" - at `$")
            wrong.append(f"{before}{name}{inside.rstrip('`')}: {_said(what, kinds[name])}")
        except (TypeError, NotImplementedError) as error:  # msgspec's of the type, and ours of `_path`
            raise ContractViolation(f"{cls.__name__}.{name}: no table can hold a value of its type: {error}") from error
    for name, field in fields.items():
        if name not in table and field.default is MISSING and field.default_factory is MISSING:
            wrong.append(f"{before}{name}: required, but missing")
    return values, wrong


def _path(kind: type, value: object) -> object:
    if kind is not Path:
        raise NotImplementedError(f"{kind.__name__} is no type of an option")
    if not isinstance(value, str):
        raise TypeError("Expected `str`, the path")
    if "\0" in value:
        raise ValueError("A path holds no NUL")
    try:
        Path(value).expanduser()
    except RuntimeError:
        raise ValueError("There is no account of the name after ~ on this host") from None
    return Path(value)


def _said(what: str, kind: object) -> str:
    """msgspec's message as a part of ours, without the value that it names where only some are allowed."""
    if what.startswith("Invalid enum value"):
        return f"expected one of {', '.join(repr(choice) for choice in _choices(kind))}"
    return (what[0].lower() + what[1:]).replace("`object`", "table").replace("`", "")


def _choices(kind: object) -> Iterator[object]:
    if isinstance(kind, type) and issubclass(kind, Enum):
        yield from (member.value for member in kind)
    for part in get_args(kind):
        if get_origin(kind) is Literal:
            yield part
        else:
            yield from _choices(part)
