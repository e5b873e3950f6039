"""The config's section `peft`: a LoRA adapter in place of all weights."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from madpo.trainer.config.section import Section, setting
from madpo.trainer.errors import UserError


class PeftConfig(Section):
    """A LoRA adapter in place of all weights. Null is the value in brackets, or what a stored adapter has."""

    lora_r: int | None = Field(default=None, ge=1, description="rank (16)")
    lora_alpha: int | None = Field(default=None, ge=1, description="scale: alpha / r, see use_rslora (32)")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="only 0")
    lora_target_modules: Literal["all-linear"] | list[str] | None = Field(
        default=None, description="names of linear layers (all-linear: all but the head)"
    )
    lora_modules_to_save: list[str] | None = Field(
        default=None, description="layers trained whole, in a copy, as in [embed_tokens, lm_head]"
    )
    use_rslora: bool | None = Field(default=None, description="scale: alpha / sqrt(r) (false)")
    use_dora: bool | None = Field(default=None, description="directions and magnitudes apart (false)")
    base_model_name_or_path: str | None = setting(
        default=None, description="of a stored adapter; null: the one that it names", names="path"
    )
    load_in_4bit: bool = Field(default=False, description="QLoRA: the base in 4 bits; needs madpo[qlora]")
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    use_bnb_nested_quant: bool = Field(default=False, description="quantise the quantisation constants too")

    @property
    def quantised(self) -> bool:
        return self.load_in_4bit or self.load_in_8bit

    def of_given_models(self) -> PeftConfig | None:
        """What of the section holds for models that are only scored with: how their bases are quantised."""
        keys = {"load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"}
        return PeftConfig(**self.model_dump(include=keys)) if self.quantised else None

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
