"""Build the engine of a run and check the models in it, before the first step."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from madpo.trainer import out_of_memory
from madpo.trainer.batches.steps import check_rows_fit, step_rules
from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import Data
from madpo.trainer.engine import Engine, deepspeed_config
from madpo.trainer.model.build import build_module
from madpo.trainer.model.policy import PolicyWithReference
from madpo.trainer.model.startup.attention import choose_attention
from madpo.trainer.model.startup.checks import check_head, check_noise
from madpo.trainer.model.startup.finite import check_finite
from madpo.trainer.model.startup.interleave import interleave_reference
from madpo.trainer.model.startup.positions import check_max_length, check_positions
from madpo.trainer.model.startup.slices import check_slicing
from madpo.trainer.model.vocabulary import vocabulary_note
from madpo.trainer.scoring_module import ScoringModule
from madpo.trainer.zero3.loading import partitioned_loading


def check_data_fits(data: Data, config: Config, engine: Engine) -> None:
    """Raise UserError if a group does not fit into the token budget, or into the model's positions.

    A model that only was not made for such long sequences gets a note.
    """
    rules = step_rules(config, engine.module)
    if config.data.streaming and data.source is not None:
        check_max_length(engine.module.policy, config.data.max_length)
    for groups in (data.train, data.held_out):
        if groups is not None:
            check_rows_fit(groups, rules)
            note = check_positions(engine.module.policy, groups)
            if note is not None and note not in engine.module.notes:
                engine.module.notes.append(note)


def start_engine(config: Config, tokenizer: PreTrainedTokenizerBase, training: bool) -> Engine:
    """Build the models and the engine around them, and check both.

    The module's `notes` say what was chosen, for the user. Raises UserError for a model that cannot be used.
    """
    with partitioned_loading(deepspeed_config(config, training)):
        module = build_module(config, tokenizer)
    out_of_memory.note("load")
    engine, group = Engine[ScoringModule](config, module, training), module.sequence_group
    out_of_memory.note("start")
    notes, longest = list[str](), config.data.max_length
    for model in (module.policy, module.reference):
        if model is not None:
            check_finite(model, str(config.model.model_name_or_path))
            notes.append(choose_attention(model, config.model.attention, engine.device, longest))
            if not config.bound_objective.is_reward_model:
                check_head(model, engine.device)
            if group is not None:
                check_slicing(model, group, engine.device, longest)
    quantised = config.peft is not None and config.peft.quantised
    if training and not quantised:  # quantised kernels round differently in training, which is no noise
        check_noise(module.policy, engine.device)
    notes += filter(None, [vocabulary_note(module.policy, tokenizer)])
    module.notes = list(dict.fromkeys(notes))
    if isinstance(module, PolicyWithReference):
        interleave_reference(module, engine.device)
    return engine
