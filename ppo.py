"""Proximal Policy Optimization from human feedback, and its relatives without a critic

The policy samples responses y to prompts x, a reward model or a function scores them, and the policy learns
to score more while it stays near a frozen reference (InstructGPT, https://arxiv.org/abs/2203.02155, Eq. 2):

    J(pi) = E[ r(x, y) - kl_coef * log(pi(y|x) / pi_ref(y|x)) ]

Each rollout serves a few minibatches of the clipped surrogate (PPO, https://arxiv.org/abs/1707.06347, Eq. 7)

    loss = -min(ratio_t A_t, clip(ratio_t, 1 - clip_range, 1 + clip_range) A_t)

with A_t by GAE from a value model, or from the other responses to the prompt (RLOO, GRPO, Dr. GRPO).

    python ppo.py --help
    torchrun --nproc_per_node=8 ppo.py --model runs/sft --reward runs/reward_model --dataset prompts.jsonl

Shapes: a rollout has R responses, the longest of L tokens; what belongs to its tokens is a table (R, L), with
a mask that is 1 on tokens the policy sampled: 0 past the end of a response, and between its turns on what
tools or users said. A micro-batch packs some of them; N_targets of its tokens are sampled ones.

Metrics, results and departures from the papers: docs/ppo.md
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common import certificate, checkpoint, data, dist, files, formats, models, packed, plan, rewards
from common.args import Chat, Optimization, Run, Sampling, System, block, parse, refuse_ignored, snapshot
from common.evaluate import answer, answer_metrics, load_judge
from common.generate import generate, to_example
from common.log import Log
from common.packed import Example, MicroBatch

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
    chat: Chat = block(Chat)

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
    algorithm: Literal["ppo", "rloo", "grpo", "dr_grpo", "dapo"] = "ppo"
    """sets the switches below as published, which --help lists; what is given beside it wins"""
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

    optimization: Optimization = block(Optimization, learning_rate=1e-6)
    system: System = block(System)
    run: Run = block(Run, output_dir=f"runs/{Path(__file__).stem}")


def token_rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of each token: -kl_coef * log(pi / pi_ref), and the score at the last sampled one.

    scores: (R,). logps, ref_logps: (R, L) in nats. mask: (R, L) 1 on sampled tokens, at least one each.
    -> (R, L), whose sum over a response is score - kl_coef * log(pi(y|x) / pi_ref(y|x)); 0 between turns.
    """
    rewards = torch.where(mask > 0, -kl_coef * (logps - ref_logps), 0.0)
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask > 0, columns, 0).amax(1, keepdim=True)  # (R, 1)
    return rewards.scatter_add(1, last, scores[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalized advantage estimation, https://arxiv.org/abs/1506.02438, Eq. 16; all (R, L).

    A step of time leads from a sampled token to the next sampled one: gamma and gae_lambda discount it once,
    however many masked tokens stand between them, and the next value is that before the first token of the
    next turn. Masked tokens have advantage 0. After the last sampled token value and advantage are 0.
    """
    advantages = torch.zeros_like(rewards)
    after = value_after = rewards.new_zeros(len(rewards))  # (R,) of the next sampled token
    for t in reversed(range(rewards.shape[1])):
        is_sampled = mask[:, t] > 0
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        after = torch.where(is_sampled, delta + gamma * gae_lambda * after, after)
        value_after = torch.where(is_sampled, values[:, t], value_after)
        advantages[:, t] = torch.where(is_sampled, after, 0.0)
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
    return torch.where(mask > 0, (x - mean * shift) * (variance + 1e-8).rsqrt(), 0.0)


def moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the tokens of a mask (R, L); 0 where every response is masked."""
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask > 0, x, 0.0).sum() / count
    return mean, torch.where(mask > 0, (x - mean).square(), 0.0).sum() / count


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


class Rollout(NamedTuple):
    """Responses and what the update needs of them; `take` makes a minibatch of the same form."""

    examples: list[Example]  # R: prompt and response, scored on the sampled tokens
    kl_coef: float
    starts: Tensor  # (R,) where the response begins in its sequence
    mask: Tensor  # (R, L) 1 on tokens that count in the loss
    logps: Tensor  # (R, L) of the policy that sampled, by the forward that training uses
    ref_logps: Tensor  # (R, L)
    values: Tensor  # (R, L)
    advantages: Tensor  # (R, L)
    returns: Tensor  # (R, L)

    def take(self, chosen: list[int]) -> "Rollout":
        index = torch.tensor(chosen, device=self.mask.device)
        examples = [self.examples[i] for i in chosen]
        return Rollout(examples, self.kl_coef, *(table[index] for table in self[2:]))


def places(micro_batch: MicroBatch, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Where scored tokens stand in a table (R, L): the response and the place in it. (N_targets,) each"""
    response = micro_batch.example_ids[micro_batch.target_segments]
    return response, micro_batch.position_ids[micro_batch.targets] - starts[response]


@torch.no_grad()
def make_rollout(
    examples: list[Example],
    scores: Tensor,
    policy: models.Policy,
    ref_policy: models.Policy | None,
    value_model: models.Scorer | None,
    kl_coef: float,
    running: dict[str, float],
    args: Args,
) -> tuple[Rollout, dict[str, tuple]]:
    """Log-probabilities, values, rewards and advantages of scored responses; metrics as (sum, count).

    Args:
        examples: one for each response, as `to_example` makes them. One of several turns is one sequence
            too, its mask False on what tools or users said between them.
        running: statistics of all scores so far, which normalize_reward needs.
    """
    device = scores.device
    masks = [torch.from_numpy(mask) for example in examples for _, mask in example.sequences]
    starts = [int(mask.int().argmax()) for mask in masks]  # a response begins with its first sampled token
    mask = pad_sequence([mask[i:] for mask, i in zip(masks, starts, strict=True)], batch_first=True)
    mask, starts = mask.float().to(device), torch.tensor(starts, device=device)  # (R, L), (R,)
    lengths, num = mask.sum(1), len(examples)
    ended = torch.tensor([example.fields["ended"] > 0 for example in examples], device=device)

    def table(compute: Callable[[MicroBatch], Tensor]) -> Tensor:
        found = torch.zeros_like(mask)
        for micro_batch in packed.micro_batches(examples, args.system.micro_batch_tokens, device):
            found[places(micro_batch, starts)] = compute(micro_batch)
        return dist.sum_over_ranks(found)  # each response was computed by one rank

    logps = ref_logps = table(lambda micro_batch: policy(micro_batch, args.temperature).logps)
    if args.kl_coef > 0:
        with models.reference(policy, ref_policy) as ref:
            ref_logps = table(lambda micro_batch: ref(micro_batch, args.temperature).logps)
    values = table(lambda micro_batch: models.values(value_model, micro_batch)) if value_model else 0 * mask
    sampler_logps = np.concatenate([example.fields["sampler_logps"] for example in examples])
    gap = (logps[mask > 0] - torch.from_numpy(sampler_logps).to(device)).abs()

    used = rewards.normalize(scores, running) if args.normalize_reward else scores
    used = used.clamp(-args.reward_clip, args.reward_clip) if args.reward_clip else used
    used = torch.where(ended, used, args.missing_eos_penalty) if args.missing_eos == "penalty" else used
    valid = ended if args.missing_eos == "mask" else torch.ones_like(ended)
    counted = mask * valid[:, None]

    penalty = kl_coef if args.kl_placement == "reward" else 0.0
    earned = token_rewards(used, logps, ref_logps, mask, penalty)  # (R, L)
    if args.advantage == "gae":
        earned = whiten(earned, counted, shift=False) if args.whiten_rewards else earned
        advantages = gae(earned, values, mask, args.gamma, args.gae_lambda)
        returns = advantages + values
        advantages = whiten(advantages, counted) if args.whiten_advantages else advantages
    else:
        totals, is_valid = (x.view(-1, args.samples_per_prompt) for x in (earned.sum(1), valid))
        advantages = group_advantages(totals, is_valid, args.advantage).view(-1, 1) * mask
        returns = advantages

    kl, of_prompt = ((logps - ref_logps) * mask).sum(1), scores.view(-1, args.samples_per_prompt)
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
        "frac_reward_zero_std": ((of_prompt.amax(1) == of_prompt.amin(1)).sum(), len(of_prompt)),
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
        left, variance = moments((returns - values).square(), counted)[0], moments(returns, counted)[1]
        metrics["val/explained_variance"] = (1 - left / (variance + 1e-8), 1)
    tables = (counted, logps, ref_logps, values, advantages, returns)
    return Rollout(examples, kl_coef, starts, *tables), metrics


def loss_and_metrics(
    policy: models.Policy, micro_batch: MicroBatch, batch: Rollout, args: Args
) -> tuple[Tensor, dict[str, tuple]]:
    """A micro-batch's share of the minibatch's loss, which nothing divides, and metrics as (sum, count)."""
    stats = policy(micro_batch, args.temperature)  # (N_targets,) each
    at = places(micro_batch, batch.starts)
    weights = token_weights(batch.mask, args.loss_reduction, args.max_new_tokens)[at]
    mean = token_weights(batch.mask, "token_mean", args.max_new_tokens)[at]
    counted = batch.mask[at]  # 0 on the tokens of a response that is left out
    # what does not count is set to 0: times 0 an infinite ratio is NaN, in the loss or in its gradient
    found = (stats.logps, stats.entropy, batch.logps[at], batch.ref_logps[at])
    logps, entropy, old_logps, ref_logps = (torch.where(counted > 0, x, 0.0) for x in found)
    log_ratio, advantages = logps - old_logps, batch.advantages[at]
    ratio = log_ratio.exp()
    losses = policy_losses(ratio, advantages, args.clip_range, args.clip_range_high or args.clip_range)
    policy_loss = (weights * losses).sum()
    loss = policy_loss - args.entropy_coef * (mean * entropy).sum()
    if args.kl_placement == "loss":
        loss = loss + batch.kl_coef * (weights * k3(logps, ref_logps)).sum()
    is_clipped, num_counted = losses != -ratio * advantages, counted.sum()
    metrics = {
        "loss": (loss, 0),  # a sum of shares
        "loss/policy_avg": (policy_loss, 0),
        "policy/approxkl_avg": ((counted * 0.5 * log_ratio.square()).sum(), num_counted),
        "policy/clipfrac_avg": ((counted * is_clipped).sum(), num_counted),
        "policy/entropy_avg": ((counted * entropy).sum(), num_counted),
        "val/ratio": ((counted * ratio).sum(), num_counted),
        "val/ratio_var": ((counted * (ratio - 1).square()).sum(), num_counted),
    }
    return loss, metrics


def value_loss_and_metrics(
    value_model: models.Scorer, micro_batch: MicroBatch, batch: Rollout, args: Args
) -> tuple[Tensor, dict[str, tuple]]:
    """The same of the value model."""
    values = models.values(value_model, micro_batch)  # (N_targets,)
    at = places(micro_batch, batch.starts)
    mean = token_weights(batch.mask, "token_mean", args.max_new_tokens)[at]
    losses = value_losses(values, batch.values[at], batch.returns[at], args.clip_range_value)
    loss, counted = (mean * losses).sum(), batch.mask[at]
    is_clipped = (values - batch.values[at]).abs() > args.clip_range_value
    clipped = ((counted * is_clipped).sum(), counted.sum())
    return loss, {"loss/value_avg": (loss, 0), "val/clipfrac_avg": clipped}


def sample_and_score(
    policy: models.Policy, tokenizer: Any, prompts: list, score: Callable, number: int, args: Args
) -> tuple[list[Example], Tensor, dict[str, float]]:
    """Responses of a rollout, their scores (R,), and the seconds that both took; alike on every rank."""
    start = time.perf_counter()
    tokens = [tokens for prompt in prompts for tokens, _ in prompt.sequences]
    how = {"samples_per_prompt": args.samples_per_prompt, "seed": args.seed, "step": number}
    how |= {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    samples = generate(policy, tokenizer, tokens, **how)
    sampled = time.perf_counter()
    scores = score(prompts, [sample.text for sample in samples])
    times = {"train/time/rollout": sampled - start, "train/time/scoring": time.perf_counter() - sampled}
    return [*map(to_example, samples)], torch.tensor(scores), times


def update(
    part: tuple, lr: float, share: Callable, batch: Rollout, totals: dist.Totals, args: Args
) -> Tensor:
    """One step of part, (model, optimizer), by one of the two functions above. -> gradient norm"""
    (model, optimizer), device = part, batch.mask.device
    models.set_lr(optimizer, lr)
    for micro_batch in packed.micro_batches(batch.examples, args.system.micro_batch_tokens, device):
        loss, metrics = share(model, micro_batch, batch, args)
        loss.backward()  # gradients add over micro-batches and ranks
        totals.update(metrics)
    norm = models.clip_grad_norm(model, args.optimization.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def count_steps(train_set: data.Dataset, args: Args) -> tuple[int, int]:
    """(optimizer steps, steps of each rollout): max_steps, rounded up to whole rollouts, or num_epochs."""
    num_responses, max_steps = args.rollout_size * args.samples_per_prompt, args.run.max_steps
    steps_each = args.num_ppo_epochs * -(-num_responses // args.optimization.batch_size)
    in_epochs = max(1, args.run.num_epochs * train_set.epoch_size // args.rollout_size)
    return (in_epochs if max_steps < 0 else -(-max_steps // steps_each)) * steps_each, steps_each


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
        raise formats.wrong("samples_per_prompt", args.samples_per_prompt, f"2 or more for {args.advantage}")
    if args.temperature <= 0:
        raise formats.wrong("temperature", args.temperature, "more than 0: greedy sampling cannot learn")
    of_values = ("gae_lambda", "whiten_advantages", "whiten_rewards", "clip_range_value")
    of_values += ("value_learning_rate", "value_warmup_steps")
    used = dict.fromkeys(of_values, args.advantage == "gae")
    refuse_ignored(args, TOY, f"advantage {args.advantage}", used)
    if args.kl_target > 0 and args.kl_coef <= 0:
        raise formats.wrong("kl_coef", args.kl_coef, "a start above 0, which kl_target adapts")


def beside(args: Args) -> dict[str, str]:
    """The models that a run holds beside the policy, and where they are."""
    found = {"reference": args.model} if args.kl_coef > 0 and args.system.lora_rank == 0 else {}
    sources = formats.read_sources(args.reward, "reward") if args.reward else []
    found |= {f"reward {name}": name for name, _ in sources if ":" not in name}
    return found | ({"value": args.model} if args.advantage == "gae" else {})


def is_due(step: int, every: int, steps_each: int, num_steps: int) -> bool:
    """Whether a rollout ends with this step, and in it the run or a multiple of `every` steps."""
    return step % steps_each == 0 and (step == num_steps or step // every > (step - steps_each) // every)


# what --algorithm sets, the table of docs/ppo.md
SWITCHES = ("advantage", "samples_per_prompt", "loss_reduction", "clip_range", "kl_placement", "kl_coef")
PUBLISHED = {
    "rloo": ("rloo", 4, "sequence_sum", 1e9, "reward", 0.05),  # never clips
    "grpo": ("grpo", 8, "sequence_mean", 0.2, "loss", 0.04),
    "dr_grpo": ("dr_grpo", 8, "constant", 0.2, "reward", 0.0),
    "dapo": ("grpo", 16, "token_mean", 0.2, "reward", 0.0),
}
ALGORITHMS = {name: dict(zip(SWITCHES, values, strict=True)) for name, values in PUBLISHED.items()}
ALGORITHMS["dapo"]["clip_range_high"] = 0.28
Args.presets = {"algorithm": {"ppo": {}, **ALGORITHMS}}  # ppo: the defaults of Args

TOY = dict(reward="toy.language:reward", rollout_size=128, max_new_tokens=48, value_learning_rate=1e-3)
TOY |= dict(learning_rate=3e-4, warmup_steps=5, batch_size=64, max_steps=32, eval_every=16, num_samples=200)


def main(args: Args, pipeline: Log | None = None) -> None:
    # setup
    device = dist.init(args.seed)
    check(args)
    plan.show(args, beside)
    optimization, system, run = args.optimization, args.system, args.run
    log = Log(run, __file__, SHOWN, snapshot(args, TOY), pipeline)

    # data
    tokenizer = data.load_tokenizer(args.model, **vars(args.chat))
    sources = (args.dataset, args.eval_dataset, args.max_prompt_length)
    train_set, eval_set = data.load_prompts(tokenizer, *sources)
    num_steps, steps_each = count_steps(train_set, args)
    scored_by = rewards.load(args.reward, device, system)
    rewards.check(scored_by, train_set, eval_set)
    judge = load_judge(run.judge, args.dataset)
    if log.is_finished(num_steps, files.inputs(args.model, tokenizer, train_set, eval_set)):
        return
    log.start(num_steps, optimization)

    # models
    policy = models.load(args.model, device, system)
    has_copy = "reference" in beside(args)
    ref_policy = models.load(args.model, device, system, trainable=False) if has_copy else None
    parts, value_model = {"policy": (policy, models.adamw(policy, optimization))}, None
    if args.advantage == "gae":
        # from the first reward model that reads the policy's tokens, else from the policy
        vocabulary = tokenizer.get_vocab()
        alike = [r.name for r in scored_by if r.rater and r.rater.tokenizer.get_vocab() == vocabulary]
        start_from = (*alike, args.model)[0]
        value_model = models.load_scorer(start_from, device, system, ["value"], zero_head=True)
        parts["value"] = (value_model, models.adamw(value_model, optimization))
    networks = (policy, ref_policy, value_model)
    how = {"micro_batch_tokens": system.micro_batch_tokens, "device": device}
    score = functools.partial(rewards.score_replies, scored_by, **how)

    def checks() -> Iterator[certificate.Line]:
        """What --check tries, on a rollout of short responses."""
        short = replace(args, max_new_tokens=min(16, args.max_new_tokens))
        few = certificate.few(train_set)
        examples, scores, _ = sample_and_score(policy, tokenizer, few, score, 0, short)
        rollout, metrics = make_rollout(examples, scores.to(device), *networks, args.kl_coef, {}, short)
        kl = float(metrics["objective/kl"][0]) / len(examples)
        yield certificate.near("KL of a response to the reference", kl, 0.0, 1e-2)
        loss = functools.partial(loss_and_metrics, policy, batch=rollout, args=short)
        known = {"val/ratio": 1.0}
        yield from certificate.of_training(args, policy, tokenizer, train_set, loss, known, examples)

    certificate.run(run, checks())
    resumed = checkpoint.resume(run.output_dir, parts)
    start_step, num_tokens = resumed["step"], resumed["num_tokens"]
    kl_coef, running = resumed.get("kl_coef", args.kl_coef), resumed.get("running", {})

    def evaluate(step: int) -> dict[str, float]:
        sampling = Sampling(args.max_new_tokens, args.temperature)
        how = (run.num_samples, sampling, args.seed, step, judge, score)
        answers = answer(policy, tokenizer, eval_set, *how)
        log.samples(step, [a.row() for a in answers])
        return answer_metrics(answers)

    if start_step == 0:
        log(0, num_steps, evaluate(step=0))

    for number in range(start_step // steps_each + 1, num_steps // steps_each + 1):
        # sample and score
        prompts = data.batch(train_set, number, args.rollout_size, args.seed)  # the same on every rank
        examples, scores, times = sample_and_score(policy, tokenizer, prompts, score, number, args)
        clock = time.perf_counter()
        totals, scores = dist.Totals(), scores.to(device)
        rollout, metrics = make_rollout(examples, scores, *networks, kl_coef, running, args)
        totals.update(metrics)
        rollout_metrics = totals.reduce("train/")
        times["train/time/advantages"] = time.perf_counter() - clock
        num_tokens += sum(example.num_tokens for example in examples)

        for place, chosen in enumerate(minibatches(len(examples), number, args), 1):
            # update
            step, step_start = (number - 1) * steps_each + place, time.perf_counter()
            batch, totals = rollout.take(chosen), dist.Totals()
            factor = models.lr_factor(step, num_steps, optimization)
            if value_model is not None:
                lr = args.value_learning_rate * factor
                norm = update(parts["value"], lr, value_loss_and_metrics, batch, totals, args)
                totals.update({"value_grad_norm": (norm, 1)})
            times["train/time/value"] = time.perf_counter() - step_start
            clock, lr = time.perf_counter(), optimization.learning_rate * factor
            if step > args.value_warmup_steps:
                norm = update(parts["policy"], lr, loss_and_metrics, batch, totals, args)
                totals.update({"grad_norm": (norm, 1)})
            metrics = totals.reduce("train/")  # the step's one synchronisation
            times["train/time/policy"] = time.perf_counter() - clock
            seconds = time.perf_counter() - step_start
            metrics["train/epoch"] = number * args.rollout_size / train_set.epoch_size
            metrics["train/episode"] = number * len(examples)
            metrics |= {"train/num_tokens": num_tokens, "train/learning_rate": lr}
            metrics |= rollout_metrics | times | models.speed(policy, batch.examples, seconds)

            # evaluate, log and save: between rollouts only, so that a resumed run begins with a fresh one
            is_end = place == steps_each
            stop = dist.stop_requested() and is_end
            if is_end and args.kl_target > 0:
                kl_coef = adapt_kl_coef(kl_coef, rollout_metrics["train/objective/kl"], len(examples), args)
            if is_due(step, run.eval_every, steps_each, num_steps):
                metrics |= evaluate(step)
            log(step, num_steps, metrics)
            if stop or is_due(step, run.save_every, steps_each, num_steps):
                checkpoint.save(run, step, parts, num_tokens=num_tokens, kl_coef=kl_coef, running=running)
            if stop and step < num_steps:
                return log.finish(stopped_at=step)

    checkpoint.export(run, policy, tokenizer, args.model)
    log.finish()


if __name__ == "__main__":
    dist.run(main, parse(Args, TOY))
