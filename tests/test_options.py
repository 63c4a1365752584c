from __future__ import annotations

from pathlib import Path

import pytest

import backupcore
from backupcore.errors import ConfigError, ContractViolation
from backupcore.options import build


@backupcore.driver
class Folder:
    path: Path = backupcore.option("where the backups lie")
    url: str = backupcore.option("may hold a password", default="", secret=True)
    limit: int | None = backupcore.option("KiB/s", default=None)


def test_a_table_becomes_a_driver():
    folder = build(Folder, {"path": "/srv/backups", "limit": 5})
    assert (folder.path, folder.url, folder.limit) == (Path("/srv/backups"), "", 5)
    with pytest.raises(AttributeError):
        folder.limit = 6  # type: ignore[misc]  # frozen is what is tested


def test_every_wrong_key_is_named_at_once_and_no_value_is_shown():
    with pytest.raises(ConfigError) as caught:
        build(Folder, {"limit": "hunter2", "pth": "hunter2", "url": 3}, where="datastores.nas")
    message = str(caught.value)
    assert "datastores.nas.pth: unknown key" in message
    assert "datastores.nas.path: required" in message
    assert "datastores.nas.limit" in message
    assert "datastores.nas.url" in message
    assert "hunter2" not in message + caught.value.hint + repr(caught.value)
    assert "path, url, limit" in caught.value.hint


def test_types_are_strict():
    with pytest.raises(ConfigError):
        build(Folder, {"path": "/x", "limit": True})
    with pytest.raises(ConfigError):
        build(Folder, {"path": "/x", "limit": "5"})


def test_secrets_stay_out_of_repr():
    assert "hunter2" not in repr(build(Folder, {"path": "/x", "url": "rest:http://u:hunter2@h"}))


def test_a_field_without_option_is_the_authors_mistake():
    with pytest.raises(ContractViolation, match="plain"):

        @backupcore.driver
        class Wrong:
            plain: str = ""
