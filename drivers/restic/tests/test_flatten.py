"""A flatten in a real repository: read from snapshots, and written as a new one, through the file view's process."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from restic_odd import BrokenArtifact

from backupcore import run_backup
from backupcore.chain import plan
from backupcore.context import Context
from backupcore.datastore import Datastore
from backupcore.errors import BackupError
from backupcore.flatten import flatten
from backupcore.model import VM, BackupRun, BytesArtifact, Image, new_id
from backupcore.restore import restore
from backupcore.testing.guest import MemoryGuest, MemoryHypervisor
from backupcore_restic import Restic

WEB = VM(uuid="7d1c1a4e-0000-4000-8000-000000000001", name="web1")


def test_a_chain_becomes_a_new_snapshot_and_restores(fresh: Restic, tmp_path: Path) -> None:
    random = Random(4)
    guest = MemoryGuest(WEB, {"vda": bytearray(random.randbytes(3 << 20))})
    datastore = Datastore("nas", fresh, plugins=[MemoryHypervisor([guest])])
    image: Image | None = None

    def context() -> Context:
        folder = tmp_path / new_id()
        folder.mkdir()
        return Context(folder)

    for _ in range(2):
        for _ in range(4):
            guest.write("vda", random.randrange(2 << 20), random.randbytes(100_000))
        run = plan(image, vm=WEB, host="h", datastore="nas", settings={})
        with context() as ctx:
            one = run_backup(datastore, run, ctx, record=lambda recorded: None).increment
        rows = (*image.increments, one) if image else (one,)
        image = Image(uuid=run.image, number=1, vm=WEB, datastore="nas", state="open", increments=rows)
    assert image
    with context() as ctx:
        done = flatten(datastore, image, 1, ctx, host="h")
        assert len(list(fresh.sources(ctx))) == 3, "the old ones stay until the caller deletes them"
        datastore.delete([one.source for one in done.replaces], ctx)
    flat = replace(image, increments=(done.increment,))
    with context() as ctx:
        made = restore(datastore, flat, 1, ctx, target=lambda disk: tmp_path / f"{disk.id}.qcow2")
    raw = tmp_path / "vda.raw"
    raw.write_bytes(guest.disks["vda"])
    compare = ["qemu-img", "compare", "-F", "raw", made.disks[0].path, raw]
    assert subprocess.run(compare, capture_output=True, check=False).returncode == 0


def test_a_flatten_that_fails_leaves_the_snapshot_whose_point_it_keeps(
    fresh: Restic, ctx: Context, make_run: Callable[..., BackupRun], make_artifacts: Callable[..., list[BytesArtifact]]
) -> None:
    """Found by the point, the clean-up after it would forget the only copy."""
    run = make_run()
    kept = fresh.backup(make_artifacts(), run, ctx).source
    with pytest.raises(BackupError):
        fresh.backup([BrokenArtifact("disk.vda.qcow2", 3 << 20), *make_artifacts()[1:]], replace(run, id=new_id()), ctx)
    assert [one.source for one in fresh.sources(ctx)] == [kept]
