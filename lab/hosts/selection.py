"""Which tests run on the hosts, by name, each with its reason.

A host is an emulated machine, and its VMs are emulated once more: a VM without an operating system starts there in 12 s
instead of half a second. So only tests are chosen of which a real host may make something else than the suite has seen:
each way to hold a VM, each way to end badly, and what a user types. `make soak` runs the whole files.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

BOTH = ("bookworm", "trixie")
BOOKWORM = ("bookworm",)
TRIXIE = ("trixie",)  # systemd is process 1 there


@dataclass(frozen=True)
class Chosen:
    """A test, or all of a file: why it runs, and on which hosts."""

    name: str
    why: str
    on: tuple[str, ...] = BOTH


_PLUGIN = "drivers/libvirt/tests"

FIRST = (
    Chosen("lab/hosts/checks/test_confined.py", "without it, the others prove nothing of a real host"),
    Chosen("lab/hosts/checks/test_first_backup.py::test_as_typed", "what a new user does"),
)
CHOSEN = (
    # Changed block tracking: QEMU makes the socket and the scratch files, by the rules of its profile.
    Chosen(
        f"{_PLUGIN}/test_backup.py::test_full_and_increments_equal_what_the_disks_held_at_one_instant",
        "a full and increments of a running VM",
    ),
    Chosen(f"{_PLUGIN}/test_backup.py::test_raw_disks", "scratch beside a raw disk"),
    Chosen(f"{_PLUGIN}/test_backup.py::test_the_guest_ends_while_its_disk_is_read", "its profile goes with it"),
    Chosen(
        f"{_PLUGIN}/test_disk_by_disk.py::test_disks_that_come_and_go_and_grow",
        "libvirt changes the profile of a running VM at each plug",
    ),
    Chosen(
        f"{_PLUGIN}/test_disk_by_disk.py::test_somebody_else_moves_the_vm_onto_an_overlay_and_back",
        "the file below an overlay is read-only for the profile",
        BOOKWORM,
    ),
    Chosen(f"{_PLUGIN}/test_healing.py::test_two_chains_side_by_side", "two backups of one start", TRIXIE),
    # Overlays: libvirt before 12.1 denies writes to a file that was once below the VM's own (deny beats allow).
    Chosen(f"{_PLUGIN}/test_snapshot_mode.py::test_overlays_at_rest_do_not_pile_up", "five nights of a running VM"),
    Chosen(
        f"{_PLUGIN}/test_snapshot_rules.py::test_switching_between_the_modes[off]",
        "overlays of a VM that is off",
        BOOKWORM,
    ),
    # I/O threads: QEMU 7.2 is held by an overlay on each disk for the time of a run, 10.0 by a backup job.
    Chosen(
        f"{_PLUGIN}/test_iothreads.py::test_a_vm_with_an_io_thread_survives_its_backups",
        "by whichever way this QEMU needs",
    ),
    Chosen(
        f"{_PLUGIN}/test_temporary_overlays.py::test_what_a_dead_run_has_left_is_merged_by_a_recovery[live]",
        "an active commit under a profile",
    ),
    Chosen(
        f"{_PLUGIN}/test_temporary_overlays.py::test_the_vm_is_switched_off_meanwhile[started again]",
        "a file below the VM's own since its start",
        BOOKWORM,
    ),
    Chosen(
        "tests/test_killed.py::test_killed_while_a_vm_with_an_io_thread_is_held",
        "kill -9 of the command; then all is restored",
        BOOKWORM,
    ),
    # The guest at rest.
    Chosen(
        f"{_PLUGIN}/test_freeze.py::test_file_systems_frozen_by_the_agent_need_no_journal_replay",
        "the agent's socket, by libvirt",
        BOOKWORM,
    ),
    Chosen(
        f"{_PLUGIN}/test_freeze.py::test_a_run_that_is_killed_while_the_guest_stands_still[AGENT]",
        "the guest goes on after kill -9",
        BOOKWORM,
    ),
    # The release, kills, recover.
    Chosen(
        f"{_PLUGIN}/test_release.py::test_a_run_that_was_killed_is_cleared_away_by_the_next_one", "a job that is left"
    ),
    Chosen(
        f"{_PLUGIN}/test_release.py::test_the_run_is_given_up_before_scratch_is_full", "scratch on a file system apart"
    ),
    Chosen("tests/test_killed.py::test_killed_at_named_steps", "kill -9 of the command; then all is restored"),
    Chosen("tests/test_killed.py::test_killed_in_snapshot_mode", "the same with overlays, of a VM that is off", TRIXIE),
    Chosen(
        "tests/test_crashes.py::test_recover_lets_a_guest_go_on_that_full_scratch_has_stopped",
        "recover, by libvirt and QEMU of the release",
    ),
    # The whole.
    Chosen(
        "tests/test_whole.py::test_a_full_and_increments_restore_to_what_the_guest_held",
        "with the release's restic",
    ),
    Chosen(
        "tests/test_in_place.py::test_disks_are_replaced_and_a_new_image_says_why",
        "owners and labels of the files that QEMU opens next",
    ),
    Chosen("lab/hosts/checks/test_first_backup.py::test_demo", "a Linux that writes, of the release's kernel", TRIXIE),
    Chosen("lab/hosts/checks/test_unit.py", "a unit that systemd ends leaves the guest running", TRIXIE),
)
SOAK = (
    *(
        Chosen(f"{_PLUGIN}/{name}.py", "all of it")
        for name in (
            "test_backup",
            "test_disk_by_disk",
            "test_healing",
            "test_iothreads",
            "test_temporary_overlays",
            "test_freeze",
            "test_release",
            "test_powered_off",
        )
    ),
    *(
        Chosen(f"tests/{name}.py", "all of it")
        for name in (
            "test_whole",
            "test_killed",
            "test_killed_frozen",
            "test_killed_reading",
            "test_in_place",
            "test_crashes",
            "test_cancel",
            "test_guest_os",
            "test_random",
        )
    ),
    Chosen("lab/hosts/checks/test_first_backup.py::test_demo", "a Linux that writes, of the release's kernel"),
    Chosen("lab/hosts/checks/test_unit.py", "a unit that systemd ends leaves the guest running", TRIXIE),
)
LAST = (Chosen("lab/hosts/checks/test_denied.py", "whatever the others did, nothing was denied"),)


def chosen(suite: str, *, soak: bool = False) -> list[str]:
    """The names for one host, in the order in which they run."""
    return [one.name for one in chain(FIRST, SOAK if soak else CHOSEN, LAST) if suite in one.on]
