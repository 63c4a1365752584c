"""What `make test-on` is put together from, as far as it needs no root of another release."""

from __future__ import annotations

from pathlib import Path

from lab.hosts.suite import half

ROOT = Path(__file__).parent.parent


def test_the_half_of_the_tests_that_ci_runs_elsewhere_names_tests():
    named = half()
    assert len(named) == len(set(named))
    for path in named:
        assert (ROOT / path).exists(), path
        assert "#" not in path
