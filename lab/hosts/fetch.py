"""Fetch what tests unpack of Debian's packages, for a machine without a network: `python -m lab.hosts.fetch`."""

from __future__ import annotations

from lab import kernel, servers

if __name__ == "__main__":
    kernel.files(agent=True)
    kernel.firmware()
    servers.fetch()
