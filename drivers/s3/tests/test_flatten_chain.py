"""The core's flatten in a bucket: put together by the store, and still a plain qcow2 file that restores the guest."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from backupcore import run_backup
from backupcore.chain import plan
from backupcore.context import Context
from backupcore.datastore import Datastore
from backupcore.flatten import flatten
from backupcore.model import VM, Image, new_id
from backupcore.restore import restore
from backupcore.testing import MemoryGuest, MemoryHypervisor
from backupcore_s3 import S3

WEB = VM(uuid="7d1c1a4e-0000-4000-8000-000000000001", name="web1")
CLUSTER = 64 << 10


@pytest.mark.parametrize("islands", [10, 200])
def test_a_chain_becomes_one_object(
    driver: S3, client: Any, bucket: str, tmp_path: Path, keys: Callable[..., list[str]], islands: int
) -> None:
    random = Random(islands)
    guest = MemoryGuest(WEB, {"vda": bytearray(random.randbytes(24 << 20)), "vdb": bytearray(100_000)})
    datastore = Datastore("cloud", driver, hypervisor=MemoryHypervisor([guest]))
    image: Image | None = None

    def context() -> Context:
        folder = tmp_path / new_id()
        folder.mkdir()
        return Context(folder)

    for _ in range(3):
        for _ in range(islands):
            guest.write(
                "vda", random.randrange(384) * CLUSTER, random.choice((random.randbytes(CLUSTER), bytes(CLUSTER)))
            )
        run = plan(image, vm=WEB, host="h", datastore="cloud", settings={})
        with context() as ctx:
            one = run_backup(datastore, run, ctx, record=lambda recorded: None).increment
        rows = (*image.increments, one) if image else (one,)
        image = Image(uuid=run.image, number=1, vm=WEB, datastore="cloud", state="open", increments=rows)
    assert image
    with context() as ctx:
        done = flatten(datastore, image, 2, ctx, host="h", everything=True)
        assert done.copied == (islands == 10), "where too much would be dead, the core writes it anew"
        assert len(list(driver.sources(ctx))) == 4
        datastore.delete([one.source for one in done.replaces], ctx)
    flat = replace(image, increments=(done.increment,))
    with context() as ctx:
        made = restore(datastore, flat, 2, ctx, target=lambda disk: tmp_path / f"{disk.id}.qcow2")
    for disk in made.disks:
        raw = tmp_path / "held.raw"
        raw.write_bytes(guest.disks[disk.id])
        [key] = [key for key in keys(client, bucket) if key.endswith(f"/disk.{disk.id}.qcow2")]
        fetched = tmp_path / "fetched.qcow2"
        client.download_file(bucket, key, str(fetched))
        subprocess.run(["qemu-img", "check", fetched], check=True)
        for path in (fetched, disk.path):
            subprocess.run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, raw], check=True)
