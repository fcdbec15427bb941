"""The picture that roi_pooling.py draws: a box, its bins, and the samples before and after they move."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

if TYPE_CHECKING:
    from roi_pooling import Pooled

REGULAR = "#ffffff"
MOVED = ("#ffd21f", "#7ee081", "#4fc3f7", "#ff8a65", "#f06292", "#ba9bff", "#e6ee6a", "#5eead4", "#d7ccc8")  # by bin
INK, GREY = "#222222", "#555555"
SHOWN = np.s_[:, 10:390, 120:580]  # of the photo
SQUARE = np.s_[:, 10:390, 117:497]


def draw(path: str, photo: np.ndarray, box: np.ndarray, parts: np.ndarray, plain: Pooled, sensitive: Pooled) -> None:
    figure = Figure(figsize=(15, 6.3), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = 0.015, 0.985
    figure.text(
        left, 0.915, "Deformable RoI pooling: the bins of a box move to what they look for", size=25, weight="bold"
    )
    figure.text(
        left, 0.845, "The box has missed the flower. Each bin's offset climbs the gradient of what the bin sees.",
        size=16, color=GREY,
    )  # fmt: skip
    grid = figure.add_gridspec(
        1, 3, left=left, right=right, top=0.755, bottom=0.08, wspace=0.03, width_ratios=[1.21, 1.21, 1]
    )
    for cell, pooled, title in (
        (grid[0], plain, "deform_roi_pool: all look for the flower"),
        (grid[1], sensitive, "deform_psroi_pool: each for its own part"),
    ):
        axes = _image(figure.add_subplot(cell), 0.75 * photo, title)
        _frame(axes, SHOWN)
        _bins(axes, box, pooled)
    _legend(figure)
    _parts(figure, grid[2], photo, parts)
    figure.text(right, 0.015, "Photo: vultilion, CC BY 2.0; cropped", size=12, color=GREY, ha="right")
    figure.savefig(path)


def _image(axes: Axes, image: np.ndarray, title: str = "") -> Axes:
    axes.imshow(image.transpose(1, 2, 0), interpolation="bilinear")
    axes.set_title(title, loc="left", size=16, color=INK, pad=8)
    axes.set_anchor("W")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes


def _frame(axes: Axes, shown: tuple[slice, ...]) -> None:
    _, rows, columns = shown
    axes.set_xlim(columns.start, columns.stop)
    axes.set_ylim(rows.stop, rows.start)


def _bins(axes: Axes, box: np.ndarray, pooled: Pooled) -> None:
    """The box and its bins, the samples, and an arrow from each bin's middle to where it went."""
    x1, y1, x2, y2 = box
    before, after = pooled.samples
    bins = before.shape[0]
    size = (x2 - x1) / bins, (y2 - y1) / bins
    for (i, j), colour in zip(np.ndindex(bins, bins), MOVED, strict=True):
        corner = x1 + j * size[0], y1 + i * size[1]
        start, end = before[i, j].mean(0), after[i, j].mean(0)
        axes.add_patch(Rectangle(corner, *size, fill=False, ec=REGULAR, lw=1.2, ls=":"))
        axes.add_patch(Rectangle(np.add(corner, end - start), *size, fill=False, ec=colour, lw=2))
        if np.hypot(*(end - start)) > 8:
            arrow = {"arrowstyle": "-|>", "color": colour, "lw": 2.2, "mutation_scale": 16}
            axes.annotate("", end, start, arrowprops=arrow, zorder=5)
        axes.scatter(*after[i, j].T, s=26, facecolor=colour, edgecolor=INK, lw=0.7, zorder=4)
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=REGULAR, lw=2.5))
    axes.scatter(*before.reshape(-1, 2).T, s=9, color=REGULAR, alpha=0.9, zorder=3)


def _legend(figure: Figure) -> None:
    def dot(colour: str, size: float, label: str) -> Line2D:
        return Line2D([], [], ls="", marker="o", mfc=colour, mec=INK, mew=0.8, ms=size, label=label)

    handles = [dot(REGULAR, 5, "samples of the regular bins"), dot(MOVED[0], 7, "samples of the moved bins")]
    figure.legend(
        handles=handles, loc="lower left", fontsize=13, ncols=2, frameon=False, bbox_to_anchor=(0.005, -0.005)
    )


def _parts(figure: Figure, cell: object, photo: np.ndarray, parts: np.ndarray) -> None:
    """The photo as each position-sensitive bin sees it: bright where its part is."""
    side = int(np.sqrt(len(parts)))
    inner = cell.subgridspec(side, side, wspace=0.05, hspace=0.05)
    for index, part in enumerate(parts):
        axes = _image(figure.add_subplot(inner[index]), photo * (0.2 + 0.8 * part))
        _frame(axes, SQUARE)
        axes.spines[:].set(visible=True, color=MOVED[index], linewidth=2.5)
        if index == 0:
            axes.set_title("What each of these looks for", loc="left", size=16, color=INK, pad=8)
