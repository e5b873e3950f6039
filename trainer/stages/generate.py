"""Completions of a data set's prompts by one or more models, judged: data that the next stage reads.

The work is cut into batches of prompts, longest first. A batch's completions depend on the batch and the
seed alone, and each finished batch is a file: so the number of ranks changes nothing, and a run that was
cut off goes on where it stood.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from madpo.trainer import dist
from madpo.trainer.config.generate import GenerateConfig, JudgeConfig
from madpo.trainer.config.schema import Config
from madpo.trainer.data.tokenised_cache import tokenizer_identity
from madpo.trainer.dist import Shard
from madpo.trainer.errors import UserError
from madpo.trainer.files import write_atomically
from madpo.trainer.formats.text_groups import Text
from madpo.trainer.model.pretrained import folder_of, state_of_files
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.reports.progress import print_line
from madpo.trainer.run_folder import claim
from madpo.trainer.sampling.judges import check_judge, judge_identity, open_judge
from madpo.trainer.sampling.pairs import choose_pair, pair_row, random_of
from madpo.trainer.sampling.prompts import Prompts, read_prompts
from madpo.trainer.sampling.resumable_batches import Batch, BatchJob, ResumableBatches, batches_of
from madpo.trainer.sampling.samplers import backend_of, completion_of, open_sampler


@dataclass(frozen=True)
class Writer:
    """One of the models that write completions."""

    index: int
    name: str  # as in the config
    folder: str  # or a name on the hub
    revision: str | None


@dataclass(frozen=True)
class SamplingPlan:
    """What all models and the judge have in common."""

    config: Config
    settings: GenerateConfig
    backend: str
    prompts: dict[str, Prompts]  # of each split
    batches: list[Batch]
    root: Path  # of finished batches
    shard: Shard

    def identity(self) -> str:
        """A hash of the prompts and of which of them go together."""
        members = [(batch.split, batch.number, batch.members) for batch in self.batches]
        prompts = [(split, asdict(found.rules), found.keys) for split, found in self.prompts.items()]
        return xxhash.xxh3_128_hexdigest(json.dumps([members, prompts]).encode())


def run_generation(config: Config) -> None:
    """Write `<output_dir>/generated/<split>.jsonl` for the splits that the config names, and with
    `generate.pairs` preference pairs into `<output_dir>/pairs`. Raises UserError."""
    settings, folder = config.generate or GenerateConfig(), Path(config.output_dir)
    backend, writers = backend_of(settings), writers_of(config, settings)
    if settings.judge is not None:
        check_judge(settings.judge)
    tokenizer, data = load_tokenizer(config.model), config.data
    splits = [split for split in (data.dataset_train_split, data.dataset_test_split) if split is not None]
    prompts = {
        split: read_prompts(data, split, tokenizer, settings.prompt_tokens, settings.limit)
        for split in splits
    }
    batches = {split: batches_of(split, prompts[split].lengths, settings.batch_size) for split in splits}
    shard = dist.init(config.launch.timeout_minutes)
    lock = claim(folder, shard)
    every = list(chain(*batches.values()))
    plan = SamplingPlan(config, settings, backend, prompts, every, folder / "generated" / "parts", shard)
    written = [_sample_all(plan, writer) for writer in writers]
    judged = _judge_all(plan, settings.judge, written) if settings.judge else None
    if shard.is_main:
        for split in splits:
            rows = _joined(prompts[split], batches[split], writers, written, judged)
            facts = _write(folder, split, rows, settings, config.seed)
            _note(folder, split, facts | _provenance(config, settings, backend, writers, prompts[split]))
            _show(folder, split, facts, settings)
    dist.barrier()
    lock.release()


def writers_of(config: Config, settings: GenerateConfig) -> list[Writer]:
    """The models to sample from; of a run's folder the exported one. Raises UserError if there is none."""
    own = config.model.model_name_or_path
    if not settings.models and own is None:
        raise UserError("generate.models: name a model; model.init_config is one from scratch")
    return [
        Writer(index, name, folder_of(name), config.model.model_revision if name == own else None)
        for index, name in enumerate(settings.models or [str(own)])
    ]


def _sample_all(plan: SamplingPlan, writer: Writer) -> ResumableBatches:
    """One model's completions: for each prompt of a batch the fields of each `Completion`."""
    config, settings = plan.config, plan.settings
    update = {"model_name_or_path": writer.folder, "model_revision": writer.revision}
    tokenizer = load_tokenizer(config.model.model_copy(update=update))
    names = {"num_completions", "max_new_tokens", "temperature", "top_p", "top_k"}
    identity = [
        *(plan.identity(), settings.model_dump(include=names), plan.backend, config.seed, config.train.bf16),
        *(writer.index, writer.folder, writer.revision, state_of_files(writer.folder)),
        tokenizer_identity(tokenizer),
    ]

    def open_work() -> BatchJob:
        sampler = open_sampler(config, writer.folder, writer.revision, tokenizer)

        def work(batch: Batch) -> list[list[dict[str, Any]]]:
            prompts = plan.prompts[batch.split]
            ids = [prompts.encode(member, tokenizer) for member in batch.members]
            seed = int(random_of(config.seed, writer.index, batch.split, batch.number).integers(2**32))
            return [
                [asdict(completion_of(before, new, sampler.ends, tokenizer)) for new in completions]
                for before, completions in zip(ids, sampler(ids, seed), strict=True)
            ]

        return work, sampler.close

    parts = ResumableBatches(plan.root, identity)
    parts.fill(plan.batches, plan.shard, f"sampling from {writer.name}", open_work, settings.partitioned)
    return parts


def _judge_all(
    plan: SamplingPlan, judge: JudgeConfig, written: Sequence[ResumableBatches]
) -> ResumableBatches:
    """Scores: for each prompt of a batch one of each completion, those of all models behind each other."""

    def open_work() -> BatchJob:
        score = open_judge(plan.config, judge)

        def work(batch: Batch) -> Any:
            prompts = [plan.prompts[batch.split].groups[member] for member in batch.members]
            completions = [
                [_like(group.prompt, completion["text"]) for completion in of_prompt]
                for group, of_prompt in zip(prompts, _together(batch, written), strict=True)
            ]
            return score(prompts, completions)

        return work, lambda: None

    parts = ResumableBatches(plan.root, [[part.key for part in written], *judge_identity(plan.config, judge)])
    parts.fill(plan.batches, plan.shard, "judging", open_work)
    return parts


def _together(batch: Batch, written: Sequence[ResumableBatches]) -> list[list[dict[str, Any]]]:
    """Of each prompt the completions of all models."""
    return [
        list(chain(*of_prompt)) for of_prompt in zip(*(parts.read(batch) for parts in written), strict=True)
    ]


def _like(prompt: Text, text: str) -> Text:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _joined(
    prompts: Prompts,
    batches: Sequence[Batch],
    writers: Sequence[Writer],
    written: Sequence[ResumableBatches],
    judged: ResumableBatches | None,
) -> list[dict[str, Any]]:
    """One row per prompt, in the order of the source."""
    rows: dict[int, dict[str, Any]] = {}
    for batch in batches:
        scores = judged.read(batch) if judged else None
        counts = [len(parts.read(batch)[0]) for parts in written]
        models = [writer.name for writer, count in zip(writers, counts, strict=True) for _ in range(count)]
        for place, (member, found) in enumerate(zip(batch.members, _together(batch, written), strict=True)):
            group = prompts.groups[member]
            prompt = group.prompt
            rows[member] = {
                "prompt": prompt,
                **({"tools": group.tools} if group.tools else {}),
                **({"chat_template_kwargs": group.template_kwargs} if group.template_kwargs else {}),
                "completions": [_like(prompt, completion["text"]) for completion in found],
                **({} if scores is None else {"scores": scores[place]}),
                "models": models,
                "finish": [completion["finish"] for completion in found],
                "tokens": [completion["tokens"] for completion in found],
            }
    return [rows[member] for member in range(len(rows))]


def _write(
    folder: Path, split: str, rows: list[dict[str, Any]], settings: GenerateConfig, seed: int
) -> dict[str, Any]:
    """The split, pairs of it where wanted, and what is to be said of both."""
    _write_lines(folder / "generated" / f"{split}.jsonl", rows)
    facts: dict[str, Any] = {"prompts": len(rows), "completions": sum(len(x["models"]) for x in rows)}
    facts["of_model"] = {name: _facts_of(rows, name) for name in dict.fromkeys(rows[0]["models"])}
    if settings.pairs != "none":
        pairs, dropped = [], Counter[str]()
        for number, row in enumerate(rows):
            texts, scores = row["completions"], row["scores"]
            pair = choose_pair(texts, scores, settings.pairs, random_of(seed, "pair", split, number))
            if isinstance(pair, str):
                dropped[pair] += 1
            else:
                context = {key: row[key] for key in ("tools", "chat_template_kwargs") if key in row}
                pairs.append({**pair_row(row["prompt"], texts, scores, pair), **context})
        _write_lines(folder / "pairs" / f"{split}.jsonl", pairs)
        facts["pairs"] = {"how": settings.pairs, "rows": len(pairs), "dropped": dict(dropped)}
    return facts


def _facts_of(rows: list[dict[str, Any]], model: str) -> dict[str, Any]:
    """How long a model's completions are, how many end by themselves, and their scores."""
    mine = [(row, i) for row in rows for i, name in enumerate(row["models"]) if name == model]
    facts: dict[str, Any] = {
        "mean_tokens": float(np.mean([row["tokens"][i] for row, i in mine])),
        "stopped": float(np.mean([row["finish"][i] == "stop" for row, i in mine])),
    }
    if "scores" in rows[0]:
        given = [row["scores"][i] for row, i in mine if row["scores"][i] is not None]
        facts["unscored"] = len(mine) - len(given)
        if given:
            facts |= {"score_mean": float(np.mean(given)), "score_sd": float(np.std(given))}
    return facts


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _provenance(
    config: Config, settings: GenerateConfig, backend: str, writers: Sequence[Writer], prompts: Prompts
) -> dict[str, Any]:
    return {
        "source": prompts.source,
        "rows": prompts.rows,
        "repeated_prompts": prompts.repeated,
        "dropped": dict(prompts.dropped),
        "models": [{"name": x.name, "loaded": x.folder, "revision": x.revision} for x in writers],
        "settings": settings.model_dump(),
        "seed": config.seed,
        "bf16": config.train.bf16,
        "backend": backend,
        "versions": {name: version(name) for name in ("madpo", "torch", "transformers")},
    }


def _note(folder: Path, split: str, facts: dict[str, Any]) -> None:
    """generation.json, beside the rows."""
    path = folder / "generated" / "generation.json"
    notes = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**notes, split: facts}, indent=2) + "\n")


def _show(folder: Path, split: str, facts: dict[str, Any], settings: GenerateConfig) -> None:
    print_line(f"{split}: {facts['completions']} completions of {facts['prompts']} prompts")
    for name, of_model in facts["of_model"].items():
        scores = "score_mean" in of_model and (
            f", score {of_model['score_mean']:.3f} (standard deviation {of_model['score_sd']:.3f})"
        )
        print_line(
            f"  {name}: {of_model['mean_tokens']:.1f} tokens, {of_model['stopped']:.1%} end by themselves"
            f"{scores or ''}"
        )
    if settings.pairs != "none":
        pairs = facts["pairs"]
        dropped = "".join(f", {count} dropped ({reason})" for reason, count in pairs["dropped"].items())
        print_line(f"  {pairs['rows']} pairs{dropped}")
        print_line(f"  next stage: data.dataset_name={folder / 'pairs'}")
