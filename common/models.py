"""Models: any Hugging Face decoder in; out a sharded module that takes a packed row and returns log-probs.

Three things differ from calling transformers directly. Rows are packed, so attention is told where sequences
begin (`varlen_attention`). Logits are never held for a whole row (`_ChunkedHead`). Every model is an FSDP2
module with float32 master weights and gradients summed, not averaged, over ranks; on one process too, but
there, and with sharding none, weights of float32 compute stay plain tensors.

Shapes: N tokens of a packed row, N_targets scored tokens, D width, V vocabulary, H heads, K head width.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import math
import os
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from common import dist
from common.args import Optimization, System
from common.data import Example, Row, model_folder, rows


class TokenStats(NamedTuple):
    """What one packed forward says about its N_targets scored tokens; all float32."""

    logps: Tensor  # (N_targets,) log p(token | tokens before it), nats
    entropy: Tensor  # (N_targets,) of the distribution the token was scored under, nats
    accuracy: Tensor  # (N_targets,) 1 where the token was the most likely one, no gradient
    mean_logit: (
        Tensor  # (N_targets,) mean of the head's output over the vocabulary, before any scale, no gradient
    )


# ------------------------------------------------------------------------------------------- packed attention


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row, for transformers' AttentionInterface.

    Args:
        query: (1, H, N, K); key, value: (1, H_kv, N, K), H_kv divides H.
        cu_seq_lens_q: (S + 1,) int32, where sequences begin and the last one ends.

    Returns:
        (1, N, H, K), and None for the attention weights.

    Raises:
        RunError: the model asks for something else than plain causal attention over a packed row.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        raise dist.RunError(f"{type(module).__name__} does its own masking, so it cannot take packed rows")
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise dist.RunError(f"{type(module).__name__} caps its logits or has sinks; packed rows take neither")
    if _flash_kernel is not None and query.dtype != torch.float32:
        width = max(query.shape[-1], value.shape[-1])
        width = -(-width // 8) * 8  # the kernels want one width for all, a multiple of 8
        q, k, v = (_widen(x[0].transpose(0, 1), width) for x in (query, key, value))  # (N, H, K)
        window = (-1 if sliding_window is None else sliding_window - 1, 0)  # tokens to the left and right
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = _flash_kernel(q, k, v, cu_seq_lens_q, max_length_q, scale, window)
        return out[None, ..., : value.shape[-1]], None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)  # one cat in backward
    out = [
        F.scaled_dot_product_attention(q, k, v, **_causal(q, sliding_window), scale=scaling, enable_gqa=True)
        for q, k, v in parts
    ]
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def _widen(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _causal(q: Tensor, window: int | None) -> dict[str, Any]:
    length = q.shape[2]
    if window is None or length <= window:
        return {"is_causal": True}
    t = torch.arange(length, device=q.device)
    return {"attn_mask": (t[:, None] >= t) & (t[:, None] - t < window)}


# FlashAttention over packed sequences, found once when a model is loaded onto a GPU: an import inside the
# forward would break the graph of every compiled block
_flash_kernel: Callable | None = None


def find_kernel(device: torch.device) -> None:
    """Let `varlen_attention` use FlashAttention on a GPU; a CPU goes on with SDPA."""
    global _flash_kernel
    if device.type == "cuda" and _flash_kernel is None:
        _flash_kernel = _find_flash_kernel()


def _find_flash_kernel() -> Callable:
    """The flash-attn package's kernel if it is installed, else torch's own."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        takes_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch >= 2.13

        def kernel(q, k, v, cu, longest, scale, window):
            gqa = {"enable_gqa": True} if takes_gqa else {}  # older ones share key heads without being told
            return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, window_size=window, **gqa)

        return kernel

    return lambda q, k, v, cu, longest, scale, window: flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True, window_size=window
    )


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


# ----------------------------------------------------------------------------------------------- chunked head


class _ChunkedHead(torch.autograd.Function):
    """Per-token log-probabilities and entropies without a logits tensor: chunks are recomputed in backward.

    All chunks share two buffers: fresh ones would be mapped and zeroed by the system chunk by chunk. Products
    of bfloat16 add up to float32 logits and dW: rounded to bfloat16, logits are .02 nats a token off.
    z = h W^T + b, lp = z_y - logsumexp z, H = -sum_v p_v log p_v;
    dz = g_lp (onehot(y) - p) - g_H p (log p + H), dh = dz W, dW = sum dz^T h.
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, scale: float, chunk: int):
        ctx.save_for_backward(h, weight, bias, y)
        ctx.scale, ctx.chunk = scale, chunk
        h, weight, bias = _operands(h, weight, bias)
        logps, entropy, accuracy, mean_logit = (h.new_empty(len(y), dtype=_wide(h)) for _ in range(4))
        buffers = _chunk_buffers(h, weight, chunk)
        for start in range(0, len(y), chunk):
            part = slice(start, start + chunk)
            z, p = buffers[:, : len(y[part])]
            _logits(h[part], weight, bias, scale, out=z)
            top, argmax = z.max(-1)
            accuracy[part] = argmax == y[part]
            mean_logit[part] = z.mean(-1) / scale
            logps[part] = z.gather(1, y[part, None])[:, 0]
            z -= top[:, None]
            torch.exp(z, out=p)
            total = p.sum(-1)
            logps[part] -= top + total.log()
            entropy[part] = total.log() - z.mul_(p).sum(-1) / total
        ctx.mark_non_differentiable(accuracy, mean_logit)
        ctx.set_materialize_grads(False)
        return logps, entropy, accuracy, mean_logit

    @staticmethod
    def backward(ctx, g_logps: Tensor | None, g_entropy: Tensor | None, *_: Any):
        h, weight, bias, y = ctx.saved_tensors
        dtype = h.dtype
        h, weight, bias = _operands(h, weight, bias)
        dh = torch.empty_like(h)
        # sums over thousands of tokens: float32 whatever the compute dtype
        dw, db = (
            torch.zeros_like(x, dtype=_wide(h)) if needed else None
            for x, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        buffers = _chunk_buffers(h, weight, ctx.chunk)
        for start in range(0, len(y), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            p, logp = buffers[:, : len(y[part])]
            _logits(h[part], weight, bias, ctx.scale, out=p)
            torch.log_softmax(p, -1, out=logp)
            torch.exp(logp, out=p)
            dz = None
            if g_entropy is not None:
                entropy = -torch.linalg.vecdot(p, logp)
                dz = logp.add_(entropy[:, None]).mul_(p).mul_(-g_entropy[part, None])
            if g_logps is not None:
                p.mul_(-g_logps[part, None])
                dz = p if dz is None else dz.add_(p)
                dz.scatter_add_(1, y[part, None], g_logps[part, None])
            if ctx.scale != 1.0:
                dz *= ctx.scale
            low = dz.to(h.dtype)
            torch.mm(low, weight, out=dh[part])
            if dw is not None:
                _add_product(dw, low.T, h[part])
            if db is not None:
                db += dz.sum(0)
        dh, dw, db = (None if d is None else d.to(dtype) for d in (dh, dw, db))
        return dh, dw, db, None, None, None


def _wide(h: Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32)


def _chunk_buffers(h: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """Two of (chunk, V), less if there are fewer tokens."""
    return h.new_empty(2, min(chunk, len(h)), len(weight), dtype=_wide(h))


def _operands(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What enters the head's products. A GPU adds up low precision in float32; a CPU gets float32 numbers."""
    return tuple(x if x is None or x.is_cuda else x.to(_wide(x)) for x in tensors)


def float32_logits(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """h W^T + b with float32 sums that are never rounded to h's precision. (n, D), (V, D), (V,) -> (n, V)"""
    if h.dtype == _wide(h):
        out = torch.mm(h, weight.T, out=out)
    elif h.is_cuda:
        out = torch.mm(h, weight.T, out_dtype=torch.float32, out=out)
    else:
        out = torch.mm(h.float(), weight.float().T, out=out)
    return out if bias is None else out.add_(bias)


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, scale: float, out: Tensor) -> None:
    float32_logits(h, weight, bias, out)
    if scale != 1.0:
        out *= scale


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, accumulated in out's dtype."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def _head_forward(head: nn.Linear, h: Tensor, tokens: Tensor, scale: float) -> TokenStats:
    """Replaces `forward` of the language-model head, so that FSDP has gathered its weight when it runs."""
    # a buffer is of 16 MiB at most, 512 MiB on GPU, whatever the vocabulary
    chunk = min(1024, 2**27 // len(head.weight)) if h.is_cuda else min(256, 2**22 // len(head.weight))
    return TokenStats(*_ChunkedHead.apply(h, head.weight, head.bias, tokens, scale, chunk))


def _packed_forward(model: nn.Module, row: Row, temperature: float = 1.0) -> TokenStats:
    """Replaces `forward` of the whole model: trunk over the row, head over its scored tokens only."""
    hidden = _hidden_states(model, row).index_select(0, row.targets - 1)  # position t-1 scores token t
    return model.get_output_embeddings()(hidden, row.tokens[row.targets], model.logit_scale_ / temperature)


def _hidden_states(model: nn.Module, row: Row) -> Tensor:
    """The trunk over a packed row. -> (N, D)"""
    return getattr(model, model.base_model_prefix)(
        input_ids=row.tokens[None],
        position_ids=row.position_ids[None],
        use_cache=False,  # with a cache transformers would attend across sequences
        cu_seq_lens_q=row.cu_seqlens,
        cu_seq_lens_k=row.cu_seqlens,
        max_length_q=row.max_seqlen,
        max_length_k=row.max_seqlen,
    )[0][0]


def token_stats(model: nn.Module, row: Row, temperature: float = 1.0) -> TokenStats:
    """Log-probability, entropy and top-1 hit of each scored token of a row, under logits / temperature."""
    return model(row, temperature)


def token_logps(model: nn.Module, row: Row, temperature: float = 1.0) -> Tensor:
    """log p(token | the tokens before it in its sequence) of each scored token. -> (N_targets,) float32"""
    return model(row, temperature).logps


def _score_forward(model: nn.Module, row: Row, positions: Tensor) -> Tensor:
    """Replaces `forward` of a sequence classifier: its head, in float32, at these positions of the row."""
    return model.score(_hidden_states(model, row).index_select(0, positions).float())


def rewards(model: nn.Module, row: Row) -> Tensor:
    """Outputs of a scorer at the last token of each sequence, found from lengths. -> (num_segments, A)"""
    return model(row, row.cu_seqlens[1 : row.num_segments + 1].long() - 1)


def values(model: nn.Module, row: Row) -> Tensor:
    """Value before each scored token, what is expected from there on. -> (N_targets,)"""
    return model(row, row.targets - 1)[:, 0]


@torch.no_grad()
def score(
    scorer: nn.Module, examples: list[Example], micro_batch_tokens: int, device: torch.device
) -> Tensor:
    """Outputs for every sequence of the examples, in order, on every rank. -> (sequences, A) float32

    Centred and scaled by the model's config.reward_mean and reward_std, if set.
    """
    starts = list(itertools.accumulate((len(e.sequences) for e in examples), initial=0))
    table = torch.zeros(starts[-1], scorer.config.num_labels, device=device)
    for row in rows(examples, micro_batch_tokens, device):
        found = [at for i in row.example_ids.tolist() for at in range(starts[i], starts[i + 1])]
        table[found] = rewards(scorer, row)
    dist.sum_over_ranks(table)  # each example was scored by one rank
    if getattr(scorer.config, "reward_mean", None) is not None:
        mean, std = (table.new_tensor(getattr(scorer.config, x)) for x in ("reward_mean", "reward_std"))
        table = (table - mean) / std
    return table


def segment_sum(values: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """Sum values (M,) by the segment each belongs to. -> (num_segments,)"""
    return values.new_zeros(num_segments).index_add(0, segment_ids, values)


# --------------------------------------------------------------------------------------------- load and shard


def load(model: str, device: torch.device, system: System, trainable: bool = True) -> nn.Module:
    """A causal language model, sharded over all ranks, whose forward is `token_stats`.

    Only rank 0 reads the weights; the others receive their shards. Only a trainable model gets adapters.

    Raises:
        RunError: no such model, no weights in the folder, or an architecture that packing cannot serve.
    """
    shell = _load(
        lambda: read_pretrained(*model_folder(model)), "AutoModelForCausalLM", device, system, trainable
    )
    factor, divisor = (getattr(shell.config, x, None) or 1.0 for x in ("logit_scale", "logits_scaling"))
    shell.logit_scale_ = factor / divisor
    head = shell.get_output_embeddings()
    head.forward = types.MethodType(_head_forward, head)
    shell.forward = types.MethodType(_packed_forward, shell)
    return shell


def load_scorer(
    model: str,
    device: torch.device,
    system: System,
    names: Sequence[str] = (),
    trainable: bool = True,
    zero_head: bool = False,
) -> nn.Module:
    """A model with a linear head of one output a name, for `rewards` or `values`; as `load` otherwise.

    A reward model's own head is kept, the named outputs of it, unless zero_head; without names, all of it.

    Raises:
        RunError: as `load`; the model lacks an output of that name; or, without names, is no reward model.
    """

    def read() -> nn.Module:
        return read_scorer(*model_folder(model), names, zero_head)

    shell = _load(read, "AutoModelForSequenceClassification", device, system, trainable)
    shell.forward = types.MethodType(_score_forward, shell)
    return shell


def output_names(scorer: nn.Module) -> list[str]:
    """What the outputs of a scorer are called."""
    return [scorer.config.id2label[i] for i in range(scorer.config.num_labels)]


def _load(
    read_plain: Callable[[], nn.Module],
    auto_class: str,
    device: torch.device,
    system: System,
    trainable: bool,
) -> nn.Module:
    import transformers

    auto = getattr(transformers, auto_class)
    # no mask function: packed rows need no mask
    transformers.AttentionInterface.register("varlen", varlen_attention)
    find_kernel(device)
    low = device.type == "cuda" and resolve_dtype(system.dtype, device) != torch.float32
    full: list[nn.Module] = []  # rank 0's; the others stay without a copy

    def with_lora(plain: nn.Module) -> nn.Module:
        if trainable and system.lora_rank > 0:
            add_lora(plain, system.lora_rank, system.lora_alpha, system.lora_target)
        return plain

    def read() -> tuple:
        with torch.random.fork_rng(devices=[]):  # ranks keep drawing alike
            plain = read_plain()
            check_packable(plain)
            full.append(with_lora(plain))
        return plain.config, getattr(plain, "generation_config", None), plain.dtype_on_disk

    config, generation_config, dtype_on_disk = dist.from_main(read)
    with torch.device("meta"):
        shell = with_lora(auto.from_config(config, attn_implementation="varlen", dtype=torch.float32))
    if low:
        fuse_norms(shell)
    shell.generation_config, shell.dtype_on_disk = generation_config, dtype_on_disk
    shell.compute_dtype_, shell.auto_class_ = resolve_dtype(system.dtype, device), auto
    shell.eval()  # no dropout, layer drop or router noise, ever: policy and reference are one function
    if not trainable:
        shell.requires_grad_(False)
    shard(shell, device, system)
    fill(shell, full[0] if full else None, device)
    return shell


def output_head(model: nn.Module) -> nn.Linear:
    """The head of a language model or of a scorer."""
    return model.score if hasattr(model, "score") else model.get_output_embeddings()


def read_pretrained(
    folder: str, gguf: str | None = None, auto_class: str = "AutoModelForCausalLM"
) -> nn.Module:
    """The plain float32 transformers model of a folder, hub id or GGUF file; a LoRA folder's is merged."""
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file = {"gguf_file": gguf} if gguf else {}
    try:
        if (Path(folder) / "adapter_config.json").exists():
            from peft import PeftConfig, PeftModel

            base = read_pretrained(*model_folder(PeftConfig.from_pretrained(folder).base_model_name_or_path))
            model = PeftModel.from_pretrained(base, folder).merge_and_unload()
            model.dtype_on_disk = base.dtype_on_disk
            return model
        config = None if gguf else AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None):
            raise ValueError("its weights are quantized; give the unquantized model")
        model, report = getattr(transformers, auto_class).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **file
        )
        wrong = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
        if wrong:
            raise ValueError(f"{len(wrong)} weights are missing or not as config.json says, as {min(wrong)}")
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise dist.RunError(f"cannot load the model {folder}: {reason}") from error
    if gguf:
        del model.config.quantization_config  # they are plain weights once read
    model.dtype_on_disk = getattr(config, "dtype", None) or torch.float32
    return model


def read_scorer(folder: str, gguf: str | None, names: Sequence[str], zero_head: bool) -> nn.Module:
    """The plain sequence classifier of a reward model's folder, or of a language model with a new head."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    file = Path(folder) / "config.json"
    is_scorer = file.exists() and "ForSequenceClassification" in file.read_text()
    if not Path(folder).exists():
        with contextlib.suppress(OSError, ValueError):  # a hub id; read_pretrained says what is wrong
            is_scorer = "ForSequenceClassification" in str(AutoConfig.from_pretrained(folder).architectures)
    source = read_pretrained(
        folder, gguf, f"AutoModelFor{'SequenceClassification' if is_scorer else 'CausalLM'}"
    )
    has = [source.config.id2label[i] for i in range(source.config.num_labels)] if is_scorer else []
    names = list(names) or has
    if not names:
        raise dist.RunError(f"{folder} is no reward model; expected a folder that reward_model.py wrote")
    keep = is_scorer and not zero_head
    # what transformers calls outputs that nobody named
    unnamed = len(has) == len(names) and all(name.startswith("LABEL_") for name in has)
    if keep and not unnamed and not set(names) <= set(has):
        raise dist.RunError(f"{folder} has the outputs {', '.join(has)}, not {', '.join(names)}")
    config = copy.deepcopy(source.config)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        width = model.score.in_features
    except (ValueError, AttributeError) as error:
        kind = config.model_type
        raise dist.RunError(
            f"transformers has no {kind} model with a score head; use another model"
        ) from error
    model.score = nn.Linear(width, len(names), bias=False)
    with torch.no_grad():
        if zero_head:
            model.score.weight.zero_()
        elif keep:
            rows = range(len(names)) if unnamed else [has.index(name) for name in names]
            model.score.weight.copy_(source.score.weight[list(rows)])
        else:  # Stiennon et al. 2020, in their code
            model.score.weight.normal_(std=(width + 1) ** -0.5)
    setattr(model, model.base_model_prefix, source.base_model)
    model.dtype_on_disk = source.dtype_on_disk
    return model


def check_packable(model: nn.Module) -> None:
    """Refuse an architecture that packed rows would turn into another function than transformers computes."""
    config = model.config
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    trunk, head = getattr(model, model.base_model_prefix, None), output_head(model)
    softcaps = [getattr(config, f"{x}_logit_softcapping", None) for x in ("attn", "final")]
    reasons = {
        "is multimodal": config.get_text_config() is not config,
        "caps its logits": any(softcaps),
        "has attention sinks": any(name.endswith("sinks") for name, _ in model.named_parameters()),
        f"has layers of type {', '.join(sorted(layers))}": layers,
        "carries a recurrent state": model._is_stateful,
        "has attention code of its own": not model._supports_attention_backend,
        "attends to later tokens": any(getattr(m, "is_causal", True) is False for m in model.modules()),
        "is more than a trunk and a head": set(model.children()) != {trunk, head},
    }
    for reason, found in reasons.items():
        if found:
            raise dist.RunError(f"the model ({config.model_type}) {reason}, which packed rows do not support")


def add_lora(model: nn.Module, rank: int, alpha: float, target: str) -> None:
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
    ends = (model.get_input_embeddings(), output_head(model))
    if is_scorer:
        model.score.requires_grad_(True)  # a head of its own is trained whole
    if any(hasattr(end, "base_layer") for end in ends):
        raise dist.RunError(f"lora_target {target!r}: embeddings and the output head take no adapters")


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the model's outermost list of modules."""
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList)))


def mesh(device: torch.device, sharding: str) -> DeviceMesh:
    """Ranks that share a copy of the model: all of them, those of a node (hybrid), or none."""
    world = dist.world_size()
    size = {"full": world, "hybrid": int(os.environ.get("LOCAL_WORLD_SIZE", world)), "none": 1}[sharding]
    if size == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, device: torch.device, system: System) -> None:
    """Activation checkpointing, compile, then FSDP2, in that order, on a model without weights yet."""
    dtype = resolve_dtype(system.dtype, device)
    trainable = any(p.requires_grad for p in model.parameters())
    head, embedding = output_head(model), model.get_input_embeddings()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and name != "score.weight":
            parameter.data = parameter.data.to(dtype)  # frozen weights need no float32 master
    plan = fsdp_plan(model, dtype, device, system.sharding)
    recompute = trainable and use_checkpointing(system.activation_checkpointing, model)
    for block in blocks(model):
        if system.compile:  # inside the recomputation: the same graph runs in forward and again in backward
            block.forward = torch.compile(block.forward, dynamic=True)
        if recompute:
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
        fully_shard(block, **plan)
    if head.weight is not embedding.weight:  # tied weights stay together in the root's group
        fully_shard(embedding, **plan)
        precise = plan
        if hasattr(model, "score"):  # float32 in every compute dtype
            precise = plan | {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
        fully_shard(head, **precise, reshard_after_forward=not trainable)  # backward begins with it
    fully_shard(model, **plan)
    sum_gradients(model)


def fsdp_plan(model: nn.Module, dtype: torch.dtype, device: torch.device, sharding: str) -> dict[str, Any]:
    """What `fully_shard` is told of every part of the model: ranks, compute dtype, float32 gradients."""
    low = None if dtype == torch.float32 else dtype
    whole = dist.world_size() == 1 or sharding == "none"
    return {
        "mesh": mesh(device, sharding),
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32),
        # whole float32 weights are neither gathered nor cast: FSDP would only copy them, row by row
        "ignored_params": set(model.parameters()) if whole and low is None else None,
    }


def sum_gradients(model: nn.Module) -> None:
    """Let FSDP add gradients over ranks instead of averaging them; gloo knows only the plain sum."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def use_checkpointing(choice: str, model: nn.Module) -> bool:
    """auto: recompute activations for models of a billion parameters or more."""
    return choice == "on" or (choice == "auto" and sum(p.numel() for p in model.parameters()) >= 1e9)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The compute dtype that the `dtype` argument means on this device."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype)


def fill(shell: nn.Module, full: nn.Module | None, device: torch.device) -> None:
    """Copy the weights and buffers rank 0 holds in `full` into the sharded, still empty `shell`."""
    shell.to_empty(device=device)
    shell.tie_weights()  # to_empty makes two of each shared parameter that FSDP does not hold

    def tensors(model: nn.Module) -> dict[str, Tensor]:  # rotary frequencies are in no state dict
        return {**model.state_dict(), **dict(model.named_buffers())}

    source = tensors(full) if full is not None else {}
    for name, target in tensors(shell).items():  # one whole tensor at a time on the device
        if full is not None:
            whole = source[name].detach().to(device).to(target.dtype)
        else:
            whole = torch.empty(target.shape, dtype=target.dtype, device=device)
        if dist.world_size() > 1:
            torch.distributed.broadcast(whole, src=0)
        if isinstance(target, DTensor):  # every rank cuts its own part out
            whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(whole)


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


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, its own memory where that is all there is. A collective if it is sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor.to_local()
    return local if local.shape == tensor.shape else tensor.full_tensor()


def full_weights(model: nn.Module, merge_lora: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name in the plain transformers model, whole tensor), one at a time; a collective all ranks must join.

    With merge_lora the adapters are folded into the weights they sit on; without, they alone come, under the
    names peft gives them.
    """
    state = model.state_dict()
    adapted = {name: m for name, m in model.named_modules() if hasattr(m, "base_layer")}

    def whole(name: str) -> Tensor:
        return whole_tensor(state[name])

    for name in state:
        if not merge_lora:
            if ".lora_" in name:
                yield name, whole(name)
        elif ".lora_" not in name:
            owner, _, leaf = name.partition(".base_layer.")
            full = whole(name)
            if leaf == "weight":
                a, b = (whole(f"{owner}.lora_{x}.default.weight") for x in "AB")
                delta = adapted[owner].scaling["default"] * (b @ a)
                full = full + (delta.T if adapted[owner].fan_in_fan_out else delta).to(full.dtype)
            yield name.replace(".base_layer.", "."), full


# ----------------------------------------------------------------------------------------------- optimization


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The trainable parameters for AdamW: matrices decay, norms and biases do not; one kernel updates all."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay, "fused": True},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0, "fused": True},
    ]


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients to a global norm of at most max_norm (0: never). -> the norm before, a scalar.

    Before that, gradients FSDP does not hold are summed over ranks: call it once a step, after all its rows.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            dist.sum_over_ranks(parameter.grad)
    norm = nn.utils.clip_grad_norm_(trainable, max_norm or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def lr_factor(step: int, num_steps: int, optimization: Optimization) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 1.

    Linear warm-up, then constant, or linear or cosine down to min_lr_ratio at the last step.
    """
    warmup_steps, least = optimization.warmup_steps, optimization.min_lr_ratio
    if step <= warmup_steps:
        return step / (warmup_steps + 1)
    if optimization.lr_schedule == "constant":
        return 1.0
    done = (step - warmup_steps - 1) / max(1, num_steps - warmup_steps - 1)
    left = 1 - done if optimization.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return least + (1 - least) * left


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def training_flops(model: nn.Module, lengths: list[int]) -> float:
    """FLOPs of forward and backward over sequences of these lengths, recomputation not counted.

    A token costs 6 for each parameter outside an untied input embedding, 4 if it is frozen (LoRA); the causal
    attention of a sequence 6 x layers x heads x head width x length^2. Every expert of a mixture is counted.
    """
    config = model.config
    table = model.get_input_embeddings().weight
    table = None if output_head(model).weight is table else table
    per_token = sum((6 if p.requires_grad else 4) * p.numel() for p in model.parameters() if p is not table)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * head_dim
    return float(per_token * sum(lengths) + attention * sum(n * n for n in lengths))


def speed(model: nn.Module, batch: list[Example], seconds: float) -> dict[str, float]:
    """Tokens per second over all ranks; on GPU also MFU, of 989 TFLOP/s a rank, and peak memory."""
    lengths = [len(tokens) for example in batch for tokens, _ in example.sequences]
    metrics = {"train/tokens_per_second": sum(lengths) / seconds}
    if torch.cuda.is_available():
        peak = 989e12 * dist.world_size()  # dense bf16 of an H100 or H200 SXM
        metrics["train/mfu"] = training_flops(model, lengths) / seconds / peak
        metrics["train/max_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics
