"""A life: deeds of all subjects, drawn by their weights, until the time is over; then all that is due is looked at."""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from lab.host import Host
from lab.private_libvirtd import PrivateLibvirtd
from tests.random_life.files import Files
from tests.random_life.guest import Guest
from tests.random_life.hosts import Hosts
from tests.random_life.keeping import Keeping
from tests.random_life.kills import Kills
from tests.random_life.moves import Moves
from tests.random_life.owner import Owner
from tests.random_life.runs import Runs
from tests.random_life.stores import Stores
from tests.random_life.world import NotNow, World


class Subject(Protocol):
    """Some deeds, each drawn as often as it says, against all others'."""

    deeds: dict[Callable[[], None], int]


class Life:
    """One VM, what the guest, its owner and the hosts do to it and its backups, and the truths of those.

    With a `second` libvirtd the VM moves to that and back; the last of the hosts is there.
    """

    def __init__(self, hosts: Sequence[Host], seed: int, second: PrivateLibvirtd | None = None) -> None:
        self.world = World(hosts, seed)
        guest, owner = Guest(self.world), Owner(self.world)
        subjects: list[Subject] = [
            guest,
            owner,
            Runs(self.world, guest),
            Kills(self.world),
            Files(self.world, owner),
            Keeping(self.world),
            Hosts(self.world),
            Stores(self.world),
        ]
        self.moves = Moves(self.world, second)
        subjects.append(self.moves)
        self.deeds_done = 0
        self.deeds: dict[Callable[[], None], int] = {}
        for subject in subjects:
            self.deeds |= subject.deeds
        without, often = (os.environ.get(name, "").split() for name in ("WITHOUT", "OFTEN"))
        self.deeds = {
            deed: weight * 10 if deed.__name__ in often else weight
            for deed, weight in self.deeds.items()
            if deed.__name__ not in without
        }

    def step(self) -> None:
        (deed,) = self.world.choice.choices(list(self.deeds), list(self.deeds.values()))
        self.world.log.append(deed.__name__)
        try:
            deed()
        except NotNow:
            self.world.log.pop()
        else:
            self.world.counts[deed.__name__] += 1
            self.deeds_done += 1

    def check_all(self) -> None:
        """Every increment that is due, by the first catalog that has it, or else from the datastore alone."""
        world = self.world
        world.restorable(3)
        seen: set[str] = set()
        for host in world.hosts:
            if host.folder.name in world.behind:
                continue
            for one in host.recorded():
                if one.point in world.due - seen:
                    world.compare(host, one)
                    seen.add(one.point)
        if world.due - seen:
            world.restorable()


def live(
    hosts: Sequence[Host],
    seconds: float,
    *,
    deeds: float = math.inf,
    usual: int | None = None,
    second: PrivateLibvirtd | None = None,
) -> None:
    """A life of so many seconds, or of so many `deeds`; `usual` is its seed unless SEED names one, None for a new one.

    `second` is the libvirtd of the last of the hosts, if it has one of its own.
    WITHOUT="DEED DEED" leaves deeds out, OFTEN draws them ten times as often: other decisions are taken then.
    """
    seed = int(os.environ.get("SEED") or usual or random.randrange(1 << 32))
    life = Life(hosts, seed, second)
    world = life.world
    end = time.monotonic() + seconds * 0.7
    try:
        while time.monotonic() < end and life.deeds_done < deeds:
            life.step()
        world.log.append("at the end")
        life.check_all()
    except BaseException as error:
        error.add_note(f"SEED={seed}; what happened:\n" + "\n".join(world.log))
        raise
    finally:
        life.moves.home()
        counts = ", ".join(f"{name} {count}" for name, count in sorted(world.counts.items()))
        sys.stdout.write("\n".join(["", *world.log, f"SEED={seed}: {counts}", ""]))
