"""The documentation holds what the code has."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from backupcore import hookspecs

ROOT = Path(__file__).parent.parent


def test_every_hook_is_documented_with_its_signature():
    headings = set(re.findall(r"^## `(\w+\(.*\) -> .*)`$", (ROOT / "docs/hooks.md").read_text(), re.MULTILINE))
    hooks = {
        f"{name}{inspect.signature(function)}".replace("'", "")  # annotations are strings there
        for name, function in vars(hookspecs).items()
        if hasattr(function, f"{hookspecs.PROJECT}_spec")
    }
    assert headings == hooks


def test_links_between_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("drivers/*/README.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_every_test_that_the_table_of_mechanisms_names_is_there():
    package = ROOT / "drivers/libvirt"
    table = (package / "README.md").read_text().partition("## Which VM is held in which way")[2].partition("\n### ")[0]
    named = re.findall(r"`((?:tests/)?test_\w+\.py)(?:::(\w+))?`", table)
    assert len(named) > 10
    for file, test in named:
        path = ROOT / file if file.startswith("tests/") else package / "tests" / file
        assert f"def {test}(" in path.read_text() if test else path.exists(), f"{file}::{test}"
