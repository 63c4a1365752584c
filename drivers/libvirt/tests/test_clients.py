"""Who is connected to a socket is seen in whichever namespace, and with whichever /proc, a hardened unit runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from backupcore_libvirt.release.clients import connected

ASK = """
import sys
from pathlib import Path
from backupcore_libvirt.release.clients import connected
print(connected(Path(sys.argv[1])))
"""
FREEZE = """
from backupcore.errors import HypervisorError
from backupcore_libvirt.freeze_record import FreezeRecord
try:
    FreezeRecord.now("SUSPEND", "the VM", 1)
except HypervisorError as error:
    print(error.in_full)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize(
    "unit",
    [[], ["unshare", "--net"], ["unshare", "--mount", "sh", "-c", 'mount -t proc -o subset=pid p /proc; "$0" "$@"']],
)
def test_a_client_is_seen(tmp_path: Path, unit: list[str]):
    """As with PrivateNetwork=yes and ProcSubset=pid: the socket is QEMU's, in the host's network namespace."""
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(path))
        server.listen()
        assert connected(path) == 0
        client.connect(str(path))
        command = [*unit, sys.executable, "-c", ASK, str(path)]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "1\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_freeze_is_refused_in_words_where_the_boot_of_the_host_cannot_be_told():
    """As with ProcSubset=pid."""
    unit = ["unshare", "--mount", "sh", "-c", 'mount -t proc -o subset=pid p /proc; "$0" "$@"']
    done = subprocess.run([*unit, sys.executable, "-c", FREEZE], check=True, capture_output=True, text=True)
    assert "a freeze of the guest cannot be put down" in done.stdout
