"""Backups that go well, or are disturbed by the VM alone; what is read back from them, and put back."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial

import libvirt

from lab.host import size_of, stopped, wait_until
from lab.vm import same
from tests.random_life.guest import Guest
from tests.random_life.world import BUSY, NOT_FOUND, UNSUPPORTED, NotNow, World, told
from tests.test_killed import OFF, STEPS


class Runs:
    """Its deeds are drawn as often as `deeds` says, against all others'."""

    def __init__(self, world: World, guest: Guest) -> None:
        self.world = world
        self.guest = guest
        self.deeds: dict[Callable[[], None], int] = {
            self.back_up: 18,
            self.back_up_beside_writes: 6,
            self.start_in_the_middle: 3,
            self.recover: 2,
            self.check_one: 2,
            self.restore_in_place: 3,
        }

    def back_up(self) -> None:
        host = self.world.any_host()
        truth = self.world.truth()
        with self.world.letting_go(host):
            done = host.run("--json", "backup", host.vm.name, *self.world.reset())
        self.world.ended(host, done, truth)

    def back_up_beside_writes(self) -> None:
        """The instant is held while the guest writes on."""
        world = self.world
        if not world.vm.active:
            raise NotNow
        host = world.any_host()
        if world.held_up(host):
            raise NotNow
        truth = world.truth()
        with world.letting_go(host):
            process = host.start("--json", "backup", world.vm.name, *world.reset(), at=world.instant(), stop=True)
            if world.comes_to(process, world.instant()):
                for _ in range(3):
                    world.log.append("  meanwhile")
                    self.guest.write()
                process.send_signal(signal.SIGCONT)
            done = host.end(process)
        world.ended(host, done, truth)

    def start_in_the_middle(self) -> None:
        """The VM is off when its backup begins; it may refuse to start, or the backup may fail: no mix is recorded."""
        world = self.world
        if world.vm.active:
            raise NotNow
        host = world.any_host()
        if world.held_up(host) or world.vm.domain.hasManagedSaveImage():
            raise NotNow
        truth = world.truth()
        before = {one.point for one in host.recorded()}
        step = world.choice.choice([STEPS["reading"], OFF["a disk is served"], STEPS["before the datastore stores"]])
        world.say(f"at {step!r}")
        with world.letting_go(host):
            process = host.start("--json", "backup", world.vm.name, *world.reset(), at=step, stop=True)
            wait_until(partial(stopped, process.pid), step)
            try:
                world.vm.start()
            except libvirt.libvirtError as error:
                world.say(f"(no start: {error.get_error_code()})")
            else:
                for disk in world.vm.targets():
                    world.io(disk, f"write -P {world.choice.randrange(1, 256)} 0 2M")
            process.send_signal(signal.SIGCONT)
            done = host.end(process)
        if done.code in (0, 3):
            world.doubtful.append("started in the middle")
            world.ended(host, done, truth)
            return
        assert done.code == BUSY, told(done)
        assert world.vm.active, "a backup fails because of a start, so there was one"
        assert {one.point for one in host.recorded()} <= before
        world.note(truth)
        world.nothing_left(host)

    def recover(self) -> None:
        host = self.world.any_host()
        self.world.recovered(host)
        self.world.nothing_left(host)

    def check_one(self) -> None:
        host = self.world.any_host()
        one = self.world.any_of(host)
        if host.folder.name in self.world.behind:
            tried = host.run("restore", str(one.image), "--increment", str(one.id), "--verify-only")
            if tried.code:
                assert tried.code == NOT_FOUND, told(tried)
                assert "vmkeep catalog rebuild nas" in tried.err
                return
        self.world.compare(host, one)

    def restore_in_place(self) -> None:
        """One disk gets back what it held at some backup, and its size."""
        world = self.world
        if world.vm.domain.hasManagedSaveImage() or world.first.overlays():
            raise NotNow
        host = world.any_host()
        recorded = [
            one
            for one in host.recorded()
            if one.point in world.due and set(world.truths[one.point]) & set(world.vm.targets())
        ]
        if not recorded or host.folder.name in world.behind or world.held_up(host):
            raise NotNow
        one = world.choice.choice(recorded[-8:])
        truth = world.truths[one.point]
        disk = world.choice.choice(sorted(set(truth) & set(world.vm.targets())))
        world.say(f"{disk} of {one.image}/{one.id}")
        if world.vm.active:
            world.power()
        options = ("--increment", str(one.id), "--in-place", "--disk", disk, "--drop-old")
        done = host.run("restore", str(one.image), *options)
        if done.code == UNSUPPORTED:  # as where a snapshot that was merged has left its files in the definition
            world.say(f"-> {done.err.splitlines()[0]}")
            return
        assert done.code == 0, told(done)
        now = world.vm.disk(disk)
        assert size_of(now) == size_of(truth[disk])
        assert same(now, truth[disk])
