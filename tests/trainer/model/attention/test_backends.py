"""The back-ends of attention beside SDPA, and how one is chosen."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
from attention_cases import mixed_groups, packed_logps
from families import FAMILIES, tiny_model
from torch.nn.attention.flex_attention import create_block_mask

from madpo.trainer.batches.packing import pack
from madpo.trainer.errors import UserError
from madpo.trainer.model.attention import choice, flex, varlen
from madpo.trainer.model.attention import prefix_sharing as prefix_attention
from madpo.trainer.model.attention.backends import BACKENDS
from madpo.trainer.model.attention.inputs import AttentionInputs
from madpo.trainer.model.attention.segments import SegmentTable
from madpo.trainer.model.startup.attention import choose_attention, recorded_inputs

CPU = torch.device("cpu")
NAMES = prefix_attention.NAMES
SINKS_OR_CHUNKS = ("gpt-oss", "Llama 4")


@pytest.fixture(autouse=True)
def _registered():
    prefix_attention.register()


def varlen_in_plain_torch(q, k, v, query_offsets, key_offsets, scale, window, softcap=0.0):
    """What the kernels for variable lengths are documented to compute: causal at the bottom right, and a
    query sees `window` tokens before its own, all where that is negative."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    out = []
    for i in range(len(query_offsets) - 1):
        rows, columns = slice(*query_offsets[i : i + 2]), slice(*key_offsets[i : i + 2])
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[columns]) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        queries, keys = scores.shape[1:]
        distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
        hidden = (distance < 0) | ((distance > window) if window >= 0 else False)
        scores = scores.masked_fill(hidden, float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[columns]))
    return torch.cat(out)


def flash2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """The signature of flash-attn 2.8."""
    assert causal and max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and not dropout_p
    return varlen_in_plain_torch(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0], softcap)


def flash3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
):
    """The signature of flash-attn 3's first releases, which return the log-sum-exp too."""
    offsets = cu_seqlens_q, cu_seqlens_k
    return flash2(
        q, k, v, *offsets, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal, window_size, softcap
    ), None


def flash4(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
):
    """The signature of flash-attn 4's first releases: no longest lengths, None for no window."""
    assert causal and learnable_sink is None
    window = -1 if window_size[0] is None else window_size[0]
    return varlen_in_plain_torch(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window, softcap), None


def torch_varlen(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """The signature of torch 2.13's varlen_attn, whose window_size of (-1, 0) is the causal mask."""
    assert window_size[1] == 0 and enable_gqa == (query.shape[1] != key.shape[1])
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    return varlen_in_plain_torch(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0])


def torch_varlen_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    """That of torch 2.11, which does not say that heads may share keys."""
    assert window_size[1] == 0 and query.shape[1] == key.shape[1] == value.shape[1]
    return varlen_in_plain_torch(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0])


def forget_functions():
    varlen.flash_function.cache_clear()
    varlen.torch_function.cache_clear()


@pytest.fixture
def _stand_ins(monkeypatch):
    """Packages with the documented functions in plain torch: the kernels themselves run on GPUs only."""
    functions = {"flash_attn": flash2, "flash_attn_interface": flash3, "flash_attn.cute": flash4}
    for name, function in functions.items():
        package = types.ModuleType(name)
        package.flash_attn_varlen_func = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_varlen)
    forget_functions()
    yield
    forget_functions()


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("backend", ["flash2", "flash3", "flash4", "torch"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SINKS_OR_CHUNKS])
def test_the_calls_for_variable_lengths_describe_the_same_attention(family, backend):
    """The arguments for the kernels, checked against their documented meaning."""
    if family == "Gemma 2" and backend == "torch":
        pytest.skip("soft-caps; refused below")
    models = [tiny_model(family, NAMES[name], vocab_size=307) for name in ("sdpa", backend)]
    with torch.no_grad():
        for prefix_sharing in (True, False):
            want, got = (packed_logps(model, mixed_groups(), prefix_sharing) for model in models)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("_stand_ins")
def test_an_older_torch_gets_as_many_heads_of_keys(monkeypatch):
    want, got = (tiny_model("Llama 3", NAMES[name], vocab_size=307) for name in ("sdpa", "torch"))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_varlen_2_11)
    varlen.torch_function.cache_clear()
    with torch.no_grad():
        same = [packed_logps(model, mixed_groups(), True) for model in (want, got)]
        torch.testing.assert_close(*same, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt-oss"])
def test_flex_attention_sees_the_same(family):
    """Forward only, and without sinks: on CPUs torch has neither gradient nor log-sum-exp of it."""
    ours, flexible = (tiny_model(family, NAMES[name], vocab_size=307) for name in ("sdpa", "flex"))
    with torch.no_grad():
        for prefix_sharing in (True, False):
            want, got = (packed_logps(model, mixed_groups(), prefix_sharing) for model in (ours, flexible))
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


def long_table(seed: int) -> SegmentTable:
    """Prompts and completions that begin, end and lie within blocks of 128 tokens in every way."""
    random = torch.Generator().manual_seed(seed)
    groups = mixed_groups()
    for group in groups:
        sizes = torch.randint(1, 400, (8,), generator=random).tolist()
        group.prompt[:] = [5] * sizes[0]
        for completion, size in zip(group.completions, sizes[1:], strict=False):
            completion[:] = [7] * size
    return SegmentTable(pack(groups).segments)


@pytest.mark.parametrize("family", ["Llama 3", "Gemma 3", "Llama 4"])
def test_the_blocks_of_flex_attention_hold_all_that_is_seen(family):
    """Against the blocks that torch finds by trying every pair of tokens."""
    recorded = inputs_of(family)
    by_size = {inputs.mask_rule.local_size: inputs for inputs in recorded}
    for seed, inputs in enumerate(by_size.values()):
        table = long_table(seed)
        tokens = int(table.bounds[-1, 1])
        query = torch.zeros(1, 4, tokens, 12)
        mask = flex.block_mask(dataclasses.replace(inputs, query=query, segments=table))
        length = mask.seq_lengths[0]
        want = create_block_mask(mask.mask_mod, 1, None, length, length, device="cpu")
        assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
        assert want.full_kv_num_blocks is not None
        assert torch.equal(mask.to_dense() | want.to_dense(), mask.to_dense())
        if inputs.mask_rule.is_causal:
            assert torch.equal(mask.to_dense(), want.to_dense())
            assert torch.equal(mask.full_kv_num_blocks, want.full_kv_num_blocks)
            for row, count in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
                lists = [set(x.full_kv_indices[0, 0, row, :count].tolist()) for x in (mask, want)]  # type: ignore[index]
                assert lists[0] == lists[1]
        else:
            assert not mask.full_kv_num_blocks.any()


def test_the_mask_of_a_layer_is_built_once_for_a_row():
    model = tiny_model("Llama 3", NAMES["flex"])
    (first, *others) = recorded_inputs(model, CPU)
    assert others and all(flex.block_mask(inputs) is flex.block_mask(first) for inputs in others)


def inputs_of(family: str) -> list[AttentionInputs]:
    return recorded_inputs(tiny_model(family, NAMES["sdpa"]), CPU)


def on_gpu(recorded: list[AttentionInputs]) -> list[AttentionInputs]:
    """Attention inputs in bfloat16 on a GPU, of which `meta` is the one that is always there."""
    meta = torch.device("cuda")

    class Elsewhere(torch.Tensor):
        device = meta

    return [
        dataclasses.replace(inputs, query=inputs.query.bfloat16().as_subclass(Elsewhere))
        for inputs in recorded
    ]


REFUSED = [
    ("gpt-oss", "flash2", "attention sinks"),
    ("gpt-oss", "torch", "attention sinks"),
    ("Llama 4", "flash3", "masks other than causal ones and sliding windows"),
    ("Gemma 2", "torch", "soft-caps"),
    ("Gemma 2", "flash4", "no gradient of soft-caps"),
    ("Mistral", "torch", "a multiple of 8 dimensions, not of 12"),
]


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("family, backend, what", REFUSED)
def test_what_a_kernel_does_not_compute_is_refused(family, backend, what, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    problems = [BACKENDS[backend].problem(inputs) for inputs in on_gpu(inputs_of(family))]
    assert any(what in (problem or "") for problem in problems)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("major, fits", [(8, {2}), (9, {2, 3, 4}), (10, {2, 4}), (7, set())])
def test_versions_are_for_devices(major, fits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this card")
    (inputs, *_) = on_gpu(inputs_of("Llama 3"))
    assert {v for v in varlen.FLASH if varlen.flash_problem(inputs, v) is None} == fits


def test_bfloat16_and_a_gpu_are_asked_for():
    (inputs, *_) = inputs_of("Llama 3")
    assert "GPUs only" in str(
        varlen.torch_problem(dataclasses.replace(inputs, query=torch.zeros(1, 4, 3, 16)))
    )
    assert "not installed" in str(varlen.flash_problem(inputs, 2))
    (wide,) = on_gpu([dataclasses.replace(inputs, query=torch.zeros(1, 4, 3, 16))])
    assert varlen.torch_problem(wide) is None
    single = dataclasses.replace(wide, query=wide.query.float())
    assert "bfloat16, not in float32" in str(varlen.torch_problem(single))


def windowless(inputs: AttentionInputs) -> torch.Tensor:
    """A kernel that knows of no windows."""
    (plain, *_) = inputs_of("Llama 3")
    return BACKENDS["sdpa"].attend(dataclasses.replace(inputs, mask_rule=plain.mask_rule))


def deaf(inputs: AttentionInputs) -> torch.Tensor:
    """A kernel whose value is right, and whose gradient forgets the completions' own keys."""
    right = BACKENDS["sdpa"].attend(inputs)
    wrong = BACKENDS["sdpa"].attend(
        dataclasses.replace(inputs, key=inputs.key * 1.0, value=inputs.value.detach())
    )
    return wrong + (right - wrong).detach()


def broken(inputs: AttentionInputs) -> torch.Tensor:
    raise RuntimeError("head dimension 12 is too odd\nand more")


TRIALS = [
    ("Gemma 3", windowless, r"its value is off by 0\.\d+ \(relative\), where"),
    ("Llama 3", deaf, r"its gradient of the values is off by 1 \(relative\), where"),
    ("Llama 3", broken, r"it fails on this model's attention: head dimension 12 is too odd$"),
]


@pytest.mark.parametrize("family, kernel, why", TRIALS)
def test_a_kernel_that_computes_something_else_is_found_out(family, kernel, why, monkeypatch):
    monkeypatch.setitem(BACKENDS, "flex", dataclasses.replace(BACKENDS["sdpa"], attend=kernel))
    with pytest.raises(UserError, match=why.removesuffix("$")):
        choice.choose(inputs_of(family), "flex")


@pytest.mark.parametrize("family", ["Llama 3", "Gemma 2", "Gemma 3", "gpt-oss", "Llama 4"])
def test_a_kernel_that_is_right_passes_in_any_precision(family):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(family, NAMES["sdpa"]).to(dtype)
        backend = dataclasses.replace(BACKENDS["sdpa"], label="another")
        assert all(choice.trial(backend, inputs) is None for inputs in recorded_inputs(model, CPU))


def test_the_first_that_is_right_is_taken_and_the_others_are_named(monkeypatch):
    refusing = dataclasses.replace(BACKENDS["sdpa"], problem=lambda inputs: "it has a cold")
    for name in ("flash4", "flash3", "flash2"):
        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(refusing, label=BACKENDS[name].label))
    monkeypatch.setitem(
        BACKENDS, "torch", dataclasses.replace(BACKENDS["sdpa"], attend=windowless, label="T")
    )
    monkeypatch.setitem(BACKENDS, "flex", dataclasses.replace(BACKENDS["sdpa"], label="F"))
    found = choice.choose(inputs_of("Gemma 3"), "auto")
    assert found.name == "flex"
    assert str(found).startswith(
        "F (flash-attn 4, flash-attn 3, flash-attn 2: it has a cold; T: its value is"
    )


def test_a_named_back_end_that_cannot_serve_says_what_to_set():
    with pytest.raises(UserError, match=r"flex cannot be used here; .* on CPUs\. Set model\.attention=auto"):
        choose_attention(tiny_model("Llama 3", NAMES["sdpa"]), "flex", CPU)


def test_on_cpus_it_is_sdpa():
    model = tiny_model("Llama 3", NAMES["sdpa"])
    for wanted in ("auto", "sdpa"):
        assert choose_attention(model, wanted, CPU) == "attention: SDPA, segment by segment"
    assert prefix_attention.shares_rows(model)


def test_what_the_machine_lacks_is_said_before_what_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for attention in ("flash", "torch"):
        with pytest.raises(ValueError) as caught:
            choice.check_available(attention)
        assert str(caught.value) == (
            f"model.attention: {attention} trains on GPUs only, and there is none here; set "
            "model.attention=auto"
        )
    choice.check_available("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choice, "flash_versions", list)
    with pytest.raises(ValueError, match=r"attention=auto, .* or .*pip install 'madpo\[flash-attn\]'$"):
        choice.check_available("flash")
