"""The exported model scores as the run did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks, save_model
from small_runs import ALONE, SHORT, changed, evaluate_and_export, model_bytes, records, train


@pytest.mark.parametrize("tied, bf16", [(False, True), (True, False)], ids=["untied-bf16", "tied-fp32"])
def test_the_export_loads_in_transformers_and_scores_like_the_run(
    config, tmp_path, tokenizer_folder, tied, bf16
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = save_model(tmp_path / "start", tokenizer_folder, seed=1, tied=tied)
    run = changed(config, model={"model_name_or_path": str(model)}, train={"max_steps": 3, "bf16": bf16})
    run_ranks(2, train, run)
    folder = Path(run.output_dir) / "model"
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert loaded.config._attn_implementation in ("sdpa", "eager")
    assert loaded.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    start: Any = AutoModelForCausalLM.from_pretrained(model)
    assert not torch.equal(loaded.lm_head.weight.float(), start.lm_head.weight)

    rows = [json.loads(line) for line in (tmp_path / "pairs" / "test.jsonl").read_text().splitlines()]
    total = 0.0
    with torch.no_grad():
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = tokenizer(row["prompt"] + row["chosen"])["input_ids"] + [tokenizer.eos_token_id]
            logps = loaded(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
            picked = logps.gather(1, torch.tensor(ids[1:])[:, None])[len(prompt) - 1 :]
            total += picked.sum().item()
    logged = records(Path(run.output_dir))[-1]["eval_logps/chosen"]
    assert logged == pytest.approx(total / len(rows), rel=3e-3 if bf16 else 1e-5)
    card = (folder / "README.md").read_text()
    assert "madpo" in card and "rewards/accuracies" in card


@pytest.mark.parametrize(("ranks", "sections"), [(2, {}), (1, ALONE)], ids=["two ranks", "alone"])
def test_evaluation_and_export_of_a_checkpoint_agree_with_training(config, ranks, sections):
    config = changed(config, **{**sections, "train": SHORT | sections.get("train", {})})
    run_ranks(ranks, train, config)
    folder = Path(config.output_dir)
    trained = records(folder)[-1]
    exported = model_bytes(config)
    shutil.rmtree(folder / "model")
    run_ranks(ranks, evaluate_and_export, config)
    evaluated = json.loads((folder / "evaluation.json").read_text())
    assert evaluated["model"] == "step-00000004"
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_kl"):
        assert evaluated[name] == pytest.approx(trained[name], rel=1e-6)
    assert model_bytes(config) == exported
