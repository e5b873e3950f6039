"""Runs under the real command: started as a user would, watched from outside, and never left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from harness import make_config, save_model, write_pairs
from patience import patient

from madpo.trainer.config.schema import dump

BIN = Path(sys.executable).parent
NOISE = ("Warning", "WARNING", "[INFO]", "[ERROR]", "it/s]", "Traceback")
"""Words of what libraries print."""


class RealRun(NamedTuple):
    """A config of a tiny run of two ranks, and where it trains."""

    path: str
    folder: Path
    extensions: Path

    def losses(self, folder: Path | None = None) -> list[float]:
        file = (folder or self.folder) / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        return [line["loss"] for line in lines if "loss" in line]

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in a session of its own."""
        env = os.environ | {
            "TORCH_EXTENSIONS_DIR": str(self.extensions),
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            start_new_session=True,
            preexec_fn=_ignore_no_signal,
        )

    def train(self, *overrides: str, task: str = "train") -> subprocess.Popen[str]:
        return self.start(sys.executable, "-m", "madpo.launch.cli", task, self.path, *overrides)

    def finish(self, *processes: subprocess.Popen[str], seconds: float = 150) -> list[tuple[int, str]]:
        """Exit status and output of each; no process of this run is left behind, whatever happens."""
        try:
            outputs = [process.communicate(timeout=patient(seconds))[0] for process in processes]
            return [(p.returncode, text) for p, text in zip(processes, outputs, strict=True)]
        finally:
            for process in self.survivors():
                process.kill()

    def survivors(self) -> list[psutil.Process]:
        """The processes that have the config on their command line."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if self.path in (process.info["cmdline"] or []) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """The ranks, in their order."""
        ranks = [p for p in self.survivors() if "madpo.launch.worker" in p.cmdline()]
        return sorted(ranks, key=lambda process: int(process.environ()["RANK"]))

    def wait_for(self, what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 90) -> None:
        deadline = time.monotonic() + patient(seconds)
        while not what():
            assert time.monotonic() < deadline and process.poll() is None, "it never came to that"
            time.sleep(0.05)

    def gone(self, seconds: float = 60) -> bool:
        """Whether all processes of the run end in this time."""
        deadline = time.monotonic() + patient(seconds)
        while self.survivors() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.survivors()


def _ignore_no_signal() -> None:
    """A shell around the tests may ignore two of them, and its children would."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def real_run(folder: Path, tokenizer: Path, **train: Any) -> RealRun:
    """A run of two ranks on a dozen pairs, two steps unless `train` says otherwise."""
    model = save_model(folder / "start", tokenizer, seed=1)
    config = make_config(
        folder,
        {
            "model": {"model_name_or_path": str(model)},
            "data": {"dataset_name": str(write_pairs(folder / "pairs.jsonl", 12))},
            "train": {"max_steps": 2, **train},
            "launch": {"num_processes": 2},
        },
    )
    path = folder / "config.yaml"
    path.write_text(dump(config))
    return RealRun(str(path), Path(config.output_dir), folder / "ext")
