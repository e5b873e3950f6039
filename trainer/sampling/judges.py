"""Scores for completions: by a reward model, a function of the user's, or a server.

A judge is called with prompts and, for each, its completions, and returns scores in the same shape; None
where it has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from madpo.trainer import user_function
from madpo.trainer.batches.packing import pack
from madpo.trainer.config.generate import JudgeConfig
from madpo.trainer.config.schema import Config
from madpo.trainer.data.tokenise import TokenGroup, tokenise
from madpo.trainer.data.tokenised_cache import rules_of
from madpo.trainer.errors import UserError
from madpo.trainer.files import hash_of_file
from madpo.trainer.formats.text_groups import Text, TextGroup
from madpo.trainer.model.attention.prefix_sharing import SegmentTable
from madpo.trainer.model.backbone import last_hidden
from madpo.trainer.model.build import build_module
from madpo.trainer.model.pretrained import folder_of, state_of_files
from madpo.trainer.model.reward import RewardModel
from madpo.trainer.model.startup.attention import choose_attention
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.reward import BradleyTerryParams
from madpo.trainer.sampling.judge_server import Endpoint, api_key

Scores = list[list[float | None]]
Judge = Callable[[Sequence[TextGroup], Sequence[Sequence[Text]]], Scores]
"""The prompts, as groups without completions, and their completions -> a score of each."""


def check_judge(judge: JudgeConfig) -> None:
    """Raise UserError for a judge that cannot work, before anything is sampled for it."""
    if judge.function is not None:
        _load_function(judge.function)
    if judge.endpoint is not None:
        api_key(judge.endpoint)


def open_judge(config: Config, judge: JudgeConfig) -> Judge:
    """The judge that the section names. Raises UserError for one that cannot be loaded."""
    if judge.reward_model is not None:
        return RewardJudge(config, folder_of(judge.reward_model))
    if judge.function is not None:
        return _of_texts(FunctionJudge(judge.function))
    assert judge.endpoint is not None
    return _of_texts(Endpoint(judge.endpoint))


def _of_texts(judge: Callable[[Sequence[Text], Sequence[Sequence[Text]]], Scores]) -> Judge:
    """A judge that sees a prompt as it stands in the data."""
    return lambda prompts, completions: judge([group.prompt for group in prompts], completions)


def judge_identity(config: Config, judge: JudgeConfig) -> list[Any]:
    """Everything that its scores depend on, as far as it can be seen from here."""
    patience = {"timeout", "max_retries", "retry_wait", "concurrency"}
    identity: list[Any] = [judge.model_dump(exclude={"endpoint": patience})]
    if judge.reward_model is not None:
        data, files = config.data, state_of_files(folder_of(judge.reward_model))
        identity += [files, data.max_length, data.append_eos, data.chat_template_kwargs, config.train.bf16]
    if judge.function is not None:
        file = user_function.file_of(judge.function, Path())
        identity += [hash_of_file(file) if file else None]
    return identity


class RewardJudge:
    """A reward model, whole on every rank; it sees the tokens that training on the completion would see."""

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
        self.tokenizer = load_tokenizer(model)
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
        choose_attention(module.policy, config.model.attention, torch.device(self.device))

    def __call__(self, prompts: Sequence[TextGroup], completions: Sequence[Sequence[Text]]) -> Scores:
        """None for what cannot be trained on either: no token, or a prompt that fills `max_length`."""
        scores: Scores = [[None] * len(of_prompt) for of_prompt in completions]
        for chunk in self._within_budget(list(self._groups(prompts, completions))):
            batch = pack([group for _, _, group in chunk]).to(self.device)
            found = iter(self._score(batch))
            for row, places, _ in chunk:
                for place in places:
                    scores[row][place] = next(found)
        return scores

    def _groups(self, prompts: Sequence[TextGroup], completions: Sequence[Sequence[Text]]) -> Any:
        """(prompt's number, completions' numbers, their tokens), all completions of a prompt together where
        they can be."""
        for row, (prompt, of_prompt) in enumerate(zip(prompts, completions, strict=True)):
            together = list(range(len(of_prompt)))
            for places in (together, *([place] for place in together)):
                texts = [of_prompt[place] for place in places]
                group = tokenise(replace(prompt, completions=texts), self.tokenizer, self.rules)
                if not group.problem:
                    yield row, places, group
                    if places == together:
                        break

    def _within_budget(self, groups: list[tuple[int, list[int], TokenGroup]]) -> Any:
        """The groups in packs of at most `micro_batch_tokens` tokens, or one group."""
        chunk, tokens = [], 0
        for item in groups:
            size = len(item[2].prompt) + sum(map(len, item[2].completions))
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
    """`name(prompts, completions)` from a module or a file; the result is checked."""

    def __init__(self, where: str) -> None:
        self.where, self.function = where, _load_function(where)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Sequence[Text]]) -> Scores:
        out = self.function(list(prompts), [list(of_prompt) for of_prompt in completions])
        try:
            scores: Scores = [[None if x is None else float(x) for x in of_prompt] for of_prompt in out]
        except (TypeError, ValueError):
            raise UserError(self._problem(f"something else: {out!r:.200}")) from None
        if [len(x) for x in scores] != [len(x) for x in completions]:
            raise UserError(self._problem(f"lists of the lengths {[len(x) for x in scores]!r:.200}"))
        if not all(x is None or math.isfinite(x) for of_prompt in scores for x in of_prompt):
            raise UserError(self._problem("a number that is not finite"))
        return scores

    def _problem(self, found: str) -> str:
        return (
            f"generate.judge.function: {self.where} must return a list with, for each prompt, a list of one "
            f"finite number or None per completion, and returned {found}"
        )


def _load_function(where: str) -> Callable[..., Any]:
    try:
        function = user_function.load(where)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise UserError(f"generate.judge.function: {where}: {error}") from error
    if not callable(function):
        raise UserError(f"generate.judge.function: {where} is a {type(function).__name__}, no function")
    return function
