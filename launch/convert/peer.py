"""What a trainer to convert from is: its names, its tasks, its defaults and its rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from madpo.launch.convert.draft import Draft, Rule
from madpo.trainer.config.foreign_keys import REPLACED, our_key
from madpo.trainer.config.schema import Config
