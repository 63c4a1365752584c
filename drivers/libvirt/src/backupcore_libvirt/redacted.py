"""A definition without what people may have written secrets into."""

from __future__ import annotations

from xml.etree.ElementTree import Element, register_namespace, tostring

from backupcore_libvirt.settings import NAMESPACE
from backupcore_libvirt.xml import parse

__all__ = ["REDACTED", "redacted"]

REDACTED = ("title", "description", "sysinfo")
"""Children of ``<domain>`` whose text is whatever somebody wrote there."""

_QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
_GONE = "(redacted)"


def redacted(xml: str) -> str:
    """The same definition with "(redacted)" for titles, descriptions, strings of SMBIOS, other programs' metadata, and
    the arguments and the environment of QEMU. What a guest is started by stays: the command line of its kernel.
    """
    register_namespace("qemu", _QEMU)
    root = parse(xml)
    for tag in REDACTED:
        for element in root.iterfind(tag):
            _blank(element)
    for command in root.iterfind(f"{{{_QEMU}}}commandline"):
        for part in command:
            if "value" in part.attrib:
                part.set("value", _GONE)
    for metadata in root.iterfind("metadata"):
        for child in list(metadata):
            if child.tag != f"{{{NAMESPACE}}}backup":
                metadata.remove(child)
    return tostring(root, encoding="unicode")


def _blank(element: Element) -> None:
    for part in element.iter():
        if (part.text or "").strip():
            part.text = _GONE
