"""Tokens per second of common/generate.py against transformers' `model.generate`, replies of mixed lengths.

    OMP_NUM_THREADS=1 python benchmarks/generate.py           # several minutes on a CPU core
    OMP_NUM_THREADS=1 python benchmarks/generate.py --small   # half a minute

Both sides sample the same number of tokens for the same prompts from the same random Llama, in batches of one
size. The lengths of replies are drawn from a log-normal distribution and forced: ours takes them as budgets
of rows, transformers left-pads each batch and runs it to its longest reply. Only tokens of replies count. The
sides take turns; the ratio is the median over rounds. Prints its figures and appends a JSON line to
benchmarks/results/generate.jsonl, but not with --small.
"""

import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
import transformers
import tyro
from harness import NoText, record

from common import decode, dist, generate, models
from common.args import System

transformers.logging.disable_progress_bar()


@dataclass
class Args:
    """Benchmark of generation."""

    small: bool = False
    """a tenth of the work"""
    num_prompts: int = 128
    """replies a round"""
    batch: int = 32
    """rows decoded together, on both sides"""
    rounds: int = 5
    """timings of each side"""
    median_length: float = 64
    """of the replies, in tokens"""
    sigma: float = 0.9
    """spread of the log of the lengths; 0 makes all replies equally long"""
    max_length: int = 512
    """longest reply"""


def main(args: Args) -> None:
    if args.small:
        args.num_prompts, args.batch, args.rounds, args.median_length, args.max_length = 16, 8, 2, 16, 64
    device = dist.init(1)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        policy = models.load(folder, device, System(), trainable=False)
    theirs = theirs.to(device, models.resolve_dtype("auto", device))
    rng = np.random.default_rng(0)

    def draw(median: float, most: int) -> np.ndarray:
        return np.exp(rng.normal(math.log(median), args.sigma, args.num_prompts)).clip(4, most)

    lengths = draw(args.median_length, args.max_length).astype(int)
    prompts = [rng.integers(0, 4096, int(n)).tolist() for n in draw(32, 256)]

    class Batch(decode.Batch):
        def admit(self, samples: list[generate.Sample], rows: list[int]) -> None:
            super().admit(samples, rows)
            self.budgets[self.ids(rows)] = self.ids(lengths[[s.prompt_index for s in samples]])

    decode.Batch = Batch

    def ours() -> None:
        samples = generate.generate(
            policy, NoText(), prompts, max_new_tokens=int(lengths.max()), max_batch=args.batch
        )
        assert [len(s.tokens) for s in samples] == lengths.tolist()

    def transformers_generate() -> None:
        for start in range(0, len(prompts), args.batch):
            part = prompts[start : start + args.batch]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=device)
            steps = int(lengths[start : start + args.batch].max())
            theirs.generate(
                ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=steps, pad_token_id=0
            )

    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for i in range(args.rounds + 1):
        for name, run in (("ours", ours), ("transformers", transformers_generate)):
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    speeds = {name: round(lengths.sum() / statistics.median(times), 1) for name, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["transformers"], strict=True)]
    figures = {
        "tokens_per_second": speeds,
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(r, 2) for r in ratios],
        "parameters": sum(p.numel() for p in theirs.parameters()),
        "replies": len(prompts),
        "reply_tokens": {"mean": round(float(lengths.mean()), 1), "max": int(lengths.max())},
        "batch": args.batch,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(figures))
    if not args.small:
        record("generate", "rollouts", figures)


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
