"""A Debian host with its own kernel: the disk it boots from, as a user's is after the README's first commands.

The disk holds the release's kernel, AppArmor as Debian sets it up, and what the README's apt lines install. It is made
once and never written to: QEMU keeps a run's changes apart.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.hosts import readme
from lab.hosts.root import FOLDER, HostNotBuilt, changed, entering, remove_older, root
from lab.places import locked

_INSIDE = Path(__file__).with_name("inside")
_DISK_SIZE = "16G"  # sparse: what the tests need room for
# What a Debian machine has before it becomes a hypervisor. AppArmor comes with the kernel (it recommends it).
_MACHINE = ("apparmor", "e2fsprogs", "kmod", "linux-image-cloud-amd64", "python3", "udev")
_SYSTEMD = ("dbus", "systemd-sysv")


@dataclass(frozen=True)
class Host:
    """One host of the tests. `systemd`: whether it is process 1 there, or a script (inside/first)."""

    suite: str
    systemd: bool

    @property
    def name(self) -> str:
        return f"debian-{self.suite}"


HOSTS = (Host("bookworm", systemd=False), Host("trixie", systemd=True))


@dataclass(frozen=True)
class Built:
    """What a host boots from; `root` are the folders of the root that its disk was made of, for further programs."""

    kernel: Path
    initramfs: Path
    disk: Path
    root: tuple[Path, ...]


def build(host: Host) -> Built:
    """The host's disk, kernel and initramfs; made where they are missing. Raises `HostNotBuilt`."""
    base = root(host.suite, [*_MACHINE, *(_SYSTEMD if host.systemd else ())], purpose="host")
    packages = readme.first_backup().packages
    digest = hashlib.sha256(f"{base.name}\n{packages}\n{host}\n{_DISK_SIZE}\n".encode())
    # The rest of `inside` comes with each run.
    for file in (Path(__file__), _INSIDE / "first", _INSIDE / "tests.service"):
        digest.update(file.read_bytes())
    folder = FOLDER / f"host-{host.suite}-{digest.hexdigest()[:12]}"
    with locked(f"hosts-{host.suite}"):
        if not folder.exists():
            remove_older(folder)
            fresh = folder.with_name(f"{folder.name}.new")
            fresh.mkdir(parents=True)
            _install(host, base, fresh, packages)
            _make_disk(host, base, fresh)
            fresh.rename(folder)
    layers = (changed(folder), base)
    (kernel,) = (base / "boot").glob("vmlinuz-*")
    (initramfs,) = (base / "boot").glob("initrd.img-*")
    return Built(kernel, initramfs, folder / "disk.raw", layers)


def _install(host: Host, base: Path, folder: Path, packages: Sequence[str]) -> None:
    """Run the README's apt lines, as they are, and add what starts the tests."""
    sys.stderr.write(f"Installing the README's packages on {host.name}\n")
    script = [
        "set -eu",
        # A user answers "y"; debconf's questions have their defaults.
        "echo 'APT::Get::Assume-Yes \"true\";' > /etc/apt/apt.conf.d/90assume-yes",
        "export DEBIAN_FRONTEND=noninteractive",
        # Should the power fail now, the root is made anew.
        "echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/90unsafe",
        *packages,
        "apt-get clean",
        # What kept the daemons from starting while there was no machine; the network's settings were this machine's.
        "rm /usr/sbin/policy-rc.d /etc/apt/apt.conf.d/90assume-yes /etc/dpkg/dpkg.cfg.d/90unsafe",
        f"echo {host.name} > /etc/hostname",
        f"printf '127.0.0.1 localhost {host.name}\\n' > /etc/hosts",
        ": > /etc/resolv.conf",
        # The network "default" would want a bridge and dnsmasq; VMs of the tests have none.
        "rm -f /etc/libvirt/qemu/networks/autostart/*",
    ]
    done = subprocess.run(
        entering(base, folder, ["bash", "-c", "\n".join(script)], network=True),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise HostNotBuilt(f"The README's packages could not be installed on {host.name}:\n{done.stdout}{done.stderr}")
    own = changed(folder)
    (own / "usr/local/sbin").mkdir(parents=True, exist_ok=True)
    shutil.copy(_INSIDE / "first", own / "usr/local/sbin/init-of-the-tests")
    (own / "usr/local/sbin/init-of-the-tests").chmod(0o755)
    if host.systemd:
        units = own / "etc/systemd/system"
        (units / "multi-user.target.wants").mkdir(parents=True, exist_ok=True)
        shutil.copy(_INSIDE / "tests.service", units / "tests.service")
        (units / "multi-user.target.wants/tests.service").symlink_to("../tests.service")


def _make_disk(host: Host, base: Path, folder: Path) -> None:
    """An ext4 image of the root: its layers put together in a mount namespace of their own."""
    disk = folder / "disk.raw"
    disk.touch()
    subprocess.run(["truncate", "-s", _DISK_SIZE, str(disk)], check=True)
    whole = folder / "root"
    lower = f"{changed(folder)}:{base}"
    # No journal: a run is thrown away, and what it has to say comes out by other ways.
    script = 'mount -t overlay -o "lowerdir=$1" overlay "$2" && exec mkfs.ext4 -q -F -O ^has_journal -d "$2" "$3"'
    own = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", lower, str(whole), str(disk)]
    done = subprocess.run(own, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HostNotBuilt(f"The disk of {host.name} could not be made:\n{done.stderr}")
