"""A flatten on the server: an object put together out of ranges of others; next to nothing of it passes through here.

S3 copies in parts of 5 MiB to 5 GiB; only an object's last part may be smaller. So a run of bytes that is long enough
is copied by the store, and what lies between two such runs is joined here to parts of at least 5 MiB, where need be
with bytes of the run that follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from backupcore.errors import BackupError, ContractViolation
from backupcore.model import Artifact, Copy, Literal
from backupcore_s3.bucket import Bucket
from backupcore_s3.failures import code, is_unknown_to_server
from backupcore_s3.keys import Place
from backupcore_s3.parts import LEAST, MOST

if TYPE_CHECKING:
    from backupcore import Context
    from backupcore_s3.writer import Writer

__all__ = ["Copied", "Joined", "Totals", "assemble", "cannot_copy", "cut", "totals"]

COPY = 512 << 20
"""Bytes that the store copies in one request: it answers when they are copied, and a request must not time out."""

_LARGEST_COPY = 5 << 30
_JOINED = 16 << 20  # bytes of a part that is joined here

_CANNOT = {"NotImplemented", "MethodNotAllowed", "InvalidPart", "EntityTooSmall", "InvalidPartOrder", "405", "501"}


@dataclass(frozen=True, slots=True)
class Copied:
    """A part that the store copies."""

    copy: Copy

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.copy.length


@dataclass(frozen=True, slots=True)
class Joined:
    """A part that is joined here, out of what is given and what is fetched."""

    pieces: tuple[Copy | Literal, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return sum(map(_length, self.pieces))


@dataclass(frozen=True, slots=True)
class Totals:
    """How many parts an object has, and how many of its bytes pass through this host."""

    parts: int
    joined: int


def _length(piece: Copy | Literal) -> int:
    return piece.length if isinstance(piece, Copy) else len(piece.data)


def _split(piece: Copy | Literal, at: int) -> tuple[Copy | Literal, Copy | Literal | None]:
    """The first `at` bytes of a piece, and the others, None if there are none."""
    if at >= _length(piece):
        return piece, None
    if isinstance(piece, Copy):
        rest = replace(piece, offset=piece.offset + at, length=piece.length - at)
        return replace(piece, length=at), rest
    return Literal(data=piece.data[:at]), Literal(data=piece.data[at:])


def _runs(pieces: Iterable[Copy | Literal]) -> Iterator[Copy | Literal]:
    """The pieces without empty ones; those that follow each other in one artifact are joined to one run."""
    run: Copy | None = None
    for piece in pieces:
        if not _length(piece):
            continue
        if run is not None:
            follows = (run.source, run.artifact, run.offset + run.length)
            if isinstance(piece, Copy) and (piece.source, piece.artifact, piece.offset) == follows:
                run = replace(run, length=run.length + piece.length)
                continue
            yield run
            run = None
        if isinstance(piece, Copy):
            run = piece
        else:
            yield piece
    if run is not None:
        yield run


def cut(pieces: Iterable[Copy | Literal], size: int) -> Iterator[Copied | Joined]:
    """The parts of an object of `size` bytes that is put together out of these pieces, made one by one."""
    most = min(max(COPY, -(-size // (MOST // 2))), _LARGEST_COPY)
    joined: list[Copy | Literal] = []
    filled = done = 0
    for run in _runs(pieces):
        left: Copy | Literal | None = run
        done += _length(run)
        while left is not None:
            lacking = max(0, LEAST - filled) if joined else 0
            if isinstance(left, Copy) and left.length >= lacking + LEAST:
                if lacking:
                    first, left = _split(left, lacking)
                    joined.append(first)
                if joined:
                    yield Joined(tuple(joined))
                    joined, filled = [], 0
                assert isinstance(left, Copy)
                yield from _copied(left, most)
                break
            first, left = _split(left, _JOINED - filled)
            joined.append(first)
            filled += _length(first)
            if filled == _JOINED:
                yield Joined(tuple(joined))
                joined, filled = [], 0
    if joined:
        yield Joined(tuple(joined))
    if done != size:
        raise ContractViolation(f"the pieces of a merge have {done} bytes in all, and not {size}")


def totals(parts: Iterable[Copied | Joined]) -> Totals:
    """What it would take to put them together."""
    count = joined = 0
    for part in parts:
        count += 1
        if isinstance(part, Joined):
            joined += part.size
    return Totals(count, joined)


def _copied(run: Copy, most: int) -> Iterator[Copied]:
    """A run of at least `LEAST` bytes in parts of at least as many."""
    count = -(-run.length // most)
    even = -(-run.length // count)
    for offset in range(0, run.length, even):
        yield Copied(replace(run, offset=run.offset + offset, length=min(even, run.length - offset)))


def assemble(
    writer: Writer,
    artifact: Artifact,
    parts: Iterable[Copied | Joined],
    sizes: Mapping[tuple[str, str], int],
    ctx: Context,
) -> None:
    """Make one object of the new source out of ranges of others; `sizes` are theirs, by token and artifact."""
    upload = writer.begin(artifact.name)

    def send(number: int, part: Copied | Joined) -> None:
        if isinstance(part, Copied):
            upload.copy(number, _key(part.copy, sizes), part.copy.offset, part.copy.length)
        else:
            data = memoryview(b"".join(_bytes(writer.bucket, piece, sizes, ctx) for piece in part.pieces))
            upload.send(number, lambda: data)
        writer.count(part.size)

    writer.crew.work(partial(send, number, part) for number, part in enumerate(parts, 1))
    writer.end(artifact, upload)


def _key(piece: Copy, sizes: Mapping[tuple[str, str], int]) -> str:
    place = Place.of_token(piece.source.token)
    size = sizes.get((piece.source.token, piece.artifact))
    if place is None or size is None or not 0 <= piece.offset <= piece.offset + piece.length <= size:
        raise ContractViolation(
            f"a merge wants {piece.length} bytes at {piece.offset} of {piece.source}'s {piece.artifact}"
        )
    return place.key(piece.artifact)


def _bytes(
    bucket: Bucket, piece: Copy | Literal, sizes: Mapping[tuple[str, str], int], ctx: Context
) -> bytes | bytearray:
    if isinstance(piece, Literal):
        return piece.data
    return bucket.read(_key(piece, sizes), piece.offset, piece.length, ctx.check)


def cannot_copy(error: BackupError) -> bool:
    """True if this server does not put an object together out of others as it was asked to."""
    return code(error) in _CANNOT or is_unknown_to_server(error)
