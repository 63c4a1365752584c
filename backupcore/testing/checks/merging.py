"""Flatten: a new source, and the old ones stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from backupcore.errors import BackupError
from backupcore.manifest import NAME
from backupcore.model import Artifact, BackupRun, BytesArtifact, Copy, Literal, SourceRef, stream
from backupcore.testing.bench import KIB, MIB, Bench, Failed, Kept
from backupcore.testing.given import Failing, Made, gone
from backupcore.testing.life import DATE

SIZE = 7 * MIB + 4096
Part = bytes | tuple[Kept, int, int]
"""Some bytes, or a range of the disk of a kept backup."""


@dataclass(frozen=True)
class _Merged(Artifact):
    """A disk that is put together from parts, as a flatten does."""

    name: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:  # type: ignore[override]  # read-only here: the parts decide it
        return sum(len(part) if isinstance(part, bytes) else part[2] for part in self.parts)

    def open(self) -> BinaryIO:
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        found, start = bytearray(), 0
        for part in self.parts:
            size = len(part) if isinstance(part, bytes) else part[2]
            first, last = max(offset, start), min(offset + length, start + size)
            if first < last:
                if isinstance(part, bytes):
                    found += part[first - start : last - start]
                else:
                    found += part[0].artifacts[0].read_at(part[1] + first - start, last - first)
            start += size
        return bytes(found)


@dataclass
class _Merge:
    """What `flatten` is given."""

    sources: Sequence[SourceRef]
    artifacts: Sequence[Artifact]

    def pieces(self, artifact: Artifact) -> Iterable[Copy | Literal]:
        """The parts of a merged disk; of anything else its bytes."""
        given = next(one for one in self.artifacts if one.name == artifact.name)
        merged = given.inner if isinstance(given, Failing) else given
        if not isinstance(merged, _Merged):
            yield Literal(data=given.read_at(0, given.size))
            return
        for part in merged.parts:
            if isinstance(part, bytes):
                yield Literal(data=part)
            else:
                yield Copy(source=part[0].source, artifact=artifact.name, offset=part[1], length=part[2])
            if given is not merged:
                raise gone()


def _flatten(bench: Bench, merge: _Merge, run: BackupRun) -> SourceRef:
    """As the core does it: by the driver's own way, else by storing the result as a backup."""
    with bench.context() as ctx:
        store = bench.open()
        stored = store.flatten(merge, run, ctx)
        return (stored or store.backup(merge.artifacts, run, ctx)).source


def flatten(bench: Bench) -> None:
    """Flatten gives a new source with the merged bytes; the old ones still restore, also where it fails."""
    vm = bench.vm()
    full = bench.keep([Made("disk.vda.qcow2", SIZE, 11), *bench.artifacts()[1:]], bench.run(vm))
    run = replace(bench.run(vm, parent=full.run.point, builds_on=[full.source]), image=full.run.image)
    increment = bench.keep([Made("disk.vda.qcow2", SIZE, 12), *bench.artifacts()[1:]], run)
    parts: list[Part] = [
        b"tables".ljust(128 * KIB, b"\0"),
        (full, 64 * KIB, 6 * MIB),
        (increment, 128 * KIB, 64 * KIB),
        (increment, 5 * MIB, 64 * KIB),
        (full, SIZE - 4096, 4096),
    ]
    merged = (
        _Merged("disk.vda.qcow2", tuple(parts)),
        BytesArtifact(NAME, b'{"kit": "flattened"}'),
    )
    # Image, number and point stay those of the last backup that was merged; its source stays as well, whatever happens.
    result = replace(bench.run(vm), number=1, point=increment.run.point, image=full.run.image, date=DATE)
    with bench.refused(BackupError, what="a flatten of which a read fails"):
        broken = Failing(merged[0], merged[0].size - 1)
        _flatten(bench, _Merge((full.source, increment.source), (broken, *merged[1:])), result)
    bench.there(full, increment)
    source = _flatten(bench, _Merge((full.source, increment.source), merged), result)
    bench.made.append(source)
    if source in (full.source, increment.source):
        raise Failed("flatten returned the source of a backup that it merged")
    bench.same(Kept(source=source, run=result, artifacts=merged), full, increment)
    listed = {one.source: dict(one.labels) for one in bench.ours(vm)}
    if listed.get(source) != result.labels:
        raise Failed("the result of flatten is not listed with the labels of its run")
    with bench.context() as ctx:
        bench.open().delete([full.source, increment.source], ctx)
    bench.same(Kept(source=source, run=result, artifacts=merged))
