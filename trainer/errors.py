"""The one error that users are meant to see, the exit status that goes with it, and the word they meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_USAGE = 2


class UserError(ValueError):
    """Something in the config, the data or the surroundings that its owner can mend.

    Shown as one line without a traceback. Any other exception, other UserErrors included, is ours.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` when one of the known words is close, else the list of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else f"; known here: {', '.join(known)}"
