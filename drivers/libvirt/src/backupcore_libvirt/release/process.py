"""The process that guards one run: it waits for what may happen to the run, and lets the guest go when it does.

All is done in one thread, which never waits (`loop`), and in threads of their own for what may. That thread hears the
owner (`owner_line`), and whoever asks at the control socket (`control`); what may happen is looked for by `watching`,
and what is done then is told by `giving_up` and `rest`.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from backupcore.disk.unix_socket import listen_at
from backupcore.errors import BackupError, HypervisorError, TargetFull, dump_error, from_os_error, load_error
from backupcore.guard import SOCKET
from backupcore.thread import aside
from backupcore_libvirt.connection import Connection
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.image_lock import keep_closed, knows_locks
from backupcore_libvirt.mechanisms.letting_go import merge_overlays
from backupcore_libvirt.overlay.room import Growing
from backupcore_libvirt.reading.still import Stamps
from backupcore_libvirt.release.admission import Admitted
from backupcore_libvirt.release.control import Control
from backupcore_libvirt.release.giving_up import Run, end_clients, give_up, is_marked, mark
from backupcore_libvirt.release.loop import Loop
from backupcore_libvirt.release.own_unit import OwnUnit
from backupcore_libvirt.release.owner_line import OwnerLine, say
from backupcore_libvirt.release.rest import Rest
from backupcore_libvirt.release.watching import WATCHES, Devices, Merges, Room, Watch, Writes

__all__ = ["guard"]

LET_GO_LIMIT = 600.0
AGAIN = 0.2
OWNER_EVERY = 1.0
DEATH_GRACE = 0.5


def guard(asked: dict[str, Any], reader: int | None) -> None:
    """Guard the run that is asked for, until all of it is released. Says so when it is ready."""
    unit = OwnUnit(asked["run"])
    scratch = RunFolder(Path(asked["scratch"]), asked["run"])
    folder = Path(asked["folder"])
    run = Run(asked["uri"], asked["vm"], asked["name"], scratch, folder, asked["owner"], asked["installation"])
    try:
        with Connection(run.uri) as connection:  # what cannot be reached now would not be in need
            connection.domain(run.vm)
        server = listen_at(run.folder / SOCKET)
    except BackupError as error:
        say({"said": "failed", **dump_error(error)})
        return
    except OSError as error:
        found = from_os_error(error, f"the socket {run.folder / SOCKET}")
        if not isinstance(found, TargetFull):  # FUSE has ENOSYS, vfat and exFAT EPERM
            hint = "Set 'state' in the configuration to a folder on a local file system that can hold sockets."
            found = HypervisorError(found.message, hint)
        say({"said": "failed", **dump_error(found)})
        return
    if problem := unit.wait():
        say(
            {
                "said": "warning",
                "message": f"the process that guards the guest of VM {run.name} has no unit of its own ({problem}): if "
                "systemd kills the unit of this backup, nothing lets the guest go on before the next backup",
            }
        )
    one = _Guard(run, server, int(asked["pidfd"]), reader)
    say({"said": "ready", "reader": reader})
    one.work()
    os._exit(0)  # a thread may still wait for a libvirtd that does not answer


class _Guard:
    """What it knows of its run. `work` is the one thread that changes any of it."""

    def __init__(self, run: Run, server: socket.socket, owner: int, reader: int | None) -> None:
        self._run = run
        self._held = False
        self._phase = "watching"
        self._error: BackupError | None = None  # with which the run was given up
        self._turn_asked = False
        self._done = False
        self._answer: dict[str, Any] | None = None  # of the release
        self._asked_at = 0.0
        self._stray_due: float | None = None
        self._trying = False
        self._watches: list[Watch] = []
        self._growing: list[Growing] = []
        self._kept = ExitStack()  # locks on what is read
        self._loop = Loop()
        self._owner = OwnerLine(
            self._loop,
            run.owner,
            owner,
            told=self._told,
            strays=self._owner_strays,
            left=self._owner_left,
            died=self._owner_died,
        )
        self._control = Control(
            self._loop, server, status=self._status, refusal=self._refusal, give_up=self._asked_to_give_up
        )
        self._rest = Rest(run, self._loop)
        self._reader = os.pidfd_open(reader) if reader is not None else None
        if reader is not None:
            self._loop.on(self._reader, partial(self._reap, reader))

    def work(self) -> None:
        """Until nothing is left to do."""
        look_due = time.monotonic()
        while not self._finished():
            self._loop.wait(min(due for due in (look_due, self._rest.due, self._stray_due) if due is not None))
            now = time.monotonic()
            if self._rest.due is not None and now >= self._rest.due:
                self._rest.end()
            if self._stray_due is not None and now >= self._stray_due:
                self._stray_due = None
                self._owner_strays()
            if now >= look_due:
                look_due = now + OWNER_EVERY
                self._look_at_owner()
        self._control.answer({"released": True, "seconds": self._seconds(), "did": []})
        self._stop_watching()

    def _finished(self) -> bool:
        if self._done:
            return True
        if self._owner.works:
            return False
        if not self._held:
            return True
        if self._stray_due is not None:
            return False
        return self._phase == "released" and not self._trying and not self._rest.at_work

    def _reap(self, reader: int) -> None:
        self._loop.off(self._reader)
        with suppress(ChildProcessError):
            os.waitpid(reader, os.WNOHANG)

    # The owner

    def _told(self, what: dict[str, Any]) -> None:
        match what["do"]:
            case "hold":
                self._held = True
                self._growing = [Growing(**disk) for disk in what["room"]]
                watches = [WATCHES[name](self._run, *self._telling) for name in what["watch"]]
                if self._growing:
                    watches.append(Room(self._run, *self._telling, self._growing))
                self._watch(watches)
            case "keep":
                stamps = {path: stamp and tuple(stamp) for path, stamp in what["stamps"].items()}
                self._keep(stamps, what["there"], what["unwritten"])
            case "freeze":
                self._rest.due = time.monotonic() + float(what["limit"])
            case "thawed":
                self._rest.due = None
            case "give up":
                self._let_go(load_error(what) if "kind" in what else None)
            case "release":
                self._turn_asked = True
                self._turn()
            case "done":
                self._done = True

    def _keep(self, before: Stamps, there: list[str], unwritten: list[str]) -> None:
        try:
            self._kept.enter_context(keep_closed([Path(path) for path in before]))
        except BackupError as error:
            say({"said": "failed", **dump_error(error)})
        else:
            watches: list[Watch] = [Writes(self._run, *self._telling, before, there)]
            if unwritten:
                watches.append(Devices(self._run, *self._telling, unwritten))
            if unlocked := [disk for disk in self._growing if not knows_locks(Path(disk.below))]:
                watches.append(Merges(self._run, *self._telling, unlocked))
            self._watch(watches)
            say({"said": "kept"})

    @property
    def _telling(self) -> tuple[Callable[[BackupError], None], Callable[[str], None]]:
        """What a watch calls: with the trouble that ends the run, and with a remark."""
        return (
            lambda error: self._loop.tell(partial(self._let_go, error)),
            lambda line: self._loop.tell(partial(say, {"said": "warning", "message": line})),
        )

    def _watch(self, watches: Sequence[Watch]) -> None:
        for watch in watches:
            watch.start()
        self._watches += watches

    def _turn(self) -> None:
        """Leave the release to the owner, which waits for this: never are two at work on it."""
        if not self._turn_asked or self._trying:
            return
        self._turn_asked = False
        self._kept.close()
        for watch in self._watches:
            if isinstance(watch, Devices | Merges | Writes):  # the owner itself writes now
                watch.stop_asked.set()
        self._phase = "the owner releases"
        clients = self._control.refuse_clients()
        if not clients:
            end_clients((), self._run.owner, self._reader)
            say({"said": "yours"})
            return

        def end() -> None:  # one that is stopped would be in the owner's way
            end_clients(clients, self._run.owner, self._reader)
            for client in clients:
                client.close()
            self._loop.tell(partial(say, {"said": "yours"}))

        aside(end, "end clients")

    def _owner_left(self) -> None:
        """It has closed its pipe without a word: it has ended, or all its descriptors were closed."""
        if self._done or not self._owner.lives or not self._held:
            return
        if self._phase == "the owner releases":
            self._owner_died()
        else:
            # A process that ends closes its descriptors a moment before its pidfd tells.
            self._stray_due = time.monotonic() + DEATH_GRACE

    def _owner_strays(self) -> None:
        self._let_go(
            HypervisorError(
                f"the backup of VM {self._run.name} has lost the process that guards its guest: something in it has "
                "closed, or written to, descriptors that are not its own",
                "Look for a plugin or driver that does that.",
            )
        )

    def _look_at_owner(self) -> None:
        if not self._owner.lives or not self._held:
            return
        if self._owner.is_dying:
            self._owner_died()
        elif self._phase == "the owner releases" and self._error is not None and self._owner.is_stopped:
            # It holds the release and does not go on with it, while the guest stands, or the user waits.
            self._owner.kill()

    def _owner_died(self) -> None:
        # Nothing is marked: it can neither publish nor record any more, and what it has published is complete.
        self._owner.lives = False
        if self._done:
            return
        self._turn_asked = False
        self._stray_due = None
        if self._held:
            self._let_go(None)

    # Giving up

    def _let_go(self, error: BackupError | None) -> None:
        """Give the run up, once, and try until it is done; a later error only marks it."""
        if self._error is None and error is not None:
            self._error = error
            say({"said": "given up", **dump_error(error)})
            if self._trying or self._phase == "released":
                aside(partial(mark, self._run.folder, error), "mark late")
        if self._trying or self._phase == "released":
            return
        if self._phase == "the owner releases" and self._owner.works:
            return  # it is at it
        self._phase = "giving up"
        self._asked_at = time.monotonic()
        self._stop_watching()
        self._kept.close()
        self._rest.end()
        self._try(error)

    def _try(self, error: BackupError | None) -> None:
        self._trying = True
        clients = self._control.refuse_clients()
        aside(partial(self._work_off, error, clients), "giving up")

    def _work_off(self, error: BackupError | None, clients: list[Admitted]) -> None:
        deadline = time.monotonic() + LET_GO_LIMIT
        for tried in itertools.count():
            problem: BackupError | None = None
            did: list[str] = []
            try:
                did = give_up(self._run, None if tried else error, clients, self._reader)
            except BackupError as found:
                problem = found
            except Exception as found:  # noqa: BLE001 - whatever it is, the guest must not stand for it
                problem = HypervisorError(f"{type(found).__name__}: {found}")
            if problem is None or self._turn_asked or time.monotonic() > deadline:
                break
            self._loop.tell(partial(self._answer_all, [], problem))
            time.sleep(AGAIN)
        for client in clients:
            client.close()
        if self._growing and problem is None and not self._turn_asked:
            # Nobody watches any more how they grow. The guest runs already, so whoever waits is answered before.
            self._loop.tell(partial(self._let_go_of, did))
            did = []
            try:
                # What a dead owner has published is recorded yet, and nothing of it undone: only what is marked is.
                undone = self._point() if is_marked(self._run.folder) else ""
                did = merge_overlays(
                    self._run.uri,
                    self._run.vm,
                    self._run.scratch,
                    lambda: self._turn_asked,
                    installation=self._run.installation,
                    undone=undone,
                )
            except BackupError as found:
                if not self._turn_asked:  # else the owner tries it, and tells
                    self._loop.tell(partial(say, {"said": "warning", "message": found.in_full}))
        self._loop.tell(partial(self._tried, did, problem))

    def _point(self) -> str:
        """The run's point, where its overlays were to stay between backups."""
        from backupcore_libvirt.overlay.stack import point_of  # noqa: PLC0415 - for what is rare, and takes time

        return next(filter(None, (point_of(disk.overlay) for disk in self._growing)), "")

    def _let_go_of(self, did: list[str]) -> None:
        self._phase = "released"
        self._answer_all(did, None)

    def _tried(self, did: list[str], problem: BackupError | None) -> None:
        self._trying = False
        if problem is None or not self._turn_asked:
            self._phase = "released"
        self._answer_all(did, problem)
        self._turn()

    def _answer_all(self, did: list[str], problem: BackupError | None) -> None:
        self._answer = {
            "released": problem is None,
            "seconds": self._seconds(),
            "did": did,
            "why": problem.message if problem else "",
            "hint": problem.hint if problem else "",
        }
        say({"said": "released", **self._answer})
        self._control.answer(self._answer)

    def _seconds(self) -> float:
        return round(time.monotonic() - self._asked_at, 3)

    def _stop_watching(self) -> None:
        for watch in self._watches:
            watch.stop_asked.set()

    # What is asked at the control socket

    def _status(self) -> dict[str, Any]:
        return {
            "vm": self._run.vm,
            "name": self._run.name,
            "run": self._run.scratch.run,
            "owner": self._run.owner,
            "phase": self._phase,
            "given_up": dump_error(self._error) if self._error else None,
        }

    def _refusal(self) -> BackupError | None:
        if self._phase == "watching":
            return None
        return self._error or HypervisorError("its guest is being released")

    def _asked_to_give_up(self, error: BackupError) -> None:
        if not self._trying:
            self._asked_at = time.monotonic()
        self._let_go(error)
        if self._phase == "released" and self._answer is not None:
            self._control.answer(self._answer)
