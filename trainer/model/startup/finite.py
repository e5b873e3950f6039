"""Weights that are not finite are found before the first step, by name."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from madpo.trainer.dist import gathered
from madpo.trainer.errors import NotFiniteError
from madpo.trainer.zero3.parameters import own_share


@torch.no_grad()
def check_finite(model: PreTrainedModel, what: str) -> None:
    """Raise NotFiniteError on all ranks if a weight of a model holds NaN or infinity; `what` names the model.

    Each rank looks at its own share. A quantised weight is of whole numbers and always finite.
    """
    bad = []
    for name, parameter in model.named_parameters():
        own = own_share(parameter)
        if own.is_floating_point() and own.numel() and not bool(torch.isfinite(own).all()):
            bad.append(name)
    names = sorted({name for part in gathered(bad) for name in part})
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise NotFiniteError(
            f"{what}: its weight {names[0]}{more} holds NaN or infinity; the files are damaged, or of a "
            "training run that diverged"
        )
