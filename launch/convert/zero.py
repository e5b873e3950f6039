"""DeepSpeed's block: from a file that another trainer's config names, or from the config itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from madpo.launch.convert.draft import Draft, Fate
from madpo.trainer.config.deepspeed import OWNED_DEEPSPEED_KEYS
from madpo.trainer.config.deepspeed_keys import known_keys


def deepspeed_block(draft: Draft, name: str) -> None:
    """A rule for a key that holds DeepSpeed's block, or names a file with one."""
    value = draft.value(name)
    block = value if isinstance(value, dict) else _read(draft.folder, str(value))
    if block is None:
        stage = re.search(r"(?:ze?ro?|z|stage)_?([0-3])", Path(str(value)).name)
        if stage is None:
            draft.settle(Fate.LOST, name, why="no such file; write its zero_optimization into deepspeed:")
            return
        block = {"zero_optimization": {"stage": int(stage[1])}}
        why = "no such file; the stage is taken from its name"
    else:
        why = ""
    own = {key: _without_auto(part) for key, part in block.items() if _is_free(key) and part != "auto"}
    zero = own.get("zero_optimization", {})
    if zero.get("stage") == 0:
        zero["stage"], why = 1, "stage 0, copies of everything on each GPU, is not here; 1 comes nearest"
    for key, part in own.items():
        draft.take(f"deepspeed.{key}", part, name, why=why)
    draft.settle(Fate.CHANGED if why else Fate.TAKEN, name, why=why)


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    for path in (folder / name, Path(name)):
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    return None


def _is_free(key: str) -> bool:
    return key in known_keys() and key not in OWNED_DEEPSPEED_KEYS


def _without_auto(part: Any) -> Any:
    """The block without the values that transformers fills in."""
    if not isinstance(part, dict):
        return part
    return {key: _without_auto(value) for key, value in part.items() if value != "auto"}
