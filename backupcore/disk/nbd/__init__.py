"""An NBD client: reads the exports of QEMU (a live backup job, or `qemu-nbd`) over a unix socket.

It speaks the fixed newstyle protocol with structured replies, as the NBD project's ``doc/proto.md`` lays it
down, and only reads: NBD_CMD_READ and NBD_CMD_BLOCK_STATUS. All offsets and lengths are bytes.

One `Client` is one connection and may be used by several threads, with several requests in flight. There is
no thread of its own: of those who wait for a reply, one reads from the socket for all, straight into the
buffers of the callers.

Errors say whether the connection is gone. `RequestFailed`: the server refused one request, the connection
goes on. Everything else (`ConnectionLost`, `ProtocolError`) closes it: after a reply that breaks the protocol
nobody knows where the next one starts.
"""

from __future__ import annotations

from backupcore.disk.nbd.address import Address
from backupcore.disk.nbd.client import Client, Pending
from backupcore.disk.nbd.errors import ConnectionLost, NbdError, ProtocolError, RequestFailed
from backupcore.disk.nbd.status import ALLOCATION, DEPTH, allocation, changes, dirty, held

__all__ = [
    "ALLOCATION",
    "DEPTH",
    "Address",
    "Client",
    "ConnectionLost",
    "NbdError",
    "Pending",
    "ProtocolError",
    "RequestFailed",
    "allocation",
    "changes",
    "dirty",
    "held",
]
