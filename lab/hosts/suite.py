"""This checkout's own tests on another Debian release, as root, in namespaces of a root of that release.

    python -m lab.hosts.suite trixie [--half] COMMAND...     a command in the checkout, set up as by `make setup`

`--half` appends what lab/hosts/half names, one path a line.

The root has what `make setup` installs, a .venv and a .lab of its own in the place of the checkout's, and, while the
command runs, no network but its loopback: whatever it needs is fetched before.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.hosts.root import FOLDER, Bind, HostNotBuilt, entering, layer, remove_older, root
from lab.hosts.wheels import wheels
from lab.places import ROOT, locked
from lab.setup import DEBIAN_PYTHON_PACKAGES, SYSTEM_PACKAGES

_MORE = ("make",)
_HALF = Path(__file__).with_name("half")
# What people set to change a run, and what says how much a test may take for granted.
_PASSED_ON = ("CI", "SECONDS", "PYTEST_ADDOPTS", "PYTEST_WORKERS", "PYTEST_TIMEOUT")


def run(suite: str, command: Sequence[str]) -> int:
    """Run a command in the checkout on this release; its exit code. Raises `HostNotBuilt`."""
    made = root(suite, [*SYSTEM_PACKAGES, *DEBIAN_PYTHON_PACKAGES, *_MORE], purpose="suite")
    pure = wheels(suite, made, purpose="suite")
    kept = FOLDER / made.name.replace("root-", "checkout-", 1)
    fetched = kept / "fetched"
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    with locked(f"hosts-suite-{suite}"), layer() as own:
        remove_older(kept)
        binds = [Bind(ROOT, writable=True)]
        for source, inside in (
            (kept / "venv", ROOT / ".venv"),
            (kept / "lab", ROOT / ".lab"),
            # Not in the layer: tests open files past the page cache, and rename folders.
            (own / "tmp", Path("/tmp")),
            (own / "var-tmp", Path("/var/tmp")),
        ):
            source.mkdir(parents=True, exist_ok=True)
            if inside.name.endswith("tmp"):
                source.chmod(0o1777)
            binds.append(Bind(source, inside, writable=True))
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(pure), "CI": "true"}

        def call(network: bool, variables: dict[str, str], *words: str | Path) -> int:
            script = ["sh", "-c", 'cd "$0" && exec "$@"', str(ROOT), *map(str, words)]
            line = entering(made, own, script, binds=[*binds, Bind(pure)], network=network, environment=variables)
            return subprocess.run(line, check=False).returncode

        python = ROOT / ".venv/bin/python"
        if call(False, offline, "python3", "lab/setup.py"):
            raise HostNotBuilt(f"{ROOT} could not be set up on Debian {suite}: see above")
        if not fetched.exists():
            if call(True, {}, "sh", "-c", f"apt-get -q update >/dev/null && exec {python} -m lab.hosts.fetch"):
                raise HostNotBuilt(f"what the tests need could not be fetched for Debian {suite}: see above")
            fetched.touch()
        return call(False, environment, "sh", "-c", _WITHOUT_NETWORKS, "sh", *command)


# libvirt would start its network "default" on its own, for which it wants a bridge.
_WITHOUT_NETWORKS = 'rm -f /etc/libvirt/qemu/networks/autostart/*; exec "$@"'


def half() -> list[str]:
    """The paths of the tests that CI runs on the other release."""
    lines = (line.partition("#")[0].strip() for line in _HALF.read_text().splitlines())
    return [line for line in lines if line]


def main() -> int:
    """Run what the command line says."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended, and its layer removed
    suite, *command = sys.argv[1:]
    if command[:1] == ["--half"]:
        command = [*command[1:], *half()]
    try:
        return run(suite, command)
    except HostNotBuilt as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
