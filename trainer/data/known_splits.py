"""Which table of the cache holds the tokens of which files, written down for the next start.

A start that finds the files of a split as they were then opens its table at once: it hashes nothing and waits
at no lock, whatever the size of the files and the number of ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import xxhash

from madpo.trainer.data.source import Origin
from madpo.trainer.files import facts_of, is_untouched, write_atomically

SECONDS_UNTIL_SETTLED = 2.0
"""A file that was written to so shortly ago may be written to again without another time of change."""

PREFIX = "split-"


class KnownSplit:
    """What is written down of files that are tokenised in one way."""

    def __init__(self, cache: Path, files: Sequence[Path], rules: str) -> None:
        """`rules`: a hash of everything besides the files that decides their tokens."""
        self._cache, self._files = cache, files
        names = [str(file.resolve()) for file in files]
        key = xxhash.xxh3_128_hexdigest(json.dumps([names, rules]).encode())
        self._path = cache / f"{PREFIX}{key}.json"

    def find(self) -> tuple[Origin, Path] | None:
        """How messages name the rows, and the folder of their table; None unless the files and the table are
        known and untouched."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            note = json.loads(self._path.read_bytes())
            table = self._cache / note["table"]
            if note["files"] == self.facts() and is_untouched(table):
                return Origin(note["name"], note["unit"], tuple(map(Path, note["of_table"]))), table
        return None

    def facts(self) -> list[list[int]]:
        """What tells that one of the files was written to; to be asked for before they are read. Nothing if
        one cannot be looked at, as reading them will say."""
        try:
            return [facts_of(file) for file in self._files]
        except OSError:
            return []

    def note(self, facts: list[list[int]], origin: Origin, table: Path) -> None:
        """Write down that files with these facts, which may have been read a while ago, became this table."""
        changed = max((times for _, *of_file in facts for times in of_file), default=0) / 1e9
        if not facts or facts != self.facts() or time.time() - changed < SECONDS_UNTIL_SETTLED:
            return  # the next start reads them again
        known = {
            "files": facts,
            "name": origin.name,
            "unit": origin.unit,
            "of_table": list(map(str, origin.files)),
            "table": table.name,
        }
        write_atomically(self._path, json.dumps(known) + "\n")


def forget(cache: Path) -> None:
    """Let the next start read all files again."""
    for path in cache.glob(f"{PREFIX}*.json"):
        path.unlink(missing_ok=True)
