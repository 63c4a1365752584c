"""docs/settings.md lists every setting, with its values and what is built in, and the example the defaults."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from vmkeep import example
from vmkeep.config import Defaults
from vmkeep.settings import BUILT_IN, DISK_LISTS, FORMS, LEGAL, NUMBERS

PAGE = Path(__file__).parent.parent.parent / "docs" / "settings.md"


def values(setting: str) -> str:
    if setting in NUMBERS:
        return "{} to {}".format(*NUMBERS[setting])
    if setting in FORMS:
        return FORMS[setting][1]
    if setting in DISK_LISTS:
        return "`vdb,vdc`"
    return ", ".join(f"`{value}`" for value in LEGAL[setting])


def test_the_page_lists_every_setting_with_its_values_and_what_is_built_in():
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \| (.*?) ?\| .* \|$", PAGE.read_text(), re.MULTILINE)
    listed = {setting: (legal, default.strip("`")) for setting, legal, default in rows if setting in LEGAL}
    assert listed == {setting: (values(setting), BUILT_IN[setting]) for setting in LEGAL}


def test_what_can_stand_under_defaults_is_every_setting_but_lists_of_disks():
    assert {field.name for field in dataclasses.fields(Defaults)} == {
        setting.lower() for setting in LEGAL if setting not in DISK_LISTS
    }


def test_the_example_shows_what_is_built_in(tmp_path):
    path = tmp_path / "config.toml"
    example.write(path, datastore="nas", repository=None)
    shown = dict(re.findall(r'^# ([a-z_]+) = "?(\w+)"? +#', path.read_text(), re.MULTILINE))
    words = {"YES": "true", "NO": "false"}
    # What is empty unless it is set has an example as its value.
    for setting in {setting.lower() for setting, value in BUILT_IN.items() if value} & set(shown):
        assert shown[setting] == words.get(BUILT_IN[setting.upper()], BUILT_IN[setting.upper()])
    assert {"fs_freeze", "fs_freeze_fallback", "freeze_timeout", "encrypted_disks", "backup_volatile"} <= set(shown)
