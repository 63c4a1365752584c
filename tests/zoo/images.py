"""Shapes of images: what lies in the file of a disk, and below it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.zoo.shape import MIB, SIZE, Made, Make, Shape, create, made_of, quoted, raw, run, write


def qcow2(*options: str, size: int = SIZE) -> Make:
    """A qcow2 file with these options of its format."""

    def make(folder: Path, target: str) -> Made:
        made = made_of(create(folder / f"{target}.qcow2", *options, size=size))
        write(made.options, "write -P 0x11 0 1M", "write -P 0x12 1500k 100k")
        return made

    return make


def compressed(kind: str) -> Make:
    """A qcow2 file whose clusters are compressed."""

    def make(folder: Path, target: str) -> Made:
        first = made_of(create(folder / f"{target}.first", shape="raw"), "raw")
        write(first.options, "write -P 0x11 0 1M", "write -P 0x12 1500k 100k")
        path = folder / f"{target}.qcow2"
        run(
            "qemu-img",
            "convert",
            "-c",
            "-O",
            "qcow2",
            "-o",
            f"compression_type={kind}",
            folder / f"{target}.first",
            path,
        )
        return made_of(path)

    return make


def of_odd_size(folder: Path, target: str) -> Made:
    """A raw file of a size that is no whole number of sectors."""
    path = folder / f"{target}.raw"
    path.write_bytes(b"\x11" * MIB + b"\x12" * (SIZE - MIB + 100))
    return made_of(path, "raw")


def on(below: str, shape: str = "qcow2") -> Make:
    """A qcow2 file on another one; `below` is how its header names it: relative, absolute, json."""

    def make(folder: Path, target: str) -> Made:
        base = create(folder / f"{target}.base", shape=shape)
        write(made_of(base, shape).options, "write -P 0x11 0 1M", "write -P 0x12 2M 64k")
        base.chmod(0o444)
        file = {"driver": "file", "filename": str(base)}
        name = {
            "relative": base.name,
            "absolute": str(base),
            # A format is named by `driver` where it is raw: libvirt starts no VM on another, and QEMU's programs open
            # no file whose driver is that of the file alone.
            "json": "json:" + json.dumps({"driver": "raw", "file": file} if shape == "raw" else {"file": file}),
            "dotted": "json:" + json.dumps({"file.driver": "file", "file.filename": str(base)}),
        }[below]
        top = folder / f"{target}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", shape, "-b", name, top, SIZE)
        made = made_of(top)
        write(made.options, "write -P 0x13 512k 1M", "write -z 0 64k")
        return made

    return make


def chain(folder: Path, target: str) -> Made:
    """Four files, one on the other."""
    below = create(folder / f"{target}.0", shape="raw")
    write(made_of(below, "raw").options, "write -P 0x11 0 3M")
    shape = "raw"
    for number in (1, 2, 3):
        top = folder / (f"{target}.{number}" if number < 3 else f"{target}.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", shape, "-b", below, top)
        write(made_of(top).options, f"write -P {0x20 + number} {number * 300}k 200k")
        below, shape = top, "qcow2"
    return made_of(below)


def with_data_file(*options: str) -> Make:
    """A qcow2 file that keeps its data in a raw one, which QEMU's user must be able to open."""

    def make(folder: Path, target: str) -> Made:
        data = folder / f"{target}.data"
        made = qcow2(",".join([f"data_file={data}", *options]))(folder, target)
        data.chmod(0o666)
        return made

    return make


def part(shape: str) -> Make:
    """A disk that is a part of its file, with other data around it."""

    def make(folder: Path, target: str) -> Made:
        path, offset, size = folder / f"{target}.container", MIB, SIZE + MIB
        path.write_bytes(b"\xee" * (offset + size + MIB))
        sliced = f"driver=raw,offset={offset},size={size},file.driver=file,file.filename={path}"
        if shape == "raw":
            options = sliced
        else:
            inner = create(folder / f"{target}.inner", "refcount_bits=16", size=SIZE)
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(inner.read_bytes().ljust(size, b"\0"))
            inner.unlink()
            options = f"driver=qcow2,file.driver=raw,file.offset={offset},file.size={size}," + ",".join(
                f"file.{one}" for one in (f"file.driver=file,file.filename={path}").split(",")
            )
        write(options, "write -P 0x11 0 1M", "write -P 0x12 1500k 100k")
        slices = f"<slices><slice type='storage' offset='{offset}' size='{size}'/></slices>"
        return Made(source=f"<source file={quoted(path)}>{slices}</source>", options=options, format=shape)

    return make


def preallocated(kind: str) -> Make:
    """A qcow2 file whose clusters are there before anything is written."""
    return qcow2(f"preallocation={kind}")


PART = "is only a part of"
ELSEWHERE = "keeps its data in another file"

IMAGES = (
    Shape(name="qcow2", words="qcow2 version 3", make=qcow2()),
    Shape(name="raw", words="raw", make=raw, whole=True),
    Shape(name="clusters-512", words="qcow2 clusters from 512 bytes to 2 MiB", make=qcow2("cluster_size=512")),
    Shape(name="clusters-2M", words="qcow2 clusters from 512 bytes to 2 MiB", make=qcow2("cluster_size=2M")),
    Shape(name="extended-l2", words="qcow2 with extended L2 entries", make=qcow2("extended_l2=on,cluster_size=128k")),
    Shape(name="zlib", words="clusters compressed with zlib or zstd", make=compressed("zlib")),
    Shape(name="zstd", words="clusters compressed with zlib or zstd", make=compressed("zstd")),
    Shape(name="lazy", words="lazy refcounts, reference counts of 1 to 64 bits", make=qcow2("lazy_refcounts=on")),
    Shape(name="counts-1", words="lazy refcounts, reference counts of 1 to 64 bits", make=qcow2("refcount_bits=1")),
    Shape(name="counts-64", words="lazy refcounts, reference counts of 1 to 64 bits", make=qcow2("refcount_bits=64")),
    Shape(name="metadata", words="preallocated (metadata, falloc, full)", make=preallocated("metadata")),
    Shape(name="falloc", words="preallocated (metadata, falloc, full)", make=preallocated("falloc")),
    Shape(name="full", words="preallocated (metadata, falloc, full)", make=preallocated("full")),
    Shape(
        name="odd-cluster",
        words="sizes that are no whole number of clusters, or of sectors (raw)",
        make=qcow2(size=SIZE + 100 * 512),
    ),
    Shape(
        name="odd-sector",
        words="sizes that are no whole number of clusters, or of sectors (raw)",
        make=of_odd_size,
        whole=True,
    ),
    Shape(
        name="below-relative", words="backing files, read-only, named by relative or whole path", make=on("relative")
    ),
    Shape(
        name="below-absolute", words="backing files, read-only, named by relative or whole path", make=on("absolute")
    ),
    Shape(name="below-raw", words="a raw backing file", make=on("absolute", "raw")),
    Shape(name="below-json", words="backing files named by `json:`, where that is one local file", make=on("json")),
    Shape(name="below-dotted", words="backing files named by `json:`, where that is one local file", make=on("dotted")),
    Shape(
        name="below-json-raw",
        words="backing files named by `json:`, where that is one local file",
        make=on("json", "raw"),
    ),
    Shape(name="chain", words="a chain of four files", make=chain),
    Shape(name="data-file", words="qcow2 with a data file", make=with_data_file(), alone=ELSEWHERE),
    Shape(
        name="data-file-raw",
        words="qcow2 with a raw data file (`data_file_raw`)",
        make=with_data_file("data_file_raw=on"),
        whole=None,  # what was never written QEMU calls data while it runs, and holes when opened anew
        alone=ELSEWHERE,
    ),
    Shape(name="part-raw", words="a part of a raw file (`<slices>`)", make=part("raw"), whole=True, alone=PART),
    Shape(name="part-qcow2", words="a qcow2 image in a part of a file (`<slices>`)", make=part("qcow2"), alone=PART),
)
