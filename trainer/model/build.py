"""The models of a run. Inside `partitioned_loading` they are built straight into ZeRO-3 partitions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from madpo.trainer.config.peft import PeftConfig
from madpo.trainer.config.schema import Config, validate_peft
from madpo.trainer.errors import UserError
from madpo.trainer.head import check_impl
from madpo.trainer.model import liger, lora
from madpo.trainer.model.attention import prefix_sharing
from madpo.trainer.model.attention.choice import check_available
from madpo.trainer.model.expert_balance import expert_balance
from madpo.trainer.model.freeze import freeze
from madpo.trainer.model.offload import offload_layers
from madpo.trainer.model.policy import PolicyWithReference
from madpo.trainer.model.pretrained import Pretrained, build_from_scratch, load_pretrained, read_config
from madpo.trainer.model.recompute import checkpoint_layers
from madpo.trainer.model.reward import RewardModel
from madpo.trainer.model.tokenizer import padding_token
from madpo.trainer.model.vocabulary import add_tokens, embedding_rows, vocabulary_of
from madpo.trainer.scoring_module import ReferenceScorer
from madpo.trainer.sequence_parallel import join
from madpo.trainer.zero3.loading import gather_convolutions
from madpo.trainer.zero3.parameters import real_shape


def build_module(config: Config, tokenizer: PreTrainedTokenizerBase) -> PolicyWithReference | RewardModel:
    """The policy with its reference, if the objective needs one, and the loss head; or a reward model.

    Seeds torch, so that new weights agree on all ranks. Raises UserError for a model that cannot be loaded or
    does not fit its tokenizer.
    """
    objective, model = config.bound_objective, config.model
    _prepare_kernels(config)
    torch.manual_seed(config.seed)
    options = _loading_options(config)
    policy, adapter, has_new_layer = _policy(config, tokenizer, options)
    if model.freeze:
        freeze(policy, model.freeze)
    if config.train.export_merged and not lora.is_adapted(policy):
        raise UserError("train.export_merged: the model has no adapter; leave it false")
    is_scored = objective.needs_reference and model.reference != "cached"
    reference = _reference(config, policy, adapter, options) if is_scored else None
    for part in (policy, reference.model if reference else None):
        if part is not None:
            gather_convolutions(part)
    repeats_layers = _save_time_and_memory(policy, reference, config)
    if objective.is_reward_model:
        padding_token(tokenizer, policy.config.vocab_size)
        module = RewardModel(policy, objective, has_new_layer)
    else:
        budget_bytes = int(config.train.head_gib * 2**30)
        balance = expert_balance(policy, model.router_aux_loss_coef)
        group = join(config.train.sequence_parallel_size, config.launch.timeout_minutes)
        module = PolicyWithReference(
            policy, reference, objective, budget_bytes, config.train.head_impl, balance, group
        )
    module.repeats_layers = repeats_layers
    return module


def known_tokens(config: Config, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of tokens that policy and reference will both know; None if their files do not say.

    No weight of a whole model is loaded: the data is held against it first. Raises UserError.
    """
    model, known = config.model, list[int | None]()
    if model.init_config is not None:
        known.append(model.init_config.get("vocab_size", len(tokenizer)))
    named = model.ref_model_name_or_path if config.bound_objective.needs_reference else None
    for name, revision in ((model.model_name_or_path, model.model_revision), (named, None)):
        if name is not None:
            known.append(known_to(config, name, revision))
    least = min((count for count in known if count is not None), default=None)
    return max(least, len(tokenizer)) if least is not None and model.resize_embeddings else least


def known_to(config: Config, name: str, revision: str | None) -> int | None:
    """The number of tokens that a stored model, or an adapter with its base, has embeddings for; None where
    its files do not say."""
    adapter = adapter_named(config, name, revision)
    if adapter is None:
        return vocabulary_of(read_config(name, revision))
    with _naming_the_base(name):
        known = vocabulary_of(read_config(adapter.base, adapter.config.revision))
    return known if known is None else embedding_rows(adapter, known)


def load_reference(config: Config, tokenizer: PreTrainedTokenizerBase) -> ReferenceScorer:
    """The reference by itself: the model named, or the start of the run, with its adapter off unless it was
    trained before. Seeds torch and raises UserError as `build_module` does."""
    _prepare_kernels(config)
    torch.manual_seed(config.seed)
    options = _loading_options(config)
    name = config.model.ref_model_name_or_path
    if name is None:
        policy, adapter, _ = _policy(config, tokenizer, options)
        reference = _without_adapter(policy, adapter) if lora.is_adapted(policy) else ReferenceScorer(policy)
    else:
        model = _load(config, name, None, _stored_adapter(config, name, None), **options).model
        if config.model.resize_embeddings:
            add_tokens(model, len(tokenizer))
        reference = ReferenceScorer(model)
    gather_convolutions(reference.model)
    return reference


def _save_time_and_memory(policy: PreTrainedModel, reference: ReferenceScorer | None, config: Config) -> bool:
    """Apply Liger kernels, activation checkpointing and offloading; none changes what is computed. Returns
    whether backward computes the layers again. Raises UserError for a model that has not got one of them."""
    model = config.model
    selective = model.gradient_checkpointing == "selective"
    if model.use_liger_kernel:
        for one in {policy, policy if reference is None else reference.model}:
            liger.use_kernels(one, rotate=not selective)
    if model.gradient_checkpointing:
        checkpoint_layers(policy, selective)
    if model.activation_offloading:
        offload_layers(policy)
    return bool(model.gradient_checkpointing) and not selective


def _prepare_kernels(config: Config) -> None:
    """Make our attention known to transformers. Raises UserError for a kernel that cannot run here."""
    prefix_sharing.register()
    check_available(config.model.attention)
    check_impl(config.train.head_impl)


def _loading_options(config: Config) -> dict[str, Any]:
    """Keyword arguments for every model of the run."""
    is_reward_model = config.bound_objective.is_reward_model
    return {
        "dtype": torch.bfloat16 if config.train.bf16 else torch.float32,
        "attention": prefix_sharing.NAMES["sdpa"],  # until `choose_attention`
        "kind": AutoModelForSequenceClassification if is_reward_model else AutoModelForCausalLM,
        **({"num_labels": 1} if is_reward_model else {}),
    }


class _Policy(NamedTuple):
    """The model that training starts from."""

    model: PreTrainedModel
    adapter: lora.StoredAdapter | None  # the stored one that training goes on with
    has_new_layer: bool  # a random score layer


def _policy(config: Config, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> _Policy:
    """Load or make the policy, with a stored or a fresh adapter if the config has one."""
    model = config.model
    adapter = _stored_adapter(config, model.model_name_or_path, model.model_revision)
    if model.init_config:
        policy, has_new_layer = build_from_scratch(model, tokenizer, **options), True
    else:
        if adapter is not None:
            lora.check_adapter_settings(adapter, config.peft or PeftConfig())
        start = str(model.model_name_or_path), model.model_revision
        policy, has_new_layer = _load(config, *start, adapter, **options)
        if config.peft is not None and adapter is None:
            rewards = config.bound_objective.is_reward_model
            lora.attach(policy, lora.new_config(config.peft, *start, rewards), lora.POLICY)
    if model.resize_embeddings:
        add_tokens(policy, len(tokenizer))
    return _Policy(policy, adapter, has_new_layer)


def load_sampler(config: Config, name: str, revision: str | None) -> PreTrainedModel:
    """A language model to sample from, with transformers' own attention. `name` may be an adapter's. Raises
    UserError for a model that cannot be loaded."""
    dtype = torch.bfloat16 if config.train.bf16 else torch.float32
    options: Any = {"dtype": dtype, "attention": None, "kind": AutoModelForCausalLM}
    return _load(config, name, revision, adapter_named(config, name, revision), **options).model.eval()


def _reference(
    config: Config, policy: PreTrainedModel, adapter: lora.StoredAdapter | None, options: dict[str, Any]
) -> ReferenceScorer:
    """The reference beside the policy: the model named, the policy without its adapter, or a second copy of
    the model that training starts from."""
    model = config.model
    named = model.ref_model_name_or_path
    if model.reference == "adapter" and not lora.is_adapted(policy):
        raise UserError("model.reference: adapter, but the model has none; add a section peft, or set joint")
    if named is None and lora.is_adapted(policy) and model.reference != "joint":
        return _without_adapter(policy, adapter)
    source = str(named or model.model_name_or_path), None if named else model.model_revision
    reference = _load(config, *source, _stored_adapter(config, *source), **options).model
    if model.resize_embeddings:
        add_tokens(reference, policy.config.vocab_size)
    check_vocabulary(policy.config.vocab_size, reference.config.vocab_size)
    if model.sync_ref_model:
        _check_same_shapes(policy, reference)
    return ReferenceScorer(reference)


def _without_adapter(policy: PreTrainedModel, adapter: lora.StoredAdapter | None) -> ReferenceScorer:
    """The policy without its adapter; or, if training goes on with a stored one, with a frozen copy of it."""
    if adapter is not None:
        lora.attach(policy, adapter.config, lora.REFERENCE, adapter.weights)
    return ReferenceScorer(policy, partial(lora.switch, adapter=None if adapter is None else lora.REFERENCE))


def _stored_adapter(config: Config, name: str | None, revision: str | None) -> lora.StoredAdapter | None:
    """The adapter of that name; None for a whole model. Raises UserError if it does not suit this run."""
    adapter = adapter_named(config, name, revision)
    if adapter is not None:
        settings = config.peft or PeftConfig()
        validate_peft(config, settings.model_copy(update={"use_dora": adapter.config.use_dora}))
    return adapter


def adapter_named(config: Config, name: str | None, revision: str | None) -> lora.StoredAdapter | None:
    """The adapter of that name; None for a whole model.

    `peft.base_model_name_or_path` says where the base of the policy's adapter is, not of any other. Raises
    UserError if it is set for a whole model.
    """
    own = config.model.model_name_or_path
    is_own = own is not None and name == own
    base = config.peft.base_model_name_or_path if config.peft is not None and is_own else None
    adapter = lora.stored_adapter(name, revision, base)
    if base is not None and adapter is None:
        raise UserError(
            f"peft.base_model_name_or_path: {base!r} is for a stored adapter, but model.model_name_or_path "
            f"{name!r} is a whole model; leave the key out, the base of a new adapter is that model"
        )
    return adapter


def _load(
    config: Config,
    name: str | None,
    revision: str | None,
    adapter: lora.StoredAdapter | None,
    **options: Any,
) -> Pretrained:
    """The model of that name; or an adapter's base with the adapter on it."""
    options["quantization_config"] = lora.quantisation(config.peft)
    if adapter is None:
        return load_pretrained(name, revision, **options)
    with _naming_the_base(name):
        base = load_pretrained(adapter.base, adapter.config.revision, **options)
    if base.has_new_layer and "score" not in (adapter.config.modules_to_save or []):
        raise UserError(f"{name} is no reward model's adapter; merge it first (madpo export --merge)")
    add_tokens(base.model, embedding_rows(adapter, base.model.config.vocab_size))
    lora.attach(base.model, adapter.config, lora.POLICY, adapter.weights)
    return Pretrained(base.model, has_new_layer=False)


@contextmanager
def _naming_the_base(adapter: str | None) -> Iterator[None]:
    """Let a UserError about the base of an adapter say so."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{adapter} is an adapter: {error}; if its base model is elsewhere now, set "
            "peft.base_model_name_or_path"
        ) from error


def _check_same_shapes(policy: PreTrainedModel, reference: PreTrainedModel) -> None:
    ours, theirs = (
        {name: tuple(real_shape(p)) for name, p in model.named_parameters()} for model in (policy, reference)
    )
    if ours != theirs:
        name = next(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        raise UserError(
            f"model.sync_ref_model: {name} is {ours.get(name)} in the policy and {theirs.get(name)} in the "
            "reference; both must be of one architecture"
        )


def check_vocabulary(ours: int, theirs: int) -> None:
    """Raise UserError unless policy and reference have vocabularies of one size."""
    if ours != theirs:
        raise UserError(
            f"policy and reference have vocabularies of {ours} and {theirs} tokens; the reference must "
            "be a model with the same tokenizer (model.ref_model_name_or_path)"
        )
