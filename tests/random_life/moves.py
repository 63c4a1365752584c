"""The VM moves to another libvirtd, where another installation backs it up, and back: its disks go, no record does."""

from __future__ import annotations

from collections.abc import Callable

import libvirt

from lab.private_libvirtd import PrivateLibvirtd
from tests.random_life.world import NotNow, World


class Moves:
    """Its deeds are drawn as often as `deeds` says, against all others'. Without a `second` libvirtd there are none."""

    def __init__(self, world: World, second: PrivateLibvirtd | None) -> None:
        self.world = world
        self.second = second
        self._first = world.vm.connection, world.runtime
        self.deeds: dict[Callable[[], None], int] = {self.move: 4} if second else {}

    def move(self) -> None:
        world = self.world
        if world.vm.domain.hasManagedSaveImage() or any(world.dead(host) for host in world.hosts):
            raise NotNow
        if world.vm.connection is not self._first[0]:
            self.home()
            world.say("back")
        else:
            assert self.second is not None
            self._to(libvirt.open(self.second.uri))
            world.at, world.runtime = self.second.uri, self.second.runtime
        world.doubtful.append("moved")

    def home(self) -> None:
        """Back to the first libvirtd, if it is not there."""
        connection, runtime = self._first
        other = self.world.vm.connection
        if other is not connection:
            self._to(connection)
            self.world.at, self.world.runtime = self.world.first.uri, runtime
            other.close()

    def _to(self, connection: libvirt.virConnect) -> None:
        vm = self.world.vm
        xml = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        vm.destroy()
        self.world.suspended = False
        flags = libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        vm.domain.undefineFlags(flags)
        vm.connection, vm.domain = connection, connection.defineXML(xml)
        vm.start()
