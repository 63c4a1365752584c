"""The process that reads: `serve`, and all that runs there."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import pickle
import select
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, NoReturn, Protocol

from backupcore.disk.ahead import Coming
from backupcore.disk.crossing import crossing
from backupcore.disk.hashed import HashedDisk
from backupcore.disk.reader.channel import CALL, ERROR, KNOW, PIECE, READ, REPLY, REQUEST, RESULT, SLOT, mapped, send
from backupcore.errors import HypervisorError

if TYPE_CHECKING:
    from backupcore.disk.qcow2 import BlockReader, Blocks

__all__ = ["Source", "add", "complete", "connect", "drop", "forget", "load", "pair", "serve"]

_UNDER_WAY = SLOT // PIECE  # requests of a channel that are begun before the first of them is done
_LARGEST_CALL = 4 << 30
_RELEASED = "a disk was read after it had been released"


class Source(Protocol):
    """What can be read here: a `HashedDisk`, say."""

    def submit(self, offset: int, buffer: memoryview) -> Coming | None:
        """Begin to read straight into `buffer`; None where `read_into` has to do it."""

    def read_into(self, offset: int, buffer: memoryview, *, ahead: bool = True) -> int:
        """Fill `buffer` with the bytes from `offset` on; how many there were."""

    def close(self) -> None:
        """End its connections, for good."""


# Of this process: whatever is called here finds them without being handed them.
_sources: dict[int, Source] = {}
_memories: dict[int, memoryview] = {}  # of the owner's
_numbers = itertools.count(1)


def add(source: Source) -> int:
    """Called over a channel: have a source be read under the number that is returned."""
    number = next(_numbers)
    _sources[number] = source
    return number


def forget(numbers: Sequence[int]) -> None:
    """Called over a channel: memory of the owner's that is not there any more."""
    for number in numbers:
        _memories.pop(number, None)


def drop(number: int) -> None:
    """Called over a channel: close a source. Reads of it that are under way end with its error."""
    source = _sources.pop(number, None)
    if source is not None:
        source.close()


def load(number: int, first: int, end: int) -> None:
    """Called over a channel: `HashedDisk.load`."""
    _hashed(number).load(first, end)


def complete(number: int) -> None:
    """Called over a channel: `HashedDisk.complete`."""
    _hashed(number).complete()


def _hashed(number: int) -> HashedDisk:
    source = _sources.get(number)
    if not isinstance(source, HashedDisk):
        raise HypervisorError(_RELEASED)
    return source


def connect(blocks: Blocks) -> int:
    """Called over a channel: connect to a disk, and have it be read under the number that is returned."""
    return add(_Connected(blocks.connect()))


class _Connected:
    """The bytes of a disk themselves, over a connection."""

    def __init__(self, reader: BlockReader) -> None:
        self._reader = reader

    def submit(self, offset: int, buffer: memoryview) -> Coming:
        return Coming([self._reader.submit(offset, buffer)], len(buffer))

    def read_into(self, offset: int, buffer: memoryview, *, ahead: bool = True) -> int:
        self._reader.read_into(offset, buffer)
        return len(buffer)

    def close(self) -> None:
        self._reader.close()


def pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a control socket: the owner's, and the one for `serve`."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def serve(control: socket.socket) -> NoReturn:
    """Read for the owner at the other end of `control`, until that is closed. For a process that does nothing else.

    What it has inherited is let go of: a socket or a pipe that it kept open would look alive to somebody.
    """
    _alone(control.fileno())
    gc.freeze()  # what has been loaded stays
    gc.enable()
    try:
        while True:
            # The word alone would do to notice the end; the descriptors of one channel come with each.
            word, descriptors, _, _ = socket.recv_fds(control, 1, 2, socket.MSG_CMSG_CLOEXEC)
            if not word:
                break
            _admit(descriptors)
    finally:
        os._exit(0)  # threads may wait for a disk that does not answer


def _admit(descriptors: list[int]) -> None:
    """Serve a channel: its socket, and its slot. What is none is closed, which its owner sees."""
    try:
        connection, memory = descriptors
        slot = mapped(memory, SLOT)
        channel = _Channel(socket.socket(fileno=connection), slot)
    except (OSError, ValueError):  # not that
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        return
    os.close(memory)
    with contextlib.suppress(RuntimeError):  # no room for a thread
        channel.start()


def _alone(control: int) -> None:
    """Away from what forked us: its terminal, its signals, its descriptors."""
    with contextlib.suppress(OSError):  # the first of its session already
        os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the owner, who says when it is over
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names alone
        descriptor = int(name)
        # Not closed: an object of the process that forked us, which is collected later, would close another file of
        # that number. Standard error stays for a last word.
        if descriptor not in (control, 2, null):
            with contextlib.suppress(OSError):  # the listing's own
                os.fstat(descriptor)
                os.dup2(null, descriptor, inheritable=False)


class _Channel(threading.Thread):
    """The reader's end of one channel. This thread receives; what has come is hashed and answered by a second one."""

    def __init__(self, connection: socket.socket, slot: memoryview) -> None:
        super().__init__(name="channel", daemon=True)
        self._socket = connection
        self._slot = slot
        self._inbox = bytearray()
        self._descriptors: list[int] = []  # that came along, and are not taken yet
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._done: SimpleQueue[Callable[[], bytes] | None] = SimpleQueue()  # what makes the answers, in order
        self._answering: threading.Thread | None = None

    def run(self) -> None:
        """Answer requests until the owner has gone."""
        begun: deque[Coming | Callable[[], bytes]] = deque()
        try:
            while True:
                if not begun or (len(begun) < _UNDER_WAY and self._asked()):
                    begun.append(self._begin())
                else:
                    self._answer(_finished(begun.popleft()))
        except (OSError, EOFError):
            pass
        finally:
            for work in begun:
                if isinstance(work, Coming):  # until then somebody writes into the memory
                    with contextlib.suppress(Exception):
                        work.receive()
            for descriptor in self._descriptors:
                os.close(descriptor)
            if self._answering is not None:
                self._done.put(None)
                self._answering.join()
            self._socket.close()

    def _begin(self) -> Coming | Callable[[], bytes]:
        """Begin the next request: bytes that are coming, or what gives the answer when its turn has come."""
        what, memory, number, offset, place, length = REQUEST.unpack(self._take(REQUEST.size))
        if what == CALL and length <= _LARGEST_CALL:
            data = self._take(length)
            return lambda: _called(data)
        if what == KNOW and self._descriptors:
            descriptor = self._descriptors.pop(0)
            return lambda: _known(memory, descriptor, length)
        room = _memories.get(memory) if memory else self._slot
        if what != READ or room is None or place + length > len(room):
            raise EOFError  # nobody knows where the next request begins
        buffer = room[place : place + length]
        source = _sources.get(number)
        if source is None:
            return lambda: _failed(HypervisorError(_RELEASED))
        try:
            coming = source.submit(offset, buffer)
        except Exception as error:  # noqa: BLE001 - whoever asked raises it
            failed = _failed(error)
            return lambda: failed
        return coming or (lambda: _read(source, offset, buffer))

    def _answer(self, make: Callable[[], bytes]) -> None:
        if self._answering is None:
            self._answering = threading.Thread(target=self._send_answers, name="channel-answers", daemon=True)
            self._answering.start()
        self._done.put(make)

    def _send_answers(self) -> None:
        """Make the answers to what is done, and send them; the second thread's whole life."""
        with contextlib.suppress(OSError):
            while (make := self._done.get()) is not None:
                send(self._socket, make())
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # so that the first thread ends, too

    def _asked(self) -> bool:
        """Whether there is another request already."""
        return len(self._inbox) >= REQUEST.size or bool(self._poll.poll(0))

    def _take(self, length: int) -> bytes:
        inbox = self._inbox
        while len(inbox) < length:
            least = min(max(length - len(inbox), 4096), 1 << 20)
            data, descriptors, _, _ = socket.recv_fds(self._socket, least, 1, socket.MSG_CMSG_CLOEXEC)
            self._descriptors += descriptors
            if not data:
                raise EOFError
            inbox += data
        taken = bytes(inbox[:length])
        del inbox[:length]
        return taken


def _finished(work: Coming | Callable[[], bytes]) -> Callable[[], bytes]:
    """Do it here, but for the hashing of bytes: while the answer is made the next bytes are received here."""
    if not isinstance(work, Coming):
        answer = work()
        return lambda: answer
    try:
        work.receive()
    except Exception as error:  # noqa: BLE001 - whoever asked raises it
        failed = _failed(error)
        return lambda: failed
    return lambda: _arrived(work)


def _arrived(coming: Coming) -> bytes:
    try:
        return REPLY.pack(RESULT, coming.arrived())
    except Exception as error:  # noqa: BLE001 - whoever asked raises it
        return _failed(error)


def _read(source: Source, offset: int, buffer: memoryview) -> bytes:
    try:
        # Reading ahead is for the owner to ask for: both would read the disk twice.
        return REPLY.pack(RESULT, source.read_into(offset, buffer, ahead=False))
    except Exception as error:  # noqa: BLE001 - whoever asked raises it
        return _failed(error)


def _known(number: int, descriptor: int, size: int) -> bytes:
    try:
        _memories[number] = mapped(descriptor, size)
        return REPLY.pack(RESULT, 0)
    except (OSError, ValueError) as error:
        return _failed(error)
    finally:
        os.close(descriptor)


def _called(data: bytes) -> bytes:
    try:
        function, arguments = pickle.loads(data)  # noqa: S301 - from the owner, who started us
        found = pickle.dumps(function(*arguments), pickle.HIGHEST_PROTOCOL)
        return REPLY.pack(RESULT, len(found)) + found
    except BaseException as error:  # noqa: BLE001 - whoever asked raises it
        return _failed(error)


def _failed(error: BaseException) -> bytes:
    data = pickle.dumps(crossing(error), pickle.HIGHEST_PROTOCOL)
    return REPLY.pack(ERROR, len(data)) + data
