"""Images made before the instant: as QEMU's own program makes them, never of another run, gone at every end."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import libvirt
import pytest

from backupcore.errors import BackupError, HypervisorError
from backupcore.model import Outcome, RunState
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.mechanisms.live_job import LiveJob
from backupcore_libvirt.mechanisms.overlays import Overlays
from backupcore_libvirt.premade.image import is_untouched, make_empty, make_overlay
from backupcore_libvirt.scratch import Owner

MiB = 1 << 20
SIZES = [512, 65536, 33 * MiB, 40 * MiB + 512, 512 * MiB + 512, 1 << 40, (9 << 40) + 512]
OURSELVES = Owner(os.geteuid(), os.getegid())
SNAPSHOT = {"INCREMENT_MODE": "SNAPSHOT"}


def qemu_img(*arguments: object) -> str:
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def described(path: Path) -> tuple[object, object]:
    """All that QEMU says of an image but where it lies and what room it takes, and its map."""
    info = json.loads(qemu_img("info", "--output=json", path))
    # From 8.0 on "children" has the file itself once more: its name, its room.
    told = {key: value for key, value in info.items() if key not in ("filename", "actual-size", "children")}
    return told, json.loads(qemu_img("map", "--output=json", path))


@pytest.mark.parametrize("size", SIZES)
def test_an_empty_image_is_what_qemu_img_makes(size, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    make_empty(ours, size, OURSELVES)
    qemu_img("create", "-q", "-f", "qcow2", theirs, size)
    assert described(ours) == described(theirs)
    checked = json.loads(qemu_img("check", "--output=json", ours))
    assert {key: checked.get(key, 0) for key in ("corruptions", "leaks", "allocated-clusters")} == {
        "corruptions": 0,
        "leaks": 0,
        "allocated-clusters": 0,
    }
    assert ours.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("shape", ["raw", "qcow2"])
@pytest.mark.parametrize("size", [MiB, 40 * MiB + 512])
def test_an_overlay_is_what_qemu_img_makes(shape, size, tmp_path):
    below = tmp_path / "a disk: with, odd\nletters"
    qemu_img("create", "-q", "-f", shape, below, size)
    subprocess.run(["qemu-io", "-f", shape, "-c", "write -P 0x11 0 64k", str(below)], check=True, capture_output=True)
    below.chmod(0o640)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    make_overlay(ours, size, str(below), shape)
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-F", shape, "-b", below, theirs, size)
    assert described(ours) == described(theirs)
    qemu_img("compare", "-f", "qcow2", "-F", shape, ours, below)
    qemu_img("check", "-q", ours)
    assert ours.stat().st_mode & 0o777 == 0o640


def test_the_beginning_of_an_overlay_holds_nothing(tmp_path):
    below = tmp_path / "below.raw"
    below.write_bytes(bytes(MiB))
    path = tmp_path / "overlay"
    make_overlay(path, MiB, str(below), "raw")
    whole = path.read_bytes()
    for length in (0, 300, 65536, 65537, len(whole)):
        path.write_bytes(whole[:length])
        assert is_untouched(path), length
    for other in (whole + b"x", whole[:200] + b"x", whole[:65536] + b"x" * 512, b"QFI", b"raw"):
        path.write_bytes(other)
        assert not is_untouched(path)


def test_half_an_image_does_not_stay(tmp_path):
    """Where the file system is full, or a quota or a limit is met, as here."""
    script = f"""
import resource, signal
from pathlib import Path
from backupcore.errors import BackupError
from backupcore_libvirt.premade.image import make_empty
from backupcore_libvirt.scratch import Owner
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (70000, 70000))
try:
    make_empty(Path({str(tmp_path / "image")!r}), 1 << 30, Owner(0, 0))
except BackupError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_image_is_never_made_where_something_is(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("x")
    (tmp_path / "link").symlink_to(precious)
    for name in ("precious", "link"):
        with pytest.raises(BackupError, match="exists"):
            make_empty(tmp_path / name, MiB, OURSELVES)
    with pytest.raises(HypervisorError, match="1023"):
        make_overlay(tmp_path / "new", MiB, "/" + "x" * 1023, "raw")
    assert precious.read_text() == "x"
    assert not (tmp_path / "new").exists()


def test_scratch_files_are_there_before_the_instant_and_gone_after_it(lab, runs, monkeypatch, same, tmp_path):
    vm = lab.vm(["qcow2:16", "raw:8"])
    vm.domain.blockResize("vda", 16 * MiB + 512, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    vm.io("vda", "write -P 0x11 0 1M")
    truth = vm.copy_truth(tmp_path / "truth")
    seen: list[dict[str, int]] = []
    begin = LiveJob.begin

    def looking(job: LiveJob) -> object:
        files = sorted(job.folder.path.glob("*.scratch"))
        assert {file.stat().st_uid for file in files} == {vm.folder.stat().st_uid}
        found = {file.stem: json.loads(qemu_img("info", "--output=json", file)) for file in files}
        assert not any("backing-filename" in info for info in found.values())
        seen.append({disk: info["virtual-size"] for disk, info in found.items()})
        return begin(job)

    monkeypatch.setattr(LiveJob, "begin", looking)
    run = runs.run(vm)
    with runs.take(run) as taken:
        vm.io("vda", "write -P 0x77 0 1M")
        layer = runs.keep(taken, tmp_path / "layer")
        assert (runs.hypervisor.scratch / run.id / "vda.scratch").stat().st_blocks * 512 > MiB, "QEMU uses that one"
    same([layer], truth)
    assert seen == [{"vda": 16 * MiB + 512, "vdb": 8 * MiB}]
    assert list(runs.hypervisor.scratch.iterdir()) == []


def test_scratch_files_go_before_the_job_does(small, runs, monkeypatch):
    """AppArmor denies, and logs, that QEMU opens one again while the parts of the job end."""
    seen = []
    abort = Domain.abort_job

    def looking(domain: Domain) -> None:
        seen.append(sorted(path.name for path in (runs.hypervisor.scratch / run.id).iterdir()))
        abort(domain)

    monkeypatch.setattr(Domain, "abort_job", looking)
    run = runs.run(small)
    with runs.take(run):
        small.io("vda", "write -P 0x11 0 1M")
    assert seen == [[]]


def test_a_disk_resized_just_before_the_instant_fails_the_run_alone(lab, runs, monkeypatch):
    begin = LiveJob.begin

    def resizing(job: LiveJob) -> object:
        vm.domain.blockResize("vda", 20 * MiB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        return begin(job)

    vm = lab.vm(["qcow2:16"])
    with monkeypatch.context() as patched, pytest.raises(HypervisorError, match="size"):
        patched.setattr(LiveJob, "begin", resizing)
        with runs.take(runs.run(vm)):
            pass
    vm.untouched()
    assert list(runs.hypervisor.scratch.iterdir()) == []
    with runs.take(runs.run(vm)):
        pass


def test_an_overlay_of_a_disk_resized_just_before_the_instant_is_not_used(lab, runs, monkeypatch):
    begin = Overlays.begin

    def resizing(overlays: Overlays) -> object:
        assert len(list(vm.folder.glob("*.backupcore-*"))) == 1, "it is there before the instant"
        vm.domain.blockResize("vda", 20 * MiB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        return begin(overlays)

    vm = lab.vm(["raw:16"])
    with monkeypatch.context() as patched, pytest.raises(HypervisorError, match="has just been resized"):
        patched.setattr(Overlays, "begin", resizing)
        with runs.take(runs.run(vm, settings=SNAPSHOT)):
            pass
    assert not list(vm.folder.glob("*.backupcore-*")), "the unused overlay is gone"
    assert vm.domain.blockInfo("vda")[0] == 20 * MiB
    with runs.take(runs.run(vm, settings=SNAPSHOT)):
        assert vm.domain.blockInfo("vda")[0] == 20 * MiB


def test_overlays_of_a_run_killed_before_its_instant_go_with_its_release(lab, runs, caplog):
    vm = lab.vm(["raw:16", "qcow2:16"])
    dead = runs.run(vm, settings=SNAPSHOT)
    for disk, shape in (("vda", "raw"), ("vdb", "qcow2")):
        path = vm.disk(disk)
        make_overlay(path.with_name(f"{path.name}.backupcore-{dead.point}-{disk}.qcow2"), 16 * MiB, str(path), shape)
    with runs.context(dead) as ctx, caplog.at_level(logging.WARNING):
        runs.hypervisor.postbackup(dead, Outcome(state=RunState.FAILED), ctx)
    assert not list(vm.folder.glob("*.backupcore-*"))
    assert vm.active
