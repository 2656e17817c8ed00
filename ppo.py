"""Proximal Policy Optimization from human feedback, and its relatives without a critic

The policy samples responses y to prompts x, a reward model or a function scores them, and the policy learns
to score more while it stays near a frozen reference (InstructGPT, https://arxiv.org/abs/2203.02155, Eq. 2):

    J(pi) = E[ r(x, y) - kl_coef * log(pi(y|x) / pi_ref(y|x)) ]

Each rollout serves a few minibatches of the clipped surrogate (PPO, https://arxiv.org/abs/1707.06347, Eq. 7)

    loss = -min(ratio_t A_t, clip(ratio_t, 1 - clip_range, 1 + clip_range) A_t)

with A_t by generalized advantage estimation from a value model, or from the other responses to the prompt:
RLOO, GRPO, Dr. GRPO.

    python ppo.py --help
    torchrun --nproc_per_node=8 ppo.py --model runs/sft --reward runs/reward_model --dataset prompts.jsonl

Shapes: a rollout has R responses, the longest of L tokens; what belongs to its tokens is a table (R, L), zero
past the end of a response. A row packs some of them; N_targets of its tokens are response tokens.

Metrics, results and departures from the papers: docs/ppo.md
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tyro.conf import OmitArgPrefixes

from common import checkpoint, data, dist, models
from common.args import Optimization, Run, Sampling, System, load_function, parse, snapshot
from common.evaluate import answer, answer_metrics, load_judge
from common.generate import Sample, generate, to_example
from common.log import Log

SHOWN = ("objective/scores", "objective/kl", "loss/policy_avg", "policy/entropy_avg", "grad_norm")


@dataclass
class Args:
    """Proximal Policy Optimization."""

    model: str = "toy"
    """policy to start from: toy, a run folder, a Hugging Face folder, a hub id, a .gguf file"""
    dataset: str = "toy"
    """prompts: toy, .jsonl/.json/.parquet file, folder, hub/name[:config[:split]]; a,b*2 mixes"""
    eval_dataset: str = ""
    """held-out data; default: the data set's test split, else 5 % of its prompts"""
    seed: int = 1
    """seed of the order of data and of samples"""
    chat_template: str = ""
    """chat template that replaces the tokenizer's: a Jinja file, or chatml"""

    # reward
    reward: str = ""
    """a reward model (run folder, folder, hub id) or package.module:function; a,b*0.5 adds several"""
    normalize_reward: bool = False
    """subtract the running mean of the scores and divide by their running standard deviation"""
    reward_clip: float = 0.0
    """clip scores to plus and minus this; 0 never clips"""
    missing_eos: Literal["penalty", "mask", "keep"] = "penalty"
    """a response cut off at max_new_tokens gets missing_eos_penalty, is left out of the loss, or is kept"""
    missing_eos_penalty: float = -1.0
    """the score that replaces that of a response cut off"""

    # algorithm
    advantage: Literal["gae", "rloo", "grpo", "dr_grpo"] = "gae"
    """gae needs a value model; the others compare the samples_per_prompt responses to a prompt"""
    loss_reduction: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "token_mean"
    """loss: mean over tokens of the batch, or over responses, each divided by length, 1 or max_new_tokens"""
    kl_coef: float = 0.05
    """weight of the divergence from the reference policy; 0 loads no reference"""
    kl_placement: Literal["reward", "loss"] = "reward"
    """the divergence is a penalty in the reward of each token (k1), or a term of the loss (k3)"""
    kl_target: float = 0.0
    """adapt kl_coef until objective/kl is this many nats a response; 0 keeps it fixed"""
    kl_horizon: float = 10000.0
    """responses in which kl_coef changes by at most a fifth of itself, with kl_target"""
    clip_range: float = 0.2
    """the ratio is clipped from below at 1 - clip_range"""
    clip_range_high: float = 0.0
    """the ratio is clipped from above at 1 + clip_range_high; 0: at 1 + clip_range"""
    gamma: float = 1.0
    """discount of the rewards of later tokens, per token"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation: 0 trusts the values, 1 the rewards"""
    whiten_advantages: bool = True
    """gae: give the advantages of a rollout mean 0 and variance 1"""
    whiten_rewards: bool = False
    """gae: divide token rewards by their standard deviation over a rollout"""
    clip_range_value: float = 0.2
    """values move at most this far from those of the rollout in the clipped value loss"""
    value_learning_rate: float = 9e-6
    """peak learning rate of the value model"""
    value_warmup_steps: int = 0
    """first optimizer steps in which only the value model learns"""
    entropy_coef: float = 0.0
    """weight of the mean entropy of a token, which is maximised"""

    # rollouts
    rollout_size: int = 512
    """prompts of a rollout"""
    samples_per_prompt: int = 1
    """responses to each prompt"""
    num_ppo_epochs: int = 1
    """passes over the responses of a rollout"""
    max_prompt_length: int = 1024
    """most tokens of a prompt; one with more is dropped, and counted"""
    max_new_tokens: int = 512
    """most tokens of a response"""
    temperature: float = 1.0
    """temperature of sampling and of every log-probability"""

    optimization: OmitArgPrefixes[Optimization] = field(
        default_factory=lambda: Optimization(learning_rate=1e-6)
    )
    system: OmitArgPrefixes[System] = field(default_factory=System)
    run: OmitArgPrefixes[Run] = field(default_factory=lambda: Run(output_dir=f"runs/{Path(__file__).stem}"))


# ------------------------------------------------------------------------------------------------- the maths


def token_rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of each token: -kl_coef * log(pi / pi_ref), and the score at the last one.

    Args:
        scores: (R,). logps, ref_logps: (R, L) of the sampled tokens, nats. mask: (R, L) 1 on response tokens.

    Returns:
        (R, L), whose sum over a response is score - kl_coef * log(pi(y|x) / pi_ref(y|x)).
    """
    rewards = -kl_coef * (logps - ref_logps) * mask
    last = mask.sum(1).long() - 1
    return rewards.scatter_add(1, last[:, None], scores[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalized advantage estimation, https://arxiv.org/abs/1506.02438, Eq. 16; all (R, L).

    Nothing comes after the last token of a response: value and advantage are 0 there.
    """
    advantages, after, value_after = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        after = advantages[:, t] = (delta + gamma * gae_lambda * after) * mask[:, t]
        value_after = values[:, t] * mask[:, t]
    return advantages


def group_advantages(returns: Tensor, valid: Tensor, kind: str) -> Tensor:
    """Advantage of each of the k responses to a prompt over the others; all (prompts, k).

    rloo: R_i less the mean of the others, https://arxiv.org/abs/2402.14740; grpo: less the mean of all, over
    their corrected standard deviation, https://arxiv.org/abs/2402.03300; dr_grpo: less the mean of all,
    https://arxiv.org/abs/2503.20783. A response that is not valid is none of them and has 0.
    """
    count = valid.sum(1, keepdim=True)
    deviation = (returns - (returns * valid).sum(1, keepdim=True) / count.clamp(min=1)) * valid
    if kind == "rloo":
        return deviation * count / (count - 1).clamp(min=1)
    if kind == "grpo":
        variance = deviation.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        return deviation / (variance.sqrt() + 1e-4)
    return deviation


def whiten(x: Tensor, mask: Tensor, shift: bool = True) -> Tensor:
    """Unit variance, and mean 0 with shift, over all tokens of a rollout; biased variance. (R, L)"""
    mean, variance = moments(x, mask)
    return (x - mean * shift) * (variance + 1e-8).rsqrt() * mask


def moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the tokens of a mask (R, L); 0 where every response is masked."""
    count = mask.sum().clamp(min=1)
    mean = (x * mask).sum() / count
    return mean, ((x - mean).square() * mask).sum() / count


def policy_losses(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Eq. 7 of PPO for each token, with a range of its own above 1 (DAPO, https://arxiv.org/abs/2503.14476)."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Half the squared error of each token, the worse of the value and of it clipped to the old one."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """An estimate of KL(pi || pi_ref) that is never negative, http://joschu.net/blog/kl-approx.html"""
    log_ratio = ref_logps - logps
    return log_ratio.exp() - 1 - log_ratio


def token_weights(mask: Tensor, reduction: str, max_new_tokens: int) -> Tensor:
    """What each token counts in the loss of a minibatch, which is then a plain sum. mask, result: (B, L)"""
    if reduction == "token_mean":
        return mask / mask.sum().clamp(min=1)
    lengths = mask.sum(1, keepdim=True)
    num_responses = (lengths > 0).sum().clamp(min=1)
    divisor = {"sequence_mean": lengths.clamp(min=1), "sequence_sum": 1, "constant": max_new_tokens}
    return mask / divisor[reduction] / num_responses


def adapt_kl_coef(kl_coef: float, kl: float, num_responses: int, args: Args) -> float:
    """Proportional control towards kl_target, https://arxiv.org/abs/1909.08593, section 2.2."""
    error = min(0.2, max(-0.2, kl / args.kl_target - 1))
    return kl_coef * (1 + error * num_responses / args.kl_horizon)


# --------------------------------------------------------------------------------------------------- rewards


class Reward(NamedTuple):
    """A function, or a reward model with its own tokenizer."""

    weight: float
    name: str
    function: Callable | None
    scorer: nn.Module | None
    tokenizer: Any


def load_rewards(args: Args, device: torch.device) -> list[Reward]:
    rewards = []
    for source, weight in data.read_sources(args.reward or "-", "reward"):
        if source == "-":
            raise dist.RunError("reward is not set: a reward model's folder, or package.module:function")
        if ":" in source:
            rewards.append(Reward(weight, source, load_function(source), None, None))
        else:
            frozen = models.load_scorer(source, device, args.system, trainable=False)
            if frozen.config.num_labels > 1:
                found = ", ".join(models.output_names(frozen))
                raise dist.RunError(f"reward {source} has the outputs {found}; expected one")
            rewards.append(Reward(weight, source, None, frozen, data.load_tokenizer(source)))
    return rewards


def score(
    rewards: list[Reward], examples: list[data.Example], texts: list[str], args: Args, device: Any
) -> Tensor:
    """The weighted sum of all rewards of responses to these examples, on every rank. -> (R,) float32

    Raises:
        RunError: a function raises, or does not return one finite number a response.
    """
    total = torch.zeros(len(texts), device=device)
    for reward in rewards:
        if reward.function:
            total += reward.weight * torch.tensor(call(reward, examples, texts), device=device)
            continue
        sequences = []
        for example, text in zip(examples, texts, strict=True):
            prompt = example.prompt
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            reply = [{"role": "assistant", "content": text}]
            sequences.append(data.encode_response(reward.tokenizer, prompt, reply))
        scored = [data.Example([sequence], "") for sequence in sequences]
        outputs = models.score(reward.scorer, scored, args.system.micro_batch_tokens, device)
        total += reward.weight * outputs[:, 0]
    return total


def call(reward: Reward, examples: list[data.Example], texts: list[str]) -> list[float]:
    """A reward function's numbers; the ranks share the prompts, all responses to one stay together."""
    size = dist.world_size()
    keys = {key: i for i, key in enumerate(dict.fromkeys(map(id, examples)))}
    groups = [[i for i, e in enumerate(examples) if keys[id(e)] % size == part] for part in range(size)]

    def attempt(chosen: list[int]) -> list[float]:
        if not chosen:
            return []
        prompts, replies = [examples[i].prompt for i in chosen], [texts[i] for i in chosen]
        shown = f"the first prompt was {prompts[0]!r}"
        try:
            found = [
                float(x) for x in reward.function(prompts, replies, [examples[i].record for i in chosen])
            ]
        except Exception as error:  # a user's function may raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise dist.RunError(f"reward {reward.name} raised {reason}; {shown}") from error
        if len(found) != len(chosen):
            raise dist.RunError(
                f"reward {reward.name} gave {len(found)} numbers for {len(chosen)} responses; {shown}"
            )
        for i, number in zip(chosen, found, strict=True):
            if not math.isfinite(number):
                raise dist.RunError(
                    f"reward {reward.name} gave {number} for {texts[i]!r} to {examples[i].prompt!r}"
                )
        return found

    numbers: dict[int, float] = {}
    for chosen, found in zip(groups, dist.parallel_map(attempt, groups), strict=True):
        numbers |= dict(zip(chosen, found, strict=True))
    return [numbers[i] for i in range(len(texts))]


# -------------------------------------------------------------------------------------------------- rollouts


class Rollout(NamedTuple):
    """Responses and what the update needs of them; `take` makes a minibatch of the same form."""

    sequences: list[data.Example]  # R: prompt and response
    prompt_lengths: Tensor  # (R,)
    mask: Tensor  # (R, L) 1 on tokens that count in the loss
    logps: Tensor  # (R, L) of the policy that sampled, by the forward that training uses
    ref_logps: Tensor  # (R, L)
    values: Tensor  # (R, L)
    advantages: Tensor  # (R, L)
    returns: Tensor  # (R, L)

    def take(self, chosen: list[int]) -> "Rollout":
        index = torch.tensor(chosen, device=self.mask.device)
        return Rollout([self.sequences[i] for i in chosen], *(table[index] for table in self[1:]))


def places(row: data.Row, prompt_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Where a row's scored tokens stand in a table (R, L): response and place in it. (N_targets,) each"""
    response = row.example_ids[row.target_segments]
    return response, row.position_ids[row.targets] - prompt_lengths[response]


@torch.no_grad()
def tabulate(
    compute: Callable, sequences: list, prompt_lengths: Tensor, like: Tensor, micro_batch_tokens: int
) -> Tensor:
    """compute(row) for all tokens of the responses, on every rank. -> (R, L)"""
    table = torch.zeros_like(like)
    for row in data.rows(sequences, micro_batch_tokens, like.device):
        table[places(row, prompt_lengths)] = compute(row)
    return dist.sum_over_ranks(table)  # each response was computed by one rank


def normalize(scores: Tensor, running: dict[str, float]) -> Tensor:
    """Scores by the mean and standard deviation of all so far, these included; updates `running`."""
    count, mean, square = (running.get(k, 0.0) for k in ("count", "mean", "square"))
    total = count + len(scores)
    mean = (count * mean + scores.sum().item()) / total
    square = (count * square + scores.square().sum().item()) / total
    running.update(count=total, mean=mean, square=square)
    return (scores - mean) / max(1e-6, math.sqrt(max(0.0, square - mean**2)))


def roll_out(
    samples: list[Sample],
    scores: Tensor,
    policy: nn.Module,
    ref_policy: nn.Module | None,
    value_model: nn.Module | None,
    kl_coef: float,
    running: dict[str, float],
    args: Args,
) -> tuple[Rollout, dict[str, tuple]]:
    """Log-probabilities, values, rewards and advantages of scored responses; metrics as (sum, count)."""
    device = scores.device
    sequences = [to_example(sample) for sample in samples]
    lengths = torch.tensor([len(sample.tokens) for sample in samples], device=device)
    prompt_lengths = torch.tensor([len(sample.prompt_tokens) for sample in samples], device=device)
    ended = torch.tensor([sample.ended for sample in samples], device=device)
    mask = (torch.arange(int(max(lengths)), device=device) < lengths[:, None]).float()  # (R, L)

    def table(compute: Callable) -> Tensor:
        return tabulate(compute, sequences, prompt_lengths, mask, args.system.micro_batch_tokens)

    logps = table(lambda row: models.token_logps(policy, row, args.temperature))
    ref_logps = logps
    if ref_policy is not None:
        ref_logps = table(lambda row: models.token_logps(ref_policy, row, args.temperature))
    elif args.kl_coef > 0:
        with models.adapters_off(policy):
            ref_logps = table(lambda row: models.token_logps(policy, row, args.temperature))
    values = torch.zeros_like(mask)
    if value_model is not None:
        values = table(lambda row: models.values(value_model, row))
    sampled = [logp for sample in samples for logp in sample.logps]
    gap = (logps[mask.bool()] - torch.tensor(sampled, device=device)).abs()

    used = normalize(scores, running) if args.normalize_reward else scores
    used = used.clamp(-args.reward_clip, args.reward_clip) if args.reward_clip else used
    used = torch.where(ended, used, args.missing_eos_penalty) if args.missing_eos == "penalty" else used
    valid = ended if args.missing_eos == "mask" else torch.ones_like(ended)
    counted = mask * valid[:, None]

    rewards = token_rewards(used, logps, ref_logps, mask, kl_coef if args.kl_placement == "reward" else 0.0)
    if args.advantage == "gae":
        rewards = whiten(rewards, counted, shift=False) if args.whiten_rewards else rewards
        advantages = gae(rewards, values, mask, args.gamma, args.gae_lambda)
        returns = advantages + values
        advantages = whiten(advantages, counted) if args.whiten_advantages else advantages
    else:
        groups = (-1, args.samples_per_prompt)
        advantages = group_advantages(rewards.sum(1).view(groups), valid.view(groups), args.advantage)
        advantages = advantages.view(-1, 1) * mask
        returns = advantages

    kl, groups = ((logps - ref_logps) * mask).sum(1), scores.view(-1, args.samples_per_prompt)
    num = len(samples)
    metrics = {
        "objective/scores": (scores.sum(), num),
        "objective/scores_std": (scores.std(correction=0), 1),
        "objective/kl": (kl.sum(), num),
        "objective/k3": ((k3(logps, ref_logps) * mask).sum(), num),
        "objective/entropy": (-(logps * mask).sum(), num),
        "objective/non_score_reward": (-kl_coef * kl.sum(), num),
        "objective/rlhf_reward": ((scores - kl_coef * kl).sum(), num),
        "objective/kl_coef": (kl_coef, 1),
        "objective/ref_perplexity": ((-(ref_logps * mask).sum() / mask.sum()).exp(), 1),
        "frac_reward_zero_std": ((groups.amax(1) == groups.amin(1)).sum(), len(groups)),
        "completions/mean_length": (lengths.sum(), num),
        "completions/min_length": (lengths.min(), 1),
        "completions/max_length": (lengths.max(), 1),
        "completions/clipped_ratio": ((~ended).sum(), num),
        "val/num_eos_tokens": (ended.sum(), 1),
        "advantages_std": (moments(advantages, counted)[1].sqrt(), 1),
        "sampler_logp_gap_mean": (gap.sum(), len(gap)),
        "sampler_logp_gap_max": (gap.max(), 1),
    }
    if value_model is not None:
        left, _ = moments((returns - values).square(), counted)
        explained = 1 - left / (moments(returns, counted)[1] + 1e-8)
        metrics["val/explained_variance"] = (explained, 1)
    rollout = Rollout(sequences, prompt_lengths, counted, logps, ref_logps, values, advantages, returns)
    return rollout, metrics


# ------------------------------------------------------------------------------------------------ the updates


def loss_and_metrics(
    policy: nn.Module, row: data.Row, batch: Rollout, kl_coef: float, args: Args
) -> tuple[Tensor, dict[str, tuple]]:
    """A row's share of the minibatch's loss, which nothing divides any more, and metrics as (sum, count)."""
    stats = models.token_stats(policy, row, args.temperature)  # (N_targets,) each
    at = places(row, batch.prompt_lengths)
    weights = token_weights(batch.mask, args.loss_reduction, args.max_new_tokens)[at]
    mean = token_weights(batch.mask, "token_mean", args.max_new_tokens)[at]
    log_ratio = stats.logps - batch.logps[at]
    ratio, advantages = log_ratio.exp(), batch.advantages[at]
    losses = policy_losses(ratio, advantages, args.clip_range, args.clip_range_high or args.clip_range)
    policy_loss = (weights * losses).sum()
    loss = policy_loss - args.entropy_coef * (mean * stats.entropy).sum()
    if args.kl_placement == "loss":
        loss = loss + kl_coef * (weights * k3(stats.logps, batch.ref_logps[at])).sum()
    counted = batch.mask[at]  # 0 on the tokens of a response that is left out
    is_clipped = losses != -ratio * advantages
    metrics = {
        "loss": (loss, 0),  # a sum of shares
        "loss/policy_avg": (policy_loss, 0),
        "policy/approxkl_avg": ((counted * 0.5 * log_ratio.square()).sum(), counted.sum()),
        "policy/clipfrac_avg": ((counted * is_clipped).sum(), counted.sum()),
        "policy/entropy_avg": ((counted * stats.entropy).sum(), counted.sum()),
        "val/ratio": ((counted * ratio).sum(), counted.sum()),
        "val/ratio_var": ((counted * (ratio - 1).square()).sum(), counted.sum()),
    }
    return loss, metrics


def value_loss_and_metrics(
    value_model: nn.Module, row: data.Row, batch: Rollout, args: Args
) -> tuple[Tensor, dict[str, tuple]]:
    """The same of the value model."""
    values = models.values(value_model, row)  # (N_targets,)
    at = places(row, batch.prompt_lengths)
    mean = token_weights(batch.mask, "token_mean", args.max_new_tokens)[at]
    losses = value_losses(values, batch.values[at], batch.returns[at], args.clip_range_value)
    loss, counted = (mean * losses).sum(), batch.mask[at]
    is_clipped = (values - batch.values[at]).abs() > args.clip_range_value
    metrics = {
        "loss/value_avg": (loss, 0),
        "val/clipfrac_avg": ((counted * is_clipped).sum(), counted.sum()),
    }
    return loss, metrics


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr: float,
    compute: Callable[..., tuple[Tensor, dict]],
    batch: Rollout,
    totals: dist.Totals,
    args: Args,
) -> Tensor:
    """One optimizer step on a minibatch, whose metrics go into totals. -> the norm of the gradient

    Args:
        compute: (model, row, batch) -> the row's share of the loss, and its metrics.
    """
    models.set_lr(optimizer, lr)
    for row in data.rows(batch.sequences, args.system.micro_batch_tokens, batch.mask.device):
        loss, metrics = compute(model, row, batch)
        loss.backward()  # gradients add over rows and ranks
        totals.update(metrics)
    norm = models.clip_grad_norm(model, args.optimization.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def count_steps(train_set: data.Dataset, args: Args) -> tuple[int, int]:
    """(rollouts, optimizer steps of each): max_steps, rounded up to whole rollouts, or num_epochs."""
    num_responses = args.rollout_size * args.samples_per_prompt
    steps_each = args.num_ppo_epochs * -(-num_responses // args.optimization.batch_size)
    if args.run.max_steps >= 0:
        return -(-args.run.max_steps // steps_each), steps_each
    return max(1, args.run.num_epochs * train_set.epoch_size // args.rollout_size), steps_each


def minibatches(num_responses: int, number: int, args: Args) -> list[list[int]]:
    """Responses of each optimizer step of a rollout: a function of (seed, rollout), alike on every rank."""
    chosen, batch_size = [], args.optimization.batch_size
    for epoch in range(args.num_ppo_epochs):
        order = np.random.default_rng([args.seed, number, epoch]).permutation(num_responses).tolist()
        chosen += [order[i : i + batch_size] for i in range(0, num_responses, batch_size)]
    return chosen


def check(args: Args) -> None:
    """Refuse settings that cannot go together, before any work starts."""
    if args.advantage != "gae" and args.samples_per_prompt < 2:
        raise dist.RunError(
            f"advantage {args.advantage} compares responses: set samples_per_prompt to 2 or more"
        )
    if args.temperature <= 0:
        raise dist.RunError(
            "temperature 0 is greedy and has no probabilities to learn from; expected more than 0"
        )
    if args.kl_target > 0 and args.kl_coef <= 0:
        raise dist.RunError("kl_target adapts kl_coef, which is 0; expected a start above 0")


def load_value_model(args: Args, rewards: list[Reward], tokenizer: Any, device: torch.device) -> nn.Module:
    """From the first reward model that reads the policy's tokens, else from the policy; its head is zero."""
    alike = (r.name for r in rewards if r.scorer and r.tokenizer.get_vocab() == tokenizer.get_vocab())
    return models.load_scorer(next(alike, args.model), device, args.system, ["value"], zero_head=True)


def is_due(step: int, every: int, steps_each: int) -> bool:
    """Whether a multiple of `every` is among the steps_each steps that end with this one."""
    return step // every > (step - steps_each) // every


TOY = dict(
    reward="toy.language:reward",
    rollout_size=128,
    learning_rate=3e-4,
    value_learning_rate=1e-3,
    warmup_steps=5,
    batch_size=64,
    max_steps=60,
    max_new_tokens=48,
    eval_every=20,
    num_samples=200,
)


def main(args: Args, pipeline: Log | None = None) -> None:
    # setup
    device = dist.init(args.seed)
    check(args)
    optimization, system, run = args.optimization, args.system, args.run
    log = Log(run, __file__, SHOWN, snapshot(args, TOY), pipeline)

    # data
    tokenizer = data.load_tokenizer(args.model, args.chat_template)
    train_set, eval_set = data.load_prompts(
        tokenizer, args.dataset, args.eval_dataset, args.max_prompt_length
    )
    num_rollouts, steps_each = count_steps(train_set, args)
    num_steps = num_rollouts * steps_each
    rewards = load_rewards(args, device)
    judge = load_judge(run.judge, args.dataset)
    if log.is_finished(num_steps):
        return
    log.start()

    # models
    policy = models.load(args.model, device, system)
    frozen_copy = args.kl_coef > 0 and system.lora_rank == 0
    ref_policy = models.load(args.model, device, system, trainable=False) if frozen_copy else None
    groups = models.parameter_groups(policy, optimization.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    parts, value_model = {"policy": (policy, optimizer)}, None
    if args.advantage == "gae":
        value_model = load_value_model(args, rewards, tokenizer, device)
        groups = models.parameter_groups(value_model, optimization.weight_decay)
        value_optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        parts["value"] = (value_model, value_optimizer)
    resumed = checkpoint.resume(run.output_dir, parts)
    start_step, num_tokens = resumed["step"], resumed["num_tokens"]
    kl_coef, running = resumed.get("kl_coef", args.kl_coef), resumed.get("running", {})

    def evaluate(step: int) -> dict[str, float]:
        def reward_of(examples: list[data.Example], texts: list[str]) -> list[float]:
            return score(rewards, examples, texts, args, device).tolist()

        sampling = Sampling(args.max_new_tokens, args.temperature)
        answers = answer(
            policy, tokenizer, eval_set, run.num_samples, sampling, args.seed, step, judge, reward_of
        )
        log.samples(step, [a.row() for a in answers])
        return answer_metrics(answers)

    if start_step == 0:
        log(0, num_steps, evaluate(step=0))

    for number in range(start_step // steps_each + 1, num_rollouts + 1):
        # sample and score
        clock = time.perf_counter()
        prompts = data.batch(train_set, number, args.rollout_size, args.seed)  # the same on every rank
        samples = generate(
            policy,
            tokenizer,
            [example.sequences[0][0] for example in prompts],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            samples_per_prompt=args.samples_per_prompt,
            seed=args.seed,
            step=number,
        )
        times = {"train/time/rollout": time.perf_counter() - clock}
        clock = time.perf_counter()
        asked = [prompts[sample.prompt_index] for sample in samples]
        scores = score(rewards, asked, [sample.text for sample in samples], args, device)
        times["train/time/scoring"] = time.perf_counter() - clock
        clock = time.perf_counter()
        rollout, metrics = roll_out(samples, scores, policy, ref_policy, value_model, kl_coef, running, args)
        totals = dist.Totals()
        totals.update(metrics)
        rollout_metrics = totals.reduce("train/")
        times["train/time/advantages"] = time.perf_counter() - clock
        num_tokens += sum(sequence.num_tokens for sequence in rollout.sequences)

        for i, chosen in enumerate(minibatches(len(samples), number, args)):
            # update
            step_start = time.perf_counter()
            step = (number - 1) * steps_each + i + 1
            factor = models.lr_factor(step, num_steps, optimization)
            batch, totals = rollout.take(chosen), dist.Totals()
            if value_model is not None:
                compute = functools.partial(value_loss_and_metrics, args=args)
                lr = args.value_learning_rate * factor
                norm = update(value_model, value_optimizer, lr, compute, batch, totals, args)
                totals.update({"value_grad_norm": (norm, 1)})
            times["train/time/value"] = time.perf_counter() - step_start
            clock, lr = time.perf_counter(), optimization.learning_rate * factor
            if step > args.value_warmup_steps:
                compute = functools.partial(loss_and_metrics, kl_coef=kl_coef, args=args)
                norm = update(policy, optimizer, lr, compute, batch, totals, args)
                totals.update({"grad_norm": (norm, 1)})
            metrics = totals.reduce("train/")  # the step's one synchronisation
            times["train/time/policy"] = time.perf_counter() - clock
            metrics |= {
                "train/epoch": number * args.rollout_size / train_set.epoch_size,
                "train/episode": number * len(samples),
                "train/num_tokens": num_tokens,
                "train/learning_rate": lr,
            }
            metrics |= rollout_metrics | times
            metrics |= models.speed(policy, batch.sequences, time.perf_counter() - step_start)
            if i + 1 < steps_each:
                log(step, num_steps, metrics)

        if args.kl_target > 0:
            kl_coef = adapt_kl_coef(kl_coef, rollout_metrics["train/objective/kl"], len(samples), args)

        # evaluate, log and save: between rollouts only
        stop, is_last = dist.stop_requested(), number == num_rollouts
        if is_due(step, run.eval_every, steps_each) or is_last:
            metrics |= evaluate(step)
        log(step, num_steps, metrics)
        if is_due(step, run.save_every, steps_each) or is_last or stop:
            checkpoint.save(run, step, parts, num_tokens=num_tokens, kl_coef=kl_coef, running=running)
        if stop and not is_last:
            return log.finish(stopped_at=step)

    checkpoint.export(run.output_dir, policy, tokenizer, args.model, run.merge_lora)
    log.finish()


if __name__ == "__main__":
    dist.run(main, parse(Args, TOY))
