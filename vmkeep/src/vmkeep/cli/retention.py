"""How retention is told."""

from __future__ import annotations

from vmkeep.retention import Action

__all__ = ["told"]


def told(action: Action) -> str:
    """One line: what happens or has happened to an image, and why."""
    match action.what:
        case "flatten":
            what = f"image {action.image}: {'flattened' if action.done else 'flatten'} up to increment {action.to}"
        case "remove":
            what = f"image {action.image}: {'removed' if action.done else 'remove'}"
        case _:
            what = f"image {action.image}: stays"
    return f"{what} ({action.why})"
