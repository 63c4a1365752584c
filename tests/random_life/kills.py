"""Runs that are ended: by their user, by kill -9 at any step, and with all that works for them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lab.host import RUNNING, processes, wait_until
from tests.random_life.world import WARNED, NotNow, World, told
from tests.test_killed import STEPS

_MARK = "LAB_LIFE"


class Kills:
    """Its deeds are drawn as often as `deeds` says, against all others'."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.deeds: dict[Callable[[], None], int] = {
            self.kill: 6,
            self.cancel: 3,
            self.kill_all: 3,
        }

    def kill(self) -> None:
        world = self.world
        host = world.any_host()
        if not world.vm.active or world.held_up(host):
            raise NotNow
        truth = world.truth()
        steps = world.steps()
        step = world.choice.choice(list(steps))
        world.say(f"at {step!r}")
        with world.letting_go(host):
            killed = host.run("backup", world.vm.name, *world.reset(), at=steps[step])
        assert killed.code in (-signal.SIGKILL, 0, 3), told(killed)
        world.note(truth)

    def cancel(self) -> None:
        world = self.world
        host = world.any_host()
        if not world.vm.active or world.held_up(host):
            raise NotNow
        truth = world.truth()
        names = ("before the reader is asked", "a disk is mapped", "all is prepared")
        step = world.choice.choice([world.instant(), *(STEPS[name] for name in names)])
        world.say(f"at {step!r}")
        with world.letting_go(host):
            process = host.start("backup", world.vm.name, *world.reset(), at=step, stop=True)
            if world.comes_to(process, step):
                os.kill(process.pid, signal.SIGTERM)
                process.send_signal(signal.SIGCONT)
            done = host.end(process)
        # What little is left to read may be recorded before the wish is heard: the run has a thread of its own. What
        # follows the record is cut off then.
        assert done.code in (130, 0, 3), told(done)
        world.note(truth)
        # A cancelled run waits ten seconds for its guest's release, which goes on by itself where it takes longer.
        wait_until(lambda: not processes(str(host.folder)), "the guest's release")
        world.nothing_left(host)

    def kill_all(self) -> None:
        """Whatever works for a run gets kill -9 in the same moment, in any order: nobody is left to release the VM."""
        world = self.world
        host = world.any_host()
        if world.held_up(host):
            raise NotNow
        truth = world.truth()
        names = ("before the reader is asked", "all is prepared", "reading", "stored", "in the record")
        step = world.choice.choice([*([world.instant()] if world.vm.active else []), *(STEPS[name] for name in names)])
        world.say(f"at {step!r}")
        mark = f"{os.getpid()}.{next(world.numbers)}"  # other lives may go on beside this one
        with world.letting_go(host):
            process = host.start("backup", world.vm.name, at=step, stop=True, **{_MARK: mark})
            reached = world.comes_to(process, step)
            found = sorted(_marked(f"{_MARK}={mark}"))
            world.choice.shuffle(found)
            for pid in found:
                with suppress(ProcessLookupError):  # its parent's end may be its own
                    os.kill(pid, signal.SIGKILL)
            done = host.end(process)
        assert reached or done.code in (0, WARNED), told(done)
        wait_until(lambda: not _marked(f"{_MARK}={mark}"), "their end")
        world.say(f"({len(found)} processes)")
        world.note(truth)
        still = world.vm.active and world.vm.domain.state()[0] != RUNNING and not world.suspended
        if still or world.choice.random() < 0.5:
            world.recovered(host)
            world.nothing_left(host)


def _marked(mark: str) -> list[int]:
    """The processes that have this in their environment, which children get from their parents."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # it ended while we looked, or is nobody's business
    return found
