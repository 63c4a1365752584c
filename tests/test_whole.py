"""The whole path on real VMs: vmkeep, libvirt, QEMU, restic. What is restored equals what QEMU says the guest held.

Guests here have no operating system: their disks are written through QEMU's monitor, so every block is known.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt
import pytest

from lab import quick_repository
from lab.domain_xml import DiskSpec
from lab.patience import patient
from lab.vm import VM, same

MIB = 1 << 20
PASSWORD = "not-to-be-seen"
VMKEEP = [sys.executable, "-m", "vmkeep"]


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + patient(seconds)
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@dataclass
class Host:
    """A configured host: one restic datastore, one VM of two disks."""

    folder: Path
    vm: VM
    uri: str

    def __post_init__(self) -> None:
        password = self.folder / "password"
        password.touch(mode=0o600)
        password.write_text(f"{PASSWORD}\n")
        self.repository = quick_repository.make(self.folder / "repository", PASSWORD)
        self.state = self.folder / "state"
        self.config = self.folder / "config.toml"
        self.configure()

    def configure(self, host: str = "", **options: str | int) -> None:
        options = {"repository": str(self.repository), "password_file": str(self.folder / "password"), **options}
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())
        self.config.write_text(
            f'[host]\nuri = "{self.uri}"\nstate = "{self.state}"\nscratch = "{self.folder}/scratch"\n{host}\n'
            f'[datastores.nas]\ndriver = "restic"\n{lines}'
        )

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*VMKEEP, "--config", str(self.config), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=patient(100))
        assert "Traceback" not in out + err
        assert PASSWORD not in out + err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def ask(self, *arguments: str) -> Any:
        done = self.run("--json", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def backup(self, *arguments: str) -> Any:
        return self.ask("backup", self.vm.name, *arguments)

    def restore(self, increment: int, *arguments: str) -> dict[str, Path]:
        to = self.folder / f"restored-{len(list(self.folder.iterdir()))}"
        found = self.ask("restore", "1", "--increment", str(increment), "--to", str(to), *arguments)
        return {disk["id"]: Path(disk["path"]) for disk in found["disks"]}

    def snapshots(self) -> list[Any]:
        out = self.restic("snapshots", "--json")
        return list(json.loads(out))

    def restic(self, *arguments: str) -> str:
        return subprocess.run(
            ["restic", "-r", str(self.repository), "-p", str(self.folder / "password"), "--no-cache", *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def checkpoints(self) -> list[str]:
        return sorted(checkpoint.getName() for checkpoint in self.vm.domain.listAllCheckpoints())

    def has_job(self) -> bool:
        return bool(self.vm.domain.jobInfo()[0])

    def assert_released(self) -> None:
        """The guest runs, without a job of ours, and nothing of ours is left."""
        assert not self.has_job()
        assert self.vm.domain.state()[0] == 1, "running"
        assert not [path for path in (self.folder / "scratch").iterdir() if path.is_dir()]
        assert not list((self.state / "runs").iterdir())
        assert str(self.folder) not in Path("/proc/self/mounts").read_text()
        assert not processes(str(self.folder)), "a child is still there"


def processes(marker: str) -> list[str]:
    """Command lines of restic and of file views that work for the host in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (path.parent / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue  # it ended while we looked
        if ("restic" in line.split(" ")[0] or "backupcore.disk" in line) and marker in line + environment:
            found.append(line)
    return found


@pytest.fixture
def host(make_vm, libvirt_uri: str, vm_folder: Path, require_programs) -> Host:
    require_programs("restic", "fusermount3")
    vm = make_vm([DiskSpec(target="vda", size=64 * MIB), DiskSpec(target="vdb", size=32 * MIB + 512)], label="whole")
    vm.io("vda", "write -P 0x55 1M 20M")
    vm.io("vdb", "write -P 0x11 0 8M")
    return Host(vm_folder, vm, libvirt_uri)


def test_a_full_and_increments_restore_to_what_the_guest_held(host: Host):
    shutil.rmtree(host.repository)  # here the first backup makes it
    truth = []
    truth.append(host.vm.copy_truth(host.folder / "truth0"))
    full = host.backup()
    assert (full["type"], full["image"], full["increment"], full["parent"]) == ("FULL", 1, 0, None)
    host.vm.io("vda", "write -P 0x66 3M 1M", "write -z 5M 1M", "discard 7M 1M", "write -P 0x67 63M 1M")
    truth.append(host.vm.copy_truth(host.folder / "truth1"))
    second = host.backup()
    assert (second["type"], second["increment"], second["parent"]) == ("INCREMENT", 1, 0)
    assert second["read"] <= 2 * MIB + MIB, "dirty and not zero: 2 MiB"
    host.vm.io("vdb", "write -P 0x77 31M 1M")
    host.vm.domain.blockResize("vda", 96 * MIB, 1)
    host.vm.io("vda", "write -P 0x78 90M 64k")
    truth.append(host.vm.copy_truth(host.folder / "truth2"))
    host.backup()
    host.assert_released()
    assert len(host.checkpoints()) == 2, "the last two stay"
    for number, disks in enumerate(truth):
        restored = host.restore(number)
        assert set(restored) == {"vda", "vdb"}
        for disk, path in restored.items():
            assert same(disks[disk], path)
            check = subprocess.run(["qemu-img", "check", "-q", path], capture_output=True, check=False)
            assert check.returncode == 0
    image = host.ask("image", "show", "1")
    assert [(one["id"], one["pid"], one["type"]) for one in image["increments"]] == [
        (0, -1, "F"),
        (1, 0, "I"),
        (2, 1, "I"),
    ]
    host.restic("check", "--read-data")


@pytest.mark.soak  # half a minute; flattens and the chain after them have quick tests of their own
def test_increments_go_on_from_a_chain_that_was_flattened(host: Host):
    """KEEP_LAST=1: the full is made new out of the old one and the increment, and the next increment builds on it."""

    def night(number: int) -> Any:
        host.vm.io("vda", f"write -P {number} {3 * number}M 1M", f"write -z {4 + number}M 1M")
        host.vm.io("vdb", f"write -P {number} 31M 64k")
        taken = host.backup()
        assert (taken["type"], taken["warnings"]) == ("INCREMENT", [])
        return taken["retention"]

    def rows() -> list[tuple[int, int, str]]:
        return [(one["id"], one["pid"], one["type"]) for one in host.ask("image", "show", "1")["increments"]]

    host.backup()
    assert host.run("vm", "updateconf", host.vm.name, "--keep-last", "1").returncode == 0
    assert [one["action"] for one in night(1)] == ["flatten"]
    assert rows() == [(1, -1, "F")]
    assert len(host.snapshots()) == 1
    assert host.run("vm", "updateconf", host.vm.name, "--keep-last", "0").returncode == 0
    assert night(2) == []
    assert rows() == [(1, -1, "F"), (2, 1, "I")]
    assert len(host.checkpoints()) == 2, "that of the point which was merged has gone"
    truth = host.vm.copy_truth(host.folder / "truth")
    for disk, path in host.restore(2).items():
        assert same(truth[disk], path)
    host.assert_released()


def test_the_datastore_alone_holds_it_all(host: Host):
    """Without vmkeep: restic gives the disk of a full, QEMU reads it."""
    truth = host.vm.copy_truth(host.folder / "truth")
    taken = host.backup()
    out = host.folder / "out"
    host.restic("restore", taken["source"], "--target", str(out))
    assert {path.name for path in out.iterdir()} == {
        "disk.vda.qcow2",
        "disk.vdb.qcow2",
        "manifest.json",
        "sums.vda",
        "sums.vdb",
        "vm.xml",
    }
    for disk in ("vda", "vdb"):
        subprocess.run(["qemu-img", "check", "-q", out / f"disk.{disk}.qcow2"], check=True)
        assert same(truth[disk], out / f"disk.{disk}.qcow2")
    snapshot = host.snapshots()[0]
    assert snapshot["id"] == taken["source"]
    assert snapshot["hostname"] == host.vm.name


def test_a_restored_vm_can_be_defined_beside_the_first_and_runs(host: Host):
    host.backup()
    to = host.folder / "back"
    name = f"{host.vm.name}-back"
    made = host.ask("restore", "1", "--to", str(to), "--name", name, "--no-ip")
    domain = host.vm.connection.defineXML(Path(made["xml"]).read_text())
    try:
        assert domain.name() == name
        assert domain.UUIDString() != host.vm.uuid
        for disk in made["disks"]:
            shutil.chown(disk["path"], *(host.folder.stat().st_uid, host.folder.stat().st_gid))
        shutil.chown(to, *(host.folder.stat().st_uid, host.folder.stat().st_gid))
        domain.create()
        assert domain.isActive()
    finally:
        if domain.isActive():
            domain.destroy()
        domain.undefine()


def slow(host: Host) -> None:
    """Make the next backup take long enough to be interrupted: restic sends 512 KiB a second."""
    host.config.write_text(host.config.read_text() + 'limit_upload = 512\ncompression = "off"\n')
    # Every MiB of another byte, or restic would find them all alike and send one.
    host.vm.io("vda", *(f"write -P {number + 1} {number + 30}M 1M" for number in range(8)))


def reading(host: Host) -> Callable[[], bool]:
    """Whether the backup has come as far as restic reading the disks.

    For a fifth of a second after it has taken its lock restic looks whether others have one, and leaves it behind where
    it is interrupted then.
    """

    def found() -> bool:
        taken = []
        with contextlib.suppress(FileNotFoundError):  # it has just been removed
            taken = [path.stat().st_mtime for path in (host.repository / "locks").iterdir()]
        reads = any(" backup " in line for line in processes(str(host.folder)))
        return reads and any(time.time() - moment > 1 for moment in taken)

    return found


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.soak), signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_a_backup_cleanly(host: Host, number: signal.Signals):
    host.backup()
    before = host.checkpoints()
    slow(host)
    process = host.start("backup", host.vm.name)
    wait_until(reading(host))
    process.send_signal(number)
    _, err = process.communicate(timeout=patient(30))
    assert process.returncode == 130, err
    assert "Traceback" not in err
    host.assert_released()
    assert host.checkpoints() == before, "the parent's checkpoint stays, the new one is gone"
    assert len(host.snapshots()) == 1
    assert not host.restic("list", "locks").split()
    host.configure()
    assert host.backup()["type"] == "INCREMENT"


def test_a_second_backup_of_the_same_vm_at_once_is_refused(host: Host):
    host.backup()
    slow(host)
    process = host.start("backup", host.vm.name)
    wait_until(reading(host))
    started = time.monotonic()
    second = host.run("--json", "backup", host.vm.name)
    assert second.returncode == 10
    assert time.monotonic() - started < 5, "our lock says so, not libvirt's after 30 s"
    error = json.loads(second.stderr)["error"]
    assert error["class"] == "Busy"
    assert str(process.pid) in error["message"]
    process.terminate()
    process.communicate(timeout=patient(30))
    host.assert_released()


@pytest.mark.soak  # 28 s; test_killed.py has the named steps
def test_killed_at_many_moments_the_next_backup_works_and_nothing_reported_is_lost(host: Host):
    """kill -9 of vmkeep at moments spread over the whole of a backup, then a backup and a restore."""
    host.backup()
    started = time.monotonic()
    host.backup()
    whole = time.monotonic() - started
    moments = [0.15, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]
    for number, moment in enumerate(moments):
        host.vm.io("vda", f"write -P {0x30 + number} {number}M 1M")
        process = host.start("backup", host.vm.name)
        time.sleep(whole * moment)  # what is tested is the moment itself
        process.kill()
        process.communicate()
        wait_until(lambda: not processes(str(host.folder)), 10)
        assert host.vm.domain.state()[0] == 1, "the guest goes on"
    truth = host.vm.copy_truth(host.folder / "truth")
    taken = host.backup()
    host.assert_released()
    for disk, path in host.restore(taken["increment"]).items():
        assert same(truth[disk], path), f"disk {disk} after kills"
    listed = {one["source"] for one in host.ask("image", "show", "1")["increments"]}
    assert listed <= {snapshot["id"] for snapshot in host.snapshots()}
    assert len(host.checkpoints()) <= 2 + len(moments)


def test_a_vm_switched_off_in_the_middle_fails_the_backup_and_keeps_the_chain(host: Host):
    host.backup()
    slow(host)
    process = host.start("--json", "backup", host.vm.name)
    wait_until(reading(host))
    host.vm.destroy()
    out, err = process.communicate(timeout=patient(60))
    assert process.returncode == 11, err
    assert not out
    assert "Traceback" not in err
    host.vm.start()
    host.configure()
    assert len(host.snapshots()) == 1, "an incomplete snapshot is forgotten"
    truth = host.vm.copy_truth(host.folder / "truth")
    taken = host.backup()
    for disk, path in host.restore(taken["increment"]).items():
        assert same(truth[disk], path)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.soak), signal.SIGKILL])
def test_a_vm_that_is_off_can_start_once_its_backup_has_ended_in_any_way(host: Host, number: signal.Signals):
    host.backup()
    slow(host)
    host.vm.destroy()
    process = host.start("backup", host.vm.name)
    wait_until(reading(host))
    shown = host.ask("vm", "show", host.vm.name)
    assert (shown["state"], shown["being_read"]) == ("off", True)
    assert "off, being read by a backup" in host.run("vm", "show", host.vm.name).stdout
    with pytest.raises(libvirt.libvirtError, match="lock"):
        host.vm.start()
    process.send_signal(number)
    process.communicate(timeout=patient(30))
    host.configure()

    def starts() -> bool:
        with contextlib.suppress(libvirt.libvirtError):
            host.vm.start()
        return host.vm.active

    wait_until(starts)
    truth = host.vm.copy_truth(host.folder / "truth")
    taken = host.backup()
    assert (taken["type"], taken["increment"]) == ("INCREMENT", 1)
    host.assert_released()
    for disk, path in host.restore(1).items():
        assert same(truth[disk], path)


@pytest.mark.soak  # 25 s; drivers/libvirt has it without a store
def test_a_chain_in_each_of_two_datastores(host: Host):
    second = host.config.read_text().partition("[datastores.nas]")[2].replace(str(host.repository), f"{host.folder}/r2")
    host.config.write_text(f"{host.config.read_text()}\n[datastores.other]{second}")
    stray = "backupcore-" + "0" * 32
    host.vm.domain.checkpointCreateXML(f"<domaincheckpoint><name>{stray}</name></domaincheckpoint>", 0)
    truths: dict[str, dict[str, Path]] = {}
    for number, store in enumerate(("nas", "other", "nas", "other")):
        host.vm.io("vda", f"write -P {0x60 + number} {number}M 1M", f"write -z {number + 8}M 64k")
        truths[store] = host.vm.copy_truth(host.folder / f"truth{number}")
        taken = host.backup("-d", store)
        assert taken["type"] == ("INCREMENT" if number > 1 else "FULL")
    assert len(host.checkpoints()) == 4
    assert stray not in host.checkpoints()
    for image, store in (("1", "nas"), ("2", "other")):
        for disk in host.ask("restore", image, "--to", str(host.folder / f"to-{store}"))["disks"]:
            assert same(truths[store][disk["id"]], Path(disk["path"]))


def test_a_lost_source_leads_to_a_full_that_says_why(host: Host):
    full = host.backup()
    host.restic("forget", full["source"])
    done = host.run("--json", "backup", host.vm.name)
    assert done.returncode == 3, done.stderr
    again = json.loads(done.stdout)
    assert again["type"] == "FULL"
    assert again["image"] == 2
    assert full["source"][:8] in again["reason"]


def spoil_password(host: Host) -> None:
    (host.folder / "password").write_text("wrong\n")


WRONG: dict[str, tuple[Callable[[Host], object], list[str], int, str]] = {
    "no such VM": (lambda host: None, ["backup", "nosuchvm"], 4, "nosuchvm"),
    "no such datastore": (lambda host: None, ["backup", "VM", "-d", "nosuch"], 4, "nosuch.*nas"),
    "no such image": (lambda host: None, ["restore", "99"], 4, "99"),
    "a misspelt option": (lambda host: host.configure(pasword_file="x"), ["backup", "VM"], 2, "pasword_file"),
    "two misspelt keys": (
        lambda host: host.configure('ury = "x"\nmax = 3'),
        ["backup", "VM"],
        2,
        "host.max.*host.ury|host.ury.*host.max",
    ),
    "no configuration": (lambda host: host.config.unlink(), ["backup", "VM"], 2, "vmkeep init"),
    "no TOML": (lambda host: host.config.write_text("[host\n"), ["vm", "list"], 2, "line 1"),
    "no restic": (lambda host: host.configure(binary="restic-is-not-here"), ["backup", "VM"], 2, "restic-is-not-here"),
    "a wrong password": (spoil_password, ["datastore", "check", "nas"], 7, "password"),
    "no password": (lambda host: (host.folder / "password").unlink(), ["backup", "VM"], 2, "password"),
}


def test_what_a_user_would_try_wrong(host: Host):
    """One after the other on one VM: to start one for each takes longer than all that is tried."""
    for name, (spoil, arguments, code, words) in WRONG.items():
        host.configure()
        spoil(host)
        done = host.run(*[host.vm.name if argument == "VM" else argument for argument in arguments])
        assert done.returncode == code, f"{name}: {done.stderr}"
        assert re.search(words, done.stderr, re.DOTALL), f"{name}: {done.stderr}"
        assert len(done.stderr.strip().splitlines()) <= 4, f"{name}: one clear line and a hint"
        assert not host.has_job(), name


def test_libvirtd_away(host: Host):
    host.config.write_text(
        host.config.read_text().replace(host.uri, "qemu+unix:///system?socket=/nonexistent/libvirt-sock")
    )
    done = host.run("backup", host.vm.name)
    assert done.returncode == 11, done.stderr
    assert "libvirtd" in done.stderr


def test_a_locked_repository_is_busy(host: Host):
    host.backup()
    host.configure(lock_wait=0)
    # An exclusive lock of a process that lives: restic's check holds one while it is stopped.
    holder = subprocess.Popen(
        ["restic", "-r", str(host.repository), "-p", str(host.folder / "password"), "--no-cache", "prune"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: any(len(path.name) == 64 for path in (host.repository / "locks").iterdir()) or holder.poll())
        holder.send_signal(signal.SIGSTOP)
        if holder.poll() is not None:
            pytest.fail("restic prune ended before it could be stopped")
        done = host.run("--json", "backup", host.vm.name)
        assert done.returncode == 10, done.stderr
        told = done.stderr.splitlines()[-1]  # a user who may not open /dev/fuse is warned before
        assert json.loads(told)["error"]["class"] == "Busy"
    finally:
        holder.send_signal(signal.SIGCONT)
        holder.terminate()
        holder.wait()
    host.assert_released()
