"""What our own training costs on a CPU, and how that grows.

    python benchmarks/cpu.py head       memory of the chunked head against dense logits, by vocabulary (B3)
    python benchmarks/cpu.py length     cost of a token against the FLOP line, over document lengths (B4)
    python benchmarks/cpu.py tokens     memory over the tokens of a row
    python benchmarks/cpu.py ranks      one process against two, with shards and with copies (B5)
    python benchmarks/cpu.py ppo        where a rollout and its updates spend their time (B7)
    python benchmarks/cpu.py loader     packing, building rows and tokenising (B9)
    python benchmarks/cpu.py switches   what each option buys that changes speed and memory but no number
    python benchmarks/cpu.py all --small

B1, B2 and B8 (against TRL) are vs_trl.py, B6 (rollouts) is generate.py. What is compared takes turns.
Prints a line a measurement and appends a JSON line to benchmarks/results/cpu.jsonl, but not with --small.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from harness import (
    MALLOC,
    ROOT,
    did_job,
    documents,
    fixed_documents,
    in_process,
    llama,
    peak_mib,
    random_policy,
    record,
    sft_step,
    write_tokenizer,
)

# ------------------------------------------------------------------------------------------------------- head


def run_head(
    started: float, kind: str, vocab_size: int, num_tokens: int, width: int = 256
) -> dict[str, float]:
    """Memory that forward and backward of a language-model head add to its weight and gradient."""
    import torch
    import torch.nn.functional as F

    from common.lm_head import ChunkedHead

    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocab_size, bias=False)
    h = torch.randn(num_tokens, width, requires_grad=True)
    y = torch.randint(vocab_size, (num_tokens,))
    before, cpu = peak_mib(), time.process_time()
    if kind == "chunked":
        logps = ChunkedHead.like(head)(h, y).logps
    else:
        logps = -F.cross_entropy(head(h), y, reduction="none")
    (-logps.sum()).backward()
    return {
        "added_mib": peak_mib() - before - vocab_size * width * 4 / 2**20,
        "cpu_seconds": time.process_time() - cpu,
        "loss": -logps.detach().mean().item(),
    }


def head(small: bool) -> dict[str, Any]:
    figures = []
    print(f"{'vocabulary':>10}{'tokens':>8}{'chunked MiB':>13}{'dense MiB':>11}{'ratio':>7}{'CPU time':>10}")
    for vocab_size in (4_000, 8_000) if small else (32_000, 64_000, 128_000, 256_000):
        for num_tokens in (64, 256) if small else (512, 2048, 4096):
            shape = {"vocab_size": vocab_size, "num_tokens": num_tokens}
            ours = in_process(__file__, "head", {"kind": "chunked", **shape}, 1)
            line = f"{vocab_size:10}{num_tokens:8}{ours['added_mib']:13.0f}"
            figures.append({**shape, "chunked": ours})
            if vocab_size * num_tokens <= 300e6:  # dense logits of more do not fit
                dense = in_process(__file__, "head", {"kind": "dense", **shape}, 1)
                assert abs(ours["loss"] - dense["loss"]) < 1e-3
                line += f"{dense['added_mib']:11.0f}{ours['added_mib'] / dense['added_mib']:7.2f}"
                line += f"{ours['cpu_seconds'] / dense['cpu_seconds']:10.2f}"
                figures[-1]["dense"] = dense
            print(line, flush=True)
    return {"width": 256, "figures": figures}


# --------------------------------------------------------------------------------------------- length, tokens


def setup(shape: tuple[int, int, int, int], **options: Any) -> tuple[Any, ...]:
    """A random policy of (vocabulary, width, layers, heads), its optimizer and the device."""
    import torch

    from common import dist, models

    device = dist.init(1)
    policy = random_policy(llama(*shape), device, **options)
    return policy, torch.optim.AdamW(models.parameter_groups(policy, 0.0), lr=1e-4), device


def run_length(
    started: float, shape: tuple[int, ...], lengths: list[int], tokens: int, rounds: int
) -> dict[str, Any]:
    """CPU seconds and FLOPs of a step of the same number of tokens, cut into longer and longer documents."""
    from common import plan

    policy, optimizer, device = setup(shape)
    seconds: dict[int, list[float]] = {length: [] for length in lengths}
    flops = {}
    for i in range(rounds + 1):
        for length in lengths:
            batch = fixed_documents(tokens // length, length, shape[0])
            flops[length] = plan.training_flops(policy, [length] * len(batch))
            start = time.process_time()
            sft_step(policy, optimizer, batch, tokens, device)
            if i:  # the first round warms up
                seconds[length].append(time.process_time() - start)
    return {"seconds": [statistics.median(seconds[n]) for n in lengths], "flops": [flops[n] for n in lengths]}


def length(small: bool) -> dict[str, Any]:
    shape = (512, 64, 2, 2) if small else (4096, 256, 4, 8)
    tokens = 512 if small else 8192
    lengths = [128, 512] if small else [512, 1024, 2048, 4096, 8192]
    settings = {"shape": shape, "lengths": lengths, "tokens": tokens, "rounds": 1 if small else 5}
    found = in_process(__file__, "length", settings, 1)
    print(f"{'document':>10}{'MFLOP/token':>13}{'us/token':>10}{'GFLOP/s':>9}{'of the first':>14}")
    speeds = [flops / s / 1e9 for flops, s in zip(found["flops"], found["seconds"], strict=True)]
    for n, flops, s, speed in zip(lengths, found["flops"], found["seconds"], speeds, strict=True):
        cost = f"{flops / tokens / 1e6:13.1f}{s / tokens * 1e6:10.1f}"
        print(f"{n:10}{cost}{speed:9.1f}{speed / speeds[0]:14.2f}")
    return {**settings, **found, "gflops_per_second": speeds}


def run_tokens(
    started: float, shape: tuple[int, ...], row_tokens: int, document: int, steps: int
) -> dict[str, Any]:
    policy, optimizer, device = setup(shape)
    before = peak_mib()
    batch = fixed_documents(row_tokens // document, document, shape[0])
    for _ in range(steps):
        sft_step(policy, optimizer, batch, row_tokens, device)
    return {"peak_rss_mib": peak_mib(), "rss_before_training_mib": before}


def tokens(small: bool) -> dict[str, Any]:
    shape = (512, 64, 2, 2) if small else (32_000, 256, 4, 8)
    document = 64 if small else 512
    sizes = [256, 512] if small else [1024, 2048, 4096, 8192, 16384]
    settings = {"shape": shape, "document": document, "steps": 2}
    figures = []
    print(f"{'row tokens':>10}{'peak RSS MiB':>14}{'KiB a further token':>21}")
    for row_tokens in sizes:
        figures.append(in_process(__file__, "tokens", {**settings, "row_tokens": row_tokens}, 1))
        line = f"{row_tokens:10}{figures[-1]['peak_rss_mib']:14.0f}"
        if len(figures) > 1:
            more = figures[-1]["peak_rss_mib"] - figures[-2]["peak_rss_mib"]
            line += f"{1024 * more / (row_tokens - sizes[len(figures) - 2]):21.1f}"
        print(line, flush=True)
    return {**settings, "row_tokens": sizes, "figures": figures}


# ------------------------------------------------------------------------------------------------------ ranks


def run_ranks(
    started: float, shape: tuple[int, ...], num_documents: int, row_tokens: int, steps: int, sharding: str
) -> dict[str, Any]:
    """Wall-clock seconds of steps on the same documents, however many ranks share them."""
    from common import dist

    policy, optimizer, device = setup(shape, sharding=sharding)
    batch = documents(num_documents, shape[0], max_length=row_tokens)
    lengths = [example.num_tokens for example in batch]
    loads = [sum(lengths[i] for i in share) for share in dist.shares(lengths, dist.world_size())]
    losses, seconds = [], []
    for _ in range(steps + 1):
        dist.barrier()
        start = time.perf_counter()
        losses.append(sft_step(policy, optimizer, batch, row_tokens, device))
        seconds.append(time.perf_counter() - start)
    return {
        "losses": losses,
        "tokens": sum(lengths),
        "tokens_per_second": sum(lengths) / statistics.median(seconds[1:]),
        "imbalance": max(loads) * len(loads) / sum(loads),
    }


def ranks(small: bool) -> dict[str, Any]:
    shape = (512, 64, 2, 2) if small else (32_000, 256, 4, 8)
    sizes = {"num_documents": 8, "row_tokens": 1024} if small else {"num_documents": 56, "row_tokens": 2048}
    settings = {"shape": shape, "steps": 1 if small else 3, **sizes}
    ways = {"one rank": (1, "full"), "two, shards": (2, "full"), "two, copies": (2, "none")}
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    for _ in range(1 if small else 5):
        for name, (count, sharding) in ways.items():
            found = in_process(__file__, "ranks", {**settings, "sharding": sharding}, 1, ranks=count)
            runs[name].append(found)
    print(f"{runs['two, shards'][0]['tokens']} tokens a step", end=", ")
    print(f"imbalance {runs['two, shards'][0]['imbalance']:.4f}")
    ratios = {}
    for name, results in runs.items():
        pairs = list(zip(runs["one rank"], results, strict=True))
        ratios[name] = statistics.median(b["tokens_per_second"] / a["tokens_per_second"] for a, b in pairs)
        gap = max(abs(x - y) for a, b in pairs for x, y in zip(a["losses"], b["losses"], strict=True))
        speed = statistics.median(r["tokens_per_second"] for r in results)
        print(
            f"{name:12}{speed:7.0f} tokens/s {ratios[name]:6.2f} times, losses within {gap:.1e}", flush=True
        )
        assert gap < 1e-5
    return {**settings, "ratios": ratios, "runs": runs}


# ------------------------------------------------------------------------------------------------ ppo, loader


def ppo(small: bool) -> dict[str, Any]:
    """Shares of the stages in the wall time of ppo.py on the toy world."""
    size = (
        "--rollout_size=8 --samples_per_prompt=2 --batch_size=8 --max_steps=2" if small else "--max_steps=20"
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "ppo.py", *size.split(), "--num_samples=0", f"--output_dir={folder}/run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    totals: Counter[str] = Counter()
    for row in map(json.loads, lines):
        totals.update({k.split("time/")[1]: v for k, v in row.items() if "time/" in k})
    for name, seconds in totals.most_common():
        print(f"{name:12}{seconds:8.2f} s {seconds / totals.total():6.0%}")
    return {"command": " ".join(command[1:-1]), "seconds": totals}


def run_loader(started: float, num_documents: int) -> dict[str, float]:
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from common import data, packed

    rng, cpu, found = np.random.default_rng(0), torch.device("cpu"), {}
    lengths = np.minimum(rng.lognormal(5.4, 0.9, num_documents).astype(int) + 1, 8192).tolist()

    def timed(name: str, start: float) -> float:
        found[name] = time.process_time() - start
        return time.process_time()

    start = time.process_time()
    rows = packed.pack(range(num_documents), lengths, 8192)
    start = timed("pack_seconds", start)
    examples = [packed.Example([(np.zeros(n, np.int32), np.ones(n, bool))], "") for n in lengths]
    start = time.process_time()
    for chosen in rows:
        packed.make_micro_batch(examples, chosen, cpu)
    timed("rows_seconds", start)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), 32_000)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [" ".join(f"w{w}" for w in rng.integers(30_000, size=n)) for n in lengths[:2000]]
        chats = [[{"role": "user", "content": "w1"}, {"role": "assistant", "content": t}] for t in texts]
        start = time.process_time()
        for chat in chats:
            data.encode_chat(tokenizer, chat, [False, True])
        timed("tokenise_seconds", start)
    found["tokenise_tokens_per_second"] = sum(lengths[:2000]) / found["tokenise_seconds"]
    return {
        **found,
        "documents": num_documents,
        "tokens": sum(lengths),
        "fill": sum(lengths) / len(rows) / 8192,
    }


def loader(small: bool) -> dict[str, Any]:
    found = in_process(__file__, "loader", {"num_documents": 2000 if small else 52_000}, 1)
    print(
        f"{found['documents']} documents, {found['tokens']} tokens: packed in {found['pack_seconds']:.2f} s "
        f"({found['fill']:.2%} full), made rows in {found['rows_seconds']:.2f} s; "
        f"{found['tokenise_tokens_per_second']:.0f} tokens/s tokenised"
    )
    return found


# --------------------------------------------------------------------------------------------------- switches

# script and what it is given, compared with the line above it that is given nothing; ranks
SWITCHES = [
    ("sft", "", 1),
    ("sft", "--activation_checkpointing on", 1),
    ("sft", "--micro_batch_tokens 1024", 1),
    ("sft", "--compile", 1),
    ("dpo", "", 1),
    ("dpo", "--precompute_ref", 1),
    ("sft", "", 2),
    ("sft", "--sharding none", 2),
]


def run_script(script: str, given: str, num_ranks: int, folder: Path, small: bool) -> dict[str, Any]:
    """A script as its users start it: tokens/s after the first steps, peak memory of its largest process."""
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}"] if num_ranks > 1 else []
    command = [sys.executable, *start, f"{script}.py", f"--model={folder}", f"--dataset={folder}/train.jsonl"]
    command += [f"--eval_dataset={folder}/eval.jsonl", "--num_samples=0", "--max_length=1024"]
    command += [
        f"--batch_size={8 if small else 24}",
        f"--max_steps={3 if small else 6}",
        "--learning_rate=1e-4",
        *given.split(),
    ]
    with tempfile.TemporaryDirectory() as name:
        command += [f"--output_dir={name}/run"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": MALLOC}
        with open(f"{name}/log", "w+") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)  # its usage covers the ranks it waited for
            log.seek(0)
            if status:
                sys.exit(f"{' '.join(command)} failed:\n{log.read()[-4000:]}")
        lines = Path(name, "run", "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "train/loss" in row]
    return {
        "tokens_per_second": statistics.median(r["train/tokens_per_second"] for r in rows[len(rows) // 2 :]),
        "peak_rss_mib": usage.ru_maxrss / 1024,
        "losses": [row["train/loss"] for row in rows],
    }


def switches(small: bool) -> dict[str, Any]:
    """Every option that is there for speed or memory only, against the script without it."""
    import vs_trl

    found: list[list[dict]] = [[] for _ in SWITCHES]
    with contextlib.ExitStack() as stack:
        folders = {}
        for task in ("sft", "dpo"):
            folders[task] = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            work = vs_trl.Work(task, **(vs_trl.SMALL if small else {}))
            vs_trl.prepare(work, folders[task])
            lines = (folders[task] / "train.jsonl").read_text().splitlines(keepends=True)
            (folders[task] / "eval.jsonl").write_text("".join(lines[:4]))
        for _ in range(1 if small else 2):
            for (script, given, num_ranks), results in zip(SWITCHES, found, strict=True):
                results.append(run_script(script, given, num_ranks, folders[script], small))
    figures, base = [], found[0]
    print(f"{'':44}{'tokens/s':>10}{'ratio':>7}{'MiB':>7}{'ratio':>7}{'loss gap':>10}")
    for (script, given, num_ranks), results in zip(SWITCHES, found, strict=True):
        base = results if not given else base
        ratios = {
            key: statistics.median(a[key] / b[key] for a, b in zip(results, base, strict=True))
            for key in ("tokens_per_second", "peak_rss_mib")
        }
        gap = max(abs(a - b) for a, b in zip(results[0]["losses"], base[0]["losses"], strict=True))
        speed, memory = (statistics.median(r[key] for r in results) for key in ratios)
        name = f"{script}.py {given}" + f" on {num_ranks} ranks" * (num_ranks > 1)
        faster, larger = ratios.values()
        print(f"{name:44}{speed:10.0f}{faster:7.2f}{memory:7.0f}{larger:7.2f}{gap:10.1e}", flush=True)
        figures.append({"name": name, "ratios": ratios, "gap": gap, "runs": results})
        assert gap < 1e-4, f"{name} changes the losses"
    return {"figures": figures}


TASKS = {f.__name__: f for f in (head, length, tokens, ranks, ppo, loader, switches)}
WORKERS = {
    "head": run_head,
    "length": run_length,
    "tokens": run_tokens,
    "ranks": run_ranks,
    "loader": run_loader,
}


def main() -> None:
    if did_job(WORKERS):
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=(*TASKS, "all"))
    parser.add_argument("--small", action="store_true", help="tiny shapes, nothing recorded")
    options = parser.parse_args()
    for name in TASKS if options.task == "all" else (options.task,):
        print(f"\n{name}", flush=True)
        figures = TASKS[name](options.small)
        if not options.small:
            record("cpu", name, figures)


if __name__ == "__main__":
    main()
