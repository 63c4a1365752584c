"""Which tests run on the hosts, by name, each with its reason.

A host is an emulated machine of one processor, and its VMs are emulated once more: a VM without an operating system
starts there in some 6 s instead of half a second, and a test of a few seconds takes one or two minutes. So of each way
to hold a VM, to end badly and to restore, the tests are chosen of which a real host may make something else than the
suite has seen. Each runs on the host where it may differ most, since the time does not allow all of them on both:

- Debian 12 has the QEMU that dies of a client of an I/O thread (7.2), and the older libvirt, for which AppArmor keeps
  other rules: ways to hold a VM, to let it go, and what a restore in place does to files that a profile names;
- Debian 13 has systemd as process 1, the newer restic, QEMU and Python: the whole path, and units.

`make soak` runs the whole files on both.
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
    Chosen("lab/hosts/checks/test_first_backup.py::test_as_typed", "what a new user does, from the first line on"),
)
CHOSEN = (
    # CBT. QEMU makes the socket and the scratch files, by the rules of its profile.
    Chosen(
        f"{_PLUGIN}/test_backup.py::test_full_and_increments_equal_what_the_disks_held_at_one_instant",
        "CBT: a full and increments of a running VM, of which AppArmor knows each file",
        BOOKWORM,
    ),
    Chosen(
        "tests/test_whole.py::test_a_full_and_increments_restore_to_what_the_guest_held",
        "the whole path: a full and increments by CBT, restic 0.18 and its mount, and all restored",
        TRIXIE,
    ),
    Chosen(
        f"{_PLUGIN}/test_iothreads.py::test_a_vm_with_an_io_thread_survives_its_backups[disk]",
        "temporary overlays: QEMU 7.2 is the one that needs them, and its profile has to allow them and their merge",
        BOOKWORM,
    ),
    Chosen(
        f"{_PLUGIN}/test_device_overlays.py::test_full_and_increments",
        "the same on block devices: the profile has to allow an overlay in scratch, and a merge into a device",
        BOOKWORM,
    ),
    Chosen(
        f"{_PLUGIN}/test_snapshot_mode.py::test_overlays_at_rest_do_not_pile_up",
        "SNAPSHOT, five nights: AppArmor forbids the merge that a machine without it allows (libvirt 9.0 and 11.3)",
    ),
    Chosen(
        "tests/test_in_place.py::test_disks_are_replaced_and_a_new_image_says_why",
        "restore in place: owner and label of files that QEMU's user and its profile must be able to open",
        BOOKWORM,
    ),
    Chosen(
        "tests/test_crashes.py::test_recover_lets_a_guest_go_on_that_full_scratch_has_stopped",
        "kills of vmkeep and its guard, full scratch, and recover",
        BOOKWORM,
    ),
    Chosen("lab/hosts/checks/test_unit.py", "a unit that systemd stops or kills: only where systemd runs", TRIXIE),
    # These share a VM, which stays until the end.
    Chosen(
        f"{_PLUGIN}/test_freeze.py::test_a_suspended_guest_stands_still_for_the_call",
        "freeze: libvirt compiles the profile anew while the guest stands still. Without an agent: that needs a Linux, "
        "which takes three minutes to boot here",
    ),
    Chosen(
        f"{_PLUGIN}/test_guard.py::test_anybody_may_ask_for_the_run_to_be_given_up",
        "release: the guard ends readers and the job, beside a profile that libvirt writes anew meanwhile",
        BOOKWORM,
    ),
    Chosen(
        f"{_PLUGIN}/test_release.py::test_a_run_that_was_killed_is_cleared_away_by_the_next_one",
        "kills: what a dead run has left in the VM's own folder, which the profile allows, goes",
        BOOKWORM,
    ),
)
"""What `make test-hosts` runs beside the first backup, within a quarter of an hour, a third of which the hosts need to
be built, to boot and to install the product."""

SOAK = (
    Chosen(f"{_PLUGIN}/test_snapshot_mode.py::test_overlays_at_rest_do_not_pile_up", "five nights of a running VM"),
    Chosen(
        f"{_PLUGIN}/test_snapshot_rules.py::test_switching_between_the_modes[off]",
        "overlays of a VM that is off",
        BOOKWORM,
    ),
    *(
        Chosen(f"{_PLUGIN}/{name}.py", "all of it")
        for name in (
            "test_backup",
            "test_disk_by_disk",
            "test_healing",
            "test_iothreads",
            "test_temporary_overlays",
            "test_left_overlays",
            "test_freeze",
            "test_guard",
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
