"""The file view: real mounts, read by real programs; and the staging folder."""

from __future__ import annotations

import errno
import io
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backupcore.disk.extents import Extent, Kind
from backupcore.disk.fileview import View, _Process, show
from backupcore.disk.mountpoints import unmount_below
from backupcore.disk.qcow2 import DiskArtifact, Layout
from backupcore.disk.sums import HashedDisk, SumsArtifact
from backupcore.errors import BackupError, ContractViolation, TargetFull, TargetUnavailable
from backupcore.model import Artifact, BytesArtifact
from lab import quick_repository
from tests.disk.odd_blocks import (
    MIB,
    Digests,
    Export,
    Failing,
    Hanging,
    Murderous,
    Noted,
    Odd,
    content,
    disk,
)
from tests.disk.qemu_nbd import QemuNbd

LIMIT = 20.0
SIZE = 3 * MIB + 12345


def until(condition):
    """Wait for a condition, with a limit."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def children() -> set[int]:
    """The processes that this one has started and not yet reaped."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if entry.name.isdigit() and int(state[1]) == os.getpid():
            found.add(int(entry.name))
    return found


def mounted_below(folder: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith(f"{folder}/")]


@pytest.fixture
def folder(tmp_path):
    """A run's folder, in which nothing may be left: no file, no mount, no process."""
    place = tmp_path / "run of a VM"  # a blank: mountinfo escapes it
    place.mkdir(mode=0o700)
    before = children()
    threads = set(threading.enumerate())
    yield place
    assert not mounted_below(tmp_path)
    assert children() <= before
    assert set(threading.enumerate()) <= threads
    assert [path for path in place.iterdir() if path.name.startswith("view-")] == []


class Backup:
    """The artifacts of one made-up backup, and what they must read as."""

    def __init__(self, folder: Path, *names: str, prefix: str = "", blocks=None, patience=0.02, size=SIZE) -> None:
        self.plain = {}
        self.hashed = []
        sums = []
        for seed, name in enumerate(names):
            plain = disk(f"{prefix}disk.{name}.qcow2", size, seed=seed, blocks=blocks)
            self.hashed.append(HashedDisk(plain, folder / f"{prefix}{name}.table"))
            sums.append(SumsArtifact(f"{prefix}sums.{name}", self.hashed[-1], patience=patience))
            self.plain[plain.name] = disk(plain.name, size, seed=seed)
        manifest = Digests(f"{prefix}manifest.json", sums)
        self.artifacts: list[Artifact] = [*self.hashed, *sums, BytesArtifact(f"{prefix}vm.xml", b"<domain/>"), manifest]

    def right(self, folder: Path) -> dict[str, bytes]:
        """The bytes of every artifact, found out without the view and without its tables."""
        folder.mkdir(exist_ok=True)
        sums = []
        found = {}
        for (name, plain), hashed in zip(self.plain.items(), self.hashed, strict=True):
            again = HashedDisk(plain, folder / f"{hashed.table.path.name}.again")
            sums.append(SumsArtifact(name.replace("disk", "sums").replace(".qcow2", ""), again, patience=0.0))
            found[name] = plain.read_at(0, plain.size)
            found[sums[-1].name] = sums[-1].read_at(0, sums[-1].size)
        manifest = Digests(self.artifacts[-1].name, sums)
        found[self.artifacts[-2].name] = b"<domain/>"
        found[manifest.name] = manifest.read_at(0, manifest.size)
        for one in sums:
            one._disk.close()
        return found

    def close(self) -> None:
        for hashed in self.hashed:
            hashed.close()


def test_the_files_are_what_the_artifacts_say(folder, tmp_path):
    backup = Backup(folder, "vda")
    with show(backup.artifacts, folder) as view:
        assert not view.staged
        files = {path.name: path.stat() for path in view.path.iterdir()}
        assert {name: stat.st_size for name, stat in files.items()} == {a.name: a.size for a in backup.artifacts}
        assert {stat.st_mode for stat in files.values()} == {0o100400}
        first = {name: stat.st_mtime_ns for name, stat in files.items()}
        with pytest.raises(OSError, match="Read-only"):
            (view.path / "new").touch()
        with pytest.raises(OSError, match="Read-only"):
            (view.path / "vm.xml").open("r+")
        assert not (view.path / "none").exists()
        assert {p.name: p.read_bytes() for p in view.path.iterdir()} == backup.right(tmp_path / "right")
        assert {path.name: path.stat().st_mtime_ns for path in view.path.iterdir()} == first
        view.check()
        assert view.failed is None
    assert backup.hashed[0].bytes_read == backup.hashed[0].size - backup.plain["disk.vda.qcow2"].layout.data_offset - (
        -SIZE % 65536
    )


def test_any_range_of_any_size(folder, tmp_path):
    backup = Backup(folder, "vda")
    right = backup.right(tmp_path / "right")["disk.vda.qcow2"]
    with show(backup.artifacts, folder) as view, (view.path / "disk.vda.qcow2").open("rb", buffering=0) as file:
        for offset, length in [(0, 1), (1, 700), (65535, 131074), (5, 4 * MIB), (len(right) - 3, 100), (len(right), 9)]:
            assert os.pread(file.fileno(), length, offset) == right[offset : offset + length]


@pytest.mark.parametrize("length", [1000, 131072, 524288])
def test_reads_come_in_the_size_of_the_reader(folder, length):
    note = folder / "note"
    with (
        show([Noted("disk.vda.qcow2", 4 << 20, note)], folder) as view,
        (view.path / "disk.vda.qcow2").open("rb", buffering=0) as file,
    ):
        for count in (1, 2, 3):
            assert len(file.read(length)) == length
            assert note.read_text().split() == [str(length)] * count


def test_one_file_at_a_time_in_every_order(folder, tmp_path):
    names = ["disk.vda.qcow2", "disk.vdb.qcow2", "sums.vda", "sums.vdb", "manifest.json"]
    orders = list(itertools.permutations(names))
    size = 5 * 65536 - 100
    backups = [Backup(folder, "vda", "vdb", prefix=f"{n}.", size=size, patience=0.004) for n in range(len(orders))]
    right = Backup(folder, "vda", "vdb", size=size).right(tmp_path / "right")
    with show([artifact for backup in backups for artifact in backup.artifacts], folder) as view:
        for number, order in enumerate(orders):
            for name in order:
                assert (view.path / f"{number}.{name}").read_bytes() == right[name], (order, name)
        view.check()


def test_all_files_at_once_by_slow_and_quick_readers(folder, tmp_path):
    backup = Backup(folder, "vda", "vdb", patience=1.0)
    right = backup.right(tmp_path / "right")
    with show(backup.artifacts, folder) as view, ThreadPoolExecutor(20) as pool:

        def cat(name):
            return subprocess.run(["cat", view.path / name], check=True, capture_output=True).stdout

        def slowly(name):
            pieces = io.BytesIO()
            with (view.path / name).open("rb", buffering=0) as file:
                while piece := file.read(100_001):
                    pieces.write(piece)
                    time.sleep(0.005)  # a slow reader
            return pieces.getvalue()

        jobs = [(name, pool.submit(read, name)) for name in sorted(right, reverse=True) for read in (cat, slowly)]
        for name, job in jobs:
            assert job.result(LIMIT) == right[name], name
        view.check()


def test_more_waiting_readers_than_fuse_has_threads_by_itself(folder, tmp_path):
    backup = Backup(folder, *(f"vd{letter}" for letter in "abcdefghijklmno"), patience=5.0, size=MIB)
    right = backup.right(tmp_path / "right")
    with show(backup.artifacts, folder) as view, ThreadPoolExecutor(20) as pool:
        start = time.monotonic()
        waiting = [(name, pool.submit((view.path / name).read_bytes)) for name in right if "disk" not in name]
        for name in right:
            if "disk" in name:
                assert (view.path / name).read_bytes() == right[name]
        assert all(job.result(LIMIT) == right[name] for name, job in waiting)
        assert time.monotonic() - start < 5


def test_without_a_reader_of_the_disk_the_sums_read_it_after_a_second(folder, tmp_path):
    backup = Backup(folder, "vda", patience=1.0)
    with show(backup.artifacts, folder) as view:
        start = time.monotonic()
        assert (view.path / "manifest.json").read_bytes() == backup.right(tmp_path / "right")["manifest.json"]
        assert 1 <= time.monotonic() - start < LIMIT


def test_rsync_cmp_and_qemu_read_it(folder, tmp_path):
    backup = Backup(folder, "vda")
    right = backup.right(tmp_path / "right")
    raw = tmp_path / "raw"
    # The third cluster is not in the file and reads as zeros.
    raw.write_bytes(content(SIZE)[:131072] + bytes(65536) + content(SIZE)[196608:] + bytes(-SIZE % 512))
    with show(backup.artifacts, folder) as view:
        file = view.path / "disk.vda.qcow2"
        run("rsync", "-a", f"{view.path}/", tmp_path / "copy")
        run("cmp", file, tmp_path / "copy" / file.name)
        assert "No errors" in run("qemu-img", "check", file)
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", file, raw)
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == right


def run(*command, **kwargs):
    """Run a program to its end; its output. An error shows what it said."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False, **kwargs)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_restic_backs_it_up(folder, tmp_path):
    backup = Backup(folder, "vda", "vdb", patience=1.0)
    environment = os.environ | {
        "RESTIC_PASSWORD": "p",
        "RESTIC_REPOSITORY": str(tmp_path / "repository"),
        "RESTIC_CACHE_DIR": str(tmp_path / "cache"),
    }
    quick_repository.make(tmp_path / "repository", "p")
    with show(backup.artifacts, folder) as view:
        run("restic", "backup", ".", cwd=view.path, env=environment)
        view.check()
    run("restic", "restore", "latest", "--target", tmp_path / "back", env=environment)
    found = {path.name: path.read_bytes() for path in (tmp_path / "back").rglob("*") if path.is_file()}
    assert found == backup.right(tmp_path / "right")
    assert sum(hashed.bytes_read for hashed in backup.hashed) <= 2 * SIZE


def test_a_disk_on_an_nbd_server(folder, tmp_path):
    image = tmp_path / "raw"
    image.write_bytes(content(16 * MIB))
    with QemuNbd(image, "raw") as server:
        layout = Layout(16 * MIB, [Extent(0, 16 * MIB, Kind.DATA)])
        hashed = HashedDisk(DiskArtifact("disk.vda.qcow2", layout, Export(server.address)), folder / "table")
        with show([hashed], folder) as view:
            out = run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", view.path / "disk.vda.qcow2", image)
            assert "identical" in out
        hashed.complete()
        hashed.close()


@pytest.mark.parametrize("kind", [TargetUnavailable, ContractViolation])
def test_after_a_failed_read_nothing_can_be_read(folder, kind):
    backup = Backup(folder, "vda", blocks=Failing(content(SIZE), 2 * MIB, kind))
    heard: list[BackupError] = []
    threads = []

    def on_failure(error):
        threads.append(threading.current_thread())
        heard.append(error)

    with show(backup.artifacts, folder, on_failure=on_failure) as view:
        assert (view.path / "vm.xml").read_bytes()
        failed = subprocess.run(["cat", view.path / "disk.vda.qcow2"], check=False, capture_output=True)
        assert failed.returncode != 0
        assert b"Input/output error" in failed.stderr
        for artifact in backup.artifacts:
            with pytest.raises(OSError, match="Input/output") as caught:
                (view.path / artifact.name).read_bytes()
            assert caught.value.errno == errno.EIO
        until(lambda: heard)
        with pytest.raises(kind, match="nothing can be read past 2097152"):
            view.check()
    assert heard == [view.failed]
    assert threads != [threading.current_thread()]


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        ("short", ContractViolation, "vm.odd gave 99 of 100 bytes at 0 of 100"),
        ("long", ContractViolation, "vm.odd gave 101 of 100 bytes at 0 of 100"),
        ("bug", BackupError, "reading vm.odd failed: ZeroDivisionError: a bug"),
        ("os", TargetUnavailable, r"reading vm.odd: Input/output error \(/some/where\)"),
        ("custom", BackupError, "custom 3"),
    ],
)
def test_whatever_goes_wrong_is_told(folder, act, kind, message):
    with show([Odd("vm.odd", 100, act), BytesArtifact("a", b"b")], folder) as view:
        with pytest.raises(OSError, match="Input/output"):
            (view.path / "vm.odd").read_bytes()
        with pytest.raises(OSError, match="Input/output"):
            (view.path / "a").read_bytes()
        until(lambda: view.failed)
    with pytest.raises(kind, match=message):
        view.check()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_a_block_that_raises_leaves_nothing(folder, error):
    with pytest.raises(error), show([BytesArtifact("a", b"b")], folder) as view:
        assert (view.path / "a").read_bytes() == b"b"
        raise error
    assert view.failed is None


def test_ctrl_c_of_the_terminal_does_not_reach_it(folder):
    before = children()
    with show([BytesArtifact("a", b"b")], folder) as view:
        (server,) = children() - before
        assert os.getsid(server) == server != os.getsid(0)
        os.kill(server, signal.SIGCONT)
        assert (view.path / "a").read_bytes() == b"b"


def test_a_reader_that_waits_does_not_hold_up_the_end(folder):
    backup = Backup(folder, "vda", blocks=Hanging(content(SIZE)))
    with show(backup.artifacts, folder) as view:
        readers = [
            subprocess.Popen(["cat", view.path / name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for name in ("disk.vda.qcow2", "manifest.json")
        ]
        until(lambda: backup.hashed[0].table.reads)
        start = time.monotonic()
    assert time.monotonic() - start < 4
    assert [reader.wait(LIMIT) for reader in readers] == [1, 1]
    assert view.failed is None


def test_a_file_that_is_still_open_does_not_hold_up_the_end(folder):
    with show([BytesArtifact("a", b"b")], folder) as view:
        file = (view.path / "a").open("rb", buffering=0)
    with file, pytest.raises(OSError, match=r"not connected|aborted"):
        file.read()


def test_a_process_that_hangs_is_killed(folder):
    before = children()
    with show([BytesArtifact("a", b"b")], folder):
        (server,) = children() - before
        os.kill(server, signal.SIGSTOP)


def test_a_process_that_is_killed_fails_the_view(folder, tmp_path):
    note = tmp_path / "note"
    heard: list[BackupError] = []
    backup = Backup(folder, "vda", blocks=Murderous(note))
    with show(backup.artifacts, folder, on_failure=heard.append) as view:
        with pytest.raises(OSError, match=r"not connected|aborted|Input/output"):
            (view.path / "disk.vda.qcow2").read_bytes()
        until(lambda: heard)
        with pytest.raises(OSError, match="not connected"):
            (view.path / "manifest.json").read_bytes()
    with pytest.raises(BackupError, match="process of the file view ended"):
        view.check()


def test_a_failure_of_what_follows_a_failure_is_logged(folder, caplog):
    def on_failure(error):
        raise LookupError("nobody to tell")

    with show([Odd("a", 1, "bug")], folder, on_failure=on_failure) as view:
        with pytest.raises(OSError, match="Input/output"):
            (view.path / "a").read_bytes()
        until(lambda: "nobody to tell" in caplog.text)


def test_unmounted_by_somebody_else(folder):
    with show([BytesArtifact("a", b"b")], folder) as view:
        run("fusermount3", "-u", view.path)
        until(lambda: view.failed)
    with pytest.raises(BackupError, match="process of the file view ended"):
        view.check()


PARENT = """
import sys, time
from pathlib import Path
from backupcore.disk.fileview import show
from backupcore.model import BytesArtifact
with show([BytesArtifact("a", b"b")], Path(sys.argv[1])) as view:
    print(view.path, flush=True)
    for _ in range(600):  # a signal right before a sleep is heard after it only
        time.sleep(0.1)
"""


@pytest.fixture
def parent(folder):
    """Another process with a view, and the number of the process that serves it."""
    with subprocess.Popen([sys.executable, "-c", PARENT, folder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        servers = run("pgrep", "-P", str(process.pid)).split()
        assert len(servers) == 1
        yield process, path, int(servers[0])
        process.kill()
    shutil.rmtree(path, ignore_errors=True)


def test_a_parent_that_is_killed_leaves_no_mount(parent, folder):
    process, path, server = parent
    assert (path / "a").read_bytes() == b"b"
    process.kill()
    until(lambda: not Path(f"/proc/{server}").exists() and not mounted_below(folder.parent))


def test_a_parent_that_is_interrupted_cleans_up(parent, folder):
    process, path, server = parent
    process.send_signal(signal.SIGINT)
    process.wait(LIMIT)
    assert not path.exists()
    assert not Path(f"/proc/{server}").exists()


def test_what_two_killed_processes_left_is_unmounted(parent, folder):
    process, path, server = parent
    os.kill(server, signal.SIGSTOP)
    process.kill()
    process.wait(LIMIT)
    os.kill(server, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{server}").exists())
    with pytest.raises(OSError, match="not connected"):
        list(path.iterdir())
    unmount_below(folder.parent / "elsewhere")
    assert mounted_below(folder.parent)
    unmount_below(folder)
    assert list(path.iterdir()) == []


@pytest.fixture
def no_fuse(monkeypatch, tmp_path):
    """A host on which fusermount3 is not installed."""
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))


def test_without_fuse_the_files_are_staged(folder, tmp_path, no_fuse, caplog):
    backup = Backup(folder, "vda")
    with caplog.at_level(logging.WARNING), show(backup.artifacts, folder) as view:
        assert view.staged
        assert {path.name: path.read_bytes() for path in view.path.iterdir()} == backup.right(tmp_path / "right")
        assert {path.stat().st_mode for path in view.path.iterdir()} == {0o100400}
        view.check()
    assert "fusermount3 is not installed" in caplog.text
    backup.close()


def test_a_mount_that_is_refused_is_staged(folder, monkeypatch, caplog):
    monkeypatch.setenv("FUSE_LIBRARY_PATH", "/no/such/library")
    with caplog.at_level(logging.WARNING), show([BytesArtifact("a", b"b")], folder) as view:
        assert view.staged
        assert (view.path / "a").read_bytes() == b"b"
    assert "no file view (OSError: /no/such/library" in caplog.text


def test_the_end_of_a_process_that_refused_is_no_failure_of_the_staged_files(folder, monkeypatch):
    # It ends while `show` goes on to the staging, before or after: seen to fail a backup, once, on a loaded machine.
    monkeypatch.setenv("FUSE_LIBRARY_PATH", "/no/such/library")
    view = View(folder, logging.getLogger("backupcore"))
    process = _Process(view, logging.getLogger("backupcore"))
    try:
        assert process.mount([BytesArtifact("a", b"b")])
        until(lambda: not any(thread.name == "file-view" for thread in threading.enumerate()))
        view.check()
    finally:
        process.end()


def test_staging_needs_room(folder, no_fuse):
    with pytest.raises(TargetFull) as caught, show([Odd("giant", 1 << 60, "bug")], folder):
        pass
    assert str(folder) in caught.value.message
    assert str(1 << 60) in caught.value.message


def test_errors_while_staging_are_those_of_the_artifact(folder, no_fuse):
    backup = Backup(folder, "vda", blocks=Failing(content(SIZE), 2 * MIB))
    with pytest.raises(TargetUnavailable, match="past"), show(backup.artifacts, folder):
        pass
    backup.close()


def test_artifacts_that_cannot_be_shown(folder):
    class Local(BytesArtifact):
        pass

    with pytest.raises(ContractViolation, match="cannot be pickled"), show([Local("a", b"b")], folder):
        pass
    with pytest.raises(ContractViolation, match="of one name"), show([BytesArtifact("a", b"b")] * 2, folder):
        pass
    with pytest.raises(ContractViolation, match="no valid artifact name"), show([BytesArtifact("../a", b"")], folder):
        pass
    with pytest.raises(ContractViolation, match="another process: LookupError"):  # noqa: SIM117 - reads better apart
        with show([Odd("a", 1, "unpickle")], folder):
            pass


def test_nothing_is_imported_from_the_current_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "pickle.py").write_text("raise SystemExit('foreign code')")
    monkeypatch.chdir(tmp_path)
    with show([BytesArtifact("a", b"b")], folder) as view:
        assert (view.path / "a").read_bytes() == b"b"
    assert not view.staged
