"""A config of TRL, converted, trains as TRL does with it: the first 20 losses are equal."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import run_ranks, save_model, write_pairs
from small_runs import records, train

from madpo.launch.convert.convert import convert
from madpo.launch.convert.write import tree_of
from madpo.trainer.config.schema import from_tree

STEPS = 20
COMMON = {
    "max_steps": STEPS,
    "max_length": 64,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-3,
    "weight_decay": 0.0,
    "train_sampling_strategy": "sequential",
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "seed": 1,
}
CASES: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": "sigmoid", "beta": 0.2, "lr_scheduler_type": "cosine"},
    "ipo": {"loss_type": "ipo", "beta": 0.3, "max_grad_norm": 0.5},
    "sft": {"completion_only_loss": True, "adam_beta2": 0.95},
}


def losses_of_trl(keys: dict[str, Any], sft: bool) -> list[float]:
    """TRL's own loss of every step, with the keys of the file as arguments of its config."""
    from datasets import load_dataset

    trl: Any = import_module("trl")

    given = dict(keys)
    model, data = given.pop("model_name_or_path"), given.pop("dataset_name")
    make, trainer = (trl.SFTConfig, trl.SFTTrainer) if sft else (trl.DPOConfig, trl.DPOTrainer)
    own = {
        "use_cpu": True,
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32", "device_map": None},
    }
    rows = load_dataset("json", data_files=data, split="train", cache_dir=str(Path(data).parent / "cache"))
    run = trainer(model, args=make(**given, **own), train_dataset=rows)
    run.train()
    return [line["loss"] for line in run.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer_folder) -> Path:
    """A model, its pairs, and prompts with completions, as TRL reads them too."""
    folder = tmp_path_factory.mktemp("files")
    save_model(folder / "model", tokenizer_folder, seed=3)
    pairs = write_pairs(folder / "pairs.jsonl", 8 * STEPS)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows:
        del row["margin"]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    completions = ({"prompt": row["prompt"], "completion": row["chosen"]} for row in rows)
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in completions))
    return folder


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
@pytest.mark.parametrize("name", CASES)
def test_the_first_losses_are_trls(name, files, tmp_path):
    sft = name == "sft"
    keys = {
        **COMMON,
        **CASES[name],
        "model_name_or_path": str(files / "model"),
        "dataset_name": str(files / ("completions.jsonl" if sft else "pairs.jsonl")),
        "output_dir": str(tmp_path / "trl"),
    }
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(keys))
    draft = convert(tmp_path / "trl.yaml", gpus=1)
    assert draft.task == ("sft" if sft else "dpo")
    tree = tree_of(draft)
    tree["output_dir"], tree["data"]["cache_dir"] = str(tmp_path / "ours"), str(tmp_path / "cache")
    run_ranks(1, train, from_tree(tree, "converted"))
    ours = [record["loss"] for record in records(tmp_path / "ours")]
    theirs = losses_of_trl(keys, sft)  # last: what it imports starts threads, which a fork does not survive
    assert len(theirs) == len(ours) == STEPS
    assert abs(theirs[-1] - theirs[0]) > 0.01, "it trains"
    assert ours == pytest.approx(theirs, abs=1e-4)
