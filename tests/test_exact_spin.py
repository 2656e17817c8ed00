"""E12: exactly solved, an iteration of SPIN gives pi_(t+1) ~ pi_t^(1 - 1/beta) p_data^(1/beta).

Data p, opponent pi_t, pairs (y ~ p, y' ~ pi_t). Answers and apparatus of the tiny model are those of
test_exact.py.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from test_exact import ANSWERS, everything, load, log_probs, minimise, report, sequence, tiny, tv
from torch import Tensor

import spin
from common import packed

__all__ = ["tiny"]  # a fixture

# tables of a few outcomes: the loss over all pairs is minimised, nothing is drawn


def population_loss(
    log_p: Tensor, log_opponent: Tensor, log_pi: Tensor, beta: float, log_reference: Tensor | None = None
) -> Tensor:
    """Eq. 4.7 over every pair of a real and a generated outcome; the reference has to be the opponent."""
    h = log_pi - (log_opponent if log_reference is None else log_reference)
    losses = spin.spin_loss((h[:, None] - h[None]).flatten(), beta).view(len(h), -1)
    return (log_p.exp()[:, None] * log_opponent.exp()[None] * losses).sum()


def next_iterate(log_p: Tensor, log_opponent: Tensor, beta: float, reference: Tensor | None = None) -> Tensor:
    """The minimiser, by LBFGS."""
    logits = log_opponent.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        loss = population_loss(log_p, log_opponent, logits.log_softmax(0), beta, reference)
        loss.backward()
        return loss

    search.step(closure)
    return logits.detach().log_softmax(0)


def exact_map(log_p: Tensor, log_opponent: Tensor, beta: float) -> Tensor:
    return ((1 - 1 / beta) * log_opponent + log_p / beta).log_softmax(0)


def six_outcomes() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    log_p, log_pi = (scale * x for scale, x in zip((1.0, 0.5), draws, strict=True))
    return log_p.log_softmax(0), log_pi.log_softmax(0)


def iterate(beta: float, num_iterations: int = 4, trap: str = "") -> list[tuple[float, float, float]]:
    """Of each iterate: TV to that of the map, TV to the data, its log-ratio to the data over that before."""
    log_p, log_start = six_outcomes()
    log_pi, found = log_start, []
    for _ in range(num_iterations):
        real, generated = (log_pi, log_p) if trap == "sides swapped" else (log_p, log_pi)
        reference = log_start if trap == "reference of iteration 0" else log_pi
        log_next = next_iterate(real, generated, beta, reference)
        before, after = (x - log_p - (x - log_p).mean() for x in (log_pi, log_next))
        ratio = (after @ before / (before @ before)).item()
        found.append((tv(log_next, exact_map(log_p, log_pi, beta)), tv(log_next, log_p), ratio))
        log_pi = log_next
    return found


@pytest.mark.parametrize("beta", [2.0, 1.0, 0.75])
def test_e12_every_iterate_is_that_of_the_map(beta: float) -> None:
    found = iterate(beta)
    for t, (error, _, _) in enumerate(found, 1):
        report(f"E12 beta {beta}, TV of iterate {t} to the map", error, 1e-3)
    distances = [distance for _, distance, _ in found]
    if beta == 1.0:  # there in one iteration
        report("E12 beta 1, TV to the data", max(distances), 1e-3)
    else:  # the log-ratio to the data is multiplied by 1 - 1 / beta
        for _, _, ratio in found[:3]:
            assert ratio == pytest.approx(1 - 1 / beta, abs=1e-2)
        assert all(b < a for a, b in itertools.pairwise(distances))


def test_e12_a_beta_below_a_half_diverges() -> None:
    (_, first, _), (_, second, _) = iterate(0.4, 2)
    assert second > 2 * first


@pytest.mark.parametrize("trap", ["reference of iteration 0", "sides swapped"])
def test_e12_must_fail(trap: str) -> None:
    assert max(error for error, _, _ in iterate(1.0, 2, trap)) > 1e-3


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_e12_data_equal_to_the_opponent_is_a_fixed_point(beta: float) -> None:
    log_p, _ = six_outcomes()
    logits = log_p.clone().requires_grad_()
    loss = population_loss(log_p, log_p, logits.log_softmax(0), beta)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    report("E12 gradient norm at the fixed point", logits.grad.norm().item(), 1e-8)


TABLE = {  # KL(data || pi_t), t = 1, 2, 3, from data (.4, .3, .2, .1) and pi_0 (.1, .2, .3, .4)
    2.0: (0.1116, 0.0271, 0.0067),
    1.0: (0.0, 0.0, 0.0),
    0.6: (0.1616, 0.0877, 0.0346),
    0.5: (0.3358, 0.4564, 0.3358),
}


@pytest.mark.parametrize("beta", list(TABLE))
def test_four_outcomes_have_the_divergences_worked_out(beta: float) -> None:
    log_p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    log_pi = log_p.flip(0)
    for expected in TABLE[beta]:
        log_pi = next_iterate(log_p, log_pi, beta)
        kl = (log_p.exp() * (log_p - log_pi)).sum().item()
        assert kl == pytest.approx(expected, abs=2e-4)


def test_gradient_descent_reaches_the_closed_form_of_theorem_5_4() -> None:
    log_p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    logits = log_p.flip(0).clone().requires_grad_()
    for _ in range(1500):
        loss = population_loss(log_p, log_p.flip(0), logits.log_softmax(0), 1.0)
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 4.0 * gradient
    gap = (logits.detach().log_softmax(0).exp() - log_p.exp()).abs().max().item()
    report("E12 gradient descent to the closed form", gap, 1e-8)


# the tiny model, whose 85 answers are enumerated


def spin_run(tiny: str, device: torch.device, trap: str = "", num_steps: int = 600) -> tuple[float, float]:
    """One iteration at beta 1 on 512 drawn pairs a step. -> TV to the data before and after"""
    policy, log_opponent = load(tiny, device)
    generator = torch.Generator().manual_seed(0)
    log_p = torch.log_softmax(log_opponent + torch.randn(len(ANSWERS), generator=generator), 0)

    def make(i: int, j: int) -> packed.Example:
        logps = dict(zip(spin.LOGPS, (log_opponent[i].item(), log_opponent[j].item()), strict=True))
        return spin.make_pair(packed.Example([sequence(ANSWERS[i])], ""), list(ANSWERS[j]), **logps)

    def loss(step: int) -> Tensor:
        i, j = (
            torch.multinomial(x.exp(), 512, replacement=True, generator=generator)
            for x in (log_p, log_opponent)
        )
        if trap == "sides swapped":
            i, j = j, i
        pairs = [make(a, b) for a, b in zip(i.tolist(), j.tolist(), strict=True)]
        micro_batch = packed.make_micro_batch(pairs, list(range(len(pairs))), device)
        return spin.loss_and_metrics(policy, micro_batch, beta=1.0)[0] / len(pairs)

    minimise(policy, num_steps, loss)
    return tv(log_opponent, log_p), tv(log_probs(policy, everything(device)).detach(), log_p)


@pytest.mark.slow
def test_e12_the_tiny_model_reaches_the_data_in_one_iteration(tiny: str, device: torch.device) -> None:
    before, after = spin_run(tiny, device)
    print(f"E12 TV to the data before: {before:.2g}")
    report("E12 TV to the data", after, 0.06)


@pytest.mark.slow
def test_e12_the_tiny_model_must_fail_with_the_sides_swapped(tiny: str, device: torch.device) -> None:
    before, after = spin_run(tiny, device, "sides swapped", 40)
    assert after > before


def test_e12_expected_gradient_of_the_model_vanishes_where_it_is_the_data(
    tiny: str, device: torch.device
) -> None:
    policy, log_opponent = load(tiny, device)
    micro_batch = everything(device)
    norms = []
    for log_p in (log_opponent, torch.full((len(ANSWERS),), -math.log(len(ANSWERS)))):
        population_loss(log_p, log_opponent, log_probs(policy, micro_batch), 1.0).backward()
        norms.append(np.sqrt(sum(p.grad.square().sum().item() for p in policy.parameters())))
        policy.zero_grad()
    report("E12 gradient norm at p = pi, of that at uniform p", norms[0] / norms[1], 1e-5)
