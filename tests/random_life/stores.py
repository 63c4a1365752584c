"""What becomes of the place where the backups lie: unmounted, exchanged, emptied, a part of it removed by others."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lab.host import stopped, wait_until
from tests.random_life.world import BUSY, UNAVAILABLE, UNSUPPORTED, NotNow, World, told
from tests.test_killed import STEPS


class Stores:
    """Its deeds are drawn as often as `deeds` says, against all others'."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.deeds: dict[Callable[[], None], int] = {
            self.unmount: 3,
            self.unmount_during_a_backup: 2,
            self.empty: 1,
            self.remove_some: 1,
        }

    def unmount(self) -> None:
        """Whoever asks for anything meets the folder that lies below, or another disk; nothing is believed of it."""
        world = self.world
        host = world.any_host()
        one = world.any_of(host)
        verbs = [
            ("backup", world.vm.name),
            ("backup", world.vm.name, "--reset"),
            ("restore", str(one.image), "--increment", str(one.id), "--verify-only"),
            ("image", "verify", str(one.image)),
            ("image", "delete", str(one.image), "--yes"),
            ("datastore", "check", "nas"),
            ("catalog", "rebuild", "nas"),
        ]
        other = world.choice.random() < 0.3
        before, installation = host.recorded(), host.installation
        dead = any((host.state / "runs").glob("*"))  # also what a killed run had begun to remove
        (image,) = [each for each in host.ask("image", "list") if each["id"] == one.image]
        with self._away(other=other) as place:
            there = _contents(place)
            for verb in world.choice.sample(verbs, 3):
                world.log.append(f"  {'another disk' if other else 'nothing'} there: {' '.join(verb)}")
                done = host.run(*verb)
                if done.code == BUSY and verb[0] == "backup" and world.held_up(host):
                    continue
                foreign = verb[:2] == ("image", "delete") and not host.owns(image)  # refused before anything is asked
                assert done.code == (UNSUPPORTED if foreign else UNAVAILABLE), f"{verb}: {told(done)}"
                if host.installation == installation:  # one that is new to the machine closes what another began
                    assert host.recorded() == before, verb
                assert [one.point for one in host.recorded()] == [one.point for one in before], verb
                assert _contents(place) == there, verb
        if not dead:
            world.nothing_left(host)
        world.doubtful.append("the target was away")

    def unmount_during_a_backup(self) -> None:
        """What was written to the wrong place is no backup; the right one goes on as before."""
        world = self.world
        host = world.any_host()
        if world.held_up(host):
            raise NotNow
        world.any_of(host)  # one that knows nothing there is at its beginning
        truth = world.truth()
        before = host.recorded()
        names = ("before the datastore stores", "reading", "stored")
        step = world.choice.choice([STEPS[name] for name in names])
        world.say(f"at {step!r}")
        with world.letting_go(host):
            process = host.start("backup", world.vm.name, *world.reset(), at=step, stop=True)
            wait_until(partial(stopped, process.pid), step)
            with self._away():
                process.send_signal(signal.SIGCONT)
                done = host.end(process)
        assert done.code == UNAVAILABLE, told(done)
        # What a dead run had stored may have been recorded first, and an image that cannot go on have been closed.
        adopted = {one.point for one in host.recorded()} - {one.point for one in before}
        assert adopted <= set(world.truths), "nothing of this run is recorded"
        world.note(truth)
        if world.dead(host):  # it was stored where it should be: whoever comes next finds that, and records it
            world.say("(stored, not recorded)")
            world.recovered(host)
        world.nothing_left(host)
        world.doubtful.append("the target went away")

    def empty(self) -> None:
        """All is really gone. That is said, and a new beginning is made when it is asked for."""
        world = self.world
        host = world.any_host()
        if world.choice.random() < 0.7 or any(world.dead(one) for one in world.hosts):
            raise NotNow
        world.any_of(host)  # one that knows nothing there is at its beginning
        for path in world.store.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        world.due.clear()
        world.emptied += 1
        for one in world.hosts:
            if one.recorded():
                verb = ("backup", world.vm.name) if one in world.here else ("datastore", "check", "nas")
                done = one.run(*verb)
                assert done.code == UNAVAILABLE, told(done)
                assert "vmkeep datastore adopt nas" in done.err
                one.ask("datastore", "adopt", "nas", "--yes")
        world.doubtful.append("the target was emptied")

    def remove_some(self) -> None:
        """As by ``restic forget`` from cron: one source goes, and with it what builds on it."""
        world = self.world
        sources = sorted(world.store.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)
        if len(sources) < 4:
            raise NotNow
        shutil.rmtree(world.choice.choice(sources).parent)
        world.due &= world.available()
        world.doubtful.append("something was removed")

    @contextmanager
    def _away(self, *, other: bool = False) -> Iterator[Path]:
        """An empty folder lies where the backups were, or a disk with another VM's; afterwards it is as before."""
        store = self.world.store
        aside = store.with_name("aside")
        store.rename(aside)
        store.mkdir()
        if other:
            source = next(aside.glob("*/.labels")).parent
            shutil.copytree(source, store / "f00d")
        try:
            yield store
        finally:
            shutil.rmtree(store)
            aside.rename(store)


def _contents(place: Path) -> list[str]:
    return sorted(str(path) for path in place.rglob("*"))
