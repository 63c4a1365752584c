"""What a random life goes by: its hosts and their VM, the decisions, and what must be true of the backups.

The truth of an instant is a copy by QEMU's own tools; which points it is the truth of is told by the datastore, where
each source has its point beside it. A point is *due* from the moment in which a catalog has it, which is when it was
reported done, until it is let go on purpose: it has to be restorable from the datastore alone.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from lab.host import Done, Host, PassedBy, Recorded, size_of, stopped, wait_until
from tests.test_killed import SNAPSHOT, STEPS, TEMPORARY, dies_of_a_client, piles_up

MIB = 1 << 20
WARNED, NOT_FOUND, UNAVAILABLE, UNSUPPORTED, BUSY, HYPERVISOR = 3, 4, 5, 9, 10, 11
"""The exit codes."""


class NotNow(Exception):
    """What was drawn cannot be done in the VM's state; something else is drawn."""


class World:
    """`hosts` are installations of one VM and one datastore ``nas`` of the driver ``lab``; the first is the usual one.

    `doubtful` says what was done to the disks, to a catalog or to the target since the last backup: the next one is
    looked at at once. `behind` are the hosts whose catalog may know less than the datastore, `flattening` those whose
    flatten was killed. `at` is the libvirt that has the VM now, `runtime` what that one has as /run/libvirt. While it
    is `alone` only the first one there works.
    """

    def __init__(self, hosts: Sequence[Host], seed: int) -> None:
        self.hosts = tuple(hosts)
        self.first = self.hosts[0]
        self.vm = self.first.vm
        self.folder = self.vm.folder
        self.store = Path(self.first.options.get("path", self.first.folder / "store"))
        self.choice = random.Random(seed)
        self.truths: dict[str, dict[str, Path]] = {}
        self.due: set[str] = set()
        self.log: list[str] = []
        self.counts: Counter[str] = Counter()
        self.doubtful: list[str] = []
        self.behind: set[str] = set()
        self.flattening: set[str] = set()
        self.emptied = 0
        self.put_back: set[str] = set()
        self.at = self.first.uri
        self.runtime = Path("/run/libvirt")
        self.suspended = False
        self.snapshots = False
        self.alone = False
        self.closed = piles_up(self.first)
        self.threads = int(ElementTree.fromstring(self.vm.domain.XMLDesc()).findtext("iothreads", "0"))
        # Whether the VM is held by overlays for the time of a run.
        self.temporary = self.threads > 0 and dies_of_a_client(self.first)
        self.numbers = iter(range(1, 1 << 30))
        self.spare = self.folder / "vdc.qcow2"
        self.tool("qemu-img", "create", "-q", "-f", "qcow2", str(self.spare), "8M")

    # Decisions

    @property
    def here(self) -> list[Host]:
        """The hosts on which the VM is now."""
        return [host for host in self.hosts if host.uri == self.at]

    def any_host(self) -> Host:
        """One of those where the VM is; the first of them mostly."""
        here = self.here[: 1 if self.alone else None]
        (host,) = self.choice.choices(here, [4] + [1] * (len(here) - 1))
        if len(self.hosts) > 1:
            self.say(f"of {host.folder.name}")
        return host

    def any_of(self, host: Host) -> Recorded:
        """One of the last increments that are due, as this host's catalog has it."""
        recorded = [one for one in host.recorded() if one.point in self.due]
        if not recorded:
            raise NotNow
        return self.choice.choice(recorded[-8:])

    def reset(self) -> list[str]:
        return ["--reset"] if self.choice.random() < 0.15 else []

    def say(self, text: str) -> None:
        """More of what is being done, for the log."""
        self.log[-1] += f" {text}"

    # The VM

    def tool(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def size(self, disk: str) -> int:
        if self.vm.active:
            return int(self.vm.domain.blockInfo(disk)[0])
        return size_of(self.vm.disk(disk))

    def files(self, disk: str) -> list[Path]:
        """The files of a disk, its newest first."""
        done = self.tool("qemu-img", "info", "-U", "--backing-chain", "--output=json", str(self.vm.disk(disk)))
        return [Path(one["filename"]) for one in json.loads(done)]

    def format(self, disk: str) -> str:
        driver = ElementTree.fromstring(self.vm.domain.XMLDesc()).find(f"devices/disk/target[@dev='{disk}']/../driver")
        assert driver is not None
        return driver.get("type", "")

    def io(self, disk: str, command: str) -> None:
        self.say(f"{disk}: {command}")
        if self.vm.active:
            self.vm.io(disk, command)
        else:
            self.tool("qemu-io", "-f", self.format(disk), "-c", command, str(self.vm.disk(disk)))

    def any_job(self) -> bool:
        domain = self.vm.domain
        return bool(domain.jobInfo()[0]) or any(domain.blockJobInfo(disk, 0) for disk in self.vm.targets())

    def power(self) -> None:
        if self.vm.active:
            self.vm.destroy()
            self.suspended = False
        else:
            self.vm.start()

    def instant(self) -> str:
        """The step right after the instant of a run of a VM that runs."""
        if self.snapshots:
            return SNAPSHOT["the instant of the overlays"]
        return TEMPORARY["the instant of the temporary overlays"] if self.temporary else STEPS["the instant"]

    def comes_to(self, process: subprocess.Popen[str], step: str) -> bool:
        """Wait until a run stops at this step. False if it has ended without: an increment may have nothing to read,
        and with SNAPSHOT a backup job of QEMU's, whose instant is another, is used where overlays collect for another
        installation, or would be passed by.
        """
        try:
            wait_until(partial(stopped, process.pid), step)
        except PassedBy:
            self.say("(passed by)")
            return False
        return True

    def steps(self) -> dict[str, str]:
        """All steps of a run of a VM that runs."""
        return {**STEPS, **SNAPSHOT} if self.snapshots else TEMPORARY if self.temporary else STEPS

    # Truths

    def truth(self) -> dict[str, Path]:
        """The disks as they are now, copied."""
        folder = self.first.folder / "truth" / str(next(self.numbers))
        if not self.vm.active:
            return self.vm.copy_disks(folder)
        if self.suspended:
            for disk in self.vm.targets():  # what was written since it stands still may be in QEMU's caches only
                self.vm.flush(disk)
            return self.vm.copy_disks(folder)
        return self.vm.copy_truth(folder)

    def note(self, truth: dict[str, Path]) -> None:
        """What was stored since the last time, or may be, holds this; what a catalog has is due."""
        stored = [json.loads(labels.read_text())["point"] for labels in self.store.glob("*/.labels")]
        # What a dead run had stored is recorded by the next, when the disks are others.
        runs = [json.loads(run.read_text())["point"] for host in self.hosts for run in _runs(host)]
        for point in (*stored, *runs):
            self.truths.setdefault(point, truth)
        there = self.available()
        self.due |= {one.point for host in self.hosts for one in host.recorded() if one.point in there}

    def available(self) -> set[str]:
        """The points that the datastore has with all that they build on, by its labels."""
        labels = [json.loads(path.read_text()) for path in self.store.glob("*/.labels")]
        found = {one["point"] for one in labels if one["type"] == "FULL"}
        while more := {one["point"] for one in labels if one.get("parent") in found} - found:
            found |= more
        return found

    @contextmanager
    def letting_go(self, host: Host) -> Iterator[None]:
        """In the block this host lets points go, by a rule or because it was told to: those are no longer due."""
        before = _points(host)
        yield
        gone = before - _points(host)
        self.due -= gone
        if gone:
            self.counts["points let go"] += len(gone)

    # What must be true

    def ended(self, host: Host, done: Done, truth: dict[str, Path]) -> None:
        """A backup has ended, and was not disturbed: it is an increment, or says why not, and leaves nothing."""
        hindered = self.held_up(host)
        if hindered and done.code == BUSY:
            self.say(f"-> busy: {hindered}")
            self.note(truth)
            return
        assert done.code in (0, WARNED), told(done)
        taken = json.loads(done.out)
        whole = {disk["id"]: disk["reason"] for disk in taken["disks"] if disk["whole"]}
        self.say(f"-> {taken['type']} {taken['image']}/{taken['increment']} {taken['reason'] or whole}")
        for warning in taken["warnings"]:
            self.say(f"(warned: {warning})")
            self.counts[f"warning: {warning[:40]}"] += 1
        assert (done.code == WARNED) == bool(taken["warnings"])
        self.counts[taken["type"]] += 1
        if taken["type"] == "FULL":
            assert taken["reason"], "a full says why"
        else:
            assert all(whole.values()), "a disk that is whole says why"
        self.note(truth)
        assert taken["point"] in self.due, "it is in the datastore, and in the catalog"
        self.put_back.discard(host.folder.name)
        self.nothing_left(host)
        if self.doubtful:
            self.doubtful.clear()
            self.compare(host, Recorded(taken["image"], taken["increment"], taken["point"], "open"))

    def dead(self, host: Host) -> bool:
        """Whether a run of this host was killed, and is not yet put right."""
        return any(_runs(host))

    def held_up(self, host: Host) -> str:
        """Why a backup of this host may be refused as busy: what a dead run of another one has left."""
        waiting = [other.folder.name for other in self.hosts if other is not host and self.dead(other)]
        return f"a run of {', '.join(waiting)} is dead" if waiting else ""

    def compare(self, host: Host, one: Recorded) -> None:
        assert host.differing(one.image, one.id, self.truths[one.point]) == [], one

    def nothing_left(self, host: Host) -> None:
        found = [line for line in host.left() if not (self.suspended and "stands still" in line)]
        if self.overlays_wait(host) or self.overlays_lost():
            stays = (str(host.state / "runs"), str(host.scratch / "overlays"))  # there, the overlays of block devices
            found = [line for line in found if not line.startswith(stays)]
        if self.held_up(host):
            found = [line for line in found if "job runs" not in line and "stands still" not in line]
        if host.folder.name in self.put_back:
            found = [line for line in found if not line.startswith("checkpoint")]
        # The socket of another's dead run lies in the VM's own folder.
        others = [other.scratch for other in self.hosts if other is not host]
        foreign = {f"backupcore-{folder.name}" for scratch in others for folder in scratch.glob("*")}
        found = [line for line in found if Path(line).name not in foreign]
        assert found == []

    def recovered(self, host: Host) -> None:
        """What dead runs have left is put right, or it is said what hinders that."""
        done = host.run("recover", self.vm.name)
        busy = self.overlays_wait(host) or (self.held_up(host) and done.code == BUSY)
        lost = done.code == HYPERVISOR and self.overlays_lost()
        assert lost or done.code == (BUSY if busy else 0), told(done)

    def overlays_wait(self, host: Host) -> bool:
        """Whether saved memory names the overlays of a dead run: they wait for a start, and its folder with them."""
        return self.vm.domain.hasManagedSaveImage() and self.dead(host)

    def overlays_lost(self) -> bool:
        """Whether an overlay is there that the VM does not use, as after a merge behind our back: each backup asks for
        its end, and the folder of a dead run stays until then.
        """
        used = {path for disk in self.vm.targets() for path in self.files(disk)}
        return any(path not in used for path in self.folder.glob("*.backupcore-*"))

    def new_installation(self) -> Host:
        """One that knows nothing but where the datastore is."""
        folder = self.first.folder / "new" / str(next(self.numbers))
        folder.mkdir(parents=True)
        first = self.first
        return Host(folder, self.vm, first.uri, driver=first.driver, options={"path": str(self.store)})

    def restorable(self, count: int | None = None) -> None:
        """From the datastore alone, by an installation that has never been there: all that is due, or the last `count`.

        All is found; of as many the bytes are compared.
        """
        host = self.new_installation()
        try:
            rebuilt = host.run("catalog", "rebuild", "nas")
            assert rebuilt.code == 0, told(rebuilt)
            found = {one.point: one for one in host.recorded()}
            lost = self.due - set(found)
            assert not lost, f"{len(lost)} points of {len(self.due)} are not found in the datastore any more: {lost}"
            due = [one for point, one in found.items() if point in self.due]
            for one in due if count is None else due[-count:]:
                self.compare(host, one)
        finally:
            shutil.rmtree(host.folder)


def told(done: Done) -> str:
    """How a command ended, for whoever reads that it should not have."""
    return f"exit code {done.code}: {done.err}{done.out}"


def _runs(host: Host) -> Iterator[Path]:
    return (host.state / "runs").glob("*/run.json")


def _points(host: Host) -> set[str]:
    return {one.point for one in host.recorded()}
