"""The entry point of the ``vmkeep`` script: Ctrl-C has its answer before anything is imported that takes time."""

from __future__ import annotations

from vmkeep import ctrl_c

__all__ = ["main"]


def main() -> None:
    """Run the command of this process's own arguments, and end the process."""
    ctrl_c.ends_at_once()
    from vmkeep.cli.main import main as command  # noqa: PLC0415 - it takes the time in which Ctrl-C may come

    command()
