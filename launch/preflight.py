"""What can be refused before ranks start: they take seconds to start, and on a cluster a place in the queue.

The stages check all this again, because other launchers start ranks without this command. What only some
configs ask for is imported only for those.
"""

from __future__ import annotations

from pathlib import Path

from madpo.launch.local import Task
from madpo.trainer.config.accelerator import choose_accelerator
from madpo.trainer.config.annotation import check_annotation
from madpo.trainer.config.deepspeed import check_machine
from madpo.trainer.config.locate import check_models, located, model_folder
from madpo.trainer.config.schema import Config
from madpo.trainer.config.train import NOTHING_TO_EVALUATE
from madpo.trainer.errors import UserError
from madpo.trainer.run_folder import check_trained

TRAINING = ("train", "sft", "reward")
"""Tasks that train."""


def check(config: Config, task: Task, base: bool = False, elsewhere: bool = False) -> None:
    """Raise UserError for a config that the task could not begin with on this machine.

    `base`: the task evaluates the model that training starts from. `elsewhere`: it is to run on other
    machines, which share the files of this one.
    """
    choose_accelerator()
    if task == "export" or (task == "evaluate" and not base):
        check_trained(Path(config.output_dir), task)
    if task == "annotate":
        check_annotation(config)
        for name in config.annotate.models or ():
            model_folder("annotate.models", name)
    else:  # the config's own model need not be there to annotate with others
        located(config)
        check_models(config)
    if not elsewhere:
        check_machine(config.deepspeed)
        _check_kernels(config)
    if task == "generate":
        _check_generate(config)
    if task in TRAINING or task == "evaluate":
        _check_files(config, task)


def _check_files(config: Config, task: Task) -> None:
    """Raise UserError for splits that are not there, or in files that cannot be read."""
    from madpo.trainer.data.mixture import has_held_out, parts_of
    from madpo.trainer.data.split_files import split_files

    has_test = has_held_out(config.data)
    if task != "evaluate" and config.train.eval_steps is not None and not has_test:
        raise UserError(NOTHING_TO_EVALUATE)
    parts = parts_of(config.data, held_out=False) if task != "evaluate" else []
    parts += parts_of(config.data, held_out=True) if has_test or task == "evaluate" else []
    for part in parts:
        split_files(part.data, part.split)


def _check_kernels(config: Config) -> None:
    if config.model.attention not in ("auto", "sdpa"):
        from madpo.trainer.model.attention.choice import check_available

        check_available(config.model.attention)
    if config.train.head_impl == "triton":
        from madpo.trainer.head import check_impl

        check_impl(config.train.head_impl)
    if config.model.use_liger_kernel:
        from madpo.trainer.model.liger import check_liger

        check_liger()


def _check_generate(config: Config) -> None:
    settings = config.generate
    for name in settings.models if settings else ():
        model_folder("generate.models", name)
    judge = settings.judge if settings else None
    if judge is not None:
        from madpo.trainer.sampling.judges import check_judge

        check_judge(judge)
