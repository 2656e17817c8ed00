"""Direct Preference Optimization (Rafailov et al., 2023), https://arxiv.org/abs/2305.18290

Logistic regression on preference pairs (x, y_w, y_l) with the reward implicit in the policy:

    r(x, y) = beta * log(pi(y|x) / pi_ref(y|x))        Eq. 5; its Z(x) term cancels in a pair
    loss    = -log sigmoid(r(x, y_w) - r(x, y_l))      Eq. 7

and its relatives that use the same four log-probabilities: cDPO, robust DPO, IPO, reward-aware RPO, SimPO.

    python dpo.py --help
    torchrun --nproc_per_node=8 dpo.py --model runs/sft --dataset pairs.jsonl

Shapes: a micro-batch packs B pairs as 2B sequences end to end (chosen, rejected, chosen, ...), N
tokens in all; N_targets of them are response tokens, the ones that are scored.

Metrics, results and departures from the papers: docs/dpo.md
"""

import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import certificate, checkpoint, data, dist, files, formats, models, packed, plan
from common.args import Chat, Optimization, Run, Sampling, System, block, parse, refuse_ignored, snapshot
from common.evaluate import answer, answer_metrics, load_judge
from common.log import Log
from common.packed import MicroBatch

REF_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")  # fields of an example, with precompute_ref
SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm")


@dataclass
class Args:
    """Direct Preference Optimization."""

    model: str = "toy"
    """policy to start from: toy, a run folder, a Hugging Face folder, a hub id, a .gguf file"""
    dataset: str = "toy"
    """preference pairs: toy, .jsonl/.json/.parquet file, folder, hub/name[:config[:split]]; a,b*2 mixes"""
    eval_dataset: str = ""
    """held-out data; default: the data set's test split, else 5 % of its prompts"""
    seed: int = 1
    """seed of the order of data and of samples"""
    chat: Chat = block(Chat)
    max_length: int = 1024
    """most tokens of prompt and response; longer ones are cut, and counted"""
    cut: Literal["end", "start", "drop"] = "end"
    """what a response too long for max_length loses; drop leaves the pair out, as are pairs left alike"""

    # algorithm
    loss: Literal["dpo", "ipo", "ipo_sum", "robust", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl", "simpo"] = "dpo"
    """ipo averages log-ratios over tokens, ipo_sum adds them; rpo_* regress on the rewards of the pair"""
    beta: float = 0.1
    """pull towards the reference policy; larger stays closer"""
    label_smoothing: float = 0.0
    """assumed probability that a label is flipped: with dpo this is cDPO, with robust its unbiased form"""
    reward_scale: float = 1.0
    """rpo: eta, turns a difference of chosen_reward and rejected_reward into logits"""
    simpo_gamma: float = 0.5
    """simpo: margin, in units of beta times the mean log-prob, that chosen must win by; half of beta there"""
    sft_coef: float = 0.0
    """weight of the negative log-likelihood of the chosen response, a mean over its tokens"""
    precompute_ref: bool = False
    """score the reference policy once before training, cached, instead of keeping a frozen copy in memory"""

    optimization: Optimization = block(Optimization, learning_rate=5e-7, max_grad_norm=10.0)
    system: System = block(System)
    run: Run = block(Run, output_dir=f"runs/{Path(__file__).stem}")
    sampling: Sampling = block(Sampling)


def dpo_loss(h: Tensor, beta: float, label_prob: Tensor | float = 1.0) -> Tensor:
    """Eq. 7 of the DPO paper; soft labels as in Eq. 3 of cDPO, https://ericmitchell.ai/cdpo.pdf. -> (B,)

    Args:
        h: (B,) log-ratio of chosen minus that of rejected, log(pi/pi_ref) each, in nats.
        label_prob: (B,) probability that chosen is truly the better one.
    """
    return -label_prob * F.logsigmoid(beta * h) - (1 - label_prob) * F.logsigmoid(-beta * h)


def robust_loss(h: Tensor, beta: float, label_smoothing: float, label_prob: Tensor | float = 1.0) -> Tensor:
    """Unbiased when labels flip with probability label_smoothing, https://arxiv.org/abs/2403.00409 -> (B,)"""
    as_labelled, flipped = dpo_loss(h, beta, label_prob), dpo_loss(h, beta, 1 - label_prob)
    return ((1 - label_smoothing) * as_labelled - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(h: Tensor, beta: float, label_prob: Tensor | float = 1.0) -> Tensor:
    """Eq. 17 of IPO, https://arxiv.org/abs/2310.12036, its tau called beta; h per token or summed. -> (B,)"""
    target = 1 / (2 * beta)
    return label_prob * (h - target) ** 2 + (1 - label_prob) * (h + target) ** 2


def rpo_loss(h: Tensor, beta: float, reward_margin: Tensor, distance: str) -> Tensor:
    """Reward-aware preference optimization, https://arxiv.org/abs/2406.11704: beta h follows rewards. (B,)

    Args:
        reward_margin: (B,) eta * (chosen_reward - rejected_reward), a logit; losses are 0 where beta h is it.
        distance: rpo_sq, the squared difference; rpo_bwd_kl, KL(rewards || policy) of the two Bernoullis;
            rpo_fwd_kl, its arguments swapped.
    """
    if distance == "rpo_sq":
        return (beta * h - reward_margin) ** 2
    a, b = (reward_margin, beta * h) if distance == "rpo_bwd_kl" else (beta * h, reward_margin)
    yes = torch.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(b))
    no = torch.sigmoid(-a) * (F.logsigmoid(-a) - F.logsigmoid(-b))
    return yes + no


def simpo_loss(mean_logps: Tensor, beta: float, gamma: float) -> Tensor:
    """Eq. 6 of SimPO, https://arxiv.org/abs/2405.14734, without reference; mean_logps (B, 2). -> (B,)"""
    return -F.logsigmoid(beta * (mean_logps[:, 0] - mean_logps[:, 1]) - gamma)


def pair_losses(
    logps: Tensor, ref_logps: Tensor, lengths: Tensor, fields: dict[str, Tensor], args: Args
) -> Tensor:
    """The chosen loss of each pair.

    Args:
        logps, ref_logps: (B, 2) log pi(y|x) in nats, chosen in column 0, rejected in column 1.
        lengths: (B, 2) response tokens.
        fields: chosen_reward, rejected_reward and label_prob, (B,) each.
    """
    ratios = logps - ref_logps
    h = ratios[:, 0] - ratios[:, 1]
    label_prob = fields["label_prob"]
    if args.loss == "dpo":
        e = args.label_smoothing
        return dpo_loss(h, args.beta, (1 - e) * label_prob + e * (1 - label_prob))
    if args.loss == "robust":
        return robust_loss(h, args.beta, args.label_smoothing, label_prob)
    if args.loss in ("ipo", "ipo_sum"):
        means = ratios / lengths if args.loss == "ipo" else ratios
        return ipo_loss(means[:, 0] - means[:, 1], args.beta, label_prob)
    if args.loss == "simpo":
        return simpo_loss(logps / lengths, args.beta, args.simpo_gamma)
    reward_margin = args.reward_scale * (fields["chosen_reward"] - fields["rejected_reward"])
    return rpo_loss(h, args.beta, reward_margin, args.loss)


def response_logps(token_logps: Tensor, micro_batch: MicroBatch) -> Tensor:
    """log pi(y|x) of every pair of a micro-batch: the sum of log p over response tokens. -> (B, 2)"""
    return packed.segment_sum(token_logps, micro_batch.target_segments, micro_batch.num_segments).view(-1, 2)


@torch.no_grad()
def reference_logps(
    policy: models.Policy, ref_policy: models.Policy | None, micro_batch: MicroBatch
) -> Tensor:
    """log pi_ref(y|x), (B, 2): computed before, or by the frozen copy, or by the policy without adapters."""
    if REF_LOGPS[0] in micro_batch.fields:
        return torch.stack([micro_batch.fields[name] for name in REF_LOGPS], 1)
    with models.reference(policy, ref_policy) as reference:
        return response_logps(reference(micro_batch).logps, micro_batch)


def add_reference(policy: models.Policy, pairs: data.Dataset, reached: list[int], args: Args) -> data.Dataset:
    """The pairs with log pi_ref, while the policy is still the reference; NaN if not reached. Cached."""
    device, reached = next(policy.parameters()).device, [*dict.fromkeys(reached)]  # each but once
    asked = [pairs[i] for i in reached]

    def logps(micro_batch: MicroBatch) -> Tensor:
        return response_logps(policy(micro_batch).logps, micro_batch).flatten()

    def score() -> Tensor:
        return packed.table(logps, asked, args.system.micro_batch_tokens, device, what="reference")

    key = ("ref_logps", args.model, args.system.dtype, [pair.sequences for pair in asked])
    found = np.full((len(pairs), 2), np.nan, np.float32)
    found[reached] = files.cached(score, *key).view(-1, 2).cpu().numpy()
    return pairs.with_fields(dict(zip(REF_LOGPS, found.T, strict=True)))


def loss_and_metrics(
    policy: models.Policy, ref_policy: models.Policy | None, micro_batch: MicroBatch, args: Args
) -> tuple[Tensor, dict[str, tuple]]:
    """Loss of a micro-batch, a sum over its pairs that the caller divides, and metrics as (sum, count)."""
    stats = policy(micro_batch)  # (N_targets,) each
    logps = response_logps(stats.logps, micro_batch)  # (B, 2); a dummy has B = 0 and a loss of exactly zero
    lengths = response_logps(torch.ones_like(stats.logps), micro_batch)
    mean_logits = response_logps(stats.mean_logit, micro_batch) / lengths
    has_reference = args.loss != "simpo"
    ref_logps = reference_logps(policy, ref_policy, micro_batch) if has_reference else torch.zeros_like(logps)
    losses = pair_losses(logps, ref_logps, lengths, micro_batch.fields, args)
    loss = (losses - args.sft_coef * logps[:, 0] / lengths[:, 0]).sum()
    rewards = args.beta * (logps - ref_logps if has_reference else logps / lengths)
    chosen, rejected = rewards.unbind(1)
    num_pairs, num_targets = len(logps), len(stats.logps)
    metrics = {
        "loss": (loss, num_pairs),
        "rewards/chosen": (chosen.sum(), num_pairs),
        "rewards/rejected": (rejected.sum(), num_pairs),
        "rewards/margins": ((chosen - rejected).sum(), num_pairs),
        "rewards/accuracies": ((chosen > rejected).sum(), num_pairs),
        "logps/chosen": (logps[:, 0].sum(), num_pairs),
        "logps/rejected": (logps[:, 1].sum(), num_pairs),
        "logits/chosen": (mean_logits[:, 0].sum(), num_pairs),
        "logits/rejected": (mean_logits[:, 1].sum(), num_pairs),
        "entropy": (stats.entropy.sum(), num_targets),
        "mean_token_accuracy": (stats.accuracy.sum(), num_targets),
    }
    return loss, metrics


def reads_label_prob(loss: str) -> bool:
    """Whether soft labels count: simpo has no place for them, and rpo_* follows rewards."""
    return loss != "simpo" and not loss.startswith("rpo")


def check(args: Args) -> None:
    """Refuse settings that cannot go together, before any work starts."""
    is_rpo = args.loss.startswith("rpo")
    used = {"label_smoothing": args.loss in ("dpo", "robust"), "reward_scale": is_rpo}
    used |= dict(simpo_gamma=args.loss == "simpo", precompute_ref=args.loss != "simpo")
    refuse_ignored(args, TOY, f"loss {args.loss}", used)
    if not 0 <= args.label_smoothing < 0.5:
        raise formats.wrong("label_smoothing", args.label_smoothing, "0 to less than 0.5, a coin flip")


def check_pairs(args: Args, pairs: data.Dataset) -> None:
    """Refuse data that lack a field which the loss reads, or have one that it would ignore."""
    num_soft = int((pairs.field("label_prob") < 1).sum())
    if num_soft and not reads_label_prob(args.loss):
        found = f"label_prob below 1, which it ignores, in {num_soft:,} pairs"
        raise formats.wrong(f"loss {args.loss}", found, "pairs without it, or --loss dpo, robust or ipo")
    names = {formats.reward_names(pair.record) for pair in pairs} if args.loss.startswith("rpo") else set()
    ours = "chosen_reward and rejected_reward"
    if "" in names:
        raise formats.wrong(f"loss {args.loss}", "a pair without rewards", ours)
    if names - {ours} and dist.is_main():
        print(f"loss {args.loss}: {', '.join(names - {ours})} are its {ours}", flush=True)


def beside(args: Args) -> dict[str, str]:
    """The models that a run holds beside the policy, and where they are."""
    needs_copy = args.system.lora_rank == 0 and not args.precompute_ref and args.loss != "simpo"
    return {"reference": args.model} if needs_copy else {}


# SimPO's own, section 4 of its paper: gamma is half of beta
Args.presets = {"loss": {"simpo": dict(beta=2.0, simpo_gamma=1.0, sft_coef=0.0)}}
TOY = dict(beta=0.3, sft_coef=0.5, learning_rate=2e-4, warmup_steps=5, batch_size=64, max_steps=40)
TOY |= dict(eval_every=20, num_samples=200)


def main(args: Args, pipeline: Log | None = None) -> None:
    # setup
    device = dist.init(args.seed)
    check(args)
    plan.show(args, beside, sequences=2)
    optimization, system, run = args.optimization, args.system, args.run
    log = Log(run, __file__, SHOWN, snapshot(args, TOY), pipeline)

    # data
    tokenizer = data.load_tokenizer(args.model, **vars(args.chat))
    sources = (args.dataset, args.eval_dataset, args.max_length, args.cut)
    train_set, eval_set = data.load_pairs(tokenizer, *sources)
    for pairs in (train_set, eval_set):
        check_pairs(args, pairs)
    num_steps = data.num_steps(train_set, optimization.batch_size, run.num_epochs, run.max_steps)
    how = (optimization.batch_size, args.seed, run.num_epochs, run.max_steps)  # batches are made
    judge = load_judge(run.judge, args.dataset)
    if log.is_finished(num_steps, files.inputs(args.model, tokenizer, train_set, eval_set)):
        return
    log.start(num_steps, optimization)

    # models
    policy = models.load(args.model, device, system)
    ref_policy = models.load(args.model, device, system, trainable=False) if beside(args) else None
    optimizer = models.adamw(policy, optimization)
    loss = functools.partial(loss_and_metrics, policy, ref_policy, args=args)
    known = {"rewards/margins": 0.0} if args.loss != "simpo" else {}  # while it is the reference
    known |= {"loss": math.log(2)} if args.loss in ("dpo", "robust") and not args.sft_coef else {}
    certificate.training(args, policy, tokenizer, train_set, loss, known)
    if args.precompute_ref:  # before resume() changes the policy, for what this run will see
        reached = [i for step in range(1, num_steps + 1) for i in data.places(train_set, step, *how)]
        train_set = add_reference(policy, train_set, reached, args)
        eval_set = add_reference(policy, eval_set, [*range(len(eval_set))], args)
    parts = {"policy": (policy, optimizer)}
    resumed = checkpoint.resume(run.output_dir, parts)
    start_step, num_tokens = resumed["step"], resumed["num_tokens"]

    def evaluate(step: int) -> dict[str, float]:
        totals = dist.Totals()
        for micro_batch in packed.micro_batches(eval_set, system.micro_batch_tokens, device):
            with torch.no_grad():
                totals.update(loss_and_metrics(policy, ref_policy, micro_batch, args)[1])
        answers = answer(policy, tokenizer, eval_set, run.num_samples, args.sampling, args.seed, step, judge)
        log.samples(step, [a.row() for a in answers])
        return totals.reduce("eval/") | answer_metrics(answers)

    if start_step == 0:
        log(0, num_steps, evaluate(step=0))

    for step in range(start_step + 1, num_steps + 1):
        # update
        step_start = time.perf_counter()
        batch = data.batch(train_set, step, *how)  # the same on every rank
        lr = optimization.learning_rate * models.lr_factor(step, num_steps, optimization)
        models.set_lr(optimizer, lr)
        totals = dist.Totals()
        for micro_batch in packed.micro_batches(batch, system.micro_batch_tokens, device):
            loss, metrics = loss_and_metrics(policy, ref_policy, micro_batch, args)
            (loss / len(batch)).backward()  # gradients add over micro-batches and ranks
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
