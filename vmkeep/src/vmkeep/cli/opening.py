"""Opening the workplace for a command: log, configuration."""

from __future__ import annotations

from vmkeep import config
from vmkeep.cli import log
from vmkeep.cli.asked import Asked
from vmkeep.workplace import Workplace

__all__ = ["workplace"]


def workplace(asked: Asked) -> Workplace:
    """The workplace of the configuration that was asked for."""
    log.start(asked.verbose)
    return Workplace(config.load(asked.config))
