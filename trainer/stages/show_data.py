"""Show the first groups of training as the model sees them, and what became of all examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from madpo.trainer.config.locate import located
from madpo.trainer.config.schema import Config
from madpo.trainer.counted import counted
from madpo.trainer.data.groups import check_groups
from madpo.trainer.data.order import DataOrder
from madpo.trainer.data.plain_text import special_spellings
from madpo.trainer.data.report import COUNTS, findings
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.data.training_data import merged, report_of_merged, told, training_groups
from madpo.trainer.data.views.mismatched import MismatchedDataset
from madpo.trainer.errors import UserError
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.base import Need
from madpo.trainer.stages.end_of_turn import LOOKED_AT, endless

Decode = Callable[[Sequence[int]], str]
PROMPT = "dim"
STYLES = {1: "green", -1: "red", 0: "yellow"}
"""Label of a completion -> its colour: desirable or better than most, the opposite, neither."""


def show_data(config: Config, count: int, console: Console) -> None:
    """Print `count` groups in the order of training, then the totals. Needs neither ranks nor a model.

    Raises UserError for data that cannot be read, and, after showing it, for data that the objective cannot
    use.
    """
    config = located(config)
    tokenizer = load_tokenizer(config.model)
    objective = config.bound_objective
    if config.data.streaming:
        raise UserError(
            "data.streaming: show-data looks at the whole set; copy some rows into a file, and set "
            "data.streaming=false and data.dataset_name to it; madpo check-data reads streams"
        )
    groups, reports = training_groups(config, tokenizer)
    borrows = Need.MISMATCHED in objective.needs
    if borrows:
        groups = MismatchedDataset(groups, config.seed, config.data.max_length)
    groups = merged(groups, config)
    reports = told(report_of_merged(groups, reports)(), objective)
    report = next(iter(reports.values()))  # the report of all parts together
    order = DataOrder(len(groups), config.seed, groups.ease(config.data.order))
    decode, coloured = decoder(tokenizer), console.is_terminal and not console.no_color
    lines: list[Text] = []
    for index in order.take(0, min(count, len(groups))).tolist():
        title = f"{groups.name}, row {groups.rows[index]}"
        lines += render_group(groups[index], decode, title, coloured, borrows)
    tokens, trained = int(groups.counts.lengths.sum()), int(groups.counts.scored_tokens.sum())
    console.print(*lines, *render_totals(report, tokens, trained, coloured), sep="\n", soft_wrap=True)
    no_end = endless(groups, order.take(0, min(LOOKED_AT, len(groups))), tokenizer)
    if no_end and not objective.is_reward_model:
        console.print(no_end, style="yellow", soft_wrap=True)
    if config.data.min_weight is not None or config.data.sampling != "uniform":
        console.print("data.min_weight and data.sampling are not applied here", style="yellow")
    budget, shares = config.train.row_tokens, config.model.prefix_sharing
    check_groups(groups, objective, budget, shares)


def decoder(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """A function from token ids to text with special tokens; what only spells one has a backslash before."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    spellings = special_spellings(tokenizer)

    def written(ids: Iterable[int]) -> str:
        text: Any = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def decode(ids: Sequence[int]) -> str:
        text = written(ids)
        if spellings is None or len(spellings.findall(text)) == sum(number in special for number in ids):
            return text
        parts = ((real, written(run)) for real, run in groupby(ids, special.__contains__))
        return "".join(part if real else spellings.sub(r"\\\g<0>", part) for real, part in parts)

    return decode


def render_group(
    group: TokenGroup, decode: Decode, title: str, coloured: bool, borrows: bool = False
) -> Iterator[Text]:
    """A group as lines: the prompt once, then every completion with its margins or label.

    What is trained on is coloured, or stands in [[ ]]. With `borrows`, completions of label 0 belong to
    another prompt.
    """
    yield Text(f"── {title}", style="bold")
    moved = f"; {group.boundary_cut} more merge with the completion and count as its tokens"
    yield _header("prompt", len(group.prompt), moved if group.boundary_cut else "")
    yield _body([(decode(group.prompt), PROMPT if coloured else "")])
    masks = group.whole_masks
    for index, (completion, mask) in enumerate(zip(group.completions, masks, strict=True)):
        label = group.labels[index] if group.labels else 1
        not_scored = len(mask) - sum(mask)
        note = f", {not_scored} of them not trained on" if not_scored else ""
        yield _header(_name(group, index), len(completion), note + _standing(group, index, borrows))
        pieces = _pieces(group.prompt, completion, mask, decode)
        if coloured:
            yield _body([(text, STYLES[label] if scored else PROMPT) for scored, text in pieces])
        else:
            yield _body([(f"[[{text}]]" if scored else text, "") for scored, text in pieces])
    if group.equal:
        yield Text(f"{group.equal} {COUNTS['comparisons_of_equal_tokens']}", style="bold")
    if group.truncated:
        yield Text(f"{group.truncated} {COUNTS['truncated_completions']}", style="bold")
    yield Text()


def _header(name: str, tokens: int, note: str) -> Text:
    return Text(f"{name}, {tokens} token{'s' * (tokens != 1)}{note}", style="bold")


def _body(pieces: Iterable[tuple[str, str]]) -> Text:
    """Pieces of text, each with its style, as lines behind a bar. Control characters are escaped, because a
    terminal would obey them."""
    whole = Text.assemble(*((_escaped(text), style) for text, style in pieces))
    return Text("\n").join(Text.assemble("│ ", line) for line in whole.split("\n", allow_blank=True))


def _escaped(text: str) -> str:
    return "".join(x if x.isprintable() or x in "\n\t" else x.encode("unicode_escape").decode() for x in text)


def _pieces(
    prompt: list[int], completion: list[int], mask: list[bool], decode: Decode
) -> Iterator[tuple[bool, str]]:
    """The completion's text in pieces, each with whether it is scored."""
    before = prompt
    for scored, run in groupby(zip(completion, mask, strict=True), itemgetter(1)):
        ids = [token for token, _ in run]
        yield scored, _after(before, ids, decode)
        before = before + ids


def _after(before: list[int], ids: list[int], decode: Decode) -> str:
    """The text of tokens after those before; decoded by themselves, some tokenizers drop a leading space."""
    whole, head = decode(before + ids), decode(before)
    return whole.removeprefix(head) if whole.startswith(head) else decode(ids)


def _name(group: TokenGroup, index: int) -> str:
    if len(group.completions) == 1:
        return "completion"
    if len(group.edges) == 1 and index in group.edges[0][:2]:
        return "chosen" if group.edges[0][0] == index else "rejected"
    return f"completion {index + 1}"


def _standing(group: TokenGroup, index: int, borrows: bool) -> str:
    """A completion's margins against others, or its label."""
    if borrows and group.labels[index] == 0:
        return ", of another prompt"
    if not group.edges:
        return {1: ", desirable", -1: ", undesirable"}[group.labels[index]] if group.labels else ""
    wins = [(rejected, margin) for chosen, rejected, margin in group.edges if chosen == index]
    if len(group.edges) == 1:
        return f", margin {wins[0][1]:g}" if wins and wins[0][1] is not None else ""
    beaten = [f"{rejected + 1}" + ("" if margin is None else f" by {margin:g}") for rejected, margin in wins]
    return f", better than {', '.join(beaten)}" if beaten else ""


def render_totals(report: dict[str, Any], tokens: int, trained: int, coloured: bool) -> Iterator[Text]:
    """What became of all examples, as lines; zeros are left out. A prompt counts once per group."""
    totals = f"{counted(report['rows'], 'example')}, {counted(report['groups'], 'group')}"
    yield Text(f"── {report['source']}: {totals}", style="bold")
    if "without_fold" in report:
        yield Text(f"fold {report['without_fold']} is left out", style="bold")
    if report.get("rows_merged"):
        rows, saved = counted(report["rows_merged"], "example"), report["tokens_saved_by_merging"]
        yield Text(f"{rows} merged by prompt, {counted(saved, 'token')} saved")
    shown = "coloured" if coloured else "in [[ ]]"
    yield Text(f"{counted(tokens, 'token')}, {trained / tokens:.1%} of them trained on, {shown}")
    yield from map(Text, findings(report))
    if report["texts_that_spell_special_tokens"]:
        yield Text(r"what spells a special token as letters has a \ before it")
    for kind in ("margin", "weight"):
        if f"{kind}_mean" in report:
            low, mean, high = (report[f"{kind}_{name}"] for name in ("min", "mean", "max"))
            yield Text(f"{kind}s from {low:g} to {high:g}, mean {mean:.4g}")
