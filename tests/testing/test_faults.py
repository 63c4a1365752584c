"""Faults at named steps: what the session and the restore make of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest

import backupcore
from backupcore import Context, Datastore, run_backup
from backupcore.chain import plan
from backupcore.errors import Cancelled, IntegrityError, TargetFull, TargetUnavailable
from backupcore.model import VM, Image, Usage
from backupcore.restore import restore
from backupcore.testing import Faults, MemoryDriver, MemoryGuest, MemoryHypervisor, fails, hangs
from backupcore.testing.faults import STEPS

WEB = VM(uuid="7d1c1a4e-0000-4000-8000-000000000001", name="web1")


class Site:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.guest = MemoryGuest(WEB, {"vda": bytearray(b"data" * 50_000)})
        self.driver = MemoryDriver()

    def open(self, faults: Faults) -> Datastore:
        return Datastore("mem", self.driver, hypervisor=MemoryHypervisor([self.guest]), plugins=[faults])

    def backup(self, faults: Faults, ctx: Context) -> Image:
        run = plan(None, vm=WEB, host="h", datastore="mem", settings={})
        done = []
        run_backup(self.open(faults), run, ctx, record=done.append)
        increments = (done[0].increment,)
        return Image(uuid=run.image, number=1, vm=WEB, datastore="mem", state="open", increments=increments)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context(tmp_path)


def test_every_step_is_passed_in_order(site: Site, ctx: Context):
    faults = Faults({})
    image = site.backup(faults, ctx)
    assert faults.seen == [
        *("prebackup before", "prebackup after", "backup before", "backup after"),
        *("postbackup before", "postbackup after"),  # of the hypervisor; the memory driver has no postbackup
    ]
    faults.seen.clear()
    store = site.open(faults)
    restored = restore(store, image, None, ctx, target=lambda disk: site.folder / disk.id)
    assert len(restored.disks) == 1
    assert faults.seen[:3] == ["restore before", "restore after", "restore read"]
    faults.seen.clear()
    store.check(ctx)
    store.usage(ctx)
    store.delete([image.increments[0].source], ctx)
    store.sources(ctx)
    assert faults.seen == [
        f"{hook} {when}" for hook in ("check", "usage", "delete", "sources") for when in ("before", "after")
    ]


@pytest.mark.parametrize("step", ["prebackup before", "prebackup after", "backup before", "backup after"])
def test_a_failure_ends_the_run_and_releases_the_guest(site: Site, ctx: Context, step: str):
    with pytest.raises(TargetFull, match="no room"):
        site.backup(Faults({step: fails(TargetFull("no room"))}), ctx)
    assert not site.guest.busy
    assert len(site.driver.kept) == (1 if step == "backup after" else 0)


def test_an_os_error_is_translated_as_that_of_a_hook(site: Site, ctx: Context):
    with pytest.raises(TargetUnavailable, match="refused"):
        site.open(Faults({"sources before": fails(ConnectionRefusedError(111, "refused"))})).sources(ctx)


def test_a_hang_ends_when_the_user_stops_it(site: Site, ctx: Context):
    timer = Timer(0.2, ctx.cancel)
    timer.start()
    with pytest.raises(Cancelled):
        site.backup(Faults({"backup before": hangs()}), ctx)
    timer.join()


def test_a_restored_artifact_fails_when_it_is_read(site: Site, ctx: Context):
    image = site.backup(Faults({}), ctx)
    faults = Faults({"restore read": fails(IntegrityError("rotten"))})
    found = site.open(faults).artifacts(image.increments[0].source, ctx)
    with pytest.raises(IntegrityError, match="rotten"):
        found["vm.xml"].open()
    with pytest.raises(IntegrityError, match="rotten"):
        found["vm.xml"].read_at(0, 1)


def test_a_plugin_around_a_hook_is_no_such_hook(site: Site, ctx: Context, tmp_path: Path):
    @backupcore.driver
    class Bare:
        backup, restore, delete = MemoryDriver.backup, MemoryDriver.restore, MemoryDriver.delete
        kept: dict[str, object] = backupcore.option("what is kept", default_factory=dict)
        sources = MemoryDriver.sources

    faults = Faults({})
    store = Datastore("bare", Bare(), hypervisor=None, plugins=[faults])
    assert not store.flattens
    assert store.usage(ctx) == Usage()
    store.check(ctx)
    assert faults.seen == ["sources before", "sources after"]


def test_a_kill_is_a_kill():
    code = (
        "from backupcore import Context, Datastore\n"
        "from backupcore.testing import Faults, MemoryDriver, kills\n"
        "from pathlib import Path\n"
        "store = Datastore('m', MemoryDriver(), hypervisor=None, plugins=[Faults({'check after': kills()})])\n"
        "store.check(Context(Path('.')))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9


def test_a_step_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="no step backup; the steps are: prebackup before"):
        Faults({"backup": fails(TargetFull("x"))})
    assert len(STEPS) == 19
