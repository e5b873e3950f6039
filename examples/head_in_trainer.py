"""The loss head in a stock transformers Trainer: DPO without the logits, in one method.

    python examples/head_in_trainer.py        # seconds on a CPU

`PreferenceTrainer.compute_loss` is all there is to it. It reads the output layer's weight directly, so it is
for a model that is whole on its device; head_in_a_plain_loop.py has the form for DDP, FSDP and ZeRO-3.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from tiny_model import random_llama
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.layout import GroupLayout
from madpo.kernels.preference_loss import Reference, preference_loss

BETA, IGNORED, VOCABULARY = 0.1, -100, 200


class PreferenceTrainer(Trainer):
    """A Trainer whose batches are pairs, in rows chosen, rejected, chosen, rejected, ..."""

    def __init__(self, reference: Any, **options: Any) -> None:
        super().__init__(**options)
        self.reference = reference.to(self.args.device).eval()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        hidden, targets = scored_rows(model, inputs)
        with torch.no_grad():
            ref_hidden, _ = scored_rows(self.reference, inputs)
        lengths = inputs["lengths"]  # host integers, so that nothing waits for a GPU
        out = preference_loss(
            hidden,
            model.lm_head.weight,
            targets,
            GroupLayout.pairs(lengths, hidden.device),
            EdgeLoss(beta=BETA),
            Reference(ref_hidden, self.reference.lm_head.weight),
            scale=2 / len(lengths),
        )
        return (out.loss, {"logps": out.logps}) if return_outputs else out.loss


def scored_rows(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The hidden states (M, H) that predict the completion tokens, and these tokens (M,).

    `model.model` is the model below its output layer: no logits are formed here.
    """
    states = model.model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).last_hidden_state  # (B, T, H)
    following = inputs["labels"][:, 1:]  # position t predicts token t + 1
    scored = following != IGNORED
    return states[:, :-1][scored], following[scored]


def collate(pairs: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """Pad the 2P sequences; labels are the completions' tokens, IGNORED elsewhere."""
    rows = [(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    mask = (ids != 0).long()
    lengths = [len(answer) for _, answer in rows]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "lengths": lengths}


def plain_loss(model: Any, reference: Any, inputs: dict[str, Any]) -> Tensor:
    """The DPO loss by all the logits, to compare with."""

    def logps(model: Any) -> Tensor:  # (2P,)
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        following = inputs["labels"][:, 1:]
        tokens = logits.log_softmax(-1).gather(-1, following.clamp(min=0)[..., None])[..., 0]
        return (tokens * (following != IGNORED)).sum(1)

    with torch.no_grad():
        ref = logps(reference)
    chosen, rejected = (logps(model) - ref).view(-1, 2).T
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def random_pairs(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Pairs of random tokens; what is chosen begins with token 7."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [
        {"prompt": tokens(2, 8), "chosen": [7, *tokens(1, 9)], "rejected": tokens(2, 12)}
        for _ in range(count)
    ]


def main(folder: Path) -> list[tuple[float, float]]:
    """Train twice from the same start; returns (loss with the head, loss by the logits) of every step."""
    start = random_llama(VOCABULARY)

    class PlainTrainer(PreferenceTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
            return plain_loss(model, self.reference, inputs)

    losses = []
    for kind in (PreferenceTrainer, PlainTrainer):
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            max_steps=6,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,  # the collator reads our own columns
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = kind(
            reference=copy.deepcopy(start),
            model=copy.deepcopy(start),
            args=arguments,
            train_dataset=random_pairs(24),  # type: ignore[arg-type]
            data_collator=collate,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    steps = list(zip(*losses, strict=True))
    print("step   loss head   all logits")
    for step, (ours, plain) in enumerate(steps, start=1):
        print(f"{step:4}   {ours:.6f}    {plain:.6f}")
    return steps


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        main(Path(temporary))
