"""A small real Linux for the lab's guests, made of Debian packages that are fetched and unpacked, never installed.

All of it lies in .lab/guest: Debian's cloud kernel, busybox, and an initramfs that is written here. `files()` makes
what is missing, about 30 MB to fetch the first time.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lab.domain_xml import Firmware, Kernel
from lab.places import LAB, locked

_FOLDER = LAB / "guest"
_INIT = Path(__file__).with_name("guest-init.sh")
# What the guest needs; what a kernel has built in (ext4, in Debian's cloud kernel) has no file and is left out.
_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4")
AGENT_CHANNEL = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"


def files(*, agent: bool = False) -> Kernel:
    """The kernel and the initramfs of the writing guest; vda must hold ext4, a vdb gets raw writes.

    With `agent` it runs QEMU's guest agent, which answers where the VM has the channel `AGENT_CHANNEL`.
    """
    with locked("guest"):
        kernel = _FOLDER / "vmlinuz"
        if not kernel.exists():
            unpacked = fetched(_versioned_name("linux-image-cloud-amd64"))
            (image,) = (unpacked / "boot").glob("vmlinuz-*")
            _FOLDER.mkdir(exist_ok=True)
            shutil.rmtree(_FOLDER / "modules", ignore_errors=True)
            # Debian has moved /lib below /usr (13: in its packages as well).
            modules = next(path for path in (unpacked / "usr/lib/modules", unpacked / "lib/modules") if path.exists())
            shutil.move(modules, _FOLDER / "modules")
            shutil.move(image, kernel)
            shutil.rmtree(unpacked)  # 100 MB, of which 10 are used
        initramfs = _FOLDER / ("initramfs-agent.gz" if agent else "initramfs.gz")
        if not initramfs.exists() or initramfs.stat().st_mtime < max(
            _INIT.stat().st_mtime, Path(__file__).stat().st_mtime
        ):
            _write_initramfs(initramfs, _INIT, _agent() if agent else [])
        return Kernel(kernel, initramfs)


def running(init: Path, program: Path, initramfs: Path) -> Kernel:
    """The same kernel with another first program: `init`, a script for busybox, finds `program` in /bin.

    `initramfs` is the file to write; `program` must need no libraries.
    """
    kernel = files().image
    with locked("guest"):
        _write_initramfs(initramfs, init, [(f"bin/{program.name}", stat.S_IFREG | 0o755, program.read_bytes())])
    return Kernel(kernel, initramfs)


def firmware() -> Firmware:
    """UEFI firmware (Debian's ovmf)."""
    with locked("guest"):
        folder = LAB / "packages/ovmf/usr/share/OVMF"
        if not folder.exists():
            fetched("ovmf")
        return Firmware(folder / "OVMF_CODE_4M.fd", folder / "OVMF_VARS_4M.fd")


def busybox() -> Path:
    """The program busybox, which needs no libraries."""
    with locked("guest"):
        return _busybox()


def make_ext4(image: Path, size: int) -> None:
    """Make a raw image of `size` bytes with an empty ext4 in it; needs no root and no mount."""
    with image.open("wb") as file:
        file.truncate(size)
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")  # not on a user's PATH
    if mkfs is None:
        raise FileNotFoundError("mkfs.ext4 is missing: apt-get install e2fsprogs")
    subprocess.run([mkfs, "-q", "-F", str(image)], check=True, capture_output=True)


def fetched(package: str) -> Path:
    """Fetch a Debian package and unpack it below .lab/packages; the folder. Raises OSError where apt cannot."""
    folder = LAB / "packages" / package
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if os.geteuid() == 0:
        # apt would fetch as its own user _apt, which cannot enter a closed checkout, and warns about it.
        command = [*_apt("apt-get"), "-q", "-o", "APT::Sandbox::User=root", "download", package]
    else:
        command = [*_apt("apt-get"), "-q", "download", package]
    _output(*command, folder=folder)
    (archive,) = folder.glob("*.deb")
    _output("dpkg-deb", "-x", archive.name, ".", folder=folder)
    archive.unlink()
    return folder


def _busybox() -> Path:
    package = LAB / "packages/busybox-static"
    if not package.exists():
        fetched("busybox-static")
    return next(path for path in (package / "usr/bin/busybox", package / "bin/busybox") if path.exists())


def _versioned_name(meta_package: str) -> str:
    """The package that holds the files: a meta package only depends on it."""
    answer = _output(*_apt("apt-cache"), "depends", meta_package, folder=LAB)
    found = re.search(r"Depends: (\S+)", answer)
    if found is None:
        raise OSError(f"apt knows no {meta_package}:\n{answer}")
    return found[1]


def _apt(program: str) -> list[str]:
    """apt with the host's package lists or, where the host has none, with lists of our own in .lab/apt."""
    known = subprocess.run(["apt-cache", "show", "busybox-static"], capture_output=True, check=False)
    if known.returncode == 0:
        return [program]
    own = LAB / "apt"
    options = ["-o", f"Dir::State::lists={own / 'lists'}", "-o", f"Dir::Cache={own / 'cache'}"]
    if not own.exists():
        (own / "lists/partial").mkdir(parents=True)
        (own / "cache/archives/partial").mkdir(parents=True)
        _output("apt-get", *options, "-q", "-o", "APT::Sandbox::User=root", "update", folder=LAB)
    return [program, *options]


def _agent() -> list[tuple[str, int, bytes]]:
    """qemu-ga and the libraries that it loads; those are the host's own, which QEMU itself depends on."""
    program = LAB / "packages/qemu-guest-agent/usr/sbin/qemu-ga"
    if not program.exists():
        fetched("qemu-guest-agent")
    listed = _output("ldd", str(program), folder=LAB)
    if "not found" in listed:
        raise OSError(f"qemu-ga needs libraries that are not here:\n{listed}")
    libraries = re.findall(r"(/\S+) \(0x", listed)
    folders = {str(folder) for library in libraries for folder in Path(library).parents} - {"/"}
    return [
        *((folder[1:], stat.S_IFDIR | 0o755, b"") for folder in sorted(folders)),
        *((library[1:], stat.S_IFREG | 0o755, Path(library).read_bytes()) for library in libraries),
        ("bin/qemu-ga", stat.S_IFREG | 0o755, program.read_bytes()),
    ]


def _write_initramfs(target: Path, init: Path, more: list[tuple[str, int, bytes]]) -> None:
    busybox = _busybox()
    entries: list[tuple[str, int, bytes]] = [
        (folder, stat.S_IFDIR | 0o755, b"") for folder in ("bin", "dev", "proc", "sys", "tmp", "disk", "modules")
    ]
    entries.append(("init", stat.S_IFREG | 0o755, init.read_bytes()))
    entries.append(("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()))
    entries += more
    modules = _in_loading_order(_MODULES)
    entries += [(f"modules/{_name(file)}.ko", stat.S_IFREG | 0o644, _content(file)) for file in modules]
    entries.append(("modules/order", stat.S_IFREG | 0o644, "".join(f"{_name(file)}.ko\n" for file in modules).encode()))
    fresh = target.with_suffix(".new")
    with gzip.open(fresh, "wb", compresslevel=6) as archive:
        for part in _cpio(entries):
            archive.write(part)
    fresh.rename(target)


def _in_loading_order(names: tuple[str, ...]) -> list[Path]:
    """The files of these modules, each after those that it needs (insmod, unlike modprobe, does not look)."""
    files = {_name(module): module for module in (_FOLDER / "modules").rglob("*.ko*")}
    order: list[Path] = []

    def add(name: str) -> None:
        file = files.get(name)
        if file is None or file in order:
            return
        needed = re.search(rb"\0depends=([^\0]*)\0", _content(file))  # of the section .modinfo
        for other in needed[1].decode().split(",") if needed else ():
            add(other)
        order.append(file)

    for name in names:
        add(name)
    return order


def _name(module: Path) -> str:
    return module.name.partition(".ko")[0]


def _content(module: Path) -> bytes:
    """A module as insmod takes it: Debian 13 packs them, and busybox does not unpack."""
    return lzma.decompress(module.read_bytes()) if module.suffix == ".xz" else module.read_bytes()


def _cpio(entries: list[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """A cpio archive in the "newc" form that Linux unpacks: (path, mode, content) of each file or folder.

    Form: Documentation/driver-api/early-userspace/buffer-format.rst of the Linux sources; 13 numbers of 8 hexadecimal
    digits, the name and the content padded to 4 bytes each.
    """
    for number, (path, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        name = path.encode() + b"\0"
        links = 1
        fields = (number, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
        yield head + b"\0" * (-len(head) % 4)
        yield content + b"\0" * (-len(content) % 4)


def _output(*command: str, folder: Path) -> str:
    outcome = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        raise OSError(f"{' '.join(command)}: {outcome.stderr.strip()}")
    return outcome.stdout
