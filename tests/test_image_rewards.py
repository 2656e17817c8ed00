"""recipes/rewards_images.py on random weights, against models and pictures prepared by other means."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_diffusion
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from recipes import rewards_images

WIDTH, PATCH, SIDE = 16, 4, 16


class Block(nn.Module):
    """A layer of a transformer under open_clip's names."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 32), "c_proj": nn.Linear(32, WIDTH)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))  # as the tiny config says


class Tower(nn.Module):
    """Layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClip(nn.Module):
    """The layout of open_clip, written from its names: a text tower, and another under `visual`."""

    def __init__(self, num_words: int, length: int) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.visual.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, WIDTH))
        self.visual.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.visual.transformer = Tower()
        self.visual.proj = nn.Parameter(torch.randn(WIDTH, 8))
        self.token_embedding = nn.Embedding(num_words, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(length, WIDTH))
        self.transformer, self.ln_final = Tower(), nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, 8))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def score(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        v = self.visual
        x = v.conv1(pixels).flatten(2).mT
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        image = v.ln_post(v.transformer(v.ln_pre(x))[:, 0]) @ v.proj
        length = tokens.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        y = self.token_embedding(tokens) + self.positional_embedding[:length]
        y = self.ln_final(self.transformer(y, mask))[torch.arange(len(tokens)), tokens.argmax(1)]
        return (F.normalize(image, dim=1) * F.normalize(y @ self.text_projection, dim=1)).sum(1)


def prepared(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """As PIL resizes pictures to 24 pixels and crops 16 out of the middle, then normalized."""
    found = []
    for image in images:
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        picture = picture.resize((24, 24), Image.Resampling.BICUBIC).crop((4, 4, 20, 20))
        found.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(16, 16, 3))
    pixels = torch.stack(found).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.fixture
def images() -> Tensor:
    coarse = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, (64, 64), mode="bilinear")
    return (smooth * 255).round() / 255


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tiny_diffusion.make_clip(tmp_path / "clip")
    for name in ("HPS_CLIP", "AESTHETIC_CLIP"):
        monkeypatch.setattr(rewards_images, name, folder)
    yield folder
    rewards_images._hps.cache_clear()
    rewards_images._aesthetic.cache_clear()


PROMPTS = ["two cats", "a dog"]


def test_hps_is_that_of_an_open_clip_model(
    clip: str, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPProcessor

    processor = CLIPProcessor.from_pretrained(clip)
    torch.manual_seed(0)
    model = OpenClip(len(processor.tokenizer), processor.tokenizer.model_max_length)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "hps.pt")
    monkeypatch.setattr(rewards_images, "HPS_WEIGHTS", str(tmp_path / "hps.pt"))
    tokens = processor.tokenizer(PROMPTS, padding=True, return_tensors="pt").input_ids
    pixels = prepared(images, processor.image_processor.image_mean, processor.image_processor.image_std)
    images = images.requires_grad_(True)
    found = rewards_images.hps(PROMPTS, images, [{}, {}])
    with torch.no_grad():
        torch.testing.assert_close(found, model.score(pixels, tokens), rtol=0, atol=5e-3)  # PIL rounds pixels
        other = model.score(pixels, tokens.flip(0))
    assert (other - found).abs().min() > 0.02
    found.sum().backward()
    assert images.grad.any((1, 2, 3)).all()


def test_the_aesthetic_predictor_is_a_chain_on_the_normalized_embedding(
    clip: str, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    sizes = {0: (8, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    layers = {i: nn.Linear(*size) for i, size in sizes.items()}
    weights = {f"layers.{i}.{n}": t for i, layer in layers.items() for n, t in layer.state_dict().items()}
    torch.save(weights, tmp_path / "head.pth")
    monkeypatch.setattr(rewards_images, "AESTHETIC_WEIGHTS", str(tmp_path / "head.pth"))
    processor = CLIPProcessor.from_pretrained(clip).image_processor
    pixels = prepared(images, processor.image_mean, processor.image_std)
    with torch.no_grad():
        x = CLIPModel.from_pretrained(clip).get_image_features(pixel_values=pixels).pooler_output
        x = x / x.norm(dim=1, keepdim=True)
        for layer in layers.values():
            x = layer(x)
    found = rewards_images.aesthetic(PROMPTS, images.requires_grad_(True), [{}, {}])
    torch.testing.assert_close(found, x[:, 0], rtol=0, atol=2e-3)
    found.sum().backward()
    assert images.grad.any()
