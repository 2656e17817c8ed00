"""dpo.py: its losses by hand, at their limits and in their direction, and a short run on the toy world."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import args_of, read_metrics

import dpo
from common import data, dist, formats, models, packed
from common.args import parse

H = torch.tensor([0.3])  # with beta 1, beta h = 0.3 throughout


def one_pair(**fields: float) -> dict[str, torch.Tensor]:
    values = {"chosen_reward": 1.0, "rejected_reward": 0.0, "label_prob": 1.0, **fields}
    return {name: torch.tensor([value]) for name, value in values.items()}


def pair_loss(chosen: float, rejected: float, lengths: tuple[int, int] = (1, 1), **settings: Any) -> float:
    """The loss of one pair whose log-ratios are given, through the choice that `loss` makes."""
    fields = one_pair(**{k: settings.pop(k) for k in list(settings) if k in formats.PAIR_FIELDS})
    logps = torch.tensor([[chosen, rejected]])
    args = args_of(dpo.Args, **settings)
    return dpo.pair_losses(logps, torch.zeros(1, 2), torch.tensor([lengths]), fields, args).item()


# by hand


def test_dpo_loss_by_hand() -> None:
    # -log sigmoid(.3) = log(1 + exp(-.3))
    assert dpo.dpo_loss(H, 1.0).item() == pytest.approx(math.log1p(math.exp(-0.3)), abs=1e-7)
    assert pair_loss(0.3, 0.0, beta=1.0) == pytest.approx(0.554355, abs=1e-6)


def test_beta_multiplies_the_log_ratio() -> None:
    assert pair_loss(3.0, 0.0, beta=0.1) == pytest.approx(0.554355, abs=1e-6)


def test_label_smoothing_is_cdpo() -> None:
    # .9 * .554355 + .1 * (.554355 + .3)
    assert pair_loss(0.3, 0.0, beta=1.0, label_smoothing=0.1) == pytest.approx(0.584355, abs=1e-6)


def test_a_soft_label_weighs_both_directions() -> None:
    # .7 * .554355 + .3 * .854355
    assert pair_loss(0.3, 0.0, beta=1.0, label_prob=0.7) == pytest.approx(0.644355, abs=1e-6)


def test_robust_by_hand() -> None:
    # (.9 * .554355 - .1 * .854355) / .8
    value = pair_loss(0.3, 0.0, beta=1.0, label_smoothing=0.1, loss="robust")
    assert value == pytest.approx(0.516855, abs=1e-6)


def test_robust_is_unbiased_under_flipped_labels() -> None:
    e, h = 0.2, torch.tensor([0.8])
    expected = (1 - e) * dpo.robust_loss(h, 1.0, e) + e * dpo.robust_loss(-h, 1.0, e)
    torch.testing.assert_close(expected, dpo.dpo_loss(h, 1.0))


def test_ipo_averages_and_ipo_sum_adds() -> None:
    # log-ratios 2 over 4 tokens and -1 over 2: means .5 and -.5; 1 / (2 * .1) = 5
    assert pair_loss(2.0, -1.0, (4, 2), loss="ipo") == pytest.approx(16.0, abs=1e-5)  # (1 - 5)^2
    assert pair_loss(2.0, -1.0, (4, 2), loss="ipo_sum") == pytest.approx(4.0, abs=1e-5)  # (3 - 5)^2


@pytest.mark.parametrize(
    ("loss", "value"), [("rpo_bwd_kl", 0.0528346), ("rpo_fwd_kl", 0.0567967), ("rpo_sq", 0.49)]
)
def test_rpo_by_hand(loss: str, value: float) -> None:
    # reward margin 1, beta h = .3: (.3 - 1)^2, and the two KLs of Bernoulli(.731059) and Bernoulli(.574443)
    assert pair_loss(0.3, 0.0, beta=1.0, loss=loss) == pytest.approx(value, abs=1e-6)


def test_rpo_scales_the_rewards_not_the_policy() -> None:
    a = pair_loss(0.3, 0.0, beta=1.0, loss="rpo_sq", reward_scale=0.5, chosen_reward=4.0, rejected_reward=1.0)
    assert a == pytest.approx((0.3 - 1.5) ** 2, abs=1e-6)


def test_simpo_by_hand() -> None:
    # beta 2: 2 * (-12 / 10 + 30 / 20) - 1 = -.4; log(1 + exp(.4))
    value = pair_loss(-12.0, -30.0, (10, 20), loss="simpo", beta=2.0, simpo_gamma=1.0)
    assert value == pytest.approx(0.913015, abs=1e-6)


# limits


@pytest.mark.parametrize("loss", ["dpo", "robust"])
def test_policy_equal_to_reference_gives_log_two(loss: str) -> None:
    assert pair_loss(0.0, 0.0, loss=loss, label_smoothing=0.1) == pytest.approx(math.log(2), abs=1e-6)


def test_a_large_reward_margin_makes_backward_kl_dpo() -> None:
    rpo = pair_loss(0.3, 0.0, beta=1.0, loss="rpo_bwd_kl", chosen_reward=40.0)
    assert rpo == pytest.approx(0.554355, abs=1e-6)


@pytest.mark.parametrize("loss", ["rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"])
def test_rpo_is_zero_and_flat_where_the_margins_meet(loss: str) -> None:
    h = torch.tensor([0.7], requires_grad=True)
    value = dpo.rpo_loss(h, 1.0, torch.tensor([0.7]), loss)
    value.backward()
    assert abs(value.item()) < 1e-7 and abs(h.grad.item()) < 1e-7


def test_losses_stay_finite_far_out() -> None:
    for loss in ("dpo", "robust", "rpo_bwd_kl", "rpo_fwd_kl", "simpo"):
        assert math.isfinite(pair_loss(-3000.0, 3000.0, beta=1.0, loss=loss, label_smoothing=0.1))


# direction


def test_the_gradient_raises_chosen_and_lowers_rejected() -> None:
    logps = torch.zeros(1, 2, requires_grad=True)
    args = args_of(dpo.Args, beta=0.4)
    dpo.pair_losses(logps, torch.zeros(1, 2), torch.ones(1, 2), one_pair(), args).sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[-0.2, 0.2]]))  # -/+ beta / 2


def test_rpo_gradient_by_hand() -> None:
    h = torch.tensor([0.3], requires_grad=True)
    dpo.rpo_loss(h, 1.0, torch.tensor([1.0]), "rpo_bwd_kl").backward()
    assert h.grad.item() == pytest.approx(-0.156616, abs=1e-6)  # sigmoid(.3) - sigmoid(1)


# through the model


def load(model: str, device: torch.device, **settings: Any) -> tuple[Any, dpo.Args]:
    args = args_of(dpo.Args, model=model, **settings)
    return models.load(model, device, args.system), args


def make_micro_batch(device: torch.device, **fields: float) -> packed.MicroBatch:
    """Two pairs of made-up tokens with responses of different lengths."""
    rng = np.random.default_rng(0)
    examples = []
    for prompt, chosen, rejected in ((5, 3, 6), (2, 4, 1)):
        head = rng.integers(10, 60, prompt)
        sides = [np.concatenate([head, rng.integers(10, 60, n)]).astype(np.int32) for n in (chosen, rejected)]
        masks = [np.arange(len(side)) >= prompt for side in sides]
        values = {"chosen_reward": 1.0, "rejected_reward": 0.0, "label_prob": 1.0, **fields}
        examples.append(packed.Example(list(zip(sides, masks, strict=True)), prompt="", fields=values))
    return packed.make_micro_batch(examples, [0, 1], device)


@pytest.mark.parametrize("reference", ["copy", "adapters", "computed before"])
def test_step_zero_is_log_two_with_each_reference(
    tiny_model: str, device: torch.device, reference: str
) -> None:
    policy, args = load(tiny_model, device, lora_rank=4 if reference == "adapters" else 0)
    ref_policy = (
        models.load(tiny_model, device, args.system, trainable=False) if reference == "copy" else None
    )
    micro_batch = make_micro_batch(device)
    if reference == "computed before":
        logps = dpo.response_logps(policy(micro_batch).logps.detach(), micro_batch)
        micro_batch.fields |= {"ref_chosen_logps": logps[:, 0], "ref_rejected_logps": logps[:, 1]}
    loss, metrics = dpo.loss_and_metrics(policy, ref_policy, micro_batch, args)
    assert loss.item() / 2 == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/margins"][0].item() == 0.0 and metrics["rewards/accuracies"][0].item() == 0


def test_only_response_tokens_count(tiny_model: str, device: torch.device) -> None:
    micro_batch = make_micro_batch(device)
    lengths = dpo.response_logps(torch.ones(len(micro_batch.targets)), micro_batch)
    assert lengths.tolist() == [[3, 6], [4, 1]]


def test_a_dummy_row_has_no_loss_and_a_zero_gradient(tiny_model: str, device: torch.device) -> None:
    policy, args = load(tiny_model, device)
    micro_batch = packed.make_micro_batch(
        [packed.Example([], "", fields=dict.fromkeys(formats.PAIR_FIELDS, 1.0))], [], device
    )
    loss, metrics = dpo.loss_and_metrics(policy, policy, micro_batch, args)
    loss.backward()
    assert loss.item() == 0.0 and all(total.item() == count == 0 for total, count in metrics.values())
    assert models.clip_grad_norm(policy, 1.0).item() == 0.0


def test_rewards_carry_beta(tiny_model: str, device: torch.device) -> None:
    policy, _ = load(tiny_model, device)
    micro_batch = make_micro_batch(device, ref_chosen_logps=-20.0, ref_rejected_logps=-20.0)
    rewards = {}
    for beta in (0.1, 0.3):
        _, metrics = dpo.loss_and_metrics(policy, None, micro_batch, args_of(dpo.Args, beta=beta))
        rewards[beta] = metrics["rewards/chosen"][0].item()
    assert rewards[0.3] == pytest.approx(3 * rewards[0.1], rel=1e-5)


def test_sft_coef_adds_the_mean_nll_of_chosen(tiny_model: str, device: torch.device) -> None:
    policy, args = load(tiny_model, device)
    micro_batch = make_micro_batch(device, ref_chosen_logps=0.0, ref_rejected_logps=0.0)
    plain, metrics = dpo.loss_and_metrics(policy, None, micro_batch, args)
    mixed, _ = dpo.loss_and_metrics(policy, None, micro_batch, args_of(dpo.Args, sft_coef=0.5))
    logps = dpo.response_logps(policy(micro_batch).logps, micro_batch)
    nll = -(logps[0, 0] / 3 + logps[1, 0] / 4)
    torch.testing.assert_close(mixed - plain, 0.5 * nll)


# learning


@pytest.mark.parametrize(
    "loss", ["dpo", "ipo", "ipo_sum", "robust", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl", "simpo"]
)
def test_every_loss_learns_to_prefer_chosen(few: Path, tmp_path: Path, loss: str) -> None:
    settings = {**dpo.TOY, "max_steps": 12, "batch_size": 16, "eval_every": 12, "num_samples": 0}
    settings["beta"] = 2.0 if loss == "simpo" else settings["beta"]  # per token, not per response
    dpo.main(args_of(dpo.Args, **settings, dataset=str(few / "pairs"), loss=loss, output_dir=str(tmp_path)))
    rows = read_metrics(tmp_path)
    # without a reference the policy's own preference is the start, which must be improved on
    bar = rows[0]["eval/rewards/accuracies"] if loss == "simpo" else 0.75
    assert rows[-1]["eval/rewards/accuracies"] > bar
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"label_smoothing": 0.1, "loss": "simpo"},
            "label_smoothing is 0.1, which loss simpo ignores",
        ),
        ({"simpo_gamma": 1.0}, "simpo_gamma is 1.0, which loss dpo ignores"),
        ({"reward_scale": 2.0, "loss": "ipo"}, "reward_scale is 2.0, which loss ipo"),
        ({"label_smoothing": 0.5, "loss": "robust"}, "label_smoothing: found 0.5"),
    ],
)
def test_an_option_that_the_loss_would_ignore_is_refused(
    options: dict, said: str, device: torch.device
) -> None:
    """By its name, before any work: the data, which do not exist, have not been looked at."""
    with pytest.raises(dist.RunError, match=said):
        dpo.main(args_of(dpo.Args, **options, dataset="absent.jsonl"))
    for loss in ("dpo", "robust"):
        dpo.check(args_of(dpo.Args, loss=loss, label_smoothing=0.1))
    dpo.check(args_of(dpo.Args, loss="rpo_sq", reward_scale=2.0))


@pytest.mark.parametrize("loss", ["dpo", "robust", "ipo", "ipo_sum", "rpo_sq", "rpo_bwd_kl", "simpo"])
def test_a_field_of_the_data_is_read_or_refused(loss: str, few: Path, tmp_path: Path) -> None:
    """Labels that are not certain change the loss, or are refused, in either part of the data; so are pairs
    without the rewards that a loss regresses on."""
    args = args_of(dpo.Args, loss=loss)
    values = [pair_loss(0.3, 0.1, loss=loss, label_prob=p) for p in (1.0, 0.6, 0.0)]
    assert len(set(values)) == (3 if dpo.reads_label_prob(loss) else 1)

    def pairs(p: float, record: dict) -> data.Dataset:
        return data.Dataset([([packed.Example([], "", {"label_prob": p}, record)], 1.0)])

    rewarded = {"score_chosen": 9, "score_rejected": 2}
    dpo.check_pairs(args, pairs(1.0, rewarded))
    if dpo.reads_label_prob(loss):
        return dpo.check_pairs(args, pairs(0.0, {}))
    with pytest.raises(
        dist.RunError, match=f"loss {loss}: found label_prob below 1, which it ignores, in 1 p"
    ):
        dpo.check_pairs(args, pairs(0.6, rewarded))
    if loss.startswith("rpo"):
        for record in ({"chosen": "a", "rejected": "b"}, {"score_chosen": 9}):
            with pytest.raises(dist.RunError, match="a pair without rewards"):
                dpo.check_pairs(args, pairs(1.0, record))
    lines = (few / "pairs" / "train.jsonl").read_text().splitlines()[:20]
    for name, more in (("sure", {}), ("soft", {"label_prob": 0.9})):
        records = [json.dumps(json.loads(line) | more) for line in lines]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(records))
    held_out = {"dataset": str(tmp_path / "sure.jsonl"), "eval_dataset": str(tmp_path / "soft.jsonl")}
    with pytest.raises(dist.RunError, match="in 20 pairs"):
        dpo.main(args_of(dpo.Args, **dpo.TOY, loss=loss, **held_out, output_dir=str(tmp_path / "run")))


def test_simpo_comes_with_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, expected in (([], (2.0, 1.0, 0.0)), (["--beta=2.5"], (2.5, 1.0, 0.0))):
        monkeypatch.setattr(sys, "argv", ["dpo.py", "--loss=simpo", *words])
        args = parse(dpo.Args, dpo.TOY)
        assert (args.beta, args.simpo_gamma, args.sft_coef) == expected
