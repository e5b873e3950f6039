"""Read all data of a config as training would, without its model, and say what became of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from madpo.trainer.config.locate import located
from madpo.trainer.config.schema import Config
from madpo.trainer.counted import counted
from madpo.trainer.data.block_reader import open_reader
from madpo.trainer.data.dataset import GroupDataset, stored_columns
from madpo.trainer.data.groups import TabledGroups
from madpo.trainer.data.known_tokens import with_known_tokens
from madpo.trainer.data.mixture import Part, has_held_out, parts_of, with_total
from madpo.trainer.data.repeats import KnownClaims
from madpo.trainer.data.report import (
    UNREADABLE,
    Report,
    claims_in,
    findings,
    report_of,
    total_report,
    with_known,
)
from madpo.trainer.data.stream import ReadTable, Stream
from madpo.trainer.data.tokenised_cache import nothing_left, read_table, share, usable_rows
from madpo.trainer.data.training_data import fitted, told
from madpo.trainer.data.views.weighed import weights_of
from madpo.trainer.errors import DataError, UserError
from madpo.trainer.files import make_folder, write_atomically
from madpo.trainer.model.build import known_tokens
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.reports.remarks import on_weights

BAD_ROWS = 3
"""Exit status where an example cannot be read."""

MOST_SHOWN = 10
"""The number of unreadable examples whose reasons are printed."""

TOTAL = "all parts"

QUANTILES = {"5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}


def check_data(config: Config, console: Console) -> int:
    """Print a table and `data_report.json` in `output_dir` of all data, training and held out.

    A folder that holds a run keeps its own report; the new one is then `data_check.json`. Returns the exit
    status: BAD_ROWS if an example cannot be read, also where the config says to drop it, else 0. Raises
    UserError for data that cannot be opened and, after printing, for data that the objective cannot use.
    """
    config = located(config)
    tokenizer = load_tokenizer(config.model)
    lenient = config.model_copy(update={"data": config.data.model_copy(update={"on_bad_row": "drop"})})
    reports: dict[str, Report] = {}
    problems: list[UserError] = []
    remarks: list[str] = []
    claims, embedded = KnownClaims(), _embedded_tokens(config, tokenizer, remarks)
    for held_out in (False, True) if has_held_out(config.data) else (False,):
        parts = parts_of(lenient.data, held_out)
        own = {}
        for part in parts:
            check = _PartCheck(lenient, part, held_out, claims)
            own[part.label] = check.report(_tables(lenient, part, held_out, tokenizer, embedded))
            problems += [check.problem] if check.problem else []
            remarks += [f"{part.label}: {check.remark}"] if check.remark else []
        reports |= own if config.data.datasets is None else with_total(TOTAL, parts, own)
    reports = told(reports, config.bound_objective)
    _show(reports, console, stops=config.data.on_bad_row == "error")
    path = _write(Path(config.output_dir), reports)
    for line in (*remarks, f"report {path}"):
        console.print(line, soft_wrap=True, markup=False)
    bad = sum(report["dropped"].get(UNREADABLE, 0) for report in reports.values())
    if problems and not bad:
        raise problems[0]
    for problem in problems:
        console.print(f"error: {problem}", soft_wrap=True, markup=False)
    return BAD_ROWS if bad else 0


def _embedded_tokens(config: Config, tokenizer: PreTrainedTokenizerBase, remarks: list[str]) -> int | None:
    """The number of tokens that the model has embeddings for; None, and a remark, if it cannot be found."""
    try:
        return known_tokens(config, tokenizer)
    except UserError as error:
        remarks.append(f"the tokens are not compared with the model's: {error}")
        return None


def _tables(
    config: Config, part: Part, held_out: bool, tokenizer: PreTrainedTokenizerBase, embedded: int | None
) -> Iterator[ReadTable]:
    """What was read of a part, of a stream block by block. `embedded`: tokens of the model."""
    supervised = config.bound_objective.supervised
    if _is_stream(config, held_out):
        reader, seed = open_reader(part.data, part.split), config.seed
        yield from Stream(
            reader,
            part.data,
            part.split,
            tokenizer,
            seed,
            end=0,
            supervised=supervised,
            known_tokens=embedded,
        ).tables()
        return
    source, table, path = read_table(part.data, part.split, tokenizer, supervised)
    table = with_known_tokens(table, stored_columns(path), tokenizer, embedded)
    taken = _taken(table, part)
    yield ReadTable(table, report_of(source.name, table, taken, source.where), source.where)


def _is_stream(config: Config, held_out: bool) -> bool:
    return config.data.streaming and not held_out


def _taken(table: datasets.Dataset, part: Part) -> np.ndarray:
    """(G,) the rows of a table that training takes."""
    usable = usable_rows(table)
    return usable[share(len(usable), part.fraction)]


class _PartCheck:
    """What is gathered from the tables of a part, while no more than one of them is held."""

    def __init__(self, config: Config, part: Part, held_out: bool, known: KnownClaims) -> None:
        self._config, self._part, self._held_out, self._known = config, part, held_out, known
        names, longest = ("a prompt", "a completion", "both together"), config.data.max_length
        self._lengths = {name: np.zeros(longest + 1, np.int64) for name in names}
        self.problem: UserError | None = None  # why the objective cannot be trained on the part
        self.remark: str | None = None  # on the weights that the objective gives the pairs

    def report(self, tables: Iterator[ReadTable]) -> Report:
        """The report of all tables together, with quantiles of lengths."""
        reports = []
        for table, report, where in tables:
            taken = _taken(table, self._part)
            if _is_stream(self._config, self._held_out):  # which has compared its blocks
                self._known.add(claims_in(table, taken)[0])
                reports.append(report)
            else:
                reports.append(with_known(report, table, taken, where, self._known, self._held_out))
            if len(taken):
                groups = GroupDataset(table.select(taken), report["source"], "")
                self._measure(groups)
                with self._problems_kept():
                    self._weigh(fitted(groups, self._config))
        total = reports[0] if len(reports) == 1 else total_report(reports[0]["source"], reports)
        if not total["groups"]:
            self.problem = DataError(f"{total['source']}: {nothing_left(total, self._part.data)}")
        lengths = {name: _quantiles(counts) for name, counts in self._lengths.items() if counts.any()}
        return {**total, "lengths": lengths}

    def _measure(self, groups: GroupDataset) -> None:
        completions = groups.completion_lengths
        prompts = groups.counts.lengths - groups.counts.completion_tokens
        wholes = np.repeat(prompts, groups.counts.sequences) + completions
        for counts, lengths in zip(self._lengths.values(), (prompts, completions, wholes), strict=True):
            counts += np.bincount(lengths, minlength=len(counts))

    @contextmanager
    def _problems_kept(self) -> Iterator[None]:
        """Keep the first UserError that is raised within."""
        try:
            yield
        except UserError as error:
            self.problem = self.problem or error

    def _weigh(self, groups: TabledGroups) -> None:
        """Keep what is to be said of the weights in the first table, as training does of a stream."""
        objective = self._config.bound_objective
        if self.remark is None and not self._config.objective.quantiles:
            self.remark = on_weights(self._config, weights_of(groups, objective))


def _quantiles(counts: np.ndarray) -> dict[str, int]:
    """Quantiles of numbers 0, 1, 2, ..., of which `counts` says how often each occurs."""
    reached = np.cumsum(counts)
    return {name: int(np.searchsorted(reached, q * reached[-1])) for name, q in QUANTILES.items()}


def _show(reports: dict[str, Report], console: Console, stops: bool) -> None:
    """Print a column for each part, and below it a line for each thing that was dropped, cut, or is odd, and
    for the first examples that cannot be read; `stops`: training ends at these."""
    fitting, columns = max(1, (console.width - LABEL) // CELL), list(reports.items())
    for first in range(0, len(columns), fitting):
        console.print(_table(dict(columns[first : first + fitting])))
    console.print(f"tokens of: {' / '.join(QUANTILES)}", markup=False)
    for label, report in reports.items():
        for finding in findings(report):
            console.print(f"{label}: {finding}", soft_wrap=True, markup=False)
        unreadable = report.get("where", {}).get(UNREADABLE, [])
        for place in _each_reason_once(unreadable)[:MOST_SHOWN] if label != TOTAL else ():
            console.print(f"  {place}", soft_wrap=True, markup=False)
        if stops and unreadable:
            console.print(f"{label}: training would stop there (data.on_bad_row)", markup=False)


def _each_reason_once(places: list[str]) -> list[str]:
    """The places of unreadable examples, each with its reason: those of a further reason, and how many more
    have the same one."""
    by_reason: dict[str, list[str]] = {}
    for place in places:
        by_reason.setdefault(place.partition(": ")[2], []).append(place)
    return [
        first if not more else f"{first} (and {counted(len(more), 'more row', 'more rows')} alike)"
        for first, *more in by_reason.values()
    ]


LABEL, CELL = 20, 28
"""Columns of the terminal for the name of a line, and for the lengths of a part."""


def _table(reports: dict[str, Report]) -> Table:
    """A column for each part."""
    table = Table("", box=None, pad_edge=False)
    for label in reports:
        table.add_column(label, justify="right", no_wrap=True)
    for name in ("rows", "groups", "tokens"):
        table.add_row(name, *(f"{report[name]:,}" for report in reports.values()))
    table.add_row("tokens of")
    own_lengths = [report.get("lengths", {}) for report in reports.values()]
    for name in dict.fromkeys(name for lengths in own_lengths for name in lengths):
        lengths = (lengths.get(name, {}).values() for lengths in own_lengths)
        table.add_row(f"  {name}", *(" / ".join(map(str, own)) for own in lengths))
    return table


def _write(folder: Path, reports: dict[str, Report]) -> Path:
    folder = make_folder("output_dir", folder)
    path = folder / ("data_check.json" if (folder / "run.json").exists() else "data_report.json")
    write_atomically(path, json.dumps(reports, indent=2) + "\n")
    return path
