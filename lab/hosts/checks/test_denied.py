"""The last test of each host."""

from __future__ import annotations

from lab.hosts.report import denials


def test_apparmor_has_denied_nothing() -> None:
    assert denials() == []
