"""The NBD client against real servers (`qemu-nbd`), and where there is none."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import socket
import threading
import time
from dataclasses import replace
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
    RequestFailed,
    allocation,
    changes,
    dirty,
)
from tests.disk.qemu_nbd import LIMIT, QemuNbd, descriptors, run

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BITMAP = "qemu:dirty-bitmap:b0"
SIZE = 4096


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


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
    assert descriptors() <= before


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
    assert descriptors() <= before


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
    assert descriptors() <= before


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


def test_a_server_that_is_not_the_process_that_it_has_to_be(tmp_path):
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(SIZE))
    with QemuNbd(image, "raw") as server:
        with Client(replace(server.address, peer=server.pid)) as client:
            assert client.read(0, SIZE) == bytes(SIZE)
        before = descriptors()
        with pytest.raises(NbdError, match=f"is served by process {server.pid}, not by {os.getpid()}"):
            Client(replace(server.address, peer=os.getpid()))
        assert descriptors() <= before


def test_values_and_errors_can_be_sent_to_another_process():
    assert pickle.loads(pickle.dumps(Address("/s", "vda", 7))) == Address("/s", "vda", 7)
    error = pickle.loads(pickle.dumps(RequestFailed("message", "hint", errno.EIO)))
    assert (str(error), error.hint, error.errno, error.connection_lost) == ("message", "hint", errno.EIO, False)


def test_the_socket_is_not_inherited_by_children(tmp_path):
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(SIZE))
    with QemuNbd(image, "raw") as server, Client(server.address) as client:
        assert not os.get_inheritable(client._socket.fileno())
