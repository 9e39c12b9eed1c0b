"""The error tree. Every message is one sentence that says what happened, to what, and what to do.

RegrowError                 exit code 1
├── InvalidInput            exit code 2: a job file, flag, request or environment is wrong
├── CheckpointError         exit code 3: a checkpoint cannot be read, written or trusted
│   └── CorruptCheckpoint   its bytes are not what its manifest says
├── Conflict                exit code 4: somebody else holds what was asked for (a journal, a job name)
├── Refused                 exit code 5: the controller refused (wrong token, older generation)
├── Unreachable             exit code 6: the controller did not answer
└── JobFailed               exit code 7: the job ended as FAILED
"""

from __future__ import annotations

MAX_MESSAGE = 2000
"""Characters of a message. Names in it may come from a stranger's file and be of any length."""


def printable(text: str) -> str:
    """The text with what could move a terminal's cursor, or end the line, as escapes such as `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


class RegrowError(Exception):
    """Root of regrow's own errors; `exit_code` is what a command that ends with it returns.

    Invariant: as a string it is one line of printable characters, whatever names it mentions.
    """

    exit_code = 1

    def __str__(self) -> str:
        text = printable(super().__str__())
        return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 500]} ... {text[-490:]}"


class InvalidInput(RegrowError):
    """A job file, flag, request or environment variable is wrong."""

    exit_code = 2


class CheckpointError(RegrowError):
    """A checkpoint cannot be read, written or trusted."""

    exit_code = 3


class CorruptCheckpoint(CheckpointError):
    """A checkpoint's bytes are not what its manifest says; `file`, `reason` and `tensor` are parts of the message."""

    file: str | None = None
    reason: str | None = None
    tensor: str | None = None


class Conflict(RegrowError):
    """Somebody else holds what was asked for."""

    exit_code = 4


class Refused(RegrowError):
    """The other side refused: wrong token, or an older generation."""

    exit_code = 5


class Unreachable(RegrowError):
    """The controller did not answer."""

    exit_code = 6


class JobFailed(RegrowError):
    """The job ended as FAILED."""

    exit_code = 7
