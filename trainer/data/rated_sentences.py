"""The embedded data set: human-rated English sentences and preference pairs made from them.

23,703 sentences from tweets, film reviews, product reviews and newspaper editorials, each with the
mean of about 20 people's ratings of its sentiment on [-4, 4]. They ship inside the source package of
vaderSentiment 3.3.2 and are fetched from the package index, never stored in this repository.

Source: Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text" (ICWSM).
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import random
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madpo.trainer.errors import UserError

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
DOMAINS = {
    "tweets": "tweet:",
    "movieReviewSnippets": "film review:",
    "amazonReviewSnippets": "product review:",
    "nytEditorialSnippets": "editorial:",
}
"""File name stem -> the prompt of its sentences."""


@dataclass(frozen=True)
class Rated:
    prompt: str
    text: str
    rating: float


def fetch(folder: Path) -> Path:
    """The archive of rated sentences, downloaded through pip if `folder` does not hold it yet.

    Raises ValueError if it cannot be fetched, or its SHA-256 is not the known one.
    """
    archive = folder / Path(ARCHIVE).name
    if not archive.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", str(folder), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        source = folder / "vaderSentiment-3.3.2.tar.gz"
        if done.returncode or not source.is_file():
            raise UserError(
                f"could not download {PACKAGE} with pip: {done.stderr.strip()[-500:]}\n"
                f"check the package index, or put the package's source archive at {source}"
            )
        with tarfile.open(source) as outer:
            member = outer.extractfile(f"vaderSentiment-3.3.2/{ARCHIVE}")
            assert member is not None
            archive.write_bytes(member.read())
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise UserError(
            f"{archive}: SHA-256 is {digest}, expected {SHA256}; the file was altered or cut off, "
            "delete it and run again"
        )
    return archive


def read(archive: Path) -> list[Rated]:
    """All sentences, in the archive's order."""
    rated = []
    with tarfile.open(archive) as tar:
        for stem, prompt in DOMAINS.items():
            member = tar.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            assert member is not None
            for line in io.TextIOWrapper(member, encoding="utf-8", newline="\r\n"):
                _, rating, text = line.rstrip("\r\n").split("\t")
                rated.append(Rated(prompt, html.unescape(text).strip(), float(rating)))
    return rated


def split(rated: Iterable[Rated]) -> tuple[list[Rated], list[Rated]]:
    """(train, held out), about 9 to 1, by a hash of the text: equal sentences fall on one side."""
    train: list[Rated] = []
    held_out: list[Rated] = []
    for item in dict.fromkeys(rated):
        bucket = hashlib.sha256(item.text.lower().encode()).digest()[0]
        (held_out if bucket < 26 else train).append(item)
    return train, held_out


def pairs(rated: Iterable[Rated], seed: int) -> list[dict[str, Any]]:
    """Preference pairs of one domain each: every sentence at most once, in random partnership.

    Chosen is the sentence that people rated higher, the margin the difference of the mean ratings;
    equal ratings prefer nothing and make no pair.
    """
    generator = random.Random(seed)
    out = []
    rated = list(rated)
    for prompt in DOMAINS.values():
        items = [item for item in rated if item.prompt == prompt]
        generator.shuffle(items)
        for one, two in zip(items[::2], items[1::2], strict=False):
            better, worse = (one, two) if one.rating > two.rating else (two, one)
            margin = better.rating - worse.rating
            if margin > 0 and better.text != worse.text:
                out.append(
                    {
                        "prompt": prompt,
                        "chosen": " " + better.text,
                        "rejected": " " + worse.text,
                        "margin": round(margin, 6),
                    }
                )
    generator.shuffle(out)
    return out


def prepare(output: Path, vocab_size: int = 2048, seed: int = 42) -> None:
    """Write the demo's data into `output`: `sentences/` and `pairs/` with train.jsonl and test.jsonl,
    and `tokenizer/`, a byte-level BPE trained on the training sentences."""
    train, held_out = split(read(fetch(output)))
    for name, part in (("train", train), ("test", held_out)):
        sentences = ({"prompt": x.prompt, "completion": " " + x.text} for x in part)
        _write_jsonl(output / "sentences" / f"{name}.jsonl", sentences)
        _write_jsonl(output / "pairs" / f"{name}.jsonl", pairs(part, seed))
    train_tokenizer((f"{x.prompt} {x.text}" for x in train), vocab_size, output / "tokenizer")


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE with begin, end and padding tokens and save it for transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", special.index("<bos>"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
