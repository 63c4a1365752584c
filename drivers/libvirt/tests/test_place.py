"""Where the socket of a backup job lies, who answers there, and that others' jobs and sockets are left alone."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from backupcore.disk.nbd import Address, NbdError
from backupcore.errors import Busy
from backupcore.model import Outcome, RunState
from backupcore_libvirt.connection import Connection
from backupcore_libvirt.folder import RunFolder, dead_folders, living_vms
from backupcore_libvirt.place import job_socket as place
from backupcore_libvirt.place.qemu_process import qemu_process
from backupcore_libvirt.place.vm_folder import vm_folder
from backupcore_libvirt.plugin import Libvirt
from backupcore_libvirt.scratch import Owner
from lab.domain_xml import DiskSpec
from lab.vm import VM


def test_the_socket_lies_in_the_folder_of_the_vm(small, runs, hypervisor):
    with Connection(hypervisor.uri) as connection:
        domain = connection.domain(small.uuid)
        own, qemu = vm_folder(domain), qemu_process(domain)
    assert own is not None
    assert re.fullmatch(rf"domain-{small.domain.ID()}-.+", own.name)
    assert qemu is not None
    assert "qemu" in Path(f"/proc/{qemu}/exe").readlink().name
    before = set(own.iterdir())
    run = runs.run(small)
    with runs.take(run) as taken:
        assert small.job_socket() == own / f"backupcore-{run.id}"
        address = taken.prepared.artifacts[0]._blocks  # where the artifact's own connection goes
        assert replace(address, admission="") == Address(str(small.job_socket()), "vda", qemu)
    assert set(own.iterdir()) == before


@pytest.mark.parametrize("name", ["Bob's \"<&>", "ä,server=on", "x" * 150])
def test_the_process_and_the_folder_of_a_vm_with_an_odd_name(lab, hypervisor, name):
    disk = DiskSpec(target="vda", size=1 << 20)
    with VM.create(lab.prefix + name, [disk], folder=lab.folder) as vm:
        vm.start()
        with Connection(hypervisor.uri) as connection:
            domain = connection.domain(vm.uuid)
            assert vm_folder(domain) is not None
            number = qemu_process(domain)
        assert number is not None
        assert vm.uuid.encode() in Path(f"/proc/{number}/cmdline").read_bytes()


def test_a_socket_that_somebody_else_has_put_in_its_place_is_not_read(small, runs):
    small.io("vda", "write -P 0x11 0 1M")
    run = runs.run(small)
    with runs.context(run) as ctx:
        prepared = runs.hypervisor.prebackup(run, ctx)
        path = small.job_socket()
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen()
            with pytest.raises(NbdError, match=f"is served by process {os.getpid()}"):
                prepared.artifacts[0].read_at(0, prepared.artifacts[0].size)
        runs.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
    assert not path.exists(), "what bears the run's name goes"
    small.untouched()


def test_where_the_folder_of_the_vm_is_too_long_or_not_known_the_socket_lies_in_scratch(small, runs, monkeypatch):
    for known in (None, Path("/var/lib/libvirt/qemu") / ("x" * 80)):
        monkeypatch.setattr(place, "vm_folder", lambda _, known=known: known)
        run = runs.run(small)
        with runs.take(run) as taken:
            assert small.job_socket() == runs.hypervisor.scratch / run.id / "nbd.sock"
            assert taken.prepared.artifacts[0].read_at(0, 1)


def test_a_job_of_another_configuration_is_left_alone(small, runs, lab):
    """Its socket has the name of a run, in the same folder; its scratch files say that it is not ours."""
    other = Libvirt(runs.hypervisor.uri, lab.folder / "another scratch")
    run = runs.run(small)
    with runs.take(run) as taken:
        with pytest.raises(Busy, match="another job is running"):
            other.estimate(runs.run(small))
        with runs.context(foreign := runs.run(small)) as ctx:
            with pytest.raises(Busy, match="another job is running"):
                other.prebackup(foreign, ctx)
            other.postbackup(foreign, Outcome(state=RunState.FAILED), ctx)
        assert small.job() != 0
        assert taken.prepared.artifacts[0].read_at(0, 1)


def test_only_the_socket_of_this_run_goes(small, runs, hypervisor):
    run = runs.run(small)
    folder = RunFolder(hypervisor.scratch, run.id)
    with Connection(hypervisor.uri) as connection, contextlib.ExitStack() as stack:
        domain = connection.domain(small.uuid)
        own = vm_folder(domain)
        assert own is not None
        for name in (folder.socket_name, f"backupcore-{'0' * 32}"):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(own / name))
        before = set(own.iterdir())
        place.remove_sockets(domain, folder)
        assert before - set(own.iterdir()) == {own / folder.socket_name}
        place.remove_sockets(domain, folder)
        (own / f"backupcore-{'0' * 32}").unlink()


def test_a_stale_socket_of_a_dead_run_goes_with_the_next_one(small, runs, hypervisor):
    """QEMU removes its socket as the job ends; one that stayed must not pile up in libvirt's folder."""
    dead = RunFolder(hypervisor.scratch, "d" * 32)
    os.close(dead.make(Owner(os.geteuid(), os.getegid()), small.uuid))
    with Connection(hypervisor.uri) as connection:
        own = vm_folder(connection.domain(small.uuid))
    assert own is not None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(own / dead.socket_name))
    with runs.take(runs.run(small)):
        assert not (own / dead.socket_name).exists()
        assert not dead.path.exists()


@pytest.mark.parametrize("strange", ["pipe", "link", "much"])
def test_what_qemus_user_puts_in_place_of_a_lock_holds_nobody_up(strange, small, runs, hypervisor):
    folder = hypervisor.scratch / ("5" * 32)
    folder.mkdir(parents=True)
    lock = folder / "lock"
    if strange == "pipe":
        os.mkfifo(lock)
    elif strange == "link":
        lock.symlink_to("/dev/zero")
    else:
        lock.write_bytes(b"x" * (1 << 20))
    assert living_vms(hypervisor.scratch) == set()
    found = [each.run for each in dead_folders(hypervisor.scratch, small.uuid)]
    assert found == ([] if strange == "link" else ["5" * 32])
    with runs.take(runs.run(small)):
        pass
