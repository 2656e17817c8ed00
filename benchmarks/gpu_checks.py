"""Is it right on this GPU? Each check computes a thing twice, ours and a reference, and says how far apart.

`python benchmarks/gpu.py day` runs all of them before it measures any speed. On a CPU they check the same
functions in the forms a CPU has. A check answers {"ok": ..., figures}; a figure's limit stands beside it.
"""

import itertools
import math
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import ROOT, NoText, documents, llama, random_policy, sft_step
from torch import Tensor, nn

from common import decode, dist, generate, models, packed
from common.lm_head import ChunkedHead

SMALL = {"vocab_size": 2048, "hidden": 256, "layers": 4, "heads": 8, "kv_heads": 2}


def relative(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference|; NaN never passes a comparison."""
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def check_attention(tokens: int = 4096) -> dict[str, Any]:
    """The packed kernel in bfloat16 against float32 attention document by document: out, dq, dk, dv.

    The last document goes on from the one before it, and so does the fourth: prefixes that others share.
    """
    device = dist.init(1)
    packed.find_kernel(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lengths = [1, 2, 127, 128, 129, 500]
    lengths.append(tokens - sum(lengths))
    starts = packed.bounds(lengths)
    looks = [torch.arange(a, b, device=device) for a, b in itertools.pairwise(starts)]
    looks = [torch.cat([looks[i - 1], own]) if i in (3, 6) else own for i, own in enumerate(looks)]
    cu, cu_k = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, packed.bounds(map(len, looks)))
    )
    worst: dict[str, float] = {}
    shapes = [
        (8, 2, 64, 64, None),
        (8, 8, 128, 128, None),
        (4, 4, 96, 96, 100),
        (4, 2, 40, 24, None),
        (4, 4, 24, 40, 7),
    ]
    for heads, key_heads, width, value_width, window in shapes:
        torch.manual_seed(0)
        low = [
            torch.randn(1, h, tokens, w, device=device, dtype=dtype, requires_grad=True)
            for h, w in ((heads, width), (key_heads, width), (key_heads, value_width))
        ]
        upstream = torch.randn(1, tokens, heads, value_width, device=device, dtype=dtype)
        settings = {"sliding_window": window, "cu_seq_lens_q": cu, "max_length_q": max(lengths)}
        settings |= {"cu_seq_lens_k": cu_k, "max_length_k": max(map(len, looks))}
        settings |= {"kv_indices": torch.cat(looks)}
        out, _ = packed.packed_attention(nn.Identity(), *low, None, **settings)
        ours = [out, *torch.autograd.grad(out, low, upstream)]
        high = [x.detach().float().requires_grad_() for x in low]
        exact = by_document(*high, lengths, looks, window)
        theirs = [exact, *torch.autograd.grad(exact, high, upstream.float())]
        name = f"heads {heads}/{key_heads}, width {width}/{value_width}, window {window}"
        worst[name] = max(relative(a, b) for a, b in zip(ours, theirs, strict=True))
    return {"ok": max(worst.values()) < 0.01, "relative_gap": worst, "limit": 0.01}


def by_document(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], looks: list[Tensor], window: int | None
) -> Tensor:
    """Softmax attention of each document alone, at the keys it looks at. (1, H, N, K) -> (1, N, H, K)"""
    outs, groups = [], q.shape[1] // k.shape[1]
    for q, seen_keys in zip(q.split(lengths, 2), looks, strict=True):  # noqa: B020
        keys, values = (x[:, :, seen_keys].repeat_interleave(groups, 1) for x in (k, v))
        t = torch.arange(len(seen_keys), device=q.device)
        back = t[len(t) - q.shape[2] :, None] - t
        seen = (back >= 0) & (back < (window or len(t)))
        scores = (q @ keys.transpose(2, 3)) * q.shape[-1] ** -0.5
        outs.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ values)
    return torch.cat(outs, 2).transpose(1, 2)


def check_head(
    tokens: int = 3000,
    width: int = 512,
    vocab_size: int = 32_000,
    compiled: bool = False,
    equal_weights: bool = False,
) -> dict[str, Any]:
    """The chunked head on bfloat16 operands against float64 of the same numbers.

    Its log-probs are those of float32 sums: rounded to bfloat16, logits are .02 nats off. With equal_weights
    the gradient is that of a sum of log-probs, which the forward pass makes.
    """
    device = dist.init(1)
    torch.manual_seed(0)
    dtype = torch.bfloat16
    h = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    head = nn.Linear(width, vocab_size, bias=True, device=device, dtype=dtype)
    nn.init.normal_(head.weight, std=0.2)
    y = torch.randint(vocab_size, (tokens,), device=device)
    g = torch.randn(2, tokens, device=device)
    g = torch.tensor([-0.3, 0.0], device=device)[:, None].expand_as(g) if equal_weights else g
    chunked = ChunkedHead.like(head)
    chunked.compiled = compiled
    stats = chunked(h, y, equal_weights=equal_weights)
    loss = (g[0] * stats.logps).sum() + (0 if equal_weights else (g[1] * stats.entropy).sum())
    ours = torch.autograd.grad(loss, (h, head.weight, head.bias))
    h64, w64, b64 = (x.detach().double().requires_grad_() for x in (h, head.weight, head.bias))
    logp = (h64 @ w64.T + b64).log_softmax(-1)
    exact, entropy = logp.gather(1, y[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    loss = (g[0] * exact + g[1] * entropy).sum()
    gaps = [relative(a, b) for a, b in zip(ours, torch.autograd.grad(loss, (h64, w64, b64)), strict=True)]
    rounded = F.linear(h, head.weight, head.bias).float().log_softmax(-1).gather(1, y[:, None])[:, 0]
    found = {
        "logp_gap": (stats.logps - exact).abs().max().item(),
        "entropy_gap": (stats.entropy - entropy).abs().max().item(),
        "logp_gap_of_rounded_logits": (rounded - exact).abs().max().item(),
        "relative_gaps_dh_dw_db": gaps,
        "limits": [1e-3, 1e-3, 0.01],
    }
    ok = found["logp_gap"] < 1e-3 and found["entropy_gap"] < 1e-3 and max(gaps) < 0.01
    return {"ok": ok, **found}


def steps(policy: Any, device: torch.device, count: int, lr: float = 1e-3) -> list[float]:
    """Losses of SFT steps on the same documents for everybody."""
    optimizer = torch.optim.AdamW(models.parameter_groups(policy, 0.0), lr=lr, betas=(0.9, 0.95))
    pool = documents(8 * count, SMALL["vocab_size"], max_length=512, whole=True)
    return [sft_step(policy, optimizer, pool[8 * i : 8 * i + 8], 2048, device) for i in range(count)]


def check_float32(count: int = 6) -> dict[str, Any]:
    """--dtype float32 is float32: products keep 23 bits (TF32 keeps 10), and losses are those of a CPU."""
    device = dist.init(1)
    torch.manual_seed(0)
    a, b = (torch.randn(512, 512, device=device) for _ in range(2))
    product = relative(a @ b, a.double() @ b.double())
    image, kernel = torch.randn(2, 8, 32, 32, device=device), torch.randn(8, 8, 3, 3, device=device)
    convolution = relative(F.conv2d(image, kernel), F.conv2d(image.double(), kernel.double()))
    config = llama(**SMALL)
    cpu = torch.device("cpu")
    ours = steps(random_policy(config, device, init_device=cpu, dtype="float32"), device, count)
    theirs = steps(random_policy(config, cpu, init_device=cpu, dtype="float32"), cpu, count)
    gap = max(abs(x - y) for x, y in zip(ours, theirs, strict=True))
    ok = product < 1e-5 and convolution < 1e-5 and gap < 1e-4
    return {"ok": ok, "product": product, "convolution": convolution, "loss_gap_to_cpu": gap, "losses": ours}


def check_bfloat16(count: int = 20) -> dict[str, Any]:
    """SFT in bfloat16 compute on float32 masters follows float32: difference of each step's loss."""
    device = dist.init(1)
    config = llama(**SMALL)
    low, high = (
        steps(random_policy(config, device, dtype=x), device, count) for x in ("bfloat16", "float32")
    )
    gap = max(abs(a - b) for a, b in zip(low, high, strict=True))
    return {
        "ok": gap < 0.02,
        "loss_gap": gap,
        "limit": 0.02,
        "ends": [low[-1], high[-1]],
    }


def check_score_head() -> dict[str, Any]:
    """The score head of a bfloat16 reward model works in float32: outputs against float64 of its inputs."""
    device = dist.init(1)
    torch.manual_seed(0)
    score = nn.Linear(2048, 1, bias=False, device=device)
    hidden = torch.randn(4096, 2048, device=device, dtype=torch.bfloat16)
    gap = relative(score(hidden.float()), F.linear(hidden.double(), score.weight.double()))
    return {"ok": gap < 1e-5, "relative_gap": gap, "limit": 1e-5}


def replies(policy: Any, new: int, temperature: float = 1.0) -> list[generate.Sample]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 500, n).tolist() for n in rng.integers(4, 90, 48)]
    return generate.generate(
        policy, NoText(), prompts, max_new_tokens=new, temperature=temperature, max_batch=32
    )


def check_decode(new: int = 64) -> dict[str, Any]:
    """A step replayed as a CUDA graph of this call or the last is the eager one, as rows come and go."""
    device = dist.init(1)
    found: dict[str, Any] = {"graphs": device.type == "cuda"}
    for dtype in ("float32", "bfloat16"):
        policy = random_policy(llama(**SMALL), device, trainable=False, dtype=dtype)
        policy.room = math.inf  # so that the graphs of the first call serve the second
        first, ours = (replies(policy, new) for _ in range(2))
        with eager_decode():
            theirs = replies(policy, new)
        same = [
            a.tokens == b.tokens
            for pair in ((first, theirs), (ours, theirs))
            for a, b in zip(*pair, strict=True)
        ]
        gaps = [
            abs(x - y)
            for a, b in zip(ours, theirs, strict=True)
            if a.tokens == b.tokens
            for x, y in zip(a.logps, b.logps, strict=True)
        ]
        found[dtype] = {"same_replies": sum(same) / len(same), "logp_gap": max(gaps, default=math.nan)}
    return {"ok": all(found[d]["same_replies"] == 1 for d in ("float32", "bfloat16")), **found}


@contextmanager
def eager_decode() -> Iterator[None]:
    """Within the block decode steps are run kernel by kernel, not replayed."""
    step = decode.Batch.step
    decode.Batch.step = decode.Batch.forward
    try:
        yield
    finally:
        decode.Batch.step = step


def check_sampler(new: int = 64, lora_rank: int = 0) -> dict[str, Any]:
    """log p of the sampler against the training forward, in bfloat16: PPO's ratio at its first step.

    With LoRA also after ten steps at 1e-4, which must not take them further apart.
    """
    device = dist.init(1)
    policy = random_policy(llama(**SMALL), device, lora_rank=lora_rank, dtype="bfloat16")
    found = {"before": sampler_gap(policy, new, device)}
    if lora_rank:
        steps(policy, device, 10, lr=1e-4)
        found["after"] = sampler_gap(policy, new, device)
    means = [gap["mean"] for gap in found.values()]
    return {"ok": means[0] < 0.01 and means[-1] < 1.2 * means[0], **found, "limit": 0.01}


def sampler_gap(policy: Any, new: int, device: torch.device) -> dict[str, float]:
    samples = replies(policy, new)
    ours = torch.tensor([x for sample in samples for x in sample.logps], device=device)
    gap = (policy_logps(policy, samples, device) - ours).abs()
    return {"mean": gap.mean().item(), "max": gap.max().item()}


@torch.no_grad()
def policy_logps(policy: Any, samples: list[generate.Sample], device: torch.device) -> Tensor:
    """The training forward's log p of every sampled token, samples in order."""
    examples = [generate.to_example(sample) for sample in samples]
    parts: list[Any] = [None] * len(samples)
    for row in packed.micro_batches(examples, 4096, device):
        split = models.token_logps(policy, row).split(
            [len(samples[i].tokens) for i in row.example_ids.tolist()]
        )
        for i, logps in zip(row.example_ids.tolist(), split, strict=True):
            parts[i] = logps
    return torch.cat(parts)


def check_compile(count: int = 4) -> dict[str, Any]:
    """Compiled blocks against eager ones, with and without recomputation, and how many graphs there are.

    The head's formulas would be graphs too: `check_head` compiles those.
    """
    device = dist.init(1)
    if device.type != "cuda":
        return {"ok": True, "skipped": "attention on a CPU asks the host for lengths, which breaks the graph"}
    counters = torch._dynamo.utils.counters
    eager = steps(random_policy(llama(**SMALL), device), device, count)
    found: dict[str, Any] = {}
    for recompute in ("off", "on"):
        torch._dynamo.reset()
        counters.clear()
        policy = random_policy(llama(**SMALL), device, compile=True, activation_checkpointing=recompute)
        policy.head.compiled = False
        losses = steps(policy, device, count)
        gap = max(abs(a - b) for a, b in zip(losses, eager, strict=True))
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        found[f"recompute_{recompute}"] = {"loss_gap": gap, "graphs": graphs, "breaks": breaks}
    ok = all(x["loss_gap"] < 0.02 and x["graphs"] <= 2 and x["breaks"] == 0 for x in found.values())
    return {"ok": ok, **found}


def check_tests(select: str = "gpu", files: str = "tests") -> dict[str, Any]:
    """pytest with the marker gpu, or (not gpu) default tests of the core on this machine."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        *files.split(),
        "-o",
        "addopts=",  # one after the other: they share the card
        "-m",
        select,
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    tail = [line for line in done.stdout.splitlines() if line.strip()][-6:]
    return {"ok": done.returncode == 0, "output": tail, "error": done.stderr[-500:]}


CHECKS: dict[str, Callable[..., dict]] = {
    name: check
    for name, check in globals().items()
    if name.startswith("check_") and isinstance(check, types.FunctionType)
}
