"""A driver that gives a token twice: refused before anything is recorded, and nothing is deleted by it."""

from __future__ import annotations

import json

from kept_in_files import DB, WEB


def give(site, token: str) -> None:
    (site.store / "token").write_text(token)


def test_a_token_that_was_given_before_is_refused_and_the_earlier_image_keeps_its_source(site):
    give(site, "monday")
    first = site.run("backup", "web1", "--json").json
    assert first["source"] == "monday"
    for arguments in (("backup", "web1", "--reset"), ("backup", DB.name), ("backup", "web1")):
        told = site.run(*arguments, "--json")
        assert (told.code, told.error["class"]) == (1, "ContractViolation"), told.err
        assert "driver files of datastore nas gave token monday a second time" in told.error["message"]
        assert "Nothing is recorded" in told.error["hint"]
        assert "the next backup of" not in told.err, "it is never to be recorded"
    assert (site.store / "monday").is_dir(), "the clean-up of the failed run has deleted nothing"
    assert not (site.store / "deleted").exists()
    assert [image["id"] for image in site.run("image", "list", "--json").json] == [1]
    assert not site.guest(WEB).busy
    (site.store / "token").unlink()
    again = site.run("backup", "db1", "--json").json
    assert again["source"] != "monday"
    assert not list((site.state / "runs").glob("*")), "no run of those is left to be adopted"


def test_a_run_that_was_given_up_deletes_nothing_under_a_token_that_is_anothers(site):
    give(site, "monday")
    site.configure(extra='plugins = ["kept_in_files:Watch"]')
    assert site.run("backup", "web1").code == 0
    (site.folder / "full").touch()
    told = site.run("backup", DB.name)
    assert told.code != 0
    assert not (site.store / "deleted").exists()
    assert (site.store / "monday").is_dir()


def test_the_result_of_a_flatten_under_another_images_token_is_refused(site):
    give(site, "monday")
    assert site.run("backup", DB.name).code == 0
    (site.store / "token").unlink()
    for number in range(2):
        site.write(WEB, "vda", number * 100_000, b"night" * 1000)
        assert site.run("backup", "web1").code == 0
    before = site.run("image", "show", "2", "--json").json
    give(site, "monday")
    told = site.run("image", "flatten", "2", "--json")
    assert (told.code, told.error["class"]) == (1, "ContractViolation"), told.err
    assert "driver files of datastore nas gave token monday a second time: increment 0 of image 1" in told.err
    assert site.run("image", "show", "2", "--json").json == before
    assert not (site.store / "deleted").exists()
    (site.store / "token").unlink()
    assert site.run("backup", "web1", "--json").json["type"] == "INCREMENT"
    assert json.loads(site.run("image", "verify", "2", "--json").out)["ok"] is True
