"""The root of a Debian release, built of packages alone, and programs that run in it as if it were this machine.

A root is made by mmdebstrap from the Debian sources of this machine's apt, with the name of the other release in
them. It lies in .lab/hosts, named by what it is for and made of, and is never written to again: each run has a layer
over it. Once it would be made of something else, that takes its place. Programs run in it in namespaces of their own,
whose end takes whatever they started or mounted.

    python -m lab.hosts.root trixie uname -a
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lab.places import LAB, locked

FOLDER = LAB / "hosts"
SUITES = ("bookworm", "trixie")
_ENTER = Path(__file__).with_name("enter.sh")
_MMDEBSTRAP = ("--mode=root", "--variant=apt")
# What every root needs beside the packages that it is for: to be entered, and to install more.
_BASE = ("ca-certificates", "iproute2", "mount", "procps", "sudo")
_RUNS = "runs"
# Should this process be killed, what it started in namespaces ends as well, and with it all that runs in them.
_WITH_US = ("setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child", "--propagation", "private")
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


class HostNotBuilt(Exception):
    """A root or a host could not be made; the text says which, why, and what to do."""


@dataclass(frozen=True)
class Bind:
    """A file or folder of this machine that is seen in a root, at the same path unless `inside` names another."""

    source: Path
    inside: Path | None = None
    writable: bool = False


def sources(suite: str, own: str | None = None, folder: Path = Path("/etc/apt")) -> str:
    """The Debian sources of this machine's apt, for another release: the text of a deb822 file (sources.list(5)).

    Taken are the entries whose suite is this machine's release (`own`, its code name), -updates or -security of it,
    with the component main; they keep their options (signed-by, trusted). Raises `HostNotBuilt` where there is none.
    """
    own = own or _code_name()
    stanzas = []
    for file in sorted([folder / "sources.list", *folder.glob("sources.list.d/*")]):
        if file.suffix == ".list" and file.exists():
            stanzas += [entry for line in file.read_text().splitlines() if (entry := _one_line(line)) is not None]
        elif file.suffix == ".sources":
            stanzas += _stanzas(file.read_text())
    kept = []
    for stanza in stanzas:
        suites = [name for name in stanza.get("suites", "").split() if name in _of_release(own)]
        components = stanza.get("components", "").split()
        if not suites or "main" not in components or "deb" not in stanza.get("types", "").split():
            continue
        if stanza.get("enabled", "yes").lower() in ("no", "false"):
            continue
        changed = {"types": "deb", "suites": " ".join(suite + name.removeprefix(own) for name in suites)}
        lines = [f"{key}: {value}\n" for key, value in {**stanza, **changed, "components": "main"}.items()]
        if lines not in kept:
            kept.append(lines)
    if not kept:
        raise HostNotBuilt(f"{folder} has no source of Debian {own} (component main), so none for {suite} is known.")
    return "\n".join("".join(lines) for lines in kept)


def root(suite: str, packages: Sequence[str], *, purpose: str) -> Path:
    """A root of this release with these packages and what they depend on, without what they recommend; made if missing.

    One of the same `purpose` (a word) that is made of something else is removed. Raises `HostNotBuilt`.
    """
    if suite not in SUITES:
        raise HostNotBuilt(f"no root is made of {suite}: known are {', '.join(SUITES)}")
    if os.geteuid() != 0:
        raise HostNotBuilt("A root of another release is made and entered by root only: run it with sudo.")
    if shutil.which("mmdebstrap") is None:
        raise HostNotBuilt("mmdebstrap is missing: 'python3 lab/setup.py hosts' installs it.")
    apt = sources(suite)
    include = ",".join(sorted({*_BASE, *packages}))
    made_of = hashlib.sha256(f"{apt}\n{_MMDEBSTRAP}\n{include}\n".encode()).hexdigest()[:12]
    folder = FOLDER / f"root-{suite}-{purpose}-{made_of}"
    with locked(f"hosts-root-{suite}-{purpose}"):
        if not folder.exists():
            FOLDER.mkdir(exist_ok=True)
            remove_older(folder)
            _build(suite, apt, include, folder)
    return folder


def remove_older(folder: Path) -> None:
    """Remove what was made for the same as `folder`, of something else: its name but for the digest at the end."""
    kind, _, digest = folder.name.rpartition("-")
    for old in folder.parent.glob(f"{kind}-{'?' * len(digest)}*"):
        if old != folder:
            shutil.rmtree(old)


def entering(
    root: Path | Sequence[Path],
    layer: Path,
    command: Sequence[str | Path],
    *,
    binds: Sequence[Bind] = (),
    network: bool = False,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """The command line that runs `command` in a root. `layer` is a folder of .lab, for what it changes there.

    A `root` of several folders: each over the next ones, as layers that earlier commands have left (`changed`).

    The command sees its own processes only, the folder /sys of this machine, and a /dev without its disks. Its network
    is a loopback of its own unless `network`; its environment is `environment` and what any program needs.
    """
    # Propagation: what is mounted in here must not appear on the machine.
    own = [*_WITH_US, "--mount", "--pid", "--ipc", "--uts", *([] if network else ["--net"])]
    known = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
        **({name: os.environ[name] for name in _PROXIES if name in os.environ} if network else {}),
        **(environment or {}),
    }
    variables = ["env", "-i", *(f"{name}={value}" for name, value in known.items())]
    places = [
        str(part)
        for bind in binds
        for part in ("rw" if bind.writable else "ro", bind.source, bind.inside or bind.source)
    ]
    folders = ":".join(map(str, [root] if isinstance(root, Path) else root))
    enter = [str(_ENTER), folders, str(layer), "network" if network else "alone", *places, "--"]
    return [*own, "sh", *enter, *variables, *map(str, command)]


def changed(layer: Path) -> Path:
    """The folder with what a command has changed in its layer."""
    return layer / "upper"


@contextmanager
def layer() -> Iterator[Path]:
    """A layer for one run, removed afterwards."""
    with of_one_run("layer") as folder:
        yield folder


@contextmanager
def of_one_run(kind: str, base: Path = FOLDER) -> Iterator[Path]:
    """A folder that is removed at the end of the block; those whose processes were killed are removed before."""
    runs = base / _RUNS
    with ExitStack() as stack:
        with locked("hosts-runs"):
            runs.mkdir(parents=True, exist_ok=True)
            for old in runs.iterdir():
                with suppress(OSError), _alone_in(old):
                    shutil.rmtree(old)
            folder = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=runs))
            stack.enter_context(_alone_in(folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with this process. BlockingIOError where another one holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _build(suite: str, apt: str, include: str, folder: Path) -> None:
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    with of_one_run("sources") as made:
        listed = made / "debian.sources"
        listed.write_text(apt)
        # In namespaces as well: mmdebstrap mounts proc and sys in the new root, and may be killed.
        own = [*_WITH_US, "--mount", "--pid"]
        build = ["mmdebstrap", "--quiet", *_MMDEBSTRAP, f"--include={include}"]
        sys.stderr.write(f"Building a root of Debian {suite}\n")
        done = subprocess.run([*own, *build, suite, str(fresh), str(listed)], check=False)
    if done.returncode != 0:
        shutil.rmtree(fresh, ignore_errors=True)
        raise HostNotBuilt(f"mmdebstrap could not make a root of Debian {suite}; its own words are above.")
    # A package that is installed later must not start its daemons; here, no systemd takes care of that.
    (fresh / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
    (fresh / "usr/sbin/policy-rc.d").chmod(0o755)
    fresh.rename(folder)


def _code_name() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    raise HostNotBuilt("/etc/os-release has no VERSION_CODENAME: roots are made on Debian only.")


def _of_release(name: str) -> tuple[str, ...]:
    return (name, f"{name}-updates", f"{name}-security")


def _one_line(line: str) -> dict[str, str] | None:
    """An entry of the form ``deb [ option=value … ] URI suite component …`` as a stanza."""
    kind, _, rest = line.partition("#")[0].strip().partition(" ")
    if kind != "deb":
        return None
    stanza = {"types": "deb"}
    rest = rest.strip()
    if rest.startswith("["):
        options, _, rest = rest[1:].partition("]")
        stanza |= {
            name.lower(): value.replace(",", " ") for name, _, value in (o.partition("=") for o in options.split())
        }
    uri, _, rest = rest.strip().partition(" ")
    suite, _, components = rest.strip().partition(" ")
    # deb822 names these in the plural.
    for singular, plural in (("arch", "architectures"), ("lang", "languages"), ("target", "targets")):
        if singular in stanza:
            stanza[plural] = stanza.pop(singular)
    return {**stanza, "uris": uri, "suites": suite, "components": components.strip()}


def _stanzas(text: str) -> list[dict[str, str]]:
    """The stanzas of a deb822 file; continued lines (an embedded key) are kept as they are."""
    found: list[dict[str, str]] = [{}]
    name = ""
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        if not line.strip():
            found.append({})
        elif line[0] in " \t":
            found[-1][name] += f"\n{line}"
        else:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            found[-1][name] = value.strip()
    return [stanza for stanza in found if stanza]


def main() -> int:
    suite, *command = sys.argv[1:]
    try:
        made = root(suite, (), purpose="bare")
    except HostNotBuilt as error:
        sys.stderr.write(f"{error}\n")
        return 1
    with layer() as own:
        return subprocess.run(entering(made, own, command or ["bash"]), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
