"""``python -m vmkeep``."""

from vmkeep.cli.main import main

main()
