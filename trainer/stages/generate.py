"""Sample completions of a data set's prompts from one or more models, judge them, and write them as data.

The work is cut into batches of prompts, longest first. A batch's completions depend only on the batch and
the seed, and each finished batch is a file. So the number of ranks changes no result, and an interrupted run
continues where it stopped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from madpo.trainer import dist
from madpo.trainer.config.generate import GenerateConfig, JudgeConfig
from madpo.trainer.config.locate import located, model_folder
from madpo.trainer.config.schema import Config
from madpo.trainer.counted import counted
from madpo.trainer.data.known_tokens import largest_id, unknown_token
from madpo.trainer.data.report import findings
from madpo.trainer.data.source import test_split
from madpo.trainer.data.tokenised_cache import tokenizer_identity
from madpo.trainer.dist import Shard
from madpo.trainer.errors import UserError
from madpo.trainer.files import read_object, write_atomically, write_object
from madpo.trainer.formats.text_groups import Text
from madpo.trainer.model.build import known_to
from madpo.trainer.model.pretrained import state_of_files
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.reports.progress import print_line
from madpo.trainer.reports.samples import print_samples
from madpo.trainer.run_folder import claim
from madpo.trainer.sampling.judges import check_judge, judge_identity, open_judge
from madpo.trainer.sampling.pairs import choose_pair, pair_row, random_of
from madpo.trainer.sampling.prompts import Prompts, read_prompts
from madpo.trainer.sampling.resumable_batches import Batch, BatchJob, ResumableBatches, batches_of
from madpo.trainer.sampling.samplers import backend_of, completion_of, open_sampler


@dataclass(frozen=True)
class Writer:
    """A model that completions are sampled from."""

    index: int
    name: str  # as in the config
    folder: str  # where it is loaded from: a folder, or a name on the hub
    revision: str | None


@dataclass(frozen=True)
class SamplingPlan:
    """What sampling from every model and judging have in common."""

    config: Config
    settings: GenerateConfig
    backend: str
    prompts: dict[str, Prompts]  # split -> its prompts
    batches: list[Batch]
    root: Path  # folder of the finished batches
    shard: Shard

    def identity(self) -> str:
        """A hash of the prompts and of their batches."""
        members = [(batch.split, batch.number, batch.members) for batch in self.batches]
        prompts = [(split, asdict(own.rules), own.keys) for split, own in self.prompts.items()]
        return xxhash.xxh3_128_hexdigest(json.dumps([members, prompts]).encode())


def run_generation(config: Config) -> None:
    """Write `<output_dir>/generated/<split>.jsonl` for the splits that the config names.

    With `generate.pairs`, also preference pairs into `<output_dir>/pairs`. Raises UserError.
    """
    settings, folder = config.generate or GenerateConfig(), Path(config.output_dir)
    backend, writers = backend_of(settings), writers_of(config, settings)
    config = located(config)
    if settings.judge is not None:
        check_judge(settings.judge)
    tokenizer, data = load_tokenizer(config.model), config.data
    splits = [split for split in (data.dataset_train_split, test_split(data)) if split is not None]
    prompts = {
        split: read_prompts(data, split, tokenizer, settings.prompt_tokens, settings.limit)
        for split in splits
    }
    for writer in writers:
        _check_prompts(config, prompts.values(), writer)
    batches = {split: batches_of(split, prompts[split].lengths, settings.batch_size) for split in splits}
    shard = dist.init(config.launch.timeout_minutes, config.launch.start_timeout_minutes)
    with ExitStack() as cleanup:
        cleanup.callback(claim(folder, shard).release)
        all_batches = list(chain(*batches.values()))
        finished = folder / "generated" / "parts"
        plan = SamplingPlan(config, settings, backend, prompts, all_batches, finished, shard)
        written = [_sample_all(plan, writer) for writer in writers]
        judged = _judge_all(plan, settings.judge, written) if settings.judge else None
        if shard.is_main:
            for split in splits:
                rows = _joined(prompts[split], batches[split], writers, written, judged)
                facts = _write(folder, split, rows, settings, config.seed)
                facts |= _provenance(config, settings, backend, writers, prompts[split])
                _write_facts(folder, split, facts)
                _show(folder, split, facts, rows, settings)
        dist.barrier()


def writers_of(config: Config, settings: GenerateConfig) -> list[Writer]:
    """The models to sample from; a run folder stands for its exported model. Raises UserError for none."""
    own = config.model.model_name_or_path
    if not settings.models and own is None:
        raise UserError("generate.models: name a model; model.init_config is one from scratch")
    key = "generate.models" if settings.models else "model.model_name_or_path"
    return [
        Writer(index, name, model_folder(key, name), config.model.model_revision if name == own else None)
        for index, name in enumerate(settings.models or [str(own)])
    ]


def _tokenizer_of(config: Config, writer: Writer) -> PreTrainedTokenizerBase:
    update = {"model_name_or_path": writer.folder, "model_revision": writer.revision}
    return load_tokenizer(config.model.model_copy(update=update))


def _check_prompts(config: Config, prompts: Iterable[Prompts], writer: Writer) -> None:
    """Raise UserError for a prompt with a token that the model has no embedding for."""
    tokenizer, known = _tokenizer_of(config, writer), known_to(config, writer.folder, writer.revision)
    if known is None or known > largest_id(tokenizer):
        return
    for of_split in prompts:
        for member, place in enumerate(of_split.places):
            largest = max(of_split.encode(member, tokenizer))
            if largest >= known:
                problem = unknown_token(largest, tokenizer, known)
                raise UserError(f"{place}: {writer.name}: {problem}; leave the row out")


def _sample_all(plan: SamplingPlan, writer: Writer) -> ResumableBatches:
    """Sample all batches from one model: for each prompt, the fields of each `Completion`."""
    config, settings = plan.config, plan.settings
    tokenizer = _tokenizer_of(config, writer)
    drawn_by = settings.only("num_completions", "max_new_tokens", "temperature", "top_p", "top_k")
    identity = [
        *(plan.identity(), drawn_by, plan.backend, config.seed, config.train.bf16),
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
    """Score all batches: for each prompt, one score per completion, model after model."""

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
    """For each prompt of the batch, the completions of all models."""
    return [
        list(chain(*of_prompt)) for of_prompt in zip(*(parts.read(batch) for parts in written), strict=True)
    ]


def _like(prompt: Text, text: str) -> Text:
    """A completion in the prompt's form: text, or a message."""
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
        completions_of = _together(batch, written)
        for index, (member, completions) in enumerate(zip(batch.members, completions_of, strict=True)):
            group = prompts.groups[member]
            prompt = group.prompt
            rows[member] = {
                "prompt": prompt,
                **({"tools": group.tools} if group.tools else {}),
                **({"chat_template_kwargs": group.template_kwargs} if group.template_kwargs else {}),
                "completions": [_like(prompt, completion["text"]) for completion in completions],
                **({} if scores is None else {"scores": scores[index]}),
                "models": models,
                "finish": [completion["finish"] for completion in completions],
                "tokens": [completion["tokens"] for completion in completions],
            }
    return [rows[member] for member in range(len(rows))]


def _write(
    folder: Path, split: str, rows: list[dict[str, Any]], settings: GenerateConfig, seed: int
) -> dict[str, Any]:
    """Write a split's completions, and pairs of them if asked; return facts about both."""
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
    """Facts about a model's completions: their length, how many end by themselves, their scores."""
    own = [(row, i) for row in rows for i, name in enumerate(row["models"]) if name == model]
    facts: dict[str, Any] = {
        "mean_tokens": float(np.mean([row["tokens"][i] for row, i in own])),
        "stopped": float(np.mean([row["finish"][i] == "stop" for row, i in own])),
    }
    if "scores" in rows[0]:
        given = [row["scores"][i] for row, i in own if row["scores"][i] is not None]
        facts["unscored"] = len(own) - len(given)
        if given:
            facts |= {"score_mean": float(np.mean(given)), "score_sd": float(np.std(given))}
    return facts


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    def write(partial: Path) -> None:  # line by line: a split of long completions is large
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def _provenance(
    config: Config, settings: GenerateConfig, backend: str, writers: Sequence[Writer], prompts: Prompts
) -> dict[str, Any]:
    return {
        "source": prompts.source,
        "rows": prompts.rows,
        "repeated_prompts": prompts.repeated,
        "dropped": dict(prompts.dropped),
        "chat_template": dict(prompts.notes),
        "unused_columns": dict(prompts.unused),
        "where": prompts.where,
        "models": [{"name": x.name, "loaded": x.folder, "revision": x.revision} for x in writers],
        "settings": settings.model_dump(),
        "seed": config.seed,
        "bf16": config.train.bf16,
        "backend": backend,
        "versions": {name: version(name) for name in ("madpo", "torch", "transformers")},
    }


def _write_facts(folder: Path, split: str, facts: dict[str, Any]) -> None:
    """Write a split's facts into generation.json, beside those of the other splits."""
    path = folder / "generated" / "generation.json"
    write_object(path, {**read_object(path), split: facts})


def _show(
    folder: Path, split: str, facts: dict[str, Any], rows: list[dict[str, Any]], settings: GenerateConfig
) -> None:
    """Print the first completions of every model side by side, then what was counted."""
    print_samples(rows)
    sampled, prompts = counted(facts["completions"], "completion"), counted(facts["prompts"], "prompt")
    print_line(f"{split}: {sampled} of {prompts}")
    if repeated := facts["repeated_prompts"]:
        print_line(f"  {counted(repeated, 'row')} left out: an earlier row has the same prompt")
    for line in findings(facts):
        print_line(f"  {line}")
    for name, own in facts["of_model"].items():
        scores = ""
        if "score_mean" in own:
            scored = facts["completions"] // len(facts["of_model"]) - own["unscored"]
            scores = f", score {own['score_mean']:.3f} ± {own['score_sd'] / scored**0.5:.3f}"
        if own.get("unscored"):
            scores += f", {own['unscored']} without a score (the judge gave none that is finite)"
        print_line(
            f"  {name}: {own['mean_tokens']:.1f} tokens on average, {own['stopped']:.1%} ended by "
            f"themselves{scores}"
        )
    if settings.pairs != "none":
        pairs = facts["pairs"]
        dropped = "".join(f", {count} dropped ({reason})" for reason, count in pairs["dropped"].items())
        print_line(f"  {counted(pairs['rows'], 'pair')}{dropped}")
        print_line(f"  next stage: data.dataset_name={folder / 'pairs'}")
    print_line(f"  completions: {folder / 'generated' / f'{split}.jsonl'}")
