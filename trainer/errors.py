"""The errors that users are meant to see, each with its exit status; a near word for a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum

from madpo.trainer.masking import masked_text


class Exit(IntEnum):
    """What an exit status means to a script or a scheduler; docs/resume.md has them for users.

    A process that a signal ended at once has 128 + the number of the signal.
    """

    DONE = 0
    BUG = 1
    USAGE = 2
    DATA = 3
    CHECKPOINT = 4
    NOT_FINITE = 5
    LOST_PEER = 6
    AGAIN = 75
    """Stopped in good order: the same command goes on (EX_TEMPFAIL of sysexits.h)."""


FRESH = "--fresh (in Python: fresh=True)"
"""How a run is begun anew, for messages."""

SHORT = 6
"""A word with fewer letters may have one slip in it, a longer one another for each so many letters."""


class UserError(ValueError):
    """Something in the config, the data or the machine that the user can mend.

    Shown as one line without a traceback, in which secrets are masked. Any other exception, other
    ValueErrors included, is our fault.
    """

    status = Exit.USAGE
    is_agreed = False
    """Whether all ranks raise this error, which rank 0 has told the user."""

    def __str__(self) -> str:
        return masked_text(super().__str__())


class DataError(UserError):
    """Rows that cannot be read or trained on."""

    status = Exit.DATA


class CheckpointError(UserError):
    """No sound checkpoint to continue from, or none could be written."""

    status = Exit.CHECKPOINT


class NotFiniteError(UserError):
    """A loss, a gradient or a weight that is not finite."""

    status = Exit.NOT_FINITE


class LostPeerError(UserError):
    """Another rank is gone, or does not answer."""

    status = Exit.LOST_PEER


def error_of(status: int, text: str, is_agreed: bool = False) -> UserError:
    """The error that has this exit status."""
    kind = next((kind for kind in UserError.__subclasses__() if kind.status == status), UserError)
    error = kind(text)
    error.status, error.is_agreed = Exit(status), is_agreed
    return error


def on_one_line(error: BaseException) -> str:
    """The message of another library's error, without its line breaks."""
    return " ".join(str(error).split())


def system_error(error: BaseException | None) -> OSError | None:
    """The error of the operating system in whose handling this one was raised, or that it is."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`, did you mean 'x'?` if `word` looks like a slip for an allowed word, else the list of those."""
    allowed = sorted(allowed)
    close = closest(word, allowed)
    return f"; known here: {', '.join(allowed)}" if close is None else f", did you mean {close!r}?"


def closest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed word that `word` is a slip for: one in capitals, or with a letter or two wrong.

    The first letter is right in a slip: `ppo` is none for `wpo`. Without a slip, it is the only allowed word
    that begins with a long `word`, or that this begins with.
    """
    allowed = list(allowed)

    def rank(other: str) -> tuple[int, bool, float]:
        """The number of slips; of two words with as many, the one of these letters comes first."""
        a, b = word.lower(), other.lower()
        return slips(a, b), sorted(a) != sorted(b), -difflib.SequenceMatcher(None, a, b).ratio()

    most = 1 + len(word) // SHORT
    near = [other for other in allowed if other[:1].lower() == word[:1].lower()]
    best = min(near, key=rank, default=None)
    if best is not None and rank(best)[0] <= most:
        return best
    begun = [other for other in allowed if word.startswith(other) or other.startswith(word)]
    begun = [other for other in begun if min(len(word), len(other)) >= SHORT]
    return begun[0] if len(begun) == 1 else None


def slips(a: str, b: str) -> int:
    """The number of letters to add, leave out, replace, or swap with the next one, to turn `a` into `b`."""
    table = [[i + j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            replaced = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, replaced)
            if a[i - 2 : i] == b[j - 2 : j][::-1] and min(i, j) > 1:
                table[i][j] = min(table[i][j], table[i - 2][j - 2] + 1)
    return table[-1][-1]
