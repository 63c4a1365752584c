"""What the guest does, and what becomes of its QEMU."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from lab.host import wait_until
from tests.random_life.world import MIB, NotNow, World


class Guest:
    """Its deeds are drawn as often as `deeds` says, against all others'."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.deeds: dict[Callable[[], None], int] = {
            self.write: 30,
            self.power: 5,
            self.crash: 2,
            self.save: 1,
            self.suspend_or_resume: 2,
        }

    def write(self) -> None:
        world = self.world
        disk = world.choice.choice(world.vm.targets())
        size = world.size(disk)
        length = world.choice.choice([512, 4096, 65536, 300 * 1024, MIB])
        offset = world.choice.randrange(0, (size - length) // 512) * 512
        pattern = world.choice.randrange(1, 256)
        command = world.choice.choice(
            [f"write -P {pattern}", f"write -P {pattern}", "write -z", "write -z -u", "discard"]
        )
        world.counts[command.partition(" -P")[0]] += 1
        world.io(disk, f"{command} {offset} {length}")

    def power(self) -> None:
        self.world.power()

    def crash(self) -> None:
        world = self.world
        if not world.vm.active:
            raise NotNow
        pid = (world.runtime / "qemu" / f"{world.vm.name}.pid").read_text()
        os.kill(int(pid), signal.SIGKILL)
        wait_until(lambda: not world.vm.active, "libvirt to notice the crash")
        world.suspended = False

    def save(self) -> None:
        # libvirt lets nobody save a VM while a backup job is there, also a dead run's.
        if not self.world.vm.active or self.world.suspended or self.world.any_job():
            raise NotNow
        self.world.vm.domain.managedSave()

    def suspend_or_resume(self) -> None:
        world = self.world
        if not world.vm.active:
            raise NotNow
        (world.vm.domain.resume if world.suspended else world.vm.domain.suspend)()
        world.suspended = not world.suspended
