"""The one place where libvirt's errors become members of the taxonomy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import libvirt

from backupcore.errors import AccessDenied, BackupError, Busy, HypervisorError, NotFound, UnsupportedOperation

__all__ = ["calling", "code_of", "is_away"]

START_HINT = (
    "Start it: 'systemctl start libvirtd' (or 'systemctl start virtqemud.socket'); without systemd: "
    "'virtlogd -d; libvirtd -d'."
)
BUSY_HINT = "Wait until the other job on this VM has ended ('virsh domjobinfo VM' shows it), then run it again."


def code_of(error: BaseException | None) -> int:
    """libvirt's error code (VIR_ERR_…) behind a translated error; 0 if there is none."""
    cause = error.__cause__ if error is not None else None
    return int(cause.get_error_code() or 0) if isinstance(cause, libvirt.libvirtError) else 0


def is_away(error: BackupError) -> bool:
    """Whether the daemon did not answer, or no longer: it is away, or was started anew."""
    return error.hint == START_HINT


@contextmanager
def calling(what: str) -> Iterator[None]:
    """Translate what libvirt raises in the block; `what` was tried."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise _translate(error, what) from error


def _translate(error: Any, what: str) -> BackupError:  # noqa: PLR0911 - one return per kind of answer
    code = error.get_error_code()
    text = str(error.get_error_message() or error)
    message = f"{what}: {text}"
    lower = text.lower()
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return NotFound(message, "List the VMs with: vmkeep vm list")
    if (
        code in (libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_AUTH_CANCELLED, libvirt.VIR_ERR_AUTH_UNAVAILABLE)
        or code in (libvirt.VIR_ERR_ACCESS_DENIED, libvirt.VIR_ERR_OPERATION_DENIED)
        or ("connect" in lower and "permission denied" in lower)
    ):
        return AccessDenied(message, "Run it as root or as a member of the group 'libvirt', or use qemu:///session.")
    if code == libvirt.VIR_ERR_DBUS_SERVICE or "system bus" in lower or "polkit" in lower:
        # What an ordinary user gets from qemu:///system where polkit does not run.
        return AccessDenied(
            f"{message} (libvirt asks polkit over the system bus who may connect)",
            "Run it as root, or use qemu:///session.",
        )
    if code in (libvirt.VIR_ERR_OPERATION_TIMEOUT, libvirt.VIR_ERR_RESOURCE_BUSY):
        return Busy(message, BUSY_HINT)
    if code in (libvirt.VIR_ERR_OPERATION_UNSUPPORTED, libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_CONFIG_UNSUPPORTED):
        return UnsupportedOperation(message)
    if error.get_error_domain() == libvirt.VIR_FROM_RPC or "client socket is closed" in lower or "broken pipe" in lower:
        return HypervisorError(f"{what}: libvirt does not answer: {text}", START_HINT)
    if code in (libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_INVALID_CONN) or "unexpected qemu uri" in lower:
        return HypervisorError(message, "Check 'uri' in the configuration: qemu:///system or qemu:///session.")
    return HypervisorError(message)
