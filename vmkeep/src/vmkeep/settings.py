"""What one VM's backups should be like: the settings, their legal values, and which of them this version can do.

The VM's own settings lie in its libvirt metadata (`Hypervisor.settings`); what it leaves unsaid comes from
``[defaults]`` of the configuration, then from `BUILT_IN`. All values are strings, as the metadata hold them.
"""

from __future__ import annotations

from collections.abc import Mapping

from backupcore.errors import ConfigError, UnsupportedOperation

__all__ = ["BUILT_IN", "LEGAL", "effective", "require_supported", "validate"]

LEGAL: Mapping[str, tuple[str, ...]] = {
    "MODE": ("FULL", "INCREMENT"),
    "INCREMENT_MODE": ("CBT", "SNAPSHOT"),
    "FS_FREEZE": ("NONE", "AGENT", "SUSPEND"),
    "KEEP_LAST": (),  # a number, 0 for "keep all"
    "BACKUP_VOLATILE": ("YES", "NO"),
}

BUILT_IN: Mapping[str, str] = {
    "MODE": "INCREMENT",
    "INCREMENT_MODE": "CBT",
    "FS_FREEZE": "NONE",
    "KEEP_LAST": "0",
    "BACKUP_VOLATILE": "NO",
}

_SUPPORTED = {"FS_FREEZE": ("NONE",)}


def validate(settings: Mapping[str, str], where: str) -> None:
    """ConfigError, naming every unknown setting and every value that is not legal; `where` says whose they are."""
    wrong = []
    for key, value in settings.items():
        legal = LEGAL.get(key)
        if legal is None:
            wrong.append(f"{key[:40]!r} is no setting")
        elif key == "KEEP_LAST":
            if not (value.isascii() and value.isdigit() and len(value) < 7):
                wrong.append("KEEP_LAST must be a number from 0 (keep all) to 999999")
        elif value not in legal:
            wrong.append(f"{key} must be one of {', '.join(legal)}")
    if wrong:
        raise ConfigError(f"{where}: {'; '.join(wrong)}", "Set it right with: vmkeep vm updateconf VM")


def effective(own: Mapping[str, str], defaults: Mapping[str, str], vm: str) -> dict[str, str]:
    """The settings that count for `vm`: its own over the defaults over the built-in ones, all checked."""
    validate(own, f"VM {vm}")
    return {**BUILT_IN, **defaults, **own}


def require_supported(settings: Mapping[str, str], vm: str) -> None:
    """UnsupportedOperation, naming the setting and the VM, for what this version cannot do yet."""
    for key, able in _SUPPORTED.items():
        value = settings.get(key, able[0])
        if value not in able:
            option = key.lower().replace("_", "-")
            raise UnsupportedOperation(
                f"VM {vm}: {key}={value} is not supported by this version",
                f"Choose what is: vmkeep vm updateconf {vm} --{option} {able[0]}",
            )
