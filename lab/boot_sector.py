"""A guest of a few instructions that writes to its disk for ever: it boots in a moment, and needs no kernel."""

from __future__ import annotations

WRITTEN = 0x11
"""Every byte that it writes: a disk that is full of these looks the same all the while."""


def boot_sector(sectors: int) -> bytes:
    """The first sector of its disk. It writes 64 sectors at a time by the BIOS, from sector 2048 to `sectors`."""
    code = bytes.fromhex(
        "31c0 8ed8 8ec0 fc"  # xor ax,ax; mov ds,ax; mov es,ax; cld
        f"bf0080 b8{WRITTEN:02x}{WRITTEN:02x} b90040 f3ab"  # mov di,8000h; mov ax,WRITTEN; mov cx,4000h; rep stosw
        "be407c b443 30c0 b280 cd13"  # again: mov si,packet; mov ah,43h (write); xor al,al; mov dl,80h; int 13h
        "6683 06 487c 40"  # add dword [sector], 64
        f"6681 3e 487c {sectors.to_bytes(4, 'little').hex()} 72e4"  # cmp dword [sector], end; jb again
        "66c7 06 487c 00080000 ebd9"  # mov dword [sector], 2048; jmp again
    )
    packet = bytes.fromhex("1000 4000 0080 0000 0008000000000000")  # size, 64 sectors, from 0000:8000, to sector 2048
    return code.ljust(0x40, b"\0") + packet.ljust(510 - 0x40, b"\0") + b"\x55\xaa"
