"""The installation: one state folder, by an ID of its own. Whose a backup, a checkpoint or a run is goes by that ID.

``STATE/installation`` holds it, with a digest of the machine's own ID: a state folder that wakes up on another machine
is a copy, and gets a new ID, since two that have one ID would delete each other's backups. The host's name is for
people only: it may change, and two hosts may have the same.

What the file says is kept in that of its lock as well: where the file is gone the ID is taken again, on this machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from backupcore.errors import ConfigError
from backupcore.model import Image, new_id
from backupcore.small_file import NotAFile, read_small, require_file
from vmkeep import full_state

__all__ = ["MACHINE_ID", "Installation", "establish", "known", "machine"]

log = logging.getLogger("vmkeep.installation")

MACHINE_ID = "VMKEEP_MACHINE_ID"
"""The variable of the environment that says which machine this is, where ``/etc/machine-id`` is not to be believed."""

_NAME = "installation"
_LOCK = f"{_NAME}.lock"
_HINT = (
    "Put it back as it was. Without a copy of it move it away: on the machine that it was made on its ID is taken "
    "again, else [host] installation must name it ('vmkeep image show' tells which the backups have)."
)
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """Who works: the ID of its state folder ("" where it has none yet), and the host's name.

    Backups of versions that knew no installations have the name alone.
    """

    id: str
    host: str

    def owns(self, image: Image) -> bool:
        """Whether this installation has written the image, or has taken it over."""
        return self.wrote(image.installation, image.host)

    def wrote(self, installation: str | None, host: str | None) -> bool:
        """Whether what has this ID, or in its absence this host's name, is this installation's."""
        return installation == self.id if installation else host == self.host


@dataclass(frozen=True, slots=True)
class _Held:
    """What the file says; `machine` is "" where that was not known."""

    id: str
    machine: str


def machine() -> str:
    """Which machine this is: a digest of its ID, "" where it has none. The ID itself is nobody else's business."""
    said = os.environ.get(MACHINE_ID, "")
    if not said:
        with suppress(OSError, UnicodeDecodeError):
            said = Path("/etc/machine-id").read_text("ascii").strip()
    if said in ("", "uninitialized"):
        return ""
    return hashlib.sha256(f"vmkeep installation {said}".encode()).hexdigest()[:32]


def known(state: Path, *, here: str, chosen: str = "") -> Installation:
    """Who works in this state folder, as far as that is decided; nothing is written. `here` is what `machine` says.

    `chosen` is the ID that the configuration demands. ConfigError if the file cannot be understood.
    """
    held = _read(state) or _copy(state)
    own = chosen or (held.id if held is not None and not _moved(held, here) else "")
    return Installation(id=own, host=socket.gethostname())


def establish(
    state: Path,
    *,
    here: str,
    chosen: str = "",
    config: Path | None = None,
    carried: Callable[[], str] = lambda: "",
) -> Installation:
    """Who works in this state folder: the ID is made, and kept, where there is none, or where the folder is a copy.

    `here` is what `machine` says, `chosen` the ID that the configuration `config` demands, `carried` tells the ID that
    the catalog carries ("": none). ConfigError if the file cannot be understood, or is gone and it is not sure that
    this is the machine where it was; TargetFull, AccessDenied.
    """
    try:
        state.mkdir(mode=0o711, parents=True, exist_ok=True)
        held = _read(state)
        if held is None or held.machine != here or held.id != (chosen or held.id):
            with _locked(state):
                there = _read(state) or _again(state, here, chosen, config, carried)
                held = _decide(state, there, here, chosen, config)
        elif _copy(state) != held:
            with suppress(OSError), _locked(state):  # it may be read-only; what an older version has made has none
                _keep_copy(state, held)
    except OSError as error:
        raise full_state.from_os_error(error, f"{state / _NAME}", state) from error
    return Installation(id=held.id, host=socket.gethostname())


def _decide(state: Path, held: _Held | None, here: str, chosen: str, config: Path | None) -> _Held:
    if chosen:
        due = _Held(chosen, here)
    elif held is None:
        due = _Held(new_id(), here)
    elif not _moved(held, here):
        # A machine that has no ID just now does not make one forget which it was.
        due = _Held(held.id, here or held.machine)
    else:
        due = _Held(new_id(), here)
        log.warning(
            "the state folder %s comes from another machine, so it has a new identity now, %s: what %s has backed up "
            'stays untouched (is it the same installation, on a new machine? Set [host] installation = "%s" in %s)',
            state,
            due.id,
            held.id,
            held.id,
            config or "the configuration",
        )
    if due != _read(state):
        _write(state, due)
    if due != _copy(state):
        _keep_copy(state, due)
    return due


def _again(state: Path, here: str, chosen: str, config: Path | None, carried: Callable[[], str]) -> _Held | None:
    """What the file has said that is gone; None where there was none. ConfigError where it may be a copy's."""
    if chosen:
        return None
    held = _copy(state)
    if held is not None and held.machine and here:
        if not _moved(held, here):
            log.warning("%s was gone: this goes on as the installation that it was, %s", state / _NAME, held.id)
        return held
    known_as = held.id if held is not None else carried()
    if known_as:
        raise ConfigError(
            f"{state / _NAME} is gone, which said that this is installation {known_as}",
            f'Is this the machine that it was made on? Set [host] installation = "{known_as}" in '
            f"{config or 'the configuration'}. Is it a copy, and the first one still at work? Move the catalog away: "
            "this one gets an ID of its own then, and 'vmkeep catalog rebuild DATASTORE' finds the backups.",
        )
    return None


def _moved(held: _Held, here: str) -> bool:
    return bool(held.machine and here) and held.machine != here


def _read(state: Path) -> _Held | None:
    path = state / _NAME
    try:
        held = _parse(read_small(path))
    except FileNotFoundError:
        return None
    except NotAFile as error:
        raise ConfigError(f"{path} does not say which installation this is: {error.strerror}", _HINT) from error
    except OSError as error:
        raise full_state.from_os_error(error, f"{path}", state) from error
    if held is None:
        raise ConfigError(f"{path} does not say which installation this is", _HINT)
    return held


def _copy(state: Path) -> _Held | None:
    """The same by the file of its lock; None where that says nothing."""
    try:
        return _parse(read_small(state / _LOCK))
    except OSError:
        return None


def _keep_copy(state: Path, held: _Held) -> None:
    """Who holds the lock writes it, so nobody else does; one that is cut off says nothing."""
    text = _text(held).encode()
    handle = os.open(state / _LOCK, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(handle, "wb") as file:
        file.write(text)
        file.truncate(len(text))
        file.flush()
        os.fsync(file.fileno())


def _text(held: _Held) -> str:
    return json.dumps({"installation": held.id, "machine": held.machine}) + "\n"


def _parse(text: bytes) -> _Held | None:
    try:
        said = json.loads(text)
        held = _Held(said["installation"], said["machine"])
        known_form = _ID.fullmatch(held.id) and isinstance(held.machine, str)
    except (ValueError, LookupError, TypeError):
        return None
    return held if known_form else None


def _write(state: Path, held: _Held) -> None:
    """The file, whole or not at all, and on the disk: an ID that is lost makes its backups another's."""
    path = state / _NAME
    temporary = path.with_name(f".{_NAME}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(_text(held))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    folder = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    """Two first commands at once must not both make an ID."""
    require_file(state / _LOCK)
    handle = os.open(state / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
