"""The scripts that another host runs, in its place: with dash and with busybox, and with a `sync` of every kind."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from backupcore_rsync import host, programs
from lab import kernel

ID = "a" * 32
VM = "0e9a2a1b-0000-4000-8000-000000000000"


@pytest.fixture(params=["sh", "busybox"])
def shell(request: pytest.FixtureRequest) -> list[str]:
    if request.param == "sh":
        return ["sh"]
    return [str(kernel.busybox()), "sh"]


def run(shell: list[str], script: str, *arguments: str | int | Path, path: Path | None = None) -> tuple[int, str]:
    environment = {"PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"], "LC_ALL": "C"}
    command = [*shell, "-c", script, "sh", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def target(tmp_path: Path) -> Path:
    place = tmp_path / "-a b'c"
    place.mkdir()
    return place


def begun(shell: list[str], target: Path) -> Path:
    assert run(shell, host.BEGIN, target, VM, f".{ID}.h.1.part") == (0, "")
    part = target / VM / f".{ID}.h.1.part"
    assert part.stat().st_mode & 0o777 == 0o700
    (part / ".labels").mkdir()
    (part / ".labels" / "number=0").touch()
    (part / "disk.vda.qcow2").write_text("x")
    (part / "manifest.json").touch()
    return part


@pytest.mark.parametrize("word", ["a!b", "it's !x '!!' !", "!", "", "[ ! -e $x ] || :"])
def test_a_word_for_any_shell(shell: list[str], word: str) -> None:
    """csh replaces what follows a "!" in single quotes as well, but for one that a backslash is before."""
    line = programs.quoted(word)
    assert run(shell, f"printf %s {line}") == (0, word)
    assert not re.search(r"(?<!\\)!", line)


@pytest.mark.parametrize(
    ("sync", "published"),
    [
        ("exit 0", True),
        ('[ $# = 0 ] || { echo "sync: takes no arguments" >&2; exit 1; }', True),  # BSD; then it syncs everything
        ('case "$*" in *disk*) echo "sync: error syncing: Input/output error" >&2; exit 1; esac', False),
        ("exit 1", False),
    ],
    ids=["takes files", "takes none", "a file's error", "always fails"],
)
def test_nothing_is_published_that_is_not_on_the_disk(target: Path, tmp_path: Path, sync: str, published: bool) -> None:
    shell = ["sh"]  # busybox would take its own sync
    tools = tmp_path / "tools"
    tools.mkdir()
    calls = tmp_path / "calls"
    (tools / "sync").write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{sync}\n')
    (tools / "sync").chmod(0o755)
    part = begun(shell, target)
    code, said = run(shell, host.PUBLISH, target, VM, part.name, ID, path=tools)
    assert (code == 0) is published, said
    assert (target / VM / ID).exists() is published
    assert part.exists() is not published
    if "exit 0" in sync:
        first, files, above = calls.read_text().splitlines()
        assert "disk.vda.qcow2" in files
        assert "number=0" in files
        assert above == "-- . .."
        assert first.endswith(".part")


def test_from_the_beginning_to_the_end(shell: list[str], target: Path) -> None:
    part = begun(shell, target)
    code, said = run(shell, host.CHECK + 'set -- "$1" "$3"; ' + host.PARTS, target, "sh", VM)
    assert (code, said) == (0, f"part ./{VM}/{part.name}\n")
    sizes = ("disk.vda.qcow2", 1, "manifest.json", 0, ".labels/number=0", 0)
    for wrong in (("disk.vda.qcow2", 2), ("disk.vdb.qcow2", 1), (".labels/number=0", 1)):
        assert run(shell, host.PUBLISH, target, VM, part.name, ID, *sizes, *wrong) == (0, f"differs: {wrong[0]}\n")
    assert part.exists()
    assert run(shell, host.PUBLISH, target, VM, part.name, ID, *sizes) == (0, "")
    assert run(shell, host.READ, target / VM / ID / "disk.vda.qcow2") == (0, "x")
    assert run(shell, host.PUBLISH, target, VM, part.name, ID)[0] == 1, "what is there is not replaced"
    other = begun(shell, target)
    for path in (*other.rglob("*"), other):
        os.utime(path, (0, 0))
    assert run(shell, host.PARTS, target, VM) == (0, f"still ./{VM}/{other.name}\n")
    assert run(shell, host.SWEEP, target, VM, other.name) == (0, "")
    assert not other.exists()
    (target / VM / "link").symlink_to(target / VM / ID)
    assert run(shell, host.REMOVE, target, f"{VM}/link", f"{VM}/none") == (0, "")
    assert (target / VM / ID / "manifest.json").exists()
    assert run(shell, host.REMOVE, target, f"{VM}/{ID}") == (0, "")
    assert [path.name for path in (target / VM).iterdir()] == ["link"]
    assert "%" in run(shell, host.ROOM, target)[1]
    for script in (host.CHECK, host.PARTS, host.REMOVE):
        code, said = run(shell, script, target / "none", "sh", "x")
        assert code == 1
        assert "no such folder" in said
