"""Locks between real processes."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import pytest
from kept_in_files import DB, WEB

from backupcore.errors import Busy
from backupcore.model import Image
from vmkeep import lock

IMAGE = Image(uuid="0" * 32, number=7, vm=WEB, datastore="nas", state="open", increments=())

HOLD = """
import sys
from pathlib import Path
from backupcore.model import VM, Image
from vmkeep import lock
vm = VM(uuid=sys.argv[3], name="web1")
image = Image(uuid="0" * 32, number=7, vm=vm, datastore="nas", state="open", increments=())
with getattr(lock, sys.argv[1])(Path(sys.argv[2]), vm if sys.argv[1] == "vm_run" else image):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def held_elsewhere(what, tmp_path, installed):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, what, str(tmp_path), WEB.uuid],
        env={"PYTHONPATH": installed},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "held\n"
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def test_a_vm_is_busy_at_once_by_name_process_and_time(tmp_path, installed):
    with held_elsewhere("vm_run", tmp_path, installed) as child:
        said = rf"VM web1 is already running \(process {child.pid}, since \d"
        with pytest.raises(Busy, match=said), lock.vm_run(tmp_path, WEB):
            pass
        with lock.vm_run(tmp_path, DB):
            pass
    with lock.vm_run(tmp_path, WEB):
        pass  # a killed holder holds nothing


def test_an_image_is_shared_by_readers_and_taken_by_one_alone(tmp_path, installed):
    with held_elsewhere("image_shared", tmp_path, installed):
        with lock.image_shared(tmp_path, IMAGE):
            pass
        with pytest.raises(Busy, match="image 7 is in use"), lock.image_exclusive(tmp_path, IMAGE):
            pass
    with (
        held_elsewhere("image_exclusive", tmp_path, installed),
        pytest.raises(Busy, match="it is being changed .process"),
        lock.image_shared(tmp_path, IMAGE),
    ):
        pass
