"""A target whose writes never return: the guest goes on within seconds, whatever else happens, and all three drivers.

The guest writes all the while. After each trouble the run is no backup, and the next one is, with the right bytes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from backupcore import verdict
from backupcore.errors import Cancelled, TargetFull
from lab import graft
from lab.host import Host, wait_until
from lab.troubles import DRIVERS, Target, Trouble, kill, scratch_is_at_its_reserve, target, writing_vm

LIMIT = 10.0
pytestmark = pytest.mark.timeout(900)  # a guest and a server have to start; on a loaded machine they take their time


@contextmanager
def site(driver: str, make_vm, uri: str, folder: Path, scratch: int = 0) -> Iterator[tuple[Host, Target]]:
    """A host with a writing guest and a target; `scratch` is the size of its scratch in MiB, 0 for what there is."""
    with ExitStack() as stack:
        if scratch:
            if os.geteuid() != 0:
                pytest.skip("needs root")
            (folder / "scratch").mkdir()
            graft.mount_tmpfs(folder / "scratch", scratch)  # before the VM: QEMU keeps the mounts of its start
            stack.callback(graft.unmount, folder / "scratch")
        where = stack.enter_context(target(driver, folder))
        vm = writing_vm(make_vm, folder)
        host = Host(folder, vm, uri, driver=driver, options=where.options, more=where.extra)
        yield host, where


def in_order_again(host: Host, before: int) -> None:
    """The run is no backup, the next one is, and nothing is left."""
    assert len(host.recorded()) == before
    truth = host.note_truth(f"after-{before}")
    taken = host.backup()
    assert host.left() == []
    assert len(host.recorded()) == before + 1
    assert host.differing(taken["image"], taken["increment"], truth) == []


# The guard gives the run up, whoever hangs: how each driver hangs is seen below, where its run ends in four ways.
@pytest.mark.parametrize(
    "driver", [pytest.param(name, marks=[] if name == "rsync" else [pytest.mark.soak]) for name in DRIVERS]
)
def test_scratch_fills_while_the_target_hangs(driver: str, make_vm, libvirt_uri: str, vm_folder: Path):
    with site(driver, make_vm, libvirt_uri, vm_folder, scratch=16) as (host, where):
        trouble = Trouble.begin(host, where)
        trouble.go_on()
        wait_until(lambda: scratch_is_at_its_reserve(host), "scratch to fill", 120)
        trouble.time()
        assert trouble.seconds < LIMIT
        assert isinstance(verdict.given_up(trouble.folder), TargetFull)
        assert trouble.process.poll() is None, "it still hangs"
        trouble.end(where)
        done = host.end(trouble.process)
        assert done.code == 6, done.err
        assert f"scratch folder {host.scratch} is full" in done.err
        in_order_again(host, 0)


# S3's is a client's socket, where restic's and rsync's are programs and files: with a second trouble in `make soak`.
@pytest.mark.parametrize(
    "driver", [pytest.param(name, marks=[pytest.mark.soak] if name == "s3" else []) for name in DRIVERS]
)
def test_it_is_cancelled_killed_or_stopped_while_the_target_hangs(driver: str, make_vm, libvirt_uri, vm_folder: Path):
    with site(driver, make_vm, libvirt_uri, vm_folder) as (host, where):
        # Cancelled by another process.
        trouble = Trouble.begin(host, where)
        trouble.go_on()
        trouble.time(trouble.give_up)
        assert trouble.seconds < LIMIT
        trouble.end(where)
        assert host.end(trouble.process).code == 130
        # Stopped, then cancelled.
        trouble = Trouble.begin(host, where)
        trouble.time(lambda: trouble.give_up(Cancelled("cancelled while it stood still")))
        assert trouble.seconds < LIMIT
        trouble.end(where)
        done = host.end(trouble.process)
        assert done.code == 130, done.err
        # Killed.
        trouble = Trouble.begin(host, where)
        trouble.go_on()
        trouble.time(lambda: kill(trouble.process.pid))
        assert trouble.seconds < LIMIT
        where.unblock()
        assert host.end(trouble.process).code == -signal.SIGKILL
        # Without its guard.
        trouble = Trouble.begin(host, where)
        trouble.go_on()
        trouble.time(lambda: kill(trouble.guard))
        assert trouble.seconds < LIMIT
        trouble.end(where)
        done = host.end(trouble.process)
        assert done.code == 11, done.err
        assert "guards the guest" in done.err
        in_order_again(host, 0)
