"""Which disks of a definition a backup holds."""

from __future__ import annotations

import pytest

from backupcore_libvirt.disks import source_disks


def parsed(inner: str, *, kind: str = "file", device: str = "disk"):
    disk = f"<disk type='{kind}' device='{device}'>{inner}<target dev='vda' bus='virtio'/></disk>"
    (found,) = source_disks(f"<domain><devices>{disk}</devices></domain>")
    return found


FILE = "<driver name='qemu' type='qcow2'/><source file='/a'/>"


@pytest.mark.parametrize(
    ("inner", "kind", "device", "reason"),
    [
        (FILE, "file", "cdrom", "a CD-ROM"),
        (FILE, "file", "floppy", "a floppy"),
        ("<source dev='/dev/sda'/>", "block", "lun", "a SCSI device passed through (lun)"),
        ("", "file", "disk", "empty"),
        (FILE + "<readonly/>", "file", "disk", "read-only"),
        (FILE + "<shareable/>", "file", "disk", "shareable: others write to it"),
        (FILE + "<transient/>", "file", "disk", "transient: what the guest writes"),
        ("<source protocol='rbd' name='pool/a'/>", "network", "disk", "a network disk (rbd)"),
        ("<source type='pci'/>", "nvme", "disk", "a nvme disk"),
        ("<driver type='vmdk'/><source file='/a'/>", "file", "disk", "format vmdk"),
    ],
)
def test_what_is_left_out(inner, kind, device, reason):
    assert parsed(inner, kind=kind, device=device).left_out.startswith(reason)


@pytest.mark.parametrize(
    ("inner", "kind", "path", "form"),
    [
        (FILE, "file", "/a", "qcow2"),
        ("<source file='/a'/>", "file", "/a", "raw"),
        ("<driver type='raw'/><source dev='/dev/vg/a'/>", "block", "/dev/vg/a", "raw"),
        ("<driver type='qcow2'/><source pool='p' volume='v'/>", "volume", "p/v", "qcow2"),
    ],
)
def test_what_is_held(inner, kind, path, form):
    disk = parsed(inner, kind=kind)
    assert (disk.id, disk.path, disk.format, disk.left_out, disk.encrypted) == ("vda", path, form, "", False)


def test_encryption_is_seen_wherever_it_stands():
    luks = "<encryption format='luks'><secret type='passphrase' uuid='x'/></encryption>"
    assert parsed(f"<source file='/a'>{luks}</source>").encrypted
    assert parsed(f"<source file='/a'/>{luks}").encrypted
