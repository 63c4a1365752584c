"""The owner's end of the process that guards its run: `Guard`."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from backupcore import guard as core
from backupcore import verdict
from backupcore.context import Context
from backupcore.disk.nbd.admission import leaves
from backupcore.errors import (
    BackupError,
    Cancelled,
    HypervisorError,
    TargetFull,
    dump_error,
    from_os_error,
    load_error,
)
from backupcore.process import stopped
from backupcore.thread import aside
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.image_lock import keep_closed
from backupcore_libvirt.libvirt_errors import is_away
from backupcore_libvirt.mechanisms.letting_go import let_go
from backupcore_libvirt.overlay.room import Growing
from backupcore_libvirt.reading.still import Stamps, require_still, require_unwritten, stamps
from backupcore_libvirt.release.giving_up import DEATH_LIMIT, mark

__all__ = ["Guard"]

START_LIMIT = 30.0
RELEASE_LIMIT = 10.0
TURN_LIMIT = 90.0
INSTEAD_LIMIT = 60.0
LOOK_EVERY = 1.0
FAIL_LIMIT = 1.0
# -I and the parent's own path: the child must not import what lies in the current folder. It reads no more than what is
# for it: what follows belongs to its loop.
_CHILD = (
    "import json, os, sys; asked = json.loads(os.read(0, int(os.read(0, 8), 16))); sys.path[:] = asked['path']; "
    "from backupcore_libvirt.release.start import main; main(asked)"
)


class Guard:
    """The process that guards one run of a VM (its UUID and name), from its start to the release of all that it holds.

    Made before anything is held; it needs a moment to get ready, so that other work is done meanwhile. `serve` is a
    function (``MODULE:FUNCTION``) that a process forked from it at once shall run, and two sockets: `control`, and its
    other end, which that function gets. What the guard finds makes the run of `ctx` fail; a cancel of `ctx` makes the
    guard give it up.
    """

    def __init__(
        self,
        uri: str,
        vm: str,
        name: str,
        folder: RunFolder,
        ctx: Context,
        *,
        installation: str = "",
        serve: tuple[str, socket.socket, socket.socket] | None = None,
    ) -> None:
        self.folder = folder
        self.name = name
        self.control = serve[1] if serve is not None else None
        self.reader = 0
        """The number of the process that was forked to serve, once the guard is ready."""
        self._uri = uri
        self._vm = vm
        self._installation = installation
        self._ctx = ctx
        self._held = False
        self._gone = False  # the process
        self._over = False
        self._clients: dict[int, int] = {}  # the pidfd of each process that may be connected, by its number
        self._taken = False  # the release is the owner's
        self._heard_first = threading.Event()
        self._refusal: BackupError | None = None
        self._kept = threading.Event()
        self._released = threading.Event()
        self._yours = threading.Event()
        self._at_work = threading.Lock()  # on the release, in this process
        self._sending = threading.Lock()
        self._child = self._start(serve)
        assert self._child.stdin is not None
        self._pipe = os.fstat(self._child.stdin.fileno())
        ctx.stack.callback(self._close)
        self._listener = _Listener(self)
        self._listener.start()
        ctx.on_release(self._release)
        ctx.stack.enter_context(ctx.on_cancel(self._cancelled))

    @classmethod
    def of(cls, run: str) -> Guard | None:
        """The guard of a run that this process is at: a plugin keeps no state of a run, its guard's thread does."""
        for thread in threading.enumerate():
            if isinstance(thread, _Listener) and thread.guard.folder.run == run and thread.guard.lives:
                return thread.guard
        return None

    @property
    def process(self) -> int:
        """Its number."""
        return self._child.pid

    @property
    def admission(self) -> str:
        """Where whoever reads the guest's disks asks for the leave first; see `backupcore.disk.nbd.Address`."""
        return str(self._ctx.folder.absolute() / core.SOCKET)

    @property
    def lives(self) -> bool:
        """False once all is released, or it has ended by itself and what it had to do was done here."""
        return not self._over

    # What the run tells it

    def require_ready(self) -> None:
        """Wait until it is ready for whatever may happen. HypervisorError if it cannot be; TargetFull."""
        if not self._heard_first.wait(START_LIMIT):
            self._refusal = HypervisorError(f"it said nothing within {START_LIMIT:.0f} s")
        if self._refusal is not None:
            kind = TargetFull if isinstance(self._refusal, TargetFull) else HypervisorError
            raise kind(
                f"the process that guards the guest of VM {self.name} could not be started: {self._refusal.message}",
                self._refusal.hint,
            ) from self._refusal

    def hold(self, *watch: str, room: Sequence[Growing] = ()) -> None:
        """From now on something may be held of the guest: look for these (`watching.WATCHES`). Waits until ready.

        `room` are the disks whose overlays grow meanwhile; they are merged when the run is given up.
        """
        self.require_ready()
        self._held = True
        if self._gone:  # it ended while nothing was held, so nobody was told
            raise self._ended_early()
        self._say("hold", watch=watch, room=[asdict(disk) for disk in room])

    def keep_closed(self, files: Sequence[str], there: Sequence[str] = (), *, unwritten: Sequence[str] = ()) -> None:
        """Have the guard hold QEMU's lock on these files until the release, so that nobody writes to what is read.

        Not this process, which may be stopped, and the lock would hinder the merge then. Where one is written to all
        the same, or one of `there` vanishes, the run is given up: at the latest when all was read, before it is
        recorded. So it is where somebody opens a device of `unwritten` for writing. Busy where somebody has one of the
        files open for writing; HypervisorError.
        """
        paths = [Path(file) for file in files]
        with keep_closed(paths):
            try:
                before = stamps(files)
            except OSError as error:
                raise from_os_error(error, f"the disks of VM {self.name}") from error
            self._ctx.on_complete(partial(self._require_still, before, there, unwritten))
            self._say("keep", stamps=before, there=there, unwritten=unwritten)
            if not self._kept.wait(START_LIMIT) or self._refusal is not None:
                raise self._refusal or HypervisorError(
                    f"the process that guards the guest of VM {self.name} does not answer", "Run the backup again."
                )

    def _require_still(self, before: Stamps, there: Sequence[str], unwritten: Sequence[str]) -> None:
        if self._taken:  # of an attempt that came to nothing; its overlays are merged by now
            return
        try:
            require_still(self.name, before, there)
            require_unwritten(self.name, unwritten)
        except OSError as error:
            raise from_os_error(error, f"the disks of VM {self.name}, which were read") from error

    def freezing(self, limit: float) -> None:
        """The guest is about to be brought to rest; unless `thawed` is told within `limit` seconds, it is let go on."""
        self._say("freeze", limit=limit)

    def thawed(self) -> None:
        """The guest goes on."""
        self._say("thawed")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Release what the run holds in this block, and have the guard end then; while that is at it, it is waited for.

        Where the block raises, the guard goes on trying for some minutes once the context of the run is closed.
        """
        self._taken = True
        self._say("release")
        if not self._held or not self._yours.wait(TURN_LIMIT):
            self._child.kill()  # whatever it hangs in: it holds nothing that outlives it
        with self._at_work:
            yield
        self._over = True
        self._say("done")
        self._listener.join(1.0)

    # What it hears

    def hear(self) -> None:
        """Listen until the process ends. Runs in a thread of its own."""
        assert self._child.stdout is not None
        pipe, said = self._child.stdout.fileno(), b""
        looks = 0  # at which it was stopped, one after the other
        while True:
            try:
                readable, _, _ = select.select([pipe], [], [], LOOK_EVERY)
                piece = os.read(pipe, 65536) if readable else b""
            except (OSError, ValueError):  # something in this process has closed it; the guard sees that, too
                self._child.wait()
                break
            if not readable:
                # One that is stopped does not notice when the guest stands: better none than that.
                looks = looks + 1 if stopped(self._child.pid) else 0
                if looks == 2:
                    self._child.kill()
                continue
            if not piece:
                self._child.wait()
                break
            *lines, said = (said + piece).split(b"\n")
            try:
                for line in lines:
                    self._told(json.loads(line))
            except (ValueError, TypeError, KeyError):  # closed by something, and the number is another file's by now
                self._child.wait()
                break
        self._ended()

    def _told(self, what: dict[str, Any]) -> None:
        match what["said"]:
            case "ready":
                self.reader = int(what["reader"] or 0)
                with suppress(OSError):  # there is none, or it has ended
                    self._clients[self.reader] = os.pidfd_open(self.reader)
                self._heard_first.set()
            case "failed":
                self._refusal = load_error(what)
                self._heard_first.set()
                self._kept.set()
            case "kept":
                self._kept.set()
            case "warning":
                self._ctx.log.warning("%s", what["message"])
            case "given up":
                self._fail(load_error(what))
            case "released":
                for line in what["did"]:
                    self._ctx.log.info("VM %s: %s", self.name, line)
                if what["released"]:
                    self._released.set()
            case "admitted":
                if what["process"] not in self._clients:
                    with suppress(OSError):  # it has ended
                        self._clients[what["process"]] = os.pidfd_open(what["process"])
            case "yours":
                self._yours.set()

    def _fail(self, error: BackupError) -> None:
        # Callbacks of the run are called for this, and one may hang; what else is said must be heard.
        aside(partial(self._ctx.fail, error), "fail")
        # What breaks because the readers are ended must not pass for the cause.
        deadline = time.monotonic() + FAIL_LIMIT
        while not self._ctx.cancelled and time.monotonic() < deadline:
            time.sleep(0.001)

    def _ended(self) -> None:
        if not self._heard_first.is_set():
            self._refusal = HypervisorError("it ended")
            self._heard_first.set()
        self._gone = True
        if self._held and not self._taken:
            error: BackupError = self._ended_early()
            with suppress(OSError):
                error = verdict.given_up(self._ctx.folder) or error
            self._fail(error)
            self._do_instead(error)
        for process, handle in self._clients.items():
            if _is_handle_of(handle, process):
                os.close(handle)
        self._kept.set()
        self._released.set()
        self._yours.set()

    def _ended_early(self) -> HypervisorError:
        return HypervisorError(
            f"the process that guards the guest of VM {self.name} has ended; the backup was given up, since nothing "
            "would let the guest go on if this process died, too",
            "Run it again. Was it killed, by the OOM killer perhaps ('dmesg' shows it)?",
        )

    def _do_instead(self, error: BackupError) -> None:
        """Give the run up in this process: the main thread may hang in a write to the datastore."""
        mark(self._ctx.folder, error)
        deadline = time.monotonic() + INSTEAD_LIMIT
        with self._at_work:
            self._end_clients()
            while True:
                try:
                    let_go(self._uri, self._vm, self.folder)
                except BackupError as problem:
                    if is_away(problem) and time.monotonic() < deadline:
                        time.sleep(0.2)
                        continue
                    self._ctx.log.warning("VM %s: %s", self.name, problem.in_full)
                return

    def _end_clients(self) -> None:
        """What the guard would have done: nobody may be about to connect when the job is ended.

        Those of this process lost their leave with the guard, and close by themselves.
        """
        others = [
            handle
            for process, handle in self._clients.items()
            if process != os.getpid() and _is_handle_of(handle, process)
        ]
        ended = select.poll()
        for handle in others:
            with suppress(OSError):  # it has ended
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            ended.register(handle, select.POLLIN)
        deadline = time.monotonic() + DEATH_LIMIT
        while (len(ended.poll(0)) < len(others) or leaves(self.admission)) and time.monotonic() < deadline:
            time.sleep(0.01)

    # What the context of the run calls

    def _release(self) -> None:
        """Nothing more is read: let the guest go now, and return when that is done. The run is not marked for it."""
        if not self._held or self._taken:
            return
        self._say("give up")
        self._released.wait(RELEASE_LIMIT)

    def _cancelled(self) -> None:
        if self._held and not self._taken:
            self._say("give up", **dump_error(self._ctx.failure or Cancelled("cancelled")))

    # The process

    def _start(self, serve: tuple[str, socket.socket, socket.socket] | None) -> subprocess.Popen[bytes]:
        handle = os.pidfd_open(os.getpid())
        passed = (handle, serve[2].fileno()) if serve is not None else (handle,)
        asked = {
            "path": sys.path,
            "uri": self._uri,
            "vm": self._vm,
            "name": self.name,
            "installation": self._installation,
            "scratch": str(self.folder.scratch),
            "run": self.folder.run,
            "folder": str(self._ctx.folder.absolute()),
            "owner": os.getpid(),
            "pidfd": handle,
            "serve": serve[0] if serve is not None else "",
            "reader": passed[-1],
        }
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-c", _CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=passed,
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the run
                bufsize=0,
            )
        except OSError as error:
            raise HypervisorError(
                f"the process that guards the guest of VM {self.name} could not be started: {error.strerror}",
                "The limits of this process may be too low: see ulimit -n and ulimit -u.",
            ) from error
        finally:
            os.close(handle)
            if serve is not None:
                serve[2].close()
        assert child.stdin is not None
        line = json.dumps(asked).encode()
        with suppress(BrokenPipeError):  # it has ended already, and says nothing more
            child.stdin.write(b"%08x" % len(line) + line)
        return child

    def _say(self, what: str, **more: object) -> None:
        assert self._child.stdin is not None
        with self._sending, suppress(OSError, ValueError):  # it has ended, or all is over
            # Where a plugin has closed it, the number may be the catalog's by now.
            if os.path.samestat(os.fstat(self._child.stdin.fileno()), self._pipe):
                self._child.stdin.write(json.dumps({"do": what, **more}).encode() + b"\n")

    def _close(self) -> None:
        self._taken = self._over = True
        if not self._held:
            self._child.kill()
        assert self._child.stdin is not None
        with self._sending, suppress(OSError, ValueError):
            if os.path.samestat(os.fstat(self._child.stdin.fileno()), self._pipe):
                self._child.stdin.close()
        if self.control is not None:
            self.control.close()
        # Else it is still at work, and stays until the guest goes on.
        self._listener.join(1.0)
        if not self._listener.is_alive():
            assert self._child.stdout is not None
            self._child.stdout.close()


class _Listener(threading.Thread):
    """The thread that hears the guard of one run."""

    def __init__(self, guard: Guard) -> None:
        super().__init__(name=f"guard-{guard.folder.run}", daemon=True)
        self.guard = guard

    def run(self) -> None:
        self.guard.hear()


def _is_handle_of(handle: int, process: int) -> bool:
    """Whether this is a pidfd of that process, living or not: a plugin may have closed it, and the number be another's.

    The line "Pid:" of /proc/PID/fdinfo, see pidfd_open(2) and the kernel's Documentation/filesystems/proc.rst.
    """
    try:
        lines = Path(f"/proc/self/fdinfo/{handle}").read_text().splitlines()
    except OSError:
        return False
    return any(line.split() in (["Pid:", str(process)], ["Pid:", "-1"]) for line in lines)
