"""Shapes of names: of files, and of VMs."""

from __future__ import annotations

from pathlib import Path

from tests.zoo.shape import Made, Make, Shape, create, made_of, write

ODD = "spaces, quotes, colons, commas, leading dashes, `%`, `=`, `&`, other scripts in paths"
LONG = "file names of 200 bytes (with an I/O thread and QEMU before 8.2.3: of 190)"


def called(name: str) -> Make:
    """A qcow2 file of that name, in a folder of its own."""

    def make(folder: Path, target: str) -> Made:
        made = made_of(create(_in(folder, target) / name))
        write(made.options, "write -P 0x11 0 1M")
        return made

    return make


def _in(folder: Path, target: str) -> Path:
    own = folder / target
    own.mkdir(parents=True)
    own.chmod(0o777)
    return own


def linked(folder: Path, target: str) -> Made:
    """A file that the definition names by a symbolic link."""
    real = _in(folder, target) / "real.qcow2"
    write(made_of(create(real)).options, "write -P 0x11 0 1M")
    link = folder / f"{target}.link"
    link.symlink_to(real)
    return made_of(link)


NAMES = (
    Shape(name="name-space", words=ODD, make=called("a b  c.qcow2")),
    Shape(name="name-quotes", words=ODD, make=called('it\'s "q"`$(x)`;|\\.qcow2')),
    Shape(name="name-colon", words=ODD, make=called("nbd:a:b.qcow2")),
    Shape(name="name-comma", words=ODD, make=called("a,b,,c=d.qcow2")),
    Shape(name="name-dash", words=ODD, make=called("-dash.qcow2")),
    Shape(name="name-percent", words=ODD, make=called("50%20=&<x>#?*[a].qcow2")),
    Shape(name="name-script", words=ODD, make=called("ümläut-数据.qcow2")),
    Shape(name="same-name", words="disks of one file name in several folders, symbolic links", make=called("d.qcow2")),
    Shape(name="same-again", words="disks of one file name in several folders, symbolic links", make=called("d.qcow2")),
    Shape(name="link", words="disks of one file name in several folders, symbolic links", make=linked),
)
LONG_NAME = Shape(name="name-long", words=LONG, make=called("n" * 194 + ".qcow2"))
