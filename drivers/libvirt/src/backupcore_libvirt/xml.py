"""Reading XML that may not be trusted: no entities, no document types, a limit of size."""

from __future__ import annotations

from typing import cast
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException  # type: ignore[import-untyped]  # publishes no types
from defusedxml.ElementTree import fromstring  # type: ignore[import-untyped]  # as above

__all__ = ["LIMIT", "Element", "parse"]

LIMIT = 4 << 20
"""Bytes. libvirt's own messages end there, so no definition of a VM is longer."""


def parse(text: str | bytes) -> Element:
    """The root element. ValueError if it is too long, is no XML, or declares a document type or entities."""
    if len(text) > LIMIT:
        raise ValueError(f"XML of {len(text)} bytes; the limit is {LIMIT}")
    try:
        return cast("Element", fromstring(text, forbid_dtd=True))
    except (ParseError, DefusedXmlException, UnicodeDecodeError, LookupError) as error:
        raise ValueError(f"not well-formed, or with a document type: {error}") from error
