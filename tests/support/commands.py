"""The command line in this process: one start of it takes seconds, most of them imports."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from madpo.launch import cli


def command(*arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of `madpo ARGUMENTS`, by the console script's own function."""
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["madpo", *arguments]), redirect_stdout(out), redirect_stderr(errors):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return status, out.getvalue(), errors.getvalue()
