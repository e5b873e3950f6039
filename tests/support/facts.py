"""What a second opinion on an objective is formed from: a batch in numpy and float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Facts:
    """A batch: M tokens of S completions one after another, and E pairs of them."""

    tokens: Array  # (M,) log pi of every token
    ref_tokens: Array  # (M,) the same under the reference
    lengths: Array  # (S,)
    chosen: Array  # (E,) index into S
    rejected: Array  # (E,)
    margins: Array  # (E,)
    labels: Array  # (S,) 1, -1 or 0
    collisions: Array  # (M,) log sum_v p_v^2
    kl: Array  # (M,) KL(pi_ref || pi)
    memory: dict[str, list[float]] = field(default_factory=dict)
    seed: tuple[int, int] = (0, 0)
    constant: Facts | None = None  # where x.sg is to stay while tokens and kl move

    @property
    def sg(self) -> Facts:
        return self.constant or self

    def total(self, values: Array) -> Array:  # (M,) -> (S,)
        ends = np.cumsum(self.lengths)
        before = np.concatenate(([0.0], np.cumsum(values)))
        return before[ends] - before[ends - self.lengths]

    @cached_property
    def l(self) -> Array:  # noqa: E743
        return self.total(self.tokens)

    @cached_property
    def ratio(self) -> Array:
        return self.l - self.total(self.ref_tokens)

    @cached_property
    def n(self) -> Array:
        return np.maximum(self.lengths, 1)

    @property
    def a(self) -> Array:
        return self.ratio[self.chosen]

    @property
    def b(self) -> Array:
        return self.ratio[self.rejected]

    @property
    def gap(self) -> Array:
        """D = a - b"""
        return self.a - self.b

    @property
    def l_w(self) -> Array:
        return self.l[self.chosen]

    @property
    def l_l(self) -> Array:
        return self.l[self.rejected]

    @property
    def n_w(self) -> Array:
        return self.n[self.chosen]

    @property
    def n_l(self) -> Array:
        return self.n[self.rejected]

    @property
    def u_w(self) -> Array:
        return self.l_w / self.n_w

    @property
    def u_l(self) -> Array:
        return self.l_l / self.n_l


def nls(z: Array) -> Array:
    """-log sigmoid(z)"""
    return np.logaddexp(0.0, -z)


def sigmoid(z: Array) -> Array:
    return np.exp(-nls(z))
