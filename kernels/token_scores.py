"""Scores of completion tokens: the numbers that objectives are functions of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenScores(NamedTuple):
    """The scores of M completion tokens; a score that nobody asked for is None."""

    token_logps: Tensor  # (M,) log p(target)
    ref_token_logps: Tensor | None = None  # (M,) under the reference; a constant
    log_collisions: Tensor | None = None  # (M,) log sum_v p_v^2; a constant
    kl: Tensor | None = None  # (M,) sum_v q_v (log q_v - log p_v), q the reference's distribution

    def detach(self) -> TokenScores:
        """The scores as constants."""
        return TokenScores(*(None if x is None else x.detach() for x in self))  # type: ignore[arg-type]
