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
from torch import nn
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
from common.files import cached, fingerprint, write_lines  # noqa: F401

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
    dcp.save(_state(parts), checkpoint_id=unfinished)
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
    state = _state(parts)
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
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
        if optimizer is not None:
            set_optimizer_state_dict(model, optimizer, state[name]["optimizer"], options=OPTIONS)
    return json.loads((folder / "numbers.json").read_text())


def _state(parts: Parts) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, (model, optimizer) in parts.items():
        state[name] = {"model": get_model_state_dict(model, options=OPTIONS)}
        if optimizer is not None:
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


def export(
    output_dir: str, policy: models.PackedModel, tokenizer: Any, model: str, merge_lora: bool = True
) -> None:
    """Write `model/`: a folder plain transformers loads; with LoRA one peft loads, unless merge_lora.

    Weights take the dtype the model had on disk. generation_config stops at the token trained to end a turn.

    Args:
        model: what the policy started from, on which the adapters of a peft folder stand.
    """
    folder = Path(output_dir) / "model"
    lora = policy.lora_config
    merge = lora is None or merge_lora
    weights = {}
    for name, tensor in models.full_weights(policy.model, merge_lora=merge):
        if dist.is_main():
            weights[name] = tensor.to("cpu", policy.dtype_on_disk if merge else torch.float32, copy=True)
    if dist.is_main():
        with files.whole(folder) as unfinished:
            if merge:
                _save_transformers(unfinished, policy, tokenizer, weights)
            else:
                _save_peft(unfinished, model, lora, weights)
            tokenizer.save_pretrained(unfinished)
    dist.barrier()


def _save_transformers(
    folder: Path, policy: models.PackedModel, tokenizer: Any, weights: dict[str, torch.Tensor]
) -> None:
    import transformers

    with torch.device("meta"):
        shell = getattr(transformers, policy.auto_class).from_config(
            policy.config, dtype=policy.dtype_on_disk
        )
    if isinstance(policy, models.Scorer):
        return shell.save_pretrained(folder, state_dict=weights)
    generation_config = policy.generation_config or transformers.GenerationConfig()
    before = generation_config.eos_token_id
    ends = [data.end_token(tokenizer), *(before if isinstance(before, list) else [before])]
    ends = list(dict.fromkeys(e for e in ends if e is not None))
    generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    shell.generation_config = generation_config
    shell.save_pretrained(folder, state_dict=weights)


def _save_peft(folder: Path, model: str, lora: Any, weights: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    base, gguf = data.model_folder(model)
    lora.base_model_name_or_path = str(Path(base) / gguf) if gguf else base
    lora.save_pretrained(folder)
    named = {f"base_model.model.{name.replace('.default.', '.')}": t for name, t in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
