"""Problems to measure a loss head on, with logits as peaked as a trained model's, and the exact answer.

Random normal hidden states would give a nearly uniform softmax: its numerics are easy, and a peer that
skips negligible probabilities finds none. So rows of logits are built in which a few tokens hold the mass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from madpo.kernels.edge_loss import MarginWeight

ROWS_PER_SEQUENCE = 384
LOG_ODDS = (-3.0, 5.0)  # range of the target's log-odds against all other tokens
DRIFT = 0.2  # standard deviation of the reference's logits around the policy's
SATURATION = 8.0  # logits by which policy and reference differ on targets, in a saturated problem
WEIGHT = MarginWeight(c_max=4.0, c_min=0.25, lam=1.0, tau=7.0)


@dataclass(frozen=True)
class Shape:
    """The output head of a model."""

    name: str
    hidden: int  # H
    vocab: int  # V


SHAPES = (
    Shape("Llama-3.1-8B", 4096, 128256),
    Shape("Qwen3-8B", 4096, 151936),
    Shape("Gemma-2-9B", 3584, 256000),
    Shape("Llama-3.2-1B", 2048, 128256),
    Shape("Qwen2.5-0.5B", 896, 151936),
    Shape("Gemma-3-1B", 1152, 262144),
)
SMALL = (Shape("small-1003", 64, 1003), Shape("small-4000", 128, 4000))


@dataclass(frozen=True)
class Problem:
    """The completion tokens of P pairs, packed without padding: chosen, rejected, chosen, rejected, ..."""

    hidden: Tensor  # (M, H) leaf with gradient
    weight: Tensor  # (V, H) leaf, with gradient unless the head is frozen
    ref_hidden: Tensor  # (M, H)
    ref_weight: Tensor  # (V, H)
    targets: Tensor  # (M,) int64
    lengths: tuple[int, ...]  # (S,) tokens of each sequence
    margins: Tensor  # (P,) float32
    beta: float = 0.1
    margin_weight: MarginWeight = WEIGHT

    @cached_property
    def weights(self) -> Tensor:
        """(P,) float32 weights that MADPO gives the margins, for heads that take weights and no margins."""
        return self.margin_weight(self.margins.double()).float()

    def unweighted(self) -> Problem:
        """This problem with margins whose weights are all 1, for heads that take no weights."""
        return replace(self, margins=torch.full_like(self.margins, -1000.0))


def make_problem(
    shape: Shape,
    rows: int,  # M
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    saturated: bool = False,
    frozen_head: bool = False,
) -> Problem:
    """Make a problem of `rows` completion tokens in sequences of unequal length, about 384 tokens each.

    With unit rows g of random directions, Zipf log-frequencies f (by token id, as in a BPE vocabulary)
    and one direction u that all tokens share, weight[v] = g[v] + f[v] u / sqrt(H). A hidden state is
    sqrt(H) u + noise + a g[target], so that its logits are f + noise + a on the target; `a` gives the
    target the log-odds drawn uniformly from -3 to 5, a probability of 0.05 to 0.99. The noise leaves an
    entropy of a few nats among the other tokens, 1 to 3 over all: see `describe`. Targets are drawn by
    frequency.

    The reference is the policy with logits moved at random by a fifth of a nat. With `saturated`, the
    reference's logit of each chosen target and the policy's of each rejected target are also lower by 8:
    3 to 8 nats of log-ratio a token. From about 350 tokens a pair the derivative of the loss is then exactly
    0 in float32; for shorter pairs it is nearly 0.

    Margins are normal with mean 4 and deviation 4, so that either sign and either side of tau occur.
    The same arguments give the same problem on the same kind of device.

    Raises ValueError for fewer than two rows.
    """
    if rows < 2:
        raise ValueError(f"rows: {rows} cannot hold a pair; give at least 2")
    random = torch.Generator(device).manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=random, device=device)  # noqa: E731
    width, vocab = shape.hidden, shape.vocab
    lengths = _lengths(rows, torch.Generator().manual_seed(seed))

    frequencies = -torch.log(torch.arange(vocab, device=device) + 2.7)  # (V,)
    targets = torch.multinomial(frequencies.exp(), rows, replacement=True, generator=random)
    shared = F.normalize(normal(width), dim=0)
    own = normal(vocab, width).div_(math.sqrt(width))  # (V, H)
    own.addr_(own @ shared, shared, alpha=-1.0)  # the target's share must not raise frequent tokens
    weight = own.addr(frequencies - frequencies.mean(), shared, alpha=width**-0.5)

    hidden = math.sqrt(width) * shared + _spread(vocab) * normal(rows, width)
    bump = own[targets]  # (M, H)
    low, high = LOG_ODDS
    odds = low + (high - low) * torch.rand(rows, generator=random, device=device)
    target_logits, others = _calibrate(hidden, weight, targets)
    gain = (others + odds - target_logits) / bump.square().sum(1)  # (M,)
    hidden.addcmul_(gain[:, None], bump)

    ref_hidden = hidden + DRIFT / math.sqrt(2) * normal(rows, width)
    ref_weight = weight + DRIFT / math.sqrt(2) * normal(vocab, width) / hidden.norm(dim=1).mean()
    if saturated:
        sides = torch.tensor([0.0, 1.0], device=device).repeat(len(lengths) // 2)
        counts = torch.tensor(lengths, device=device)
        rejected = sides.repeat_interleave(counts, output_size=rows)[:, None]
        hidden.addcmul_(bump, rejected, value=-SATURATION)
        ref_hidden.addcmul_(bump, 1 - rejected, value=-SATURATION)
    return Problem(
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(not frozen_head),
        ref_hidden.to(dtype),
        ref_weight.to(dtype),
        targets,
        lengths,
        4 + 4 * normal(len(lengths) // 2),
    )


def _lengths(rows: int, random: torch.Generator) -> tuple[int, ...]:
    """(S,) log-normal lengths that sum to `rows`; short problems get four pairs if the rows allow."""
    pairs = max(round(rows / (2 * ROWS_PER_SEQUENCE)), min(4, rows // 8), 1)
    shares = torch.randn(2 * pairs, generator=random).mul(0.5).exp()
    ends = (shares.cumsum(0) / shares.sum() * (rows - 2 * pairs)).round().long()
    lengths = ends.diff(prepend=ends.new_zeros(1)) + 1
    return tuple(lengths.tolist())


def _spread(vocab: int) -> float:
    """The noise logits' standard deviation that leaves an entropy of a few nats besides the target."""
    return math.sqrt(max(2 * (math.log(vocab) - 8.5), 2.0))


def _calibrate(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (M,)
) -> tuple[Tensor, Tensor]:
    """The logit of each target and the logsumexp of all other tokens, (M,) each."""
    pieces: list[tuple[Tensor, Tensor]] = []
    for rows in _chunks(len(hidden), len(weight), 4):
        logits = hidden[rows] @ weight.t()
        index = targets[rows, None]
        own = logits.gather(1, index).squeeze(1)
        pieces.append((own, logits.scatter_(1, index, -math.inf).logsumexp(1)))
    first, second = zip(*pieces, strict=True)
    return torch.cat(first), torch.cat(second)


def _chunks(rows: int, vocab: int, bytes_each: int, limit: int = 2**29) -> Iterator[slice]:
    """Slices of the rows whose logits take at most `limit` bytes: two such buffers are 1 GiB."""
    step = max(1, limit // (vocab * bytes_each))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class Description(NamedTuple):
    """Means over the policy's rows of logits."""

    entropy: float  # nats
    target_probability: float
    largest_logit: float
    between: float  # share of targets with a probability from 0.05 to 0.99


@torch.no_grad()
def describe(problem: Problem) -> Description:
    """Measure how peaked the policy's distributions are."""
    weight = problem.weight.float()
    sums = torch.zeros(4, dtype=torch.float64, device=problem.hidden.device)
    for rows in _chunks(len(problem.hidden), len(weight), 4):
        logits = problem.hidden[rows].float() @ weight.t()
        logps = logits.log_softmax(1)
        target = logps.gather(1, problem.targets[rows, None]).exp()
        entropy = -(logps.exp() * logps).sum()
        between = ((target > 0.05) & (target < 0.99)).sum()
        sums += torch.stack([entropy, target.sum(), logits.amax(1).sum(), between])
    return Description(*(sums / len(problem.hidden)).tolist())


class Exact(NamedTuple):
    """The exact answer: float64 throughout, from the problem's values as rounded to its dtype."""

    loss: Tensor  # ()
    logps: Tensor  # (S,)
    ref_logps: Tensor  # (S,)
    d_hidden: Tensor  # (M, H)
    d_weight: Tensor | None  # (V, H); None for a frozen head


@torch.no_grad()
def exact(problem: Problem) -> Exact:
    """The loss, log-probs and gradients in closed form, a few rows of float64 logits at a time.

    L = 1/P sum_p w_p softplus(-beta D_p), D_p the chosen log-ratio minus the rejected one, hence
    dL/d(log-prob of a token) = -+ w_p beta sigmoid(-beta D_p) / P, minus in the chosen sequence.
    """
    hidden, weight = problem.hidden.double(), problem.weight.double()
    logps = _sequence_logps(hidden, weight, problem)
    ref_logps = _sequence_logps(problem.ref_hidden.double(), problem.ref_weight.double(), problem)
    chosen, rejected = (logps - ref_logps).view(-1, 2).unbind(1)
    scaled = problem.beta * (chosen - rejected)
    weights = problem.margin_weight(problem.margins.double())
    loss = (weights * F.softplus(-scaled)).mean()

    gradient = weights * problem.beta * torch.sigmoid(-scaled) / len(weights)  # (P,)
    of_sequences = torch.stack([-gradient, gradient], 1).flatten()  # (S,)
    dloss_dlogps = of_sequences.repeat_interleave(_counts(problem), output_size=len(hidden))  # (M,)
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.zeros_like(weight) if problem.weight.requires_grad else None
    for rows in _chunks(len(hidden), len(weight), 8):
        d_logits = torch.softmax(hidden[rows] @ weight.t(), 1).neg_()
        index = problem.targets[rows, None]
        d_logits.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))
        d_logits *= dloss_dlogps[rows, None]
        d_hidden[rows] = d_logits @ weight
        if d_weight is not None:
            d_weight.addmm_(d_logits.t(), hidden[rows])
    return Exact(loss, logps, ref_logps, d_hidden, d_weight)


def _counts(problem: Problem) -> Tensor:
    """(S,)"""
    return torch.tensor(problem.lengths, device=problem.hidden.device)


def _sequence_logps(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    problem: Problem,
) -> Tensor:  # (S,)
    pieces: list[Tensor] = []
    for rows in _chunks(len(hidden), len(weight), 8):
        logits = hidden[rows] @ weight.t()
        target = logits.gather(1, problem.targets[rows, None]).squeeze(1)
        pieces.append(target - logits.logsumexp(1))
    return torch.stack([part.sum() for part in torch.cat(pieces).split(list(problem.lengths))])
