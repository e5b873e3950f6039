"""The reference by itself: a module that only scores, and hashes of its weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.hub import cached_file, extract_commit_hash

from madpo.trainer.batches.packing import PackedBatch
from madpo.trainer.config.schema import Config
from madpo.trainer.data.lengths import PositionBorder
from madpo.trainer.errors import UserError
from madpo.trainer.files import hash_of_file
from madpo.trainer.head import Impl, PreferenceHead
from madpo.trainer.model.attention.prefix_sharing import SegmentTable, shares_rows
from madpo.trainer.model.backbone import output_head, scored_hidden
from madpo.trainer.model.build import adapter_named
from madpo.trainer.model.positions import position_borders
from madpo.trainer.objectives.build import bind
from madpo.trainer.objectives.sft import NLLParams
from madpo.trainer.scoring_module import Gradients, Mode, ReferenceScorer

WEIGHT_SUFFIXES = {".safetensors", ".bin"}
CONFIG_NAMES = ("config.json", "adapter_config.json")


class ReferenceAlone(nn.Module):
    """Scores packed batches by the operations that score a reference beside a policy."""

    def __init__(self, reference: ReferenceScorer, budget_bytes: int, impl: Impl = "auto") -> None:
        super().__init__()
        self.model, self._state = reference.model.requires_grad_(False).eval(), reference.state
        with reference.state():
            head = output_head(reference.model)
        self.head = PreferenceHead(head, None, bind(NLLParams()), budget_bytes, impl)

    @property
    def shares_rows(self) -> bool:
        """Whether sequences may share a packed row, and completions their prompt."""
        return shares_rows(self.model)

    @property
    def borders(self) -> tuple[PositionBorder, ...]:
        """Lengths beyond which the model encodes positions otherwise."""
        return position_borders(self.model)

    @torch.no_grad()
    def forward(
        self, batch: PackedBatch, mode: Mode = Mode.SCORE, gradients: Gradients = None
    ) -> tuple[Tensor | None, ...]:
        """A loss of 0 and the fields of `TokenScores`, whose `token_logps` are the reference's."""
        assert mode is Mode.SCORE
        with self._state():
            hidden = scored_hidden(self.model, batch, SegmentTable(batch.segments))
        return self.head(hidden, None, batch, mode)


def weights_of_reference(config: Config) -> dict[str, Any]:
    """Hashes of the reference's weight files, or their commit on the hub, as plain JSON.

    Raises UserError if there is neither.
    """
    model = config.model
    named = model.ref_model_name_or_path
    source = str(named or model.model_name_or_path), None if named else model.model_revision
    adapter = adapter_named(config, *source)
    out = {"weights": _hashes(*source)}
    if adapter is not None:
        out["weights of the adapter's base"] = _hashes(adapter.base, adapter.config.revision)
    return out


def _hashes(name: str, revision: str | None) -> dict[str, str]:
    """File -> hash of its content; or, for a model on the hub, name -> commit."""
    folder = Path(name)
    if folder.is_dir():
        files = sorted(x for x in folder.iterdir() if x.suffix in WEIGHT_SUFFIXES or x.name in CONFIG_NAMES)
        with ThreadPoolExecutor(4) as readers:
            return dict(zip([file.name for file in files], readers.map(hash_of_file, files), strict=True))
    options: Any = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    files_there = (cached_file(name, config, **options) for config in CONFIG_NAMES)
    commit = extract_commit_hash(next((str(file) for file in files_there if file), None), None)
    if commit is None:
        raise UserError(
            f"model.reference: cached cannot tell which commit of {name!r} is used; download it and name "
            "the folder, or set model.reference=auto"
        )
    return {name: commit}
