"""Python code in processes of their own, so that what crashes or hangs there is told here."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from dataclasses import dataclass

# `-c` puts the folder that the user stands in before the installed packages, where the megafish command does not: a
# tokenizers.py of theirs would be taken for the package.
_WITHOUT_CURRENT_FOLDER = "import sys; sys.path[:] = [entry for entry in sys.path if entry]\n"


@dataclass(frozen=True)
class Answer:
    """What a process said."""

    output: str
    failure: str | None = None
    """Why it failed, in one line."""


def command(code: str, *arguments: str) -> list[str]:
    """Command line that runs `code` with this interpreter; the arguments stand in its sys.argv[1:]."""
    return [sys.executable, "-c", _WITHOUT_CURRENT_FOLDER + code, *arguments]


def ask(code: str, seconds: float) -> Answer:
    """Run `code` and wait for what it prints."""
    try:
        done = subprocess.run(
            command(code),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer("", f"no answer after {seconds:g} s")
    return Answer(done.stdout, describe(done.returncode, done.stderr or done.stdout))


def describe(code: int, said: str) -> str | None:
    """One line about the end of a process; None where it ended well."""
    if code == 0:
        return None
    how = f"exit code {code}"
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    reason = error_line(said)
    if code == 1 and reason:  # what Python makes of any exception: the number says nothing
        return reason
    return f"{reason} ({how})" if reason else how


def error_line(said: str) -> str:
    """The line of the last traceback that names the error, else the last line; empty where nothing was said."""
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    # A message may go on below the line that names the error, with advice that leads nowhere without it.
    tracebacks = [place for place, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    after = lines[tracebacks[-1] :] if tracebacks else []
    named = [line for line in after if re.match(r"[\w.]+(Error|Exception|Exit)\b:? ?", line)]
    return (named or lines or [""])[-1]
