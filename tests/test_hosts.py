"""What `make test-hosts` is put together from, as far as it needs no host."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.hosts import readme, selection
from lab.hosts.root import HostNotBuilt, sources

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
