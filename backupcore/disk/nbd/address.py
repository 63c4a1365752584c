"""Where a disk is served: what can be pickled of a connection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backupcore.disk.nbd.client import Client

__all__ = ["Address"]


@dataclass(frozen=True)
class Address:
    """An export: the path of a unix socket, and a name ("" is the server's default export).

    `peer` is the process that has to be the server, where others could put a socket of theirs in its place.
    `admission` is the path of the socket where the leave to connect is asked for first, see
    `backupcore.disk.nbd.admission`; "" where nobody has to be asked. `disk` is what messages call it, where a person
    knows the disk and not the socket ("disk vda of VM web1").
    """

    socket: str
    export: str = ""
    peer: int | None = None
    admission: str = ""
    disk: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.disk or f"NBD export {self.export!r} on {self.socket}"

    def connect(self) -> Client:
        """A new connection, for reads; what `backupcore.disk.qcow2.DiskArtifact` calls."""
        from backupcore.disk.nbd.client import Client  # noqa: PLC0415 - which needs this module

        return Client(self)
