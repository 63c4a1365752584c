"""What `make test-hosts` is put together from, as far as it needs no host."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lab.hosts import readme, selection
from lab.hosts.root import HostNotBuilt, of_one_run, remove_older, sources

ROOT = Path(__file__).parent.parent


def test_the_debian_sources_of_a_machine_for_another_release(tmp_path: Path):
    (tmp_path / "sources.list").write_text(
        "# deb http://old.example/debian bookworm main\n"
        "deb [arch=amd64,i386 signed-by=/usr/share/keyrings/a.gpg] http://mirror.example/debian bookworm main contrib\n"
        "deb-src http://mirror.example/debian bookworm main\n"
        "deb http://other.example/tool bookworm stable\n"
        "deb http://other.example/tool tool-bookworm main\n"
    )
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/debian.sources").write_text(
        "Types: deb deb-src\n# a comment\nURIs: http://mirror.example/security\n"
        "Suites: bookworm-security bookworm-backports\n"
        "Components: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n\n"
        "Types: deb\nEnabled: no\nURIs: http://off.example/debian\nSuites: bookworm\nComponents: main\n"
    )
    assert sources("trixie", own="bookworm", folder=tmp_path) == (
        "types: deb\n"
        "signed-by: /usr/share/keyrings/a.gpg\n"
        "architectures: amd64 i386\n"
        "uris: http://mirror.example/debian\n"
        "suites: trixie\n"
        "components: main\n"
        "\n"
        "types: deb\n"
        "uris: http://mirror.example/security\n"
        "suites: trixie-security\n"
        "components: main\n"
        "signed-by: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n"
    )
    with pytest.raises(HostNotBuilt, match="no source of Debian sid"):
        sources("trixie", own="sid", folder=tmp_path)


def test_the_readme_names_packages_then_installs_then_uses():
    commands = readme.first_backup()
    assert commands.packages[0] == "sudo apt update"
    assert commands.packages[1].startswith("sudo apt install git libvirt-daemon-system ")
    assert commands.install[0] == 'git clone "$REPOSITORY" vmkeep && cd vmkeep'
    assert [command.split()[2] for command in commands.use] == ["init", "check", "backup", "image", "restore"]


def test_every_chosen_test_is_there_and_nothing_is_denied_comes_last():
    for one in (*selection.FIRST, *selection.CHOSEN, *selection.SOAK, *selection.LAST):
        file, _, name = one.name.partition("::")
        assert (ROOT / file).exists(), one.name
        assert f"\ndef {name.partition('[')[0]}" in (ROOT / file).read_text(), one.name
        assert len(one.name.split()) == 1, "a host reads them one a line, by its shell"
    for suite in selection.BOTH:
        for soak in (False, True):
            assert selection.chosen(suite, soak=soak)[-1] == "lab/hosts/checks/test_denied.py"


def test_the_folder_of_a_run_that_was_killed_goes_with_the_next_run(tmp_path: Path):
    run = (
        "import sys, pathlib; from lab.hosts.root import of_one_run\n"
        "with of_one_run('layer', pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'upper').mkdir(); print(folder, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", run, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with of_one_run("layer", tmp_path) as ours:
            assert theirs.is_dir(), "it is still at work"
        assert not ours.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert theirs.is_dir()
    with of_one_run("sources", tmp_path) as ours:
        assert list(ours.parent.iterdir()) == [ours]


def test_what_is_made_anew_takes_the_place_of_what_was_made_of_something_else(tmp_path: Path):
    for name in (
        "root-trixie-host-aaaa",
        "root-trixie-host-bbbb.new",
        "root-trixie-suite-aaaa",
        "root-bookworm-host-aaaa",
    ):
        (tmp_path / name / "usr").mkdir(parents=True)
    remove_older(tmp_path / "root-trixie-host-cccc")
    assert {folder.name for folder in tmp_path.iterdir()} == {"root-trixie-suite-aaaa", "root-bookworm-host-aaaa"}
