"""Preference training of a segmentation network: the objectives want scores, not a language model.

    python examples/segmentation_dpo.py --output runs/segmentation    # about a minute on two CPU cores

A small U-Net learns shapes from careless masks and is frozen as the reference. Two sketches of each further
image vary its outline, and a judge says which of them overlaps the shape more. From those answers alone,
copies of the reference learn under four objectives, and are measured on images that none has seen.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from madpo.trainer.objectives import BoundObjective, EdgeScores, build

FORMS = {
    "base": build("dpo", beta=20.0),
    "linear anchor": build("anchored_dpo", beta=20.0, anchor="linear", alpha=0.3),
    "LSE anchor": build("anchored_dpo", beta=20.0, anchor="lse", alpha=10.0),
    "hinge anchor": build("anchored_dpo", beta=20.0, anchor="hinge", alpha=10.0, tau=0.4),
}
"""The base form and the linear anchor see s+ - s- alone, in which every pixel that both masks agree on
cancels: nothing but the shared weights holds it, and a large step makes holes there. LSE and hinge see s+
by itself too. Log-likelihoods are never positive, so LSE is bounded by 0 here, a tau above 0 makes the hinge
imitate the chosen mask at any score, and only the linear anchor has no floor: its alpha must stay small."""


@dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    seed: int = 0
    side: int = 48  # pixels; a multiple of 8
    careless: int = 256  # images with a careless mask, for the reference
    pairs: int = 1024
    held_out: int = 512
    batch: int = 16
    reference_steps: int = 400
    steps: int = 250


class Shapes(NamedTuple):
    images: Tensor  # (B, 3, H, W) in [0, 1]
    distances: Tensor  # (B, H, W) from the outline, roughly in pixels; negative inside


class Pairs(NamedTuple):
    """All that preference training sees; the reference itself aside."""

    images: Tensor  # (B, 3, H, W)
    chosen: Tensor  # (B, H, W) bool
    rejected: Tensor  # (B, H, W) bool


class Result(NamedTuple):
    masks: Tensor  # (B, H, W) bool, of the held-out images
    metrics: dict[str, Tensor]  # name -> (B,), one number per held-out image


def smooth_noise(count: int, side: int, random: torch.Generator) -> Tensor:
    """(B, H, W): hills and valleys of some 8 pixels, on a level that differs from image to image."""
    hills = torch.randn(count, 1, side // 8, side // 8, generator=random)
    level = torch.randn(count, 1, 1, 1, generator=random)
    return F.interpolate(hills + level, size=(side, side), mode="bicubic")[:, 0]


def draw_shapes(count: int, side: int, random: torch.Generator) -> Shapes:
    """Triangles, quadrangles and ellipses under a bar, on a mottled ground, blurred and noisy."""

    def between(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(count, *(shape or (1, 1))).uniform_(low, high, generator=random)

    axis = torch.arange(side) - (side - 1) / 2
    y, x = axis[:, None] - between(-0.2, 0.2) * side, axis - between(-0.2, 0.2) * side
    turn, stretch = between(0, 2 * math.pi), between(1, 1.4)
    u, v = (x * turn.cos() + y * turn.sin()) * stretch, (y * turn.cos() - x * turn.sin()) / stretch
    # A regular polygon in polar coordinates, as large as a disc of that radius; 64 corners are a circle.
    sector = 2 * math.pi / torch.tensor([3, 4, 64])[torch.randint(3, (count, 1, 1), generator=random)]
    inradius = between(0.2, 0.3) * side * (sector / 2 / (sector / 2).tan()).sqrt()
    angle = torch.atan2(v, u).remainder(sector) - sector / 2
    distances = torch.hypot(u, v) * angle.cos() - inradius

    ground = between(0.25, 0.75, 3, 1, 1)
    sign = 2 * torch.randint(2, (count, 3, 1, 1), generator=random) - 1
    figure = ground + between(0.15, 0.35, 3, 1, 1) * sign
    mottled = ground + 0.06 * torch.stack([smooth_noise(count, side, random) for _ in range(3)], 1)
    blurred = torch.sigmoid(-distances / between(0.3, 1.5))[:, None]
    images = torch.lerp(mottled, figure.expand_as(mottled), blurred)
    tilt = between(0, math.pi)
    bar = (x * tilt.cos() + y * tilt.sin() + between(-8, 8)).abs() < between(0.7, 3)
    images = torch.where(bar[:, None], ground + between(-0.3, 0.3, 3, 1, 1), images)
    images = images + between(0.03, 0.12, 1, 1, 1) * torch.randn(images.shape, generator=random)
    return Shapes(images.clamp(0, 1), distances)


class UNet(nn.Module):
    """Images (B, 3, H, W) to logits (B, H, W)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fine, self.middle = block(3, width), block(width, 2 * width)
        self.coarse = block(2 * width, 4 * width)
        self.to_middle, self.to_fine = block(6 * width, 2 * width), block(3 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:  # images (B, 3, H, W)
        fine = self.fine(images)
        middle = self.middle(F.max_pool2d(fine, 2))
        coarse = self.coarse(F.max_pool2d(middle, 2))
        middle = self.to_middle(torch.cat([middle, F.interpolate(coarse, scale_factor=2)], 1))
        fine = self.to_fine(torch.cat([fine, F.interpolate(middle, scale_factor=2)], 1))
        return self.head(fine)[:, 0]


def block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def score(
    logits: Tensor,  # (B, H, W)
    masks: Tensor,  # (B, H, W) bool
) -> Tensor:
    """(B,) log-likelihood of each mask, a Bernoulli variable per pixel, as a mean over the pixels.

    Not the sum: beta, alpha and tau mean the same for images of any size, and the two terms of the LSE
    anchor stay comparable, whereas of sums, hundreds of nats apart, it would see the larger alone.
    """
    return -F.binary_cross_entropy_with_logits(logits, masks.float(), reduction="none").mean((1, 2))


def fit(
    model: UNet, count: int, steps: int, lr: float, setup: Setup, loss: Callable[[Tensor], Tensor]
) -> UNet:
    """Minimise loss(rows) over shuffled rows (batch,) of `count`; the order is the seed's."""
    random = torch.Generator().manual_seed(setup.seed)
    epochs = math.ceil(steps * setup.batch / count)
    order = torch.cat([torch.randperm(count, generator=random) for _ in range(epochs)])
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, steps)
    for rows in order[: steps * setup.batch].split(setup.batch):
        optimiser.zero_grad()
        loss(rows).backward()
        optimiser.step()
        schedule.step()
    return model


def train_reference(setup: Setup, random: torch.Generator) -> UNet:
    """Learns from masks that are 2 pixels too wide and uneven, as from a hurried annotator."""
    images, distances = draw_shapes(setup.careless, setup.side, random)
    masks = distances + 2 * smooth_noise(setup.careless, setup.side, random) < 2
    torch.manual_seed(setup.seed)
    model = UNet()

    def loss(rows: Tensor) -> Tensor:  # rows (batch,)
        return -score(model(images[rows]), masks[rows]).mean()

    return fit(model, len(images), setup.reference_steps, 3e-3, setup, loss).requires_grad_(False)


def train_preferences(reference: UNet, objective: BoundObjective, pairs: Pairs, setup: Setup) -> UNet:
    """A copy of the reference after `setup.steps` steps on the pairs."""
    model = copy.deepcopy(reference).requires_grad_(True)
    frozen = predict(reference, pairs.images)
    ref_chosen, ref_rejected = score(frozen, pairs.chosen), score(frozen, pairs.rejected)

    def loss(rows: Tensor) -> Tensor:  # rows (batch,)
        logits = model(pairs.images[rows])
        scores = EdgeScores(
            chosen_logps=score(logits, pairs.chosen[rows]),
            rejected_logps=score(logits, pairs.rejected[rows]),
            ref_chosen_logps=ref_chosen[rows],
            ref_rejected_logps=ref_rejected[rows],
        )
        return objective(scores).mean()

    return fit(model, len(pairs.images), setup.steps, 1e-3, setup, loss)


@torch.no_grad()
def predict(model: UNet, images: Tensor) -> Tensor:  # images (B, 3, H, W)
    """(B, H, W) logits."""
    return torch.cat([model(part) for part in images.split(128)])


def ask(reference: UNet, shapes: Shapes, random: torch.Generator) -> Pairs:
    """Sketch each shape twice; the judge knows it and only says which sketch is better."""
    masks, truth = predict(reference, shapes.images) > 0, shapes.distances < 0
    first, second = sketch(masks, random), sketch(masks, random)
    better = (iou(first, truth) >= iou(second, truth))[:, None, None]
    return Pairs(shapes.images, torch.where(better, first, second), torch.where(better, second, first))


def sketch(masks: Tensor, random: torch.Generator) -> Tensor:  # masks (B, H, W) bool
    """(B, H, W) bool: the outlines moved in and out, unevenly and by less than 5 pixels."""
    ramp = F.avg_pool2d(masks.float()[:, None], 9, stride=1, padding=4)[:, 0]
    noise = 0.25 * smooth_noise(len(masks), masks.shape[-1], random)
    return ramp + noise.clamp(-0.45, 0.45) > 0.5


def iou(one: Tensor, other: Tensor) -> Tensor:  # (B, H, W) bool each
    """(B,) intersection over union."""
    return (one & other).sum((1, 2)) / (one | other).sum((1, 2)).clamp(min=1)


def rim(masks: Tensor, width: int = 2) -> Tensor:  # masks (B, H, W) bool
    """(B, H, W) bool: the pixels of each mask within `width` of its outside."""
    outside = F.max_pool2d((~masks).float()[:, None], 2 * width + 1, stride=1, padding=width)[:, 0] > 0
    return masks & outside


def measure(model: UNet, pairs: Pairs, truth: Tensor) -> Result:  # truth (B, H, W) bool
    """Boundary IoU is that of the rims (Cheng et al. 2021, arXiv 2103.16562)."""
    logits = predict(model, pairs.images)
    masks = logits > 0
    overlap, chosen = iou(masks, truth), score(logits, pairs.chosen)
    accuracy = (chosen > score(logits, pairs.rejected)).float()
    return Result(
        masks,
        {
            "IoU": overlap,
            "Dice": 2 * overlap / (1 + overlap),
            "boundary IoU": iou(rim(masks), rim(truth)),
            "preference accuracy": accuracy,
            "score of the better": chosen,
        },
    )


def experiment(setup: Setup) -> tuple[Shapes, dict[str, Result]]:
    """The held-out shapes, and what the reference and each of FORMS make of them."""
    random = torch.Generator().manual_seed(setup.seed)
    reference = train_reference(setup, random)
    pairs = ask(reference, draw_shapes(setup.pairs, setup.side, random), random)
    shapes = draw_shapes(setup.held_out, setup.side, random)
    unseen, truth = ask(reference, shapes, random), shapes.distances < 0
    results = {"reference": measure(reference, unseen, truth)}
    for name, objective in FORMS.items():
        results[name] = measure(train_preferences(reference, objective, pairs, setup), unseen, truth)
    return shapes, results


def mean_and_error(values: Tensor) -> tuple[float, float]:  # values (B,)
    """Their mean and its standard error."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def tabulate(results: dict[str, Result]) -> Table:
    before = results["reference"].metrics
    table = Table("", *before, "IoU gained", title="held-out images, mean ± standard error")
    for name, (_, metrics) in results.items():
        cells = ["{:.3f} ± {:.3f}".format(*mean_and_error(values)) for values in metrics.values()]
        # By image: what is difficult about an image is difficult for both, and cancels.
        gain, error = mean_and_error(metrics["IoU"] - before["IoU"])
        colour = "green" if gain > 3 * error else "red" if gain < -3 * error else "yellow"
        last = f"[{colour}]{gain:+.3f} ± {error:.3f}[/]" if name != "reference" else ""
        table.add_row(name, *cells, last)
    return table


def save_picture(shapes: Shapes, results: dict[str, Result], path: Path, rows: int = 6) -> None:
    """The first held-out images, not the best: what each mask has too much of and what it lacks."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = ListedColormap(["#f2f3f5", "#2b3a55", "#3d8fd1", "#f08a24"])
    truth = shapes.distances < 0
    named = {"truth": truth} | {name: result.masks for name, result in results.items()}
    figure = Figure(figsize=(1.5 * (1 + len(named)), 1.62 * rows + 0.7), layout="constrained")
    grid = figure.subplots(rows, 1 + len(named))
    for row in range(rows):
        grid[row, 0].imshow(shapes.images[row].permute(1, 2, 0))
        for axes, (name, masks) in zip(grid[row, 1:], named.items(), strict=True):
            mask, right = masks[row], truth[row]
            axes.imshow((mask & right) + 2 * (right & ~mask) + 3 * (mask & ~right), colours, vmin=0, vmax=3)
            if name != "truth":
                axes.set_xlabel(f"IoU {iou(masks, truth)[row]:.2f}", fontsize=8, labelpad=2)
    for axes, name in zip(grid[0], ["image", *named], strict=True):
        axes.set_title(name, fontsize=10)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    labels = ("right", "missing", "too much")
    keys = [Patch(color=colours(1 + index), label=label) for index, label in enumerate(labels)]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(
    output: Annotated[Path, typer.Option(help="folder of the picture")] = Path("runs/segmentation"),
    seed: Annotated[int, typer.Option(help="of data, weights and order")] = 0,
) -> None:
    """Train the four forms from one reference; print a table and save a picture."""
    if find_spec("matplotlib") is None:
        raise ValueError('the picture needs matplotlib: pip install "madpo[report]"')
    began = time.perf_counter()
    shapes, results = experiment(Setup(seed=seed))
    save_picture(shapes, results, output / "segmentation_dpo.png")
    Console().print(tabulate(results))
    print(f"{output / 'segmentation_dpo.png'} after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    typer.run(main)
