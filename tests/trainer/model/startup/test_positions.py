"""Sequences that are longer than the positions a model was made for."""

from __future__ import annotations
