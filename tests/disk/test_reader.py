"""The process that reads: the same bytes as its owner would read, errors as they are, an end that nobody holds up."""

from __future__ import annotations

import gc
import io
import os
import pickle
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backupcore.disk.extents import CLUSTER, Extent, Kind
from backupcore.disk.fileview import show
from backupcore.disk.nbd import Address, RequestFailed
from backupcore.disk.qcow2 import DiskArtifact, Layout
from backupcore.disk.reader import Reader, memory, pair, start
from backupcore.disk.reader import reader as owner
from backupcore.disk.reader.channel import REPLY, RESULT, SLOT
from backupcore.disk.sums import HashedDisk, SumsArtifact
from backupcore.errors import BackupError, ContractViolation, HypervisorError, IntegrityError, TargetUnavailable
from tests.disk.odd_blocks import (
    MIB,
    Changing,
    Custom,
    Export,
    Failing,
    FailsThere,
    Hanging,
    Slow,
    complain,
    content,
    disk,
    lock,
)
from tests.disk.qemu_nbd import LIMIT, QemuNbd, descriptors

SIZE = 21 * MIB + 12345
ENDED = "the process that reads the disks of VM web has ended"


@pytest.fixture
def reader():
    reader = start("web")
    yield reader
    reader.close()
    assert not alive(reader.pid)


@pytest.fixture
def hashed(tmp_path):
    def make(blocks=None, size=SIZE, name="d"):
        return HashedDisk(disk(f"disk.{name}.qcow2", size, blocks=blocks), tmp_path / f"sums.{name}")

    return make


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def held(reader: Reader) -> int:
    """How many descriptors its process has open."""
    return len(list(Path(f"/proc/{reader.pid}/fd").iterdir()))


def until(condition: Callable[[], object], limit: float = LIMIT) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def connections(address: Address) -> int:
    """How many the server has, by the kernel's own list."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return sum(
        fields[7] == address.socket and not int(fields[3], 16) & 0x10000
        for fields in (line.split(maxsplit=7) for line in lines)
        if len(fields) == 8
    )


class TestBytes:
    def test_the_same_as_the_disk_itself(self, reader, hashed):
        whole = disk("d", SIZE).read_at(0, 10 * SIZE)
        there = hashed()
        shown = reader.show(there)
        assert (shown.name, shown.size) == (there.name, len(whole))
        assert shown.read_at(0, 10 * SIZE) == whole
        assert shown.read_at(SIZE * 2, 5) == shown.read_at(5, 0) == b""
        assert there.table.complete()
        assert (
            there.bytes_read == shown.bytes_read == sum(size for _, size in there._layout.runs(0, there.table.clusters))
        )
        shown.close()

    def test_random_ranges_by_many_threads(self, reader, hashed):
        whole = disk("d", SIZE).read_at(0, SIZE * 2)
        shown = reader.show(hashed())

        def work(seed: int) -> None:
            chosen = random.Random(seed)
            for _ in range(40):
                at = chosen.randrange(len(whole))
                length = chosen.choice((1, 700, 65536, 100_000, MIB, 3 * MIB, 9 * MIB))
                if chosen.random() < 0.3:
                    at -= at % MIB
                buffer = memory(length) if chosen.random() < 0.5 else memoryview(bytearray(length))
                count = shown.read_into(at, buffer)
                assert buffer[:count] == whole[at : at + length]
                assert count == len(whole[at : at + length])

        with ThreadPoolExecutor(24) as pool:
            list(pool.map(work, range(24)))
        shown.close()

    @pytest.mark.parametrize("piece", [65536, 4 * MIB + 4096])
    def test_a_stream_is_read_ahead_and_nothing_twice(self, reader, hashed, piece):
        whole = disk("d", SIZE).read_at(0, SIZE * 2)
        there = hashed()
        copy = io.BytesIO()
        with reader.show(there).open() as stream:
            assert stream.read(10) == whole[:10]
            assert stream.tell() == 10
            shutil.copyfileobj(stream, copy, piece)
        assert copy.getvalue() == whole[10:]
        assert there.bytes_read <= len(whole)

    @pytest.mark.parametrize("allocate", [memory, lambda size: memoryview(bytearray(size))])
    def test_reads_one_after_the_other_read_nothing_twice(self, reader, hashed, allocate):
        whole = disk("d", SIZE).read_at(0, SIZE * 2)
        there = hashed()
        shown = reader.show(there)
        buffer = allocate(4 * MIB)
        got = b""
        while count := shown.read_into(len(got), buffer):
            got += buffer[:count]
        assert got == whole
        assert there.table.complete()
        assert there.bytes_read <= len(whole)

    def test_of_a_real_server(self, reader, tmp_path):
        image = tmp_path / "image.raw"
        data = random.Random(1).randbytes(SIZE)
        image.write_bytes(data)
        layout = Layout(SIZE, [Extent(0, -(-SIZE // CLUSTER) * CLUSTER, Kind.DATA)])
        with QemuNbd(image, "raw") as server:
            shown = reader.show(HashedDisk(DiskArtifact("d", layout, server.address), tmp_path / "sums"))
            with ThreadPoolExecutor(4) as pool:
                parts = pool.map(lambda at: shown.read_at(at, 3 * MIB), range(0, shown.size, 3 * MIB))
                assert b"".join(parts)[layout.data_offset :][:SIZE] == data
            assert connections(server.address) == 1
            shown.close()
            until(lambda: connections(server.address) == 0)
            with pytest.raises(ContractViolation, match="after it was closed"):
                shown.read_at(0, 1)

    def test_load_and_complete_are_done_over_there(self, reader, hashed):
        there = hashed()
        shown = reader.show(there)
        shown.load(20, 40)
        assert there.table.first_missing(20, 40) is None
        assert not there.table.complete()
        assert SumsArtifact("sums.d", shown, patience=0.01).read_at(0, 32 * 60)
        shown.complete()
        assert there.table.complete()

    def test_a_changed_cluster_is_noticed(self, reader, hashed):
        shown = reader.show(hashed(Changing(bytes(SIZE))))
        shown.read_at(2 * MIB, 4 * MIB)
        with pytest.raises(IntegrityError, match=r"disk\.d\.qcow2: data cluster .* changed between two reads"):
            shown.read_at(2 * MIB, 4 * MIB)

    def test_in_a_view_it_is_the_disk_itself(self, reader, hashed, tmp_path):
        shown = reader.show(hashed())
        sums = SumsArtifact("sums.d", shown)
        again, both = pickle.loads(pickle.dumps([shown, sums]))
        assert type(again) is HashedDisk
        assert both._disk is again
        with show([shown, sums], tmp_path) as view:
            assert (view.path / "disk.d.qcow2").read_bytes() == disk("d", SIZE).read_at(0, SIZE * 2)
            assert len((view.path / "sums.d").read_bytes()) == sums.size
        assert shown.table.complete()


class TestErrors:
    @pytest.mark.parametrize(
        "error", [TargetUnavailable("away", "later"), RequestFailed("bad", "", 5), OSError(5, "no"), KeyError("x")]
    )
    def test_of_a_call_keep_their_type(self, reader, error):
        with pytest.raises(type(error)) as raised:
            reader.call(complain, type(error), *error.args)
        assert raised.value.args == error.args

    def test_that_cannot_be_pickled_keep_their_message(self, reader):
        with pytest.raises(BackupError, match="custom 3") as raised:
            reader.call(complain, Custom, 1, 2)
        assert raised.value.hint == "a hint"
        with pytest.raises(Exception, match="lock"):
            reader.call(lock)
        with pytest.raises(Exception, match="lambda"):
            reader.call(lambda: None)
        assert reader.call(pow, 2, 10) == 1024  # and do no harm

    @pytest.mark.parametrize("length", [100, 6 * MIB])
    def test_of_a_read_reach_who_reads_there(self, reader, hashed, length):
        shown = reader.show(hashed(Failing(content(SIZE), 8 * MIB)))
        whole = disk("d", SIZE).read_at(0, SIZE)
        for _ in range(3):
            for buffer in (memory(length), memoryview(bytearray(length))):
                with pytest.raises(TargetUnavailable, match="nothing can be read past"):
                    shown.read_into(9 * MIB, buffer)
                assert shown.read_into(MIB, buffer) == length
                assert buffer == whole[MIB : MIB + length]
        stream = shown.open()
        assert stream.read(6 * MIB) == whole[: 6 * MIB]  # what fails was asked for ahead
        with pytest.raises(TargetUnavailable):
            stream.read(6 * MIB)
        assert reader._busy == set()

    def test_after_one_nothing_is_written_to_the_buffer_any_more(self, reader, hashed):
        there = hashed()
        at = next(offset for offset, _ in there._layout.runs(there.clusters_of(4)[0], 1))  # where 4 MiB of the file lie
        shown = reader.show(hashed(FailsThere(content(SIZE), at)))
        buffer = memory(12 * MIB)
        with pytest.raises(TargetUnavailable, match="nothing can be read there"):
            shown.read_into(4 * MIB, buffer)
        found = bytes(buffer)
        assert shown.read_into(20 * MIB, memory(100)) == 100  # takes longer than what was under way
        time.sleep(0.3)
        assert buffer == found

    def test_nobody_listens(self, reader, hashed):
        shown = reader.show(HashedDisk(disk("d", SIZE, blocks=Export(Address("/nowhere"))), hashed().table.path))
        with pytest.raises(HypervisorError, match="cannot connect to NBD export '' on /nowhere"):
            shown.read_at(5 * MIB, 100)


class TestEnd:
    def waiting(self, shown, count=3):
        """Threads that read what does not come, and the errors that they get."""
        errors: list[BaseException] = []

        def read(at: int) -> None:
            try:
                shown.read_at(at * MIB, MIB)
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                errors.append(error)

        threads = [threading.Thread(target=read, args=(3 * number + 1,)) for number in range(count)]
        for thread in threads:
            thread.start()
        until(lambda: len(shown._shown.reader._busy) == count)
        return threads, errors

    def test_of_a_killed_reader_is_known_to_all_at_once(self, reader, hashed):
        shown = reader.show(hashed(Hanging(content(SIZE))))
        threads, errors = self.waiting(shown)
        os.kill(reader.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(LIMIT)
        assert [type(error) for error in errors] == [HypervisorError] * 3
        assert all(ENDED in str(error) and "signal 9" in str(error) for error in errors)
        for work in (lambda: shown.read_at(0, 1), lambda: reader.call(pow, 1, 1), lambda: shown.load(0, 1)):
            with pytest.raises(HypervisorError, match=ENDED):
                work()
        shown.close()

    def test_of_a_killed_reader_ends_its_connections(self, reader, tmp_path):
        image = tmp_path / "image.raw"
        image.write_bytes(content(SIZE))
        with QemuNbd(image, "raw") as server:
            shown = reader.show(HashedDisk(disk("d", SIZE, blocks=server.address), tmp_path / "sums"))
            shown.read_at(5 * MIB, 100)
            assert connections(server.address) == 1
            reader.kill()
            assert not alive(reader.pid)
            until(lambda: connections(server.address) == 0)
            with pytest.raises(HypervisorError, match=ENDED):
                shown.read_at(5 * MIB, 100)

    def test_of_one_disk_leaves_the_others(self, reader, hashed):
        hanging, other = reader.show(hashed(Hanging(content(SIZE)), name="a")), reader.show(hashed(name="b"))
        threads, errors = self.waiting(hanging)
        assert other.read_at(0, 100)
        hanging.close()
        hanging.close()
        for thread in threads:
            thread.join(LIMIT)
        assert [type(error) for error in errors] == [ContractViolation] * 3
        assert all("was read while it was closed" in str(error) for error in errors)
        assert other.read_at(5 * MIB, 10) == disk("d", SIZE).read_at(5 * MIB, 10)

    def test_of_a_disk_that_was_never_read_asks_nobody(self, reader, hashed):
        os.kill(reader.pid, signal.SIGSTOP)
        started = time.monotonic()
        reader.show(hashed()).close()
        assert time.monotonic() - started < 1
        os.kill(reader.pid, signal.SIGCONT)

    def test_waits_for_no_reader_that_stands(self, reader, hashed, monkeypatch):
        monkeypatch.setattr(owner, "CLOSE_LIMIT", 0.5)
        shown = reader.show(hashed())
        shown.read_at(0, 100)
        threads, errors = self.waiting(reader.show(hashed(Hanging(content(SIZE)), name="h")))
        os.kill(reader.pid, signal.SIGSTOP)
        shown.close()
        assert not alive(reader.pid)
        for thread in threads:
            thread.join(LIMIT)
        assert all(isinstance(error, HypervisorError) for error in errors)
        assert len(errors) == 3

    def test_of_all_fails_what_waits(self, reader, hashed):
        threads, errors = self.waiting(reader.show(hashed(Hanging(content(SIZE)))))
        reader.close()
        reader.close()
        for thread in threads:
            thread.join(LIMIT)
        assert [str(error) for error in errors] == ["the disks of VM web were read after they had been released"] * 3
        with pytest.raises(HypervisorError, match="released"):
            reader.call(pow, 1, 1)

    def test_comes_with_that_of_its_owner(self):
        code = (
            "import time; from backupcore.disk.reader import start; reader = start(); reader.call(pow, 1, 1); "
            "print(reader.pid, flush=True); time.sleep(60)"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            pid = int(process.stdout.readline())
            assert alive(pid)
            process.kill()
            process.wait()
            until(lambda: not alive(pid))
        finally:
            process.kill()
            process.communicate()

    def test_is_for_its_owner_to_say(self, reader):
        reader.call(pow, 1, 1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(reader.pid, number)
        assert reader.call(os.getpid) == reader.pid
        assert reader.call(os.getsid, 0) == reader.pid

    def test_of_what_forked_it_is_seen_by_others(self):
        """A forked reader holds nothing of whoever forked it: here the writing end of a pipe."""
        code = """
import os, socket
from backupcore.disk.reader import Reader, pair, serve
read, write = os.pipe()
ours, theirs = pair()
if not (pid := os.fork()):
    serve(theirs)
theirs.close()
os.close(write)
reader = Reader(ours, pid)
assert reader.call(os.getpid) == pid
assert os.read(read, 1) == b""
print(sorted(reader.call(os.listdir, "/proc/self/fd")) != [])
reader.close()
os.waitpid(pid, 0)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


class TestStrangers:
    """What is not understood ends what it came over, and nothing else."""

    @pytest.mark.parametrize(
        "data", [b"GET / HTTP/1.1\r\n\r\n" * 10, bytes(400), b"\xff" * 400, struct.pack("<BxxxIIQQQ", 1, 9, 1, 0, 0, 9)]
    )
    def test_garbage_on_a_channel(self, reader, hashed, data):
        shown = reader.show(hashed())
        expected = shown.read_at(0, 100)
        channel = reader.channel()
        channel._socket.sendall(data)
        with pytest.raises(HypervisorError):
            channel.answer()
        channel.close()
        assert shown.read_at(0, 100) == expected

    @pytest.mark.parametrize("place", [SLOT - 10, 1 << 62])
    def test_a_read_past_the_slot(self, reader, hashed, place):
        shown = reader.show(hashed())
        shown.read_at(0, 100)
        channel = reader.channel()
        channel.read((0, shown._shown._number, 0, place, 100))
        with pytest.raises(HypervisorError):
            channel.answer()
        channel.close()
        assert shown.read_at(0, 1)

    def test_garbage_instead_of_a_channel(self, reader, tmp_path):
        small = os.open(tmp_path / "small", os.O_RDWR | os.O_CREAT)
        ours, theirs = socket.socketpair()
        reader._control.send(b"?" * 100)
        socket.send_fds(reader._control, [b"+"], [small])
        socket.send_fds(reader._control, [b"+"], [small, small])
        socket.send_fds(reader._control, [b"+"], [theirs.fileno(), small])
        theirs.close()
        assert ours.recv(1) == b""  # it is told, not left waiting
        assert reader.call(pow, 2, 3) == 8
        names = [entry.readlink() for entry in Path(f"/proc/{reader.pid}/fd").iterdir()]
        assert tmp_path / "small" not in names
        os.close(small)
        ours.close()

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "which there is not"),
            (REPLY.pack(RESULT, 1 << 60), "which there is not"),
            (REPLY.pack(RESULT, 4) + b"junk", "cannot be used"),
            (REPLY.pack(2, len(pickle.dumps(7))) + pickle.dumps(7), "an error that is none"),
            (REPLY.pack(RESULT, 4) + b"ju", "has ended"),
            (b"", "has ended"),
        ],
    )
    def test_answers_that_nobody_understands(self, answer, said):
        ours, theirs = pair()
        with theirs, subprocess.Popen(["sleep", "60"]) as process:

            def serve() -> None:
                _, descriptors, _, _ = socket.recv_fds(theirs, 1, 2)
                with socket.socket(fileno=descriptors[0]) as channel:
                    os.close(descriptors[1])
                    channel.recv(1000)
                    channel.sendall(answer)

            thread = threading.Thread(target=serve)
            thread.start()
            reader = Reader(ours, process.pid, "web")
            with pytest.raises(HypervisorError, match=said):
                reader.call(pow, 1, 1)
            thread.join()
            process.kill()
            reader.close()


class TestBounds:
    def test_no_more_channels_than_there_may_be(self, reader, hashed):
        shown = reader.show(hashed(Slow(content(SIZE))))
        whole = disk("d", SIZE).read_at(0, SIZE)
        with ThreadPoolExecutor(3 * owner.MOST) as pool:
            places = [number * 100_000 for number in range(3 * owner.MOST)]
            assert list(pool.map(lambda at: shown.read_at(at, 10), places)) == [whole[at : at + 10] for at in places]
        assert len(reader._idle) <= owner.MOST
        assert held(reader) <= 2 * owner.MOST + 20
        for at in range(200):
            shown.read_at(at * 70_000, 10)
        assert len(reader._idle) <= owner.MOST
        shown.close()

    def test_memory_of_the_owner_is_let_go_of(self, reader, hashed):
        shown = reader.show(hashed())
        whole = disk("d", SIZE).read_at(0, SIZE)
        for number in range(20):
            buffer = memory(4 * MIB + number)
            shown.read_into(number * 10_000, buffer)
            assert buffer == whole[number * 10_000 :][: 4 * MIB + number]
            del buffer
        gc.collect()
        maps = Path(f"/proc/{reader.pid}/maps").read_text()
        assert maps.count("memfd:backupcore") <= len(reader._idle) + 2

    def test_many_runs_leave_nothing(self, hashed, tmp_path):
        def one(number: int) -> None:
            reader = start()
            shown = reader.show(hashed(name=str(number)))
            shown.read_into(0, memory(4 * MIB))
            with pytest.raises(ValueError, match="x"):
                reader.call(complain, ValueError, "x")
            shown.close()
            reader.close()

        one(0)
        before = descriptors(), threading.active_count()
        for number in range(1, 6):
            one(number)
        assert descriptors() <= before[0]
        assert threading.active_count() <= before[1]
        assert "memfd:backupcore" not in Path("/proc/self/maps").read_text()

    def test_a_channel_that_is_given_up_goes_over_there_too(self, reader, hashed):
        shown = reader.show(hashed())
        shown.read_at(0, 100)
        before = held(reader)
        for _ in range(5):
            channel = reader.channel()
            channel.read((0, shown._shown._number, 4 * MIB, 0, MIB))
            channel.close()
            del channel
        until(lambda: held(reader) == before)


class TestBlocks:
    def test_the_same_and_pickled_themselves(self, reader):
        data = content(SIZE)
        blocks = disk("d", SIZE)._blocks
        there = reader.blocks(blocks)
        assert type(pickle.loads(pickle.dumps(there))) is type(blocks)
        connection = there.connect()
        wanted = [
            (at, memoryview(bytearray(length))) for at, length in ((0, 5), (7, 3 * MIB), (9 * MIB, 9 * MIB), (1, 0))
        ]
        under_way = [connection.submit(at, buffer) for at, buffer in wanted]
        for pending in reversed(under_way):
            pending.result()
        assert [bytes(buffer) for _, buffer in wanted] == [data[at : at + len(buffer)] for at, buffer in wanted]
        with pytest.raises(ValueError, match="of a disk of"):
            connection.read_into(SIZE, memoryview(bytearray(1)))
        connection.close()
        with pytest.raises(BackupError):
            connection.read_into(0, memoryview(bytearray(1)))

    def test_a_close_ends_reads_that_wait(self, reader):
        connection = reader.blocks(Hanging(b"")).connect()
        closing = threading.Timer(0.2, connection.close)
        closing.start()
        with pytest.raises(BackupError):
            connection.read_into(0, memoryview(bytearray(MIB)))
        closing.join()
