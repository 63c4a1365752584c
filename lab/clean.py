"""Remove all that the lab made (standard library only): `make clean-lab`.

Its VMs and their folder, what it fetched or built (roots and disks of hosts as well), .lab and .venv. System packages
stay: others may use them by now.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, before there is a .venv

from lab.leftovers import mounts
from lab.places import LAB, ROOT, recorded_vm_folder

_PYTHON = ROOT / ".venv/bin/python"
_URI = "qemu:///system" if os.geteuid() == 0 else "qemu:///session"


def main() -> None:
    folder = recorded_vm_folder()
    if folder is not None:
        if any(entry.is_dir() for entry in folder.iterdir()) and _PYTHON.exists():
            # VMs are left, so a run was killed. They can only be removed while a libvirtd answers.
            _run(str(_PYTHON), "-m", "lab.libvirtd")
        _remove_vms(folder)
    if _PYTHON.exists() and LAB.exists():
        _run(str(_PYTHON), "-m", "lab.libvirtd", "stop")
    for line in mounts(LAB, *([folder] if folder else [])):
        _run("fusermount3", "-u", "-z", line.removeprefix("mount "))
    for made in (folder, LAB, ROOT / ".venv"):
        if made is not None and made.exists():
            try:
                shutil.rmtree(made)
            except PermissionError as error:  # roots of other releases are made by root
                raise SystemExit(f"{error.filename} is not yours to remove: sudo make clean-lab") from None
            sys.stderr.write(f"removed {made}\n")


def _remove_vms(folder: Path) -> None:
    """Remove every VM that has a file in the lab's folder, whatever its name."""
    if shutil.which("virsh") is None:
        return
    for uuid in _run("virsh", "-q", "-c", _URI, "list", "--all", "--uuid").split():
        if f"'{folder}/" not in _run("virsh", "-q", "-c", _URI, "dumpxml", uuid):
            continue
        _run("virsh", "-q", "-c", _URI, "destroy", uuid)
        kept = ("--managed-save", "--snapshots-metadata", "--checkpoints-metadata", "--nvram")
        _run("virsh", "-q", "-c", _URI, "undefine", uuid, *kept)
        sys.stderr.write(f"removed VM {uuid}\n")


def _run(*command: str) -> str:
    """The output of a command; it may fail: what it should remove may be gone."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


if __name__ == "__main__":
    main()
