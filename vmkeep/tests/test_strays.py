"""Whatever a driver does: exit code 0 comes from an answer alone, and standard output is ours."""

from __future__ import annotations

import json

import pytest

VERBS = {
    "prebackup": ("backup", "web1"),
    "backup": ("backup", "web1"),
    "restore": ("restore", "1", "--verify-only"),
    "open": ("restore", "1", "--verify-only"),
    "read_at": ("image", "verify", "1"),
    "delete": ("image", "delete", "1", "--yes"),
    "sources": ("catalog", "rebuild", "nas"),
    "check": ("datastore", "check", "nas"),
    "usage": ("datastore", "check", "nas"),
}


def wild(site, what: str) -> None:
    (site.store / "wild").write_text(what)


@pytest.mark.parametrize("hook", VERBS)
def test_a_driver_that_ends_the_program_ends_no_command_well(site, hook):
    assert site.run("backup", "web1").code == 0
    wild(site, f"{hook} leave")
    told = site.run(*VERBS[hook], "--json")
    assert told.code != 0
    said = told.err + told.out  # verify tells what it has found in its document
    assert "failed with SystemExit: 0" in said
    assert "driver files of datastore nas" in said


@pytest.mark.parametrize("hook", ["restore", "open", "delete", "sources", "check"])
def test_a_driver_that_closes_every_file_ends_no_command_well_and_hangs_none(site, hook):
    assert site.run("backup", "web1").code == 0
    wild(site, f"{hook} close")
    told = site.process(*VERBS[hook], "--json")
    assert told.code != 0, told.out
    assert "Traceback" not in told.err
    (site.store / "wild").unlink()
    assert site.run("image", "list", "--json").code == 0, "nobody has written into the catalog"


def test_the_kit_tells_of_such_a_driver_as_of_any_other(site):
    wild(site, "sources leave")
    told = site.run("driver", "test", "files", "-o", f"path={site.store}", "--check", "labels", "--json")
    assert told.code == 1
    (check,) = json.loads(told.out)["checks"]
    assert "sources failed with SystemExit" in check["why"]


@pytest.mark.parametrize("hook", ["backup", "restore", "delete"])
def test_what_a_library_does_at_the_end_of_the_program_makes_no_failure_a_success(site, hook):
    assert site.run("backup", "web1").code == 0
    wild(site, f"{hook} end-well")
    told = site.process(*VERBS[hook], "--json")
    assert told.code == 5, told
    assert "the store is away" in told.err


def test_after_a_release_that_ends_the_program_the_backup_is_done_with_a_warning(site):
    wild(site, "postbackup leave")
    told = site.run("backup", "web1")
    assert told.code == 3
    assert "postbackup failed with SystemExit" in told.err


def test_a_driver_that_becomes_another_program_is_named(site):
    wild(site, "backup exec")
    told = site.process("backup", "web1")
    assert told.code == 1, told
    assert "has ended vmkeep (os.execve(" in told.err or "has ended vmkeep (os.execv(" in told.err
    assert "kept_in_files.py" in told.err
    (site.store / "wild").unlink()
    assert site.run("backup", "web1").code == 0


def test_what_a_driver_its_children_and_threads_print_is_none_of_our_output(site):
    wild(site, "all print")
    for arguments in (("backup", "web1"), ("datastore", "check", "nas"), ("image", "verify", "1")):
        told = site.process(*arguments, "--json")
        assert told.code == 0, told.err
        json.loads(told.out)
        for line in ("by a driver", "by a C library", "by a child", "by a thread"):
            assert line in told.err, arguments
    told = site.process("restore", "1", "--stdout", "--disk", "vdb", "--format", "raw")
    assert told.code == 0, told.err
    assert "print" not in told.out
    assert "printed by a driver" in told.err
    told = site.run("image", "list", "--json")
    assert told.json, "also where vmkeep is called in a process of somebody else's"


def test_a_thread_of_a_driver_does_not_keep_vmkeep_alive(site):
    wild(site, "backup go-on")
    told = site.process("backup", "web1", "--json")
    assert told.code == 0, told.err
    assert json.loads(told.out)["type"] == "FULL"
    assert "threads go on (endless), a plugin's: it is not waited for any longer" in told.err


@pytest.mark.parametrize("hook", ["backup", "restore", "delete"])
def test_a_driver_ends_the_processes_that_it_has_forked(site, hook):
    assert site.run("backup", "web1").code == 0
    wild(site, f"{hook} pool")
    told = site.process(*VERBS[hook], "--json")
    assert told.code == 0, told.err


@pytest.mark.parametrize("verb", ["backup", "restore", "check"])
def test_nothing_that_a_store_says_moves_the_cursor_in_a_traceback_either(site, verb):
    assert site.run("backup", "web1").code == 0
    wild(site, f"{verb} curse")
    told = site.process(*VERBS[verb], "-v")
    assert told.code == 5
    assert "Traceback" in told.err
    assert "all is well" in told.err
    assert all(letter.isprintable() or letter == "\n" for letter in told.err)


@pytest.mark.parametrize("hook", ["backup", "delete"])
def test_an_error_whose_text_ends_the_program_is_told_as_any(site, hook):
    assert site.run("backup", "web1").code == 0
    wild(site, f"{hook} speak-not")
    told = site.run(*VERBS[hook])
    assert told.code == 1
    assert f"driver files of datastore nas: {hook} failed with _Unspeakable: (its text cannot be had: SystemExit)" in (
        told.err
    )


def test_a_listing_of_something_else_is_told_as_the_kit_tells_it(site):
    assert site.run("backup", "web1").code == 0
    (site.store / "strings").touch()
    told = site.run("catalog", "rebuild", "nas")
    assert told.code == 1
    assert "driver files of datastore nas: sources gave str where a Listed was expected" in told.err
