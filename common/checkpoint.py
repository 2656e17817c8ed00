"""Checkpoints to resume from, on any number of ranks, and the final model in Hugging Face form.

A checkpoint is written under a temporary name and renamed when complete, so a kill at any moment leaves the
previous one as the newest.
"""

import copy
import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from common import data, dist, files, lora, models
from common.args import Training
from common.loading import is_whole

Parts = dict[str, tuple[nn.Module, Optimizer | None]]
# what .metadata names besides torch's own descriptions, none of which does anything when called
SAFE = ("pathlib PosixPath", "torch.serialization _get_layout")
SAFE += ("torch.distributed.checkpoint.filesystem _StorageInfo",)
OPTIONS = StateDictOptions(
    ignore_frozen_params=True, strict=False
)  # frozen weights come from the model's own files


def newest(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of the run folder."""
    done = [p for p in Path(output_dir).glob("checkpoints/step_*") if re.fullmatch(r"step_\d+", p.name)]
    return max(done, default=None, key=lambda p: int(p.name[5:]))


def save(run: Training, step: int, parts: Parts, /, **numbers: Any) -> None:
    """Write models, optimizers, the step and a few JSON numbers; keep the newest run.keep_checkpoints.

    Raises:
        RunError: a weight or a number of an optimizer is not finite; the checkpoint before stays the last.
    """
    folder = Path(run.output_dir) / "checkpoints"
    final = folder / f"step_{step:08d}"
    unfinished = files.temporary(final)  # all ranks write into it
    if dist.is_main():
        files.remove(unfinished)
    dist.barrier()
    begun = {name for name, (_, optimizer) in parts.items() if optimizer is not None and optimizer.state}
    state = _state(parts, begun)
    if names := dist.gather(_infinite(dict(_flat(state)))):
        raise dist.RunError(
            f"{names[0]} is not finite, or too large to compute with, after step {step}, which is not saved; "
            f"{last_good(run.output_dir)}; a lower learning_rate or max_grad_norm is the usual cure"
        )
    dcp.save(state, checkpoint_id=unfinished)
    if dist.is_main():
        (unfinished / "numbers.json").write_text(json.dumps({"step": step, **numbers}))
        files.finish(unfinished, final)
        complete = sorted(p for p in folder.iterdir() if re.fullmatch(r"step_\d+", p.name))
        for old in complete[: -run.keep_checkpoints]:
            files.remove(old)
    dist.barrier()


def last_good(output_dir: str | Path) -> str:
    """What a run that has gone wrong can go on from, in words: what is not finite is never saved."""
    last = newest(output_dir)
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"


@torch.no_grad()
def _infinite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of tensors whose part here holds NaN, an infinity, or a weight whose square is one in float32."""
    local = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    floats = {n: t.float() for n, t in local.items() if t.is_floating_point() and t.numel()}
    largest = {n: torch.stack(torch.aminmax(t)).abs().amax() for n, t in floats.items()}
    squared = [x if ".optimizer." in n else x.square() for n, x in largest.items()]
    is_finite = torch.stack(squared).isfinite().tolist() if squared else []
    return [name for name, fine in zip(largest, is_finite, strict=True) if not fine]


class _Metadata(pickle.Unpickler):
    """What a checkpoint says of its tensors: a pickle, which can call whatever it names.

    A run folder may come from others, so only torch's descriptions of tensors are found.
    """

    def find_class(self, module: str, name: str) -> Any:
        own, found = "torch.distributed.checkpoint.metadata", None
        if module in (own, "torch") or f"{module} {name}" in SAFE:
            found = super().find_class(module, name)
        of_torch = (
            found is torch.Size or isinstance(found, torch.dtype) or getattr(found, "__module__", "") == own
        )
        if (of_torch and "." not in name) or f"{module} {name}" in SAFE:
            return found
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which no checkpoint of ours does")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        found = _Metadata(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        for name in {info.relative_path for info in found.storage_data.values()}:
            if Path(name).name != name:
                raise pickle.UnpicklingError(f".metadata names the file {name}, out of the folder")
        found.storage_meta.load_id = self.load_id
        return found


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """What is no tensor, a few numbers of an optimizer, is a pickle too."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        super().load_bytes(read_item, io.BytesIO(plain.getvalue()))


def resume(output_dir: str, parts: Parts) -> dict[str, Any]:
    """Load the newest checkpoint into models and optimizers. -> its numbers, or `step` and `num_tokens` 0.

    Raises:
        RunError: it is damaged, or its tensors do not have the shapes of these models.
    """
    folder = dist.from_main(lambda: newest(output_dir))
    if folder is None:
        return {"step": 0, "num_tokens": 0}
    try:
        return _load(folder, parts)
    except dist.RunError:
        raise
    except (Exception, CheckpointException) as error:  # torn files raise many kinds
        cause = [*dist.causes(error)][-1]
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        advice = "delete it to go on from one before it, or from the start"
        raise dist.RunError(f"{folder}: damaged, {reason}; {advice}") from error


def _load(folder: Path, parts: Parts) -> dict[str, Any]:
    numbers = json.loads((folder / "numbers.json").read_text())
    saved = _Reader(folder).read_metadata().state_dict_metadata
    begun = {name for name in parts if any(key.startswith(f"{name}.optimizer.state.") for key in saved)}
    state = _state(parts, begun)
    for name, tensor in _flat(state):
        size = getattr(saved.get(name), "size", None)
        if size is not None and size != tensor.shape or name not in saved:
            raise dist.RunError(
                f"{folder}: {name} is {list(size) if size else 'missing'} there and {list(tensor.shape)} in "
                "this model; resume with the model the run began with, or start anew with --overwrite"
            )
    dcp.load(state, storage_reader=_Reader(folder), planner=_Planner())
    for name, (model, optimizer) in parts.items():
        set_model_state_dict(model, state[name]["model"], options=OPTIONS)
        if name in begun:
            set_optimizer_state_dict(model, optimizer, state[name]["optimizer"], options=OPTIONS)
    return numbers


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


def _flat(state: dict, prefix: str = "") -> list[tuple[str, Tensor]]:
    found = []
    for key, value in state.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            found.append((f"{prefix}{key}", value))
    return found


def export(run: Training, policy: models.PackedModel, tokenizer: Any, model: str) -> None:
    """Write `model/`: a folder that plain transformers loads; with LoRA one that peft loads, or a merged one.

    generation_config stops at the token trained to end a turn.

    Args:
        model: what the policy started from, on which adapters stand.
    """
    import transformers

    folder, dtype = Path(run.output_dir) / "model", policy.dtype_on_disk
    adapters, weights = policy.lora_config, {}
    # transformers loads a reward model, so that is always merged
    merge = isinstance(policy, models.Scorer) or run.merge_lora
    for name, tensor in models.full_weights(policy.model):
        if dist.is_main() and (adapters is None or ".lora_" in name or name == "score.weight"):
            own = policy.wide.get(name, dtype) if adapters is None else torch.float32
            weights[name] = tensor.to("cpu", own, copy=True)

    def write() -> None:
        nonlocal weights, dtype
        generation = generation_config(policy, tokenizer) if isinstance(policy, models.Policy) else None
        with files.whole(folder) as unfinished:
            if adapters is not None and not merge:
                base = _peft_base(folder.parent / "base_model", policy, tokenizer, generation, model)
                lora.save(unfinished, adapters, base, weights)
                generation.save_pretrained(unfinished)
            else:
                if adapters is not None:
                    dtype = torch.float32 if run.merge_dtype == "float32" else dtype
                    base = _base(policy, model)
                    lora.merge(base, adapters, weights, dtype)
                    held = base.state_dict().items()
                    weights = {name: tensor.to(policy.wide.get(name, dtype)) for name, tensor in held}
                with torch.device("meta"):
                    shell = getattr(transformers, policy.auto_class).from_config(
                        policy.config, dtype=dtype, trust_remote_code=False
                    )
                shell.generation_config = generation
                # of tied weights the file has one
                held = {x: t for x, t in weights.items() if x not in shell.all_tied_weights_keys}
                shell.save_pretrained(unfinished, state_dict=held)
            if infinite := _infinite(weights):
                raise dist.RunError(
                    f"{folder}: not written, {infinite[0]} is not finite in {dtype}; "
                    f"{last_good(run.output_dir)}; a lower learning_rate is the usual cure"
                )
            tokenizer.save_pretrained(unfinished)

    dist.from_main(write)


def generation_config(policy: models.Policy, tokenizer: Any) -> Any:
    """The model's own, which also stops at the token trained to end a turn."""
    from transformers import GenerationConfig

    config = copy.deepcopy(policy.generation_config) or GenerationConfig()
    before = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = list(dict.fromkeys(x for x in (data.end_token(tokenizer), *before) if x is not None))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    return config


def _base(policy: models.PackedModel, model: str) -> nn.Module:
    """The plain model, as it is on disk, that the policy started from."""
    folder, gguf = files.model_folder(model)
    if isinstance(policy, models.Scorer):
        return models.read_scorer(folder, gguf, models.output_names(policy), False)
    return models.read_pretrained(folder, gguf)


def _peft_base(folder: Path, policy: models.Policy, tokenizer: Any, generation: Any, model: str) -> str:
    """The model that peft puts adapters on, and whose end tokens then stand.

    A base that is adapters itself, or a GGUF file, is no model that peft could load. It is written to folder
    as one, merged, in the dtype that the adapters were trained on.
    """
    base, gguf = files.model_folder(model)
    if not is_whole(base, gguf):
        plain = _base(policy, model).to(policy.compute_dtype)
        plain.generation_config = generation
        with files.whole(folder) as unfinished:
            plain.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        return str(folder)
    before, end = getattr(policy.generation_config, "eos_token_id", None), data.end_token(tokenizer)
    if end not in (before if isinstance(before, list) else [before]):
        print(
            f"the model under the adapters stops at {before}, they at {end}: give generate() the "
            "generation_config of their folder, or export with --merge_lora",
            flush=True,
        )
    return base
