"""Direct Preference Optimization (Rafailov et al., 2023), https://arxiv.org/abs/2305.18290

Logistic regression on preference pairs (x, y_w, y_l) with the reward implicit in the policy:

    r(x, y) = beta * log(pi(y|x) / pi_ref(y|x))        Eq. 5; its Z(x) term cancels in a pair
    loss    = -log sigmoid(r(x, y_w) - r(x, y_l))      Eq. 7

and its relatives that use the same four log-probabilities: cDPO, robust DPO, IPO, reward-aware RPO, SimPO.

    python dpo.py --help
    torchrun --nproc_per_node=8 dpo.py --model runs/sft --dataset pairs.jsonl

Shapes: a row packs B pairs as 2B sequences end to end (chosen, rejected, chosen, ...), N tokens in all;
N_targets of them are response tokens, the ones that are scored.

Metrics, results and departures from the papers: docs/dpo.md
"""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import checkpoint, data, dist, files, models
from common.log import Log, parse

TOY = dict(
    beta=0.3,
    sft_coef=0.2,
    learning_rate=3e-4,
    warmup_steps=5,
    batch_size=64,
    max_steps=40,
    eval_every=20,
    num_samples=200,
)
SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm")
TOKEN_MEANS = ("entropy", "mean_token_accuracy")  # the other metrics are means over pairs


@dataclass
class Args:
    """Direct Preference Optimization."""

    model: str = "toy"
    """policy to start from: toy, a run folder, a Hugging Face folder, a hub id, a .gguf file"""
    dataset: str = "toy"
    """preference pairs: toy, .jsonl/.json/.parquet file, folder, hub/name[:config[:split]]; a,b*2 mixes"""
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
    loss: Literal["dpo", "ipo", "ipo_sum", "robust", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl", "simpo"] = "dpo"
    """ipo averages log-ratios over tokens, ipo_sum adds them; rpo_* regress on the rewards of the pair"""
    beta: float = 0.1
    """pull towards the reference policy; larger stays closer"""
    label_smoothing: float = 0.0
    """assumed probability that a label is flipped: with dpo this is cDPO, with robust its unbiased form"""
    reward_scale: float = 1.0
    """rpo: eta, turns a difference of chosen_reward and rejected_reward into logits"""
    simpo_gamma: float = 0.5
    """simpo: margin, in units of beta times the mean log-prob, that chosen must win by"""
    sft_coef: float = 0.0
    """weight of the negative log-likelihood of the chosen response, a mean over its tokens"""
    precompute_ref: bool = False
    """score the reference policy once before training, cached, instead of keeping a frozen copy in memory"""

    # optimization
    learning_rate: float = 5e-7
    """peak learning rate"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """after warm-up: constant, or down to min_lr_ratio at the last step"""
    warmup_steps: int = 150
    """steps of linear warm-up"""
    min_lr_ratio: float = 0.1
    """the last step's share of the peak learning rate, for linear and cosine"""
    weight_decay: float = 0.0
    """AdamW's, on matrices only"""
    max_grad_norm: float = 10.0
    """clip the global gradient norm to this; 0 never clips"""
    num_epochs: int = 1
    """passes over the training data"""
    max_steps: int = -1
    """optimizer steps; -1: as many as num_epochs takes"""
    batch_size: int = 64
    """pairs per optimizer step, over all ranks"""
    micro_batch_tokens: int = 0
    """most tokens of one forward on one rank, memory not result; 0: 8192 on GPU, 2048 on CPU"""
    max_length: int = 1024
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


def dpo_loss(h: Tensor, beta: float, label_prob: Tensor | float = 1.0) -> Tensor:
    """Eq. 7 of the DPO paper; soft labels as in Eq. 3 of cDPO, https://ericmitchell.ai/cdpo.pdf

    Args:
        h: (B,) log-ratio of chosen minus that of rejected, log(pi/pi_ref) each, in nats.
        label_prob: (B,) probability that chosen is truly the better one.

    Returns:
        losses (B,).
    """
    return -label_prob * F.logsigmoid(beta * h) - (1 - label_prob) * F.logsigmoid(-beta * h)


def robust_loss(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Unbiased when labels flip with probability label_smoothing, https://arxiv.org/abs/2403.00409 -> (B,)"""
    kept, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(h: Tensor, beta: float, label_prob: Tensor | float = 1.0) -> Tensor:
    """Eq. 17 of IPO, https://arxiv.org/abs/2310.12036, its tau called beta; h per token or summed. -> (B,)"""
    target = 1 / (2 * beta)
    return label_prob * (h - target) ** 2 + (1 - label_prob) * (h + target) ** 2


def rpo_loss(h: Tensor, beta: float, reward_margin: Tensor, distance: str) -> Tensor:
    """Reward-aware preference optimization, https://arxiv.org/abs/2406.11704: beta h follows the rewards.

    Args:
        reward_margin: (B,) eta * (chosen_reward - rejected_reward), a logit.
        distance: rpo_sq, the squared difference; rpo_bwd_kl, KL(rewards || policy) of the two Bernoullis;
            rpo_fwd_kl, its arguments swapped.

    Returns:
        losses (B,), zero exactly where beta h equals the reward margin.
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
        kept, flipped = (robust_loss(x, args.beta, args.label_smoothing) for x in (h, -h))
        return label_prob * kept + (1 - label_prob) * flipped
    if args.loss == "ipo":
        means = ratios / lengths
        return ipo_loss(means[:, 0] - means[:, 1], args.beta, label_prob)
    if args.loss == "ipo_sum":
        return ipo_loss(h, args.beta, label_prob)
    if args.loss == "simpo":
        return simpo_loss(logps / lengths, args.beta, args.simpo_gamma)
    reward_margin = args.reward_scale * (fields["chosen_reward"] - fields["rejected_reward"])
    return rpo_loss(h, args.beta, reward_margin, args.loss)


def response_logps(token_logps: Tensor, row: data.Row) -> Tensor:
    """log pi(y|x) of every pair in a row: the sum of log p over response tokens. -> (B, 2)"""
    return models.segment_sum(token_logps, row.target_segments, row.num_segments).view(-1, 2)


@torch.no_grad()
def reference_logps(policy: nn.Module, ref_policy: nn.Module | None, row: data.Row) -> Tensor:
    """log pi_ref(y|x), (B, 2): computed before, or by the frozen copy, or by the policy without adapters."""
    if "ref_chosen_logps" in row.fields:
        return torch.stack([row.fields["ref_chosen_logps"], row.fields["ref_rejected_logps"]], 1)
    if ref_policy is None:
        with models.adapters_off(policy):
            return response_logps(models.token_logps(policy, row), row)
    return response_logps(models.token_logps(ref_policy, row), row)


@torch.no_grad()
def precompute_reference(
    policy: nn.Module, examples: list[data.Example], args: Args, device: torch.device
) -> None:
    """Store log pi_ref of each example with it, while the policy is still the reference. Cached."""

    def score() -> Tensor:
        ref_logps = torch.zeros(len(examples), 2, device=device)
        for row in data.rows(examples, args.micro_batch_tokens, device):
            ref_logps[row.example_ids] = response_logps(models.token_logps(policy, row), row)
        return dist.sum_over_ranks(ref_logps)  # each pair was scored by one rank

    ref_logps = files.cached(score, "ref_logps", args.model, args.dtype, [e.sequences for e in examples])
    for example, (chosen, rejected) in zip(examples, ref_logps.tolist(), strict=True):
        example.fields |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def loss_and_metrics(
    policy: nn.Module, ref_policy: nn.Module | None, row: data.Row, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of a row, both summed over its pairs; the caller picks the denominator."""
    stats = models.token_stats(policy, row)  # (N_targets,) each
    logps = response_logps(stats.logps, row)  # (B, 2); a dummy row has B = 0 and a loss of exactly zero
    lengths = response_logps(torch.ones_like(stats.logps), row)
    mean_logits = response_logps(stats.mean_logit, row) / lengths
    ref_logps = torch.zeros_like(logps) if args.loss == "simpo" else reference_logps(policy, ref_policy, row)
    losses = pair_losses(logps, ref_logps, lengths, row.fields, args)
    losses = losses - args.sft_coef * logps[:, 0] / lengths[:, 0]
    loss = losses.sum()
    rewards = args.beta * (logps / lengths if args.loss == "simpo" else logps - ref_logps).detach()
    chosen, rejected = rewards.unbind(1)
    metrics = {
        "loss": loss.detach(),
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).sum(),
        "logps/chosen": logps[:, 0].detach().sum(),
        "logps/rejected": logps[:, 1].detach().sum(),
        "logits/chosen": mean_logits[:, 0].sum(),
        "logits/rejected": mean_logits[:, 1].sum(),
        "entropy": stats.entropy.detach().sum(),
        "mean_token_accuracy": stats.accuracy.sum(),
    }
    return loss, metrics


def means(totals: dict[str, float], batch: list[data.Example], prefix: str) -> dict[str, float]:
    """Metrics of a batch from their sums over all its rows and ranks."""
    num_targets = sum(example.num_targets for example in batch)
    return {f"{prefix}/{k}": v / (num_targets if k in TOKEN_MEANS else len(batch)) for k, v in totals.items()}


def main(args: Args) -> None:
    # setup
    device = dist.init(args.seed)
    log = Log(args, __file__, SHOWN, TOY)

    # data
    tokenizer = data.load_tokenizer(args.model, args.chat_template)
    train_set, eval_set = data.load_pairs(args, tokenizer)
    num_steps = data.num_steps(train_set, args)
    if not log.begin(num_steps):
        return

    # models
    policy = models.load(args.model, device, args)
    frozen_copy = args.lora_rank == 0 and not args.precompute_ref and args.loss != "simpo"
    ref_policy = models.load(args.model, device, args, trainable=False) if frozen_copy else None
    optimizer = torch.optim.AdamW(models.parameter_groups(policy, args.weight_decay), betas=(0.9, 0.95))
    if args.precompute_ref:  # before resume() changes the policy, for what this run will see
        reached = {id(e): e for step in range(1, num_steps + 1) for e in data.batch(train_set, step, args)}
        precompute_reference(policy, [*reached.values(), *eval_set], args, device)
    parts = {"policy": (policy, optimizer)}
    resumed = checkpoint.resume(args, parts)
    start_step, num_tokens = resumed["step"], resumed["num_tokens"]

    def evaluate(step: int) -> dict[str, float]:
        totals = Counter()
        for row in data.rows(eval_set, args.micro_batch_tokens, device):
            with torch.no_grad():
                totals.update(loss_and_metrics(policy, ref_policy, row, args)[1])
        metrics = means(dist.all_sum(totals), eval_set, "eval")
        return metrics | log.samples(step, policy, tokenizer, eval_set)

    if start_step == 0:
        log(0, num_steps, evaluate(step=0))

    for step in range(start_step + 1, num_steps + 1):
        # update
        step_start = time.perf_counter()
        batch = data.batch(train_set, step, args)  # the same on every rank
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * models.lr_factor(step, num_steps, args)
        totals = Counter()
        for row in data.rows(batch, args.micro_batch_tokens, device):  # this rank's share, equally many rows
            loss, metrics = loss_and_metrics(policy, ref_policy, row, args)
            (loss / len(batch)).backward()  # gradients add over rows and ranks: the mean over the batch
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
