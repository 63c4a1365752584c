"""A plugin's hooks before they are called: what pluggy would not notice, or tell in words of its own."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from backupcore import hookspecs
from backupcore.errors import ContractViolation

__all__ = ["check_hooks", "implements"]


def implements(plugin: object, hook: str) -> bool:
    """Whether a plugin has this hook itself; a wrapper of it is none."""
    options = _options(getattr(plugin, hook, None))
    return options is not None and not options["wrapper"] and not options["hookwrapper"]


def check_hooks(plugin: object, what: str, *, required: Sequence[str] = ()) -> None:
    """ContractViolation that names `what` the plugin is, its hook and the argument, if one cannot be called as it is.

    `required` are the hooks that it must have.
    """
    specs = _specs()
    for name in dir(type(plugin)):
        method = getattr(plugin, name, None)
        options = _options(method)
        if options is None:
            continue
        hook = options.get("specname") or name
        if hook not in specs:
            if options.get("optionalhook"):
                continue
            near = difflib.get_close_matches(hook, specs, 1)
            meant = f"did you mean {near[0]}?" if near else f"the hooks are {', '.join(specs)}"
            raise ContractViolation(f"{what}: there is no hook {hook}; {meant}")
        _check_arguments(f"{what}: {name}", method, specs[hook])
    missing = [hook for hook in required if not implements(plugin, hook)]
    unmarked = [hook for hook in missing if callable(getattr(plugin, hook, None)) and not _wraps(plugin, hook)]
    if unmarked:
        raise ContractViolation(f"{what}: {', '.join(unmarked)} must be decorated with @backupcore.hookimpl")
    if missing:
        raise ContractViolation(f"{what} does not implement: {', '.join(missing)}")


def _check_arguments(what: str, method: Any, takes: Sequence[str]) -> None:
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
        raise ContractViolation(f"{what} is async: a hook is a plain function, which may block")
    try:
        parameters = inspect.signature(method).parameters.values()
    except ValueError:  # not even room for the object itself
        raise ContractViolation(f"{what} has no argument self, which each method begins with") from None
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ContractViolation(f"{what}: argument *{parameter.name} is never filled; name those that it needs")
        if parameter.name not in takes:
            raise ContractViolation(
                f"{what}: there is no argument {parameter.name}; this hook may take {', '.join(takes)}"
            )
        if parameter.kind is parameter.KEYWORD_ONLY:
            raise ContractViolation(f"{what}: argument {parameter.name} stands after a *, where it is never filled")
        if parameter.default is not inspect.Parameter.empty:
            # pluggy never passes such an argument, so the hook would work on the default for ever.
            raise ContractViolation(f"{what}: argument {parameter.name} has a default, which is never filled")


def _specs() -> dict[str, tuple[str, ...]]:
    """Hook -> the arguments that it may take."""
    return {
        name: tuple(inspect.signature(spec).parameters)
        for name, spec in vars(hookspecs).items()
        if getattr(spec, f"{hookspecs.PROJECT}_spec", None) is not None
    }


def _options(method: object) -> dict[str, Any] | None:
    found = getattr(method, f"{hookspecs.PROJECT}_impl", None)
    return found if isinstance(found, dict) else None


def _wraps(plugin: object, hook: str) -> bool:
    return _options(getattr(plugin, hook, None)) is not None
