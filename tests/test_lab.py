"""The lab itself: what the tests of VMs stand on has to be right before they can be believed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import kernel, leftovers, order, quick_repository
from lab.domain_xml import DiskSpec, Kernel
from lab.fixtures import MakeVM
from lab.vm import VM, same

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20

pytest_plugins = ["pytester"]


def test_a_vm_without_an_os_is_written_to_through_its_own_device(make_vm: MakeVM, tmp_path: Path) -> None:
    vm = make_vm(
        [
            DiskSpec(target="vda", size=16 * MIB),
            DiskSpec(target="sda", size=3 * MIB + 512, format="raw", bus="sata"),
            DiskSpec(target="sdb", size=MIB, bus="scsi"),
        ]
    )
    expected = tmp_path / "expected.raw"
    for target in vm.targets():
        vm.io(target, "write -P 0x55 64k 128k", "write -z 64k 4k", "read -P 0x55 128k 64k", "flush")
    truth = vm.copy_truth(tmp_path / "truth")
    for target, copy in truth.items():
        expected.write_bytes(bytes(64 << 10) + bytes(4 << 10) + b"\x55" * (124 << 10))
        os.truncate(expected, copy.stat().st_size)
        assert copy.read_bytes() == expected.read_bytes(), target
    vm.io("vda", "write -P 1 0 512", "flush")  # the image's tables stay in QEMU until then
    assert not same(truth["vda"], vm.disk("vda"))


@pytest.mark.parametrize(
    "command",
    ["write -P 1 16M 1M", "wrte 0 1", "read -P 1 0 64k", "write 0", "write -P 1 0 banana"],
)
def test_a_qemu_io_command_that_fails_is_an_error(shared_vm: VM, command: str) -> None:
    with pytest.raises(OSError, match=re.escape(command)):
        shared_vm.io("vda", command)


def test_an_unknown_disk_is_named(shared_vm: VM) -> None:
    with pytest.raises(KeyError, match="vdz"):
        shared_vm.io("vdz", "write 0 512")


@pytest.fixture(scope="module")
def shared_vm(libvirt_uri: str, qemu_tools: None, vm_prefix: str) -> Iterator[VM]:
    with VM.create(f"{vm_prefix}shared", [DiskSpec(target="vda", size=16 * MIB)]) as vm:
        vm.start()
        yield vm


def test_the_guest_boots_and_keeps_writing(make_vm: MakeVM, guest_kernel: Kernel, tmp_path: Path) -> None:
    kernel.make_ext4(tmp_path / "ext4.raw", 64 * MIB)
    vm = make_vm(
        [
            DiskSpec(target="vda", size=64 * MIB, content=tmp_path / "ext4.raw"),
            DiskSpec(target="vdb", size=16 * MIB, format="raw"),
        ],
        label="guest",
        kernel=guest_kernel,
        memory_mib=192,
    )
    vm.wait_for_console("lab: guest is writing")
    vm.wait_for_console(r"lab: wrote \d+")
    first = vm.copy_truth(tmp_path / "first")
    seen = len(vm.console())
    vm.wait_for_console(rf"(?s).{{{seen}}}.*lab: wrote \d+")
    vm.domain.suspend()
    second = vm.copy_disks(tmp_path / "second")
    vm.destroy()
    for target in ("vda", "vdb"):
        assert same(second[target], vm.disk(target)), f"{target}: the copy of the suspended VM differs from its disk"
        assert not same(first[target], second[target]), f"the guest does not write to {target}"
    assert "cannot" not in vm.console()
    check = ["/sbin/e2fsck", "-f", "-p", str(second["vda"])]
    assert subprocess.run(check, capture_output=True, check=False).returncode in (0, 1)  # 1: the journal was replayed


def test_a_vm_and_its_files_are_removed_with_checkpoint_and_nvram(libvirt_uri: str, vm_prefix: str) -> None:
    firmware = kernel.firmware()
    with VM.create(f"{vm_prefix}gone", [DiskSpec(target="vda", size=MIB)], firmware=firmware) as vm:
        vm.start()
        vm.domain.checkpointCreateXML("<domaincheckpoint><name>one</name></domaincheckpoint>")
        folder = vm.folder
        assert (folder / "nvram.fd").exists()
        assert leftovers.domains(libvirt_uri, vm.name) == [f"VM {vm.name}"]
        name = vm.name
    assert leftovers.domains(libvirt_uri, name) == []
    assert not folder.exists()


def test_the_folder_for_vms_is_closed_to_others(vm_folder: Path) -> None:
    assert vm_folder.stat().st_mode & 0o077 == 0
    assert vm_folder.parent.stat().st_mode & 0o077 == 0


def test_a_process_that_detached_is_found(tmp_path: Path) -> None:
    marker = f"{leftovers.MARKER}=other"
    code = "import sys; print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, leftovers.MARKER: "other"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        assert [line.split(":")[0] for line in leftovers.processes(marker)] == [f"process {child.pid}"]
        child.communicate()
    assert leftovers.processes(marker) == []


def test_a_skip_is_a_failure_in_ci_only(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makeconftest("from lab.fixtures import pytest_runtest_makereport, pytest_make_collect_report")
    pytester.makepyfile(
        test_one="import pytest\ndef test_one(): pytest.skip('no hypervisor')",
        test_two="import pytest\npytest.skip('no libvirt', allow_module_level=True)",
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CI", "true")
    outcome = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--continue-on-collection-errors")
    assert outcome.ret != 0
    outcome.stdout.fnmatch_lines(["*CI=true*no hypervisor*"])
    outcome.stdout.fnmatch_lines(["*CI=true*no libvirt*"])
    monkeypatch.setenv("CI", "")
    outcome = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--continue-on-collection-errors")
    outcome.assert_outcomes(skipped=2)


def set_up(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the set-up where dpkg knows no package, without a terminal; apt-get and sudo only say what they were told."""
    for program, body in {
        "dpkg-query": "exit 1",
        "apt-get": 'echo "apt-get $@" >> "$LOG"; [ "$1" = update ]',
        "apt-cache": "echo '  Candidate: 1.0'",
    }.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / program).chmod(0o755)
    return subprocess.run(
        [sys.executable, str(ROOT / "lab/setup.py")],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_setup_names_what_is_missing_and_installs_nothing_unasked(tmp_path: Path) -> None:
    outcome = set_up(tmp_path)
    assert outcome.returncode == 1
    assert "libvirt-daemon-system" in outcome.stderr
    assert "apt-get install -y --no-install-recommends" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("environment", [{"CI": "true"}, {"YES": "1"}])
def test_setup_installs_when_told_to(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "sudo").write_text('#!/bin/sh\n[ "$1" = -n ] && shift\nexec "$@"\n')
    (tmp_path / "sudo").chmod(0o755)
    outcome = set_up(tmp_path, **environment)
    assert outcome.returncode == 1  # the apt-get of this test installs nothing
    assert "These system packages are missing: " in outcome.stderr
    calls = (tmp_path / "log").read_text().splitlines()
    assert calls[0].startswith("apt-get install -y --no-install-recommends ")
    assert calls[1] == "apt-get update"  # old package lists are the usual cause
    assert calls[2] == calls[0]


def test_the_files_that_go_first_are_there_and_named_once() -> None:
    named = order.longest()
    assert len(set(named)) == len(named)
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("exchanged", [False, True], ids=["made", "exchanged"])
def test_restic_opens_a_repository_with_a_quick_key(
    require_programs: Callable[..., None], tmp_path: Path, exchanged: bool
) -> None:
    require_programs("restic")
    place, password = tmp_path / "repository", tmp_path / "password"
    password.write_text("correct horse\n")
    restic = ["restic", "--repo", place, "--password-file", password, "--no-cache"]
    if exchanged:
        subprocess.run([*restic, "init"], check=True, capture_output=True)
        quick_repository.quicken(place, "correct horse")
    else:
        quick_repository.make(place, "correct horse")
    (key,) = (place / "keys").iterdir()
    assert '"N": 128' in key.read_text()
    subprocess.run([*restic, "backup", password], check=True, capture_output=True)
    subprocess.run([*restic, "check", "--read-data"], check=True, capture_output=True)
    password.write_text("another\n")
    assert subprocess.run([*restic, "snapshots"], check=False, capture_output=True).returncode != 0
