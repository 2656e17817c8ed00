"""The toy picture world: coloured shapes on plain backgrounds, small enough to know what is in a picture.

toy/worlds/images holds a Stable Diffusion pipeline of 32x32 pictures (UNet2DConditionModel on 8x8 latents,
AutoencoderKL, CLIPTextModel, DDIM), a CLIP model in PickScore's format that scores how well a picture fits
its prompt, and prompts as JSON lines. `judge(prompt, image)` is exact. It was made by

    python -m toy.images --build DIR

with fixed seeds, in half an hour on one core.
"""

import copy
import functools
import itertools
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from toy.language import build_from_command_line, halve, unpacked

SIZE = 32  # pixels of a side
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.15, 0.25, 0.9),
    "yellow": (0.95, 0.85, 0.1),
    "purple": (0.6, 0.15, 0.75),
    "orange": (0.95, 0.5, 0.05),
}
SHAPES = ("circle", "square", "triangle", "cross")
RADII = {"small": (6.4, 8.0), "large": (11.0, 13.0)}  # in pixels
SHIFT = 3.0  # pixels a shape is off the middle, at most
LEVELS = {"dark": (0.05, 0.3), "light": (0.7, 0.95)}  # of grey
OPPOSITE = {"small": "large", "large": "small", "dark": "light", "light": "dark"}
LENGTH = 16  # tokens of a prompt
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
VAE_STEPS, DECODER_STEPS, CLIP_STEPS, UNET_STEPS = 1500, 1000, 4000, 6000
NUM_PICTURES = 24000  # that the diffusion model sees
WRONG = 0.15  # share of the base model's captions, in the last part of training, with a wrong colour or shape
RIGHT_FIRST = 0.6  # share of its training before that


# prompts


def prompt(colour: str, shape: str, size: str = "", level: str = "") -> str:
    """a small red circle on a dark background; what is not named is free."""
    place = f" on a {level} background" if level else ""
    return f"a {size} {colour} {shape}".replace("  ", " ") + place


def all_prompts(split: str) -> list[str]:
    """The prompts of train or test, shuffled; each combination of words is in one of them."""
    words = itertools.product(COLOURS, SHAPES, ("", *RADII), ("", *LEVELS))
    prompts = [prompt(*combination) for combination in words]
    random.Random(0).shuffle(prompts)
    return prompts[:48] if split == "test" else prompts[48:]


# pictures


def render(colours: Any, shapes: Any, radii: Any, x: Any, y: Any, levels: Any, side: int = SIZE) -> Any:
    """Pictures (N, 3, side, side) in [0, 1] of shapes (N,) at x, y (N,), in 32nds of a side; anti-aliased."""
    import torch
    import torch.nn.functional as F

    grid = (torch.arange(side * 3) + 0.5) / 3 * SIZE / side
    u = (grid[None, None, :] - x[:, None, None]) / radii[:, None, None]
    v = (grid[None, :, None] - y[:, None, None]) / radii[:, None, None]
    inside = torch.stack(
        [
            u**2 + v**2 <= 1,
            torch.maximum(u.abs(), v.abs()) <= 0.85,
            (v >= -1) & (v <= 0.8) & (u.abs() <= (v + 1) / 1.8),
            (torch.minimum(u.abs(), v.abs()) <= 0.33) & (torch.maximum(u.abs(), v.abs()) <= 1),
        ],
        1,
    )[torch.arange(len(shapes)), shapes]
    cover = F.avg_pool2d(inside[:, None].float(), 3)  # (N, 1, side, side)
    palette = torch.tensor(list(COLOURS.values()))
    return cover * palette[colours][:, :, None, None] + (1 - cover) * levels[:, None, None, None]


def draw(generator: Any, count: int) -> tuple[Any, list[tuple[str, str, str, str]]]:
    """Random pictures and the words (colour, shape, size, background) each is described by."""
    import torch

    def uniform(low: Any, high: Any) -> Any:
        return low + (high - low) * torch.rand(count, generator=generator)

    def choice(options: Any) -> Any:
        return torch.randint(len(options), (count,), generator=generator)

    colours, shapes, sizes, levels = choice(COLOURS), choice(SHAPES), choice(RADII), choice(LEVELS)
    radii = uniform(*torch.tensor(list(RADII.values()))[sizes].T)
    x, y = (SIZE / 2 + uniform(-SHIFT, SHIFT) for _ in range(2))
    greys = uniform(*torch.tensor(list(LEVELS.values()))[levels].T)
    names = [list(COLOURS), SHAPES, list(RADII), list(LEVELS)]
    chosen = zip(*(i.tolist() for i in (colours, shapes, sizes, levels)), strict=True)
    words = [tuple(n[i] for n, i in zip(names, picture, strict=True)) for picture in chosen]
    return render(colours, shapes, radii, x, y, greys), words


def describe(rng: random.Random, words: tuple[str, str, str, str], wrong: float = 0.0) -> str:
    """A caption that names size and background or leaves them out, and with chance `wrong` errs in a word."""
    colour, shape, size, level = words
    if rng.random() < wrong:
        if rng.random() < 0.5:
            colour = rng.choice([c for c in COLOURS if c != colour])
        else:
            shape = rng.choice([s for s in SHAPES if s != shape])
    return prompt(colour, shape, rng.choice(["", size]), rng.choice(["", level]))


@functools.cache
def bank() -> tuple[Any, Any, list[tuple[str, str, str, str]]]:
    """Every kind of picture at every place, their squared lengths, and the words for each."""
    import torch

    kinds, places = [], [SIZE / 2 + SHIFT * step / 2 for step in range(-2, 3)]
    for colour, shape, size, level in itertools.product(range(6), range(4), range(2), range(2)):
        radii, greys = list(RADII.values())[size], list(LEVELS.values())[level]
        for radius, grey in itertools.product(radii, (greys[0], sum(greys) / 2, greys[1])):
            kinds += [(colour, shape, radius, x, y, grey, size, level) for x in places for y in places]
    colours, shapes, radii, x, y, greys, sizes, levels = zip(*kinds, strict=True)
    floats = [torch.tensor(v) for v in (radii, x, y, greys)]
    pictures = render(torch.tensor(colours), torch.tensor(shapes), *floats, side=SIZE // 2).flatten(1)
    names = [list(COLOURS), SHAPES, list(RADII), list(LEVELS)]
    described = zip(colours, shapes, sizes, levels, strict=True)
    words = [tuple(n[i] for n, i in zip(names, d, strict=True)) for d in described]
    return pictures, pictures.square().sum(1), words


def see(image: Any) -> tuple[str, str, str, str]:
    """(colour, shape, size, background) of the nearest of all pictures; image (3, 32, 32) in [0, 1]."""
    import torch.nn.functional as F

    pictures, lengths, words = bank()
    small = F.avg_pool2d(image.float().cpu(), 2).flatten()  # half the size is enough to tell them apart
    distances = lengths - pictures @ (2 * small)  # squared, up to a constant
    return words[distances.argmin().item()]


def judge(prompt: str, image: Any) -> dict[str, float]:
    """Whether the picture shows what the prompt asks for, 1 or 0 each; what is not named is free."""
    colour, shape, size, level = see(image)
    words = prompt.split()
    fits = {
        "colour": colour in words,
        "shape": shape in words,
        "details": OPPOSITE[size] not in words and OPPOSITE[level] not in words,
    }
    return {**{name: float(fit) for name, fit in fits.items()}, "correct": float(all(fits.values()))}


# models


def make_tokenizer() -> Any:
    """CLIP's byte-level BPE, in which each word of the world is one token.

    A learned vocabulary would not be the same twice: its order follows that of a hash table.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in sorted({word for text in all_prompts("train") for word in text.split()}):
        while len(parts := merged(word, merges)) > 1:
            merges.append((parts[0], parts[1]))
    names = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]  # CLIP finds the end token by the highest id
    return CLIPTokenizer(vocab={n: i for i, n in enumerate(names)}, merges=merges, model_max_length=LENGTH)


def merged(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The tokens of a word after these merges, in their order."""
    parts = [*word[:-1], word[-1] + "</w>"]
    for pair in merges:
        done: list[str] = []
        for part in parts:
            if done and (done[-1], part) == pair:
                done[-1] += part
            else:
                done.append(part)
        parts = done
    return parts


def text_config(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def steps(name: str, count: int, learning_rate: float, modules: list) -> Any:
    """Steps of training with AdamW, warm-up and cosine decay; yields after the update of the step before."""
    import torch
    from tqdm import tqdm

    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    pace = 1 if sys.stderr.isatty() else 30  # seconds between lines: few in a log file
    for step in tqdm(range(count), desc=f"building the toy pictures: {name}", unit="step", mininterval=pace):
        warmup, decay = min(1.0, (step + 1) / 50), 0.5 + 0.5 * math.cos(math.pi * step / count)
        optimizer.param_groups[0]["lr"] = learning_rate * warmup * decay
        yield step
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def train_vae(generator: Any, count: int) -> Any:
    """32x32 pixels <-> 8x8 latents of 4 channels; times scaling_factor these have unit variance."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
    )
    for _ in steps("autoencoder", count, 3e-3, [vae]):
        pixels = draw(generator, 32)[0] * 2 - 1
        latent = vae.encode(pixels).latent_dist
        error = (vae.decode(latent.sample(generator)).sample - pixels).square().mean()
        (error + 1e-4 * latent.kl().mean() / latent.mean[0].numel()).backward()
    with torch.no_grad():
        latents = vae.encode(draw(generator, 512)[0] * 2 - 1).latent_dist.sample(generator)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


def sharpen(generator: Any, vae: Any, count: int) -> None:
    """Train the decoder alone for longer, on what it will be given: latents of unchanging meaning."""
    import torch

    for _ in steps("decoder", count, 2e-3, [vae.decoder, vae.post_quant_conv]):
        pixels = draw(generator, 32)[0] * 2 - 1
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample(generator)
        (vae.decode(latents).sample - pixels).square().mean().backward()


def train_reward_model(generator: Any, tokenizer: Any, count: int) -> Any:
    """CLIP's loss from each picture to all prompts of the world, of which four fit.

    In the second half noise, and a weak other picture shining through, make it less brittle, so that its
    gradient points from one picture to another.
    """
    import torch
    import torch.nn.functional as F
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3}
    vision = {**shape, "image_size": SIZE, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text_config(tokenizer), vision_config=vision, projection_dim=32))
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    prompts = all_prompts("train") + all_prompts("test")
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    numbers = {text: i for i, text in enumerate(prompts)}
    for step in steps("reward model", count, 2e-3, [model]):
        pixels, words = draw(generator, 64)
        fits = torch.zeros(len(words), len(prompts))
        for row, (colour, shape, size, level) in enumerate(words):
            for described in itertools.product(("", size), ("", level)):
                fits[row, numbers[prompt(colour, shape, *described)]] = 1 / 4
        if step > count / 2:
            other = 0.4 * torch.rand(len(pixels), 1, 1, 1, generator=generator)
            pixels = (1 - other) * pixels + other * pixels.roll(1, 0)
            noise = torch.randn(pixels.shape, generator=generator)
            pixels = pixels + 0.1 * torch.rand(1, generator=generator) * noise
        logits = model(**tokens, pixel_values=(pixels - mean) / std).logits_per_image  # (64, 216)
        F.cross_entropy(logits, fits).backward()
    return model


def encoded_pictures(generator: Any, vae: Any, count: int) -> tuple[Any, list[tuple[str, str, str, str]]]:
    """Latents (count, 4, 8, 8) of random pictures, of unit variance, and the words for each."""
    import torch

    latents, words = [], []
    for _ in range(count // 500):
        pictures, named = draw(generator, 500)
        with torch.no_grad():
            latents.append(vae.encode(pictures * 2 - 1).latent_dist.sample(generator))
        words += named
    return torch.cat(latents) * vae.config.scaling_factor, words


def train_unet(
    generator: Any, rng: random.Random, tokenizer: Any, vae: Any, count: int
) -> tuple[Any, Any, Any]:
    """(UNet, text encoder, scheduler): noise prediction from captions of which a share is wrong."""
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=48,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    text_encoder = CLIPTextModel(CLIPTextConfig(**text_config(tokenizer)))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    ema = copy.deepcopy(unet)
    pictures, words = encoded_pictures(generator, vae, NUM_PICTURES)
    for step in steps("diffusion model", count, 1.5e-3, [unet, text_encoder]):
        chosen = torch.randint(len(words), (32,), generator=generator)
        wrong = 0.0 if step < RIGHT_FIRST * count else WRONG
        captions = ["" if rng.random() < 0.1 else describe(rng, words[i], wrong) for i in chosen]
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            decay = min(0.998, step / (step + 10))
            for average, weight in zip(ema.parameters(), unet.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)
        latents = pictures[chosen]
        noise = torch.randn(latents.shape, generator=generator)
        times = ((torch.arange(32) + torch.rand(32, generator=generator)) * 1000 / 32).long()  # of every size
        noisy = scheduler.add_noise(latents, noise, times)
        (unet(noisy, times, text_encoder(tokens)[0]).sample - noise).square().mean().backward()
    return ema, text_encoder, scheduler


# building

README = """# The toy picture world

Written by toy/images.py: 32x32 pictures of coloured shapes on grey backgrounds.

- `model/`: a Stable Diffusion pipeline with a UNet of {unet:,} parameters. In the last part of its
  training {wrong:.0%} of the captions named a wrong colour or shape, and without guidance it often draws
  something else than it is asked for
- `reward_model/`: CLIP of {reward:,} parameters in PickScore's format, trained on right captions
- `prompts/train.jsonl`, `prompts/test.jsonl`: one prompt a line. Size and background are free where they are
  not named. No prompt of the test file is in the train file

      {example}
"""


def build(folder: Path, share: float = 1.0) -> None:
    """Write the toy world to a folder, the models trained for a share of their steps."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()  # before what follows is imported, which complains about torchvision
    logging.disable_progress_bar()
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPProcessor

    def seeded(number: int) -> Any:
        torch.manual_seed(number)
        return torch.Generator().manual_seed(number)

    # data
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        lines = [json.dumps({"prompt": p}) for p in all_prompts(split)]
        (folder / "prompts" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")

    # models
    tokenizer = make_tokenizer()
    reward_model = train_reward_model(seeded(1), tokenizer, int(share * CLIP_STEPS))
    side = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=side, image_mean=MEAN, image_std=STD
    )
    reward_model.save_pretrained(folder / "reward_model")
    CLIPProcessor(processor, tokenizer).save_pretrained(folder / "reward_model")
    vae = train_vae(seeded(1), int(share * VAE_STEPS))
    sharpen(seeded(3), vae, int(share * DECODER_STEPS))
    unet, text_encoder, scheduler = train_unet(
        seeded(2), random.Random(2), tokenizer, vae, int(share * UNET_STEPS)
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "model")
    halve(folder)
    sizes = {
        name: sum(p.numel() for p in model.parameters())
        for name, model in (("unet", unet), ("reward", reward_model))
    }
    (folder / "README.md").write_text(README.format(**sizes, wrong=WRONG, example=lines[0]))


def ensure() -> Path:
    """The toy world in the user's cache."""
    return unpacked("images")


if __name__ == "__main__":
    build_from_command_line(build, "Make the toy picture world: models, prompts and a README.md.")
