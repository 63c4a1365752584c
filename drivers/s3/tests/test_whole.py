"""A guest's disk, backed up through the core, is a plain qcow2 object that any S3 client fetches and QEMU opens."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backupcore import run_backup
from backupcore.chain import plan
from backupcore.context import Context
from backupcore.datastore import Datastore
from backupcore.model import VM, Image
from backupcore.restore import restore
from backupcore.session import Recorded
from backupcore.testing import MemoryGuest, MemoryHypervisor
from backupcore_s3 import S3


def test_from_a_guest_to_a_file_by_hand(
    driver: S3, client: Any, bucket: str, ctx: Context, tmp_path: Path, keys: Callable[..., list[str]]
) -> None:
    disk = bytearray(24 << 20)
    disk[1 << 20 : 21 << 20] = os.urandom(20 << 20)
    guest = MemoryGuest(VM(uuid="7d1c1a4e-0000-4000-8000-000000000001", name="web1"), {"vda": disk})
    datastore = Datastore("cloud", driver, plugins=[MemoryHypervisor([guest])])
    recorded: list[Recorded] = []
    run = plan(None, vm=guest.vm, host="h", datastore="cloud", settings={})
    run_backup(datastore, run, ctx, record=recorded.append)

    [key] = [key for key in keys(client, bucket) if key.endswith("/disk.vda.qcow2")]
    fetched, held = tmp_path / "fetched.qcow2", tmp_path / "held.raw"
    client.download_file(bucket, key, str(fetched))
    held.write_bytes(disk)
    subprocess.run(["qemu-img", "check", fetched], check=True)
    subprocess.run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", fetched, held], check=True)

    image = Image(
        uuid=run.image,
        number=1,
        vm=guest.vm,
        datastore="cloud",
        state="open",
        increments=(recorded[0].increment,),
    )
    to = tmp_path / "restored.qcow2"
    restore(datastore, image, None, ctx, target=lambda _: to)
    subprocess.run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", to, held], check=True)
