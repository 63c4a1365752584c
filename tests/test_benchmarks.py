"""The benchmarks' own measure and record: a wrong figure would be believed."""

from __future__ import annotations

import json
import socket
import sys
import threading

import pytest

from benchmarks import measure, record
from benchmarks.counted import Counted
from benchmarks.figures import MIB, Spread, line

# A child that takes 64 MiB and half a second of processor time, reads 1 MiB, writes 2 MiB; the parent only waits.
_CHILD = (
    "import pathlib, time, sys; held = bytearray(b'x' * (64 << 20)); end = time.process_time() + 0.5\n"
    "while time.process_time() < end: pass\n"
    "folder = pathlib.Path(sys.argv[1]); (folder / 'new').write_bytes((folder / 'old').read_bytes() * 2)"
)
_PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]], check=True); print('told')"


def test_a_command_is_measured_with_its_children(tmp_path):
    (tmp_path / "old").write_bytes(bytes(MIB))
    sample = measure.run(sys.executable, "-c", _PARENT, _CHILD, tmp_path, output=tmp_path / "printed")
    assert (tmp_path / "printed").read_text() == "told\n"
    assert sample.commands[0].endswith(f"{tmp_path} > {tmp_path}/printed")
    assert 0.5 <= sample.processor < 5
    assert 64 * MIB < sample.memory < 256 * MIB
    assert sample.descriptors >= 3
    # The rest are the files of Python itself.
    assert MIB <= sample.inward < 8 * MIB
    assert 2 * MIB <= sample.outward < 3 * MIB


def test_a_command_that_fails_is_no_figure():
    with pytest.raises(RuntimeError, match=r"ended with 3: no such disk"):
        measure.run("sh", "-c", "echo no such disk >&2; exit 3")


def sample(wall: float) -> measure.Sample:
    return measure.Sample(wall=wall, processor=wall / 2, memory=MIB, written=2 * MIB, commands=("run /tmp/x/it",))


def test_rivals_take_turns_and_are_compared_round_by_round():
    order: list[str] = []
    walls = {"ours": iter([2.0, 3.0]), "theirs": iter([1.0, 6.0])}

    def work(name: str) -> measure.Sample:
        order.append(name)
        return sample(next(walls[name]))

    works = {name: (lambda name=name: work(name)) for name in walls}
    figures = list(measure.compared("a full", works, 2, {"theirs": 1.3}))
    assert order == ["ours", "theirs", "theirs", "ours"]
    (ratio,) = [figure for figure in figures if figure.measure == "wall ratio"]
    assert ratio.spread == Spread(1.25, 0.5, 2.0)
    assert ratio.met
    assert line([ratio]) == "a full, ours : theirs: wall ratio 1.25 (0.50 to 2.00) [at most 1.3: met]"


def row(name: str, wall: float, at_most: float | None = None) -> record.Row:
    figures = measure.costs("a full", "ours", [sample(wall)], at_most)
    return record.Row(
        name=name,
        about="What it is about.",
        date="2026-01-02 03:04 UTC",
        commit="abc1234",
        rounds=1,
        data=256,
        machine="a machine",
        versions={"restic": "0.14.0"},
        figures=tuple(record.plain(figure, {"/tmp/x": "DIR"}) for figure in figures),
    )


def test_a_row_that_is_measured_again_replaces_itself_and_no_other(tmp_path):
    record.write(tmp_path, [row("second", 2.0), row("first", 1.0, 5.0)], ["first", "second"])
    record.write(tmp_path, [row("second", 9.0, 5.0)], ["first", "second"])
    told = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [one["name"] for one in told] == ["first", "second"]
    assert [one["figures"][0]["spread"]["median"] for one in told] == [1.0, 9.0]
    assert [one["figures"][0]["met"] for one in told] == [True, False]
    assert record.Row.from_json(told[0]) == row("first", 1.0, 5.0)
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| [second](#second) | a full | ours, wall | 9.00 (9.00 to 9.00) s | 5 s | **no** |" in page
    assert "# a full: ours\nrun DIR/it\n" in page
    assert "2026-01-02 03:04 UTC, commit abc1234, 1 rounds, 256 MiB of data. a machine.\nrestic 0.14.0." in page


def test_what_passes_a_counted_server_is_counted_both_ways():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            client, _ = server.accept()
            with client:
                while client.recv(1024):
                    pass
                client.sendall(b"y" * 500)

        threading.Thread(target=answer, daemon=True).start()
        with Counted(server.getsockname()[1]) as counted:
            port = int(counted.url.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
                client.sendall(b"x" * 1000)
                client.shutdown(socket.SHUT_WR)
                got = b""
                while piece := client.recv(1024):
                    got += piece
            assert got == b"y" * 500
            assert (counted.sent, counted.received) == (1000, 500)
