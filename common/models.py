"""Models: any Hugging Face decoder in, a sharded module out whose forward takes a packed row and returns log-probs.

Three things differ from calling transformers directly. Rows are packed, so attention is told where sequences
begin (`varlen_attention`). Logits are never held for a whole row (`_ChunkedHead`). Every model is an FSDP2 module, on one
process too, with float32 master weights and gradients that are summed, not averaged, over ranks.

Shapes: N tokens of a packed row, N_targets scored tokens, D width, V vocabulary, H heads, K head width.
"""

import contextlib
import copy
import functools
import inspect
import math
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common import dist
from common.data import Example, Row, model_folder


class TokenStats(NamedTuple):
    """What one packed forward says about its N_targets scored tokens; all float32."""

    logps: Tensor  # (N_targets,) log p(token | tokens before it), nats
    entropy: Tensor  # (N_targets,) of the distribution the token was scored under, nats
    accuracy: Tensor  # (N_targets,) 1 where the token was the most likely one, no gradient
    mean_logit: Tensor  # (N_targets,) mean over the vocabulary, no gradient


# ---------------------------------------------------------------------------------------------- packed attention


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
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
    """
    assert cu_seq_lens_q is not None, (
        "only packed rows: without cu_seqlens every sequence would see the others"
    )
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise dist.RunError(
            f"{type(module).__name__} uses soft-capped logits or sinks, which packing does not support"
        )
    if query.is_cuda and query.dtype != torch.float32:
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, K)
        return _flash_varlen(q, k, v, cu_seq_lens_q, max_length_q, scaling, window)[None], None
    bounds = cu_seq_lens_q.tolist()
    out = [
        F.scaled_dot_product_attention(
            query[:, :, a:b],
            key[:, :, a:b],
            value[:, :, a:b],
            **_causal(b - a, sliding_window, query.device),
            scale=scaling,
            enable_gqa=True,
        )
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def _causal(length: int, window: int | None, device: torch.device) -> dict[str, Any]:
    if window is None or length <= window:
        return {"is_causal": True}
    t = torch.arange(length, device=device)
    return {"attn_mask": (t[:, None] >= t) & (t[:, None] - t < window)}


def _flash_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: tuple[int, int],
) -> Tensor:
    """FlashAttention over packed sequences: the flash-attn package if installed, else torch's own kernel."""
    flash, varlen, takes_gqa = _flash_kernels()
    if flash is not None:
        return flash(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            softmax_scale=scale,
            causal=True,
            window_size=window,
        )
    if not takes_gqa and k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    gqa = {"enable_gqa": True} if takes_gqa else {}
    return varlen(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=window, **gqa
    )


@functools.cache
def _flash_kernels() -> tuple[Any, Any, bool]:
    try:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func, None, True
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        return None, varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


# ------------------------------------------------------------------------------------------------- chunked head


class _ChunkedHead(torch.autograd.Function):
    """Per-token log-probabilities and entropies without a logits tensor: chunks are recomputed in backward.

    z = h W^T + b, lp = z_y - logsumexp z, H = -sum_v p_v log p_v;
    dz = g_lp (onehot(y) - p) - g_H p (log p + H), dh = dz W, dW = sum dz^T h.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, scale: float, chunk: int
    ):
        ctx.save_for_backward(h, weight, bias, y)
        ctx.scale, ctx.chunk = scale, chunk
        logps, entropy, accuracy, mean_logit = (h.new_empty(len(y), dtype=torch.float32) for _ in range(4))
        for s in range(0, len(y), chunk):
            part = slice(s, s + chunk)
            z = _logits(h[part], weight, bias, scale)
            top, argmax = z.max(-1)
            accuracy[part] = argmax == y[part]
            mean_logit[part] = z.mean(-1) / scale
            logps[part] = z.gather(1, y[part, None])[:, 0]
            z -= top[:, None]
            p = z.exp()
            total = p.sum(-1)
            logps[part] -= top + total.log()
            entropy[part] = total.log() - torch.linalg.vecdot(p, z) / total
        ctx.mark_non_differentiable(accuracy, mean_logit)
        ctx.set_materialize_grads(False)
        return logps, entropy, accuracy, mean_logit

    @staticmethod
    def backward(ctx: Any, g_logps: Tensor | None, g_entropy: Tensor | None, *_: Any):
        h, weight, bias, y = ctx.saved_tensors
        dh = torch.empty_like(h)
        # sums over thousands of tokens: float32 whatever the compute dtype
        dw = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        db = (
            torch.zeros_like(bias, dtype=torch.float32)
            if bias is not None and ctx.needs_input_grad[2]
            else None
        )
        for s in range(0, len(y), ctx.chunk):
            part = slice(s, s + ctx.chunk)
            logp = _logits(h[part], weight, bias, ctx.scale).log_softmax(-1)
            dz = logp.exp()
            if g_entropy is not None:
                entropy = -torch.linalg.vecdot(dz, logp)
                drop = logp.add_(entropy[:, None]).mul_(dz).mul_(g_entropy[part, None])
            if g_logps is not None:
                dz *= -g_logps[part, None]
                dz.scatter_add_(1, y[part, None], g_logps[part, None])
            else:
                dz.zero_()
            if g_entropy is not None:
                dz -= drop
            dz *= ctx.scale
            low = dz.to(h.dtype)
            dh[part] = low @ weight
            if dw is not None:
                _add_product(dw, low.T, h[part])
            if db is not None:
                db += dz.sum(0)
        return (
            dh,
            None if dw is None else dw.to(weight.dtype),
            None if db is None else db.to(bias.dtype),
            None,
            None,
            None,
        )


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, accumulated in out's float32."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.is_cuda:
        out += torch.mm(a, b, out_dtype=torch.float32)
    else:
        out.addmm_(a.float(), b.float())


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    z = F.linear(h, weight, bias).float()
    return z if scale == 1.0 else z.mul_(scale)


def _head_forward(head: nn.Linear, h: Tensor, tokens: Tensor, scale: float) -> TokenStats:
    """Replaces `forward` of the language-model head, so that FSDP has gathered its weight when it runs."""
    chunk = 1024 if h.is_cuda else 256
    return TokenStats(*_ChunkedHead.apply(h, head.weight, getattr(head, "bias", None), tokens, scale, chunk))


def _packed_forward(model: nn.Module, row: Row, temperature: float = 1.0) -> TokenStats:
    """Replaces `forward` of the whole model: trunk over the row, head over its scored tokens only."""
    trunk = getattr(model, model.base_model_prefix)
    hidden = trunk(
        input_ids=row.tokens[None],
        position_ids=row.position_ids[None],
        use_cache=False,  # with a cache transformers would attend across sequences
        cu_seq_lens_q=row.cu_seqlens,
        cu_seq_lens_k=row.cu_seqlens,
        max_length_q=row.max_seqlen,
        max_length_k=row.max_seqlen,
    )[0][0]  # (N, D)
    hidden = hidden[row.targets - 1]  # position t-1 scores token t
    return model.get_output_embeddings()(hidden, row.tokens[row.targets], model.logit_scale_ / temperature)


def token_stats(model: nn.Module, row: Row, temperature: float = 1.0) -> TokenStats:
    """Log-probability, entropy and top-1 hit of each scored token of a row, under logits / temperature."""
    return model(row, temperature)


def token_logps(model: nn.Module, row: Row, temperature: float = 1.0) -> Tensor:
    """log p(token | the tokens before it in its sequence) of each scored token. -> (N_targets,) float32"""
    return model(row, temperature).logps


def segment_sum(values: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """Sum values (M,) by the segment each belongs to. -> (num_segments,)"""
    return values.new_zeros(num_segments).index_add(0, segment_ids, values)


# ------------------------------------------------------------------------------------------------ load and shard


def load(model: str, device: torch.device, args: Any, trainable: bool = True) -> nn.Module:
    """A causal language model, sharded over all ranks, whose forward is `token_stats`.

    Only rank 0 reads the weights; the others receive their shards. Reads from args: dtype, sharding,
    activation_checkpointing, compile, and lora_rank, lora_alpha, lora_target for a trainable model.

    Raises:
        RunError: no such model, no weights in the folder, or an architecture that packing cannot serve.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("varlen", varlen_attention)  # no mask function: packed rows need no mask
    folder, gguf = model_folder(model)
    lora = trainable and args.lora_rank > 0

    def build(make: Any) -> nn.Module:
        built = make()
        if lora:
            add_lora(built, args.lora_rank, args.lora_alpha, args.lora_target)
        return built

    full: list[nn.Module] = []  # rank 0's; the others stay without a copy

    def read() -> tuple:
        full.append(build(lambda: read_pretrained(folder, gguf)))
        return full[0].config, full[0].generation_config, full[0].dtype_on_disk

    config, generation_config, dtype_on_disk = dist.from_main(read)
    config = copy.deepcopy(config)  # from_config keeps the object it is given
    for name in vars(config):
        if name.endswith(("dropout", "pdrop")) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)  # policy and reference must be the same function
    _check_supported(config)
    with torch.device("meta"):
        shell = build(
            lambda: AutoModelForCausalLM.from_config(
                config, attn_implementation="varlen", dtype=torch.float32
            )
        )
    shell.generation_config, shell.dtype_on_disk = generation_config, dtype_on_disk
    shell.logit_scale_ = getattr(config, "logit_scale", None) or 1.0 / (
        getattr(config, "logits_scaling", None) or 1.0
    )
    shell.train(trainable)
    for parameter in shell.parameters():
        parameter.requires_grad_(trainable and parameter.requires_grad)
    shard(shell, device, args)
    fill(shell, full[0] if full else None, device)
    head = shell.get_output_embeddings()
    head.forward = types.MethodType(_head_forward, head)
    shell.forward = types.MethodType(_packed_forward, shell)
    return shell


def read_pretrained(folder: str, gguf: str | None = None) -> nn.Module:
    """The plain float32 transformers model of a folder, hub id or GGUF file; a LoRA folder comes back merged."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if (Path(folder) / "adapter_config.json").exists():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).merge_and_unload()
            dtype_on_disk = model.config.dtype
        elif gguf:
            quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
            drop = ("quantization_config", "_name_or_path", "_model_name_or_path")
            kept = {k: v for k, v in quantized.config.to_dict().items() if k not in drop}
            model = AutoModelForCausalLM.from_config(type(quantized.config)(**kept), dtype=torch.float32)
            model.load_state_dict(quantized.state_dict())
            model.generation_config, dtype_on_disk = quantized.generation_config, torch.float32
        else:
            dtype_on_disk = AutoConfig.from_pretrained(folder).dtype or torch.float32
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise dist.RunError(f"cannot load the model {folder}: {first_line}") from error
    model.dtype_on_disk = dtype_on_disk
    return model


def _check_supported(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise dist.RunError(f"{config.model_type} is an encoder-decoder model; a decoder-only one is needed")
    if getattr(config, "final_logit_softcapping", None):
        raise dist.RunError(
            f"{config.model_type} caps its logits (final_logit_softcapping), which is not supported"
        )


def add_lora(model: nn.Module, rank: int, alpha: float, target: str) -> None:
    """Put peft's adapters into the model's linear layers, in place; only they stay trainable."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = target if target == "all-linear" else target.split(",")
    try:
        model.lora_config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM"
        )
        inject_adapter_in_model(model.lora_config, model)
    except ValueError as error:
        raise dist.RunError(f"lora_target {target!r}: {str(error).splitlines()[0]}") from error


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the model's outermost list of modules."""
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList)))


def mesh(device: torch.device, sharding: str) -> Any:
    """Ranks that share a copy of the model: all of them, those of a node (hybrid), or none."""
    world = dist.world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    shard_size = {"full": world, "hybrid": local, "none": 1}[sharding]
    if shard_size == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device.type, (world // shard_size, shard_size), mesh_dim_names=("replicate", "shard")
    )


def shard(model: nn.Module, device: torch.device, args: Any) -> None:
    """Activation checkpointing, compile, then FSDP2, in that order, on a model without weights yet."""
    compute_dtype = resolve_dtype(args.dtype, device)
    trainable = any(p.requires_grad for p in model.parameters())
    if compute_dtype == torch.bfloat16:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)  # frozen weights need no float32 master
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if compute_dtype != torch.float32 else None, reduce_dtype=torch.float32
    )
    plan = {"mesh": mesh(device, args.sharding), "mp_policy": policy}
    for block in blocks(model):
        if trainable and use_checkpointing(args.activation_checkpointing, model):
            block.forward = functools.partial(
                torch.utils.checkpoint.checkpoint,
                block.forward,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        if args.compile:
            block.compile()
        fully_shard(block, **plan)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:  # tied weights stay together in the root's group
        fully_shard(embedding, **plan)
        fully_shard(head, **plan, reshard_after_forward=False)  # backward begins with it
    fully_shard(model, **plan)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients add up over ranks; gloo knows only the plain sum
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def use_checkpointing(choice: str, model: nn.Module) -> bool:
    """auto: recompute activations for models of a billion parameters or more."""
    return choice == "on" or (choice == "auto" and sum(p.numel() for p in model.parameters()) >= 1e9)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype)


def fill(shell: nn.Module, full: nn.Module | None, device: torch.device) -> None:
    """Copy the weights and buffers rank 0 holds in `full` into the sharded, still empty `shell`."""
    shell.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    if full is not None:
        dtypes = {name: p.dtype for name, p in shell.named_parameters()}
        state = {name: t.to(dtypes.get(name, t.dtype)) for name, t in full.state_dict().items()}
    set_model_state_dict(shell, state if full is not None else {}, options=options)
    source = dict(full.named_buffers()) if full is not None else {}
    for name, buffer in shell.named_buffers():  # rotary frequencies are in no state dict
        if name in source:
            buffer.copy_(source[name])
        if dist.world_size() > 1:
            torch.distributed.broadcast(buffer, src=0)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block a LoRA policy is its own reference: the base model, exactly."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters() would also flip requires_grad under FSDP's feet
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def full_weights(model: nn.Module, merge_lora: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name in the plain transformers model, whole tensor) one at a time; a collective, so call it on every rank.

    With merge_lora the adapters are folded into the weights they sit on; without, they come under peft's names.
    """
    state = model.state_dict()  # also reshards what a forward has left gathered
    whole = lambda t: t.full_tensor() if isinstance(t, DTensor) else t  # noqa: E731
    adapted = {name: m for name, m in model.named_modules() if hasattr(m, "base_layer")}
    for name, tensor in state.items():
        if ".lora_" in name:
            if not merge_lora:
                yield name, whole(tensor)
            continue
        full = whole(tensor)
        owner = name.rsplit(".base_layer.", 1)[0] if ".base_layer." in name else None
        if owner and merge_lora and name.endswith("weight"):
            a, b = (whole(state[f"{owner}.lora_{x}.default.weight"]) for x in "AB")
            full = full + adapted[owner].scaling["default"] * (b @ a).to(full.dtype)
        if merge_lora or owner is None:
            yield name.replace(".base_layer.", "."), full


# --------------------------------------------------------------------------------------------------- optimization


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The trainable parameters for AdamW: matrices decay, norms and biases do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients so that their global norm is at most max_norm (0: never). -> the norm before, a scalar."""
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def lr_factor(step: int, num_steps: int, args: Any) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 1.

    Linear warm-up, then constant, or linear or cosine down to min_lr_ratio at the last step.
    """
    if step <= args.warmup_steps:
        return step / (args.warmup_steps + 1)
    if args.lr_schedule == "constant":
        return 1.0
    done = (step - args.warmup_steps - 1) / max(1, num_steps - args.warmup_steps - 1)
    left = 1 - done if args.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return args.min_lr_ratio + (1 - args.min_lr_ratio) * left


def training_flops(model: nn.Module, lengths: list[int]) -> float:
    """FLOPs of forward and backward over sequences of these lengths; causal attention, recomputation not counted.

    6 x (parameters without the input embedding) per token + 6 x layers x heads x head width x length^2 / sequence.
    """
    config = model.config.get_text_config()
    embedding = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    params = sum(p.numel() for p in model.parameters()) - embedding
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * head_dim
    return 6.0 * params * sum(lengths) + attention * sum(n * n for n in lengths)


def speed(model: nn.Module, batch: list[Example], seconds: float) -> dict[str, float]:
    """Tokens per second over all ranks; on GPU also MFU, of 989 TFLOP/s a rank, and peak memory."""
    lengths = [len(tokens) for example in batch for tokens, _ in example.sequences]
    metrics = {"train/tokens_per_second": sum(lengths) / seconds}
    if torch.cuda.is_available():
        peak = 989e12 * dist.world_size()  # dense bf16 of an H100 or H200 SXM
        metrics["train/mfu"] = training_flops(model, lengths) / seconds / peak
        metrics["train/max_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics
