"""What others ask libvirt of VMs while these are backed up, without a pause: `with Poller(uri, prefix) as poller: ...`.

An exporter's `domstats --block`, virt-manager's `domblkinfo`, and our own listing, each in a thread of a process of its
own. Only VMs whose names begin with `prefix` are asked of: others of this host may be at work that this would kill.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.etree import ElementTree

import libvirt

from backupcore_libvirt.plugin import Libvirt
from lab.places import ROOT

_LIMIT = 60.0


class Poller:
    """Asks from the beginning of the block to its end; `asked` then says how often, by question."""

    def __init__(self, uri: str, prefix: str) -> None:
        self._command = [sys.executable, "-m", "lab.poller", uri, prefix]
        self.asked: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        said, _ = self._process.communicate(timeout=_LIMIT)  # which closes its input
        self.asked = json.loads(said)


class _Questions:
    def __init__(self, uri: str, prefix: str) -> None:
        self._uri = uri
        self._prefix = prefix
        self._connection = libvirt.open(uri)
        self._ours = Libvirt(uri, Path(tempfile.gettempdir(), "no-scratch"))

    def _domains(self) -> list[libvirt.virDomain]:
        active = self._connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        return [domain for domain in active if domain.name().startswith(self._prefix)]

    def domstats(self) -> None:
        if domains := self._domains():
            flags = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_BACKING
            self._connection.domainListGetStats(domains, libvirt.VIR_DOMAIN_STATS_BLOCK, flags)

    def domblkinfo(self) -> None:
        for domain in self._domains():
            with suppress(libvirt.libvirtError):  # it may just have ended
                for target in ElementTree.fromstring(domain.XMLDesc()).iterfind("devices/disk/target"):
                    domain.blockInfo(target.get("dev"))

    def listing(self) -> None:
        self._ours.vms()


def main() -> None:
    uri, prefix = sys.argv[1:]
    libvirt.registerErrorHandler(lambda *_: None, None)
    ended = threading.Event()
    asked = dict.fromkeys(("domstats", "domblkinfo", "listing"), 0)

    def ask(name: str, question: Callable[[], None]) -> None:
        while not ended.is_set():
            with suppress(libvirt.libvirtError):
                question()
            asked[name] += 1

    threads = [
        threading.Thread(target=ask, args=(name, getattr(_Questions(uri, prefix), name)), daemon=True) for name in asked
    ]
    for thread in threads:
        thread.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join(_LIMIT / 2)
    sys.stdout.write(json.dumps(asked))


if __name__ == "__main__":
    main()
