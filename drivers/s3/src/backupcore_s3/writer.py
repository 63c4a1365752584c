"""One new source on its way into the bucket: marked as unfinished, written, and published by its manifest."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

from backupcore.disk.reader import memory
from backupcore.errors import AccessDenied, BackupError, ContractViolation, IntegrityError
from backupcore.model import Artifact, BackupRun
from backupcore_s3.body import Body
from backupcore_s3.bucket import Bucket
from backupcore_s3.crew import Crew
from backupcore_s3.failures import code, is_refused, is_unknown_to_server
from backupcore_s3.keys import MANIFEST, UNFINISHED, Place
from backupcore_s3.labels import to_metadata
from backupcore_s3.parts import Cut
from backupcore_s3.unfinished import mark
from backupcore_s3.upload import Upload

if TYPE_CHECKING:
    from backupcore import Context

__all__ = ["Writer", "clear"]

_STEP = 4 << 20  # read from an artifact at once: as much as a disk is received without a copy for


class Writer:
    """What one run writes. Call `keep` or `Upload`s of `uploads`, then `publish`; `discard` if anything fails."""

    def __init__(self, bucket: Bucket, run: BackupRun, ctx: Context) -> None:
        self.bucket = bucket
        self.place = Place.new(run.vm.uuid)
        self.crew = Crew(bucket.options.concurrency, ctx.check, ctx.release)
        self.uploads: list[Upload] = []
        self._run = run
        self._ctx = ctx
        self._lock = threading.Lock()
        self._done = 0
        self._kept: dict[str, int] = {}
        # As all that is asked below but the manifest: a store that does not answer is waited for until a cancel.
        self.crew.answer(lambda: bucket.put(self.place.key(UNFINISHED), mark(run), ctx.check))

    @property
    def stored(self) -> int:
        """Bytes of all that was kept."""
        return sum(self._kept.values())

    def count(self, length: int) -> None:
        """So many bytes more are in the store."""
        with self._lock:
            self._done += length
            self._ctx.progress.done(self._done)

    def begin(self, name: str, *, checksums: bool = True) -> Upload:
        """A multipart upload of one artifact, which `discard` aborts."""
        key = self.place.key(name)
        upload = self.crew.answer(lambda: Upload(self.bucket, key, self._ctx.check, checksums=checksums))
        self.uploads.append(upload)
        return upload

    def end(self, artifact: Artifact, upload: Upload) -> None:
        """All parts of `artifact` are there."""
        self.crew.answer(lambda: upload.complete(artifact.size))
        self.uploads.remove(upload)
        self._kept[artifact.name] = artifact.size

    def keep(self, artifacts: Sequence[Artifact]) -> None:
        """Write these artifacts, small ones side by side, large ones in parts, several at once."""
        concurrency = self.bucket.options.concurrency
        cuts = [(artifact, Cut.of(artifact.name, artifact.size, concurrency)) for artifact in artifacts]
        small = [artifact for artifact, cut in cuts if cut.size <= cut.part]
        self.crew.work(self._whole(artifact) for artifact in small)
        for artifact, cut in cuts:
            if cut.size > cut.part:
                self.keep_in_parts(artifact, cut)

    def keep_in_parts(self, artifact: Artifact, cut: Cut) -> None:
        """Write one artifact as it is cut."""
        # Over plain HTTP a checksum has to be known before the part is sent, so the guest's disk would be read twice.
        upload = self.begin(artifact.name, checksums=cut.in_memory or self.bucket.is_encrypted)
        self.crew.work(self._parts(artifact, cut, upload), cut.workers)
        _require_end(artifact)
        self.end(artifact, upload)

    def _whole(self, artifact: Artifact) -> Callable[[], None]:
        def put() -> None:
            data = read_all(artifact)
            self.bucket.put(self.place.key(artifact.name), data, self._ctx.check)
            self._kept[artifact.name] = len(data)
            self.count(len(data))

        return put

    def _parts(self, artifact: Artifact, cut: Cut, upload: Upload) -> Iterator[Callable[[], None]]:
        reading = threading.Lock()  # in file order, one part at a time: a guest's disk is read once and forwards
        buffers: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(cut.workers if cut.in_memory else 0):
            buffers.put(memory(cut.part))  # filled again and again: fresh memory costs a page fault per 4 KiB

        def from_memory(number: int, offset: int, length: int) -> None:
            buffer = buffers.get()

            def fill() -> memoryview:
                view = buffer[:length]
                with reading:
                    read_exactly(artifact, offset, view)
                return view

            try:
                upload.send(number, fill)
            finally:
                buffers.put(buffer)
            self.count(length)

        def as_it_is_read(number: int, offset: int, length: int) -> None:
            def source(at: int, count: int) -> bytes:
                piece = bytearray(count)
                read_exactly(artifact, offset + at, memoryview(piece))
                return bytes(piece)

            upload.stream(number, lambda: Body(length, source, pace=self.bucket.upload_pace, check=self._ctx.check))
            self.count(length)

        send = from_memory if cut.in_memory else as_it_is_read
        for part in cut:
            yield partial(send, *part)

    def publish(self, manifest: Artifact) -> None:
        """Write the manifest, once the store lists all that was kept. From then on the source exists."""
        data = bytes(read_all(manifest))
        what = "looking at what was written"
        listed = self.crew.answer(lambda: list(self.bucket.objects(self.place.folder, what)))
        there = {one.key: one.size for one in listed}
        expected = {self.place.key(name): size for name, size in self._kept.items()}
        there.pop(self.place.key(UNFINISHED), None)
        if there != expected:
            wrong = sorted(key for key, _ in there.items() ^ expected.items())
            raise IntegrityError(f"{self.bucket.name}: the store lists {wrong[0]} otherwise than it was written")
        self._ctx.check()
        # Waited for in any case: one that is left behind might publish what was cancelled.
        self._put_manifest(data)
        self._kept[MANIFEST] = len(data)
        self.count(len(data))
        try:
            self.bucket.delete(self.place.key(UNFINISHED))
        except BackupError as error:  # the backup is done, and the next run of this VM tries again
            level = logging.INFO if is_refused(error) else logging.WARNING  # append-only, as somebody may have meant it
            self._ctx.log.log(level, "%s stays behind: %s", self.place.key(UNFINISHED), error)

    def _put_manifest(self, data: bytes) -> None:
        key = self.place.key(MANIFEST)
        metadata = to_metadata(self._run.labels)
        try:
            self.bucket.put(key, data, self._ctx.check, only_new=True, metadata=metadata)
        except BackupError as error:
            if code(error) in {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}:
                # botocore sends it again where no answer came: then it is ours that is there.
                if self.bucket.head(key) and self.bucket.read(key, 0, len(data), self._ctx.check) == data:
                    return
                raise IntegrityError(f"{self.bucket.name}: somebody else has written {key}", "Run it again.") from error
            if not is_unknown_to_server(error):
                raise
            # Safe as well, since nobody else knows this place.
            self._ctx.log.info("%s has no conditional writes", self.bucket.name)
            self.bucket.put(key, data, self._ctx.check, metadata=metadata)

    def discard(self) -> None:
        """Remove all that was written. Never raises: the error that led here counts."""
        tidying = Bucket(self.bucket.options, hurry=True)
        try:
            # The manifest first, should it be there: half a source must never look like a whole one.
            tidying.delete(self.place.key(MANIFEST))
            for upload in self.uploads:
                tidying.abort(upload.key, upload.id)
            clear(tidying, self.place, keep_mark=not self.crew.idle)
        except BackupError as error:
            self._ctx.log.warning(
                "what the failed run has written stays in %s, in %s, until the next backup of this VM from this host"
                " removes it: %s",
                self.bucket.name,
                self.place.folder,
                error,
            )


def clear(bucket: Bucket, place: Place, *, keep_mark: bool = False) -> None:
    """Remove what lies at a place that has no manifest; its mark last, so that a second attempt finds the rest."""
    what = "clearing an unfinished upload"
    try:
        uploads = list(bucket.uploads(place.folder, what))
    except AccessDenied:  # `check` warns of a key that may not list them; a backup that was complete has none
        uploads = []
    for key, upload in uploads:
        bucket.abort(key, upload)
    marker = place.key(UNFINISHED)
    for one in list(bucket.objects(place.folder, what)):
        if one.key != marker:
            bucket.delete(one.key)
    if not keep_mark:
        bucket.delete(marker)


def read_exactly(artifact: Artifact, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from the artifact's bytes; ContractViolation if it has fewer than it said."""
    done = 0
    while done < len(buffer):
        # In steps: where an artifact makes bytes of what it reads, malloc keeps as much again for each thread.
        count = artifact.read_into(offset + done, buffer[done : done + _STEP])
        if count <= 0:
            raise ContractViolation(f"artifact {artifact.name} ends at {offset + done} of its {artifact.size} bytes")
        done += count


def read_all(artifact: Artifact) -> memoryview:
    """All bytes of a small artifact."""
    buffer = memoryview(bytearray(artifact.size))
    read_exactly(artifact, 0, buffer)
    _require_end(artifact)
    return buffer


def _require_end(artifact: Artifact) -> None:
    if artifact.read_at(artifact.size, 1):
        raise ContractViolation(f"artifact {artifact.name} has more than its {artifact.size} bytes")
