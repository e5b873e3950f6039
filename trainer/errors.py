"""UserError, the one error that users are meant to see; its exit status; a near word for a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_USAGE = 2


class UserError(ValueError):
    """Something in the config, the data or the machine that the user can mend.

    Shown as one line without a traceback. Any other exception, other ValueErrors included, is our fault.
    """


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`, did you mean 'x'?` if an allowed word is close to `word`, else the list of allowed words."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else f"; known here: {', '.join(allowed)}"
