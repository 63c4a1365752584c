"""Flatten: a new source, and the old ones stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from backupcore.manifest import NAME
from backupcore.model import Artifact, BytesArtifact, Copy, Literal, SourceRef, stream
from backupcore.testing.bench import KIB, MIB, Bench, Failed, Kept
from backupcore.testing.given import Made
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
        parts = getattr(next(one for one in self.artifacts if one.name == artifact.name), "parts", None)
        if parts is None:
            yield Literal(data=artifact.read_at(0, artifact.size))
            return
        for part in parts:
            if isinstance(part, bytes):
                yield Literal(data=part)
            else:
                yield Copy(source=part[0].source, artifact=artifact.name, offset=part[1], length=part[2])


def flatten(bench: Bench) -> None:
    """Flatten gives a new source with the merged bytes; the old ones still restore."""
    vm = bench.vm()
    full = bench.keep([Made("disk.vda.qcow2", SIZE, 11), *bench.artifacts()[1:]], bench.run(vm))
    run = bench.run(vm, parent=full.run.point, builds_on=[full.source])
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
        Made("sums.vda", 960, 13),
        BytesArtifact("vm.xml", b"<domain/>"),
    )
    result = replace(bench.run(vm), number=1, date=DATE)
    with bench.context() as ctx:
        merge = _Merge((full.source, increment.source), merged)
        source = bench.open().flatten(merge, result, ctx).source
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
