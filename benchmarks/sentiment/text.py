"""Real English for the sentiment experiment: texts for the language model, and prompts to continue.

The source is either the rated sentences that the demo fetches, or a folder (or zip file) of documents under
`pos/` and `neg/`, as in the IMDb and Pang & Lee collections. Whole documents are dealt out to the parts, so
that no document is in two of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madpo.trainer.data import rated_sentences
from madpo.trainer.errors import UserError

SHARES = {"lm": 0.6, "sft": 0.15, "pairs": 0.15, "evaluation": 0.1}
SHARES_OF_FEW = {"lm": 0.25, "sft": 0.2, "pairs": 0.35, "evaluation": 0.2}
REVIEWS = ("film review:", "product review:")
MOST_WORDS = 32
PAIRS, PROMPTS = 3000, 1000
"""Prompts for preference pairs, and held-out prompts, at scale 1."""
LEAST = 200
"""The fewest sentences that the language model reads, at any scale."""


@dataclass(frozen=True)
class Sentence:
    text: str
    document: str  # sentences of one document stay together
    negative: bool
    is_review: bool = True  # others only teach the language model English


def prepare(
    output: Path,
    source: str | None = None,
    scale: float = 1.0,
    prompt_words: int = 7,
    vocab_size: int = 2048,
) -> None:
    """Write data sets and a tokenizer into `output`:

    lm/          text                 sentences of all kinds, to learn English from
    sft/         prompt, completion   reviews, cut after `prompt_words` words
    pairs/       prompt, completion   negative reviews: the pairs' prompts, and the human continuations
    evaluation/  prompt, completion   negative reviews that nothing is trained on

    `scale` multiplies the prompts of pairs and evaluation, as far as the source reaches; from 0.5 on, lm and
    sft are whole. Raises UserError for a source that is missing or too small.
    """
    sentences = list(read_folder(Path(source)) if source else read_rated(output / "download"))
    parts = deal(sentences, SHARES if source else SHARES_OF_FEW)
    part = min(1.0, 2 * scale)  # everything else depends on the language model
    limits = {
        "sft": max(round(len(parts["sft"]) * part), LEAST),
        "pairs": round(PAIRS * scale),
        "evaluation": round(PROMPTS * scale),
    }
    facts: dict[str, int] = {}
    for name, limit in limits.items():
        rows = list(continuations(parts[name], prompt_words, negative=name != "sft"))
        rows = rows[:limit]
        if len(rows) < 8:
            raise UserError(f"{name}: only {len(rows)} sentences of {source or 'the rated sentences'} fit")
        facts[name] = _write_splits(output / name, rows, held_out=len(rows) // 10 if name == "sft" else 0)
    texts = [sentence.text for sentence in parts["lm"]]
    texts = texts[: max(round(len(texts) * part), LEAST)]
    facts["lm"] = _write_splits(output / "lm", [{"text": text} for text in texts], len(texts) // 50)
    rated_sentences.train_tokenizer(texts, vocab_size, output / "tokenizer")
    facts["words"] = sum(len(text.split()) for text in texts)
    (output / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(", ".join(f"{name} {count}" for name, count in facts.items()))


def read_rated(folder: Path) -> Iterator[Sentence]:
    """The human-rated sentences; one is negative if its mean rating is below zero."""
    for item in dict.fromkeys(rated_sentences.read(rated_sentences.fetch(folder))):
        text = _clean(item.text)
        yield Sentence(text, text.lower(), item.rating < 0, item.prompt in REVIEWS)


def read_folder(path: Path) -> Iterator[Sentence]:
    """The lines of every `pos/*.txt` and `neg/*.txt` in a folder or zip file; UserError if there are none."""
    found = False
    for name, content in _documents(path):
        kind = re.search(r"(?:^|/)(pos|neg)/[^/]+\.txt$", name)
        if kind:
            found = True
            text = content.decode("utf-8", errors="replace").replace("<br />", "\n")
            for line in text.splitlines():
                if line.strip():
                    yield Sentence(_clean(line), name, kind[1] == "neg")
    if not found:
        raise UserError(f"{path}: no pos/*.txt or neg/*.txt in it, with one document per file")


def _documents(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.rglob("*.txt")):
            yield file.relative_to(path).as_posix(), file.read_bytes()
    elif path.suffix == ".zip" and path.is_file():
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".txt"):
                    yield name, archive.read(name)
    else:
        raise UserError(f"{path}: expected a folder or a .zip file of reviews")


def deal(sentences: Iterable[Sentence], shares: dict[str, float]) -> dict[str, list[Sentence]]:
    """Sentences by part, in an order that depends on the texts alone. Those from no review go to `lm`."""
    parts: dict[str, list[Sentence]] = {name: [] for name in shares}
    for sentence in sentences:
        place, last = _unit_hash(sentence.document), ""
        for name, share in shares.items():
            last = name
            if place < share or not sentence.is_review:
                break
            place -= share
        parts[last].append(sentence)
    return {name: sorted(part, key=lambda s: _unit_hash(s.text)) for name, part in parts.items()}


def continuations(
    sentences: Iterable[Sentence], prompt_words: int, negative: bool
) -> Iterator[dict[str, str]]:
    """Sentences cut into prompt and completion after `prompt_words` words; every prompt once."""
    seen = set()
    for sentence in sentences:
        words = sentence.text.split()
        prompt = " ".join(words[:prompt_words])
        fits = prompt_words + 4 <= len(words) <= MOST_WORDS
        if fits and prompt not in seen and (sentence.negative or not negative):
            seen.add(prompt)
            yield {"prompt": prompt, "completion": " " + " ".join(words[prompt_words:])}


def _clean(text: str) -> str:
    return " ".join(text.split())


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def _write_splits(folder: Path, rows: list[dict[str, str]], held_out: int) -> int:
    """Write the first rows into test.jsonl, the others into train.jsonl; returns the number of the others."""
    write_rows(folder / "train.jsonl", rows[held_out:])
    if held_out:
        write_rows(folder / "test.jsonl", rows[:held_out])
    return len(rows) - held_out


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
