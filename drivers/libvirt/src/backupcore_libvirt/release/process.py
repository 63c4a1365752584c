"""The process that guards one run: it waits for what may happen to the run, and lets the guest go when it does.

Its owner tells it on standard input, a line of JSON each:

- ``{"do": "hold", "watch": [...], "room": [...]}``: from now on something may be held of the guest; look for these
  (`WATCHES`), and at the room beside these disks (`overlay.room.Growing`);
- ``{"do": "keep", "files": [...]}``: hold QEMU's lock on these files until the release; answered by ``kept``, or by
  ``failed``;
- ``{"do": "freeze", "limit": 10}``: the guest is about to be brought to rest; ``{"do": "thawed"}``: it goes on;
- ``{"do": "give up", ...}``, as on the control socket; without a kind the run is only released, and not marked;
- ``{"do": "release"}``: the owner releases now, so nothing is to be done unless the owner dies: see `_Guard.turn`;
- ``{"do": "done"}``: all is released.

and hears on standard output, as ``{"said": ...}``: ``ready``, or ``failed`` with an error (``kind``, ``message``,
``hint``); ``warning`` with a ``message``; ``admitted`` with the number of a ``process``; ``given up`` with the error;
``released`` with what the control socket answers; ``yours`` for a release.

All is done in one thread, which never waits, and in threads of their own for what may.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import queue
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from backupcore.disk.unix_socket import listen_at
from backupcore.errors import BackupError, HypervisorError, TargetFull, dump_error, from_os_error, load_error
from backupcore.guard import SOCKET
from backupcore_libvirt.connection import Connection
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.freeze import release as release_freeze
from backupcore_libvirt.image_lock import keep_closed
from backupcore_libvirt.libvirt_errors import is_away
from backupcore_libvirt.mechanisms.letting_go import merge_overlays
from backupcore_libvirt.overlay.room import Growing
from backupcore_libvirt.release.admission import Admitted
from backupcore_libvirt.release.giving_up import Run, end_clients, give_up, mark
from backupcore_libvirt.release.own_unit import OwnUnit
from backupcore_libvirt.release.watching import WATCHES, Room, Watch

__all__ = ["guard"]

LET_GO_LIMIT = 600.0
AGAIN = 0.2
OWNER_EVERY = 1.0
DEATH_GRACE = 0.5
_LONGEST = 1 << 16
_SIGKILL = 1 << 8  # in the mask of pending signals: bit N - 1 stands for signal N


def guard(asked: dict[str, Any], reader: int | None) -> None:
    """Guard the run that is asked for, until all of it is released. Says so when it is ready."""
    unit = OwnUnit(asked["run"])
    scratch = RunFolder(Path(asked["scratch"]), asked["run"])
    run = Run(asked["uri"], asked["vm"], asked["name"], scratch, Path(asked["folder"]), asked["owner"])
    try:
        with Connection(run.uri) as connection:  # what cannot be reached now would not be in need
            connection.domain(run.vm)
        server = listen_at(run.folder / SOCKET)
    except BackupError as error:
        _say({"said": "failed", **dump_error(error)})
        return
    except OSError as error:
        found = from_os_error(error, f"the socket {run.folder / SOCKET}")
        if not isinstance(found, TargetFull):  # FUSE has ENOSYS, vfat and exFAT EPERM
            hint = "Set 'state' in the configuration to a folder on a local file system that can hold sockets."
            found = HypervisorError(found.message, hint)
        _say({"said": "failed", **dump_error(found)})
        return
    if problem := unit.wait():
        _say(
            {
                "said": "warning",
                "message": f"the process that guards the guest of VM {run.name} has no unit of its own ({problem}): if "
                "systemd kills the unit of this backup, nothing lets the guest go on before the next backup",
            }
        )
    one = _Guard(run, server, int(asked["pidfd"]), reader)
    _say({"said": "ready", "reader": reader})
    one.work()
    os._exit(0)  # a thread may still wait for a libvirtd that does not answer


def _say(what: dict[str, Any]) -> None:
    with suppress(OSError):  # the owner is gone, or stopped with a full pipe
        os.write(1, json.dumps(what).encode() + b"\n")


class _Guard:
    """What it knows of its run. `work` is the one thread that changes any of it."""

    def __init__(self, run: Run, server: socket.socket, owner: int, reader: int | None) -> None:
        self._run = run
        self._held = False
        self._phase = "watching"
        self._error: BackupError | None = None  # with which the run was given up
        self._turn_asked = False
        self._owner_lives = True
        self._listening = True  # the owner's pipe is open
        self._done = False
        self._answer: dict[str, Any] | None = None  # of the release
        self._asked_at = 0.0
        self._waiting: list[socket.socket] = []  # who wants to know what comes of it
        self._freeze_due: float | None = None
        self._stray_due: float | None = None
        self._thawing = False
        self._trying = False
        self._admitted: dict[int, Admitted] = {}
        self._watches: list[Watch] = []
        self._growing: list[Growing] = []
        self._kept = ExitStack()  # locks on what is read
        self._pipe = b""
        self._news: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._server = server
        self._owner = owner
        self._selector = selectors.DefaultSelector()
        os.set_blocking(0, False)
        os.set_blocking(1, False)
        self._on(0, self._hear_owner)
        self._on(self._bell, self._hear_news)
        self._on(self._owner, self._hear_death)
        self._on(self._server, self._accept)
        self._reader = os.pidfd_open(reader) if reader is not None else None
        if reader is not None:
            self._on(self._reader, partial(self._reap, reader))

    # The loop

    def work(self) -> None:
        """Until nothing is left to do."""
        look_due = time.monotonic()
        while not self._finished():
            due = min(look_due, *(due for due in (self._freeze_due, self._stray_due) if due is not None), math.inf)
            for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
                if self._is_on(key):  # it may have gone with one before
                    key.data()
            now = time.monotonic()
            if self._freeze_due is not None and now >= self._freeze_due:
                self._freeze_due = None
                self._thaw()
            if self._stray_due is not None and now >= self._stray_due:
                self._stray_due = None
                self._owner_strays()
            if now >= look_due:
                look_due = now + OWNER_EVERY
                self._look_at_owner()
        for connection in self._waiting:
            _answer(connection, {"released": True, "seconds": round(time.monotonic() - self._asked_at, 3), "did": []})
        self._stop_watching()

    def _finished(self) -> bool:
        if self._done:
            return True
        if self._listening and self._owner_lives:
            return False
        if not self._held:
            return True
        if self._stray_due is not None:
            return False
        return self._phase == "released" and not self._trying and not self._thawing

    def _on(self, what: Any, hear: Callable[[], None]) -> None:
        self._selector.register(what, selectors.EVENT_READ, hear)

    def _is_on(self, key: selectors.SelectorKey) -> bool:
        try:
            return self._selector.get_key(key.fileobj) is key
        except (KeyError, ValueError):
            return False

    def _off(self, what: Any) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(what)

    def _tell(self, news: Callable[[], None]) -> None:
        """Have `news` called by the one thread. From any thread."""
        self._news.put(news)
        os.eventfd_write(self._bell, 1)

    def _hear_news(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        while True:
            try:
                news = self._news.get_nowait()
            except queue.Empty:
                return
            news()

    def _reap(self, reader: int) -> None:
        self._off(self._reader)
        with suppress(ChildProcessError):
            os.waitpid(reader, os.WNOHANG)

    # The owner

    def _hear_owner(self) -> None:
        while self._listening:
            try:
                piece = os.read(0, _LONGEST)
            except BlockingIOError:
                return
            if not piece:
                self._off(0)
                self._listening = False
                self._owner_left()
                return
            self._pipe += piece
            *lines, self._pipe = self._pipe.split(b"\n")
            for line in lines:
                try:
                    self._told(json.loads(line))
                except (ValueError, TypeError, KeyError):  # a descriptor that somebody took for his own
                    self._owner_strays()

    def _told(self, what: dict[str, Any]) -> None:
        match what["do"]:
            case "hold":
                self._held = True
                self._growing = [Growing(**disk) for disk in what["room"]]
                told = (
                    lambda error: self._tell(partial(self._let_go, error)),
                    lambda line: self._tell(partial(_say, {"said": "warning", "message": line})),
                )
                watches = [WATCHES[name](self._run, *told) for name in what["watch"]]
                if self._growing:
                    watches.append(Room(self._run, *told, self._growing))
                for watch in watches:
                    watch.start()
                self._watches += watches
            case "keep":
                self._keep([Path(file) for file in what["files"]])
            case "freeze":
                self._freeze_due = time.monotonic() + float(what["limit"])
            case "thawed":
                self._freeze_due = None
            case "give up":
                self._let_go(load_error(what) if "kind" in what else None)
            case "release":
                self._turn_asked = True
                self._turn()
            case "done":
                self._done = True

    def _keep(self, files: list[Path]) -> None:
        try:
            self._kept.enter_context(keep_closed(files))
        except BackupError as error:
            _say({"said": "failed", **dump_error(error)})
        else:
            _say({"said": "kept"})

    def _turn(self) -> None:
        """Leave the release to the owner, which waits for this: never are two at work on it."""
        if not self._turn_asked or self._trying:
            return
        self._turn_asked = False
        self._kept.close()
        self._phase = "the owner releases"
        clients = self._refuse_clients()
        if not clients:
            end_clients((), self._run.owner, self._reader)
            _say({"said": "yours"})
            return

        def end() -> None:  # one that is stopped would be in the owner's way
            end_clients(clients, self._run.owner, self._reader)
            for client in clients:
                client.close()
            self._tell(partial(_say, {"said": "yours"}))

        threading.Thread(target=end, name="end clients", daemon=True).start()

    def _owner_left(self) -> None:
        """It has closed its pipe without a word: it has ended, or all its descriptors were closed."""
        if self._done or not self._owner_lives or not self._held:
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
        if not self._owner_lives or not self._held:
            return
        state = _state(self._run.owner)
        if state == "dying":
            self._owner_died()
        elif state == "stopped" and self._phase == "the owner releases" and self._error is not None:
            # It holds the release and does not go on with it, while the guest stands, or the user waits.
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._owner, signal.SIGKILL)

    def _hear_death(self) -> None:
        self._off(self._owner)
        self._hear_owner()  # what it said before it ended
        if not self._done:
            self._owner_died()

    def _owner_died(self) -> None:
        # Nothing is marked: it can neither publish nor record any more, and what it has published is complete.
        self._owner_lives = False
        self._turn_asked = False
        self._stray_due = None
        if self._held:
            self._let_go(None)

    # Giving up

    def _let_go(self, error: BackupError | None) -> None:
        """Give the run up, once, and try until it is done; a later error only marks it."""
        if self._error is None and error is not None:
            self._error = error
            _say({"said": "given up", **dump_error(error)})
            if self._trying or self._phase == "released":
                threading.Thread(target=mark, args=(self._run.folder, error), daemon=True).start()
        if self._trying or self._phase == "released":
            return
        if self._phase == "the owner releases" and self._owner_lives and self._listening:
            return  # it is at it
        self._phase = "giving up"
        self._asked_at = time.monotonic()
        self._stop_watching()
        self._kept.close()
        self._freeze_due = None
        self._thaw()
        self._try(error)

    def _try(self, error: BackupError | None) -> None:
        self._trying = True
        clients = self._refuse_clients()
        threading.Thread(target=self._work_off, args=(error, clients), name="giving up", daemon=True).start()

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
            self._tell(partial(self._answer_all, [], problem))
            time.sleep(AGAIN)
        for client in clients:
            client.close()
        if self._growing and problem is None and not self._turn_asked:
            # Nobody watches any more how they grow. The guest runs already, so whoever waits is answered before.
            self._tell(partial(self._let_go_of, did))
            did = []
            try:
                did = merge_overlays(self._run.uri, self._run.vm, self._run.scratch, lambda: self._turn_asked)
            except BackupError as found:
                if not self._turn_asked:  # else the owner tries it, and tells
                    self._tell(partial(_say, {"said": "warning", "message": found.in_full}))
        self._tell(partial(self._tried, did, problem))

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
            "seconds": round(time.monotonic() - self._asked_at, 3),
            "did": did,
            "why": problem.message if problem else "",
            "hint": problem.hint if problem else "",
        }
        _say({"said": "released", **self._answer})
        for connection in self._waiting:
            _answer(connection, self._answer)
            connection.close()
        self._waiting = []

    def _stop_watching(self) -> None:
        for watch in self._watches:
            watch.stop_asked.set()

    # The guest at rest

    def _thaw(self) -> None:
        """Let the guest go on if the run has brought it to rest; tried for ten minutes, whatever else is done."""
        if self._thawing or not (self._run.scratch.path / "freeze").exists():
            return
        self._thawing = True
        threading.Thread(target=self._thaw_until_done, name="thaw", daemon=True).start()

    def _thaw_until_done(self) -> None:
        deadline = time.monotonic() + LET_GO_LIMIT
        while True:
            try:
                with Connection(self._run.uri) as connection:
                    release_freeze(connection.domain(self._run.vm), self._run.scratch, deadline - time.monotonic())
            except HypervisorError as error:
                # libvirtd is being started anew, or was: a freeze outlives it, and a connection does not.
                if is_away(error) and time.monotonic() < deadline:
                    time.sleep(AGAIN)
                    continue
            except BackupError:
                pass  # the record stays, for the next run of the VM
            break
        self._tell(self._thawed)

    def _thawed(self) -> None:
        self._thawing = False

    # Clients and questions

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._server.accept()
            connection.setblocking(False)
            self._on(connection, partial(self._hear_question, connection, bytearray()))

    def _hear_question(self, connection: socket.socket, said: bytearray) -> None:
        try:
            piece = connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        said += piece
        if not said.endswith(b"\n"):
            if not piece or len(said) > _LONGEST:
                self._off(connection)
                connection.close()
            return
        self._off(connection)
        try:
            question = json.loads(said)
            what = question["do"]
        except (ValueError, TypeError, KeyError, RecursionError):
            what = None
        match what:
            case "admit":
                self._admit(connection)
                return
            case "give up":
                self._asked_to_give_up(connection, load_error(question))
                return
            case "status":
                _answer(connection, self._status())
            case _:
                _answer(connection, {"error": "a line of JSON with a known 'do' is needed"})
        connection.close()

    def _status(self) -> dict[str, Any]:
        return {
            "vm": self._run.vm,
            "name": self._run.name,
            "run": self._run.scratch.run,
            "owner": self._run.owner,
            "phase": self._phase,
            "given_up": dump_error(self._error) if self._error else None,
        }

    def _asked_to_give_up(self, connection: socket.socket, error: BackupError) -> None:
        if not self._trying:
            self._asked_at = time.monotonic()
        self._let_go(error)
        if self._phase == "released" and self._answer is not None:
            _answer(connection, self._answer)
            connection.close()
        else:
            self._waiting.append(connection)

    def _admit(self, connection: socket.socket) -> None:
        if self._phase != "watching":
            why = self._error or HypervisorError("its guest is being released")
            _answer(connection, {"admitted": False, **dump_error(why)})
            connection.close()
            return
        try:
            client = Admitted(connection)
        except OSError as error:
            _answer(connection, {"admitted": False, "message": str(error)})
            connection.close()
            return
        self._admitted[connection.fileno()] = client
        _say({"said": "admitted", "process": client.process})  # first: should this process die, the owner has to know
        self._on(client, partial(self._hear_client, client))
        _answer(connection, {"admitted": True})

    def _hear_client(self, client: Admitted) -> None:
        """It says nothing more; what comes is its end."""
        try:
            if client.connection.recv(64):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._off(client)
        self._admitted.pop(client.fileno(), None)
        client.close()

    def _refuse_clients(self) -> list[Admitted]:
        """Those that are admitted; from now on nobody is."""
        clients = list(self._admitted.values())
        self._admitted.clear()
        for client in clients:
            self._off(client)
        return clients


def _answer(connection: socket.socket, what: dict[str, Any]) -> None:
    with suppress(OSError):  # it did not wait
        connection.sendall(json.dumps(what).encode() + b"\n")


def _state(process: int) -> str:
    """How the owner is: "dying", "stopped", or "" for alive.

    One that was killed may be kept by a system call that cannot be interrupted: it never runs on, but its pidfd does
    not tell before that call returns, and its descriptors stay open until then.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text(errors="replace").splitlines()
    except OSError:
        return "dying"
    said = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    if said.get("State", "").startswith(("Z", "X")) or int(said.get("SigPnd", "0"), 16) & _SIGKILL:
        return "dying"
    return "stopped" if said.get("State", "").startswith(("T", "t")) else ""
