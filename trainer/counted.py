"""Numbers of things in messages: `1 row`, `2,000 rows`."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """The number and the noun, in the plural unless it is 1; `plural` is for those that do not end in s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
