"""The config's section `data`: which data sets, how their examples are read, and what becomes of them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from madpo.trainer.config.section import Effect, FolderName, Section, setting
from madpo.trainer.errors import UserError, nearest
from madpo.trainer.formats.adapters import ADAPTERS
from madpo.trainer.formats.read_row import check_template_kwargs


def check_adapter(name: str) -> str:
    """Return the name if there is such an adapter, else raise UserError."""
    if name != "auto" and name not in ADAPTERS:
        raise UserError(f"unknown adapter{nearest(name, ['auto', *ADAPTERS])}")
    return name


class DatasetPart(Section):
    """One data set of a mixture."""

    path: str = setting(
        description="data set: a .jsonl or .parquet file, a folder of <split>.jsonl/.parquet, or a hub name",
        effect=Effect.RESULT,
        names="path",
    )
    name: str | None = Field(default=None, description="configuration of a data set on the hub")
    split: str = Field(default="train", description="training split")
    test_split: str | None = Field(
        default=None, description="held-out split; null: nothing is held out of this part"
    )
    fraction: float = Field(
        default=1.0,
        gt=0,
        description="share of the training groups that is used; 2.5: all twice, and half once more",
    )
    adapter: str | None = Field(
        default=None, description="adapter that reads this part's examples; null: data.adapter"
    )
    columns: dict[str, str] | None = Field(
        default=None, description="names of columns, ours to this part's; null: data.columns"
    )

    @field_validator("adapter")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return value if value is None else check_adapter(value)


class DataConfig(Section):
    dataset_name: str | None = setting(
        default=None,
        description="data set: a .jsonl or .parquet file, a folder of <split>.jsonl/.parquet, or a hub name",
        effect=Effect.RESULT,
        names="path",
    )
    datasets: list[DatasetPart] | None = setting(
        default=None,
        min_length=1,
        description="mixture of several data sets, instead of dataset_name",
        effect=Effect.RESULT,
    )
    dataset_config: str | None = Field(default=None, description="configuration of a data set on the hub")
    dataset_train_split: str = Field(default="train", description="training split")
    dataset_test_split: str | None = setting(
        default="auto",
        description="held-out split; auto: test or validation if the data set has one; null: no evaluation",
        effect=Effect.RESULT,
    )
    adapter: str = Field(
        default="auto",
        description="adapter that reads the examples, see docs/data.md; auto: chosen by the columns",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="our names of columns to the data set's, where they differ, as in {prompt: question}",
    )
    ignore_columns: list[str] = Field(
        default_factory=list,
        description="columns, by our names, that are left out on purpose, such as system or images",
    )
    edges: Literal["all", "adjacent", "best_worst"] = Field(
        default="all",
        description="pairs that are made of a ranked group: all, of adjacent ranks, or best and worst",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="variables for the chat template; an example's own override them"
    )
    template_may_drop: list[str] = Field(
        default_factory=list,
        description="what the chat template may leave out of messages that are not trained on: roles and "
        "keys of messages, tools, or of tools their description or parameters",
    )
    template_date: str = Field(
        default="2026-01-01",
        description="date that the chat template gets in place of the present one, so that the tokens are "
        "the same on every day",
    )
    train_on: Literal["assistant", "all"] = Field(
        default="assistant",
        description="what is trained on of a completion of several messages: the assistant's, or all of it",
    )
    streaming: bool = Field(
        default=False, description="read training examples in blocks while training, not all at the start"
    )
    stream_block: int = Field(
        default=10_000, ge=1, description="examples of a stream that are read and shuffled at a time"
    )
    max_length: int = Field(
        default=1024,
        ge=2,
        description="most tokens of a prompt with one completion; longer completions are cut",
    )
    append_eos: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="end token after a completion; auto: for plain text, not for conversations, whose "
        "template ends them",
    )
    text_holds_special_tokens: bool = Field(
        default=False,
        description="take special tokens that plain text spells out as tokens: for text in which a chat "
        "template was rendered before; no second BOS or end is added",
    )
    merge_prompts: bool = Field(
        default=False, description="merge examples with equal prompts into one group; not for a stream"
    )
    order: Literal["shuffled", "easy_to_hard", "as_is"] = Field(
        default="shuffled",
        description="order of the data in every epoch; easy_to_hard: largest margins first; as_is: unchanged",
    )
    min_weight: float | None = Field(
        default=None,
        gt=0,
        description="leave out pairs or completions of a smaller weight (by their margin, times the column "
        "weight); null: none",
    )
    sampling: Literal["uniform", "weight"] = Field(
        default="uniform",
        description="uniform: every group once an epoch; weight: groups are drawn in proportion to the "
        "weights of their pairs or completions, and their losses are not weighted",
    )
    folds: int | None = Field(
        default=None, ge=2, description="number of parts that the training split is cut into, by prompt"
    )
    fold: int | None = Field(
        default=None, ge=0, description="index, from 0, of the part that is left out of training"
    )
    on_bad_row: Literal["error", "drop"] = setting(
        default="error",
        description="example that cannot be read: error ends the run, drop leaves it out and counts it",
        effect=Effect.RESULT,
    )
    dataset_num_proc: int | None = setting(
        default=None,
        ge=1,
        description="processes that tokenise; null: one, the main process",
        effect=Effect.MEANS,
    )
    cache_dir: FolderName = setting(
        default="~/.cache/madpo", description="folder of the tokenised data", effect=Effect.MEANS
    )

    @field_validator("adapter")
    @classmethod
    def _known(cls, value: str) -> str:
        return check_adapter(value)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _for_the_template(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_template_kwargs(value)

    @field_validator("template_date")
    @classmethod
    def _a_date(cls, value: str) -> str:
        try:
            datetime.fromisoformat(value)
        except ValueError:
            raise UserError(f"expected a date, as 2026-01-31, got {value!r:.80}") from None
        return value

    @model_validator(mode="after")
    def _a_fold_of_folds(self) -> Self:
        if (self.folds is None) != (self.fold is None):
            raise UserError("set folds and fold together; the fold is left out of training")
        if self.folds is not None and self.fold is not None and self.fold >= self.folds:
            raise UserError(f"fold {self.fold} is none of 0 to {self.folds - 1}, which folds allows")
        return self

    @property
    def names(self) -> list[str]:
        """Paths of the data set, or of all parts of a mixture."""
        return [str(self.dataset_name)] if self.datasets is None else [part.path for part in self.datasets]

    @property
    def may_hold_out(self) -> bool:
        """Whether something may be held out; what `auto` finds shows when the data is opened."""
        if self.datasets is None:
            return self.dataset_test_split is not None
        return any(part.test_split is not None for part in self.datasets)

    def alone(self, part: DatasetPart) -> DataConfig:
        """A copy of the section with one part of the mixture as its only data set."""
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
