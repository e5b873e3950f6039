"""Other loss heads behind one interface: each computes the same DPO loss with its author's code.

    state = peer.prepare(problem)  # once: what a data collator or a constructor would do
    loss = peer.run(state)         # timed: policy and reference, hidden states to loss
    loss.backward()                # timed
    d_hidden, d_weight = state.gradients()

`run` adds no host synchronisation of its own. Leaves keep their gradients between calls: call
`clear(state)` outside the timed part. Before another problem call `torch.compiler.reset()`, and prepare
afterwards: past eight recompilations of a function, torch runs it eagerly, with a line in its log.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from madpo.benchmarks.head.problems import Problem

TRL = "trl.kernels.chunked_logprob"
LIGER = "liger_kernel.chunked_loss"
CCE = "cut_cross_entropy"
COMPILED_ROWS = 2048
TRL_VOCAB_CHUNK = 32768  # `_CHUNKED_LOGPROB_CHUNK_SIZE` of its trainers
TRL_DPO_OUTPUTS = ("entropy", "mean_logits", "is_top1")  # what its DPOTrainer asks of the policy
IGNORE = -100

TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden (m, H), weight (V, H), targets (m,)) -> log-probs of the targets (m,)."""


@dataclass(frozen=True)
class Packed:
    """A problem with the sequence of each token, which a collator would add."""

    problem: Problem
    sequence: Tensor  # (M,) the sequence of each token

    @property
    def hidden(self) -> Tensor:
        return self.problem.hidden

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """(M, H) and (V, H)"""
        return self.hidden.grad, self.problem.weight.grad


@dataclass(frozen=True)
class Padded:
    """A padded batch (2P, T): all chosen sequences, then all rejected ones, padded to the longest."""

    problem: Problem  # with every weight 1
    hidden: Tensor  # (2P, T, H) leaf
    ref_hidden: Tensor  # (2P, T, H)
    targets: Tensor  # (2P, T), -100 on padding
    rows: Tensor  # (M,) position of each packed token among the 2P * T
    head: Any

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """(M, H) and (V, H)"""
        grad = self.hidden.grad
        return None if grad is None else grad.flatten(0, 1)[self.rows], self.problem.weight.grad


State = Packed | Padded


def clear(state: State) -> None:
    state.hidden.grad = state.problem.weight.grad = None


def pack(problem: Problem) -> Packed:
    lengths = torch.tensor(problem.lengths)
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    _ = problem.weights  # formed now, not in the first timed step: they depend on the data alone
    return Packed(problem, sequence.to(problem.hidden.device))


def pad(problem: Problem, compiled: bool) -> Padded:
    """Pad as Liger needs it, but completions only: its trainers pass it prompts as well."""
    problem = problem.unweighted()
    lengths, longest = problem.lengths, max(problem.lengths)
    pairs = len(lengths) // 2
    rows = torch.cat(
        [torch.arange(length) + (s // 2 + s % 2 * pairs) * longest for s, length in enumerate(lengths)]
    ).to(problem.hidden.device)

    def spread(values: Tensor, fill: float) -> Tensor:
        """(M, ...) -> (2P, T, ...)"""
        out = values.new_full((2 * pairs * longest, *values.shape[1:]), fill)
        return out.index_copy_(0, rows, values.detach()).unflatten(0, (2 * pairs, longest))

    return Padded(
        problem,
        spread(problem.hidden, 0).requires_grad_(),
        spread(problem.ref_hidden, 0),
        spread(problem.targets, IGNORE),
        rows,
        load(LIGER).LigerFusedLinearDPOLoss(beta=problem.beta, compiled=compiled),
    )


def weighted_dpo(state: Packed, token_logps: TokenLogps) -> Tensor:  # ()
    """mean_p w_p * -log sigmoid(beta D_p) for heads that give log-probs of tokens.

    The reference's log-probs are subtracted before summing, in float32: no head loses digits here.
    """
    problem = state.problem
    with torch.no_grad():
        reference = token_logps(problem.ref_hidden, problem.ref_weight, problem.targets)
    policy = token_logps(problem.hidden, problem.weight, problem.targets)
    ratios = policy.float() - reference.float()  # (M,)
    sums = ratios.new_zeros(len(problem.lengths)).index_add(0, state.sequence, ratios)  # (S,)
    chosen, rejected = sums.view(-1, 2).unbind(1)
    return (problem.weights * -F.logsigmoid(problem.beta * (chosen - rejected))).mean()


@torch.no_grad()
def sequence_logps(state: Packed, token_logps: TokenLogps) -> Tensor:  # (S,)
    """The policy's log-probs of sequences, summed in float64: the only errors are those of single tokens."""
    problem = state.problem
    tokens = token_logps(problem.hidden, problem.weight, problem.targets).double()
    return tokens.new_zeros(len(problem.lengths)).index_add(0, state.sequence, tokens)


def liger_dpo(state: Padded) -> Tensor:  # ()
    ref = {"ref_input": state.ref_hidden, "ref_weight": state.problem.ref_weight}
    return state.head(state.problem.weight, state.hidden, state.targets, **ref)[0]


def naive_fp32(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logps = (hidden @ weight.t()).float().log_softmax(-1)
    return logps.gather(-1, targets[:, None]).squeeze(-1)


def naive_narrow(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logps = (hidden @ weight.t()).log_softmax(-1)
    return logps.gather(-1, targets[:, None]).squeeze(-1)


compiled_whole = torch.compile(naive_fp32, dynamic=False)


def compiled_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    pieces: list[Any] = [
        checkpoint(compiled_whole, h, weight, t, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden.split(COMPILED_ROWS), targets.split(COMPILED_ROWS), strict=True)
    ]
    return torch.cat(pieces)


def trl(hidden: Tensor, weight: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> Tensor:
    """TRL's log-probs. Only the policy forms `outputs`, as in its DPOTrainer."""
    head = load(TRL).ChunkedLogProbFunction
    wanted = outputs if torch.is_grad_enabled() else ()
    return head.apply(hidden, weight, None, targets, 1.0, TRL_VOCAB_CHUNK, None, 1.0, wanted)[0]


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    head = load(CCE).linear_cross_entropy
    return -head(hidden, weight, targets, reduction="none", **options)


@cache
def load(module: str) -> Any:
    """Import a peer's module. Raises whatever the import raises."""
    return _trl_file() if module == TRL else importlib.import_module(module)


def _trl_file() -> ModuleType:
    """Load TRL's kernel file, unchanged, without the packages that the rest of TRL needs.

    Two of its imports are replaced: `is_triton_available` where transformers is not installed, and a gather
    of ZeRO-3 partitions in backward, which is a null context in TRL too outside of ZeRO-3.
    """
    path = metadata.distribution("trl").locate_file("trl/kernels/chunked_logprob.py")
    root = "trl_kernel_alone"
    for package in (root, f"{root}.kernels", f"{root}.trainer"):
        _stub(package)
    _stub(f"{root}.trainer.utils", maybe_gather_lm_head_ctx=lambda *_: nullcontext())
    absent: tuple[str, ...] = ()
    if importlib.util.find_spec("transformers") is None:
        has_triton = importlib.util.find_spec("triton") is not None
        absent = ("transformers", "transformers.utils")
        for package in absent:
            _stub(package, is_triton_available=lambda: has_triton)
    try:
        name = f"{root}.kernels.chunked_logprob"
        spec = importlib.util.spec_from_file_location(name, str(path))
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for package in absent:
            del sys.modules[package]
    return module


def _stub(name: str, **members: Any) -> None:
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(members)


@dataclass(frozen=True)
class Peer:
    name: str
    module: str | None  # its module, which must import; None: torch alone
    run: Callable[[Any], Tensor]
    note: str
    prepare: Callable[[Problem], Any] = pack
    weighted: bool = True  # False: it takes no weights and gets the problem with every weight 1
    needs_cuda: bool = False
    needs_narrow: bool = False  # bfloat16 or float16 only
    logps: Callable[[Any], Tensor] | None = None  # state -> (S,), where its log-probs can be had

    def refuses(self, problem: Problem) -> str | None:
        """The reason why it cannot run this problem; None if it can."""
        if self.needs_cuda and problem.hidden.device.type != "cuda":
            return "runs on CUDA only"
        narrow = problem.hidden.dtype in (torch.bfloat16, torch.float16)
        return "takes bfloat16 and float16 only" if self.needs_narrow and not narrow else None


def _scorer(name: str, module: str | None, token_logps: TokenLogps, note: str) -> Peer:
    run = partial(weighted_dpo, token_logps=token_logps)
    return Peer(name, module, run, note, logps=partial(sequence_logps, token_logps=token_logps))


def _liger(name: str, compiled: bool) -> Peer:
    note = (
        "padded to the longest sequence; float32 log-softmax of one pair at a time, gradient in forward, "
        "d_weight rounded once a pair; backward reads its upstream gradient on the host"
    )
    prepare = partial(pad, compiled=compiled)
    return Peer(name, LIGER, liger_dpo, note, prepare, weighted=False)


def _cce(name: str, note: str, **options: Any) -> Peer:
    note = (
        f"{note}; nonzero() on the targets synchronises; sums in the order of locks, so not deterministic; "
        "the target's logit is a sum of products rounded to the model's dtype, the logsumexp is not"
    )
    peer = _scorer(name, CCE, partial(cut_cross_entropy, **options), note)
    return replace(peer, needs_cuda=True, needs_narrow=True)


PEERS = (
    _scorer("torch naive fp32", None, naive_fp32, "all logits; log-softmax in float32"),
    _scorer(
        "torch naive narrow",
        None,
        naive_narrow,
        "all logits; log-softmax in the model's dtype, as in TRL to 1.15; its sums over tokens in float32",
    ),
    _scorer("torch.compile", None, compiled_whole, "naive fp32, compiled"),
    _scorer(
        "torch.compile chunks",
        None,
        compiled_chunks,
        f"{COMPILED_ROWS} rows at a time, recomputed in backward; d_weight rounded once a chunk",
    ),
    _scorer(
        "TRL",
        TRL,
        partial(trl, outputs=()),
        "its fastest form, log-probs alone; packed rows spare it the mask that its trainer synchronises for",
    ),
    _scorer(
        "TRL, DPO's outputs",
        TRL,
        partial(trl, outputs=TRL_DPO_OUTPUTS),
        "as its DPOTrainer calls it: entropy, mean logit and top-1 of the policy as well",
    ),
    _liger("Liger DPO", compiled=True),
    _liger("Liger DPO, eager", compiled=False),
    _cce("CCE", "its default: gradient tiles below a threshold are skipped"),
    _cce("CCE, no filter", "every gradient tile", filter_eps=None),
)


def available() -> tuple[dict[str, str], dict[str, str]]:
    """(name -> version of each peer that can run here, name -> why not of the others)."""
    versions: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for peer in PEERS:
        try:
            if peer.module is not None:
                load(peer.module)
            if peer.needs_cuda and not torch.cuda.is_available():
                raise RuntimeError("runs on CUDA only")
        except Exception as error:  # an import can fail in any way
            reasons[peer.name] = f"{type(error).__name__}: {error}"
        else:
            package = "torch" if peer.module is None else peer.module.split(".")[0]
            versions[peer.name] = f"{package} {metadata.version(package)}"
    return versions, reasons
