"""What a disk's definition says beyond its file, and the headers of its images: it is known, or refused while off."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from backupcore.errors import UnsupportedOperation
from backupcore_libvirt.backing import Backing, backing_of
from backupcore_libvirt.disks import SourceDisk, source_disks
from backupcore_libvirt.qcow2_header import Header, files_of, header_of
from backupcore_libvirt.scratch import Owner
from backupcore_libvirt.source import PLAIN, Part, Source
from backupcore_libvirt.stopped import check_files, stopped_nodes


def disk_of(source: str, *, form: str = "qcow2", more: str = "") -> SourceDisk:
    (found,) = source_disks(
        f"<domain><devices><disk type='file' device='disk'><driver type='{form}'/>{source}"
        f"<target dev='vda' bus='virtio'/>{more}</disk></devices></domain>"
    )
    return found


SLICE = "<slices><slice type='storage' offset='10' size='20'/></slices>"
STORE = "<dataStore type='file'><format type='raw'/><source file='/d'{}>{}</source></dataStore>"
ON = "<backingStore type='file'><format type='qcow2'/><source file='{}'/>{}</backingStore>"


@pytest.mark.parametrize(
    ("inner", "more", "expected"),
    [
        ("<seclabel model='dac' relabel='no'/><privateData/>", "", PLAIN),
        (SLICE, "", Source(part=Part(10, 20))),
        (SLICE.replace("storage", "format"), "", Source(unknown=("slices",))),
        (SLICE.replace("</slices>", "<slice/></slices>"), "", Source(unknown=("slices",))),
        (STORE.format("", ""), "", Source(data_file="/d")),
        (STORE.format("", SLICE), "", Source(unknown=("dataStore",))),
        (STORE.format(" fdgroup='g'", ""), "", Source(unknown=("dataStore",))),
        ("<cookies/>", "", Source(unknown=("cookies",))),
        ("", "<backingStore/>", Source(ends=True)),
        ("", ON.format("/b", ON.format("/c", "")), Source(below=("/b", "/c"))),
        ("", ON.format("/b", "<backingStore/>"), Source(below=("/b",), ends=True)),
        ("", ON.format("/b", "").replace("file='/b'", "pool='p' volume='v'"), Source(below=("",))),
        ("", "<backingStore type='network'><source name='x'/></backingStore>", Source(unknown=("backingStore/name",))),
        (
            "",
            "<backingStore><source file='/b'><slices/></source></backingStore>",
            Source(unknown=("backingStore/slices",)),
        ),
    ],
)
def test_what_a_definition_says_of_a_source(inner, more, expected):
    assert disk_of(f"<source file='/a' index='1'>{inner}</source>", more=more).source == expected


def test_an_attribute_that_is_not_known():
    assert disk_of("<source file='/a' fdgroup='g'/>").source.unknown == ("@fdgroup",)


@pytest.mark.parametrize(
    ("piece", "unknown"),
    [
        (("type='qcow2'", "type='qcow2' name='qemu' cache='none' discard='unmap' iothread='1' queues='4'"), ()),
        (("type='qcow2'", "type='qcow2' name='phy'"), ("driver/@name=phy",)),
        (("type='qcow2'", "type='qcow2' sparse_view='on'"), ("driver/@sparse_view",)),
        (("<driver type='qcow2'/>", "<driver type='qcow2'><throttle/></driver>"), ("driver/throttle",)),
        (("<driver type='qcow2'/>", "<driver type='qcow2'><metadata_cache/></driver>"), ()),
        (("bus='virtio'", "bus='virtio' removable='on' rotation_rate='1' tray='open'"), ()),
        (("bus='virtio'", "bus='virtio' window='2'"), ("target/@window",)),
    ],
)
def test_drivers_and_targets_that_are_not_known(piece, unknown):
    text = (
        "<domain><devices><disk type='file' device='disk'><driver type='qcow2'/><source file='/a'/>"
        "<target dev='vda' bus='virtio'/></disk></devices></domain>"
    )
    (found,) = source_disks(text.replace(*piece))
    assert found.source.unknown == unknown


def test_a_disk_without_which_the_vm_starts():
    assert disk_of("<source file='/a' startupPolicy='optional'/>").source.optional
    assert not disk_of("<source file='/a' startupPolicy='requisite'/>").source.optional


FILE = {"driver": "file", "filename": "/b"}


@pytest.mark.parametrize(
    ("options", "shape", "expected"),
    [
        ({"driver": "qcow2", "file": FILE}, "qcow2", Backing("/b", "qcow2")),
        ({"driver": "raw", "file": FILE}, None, Backing("/b", "raw")),
        ({"file.filename": "/b", "driver": "qcow2"}, "qcow2", Backing("/b", "qcow2")),
        ({"file": FILE}, "raw", Backing("/b", "raw")),
        ({"driver": "qcow2", "file": FILE}, "raw", None),  # which of the two?
        ({"driver": "raw", "offset": 512, "file": FILE}, "raw", None),
        ({"driver": "qcow2", "file": FILE, "backing": None}, "qcow2", None),
        ({"driver": "qcow2", "file": {"driver": "nbd", "filename": "/b"}}, "qcow2", None),
        ({"driver": "qcow2", "file": {"driver": "file", "filename": "b"}}, "qcow2", None),
        ({"driver": "luks", "file": FILE}, None, None),
        ([1], "raw", None),
    ],
)
def test_backing_files_that_are_named_by_json(options, shape, expected):
    name = "json:" + json.dumps(options)
    assert backing_of({"full-backing-filename": name, "backing-filename-format": shape}) == (
        expected or Backing(name, shape)
    )


def no_owner() -> Owner:
    raise AssertionError("nobody's file is in question")


def qcow2(path: Path, *options: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, "1M"], check=True)
    return path


def refused(disk: SourceDisk, match: str, owner=no_owner) -> None:
    with pytest.raises(UnsupportedOperation, match=match) as error:
        check_files("web", [disk], owner)
    assert error.value.hint


def test_what_is_not_read_while_the_vm_is_off(tmp_path, qemu_tools):
    base, other = qcow2(tmp_path / "base"), qcow2(tmp_path / "other")
    top = qcow2(tmp_path / "top", "-F", "qcow2", "-b", str(base))
    source = f"<source file='{top}'/>"
    check_files("web", [disk_of(source)], no_owner)
    check_files("web", [disk_of(source, more=ON.format(base, "<backingStore/>"))], no_owner)
    volume = ON.format("/b", "<backingStore/>").replace("file='/b'", "pool='p' volume='v'")
    check_files("web", [disk_of(source, more=volume)], no_owner)
    refused(disk_of(source, more="<backingStore/>"), f"none instead of {base}")
    refused(disk_of(source, more=ON.format(other, "")), f"{other} instead of {base}")
    refused(disk_of(f"<source file='{top}' fdgroup='g'/>"), r"only its QEMU can follow \(@fdgroup\)")


def patched(path: Path, place: int, value: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(value)


def test_features_of_an_image_that_are_not_known(tmp_path, qemu_tools):
    base = qcow2(tmp_path / "base")
    top = qcow2(tmp_path / "top", "-F", "qcow2", "-b", str(base), "-o", "compression_type=zstd,extended_l2=on")
    disk = disk_of(f"<source file='{top}'/>")
    assert header_of(str(top)) == Header(0b11000, "", str(base), "qcow2", "")
    check_files("web", [disk], no_owner)
    for feature, said in ((1 << 40, r"not known here \(incompatible feature bits 40\)"), (2, "is marked as damaged")):
        patched(base, 72, feature.to_bytes(8, "big"))
        refused(disk, f"{base} .disk vda. .*{said}")
    patched(base, 72, bytes(8))
    patched(base, 32, (2).to_bytes(4, "big"))
    refused(disk, "is encrypted by its own header .LUKS.")
    patched(base, 32, bytes(4))
    patched(top, 72, (1 << 9).to_bytes(8, "big"))
    with pytest.raises(UnsupportedOperation, match="incompatible feature bits 9"):
        stopped_nodes("web", [disk])


def test_the_files_of_an_image_by_its_headers_alone(tmp_path, qemu_tools):
    raw, middle, top = tmp_path / "raw", tmp_path / "middle", tmp_path / "top"
    qcow2(raw)  # what a guest has written to its raw disk
    qcow2(middle, "-F", "raw", "-b", str(raw))
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "middle", "top"], cwd=tmp_path, check=True
    )
    assert files_of(str(top), "qcow2") == [str(top), str(middle), str(raw)]
    assert files_of(str(top), "raw") == [str(top)]
    data, image = tmp_path / "data", tmp_path / "image"
    qcow2(
        image,
        "-o",
        f"data_file={data}",
        "-F",
        "qcow2",
        "-b",
        f"json:{json.dumps({'file': {**FILE, 'filename': str(top)}})}",
    )
    assert files_of(str(image), "qcow2") == [str(image), str(data), str(top), str(middle), str(raw)]
    container = tmp_path / "container"
    container.write_bytes(bytes(4096) + middle.read_bytes())
    assert files_of(str(container), "qcow2", 4096) == [str(container), str(raw)]
    raw.unlink()
    assert files_of(str(middle), "qcow2") == [str(middle), str(raw)], "also one that is missing"
    subprocess.run(["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", str(top), str(middle)], check=True)
    assert files_of(str(top), "qcow2") == [str(top), str(middle)], "and in a circle"


@pytest.mark.parametrize(
    ("name", "at", "found"),
    [
        (b"/b\0c", 0x200, "/b"),
        (b"/b", 1 << 63, ""),
        (b"/b", (1 << 64) - 1, ""),
        (b"json:" + b"[" * 1000, 0x200, "json:" + "[" * 1000),
    ],
)
def test_a_damaged_header_is_no_bug_of_anybodys(tmp_path, qemu_tools, name, at, found):
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    with image.open("r+b") as file:
        file.seek(8)
        file.write(at.to_bytes(8) + len(name).to_bytes(4))
        file.seek(0x200)
        file.write(name)
    header = header_of(str(image))
    assert header is not None
    assert header.backing == found
    assert files_of(str(image), "qcow2") == [str(image), *([found] if found.startswith("/") else [])]


def test_a_data_file_is_read_only_if_qemu_may_read_it(tmp_path, qemu_tools):
    data = tmp_path / "data"
    image = qcow2(tmp_path / "image", "-o", f"data_file={data}")
    here, nobody = Owner(os.geteuid(), os.getegid()), Owner(65534, 65534)
    data.chmod(0o600)
    source = f"<source file='{image}'/>"
    check_files("web", [disk_of(source)], lambda: here)
    refused(disk_of(source), "keeps its data in another file .* cannot read", lambda: nobody)
    store = STORE.format("", "").replace("'/d'", f"'{data}'")
    named = f"<source file='{image}'>{store}</source>"
    check_files("web", [disk_of(named)], no_owner)
    refused(disk_of(named.replace(str(data), "/elsewhere")), "/elsewhere by the definition")


def test_a_backing_file_that_nobody_gave_to_vms_is_not_read(tmp_path, qemu_tools):
    """A header is written by QEMU, which may be in a guest's hands, and read here by root."""
    secret = tmp_path / "host" / "secret"
    secret.parent.mkdir()
    secret.write_bytes(bytes(4096))
    secret.chmod(0o600)
    here, nobody = Owner(os.geteuid(), os.getegid()), Owner(65534, 65534)
    options = {"driver": "raw", "file": {"driver": "file", "filename": str(secret)}}
    for name in (str(secret), "host/../host/secret", f"json:{json.dumps(options)}"):
        top = tmp_path / "top"
        qcow2(top, "-u", "-F", "raw", "-b", name)
        source = f"<source file='{top}'/>"
        refused(disk_of(source), "lies in none of the folders .* cannot read it", lambda: nobody)
        check_files("web", [disk_of(source)], lambda: here)
        named = ON.format(secret, "<backingStore/>").replace("'qcow2'", "'raw'")
        check_files("web", [disk_of(source, more=named)], no_owner)
    (tmp_path / "link").symlink_to(secret)
    qcow2(top, "-u", "-F", "raw", "-b", "link")
    refused(disk_of(source), "lies in none of the folders", lambda: nobody)


def test_backing_files_that_lead_back_to_themselves(tmp_path, qemu_tools):
    first, second = qcow2(tmp_path / "first"), qcow2(tmp_path / "second")
    for image, below in ((first, second), (second, first)):
        subprocess.run(["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", below, image], check=True)
    refused(disk_of(f"<source file='{first}'/>"), f"lead back to {first}")


def test_two_disks_of_one_file(tmp_path, qemu_tools):
    image, link = qcow2(tmp_path / "image"), tmp_path / "link"
    link.symlink_to(image)
    disks = [disk_of(f"<source file='{path}'/>") for path in (image, link)]
    with pytest.raises(UnsupportedOperation, match=f"disks vda and vda are one file \\({link}\\)"):
        check_files("web", disks, no_owner)
    part = "<slices><slice type='storage' offset='{}' size='65536'/></slices>"
    raw = [disk_of(f"<source file='{image}'>{part.format(at)}</source>", form="raw") for at in (0, 65536)]
    check_files("web", raw, no_owner)
