"""Memory and time of draftp.py's training step over K, the steps that gradients pass through, on the toy.

    OMP_NUM_THREADS=1 python benchmarks/draftp_memory.py          # ten minutes on a CPU core
    OMP_NUM_THREADS=1 python benchmarks/draftp_memory.py --small

Each K runs in a process of its own, with and without step_checkpointing: loss_and_metrics and backward
over one micro-batch, twice. Memory is the largest resident set above what the process held before, with the
models loaded and a micro-batch of one image done; glibc is told to give freed blocks back, else these are
what grows. Prints a table and appends a JSON line to
benchmarks/results/draftp_memory.jsonl, but not with --small.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "draftp_memory.jsonl"
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}  # bytes


@dataclass
class Args:
    """Memory of a DRaFT+ step."""

    small: bool = False
    """K = 1 and 8 with step_checkpointing only, few images; nothing is recorded"""
    images: int = 64
    """images in the micro-batch"""
    one: str = ""
    """K,on or K,off: measure this alone and print it"""


def measure(k: int, step_checkpointing: bool, images: int) -> dict[str, float]:
    """MiB above the loaded models and seconds of a step, in this process."""
    import draftp
    from common import diffusion, dist, pipelines
    from common.args import with_fields

    device = dist.init(1)
    changes = draftp.TOY | {"num_grad_steps": k, "step_checkpointing": step_checkpointing}
    args = with_fields(draftp.Args(), **changes)
    pipe, policy = pipelines.load("toy", device, args.system, args.seed)
    example = diffusion.as_example("a red circle", {})
    sampler = draftp.setup(args, pipe, policy, None, [example])

    def step(count: int) -> float:
        start = time.perf_counter()
        for micro_batch in diffusion.micro_batches([example] * count, count, device):
            loss, _ = draftp.loss_and_metrics(sampler, micro_batch, 1, k, args)
            loss.backward()
        return time.perf_counter() - start

    step(1)
    before = peak()
    seconds = min(step(images) for _ in range(2))
    return {"mib": peak() - before, "total_mib": peak(), "seconds": seconds}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(args: Args) -> None:
    if args.one:
        k, checkpointing = args.one.split(",")
        print(json.dumps(measure(int(k), checkpointing == "on", args.images)))
        return
    images = 16 if args.small else args.images
    kinds = [(k, c) for c in ("on", "off") for k in ((1, 8) if args.small else (1, 2, 4, 8, 20))]
    figures = {}
    for k, checkpointing in kinds[: 2 if args.small else None]:
        command = [sys.executable, __file__, f"--one={k},{checkpointing}", f"--images={images}"]
        environment = {**os.environ, **MALLOC}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        figures[f"{k},{checkpointing}"] = found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"K {k:>2}  step_checkpointing {checkpointing:<3}  {found['mib']:7.0f} MiB above the models",
            end="",
        )
        print(f"  {found['total_mib']:6.0f} in all  {found['seconds']:5.1f} s", flush=True)
    growth = figures["8,on"]["mib"] / figures["1,on"]["mib"] - 1
    print(f"from K = 1 to K = 8 with step_checkpointing: {growth:+.1%}")
    if not args.small:
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
        line = {
            "images": images,
            "figures": figures,
            "growth": growth,
            "machine": platform.machine(),
            **versions,
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
