"""Image pipelines of diffusers: a folder or hub id in, out a frozen pipeline with a sharded denoiser.

Four kinds: Stable Diffusion 1.x and 2.x, XL, 3.x, and FLUX.1. The denoiser, a U-Net or a transformer, is the
part that is trained. None of it depends on how.
"""

import contextlib
import copy
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from common import dist, files, formats, lora, models, plan
from common.args import Weights

KINDS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
RECOMPUTE = {"use_reentrant": False, "preserve_rng_state": False}  # of torch's checkpoint; nothing is random
LORA_FILE = "pytorch_lora_weights.safetensors"
# what activation checkpointing wraps, of denoisers and decoders; diffusers' own takes three of a decoder's
PARTS = ("ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock")
PARTS += ("FluxSingleTransformerBlock",)

# ------------------------------------------------------------------------------------------------ parts


def modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def denoiser_of(pipe: Any) -> nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def is_xl(pipe: Any) -> bool:
    return type(pipe).__name__ == "StableDiffusionXLPipeline"


def is_flux(pipe: Any) -> bool:
    return type(pipe).__name__ == "FluxPipeline"


def blocks(denoiser: nn.Module) -> list[nn.Module]:
    """What is gathered at a time where the denoiser is sharded."""
    if hasattr(denoiser, "transformer_blocks"):
        return [*denoiser.transformer_blocks, *getattr(denoiser, "single_transformer_blocks", ())]
    return [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]


def has_adapters(denoiser: nn.Module) -> bool:
    return bool(lora.layers(denoiser))


def scale_adapters(denoiser: nn.Module, scale: float) -> None:
    """Let adapters add this share of what they have learned; 1 is all."""
    if scale != 1 and not has_adapters(denoiser):
        raise formats.wrong("lora_scale", scale, "1: that run trained all weights")
    for _, layer in lora.layers(denoiser):
        layer.scale_layer(scale)


# --------------------------------------------------------------------------------------------- load and shard


def load(
    model: str, device: torch.device, weights: Weights, seed: int, trainable: bool = True, fuse: bool = True
) -> tuple[Any, nn.Module]:
    """(pipeline, denoiser): all frozen but the denoiser, or its adapters, which is sharded over all ranks.

    Only rank 0 reads the weights. Only a trainable model gets adapters, drawn from the seed.

    Raises:
        RunError: no such pipeline, or one of another kind.
    """
    full: list[Any] = []  # rank 0's; the others stay without a copy

    def read() -> Any:
        pipe = read_pipeline(model, fuse)
        for part in modules(pipe).values():
            part.requires_grad_(False).eval()
        denoiser_of(pipe).requires_grad_(trainable)
        if trainable and weights.lora_rank > 0:  # then only the adapters are
            add_lora(denoiser_of(pipe), weights, seed)
        full.append(pipe)
        return without_numbers(pipe)

    pipe = dist.from_main(read)
    denoiser, dtype = denoiser_of(pipe), models.resolve_dtype(weights.dtype, device)
    for name, part in modules(pipe).items():
        if part is denoiser:
            continue
        if isinstance(part, transformers.PreTrainedModel):
            with torch.device("meta"):  # where no model of its class was made, one gives no hidden states
                type(part)(part.config)
        is_wide = name == "vae" and is_xl(pipe) and part.config.force_upcast  # as its config asks for
        part.to(torch.float32 if is_wide else dtype).to_empty(device=device)
        if hasattr(part, "tie_weights"):
            part.tie_weights()  # to_empty makes two of each shared parameter, as of T5's embedding
        models.fill(part, modules(full[0])[name] if full else None)
    for parameter in denoiser.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)  # frozen weights need no float32 master
    is_large = device.type == "cuda" and sum(p.numel() for p in denoiser.parameters()) > 1.5e9
    choice = weights.activation_checkpointing
    if trainable and (choice == "on" or (choice == "auto" and is_large)):
        for part in (*denoiser.modules(), *pipe.vae.modules()):
            if type(part).__name__ in PARTS:
                part.forward = functools.partial(checkpoint, part.forward, **RECOMPUTE)
    # resharded after each forward, so that a change of the weights in place is seen by the next one
    plan = models.fsdp_plan(denoiser, dtype, device, weights.sharding) | {"reshard_after_forward": True}
    # inputs come in the compute dtype, but for times and rotary angles, which it would round
    plan["mp_policy"] = dataclasses.replace(plan["mp_policy"], cast_forward_inputs=False)
    for block in blocks(denoiser):
        fully_shard(block, **plan)
    fully_shard(denoiser, **plan)
    models.sum_gradients(denoiser)
    models.fill(denoiser.to_empty(device=device), denoiser_of(full.pop()) if full else None)
    return pipe, denoiser


def without_numbers(pipe: Any) -> Any:
    """A copy of a pipeline whose modules have shapes and dtypes only: small enough to send."""
    parts, known = modules(pipe).values(), {}
    for tensor in (t for part in parts for t in (*part.parameters(), *part.buffers())):
        shape = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        known[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if is_parameter else shape
    return copy.deepcopy(pipe, known)


def empty(model: str) -> Any:
    """The diffusers pipeline of a folder or hub id by its configs alone, without tokenizers and scheduler."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    folder = files.pipeline_folder(model)

    def read() -> Any:
        index = diffusers.DiffusionPipeline.load_config(folder)
        if index["_class_name"] not in KINDS:
            raise ValueError(f"found a {index['_class_name']}; expected one of {', '.join(KINDS)}")
        parts = {name: x for name, x in index.items() if name[0] != "_"}
        for name, (_, kind) in [(name, x) for name, x in parts.items() if isinstance(x, list)]:
            parts[name] = None
            if name.startswith("text_encoder") and kind:
                own = getattr(transformers, kind)
                parts[name] = own(own.config_class.from_pretrained(folder, subfolder=name))
            elif name in ("unet", "transformer", "vae"):
                own = getattr(diffusers, kind)
                parts[name] = own.from_config(own.load_config(folder, subfolder=name))
        return getattr(diffusers, index["_class_name"])(**parts)

    return plan.built(f"model {model}", read)


def read_pipeline(model: str, fuse: bool = True) -> Any:
    """The plain float32 diffusers pipeline of `toy`, a run folder, a folder or a hub id.

    A folder with LoRA weights only is put on the model its run began with: folded in, or with fuse False as
    adapters.
    """
    import diffusers

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
        if kind not in KINDS:
            raise ValueError(f"found a {kind}; expected one of {', '.join(KINDS)}")
        extra = {"safety_checker": None, "requires_safety_checker": False} if kind == KINDS[0] else {}
        pipe = getattr(diffusers, kind).from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, **extra
        )
    except Exception as error:  # the hub client and the parts of a pipeline raise many kinds
        raise dist.RunError(f"model {model}: cannot be loaded: {formats.first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_finished(output_dir: str, options: dict[str, Any], accept_changes: bool) -> None:
    """End the run unless a finished one is in output_dir that had these options, its model among them."""
    folder = Path(output_dir)
    if not (folder / "args.json").exists() or not (folder / "model").is_dir():
        raise formats.wrong(f"output_dir {folder}", "no finished run", "a folder with args.json and model/")
    began = files.read_json(folder / "args.json")
    for name, value in options.items():
        if began[name] != value and (name == "model" or not accept_changes):
            or_else = "" if name == "model" else ", or --accept_changes"
            expected = f"--{name} {began[name]}, as the run in {folder}{or_else}"
            raise formats.wrong(f"{name}", value, expected)


def add_lora(denoiser: nn.Module, weights: Weights, seed: int) -> None:
    """Put peft's adapters into the denoiser, in place; only they stay trainable."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    targets = linear if weights.lora_target == "all-linear" else weights.lora_target.split(",")
    rank, alpha = weights.lora_rank, weights.lora_alpha
    denoiser.lora_config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the same adapters on every rank
            inject_adapter_in_model(denoiser.lora_config, denoiser)
    except ValueError as error:
        raise dist.RunError(f"lora_target {weights.lora_target!r}: {formats.first_line(error)}") from error


# -------------------------------------------------------------------------------------------- average, export


def trained(denoiser: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


def average(denoiser: nn.Module, decay: float) -> Any:
    """diffusers' moving average of the trained weights, sharded as they are: it has `step` and `copy_to`.

    At optimizer step n, counted from 1, its decay is (n + 1) / (n + 10), at most `decay`.
    """
    from diffusers.training_utils import EMAModel

    return EMAModel(trained(denoiser), decay=decay, update_after_step=-1)  # -1: its step 1 has a decay, not 0


@contextlib.contextmanager
def averaged(denoiser: nn.Module, ema: Any) -> Iterator[None]:
    """Within the block the denoiser has its averaged weights, if `ema` is not None."""
    if ema is None:
        yield
        return
    held = [parameter.detach().clone() for parameter in trained(denoiser)]
    ema.copy_to(trained(denoiser))
    try:
        yield
    finally:
        for parameter, before in zip(trained(denoiser), held, strict=True):
            parameter.data.copy_(before)


def export(output_dir: str, pipe: Any, denoiser: nn.Module, model: str, merge_lora: bool) -> None:
    """Write `model/`: a diffusers pipeline; with LoRA weights for load_lora_weights, unless merge_lora.

    Args:
        model: what the denoiser started from, whose other parts the pipeline takes.
    """
    folder = Path(output_dir) / "model"
    adapters = getattr(denoiser, "lora_config", None)
    merge = adapters is None or merge_lora
    weights = {}
    for name, tensor in models.full_weights(denoiser):
        if dist.is_main() and (adapters is None or ".lora_" in name):
            weights[name] = tensor.to("cpu", torch.float32, copy=True)
    if dist.is_main():
        with files.whole(folder) as unfinished:
            if merge:
                plain = read_pipeline(model)
                if adapters:
                    lora.merge(denoiser_of(plain), adapters, weights, torch.float32)
                else:
                    denoiser_of(plain).load_state_dict(weights)
                plain.save_pretrained(unfinished)
            else:
                named = {name.replace(".default.", "."): tensor for name, tensor in weights.items()}
                settings = {k: sorted(v) if isinstance(v, set) else v for k, v in adapters.to_dict().items()}
                part = next(name for name, found in modules(pipe).items() if found is denoiser)
                given = {f"{part}_lora_layers": named, f"{part}_lora_adapter_metadata": settings}
                pipe.save_lora_weights(unfinished, **given)
    dist.barrier()
