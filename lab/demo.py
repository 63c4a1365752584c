"""The demo: back up a running Linux guest three times, restore each backup, compare it with the truth.

`make demo` runs it. Everything lies in .lab and in the lab's folder for VMs, and is removed at the end; with --keep the
restic repository, the configuration and the restored disks stay, to be looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lab import kernel, libvirtd
from lab.domain_xml import DiskSpec
from lab.places import LAB, ROOT
from lab.truth import FOLDER
from lab.vm import VM, same

MIB = 1 << 20
BACKUPS = 3
# How often the guest writes between two backups: some 4 s, 5 MiB of ext4 and 2 MiB of the second disk.
WRITES_BETWEEN = 40


class Demo:
    """One run of the demo, with its configuration and repository in `folder` and QEMU's files in `vm_folder`."""

    def __init__(self, uri: str, vm: VM, folder: Path, vm_folder: Path) -> None:
        self.vm = vm
        self.folder = folder
        # vmkeep has to find the plugin of the lab, also where this repository is not installed editable.
        found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.environment = {**os.environ, FOLDER: str(folder / "truth"), "PYTHONPATH": found}
        self.config = folder / "config.toml"
        password = folder / "password"
        password.touch(mode=0o600)
        password.write_text(secrets.token_urlsafe() + "\n")
        self.config.write_text(
            f'[host]\nuri = "{uri}"\nstate = "{vm_folder}/state"\nscratch = "{vm_folder}/scratch"\n'
            'plugins = ["lab.truth:Truth"]\n\n'
            f'[datastores.demo]\ndriver = "restic"\nrepository = "{folder}/repository"\n'
            f'password_file = "{password}"\n'
        )

    def vmkeep(self, *arguments: str) -> Any:
        """Run vmkeep; its progress goes to the terminal, its --json answer is returned."""
        answer = subprocess.run(
            [*self._command(), *arguments, "--json"], env=self.environment, stdout=subprocess.PIPE, check=True
        )
        return json.loads(answer.stdout)

    def table(self, *arguments: str) -> None:
        """Run vmkeep and let it print."""
        sys.stdout.flush()
        subprocess.run([*self._command(), *arguments], env=self.environment, check=True)

    def _command(self) -> list[str]:
        return [str(Path(sys.executable).with_name("vmkeep")), "--config", str(self.config)]

    def back_up(self, number: int) -> dict[str, Any]:
        """Take one backup while the guest writes, and say what it cost."""
        kind = "full" if number == 0 else "increment"
        step(f"Backup {number}: {kind} of the running guest")
        taken: dict[str, Any] = self.vmkeep("backup", self.vm.name)
        stored = "" if taken["stored"] is None else f", {size(taken['stored'])} new in the repository"
        note(
            f"{taken['type'].lower()}, source {taken['source'][:8]}: {size(taken['size'])}, read {size(taken['read'])}"
            f"{stored}, guest frozen {taken['frozen_seconds']:.2f} s, {taken['seconds']:.1f} s in all"
        )
        return taken

    def restore(self, taken: dict[str, Any]) -> bool:
        """Restore one increment and compare every disk with the copy that QEMU's tools made at its instant."""
        target = self.folder / f"restored-{taken['increment']}"
        target.mkdir()
        started = time.monotonic()
        restored = self.vmkeep(
            "restore", str(taken["image"]), "--increment", str(taken["increment"]), "--to", str(target)
        )
        seconds = time.monotonic() - started
        equal = True
        for disk in restored["disks"]:
            truth = self.folder / "truth" / taken["point"] / f"{disk['id']}.raw"
            # Equal lengths as well: qemu-img compare takes a missing tail for zeroes.
            identical = virtual_size(Path(disk["path"])) == truth.stat().st_size and same(Path(disk["path"]), truth)
            note(f"increment {taken['increment']}, {disk['id']}: {'equal to the truth' if identical else 'DIFFERENT'}")
            equal = equal and identical
        note(f"restored and compared in {seconds:.1f} s")
        return equal and len(restored["disks"]) == len(self.vm.targets())


def run(uri: str, folder: Path) -> bool:
    """The whole demo; True where every restored disk equals the truth."""
    vm_folder = Path(tempfile.mkdtemp(prefix="demo-", dir=libvirtd.folder_for_vms()))
    try:
        if os.geteuid() == 0:
            owner = libvirtd.folder_for_vms().stat()
            os.chown(vm_folder, owner.st_uid, owner.st_gid)
        step("Booting a small Linux that writes to its ext4 disk and to a second disk")
        ext4 = folder / "ext4.raw"
        kernel.make_ext4(ext4, 256 * MIB)
        disks = [
            DiskSpec(target="vda", size=512 * MIB, content=ext4),
            DiskSpec(target="vdb", size=128 * MIB),
        ]
        with VM.create(f"demo-{os.getpid()}", disks, folder=vm_folder, kernel=kernel.files(), memory_mib=192) as vm:
            vm.start()
            vm.wait_for_console("lab: guest is writing")
            demo = Demo(uri, vm, folder, vm_folder)
            taken = []
            for number in range(BACKUPS):
                _let_it_write(vm)
                taken.append(demo.back_up(number))
            _let_it_write(vm)  # it goes on: no backup has hurt it
            step("Restoring each, and comparing with copies that QEMU's own tools made at the same instants")
            equal = [demo.restore(one) for one in taken]
            step("The image and its increments")
            demo.table("image", "show", str(taken[0]["image"]))
            _account(taken)
            return all(equal) and [one["type"] for one in taken] == ["FULL", "INCREMENT", "INCREMENT"]
    finally:
        shutil.rmtree(vm_folder, ignore_errors=True)


def _let_it_write(vm: VM) -> None:
    seen = vm.console().count("lab: wrote")
    vm.wait_for_console(rf"(?s)(?:lab: wrote.*?){{{seen + WRITES_BETWEEN // 10}}}")


def _account(taken: list[dict[str, Any]]) -> None:
    print(
        f"\n{len(taken)} backups: {size(sum(one['size'] for one in taken))} kept, "
        f"{size(sum(one['read'] for one in taken))} read from the disks, {sum(one['seconds'] for one in taken):.1f} s; "
        f"they froze the guest for {sum(one['frozen_seconds'] for one in taken):.2f} s in all.\n"
        "(The consistency is 'paused' since the truth plugin holds the guest still while QEMU's tools copy its disks.)"
    )


def virtual_size(image: Path) -> int:
    """The size of the disk in an image, in bytes."""
    info = subprocess.run(["qemu-img", "info", "--output=json", str(image)], stdout=subprocess.PIPE, check=True)
    return int(json.loads(info.stdout)["virtual-size"])


def size(count: int) -> str:
    return f"{count / MIB:.1f} MiB"


def step(text: str) -> None:
    print(f"\n== {text}", flush=True)


def note(text: str) -> None:
    print(f"   {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the repository and the restored disks in .lab")
    keep = parser.parse_args().keep
    LAB.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="demo-", dir=LAB))
    try:
        with libvirtd.running() as uri:
            equal = run(uri, folder)
    except subprocess.CalledProcessError as error:
        print(f"\nThe demo failed: {' '.join(error.cmd)} ended with {error.returncode}", file=sys.stderr)
        return 1
    except (libvirtd.LibvirtMissing, OSError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    finally:
        if keep:
            print(f"\nKept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print("\nEvery restored disk equals what the guest held." if equal else "\nA RESTORED DISK DIFFERS FROM THE TRUTH.")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
