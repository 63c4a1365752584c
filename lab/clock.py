"""A wall clock that is wrong, for one program and all that it starts: `environment` has what they need for it.

A library that is loaded first answers for the C library. Times of files stay the kernel's, and so right; what counts
seconds, and cannot be stepped on a real host either, is not touched.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

__all__ = ["available", "environment"]

_SOURCE = r"""
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long step(void) {
    const char *said = getenv("LAB_CLOCK");
    return said ? atol(said) : 0;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, id, now);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += step();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = syscall(SYS_gettimeofday, now, zone);
    if (!failed && now) now->tv_sec += step();
    return failed;
}

time_t time(time_t *kept) {
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
    if (kept) *kept = now.tv_sec;
    return now.tv_sec;
}
"""


def available() -> bool:
    """Whether there is a compiler here."""
    return shutil.which("cc") is not None


def environment(seconds: int, folder: Path) -> dict[str, str]:
    """What a program has to find in its environment for its clock to be so many seconds ahead; behind, below 0.

    The library is made in `folder` when it is needed first.
    """
    library = folder / "clock.so"
    if not library.exists():
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), "-x", "c", "-"]
        subprocess.run(command, input=_SOURCE, text=True, check=True)
    return {"LD_PRELOAD": str(library), "LAB_CLOCK": str(seconds)}
