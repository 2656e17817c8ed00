"""Rewards of images for draftp.py, to read and to change.

    --reward "yuvalkirstain/PickScore_v1,recipes.rewards_images:hps*100,recipes.rewards_images:aesthetic*0.5"

A reward takes prompts, images (B, 3, H, W) in [0, 1] and the records of the prompts, as rewards of replies
do, and returns (B,) with gradients to the pixels. Models are float32 and frozen, loaded on every rank when
first asked. `brightness` and CLIP models, as PickScore, go by names of their own: --reward brightness.
"""

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# files or hub ids; where there is no network, set these to what you have downloaded
HPS_CLIP = os.environ.get("HPS_CLIP", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")  # its config and processor
HPS_WEIGHTS = os.environ.get("HPS_WEIGHTS", "")  # HPS_v2.1_compressed.pt; default: that of xswu/HPSv2
AESTHETIC_CLIP = os.environ.get("AESTHETIC_CLIP", "openai/clip-vit-large-patch14")
# from github.com/christophschuhmann/improved-aesthetic-predictor
AESTHETIC_WEIGHTS = os.environ.get("AESTHETIC_WEIGHTS", "sac+logos+ava1-l14-linearMSE.pth")


def brightness(prompts: list[str], images: Tensor, records: list[dict]) -> Tensor:
    """Mean of all pixels, 0 to 1: needs no weights. -> (B,)"""
    return images.flatten(1).mean(1)


def clip(source: str, device: torch.device) -> Callable:
    """PickScore's form: exp(logit_scale) cos(image, text) of a CLIPModel with its processor."""
    from transformers import CLIPModel, CLIPProcessor

    processor = CLIPProcessor.from_pretrained(source, trust_remote_code=False)
    model = CLIPModel.from_pretrained(source, dtype=torch.float32)
    return clip_score(frozen(model, device), processor)


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

    score.features = features  # distances between images are taken on these
    return score


def clip_pixels(images: Tensor, processor: Any) -> Tensor:
    """What a CLIP image processor does to a picture, differentiable: resize, crop the middle, normalize."""
    height, width = images.shape[2:]
    if processor.do_resize and min(height, width) != (short := processor.size["shortest_edge"]):
        size = [short * x // min(height, width) for x in (height, width)]
        # antialiased, as in the reward model's training
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    if processor.do_center_crop:
        height, width = processor.crop_size["height"], processor.crop_size["width"]
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        images = images[:, :, top : top + height, left : left + width]
    if processor.do_normalize:
        mean, std = (images.new_tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
        images = (images - mean) / std
    return images


def hps(prompts: list[str], images: Tensor, records: list[dict]) -> Tensor:
    """HPS v2.1, https://arxiv.org/abs/2306.09341: cos(image, text), .2 to .35, often printed times 100."""
    return _hps(images.device)(prompts, images, records)


def aesthetic(prompts: list[str], images: Tensor, records: list[dict]) -> Tensor:
    """LAION's aesthetic predictor v2, about 1 to 10, of the image alone."""
    features, head = _aesthetic(images.device)
    return head(features(images))[:, 0]


@functools.cache
def _hps(device: torch.device) -> Any:
    from huggingface_hub import hf_hub_download
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    path = HPS_WEIGHTS or hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt")
    weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = CLIPModel(CLIPConfig.from_pretrained(HPS_CLIP))
    model.load_state_dict(from_open_clip(weights))
    return clip_score(frozen(model, device), CLIPProcessor.from_pretrained(HPS_CLIP), scale=1.0)


@functools.cache
def _aesthetic(device: torch.device) -> tuple[Any, nn.Module]:
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(AESTHETIC_CLIP, dtype=torch.float32)
    weights = torch.load(AESTHETIC_WEIGHTS, map_location="cpu", weights_only=True)
    head = aesthetic_head(model.config.projection_dim)
    head.load_state_dict({name.removeprefix("layers."): tensor.float() for name, tensor in weights.items()})
    score = clip_score(frozen(model, device), CLIPProcessor.from_pretrained(AESTHETIC_CLIP))
    return score.features, frozen(head, device)


def aesthetic_head(width: int) -> nn.Module:
    """Linear layers, and nothing between them but the dropout of training, under the names of its file."""
    sizes, gap = (width, 1024, 128, 64, 16, 1), nn.Identity()
    linear = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(linear[0], gap, linear[1], gap, linear[2], gap, linear[3], linear[4])


def frozen(model: nn.Module, device: torch.device) -> nn.Module:
    return model.float().to(device).eval().requires_grad_(False)


RENAMED = {
    r"^visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.proj$": "visual_projection.weight",
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^text_projection$": "text_projection.weight",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"\.attn\.": ".self_attn.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.c_fc\.": ".fc1.",
    r"\.c_proj\.": ".fc2.",
}


def from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an open_clip ViT under the names that transformers' CLIPModel has for them."""
    found = {}
    for name, tensor in weights.items():
        for pattern, new in RENAMED.items():
            name = re.sub(pattern, new, name)
        if ".in_proj_" in name:  # queries, keys and values are one matrix
            kind = name.rpartition("_")[2]
            layer = name.rpartition(".")[0]
            parts = zip("qkv", tensor.chunk(3), strict=True)
            found |= {f"{layer}.{letter}_proj.{kind}": part for letter, part in parts}
        else:
            is_turned = name in ("visual_projection.weight", "text_projection.weight")
            found[name] = tensor.T.contiguous() if is_turned else tensor
    return found
