"""Handshakes with servers that break the NBD protocol on purpose, and what a client asks for in one."""

from __future__ import annotations

import struct
import time

import pytest

from backupcore.disk.nbd import (
    ALLOCATION,
    Client,
    ConnectionLost,
    NbdError,
    ProtocolError,
)
from tests.disk import scripted_nbd as wire_words
from tests.disk.qemu_nbd import LIMIT, descriptors
from tests.disk.scripted_nbd import ACK, ERR_UNKNOWN, ERR_UNSUP, GO, INFO, META, SET_META, ScriptedServer

SIZE = 4096


# After each, the server must see the connection closed.


def silent(wire):
    assert wire.ended()


def silent_after_greeting(wire):
    wire.greet()
    wire.option()
    assert wire.ended()


def dripping(wire):
    """Every byte comes in time, the whole never does."""
    try:
        for byte in b"NBDMAGIC" * 100:
            wire.send(bytes([byte]))
            time.sleep(0.1)
    except OSError:
        return
    raise AssertionError("the client did not give up")


def wrong_magic(wire):
    wire.send(b"SSH-2.0-Open")
    assert wire.ended()


def oldstyle(wire):
    wire.send(b"NBDMAGIC", 0x420281861253.to_bytes(8), bytes(136))
    assert wire.ended()


def not_fixed(wire):
    wire.send(b"NBDMAGIC", wire_words.OPTION_MAGIC.to_bytes(8), bytes(2))
    assert wire.ended()


def closes_after_greeting(wire):
    wire.greet()
    wire.receive(4)


def answering(*replies):
    """Agree to structured replies, then answer the next option with `replies`."""

    def script(wire):
        wire.greet()
        wire.reply(wire.option(), ACK)
        option = wire.option()
        for kind, payload in replies:
            wire.reply(option, kind, payload)
        assert wire.ended()

    return script


def refuses_structured(wire):
    wire.greet()
    wire.reply(wire.option(), ERR_UNSUP)
    assert wire.ended()


def wrong_option_magic(wire):
    wire.greet()
    wire.option()
    wire.send(struct.pack(">QIII", 1, 8, ACK, 0))
    assert wire.ended()


def another_option(wire):
    wire.greet()
    wire.option()
    wire.reply(GO, ACK)
    assert wire.ended()


def giant_reply(wire):
    wire.greet()
    wire.send(struct.pack(">QIII", wire_words.REPLY_MAGIC, wire.option(), ACK, 1 << 31))
    assert wire.ended()


EXPORT = (INFO, struct.pack(">HQH", 0, SIZE, 3))


@pytest.mark.parametrize(
    ("script", "contexts", "kind", "message"),
    [
        (silent, [], ConnectionLost, "did not finish the handshake in time"),
        (silent_after_greeting, [], ConnectionLost, "did not finish the handshake in time"),
        (dripping, [], ConnectionLost, "did not finish the handshake in time"),
        (wrong_magic, [], ProtocolError, "no NBD server"),
        (oldstyle, [], NbdError, "only the old NBD handshake"),
        (not_fixed, [], NbdError, "fixed newstyle"),
        (closes_after_greeting, [], ConnectionLost, "lost in the handshake"),
        (refuses_structured, [], NbdError, "refused structured replies: the option is not supported"),
        (wrong_option_magic, [], ProtocolError, "magic 0x1"),
        (another_option, [], ProtocolError, "a reply to the option 7"),
        (giant_reply, [], ProtocolError, "2147483648 bytes"),
        (answering((ERR_UNKNOWN, b"who\x1b[2J?")), [], NbdError, r"no such export \(who \[2J\?\)"),
        (answering((ERR_UNSUP, b"")), [], NbdError, "refused opening it"),
        (answering((ACK, b"")), [], ProtocolError, "an export of None bytes"),
        (answering((META, b"")), [], ProtocolError, "a reply of type 4"),
        (answering((INFO, b"\0\0abc")), [], ProtocolError, "export information of 5 bytes"),
        (answering((INFO, struct.pack(">HQH", 0, 1 << 63, 3)), (ACK, b"")), [], ProtocolError, "an export of"),
        (answering(EXPORT, (INFO, struct.pack(">HIII", 3, 3, 4, 4096)), (ACK, b"")), [], ProtocolError, "block sizes"),
        (
            answering(EXPORT, (INFO, struct.pack(">HIII", 3, 4096, 4096, 1)), (ACK, b"")),
            [],
            ProtocolError,
            "block sizes",
        ),
        (answering((ACK, b"")), [ALLOCATION], NbdError, "'disk'.*no metadata context 'base:allocation'"),
        (answering((META, b"\0\0\0\1x:y")), [ALLOCATION], ProtocolError, "'x:y' was not asked for"),
        (answering(*[(META, b"\0\0\0\1base:allocation")] * 2), [ALLOCATION], ProtocolError, "came twice"),
        (answering((META, b"\0")), [ALLOCATION], ProtocolError, "of type 4 and 1 bytes"),
        (answering((ERR_UNKNOWN, b"")), [ALLOCATION], NbdError, "no such export"),
    ],
)
def test_handshakes_that_go_wrong(script, contexts, kind, message):
    before = descriptors()
    begin = time.monotonic()
    with ScriptedServer(script) as server, pytest.raises(NbdError, match=message) as caught:
        Client(server.address, contexts, timeout=0.4 if "in time" in message else LIMIT)
    assert type(caught.value) is kind
    assert caught.value.connection_lost
    assert server.address.socket in str(caught.value)
    assert time.monotonic() - begin < LIMIT / 2
    assert descriptors() <= before


def test_set_meta_is_asked_only_for_contexts():
    options = []

    def script(wire):
        wire.greet()
        while not options or options[-1] != GO:
            options.append(wire.option())
            if options[-1] == GO:
                wire.reply(GO, *EXPORT)
            wire.reply(options[-1], ACK)
        assert wire.request().command == wire_words.DISC

    with ScriptedServer(script) as server, Client(server.address) as client:
        assert SET_META not in options
        with pytest.raises(ValueError, match="without contexts"):
            client.block_status(0, 1)
