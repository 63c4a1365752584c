"""What retention would do to every VM of a catalog: python -m benchmarks.plan CATALOG.

``vmkeep image prune --dry-run`` less the hypervisor, which would have to have these VMs.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

from backupcore.chain import retention
from lab import many_images
from vmkeep.catalog import chains
from vmkeep.catalog.database import Catalog


def main(catalog: str) -> None:
    """Print how many images would be flattened."""
    known = {"MODE": "INCREMENT", "KEEP_LAST": "7", "KEEP_CHAINS": ""}
    found = chains.chains(Catalog.open(Path(catalog)), many_images.OWN, now=datetime.now(UTC))
    plans = [retention(one.chains, known) for one in found]
    print(sum(plan.flattening is not None for plan in plans))


if __name__ == "__main__":
    main(*sys.argv[1:])
