"""Shapes of what a VM has beside its disks: firmware variables and a TPM."""

from __future__ import annotations

from dataclasses import dataclass

from lab import kernel
from lab.domain_xml import Firmware

TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"


@dataclass(frozen=True, kw_only=True)
class Variables:
    """UEFI firmware and its variables: `secure` are those with Microsoft's keys, `format` that of their file.

    A libvirt before `since` refuses to define such a VM.
    """

    name: str
    words: str
    secure: bool = False
    format: str = "raw"
    since: tuple[int, int] = (0, 0)
    quick: bool = True

    def files(self) -> Firmware:
        """Debian's ovmf."""
        found = kernel.firmware()
        if not self.secure:
            return found
        return Firmware(
            found.code.with_name("OVMF_CODE_4M.secboot.fd"), found.variables.with_name("OVMF_VARS_4M.ms.fd")
        )


WORDS = "UEFI variables, also those of secure boot, and a TPM (swtpm)"
VARIABLES = (
    Variables(name="uefi", words=WORDS, quick=False),
    Variables(name="secure-boot", words=WORDS, secure=True),
    Variables(
        name="qcow2-variables",
        words="UEFI variables in a qcow2 file (libvirt 9.2 and later)",
        format="qcow2",
        since=(9, 2),
    ),
)
