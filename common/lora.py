"""LoRA: adapters beside the weights of a model, which alone are trained, and what is written of them.

The module of a weight that has adapters is wrapped by peft, and its own weight is then `base_layer`.
"""

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import dist

# peft moves adapters of modules so called to the experts, in families whose older files hold these singly; a
# shared expert and a dense layer keep theirs where they are named by the parameter, as gate_proj.weight
EXPERT_NAMES = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}


def add(model: nn.Module, rank: int, alpha: float, target: str) -> None:
    """Put peft's adapters into the model's linear layers and experts, in place; only they stay trainable.

    Raises:
        RunError: a name in target is of no layer that takes adapters, or peft would not read one as written.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    is_scorer = hasattr(model, "score")
    model.lora_config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        **targets(model, target),
        exclude_modules=["score"] if is_scorer else None,
        task_type="SEQ_CLS" if is_scorer else "CAUSAL_LM",
    )
    inject_adapter_in_model(model.lora_config, model)
    if is_scorer:
        model.score.requires_grad_(True)  # a head of its own is trained whole
        return
    trained = {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}
    lost = [x for x in set_peft_model_state_dict(model, trained).missing_keys if ".lora_" in x]
    if lost:
        kind, name = model.config.model_type, lost[0].partition(".lora_")[0]
        raise dist.RunError(
            f"lora_target {target!r}: peft does not read back the adapters of {name} in a {kind} model; name "
            "other layers, as q_proj,v_proj"
        )


def targets(model: nn.Module, target: str) -> dict[str, Any]:
    """What peft is told of where adapters go: names of modules, and of parameters that hold many experts."""
    from transformers.pytorch_utils import Conv1D

    head = model.score if hasattr(model, "score") else model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and m is not head]
    experts = [name for name, p in model.named_parameters() if p.ndim == 3]
    found, names = [*linear, *experts], target.split(",")
    if target != "all-linear":
        chosen = {name: [x for x in found if f".{x}".endswith(f".{name}")] for name in names}
        if [] in chosen.values():
            known = ", ".join(sorted({x.removesuffix(".weight").rpartition(".")[2] for x in found}))
            unknown = next(name for name in names if not chosen[name])
            raise dist.RunError(f"lora_target {target!r}: {unknown!r} takes none; expected some of {known}")
        found = [x for some in chosen.values() for x in some]
    if not experts:
        return {"target_modules": target if target == "all-linear" else names}
    short = {re.sub(r"^.*?\.\d+\.", "", x): x in linear for x in found}  # one name for all layers
    modules = [x for x, is_linear in short.items() if is_linear and x.rpartition(".")[2] not in EXPERT_NAMES]
    rest = [f"{x}.weight" if is_linear else x for x, is_linear in short.items() if x not in modules]
    return {"target_modules": modules, "target_parameters": rest}


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of each wrapper; experts have one around another, for each of their parameters."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "base_layer")]


def num_folded(model: nn.Module) -> int:
    """Weights that peft adds adapters to in each forward, which backward then needs as they were."""
    return sum(layer.get_param().numel() for _, layer in layers(model) if hasattr(layer, "parameter_name"))


def fold(layer: nn.Module) -> None:
    """Put the adapters of experts into their weight, in place, as peft does for each forward."""
    with layer._activate_lora(layer.active_adapters):
        folded = getattr(layer.get_base_layer(), layer.parameter_name).clone()
    layer.get_param().copy_(folded)
    layer._disable_adapters = True


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block a LoRA policy is its own reference: the base model, exactly."""
    for _, layer in layers(model):
        layer._disable_adapters = True  # enable_adapters() would also flip requires_grad under FSDP's feet
    try:
        yield
    finally:
        for _, layer in layers(model):
            layer._disable_adapters = False


# ------------------------------------------------------------------------------------------------ on disk


def base_of(folder: str) -> str:
    """What the adapters of a peft folder stand on.

    Raises:
        RunError: it is nowhere.
    """
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if Path(base).is_absolute() and not Path(base).exists():
        raise dist.RunError(f"{folder} holds adapters of {base}, which is not there; put it back")
    return base


def read(base: nn.Module, folder: str) -> nn.Module:
    """The plain model `base` with the adapters of a peft folder merged into it, in float32.

    Its attribute `lost` is the share of their change that rounding to bfloat16 would lose.

    Raises:
        UserWarning: the folder lacks weights of adapters that its config names; peft would go on without.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft asks for it
        adapted = PeftModel.from_pretrained(base.float(), folder)
    kept = sum((kept_by(w, x, torch.bfloat16) for w, x in changes(adapted)), torch.zeros(2))
    base.lost = max(share_lost(kept), getattr(base, "lost", 0.0))
    return adapted.merge_and_unload()


@torch.no_grad()
def changes(model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(weight, made float32, and what its adapters add to it) of each layer that has some."""
    from peft.tuners.lora import LoraLayer

    for _, layer in layers(model):
        if isinstance(layer, LoraLayer):
            weight = layer.get_param() if hasattr(layer, "parameter_name") else layer.get_base_layer().weight
            weight.data = weight.data.float()  # peft gives the change in the dtype that the weight has
            yield weight, layer.get_delta_weight("default")


def kept_by(weight: Tensor, change: Tensor, dtype: torch.dtype) -> Tensor:
    """What is left of a change in the sum once that is rounded, along the change, and all of it. -> (2,)"""
    moved = (weight + change).to(dtype).float() - weight
    return torch.stack([(moved * change).sum(), change.square().sum()]).detach()


def share_lost(kept: Tensor) -> float:
    """The share of adapters' change that rounding loses, in hundredths, from sums of `kept_by`."""
    left, whole = kept.tolist()
    return round(1 - left / whole, 2) + 0.0 if whole > 0 else 0.0  # -0.0 + 0.0 is 0.0


@functools.cache  # a policy and its reference are read from one folder
def say_what_is_lost(model: str, lost: float, dtype: torch.dtype) -> None:
    """One line if rounding loses a hundredth or more of what adapters change in weights that are frozen."""
    if lost >= 0.01:
        kind = str(dtype).removeprefix("torch.")
        print(
            f"{model}: its adapters are folded into {kind} weights, where rounding loses {lost:.2f} of their "
            "change; --dtype float32 keeps it, or, of a policy, --lora_rank 0, which has float32 masters",
            flush=True,
        )


@torch.no_grad()
def merge(model: nn.Module, config: Any, trained: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Fold adapters into the plain model they stand on, in place: a sum in float32, rounded once, to dtype.

    Not into what was trained, whose copy of the base has been rounded to the compute dtype.

    Args:
        trained: the whole weights of the adapters, and of a head of its own.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):  # it draws weights, which the trained ones replace
        inject_adapter_in_model(config, model)
    held = dict(model.named_parameters())
    for name, tensor in trained.items():
        held[name].data = tensor
    kept = torch.zeros(2)
    for weight, change in changes(model):
        kept += kept_by(weight, change, dtype)
        weight.data = (weight + change).to(dtype)
    for name, layer in layers(model):
        if not name.endswith(".base_layer"):
            model.set_submodule(name, layer.get_base_layer())
    if dtype != torch.float32 and kept[1] > 0:
        lost, kind = share_lost(kept), str(dtype).removeprefix("torch.")
        print(
            f"adapters merged in {kind}: rounding loses {lost:.2f} of their change; float32 keeps it, of a run "
            "with --merge_lora --merge_dtype float32, and of this one python -m common.checkpoint export RUN "
            "--step N --merge_dtype float32",
            flush=True,
        )


def save(folder: Path, config: Any, base: str, weights: dict[str, Tensor]) -> None:
    """A folder that peft loads: adapters, and where their base is, by its hub id or absolute path."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).exists() else base
    config.save_pretrained(folder)
    named = {_in_peft(name): tensor for name, tensor in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def load(model: nn.Module, folder: Path) -> None:
    """Put what `save` has written into the adapters of a model, on one rank."""
    from safetensors.torch import load_file

    held = load_file(folder / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.copy_(held[_in_peft(name)])


def _in_peft(name: str) -> str:
    return f"base_model.model.{name.replace('.default.', '.')}"
