"""Judges, which score completions: a reward model, a user's function, or a server.

A judge is called with prompts and the completions of each. It returns a score for every completion, or None
where it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from madpo.trainer import user_function
from madpo.trainer.batches.packing import pack
from madpo.trainer.config.generate import EndpointConfig, JudgeConfig
from madpo.trainer.config.locate import model_folder
from madpo.trainer.config.schema import Config
from madpo.trainer.data.known_tokens import unknown_token
from madpo.trainer.data.lengths import shapes_of
from madpo.trainer.data.tokenise import TokenGroup, tokenise
from madpo.trainer.data.tokenised_cache import rules_of
from madpo.trainer.errors import UserError, nearest
from madpo.trainer.files import hash_of_file
from madpo.trainer.formats.numbers import LARGEST
from madpo.trainer.formats.text_groups import Text, TextGroup
from madpo.trainer.masking import masked
from madpo.trainer.model import lora
from madpo.trainer.model.attention.prefix_sharing import SegmentTable
from madpo.trainer.model.backbone import last_hidden
from madpo.trainer.model.build import build_module
from madpo.trainer.model.foreign_code import NO_CODE, reason_of
from madpo.trainer.model.pretrained import classifier_of, state_of_files
from madpo.trainer.model.reward import RewardModel
from madpo.trainer.model.startup.attention import choose_attention
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.reward import BradleyTerryParams
from madpo.trainer.sampling.judge_server import Endpoint, api_key

Scores = list[list[float | None]]
Judge = Callable[[Sequence[TextGroup], Sequence[Sequence[Text]]], Scores]
"""(prompts as groups without completions, the completions of each) -> their scores."""


def check_judge(judge: JudgeConfig) -> None:
    """Raise UserError for a judge that cannot work; called before anything is sampled."""
    if judge.reward_model is not None:
        _check_reward_model(_folder(judge.reward_model))
    if judge.function is not None:
        _load_function(judge.function)
    if judge.endpoint is not None:
        api_key(judge.endpoint)


def _folder(reward_model: str) -> str:
    return model_folder("generate.judge.reward_model", reward_model)


def _check_reward_model(folder: str) -> None:
    """Raise UserError unless the model's own files say that it is a reward model."""
    adapter = lora.stored_adapter(folder, None)
    if adapter is not None and "score" in (adapter.config.modules_to_save or []):
        return
    try:
        config = AutoConfig.from_pretrained(folder if adapter is None else adapter.base, **NO_CODE)
    except (OSError, ValueError) as error:
        raise UserError(
            f"generate.judge.reward_model: {folder} could not be loaded: {reason_of(error)}"
        ) from error
    if config.architectures and classifier_of(config) is None:
        raise UserError(
            f"generate.judge.reward_model: {folder} is no reward model but a {config.architectures[0]}; "
            "train one with madpo reward"
        )


def open_judge(config: Config, judge: JudgeConfig) -> Judge:
    """Load the judge that the section names. Raises UserError if that fails.

    A score of it that is not finite, or too large for float32, is none.
    """
    return _finite_only(_opened(config, judge))


def _opened(config: Config, judge: JudgeConfig) -> Judge:
    if judge.reward_model is not None:
        return RewardJudge(config, _folder(judge.reward_model))
    if judge.function is not None:
        return _judge_of_texts(FunctionJudge(judge.function))
    assert judge.endpoint is not None
    return _judge_of_texts(Endpoint(judge.endpoint))


def _finite_only(judge: Judge) -> Judge:
    def scores(prompts: Sequence[TextGroup], completions: Sequence[Sequence[Text]]) -> Scores:
        given = judge(prompts, completions)
        return [[x if x is not None and abs(x) <= LARGEST else None for x in own] for own in given]

    return scores


def _judge_of_texts(judge: Callable[[Sequence[Text], Sequence[Sequence[Text]]], Scores]) -> Judge:
    """The judge, given the prompts' text or messages in place of groups."""
    return lambda prompts, completions: judge([group.prompt for group in prompts], completions)


def judge_identity(config: Config, judge: JudgeConfig) -> list[Any]:
    """Everything that the scores are known to depend on; the key of judged batches."""
    without_effect = {"timeout", "max_retries", "retry_wait", "concurrency"}
    assert without_effect <= EndpointConfig.model_fields.keys()
    identity: list[Any] = [masked(judge.model_dump(exclude={"endpoint": without_effect}))]
    if judge.reward_model is not None:
        data, files = config.data, state_of_files(_folder(judge.reward_model))
        identity += [files, data.max_length, data.append_eos, data.chat_template_kwargs, config.train.bf16]
    if judge.function is not None:
        file = user_function.file_of(judge.function, Path())
        identity += [hash_of_file(file) if file else None]
    return identity


class _Judged(NamedTuple):
    """A token group to score, and what it was made of."""

    prompt: int  # number of the prompt
    completions: list[int]  # numbers of its completions
    group: TokenGroup


class RewardJudge:
    """A reward model, whole on every rank. It scores the tokens that training on a completion would use."""

    def __init__(self, config: Config, folder: str) -> None:
        model = config.model.model_copy(
            update={
                "model_name_or_path": folder,
                "model_revision": None,
                "init_config": None,
                "ref_model_name_or_path": None,
                "tokenizer_name_or_path": None,
                "gradient_checkpointing": False,
                "activation_offloading": False,
                "use_liger_kernel": False,
            }
        )
        peft = config.peft and config.peft.of_given_models()
        config = config.model_copy(update={"model": model, "peft": peft, "objective": BradleyTerryParams()})
        self.name, self.tokenizer = folder, load_tokenizer(model)
        self.rules = rules_of(config.data)
        self.budget = config.train.micro_batch_tokens
        module = build_module(config, self.tokenizer)
        assert isinstance(module, RewardModel)
        if module.has_new_layer:
            raise UserError(f"generate.judge.reward_model: {folder} is no reward model; train one first")
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        )
        self.module = module.to(self.device).eval()
        device = torch.device(self.device)
        choose_attention(module.policy, config.model.attention, device, config.data.max_length)

    def __call__(self, prompts: Sequence[TextGroup], completions: Sequence[Sequence[Text]]) -> Scores:
        """Scores; None for what could not be trained on (no token, or a prompt that fills `max_length`)."""
        scores: Scores = [[None] * len(of_prompt) for of_prompt in completions]
        for chunk in self._within_budget(self._groups(prompts, completions)):
            groups = [part.group for part in chunk]
            shared = shapes_of(groups).shares_prompts(self.module.borders)
            batch = pack(groups, prefix_sharing=shared.tolist()).to(self.device)
            batch_scores = iter(self._score(batch))
            for part in chunk:
                for completion in part.completions:
                    scores[part.prompt][completion] = next(batch_scores)
        return scores

    def _groups(
        self, prompts: Sequence[TextGroup], completions: Sequence[Sequence[Text]]
    ) -> Iterator[_Judged]:
        """Token groups: all completions of a prompt in one, or each in its own if they cannot be together."""
        for number, (prompt, of_prompt) in enumerate(zip(prompts, completions, strict=True)):
            together = list(range(len(of_prompt)))
            group = self._tokenised(prompt, of_prompt)
            if not group.problem:
                yield _Judged(number, together, group)
                continue
            for completion in together:
                group = self._tokenised(prompt, [of_prompt[completion]])
                if not group.problem:
                    yield _Judged(number, [completion], group)

    def _tokenised(self, prompt: TextGroup, completions: Sequence[Text]) -> TokenGroup:
        group = tokenise(replace(prompt, completions=list(completions)), self.tokenizer, self.rules)
        largest = max(chain(group.prompt, *group.completions), default=0)
        if largest >= (known := self.module.policy.config.vocab_size):
            problem = unknown_token(largest, self.tokenizer, known)
            raise UserError(f"generate.judge.reward_model: {self.name}: {problem}; use another judge")
        return group

    def _within_budget(self, groups: Iterable[_Judged]) -> Iterator[list[_Judged]]:
        """The groups in chunks of at most `micro_batch_tokens` tokens, or of one group."""
        chunk: list[_Judged] = []
        tokens = 0
        for item in groups:
            size = len(item.group.prompt) + sum(map(len, item.group.completions))
            if chunk and tokens + size > self.budget:
                yield chunk
                chunk, tokens = [], 0
            chunk.append(item)
            tokens += size
        if chunk:
            yield chunk

    @torch.no_grad()
    def _score(self, batch: Any) -> list[float]:
        hidden = last_hidden(self.module.policy, batch, SegmentTable(batch.segments))
        last = hidden.index_select(0, batch.ends).float()  # (S, H)
        return (last @ self.module.head.weight.float().T)[:, 0].tolist()


class FunctionJudge:
    """A user's function `name(prompts, completions)` from a module or a file. Its result is checked."""

    def __init__(self, where: str) -> None:
        self.where, self.function = where, _load_function(where)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Sequence[Text]]) -> Scores:
        returned = self.function(list(prompts), [list(of_prompt) for of_prompt in completions])
        try:
            scores: Scores = [[None if x is None else float(x) for x in of_prompt] for of_prompt in returned]
        except (TypeError, ValueError, OverflowError):
            raise UserError(self._problem(f"something else: {returned!r:.200}")) from None
        if [len(x) for x in scores] != [len(x) for x in completions]:
            raise UserError(self._problem(f"lists of the lengths {[len(x) for x in scores]!r:.200}"))
        return scores

    def _problem(self, returned: str) -> str:
        return (
            f"generate.judge.function: {self.where} must return a list with, for each prompt, a list of one "
            f"number or None per completion, and returned {returned}"
        )


def _what_it_has(error: AttributeError) -> str:
    """The functions in a module that lacks the one that is asked for; else what Python says."""
    if not isinstance(error.obj, ModuleType):
        return str(error)
    defined = [name for name, value in vars(error.obj).items() if callable(value)]
    return f"there is no such function in it{nearest(str(error.name), defined)}"


def _load_function(where: str) -> Callable[..., Any]:
    try:
        function = user_function.load(where)
    except AttributeError as error:
        raise UserError(f"generate.judge.function: {where}: {_what_it_has(error)}") from error
    except (ImportError, FileNotFoundError) as error:
        raise UserError(f"generate.judge.function: {where}: {error}") from error
    if not callable(function):
        raise UserError(f"generate.judge.function: {where} is a {type(function).__name__}, no function")
    return function
