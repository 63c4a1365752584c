"""The driver: the hooks of `backupcore.hookspecs`, on plain files that rsync copies."""

from __future__ import annotations

import shlex
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

from backupcore import Context, driver, hookimpl, option
from backupcore.child import Child
from backupcore.errors import (
    BackupError,
    Cancelled,
    ConfigError,
    IncrementImpossible,
    SourceNotFound,
    TargetUnavailable,
)
from backupcore.model import Artifact, BackupRun, Listed, SourceRef, Stored, Usage
from backupcore_rsync import layout
from backupcore_rsync.daemon import Daemon
from backupcore_rsync.folder import Folder
from backupcore_rsync.host import Host
from backupcore_rsync.layout import MANIFEST, Token
from backupcore_rsync.place import Place, Upload
from backupcore_rsync.programs import STALLED, Programs, patiently
from backupcore_rsync.target import DaemonTarget, FolderTarget, HostTarget, Target, parse

__all__ = ["Rsync"]

CLEAN_UP = 60.0
"""Seconds for what is tidied up after a failure."""


@driver
class Rsync:
    """Backups as folders of plain files. The source is the VM's UUID and the folder's name."""

    target: str = option("/a/folder, user@host:path over ssh, or rsync://user@host/module/path")
    ssh: str = option("the ssh command, with further options of your own", default="ssh")
    port: int = option("the port of ssh; 0: ssh's own choice", default=0)
    identity_file: Path | None = option("the private key for ssh", default=None)
    known_hosts_file: Path | None = option("the only file whose host keys count; none: ssh's own", default=None)
    password_file: Path | None = option("a file with the password for an rsync daemon", default=None)
    rsync_arguments: tuple[str, ...] = option("further arguments for the rsync that copies", default=())
    limit_upload: int = option("KiB/s to the target at most; 0: no limit", default=0)
    binary: str = option("the rsync program", default="rsync")
    rsync_path: str = option("the rsync program on the other host", default="rsync")
    timeout: int = option("seconds within which the target must answer", default=120)

    def __post_init__(self) -> None:
        wrong = []
        target: Target | None = None
        try:
            target = parse(self.target)
        except ConfigError as error:
            wrong.append(error.message)
        try:
            words = shlex.split(self.ssh)
        except ValueError:
            words = []
        if not words:
            wrong.append("ssh: must be a command, with its quotes closed")
        if not self.binary or not self.rsync_path or self.timeout < 1:
            wrong.append("binary and rsync_path must not be empty, and timeout be at least 1")
        if not 0 <= self.port <= 65535 or self.limit_upload < 0:
            wrong.append("port: 0 to 65535; limit_upload: must not be negative")
        for_ssh = self.port or self.identity_file or self.known_hosts_file
        if for_ssh and isinstance(target, FolderTarget | DaemonTarget):
            wrong.append("port, identity_file and known_hosts_file are for a target user@host:path")
        if self.password_file and isinstance(target, FolderTarget | HostTarget):
            wrong.append("password_file is for a target rsync://")
        if wrong:
            raise ConfigError("rsync: " + "; ".join(wrong))

    def _place(self) -> Place:
        target = parse(self.target)
        if isinstance(target, FolderTarget):
            return Folder(target.path)
        return Host(self, target) if isinstance(target, HostTarget) else Daemon(self, target)

    @hookimpl
    def prebackup(self, run: BackupRun, ctx: Context) -> None:
        """The target answers and takes writes, and what the run builds on is there."""
        self._warn(ctx)
        place = self._place()
        place.ready(run, ctx)
        tokens = [Token.parse(source.token) for source in run.builds_on]
        there = place.files([token.folder for token in tokens if token], ctx) if run.builds_on else {}
        for source, token in zip(run.builds_on, tokens, strict=True):
            if token and f"{token.folder}/{MANIFEST}" in there:
                continue
            if not place.holds_backups(ctx):  # a full here would hide that all earlier backups are gone
                raise TargetUnavailable(
                    f"{place.name} holds no backups at all",
                    "Earlier ones were kept there. Is it mounted? Was it moved?",
                )
            raise IncrementImpossible(f"{source.token:.100}, which it builds on, is no longer in {place.name}")

    @hookimpl
    def backup(self, artifacts: Sequence[Artifact], run: BackupRun, ctx: Context) -> Stored:
        """Plain files in a folder that is published at the end."""
        place, token = self._place(), Token.new(run)
        if isinstance(place, Folder) and not self._transfer_arguments():
            with self._all_or_nothing(place, token, run, ctx):
                place.write(artifacts, token, run, ctx)
        else:
            self._by_rsync(place, artifacts, token, run, ctx)
        return Stored(source=SourceRef(str(token)), stored=sum(artifact.size for artifact in artifacts))

    def _by_rsync(
        self, place: Place, artifacts: Sequence[Artifact], token: Token, run: BackupRun, ctx: Context
    ) -> None:
        """One rsync, or two, of a folder in which the artifacts are ordinary files."""
        from backupcore.disk.fileview import show  # noqa: PLC0415 - FUSE and hashing, which only a backup needs

        what = f"backing up to {place.name}"
        running: list[Child] = []
        copied = [0]

        def give_up(error: BackupError) -> None:
            for child in running:
                child.stop()

        with ExitStack() as shown:
            labels = Path(mkdtemp(prefix="rsync-", dir=ctx.folder), layout.LABELS)
            labels.mkdir()
            for name in layout.label_names(run):
                (labels / name).touch()
            view = shown.enter_context(show(artifacts, ctx.folder, log=ctx.log, on_failure=give_up))

            def copy(sources: Sequence[str], destination: str, arguments: Sequence[str]) -> None:
                command = [
                    *("--recursive", "--whole-file", "--chmod=D0700,F0600"),
                    *("--info=progress2", "--no-human-readable", "--outbuf=L"),
                    *arguments,
                    *self._transfer_arguments(),
                ]
                programs = place.programs(ctx) if isinstance(place, Host) else Programs(self)
                patiently(lambda: transfer(programs, [*command, "--", *sources, destination]), ctx)

            def transfer(programs: Programs, command: Sequence[str]) -> None:
                with (
                    programs.start_rsync(parse(self.target), command) as child,
                    ctx.on_cancel(child.stop),
                ):
                    # A read that hangs, of a hypervisor that does, holds rsync in the kernel until the view is gone.
                    child.release = shown.close
                    running.append(child)
                    if view.failed:  # before the line above
                        child.stop()
                    try:
                        copied.append(programs.transfer(child, what, ctx, copied[-1]))
                    except Cancelled:
                        raise
                    except BackupError:
                        running.remove(child)
                        view.check()  # what rsync says of it is "Input/output error"
                        raise
                    view.check()
                    running.remove(child)

            sizes = {artifact.name: artifact.size for artifact in artifacts}
            upload = Upload(token, run, ctx, view.path, labels, sizes, copy)
            with self._all_or_nothing(place, token, run, ctx):
                place.store(upload)
                view.check()

    def _transfer_arguments(self) -> list[str]:
        """What the options add where bytes are copied; the user's own come last, so that they count."""
        remote = [f"--timeout={STALLED}"] if not isinstance(parse(self.target), FolderTarget) else []
        limit = [f"--bwlimit={self.limit_upload}"] if self.limit_upload else []
        return [*remote, *limit, *self.rsync_arguments]

    @contextmanager
    def _all_or_nothing(self, place: Place, token: Token, run: BackupRun, ctx: Context) -> Iterator[None]:
        """Whatever goes wrong in the block, nothing of it stays in the target."""
        try:
            yield
        except BaseException:
            ctx.release()
            self._abandon(place, token, run, ctx)
            raise

    def _abandon(self, place: Place, token: Token, run: BackupRun, ctx: Context) -> None:
        """Within `CLEAN_UP` seconds. Never raises: the first error counts, and the next run removes what is left."""
        with Context(ctx.folder, log=ctx.log) as calm:  # the run's own may be cancelled
            late = threading.Timer(CLEAN_UP, calm.fail, [TargetUnavailable(f"not done within {CLEAN_UP:.0f} s")])
            late.daemon = True
            late.start()
            try:
                place.abandon(token, run, calm)
            except (BackupError, OSError) as error:
                ctx.log.warning(
                    "what the failed backup has left stays in %s until the next backup of this VM from this host"
                    " removes it: %s",
                    place.name,
                    error,
                )
            finally:
                late.cancel()

    @hookimpl
    def restore(self, source: SourceRef, ctx: Context) -> Sequence[Artifact]:
        """The files of the backup; what is fetched from elsewhere is fetched when it is opened."""
        place = self._place()
        token = Token.parse(source.token)
        files = layout.by_token(place.files([token.folder], ctx)).get(token, {}) if token else {}
        if token is None or MANIFEST not in files:
            raise SourceNotFound(f"{place.name} holds no complete backup {source.token:.100}")
        return [place.artifact(token, name, size, ctx) for name, size in layout.artifacts(files).items()]

    @hookimpl
    def delete(self, sources: Sequence[SourceRef], ctx: Context) -> bool:
        """The manifest first, so that what is half deleted is no backup; then the folder."""
        tokens = sorted({token for source in sources if (token := Token.parse(source.token))})
        if tokens:
            self._place().remove(tokens, ctx)
        return True

    @hookimpl
    def sources(self, ctx: Context) -> Iterable[Listed]:
        """One listing, whatever the number of backups: the labels are names in it."""
        return self._listed(self._place().files(None, ctx))

    @hookimpl
    def sources_of(self, vm: str, ctx: Context) -> Iterable[Listed]:
        """The same of one VM's folder: of the others none is looked into."""
        return self._listed(self._place().files(None, ctx, vm=vm)) if Token.parse(f"{vm}.{'0' * 32}") else []

    def _listed(self, listing: Mapping[str, int]) -> list[Listed]:
        return [
            Listed(
                source=SourceRef(str(token)),
                labels=layout.labels(files),
                size=sum(layout.artifacts(files).values()),
            )
            for token, files in sorted(layout.by_token(listing).items())
            if MANIFEST in files
        ]

    @hookimpl
    def identity(self, make: bool, ctx: Context) -> str | None:
        """What the marker in the target says."""
        return self._place().identity(ctx, make=make)

    @hookimpl
    def check(self, ctx: Context) -> bool:
        """The target answers, takes the login, and takes writes, as far as can be told without one."""
        self._warn(ctx)
        self._place().check(ctx)
        return True

    @hookimpl
    def usage(self, ctx: Context) -> Usage:
        """The sizes of all backups, and the file system that they lie in where it can be asked (not at a daemon)."""
        place = self._place()
        return replace(place.room(ctx), used=sum(place.files(None, ctx).values()))

    def _warn(self, ctx: Context) -> None:
        for path in (self.password_file, self.identity_file):
            try:
                shared = path is not None and path.expanduser().stat().st_mode & (stat.S_IROTH | stat.S_IWOTH)
            except OSError:
                continue  # rsync or ssh say what is wrong with it
            if shared:
                ctx.log.warning("%s can be read by everybody; chmod 600 %s", path, path)
