"""Training from Python: data sets in memory, a callback, and samples of the model before and after.

    python examples/train_from_python.py          # half a minute on a CPU

A tiny model first learns sentences about films and books, praise and blame alike (`task="sft"`). Then DPO
teaches it to prefer praise, and both models complete the same prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tiny_model import save_model

import madpo

PROMPTS = [f"the {thing} was" for thing in ("film", "book", "plot", "story", "actor", "ending")]
GOOD, BAD = ("good", "fine", "warm", "lovely"), ("bad", "dull", "cold", "awful")


def sentences() -> list[dict[str, str]]:
    """Prompts with every completion, the good ones as often as the bad ones."""
    return [
        {"prompt": prompt, "completion": f" {word} ."} for prompt, word in product(PROMPTS, (*GOOD, *BAD))
    ]


def pairs() -> list[dict[str, str]]:
    """Preference pairs: a good word beats a bad one."""
    return [
        {"prompt": prompt, "chosen": f" {good} .", "rejected": f" {bad} ."}
        for prompt, good, bad in product(PROMPTS, GOOD, BAD)
    ]


def config(folder: Path, name: str, model: Path, steps: int = 15, **sections: Any) -> dict[str, Any]:
    """What the runs have in common: the sections of a YAML file, as a dict."""
    return {
        "output_dir": folder / name,
        "model": {"model_name_or_path": model},
        "data": {"cache_dir": folder / "cache", "max_length": 16},
        "train": {
            "bf16": False,
            "global_batch_size": 8,
            "micro_batch_tokens": 512,
            "max_steps": steps,
            "logging_steps": 5,
        },
        **sections,
    }


def main(folder: Path) -> tuple[float, float]:
    """Train both stages; returns the share of praise in the samples before and after DPO."""
    start = save_model(folder / "start", [f"{row['prompt']}{row['completion']}" for row in sentences()])
    sft = madpo.train(
        config(folder, "sft", start, steps=25, optim={"lr": 1e-2}), train=sentences(), task="sft"
    )
    assert sft.model is not None

    def show_accuracy(record: Mapping[str, float]) -> None:
        if "rewards/accuracies" in record:
            print(f"  from the callback: accuracy {record['rewards/accuracies']:.2f}")

    dpo = madpo.train(
        config(folder, "dpo", sft.model, objective={"loss_type": "dpo"}, optim={"lr": 4e-3}),
        train=pairs(),
        evaluation=pairs()[::7],
        callbacks=[show_accuracy],
    )
    assert dpo.evaluation is not None
    print(f"held-out accuracy {dpo.evaluation['eval_rewards/accuracies']:.2f}, report in {dpo.report}")

    sampling = {"num_completions": 8, "max_new_tokens": 4}
    records = madpo.generate(
        config(folder, "samples", sft.model, generate=sampling),
        prompts=PROMPTS,
        models=[sft.output_dir, dpo.output_dir],
    )
    for record in records:
        before, after = record["completions"][0], record["completions"][-1]
        print(f"{record['prompt']} ...   before: {before:12} after: {after}")
    before, after = (praise(records, run.output_dir) for run in (sft, dpo))
    print(f"praise: {before:.0%} of the samples before, {after:.0%} after")
    return before, after


def praise(records: list[dict[str, Any]], model: Path) -> float:
    """The share of a model's completions that hold a good word."""
    texts = [
        text
        for record in records
        for text, name in zip(record["completions"], record["models"], strict=True)
        if name == str(model)
    ]
    return sum(any(word in text for word in GOOD) for text in texts) / len(texts)


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        main(Path(temporary))
