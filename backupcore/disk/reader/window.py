"""A place on a disk at which an owner reads forwards, over one channel: what comes next is asked for ahead."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from backupcore.disk.reader.channel import PIECE, SLOT, Channel
from backupcore.errors import ContractViolation

__all__ = ["Target", "Window"]

PLACES = SLOT // PIECE
"""Pieces of a slot: one is copied from while the others come."""

_STRAIGHT = -1  # the place of a piece that comes into the reader's buffer by itself
_KEPT_AT_WORK = 2 * PIECE
"""Bytes asked for ahead of reads that the reader itself fills: with one piece it waits for us between two reads."""
_PER_AHEAD = 2
"""Of so many bytes that were read forwards one is asked for ahead: somebody may want no more than a part."""


class Target(NamedTuple):
    """Where the bytes of a read shall lie in memory that the reader fills: its number, and the place in it."""

    memory: int
    place: int


class Window:
    """A channel, and what of one source has been asked for over it. For one thread at a time.

    A piece ends where a multiple of its size of the source does, as the blocks do that are received without a copy.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._source = 0
        self._position = 0  # where the reader stands
        self._asked = 0  # up to where all has been asked for
        self._forwards = 0  # bytes that were read one after the other, to here
        self._coming: deque[tuple[int, int]] = deque()  # length of each piece without an answer, and place or _STRAIGHT
        self._here = memoryview(b"")  # what is left of the piece that lies in the slot
        self._next_place = 0

    @property
    def in_use(self) -> bool:
        """Whether it stands anywhere."""
        return self._source != 0

    @property
    def is_written_to(self) -> bool:
        """Whether something may still come straight into a buffer of a read that has ended."""
        return any(place == _STRAIGHT for _, place in self._coming)

    def stands_at(self, source: int, offset: int) -> bool:
        """Whether a read of this source at this place goes on where the last one ended."""
        return self._source == source != 0 and self._position == offset

    def move(self, source: int, offset: int) -> None:
        """Stand there, with nothing under way if it is another place."""
        if not self.stands_at(source, offset):
            self._source = 0
            self._settle()
            self._here = memoryview(b"")
            self._source, self._position, self._asked, self._forwards = source, offset, offset, 0
            self._next_place = 0

    def read_into(self, buffer: memoryview, size: int, target: Target | None = None, *, forwards: bool = False) -> None:
        """Fill the buffer from where the window stands, and move behind it.

        `size` is where the source ends, `target` where the buffer lies if the reader can fill it. With `forwards` all
        that the slot holds is asked for ahead, otherwise what is likely to be wanted.
        """
        ahead = SLOT if forwards else self._forwards // _PER_AHEAD
        if target is not None:
            ahead = min(ahead, _KEPT_AT_WORK)  # more would be copied
        start, end = self._position, self._position + len(buffer)
        through = min(-(-(end + ahead) // PIECE) * PIECE if ahead >= PIECE else end, size)
        try:
            while self._position < end:
                if not self._here:
                    self._ask(through, start, end, target)
                    self._take()
                rest = buffer[self._position - start :]
                part = min(len(self._here), len(rest))
                rest[:part] = self._here[:part]
                self._here = self._here[part:]
                self._position += part
        except BaseException:
            self._source = 0
            if self.channel.in_step:
                self._settle()  # the caller gets his buffer back: nothing may be written there any more
            raise
        self._forwards += len(buffer)
        self._ask(through, start, end, target)

    def _ask(self, through: int, start: int, end: int, target: Target | None) -> None:
        """Ask for what comes up to `through`: up to `end` to the target, if there is one, the rest to the slot."""
        room = PLACES - sum(place != _STRAIGHT for _, place in self._coming) - bool(self._here)
        requests = []
        while self._asked < through:
            straight = target is not None and self._asked < end
            length = min(PIECE - self._asked % PIECE, (end if straight else through) - self._asked)
            if target is not None and straight:
                request = (target.memory, self._source, self._asked, target.place + self._asked - start, length)
                self._coming.append((length, _STRAIGHT))
            elif room:
                request = (0, self._source, self._asked, self._next_place, length)
                self._coming.append((length, self._next_place))
                self._next_place = (self._next_place + PIECE) % SLOT
                room -= 1
            else:
                break
            requests.append(request)
            self._asked += length
        if requests:
            self.channel.read(*requests)

    def _take(self) -> None:
        """Wait for the oldest piece that was asked for."""
        length, place = self._coming.popleft()
        count = self.channel.answer()
        if count != length:
            raise ContractViolation(f"{count} bytes were read of {length}")
        if place == _STRAIGHT:
            self._position += length
        else:
            self._here = self.channel.slot[place : place + length]

    def _settle(self) -> None:
        """Wait for all that is under way, whatever comes of it. Raises what ends the channel."""
        while self._coming:
            try:
                self._take()
            except Exception:  # of bytes that nobody wants any more
                if not self.channel.in_step:
                    raise
