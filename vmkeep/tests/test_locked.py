"""Datastores that delete nothing for a time, or ever: retention waits, and no run fails for it."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from kept_in_files import WEB


@pytest.fixture
def nights(site):
    """Nights of web1, three increments of which are to stay."""
    assert site.run("vm", "updateconf", "web1", "--keep-last", "3").code == 0
    counted = iter(range(100))

    def more(count: int) -> list:
        done = []
        for _ in range(count):
            number = next(counted)
            site.write(WEB, "vda", 70_000 * (number % 14), b"night %03d " % number * 3000)
            done.append(site.run("backup", "web1"))
        return done

    return more


def stored(site) -> int:
    return len([path for path in site.store.iterdir() if path.is_dir()])


def listed(site) -> dict:
    return site.run("image", "list", "--json").json[0]


def change_holds(site, **change: object) -> None:
    with closing(sqlite3.connect(site.state / "catalog.sqlite")) as connection, connection:
        (text,) = connection.execute("SELECT holds FROM images WHERE holds IS NOT NULL").fetchone()
        connection.execute("UPDATE images SET holds = ?", (json.dumps([json.loads(text)[0] | change]),))


def test_a_flatten_waits_for_the_locks_of_what_it_would_delete(site, nights):
    nights(3)
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(days=30)
    (site.store / "locked-until").write_text(until.isoformat())
    done = nights(3)
    assert [one.code for one in done] == [0, 0, 0]
    assert stored(site) == 6, "no further full was made"
    assert f"locks it until {until:%Y-%m-%d %H:%M} UTC" in done[0].out
    held = listed(site)["held"]
    assert (held["kind"], held["until"]) == ("lock", until.strftime("%Y-%m-%dT%H:%M:%SZ"))
    assert f"locked until {until:%Y-%m-%d}" in site.run("image", "list").out
    assert f"locks it until {until:%Y-%m-%d}" in site.run("image", "show", "1").out
    for again in (["--dry-run"], []):
        pruned = site.run("image", "prune", *again, "--json")
        assert pruned.code == 0
        [action] = pruned.json["plans"][0]["actions"]
        assert action["action"] == "keep"
        assert "locks it until" in action["why"]
    assert site.run("image", "delete", "1", "--yes").code == 7
    (site.store / "locked-until").write_text((datetime.now(UTC) - timedelta(days=1)).isoformat())
    change_holds(site, until=(datetime.now(UTC) - timedelta(minutes=1)).isoformat())
    assert listed(site)["held"] is None


def test_after_its_lock_has_ended_all_that_is_due_is_flattened_at_once(site, nights):
    nights(3)
    (site.store / "locked-until").write_text((datetime.now(UTC) + timedelta(days=1)).isoformat())
    nights(3)
    (site.store / "locked-until").unlink()
    change_holds(site, until=(datetime.now(UTC) - timedelta(minutes=1)).isoformat())
    [done] = nights(1)
    assert done.code == 0
    assert stored(site) == 3
    assert listed(site)["held"] is None


def test_a_store_that_is_append_only_is_asked_again_after_a_week(site, nights):
    nights(3)
    (site.store / "append-only").touch()
    done = nights(4)
    assert [one.code for one in done] == [0, 0, 0, 0]
    assert len((site.store / "refused").read_text()) == 1, "it is not asked every night"
    assert stored(site) == 8, "one full was made to find that out"
    assert "append-only" in done[-1].out
    assert listed(site)["held"]["kind"] == "policy"
    assert listed(site)["held"]["until"] is None
    assert "not deletable" in site.run("image", "list").out
    change_holds(site, noted=(datetime.now(UTC) - timedelta(days=8)).isoformat())
    [done] = nights(1)
    assert done.code == 0
    assert len((site.store / "refused").read_text()) == 2
    assert stored(site) == 9, "and no further full"
    (site.store / "append-only").unlink()
    change_holds(site, noted=(datetime.now(UTC) - timedelta(days=8)).isoformat())
    [done] = nights(1)
    assert done.code == 0
    assert stored(site) == 3
    assert listed(site)["held"] is None


def test_a_flatten_by_hand_is_done_and_says_what_stays(site, nights):
    nights(3)
    (site.store / "locked-until").write_text((datetime.now(UTC) + timedelta(days=1)).isoformat())
    done = site.run("image", "flatten", "1")
    assert done.code == 0
    assert "stays for now: its datastore locks it until" in done.out
    assert stored(site) == 4


@pytest.mark.parametrize("refusal", ["locked-until", "append-only"])
def test_an_image_whose_delete_is_refused_goes_on(site, nights, refusal):
    nights(2)
    (site.store / refusal).write_text((datetime.now(UTC) + timedelta(days=1)).isoformat())
    assert site.run("image", "delete", "1", "--yes").code == 7
    assert listed(site)["state"] == "open"
    [done] = nights(1)
    assert (done.code, listed(site)["id"]) == (0, 1)
    assert "INCREMENT backup, image 1" in done.out, "and no full that nobody has asked for"


def test_an_image_whose_delete_is_refused_stays_closed_where_it_was(site, nights):
    nights(1)
    assert site.run("backup", "web1", "--reset").code == 0
    nights(1)
    (site.store / "append-only").touch()
    assert site.run("image", "delete", "1", "--yes").code == 7
    assert sorted(one["state"] for one in site.run("image", "list", "--json").json) == ["closed", "open"]


def test_an_image_that_is_locked_stays(site):
    assert site.run("vm", "updateconf", "web1", "--mode", "FULL", "--keep-last", "2").code == 0
    for _ in range(2):
        assert site.run("backup", "web1").code == 0
    (site.store / "locked-until").write_text((datetime.now(UTC) + timedelta(days=1)).isoformat())
    for _ in range(2):
        done = site.run("backup", "web1")
        assert done.code == 0
        assert "locks it until" in done.out
    assert stored(site) == 4
    (site.store / "locked-until").unlink()
    change_holds(site, until=(datetime.now(UTC) - timedelta(minutes=1)).isoformat())
    assert site.run("backup", "web1").code == 0
    assert stored(site) == 2
