"""LoRA adapters inside a transformers model: attached, stored, switched on and off. The layers are peft's.

The policy is the base model with the adapter POLICY. Its reference is that model with the adapter off, or
with a frozen copy, REFERENCE, of the adapter that training started from: no second model is in memory.
Source: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from madpo.trainer.config.peft import PeftConfig
from madpo.trainer.counted import counted
from madpo.trainer.errors import UserError, nearest
from madpo.trainer.packages import install

POLICY, REFERENCE = "default", "reference"
WEIGHTS = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
PREFIX = "base_model.model."
"""The first part of every weight's name in peft's files."""
REPEATED = (".modules_to_save.", ".original_module.")
"""Parts of names under which peft stores embeddings that were resized and trained once more, beside the copy
that was trained: that copy, and the base's."""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in a folder or on the hub."""

    name: str
    revision: str | None
    config: Any  # peft's LoraConfig

    @property
    def base(self) -> str:
        """The name of the model it was trained on. Raises UserError if the folder does not say."""
        if not self.config.base_model_name_or_path:
            raise UserError(
                f"{self.name}: its adapter_config.json names no base model; set peft.base_model_name_or_path"
            )
        return self.config.base_model_name_or_path

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Name in the model -> weight. Raises UserError if they are not in safetensors: a pickle is code."""
        with safe_open(self._file, "pt") as file:
            return {ours: file.get_tensor(theirs) for ours, theirs in _names(file).items()}

    @cached_property
    def lengths(self) -> dict[str, int]:
        """Name in the model -> rows of the weight, read off the file's header. Raises UserError too."""
        with safe_open(self._file, "pt") as file:
            return {ours: file.get_slice(theirs).get_shape()[0] for ours, theirs in _names(file).items()}

    @property
    def _file(self) -> Path:
        path = Path(self.name) / WEIGHTS
        if path.is_file():
            return path
        options: Any = {"revision": self.revision, "_raise_exceptions_for_missing_entries": False}
        file = None if Path(self.name).is_dir() else cached_file(self.name, WEIGHTS, **options)
        if file is None:
            raise UserError(f"{self.name}: there is no {WEIGHTS}; save the adapter with peft again")
        return Path(file)


def _names(file: Any) -> dict[str, str]:
    """Name in the model -> name in a file of peft's."""
    names = (name for name in file.keys() if not any(part in name for part in REPEATED))  # noqa: SIM118
    return {name.removeprefix(PREFIX): name for name in names}


def stored_adapter(name: str | None, revision: str | None, base: str | None = None) -> StoredAdapter | None:
    """The adapter of that name; None for a whole model. `base` replaces the base model that it names.

    Raises UserError for an adapter that is no LoRA, or one with biases.
    """
    if name is None or find_adapter_config_file(name, revision=revision) is None:
        return None
    peft = require_peft()
    config: Any = peft.PeftConfig.from_pretrained(name, revision=revision)
    if not isinstance(config, peft.LoraConfig) or config.bias != "none" or config.lora_bias:
        raise UserError(f"{name}: a LoRA adapter without trained biases is needed; this one is {config}")
    config.base_model_name_or_path = base or config.base_model_name_or_path
    config.lora_dropout = 0.0  # noise in the policy would be noise in the margin
    return StoredAdapter(name, revision, config)


def check_adapter_settings(adapter: StoredAdapter, settings: PeftConfig) -> None:
    """Raise UserError for a key of `peft` that contradicts the stored adapter that training goes on with."""
    for key, name in PEFT_NAMES.items():
        ours, theirs = getattr(settings, key), getattr(adapter.config, name)
        if ours is None or ours == theirs or (isinstance(ours, list) and set(ours) == set(theirs or [])):
            continue
        raise UserError(
            f"peft.{key}: {ours!r}, but the adapter {adapter.name} has {theirs!r}; leave the key out to "
            "train that adapter on, or merge it (madpo export --merge) and put a new one on the result"
        )


PEFT_NAMES = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""Key of `peft` -> peft's name, for what a stored adapter has decided already."""


def new_config(settings: PeftConfig, base: str, revision: str | None, scores: bool) -> Any:
    """peft's LoraConfig of a fresh adapter; a reward model's (`scores`) trains the score layer too."""
    peft = require_peft()
    whole = list(settings.lora_modules_to_save or [])
    return peft.LoraConfig(
        r=settings.lora_r or 16,
        lora_alpha=settings.lora_alpha or 32,
        lora_dropout=0.0,
        target_modules=settings.lora_target_modules or ALL_LINEAR,
        modules_to_save=[*whole, *(["score"] if scores and "score" not in whole else [])] or None,
        use_rslora=bool(settings.use_rslora),
        use_dora=bool(settings.use_dora),
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
    )


def require_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(f"LoRA adapters need the peft package: {install('madpo[peft]')}") from error
    return peft


def quantisation(settings: PeftConfig | None) -> Any:
    """transformers' settings to quantise the base model while it loads; None to leave it as it is. Raises
    UserError without bitsandbytes."""
    if settings is None or not settings.quantised:
        return None
    if find_spec("bitsandbytes") is None:
        raise UserError(f"a quantised base needs the bitsandbytes package: {install('madpo[qlora]')}")
    return BitsAndBytesConfig(
        load_in_4bit=settings.load_in_4bit,
        load_in_8bit=settings.load_in_8bit,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,  # as all other weights, so that they can share buffers
    )


def attach(model: PreTrainedModel, config: Any, name: str, weights: dict[str, Tensor] | None = None) -> None:
    """Put an adapter into the model, with the weights given or fresh ones. Only POLICY is trained.

    Raises UserError for layers that the model lacks or that cannot be adapted, and for weights that do not
    fit.
    """
    peft = require_peft()
    _check_modules(model, config)
    _check_tied_copies(model, config)
    dtype, config = model.dtype, copy.deepcopy(config)
    config.inference_mode = False
    if config.target_modules == ALL_LINEAR:
        first: Any = model.peft_config[POLICY] if is_adapted(model) else None
        config.target_modules = linear_layers(model) if first is None else first.target_modules
    try:
        peft.inject_adapter_in_model(config, model, name)
    except (ValueError, TypeError) as error:
        raise UserError(f"peft.lora_target_modules: {error}") from error
    _check_all_linear(model)
    if weights is not None:
        try:
            result = peft.set_peft_model_state_dict(model, weights, name)
        except (KeyError, RuntimeError) as error:
            line = str(error).splitlines()[:2][-1].strip()  # peft gives a line for every weight
            raise UserError(f"the adapter does not fit its base model: {line}") from error
        missing = [key for key in result.missing_keys if f".{name}." in f"{key}."]
        if missing or result.unexpected_keys:
            raise UserError(
                f"the adapter does not fit its base model: {counted(len(missing), 'weight')} missing, "
                f"{len(result.unexpected_keys)} have no place, "
                f"{[*missing, *result.unexpected_keys][0]} for one"
            )
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.data = parameter.data.to(dtype)  # peft makes them float32
        parameter.requires_grad_(f".{POLICY}." in parameter_name)
    for layer in adapted_layers(model):
        layer._active_adapter = [POLICY]


def save_adapter(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the policy's adapter in peft's format; `weights` are by their names in the model.

    A base model in a folder is named by its whole path, as the adapter may be loaded from anywhere.
    """
    peft = require_peft()
    options: Any = {"adapter_name": POLICY, "save_embedding_layers": False}  # else it asks the hub
    state = peft.get_peft_model_state_dict(model, state_dict=weights, **options)
    folder.mkdir(parents=True)
    save_file({PREFIX + key: value for key, value in state.items()}, folder / WEIGHTS, {"format": "pt"})
    config = copy.copy(model.peft_config[POLICY])
    config.inference_mode = True
    config.base_model_name_or_path = whole_path(config.base_model_name_or_path)
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(
            config.target_modules
        )  # a set, whose order changes from process to process
    config.save_pretrained(folder)


def whole_path(name: str) -> str:
    """The path of a model's folder from the root; a name on the hub as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def linear_layers(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers inside the model: no heads, routers, or experts that are one parameter.

    peft's own all-linear would also take experts, and routers, whose weight is used in ways of its own.
    """
    heads = _heads(model)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and not any(module is head for head in heads)
        and "router" not in type(module).__name__.lower()
        and name.rpartition(".")[2] not in ("router", "gate")
    }


def is_adapted(model: PreTrainedModel) -> bool:
    return hasattr(model, "peft_config")


def in_use(module: Any) -> Any:
    """The module that runs: where an adapter trains a copy of a whole module, that copy or the original."""
    if getattr(module, "modules_to_save", None) is None:
        return module
    if module.disable_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def switch(model: nn.Module, adapter: str | None) -> Callable[[], AbstractContextManager[None]]:
    """A context manager; inside it the model, or a part of one, has another adapter, or with None no adapter.

    peft's own switches change requires_grad too, which must stay as the optimiser found it.
    """
    layers = adapted_layers(model)

    @contextmanager
    def switched() -> Iterator[None]:
        before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
        for layer in layers:
            layer._disable_adapters = adapter is None
            layer._active_adapter = [adapter or POLICY]
        try:
            yield
        finally:
            for layer, (off, active) in zip(layers, before, strict=True):
                layer._disable_adapters, layer._active_adapter = off, active

    return switched


def adapted_layers(model: nn.Module) -> list[Any]:
    """peft's wrappers in the model, around linear layers and around whole modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _check_modules(model: PreTrainedModel, config: Any) -> None:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules() if name}
    targets = config.target_modules if not isinstance(config.target_modules, str) else []
    for key, wanted in (
        ("lora_target_modules", targets),
        ("lora_modules_to_save", config.modules_to_save or []),
    ):
        for name in wanted:
            if name.rpartition(".")[2] not in names:
                raise UserError(
                    f"peft.{key}: {type(model).__name__} has no module {name!r}{nearest(name, names)}"
                )


def _check_tied_copies(model: PreTrainedModel, config: Any) -> None:
    """Raise UserError for a trained copy of one of two tied matrices: no config can say that it is untied."""
    outer = (model.get_input_embeddings(), model.get_output_embeddings())
    ends = {name.rpartition(".")[2] for name, m in model.named_modules() if any(m is x for x in outer)}
    both = ends & set(config.modules_to_save or [])
    if both and model.config.tie_word_embeddings:
        raise UserError(
            f"peft.lora_modules_to_save: {', '.join(sorted(both))} of {type(model).__name__} is tied to the "
            "other end of the model; leave it out, or train all weights (without peft, with model.freeze)"
        )


def _heads(model: PreTrainedModel) -> tuple[nn.Module | None, ...]:
    return model.get_output_embeddings(), getattr(model, "score", None)


def _check_all_linear(model: PreTrainedModel) -> None:
    """Raise UserError for an adapter on a head or an embedding: those are used through their weights, which
    under ZeRO-3 an adapter cannot reach."""
    from peft.tuners.lora import LoraLayer

    heads = _heads(model)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            kind = type(module.get_base_layer()).__name__
            if any(module is head for head in heads) or not ("Linear" in kind or kind == "Conv1D"):
                raise UserError(
                    f"peft.lora_target_modules: {name} is {kind}; LoRA is for the linear layers inside the "
                    f"model; name it in peft.lora_modules_to_save, which trains a copy of the whole layer"
                )
