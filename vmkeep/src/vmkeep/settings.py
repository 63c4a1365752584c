"""What one VM's backups should be like: the settings and their legal values.

The VM's own settings lie in its libvirt metadata (`Hypervisor.settings`); what it leaves unsaid comes from
``[defaults]`` of the configuration, then from `BUILT_IN`. All values are strings, as the metadata hold them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from backupcore.errors import ConfigError

__all__ = ["BUILT_IN", "DISK_LISTS", "FORMS", "LEGAL", "NUMBERS", "disk_list", "effective", "validate"]

LEGAL: Mapping[str, tuple[str, ...]] = {
    "MODE": ("FULL", "INCREMENT"),
    "INCREMENT_MODE": ("CBT", "SNAPSHOT"),
    "FS_FREEZE": ("NONE", "AGENT", "SUSPEND"),
    "FS_FREEZE_FALLBACK": ("YES", "NO"),  # whether a backup goes on where its freeze fails
    "FREEZE_TIMEOUT": (),  # a number: seconds that the guest may stand still
    "KEEP_LAST": (),  # a number, 0 for "keep all"
    "KEEP_CHAINS": (),  # the same, or empty for "as KEEP_LAST"
    "FULL_EVERY": (),  # a number of increments, or of days (30d); 0 for "never"
    "VERIFY_FLATTEN": ("SAMPLE", "ALL"),
    "BACKUP_VOLATILE": ("YES", "NO"),
    "VOLATILE_DISKS": (),  # disk IDs
    "EXCLUDE_DISKS": (),  # disk IDs
    "ENCRYPTED_DISKS": ("REFUSE", "PLAIN"),
    "REDACT": ("YES", "NO"),  # whether the stored definition lacks what people may have written secrets into
}
NUMBERS: Mapping[str, tuple[int, int]] = {"KEEP_LAST": (0, 999_999), "FREEZE_TIMEOUT": (1, 600)}
"""The settings that are numbers: from, to."""
DISK_LISTS = ("VOLATILE_DISKS", "EXCLUDE_DISKS")
"""The settings that are lists of disk IDs, written ``vdb,vdc``; "" is the empty list."""
_DISK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")

FORMS = {
    "KEEP_CHAINS": (re.compile(r"[0-9]{0,6}"), "a number from 0 (keep all) to 999999, or empty (as KEEP_LAST)"),
    "FULL_EVERY": (re.compile(r"[0-9]{1,6}d?"), "a number of increments, or of days (30d), or 0 (never)"),
}
"""Further settings: what a value must look like, and the same in words."""

BUILT_IN: Mapping[str, str] = {
    "MODE": "INCREMENT",
    "INCREMENT_MODE": "CBT",
    "FS_FREEZE": "NONE",
    "FS_FREEZE_FALLBACK": "NO",
    "FREEZE_TIMEOUT": "10",
    "KEEP_LAST": "0",
    "KEEP_CHAINS": "",
    "FULL_EVERY": "0",
    "VERIFY_FLATTEN": "SAMPLE",
    "BACKUP_VOLATILE": "NO",
    "VOLATILE_DISKS": "",
    "EXCLUDE_DISKS": "",
    "ENCRYPTED_DISKS": "REFUSE",
    "REDACT": "NO",
}


def disk_list(value: str) -> list[str]:
    """The disk IDs of a setting that lists some."""
    return [disk for disk in value.split(",") if disk]


def validate(settings: Mapping[str, str], where: str) -> None:
    """ConfigError, naming every unknown setting and every value that is not legal; `where` says whose they are."""
    wrong = []
    for key, value in settings.items():
        legal = LEGAL.get(key)
        if legal is None:
            wrong.append(f"{key[:40]!r} is no setting")
        elif key in NUMBERS:
            first, last = NUMBERS[key]
            if not (value.isascii() and value.isdigit() and len(value) < 7 and first <= int(value) <= last):
                keep_all = " (keep all)" if key == "KEEP_LAST" else ""
                wrong.append(f"{key} must be a number from {first}{keep_all} to {last}")
        elif key in DISK_LISTS:
            if not all(_DISK.fullmatch(disk) for disk in (value.split(",") if value else ())):
                wrong.append(f"{key} must be a list of disks (vdb,vdc)")
        elif key in FORMS:
            form, what = FORMS[key]
            if not form.fullmatch(value):
                wrong.append(f"{key} must be {what}")
        elif value not in legal:
            wrong.append(f"{key} must be one of {', '.join(legal)}")
    if wrong:
        raise ConfigError(f"{where}: {'; '.join(wrong)}", "Set it right with: vmkeep vm updateconf VM")


def effective(own: Mapping[str, str], defaults: Mapping[str, str], vm: str) -> dict[str, str]:
    """The settings that count for `vm`: its own over the defaults over the built-in ones, all checked."""
    validate(own, f"VM {vm}")
    return {**BUILT_IN, **defaults, **own}
