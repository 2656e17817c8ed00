"""Diffusion and flows: prompts in, what a denoiser is told of them, the steps of its sampler, and images out.

None of it depends on how the denoiser is trained. The four kinds of pipelines.py are told apart here, and
nowhere else: by what they take, by their schedules, and by their latents.

Shapes: B images in a micro-batch, S sampler steps, L tokens of a prompt; latents (B, C, h, w), images
(B, 3, H, W).
"""

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import data, dist, files, formats, streams
from common.packed import Example
from common.pipelines import RECOMPUTE, denoiser_of, is_flux, is_xl, modules

Encoded = dict[str | None, tuple[Tensor, ...]]  # prompt -> its embeddings on the CPU; None: of no prompt


class Schedule(NamedTuple):
    """The steps of a sampler that adds no noise; before step i, x = signal[i] image + noise[i] noise."""

    timesteps: list[float]  # (S,) what the denoiser is told before each step
    signal: Tensor  # (S + 1,) shares of the image before each step and at the end, where it is 1
    noise: Tensor  # (S + 1,) shares of standard normal noise
    predicts: str  # "noise"; "v", signal[i] noise - noise[i] image as in SD 2.x; or "flow", noise - image


class MicroBatch(NamedTuple):
    """Images of one forward. `indices` are places in the whole batch: what their noise is drawn from."""

    indices: list[int]
    prompts: list[str]
    records: list[dict]  # of the prompts, as they were read
    weights: Tensor  # (B,) 1, or 0 for an image that only keeps collectives matched


# -------------------------------------------------------------------------------------------------- schedules


def scheduler_of(pipe: Any) -> Any:
    """The scheduler that is followed: DDIM's for SD, Euler's for SDXL, Euler's of a flow for SD 3.x and FLUX.

    Raises:
        RunError: another kind of scheduler than the pipeline's models were trained with.
    """
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    found = pipe.scheduler
    config = getattr(found, "config", {})
    prediction = config.get("prediction_type")
    if not hasattr(pipe, "unet"):
        expected = "FlowMatchEulerDiscreteScheduler without stochastic_sampling and invert_sigmas"
        is_flow = isinstance(found, FlowMatchEulerDiscreteScheduler)
        if is_flow and not (config.stochastic_sampling or config.invert_sigmas):
            return FlowMatchEulerDiscreteScheduler.from_config(config)
    else:
        expected = "one with alphas_cumprod, and epsilon or v_prediction"
        if hasattr(found, "alphas_cumprod") and prediction in ("epsilon", "v_prediction"):
            if is_xl(pipe):
                return EulerDiscreteScheduler.from_config(config)
            # the last step leads to the image, signal 1
            return DDIMScheduler.from_config(config, set_alpha_to_one=True, clip_sample=False)
    name = f"{type(found).__name__} with prediction_type {prediction}"
    raise dist.RunError(f"the pipeline's scheduler, {name}, cannot be used; expected {expected}")


def schedule(pipe: Any, num_steps: int, size: int, device: torch.device) -> Schedule:
    """The steps of `scheduler_of`, a flow's with the shift of times that it has.

    Euler's of SDXL are DDIM's in other variables, with alpha = 1 / (1 + sigma^2).

    Args:
        size: pixels of a side, which dynamic shifting depends on.

    Raises:
        RunError: no scheduler to follow, too many steps, or a first one that says nothing.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler, given = scheduler_of(pipe), {}
    config, most = scheduler.config, scheduler.config.num_train_timesteps
    if not 0 < num_steps <= most:
        raise dist.RunError(f"num_inference_steps {num_steps}; expected 1 to {most}, the steps of training")
    if config.get("use_dynamic_shifting"):
        patches = (size // multiple(pipe)) ** 2
        lengths = (config.base_image_seq_len, config.max_image_seq_len)
        given["mu"] = calculate_shift(patches, *lengths, config.base_shift, config.max_shift)
    if is_flux(pipe):  # to 1 / S, where SD 3.x goes on to the least time of training
        given["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
    scheduler.set_timesteps(num_steps, **given)
    if not hasattr(pipe, "unet"):
        predicts, signal, noise = "flow", 1 - scheduler.sigmas, scheduler.sigmas
    else:
        if is_xl(pipe):
            alphas = 1 / (1 + scheduler.sigmas.double() ** 2)
        else:
            alphas = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps.long()].double(), torch.ones(1)])
        alphas = alphas.float()
        predicts, signal, noise = "noise", alphas.sqrt(), (1 - alphas).sqrt()
        if config.prediction_type == "v_prediction":
            predicts = "v"
        elif alphas.min() < 1e-6:
            raise dist.RunError(
                "the pipeline's scheduler begins at alpha-bar 0, pure noise, where a noise prediction says "
                "nothing; set timestep_spacing to leading in its scheduler_config.json"
            )
    return Schedule(scheduler.timesteps.tolist(), signal.to(device), noise.to(device), predicts)


# ---------------------------------------------------------------------------------------------------- latents


def multiple(pipe: Any) -> int:
    """Pixels that a side must be a multiple of."""
    if is_flux(pipe):
        return 2 * pipe.vae_scale_factor  # latents are packed in squares of 2 x 2
    config = denoiser_of(pipe).config
    parts = 2 ** (len(config.block_out_channels) - 1) if hasattr(pipe, "unet") else config.patch_size
    return parts * pipe.vae_scale_factor


def image_size(pipe: Any, size: int) -> int:
    """Pixels of a side: size, or what the denoiser was trained for if 0."""
    factor, config = pipe.vae_scale_factor, denoiser_of(pipe).config
    trained = pipe.default_sample_size if is_flux(pipe) else config.sample_size
    size = size or trained * factor
    if size % multiple(pipe):
        raise dist.RunError(f"image_size {size}; expected a multiple of {multiple(pipe)}")
    most = getattr(config, "pos_embed_max_size", None)  # of SD 3.x, in patches
    if most and size > most * multiple(pipe):
        raise dist.RunError(f"image_size {size}; expected at most {most * multiple(pipe)}, its positions")
    return size


def noise(
    seed: int, step: int, indices: list[int], pipe: Any, size: int, device: torch.device, copy: int = 0
) -> Tensor:
    """Standard normal latents (B, C, h, w), each a function of (seed, step, its index in the batch, copy)."""
    side = size // pipe.vae_scale_factor
    shape = (pipe.vae.config.latent_channels, side, side)
    draws = [np.random.default_rng((seed, step, index, copy)) for index in indices]
    return torch.from_numpy(np.stack([s.standard_normal(shape, dtype=np.float32) for s in draws])).to(device)


def decode(vae: nn.Module, latents: Tensor, recompute: bool) -> Tensor:
    """Images (B, 3, H, W) float32, on a scale of 0 to 1 but not clamped to it; gradients pass.

    One image at a time, and with recompute its activations are not kept: the decoder would dominate memory.
    """
    shift = getattr(vae.config, "shift_factor", None) or 0.0

    def one(x: Tensor) -> Tensor:
        return vae.decode(x / vae.config.scaling_factor + shift, return_dict=False)[0]

    parts = latents.to(vae.dtype).split(1)
    images = [checkpoint(one, x, **RECOMPUTE) if recompute else one(x) for x in parts]
    return torch.cat(images).float() / 2 + 0.5


# ------------------------------------------------------------------------------------------------- conditions


@torch.no_grad()
def encode(pipe: Any, prompts: list[str], device: torch.device, empty: bool = False) -> tuple[Tensor, ...]:
    """Text (B, L, D) and, but for SD 1.x and 2.x, pooled (B, P) embeddings; empty: of no prompt instead."""
    if is_flux(pipe):
        return pipe.encode_prompt(prompts, None, device)[:2]
    others = (None, None) if type(pipe).__name__ == "StableDiffusion3Pipeline" else ()  # of other encoders
    how = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": empty}
    return pipe.encode_prompt(prompts, *others, **how)[int(empty) :: 2]  # text, empty, pooled, empty pooled


def encode_all(
    pipe: Any, prompts: Iterable[str], encoded: Encoded, batch_size: int, device: torch.device
) -> None:
    """Add what is missing of these prompts to `encoded`, in host memory."""
    if None not in encoded:
        encoded[None] = tuple(part[0].cpu() for part in encode(pipe, [""], device, empty=True))
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in encoded]
    for start in range(0, len(missing), batch_size):
        chunk = missing[start : start + batch_size]
        rows = zip(*(part.cpu() for part in encode(pipe, chunk, device)), strict=True)
        encoded.update(zip(chunk, rows, strict=True))


def encode_ahead(
    pipe: Any, batches: Iterable[list[Example]], batch_size: int, device: torch.device
) -> Encoded:
    """Embeddings of this rank's prompts of all batches; then the text encoders are freed.

    batch_size: of micro-batches, as these will be cut.
    """
    parts = (part for batch in batches for part in micro_batches(batch, batch_size, device))
    own = (prompt for part in parts for prompt in part.prompts)  # those that only match collectives too
    encoded: Encoded = {}
    encode_all(pipe, own, encoded, batch_size, device)
    for name in modules(pipe):
        if name.startswith("text_encoder"):
            setattr(pipe, name, None)
    gib = sum(part.nbytes for parts in encoded.values() for part in parts) / 2**30
    if dist.is_main():
        print(f"prompts: {len(encoded) - 1:,} encoded ahead, {gib:.2g} GiB of host memory a rank", flush=True)
    return encoded


def has_guidance(pipe: Any, scale: float) -> bool:
    """Whether predictions without a prompt are asked for too: not by FLUX, which is told the scale.

    Raises:
        RunError: a scale for a model that has no guidance at all.
    """
    if is_flux(pipe) and scale != 1 and not pipe.transformer.config.guidance_embeds:
        raise formats.wrong("guidance_scale", scale, "1: this FLUX was distilled without guidance")
    return scale != 1 and not is_flux(pipe)


def conditions(
    pipe: Any, encoded: Encoded, prompts: list[str], size: int, scale: float, device: torch.device
) -> dict[str, Any]:
    """What the denoiser takes beside latents and time: B rows, or where guided 2B, of no prompt first."""
    rows = [None] * len(prompts) * has_guidance(pipe, scale) + prompts
    text, *pooled = (torch.stack(part).to(device) for part in zip(*(encoded[r] for r in rows), strict=True))
    given: dict[str, Any] = {"encoder_hidden_states": text}
    if is_xl(pipe):
        ids = torch.tensor([[size, size, 0, 0, size, size]], device=device)  # size, crop and target
        given["added_cond_kwargs"] = {"text_embeds": pooled[0], "time_ids": ids.repeat(len(text), 1)}
    elif pooled:
        given["pooled_projections"] = pooled[0]
    if is_flux(pipe):
        places = torch.arange(size // multiple(pipe), device=device, dtype=torch.float32)
        given["img_ids"] = torch.cartesian_prod(places.new_zeros(1), places, places)  # row and column
        given["txt_ids"] = places.new_zeros(text.shape[1], 3)
        if pipe.transformer.config.guidance_embeds:
            given["guidance"] = torch.full((len(text),), scale, device=device)
    return given


def prediction(denoiser: nn.Module, x: Tensor, timestep: float, given: dict[str, Any]) -> Tensor:
    """The denoiser's output, float32 of the shape of the latents x; `given` by conditions()."""
    x = x.to(given["encoder_hidden_states"].dtype)
    if not hasattr(denoiser, "transformer_blocks"):
        return denoiser(x, timestep, **given, return_dict=False)[0].float()
    times = torch.full((len(x),), timestep, device=x.device)
    if "img_ids" not in given:
        return denoiser(x, timestep=times, **given, return_dict=False)[0].float()
    packed = F.pixel_unshuffle(x, 2)  # FLUX: (B, 4 C, h / 2, w / 2), and a row for each place
    rows = denoiser(packed.flatten(2).mT, timestep=times / 1000, **given, return_dict=False)[0]
    return F.pixel_shuffle(rows.mT.unflatten(2, packed.shape[2:]), 2).float()


@torch.no_grad()
def drawn_by_diffusers(pipe: Any, prompts: list[str], noise: Tensor, num_steps: int, scale: float) -> Tensor:
    """The latents that the pipeline itself makes of a noise, with the scheduler that `schedule` follows."""
    held, pipe.scheduler = pipe.scheduler, scheduler_of(pipe)
    how = {"num_inference_steps": num_steps, "guidance_scale": scale, "output_type": "latent"}
    side = noise.shape[-1] * pipe.vae_scale_factor
    rows = pipe._pack_latents(noise, *noise.shape) if is_flux(pipe) else noise
    try:
        found = pipe(prompts, latents=rows.to(pipe.text_encoder.dtype), height=side, width=side, **how).images
    finally:
        pipe.scheduler = held
    if is_flux(pipe):
        found = pipe._unpack_latents(found, side, side, pipe.vae_scale_factor)
    return found.float()


def memory(device: torch.device) -> dict[str, float]:
    """The most that this GPU has held, in GiB and as a share of its memory; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    most, whole = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(device).total_memory
    return {"train/max_memory_gib": most / 2**30, "train/max_memory_share": most / whole}


# ---------------------------------------------------------------------------------------------------- prompts

# of the datasets library, for files that hold prompts and nothing else; the place of the first, its options
READERS = {
    ".txt": ("text", 1, {}),
    ".tsv": ("csv", 2, {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}),
    ".tar": ("webdataset", 0, {}),
}
SUFFIXES = (*READERS, ".jsonl", ".json", ".parquet", ".gz")
PROMPTS = ("prompt", "caption", "text", "Prompt", "txt")


def micro_batches(examples: list[Example], size: int, device: torch.device) -> Iterator[MicroBatch]:
    """This rank's share of a batch, at most `size` images at a time, in as many pieces as on every rank."""
    shares = dist.shares([1] * len(examples), dist.world_size())
    mine = shares[dist.rank()]
    for start in range(0, max(map(len, shares)), size):
        chosen = mine[start : start + size]
        indices = chosen or [0]
        part = as_micro_batch([examples[i] for i in indices], device)
        yield part._replace(indices=indices, weights=part.weights * bool(chosen))


def as_micro_batch(examples: list[Example], device: torch.device) -> MicroBatch:
    """All of these, on every rank."""
    records, weights = [example.record for example in examples], torch.ones(len(examples), device=device)
    return MicroBatch([*range(len(examples))], texts(examples), records, weights)


def texts(examples: list[Example]) -> list[str]:
    return [example.prompt[0]["content"] for example in examples]


def as_example(prompt: str, record: dict) -> Example:
    return Example([], [{"role": "user", "content": prompt}], record=record)


def load_prompts(dataset: str, eval_dataset: str) -> tuple[data.Dataset, data.Dataset]:
    """(train, eval) prompts."""
    return data.mix("prompts", dataset, eval_dataset, read_prompts)


def prompts_to_draw(source: str) -> tuple[list[Example], str]:
    """The prompt itself, if it has a space and is no file, else those of a data set; and a name for files."""
    path = Path(source).expanduser()
    if re.search(r"\s", source) and not path.exists() and path.suffix not in SUFFIXES:
        return [as_example(source.strip(), {"prompt": source})], re.sub(r"\W+", "_", source.strip())[:60]
    return read_prompts(source), path.stem


def read_prompts(source: str, split: str = "train") -> list[Example] | None:
    """The prompts of one data set's split, each with its record; None if it has no such split.

    Text files (one a line), .tsv with a header line, webdataset .tar files (or a folder of them) of .txt
    members, and what formats.read_records reads, with a prompt, caption or text field.

    Raises:
        RunError: no such file, a line without a prompt, or no prompt at all.
    """
    path = files.toy_folder("images") / "prompts" if source == "toy" else Path(source).expanduser()
    paths = (sorted(path.glob("*.tar")) if path.is_dir() else []) or [path]
    if paths[0].is_file() and paths[0].suffix in READERS:
        records = _read_plain(source, paths) if split == "train" else None
    else:
        records = formats.read_records(str(path) if source == "toy" else source, split, "prompts")
    if records is None:
        return None
    found = []
    for value, where in records:
        prompt = formats.first(value, PROMPTS)
        if not isinstance(prompt, str):
            what = value if prompt is None else f"a prompt that is no text: {prompt!r}"
            raise formats.wrong(where, what, "a prompt, caption or text")
        if prompt.strip():
            found.append(as_example(prompt.strip(), value))
    if not found:
        raise formats.wrong(f"dataset {source}", "no prompts", "at least one")
    if len(found) < len(records) and dist.is_main():
        print(f"{source}: dropped {len(records) - len(found)} with an empty prompt", flush=True)
    return found


def _read_plain(source: str, paths: list[Path]) -> list[formats.Record]:
    how, first, options = READERS[paths[0].suffix]
    names = [str(path) for path in paths]
    if not any(path.stat().st_size for path in paths):
        return []
    table = streams.load_table(source, "load_dataset", how, data_files=names, split="train", **options)
    where = f"{source} row " if how == "webdataset" else f"{source}:"
    own = ({name: x for name, x in row.items() if name[:2] != "__"} for row in table)  # not where it is
    return [formats.Record(value, f"{where}{n}") for n, value in enumerate(own, first)]
