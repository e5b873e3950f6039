"""Export: a folder that transformers loads, with tokenizer and model card: `AutoModelForCausalLM`, for a
reward model `AutoModelForSequenceClassification`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from madpo.trainer import checkpoint, dist
from madpo.trainer.config import Config, dump
from madpo.trainer.dist import Shard, barrier
from madpo.trainer.errors import UserError
from madpo.trainer.model.load import load_tokenizer, padding_token
from madpo.trainer.run_folder import last_evaluation
from madpo.trainer.stages.setup import start_engine
from madpo.trainer.state import TrainState


def run_export(config: Config) -> None:
    """Export the newest checkpoint of `output_dir`. Raises ValueError if there is none."""
    shard = dist.init(config.launch.timeout_minutes)
    folder = Path(config.output_dir)
    tag = checkpoint.latest(folder / "checkpoints", checkpoint.model_identity(config, shard))
    if tag is None:
        raise UserError(f"{folder / 'checkpoints'}: no checkpoint to export; train first")
    tokenizer = load_tokenizer(config.model)
    engine = start_engine(config, tokenizer, training=True)
    state = checkpoint.load(engine, folder / "checkpoints", tag)
    export_model(engine, tokenizer, config, folder / "model", shard, state)
    engine.destroy()


def export_model(
    engine: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    target: Path,
    shard: Shard,
    state: TrainState,
) -> None:
    """Gather the policy on rank 0 and write it; the folder appears complete or not at all."""
    policy = engine.module.policy
    if "scores" in config.objective_entry.needs:
        policy.config.pad_token_id = tokenizer.pad_token_id = padding_token(tokenizer)
    weights = gather_weights(policy, shard)
    if shard.is_main:
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        implementation = policy.config._attn_implementation
        policy.config._attn_implementation = None  # ours is not known where the folder is loaded
        try:
            policy.save_pretrained(partial, state_dict=weights)
        finally:
            policy.config._attn_implementation = implementation
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(model_card(config, target.parent, state))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    barrier()


def gather_weights(policy: Any, shard: Shard) -> dict[str, Tensor]:
    """The policy's full weights on rank 0's CPU, one parameter at a time; an empty dict elsewhere."""
    import deepspeed

    out: dict[str, Tensor] = {}
    tied = set(policy.all_tied_weights_keys) if policy.config.tie_word_embeddings else set()
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        if name in tied:
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            if shard.is_main:
                out[name] = parameter.detach().cpu().clone()
    if shard.is_main:
        out |= {name: buffer.cpu() for name, buffer in policy.named_buffers() if _saved(policy, name)}
    return out


def _saved(policy: Any, buffer: str) -> bool:
    module, _, name = buffer.rpartition(".")
    return name not in policy.get_submodule(module)._non_persistent_buffers_set


def model_card(config: Config, run: Path, state: TrainState) -> str:
    """A short model card: what it was trained from, on what, how, and its held-out numbers."""
    base = config.model.model_name_or_path or "a model built from scratch"
    rows = [
        (name.removeprefix("eval_"), value)
        for name, value in last_evaluation(run).items()
        if name.startswith("eval_")
    ]
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in rows)
    parts = config.data.datasets or []
    data = ", ".join(f"`{part.path}`" for part in parts) or f"`{config.data.dataset_name}`"
    held_out = f"\n## Held-out metrics\n\n| metric | value |\n|---|---|\n{table}\n" if rows else ""
    return (
        f"---\nlibrary_name: transformers\ntags: [madpo, {config.objective.loss_type}]\n---\n\n"
        f"# {run.name}\n\nTrained by madpo with the objective `{config.objective.loss_type}` from "
        f"`{base}` on {data}: {state.step} steps, {state.consumed} prompts, "
        f"{state.num_tokens} tokens.\n{held_out}\n"
        f"## Configuration\n\n```yaml\n{dump(config)}```\n"
    )
