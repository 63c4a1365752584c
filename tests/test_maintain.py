"""`maintain` of the portable type: done, not needed, or refused as an answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from backupcore import hookimpl
from backupcore.context import Context
from backupcore.datastore import Datastore
from backupcore.errors import ContractViolation
from backupcore.testing import MemoryDriver


class Tidy(MemoryDriver):
    answer: object = True

    @hookimpl
    def maintain(self, ctx: Context) -> object:
        ctx.check()
        return self.answer


class Silent(Tidy):
    answer = None


def test_a_driver_maintains_if_it_can(tmp_path: Path):
    with Context(tmp_path) as ctx:
        assert Datastore("nas", MemoryDriver()).maintain(ctx) is False
        assert Datastore("nas", Tidy()).maintain(ctx) is True
        with pytest.raises(ContractViolation, match="maintain returned NoneType"):
            Datastore("nas", Silent()).maintain(ctx)
