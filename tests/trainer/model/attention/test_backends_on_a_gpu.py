"""Every back-end of attention that the GPU has, beside SDPA: log-probs, gradients, no wait for the device."""

import pytest
import torch
from attention_cases import mixed_groups, packed_logps
from families import tiny_model
from kernel_cases import DEVICE, relative_error

from madpo.trainer.batches.packing import pack
from madpo.trainer.model.attention import prefix_sharing as prefix_attention
from madpo.trainer.model.attention.backends import BACKENDS
from madpo.trainer.model.attention.choice import trial
from madpo.trainer.model.attention.prefix_sharing import NAMES, SegmentTable
from madpo.trainer.model.backbone import scored_hidden
from madpo.trainer.model.startup.attention import choose_attention, recorded_inputs

pytestmark = [
    pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU: make test-gpu"),
    pytest.mark.usefixtures("poisoned"),
]

FAMILIES = ("Llama 3", "Qwen3", "Qwen3-MoE", "Gemma 2", "Gemma 3", "Mistral", "Phi-3", "gpt-oss", "Llama 4")


def model_with(family: str, backend: str, dtype: torch.dtype):
    """Heads of 64 dimensions, which every kernel takes."""
    prefix_attention.register()
    sizes = {"hidden_size": 256, "vocab_size": 307, "head_dim": 64}
    return tiny_model(family, NAMES[backend], **sizes).to(DEVICE, dtype)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_back_end_computes_what_sdpa_does(family, backend):
    """In bfloat16, with at most four times the error that SDPA has there."""
    truth, usual = model_with(family, "sdpa", torch.float32), model_with(family, "sdpa", torch.bfloat16)
    recorded = recorded_inputs(usual, torch.device(DEVICE))
    problem = next((p for inputs in recorded if (p := BACKENDS[backend].problem(inputs))), None)
    if problem is not None:
        pytest.skip(problem)
    assert all(trial(BACKENDS[backend], inputs) is None for inputs in recorded)
    ours = model_with(family, backend, torch.bfloat16)
    for prefix_sharing in (True, False):
        found = []
        for model in (truth, usual, ours):
            model.zero_grad()
            logps = packed_logps(model, mixed_groups(), prefix_sharing)
            logps.sum().backward()
            gradient = next(p.grad for name, p in model.named_parameters() if name.endswith("k_proj.weight"))
            found.append((logps.detach(), gradient))
        for exact, theirs, own in zip(*found, strict=True):
            assert relative_error(own, exact) <= 4 * relative_error(theirs, exact)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa"])
def test_a_back_end_never_waits_for_the_device(backend):
    model = model_with("Llama 3", backend, torch.bfloat16)
    problem = BACKENDS[backend].problem(
        recorded_inputs(model_with("Llama 3", "sdpa", torch.bfloat16), model.device)[0]
    )
    if problem is not None:
        pytest.skip(problem)
    for step in range(3):  # the first of them compile
        batch = pack(mixed_groups()).to(DEVICE)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
        try:
            scored_hidden(model, batch, SegmentTable(batch.segments)).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_finds_one_that_passes_the_check_at_start(family):
    model = model_with(family, "sdpa", torch.bfloat16)
    assert choose_attention(model, "auto", torch.device(DEVICE)).startswith("attention: ")
    assert prefix_attention.shares_rows(model)
