"""libvirtd is killed and started again while a backup goes on; QEMU and its export live on."""

from __future__ import annotations

import logging
import threading

import libvirt

from backupcore.model import Outcome, RunState

MiB = 1 << 20


def test_a_backup_carries_on_while_libvirtd_is_away(daemon, private, tmp_path, wait_for, same, caplog):
    caplog.set_level(logging.WARNING)
    vm, runs = private
    vm.io("vda", "write -P 0x11 0 8M")
    name = vm.name
    truth = vm.copy_truth(tmp_path / "truth")
    run = runs.run(vm)
    with runs.context(run) as ctx:
        prepared = runs.hypervisor.prebackup(run, ctx)
        stream = prepared.artifacts[0].open()
        stream.read(MiB)
        daemon.kill()
        wait_for(lambda: ctx.failure or "does not answer" in caplog.text, "the watch notices", 60)
        assert ctx.failure is None
        daemon.start()
        vm.connection = libvirt.open(daemon.uri)
        vm.domain = vm.connection.lookupByName(name)
        taken = runs.taken(run, ctx, prepared)
        layer = runs.keep(taken, tmp_path / "layer")
        stream.close()
        for artifact in prepared.artifacts:
            artifact.close()
        daemon.kill()
        released: list[object] = []
        outcome = Outcome(state=RunState.RECORDED)
        thread = threading.Thread(target=lambda: released.append(runs.hypervisor.postbackup(run, outcome, ctx)))
        thread.start()
        daemon.start()
        thread.join(60)
        assert released == [None]
        assert ctx.failure is None
    vm.connection = libvirt.open(daemon.uri)
    vm.domain = vm.connection.lookupByName(name)
    same([layer], truth)
    assert vm.job() == 0
    assert not list(runs.hypervisor.scratch.iterdir())
    vm.io("vda", "write -P 0x12 8M 64k")
    truth = vm.copy_truth(tmp_path / "truth2")
    with runs.take(runs.run(vm, taken)) as increment:
        assert not any(disk.whole for disk in increment.prepared.disks)
        same([layer, runs.keep(increment, tmp_path / "layer2")], truth)
