"""A module of an rsync daemon. It can take files, list them and drop them; it can neither rename nor stream.

So the manifest publishes: it is sent last, by a call of its own, when all the rest is there. And a file is fetched as a
whole before it is read.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, BinaryIO

from backupcore.errors import BackupError, ConfigError, IntegrityError, TargetFull
from backupcore.model import Artifact, Usage, new_id
from backupcore_rsync.layout import (
    LABELS,
    MANIFEST,
    MARKER,
    MARKER_LIMIT,
    OLD,
    VM_FOLDERS,
    Token,
    by_token,
    identity,
    mark,
    marked,
    rules,
)
from backupcore_rsync.place import Upload
from backupcore_rsync.programs import STALLED, Programs, patiently
from backupcore_rsync.target import DaemonTarget

if TYPE_CHECKING:
    from backupcore import Context
    from backupcore.model import BackupRun
    from backupcore_rsync.driver import Rsync

__all__ = ["Daemon"]

AT_ONCE = 200
"""Backups that one call removes: three filter rules each, on the command line."""


class Daemon:
    """A target at an rsync daemon."""

    def __init__(self, options: Rsync, target: DaemonTarget) -> None:
        self.options = options
        self.target = target
        self._programs = Programs(options)

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.target.name

    def _listing(self, wanted: Sequence[str], ctx: Context) -> dict[str, int]:
        return self._programs.listing(self.target, wanted, f"listing {self.name}", ctx)

    def _send(self, what: str, ctx: Context, folder: Path, *arguments: str) -> None:
        command = ["--recursive", *arguments, "--", f"{folder}/", f"{self.target.url}/"]

        def send() -> None:
            child = self._programs.start_rsync(self.target, command)
            self._programs.ask(child, f"{what} {self.name}", ctx, limit=STALLED)

        patiently(send, ctx)

    def check(self, ctx: Context) -> None:
        """The daemon takes the login and knows the path; it would take a file (asked by a copy of nothing, dry)."""
        self._listing(["- *"], ctx)
        self._send("asking", ctx, _fresh(ctx), "--dry-run")

    def ready(self, run: BackupRun, ctx: Context) -> None:
        """`check`, and remove what dead runs of this installation have left unfinished for this VM, in the end."""
        self.check(ctx)
        ctx.on_touch(lambda: self._sweep(run, ctx))

    def _sweep(self, run: BackupRun, ctx: Context) -> None:
        vm = run.vm.uuid
        names = [f"+ /{vm}/", f"+ /{vm}/*/", f"+ /{vm}/*/*", "- *"]
        try:
            found = self._programs.dated_listing(self.target, names, f"listing {self.name}", ctx)
            times = by_token({path: time for path, (_, time) in found.items() if not path.endswith("/")})
            left = [token for token, files in times.items() if _is_left(files, run)]
            if left:
                said = ", ".join(map(str, left))
                ctx.log.info("removing what a run that was killed has left in %s: %s", self.name, said)
                self.remove(left, ctx)
        except BackupError as error:  # as where the daemon deletes nothing
            ctx.check()
            ctx.log.warning("what a run that was killed has left stays in %s: %s", self.name, error)

    def identity(self, ctx: Context, *, make: bool) -> str | None:
        """A marker is fetched where a listing shows one. The first counts: none takes the place of one that is there.

        Two made in the same moment may cross, since a daemon knows no more than that; the first backup that is recorded
        finds the one that stayed.
        """
        found = self._listing([f"+ /{MARKER}", "- *"], ctx).get(MARKER)
        if found is None and make:
            tree = _fresh(ctx)
            (tree / MARKER).write_text(f"{new_id()}\n")
            self._send("marking", ctx, tree, "--chmod=D0700,F0600", "--ignore-existing")
            found = self._listing([f"+ /{MARKER}", "- *"], ctx).get(MARKER)
        if found is None:
            return None
        if not 0 < found <= MARKER_LIMIT:
            return identity(b"", self.name)
        with FetchedArtifact(self, MARKER, found, ctx).open() as file:
            return identity(file.read(MARKER_LIMIT), self.name)

    def files(self, folders: Iterable[str] | None, ctx: Context, *, vm: str = "") -> dict[str, int]:
        """One listing."""
        return self._listing(rules(None if folders is None else list(folders), vm), ctx)

    def holds_backups(self, ctx: Context) -> bool:
        """True if any VM has a folder there."""
        found = self._listing([f"+ /{VM_FOLDERS}/", "- *"], ctx)
        return any(Token.parse(f"{path.rstrip('/')}.{'0' * 32}") for path in found)

    def store(self, upload: Upload) -> None:
        """The folder with its mark and its labels; all artifacts but the manifest; the manifest."""
        token, ctx = upload.token, upload.ctx
        self._listing(["- *"], ctx)  # rsync would make the target itself
        tree = _fresh(ctx)
        folder = tree / token.folder
        shutil.copytree(upload.labels, folder / LABELS)
        (folder / mark(upload.run)).touch()
        durable = self._begin(tree, ctx)
        destination = f"{self.target.url}/{token.folder}/"
        upload.copy([f"{upload.view}/"], destination, [*durable, "--inplace", f"--exclude=/{MANIFEST}"])
        upload.check(self.files([token.folder], ctx), token.folder, but=MANIFEST)
        # Not in place: the daemon gives it its name once all of it is there.
        upload.copy([str(upload.view / MANIFEST)], destination, durable)
        upload.check(self.files([token.folder], ctx), token.folder)

    def _begin(self, tree: Path, ctx: Context) -> list[str]:
        """Make the folder, and find out whether both sides can be told to write to the disk before they say "done"."""
        closed = "--chmod=D0700,F0600"
        try:
            self._send("making a folder in", ctx, tree, closed, "--fsync")
        except ConfigError as error:
            if "fsync" not in error.message:
                raise
            ctx.log.warning(
                "this rsync or the daemon's is older than 3.2.4 and cannot be told to write to the disk (--fsync): "
                "a power cut over there may take a backup that has just been made"
            )
            self._send("making a folder in", ctx, tree, closed)
            return []
        return ["--fsync"]

    def abandon(self, token: Token, run: BackupRun, ctx: Context) -> None:
        """Remove what is there of it."""
        self.remove([token], ctx)

    def artifact(self, token: Token, name: str, size: int, ctx: Context) -> Artifact:
        """Fetched when it is opened."""
        return FetchedArtifact(self, f"{token.folder}/{name}", size, ctx)

    def remove(self, tokens: Sequence[Token], ctx: Context) -> None:
        """Have the daemon make the folders like an empty one: first of their manifests, then as a whole.

        What the rules do not name is not touched: rsync neither deletes what an exclude holds back, nor, by --existing,
        makes a folder that has gone already.
        """
        self._listing(["- *"], ctx)  # rsync would make the target itself
        for first in range(0, len(tokens), AT_ONCE):
            some = tokens[first : first + AT_ONCE]
            tree = _fresh(ctx)
            for token in some:
                (tree / token.folder).mkdir(parents=True)
            vms = [f"+ /{vm}/" for vm in dict.fromkeys(token.vm for token in some)]
            manifests = [rule for one in some for rule in (f"+ /{one.folder}/", f"+ /{one.folder}/{MANIFEST}")]
            self._delete([*vms, *manifests], tree, ctx)
            for token in some:
                (tree / token.folder).rmdir()
            self._delete([*vms, *(f"+ /{token.folder}/***" for token in some)], tree, ctx)

    def _delete(self, wanted: Sequence[str], tree: Path, ctx: Context) -> None:
        filters = [f"--filter={rule}" for rule in (*wanted, "- *")]
        self._send("deleting from", ctx, tree, "--existing", "--delete", "--force", *filters)

    def room(self, ctx: Context) -> Usage:
        """A daemon does not say."""
        return Usage()


class FetchedArtifact(Artifact):
    """A file at a daemon, fetched into the run's folder when it is opened and gone when it is closed."""

    seekable = False

    def __init__(self, at: Daemon, path: str, size: int, ctx: Context) -> None:
        self._at = at
        self._path = path
        self._ctx: Context | None = ctx
        self._folder = ctx.folder
        self.name = path.rpartition("/")[2]
        self.size = size

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ctx": None}

    def open(self) -> BinaryIO:
        """The file from byte 0, once all of it is here. TargetFull names the folder that it would not fit into."""
        free = shutil.disk_usage(self._folder).free
        if self.size > free:
            raise TargetFull(
                f"{self._folder}: {self.name} is fetched there before it is read, and needs {self.size} bytes; {free} "
                "are free",
                "Make room there, or restore from a folder or over ssh, which fetch nothing beforehand.",
            )
        programs = Programs(self._at.options)
        what = f"fetching {self._path} from {self._at.name}"
        folder = Path(mkdtemp(prefix="rsync-", dir=self._folder))
        try:
            arguments = ["--whole-file", "--inplace", f"--timeout={STALLED}"]
            source = f"{self._at.target.url}/{self._path}"
            command = [*arguments, "--", source, f"{folder}/"]
            patiently(
                lambda: programs.ask(
                    programs.start_rsync(self._at.target, command), what, self._ctx, still=self._at.options.timeout
                ),
                self._ctx,
            )
            try:
                handle = os.open(folder / self.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError as error:
                raise IntegrityError(f"{what}: it is no plain file", "Somebody has put it there: look.") from error
            return os.fdopen(handle, "rb", 1 << 20)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # an open file stays readable, and is gone with its last reader


def _is_left(files: Mapping[str, int], run: BackupRun) -> bool:
    """Whether a folder with these files (name -> time of its last change) is what a dead run of ours has left."""
    of_ours = next((found for name in files if (found := marked(name, run))), None)
    if of_ours is None or MANIFEST in files:
        return False
    return of_ours.is_over if of_ours.life else max(files.values()) < time.time() - OLD


def _fresh(ctx: Context) -> Path:
    return Path(mkdtemp(prefix="rsync-", dir=ctx.folder))
