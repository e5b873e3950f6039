"""Preference training of a segmentation network: the objectives want scores, not a language model.

    python examples/segmentation_dpo.py --output runs/segmentation    # about a minute on one CPU core

A small U-Net learns shapes from careless masks and is frozen as the reference. For every further image it
draws two sketches, and a judge says which of them overlaps the shape more. From these answers alone, copies
of the reference are trained with four objectives, and measured on images that none of them has seen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from madpo.trainer.objectives import BoundObjective, EdgeScores, build

FORMS = {
    "base": build("dpo", beta=20.0),
    "linear anchor": build("anchored_dpo", beta=20.0, anchor="linear", alpha=0.1),
    "LSE anchor": build("anchored_dpo", beta=5.0, anchor="lse", alpha=10.0),
    "hinge anchor": build("anchored_dpo", beta=5.0, anchor="hinge", alpha=10.0, tau=0.4),
}
"""Objectives with parameters tuned on other seeds. With s+ and s- the scores of the chosen and rejected mask:

Base and linear depend on s+ - s- alone. Where both masks agree they leave a pixel to the shared weights, and
with a smaller beta or a larger alpha blobs grow there. LSE and hinge depend on s+ itself too. As scores are
never positive, LSE has a floor here, and the hinge pushes s- no lower than -tau; linear has no floor.
The control to beat is a hinge with a beta near 0 and tau 0, which only imitates the chosen masks.
"""


@dataclass(frozen=True)
class Setup:
    seed: int = 0
    side: int = 48  # pixels; a multiple of 8
    careless: int = 256  # images with a careless mask, for the reference
    pairs: int = 1024
    held_out: int = 512
    batch: int = 16
    reference_steps: int = 400
    steps: int = 200


class Pairs(NamedTuple):
    """The data of preference training."""

    images: Tensor  # (B, 3, H, W) in [0, 1]
    chosen: Tensor  # (B, H, W) bool
    rejected: Tensor  # (B, H, W) bool


def smooth_noise(count: int, side: int, random: torch.Generator) -> Tensor:
    """(B, H, W) hills and valleys of some 8 pixels, on a level that differs from image to image."""
    hills = torch.randn(count, 1, side // 8, side // 8, generator=random)
    level = torch.randn(count, 1, 1, 1, generator=random)
    return F.interpolate(hills + level, size=(side, side), mode="bicubic")[:, 0]


def draw_shapes(count: int, side: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W), and distances (B, H, W) from the outline, about in pixels, negative inside."""

    def between(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(count, *(shape or (1, 1))).uniform_(low, high, generator=random)

    axis = torch.arange(side) - (side - 1) / 2
    y, x = axis[:, None] - side * between(-0.2, 0.2), axis - side * between(-0.2, 0.2)
    turn, tilt, stretch = between(0, 2 * math.pi), between(0, math.pi), between(1, 1.4)
    u, v = (x * turn.cos() + y * turn.sin()) * stretch, (y * turn.cos() - x * turn.sin()) / stretch
    # A regular polygon in polar coordinates, of the area of a disc; with 64 corners it is one.
    sector = 2 * math.pi / torch.tensor([3, 4, 64])[torch.randint(3, (count, 1, 1), generator=random)]
    inradius = side * between(0.2, 0.3) * (sector / 2 / (sector / 2).tan()).sqrt()
    distances = torch.hypot(u, v) * (torch.atan2(v, u).remainder(sector) - sector / 2).cos() - inradius
    bar = (x * tilt.cos() + y * tilt.sin() + between(-8, 8)).abs() < between(0.7, 2.5)

    ground, bright = between(0.25, 0.75, 3, 1, 1), between(-1, 1, 3, 1, 1).sign()
    figure, cover = ground + bright * between(0.15, 0.35, 3, 1, 1), ground + between(-0.3, 0.3, 3, 1, 1)
    blurred = torch.sigmoid(-distances / between(0.3, 1.5))[:, None]
    images = torch.where(bar[:, None], cover, torch.lerp(ground, figure, blurred))
    grain = between(0.02, 0.1) * torch.randn(distances.shape, generator=random)
    grain += 0.06 * smooth_noise(count, side, random)
    images = (images + grain[:, None]).clamp(0, 1)
    return images.contiguous(memory_format=torch.channels_last), distances  # faster convolutions on a CPU


def network(width: int = 8) -> nn.Sequential:
    """A small U-Net: images (B, 3, H, W) to logits (B, H, W)."""
    one, two, four = width, 2 * width, 4 * width
    coarse = Below(layer(two, four), layer(four, four))
    middle = Below(layer(one, two), layer(two, two), coarse, layer(four + two, two), layer(two, two))
    fine = layer(3, one), layer(one, one), middle, layer(two + one, one), layer(one, one)
    return nn.Sequential(*fine, nn.Conv2d(one, 1, 1), nn.Flatten(1, 2))


def layer(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU())


class Below(nn.Sequential):
    """Runs its layers at half the resolution, and concatenates their output to its input."""

    def forward(self, input: Tensor) -> Tensor:  # input (B, C, H, W)
        return torch.cat([input, F.interpolate(super().forward(F.max_pool2d(input, 2)), scale_factor=2)], 1)


def score(logits: Tensor, masks: Tensor) -> Tensor:  # (B, H, W), (B, H, W) bool
    """(B,) log-likelihood of each mask, a Bernoulli variable per pixel, as a mean over the pixels.

    With the mean, beta, alpha and tau mean the same for images of any size. Sums would be hundreds of nats
    apart, and the LSE anchor would depend on the larger one alone.
    """
    return -F.binary_cross_entropy_with_logits(logits, masks.float(), reduction="none").mean((1, 2))


def fit(model: nn.Module, loss: Callable[[Tensor], Tensor], batches: Tensor, lr: float) -> nn.Module:
    """Minimise loss(indices) over the batches, (steps, batch) indices."""
    optimiser = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, len(batches))
    for rows in batches:
        optimiser.zero_grad()
        loss(rows).backward()
        optimiser.step()
        schedule.step()
    return model.requires_grad_(False)


def train_reference(setup: Setup, random: torch.Generator) -> nn.Module:
    """Train the reference on masks that are 2 pixels too wide and uneven, as by a hurried annotator."""
    images, distances = draw_shapes(setup.careless, setup.side, random)
    masks = distances + 2 * smooth_noise(setup.careless, setup.side, random) < 2
    batches = torch.randint(len(images), (setup.reference_steps, setup.batch), generator=random)
    torch.manual_seed(setup.seed)
    model = network()

    def loss(rows: Tensor) -> Tensor:  # rows (batch,)
        return -score(model(images[rows]), masks[rows]).mean()

    return fit(model, loss, batches, 3e-3)


def train(reference: nn.Module, objective: BoundObjective, pairs: Pairs, batches: Tensor) -> nn.Module:
    """Train a copy of the reference on the pairs; batches (steps, batch) index them."""
    model, frozen = copy.deepcopy(reference), reference(pairs.images)
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

    return fit(model, loss, batches, 1e-3)


def ask(reference: nn.Module, images: Tensor, truth: Tensor, random: torch.Generator) -> Pairs:
    """Draw two sketches of each image, and choose the one that overlaps the truth (B, H, W) more."""
    # A sketch is the reference's mask, its outline moved in and out unevenly and by less than 5 pixels.
    ramp = F.avg_pool2d((reference(images) > 0).float()[:, None], 9, stride=1, padding=4)[:, 0]
    noises = [0.25 * smooth_noise(len(images), images.shape[-1], random) for _ in range(2)]
    first, second = (ramp + noise.clamp(-0.45, 0.45) > 0.5 for noise in noises)
    better = (iou(first, truth) >= iou(second, truth))[:, None, None]
    return Pairs(images, torch.where(better, first, second), torch.where(better, second, first))


def iou(one: Tensor, other: Tensor) -> Tensor:  # (B, H, W) bool each
    """(B,) intersection over union."""
    return (one & other).sum((1, 2)) / (one | other).sum((1, 2)).clamp(min=1)


def rim(masks: Tensor) -> Tensor:  # masks (B, H, W) bool
    """(B, H, W) bool: pixels of a mask less than 3 from one outside it. The image's edge does not count."""
    return masks & (F.max_pool2d((~masks).float()[:, None], 5, stride=1, padding=2)[:, 0] > 0)


def measure(model: nn.Module, pairs: Pairs, truth: Tensor) -> dict[str, Tensor]:  # truth (B, H, W) bool
    """Percentages, (B,) each. Boundary IoU is that of the rims (Cheng et al. 2021, arXiv 2103.16562)."""
    logits = model(pairs.images)
    overlap = iou(logits > 0, truth)
    won = score(logits, pairs.chosen) > score(logits, pairs.rejected)
    return {
        "IoU": 100 * overlap,
        "Dice": 200 * overlap / (1 + overlap),
        "boundary IoU": 100 * iou(rim(logits > 0), rim(truth)),
        "accuracy": 100 * won.float(),
    }


def experiment(setup: Setup) -> tuple[dict[str, nn.Module], Pairs, Tensor]:
    """Train all models; returns them, the held-out pairs, and their true masks (B, H, W)."""
    random = torch.Generator().manual_seed(setup.seed)
    reference = train_reference(setup, random)
    seen, unseen = (draw_shapes(count, setup.side, random) for count in (setup.pairs, setup.held_out))
    pairs, held_out = (ask(reference, images, far < 0, random) for images, far in (seen, unseen))
    batches = torch.randint(setup.pairs, (setup.steps, setup.batch), generator=random)
    models = {name: train(reference, form, pairs, batches) for name, form in FORMS.items()}
    return {"reference": reference} | models, held_out, unseen[1] < 0


def tabulate(measured: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Means and standard errors. Gains are paired: an image's difficulty cancels in the difference."""
    before = measured["reference"]
    lines = [f"{'% ± std. error':14}" + "".join(f"{name:>13}" for name in (*before, "IoU gained"))]
    for name, metrics in measured.items():
        columns = *metrics.values(), metrics["IoU"] - before["IoU"]
        cells = (f"{values.mean():7.1f} ± {values.std() / len(values) ** 0.5:.1f}" for values in columns)
        lines.append(f"{name:14}" + "".join(cells))
    return "\n".join(lines)


def save_picture(models: Mapping[str, nn.Module], images: Tensor, truth: Tensor, path: Path) -> None:
    """Save a row for each image (B, 3, H, W), with masks coloured by the truth (B, H, W) bool."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = torch.tensor([[242, 243, 245], [43, 58, 85], [61, 143, 209], [240, 138, 36]]) / 255
    masks = torch.stack([truth, *(model(images) > 0 for model in models.values())])  # (masks, B, H, W)
    kinds = (masks & truth) + 2 * (truth & ~masks) + 3 * (masks & ~truth)
    columns = images.movedim(1, 3), *colours[kinds]  # (B, H, W, 3) each
    tiles = [F.pad(column, (0, 0, 2, 2, 0, 10), value=1) for column in columns]
    figure = Figure(figsize=(1.5 * len(tiles), 1.65 * len(images) + 0.7), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(torch.cat(tiles, 2).flatten(0, 1))
    axes.set_axis_off()
    height, width = tiles[0].shape[1:3]
    for column, name in enumerate(["image", "truth", *models]):
        axes.text((column + 0.5) * width, -3, name, ha="center")
        for row, overlap in enumerate(iou(masks[column - 1], truth) if column > 1 else ()):
            place = (column + 0.5) * width, (row + 1) * height - 5
            axes.text(*place, f"IoU {overlap:.2f}", ha="center", size="small")
    names = "right", "missing", "too much"
    keys = [Patch(color=colour, label=name) for colour, name in zip(colours[1:].tolist(), names, strict=True)]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.15)


def main(
    output: Annotated[Path, typer.Option(help="folder of the picture")] = Path("runs/segmentation"),
    seed: Annotated[int, typer.Option(help="of data, weights and order")] = 0,
) -> None:
    """Train the four forms from one reference; print a table and save a picture."""
    torch.set_num_threads(1)  # or the last digits depend on how many there are
    models, pairs, truth = experiment(Setup(seed=seed))
    print(tabulate({name: measure(model, pairs, truth) for name, model in models.items()}))
    path = output / "segmentation_dpo.png"
    save_picture(models, pairs.images[:6], truth[:6], path)  # the first, not the best
    print(path)


if __name__ == "__main__":
    typer.run(main)
