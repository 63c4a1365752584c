"""The sums of a disk: the table that processes share, the disk that is hashed while it is read, and the check."""

from __future__ import annotations

import itertools
import pickle
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backupcore.disk.extents import CLUSTER, Extent, Kind
from backupcore.disk.qcow2 import DiskArtifact, Layout, MemoryBlocks
from backupcore.disk.sums import DIGEST, HashedDisk, SumsArtifact, Table, digests
from backupcore.errors import ContractViolation, IntegrityError, TargetFull, TargetUnavailable
from tests.disk.odd_blocks import MIB, Changing, Counting, Failing, Hanging, content, disk

LIMIT = 20.0
SIZE = 6 * MIB + 12345
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def reference(artifact: DiskArtifact) -> bytes:
    """The sums as the format says: BLAKE3 of each cluster behind the tables."""
    whole = artifact.read_at(artifact.layout.data_offset, artifact.size)
    return b"".join(blake3(whole[at : at + CLUSTER]).digest() for at in range(0, len(whole), CLUSTER))


def digest_of(number: int) -> bytes:
    return blake3(b"%d" % number).digest()


@pytest.fixture
def fresh(tmp_path):
    """A new path for a table, each time it is called."""
    numbers = itertools.count()
    return lambda: tmp_path / f"table-{next(numbers)}"


class TestTable:
    @quick
    @given(
        clusters=st.integers(0, 200),
        steps=st.lists(st.tuples(st.integers(0, 199), st.integers(1, 40)), max_size=12),
    )
    def test_knows_what_is_missing(self, fresh, clusters, steps):
        table = Table.create(fresh(), clusters)
        other = Table.open(table.path)  # as another process would
        have: set[int] = set()
        for first, count in steps:
            numbers = [n for n in range(first, first + count) if n < clusters]
            if numbers:
                table.record(numbers[0], b"".join(map(digest_of, numbers)))
                have.update(numbers)
        runs = list(other.missing())
        assert [n for first, count in runs for n in range(first, first + count)] == sorted(set(range(clusters)) - have)
        assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs))  # joined
        assert other.recorded == len(have)
        assert other.complete() == (len(have) == clusters)
        if other.complete():
            assert other.digest() == blake3(b"".join(map(digest_of, range(clusters)))).digest()
        else:
            with pytest.raises(ContractViolation, match=f"cluster {runs[0][0]} was not read"):
                other.digest()
        table.close()
        other.close()

    def test_digests_that_begin_or_end_in_zeros_are_not_missing(self, fresh):
        table = Table.create(fresh(), 4)
        head, tail = b"\1" + bytes(31), bytes(31) + b"\1"
        table.record(0, head + tail)
        table.record(3, head)
        assert list(table.missing()) == [(2, 1)]
        table.close()

    def test_runs_of_more_than_one_step(self, fresh):
        table = Table.create(fresh(), 100_000)
        table.record(70_000, digest_of(1))
        assert list(table.missing()) == [(0, 70_000), (70_001, 29_999)]
        assert list(table.missing(69_999, 70_002)) == [(69_999, 1), (70_001, 1)]
        table.close()

    def test_a_cluster_that_changed_is_refused(self, fresh):
        table = Table.create(fresh(), 4)
        table.record(0, digest_of(0) + digest_of(1))
        table.record(1, digest_of(1) + digest_of(2), 131072)
        with pytest.raises(IntegrityError, match="data cluster 2 changed"):
            table.record(1, digest_of(1) + digest_of(9))
        assert table.read(0, 3) == digest_of(0) + digest_of(1) + digest_of(2)
        assert (table.recorded, table.bytes_read) == (3, 131072)
        table.close()

    def test_is_never_made_over_another_file(self, fresh):
        path = fresh()
        Table.create(path, 1).close()
        with pytest.raises(Exception, match="exists"):
            Table.create(path, 1)
        path.write_bytes(bytes(8192))
        with pytest.raises(ContractViolation, match="no table"):
            Table.open(path)

    def test_its_room_is_reserved(self, fresh, tmp_path):
        table = Table.create(fresh(), 32768)
        assert table.path.stat().st_blocks * 512 >= MIB
        table.path.unlink()
        table.close()
        with pytest.raises(TargetFull):
            Table.create(fresh(), (1 << 58) // DIGEST)
        assert list(tmp_path.iterdir()) == []

    def test_processes_that_record_at_once_lose_nothing(self, fresh):
        table = Table.create(fresh(), 4000)
        code = (
            "import sys; from pathlib import Path; from backupcore.disk.table import Table\n"
            "t = Table.open(Path(sys.argv[1]))\n"
            "for n in range(int(sys.argv[2]), 4000, 2): t.record(n, bytes([1] * 32), 10)"
        )
        children = [subprocess.Popen([sys.executable, "-c", code, str(table.path), str(n)]) for n in (0, 1)]
        assert [child.wait(LIMIT) for child in children] == [0, 0]
        assert (table.recorded, table.bytes_read, table.complete()) == (4000, 40_000, True)
        table.close()


class TestHashedDisk:
    @quick
    @given(
        size=st.integers(1, 5 * MIB),
        reads=st.lists(st.tuples(st.floats(0, 1.1), st.integers(0, 3 * MIB)), max_size=12),
    )
    def test_reads_are_those_of_the_disk(self, fresh, size, reads):
        plain = disk("d", size)
        hashed = HashedDisk(plain, fresh())
        for place, length in reads:
            offset = int(place * plain.size)
            assert hashed.read_at(offset, length) == plain.read_at(offset, length)
        hashed.complete()
        assert hashed.table.read(0, hashed.table.clusters) == reference(plain)
        hashed.close()

    @pytest.mark.parametrize("length", [32768, 131072, 524288, MIB, 77777, 3 * MIB, 5000])
    def test_reading_through_reads_the_disk_once(self, fresh, length):
        blocks = Counting(content(SIZE))
        plain = disk("d", SIZE, blocks=blocks)
        hashed = HashedDisk(plain, fresh())
        pieces = []
        while piece := hashed.read_at(sum(map(len, pieces)), length):
            pieces.append(piece)
        assert hashed.bytes_read == sum(n for _, n in blocks.asked) == SIZE - CLUSTER  # the cluster that is not there
        assert b"".join(pieces) == plain.read_at(0, plain.size)
        hashed.close()

    def test_random_reads_do_not_read_ahead(self, fresh):
        size = 64 * MIB
        hashed = HashedDisk(disk("d", size), fresh())
        places = [n * 7 % 61 for n in range(1, 20)]
        for n in places:
            hashed.read_at(hashed.size - (n + 1) * 1_000_003, 4096)
        assert hashed.bytes_read <= len(places) * MIB
        hashed.close()

    def test_readers_at_several_places_read_each_block_once(self, fresh):
        size = 40 * MIB
        plain = disk("d", size)
        hashed = HashedDisk(plain, fresh())
        whole = plain.read_at(0, plain.size)
        parts = [range(at, at + 10 * MIB, 131072) for at in range(0, plain.size, 10 * MIB)]
        with ThreadPoolExecutor(len(parts)) as pool:
            got = list(pool.map(lambda part: b"".join(hashed.read_at(at, 131072) for at in part), parts))
        assert b"".join(got) == whole
        # Behind the end of one reader's part four blocks may be read once more, and the one that both share.
        assert hashed.bytes_read <= size + (len(parts) - 1) * 5 * MIB
        hashed.close()

    def test_memory_is_bounded(self, fresh):
        hashed = HashedDisk(disk("d", 100 * MIB), fresh())
        stream = hashed.open()
        most = 0
        while stream.read(MIB):
            most = max(most, len(hashed._cache))
        assert most <= 9
        for n in random.Random(1).sample(range(100), 100):
            hashed.read_at(n * MIB + 3 * CLUSTER, 10)
            assert len(hashed._cache) <= 33
        hashed.close()

    def test_an_error_of_the_disk_is_the_reader_s(self, fresh):
        blocks = Failing(content(SIZE), 3 * MIB)
        hashed = HashedDisk(disk("d", SIZE, blocks=blocks), fresh())
        assert len(hashed.read_at(0, 2 * MIB)) == 2 * MIB
        for _ in range(2):
            with pytest.raises(TargetUnavailable, match="past"):
                hashed.read_at(5 * MIB, 100)
        with pytest.raises(TargetUnavailable):
            hashed.complete()
        assert not hashed.table.complete()
        blocks.good = SIZE
        hashed.complete()
        hashed.close()

    def test_a_disk_that_changes_is_noticed(self, fresh):
        hashed = HashedDisk(disk("disk.vda.qcow2", SIZE, blocks=Changing(b"")), fresh())
        again = pickle.loads(pickle.dumps(hashed))
        hashed.read_at(hashed.size - 100, 100)
        with pytest.raises(IntegrityError, match=r"disk\.vda\.qcow2: data cluster \d+ changed"):
            again.read_at(hashed.size - 100, 100)
        hashed.close()
        again.close()

    def test_pickled_it_fills_the_same_table(self, fresh):
        plain = disk("d", SIZE)
        hashed = HashedDisk(plain, fresh())
        sums = SumsArtifact("sums.d", hashed)
        there, sums_there = pickle.loads(pickle.dumps([hashed, sums]))
        assert sums_there._disk is there
        there.complete()
        assert hashed.table.complete()
        assert hashed.bytes_read == SIZE - CLUSTER
        assert sums.read_at(0, sums.size) == reference(plain)
        hashed.close()
        there.close()

    def test_close_ends_reads_that_hang(self, fresh):
        hashed = HashedDisk(disk("d", SIZE, blocks=Hanging(content(SIZE))), fresh())
        failed: list[BaseException] = []

        def read():
            try:
                hashed.read_at(4 * MIB, 3 * MIB)
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                failed.append(error)

        before = set(threading.enumerate())
        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: len(set(threading.enumerate()) - before) > 1 and hashed._cache)
        hashed.close()
        reader.join(LIMIT)
        assert isinstance(failed[0], TargetUnavailable | ContractViolation)
        assert set(threading.enumerate()) <= before
        with pytest.raises(ContractViolation, match="after it was closed"):
            hashed.read_at(4 * MIB, 10)
        hashed.close()

    def test_closed_before_it_was_read(self, fresh):
        hashed = HashedDisk(disk("d", SIZE), fresh())
        hashed.close()
        with pytest.raises(ContractViolation, match="after it was closed"):
            hashed.complete()

    def test_a_disk_without_data(self, fresh):
        plain = DiskArtifact("d", Layout(MIB, [Extent(0, MIB, Kind.ZERO)]), MemoryBlocks(b""))
        hashed = HashedDisk(plain, fresh())
        sums = SumsArtifact("s", hashed)
        assert hashed.read_at(0, plain.size) == plain.read_at(0, plain.size)
        assert (sums.size, sums.read_at(0, 10), sums.digest()) == (0, b"", blake3(b"").digest())
        hashed.complete()
        hashed.close()


def until(condition):
    """Wait for a condition, with a limit."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class TestSumsArtifact:
    @pytest.mark.parametrize("order", list(itertools.permutations(["disk", "sums", "digest"])))
    def test_one_after_the_other_in_any_order(self, fresh, order):
        plain = disk("d", SIZE)
        hashed = HashedDisk(plain, fresh())
        sums = SumsArtifact("sums.d", hashed, patience=0.05)
        expected = {
            "disk": (hashed.open().read, plain.read_at(0, plain.size)),
            "sums": (sums.open().read, reference(plain)),
            "digest": (sums.digest, blake3(reference(plain)).digest()),
        }
        for what in order:
            read, right = expected[what]
            assert read() == right
        hashed.close()

    def test_waits_for_a_reader_that_moves(self, fresh):
        size = 20 * MIB
        hashed = HashedDisk(disk("d", size), fresh())
        reader = pickle.loads(pickle.dumps(hashed))  # as in another process: no blocks are shared
        sums = SumsArtifact("sums.d", hashed, patience=0.1)
        with ThreadPoolExecutor(1) as pool:
            got = None
            for at in range(0, reader.size, MIB):
                reader.read_at(at, MIB)
                got = got or pool.submit(sums.digest)
                threading.Event().wait(0.1)  # all in all longer than the patience with a reader that stands still
            assert got.result(LIMIT) == blake3(reference(disk("d", size))).digest()
        assert hashed.bytes_read == size - CLUSTER
        reader.close()
        hashed.close()

    def test_a_reader_that_pauses_is_waited_for_longer_than_one_that_never_came(self, fresh):
        hashed = HashedDisk(disk("d", SIZE), fresh())
        sums = SumsArtifact("sums.d", hashed, patience=0.05)
        hashed.read_at(0, CLUSTER)
        start = time.monotonic()
        sums.digest()
        assert 0.5 <= time.monotonic() - start < LIMIT
        start = time.monotonic()
        sums.digest()
        assert time.monotonic() - start < 0.4
        hashed.close()

    def test_the_error_of_the_disk_reaches_the_reader_of_the_sums(self, fresh):
        hashed = HashedDisk(disk("d", SIZE, blocks=Failing(content(SIZE), 3 * MIB)), fresh())
        sums = SumsArtifact("sums.d", hashed, patience=0.05)
        assert sums.read_at(0, DIGEST) == reference(disk("d", SIZE))[:DIGEST]
        with pytest.raises(TargetUnavailable):
            sums.read_at(0, sums.size)
        hashed.close()

    @quick
    @given(offset=st.integers(0, 4000), length=st.integers(0, 4000))
    def test_any_range(self, fresh, offset, length):
        plain = disk("d", SIZE)
        hashed = HashedDisk(plain, fresh())
        sums = SumsArtifact("s", hashed, patience=0.0)
        assert sums.read_at(offset, length) == reference(plain)[offset : offset + length]
        hashed.close()


def test_clusters_are_hashed_whole():
    assert digests(memoryview(bytes(2 * CLUSTER))) == blake3(bytes(CLUSTER)).digest() * 2
    with pytest.raises(ValueError, match="no whole clusters"):
        digests(memoryview(bytes(100)))
