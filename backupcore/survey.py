"""What a datastore holds, found out from its manifests alone: which sources make up which image.

Nothing but the manifests counts. Labels are for a quick look; a number may be there twice (a flatten that was
interrupted, a run that was killed before it was recorded); whatever another program or a newer version put there is
listed and left alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from blake3 import blake3

from backupcore import manifest as manifests
from backupcore.disk.parallel import each
from backupcore.errors import ContractViolation, IntegrityError, SourceNotFound, UnsupportedOperation
from backupcore.model import VM, Image, Increment, SourceRef

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.datastore import Datastore
    from backupcore.manifest import Manifest
    from backupcore.model import Artifact, Listed

__all__ = ["Branch", "Found", "Remark", "look_at", "put_together", "read", "stood_for"]

_AT_ONCE = 4  # manifests that are read beside each other: most stores answer slowly, not little
_LARGEST = 1 << 31  # numbers of increments: a database takes no more than 63 bits, and nobody has as many
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One complete source: its manifest has been checked, and all that it lists is there in the right size."""

    source: SourceRef
    manifest: Manifest
    digest: str
    size: int
    date: datetime
    began: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """A source that belongs to no image that was found, and why.

    ``unused``: complete, and nothing builds on it. ``damaged``: it cannot be restored, or what it builds on is not
    there. ``foreign``: made by something else, or by a newer version. `image` is its image's UUID, "" where it is not
    known.
    """

    source: SourceRef
    kind: Literal["unused", "damaged", "foreign"]
    why: str
    image: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A chain that can be restored, oldest first, and the image that it is: closed, without a number of this host.

    Two branches of one image share their first sources, where somebody went on from an older increment than the last.
    The image of each has the UUID that its last manifest says, so both may have the same.
    """

    chain: tuple[Found, ...]
    image: Image


def read(datastore: Datastore, listed: Iterable[Listed], ctx: Context) -> tuple[tuple[Found, ...], tuple[Remark, ...]]:
    """Read the manifest of every source that is `listed`.

    A source that is damaged or foreign is a remark; a datastore that does not answer is an error.
    """
    answers = list(each(lambda one: _look(datastore, one, ctx), list(listed), _AT_ONCE))
    found = tuple(one for one in answers if isinstance(one, Found))
    return found, tuple(one for one in answers if isinstance(one, Remark))


def _look(datastore: Datastore, listed: Listed, ctx: Context) -> Found | Remark:
    if not listed.labels.get("point"):
        return Remark(source=listed.source, kind="foreign", why="it has no labels of a backup")
    try:
        return look_at(datastore, listed.source, ctx)
    except UnsupportedOperation as error:
        return Remark(source=listed.source, kind="foreign", why=error.message)
    except (IntegrityError, SourceNotFound, ContractViolation) as error:
        return Remark(source=listed.source, kind="damaged", why=error.message)


def look_at(datastore: Datastore, source: SourceRef, ctx: Context) -> Found:
    """What one source holds. IntegrityError if its manifest, or an artifact that it lists, is not as it must be."""
    what = f"source {source}"
    ctx.check()
    artifacts = datastore.artifacts(source, ctx)
    if manifests.NAME not in artifacts:
        raise IntegrityError(f"{what}: it has no manifest, so it is not complete")
    if artifacts[manifests.NAME].size > manifests.LIMIT:
        raise IntegrityError(f"{what}: the manifest is larger than {manifests.LIMIT >> 20} MiB")
    with artifacts[manifests.NAME].open() as file:
        data = file.read()
    manifest = manifests.parse(data, what)
    _require_all(manifest, artifacts, what)
    # These go into a database and into names of files.
    if not _UUID.fullmatch(manifest.vm.uuid) or manifest.number >= _LARGEST:
        raise IntegrityError(f"{what}: not a manifest: its VM's UUID or its number cannot be")
    try:
        date = manifest.date.astimezone(UTC)
        began = manifest.began.astimezone(UTC) if manifest.began else date
    except OverflowError as error:
        raise IntegrityError(f"{what}: not a manifest: its date cannot be") from error
    return Found(
        source=source,
        manifest=manifest,
        digest=blake3(data).hexdigest(),
        size=sum(artifact.size for artifact in artifacts.values()),
        date=date,
        began=began,
    )


def _require_all(manifest: Manifest, artifacts: dict[str, Artifact], what: str) -> None:
    sizes = {part.artifact: part.size for part in manifest.disks} | {
        part.name: part.size for part in manifest.artifacts
    }
    wrong = [name for name, size in sizes.items() if name not in artifacts or artifacts[name].size != size]
    if wrong:
        raise IntegrityError(f"{what}: missing, or of another size: {', '.join(sorted(wrong))}")


def put_together(
    datastore: str, found: Iterable[Found], *, prefer: Collection[SourceRef] = ()
) -> tuple[tuple[Branch, ...], tuple[Remark, ...]]:
    """The branches that these sources make up, oldest first, and a remark about every source that is in none of them.

    Each point that can be restored is in one, but for those that a full of one of them stands for. Of `prefer` none is
    left out for a full's claim to stand for it, and where several sources hold one point, one of these is taken.
    """
    groups: dict[str, list[Found]] = {}
    for one in found:
        groups.setdefault(one.manifest.vm.uuid, []).append(one)
    branches: list[Branch] = []
    remarks: list[Remark] = []
    for group in groups.values():
        chains = _chains(group, set(prefer))
        branches += (Branch(chain=tuple(chain), image=_image(datastore, chain)) for chain in chains)
        remarks += _others(group, chains)
    branches.sort(key=lambda one: (one.image.began or one.image.increments[0].date, one.image.uuid))
    return tuple(branches), tuple(remarks)


def _chains(group: Sequence[Found], prefer: Collection[SourceRef]) -> list[list[Found]]:
    """The chains of one VM to every last increment that can be restored, oldest first; an image's longest first."""
    parents = _parents(group, prefer)
    able = [one for one in group if one.source in parents]
    able.sort(key=lambda one: (one.manifest.number, one.source in prefer, not one.manifest.replaces, one.date))
    chains: list[list[Found]] = []
    taken: set[str] = set()
    merged: set[str] = set()
    for one in reversed(able):
        if one.manifest.point in taken or (one.manifest.point in merged and one.source not in prefer):
            continue
        chain: list[Found] = []
        tip: Found | None = one
        while tip is not None:
            chain.append(tip)
            tip = parents[tip.source]
        chains.append(chain[::-1])
        taken |= {link.manifest.point for link in chain}
        merged |= stood_for(chain)
    return chains


def stood_for(chain: Iterable[Found]) -> set[str]:
    """The points that fulls of a chain stand for. The last that one names is its own, or none of us has made it."""
    named = (one.manifest for one in chain)
    return {point for one in named if one.replaces[-1:] == (one.point,) for point in one.replaces}


def _parents(group: Sequence[Found], prefer: Collection[SourceRef]) -> dict[SourceRef, Found | None]:
    """What each source that can be restored builds on (None: nothing); the others are left out."""
    of_point: dict[str, list[Found]] = {}  # of those that can be restored
    parents: dict[SourceRef, Found | None] = {}
    for one in sorted(group, key=lambda one: (one.manifest.number, one.source.token)):
        if one.manifest.parent is None:
            parents[one.source] = None
        else:
            ready = [other for other in of_point.get(one.manifest.parent.point, ()) if _carries(other, one)]
            if not ready:
                continue
            # What was recorded before a flatten has been proved; its result is taken where parts of that are gone.
            parents[one.source] = min(ready, key=lambda it: (it.source not in prefer, bool(it.manifest.replaces)))
        of_point.setdefault(one.manifest.point, []).append(one)
    return parents


def _carries(parent: Found, child: Found) -> bool:
    link, manifest = child.manifest.parent, parent.manifest
    return (
        link is not None
        and link.point == manifest.point
        and link.digest in (parent.digest, manifest.stands_for)
        and manifest.number < child.manifest.number
    )


def _image(datastore: str, chain: Sequence[Found]) -> Image:
    first, last = chain[0], chain[-1]
    rows = [
        Increment(
            id=one.manifest.number,
            pid=before.manifest.number if before else -1,
            type=one.manifest.type,
            point=one.manifest.point,
            source=one.source,
            size=one.size,
            date=one.date,
            consistency=one.manifest.consistency,
            reason=one.manifest.reason,
            digest=one.digest,
            disks=tuple(part.disk for part in one.manifest.disks),
        )
        for one, before in zip(chain, [None, *chain], strict=False)
    ]
    return Image(
        uuid=last.manifest.image,
        number=0,
        vm=VM(uuid=last.manifest.vm.uuid, name=last.manifest.vm.name),
        datastore=datastore,
        state="closed",
        increments=tuple(rows),
        # Whoever has added to it last: an image may have been taken over, and a host may have got another name.
        host=last.manifest.host,
        began=first.began,
        installation=last.manifest.installation or "",
    )


def _others(group: Sequence[Found], chains: Sequence[Sequence[Found]]) -> list[Remark]:
    taken = {one.source for chain in chains for one in chain}
    merged = {point for chain in chains for point in stood_for(chain)}
    used = {one.manifest.point: one.source for chain in chains for one in chain}
    remarks = []
    for one in group:
        if one.source in taken:
            continue
        what = f"increment {one.manifest.number} of image {one.manifest.image}, VM {one.manifest.vm.name}"
        kind: Literal["unused", "damaged"] = "unused"
        if one.manifest.point in used:
            why = f"source {used[one.manifest.point]} is used for it"
        elif one.manifest.point in merged:
            why = "it was merged into a later full"
        else:
            kind = "damaged"
            on = one.manifest.parent.point if one.manifest.parent else "nothing"
            why = f"it builds on point {on}, which is not there or cannot be restored"
        remarks.append(Remark(source=one.source, kind=kind, why=f"{what}: {why}", image=one.manifest.image))
    return remarks
