"""The config's section `generate`: what is sampled, and who judges it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from madpo.trainer.config.section import Effect, Section, setting
from madpo.trainer.errors import UserError


class EndpointConfig(Section):
    url: str = Field(description="base of an OpenAI-compatible server, as in http://localhost:8000/v1")
    model: str = Field(description="its name on that server")
    api_key_env: str | None = Field(default=None, description="environment variable that holds the key")
    mode: Literal["score", "pairwise"] = Field(
        default="score", description="a number for each completion, or which of two is better, in both orders"
    )
    template: str | None = Field(
        default=None,
        description="question with {prompt} and {completion}, pairwise {prompt}, {first} and {second}",
    )
    parameters: dict[str, Any] = Field(
        default_factory=lambda: {"temperature": 0}, description="more of the request's body"
    )
    timeout: float = Field(default=60.0, gt=0, description="seconds for one reply")
    max_retries: int = Field(default=5, ge=0, description="after a failure that may pass")
    retry_wait: float = Field(default=1.0, gt=0, description="seconds before the first retry, then doubled")
    concurrency: int = Field(default=8, ge=1, description="requests at once, of each rank")

    @model_validator(mode="after")
    def _validate(self) -> Self:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"url: expected http:// or https://, got {self.url!r}")
        needed = ("{prompt}", "{completion}") if self.mode == "score" else ("{prompt}", "{first}", "{second}")
        missing = [name for name in needed if self.template is not None and name not in self.template]
        if missing:
            raise UserError(f"template: a {self.mode} question must hold {', '.join(missing)}")
        return self


class JudgeConfig(Section):
    reward_model: str | None = setting(
        default=None, description="folder of a reward model", effect=Effect.RESULT, names="path"
    )
    function: str | None = setting(
        default=None, description="module:name or path/file.py:name", effect=Effect.RESULT, names="function"
    )
    endpoint: EndpointConfig | None = None

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
        description="folders or hub names; empty: model.model_name_or_path",
        effect=Effect.RESULT,
        names="path",
    )
    num_completions: int = Field(default=2, ge=1, description="per prompt and model")
    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, ge=0, description="0: the likeliest token each time")
    top_p: float = Field(default=1.0, gt=0, le=1, description="1: off")
    top_k: int = Field(default=0, ge=0, description="0: off")
    prompt_tokens: int | None = Field(
        default=None,
        ge=1,
        description="so many of a plain text's tokens are the prompt; null: column prompt",
    )
    limit: int | None = Field(default=None, ge=1, description="prompts of each split")
    batch_size: int = Field(default=64, ge=1, description="prompts at once")
    backend: Literal["auto", "hf", "vllm"] = Field(
        default="hf", description="auto: vllm where it is installed and there is a GPU, else hf"
    )
    partitioned: bool = Field(default=False, description="hf: a model in ZeRO-3 partitions over the ranks")
    judge: JudgeConfig | None = None
    pairs: Literal["none", "best_worst", "bradley_terry"] = Field(
        default="none", description="preference pairs from the scores, written beside them"
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
