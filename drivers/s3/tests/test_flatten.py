"""A flatten on the server: the right bytes, next to none of them through this host, and a way out where it cannot."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
from s3_proxy import Proxy

from backupcore.context import Context
from backupcore.errors import ContractViolation, SourceNotFound, TargetUnavailable
from backupcore.model import Artifact, BackupRun, BytesArtifact, Copy, Literal, SourceRef
from backupcore_s3 import S3
from backupcore_s3.flatten import Copied, Joined, cut, totals
from lab.s3_server import SeaweedFS

Options = Callable[..., S3]
Runs = Callable[..., BackupRun]
Artifacts = Callable[..., list[BytesArtifact]]

MiB = 1 << 20


class MadeMerge:
    """A merge of disks that lie in memory; `pieces` are those of its disk."""

    def __init__(self, disks: dict[SourceRef, bytes], pieces: Sequence[Copy | Literal]) -> None:
        self.sources = list(disks)
        self._disks = disks
        self._pieces = pieces
        self.artifacts: list[Artifact] = [
            BytesArtifact("disk.vda.qcow2", b"".join(map(self._bytes, pieces))),
            BytesArtifact("manifest.json", b'{"format": 1}'),
            BytesArtifact("sums.vda", b"sums"),
            BytesArtifact("vm.xml", b"<domain/>"),
        ]

    def _bytes(self, piece: Copy | Literal) -> bytes:
        if isinstance(piece, Literal):
            return piece.data
        return self._disks[piece.source][piece.offset : piece.offset + piece.length]

    def pieces(self, artifact: Artifact) -> Iterable[Copy | Literal]:
        if artifact.name != "disk.vda.qcow2":
            raise AssertionError("what is no disk is small")
        return iter(self._pieces)


def copy(source: SourceRef, offset: int, length: int) -> Copy:
    return Copy(source=source, artifact="disk.vda.qcow2", offset=offset, length=length)


@pytest.fixture
def proxy(seaweed: SeaweedFS) -> Iterator[Proxy]:
    made = Proxy(seaweed.url)
    yield made
    made.stop()


@pytest.fixture
def chain(
    driver: S3, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> tuple[BackupRun, dict[SourceRef, bytes]]:
    """A full of 13 MiB and two increments of 7."""
    run = make_run()
    kept = {}
    for size in (13 * MiB, 7 * MiB, 7 * MiB):
        artifacts = make_artifacts(size)
        kept[driver.backup(artifacts, run, ctx).source] = artifacts[0].data
    return run, kept


def merged(kept: dict[SourceRef, bytes]) -> MadeMerge:
    """New tables, the full's data as they lie, and what wins of the increments: long runs, islands, a short end."""
    full, first, second = kept
    islands = [copy(second, place, 64 << 10) for place in range(5 * MiB, 7 * MiB, 128 << 10)]
    pieces = [
        Literal(data=os.urandom(256 << 10)),
        Literal(data=b""),
        copy(full, 128 << 10, 4 * MiB),
        copy(full, (128 << 10) + 4 * MiB, 8 * MiB),  # follows the one before: one run
        copy(first, 64 << 10, 6 * MiB),
        copy(second, 0, 5 * MiB),
        *islands,
        copy(first, 0, 1),
    ]
    return MadeMerge(kept, pieces)


def test_the_store_copies(
    options: Options, driver: S3, bucket: str, proxy: Proxy, ctx: Context, client: Any, chain: Any
) -> None:
    run, kept = chain
    merge = merged(kept)
    through = options(bucket, endpoint_url=proxy.url, concurrency=2)
    stored = through.flatten(merge, run, ctx)
    assert stored is not None
    assert stored.source not in kept
    assert proxy.sent + proxy.received < 15 * MiB, f"of {merge.artifacts[0].size}"
    for got, due in zip(driver.restore(stored.source, ctx), merge.artifacts, strict=True):
        with got.open() as file, due.open() as expected:
            assert (got.name, file.read()) == (due.name, expected.read())
    assert {one.source for one in driver.sources(ctx)} == {stored.source, *kept}
    for source, data in kept.items():
        with driver.restore(source, ctx)[0].open() as file:
            assert file.read() == data
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")


@pytest.mark.parametrize(
    ("pattern", "status", "code"),
    [
        (r"PUT .*partNumber=3", 501, "NotImplemented"),
        (r"POST .*uploadId=", 400, "InvalidPart"),  # a server that wants parts of one size
    ],
)
def test_a_server_that_cannot_copy(
    options: Options,
    bucket: str,
    proxy: Proxy,
    ctx: Context,
    client: Any,
    chain: Any,
    pattern: str,
    status: int,
    code: str,
) -> None:
    run, kept = chain
    proxy.answer(pattern, status, code)
    assert options(bucket, endpoint_url=proxy.url).flatten(merged(kept), run, ctx) is None
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")
    assert len(client.list_objects_v2(Bucket=bucket)["Contents"]) == 3 * 5


def test_a_failure_is_no_way_out(
    options: Options, bucket: str, proxy: Proxy, ctx: Context, client: Any, chain: Any
) -> None:
    run, kept = chain
    proxy.answer(r"PUT .*partNumber=3", 503, "SlowDown")
    with pytest.raises(TargetUnavailable):
        options(bucket, endpoint_url=proxy.url, retries=0).flatten(merged(kept), run, ctx)
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")
    assert len(client.list_objects_v2(Bucket=bucket)["Contents"]) == 3 * 5


def test_too_many_pieces_are_left_to_the_core(driver: S3, ctx: Context, chain: Any) -> None:
    run, kept = chain
    full = next(iter(kept))
    islands = [copy(full, place, 64 << 10) for place in range(0, 12 * MiB, 128 << 10)]
    assert driver.flatten(MadeMerge(kept, islands), run, ctx) is None


def test_what_is_no_part_of_the_merge_is_never_copied(driver: S3, ctx: Context, chain: Any, make_run: Runs) -> None:
    run, kept = chain
    full, _, second = kept
    for wrong in (copy(second, 0, 8 * MiB), copy(second, 0, 6 * MiB)):
        merge = MadeMerge(kept, [copy(full, 0, 12 * MiB), wrong])
        if wrong.length == 6 * MiB:
            merge.sources.remove(second)
        merge.artifacts[0] = BytesArtifact("disk.vda.qcow2", bytes(12 * MiB + wrong.length))
        with pytest.raises(ContractViolation, match="a merge wants"):
            driver.flatten(merge, run, ctx)
    gone = SourceRef(f"{run.vm.uuid}.{'0' * 32}")
    merge = MadeMerge(kept, [copy(full, 0, 12 * MiB)])
    merge.sources.append(gone)
    with pytest.raises(SourceNotFound):
        driver.flatten(merge, run, ctx)


def test_parts_keep_to_the_limits_of_s3() -> None:
    source = SourceRef("a")
    chance = random.Random(7)
    for _ in range(300):
        pieces: list[Copy | Literal] = []
        offset = 0
        for _ in range(chance.randrange(1, 60)):
            length = chance.choice((0, 1, 65536, chance.randrange(1 << 20), chance.randrange(12 * MiB), 40 * MiB))
            offset += chance.choice((0, 65536))
            if chance.random() < 0.2:
                pieces.append(Literal(data=bytes(length % 99999)))
            else:
                pieces.append(copy(source, offset, length))
                offset += length
        size = sum(one.length if isinstance(one, Copy) else len(one.data) for one in pieces)
        parts = list(cut(pieces, size))
        assert sum(part.size for part in parts) == size
        assert all(part.size >= 5 * MiB for part in parts[:-1])
        assert all(part.size <= 16 * MiB for part in parts if isinstance(part, Joined))
        assert _flat(pieces) == _flat(
            piece for part in parts for piece in ((part.copy,) if isinstance(part, Copied) else part.pieces)
        )
        assert totals(parts).parts == len(parts)
    with pytest.raises(ContractViolation, match="and not 5"):
        list(cut([Literal(data=b"four")], 5))


def test_the_largest_objects() -> None:
    source, size = SourceRef("a"), 5 << 40
    parts = list(cut([copy(source, 0, 3 * MiB), copy(source, 9 * MiB, size - 3 * MiB)], size))
    assert len(parts) <= 10_000
    assert max(part.size for part in parts) <= 5 << 30
    assert totals(parts).joined == 5 * MiB


def _flat(pieces: Iterable[Copy | Literal]) -> list[tuple[object, ...]]:
    """The pieces without empty ones, neighbours joined."""
    found: list[tuple[object, ...]] = []
    for piece in pieces:
        if isinstance(piece, Literal):
            if found and found[-1][0] == "literal":
                found[-1] = ("literal", found[-1][1] + piece.data)  # type: ignore[operator]
            elif piece.data:
                found.append(("literal", piece.data))
        elif found and found[-1][0] == "copy" and found[-1][1] + found[-1][2] == piece.offset:  # type: ignore[operator]
            found[-1] = ("copy", found[-1][1], found[-1][2] + piece.length)  # type: ignore[operator]
        elif piece.length:
            found.append(("copy", piece.offset, piece.length))
    return found
