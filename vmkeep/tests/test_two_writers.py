"""A backup begins while a flatten of the same VM writes into the same target: both are whole in the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from kept_in_files import WEB

from backupcore.testing.processes import wait_for


@pytest.fixture
def slow_rsync(tmp_path: Path) -> Path:
    """An rsync that, with a file ``wait`` beside it, waits once it has copied, and says so by a file ``reached``."""
    program = tmp_path / "rsync"
    program.write_text(
        f'#!/bin/sh\ncd "{tmp_path}"\nrsync "$@"; code=$?\n'
        "[ ! -e wait ] || { touch reached; while [ -e wait ]; do sleep 0.05; done; }\nexit $code\n"
    )
    program.chmod(0o755)
    return program


def test_a_backup_leaves_a_running_flatten_alone(site, slow_rsync):
    table = f'[datastores.nas]\ndriver = "rsync"\ntarget = "{site.store}"\n'
    through = f'binary = "{slow_rsync}"\nrsync_arguments = ["--times"]\n'
    site.configure(datastores=table)
    for number in range(3):
        site.write(WEB, "vda", number * 70_000, f"night {number}".encode() * 5_000)
        assert site.run("backup", "web1").code == 0
    assert site.run("backup", "web1", "--reset").code == 0
    assert site.run("backup", "web1").code == 0  # into image 2, which nobody flattens
    waiting = slow_rsync.with_name("wait")
    waiting.touch()
    site.configure(datastores=table + through)
    flatten = site.start("image", "flatten", "1")
    try:
        assert wait_for(slow_rsync.with_name("reached").exists)
        site.configure(datastores=table)  # this one writes by itself
        done = site.run("backup", "web1")
        assert done.code == 0, done.err
    finally:
        waiting.unlink()
        _, err = flatten.communicate(timeout=60)
    assert flatten.returncode == 0, err
    for image in site.run("image", "list", "--json").json:
        assert site.run("image", "verify", str(image["id"])).code == 0
