"""Whether the last run of pytest here has named up to three tests as failed, none of them a random life."""

import json
import sys
from pathlib import Path

MANY = 4

try:
    failed = sorted(json.loads(Path(".pytest_cache/v/cache/lastfailed").read_text()))
except FileNotFoundError:
    sys.exit("red: pytest did not come to tests that failed")
if len(failed) >= MANY or any("test_random.py" in name for name in failed):
    sys.exit(f"red: {len(failed)} tests failed")
sys.stdout.write("\n  ".join(["these failed in the whole run, and are run once more by themselves:", *failed]) + "\n")
