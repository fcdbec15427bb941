"""The picture that train_digits_torch.py draws: digits, and where some outputs of the deformable layer look."""

from __future__ import annotations

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#ffd21f", "#4fc3f7", "#f06292")  # of outputs
GREY = "#555555"


def draw(path: str, images: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> None:
    """`images` (N, S, S); `places` (N, 9, 2, H, W), in pixels, and `weights` (N, 9, H, W) of the layer's outputs."""
    figure = Figure(figsize=(2.1 * len(images), 3.1), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.02, 0.9, "Where a deformable layer looks", size=15, weight="bold")
    figure.text(
        0.02, 0.81, "Three of its outputs in each image: a cross where a regular convolution is centred, "
        "and nine taps, larger where they count more", size=9, color=GREY,
    )  # fmt: skip
    grid = figure.add_gridspec(1, len(images), left=0.02, right=0.98, top=0.74, bottom=0.03, wspace=0.05)
    for cell, image, place, weight in zip(grid, images, places, weights, strict=True):
        axes = figure.add_subplot(cell)
        axes.imshow(image.numpy(), cmap="gray")
        axes.set(xticks=[], yticks=[], xlim=(-0.5, len(image) - 0.5), ylim=(len(image) - 0.5, -0.5))
        step = len(image) // place.shape[-1]
        # the three outputs that stand where the digit is brightest
        bright = torch.nn.functional.max_pool2d(image[None, None], step)[0, 0]
        for number, colour in zip(bright.flatten().argsort(descending=True)[:3].tolist(), COLOURS, strict=True):
            row, column = divmod(number, place.shape[-1])
            y, x = place[:, :, row, column].numpy().T
            size = 8 + 60 * weight[:, row, column].numpy()
            axes.scatter([column * step], [row * step], marker="+", s=50, color=colour)
            axes.scatter(x, y, s=size, color=colour, edgecolors="black", linewidths=0.5)
    figure.savefig(path)
