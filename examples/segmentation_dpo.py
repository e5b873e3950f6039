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
from rich.box import SIMPLE
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


class Pairs(NamedTuple):
    """All that preference training sees beside the reference."""

    images: Tensor  # (B, 3, H, W) in [0, 1]
    chosen: Tensor  # (B, H, W) bool
    rejected: Tensor  # (B, H, W) bool


def smooth_noise(count: int, side: int, random: torch.Generator) -> Tensor:
    """(B, H, W): hills and valleys of some 8 pixels, on a level that differs from image to image."""
    hills = torch.randn(count, 1, side // 8, side // 8, generator=random)
    level = torch.randn(count, 1, 1, 1, generator=random)
    return F.interpolate(hills + level, size=(side, side), mode="bicubic")[:, 0]


def draw_shapes(count: int, side: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and distances (B, H, W) from the outline, roughly in pixels, negative inside.

    Triangles, quadrangles and ellipses under a bar, on a mottled ground, blurred and noisy.
    """

    def between(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(count, *(shape or (1, 1))).uniform_(low, high, generator=random)

    axis = torch.arange(side) - (side - 1) / 2
    y, x = axis[:, None] - side * between(-0.2, 0.2), axis - side * between(-0.2, 0.2)
    turn, tilt, stretch = between(0, 2 * math.pi), between(0, math.pi), between(1, 1.4)
    u, v = (x * turn.cos() + y * turn.sin()) * stretch, (y * turn.cos() - x * turn.sin()) / stretch
    # A regular polygon in polar coordinates, of the area of a disc; 64 corners are an ellipse.
    sector = 2 * math.pi / torch.tensor([3, 4, 64])[torch.randint(3, (count, 1, 1), generator=random)]
    inradius = side * between(0.2, 0.3) * (sector / 2 / (sector / 2).tan()).sqrt()
    distances = torch.hypot(u, v) * (torch.atan2(v, u).remainder(sector) - sector / 2).cos() - inradius
    bar = (x * tilt.cos() + y * tilt.sin() + between(-8, 8)).abs() < between(0.7, 2.5)

    ground, sign = between(0.25, 0.75, 3, 1, 1), between(-1, 1, 3, 1, 1).sign()
    mottled = ground + 0.06 * torch.stack([smooth_noise(count, side, random) for _ in range(3)], 1)
    inside = torch.sigmoid(-distances / between(0.3, 1.5))[:, None]
    images = mottled + inside * sign * between(0.15, 0.35, 3, 1, 1)
    images = torch.where(bar[:, None], ground + between(-0.3, 0.3, 3, 1, 1), images)
    noise = between(0.02, 0.1, 1, 1, 1) * torch.randn(images.shape, generator=random)
    return (images + noise).clamp(0, 1), distances


class UNet(nn.Module):
    """Images (B, 3, H, W) to logits (B, H, W)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        sizes = (
            (3, width),
            (width, 2 * width),
            (2 * width, 4 * width),
            (6 * width, 2 * width),
            (3 * width, width),
        )
        self.blocks = nn.ModuleList(block(inputs, outputs) for inputs, outputs in sizes)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:  # images (B, 3, H, W)
        fine = self.blocks[0](images)
        middle = self.blocks[1](F.max_pool2d(fine, 2))
        coarse = self.blocks[2](F.max_pool2d(middle, 2))
        middle = self.blocks[3](torch.cat([middle, F.interpolate(coarse, scale_factor=2)], 1))
        return self.head(self.blocks[4](torch.cat([fine, F.interpolate(middle, scale_factor=2)], 1)))[:, 0]


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


def ask(reference: UNet, images: Tensor, truth: Tensor, random: torch.Generator) -> Pairs:
    """Sketch each shape twice; a judge who knows the truth (B, H, W) only says which one is better."""
    masks = predict(reference, images) > 0
    first, second = sketch(masks, random), sketch(masks, random)
    better = (iou(first, truth) >= iou(second, truth))[:, None, None]
    return Pairs(images, torch.where(better, first, second), torch.where(better, second, first))


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


def measure(model: UNet, pairs: Pairs, truth: Tensor) -> dict[str, Tensor]:  # truth (B, H, W) bool
    """(B,) each, in percent. Boundary IoU is that of the rims (Cheng et al. 2021, arXiv 2103.16562)."""
    logits = predict(model, pairs.images)
    overlap = iou(logits > 0, truth)
    won = score(logits, pairs.chosen) > score(logits, pairs.rejected)
    return {
        "IoU": 100 * overlap,
        "Dice": 200 * overlap / (1 + overlap),
        "boundary IoU": 100 * iou(rim(logits > 0), rim(truth)),
        "accuracy": 100 * won.float(),
    }


def experiment(setup: Setup) -> tuple[dict[str, UNet], Pairs, Tensor]:
    """The reference and what FORMS make of it, held-out pairs, and the truth (B, H, W) about them."""
    random = torch.Generator().manual_seed(setup.seed)
    reference = train_reference(setup, random)
    seen, unseen = (draw_shapes(count, setup.side, random) for count in (setup.pairs, setup.held_out))
    pairs, held_out = (ask(reference, images, far < 0, random) for images, far in (seen, unseen))
    models = {name: train_preferences(reference, form, pairs, setup) for name, form in FORMS.items()}
    return {"reference": reference} | models, held_out, unseen[1] < 0


def mean_and_error(values: Tensor) -> tuple[float, float]:  # values (B,)
    """Their mean and its standard error."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def tabulate(measured: dict[str, dict[str, Tensor]]) -> Table:
    """Gains are paired: what makes an image difficult for both models cancels in the difference."""
    before = measured["reference"]
    table = Table("", *before, "IoU gained", title="held-out images, % ± standard error", box=SIMPLE)
    for name, metrics in measured.items():
        cells = ["{:.1f} ± {:.1f}".format(*mean_and_error(values)) for values in metrics.values()]
        if name != "reference":
            gain, error = mean_and_error(metrics["IoU"] - before["IoU"])
            colour = "green" if gain > 3 * error else "red" if gain < -3 * error else "yellow"
            cells.append(f"[{colour}]{gain:+.1f} ± {error:.1f}[/]")
        table.add_row(name, *cells)
    return table


def save_picture(models: dict[str, UNet], images: Tensor, truth: Tensor, path: Path) -> None:
    """What each mask has too much of and what it lacks; images (B, 3, H, W), truth (B, H, W) bool."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = ListedColormap(["#f2f3f5", "#2b3a55", "#3d8fd1", "#f08a24"])
    named = {"truth": truth} | {name: predict(model, images) > 0 for name, model in models.items()}
    figure = Figure(figsize=(1.5 + 1.5 * len(named), 1.62 * len(images) + 0.7), layout="constrained")
    grid = figure.subplots(
        len(images), 1 + len(named), squeeze=False, subplot_kw={"xticks": [], "yticks": []}
    )
    for axes, image in zip(grid[:, 0], images, strict=True):
        axes.imshow(image.permute(1, 2, 0))
    for column, (name, masks) in zip(grid.T[1:], named.items(), strict=True):
        kinds = (masks & truth) + 2 * (truth & ~masks) + 3 * (masks & ~truth)
        for axes, kind, overlap in zip(column, kinds, iou(masks, truth), strict=True):
            axes.imshow(kind, colours, vmin=0, vmax=3)
            axes.set_xlabel("" if name == "truth" else f"IoU {overlap:.2f}", fontsize=8, labelpad=2)
    for axes, name in zip(grid[0], ["image", *named], strict=True):
        axes.set_title(name, fontsize=10)
    for axes in grid.flat:
        axes.spines[:].set_visible(False)
    keys = [
        Patch(color=colours(1 + i), label=label) for i, label in enumerate(("right", "missing", "too much"))
    ]
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
    models, pairs, truth = experiment(Setup(seed=seed))
    Console().print(tabulate({name: measure(model, pairs, truth) for name, model in models.items()}))
    path = output / "segmentation_dpo.png"
    save_picture(models, pairs.images[:6], truth[:6], path)  # the first, not the best
    print(f"{path} after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    typer.run(main)
