"""What the hooks do, with boto3. `driver` has the options and loads this only when a hook is called."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from backupcore.errors import AccessDenied, BackupError, IncrementImpossible, Locked, SourceNotFound, TargetUnavailable
from backupcore.model import Artifact, BackupRun, Listed, Merge, SourceRef, Stored, Usage, new_id
from backupcore_s3.bucket import Bucket
from backupcore_s3.crew import Crew, answered
from backupcore_s3.failures import code, is_absent, is_refused, is_unknown_to_server
from backupcore_s3.flatten import assemble, cannot_copy, cut, totals
from backupcore_s3.keys import MANIFEST, MARKER, UNFINISHED, Place
from backupcore_s3.labels import from_manifest, from_metadata
from backupcore_s3.parts import LARGEST, LEAST, MOST
from backupcore_s3.stored import StoredArtifact
from backupcore_s3.unfinished import is_dead
from backupcore_s3.writer import Writer, clear

if TYPE_CHECKING:
    from backupcore import Context
    from backupcore_s3.driver import S3

__all__ = ["Store"]

PROBE = "_check"
"""The object that `check` writes and removes."""

_SMALL_REQUESTS = 16  # at once, where next to no data is moved: a listing waits for answers and for nothing else
_NEVER = datetime.max.replace(tzinfo=UTC)
_MARKER = 200  # bytes of the marker that are looked at; it has 33
_IDENTITY = re.compile(rb"[0-9a-f]{32}\n?")
_MANIFEST = 16 << 20  # bytes of a manifest that a listing reads


class Store:
    """The sources in one bucket below one prefix. Pickles as its options."""

    def __init__(self, options: S3) -> None:
        self.bucket = Bucket(options)

    # The run

    def prepare(self, run: BackupRun, ctx: Context) -> None:
        """The bucket answers and takes writes, the chain is still there; what died of this installation is swept."""
        places = answered(ctx.check, lambda: self._prepared(run, ctx))
        # Once it is certain that nobody else works on this VM.
        ctx.on_touch(lambda: answered(ctx.check, lambda: self._sweep(places, run, ctx)))

    def _prepared(self, run: BackupRun, ctx: Context) -> dict[Place, dict[str, int]]:
        bucket = self.bucket
        places = dict(self._places(f"{run.vm.uuid}/", ctx))
        ctx.check()
        for source in run.builds_on:
            place = Place.of_token(source.token)
            if place is None or MANIFEST not in places.get(place, {}):
                if place:
                    self._require_true((), place.key(MANIFEST))
                raise IncrementImpossible(f"source {source}, which it builds on, is no longer in {bucket.name}")
        # A write of which nothing stays, not even in a bucket that keeps every version.
        probe = Place.new(run.vm.uuid).key(UNFINISHED)
        answer = bucket.call("create_multipart_upload", "beginning an upload", Key=probe, **bucket.how(probe))
        bucket.abort(probe, answer["UploadId"])
        return places

    def _sweep(self, places: dict[Place, dict[str, int]], run: BackupRun, ctx: Context) -> None:
        append_only = False
        for place, names in places.items():
            ctx.check()
            if UNFINISHED not in names or (append_only and MANIFEST in names):
                continue
            try:
                marker = place.key(UNFINISHED)
                marked = bytes(self.bucket.read(marker, 0, min(names[UNFINISHED], 1 << 16), ctx.check))
                if not is_dead(marked, run):
                    continue
                if MANIFEST in names:  # it died between its last two requests, and is whole
                    self.bucket.delete(marker)
                else:
                    ctx.log.info("removing what a run that died has left in %s: %s", self.bucket.name, place.folder)
                    clear(self.bucket, place)
            except SourceNotFound:  # another run has just done it
                continue
            except BackupError as error:
                ctx.check()
                # Every backup leaves its mark where nothing may be deleted: one question is enough, and no news.
                append_only = append_only or is_refused(error)
                level = logging.INFO if MANIFEST in names and is_refused(error) else logging.WARNING
                what = "the mark of a backup that is whole" if MANIFEST in names else "an unfinished upload"
                ctx.log.log(level, "%s stays in %s: %s", what, self.bucket.name, error)

    def backup(self, artifacts: Sequence[Artifact], run: BackupRun, ctx: Context) -> Stored:
        """Everything but the manifest, then the manifest."""
        return self._write(run, ctx, artifacts, lambda writer: writer.keep(_rest(artifacts)))

    def flatten(self, merge: Merge, run: BackupRun, ctx: Context) -> Stored | None:
        """The same, with disks that the store puts together; None where it cannot, or where too little is copied."""
        disks = [artifact for artifact in merge.artifacts if artifact.name.startswith("disk.")]
        for disk in disks:
            ctx.check()
            needed = totals(cut(merge.pieces(disk), disk.size))
            if disk.size > LARGEST or needed.parts > MOST or needed.joined > max(disk.size // 2, LEAST):
                ctx.log.info("%s: %s is in too many pieces for the store to copy", self.bucket.name, disk.name)
                return None
        sizes = {
            (source.token, artifact.name): artifact.size
            for source in merge.sources
            for artifact in self.restore(source, ctx)
        }

        def put_together(writer: Writer) -> None:
            for disk in disks:
                assemble(writer, disk, cut(merge.pieces(disk), disk.size), sizes, ctx)
            writer.keep([artifact for artifact in _rest(merge.artifacts) if artifact not in disks])

        try:
            return self._write(run, ctx, merge.artifacts, put_together)
        except BackupError as error:
            if not cannot_copy(error):
                raise
            ctx.log.info("%s cannot copy on its own side: %s", self.bucket.name, error)
            return None

    def _write(
        self, run: BackupRun, ctx: Context, artifacts: Sequence[Artifact], disks: Callable[[Writer], object]
    ) -> Stored:
        writer = Writer(self.bucket, run, ctx)
        try:
            disks(writer)
            # The sums come into being while the disks are read, and the manifest holds the digests of the sums.
            writer.keep([artifact for artifact in artifacts if artifact.name.startswith("sums.")])
            writer.publish(next(artifact for artifact in artifacts if artifact.name == MANIFEST))
        except BaseException:
            ctx.release()
            writer.discard()
            raise
        return Stored(source=writer.place.source, stored=writer.stored)

    # Reading

    def restore(self, source: SourceRef, ctx: Context) -> Sequence[Artifact]:
        """The artifacts of a source; its objects are listed, and not yet read."""
        return answered(ctx.check, lambda: self._restored(source, ctx))

    def _restored(self, source: SourceRef, ctx: Context) -> Sequence[Artifact]:
        place = Place.of_token(source.token)
        names = dict(self._places(place.folder, ctx)).get(place, {}) if place else {}
        if place is None or MANIFEST not in names:
            if place:
                self._require_true((), place.key(MANIFEST))
            raise SourceNotFound(f"{self.bucket.name} holds no complete backup {source.token:.80}")
        return [
            StoredArtifact(self.bucket, place.key(name), name, size, ctx)
            for name, size in names.items()
            if not name.startswith("_")
        ]

    def sources(self, ctx: Context, vm: str = "") -> list[Listed]:
        """Every source with a manifest (of a VM): one listing, then the labels of each from its manifest's metadata."""
        return answered(ctx.check, lambda: self._listed(ctx, vm))

    def _listed(self, ctx: Context, vm: str) -> list[Listed]:
        below = f"{vm}/" if vm else ""
        marks: set[str] = set()
        complete = {place: names for place, names in self._places(below, ctx, marks=marks) if MANIFEST in names}
        if not vm:
            self._require_true(marks, MARKER)
        labels: dict[Place, dict[str, str]] = {}

        def look(place: Place) -> None:
            found = self._labels(place, complete[place][MANIFEST], ctx)
            if found is not None:
                labels[place] = found

        crew = Crew(_SMALL_REQUESTS, ctx.check)
        crew.work((partial(look, place) for place in complete), len(complete))
        return [
            Listed(
                source=place.source,
                labels=labels[place],
                size=sum(size for name, size in names.items() if not name.startswith("_")),
            )
            for place, names in complete.items()
            if place in labels
        ]

    def _labels(self, place: Place, size: int, ctx: Context) -> dict[str, str] | None:
        key = place.key(MANIFEST)
        found = self.bucket.head(key)
        if found is None:  # deleted meanwhile
            return None
        labels = from_metadata(found.get("Metadata") or {})
        return labels or from_manifest(bytes(self.bucket.read(key, 0, min(size, _MANIFEST), ctx.check)))

    def _places(
        self, folder: str, ctx: Context, *, marks: set[str] | None = None
    ) -> Iterator[tuple[Place, dict[str, int]]]:
        """Each place below `folder` with the names and sizes of its objects. What is not ours is left out.

        The marker, if it is listed, is added to `marks`.
        """

        def ours() -> Iterator[tuple[Place, str, int]]:
            for one in self.bucket.objects(folder, "listing"):
                ctx.check()
                found = Place.of_key(one.key)
                if found:
                    yield (*found, one.size)
                elif marks is not None and one.key == MARKER:
                    marks.add(one.key)

        for place, group in groupby(ours(), key=lambda one: one[0]):  # a listing is sorted by key
            yield place, {name: size for _, name, size in group}

    # Removing

    def delete(self, sources: Sequence[SourceRef], ctx: Context) -> bool:
        """All locks are looked at before anything is touched; then of each source the manifest first."""
        places = [place for place in (Place.of_token(source.token) for source in sources) if place]
        crew = Crew(_SMALL_REQUESTS, ctx.check)
        whole = crew.answer(self._can_lock)
        crew.work((partial(self._require_unlocked, place, whole=whole) for place in places), len(places))
        crew.work((partial(self._remove, place) for place in places), len(places))
        return True

    def locks(self, sources: Sequence[SourceRef], ctx: Context) -> dict[SourceRef, datetime | None]:
        """Those under Object Lock, and until when; None for a legal hold, which has no date."""
        places = [place for place in (Place.of_token(source.token) for source in sources) if place]
        found: dict[SourceRef, datetime | None] = {}
        crew = Crew(_SMALL_REQUESTS, ctx.check)
        whole = crew.answer(self._can_lock)

        def look(place: Place) -> None:
            if lock := self._lock(place, whole=whole):
                found[place.source] = lock[1]

        crew.work((partial(look, place) for place in places), len(places))
        return found

    def _lock(self, place: Place, *, whole: bool) -> tuple[str, datetime | None] | None:
        """What keeps a source longest, in words, and until when; None if nothing does.

        With `whole` every object is asked for: a hold may be put on a disk alone. Else the manifest stands for all.
        """
        keys = [place.key(MANIFEST)]
        if whole:
            keys = [one.key for one in self.bucket.objects(place.folder, "listing")]
        held = [lock for lock in map(self._lock_of, keys) if lock]
        return max(held, key=lambda lock: lock[1] or _NEVER, default=None)

    def _lock_of(self, key: str) -> tuple[str, datetime | None] | None:
        found = self.bucket.head(key) or {}
        if found.get("ObjectLockLegalHoldStatus") == "ON":
            return "a legal hold", None
        until = found.get("ObjectLockRetainUntilDate")
        if until is not None and until.tzinfo is None:  # lesser servers leave it out; S3 knows UTC only
            until = until.replace(tzinfo=UTC)
        if until is None or until <= datetime.now(UTC):
            return None
        return f"{found.get('ObjectLockMode', 'a lock')} until {until:%Y-%m-%d %H:%M %Z}", until

    def _require_unlocked(self, place: Place, *, whole: bool) -> None:
        """Locked for an object under a lock.

        A store that keeps versions would hide it and keep its bytes, and call that a success.
        """
        if lock := self._lock(place, whole=whole):
            reason, until = lock
            raise Locked(
                f"{self.bucket.name}: {place.source} is under Object Lock ({reason}) and cannot be deleted",
                "Nothing was deleted. It can be once the lock has ended.",
                until=until,
            )

    def _remove(self, place: Place) -> None:
        try:
            self.bucket.delete(place.key(MANIFEST))
        except AccessDenied as error:
            if not is_refused(error):
                raise
            raise Locked(
                error.message,
                "The access key may not delete (s3:DeleteObject), or a lock is on it. If that is as you want it, "
                "retention waits; else see the README of backupcore-s3.",
            ) from error
        clear(self.bucket, place)

    # Looking

    def identity(self, ctx: Context, *, make: bool) -> str | None:
        """What the marker says; None where there is none. With `make` it is written, if there is none by then."""
        return answered(ctx.check, lambda: self._identity(ctx, make=make))

    def _identity(self, ctx: Context, *, make: bool) -> str | None:
        found = self._marker(ctx)
        if found is None and make:
            data = f"{new_id()}\n".encode()
            try:
                self.bucket.put(MARKER, data, ctx.check, only_new=True)
            except BackupError as error:
                if is_unknown_to_server(error):  # two that begin at once may cross; then the first record tells
                    self.bucket.put(MARKER, data, ctx.check)
                elif code(error) not in {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}:
                    raise
            found = self._marker(ctx)
        return found

    def _marker(self, ctx: Context) -> str | None:
        try:
            answer = self.bucket.call("get_object", "looking for its marker", Key=MARKER, Range=f"bytes=0-{_MARKER}")
        except BackupError as error:
            if is_absent(error):
                return None
            if code(error) not in {"InvalidRange", "416"}:
                raise
            said = b""
        else:
            with closing(answer["Body"]) as body:
                said = body.read(_MARKER + 1)
        if not _IDENTITY.fullmatch(said):
            raise TargetUnavailable(
                f"{self.bucket.name}: the object {self.bucket.prefix}{MARKER} does not say which datastore this is",
                "Somebody has written another one there: look at it.",
            )
        return said[:32].decode()

    def _require_true(self, listed: Collection[str], key: str) -> None:
        """A store, or what stands before it, may show nothing for once: what it lists not is asked for by name."""
        if key not in listed and self.bucket.head(key) is not None:
            raise TargetUnavailable(
                f"{self.bucket.name}: its listing lacks {key}, which is there",
                "What the store lists is not true; try again.",
            )

    def check(self, ctx: Context) -> bool:
        """List, write and remove; and does the server honour a condition on a write?"""
        return answered(ctx.check, lambda: self._checked(ctx))

    def _checked(self, ctx: Context) -> bool:
        bucket = self.bucket
        for _ in bucket.objects(PROBE, "listing"):
            break
        upload = bucket.call("create_multipart_upload", "beginning an upload", Key=PROBE, **bucket.how(PROBE))
        bucket.abort(PROBE, upload["UploadId"])
        self._look_for_uploads(ctx)
        if self._locks_by_default():
            ctx.log.info("%s locks whatever is written, so no write was tried", bucket.name)
            return True
        first = self._probe(ctx)
        if first is None:  # another check is under way, or was killed: the condition held
            return True
        try:
            second = self._probe(ctx)
        finally:
            self._unprobe(first, ctx)
        if second is not None:
            if _version(second):
                self._unprobe(second, ctx)
            self._warn(ctx, "ignores")
        return True

    def _unprobe(self, written: Any, ctx: Context) -> None:
        """Delete what the check has written. A bucket that deletes nothing is fine for backups, and may be meant so."""
        try:
            self.bucket.call("delete_object", "deleting what the check has written", Key=PROBE, **_version(written))
        except AccessDenied as error:
            if not is_refused(error):
                raise
            ctx.log.warning("%s; backups are fine there, and retention waits. Else allow s3:DeleteObject", error)

    def _look_for_uploads(self, ctx: Context) -> None:
        """Warn where what a dead run has uploaded could not be found again."""
        try:
            for _ in self.bucket.uploads(PROBE, "listing uploads"):
                break
        except AccessDenied as error:
            ctx.log.warning(
                "%s; so parts of a backup that was killed stay there unseen, and are charged for: allow"
                " s3:ListBucketMultipartUploads, or have a lifecycle rule abort uploads that are some days old",
                error,
            )
        except BackupError as error:
            if not is_unknown_to_server(error):
                raise

    def _warn(self, ctx: Context, what: str) -> None:
        ctx.log.warning(
            "%s %s conditional writes (If-None-Match): it would let a manifest be replaced. Backups are safe from each"
            " other all the same, since each has a folder of its own; use a server that has them if you can.",
            self.bucket.name,
            what,
        )

    def _probe(self, ctx: Context) -> Any:
        """Write the probe if it does not exist; None if the server says that it does."""
        try:
            return self.bucket.put(PROBE, b"vmkeep writes and removes this\n", ctx.check, only_new=True)
        except BackupError as error:
            # 409: another check writes it at this very moment, as AWS says.
            if code(error) in {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}:
                return None
            if not is_unknown_to_server(error):
                raise
        self._warn(ctx, "refuses")
        return None

    def _can_lock(self) -> bool:
        """Whether an object there may be under Object Lock, as far as the store says."""
        return self._locking().get("ObjectLockEnabled") == "Enabled"

    def _locks_by_default(self) -> bool:
        return "DefaultRetention" in (self._locking().get("Rule") or {})

    def _locking(self) -> dict[str, Any]:
        try:
            found = self.bucket.call("get_object_lock_configuration", "asking for Object Lock")
        except BackupError:  # there is none, the server knows none, or we may not ask
            return {}
        return found.get("ObjectLockConfiguration") or {}

    def usage(self, ctx: Context) -> Usage:
        """The bytes of all objects below the prefix. S3 tells neither a quota nor what is free."""

        def added() -> int:
            used = 0
            for one in self.bucket.objects("", "listing"):
                ctx.check()
                used += one.size
            return used

        return Usage(used=answered(ctx.check, added))


def _rest(artifacts: Sequence[Artifact]) -> list[Artifact]:
    return [one for one in artifacts if one.name != MANIFEST and not one.name.startswith("sums.")]


def _version(answer: Any) -> dict[str, str]:
    """In a bucket that keeps versions: the one that was written, so that it is removed and not hidden."""
    version = answer.get("VersionId")
    return {"VersionId": version} if version and version != "null" else {}
