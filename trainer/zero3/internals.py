"""DeepSpeed's private names that the trainer uses, checked when this folder is imported.

A DeepSpeed without one of them would train wrong, or fail in the middle of a step, without saying why.
README.md beside this file says what each is for and which test would fail.
"""

from __future__ import annotations

from importlib.metadata import version

import deepspeed.comm.comm
import deepspeed.ops
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

from madpo.trainer.errors import UserError

NAMES = {
    groups: ("_create_zero_param_parallel_group", "_get_zero_param_intra_parallel_group"),
    partition_parameters: ("zero_wrapper_for_fp_tensor_constructor",),
    PartitionedParameterCoordinator: ("is_invalid_trace", "_clear_trace_structures", "_invalidate_trace"),
    DeepSpeedZeRoOffload: ("get_param_coordinator",),
    DeepSpeedEngine: (
        "set_gradient_accumulation_boundary",
        "get_global_grad_norm",
        "was_step_applied",
        "_get_zero_param_shapes",
        "_copy_recovery_script",
    ),
    DeepSpeedZeroOptimizer_Stage3: (
        "_set_fp32_optimizer_param_groups",
        "_clear_fp32_optimizer_param_groups",
        "_rigid_load_state_dict",
    ),
    DeepSpeedZeroOptimizer: ("_link_all_hp_params", "update_lp_params"),
    deepspeed.ops: ("__compatible_ops__",),
    deepspeed.comm.comm: ("cdb",),
}
"""Module or class -> names that it must have."""


def check() -> None:
    """Raise UserError if this DeepSpeed lacks one of NAMES."""
    missing = [
        f"{where.__name__}.{name}"
        for where, names in NAMES.items()
        for name in names
        if not hasattr(where, name)
    ]
    if missing:
        raise UserError(
            f"deepspeed {version('deepspeed')} has no {', '.join(missing)}, which ZeRO-3 is driven by here; "
            "install a version that pyproject.toml allows"
        )


check()
