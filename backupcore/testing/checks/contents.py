"""What is restored is what was given, however it is read."""

from __future__ import annotations

from functools import partial
from random import Random

from backupcore.errors import ContractViolation
from backupcore.manifest import NAME
from backupcore.model import Artifact, BytesArtifact
from backupcore.testing import processes
from backupcore.testing.bench import KIB, MIB, Bench, Failed, Kept, NotApplicable
from backupcore.testing.given import Made
from backupcore.testing.life import digest

ODD = (
    # what a driver may want to call its own files, or mistake for something
    *("0", "a", "A", "a.b-c_d", "data", "labels", "labels.json", "latest", "manifest.json.part", "x" * 127),
)


def round_trip(bench: Bench) -> None:
    """Every byte comes back: 0 B, 1 B, many MiB, sparse, under its name, from a datastore that was opened anew."""
    artifacts = [
        Made("disk.vda.qcow2", 17 * MIB + 12_345, 1),
        Made("disk.vdb.qcow2", 9 * MIB, 2, every=16),
        Made("disk.vdc.qcow2", 5 * MIB, 3, every=1 << 30),  # zeros but for the first block
        BytesArtifact(NAME, b'{"kit": true}'),
        BytesArtifact("nvram", b""),
        BytesArtifact("sums.vda", b"\0"),
        BytesArtifact("vm.xml", "<domain>\r\n\u00e9\ufeff</domain>\n".encode()),
    ]
    bench.same(bench.keep(artifacts))


def odd_names(bench: Bench) -> None:
    """Artifacts with any name that the contract allows come back under it."""
    bench.same(bench.keep([BytesArtifact(name, name.encode()) for name in (*ODD, NAME)]))


def _small(bench: Bench) -> Kept:
    return bench.keep([Made("disk.vda.qcow2", 3 * MIB + 5, 4), *bench.artifacts()[1:]])


def read_at(bench: Bench) -> None:
    """`read_at` gives exactly the range, or what is left of it, where an artifact says that it is seekable."""
    kept = _small(bench)
    with bench.context() as ctx:
        found = bench.open().artifacts(kept.source, ctx)
        seekable = [one for one in kept.artifacts if found[one.name].seekable]
        if not seekable:
            stray = found["disk.vda.qcow2"]
            with bench.refused(ContractViolation, what="read_at of an artifact that is not seekable"):
                stray.read_at(0, 1)
            raise NotApplicable("no artifact that it restores is seekable")
        for given in seekable:
            _ranges(given, found[given.name])


def _ranges(given: Artifact, found: Artifact) -> None:
    size, random = given.size, Random(given.size)  # noqa: S311 - no secret
    ranges = [(0, 1), (0, size), (0, size + 1), (size - 1, 1), (size - 1, 10), (size, 1), (size + 1, 5), (size // 2, 0)]
    ranges += [(random.randrange(size), random.randrange(1, 200 * KIB)) for _ in range(8)]
    for offset, length in ranges:
        if found.read_at(offset, length) != given.read_at(offset, length):
            raise Failed(f"{given.name}: read_at({offset}, {length}) of {size} bytes gives other bytes")
        buffer = bytearray(length)
        count = found.read_into(offset, memoryview(buffer))
        if buffer[:count] != given.read_at(offset, length):
            raise Failed(f"{given.name}: read_into({offset}) of {length} bytes gives other bytes than read_at")


def several_readers(bench: Bench) -> None:
    """Several readers at once, in several threads, each get all of it."""
    kept = _small(bench)
    wanted = digest(kept.artifacts[0])
    with bench.context() as ctx, bench.threads(3) as pool:
        disk = bench.open().artifacts(kept.source, ctx)["disk.vda.qcow2"]
        jobs = [pool.submit(digest, disk) for _ in range(3)]
        if disk.seekable:
            reads = [(at, pool.submit(disk.read_at, at, 70_001)) for at in range(0, 3 * MIB, MIB // 2)]
            for at, read in reads:
                if read.result() != kept.artifacts[0].read_at(at, 70_001):
                    raise Failed(f"read_at beside other readers gives other bytes at {at}")
        if any(job.result() != wanted for job in jobs):
            raise Failed("three streams of one artifact, read at once, do not all give what was kept")


def closed_early(bench: Bench) -> None:
    """A stream may be read in odd steps, closed early and twice, opened again, or left open at the end."""
    kept = _small(bench)
    given = kept.artifacts[0].read_at(0, 4 * MIB)
    with bench.no_children("streams that were closed early or left open"):
        with bench.context() as ctx:
            disk = bench.open().artifacts(kept.source, ctx)["disk.vda.qcow2"]
            left_open = disk.open()
            left_open.read(1)
            disk.open().close()
            early = disk.open()
            if early.read(1000) != given[:1000]:
                raise Failed("the first 1000 bytes of a stream are not those that were kept")
            early.close()
            early.close()
            pieces = []
            with disk.open() as file:
                for count in (0, 1, 65_537, 3, MIB):
                    pieces.append(file.read(count))
                pieces.extend(iter(partial(file.read, 333_333), b""))
                if file.read(1):
                    raise Failed("a stream that has ended goes on")
            if b"".join(pieces) != given:
                raise Failed("a stream that is read in odd steps gives other bytes")
        del left_open


def other_process(bench: Bench) -> None:
    """Restored artifacts can be pickled and read by another process."""
    kept = _small(bench)
    with bench.context() as ctx:
        found = bench.open().artifacts(kept.source, ctx)
        with found["disk.vda.qcow2"].open() as file:
            file.read(1)  # now it holds whatever it holds while it is read
            try:
                answer = processes.call("digests", list(found.values()))
            except RuntimeError as error:
                raise Failed(str(error)) from error
            except Exception as error:
                raise Failed(f"the artifacts cannot be pickled: {type(error).__name__}: {error}") from error
    wrong = sorted(one.name for one in kept.artifacts if answer.get(one.name) != digest(one))
    if wrong:
        raise Failed(f"another process reads other bytes from {', '.join(wrong)}")
