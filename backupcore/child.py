"""One running program of a driver's: ended with its whole group, and never left behind.

Drivers run programs through `sh`, which the core does not import: a driver finds its program (``sh.Command``) and hands
it over. What is here is what every such driver would have to get right again.

Every program is forked by one thread that lives as long as this process. The kernel sends a child its death signal
when the *thread* that forked it ends; a caller's own thread may end long before a stream is read to its end.
"""

from __future__ import annotations

import ctypes
import fcntl
import io
import os
import select
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from backupcore.errors import BackupError, ConfigError, IntegrityError
from backupcore.life import Life
from backupcore.process import children

if TYPE_CHECKING:
    from backupcore.context import Context

__all__ = ["MOVED", "Child", "ChildStream", "bytes_moved"]

PATIENCE = 5.0
"""Seconds that a program has to clean up after SIGINT (restic removes its lock) before it is killed."""

TAIL = 16 << 10
"""How many bytes of stderr are kept, the last ones."""

MOVED = 64 << 10
"""Bytes: less is no movement. A keep-alive of ssh is some, and a connection that is refused and tried again."""

_UNSEEN = 10
"""So many times the limit for a program of which nobody can see what it moves."""

EVERY = 0.5  # seconds between two looks at what has been moved
PIPE = 1 << 20  # a pipe of the default 64 KiB costs three quarters of the throughput of a dump
PR_SET_PDEATHSIG = 1

_forker = ThreadPoolExecutor(1, thread_name_prefix="fork")  # its thread starts with the first child, not on import


class Child:
    """A program that runs until it ends, `stop` is called, the ``with`` block is left, or this process dies.

    `output` is its stdout, unbuffered. Read it to its end before `wait`: a program that cannot write does not end. It
    ends with the program, also where something that it has left behind holds on to it.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path | None = None,
    ) -> None:
        """`program` is a ``sh.Command``; it gets these arguments, this environment and nothing of ours, in `folder`."""
        # Memory, and no pipe: a Go program dies at its first word on a broken stderr. restic says a word when it gets
        # SIGINT, before it removes its lock; so it would leave the lock whenever we are killed.
        self._errors = os.memfd_create("stderr")
        self.name = Path(str(program)).name
        """That of the program, for messages: its arguments may hold what nobody should see."""
        self._lock = threading.Lock()
        self._killer: threading.Timer | None = None
        self._limit: threading.Timer | None = None
        self._code: int | None = None
        self._said: str | None = None
        self.late = False
        """True once a limit (of `within`, of `while_moving`) has passed."""
        self.late_for: tuple[str, ...] = ()
        """The names of the programs that it had started and that were there when that happened."""
        self._ended = threading.Event()
        self._below: dict[int, Life] = {}
        self.release: Callable[[], None] | None = None
        """Called after a SIGKILL. A process that waits in the kernel for a file of ours does not even end by that."""

        read, write = os.pipe()
        null = os.open(os.devnull, os.O_RDONLY)
        # An unprivileged user's pipes may be limited (fs.pipe-user-pages-soft): slower, but no less right.
        with suppress(OSError):
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE)

        def start() -> Any:
            return program(
                *arguments,
                _in=null,
                _out=write,
                _err=self._errors,
                _env=dict(environment),
                _cwd=str(folder) if folder else None,
                _new_session=True,
                _preexec_fn=_before_exec(os.getpid()),
                _bg=True,
                _bg_exc=False,
                _return_cmd=True,
            )

        try:
            self._process: Any = _forker.submit(start).result()
        except Exception as error:  # noqa: BLE001 - sh's own, for a program that cannot be executed
            os.close(read)
            os.close(self._errors)
            reason = str(error).strip().splitlines()[-1]  # above it stands the traceback of the forked process
            raise ConfigError(f"{program} could not be started: {reason}") from None
        except BaseException:
            os.close(read)
            os.close(self._errors)
            raise
        finally:
            os.close(write)
            os.close(null)
        self.output = _Output(read, self)

    @property
    def pid(self) -> int:
        """Its process ID; also that of its session and group."""
        return int(self._process.pid)

    @property
    def is_alive(self) -> bool:
        """Whether it is still there. One that has closed its stdout may be."""
        return bool(self._process.is_alive())

    @property
    def errors(self) -> str:
        """The last that it wrote to stderr."""
        if self._said is None:
            size = os.fstat(self._errors).st_size
            return os.pread(self._errors, TAIL, max(0, size - TAIL)).decode(errors="replace")
        return self._said

    def _close(self) -> None:
        if self._said is None:
            self._said = self.errors
            os.close(self._errors)

    def within(self, seconds: float) -> None:
        """Stop it unless it ends within so many seconds."""

        self._limit = threading.Timer(seconds, self.expire)
        self._limit.daemon = True
        self._limit.start()

    def while_moving(self, seconds: float, *, busy: Callable[[], bool] = lambda: True) -> None:
        """Stop it once it, and what it has started, have neither read nor written for so many seconds while `busy`.

        A question that takes long because there is much to answer goes on; one that nobody answers ends.
        """

        def watch() -> None:
            before, idle = -MOVED, 0.0
            while not self._ended.wait(min(EVERY, seconds)):
                moved = bytes_moved(self.pid)
                if not busy() or (moved is not None and moved > before + MOVED):
                    before, idle = moved or before, 0.0
                    continue
                idle += EVERY
                if idle >= seconds * (_UNSEEN if moved is None else 1):
                    self.expire()
                    return

        threading.Thread(target=watch, name="child-moves", daemon=True).start()

    def expire(self) -> None:
        """Stop it as one that is `late`."""
        self.late_for = tuple(_command(one) for one in children(self.pid))
        self.late = True
        self.stop()

    def stop(self) -> None:
        """SIGINT, and SIGKILL if it is still there after `PATIENCE`. Returns at once; from any thread, repeatable."""
        with self._lock:
            if self._code is not None or self._killer is not None:
                return
            # Those of a session of their own hear nothing of what its group is told; and once it has ended, nobody
            # knows any more whose they were.
            self._look_below()
            self._signal(signal.SIGINT)
            self._interrupt_threads()
            self._killer = threading.Timer(PATIENCE, self._kill)
            self._killer.daemon = True
            self._killer.start()

    def _interrupt_threads(self) -> None:
        """SIGINT to each further thread of a program that has some, as a Go program does.

        The kernel hands a signal to the first thread, and to no other even if that one waits in a read of a file view
        that hangs: the program would not hear of it until it is killed, and restic would leave its lock.
        """
        libc = ctypes.CDLL(None)
        with suppress(OSError):  # it has ended
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                if int(task.name) != self.pid:
                    libc.tgkill(self.pid, int(task.name), signal.SIGINT)

    def _kill(self) -> None:
        self._look_below()
        self._signal(signal.SIGKILL)
        self._kill_those_below()
        if self.release:
            self.release()
        self.output.end()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            self._process.signal_group(number)

    def wait(self) -> int:
        """Its exit code, once it has ended; negative if a signal ended it."""
        try:
            self._process.wait()
        except Exception:  # sh raises for any code but 0; what a code means is the driver's to say
            if self._process.exit_code is None:
                raise
        self._ended.set()
        with self._lock:
            self._code = int(self._process.exit_code)
            if self._killer is not None:
                self._end_group()
        for timer in (self._limit, self._killer):
            if timer is not None:
                timer.cancel()
                timer.join()  # it may be at work
        return self._code

    def _end_group(self) -> None:
        """End what it has started, and what has heard no SIGINT: a script that waits for a vault, say.

        Its number is not given again as long as there is anybody in its group.
        """
        if not Path(f"/proc/{self.pid}").exists():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self._kill_those_below()

    def _look_below(self) -> None:
        found = ((one, Life.of(one)) for one in children(self.pid))
        # One that has ended by now has no start, and its number may be somebody else's soon.
        self._below |= {one: life for one, life in found if life.started}

    def _kill_those_below(self) -> None:
        for process, life in self._below.items():
            if not life.is_over(this_host=True):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._code is None:
            self.stop()
        self.output.close()  # a writer blocked on a full pipe ends, too
        if self._code is None:
            self.wait()
        self._close()


class _Output(io.RawIOBase):
    """A child's stdout, unbuffered.

    The end of the child need not be that of the pipe: another process may hold it, as the ssh does whose connection
    others share, for as long as a server that stands still is waited for; or what the child has started in the
    background and for good, as a vault's agent. So it ends with the child, and by `end` for the reader.
    """

    def __init__(self, handle: int, child: Child) -> None:
        super().__init__()
        self._handle = handle
        self._child = child
        self._ended = os.eventfd(0, os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # a number that was closed may be another file's by now
        self._poll = select.poll()
        for one in (handle, self._ended):
            self._poll.register(one, select.POLLIN)

    def readable(self) -> bool:
        """True."""
        return True

    def fileno(self) -> int:
        """The pipe."""
        return self._handle

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with what comes next and return how much; 0 at the end."""
        if self.closed:
            raise ValueError("I/O operation on closed file")  # its number may be another file's by now
        while not (ready := {one for one, _ in self._poll.poll(EVERY * 1000)}):
            if not self._child.is_alive:
                ready = {one for one, _ in self._poll.poll(0)}  # what it has written at last
                break
        return os.readv(self._handle, [buffer]) if self._handle in ready else 0

    def end(self) -> None:
        """Let nobody wait for more, from any thread."""
        with self._lock:
            if not self.closed:
                os.eventfd_write(self._ended, 1)

    def close(self) -> None:
        """Give it up: the child gets SIGPIPE."""
        with self._lock:
            if not self.closed:
                super().close()
                os.close(self._handle)
                os.close(self._ended)


def bytes_moved(process: int) -> int | None:
    """Bytes that a process and those below it have read and written: files, pipes and sockets (proc(5), io).

    None where the kernel does not tell this user, as of a program that runs as another one (sudo), or has capabilities.
    """
    total = 0
    try:
        place = Path("/proc", str(process))
        fields = dict(line.split(": ") for line in (place / "io").read_text().splitlines())
        total = int(fields["rchar"]) + int(fields["wchar"])
        for below in place.glob("task/*/children"):
            for child in below.read_text().split():
                moved = bytes_moved(int(child))
                if moved is None:
                    return None
                total += moved
    except PermissionError:
        return None
    except OSError:  # it has ended
        pass
    return total


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def _before_exec(parent: int) -> Callable[[], None]:
    libc = ctypes.CDLL(None)  # loaded here: after a fork as little as possible should happen

    def run() -> None:
        # SIGINT and not SIGKILL, so that it can clean up when we are killed (restic removes its lock).
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:  # we died between the fork and the line above
            os._exit(1)
        # A parent started in the background of a script ignores SIGINT, and its children would, too.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    return run


class ChildStream(io.RawIOBase):
    """The stdout of a child that hands out exactly `size` bytes: what `open` of an artifact returns.

    The last bytes are handed over only once the child has ended well, so that `close` has nothing to report. `failed`
    makes the error for a child that ended with another code than 0. A stream that nobody closes ends with `ctx`.
    """

    def __init__(
        self,
        child: Child,
        size: int,
        what: str,
        failed: Callable[[Child, int], BackupError],
        ctx: Context | None,
        *,
        limit: float = 0,
    ) -> None:
        """`limit`: seconds for which a read may wait while the child moves no byte (`Child.while_moving`); 0: any."""
        super().__init__()
        self._reading = False
        if limit:
            child.while_moving(limit, busy=lambda: self._reading)
        self._child = child
        self._size = size
        self._what = what
        self._failed = failed
        self._ctx = ctx
        self._count = 0
        self._ended = False
        with ExitStack() as stack:
            stack.enter_context(child)
            if ctx is not None:
                stack.enter_context(ctx.on_cancel(child.stop))
                ctx.stack.callback(self.close)
            self._stack = stack.pop_all()

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the next bytes and return how many; 0 at the end."""
        if self._ended:
            return 0
        self._reading = True
        try:
            count = self._child.output.readinto(buffer) or 0
        finally:
            self._reading = False
        self._count += count
        if self._count > self._size:
            raise IntegrityError(f"{self._what}: more than its {self._size} bytes came")
        if count == 0 or self._count == self._size:
            self._end()
        return count

    def _end(self) -> None:
        self._reading = True  # to its end, which may not come either
        if self._child.output.read(1):
            raise IntegrityError(f"{self._what}: more than its {self._size} bytes came")
        code = self._child.wait()
        if self._ctx is not None:
            self._ctx.check()
        if code:
            raise self._failed(self._child, code)
        if self._count != self._size:
            raise IntegrityError(f"{self._what}: only {self._count} of its {self._size} bytes came")
        self._ended = True

    def close(self) -> None:
        """End the child if it still runs."""
        if not self.closed:
            super().close()
            if hasattr(self, "_stack"):  # absent where the work had been cancelled already
                self._stack.close()
