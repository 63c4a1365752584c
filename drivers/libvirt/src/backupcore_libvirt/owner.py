"""Which user QEMU runs as."""

from __future__ import annotations

import os
import pwd

from backupcore_libvirt.connection import Connection
from backupcore_libvirt.scratch import Owner
from backupcore_libvirt.xml import parse

__all__ = ["confinement", "default_owner", "qemu_owner"]


def qemu_owner(live_xml: str, connection: Connection) -> Owner:
    """The user of a running VM's QEMU: its own label, else what libvirt gives to VMs, else (session mode) ourselves."""
    for label in parse(live_xml).iterfind("./seclabel"):
        if label.get("model") == "dac" and (found := _owner(label.findtext("label", ""))):
            return found
    return default_owner(connection)


def default_owner(connection: Connection) -> Owner:
    """The user that VMs of this connection run as unless they say otherwise."""
    for model in parse(connection.capabilities()).iterfind("./host/secmodel"):
        if model.findtext("model") == "dac":
            for label in model.iterfind("baselabel"):
                if found := _owner(label.text or ""):
                    return found
    return Owner(os.geteuid(), os.getegid())


def confinement(connection: Connection) -> list[str]:
    """The security models beyond plain users under which libvirt runs VMs: apparmor, selinux."""
    models = parse(connection.capabilities()).iterfind("./host/secmodel/model")
    return [model.text for model in models if model.text and model.text not in ("none", "dac")]


def _owner(label: str) -> Owner | None:
    """``+64055:+64055`` or ``qemu:qemu``, as security drivers write it."""
    user, _, group = label.partition(":")
    try:
        uid = int(user[1:]) if user.startswith("+") else pwd.getpwnam(user).pw_uid
        gid = int(group[1:]) if group.startswith("+") else pwd.getpwnam(user).pw_gid
    except (KeyError, ValueError):
        return None
    return Owner(uid, gid)
