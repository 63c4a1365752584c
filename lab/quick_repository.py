"""Repositories of restic that open at once: the key of each is derived in no time, as no user's ever is.

restic makes a password's key so dear that deriving it takes half a second of a core, with each command, and it has no
option for that. What says how dear it is lies in the key's file, though, and any restic goes by it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

__all__ = ["make", "quicken"]

_KEY_BYTES = 64
"""What is derived from the password: 32 bytes for AES-256, 16 for the AES of Poly1305-AES, 16 for its r."""
_NONCE, _MAC = 16, 16
_POLYNOMIAL = "388868df90f7fb"  # restic cuts files by it; it has to be irreducible, and need not be secret here


def make(place: Path, password: str) -> Path:
    """A new, empty repository in this folder, as ``restic init`` makes it."""
    for name in ("data", "index", "keys", "locks", "snapshots"):
        (place / name).mkdir(parents=True)
    master = os.urandom(_KEY_BYTES)
    config = {"version": 2, "id": os.urandom(32).hex(), "chunker_polynomial": _POLYNOMIAL}
    (place / "config").write_bytes(_sealed(master, json.dumps(config).encode()))
    encrypt, k, r = master[:32], master[32:48], master[48:]
    _write_key(place, password, {"mac": {"k": _text(k), "r": _text(r)}, "encrypt": _text(encrypt)})
    return place


def quicken(place: Path, password: str) -> None:
    """Exchange the one key of a repository, which restic has made, for a quick one of the same password."""
    (old,) = (place / "keys").iterdir()
    key = json.loads(old.read_text())
    _write_key(place, password, json.loads(_opened(_derived(password, key), base64.b64decode(key["data"]))))
    old.unlink()


def _write_key(place: Path, password: str, master: dict[str, Any]) -> None:
    key: dict[str, Any] = {"kdf": "scrypt", "N": 128, "r": 1, "p": 1, "salt": _text(os.urandom(64))}
    key |= {"created": "2026-01-02T03:04:05Z", "username": "lab", "hostname": "lab"}
    key["data"] = _text(_sealed(_derived(password, key), json.dumps(master).encode()))
    text = json.dumps(key).encode()
    (place / "keys" / hashlib.sha256(text).hexdigest()).write_bytes(text)


def _derived(password: str, key: dict[str, Any]) -> bytes:
    costs = {"n": key["N"], "r": key["r"], "p": key["p"], "maxmem": 1 << 28}
    return hashlib.scrypt(password.encode(), salt=base64.b64decode(key["salt"]), dklen=_KEY_BYTES, **costs)


def _sealed(key: bytes, text: bytes) -> bytes:
    nonce = os.urandom(_NONCE)
    hidden = _in_counter_mode(key, nonce, text)
    return nonce + hidden + _mac(key, nonce, hidden)


def _opened(key: bytes, sealed: bytes) -> bytes:
    nonce, hidden, mac = sealed[:_NONCE], sealed[_NONCE:-_MAC], sealed[-_MAC:]
    assert mac == _mac(key, nonce, hidden), "another password"
    return _in_counter_mode(key, nonce, hidden)


def _in_counter_mode(key: bytes, nonce: bytes, text: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # noqa: PLC0415 - whoever makes none does without it

    return Cipher(algorithms.AES(key[:32]), modes.CTR(nonce)).encryptor().update(text)


def _mac(key: bytes, nonce: bytes, hidden: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # noqa: PLC0415 - as above
    from cryptography.hazmat.primitives.poly1305 import Poly1305  # noqa: PLC0415 - as above

    # ECB of one block: that is AES itself, of which Poly1305-AES makes the half of its key that is new each time.
    once = Cipher(algorithms.AES(key[32:48]), modes.ECB()).encryptor().update(nonce)
    return Poly1305.generate_tag(key[48:] + once, hidden)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
