"""`log.txt`: lines as they are seen in the end, one header for every start, none twice."""

from __future__ import annotations

import logging
import os
import sys
from io import StringIO

import pytest
from rich.console import Console
from rich.progress import Progress

from madpo.launch.console_log import NAME, Kept, append, keep, outlive_readers
from madpo.trainer.errors import UserError


@pytest.fixture
def streams(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # `keep` replaces them


def test_both_streams_are_kept_below_a_header_of_each_start(tmp_path, streams, capsys):
    for start in ("madpo train a.yaml", "madpo train a.yaml --again"):
        sys.stdout, sys.stderr = StringIO(), StringIO()
        keep(tmp_path / "run", start)
        print("a line")
        print("an error", file=sys.stderr)
    append(tmp_path / "run", "rank 1: two\nlines")
    first, *lines = (tmp_path / "run" / NAME).read_text().splitlines()
    assert first.startswith("== ") and "  madpo train a.yaml  (madpo " in first
    assert lines[:2] == ["a line", "an error"] and "--again" in lines[2]
    assert lines[3:] == ["a line", "an error", "rank 1: two", "lines"]


def test_what_loggers_print_that_were_there_before_is_kept_too(tmp_path, streams):
    sys.stderr = StringIO()
    logger, handler = logging.getLogger("a library"), logging.StreamHandler()
    logger.addHandler(handler)
    try:
        keep(tmp_path, "madpo train a.yaml")
        logger.warning("this model is old")
    finally:
        logger.removeHandler(handler)
    assert (tmp_path / NAME).read_text().splitlines()[1:] == ["this model is old"]


def test_a_bar_is_kept_in_its_last_state_and_without_colours(tmp_path):
    path, screen = tmp_path / NAME, StringIO()
    with path.open("wb", buffering=0) as file:
        console = Console(file=Kept(screen, file), force_terminal=True, width=60)  # type: ignore[arg-type]
        with Progress(console=console, transient=True, auto_refresh=False) as bar:
            task = bar.add_task("training", total=2)
            for step in (1, 2):
                bar.update(task, completed=step, refresh=True)
                bar.console.print(f"[bold]step {step}[/]")
        print("10%\r20%\r\n", end="", file=console.file)
    assert "\x1b[" in screen.getvalue()
    lines = [line for line in path.read_text().splitlines() if line and "training" not in line]
    assert lines == ["step 1", "step 2", "20%"]


def test_a_console_that_is_the_log_is_not_kept_twice(tmp_path, streams):
    """`madpo run --jobs` lets a stage print into the log of its folder."""
    with (tmp_path / NAME).open("a") as console:
        sys.stdout = sys.stderr = console
        keep(tmp_path, "madpo sft x.yaml")
        print("once", flush=True)
    header, *lines = (tmp_path / NAME).read_text().splitlines()
    assert header.startswith("== ") and lines == ["once"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, streams):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir: .*file/run cannot be written to: Not a directory"):
        keep(tmp_path / "file" / "run", "madpo train x.yaml")


def test_a_console_that_nobody_reads_is_left_and_the_log_goes_on(tmp_path, streams):
    reader, writer = os.pipe()
    sys.stdout, sys.stderr = os.fdopen(writer, "w"), StringIO()
    with sys.stdout as console:
        outlive_readers(lambda text: print(text, file=sys.stderr))
        keep(tmp_path, "madpo train x.yaml")
        print("read", flush=True)
        assert os.read(reader, 100) == b"read\n"
        os.close(reader)
        for step in (1, 2):
            print(f"step {step}", flush=True)
        os.write(writer, b"a library's own words")
        console.flush()
    _, *lines = (tmp_path / NAME).read_text().splitlines()
    told = f"stdout takes no more text (Broken pipe); {NAME} has what follows"
    assert lines == ["read", "step 1", told, "step 2"]


def test_a_console_that_was_closed_from_the_start_is_no_error(streams, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    outlive_readers()
    print("nobody reads this", flush=True)
