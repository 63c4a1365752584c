"""The contract holds whatever a driver does: what it answers is looked at, what it raises is told as what it is."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from backupcore import Context, Datastore, hookimpl, hookspecs
from backupcore.errors import (
    Cancelled,
    ContractViolation,
    IncrementImpossible,
    Locked,
    SourceNotFound,
    TargetFull,
    TargetUnavailable,
)
from backupcore.model import VM, Artifact, BackupRun, Listed, Outcome, RunState, SourceRef, Stored, Type, Usage
from backupcore.testing import MemoryDriver, MemoryGuest, MemoryHypervisor
from backupcore.thread import aside

SOURCE = SourceRef("a" * 32)
RUN = BackupRun(
    id="1" * 32, vm=VM(uuid="7d1c1a4e-0000-4000-8000-000000000001", name="web1"), host="h", datastore="nas",
    image="2" * 32, number=0, point="3" * 32, type=Type.FULL,
)  # fmt: skip


class Merge:
    sources = (SOURCE,)
    artifacts = ()


VERBS = {
    "prebackup": lambda store, ctx: store.prebackup(RUN, ctx),
    "backup": lambda store, ctx: store.backup((), RUN, ctx),
    "flatten": lambda store, ctx: store.flatten(Merge(), RUN, ctx),
    "restore": lambda store, ctx: store.artifacts(SOURCE, ctx),
    "delete": lambda store, ctx: store.delete([SOURCE], ctx),
    "sources": lambda store, ctx: store.sources(ctx),
    "check": lambda store, ctx: store.check(ctx),
    "usage": lambda store, ctx: store.usage(ctx),
    "locks": lambda store, ctx: store.locks([SOURCE], ctx),
    "maintain": lambda store, ctx: store.maintain(ctx),
}


def leave() -> None:
    sys.exit(0)


def drop_a_task() -> None:
    raise asyncio.CancelledError


def stop() -> None:
    raise StopIteration


def close_a_generator() -> None:
    raise GeneratorExit


STRAYS = [leave, drop_a_task, stop, close_a_generator]


def with_hook(hook: str, work) -> Datastore:
    """A datastore whose driver does `work` in this hook and keeps the contract in all others."""

    class Wild(MemoryDriver):
        pass

    setattr(Wild, hook, hookimpl(lambda self: work()))
    return Datastore("nas", Wild(), kind="wild", hypervisor=None)


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context(tmp_path)


@pytest.mark.parametrize("stray", STRAYS)
@pytest.mark.parametrize("hook", VERBS)
def test_a_stray_of_any_hook_names_driver_datastore_and_hook(ctx: Context, hook: str, stray):
    with pytest.raises(ContractViolation, match=f"driver wild of datastore nas: {hook} failed with "):
        VERBS[hook](with_hook(hook, stray), ctx)


@pytest.mark.parametrize("stray", STRAYS)
def test_a_stray_of_postbackup_is_an_error_among_those_that_are_told(ctx: Context, stray):
    (error,) = with_hook("postbackup", stray).postbackup(RUN, Outcome(state=RunState.FAILED), ctx)
    assert "driver wild of datastore nas: postbackup failed with" in str(error)


def test_what_is_tried_here_are_hooks_of_the_contract():
    hooks = {name for name, spec in vars(hookspecs).items() if hasattr(spec, "backupcore_spec")}
    assert {*VERBS, "postbackup"} <= hooks


class Lazy(Artifact):
    name = "disk.vda.qcow2"
    size = 10

    def __init__(self, open_=None, read=None, read_at=None, close=None) -> None:
        self.work = {"open": open_, "read": read, "read_at": read_at, "close": close}

    def _do(self, what: str) -> None:
        if self.work[what]:
            self.work[what]()

    def open(self):
        self._do("open")
        return self

    def read(self, count=-1):
        self._do("read")
        return bytes(10)

    def read_at(self, offset, length):
        self._do("read_at")
        return bytes(length)

    def close(self):
        self._do("close")


def read_all(artifact: Artifact) -> bytes:
    with artifact.open() as file:
        return file.read(5)


READS = {
    "open_": read_all,
    "read": read_all,
    "close": lambda artifact: artifact.close(),
    "read_at": lambda artifact: artifact.read_at(0, 5),
}


@pytest.mark.parametrize("stray", STRAYS)
@pytest.mark.parametrize("step", READS)
def test_a_stray_of_an_artifact_names_driver_and_artifact(ctx: Context, step: str, stray):
    found = with_hook("restore", lambda: [Lazy(**{step: stray})]).artifacts(SOURCE, ctx)["disk.vda.qcow2"]
    with pytest.raises(ContractViolation, match=f"driver wild of datastore nas: .*{SOURCE}//disk.vda.qcow2 failed"):
        READS[step](found)


def test_a_stray_as_a_stream_is_closed_is_told(ctx: Context):
    found = with_hook("restore", lambda: [Lazy(close=leave)]).artifacts(SOURCE, ctx)["disk.vda.qcow2"]
    with pytest.raises(ContractViolation, match="closing .* failed with SystemExit"):
        found.open().close()


def lazily(*items: object, then=None):
    yield from items
    if then:
        then()


class Overfull(Lazy):
    def read(self, count=-1):
        return bytes(count + 1)


def sized(size: object) -> Artifact:
    made = Lazy()
    made.size = size  # type: ignore[assignment]  # what is tested
    return made


ANSWERS = [
    ("backup", lambda: None, "backup returned NoneType"),
    ("backup", lambda: "token", "backup returned str: it must be a Stored"),
    ("backup", lambda: Stored(source="token"), "a source that is no SourceRef but str"),
    ("backup", lambda: Stored(source=SOURCE, stored=-5), "backup returned stored=-5 cannot be"),
    ("backup", lambda: Stored(source=SOURCE, stored=True), "stored=True cannot be"),
    ("backup", lambda: Stored(source=SOURCE, stored=1.5), "stored=1.5 cannot be"),
    ("backup", lambda: Stored(source=SOURCE, stored=1 << 63), "stored=9223372036854775808 cannot be"),
    ("backup", lambda: SourceRef("2026/01/01"), "backup: '2026/01/01' is no valid source token"),
    ("flatten", lambda: Stored(source=SOURCE, stored=-1), "flatten returned stored=-1 cannot be"),
    ("restore", lazily, "restore returned generator"),
    ("restore", lambda: ["disk.vda.qcow2"], "restore returned str among the artifacts"),
    ("restore", lambda: [Lazy(), Lazy()], "names artifact disk.vda.qcow2 of a+ twice"),
    ("restore", lambda: [sized(-1)], "artifact disk.vda.qcow2 with size=-1 cannot be"),
    ("restore", lambda: [sized(None)], "without a size"),
    ("sources", lambda: ["a", "b"], "driver wild of datastore nas: sources gave str where a Listed was expected"),
    ("sources", lambda: lazily("a"), "sources gave str where a Listed was expected"),
    ("sources", lambda: lazily(then=leave), "sources failed with SystemExit"),
    ("sources", lambda: 5, "sources returned int"),
    ("sources", lambda: [Listed(source="a", labels={})], "a source that is no SourceRef but str"),
    ("sources", lambda: [Listed(source=SOURCE, labels={"number": 1})], "labels that are no table of strings"),
    ("sources", lambda: [Listed(source=SOURCE, labels={}, size=-1)], "size=-1 cannot be"),
    ("delete", lambda: None, "delete returned NoneType"),
    ("delete", lambda: False, "delete did not delete a+"),
    ("check", lambda: False, "check returned False"),
    ("usage", lambda: Usage(used=-1), "usage returned used=-1 cannot be"),
    ("locks", lambda: {"a+": None}, "locks gave a source that is no SourceRef but str"),
    ("locks", lambda: {SOURCE: datetime(2999, 1, 1)}, "locks gave a+ until .* neither a time with its zone nor None"),
    ("locks", lambda: {SOURCE: "2999-01-01"}, "locks gave a+ until '2999-01-01', neither"),
    ("maintain", lambda: "done", "maintain returned str"),
    ("locks", lambda: [SOURCE], "locks returned list"),
    ("locks", lambda: {SOURCE: True}, "locks gave a+ until True, neither a time with its zone nor None"),
    ("locks", lambda: {SourceRef("b"): None}, "locks gave b, which it was not asked for"),
]


@pytest.mark.parametrize(("hook", "answer", "told"), ANSWERS, ids=[told[:30] for _, _, told in ANSWERS])
def test_an_answer_that_cannot_be_names_the_driver(ctx: Context, hook: str, answer, told: str):
    with pytest.raises(ContractViolation, match=told) as caught:
        VERBS[hook](with_hook(hook, answer), ctx)
    assert caught.value.message.startswith("driver wild")


@dataclass(frozen=True)
class Snapshot(SourceRef):
    """A driver's own kind of source: what is of another type is equal to none."""

    made: int = 0


class Text(str):
    """As of a library that makes its own strings."""

    __hash__ = None  # type: ignore[assignment]  # what is tested

    def __eq__(self, other: object) -> bool:
        return False


def test_a_source_of_a_type_of_the_drivers_own_is_the_same_source(ctx: Context):
    for own in (Snapshot(SOURCE.token, 1), SourceRef(Text(SOURCE.token))):
        assert with_hook("backup", lambda own=own: Stored(source=own)).backup((), RUN, ctx).source == SOURCE
        (listed,) = with_hook("sources", lambda own=own: [Listed(source=own, labels={})]).sources(ctx)
        assert listed.source == SOURCE
    locks = with_hook("locks", lambda: {Snapshot(SOURCE.token, 1): LAST_DAY}).locks([SOURCE], ctx)
    assert set(locks) == {SOURCE}


def test_one_table_of_labels_that_a_driver_fills_anew_is_several(ctx: Context):
    def sources():
        labels: dict[str, str] = {}
        for vm in ("web1", "db1"):
            labels["vm"] = vm
            yield Listed(source=SourceRef(vm), labels=labels)

    listed = with_hook("sources", sources).sources(ctx)
    assert [(one.source.token, one.labels["vm"]) for one in listed] == [("web1", "web1"), ("db1", "db1")]


def test_a_listing_without_an_end_hears_a_cancel(ctx: Context):
    def sources():
        yield Listed(source=SOURCE, labels={})
        ctx.cancel()
        for _ in range(10):
            yield Listed(source=SOURCE, labels={})
        raise AssertionError("it goes on for ever")

    with pytest.raises(Cancelled):
        with_hook("sources", sources).sources(ctx)


def test_what_a_stream_gives_is_looked_at(ctx: Context):
    store = with_hook("restore", lambda: [Overfull()])
    with pytest.raises(ContractViolation, match="where 1048576 were asked for"):
        read_all(store.artifacts(SOURCE, ctx)["disk.vda.qcow2"])

    class Text(Lazy):
        def read(self, count=-1):
            return "text"

    with pytest.raises(ContractViolation, match="read returned str"):
        read_all(with_hook("restore", lambda: [Text()]).artifacts(SOURCE, ctx)["disk.vda.qcow2"])

    class Pathlike(Lazy):
        def open(self):
            return Path("x")

    with pytest.raises(ContractViolation, match="returned PosixPath, no stream"):
        with_hook("restore", lambda: [Pathlike()]).artifacts(SOURCE, ctx)["disk.vda.qcow2"].open()


class Mute(TargetFull):
    def __init__(self) -> None:
        Exception.__init__(self)


def raising(error: BaseException):
    def work() -> None:
        raise error

    return work


def test_errors_of_the_taxonomy_pass_as_they_are(ctx: Context):
    for error in (TargetFull("full", "make room"), SourceNotFound("none"), Cancelled("cancelled")):
        with pytest.raises(type(error)) as caught:
            VERBS["backup"](with_hook("backup", raising(error)), ctx)
        assert caught.value is error
    with pytest.raises(TargetUnavailable, match="datastore nas, delete: refused"):
        VERBS["delete"](with_hook("delete", raising(ConnectionRefusedError(111, "refused"))), ctx)


def test_an_error_of_a_group_is_told_as_by_itself(ctx: Context):
    async def fail(error: BaseException) -> None:
        raise error

    async def work(*errors: BaseException) -> None:
        async with asyncio.TaskGroup() as group:
            for error in errors:
                group.create_task(fail(error))

    full = TargetFull("full", "make room")
    for errors, kind, told in (
        ([full], TargetFull, "^full$"),
        ([ValueError("a bug"), OSError(errno.ENOSPC, "No space left"), full], TargetFull, "^full$"),
        ([ValueError("a bug"), OSError(errno.ENOSPC, "No space left")], TargetFull, "backup: No space left"),
        ([ValueError("a bug"), KeyError("another")], ContractViolation, "backup failed with ValueError: a bug"),
    ):
        with pytest.raises(kind, match=told):
            VERBS["backup"](with_hook("backup", lambda errors=errors: asyncio.run(work(*errors))), ctx)


def test_a_child_that_a_read_has_forked_goes_on_with_nothing(ctx: Context):
    children = []

    def fork() -> None:
        if child := os.fork():
            children.append(child)
        else:
            raise OSError(errno.EIO, "in the child")

    found = with_hook("restore", lambda: [Lazy(read_at=fork)]).artifacts(SOURCE, ctx)["disk.vda.qcow2"]
    own = os.getpid()
    try:
        assert found.read_at(0, 5) == bytes(5)
    finally:
        if os.getpid() != own:
            os._exit(77)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 1


def test_an_error_without_a_message_or_out_of_its_place_is_the_drivers_fault(ctx: Context):
    with pytest.raises(ContractViolation, match="backup raised Mute without a message"):
        VERBS["backup"](with_hook("backup", raising(Mute())), ctx)
    # The session would take a full for it, though the guest has been touched.
    with pytest.raises(ContractViolation, match="backup raised IncrementImpossible .*prebackup alone may"):
        VERBS["backup"](with_hook("backup", raising(IncrementImpossible("no"))), ctx)


MISTAKES = {
    "an argument in the singular": (
        "    @hookimpl\n    def delete(self, source): ...\n",
        "driver Shelf: delete: there is no argument source; this hook may take sources, ctx",
    ),
    "a forgotten decorator": (
        "    def delete(self, sources): ...\n",
        "delete must be decorated with @backupcore.hookimpl",
    ),
    "a misspelt hook": ("    @hookimpl\n    def chek(self): ...\n", "there is no hook chek; did you mean check?"),
    "an invented hook": (
        "    @hookimpl\n    def frobnicate(self): ...\n",
        "there is no hook frobnicate; the hooks are prebackup, backup",
    ),
    "a default": ("    @hookimpl\n    def check(self, ctx=None): ...\n", "check: argument ctx has a default"),
    "all arguments": ("    @hookimpl\n    def check(self, **rest): ...\n", "check: argument *rest is never filled"),
    "no self": ("    @hookimpl\n    def check(): ...\n", "check has no argument self"),
    "a keyword": ("    @hookimpl\n    def check(self, *, ctx): ...\n", "check: argument ctx stands after a *"),
    "a coroutine": ("    @hookimpl\n    async def check(self): ...\n", "check is async: a hook is a plain function"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_hook_is_one_line_that_names_driver_hook_and_argument(mistake: str):
    code, told = MISTAKES[mistake]
    names: dict[str, object] = {"MemoryDriver": MemoryDriver, "hookimpl": hookimpl}
    exec(f"class Shelf(MemoryDriver):\n{code}", names)
    with pytest.raises(ContractViolation) as caught:
        Datastore("nas", names["Shelf"]())  # type: ignore[operator]  # the class
    assert told in caught.value.message
    assert "driver Shelf" in caught.value.message
    assert "\n" not in caught.value.in_full


def test_a_plugin_that_ends_the_program_as_it_is_looked_at_is_named():
    class Leaving(MemoryDriver):
        @property
        def anything(self):
            sys.exit(0)

    with pytest.raises(ContractViolation, match="driver Leaving of datastore nas: .* failed with SystemExit"):
        Datastore("nas", Leaving())


def test_strays_of_what_a_plugin_leaves_in_the_context(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    done = []
    with Context(tmp_path) as ctx:
        first, second = ctx.on_cancel(leave), ctx.on_cancel(lambda: done.append("child ended"))
        with first, second:
            ctx.cancel()
    assert done == ["child ended"]
    ctx = Context(tmp_path)
    ctx.on_touch(leave)
    with pytest.raises(ContractViolation, match="before the guest is touched failed with SystemExit"):
        ctx.touch()
    with pytest.raises(ContractViolation, match="stack failed with SystemExit"), Context(tmp_path) as ctx:
        ctx.stack.callback(leave)
    with pytest.raises(TargetFull), Context(tmp_path) as ctx:
        ctx.stack.callback(leave)
        raise TargetFull("the first error")
    assert "after an error: a plugin: closing" in caplog.text


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        ("no", ContractViolation, "a plugin: stopping the run failed with TypeError: str is no error"),
        (ValueError("no"), ContractViolation, "a plugin: stopping the run failed with ValueError: no"),
        (OSError(errno.ENOSPC, "No space left"), TargetFull, "a plugin, stopping the run: No space left"),
        (TargetFull("scratch is full"), TargetFull, "^scratch is full$"),
    ],
)
def test_what_a_plugin_stops_the_run_with_is_an_error_of_the_taxonomy(ctx: Context, error, kind, told: str):
    ctx.fail(error)
    with pytest.raises(kind, match=told):
        ctx.check()


def test_what_is_made_once_may_be_made_of_something_else_that_is(ctx: Context):
    made = aside(lambda: ctx.once("connection", lambda: ctx.once("settings", lambda: "host") + ":22"), "once")
    assert made is not None
    made.join(10)
    assert not made.is_alive(), "it waits for itself"
    assert ctx.once("connection", lambda: "made again") == "host:22"


def test_hypervisor_and_site_plugins_are_given_by_name():
    hypervisor, site = MemoryHypervisor([MemoryGuest(RUN.vm, {"vda": bytearray(1)})]), Site()
    new = Datastore("nas", MemoryDriver(), hypervisor=hypervisor, plugins=[site])
    assert [type(one) for one in new._plugins] == [MemoryHypervisor, MemoryDriver, Site]
    assert [type(one) for one in Datastore("nas", MemoryDriver(), plugins=[])._plugins] == [MemoryDriver]
    with pytest.warns(DeprecationWarning, match="hypervisor=hypervisor"):
        old = Datastore("nas", MemoryDriver(), plugins=[hypervisor, site])
    assert [type(one) for one in old._plugins] == [MemoryHypervisor, MemoryDriver, Site]
    with pytest.warns(DeprecationWarning, match="hypervisor"):
        assert [type(one) for one in Datastore("nas", MemoryDriver(), plugins=[None, site])._plugins][1:] == [Site]


class Site:
    @hookimpl(wrapper=True)
    def check(self):
        return (yield)


def test_the_contract_has_a_version_that_the_page_names():
    page = (Path(__file__).parent.parent / "docs/hooks.md").read_text()
    assert f"The contract's version is {hookspecs.CONTRACT}" in page


LAST_DAY = datetime.max.replace(tzinfo=timezone(timedelta(hours=-12)))


def test_a_lock_until_the_end_of_all_days_is_one(ctx: Context):
    found = with_hook("locks", lambda: {SOURCE: LAST_DAY}).locks([SOURCE], ctx)
    assert found == {SOURCE: datetime.max.replace(tzinfo=UTC)}


def refuse(until: object):
    def work() -> None:
        raise Locked("it is locked", until=until)

    return work


@pytest.mark.parametrize("hook", ["delete", "flatten"])
def test_until_when_a_refusal_counts_is_looked_at(ctx: Context, hook: str):
    with pytest.raises(Locked, match="it is locked") as caught:
        VERBS[hook](with_hook(hook, refuse(LAST_DAY)), ctx)
    assert caught.value.until == datetime.max.replace(tzinfo=UTC)
    with pytest.raises(ContractViolation, match=f"driver wild of .*: {hook} raised Locked until 'tomorrow', neither"):
        VERBS[hook](with_hook(hook, refuse("tomorrow")), ctx)
