"""The picture that quickstart.py draws: where one pixel looks, and what comes of it."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

EDGE, EVEN = (60, 157), (22, 215)  # (row, column) of the two pixels whose grids are shown
NEAR = 4  # pixels shown on each side of them
DETAIL = np.s_[:, 8:92, 70:190]  # the part of the results that is shown larger
REGULAR, MOVED = "#ffffff", "#ffd21f"
INK, GREY = "#222222", "#555555"


def draw(
    path: str,
    clean: np.ndarray,
    noisy: np.ndarray,
    blurred: np.ndarray,
    smoothed: np.ndarray,
    offset: np.ndarray,
    mask: np.ndarray,
) -> None:
    figure = Figure(figsize=(15, 10.4), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = 0.02, 0.98
    figure.text(left, 0.945, "Deformable convolution: each pixel has its own 3x3 grid", size=27, weight="bold")
    figure.text(
        left, 0.9, "Here the photo itself bends the grid: long along an edge, narrow across it. "
        "So noise is smoothed and edges stay sharp.", size=17, color=GREY,
    )  # fmt: skip

    top = figure.add_gridspec(
        1, 3, left=left, right=right, top=0.84, bottom=0.455, wspace=0.05, width_ratios=[1.4, 1, 1]
    )
    photo = _image(figure.add_subplot(top[0]), clean, "The photo")
    for cell, pixel, title in ((top[1], EDGE, "A: at the roof's edge"), (top[2], EVEN, "B: in the sky")):
        axes = _image(figure.add_subplot(cell), clean, title)
        _grid(axes, pixel, offset, mask)
        _frame(photo, pixel, title[0])
    _legend(photo)

    bottom = figure.add_gridspec(1, 3, left=left, right=right, top=0.395, bottom=0.05, wspace=0.04)
    for cell, image, title in (
        (bottom[0], noisy, "With noise added"),
        (bottom[1], blurred, "Regular 3x3, twice"),
        (bottom[2], smoothed, "Deformable 3x3, twice"),
    ):
        error = -10 * np.log10(((image - clean) ** 2).mean())
        _image(figure.add_subplot(cell), image[DETAIL], f"{title}: {error:.1f} dB")
    note = {"size": 12, "color": GREY}
    figure.text(left, 0.015, "dB (PSNR): the whole picture's nearness to the clean photo, more is better", **note)
    figure.text(right, 0.015, "Photo: danielbuechele, CC BY 2.0; cropped, noise added", ha="right", **note)
    figure.savefig(path)


def _image(axes: Axes, image: np.ndarray, title: str) -> Axes:
    axes.imshow(image.clip(0, 1).transpose(1, 2, 0), interpolation="nearest")
    axes.set_title(title, loc="left", size=17, color=INK, pad=8)
    axes.set_anchor("W")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes


def _grid(axes: Axes, pixel: tuple[int, int], offset: np.ndarray, mask: np.ndarray) -> None:
    """The nine regular places of a pixel, the nine deformed ones, and arrows between them."""
    row, column = pixel
    axes.set_xlim(column - NEAR - 0.5, column + NEAR + 0.5)
    axes.set_ylim(row + NEAR + 0.5, row - NEAR - 0.5)
    shift = offset[0, :, row, column].reshape(9, 2)
    share = mask[0, :, row, column]
    i, j = (axis.ravel() for axis in np.mgrid[-1:2, -1:2])
    places = np.stack([column + j, row + i], axis=1)
    moved = places + shift[:, ::-1]
    for start, end in zip(places, moved, strict=True):
        if np.hypot(*(end - start)) > 0.4:
            arrow = {
                "arrowstyle": "-|>",
                "color": INK,
                "lw": 1.8,
                "shrinkA": 5,
                "shrinkB": 3,
                "mutation_scale": 13,
            }
            axes.annotate("", end, start, arrowprops=arrow, zorder=3)
    axes.scatter(*places.T, s=110, facecolor=REGULAR, edgecolor=INK, lw=1.5, zorder=2)
    axes.scatter(*moved.T, s=60 + 1400 * share, facecolor=MOVED, edgecolor=INK, lw=1.5, zorder=4)


def _frame(photo: Axes, pixel: tuple[int, int], letter: str) -> None:
    """Frame in the photo what the zoomed axes show."""
    row, column = pixel
    size = 2 * NEAR + 1
    corner = (column - NEAR - 0.5, row - NEAR - 0.5)
    photo.add_patch(Rectangle(corner, size, size, fill=False, ec=INK, lw=2))
    photo.annotate(letter, (column + NEAR + 3, row), size=17, weight="bold", color=INK, va="center")


def _legend(photo: Axes) -> None:
    def dot(colour: str, size: float, label: str) -> Line2D:
        return Line2D([], [], ls="", marker="o", mfc=colour, mec=INK, mew=1.5, ms=size, label=label)

    handles = [
        dot(REGULAR, 10, "regular 3x3 grid"),
        dot(MOVED, 13, "deformed: moved by offset, sized by mask"),
    ]
    photo.legend(handles=handles, loc="lower left", fontsize=13, framealpha=0.95)
