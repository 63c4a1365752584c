"""A guest of a few instructions that writes to its disk for ever: it boots in a moment, and needs no kernel."""

from __future__ import annotations


def boot_sector(sectors: int) -> bytes:
    """The first sector of its disk. It writes 64 sectors at a time by the BIOS, from sector 2048 to `sectors`."""
    code = bytes.fromhex(
        "31c0 8ed8"  # xor ax,ax; mov ds,ax
        "be307c b443 30c0 b280 cd13"  # again: mov si,packet; mov ah,43h (write); xor al,al; mov dl,80h; int 13h
        "6683 06 387c 40"  # add dword [sector], 64
        f"6681 3e 387c {sectors.to_bytes(4, 'little').hex()} 72e4"  # cmp dword [sector], end; jb again
        "66c7 06 387c 00080000 ebd9"  # mov dword [sector], 2048; jmp again
    )
    packet = bytes.fromhex("1000 4000 0080 0000 0008000000000000")  # size, 64 sectors, from 0000:8000, to sector 2048
    return code.ljust(0x30, b"\0") + packet.ljust(510 - 0x30, b"\0") + b"\x55\xaa"
