"""Policy and frozen reference as one module: one engine, one forward, one loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from madpo.trainer.batches.packing import PackedBatch, Segment, pack
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.errors import UserError
from madpo.trainer.head import Impl, LogitTransform, OutputHead, OutputLayers, PreferenceHead
from madpo.trainer.model.attention.prefix_sharing import SegmentTable, Unshared, shares_rows
from madpo.trainer.model.expert_balance import ExpertBalance
from madpo.trainer.model.interleaved import Traversal, find_traversal
from madpo.trainer.model.lora import in_use
from madpo.trainer.model.padded_rows import run_rows
from madpo.trainer.objectives.build import BoundObjective
from madpo.trainer.scoring_module import Gradients, Mode, ReferenceScorer
from madpo.trainer.sequence_parallel import SequenceGroup
from madpo.trainer.sliced_head import SlicedHead


class PolicyWithReference(nn.Module):
    """Scores a packed batch under both models and hands the completion rows to the loss head.

    The reference has no gradient and no optimiser state; a model of its own stays in evaluation mode.
    Without one, batches carry the log-probs that it gave before.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: ReferenceScorer | None,
        objective: BoundObjective,
        budget_bytes: int,
        impl: Impl = "auto",
        balance: ExpertBalance | None = None,
        sequence_group: SequenceGroup | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.reference_scorer = policy, reference
        self.balance, self.sequence_group = balance, sequence_group
        self.traversal: Traversal | None = None  # of both together; set by `share_traversal`
        self.stats: dict[str, Tensor] = {}  # (), of the last batch, means over its tokens
        self.notes: list[str] = []  # what a user should know of the models
        self.reference = None if reference is None or reference.model is policy else reference.model
        if self.reference is not None:
            self.reference.requires_grad_(False).eval()
        head, ref_head = output_head(policy), None
        if reference is not None:
            with reference.state():
                ref_head = output_head(reference.model)
        if ref_head is not None and ref_head.transform != head.transform:
            raise UserError(
                f"policy and reference treat their logits differently: {head.transform}, {ref_head.transform}"
            )
        layers = head, ref_head, objective, budget_bytes, impl
        self.head: OutputLayers = PreferenceHead(*layers)
        if sequence_group is not None:
            self.head = SlicedHead(*layers, sequence_group=sequence_group)

    @property
    def shares_rows(self) -> bool:
        """Whether sequences may share a packed row, and completions their prompt."""
        return shares_rows(self.policy)

    @property
    def loss_of_tokens(self) -> bool:
        """Whether the balance of experts, a mean over all packed tokens, is in the loss."""
        return self.balance is not None

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def forward(
        self, batch: PackedBatch, mode: Mode = Mode.LOSS, gradients: Gradients = None
    ) -> tuple[Tensor | None, ...]:
        """The loss () and the fields of `TokenScores`, as `mode` asks.

        FROM_GRADIENTS needs no reference. The loss of experts that are not in balance is in the loss, and
        in `stats`.
        """
        assert (batch.own_rows is None) == (self.sequence_group is None), "rows in slices are for their group"
        table = SegmentTable(batch.segments, self.sequence_group)
        options = {} if self.balance is None else {"output_router_logits": True}
        run_policy = partial(run_backbone, self.policy, batch, table, **options)
        reference = None if mode is Mode.FROM_GRADIENTS else self.reference_scorer
        ref_hidden = None
        assert reference is None or batch.ref_token_logps is None, "a reference, and its log-probs, too"
        if reference is not None and self.traversal is not None:
            with self.traversal.along() as companion:
                output = run_policy()
            ref_hidden = companion.last_hidden.index_select(0, batch.rows)
        else:
            if reference is not None:  # first: see `Companion.through_layer`
                with torch.no_grad(), reference.state():
                    ref_hidden = scored_hidden(reference.model, batch, table)
            output = run_policy()
        hidden = output.last_hidden_state[0].index_select(0, batch.rows)
        loss, *tokens = self.head(hidden, ref_hidden, batch, mode, gradients)
        if self.balance is not None:
            aux_loss = self.balance(output.router_logits)
            self.stats = {"aux_loss": aux_loss.detach()}
            share = batch.token_scale * len(batch.input_ids)
            loss = loss + self.balance.coef * share * aux_loss
        return loss, *tokens


def scored_hidden(model: PreTrainedModel, batch: PackedBatch, table: SegmentTable) -> Tensor:
    """(M, H): the backbone's last hidden states at the positions that predict a completion token."""
    return last_hidden(model, batch, table).index_select(0, batch.rows)


def last_hidden(model: PreTrainedModel, batch: PackedBatch, table: SegmentTable) -> Tensor:
    """(N, H): the backbone's last hidden states."""
    return run_backbone(model, batch, table).last_hidden_state[0]


def run_backbone(model: PreTrainedModel, batch: PackedBatch, table: SegmentTable, **options: Any) -> Any:
    """The backbone's output for a packed row; of a model that cannot share one, in the packed order.

    A mask that hides nothing keeps transformers from taking the row for sequences of their own by its
    positions, which would break completions off their prompt.
    """
    if not shares_rows(model):
        return run_rows(backbone(model), batch, **options)
    return backbone(model)(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        attention_mask=torch.ones_like(batch.input_ids)[None],
        use_cache=False,
        segments=table,
        **options,
    )


def backbone(model: PreTrainedModel) -> nn.Module:
    """What is under the head: transformers' base_model, or the one model inside where that names none."""
    if model.base_model is not model:
        return model.base_model
    inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inside) != 1:
        raise UserError(f"{type(model).__name__}: no backbone under its head that could be run alone")
    return inside[0]


def output_head(model: PreTrainedModel) -> OutputHead:
    """What the model does after its last hidden states, as far as its config tells.

    Raises ValueError for an output head that is no linear layer. `refuse_unless_head_is_known` finds out
    whether there is more to it.
    """
    head: Any = in_use(model.get_output_embeddings())
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__}: the output head is {type(head).__name__}, not a Linear")
    assert isinstance(head.weight, nn.Parameter)
    config: Any = model.config
    scale = getattr(config, "logit_scale", None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    # One family multiplies by what the others divide by.
    scale *= scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return OutputHead(head.weight, head.bias, LogitTransform(scale, softcap))


@torch.no_grad()
def refuse_unless_head_is_known(model: PreTrainedModel, device: torch.device) -> None:
    """Raise ValueError for a model whose logits are not `output_head` of its hidden states."""
    ids = torch.arange(min(model.config.vocab_size, 16), device=device)[None]
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": torch.arange(ids.shape[1], device=device)[None],
        "use_cache": False,
    }
    if shares_rows(model):
        inputs["segments"] = SegmentTable((Segment(0, ids.shape[1], 0, 0),))
    hidden = backbone(model)(**inputs).last_hidden_state
    head: Any = model.get_output_embeddings()
    ours = output_head(model).transform(head(hidden.to(model.dtype)).float())
    theirs = model(**inputs).logits.float()
    error = float((ours - theirs).norm() / theirs.norm())
    if not error < _tolerance(model):
        raise UserError(
            f"{type(model).__name__}: its logits differ from those of its output weight, bias, soft-cap and "
            f"scale by {error:.2g} (relative); the loss head does not know what else it does"
        )


def _tolerance(model: PreTrainedModel) -> float:
    return 1e-3 if model.dtype == torch.float32 else 0.1


@torch.no_grad()
def refuse_unless_packing_is_exact(model: PreTrainedModel, device: torch.device) -> None:
    """Raise ValueError for a model in which packing changes what a completion's tokens see.

    Two groups of random tokens are scored packed, and each completion alone with transformers' own attention.
    Layers that carry a state along the row, take positions from the row, or look at tokens to come give
    themselves away by far more than rounding. What rounding does to a model in bf16 is measured: where two
    experts are nearly equal it may send tokens elsewhere.

    The prompts are longer than the model's windows and chunks, which is how those show; but windows of more
    than LONGEST_WINDOW tokens would make the check as long as a step, and are not reached.
    """
    random = np.random.default_rng(0)
    high = min(model.config.vocab_size, 1000)
    draw = lambda count: random.integers(0, high, count).tolist()  # noqa: E731
    prompt = 7 + _window(model)
    groups = [TokenGroup(draw(prompt), [draw(6), draw(9)], []) for _ in range(2)]
    batch = pack(groups).to(device)
    packed = scored_hidden(model, batch, SegmentTable(batch.segments)).float()

    def singly() -> Tensor:  # (M, H)
        rows = [(group.prompt, completion) for group in groups for completion in group.completions]
        out = [
            backbone(model)(input_ids=torch.tensor([prompt + completion], device=device), use_cache=False)
            .last_hidden_state[0, len(prompt) - 1 : -1]
            .float()
            for prompt, completion in rows
        ]
        return torch.cat(out)

    allowed = min(_tolerance(model), 0.03)  # a state may show by as little as 0.06
    with _own_attention(model):
        single = singly()
        if model.dtype != torch.float32:
            with _rounded_once_more(model.get_input_embeddings()):
                allowed = max(allowed, 2 * float((singly() - single).norm() / single.norm()))
    error = float((packed - single).norm() / single.norm())
    if not error < allowed:
        raise Unshared(
            f"{type(model).__name__}: packed scores differ from single ones by {error:.2g} (relative); a "
            "model whose layers carry a state along the sequence cannot share a row between groups"
        )


LONGEST_WINDOW = 1024


def _window(model: PreTrainedModel) -> int:
    """Tokens of the longest window or chunk that a short check can pass; 0 if there is none."""
    sizes = [getattr(model.config, name, None) or 0 for name in ("sliding_window", "attention_chunk_size")]
    last = (getattr(model.config, "max_position_embeddings", None) or 2 * LONGEST_WINDOW) - 16
    return max((size for size in sizes if size <= LONGEST_WINDOW and size + 7 <= last), default=0)


@contextmanager
def _rounded_once_more(embeddings: nn.Module) -> Iterator[None]:
    """Inside, the embeddings are off by what rounding to bf16 may do to them."""

    def nudge(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        random = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        return output + output * (2 * random - 1) * 2**-8

    handle = embeddings.register_forward_hook(nudge)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def share_traversal(module: PolicyWithReference, device: torch.device) -> None:
    """Have policy and reference go through the layers together where they are one model and no bit depends
    on it; elsewhere a note says why not. All ranks must call it.

    Tried with a reference that starts from the embeddings of other tokens: what one takes from the other, and
    what a model does between its layers, shows although an adapter that is fresh changes nothing yet.
    """
    policy, reference = module.policy, module.reference_scorer
    if reference is None or reference.model is not policy:
        return
    found = find_traversal(backbone(policy), reference.switch)
    if module.balance is not None:
        found = "the balance of the experts is the policy's alone (model.router_aux_loss_coef)"
    if isinstance(found, Traversal):
        differs = torch.tensor(not _is_exact(found, reference, device), dtype=torch.int32, device=device)
        if torch_dist.is_initialized():
            torch_dist.all_reduce(differs, torch_dist.ReduceOp.MAX)
        if differs:
            found = f"{type(policy).__name__} does more than run its layers one after another"
    if isinstance(found, Traversal):
        module.traversal = found
    else:
        module.notes.append(f"policy and reference take a forward pass each: {found}")


def _is_exact(traversal: Traversal, reference: ReferenceScorer, device: torch.device) -> bool:
    model = reference.model
    ids = np.random.default_rng(2).integers(0, min(model.config.vocab_size, 1000), 96)
    prompt, *completions = (part.tolist() for part in np.split(ids, 3))
    batch = pack([TokenGroup(prompt, completions, [])]).to(device)
    run = partial(last_hidden, model, batch, SegmentTable(batch.segments))

    def others(hidden: Tensor) -> Tensor:
        return hidden.roll(1, dims=1)

    with traversal.starting_from(others), reference.state():
        apart = run()
    apart = torch.stack((run(), apart)).float()  # (2, N, H)
    with traversal.along(others) as companion:
        together = run()
    if companion.hidden is None or companion.hidden.shape[1:] != together.shape:
        return False
    together = torch.stack((together, companion.last_hidden)).float()
    return float((together - apart).norm() / apart.norm()) < _tolerance(model) / 100


@torch.no_grad()
def refuse_noise(model: PreTrainedModel, device: torch.device) -> None:
    """Raise ValueError for a model that in training computes something else than in evaluation, such as
    experts that are drawn: policy and reference would differ by it."""
    ids = np.random.default_rng(1).integers(0, min(model.config.vocab_size, 1000), 128)
    batch = pack([TokenGroup(ids[:64].tolist(), [ids[64:].tolist()], [])]).to(device)
    table, mode, hidden = SegmentTable(batch.segments), model.training, list[Tensor]()
    try:
        for training in (False, True):
            model.train(training)
            hidden.append(last_hidden(model, batch, table).float())
    finally:
        model.train(mode)
    still, moved = hidden
    error = float(((moved - still).norm(dim=1) / still.norm(dim=1)).max())
    if not error < _tolerance(model):
        raise UserError(
            f"{type(model).__name__}: in training its hidden states differ from those in evaluation by "
            f"{error:.2g} (relative); a model with noise of its own, such as experts that are drawn, cannot "
            "be compared with a reference"
        )


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model attends as in transformers without us."""
    ours: Any = model.config._attn_implementation
    model.set_attn_implementation(own_attention(model))
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


def own_attention(model: PreTrainedModel) -> str:
    """The name of transformers' attention for this model."""
    return "sdpa" if model._supports_sdpa else "eager"
