"""`vmkeep cancel` while the datastore does not answer: ten seconds, and the guest is free, for all three drivers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from backupcore import process
from lab.host import Host, wait_until
from lab.troubles import DRIVERS, Target, Trouble, connections, free, kill, target, writing_vm

LIMIT = 15.0
"""Seconds; ten are promised, and a busy machine takes some more to start Python."""
pytestmark = pytest.mark.timeout(900)


@contextmanager
def site(driver: str, make_vm, uri: str, folder: Path) -> Iterator[tuple[Host, Target]]:
    with ExitStack() as stack:
        where = stack.enter_context(target(driver, folder))
        vm = writing_vm(make_vm, folder)
        yield Host(folder, vm, uri, driver=driver, options=where.options, more=where.extra), where


def cancelled(host: Host, *arguments: str):
    began = time.monotonic()
    done = host.run("cancel", host.vm.name, *arguments)
    assert time.monotonic() - began < LIMIT
    assert free(host), (host.vm.domain.jobInfo(), host.vm.domain.state(), connections(host), done)
    return done


# The driver is not asked for a cancel: one of them stands for all in `make test`.
@pytest.mark.parametrize(
    "driver", [driver if driver == "rsync" else pytest.param(driver, marks=pytest.mark.soak) for driver in DRIVERS]
)
def test_cancel_while_the_target_hangs(driver: str, make_vm, libvirt_uri: str, vm_folder: Path):
    with site(driver, make_vm, libvirt_uri, vm_folder) as (host, where):
        trouble = Trouble.begin(host, where)
        trouble.go_on()
        if driver != "s3":  # whose server is what stands still
            wait_until(lambda: hanging(trouble.process.pid), "the target to be waited for")
        done = cancelled(host, "--json")
        assert done.code in (0, 3), done.err
        told = json.loads(done.out)
        assert told["ended"] == (done.code == 0)
        if driver == "rsync":  # its process writes there itself
            assert [one["process"] for one in told["left"]] == [trouble.process.pid]
            assert told["left"][0]["why"].startswith("waits in ")
        where.unblock()
        assert host.end(trouble.process).code == 130
        assert host.recorded() == []
        host.backup()
        assert host.left() == []


def test_cancel_after_kill_9_while_the_target_hangs(make_vm, libvirt_uri: str, vm_folder: Path):
    with site("rsync", make_vm, libvirt_uri, vm_folder) as (host, where):
        trouble = Trouble.begin(host, where)
        trouble.go_on()
        wait_until(lambda: hanging(trouble.process.pid), "the target to be waited for")
        kill(trouble.process.pid)
        wait_until(lambda: free(host), "the guard to let the guest go", 10)
        assert process.dying(trouble.process.pid)
        done = cancelled(host)
        assert done.code == 3
        assert "was killed and cannot end: it waits in " in done.err
        where.unblock()
        host.end(trouble.process)
        host.backup()
        assert host.left() == []
        assert len(host.recorded()) == 1


def hanging(number: int) -> bool:
    return bool(process.hangs([number, *process.children(number)]))
