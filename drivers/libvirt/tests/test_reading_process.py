"""The reader of a run: one for all of it, gone when the run is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backupcore.context import Context
from backupcore.errors import HypervisorError
from backupcore_libvirt.connection import Connection
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.reading.process import guarded, reader_of


@pytest.fixture
def ctx(tmp_path):
    with Context(tmp_path) as ctx:
        yield ctx


@pytest.fixture
def make(small, runs, ctx: Context):
    def make():
        with Connection(runs.hypervisor.uri) as connection:
            folder = RunFolder(runs.hypervisor.scratch, "0" * 32)
            guard = guarded(runs.hypervisor.uri, connection.domain(small.uuid), folder, ctx, "")
            return guard, reader_of(guard, ctx)

    return make


def test_it_is_a_child_of_the_guard_and_ends_with_the_run(make, ctx: Context, wait_for):
    guard, reader = make()
    assert reader.call(os.getpid) == reader.pid == guard.reader
    assert reader.call(os.getppid) == guard.process
    ctx.stack.close()
    wait_for(lambda: not Path(f"/proc/{reader.pid}").exists(), "it ends")


def test_a_run_that_begins_anew_has_another(make, ctx: Context, wait_for):
    guard, first = make()
    ctx.release()
    with guard.turn():
        pass
    _, second = make()
    assert second.pid != first.pid
    assert second.call(os.getpid) == second.pid
    ctx.release()
    wait_for(lambda: not Path(f"/proc/{second.pid}").exists(), "it ends")


@pytest.mark.parametrize("end", [Context.cancel, Context.release])
def test_it_ends_with_the_wish_for_the_guest(make, small, ctx: Context, end, wait_for):
    _, reader = make()
    reader.call(os.getpid)
    end(ctx)
    wait_for(lambda: not Path(f"/proc/{reader.pid}").exists(), "it ends")
    with pytest.raises(HypervisorError, match=f"the disks of VM {small.name} were read after they had been released"):
        reader.call(os.getpid)
