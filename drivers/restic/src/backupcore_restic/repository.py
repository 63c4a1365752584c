"""The command lines: what this driver asks of restic, and the environment that restic runs in."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from logging import Logger
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from backupcore.child import Child
from backupcore.errors import (
    AccessDenied,
    BackupError,
    Busy,
    ConfigError,
    IntegrityError,
    Locked,
    SourceNotFound,
    TargetUnavailable,
    from_os_error,
)
from backupcore.small_file import NotAFile, read_small
from backupcore_restic.failures import last_words, redact, refuses_to_delete, translate

if TYPE_CHECKING:
    from backupcore import Context
    from backupcore_restic.driver import Restic

__all__ = ["Repository", "TooLate", "is_id", "is_unknown_place"]

T = TypeVar("T")

ANSWER = 256 << 20
"""Bytes that restic may answer with: a listing of some 400,000 snapshots."""

PAUSE = 5.0
"""Seconds between two looks at a repository that somebody has locked."""

GARBAGE = "50"
"""GOGC. A mount keeps 64 MiB of blobs, and each read leaves 128 KiB of garbage beside them: reading 2 GiB it grows to
220 MiB with Go's own 100, to 180 in a twentieth more time with 50, to 160 with 20, in a third more.
"""

INDEX = 16
"""Bytes for each byte of the index in the repository: restic 0.14 takes up to 8, twice that while it reads it anew."""

MEMORY = 2 << 30
"""Bytes that must be free in memory for restic's packs to go there."""

CONFIG = 1 << 20
"""Bytes of a configuration that are looked at; it has some 150."""

CLEAN_UP = 60.0
"""Seconds for all that is tidied up after a failure."""

_WORDS = 20
"""Lines before an answer that may be a wrapper's."""

_LISTEN = 0.5  # seconds between two looks at what restic complains of

OPENING = "opening the restic repository"

# A program's own surroundings, and how this host reaches others. Everything else comes from the options: a RESTIC_*
# variable of the user's shell must not send a backup elsewhere.
_INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "XDG_CACHE_HOME", "SSH_AUTH_SOCK", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
)
_OWNED = ("RESTIC_REPOSITORY", "RESTIC_REPOSITORY_FILE")
_OWNED_PREFIX = "RESTIC_PASSWORD"
_SCHEME = re.compile(r"(s3|sftp|rest|b2|azure|gs|swift|rclone):")
_ID = re.compile(r"[0-9a-f]{64}")


class TooLate(TargetUnavailable):
    """restic was given up because it had no answer in time."""


def in_memory(folder: Path = Path("/dev/shm")) -> Path | None:  # noqa: S108 - restic unlinks its files there at once
    """A folder in memory for the packs that restic is filling, if there is one with room for them.

    restic 0.14 writes every pack to $TMPDIR before it copies it to the repository, so on a disk a backup would write
    all its bytes twice. Some ten packs are there at a time (16 MiB each, 128 MiB at most).
    """
    try:
        room = os.statvfs(folder)
    except OSError:
        return None
    fits = room.f_bavail * room.f_frsize >= MEMORY and os.access(folder, os.W_OK | os.X_OK)
    return folder if fits and folder.is_mount() else None


def is_id(token: str) -> bool:
    """True for the full ID of a snapshot; restic would take ``latest`` and prefixes as well."""
    return _ID.fullmatch(token) is not None


def is_unknown_place(repository: str) -> bool:
    """True for what looks like another host's, and which restic takes for a folder here: ``nas:/backups``, a bare URL.

    The first backup would make a repository in the current folder, of the one disk that it should not be on.
    """
    return ":" in repository and not (
        _SCHEME.match(repository) or repository.startswith(("/", "./", "../", "~", "local:"))
    )


class Repository:
    """One restic repository, as the driver's options describe it. Holds nothing open; pickles as its options."""

    def __init__(self, options: Restic, *, made: Path | None = None, key: str = "") -> None:
        """`made`: the folder in which it is prepared; its place is its name only. `key`: the one to try first."""
        self._options = options
        self._made = made
        self._key = key

    @property
    def folder(self) -> Path | None:
        """Where the repository lies, if it is a folder of this host."""
        place = self._options.repository
        if _SCHEME.match(place):
            return None
        return Path(place.removeprefix("local:")).expanduser().absolute()

    @property
    def name(self) -> str:
        """How messages call it: no password in it."""
        return redact(str(self.folder or self._options.repository))

    def environment(self) -> tuple[dict[str, str], list[str]]:
        """What restic finds in its environment, and the values in it that no message may show."""
        options = self._options
        result = {key: os.environ[key] for key in _INHERITED if key in os.environ}
        result.setdefault("PATH", os.defpath)
        if "TMPDIR" not in result and (temporary := in_memory()) is not None:
            result["TMPDIR"] = str(temporary)
        if "HOME" not in result:  # cron and systemd may set none: restic would find no cache, ssh no keys
            result["HOME"] = pwd.getpwuid(os.getuid()).pw_dir
        extra = _read_environment(options.environment_file) if options.environment_file else {}
        result |= extra
        # The working folder is the view's, so paths must be absolute.
        result["RESTIC_REPOSITORY"] = str(self._made or self.folder or options.repository)
        if self._key:
            result["RESTIC_KEY_HINT"] = self._key
        if options.password_file:
            _require_password(options.password_file)
            result["RESTIC_PASSWORD_FILE"] = str(options.password_file.expanduser().absolute())
        else:
            result["RESTIC_PASSWORD_COMMAND"] = options.password_command
        # As variables, since a restic that is too old for one ignores it where a flag would be an error.
        result["RESTIC_COMPRESSION"] = options.compression
        if options.pack_size:
            result["RESTIC_PACK_SIZE"] = str(options.pack_size)
        if options.read_concurrency:
            result["RESTIC_READ_CONCURRENCY"] = str(options.read_concurrency)
        if options.cache and options.cache != "off":
            result["RESTIC_CACHE_DIR"] = str(Path(options.cache).expanduser().absolute())
        result["RESTIC_PROGRESS_FPS"] = "4"  # 60 lines a second are the default, each with the names of all files
        return result, [value for value in extra.values() if len(value) >= 6]

    def sparing(self, kept: int) -> dict[str, str]:
        """Go's settings for a restic that shall take little more than the `kept` bytes it needs, and its index.

        GOGC alone lets blobs of 8 MiB tear holes into its memory, which go back to the kernel late. But a limit below
        what restic needs keeps Go at nothing but collecting. What that costs goes by the index, since blobs hold no
        pointers; so the limit grows with it, and where the size of the index is not known, there is none.
        """
        result = {"GOGC": GARBAGE}
        if self.folder is not None:
            try:
                with os.scandir(self.folder / "index") as files:
                    index = sum(file.stat().st_size for file in files)
            except OSError:
                return result  # restic says what is wrong
            result["GOMEMLIMIT"] = str(kept + INDEX * index)
        return result

    def start(self, arguments: Sequence[str], folder: Path | None = None, **more: str) -> Child:
        """restic with these arguments, running in `folder`.

        `more` are variables that belong together: the user's own environment for restic has none of them, or they go.
        """
        options = self._options
        environment = self.environment()[0]
        if not more.keys() & environment.keys():
            environment |= more
        command: list[str] = []
        if options.limit_upload:
            command.append(f"--limit-upload={options.limit_upload}")
        if options.limit_download:
            command.append(f"--limit-download={options.limit_download}")
        if options.cache == "off":
            command.append("--no-cache")
        command += [f"--option={one}" for one in options.restic_options]
        return Child(_program(options.binary, environment["PATH"]), [*command, *arguments], environment, folder)

    def failed(self, child: Child, code: int, what: str) -> BackupError:
        """The error for a child that ended with `code`."""
        secrets = self.environment()[1]
        if child.late and self.waits_for_password(child):
            return self.no_password(what)
        if child.late:
            return TooLate(
                f"{what}: {last_words(child.errors, secrets)} (given up: no answer in time)",
                "Is it up, and reachable from here?",
            )
        return translate(code, child.errors, what, secrets)

    def waits_for_password(self, child: Child) -> bool:
        """Whether a restic that was given up was waiting for the command that prints its password."""
        command = self._options.password_command
        started = {name for name in child.late_for if not name.startswith("fusermount")}
        if not command or not started:
            return False
        if self._options.repository.startswith(("sftp:", "rclone:")):  # those start a program as well
            return _program_of(command)[:15] in started  # the kernel keeps 15 letters
        return True

    def no_password(self, what: str) -> TargetUnavailable:
        """The error for a password that did not come; the command's arguments may hold a secret, its name does not."""
        program = _program_of(self._options.password_command)
        return TooLate(
            f"{what}: the command {program} of the option password_command has not given the repository's password, "
            "and was ended",
            "Run it by hand: does it wait for somebody, as for a vault that is locked?",
        )

    def ask(
        self,
        arguments: Sequence[str],
        what: str,
        ctx: Context | None = None,
        *,
        limit: float | None = None,
        still: float | None = None,
        refused: Callable[[str], bool] = lambda said: False,
    ) -> bytes:
        """Run restic to its end and return what it wrote to stdout. `ctx` cancels it, `limit` is in seconds.

        Without a limit it may take as long as it moves bytes: `still` are the seconds that it may stand still, the
        option timeout if None. Once `refused` says of a line of its stderr that trying again is in vain, it is ended.
        """
        what = f"{what} {self.name}"
        with (
            self.start(arguments) as child,
            ctx.on_cancel(child.stop) if ctx else nullcontext(),
            _heard(child, refused),
        ):
            if limit:
                child.within(limit)
            else:
                child.while_moving(still or self._options.timeout)
            answer = bytearray()
            while block := child.output.read(1 << 20):
                answer += block
                if len(answer) > ANSWER:
                    raise IntegrityError(f"{what}: the answer is longer than {ANSWER} bytes")
            code = child.wait()
            if ctx:
                ctx.check()
            if code:
                raise self.failed(child, code, what)
            return bytes(answer)

    def write(
        self,
        arguments: Sequence[str],
        what: str,
        ctx: Context | None = None,
        *,
        limit: float | None = None,
        still: float | None = None,
        refused: Callable[[str], bool] = lambda said: False,
    ) -> bytes:
        """`ask` for a command that takes a lock: see `locking`."""
        return self.locking(lambda: self.ask(arguments, what, ctx, limit=limit, still=still, refused=refused), ctx)

    def locking(self, work: Callable[[], T], ctx: Context | None) -> T:
        """`work`, once more when dead locks are gone, and for `lock_wait` seconds again while somebody holds one.

        ``restic unlock`` removes what restic itself knows to be dead: a lock of a process of this host that is gone, or
        one that nobody has refreshed for half an hour. Without it a killed forget would stop every later backup.
        Without `ctx` nobody could end the waiting, and there is none.
        """
        end = time.monotonic() + self._options.lock_wait
        try:
            return work()
        except Busy:
            self.unlock(ctx, self._options.timeout)
        waited = False
        while True:
            try:
                return work()
            except Busy as error:
                if ctx is None or time.monotonic() >= end:
                    raise
                if not waited:
                    ctx.log.info("waiting for at most %d s: %s", self._options.lock_wait, error)
                waited = True
                ctx.wait(min(PAUSE, max(0.0, end - time.monotonic())))
                self.unlock(ctx, self._options.timeout)

    def unlock(self, ctx: Context | None, limit: float | None = None) -> None:
        """Remove the locks of the dead, as restic tells them."""
        self.ask(["unlock"], "removing stale locks from", ctx, limit=limit)

    def ids(self, ctx: Context, limit: float) -> set[str]:
        """The IDs of all snapshots. Takes a lock, so that a target that takes no writes is noticed."""
        self.require_writable()
        listed = self.write(["list", "snapshots"], OPENING, ctx, limit=limit)
        return {line for line in listed.decode(errors="replace").split() if is_id(line)}

    def opening(self, ctx: Context, limit: float) -> Callable[[], str]:
        """Begin to ask for the repository's configuration, for which the password is needed.

        What is returned waits for the answer, and returns or raises what `identity` would.
        """
        child = self.start(["--no-lock", "cat", "config"])
        ctx.stack.enter_context(child)
        child.within(limit)

        def wait() -> str:
            answer = bytearray()
            with ctx.on_cancel(child.stop):
                while len(answer) < CONFIG and (block := child.output.read(CONFIG)):
                    answer += block
                code = child.wait()
            ctx.check()
            if code:
                raise self.failed(child, code, f"{OPENING} {self.name}")
            return _id_of(bytes(answer))

        return wait

    def identity(self, ctx: Context, limit: float) -> str:
        """The repository's ID, from its configuration, for which the password is needed."""
        return _id_of(self.ask(["--no-lock", "cat", "config"], OPENING, ctx, limit=limit))

    def config_digest(self) -> str:
        """A digest of the configuration as it lies in the repository's folder; "" if there is none, or no folder."""
        if self.folder is None:
            return ""
        try:
            with (self.folder / "config").open("rb") as file:
                return hashlib.sha256(file.read(CONFIG)).hexdigest()[:32]
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            raise from_os_error(error, f"{OPENING} {self.name}") from error

    def keys(self, ctx: Context, limit: float) -> list[str]:
        """The IDs of its keys, or their beginnings, as restic shows them."""
        found = _json(self.ask(["--no-lock", "key", "list", "--json"], OPENING, ctx, limit=limit))
        return [str(one["id"]) for one in found if isinstance(one, dict) and one.get("id")]

    def remove_key(self, key: str, ctx: Context, limit: float) -> None:
        """Remove a key."""
        self.write(["key", "remove", key], "removing a key from", ctx, limit=limit)

    def ids_in_folder(self) -> set[str] | None:
        """The same, read from the folder without the password or a lock; None if it is no folder of this host.

        One file for each snapshot, named by its ID (restic's doc/design.rst, "Repository Layout").
        """
        if self.folder is None or not (self.folder / "config").is_file():
            return None
        try:
            return {path.name for path in (self.folder / "snapshots").iterdir() if is_id(path.name)}
        except OSError:
            return None  # restic says what is wrong

    def require_writable(self) -> None:
        """AccessDenied where the repository's folder takes no lock."""
        locks = self.folder / "locks" if self.folder else None
        if locks and locks.is_dir() and not os.access(locks, os.W_OK):
            # restic 0.14 tries for 45 s before it gives up on this
            raise AccessDenied(
                f"{self.name} cannot be written to", "Check its owner, and whether it is mounted read-only."
            )

    def snapshots(self, tag: str, ctx: Context | None, limit: float | None = None) -> list[dict[str, Any]]:
        """The snapshots with this tag, as restic describes them."""
        arguments = ["--no-lock", "snapshots", "--json", f"--tag={tag}"]
        listed = _json(self._ask_again(arguments, "listing the snapshots of", ctx, limit))
        return [one for one in listed if isinstance(one, dict) and is_id(str(one.get("id")))]

    def holding(self, name: str, tag: str, ctx: Context) -> set[str]:
        """The IDs of the snapshots with this tag that have a file of this name at their root."""
        arguments = ["--no-lock", "find", "--json", f"--tag={tag}", name]
        found = set()
        for hit in _json(self._ask_again(arguments, "searching the snapshots of", ctx)):
            if any(match.get("path") == f"/{name}" and match.get("type") == "file" for match in hit["matches"]):
                found.add(str(hit["snapshot"]))
        return found

    def _ask_again(self, arguments: Sequence[str], what: str, ctx: Context | None, limit: float | None = None) -> bytes:
        """`ask` for what goes through all snapshots. In 0.18 one that is forgotten meanwhile ends it."""
        for _ in range(2):
            with suppress(SourceNotFound):
                return self.ask(arguments, what, ctx, limit=limit)
        return self.ask(arguments, what, ctx, limit=limit)

    def files(self, snapshot: str, ctx: Context) -> dict[str, int] | None:
        """Name -> size of the plain files at a snapshot's root; None if there is no such snapshot."""
        try:
            answer = self.ask(["--no-lock", "ls", "--json", snapshot], f"reading snapshot {snapshot[:8]} of", ctx)
        except TooLate:
            raise
        except BackupError:
            # 0.14 says that of one that is gone and ends well; 0.18 fails with its backend's words, which are many.
            if self.lacks(snapshot, ctx):
                return None
            raise
        there, files = False, {}
        for line in answer.splitlines():
            if not line.startswith(b"{"):  # a wrapper's word
                continue
            node = _json(line, dict)
            kind = node.get("struct_type") or node.get("message_type")
            if kind == "snapshot":
                there = node.get("id") == snapshot
            elif kind == "node" and node.get("type") == "file" and node.get("path") == f"/{node.get('name')}":
                files[str(node["name"])] = int(node.get("size", 0))  # left out where it is 0
        return files if there else None

    def lacks(self, snapshot: str, ctx: Context | None) -> bool:
        """Whether the repository answers, and lists no such snapshot."""
        try:
            listed = self.ask(["--no-lock", "list", "snapshots"], OPENING, ctx, limit=self._options.timeout)
        except BackupError:
            return False
        return snapshot not in listed.decode(errors="replace").split()

    def stored(self, ctx: Context, limit: float) -> int | None:
        """Bytes in the repository that snapshots use; None if restic does not come to a result in time."""
        arguments = ["--no-lock", "stats", "--mode=raw-data", "--json"]
        try:
            found = _json(self.ask(arguments, "asking for the size of", ctx, limit=limit), dict)
        except TooLate:
            return None
        size = found.get("total_size")
        return size if isinstance(size, int) else None

    def forget(self, snapshots: Iterable[str], ctx: Context | None, limit: float | None = None) -> None:
        """Remove these snapshots; the space comes back with the next prune."""
        wanted = list(snapshots)
        for first in range(0, len(wanted), 1000):  # 64 bytes each; Linux takes 2 MiB of arguments
            arguments = ["forget", *wanted[first : first + 1000]]
            try:
                self.write(arguments, "deleting from", ctx, limit=limit, refused=refuses_to_delete)
            except AccessDenied as error:
                if not refuses_to_delete(error.message):
                    raise
                raise Locked(
                    error.message,
                    "Nothing was deleted. If the repository is append-only as you want it, retention waits; else check "
                    "what its server, or these credentials, may delete.",
                ) from error

    def drop(self, tag: str, log: Logger) -> None:
        """Forget whatever a failed backup has left under its tag, in `CLEAN_UP` seconds at most.

        Never raises: the first error counts.
        """
        end = time.monotonic() + CLEAN_UP
        try:
            left = [one["id"] for one in self.snapshots(tag, None, min(CLEAN_UP, self._options.timeout))]
            if left:
                forget = ["forget", *left]
                try:
                    self.ask(forget, "tidying up in", limit=_until(end), refused=refuses_to_delete)
                except Busy:
                    self.unlock(None, _until(end))
                    self.ask(forget, "tidying up in", limit=_until(end))
        except BackupError as error:
            log.warning(
                "a snapshot of the failed backup may be left in %s; nothing lists or restores it unless it is complete."
                " restic snapshots --tag %s shows it, restic forget removes it: %s",
                self.name,
                tag,
                error,
            )
        else:
            log.info("what the failed backup has stored in %s goes with the next prune (datastore maintain)", self.name)

    def full_id(self, short: str, tag: str, ctx: Context) -> str | None:
        """The full ID of the snapshot that restic has just named; 0.14 tells its first 8 digits only."""
        if is_id(short):
            return short
        # Half a second of key derivation is spared where the folder can be looked at (its layout is documented).
        names = list((self.folder / "snapshots").glob(f"{short}*")) if self.folder and short.isalnum() else []
        found = [path.name for path in names] or [one["id"] for one in self.snapshots(tag, ctx)]
        found = [one for one in found if is_id(one) and one.startswith(short)]
        return found[0] if len(found) == 1 else None


@contextmanager
def _heard(child: Child, refused: Callable[[str], bool]) -> Iterator[None]:
    """End a restic that tries again and again what was refused for good: it would do so for minutes."""
    ended = threading.Event()

    def listen() -> None:
        while not ended.wait(_LISTEN):
            if any(refused(line) for line in child.errors.splitlines()):
                child.stop()
                return

    thread = threading.Thread(target=listen, name="restic-heard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _program_of(command: str) -> str:
    try:
        return Path(shlex.split(command)[0]).name
    except (ValueError, IndexError):
        return ""


def _id_of(config: bytes) -> str:
    found = str(_json(config, dict).get("id", ""))
    if not is_id(found):
        raise IntegrityError("the restic repository's configuration has no ID")
    return found


def _until(end: float) -> float:
    return max(1.0, end - time.monotonic())


def _program(name: str, path: str) -> Any:
    import sh  # noqa: PLC0415 - 0.05 s that only those pay who start a program

    try:
        return sh.Command(name, search_paths=path.split(os.pathsep))
    except sh.CommandNotFound:
        raise ConfigError(
            f"the program {name} is not installed, or not executable",
            "Install it (Debian, Ubuntu: apt-get install restic), or name it by the option binary.",
        ) from None


def _json(text: bytes, kind: type[Any] = list) -> Any:
    """The JSON document in an answer. A wrapper around restic may have said something in the lines before it."""
    rest = text or b"null"
    for _ in range(_WORDS):
        try:
            value = json.loads(rest)
            break
        except ValueError:
            _, _, rest = rest.partition(b"\n")
    else:
        said = " ".join(text[:1000].decode(errors="replace").split())
        raise IntegrityError(
            f"restic's answer is no JSON: {redact(said):.80}", "Is the option binary a wrapper that prints something?"
        )
    if value is None:  # an empty list, as Go writes it
        return kind()
    if not isinstance(value, kind):
        raise IntegrityError(f"restic's answer is no {kind.__name__}")
    return value


def _require_password(path: Path) -> None:
    """ConfigError where restic would wait for the password, read it without end, or not take it."""
    try:
        empty = not read_small(path.expanduser()).strip()
    except NotAFile as error:
        raise ConfigError(f"the password file {path}: {error.strerror}", "Name a file with the password.") from None
    except OSError:
        return  # restic says what is wrong with it
    if empty:
        raise ConfigError(f"the password file {path} is empty", "Write the repository's password into it.")


def _read_environment(path: Path) -> dict[str, str]:
    """KEY=VALUE lines; empty lines, comments, a leading ``export`` and quotes around a value are allowed."""
    try:
        text = read_small(path.expanduser()).decode()
    except (NotAFile, UnicodeDecodeError) as error:
        raise ConfigError(f"the environment file {path}: {getattr(error, 'strerror', 'it is no text')}") from None
    except OSError as error:
        raise from_os_error(error, "the environment file of the datastore") from error
    result = {}
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip().removeprefix("export ").strip()
        if not stripped or stripped.startswith("#"):
            continue
        key, mark, value = stripped.partition("=")
        if not mark or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise ConfigError(f"{path}, line {number}: not KEY=VALUE")
        if key in _OWNED or key.startswith(_OWNED_PREFIX):
            raise ConfigError(f"{path}, line {number}: {key} is set by the options of the datastore")
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        result[key] = value
    return result
