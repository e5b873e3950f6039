"""Words, messages and preferences for tests of formats and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import make_config

from madpo.trainer.config.schema import Config
from madpo.trainer.formats.text_groups import TextGroup, to_group

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def preference(**fields: Any) -> TextGroup:
    return to_group(fields, "preference")


def config_for(folder: Path, path: Path, **data: Any) -> Config:
    return make_config(
        folder,
        {"model": {"model_name_or_path": "unused"}, "data": {"dataset_name": str(path), **data}},
    )
