"""common/models.py: packed, chunked, sharded or adapted, the numbers are those of plain transformers."""

import functools
import importlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from common import checkpoint, data, dist, lm_head, loading, lora, models, packed, plan
from common.args import Optimization, Run, System

V = 60
CAP, ROPE = {"final_logit_softcapping": 3.0}, {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES = [
    ("Llama", {}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ("Qwen3", {"head_dim": 16}),
    ("Mistral", {"sliding_window": 6}),
    ("GPT2", {}),
    ("Gemma", {"head_dim": 8, "tie_word_embeddings": True}),
    (
        "Gemma3Text",
        {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    ("Cohere", {"logit_scale": 0.25}),
    ("Granite", {"logits_scaling": 3.0}),
    ("Mixtral", {"num_local_experts": 3}),
    ("Gemma2", {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0, **CAP}),
    ("Gemma3Text", {"head_dim": 8, "sliding_window": 6, **CAP}),
    ("GptOss", {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "rope_parameters": ROPE}),
    ("HyperCLOVAX", {"logits_scaling": 0.3}),
    ("GraniteMoeHybrid", {"layer_types": ["attention"] * 2, "num_local_experts": 0, "mamba_n_heads": 4}),
]
# experts, a shared one and a dense layer, under the names that peft knows of experts only
DOTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
DOTS |= {"moe_intermediate_size": 16, "head_dim": 8}


def options(**changes: Any) -> System:
    return System(**{"dtype": "float32", "activation_checkpointing": "off", **changes})


def configure(kind: str, **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V}
    sizes |= {"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    if kind != "GPT2":
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2}
    sizes |= DOTS if kind == "Dots1" else {}
    settings = {**sizes, "initializer_range": 0.3, "tie_word_embeddings": False, **changes}
    return getattr(transformers, f"{kind}Config")(**settings)


def save(folder: Path, kind: str = "Llama", seed: int = 0, shard: str = "1GB", **config: Any) -> nn.Module:
    """A random model in a folder, its weights so wide that it is far from uniform."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        configure(kind, **config), dtype=torch.float32
    ).eval()
    for parameter in model.parameters():  # biases and norms begin alike: let them matter
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save(path)
    return path


def documents(lengths: tuple[int, ...] = (5, 17, 1, 30), scored: float = 0.6) -> list[packed.Example]:
    """Random sequences; a random part of each is scored."""
    rng = np.random.default_rng(0)
    return [
        packed.Example(
            [(rng.integers(2, V, n).astype(np.int32), (rng.random(n) < scored) & (np.arange(n) > 0))], ""
        )
        for n in lengths
    ]


def replies(prompt: int = 9, lengths: tuple[int, ...] = (7, 1, 12)) -> packed.Example:
    """Three random replies to one prompt; a random part of the second half of each sequence is scored."""
    rng = np.random.default_rng(1)
    asked = rng.integers(2, V, prompt)
    sequences = []
    for n in lengths:
        ids = np.append(asked, rng.integers(2, V, n)).astype(np.int32)
        mask = (np.arange(len(ids)) >= prompt) & (rng.random(len(ids)) < 0.8)
        sequences.append(packed.Tokens(ids, mask))
    return packed.Example(sequences, "")


def pack(examples: list[packed.Example]) -> packed.MicroBatch:
    return packed.make_micro_batch(examples, list(range(len(examples))), torch.device("cpu"))


def plain_logps(model: nn.Module, example: packed.Example, temperature: float = 1.0) -> Tensor:
    """(n - 1, V) log-probabilities of transformers' own forward over one sequence alone."""
    ((ids, _),) = example.sequences
    ids = torch.from_numpy(ids).long()[None]
    return (model(input_ids=ids).logits[0, :-1] / temperature).log_softmax(-1)


def plain_stats(model: nn.Module, examples: list[packed.Example], temperature: float = 1.0) -> list[Tensor]:
    """logps, entropy and accuracy of the scored tokens, one sequence at a time."""
    logps, entropy, accuracy = [], [], []
    for example in examples:
        tokens, mask = (torch.from_numpy(x)[1:] for x in example.sequences[0])
        logp = plain_logps(model, example, temperature)[mask]
        logps.append(logp.gather(1, tokens[mask, None].long())[:, 0])
        entropy.append(-(logp.exp() * logp).sum(-1))
        accuracy.append((logp.argmax(-1) == tokens[mask]).float())
    return [torch.cat(x) for x in (logps, entropy, accuracy)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By the names of the transformers model, which may be inside ours."""
    model = model.model if isinstance(model, models.PackedModel) else model
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference over all tensors, as a share of the largest entry of b."""
    assert a.keys() == b.keys() and a
    scale = max(t.abs().max().item() for t in b.values())
    return max((a[name] - b[name]).abs().max().item() for name in b) / scale


# ------------------------------------------------------------------------------------------ packing isolation


@pytest.mark.parametrize(("kind", "config"), FAMILIES, ids=[kind for kind, _ in FAMILIES])
def test_a_packed_row_says_what_each_sequence_says_alone(kind: str, config: dict, tmp_path, device):
    """E3, through the whole model, its head and its logit scale; three replies share their prompt."""
    plain, three = save(tmp_path, kind, **config), replies()
    examples = [*documents(), *(packed.Example([s], "") for s in three.sequences)]
    plain.set_attn_implementation("eager")  # others may leave out caps and sinks
    policy, row = models.load(str(tmp_path), device, options()), pack([*documents(), three])
    assert len(row.tokens) == sum(e.num_tokens for e in examples) - 2 * three.num_shared > 2 * 8
    for temperature in (1.0, 0.7):
        stats = policy(row, temperature)
        for ours, theirs in zip(stats, plain_stats(plain, examples, temperature), strict=False):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    logits = policy(row).mean_logit * policy.logit_scale
    theirs = torch.cat(
        [
            plain(input_ids=torch.from_numpy(e.sequences[0][0]).long()[None])
            .logits[0, :-1]
            .mean(-1)[torch.from_numpy(e.sequences[0][1])[1:]]
            for e in examples
        ]
    )
    torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=1e-5)


def test_a_row_without_its_boundaries_would_be_noticed(folder: Path, device):
    policy, examples = models.load(str(folder), device, options()), documents()
    row, alone = (
        pack(examples),
        plain_stats(transformers.AutoModelForCausalLM.from_pretrained(folder), examples)[0],
    )
    length = len(row.tokens)
    whole = torch.tensor([0, length], dtype=torch.int32)
    row.attention = dict(zip(row.attention, (whole, whole, length, length), strict=True))
    assert (models.token_logps(policy, row) - alone).abs().max() > 0.1
    row = pack(examples)
    row.position_ids = torch.arange(length).flip(0)
    assert (models.token_logps(policy, row) - alone).abs().max() > 0.1


def test_plain_transformers_leaks_where_we_do_not(folder: Path):
    """What the packed forward must not do: keep the cache, or give a mask of ones."""
    plain, row = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), pack(documents())
    ids, positions = row.tokens[None], row.position_ids[None]
    alone = torch.cat(
        [plain(input_ids=ids[:, a:b]).logits for a, b in itertools.pairwise(row.attention["cu_seq_lens_q"])],
        1,
    )
    wrong = (
        {"position_ids": positions},
        {"position_ids": positions, "use_cache": False, "attention_mask": torch.ones_like(ids)},
        {"use_cache": False},
    )
    for settings in wrong:
        assert (plain(input_ids=ids, **settings).logits - alone).abs().max() > 0.1
    right = plain(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(right, alone, atol=1e-5, rtol=1e-5)


def test_a_loss_on_one_sequence_has_no_gradient_in_another(folder: Path, device):
    policy = models.load(str(folder), device, options())
    second = packed.Example([(np.arange(30, 50, dtype=np.int32), np.ones(20, bool))], "")
    second.sequences[0][1][0] = False

    def run(first: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        first = packed.Example([(first.astype(np.int32), np.zeros(len(first), bool))], "")
        logps = models.token_logps(policy, pack([first, second]))
        policy.zero_grad()
        (-logps.sum()).backward()
        return logps.detach(), gradients(policy)

    logps, grads = run(np.arange(2, 20))
    table = grads["model.embed_tokens.weight"]
    assert table[:30].count_nonzero() == 0 and table[30:49].abs().amin(0).sum() > 0
    others, other_grads = run(np.arange(20, 2, -1))  # as long, other tokens
    assert (logps - others).abs().max() <= 1e-6
    assert furthest(grads, other_grads) <= 1e-6


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("Bart", {}, "has attention code of its own"),
        ("Bloom", {}, "has attention code of its own"),
        ("Roberta", {}, "attends to later tokens"),
        ("Mamba", {"num_hidden_layers": 2}, "(linear_attention|recurrent)"),
        ("Rwkv", {"num_hidden_layers": 2}, "carries a recurrent state"),
        ("Lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "layers of type conv"),
        ("ModernBertDecoder", {"num_hidden_layers": 2}, "is more than a trunk and a head"),
        ("Gemma3", {}, "is multimodal"),
    ],
)
def test_an_architecture_that_packing_would_change_is_refused(kind: str, config: dict, words: str):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, f"{kind}Config")(**config)
        )
    with pytest.raises(dist.RunError, match=words):
        models.check_packable(model)


def test_attention_with_a_mask_or_without_boundaries_is_refused():
    q = torch.randn(1, 4, 6, 8)
    cu = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(dist.RunError, match="does its own masking"):
        packed.packed_attention(nn.Identity(), q, q, q, torch.ones(1, 1, 6, 6), cu_seq_lens_q=cu)
    with pytest.raises(dist.RunError, match="is not told where sequences begin"):
        packed.packed_attention(nn.Identity(), q, q, q, None)


def test_a_refused_model_stops_the_load(tmp_path, device):
    save(tmp_path, "Lfm2", layer_types=["conv", "full_attention"])
    with pytest.raises(dist.RunError, match="lfm2.*layers of type conv"):
        models.load(str(tmp_path), device, options())


# ------------------------------------------------------------------------------------------ attention kernels


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, left: int | None
) -> Tensor:
    """(N, H, K) by a masked softmax over all keys. The queries of a part are the last of its keys; a token
    sees itself and `left` keys before it.
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    (part, t), (key_part, s) = (
        (torch.bucketize(torch.arange(int(cu[-1])), cu[1:].long(), right=True), torch.arange(int(cu[-1])))
        for cu in (cu_q, cu_k)
    )
    behind = cu_q[1:][part] - t  # tokens from here to the end of the part
    distance = (cu_k[1:][key_part] - s) - behind[:, None]
    seen = (part[:, None] == key_part) & (distance >= 0)
    if left is not None:
        seen &= distance <= left
    scores = torch.einsum("ihk,jhk->hij", q, k) * scale
    return torch.einsum("hij,jhk->ihk", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def torch_kernel(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """What torch.nn.attention.varlen.varlen_attn documents, with its checks."""
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    return _kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def old_torch_kernel(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """The same before torch 2.13, which shares key heads without being told."""
    settings = {"scale": scale, "window_size": window_size, "enable_gqa": True}
    return torch_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **settings)


def flash_attn_kernel(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """What flash_attn.flash_attn_varlen_func documents."""
    assert dropout_p == 0.0 and softcap == 0.0
    if causal:
        window_size = (window_size[0], 0)
    return _kernel(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window_size
    )


def _kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
    for cu, longest in ((cu_q, max_q), (cu_k, max_k)):
        assert cu.dtype == torch.int32 and type(longest) is int and longest >= cu.diff().max()
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    assert len(q) == cu_q[-1] and len(k) == len(v) == cu_k[-1]
    assert type(window) is tuple and window[1] == 0, "not causal"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return dense_attention(q, k, v, cu_q, cu_k, scale, None if window[0] == -1 else window[0])


KERNELS = {
    "sdpa": None,
    "torch": torch_kernel,
    "old torch": old_torch_kernel,
    "flash-attn": flash_attn_kernel,
}


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Stand-ins in the places the real kernels are imported from."""
    from torch.nn.attention import varlen

    package = None  # no such package
    if request.param == "flash-attn":
        package = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_kernel)
    elif KERNELS[request.param]:
        monkeypatch.setattr(varlen, "varlen_attn", KERNELS[request.param])
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    found = packed._find_flash_kernel() if request.param != "sdpa" else None
    monkeypatch.setattr(packed, "_flash_kernel", found)
    return request.param


def test_the_stand_in_has_the_signature_of_the_installed_torch():
    from torch.nn.attention.varlen import varlen_attn

    def parameters(function: Any) -> list[tuple]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    real = parameters(varlen_attn)
    newer = any(name == "enable_gqa" for name, *_ in real)
    ours = parameters(torch_kernel if newer else old_torch_kernel)
    assert [p for p in real if p in ours] == ours


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "value_width"), [(4, 2, 8, 8), (4, 4, 12, 5), (4, 4, 5, 12)]
)
def test_attention_back_ends_equal_a_masked_softmax(
    kernel: str, heads: int, key_heads: int, width: int, value_width: int, window: int | None
):
    """Forward and backward in float64. A window of 4 is a token and the 3 before it, as in transformers.

    Of the last three parts the first is the prefix of the two others.
    """
    torch.manual_seed(0)
    cu = torch.tensor([0, 5, 6, 23, 31, 40], dtype=torch.int32)
    looks = torch.tensor([*range(23), *range(6, 31), *range(6, 23), *range(31, 40)])
    cu_k = torch.tensor([0, 5, 6, 23, 48, 74], dtype=torch.int32)
    inputs = [
        torch.randn(1, h, 40, w, dtype=torch.float64, requires_grad=True)
        for h, w in ((heads, width), (key_heads, width), (key_heads, value_width))
    ]
    upstream = torch.randn(1, 40, heads, value_width, dtype=torch.float64)
    ours, _ = packed.packed_attention(
        nn.Identity(),
        *inputs,
        None,
        scaling=0.3,
        sliding_window=window,
        cu_seq_lens_q=cu,
        cu_seq_lens_k=cu_k,
        max_length_q=17,
        max_length_k=26,
        kv_indices=looks,
        dropout=0.0,
    )
    q, k, v = (x[0].transpose(0, 1) for x in inputs)
    k, v = (x[looks] for x in (k, v))
    theirs = dense_attention(q, k, v, cu, cu_k, 0.3, None if window is None else window - 1)[None]
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(theirs, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("cap", "with_sinks"), [(0.7, False), (None, True), (0.7, True)])
def test_caps_and_sinks_equal_formulas_over_the_whole_row(cap: float | None, with_sinks: bool, window):
    """Forward and backward in float64: a sink is one more place to look at, with a value of nothing."""
    torch.manual_seed(0)
    cu = torch.tensor([0, 5, 6, 23], dtype=torch.int32)
    shapes = [(1, 4, 23, 8), (1, 2, 23, 8), (1, 2, 23, 8), (4,)]
    q, k, v, sinks = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    inputs = (q, k, v, sinks) if with_sinks else (q, k, v)
    ours, _ = packed.packed_attention(
        nn.Identity(),
        q,
        k,
        v,
        None,
        scaling=0.3,
        sliding_window=window,
        cu_seq_lens_q=cu,
        cu_seq_lens_k=cu,
        softcap=cap,
        s_aux=sinks if with_sinks else None,
    )
    segment, t = torch.bucketize(torch.arange(23), cu[1:].long(), right=True), torch.arange(23)
    distance = t[:, None] - t
    seen = (segment[:, None] == segment) & (distance >= 0) & (distance < (window or 23))
    scores = 0.3 * torch.einsum("bhik,bhjk->bhij", q, k.repeat_interleave(2, 1))
    weights = ((cap * (scores / cap).tanh()) if cap else scores).exp() * seen
    total = weights.sum(-1, keepdim=True) + (sinks.exp()[:, None, None] if with_sinks else 0)
    theirs = torch.einsum("bhij,bhjk->bihk", weights / total, v.repeat_interleave(2, 1))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    upstream = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_the_real_kernel_equals_sdpa_on_gpu(window: int | None):
    """bf16 on the card against float32 SDPA of the same numbers, with fewer key heads than query heads."""
    torch.manual_seed(0)
    cu = torch.tensor([0, 5, 6, 200, 333], dtype=torch.int32, device="cuda")
    shapes = [(1, 8, 333, 64), (1, 2, 333, 64), (1, 2, 333, 64)]
    low = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    high = [x.detach().float().requires_grad_() for x in low]
    settings = {"scaling": 0.125, "sliding_window": window, "cu_seq_lens_q": cu, "max_length_q": 194}
    looks = [*range(200), *range(6, 333)]  # the last part goes on from the one before
    cu_k = torch.tensor([0, 5, 6, 200, 527], dtype=torch.int32, device="cuda")
    settings |= {"cu_seq_lens_k": cu_k, "max_length_k": 327}
    settings |= {"kv_indices": torch.tensor(looks, device="cuda")}
    outs = [packed.packed_attention(nn.Identity(), *x, None, **settings)[0] for x in (low, high)]
    upstream = torch.randn_like(outs[0])
    for a, b in zip(
        [outs[0], *torch.autograd.grad(outs[0], low, upstream)],
        [outs[1], *torch.autograd.grad(outs[1], high, upstream.float())],
        strict=True,
    ):
        assert (a.float() - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize(
    ("kind", "plain"), [("Llama", True), ("Qwen3", True), ("Gemma", False), ("Gemma3", False)]
)
def test_norms_are_fused_where_they_are_plain(kind: str, plain: bool):
    """Fused, they say the same in float32; Gemma's adds 1 to its weight and is left alone."""
    module = importlib.import_module(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}")
    norm = getattr(module, f"{kind}RMSNorm")(16, eps=1e-3)
    assert loading.is_plain_rms_norm(type(norm)) == plain
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 16)
    before, forward = norm(x), norm.forward
    loading.fuse_norms(norm)
    assert (norm.forward != forward) == plain
    torch.testing.assert_close(norm(x), before)


# ----------------------------------------------------------------------------------------------- chunked head


def head_inputs(count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    h, weight, bias = torch.randn(count, 8), torch.randn(29, 8), torch.randn(29)
    tokens = torch.randint(29, (count,))
    return *(x.to(dtype).requires_grad_() for x in (h, weight, bias)), tokens


def dense_head(
    h: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, scale: float
) -> tuple[Tensor, ...]:
    raw = F.linear(h, weight, bias)
    logp = (raw * scale).log_softmax(-1)
    top = (logp.argmax(-1) == tokens).to(h.dtype)
    return logp.gather(1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1), top, raw.mean(-1)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("upstream", ["logps", "entropy", "both"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1 / 0.7])
@pytest.mark.parametrize("chunk", [1, 7, 13, 14])
def test_the_chunked_head_equals_a_dense_one(chunk: int, scale: float, with_bias: bool, upstream: str):
    """E4: float32 in chunks against float64 at once; values, and gradients of random signed sums."""
    ours, theirs = head_inputs(13, torch.float32), head_inputs(13, torch.float64)
    if not with_bias:
        ours, theirs = ((h, w, None, y) for h, w, _, y in (ours, theirs))
    stats, expected = lm_head._TokenStats.apply(*ours, scale, chunk, False), dense_head(*theirs, scale)
    for a, b in zip(stats, expected, strict=True):
        assert relative(a, b) < 1e-5
    assert not stats[2].requires_grad and not stats[3].requires_grad
    g_logps, g_entropy = torch.randn(2, 13, dtype=torch.float64)
    for out in (stats, expected):
        loss = 0.0
        if upstream != "entropy":
            loss = loss + (out[0] * g_logps.to(out[0].dtype)).sum()
        if upstream != "logps":
            loss = loss + (out[1] * g_entropy.to(out[1].dtype)).sum()
        loss.backward()
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert a is None or relative(a.grad, b.grad) < 1e-5


def test_wrong_heads_are_far_beyond_the_tolerance():
    h, weight, bias, tokens = head_inputs(13, torch.float64)
    g = torch.randn(13, dtype=torch.float64)

    def dw(tokens: Tensor, normalised: bool = True) -> tuple[Tensor, Tensor]:
        z = F.linear(h, weight, bias)
        out = (z.log_softmax(-1) if normalised else z).gather(1, tokens[:, None])[:, 0]
        return out, torch.autograd.grad(out, weight, g)[0]

    right, right_dw = dw(tokens)
    assert relative(dw(tokens.roll(1))[0], right) > 0.1
    assert relative(dw(tokens, normalised=False)[1], right_dw) > 0.1  # without the softmax part of dW
    ours = lm_head._TokenStats.apply(h, weight, bias, tokens, 1.0, 7, False)[0]
    assert relative(ours, right) < 1e-12
    assert relative(torch.autograd.grad(ours, weight, g)[0], right_dw) < 1e-12


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_chunked_head_passes_gradcheck(cap: float | None):
    h, weight, bias, tokens = head_inputs(5, torch.float64)

    def both(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return lm_head._TokenStats.apply(h, weight, bias, tokens, 1.3, 2, False, cap)[:2]

    assert torch.autograd.gradcheck(both, (h, weight, bias), check_undefined_grad=False)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_gradient_made_in_forward_is_that_of_backward(
    frozen: bool, cap: float | None, monkeypatch: pytest.MonkeyPatch
):
    """With equal weights, and with any weights if W is frozen (LoRA); the logits are computed once."""
    results, calls, logits = [], [], lm_head.float32_logits
    monkeypatch.setattr(lm_head, "float32_logits", lambda *args: calls.append(1) or logits(*args))
    g = torch.linspace(-1, 2, 13, dtype=torch.float64) if frozen else torch.tensor(-0.3, dtype=torch.float64)
    for early in (False, True):
        h, weight, bias, tokens = head_inputs(13, torch.float64)
        wanted = [h] if frozen else [h, weight, bias]
        weight.requires_grad_(not frozen)
        bias.requires_grad_(not frozen)
        stats = lm_head._TokenStats.apply(h, weight, bias, tokens, 0.7, 5, False, cap, early)
        results.append([*stats, *torch.autograd.grad((stats[0] * g).sum(), wanted)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert len(calls) == 3 + 3 + 3  # of three chunks: forward and backward, then forward alone


def test_equal_weights_are_not_taken_for_granted():
    """A loss that weighs tokens apart stops; an entropy in the loss is differentiated as ever."""
    h, weight, bias, tokens = head_inputs(5, torch.float64)
    stats = lm_head._TokenStats.apply(h, weight, bias, tokens, 1.0, 2, False, None, True)
    with pytest.raises(RuntimeError, match="weighs tokens apart"):
        stats[0].square().sum().backward()
    results = []
    for early in (False, True):
        stats = lm_head._TokenStats.apply(h, weight, bias, tokens, 1.0, 2, False, None, early)
        results.append(torch.autograd.grad(stats[0].square().sum() + stats[1].sum(), (h, weight, bias)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_head_takes_no_targets_and_skips_what_is_frozen(monkeypatch: pytest.MonkeyPatch):
    h, weight, bias, tokens = head_inputs(0, torch.float32)
    stats = lm_head._TokenStats.apply(h, weight, bias, tokens, 1.0, 4, False)
    assert [len(x) for x in stats] == [0] * 4
    stats[0].sum().backward()
    assert weight.grad.count_nonzero() == 0 and bias.grad.count_nonzero() == 0 and h.grad.shape == (0, 8)
    h, weight, bias, tokens = head_inputs(5, torch.float32)
    weight.requires_grad_(False)
    monkeypatch.setattr(lm_head, "_add_product", lambda *_: pytest.fail("a frozen weight needs no gradient"))
    lm_head._TokenStats.apply(h, weight, bias, tokens, 1.0, 4, False)[0].sum().backward()
    assert weight.grad is None and h.grad is not None


def test_the_head_in_bfloat16_sums_its_weight_gradient_in_float32():
    """1,024 equal contributions, one a chunk: a bfloat16 sum would stop growing at 256 of them."""
    h = torch.ones(1024, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    stats = lm_head._TokenStats.apply(h, weight, None, torch.zeros(1024, dtype=torch.long), 1.0, 1, False)
    assert stats[0].dtype == torch.float32
    stats[0].sum().backward()
    assert weight.grad.tolist() == [[512.0], [-512.0]]  # each token adds onehot - p = (1/2, -1/2)


def test_a_dummy_row_runs_forward_and_backward(folder: Path, device):
    policy = models.load(str(folder), device, options())
    logps = models.token_logps(policy, packed.make_micro_batch(documents(), [], device))
    assert logps.shape == (0,)
    logps.sum().backward()
    grads = gradients(policy)
    assert len(grads) == len(list(policy.parameters())) and not any(g.count_nonzero() for g in grads.values())


def test_segment_sum_by_hand():
    values, segments = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0, 2])
    assert packed.segment_sum(values, segments, 4).tolist() == [2.0, 0.0, 5.0, 0.0]


def test_a_table_has_the_row_of_each_sequence_in_its_place_however_they_are_packed(device):
    lengths = ((5,), (2, 7, 3), (9,), (4, 6))
    examples = [
        packed.Example([packed.Tokens(np.zeros(n, np.int32), np.arange(n) > 0) for n in own], "")
        for own in lengths
    ]

    def scored(batch):
        return packed.segment_sum(batch.targets * 0.0 + 1, batch.target_segments, batch.num_segments)

    for limit in (100, 12, 6, 1):
        assert packed.table(scored, examples, limit, device).tolist() == [4, 1, 6, 2, 8, 3, 5]
    assert packed.table(scored, [], 100, device, (2,)).shape == (0, 2)


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_equal_from_pretrained(kind: str, tied: bool, tmp_path, device):
    save(tmp_path, kind, tie_word_embeddings=tied, shard="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    policy = models.load(str(tmp_path), device, options())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = dict(models.full_weights(policy.model))
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours[name], t) for name, t in theirs.state_dict().items())
    assert {p.dtype for p in policy.parameters()} == {torch.float32} == {policy.dtype_on_disk}
    assert len(list(policy.parameters())) == len(list(theirs.parameters()))  # tied stays tied
    buffers = dict(policy.model.named_buffers())
    assert all(torch.equal(buffers[name], t) for name, t in theirs.named_buffers())


def test_a_bfloat16_file_is_trained_in_float32_and_remembered(tmp_path, device):
    plain = save(tmp_path).bfloat16()
    plain.save_pretrained(tmp_path)
    policy = models.load(str(tmp_path), device, options())
    assert policy.dtype_on_disk == torch.bfloat16
    weights = dict(models.full_weights(policy.model))
    assert all(torch.equal(weights[n], t.float()) for n, t in plain.state_dict().items())


class Live(TorchDispatchMode):
    """The most bytes that tensors made within hold at one time, mapped files too; a storage counts once."""

    def __init__(self):
        super().__init__()
        self.storages, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return out


def most_bytes(folder: str) -> float:
    """Run on each rank: the most bytes for each number that loading a frozen bfloat16 model holds."""
    device, args = dist.init(1), options(dtype="bfloat16")
    # threads would not be counted
    with mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}), Live() as live:
        policy = models.load(folder, device, args, trainable=False)
    return live.most / sum(p.numel() for p in policy.parameters())


def test_a_model_is_never_whole_in_float32(tmp_path, two_ranks: Any):
    """A bfloat16 number takes 2 bytes in a mapped file and 2 in the model or in the file mapped again."""
    save(tmp_path, num_hidden_layers=6).bfloat16().save_pretrained(tmp_path)
    first, second = two_ranks("test_models:most_bytes", folder=str(tmp_path))
    assert 3.9 < most_bytes(str(tmp_path)) < 4.5 and first < 4.5 and second < 1.5


@pytest.mark.parametrize("kind", ["Llama", "Mixtral", "Gemma3Text"])
def test_numbers_that_are_wider_on_disk_than_most_keep_all_of_their_bits(kind: str, tmp_path, device):
    """A router or a norm in float32 among bfloat16, under its own name or one that transformers changes."""
    config = dict(FAMILIES)[kind]
    save(tmp_path, kind, **config, hidden_size=40)
    held = load_file(tmp_path / "model.safetensors")
    wide = [name for name in held if re.search(r"norm|gate\.weight|experts\.1\.w1", name)]
    held = {name: t if name in wide else t.bfloat16() for name, t in held.items()}
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    policy = models.load(str(tmp_path), device, options())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = dict(models.full_weights(policy.model)) | dict(policy.model.named_buffers())
    assert policy.dtype_on_disk == torch.bfloat16 and len(wide) > 3
    for name, tensor in {**theirs.state_dict(), **dict(theirs.named_buffers())}.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("kind", ["bin", "sharded bin", "sharded safetensors"])
def test_files_of_every_kind_are_read_in_their_own_dtype(kind: str, tmp_path):
    plain = save(tmp_path).half()
    (tmp_path / "model.safetensors").unlink()
    state = plain.state_dict()
    if kind == "sharded safetensors":
        plain.save_pretrained(tmp_path, max_shard_size="20KB")
    elif kind == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
        for file in set(places.values()):
            torch.save({name: t for name, t in state.items() if places[name] == file}, tmp_path / file)
        index = {"metadata": {}, "weight_map": places}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = models.read_pretrained(str(tmp_path))
    assert found.dtype_on_disk == torch.float16
    assert all(torch.equal(t, state[name]) for name, t in found.state_dict().items())
    assert {t.dtype for t in found.state_dict().values()} == {torch.float16}


@pytest.mark.parametrize("where", ["config.json", "the file"])
def test_a_head_of_its_own_outweighs_a_config_that_ties_it(where: str, tmp_path, device):
    """Which function is trained and exported is the one that transformers loads."""
    save(tmp_path, tie_word_embeddings=where == "the file")
    file, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    held = load_file(file)
    held.setdefault("lm_head.weight", held["model.embed_tokens.weight"].clone() + 1)
    save_file(held, file, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    policy = models.load(str(tmp_path), device, options())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = plain_stats(theirs, documents())[0]
    torch.testing.assert_close(models.token_logps(policy, pack(documents())), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(dict(models.full_weights(policy.model))["lm_head.weight"], held["lm_head.weight"])
    assert policy.config.tie_word_embeddings is False


def test_settings_of_generation_that_transformers_would_not_save_are_left_out(tmp_path, device, capsys):
    save(tmp_path)
    settings = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "early_stopping": True, "max_length": 9}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [1, 2]}))
    kept = models.load(str(tmp_path), device, options()).generation_config
    without = eval(re.search(r"without ({.*})", capsys.readouterr().out)[1])
    assert without == {"temperature": 0.9, "top_p": 0.6, "early_stopping": True}
    kept.save_pretrained(tmp_path)  # refuses what is not valid
    assert (kept.eos_token_id, kept.max_length, kept.temperature) == ([1, 2], 9, None)


TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": V, "max_position_embeddings": 64, "initializer_range": 0.3}
TEXT |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
EYES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
EYES |= {"image_size": 28, "patch_size": 14, "head_dim": 8}
QWEN_EYES = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
LAYERS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
M_ROPE = {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}
TOWERS = {
    "Gemma3": (TEXT | LAYERS, EYES, True, "gemma3_text"),
    "Gemma4": (TEXT | LAYERS | {"hidden_size_per_layer_input": 0}, EYES, True, "gemma4_text"),
    "Mistral3": (TEXT | {"model_type": "mistral"}, EYES | {"model_type": "pixtral"}, False, "mistral"),
    "Llava": (TEXT | {"model_type": "llama"}, EYES | {"model_type": "clip_vision_model"}, False, "llama"),
    "Qwen2_5_VL": (TEXT | M_ROPE, QWEN_EYES, False, "qwen2"),
    "Qwen3VL": (
        TEXT | M_ROPE | {"head_dim": 8},
        QWEN_EYES | {"deepstack_visual_indexes": [0]},
        True,
        "qwen3",
    ),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_of_a_multimodal_model_the_text_part_is_trained_and_exported(kind: str, tmp_path, device, capsys):
    """Without pictures it says what the whole one says, and so does what plain transformers loads after."""
    text, vision, tied, expected_kind = TOWERS[kind]
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    auto, folder = transformers.AutoModelForImageTextToText, tmp_path / "whole"
    auto.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    whole = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    expected = plain_stats(whole, documents())[0]
    policy = models.load(str(folder), device, options())
    said = capsys.readouterr().out
    assert (
        policy.config.model_type == expected_kind and "vision is left out" in said and said.count("\n") == 1
    )
    torch.testing.assert_close(models.token_logps(policy, pack(documents())), expected, atol=1e-5, rtol=1e-5)
    checkpoint.export(Run(output_dir=str(tmp_path)), policy, NoWords(), str(folder))
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    )
    torch.testing.assert_close(plain_stats(again, documents())[0], expected, atol=1e-5, rtol=1e-5)


def test_adapters_on_a_text_part_are_merged_into_a_text_model(tmp_path, device):
    text, vision, tied, _ = TOWERS["Qwen3VL"]
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "whole")
    policy = models.load(str(tmp_path / "whole"), device, options(lora_rank=4))
    move_adapters(policy)
    checkpoint.export(Run(output_dir=str(tmp_path)), policy, NoWords(), str(tmp_path / "whole"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs = plain_stats(merged, documents())[0]
    torch.testing.assert_close(models.token_logps(policy, pack(documents())), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "config"), [("Granite", {}), ("Cohere2", {"head_dim": 8}), ("Olmoe", {"num_experts": 8})]
)
def test_a_value_head_needs_no_class_of_transformers(kind: str, config: dict, tmp_path, device):
    """A critic is never exported; a reward model is, so that one is refused."""
    plain = save(tmp_path, kind, **config)
    scorer = models.load_scorer(str(tmp_path), device, options(), ["value"], zero_head=True)
    assert scorer.head.weight.count_nonzero() == 0
    torch.nn.init.normal_(scorer.head.weight)
    expected = []
    for example in documents():
        ids, mask = (torch.from_numpy(x) for x in example.sequences[0])
        hidden = plain.base_model(input_ids=ids.long()[None])[0][0, :-1]
        expected.append(hidden[mask[1:]] @ scorer.head.weight[0])
    found = models.values(scorer, pack(documents()))
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-5)
    with pytest.raises(dist.RunError, match="nobody could load a reward model of this kind"):
        models.load_scorer(str(tmp_path), device, options(), ["reward"])


class NoWords:
    """A tokenizer of which only the end token matters."""

    chat_template, eos_token_id = None, 1

    def save_pretrained(self, folder: Path) -> None:
        pass


def test_dropout_and_layer_drop_are_off_and_stay_in_the_config(tmp_path, device):
    examples = documents()
    for kind, config in (
        ("GPT2", {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("Llama", {"attention_dropout": 0.5}),
        ("OPT", {"dropout": 0.5, "layerdrop": 0.5, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    ):
        plain = save(tmp_path / kind, kind, **config)
        policy = models.load(str(tmp_path / kind), device, options())
        first, again = (models.token_logps(policy, pack(examples)) for _ in range(2))
        assert torch.equal(first, again)
        torch.testing.assert_close(first, plain_stats(plain, examples)[0], atol=1e-5, rtol=1e-5)
        assert all(getattr(policy.config, name) == value for name, value in config.items())


def test_a_frozen_model_has_no_gradients(folder: Path, device):
    ref_policy = models.load(str(folder), device, options(lora_rank=4), trainable=False)
    logps = models.token_logps(ref_policy, pack(documents()))
    assert not logps.requires_grad and not any(p.requires_grad for p in ref_policy.parameters())
    assert not any(".lora_" in name for name in ref_policy.state_dict())


def test_loading_leaves_the_random_numbers_alone(folder: Path, device):
    dist.init(seed=1)
    expected = torch.rand(3)
    dist.init(seed=1)
    models.load(str(folder), device, options(lora_rank=4))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_bfloat16_runs_on_cpu_with_float32_masters(lora_rank: int, folder: Path, device):
    row = pack(documents())
    exact = models.token_logps(models.load(str(folder), device, options()), row)
    args = options(dtype="bfloat16", lora_rank=lora_rank)
    policy, ref_policy = (models.load(str(folder), device, args, trainable=t) for t in (True, False))
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in ref_policy.parameters()} == {torch.bfloat16}  # no master to keep
    assert policy.compute_dtype == torch.bfloat16
    logps = models.token_logps(policy, row)
    assert logps.dtype == torch.float32 and 0 < (logps - exact).abs().mean() < 0.1
    with torch.no_grad():
        assert torch.equal(
            models.token_logps(ref_policy, row), logps
        )  # policy and reference are one function
    logps.sum().backward()
    assert all(g.dtype == torch.float32 for g in gradients(policy).values())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_the_dtype_argument(dtype: str):
    cpu, gpu = (models.resolve_dtype(dtype, torch.device(d)) for d in ("cpu", "cuda"))
    expected = {"auto": (torch.float32, torch.bfloat16)}
    assert (cpu, gpu) == expected.get(dtype, (getattr(torch, dtype, None),) * 2)


# ------------------------------------------------------------------------------------------- models that fail


def broken_models(folder: Path, good: Path) -> dict[str, str]:
    """Folders with one thing wrong each, and the words the one line must hold."""

    def variant(name: str, **config: Any) -> Path:
        shutil.copytree(good, folder / name)
        file = folder / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        return folder / name

    weights = (good / "model.safetensors").read_bytes()
    variant("no config").joinpath("config.json").unlink()
    variant("no weights").joinpath("model.safetensors").unlink()
    variant("broken weights").joinpath("model.safetensors").write_bytes(b"not a safetensors file")
    variant("half weights").joinpath("model.safetensors").write_bytes(weights[: len(weights) // 2])
    variant("broken config").joinpath("config.json").write_text("{")
    variant("a layer short", num_hidden_layers=3)
    variant("another width", intermediate_size=48)
    variant("unknown", model_type="no-such-type")
    variant("t5", model_type="t5")
    variant("quantized", quantization_config={"quant_method": "fp8"})
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "args.json").write_text("{}")
    (folder / "x.gguf").write_bytes(b"not a GGUF file")
    (folder / "adapter").mkdir()
    peft = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "no base")}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(peft))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    words = {
        "no such": "no such folder",
        "no config": "no config.json",
        "no weights": "no weights",
        "broken weights": "cannot load",
        "half weights": "cannot load",
        "broken config": "cannot load",
        "a layer short": "9 weights are missing",
        "another width": "6 weights are missing or not as config.json",
        "unknown": "no-such-type",
        "t5": "Unrecognized configuration",
        "quantized": "weights are quantized",
        "unfinished": "has not finished",
        "no.gguf": "no such file",
        "x.gguf": "cannot load",
        "adapter": "no base",
    }
    return {str(folder / name): said for name, said in words.items()} | {"nobody/nothing": "nobody/nothing"}


def load_errors(folders: list[str]) -> list[str]:
    """Run on each rank: what loading each of the folders says."""
    said = []
    for folder in folders:
        try:
            models.load(folder, dist.init(1), options())
            said.append("loaded")
        except dist.RunError as error:
            said.append(str(error))
    return said


def test_a_model_that_cannot_be_loaded_is_one_line_on_every_rank(folder: Path, tmp_path, two_ranks: Any):
    cases = broken_models(tmp_path, folder)
    first, second = two_ranks("test_models:load_errors", folders=list(cases))
    assert first == second
    for said, words in zip(first, cases.values(), strict=True):
        assert words in said and "\n" not in said and len(said) < 400, said


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_proj,lm_head", "no_such_module"])
def test_adapters_where_they_would_be_lost_are_refused(target: str, folder: Path, device):
    with pytest.raises(dist.RunError, match="lora_target"):
        models.load(str(folder), device, options(lora_rank=2, lora_target=target))


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_frequencies_that_change_with_length_do_not_change_with_the_packing(rope_type: str, tmp_path, device):
    """Up to the limit each sequence is what it is alone; one that is longer would move the others."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    plain = save(
        tmp_path,
        rope_parameters=rope | (factors if rope_type == "longrope" else {}),
        max_position_embeddings=64 if rope_type == "longrope" else 16,
    )
    policy, examples = models.load(str(tmp_path), device, options()), documents((16, 5, 16, 9))
    assert packed.position_limit(policy.config) == 16
    for ours, theirs in zip(policy(pack(examples))[:3], plain_stats(plain, examples), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        logps = policy(pack(examples)).logps
        moved = policy(pack([*examples, *documents((60,))])).logps[: len(logps)]
    assert (moved - logps).abs().max() > 1e-3


# the others have one limit, or none
@pytest.mark.parametrize(("config", "limit"), [(configure("GPT2"), 64), (types.SimpleNamespace(), math.inf)])
def test_the_limit_of_positions(config: Any, limit: float):
    assert packed.position_limit(config) == limit


# ----------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize(
    ("kind", "config"),
    [("Llama", {}), ("GPT2", {}), ("Cohere", {"logit_scale": 0.25}), ("Gemma3Text", {"head_dim": 8, **CAP})],
)
def test_logits_of_scored_tokens_are_those_of_transformers(kind: str, config: dict, tmp_path, device):
    plain = save(tmp_path, kind, **config)
    policy, examples = models.load(str(tmp_path), device, options()), documents()
    theirs = []
    for example in examples:
        ids, mask = (torch.from_numpy(x) for x in example.sequences[0])
        theirs.append(plain(input_ids=ids.long()[None]).logits[0, :-1][mask[1:]])
    ours, theirs = policy.logits(pack(examples)), torch.cat(theirs)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(ours)
    plain.zero_grad()
    (ours * upstream).sum().backward(), (theirs * upstream).sum().backward()
    assert furthest(gradients(policy), gradients(plain)) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_copy_can_train_on_the_full_kl_to_a_reference(dtype: str, lora_rank: int, tmp_path, device):
    """KL(pi_ref || pi), all words of every scored token, in four lines: distillation brings it to nothing."""
    save(tmp_path / "student"), save(tmp_path / "teacher", seed=1)
    system = options(dtype=dtype, lora_rank=lora_rank)
    policy = models.load(str(tmp_path / "student"), device, system)
    teacher = models.load(str(tmp_path / "teacher"), device, options(dtype=dtype), trainable=False)
    optimizer, batch, found = torch.optim.AdamW(policy.parameters(), lr=0.01), pack(documents()), []
    for _ in range(30):
        with torch.no_grad():
            ref_logp = teacher.logits(batch).log_softmax(-1)
        loss = (ref_logp.exp() * (ref_logp - policy.logits(batch).log_softmax(-1))).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert 0 < found[-1] < 0.5 * found[0]


def test_a_policy_is_no_transformers_model(folder: Path, device):
    """It does not pass for one: what it cannot do is no method of it."""
    policy = models.load(str(folder), device, options())
    assert isinstance(policy, models.Policy) and not isinstance(policy, transformers.PreTrainedModel)
    assert not hasattr(policy, "generate")
    with pytest.raises(TypeError, match="input_ids"):
        policy(input_ids=torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.slow
def test_the_compiled_head_is_the_head():
    """Its formulas, of which a GPU's compiler makes fewer passes: values and gradients in float64."""
    torch.manual_seed(0)
    h, w = torch.randn(13, 8, dtype=torch.float64), torch.randn(29, 8, dtype=torch.float64)
    h, w, y = h.requires_grad_(), w.requires_grad_(), torch.randint(29, (13,))
    losses = {
        "both": lambda stats: stats[0].square().sum() + stats[1].square().sum(),
        "logps": lambda stats: stats[0].square().sum(),
        "entropy": lambda stats: stats[1].square().sum(),
        "equal weights": lambda stats: stats[0].sum(),
    }
    for name, loss in losses.items():
        results = []
        for compiled in (False, True):
            stats = lm_head._TokenStats.apply(h, w, None, y, 0.7, 5, compiled, None, name == "equal weights")
            results.append([*stats, *torch.autograd.grad(loss(stats), (h, w))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


# ------------------------------------------------------------------------------------------------------- LoRA


def move_adapters(policy: nn.Module) -> None:
    """Random numbers in place of B = 0, alike on every rank."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                if hasattr(parameter, "device_mesh"):
                    noise = torch.distributed.tensor.distribute_tensor(
                        noise, parameter.device_mesh, parameter.placements, src_data_rank=None
                    )
                parameter.add_(noise, alpha=0.3)


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Mixtral", "Dots1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_adapters_off_a_policy_is_its_base_exactly(kind: str, dtype: str, tmp_path, device):
    """E16"""
    save(tmp_path, kind)
    row, args = pack(documents()), options(dtype=dtype)
    base = models.load(str(tmp_path), device, args, trainable=False)
    policy = models.load(str(tmp_path), device, options(dtype=dtype, lora_rank=4))
    assert {n.split(".")[-3] for n, p in policy.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    expected = models.token_logps(base, row)
    assert torch.equal(models.token_logps(policy, row), expected)  # B = 0
    move_adapters(policy)
    assert (models.token_logps(policy, row) - expected).abs().max() > 0.1
    with lora.adapters_off(policy):
        assert torch.equal(models.token_logps(policy, row), expected)
    assert (models.token_logps(policy, row) - expected).abs().max() > 0.1
    models.token_logps(policy, row).sum().backward()
    grads = gradients(policy)
    assert grads and all(".lora_" in name and g.abs().max() > 0 for name, g in grads.items())


def test_adapters_are_drawn_alike_whatever_the_dtype_on_disk(tmp_path, device):
    plain = save(tmp_path / "float32")
    plain.bfloat16().save_pretrained(tmp_path / "bfloat16")
    drawn = []
    for name in ("float32", "bfloat16"):
        dist.init(1)
        policy = models.load(str(tmp_path / name), device, options(lora_rank=4))
        drawn.append({name: p for name, p in policy.named_parameters() if ".lora_A." in name})
    assert drawn[0] and all(torch.equal(p, drawn[1][name]) for name, p in drawn[0].items())


def merged(folder: str, out: str) -> list[dict[str, Any]]:
    """Run on each rank: export an adapted policy; how far our merged weights are from those peft makes."""
    from peft import PeftModel

    args = options(lora_rank=4, lora_alpha=6.0)
    policy = models.load(folder, dist.init(1), args)
    move_adapters(policy)
    tokenizer = data.load_tokenizer("toy")
    checkpoint.export(Run(output_dir=out), policy, tokenizer, folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    plain, weights = models.read_pretrained(folder), dict(models.full_weights(policy.model))
    adapters = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    lora.merge(plain, policy.lora_config, adapters, torch.float32)
    ours = plain.state_dict()
    alone = load_file(f"{out}/model/adapter_model.safetensors")
    theirs = PeftModel.from_pretrained(base, f"{out}/model").merge_and_unload().state_dict()
    again = models.read_pretrained(f"{out}/model").state_dict()
    return {
        "only adapters": all(".lora_" in name for name in alone) and len(alone) > 0,
        "error": furthest(ours, theirs),
        "read again": furthest(again, theirs),
        "moved": furthest(before, theirs),
    }


@pytest.mark.parametrize(
    ("kind", "ranks"), [("Llama", 1), ("GPT2", 1), ("Mixtral", 1), ("Llama", 2), ("Dots1", 2)]
)
def test_merged_weights_are_those_peft_makes(kind: str, ranks: int, tmp_path, two_ranks: Any):
    save(tmp_path / "base", kind)
    settings = {"folder": str(tmp_path / "base"), "out": str(tmp_path)}
    for result in two_ranks("test_models:merged", **settings) if ranks == 2 else [merged(**settings)]:
        assert result["only adapters"] and result["moved"] > 0.1
        assert result["error"] < 1e-6 and result["read again"] < 1e-6


# --------------------------------------------------------------------------------------------------- sharding


def plain_gradients(folder: str, examples: list[packed.Example]) -> tuple[dict[str, Tensor], float]:
    """Of the summed negative log-likelihood in plain transformers, clipped to 0.5, and their norm before."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (-plain_stats(plain, examples)[0].sum()).backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    return gradients(plain), norm.item()


def sharded(folder: str, **changes: Any) -> dict[str, Any]:
    """Run on each rank: our gradients against the plain model's; only rank 0 may read weights."""
    device, examples = dist.init(1), documents((5, 17, 2, 30, 9))
    expected, norm = plain_gradients(folder, examples)
    read, reads = transformers.AutoModelForCausalLM.from_pretrained, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        reads.append(args)
        return read(*args, **kwargs)

    transformers.AutoModelForCausalLM.from_pretrained = counting
    try:
        policy = models.load(folder, device, options(**changes))
    finally:
        transformers.AutoModelForCausalLM.from_pretrained = read
    rows = list(packed.micro_batches(examples, 30, device))
    all_reduce, reduced = torch.distributed.all_reduce, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        reduced.append(args)
        return all_reduce(*args, **kwargs)

    torch.distributed.all_reduce = counted
    try:
        for row in rows:
            (-models.token_logps(policy, row).sum()).backward()
    finally:
        torch.distributed.all_reduce = all_reduce
    ours = models.clip_grad_norm(policy, 0.5)
    return {
        "reads": len(reads),
        "rows": len(rows),
        "all_reduces": len(reduced),
        "parts": len(models.blocks(policy)) + 3,
        "error": furthest(gradients(policy), expected),
        "norms": [ours.item(), norm],
        "share": sum(getattr(p, "_local_tensor", p).numel() for p in policy.parameters())
        / sum(p.numel() for p in policy.parameters()),
        "mesh": list(mesh.shape)
        if (mesh := getattr(policy.model.lm_head.weight, "device_mesh", None))
        else None,
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("sharding", "mesh"), [("full", [2]), ("hybrid", [2]), ("none", None)])
def test_two_ranks_have_the_gradients_of_the_plain_model(
    sharding: str, mesh: list[int] | None, tied: bool, tmp_path, two_ranks: Any
):
    save(tmp_path, tie_word_embeddings=tied)
    first, second = two_ranks("test_models:sharded", folder=str(tmp_path), sharding=sharding)
    assert (first["reads"], second["reads"]) == (1, 0)
    for result in (first, second):
        assert result["error"] < 1e-5 and result["rows"] > 1
        assert result["norms"][1] > 0.5 and result["norms"][0] == pytest.approx(result["norms"][1], rel=1e-5)
        assert result["mesh"] == mesh
        assert result["share"] == 1.0 if sharding == "none" else 0.4 < result["share"] < 0.6


def test_copies_in_low_precision_are_left_to_fsdp(tmp_path, two_ranks: Any):
    save(tmp_path)
    for result in two_ranks("test_models:sharded", folder=str(tmp_path), sharding="none", dtype="bfloat16"):
        assert result["mesh"] == [2, 1] and result["share"] == 1.0
        assert result["all_reduces"] == result["parts"] and result["rows"] > 1  # once a step
        assert result["error"] < 0.25  # of the largest entry: bfloat16 on a model of random weights
        assert result["norms"][0] == pytest.approx(result["norms"][1], rel=0.03)


@pytest.mark.parametrize("keep", [True, False])
def test_rows_of_a_step_in_low_precision_cost_fsdp_once(keep: bool, folder: Path, device, monkeypatch):
    """Weights are cast for the first row and given back after the last, when gradients become FSDP's."""
    from torch.distributed.tensor import DTensor

    monkeypatch.setattr(models, "memory_choices", lambda *_: (False, keep))
    policy = models.load(str(folder), device, options(dtype="bfloat16"))
    rows = list(packed.micro_batches(documents((5, 17, 2, 30, 9)), 30, device))
    weight = functools.partial(models.blocks(policy)[0].get_parameter, "mlp.up_proj.weight")
    for _ in range(2):
        policy.zero_grad()
        for row in rows:
            (-models.token_logps(policy, row).sum()).backward()
            assert isinstance(weight(), DTensor) == (row.is_last or not keep)
            assert all(
                (p.grad is not None) == row.is_last for p in policy.parameters() if isinstance(p, DTensor)
            )
    assert len(rows) > 2
    ours = gradients(policy)
    policy.zero_grad()
    for row in rows:  # as if each were a step of its own: reduced, and the weights cast, row by row
        row.is_last = True
        (-models.token_logps(policy, row).sum()).backward()
    assert furthest(ours, gradients(policy)) == 0


def test_hybrid_shards_inside_a_node(device, monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(
        models, "init_device_mesh", lambda kind, shape, mesh_dim_names: made.append((shape, mesh_dim_names))
    )
    monkeypatch.setattr(dist, "world_size", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for sharding in ("full", "hybrid", "none"):
        models.mesh(device, sharding)
    both = ("replicate", "shard")
    assert made == [((16,), ("shard",)), ((2, 8), both), ((16, 1), both)]


def test_one_rank_has_the_gradients_of_the_plain_model(folder: Path):
    result = sharded(str(folder))
    assert result["reads"] == 1 and result["error"] < 1e-5
    assert result["norms"][0] == pytest.approx(result["norms"][1], rel=1e-5)
    assert result["mesh"] is None  # alone and in float32, nothing is sharded, gathered or copied


def test_one_process_keeps_float32_master_weights_in_low_precision(folder: Path, device):
    policy = models.load(str(folder), device, options(dtype="bfloat16"))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert all(hasattr(p, "device_mesh") for p in policy.parameters())  # FSDP casts them for compute


def test_recomputing_activations_changes_nothing_but_the_work(folder: Path, device):
    results = []
    for choice in ("off", "on", "auto"):
        policy = models.load(str(folder), device, options(activation_checkpointing=choice))
        calls = []
        models.blocks(policy)[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        logps = models.token_logps(policy, pack(documents()))
        (-logps.sum()).backward()
        results.append((len(calls), logps.detach(), gradients(policy)))
    (once, logps, grads), (twice, others, other_grads), (auto, *_) = results
    assert (once, twice, auto) == (1, 2, 1)  # auto: this one is small
    assert torch.equal(logps, others) and furthest(grads, other_grads) < 1e-6


@pytest.mark.slow
def test_compiled_blocks_say_the_same(folder: Path, device):
    results = []
    for compiled in (False, True):
        policy = models.load(str(folder), device, options(compile=compiled))
        logps = models.token_logps(policy, pack(documents()))
        (-logps.sum()).backward()
        results.append((logps.detach(), gradients(policy)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    assert furthest(results[1][1], results[0][1]) < 1e-5


# ----------------------------------------------------------------------------------------------- optimization


def test_matrices_decay_and_vectors_do_not(tmp_path, device):
    save(tmp_path, "GPT2")
    policy = models.load(str(tmp_path), device, options())
    decayed, rest = models.parameter_groups(policy, 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in rest["params"]} == {1}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(policy.parameters()))
    policy.requires_grad_(False)
    assert [g["params"] for g in models.parameter_groups(policy, 0.1)] == [[], []]


def test_a_max_grad_norm_of_0_never_clips(folder: Path, device):
    policy = models.load(str(folder), device, options())
    (-1e3 * models.token_logps(policy, pack(documents())).sum()).backward()
    before = {name: g.clone() for name, g in gradients(policy).items()}
    norm = models.clip_grad_norm(policy, 0.0)
    assert norm.item() > 1e3 and furthest(gradients(policy), before) == 0
    models.clip_grad_norm(policy, 1.0)
    norm = sum(g.double().pow(2).sum() for g in gradients(policy).values()).sqrt()
    assert norm.item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 9, 10, 50])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_floor(schedule: str, warmup: int):
    args = Optimization(warmup_steps=warmup, lr_schedule=schedule, min_lr_ratio=0.1)
    factors = [models.lr_factor(step, 10, args) for step in range(1, 11)]
    rise, fall = factors[: warmup + 1], factors[warmup:]
    assert all(0 < f <= 1 for f in factors) and factors[0] == 1 / (warmup + 1)
    assert rise == sorted(rise) and fall == sorted(fall, reverse=True)
    if warmup < 10:
        assert factors[warmup] == 1.0
    if schedule == "constant":
        assert set(fall) <= {1.0}
    elif warmup < 9:
        assert factors[-1] == pytest.approx(0.1)


def test_the_learning_rate_half_way_by_hand():
    args = Optimization(warmup_steps=0, lr_schedule="linear", min_lr_ratio=0.2)
    assert models.lr_factor(6, 11, args) == pytest.approx(0.6)
    args.lr_schedule = "cosine"
    assert models.lr_factor(6, 11, args) == pytest.approx(0.6)
    assert models.lr_factor(3, 9, args) == pytest.approx(
        0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2
    )  # a quarter of the way


def test_training_flops_by_hand(tmp_path, device):
    """Two layers of q, o (32 x 32), k, v (32 x 16) and three 32 x 64, five norms of 32, a head of 60 x 32."""
    layer, norms, table = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64, 5 * 32, 60 * 32
    for tied in (True, False):
        save(tmp_path, tie_word_embeddings=tied)
        policy = models.load(str(tmp_path), device, options())
        expected = 6 * (2 * layer + norms + table) * (3 + 5) + 6 * 2 * 4 * 8 * (9 + 25)
        assert plan.training_flops(policy, [3, 5]) == expected
    adapted = models.load(str(tmp_path), device, options(lora_rank=2, lora_target="q_proj"))
    expected = (4 * (2 * layer + norms + table) + 6 * 2 * 2 * (32 + 32)) * 8 + 6 * 2 * 4 * 8 * (9 + 25)
    assert plan.training_flops(adapted, [3, 5]) == expected


def test_speed_counts_every_token(folder: Path, device):
    policy = models.load(str(folder), device, options())
    metrics = models.speed(policy, documents((5, 17)), seconds=2.0)
    assert metrics["train/tokens_per_second"] == 11.0


def test_a_model_that_is_not_there_or_is_no_reward_model_is_told_as_it_was_asked_for(
    tiny_model: str, device: torch.device
) -> None:
    from common import rewards

    with pytest.raises(dist.RunError, match=r"^reward nowhere: no such folder; as a hub id it could not"):
        rewards.load("nowhere", device, System())
    with pytest.raises(dist.RunError, match=r"^judge nowhere: no such folder"):
        rewards.load("nowhere", device, System(), "judge")
    with pytest.raises(dist.RunError, match=r"^toy is no reward model; expected"):
        rewards.load("toy", device, System())
