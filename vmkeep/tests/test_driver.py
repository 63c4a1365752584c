"""``vmkeep driver``: examining drivers, and beginning new ones."""

from __future__ import annotations

import builtins
import json
import keyword
import logging
import re
import signal
import sys
import tomllib
import types
from pathlib import Path

import pytest

import backupcore.model
from backupcore import Context, Datastore, plugins
from backupcore.errors import ConfigError
from backupcore.options import build, driver, option
from vmkeep import driver_options, new_driver


def examine(site, *words: str):
    return site.run("driver", "test", "files", "-o", f"path={site.store}", *words)


def test_a_driver_is_examined_and_what_was_stored_is_deleted(site):
    told = examine(site, "--check", "token", "--check", "secrets", "--json").json
    assert (told["driver"], told["package"], told["ok"]) == ("files", "kept-in-files 1.0", True)
    assert [(one["check"], one["verdict"]) for one in told["checks"]] == [
        ("token", "ok"),
        ("secrets", "not applicable"),
    ]
    assert [file.name for file in site.store.iterdir()] == ["deleted"]


def test_the_kit_hears_all_and_shows_no_more_than_was_asked_for(site):
    (site.store / "talk").touch()
    told = examine(site, "--check", "token")
    assert (told.code, told.err) == (0, "")
    assert "vmkeep: debug: token is " in examine(site, "--check", "token", "-vv").err
    assert logging.getLogger("backupcore").level == logging.DEBUG, "as -vv has set it"


def test_a_check_that_fails_is_told_with_its_reason_and_an_exit_code(site):
    (site.store / "fail-delete").touch()
    told = examine(site, "--check", "delete", "--check", "token")
    assert told.code == 1
    assert told.out.splitlines()[1].startswith("failed          delete ")
    assert "TargetUnavailable" in told.out.splitlines()[2]
    assert told.out.splitlines()[-1] == "1 ok, 1 failed"
    assert "could not be deleted" in told.err
    quiet = examine(site, "-q", "--check", "delete", "--check", "token")
    assert quiet.out.splitlines()[-1] == "1 ok, 1 failed"
    assert not any(line.startswith("ok ") for line in quiet.out.splitlines())
    assert examine(site, "--check", "answers", "--json").code == 1


def test_ctrl_c_ends_it_and_what_was_stored_goes(site):
    child = site.start("driver", "test", "files", "-o", f"path={site.store}")
    site.until(lambda: any(len(path.name) == 32 for path in site.store.iterdir()), "a first backup")
    (site.store / "wait").touch()
    site.until((site.store / "waits").exists, "a backup that waits")
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "vmkeep: cancelled\n")
    assert {path.name for path in site.store.iterdir()} == {"wait", "waits", "deleted"}


def test_ctrl_c_ends_backups_that_are_made_at_once(site):
    (site.store / "wait").touch()
    child = site.start("driver", "test", "files", "-o", f"path={site.store}", "--check", "concurrent")
    site.until((site.store / "waits").exists, "a backup that waits")
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err.strip()) == (130, "vmkeep: cancelled")


def test_what_is_wrong_with_the_place_or_an_option_is_told_as_such(site):
    assert site.run("driver", "test", "nonsense").code == 2
    told = site.run("driver", "test", "files", "-o", f"path={site.folder / 'away'}", "--json")
    assert (told.code, told.error["class"]) == (5, "TargetUnavailable")
    told = site.run("driver", "test", "files", "-o", "pth=hunter2")
    assert told.code == 2
    assert "pth: unknown key" in told.err
    assert "hunter2" not in told.err
    for wrong in (("-o", "path"), ("-o", "=x"), ("-o", "path=/a", "-o", "path=/b")):
        assert site.run("driver", "test", "files", *wrong).code == 2
    assert "round-trip" in examine(site, "--check", "nonsense").err


def test_options_are_written_as_their_type_asks():
    @driver
    class Typed:
        text: str = option("text", default="")
        path: Path = option("a path", default=Path())
        number: int = option("a number", default=0)
        on: bool = option("a switch", default=False)
        several: list[str] = option("several", default_factory=list)

    words = ["text=5", "path=true", "number=5", "on=true", 'several=["a"]', "other=x y"]
    assert driver_options.parse(Typed, words) == {
        "text": "5",
        "path": "true",
        "number": 5,
        "on": True,
        "several": ["a"],
        "other": "x y",
    }
    with pytest.raises(ConfigError, match="given twice"):
        driver_options.parse(Typed, ["text=1", "text=2"])


def test_a_new_driver_has_its_own_name_everywhere(site):
    told = site.run("driver", "new", "my-tape", "--to", str(site.folder), "--json").json
    assert told["name"] == "my-tape"
    assert [str(Path(path).relative_to(site.folder)) for path in told["files"]] == [
        "backupcore-my-tape/pyproject.toml",
        "backupcore-my-tape/README.md",
        "backupcore-my-tape/src/backupcore_my_tape/__init__.py",
        "backupcore-my-tape/tests/test_my_tape.py",
    ]
    for path in told["files"]:
        text = Path(path).read_text()
        assert "shelf" not in text.lower(), path
        if path.endswith(".py"):
            compile(text, path, "exec")
            assert "MyTape" in text
    assert 'my-tape = "backupcore_my_tape:MyTape"' in Path(told["files"][0]).read_text()
    again = site.run("driver", "new", "my-tape", "--to", str(site.folder))
    assert again.code == 2
    assert "exists already" in again.err


def test_a_new_driver_in_the_current_folder(site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(site.folder)
    told = site.run("driver", "new", "tape")
    assert told.out.splitlines()[-1] == " && ".join(["Then: cd backupcore-tape", *new_driver.commands()])
    readme = Path("backupcore-tape/README.md").read_text()
    assert all(f"    {line}\n" in readme for line in new_driver.commands())
    assert Path("backupcore-tape/tests").is_dir()


def test_how_it_is_installed_hangs_on_where_backupcore_came_from(tmp_path, monkeypatch: pytest.MonkeyPatch):
    info = tmp_path / "site" / "backupcore-9.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: backupcore\nVersion: 9.0\n")
    monkeypatch.syspath_prepend(str(info.parent))
    beside = new_driver.commands()
    assert f"{sys.executable} -m pip install -e .[test]" in beside, "it came from an index"
    wheel = tmp_path / "a wheel.whl"
    (info / "direct_url.json").write_text(json.dumps({"url": wheel.as_uri(), "archive_info": {}}))
    assert new_driver.commands() == beside, "the wheel is gone"
    wheel.touch()
    assert f".venv/bin/pip install '{wheel}' -e .[test]" in new_driver.commands()
    (info / "direct_url.json").write_text(json.dumps({"url": tmp_path.as_uri(), "dir_info": {"editable": True}}))
    assert f".venv/bin/pip install {tmp_path} -e .[test]" in new_driver.commands()


def words() -> list[str]:
    """Every name that Python, TOML, YAML or the skeleton's own code means something by, as a driver may be called."""
    skeleton = new_driver._template("shelf.py") + new_driver._template("test_shelf.py.in")
    split = re.sub(r"(?<=[a-z])(?=[A-Z])|_", "-", " ".join(re.findall(r"\w+", skeleton))).lower().split()
    known = [*keyword.kwlist, *keyword.softkwlist, *dir(builtins), *split]
    known += ["inf", "nan", "null", "yes", "no", "on", "off", "shelf", "bookshelf", "test-shelf", "backupcore-shelf"]
    legal = {word.strip("-").lower().replace("_", "-") for word in known}
    installed = plugins.names(plugins.DRIVERS)
    return sorted(word for word in legal if new_driver._NAME.fullmatch(word) and word not in installed)


def test_a_new_driver_of_every_legal_name_is_one_that_works(tmp_path):
    """Written, read as TOML and Python, and opened; none, true, stored, path and import among them."""
    names = words()
    assert {"none", "true", "stored", "path", "class", "import", "source-ref", "inf", "shelf"} <= {*names}
    plain = [name for name in names if new_driver._class(name).lower() == name.replace("-", "")]
    assert all(new_driver._class(name).isidentifier() for name in plain)
    for name in sorted({*names} - {*plain[10:-10]}):  # all whose class is called otherwise, and some others
        new_driver.write(name, tmp_path)
        package = tmp_path / f"backupcore-{name}"
        project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
        ((key, value),) = project["entry-points"]["backupcore.drivers"].items()
        assert (project["name"], key) == (f"backupcore-{name}", name)
        module, _, kind = value.partition(":")
        code = (package / "src" / module / "__init__.py").read_text()
        found = types.ModuleType(f"kit_{module}")
        sys.modules[found.__name__] = found
        exec(compile(code, module, "exec"), found.__dict__)
        store = Datastore("nas", build(getattr(found, kind), {"path": str(tmp_path)}, where="x"), kind=name)
        with Context(tmp_path) as ctx:
            store.check(ctx)
            assert store.sources(ctx) == []
        assert found.Stored is backupcore.model.Stored, name
        assert found.Path is Path, name
        (test,) = (package / "tests").iterdir()
        compile(test.read_text(), test.name, "exec")
        del sys.modules[found.__name__]


@pytest.mark.parametrize("name", ["Tape", "../tape", "-x", "a--b", "9", "", "x" * 41, "restic", "files", "libvirt"])
def test_a_name_that_cannot_be_one(site, name: str):
    told = site.run("driver", "new", "--to", str(site.folder), "--", name)
    assert told.code == 2
    assert not list(site.folder.glob("backupcore-*"))
