"""A small network with a deformable layer learns rotated, scaled and shifted digits, on the CPU, beside a regular one.

The digits are scikit-learn's, of 8 x 8 pixels, turned and moved anew in every epoch. Both networks have the same layers
and the same starts; in one of them, the last convolution says where it looks. Prints both accuracies for each seed, and
draws where the deformable layer looks.

Usage: python examples/train_digits_torch.py [--seeds 3] [--epochs 6] [--picture train_digits.png]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time

import torch
from torch import nn

from cudcn.torch.nn import ModulatedDeformConv2dPack

SIZE = 24  # of the images that the digits are placed in
BATCH = 64
TRAINED, TESTED = 1300, 497  # digits: the first, and the last
TURN, SCALES, SHIFT = 60, (0.5, 1.1), 0.35  # degrees to either side; of half the image; of the image's half width
BAR = 30  # characters


def main() -> int:
    parser = argparse.ArgumentParser(description="Regular and deformable convolution on digits that turn and move.")
    parser.add_argument("--seeds", type=int, default=3, help="how often to train each (%(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="of each training (%(default)s)")
    parser.add_argument("--picture", default="train_digits.png", help="where to draw (%(default)s)")
    arguments = parser.parse_args()

    if importlib.util.find_spec("sklearn") is None:
        sys.exit("This example learns scikit-learn's digits: pip install scikit-learn")
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    accuracies: dict[str, list[float]] = {"regular": [], "deformable": []}
    print(f"test accuracy, %, after {arguments.epochs} epochs of {TRAINED} digits")
    for seed in range(arguments.seeds):
        for name, deformable in (("regular", False), ("deformable", True)):
            torch.manual_seed(seed)
            network = Network(deformable)
            start = time.perf_counter()
            train(network, images[:TRAINED], labels[:TRAINED], arguments.epochs, f"seed {seed}, {name}")
            seconds = time.perf_counter() - start
            shown = accuracy(network, images[-TESTED:], labels[-TESTED:])
            accuracies[name].append(shown)
            print(f"seed {seed}, {name:10} {shown:5.1f}   in {seconds:.0f} s", flush=True)
    means = {name: statistics.mean(values) for name, values in accuracies.items()}
    print("mean: " + ", ".join(f"{name} {mean:.1f}" for name, mean in means.items()))

    from train_digits_picture import draw

    torch.manual_seed(1)
    some = placed(images[-TESTED:][:6])
    with torch.no_grad():
        draw(arguments.picture, some[:, 0], *network.looks(some))
    print(f"drew {arguments.picture}")
    return int(means["deformable"] < means["regular"])


class Network(nn.Module):
    """Four convolutions and a linear layer; the last convolution is deformable, or not."""

    def __init__(self, deformable: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        layer = ModulatedDeformConv2dPack if deformable else nn.Conv2d
        self.last = layer(32, 32, 3, stride=2, padding=1)
        self.head = nn.Sequential(
            nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.features(images)))

    def looks(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the deformable layer's taps lie, y and x in the images' pixels, and how much each counts.

        (N, 9, 2, H, W) and (N, 9, H, W), for the H x W outputs of the layer.
        """
        offset, mask = self.last.conv_offset(self.features(images)).split((18, 9), dim=1)
        rows, columns = (torch.arange(size) for size in offset.shape[2:])
        center = torch.stack(torch.meshgrid(2 * rows, 2 * columns, indexing="ij"))  # in pixels of the layer's input
        taps = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))
        places = center + taps[:, :, None, None] + offset.unflatten(1, (9, 2))
        return 2 * places, mask.sigmoid()  # the layer's input has every second pixel of the image


def placed(digits: torch.Tensor) -> torch.Tensor:
    """(N, 1, SIZE, SIZE): each digit (N, 1, 8, 8) turned, scaled and shifted at random."""
    count = len(digits)
    angle = torch.deg2rad((2 * torch.rand(count) - 1) * TURN)
    least, most = SCALES
    scale = least + (most - least) * torch.rand(count)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    shift = (2 * torch.rand(2, count) - 1) * SHIFT
    # from a place in the image to one in the digit
    matrix = torch.stack([cos, sin, -cos * shift[0] - sin * shift[1], -sin, cos, sin * shift[0] - cos * shift[1]], 1)
    grid = nn.functional.affine_grid(matrix.view(count, 2, 3), [count, 1, SIZE, SIZE], align_corners=False)
    return nn.functional.grid_sample(digits, grid, align_corners=False)


def train(network: Network, digits: torch.Tensor, labels: torch.Tensor, epochs: int, title: str) -> None:
    steps = epochs * (len(digits) // BATCH)
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    network.train()
    for step in range(steps):
        some = torch.randint(len(digits), (BATCH,))
        loss = nn.functional.cross_entropy(network(placed(digits[some])), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(title, (step + 1) / steps, loss.item())
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")


def progress(title: str, share: float, loss: float) -> None:
    if sys.stderr.isatty():
        done = "#" * round(BAR * share)
        sys.stderr.write(f"\r{title} [{done:{BAR}}] loss {loss:.2f}")


@torch.no_grad()
def accuracy(network: Network, digits: torch.Tensor, labels: torch.Tensor) -> float:
    """In percent, over four placements of each digit, which are the same for every network."""
    torch.manual_seed(0)
    network.eval()
    right = [(network(placed(digits)).argmax(1) == labels).float().mean() for _ in range(4)]
    return 100 * torch.stack(right).mean().item()


if __name__ == "__main__":
    sys.exit(main())
