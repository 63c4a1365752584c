"""A folder of another host, over ssh: rsync copies and lists, short scripts for that host's sh do the rest.

The scripts are one line each and keep to POSIX, with one exception that they look for: `sync` with file names, which
reports a disk's error where a bare one does not.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from backupcore.child import ChildStream
from backupcore.errors import BackupError, ConfigError
from backupcore.model import Artifact, Usage, new_id
from backupcore_rsync.layout import MARKER, MARKER_LIMIT, VM_FOLDERS, Token, begun, identity, part, rules
from backupcore_rsync.login import login
from backupcore_rsync.place import Upload, changed, expected
from backupcore_rsync.programs import Programs, patiently
from backupcore_rsync.target import HostTarget

if TYPE_CHECKING:
    from backupcore import Context
    from backupcore.child import Child
    from backupcore.model import BackupRun
    from backupcore_rsync.driver import Rsync

__all__ = ["Host"]

AT_ONCE = 500
"""Backups that one script removes: some 70 bytes each, and Linux takes 128 KiB in one argument of ssh's."""

ANSWERS = "backupcore answers"
HELLO = f'echo "{ANSWERS}"; '
"""What comes before it is the account's own: a message of the day, or that it takes no commands."""

_SSH_ITSELF = 255  # ssh's exit code for what it says itself; negative ones are signals

_ENTER = 'cd -- "$1" || { echo "$1: no such folder, or closed" >&2; exit 1; }; '

CHECK = (
    '[ -d "$1" ] || { echo "$1: no such folder" >&2; exit 1; }; '
    '[ -r "$1" ] && [ -w "$1" ] && [ -x "$1" ] || { echo "$1: permission denied" >&2; exit 1; }; '
    'command -v "$2" >/dev/null || { echo "$2: not found" >&2; exit 127; }; '
)
# Not by way of a link, nor of a FIFO. With $4 it is made first: by a link, which only the first can make.
IDENTITY = (
    _ENTER + 'if [ -n "$4" ] && [ ! -e "$2" ] && [ ! -L "$2" ]; then umask 077; '
    'echo "$4" > "./$2.$4" && { sync -- "./$2.$4" 2>/dev/null || sync; } || exit 1; '
    'ln -- "./$2.$4" "./$2" 2>/dev/null || [ -e "$2" ] || mv -n -- "./$2.$4" "./$2"; '
    'rm -f -- "./$2.$4"; sync -- . 2>/dev/null || sync; fi; '
    'if [ -L "$2" ] || { [ -e "$2" ] && [ ! -s "$2" ]; } || { [ -e "$2" ] && [ ! -f "$2" ]; }; then echo none; '
    'elif [ -e "$2" ]; then head -c "$3" -- "./$2"; fi'
)
# "still": nothing in it has changed for a day. A `find` that fails says nothing of that.
PARTS = _ENTER + (
    'for one in ./"$2"/.*.part; do [ ! -d "$one" ] || [ -L "$one" ] || { '
    'if young=$(find "$one" -mtime -1 2>/dev/null) && [ -z "$young" ]; then echo "still $one"; else echo "part $one"; '
    "fi; }; done"
)
SWEEP = _ENTER + 'vm=$2; shift 2; for one; do rm -rf -- "./$vm/$one" || exit 1; done'
# Twice: whoever removes the last backup of the VM takes the empty folder along.
BEGIN = (
    _ENTER + 'umask 077; mkdir -p -- "$2" && mkdir -- "$2/$3" 2>/dev/null || { mkdir -p -- "$2" && mkdir -- "$2/$3"; }'
)
PUBLISH = (
    _ENTER + 'cd -- "$2" && [ ! -e "$4" ] || { echo "$2: no such folder" >&2; exit 1; }; '
    # The size as ls shows it: a file that has shrunk or gone since it was copied is not published.
    'size() { set -- $(ls -ln -- "$1" 2>/dev/null); echo "$5"; }; vm=$2; part=$3; id=$4; shift 4; '
    'while [ $# -gt 1 ]; do [ "$(size "$part/$1")" = "$2" ] || { echo "differs: $1"; exit 0; }; shift 2; done; '
    'set -- . "$vm" "$part" "$id"; '
    # A sync that knows no arguments, or takes none, is told by its answer for the folder; it then syncs everything.
    'if sync -- "$3" 2>/dev/null; then sync -- "$3"/* "$3"/.labels/* "$3"/.labels "$3"; else sync; fi || exit 1; '
    'mv -- "$3" "$4" && { sync -- . .. 2>/dev/null || sync; }'
)
# Not by way of a link in the place of either folder.
REMOVE = (
    _ENTER + 'shift; for one; do [ ! -L "${one%/*}" ] || continue; '
    'if [ -d "$one" ] && [ ! -L "$one" ]; then '
    'rm -f -- "$one/manifest.json" || exit 1; rm -rf -- "$one" || exit 1; fi; '
    'rmdir -- "${one%/*}" 2>/dev/null; done; :'
)
ROOM = 'df -Pk -- "$1"'
READ = 'exec cat -- "$1"'


class Host:
    """A target on another host."""

    def __init__(self, options: Rsync, target: HostTarget) -> None:
        self.options = options
        self.target = target

    def programs(self, ctx: Context, *, patient: bool = True) -> Programs:
        """ssh and rsync by the one login of the run; where it is not `patient`, one that is refused is not repeated."""

        def connect() -> str:
            return patiently(lambda: login(self.options, self.target, ctx), ctx, pauses=None if patient else ())

        return Programs(self.options, ctx.once((Host, self.options), connect))

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.target.at}:{self.target.path.removeprefix('./')}"

    def _ask(
        self,
        script: str,
        what: str,
        ctx: Context,
        *arguments: str,
        limit: float | None = None,
        patient: bool = True,
    ) -> str:
        what = f"{what} {self.name}"
        programs = self.programs(ctx, patient=patient)

        def ask() -> bytes:
            child = programs.start_ssh(self.target, HELLO + script, self.target.path, *arguments)
            return programs.ask(
                child,
                what,
                ctx,
                limit=limit or self.options.timeout,
                judge=lambda code, answer: _no_clean_shell(code, answer, child.errors, what),
            )

        return patiently(ask, ctx, None if patient else ()).decode(errors="replace").partition(f"{ANSWERS}\n")[2]

    def check(self, ctx: Context) -> None:
        """The host takes the login and has rsync; the folder is there and can be written to."""
        self._ask(CHECK, "asking", ctx, self.options.rsync_path, patient=False)

    def ready(self, run: BackupRun, ctx: Context) -> None:
        """`check`, and remove what dead runs of this installation have left unfinished for this VM, in the end."""
        # shift: PARTS takes the VM where CHECK takes the program
        found = self._ask(CHECK + 'set -- "$1" "$3"; ' + PARTS, "asking", ctx, self.options.rsync_path, run.vm.uuid)
        if parts := [line.split(" ", 1) for line in found.splitlines() if line.startswith(("still ", "part "))]:
            ctx.on_touch(
                lambda: self._sweep({path.rpartition("/")[2]: how == "still" for how, path in parts}, run, ctx)
            )

    def _sweep(self, parts: dict[str, bool], run: BackupRun, ctx: Context) -> None:
        left = [
            name
            for name, still in parts.items()
            if (of_ours := begun(name, run)) and (of_ours.is_over if of_ours.life else still)
        ]
        if not left:
            return
        ctx.log.info("removing what a run that was killed has left in %s: %s", self.name, ", ".join(left))
        try:
            self._ask(SWEEP, "tidying up", ctx, run.vm.uuid, *left)
        except BackupError as error:
            ctx.check()
            ctx.log.warning("what a run that was killed has left stays in %s: %s", self.name, error)

    def identity(self, ctx: Context, *, make: bool) -> str | None:
        """With one login, which makes it as well."""
        found = self._ask(IDENTITY, "looking at", ctx, MARKER, str(MARKER_LIMIT), new_id() if make else "")
        return identity(found.encode(), self.name) if found else None

    def files(self, folders: Iterable[str] | None, ctx: Context, *, vm: str = "") -> dict[str, int]:
        """One listing by rsync."""
        folders = None if folders is None else list(folders)
        return self.programs(ctx).listing(self.target, rules(folders, vm), f"listing {self.name}", ctx)

    def holds_backups(self, ctx: Context) -> bool:
        """True if any VM has a folder there."""
        found = self.programs(ctx).listing(self.target, [f"+ /{VM_FOLDERS}/", "- *"], f"listing {self.name}", ctx)
        return any(Token.parse(f"{path.rstrip('/')}.{'0' * 32}") for path in found)

    def store(self, upload: Upload) -> None:
        """Into a hidden folder; all of it to that host's disk; then one rename."""
        token, target = upload.token, self.target
        hidden = part(token, upload.run)
        self._ask(BEGIN, "making a folder in", upload.ctx, token.vm, hidden)
        folder = f"{token.vm}/{hidden}"
        destination = f"{target.at}:{target.path}/{folder}/"
        upload.copy([f"{upload.view}/", str(upload.labels)], destination, ["--inplace"])
        upload.check(self.files([folder], upload.ctx), folder)
        # As long as it takes: all that was written may still lie in that host's memory.
        sizes = [str(word) for one in expected(upload.sizes, upload.run).items() for word in one]
        said = self._ask(PUBLISH, "publishing in", upload.ctx, token.vm, hidden, token.id, *sizes, limit=SYNC)
        if found := re.search(r"^differs: (.*)$", said, re.MULTILINE):
            raise changed(self.name, f"{found[1]} is not as it was")

    def abandon(self, token: Token, run: BackupRun, ctx: Context) -> None:
        """Remove the hidden folder, or the published one if only the last step failed."""
        self._ask(REMOVE, "tidying up", ctx, f"{token.vm}/{part(token, run)}", token.folder, limit=SYNC)

    def artifact(self, token: Token, name: str, size: int, ctx: Context) -> Artifact:
        """Streamed by a `cat` over there."""
        return HostArtifact(self, f"{token.folder}/{name}", size, ctx)

    def remove(self, tokens: Sequence[Token], ctx: Context) -> None:
        """Some hundred with one login."""
        for first in range(0, len(tokens), AT_ONCE):
            some = [token.folder for token in tokens[first : first + AT_ONCE]]
            self._ask(REMOVE, "deleting from", ctx, *some, limit=SYNC)

    def room(self, ctx: Context) -> Usage:
        """As that host's df says."""
        found = re.search(r"\s(\d+)\s+\d+\s+(-?\d+)\s+\d+%\s", self._ask(ROOM, "asking for room in", ctx))
        if not found:
            return Usage()
        return Usage(total=int(found[1]) << 10, free=max(0, int(found[2])) << 10)


SYNC = 3600.0
"""Seconds for another host to write out what it has taken, or to remove folders."""


class HostArtifact(Artifact):
    """A file of another host. It pickles without its context: opened elsewhere, its ssh ends with the stream."""

    seekable = False

    def __init__(self, at: Host, path: str, size: int, ctx: Context) -> None:
        self._at = at
        self._path = path
        self._ctx: Context | None = ctx
        self._programs = at.programs(ctx)
        self.name = path.rpartition("/")[2]
        self.size = size

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ctx": None}

    def open(self) -> BinaryIO:
        """The file from byte 0; an ssh that fails raises from the read that meets it."""
        programs = self._programs
        what = f"reading {self._path} in {self._at.name}"
        child = programs.start_ssh(self._at.target, READ, f"{self._at.target.path}/{self._path}")

        def failed(ended: Child, code: int) -> BackupError:
            return programs.failed(ended, code, what)

        limit = self._at.options.timeout
        return io.BufferedReader(ChildStream(child, self.size, what, failed, self._ctx, limit=limit), 1 << 20)


def _no_clean_shell(code: int, answer: bytes, errors: str, what: str) -> BackupError | None:
    """The error for an account that runs no commands, or whose shell says more than it is asked; None if it is well."""
    before, answers, _ = answer.decode(errors="replace").partition(f"{ANSWERS}\n")
    said = " ".join(before.split())[:200]
    if answers and said:
        return ConfigError(
            f"{what}: the account's shell prints something at its start: {said}",
            "rsync cannot work so: what its startup files (~/.bashrc and the like) print must go to terminals only.",
        )
    if not answers and 0 <= code < _SSH_ITSELF and (said or not errors.strip()):
        return ConfigError(
            f"{what}: the account runs no commands there (exit code {code}{f': {said}' if said else ''})",
            "It needs a shell, and rsync: an account for SFTP only (ForceCommand internal-sftp), or one whose shell is "
            "nologin, takes no backups.",
        )
    return None
