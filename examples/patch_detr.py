"""A Deformable DETR of Hugging Face transformers on this package's attention, by one line.

The model has random weights, so nothing is downloaded. Its outputs must stay the same; its time on the CPU, forward and
with gradients, is taken before and after, in turns. transformers is not among the demo's packages:

Usage: pip install transformers; python examples/patch_detr.py [--height 320] [--width 480]
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import cudcn.torch

# The largest difference allowed, relative to the largest value: float32 rounds by 6e-8, here through 12 layers.
BOUND = 1e-4
TURNS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description="A transformers model on cudcn's attention, timed before and after.")
    parser.add_argument("--height", type=int, default=320, help="of the image (%(default)s)")
    parser.add_argument("--width", type=int, default=480, help="of the image (%(default)s)")
    arguments = parser.parse_args()
    if importlib.util.find_spec("transformers") is None:
        sys.exit("This example patches a model of Hugging Face transformers: pip install transformers")

    torch.manual_seed(0)
    original = detr().eval()
    model = copy.deepcopy(original)
    replaced = cudcn.torch.patch(model)  # the one line
    for kind in sorted(set(replaced.values())):
        print(f"replaced {list(replaced.values()).count(kind)} modules: {kind}")

    image = torch.rand(1, 3, arguments.height, arguments.width)
    expected, got = (outputs(m, image) for m in (original, model))
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True))
    print(f"largest difference of the outputs, relative to the largest value: {worst:.1e}")

    print(f"seconds for one image of {arguments.height} x {arguments.width}, {torch.get_num_threads()} threads:")
    print(f"{'':20}{'before':>8}{'after':>8}")
    for name, run in (("forward", forward), ("forward, backward", backward)):
        before, after = in_turns(partial(run, original, image), partial(run, model, image))
        print(f"{name:20}{before:8.2f}{after:8.2f}   {before / after:.1f} times as fast")
    return int(worst > BOUND)


def detr() -> Any:
    """With a small backbone, so that the attention shows."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic",
        out_indices=[2, 3, 4],
    )  # fmt: skip
    return DeformableDetrForObjectDetection(DeformableDetrConfig(backbone_config=backbone))


@torch.no_grad()
def forward(model: Any, image: torch.Tensor) -> Any:
    return model(pixel_values=image)


def outputs(model: Any, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = forward(model, image)
    return out.logits, out.pred_boxes


def backward(model: Any, image: torch.Tensor) -> None:
    model.zero_grad()
    out = model(pixel_values=image)
    (out.logits.sum() + out.pred_boxes.sum()).backward()


def in_turns(*runs: Callable[[], Any]) -> list[float]:
    """The least seconds of each: noise of the machine hits all alike, and only adds."""
    best = [float("inf")] * len(runs)
    for _ in range(TURNS):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    sys.exit(main())
