"""What is done to the files of the VM's disks behind everybody's back.

Whatever is in them at the next backup is what that one has to hold: as an increment, or whole with the reason.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from xml.etree import ElementTree

import libvirt

from lab.host import size_of, wait_until
from tests.random_life.owner import Owner
from tests.random_life.world import NotNow, World


class Files:
    """Its deeds are drawn as often as `deeds` says, against all others'."""

    def __init__(self, world: World, owner: Owner) -> None:
        self.world = world
        self.owner = owner
        self.deeds: dict[Callable[[], None], int] = {
            self.exchange: 2,
            self.copy: 2,
            self.roll_back: 2,
            self.shrink_and_regrow: 3,
            self.snapshot: 3,
            self.commit: 3,
            self.write_below: 2,
            self.rebase: 2,
        }

    def exchange(self) -> None:
        """The files of two disks change places."""
        one, other = self._two()
        aside = one.with_name("aside")
        one.rename(aside)
        other.rename(one)
        aside.rename(other)
        self._doubt(f"{one.name} and {other.name} exchanged")

    def copy(self) -> None:
        """One disk's file is copied over another's."""
        one, other = self._two()
        self._replace(one, other)
        self._doubt(f"{one.name} copied over {other.name}")

    def roll_back(self) -> None:
        """A disk's file is kept, and put back later."""
        self._off()
        kept = sorted(self.world.folder.glob("kept-*"))
        if not kept or self.world.choice.random() < 0.5:
            path = self.world.choice.choice(self._own())
            shutil.copy2(path, path.with_name(f"kept-{path.name}"))
            self.world.say(f"keep {path.name}")
            return
        copy = self.world.choice.choice(kept)
        path = copy.with_name(copy.name.removeprefix("kept-"))
        if path not in self._own():
            raise NotNow
        self._replace(copy, path)
        self._doubt(f"{path.name} put back")

    def shrink_and_regrow(self) -> None:
        """To the size that it had, with its room allocated or not, and much of its end written anew."""
        self._off()
        world = self.world
        disk = world.choice.choice(world.vm.targets())
        size = world.size(disk)
        low = size // 2 // 65536 * 65536
        if self._below(disk):
            raise NotNow  # qemu-img refuses to grow an image over a base that is larger
        preallocation = world.choice.choice(["off", "metadata", "full"])
        self.owner.resize_file(disk, low)
        self.owner.resize_file(disk, size, "--preallocation", preallocation)
        for at in range(low, size - 65536, 2 * 65536):
            if world.choice.random() < 0.5:
                pattern = world.choice.randrange(1, 256)
                world.tool("qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {at} 64k", str(world.vm.disk(disk)))
        self._doubt(f"{disk} to {low} and back, preallocation {preallocation}")

    def snapshot(self) -> None:
        """Somebody's own external snapshot, of a VM that runs or not."""
        world = self.world
        if world.vm.domain.hasManagedSaveImage() or (world.vm.active and world.any_job()):
            raise NotNow
        disk = world.choice.choice(world.vm.targets())
        if world.temporary and "backupcore" in world.vm.disk(disk).name:
            raise NotNow  # while it runs it can neither have a job, which would kill it, nor another overlay of ours
        if len(self.world.files(disk)) > 3:
            raise NotNow
        path = world.folder / f"{disk}.theirs-{next(world.numbers)}.qcow2"
        if world.vm.active:
            others = "".join(f"<disk name='{one}' snapshot='no'/>" for one in world.vm.targets() if one != disk)
            one = f"<disk name='{disk}' snapshot='external'><source file='{path}'/></disk>"
            flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
            world.vm.domain.snapshotCreateXML(f"<domainsnapshot><disks>{one}{others}</disks></domainsnapshot>", flags)
        else:  # libvirt refuses it while there are checkpoints
            now = world.vm.disk(disk)
            world.tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(now), str(path))
            shutil.chown(path, now.stat().st_uid, now.stat().st_gid)
            self._define({now: path})
        self._doubt(f"{disk} now on {path.name}")

    def commit(self) -> None:
        """The file that a disk is on is merged into the one below, whoever made it: an overlay of ours, or theirs."""
        world = self.world
        disk = world.choice.choice(world.vm.targets())
        below = self._below(disk)
        if below is None or world.vm.domain.hasManagedSaveImage():
            raise NotNow
        path = world.vm.disk(disk)
        if world.vm.active:
            if world.any_job() or world.suspended:
                raise NotNow
            flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
            world.vm.domain.blockCommit(disk, str(below), None, 0, flags)
            now = world.vm.domain.XMLDesc
            wait_until(lambda: "ready='yes'" in now() or "<mirror" not in now(), "the commit")
            if "<mirror" not in now():
                world.say(f"{disk}: QEMU gave it up")
                return
            world.vm.domain.blockJobAbort(disk, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
            self._doubt(f"{disk}: {path.name} merged into {below.name}, by blockcommit")
            if "backupcore" in path.name:
                path.unlink()  # or every command asks what it holds that the VM does not use
            return
        if self._smaller(below, path):
            raise NotNow  # qemu-img grows the base then, which is another thing
        world.tool("qemu-img", "commit", "-q", "-f", "qcow2", str(path))
        self._doubt(f"{disk}: {path.name} emptied into {below.name}, by qemu-img commit")

    def write_below(self) -> None:
        """Something is written to the file below the one that a disk is on."""
        self._off()
        world = self.world
        disk = world.choice.choice(world.vm.targets())
        below = self._below(disk)
        if below is None:
            raise NotNow
        offset = world.choice.randrange(0, 64) * 65536
        pattern = world.choice.randrange(1, 256)
        world.tool("qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {offset} 64k", str(below))
        self._doubt(f"{disk}: 64k written at {offset} to {below.name}")

    def rebase(self) -> None:
        """The file that a disk is on is put on a copy of the one below, which differs in a few bytes."""
        self._off()
        world = self.world
        disk = world.choice.choice(world.vm.targets())
        below = self._below(disk)
        if below is None or "backupcore" in world.vm.disk(disk).name or "backupcore" in below.name:
            raise NotNow
        copy = world.folder / f"{disk}.base-{next(world.numbers)}.qcow2"
        self._replace(below, copy)
        offset = world.choice.randrange(0, 64) * 65536
        world.tool("qemu-io", "-f", "qcow2", "-c", f"write -P 0x7a {offset} 64k", str(copy))
        path = str(world.vm.disk(disk))
        world.tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", str(copy), path)
        self._define({})
        self._doubt(f"{disk}: put on {copy.name} instead of {below.name}")

    # How the files lie

    def _off(self) -> None:
        if self.world.vm.active or self.world.vm.domain.hasManagedSaveImage():
            raise NotNow

    def _own(self) -> list[Path]:
        """The files that the disks were made as, whatever lies on them now."""
        paths = [self.world.folder / f"{disk}.qcow2" for disk in self.world.vm.targets()]
        return [path for path in paths if path.exists()]

    def _two(self) -> tuple[Path, Path]:
        self._off()
        one, other = self.world.choice.sample(self._own(), 2)
        return one, other

    def _replace(self, source: Path, target: Path) -> None:
        """A copy in place of another file, as by ``cp``: owner and mode stay those of the disks."""
        owner = source.stat()
        shutil.copy(source, target)
        shutil.chown(target, owner.st_uid, owner.st_gid)

    def _define(self, files: Mapping[Path, Path]) -> None:
        """Have disks lie on other files; what libvirt noted of the files below them after a snapshot goes."""
        root = ElementTree.fromstring(self.world.vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
        for disk in root.iterfind("devices/disk"):
            for noted in disk.findall("backingStore"):
                disk.remove(noted)
            source = disk.find("source")
            if source is not None and Path(source.get("file", "")) in files:
                source.set("file", str(files[Path(source.get("file", ""))]))
        self.world.vm.connection.defineXML(ElementTree.tostring(root, "unicode"))

    def _below(self, disk: str) -> Path | None:
        chain = self.world.files(disk)
        return chain[1] if len(chain) > 1 else None

    def _smaller(self, below: Path, above: Path) -> bool:
        return size_of(below) != size_of(above)

    def _doubt(self, what: str) -> None:
        self.world.say(what)
        self.world.doubtful.append(what)
