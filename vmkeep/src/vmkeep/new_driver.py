"""A new driver's package, written from the skeleton."""

from __future__ import annotations

import os
import re
import shutil
from importlib.resources import files
from pathlib import Path

from backupcore import plugins
from backupcore.errors import ConfigError, from_os_error

__all__ = ["write"]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_FILES = {
    "pyproject.toml.in": "pyproject.toml",
    "README.md.in": "README.md",
    "shelf.py": "src/backupcore_shelf/__init__.py",
    "test_shelf.py.in": "tests/test_shelf.py",
}


def write(name: str, folder: Path) -> list[Path]:
    """Write the package of the driver `name` to ``folder/backupcore-<name>``: its files, relative to `folder`.

    It is a driver that works: it keeps backups in a folder. ConfigError for a name that cannot be one, and for a folder
    that exists.
    """
    if not _NAME.fullmatch(name) or len(name) > 40:
        raise ConfigError(
            f"{name!r:.60} cannot be the name of a driver", "Small letters and digits, in words joined by dashes."
        )
    if name in plugins.names(plugins.DRIVERS):
        raise ConfigError(f"a driver {name} is installed already", "Choose another name.")
    target = folder / f"backupcore-{name}"
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists already", "It is left as it is. Choose another name or folder.")
    made: list[Path] = []
    try:
        target.mkdir(parents=True)
        for template, where in _FILES.items():
            path = target / _named(where, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_named(files("vmkeep.skeleton").joinpath(template).read_text("utf-8"), name), "utf-8")
            made.append(path.relative_to(folder))
        (target / f"src/backupcore_{name.replace('-', '_')}/py.typed").touch()
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise from_os_error(error, f"writing {target}") from error
    return made


def _named(text: str, name: str) -> str:
    module = name.replace("-", "_")
    kind = "".join(word.capitalize() for word in name.split("-"))
    for old, new in (("backupcore_shelf", f"backupcore_{module}"), ("test_shelf", f"test_{module}")):
        text = text.replace(old, new)
    return re.sub(r"\bShelf\b", kind, text.replace("TestShelf", f"Test{kind}")).replace("shelf", name)
