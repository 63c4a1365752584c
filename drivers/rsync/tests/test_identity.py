"""What a target is known by: a marker, made once, in a folder, over ssh and at a daemon."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from backupcore.errors import TargetUnavailable
from backupcore_rsync.layout import MARKER


def test_a_target_gets_its_marker_when_it_is_told_to_and_keeps_it(kind, ctx):
    driver = kind.driver()
    assert driver.identity(False, ctx) is None
    assert driver.check(ctx)
    assert kind.everything() == [], "what only reads has written"
    made = driver.identity(True, ctx)
    assert (kind.root / MARKER).read_text() == f"{made}\n"
    assert [driver.identity(make, ctx) for make in (True, False)] == [made, made]
    assert kind.everything() == [MARKER]
    assert list(driver.sources(ctx)) == []


@pytest.mark.parametrize("name", ["folder", "host"])
def test_several_at_once_agree(make_kind, ctx, name):
    kind = make_kind(name)
    with ThreadPoolExecutor(6) as several:
        found = set(several.map(lambda _: kind.driver().identity(True, ctx), range(6)))
    assert len(found) == 1
    assert kind.everything() == [MARKER]


@pytest.mark.parametrize("hostile", ["garbage", "long", "empty", "link", "fifo", "folder"])
def test_a_marker_that_is_none(kind, ctx, hostile):
    marker = kind.root / MARKER
    match hostile:
        case "garbage":
            marker.write_text("../../etc/passwd\n")
        case "long":
            marker.write_text("0" * 32 + "\n" + "x" * 100_000)
        case "empty":
            marker.touch()
        case "link":
            (kind.root / "other").write_text("0" * 32)
            marker.symlink_to("other")
        case "fifo":
            os.mkfifo(marker)
        case "folder":
            marker.mkdir()
    was = marker.lstat()
    if kind.name == "daemon" and hostile in ("link", "fifo", "folder"):
        # A listing shows that it is no plain file, and rsync makes none in its place.
        assert kind.driver().identity(False, ctx) is None
        return
    for make in (False, True):
        with pytest.raises(TargetUnavailable):
            kind.driver().identity(make, ctx)
    assert marker.lstat().st_ino == was.st_ino


@pytest.mark.parametrize("name", ["folder", "host"])
def test_a_target_that_is_away_is_no_new_one(make_kind, ctx, name):
    kind = make_kind(name)
    kind.root.rename(kind.root.with_name("away"))
    for make in (False, True):
        with pytest.raises(TargetUnavailable):
            kind.driver().identity(make, ctx)
    assert not kind.root.exists()
