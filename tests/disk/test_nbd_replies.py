"""Replies of NBD servers that break the protocol on purpose, come in odd orders, or end half-way."""

from __future__ import annotations

import random
import signal
import struct
import threading
import time

import pytest

from backupcore.disk.extents import Extent, Kind
from backupcore.disk.nbd import (
    ALLOCATION,
    Client,
    ConnectionLost,
    NbdError,
    ProtocolError,
    RequestFailed,
    allocation,
)
from backupcore.disk.nbd.client import LONGEST_WAIT
from tests.disk import scripted_nbd as wire_words
from tests.disk.qemu_nbd import LIMIT, descriptors
from tests.disk.scripted_nbd import DONE, ScriptedServer

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BITMAP = "qemu:dirty-bitmap:b0"
SIZE = 4096


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


# Replies that go wrong: the connection cannot go on, since nobody knows where the next reply starts.

NAMES = {1: ALLOCATION, 2: BITMAP}


def one_request(answer):
    def script(wire):
        wire.negotiate(SIZE, NAMES)
        answer(wire, wire.request())
        assert wire.ended()

    return script


BAD_READS = {
    "magic": lambda w, r: w.send(bytes(20)),
    "unknown cookie": lambda w, r: w.chunk(r.cookie + 1, wire_words.NONE),
    "before the range": lambda w, r: w.data(r, r.offset - 1, b"x"),
    "past the range": lambda w, r: w.data(r, r.offset + 1, bytes(r.length)),
    "past the export": lambda w, r: w.data(r, 1 << 63, b"x"),
    "no data": lambda w, r: w.data(r, r.offset, b""),
    "short data chunk": lambda w, r: w.chunk(r.cookie, wire_words.DATA, b"1234"),
    "hole past the range": lambda w, r: w.hole(r, r.offset, r.length + 1),
    "giant hole": lambda w, r: w.hole(r, r.offset, 0xFFFFFFFF),
    "empty hole": lambda w, r: w.hole(r, r.offset, 0),
    "long hole chunk": lambda w, r: w.chunk(r.cookie, wire_words.HOLE, bytes(13)),
    "gap": lambda w, r: (w.data(r, r.offset, b"x", 0), w.hole(r, r.offset + 2, r.length - 2)),
    "end missing": lambda w, r: w.data(r, r.offset, b"x"),
    "start missing": lambda w, r: w.data(r, r.offset + 1, bytes(r.length - 1)),
    "nothing": lambda w, r: w.chunk(r.cookie, wire_words.NONE),
    "twice": lambda w, r: (w.data(r, r.offset, bytes(r.length), 0), w.data(r, r.offset, b"x")),
    "block status": lambda w, r: w.status(r, 1, (r.length, 0)),
    "unknown type": lambda w, r: w.chunk(r.cookie, 77),
    "none with bytes": lambda w, r: w.chunk(r.cookie, wire_words.NONE, b"x"),
    "none, not final": lambda w, r: w.chunk(r.cookie, wire_words.NONE, b"", 0),
    "error 0": lambda w, r: w.error(r, 0),
    "short error": lambda w, r: w.chunk(r.cookie, wire_words.ERROR, b"12345"),
    "error text too long": lambda w, r: w.chunk(r.cookie, wire_words.ERROR, struct.pack(">IH", 5, 9)),
    "giant error": lambda w, r: w.send(struct.pack(">IHHQI", 0x668E33EF, DONE, wire_words.ERROR, r.cookie, 1 << 31)),
    "error outside": lambda w, r: w.error(r, 5, "x", r.offset + r.length),
    "simple success": lambda w, r: w.send(struct.pack(">IIQ", 0x67446698, 0, r.cookie)),
}


@pytest.mark.parametrize("answer", BAD_READS.values(), ids=BAD_READS)
def test_a_read_answered_wrongly(answer):
    with ScriptedServer(one_request(answer)) as server:
        client = Client(server.address, list(NAMES.values()))
        guard = bytearray(b"#" * 1200)
        with pytest.raises(ProtocolError, match=f"'disk' on {server.address.socket}: the server broke the protocol"):
            client.read_into(1000, memoryview(guard)[100:1100])
        assert guard[:100] == guard[1100:] == b"#" * 100
        with pytest.raises(ProtocolError):  # no further request is tried
            client.read(0, 1)


def both(w, r, **rest):
    w.status(r, 1, (r.length, 0), flags=0)
    w.status(r, 2, (r.length, 0), **rest)


BAD_STATUS = {
    "unknown context": lambda w, r: w.status(r, 3, (r.length, 0)),
    "a context twice": lambda w, r: (w.status(r, 1, (9, 0), flags=0), w.status(r, 1, (9, 0))),
    "a context missing": lambda w, r: w.status(r, 1, (r.length, 0)),
    "nothing": lambda w, r: w.chunk(r.cookie, wire_words.NONE),
    "an empty extent": lambda w, r: w.status(r, 1, (0, 0)),
    "no extent": lambda w, r: w.status(r, 1),
    "odd length": lambda w, r: w.chunk(r.cookie, wire_words.STATUS, bytes(13)),
    "giant": lambda w, r: w.send(struct.pack(">IHHQI", 0x668E33EF, DONE, 5, r.cookie, (1 << 31) + 4)),
    "data": lambda w, r: w.data(r, r.offset, bytes(r.length)),
    "a chunk too many": lambda w, r: (both(w, r), w.status(r, 2, (9, 0))),
}


@pytest.mark.parametrize("answer", BAD_STATUS.values(), ids=BAD_STATUS)
def test_a_block_status_answered_wrongly(answer):
    def script(wire):
        wire.negotiate(SIZE, NAMES)
        answer(wire, wire.request())
        # What follows a complete reply is only seen by the next request.
        while not wire.ended():
            wire.receive(27)

    with ScriptedServer(script) as server:
        client = Client(server.address, list(NAMES.values()))

        def ask_twice():
            for _ in range(2):
                client.block_status(0, 1000)

        with pytest.raises(ProtocolError, match="the server broke the protocol"):
            ask_twice()


# Replies that are unusual and right


def test_replies_out_of_order_and_interleaved():
    def script(wire):
        wire.negotiate(SIZE)
        one, two, three = wire.request(), wire.request(), wire.request()
        wire.data(three, three.offset, b"3" * 100)
        wire.data(one, one.offset + 50, b"b" * 50, 0)
        wire.hole(two, two.offset, 60, 0)
        wire.data(one, one.offset, b"a" * 50, 0)
        wire.data(two, two.offset + 60, b"2" * 40, 0)
        wire.chunk(two.cookie, wire_words.NONE)
        wire.chunk(one.cookie, wire_words.NONE)
        assert wire.request().command == wire_words.DISC
        assert wire.ended()

    with ScriptedServer(script) as server, Client(server.address) as client:
        buffers = [bytearray(b"#" * 100) for _ in range(3)]
        for request in [client.submit(index * 1000, buffer) for index, buffer in enumerate(buffers)]:
            request.result()
        assert buffers == [b"a" * 50 + b"b" * 50, bytes(60) + b"2" * 40, b"3" * 100]


def test_errors_of_a_request_and_what_comes_after_them():
    def script(wire):
        wire.negotiate(SIZE, NAMES)
        request = wire.request()
        wire.data(request, request.offset, b"x", 0)
        wire.error(request, 5, "bad\nsector", request.offset + 1, flags=0)
        wire.error(request, 22, "and more")
        wire.error(wire.request(), 12)
        request = wire.request()
        wire.send(struct.pack(">IIQ", 0x67446698, 22, request.cookie))
        wire.chunk(wire.request().cookie, 40000, struct.pack(">IH", 5, 0) + b"of a type not known yet")
        request = wire.request()
        wire.data(request, request.offset, b"fine")
        assert wire.request().command == wire_words.DISC

    with ScriptedServer(script) as server, Client(server.address, list(NAMES.values())) as client:
        for call, number, message in [
            (lambda: client.read(0, 100), 5, r"read of 100 bytes at 0 failed: Input/output error \(bad sector\)"),
            (lambda: client.read(0, 100), 12, "Cannot allocate memory"),
            (lambda: client.block_status(7, 100), 22, "block status of 100 bytes at 7 failed: Invalid argument"),
            (lambda: client.read(0, 100), 5, "Input/output error"),
        ]:
            with pytest.raises(RequestFailed, match=message) as caught:
                call()
            assert caught.value.errno == number
        assert client.read(0, 4) == b"fine"


def test_contexts_that_end_at_different_places():
    def script(wire):
        wire.negotiate(SIZE, NAMES)
        request = wire.request()
        assert (request.offset, request.length) == (96, 4000)
        wire.status(request, 2, (10, 1), (5000, 0), flags=0)  # past the request, and past the export
        wire.status(request, 1, (1000, 3), (500, 0))
        request = wire.request()
        assert (request.offset, request.length) == (1596, 2500)
        both(wire, request)
        assert wire.request().command == wire_words.DISC

    with ScriptedServer(script) as server, Client(server.address, [ALLOCATION, BITMAP]) as client:
        assert client.block_status(96, 4000) == {
            ALLOCATION: [(1000, 3), (500, 0), (2500, 0)],
            BITMAP: [(10, 1), (1490, 0), (2500, 0)],
        }


def test_a_hole_is_zero_only_where_the_server_says_so():
    def script(wire):
        wire.negotiate(SIZE, {1: ALLOCATION})
        wire.status(wire.request(), 1, (1, 0), (1, 1), (1, 2), (SIZE - 3, 3))
        assert wire.request().command == wire_words.DISC

    with ScriptedServer(script) as server, Client(server.address, [ALLOCATION]) as client:
        assert list(allocation(client, 0, SIZE)) == [Extent(0, 2, Kind.DATA), Extent(2, SIZE - 2, Kind.ZERO)]


def test_requests_keep_to_the_blocks_of_the_server():
    asked = []

    def script(wire):
        wire.negotiate(1 << 20, {1: ALLOCATION}, (512, 4096, 8192))
        while (request := wire.request()).command != wire_words.DISC:
            asked.append((request.offset, request.length))
            if request.command == wire_words.READ:
                wire.data(request, request.offset, bytes([len(asked)]) * request.length)
            else:
                wire.status(request, 1, (request.length, 0))

    with ScriptedServer(script) as server, Client(server.address, [ALLOCATION]) as client:
        content = client.read(1000, 17000)
        assert content == b"\1" * (8192 + 512 - 1000) + b"\2" * 8192 + b"\3" * (17000 - 8192 * 2 - 512 + 1000)
        assert client.block_status(1000, 17000) == {ALLOCATION: [(17000, 0)]}
    assert asked == [(512, 8192), (8704, 8192), (16896, 1536), (512, 17920)]


# The end


def test_close_ends_the_calls_of_all_threads():
    seen = []
    both_asked = threading.Event()

    def script(wire):
        wire.negotiate(SIZE)
        request = wire.request()
        wire.send(struct.pack(">IHHQI", 0x668E33EF, 0, wire_words.DATA, request.cookie, 108))
        wire.send(request.offset.to_bytes(8), bytes(50))  # half a chunk
        wire.request()
        both_asked.set()
        assert wire.ended()  # and no NBD_CMD_DISC, while requests are in flight

    def work():
        try:
            client.read(0, 100)
        except NbdError as error:
            seen.append(error)

    with ScriptedServer(script) as server:
        client = Client(server.address)
        threads = [threading.Thread(target=work) for _ in range(2)]  # one receives, one waits for it
        for thread in threads:
            thread.start()
        assert both_asked.wait(LIMIT)
        client.close()
        for thread in threads:
            thread.join(LIMIT)
        assert [type(error) for error in seen] == [ConnectionLost] * 2
        assert "closed here" in str(seen[0])
        client.close()
        with pytest.raises(ConnectionLost, match="closed here"):
            client.read(0, 1)


@pytest.mark.parametrize("raises", [False, True], ids=["closes", "raises"])
def test_a_signal_handler_in_the_middle_of_a_read(raises):
    """A cancel arrives as a signal, in the very thread that is reading."""
    before = descriptors()

    def handler(number, frame):
        if raises:
            raise KeyboardInterrupt
        client.close()

    def script(wire):
        wire.negotiate(SIZE)
        wire.request()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        assert wire.ended()

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        with ScriptedServer(script) as server:
            client = Client(server.address)
            with pytest.raises(KeyboardInterrupt if raises else ConnectionLost):
                client.read(0, 100)
            with pytest.raises(ConnectionLost, match="interrupted" if raises else "closed here"):
                client.read(0, 100)
        assert descriptors() <= before
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_a_server_that_dies_in_the_middle_of_a_chunk():
    def script(wire):
        wire.negotiate(SIZE)
        request = wire.request()
        wire.send(struct.pack(">IHHQI", 0x668E33EF, 1, wire_words.DATA, request.cookie, 108), bytes(30))

    with ScriptedServer(script) as server, Client(server.address) as client:
        with pytest.raises(ConnectionLost, match=f"'disk' on {server.address.socket}: the connection was lost"):
            client.read(0, 100)
        assert ConnectionLost.connection_lost


def test_a_server_that_stalls_is_waited_for():
    def script(wire):
        wire.negotiate(SIZE)
        for request in (wire.request(), wire.request()):
            time.sleep(LONGEST_WAIT * 1.2)
            wire.send(struct.pack(">IHHQI", 0x668E33EF, 1, wire_words.DATA, request.cookie, 108))
            wire.send(request.offset.to_bytes(8), b"a" * 50)
            time.sleep(LONGEST_WAIT * 1.2)
            wire.send(b"b" * 50)
        assert wire.request().command == wire_words.DISC

    with ScriptedServer(script) as server, Client(server.address) as client:
        one, two = bytearray(100), bytearray(100)
        pending = client.submit(0, one), client.submit(100, two)
        for request in pending:
            request.result()
        assert one == two == b"a" * 50 + b"b" * 50
