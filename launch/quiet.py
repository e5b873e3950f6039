"""What libraries print that is of no use to whoever runs madpo, switched off in one place."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from madpo.trainer.config.accelerator import choose_accelerator


def quiet_environment() -> None:
    """Set what libraries read from the environment, for this process and those that it starts.

    DeepSpeed says that it found no GPU unless it is told to use the CPU; tokenizers says that its threads
    do not outlive a fork.
    """
    choose_accelerator()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def quiet_libraries() -> None:
    """Do that, and switch off warnings and progress bars in this process.

    torch 2.13 warns at every collective about a renamed argument that DeepSpeed still uses, transformers
    about the older name of a method, bitsandbytes on a CPU of a kernel that it does without. Bars of
    transformers, and in a file those of datasets, would tear the lines of a run apart.
    """
    quiet_environment()
    import datasets
    from transformers.utils.logging import disable_progress_bar

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
