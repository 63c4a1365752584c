"""A file that was exchanged under a running VM: QEMU goes on with the one of before, and opens the other one where it
opens files anew by their names, as for an overlay or a commit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backupcore.errors import HypervisorError, UnsupportedOperation
from backupcore_libvirt.place.open_files import not_open

SNAPSHOT = {"MODE": "INCREMENT", "INCREMENT_MODE": "SNAPSHOT"}


@contextmanager
def holder(*files: Path) -> Iterator[int]:
    """A process that has these files open."""
    held = "import sys; held = [open(name, 'rb') for name in sys.argv[1:]]; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", held, *map(str, files)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def test_which_file_is_not_the_one_that_is_open(tmp_path):
    kept, moved, gone, link = (tmp_path / name for name in ("kept", "moved", "gone", "link"))
    for path in (kept, moved, gone):
        path.write_text("of before")
    link.symlink_to(kept)
    with holder(kept, moved, gone) as process:
        assert not_open(process, map(str, (kept, moved, gone, link))) == ""
        kept.rename(tmp_path / "renamed")
        (tmp_path / "renamed").rename(kept)
        moved.rename(tmp_path / "elsewhere")
        moved.write_text("another")
        gone.unlink()
        assert not_open(process, map(str, (link, kept))) == ""
        assert not_open(process, map(str, (kept, moved))).startswith(f"{moved} is not the file")
        assert not_open(process, [str(gone)]).startswith(f"{gone} is gone")


def exchange(vm) -> Path:
    """Put another image in the place of the file below the VM's disk: where that one is now."""
    base, kept, new = (vm.folder / name for name in ("vda.qcow2", "kept.qcow2", "new.qcow2"))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", new, "16M"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 0x99 0 2M", new], check=True, capture_output=True)
    if os.geteuid() == 0:
        shutil.chown(new, base.stat().st_uid, base.stat().st_gid)
    os.link(base, kept)
    new.rename(base)
    return kept


def test_an_overlay_is_put_on_no_file_that_was_exchanged(every_qemu_dies, lab, chains):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    vm.write("vda", "write -P 0x11 0 4M")
    kept = exchange(vm)
    with pytest.raises(UnsupportedOperation, match=r"vda\.qcow2 is not the file that the VM's QEMU has open"):
        chains.backup(vm)
    vm.plain()
    kept.rename(vm.disk("vda"))
    chains.backup(vm)
    vm.plain()
    chains.check()


def test_a_chain_of_overlays_goes_on_without_the_exchanged_file(lab, chains, hypervisor):
    chains.settings = SNAPSHOT
    vm = lab.vm(["qcow2:16"])
    vm.write("vda", "write -P 0x11 0 4M")
    chains.backup(vm)
    vm.write("vda", "write -P 0x12 4M 1M")
    kept = exchange(vm)
    taken = chains.backup(vm)
    assert "is not the file that the VM's QEMU has open" in taken.run.reason
    with pytest.raises(HypervisorError, match="is not merged"):
        hypervisor.forget(vm.identity)
    vm.io("vda", "read -P 0x11 0 4M", "read -P 0x12 4M 1M")
    kept.rename(vm.folder / "vda.qcow2")
    chains.truths[taken.increment.point] = vm.copy(chains.folder / "truth")  # the one of then read by the name
    chains.backup(vm)
    chains.backup(vm)
    vm.io("vda", "read -P 0x11 0 4M", "read -P 0x12 4M 1M")
    chains.check()
