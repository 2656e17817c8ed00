"""Policy gradients against enumeration: what test_exact.py does for the losses on data, for ppo.py.

E7: the gradient of the surrogate is that of the objective J. E8: training reaches the optimum. E9: responses
cut off. E10: estimators of the KL. Answers and apparatus are those of test_exact.py.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from conftest import args_of, means
from test_exact import ANSWERS, EOS, PROMPT, REWARDS, everything, log_probs, report, tiny, tv
from torch import Tensor

import ppo
from common import models, packed
from common.generate import Sample, to_example

__all__ = ["tiny"]  # a fixture
BETA = 0.5

# E7: on all 156 answers of 6 tokens and length 3, in float64

V, T = 6, 3
OTHERS = [t for t in range(V) if t != EOS]
SIX = [(*head, EOS) for n in range(T) for head in itertools.product(OTHERS, repeat=n)]
SIX += list(itertools.product(OTHERS, repeat=T))
TOKENS = torch.tensor([[*PROMPT, *a, *[0] * (T - len(a))] for a in SIX])  # (156, 5)
MASK = torch.tensor([[float(t < len(a)) for t in range(T)] for a in SIX], dtype=torch.float64)


def random_model(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=V, initializer_range=0.3, num_key_value_heads=2, pad_token_id=None, **shape
    )
    return LlamaForCausalLM(config).double()


def token_logps(model: Any) -> Tensor:
    """log pi of each token of each answer, 0 past its end. -> (156, 3)"""
    logps = model(TOKENS, use_cache=False).logits.log_softmax(-1)[:, len(PROMPT) - 1 : -1]
    return logps.gather(2, TOKENS[:, len(PROMPT) :, None])[:, :, 0] * MASK


class Enumerated:
    """A policy, a reference and random rewards: J, its exact gradient, and what PPO makes of them."""

    def __init__(self) -> None:
        self.policy = random_model(1)
        self.logps = token_logps(self.policy)
        self.ref_logps = token_logps(random_model(2)).detach()
        self.probs = self.logps.sum(1).exp()
        assert abs(self.probs.sum().item() - 1) < 1e-5
        self.scores = torch.randn(len(SIX), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.rewards = self.token_rewards(BETA)
        objective = (self.probs * (self.scores - BETA * (self.logps - self.ref_logps).sum(1))).sum()
        self.exact = self.gradient(objective)

    def gradient(self, value: Tensor) -> Tensor:
        grads = torch.autograd.grad(value, list(self.policy.parameters()), retain_graph=True)
        return torch.cat([grad.flatten() for grad in grads])

    def token_rewards(self, kl_coef: float) -> Tensor:
        return ppo.token_rewards(self.scores, self.logps.detach(), self.ref_logps, MASK, kl_coef)

    def values(self, ahead: int = 0) -> Tensor:
        """Expected sum of rewards after each prefix, with `ahead` = 1 after the token as well. -> (156, 3)"""
        to_go = self.rewards.flip(1).cumsum(1).flip(1) * MASK
        values, probs = torch.zeros_like(MASK), self.probs.detach()
        for i, answer in enumerate(SIX):
            for t in range(len(answer)):
                same = [k for k, other in enumerate(SIX) if other[: t + ahead] == answer[: t + ahead]]
                values[i, t] = (probs[same] * to_go[same, t]).sum() / probs[same].sum()
        return values

    def error(self, advantages: Tensor, weights: Tensor = MASK) -> float:
        """||g - g*|| / ||g*|| of the clipped surrogate at old = current."""
        ratio = (self.logps - self.logps.detach()).exp()
        losses = ppo.policy_losses(ratio, advantages, 0.2, 0.2)
        found = -self.gradient((self.probs.detach()[:, None] * weights * losses).sum())
        return ((found - self.exact).norm() / self.exact.norm()).item()


@pytest.fixture(scope="module")
def world() -> Enumerated:
    return Enumerated()


def test_e7_the_gradient_is_exact_with_lambda_1(world: Enumerated) -> None:
    zeros = torch.zeros_like(MASK)
    report("E7 no values", world.error(ppo.gae(world.rewards, zeros, MASK, 1.0, 1.0)), 1e-5)
    noise = {a[:t]: torch.randn((), dtype=torch.float64) for a in SIX for t in range(T)}
    any_values = torch.stack([torch.stack([noise[a[:t]] for t in range(T)]) for a in SIX])
    report("E7 any values", world.error(ppo.gae(world.rewards, any_values, MASK, 1.0, 1.0)), 1e-5)


@pytest.mark.parametrize("gae_lambda", [0.95, 0.0])
def test_e7_the_gradient_is_exact_with_exact_values(world: Enumerated, gae_lambda: float) -> None:
    junk = world.values() + 7.0 * (1 - MASK)  # past the end nothing may matter
    advantages = ppo.gae(world.rewards, junk, MASK, 1.0, gae_lambda)
    report(f"E7 lambda {gae_lambda}", world.error(advantages), 1e-5)


def test_e7_must_fail(world: Enumerated) -> None:
    zeros = torch.zeros_like(MASK)

    def of(rewards: Tensor) -> Tensor:
        return ppo.gae(rewards, zeros, MASK, 1.0, 1.0)

    honest = of(world.rewards)
    late = ppo.token_rewards(
        torch.zeros_like(world.scores), world.logps.detach(), world.ref_logps, MASK, BETA
    )
    late[:, -1] += world.scores  # in the last column, not at the last token
    no_eos = MASK * (TOKENS[:, len(PROMPT) :] != EOS)
    lengths = MASK.sum(1, keepdim=True)
    unmasked, after, value_after = torch.zeros_like(MASK), 0.0, 0.0
    junk = world.values() + 7.0 * (1 - MASK)
    for t in reversed(range(T)):  # lambda 0, bootstrapping from past the end
        unmasked[:, t] = world.rewards[:, t] + value_after - junk[:, t]
        value_after = junk[:, t]
    errors = {
        "score in the last column": world.error(of(late)),
        "end token left out": world.error(honest, no_eos),
        "sign of the KL": world.error(of(world.token_rewards(-BETA))),
        "mean per response": world.error(honest, MASK / lengths * lengths.mean()),
        "value that sees the token": world.error(ppo.gae(world.rewards, world.values(1), MASK, 1.0, 1.0)),
        "values past the end": world.error(unmasked * MASK),
    }
    print(errors, after)
    assert min(errors.values()) > 0.01


# E7 and E8 through the script's own rollout and update


def sampled(chosen: list[int], log_ref: Tensor, cut: set[int] = frozenset()) -> list[Sample]:
    """Samples of these answers; those in `cut` count as cut off although they end."""
    samples = []
    for i, k in enumerate(chosen):
        answer = list(ANSWERS[k])
        ended = answer[-1] == EOS and k not in cut
        samples.append(Sample(i, 0, list(PROMPT), answer, [0.0] * len(answer), ended, ""))
    return samples


def test_e7_the_scripts_own_update_has_the_exact_gradient(tiny: str, device: torch.device) -> None:
    args = args_of(
        ppo.Args, kl_coef=BETA, gae_lambda=1.0, whiten_advantages=False, missing_eos="keep", advantage="gae"
    )
    policy = models.load(tiny, device, args.system)
    torch.manual_seed(0)
    reference = models.load(tiny, device, args.system)
    with torch.no_grad():
        for weights in reference.parameters():
            weights += 0.1 * torch.randn_like(weights)
    row = everything(device)
    log_ref = log_probs(reference, row).detach()

    def flat_gradient() -> Tensor:
        parts = [p.grad.flatten() for p in policy.parameters()]
        policy.zero_grad()
        return torch.cat(parts)

    logps = log_probs(policy, row)
    (logps.exp() * (REWARDS - BETA * (logps - log_ref))).sum().backward()
    exact = flat_gradient()
    samples = sampled(list(range(len(ANSWERS))), log_ref)
    rollout, _ = ppo.make_rollout(
        [*map(to_example, samples)], REWARDS, policy, reference, None, BETA, {}, args
    )
    weighted = rollout._replace(mask=rollout.mask * logps.detach().exp()[:, None])  # as often as pi draws it
    (whole,) = packed.micro_batches(rollout.examples, 10_000, device)
    loss, metrics = ppo.loss_and_metrics(policy, whole, weighted, args)
    (-loss * weighted.mask.sum()).backward()
    report("E7 through make_rollout", ((flat_gradient() - exact).norm() / exact.norm()).item(), 1e-4)
    found = means(metrics)
    assert found["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert found["policy/clipfrac_avg"] == 0


def ppo_run(
    tiny: str,
    device: torch.device,
    scores: Tensor,
    num_rollouts: int,
    cut: set[int] = frozenset(),
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """PPO on 256 answers a rollout, drawn from the enumerated policy. -> log pi, log pi_ref of all answers"""
    args = args_of(
        ppo.Args, kl_coef=BETA, num_ppo_epochs=2, batch_size=128, missing_eos_penalty=-0.7, **settings
    )
    policy = models.load(tiny, device, args.system)
    reference = models.load(tiny, device, args.system, trainable=False)
    value_model = models.load_scorer(tiny, device, args.system, ["value"], zero_head=True)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.0, betas=(0.9, 0.95)) for m in (policy, value_model)]
    row, generator = everything(device), torch.Generator().manual_seed(0)
    log_ref = log_probs(reference, row).detach()
    for number in range(num_rollouts):
        probs = log_probs(policy, row).detach().exp()
        chosen = torch.multinomial(probs, 256, replacement=True, generator=generator)
        samples = sampled(chosen.tolist(), log_ref, cut)
        rollout, _ = ppo.make_rollout(
            [*map(to_example, samples)], scores[chosen], policy, reference, value_model, BETA, {}, args
        )
        for picked in ppo.minibatches(len(samples), number, args):
            batch = rollout.take(picked)
            (micro_batch,) = packed.micro_batches(batch.examples, 10_000, device)
            ppo.value_loss_and_metrics(value_model, micro_batch, batch, args)[0].backward()
            ppo.loss_and_metrics(policy, micro_batch, batch, args)[0].backward()
            for model, optimizer in zip((policy, value_model), optimizers, strict=True):
                optimizer.param_groups[0]["lr"] = 5e-3 * min((number + 1) / 10, 1 - number / num_rollouts)
                models.clip_grad_norm(model, 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return log_probs(policy, row).detach(), log_ref


def gap(logps: Tensor, log_ref: Tensor, scores: Tensor) -> float:
    """Share of the way from the reference to the optimum that is missing in J."""

    def objective(log_p: Tensor) -> Tensor:
        return (log_p.exp() * (scores - BETA * (log_p - log_ref))).sum()

    best = torch.log_softmax(log_ref + scores / BETA, 0)
    divergence = (logps.exp() * (logps - best)).sum()
    assert abs((objective(best) - objective(logps) - BETA * divergence).item()) < 1e-5  # J* - J = beta KL
    return ((objective(best) - objective(logps)) / (objective(best) - objective(log_ref))).item()


@pytest.mark.slow
def test_e8_the_script_reaches_the_optimum(tiny: str, device: torch.device) -> None:
    logps, log_ref = ppo_run(tiny, device, REWARDS, 150, missing_eos="keep")
    report("E8b gap", gap(logps, log_ref, REWARDS), 0.03)
    report("E8b TV", tv(logps, torch.log_softmax(log_ref + REWARDS / BETA, 0)), 0.05)


@pytest.mark.slow
def test_e8_must_fail_without_the_kl(
    tiny: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = ppo.token_rewards
    monkeypatch.setattr(ppo, "token_rewards", lambda s, a, b, m, kl_coef: honest(s, a, b, m, 0.0))
    logps, log_ref = ppo_run(tiny, device, REWARDS, 150, missing_eos="keep")
    assert gap(logps, log_ref, REWARDS) > 0.03


def test_e8_tabular_policy_reaches_the_optimum() -> None:
    # 64 answers of 3 of 4 tokens, no end token; logits and values are tables over the prefix tree
    paths = list(itertools.product(range(4), repeat=3))
    prefixes = {p[:t]: None for p in paths for t in range(3)}
    place = {p: i for i, p in enumerate(prefixes)}
    node = torch.tensor([[place[p[:t]] for t in range(3)] for p in paths])  # (64, 3)
    token = torch.tensor(paths)
    generator = torch.Generator().manual_seed(0)
    scores, start = torch.randn(64, generator=generator), torch.randn(21, 4, generator=generator) * 0.5
    logits, values = start.clone().requires_grad_(), torch.zeros(21, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [logits], "lr": 0.03}, {"params": [values], "lr": 0.05}])
    rates = [group["lr"] for group in optimizer.param_groups]

    def logps_of(table: Tensor, chosen: Tensor) -> Tensor:
        return table.log_softmax(-1)[node[chosen], token[chosen]]  # (n, 3)

    everyone, num_rollouts = torch.arange(64), 600
    ref = logps_of(start, everyone)
    for number in range(num_rollouts):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - number / num_rollouts)
        with torch.no_grad():
            old = logps_of(logits, everyone)
            chosen = torch.multinomial(old.sum(1).exp(), 1024, replacement=True, generator=generator)
            mask = torch.ones(1024, 3)
            rewards = ppo.token_rewards(scores[chosen], old[chosen], ref[chosen], mask, BETA)
            old_values = values[node[chosen]]
            advantages = ppo.gae(rewards, old_values, mask, 1.0, 0.95)
            returns, advantages = advantages + old_values, ppo.whiten(advantages, mask)
        for part in torch.arange(1024).view(2, 512).repeat(2, 1):
            picked = chosen[part]
            ratio = (logps_of(logits, picked) - old[picked]).exp()
            loss = ppo.policy_losses(ratio, advantages[part], 0.2, 0.2).mean()
            found = values[node[picked]]
            loss = loss + ppo.value_losses(found, old_values[part], returns[part], 0.2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        report("E8a gap", gap(logps_of(logits, everyone).sum(1), ref.sum(1), scores), 0.005)


# E9: a penalty for responses cut off has a closed form


@pytest.mark.slow
@pytest.mark.parametrize("trap", [False, True])
def test_e9_the_penalty_of_responses_cut_off(tiny: str, device: torch.device, trap: bool) -> None:
    ends_last = {k for k, answer in enumerate(ANSWERS) if answer[-1] == EOS and len(answer) == 3}
    nothing = torch.zeros(len(ANSWERS))
    logps, log_ref = ppo_run(tiny, device, nothing, 100, cut=ends_last if trap else frozenset())
    is_cut = torch.tensor([answer[-1] != EOS for answer in ANSWERS])
    distance = tv(logps, torch.log_softmax(log_ref - 0.7 * is_cut / BETA, 0))
    if trap:  # an end token in the last place is an end
        assert distance > 0.05
        return
    report("E9 TV", distance, 0.03)
    u, odds = log_ref.exp()[is_cut].sum().item(), np.exp(-0.7 / BETA)
    report("E9 P(cut off)", abs(logps.exp()[is_cut].sum().item() - u * odds / (1 - u + u * odds)), 0.03)


# E10: estimators of KL(p || r) over ten outcomes


def test_e10_kl_estimators_and_their_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(10, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()

    def both() -> tuple[Tensor, Tensor]:
        return logits.log_softmax(0), other.log_softmax(0)

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits)[0]

    logp, logr = both()
    p = logp.detach().exp()
    kl = (logp.exp() * (logp - logr)).sum()
    assert (p * ppo.k3(logp, logr)).sum().item() == pytest.approx(kl.item(), abs=1e-12)  # unbiased
    assert (ppo.k3(logp, logr) >= 0).all()
    exact, reverse = gradient(kl), gradient((logr.exp() * (logr - both()[0])).sum())
    logp, _ = both()
    # k1 in the reward: the score function times the detached log-ratio
    report(
        "E10 k1 as reward", (gradient((p * (logp - logr).detach() * logp).sum()) - exact).abs().max(), 1e-12
    )
    logp, _ = both()
    of_k3 = gradient((p * ppo.k3(logp, logr)).sum())  # k3 as a term of the loss: KL(r || p), as documented
    report("E10 k3 as loss", (of_k3 - reverse).abs().max().item(), 1e-12)
    assert (of_k3 - exact).norm() > 0.1 * exact.norm()
    logp, _ = both()
    assert gradient((p * (logp - logr)).sum()).abs().max() < 1e-12  # k1 as a plain loss term has none
