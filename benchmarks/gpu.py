"""What one GPU could do, whether our code is right on it, and what it gets out of it, cell by cell.

    python benchmarks/gpu.py day --minutes 8         all that fits, right before fast, in order of worth
    python benchmarks/gpu.py day --minutes 4 --only checks,sft/0    groups or cells of it only
    python benchmarks/gpu.py sft --cell 0            one cell of a group
    python benchmarks/gpu.py day --small             everything on a CPU, tiny

Groups: ceilings; checks (gpu_checks.py); attention, packed; sft, 3B; sft_8b; peer, DPO in TRL (vs_trl.py);
head, memory over vocabularies; decode, graph against eager; ppo, shares of its stages.

Nothing is downloaded. Models have random weights and the shapes of Llama 3.1 and 3.2; documents have the
lengths of HH-RLHF and random tokens. Each cell runs in a process of its own, under a time limit of its own,
and prints one line as soon as it is known, with the best ceiling known beside it; without --small a JSON line
is also appended to benchmarks/results/gpu.jsonl. MFU counts the FLOPs of plan.training_flops (causal
attention, recomputation not counted) over 989 TFLOP/s; `of_gemm` and `of_copy` are shares of what a bfloat16
product and a copy reached in the same process. DRaFT+ is draftp_memory.py.
"""

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gpu_checks import CHECKS, eager_decode
from harness import (
    ROOT,
    NoText,
    Worker,
    did_job,
    documents,
    in_process,
    llama,
    machine,
    peak_mib,
    random_policy,
    record,
    sft_step,
    write_tokenizer,
)
from torch import Tensor, nn

from common import dist, generate, models, packed, plan
from common.lm_head import ChunkedHead, TokenStats

SHAPES = {
    "tiny": {"vocab_size": 512, "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2},
    "1B": {"vocab_size": 128_256, "hidden": 2048, "layers": 16, "heads": 32, "kv_heads": 8}
    | {"intermediate_size": 8192, "tie_word_embeddings": True},
    "3B": {"vocab_size": 128_256, "hidden": 3072, "layers": 28, "heads": 24, "kv_heads": 8}
    | {"intermediate_size": 8192, "tie_word_embeddings": True},
    "8B": {"vocab_size": 128_256, "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8}
    | {"intermediate_size": 14_336},
}
PEAK_FLOPS = 989e12  # dense bfloat16 of an H100 or H200 SXM


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Of one call, a mean after one call that warms up."""
    work()
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    sync()
    return (time.perf_counter() - start) / repeats


# --------------------------------------------------------------------------------------------------- ceilings


def ceilings(device: torch.device) -> dict[str, float]:
    """FLOP/s of a bfloat16 product and bytes/s of a copy, of random data: zeros are faster.

    The product goes on for a second and more: until the card has used up its watts it is a fifth faster.
    """
    gpu = device.type == "cuda"
    size, count, repeats = (8192, 2**30, 1000) if gpu else (256, 2**20, 20)
    dtype = torch.bfloat16 if gpu else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(count, device=device, dtype=dtype)
    target = torch.empty_like(source)
    found = {
        "gemm_flops": 2 * size**3 / seconds(lambda: a @ b, repeats),
        "copy_bytes": 2 * source.nbytes / seconds(lambda: target.copy_(source), 10),
    }
    return found


def roofs(device: torch.device) -> dict[str, float]:
    """`ceilings`, and no trace of it in the memory."""
    found = ceilings(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return found


def run_ceilings(started: float) -> dict[str, Any]:
    found: dict[str, Any] = ceilings(dist.init(1))
    return found | {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}


def run_check(started: float, check: str, **settings: Any) -> dict[str, Any]:
    return CHECKS[check](**settings)


# -------------------------------------------------------------------------------------------------- attention


def run_attention(started: float, heads: int, kv_heads: int, width: int, tokens: int) -> dict[str, Any]:
    """Packed attention, forward and backward: milliseconds a kernel, differences to SDPA by document."""
    device = dist.init(1)
    dtype = models.resolve_dtype("auto", device)
    lengths, total = [], 0
    for example in documents(10_000, 100, max_length=tokens // 4):
        if total + example.num_tokens > tokens:
            break
        lengths.append(example.num_tokens)
        total += example.num_tokens
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, h, total, width, device=device, dtype=dtype, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    )
    upstream = torch.randn(1, total, heads, width, device=device, dtype=dtype)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    t = torch.arange(total, device=device)
    mask = (owner[:, None] == owner) & (t[:, None] >= t)

    def ours() -> Tensor:
        places = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
        longest = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return packed.packed_attention(nn.Module(), q, k, v, None, **places, **longest)[0]

    def by_document() -> Tensor:
        parts = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
        out = [F.scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True) for p in parts]
        return torch.cat(out, 2).transpose(1, 2)

    def dense_mask() -> Tensor:
        k_all, v_all = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k_all, v_all, attn_mask=mask).transpose(1, 2)

    kernels = {"ours": ours, "sdpa_by_document": by_document, "sdpa_dense_mask": dense_mask}
    if device.type == "cuda":  # on a CPU its first call takes a minute
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (owner[i] == owner[j]) & (i >= j)

        blocks = create_block_mask(allowed, None, None, total, total, device=device)
        flex = torch.compile(flex_attention)
        kernels["flex"] = lambda: flex(q, k, v, block_mask=blocks, enable_gqa=True).transpose(1, 2)

    def grads(attend: Callable[[], Tensor]) -> list[Tensor]:
        out = attend()
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]

    expected = grads(by_document)
    scale = [x.abs().max() for x in expected]
    found: dict[str, Any] = {"tokens": total, "documents": len(lengths), "longest": max(lengths)}
    for name, attend in kernels.items():
        gaps = [(a - b).abs().max() / s for a, b, s in zip(grads(attend), expected, scale, strict=True)]
        found[name] = {
            "forward_ms": 1e3 * seconds(lambda f=attend: f().detach(), 10),
            "forward_backward_ms": 1e3 * seconds(lambda f=attend: grads(f), 10),
            "relative_gaps_out_dq_dk_dv": [round(gap.item(), 6) for gap in gaps],
        }
    return found


# --------------------------------------------------------------------------------------------------- training


def dense_head(head: nn.Linear, h: Tensor, tokens: Tensor, scale: float, equal_weights: bool) -> TokenStats:
    """What the chunked head replaces: all logits at once."""
    raw = F.linear(h, head.weight).float()
    logp = (raw * scale).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    accuracy = (logp.argmax(-1) == tokens).float()
    return TokenStats(logp.gather(1, tokens[:, None])[:, 0], entropy, accuracy, raw.detach().mean(-1))


def pad(examples: list[packed.Example], group: int = 8) -> list[packed.Example]:
    """Each example as long as the longest of its group, with tokens that are not scored."""
    padded = []
    for i in range(0, len(examples), group):
        part = [example.sequences[0] for example in examples[i : i + group]]
        longest = max(len(tokens) for tokens, _ in part)
        for tokens, mask in part:
            more = longest - len(tokens)
            padded.append(packed.Example([(np.pad(tokens, (0, more)), np.pad(mask, (0, more)))], prompt=""))
    return padded


def host_syncs(policy: nn.Module, batch: list[packed.Example], row_tokens: int, device: torch.device) -> int:
    """Times that the host waits for the GPU inside the micro-batch loop."""
    import sft

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for row in packed.micro_batches(batch, row_tokens, device):
            loss, _ = sft.loss_and_metrics(policy, row)
            (loss / len(batch)).backward()
        torch.cuda.set_sync_debug_mode("default")
    policy.zero_grad()
    return sum("synchroniz" in str(w.message) for w in caught)


def run_sft(started: float, row_tokens: int, **settings: Any) -> dict[str, Any]:
    """`time_sft` with rows of row_tokens, or of half as many until they fit."""
    while True:
        try:
            return {"row_tokens": row_tokens, **time_sft(started, row_tokens=row_tokens, **settings)}
        except torch.OutOfMemoryError as error:
            if row_tokens <= 1024:
                raise dist.RunError(f"rows of {row_tokens} tokens do not fit") from error
        gc.collect()
        torch.cuda.empty_cache()
        row_tokens //= 2


def time_sft(
    started: float,
    shape: str,
    row_tokens: int,
    steps: int,
    padded: bool = False,
    compile: bool = False,
    head: str = "chunked",
    checkpointing: str = "off",
    lora_rank: int = 0,
) -> dict[str, Any]:
    """Steps of two rows: useful tokens/s, MFU, memory, graphs compiled after the warm-up, host syncs."""
    device = dist.init(1)
    roof = roofs(device)
    policy = random_policy(
        llama(**SHAPES[shape]),
        device,
        compile=compile,
        activation_checkpointing=checkpointing,
        lora_rank=lora_rank,
    )
    output = policy.model.get_output_embeddings()
    if head == "dense":
        output.forward = types.MethodType(dense_head, output)
    optimizer = torch.optim.AdamW(models.parameter_groups(policy, 0.0), lr=1e-5)
    pool = iter(documents(10_000, SHAPES[shape]["vocab_size"], max_length=row_tokens // 4, whole=True))

    def draw() -> list[packed.Example]:
        batch: list[packed.Example] = []
        while sum(example.num_tokens for example in batch) < 1.9 * row_tokens:
            batch.append(next(pool))
        return batch

    batches = [draw() for _ in range(4)]
    lengths = [example.num_tokens for batch in batches for example in batch]
    work = [pad(batch) if padded else batch for batch in batches]
    losses = [sft_step(policy, optimizer, work[0], row_tokens, device)]
    first = time.time() - started
    for i in (1, 2):
        losses.append(sft_step(policy, optimizer, work[i], row_tokens, device))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    sync()
    start = time.perf_counter()
    for i in range(steps):
        losses.append(sft_step(policy, optimizer, work[i % 4], row_tokens, device))
    sync()
    spent = (time.perf_counter() - start) / steps * 4  # seconds for all four batches
    flops = plan.training_flops(policy, lengths) / spent
    found = {
        "parameters": sum(p.numel() for p in policy.parameters()),
        "useful_tokens_per_second": sum(lengths) / spent,
        "mfu": flops / PEAK_FLOPS,
        "of_gemm": flops / roof["gemm_flops"],
        "gemm_flops": roof["gemm_flops"],
        "peak_mib": peak_mib(),
        "first_step_seconds": first,
        "useful_share": sum(lengths) / sum(e.num_tokens for batch in work for e in batch),
        "graphs_compiled_later": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
        "losses": [losses[0], losses[-1]],
    }
    if device.type == "cuda":
        found["host_syncs_in_loop"] = host_syncs(policy, work[0], row_tokens, device)
    return found


def run_head(started: float, vocab_size: int, tokens: int, width: int) -> dict[str, float]:
    """Memory the chunked head adds to its weight and gradient, and the share of the product's ceiling."""
    device = dist.init(1)
    roof, dtype = roofs(device), models.resolve_dtype("auto", device)
    head = nn.Linear(width, vocab_size, bias=False, device=device, dtype=dtype)
    h = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    y = torch.randint(vocab_size, (tokens,), device=device)
    before = peak_mib()

    def work() -> None:
        head.weight.grad = h.grad = None
        ChunkedHead.like(head)(h, y).logps.sum().neg().backward()

    spent = seconds(work, 3)
    grad = vocab_size * width * head.weight.element_size() / 2**20
    return {
        "added_mib": peak_mib() - before - grad,
        "seconds": spent,
        "of_gemm": 8 * vocab_size * width * tokens / spent / roof["gemm_flops"],
    }


# ----------------------------------------------------------------------------------------------------- decode


def run_decode(
    started: float, shape: str, batch: int, prompt: int, new: int, graphs: bool = True
) -> dict[str, Any]:
    """Milliseconds of a decode step against weights and cache read once."""
    device = dist.init(1)
    roof = roofs(device)
    config = llama(**SHAPES[shape])
    policy = random_policy(config, device, trainable=False)
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, config.vocab_size, (batch, prompt)).tolist()
    policy.generation_config.eos_token_id = None

    def reply(tokens: int) -> None:
        generate.generate(policy, NoText(), prompts, max_new_tokens=tokens, max_batch=batch)

    short = new // 4
    how = contextlib.nullcontext() if graphs else eager_decode()
    with how, generate.rollout(policy):  # both include the prefill and the capture of a graph
        step = (seconds(lambda: reply(new), 1) - seconds(lambda: reply(short), 1)) / (new - short)
    size = sum(p.numel() for p in policy.parameters()) * policy.compute_dtype.itemsize
    heads = config.num_key_value_heads * config.head_dim
    context = prompt + (new + short) / 2
    cache = batch * context * 2 * config.num_hidden_layers * heads * policy.compute_dtype.itemsize
    return {
        "step_ms": 1e3 * step,
        "tokens_per_second": batch / step,
        "roofline_ms": 1e3 * (size + cache) / roof["copy_bytes"],
        "of_copy": (size + cache) / roof["copy_bytes"] / step,
        "peak_mib": peak_mib(),
    }


# ----------------------------------------------------------------------------------------------- subprocesses


def run_peer(started: float, flags: list[str]) -> dict[str, Any]:
    """The table of vs_trl.py, which also records."""
    command = [sys.executable, str(ROOT / "benchmarks" / "vs_trl.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    return {"rc": done.returncode, "output": done.stdout[-3000:].splitlines(), "error": done.stderr[-500:]}


def run_ppo(started: float, shape: str, prompts: int, new: int, steps: int) -> dict[str, Any]:
    """Shares of the stages of ppo.py, with a reward that costs nothing, at its second rollout."""
    import ppo
    from common.args import with_fields

    device = dist.init(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = llama(**SHAPES[shape])
        write_tokenizer(folder, config.vocab_size)
        policy = random_policy(config, device, trainable=False)
        with generate.rollout(policy) as replica:
            replica.model.save_pretrained(folder)
        del policy, replica
        words = np.random.default_rng(0).integers(config.vocab_size - 8, size=(2 * prompts, 64))
        lines = [{"prompt": " ".join(f"w{w}" for w in row)} for row in words.tolist()]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        ppo.main(
            with_fields(
                ppo.Args(),
                model=name,
                dataset=f"{name}/prompts.jsonl",
                eval_dataset=f"{name}/prompts.jsonl",
                output_dir=f"{name}/run",
                reward="harness:kindness",
                missing_eos="keep",
                rollout_size=prompts,
                batch_size=prompts // 2,
                max_new_tokens=new,
                max_steps=steps,
                eval_every=10_000,
                num_samples=0,
                activation_checkpointing="off",
            )
        )
        rows = [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    totals: Counter[str] = Counter()
    for row in rows[-2:]:  # a rollout and its two steps
        totals.update({k.split("time/")[1]: v for k, v in row.items() if "time/" in k})
    shares = {name: value / totals.total() for name, value in totals.items()}
    return {"seconds": totals, "shares": shares, "peak_mib": peak_mib()}


# ------------------------------------------------------------------------------------------------------ cells

SFT_3B = {"shape": "3B", "row_tokens": 16_384, "steps": 4}
SFT_8B = {"shape": "8B", "row_tokens": 8192, "steps": 3, "checkpointing": "on"}
DPO_1B = {"rounds": 1, "hidden_size": 2048, "num_layers": 16, "head_width": 64, "vocab_size": 128_256}
DPO_1B |= {"row_tokens": 8192, "pairs_per_step": 32, "trl_pairs": 8}
DECODE = {"prompt": 256, "new": 128}
CELLS: dict[str, tuple[Callable, list[dict]]] = {
    "ceilings": (run_ceilings, [{}]),
    "checks": (
        run_check,
        [
            *({"check": name} for name in CHECKS if name != "check_tests"),
            {"check": "check_sampler", "lora_rank": 16},
            {"check": "check_head", "compiled": True},
            {"check": "check_head", "compiled": True, "equal_weights": True},
            {"check": "check_tests"},
        ],
    ),
    "attention": (run_attention, [{"heads": 32, "kv_heads": 8, "width": 128, "tokens": 16_384}]),
    "sft": (
        run_sft,
        [
            SFT_3B,
            {**SFT_3B, "checkpointing": "on"},
            {**SFT_3B, "compile": True},
            {**SFT_3B, "compile": True, "checkpointing": "on"},
            {**SFT_3B, "head": "dense"},
            {**SFT_3B, "padded": True},
        ],
    ),
    "sft_8b": (run_sft, [SFT_8B, {**SFT_8B, "compile": True}, {**SFT_8B, "lora_rank": 16}]),
    "peer": (run_peer, [{"flags": ["dpo", *(f"--{name}={value}" for name, value in DPO_1B.items())]}]),
    "head": (
        run_head,
        [{"vocab_size": v, "tokens": 16_384, "width": 4096} for v in (128_256, 152_064, 262_144)],
    ),
    "decode": (
        run_decode,
        [
            {"shape": shape, "batch": batch, **DECODE, "graphs": graphs}
            for shape, batch, graphs in (
                ("8B", 64, True),
                ("1B", 64, True),
                ("8B", 32, True),
                ("8B", 256, True),
                ("8B", 64, False),
                ("1B", 1, True),
                ("1B", 256, True),
            )
        ],
    ),
    "ppo": (run_ppo, [{"shape": "1B", "prompts": 256, "new": 512, "steps": 4}]),
}
TINY: dict[str, list[dict]] = {
    "ceilings": [{}],
    "checks": [
        {"check": "check_attention", "tokens": 1200},
        {"check": "check_head", "tokens": 70, "width": 64, "vocab_size": 500},
        {"check": "check_head", "tokens": 70, "width": 64, "vocab_size": 500, "equal_weights": True},
        {"check": "check_float32", "count": 1},
        {"check": "check_bfloat16", "count": 2},
        {"check": "check_score_head"},
        {"check": "check_decode", "new": 4},
        {"check": "check_sampler", "new": 4},
        {"check": "check_compile"},
    ],
    "attention": [{"heads": 4, "kv_heads": 2, "width": 16, "tokens": 512}],
    "sft": [
        {"shape": "tiny", "row_tokens": 512, "steps": 4, **more}
        for more in ({}, {"padded": True, "head": "dense"})
    ],
    "sft_8b": [{"shape": "tiny", "row_tokens": 512, "steps": 4, "checkpointing": "on", "lora_rank": 4}],
    "peer": [{"flags": ["sft", "--small", "--rounds", "1"]}],
    "head": [{"vocab_size": 2000, "tokens": 300, "width": 32}],
    "decode": [{"shape": "tiny", "batch": 4, "prompt": 8, "new": 16}],
    "ppo": [{"shape": "tiny", "prompts": 8, "new": 8, "steps": 4}],
}
WORKERS = {name: worker for name, (worker, _) in CELLS.items()}
# (group, cell, most seconds): a day's work, what matters most first
DAY = [("checks", i, 90) for i in range(len(CELLS["checks"][1]))]
DAY += [
    ("sft", 0, 60),
    ("sft", 1, 60),
    ("sft_8b", 0, 80),
    ("decode", 0, 60),
    ("sft", 2, 120),
    ("peer", 0, 150),
]
DAY += [("ppo", 0, 120), ("decode", 1, 40), ("decode", 2, 50), ("decode", 3, 60), ("sft", 3, 120)]
DAY += [("sft_8b", 1, 140), ("head", 0, 40), ("attention", 0, 60), ("decode", 4, 60), ("sft_8b", 2, 80)]
DAY += [("decode", 5, 40), ("decode", 6, 40), ("sft", 4, 60), ("sft", 5, 60), ("head", 2, 40)]


def day(minutes: float, small: bool, only: str) -> bool:
    """Cells in order of worth until the minutes are over. -> whether all checks that ran were right"""
    end, right, best = time.time() + 60 * minutes, True, {}
    if small:
        cells = [(group, i, 300.0) for group in TINY for i in range(len(TINY[group]))]
    else:
        cells = [("ceilings", 0, 60), *DAY]
    chosen = only.split(",") if only else [group for group, *_ in cells]
    cells = [cell for cell in cells if cell[0] in chosen or f"{cell[0]}/{cell[1]}" in chosen]
    spare = Worker(__file__, threads=1 if small else 8)
    for group, i, limit in cells:
        left = end - time.time()
        if left < 15:
            print(f"the {minutes:g} minutes are over before {group} {i}", flush=True)
            break
        worker, spare = spare, Worker(__file__, threads=1 if small else 8)
        settings = TINY[group][i] if small else CELLS[group][1][i]
        start = time.time()
        figures = worker.ask(group, settings, min(limit, left))
        right = right and (group != "checks" or figures.get("ok", False))
        for name in (
            "gemm_flops",
            "copy_bytes",
        ):  # a ceiling is the best seen: one measurement may be disturbed
            best[name] = max(best.get(name, 0.0), figures.get(name, 0.0))
        line = {"task": group, "cell": settings, "seconds": round(time.time() - start, 1), **figures}
        print(json.dumps(rounded(line | ({"best": best} if "mfu" in figures else {}))), flush=True)
        if not small:
            record("gpu", group, {"cell": settings, **figures})
    spare.process.kill()
    return right


def rounded(value: Any) -> Any:
    """Numbers to four digits, for a line that a person reads."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    if did_job(WORKERS):
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="+", choices=(*CELLS, "day"), metavar="group")
    parser.add_argument("--minutes", type=float, default=8.0, help="how long a day is")
    parser.add_argument(
        "--only", default="", help="these groups of a day, or cells as sft/0; joined by commas"
    )
    parser.add_argument("--cell", type=int, help="this cell of the group only, from 0")
    parser.add_argument("--small", action="store_true", help="tiny, on a CPU, nothing recorded")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.small:
        sys.exit("no GPU: only --small runs here")
    if "day" in options.groups:
        sys.exit(not day(options.minutes, options.small, options.only))
    for group in options.groups:
        cells = TINY[group] if options.small else CELLS[group][1]
        for cell in cells if options.cell is None else [cells[options.cell]]:
            figures = in_process(__file__, group, cell, threads=8 if not options.small else 1)
            print(json.dumps({"task": group, **machine(), "cell": cell, **figures}), flush=True)
            if not options.small:
                record("gpu", group, {"cell": cell, **figures})


if __name__ == "__main__":
    main()
