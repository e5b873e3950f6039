"""Sampling: token ids of completions, from transformers or from vLLM.

With `top_p: 1` and `top_k: 0` a token is drawn from softmax(logits / temperature) and nothing else: of the
generation settings that a model's folder brings only the tokens that end a completion are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from madpo.trainer import dist
from madpo.trainer.config.generate import GenerateConfig
from madpo.trainer.config.schema import Config
from madpo.trainer.engine import Engine, deepspeed_config
from madpo.trainer.errors import UserError
from madpo.trainer.model.build import load_sampler
from madpo.trainer.zero3.loading import partitioned_loading

Ids = list[int]


class Sampler(Protocol):
    """(prompts, seed) -> for each prompt its completions, up to and with the token that ends one."""

    ends: frozenset[int]

    def __call__(self, prompts: list[Ids], seed: int) -> list[list[Ids]]: ...

    def close(self) -> None:
        """Give the device's memory back."""
        ...


@dataclass(frozen=True)
class Completion:
    text: str
    finish: Literal["stop", "length"]
    tokens: int  # as sampled, the one that ends it included


def completion_of(
    prompt: Ids, ids: Ids, ends: frozenset[int], tokenizer: PreTrainedTokenizerBase
) -> Completion:
    """The text that follows the prompt's, without special tokens.

    It is read off behind the prompt, because some tokenizers drop the space before a text's first word. Of
    a character that was cut off nothing is kept.
    """
    stopped = ids[-1] in ends
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = tokenizer.decode(prompt, **options), tokenizer.decode(prompt + ids, **options)
    assert isinstance(before, str) and isinstance(whole, str)
    text = whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode(ids, **options))
    return Completion(text if stopped else text.rstrip("�"), "stop" if stopped else "length", len(ids))


def backend_of(settings: GenerateConfig) -> Literal["hf", "vllm"]:
    """The back-end that runs. Raises UserError for one that is not installed."""
    installed = find_spec("vllm") is not None
    if settings.backend == "auto":
        return "vllm" if installed and torch.cuda.is_available() and not settings.partitioned else "hf"
    if settings.backend == "vllm" and not installed:
        raise UserError("generate.backend: vllm is not installed; pip install vllm, or set backend=hf")
    return settings.backend


def open_sampler(
    config: Config, name: str, revision: str | None, tokenizer: PreTrainedTokenizerBase
) -> Sampler:
    """The model `name`, ready to sample as the section `generate` says. Raises UserError."""
    settings = config.generate or GenerateConfig()
    if backend_of(settings) == "vllm":
        return _VLLM(config, settings, name, revision, tokenizer)
    if not settings.partitioned:
        model: Any = load_sampler(config, name, revision)
        model.to(dist.device())
        return _Transformers(settings, model, tokenizer)
    with partitioned_loading(deepspeed_config(config, training=False)):
        model = load_sampler(config, name, revision)
    engine = Engine(config, model, training=False)
    engine.eval()
    return _Transformers(settings, engine.module, tokenizer, engine.release)


def ends_of(eos_token_id: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a completion: those that the model's folder names, and the tokenizer's EOS."""
    named = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    return frozenset(token for token in (*named, tokenizer.eos_token_id) if isinstance(token, int))


class _Transformers:
    """`generate` of transformers: prompts padded on the left, all completions of a batch at once."""

    def __init__(
        self,
        settings: GenerateConfig,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        destroy: Callable[[], None] | None = None,
    ) -> None:
        if len(tokenizer) > model.config.vocab_size:
            raise UserError(
                f"{model.config.name_or_path}: the tokenizer has {len(tokenizer)} tokens and the model only "
                f"{model.config.vocab_size}; they do not belong together"
            )
        self.model, self.partitioned, self.destroy = model, settings.partitioned, destroy
        self.ends = ends_of(model.generation_config.eos_token_id, tokenizer)
        self.pad = next((x for x in (tokenizer.pad_token_id, *sorted(self.ends)) if x is not None), 0)
        self.most = getattr(model.config, "max_position_embeddings", None)
        self.new = settings.max_new_tokens
        # What a call leaves open is filled in from the model's own settings: there must be none.
        model.generation_config = GenerationConfig()
        greedy = settings.temperature == 0
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        self.options = GenerationConfig(
            do_sample=not greedy,
            num_return_sequences=settings.num_completions,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=self.pad,
            **({} if greedy else sampling),
        )

    @torch.no_grad()
    def __call__(self, prompts: list[Ids], seed: int) -> list[list[Ids]]:
        longest = max(map(len, prompts))
        if self.most is not None and longest + self.new > self.most:
            raise UserError(
                f"a prompt of {longest} tokens and generate.max_new_tokens {self.new} are more than the "
                f"{self.most} positions of {self.model.config.name_or_path}; set data.max_length to at most "
                f"{self.most - self.new + 1} to leave out such prompts, or fewer new tokens"
            )
        ids = torch.tensor([[self.pad] * (longest - len(x)) + x for x in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in prompts], device=ids.device)
        torch.manual_seed(seed)
        out: Any = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=self.options,
            synced_gpus=self.partitioned,  # ranks go on together until the last one is done
        )
        rows = [self._up_to_its_end(row) for row in out[:, longest:].tolist()]
        each = self.options.num_return_sequences
        return [rows[i : i + each] for i in range(0, len(rows), each)]

    def _up_to_its_end(self, row: Ids) -> Ids:
        end = next((i for i, token in enumerate(row) if token in self.ends), len(row) - 1)
        return row[: end + 1]

    def close(self) -> None:
        if self.destroy is not None:
            self.destroy()
        del self.model
        torch.cuda.empty_cache()


class _VLLM:
    """vLLM's offline engine, one per rank and GPU."""

    def __init__(
        self,
        config: Config,
        settings: GenerateConfig,
        name: str,
        revision: str | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        import vllm  # pyright: ignore[reportMissingImports]

        try:
            named: Any = GenerationConfig.from_pretrained(name, revision=revision or "main")
        except OSError:  # a folder without generation_config.json
            named = AutoConfig.from_pretrained(name, revision=revision)
        self.ends = ends_of(named.eos_token_id, tokenizer)
        self.engine: Any = vllm.LLM(
            model=name,
            revision=revision,
            tokenizer=config.model.tokenizer_name_or_path,
            dtype="bfloat16" if config.train.bf16 else "float32",
            generation_config="vllm",  # none of the model's own
            distributed_executor_backend="external_launcher",
            seed=config.seed,
        )
        self.params = partial(
            vllm.SamplingParams,
            n=settings.num_completions,
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k or -1,
            stop_token_ids=sorted(self.ends),
            detokenize=False,
        )

    def __call__(self, prompts: list[Ids], seed: int) -> list[list[Ids]]:
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        params = [self.params(seed=(seed + place) % 2**32) for place in range(len(prompts))]
        replies = self.engine.generate(requests, params, use_tqdm=False)
        return [[list(output.token_ids) for output in reply.outputs] for reply in replies]

    def close(self) -> None:
        del self.engine
        torch.cuda.empty_cache()
