"""The log: warnings on stderr, with -v what is being done, with -vv everything."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from vmkeep.cli.exits import each_line, one_line

__all__ = ["start"]

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at that moment: a progress bar puts itself in front of it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        line = f"vmkeep: {level}{one_line(record.getMessage())}"
        if record.exc_info and logging.getLogger("vmkeep").isEnabledFor(logging.INFO):
            line += "\n" + each_line(self.formatException(record.exc_info))
        return line


def start(verbose: int) -> None:
    """Send our own log to stderr. Other libraries' stays where it is: theirs may hold what ours must not."""
    for name in ("backupcore", "vmkeep"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
            handler = _Stderr()
            handler.setFormatter(_Line())
            logger.addHandler(handler)
            logger.propagate = False
        logger.setLevel(_LEVELS[min(verbose, 2)])
