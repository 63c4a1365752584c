"""A driver's options from the command line: ``-o key=value``, where a value is written as the option's type asks."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence

from backupcore.errors import ConfigError

__all__ = ["parse"]


def parse(kind: type, words: Sequence[str]) -> dict[str, object]:
    """The options of a driver of class `kind`. Values are checked when it is built; no error here shows one."""
    types = {one.name: str(one.type) for one in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    options: dict[str, object] = {}
    for word in words:
        key, mark, value = word.partition("=")
        if not mark or not key:
            raise ConfigError("-o needs key=value", f"The options of this driver are: {', '.join(types)}.")
        if key in options:
            raise ConfigError(f"-o {key} is given twice", "Give it once.")
        options[key] = value if _is_text(types.get(key, "str")) else _value(value)
    return options


def _is_text(kind: str) -> bool:
    return any(word in kind for word in ("str", "Path", "Literal")) and not kind.startswith(("list", "tuple", "dict"))


def _value(text: str) -> object:
    """As in the configuration file; what is none there stays text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
