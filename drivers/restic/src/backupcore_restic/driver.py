"""The driver: the hooks of `backupcore.hookspecs`, kept by restic."""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from backupcore import Context, driver, hookimpl, option
from backupcore.child import Child
from backupcore.errors import (
    AccessDenied,
    BackupError,
    ConfigError,
    IncrementImpossible,
    IntegrityError,
    Locked,
    SourceNotFound,
    TargetUnavailable,
)
from backupcore.model import Artifact, BackupRun, Listed, SourceRef, Stored, Usage
from backupcore_restic.creation import create, require_whole, settle
from backupcore_restic.dump import DumpedArtifact
from backupcore_restic.failures import NoRepository, refuses_to_delete
from backupcore_restic.mount import Mount
from backupcore_restic.mounted import MountedArtifact
from backupcore_restic.place import creatable
from backupcore_restic.repository import Repository, is_id, is_unknown_place
from backupcore_restic.stall import Stall
from backupcore_restic.tags import MARK, extent_tag, from_extent_tag, from_tags, of_vm, run_tag, to_tags

__all__ = ["Restic"]

MANIFEST = "manifest.json"
CHECK = 10.0
"""Seconds within which a repository must answer a `check`: a person waits for that."""

LONG = 1800.0
"""Seconds that a ``restic prune`` or ``check`` may stand still: it asks for one small thing after another."""

LINE = 1 << 20  # the longest line of restic's progress that is taken in at once


@driver
class Restic:
    """Backups as snapshots of one restic repository. The source is the full ID of the snapshot."""

    repository: str = option("the repository, in any form that restic understands", secret=True)
    password_file: Path | None = option("a file with the repository's password", default=None)
    password_command: str = option("a command that prints the repository's password", default="", secret=True)
    init: bool = option("create the repository if it does not exist", default=True)
    compression: Literal["auto", "off", "max"] = option("how hard restic compresses", default="auto")
    limit_upload: int = option("KiB/s to the repository at most; 0: no limit", default=0)
    limit_download: int = option("KiB/s from the repository at most; 0: no limit", default=0)
    pack_size: int = option("MiB in one file of the repository, 4 to 128; 0: restic's own choice", default=0)
    read_concurrency: int = option("files read at once (restic 0.15 and later); 0: restic's own choice", default=0)
    environment_file: Path | None = option("KEY=VALUE lines for restic, for the credentials of a cloud", default=None)
    binary: str = option("the restic program", default="restic")
    cache: str = option("the folder of restic's cache; \"off\": none; empty: restic's own choice", default="")
    timeout: int = option("seconds within which the repository must answer, and longest standstill", default=120)
    lock_wait: int = option("seconds to wait while another restic has the repository locked", default=300)
    restic_options: tuple[str, ...] = option('restic\'s extended options, as "sftp.command=ssh …"', default=())
    max_unused: str = option('what maintain leaves unused: bytes, "5%" or "unlimited"', default="5%")
    max_repack_size: str = option('how much maintain writes anew at most, as "10G"; empty: no limit', default="")
    check_data: str = option('how much of the data maintain reads: "1%", "2G"; empty: none', default="1%")

    def __post_init__(self) -> None:
        wrong = []
        if bool(self.password_file) == bool(self.password_command):
            wrong.append("exactly one of password_file and password_command is needed")
        if not self.repository.strip():
            wrong.append("repository: must not be empty")
        elif is_unknown_place(self.repository):
            wrong.append(
                "repository: restic knows no place that begins so: sftp:user@host:/path, rest:http://host/, s3:…; a "
                "folder with a colon in its name begins with / or ./"
            )
        for name in ("repository", "cache"):
            try:
                Path(getattr(self, name)).expanduser()
            except RuntimeError:
                wrong.append(f"{name}: there is no account of the name after ~ on this host")
        if self.pack_size and not 4 <= self.pack_size <= 128:
            wrong.append("pack_size: 4 to 128 MiB, or 0")
        if not self.binary or self.timeout < 1:
            wrong.append("binary must not be empty, and timeout be at least 1")
        wrong += [
            f"{name}: must not be negative"
            for name in ("limit_upload", "limit_download", "read_concurrency", "lock_wait")
            if getattr(self, name) < 0
        ]
        if wrong:
            raise ConfigError("restic: " + "; ".join(wrong))

    @hookimpl
    def prebackup(self, run: BackupRun, ctx: Context) -> None:
        """Open the repository, with a lock; create it for its first backup; look for what the run builds on."""
        self._warn(ctx)
        repository = Repository(self)
        repository.environment()  # a password that restic would wait for is none for later: the guest is touched then
        try:
            # The folder itself is asked: restic takes 0.5 s to derive its key, as long as a small increment takes in
            # all. Where the guest is to be brought to rest it does so all the same, beside what else is looked at: a
            # password may be another one by now, and no guest should stand still to find that out.
            repository.require_writable()
            there = repository.ids_in_folder() if run.builds_on else None
            if there is None:
                there = repository.ids(ctx, self.timeout)
            elif run.settings.get("FS_FREEZE", "NONE") != "NONE":
                ctx.on_touch(repository.opening(ctx, self.timeout))
        except NoRepository as error:
            if run.builds_on:  # a new repository here would hide that all earlier backups are gone
                raise TargetUnavailable(
                    error.message, "Earlier backups were kept there. Is it mounted? Has it been moved?"
                ) from error
            self._require_init(error)
            create(self, ctx)
            there = repository.ids(ctx, self.timeout)  # of another host's making it may have another password
        except IntegrityError:
            if run.builds_on or repository.folder:
                raise
            settle(self, ctx)  # while several hosts create it, it looks like this
            there = repository.ids(ctx, self.timeout)
        if not there and not repository.folder:
            ctx.once((Repository, self), lambda: repository.identity(ctx, self.timeout))
        gone = [source.token for source in run.builds_on if source.token not in there]
        if gone:
            raise IncrementImpossible(f"snapshot {gone[0][:8]}, which it builds on, is no longer in {repository.name}")

    def _require_init(self, error: NoRepository) -> None:
        if not self.init:
            raise TargetUnavailable(error.message, "Create it with restic init, or set init = true.") from error

    @hookimpl
    def backup(self, artifacts: Sequence[Artifact], run: BackupRun, ctx: Context) -> Stored:
        """One ``restic backup`` of a folder in which the artifacts are ordinary files."""
        repository = Repository(self)
        extent = extent_tag(len(artifacts), sum(artifact.size for artifact in artifacts))
        tags = [*to_tags(run.labels), run_tag(run.id), extent]
        arguments = ["backup", "--json", "--force", f"--host={run.vm.name}", *(f"--tag={tag}" for tag in tags), "."]
        try:
            stored = repository.locking(lambda: self._save(repository, arguments, artifacts, run, ctx), ctx)
            self._require_same(repository, ctx)
        except BaseException:
            ctx.release()
            # A snapshot that misses something, or that is complete and that nobody has been told of.
            repository.drop(run_tag(run.id), ctx.log)
            raise
        return stored

    def _require_same(self, repository: Repository, ctx: Context) -> None:
        """What was new when this run began, and no folder, is still the same: see `backupcore_restic.creation`."""
        created = ctx.once((Repository, self), lambda: "")
        if created and repository.identity(ctx, self.timeout) != created:
            raise IntegrityError(
                f"{repository.name} was created again by another host while this backup was being stored in it",
                "If nothing else is stored there, remove it. Then run the first backup from one host alone.",
            )

    def _save(
        self, repository: Repository, arguments: list[str], artifacts: Sequence[Artifact], run: BackupRun, ctx: Context
    ) -> Stored:
        from backupcore.disk.fileview import show  # noqa: PLC0415 - FUSE and hashing, which only a backup needs

        running: list[Child] = []

        def give_up(error: BackupError) -> None:
            for child in running:
                child.stop()

        what = f"backing up to {repository.name}"
        with ExitStack() as shown:
            view = shown.enter_context(show(artifacts, ctx.folder, log=ctx.log, on_failure=give_up))
            # A flatten has a second restic, which gives what this one stores; together with us they stay below 300 MiB.
            less = repository.sparing(_kept()) if self._mount(ctx).serves else {}
            with repository.start(arguments, view.path, **less) as child, ctx.on_cancel(child.stop):
                # A read that hangs, of a hypervisor that does, holds restic in the kernel until the view is gone.
                child.release = shown.close
                running.append(child)
                if view.failed:  # before the line above
                    child.stop()
                # Beside restic itself, which opens the repository now: afterwards it would take half a second more.
                known = None if repository.folder else repository.opening(ctx, self.timeout)
                stall = Stall(child, what, repository.folder, self.timeout)
                with stall.watched():
                    summary = _follow(child, stall, ctx)
                    code = child.wait()
            ctx.check()
            view.check()
            if stall.error and repository.waits_for_password(child):
                raise repository.no_password(what)
            if stall.error:
                raise stall.error
            if code:
                raise repository.failed(child, code, what)
            if known:
                self._seen(ctx)["id"] = known()
        _agree(summary, artifacts, what)
        snapshot = repository.full_id(str(summary.get("snapshot_id", "")), run_tag(run.id), ctx)
        if snapshot is None:
            raise IntegrityError(f"{what}: restic does not list the snapshot that it says it saved")
        added = summary.get("data_added_packed", summary.get("data_added"))
        return Stored(source=SourceRef(snapshot), stored=added if isinstance(added, int) else None)

    @hookimpl
    def restore(self, source: SourceRef, ctx: Context) -> Sequence[Artifact]:
        """The files of the snapshot, in the mount that all calls with this context share; else as ``restic dump``."""
        repository = Repository(self)
        unknown = SourceNotFound(f"{repository.name} holds no complete backup {source.token:.64}")
        if not is_id(source.token):
            raise unknown
        mount = self._mount(ctx)
        mounted, files = mount.mounted(), mount.files(source.token)
        if files is None or MANIFEST not in files:  # not mounted, or stored since: restic itself has the last word
            mounted, files = None, repository.files(source.token, ctx)
        if files is None or MANIFEST not in files:
            raise unknown
        found = [DumpedArtifact(self, source.token, name, size, ctx) for name, size in sorted(files.items())]
        return [MountedArtifact(one, mount, mounted) for one in found] if mounted else found

    def _mount(self, ctx: Context) -> Mount:
        return ctx.once((Mount, self), lambda: Mount(self, ctx))

    @hookimpl
    def delete(self, sources: Sequence[SourceRef], ctx: Context) -> bool:
        """Forget the snapshots. Room comes back with ``restic prune``, which can lock the repository for an hour."""
        repository = Repository(self)
        wanted = {source.token for source in sources if is_id(source.token)}
        try:
            repository.forget(wanted, ctx)
        except SourceNotFound:  # 0.14 does not mind one that is gone already; others may
            repository.forget(wanted & repository.ids(ctx, self.timeout), ctx)
        self._mount(ctx).deleted(wanted)
        return True

    @hookimpl
    def sources(self, ctx: Context) -> Iterable[Listed]:
        """One listing, whatever the number of snapshots, where restic tells in it how much each of them holds.

        Snapshots made by restic before 0.17 do not tell: whether they hold a manifest takes a second question.
        """
        repository = Repository(self)
        ours = {one["id"]: one for one in repository.snapshots(MARK, ctx)}
        complete = {name: _is_complete(one) for name, one in ours.items()}
        if None in complete.values():
            holding = repository.holding(MANIFEST, MARK, ctx)
            complete = {name: name in holding if known is None else known for name, known in complete.items()}
        return [_listed(one) for name, one in ours.items() if complete[name]]

    @hookimpl
    def sources_of(self, vm: str, known: Collection[SourceRef], ctx: Context) -> Iterable[Listed]:
        """One question, whichever restic has stored them; none where the folder holds nothing but what is known.

        A snapshot never changes under its ID, and what is not known, whosever it is, may be of this VM.
        """
        repository = Repository(self)
        there = repository.ids_in_folder()
        if there is not None and there <= {source.token for source in known}:
            return [Listed(source=SourceRef(one), labels={}) for one in sorted(there)]
        found = repository.snapshots(of_vm(vm), ctx)
        return [_listed(one) for one in found if _is_complete(one) is not False]

    @hookimpl
    def identity(self, known: str, ctx: Context) -> str | None:
        """The repository's ID, and of one in a folder a digest of its configuration as it lies there.

        For the ID restic takes 0.5 s to derive its key; the same configuration says the same. It is written anew where
        a repository is brought to a later format, and its ID stays.
        """
        repository = Repository(self)
        digest = repository.config_digest()
        if repository.folder is not None and not digest:
            return None
        if known and digest and known.partition(".")[2] == digest:
            return known
        try:
            found = self._seen(ctx).pop("id", "") or repository.identity(ctx, self.timeout)
        except NoRepository:
            return None
        if found == known.partition(".")[0]:
            return known
        return f"{found}.{digest}" if digest else found

    def _seen(self, ctx: Context) -> dict[str, str]:
        """The ID of the repository that a backup of this run has just gone to, until somebody asks for it."""
        return ctx.once((Restic, self), dict)

    @hookimpl
    def check(self, ctx: Context) -> bool:
        """Read the repository's configuration, for which the password is needed.

        A repository that the first backup would create is well, too: a host is checked before its first backup.
        """
        self._warn(ctx)
        repository = Repository(self)
        try:
            repository.identity(ctx, self._soon)
        except NoRepository as error:
            self._require_init(error)
            if repository.folder:
                creatable(repository.folder)
                require_whole(repository.folder, ctx, self._soon)
            ctx.log.warning(
                "%s holds no repository yet; the first backup creates it. If there were backups: is it mounted?",
                repository.name,
            )
        return True

    @hookimpl
    def usage(self, ctx: Context) -> Usage:
        """Of a folder of this host: its files, and their file system. Elsewhere what restic counts in time."""
        folder = Repository(self).folder
        if folder is None:
            try:
                return Usage(used=Repository(self).stored(ctx, self.timeout))
            except NoRepository:  # the first backup creates it
                return Usage()
        if not folder.is_dir():
            return Usage()
        used = 0
        for place, _, names in os.walk(folder):
            ctx.check()
            for name in names:
                try:
                    used += (Path(place) / name).lstat().st_size
                except FileNotFoundError:  # locks and temporary files come and go
                    continue
        room = os.statvfs(folder)
        return Usage(used=used, total=room.f_blocks * room.f_frsize, free=room.f_bavail * room.f_frsize)

    @hookimpl
    def maintain(self, ctx: Context) -> bool:
        """Give back the room of what was forgotten (prune), then look whether the repository is whole (check)."""
        repository = Repository(self)
        ctx.progress.phase("pruning")
        repack = [f"--max-repack-size={self.max_repack_size}"] if self.max_repack_size else []
        prune = ["prune", f"--max-unused={self.max_unused}", *repack]
        try:
            repository.write(prune, "pruning", ctx, still=self._long, refused=refuses_to_delete)
        except AccessDenied as error:
            if not refuses_to_delete(error.message):
                raise
            raise Locked(
                error.message,
                "If the repository is append-only as you want it, it is pruned where it lies (restic forget and prune "
                "over there), and not from here.",
            ) from error
        ctx.progress.phase("checking")
        data = [f"--read-data-subset={self.check_data}"] if self.check_data else []
        repository.write(["check", *data], "checking", ctx, still=self._long)
        return True

    @property
    def _long(self) -> float:
        return max(LONG, self.timeout)

    @property
    def _soon(self) -> float:
        return min(CHECK, self.timeout)

    def _warn(self, ctx: Context) -> None:
        for path in (self.password_file, self.environment_file):
            try:
                shared = path is not None and path.expanduser().stat().st_mode & (stat.S_IROTH | stat.S_IWOTH)
            except OSError:
                continue  # restic says what is wrong with it
            if shared:
                ctx.log.warning("%s can be read by everybody; chmod 600 %s", path, path)


def _kept() -> int:
    """Bytes for a ``restic backup``: each processor may be at work on a blob of 8 MiB."""
    return (40 + 8 * len(os.sched_getaffinity(0))) << 20


def _follow(child: Child, stall: Stall, ctx: Context) -> dict[str, Any]:
    """Tell the progress from restic's JSON lines until it ends; its summary, or {} if it gave none."""
    summary: dict[str, Any] = {}
    lines = io.BufferedReader(child.output)
    while line := lines.readline(LINE):
        stall.said += len(line)
        try:
            said = json.loads(line)
            kind = said.get("message_type")
        except (ValueError, AttributeError):
            continue  # not for us: a warning in plain text, a line longer than LINE
        if kind == "status":
            ctx.progress.done(int(said.get("bytes_done", 0)))
        elif kind == "summary":
            summary = said
    if summary:
        ctx.progress.done(int(summary.get("total_bytes_processed", 0)))
    return summary


def _agree(summary: dict[str, Any], artifacts: Sequence[Artifact], what: str) -> None:
    saved = (summary.get("total_files_processed"), summary.get("total_bytes_processed"))
    shown = (len(artifacts), sum(artifact.size for artifact in artifacts))
    if saved != shown:
        raise IntegrityError(
            f"{what}: restic saved {saved[0]} files of {saved[1]} bytes; it was shown {shown[0]} of {shown[1]}"
        )


def _is_complete(snapshot: dict[str, Any]) -> bool | None:
    """Whether it holds as much as was to be saved; None where the snapshot does not say."""
    summary = snapshot.get("summary")  # restic 0.17 and later
    if not isinstance(summary, dict):
        return None
    expected = from_extent_tag(str(tag) for tag in snapshot.get("tags") or ())
    if expected is None:  # made by this driver before it noted that
        return None
    return expected == (summary.get("total_files_processed"), summary.get("total_bytes_processed"))


def _listed(snapshot: dict[str, Any]) -> Listed:
    tags = snapshot.get("tags") or ()
    size = (snapshot.get("summary") or {}).get("total_bytes_processed")  # restic 0.17 and later
    return Listed(
        source=SourceRef(snapshot["id"]),
        labels=from_tags(str(tag) for tag in tags),
        size=size if isinstance(size, int) else None,
    )
