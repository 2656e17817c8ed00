"""reward_model.py: its losses by hand, at their limits and in their direction, where it reads, short runs."""

import copy
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import args_of, make_tiny_model, read_metrics
from safetensors.torch import load_file

import reward_model
from common import data, dist, formats, models, packed
from common.rewards import load as load_rewards
from common.rewards import score_replies

NAN = math.nan
RANKED = torch.tensor([[1.0, 2.0, 3.0]])


def pair_loss(chosen: float, rejected: float, **settings: Any) -> float:
    """The loss of one pair whose rewards are given, through the choice that `loss` makes."""
    fields = {"margin": 0.0, "label_prob": 1.0}
    fields |= {k: settings.pop(k) for k in list(settings) if k in fields}
    args = args_of(reward_model.Args, **settings)
    fields = {name: torch.tensor([value]) for name, value in fields.items()}
    table, target = reward_model.arrange(torch.tensor([[chosen], [rejected]]), fields, args)
    return reward_model.example_losses(table, target, fields, args).item()


def tiny_examples(count: int = 6, sides: int = 2, **fields: float) -> list[packed.Example]:
    """Examples of made-up tokens with responses of different lengths."""
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(count):
        sequences = []
        for _ in range(sides):
            tokens = rng.integers(10, 60, rng.integers(3, 12)).astype(np.int32)
            sequences.append((tokens, np.arange(len(tokens)) >= 2))
        examples.append(packed.Example(sequences, "", {"margin": 1.0, "label_prob": 1.0, **fields}))
    return examples


# by hand


def test_bradley_terry_by_hand() -> None:
    # log(1 + exp(-1.5))
    assert pair_loss(2.0, 0.5) == pytest.approx(0.201413, abs=1e-6)


def test_a_margin_must_be_won_by() -> None:
    # log(1 + exp(-.5))
    assert pair_loss(2.0, 0.5, loss="margin_bt", margin=1.0) == pytest.approx(0.474077, abs=1e-6)


def test_a_margin_can_weigh_instead() -> None:
    # 2 * .201413
    assert pair_loss(2.0, 0.5, loss="scaled_bt", margin=2.0) == pytest.approx(0.402827, abs=1e-6)


def test_a_soft_label_weighs_both_directions() -> None:
    # .7 * .201413 + .3 * 1.701413
    assert pair_loss(2.0, 0.5, label_prob=0.7) == pytest.approx(0.651413, abs=1e-6)


def test_centring_adds_the_square_of_the_sum() -> None:
    # .201413 + .01 * 2.5^2
    assert pair_loss(2.0, 0.5, center_coef=0.01) == pytest.approx(0.263913, abs=1e-6)


def test_kwise_is_the_mean_over_pairs() -> None:
    # margins .5, 1, .5: (.474077 + .313262 + .474077) / 3
    loss = reward_model.kwise_loss(torch.tensor([[1.0, 0.5, 0.0]]), RANKED)
    assert loss.item() == pytest.approx(0.420472, abs=1e-6)


def test_the_order_of_the_responses_does_not_matter() -> None:
    ranks = torch.tensor([[3.0, 1.0, 2.0]])
    rewards = torch.tensor([[0.0, 1.0, 0.5]])
    assert reward_model.kwise_loss(rewards, ranks).item() == pytest.approx(0.420472, abs=1e-6)
    assert reward_model.plackett_luce_loss(rewards, ranks).item() == pytest.approx(1.154347, abs=1e-6)


def test_plackett_luce_by_hand() -> None:
    # -log[e / (e + e^.5 + 1)] - log[e^.5 / (e^.5 + 1)] = .680270 + .474077
    loss = reward_model.plackett_luce_loss(torch.tensor([[1.0, 0.5, 0.0]]), RANKED)
    assert loss.item() == pytest.approx(1.154347, abs=1e-6)


@pytest.mark.parametrize("loss", [reward_model.kwise_loss, reward_model.plackett_luce_loss])
def test_two_responses_are_bradley_terry(loss: Any) -> None:
    assert loss(torch.tensor([[2.0, 0.5]]), RANKED[:, :2]).item() == pytest.approx(0.201413, abs=1e-6)


def test_a_badly_ordered_pair_is_not_capped() -> None:
    # -log(sigmoid(-20) + 1e-5), as in MOSS-RLHF, would be 11.5
    assert pair_loss(-20.0, 0.0) == pytest.approx(20.0, abs=1e-5)
    margins = torch.tensor([-20.0], requires_grad=True)
    reward_model.bt_loss(margins).sum().backward()
    assert margins.grad.item() == pytest.approx(-1.0, abs=1e-6)


def test_regression_by_hand() -> None:
    # (1 + 0 + 4) / 3; the unknown label has no part in it
    rewards = torch.tensor([[3.0, 1.0], [2.0, 4.0]], requires_grad=True)
    labels = torch.tensor([[4.0, NAN], [2.0, 2.0]])
    loss = reward_model.regression_loss(rewards, labels).sum() / (~labels.isnan()).sum()
    loss.backward()
    assert loss.item() == pytest.approx(5 / 3, abs=1e-6)
    assert rewards.grad.tolist() == [[pytest.approx(-2 / 3), 0.0], [0.0, pytest.approx(4 / 3)]]


def test_labels_are_counted_over_the_batch_not_over_its_parts() -> None:
    # squared errors {1} and {0, 4}: 5 / 3; the mean of the two means would be 1.5
    args = args_of(reward_model.Args, loss="regression")
    labels = [{"a": 4.0, "b": NAN}, {"a": 2.0, "b": 2.0}]
    batch = [packed.Example([], "", fields) for fields in labels]
    total = 0.0
    for rewards, fields in zip(([[3.0, 1.0]], [[2.0, 4.0]]), labels, strict=True):
        fields = {name: torch.tensor([value]) for name, value in fields.items()}
        table, target = reward_model.arrange(torch.tensor(rewards), fields, args)
        total += reward_model.example_losses(table, target, fields, args).sum().item()
    assert total / reward_model.count_losses(batch, args) == pytest.approx(5 / 3)


def test_wilson_interval_by_a_known_value() -> None:
    assert reward_model.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = reward_model.wilson_interval(10, 10)
    assert low == pytest.approx(0.7225, abs=1e-4) and high == pytest.approx(1.0)


def test_calibration_error_by_hand() -> None:
    # sigmoid(.2) = .549834 is in the first bin, sigmoid(3) = .952574 in the last
    ranks = RANKED[:, :2].expand(2, 2)
    apart = torch.tensor([[0.2, 0.0], [0.0, 3.0]])  # right, wrong: (.450166 + .952574) / 2
    assert reward_model.calibration_error(apart, ranks) == pytest.approx(0.701370, abs=1e-5)
    together = torch.tensor([[0.2, 0.0], [0.0, 0.2]])  # one of two right at .549834
    assert reward_model.calibration_error(together, ranks) == pytest.approx(0.049834, abs=1e-5)


def held_out(*lengths: tuple[int, int]) -> list[packed.Example]:
    def sequence(length: int) -> packed.Tokens:
        return np.zeros(length + 1, np.int32), np.arange(length + 1) > 0

    fields = {"margin": 1.0, "label_prob": 1.0}
    return [packed.Example([sequence(n) for n in pair], "", fields) for pair in lengths]


def test_the_length_baseline_by_hand() -> None:
    # longer, longer, shorter, equal: (2 + 1/2) / 4; the other way round it is 1 less that
    args, rewards = reward_model.Args(), torch.arange(8.0)[:, None]
    metrics = reward_model.evaluation(rewards, held_out((5, 3), (4, 1), (2, 6), (3, 3)), args)
    assert metrics["length_accuracy"] == pytest.approx(0.625)
    metrics = reward_model.evaluation(rewards, held_out((3, 5), (1, 4), (6, 2), (3, 3)), args)
    assert metrics["length_accuracy"] == pytest.approx(0.625)


def test_held_out_metrics_by_hand() -> None:
    # margins 1.5, -.5, 0: losses .201413, .974077, .693147
    rewards = torch.tensor([[2.0], [0.5], [0.0], [0.5], [1.0], [1.0]])
    metrics = reward_model.evaluation(rewards, held_out((1, 1), (1, 1), (1, 1)), reward_model.Args())
    assert metrics["loss"] == pytest.approx(0.622879, abs=1e-5)
    assert metrics["accuracy"] == pytest.approx(1 / 3) and metrics["margin"] == pytest.approx(1 / 3)
    assert metrics["mean_reward"] == pytest.approx(5 / 6) and metrics["max_reward"] == 2
    assert metrics["reward_std"] == pytest.approx(0.623610, abs=1e-5)  # sqrt(6.5 / 6 - 25 / 36)
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == reward_model.wilson_interval(1, 3)


def test_correlations_leave_unknown_labels_out() -> None:
    # helpfulness 1, 2, 9 against 0, 1, 2: ranks agree; errors 1, 1, 7
    args = args_of(reward_model.Args, loss="regression")
    rows = [(0.0, 4.0), (1.0, NAN), (2.0, 2.0)]
    examples = [packed.Example([], "", {"helpfulness": a, "verbosity": b}) for a, b in rows]
    metrics = reward_model.evaluation(torch.tensor([[1.0, 1.0], [2.0, 9.0], [9.0, 2.0]]), examples, args)
    assert metrics["mae/helpfulness"] == 3 and metrics["spearman/helpfulness"] == pytest.approx(1.0)
    assert metrics["pearson/helpfulness"] == pytest.approx(8 / math.sqrt(76), abs=1e-6)
    assert metrics["mae/verbosity"] == 1.5 and metrics["pearson/verbosity"] == pytest.approx(-1.0)
    assert metrics["loss"] == pytest.approx((1 + 1 + 49 + 9 + 0) / 5)


# limits


@pytest.mark.parametrize("loss", ["bt", "margin_bt", "scaled_bt"])
def test_equal_rewards_give_log_two_and_no_accuracy(loss: str) -> None:
    margin = 0.0 if loss == "margin_bt" else 1.0
    assert pair_loss(0.7, 0.7, loss=loss, margin=margin) == pytest.approx(math.log(2), abs=1e-6)
    right, margins = reward_model.ordered_right(torch.tensor([[0.7, 0.7]]), RANKED[:, :2])
    assert right.item() == 0 and margins.item() == 0


@pytest.mark.parametrize("loss", [reward_model.kwise_loss, reward_model.plackett_luce_loss])
def test_only_differences_within_a_prompt_count(loss: Any) -> None:
    rewards = torch.tensor([[1.0, 0.5, 0.0]])
    torch.testing.assert_close(loss(rewards + 7.0, RANKED), loss(rewards, RANKED))
    assert pair_loss(9.0, 7.5) == pytest.approx(pair_loss(2.0, 0.5), abs=1e-6)


def test_regression_is_about_the_values_themselves() -> None:
    rewards = torch.tensor([[1.0]])
    assert reward_model.regression_loss(rewards, rewards).item() == 0
    assert reward_model.regression_loss(rewards + 7.0, rewards).item() == 49


def test_the_soft_label_optimum_is_the_logit() -> None:
    # p = .6: log(.6 / .4) = .405465, where the loss is the entropy .673012
    margins = torch.tensor([0.405465], requires_grad=True)
    loss = reward_model.bt_loss(margins, 0.6)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.673012, abs=1e-6) and abs(margins.grad.item()) < 1e-6


@pytest.mark.parametrize("loss", [reward_model.kwise_loss, reward_model.plackett_luce_loss])
def test_a_missing_response_has_no_part_and_no_gradient(loss: Any) -> None:
    rewards = torch.tensor([[2.0, 0.5, 99.0]], requires_grad=True)
    value = loss(rewards, torch.tensor([[1.0, 2.0, NAN]]))
    value.sum().backward()
    assert value.item() == pytest.approx(0.201413, abs=1e-6)
    assert rewards.grad[0, 2].item() == 0 and rewards.grad.isfinite().all()
    assert rewards.grad[0, 0].item() == pytest.approx(-0.182426, abs=1e-6)  # sigmoid(-1.5)


def test_equal_ranks_form_no_pair() -> None:
    # 1, 1, 2: the margins of the first two over the third, 1 and .5
    ranks = torch.tensor([[1.0, 1.0, 2.0]])
    loss = reward_model.kwise_loss(torch.tensor([[1.0, 0.5, 0.0]]), ranks)
    assert loss.item() == pytest.approx((0.313262 + 0.474077) / 2, abs=1e-6)
    right, _ = reward_model.ordered_right(torch.tensor([[0.0, 1.0, 0.5]]), ranks)
    assert right.item() == 0.5


def test_losses_stay_finite_far_out() -> None:
    for loss in ("bt", "margin_bt", "scaled_bt"):
        assert math.isfinite(pair_loss(-3000.0, 3000.0, loss=loss, margin=3.0))
    for loss in (reward_model.kwise_loss, reward_model.plackett_luce_loss):
        assert loss(torch.tensor([[-3e3, 0.0, 3e3]]), RANKED).isfinite().all()


# direction


def test_the_gradient_raises_chosen_and_lowers_rejected() -> None:
    args, fields = reward_model.Args(), {"label_prob": torch.ones(1), "margin": torch.zeros(1)}
    rewards = torch.zeros(2, 1, requires_grad=True)
    table, target = reward_model.arrange(rewards, fields, args)
    reward_model.example_losses(table, target, fields, args).sum().backward()
    assert rewards.grad.flatten().tolist() == [-0.5, 0.5]  # -/+ sigmoid(0)


@pytest.mark.parametrize("loss", [reward_model.kwise_loss, reward_model.plackett_luce_loss])
def test_the_best_rises_and_the_worst_falls(loss: Any) -> None:
    rewards = torch.zeros(1, 3, requires_grad=True)
    loss(rewards, torch.tensor([[2.0, 3.0, 1.0]])).sum().backward()
    assert rewards.grad[0, 2] < rewards.grad[0, 0] < rewards.grad[0, 1]
    assert rewards.grad[0, 2] < 0 < rewards.grad[0, 1]


# through the model


def load(model: str, device: torch.device, *names: str, **settings: Any) -> tuple[Any, reward_model.Args]:
    args = args_of(reward_model.Args, model=model, **settings)
    return models.load_scorer(model, device, args.system, names), args


def test_the_end_of_each_sequence_is_read_however_rows_are_packed(
    tiny_model: str, device: torch.device
) -> None:
    scorer, _ = load(tiny_model, device, "reward")
    examples = tiny_examples()
    together = models.rewards(scorer, packed.make_micro_batch(examples, list(range(6)), device))
    alone = []
    for sequence in (s for e in examples for s in e.sequences):
        micro_batch = packed.make_micro_batch([packed.Example([sequence], "")], [0], device)
        alone.append(models.rewards(scorer, micro_batch))
        assert micro_batch.ends.tolist() == [len(sequence[0]) - 1]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert together.std() > 0.1


@pytest.mark.parametrize("loss", ["bt", "kwise", "regression"])
def test_a_dummy_row_has_no_loss_and_a_zero_gradient(
    tiny_model: str, device: torch.device, loss: str
) -> None:
    scorer, args = load(tiny_model, device, "a", loss=loss)
    fields = {"bt": {"margin": 1.0, "label_prob": 1.0}, "kwise": {"ranks": np.array([1.0, 2.0])}}
    micro_batch = packed.make_micro_batch([packed.Example([], "", fields.get(loss, {"a": 1.0}))], [], device)
    value, metrics = reward_model.loss_and_metrics(scorer, micro_batch, args)
    value.backward()
    assert value.item() == 0.0 and all(total.item() == count == 0 for total, count in metrics.values())
    assert models.clip_grad_norm(scorer, 1.0).item() == 0.0


def test_a_row_of_rankings_of_different_sizes(tiny_model: str, device: torch.device) -> None:
    scorer, args = load(tiny_model, device, "reward", loss="kwise")
    two, three = tiny_examples(1)[0], tiny_examples(1, sides=3)[0]
    two.fields = {"ranks": np.array([2.0, 1.0])}
    three.fields = {"ranks": np.array([3.0, 1.0, 2.0])}
    micro_batch = packed.make_micro_batch([two, three], [0, 1], device)
    a, b, c, d, e = models.rewards(scorer, micro_batch)[:, 0]
    by_hand = reward_model.bt_loss(b - a)
    by_hand = by_hand + reward_model.bt_loss(torch.stack([d - e, d - c, e - c])).mean()
    loss, metrics = reward_model.loss_and_metrics(scorer, micro_batch, args)
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(metrics["mean_reward"], (a + b + c + d + e, 5))


# the export, in plain transformers


def run(folder: Path, model: str, dataset: Path | str, **settings: Any) -> list[dict]:
    base = {**reward_model.TOY, "max_steps": 1, "batch_size": 16, "eval_every": 100}
    args = {**base, "model": model, "dataset": str(dataset), "output_dir": str(folder), **settings}
    reward_model.main(args_of(reward_model.Args, **args))
    return read_metrics(folder)


def plain_scores(folder: Path, sequences: list[packed.Tokens], side: str, **config: Any) -> torch.Tensor:
    """What AutoModelForSequenceClassification says about one padded batch. -> (sequences, A)"""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32)
    for name, value in config.items():
        setattr(model.config, name, value)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side=side)
    ids = [{"input_ids": tokens.tolist()} for tokens, _ in sequences]
    return model(**tokenizer.pad(ids, return_tensors="pt")).logits.detach()


def our_scores(folder: Path, sequences: list[packed.Tokens], device: torch.device) -> torch.Tensor:
    """Ours, as the model has them: not centred."""
    scorer = models.load_scorer(str(folder), device, reward_model.Args().system, trainable=False)
    scorer.config.reward_mean = None
    return models.score(scorer, [packed.Example(sequences, "")], 0, device)


def sequences_of(folder: Path, few: Path, count: int = 8) -> list[packed.Tokens]:
    tokenizer = data.load_tokenizer(str(folder))
    records = formats.read_file(few / "pairs" / "test.jsonl")[:count]
    return [s for record in records for s in data.read_responses(tokenizer, *record)]


@pytest.mark.parametrize("kind", ["a padding token of its own", "the end token pads", "lora"])
def test_plain_transformers_reads_the_same_scores(
    kind: str, few: Path, tiny_model: str, tokenizer: Any, device: torch.device, tmp_path: Path
) -> None:
    if kind == "the end token pads":
        other = copy.deepcopy(tokenizer)
        other.pad_token = other.eos_token
        tiny_model = str(make_tiny_model(tmp_path / "tiny", other))
        assert data.load_tokenizer(tiny_model).pad_token_id == data.end_token(tokenizer)
    more = {"lora_rank": 4, "learning_rate": 0.05, "max_steps": 3} if kind == "lora" else {}
    run(tmp_path / "run", tiny_model, few / "pairs", **more)
    sequences = sequences_of(tmp_path / "run", few)
    assert len({len(tokens) for tokens, _ in sequences}) > 3  # so that there is padding
    ours = our_scores(tmp_path / "run", sequences, device)
    for side in ("right", "left"):
        theirs = plain_scores(tmp_path / "run", sequences, side)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    # the trap: padded by the end token, transformers reads one token early
    early = plain_scores(tmp_path / "run", sequences, "right", pad_token_id=data.end_token(tokenizer))
    assert (early - ours).abs().max() > 1e-2


@pytest.mark.parametrize("pad", ["a token of its own", "the end token"])
def test_a_model_of_trl_is_read_where_it_was_trained(
    pad: str,
    few: Path,
    tiny_model: str,
    device: torch.device,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """TRL keeps what the template writes after the end token, in ChatML a newline, and is scored there."""
    from transformers import AutoModelForSequenceClassification
    from trl.data_utils import _tokenize
    from trl.trainer.reward_trainer import DataCollatorForPreference

    theirs = data.load_tokenizer(tiny_model, "chatml")
    theirs.pad_token = theirs.eos_token if pad == "the end token" else theirs.pad_token
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    plain.config.pad_token_id = theirs.pad_token_id  # as RewardTrainer does
    plain.save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    records = formats.read_file(few / "pairs" / "test.jsonl")[:8]
    turns = [{x: r.value["prompt"] + r.value[x] for x in ("chosen", "rejected")} for r in records]
    pairs = [{f"{x}_ids": _tokenize(theirs, pair[x])["input_ids"] for x in pair} for pair in turns]
    assert all(ids[-1] != data.end_token(theirs) for pair in pairs for ids in pair.values())
    batch = DataCollatorForPreference(pad_token_id=theirs.pad_token_id)(pairs)
    expected = plain(**batch).logits.detach()[:, 0].view(2, -1).T  # chosen, rejected

    def ours() -> torch.Tensor:
        asked = [packed.Example([], record.value["prompt"]) for record in records for _ in range(2)]
        replies = [record.value[x][0]["content"] for record in records for x in ("chosen", "rejected")]
        (reward,) = load_rewards(str(tmp_path), device, reward_model.Args().system)
        return torch.tensor(score_replies([reward], asked, replies, 0, device)).view(-1, 2)

    torch.testing.assert_close(ours(), expected, atol=1e-5, rtol=1e-5)
    assert "read as by transformers and TRL, at the template's last token" in capsys.readouterr().out
    shutil.copy(few / "pairs" / "test.jsonl", tmp_path / "pairs.jsonl")
    found = score(str(tmp_path), str(tmp_path / "pairs.jsonl"))[:8]
    found = torch.tensor([[row["chosen_reward"], row["rejected_reward"]] for row in found])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"score_at": "end"}))
    assert (ours() - expected).abs().min() > 1e-4  # at the end token it is another model
    file.write_text(json.dumps(json.loads(file.read_text()) | {"score_at": "middle"}))
    with pytest.raises(dist.RunError, match="found middle; expected end or last"):
        ours()


def test_a_model_padded_with_its_end_token_is_read_as_transformers_does(
    tiny_model: str, device: torch.device, tmp_path: Path
) -> None:
    """Without a token after the end, that takes the end token for padding and reads one token early."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = data.load_tokenizer(tiny_model)
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    plain.config.pad_token_id = data.end_token(tokenizer)
    plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    turns = [{"role": "user", "content": "What does the cat say?"}]
    tokens, _ = data.encode_response(tokenizer, turns, [{"role": "assistant", "content": "It says meow."}])
    expected = plain(torch.tensor(tokens)[None].long()).logits[0].tolist()
    loaded = load_rewards(str(tmp_path), device, reward_model.Args().system)
    asked = [packed.Example([], turns)]
    assert score_replies(loaded, asked, ["It says meow."], 0, device) == pytest.approx(expected, abs=1e-5)


def test_lora_leaves_the_adapted_weights_in_the_export(few: Path, tiny_model: str, tmp_path: Path) -> None:
    run(tmp_path, tiny_model, few / "pairs", lora_rank=4, learning_rate=0.05, max_steps=3)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    before = load_file(Path(tiny_model) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not [n for n in weights if "lora" in n] and (weights[name] - before[name]).abs().max() > 1e-3


def test_scores_of_training_responses_have_mean_zero_and_deviation_one(
    few: Path, tiny_model: str, device: torch.device, tmp_path: Path
) -> None:
    run(tmp_path, tiny_model, few / "pairs")
    scorer, args = load(str(tmp_path), device, dataset=str(few / "pairs"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert len(config["reward_mean"]) == len(config["reward_std"]) == 1
    source = str(few / "pairs")
    pairs, _ = data.load_pairs(data.load_tokenizer("toy"), source, "", args.max_length)
    scores = models.score(scorer, pairs, 0, device)
    assert abs(scores.mean().item()) < 1e-4
    assert scores.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)


# learning


def test_a_run_learns_what_length_does_not_tell(few: Path, tmp_path: Path) -> None:
    rows = run(tmp_path, "toy", few / "pairs", max_steps=16, batch_size=32, eval_every=16)
    first, last = rows[0], rows[-1]
    assert last["eval/accuracy"] > last["eval/length_accuracy"] + 0.1
    assert last["eval/accuracy"] > first["eval/accuracy"] + 0.1
    assert last["eval/loss"] < first["eval/loss"] and last["eval/margin"] > 0.5


def ranked_file(few: Path, folder: Path) -> Path:
    """Rankings of three, and now and then of two: polite, rude, off the point."""
    records = [record.value for record in formats.read_file(few / "pairs" / "train.jsonl")[:64]]
    for i, record in enumerate(records):
        responses = [record.pop("rejected"), record.pop("chosen"), "Mice. Mice. Mice."]
        record |= {"responses": responses[: 2 + (i % 4 > 0)], "ranks": [2, 1, 3][: 2 + (i % 4 > 0)]}
    path = folder / "ranked.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("loss", ["kwise", "plackett_luce"])
def test_rankings_are_learned(few: Path, tmp_path: Path, loss: str) -> None:
    path = ranked_file(few, tmp_path)
    more = {"loss": loss, "eval_dataset": str(path), "max_steps": 6, "eval_every": 6}
    rows = run(tmp_path / "run", "toy", path, **more)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]
    assert rows[-1]["eval/accuracy"] > 0.8 and rows[-1]["train/accuracy"] > 0.5


def test_several_held_out_sets_are_told_apart(few: Path, tiny_model: str, tmp_path: Path) -> None:
    lines = (few / "pairs" / "test.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("easy", lines[:20]), ("hard", lines[20:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    both = f"{tmp_path}/easy.jsonl,{tmp_path}/hard.jsonl"
    row = run(tmp_path / "run", tiny_model, few / "pairs", eval_dataset=both)[0]
    one = run(tmp_path / "one", tiny_model, few / "pairs", eval_dataset=f"{tmp_path}/hard.jsonl")[0]
    assert {"eval/easy/accuracy", "eval/hard/accuracy", "eval/easy/length_accuracy"} <= set(row)
    assert row["eval/hard/loss"] == pytest.approx(one["eval/loss"], abs=1e-6)
    assert "eval/loss" not in row and row["eval/easy/loss"] != row["eval/hard/loss"]


def test_held_out_files_of_one_name_are_numbered() -> None:
    held = data.Dataset([(tiny_examples(2), 1.0), (tiny_examples(3), 1.0), (tiny_examples(1), 1.0)])
    args = args_of(reward_model.Args, eval_dataset="a/test.jsonl,b/test.jsonl,c.jsonl")
    found = reward_model.eval_sets(held, args)
    assert {name: len(examples) for name, examples in found.items()} == {"test_1/": 2, "test_2/": 3, "c/": 1}


# attributes


@pytest.fixture(scope="module")
def ratings(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rated replies; every third lacks its toxicity."""
    folder = tmp_path_factory.mktemp("ratings")
    for split, count in (("train", 96), ("test", 32)):
        records = [record.value for record in formats.read_file(toy / "ratings" / f"{split}.jsonl")[:count]]
        for record in records[::3]:
            record["label"]["toxicity"] = None
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def attribute_run(ratings: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("attributes")
    more = {"loss": "regression", "max_steps": 12, "batch_size": 32, "eval_every": 12}
    return folder, run(folder, "toy", ratings, **more)


def test_attributes_are_learned(attribute_run: tuple[Path, list[dict]]) -> None:
    rows = attribute_run[1]
    assert rows[-1]["eval/loss"] < 0.5 * rows[0]["eval/loss"]
    assert rows[-1]["eval/pearson/verbosity"] > 0.5
    assert {"eval/mae/toxicity", "eval/spearman/helpfulness", "train/mae"} <= set(rows[-1])


def test_missing_labels_and_micro_batches_do_not_mix(ratings: Path, tiny_model: str, tmp_path: Path) -> None:
    found = []
    for tokens in (60, 100_000):
        more = {"loss": "regression", "micro_batch_tokens": tokens, "max_steps": 3, "batch_size": 8}
        rows = run(tmp_path / str(tokens), tiny_model, ratings, **more)
        found.append([row[f"train/{name}"] for row in rows[1:] for name in ("loss", "mae", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def with_margins(few: Path, folder: Path) -> Path:
    records = [record.value for record in formats.read_file(few / "pairs" / "train.jsonl")[:48]]
    lines = [json.dumps(record | {"margin": 1 + i % 3}) + "\n" for i, record in enumerate(records)]
    (folder / "margins.jsonl").write_text("".join(lines))
    return folder / "margins.jsonl"


def test_a_second_stage_begins_with_the_head_of_its_attribute(
    attribute_run: tuple[Path, list[dict]], few: Path, device: torch.device, tmp_path: Path
) -> None:
    folder, _ = attribute_run
    more = {"attribute": "toxicity", "loss": "scaled_bt", "eval_dataset": str(few / "pairs")}
    path = with_margins(few, tmp_path)
    still = run(tmp_path / "still", str(folder), path, **more, learning_rate=0.0)
    saved = load_file(folder / "model" / "model.safetensors")["score.weight"]
    config = json.loads((folder / "model" / "config.json").read_text())
    at = config["label2id"]["toxicity"]
    kept = load_file(tmp_path / "still" / "model" / "model.safetensors")["score.weight"]
    torch.testing.assert_close(kept, saved[at : at + 1], atol=0, rtol=0)
    after = json.loads((tmp_path / "still" / "model" / "config.json").read_text())
    assert after["id2label"] == {"0": "toxicity"} and len(after["reward_mean"]) == 1
    assert still[-1]["eval/accuracy"] < 0.5  # the toxic reply is the rejected one
    moved = run(tmp_path / "moved", str(folder), path, **more, max_steps=4)
    assert moved[-1]["eval/accuracy"] > still[-1]["eval/accuracy"]


# scoring files


FILES = {
    "responses": [("few", "sft"), ["reward"]],
    "pairs": [("few", "pairs"), ["chosen_reward", "rejected_reward"]],
    "lists": [None, ["rewards"]],
}


@pytest.fixture(scope="module")
def scorer_run(few: Path, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scorer")
    run(folder, tiny_model, few / "pairs")
    return str(folder)


def score(model: str, path: str) -> list[dict]:
    """Runs here and on the session of two ranks."""
    folder = Path(path).parent / "run"
    reward_model.main(args_of(reward_model.Args, model=model, score=path, output_dir=str(folder)))
    return [json.loads(line) for line in scored_file(path).read_text().splitlines()]


def scored_file(path: str | Path) -> Path:
    """What `score` has written; its name has a digest of the file and the model."""
    folder, name = Path(path).parent / "run" / "scored", Path(path).name.removesuffix(".jsonl")
    (found,) = folder.glob(f"{name}-*.jsonl")
    return found


def flat(value: dict, names: list[str]) -> list[float]:
    return [x for name in names for x in (value[name] if name == "rewards" else [value[name]])]


@pytest.mark.parametrize("kind", list(FILES))
def test_a_scored_file_has_the_direct_scores(
    kind: str, scorer_run: str, few: Path, two_ranks: Any, device: torch.device, tmp_path: Path
) -> None:
    source, names = FILES[kind]
    path = tmp_path / "file.jsonl"
    path.write_text((few / source[1] / "test.jsonl" if source else ranked_file(few, tmp_path)).read_text())
    found = score(scorer_run, str(path))
    records = formats.read_file(path)
    assert found == [r.value | {k: v[k] for k in names} for r, v in zip(records, found, strict=True)]
    sequences = [s for r in records for s in data.read_responses(data.load_tokenizer("toy"), *r)]
    scorer, args = load(scorer_run, device)
    direct = models.score(scorer, [packed.Example(sequences, "")], 0, device)[:, 0].tolist()
    assert [x for value in found for x in flat(value, names)] == pytest.approx(direct, abs=1e-5)
    scored_file(path).unlink()
    one, two = two_ranks("test_reward_model:score", model=scorer_run, path=str(path))
    assert one == two
    assert [x for v in one for x in flat(v, names)] == pytest.approx(direct, abs=1e-5)


def test_the_accuracy_of_scored_pairs_is_said_by_subset(
    scorer_run: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As in RewardBench: a subset of two pairs and one of one; equal replies are not told apart."""
    pairs = [
        ("easy", "Moo.", "Go away, you clown."),
        ("easy", "Go away, you clown.", "Moo."),
        ("tie", "a", "a"),
    ]
    path = tmp_path / "bench.jsonl"
    ask = {"prompt": "What does the cow say?"}
    path.write_text(
        "".join(json.dumps({**ask, "subset": s, "chosen": a, "rejected": b}) + "\n" for s, a, b in pairs)
    )
    score(scorer_run, str(path))
    said = capsys.readouterr().out.splitlines()
    assert "accuracy 0.500 of 2 pairs: easy" in said and "accuracy 0.000 of 1 pairs: tie" in said
    assert "accuracy 0.333 of 3 pairs, 0.250 as the mean over 2 subsets" in said


def test_an_attribute_model_makes_a_file_of_ratings(
    attribute_run: tuple[Path, list[dict]], few: Path, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "sft.jsonl"
    path.write_text((few / "sft" / "test.jsonl").read_text())
    found = score(str(attribute_run[0]), str(path))
    names = ["helpfulness", "correctness", "coherence", "complexity", "verbosity", "toxicity"]
    assert sorted(found[0]["label"]) == sorted(names)
    again = str(scored_file(path))
    assert data.load_ratings(tokenizer, again, again, 2048)[0][0].fields == found[0]["label"]


@pytest.mark.parametrize("changed", ["file", "model"])
def test_scoring_does_not_go_on_from_another_file_or_model_of_the_same_name(
    scorer_run: str, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(Path(scorer_run) / "model", model)
    lines = (few / "sft" / "test.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "file.jsonl"
    path.write_text("".join((lines * 7)[:300]))
    with monkeypatch.context() as patch:
        patch.setattr(dist, "stop_requested", lambda: True)
        with pytest.raises(dist.RunError, match="stopped after 256"):
            score(str(model), str(path))
    if changed == "file":  # as many records, in another order
        path.write_text("".join((lines * 7)[:300][::-1]))
    else:
        weights = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))  # trained again
    counts, honest = [], models.score

    def counted(scorer: Any, examples: list, *rest: Any) -> torch.Tensor:
        counts.append(len(examples))
        return honest(scorer, examples, *rest)

    monkeypatch.setattr(models, "score", counted)
    score(str(model), str(path))
    assert sum(counts) == 300


def test_scoring_goes_on_where_it_was_stopped(
    scorer_run: str, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (few / "sft" / "test.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "file.jsonl"
    path.write_text("".join((line * 7)[:300]))
    score(scorer_run, str(path))
    target = scored_file(path)
    whole = target.read_bytes()
    target.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(dist, "stop_requested", lambda: True)
        with pytest.raises(dist.RunError, match="stopped after 256"):
            score(scorer_run, str(path))
    (part,) = (tmp_path / "run" / "scored").glob("*.part")
    assert not target.exists()
    done = part.read_text().splitlines(keepends=True)
    assert len(done) == 256
    part.write_text("".join(done[:100]) + done[100][:17])  # as a kill would leave it

    counts, honest = [], models.score

    def counted(scorer: Any, examples: list, *rest: Any) -> torch.Tensor:
        counts.append(len(examples))
        return honest(scorer, examples, *rest)

    monkeypatch.setattr(models, "score", counted)
    score(scorer_run, str(path))
    assert sum(counts) == 200 and not list((tmp_path / "run" / "scored").glob("*.part"))
    assert [json.loads(x) for x in whole.splitlines()] == [
        json.loads(x, parse_float=lambda x: pytest.approx(float(x), abs=1e-5))
        for x in target.read_bytes().splitlines()
    ]


def test_what_scoring_writes_is_new_and_is_not_beside_what_it_reads(
    scorer_run: str, few: Path, tmp_path: Path
) -> None:
    """A folder is read whole: ten records would be twenty. Names that end alike do not meet either."""
    for name in ("train.jsonl", "train.v2.jsonl"):
        (tmp_path / name).write_text("".join((few / "sft" / "test.jsonl").read_text().splitlines(True)[:4]))
        score(scorer_run, str(tmp_path / name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "train.jsonl", "train.v2.jsonl"]
    first = sorted((tmp_path / "run" / "scored").iterdir())
    score(scorer_run, str(tmp_path / "train.jsonl"))  # again: its own file, which may be replaced
    assert sorted((tmp_path / "run" / "scored").iterdir()) == first and len(first) == 2
    (tmp_path / "file").touch()
    options = {"model": scorer_run, "score": str(tmp_path / "train.jsonl")}
    for name, message in (("file/x.jsonl", "expected a folder to write in"), ("file", "expected a new one")):
        with pytest.raises(dist.RunError, match=message):
            reward_model.main(args_of(reward_model.Args, **options, score_output=f"{tmp_path}/{name}"))
    with pytest.raises(
        dist.RunError, match=r"train.jsonl:1: found \d+ tokens; expected at most 5, by max_len"
    ):
        reward_model.main(args_of(reward_model.Args, **options, max_length=5, output_dir=f"{tmp_path}/run"))


def test_what_scoring_replaces_stays_until_the_new_file_is_whole(
    scorer_run: str, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no folder, device or file that it reads is replaced at all, by whatever name."""
    source, old, folder = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "mine"
    source.write_text("".join((few / "sft" / "test.jsonl").read_text().splitlines(True)[:2]))
    text = source.read_text()
    old.write_text("before")
    folder.mkdir()
    (folder / "work").touch()
    (tmp_path / "link").symlink_to(source)
    os.link(source, tmp_path / "hard")
    options = {"model": scorer_run, "overwrite": True, "output_dir": f"{tmp_path}/run"}

    def scored(path: Path, target: Path) -> None:
        args = args_of(reward_model.Args, **options, score=str(path), score_output=str(target))
        reward_model.main(args)

    for target in (source, tmp_path / "link", tmp_path / "hard"):
        with pytest.raises(dist.RunError, match="found the file that is scored"):
            scored(source, target)
    for target in (folder, Path("/dev/null")):
        with pytest.raises(dist.RunError, match="found a folder, or a device"):
            scored(source, target)
    with pytest.raises(dist.RunError):
        scored(tmp_path / "nosuch.jsonl", old)
    assert source.read_text() == text and (folder / "work").exists() and old.read_text() == "before"
    scored(source, old)
    assert len(old.read_text().splitlines()) == 2


# bad input


@pytest.mark.parametrize("loss", ["scaled_bt", "margin_bt"])
def test_losses_with_margins_need_margins(few: Path, tiny_model: str, tmp_path: Path, loss: str) -> None:
    with pytest.raises(dist.RunError, match=f"{loss}: found .*margin; expected "):
        run(tmp_path, tiny_model, few / "pairs", loss=loss)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "regression", "center_coef": 0.1}, "center_coef is 0.1, which loss regression ignores"),
        ({"loss": "kwise", "center_coef": 0.1}, "center_coef is 0.1, which loss kwise ignores"),
        ({"loss": "plackett_luce", "center_coef": 0.1}, "center_coef is 0.1, which loss plackett_luce"),
        ({"loss": "regression", "attribute": "humor"}, "attribute is humor, which loss regression ignores"),
        ({"attribute": "humor"}, "attribute: found humor; expected a reward model with that output"),
        ({"score_output": "x.jsonl"}, "score_output is x.jsonl, which a training run ignores"),
        ({"score": "x.jsonl", "loss": "kwise"}, "loss is kwise, which --score ignores"),
        ({"score": "x.jsonl", "attribute": "humor"}, "attribute is humor, which --score ignores"),
        ({"score": "x.jsonl"}, "dataset is absent.jsonl, which --score ignores"),
    ],
)
def test_an_option_that_nothing_would_read_is_refused(options: dict, said: str, tiny_model: str) -> None:
    """Before the data, which do not exist, are looked at."""
    options = {"model": tiny_model, "dataset": "absent.jsonl", **options}
    with pytest.raises(dist.RunError, match=said):
        reward_model.main(args_of(reward_model.Args, **options))


def test_a_ranking_of_two_is_certain(tiny_model: str, few: Path, tmp_path: Path) -> None:
    """Losses of rankings have no place for the probability that chosen is better."""
    lines = (few / "pairs" / "train.jsonl").read_text().splitlines()[:1]
    (tmp_path / "soft.jsonl").write_text(json.dumps(json.loads(lines[0]) | {"label_prob": 0.9}))
    with pytest.raises(dist.RunError, match=r"soft.jsonl:1: found label_prob below 1"):
        run(tmp_path / "run", tiny_model, tmp_path / "soft.jsonl", loss="kwise")


def test_equal_ranks_rank_nothing(tiny_model: str, tmp_path: Path) -> None:
    record = {"prompt": "Hi.", "responses": ["a", "b"], "ranks": [1, 1]}
    (tmp_path / "tied.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(dist.RunError, match=r"tied.jsonl:1: found .*not all equal"):
        run(tmp_path / "run", tiny_model, tmp_path / "tied.jsonl", loss="kwise")


def test_an_attribute_must_be_one_of_the_models(
    attribute_run: tuple[Path, list[dict]], few: Path, tmp_path: Path
) -> None:
    with pytest.raises(dist.RunError, match=r"has the outputs .*toxicity.*, not wit"):
        run(tmp_path, str(attribute_run[0]), few / "pairs", attribute="wit")


def test_a_reward_model_of_one_output_keeps_its_name(scorer_run: str, few: Path, tmp_path: Path) -> None:
    with pytest.raises(dist.RunError, match=r"has the outputs reward, not wit"):
        run(tmp_path / "wit", scorer_run, few / "pairs", attribute="wit")


def test_a_foreign_reward_model_without_names_gets_one(
    scorer_run: str, few: Path, tmp_path: Path, device: torch.device
) -> None:
    folder = shutil.copytree(Path(scorer_run) / "model", tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    scorer = models.load_scorer(str(folder), device, reward_model.Args().system, ["reward"])
    assert models.output_names(scorer) == ["reward"]
    kept = load_file(folder / "model.safetensors")["score.weight"]
    torch.testing.assert_close(dict(models.full_weights(scorer.model))["score.weight"], kept)


def test_a_model_without_a_score_head_scores_nothing(few: Path, tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text((few / "pairs" / "test.jsonl").read_text())
    with pytest.raises(dist.RunError, match="is no reward model; expected a folder that reward_model.py"):
        score(tiny_model, str(tmp_path / "file.jsonl"))


def test_a_file_that_is_not_there_is_named(scorer_run: str, tmp_path: Path) -> None:
    with pytest.raises(dist.RunError, match="absent.jsonl"):
        score(scorer_run, str(tmp_path / "absent.jsonl"))


@pytest.mark.parametrize("loss", ["bt", "margin_bt", "scaled_bt"])
def test_a_soft_label_says_the_same_when_the_sides_are_swapped(loss: str) -> None:
    """p for (a, b) is 1 - p for (b, a), whatever margin the better one is asked to win by."""
    ours = pair_loss(0.4, 1.9, loss=loss, margin=1.5, label_prob=0.7)
    assert ours == pytest.approx(pair_loss(1.9, 0.4, loss=loss, margin=1.5, label_prob=0.3), abs=1e-6)
    if loss == "margin_bt":  # 0.7 softplus(3.0) + 0.3 softplus(0.0)
        assert ours == pytest.approx(0.7 * 3.048587 + 0.3 * 0.693147, abs=1e-5)
