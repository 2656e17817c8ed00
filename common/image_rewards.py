"""Rewards of images, several of them added up.

A function is any importable package.module:function, (prompts, images, records) -> (B,), as those of replies
are, with images (B, 3, H, W) in [0, 1] and gradients to their pixels. Those with a name of their own are in
recipes/rewards_images.py.

Shapes: B images, R rewards, F features.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import diffusion, dist, files, formats
from common.args import load_function, what_happened
from common.packed import Example
from recipes import rewards_images


class Reward(NamedTuple):
    """A weighted sum of rewards of images."""

    names: list[str]
    weights: Tensor  # (R,)
    functions: list[Callable[[list[str], Tensor, list[dict]], Tensor]]
    features: Callable[[Tensor], Tensor]  # images -> (B, F), for distances between images

    def __call__(self, prompts: list[str], images: Tensor, records: list[dict]) -> Tensor:
        """Each reward of each image, not weighted. -> (B, R) float32"""
        return torch.stack([function(prompts, images, records).float() for function in self.functions], 1)

    def conclude(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        """Metrics with the standard deviation of the rewards, of which they hold the mean square.

        Raises:
            RunError: a reward is not finite.
        """
        mean, square = metrics[f"{prefix}reward"], metrics[f"{prefix}reward_std"]
        if not math.isfinite(mean):
            name = f"reward {'+'.join(self.names)}"
            raise formats.wrong(name, f"{mean} on average", "finite numbers; the run stops")
        return metrics | {f"{prefix}reward_std": max(0.0, square - mean**2) ** 0.5}


def load_reward(spec: str, device: torch.device, examples: list[Example]) -> Reward:
    """The sum that a,b*0.5 asks for, of `brightness`, CLIP-style models and package.module:function.

    Raises:
        RunError: no such reward, or one without a finite value for each image and a gradient to its pixels;
            it is tried on two grey images for the first of the examples.
    """
    names, weights = zip(*formats.read_sources(spec, "reward"), strict=True)
    functions = [_load(name, device) for name in names]
    for name, function in zip(names, functions, strict=True):
        if found := _fault(function, device, [*examples, *examples][:2]):
            expected = (
                "a finite (B,) tensor with gradients, from B prompts, images (B, 3, H, W) and B records"
            )
            raise dist.RunError(f"reward {name}: {found}; expected {expected}")
    features = next((f.features for f in functions if hasattr(f, "features")), coarse_pixels)
    return Reward([*names], torch.tensor(weights, device=device), functions, features)


def _load(name: str, device: torch.device) -> Callable:
    if name == "brightness":
        return rewards_images.brightness
    if re.fullmatch(r"[\w.]+:\w+", name):
        return load_function(name)
    source = str(files.toy_folder("images") / "reward_model") if name == "toy" else name
    try:
        return rewards_images.clip(source, device)
    except Exception as error:  # the hub client raises many kinds
        raise dist.RunError(
            f"reward {name}: {formats.first_line(error)}; expected brightness, package.module:function, or "
            "a folder or hub id of a CLIP model with its processor"
        ) from error


def _fault(function: Callable, device: torch.device, examples: list[Example]) -> str:
    """What is wrong with a reward, tried on two grey images with some noise."""
    images = 0.5 + 0.1 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    images.requires_grad_(True)
    try:
        values = function(diffusion.texts(examples), images, [example.record for example in examples])
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        return f"raised {what_happened(error)}"
    if not isinstance(values, Tensor) or values.shape != (2,):
        found = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        return f"returned {found} for two images"
    if not values.isfinite().all():
        return f"returned {values.tolist()}"
    if values.requires_grad:
        (gradient,) = torch.autograd.grad(values.sum(), images, allow_unused=True)
        if gradient is not None and gradient.isfinite().all() and gradient.any():
            return ""
    return "no gradient reaches the images"


def coarse_pixels(images: Tensor) -> Tensor:
    """Colours at 8 x 8 places, as features whose distance is the root mean square difference. -> (B, 192)"""
    cells = F.adaptive_avg_pool2d(images, 8).flatten(1)
    return cells / cells.shape[1] ** 0.5
