"""Train the reward models for cross-fitted annotation, one after another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from madpo.launch import local
from madpo.trainer.config.schema import Config, dump, load


def train_folds(config: Config, path: str, overrides: Sequence[str]) -> int:
    """Train a reward model in `<output_dir>/fold-<k>` for every fold k of `annotate.folds`.

    Each is a run like any other: an interrupted one is continued, a finished one is skipped. Returns the
    first exit status that is not 0, or 0.
    """
    folds = config.annotate.folds or 0
    for fold in range(folds):
        folder = Path(config.output_dir) / f"fold-{fold}"
        own = [*overrides, f"output_dir={json.dumps(str(folder))}", "annotate={}"]
        own += [f"data.folds={folds}", f"data.fold={fold}"]
        resolved = load(path, own, "reward")
        finished, text = folder / ".finished.yaml", dump(resolved)
        if finished.is_file() and finished.read_text() == text:
            print(f"fold {fold}: already trained", flush=True)
            continue
        print(f"fold {fold} (of 0 to {folds - 1}): madpo reward into {folder}", flush=True)
        status = local.run("reward", path, own, resolved)
        if status:
            return status
        finished.write_text(text)
    return 0
