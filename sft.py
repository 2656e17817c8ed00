"""Supervised fine-tuning: next-token cross-entropy on the responses of demonstrations

The first stage of InstructGPT (Ouyang et al., 2022), https://arxiv.org/abs/2203.02155. With m the mask of
scored tokens (the text of assistant turns and the token that ends each) and N their number in the batch:

    loss = -(1/N) * sum_t m_t log pi(y_t | y_<t)

    python sft.py --help
    torchrun --nproc_per_node=8 sft.py --model HuggingFaceTB/SmolLM2-135M --dataset demonstrations.jsonl

Shapes: a row packs B demonstrations end to end, N tokens in all; N_targets of them are scored.

Metrics, results and departures from the papers: docs/sft.md
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from common import checkpoint, data, dist, models
from common.log import Log, parse

TOY = dict(learning_rate=1e-3, warmup_steps=5, batch_size=64, max_steps=60, eval_every=20, num_samples=200)
SHOWN = ("loss", "perplexity", "mean_token_accuracy", "grad_norm")


@dataclass
class Args:
    """Supervised fine-tuning."""

    model: str = "toy"
    """policy to start from: toy, a run folder, a Hugging Face folder, a hub id, a .gguf file"""
    dataset: str = "toy"
    """demonstrations: toy, .jsonl/.json/.parquet file, folder, hub/name[:config[:split]]; a,b*2 mixes"""
    eval_dataset: str = ""
    """held-out data; default: the data set's test split, else 5 % of its prompts"""
    output_dir: str = f"runs/{Path(__file__).stem}"
    """the run folder: checkpoints, metrics.jsonl, samples.jsonl, model/; a run found there is resumed"""
    overwrite: bool = False
    """start anew in output_dir instead of resuming the run there"""
    seed: int = 1
    """orders data and samples"""
    chat_template: str = ""
    """replaces the tokenizer's chat template: a Jinja file, or chatml"""

    # algorithm
    train_on_prompt: bool = False
    """score every token of a conversation instead of the assistant's turns (or the roles the data names)"""

    # optimization
    learning_rate: float = 2e-5
    """peak learning rate"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """after warm-up: constant, or down to min_lr_ratio at the last step"""
    warmup_steps: int = 10
    """steps of linear warm-up"""
    min_lr_ratio: float = 0.1
    """the last step's share of the peak learning rate, for linear and cosine"""
    weight_decay: float = 0.0
    """AdamW's, on matrices only"""
    max_grad_norm: float = 1.0
    """clip the global gradient norm to this; 0 never clips"""
    num_epochs: int = 1
    """passes over the training data"""
    max_steps: int = -1
    """optimizer steps; -1: as many as num_epochs takes"""
    batch_size: int = 128
    """demonstrations per optimizer step, over all ranks"""
    micro_batch_tokens: int = 0
    """most tokens of one forward on one rank, memory not result; 0: 8192 on GPU, 2048 on CPU"""
    max_length: int = 2048
    """tokens of prompt and response; longer ones are cut at the end, and counted"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """of compute, auto is bfloat16 on GPU; master weights, gradients and optimizer state are float32"""
    lora_rank: int = 0
    """rank of LoRA adapters; 0 trains all weights"""
    lora_alpha: float = 16.0
    """LoRA's scale is lora_alpha / lora_rank"""
    lora_target: str = "all-linear"
    """modules that get adapters: all-linear, or names joined by commas"""
    merge_lora: bool = False
    """fold the adapters into the exported model instead of writing a peft folder"""
    sharding: Literal["full", "hybrid", "none"] = "full"
    """FSDP2: shard over all ranks, within a node and replicate across (hybrid), or replicate (none)"""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """recompute activations in backward; auto: for models of a billion parameters or more"""
    compile: bool = False
    """torch.compile each decoder block"""

    # bookkeeping
    eval_every: int = 100
    """optimizer steps between evaluations"""
    save_every: int = 500
    """optimizer steps between checkpoints"""
    keep_checkpoints: int = 1
    """how many of the newest checkpoints stay on disk"""
    num_samples: int = 16
    """prompts answered and judged at each evaluation"""
    max_new_tokens: int = 128
    """most tokens of such an answer"""
    temperature: float = 1.0
    """of such an answer; 0 is greedy"""
    judge: str = ""
    """package.module:function, (prompt, response) -> dict of scores; default: exact for toy, else none"""
    track: bool = False
    """log to Weights & Biases too: online if logged in, else offline"""
    wandb_project: str = "cleanalign"
    """W&B project"""
    run_name: str = ""
    """W&B run name"""


def sft_loss(token_logps: Tensor) -> Tensor:
    """Negative log-likelihood of the scored tokens (N_targets,), summed, in nats. -> scalar"""
    return -token_logps.sum()


def loss_and_metrics(policy: nn.Module, row: data.Row) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of a row, both summed over its scored tokens; the caller picks the denominator."""
    stats = models.token_stats(policy, row)  # (N_targets,) each
    loss = sft_loss(stats.logps)
    metrics = {
        "loss": loss.detach(),
        "entropy": stats.entropy.detach().sum(),
        "mean_token_accuracy": stats.accuracy.sum(),
    }
    return loss, metrics


def count_targets(batch: list[data.Example]) -> int:
    """Scored tokens of a whole batch, all rows and ranks: the one denominator of its loss and metrics."""
    return sum(example.num_targets for example in batch)


def means(totals: dict[str, float], batch: list[data.Example], prefix: str) -> dict[str, float]:
    """Metrics of a batch from their sums over all its rows and ranks."""
    return {f"{prefix}/{k}": v / count_targets(batch) for k, v in totals.items()}


def main(args: Args) -> None:
    # setup
    device = dist.init(args.seed)
    log = Log(args, __file__, SHOWN, TOY)

    # data
    tokenizer = data.load_tokenizer(args.model, args.chat_template)
    train_set, eval_set = data.load_sft(args, tokenizer)
    num_steps = data.num_steps(train_set, args)
    if not log.begin(num_steps):
        return

    # models
    policy = models.load(args.model, device, args)
    optimizer = torch.optim.AdamW(models.parameter_groups(policy, args.weight_decay), betas=(0.9, 0.95))
    parts = {"policy": (policy, optimizer)}
    resumed = checkpoint.resume(args, parts)
    start_step, num_tokens = resumed["step"], resumed["num_tokens"]

    def evaluate(step: int) -> dict[str, float]:
        totals = Counter()
        for row in data.rows(eval_set, args.micro_batch_tokens, device):
            with torch.no_grad():
                totals.update(loss_and_metrics(policy, row)[1])
        metrics = means(dist.all_sum(totals), eval_set, "eval")
        metrics["eval/perplexity"] = math.exp(min(700.0, metrics["eval/loss"]))
        return metrics | log.samples(step, policy, tokenizer, eval_set)

    if start_step == 0:
        log(0, num_steps, evaluate(step=0))

    for step in range(start_step + 1, num_steps + 1):
        # update
        step_start = time.perf_counter()
        batch = data.batch(train_set, step, args)  # the same on every rank
        num_targets = count_targets(batch)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * models.lr_factor(step, num_steps, args)
        totals = Counter()
        for row in data.rows(batch, args.micro_batch_tokens, device):  # this rank's share, equally many rows
            loss, metrics = loss_and_metrics(policy, row)
            (loss / num_targets).backward()  # gradients add over rows and ranks: the mean over the batch
            totals.update(metrics)
        grad_norm = models.clip_grad_norm(policy, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        sums = dist.all_sum(totals, same={"grad_norm": grad_norm})  # the step's one synchronisation
        seconds = time.perf_counter() - step_start

        # evaluate
        num_tokens += sum(example.num_tokens for example in batch)
        metrics = {
            "train/epoch": step * args.batch_size / train_set.epoch_size,
            "train/num_tokens": num_tokens,
            "train/learning_rate": optimizer.param_groups[0]["lr"],
            "train/grad_norm": sums.pop("grad_norm"),
        }
        metrics |= means(sums, batch, "train") | models.speed(policy, batch, seconds)
        stop = dist.stop_requested()
        if step % args.eval_every == 0 or step == num_steps:
            metrics |= evaluate(step)

        # log and save
        log(step, num_steps, metrics)
        if step % args.save_every == 0 or step == num_steps or stop:
            checkpoint.save(args, step, parts, num_tokens=num_tokens)
        if stop and step < num_steps:
            return log.finish(stopped_at=step)

    checkpoint.export(args, policy, tokenizer)
    log.finish()


if __name__ == "__main__":
    dist.run(main, parse(Args, TOY))
