"""Checkpoints to resume from, on any number of ranks, and the final model in Hugging Face form.

A checkpoint is written under a temporary name and renamed when complete, so a kill at any moment leaves the
previous one as the newest.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from common import data, dist, files, models
from common.args import Training
from common.loading import is_whole

Parts = dict[str, tuple[nn.Module, Optimizer | None]]
OPTIONS = StateDictOptions(
    ignore_frozen_params=True, strict=False
)  # frozen weights come from the model's own files


def newest(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of the run folder."""
    done = [p for p in Path(output_dir).glob("checkpoints/step_*") if re.fullmatch(r"step_\d+", p.name)]
    return max(done, default=None, key=lambda p: int(p.name[5:]))


def save(run: Training, step: int, parts: Parts, /, **numbers: Any) -> None:
    """Write models, optimizers, the step and a few JSON numbers; keep the newest run.keep_checkpoints."""
    folder = Path(run.output_dir) / "checkpoints"
    final = folder / f"step_{step:08d}"
    unfinished = files.temporary(final)  # all ranks write into it
    if dist.is_main():
        files.remove(unfinished)
    dist.barrier()
    begun = {name for name, (_, optimizer) in parts.items() if optimizer is not None and optimizer.state}
    dcp.save(_state(parts, begun), checkpoint_id=unfinished)
    if dist.is_main():
        (unfinished / "numbers.json").write_text(json.dumps({"step": step, **numbers}))
        files.finish(unfinished, final)
        complete = sorted(p for p in folder.iterdir() if re.fullmatch(r"step_\d+", p.name))
        for old in complete[: -run.keep_checkpoints]:
            files.remove(old)
    dist.barrier()


def resume(output_dir: str, parts: Parts) -> dict[str, Any]:
    """Load the newest checkpoint into models and optimizers. -> its numbers, or `step` and `num_tokens` 0.

    Raises:
        RunError: the checkpoint's tensors do not have the shapes of these models.
    """
    folder = dist.from_main(lambda: newest(output_dir))
    if folder is None:
        return {"step": 0, "num_tokens": 0}
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    begun = {name for name in parts if any(key.startswith(f"{name}.optimizer.state.") for key in saved)}
    state = _state(parts, begun)
    for name, tensor in _flat(state):
        size = getattr(saved.get(name), "size", None)
        if size is not None and size != tensor.shape or name not in saved:
            raise dist.RunError(
                f"{folder}: {name} is {list(size) if size else 'missing'} there and {list(tensor.shape)} in "
                "this model; resume with the model the run began with, or start anew with --overwrite"
            )
    dcp.load(state, checkpoint_id=folder)
    for name, (model, optimizer) in parts.items():
        set_model_state_dict(model, state[name]["model"], options=OPTIONS)
        if name in begun:
            set_optimizer_state_dict(model, optimizer, state[name]["optimizer"], options=OPTIONS)
    return json.loads((folder / "numbers.json").read_text())


def _state(parts: Parts, begun: set[str]) -> dict[str, Any]:
    """What a checkpoint holds of each part, of optimizers only those that have begun.

    torch gives an optimizer without state some by making a step, which AdamW goes on counting from: one that
    waits, as a policy's while its critic warms up, is left alone.
    """
    state: dict[str, Any] = {}
    for name, (model, optimizer) in parts.items():
        state[name] = {"model": get_model_state_dict(model, options=OPTIONS)}
        if name in begun:
            state[name]["optimizer"] = get_optimizer_state_dict(model, optimizer, options=OPTIONS)
    return state


def _flat(state: dict, prefix: str = "") -> list[tuple[str, torch.Tensor]]:
    found = []
    for key, value in state.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            found.append((f"{prefix}{key}", value))
    return found


def export(run: Training, policy: models.PackedModel, tokenizer: Any, model: str) -> None:
    """Write `model/`: a folder that plain transformers loads; with LoRA one that peft loads, or a merged one.

    generation_config stops at the token trained to end a turn.

    Args:
        model: what the policy started from, on which adapters stand.
    """
    folder, dtype = Path(run.output_dir) / "model", policy.dtype_on_disk
    lora, weights = policy.lora_config, {}
    # transformers loads a reward model, so that is always merged
    merge = isinstance(policy, models.Scorer) or run.merge_lora
    for name, tensor in models.full_weights(policy.model):
        if dist.is_main() and (lora is None or ".lora_" in name or name == "score.weight"):
            weights[name] = tensor.to("cpu", dtype if lora is None else torch.float32, copy=True)
    if dist.is_main():
        with files.whole(folder) as unfinished:
            if lora is not None and not merge:
                _save_peft(unfinished, policy, model, weights)
            else:
                if lora is not None:
                    dtype = torch.float32 if run.merge_dtype == "float32" else dtype
                    weights = _merge(policy, model, weights, dtype)
                _save_transformers(unfinished, policy, tokenizer, weights, dtype)
            tokenizer.save_pretrained(unfinished)
    dist.barrier()


def _merge(
    policy: models.PackedModel, model: str, trained: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The base as it is on disk plus what adapters change, added in float32 and rounded once.

    The policy's own copy of the base will not do: it has been rounded to the compute dtype.
    """
    if isinstance(policy, models.Scorer):
        names = models.output_names(policy)
        weights = models.read_scorer(*files.model_folder(model), names, False).state_dict()
    else:
        weights = models.read_pretrained(*files.model_folder(model)).state_dict()
    kept = change = 0.0
    for name, delta in models.lora_deltas(policy.model, trained):
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


def _save_transformers(
    folder: Path,
    policy: models.PackedModel,
    tokenizer: Any,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    import transformers

    with torch.device("meta"):
        shell = getattr(transformers, policy.auto_class).from_config(policy.config, dtype=dtype)
    if isinstance(policy, models.Scorer):
        return shell.save_pretrained(folder, state_dict=weights)
    generation_config = policy.generation_config or transformers.GenerationConfig()
    before = generation_config.eos_token_id
    ends = [data.end_token(tokenizer), *(before if isinstance(before, list) else [before])]
    ends = list(dict.fromkeys(e for e in ends if e is not None))
    generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    shell.generation_config = generation_config
    shell.save_pretrained(folder, state_dict=weights)


def _save_peft(folder: Path, policy: models.PackedModel, model: str, weights: dict[str, Tensor]) -> None:
    """Adapters, and where their base is: a model, by its hub id or absolute path.

    A base that is adapters itself, or a GGUF file, is no model that peft could load. It is written as one,
    merged, in the dtype that the adapters were trained on.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    base, gguf = files.model_folder(model)
    if not is_whole(base, gguf):
        merged = folder.parent / "base_model"
        plain = models.read_pretrained(base, gguf)
        with files.whole(merged) as unfinished:
            plain.to(policy.compute_dtype).save_pretrained(unfinished)
        base = str(merged)
    lora = policy.lora_config
    lora.base_model_name_or_path = str(Path(base).resolve()) if Path(base).exists() else base
    lora.save_pretrained(folder)
    named = {f"base_model.model.{name.replace('.default.', '.')}": t for name, t in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
