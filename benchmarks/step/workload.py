"""Workloads of the step's benchmark: a model with random weights and preference pairs, in a folder.

Every contender reads the same folder, so that weights, tokens and their order are the same for all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from madpo.trainer.config.peft import PeftConfig
from madpo.trainer.data.lengths import shapes_of
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.errors import UserError
from madpo.trainer.model import lora
from madpo.trainer.model.flops import step_cost
from madpo.trainer.model.policy import PolicyWithReference
from madpo.trainer.objectives.build import build
from madpo.trainer.scoring_module import ReferenceScorer

Pair = tuple[list[int], list[int], list[int]]
"""Tokens of prompt, chosen and rejected completion."""

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Columns of the data set of pairs, with TRL's names."""

FIRST_WORD = 4
"""The first token that is no special one."""


def _llama(hidden: int, inner: int, layers: int, heads: tuple[int, int], vocab: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
    }


MODELS = {
    "tiny": _llama(256, 704, 4, (8, 4), 8192),
    "tiny-32k": _llama(256, 704, 4, (8, 4), 32768),
    "Llama-3.2-1B": _llama(2048, 8192, 16, (32, 8), 128256) | {"head_dim": 64, "tie_word_embeddings": True},
    "Qwen2.5-0.5B": _llama(896, 4864, 24, (14, 2), 151936)
    | {"model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": False},
}
"""Name -> config of the architecture; models of real names have the real shapes."""


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in tokens: two medians, and one spread for prompts and completions."""

    prompt: float
    completion: float
    sigma: float


DATA = {"ultrafeedback": Lengths(121, 288, 0.52), "hh": Lengths(127, 59, 0.60)}
"""Lengths of two data sets, from published numbers. Real lengths are less regular.

Medians: whole sequences have 409 and 186 tokens, prompt over completion is 0.42 and 2.15, by the table in
the repository of Wang and Hegde 2024, "Accelerating Direct Preference Optimization with Prefix Sharing"
(arXiv 2410.20305). The spread gives mean rows the size that the data sets' cards state, at 4.3 bytes a
token: 405,688,662 bytes in 61,135 rows with the prompt four times and chosen twice
(HuggingFaceH4/ultrafeedback_binarized, train_prefs), and 512,473,755 bytes in 160,800 rows with the prompt
three times and both completions twice (KHuss/hh-rlhf-formatted).
"""


@dataclass(frozen=True)
class Workload:
    """A folder with `model/` and the data set `pairs/`."""

    folder: str
    max_length: int
    num_pairs: int

    @property
    def model(self) -> str:
        return str(Path(self.folder) / "model")

    @property
    def data(self) -> str:
        return str(Path(self.folder) / "pairs")

    def pairs(self) -> list[Pair]:
        columns = Dataset.load_from_disk(self.data)
        return list(zip(*(columns[name] for name in COLUMNS), strict=True))


def real_tokens(pair: Pair) -> int:
    """Tokens of both sequences, each with its prompt, without padding. Every rate here counts these,
    whatever a contender shares or pads."""
    prompt, chosen, rejected = map(len, pair)
    return 2 * prompt + chosen + rejected


def fresh_adapter(workload: Workload) -> Any:
    """peft's config of our default adapter. Raises UserError without peft."""
    return lora.new_config(PeftConfig(), workload.model, None, scores=False)


def step_flops(workload: Workload, adapted: bool, cached: bool) -> np.ndarray:  # (num_pairs,)
    """FLOPs of each pair that training needs, the same for every contender: the prompt once, the head on
    completions only, the reference's forward unless it is cached, and no recomputation."""
    config = AutoConfig.from_pretrained(workload.model)
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(config)
        if adapted:
            lora.attach(policy, fresh_adapter(workload), lora.POLICY)
            reference = ReferenceScorer(policy, partial(lora.switch, adapter=None))
        else:
            reference = ReferenceScorer(AutoModelForCausalLM.from_config(config))
    module = PolicyWithReference(policy, None if cached else reference, build("dpo"), budget_bytes=0)
    groups = [TokenGroup(prompt, tails, [(0, 1, None)]) for prompt, *tails in workload.pairs()]
    return step_cost(module).model.of(shapes_of(groups))


def make_workload(
    folder: Path, model: str, data: str, num_pairs: int, max_length: int, seed: int = 0
) -> Workload:
    """Write model and pairs into `folder`. Raises UserError for unknown names or missing demo data."""
    if model not in MODELS:
        raise UserError(f"--model {model}: unknown; choose from {', '.join(MODELS)}")
    if data not in (*DATA, "demo"):
        raise UserError(f"--data {data}: unknown; choose from {', '.join([*DATA, 'demo'])}")
    vocab = MODELS[model]["vocab_size"]
    if data == "demo":
        pairs = demo_pairs(num_pairs, max_length)
    else:
        pairs = draw_pairs(DATA[data], num_pairs, max_length, vocab, seed)
    folder.mkdir(parents=True, exist_ok=True)
    workload = Workload(str(folder), max_length, num_pairs)
    columns = dict(zip(COLUMNS, map(list, zip(*pairs, strict=True)), strict=True))
    Dataset.from_dict(columns).save_to_disk(workload.data)
    _save_model(folder / "model", MODELS[model], seed)
    return workload


def draw_pairs(lengths: Lengths, count: int, max_length: int, vocab: int, seed: int) -> list[Pair]:
    """Pairs of random tokens. Prompts take at most half of `max_length`; completions are cut to the rest."""
    random = np.random.default_rng(seed)

    def draw(median: float, most: int) -> list[int]:
        length = int(np.clip(random.lognormal(math.log(median), lengths.sigma), 2, most))
        return random.integers(FIRST_WORD, vocab, length).tolist()

    pairs = []
    for _ in range(count):
        prompt = draw(lengths.prompt, max_length // 2)
        pairs.append((prompt, *(draw(lengths.completion, max_length - len(prompt)) for _ in range(2))))
    return pairs


def demo_pairs(count: int, max_length: int) -> list[Pair]:
    """The first `count` pairs of `madpo demo`'s training set, tokenised, repeated if there are fewer.

    Raises UserError if they cannot be fetched.
    """
    from transformers import AutoTokenizer

    from madpo.trainer.data.rated_sentences import prepare

    folder = Path("runs/demo/data")
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        prepare(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    lines = (folder / "pairs" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(lines[i % len(lines)]) for i in range(count)]
    return [_encoded(tokenizer, row, max_length) for row in rows]


def _encoded(tokenizer: Any, row: dict[str, str], max_length: int) -> Pair:
    prompt = tokenizer(row["prompt"])["input_ids"][: max_length // 2]
    tails: Sequence[list[int]] = [
        [*tokenizer(row[side], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for side in ("chosen", "rejected")
    ]
    chosen, rejected = (tail[: max_length - len(prompt)] for tail in tails)
    return prompt, chosen, rejected


def _save_model(folder: Path, config: dict[str, Any], seed: int) -> None:
    """Save random float32 weights, and a tokenizer without words: the pairs are already tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    own = ["<pad>", "<s>", "</s>", "<unk>"]
    assert len(own) == FIRST_WORD
    words = Tokenizer(WordLevel({token: i for i, token in enumerate(own)}, unk_token="<unk>"))
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), own, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    values = dict(config) | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    family = str(values.pop("model_type"))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    model.float().save_pretrained(folder)
