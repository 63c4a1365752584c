"""The NBD client against real servers (`qemu-nbd`), and against one that breaks the protocol on purpose."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import signal
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backupcore.disk.extents import Extent, Kind, complement, intersect
from backupcore.disk.nbd import (
    ALLOCATION,
    Address,
    Client,
    ConnectionLost,
    NbdError,
    ProtocolError,
    RequestFailed,
    allocation,
    changes,
    dirty,
)
from backupcore.disk.nbd.client import LONGEST_WAIT
from tests.disk import scripted_nbd as wire_words
from tests.disk.qemu_nbd import LIMIT, QemuNbd, run
from tests.disk.scripted_nbd import ACK, DONE, ERR_UNKNOWN, ERR_UNSUP, GO, INFO, META, SET_META, ScriptedServer

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BITMAP = "qemu:dirty-bitmap:b0"
SIZE = 4096


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# Real servers


@pytest.mark.parametrize("size", [513, 1000, 65536 + 1, 3 * MIB + 513])
def test_raw_images_of_any_size(tmp_path, size):
    content = noise(size)
    image = tmp_path / "disk.raw"
    image.write_bytes(content)
    with QemuNbd(image, "raw") as server, Client(server.address, [ALLOCATION]) as client:
        # QEMU counts in sectors: it serves the last one whole, with zeros after the end of the file.
        assert client.size == -(-size // 512) * 512
        content = content.ljust(client.size, b"\0")
        assert client.read_only
        assert client.read(0, client.size) == content
        for offset, length in [(0, 1), (511, 2), (client.size - 1, 1), (0, 0), (client.size, 0), (7, client.size - 20)]:
            assert client.read(offset, length) == content[offset : offset + length]
        extents = list(allocation(client, 0, client.size))
        assert sum(extent.length for extent in extents) == client.size


def test_qcow2_of_an_odd_size(tmp_path):
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", image)
    with image.open("r+b") as file:  # qemu-img rounds sizes up; the format has the size in bytes, at offset 24
        file.seek(24)
        file.write((MIB - 300).to_bytes(8))
    with QemuNbd(image, "qcow2") as server, Client(server.address) as client:
        assert client.size % 512 == 0
        assert client.read(0, client.size).strip(b"\7").strip(b"\0") == b""


def test_ranges_outside_of_the_export_are_refused_before_they_are_sent(tmp_path):
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(SIZE))
    with QemuNbd(image, "raw") as server, Client(server.address, [ALLOCATION]) as client:
        for offset, length in [(0, SIZE + 1), (SIZE, 1), (-1, 1), (1 << 62, 1)]:
            with pytest.raises(ValueError, match="outside of NBD export ''"):
                client.read(offset, length)
            with pytest.raises(ValueError, match="outside of NBD export ''"):
                client.block_status(offset, length)
        with pytest.raises(ValueError, match="read-only"):
            client.read_into(0, memoryview(b"constant"))
        assert client.read(0, 1) == b"\0"


def test_block_status_far_past_4_gib(tmp_path):
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "5T")
    places = [0, 4 * GIB - 65536, 4 * GIB, 9 * GIB, 5 * 1024 * GIB - 65536]
    writes = [part for at in places for part in ("-c", f"write -P 1 {at} 64k")]
    run("qemu-io", "-f", "qcow2", *writes, image)
    with QemuNbd(image, "qcow2") as server, Client(server.address, [ALLOCATION]) as client:
        (entries,) = client.block_status(0, client.size).values()
        assert sum(length for length, _ in entries) == client.size
        extents = list(allocation(client, 0, client.size))
        data = [(extent.offset, extent.length) for extent in extents if extent.kind is Kind.DATA]
        assert data == [(0, 65536), (4 * GIB - 65536, 131072), (9 * GIB, 65536), (5 * 1024 * GIB - 65536, 65536)]
        assert list(complement(extents, client.size)) == []
        middle = list(allocation(client, 4 * GIB - 1000, 2000))
        assert middle == [Extent(4 * GIB - 1000, 2000, Kind.DATA)]


def test_dirty_bitmap_and_zeroed_blocks(tmp_path):
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 32M", image)
    run("qemu-img", "bitmap", "--add", image, "b0")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 3M", "-c", "write -z 10M 1M", "-c", "write -P 3 40M 1", image)
    with QemuNbd(image, "qcow2", bitmaps=["b0"]) as server, Client(server.address, [BITMAP, ALLOCATION]) as client:
        assert client.contexts == (BITMAP, ALLOCATION)
        assert list(dirty(client, BITMAP, 0, client.size)) == [(MIB, 3 * MIB), (10 * MIB, MIB), (40 * MIB, 65536)]
        assert list(changes(client, BITMAP, 0, client.size)) == [
            Extent(MIB, 3 * MIB, Kind.DATA),
            Extent(10 * MIB, MIB, Kind.ZERO),
            Extent(40 * MIB, 65536, Kind.DATA),
        ]
        assert list(dirty(client, BITMAP, 2 * MIB + 5, 100)) == [(2 * MIB + 5, 100)]
        with pytest.raises(ValueError, match="qemu:dirty-bitmap:other"):
            list(dirty(client, "qemu:dirty-bitmap:other", 0, 1))


def test_missing_context_and_missing_export_are_named(tmp_path):
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(SIZE))
    before = descriptors()
    with QemuNbd(image, "raw", export="vda") as server:
        with pytest.raises(NbdError, match=r"'vda'.*no metadata context 'qemu:dirty-bitmap:b0'"):
            Client(server.address, [ALLOCATION, BITMAP])
        for contexts in ([], [ALLOCATION]):
            with pytest.raises(NbdError, match=r"'vdb'.*no such export"):
                Client(Address(server.address.socket, "vdb"), contexts)
        with Client(server.address) as client:  # the server has not suffered
            assert client.read(0, 1) == b"\0"
    assert descriptors() == before


@st.composite
def writes(draw, size):
    """Commands of qemu-io, with the range that each may touch."""
    found = []
    for _ in range(draw(st.integers(0, 6))):
        offset = draw(st.integers(0, size - 1))
        length = draw(st.integers(1, min(size - offset, 400_000)))
        if draw(st.booleans()):  # whole clusters, as guests discard and zero
            offset -= offset % 65536
            length = min(-(-length // 65536) * 65536, size - offset)
        pattern = draw(st.integers(0, 255))
        command = draw(st.sampled_from([f"write -P {pattern}", "write -z", "write -z -u", "discard"]))
        found.append((f"{command} {offset} {length}", offset, length))
    return found


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(["raw", "qcow2"]), st.integers(1, 4000))
def test_reads_and_block_status_agree_with_qemu_img(tmp_path, data, form, sectors):
    size = sectors * 512
    image, truth = tmp_path / f"disk.{form}", tmp_path / "truth.raw"
    image.unlink(missing_ok=True)
    run("qemu-img", "create", "-q", "-f", form, image, str(size))

    def write(commands):
        arguments = [part for command, _, _ in commands for part in ("-c", command)]
        if arguments:
            run("qemu-io", "-d", "unmap", "-f", form, *arguments, image)
        run("qemu-img", "convert", "-f", form, "-O", "raw", image, truth)
        return truth.read_bytes()

    old = write(data.draw(writes(size)))
    bitmaps = ["b0"] if form == "qcow2" else []
    for name in bitmaps:
        run("qemu-img", "bitmap", "--add", image, name)
    later = data.draw(writes(size))
    new = write(later)

    contexts = [ALLOCATION, *(f"qemu:dirty-bitmap:{name}" for name in bitmaps)]
    with QemuNbd(image, form, bitmaps=bitmaps) as server, Client(server.address, contexts) as client:
        assert client.size == size
        assert client.read(0, size) == new
        mapped = json.loads(run("qemu-img", "map", "--output=json", "-f", form, image))
        expected = "".join(("Z" if part["zero"] else "D") * part["length"] for part in mapped)
        extents = list(allocation(client, 0, size))
        assert "".join(("Z" if part.kind is Kind.ZERO else "D") * part.length for part in extents) == expected
        assert all(not any(new[part.offset : part.end]) for part in extents if part.kind is Kind.ZERO)

        offset = data.draw(st.integers(0, size - 1))
        length = data.draw(st.integers(1, size - offset))
        assert list(allocation(client, offset, length)) == list(intersect(extents, [(offset, length)]))
        assert client.read(offset, length) == new[offset : offset + length]
        if bitmaps:
            check_increment(client, old, new, later)


def check_increment(client, old, new, later):
    """The changes make the new content out of the old, and hold nothing but what was touched."""
    layered = bytearray(old)
    touched = set()
    for _, offset, length in later:
        touched |= set(range(offset // 65536, -(-(offset + length) // 65536)))
    for offset, length, kind in changes(client, BITMAP, 0, client.size):
        layered[offset : offset + length] = bytes(length) if kind is Kind.ZERO else client.read(offset, length)
        assert set(range(offset // 65536, -(-(offset + length) // 65536))) <= touched
    assert layered == new


@pytest.fixture
def big(tmp_path):
    """(image, content) of 24 MiB, the middle third of it a hole."""
    content = noise(8 * MIB) + bytes(8 * MIB) + noise(8 * MIB, 2)
    image = tmp_path / "big.raw"
    with image.open("wb") as file:
        file.write(content[: 8 * MIB])
        file.seek(16 * MIB)
        file.write(content[16 * MIB :])
    return image, content


def test_many_threads_share_one_connection(big):
    image, content = big
    wrong = []

    def work(seed):
        choice = random.Random(seed)
        for _ in range(60):
            offset = choice.randrange(len(content))
            length = choice.randrange(1, min(len(content) - offset, MIB) + 1)
            if client.read(offset, length) != content[offset : offset + length]:
                wrong.append((offset, length))
            status = client.block_status(offset, length)[ALLOCATION]
            if sum(size for size, _ in status) != length:
                wrong.append((offset, status))

    with QemuNbd(image, "raw") as server, Client(server.address, [ALLOCATION]) as client:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_more_requests_than_a_server_takes_at_once(big):
    """One thread that only asks would wait for a server that waits for its replies to be read."""
    image, content = big
    with QemuNbd(image, "raw") as server, Client(server.address) as client:
        buffer = bytearray(len(content))
        view = memoryview(buffer)
        pending = [client.submit(at, view[at : at + 8192]) for at in range(0, len(content), 8192)]
        for request in reversed(pending):
            request.result()
        assert buffer == content


def test_a_read_longer_than_the_server_takes(tmp_path):
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.truncate(70 * MIB)
        file.seek(33 * MIB)
        file.write(b"here")
    with QemuNbd(image, "raw") as server, Client(server.address) as client:
        assert client.max_request < 70 * MIB
        content = client.read(1, 70 * MIB - 1)
        assert content.index(b"here") == 33 * MIB - 1
        assert content.count(0) == len(content) - 4


def test_a_server_that_wants_whole_blocks(big):
    image, content = big
    options = f"driver=blkdebug,align=4096,image.driver=file,image.filename={image}"
    with QemuNbd(options, None) as server, Client(server.address, [ALLOCATION]) as client:
        assert client.min_block == 4096
        for offset, length in [(0, 1), (4095, 2), (1, 5000), (8 * MIB - 1, 4098), (len(content) - 1, 1)]:
            assert client.read(offset, length) == content[offset : offset + length]
            assert sum(size for size, _ in client.block_status(offset, length)[ALLOCATION]) == length
        assert list(allocation(client, 8 * MIB - 10, 20)) == [
            Extent(8 * MIB - 10, 10, Kind.DATA),
            Extent(8 * MIB, 10, Kind.ZERO),
        ]


def test_a_failed_request_leaves_the_connection_alone(big):
    image, content = big
    options = (
        "driver=blkdebug,image.driver=file,inject-error.0.event=none,inject-error.0.iotype=read,"
        f"inject-error.0.errno=5,inject-error.0.sector=2048,inject-error.0.once=off,image.filename={image}"
    )
    with QemuNbd(options, None) as server, Client(server.address) as client:
        first, bad, last = bytearray(512), bytearray(MIB), bytearray(512)
        pending = [client.submit(0, first), client.submit(MIB, bad), client.submit(4 * MIB, last)]
        pending[0].result()
        with pytest.raises(
            RequestFailed, match="read of 1048576 bytes at 1048576 failed: Input/output error"
        ) as caught:
            pending[1].result()
        pending[2].result()
        assert caught.value.errno == errno.EIO
        assert not caught.value.connection_lost
        assert (first, last) == (content[:512], content[4 * MIB : 4 * MIB + 512])
        assert client.read(0, MIB) == content[:MIB]


def test_a_server_that_is_killed(big):
    image, _ = big
    with QemuNbd(image, "raw") as server, Client(server.address) as client:
        buffer = bytearray(MIB)
        client.read_into(0, buffer)
        server.kill()
        for _ in range(2):
            with pytest.raises(ConnectionLost, match=f"NBD export '' on {server.address.socket}.*lost"):
                client.read_into(0, buffer)


def test_close_while_threads_read(big):
    image, _ = big
    before = descriptors()
    with QemuNbd(image, "raw") as server:
        for _ in range(5):
            client = Client(server.address)
            seen, started = [], threading.Barrier(4)

            def work(client=client, seen=seen, started=started):
                buffer = bytearray(4 * MIB)
                started.wait(LIMIT)
                try:
                    while True:
                        client.read_into(0, buffer)
                except NbdError as error:
                    seen.append(type(error))

            threads = [threading.Thread(target=work) for _ in range(3)]
            for thread in threads:
                thread.start()
            started.wait(LIMIT)
            client.close()
            for thread in threads:
                thread.join(LIMIT)
            assert seen == [ConnectionLost] * 3
        with Client(server.address) as client:  # every place of the server is free again
            assert client.read(0, 1)
    assert descriptors() == before


# Where no server is


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/tmp/" + "x" * 103, "has 108 bytes; unix sockets allow 107"),
        ("/nonexistent/socket", "cannot connect to NBD export 'vda' on /nonexistent/socket: No such file"),
        ("/etc/passwd", "cannot connect.*Connection refused"),
    ],
)
def test_no_server(path, message):
    before = descriptors()
    with pytest.raises(NbdError, match=message) as caught:
        Client(Address(path, "vda"))
    assert caught.value.connection_lost
    assert descriptors() == before


def test_a_server_whose_backlog_is_full(tmp_path):
    path = f"/tmp/nbd-backlog-{os.getpid()}"
    waiting = []
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(0)
            waiting.append(socket.socket(socket.AF_UNIX))
            waiting[0].connect(path)
            begin = time.monotonic()
            with pytest.raises(ConnectionLost, match="cannot connect"):
                Client(Address(path), timeout=0.3)
            assert 0.2 < time.monotonic() - begin < 5
    finally:
        for connection in waiting:
            connection.close()
        Path(path).unlink()


def test_values_and_errors_can_be_sent_to_another_process():
    assert pickle.loads(pickle.dumps(Address("/s", "vda"))) == Address("/s", "vda")
    error = pickle.loads(pickle.dumps(RequestFailed("message", "hint", errno.EIO)))
    assert (str(error), error.hint, error.errno, error.connection_lost) == ("message", "hint", errno.EIO, False)


# Handshakes that go wrong. After each, the server must see the connection closed.


def silent(wire):
    assert wire.ended()


def silent_after_greeting(wire):
    wire.greet()
    wire.option()
    assert wire.ended()


def dripping(wire):
    """Every byte comes in time, the whole never does."""
    try:
        for byte in b"NBDMAGIC" * 100:
            wire.send(bytes([byte]))
            time.sleep(0.1)
    except OSError:
        return
    raise AssertionError("the client did not give up")


def wrong_magic(wire):
    wire.send(b"SSH-2.0-Open")
    assert wire.ended()


def oldstyle(wire):
    wire.send(b"NBDMAGIC", 0x420281861253.to_bytes(8), bytes(136))
    assert wire.ended()


def not_fixed(wire):
    wire.send(b"NBDMAGIC", wire_words.OPTION_MAGIC.to_bytes(8), bytes(2))
    assert wire.ended()


def closes_after_greeting(wire):
    wire.greet()
    wire.receive(4)


def answering(*replies):
    """Agree to structured replies, then answer the next option with `replies`."""

    def script(wire):
        wire.greet()
        wire.reply(wire.option(), ACK)
        option = wire.option()
        for kind, payload in replies:
            wire.reply(option, kind, payload)
        assert wire.ended()

    return script


def refuses_structured(wire):
    wire.greet()
    wire.reply(wire.option(), ERR_UNSUP)
    assert wire.ended()


def wrong_option_magic(wire):
    wire.greet()
    wire.option()
    wire.send(struct.pack(">QIII", 1, 8, ACK, 0))
    assert wire.ended()


def another_option(wire):
    wire.greet()
    wire.option()
    wire.reply(GO, ACK)
    assert wire.ended()


def giant_reply(wire):
    wire.greet()
    wire.send(struct.pack(">QIII", wire_words.REPLY_MAGIC, wire.option(), ACK, 1 << 31))
    assert wire.ended()


EXPORT = (INFO, struct.pack(">HQH", 0, SIZE, 3))


@pytest.mark.parametrize(
    ("script", "contexts", "kind", "message"),
    [
        (silent, [], ConnectionLost, "did not finish the handshake in time"),
        (silent_after_greeting, [], ConnectionLost, "did not finish the handshake in time"),
        (dripping, [], ConnectionLost, "did not finish the handshake in time"),
        (wrong_magic, [], ProtocolError, "no NBD server"),
        (oldstyle, [], NbdError, "only the old NBD handshake"),
        (not_fixed, [], NbdError, "fixed newstyle"),
        (closes_after_greeting, [], ConnectionLost, "lost in the handshake"),
        (refuses_structured, [], NbdError, "refused structured replies: the option is not supported"),
        (wrong_option_magic, [], ProtocolError, "magic 0x1"),
        (another_option, [], ProtocolError, "a reply to the option 7"),
        (giant_reply, [], ProtocolError, "2147483648 bytes"),
        (answering((ERR_UNKNOWN, b"who\x1b[2J?")), [], NbdError, r"no such export \(who \[2J\?\)"),
        (answering((ERR_UNSUP, b"")), [], NbdError, "refused opening it"),
        (answering((ACK, b"")), [], ProtocolError, "an export of None bytes"),
        (answering((META, b"")), [], ProtocolError, "a reply of type 4"),
        (answering((INFO, b"\0\0abc")), [], ProtocolError, "export information of 5 bytes"),
        (answering((INFO, struct.pack(">HQH", 0, 1 << 63, 3)), (ACK, b"")), [], ProtocolError, "an export of"),
        (answering(EXPORT, (INFO, struct.pack(">HIII", 3, 3, 4, 4096)), (ACK, b"")), [], ProtocolError, "block sizes"),
        (
            answering(EXPORT, (INFO, struct.pack(">HIII", 3, 4096, 4096, 1)), (ACK, b"")),
            [],
            ProtocolError,
            "block sizes",
        ),
        (answering((ACK, b"")), [ALLOCATION], NbdError, "'disk'.*no metadata context 'base:allocation'"),
        (answering((META, b"\0\0\0\1x:y")), [ALLOCATION], ProtocolError, "'x:y' was not asked for"),
        (answering(*[(META, b"\0\0\0\1base:allocation")] * 2), [ALLOCATION], ProtocolError, "came twice"),
        (answering((META, b"\0")), [ALLOCATION], ProtocolError, "of type 4 and 1 bytes"),
        (answering((ERR_UNKNOWN, b"")), [ALLOCATION], NbdError, "no such export"),
    ],
)
def test_handshakes_that_go_wrong(script, contexts, kind, message):
    before = descriptors()
    begin = time.monotonic()
    with ScriptedServer(script) as server, pytest.raises(NbdError, match=message) as caught:
        Client(server.address, contexts, timeout=0.4 if "in time" in message else LIMIT)
    assert type(caught.value) is kind
    assert caught.value.connection_lost
    assert server.address.socket in str(caught.value)
    assert time.monotonic() - begin < LIMIT / 2
    assert descriptors() == before


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
        assert descriptors() == before
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


def test_the_socket_is_not_inherited_by_children(tmp_path):
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(SIZE))
    with QemuNbd(image, "raw") as server, Client(server.address) as client:
        assert not os.get_inheritable(client._socket.fileno())


def test_set_meta_is_asked_only_for_contexts():
    options = []

    def script(wire):
        wire.greet()
        while not options or options[-1] != GO:
            options.append(wire.option())
            if options[-1] == GO:
                wire.reply(GO, *EXPORT)
            wire.reply(options[-1], ACK)
        assert wire.request().command == wire_words.DISC

    with ScriptedServer(script) as server, Client(server.address) as client:
        assert SET_META not in options
        with pytest.raises(ValueError, match="without contexts"):
            client.block_status(0, 1)
