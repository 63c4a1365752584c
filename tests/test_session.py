"""The life cycle of a run, with the in-memory driver and guest: what is stored, recorded, released, and when."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from threading import Timer

import pytest
from blake3 import blake3

import backupcore
from backupcore import hookimpl, run_backup
from backupcore.chain import plan
from backupcore.context import Context
from backupcore.datastore import Datastore
from backupcore.disk.nbd import ConnectionLost
from backupcore.disk.qcow2 import DiskArtifact
from backupcore.disk.reader import start
from backupcore.errors import (
    AccessDenied,
    BackupError,
    Cancelled,
    ContractViolation,
    HypervisorError,
    IncrementImpossible,
    IntegrityError,
    TargetFull,
    TargetUnavailable,
    UnsupportedOperation,
)
from backupcore.manifest import NAME, parse
from backupcore.model import VM, BytesArtifact, Image, Outcome, RunState, SourceRef, Stored, Type
from backupcore.session import Recorded
from backupcore.testing.guest import MemoryGuest, MemoryHypervisor
from backupcore.testing.memory import MemoryDriver
from tests.disk.odd_blocks import Hanging

WEB = VM(uuid="7d1c1a4e-0000-4000-8000-000000000001", name="web1")
MIB = 1 << 20


class Site:
    """A hypervisor, a driver and a catalog, all in memory, and a log of what was called."""

    def __init__(self, folder: Path) -> None:
        random = Random(1)
        self.folder = folder
        self.guest = MemoryGuest(WEB, {"vda": bytearray(3 * MIB + 512), "vdb": bytearray(random.randbytes(MIB))})
        self.guest.write("vda", MIB, random.randbytes(MIB))
        self.hypervisor = MemoryHypervisor([self.guest])
        self.driver = MemoryDriver()
        self.image: Image | None = None
        self.outcomes: list[Outcome] = []

    def datastore(self, driver: object | None = None, *site: object) -> Datastore:
        return Datastore(
            "mem", driver or self.driver, hypervisor=self.hypervisor, plugins=[*site, Witness(self.outcomes)]
        )

    @contextmanager
    def context(self) -> Iterator[Context]:
        folder = self.folder / str(len(list(self.folder.iterdir())))
        folder.mkdir()
        with Context(folder) as ctx:
            yield ctx

    def record(self, recorded: Recorded) -> None:
        if recorded.run.type is Type.FULL:
            image = Image(uuid=recorded.run.image, number=1, vm=WEB, datastore="mem", state="open", increments=())
        else:
            assert self.image
            image = self.image
        self.image = replace(image, increments=(*image.increments, recorded.increment))

    def backup(self, driver: object | None = None, *site: object, record: object = None, **settings: str) -> Recorded:
        run = plan(self.image, vm=WEB, host="h", datastore="mem", settings=settings)
        with self.context() as ctx:
            return run_backup(self.datastore(driver, *site), run, ctx, record=record or self.record)


class Witness:
    """A site plugin that notes how each run ended."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes

    @hookimpl(wrapper=True)
    def postbackup(self, outcome):
        self.outcomes.append(outcome)
        return (yield)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def kept(site: Site, recorded: Recorded) -> dict[str, bytes]:
    return site.driver.kept[recorded.increment.source.token][1]


def test_a_full_and_an_increment(site: Site):
    full = site.backup()
    assert (full.run.type, full.increment.id, full.increment.pid) == (Type.FULL, 0, -1)
    assert sorted(kept(site, full)) == [
        "disk.vda.qcow2",
        "disk.vdb.qcow2",
        "manifest.json",
        "sums.vda",
        "sums.vdb",
        "vm.xml",
    ]
    assert full.read == 2 * MIB
    assert full.increment.size == sum(map(len, kept(site, full).values()))
    site.guest.write("vdb", 10, b"x" * 100)
    increment = site.backup()
    assert (increment.run.type, increment.increment.id, increment.increment.pid) == (Type.INCREMENT, 1, 0)
    assert increment.read == 65536
    assert increment.run.image == full.run.image
    assert not site.guest.busy
    assert {one.state for one in site.outcomes} == {RunState.RECORDED}


def test_the_manifest_binds_the_backup(site: Site):
    full = site.backup()
    increment = site.backup()
    data = kept(site, full)[NAME]
    first, second = parse(data, "full"), parse(kept(site, increment)[NAME], "increment")
    assert full.increment.digest == blake3(data).hexdigest()
    assert second.parent.digest == full.increment.digest
    assert second.parent.point == first.point == full.run.point
    assert first.vm.uuid == WEB.uuid
    for disk in first.disks:
        stored, sums = kept(site, full)[disk.artifact], kept(site, full)[disk.sums]
        start = len(stored) - len(sums) // 32 * 65536
        assert blake3(stored[:start]).hexdigest() == disk.tables_digest
        assert blake3(sums).hexdigest() == disk.sums_digest
        clusters = [stored[at : at + 65536] for at in range(start, len(stored), 65536)]
        assert sums == b"".join(blake3(cluster).digest() for cluster in clusters)
    assert {part.name for part in first.artifacts} == set(kept(site, full)) - {NAME} - {
        part.artifact for part in first.disks
    }


def test_only_the_last_two_checkpoints_stay(site: Site):
    runs = [site.backup() for _ in range(4)]
    assert set(site.guest.checkpoints) == {runs[2].run.point, runs[3].run.point}


def test_mode_full_tracks_nothing(site: Site):
    first, second = site.backup(MODE="FULL"), site.backup(MODE="FULL")
    assert first.run.image != second.run.image
    assert not site.guest.checkpoints


def test_a_lost_checkpoint_leads_to_a_full_in_a_new_image_with_the_reason(site: Site):
    full = site.backup()
    site.guest.checkpoints.clear()
    again = site.backup()
    assert again.run.type is Type.FULL
    assert again.run.image != full.run.image
    assert "checkpoint" in parse(kept(site, again)[NAME], "").reason
    assert set(site.guest.checkpoints) == {again.run.point}
    assert [one.state for one in site.outcomes[-2:]] == [RunState.FAILED, RunState.RECORDED]


def test_a_source_lost_in_the_datastore_leads_to_a_full(site: Site):
    full = site.backup()
    site.driver.kept.clear()
    assert "no longer in the datastore" in site.backup().run.reason
    assert full


def test_what_a_file_view_is_given_loads_little(site):
    """What its process loads is paid for at each backup."""
    loaded: list[str] = []

    class Elsewhere(MemoryDriver):
        @hookimpl
        def backup(self, artifacts, run, ctx):
            code = (
                "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); import backupcore.disk.mount;"
                "print([a.size for a in pickle.load(sys.stdin.buffer)]); print(*sys.modules)"
            )
            given = pickle.dumps(sys.path) + pickle.dumps(artifacts)
            child = subprocess.run([sys.executable, "-I", "-c", code], input=given, capture_output=True, check=True)
            sizes, modules = child.stdout.decode().splitlines()
            assert sizes == str([artifact.size for artifact in artifacts])
            loaded.extend(modules.split())
            return MemoryDriver.backup(self, artifacts, run, ctx)

    site.backup(Elsewhere())
    assert "backupcore.draft" in loaded
    assert not {"msgspec", "pluggy", "importlib.metadata", "asyncio", "mfusepy"} & set(loaded)


@backupcore.driver
class Failing(MemoryDriver):
    error: object = backupcore.option("what backup raises", default=None)

    @hookimpl
    def backup(self, artifacts, run, ctx):
        artifacts[0].read_at(0, 10)
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised", "state"),
    [
        (TargetFull("full"), TargetFull, RunState.FAILED),
        (Cancelled("stop"), Cancelled, RunState.CANCELLED),
        (ConnectionRefusedError(111, "refused"), TargetUnavailable, RunState.FAILED),
        (OSError(28, "No space left on device"), TargetFull, RunState.FAILED),
        (ValueError("a bug"), ContractViolation, RunState.FAILED),
        (KeyboardInterrupt(), Cancelled, RunState.CANCELLED),
    ],
)
def test_a_failed_backup_releases_the_guest_and_leaves_the_chain_as_it_was(site: Site, error, raised, state):
    full = site.backup()
    with pytest.raises(raised):
        site.backup(Failing(error=error))
    assert not site.guest.busy
    assert site.outcomes[-1].state is state
    assert set(site.guest.checkpoints) == {full.run.point}, "the new checkpoint goes, the parent's stays"
    site.guest.write("vda", 0, b"later")
    assert site.backup().run.type is Type.INCREMENT


def test_a_backup_that_cannot_be_recorded_is_a_failed_one(site: Site):
    def record(recorded: Recorded) -> None:
        raise TargetFull("catalog")

    with pytest.raises(TargetFull, match="catalog"):
        site.backup(record=record)
    assert site.outcomes[-1].state is RunState.FAILED
    assert site.outcomes[-1].stored is not None, "it is in the datastore all the same: nothing complete is deleted"
    assert not site.guest.checkpoints


def test_disks_are_closed_before_the_guest_is_released(site: Site):
    seen = []

    class Late(MemoryDriver):
        @hookimpl
        def backup(self, artifacts, run, ctx):
            seen.extend(artifacts)
            return MemoryDriver.backup(self, artifacts, run, ctx)

    class Look:
        @hookimpl(wrapper=True)
        def postbackup(self):
            with pytest.raises(BackupError):
                seen[0].read_at(1 << 20, 65536)
            seen.append("looked")
            return (yield)

    site.backup(Late(), Look())
    assert "looked" in seen


def test_a_watcher_that_fails_the_run_gives_it_its_error(site: Site):
    class Watcher(MemoryDriver):
        @hookimpl
        def backup(self, artifacts, run, ctx):
            ctx.fail(TargetFull("scratch is filling up"))
            return MemoryDriver.backup(self, artifacts, run, ctx)

    with pytest.raises(TargetFull, match="scratch"):
        site.backup(Watcher())
    assert isinstance(site.outcomes[-1].error, TargetFull)


def test_a_watcher_has_a_moment_to_say_why_a_disk_is_served_no_more(site: Site):
    class Lost(MemoryDriver):
        @hookimpl
        def backup(self, artifacts, run, ctx):
            Timer(0.2, ctx.fail, [HypervisorError("the VM has ended")]).start()
            raise ConnectionLost("disk vda: the connection was lost")

    with pytest.raises(HypervisorError, match="the VM has ended"):
        site.backup(Lost())
    assert not site.guest.busy


def test_an_error_of_the_release_is_a_warning_and_does_not_spare_the_driver(site: Site, caplog):
    called = []

    class Sticky(MemoryHypervisor):
        @hookimpl
        def postbackup(self, run, outcome):
            raise HypervisorError("job does not end", "End it.")

    class Tidy(MemoryDriver):
        @hookimpl
        def postbackup(self):
            called.append(True)

    site.hypervisor = Sticky([site.guest])
    recorded = site.backup(Tidy())
    assert recorded.warnings == ("job does not end. End it.",)
    assert called == [True]
    assert caplog.messages == [], "who asked for the backup tells it"
    with pytest.raises(TargetFull, match="store"):
        site.backup(Failing(error=TargetFull("store")))
    assert set(caplog.messages) == {f"after the backup of {site.guest.vm.name}: job does not end. End it."}


class Unspeakable(OSError):
    """An error of a library whose text cannot be had."""

    def __str__(self) -> str:
        raise TypeError("no text")


@pytest.mark.parametrize(
    "problem",
    [ZeroDivisionError("bug"), SystemExit(0), TargetFull("full"), asyncio.CancelledError(), Unspeakable()],
    ids=lambda problem: type(problem).__name__,
)
@pytest.mark.parametrize("before", [True, False])
def test_a_wrapper_that_raises_does_not_keep_the_guest_nor_the_driver(site: Site, problem: BaseException, before: bool):
    called = []

    class Wrapper:
        @hookimpl(wrapper=True)
        def postbackup(self):
            if before:
                raise problem
            yield
            raise problem

    class Tidy(MemoryDriver):
        @hookimpl
        def postbackup(self, outcome):
            called.append(outcome.state)

    class Counting(MemoryHypervisor):
        @hookimpl
        def postbackup(self, run, outcome):
            called.append("guest")
            return MemoryHypervisor.postbackup(self, run, outcome)

    site.hypervisor = Counting([site.guest])
    recorded = site.backup(Tidy(), Wrapper())
    assert called == ["guest", RunState.RECORDED], "each of them once"
    assert len(recorded.warnings) == 2
    assert site.guest.busy == ""


def test_what_a_driver_has_begun_must_have_gone_well_before_the_guest_is_touched(site: Site):
    class Asking(MemoryDriver):
        @hookimpl
        def prebackup(self, ctx):
            def wrong():
                assert site.guest.busy == "", "the guest was touched"
                raise AccessDenied("wrong password")

            ctx.on_touch(wrong)

    with pytest.raises(AccessDenied, match="wrong password"):
        site.backup(Asking())
    assert site.guest.checkpoints == {}


def test_a_driver_that_ends_the_program_ends_nothing(site: Site):
    class Leaving(MemoryDriver):
        @hookimpl
        def backup(self):
            sys.exit(0)

    with pytest.raises(ContractViolation, match="backup failed with SystemExit"):
        site.backup(Leaving())
    assert site.outcomes[-1].state is RunState.FAILED


def test_an_error_that_nobody_can_print_or_keep_is_told_all_the_same(site: Site):
    """Names of files that are no UTF-8 come as surrogates, which SQLite refuses; a text of megabytes fills a log."""

    class Broken(MemoryDriver):
        @hookimpl
        def backup(self):
            raise RuntimeError("\udcff" + "x" * 10_000)

    with pytest.raises(ContractViolation, match=r"failed with RuntimeError: \\udcffx") as told:
        site.backup(Broken())
    assert len(told.value.message.encode()) < 3000
    assert BackupError("\udcff", "\udcfe").in_full == r"\udcff. \udcfe"


def test_a_driver_that_skips_bytes_is_found_out(site: Site):
    class Lazy(MemoryDriver):
        @hookimpl
        def backup(self, artifacts, run, ctx):
            return Stored(source=SourceRef("x"))

    with pytest.raises(ContractViolation, match="has not read all of"):
        site.backup(Lazy())


def test_what_a_driver_may_not_do(site: Site):
    class Silent(MemoryDriver):
        @hookimpl
        def backup(self, artifacts, run, ctx):
            return None

    with pytest.raises(ContractViolation, match="backup returned NoneType"):
        site.backup(Silent())

    class Default(MemoryDriver):
        @hookimpl
        def backup(self, artifacts, run, ctx=None):
            return None

    with pytest.raises(ContractViolation, match="ctx has a default"):
        site.datastore(Default())

    class Misspelt(MemoryDriver):
        @hookimpl
        def pre_backup(self, run):
            return None

    with pytest.raises(ContractViolation, match="pre_backup"):
        site.datastore(Misspelt())

    class Half:
        @hookimpl
        def backup(self, artifacts, run, ctx):
            return None

    with pytest.raises(ContractViolation, match="restore, delete, sources"):
        site.datastore(Half())
    for token in ("..", "a/b", "", "-rf", "a" * 129, "a\n"):
        with pytest.raises(ContractViolation):
            SourceRef(token)


class Unfounded(MemoryHypervisor):
    """Gives what changed of every disk, whatever the parent holds."""

    @hookimpl
    def prebackup(self, run, ctx):
        prepared = MemoryHypervisor.prebackup(self, run, ctx)
        return replace(prepared, disks=tuple(replace(disk, whole=run.parent is None) for disk in prepared.disks))


def test_changes_of_a_disk_that_the_parent_does_not_hold_are_a_breach_of_the_contract(site: Site):
    site.hypervisor = Unfounded([site.guest])
    site.backup()
    site.guest.disks["vdc"] = bytearray(MIB)
    with pytest.raises(ContractViolation, match="what changed of disk vdc, which the parent does not hold"):
        site.backup()
    assert not site.guest.busy


def test_checkpoints_that_no_chain_needs_go_with_a_run(site: Site):
    site.backup()
    site.guest.checkpoints |= {"of another chain": {}, "stray": {}}
    parent = site.image.increments[-1].point
    run = plan(site.image, vm=WEB, host="h", datastore="mem", settings={})
    with site.context() as ctx:
        run_backup(site.datastore(), replace(run, keep=(parent, "of another chain")), ctx, record=site.record)
    assert set(site.guest.checkpoints) == {parent, site.image.increments[-1].point, "of another chain"}


def test_an_increment_that_is_impossible_twice_is_an_error(site: Site):
    class Never(MemoryHypervisor):
        @hookimpl
        def prebackup(self, run, ctx):
            raise IncrementImpossible("no")

    site.backup()
    site.hypervisor = Never([site.guest])
    with pytest.raises(IncrementImpossible):
        site.backup()


def test_a_cancelled_run_stops_at_the_next_read(site: Site):
    class Cancelling(MemoryDriver):
        @hookimpl
        def backup(self, artifacts, run, ctx):
            ctx.cancel()
            return MemoryDriver.backup(self, artifacts, run, ctx)

    with pytest.raises(Cancelled):
        site.backup(Cancelling())
    assert site.outcomes[-1].state is RunState.CANCELLED
    assert not site.driver.kept


def test_a_run_that_was_cancelled_after_its_last_read_is_not_recorded(site: Site):
    """Nor is what its datastore has published kept, though nobody else could say on disk that it was given up."""
    recorded = []

    class Late:
        @hookimpl(wrapper=True)
        def backup(self, ctx):
            stored = yield
            ctx.cancel()
            return stored

    driver = MemoryDriver()
    with pytest.raises(Cancelled):
        site.backup(driver, Late(), record=recorded.append)
    assert (recorded, driver.kept) == ([], {})


def test_a_cancel_during_the_very_last_read_stops_the_run(site: Site):
    class Stopping(BytesArtifact):
        def read_at(self, offset, length):
            ctx.cancel()
            return super().read_at(offset, length)

    class Exact(MemoryDriver):
        @hookimpl
        def backup(self, artifacts, run, ctx):
            artifacts[0].read_at(0, artifacts[0].size)  # and not a read more
            return MemoryDriver.backup(self, [], run, ctx)

    run = plan(None, vm=WEB, host="h", datastore="mem", settings={})
    with site.context() as ctx, pytest.raises(Cancelled):
        site.datastore(Exact()).backup([Stopping("vm.xml", b"<domain/>")], run, ctx)
    assert not site.driver.kept


def test_a_cancel_ends_a_read_that_hangs(site: Site):
    """The guest's disk does not answer any more: a driver that reads in this process must not wait for ever."""

    class Stuck(MemoryHypervisor):
        @hookimpl
        def prebackup(self, run, ctx):
            prepared = MemoryHypervisor.prebackup(self, run, ctx)
            layout = prepared.artifacts[1].layout
            stuck = DiskArtifact(prepared.artifacts[1].name, layout, Hanging(b""))
            return replace(prepared, artifacts=(prepared.artifacts[0], stuck, *prepared.artifacts[2:]))

    class Patient(MemoryDriver):
        @hookimpl
        def backup(self, artifacts, run, ctx):
            Timer(0.2, ctx.cancel).start()
            return MemoryDriver.backup(self, artifacts, run, ctx)

    site.hypervisor = Stuck([site.guest])
    started = time.monotonic()
    with pytest.raises(Cancelled):
        site.backup(Patient())
    assert time.monotonic() - started < 4, "the end of the test's own time limit would read as a cancel, too"
    assert site.outcomes[-1].state is RunState.CANCELLED


class Read(MemoryHypervisor):
    """Its disks are read by a process of their own."""

    @hookimpl
    def prebackup(self, run, ctx):
        prepared = MemoryHypervisor.prebackup(self, run, ctx)
        reader = start(run.vm.name)
        ctx.stack.callback(reader.close)
        disks = [artifact for artifact in prepared.artifacts if isinstance(artifact, DiskArtifact)]
        for disk in disks:
            disk.reader = reader
        return prepared


def test_disks_with_a_reader_are_read_there(site: Site):
    plain = kept(site, site.backup(MODE="FULL"))
    site.hypervisor = Read([site.guest])
    full = site.backup(MODE="FULL")
    assert full.read == 2 * MIB
    same = {name for name in plain if name != NAME}
    assert {name: kept(site, full)[name] for name in same} == {name: plain[name] for name in same}


def test_a_reader_that_is_killed_fails_the_run_and_releases_the_guest(site: Site):
    class Murderer(MemoryDriver):
        @hookimpl
        def backup(self, artifacts, run, ctx):
            disk = artifacts[0]._inner
            disk.read_at(0, 1)
            disk._shown.reader.kill()
            return MemoryDriver.backup(self, artifacts, run, ctx)

    site.hypervisor = Read([site.guest])
    with pytest.raises(HypervisorError, match="^the process that reads the disks of VM web1 has ended"):
        site.backup(Murderer())
    assert site.outcomes[-1].state is RunState.FAILED
    assert not site.guest.busy


def test_manifest_refuses_what_is_none():
    with pytest.raises(UnsupportedOperation, match="format 2"):
        parse(json.dumps({"format": 2}).encode(), "x")
    for data in (b"", b"null", b"[" * 100000, b"{}", b'{"format": 1}', b"\xff", b"1" * 5000, b"x" * (16 * MIB + 1)):
        with pytest.raises(IntegrityError):
            parse(data, "x")
