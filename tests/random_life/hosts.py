"""What becomes of the hosts: their names, clocks, state folders, and what their catalogs know."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext

from lab import clock
from lab.host import Host
from tests.random_life.world import UNAVAILABLE, WARNED, NotNow, World, told

DAY = 86400


class Hosts:
    """Its deeds are drawn as often as `deeds` says, against all others'."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._kept: dict[str, int] = {}
        self.deeds: dict[Callable[[], None], int] = {
            self.rename: 1,
            self.step_the_clock: 2,
            self.become_another_machine: 1,
            self.keep_the_state: 2,
            self.put_the_state_back: 2,
            self.rebuild: 3,
            self.begin_from_nothing: 1,
        }

    def rename(self) -> None:
        if os.geteuid():
            raise NotNow
        host = self.world.any_host()
        host.hostname = f"host{next(self.world.numbers)}"
        self.world.say(host.hostname)
        self._doubt("renamed")

    def step_the_clock(self) -> None:
        """Mostly back to what it should be: else it is wrong all the time."""
        if not clock.available():
            raise NotNow
        host = self.world.any_host()
        host.ahead = self.world.choice.choice([0, 0, 0, 3600, -3600, 400 * DAY, -400 * DAY])
        self.world.say(f"{host.ahead} s ahead")
        self._doubt("its clock was stepped")

    def become_another_machine(self) -> None:
        """Its state folder wakes up on another machine, as a copy does, and is another installation from then on."""
        host = self.world.any_host()
        if self.world.held_up(host) or self.world.dead(host):
            raise NotNow  # what a dead run has left is the first machine's
        host.environment["VMKEEP_MACHINE_ID"] = f"{next(self.world.numbers):032x}"
        self._doubt("on another machine")

    def keep_the_state(self) -> None:
        """As a backup of the host's own files does every night."""
        host = self.world.any_host()
        if not host.state.exists():
            raise NotNow
        kept = host.folder / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        self.world.tool("cp", "-a", str(host.state), str(kept))
        self._kept[host.folder.name] = self.world.emptied

    def put_the_state_back(self) -> None:
        """Its catalog knows nothing of what was done since; nothing is lost by that."""
        host = self.world.any_host()
        kept = host.folder / "kept"
        if not kept.exists():
            raise NotNow
        # Of a dead run only the folder that goes knows what is to be put right: the host's admin has that done before.
        if self.world.dead(host):
            if self.world.vm.domain.hasManagedSaveImage():
                raise NotNow
            host.run("recover", host.vm.name)
        shutil.rmtree(host.state)
        self.world.tool("cp", "-a", str(kept), str(host.state))
        if self.world.emptied > self._kept[host.folder.name]:  # the place is another one since, and meant
            done = host.run("datastore", "check", "nas")
            assert done.code in (0, WARNED, UNAVAILABLE), told(done)
            if done.code == UNAVAILABLE:
                host.ask("datastore", "adopt", "nas", "--yes")
        self.world.behind.add(host.folder.name)
        self.world.put_back.add(host.folder.name)  # checkpoints made since go with the next backup
        self._doubt("its state was put back")
        self.world.restorable(3)

    def rebuild(self) -> None:
        """After it the catalog has all that is due; a second time there is nothing to do."""
        host = self.world.any_host()
        half = host.folder.name in self.world.flattening
        with self.world.letting_go(host) if half else nullcontext():  # a flatten that was killed is finished first
            done = host.run("--json", "catalog", "rebuild", "nas")
        assert done.code == 0, told(done)
        self._knows_all(host)
        again = host.ask("catalog", "rebuild", "nas")
        assert (again["added"], again.get("changed", [])) == ([], [])
        self.world.behind.discard(host.folder.name)
        self._doubt("its catalog was rebuilt")

    def begin_from_nothing(self) -> None:
        """Its state folder is lost; what it was is in the datastore."""
        host = self.world.any_host()
        if not host.state.exists() or self.world.held_up(host) or self.world.dead(host):
            raise NotNow
        shutil.rmtree(host.state)
        host.ask("catalog", "rebuild", "nas")
        self._knows_all(host)
        self.world.behind.discard(host.folder.name)
        self._doubt("its state was lost, and its catalog rebuilt")

    def _knows_all(self, host: Host) -> None:
        lost = self.world.due - {one.point for one in host.recorded()}
        assert not lost, f"a rebuilt catalog lacks {len(lost)} of {len(self.world.due)} points: {lost}"

    def _doubt(self, what: str) -> None:
        self.world.doubtful.append(what)
