"""Export a model as a folder that transformers loads, with tokenizer and model card.

It loads with `AutoModelForCausalLM`, or `AutoModelForSequenceClassification` for a reward model. An adapter
that is not merged becomes a folder that peft loads.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from madpo.trainer import dist
from madpo.trainer.checkpoints.choose import choose
from madpo.trainer.checkpoints.identity import model_identity
from madpo.trainer.checkpoints.load import load
from madpo.trainer.config.locate import located
from madpo.trainer.config.schema import Config
from madpo.trainer.dist import Shard, barrier
from madpo.trainer.engine import Engine
from madpo.trainer.files import read_object, write_folder_atomically
from madpo.trainer.model import lora
from madpo.trainer.model.tokenizer import load_tokenizer, padding_token
from madpo.trainer.model.weights import adapter_weights, gather, whole_weights
from madpo.trainer.reports.model_card import model_card
from madpo.trainer.run_folder import check_trained
from madpo.trainer.stages.end_of_turn import stop_at
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.state import TrainState


def run_export(config: Config) -> None:
    """Export the newest checkpoint of `output_dir`. Raises UserError if there is none."""
    config = located(config)
    folder = Path(config.output_dir)
    check_trained(folder, "export")
    shard = dist.init(config.launch.timeout_minutes, config.launch.start_timeout_minutes)
    chosen = choose(folder / "checkpoints", model_identity(config, shard), shard)
    assert chosen is not None
    tokenizer = load_tokenizer(config.model)
    engine = start_engine(config, tokenizer, training=True)
    state = load(engine, chosen)
    facts = read_object(folder / "run.json")
    stop_at(engine.module.policy, facts.get("end_of_turn"), tokenizer)
    for target in export_model(engine, tokenizer, config, folder, shard, state):
        size = sum(file.stat().st_size for file in target.iterdir())
        print(f"{target.name:<6} {target} (step {state.step}, {size / 1e6:,.1f} MB)", flush=True)
    engine.release()


def export_model(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    run: Path,
    shard: Shard,
    state: TrainState,
) -> list[Path]:
    """Write the policy's weights, or its adapter, into `<run>/model`; on rank 0, return what was written.

    With `train.export_merged`, also an adapter merged with its base into `<run>/merged`. Weights are gathered
    on rank 0; each folder appears complete or not at all.
    """
    policy = engine.module.policy
    if config.bound_objective.is_reward_model:
        padding = padding_token(tokenizer, policy.config.vocab_size)
        policy.config.pad_token_id = tokenizer.pad_token_id = padding
    folders = {"model": lora.is_adapted(policy)}
    if config.train.export_merged:
        folders["merged"] = False
    written = list[Path]()
    for name, adapter in folders.items():
        weights = gather(adapter_weights(policy) if adapter else whole_weights(policy), shard)
        if shard.is_main:
            card = model_card(config, run / name, state, policy, tokenizer, adapter)
            size = config.train.max_shard_size
            save = partial(_save, policy, weights, tokenizer, size, card, adapter)
            write_folder_atomically(run / name, save)
            written.append(run / name)
        barrier()
    return written


def _save(
    policy: Any,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    max_shard_size: str,
    card: ModelCard,
    adapter: bool,
    folder: Path,
) -> None:
    if adapter:
        lora.save_adapter(policy, weights, folder)
    else:
        _save_model(policy, weights, folder, max_shard_size)
    tokenizer.save_pretrained(folder)
    card.save(folder / "README.md")
    for file in folder.rglob("*"):
        if file.is_file():
            shutil.copymode(folder / "README.md", file)  # safetensors makes files for their owner alone


def _save_model(policy: Any, weights: dict[str, Tensor], folder: Path, max_shard_size: str) -> None:
    implementation = policy.config._attn_implementation
    policy.config._attn_implementation = None  # ours is unknown where the folder will be loaded
    try:
        policy.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
    finally:
        policy.config._attn_implementation = implementation
