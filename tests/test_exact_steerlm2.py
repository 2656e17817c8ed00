"""E11: SteerLM 2.0 reaches the posterior P(y|a, x) ~ P(a|x, y) P(y|x), which is known by enumeration.

Answers and apparatus of the tiny model are those of test_exact.py.
"""

import pytest
import torch
import torch.nn.functional as F
from test_exact import ANSWERS, PROMPT, REWARDS, log_probs, minimise, report, sequence, tiny, tv
from torch import Tensor

import steerlm2
from common import models, packed

__all__ = ["tiny"]  # a fixture

# eight outcomes, three values of the attribute, a table of logits


def tabular_run(trap: str = "", num_steps: int = 1500) -> float:
    """Adam at .05, decayed, on 64 draws a step of each value. -> the largest TV of the three posteriors"""
    generator = torch.Generator().manual_seed(0)
    prior = torch.randn(8, generator=generator, dtype=torch.float64).log_softmax(0)
    likelihood = torch.randn(3, 8, generator=generator, dtype=torch.float64).log_softmax(0)  # log P(a|y)
    posterior = (likelihood + prior).log_softmax(1)
    logits = torch.zeros(3, 8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / num_steps)
        log_q = logits.log_softmax(1)
        sampler = prior.expand(3, 8) if trap == "no b'" else log_q.detach()
        drawn = torch.multinomial(sampler.exp(), 64, replacement=True, generator=generator)  # (3, 64)
        log_w = (likelihood + prior).gather(1, drawn)
        if trap != "no sampler term":
            log_w = log_w - sampler.gather(1, drawn)
        logps = log_q.gather(1, drawn)
        if trap == "no b'":
            loss = -(log_w.softmax(1) * logps).sum()
        else:
            loss = steerlm2.group_loss(logps, sampler.gather(1, drawn), log_w).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return max(tv(ours, best) for ours, best in zip(logits.detach().log_softmax(1), posterior, strict=True))


def test_e11_tabular() -> None:
    report("E11 tabular TV", tabular_run(), 1e-4)


@pytest.mark.parametrize("trap", ["no b'", "no sampler term"])
def test_e11_must_fail(trap: str) -> None:
    assert tabular_run(trap) > 1e-4


def test_e11_at_the_posterior_every_group_has_no_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    log_w, sampler = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    logps = (log_w + sampler).requires_grad_()  # Q = Q* on the samples, whatever Q' is
    steerlm2.group_loss(logps, sampler, log_w).sum().backward()
    assert logps.grad.abs().max() < 1e-12


# the tiny model, whose prompt says which of two values is wanted

LIKELIHOOD = torch.stack([F.logsigmoid(2 * REWARDS), F.logsigmoid(-2 * REWARDS)])  # (2, 85) log P(a|y)


def after(value: int, answer: tuple[int, ...]) -> packed.Tokens:
    """An answer after the prompt (0, 2) or (0, 3)."""
    tokens, mask = sequence(answer)
    tokens[len(PROMPT) - 1] += value
    return tokens, mask


def llama_run(tiny: str, device: torch.device, num_steps: int = 300, trap: str = "") -> list[float]:
    """16 groups of 16 answers of each value a step, drawn from the policy. -> TV to the posterior of each"""
    args = steerlm2.Args()
    policy = models.load(tiny, device, args.system)
    every = [packed.Example([after(value, a)], "") for value in range(2) for a in ANSWERS]
    micro_batch = packed.make_micro_batch(every, list(range(len(every))), device)
    prior = log_probs(policy, micro_batch).detach()[: len(ANSWERS)]
    generator = torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        with torch.no_grad():
            sampler = log_probs(policy, micro_batch).view(2, -1)
        groups = []
        for value in range(2):
            probs = sampler[value].exp().expand(16, -1)
            for drawn in torch.multinomial(probs, 16, replacement=True, generator=generator):
                log_q = sampler[value, drawn]
                log_w = LIKELIHOOD[value, drawn] + prior[drawn] - (0 if trap else log_q)
                fields = {"log_weights": log_w.numpy(), "sampler_logps": log_q.numpy()}
                groups.append(packed.Example([after(value, ANSWERS[k]) for k in drawn], "", fields))
        drawn_groups = packed.make_micro_batch(groups, list(range(len(groups))), device)
        return steerlm2.loss_and_metrics(policy, drawn_groups, args)[0] / len(groups)

    minimise(policy, num_steps, loss)
    ours = log_probs(policy, micro_batch).detach().view(2, -1)
    best = (LIKELIHOOD + prior).log_softmax(1)
    return [tv(a, b) for a, b in zip(ours, best, strict=True)]


@pytest.mark.slow
def test_e11_tiny_model(tiny: str, device: torch.device) -> None:
    for value, distance in enumerate(llama_run(tiny, device)):
        report(f"E11 TV of value {value}", distance, 0.04)


@pytest.mark.slow
def test_e11_tiny_model_must_fail_without_the_sampler_term(tiny: str, device: torch.device) -> None:
    assert max(llama_run(tiny, device, trap="no sampler term")) > 0.04
