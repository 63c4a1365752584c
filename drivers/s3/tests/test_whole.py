"""A guest's disk, backed up through the core, is a plain qcow2 object that any S3 client fetches and QEMU opens."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backupcore import run_backup
from backupcore.chain import plan
from backupcore.context import Context
from backupcore.datastore import Datastore
from backupcore.model import VM, Image, Type
from backupcore.restore import restore
from backupcore.session import Recorded
from backupcore.testing import MemoryGuest, MemoryHypervisor
from backupcore_s3 import S3
from lab.s3_server import SeaweedFS

README = Path(__file__).parent.parent / "README.md"


def written(language: str) -> str:
    """The first code block of the README in this language."""
    return str(re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)[0])


def test_by_hand_as_the_readme_says(
    options: Callable[..., S3], client: Any, seaweed: SeaweedFS, credentials: Path, tmp_path: Path
) -> None:
    client.create_bucket(Bucket="vm-backups")
    guest = MemoryGuest(
        VM(uuid="7d1c1a4e-0000-4000-8000-000000000002", name="web2"), {"vda": bytearray(os.urandom(2 << 20))}
    )
    driver = options("vm-backups", prefix="kvm")
    datastore = Datastore("cloud", driver, hypervisor=MemoryHypervisor([guest]))
    image: Image | None = None
    for number in range(2):
        (tmp_path / f"run{number}").mkdir()
        recorded: list[Recorded] = []
        with Context(tmp_path / f"run{number}") as ctx:
            run = plan(image, vm=guest.vm, host="h", datastore="cloud", settings={"MODE": "INCREMENT"})
            run_backup(datastore, run, ctx, record=recorded.append)
        increments = (*(image.increments if image else ()), recorded[0].increment)
        image = Image(uuid=run.image, number=1, vm=guest.vm, datastore="cloud", state="open", increments=increments)
        if number == 0:
            guest.write("vda", 64 << 10, os.urandom(128 << 10))
            guest.write("vda", 1 << 20, bytes(64 << 10))
    assert image is not None
    assert image.increments[1].type is Type.INCREMENT
    full, increment = (one.source.token.replace(".", "/") for one in image.increments)
    (tmp_path / "fetch.py").write_text(written("python"))
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
        "ENDPOINT": seaweed.url,
        "FULL": full,
        "INCREMENT": increment,
    }
    subprocess.run(["sh", "-ec", written("sh")], env=environment, cwd=tmp_path, check=True)
    (tmp_path / "held").write_bytes(guest.disks["vda"])
    compare = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", tmp_path / "disk.qcow2", tmp_path / "held"]
    subprocess.run(compare, check=True)


def test_the_readme_names_every_option() -> None:
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", README.read_text(), re.M))))
    assert {field.name for field in dataclasses.fields(S3)} <= named  # type: ignore[arg-type]  # a driver is one


def test_from_a_guest_to_a_file_by_hand(
    driver: S3, client: Any, bucket: str, ctx: Context, tmp_path: Path, keys: Callable[..., list[str]]
) -> None:
    disk = bytearray(24 << 20)
    disk[1 << 20 : 21 << 20] = os.urandom(20 << 20)
    guest = MemoryGuest(VM(uuid="7d1c1a4e-0000-4000-8000-000000000001", name="web1"), {"vda": disk})
    datastore = Datastore("cloud", driver, hypervisor=MemoryHypervisor([guest]))
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
