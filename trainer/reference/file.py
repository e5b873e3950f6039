"""A reference's log-probs on disk: one safetensors file, named by a hash of its cache key.

The header holds the key in plain JSON, so that a file that does not fit can say why, and a hash of the
numbers. The file is mapped into memory when read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from madpo.trainer.errors import UserError
from madpo.trainer.files import write_atomically

FORMAT_VERSION = 1
"""A part of every key; raise it when an unchanged key would mean other numbers or another order of them."""

TENSOR = "token_logps"
PREFIX = "reference-"

CacheKey = Mapping[str, Any]
"""Everything that decides the numbers, name -> plain JSON."""


def path_of(folder: Path, key: CacheKey) -> Path:
    """The path of the file with this key, whether it is there or not."""
    return folder / f"{PREFIX}{xxhash.xxh3_128_hexdigest(_plain(key).encode())}.safetensors"


def write(
    path: Path,
    token_logps: np.ndarray,  # (M,) float32
    key: CacheKey,
) -> None:
    """Write the file, whole or not at all. Raises UserError for numbers that are not finite."""
    if not np.isfinite(token_logps).all():
        bad = int((~np.isfinite(token_logps)).sum())
        raise UserError(
            f"the reference gives {bad} of {len(token_logps)} completion tokens no finite log-prob; look "
            "at its weights (model.ref_model_name_or_path), or at train.bf16"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"parts": _plain(key), "content": _hash(token_logps)}
    tensors = {TENSOR: torch.from_numpy(token_logps)}
    write_atomically(path, lambda partial: save_file(tensors, partial, header))


def read(
    path: Path,
    key: CacheKey,
    count: int,  # M
    verify: bool = True,  # the hash of the numbers
) -> np.ndarray:  # (M,) float32, mapped
    """The log-probs of a file. Raises UserError if it is damaged, or has another key or number of tokens."""
    remedy = "delete it, and they are scored anew, or set model.reference=auto"
    try:
        with safe_open(path, framework="pt") as file:
            header, token_logps = file.metadata() or {}, file.get_tensor(TENSOR).numpy()
        written = json.loads(header["parts"])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: it holds no log-probs that can be read ({error}); {remedy}") from error
    if differing := differences(written, key):
        raise UserError(f"{path}: the file is of another reference or data, by {differing}; {remedy}")
    if token_logps.dtype != np.float32 or token_logps.shape != (count,):
        raise UserError(
            f"{path}: it has {token_logps.dtype} of shape {token_logps.shape}, {count} float32 are needed; "
            f"{remedy}"
        )
    if verify and _hash(token_logps) != header.get("content"):
        raise UserError(f"{path}: the numbers in it are not those that were written; {remedy}")
    return token_logps


def why_not_reused(folder: Path, key: CacheKey) -> str:
    """How the key of the most similar file in the folder differs; empty if there is no file."""
    reasons: list[tuple[int, str]] = []
    for path in sorted(folder.glob(f"{PREFIX}*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                written = json.loads((file.metadata() or {})["parts"])
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
            continue
        names = [name for name in key if written.get(name) != key[name]]
        reasons.append((len(names), f"{path.name} has other {', '.join(names)}"))
    return min(reasons)[1] if reasons else ""


def differences(there: CacheKey, here: CacheKey) -> str:
    """The parts of two keys that differ, each with both values."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(f"{name}: {there.get(name)!r} there, {here.get(name)!r} now" for name in names)


def _plain(key: CacheKey) -> str:
    return json.dumps(dict(key), sort_keys=True)


def _hash(token_logps: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(token_logps).data)
