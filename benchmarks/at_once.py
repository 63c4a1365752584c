"""Several commands side by side, as one: python -m benchmarks.at_once COMMAND … -- COMMAND …; fails where one fails."""

from __future__ import annotations

import subprocess
import sys


def main(words: list[str]) -> int:
    """Start all, wait for all; their output is passed on."""
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            commands.append([])
        else:
            commands[-1].append(word)
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in commands]
    for process in running:
        assert process.stdout is not None
        sys.stdout.buffer.write(process.stdout.read())
    codes = [process.wait() for process in running]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
