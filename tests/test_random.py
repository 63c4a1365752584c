"""A random life of a VM and of its backups: whatever the order, every increment that was reported done restores equal.

Writes, zeroes, discards, resizes, disks that come and go, restarts, crashes, definitions removed and made again; fulls,
increments, cancelled and killed backups, restores in place. The truth of an instant is a copy by QEMU's own tools. A
failure names its seed; ``SEED=… pytest tests/test_random.py`` takes the same decisions again (times are not repeated).
With ``-s`` the end tells how often each was taken.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest

from lab.domain_xml import DiskSpec
from lab.host import Host, Recorded, size_of, stopped, wait_until
from lab.vm import same
from tests.test_killed import SNAPSHOT, STEPS, TEMPORARY, dies_of_a_client, piles_up

MIB = 1 << 20
BUSY = 10  # the exit code


class NotNow(Exception):
    """What was drawn cannot be done in the VM's state; something else is drawn."""


class Life:
    """One VM, what the guest and its owner do to it, and the truths of its backups."""

    def __init__(self, host: Host, seed: int) -> None:
        self.host = host
        self.vm = host.vm
        self.choice = random.Random(seed)
        self.truths: dict[str, dict[str, Path]] = {}
        self.log: list[str] = []
        self.counts: Counter[str] = Counter()
        self.suspended = False
        self.snapshots = False
        self.closed = piles_up(host)
        self.threads = int(ElementTree.fromstring(self.vm.domain.XMLDesc()).findtext("iothreads", "0"))
        self.instant = 0
        self.spare = self.vm.folder / "vdc.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(self.spare), "8M"], check=True)

    # What the guest does

    def write(self) -> None:
        disk = self.choice.choice(self.vm.targets())
        size = self._size(disk)
        length = self.choice.choice([512, 4096, 65536, 300 * 1024, MIB])
        offset = self.choice.randrange(0, (size - length) // 512) * 512
        pattern = self.choice.randrange(1, 256)
        command = self.choice.choice(
            [f"write -P {pattern}", f"write -P {pattern}", "write -z", "write -z -u", "discard"]
        )
        self.counts[command.partition(" -P")[0]] += 1
        self._io(disk, f"{command} {offset} {length}")

    def _io(self, disk: str, command: str) -> None:
        self.log[-1] += f" {disk}: {command}"
        if self.vm.active:
            self.vm.io(disk, command)
        else:
            self._tool("qemu-io", "-f", self._format(disk), "-c", command, str(self.vm.disk(disk)))

    # What its owner does

    def resize(self) -> None:
        disk = self.choice.choice(self.vm.targets())
        size = self._size(disk)
        grow = size + self.choice.choice([512, 65536, 3 * MIB])
        if self.vm.active:
            # QEMU refuses it while a job runs, also a dead run's.
            if grow > 64 * MIB or self._any_job():
                raise NotNow
            self.log[-1] += f" {disk} to {grow}"
            self.vm.domain.blockResize(disk, grow, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
            return
        wanted = self.choice.choice([grow if grow <= 64 * MIB else size, max(4 * MIB, size - 2 * MIB)])
        self.log[-1] += f" {disk} to {wanted}"
        done = self._resize(disk, wanted)
        if "is inconsistent" in done.stderr:  # after a crash of QEMU; this is what our README says to do then
            self.log[-1] += ", once its bitmaps are forgotten"
            self.host.ask("vm", "forget", self.vm.name)
            done = self._resize(disk, wanted)
        assert done.returncode == 0, done.stderr

    def _any_job(self) -> bool:
        domain = self.vm.domain
        return bool(domain.jobInfo()[0]) or any(domain.blockJobInfo(disk, 0) for disk in self.vm.targets())

    def _resize(self, disk: str, size: int) -> subprocess.CompletedProcess[str]:
        command = ["qemu-img", "resize", "-q", "-f", self._format(disk), "--shrink", str(self.vm.disk(disk)), str(size)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def attach_or_detach(self) -> None:
        if "vdc" not in self.vm.targets():
            flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG | (libvirt.VIR_DOMAIN_AFFECT_LIVE if self.vm.active else 0)
            self.vm.domain.attachDeviceFlags(self.spare_xml(), flags)
        elif not self.vm.active and self.vm.disk("vdc") == self.spare:
            # Without an operating system no guest lets go of a disk; and while it lies under an overlay of ours, the
            # README says, it is not to be taken away.
            self.log[-1] += ": detach"
            self.vm.domain.detachDeviceFlags(self.spare_xml(), libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        else:
            raise NotNow

    def spare_xml(self) -> str:
        thread = "iothread='1'" if self.threads else ""
        return (
            f"<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap' {thread}/>"
            f"<source file='{self.spare}'/><target dev='vdc' bus='virtio'/><alias name='ua-vdc'/></disk>"
        )

    def power(self) -> None:
        if self.vm.active:
            self.vm.destroy()
            self.suspended = False
        else:
            self.vm.start()

    def crash(self) -> None:
        if not self.vm.active:
            raise NotNow
        pid = Path(f"/run/libvirt/qemu/{self.vm.name}.pid").read_text()
        os.kill(int(pid), signal.SIGKILL)
        wait_until(lambda: not self.vm.active, "libvirt to notice the crash")
        self.suspended = False

    def save(self) -> None:
        # libvirt lets nobody save a VM while a backup job is there, also a dead run's.
        if not self.vm.active or self.suspended or self._any_job():
            raise NotNow
        self.vm.domain.managedSave()

    def suspend_or_resume(self) -> None:
        if not self.vm.active:
            raise NotNow
        (self.vm.domain.resume if self.suspended else self.vm.domain.suspend)()
        self.suspended = not self.suspended

    def define_again(self) -> None:
        if self.vm.active or self.vm.domain.hasManagedSaveImage():
            raise NotNow
        xml = self.vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        self.vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
        self.vm.connection.defineXML(xml)

    def change_mode(self) -> None:
        """How increments are found, and how the guest is brought to rest."""
        if self.closed:
            raise NotNow
        self.snapshots = not self.snapshots
        mode, freeze = "SNAPSHOT" if self.snapshots else "CBT", self.choice.choice(["NONE", "SUSPEND"])
        self.log[-1] += f" {mode} {freeze}"
        self.host.ask("vm", "updateconf", self.vm.name, "--increment-mode", mode, "--fs-freeze", freeze)

    # Backups

    def back_up(self) -> None:
        truth = self._truth()
        done = self.host.run("--json", "backup", self.vm.name, *self._reset())
        assert done.code == 0, done.err
        taken = done.json
        self.log[-1] += f" -> {taken['type']} {taken['image']}/{taken['increment']} {taken['reason']}"
        self.counts[taken["type"]] += 1
        self._note(truth)
        self._nothing_left()

    def back_up_beside_writes(self) -> None:
        """The instant is held while the guest writes on."""
        if not self.vm.active:
            raise NotNow
        truth = self._truth()
        process = self.host.start("backup", self.vm.name, *self._reset(), at=self._instant(), stop=True)
        wait_until(partial(stopped, process.pid), "the instant")
        for _ in range(3):
            self.log.append("  meanwhile")
            self.write()
        process.send_signal(signal.SIGCONT)
        done = self.host.end(process)
        assert done.code == 0, done.err
        self._note(truth)
        self._nothing_left()

    def kill(self) -> None:
        if not self.vm.active:
            raise NotNow
        truth = self._truth()
        steps = {**STEPS, **SNAPSHOT} if self.snapshots else TEMPORARY if self._temporary() else STEPS
        step = self.choice.choice(list(steps))
        self.log[-1] += f" at {step!r}"
        killed = self.host.run("backup", self.vm.name, *self._reset(), at=steps[step])
        assert killed.code in (-signal.SIGKILL, 0), killed.err
        self._note(truth)
        for record in (self.host.state / "runs").glob("*/run.json"):
            # What it had stored is recorded by the next run, when the disks are others.
            self.truths.setdefault(json.loads(record.read_text())["point"], truth)

    def cancel(self) -> None:
        if not self.vm.active:
            raise NotNow
        truth = self._truth()
        names = ("before the reader is asked", "a disk is mapped", "all is prepared")
        step = self.choice.choice([self._instant(), *(STEPS[name] for name in names)])
        self.log[-1] += f" at {step!r}"
        process = self.host.start("backup", self.vm.name, *self._reset(), at=step, stop=True)
        wait_until(partial(stopped, process.pid), step)
        os.kill(process.pid, signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        done = self.host.end(process)
        # What little is left to read may be recorded before the wish is heard: the run has a thread of its own. What
        # follows the record is cut off then.
        cut_off = done.code == 3 and "the merge of its overlays was not waited for" in done.err
        assert done.code in (130, 0) or cut_off, done.err
        self._note(truth)
        self._nothing_left()

    def recover(self) -> None:
        done = self.host.run("recover", self.vm.name)
        assert done.code == (BUSY if self._overlays_wait() else 0), done.err
        self._nothing_left()

    def check_one(self) -> None:
        recorded = self.host.recorded()
        if not recorded:
            raise NotNow
        self._compare(self.choice.choice(recorded[-8:]))

    def restore_in_place(self) -> None:
        """One disk gets back what it held at some backup, and its size."""
        if self.vm.domain.hasManagedSaveImage() or self.host.overlays():
            raise NotNow
        recorded = [one for one in self.host.recorded() if set(self.truths[one.point]) & set(self.vm.targets())]
        if not recorded:
            raise NotNow
        one = self.choice.choice(recorded[-8:])
        truth = self.truths[one.point]
        disk = self.choice.choice(sorted(set(truth) & set(self.vm.targets())))
        self.log[-1] += f" {disk} of {one.image}/{one.id}"
        if self.vm.active:
            self.power()
        done = self.host.run(
            "restore", str(one.image), "--increment", str(one.id), "--in-place", "--disk", disk, "--drop-old"
        )
        assert done.code == 0, done.err
        now = self.vm.disk(disk)
        assert size_of(now) == size_of(truth[disk])
        assert same(now, truth[disk])

    # The whole

    def step(self) -> None:
        deeds: dict[Callable[[], None], int] = {
            self.write: 30,
            self.back_up: 14,
            self.back_up_beside_writes: 6,
            self.kill: 6,
            self.cancel: 3,
            self.power: 5,
            self.resize: 4,
            self.attach_or_detach: 4,
            self.crash: 2,
            self.save: 1,
            self.suspend_or_resume: 2,
            self.define_again: 3,
            self.change_mode: 2,
            self.recover: 2,
            self.check_one: 2,
            self.restore_in_place: 3,
        }
        (deed,) = self.choice.choices(list(deeds), list(deeds.values()))
        self.log.append(deed.__name__)
        try:
            deed()
        except NotNow:
            self.log.pop()
        else:
            self.counts[deed.__name__] += 1

    def check_all(self) -> None:
        for one in self.host.recorded():
            self._compare(one)

    def _compare(self, one: Recorded) -> None:
        assert self.host.differing(one.image, one.id, self.truths[one.point]) == [], one

    def _truth(self) -> dict[str, Path]:
        self.instant += 1
        if self.suspended:
            for disk in self.vm.targets():  # what was written since it stands still may be in QEMU's caches only
                self.vm.flush(disk)
            return self.vm.copy_disks(self.host.folder / "truth" / str(self.instant))
        return self.host.note_truth(str(self.instant))

    def _note(self, truth: dict[str, Path]) -> None:
        for one in self.host.recorded():
            self.truths.setdefault(one.point, truth)

    def _nothing_left(self) -> None:
        found = [line for line in self.host.left() if not (self.suspended and "stands still" in line)]
        if self._overlays_wait():
            found = [line for line in found if not line.startswith(str(self.host.state / "runs"))]
        assert found == []

    def _overlays_wait(self) -> bool:
        """Whether saved memory names the overlays of a dead run: they wait for a start, and its folder with them."""
        return self.vm.domain.hasManagedSaveImage() and any((self.host.state / "runs").glob("*/run.json"))

    def _instant(self) -> str:
        if self.snapshots:
            return SNAPSHOT["the instant of the overlays"]
        return TEMPORARY["the instant of the temporary overlays"] if self._temporary() else STEPS["the instant"]

    def _temporary(self) -> bool:
        """Whether the VM is held by overlays for the time of a run."""
        return self.threads > 0 and dies_of_a_client(self.host)

    def _reset(self) -> list[str]:
        return ["--reset"] if self.choice.random() < 0.15 else []

    def _size(self, disk: str) -> int:
        if self.vm.active:
            return int(self.vm.domain.blockInfo(disk)[0])
        return size_of(self.vm.disk(disk))

    def _format(self, disk: str) -> str:
        driver = ElementTree.fromstring(self.vm.domain.XMLDesc()).find(f"devices/disk/target[@dev='{disk}']/../driver")
        assert driver is not None
        return driver.get("type", "")

    def _tool(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def live(host: Host, seconds: float, *, usual: int | None = None) -> None:
    """A life of so many seconds; `usual` is its seed unless SEED names one, None for a new one each time."""
    seed = int(os.environ.get("SEED") or usual or random.randrange(1 << 32))
    life = Life(host, seed)
    end = time.monotonic() + seconds * 0.7
    try:
        while time.monotonic() < end:
            life.step()
        life.log.append("at the end")
        life.check_all()
    except BaseException as error:
        error.add_note(f"SEED={seed}; what happened:\n" + "\n".join(life.log))
        raise
    finally:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(life.counts.items()))
        sys.stdout.write(f"SEED={seed}: {counts}\n")


@pytest.fixture
def host(make_vm, libvirt_uri: str, vm_folder: Path) -> Host:
    disks = [
        DiskSpec(target="vda", size=24 * MIB),
        DiskSpec(target="vdb", size=8 * MIB + 512),
    ]
    return Host(vm_folder, make_vm(disks, label="random"), libvirt_uri, driver="lab")


@pytest.fixture
def threaded(make_vm, libvirt_uri: str, vm_folder: Path) -> Host:
    """A host whose VM has its disks on an I/O thread."""
    sizes = {"vda": 24 * MIB, "vdb": 8 * MIB + 512}
    disks = [DiskSpec(target=target, size=size, driver="iothread='1'") for target, size in sizes.items()]
    return Host(vm_folder, make_vm(disks, label="random", iothreads=1), libvirt_uri, driver="lab")


@pytest.mark.timeout(600)  # a loaded machine takes longer for the comparisons at the end
def test_a_random_life(host: Host):
    live(host, 60, usual=337210652)  # a red `make test` is to be about the change; `make soak` looks for what is new


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_random_life_with_an_io_thread(threaded: Host):
    live(threaded, 40, usual=1)


@pytest.mark.soak
def test_a_long_random_life(host: Host):
    live(host, float(os.environ.get("SECONDS", "600")))


@pytest.mark.soak
def test_a_long_random_life_with_an_io_thread(threaded: Host):
    live(threaded, float(os.environ.get("SECONDS", "600")))


# What random lives have found


def test_a_disk_that_was_cut_off_before_its_full_and_grows_later(host: Host):
    """QEMU shows what lay behind the cut within the same cluster of the image, and no bitmap tells it."""
    host.vm.io("vdb", "write -P 0x55 0 6M")
    host.vm.destroy()
    path = str(host.vm.disk("vdb"))
    subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", path, str(4 * MIB + 66560)], check=True)
    host.vm.start()
    host.backup()
    host.vm.domain.blockResize("vdb", 7 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    truth = host.note_truth("grown")
    taken = host.backup()
    assert (taken["type"], taken["read"] < 2 * MIB) == ("INCREMENT", True)
    assert host.differing(taken["image"], taken["increment"], truth) == []


def test_a_disk_that_only_the_running_vm_has_is_restored_with_a_definition(host: Host):
    """``virsh attach-disk --live`` leaves the stored definition, which is what a backup keeps, without the disk."""
    life = Life(host, 0)
    host.vm.domain.attachDeviceFlags(life.spare_xml(), libvirt.VIR_DOMAIN_AFFECT_LIVE)
    host.vm.io("vdc", "write -P 0x55 1M 1M")
    truth = host.note_truth("attached")
    taken = host.backup()
    assert set(truth) == {"vda", "vdb", "vdc"}
    assert host.differing(taken["image"], taken["increment"], truth) == []


@pytest.mark.soak  # the plugin's own tests have it in 3 s
def test_a_dead_run_is_released_while_one_of_its_overlays_has_to_stay(host: Host):
    """Below the cut of a disk that has grown again nothing is merged before the next backup; no folder waits for it."""
    vm = host.vm
    host.ask("vm", "updateconf", vm.name, "--increment-mode", "SNAPSHOT")
    vm.io("vdb", "write -P 0x55 0 8M")
    host.backup()
    vm.destroy()
    command = ["qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", str(vm.disk("vdb")), str(4 * MIB)]
    subprocess.run(command, check=True)
    vm.start()
    assert host.run("backup", vm.name, at=STEPS["recorded"]).code == -signal.SIGKILL
    vm.domain.blockResize("vdb", 7 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    vm.io("vdb", "write -P 0x66 5M 64k")
    recovered = host.run("recover", vm.name)
    assert (recovered.code, host.left(), len(host.overlays())) == (0, [], 3), recovered.err
    assert "was made smaller and has grown since" in recovered.err
    truth = host.note_truth("grown")
    taken = host.backup()
    assert (taken["type"], host.left(), len(host.overlays())) == ("INCREMENT", [], 2)
    assert host.differing(taken["image"], taken["increment"], truth) == []
