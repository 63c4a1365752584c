"""The configuration: where it is looked for, and every mistake named at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backupcore.errors import ConfigError
from vmkeep import config


def wrong(site, text: str) -> str:
    site.config.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(site.config)
    assert "S3cret" not in f"{caught.value.message} {caught.value.hint}"
    return caught.value.message


def test_every_wrong_key_is_named_with_its_file_and_path_and_no_value(site):
    message = wrong(
        site,
        """
        hots = 1
        [host]
        urii = "S3cret"
        state = 7
        [defaults]
        mode = "S3cret"
        keep_last = -1
        [datastores.nas]
        driver = "files"
        path = "/srv"
        pasword_file = "S3cret"
        [datastores.other]
        driver = "files"
        [datastores.third]
        driver = "no-such"
        [datastores.fourth]
        path = "S3cret"
        [datastores]
        fifth = "S3cret"
        """,
    )
    assert message.startswith(f"{site.config}: ")
    for expected in (
        "hots: unknown key",
        "host.urii: unknown key",
        "host.state: expected str, the path",
        "defaults.mode: expected one of 'FULL', 'INCREMENT'",
        "defaults.keep_last: expected int >= 0",
        "datastores.nas.pasword_file: unknown key",
        "datastores.other.path: required, but missing",
        "datastores.third.driver: no plugin 'no-such' is installed",
        "datastores.fourth.driver: required",
        "datastores.fifth: expected table",
    ):
        assert expected in message


def test_the_nearest_key_is_the_hint(site):
    site.config.write_text(
        f'[host]\nurii = "x"\n[datastores.nas]\ndriver="files"\npath="{site.store}"\npasword_file="x"'
    )
    told = site.run("image", "list", "--json")
    assert told.code == 2
    assert told.error["hint"] == "Did you mean host.uri? Did you mean password_file?"


def test_hints_come_in_the_order_of_the_file(site):
    site.config.write_text('[defaults]\nkep_last = 1\nmod = "FULL"\nful_every = 1\nfs_freze = "NONE"')
    with pytest.raises(ConfigError) as caught:
        config.load(site.config)
    names = ("keep_last", "mode", "full_every", "fs_freeze")
    assert caught.value.hint == " ".join(f"Did you mean defaults.{name}?" for name in names)


def test_a_syntax_error_has_line_and_column(site):
    assert "(at line 2, column 7)" in wrong(site, "[host]\nuri = nothing\n")


@pytest.mark.parametrize("name", ["../x", "a b", ".x", "x" * 65])
def test_a_datastore_name_stays_a_word(site, name):
    assert "datastores." in wrong(site, f'[datastores."{name}"]\ndriver = "files"\npath = "/srv"')


def test_relative_folders_are_refused_and_home_is_expanded(site):
    assert "host.state: must be an absolute path" in wrong(site, '[host]\nstate = "here"')
    assert "host.state: there is no account" in wrong(site, '[host]\nstate = "~nobody-of-this-name/x"')
    site.config.write_text('[host]\nstate = "~/vmkeep"')
    found = config.load(site.config).host
    assert found.state == Path.home() / "vmkeep"
    assert found.scratch == found.state / "scratch"


def test_no_configuration_names_init(site):
    site.config.unlink()
    told = site.run("vm", "list")
    assert (told.code, told.err) == (
        2,
        f"vmkeep: there is no configuration at {site.config}\n  Write one with: vmkeep init\n",
    )


def test_the_environment_and_the_default_path(site, monkeypatch):
    monkeypatch.setenv("VMKEEP_CONFIG", str(site.config))
    assert config.default_path() == site.config
    monkeypatch.delenv("VMKEEP_CONFIG")
    user = Path.home() / ".config/vmkeep/config.toml"
    assert config.default_path() == (user if os.geteuid() else Path("/etc/vmkeep/config.toml"))


def test_init_writes_a_configuration_that_loads_and_never_overwrites(site):
    site.config.unlink()
    told = site.run("init")
    assert told.code == 0
    assert site.config.stat().st_mode & 0o777 == 0o600
    assert config.load(site.config).datastores == {}
    assert "no datastore is configured" in site.run("backup", "web1").err
    again = site.run("init")
    assert (again.code, f"{site.config} exists already" in again.err) == (2, True)


def test_init_filled_in_by_uncommenting_works(site):
    site.config.unlink()
    site.run("init", "--datastore", "mine")
    lines = site.config.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("# [datastores."))
    lines[start:] = [line.removeprefix("# ").replace('"restic"', '"files"') for line in lines[start:]]
    lines = [line.replace("repository =", "path =") for line in lines]
    site.config.write_text("\n".join(lines))
    assert list(config.load(site.config).datastores) == ["mine"]


def test_init_with_a_repository_makes_the_password_too(site):
    site.config.unlink()
    told = site.run("init", "--repository", str(site.store), "--datastore", "nas", "--json").json
    password = site.folder / "nas.password"
    assert told == {"config": str(site.config), "password_file": str(password)}
    assert password.stat().st_mode & 0o777 == 0o600
    assert len(password.read_text().strip()) > 40
    text = site.config.read_text()
    assert f'repository = "{site.store}"' in text
    assert password.read_text().strip() not in text
    site.config.unlink()
    assert site.run("init", "--repository", "x", "--datastore", "nas").code == 2, "the key is never replaced"
