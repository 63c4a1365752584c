"""Tokens: opaque, safe everywhere, and never interpreted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from backupcore.errors import ContractViolation
from backupcore.manifest import NAME
from backupcore.model import SourceRef
from backupcore.testing.bench import Bench, Failed, Kept

HOSTILE = (
    *(
        "",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "-rf",
        "~root",
        "a b",
        "a\n",
        "a\0",
        "*",
        "x" * 129,
        "\u00e4",
    ),
)


def token(bench: Bench) -> None:
    """The token has the contract's form and lives on as text."""
    kept = bench.keep()
    text = json.loads(json.dumps(f"kit://nas/0:{kept.source}//disk.vda.qcow2")).split(":")[-1].split("/")[0]
    bench.there(Kept(source=SourceRef(text), run=kept.run, artifacts=kept.artifacts))


def two_tokens(bench: Bench) -> None:
    """Two backups of the same bytes, of the same VM, have two tokens, and each is its own."""
    vm = bench.vm()
    first, second = bench.keep(run=bench.run(vm)), bench.keep(run=bench.run(vm))
    if first.source == second.source:
        raise Failed(f"two backups got one token: {first.source}")
    with bench.context() as ctx:
        bench.open().delete([first.source], ctx)
    bench.gone(first.source, "a backup that was deleted")
    bench.same(second)


def new_token(bench: Bench) -> None:
    """The token of a backup that was deleted is not given again: somebody may still delete it by that."""
    vm = bench.vm()
    given: set[SourceRef] = set()
    for _ in range(3):
        kept = bench.keep(run=bench.run(vm))
        if kept.source in given:
            raise Failed(f"token {kept.source} was given again after its backup had been deleted")
        given.add(kept.source)
        with bench.context() as ctx:
            bench.open().delete([kept.source], ctx)


def unknown_tokens(bench: Bench) -> None:
    """A token that the datastore does not know is SourceNotFound, nothing is opened or deleted because of it."""
    for text in HOSTILE:
        with bench.refused(ContractViolation, what=f"a source {text!r:.20}"):
            SourceRef(text)
    kept = bench.keep()
    strangers = [SourceRef(text) for text in _strangers(kept)]
    with bench.context() as ctx:
        bench.open().delete(strangers, ctx)
    for stranger in strangers:
        bench.gone(stranger, f"the unknown source {stranger.token:.70}")
    bench.same(kept)


def _strangers(kept: Kept) -> Iterator[str]:
    real = kept.source.token
    last = "0" if real[-1] != "0" else "1"
    found = [
        *(real[:-1], real[:-1] + last, real[: len(real) // 2], real[:8], real + "0", real + "."),
        *(real.upper(), real.lower(), real.swapcase()),
        *("0", "0" * 32, "f" * 64, "x" * 128, "latest", "a..", "a=b", NAME, "disk.vda.qcow2"),
        *(kept.run.vm.uuid, kept.run.point, kept.run.image, kept.run.id),
        f"{kept.run.vm.uuid}.{'0' * 32}",
    ]
    for text in dict.fromkeys(found):
        if text != real and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,127}", text):
            yield text


def mixed_tokens(bench: Bench) -> None:
    """A token put together from those of two VMs is nobody's, and deleting it takes nothing away."""
    first, second = bench.keep(), bench.keep()
    real = (first.source.token, second.source.token)
    mixed = [SourceRef(text) for text in dict.fromkeys([*_mixed(*real), *_mixed(*reversed(real))]) if text not in real]
    for stranger in mixed:
        bench.gone(stranger, f"{stranger}, which is put together from two tokens,")
    with bench.context() as ctx:
        bench.open().delete(mixed, ctx)
    bench.same(first, second)


def _mixed(one: str, other: str) -> Iterator[str]:
    """`one` with a part of `other` in it: each of those that a separator makes, and the second half."""
    yield one[: len(one) // 2] + other[len(one) // 2 :]
    for mark in ".=_-":
        ours, theirs = one.split(mark), other.split(mark)
        for place in range(min(len(ours), len(theirs))):
            yield mark.join([*ours[:place], theirs[place], *ours[place + 1 :]])
