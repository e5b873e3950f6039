"""Checks of a model before the first step: output layer, exact packing, no noise. They raise UserError."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from madpo.trainer.batches.packing import Segment, pack
from madpo.trainer.data.lengths import shapes_of
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.errors import UserError, on_one_line
from madpo.trainer.model.attention.prefix_sharing import SegmentTable, Unshared, shares_rows
from madpo.trainer.model.backbone import backbone, last_hidden, output_head, scored_hidden
from madpo.trainer.model.families import COMPRESSION, LOCAL_SIZES
from madpo.trainer.model.positions import position_borders
from madpo.trainer.model.startup.positions import within_positions

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def failing_in_one_line(
    check: Callable[Concatenate[PreTrainedModel, Arguments], Result],
) -> Callable[Concatenate[PreTrainedModel, Arguments], Result]:
    """Let a check of a model raise `Unshared` for whatever the model's own code raises.

    It may do arithmetic with its mask, for one, in whose place it is given a MaskRule.
    """

    @wraps(check)
    def checked(model: PreTrainedModel, *args: Arguments.args, **options: Arguments.kwargs) -> Result:
        try:
            return check(model, *args, **options)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise Unshared(
                f"{type(model).__name__} fails on the check's few tokens ({type(error).__name__}: "
                f"{on_one_line(error)[:150]})"
            ) from error

    return checked


@torch.no_grad()
@failing_in_one_line
def check_head(model: PreTrainedModel, device: torch.device) -> None:
    """Raise UserError for a model whose logits are not `output_head` of its hidden states."""
    ids = torch.arange(within_positions(model, min(model.config.vocab_size, 16)), device=device)[None]
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if shares_rows(model):
        inputs["position_ids"] = torch.arange(ids.shape[1], device=device)[None]
        inputs["segments"] = SegmentTable((Segment(0, ids.shape[1], 0, 0),))
    hidden = backbone(model)(**inputs).last_hidden_state
    head: Any = model.get_output_embeddings()
    ours = output_head(model).transform(head(hidden.to(model.dtype)).float())
    theirs = model(**inputs).logits.float()
    error = float((ours - theirs).norm() / theirs.norm())
    if not error < tolerance_of(model):
        raise UserError(
            f"{type(model).__name__}: its logits differ from those of its output weight, bias, soft-cap and "
            f"scale by {error:.2g} (relative); the loss head does not know what else it does"
        )


def tolerance_of(model: PreTrainedModel) -> float:
    """A relative error larger than rounding alone makes."""
    return 1e-3 if model.dtype == torch.float32 else 0.1


@torch.no_grad()
@failing_in_one_line
def check_packing(model: PreTrainedModel, device: torch.device, longest: int = 0) -> None:
    """Raise UserError for a model whose hidden states change when sequences are packed into one row.

    Two groups of random tokens are scored packed, and each completion alone with transformers' own attention.
    Layers that carry a state along the row, take positions from the row, or attend to later tokens differ by
    far more than rounding. In bf16 the effect of rounding is measured: where two experts are nearly equal it
    may send tokens to the other.

    Prompts are longer than the model's windows and chunks, so that those take effect; but not longer than
    LONGEST_WINDOW tokens, which would make the check as long as a step. Where sequences of `longest` tokens
    are encoded otherwise than short ones, a group of both stands in the row too.
    """
    random = np.random.default_rng(0)
    high = min(model.config.vocab_size, 1000)
    draw = lambda count: random.integers(0, high, count).tolist()  # noqa: E731
    room = within_positions(model, 16 + _window(model))
    short, long = min(6, room - 1), min(9, room - 1)
    groups = [TokenGroup(draw(room - long), [draw(short), draw(long)], []) for _ in range(2)]
    borders = position_borders(model)
    for border in borders:
        if longest > border.length:
            groups.append(TokenGroup(draw(border.length - 7), [draw(4), draw(9), draw(12)], []))
    shared = shapes_of(groups).shares_prompts(borders)
    batch = pack(groups, prefix_sharing=shared.tolist()).to(device)
    packed = scored_hidden(model, batch, SegmentTable(batch.segments)).float()

    def scored_alone() -> Tensor:  # (M, H)
        sequences = [(group.prompt, completion) for group in groups for completion in group.completions]
        out = [
            backbone(model)(input_ids=torch.tensor([prompt + completion], device=device), use_cache=False)
            .last_hidden_state[0, len(prompt) - 1 : -1]
            .float()
            for prompt, completion in sequences
        ]
        return torch.cat(out)

    allowed = min(tolerance_of(model), 0.03)  # a state along the row may change scores by as little as 0.06
    with _own_attention(model):
        alone = scored_alone()
        if model.dtype != torch.float32:
            with _rounded_once_more(model.get_input_embeddings()):
                allowed = max(allowed, 2 * float((scored_alone() - alone).norm() / alone.norm()))
    error = float((packed - alone).norm() / alone.norm())
    if not error < allowed:
        why = "its layers carry a state along the row, or see more of it than their own sequence"
        if not shares_rows(model):
            why = "its tokens see the padding behind them"
        raise Unshared(
            f"{type(model).__name__}: packed scores differ from single ones by {error:.2g} (relative); {why}"
        )


LONGEST_WINDOW = 1024
"""Tokens of the longest window or chunk that `check_packing` goes beyond."""


def _window(model: PreTrainedModel) -> int:
    """Tokens of the longest window or chunk that a short check can go beyond; 0 if there is none."""
    sizes = [getattr(model.config, name, None) or 0 for name in LOCAL_SIZES]
    sizes += (getattr(model.config, COMPRESSION, None) or {}).values()
    last = (getattr(model.config, "max_position_embeddings", None) or 2 * LONGEST_WINDOW) - 16
    return max((size for size in sizes if size <= LONGEST_WINDOW and size + 7 <= last), default=0)


@contextmanager
def _rounded_once_more(embeddings: nn.Module) -> Iterator[None]:
    """Move the embeddings at random, by as much as rounding to bf16 may, while inside."""

    def nudge(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        random = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        return output + output * (2 * random - 1) * 2**-8

    handle = embeddings.register_forward_hook(nudge)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
@failing_in_one_line
def check_noise(model: PreTrainedModel, device: torch.device) -> None:
    """Raise UserError for a model with noise in training, such as experts that are drawn at random.

    Policy and reference would differ by it.
    """
    tokens = within_positions(model, 128)
    ids = np.random.default_rng(1).integers(0, min(model.config.vocab_size, 1000), tokens).tolist()
    batch = pack([TokenGroup(ids[: tokens // 2], [ids[tokens // 2 :]], [])]).to(device)
    table, mode, hidden = SegmentTable(batch.segments), model.training, list[Tensor]()
    try:
        for is_training in (False, True):
            model.train(is_training)
            hidden.append(last_hidden(model, batch, table).float())
    finally:
        model.train(mode)
    evaluation, training = hidden
    lengths = evaluation.norm(dim=1).clamp(min=1e-6)  # 0 at padding tokens of some recurrent models
    error = float(((training - evaluation).norm(dim=1) / lengths).max())
    if not error < tolerance_of(model):
        raise UserError(
            f"{type(model).__name__}: in training its hidden states differ from those in evaluation by "
            f"{error:.2g} (relative); a model with noise of its own, such as experts that are drawn, cannot "
            "be compared with a reference"
        )


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Give the model transformers' own attention, while inside."""
    ours: Any = model.config._attn_implementation
    set_attention(model, own_attention(model))
    try:
        yield
    finally:
        set_attention(model, ours)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Give the model the attention of this name.

    Some families do not let transformers set it, because their code reads the config by itself.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model.set_attn_implementation(name)
    finally:
        logging.set_verbosity(verbosity)
    model.config._attn_implementation = name


def own_attention(model: PreTrainedModel) -> str:
    """The name of transformers' attention for this model."""
    return "sdpa" if model._supports_sdpa else "eager"
