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
from conftest import args_of
from torch import Tensor

import dpo
import reward_model
import sft
from common import models, packed

V, T, EOS, PROMPT = 5, 3, 1, (0, 2)
VALUES = torch.tensor([0.0, 0.3, 1.0, -1.0, 0.5])
BETA = 0.5


def answers() -> list[tuple[int, ...]]:
    others = [t for t in range(V) if t != EOS]
    ended = [(*head, EOS) for n in range(T) for head in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=T))


ANSWERS = answers()
REWARDS = torch.stack([VALUES[list(a)].sum() for a in ANSWERS])


def sequence(answer: tuple[int, ...], scored: range | None = None) -> packed.Tokens:
    tokens = np.array([*PROMPT, *answer], np.int32)
    mask = np.arange(len(tokens)) >= len(PROMPT)
    if scored is not None:
        mask &= np.isin(np.arange(len(tokens)), np.array(scored) + len(PROMPT))
    return tokens, mask


def everything(device: torch.device) -> packed.MicroBatch:
    examples = [packed.Example([sequence(a)], "") for a in ANSWERS]
    return packed.make_micro_batch(examples, list(range(len(ANSWERS))), device)


def log_probs(policy: Any, micro_batch: packed.MicroBatch) -> Tensor:
    """log pi(y) of every answer, (85,)"""
    return packed.segment_sum(
        policy(micro_batch).logps, micro_batch.target_segments, micro_batch.num_segments
    )


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
    policy = models.load(tiny, device, dpo.Args().system)
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
    micro_batch = everything(device)

    def loss(step: int) -> Tensor:
        drawn = torch.multinomial(log_p.exp(), 256, replacement=True, generator=generator)
        counts = torch.bincount(drawn, minlength=len(ANSWERS)).float()
        token_logps = policy(micro_batch).logps
        weights = counts[micro_batch.target_segments] * (1.0 if weigh is None else weigh(micro_batch))
        return sft.sft_loss(weights * token_logps) / weights.sum()  # each answer as often as it was drawn

    minimise(policy, num_steps, loss)
    log_q = log_probs(policy, micro_batch).detach()
    return (log_p.exp() * (log_p - log_q)).sum().item(), tv(log_p, log_q)


@pytest.mark.slow
def test_e1_sft_reaches_the_entropy_floor(tiny: str, device: torch.device) -> None:
    gap, distance = sft_run(tiny, device)
    report("E1 CE - H", gap, 0.02)
    report("E1 TV", distance, 0.05)


@pytest.mark.slow
def test_e1_must_fail_without_the_end_token(tiny: str, device: torch.device) -> None:
    def no_eos(micro_batch: packed.MicroBatch) -> Tensor:
        return (micro_batch.tokens[micro_batch.targets] != EOS).float()

    assert sft_run(tiny, device, no_eos)[1] > 0.05


@pytest.mark.slow
def test_e1_must_fail_with_a_mean_per_sequence(tiny: str, device: torch.device) -> None:
    def per_sequence(micro_batch: packed.MicroBatch) -> Tensor:
        lengths = torch.tensor([float(len(a)) for a in ANSWERS])
        return 1 / lengths[micro_batch.target_segments]

    assert sft_run(tiny, device, per_sequence)[1] > 0.05


def test_e1_the_gradient_vanishes_at_the_optimum(tiny: str, device: torch.device) -> None:
    policy, log_ref = load(tiny, device)
    micro_batch = everything(device)
    norms = []
    for weights in (log_ref.exp(), torch.full((len(ANSWERS),), 1 / len(ANSWERS))):
        sft.sft_loss(weights[micro_batch.target_segments] * policy(micro_batch).logps).backward()
        norms.append(models.clip_grad_norm(policy, 0.0).item())
        policy.zero_grad()
    report("E1 gradient norm at p = q, of that at uniform p", norms[0] / norms[1], 1e-5)


# E5: reward models recover the reward


def descend(parameter: Tensor, make_loss: Any) -> None:
    """LBFGS to the minimum."""
    search = torch.optim.LBFGS(
        [parameter], max_iter=200, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        loss = make_loss()
        loss.backward()
        return loss

    search.step(closure)


def bt_recovery(num_pairs: int = 200_000, seed: int = 0) -> tuple[float, float]:
    """Scores of 8 answers from labels drawn under known rewards. -> max |z|, chi2 / 7"""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(8, generator=generator, dtype=torch.float64)
    ref = torch.randn(8, generator=generator, dtype=torch.float64).softmax(0)
    i, j = (torch.multinomial(ref, num_pairs, replacement=True, generator=generator) for _ in range(2))
    i, j = i[i != j], j[i != j]
    first = torch.rand(len(i), generator=generator) < torch.sigmoid(rewards[i] - rewards[j])
    won, lost = torch.where(first, i, j), torch.where(first, j, i)
    scores = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    descend(scores, lambda: reward_model.bt_loss(scores[won] - scores[lost]).mean())
    s = scores.detach()
    q = torch.sigmoid(s[won] - s[lost])
    information = torch.zeros(8, 8, dtype=torch.float64)  # Fisher's, of these pairs
    for a, b, sign in ((won, lost, -1), (lost, won, -1), (won, won, 1), (lost, lost, 1)):
        information.index_put_((a, b), sign * q * (1 - q), accumulate=True)
    d = (s - s.mean()) - (rewards - rewards.mean())
    z = d / torch.linalg.pinv(information, rtol=1e-9, hermitian=True).diagonal().sqrt()
    return z.abs().max().item(), (d @ information @ d).item() / 7


def test_e5_bradley_terry_recovers_the_scores_as_well_as_can_be() -> None:
    z, chi2 = bt_recovery()
    report("E5 tabular max |z|", z, 4.0)
    report("E5 tabular chi2 / 7", chi2, 3.0)
    assert chi2 > 0.2 and z > 0.2


@pytest.mark.parametrize("loss", ["kwise", "plackett_luce"])
def test_e5_rankings_recover_the_scores_too(loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, generator=generator)
    gumbel = -torch.log(-torch.log(torch.rand(50_000, 6, generator=generator)))
    shown = torch.rand(50_000, 6, generator=generator).argsort(1)[:, :4]  # 4 of 6, ranked by reward + Gumbel
    ranks = 1.0 + (rewards + gumbel).gather(1, shown).argsort(1, descending=True).argsort(1)
    scores = torch.zeros(6, requires_grad=True)
    make = reward_model.kwise_loss if loss == "kwise" else reward_model.plackett_luce_loss
    descend(scores, lambda: make(scores[shown], ranks).mean())
    gap = (scores.detach() - scores.mean().detach()) - (rewards - rewards.mean())
    report(f"E5 {loss} max error", gap.abs().max().item(), 0.03)


def reward_run(tiny: str, device: torch.device, num_steps: int = 400, num_pairs: int = 256) -> dict:
    """Train on pairs of draws from the reference with drawn labels. -> how close its rewards come"""
    log_ref = load(tiny, device)[1]
    args = reward_model.Args()
    torch.manual_seed(0)  # the new head
    scorer = models.load_scorer(tiny, device, args.system, ["reward"])
    rng, ref = np.random.default_rng(0), log_ref.exp().double().numpy()
    ref /= ref.sum()
    sequences, rewards = [sequence(a) for a in ANSWERS], REWARDS.double().numpy()

    def loss(step: int) -> Tensor:
        i, j = rng.choice(len(ANSWERS), (2, num_pairs), p=ref)
        first = rng.random(num_pairs) < 1 / (1 + np.exp(rewards[j] - rewards[i]))
        won, lost = np.where(first, i, j), np.where(first, j, i)
        fields = {"label_prob": 1.0, "margin": 0.0}
        pairs = [
            packed.Example([sequences[a], sequences[b]], "", fields) for a, b in zip(won, lost, strict=True)
        ]
        micro_batch = packed.make_micro_batch(pairs, list(range(num_pairs)), device)
        return reward_model.loss_and_metrics(scorer, micro_batch, args)[0] / num_pairs

    minimise(scorer, num_steps, loss)
    found = models.rewards(scorer, everything(device))[:, 0].detach().double().numpy()
    e, f = (x - (ref * x).sum() for x in (found - rewards, found))
    true = rewards - (ref * rewards).sum()
    both = np.outer(ref, ref) * ~np.eye(len(ref), dtype=bool)
    both /= both.sum()
    right = 1 / (1 + np.exp(rewards[None] - rewards[:, None]))
    chosen = np.sign(found[:, None] - found[None])
    return {
        "rms": np.sqrt((ref * e**2).sum()),
        "correlation": (ref * f * true).sum() / np.sqrt((ref * f**2).sum() * (ref * true**2).sum()),
        "accuracy": (both * np.where(chosen > 0, right, np.where(chosen < 0, 1 - right, 0.5))).sum(),
        "ceiling": (both * np.maximum(right, 1 - right)).sum(),
    }


@pytest.mark.slow
def test_e5_a_reward_model_recovers_the_reward_and_must_fail_if_read_one_token_early(
    tiny: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = reward_run(tiny, device)
    report("E5 RMS", found["rms"], 0.15)
    report("E5 1 - correlation", 1 - found["correlation"], 0.03)
    report("E5 accuracy below its ceiling", abs(found["ceiling"] - found["accuracy"]), 0.01)

    def early(scorer: Any, micro_batch: packed.MicroBatch) -> Tensor:
        return scorer(micro_batch, micro_batch.ends - 1)

    monkeypatch.setattr(models, "rewards", early)
    found = reward_run(tiny, device)
    print(f"E5 read one token early: RMS {found['rms']:.2g}, correlation {found['correlation']:.2g}")
    assert found["rms"] > 0.15 and found["correlation"] < 0.97


def ratings_of(num_draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy labels of two attributes of the 85 answers, 0 to 4. -> answers, labels with gaps, P(label)"""
    mean = torch.stack([2 + REWARDS / 2, 2 - REWARDS / 2], 1).clamp(0.5, 3.5)
    p = (-((torch.arange(5.0) - mean[..., None]) ** 2)).softmax(-1)  # (85, 2, 5)
    drawn = torch.randint(len(ANSWERS), (num_draws,), generator=generator)
    labels = torch.multinomial(p[drawn].flatten(0, 1), 1, generator=generator).view(-1, 2).float()
    labels[torch.rand(num_draws, generator=generator) < 0.4, 1] = float("nan")
    return drawn, labels, p


def excess(found: Tensor, p: Tensor) -> Tensor:
    """(MSE - E[Var], E[Var]) of each attribute, over all answers. -> (2, 2)"""
    best = (p * torch.arange(5.0)).sum(-1)
    variance = (p * (torch.arange(5.0) - best[..., None]) ** 2).sum(-1)
    return torch.stack([(found - best).square().mean(0), variance.mean(0)])


@pytest.mark.parametrize("trap", [False, True])
def test_e5_regression_on_noisy_labels_reaches_their_variance(trap: bool) -> None:
    drawn, labels, p = ratings_of(200_000, torch.Generator().manual_seed(0))
    labels = labels.nan_to_num() if trap else labels  # the trap: no label taken for a 0
    table = torch.zeros(len(ANSWERS), 2, requires_grad=True)
    descend(table, lambda: reward_model.regression_loss(table[drawn], labels).sum() / (~labels.isnan()).sum())
    over, variance = excess(table.detach(), p)
    if trap:
        assert (over / variance)[1] > 0.1
    else:
        report("E5 tabular (MSE - E[Var]) / E[Var]", (over / variance).max().item(), 0.005)


@pytest.mark.slow
def test_e5_an_attribute_model_reaches_the_variance(tiny: str, device: torch.device) -> None:
    args = args_of(reward_model.Args, loss="regression")
    scorer = models.load_scorer(tiny, device, args.system, ["helpfulness", "verbosity"])
    generator = torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        drawn, labels, _ = ratings_of(256, generator)
        fields = [dict(zip(["helpfulness", "verbosity"], row, strict=True)) for row in labels.tolist()]
        batch = [
            packed.Example([sequence(ANSWERS[i])], "", f) for i, f in zip(drawn.tolist(), fields, strict=True)
        ]
        micro_batch = packed.make_micro_batch(batch, list(range(len(batch))), device)
        total = reward_model.loss_and_metrics(scorer, micro_batch, args)[0]
        return total / reward_model.count_losses(batch, args)

    minimise(scorer, 400, loss)
    found = models.rewards(scorer, everything(device)).detach()
    over, variance = excess(found, ratings_of(1, generator)[2])
    report("E5 (MSE - E[Var]) / E[Var]", (over / variance).max().item(), 0.05)


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
    args = args_of(dpo.Args, beta=BETA)
    rng = np.random.default_rng(0)

    def example(i: int, j: int) -> packed.Example:
        prob = torch.sigmoid(REWARDS[i] - REWARDS[j]).item()
        fields = {"chosen_reward": 0.0, "rejected_reward": 0.0, "label_prob": prob}
        fields |= {"ref_chosen_logps": log_ref[i].item(), "ref_rejected_logps": log_ref[j].item()}
        if trap == "swapped":
            fields["label_prob"] = 1 - prob
        scored = [
            range(len(ANSWERS[k]) - (ANSWERS[k][-1] == EOS)) if trap == "no eos" else None for k in (i, j)
        ]
        return packed.Example([sequence(ANSWERS[i], scored[0]), sequence(ANSWERS[j], scored[1])], "", fields)

    def loss(step: int) -> Tensor:
        pairs = [example(*rng.choice(len(ANSWERS), 2, replace=False)) for _ in range(64)]
        micro_batch = packed.make_micro_batch(pairs, list(range(len(pairs))), device)
        return dpo.loss_and_metrics(policy, None, micro_batch, args)[0] / len(pairs)

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

    def averaged(token_logps: Tensor, micro_batch: packed.MicroBatch) -> Tensor:
        return honest(token_logps, micro_batch) / honest(torch.ones_like(token_logps), micro_batch)

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
