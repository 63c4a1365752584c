"""What is let go, by rules and by hand, and what is looked at whole."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable

from lab.host import Host
from tests.random_life.world import NOT_FOUND, UNSUPPORTED, WARNED, NotNow, World, told

_FLATTEN = (
    "vmkeep.catalog.flattens:begin return",
    "lab.store:Folder.backup call",
    "backupcore.datastore:Datastore.backup return",
    "backupcore.proof:prove return",
    "vmkeep.catalog.flattens:record call",
    "vmkeep.catalog.flattens:record return",
    "lab.store:Folder.delete call",
    "lab.store:Folder.delete return",
)
"""Steps of a flatten at which it is killed."""


class Keeping:
    """Its deeds are drawn as often as `deeds` says, against all others'."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.deeds: dict[Callable[[], None], int] = {
            self.keep_last: 2,
            self.flatten: 2,
            self.delete: 2,
            self.verify: 2,
            self.forget: 1,
        }

    def keep_last(self) -> None:
        count = self.world.choice.choice([0, 0, 2, 4, 8])
        self.world.say(str(count))
        self.world.here[0].ask("vm", "updateconf", self.world.vm.name, "--keep-last", str(count))

    def flatten(self) -> None:
        world = self.world
        host = world.any_host()
        number, count = self._any_image(host)
        if count < 2:
            raise NotNow
        ids = sorted(one.id for one in host.recorded() if one.image == number)
        to = world.choice.choice(ids[1:])
        world.say(f"{number} to {to}")
        step = world.choice.choice(_FLATTEN) if world.choice.random() < 0.4 else ""
        with world.letting_go(host):
            done = host.run("image", "flatten", str(number), "--to", str(to), at=step)
        world.doubtful.append("flattened")
        if done.code == -signal.SIGKILL:
            world.say(f"killed at {step!r}")
            world.flattening.add(host.folder.name)
            world.restorable(2)
            return
        allowed = (0, WARNED, NOT_FOUND, UNSUPPORTED) if host.folder.name in world.behind else (0,)
        assert done.code in allowed, told(done)

    def delete(self) -> None:
        """An old image of its own goes, if there are some; what else is due stays restorable."""
        world = self.world
        host = world.any_host()
        images = {one.image for one in host.recorded()}
        if len(images) < 4:
            raise NotNow
        number = world.choice.choice(sorted(images)[:-2])
        world.say(str(number))
        (image,) = [one for one in host.ask("image", "list") if one["id"] == number]
        with world.letting_go(host):
            done = host.run("image", "delete", str(number), "--yes")
        if done.code == 0:
            assert host.owns(image), "another installation's is its own business"
            world.say("-> gone")
        else:
            assert done.code == UNSUPPORTED, told(done)
            world.say(f"-> {done.err.splitlines()[0]}")
        world.restorable(2)

    def verify(self) -> None:
        """Well, or superseded by what the catalog does not know; damaged is what was lost on purpose alone."""
        world = self.world
        host = world.any_host()
        one = world.any_of(host)
        rows = [row for row in host.recorded() if row.image == one.image]
        if any(row.point not in world.due for row in rows):
            raise NotNow
        done = host.run("image", "verify", str(one.image))
        allowed = (0, WARNED) if host.folder.name in world.behind else (0,)
        assert done.code in allowed, told(done)

    def forget(self) -> None:
        """All that tells changes is removed: this installation's, or the others'."""
        world = self.world
        host = world.any_host()
        if world.held_up(host) or self.world.dead(host):
            raise NotNow
        if world.vm.domain.hasManagedSaveImage() or world.suspended:
            raise NotNow
        foreign = ["--foreign", "--yes"] if world.choice.random() < 0.3 else []
        done = host.run("vm", "forget", world.vm.name, *foreign)
        # An overlay of a disk that was made smaller is merged while the VM is off.
        assert done.code in (0, UNSUPPORTED), told(done)
        world.doubtful.append("all was forgotten")

    def _any_image(self, host: Host) -> tuple[int, int]:
        """One of its own images that has all it should have: its number, and how many increments it has."""
        document = host.ask("image", "list")
        rows = host.recorded()
        lost = {one.image for one in rows if one.point not in self.world.due}
        counts = Counter(one.image for one in rows)
        mine = [one["id"] for one in document if one["id"] not in lost and host.owns(one)]
        if not mine:
            raise NotNow
        number = self.world.choice.choice(mine)
        return number, counts[number]
