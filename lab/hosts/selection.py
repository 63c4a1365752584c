"""Which tests run on the hosts, by name, each with its reason.

A host is an emulated machine, and its VMs are emulated once more: a VM without an operating system starts there in 12 s
instead of half a second. So only tests are chosen of which a real host may make something else than the suite has seen:
each way to hold a VM, ways to end badly, and what a user types, each on the host where it may differ most.
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
    Chosen("lab/hosts/checks/test_first_backup.py::test_as_typed", "what a new user does"),
)
CHOSEN = (
    # QEMU makes the socket and the scratch files, by the rules of its profile.
    Chosen(
        f"{_PLUGIN}/test_backup.py::test_full_and_increments_equal_what_the_disks_held_at_one_instant",
        "a full and increments of a running VM",
    ),
)
"""What `make test-hosts` runs beside the first backup, within a quarter of an hour, most of which the hosts need to be
built, to boot and to install the product."""

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
