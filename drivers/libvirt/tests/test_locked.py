"""What a backup reads is locked, and where no lock helps it is noticed that somebody wrote to it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import libvirt
import pytest

from backupcore.errors import BackupError, Busy, HypervisorError
from backupcore.model import RunState
from backupcore_libvirt.image_lock import keep_closed, knows_locks
from backupcore_libvirt.qcow2_header import files_of
from backupcore_libvirt.reading import still
from lab import graft
from lab.blocking_fs import blocking
from lab.patience import patient

MiB = 1 << 20
SNAPSHOT = {"MODE": "INCREMENT", "INCREMENT_MODE": "SNAPSHOT"}
NO_START = 'Failed to get "write" lock|failed to connect to monitor'


def tool(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def refused(*command: object) -> None:
    done = tool(*command)
    assert done.returncode != 0, command
    assert "lock" in done.stderr, done.stderr


def write(path: Path, shape: str = "raw") -> tuple[object, ...]:
    return ("qemu-io", "-f", shape, "-c", "write -P 9 0 1M", path)


def overlay(path: Path, below: Path, shape: str) -> Path:
    done = tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", shape, "-b", below, path)
    assert done.returncode == 0, done.stderr
    path.chmod(0o666)
    return path


def test_every_file_of_a_vm_that_is_off_is_closed_while_it_is_read(lab, take, runs, same, tmp_path):
    vm = lab.vm(["qcow2:8", "raw:8"], start=False)
    top, base, data = (vm.folder / name for name in ("vda.qcow2", "base.raw", "data.raw"))
    tool("qemu-img", "convert", "-O", "raw", top, base)
    base.chmod(0o666)
    tool(*write(base))
    top.unlink()
    overlay(top, base, "raw")
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 3 2M 1M", top)
    child = overlay(tmp_path / "child", base, "raw")
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 4 3M 1M", child)
    truth = vm.copy_disks(tmp_path / "truth")
    with runs.take(runs.run(vm)) as taken:
        for path, shape in ((base, "raw"), (top, "qcow2"), (vm.disk("vdb"), "raw")):
            refused(*write(path, shape))
        refused("qemu-img", "commit", "-f", "qcow2", child)
        with pytest.raises(libvirt.libvirtError, match=NO_START):
            vm.start()
        layer = runs.keep(taken, tmp_path / "layer")
    same([layer], truth)
    assert tool("qemu-img", "commit", "-f", "qcow2", child).returncode == 0, "afterwards it is free"
    # The file in which an image keeps its data.
    done = tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", child, "8M")
    assert done.returncode == 0, done.stderr
    assert files_of(str(child), "qcow2") == [str(child), str(data)]
    vm.start()


@pytest.mark.parametrize("shape", ["raw", "qcow2"])
def test_nobody_merges_into_what_a_backup_by_overlays_reads(lab, runs, same, tmp_path, shape):
    vm = lab.vm([f"{shape}:16"])
    base = vm.disk("vda")
    vm.io("vda", "write -P 1 0 4M")
    truth = vm.copy_truth(tmp_path / "truth")
    with runs.take(runs.run(vm, settings=SNAPSHOT)) as taken:
        vm.io("vda", "write -P 2 0 4M")
        with pytest.raises(libvirt.libvirtError, match="lock"):
            vm.domain.blockCommit("vda", str(base), None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
        refused(*write(base, shape))
        vm.destroy()
        over = vm.disk("vda")
        refused("qemu-img", "commit", "-f", "qcow2", over)
        vm.start()  # in its overlay: the guest is not kept from that
        vm.io("vda", "write -P 5 0 1M")
        layer = runs.keep(taken, tmp_path / "layer")
    same([layer], truth)
    # Also by its bitmaps, in a chain whose lowest file is another one's format; and the run's own merge goes on.
    vm.io("vda", "write -P 3 1M 1M")
    truth = vm.copy_truth(tmp_path / "truth2")
    with runs.take(runs.run(vm, taken, settings=SNAPSHOT)) as more:
        refused(*write(base, shape))
        above = runs.keep(more, tmp_path / "layer2")
    same([layer, above], truth)
    assert len(list(vm.folder.glob("*.backupcore-*"))) == 1, "all but the last overlay are merged"


def test_whoever_writes_without_a_lock_fails_the_backup(lab, runs, tmp_path):
    vm = lab.vm(["raw:8"], start=False)
    with pytest.raises(HypervisorError, match="was written to or exchanged"), runs.take(runs.run(vm)) as taken:
        with vm.disk("vda").open("r+b") as file:
            file.write(b"by dd")
        taken.ctx.wait(patient(30))
    # Just before the end, when nobody may have looked any more.
    with runs.take(runs.run(vm), state=RunState.FAILED) as taken:
        with vm.disk("vda").open("r+b") as file:
            file.write(b"again")
        taken.ctx.complete()
        assert taken.ctx.failure is not None


def test_an_overlay_that_vanishes_fails_the_backup(lab, runs, hypervisor):
    vm = lab.vm(["raw:8"], start=False)
    with pytest.raises(BackupError, match="vanished"), runs.take(runs.run(vm, settings=SNAPSHOT)) as taken:
        vm.change((str(vm.disk("vda")), str(vm.folder / "vda.raw")), ("type='qcow2'", "type='raw'"))
        for path in vm.folder.glob("*.backupcore-*"):
            path.unlink()
        taken.ctx.wait(patient(30))


def test_on_a_file_system_without_locks_it_is_noticed(lab, runs, tmp_path):
    with blocking(lab.folder, locks=False) as place, contextlib.ExitStack() as stack:
        graft.show(place.path)
        stack.callback(graft.unmount, place.path)
        vm = lab.vm(["raw:8"], start=False)
        before, disk = vm.disk("vda"), place.path / "vda.raw"
        shutil.copy(before, disk)
        disk.chmod(0o666)
        vm.change((str(before), str(disk)))
        assert not knows_locks(vm.disk("vda"))
        with keep_closed([vm.disk("vda")]):
            assert tool(*write(vm.disk("vda"))).returncode == 0, "nothing is locked there"
        with pytest.raises(Busy, match="was started while its disks were read"), runs.take(runs.run(vm)) as taken:
            vm.start()
            taken.ctx.wait(patient(30))
        vm.destroy()
        with pytest.raises(HypervisorError, match="was written to"), runs.take(runs.run(vm)) as taken:
            tool(*write(vm.disk("vda")))
            taken.ctx.wait(patient(30))
        vm.start()
        with pytest.raises(Busy, match="was merged"), runs.take(runs.run(vm, settings=SNAPSHOT)) as taken:
            vm.domain.blockCommit("vda", None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
            taken.ctx.wait(patient(30))
        vm.destroy()


def test_locks_that_are_known(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    assert knows_locks(file)
    assert not knows_locks(Path("/dev/null"))
    assert knows_locks(tmp_path / "gone"), "who opens it tells"
    with file.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert knows_locks(file)


def test_what_tells_that_a_file_was_written_to(tmp_path):
    file, gone = tmp_path / "file", tmp_path / "gone"
    file.write_bytes(b"one")
    before = still.stamps([str(file), str(gone), "/dev/null"])
    file.chmod(0o600)
    assert still.changed(before) == []
    gone.write_bytes(b"")
    other = tmp_path / "other"
    other.write_bytes(b"one")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.rename(file)
    assert still.changed(before) == [str(file), str(gone)]
