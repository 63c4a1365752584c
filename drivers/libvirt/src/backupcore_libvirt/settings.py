"""A VM's backup configuration, in the ``<metadata>`` of its own definition.

::

    <backupcore:backup xmlns:backupcore="urn:backupcore:vm:1">
      <backupcore:setting name="MODE">INCREMENT</backupcore:setting>
    </backupcore:backup>

Configuration only, never state: clones carry it along.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree.ElementTree import Element, SubElement, tostring

from backupcore.errors import ConfigError, HypervisorError
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.xml import parse

__all__ = ["NAMESPACE", "read", "write"]

NAMESPACE = "urn:backupcore:vm:1"
PREFIX = "backupcore"
_KEY = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_VALUE = re.compile(r"[\x20-\x7e]{0,1024}")


def read(domain: Domain) -> dict[str, str]:
    """The settings; empty if the VM has none."""
    text = domain.metadata(NAMESPACE)
    if text is None:
        return {}
    try:
        root = parse(text)
    except ValueError as error:
        raise HypervisorError(f"VM {domain.name}: its backup configuration cannot be read: {error}") from error
    # libvirt gives the element back without the prefix's declaration in some versions, so the local names count.
    found = {}
    for element in root:
        key = element.get("name", "")
        if element.tag.rpartition("}")[2].rpartition(":")[2] == "setting" and _KEY.fullmatch(key):
            found[key] = (element.text or "").strip()
    return found


def write(domain: Domain, settings: Mapping[str, str]) -> None:
    """Replace the settings. ConfigError for a key or value that cannot be written down."""
    root = Element("backup")
    for key, value in sorted(settings.items()):
        if not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            raise ConfigError(f"VM {domain.name}: {key!r:.100} and its value cannot be kept as a setting")
        SubElement(root, "setting", name=key).text = value
    domain.set_metadata(NAMESPACE, PREFIX, tostring(root, encoding="unicode"))
