"""Asking the process that guards a run's guest: to give the run up, or how it stands.

A hypervisor may put such a process beside a run that holds something of a guest. It serves a unix socket in the run's
private folder (`SOCKET` in `Context.folder`) to processes of the same user: one line of JSON comes in, one goes out.

- ``{"do": "give up", "kind": "Cancelled", "message": ..., "hint": ...}``: the run comes to nothing, because of this
  error. Once the guest is let go of, ``{"released": true, "seconds": 0.4, "did": ["ended a backup job"]}``, or
  ``{"released": false, "seconds": 9.0, "why": ..., "hint": ...}`` where that has not succeeded so far; it is tried on.
  A run that was recorded, or is just being recorded, stays so; what it holds of the guest is let go of all the same.
- ``{"do": "status"}``: ``{"vm": UUID, "name": ..., "run": ..., "owner": PID, "phase": ..., "given_up": null}``, or the
  error as ``{"kind": ..., "message": ..., "hint": ...}``. The phases: `PHASES`.
- ``{"do": "admit"}``: see `backupcore.disk.nbd.admission`.

What it does not understand it answers with ``{"error": ...}``. It ends when all is released, and its socket with it.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backupcore.disk.unix_socket import connect_to
from backupcore.errors import BackupError, HypervisorError, NotFound, dump_error, load_error

__all__ = ["PHASES", "SOCKET", "Released", "Status", "give_up", "status"]

SOCKET = "guard.sock"
PHASES = ("watching", "giving up", "released", "the owner releases")
_LONGEST = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """What came of giving a run up: `did` is a line for each thing that was let go of, or `why` it was not, yet."""

    released: bool
    seconds: float
    did: tuple[str, ...] = ()
    why: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How a run stands: `phase` is one of `PHASES`, `given_up` the error with which it was given up, if it was."""

    vm: str
    name: str
    run: str
    owner: int
    phase: str
    given_up: BackupError | None


def give_up(folder: Path, error: BackupError, limit: float) -> Released:
    """Have the run of this folder given up because of `error`, and its guest let go of.

    Waits `limit` seconds at most for the answer: then HypervisorError. NotFound where no process guards the run.
    """
    answer = _ask(folder, {"do": "give up", **dump_error(error)}, limit)
    return Released(
        released=answer.get("released") is True,
        seconds=float(answer.get("seconds", 0)),
        did=tuple(str(line) for line in answer.get("did", ())),
        why=str(answer.get("why", "")),
        hint=str(answer.get("hint", "")),
    )


def status(folder: Path, limit: float = 5.0) -> Status:
    """How the run of this folder stands. NotFound where no process guards it, HypervisorError without an answer."""
    answer = _ask(folder, {"do": "status"}, limit)
    said = answer.get("given_up")
    return Status(
        vm=str(answer.get("vm", "")),
        name=str(answer.get("name", "")),
        run=str(answer.get("run", "")),
        owner=int(answer.get("owner", 0)),
        phase=str(answer.get("phase", "")),
        given_up=load_error(said) if said else None,
    )


def _ask(folder: Path, question: Mapping[str, object], limit: float) -> dict[str, Any]:
    path = folder / SOCKET
    try:
        with connect_to(path, limit) as connection:
            connection.sendall(json.dumps(question).encode() + b"\n")
            answer = json.loads(_line(connection))
    except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, BrokenPipeError) as error:
        # The last two: it ended while it was asked.
        raise NotFound(f"no process guards the run of {folder}") from error
    except (OSError, ValueError) as error:
        raise HypervisorError(f"the process that guards the run of {folder} does not answer: {error}") from error
    if not isinstance(answer, dict) or "error" in answer:
        raise HypervisorError(f"the process that guards the run of {folder} refused to answer: {answer!r:.200}")
    return answer


def _line(connection: socket.socket) -> bytes:
    said = b""
    while not said.endswith(b"\n") and len(said) < _LONGEST:
        piece = connection.recv(4096)
        if not piece:
            raise ConnectionResetError("it ended without an answer")
        said += piece
    return said
