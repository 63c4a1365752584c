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
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from typing import Any, TypeVar, dataclass_transform

from backupcore.errors import ConfigError, ContractViolation

__all__ = ["build", "driver", "option", "problems"]

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
    if not dataclasses.is_dataclass(cls):
        raise ContractViolation(f"{cls.__name__} is not decorated with @backupcore.driver")
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # noqa: PLC0415 - 0.1 s, needed only here

    config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    cls.__pydantic_config__ = config  # type: ignore[attr-defined]  # pydantic's place for a dataclass's settings
    try:
        # By way of JSON: as strict about types, but a string may stand for a path, as in TOML.
        return TypeAdapter(cls).validate_json(json.dumps(options, default=str))
    except ValidationError as error:
        known = ", ".join(field.name for field in dataclasses.fields(cls))
        message = problems(error.errors(include_input=False, include_url=False, include_context=False), where)
        raise ConfigError(message, f"The options of this driver are: {known}.") from None


def problems(errors: Sequence[Mapping[str, Any]], where: str) -> str:
    """pydantic's list of errors as one message: every wrong key with its path, never a value."""
    lines = []
    for error in errors:
        path = ".".join([*([where] if where else []), *(str(part) for part in error["loc"])])
        what = {"unexpected_keyword_argument": "unknown key", "missing": "required, but missing"}.get(
            error["type"], error["msg"]
        )
        lines.append(f"{path}: {what[0].lower()}{what[1:]}")
    return "; ".join(lines)
