"""Compile every kernel for GPUs that are not here, exactly as the ops would launch it.

    python tests/kernels/compile_kernels.py [80 90 100]

The ops run on meta tensors of real shapes; a launch compiles and stops. It fails on a compile error, a
spilled register, or more shared memory than the GPU has, and prints registers and shared memory of every
variant. It must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from madpo.kernels.edge_loss import EdgeLoss, MarginWeight
from madpo.kernels.layout import GroupLayout
from madpo.kernels.preference_loss import Reference, preference_loss
from madpo.kernels.preference_loss_from_logits import preference_loss_from_logits
from madpo.kernels.token_logps import linear_token_logps, token_logps
from madpo.kernels.transform import LogitTransform

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
ALIGNED = {"LOGITS", "DLOGITS", "REF_LOGITS", "BIAS", "X"}
"""Pointers for which a second compilation pays, where 16 divides them."""
MAX_REGISTERS = 128
"""With more, fewer than two programs of 8 warps run on a multiprocessor."""


class AbsentGPU:
    """A driver that answers what Triton asks before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability, self.target = capability, GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@dataclass(frozen=True)
class Usage:
    registers: int
    shared: int
    spills: int
    wide_loads: int

    @classmethod
    def of(cls, kernel: Any) -> Usage:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            resources = _output("cuobjdump", "--dump-resource-usage", file.name)
            sass = _output("nvdisasm", "-c", file.name)
        registers = re.search(r"REG:(\d+)", resources)
        assert registers, resources
        spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
        wide = len(re.findall(r"\bLDG\.[A-Z0-9.]*128", sass))
        return cls(int(registers[1]), kernel.metadata.shared, spills, wide)


def _output(tool: str, *args: str) -> str:
    return subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True).stdout


def ops() -> Iterator[tuple[str, Any]]:
    """(name, call) that together reach every kernel in every form that training uses."""
    weight = MarginWeight(c_max=4.0, c_min=0.25, lam=1.0, tau=7.0)
    edge = torch.empty(2, device="meta")
    losses = {
        "dpo": EdgeLoss(beta=0.1),
        "madpo": EdgeLoss(beta=0.1, margins=edge.double(), margin_weight=weight),
        "hinge": EdgeLoss(beta=0.1, curve="hinge", weights=edge, offsets=edge),
        "ipo": EdgeLoss(beta=0.1, curve="ipo", length_normalised=True),
    }
    softcap = LogitTransform(softcap=30.0)
    for name, loss in losses.items():
        yield f"head {name} bf16", lambda loss=loss: head(torch.bfloat16, 4096, 128256, loss)
    yield "head madpo fp32", lambda: head(torch.float32, 896, 151936, losses["madpo"])
    yield "head softcap", lambda: head(torch.bfloat16, 3584, 256000, losses["dpo"], transform=softcap)
    yield "head bias odd", lambda: head(torch.bfloat16, 768, 50257, losses["dpo"], bias=True)
    narrow = {"budget_bytes": 2**31, "logits_dtype": torch.bfloat16}
    yield "head narrow", lambda: head(torch.bfloat16, 4096, 128256, losses["dpo"], **narrow)
    yield "head blocks", lambda: head(torch.bfloat16, 4096, 128256, losses["dpo"], budget_bytes=2**26)
    for dtype in (torch.bfloat16, torch.float32):
        yield f"from logits {dtype}", lambda dtype=dtype: from_logits(dtype, losses["madpo"])
        yield f"token logps {dtype}", lambda dtype=dtype: tokens(dtype)
    yield "linear token logps", lambda: linear_tokens(softcap)


LENGTHS = (500, 524, 600, 424)


def head(dtype: torch.dtype, hidden_size: int, vocab: int, loss: EdgeLoss, bias: bool = False, **kwargs: Any):
    hidden, ref_hidden = torch.empty(2, sum(LENGTHS), hidden_size, dtype=dtype, device="meta")
    weight, ref_weight = torch.empty(2, vocab, hidden_size, dtype=dtype, device="meta")
    offset = torch.empty(vocab, dtype=dtype, device="meta") if bias else None
    out = preference_loss(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        _targets(),
        GroupLayout.pairs(LENGTHS, "meta"),
        loss,
        Reference(ref_hidden, ref_weight, offset),
        bias=offset,
        impl="triton",
        **kwargs,
    )
    out.loss.backward()


def from_logits(dtype: torch.dtype, loss: EdgeLoss) -> None:
    logits, ref_logits = torch.empty(2, sum(LENGTHS), 128256, dtype=dtype, device="meta")
    groups = GroupLayout.pairs(LENGTHS, "meta")
    leaf = logits.requires_grad_()
    out = preference_loss_from_logits(leaf, _targets(), groups, loss, ref_logits=ref_logits, impl="triton")
    out.loss.backward()


def tokens(dtype: torch.dtype) -> None:
    logits = torch.empty(sum(LENGTHS), 151936, dtype=dtype, device="meta", requires_grad=True)
    token_logps(logits, _targets(), entropy=True, impl="triton").token_logps.sum().backward()


def linear_tokens(transform: LogitTransform) -> None:
    hidden = torch.empty(sum(LENGTHS), 3584, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(256000, 3584, dtype=torch.bfloat16, device="meta", requires_grad=True)
    out = linear_token_logps(hidden, weight, _targets(), transform=transform, impl="triton")
    out.token_logps.sum().backward()


def _targets() -> torch.Tensor:
    return torch.empty(sum(LENGTHS), dtype=torch.int64, device="meta")


def compile_for(capability: int) -> list[str]:
    """Compile all kernels and print their usage; returns the problems."""
    driver.set_active(AbsentGPU(capability))  # pyright: ignore[reportArgumentType]
    problems: list[str] = []
    seen: set[str] = set()
    launch = JITFunction.run
    op = ""

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        problems.extend(
            f"{self.__name__}: {parameter.name} begins anywhere; do not specialise on its alignment"
            for parameter, argument in zip(self.params, args, strict=False)
            if isinstance(argument, torch.Tensor | tuple)
            and not (parameter.do_not_specialize_on_alignment or parameter.name in ALIGNED)
        )
        kernel: Any = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            problems.extend(report(op, capability, self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    try:
        for op, call in ops():  # noqa: B007  (`compile_only` reads it)
            call()
    finally:
        JITFunction.run = launch
    return problems


def report(op: str, capability: int, name: str, kernel: Any) -> Iterator[str]:
    usage = Usage.of(kernel)
    line = f"sm_{capability:<4} {op:28} {name:24} {usage.registers:4} registers {usage.shared:6} B shared"
    print(f"{line} {usage.wide_loads:3} wide loads {usage.spills:3} spills", flush=True)
    where = f"{name} ({op}, sm_{capability})"
    if usage.spills:
        yield f"{where}: {usage.spills} spilled registers"
    if usage.registers > MAX_REGISTERS:
        yield f"{where}: {usage.registers} registers, at most {MAX_REGISTERS} wanted"
    if usage.shared > SHARED_LIMIT[capability]:
        yield f"{where}: {usage.shared} B of shared memory, the limit is {SHARED_LIMIT[capability]}"
    if name in ("_row_stats_kernel", "_dlogits_kernel", "_score_groups_kernel") and not usage.wide_loads:
        yield f"{where}: no 16-byte loads"


def main() -> int:
    capabilities = [int(argument) for argument in sys.argv[1:]] or [80, 90, 100]
    problems = [problem for capability in capabilities for problem in compile_for(capability)]
    print("\n".join(problems) if problems else "all compiled, no spills")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
