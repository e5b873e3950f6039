"""Evaluate trained models on held-out prompts: the oracle's reward of their completions, and their KL
divergence from the SFT model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from madpo.benchmarks.sentiment.oracle import reward
from madpo.trainer.errors import UserError
from madpo.trainer.files import write_atomically

NAME = re.compile(r"(?P<arm>[a-z0-9-]+)_b(?P<beta>[0-9.]+)_(?P<tier>[a-z]+)_(?P<seed>\d+)$")
"""The name of a run's folder: arm, beta, tier, seed."""
BATCH = 256


def evaluate(
    output: Path,
    runs: str,
    reference: str,
    prompts: str,
    seeds: Sequence[int],
    betas: Sequence[float],
    max_new_tokens: int = 40,
    jobs: int = 2,
) -> None:
    """Write `<run>.json` for the SFT model and every run of these seeds and betas in a folder under `runs`
    named as in NAME, and the names of the runs into `runs.json`.

    One completion is sampled for every prompt at temperature 1, with the same seed for all models. Results
    are kept unless the model has changed. Raises UserError if there is no run.
    """
    models = {
        path.name: path / "model"
        for path in sorted(Path(runs).iterdir())
        if (name := NAME.match(path.name)) and int(name["seed"]) in seeds and float(name["beta"]) in betas
    }
    if not models:
        raise UserError(
            f"{runs}: no run of seeds {seeds} and betas {betas} that is called like dpo_b0.1_high_0"
        )
    with Path(prompts).open(encoding="utf-8") as file:
        text = [json.loads(line)["prompt"] for line in file]
    output.mkdir(parents=True, exist_ok=True)
    todo = []
    for name, model in {"sft": Path(reference), **models}.items():
        weights = (model / "model.safetensors").read_bytes()
        key = xxhash.xxh3_128_hexdigest(weights + repr((text, max_new_tokens)).encode())
        path = output / f"{name}.json"
        if not path.is_file() or json.loads(path.read_text())["key"] != key:
            todo.append((path, key, model, Path(reference), text, max_new_tokens))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done in pool.map(_evaluate_one, todo):
            print(done, flush=True)
    (output / "runs.json").write_text(json.dumps(list(models)) + "\n")


def _evaluate_one(task: tuple[Path, str, Path, Path, list[str], int]) -> str:
    path, key, model, reference, prompts, max_new_tokens = task
    torch.set_num_threads(1)
    samples = sample(model, reference, prompts, max_new_tokens)
    write_atomically(path, json.dumps({"key": key, **samples}) + "\n")
    mean = {name: sum(samples[name]) / len(samples[name]) for name in ("rewards", "kls", "lengths")}
    return f"{path.stem:32} " + "  ".join(f"{name} {value:.3f}" for name, value in mean.items())


@torch.no_grad()
def sample(model: Path, reference: Path, prompts: Sequence[str], max_new_tokens: int) -> dict[str, Any]:
    """One completion for every prompt: its text, the oracle's reward of prompt and completion, its length in
    tokens, and log pi(y|x) - log pi_ref(y|x), whose mean is the KL divergence per completion in nats."""
    tokenizer = AutoTokenizer.from_pretrained(reference, padding_side="left")
    policy, ref = _load(model), _load(reference)
    out: dict[str, list[Any]] = {"completions": [], "rewards": [], "kls": [], "lengths": []}
    for first in range(0, len(prompts), BATCH):
        batch = list(prompts[first : first + BATCH])
        inputs: Any = tokenizer(batch, return_tensors="pt", padding=True)
        torch.manual_seed(first)
        ids = policy.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        width = inputs["input_ids"].shape[1]
        completion = ids[:, width:]
        # The completion ends with the first EOS; padding follows.
        over = (completion == tokenizer.eos_token_id).cumsum(1) - (
            completion == tokenizer.eos_token_id
        ).long()
        own = over == 0
        mask = torch.cat((inputs["attention_mask"], own.long()), dim=1)
        ratio = _logps(policy, ids, mask, width) - _logps(ref, ids, mask, width)
        out["kls"] += [round(x, 4) for x in (ratio * own).sum(1).tolist()]
        out["lengths"] += own.sum(1).tolist()
        texts = tokenizer.batch_decode(completion, skip_special_tokens=True)
        out["completions"] += texts
        out["rewards"] += [round(reward(p + t), 4) for p, t in zip(batch, texts, strict=True)]
    return out


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _logps(model: Any, ids: Tensor, mask: Tensor, width: int) -> Tensor:
    """(B, C) log-probs of the completion tokens; ids and mask are (B, T), left-padded, C = T - width."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, width - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[:, width:, None])[..., 0]
