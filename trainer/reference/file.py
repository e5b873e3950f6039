"""Log-probs of a reference on disk: one safetensors file, named by a hash of all that decides its numbers.

Its header tells these parts in plain JSON, so that a file that does not fit can say why, and a hash of the
numbers. It is mapped into memory when read.
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
"""Part of every key; raise it when the same parts would give other numbers or another order of them."""

TENSOR = "token_logps"
PREFIX = "reference-"

Parts = Mapping[str, Any]
"""Everything that decides the numbers, name -> plain JSON."""


def path_of(folder: Path, parts: Parts) -> Path:
    """Where the log-probs of such a reference and data lie, or will."""
    return folder / f"{PREFIX}{xxhash.xxh3_128_hexdigest(_plain(parts).encode())}.safetensors"


def write(
    path: Path,
    token_logps: np.ndarray,  # (M,) float32
    parts: Parts,
) -> None:
    """Put the file there, whole or not at all. Raises UserError for numbers that are not finite."""
    if not np.isfinite(token_logps).all():
        bad = int((~np.isfinite(token_logps)).sum())
        raise UserError(
            f"the reference gives {bad} of {len(token_logps)} completion tokens no finite log-prob; look "
            " at its weights (model.ref_model_name_or_path), or at train.bf16"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"parts": _plain(parts), "content": _content(token_logps)}
    tensors = {TENSOR: torch.from_numpy(token_logps)}
    write_atomically(path, lambda partial: save_file(tensors, partial, header))


def read(
    path: Path,
    parts: Parts,
    count: int,  # M
    whole: bool = True,
) -> np.ndarray:  # (M,) float32, mapped
    """The log-probs. Raises UserError that names the file if it is damaged or holds something else; whether
    the numbers are those that were written is looked at if `whole`."""
    again = "delete it, and they are scored anew, or set model.reference=auto"
    try:
        with safe_open(path, framework="pt") as file:
            header, token_logps = file.metadata() or {}, file.get_tensor(TENSOR).numpy()
        written = json.loads(header["parts"])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: it holds no log-probs that can be read ({error}); {again}") from error
    if differing := differences(written, parts):
        raise UserError(f"{path}: the file is of another reference or data, by {differing}; {again}")
    if token_logps.dtype != np.float32 or token_logps.shape != (count,):
        raise UserError(
            f"{path}: it has {token_logps.dtype} of shape {token_logps.shape}, {count} float32 are needed; "
            f"{again}"
        )
    if whole and _content(token_logps) != header.get("content"):
        raise UserError(f"{path}: the numbers in it are not those that were written; {again}")
    return token_logps


def nearest(folder: Path, parts: Parts) -> str:
    """What keeps the file in the folder that comes closest from being used; empty if there is none."""
    found: list[tuple[int, str]] = []
    for path in sorted(folder.glob(f"{PREFIX}*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                written = json.loads((file.metadata() or {})["parts"])
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
            continue
        names = [name for name in parts if written.get(name) != parts[name]]
        found.append((len(names), f"{path.name} has other {', '.join(names)}"))
    return min(found)[1] if found else ""


def differences(there: Parts, here: Parts) -> str:
    """The parts that are not the same, each with both values."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(f"{name}: {there.get(name)!r} there, {here.get(name)!r} now" for name in names)


def _plain(parts: Parts) -> str:
    return json.dumps(dict(parts), sort_keys=True)


def _content(token_logps: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(token_logps).data)
