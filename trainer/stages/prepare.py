"""Do before a run what each of its ranks would wait for: fetch models, read and tokenise data."""

from __future__ import annotations

import time
from pathlib import Path

from madpo.trainer.config.hub import is_reachable
from madpo.trainer.config.locate import MODELS, located
from madpo.trainer.config.schema import Config
from madpo.trainer.counted import counted
from madpo.trainer.data.known_splits import forget
from madpo.trainer.data.source import cache_folder
from madpo.trainer.data.training_data import load_data, weighed
from madpo.trainer.errors import UserError, on_one_line
from madpo.trainer.files import SEAL, discard_damaged
from madpo.trainer.model.build import known_tokens
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.reports.progress import print_findings, print_line

PICKLES = ("*.bin", "*.pt", "*.pth")
OTHER_FORMATS = ("*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.tflite", "original/*")
"""Files of weights on the hub that are not read, or not where there is a better one."""


def prepare(config: Config, verify: bool = False) -> None:
    """Fill `data.cache_dir` as the first start of training would, and the hub's cache with the models.

    What is there already is taken as it is; with `verify` all of it is read and compared with its checksums.
    Raises UserError for data that cannot be read or does not serve the objective.
    """
    began = time.monotonic()
    config = located(config)
    cache = cache_folder(config.data)
    if verify:
        _verify(cache)
    for key in MODELS:
        name = getattr(config.model, key)
        if name is not None and not Path(name).exists() and is_reachable():
            _fetch(key, name, config.model.model_revision)
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, tokenizer, training=True, known_tokens=known_tokens(config, tokenizer))
    print_findings(data.report)
    if not config.objective.quantiles:  # which may need a model that is yet to be trained
        weighed(data, config)
    for label, groups in (("training", data.train), ("held-out", data.held_out)):
        if groups is not None:
            tokens = int(groups.counts.lengths.sum())
            print_line(f"{label}: {counted(len(groups), 'group')}, {counted(tokens, 'token')}")
    print_line(f"prepared in {time.monotonic() - began:.1f} s: {cache}")


def _verify(cache: Path) -> None:
    """Discard what is damaged in the cache, and let the sources be read again."""
    forget(cache)
    for sealed in sorted(cache.rglob(SEAL)):
        discard_damaged(sealed.parent, "making it anew", verify=True)


def _fetch(key: str, name: str, revision: str | None) -> None:
    """Fetch what training reads of the hub's model `name` and is not here yet. Raises UserError."""
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        has_tensors = any(x.endswith(".safetensors") for x in list_repo_files(name, revision=revision))
        left_out = (*OTHER_FORMATS, *(PICKLES if has_tensors else ()))
        snapshot_download(name, revision=revision, ignore_patterns=list(left_out))
    except Exception as error:  # of the hub, of the connection, of the disk
        raise UserError(f"model.{key}: {name} cannot be fetched: {on_one_line(error)}") from error
