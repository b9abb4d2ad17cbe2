"""Does position matter on real images? A small attention network learns handwritten digits with each kind of position.

The paper finds relative > absolute > none on ImageNet (table 5). Here the images are the 1797 digits of 8 x 8 pixels
that scikit-learn ships, enlarged to 16 x 16, and attention is the only layer that sees more than one pixel.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from sasa_bench.case import UserError
from sasa_bench.nn import LocalAttention2d

POSITIONS = ("none", "absolute", "relative")
SIDE, WIDTH, HEADS, WINDOW = 16, 32, 4, 7
"""Pixels of an image's side, channels of the first layer, heads and window of the attention."""

EPOCHS, BATCH, LEARNING_RATE, TESTED = 12, 64, 2e-3, 360
"""Passes over the training images, images a step, the peak of a cosine schedule of AdamW, images held out by a seed."""


class MissingDataError(UserError):
    """The package that ships the images is not installed; the message holds the command."""


@dataclass(frozen=True)
class Outcome:
    """accuracy: share of `tested` held-out images that a network trained from `seed` on the others names rightly."""

    position: str
    seed: int
    impl: str
    epochs: int
    trained: int
    tested: int
    accuracy: float


def train(impl: str, seeds: int, epochs: int = EPOCHS) -> Iterator[Outcome]:
    """Each position from each seed. A seed fixes what is held out, the order of the images and the initial weights.

    Raises MissingDataError.
    """
    images, labels = digits()
    for seed in range(seeds):
        for position in POSITIONS:
            accuracy, trained = _learn(images, labels, position, impl, seed, epochs)
            yield Outcome(position, seed, impl, epochs, trained, TESTED, accuracy)


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 16, 16] of mean 0 and variance 1, and labels [1797]. Raises MissingDataError."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingDataError(
            "scikit-learn is not installed, and it ships the images: pip install 'sasa-bench[accuracy]'"
        ) from None
    loaded = load_digits()
    images = torch.from_numpy(np.asarray(loaded.images)).float()[:, None]
    images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return (images - images.mean()) / images.std(), torch.from_numpy(np.asarray(loaded.target)).long()


class _Block(nn.Module):
    def __init__(self, channels: int, position: str, impl: str) -> None:
        super().__init__()
        self.attention = LocalAttention2d(channels, kernel_size=WINDOW, heads=HEADS, position=position, impl=impl)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.norm(self.attention(x))
        return y.relu()


def classifier(position: str, impl: str) -> nn.Module:
    """Image [B, 1, 16, 16] -> scores [B, 10]: two residual attention layers between 1 x 1 convolutions and pools."""
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        _Block(WIDTH, position, impl),
        nn.AvgPool2d(2),
        nn.Conv2d(WIDTH, 2 * WIDTH, 1, bias=False),
        nn.BatchNorm2d(2 * WIDTH),
        nn.ReLU(),
        _Block(2 * WIDTH, position, impl),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * WIDTH, 10),
    )


def _learn(images: Tensor, labels: Tensor, position: str, impl: str, seed: int, epochs: int) -> tuple[float, int]:
    shuffle = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=shuffle)
    held_out, known = order[:TESTED], order[TESTED:]
    torch.manual_seed(seed)
    model = classifier(position, impl)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(known) // BATCH))
    for _ in range(epochs):
        shuffled = known[torch.randperm(len(known), generator=shuffle)]
        for batch in shuffled[: len(known) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        named = torch.cat([model(part).argmax(1) for part in images[held_out].split(BATCH)])
    return (named == labels[held_out]).double().mean().item(), len(known)


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of `values`; both ends are NaN for a single one."""
    if len(values) < 2:
        return float("nan"), float("nan")
    spread = stats.sem(values)
    if spread == 0:
        return float(np.mean(values)), float(np.mean(values))
    low, high = stats.t.interval(confidence, len(values) - 1, float(np.mean(values)), spread)
    return float(low), float(high)


def sentences(outcomes: Sequence[Outcome]) -> list[str]:
    """What was found: the mean accuracy of each position, and the differences that the paper's order is about."""
    found = {p: {o.seed: o.accuracy for o in outcomes if o.position == p} for p in POSITIONS}
    said = []
    for position, by_seed in found.items():
        low, high = interval(list(by_seed.values()))
        mean = np.mean(list(by_seed.values()))
        said.append(f"{position:9} {mean:6.1%} of held-out digits (95 % interval {low:.1%} to {high:.1%})")
    for better, worse in (("relative", "absolute"), ("absolute", "none")):
        gaps = [found[better][seed] - found[worse][seed] for seed in found[better] if seed in found[worse]]
        low, high = interval(gaps)
        verdict = "shows here" if low > 0 else "is reversed here" if high < 0 else "does not show here"
        said.append(
            f"{better} - {worse}: {100 * np.mean(gaps):+.1f} points over {len(gaps)} seeds "
            f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}): the paper's order {verdict}"
        )
    return said


def to_csv(outcomes: Sequence[Outcome]) -> str:
    """One line for each trained network."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [f.name for f in fields(Outcome)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(outcome) for outcome in outcomes)
    return buffer.getvalue()
