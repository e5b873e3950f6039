"""What the log of a job of slurm/train.sbatch says of its lives."""

from __future__ import annotations

import re


def ends(text: str) -> list[str]:
    """How each life has ended."""
    return re.findall(r"^== \S+ life \d+ of job [\d_]+ ended with status (.*)$", text, flags=re.MULTILINE)


def heads(text: str) -> list[tuple[str, str, str]]:
    """Life, ranks and port of each life that has begun."""
    pattern = r"^== \S+ life (\d+) of job [\d_]+ on \S+: (\d+) ranks?, port (\d+)$"
    return re.findall(pattern, text, flags=re.MULTILINE)
