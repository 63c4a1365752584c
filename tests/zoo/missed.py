"""Shapes that no backup can hold: left out by name, with exit code 3; a VM that has nothing else is refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Missed:
    """A disk that is left out. `xml` is the <disk>, whose target is `id`; `reason` what is said of it."""

    name: str
    words: str
    id: str
    xml: str
    reason: str


def network(disk: str, protocol: str, name: str, port: int) -> str:
    """A disk that another host serves."""
    return (
        f"<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='{protocol}' "
        f"name='{name}'><host name='127.0.0.1' port='{port}'/></source><target dev='{disk}' bus='virtio'/></disk>"
    )


NETWORK = "network disks (Ceph, iSCSI, NBD, HTTP …)"
MISSED = (
    Missed(
        name="rbd", words=NETWORK, id="vdp", xml=network("vdp", "rbd", "pool/disk", 6789), reason="a network disk (rbd)"
    ),
    Missed(
        name="iscsi",
        words=NETWORK,
        id="vdq",
        xml=network("vdq", "iscsi", "iqn.2026-01.com.example:disk/1", 3260),
        reason="a network disk (iscsi)",
    ),
    Missed(
        name="nbd", words=NETWORK, id="vdr", xml=network("vdr", "nbd", "disk", 10809), reason="a network disk (nbd)"
    ),
    Missed(
        name="vhost-user",
        words="disks that another process serves (vhost-user)",
        id="vds",
        xml=(
            "<disk type='vhostuser' device='disk'><driver name='qemu' type='raw'/>"
            "<source type='unix' path='/run/nobody.sock'/><target dev='vds' bus='virtio'/></disk>"
        ),
        reason="a vhostuser disk",
    ),
    Missed(
        name="vvfat",
        words="a folder shown as a disk (vvfat)",
        id="vdt",
        xml=(
            "<disk type='dir' device='disk'><driver name='qemu' type='fat'/><source dir='/srv'/>"
            "<target dev='vdt' bus='virtio'/><readonly/></disk>"
        ),
        reason="a dir disk",
    ),
    Missed(
        name="nvme",
        words="NVMe and SCSI devices of the host, passed through, with reservations or without",
        id="vdu",
        xml=(
            "<disk type='nvme' device='disk'><driver name='qemu' type='raw'/><source type='pci' managed='yes' "
            "namespace='1'><address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></source>"
            "<target dev='vdu' bus='virtio'/></disk>"
        ),
        reason="a nvme disk",
    ),
    Missed(
        name="reservations",
        words="NVMe and SCSI devices of the host, passed through, with reservations or without",
        id="sdv",
        xml=(
            "<disk type='block' device='lun'><driver name='qemu' type='raw'/><source dev='/dev/none'>"
            "<reservations managed='yes'/></source><target dev='sdv' bus='scsi'/></disk>"
        ),
        reason="a SCSI device passed through (lun)",
    ),
    Missed(
        name="shareable",
        words="shareable disks",
        id="vdw",
        xml=(
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/srv/shared.raw'/>"
            "<target dev='vdw' bus='virtio'/><shareable/></disk>"
        ),
        reason="shareable",
    ),
    Missed(
        name="vmdk",
        words="formats other than qcow2 and raw",
        id="vdx",
        xml=(
            "<disk type='file' device='disk'><driver name='qemu' type='vmdk'/><source file='/srv/old.vmdk'/>"
            "<target dev='vdx' bus='virtio'/></disk>"
        ),
        reason="format vmdk",
    ),
)
