from __future__ import annotations

from enum import Enum
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Literal

import pytest
from msgspec import Meta

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


@pytest.mark.parametrize(
    ("path", "told"),
    [("~nobody-here/hunter2", "path: there is no account"), ("/hunter2\0", "path: a path holds no NUL")],
)
def test_a_path_that_leads_nowhere_is_named_before_anything_is_done(path: str, told: str):
    with pytest.raises(ConfigError, match=told) as caught:
        build(Folder, {"path": path})
    assert "hunter2" not in str(caught.value)


def test_secrets_stay_out_of_repr():
    assert "hunter2" not in repr(build(Folder, {"path": "/x", "url": "rest:http://u:hunter2@h"}))


def test_a_field_without_option_is_the_authors_mistake():
    with pytest.raises(ContractViolation, match="plain"):

        @backupcore.driver
        class Wrong:
            plain: str = ""


class Place(Enum):
    HERE = "here"
    THERE = "there"


@backupcore.driver
class Typed:
    how: Literal["fast", "safe"] | None = backupcore.option("how", default=None)
    hosts: tuple[str, ...] = backupcore.option("where", default=())
    folders: tuple[Path, ...] = backupcore.option("what", default=())
    tries: Annotated[int, Meta(ge=1)] = backupcore.option("how often", default=3)
    rate: float = backupcore.option("MiB/s", default=1.0)
    place: Place = backupcore.option("on which side", default_factory=lambda: Place.HERE)
    more: dict[str, str] = backupcore.option("what else", default_factory=dict)

    def __post_init__(self) -> None:
        if self.tries > 9:
            raise ValueError("tries: 9 at most")


def test_lists_choices_and_limits():
    table = {"how": "fast", "hosts": ["a", "b"], "folders": ["/a"], "tries": 1, "rate": 2, "place": "there"}
    made = build(Typed, table)
    assert (made.how, made.hosts, made.folders, made.tries) == ("fast", ("a", "b"), (Path("/a"),), 1)
    assert isinstance(made.rate, float)
    assert made.place is Place.THERE
    wrong = dict.fromkeys(("how", "rate", "place", "more"), "hunter2")
    wrong |= {"hosts": ["a", 3], "folders": "/a", "tries": 0}
    with pytest.raises(ConfigError) as caught:
        build(Typed, wrong, where="d")
    assert caught.value.message == (
        "d.how: expected one of 'fast', 'safe'; d.rate: expected float, got str; d.place: expected one of 'here', "
        "'there'; d.more: expected table, got str; d.hosts[1]: expected str, got int; d.folders: expected array, got "
        "str; d.tries: expected int >= 1"
    )


def test_what_a_driver_itself_refuses_is_a_mistake_of_the_configuration():
    with pytest.raises(ConfigError, match="d: tries: 9 at most"):
        build(Typed, {"tries": 10}, where="d")


@pytest.mark.parametrize("kind", [Path | int, IPv4Address])
def test_an_option_that_no_table_can_hold_is_the_authors_mistake(kind):
    @backupcore.driver
    class Wrong:
        place: kind = backupcore.option("where", default=None)

    Wrong.__annotations__["place"] = kind
    with pytest.raises(ContractViolation, match=r"Wrong\.place"):
        build(Wrong, {"place": "10.0.0.1"})
