"""A driver's options."""

from __future__ import annotations

import dataclasses
import re

from backupcore.errors import ConfigError
from backupcore.testing.bench import Bench, Failed, NotApplicable

SECRET = re.compile(r"password|passphrase|secret|token|credential|private_?key")
PLACE = re.compile(r"_(file|command|path)$")
MARK = "kit-hunter2-c0ffee"
"""A value that no message may show."""


def _fields(bench: Bench) -> tuple[type, tuple[dataclasses.Field[object], ...]]:
    kind = bench.target.kind
    if kind is None:
        raise NotApplicable("a driver object was given, and no options")
    if not dataclasses.is_dataclass(kind):
        raise Failed(f"{kind.__name__} is not decorated with @backupcore.driver")
    return kind, dataclasses.fields(kind)


def wrong_options(bench: Bench) -> None:
    """Unknown, missing and wrongly typed options are all named at once by a ConfigError that shows no value."""
    _, fields = _fields(bench)
    options = {**bench.target.options, "no_such_option_": MARK}
    wrong = ["no_such_option_"]
    for one in fields:
        kind = one.type.__name__ if isinstance(one.type, type) else str(one.type)
        if kind.replace(" ", "") in ("int", "bool", "float", "int|None"):
            options[one.name] = MARK
            wrong.append(one.name)
        elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            options.pop(one.name, None)
            wrong.append(one.name)
    try:
        bench.open(options=options)
    except ConfigError as error:
        told = f"{error.message} {error.hint} {error!r}"
    else:
        raise Failed("an unknown option is accepted")
    unnamed = [name for name in wrong if name not in told]
    if unnamed:
        raise Failed(f"the error does not name {', '.join(unnamed)}")
    if MARK in told:
        raise Failed("the error shows the value of an option")
    unhelpful = [one.name for one in fields if not one.metadata.get("help")]
    if unhelpful:
        raise Failed(f"options without a word on what they mean: {', '.join(unhelpful)}")


def secret_options(bench: Bench) -> None:
    """No option is meant to hold a secret in plain sight, and `repr` hides those that may."""
    kind, fields = _fields(bench)
    open_ones = [
        one.name
        for one in fields
        if SECRET.search(one.name) and not PLACE.search(one.name) and "Path" not in str(one.type) and one.repr
    ]
    if open_ones:
        raise Failed(f"{', '.join(open_ones)}: take a file or a command instead, or mark it with secret=True")
    shown = repr(bench.target.build())
    for one in fields:
        value = bench.target.options.get(one.name)
        if not one.repr and isinstance(value, str) and len(value) > 3 and value in shown:
            raise Failed(f"the repr of {kind.__name__} shows the secret option {one.name}")
