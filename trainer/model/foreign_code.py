"""Code that lies in a model's folder or repository is never run, and nobody is asked whether it may be."""

from __future__ import annotations

import pickle

from madpo.trainer.errors import on_one_line

NO_CODE = {"trust_remote_code": False}
"""For everything that loads by a name. Left out, transformers asks on the terminal."""


def reason_of(error: Exception) -> str:
    """Why something could not be loaded, on one line."""
    if "trust_remote_code" in str(error):
        return (
            "it needs code that lies in its own folder, and madpo runs no code of a model's folder; take a "
            "model of a family that transformers has itself"
        )
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights (pytorch_model*.bin) are a pickle that is damaged or holds more than tensors; to "
            "load that may run code, which madpo does not; take a model of safetensors, or convert the file "
            "(save_pretrained of transformers) where you trust it"
        )
    # Of a family that has no such model, transformers lists the two hundred that have.
    return on_one_line(error).partition(" Model type should be one of")[0]
