"""spin.py: its loss by hand and at its limits, what it samples and stores, stopping anywhere, a toy run."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import args_of, means, read_metrics

import dpo
import spin
from common import checkpoint, data, dist, files, formats, generate, models, packed

# by hand


def test_the_loss_by_hand() -> None:
    h = torch.tensor([0.3, -3.0])
    # log(1 + exp(-.3)) and log(1 + exp(3))
    torch.testing.assert_close(spin.spin_loss(h, 1.0), torch.tensor([0.554355, 3.048587]))
    torch.testing.assert_close(spin.spin_loss(10 * h, 0.1), spin.spin_loss(h, 1.0))
    torch.testing.assert_close(spin.spin_loss(h, 1.0, "hinge"), torch.tensor([0.7, 4.0]))


def test_distances_by_hand() -> None:
    ours = [{"a": 0.0, "b": 1.0}, {"a": 4.0, "b": 1.0}]
    theirs = [{"a": 4.0, "b": 2.0}, {"a": 3.0, "b": 1.0}]
    # a: |0 - 3| and |4 - 4|; b: |1 - 1| and |1 - 2|
    assert spin.distances(ours, theirs) == {"distance": 1.0, "distance/a": 1.5, "distance/b": 0.5}
    assert spin.distances(ours, ours[::-1])["distance"] == 0.0  # of distributions, not of pairs


def test_a_list_has_one_value_for_each_iteration_and_its_last_for_the_rest() -> None:
    args = args_of(spin.Args, beta=[0.1, 5.0], learning_rate=1e-6, num_epochs=[2, 1], num_iterations=3)
    found = [spin.of_iteration(args, number) for number in range(3)]
    assert [a.beta for a in found] == [0.1, 5.0, 5.0]
    assert [a.num_epochs for a in found] == [2, 1, 1] and {a.learning_rate for a in found} == {1e-6}


def test_an_iteration_ends_after_its_passes_over_its_pairs() -> None:
    args = args_of(spin.Args, num_epochs=[2, 1], num_iterations=3, batch_size=4)
    assert spin.iteration_boundaries(10, args) == [0, 5, 10, 15]  # 2 x 10 / 4, then 1 x (10 + 10) / 4
    args.mix_previous = False
    assert spin.iteration_boundaries(10, args) == [0, 5, 8, 11]  # 1 x 10 / 4, rounded up


# limits


def test_policy_equal_to_opponent_gives_log_two_and_equal_sides_no_gradient(
    tiny_model: str, device: torch.device
) -> None:
    policy = models.load(tiny_model, device, spin.Args().system)
    pairs = [make_pair([5, 6], [7, 8, 9], [10, 11]), make_pair([5], [7, 8], [7, 8])]
    logps = spin.opponent_logps(policy, pairs, 0, device)
    for pair, both in zip(pairs, logps, strict=True):
        pair.fields = both
    loss, metrics = spin.loss_and_metrics(policy, packed.make_micro_batch(pairs, [0, 1], device), beta=0.1)
    assert loss.item() / 2 == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/margins"][0].item() == 0 and metrics["rewards/accuracies"][0].item() == 0
    loss.backward()
    assert models.clip_grad_norm(policy, 0).item() > 1e-3
    policy.zero_grad()
    loss, _ = spin.loss_and_metrics(policy, packed.make_micro_batch(pairs, [1], device), beta=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert models.clip_grad_norm(policy, 0).item() < 1e-7


def test_rewards_carry_beta_and_the_nll_does_not(tiny_model: str, device: torch.device) -> None:
    policy = models.load(tiny_model, device, spin.Args().system)
    micro_batch = packed.make_micro_batch([make_pair([5, 6], [7, 8, 9], [10, 11], -20.0, -20.0)], [0], device)
    one, three = (means(spin.loss_and_metrics(policy, micro_batch, beta)[1]) for beta in (0.1, 0.3))
    assert three["rewards/margins"] == pytest.approx(3 * one["rewards/margins"], rel=1e-5)
    assert 3 * three["nll"] == 3 * one["nll"] == -one["logps/real"]  # of three tokens, of one response


def test_a_dummy_row_has_no_loss_and_a_zero_gradient(tiny_model: str, device: torch.device) -> None:
    policy = models.load(tiny_model, device, spin.Args().system)
    micro_batch = packed.make_micro_batch([make_pair([5], [6], [7], 0.0, 0.0)], [], device)
    loss, metrics = spin.loss_and_metrics(policy, micro_batch, beta=0.1)
    loss.backward()
    assert loss.item() == 0.0 and all(total.item() == count == 0 for total, count in metrics.values())
    assert models.clip_grad_norm(policy, 1.0).item() == 0.0


def make_pair(prompt: list[int], real: list[int], generated: list[int], *logps: float) -> packed.Example:
    tokens = np.array(prompt + real, np.int32)
    example = packed.Example([(tokens, np.arange(len(tokens)) >= len(prompt))], "")
    return spin.make_pair(example, generated, **dict(zip(spin.LOGPS, logps, strict=False)))


def test_loss_and_gradient_are_those_of_dpo(tiny_model: str, device: torch.device) -> None:
    pairs = [make_pair([5, 6], [7, 8, 9], [10, 11], -9.0, -4.0), make_pair([5], [7], [8, 9], -3.0, -7.5)]
    policy = models.load(tiny_model, device, spin.Args().system)
    loss, ours = spin.loss_and_metrics(policy, packed.make_micro_batch(pairs, [0, 1], device), beta=0.3)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    names = ("ref_chosen_logps", "ref_rejected_logps")
    for pair in pairs:
        pair.fields = formats.PAIR_FIELDS | dict(zip(names, pair.fields.values(), strict=True))
    micro_batch = packed.make_micro_batch(pairs, [0, 1], device)
    their_loss, theirs = dpo.loss_and_metrics(policy, None, micro_batch, args_of(dpo.Args, beta=0.3))
    their_loss.backward()
    their_gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert loss.item() == their_loss.item()
    torch.testing.assert_close(gradient, their_gradient, rtol=0, atol=0)
    words = {"real": "chosen", "generated": "rejected"}
    for name, (total, count) in ours.items():
        group, _, side = name.partition("/")
        if name != "nll":
            their_total, their_count = theirs[f"{group}/{words.get(side, side)}" if side else group]
            assert (total.item(), count) == (their_total.item(), their_count)


# demonstrations


def demonstrations(tokenizer: Any, tmp_path: Path, records: list[dict], **settings: Any) -> data.Dataset:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    args = args_of(spin.Args, dataset=str(path), eval_dataset=str(path), batch_size=1, **settings)
    return spin.load_demonstrations(args, tokenizer)[0]


ASKED = [{"role": "user", "content": "What is 2 + 2?"}]
REPLY = [{"role": "assistant", "content": "4."}]
FORMATS = {
    "messages": {"messages": ASKED + REPLY},
    "the release": {"real": ASKED + REPLY, "generated": [*ASKED, {"role": "assistant", "content": ""}]},
    "NeMo-Aligner chat": {
        "system": "",
        "mask": "User",
        "conversations": [
            {"from": "User", "value": "What is 2 + 2?"},
            {"from": "Assistant", "value": "4."},
        ],
    },
    "NeMo-Aligner prompt and response": {"input": "What is 2 + 2?", "output": "4."},
    "prompt and completion": {"prompt": ASKED, "completion": REPLY},
}


@pytest.mark.parametrize("name", list(FORMATS))
def test_formats(name: str, tokenizer: Any, tmp_path: Path) -> None:
    (example,) = demonstrations(tokenizer, tmp_path, [FORMATS[name]])
    assert example.prompt == ASKED
    assert spin.prompt_tokens(example.sequences[0]) == data.encode_prompt(tokenizer, ASKED)
    assert spin.response_text(tokenizer, example.sequences[0]) == "4."


def test_real_is_the_last_reply_only(tokenizer: Any, tmp_path: Path) -> None:
    chat = [
        *ASKED,
        *REPLY,
        {"role": "user", "content": "What is 3 + 3?"},
        {"role": "assistant", "content": "6."},
    ]
    (example,) = demonstrations(tokenizer, tmp_path, [{"messages": chat}])
    assert example.prompt == chat[:3]
    assert spin.response_text(tokenizer, example.sequences[0]) == "6."


def test_a_prompt_without_room_is_dropped_and_a_long_reply_cut_and_both_are_counted(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long_prompt = [{"role": "user", "content": "What is 2 + 2? " * 5}]
    records = [
        {"messages": ASKED + REPLY},
        {"messages": [*ASKED, {"role": "assistant", "content": "The sum of 2 and 2 is 4."}]},
        {"messages": long_prompt + REPLY},
    ]
    limits = {"max_length": 24, "max_new_tokens": 5}
    whole, cut = demonstrations(tokenizer, tmp_path, records, **limits)
    assert (
        len(data.encode_prompt(tokenizer, long_prompt)) + 5
        > 24
        > len(data.encode_prompt(tokenizer, ASKED)) + 5
    )
    end = data.end_token(tokenizer)
    real = [spin.response_tokens(example.sequences[0]) for example in (whole, cut)]
    assert real[0].count(end) == 1 and real[0][-1] == end
    assert len(real[1]) == 5 and end not in real[1]
    printed = capsys.readouterr().out
    assert "dropped 1 with a prompt and max_new_tokens that are longer than max_length" in printed
    assert "1 responses to train on cut, by max_new_tokens 5" in printed


def test_a_conversation_without_a_reply_is_dropped(tokenizer: Any, tmp_path: Path) -> None:
    assert len(demonstrations(tokenizer, tmp_path, [{"messages": ASKED}, FORMATS["messages"]])) == 1


# what is sampled and stored

RUN = {
    "num_prompts": 16,
    "num_iterations": 3,
    "num_epochs": 1,
    "batch_size": 8,
    "beta": 0.5,
    "learning_rate": 5e-3,
    "warmup_steps": 1,
    "max_new_tokens": 10,
    "eval_every": 100,
    "save_every": 100,
    "num_samples": 0,
    "micro_batch_tokens": 100_000,
}


def run(folder: str, **settings: Any) -> list[list[float]]:
    """[loss, gradient norm] after each step of a run; called here and on the two ranks."""
    spin.main(args_of(spin.Args, **{**RUN, **settings}, output_dir=folder))
    return [[row["train/loss"], row["train/grad_norm"]] for row in read_metrics(folder) if row["step"]]


def assert_same(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5), f"{ours}\n{theirs}"


def lines(folder: Path, number: int, name: str = "generated") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}_{number}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def settings(few: Path, tiny_model: str) -> dict[str, str]:
    return {"dataset": str(few / "sft"), "model": tiny_model}


@pytest.fixture(scope="module")
def straight(settings: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """Three iterations in one go, of 2, 4 and 4 steps."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return folder, run(str(folder), **settings)


def test_every_line_says_where_it_is_from(straight: tuple[Path, list]) -> None:
    folder, _ = straight
    for number in range(3):
        fresh = lines(folder, number)
        assert len(fresh) == (16 if number == 0 else 32)
        assert [line["iteration"] for line in fresh] == [number] * 16 + [number - 1] * (len(fresh) - 16)
        assert {line["seed"] for line in fresh} == {1}
        opponents = {line["opponent"] for line in fresh[:16]}
        assert len(opponents) == 1 and opponents.pop().startswith(f"step {(0, 2, 6)[number]} of ")


def test_the_samples_of_the_iteration_before_are_mixed_in_under_the_opponent_of_this_one(
    straight: tuple[Path, list],
) -> None:
    folder, _ = straight
    before, after = lines(folder, 1)[:16], lines(folder, 2)[16:]
    for old, new in zip(before, after, strict=True):
        assert old["generated_tokens"] == new["generated_tokens"] and old["prompt"] == new["prompt"]
        assert abs(old["ref_generated_logps"] - new["ref_generated_logps"]) > 1e-3


def test_without_mixing_an_iteration_has_new_samples_only_even_of_the_same_opponent(
    settings: dict, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(str(folder), **settings, num_iterations=2, mix_previous=False, learning_rate=0.0)
    before, after = lines(folder, 0), lines(folder, 1)
    assert len(before) == len(after) == 16
    for old, new in zip(before, after, strict=True):
        assert old["ref_real_logps"] == new["ref_real_logps"]
        assert old["generated_tokens"] != new["generated_tokens"]


def test_an_iteration_starts_at_its_opponent_with_a_learning_rate_of_its_own(
    settings: dict, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    changed = {"learning_rate": [5e-3, 1e-3], "beta": [0.5, 2.0], "num_epochs": [2, 1], "num_iterations": 2}
    losses = run(str(folder), **settings, **changed)
    rows = {row["step"]: row for row in read_metrics(folder)}
    assert [rows[step]["train/iteration"] for step in range(1, 9)] == [0] * 4 + [1] * 4
    for step in (1, 5):  # each begins with warm-up, and where policy and opponent are one
        assert losses[step - 1][0] == pytest.approx(math.log(2), abs=1e-5)
        assert rows[step]["train/rewards/margins"] == pytest.approx(0, abs=1e-5)
    rates = [rows[step]["train/learning_rate"] for step in range(1, 9)]
    assert rates[:2] == pytest.approx([2.5e-3, 5e-3]) and rates[4:6] == pytest.approx([5e-4, 1e-3])
    assert rows[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["eval/rewards/accuracies"] == rows[0]["eval/rewards/margins"] == 0


def test_the_opponent_stands_still_in_an_iteration_and_moves_after_it(
    straight: tuple[Path, list], settings: dict, device: torch.device
) -> None:
    folder, _ = straight
    args = args_of(spin.Args, **settings, **RUN)
    start, end = (models.load(model, device, args.system) for model in (args.model, str(folder)))
    examples = spin.load_demonstrations(args, data.load_tokenizer(args.model))[1]
    held_out = []
    for number in range(3):
        first = lines(folder, number, "held_out")
        origin = {name: first[0][name] for name in ("iteration", "opponent", "seed")}
        held_out.append(spin.read_pairs(folder / f"held_out_{number}.jsonl", examples, origin))
    real = [[pair.fields["ref_real_logps"] for pair in pairs] for pairs in held_out]
    expected = [x["ref_real_logps"] for x in spin.opponent_logps(start, held_out[0], 0, device)]
    assert real[0] == pytest.approx(expected, abs=1e-4)  # the model the run began with, not the trained one
    apart = [
        max(abs(a - b) for a, b in zip(*sides, strict=True))
        for sides in (
            (real[0], real[1]),
            (real[1], real[2]),
            (real[2], [x["ref_real_logps"] for x in spin.opponent_logps(end, held_out[2], 0, device)]),
        )
    ]
    assert min(apart) > 0.1


def test_an_ended_sample_has_one_end_token_and_a_cut_one_none(
    settings: dict, toy: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(str(folder), **{**settings, "model": "toy"}, num_iterations=1, max_steps=0)  # 10 tokens cut some
    tokenizer = data.load_tokenizer("toy")
    end, ended = data.end_token(tokenizer), []
    for line in lines(folder, 0, "held_out") + lines(folder, 0):
        for side in ("real_tokens", "generated_tokens"):
            tokens = line[side]
            assert tokens.count(end) == (tokens[-1] == end) == (len(tokens) < 10 or tokens[-1] == end)
            assert len(tokens) <= 10
        ended.append(line["ended"])
        assert line["ended"] == (end in line["generated_tokens"])
    assert 0 < sum(ended) < len(ended)


def test_what_is_trained_as_generated_is_what_the_template_makes_of_its_text(
    settings: dict, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(str(folder), **{**settings, "model": "toy"}, num_iterations=1, max_steps=0, max_new_tokens=48)
    tokenizer, checked = data.load_tokenizer("toy"), 0
    args = args_of(spin.Args, **{**RUN, **settings, "max_new_tokens": 48})
    examples = spin.load_demonstrations(args, tokenizer)[1]
    first = lines(folder, 0, "held_out")[0]
    origin = {name: first[name] for name in ("iteration", "opponent", "seed")}
    pairs = spin.read_pairs(folder / "held_out_0.jsonl", examples, origin)
    for line, pair in zip(lines(folder, 0, "held_out"), pairs, strict=True):
        if line["ended"]:
            for side, (tokens, mask) in zip(("real", "generated"), pair.sequences, strict=True):
                turn = [{"role": "assistant", "content": line[side]}]
                expected = data.encode_response(tokenizer, line["prompt"], turn)
                assert tokens.tolist() == expected[0].tolist() and mask.tolist() == expected[1].tolist()
            checked += 1
    assert checked > 20


def test_a_budget_is_that_of_a_sample_and_not_of_its_neighbours(
    tokenizer: Any, device: torch.device, tmp_path: Path, tiny_model: str
) -> None:
    prompts = [[{"role": "user", "content": "What is 2 + 2? " * n}] for n in (1, 6)]
    examples = demonstrations(
        tokenizer, tmp_path, [{"messages": p + REPLY} for p in prompts], max_length=200, max_new_tokens=20
    )
    args = args_of(spin.Args, model=tiny_model, max_new_tokens=20, max_length=200, seed=3)
    policy = models.load(tiny_model, device, args.system)  # random: it hardly ever ends
    origin = {"iteration": 0, "opponent": "", "seed": 3}
    spin.play(policy, tokenizer, examples, [], tmp_path / "pairs.jsonl", origin, 0, args, device)
    written = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [len(line["generated_tokens"]) for line in written if not line["ended"]] == [20, 20]


# a leak of the format

LEAKS = {
    "no end token": lambda tokens, end: tokens[:-1],
    "two end tokens": lambda tokens, end: [*tokens, end],
    "another first token": lambda tokens, end: [9, *tokens],
    "a limit of its own": lambda tokens, end: (tokens * 20)[:40],
}


def format_accuracy(real: list[list[int]], generated: list[list[int]], end: int) -> float:
    """How often length, first token and end token alone tell real from generated; 1/2 is a fair game.

    Naive Bayes with counts from every second pair, tried on the others, and the other way round.
    """

    def features(tokens: list[int]) -> list[tuple[str, int]]:
        return [("length", len(tokens).bit_length()), ("first", tokens[0]), ("ends", tokens.count(end))]

    right = 0.0
    for half in (0, 1):
        counts = [Counter(f for t in side[half::2] for f in features(t)) for side in (real, generated)]
        for label, side in enumerate((real, generated)):
            for tokens in side[1 - half :: 2]:
                odds = sum(math.log((counts[0][f] + 1) / (counts[1][f] + 1)) for f in features(tokens))
                right += 0.5 if odds == 0 else (odds > 0) == (label == 0)
    return right / (len(real) + len(generated))


def fair_sides(toy: Path, tokenizer: Any) -> tuple[list, list]:
    """Two hundred replies of the data on either side."""
    records = [json.loads(line) for line in (toy / "sft" / "train.jsonl").read_text().splitlines()[:400]]
    replies = []
    for record in records:
        prompt, reply = record["messages"][:-1], record["messages"][-1:]
        replies.append(spin.response_tokens(data.encode_response(tokenizer, prompt, reply)))
    return replies[:200], replies[200:]


def test_the_format_of_equal_distributions_tells_nothing(toy: Path, tokenizer: Any) -> None:
    accuracy = format_accuracy(*fair_sides(toy, tokenizer), data.end_token(tokenizer))
    assert 0.42 < accuracy < 0.58


@pytest.mark.parametrize("leak", list(LEAKS))
def test_a_leak_of_the_format_is_seen(leak: str, toy: Path, tokenizer: Any) -> None:
    real, generated = fair_sides(toy, tokenizer)
    end = data.end_token(tokenizer)
    leaked = [LEAKS[leak](tokens, end) for tokens in generated]
    assert format_accuracy(real, leaked, end) > 0.9


def test_a_run_with_a_leak_shows_it(settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {**settings, "model": "toy", "num_iterations": 1, "max_steps": 0, "max_new_tokens": 48}
    make_pair, describe, accuracies = spin.make_pair, spin.describe, []

    def watched(pairs: list[packed.Example], tokenizer: Any) -> dict[str, float]:
        sides = [[spin.response_tokens(pair.sequences[side]) for pair in pairs] for side in (0, 1)]
        accuracies.append(format_accuracy(*sides, data.end_token(tokenizer)))
        return describe(pairs, tokenizer)

    def forgets_the_end(example: packed.Example, generated: list[int], **logps: float) -> packed.Example:
        return make_pair(example, generated[:-1] or generated, **logps)

    monkeypatch.setattr(spin, "describe", watched)
    run(str(tmp_path / "honest"), **changed)
    monkeypatch.setattr(spin, "make_pair", forgets_the_end)
    run(str(tmp_path / "leak"), **changed)
    fair, leaked = accuracies
    assert fair < 0.7 and leaked > 0.95
    honest, leak = (read_metrics(tmp_path / folder)[0] for folder in ("honest", "leak"))
    ended = "eval/generated/ended_frac"
    assert abs(honest[ended] - honest["eval/real/ended_frac"]) < 0.2 and leak[ended] < 0.2


# stopping anywhere


def test_two_ranks_and_small_rows_give_the_same_run(
    straight: tuple[Path, list], settings: dict, tmp_path: Path, two_ranks: Any
) -> None:
    folder, losses = straight
    assert abs(losses[-1][0] - losses[0][0]) > 0.01
    ours, also = two_ranks("test_spin:run", folder=str(tmp_path / "run"), **settings, micro_batch_tokens=150)
    assert ours == also
    assert_same(ours, losses)
    for number in range(3):
        tokens = [[line["generated_tokens"] for line in lines(f, number)] for f in (folder, tmp_path / "run")]
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(1, id="in iteration 0", marks=pytest.mark.slow),
        pytest.param(4, id="in iteration 1"),
        pytest.param(6, id="between 1 and 2", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_on_two_ranks(
    steps: int, straight: tuple[Path, list], settings: dict, tmp_path: Path, two_ranks: Any
) -> None:
    folder = tmp_path / "run"
    run(str(folder), **settings, max_steps=steps)
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*_*.jsonl")}
    ours, _ = two_ranks("test_spin:run", folder=str(folder), **settings)
    assert_same(ours, straight[1])
    assert written and all((folder / name).stat().st_mtime_ns == at for name, at in written.items())


def test_a_resume_that_plays_anew_within_an_iteration_is_refused(settings: dict, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(str(folder), **settings, max_steps=4)
    path = folder / "generated_1.jsonl"
    kept = path.read_text()
    path.unlink()
    with pytest.raises(dist.RunError, match="generated_1.jsonl: cannot be read"):
        run(str(folder), **settings)
    path.write_text(kept.replace("step 2 of", "step 3 of"))
    with pytest.raises(dist.RunError, match="found a sample of step 3 of .*; expected one of step 2 of"):
        run(str(folder), **settings)
    path.write_text(kept.replace('"real_tokens": [', '"real_tokens": [7, '))
    with pytest.raises(dist.RunError, match="that of the data, which has changed"):
        run(str(folder), **settings)


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_kill_while_sampling_repeats_nothing_and_changes_nothing(
    number: int,
    straight: tuple[Path, list],
    settings: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    if number:
        run(str(folder), **settings, max_steps=2)  # a whole iteration
    honest, kept = files.Journal.add, []

    def dies(journal: files.Journal, *record: Any) -> None:
        if journal.folder.parent.name.startswith("generated"):
            kept.append(record)
            if len(kept) == 6:
                raise KeyboardInterrupt
        honest(journal, *record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.Journal, "add", dies)
        run(str(folder), **settings)
    assert (folder / f"held_out_{number}.jsonl").exists()
    (replies,) = folder.glob("generated_*.replies")
    with next(replies.glob("*/rank_0.jsonl")).open("a") as file:
        file.write('{"key": "7 0", "tok')
    # as if it had died after 11 lines and a part of the next
    unfinished = replies.with_suffix(".part")
    done = (straight[0] / f"generated_{number}.jsonl").read_text().splitlines(keepends=True)
    names = [lines(f, number, "held_out")[0]["opponent"] for f in (straight[0], folder)]
    assert names[0] == names[1]
    unfinished.write_text("".join(done[:11]) + done[11][:30])
    (folder / f"held_out_{number}.jsonl.0.replies").mkdir()  # as if it had died before this was removed
    kept.clear()
    with monkeypatch.context() as patch:
        patch.setattr(files.Journal, "add", lambda *record: kept.append(record) or honest(*record))
        ours = run(str(folder), **settings)
    again = [journal.folder.parent for journal, *_ in kept]
    assert again.count(replies) == 11 and not [*folder.glob("*.part"), *folder.glob("*.replies")]
    assert (folder / f"generated_{number}.jsonl").read_text() == "".join(done)
    assert_same(ours, straight[1])


def test_without_a_checkpoint_samples_are_taken_unless_they_are_of_other_settings(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = tmp_path / "run", []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["seed"])
        return generate.generate(*args, **kwargs)

    monkeypatch.setattr(spin, "generate", counted)
    for seed, expected in ((1, [1, 1]), (1, [1, 1]), (2, [1, 1, 2, 2])):
        run(str(folder), **settings, max_steps=0, seed=seed)
        # as if it had been killed before its first checkpoint
        shutil.rmtree(folder / "model")
        settled = json.loads((folder / "args.json").read_text())
        del settled["finished_at"]
        (folder / "args.json").write_text(json.dumps(settled))
        assert calls == expected  # once for the pairs held out, once for the others
    assert lines(folder, 0)[0]["seed"] == 2


def test_a_finished_run_takes_a_further_iteration(
    straight: tuple[Path, list], settings: dict, tmp_path: Path
) -> None:
    folder = str(tmp_path / "run")
    run(folder, **settings, num_iterations=2)
    assert_same(run(folder, **settings), straight[1])


def test_every_iteration_has_a_fresh_optimizer(
    straight: tuple[Path, list], settings: dict, device: torch.device
) -> None:
    args = args_of(spin.Args, **RUN, **settings, output_dir=str(straight[0]))
    policy = models.load(args.model, device, args.system)
    optimizer = torch.optim.AdamW(models.parameter_groups(policy, 0.0), betas=(0.9, 0.95))
    checkpoint.resume(args.run.output_dir, {"policy": (policy, optimizer)})
    assert {state["step"].item() for state in optimizer.state.values()} == {4.0}  # of 10


def test_a_stop_while_sampling_ends_in_peace(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = spin.generate

    def stopped(*given: Any, **options: Any) -> Any:
        monkeypatch.setattr(dist, "stop_requested", lambda: True)
        return honest(*given, **options)

    monkeypatch.setattr(spin, "generate", stopped)
    with pytest.raises(SystemExit) as ended:
        dist.run(spin.main, args_of(spin.Args, **RUN, **settings, output_dir=str(tmp_path)))
    assert ended.value.code == 0
    assert "stopped while generating; the same command goes on from there" in capsys.readouterr().err


def test_the_checkpoint_says_which_samples_it_goes_with(straight: tuple[Path, list]) -> None:
    folder, _ = straight
    last = checkpoint.newest(str(folder))
    run_name = json.loads((last / "numbers.json").read_text())["run"]
    assert lines(folder, 2)[0]["opponent"] == f"step 6 of {run_name}"


def test_adapters_have_the_policy_of_the_iteration_before_as_opponent(settings: dict, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    losses = run(str(folder), **settings, lora_rank=4, num_iterations=2)
    assert losses[2][0] == pytest.approx(math.log(2), abs=1e-5)  # with adapters off it would not be
    first, second = (lines(folder, number, "held_out") for number in range(2))
    moved = [abs(a["ref_real_logps"] - b["ref_real_logps"]) for a, b in zip(first, second, strict=True)]
    assert max(moved) > 1e-2


# settings that cannot be run


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 0.0, "plan": "1x80"}, "temperature 0 is greedy"),
        ({"max_new_tokens": 1024}, "found 1024; expected less than max_length, 1024"),
        ({"num_prompts": 4}, "found 4; expected batch_size, 8, or more"),
        ({"beta": [], "dataset": "absent.jsonl"}, "beta: found nothing"),  # before the data are read
    ],
)
def test_bad_settings(settings: dict, tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(dist.RunError, match=message):
        run(str(tmp_path), **{**settings, **changed})


# learning


def test_a_run_on_the_toy_world_comes_closer_to_the_data(few: Path, tmp_path: Path) -> None:
    changed = {**spin.TOY, "num_prompts": 128, "num_iterations": 1, "batch_size": 16, "num_samples": 48}
    changed |= {"dataset": str(few / "sft"), "judge": "toy.language:judge"}
    spin.main(args_of(spin.Args, **changed, output_dir=str(tmp_path)))
    first, *_, last = (row for row in read_metrics(tmp_path) if "eval/distance" in row)
    assert last["eval/distance"] < first["eval/distance"]
    assert last["eval/nll"] < first["eval/nll"]
    assert last["eval/rewards/accuracies"] > 0.5
