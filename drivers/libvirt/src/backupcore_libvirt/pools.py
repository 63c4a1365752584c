"""Storage pools of libvirt as places to restore to."""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, tostring

from backupcore.errors import ConfigError, HypervisorError, NotFound, UnsupportedOperation
from backupcore.hypervisor import Pool
from backupcore.typed import typed
from backupcore_libvirt.connection import Connection, StoragePool
from backupcore_libvirt.xml import parse

__all__ = ["add_volume", "find_pool"]

_FOLDERS = ("dir", "fs", "netfs")
_DEVICES = ("logical",)
_LOCAL = ("disk", "iscsi", "iscsi-direct", "mpath", "scsi", "zfs", "vstorage")


def find_pool(connection: Connection, name: str) -> Pool:
    """The pool of that name, active and of a kind that can be restored into.

    Of kinds whose volumes are devices only `logical` can make a volume of any name and size; those of others are
    partitions, or are made on another host.
    """
    names = connection.pools()
    if name not in names:
        known = ", ".join(sorted(names)) or "none"
        raise NotFound(f"there is no storage pool {name!r:.80} on {connection.uri}", f"There are: {known}.")
    pool = connection.pool(name)
    root = parse(pool.xml())
    kind = root.get("type", "")
    if kind in _LOCAL:
        raise UnsupportedOperation(
            f"storage pool {name} is of kind {kind}: no volume can be made there for a restore",
            "Choose a device of it, and write each disk there: vmkeep restore ID --disk DISK --device PATH",
        )
    if kind not in (*_FOLDERS, *_DEVICES):
        raise UnsupportedOperation(
            f"storage pool {name} is of kind {kind}, whose volumes are neither files nor devices of this host",
            "Make a volume there and send the disk to it: vmkeep restore ID --disk DISK --format raw --to FOLDER, then "
            f"{typed('virsh vol-upload --pool', name)} VOLUME FILE",
        )
    if not pool.is_active():
        raise HypervisorError(f"storage pool {name} is not active", f"Start it: {typed('virsh pool-start', name)}")
    folder = root.findtext("target/path", "")
    return Pool(name=name, kind=kind, folder=Path(folder) if kind in _FOLDERS else None)


def add_volume(pool: StoragePool, volume: str, size: int) -> Path:
    """Make a volume of `size` bytes, all of them allocated, since libvirt makes a thin one otherwise; its device."""
    pool.refresh()
    if volume in pool.volumes():
        raise ConfigError(
            f"there is a volume {volume} already in storage pool {pool.name}",
            "Nothing is overwritten: choose another --name. If a restore that was killed has left it: "
            f"{typed('virsh vol-delete', volume, '--pool', pool.name)}",
        )
    root = Element("volume")
    SubElement(root, "name").text = volume
    SubElement(root, "capacity", unit="bytes").text = str(size)
    SubElement(root, "allocation", unit="bytes").text = str(size)
    return Path(pool.create(tostring(root, encoding="unicode")))
