"""The config's section `peft`: train a LoRA adapter instead of all weights."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from madpo.trainer.config.section import Section, setting
from madpo.trainer.errors import UserError


class PeftConfig(Section):
    """A LoRA adapter that is trained instead of all weights.

    Null stands for the value of a stored adapter, or for a new one's default, which descriptions give.
    """

    lora_r: int | None = Field(default=None, ge=1, description="rank of the adapter; null: 16")
    lora_alpha: int | None = Field(
        default=None, ge=1, description="numerator of the adapter's scale, alpha / r; null: 32"
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout of the adapter; must be 0")
    lora_target_modules: Literal["all-linear"] | list[str] | None = Field(
        default=None,
        description="names of the linear layers that are adapted; null or all-linear: all except the head",
    )
    lora_modules_to_save: list[str] | None = Field(
        default=None, description="layers trained as whole copies, as in [embed_tokens, lm_head]; null: none"
    )
    use_rslora: bool | None = Field(
        default=None, description="scale the adapter by alpha / sqrt(r) instead of alpha / r; null: false"
    )
    use_dora: bool | None = Field(
        default=None, description="DoRA: train directions and magnitudes of weights apart; null: false"
    )
    base_model_name_or_path: str | None = setting(
        default=None,
        description="base model of a stored adapter; null: the one that the adapter names",
        names="path",
    )
    load_in_4bit: bool = Field(
        default=False, description="QLoRA: the base model in 4 bits; needs madpo[qlora]"
    )
    load_in_8bit: bool = Field(default=False, description="the base model in 8 bits; needs madpo[qlora]")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        default="nf4", description="number format of a base model in 4 bits"
    )
    use_bnb_nested_quant: bool = Field(
        default=False, description="quantise the quantisation constants of a base model in 4 bits too"
    )

    @property
    def quantised(self) -> bool:
        return self.load_in_4bit or self.load_in_8bit

    def of_given_models(self) -> PeftConfig | None:
        """The quantisation keys alone, which also hold for models that only score; None if not quantised."""
        return PeftConfig(**self.quantisation()) if self.quantised else None

    def quantisation(self) -> dict[str, Any]:
        """The keys that say how the base model is quantised, with their values."""
        return self.only("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lora_dropout:
            raise UserError(
                f"lora_dropout: {self.lora_dropout} would be noise in the margin between policy and "
                "reference; only 0 is allowed. To regularise, lower lora_r or set optim.weight_decay"
            )
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("load_in_4bit, load_in_8bit: set one of them")
        return self
