"""An objective of your own: a few lines, registered by a decorator and trained by name.

    python examples/custom_objective.py           # a quarter of a minute on a CPU

The decorator must have run before the first config is read, so the objective stands in the script that
trains, as here, or in a module that it imports. For the command line put the module into a package and
announce it in its pyproject.toml; then `objective.loss_type: softened` works in every YAML:

    [project.entry-points."madpo.objectives"]
    softened = "my_package.my_module"
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from tiny_model import save_model
from torch import Tensor
from train_from_python import config, pairs

import madpo
from madpo.trainer.objectives import EdgeScores, build
from madpo.trainer.objectives.base import Params, objective
from madpo.trainer.objectives.fields import Beta


class SoftenedParams(Params):
    """The keys of the config's section `objective`: names, types, ranges and defaults."""

    loss_type: Literal["softened"] = "softened"
    beta: Beta = 0.1
    power: Annotated[float, Field(gt=0, description="exponent of a pair's doubt; 0 would be DPO")] = 1.0


@objective(SoftenedParams, {"reference"})
def softened(scores: EdgeScores, params: SoftenedParams) -> Tensor:
    """L = -sg(sigmoid(-beta D))^power log sigmoid(beta D): pairs that are learnt already count less.

    `scores.deltas` (E,) is D, how much more the policy prefers chosen than the reference does. One loss per
    pair is returned (E,); the trainer takes the mean over the global batch and all ranks.
    """
    z = params.beta * scores.deltas
    return -F.logsigmoid(z) * F.sigmoid(-z).detach() ** params.power


def main(folder: Path) -> list[float]:
    """Train with it; returns the loss of every logged step."""
    one_pair = EdgeScores(*torch.tensor([[-1.0], [-3.0], [-2.0], [-2.0]]))
    print(f"one pair by hand: {build('softened', beta=0.5, power=2.0)(one_pair).item():.4f}")
    texts = [f"{row['prompt']}{row['chosen']}{row['rejected']}" for row in pairs()]
    start = save_model(folder / "start", texts)
    settings = {"loss_type": "softened", "power": 0.5}
    run = madpo.train(
        config(folder, "softened", start, objective=settings, optim={"lr": 4e-3}), train=pairs()
    )
    losses = [record["loss"] for record in run.history]
    print("loss:", ", ".join(f"{loss:.4f}" for loss in losses))
    return losses


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        main(Path(temporary))
