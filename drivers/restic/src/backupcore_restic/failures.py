"""restic's exit codes and stderr as members of the taxonomy: the one place that knows them.

restic 0.17 and later say by exit code that there is no repository (10), that it is locked (11) and that the password is
wrong (12), as ``restic help backup`` tells; older ones exit with 1 for all of these, and only the text tells. Both say
the rest by text alone. The texts were read off restic 0.14 and 0.18 where these could be made to fail so, and are those
of their storage backends elsewhere. A text that is not known is TargetUnavailable, which changes nothing anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from backupcore.errors import (
    AccessDenied,
    BackupError,
    Busy,
    ConfigError,
    IntegrityError,
    SourceNotFound,
    TargetFull,
    TargetUnavailable,
    UnsupportedOperation,
)

__all__ = ["NoRepository", "last_words", "redact", "refuses_to_delete", "translate"]


class NoRepository(TargetUnavailable):
    """The place answers, and holds no repository. Nothing else may read as this: it is what `restic init` follows."""


@dataclass(frozen=True, slots=True)
class Rule:
    """`error` for an exit code of `codes`, or for a line that `text` matches, a regular expression.

    Where there are codes the text counts with exit code 1 only, which is all that restic before 0.17 has.
    """

    error: type[BackupError]
    text: str
    hint: str = ""
    codes: tuple[int, ...] = ()

    def counts(self, code: int) -> bool:
        """Whether its text says anything beside this exit code."""
        return not self.codes or code == 1

    def matches(self, line: str) -> bool:
        """Whether it is found in the line, in capitals or not."""
        return re.search(self.text, line, re.IGNORECASE) is not None


# What 0.18 says of a snapshot that is no longer there: a folder and SFTP; REST, as rclone serves it; S3.
_GONE = (
    r"failed to load snapshot \w+: .*"
    r"(no such file or directory|file does not exist|<snapshot/\w+> does not exist|specified key does not exist)\.?$"
)

# The same of a pack, which restic had written and its index still names; a line that it tries again after says nothing.
_PACK_GONE = (
    r"^(?!.*retrying after).*<data/\w+[^>]*>.*"
    r"(no such file or directory|file does not exist|> does not exist|specified key does not exist|404 not found)\.?$"
    r"|packs from index missing in repo"
)

# Compiled when something has failed: at each start it would take 4 ms.
RULES = (
    Rule(
        AccessDenied,
        r"wrong password or no key found",
        # rclone shows no key and still the configuration, which it keeps in memory, where its disk is not mounted. What
        # keys there are restic tells only with one of them.
        "Check the password file or command of this datastore. restic says the same of a repository without a key: is "
        "the storage of its server mounted?",
        (12,),
    ),
    Rule(
        Busy,
        r"already locked",
        "Another restic works on the repository (prune, check, forget). If none does, on any host: restic unlock.",
        (11,),
    ),
    Rule(
        NoRepository,
        # What each backend of 0.14 says of an object that does not exist, and of nothing else. A network that fails, a
        # bucket that is missing or a folder that cannot be entered must not match: all end in "unable to open config
        # file", too.
        (
            r"unable to open config file: (stat|lstat|open) .*no such file or directory$"
            r"|unable to open config file: .*(file does not exist|specified key does not exist"
            r"|<config/?[^>]*> does not exist|config.*object doesn't exist|object not found)\.?$"
            r"|repository does not exist"
        ),
        "",
        (10,),
    ),
    Rule(
        TargetFull,
        r"no space left on device|quota exceeded|insufficient storage|XMinioStorageFull|storage ?full",
        "Make room there (restic prune frees what deleted backups held), then run it again.",
    ),
    Rule(
        ConfigError,
        (
            r"resolving password failed|empty password|invalid backend|parsing repository location|unknown (short)?hand"
            r"|unknown flag|please specify (repository|password)|pack size .*(small|large)"
            r"|unable to parse|invalid compression|invalid number of bytes|--max-unused|--max-repack-size"
            r"|--read-data-subset"
        ),
        "Check the options of this datastore.",
    ),
    Rule(
        UnsupportedOperation,
        r"compression requires|unsupported repository version|repository version .* not supported",
        "See: restic migrate",
    ),
    Rule(
        AccessDenied,
        (
            r"permission denied|operation not permitted|read-only file system|access ?denied|\b40[13]\b|forbidden"
            r"|unauthorized|host key verification failed|signature ?does ?not ?match"
            r"|invalid ?access ?key|invalid credentials|append-only"
        ),
        "Check the permissions of the repository and the credentials of this datastore.",
    ),
    Rule(
        IntegrityError,
        _PACK_GONE,
        "A part of the repository is gone. restic goes on counting on it, for new backups as well, until it is told: "
        "restic repair index (before 0.16: rebuild-index). Then begin a new image: vmkeep backup VM --reset",
    ),
    Rule(
        IntegrityError,
        (
            r"ciphertext verification failed|hash does not match|invalid data returned|wrong hash|does not match id"
            r"|not found in (repo|index)|no index found|repository contains errors|unable to load index"
            r"|invalid character .* looking for|unexpected end of json"
        ),
        "See what is damaged: restic check --read-data",
    ),
    Rule(
        SourceNotFound,
        r"no matching id|no snapshot found|not found in snapshot|multiple ids with prefix|" + _GONE,
    ),
)

_TRIES_AGAIN = " returned error, retrying after "

# The last line but one of these is a Go stack: 0.14 prints one where it cannot write its lock.
_NOISE = (
    r"^$|signal interrupt received|^unable to umount|the `unlock` command|^lock was created|^storage id|^warning:"
    r"|^usage|^exit status|\.go:\d+$|^github\.com/|^(main|runtime)\.|^unable to create lock in backend$"
)
_IN_URL = re.compile(r"(?<=//)[^/@\s]*:[^/\s]*@")  # up to the last @ of the authority: a password may hold one


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without these secrets, and without the user and password of any URL in it."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _IN_URL.sub("***@", text)


def refuses_to_delete(line: str) -> bool:
    """Whether restic says here that its server deletes nothing, for this key or for anybody: 403, and its words.

    restic tries that again for minutes; the server's answer stays the same. It is asked for snapshots, and by a prune
    for indexes and packs ("data"); restic's own locks may be removed everywhere.
    """
    pattern = r"\bremove\b.*<?(snapshot|index|data)/.*(\b403\b|forbidden|access ?denied)|append-only"
    return re.search(pattern, line, re.IGNORECASE) is not None


def _lines(errors: str) -> list[str]:
    """stderr line by line; newer versions write JSON there when asked for JSON."""
    lines: list[str] = []
    for line in errors.splitlines():
        said: object = line
        if line.startswith("{"):
            try:
                document = json.loads(line)
                inner = document.get("error")
                said = document.get("message") or (inner.get("message") if isinstance(inner, dict) else inner) or line
            except (ValueError, AttributeError):
                pass
        # What follows the question is the location once more.
        known, _, _ = str(said).partition("Is there a repository at the following location?")
        lines += [part.strip() for part in known.splitlines() if not re.search(_NOISE, part.strip(), re.IGNORECASE)]
    return lines


def last_words(errors: str, secrets: Iterable[str] = ()) -> str:
    """What a restic that had to be ended was at: why it tried again and again (for 15 minutes), or its last line.

    What it says after the signal is about the signal.
    """
    lines = _lines(errors)
    tried = [line for line in lines if _TRIES_AGAIN in line]
    said = tried or [line for line in lines if not line.endswith("context canceled")]
    return redact(said[-1].removeprefix("Fatal: ")[:500], secrets) if said else "it says nothing"


def translate(code: int, errors: str, what: str, secrets: Iterable[str] = ()) -> BackupError:
    """The error for a restic that ended with `code` and wrote `errors`; `what` says what it was to do, and where."""
    # In plain text the question is a line of its own, and the location the one below.
    said = _lines(re.sub(r"(?m)^Is there a repository at the following location\?\n.*$", "", errors))
    lines = [line.removeprefix("Fatal: ") for line in said]
    found = next((rule for rule in RULES if code in rule.codes), None)
    if found is None:
        spoken = [rule for rule in RULES if rule.counts(code)]
        found = next((rule for rule in spoken for line in lines if rule.matches(line)), None)
    best = (
        *(line for line in lines if found and found.matches(line)),
        *(line for line in lines if line.startswith("subprocess ")),  # restic knows only that its ssh has ended
        *(line.removeprefix("Fatal: ") for line in said if line.startswith("Fatal: ")),
        *lines[-1:],
        f"ended by signal {-code}" if code < 0 else f"exit code {code}",
    )
    reason = best[0]
    message = redact(f"{what}: {reason:.500}", secrets)
    if found is None:
        return TargetUnavailable(message)
    return found.error(message, found.hint)
