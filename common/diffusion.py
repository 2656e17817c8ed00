"""Diffusion pipelines: any Stable Diffusion 1.x, 2.x or XL folder in, a sharded U-Net and what it needs out.

A U-Net is of no use without its schedule, its text encoders, a decoder that gradients pass through, rewards
of images and files of prompts. None of it depends on how the U-Net is trained.

Shapes: B images in a micro-batch, S sampler steps, R rewards; latents (B, C, h, w), images (B, 3, H, W).
"""

import contextlib
import copy
import csv
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from common import data, dist, files, formats, lora, models
from common.args import Weights, load_function
from common.packed import Example

RECOMPUTE = {"use_reentrant": False, "preserve_rng_state": False}  # of torch's checkpoint; nothing is random
LORA_FILE = "pytorch_lora_weights.safetensors"


class Schedule(NamedTuple):
    """The steps of a sampler without noise of its own, from noise to image."""

    timesteps: list[float]  # (S,) what the U-Net is told before each step
    alphas: Tensor  # (S + 1,) alpha-bar, the share of signal in the variance, before each step and at the end
    predicts_v: bool  # the U-Net's output is v = sqrt(alpha) noise - sqrt(1 - alpha) image, as in SD 2.x


class MicroBatch(NamedTuple):
    """Images of one forward. `indices` are places in the whole batch: what their noise is drawn from."""

    indices: list[int]
    prompts: list[str]
    weights: Tensor  # (B,) 1, or 0 for an image that only keeps collectives matched


class Reward(NamedTuple):
    """A weighted sum of rewards of images (B, 3, H, W) in [0, 1]."""

    names: list[str]
    weights: Tensor  # (R,)
    functions: list[Callable[[Tensor, list[str]], Tensor]]
    features: Callable[[Tensor], Tensor]  # images -> (B, F), for distances between images

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Each reward of each image, not weighted. -> (B, R) float32"""
        return torch.stack([function(images, prompts).float() for function in self.functions], 1)


# --------------------------------------------------------------------------------------------- load and shard


def load(
    model: str,
    device: torch.device,
    weights: Weights,
    seed: int,
    trainable: bool = True,
    fuse: bool = True,
) -> tuple[Any, nn.Module]:
    """(pipeline, U-Net): all frozen but the U-Net, or its adapters, which is sharded over all ranks.

    Only rank 0 reads the weights. Only a trainable model gets adapters, drawn from the seed.

    Raises:
        RunError: no such pipeline, or one of another kind.
    """
    if model == "toy":
        files.toy_folder("images")  # ranks wait on its lock, not in a collective
    full: list[Any] = []  # rank 0's; the others stay without a copy

    def read() -> Any:
        pipe = read_pipeline(model, fuse)
        for part in modules(pipe).values():
            part.requires_grad_(False).eval()
        if trainable and weights.lora_rank > 0:
            add_lora(pipe.unet, weights, seed)
        elif trainable:
            pipe.unet.requires_grad_(True)
        full.append(pipe)
        return without_numbers(pipe)

    pipe = dist.from_main(read)
    unet, dtype = pipe.unet, models.resolve_dtype(weights.dtype, device)
    for name, part in modules(pipe).items():
        if part is not unet:
            part.to(dtype).to_empty(device=device)
            models.fill(part, modules(full[0])[name] if full else None)
    for parameter in unet.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)  # frozen weights need no float32 master
    # resharded after each forward, so that a change of the weights in place is seen by the next one
    plan = models.fsdp_plan(unet, dtype, device, weights.sharding) | {"reshard_after_forward": True}
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        fully_shard(block, **plan)
    fully_shard(unet, **plan)
    models.sum_gradients(unet)
    models.fill(unet.to_empty(device=device), full.pop().unet if full else None)
    return pipe, unet


def modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def without_numbers(pipe: Any) -> Any:
    """A copy of a pipeline whose modules have shapes and dtypes only: small enough to send."""
    parts, known = modules(pipe).values(), {}
    for tensor in (t for part in parts for t in (*part.parameters(), *part.buffers())):
        shape = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        known[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if is_parameter else shape
    return copy.deepcopy(pipe, known)


def read_pipeline(model: str, fuse: bool = True) -> Any:
    """The plain float32 diffusers pipeline of `toy`, a run folder, a folder or a hub id.

    A folder with LoRA weights only is put on the model its run began with: folded in, or with fuse False as
    adapters.
    """
    import diffusers
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    path = files.pipeline_folder(model)
    if (path / "args.json").exists():
        raise dist.RunError(f"model {model}: a run folder without model/; that run has not finished")
    if (path / LORA_FILE).exists():
        run = path.parent / "args.json"
        if not run.exists():
            raise dist.RunError(f"model {model}: LoRA weights without the args.json that names their model")
        pipe = read_pipeline(json.loads(run.read_text())["model"])
        pipe.load_lora_weights(path)
        if fuse:
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        return pipe
    if not path.exists() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise dist.RunError(f"model {model}: no such folder; expected a diffusers pipeline or a hub id")
    try:
        kind = diffusers.DiffusionPipeline.load_config(path).get("_class_name")
        if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
            raise ValueError(f"found a {kind}; expected a Stable Diffusion 1.x, 2.x or XL pipeline")
        extra = {} if "XL" in kind else {"safety_checker": None, "requires_safety_checker": False}
        pipe = getattr(diffusers, kind).from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, **extra
        )
    except Exception as error:  # the hub client and the parts of a pipeline raise many kinds
        raise dist.RunError(f"model {model}: cannot be loaded: {formats.first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trained_from(output_dir: str) -> str:
    """The model that a run began with.

    Raises:
        RunError: no finished run there.
    """
    folder = Path(output_dir)
    if not (folder / "args.json").exists() or not (folder / "model").is_dir():
        raise formats.wrong(f"output_dir {folder}", "no finished run", "a folder with args.json and model/")
    return json.loads((folder / "args.json").read_text())["model"]


def is_xl(pipe: Any) -> bool:
    return hasattr(pipe, "text_encoder_2")


def has_adapters(unet: nn.Module) -> bool:
    return bool(lora.layers(unet))


def add_lora(unet: nn.Module, weights: Weights, seed: int) -> None:
    """Put peft's adapters into the U-Net, in place; only they stay trainable."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear)]
    targets = linear if weights.lora_target == "all-linear" else weights.lora_target.split(",")
    rank, alpha = weights.lora_rank, weights.lora_alpha
    unet.lora_config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the same adapters on every rank
            inject_adapter_in_model(unet.lora_config, unet)
    except ValueError as error:
        raise dist.RunError(f"lora_target {weights.lora_target!r}: {formats.first_line(error)}") from error


# -------------------------------------------------------------------------------------- sampling and decoding


def schedule(pipe: Any, num_steps: int) -> Schedule:
    """DDIM's steps for SD, and Euler's for SDXL: the same in other variables, with alpha = 1 / (1 + sigma^2).

    The last step of both leads to alpha 1, the predicted image, also where set_alpha_to_one is false.

    Raises:
        RunError: the pipeline's scheduler does not say how much noise its model was trained with.
    """
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    found = getattr(pipe, "scheduler", None)
    prediction = getattr(getattr(found, "config", None), "prediction_type", None)
    if not hasattr(found, "alphas_cumprod") or prediction not in ("epsilon", "v_prediction"):
        raise dist.RunError(
            f"the pipeline's scheduler, {type(found).__name__} with prediction_type {prediction}, cannot be "
            "used; expected one with alphas_cumprod, and epsilon or v_prediction"
        )
    kind = EulerDiscreteScheduler if is_xl(pipe) else DDIMScheduler
    scheduler = kind.from_config(found.config)
    if not 0 < num_steps <= scheduler.config.num_train_timesteps:
        most = scheduler.config.num_train_timesteps
        raise dist.RunError(f"num_inference_steps {num_steps}; expected 1 to {most}, the steps of training")
    scheduler.set_timesteps(num_steps)
    if is_xl(pipe):
        alphas = 1 / (1 + scheduler.sigmas.double() ** 2)
    else:
        alphas = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps.long()].double(), torch.ones(1)])
    if alphas.min() < 1e-6:
        raise dist.RunError(
            "the pipeline's scheduler begins at alpha-bar 0, pure noise, where a noise prediction says "
            "nothing; set timestep_spacing to leading in its scheduler_config.json"
        )
    return Schedule(scheduler.timesteps.tolist(), alphas.float(), prediction == "v_prediction")


def drawn_by_diffusers(pipe: Any, prompts: list[str], noise: Tensor, num_steps: int, scale: float) -> Tensor:
    """The latents that the pipeline itself makes of a noise, with the scheduler that `schedule` follows."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    kind, held = EulerDiscreteScheduler if is_xl(pipe) else DDIMScheduler, pipe.scheduler
    options = {} if is_xl(pipe) else {"set_alpha_to_one": True, "clip_sample": False}
    pipe.scheduler = kind.from_config(held.config, **options)
    how = {"num_inference_steps": num_steps, "guidance_scale": scale, "output_type": "latent"}
    side = noise.shape[-1] * pipe.vae_scale_factor
    try:
        return pipe(prompts, latents=noise.to(pipe.vae.dtype), height=side, width=side, **how).images.float()
    finally:
        pipe.scheduler = held


def image_size(pipe: Any, size: int) -> int:
    """Pixels of a side: size, or what the U-Net was trained for if 0."""
    size = size or pipe.unet.config.sample_size * pipe.vae_scale_factor
    halvings = len(pipe.unet.config.block_out_channels) - 1
    if size % (pipe.vae_scale_factor * 2**halvings):
        raise dist.RunError(
            f"image_size {size}; expected a multiple of {pipe.vae_scale_factor * 2**halvings}"
        )
    return size


def noise(
    seed: int, step: int, indices: list[int], pipe: Any, size: int, device: torch.device, copy: int = 0
) -> Tensor:
    """Standard normal latents (B, C, h, w), each a function of (seed, step, its index in the batch, copy)."""
    side = size // pipe.vae_scale_factor
    shape = (pipe.unet.config.in_channels, side, side)
    streams = [np.random.default_rng((seed, step, index, copy)) for index in indices]
    return torch.from_numpy(np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams])).to(
        device
    )


@torch.no_grad()
def encode(pipe: Any, prompts: list[str], size: int, guided: bool, device: torch.device) -> dict[str, Any]:
    """What the U-Net takes beside latents and time: B rows, or 2B if guided, of empty prompts first."""
    if not is_xl(pipe):
        text, empty = pipe.encode_prompt(prompts, device, 1, guided)
        return {"encoder_hidden_states": torch.cat([empty, text]) if guided else text}
    text, empty, pooled, empty_pooled = pipe.encode_prompt(
        prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=guided
    )
    if guided:
        text, pooled = torch.cat([empty, text]), torch.cat([empty_pooled, pooled])
    ids = torch.tensor([[size, size, 0, 0, size, size]], device=device)  # size, crop and target of SDXL
    added = {"text_embeds": pooled, "time_ids": ids.repeat(len(pooled), 1)}
    return {"encoder_hidden_states": text, "added_cond_kwargs": added}


def decode(vae: nn.Module, latents: Tensor, recompute: bool) -> Tensor:
    """Images (B, 3, H, W) float32, on a scale of 0 to 1 but not clamped to it; gradients pass.

    One image at a time, and with recompute its activations are not kept: the decoder would dominate memory.
    """

    def one(x: Tensor) -> Tensor:
        return vae.decode(x / vae.config.scaling_factor, return_dict=False)[0]

    parts = latents.to(vae.dtype).split(1)
    images = [checkpoint(one, x, **RECOMPUTE) if recompute else one(x) for x in parts]
    return torch.cat(images).float() / 2 + 0.5


def micro_batches(prompts: list[str], size: int, device: torch.device) -> Iterator[MicroBatch]:
    """This rank's share of a batch, at most `size` images at a time, in as many pieces as on every rank."""
    shares = dist.shares([1] * len(prompts), dist.world_size())
    mine = shares[dist.rank()]
    for start in range(0, max(map(len, shares)), size):
        chosen = mine[start : start + size]
        indices = chosen or [0]
        weights = torch.full((len(indices),), float(bool(chosen)), device=device)
        yield MicroBatch(indices, [prompts[i] for i in indices], weights)


# ---------------------------------------------------------------------------------------------------- rewards


def load_reward(spec: str, device: torch.device) -> Reward:
    """The sum that a,b*0.5 asks for, of `brightness`, CLIP-style models and package.module:function.

    Raises:
        RunError: no such reward, or one without a finite value for each image and a gradient to its pixels.
    """
    parts = formats.read_sources(spec, "reward")
    functions = [_reward_function(name, device) for name, _ in parts]
    features = next((f.features for f in functions if hasattr(f, "features")), coarse_pixels)
    weights = torch.tensor([weight for _, weight in parts], device=device)
    for (name, _), function in zip(parts, functions, strict=True):
        check_reward(name, function, device)
    return Reward([name for name, _ in parts], weights, functions, features)


def _reward_function(name: str, device: torch.device) -> Callable:
    if name == "brightness":
        return brightness
    if name == "toy":
        return clip_reward(str(files.toy_folder("images") / "reward_model"), device)
    if re.fullmatch(r"[\w.]+:\w+", name):
        return load_function(name)
    return clip_reward(name, device)


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
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
    length = model.config.text_config.max_position_embeddings

    def features(images: Tensor) -> Tensor:
        pixels = clip_pixels(images, processor.image_processor)
        return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=1)

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        tokens = processor.tokenizer(
            prompts, padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(images.device)
        with torch.no_grad():
            text = F.normalize(model.get_text_features(**tokens).pooler_output, dim=1)
        return model.logit_scale.exp() * (features(images) * text).sum(1)

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


def check_reward(name: str, function: Callable, device: torch.device) -> None:
    """Try a reward on two grey images with some noise."""
    images = 0.5 + 0.1 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    images.requires_grad_(True)
    expected = "a finite (B,) tensor that gradients pass through, from images (B, 3, H, W) and B prompts"
    try:
        values = function(images, ["a cat", "a dog"])
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


def diversity(features: Tensor, images_per_prompt: int) -> float:
    """Mean distance between two images of one prompt; features (prompts * images_per_prompt, F)."""
    groups = features.view(-1, images_per_prompt, features.shape[1])
    distances = torch.cdist(groups, groups, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = images_per_prompt * (images_per_prompt - 1)
    return distances.sum().item() / (len(groups) * pairs) if pairs else 0.0


# ---------------------------------------------------------------------------------------------------- prompts


def load_prompts(dataset: str, eval_dataset: str) -> tuple[data.Dataset, data.Dataset]:
    """(train, eval) prompts; 5 % are held out where there is neither eval_dataset nor a test split."""

    def read(source: str, split: str) -> list[Example] | None:
        prompts = read_prompts(source, split)
        if prompts is None:
            return None
        return [Example([], [{"role": "user", "content": prompt}]) for prompt in prompts]

    train_parts, eval_parts = [], []
    for source, weight in formats.read_sources(dataset):
        examples = read(source, "train")
        if not eval_dataset:
            test = read(source, "test")
            examples, test = data.hold_out(examples, source) if test is None else (examples, test)
            eval_parts.append((test, 1.0))
        train_parts.append((examples, weight))
    for source, _ in formats.read_sources(eval_dataset) if eval_dataset else ():
        eval_parts.append((read(source, "test") or read(source, "train"), 1.0))
    train, evaluation = data.Dataset(train_parts), data.Dataset(eval_parts)
    if dist.is_main():
        print(f"prompts: {len(train):,} to train on, {len(evaluation):,} to evaluate on", flush=True)
    return train, evaluation


def texts(examples: list[Example]) -> list[str]:
    return [example.prompt[0]["content"] for example in examples]


def read_prompts(source: str, split: str = "train") -> list[str] | None:
    """The prompts of one data set's split; None if it has no such split.

    Text files (one a line), .tsv with a header line, webdataset .tar files (or a folder of them) of .txt
    members, and what formats.read_records reads, with a prompt, caption or text field.

    Raises:
        RunError: no such file, a line without a prompt, or no prompt at all.
    """
    path = files.toy_folder("images") / "prompts" if source == "toy" else Path(source).expanduser()
    try:
        if _is_plain(path):
            prompts = _plain_prompts(path) if split == "train" else None
        else:
            records = formats.read_records(str(path) if source == "toy" else source, split, "prompts")
            prompts = None if records is None else [_prompt(value, where) for value, where in records]
    except (OSError, UnicodeDecodeError, tarfile.TarError) as error:
        raise dist.RunError(f"dataset {source}: cannot be read: {formats.first_line(error)}") from error
    if prompts is None:
        return None
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise formats.wrong(f"dataset {source}", "no prompts", "at least one")
    return prompts


def _is_plain(path: Path) -> bool:
    """Whether it holds prompts and nothing else, which formats.read_records does not read."""
    if path.is_dir():
        return any(path.glob("*.tar"))
    return path.is_file() and path.suffix in (".txt", ".tsv", ".tar")


def _plain_prompts(path: Path) -> list[str]:
    if path.is_dir():
        return [text for tar in sorted(path.glob("*.tar")) for text in _tar_texts(tar)]
    if path.suffix == ".txt":
        return path.read_text(encoding="utf-8").split("\n")
    if path.suffix == ".tar":
        return _tar_texts(path)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [_prompt(row, f"{path}:{n}") for n, row in enumerate(rows, 2)]


def _prompt(value: dict, where: str) -> str:
    text = formats.first(value, ("prompt", "caption", "text", "Prompt"))
    if not isinstance(text, str):
        raise formats.wrong(where, value, "a prompt, caption or text")
    return text


def _tar_texts(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        members = sorted((m for m in tar if m.isfile() and m.name.endswith(".txt")), key=lambda m: m.name)
        return [tar.extractfile(member).read().decode("utf-8") for member in members]


# -------------------------------------------------------------------------------------------- average, export


def trained(unet: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def average(unet: nn.Module, decay: float) -> Any:
    """diffusers' moving average of the trained weights, sharded as they are: it has `step` and `copy_to`.

    At optimizer step n, counted from 1, its decay is (n + 1) / (n + 10), at most `decay`.
    """
    from diffusers.training_utils import EMAModel

    return EMAModel(trained(unet), decay=decay, update_after_step=-1)  # -1: its step 1 has a decay, not 0


@contextlib.contextmanager
def averaged(unet: nn.Module, ema: Any) -> Iterator[None]:
    """Within the block the U-Net has its averaged weights, if `ema` is not None."""
    if ema is None:
        yield
        return
    held = [parameter.detach().clone() for parameter in trained(unet)]
    ema.copy_to(trained(unet))
    try:
        yield
    finally:
        for parameter, before in zip(trained(unet), held, strict=True):
            parameter.data.copy_(before)


def export(output_dir: str, pipe: Any, unet: nn.Module, model: str, merge_lora: bool) -> None:
    """Write `model/`: a diffusers pipeline; with LoRA weights for load_lora_weights, unless merge_lora.

    Args:
        model: what the U-Net started from, whose other parts the pipeline takes.
    """
    folder = Path(output_dir) / "model"
    adapters = getattr(unet, "lora_config", None)
    merge = adapters is None or merge_lora
    weights = {}
    for name, tensor in models.full_weights(unet):
        if dist.is_main() and (adapters is None or ".lora_" in name):
            weights[name] = tensor.to("cpu", torch.float32, copy=True)
    if dist.is_main():
        with files.whole(folder) as unfinished:
            if merge:
                plain = read_pipeline(model)
                if adapters:
                    lora.merge(plain.unet, adapters, weights, torch.float32)
                else:
                    plain.unet.load_state_dict(weights)
                plain.save_pretrained(unfinished)
            else:
                named = {name.replace(".default.", "."): tensor for name, tensor in weights.items()}
                settings = {k: sorted(v) if isinstance(v, set) else v for k, v in adapters.to_dict().items()}
                pipe.save_lora_weights(unfinished, named, unet_lora_adapter_metadata=settings)
    dist.barrier()
