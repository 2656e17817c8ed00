"""Optima that are known exactly: all answers of a tiny vocabulary are enumerated, and training reaches them.

Space: tokens 0..V-1, EOS = 1, prompt (0, 2); answers end at the first EOS, which is theirs, or at length T.
V = 5 and T = 3 give 85 answers. The reward adds a value per token. TV(a, b) = 1/2 sum |a - b|.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dpo
import sft
from common import data, models

V, T, EOS, PROMPT = 5, 3, 1, (0, 2)
VALUES = torch.tensor([0.0, 0.3, 1.0, -1.0, 0.5])
BETA = 0.5


def answers() -> list[tuple[int, ...]]:
    others = [t for t in range(V) if t != EOS]
    ended = [(*head, EOS) for n in range(T) for head in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=T))


ANSWERS = answers()
REWARDS = torch.stack([VALUES[list(a)].sum() for a in ANSWERS])


def sequence(answer: tuple[int, ...], scored: range | None = None) -> data.Sequence:
    tokens = np.array([*PROMPT, *answer], np.int32)
    mask = np.arange(len(tokens)) >= len(PROMPT)
    if scored is not None:
        mask &= np.isin(np.arange(len(tokens)), np.array(scored) + len(PROMPT))
    return tokens, mask


def everything(device: torch.device) -> data.Row:
    examples = [data.Example([sequence(a)], "") for a in ANSWERS]
    return data.make_row(examples, list(range(len(ANSWERS))), device)


def log_probs(policy: Any, row: data.Row) -> Tensor:
    """log pi(y) of every answer, (85,)"""
    return models.segment_sum(models.token_logps(policy, row), row.target_segments, row.num_segments)


def tv(log_p: Tensor, log_q: Tensor) -> float:
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum().item()


def report(name: str, value: float, tolerance: float) -> None:
    print(f"{name}: {value:.2g}, tolerance {tolerance:g} {'PASS' if value < tolerance else 'FAIL'}")
    assert value < tolerance, name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random policy far from uniform over the answers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            pad_token_id=None,
            bos_token_id=0,
            eos_token_id=EOS,
            initializer_range=0.1,
            tie_word_embeddings=False,
        )
    )
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    folder = tmp_path_factory.mktemp("exact")
    model.save_pretrained(folder)
    return str(folder)


def load(tiny: str, device: torch.device) -> tuple[Any, Tensor]:
    """A policy, and the log-probabilities of its 85 answers at the start: the reference."""
    policy = models.load(tiny, device, dpo.Args())
    log_ref = log_probs(policy, everything(device)).detach()
    assert abs(log_ref.exp().sum().item() - 1) < 1e-5, "probabilities must sum to 1: EOS or mask mistake"
    return policy, log_ref


def minimise(policy: Any, num_steps: int, make_loss: Any) -> None:
    """AdamW at 1e-2 with warm-up and linear decay, as in every measurement of this file."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * min((step + 1) / 10, 1 - step / num_steps)
        make_loss(step).backward()
        models.clip_grad_norm(policy, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_there_are_85_answers_and_none_twice() -> None:
    assert len(set(ANSWERS)) == len(ANSWERS) == 85


# E1: SFT reaches the entropy floor


def sft_run(tiny: str, device: torch.device, weigh: Any = None, num_steps: int = 400) -> tuple[float, float]:
    """Train on 256 draws a step from a known p. -> cross-entropy minus entropy, TV(p, policy)"""
    policy, log_ref = load(tiny, device)
    generator = torch.Generator().manual_seed(0)
    log_p = torch.log_softmax(log_ref + torch.randn(len(ANSWERS), generator=generator), 0)
    row = everything(device)

    def loss(step: int) -> Tensor:
        drawn = torch.multinomial(log_p.exp(), 256, replacement=True, generator=generator)
        counts = torch.bincount(drawn, minlength=len(ANSWERS)).float()
        token_logps = models.token_logps(policy, row)
        weights = counts[row.target_segments] * (1.0 if weigh is None else weigh(row))
        return sft.sft_loss(weights * token_logps) / weights.sum()  # each answer as often as it was drawn

    minimise(policy, num_steps, loss)
    log_q = log_probs(policy, row).detach()
    return (log_p.exp() * (log_p - log_q)).sum().item(), tv(log_p, log_q)


@pytest.mark.slow
def test_e1_sft_reaches_the_entropy_floor(tiny: str, device: torch.device) -> None:
    gap, distance = sft_run(tiny, device)
    report("E1 CE - H", gap, 0.02)
    report("E1 TV", distance, 0.05)


@pytest.mark.slow
def test_e1_must_fail_without_the_end_token(tiny: str, device: torch.device) -> None:
    def no_eos(row: data.Row) -> Tensor:
        return (row.tokens[row.targets] != EOS).float()

    assert sft_run(tiny, device, no_eos)[1] > 0.05


@pytest.mark.slow
def test_e1_must_fail_with_a_mean_per_sequence(tiny: str, device: torch.device) -> None:
    def per_sequence(row: data.Row) -> Tensor:
        lengths = torch.tensor([float(len(a)) for a in ANSWERS])
        return 1 / lengths[row.target_segments]

    assert sft_run(tiny, device, per_sequence)[1] > 0.05


def test_e1_the_gradient_vanishes_at_the_optimum(tiny: str, device: torch.device) -> None:
    policy, log_ref = load(tiny, device)
    row = everything(device)
    norms = []
    for weights in (log_ref.exp(), torch.full((len(ANSWERS),), 1 / len(ANSWERS))):
        sft.sft_loss(weights[row.target_segments] * models.token_logps(policy, row)).backward()
        norms.append(models.clip_grad_norm(policy, 0.0).item())
        policy.zero_grad()
    report("E1 gradient norm at p = q, of that at uniform p", norms[0] / norms[1], 1e-5)


# E6: DPO's optimum is pi_ref exp(r / beta) / Z


def optimum(log_ref: Tensor) -> Tensor:
    return torch.log_softmax(log_ref + REWARDS / BETA, 0)


def test_e6_the_tabular_optimum() -> None:
    torch.manual_seed(0)
    rewards, log_ref = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64).log_softmax(0)
    left, right = (torch.tensor(x) for x in zip(*itertools.permutations(range(8), 2), strict=True))
    weights = (log_ref[left] + log_ref[right]).exp()
    prob = torch.sigmoid(rewards[left] - rewards[right])
    logits = log_ref.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        h = logits.log_softmax(0) - log_ref
        loss = (weights * dpo.dpo_loss(h[left] - h[right], 0.3, prob)).sum()
        loss.backward()
        return loss

    loss = search.step(closure)
    loss = closure()
    floor = -(weights * (prob * prob.log() + (1 - prob) * (1 - prob).log())).sum()
    report("E6 tabular loss - floor", abs(loss.item() - floor.item()), 1e-6)
    best = torch.log_softmax(log_ref + rewards / 0.3, 0)
    report("E6 tabular TV", tv(logits.detach().log_softmax(0), best), 1e-5)


def dpo_run(tiny: str, device: torch.device, num_steps: int = 600, trap: str = "") -> float:
    """Train on 64 random pairs a step with soft labels sigmoid(r_i - r_j). -> TV(policy, optimum)"""
    policy, log_ref = load(tiny, device)
    args = dpo.Args(beta=BETA)
    rng = np.random.default_rng(0)

    def example(i: int, j: int) -> data.Example:
        prob = torch.sigmoid(REWARDS[i] - REWARDS[j]).item()
        fields = {"chosen_reward": 0.0, "rejected_reward": 0.0, "label_prob": prob}
        fields |= {"ref_chosen_logps": log_ref[i].item(), "ref_rejected_logps": log_ref[j].item()}
        if trap == "swapped":
            fields["label_prob"] = 1 - prob
        scored = [
            range(len(ANSWERS[k]) - (ANSWERS[k][-1] == EOS)) if trap == "no eos" else None for k in (i, j)
        ]
        return data.Example([sequence(ANSWERS[i], scored[0]), sequence(ANSWERS[j], scored[1])], "", fields)

    def loss(step: int) -> Tensor:
        pairs = [example(*rng.choice(len(ANSWERS), 2, replace=False)) for _ in range(64)]
        row = data.make_row(pairs, list(range(len(pairs))), device)
        return dpo.loss_and_metrics(policy, None, row, args)[0] / len(pairs)

    minimise(policy, num_steps, loss)
    return tv(log_probs(policy, everything(device)).detach(), optimum(log_ref))


def test_e6_dpo_with_soft_labels_reaches_the_optimum(tiny: str, device: torch.device) -> None:
    report("E6 TV", dpo_run(tiny, device), 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("trap", ["no eos", "swapped"])
def test_e6_must_fail(tiny: str, device: torch.device, trap: str) -> None:
    assert dpo_run(tiny, device, trap=trap) > 0.01


@pytest.mark.slow
def test_e6_must_fail_with_log_probs_averaged_over_tokens(
    tiny: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = dpo.response_logps

    def averaged(token_logps: Tensor, row: data.Row) -> Tensor:
        return honest(token_logps, row) / honest(torch.ones_like(token_logps), row)

    monkeypatch.setattr(dpo, "response_logps", averaged)
    assert dpo_run(tiny, device) > 0.01


def test_e6_cdpo_and_ipo_optima_of_two_answers() -> None:
    prob, e, tau = 0.8, 0.1, 0.4
    for make, target in (
        (lambda h: dpo.dpo_loss(h, 1.0, (1 - e) * prob + e * (1 - prob)), np.log(0.74 / 0.26)),
        (lambda h: dpo.ipo_loss(h, tau, prob), (prob - 0.5) / tau),
    ):
        h = torch.tensor([target], requires_grad=True)
        make(h).sum().backward()
        assert abs(h.grad.item()) < 1e-7


def test_folder_of_this_file_is_listed_in_the_readme() -> None:
    assert "test_exact.py" in (Path(__file__).parent.parent / "README.md").read_text()
