"""Build the hosts and run their tests: `make test-hosts`."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys

from lab.hosts import boot
from lab.hosts.host import HOSTS, build
from lab.hosts.root import HostNotBuilt
from lab.hosts.selection import chosen


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-hosts", description=__doc__)
    parser.add_argument("--host", choices=[host.suite for host in HOSTS], help="one of them (default: all)")
    parser.add_argument("--soak", action="store_true", help="also what takes long")
    parser.add_argument("--seconds", type=float, help="when a host is given up (default: 30 minutes; soak: 5 hours)")
    parser.add_argument("--options", default="", help="further options of pytest")
    parser.add_argument("tests", nargs="*", help="names of tests, instead of those of lab/hosts/selection.py")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    if asked.host is None:
        return _each_by_itself()
    (host,) = (host for host in HOSTS if host.suite == asked.host)
    seconds = asked.seconds or (5 * 3600 if asked.soak else 1800)
    names = asked.tests or chosen(host.suite, soak=asked.soak)
    try:
        passed = boot.run(host, build(host), names, options=asked.options.split(), seconds=seconds)
    except HostNotBuilt as error:
        print(f"[{host.name}] not built: {error}", flush=True)
        return 1
    return 0 if passed else 1


def _each_by_itself() -> int:
    """All hosts, side by side: a process for each, so that Ctrl-C ends them all."""
    command = [sys.executable, "-m", "lab.hosts", *sys.argv[1:], "--host"]
    started = [subprocess.Popen([*command, host.suite]) for host in HOSTS]
    try:
        return max(process.wait() for process in started)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
