"""Rewards of images, several of them added up.

A function is any importable package.module:function, (prompts, images, records) -> (B,), as those of replies
are, with images (B, 3, H, W) in [0, 1] and gradients to their pixels.

Shapes: B images, R rewards, F features.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import diffusion, dist, files, formats
from common.args import load_function
from common.packed import Example


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
    parts = formats.read_sources(spec, "reward")
    functions = [_reward_function(name, device) for name, _ in parts]
    features = next((f.features for f in functions if hasattr(f, "features")), coarse_pixels)
    weights = torch.tensor([weight for _, weight in parts], device=device)
    for (name, _), function in zip(parts, functions, strict=True):
        check(name, function, device, [*examples, *examples][:2])
    return Reward([name for name, _ in parts], weights, functions, features)


def _reward_function(name: str, device: torch.device) -> Callable:
    if name == "brightness":
        return brightness
    if name == "toy":
        return clip_reward(str(files.toy_folder("images") / "reward_model"), device)
    if re.fullmatch(r"[\w.]+:\w+", name):
        return load_function(name)
    return clip_reward(name, device)


def brightness(prompts: list[str], images: Tensor, records: list[dict]) -> Tensor:
    """Mean of all pixels, 0 to 1: needs no weights. -> (B,)"""
    return images.flatten(1).mean(1)


def coarse_pixels(images: Tensor) -> Tensor:
    """Colours at 8 x 8 places, as features whose distance is the root mean square difference. -> (B, 192)"""
    cells = F.adaptive_avg_pool2d(images, 8).flatten(1)
    return cells / cells.shape[1] ** 0.5


def clip_reward(source: str, device: torch.device) -> Callable:
    """PickScore's form: exp(logit_scale) cos(image, text) of a CLIPModel, frozen, in float32.

    Raises:
        RunError: no such model, or not a CLIPModel with its processor.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        processor = CLIPProcessor.from_pretrained(source, trust_remote_code=False)
        model = CLIPModel.from_pretrained(source, dtype=torch.float32).to(device).eval().requires_grad_(False)
    except Exception as error:  # the hub client raises many kinds
        raise dist.RunError(
            f"reward {source}: {formats.first_line(error)}; expected brightness, package.module:function, or "
            "a folder or hub id of a CLIP model with its processor"
        ) from error
    return clip_score(model, processor)


def clip_score(model: Any, processor: Any, scale: float | None = None) -> Callable:
    """scale * cos(image, text) of a frozen CLIPModel, its own exp(logit_scale) if None, as a reward."""
    length = model.config.text_config.max_position_embeddings

    def features(images: Tensor) -> Tensor:
        pixels = clip_pixels(images, processor.image_processor)
        return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=1)

    def score(prompts: list[str], images: Tensor, records: list[dict]) -> Tensor:
        tokens = processor.tokenizer(
            prompts, padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(images.device)
        with torch.no_grad():
            text = F.normalize(model.get_text_features(**tokens).pooler_output, dim=1)
        factor = model.logit_scale.exp() if scale is None else scale
        return factor * (features(images) * text).sum(1)

    score.features = features
    return score


def clip_pixels(images: Tensor, processor: Any) -> Tensor:
    """What a CLIP image processor does to a picture, differentiable: resize, crop the middle, normalize."""
    if processor.do_resize:
        short = processor.size["shortest_edge"]
        height, width = images.shape[2:]
        scale = short / min(height, width)
        size = (
            (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
        )
        if scale != 1:  # antialiased, as in the reward model's training
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    if processor.do_center_crop:
        height, width = processor.crop_size["height"], processor.crop_size["width"]
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        images = images[:, :, top : top + height, left : left + width]
    if processor.do_normalize:
        mean, std = (images.new_tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
        images = (images - mean) / std
    return images


def check(name: str, function: Callable, device: torch.device, examples: list[Example]) -> None:
    """Try a reward on two grey images with some noise."""
    images = 0.5 + 0.1 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    images.requires_grad_(True)
    expected = "a finite (B,) tensor with gradients, from B prompts, images (B, 3, H, W) and B records"
    try:
        values = function(diffusion.texts(examples), images, [example.record for example in examples])
    except Exception as error:  # a user's function may raise anything
        raise dist.RunError(f"reward {name}: {formats.first_line(error)}; expected {expected}") from error
    if not isinstance(values, Tensor) or values.shape != (2,):
        found = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise dist.RunError(f"reward {name}: returned {found} for two images; expected {expected}")
    if not values.isfinite().all():
        raise dist.RunError(f"reward {name}: returned {values.tolist()}; expected {expected}")
    if values.requires_grad:
        (gradient,) = torch.autograd.grad(values.sum(), images, allow_unused=True)
        if gradient is not None and gradient.isfinite().all() and gradient.any():
            return
    raise dist.RunError(f"reward {name}: no gradient reaches the images; expected {expected}")
