"""The config's section `generate`: which completions are sampled, and who judges them."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from madpo.trainer.config.section import Effect, Section, setting
from madpo.trainer.errors import UserError


class EndpointConfig(Section):
    url: str = Field(
        description="base address of an OpenAI-compatible server, as in http://localhost:8000/v1"
    )
    model: str = Field(description="name of the judge's model on the server")
    api_key_env: str | None = Field(
        default=None,
        description="environment variable that holds the server's key; keys in url or parameters "
        "are masked in what is written",
    )
    mode: Literal["score", "pairwise"] = Field(
        default="score",
        description="score: a number for each completion; pairwise: the better of two, asked in both orders",
    )
    template: str | None = Field(
        default=None,
        description="question to the judge, with {prompt} and {completion}, or if pairwise {prompt}, {first} "
        "and {second}; null: a default question",
    )
    parameters: dict[str, Any] = Field(
        default_factory=lambda: {"temperature": 0}, description="further fields of the request's body"
    )
    timeout: float = Field(default=60.0, gt=0, description="seconds in which a whole reply must be there")
    max_retries: int = Field(
        default=5, ge=0, description="retries of a request after failures that may be temporary"
    )
    retry_wait: float = Field(
        default=1.0, gt=0, description="seconds before the first retry; doubled for each further one"
    )
    concurrency: int = Field(default=8, ge=1, description="requests of each rank at a time")

    @model_validator(mode="after")
    def _validate(self) -> Self:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"url: expected http:// or https://, got {self.url!r}")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):
            raise UserError("api_key_env: names an environment variable, and this is no such name")
        needed = ("{prompt}", "{completion}") if self.mode == "score" else ("{prompt}", "{first}", "{second}")
        missing = [name for name in needed if self.template is not None and name not in self.template]
        if missing:
            raise UserError(f"template: a {self.mode} question must hold {', '.join(missing)}")
        return self


class JudgeConfig(Section):
    reward_model: str | None = setting(
        default=None,
        description="folder of a reward model that scores the completions",
        effect=Effect.RESULT,
        names="path",
    )
    function: str | None = setting(
        default=None,
        description="Python function that scores the completions, as module:name or path/file.py:name",
        effect=Effect.RESULT,
        names="function",
    )
    endpoint: EndpointConfig | None = Field(
        default=None, description="server of a language model that judges the completions"
    )

    @model_validator(mode="after")
    def _validate(self) -> Self:
        if sum(value is not None for value in (self.reward_model, self.function, self.endpoint)) != 1:
            raise UserError("set exactly one of reward_model, function and endpoint")
        if self.function is not None and not all(self.function.rpartition(":")):
            raise UserError(f"function: write module:name or path/file.py:name, got {self.function!r}")
        return self


class GenerateConfig(Section):
    models: list[str] = setting(
        default_factory=list,
        description="models to sample from: folders, runs or hub names; empty: model.model_name_or_path",
        effect=Effect.RESULT,
        names="path",
    )
    num_completions: int = Field(default=2, ge=1, description="completions per prompt and model")
    max_new_tokens: int = Field(default=256, ge=1, description="most tokens of a completion")
    temperature: float = Field(
        default=1.0, ge=0, description="temperature of sampling; 0: always the likeliest token"
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="sample from the likeliest tokens of this total probability; 1: off",
    )
    top_k: int = Field(default=0, ge=0, description="sample from this many of the likeliest tokens; 0: off")
    prompt_tokens: int | None = Field(
        default=None,
        ge=1,
        description="number of a plain text's first tokens that are the prompt; null: read column prompt",
    )
    limit: int | None = Field(default=None, ge=1, description="most prompts of each split; null: all of them")
    batch_size: int = Field(default=64, ge=1, description="prompts that are sampled together")
    backend: Literal["auto", "hf", "vllm"] = Field(
        default="hf",
        description="library that samples; auto: vllm where it is installed and there is a GPU, else hf",
    )
    partitioned: bool = Field(
        default=False, description="partition a model over the ranks (ZeRO-3) to sample; backend hf only"
    )
    judge: JudgeConfig | None = Field(default=None, description="who scores the completions; null: nobody")
    pairs: Literal["none", "best_worst", "bradley_terry"] = Field(
        default="none", description="how preference pairs are made from the scores, and written beside them"
    )

    @model_validator(mode="after")
    def _validate(self) -> Self:
        together = self.num_completions * max(1, len(self.models))
        if self.temperature == 0 and self.num_completions > 1:
            raise UserError("temperature: 0 gives the same completion each time; set num_completions=1")
        if self.partitioned and self.backend != "hf":
            raise UserError(f"partitioned: only the backend hf has it, not {self.backend}")
        if self.pairs != "none" and (self.judge is None or together < 2):
            raise UserError(
                f"pairs: {self.pairs} needs a judge and at least two completions per prompt "
                f"(num_completions x models is {together})"
            )
        endpoint = self.judge.endpoint if self.judge else None
        if endpoint and endpoint.mode == "pairwise" and together < 2:
            raise UserError("judge.endpoint.mode: pairwise needs at least two completions per prompt")
        return self
