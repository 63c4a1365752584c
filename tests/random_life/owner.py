"""What the VM's owner does to its definition, its disks and its settings, by the tools that are meant for it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import libvirt

from tests.random_life.world import MIB, UNSUPPORTED, NotNow, World, told


class Owner:
    """Its deeds are drawn as often as `deeds` says, against all others'."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.deeds: dict[Callable[[], None], int] = {
            self.resize: 4,
            self.attach_or_detach: 4,
            self.define_again: 3,
            self.change_mode: 2,
        }

    def resize(self) -> None:
        world = self.world
        disk = world.choice.choice(world.vm.targets())
        size = world.size(disk)
        grow = size + world.choice.choice([512, 65536, 3 * MIB])
        if world.vm.active:
            # QEMU refuses it while a job runs, also a dead run's.
            if grow > 64 * MIB or world.any_job():
                raise NotNow
            world.say(f"{disk} to {grow}")
            try:
                world.vm.domain.blockResize(disk, grow, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
            except libvirt.libvirtError as error:
                if "is inconsistent" not in str(error):  # after a crash of QEMU, until the next backup
                    raise
                world.say("(a bitmap hinders it)")
            return
        wanted = world.choice.choice([grow if grow <= 64 * MIB else size, max(4 * MIB, size - 2 * MIB)])
        world.say(f"{disk} to {wanted}")
        self.resize_file(disk, wanted)

    def resize_file(self, disk: str, size: int, *options: str) -> None:
        """Resize the file of a VM that is off."""
        world = self.world
        path = str(world.vm.disk(disk))
        command = ["qemu-img", "resize", "-q", "-f", world.format(disk), "--shrink", *options, path, str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "is inconsistent" in done.stderr:  # after a crash of QEMU; this is what our README says to do then
            world.say(", once its bitmaps are forgotten")
            for host in world.here:
                host.ask("vm", "forget", world.vm.name)
            world.here[0].ask("vm", "forget", world.vm.name, "--foreign", "--yes")
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and options:
            # A file longer than its clusters need grows only without: "Cannot use preallocation for shrinking".
            world.say(f", without {' '.join(options)}")
            done = subprocess.run(
                [word for word in command if word not in options], capture_output=True, text=True, check=False
            )
        assert done.returncode == 0, done.stderr

    def attach_or_detach(self) -> None:
        world = self.world
        if "vdc" not in world.vm.targets():
            if "ua-vdc" in world.vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE):
                raise NotNow  # attached while the VM's memory was saved, it is there from the next start on
            flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG | (libvirt.VIR_DOMAIN_AFFECT_LIVE if world.vm.active else 0)
            world.vm.domain.attachDeviceFlags(self.spare_xml(), flags)
        elif not world.vm.active and world.vm.disk("vdc") == world.spare:
            # Without an operating system no guest lets go of a disk; and while it lies under an overlay of ours, the
            # README says, it is not to be taken away.
            world.say("detach")
            world.vm.domain.detachDeviceFlags(self.spare_xml(), libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        else:
            raise NotNow

    def spare_xml(self) -> str:
        thread = "iothread='1'" if self.world.threads else ""
        return (
            f"<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap' {thread}/>"
            f"<source file='{self.world.spare}'/><target dev='vdc' bus='virtio'/><alias name='ua-vdc'/></disk>"
        )

    def define_again(self) -> None:
        vm = self.world.vm
        if vm.active or vm.domain.hasManagedSaveImage():
            raise NotNow
        xml = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
        vm.connection.defineXML(xml)

    def change_mode(self) -> None:
        """How increments are found, and how the guest is brought to rest."""
        world = self.world
        if world.closed:
            raise NotNow
        world.snapshots = not world.snapshots
        mode, freeze = "SNAPSHOT" if world.snapshots else "CBT", world.choice.choice(["NONE", "SUSPEND"])
        world.say(f"{mode} {freeze}")
        # Beside another one's overlays or checkpoints an installation gets fulls alone, which is soon seen.
        world.alone = world.snapshots and not any(map(world.dead, world.hosts)) and world.choice.random() < 0.8
        if world.alone and not world.vm.domain.hasManagedSaveImage() and not world.suspended:
            world.say("alone")
            done = world.here[0].run("vm", "forget", world.vm.name, "--foreign", "--yes")
            if done.code == UNSUPPORTED:  # an overlay of a disk that was made smaller is merged while the VM is off
                world.say("(not now)")
                world.alone = False
            else:
                assert done.code == 0, told(done)
        world.here[0].ask("vm", "updateconf", world.vm.name, "--increment-mode", mode, "--fs-freeze", freeze)
