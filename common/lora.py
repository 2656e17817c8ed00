"""LoRA: adapters beside the weights of a model, which alone are trained, and what is written of them.

The module of a weight that has adapters is wrapped by peft, and its own weight is then `base_layer`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import dist


def add(model: nn.Module, rank: int, alpha: float, target: str) -> None:
    """Put peft's adapters into the model's linear layers, in place; only they stay trainable."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = target if target == "all-linear" else target.split(",")
    is_scorer = hasattr(model, "score")
    model.lora_config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        exclude_modules=["score"] if is_scorer else None,
        task_type="SEQ_CLS" if is_scorer else "CAUSAL_LM",
    )
    try:
        inject_adapter_in_model(model.lora_config, model)
    except ValueError as error:
        raise dist.RunError(f"lora_target {target!r}: {str(error).splitlines()[0]}") from error
    ends = (model.get_input_embeddings(), model.score if is_scorer else model.get_output_embeddings())
    if is_scorer:
        model.score.requires_grad_(True)  # a head of its own is trained whole
    if any(hasattr(end, "base_layer") for end in ends):
        raise dist.RunError(f"lora_target {target!r}: embeddings and the output head take no adapters")


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block a LoRA policy is its own reference: the base model, exactly."""
    layers = [m for m in model.modules() if hasattr(m, "base_layer")]
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters() would also flip requires_grad under FSDP's feet
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def deltas(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name in the plain model, change of the weight in float32) of each weight that adapters sit on.

    Args:
        weights: the whole weights of the model, of which only those of adapters are read.
    """
    for owner, layer in model.named_modules():
        if hasattr(layer, "base_layer"):
            a, b = (weights[f"{owner}.lora_{x}.default.weight"].float() for x in "AB")
            delta = layer.scaling["default"] * (b @ a)
            yield f"{owner}.weight", delta.T if layer.fan_in_fan_out else delta


# ------------------------------------------------------------------------------------------------ on disk


def base_of(folder: str) -> str:
    """What the adapters of a peft folder stand on."""
    from peft import PeftConfig

    return PeftConfig.from_pretrained(folder).base_model_name_or_path


def read(base: nn.Module, folder: str) -> nn.Module:
    """The plain model `base` with the adapters of a peft folder merged into it."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, folder).merge_and_unload()
    model.dtype_on_disk = base.dtype_on_disk
    return model


def merge(
    model: nn.Module, base: dict[str, Tensor], trained: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The base as it is on disk plus what adapters change, added in float32 and rounded once.

    The policy's own copy of the base will not do: it has been rounded to the compute dtype.

    Args:
        model: what was trained.
        trained: the whole weights of its adapters, and of a head of its own.
    """
    weights = dict(base)
    kept = change = 0.0
    for name, delta in deltas(model, trained):
        merged = (weights[name].float() + delta).to(dtype)
        kept += ((merged.float() - weights[name].float()) * delta).sum().item()
        change += delta.square().sum().item()
        weights[name] = merged
    if dtype != torch.float32 and change > 0:
        lost, kind = 1 - kept / change, str(dtype).removeprefix("torch.")
        print(
            f"adapters merged in {kind}: rounding loses {lost:.2f} of their change; --merge_dtype float32 "
            "keeps it, as a peft folder does",
            flush=True,
        )
    own = {name: tensor for name, tensor in trained.items() if ".lora_" not in name}  # a head of its own
    return {name: tensor.to(dtype) for name, tensor in (weights | own).items()}


def save(folder: Path, config: Any, base: str, weights: dict[str, Tensor]) -> None:
    """A folder that peft loads: adapters, and where their base is, by its hub id or absolute path."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).exists() else base
    config.save_pretrained(folder)
    named = {f"base_model.model.{name.replace('.default.', '.')}": t for name, t in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
