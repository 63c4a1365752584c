"""A new repository, made once, though several first backups may begin in the same moment.

restic itself does not see to that. Two ``restic init`` at once both end well, and leave a repository that nobody can
open: each has saved a key and its own configuration, the later configuration stays, and the key of the other one, where
restic tries it first, reads as damage ("config or key … is damaged"; restic 0.14 and 0.18, nearly every time).

In a folder a repository is therefore prepared elsewhere and published: one rename of the folder of its key, which only
the first can do. Elsewhere restic has nothing that only one can do. There the processes of one host take turns; what
several hosts have made at once is found after a while, and the keys that fit nothing are removed before anybody stores
anything (`settle`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING
from uuid import uuid4

from backupcore.errors import (
    BackupError,
    Busy,
    Cancelled,
    IntegrityError,
    SourceNotFound,
    TargetUnavailable,
    from_os_error,
)
from backupcore_restic.failures import NoRepository
from backupcore_restic.place import STAGED, creatable, has_key
from backupcore_restic.repository import Repository

if TYPE_CHECKING:
    from backupcore import Context
    from backupcore_restic.driver import Restic

__all__ = ["create", "require_whole", "settle"]

UNDER_WAY = 30.0
"""Seconds for the creation of somebody else to come to its end, once its key is there: restic takes under one."""

SETTLING = 3.0
AS_LONG_AS_INIT = 2.0
"""Seconds, and so many times as long as the init itself took: by then another host's, begun before ours had ended, is
over."""

LOOK = 0.1
PAUSE = 1.0  # seconds between two looks that cost a restic


def create(options: Restic, ctx: Context) -> None:
    """Make the repository, unless somebody else makes it meanwhile, which is waited for."""
    repository = Repository(options)
    ctx.log.info("creating a restic repository in %s", repository.name)
    if repository.folder is not None:
        try:
            _in_folder(options, repository.folder, ctx)
        except OSError as error:
            raise from_os_error(error, f"creating a restic repository in {repository.name}") from error
    else:
        with _alone(repository, ctx, options.timeout + UNDER_WAY):
            _elsewhere(options, ctx)


def require_whole(folder: Path, ctx: Context, limit: float) -> None:
    """Wait for a creation that has saved its key to save the configuration, too; TargetUnavailable if it does not."""
    end = time.monotonic() + limit
    while has_key(folder) and not (folder / "config").is_file():
        if time.monotonic() > end:
            raise TargetUnavailable(
                f"{folder} holds part of a restic repository, a key without a configuration: its creation was"
                " interrupted",
                "Nothing was stored in it yet. Empty the folder, then run it again.",
            )
        ctx.wait(LOOK)


# In a folder


def _in_folder(options: Restic, folder: Path, ctx: Context) -> None:
    creatable(folder)
    if not has_key(folder):
        made = Path(mkdtemp(prefix="restic-", dir=ctx.folder), "repository")
        Repository(options, made=made).ask(["init"], "creating a restic repository in", ctx, limit=options.timeout)
        _publish(made, folder)
        shutil.rmtree(made.parent)
    require_whole(folder, ctx, UNDER_WAY)


def _publish(made: Path, folder: Path) -> None:
    """Have `folder` be the repository that lies in `made`, unless it is one already, or becomes one meanwhile."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    mark = uuid4().hex
    keys, config = (folder / f"{prefix}{mark}" for prefix in STAGED)
    try:
        for path in (path for path in sorted(made.rglob("*")) if path.is_dir() and path.name != "keys"):
            (folder / path.relative_to(made)).mkdir(mode=0o700, exist_ok=True)
        keys.mkdir(mode=0o700)
        for file in (made / "keys").iterdir():
            _copy(file, keys / file.name)
        _copy(made / "config", config)
        _sync(keys)
        if (folder / "config").exists():
            return
        try:
            keys.rename(folder / "keys")  # over no folder, or an empty one: never over that of somebody else
        except OSError:
            if has_key(folder):
                return
            raise
        try:
            config.rename(folder / "config")
        except OSError:
            shutil.rmtree(folder / "keys")
            raise
        _sync(folder / "data")
        _sync(folder)
    except FileNotFoundError:
        # The first one has removed what others had prepared, or the folder has gone.
        if not has_key(folder):
            raise
    finally:
        shutil.rmtree(keys, ignore_errors=True)
        config.unlink(missing_ok=True)
    for left in folder.iterdir():  # of others, who come too late, or were killed
        if left.name.startswith(STAGED):
            shutil.rmtree(left, ignore_errors=True)
            with suppress(OSError):
                left.unlink()


def _copy(source: Path, target: Path) -> None:
    shutil.copy2(source, target)  # with its mode: by that of config restic goes for all it writes later
    _sync(target)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # not every file system syncs a folder; restic itself takes no notice either
            os.fsync(handle)
    finally:
        os.close(handle)


# Elsewhere


@contextmanager
def _alone(repository: Repository, ctx: Context, limit: float) -> Iterator[None]:
    """One process of this host at a time, told by a name that the kernel gives back when its holder ends (unix(7))."""
    name = b"\0backupcore-restic-" + hashlib.sha256(repository.name.encode()).hexdigest()[:32].encode()
    end = time.monotonic() + limit
    with socket.socket(socket.AF_UNIX) as turn:
        while True:
            try:
                turn.bind(name)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            if time.monotonic() > end:
                raise Busy(f"another process of this host has been creating {repository.name} for {limit:.0f} s")
            ctx.wait(LOOK)
        yield


def _elsewhere(options: Restic, ctx: Context) -> None:
    repository, limit = Repository(options), options.timeout
    began = time.monotonic()
    try:
        repository.identity(ctx, limit)
    except NoRepository:
        pass
    except IntegrityError:  # two hosts are at it
        settle(options, ctx)
        return
    else:
        return  # another process of this host has just made it
    try:
        repository.ask(["init"], "creating a restic repository in", ctx, limit=limit)
    except Cancelled:
        raise
    except BackupError as error:
        # Whatever it says: another host's may be there, or on its way. A server that keeps the first configuration
        # (restic's own rest-server) has our key all the same.
        _until_there(repository, ctx, limit, error)
    else:
        ctx.wait(SETTLING + AS_LONG_AS_INIT * (time.monotonic() - began))
    settle(options, ctx)


def _until_there(repository: Repository, ctx: Context, limit: float, failed: BackupError) -> None:
    end = time.monotonic() + min(limit, UNDER_WAY)
    while True:
        try:
            repository.identity(ctx, limit)
        except NoRepository:
            if time.monotonic() > end:
                hint = "What is left of a repository whose creation was interrupted can be removed."
                raise TargetUnavailable(failed.message, failed.hint or hint) from failed
            ctx.wait(PAUSE)
        except IntegrityError:
            return
        else:
            return


def settle(options: Restic, ctx: Context) -> None:
    """Remove the keys that do not fit the configuration of a repository that several hosts have just created.

    A key is removed only if the repository's password opens it and the configuration is none of its own, and only from
    a repository that holds nothing yet.
    """
    limit = options.timeout
    repository = Repository(options, key=_fitting(options, ctx))
    strays = [key for key in repository.keys(ctx, limit) if not _fits(options, key, ctx)]
    if not strays:
        return
    if repository.ids(ctx, limit):
        raise IntegrityError(
            f"{repository.name} was created by several hosts at once, and one of them has stored a backup since",
            f"Remove the keys that fit nothing ({', '.join(strays)}; restic key remove), then look: restic check.",
        )
    for key in strays:
        ctx.log.info("several hosts have created %s at once: removing key %s, which fits nothing", repository.name, key)
        with suppress(TargetUnavailable, SourceNotFound):  # another host has just done it: see whether it opens now
            repository.remove_key(key, ctx, limit)
    Repository(options).identity(ctx, limit)


def _fits(options: Restic, key: str, ctx: Context) -> bool:
    try:
        Repository(options, key=key).identity(ctx, options.timeout)
    except IntegrityError:
        return False
    return True


def _fitting(options: Restic, ctx: Context) -> str:
    """The beginning of a key that opens the repository; "" if it needs none. IntegrityError if none does.

    restic lists keys only once it has opened the repository, but takes the beginning of a name for one.
    """
    try:
        Repository(options).identity(ctx, options.timeout)
    except IntegrityError as error:
        failed = error
    else:
        return ""
    # The key that it names fits nothing: one that begins alike needs two digits to be told from it.
    named = re.search(r"\bkey ([0-9a-f])[0-9a-f]{63}\b", failed.message)
    digits = "0123456789abcdef"
    keys: list[str] = [*digits, *(named[1] + digit for digit in digits if named)]
    for key in keys:
        if _fits(options, key, ctx):
            return key
    raise failed
