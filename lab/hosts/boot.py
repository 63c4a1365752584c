"""Boot a host with what the tests need beside it, show what it says, and tell how it ended.

A second disk carries the project (a bare repository of HEAD), wheels, pytest and the guest's kernel; it is mounted at
/srv. There is no network. The host's own disk is as it was afterwards.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from lab.hosts import readme
from lab.hosts.host import Built, Host
from lab.hosts.root import FOLDER, Bind, HostNotBuilt, entering, layer, of_one_run, remove_older
from lab.hosts.wheels import wheels
from lab.places import ROOT, locked

_INSIDE = Path(__file__).with_name("inside")
# What the tests of the selection import, beside what the README installs.
_TOOLS = ("pytest", "pytest-timeout", "hypothesis", "cryptography")
_GUEST_SOURCES = (ROOT / "lab/kernel.py", ROOT / "lab/guest-init.sh")
_MEMORY_MIB = 3072
# Without what hardens a kernel and costs an emulated machine most; the tests ask for none of it. A program that lies
# elsewhere each time is translated anew each time: with norandmaps one starts in a tenth of the time.
_QUICK = "mitigations=off norandmaps init_on_alloc=0 hardened_usercopy=off randomize_kstack_offset=off preempt=none"


def run(host: Host, built: Built, names: Sequence[str], *, options: Sequence[str] = (), seconds: float) -> bool:
    """Boot the host, run these tests on it, and print what it says, each line after its name.

    True where all have passed. It is ended after `seconds`. Raises `HostNotBuilt` where what it needs cannot be made.
    """
    with of_one_run(host.suite) as folder:
        disk = _disk(host, built, folder, names, options)
        log = folder / "said"
        log.touch()
        started = time.monotonic()
        process = subprocess.Popen(
            _command(host, built, disk, folder), stdin=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(folder)}
        )
        try:
            with log.open(errors="replace") as said:
                while process.poll() is None and time.monotonic() - started < seconds:
                    _show(host, said.read())
                    time.sleep(0.5)
                _show(host, said.read())
        finally:
            process.kill()
            process.wait()
        result = _read(disk, "/tests/result").strip()
        _show(host, f"ended after {time.monotonic() - started:.0f} s: {_meaning(result)}\n")
        if result != "0":
            _keep(host, disk, folder)
        return result == "0"


def _command(host: Host, built: Built, disk: Path, folder: Path) -> list[str]:
    append = f"root=/dev/vda rw console=ttyS0 apparmor=1 security=apparmor log_buf_len=8M panic=-1 {_QUICK}"
    if host.systemd:
        append += " systemd.getty_auto=no"  # a login would hang up the line by which the tests speak
    else:
        append += " init=/usr/local/sbin/init-of-the-tests"
    drives = ((built.disk, "on"), (disk, "off"))
    return [
        *("setpriv", "--pdeathsig", "KILL"),  # should this process be killed, the host ends as well
        "qemu-system-x86_64",
        *("-name", host.name, "-machine", "q35", "-accel", "tcg,thread=multi"),
        # No feature of it taken away: without svm (QEMU 7.2), Linux shows each path as "xxx".
        *("-cpu", "max"),
        # One processor: the hosts run side by side, and with two each they would wait for one that the machine does not
        # run just now; a single one may trust its TSC, so that asking for the time is no call of the kernel.
        *("-m", str(_MEMORY_MIB), "-smp", "1", "-display", "none", "-no-reboot", "-nodefaults", "-net", "none"),
        *("-kernel", str(built.kernel), "-initrd", str(built.initramfs), "-append", append),
        *(
            part
            for file, snapshot in drives
            for part in ("-drive", f"file={file},format=raw,if=virtio,cache=unsafe,snapshot={snapshot}")
        ),
        *("-serial", f"file:{folder / 'console'}", "-device", "virtio-rng-pci"),
        *("-device", "virtio-serial-pci", "-chardev", f"file,id=said,path={folder / 'said'}"),
        *("-device", "virtconsole,chardev=said"),
    ]


def _disk(host: Host, built: Built, folder: Path, names: Sequence[str], options: Sequence[str]) -> Path:
    """The second disk."""
    whole = folder / "srv"
    tests = whole / "tests"
    tests.mkdir(parents=True)
    for name in ("init", "start"):
        shutil.copy(_INSIDE / name, tests / name)
    (tests / "install").write_text("\n".join(readme.first_backup().install) + "\n")
    (tests / "names").write_text("\n".join(names) + "\n")
    (tests / "options").write_text("\n".join(options) + "\n")
    _run(["git", "clone", "--quiet", "--bare", "--no-hardlinks", str(ROOT), str(whole / "vmkeep.git")])
    found = wheels(host.suite, built.root, purpose="host")
    aids = _aids(host, built, found)
    for name, source in (("wheels", found), ("tools", aids / "tools"), ("guest", aids / "guest")):
        _run(["cp", "-a", "--reflink=auto", str(source), str(whole / name)])
    disk = folder / "srv.raw"
    _run(["truncate", "-s", "4G", str(disk)])
    _run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", str(whole), str(disk)])
    shutil.rmtree(whole)
    return disk


def _aids(host: Host, built: Built, found: Path) -> Path:
    """A folder with tools/ (for PYTHONPATH) and guest/ (what `lab.kernel` makes, of this release's packages)."""
    digest = hashlib.sha256(f"{found.name}\n{_TOOLS}\n".encode())
    for file in _GUEST_SOURCES:
        digest.update(file.read_bytes())
    folder = FOLDER / f"aids-{host.suite}-{digest.hexdigest()[:12]}"
    with locked(f"hosts-aids-{host.suite}"):
        if folder.exists():
            return folder
        remove_older(folder)
        fresh = folder.with_name(f"{folder.name}.new")
        (fresh / "guest").mkdir(parents=True)
        (fresh / "tools").mkdir()
        install = f"python3 -m venv /tmp/v && /tmp/v/bin/pip install --quiet --no-index --find-links {found}"
        script = f"{install} --target {fresh}/tools {' '.join(_TOOLS)}"
        with layer() as own:
            binds = [Bind(found), Bind(fresh, writable=True)]
            _run(entering(built.root, own, ["sh", "-c", script], binds=binds))
        make = "from lab import kernel; kernel.files(); kernel.files(agent=True); kernel.firmware()"
        with layer() as own:
            binds = [Bind(ROOT / "lab", Path("/build/lab")), Bind(fresh / "guest", Path("/build/.lab"), writable=True)]
            command = ["sh", "-c", f"apt-get -q update && cd /build && python3 -c '{make}'"]
            _run(entering(built.root, own, command, binds=binds, network=True))
        fresh.rename(folder)
        return folder


def _read(disk: Path, path: str) -> str:
    """A file of an ext4 image; empty where there is none."""
    command = ["debugfs", "-R", f"cat {path}", str(disk)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stdout


def _keep(host: Host, disk: Path, folder: Path) -> None:
    """What tells why it failed, beyond what the tests have said: the console, the kernel's log."""
    kept = FOLDER / f"failed-{host.suite}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    shutil.copy(folder / "console", kept / "console")
    shutil.copy(folder / "said", kept / "said")
    (kept / "dmesg").write_text(_read(disk, "/tests/dmesg"))
    end = (kept / "console").read_text(errors="replace").splitlines()[-15:]
    _show(host, "the end of its console:\n" + "".join(f"  {line}\n" for line in end))
    _show(host, f"its logs: {kept}\n")


def _meaning(result: str) -> str:
    if result == "0":
        return "all tests passed"
    return "tests failed" if result else "it did not come to its end"


def _show(host: Host, text: str) -> None:
    for line in text.splitlines():
        print(f"[{host.name}] {line}", flush=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HostNotBuilt(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
