"""The config's section `data`: which rows, how they are read, and what becomes of them."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from madpo.trainer.config.section import Effect, Section, setting
from madpo.trainer.errors import UserError, nearest
from madpo.trainer.formats.adapters import ADAPTERS
from madpo.trainer.formats.read_row import check_template_kwargs


def check_adapter(name: str) -> str:
    """The same, if there is such an adapter. Raises UserError."""
    if name != "auto" and name not in ADAPTERS:
        raise UserError(f"unknown adapter{nearest(name, ['auto', *ADAPTERS])}")
    return name


class DatasetPart(Section):
    """One data set of a mixture."""

    path: str = setting(description="as data.dataset_name", effect=Effect.RESULT, names="path")
    name: str | None = Field(default=None, description="as data.dataset_config")
    split: str = "train"
    test_split: str | None = Field(default=None, description="held-out split; null: none of this part")
    fraction: float = Field(
        default=1.0,
        gt=0,
        description="of the training groups; 2.5: all twice, half once more",
    )
    adapter: str | None = Field(default=None, description="null: data.adapter")
    columns: dict[str, str] | None = Field(default=None, description="null: data.columns")

    @field_validator("adapter")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return value if value is None else check_adapter(value)


class DataConfig(Section):
    dataset_name: str | None = setting(
        default=None,
        description="a .jsonl or .parquet file, a folder of <split>.jsonl/.parquet, or a hub name",
        effect=Effect.RESULT,
        names="path",
    )
    datasets: list[DatasetPart] | None = setting(
        default=None, min_length=1, description="a mixture, in place of dataset_name", effect=Effect.RESULT
    )
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = setting(
        default=None, description="held-out split; null: no evaluation", effect=Effect.RESULT
    )
    adapter: str = Field(default="auto", description="how rows are read, see docs/data.md; auto: by columns")
    columns: dict[str, str] = Field(default_factory=dict, description="our name of a column: the data set's")
    edges: Literal["all", "adjacent", "best_worst"] = Field(
        default="all", description="which completions of a ranked group are compared"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="variables for the chat template; a row's own come before these"
    )
    streaming: bool = Field(default=False, description="read training rows in blocks, as they are needed")
    stream_block: int = Field(default=10_000, ge=1, description="rows that are read and shuffled at a time")
    max_length: int = Field(default=1024, ge=2, description="tokens of prompt + one completion")
    append_eos: Literal["auto", "always", "never"] = Field(
        default="auto", description="auto: plain text yes, conversations no (their template ends them)"
    )
    merge_prompts: bool = Field(
        default=False, description="rows of one prompt are one group of the batch; not of a stream"
    )
    order: Literal["shuffled", "easy_to_hard", "as_is"] = Field(
        default="shuffled", description="of every epoch; easy_to_hard: by falling margin"
    )
    min_weight: float | None = Field(
        default=None, gt=0, description="pairs that the objective weights less are left out of training"
    )
    sampling: Literal["uniform", "weight"] = Field(
        default="uniform", description="weight: groups are drawn by the weight of their pairs, not weighted"
    )
    folds: int | None = Field(default=None, ge=2, description="parts of the training split, by prompt")
    fold: int | None = Field(default=None, ge=0, description="the part, from 0, that is left out of training")
    on_bad_row: Literal["error", "drop"] = setting(
        default="error", description="a row that cannot be read", effect=Effect.RESULT
    )
    dataset_num_proc: int | None = setting(
        default=None, ge=1, description="processes that tokenise", effect=Effect.MEANS
    )
    cache_dir: str = setting(
        default="~/.cache/madpo", description="where tokenised data is kept", effect=Effect.MEANS
    )

    @field_validator("adapter")
    @classmethod
    def _known(cls, value: str) -> str:
        return check_adapter(value)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _for_the_template(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_template_kwargs(value)

    @model_validator(mode="after")
    def _a_fold_of_folds(self) -> Self:
        if (self.folds is None) != (self.fold is None):
            raise UserError("set folds and fold together; the fold is left out of training")
        if self.folds is not None and self.fold is not None and self.fold >= self.folds:
            raise UserError(f"fold {self.fold} is none of 0 to {self.folds - 1}, which folds allows")
        return self

    @property
    def names(self) -> list[str]:
        """Of the one data set, or of all parts of a mixture."""
        return [str(self.dataset_name)] if self.datasets is None else [part.path for part in self.datasets]

    @property
    def has_test_split(self) -> bool:
        parts = self.datasets or []
        return self.dataset_test_split is not None or any(part.test_split is not None for part in parts)

    def alone(self, part: DatasetPart) -> DataConfig:
        """The section as it would be with one part of the mixture as its only data set."""
        own = {"adapter": part.adapter, "columns": part.columns}
        return self.model_copy(
            update={
                **{key: value for key, value in own.items() if value is not None},
                "datasets": None,
                "dataset_name": part.path,
                "dataset_config": part.name,
                "dataset_train_split": part.split,
                "dataset_test_split": part.test_split,
            }
        )
