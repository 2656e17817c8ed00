"""Checkpoints to resume from, on any number of ranks, and the final model in Hugging Face form.

A checkpoint is written under a temporary name and renamed when complete, so a kill at any moment leaves the
previous one as the newest.

    python -m common.checkpoint export runs/dpo --step 500    # model_step_500/, of a checkpoint that was kept
    python -m common.checkpoint merge runs/dpo                # adapters of model/ into the weights
"""

import argparse
import copy
import io
import json
import math
import pickle
import re
import sys
from dataclasses import fields, replace
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

from common import data, dist, files, formats, lora, models, report
from common.args import Run, System, Training
from common.loading import is_whole

Parts = dict[str, tuple[nn.Module, Optimizer | None]]
# what .metadata names, a pickle: torch's descriptions of tensors, none of which does anything when called
NAMES = "Metadata MetadataIndex StorageMeta TensorStorageMetadata TensorProperties ChunkStorageMetadata "
NAMES += "BytesStorageMetadata _MEM_FORMAT_ENCODING"
SAFE = {f"torch.distributed.checkpoint.metadata.{name}" for name in NAMES.split()}
SAFE |= {"torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout"}
SAFE |= {"torch.Size", "pathlib.PosixPath", "pathlib._local.PosixPath"}
SAFE |= {str(found) for found in vars(torch).values() if isinstance(found, torch.dtype)}
# metrics that are better when lower, by the last word of their names; correlations with such are not
LOWER = re.compile(r".*(/|_)(loss|nll|kl|perplexity|mae|error|distance|toxicity|refusals)")
CORRELATION = re.compile("pearson|spearman")
# frozen weights come from the model's own files
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def complete(output_dir: str | Path) -> dict[int, Path]:
    """The complete checkpoints of the run folder by their steps, the newest last."""
    found = Path(output_dir).glob("checkpoints/step_*")
    return dict(sorted((step_of(p), p) for p in found if re.fullmatch(r"step_\d+", p.name)))


def newest(output_dir: str | Path) -> Path | None:
    return next(reversed(complete(output_dir).values()), None)


def step_of(checkpoint: Path | None) -> int:
    """The step of a checkpoint, -1 of none."""
    return int(checkpoint.name[5:]) if checkpoint else -1


def best(output_dir: str | Path, metric: str) -> Path | None:
    """The checkpoint whose evaluation was the best, of equals the newest; None without a metric.

    A row is written before the checkpoint of its step, so the values are on file.
    """
    if not metric:
        return None
    name = metric.lstrip("+-")
    rows = files.read_rows(Path(output_dir) / "metrics.jsonl", "step")
    found = {row["step"]: row[name] for row in rows if name in row and math.isfinite(row[name])}
    steps = [step for step in complete(output_dir) if step in found]
    sign = -1 if is_lower_better(metric) else 1
    step = max(steps, default=None, key=lambda step: (sign * found[step], step))
    return complete(output_dir).get(step)


def is_lower_better(metric: str) -> bool:
    """By the sign before its name, else by what the name says."""
    says_lower = LOWER.fullmatch(metric) and not CORRELATION.search(metric)
    return metric[0] == "-" or (metric[0] != "+" and bool(says_lower))


def save(run: Training, step: int, parts: Parts, /, **numbers: Any) -> None:
    """Write models, optimizers, the step and a few JSON numbers; keep the newest, and the best if asked.

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
    tensors = _tensors(_state(parts, begun))
    if names := dist.gather(_infinite(tensors)):
        raise dist.RunError(
            f"{names[0]} is not finite, or too large to compute with, after step {step}, which is not saved; "
            f"{last_good(run.output_dir)}; a lower learning_rate or max_grad_norm is the usual cure"
        )
    dcp.save(tensors, checkpoint_id=unfinished)
    if dist.is_main():
        (unfinished / "numbers.json").write_text(json.dumps({"step": step, **numbers}))
        files.finish(unfinished, final)
        done = [*complete(run.output_dir).values()]
        kept = {*done[-max(1, run.keep_checkpoints) :], best(run.output_dir, run.keep_best)}
        for old in done:
            if old not in kept:
                files.remove(old.rename(files.temporary(old)))  # a kill leaves no half of one by its name
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
    """A run folder may come from others, and a pickle calls whatever it names."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in SAFE:
            raise pickle.UnpicklingError(f".metadata names {module}.{name}, which no checkpoint of ours does")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        found = _Metadata(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        for name in {info.relative_path for info in found.storage_data.values()}:
            if Path(name).name != name:
                raise pickle.UnpicklingError(f".metadata names the file {name}, out of the folder")
        found.storage_meta.load_id = self.load_id
        return found


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
        reason = formats.first_line([*dist.causes(error)][-1])
        advice = "delete it to go on from one before it, or from the start"
        raise dist.RunError(f"{folder}: damaged, {reason}; {advice}") from error


def _load(folder: Path, parts: Parts) -> dict[str, Any]:
    numbers = json.loads((folder / "numbers.json").read_text())
    saved = _Reader(folder).read_metadata().state_dict_metadata
    waits = {name for name, (_, optimizer) in parts.items() if optimizer is None}
    begun = {key.partition(".optimizer.state.")[0] for key in saved if ".optimizer.state." in key} - waits
    state = _state(parts, begun)
    tensors = _tensors(state)
    for name, tensor in tensors.items():
        size = getattr(saved.get(name), "size", None)  # what is no tensor would be unpickled, and has none
        if size != tensor.shape:
            raise dist.RunError(
                f"{folder}: {name} is {'missing' if size is None else list(size)} there and "
                f"{list(tensor.shape)} in this model; resume with the model the run began with, or start "
                "anew with --overwrite"
            )
    dcp.load(tensors, storage_reader=_Reader(folder))  # in place
    for name, (model, optimizer) in parts.items():
        set_model_state_dict(model, state[name]["model"], options=OPTIONS)
        if name in begun:
            set_optimizer_state_dict(model, optimizer, state[name]["optimizer"], options=OPTIONS)
    return numbers


def _state(parts: Parts, begun: set[str]) -> dict[str, Any]:
    """What there is of each part, of optimizers only those that have begun.

    torch gives an optimizer without state some by making a step, which AdamW goes on counting from: one that
    waits, as a policy's while its critic warms up, is left alone.
    """
    state: dict[str, Any] = {}
    for name, (model, optimizer) in parts.items():
        state[name] = {"model": get_model_state_dict(model, options=OPTIONS)}
        if name in begun:
            state[name]["optimizer"] = get_optimizer_state_dict(model, optimizer, options=OPTIONS)
    return state


def _tensors(state: dict, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a state by name, which are all that is saved: numbers of an optimizer are options."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= _tensors(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            found[f"{prefix}{key}"] = value
    return found


def export(run: Training, policy: models.PackedModel, tokenizer: Any, model: str) -> None:
    """Write `model/` of the policy, and with keep_best `model_best/`, whose weights the policy has then."""
    write_model(run, policy, tokenizer, model, "model")
    chosen = dist.from_main(lambda: best(run.output_dir, run.keep_best))
    if chosen:
        _load(chosen, {"policy": (policy, None)})
        if isinstance(policy, models.Scorer):
            policy.config.reward_mean = policy.config.reward_std = None  # those of the last step
        write_model(run, policy, tokenizer, model, "model_best")
        if dist.is_main():
            print(f"best by {run.keep_best}: {chosen.name}, in {run.output_dir}/model_best", flush=True)


def write_model(run: Training, policy: models.PackedModel, tokenizer: Any, model: str, to: str) -> None:
    """Write a folder that plain transformers loads; with LoRA one that peft loads, or a merged one.

    Adapters are merged where nothing else could load them: a reward model's, and those on a model that is
    adapters itself, a GGUF file, or a part of one that takes pictures too.

    Args:
        model: what the policy started from, on which adapters stand.
        to: the folder's name in the run's.
    """
    folder, adapters = Path(run.output_dir) / to, policy.lora_config
    trained = {}
    for name, tensor in models.full_weights(policy.model):
        if dist.is_main() and (adapters is None or ".lora_" in name or name == "score.weight"):
            own = torch.float32 if adapters else policy.wide.get(name, policy.dtype_on_disk)
            trained[name] = tensor.to("cpu", own, copy=True)

    def write() -> None:
        import transformers

        base, gguf = files.model_folder(model)
        generation = generation_config(policy, tokenizer) if isinstance(policy, models.Policy) else None
        merge = generation is None or run.merge_lora or not is_whole(base, gguf)
        weights, dtype = trained, policy.dtype_on_disk
        with files.whole(folder) as unfinished:
            if adapters and not merge:
                lora.save(unfinished, adapters, base, weights)
                generation.save_pretrained(unfinished)
                _say_where_it_stops(policy, tokenizer)
            else:
                if adapters:
                    dtype = torch.float32 if run.merge_dtype == "float32" else dtype
                    weights = _merged(policy, base, gguf, trained, dtype)
                with torch.device("meta"):
                    kind = getattr(transformers, policy.auto_class)
                    shell = kind.from_config(policy.config, dtype=dtype, trust_remote_code=False)
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


def _merged(
    policy: models.PackedModel, base: str, gguf: str | None, trained: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The weights of the model that the policy started from, as it is on disk, with its adapters in them."""
    if isinstance(policy, models.Scorer):
        plain = models.read_scorer(base, gguf, models.output_names(policy), False)
    else:
        plain = models.read_pretrained(base, gguf)
    lora.merge(plain, policy.lora_config, trained, dtype)
    return {name: tensor.to(policy.wide.get(name, dtype)) for name, tensor in plain.state_dict().items()}


def generation_config(policy: models.Policy, tokenizer: Any) -> Any:
    """The model's own, which also stops at the token trained to end a turn."""
    from transformers import GenerationConfig

    config = copy.deepcopy(policy.generation_config) or GenerationConfig()
    ends = list(dict.fromkeys(x for x in (data.end_token(tokenizer), *_ends(config)) if x is not None))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    return config


def _ends(config: Any) -> list[int | None]:
    ends = getattr(config, "eos_token_id", None)
    return ends if isinstance(ends, list) else [ends]


def _say_where_it_stops(policy: models.Policy, tokenizer: Any) -> None:
    """Plain generate reads end tokens from the model under the adapters."""
    before, end = _ends(policy.generation_config), data.end_token(tokenizer)
    if end not in before:
        print(
            f"the model under the adapters stops at {', '.join(map(str, before))}, they at {end}: give "
            "generate() the generation_config of their folder, or export with --merge_lora",
            flush=True,
        )


# ------------------------------------------------------------------------------------------ of a run's folder


def load_run(folder: Path) -> tuple[Run, models.PackedModel, Any, str]:
    """(options, model, tokenizer, what it started from) of a text model's run, before training."""
    values = files.read_json(folder / "args.json") if (folder / "args.json").exists() else {}
    if "micro_batch_tokens" not in values:
        raise dist.RunError(f"{folder}: found no args.json of a text model's run; expected a run folder")
    values |= {"output_dir": str(folder), "activation_checkpointing": "off", "compile": False}
    names = {kind: [f.name for f in fields(kind) if f.name in values] for kind in (Run, System)}
    run, system = (kind(**{name: values[name] for name in own}) for kind, own in names.items())
    device, model, last = dist.init(values["seed"]), values["model"], newest(folder)
    dist.from_main(lambda: files.lock(folder))
    began = values.get("inputs", {}).get("starting model", "")
    if began not in ("", dist.from_main(lambda: files.digest(repr(files.fingerprint(model))))):
        raise dist.RunError(f"{folder}: model {model} is not what the run began from; its files have changed")
    saved = _Reader(last).read_metadata().state_dict_metadata if last else ()
    # a reward model; the critic of ppo.py has such a head too, under another name
    if any(name.startswith("policy.model.") and name.endswith(".score.weight") for name in saved):
        if not (folder / "model").exists():
            raise dist.RunError(f"{folder}: no model/, which has the names of a reward model's outputs")
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder / "model", trust_remote_code=False)
        scorer = models.load_scorer(model, device, system, [*config.id2label.values()])
        scorer.config.pad_token_id, scorer.config.score_at = config.pad_token_id, config.score_at
        scorer.config.reward_mean = scorer.config.reward_std = None  # those of the last step
        return run, scorer, data.load_tokenizer(str(folder)), model
    tokenizer = data.load_tokenizer(model, values["chat_template"], values["chat_template_kwargs"])
    return run, models.load(model, device, system), tokenizer, model


def export_step(folder: Path, step: int, merge_dtype: str | None = None) -> None:
    """Write model_step_<step>/ of a checkpoint, as model/ is written of the last one.

    Args:
        merge_dtype: in place of the run's own; with it adapters are merged.
    """
    if not folder.is_dir():
        raise dist.RunError(f"{folder}: no such folder; expected that of a run, as runs/dpo")
    chosen = complete(folder).get(step)
    if chosen is None:
        raise dist.RunError(
            f"{folder}: no checkpoint of step {step}; found {[*complete(folder)]}; --keep_checkpoints keeps "
            "more than the last, from the start of a run"
        )
    run, policy, tokenizer, model = load_run(folder)
    _load(chosen, {"policy": (policy, None)})
    to, values = folder / f"model_step_{step}", files.read_json(folder / "args.json")
    if merge_dtype and not policy.lora_config:
        raise dist.RunError(f"{folder}: merge_dtype is {merge_dtype}, but it has no adapters to merge")
    if merge_dtype:
        run = replace(run, merge_lora=True, merge_dtype=merge_dtype)
    write_model(run, policy, tokenizer, model, to.name)
    rows = [row for row in files.read_rows(folder / "metrics.jsonl", "step") if row["step"] <= step]
    lines = report.table(rows, ("before", "after"))
    report.write_card(to, values["script"], values, lines, None, f" to step {step}")
    print(to, flush=True)


def merge(folder: Path, merge_dtype: str) -> None:
    """Fold the adapters of model/ into the weights they stand on, as --merge_lora does, in their place."""
    if not (folder / "model" / "adapter_config.json").exists():
        raise dist.RunError(
            f"{folder / 'model'}: found no adapters, or merged ones; expected those of lora_rank. `export` "
            "merges those of a checkpoint, with --merge_dtype float32 too"
        )
    run, policy, tokenizer, model = load_run(folder)
    lora.load(policy.model, folder / "model")
    card = folder / "model" / "README.md"
    text = card.read_text() if card.exists() else ""
    write_model(replace(run, merge_lora=True, merge_dtype=merge_dtype), policy, tokenizer, model, "model")
    text = text.replace("library_name: peft", "library_name: transformers").replace("- lora\n", "")
    files.write(card, text)
    print(f"{folder / 'model'} is merged", flush=True)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m common.checkpoint")
    commands = parser.add_subparsers(required=True)
    for name, act in (("export", export_step), ("merge", merge)):
        command = commands.add_parser(name, help=act.__doc__)
        command.add_argument("folder", type=Path, help="of a run, as runs/dpo")
        command.set_defaults(act=act)
    commands.choices["export"].add_argument("--step", type=int, required=True)
    for name, default in (("export", None), ("merge", "auto")):
        commands.choices[name].add_argument("--merge_dtype", choices=("auto", "float32"), default=default)
    chosen = vars(parser.parse_args(words))
    dist.run(lambda act: act(**chosen), chosen.pop("act"))


if __name__ == "__main__":
    main(sys.argv[1:])
