"""A disk that is unmounted, a prefix that is empty: with real drivers and real VMs, two of them, in every mode."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import boto3
import pytest

from lab.domain_xml import DiskSpec
from lab.fixtures import MakeVM
from lab.host import Host
from lab.s3_server import ACCESS_KEY, SECRET_KEY, SeaweedFS
from lab.servers import rclone
from lab.vm import VM

MIB = 1 << 20
pytestmark = pytest.mark.timeout(600)  # for a loaded machine


class Place:
    """Where a datastore's backups lie, and how it is taken away, and brought back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.away = folder.with_name("disk")
        self.host: Host | None = None
        self.other: VM | None = None

    def mount(self) -> None:
        """A disk of its own at the folder, with what it held before."""
        self.folder.mkdir(exist_ok=True)
        if os.geteuid() == 0:
            self.away.mkdir(exist_ok=True)
            subprocess.run(["mount", "--bind", self.away, self.folder], check=True)
        elif self.away.exists():
            self.folder.rmdir()
            self.away.rename(self.folder)

    def unmount(self) -> None:
        if os.geteuid() == 0:
            subprocess.run(["umount", "-l", self.folder], check=True)
        else:
            self.folder.rename(self.away)
            self.folder.mkdir()

    def found(self) -> list[str]:
        """What lies where the disk should be."""
        return sorted(str(path) for path in self.folder.rglob("*"))


class Prefix(Place):
    """Of a bucket: unmounted is another prefix."""

    def mount(self) -> None:
        assert self.host
        self.host.configure()

    def unmount(self) -> None:
        assert self.host
        self.host.configure(prefix="empty")

    def found(self) -> list[str]:
        return []


SLOW = [pytest.param(name, marks=pytest.mark.soak) for name in ("restic", "rest", "s3")]


@pytest.fixture(params=["rsync", *SLOW])
def place(request: pytest.FixtureRequest, vm_folder: Path, make_vm: MakeVM, libvirt_uri: str) -> Iterator[Place]:
    with ExitStack() as stack:
        made = (Prefix if request.param == "s3" else Place)(vm_folder / "store")
        secret = vm_folder / "password"
        secret.write_text("correct horse\n")
        secret.chmod(0o600)
        match request.param:
            case "rsync":
                driver, options = "rsync", {"target": str(made.folder)}
            case "restic":
                driver = "restic"
                options = {"repository": str(made.folder / "repository"), "password_file": str(secret), "cache": "off"}
            case "rest":
                made.folder.mkdir()
                port = stack.enter_context(rclone(made.folder, "restic", "--cache-objects=false"))
                driver = "restic"
                options = {"repository": f"rest:http://127.0.0.1:{port}/", "password_file": str(secret), "cache": "off"}
            case _:
                server = stack.enter_context(SeaweedFS())
                keys = server.credentials(vm_folder / "credentials")
                names = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY}
                boto3.client("s3", endpoint_url=server.url, region_name="us-east-1", **names).create_bucket(
                    Bucket="vms"
                )
                driver, options = "s3", {"bucket": "vms", "endpoint_url": server.url, "credentials_file": str(keys)}
        vm = make_vm([DiskSpec(target="vda", size=8 * MIB)], label="first", start=False)
        folder = vm_folder / "host"
        folder.mkdir(mode=0o711)
        more = "path_style = true" if driver == "s3" else ""
        made.host = Host(folder, vm, libvirt_uri, driver=driver, options=options, more=more)
        made.other = make_vm([DiskSpec(target="vda", size=8 * MIB)], label="other", start=False)
        made.mount()
        try:
            yield made
        finally:
            if type(made) is Place and os.geteuid() == 0:
                # os.path.ismount sees no mount of the same file system
                subprocess.run(["umount", "-l", made.folder], check=False, capture_output=True)


def test_nothing_comes_of_a_place_that_is_another(place: Place):
    host, other = place.host, place.other
    assert host
    assert other
    names = (host.vm.name, other.name)
    for name in names:
        host.ask("vm", "updateconf", name, "--mode", "FULL", "--keep-last", "2")
        host.ask("backup", name)
        host.ask("backup", name)
    before = [(one["id"], one["state"]) for one in host.ask("image", "list")]
    identity = host.ask("datastore", "show", "nas")["identity"]
    assert identity
    place.unmount()
    was = place.found()
    for mode in ("FULL", "INCREMENT"):
        for name in names:
            host.ask("vm", "updateconf", name, "--mode", mode)
            refused(host, "backup", name)
    for verb in (
        ("image", "verify", "1"),
        ("image", "delete", "1", "--yes"),
        ("restore", "2", "--verify-only"),
        ("datastore", "check", "nas"),
        ("catalog", "check"),
    ):
        refused(host, *verb)
    assert [(one["id"], one["state"]) for one in host.ask("image", "list")] == before
    assert place.found() == was
    place.mount()
    assert host.ask("datastore", "show", "nas")["identity"] == identity
    assert host.ask("backup", names[0])["warnings"] == []
    assert host.ask("image", "verify", "1")["ok"]


def refused(host: Host, *verb: str) -> None:
    told = host.run(*verb)
    assert told.code == 5, (verb, told)
    assert "vmkeep datastore adopt nas" in told.err, (verb, told)
