"""One running program, through `sh`: ended with its whole group, and never left behind.

Every program is forked by one thread that lives as long as this process. The kernel sends a child its death signal
when the *thread* that forked it ends; a caller's own thread may end long before a stream is read to its end.
"""

from __future__ import annotations

import ctypes
import fcntl
import io
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from backupcore.errors import ConfigError

__all__ = ["Child"]

PATIENCE = 5.0
"""Seconds that a program has to clean up after SIGINT (restic removes its lock) before it is killed."""

TAIL = 16 << 10
"""How many bytes of stderr are kept, the last ones."""

PIPE = 1 << 20  # a pipe of the default 64 KiB costs three quarters of the throughput of a dump
PR_SET_PDEATHSIG = 1

_forker = ThreadPoolExecutor(1, thread_name_prefix="fork")  # its thread starts with the first child, not on import


class Child:
    """A program that runs until it ends, `stop` is called, the ``with`` block is left, or this process dies.

    `output` is its stdout, unbuffered. Read it to its end before `wait`: a program that cannot write does not end.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None) -> None:
        import sh  # noqa: PLC0415 - 0.05 s that only those pay who start a program

        try:
            program = sh.Command(command[0], search_paths=environment.get("PATH", os.defpath).split(os.pathsep))
        except sh.CommandNotFound:
            raise ConfigError(
                f"the program {command[0]} is not installed, or not executable",
                "Install it (Debian, Ubuntu: apt-get install restic), or name it by the option binary.",
            ) from None
        # Memory, and no pipe: a Go program dies at its first word on a broken stderr. restic says a word when it gets
        # SIGINT, before it removes its lock; so it would leave the lock whenever we are killed.
        self._errors = os.memfd_create("stderr")
        self._lock = threading.Lock()
        self._killer: threading.Timer | None = None
        self._limit: threading.Timer | None = None
        self._code: int | None = None
        self._said: str | None = None
        self.late = False
        """True once the limit of `within` has passed."""
        self.release: Callable[[], None] | None = None
        """Called after a SIGKILL. A process that waits in the kernel for a file of ours does not even end by that."""

        read, write = os.pipe()
        null = os.open(os.devnull, os.O_RDONLY)
        # An unprivileged user's pipes may be limited (fs.pipe-user-pages-soft): slower, but no less right.
        with suppress(OSError):
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE)

        def start() -> Any:
            return program(  # type: ignore[call-overload]  # sh takes a file descriptor for _in; its types do not say
                *command[1:],
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
        except sh.ForkException as error:
            os.close(read)
            os.close(self._errors)
            reason = str(error).strip().splitlines()[-1]  # above it stands the child's traceback
            raise ConfigError(f"{command[0]} could not be started: {reason}") from None
        except BaseException:
            os.close(read)
            os.close(self._errors)
            raise
        finally:
            os.close(write)
            os.close(null)
        self.output = io.FileIO(read)

    @property
    def pid(self) -> int:
        """Its process ID; also that of its session and group."""
        return int(self._process.pid)

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

        def expire() -> None:
            self.late = True
            self.stop()

        self._limit = threading.Timer(seconds, expire)
        self._limit.daemon = True
        self._limit.start()

    def stop(self) -> None:
        """SIGINT, and SIGKILL if it is still there after `PATIENCE`. Returns at once; from any thread, repeatable."""
        with self._lock:
            if self._code is not None or self._killer is not None:
                return
            self._signal(signal.SIGINT)
            self._killer = threading.Timer(PATIENCE, self._kill)
            self._killer.daemon = True
            self._killer.start()

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        if self.release:
            self.release()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            self._process.signal_group(number)

    def wait(self) -> int:
        """Its exit code, once it has ended; negative if a signal ended it."""
        import sh  # noqa: PLC0415 - as above

        with suppress(sh.ErrorReturnCode):
            self._process.wait()
        with self._lock:
            self._code = int(self._process.exit_code)
        for timer in (self._limit, self._killer):
            if timer is not None:
                timer.cancel()
                timer.join()  # it may be at work
        return self._code

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


def _before_exec(parent: int) -> Callable[[], None]:
    libc = ctypes.CDLL(None)  # loaded here: after a fork as little as possible should happen

    def run() -> None:
        # SIGINT and not SIGKILL, so that restic removes its lock when we are killed.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:  # we died between the fork and the line above
            os._exit(1)
        # A parent started in the background of a script ignores SIGINT, and its children would, too.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    return run
