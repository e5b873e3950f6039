"""What `madpo annotate` asks of a config beyond the schema, which holds for every task."""

from __future__ import annotations

from madpo.trainer.config.schema import Config
from madpo.trainer.errors import UserError


def check_annotation(config: Config) -> None:
    """Raise UserError for a config that is no reward run's, or whose data cannot be written out."""
    if not config.bound_objective.is_reward_model:
        raise UserError(
            f"objective.loss_type: annotate takes the config of a reward run (bradley_terry), not of "
            f"{config.objective.loss_type}"
        )
    if config.data.datasets is not None:
        raise UserError(
            "data.datasets: annotate takes one data set at a time, and writes it out whole; set "
            "data.datasets=null and data.dataset_name to each of its parts"
        )
    if config.data.streaming:
        raise UserError("data.streaming: annotate writes the whole data set; set data.streaming=false")
