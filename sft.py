"""Supervised fine-tuning: next-token cross-entropy on the responses of demonstrations

The first stage of InstructGPT (Ouyang et al., 2022), https://arxiv.org/abs/2203.02155. With m the mask of
scored tokens (the text of assistant turns and the token that ends each) and N their number in the batch:

    loss = -(1/N) * sum_t m_t log pi(y_t | y_<t)

    python sft.py --help
    torchrun --nproc_per_node=8 sft.py --model HuggingFaceTB/SmolLM2-135M --dataset demonstrations.jsonl

Shapes: a micro-batch packs B demonstrations end to end, N tokens in all; N_targets of them are scored.

Metrics, results and departures from the papers: docs/sft.md
"""

import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common import certificate, checkpoint, data, dist, files, models, packed, plan
from common.args import Chat, Optimization, Run, Sampling, System, block, parse, snapshot
from common.evaluate import answer, answer_metrics, load_judge
from common.log import Log
from common.packed import MicroBatch

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
    seed: int = 1
    """seed of the order of data and of samples"""
    chat: Chat = block(Chat)
    max_length: int = 2048
    """most tokens of prompt and response; longer ones are cut at the end, and counted"""
    train_on_prompt: bool = False
    """score every token of a conversation instead of the assistant's turns (or the roles the data names)"""

    optimization: Optimization = block(Optimization, learning_rate=2e-5, lr_schedule="cosine", batch_size=128)
    system: System = block(System)
    run: Run = block(Run, output_dir=f"runs/{Path(__file__).stem}")
    sampling: Sampling = block(Sampling)


def sft_loss(token_logps: Tensor) -> Tensor:
    """Negative log-likelihood of the scored tokens (N_targets,), summed, in nats. -> scalar"""
    return -token_logps.sum()


def loss_and_metrics(policy: models.Policy, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, tuple]]:
    """Loss of a micro-batch, summed over its scored tokens; the caller divides. Metrics as (sum, count)."""
    stats = policy(micro_batch, equal_weights=True)  # (N_targets,) each
    loss, num_targets = sft_loss(stats.logps), len(stats.logps)
    metrics = {
        "loss": (loss, num_targets),
        "nll": (-stats.logps.sum(), num_targets),
        "entropy": (stats.entropy.sum(), num_targets),
        "mean_token_accuracy": (stats.accuracy.sum(), num_targets),
    }
    return loss, metrics


TOY = dict(learning_rate=1e-3, warmup_steps=5, batch_size=64, max_steps=60, eval_every=20, num_samples=200)


def main(args: Args, pipeline: Log | None = None) -> None:
    # setup
    device = dist.init(args.seed)
    plan.show(args)
    optimization, system, run = args.optimization, args.system, args.run
    log = Log(run, __file__, SHOWN, snapshot(args, TOY), pipeline)

    # data
    tokenizer = data.load_tokenizer(args.model, **vars(args.chat))
    sources = (args.dataset, args.eval_dataset, args.max_length, args.train_on_prompt)
    train_set, eval_set = data.load_sft(tokenizer, *sources)
    num_steps = data.num_steps(train_set, optimization.batch_size, run.num_epochs, run.max_steps)
    how = (optimization.batch_size, args.seed, run.num_epochs, run.max_steps)  # batches are made
    judge = load_judge(run.judge, args.dataset)
    if log.is_finished(num_steps, files.inputs(args.model, tokenizer, train_set, eval_set)):
        return
    log.start(num_steps, optimization)

    # models
    policy = models.load(args.model, device, system)
    optimizer = models.adamw(policy, optimization)
    certificate.training(args, policy, tokenizer, train_set, functools.partial(loss_and_metrics, policy))
    parts = {"policy": (policy, optimizer)}
    resumed = checkpoint.resume(run.output_dir, parts)
    start_step, num_tokens = resumed["step"], resumed["num_tokens"]

    def evaluate(step: int) -> dict[str, float]:
        totals = dist.Totals()
        for micro_batch in packed.micro_batches(eval_set, system.micro_batch_tokens, device):
            with torch.no_grad():
                totals.update(loss_and_metrics(policy, micro_batch)[1])
        metrics = totals.reduce("eval/")
        metrics["eval/perplexity"] = math.exp(min(700.0, metrics["eval/nll"]))
        answers = answer(policy, tokenizer, eval_set, run.num_samples, args.sampling, args.seed, step, judge)
        log.samples(step, [a.row() for a in answers])
        return metrics | answer_metrics(answers)

    if start_step == 0:
        log(0, num_steps, evaluate(step=0))

    for step in range(start_step + 1, num_steps + 1):
        # update
        step_start = time.perf_counter()
        batch = data.batch(train_set, step, *how)  # the same on every rank
        num_targets = sum(example.num_targets for example in batch)
        lr = optimization.learning_rate * models.lr_factor(step, num_steps, optimization)
        models.set_lr(optimizer, lr)
        totals = dist.Totals()
        for micro_batch in packed.micro_batches(batch, system.micro_batch_tokens, device):
            loss, metrics = loss_and_metrics(policy, micro_batch)
            (loss / num_targets).backward()  # gradients add over micro-batches and ranks
            totals.update(metrics)
        grad_norm = models.clip_grad_norm(policy, optimization.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        totals.update({"grad_norm": (grad_norm, 1)})
        metrics = totals.reduce("train/")  # the step's one synchronisation
        seconds = time.perf_counter() - step_start

        # evaluate
        num_tokens += sum(example.num_tokens for example in batch)
        metrics["train/epoch"] = step * optimization.batch_size / train_set.epoch_size
        metrics |= {"train/num_tokens": num_tokens, "train/learning_rate": lr}
        metrics |= models.speed(policy, batch, seconds)
        stop = dist.stop_requested()
        if step % run.eval_every == 0 or step == num_steps:
            metrics |= evaluate(step)

        # log and save
        log(step, num_steps, metrics)
        if step % run.save_every == 0 or step == num_steps or stop:
            checkpoint.save(run, step, parts, num_tokens=num_tokens)
        if stop and step < num_steps:
            return log.finish(stopped_at=step)

    checkpoint.export(run, policy, tokenizer, args.model)
    log.finish()


if __name__ == "__main__":
    dist.run(main, parse(Args, TOY))
