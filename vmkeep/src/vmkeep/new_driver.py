"""A new driver's package, written from the skeleton."""

from __future__ import annotations

import ast
import builtins
import json
import keyword
import os
import re
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote, urlsplit

from backupcore import plugins
from backupcore.errors import ConfigError, from_os_error

__all__ = ["commands", "write"]

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
    if name in plugins.names(plugins.DRIVERS) or _is_installed(f"backupcore-{name}"):
        raise ConfigError(f"a driver or package of that name, {name}, is installed already", "Choose another name.")
    target = folder / f"backupcore-{name}"
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists already", "It is left as it is. Choose another name or folder.")
    made: list[Path] = []
    try:
        target.mkdir(parents=True)
        for template, where in _FILES.items():
            path = target / _named(where, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_named(_template(template), name), "utf-8")
            made.append(path.relative_to(folder))
        (target / f"src/backupcore_{name.replace('-', '_')}/py.typed").touch()
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise from_os_error(error, f"writing {target}") from error
    return made


def commands() -> list[str]:
    """What to type in the package's folder, so that it is installed and tested with the backupcore that is here.

    Nobody need have published one: it comes from where it was installed from, as far as that is known and still there;
    else the driver is installed beside it.
    """
    origin = _origin()
    if origin is not None:
        return [
            "python3 -m venv .venv",
            f".venv/bin/pip install {shlex.quote(str(origin))} -e .[test]",
            ".venv/bin/pytest",
        ]
    python = shlex.quote(sys.executable)
    if sys.prefix != sys.base_prefix:
        return [f"{python} -m pip install -e .[test]", f"{python} -m pytest"]
    # One for the whole system, into which pip may not install; a new environment can see what is there.
    return [
        f"{python} -m venv --system-site-packages .venv",
        ".venv/bin/python -m pip install -e .[test]",
        ".venv/bin/python -m pytest",
    ]


def _origin() -> Path | None:
    """The folder or wheel from which backupcore was installed; None where it came from an index, or is gone."""
    try:
        url = urlsplit(json.loads(distribution("backupcore").read_text("direct_url.json") or "{}").get("url", ""))
    except (PackageNotFoundError, ValueError, AttributeError):
        return None
    path = Path(unquote(url.path))
    return path if url.scheme == "file" and path.exists() else None


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def _named(text: str, name: str) -> str:
    """The skeleton's text for a driver of that name, in one pass: the name itself may hold what is replaced."""
    module, kind = name.replace("-", "_"), _class(name)
    words = {
        "backupcore_shelf": f"backupcore_{module}",
        "test_shelf": f"test_{module}",
        "TestShelf": f"Test{kind}",
        "Shelf": kind,
        "shelf": name,
        "@COMMANDS@": "\n".join(f"    {line}" for line in commands()),
    }
    return re.sub(
        "backupcore_shelf|test_shelf|TestShelf|\\bShelf\\b|shelf|@COMMANDS@", lambda found: words[found[0]], text
    )


def _class(name: str) -> str:
    """The name of its class: the words of its own, but for those that Python or the skeleton's code uses already."""
    kind = "".join(word.capitalize() for word in name.split("-"))
    code = ast.parse(_template("shelf.py"))
    used = {one.id for one in ast.walk(code) if isinstance(one, ast.Name)}
    used |= {one.asname or one.name for one in ast.walk(code) if isinstance(one, ast.alias)}
    used |= {one.name for one in ast.walk(code) if isinstance(one, ast.ClassDef | ast.FunctionDef)} - {"Shelf"}
    taken = used | {*keyword.kwlist, *dir(builtins)}
    return f"{kind}Driver" if kind in taken else kind


def _template(name: str) -> str:
    return files("vmkeep.skeleton").joinpath(name).read_text("utf-8")
