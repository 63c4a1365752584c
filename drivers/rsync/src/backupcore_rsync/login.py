"""One login for a whole run: an ssh that holds the connection, and a socket by which all others of the run use it.

A backup asks another host some six times, a flatten thirty: with as many logins a firewall that counts them
(``ufw limit``) shuts us out. The connection ends with the run, and with this process however that ends. Whoever has
connections shared by a configuration of his own (ControlPath) keeps that.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from backupcore_rsync.programs import Programs

if TYPE_CHECKING:
    from backupcore import Context
    from backupcore_rsync.driver import Rsync
    from backupcore_rsync.target import HostTarget

__all__ = ["login"]

LONGEST = 107 - 17
"""Bytes of a socket's path: what the kernel takes, less what ssh appends to the name while it makes it."""

LOOK = 0.02  # seconds between two looks at whether it is connected
_OWN_ERROR = 255  # ssh's exit code for what it says itself


def login(options: Rsync, target: HostTarget, ctx: Context) -> str:
    """The socket of a connection that lasts as long as `ctx`; "" where each ssh has to connect by itself.

    Raises what hinders the login.
    """
    programs = Programs(options)
    # Another user, key or host is another connection.
    whose = hashlib.sha256("\0".join([*programs.ssh(), target.login]).encode()).hexdigest()
    path = ctx.folder / f"ssh-{whose[:8]}"
    control = _short(path, ctx)
    if path.exists() and _answers(control):  # of the run that is being tidied up after
        return control
    if programs.shares_already(target, ctx):
        return ""
    what = f"connecting to {target.at}"
    with ExitStack() as stack:
        child = stack.enter_context(programs.start_login(target, control))
        end = time.monotonic() + options.timeout
        while not path.exists():
            ctx.wait(LOOK)
            if not child.is_alive:
                code = child.wait()
                if code != _OWN_ERROR:  # a program that knows ssh's usual arguments only
                    ctx.log.info("%s is asked by an ssh for each question", target.at)
                    return ""
                raise programs.failed(child, code, what)
            if time.monotonic() > end:
                child.expire()
                raise programs.failed(child, child.wait(), what)
        ctx.stack.push(stack.pop_all())
    return control


def _short(path: Path, ctx: Context) -> str:
    """The path of a socket as it fits into an address; where it is long, by way of a descriptor of its folder."""
    if len(os.fsencode(path)) <= LONGEST:
        return str(path)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    ctx.stack.callback(os.close, folder)
    return f"/proc/{os.getpid()}/fd/{folder}/{path.name}"


def _answers(control: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(control) == 0
