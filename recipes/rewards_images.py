"""Rewards of images for draftp.py, to read and to change.

    --reward "recipes.rewards_images:hps*100,recipes.rewards_images:aesthetic*0.5"

PickScore and other CLIP models need no function: `--reward yuvalkirstain/PickScore_v1`. A reward takes
prompts, images (B, 3, H, W) in [0, 1] and the records of the prompts, as rewards of replies do, and returns
(B,) with gradients to the pixels. Models are float32 and frozen, and loaded when first asked, on every rank.
"""

import functools
import os
import re
from typing import Any

import torch
from torch import Tensor, nn

from common.image_rewards import clip_score

# files or hub ids; where there is no network, set these to what you have downloaded
HPS_CLIP = os.environ.get("HPS_CLIP", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")  # its config and processor
HPS_WEIGHTS = os.environ.get("HPS_WEIGHTS", "")  # HPS_v2.1_compressed.pt; default: that of xswu/HPSv2
AESTHETIC_CLIP = os.environ.get("AESTHETIC_CLIP", "openai/clip-vit-large-patch14")
# from github.com/christophschuhmann/improved-aesthetic-predictor
AESTHETIC_WEIGHTS = os.environ.get("AESTHETIC_WEIGHTS", "sac+logos+ava1-l14-linearMSE.pth")


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
