"""Set up this checkout on a bare Debian: system packages, .venv, this repository's packages (standard library only).

    python3 lab/setup.py        what every make target runs first; well under a second when nothing is missing
    python3 lab/setup.py bench  with the packages that only `make bench` needs
    python3 lab/setup.py hosts  with those of `make test-hosts`

Missing system packages are named before anything is installed: on a terminal you are asked, YES=1 answers yes, CI=true
never asks, and without any of these the command to run is printed and the exit code is 1. Nothing else of the host is
changed: the rest lies in .venv and .lab of the checkout.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "set-up-from"
# name, extras; a folder is installed once it has a pyproject.toml. The core first: the others need it.
PACKAGES = (
    (".", "fileview"),
    ("drivers/libvirt", ""),
    ("drivers/restic", ""),
    ("drivers/s3", ""),
    ("drivers/rsync", ""),
    ("vmkeep", ""),
)
SYSTEM_PACKAGES = (
    "e2fsprogs",  # mkfs.ext4 for the guest's disk
    "fuse3",
    "gcc",  # gcc, headers, pkg-config and libvirt-dev: libvirt-python comes as source
    "libc6-dev",
    "libvirt-clients",
    "libvirt-daemon-system",
    "libvirt-dev",
    "openssh-client",
    "pkg-config",
    "qemu-block-extra",
    "qemu-system-x86",
    "qemu-utils",
    "restic",
    "rsync",
    "swtpm",  # the TPM of a guest, which libvirt starts
    "swtpm-tools",
)
# For `make bench` alone: what our work is measured against.
BENCH_PACKAGES = (
    "libnbd-bin",  # nbdcopy
    "virtnbdbackup",
)
# For `make test-hosts` alone: what builds and boots the other hosts.
HOST_PACKAGES = (
    "git",
    "mmdebstrap",
)
# Debian splits these from its python3; other builds of Python bring them along.
DEBIAN_PYTHON_PACKAGES = ("python3-dev", "python3-venv")


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def missing_packages() -> list[str]:
    """The system packages that dpkg does not report as installed."""
    asked = sys.argv[1:]
    wanted = [
        *SYSTEM_PACKAGES,
        *(BENCH_PACKAGES if "bench" in asked else ()),
        *(HOST_PACKAGES if "hosts" in asked else ()),
    ]
    if Path(sys.executable).resolve().parent == Path("/usr/bin"):
        wanted += DEBIAN_PYTHON_PACKAGES
    query = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package}\n", *wanted],
        capture_output=True,
        text=True,
        check=False,  # exits 1 where a package is unknown to dpkg, which is the answer asked for
    )
    installed = {line.split()[1] for line in query.stdout.splitlines() if line.startswith("installed ")}
    return sorted(set(wanted) - installed)


def allowed(command: str) -> bool:
    """Whether the user agrees to install; raises SystemExit where nobody can be asked."""
    if os.environ.get("CI") == "true" or os.environ.get("YES") == "1":
        return True
    if sys.stdin.isatty() and sys.stderr.isatty():
        sys.stderr.write(f"Install them now with '{command}'? [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    raise SystemExit(f"Install them with:  {command}\nor answer yes beforehand:  YES=1 make ...")


def install_system_packages(names: list[str]) -> None:
    """Name what is missing and install it, as root or with sudo."""
    install = ["apt-get", "install", "-y", "--no-install-recommends", *names]
    as_root = os.geteuid() == 0
    say("These system packages are missing: " + " ".join(names))
    if not as_root and shutil.which("sudo") is None:
        raise SystemExit("Have them installed by root:  " + shlex.join(install))
    prefix = [] if as_root else ["sudo"] if sys.stdin.isatty() else ["sudo", "-n"]
    if not allowed(shlex.join([*prefix, *install])):
        raise SystemExit("Nothing was installed.")
    environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
    # A fresh image has no package lists, and old lists name files that the mirror has dropped: both are cured by an
    # update, which is left out where it is not needed.
    if any("Candidate: (none)" in policy(name) or not policy(name) for name in names):
        subprocess.run([*prefix, "apt-get", "update"], check=True)
    elif subprocess.run([*prefix, *environment, *install], check=False).returncode == 0:
        return
    else:
        subprocess.run([*prefix, "apt-get", "update"], check=True)
    if subprocess.run([*prefix, *environment, *install], check=False).returncode != 0:
        raise SystemExit("apt-get could not install them; its own words are above.")


def policy(name: str) -> str:
    """What apt knows of a package; empty when it knows nothing."""
    return subprocess.run(["apt-cache", "policy", name], capture_output=True, text=True, check=False).stdout


def present_packages() -> list[tuple[Path, str]]:
    return [(ROOT / folder, extras) for folder, extras in PACKAGES if (ROOT / folder / "pyproject.toml").exists()]


def fingerprint() -> str:
    """Changes with all that .venv was made from, so that the second run has nothing to do."""
    digest = hashlib.sha256(f"{sys.version}\n{Path(sys.executable).resolve()}\n{ROOT}\n".encode())
    files = [folder / "pyproject.toml" for folder, _ in present_packages()]
    for file in (*files, ROOT / "constraints.txt", ROOT / "lab/requirements.txt"):
        digest.update(f"{file}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def make_venv() -> None:
    """Make .venv anew where its Python has changed or moved; install tools and packages, ours editable."""
    say("Setting up .venv")
    python = VENV / "bin/python"
    usable = (
        python.exists()
        and subprocess.run([python, "-m", "pip", "-V"], capture_output=True, check=False).returncode == 0
    )
    if not usable or python.resolve() != Path(sys.executable).resolve():
        shutil.rmtree(VENV, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    pip: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        ROOT / "constraints.txt",
    ]
    subprocess.run([*pip, "-r", ROOT / "lab/requirements.txt"], check=True)
    # Without build isolation the build backend of the venv is used: nothing is fetched to build our own packages.
    editable = [
        part
        for folder, extras in present_packages()
        for part in ("-e", f"{folder}[{extras}]" if extras else f"{folder}")
    ]
    subprocess.run([*pip, "--no-build-isolation", *editable], check=True)


def main() -> None:
    """Bring the checkout up to date; several runs at once wait for each other."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is what an older python3 meets first
        raise SystemExit(
            f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=..."
        )
    if not Path("/etc/debian_version").exists():
        raise SystemExit("make sets up Debian machines only; CONTRIBUTING.md says what is needed elsewhere.")
    missing = missing_packages()
    if missing:
        install_system_packages(missing)
    (ROOT / ".lab").mkdir(exist_ok=True)
    with (ROOT / ".lab/setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mark = fingerprint()
        if not STAMP.exists() or STAMP.read_text() != mark:
            make_venv()
            STAMP.write_text(mark)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"Set-up failed: {shlex.join(str(part) for part in error.cmd)} ended with {error.returncode}"
        ) from None
