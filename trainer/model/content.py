"""What is in the files of the models that a run starts from: part of the run's identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub import try_to_load_from_cache

from madpo.trainer.config.schema import Config
from madpo.trainer.contents import Contents
from madpo.trainer.dist import Shard, gathered
from madpo.trainer.model.lora import stored_adapter

CONFIGS, OF_WEIGHTS = ("config.json", "adapter_config.json"), (".safetensors", ".bin", ".pt")
"""The files that a model is made from: names, and endings."""


def contents_of_models(config: Config, shard: Shard) -> dict[str, Any]:
    """Key of the config -> a hash of the files of the model that it names; all ranks hash their share.

    A file is hashed again only if its size, its time of change or a sample of it has changed.
    """
    model, found = config.model, dict[str, Any]()
    named = {
        "model.model_name_or_path": (model.model_name_or_path, model.model_revision),
        "model.ref_model_name_or_path": (model.ref_model_name_or_path, None),
    }
    base = None if config.peft is None else config.peft.base_model_name_or_path
    adapter = stored_adapter(model.model_name_or_path, model.model_revision, base)
    if adapter is not None:
        named["peft.base_model_name_or_path"] = adapter.base, None
    contents = Contents(Path(config.data.cache_dir).expanduser() / f"models-{shard.rank}.json")
    for key, (name, revision) in named.items():
        files = [] if name is None else _files(name, revision)
        if not files:
            continue
        own = {file.name: contents.of_file(file) for file in files[shard.rank :: shard.world_size]}
        hashes = {file: text for part in gathered(own) for file, text in part.items()}
        found[f"{key} (content)"] = xxhash.xxh3_64_hexdigest(repr(sorted(hashes.items())).encode())
    contents.save()
    return found


def _files(name: str, revision: str | None) -> list[Path]:
    """The files that a model is loaded from, in its folder or in the hub's cache; [] if there are none."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        cached = (try_to_load_from_cache(name, file, revision=revision) for file in CONFIGS)
        folder = next((Path(path).parent for path in cached if isinstance(path, str)), folder)
    files = (file for file in folder.glob("*") if file.suffix in OF_WEIGHTS or file.name in CONFIGS)
    return sorted(file for file in files if file.is_file())
