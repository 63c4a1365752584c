"""The options: what is refused, what reaches restic, and what must never show."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from backupcore.context import Context
from backupcore.errors import AccessDenied, BackupError, Busy, ConfigError, TargetUnavailable
from backupcore.model import BackupRun, BytesArtifact, SourceRef
from backupcore.mounts import unmounted
from backupcore.options import build
from backupcore_restic import Restic
from backupcore_restic import repository as repository_module
from backupcore_restic.place import creatable
from backupcore_restic.repository import Repository, in_memory

Options = Callable[..., Restic]


class OtherRestic:
    """A program in restic's place: it writes down how it was called, and answers as a version that is not installed.

    `answers` maps words of the command line to a shell command; the first that occurs counts.
    """

    def __init__(self, folder: Path, answers: dict[str, str]) -> None:
        self.program = folder / "restic"
        self._calls = folder / "calls"
        self._environment = folder / "environment"
        cases = "".join(f'  *" {words} "*) {answer};;\n' for words, answer in answers.items())
        self.program.write_text(
            f'#!/bin/sh\necho "$@" >> {shlex.quote(str(self._calls))}\n'
            f"env > {shlex.quote(str(self._environment))}\n"
            f'case " $* " in\n{cases}esac\n'
        )
        self.program.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines()

    @property
    def environment(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self._environment.read_text().splitlines())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"repository": "/x"}, "exactly one of password_file and password_command"),
        ({"repository": "/x", "password_file": "/p", "password_command": "c"}, "exactly one"),
        ({"repository": "", "password_file": "/p"}, "repository"),
        ({"repository": "  ", "password_file": "/p"}, "repository: must not be empty"),
        *(
            ({"repository": place, "password_file": "/p"}, "repository: restic knows no place that begins so")
            for place in ("nas:/backups", "me@nas:backups", "http://nas:8000/", "REST:http://nas/", "ssh://nas/x")
        ),
        ({"repository": "/x", "password_file": "/p", "pack_size": 3}, "pack_size"),
        ({"repository": "~nobody-here/x", "password_file": "/p"}, "repository: there is no account"),
        ({"repository": "/x", "password_file": "~nobody-here/p"}, "password_file: there is no account"),
        ({"repository": "/x", "password_file": "/p", "cache": "~nobody-here/c"}, "cache: there is no account"),
        ({"repository": "/x", "password_file": "/p", "limit_upload": -1}, "limit_upload"),
        ({"repository": "/x", "password_file": "/p", "lock_wait": -1}, "lock_wait"),
        ({"repository": "/x", "password_file": "/p", "compression": "best"}, "compression"),
        ({"repository": "/x", "password_file": "/p", "pasword": "geheim"}, "pasword"),
    ],
)
def test_wrong_options_are_named(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(Restic, table)
    assert "geheim" not in str(caught.value)


def test_what_reaches_restic(
    options: Options, ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, password: Path
) -> None:
    fake = OtherRestic(tmp_path, {"cat config": f"""echo '{{"id": "{"a" * 64}"}}'"""})
    (tmp_path / "cloud").write_text(
        "# for S3\nexport AWS_ACCESS_KEY_ID=AKIA123456\nAWS_SECRET_ACCESS_KEY='geheim 1'\n\n"
    )
    for name in ("RESTIC_REPOSITORY_FILE", "RESTIC_PASSWORD", "RESTIC_PASSWORD_COMMAND", "AWS_PROFILE", "OF_OURS"):
        monkeypatch.setenv(name, "of the user's shell")
    monkeypatch.delenv("HOME", raising=False)
    driver = options(
        "s3:https://me:geheim@nas/bucket",
        binary=str(fake.program),
        environment_file=str(tmp_path / "cloud"),
        compression="max",
        limit_upload=100,
        limit_download=200,
        pack_size=64,
        read_concurrency=4,
        cache="off",
        restic_options=["s3.storage-class=COLD", "s3.connections=3"],
    )
    assert driver.check(ctx)
    assert fake.calls == [
        "--limit-upload=100 --limit-download=200 --no-cache --option=s3.storage-class=COLD --option=s3.connections=3 "
        "--no-lock cat config"
    ]
    seen = fake.environment
    assert seen.pop("HOME").startswith("/")
    assert {key: value for key, value in seen.items() if key.startswith(("RESTIC_", "AWS_", "OF_"))} == {
        "RESTIC_REPOSITORY": "s3:https://me:geheim@nas/bucket",
        "RESTIC_PASSWORD_FILE": str(password),
        "RESTIC_COMPRESSION": "max",
        "RESTIC_PACK_SIZE": "64",
        "RESTIC_READ_CONCURRENCY": "4",
        "RESTIC_PROGRESS_FPS": "4",
        "AWS_ACCESS_KEY_ID": "AKIA123456",
        "AWS_SECRET_ACCESS_KEY": "geheim 1",
    }
    assert "geheim" not in repr(driver)


def test_packs_under_way_lie_in_memory_only_where_there_is_room(
    options: Options, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_memory(tmp_path) is None, "a folder of a disk is no memory"
    assert in_memory(tmp_path / "none") is None
    monkeypatch.delenv("TMPDIR", raising=False)
    expected = in_memory()
    assert Repository(options(pristine)).environment()[0].get("TMPDIR") == (str(expected) if expected else None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert Repository(options(pristine)).environment()[0]["TMPDIR"] == str(tmp_path)


@pytest.mark.parametrize("line", ["RESTIC_PASSWORD=geheim", "RESTIC_REPOSITORY=/x", "just words: geheim"])
def test_an_environment_file_that_is_wrong(
    options: Options, pristine: Path, ctx: Context, tmp_path: Path, line: str
) -> None:
    (tmp_path / "cloud").write_text(f"A=1\n{line}\n")
    with pytest.raises(ConfigError, match="line 2") as caught:
        options(pristine, environment_file=str(tmp_path / "cloud")).check(ctx)
    assert "geheim" not in str(caught.value)
    with pytest.raises(TargetUnavailable, match="environment file"):
        options(pristine, environment_file=str(tmp_path / "none")).check(ctx)


def test_secrets_that_anybody_can_read_are_pointed_out(
    options: Options, shared: Restic, ctx: Context, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "open").write_text("correct horse\n")
    (tmp_path / "open").chmod(0o644)
    assert options(shared.repository, password_file=str(tmp_path / "open")).check(ctx)
    assert "can be read by everybody" in caplog.text
    assert "horse" not in caplog.text


def test_a_relative_repository_is_that_of_the_caller(
    options: Options, shared: Restic, ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(shared.repository).parent)
    assert options("repository").check(ctx)
    assert options("local:repository").check(ctx)


def test_the_newest_restic(
    options: Options,
    ctx: Context,
    tmp_path: Path,
    make_run: Callable[..., BackupRun],
    make_artifacts: Callable[..., list[BytesArtifact]],
) -> None:
    artifacts = make_artifacts(1000)
    size = sum(one.size for one in artifacts)
    snapshot = "ab" * 32
    fake = OtherRestic(
        tmp_path,
        {
            "list snapshots": "[ -e \"$RESTIC_REPOSITORY/config\" ] && exit; echo 'Fatal: …' >&2; exit 10",
            "cat config": "echo 'Fatal: wrong password' >&2; exit 12",
            "forget": "echo 'unable to create lock in backend: repository is already locked' >&2; exit 11",
            "unlock": "exit 0",
            "init": 'mkdir -p "$RESTIC_REPOSITORY/keys" "$RESTIC_REPOSITORY/data"; cd "$RESTIC_REPOSITORY"; '
            "touch config keys/1",
            "backup": 'cat ./* > /dev/null; echo \'{"message_type":"summary","total_files_processed":5,'
            f'"total_bytes_processed":{size},"data_added":900,"data_added_packed":700,"snapshot_id":"{snapshot}"}}\'',
            "snapshots": f'echo \'[{{"id":"{snapshot}","tags":["backupcore","point=1"],'
            '"summary":{"total_bytes_processed":5}}]\'',
            "find": f'echo \'[{{"matches":[{{"path":"/manifest.json","type":"file"}}],"snapshot":"{snapshot}"}}]\'',
            "ls": f'echo \'{{"message_type":"snapshot","id":"{snapshot}"}}\'; '
            'echo \'{"message_type":"node","name":"manifest.json","type":"file","path":"/manifest.json","size":13}\'',
            "dump": "echo torn; exit 1",
        },
    )
    driver = options(tmp_path / "repository", binary=str(fake.program))
    driver.prebackup(make_run(), ctx)
    assert [call.split()[-1] for call in fake.calls] == ["snapshots", "init", "snapshots"]
    stored = driver.backup(artifacts, make_run(), ctx)
    assert (stored.source.token, stored.stored) == (snapshot, 700)
    assert [(one.source, one.size, dict(one.labels)) for one in driver.sources(ctx)] == [
        (stored.source, 5, {"point": "1"})
    ]
    with pytest.raises(AccessDenied):
        driver.check(ctx)
    with pytest.raises(Busy):
        driver.delete([stored.source], ctx)
    [manifest] = driver.restore(SourceRef(snapshot), ctx)
    with manifest.open() as stream, pytest.raises(TargetUnavailable):
        stream.read()


def test_a_summary_that_misses_a_file_fails_the_backup(
    options: Options,
    ctx: Context,
    tmp_path: Path,
    make_run: Callable[..., BackupRun],
    make_artifacts: Callable[..., list[BytesArtifact]],
) -> None:
    snapshot = "cd" * 32
    fake = OtherRestic(
        tmp_path,
        {
            "backup": f'echo \'{{"message_type":"summary","total_files_processed":4,"snapshot_id":"{snapshot}"}}\'',
            "snapshots": f'echo \'[{{"id":"{snapshot}"}}]\'',
        },
    )
    released: list[list[str]] = []
    ctx.on_release(lambda: released.append(fake.calls))
    with pytest.raises(BackupError, match="4 files"):
        options(tmp_path / "repository", binary=str(fake.program)).backup(make_artifacts(1000), make_run(), ctx)
    assert fake.calls[-1] == f"forget {snapshot}"
    assert [call.split()[0] for [call] in released] == ["backup"], "the guest is let go of before anything is tidied up"


def test_a_clean_up_that_hangs_ends_and_says_what_is_left(
    options: Options,
    ctx: Context,
    tmp_path: Path,
    make_run: Callable[..., BackupRun],
    make_artifacts: Callable[..., list[BytesArtifact]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake = OtherRestic(
        tmp_path,
        {
            "backup": "exit 1",
            "snapshots": f'echo \'[{{"id":"{"cd" * 32}"}}]\'',
            "forget": "echo 'Remove(<x>) returned error, retrying after 2s: connection refused' >&2; exec sleep 600",
        },
    )
    monkeypatch.setattr(repository_module, "CLEAN_UP", 2.0)
    run = make_run()
    started = time.monotonic()
    with pytest.raises(BackupError, match="exit code 1"):
        options(tmp_path / "repository", binary=str(fake.program)).backup(make_artifacts(1000), run, ctx)
    assert time.monotonic() - started < 20
    assert f"restic snapshots --tag run-{run.id} shows it, restic forget removes it" in caplog.text
    assert "connection refused" in caplog.text


def test_a_repository_is_not_created_where_a_disk_should_be_mounted(tmp_path: Path) -> None:
    fstab = tmp_path / "fstab"
    place = tmp_path / "a disk"
    place.mkdir()
    fstab.write_text(
        "# a comment\nUUID=1 / ext4 defaults 0 1\nUUID=2 none swap sw 0 0\n"
        f"nas:/x {tmp_path}/a\\040disk nfs defaults 0 0\n"
    )
    assert unmounted(place / "repository", fstab) == place
    assert unmounted(tmp_path / "another", fstab) is None
    for folder in (place, place / "repository"):
        with pytest.raises(TargetUnavailable, match="nothing is mounted"):
            creatable(folder, fstab)
    fstab.write_text("proc /proc proc defaults 0 0\n")
    assert unmounted(Path("/proc/x"), fstab) is None
    creatable(place, fstab)
    shutil.rmtree(place)
    creatable(place, fstab)


def test_which_snapshots_are_complete_is_told_by_the_listing(options: Options, ctx: Context, tmp_path: Path) -> None:
    """As restic 0.17 and later list them; only for those that do not tell is anything else asked."""

    def snapshot(digit: str, tags: list[str], summary: dict[str, int] | None) -> dict[str, object]:
        found: dict[str, object] = {"id": digit * 64, "tags": ["backupcore", "point=1", *tags]}
        return found if summary is None else found | {"summary": summary}

    whole = {"total_files_processed": 5, "total_bytes_processed": 1234}
    torn = {"total_files_processed": 4, "total_bytes_processed": 1000}
    listed = [snapshot("a", ["backupcore-holds:5.1234"], whole), snapshot("b", ["backupcore-holds:5.1234"], torn)]
    (tmp_path / "list").write_text(json.dumps(listed))
    fake = OtherRestic(tmp_path, {"snapshots": f"cat {tmp_path}/list", "find": f"cat {tmp_path}/found"})
    driver = options(tmp_path / "repository", binary=str(fake.program))
    [found] = driver.sources(ctx)
    assert found.source.token == "a" * 64
    assert found.size == 1234
    assert found.labels == {"point": "1"}
    assert len(fake.calls) == 1

    listed += [snapshot("c", ["backupcore-holds:5.1234"], None), snapshot("d", [], whole), snapshot("e", [], None)]
    hit = {"matches": [{"path": "/manifest.json", "type": "file"}]}
    (tmp_path / "list").write_text(json.dumps(listed))
    (tmp_path / "found").write_text(json.dumps([hit | {"snapshot": digit * 64} for digit in "abcd"]))
    assert [one.source.token[0] for one in driver.sources(ctx)] == ["a", "c", "d"], "what tells is not asked again"
    assert "find" in fake.calls[-1]


def test_the_readme_lists_every_option() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text().partition("## Options")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(Restic))  # type: ignore[arg-type]
