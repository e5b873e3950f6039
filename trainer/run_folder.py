"""What a run leaves in its folder, by name, and how to read it back.

config.yaml       the resolved configuration
run.json          the command, the versions, the hardware
data_report.json  what was read, cut and dropped
metrics.jsonl     one line per log step and evaluation
evaluation.json   the result of `madpo evaluate`
generated/        completions and their scores, by `madpo generate`
pairs/            preference pairs made of them
checkpoints/      weights, optimiser and state to resume from
model/            the exported model, or the adapter
merged/           with train.export_merged: the model with the adapter in it
report.html
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def metrics_lines(folder: Path) -> list[str]:
    """The whole lines of metrics.jsonl: a run that was killed may leave half of its last one."""
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_evaluation(folder: Path) -> dict[str, Any]:
    """The newest evaluation of a run: from training, or from `madpo evaluate`; {} if there is none."""
    for line in reversed(metrics_lines(folder)):
        if "eval_loss" in (record := json.loads(line)):
            return record
    path = folder / "evaluation.json"
    return json.loads(path.read_text()) if path.exists() else {}


def set_aside(folder: Path) -> None:
    """Rename an earlier run, so that a fresh one starts and nothing is lost."""
    if folder.exists():
        number = 1
        while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(target)
        print(f"the earlier run is now {target}", flush=True)
