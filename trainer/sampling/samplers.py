"""Samplers: completions as token ids, from transformers or from vLLM.

With `top_p: 1` and `top_k: 0` a token is drawn from softmax(logits / temperature) and nothing else. Of the
generation settings in a model's folder, only the tokens that end a completion are used.
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
from madpo.trainer.model.foreign_code import NO_CODE
from madpo.trainer.packages import install
from madpo.trainer.zero3.loading import partitioned_loading

Ids = list[int]


class Sampler(Protocol):
    """(prompts, seed) -> the completions of each prompt, each up to and with the token that ends it."""

    ends: frozenset[int]  # tokens that end a completion

    def __call__(self, prompts: list[Ids], seed: int) -> list[list[Ids]]: ...

    def close(self) -> None:
        """Free the device's memory."""
        ...


@dataclass(frozen=True)
class Completion:
    text: str
    finish: Literal["stop", "length"]
    tokens: int  # as sampled, with the one that ends it


def completion_of(
    prompt: Ids, ids: Ids, ends: frozenset[int], tokenizer: PreTrainedTokenizerBase
) -> Completion:
    """Decode a completion, without special tokens.

    Prompt and completion are decoded together, because some tokenizers drop the space before a text's first
    word. A last character that was cut off is dropped.
    """
    stopped = ids[-1] in ends
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = tokenizer.decode(prompt, **options), tokenizer.decode(prompt + ids, **options)
    assert isinstance(before, str) and isinstance(whole, str)
    text = whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode(ids, **options))
    return Completion(text if stopped else text.rstrip("�"), "stop" if stopped else "length", len(ids))


def backend_of(settings: GenerateConfig) -> Literal["hf", "vllm"]:
    """The back-end to use. Raises UserError for one that is not installed."""
    installed = find_spec("vllm") is not None
    if settings.backend == "auto":
        return "vllm" if installed and torch.cuda.is_available() and not settings.partitioned else "hf"
    if settings.backend == "vllm" and not installed:
        raise UserError(f"generate.backend: vllm is not installed; {install('vllm')}, or set backend=hf")
    return settings.backend


def open_sampler(
    config: Config, name: str, revision: str | None, tokenizer: PreTrainedTokenizerBase
) -> Sampler:
    """Load the model `name` for sampling as the section `generate` says. Raises UserError."""
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
    """The tokens that end a completion: those of the model's generation settings, and the tokenizer's EOS."""
    named = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    return frozenset(token for token in (*named, tokenizer.eos_token_id) if isinstance(token, int))


class _Transformers:
    """Samples with transformers' `generate`: prompts padded on the left, all completions at once."""

    def __init__(
        self,
        settings: GenerateConfig,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        destroy: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.partitioned, self.destroy = model, settings.partitioned, destroy
        self.ends = ends_of(model.generation_config.eos_token_id, tokenizer)
        pads = (tokenizer.pad_token_id, *sorted(self.ends))
        self.pad = next((x for x in pads if x is not None and x < model.config.vocab_size), 0)
        self.max_positions = getattr(model.config, "max_position_embeddings", None)
        self.max_new_tokens = settings.max_new_tokens
        # `generate` fills unset options in from the model's own settings, so there must be none.
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
        most, new = self.max_positions, self.max_new_tokens
        if most is not None and longest + new > most:
            room = most - new
            raise UserError(
                f"a prompt of {longest} tokens and generate.max_new_tokens {new} are more than the "
                f"{most} positions of {self.model.config.name_or_path}; lower generate.max_new_tokens"
                + (
                    f", or set data.max_length to at most {room + 1} to leave out such prompts"
                    if room > 0
                    else ""
                )
            )
        ids = torch.tensor([[self.pad] * (longest - len(x)) + x for x in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in prompts], device=ids.device)
        torch.manual_seed(seed)
        sampled: Any = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=self.options,
            synced_gpus=self.partitioned,  # ranks run until the last one is done
        )
        completions = [self._up_to_end(ids) for ids in sampled[:, longest:].tolist()]
        per_prompt = self.options.num_return_sequences
        return [completions[i : i + per_prompt] for i in range(0, len(completions), per_prompt)]

    def _up_to_end(self, ids: Ids) -> Ids:
        end = next((i for i, token in enumerate(ids) if token in self.ends), len(ids) - 1)
        return ids[: end + 1]

    def close(self) -> None:
        if self.destroy is not None:
            self.destroy()
        del self.model
        torch.cuda.empty_cache()


class _VLLM:
    """Samples with vLLM's offline engine, one for each rank and GPU."""

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
            named = AutoConfig.from_pretrained(name, revision=revision, **NO_CODE)
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
        params = [self.params(seed=(seed + number) % 2**32) for number in range(len(prompts))]
        replies = self.engine.generate(requests, params, use_tqdm=False)
        return [[list(output.token_ids) for output in reply.outputs] for reply in replies]

    def close(self) -> None:
        del self.engine
        torch.cuda.empty_cache()
