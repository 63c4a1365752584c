"""libvirtd is killed and started again while a backup goes on; QEMU and its export live on."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import threading
import time

import libvirt
import pytest

from backupcore.errors import BackupError, HypervisorError
from backupcore.model import BackupRun, Outcome, RunState, new_id

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


@pytest.mark.soak
def test_a_job_that_nothing_in_libvirt_removes_is_told_with_the_way_out(daemon, private, wait_for):
    """libvirtd is killed within the call that begins a backup, until it leaves such a job."""
    vm, runs = private
    name = vm.name
    vm.io("vda", "write -P 0x11 0 1M")
    for milliseconds in [0, 2, 5, 10, 20, 40] * 6:
        run = runs.run(vm)
        ended = threading.Event()

        def begin(run: BackupRun = run, ended: threading.Event = ended) -> None:
            with runs.context(run) as ctx, contextlib.suppress(BackupError):
                runs.hypervisor.prebackup(run, ctx)
            ended.set()

        threading.Thread(target=begin).start()
        wait_for((runs.hypervisor.scratch / run.id / "vda.scratch").exists, "libvirt has begun the call", 60)
        time.sleep(milliseconds / 1000)  # what is tested is the moment itself
        daemon.kill()
        assert ended.wait(60)
        daemon.start()
        vm.connection = libvirt.open(daemon.uri)
        vm.domain = vm.connection.lookupByName(name)
        try:
            with runs.context(dataclasses.replace(run, id=new_id())) as ctx:
                runs.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
        except HypervisorError as error:
            stuck = error
            break
    else:
        pytest.fail("no kill left such a job")
    assert "holds a backup job that no longer exists" in stuck.message
    for _ in range(2):
        with pytest.raises(HypervisorError, match="no longer exists"), runs.take(runs.run(vm)):
            pass
    # The way out, as the hint tells it.
    assert f"remove the line \"<job type='none' async='backup' …/>\" from /run/libvirt/qemu/{name}.xml" in stuck.hint
    daemon.kill()
    status = daemon.runtime / "qemu" / f"{name}.xml"
    text, count = re.subn(r"\n *<job type='none' async='backup'[^\n]*/>(?=\n)", "", status.read_text())
    assert count == 1
    status.write_text(text)
    daemon.start()
    vm.connection = libvirt.open(daemon.uri)
    vm.domain = vm.connection.lookupByName(name)
    assert vm.active
    with runs.take(runs.run(vm, keep=())):
        pass
