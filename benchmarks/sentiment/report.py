"""The report of the sentiment experiment: tables as Markdown, the frontier as a picture."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from madpo.benchmarks.sentiment.results import (
    PAPER,
    Estimate,
    Sample,
    Setting,
    at_equal_kl,
    difference,
    estimate,
    read,
)
from madpo.benchmarks.sentiment.tiers import TIERS

METHODS = {"madpo": "MADPO", "beta-dpo": "β-DPO", "dpo": "DPO", "ipo": "IPO", "mixdpo": "MixDPO"}
ARMS = {
    "madpo": "reward model's margins, τ at their 80 % quantile",
    "madpo-paper-tau": "reward model's margins, τ = 6.9 as in the paper",
    "madpo-cross-fitted": "margins by models that did not train on the pair, τ quantile",
    "madpo-oracle": "the oracle's own margins, τ quantile",
    "madpo-noised": "the oracle's margins with noise of their own spread, τ quantile",
}
SHORT = {
    **METHODS,
    "madpo": "MADPO, τ quantile",
    "madpo-paper-tau": "MADPO, τ 6.9",
    "madpo-cross-fitted": "MADPO, cross-fitted",
    "madpo-oracle": "MADPO, oracle's margins",
    "madpo-noised": "MADPO, noised margins",
}
"""Methods as the picture and its table call them; COLOURS has theirs."""
COLOURS = (
    "#6ea8ee",
    "#8a5fb0",
    "#444444",
    "#d9772b",
    "#3a9168",
    "#c62f4a",
    "#98a4f5",
    "#0f8b8d",
    "#a67c00",
)
Frontier = list[tuple[float, Estimate]]
"""KL and reward of a method at each of its betas."""
Settings = Mapping[Setting, Sample]


def write(
    output: Path,
    results: str,
    pairs: str,
    recipe: str,
    seeds: Sequence[int],
    title: str,
    beta: float = 0.1,
) -> None:
    """Write `sentiment.md` and `frontier.svg`.

    `results` is the folder that `evaluate` filled, `pairs` the folder of the tiers, and `recipe` that of the
    whole recipe, with the reward models' margins.
    """
    sft, settings = read(Path(results))
    parts = [
        f"# {title}\n",
        *_of_the_paper(sft, settings, beta),
        *_arms(settings, beta),
        *_frontier(settings),
        *_verdict(settings, beta),
        *_margins(Path(pairs), Path(recipe), seeds),
    ]
    output.mkdir(parents=True, exist_ok=True)
    (output / "sentiment.md").write_text("\n".join(parts) + "\n", encoding="utf-8")
    print("\n".join(parts))
    plot(sft, settings, output / "frontier.svg")


def _of_the_paper(sft: Sample, settings: Settings, beta: float) -> Iterator[str]:
    count = max((len(s.rewards) for s in settings.values()), default=0)
    yield (
        f"Mean oracle reward of one completion for each of {sft.rewards.shape[1]} held-out prompts; "
        f"{count} seeds; ± one standard error over seeds and prompts. SFT model: {estimate(sft.rewards)}.\n"
    )
    yield f"## β = {beta:g}\n"
    rows = []
    for tier in TIERS:
        dpo = settings.get(Setting("dpo", beta, tier))
        for arm, label in METHODS.items():
            sample = settings.get(Setting(arm, beta, tier))
            if sample is None:
                continue
            against = difference(sample, dpo).signed if dpo is not None and arm != "dpo" else ""
            paper = PAPER.get(arm, {}).get(tier)
            gap = f"{paper - PAPER['dpo'][tier]:+.2f}" if paper is not None and arm != "dpo" else ""
            kl, length = f"{sample.kls.mean():.1f}", f"{sample.lengths.mean():.1f}"
            shown = f"{paper:.2f}" if paper is not None else ""
            rows.append((tier, label, str(estimate(sample.rewards)), against, kl, length, shown, gap))
    yield _table(
        ("tier", "method", "reward", "less DPO's", "KL", "tokens", "paper: reward", "paper: less DPO's"), rows
    )


def _arms(settings: Settings, beta: float) -> Iterator[str]:
    rows = []
    for tier in TIERS:
        dpo, base = (settings.get(Setting(arm, beta, tier)) for arm in ("dpo", "madpo"))
        for arm, label in ARMS.items():
            sample = settings.get(Setting(arm, beta, tier))
            if sample is not None and dpo is not None and base is not None:
                against = "" if arm == "madpo" else difference(sample, base).signed
                rows.append(
                    (
                        tier,
                        label,
                        str(estimate(sample.rewards)),
                        difference(sample, dpo).signed,
                        against,
                        f"{sample.kls.mean():.1f}",
                    )
                )
    if rows:
        yield "\n## MADPO with other margins\n"
        yield _table(("tier", "margins and τ", "reward", "less DPO's", "less the first's", "KL"), rows)


def _frontier(settings: Settings) -> Iterator[str]:
    rows = []
    for tier in TIERS:
        reach = [s.kls.mean() for x, s in settings.items() if (x.arm, x.tier) == ("dpo", tier)]
        if len(reach) < 2:
            continue
        for arm, label in SHORT.items():
            for beta in _betas(settings, arm, tier) if arm != "dpo" else []:
                sample = settings[Setting(arm, beta, tier)]
                kl = float(sample.kls.mean())
                dpo = at_equal_kl(settings, "dpo", tier, kl)
                there, gap = f"DPO's KLs are {min(reach):.1f} to {max(reach):.1f}", ""
                if dpo is not None:
                    seeds = min(len(dpo), len(sample.rewards))
                    there, gap = str(estimate(dpo)), estimate(sample.rewards[:seeds] - dpo[:seeds]).signed
                rows.append(
                    (tier, label, f"{beta:g}", f"{kl:.1f}", str(estimate(sample.rewards)), there, gap)
                )
    if rows:
        yield "\n## Against DPO at the same KL\n"
        yield "DPO between its two nearest β, on the scale of √KL.\n"
        yield _table(("tier", "method", "β", "KL", "reward", "DPO there", "less DPO's"), rows)


def _verdict(settings: Settings, beta: float) -> Iterator[str]:
    """For each two methods next to each other in the paper's order: whether it holds here, and how surely."""
    yield "\n## Does the paper's order hold here?\n"
    for tier in TIERS:
        order = sorted(PAPER, key=lambda arm: -PAPER[arm][tier])
        verdicts = []
        for better, worse in itertools.pairwise(order):
            one, other = (settings.get(Setting(arm, beta, tier)) for arm in (better, worse))
            if one is None or other is None:
                continue
            gap = difference(one, other)
            sure = abs(gap.mean) > 2 * gap.error
            word = ("yes" if gap.mean > 0 else "**no, reversed**") if sure else "not told apart"
            verdicts.append(f"{METHODS[better]} > {METHODS[worse]}: {word} ({gap.signed})")
        if verdicts:
            yield f"- {tier}: " + "; ".join(verdicts)
    yield '\n"Not told apart" is a difference of less than two standard errors.'


def _margins(pairs: Path, recipe: Path, seeds: Sequence[int]) -> Iterator[str]:
    path = pairs / "facts.json"
    if not path.is_file():
        return
    facts: dict[str, Any] = json.loads(path.read_text())
    rows = []
    for tier in TIERS:
        of_tier = [facts[f"{tier} {seed}"] for seed in seeds]
        quartiles = np.mean([fact["abs_margin_quartiles"] for fact in of_tier], axis=0)
        agrees = np.mean([fact["label_agrees_with_oracle"] for fact in of_tier])
        count, shown = of_tier[0]["pairs"], " / ".join(f"{q:.2f}" for q in quartiles)
        rows.append((tier, str(count), f"{agrees:.1%}", shown, *_reward_models(recipe, tier, seeds)))
    yield "\n## The pairs and the reward models\n"
    yield (
        "Agreement is the cosine between a reward model's margins and the oracle's, both of one sign "
        "convention: 1 is the same up to scale, 0 is chance. Means over the seeds.\n"
    )
    titles = ("tier", "pairs", "label agrees with the oracle", "oracle's absolute margins, quartiles")
    of_models = ("agreement, own pairs", "agreement, held out", "80 % of its absolute margins below")
    yield _table((*titles, *of_models), rows)


def _reward_models(recipe: Path, tier: str, seeds: Sequence[int]) -> tuple[str, str, str]:
    """Means over the stages `margins_*`: (agreement on the pairs trained on, on others, quantile)."""
    of_seeds = []
    for folder in (recipe / f"margins_{tier}_{seed}" / "annotated" for seed in seeds):
        if not folder.is_dir():
            continue
        train, test = (_margin_pairs(folder / f"{split}.jsonl") for split in ("train", "test"))
        of_seeds.append((_cosine(train), _cosine(test), float(np.quantile(np.abs(train[:, 0]), 0.8))))
    if not of_seeds:
        return "", "", ""
    own, held_out, high = np.mean(of_seeds, axis=0)
    return f"{own:.2f}", f"{held_out:.2f}", f"{high:.2f}"


def _margin_pairs(path: Path) -> np.ndarray:
    """(n, 2) the reward model's margin and the oracle's of every scored pair."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return np.array([(row["margin"], row["margin_given"]) for row in rows])


def _cosine(pairs: np.ndarray) -> float:
    return float((pairs[:, 0] @ pairs[:, 1]) / np.sqrt(np.prod((pairs**2).sum(0))))


def _betas(settings: Settings, arm: str, tier: str) -> list[float]:
    return sorted(x.beta for x in settings if (x.arm, x.tier) == (arm, tier))


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = tuple(titles)
    lines = [titles, ("---",) * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(sft: Sample, settings: Settings, path: Path) -> None:
    """Plot reward against sqrt(KL), in a panel for each tier that has an arm with several betas."""
    tiers = [t for t in TIERS if any(len(_betas(settings, arm, t)) > 1 for arm in METHODS)]
    if tiers:
        draw({tier: _frontiers(settings, tier) for tier in tiers}, estimate(sft.rewards).mean, path)


def _frontiers(settings: Settings, tier: str) -> dict[str, Frontier]:
    """The points of every arm that was run on the tier."""
    found = dict[str, Frontier]()
    for arm in SHORT:
        samples = [settings[Setting(arm, beta, tier)] for beta in _betas(settings, arm, tier)]
        points = [(float(sample.kls.mean()), estimate(sample.rewards)) for sample in samples]
        if points:
            found[arm] = sorted(points)
    return found


def draw(frontiers: Mapping[str, Mapping[str, Frontier]], start: float, path: Path) -> None:
    """Draw a panel for each tier; `start` is the reward of the SFT model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1,
        len(frontiers),
        figsize=(6.2 * len(frontiers), 4.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (tier, arms) in zip(axes[0], frontiers.items(), strict=True):
        for (arm, label), colour in zip(SHORT.items(), COLOURS, strict=True):
            if arm not in arms:
                continue
            kls, rewards = zip(*arms[arm], strict=True)
            axis.errorbar(
                kls,
                [reward.mean for reward in rewards],
                [reward.error for reward in rewards],
                color=colour,
                marker="o",
                markersize=7 if arm == "madpo-paper-tau" else 4.5,
                linewidth=1.4,
                capsize=2,
                label=label,
            )
        axis.plot([0], [start], "k*", markersize=11, clip_on=False, zorder=5, label="starting model (SFT)")
        axis.set_xscale("function", functions=(np.sqrt, np.square))
        axis.set_xlim(left=0)
        axis.set_title(f"{tier} tier: reward bought with KL, ± one standard error", fontsize=10)
        axis.set_xlabel("KL from the SFT model, nats per completion (√ scale)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("oracle's reward")
    axes[0][0].legend(frameon=False, fontsize=8.5)
    figure.savefig(path)
    plt.close(figure)
