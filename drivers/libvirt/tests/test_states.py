"""The states of a VM: in words, and taken as paused wherever libvirt begins a backup of it."""

from __future__ import annotations

import os

import libvirt
import pytest

from backupcore.errors import Busy, IncrementImpossible, UnsupportedOperation
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.release.giving_up import Run
from backupcore_libvirt.release.watching import WATCHES
from backupcore_libvirt.states import State, consistency_of, no_overlay
from lab.boot_sector import boot_sector

MiB = 1 << 20
IN_WORDS = [
    ((0, 0), "off", "off"),
    ((1, 1), "running", "crash"),
    ((2, 0), "running", "crash"),
    ((3, 0), "paused", "paused"),
    ((3, 1), "paused", "paused"),
    ((3, 2), "paused (it is being migrated)", UnsupportedOperation),
    ((3, 4), "paused (its memory is being dumped)", "paused"),
    ((3, 5), "paused (after an I/O error of a disk)", "paused"),
    ((3, 6), "paused (by its watchdog)", "paused"),
    ((3, 8), "paused (it is shutting down)", Busy),
    ((3, 10), "paused (the guest has crashed)", "paused"),
    ((3, 12), "paused (it was migrated to another host)", UnsupportedOperation),
    ((3, 99), "paused (for a reason that this version of vmkeep does not know)", UnsupportedOperation),
    ((4, 0), "shutting down", Busy),
    ((5, 1), "off", "off"),
    ((5, 4), "off (it was migrated to another host)", UnsupportedOperation),
    ((5, 5), "off (its memory was saved)", "crash"),
    ((6, 1), "crashed", "paused"),
    ((7, 0), "asleep", "paused"),
    ((99, 0), "in a state that this version of vmkeep does not know", UnsupportedOperation),
]


class Being(Domain):
    """A VM that is a state and nothing else."""

    def __init__(self, state: tuple[int, int], *, saved: bool = False) -> None:
        self.name = "web1"
        self._state = state
        self._saved = saved

    def state(self) -> tuple[int, int]:
        return self._state

    def is_saved(self) -> bool:
        return self._saved


@pytest.mark.parametrize(("state", "words", "outcome"), IN_WORDS)
def test_every_state_has_words_and_no_number(state, words, outcome):
    domain = Being(state)
    assert str(State.of(domain)) == words
    if isinstance(outcome, str):
        assert consistency_of(domain) == outcome
        return
    with pytest.raises(outcome) as refused:
        consistency_of(domain)
    assert f"VM web1 is {words}" in refused.value.message
    assert refused.value.hint
    assert "99" not in refused.value.in_full


def test_what_a_saved_vm_has_on_its_disks_is_as_after_a_crash():
    domain = Being((5, 5), saved=True)
    assert (str(State.of(domain)), consistency_of(domain)) == ("saved", "crash")


def test_a_guest_that_sleeps_gets_no_overlay():
    assert "virsh dompmwakeup web1" in no_overlay(Being((7, 0)))
    assert [no_overlay(Being(state)) for state in ((1, 1), (3, 1), (5, 1), (6, 1))] == [""] * 4


def booting(code: str) -> bytes:
    """A disk whose first sector does this, and then halts for ever."""
    return (bytes.fromhex(code) + b"\xf4\xeb\xfd").ljust(510, b"\0") + b"\x55\xaa" + bytes(MiB - 512)


# To the port of the chipset by which a guest goes to sleep (PM1a_CNT: SLP_EN, S3), and to that of a panic device.
ASLEEP, CRASHED = booting("ba0406 b80024 ef"), booting("ba0505 b001 ee")


@pytest.mark.parametrize(
    ("content", "devices", "number", "words"),
    [
        (ASLEEP, "", libvirt.VIR_DOMAIN_PMSUSPENDED, "asleep"),
        (CRASHED, "<panic model='isa'/>", libvirt.VIR_DOMAIN_CRASHED, "crashed"),
    ],
    ids=["asleep", "crashed"],
)
def test_a_guest_that_does_not_run_is_taken_as_paused(
    lab, runs, same, wait_for, tmp_path, content, devices, number, words
):
    boot = tmp_path / "boot.raw"
    boot.write_bytes(content)
    vm = lab.vm(["qcow2:8"], content=boot, more=devices, start=False)
    vm.change(("<on_crash>destroy</on_crash>", "<on_crash>preserve</on_crash>"))
    vm.start()
    wait_for(lambda: vm.domain.state()[0] == number, words, 60)
    assert runs.hypervisor.find(vm.name).state_in_full == words
    truth = vm.copy_disks(tmp_path / "truth")
    with runs.take(runs.run(vm, settings={"FS_FREEZE": "SUSPEND"})) as taken:
        same([runs.keep(taken, tmp_path / "layer")], truth)
    assert taken.prepared.consistency == "paused"
    assert vm.domain.state()[0] == number, "it is as it was"
    with runs.take(runs.run(vm, taken)) as again:
        assert not any(disk.whole for disk in again.prepared.disks)
    if words == "asleep":
        overlays = {"MODE": "INCREMENT", "INCREMENT_MODE": "SNAPSHOT"}
        with runs.take(runs.run(vm, settings=overlays)) as by_job:
            same([runs.keep(by_job, tmp_path / "by job")], truth)
        impossible = pytest.raises(IncrementImpossible, match="virsh dompmwakeup")
        with impossible, runs.take(runs.run(vm, by_job, settings=overlays)):
            pass
    refused = pytest.raises(UnsupportedOperation, match=f"is {words}, so its agent cannot freeze")
    with refused, runs.take(runs.run(vm, settings={"FS_FREEZE": "AGENT"})):
        pass


def test_a_guest_that_qemu_has_stopped_is_taken_as_it_is_and_stays_so(
    lab, runs, same, tmpfs, wait_for, tmp_path, monkeypatch
):
    """Its disk's file system is full: that is the user's to see to, and a backup is worth more then than ever."""
    stopped = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]
    folder, owner = tmpfs(12), lab.folder.stat()
    os.chown(folder, owner.st_uid, owner.st_gid)
    boot = tmp_path / "boot.raw"
    boot.write_bytes(boot_sector(30 * MiB // 512).ljust(MiB, b"\0"))
    vm = lab.vm(["qcow2:32"], content=boot, folder=folder)
    wait_for(lambda: vm.domain.state() == stopped, "QEMU stops it", 60)
    assert runs.hypervisor.find(vm.name).state_in_full == "paused (after an I/O error of a disk)"
    truth = vm.copy_disks(tmp_path / "truth")
    resumed: list[str] = []
    monkeypatch.setattr(Domain, "resume", lambda domain: resumed.append(domain.name))
    with runs.take(runs.run(vm, tracked=False)) as taken:
        same([runs.keep(taken, tmp_path / "layer")], truth)
        assert not taken.ctx.cancelled
    assert resumed == []
    assert (taken.prepared.consistency, vm.domain.state()) == ("paused", stopped)
    lab.made.remove(vm)
    vm.remove()  # before its file system


def test_the_watch_of_a_guest_that_was_stopped_before_looks_for_its_end_alone(tmp_path):
    run = Run("qemu:///system", "0" * 36, "web1", RunFolder(tmp_path, "0" * 32), tmp_path, 1)
    watch, usual = (WATCHES[name](run, lambda _: None, lambda _: None) for name in ("life", "state"))
    assert watch._ask(Being((3, 5))) is None
    assert "full" in str(usual._ask(Being((3, 5))))
    assert "VM web1 ended while its backup ran" in str(watch._ask(Being((5, 1))))
