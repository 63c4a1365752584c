"""Swapping disks: all of them or none, wherever it is cut off."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from kept_in_files import WEB

from backupcore.errors import BackupError, HypervisorError, IntegrityError
from vmkeep import swap

DISKS = ("vda", "vdb", "vdc")


@pytest.fixture
def swaps(tmp_path):
    """Three disks, of which vdc is missing, with their restored ones beside them; the journal is not written."""
    made = []
    (tmp_path / ".new").mkdir()
    for disk in DISKS:
        path, new, kept = (tmp_path / name for name in (disk, f".new/{disk}", f"{disk}.kept"))
        new.write_text(f"new {disk}")
        if disk != "vdc":
            path.write_text(f"old {disk}")
        made.append(
            swap.Swap(
                disk=disk,
                new=new,
                path=path,
                kept=kept if path.exists() else None,
                old_stamp=swap.stamp(path),
                new_stamp=swap.stamp(new),
            )
        )
    date = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
    return swap.Swaps(vm=WEB, image=3, increment=2, date=date, disks=tuple(made), ready=True)


def off(_files):
    return nullcontext(True)


def contents(tmp_path):
    return {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}


SWAPPED = {
    "vda": "new vda",
    "vdb": "new vdb",
    "vdc": "new vdc",
    "vda.kept": "old vda",
    "vdb.kept": "old vdb",
}
BEFORE = {"vda": "old vda", "vdb": "old vdb"}


def test_the_journal_is_read_as_it_was_written(tmp_path, swaps):
    assert swap.pending(tmp_path, WEB) is None
    swap.write(tmp_path, swaps)
    assert swap.pending(tmp_path, WEB) == swaps
    assert swaps.reason == "disks vda, vdb, vdc restored in place from image 3, increment 2, on 2026-05-04 03:02:01"
    swap.forget(tmp_path, swaps)
    assert swap.pending(tmp_path, WEB) is None


def test_every_disk_is_swapped_and_the_old_ones_are_kept(tmp_path, swaps):
    swap.carry_out(swaps)
    assert contents(tmp_path) == SWAPPED
    swap.carry_out(swaps)
    assert contents(tmp_path) == SWAPPED, "idempotent"


KILL = """
import os, sys
from pathlib import Path
from backupcore.model import VM
from vmkeep import swap
left = int(sys.argv[2])
def hook(event, arguments):
    global left
    if event in ("os.link", "os.rename", "os.remove"):
        left -= 1
        if left < 0:
            os._exit(9)
swaps = swap.pending(Path(sys.argv[1]), VM(uuid=sys.argv[3], name="web1"))
sys.addaudithook(hook)
swap.carry_out(swaps)
"""


def lacks(tmp_path, swaps) -> bool:
    """Whether a VM with these disks could not start now: one of them is missing."""
    return not all(one.path.exists() for one in swaps.disks)


def killed(tmp_path, step: int) -> bool:
    """Carry the journal out in a process that dies before one of its steps; whether it has come to that."""
    done = subprocess.run([sys.executable, "-c", KILL, str(tmp_path), str(step), WEB.uuid], check=False)
    assert done.returncode in (0, 9)
    return done.returncode == 9


@pytest.mark.parametrize("step", range(6))
def test_cut_off_before_any_of_its_steps_it_is_brought_to_an_end(tmp_path, swaps, step):
    """The steps are link and rename for vda and vdb, then rename for vdc, which is missing; it dies before one."""
    swap.write(tmp_path, swaps)
    assert killed(tmp_path, step) is (step < 5)
    assert lacks(tmp_path, swaps) is (step < 5)
    settled, said = swap.settle(tmp_path, WEB, off)
    if step < 2:  # no disk was swapped yet
        assert settled is None
        assert said.startswith("took back")
        assert contents(tmp_path) == BEFORE
        assert swap.settle(tmp_path, WEB, off) == (None, "")
    else:
        assert settled == swaps
        assert said.startswith("finished")
        assert contents(tmp_path) == SWAPPED
        assert swap.pending(tmp_path, WEB) == swaps, "until the rest has followed"


@pytest.fixture
def whole(tmp_path, swaps):
    """The same with no disk missing, and the variables of the firmware, without which a VM starts."""
    (tmp_path / "vdc").write_text("old vdc")
    (tmp_path / "nvram").write_text("old nvram")
    (tmp_path / ".new/nvram").write_text("new nvram")
    nvram = replace(
        swaps.disks[0],
        disk="nvram",
        new=tmp_path / ".new/nvram",
        path=tmp_path / "nvram",
        kept=tmp_path / "nvram.kept",
        old_stamp=swap.stamp(tmp_path / "nvram"),
        new_stamp=swap.stamp(tmp_path / ".new/nvram"),
        needed=False,
    )
    third = replace(swaps.disks[2], kept=tmp_path / "vdc.kept", old_stamp=swap.stamp(tmp_path / "vdc"))
    return replace(swaps, disks=(nvram, *swaps.disks[:2], third))


@pytest.mark.parametrize("step", range(9))
def test_between_all_old_and_all_new_disks_one_is_missing(tmp_path, whole, step):
    """vda is taken away, then link and rename for the variables, vdb and vdc, then rename for vda."""
    swap.write(tmp_path, whole)
    old = contents(tmp_path)
    assert whole.gate is whole.disks[1]
    assert killed(tmp_path, step) is (step < 8)
    now = {name: text.split()[0] for name, text in contents(tmp_path).items() if "." not in name}
    assert (set(now.values()) == {"old"}) is (step == 0) or "vda" not in now
    assert ("vda" not in now) is (0 < step < 8), now
    told = swap.remark(tmp_path, WEB)
    assert "vmkeep recover web1" in told
    assert ("lacks the file of disk vda, so it cannot start" in told) is (0 < step < 8)
    settled, _ = swap.settle(tmp_path, WEB, off)
    if not step:
        assert settled is None
        assert contents(tmp_path) == old
        assert swap.remark(tmp_path, WEB) == ""
        return
    assert settled == whole
    assert set(contents(tmp_path).values()) == {
        *(f"new {one.disk}" for one in whole.disks),
        *(f"old {one.disk}" for one in whole.disks),
    }


@pytest.mark.parametrize("how", ["runs", "wrote to a new disk", "wrote to an old disk", "a new file is gone"])
def test_with_some_disks_swapped_and_the_vm_started_since_only_the_user_can_tell(tmp_path, swaps, how):
    swap.write(tmp_path, swaps)
    swap.carry_out(replace(swaps, disks=swaps.disks[:1]))
    if how == "wrote to a new disk":
        (tmp_path / "vda").write_text("guest's")
    if how == "wrote to an old disk":
        (tmp_path / "vdb").write_text("guest's")
    if how == "a new file is gone":
        (tmp_path / ".new/vdb").unlink()
    before = contents(tmp_path)
    why = {"runs": "the VM runs", "a new file is gone": "is gone"}.get(how, "was written to or exchanged")
    with pytest.raises(HypervisorError, match=f"with vda restored and vdb, vdc not, and .*{why}") as error:
        swap.settle(tmp_path, WEB, lambda _files: nullcontext(how != "runs"))
    assert f"mv -f {tmp_path}/vda.kept {tmp_path}/vda" in error.value.hint
    assert contents(tmp_path) == before, "nothing is touched"


def test_disks_that_were_moved_away_leave_no_empty_command(tmp_path, swaps):
    swap.write(tmp_path, swaps)
    for one in swaps.disks:
        one.path.unlink(missing_ok=True)
        one.new.unlink()
    with pytest.raises(HypervisorError, match="with none restored and vda, vdb, vdc not, .* vda is gone") as error:
        swap.settle(tmp_path, WEB, off)
    assert "put the old ones back" not in error.value.hint
    assert "vmkeep restore 3 --in-place" in error.value.hint


def test_a_journal_of_an_older_version_that_was_cut_off(tmp_path, whole):
    """It gave every disk a second name and then a new file, one after the other."""
    swap.write(tmp_path, whole)
    (journal,) = (tmp_path / "swaps").iterdir()
    journal.write_text(journal.read_text().replace('"needed": true', '"x": 0').replace('"needed": false', '"x": 0'))
    os.link(tmp_path / "vda", tmp_path / "vda.kept")
    (tmp_path / "vdb").rename(tmp_path / "vdb.kept")
    (tmp_path / ".new/vdb").rename(tmp_path / "vdb")
    assert swap.pending(tmp_path, WEB) == whole
    assert swap.settle(tmp_path, WEB, off)[0] == whole
    assert contents(tmp_path)["vda"] == "new vda"
    assert contents(tmp_path)["vda.kept"] == "old vda"


def test_a_vm_that_ran_before_any_disk_was_swapped_keeps_its_disks(tmp_path, swaps):
    swap.write(tmp_path, swaps)
    os.link(tmp_path / "vda", tmp_path / "vda.kept")  # as far as it came
    (tmp_path / "vda").write_text("a week's work")
    assert swap.settle(tmp_path, WEB, off)[0] is None
    assert contents(tmp_path) == {**BEFORE, "vda": "a week's work"}


def test_a_file_that_came_to_a_second_name_costs_no_old_disk(tmp_path, whole):
    for name in ("vda.kept", "vdb.kept"):
        (tmp_path / name).write_text("somebody else's")
    before = contents(tmp_path)
    with pytest.raises(BackupError, match=r"\.kept"):
        swap.carry_out(whole)
    assert contents(tmp_path) == before


def test_without_hard_links_a_disk_that_was_renamed_away_comes_to_its_end(tmp_path, swaps):
    swap.write(tmp_path, swaps)
    (tmp_path / "vda").rename(tmp_path / "vda.kept")
    assert swap.settle(tmp_path, WEB, off)[0] == swaps
    assert contents(tmp_path) == SWAPPED


def test_files_that_were_not_finished_go(tmp_path, swaps):
    swap.write(tmp_path, replace(swaps, ready=False))
    assert swap.settle(tmp_path, WEB, off)[0] is None
    assert contents(tmp_path) == BEFORE
    assert not (tmp_path / ".new").exists()
    assert swap.settle(tmp_path, WEB, off) == (None, "")


def test_a_journal_that_cannot_be_read_is_named(tmp_path, swaps):
    swap.write(tmp_path, swaps)
    (journal,) = (tmp_path / "swaps").iterdir()
    journal.write_text("{")
    with pytest.raises(IntegrityError, match=str(journal)):
        swap.settle(tmp_path, WEB, off)
