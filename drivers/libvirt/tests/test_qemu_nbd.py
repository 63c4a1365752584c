"""qemu-nbd for images that no VM has open."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import libvirt
import pytest

from backupcore.disk.nbd import ALLOCATION, DEPTH, Address, Client, ConnectionLost, NbdError
from backupcore.errors import Busy, HypervisorError
from backupcore_libvirt.qemu_nbd import QemuNbd
from backupcore_libvirt.release.servers import end_stray

MiB = 1 << 20


def qemu_img(*arguments: object) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


def qemu_io(path: Path, *commands: str) -> None:
    options = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *options, f"file:{path}"], check=True, capture_output=True)


@pytest.fixture
def image(qemu_tools: None, tmp_path: Path) -> Path:
    path = tmp_path / "odd, name:driver=raw,x.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    return path


def test_an_image_with_its_bitmaps_and_depths(image: Path, tmp_path: Path):
    qemu_io(image, "write -P 0x11 0 1M")
    qemu_img("bitmap", "--add", "-f", "qcow2", image, "b0")
    qemu_io(image, "write -P 0x22 2M 1M")
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", f"file:{image}", top)
    with QemuNbd(tmp_path / "s", image, "qcow2", bitmaps=["b0"]) as server:
        with Client(server.address, ["qemu:dirty-bitmap:b0"]) as client:
            assert client.read_only
            assert client.read(2 * MiB, 4) == b"\x22" * 4
            found = client.block_status(0, 8 * MiB)["qemu:dirty-bitmap:b0"]
            assert [entry for entry in found if entry[1]] == [(MiB, 1)]
        with Client(server.address), Client(server.address):
            pass  # several at once
    with pytest.raises(ConnectionLost):
        Client(server.address)
    with QemuNbd(tmp_path / "t", top, "qcow2", depth=True) as server, Client(server.address, [ALLOCATION, DEPTH]) as c:
        assert c.block_status(0, MiB)[DEPTH] == [(MiB, 2)]


def test_a_socket_that_somebody_else_has_put_in_its_place_is_not_read(image: Path, tmp_path: Path):
    """The folder of a run belongs to the user that every VM's QEMU runs as."""
    with QemuNbd(tmp_path / "s", image, "qcow2") as server, socket.socket(socket.AF_UNIX) as other:
        (tmp_path / "s").unlink()
        other.bind(str(tmp_path / "s"))
        other.listen()
        with pytest.raises(NbdError, match=f"is served by process {os.getpid()}"):
            Client(server.address, timeout=5)


def test_raw_is_never_taken_for_another_format(image: Path, tmp_path: Path):
    with QemuNbd(tmp_path / "s", image, "raw") as server, Client(server.address) as client:
        assert client.read(0, 4) == b"QFI\xfb"


def test_an_image_that_a_vm_has_open(lab, tmp_path: Path):
    vm = lab.vm()
    with pytest.raises(Busy, match='is open in another process: .*"write" lock') as refused:
        QemuNbd(tmp_path / "s", vm.disk("vda"), "qcow2").start()
    assert "started" in refused.value.hint
    vm.destroy()
    with QemuNbd(tmp_path / "s", vm.disk("vda"), "qcow2"), pytest.raises(libvirt.libvirtError, match="lock"):
        vm.start()
    vm.start()


def test_what_is_no_image_or_has_no_such_bitmap(image: Path, tmp_path: Path):
    with pytest.raises(HypervisorError, match="Bitmap 'b0' is not found"):
        QemuNbd(tmp_path / "s", image, "qcow2", bitmaps=["b0"]).start()
    (tmp_path / "text").write_bytes(b"no image" * 1000)
    with pytest.raises(HypervisorError, match=r"qemu-nbd cannot serve .*/text: .*not in qcow2 format"):
        QemuNbd(tmp_path / "s", tmp_path / "text", "qcow2").start()


def test_without_qemu_nbd_the_package_is_named(image: Path, tmp_path: Path, monkeypatch):
    empty = tmp_path / "bin"
    empty.mkdir()
    (empty / "setpriv").symlink_to("/usr/bin/setpriv")
    monkeypatch.setenv("PATH", str(empty))
    with pytest.raises(HypervisorError, match="qemu-nbd cannot be run") as refused:
        QemuNbd(tmp_path / "s", image, "qcow2").start()
    assert "qemu-utils" in refused.value.hint


SERVE = """
import sys, pathlib, threading
from backupcore_libvirt.qemu_nbd import QemuNbd
server = QemuNbd(pathlib.Path(sys.argv[1]), sys.argv[2], "qcow2")
thread = threading.Thread(target=server.start)  # its end must not be that of qemu-nbd
thread.start()
thread.join()
print(server._process.pid, flush=True)
sys.stdin.read()
"""


def test_it_dies_with_its_process_and_not_with_a_thread(image: Path, tmp_path: Path, wait_for):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tmp_path / "s"), str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    command = Path(f"/proc/{pid}/cmdline")
    assert b"qemu-nbd" in command.read_bytes()
    with Client(Address(str(tmp_path / "s"))) as client:
        assert client.size == 8 * MiB
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # One that has ended, and that nobody has asked for its end, has no command line any more.
    wait_for(lambda: not command.exists() or not command.read_bytes(), "the end of qemu-nbd")


def test_one_that_a_dead_run_has_left_is_ended_by_its_socket(image: Path, tmp_path: Path):
    here, elsewhere = tmp_path / "run", tmp_path / "run2"
    for folder in (here, elsewhere):
        folder.mkdir()
    with QemuNbd(here / "nbd.vda.sock", image, "qcow2"), QemuNbd(elsewhere / "nbd.vda.sock", image, "qcow2") as other:
        assert end_stray(here)
        assert not end_stray(here)
        with Client(other.address):
            pass
