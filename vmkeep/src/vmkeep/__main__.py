"""``python -m vmkeep``."""

from vmkeep.start import main

main()
