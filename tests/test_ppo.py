"""ppo.py: its equations by hand, its rollouts with samples made by hand, what it refuses, and short runs."""

import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import args_of, means, read_metrics
from torch import Tensor

import ppo
from common import checkpoint, data, dist, models, packed, rewards
from common.args import describe_preset, flat, parse
from common.generate import Sample, generate, to_example


def close(found: Tensor, expected: Any, tolerance: float = 1e-4) -> None:
    expected = torch.tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def prefix_mask(*lengths: int) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float()


# generalized advantage estimation

R, V, ONES = torch.tensor([[-0.1, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.2]]), torch.ones(1, 3)


def test_gae_with_lambda_0_is_the_one_step_error() -> None:
    values, rewards = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    advantages = ppo.gae(rewards, values, torch.ones(1, 4), gamma=0.5, gae_lambda=0.0)
    # .5 * 1 - 0, .5 * 2 - 1, 1 + .5 * 3 - 2, 0 - 3
    close(advantages, [[0.5, 0.0, 0.5, -3.0]])
    close(advantages + values, [[0.5, 1.0, 2.5, 0.0]])


def test_gae_with_lambda_95_by_hand() -> None:
    # deltas -.1 + .4 - .5 = -.2, .2 - .4 = -.2, 1 - .2 = .8; -.2 + .95 * .8 = .56, -.2 + .95 * .56 = .332
    advantages = ppo.gae(R, V, ONES, gamma=1.0, gae_lambda=0.95)
    close(advantages, [[0.332, 0.56, 0.8]])
    close(advantages + V, [[0.832, 0.96, 1.0]])


def test_gae_with_lambda_1_is_the_reward_to_go_less_the_value() -> None:
    advantages = ppo.gae(R, V, ONES, gamma=1.0, gae_lambda=1.0)
    close(advantages, [[0.4, 0.6, 0.8]])
    close(advantages + V, [[0.9, 1.0, 1.0]])


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_what_stands_past_the_end_of_a_response_changes_nothing(gae_lambda: float) -> None:
    alone = ppo.gae(R, V, ONES, 0.9, gae_lambda)
    junk = torch.tensor([[7.0, -9.0]])
    rewards, values = torch.cat([R, junk], 1), torch.cat([V, 3 * junk], 1)
    padded = ppo.gae(rewards, values, torch.tensor([[1.0, 1, 1, 0, 0]]), 0.9, gae_lambda)
    close(padded, [[*alone[0].tolist(), 0.0, 0.0]], 1e-6)


# masks with gaps: two turns with what a tool said between them, which the policy did not sample

GAP = torch.tensor([[1.0, 1, 0, 0, 1]])


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_credit_flows_through_a_gap_as_if_it_were_not_there(gae_lambda: float) -> None:
    def spread(x: Tensor, junk: float) -> Tensor:
        return torch.cat([x[:, :2], torch.full((1, 2), junk), x[:, 2:]], 1)

    alone = ppo.gae(R, V, ONES, 0.9, gae_lambda)  # gamma discounts sampled tokens only
    found = ppo.gae(spread(R, 5.0), spread(V, -7.0), GAP, 0.9, gae_lambda)
    torch.testing.assert_close(found, spread(alone, 0.0), atol=0, rtol=0)


def test_gae_over_a_gap_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0, 0, 0, 1]]), torch.tensor([[0.5, 0.4, 9.0, 9, 0.2]])
    advantages = ppo.gae(rewards, values, GAP, gamma=0.5, gae_lambda=0.5)
    # deltas .5 * .4 - .5 = -.3, .5 * .2 - .4 = -.3, 1 - .2 = .8; -.3 + .25 * .8 = -.1, -.3 - .25 * .1
    close(advantages, [[-0.325, -0.1, 0, 0, 0.8]])


def test_the_score_stands_at_the_last_sampled_token() -> None:
    mask = torch.tensor([[1.0, 1, 0, 0, 1, 1], [1, 0, 0, 1, 0, 0]])
    logps, infinite = torch.full((2, 6), -1.0), torch.where(mask > 0, -2.0, -math.inf)
    rewards = ppo.token_rewards(torch.tensor([1.0, 2.0]), logps, infinite, mask, kl_coef=0.1)
    close(rewards, [[-0.1, -0.1, 0, 0, -0.1, 0.9], [-0.1, 0, 0, 1.9, 0, 0]])


def test_whitening_leaves_gaps_out() -> None:
    x = torch.tensor([[1.0, math.nan, 2.0], [3.0, math.inf, 4.0]])
    mask = torch.tensor([[1.0, 0, 1], [1, 0, 1]])
    close(ppo.whiten(x, mask), [[-1.3416, 0.0, -0.4472], [0.4472, 0.0, 1.3416]])


def test_weights_count_sampled_tokens() -> None:
    mask = torch.tensor([[1.0, 0, 0, 1], [1, 1, 0, 1]])
    close(ppo.token_weights(mask, "token_mean", 9), [[0.2, 0, 0, 0.2], [0.2, 0.2, 0, 0.2]])
    close(ppo.token_weights(mask, "sequence_mean", 9), [[1 / 4, 0, 0, 1 / 4], [1 / 6, 1 / 6, 0, 1 / 6]])


# rewards


def test_the_score_stands_at_the_last_token() -> None:
    mask = prefix_mask(2, 4)
    rewards = ppo.token_rewards(torch.tensor([1.0, 2.0]), mask, -mask, mask, kl_coef=0.0)
    close(rewards, [[0.0, 1, 0, 0], [0, 0, 0, 2]])


def test_a_larger_gap_to_the_reference_lowers_token_rewards() -> None:
    logps, ref_logps = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    rewards = ppo.token_rewards(torch.tensor([3.0]), logps, ref_logps, torch.ones(1, 2), kl_coef=0.1)
    close(rewards, [[-0.05, 3.1]])  # -.1 * .5; 3 - .1 * -1
    wider = ppo.token_rewards(torch.tensor([3.0]), logps, ref_logps - 1, torch.ones(1, 2), kl_coef=0.1)
    assert (wider < rewards).all()


def test_token_rewards_add_up_to_score_less_penalty() -> None:
    mask, (logps, ref_logps) = prefix_mask(3, 1, 5), torch.randn(2, 3, 5)
    scores = torch.randn(3)
    total = ppo.token_rewards(scores, logps, ref_logps, mask, 0.3).sum(1)
    torch.testing.assert_close(total, scores - 0.3 * ((logps - ref_logps) * mask).sum(1))


def test_kl_estimators_over_five_outcomes() -> None:
    policy, uniform = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]), torch.full((5,), 0.2)
    kl = (policy * (policy / uniform).log()).sum().item()
    assert kl == pytest.approx(0.2171, abs=5e-5)
    assert (policy * ppo.k3(policy.log(), uniform.log())).sum().item() == pytest.approx(kl, abs=1e-6)
    assert (policy * (policy / uniform).log().abs()).sum().item() == pytest.approx(0.5807, abs=5e-5)  # not it


def test_k3_is_never_negative() -> None:
    # log(ref / pi) = 1 and -1: e - 2 and 1 / e
    close(ppo.k3(torch.tensor([-2.0, -1.0, -1.0]), torch.tensor([-1.0, -2.0, -1.0])), [0.71828, 0.36788, 0.0])


# advantages of a group

GROUP, ALL = torch.tensor([[1.0, 0.0, -3.0, 5.0]]), torch.ones(1, 4, dtype=torch.bool)


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    # baselines 2/3, 1, 2, -2/3
    close(ppo.group_advantages(GROUP, ALL, "rloo"), [[1 / 3, -1.0, -5.0, 17 / 3]])


def test_rloo_without_a_masked_response() -> None:
    # of 2, 7, -1: the others' means are 3, .5, 4.5
    valid = torch.tensor([[True, True, True, False]])
    found = ppo.group_advantages(torch.tensor([[2.0, 7.0, -1.0, 99.0]]), valid, "rloo")
    close(found, [[-1.0, 6.5, -5.5, 0.0]])


def test_grpo_divides_by_the_corrected_deviation() -> None:
    # mean .75, squared deviations sum to 32.75: (32.75 / 3)^.5 = 3.3040; over 4 it would be .0874 first
    close(ppo.group_advantages(GROUP, ALL, "grpo"), [[0.0757, -0.2270, -1.1350, 1.2863]])


def test_dr_grpo_does_not_divide() -> None:
    close(ppo.group_advantages(GROUP, ALL, "dr_grpo"), [[0.25, -0.75, -3.75, 4.25]])


@pytest.mark.parametrize("kind", ["rloo", "grpo", "dr_grpo"])
def test_a_group_all_alike_or_all_masked_has_no_advantage(kind: str) -> None:
    close(ppo.group_advantages(torch.full((1, 4), 0.5), ALL, kind), [[0.0] * 4])
    close(ppo.group_advantages(GROUP, ~ALL, kind), [[0.0] * 4])


# whitening


def test_whitening_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # mean 2.5, biased variance 1.25
    close(ppo.whiten(x, torch.ones(2, 2)), [[-1.3416, -0.4472], [0.4472, 1.3416]])
    close(ppo.whiten(x, torch.ones(2, 2), shift=False), [[0.8944, 1.7889], [2.6833, 3.5777]])


def test_masked_tokens_do_not_enter_whitening() -> None:
    x, mask = torch.tensor([[1.0, 2.0, 50.0], [3.0, 4.0, -9.0]]), torch.tensor([[1.0, 1, 0], [1, 1, 0]])
    close(ppo.whiten(x, mask), [[-1.3416, -0.4472, 0.0], [0.4472, 1.3416, 0.0]])


def test_whitening_nothing_is_zero() -> None:
    close(ppo.whiten(torch.ones(2, 3), torch.zeros(2, 3)), [[0.0] * 3] * 2)


# losses


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss"), [(1, 1.5, -1.2), (1, 0.5, -0.5), (-1, 1.5, 1.5), (-1, 0.5, 0.8)]
)
def test_the_clip_by_hand(advantage: float, ratio: float, loss: float) -> None:
    found = ppo.policy_losses(torch.tensor([ratio]), torch.tensor([float(advantage)]), 0.2, 0.2)
    close(found, [loss])


def test_the_clip_has_a_range_of_its_own_above() -> None:
    ratios = torch.tensor([1.5, 0.5])
    close(ppo.policy_losses(ratios, torch.tensor([1.0, -1.0]), 0.2, 0.28), [-1.28, 0.8])


def test_a_clipped_token_has_no_gradient() -> None:
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5], requires_grad=True)
    ppo.policy_losses(ratio, torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2, 0.2).sum().backward()
    assert ratio.grad.tolist() == [0.0, -1.0, 1.0, 0.0]


def test_the_value_loss_by_hand() -> None:
    # V 1, old .5, return 2: (1 - 2)^2 = 1, clipped to .7: 1.69; half of the worse
    args = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([2.0])
    assert ppo.value_losses(*args, 0.2).item() == pytest.approx(0.845, abs=1e-6)


@pytest.mark.parametrize(
    ("reduction", "weights"),
    [
        ("token_mean", [[1 / 4, 0, 0], [0, 0, 0], [1 / 4, 1 / 4, 1 / 4]]),  # 4 tokens
        ("sequence_mean", [[1 / 2, 0, 0], [0, 0, 0], [1 / 6, 1 / 6, 1 / 6]]),  # 2 responses of 1 and 3
        ("sequence_sum", [[1 / 2, 0, 0], [0, 0, 0], [1 / 2, 1 / 2, 1 / 2]]),
        ("constant", [[1 / 20, 0, 0], [0, 0, 0], [1 / 20, 1 / 20, 1 / 20]]),  # max_new_tokens 10
    ],
)
def test_token_weights_by_hand(reduction: str, weights: list) -> None:
    mask = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 1]])  # the second is masked
    found = ppo.token_weights(mask, reduction, max_new_tokens=10)
    close(found, weights, 1e-7)
    if reduction in ("token_mean", "sequence_mean"):
        assert found.sum().item() == pytest.approx(1.0)
    assert not ppo.token_weights(0 * mask, reduction, 10).any()


# control and bookkeeping


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.15), (6.6, 0.15 * 1.0064), (60.0, 0.15 * 1.0128), (0.0, 0.15 * 0.9872)],
)
def test_kl_coef_moves_by_a_clipped_share_of_the_error(kl: float, expected: float) -> None:
    # target 6: errors 0, .1, and 9 and -1 clipped to +-.2; times 640 / 10,000
    args = args_of(ppo.Args, kl_target=6.0, kl_horizon=10_000.0)
    assert ppo.adapt_kl_coef(0.15, kl, 640, args) == pytest.approx(expected, rel=1e-9)


def test_running_statistics_of_two_rollouts_are_those_of_all_scores() -> None:
    first, second = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([-4.0, 0.5])
    running: dict[str, float] = {}
    rewards.normalize(first, running)
    found = rewards.normalize(second, running)
    both = torch.cat([first, second])
    torch.testing.assert_close(found, (second - both.mean()) / both.std(correction=0))
    assert running["count"] == 5


def test_minibatches_cover_each_response_once_an_epoch() -> None:
    args = args_of(ppo.Args, seed=3, batch_size=4, num_ppo_epochs=2)
    chosen = ppo.minibatches(10, 7, args)
    assert [len(part) for part in chosen] == [4, 4, 2] * 2
    epochs = [sum(chosen[:3], []), sum(chosen[3:], [])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2 and epochs[0] != epochs[1]
    np.random.seed(99)  # noqa: NPY002
    torch.manual_seed(99)
    assert chosen == ppo.minibatches(10, 7, args) != ppo.minibatches(10, 8, args)
    assert chosen != ppo.minibatches(10, 7, args_of(ppo.Args, seed=4, batch_size=4, num_ppo_epochs=2))


def test_steps_are_whole_rollouts() -> None:
    def counted(**settings: Any) -> tuple[int, int]:
        prompts = data.Dataset([([packed.Example([], "")] * 100, 1.0)])
        return ppo.count_steps(prompts, args_of(ppo.Args, rollout_size=16, samples_per_prompt=2, **settings))

    # 32 responses in batches of 10: 4 steps, twice
    assert counted(batch_size=10, num_ppo_epochs=2, max_steps=9) == (16, 8)
    assert counted(batch_size=10, num_ppo_epochs=2, max_steps=16) == (16, 8)
    assert counted(batch_size=32, num_epochs=2) == (12, 1)  # 200 prompts, of which 8 are left over


# rollouts with samples made by hand


def made(device: torch.device, policy: Any, ended: tuple[bool, ...], **settings: Any) -> tuple:
    """make_rollout for responses of 3, 1, 4, 2, ... tokens to one prompt, which score 1, 2, 3, ..."""
    rng, samples = np.random.default_rng(0), []
    prompt = rng.integers(10, 60, 5).tolist()
    for i, end in enumerate(ended):
        tokens = rng.integers(10, 60, (3, 1, 4, 2)[i]).tolist()
        samples.append(Sample(0, i, prompt, tokens, [0.0] * len(tokens), end, ""))
    args = args_of(ppo.Args, **{"kl_coef": 0.0, "whiten_advantages": False, "gae_lambda": 1.0, **settings})
    scores = torch.arange(1.0, 1 + len(ended), device=device)
    rollout, metrics = ppo.make_rollout(
        [*map(to_example, samples)], scores, policy, None, None, 0.0, {}, args
    )
    return rollout, means(metrics), args


@pytest.fixture(scope="module")
def policy(tiny_model: str, device: torch.device) -> Any:
    return models.load(tiny_model, device, ppo.Args().system)


def first_advantages(rollout: ppo.Rollout) -> list[float]:
    return rollout.advantages[:, 0].tolist()  # with lambda 1 and no values: the score


def test_a_response_cut_off_gets_the_penalty_instead_of_its_score(policy: Any, device: Any) -> None:
    rollout, metrics, _ = made(device, policy, (True, False, True), missing_eos_penalty=-5.0)
    assert first_advantages(rollout) == [1.0, -5.0, 3.0]
    assert rollout.mask.sum(1).tolist() == [3, 1, 4]
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 / 3)
    assert metrics["val/num_eos_tokens"] == 2
    assert metrics["objective/scores"] == 2.0  # of what was scored, not of the penalty
    lengths = [metrics[f"completions/{name}_length"] for name in ("min", "mean", "max")]
    assert lengths == pytest.approx([1, 8 / 3, 4])


def test_a_response_cut_off_is_kept_or_masked(policy: Any, device: torch.device) -> None:
    rollout, _, _ = made(device, policy, (True, False, True), missing_eos="keep")
    assert first_advantages(rollout) == [1.0, 2.0, 3.0]
    rollout, _, _ = made(device, policy, (True, False, True), missing_eos="mask")
    assert rollout.mask.sum(1).tolist() == [3, 0, 4]


def test_a_masked_response_is_no_baseline_for_the_others(policy: Any, device: torch.device) -> None:
    group = {"advantage": "rloo", "samples_per_prompt": 4, "missing_eos": "mask"}
    rollout, _, _ = made(device, policy, (True, True, True, False), **group)
    assert first_advantages(rollout) == pytest.approx([-1.5, 0.0, 1.5, 0.0])  # of 1, 2, 3


def test_a_masked_response_has_no_gradient(policy: Any, device: torch.device) -> None:
    rollout, _, args = made(device, policy, (True, False), missing_eos="mask")
    micro_batch = packed.make_micro_batch(rollout.examples, [1], device)
    loss, metrics = ppo.loss_and_metrics(policy, micro_batch, rollout, args)
    assert loss.item() == 0.0 and metrics["policy/entropy_avg"][0].item() == 0.0


@pytest.mark.parametrize("whitened", [True, False])
def test_a_rollout_all_masked_has_a_loss_of_zero_and_finite_metrics(
    policy: Any, device: torch.device, whitened: bool
) -> None:
    settings = {"missing_eos": "mask", "whiten_rewards": whitened}
    rollout, metrics, args = made(device, policy, (False, False), **settings)
    micro_batch = packed.make_micro_batch(rollout.examples, [0, 1], device)
    loss, _ = ppo.loss_and_metrics(policy, micro_batch, rollout, args)
    assert loss.item() == 0.0 and all(math.isfinite(value) for value in metrics.values())


def test_scores_are_clipped(policy: Any, device: torch.device) -> None:
    rollout, _, _ = made(device, policy, (True, True, True), reward_clip=1.5)
    assert first_advantages(rollout) == [1.0, 1.5, 1.5]


@pytest.mark.parametrize(("last", "share"), [(0.1, 1.0), (0.2, 0.0)])
def test_a_group_all_alike_is_counted_whatever_its_score(
    policy: Any, device: torch.device, last: float, share: float
) -> None:
    args = args_of(ppo.Args, kl_coef=0.0, samples_per_prompt=7, advantage="grpo")
    samples = [Sample(0, i, [11, 12], [20], [0.0], True, "") for i in range(7)]
    scores = torch.tensor([0.1] * 6 + [last], device=device)  # the std of seven times .1 is 7e-9
    _, metrics = ppo.make_rollout([*map(to_example, samples)], scores, policy, None, None, 0.0, {}, args)
    assert means(metrics)["frac_reward_zero_std"] == share


def test_returns_are_those_before_whitening(policy: Any, device: torch.device) -> None:
    rollout, _, _ = made(device, policy, (True, True), whiten_advantages=True)
    assert rollout.returns[:, 0].tolist() == [1.0, 2.0]
    # advantages 1, 1, 1 and 2: mean 1.25, deviation 3^.5 / 4
    assert first_advantages(rollout) == pytest.approx([-1 / 3**0.5, 3**0.5], abs=1e-4)


def test_tables_hold_each_response_in_its_own_place(policy: Any, device: torch.device) -> None:
    together, _, _ = made(device, policy, (True, True, True))
    for i, sequence in enumerate(together.examples):
        alone = models.token_logps(policy, packed.make_micro_batch([sequence], [0], device)).detach()
        torch.testing.assert_close(together.logps[i, : len(alone)], alone, atol=1e-5, rtol=0)
        assert not together.logps[i, len(alone) :].any()


# the loss through the model


def test_gradients_raise_what_scored_well_and_k3_pulls_back(policy: Any, device: torch.device) -> None:
    rollout, _, args = made(device, policy, (True, True), kl_placement="loss")
    micro_batch = packed.make_micro_batch(rollout.examples, [0, 1], device)
    plain, _ = ppo.loss_and_metrics(policy, micro_batch, rollout, args)
    # scores 1 on three tokens, 2 on one, ratio 1: the loss is minus the mean advantage
    assert plain.item() == pytest.approx(-5 / 4, abs=1e-5)
    away = rollout._replace(ref_logps=rollout.logps - 1, kl_coef=0.1)  # k3 of log(ref / pi) = -1 is 1 / e
    pulled, _ = ppo.loss_and_metrics(policy, micro_batch, away, args)
    assert (pulled - plain).item() == pytest.approx(0.1 / math.e, abs=1e-5)


@pytest.mark.parametrize("kl_placement", ["reward", "loss"])
def test_an_infinite_ratio_of_a_masked_token_is_no_nan(policy: Any, device: Any, kl_placement: str) -> None:
    settings = {"missing_eos": "mask", "kl_placement": kl_placement}
    rollout, _, args = made(device, policy, (True, False, True), **settings)
    far = torch.where(rollout.mask > 0, rollout.logps, -1e4)  # exp(1e4) is infinite
    far_ref = torch.where(rollout.mask > 0, rollout.ref_logps, 1e4)
    micro_batch = packed.make_micro_batch(rollout.examples, [0, 1, 2], device)

    def gradient(batch: ppo.Rollout) -> tuple[float, Tensor]:
        loss, metrics = ppo.loss_and_metrics(policy, micro_batch, batch._replace(kl_coef=0.1), args)
        loss.backward()
        found = torch.cat([p.grad.flatten() for p in policy.parameters()])
        policy.zero_grad()
        assert all(math.isfinite(value) for value in means(metrics).values())
        return loss.item(), found

    loss, expected = gradient(rollout)
    for batch in (rollout._replace(logps=far), rollout._replace(logps=far, ref_logps=far_ref)):
        again, found = gradient(batch)
        assert again == loss and torch.equal(found, expected) and expected.any()


PROMPT, RESULT = [5, 6, 7], [11, 12, 13]


def two_turns(policy: Any, tokenizer: Any, number: int) -> list[packed.Example]:
    """64 responses to one prompt: a turn of up to 4 tokens, what a tool said, another turn."""
    turn = {"max_new_tokens": 4, "seed": 3, "step": number}
    said = generate(policy, tokenizer, [PROMPT] * 64, **turn)
    so_far = [PROMPT + sample.tokens + RESULT for sample in said]
    replies = generate(policy, tokenizer, so_far, first_index=64, **turn)
    examples = []
    for first, second in zip(said, replies, strict=True):
        example = to_example(second)
        _, mask = example.sequences[0]
        mask[len(PROMPT) : len(PROMPT) + len(first.tokens)] = True
        example.fields["sampler_logps"] = np.array(first.logps + second.logps, np.float32)
        examples.append(example)
    return examples


def test_two_turns_with_an_observation_train_what_was_sampled_only(
    tiny_model: str, tokenizer: Any, device: torch.device
) -> None:
    args = args_of(ppo.Args, kl_coef=0.0, gae_lambda=1.0, missing_eos="keep")
    policy, scored, wins = models.load(tiny_model, device, args.system), [], []
    optimizer = torch.optim.AdamW(models.parameter_groups(policy, 0.0), lr=1e-2)

    def watched(micro_batch: Any, temperature: float) -> Any:
        stats = policy(micro_batch, temperature)
        stats.logps.retain_grad()
        scored.append(stats.logps)
        return stats

    for number in range(24):
        examples = two_turns(policy, tokenizer, number)
        # the first token of the first turn decides the score, which stands at the end of the second
        first_tokens = [int(tokens[len(PROMPT)]) for e in examples for tokens, _ in e.sequences]
        scores = torch.tensor([float(token % 2) for token in first_tokens], device=device)
        wins.append(scores.mean().item())
        rollout, metrics = ppo.make_rollout(examples, scores, policy, None, None, 0.0, {}, args)
        assert means(metrics)["sampler_logp_gap_max"] < 1e-4
        assert torch.equal((rollout.advantages != 0).float(), rollout.mask)

        micro_batch = packed.make_micro_batch(examples, [*range(64)], device)
        ppo.loss_and_metrics(watched, micro_batch, rollout, args)[0].backward()
        has_gradient = torch.zeros_like(rollout.mask)
        has_gradient[ppo.places(micro_batch, rollout.starts)] = (scored[-1].grad != 0).float()
        assert torch.equal(has_gradient, rollout.mask)  # each sampled token, of both turns, and no other
        assert all(m[4:8] == [0, 0, 0, 1] for m in rollout.mask.tolist() if m[3])  # a first turn of 4 tokens
        optimizer.step()
        optimizer.zero_grad()
    assert np.mean(wins[-3:]) > np.mean(wins[:3]) + 0.2, wins


def test_entropy_is_maximised(policy: Any, device: torch.device) -> None:
    rollout, _, args = made(device, policy, (True, True))
    micro_batch = packed.make_micro_batch(rollout.examples, [0, 1], device)
    plain, metrics = ppo.loss_and_metrics(policy, micro_batch, rollout, args)
    args.entropy_coef = 0.5
    more, _ = ppo.loss_and_metrics(policy, micro_batch, rollout, args)
    assert (more - plain).item() == pytest.approx(-0.5 * means(metrics)["policy/entropy_avg"], abs=1e-5)


# rewards of a run


def fondness(prompts: list, responses: list[str], examples: list[dict]) -> list[float]:
    """How many times a reply says "the", the bandit's arm."""
    assert all(
        isinstance(prompt, list) and "answer" in e for prompt, e in zip(prompts, examples, strict=True)
    )
    return [float(len(re.findall(r"\bthe\b", text.lower()))) for text in responses]


def length(prompts: list, responses: list[str], examples: list[dict]) -> list[float]:
    return [float(len(text)) for text in responses]


def raises(prompts: list, responses: list[str], examples: list[dict]) -> list[float]:
    raise KeyError("nothing\nof the sort")


def nan(prompts: list, responses: list[str], examples: list[dict]) -> list[float]:
    return [float("nan")] * len(prompts)


def too_few(prompts: list, responses: list[str], examples: list[dict]) -> list[float]:
    return [1.0]


ASKED = [
    packed.Example([], prompt=[{"role": "user", "content": text}], record={"answer": ""}) for text in "pqr"
]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"test_ppo:raises raised KeyError: .*test_ppo.py:\d+\); .*'content': 'p'"),
        ("nan", r"test_ppo:nan gave nan for 'a b' to .*'content': 'p'"),
        ("too_few", r"test_ppo:too_few gave 1 numbers for 3 responses.*'content': 'p'"),
    ],
)
def test_a_bad_reward_function_is_named_with_the_prompt(name: str, message: str, device: Any) -> None:
    args = args_of(ppo.Args, reward=f"test_ppo:{name}")
    with pytest.raises(dist.RunError, match=message):
        rewards.score_replies(
            rewards.load(args.reward, device, args.system), ASKED, ["a b", "c", "d"], 0, device
        )


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def mute(prompts: list, responses: list[str], examples: list[dict]) -> list[float]:
    raise Mute


async def later(prompts: list, responses: list[str], examples: list[dict]) -> list[float]:
    return [1.0] * 3


def of_tokens(completions: list, completion_ids: list, trainer_state: Any = None) -> list[float]:
    return [1.0] * 3


def returned(prompts: list, responses: list[str], examples: list[dict]) -> Any:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    return RETURNED[0]


RETURNED: list = [None]
NONE = "gave None for response 2, for a reply to be left out as in TRL, and no number"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "gave NoneType, None, and no list of numbers"),
        ({"a": 1, "b": 2, "c": 3}, "gave dict, .*, and no list of numbers"),
        ({1.0, 2.0, 3.0}, "gave set, "),
        ((x for x in (1.0, 2.0, 3.0)), "gave generator, "),
        (torch.tensor(1.0), "gave Tensor, .*, and no list of numbers"),
        ("123", "gave str, '123', and no list of numbers"),
        ([1.0, "1", 2.0], "gave '1' for response 2, and no number"),
        ([1.0, None, 2.0], NONE),
        (np.array([1j, 2, 3]), r"gave np.complex128\(1j\) for response 1, and no number"),
        ([[1.0, 2.0], 1.0, 2.0], r"gave \[1.0, 2.0\] for response 1, and no number"),
        ([1.0, math.nan, 2.0], "gave nan for 'c' to "),
        ([10**400, 1.0, 2.0], "gave inf for 'a b' to "),
        ([1.0], "gave 1 numbers for 3 responses"),
    ],
)
def test_what_is_no_list_of_real_numbers_is_refused_with_the_function(
    found: Any, message: str, device: Any
) -> None:
    line = inspect.getsourcelines(returned)[1]
    RETURNED[0] = found
    loaded = rewards.load("test_ppo:returned", device, ppo.Args().system)
    with pytest.raises(dist.RunError, match=f"reward test_ppo:returned {message}") as error:
        rewards.score_replies(loaded, ASKED, ["a b", "c", "d"], 0, device)
    assert f"({__file__}:{line})" in str(error.value) and "\n" not in str(error.value)
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "found",
    [(1, 2, True), np.float32([1, 2, 1]), torch.tensor([[1], [2], [1]]), [torch.tensor(1), np.int8(2), 1.0]],
)
def test_real_numbers_of_python_numpy_and_torch_are_rewards(found: Any, device: Any) -> None:
    RETURNED[0] = found
    loaded = rewards.load("test_ppo:returned", device, ppo.Args().system)
    assert rewards.score_replies(loaded, ASKED, ["a b", "c", "d"], 0, device) == [1, 2, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mute",
            r"mute raised Mute: without a text \(ValueError in its __str__\) \(.*test_ppo.py:\d+\); ",
        ),
        ("later", r"later: found an async function \(.*test_ppo.py:\d+\); expected a plain one"),
        (
            "of_tokens",
            r"of_tokens cannot be called: .*'completion_ids'; there are answer, completions, prompts ",
        ),
    ],
)
def test_a_reward_that_cannot_be_called_is_told_in_one_line(name: str, message: str, device: Any) -> None:
    with pytest.raises(dist.RunError, match=message) as error:
        loaded = rewards.load(f"test_ppo:{name}", device, ppo.Args().system)
        rewards.score_replies(loaded, ASKED, ["a b", "c", "d"], 0, device)
    assert "\n" not in str(error.value)


def as_in_trl(completions: list, answer: list[str], **kwargs: Any) -> list[float]:
    assert kwargs["prompts"][0] in ("p", [{"role": "user", "content": "p"}])
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(text == right) for text, right in zip(texts, answer, strict=True)]


def as_in_trl_by_name(prompts: list, completions: list) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize("as_text", [True, False])
def test_a_reward_function_of_trl_is_called_as_in_trl(as_text: bool, device: Any) -> None:
    """With lists of messages, or texts where the data have texts, and the fields of the records by name."""
    asked = [
        packed.Example([], "p" if as_text else [{"role": "user", "content": "p"}], record={"answer": "b"})
    ]
    for name, expected in (("as_in_trl", [0, 1]), ("as_in_trl_by_name", [2, 1] if as_text else [1, 1])):
        found = rewards.load(f"test_ppo:{name}", device, args_of(ppo.Args).system)
        assert rewards.score_replies(found, asked, ["ab", "b"], 0, device) == expected


def make_scorer(folder: Path, model: str, tokenizer: Any, names: list[str], seed: int = 0) -> str:
    torch.manual_seed(seed)
    scorer = models.read_scorer(model, None, names, zero_head=False)
    scorer.config.pad_token_id = tokenizer.pad_token_id
    scorer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, tokenizer: Any) -> str:
    return make_scorer(tmp_path_factory.mktemp("scorer"), tiny_model, tokenizer, ["reward"])


def test_a_reward_model_scores_prompt_and_response(reward_model: str, tokenizer: Any, device: Any) -> None:
    args = args_of(ppo.Args, reward=reward_model)
    found = rewards.score_replies(
        rewards.load(args.reward, device, args.system), ASKED, ["a b", "c", "d"], 0, device
    )
    plain = models.read_pretrained(reward_model, auto_class="AutoModelForSequenceClassification")
    for i, text in enumerate(["a b", "c", "d"]):
        tokens, _ = data.encode_response(tokenizer, ASKED[i].prompt, [{"role": "assistant", "content": text}])
        expected = plain(torch.tensor(tokens[None], dtype=torch.long)).logits[0, 0].item()
        assert found[i] == pytest.approx(expected, abs=1e-5)


def test_two_rewards_are_their_weighted_sum(reward_model: str, device: torch.device) -> None:
    def scores(reward: str) -> Tensor:
        loaded = rewards.load(reward, device, ppo.Args().system)
        return torch.tensor(rewards.score_replies(loaded, ASKED, ["a b", "c", "d"], 0, device))

    mixed = scores(f"{reward_model}*0.5,test_ppo:length*2")
    torch.testing.assert_close(mixed, 0.5 * scores(reward_model) + 2 * torch.tensor([3.0, 1.0, 1.0]))


def test_replies_to_one_prompt_stay_together_in_the_order_given(device: torch.device) -> None:
    loaded = rewards.load("test_ppo:length", device, ppo.Args().system)
    replies = ["a", "ab", "abc", "b", "bc", "bcd"]  # two to each of three prompts
    assert rewards.score_replies(loaded, ASKED, replies, 0, device) == [1, 2, 3, 1, 2, 3]


def test_an_attribute_model_is_no_reward(
    tmp_path: Path, tiny_model: str, tokenizer: Any, device: torch.device
) -> None:
    folder = make_scorer(tmp_path, tiny_model, tokenizer, ["helpfulness", "verbosity"])
    with pytest.raises(dist.RunError, match="helpfulness, verbosity; expected one"):
        rewards.load(folder, device, ppo.Args().system)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": ""}, "reward is not set"),
        ({"advantage": "rloo"}, "samples_per_prompt: found 1; expected 2 or more for rloo"),
        ({"temperature": 0.0}, "temperature: found 0.0; expected more than 0"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_coef: found 0.0; expected a start above 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(dist.RunError, match=message):
        ppo.main(args_of(ppo.Args, **{**ppo.TOY, "output_dir": str(tmp_path / "run"), **settings}))


# published variants by name

PUBLISHED = {  # advantage, samples_per_prompt, loss_reduction, clip below and above, kl_placement, kl_coef
    "ppo": ("gae", 1, "token_mean", 0.2, 0.0, "reward", 0.05),
    "rloo": ("rloo", 4, "sequence_sum", 1e9, 0.0, "reward", 0.05),
    "grpo": ("grpo", 8, "sequence_mean", 0.2, 0.0, "loss", 0.04),
    "dr_grpo": ("dr_grpo", 8, "constant", 0.2, 0.0, "reward", 0.0),
    "dapo": ("grpo", 16, "token_mean", 0.2, 0.28, "reward", 0.0),
}


def parsed(monkeypatch: pytest.MonkeyPatch, *words: str) -> ppo.Args:
    monkeypatch.setattr("sys.argv", ["ppo.py", *words])
    return parse(ppo.Args, ppo.TOY)


def switches(args: ppo.Args) -> tuple:
    clip = (args.clip_range, args.clip_range_high)
    kl = (args.kl_placement, args.kl_coef)
    return (args.advantage, args.samples_per_prompt, args.loss_reduction, *clip, *kl)


@pytest.mark.parametrize("algorithm", PUBLISHED)
@pytest.mark.parametrize("model", ["toy", "runs/sft"])
def test_an_algorithm_is_its_published_switches(
    algorithm: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parsed(monkeypatch, f"--algorithm={algorithm}", "--model", model)
    assert switches(args) == PUBLISHED[algorithm]
    ppo.check(args)
    assert (args.rollout_size == ppo.TOY["rollout_size"]) == (model == "toy")


def test_what_is_given_beside_an_algorithm_wins_even_if_it_is_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("--kl_coef", "0.05", "--samples_per_prompt=1", "--algorithm", "grpo", "--clip-range=0.3")
    args = parsed(monkeypatch, *words)  # grpo has kl_coef .04 and 8 samples
    assert switches(args) == ("grpo", 1, "sequence_mean", 0.3, 0.0, "loss", 0.05)
    assert describe_preset("algorithm grpo", ppo.ALGORITHMS["grpo"], flat(args)) == (
        "algorithm grpo: advantage=grpo loss_reduction=sequence_mean kl_placement=loss"
        "; but samples_per_prompt=1 clip_range=0.3 kl_coef=0.05"
    )


def test_a_sweep_varies_the_algorithm_and_what_is_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    args = parsed(monkeypatch, "--algorithm=dapo", "--kl_coef=0.01")
    assert switches(args) == (*PUBLISHED["dapo"][:-1], 0.01)
    assert args.run.track and args.run.output_dir.endswith("ppo-abc")


def test_a_run_says_what_its_algorithm_set_and_keeps_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = f"--output_dir={tmp_path}/run"
    small = ["--rollout_size=4", "--samples_per_prompt=2", "--batch_size=8"]
    small += ["--max_new_tokens=20", "--num_samples=0"]

    def go(algorithm: str, steps: int) -> None:
        ppo.main(parsed(monkeypatch, f"--algorithm={algorithm}", f"--max_steps={steps}", folder, *small))

    go("grpo", 1)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("algorithm grpo: advantage=grpo") and first.endswith("; but samples_per_prompt=2")
    kept = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (kept["algorithm"], kept["advantage"], kept["kl_coef"]) == ("grpo", "grpo", 0.04)
    go("grpo", 2)
    assert "resuming" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]
    with pytest.raises(dist.RunError, match="holds a run with algorithm 'grpo'"):
        go("dapo", 3)


# short runs


def run(folder: Path, **settings: Any) -> list[dict]:
    small = {"rollout_size": 16, "batch_size": 16, "max_new_tokens": 20, "num_samples": 0, "warmup_steps": 0}
    args = {**ppo.TOY, **small, "max_steps": 1, "output_dir": str(folder), **settings}
    ppo.main(args_of(ppo.Args, **args))
    return read_metrics(folder)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_at_the_first_update_nothing_has_moved(tmp_path: Path, temperature: float) -> None:
    row = run(tmp_path, temperature=temperature)[1]
    assert row["train/objective/kl"] == 0 and row["train/objective/k3"] == 0
    assert row["train/policy/clipfrac_avg"] == 0 and row["train/val/clipfrac_avg"] == 0
    assert row["train/val/ratio"] == pytest.approx(1, abs=1e-5) and row["train/val/ratio_var"] < 1e-9
    assert row["train/policy/approxkl_avg"] < 1e-9
    # a minibatch of the whole rollout: the mean of whitened advantages
    assert row["train/loss/policy_avg"] == pytest.approx(0, abs=1e-5)
    assert row["train/advantages_std"] == pytest.approx(1, abs=1e-3)
    assert row["train/sampler_logp_gap_max"] < 1e-4
    assert row["train/frac_reward_zero_std"] == 1  # one response a prompt
    # values are 0 at first: half the mean square of returns, and nothing explained
    assert row["train/val/explained_variance"] <= 1e-6 < row["train/loss/value_avg"]
    assert {f"train/time/{name}" for name in ("rollout", "scoring", "advantages", "value", "policy")} <= set(
        row
    )


def test_without_kl_or_critic_neither_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = [], models.load
    monkeypatch.setattr(
        models, "load", lambda *a, **k: loaded.append(k.get("trainable", True)) or load(*a, **k)
    )
    monkeypatch.setattr(models, "load_scorer", lambda *a, **k: pytest.fail("a value model"))
    row = run(tmp_path, advantage="dr_grpo", samples_per_prompt=2, rollout_size=8, kl_coef=0.0)[1]
    assert loaded == [True]
    assert "train/loss/value_avg" not in row and row["train/frac_reward_zero_std"] < 1


def test_value_warmup_leaves_the_policy_alone(tmp_path: Path) -> None:
    rows = run(tmp_path, max_steps=3, value_warmup_steps=2, kl_coef=0.1)
    assert ["train/loss" in row for row in rows[1:]] == [False, False, True]
    assert rows[3]["train/objective/kl"] == 0
    losses = [row["train/loss/value_avg"] for row in rows[1:]]
    assert all(loss > 0 for loss in losses)


@pytest.mark.parametrize(
    "settings",
    [
        {"advantage": "gae", "rollout_size": 32},
        {"advantage": "rloo", "loss_reduction": "sequence_sum"},
        {"advantage": "grpo", "loss_reduction": "sequence_mean", "kl_placement": "loss", "kl_coef": 0.02},
        {"advantage": "dr_grpo", "loss_reduction": "constant", "kl_coef": 0.0},
    ],
    ids=lambda settings: settings["advantage"],
)
def test_a_bandit_learns_its_word(tmp_path: Path, settings: dict) -> None:
    base = {"reward": "test_ppo:fondness", "learning_rate": 1e-3, "batch_size": 16, "kl_coef": 0.02}
    base |= {"samples_per_prompt": 1 if settings["advantage"] == "gae" else 4, "rollout_size": 8}
    rows = run(tmp_path, **{**base, **settings, "max_steps": 24})
    scores = [row["train/objective/scores"] for row in rows[1:]]
    assert np.mean(scores[-4:]) > 1.5 * np.mean(scores[:4]), scores


def test_lora_has_the_reference_with_its_adapters_off(tmp_path: Path) -> None:
    rows = run(tmp_path, lora_rank=4, learning_rate=1e-2, max_steps=2)
    assert rows[1]["train/objective/kl"] == 0 < abs(rows[2]["train/objective/kl"])
    assert (tmp_path / "model" / "adapter_config.json").exists()


def captured_value_start(monkeypatch: pytest.MonkeyPatch) -> list:
    started, load_scorer = [], models.load_scorer

    def watched(model: str, *rest: Any, **more: Any) -> Any:
        scorer = load_scorer(model, *rest, **more)
        if more.get("zero_head"):
            started.append((model, scorer.model.score.weight.abs().max().item()))
        return scorer

    monkeypatch.setattr(models, "load_scorer", watched)
    return started


def test_the_value_model_starts_from_the_reward_model_with_a_zero_head(
    tmp_path: Path, reward_model: str, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = captured_value_start(monkeypatch)
    reward = f"toy.language:reward,{reward_model}*0.5"
    row = run(tmp_path, model=tiny_model, reward=reward, missing_eos="keep")[1]
    assert started == [(reward_model, 0.0)]
    assert math.isfinite(row["train/loss/value_avg"])


def test_a_reward_model_with_other_tokens_is_no_start_for_the_value_model(
    tmp_path: Path, reward_model: str, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_tokenizer = data.load_tokenizer

    def other(model: str, **rest: Any) -> Any:
        found = load_tokenizer(model, **rest)
        if model == reward_model:
            found.add_tokens(["<another>"])
        return found

    monkeypatch.setattr(data, "load_tokenizer", other)
    started = captured_value_start(monkeypatch)
    run(tmp_path, model=tiny_model, reward=reward_model, missing_eos="keep")
    assert started == [(tiny_model, 0.0)]


def test_prompts_over_max_prompt_length_are_dropped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [json.dumps({"prompt": text, "answer": ""}) for text in ("Hi. " * 40, "Hi.", "Hello.", "Sure.")]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    more = {"dataset": str(tmp_path), "max_prompt_length": 30, "rollout_size": 3, "batch_size": 3}
    run(tmp_path / "run", **more)
    assert "dropped 1 with more tokens than max_prompt_length 30" in capsys.readouterr().out


# stop and resume

HALF: dict[str, Any] = {
    "rollout_size": 16,
    "batch_size": 8,
    "num_ppo_epochs": 2,  # 4 steps a rollout
    "kl_target": 0.5,
    "kl_horizon": 100.0,
    "normalize_reward": True,
    "entropy_coef": 0.01,
    "num_samples": 4,
    "eval_every": 4,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run(tmp_path_factory.mktemp("whole") / "run", **HALF, max_steps=8)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rollout of two, by a stop asked for while it was being used."""
    folder, honest = tmp_path_factory.mktemp("stopped") / "run", ppo.make_rollout

    def stopped(*given: Any, **options: Any) -> Any:
        patch.setattr(dist, "stop_requested", lambda: True)
        return honest(*given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "make_rollout", stopped)
        run(folder, **HALF, max_steps=8)
    return folder


def test_a_stop_waits_for_the_end_of_the_rollout(stopped: Path) -> None:
    rows = read_metrics(stopped)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert checkpoint.newest(str(stopped)).name == "step_00000004"
    numbers = json.loads((stopped / "checkpoints" / "step_00000004" / "numbers.json").read_text())
    assert numbers["running"]["count"] == 16 and numbers["kl_coef"] != ppo.Args.kl_coef


@pytest.mark.parametrize("changed", [{"temperature": 0.9}, {"max_new_tokens": 24}], ids=str)
def test_what_the_policy_learns_from_may_not_change_on_resume(stopped: Path, changed: dict) -> None:
    with pytest.raises(dist.RunError, match=f"holds a run with {next(iter(changed))}"):
        run(stopped, **{**HALF, **changed}, max_steps=8)


def test_resuming_changes_no_number(whole: list[dict], stopped: Path) -> None:
    rows = run(stopped, **HALF, max_steps=8)
    assert [row["step"] for row in rows] == [row["step"] for row in whole] == list(range(9))
    timed = re.compile("time/|tokens_per_second")
    for ours, theirs in zip(rows, whole, strict=True):
        assert set(ours) == set(theirs)
        for name in ours:
            if not timed.search(name):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-6), (ours["step"], name)


def test_the_last_row_of_a_rollout_has_the_held_out_reward(whole: list[dict]) -> None:
    assert [row["step"] for row in whole if "eval/reward" in row] == [0, 4, 8]
    assert whole[4]["train/objective/kl_coef"] == pytest.approx(0.05)
    # 16 responses, kl 0 at first: error clipped to -.2, .05 * (1 - .2 * 16 / 100)
    assert whole[8]["train/objective/kl_coef"] == pytest.approx(0.05 * 0.968, rel=1e-5)


def test_a_reward_with_the_signature_of_a_judge_is_told_how_it_is_called() -> None:
    with pytest.raises(
        dist.RunError, match="called with prompts, responses and records, or with completions"
    ):
        rewards.call_function(lambda prompt, response: 0.0, ["a"], ["b"], [{}])
