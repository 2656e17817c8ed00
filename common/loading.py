"""Plain transformers models from where they are kept: a folder, a hub id, a GGUF file, adapters on one.

A weight keeps the dtype it has on disk and, unless transformers has to make it of others, stays in its file
until it is used: what reads them takes one at a time.
"""

import contextlib
import copy
import functools
import json
import re
import types
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import dist, formats, lora
from common.files import model_folder


def output_head(model: nn.Module) -> nn.Linear:
    """The head of a language model or of a scorer."""
    return model.score if hasattr(model, "score") else model.get_output_embeddings()


def read_pretrained(
    folder: str, gguf: str | None = None, auto_class: str = "AutoModelForCausalLM"
) -> nn.Module:
    """The plain transformers model of a folder, hub id or GGUF file; a LoRA folder's is merged.

    `dtype_on_disk` is the one that most of its numbers have there, `wide` holds those of the others, as of a
    router's bias, by name; `lost` is of adapters, see `lora.read`. What is computed on reading is float32:
    the weights of a GGUF file, merged ones, and buffers that are in no file.
    """
    import transformers
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file = {"gguf_file": gguf} if gguf else {}
    try:
        if (Path(folder) / "adapter_config.json").exists():
            base = read_pretrained(*model_folder(lora.base_of(folder)), auto_class)
            return lora.read(base, folder)
        config = None if gguf else AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            raise ValueError("its weights are quantized; give the unquantized model")
        on_disk = {} if gguf else tensors_on_disk(folder)
        dtype, wide = dtypes_of(on_disk)
        if is_tower := auto_class == "AutoModelForCausalLM" and has_other_parts(config):
            auto_class = "AutoModelForImageTextToText"
        model, report = getattr(transformers, auto_class).from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **file,
        )
        wrong = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
        if wrong:
            raise ValueError(f"{len(wrong)} weights are missing or not as config.json says, as {min(wrong)}")
        model = restore_wide(model, on_disk, dtype)
        if is_tower:
            print(f"{folder}: of this {config.model_type} the text model is taken; vision is left out")
            model = text_model(model)
    except Exception as error:  # damaged files, and what holds no weights, raise many kinds
        reason = formats.first_line(error)[:300]
        gone = "no such folder; as a hub id it could not be read: " * (not Path(folder).exists())
        raise dist.RunError(f"cannot load the model {folder}: {gone}{reason}") from error
    if gguf:
        del model.config.quantization_config  # they are plain weights once read
    if dtype != torch.float32 or is_tower:
        compute_buffers(model)
    model.dtype_on_disk, model.wide, model.lost = dtype, wide, 0.0
    if head := model.get_output_embeddings():  # two matrices in the file outweigh a config that ties them
        model.config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
    return model


def has_other_parts(config: Any) -> bool:
    """Whether a model takes pictures, say, beside text."""
    return bool(config) and config.get_text_config() is not config and not config.is_encoder_decoder


def is_whole(folder: str, gguf: str | None) -> bool:
    """Whether transformers and peft load from there what `read_pretrained` reads, not a part or a mixture."""
    from transformers import AutoConfig

    if gguf or (Path(folder) / "adapter_config.json").exists():
        return False
    return not has_other_parts(AutoConfig.from_pretrained(folder, trust_remote_code=False))


def text_model(whole: nn.Module) -> nn.Module:
    """The language model and head of one that takes pictures too, their very weights, and empty buffers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = whole.config.get_text_config().to_dict()
    fields["rope_parameters"].pop("mrope_section", None)
    # for text Qwen's positions in time, height and width are one: qwen3_vl_moe_text is qwen3_moe
    kind = re.sub(r"(_5)?_vl(_moe)?_text$", r"\2", fields.pop("model_type"))
    config = AutoConfig.for_model(kind, **fields | {"tie_word_embeddings": False})  # for now
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.base_model.load_state_dict(whole.get_decoder().state_dict(), assign=True)
    head = whole.get_output_embeddings()
    if head.weight is whole.get_input_embeddings().weight:
        head.weight = model.get_input_embeddings().weight
    model.set_output_embeddings(head)
    model.generation_config = whole.generation_config
    return model


@functools.cache
def config_of(folder: str) -> Any:
    """The text config of the model in a folder or with a hub id; adapters have that of their base.

    One without fields for a GGUF file, or a tokenizer alone.
    """
    from transformers import AutoConfig

    try:
        adapter = Path(folder) / "adapter_config.json"
        if adapter.exists():
            folder = json.loads(adapter.read_text())["base_model_name_or_path"]
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError):
        return SimpleNamespace()
    except Exception as error:  # a value of another type
        raise dist.RunError(f"config.json of {folder}: {formats.first_line(error)}") from error


def tensors_on_disk(folder: str) -> dict[str, Tensor]:
    """All tensors in the files of a folder or hub id, by their names there: mapped, not read."""
    from transformers.modeling_utils import load_state_dict
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        return cached_file(folder, name, _raise_exceptions_for_missing_entries=False)

    for name in ("model.safetensors", "pytorch_model.bin"):  # the order in which transformers looks
        files = [find(name)]
        if files == [None] and (index := find(f"{name}.index.json")):
            files = [find(part) for part in {*json.loads(Path(index).read_text())["weight_map"].values()}]
        if files[0]:
            return {key: tensor for file in files for key, tensor in load_state_dict(file).items()}
    return {}


def dtypes_of(tensors: dict[str, Tensor]) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """That of most of the numbers, float32 without any, and those of the few others, but a score head's."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    counts: Counter[torch.dtype] = Counter()
    for tensor in floats.values():
        counts[tensor.dtype] += tensor.numel()
    most = max(counts, key=counts.get, default=torch.float32)
    return most, {name: t.dtype for name, t in floats.items() if t.dtype != most and name != "score.weight"}


@torch.no_grad()
def restore_wide(model: nn.Module, on_disk: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Give back to tensors that are wider on disk, as a router's bias, what reading them as dtype lost.

    Where transformers makes others of such a tensor, all of the model is read in float32.
    """
    held = model.state_dict()
    for name, tensor in on_disk.items():
        if torch.promote_types(tensor.dtype, dtype) == dtype:
            continue
        if name not in held:
            return type(model).from_pretrained(model.name_or_path, dtype=torch.float32)
        owner, _, own_name = name.rpartition(".")
        getattr(model.get_submodule(owner), own_name).data = tensor
    return model


def compute_buffers(model: nn.Module) -> None:
    """Compute in float32, unrounded, the buffers that are in no file, as rotary frequencies."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        exact = type(model)(copy.deepcopy(model.config))
    for name, module in exact.named_modules():
        held = {key: module._buffers[key] for key in module._non_persistent_buffers_set}
        model.get_submodule(name)._buffers.update(held)


def is_scorer(folder: str) -> bool:
    """Whether a folder or hub id has a sequence classifier, as a reward model is."""
    return "ForSequenceClassification" in str(getattr(config_of(folder), "architectures", None))


def read_scorer(folder: str, gguf: str | None, names: Sequence[str], zero_head: bool) -> nn.Module:
    """The plain sequence classifier of a reward model's folder, or of a language model with a new head."""
    has_head = is_scorer(folder)
    kind = "AutoModelForSequenceClassification" if has_head else "AutoModelForCausalLM"
    source = read_pretrained(folder, gguf, kind)
    has = [source.config.id2label[i] for i in range(source.config.num_labels)] if has_head else []
    names = list(names) or has
    if not names:
        raise dist.RunError(f"{folder} is no reward model; expected a folder that reward_model.py wrote")
    keep = has_head and not zero_head
    if len(has) == len(names) and all(name.startswith("LABEL_") for name in has):
        has = names  # nobody had named them
    if keep and not set(names) <= set(has):
        raise dist.RunError(f"{folder} has the outputs {', '.join(has)}, not {', '.join(names)}")
    config = copy.deepcopy(source.config)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    with torch.device("meta"):
        model = empty_scorer(config, dtype=torch.float32)
    if not zero_head and not type(model).__name__.endswith("ForSequenceClassification"):
        raise dist.RunError(
            f"transformers has no {config.model_type} model with a score head, so nobody could load a reward "
            "model of this kind; use another model"
        )
    width = model.score.in_features
    model.score = nn.Linear(width, len(names), bias=False)
    with torch.no_grad():
        if zero_head:
            model.score.weight.zero_()
        elif keep:
            model.score.weight.copy_(source.score.weight[[has.index(name) for name in names]])
        else:  # Stiennon et al. 2020, in their code
            model.score.weight.normal_(std=(width + 1) ** -0.5)
    setattr(model, model.base_model_prefix, source.base_model)
    model.dtype_on_disk, model.wide, model.lost = source.dtype_on_disk, source.wide, source.lost
    return model


def empty_scorer(config: Any, **settings: Any) -> nn.Module:
    """A sequence classifier by its config; where transformers has no class of it, one made of its parts."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.modeling_layers import GenericForSequenceClassification

    with contextlib.suppress(ValueError):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False, **settings)
        if hasattr(model, "score"):
            return model
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        trunk = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False).base_model)
        bases = (GenericForSequenceClassification, trunk.__mro__[1])
        scorer = type(trunk.__name__, bases, {"__module__": trunk.__module__})
        return scorer._from_config(config, **settings)
    raise dist.RunError(f"transformers has no {config.model_type} model with a score head; use another model")


def check_savable(model: nn.Module) -> None:
    """Find before the training what transformers would refuse to write after it.

    Settings of generation without a meaning, as a temperature where do_sample is false, are left out.

    Raises:
        RunError: another fault of generation_config.json.
    """
    found = getattr(model, "generation_config", None)
    try:
        if found is not None:
            found.validate(strict=True)
    except ValueError as error:
        without = {name: getattr(found, name) for name in re.findall(r"(?m)^- `(\w+)`", str(error))}
        if not without:
            raise dist.RunError(f"generation_config.json: {formats.first_line(error)}") from error
        print(f"generation_config.json: without {without}, which transformers would not save")
        for name in without:
            setattr(found, name, None)


def check_packable(model: nn.Module) -> None:
    """Refuse an architecture that packed rows would turn into another function than transformers computes."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    layers = kinds - {"full_attention", "sliding_attention"}
    trunk, head = getattr(model, model.base_model_prefix, None), output_head(model)
    reasons = {
        "is multimodal": config.get_text_config() is not config,
        f"has layers of type {', '.join(sorted(layers))}": layers,
        "carries a recurrent state": model._is_stateful and (layers or not kinds),
        "has attention code of its own": not model._supports_attention_backend,
        "attends to later tokens": any(getattr(m, "is_causal", True) is False for m in model.modules()),
        "is more than a trunk and a head": set(model.children()) != {trunk, head},
    }
    for reason, found in reasons.items():
        if found:
            raise dist.RunError(f"the model ({config.model_type}) {reason}, which packed rows do not support")


def fuse_norms(model: nn.Module) -> None:
    """Let RMSNorms run as one kernel; the eight of transformers take a fifth of a training step on a GPU.

    Rounds once, from float32, where transformers rounds before and after the product with the weight.
    """
    for module in model.modules():
        if is_plain_rms_norm(type(module)):
            module.forward = types.MethodType(_rms_norm, module)


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.variance_epsilon)


@functools.cache
def is_plain_rms_norm(kind: type[nn.Module]) -> bool:
    """Whether a class computes weight * x / rms(x), tried out on numbers: Gemma's adds 1 to its weight."""
    if not kind.__name__.endswith("RMSNorm"):
        return False
    with contextlib.suppress(TypeError, AttributeError), torch.random.fork_rng(devices=[]), torch.no_grad():
        norm, x = kind(8, eps=0.1), torch.randn(3, 8)
        norm.weight.normal_()
        return dict(norm.named_parameters()).keys() == {"weight"} and torch.allclose(
            norm(x), _rms_norm(norm, x)
        )
    return False
