"""The transform of logits between the output weight and the softmax: scale, soft-cap, temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """z = softcap * tanh(scale * x / softcap) / temperature, where x = h W^T + bias."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("scale", "softcap", "temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {value} is not allowed; it must be above 0")

    def __call__(self, x: Tensor) -> Tensor:
        """x (m, C) -> z (m, C)"""
        if self.scale != 1.0:
            x = x * self.scale
        if self.softcap is not None:
            x = self.softcap * torch.tanh(x / self.softcap)
        return x if self.temperature == 1.0 else x / self.temperature

    def derivative(self, z: Tensor) -> Tensor | float:
        """dz / dx as a function of z: (m, C), or a number where it is constant."""
        constant = self.scale / self.temperature
        if self.softcap is None:
            return constant
        return constant * (1 - (z * (self.temperature / self.softcap)).square())


IDENTITY = LogitTransform()
