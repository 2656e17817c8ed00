"""steerlm2.py: its weights, loss and Beta likelihood by hand, its groups and scores, and short runs."""

import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import args_of, read_metrics
from torch import Tensor

import dpo
import steerlm
import steerlm2
from common import data, dist, files, formats, labels, models, packed, templates
from common.generate import Sample

LOG_W = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=torch.float64)  # w' = (1, 2, 5) / 8
LOG_B = torch.tensor([[0.0, 0.0, math.log(2)]], dtype=torch.float64)  # b' = (1, 1, 2) / 4
ZEROS = torch.zeros(1, 3, dtype=torch.float64)


def loss_of(logps: Tensor, sampler_logps: Tensor, log_w: Tensor) -> float:
    return steerlm2.group_loss(logps, sampler_logps, log_w).item()


# by hand


def test_weights_and_loss_by_hand() -> None:
    weights = LOG_W.softmax(1)
    torch.testing.assert_close(weights, torch.tensor([[0.125, 0.25, 0.625]], dtype=torch.float64))
    assert (1 / weights.square().sum()).item() == pytest.approx(2.1333, abs=1e-4)
    # .125 log(.125 / .25) + .25 log(.25 / .25) + .625 log(.625 / .5)
    assert loss_of(LOG_B, ZEROS, LOG_W) == pytest.approx(0.0528213, abs=1e-7)


def test_before_any_step_the_loss_is_log_n_minus_the_entropy_of_the_weights() -> None:
    # b' = 1/3: log 3 + .125 log .125 + .25 log .25 + .625 log .625
    assert loss_of(LOG_B, LOG_B, LOG_W) == pytest.approx(0.1983562, abs=1e-7)


def test_the_gradient_is_eq_11() -> None:
    logps = LOG_B.clone().requires_grad_()
    steerlm2.group_loss(logps, ZEROS, LOG_W).sum().backward()
    # -(w' - b') = -(.125 - .25, .25 - .25, .625 - .5)
    expected = torch.tensor([[0.125, 0.0, -0.125]], dtype=torch.float64)
    torch.testing.assert_close(logps.grad, expected, rtol=0, atol=1e-9)
    generator = torch.Generator().manual_seed(0)
    log_w, sampler, logps = (
        3 * torch.randn(5, 10, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    logps.requires_grad_()
    steerlm2.group_loss(logps, sampler, log_w).sum().backward()
    expected = (logps - sampler).softmax(1) - log_w.softmax(1)
    torch.testing.assert_close(logps.grad, expected.detach(), rtol=0, atol=1e-9)


def test_two_responses_of_which_one_has_all_weight_are_dpo_with_beta_1() -> None:
    log_w = torch.tensor([[0.0, -1e4]])
    logps, sampler = torch.tensor([[-7.0, -9.2]]), torch.tensor([[-7.1, -9.0]])  # margin .1 + .2
    assert loss_of(logps, sampler, log_w) == pytest.approx(0.554355, abs=1e-6)
    assert loss_of(logps, sampler, log_w) == pytest.approx(
        dpo.dpo_loss(torch.tensor(0.3), 1.0).item(), abs=1e-6
    )


# limits


def test_where_the_policy_has_the_weights_loss_and_gradient_are_zero() -> None:
    sampler = torch.tensor([[-3.0, -8.0, -1.0]], dtype=torch.float64)
    logps = (LOG_W + sampler - 11.0).requires_grad_()
    loss = steerlm2.group_loss(logps, sampler, LOG_W)
    loss.sum().backward()
    assert abs(loss.item()) < 1e-12 and logps.grad.abs().max() < 1e-12


def test_a_constant_added_to_a_column_changes_nothing() -> None:
    sampler = ZEROS - 2.0
    plain = loss_of(LOG_B, sampler, LOG_W)
    assert loss_of(LOG_B + 40, sampler, LOG_W) == pytest.approx(plain, abs=1e-12)
    assert loss_of(LOG_B, sampler - 40, LOG_W) == pytest.approx(plain, abs=1e-12)
    assert loss_of(LOG_B, sampler, LOG_W + 40) == pytest.approx(plain, abs=1e-12)


def test_a_group_of_one_has_no_loss() -> None:
    assert loss_of(torch.tensor([[-3.0]]), torch.tensor([[-5.0]]), torch.tensor([[2.0]])) == 0.0


def test_weights_far_apart_stay_finite() -> None:
    logps = torch.tensor([[-3000.0, 0.0]], requires_grad=True)
    loss = steerlm2.group_loss(logps, torch.zeros(1, 2), torch.tensor([[0.0, -3000.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(3000) and logps.grad.tolist() == [[-1.0, 1.0]]


# P(a|x, y)

BETA_TABLE = [
    (1.0, "fifths", (0.305, 0.641, 0.054, 0.0, 0.0)),
    (1.0, "nearest", (0.059, 0.855, 0.086, 0.0, 0.0)),
    (2.0, "fifths", (0.001, 0.163, 0.673, 0.163, 0.001)),
    (2.0, "nearest", (0.0, 0.109, 0.782, 0.109, 0.0)),
    (3.0, "fifths", (0.0, 0.0, 0.054, 0.641, 0.305)),
    (3.0, "nearest", (0.0, 0.0, 0.086, 0.855, 0.059)),
    (3.8, "fifths", (0.0, 0.0, 0.0, 0.009, 0.991)),
    (3.8, "nearest", (0.0, 0.0, 0.0, 0.067, 0.933)),
]


@pytest.mark.parametrize(("predicted", "edges", "expected"), BETA_TABLE)
def test_the_beta_table(predicted: float, edges: str, expected: tuple[float, ...]) -> None:
    probs = steerlm2.beta_logprobs(torch.tensor(predicted), 24.0, edges).exp()
    torch.testing.assert_close(probs, torch.tensor(expected), rtol=0, atol=1e-3)


def test_a_bin_in_the_tail_by_hand() -> None:
    # log P(a = 4 | r = 3), alpha 18, beta 6: of the mass above .8, and above .875
    for edges, value in (("fifths", -1.1864), ("nearest", -2.8355)):
        logprobs = steerlm2.beta_logprobs(torch.tensor(3.0), 24.0, edges)
        assert logprobs[4].item() == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("edges", ["nearest", "fifths"])
@pytest.mark.parametrize("predicted", [-1.0, 0.0, 4.0, 5.0])
def test_predictions_at_and_past_the_ends_are_finite(predicted: float, edges: str) -> None:
    logprobs = steerlm2.beta_logprobs(torch.tensor(predicted), 24.0, edges)
    assert logprobs.isfinite().all() and logprobs.exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert logprobs.argmax().item() == (0 if predicted <= 0 else 4)


@pytest.mark.parametrize(("edges", "is_calibrated"), [("nearest", True), ("fifths", False)])
def test_nearest_edges_are_calibrated_and_fifths_are_not(edges: str, is_calibrated: bool) -> None:
    grid = torch.linspace(0, 4, 81)
    means = steerlm2.beta_logprobs(grid, 24.0, edges).exp() @ torch.arange(5.0)
    assert ((means - grid).abs().max().item() <= 0.15) == is_calibrated


def test_attributes_are_independent() -> None:
    args = steerlm2.Args()
    predicted, wanted = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[1.0, 4.0], [2.0, 1.0]])
    found = steerlm2.attribute_logps(predicted, wanted, args)
    # log(.855) - 2.8355, and log(.782) + log(.109)
    torch.testing.assert_close(found, torch.tensor([-2.9922, -2.4623]), rtol=0, atol=5e-3)


NAMES = ["verbosity", "toxicity", "helpfulness"]


@pytest.mark.parametrize("value", ["nan", "inf", "-50", "1e300", "1.5"])
def test_values_outside_of_0_to_4_are_refused_before_anything_is_read(value: str, tmp_path: Path) -> None:
    wrong = f"verbosity:1;toxicity:0,verbosity:{value}"
    given = args_of(steerlm2.Args, model="absent", attribute_model="absent", attributes=wrong)
    with pytest.raises(dist.RunError, match=f"attributes: found verbosity.*{re.escape(value[:1])}"):
        steerlm2.check(given)
    given = args_of(
        steerlm.Args, model="absent", attributes=f"verbosity:{value}", output_dir=str(tmp_path / "x")
    )
    with pytest.raises(dist.RunError, match=f"attributes: found verbosity.*{re.escape(value[:1])}"):
        steerlm.main(given)
    assert not (tmp_path / "x").exists()


def test_wanted_attributes_are_in_the_order_of_the_attribute_model_and_null_asks_for_nothing() -> None:
    lines = []
    for text in ("toxicity:0,verbosity:1", " helpfulness:4", "toxicity:null,verbosity:1", "toxicity:None"):
        lines.append(labels.label_line(labels.read_wanted(text, NAMES)))
    assert lines == ["verbosity:1,toxicity:0\n", "helpfulness:4\n", "verbosity:1\n", ""]
    prompts = [packed.Example([], [{"role": "user", "content": str(i)}]) for i in range(3)]
    asked = steerlm2.ask(prompts, [{"toxicity": 0.0}, {"toxicity": math.nan}])
    assert [e.label for e in asked] == ["toxicity:0\n", "", "toxicity:0\n"] and prompts[0].label == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("humor:1", "the attribute humor"),
        ("humor:null", "the attribute humor"),
        ("toxicity:5", "toxicity:5"),
        ("toxicity:-1", "toxicity:-1"),
        ("toxicity:0.5", "toxicity:0.5"),
        ("toxicity", "name:value"),
        ("", "name:value"),
    ],
)
def test_attributes_that_cannot_be_wanted(text: str, message: str) -> None:
    with pytest.raises(dist.RunError, match=message):
        labels.read_wanted(text, NAMES)


# groups


def a_group(*responses: str, label: str | None = "helpfulness:4,verbosity:1", **changes: Any) -> dict:
    """NeMo-Aligner's record."""
    scores = [dict(zip(steerlm2.SCORES, (-1.0 - i, -3.0, -2.0 - 2 * i), strict=True)) for i in range(12)]
    replies = [{"from": "Assistant", "value": r, **s} for r, s in zip(responses, scores, strict=False)]
    prompt = [{"from": "User", "value": "2+2?"}]
    return {"system": "Be brief.", "prompt_turns": prompt, "label": label, "responses": replies, **changes}


def write(path: Path, groups: list[dict]) -> Path:
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))
    return path


def test_with_and_without_label_the_same_tokens_are_scored(tokenizer: Any) -> None:
    end, group = data.end_token(tokenizer), a_group("four of them", "2")
    both = [steerlm2.read_group(tokenizer, group, "here", labelled) for labelled in (True, False)]
    for reply, labelled, plain in zip(("four of them", "2"), *both, strict=True):
        expected = [*templates.tokenize(tokenizer, reply), end]  # so no token of the label
        for tokens, mask in (labelled, plain):
            assert tokens[mask].tolist() == expected and mask[-len(expected) :].all()
        context = labelled[0][~labelled[1]].tolist()
        assert tokenizer.decode(context).endswith("helpfulness:4,verbosity:1\n")
        assert "helpfulness" not in tokenizer.decode(plain[0].tolist())


def test_a_sampled_response_starts_where_a_scored_one_does(tokenizer: Any) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    start = data.encode_prompt(tokenizer, prompt, "helpfulness:4,verbosity:1\n")
    ((tokens, mask),) = steerlm2.read_group(tokenizer, a_group("4"), "here")
    assert tokens[~mask].tolist() == start


def read_groups(path: Path, tokenizer: Any, args: Any) -> list[packed.Example]:
    return steerlm2.weigh(steerlm2.read_groups(formats.read_file(path), tokenizer), args)


def nemo_record() -> dict:
    group = a_group("4", "22")
    for reply, scores in zip(group["responses"], ((-1.2, -3.0, -2.5), (-9.1, -6.0, -5.0)), strict=True):
        reply |= dict(zip(steerlm2.SCORES, scores, strict=True))
    return group


def test_nemo_aligners_record_is_read(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "groups.jsonl", [nemo_record()])
    (group,) = read_groups(path, tokenizer, steerlm2.Args())
    sampler, log_w = (torch.from_numpy(group.fields[name])[None] for name in steerlm2.GROUP_FIELDS)
    # log w = -1.2 - 3 + 2.5 and -9.1 - 6 + 5
    torch.testing.assert_close(log_w, torch.tensor([[-1.7, -10.1]]))
    torch.testing.assert_close(log_w.softmax(1), torch.tensor([[0.99978, 0.00022]]), rtol=0, atol=1e-5)
    assert sampler.tolist() == [[-2.5, -5.0]]
    (group,) = read_groups(path, tokenizer, args_of(steerlm2.Args, weight_temperature=2.0))
    assert group.fields["log_weights"].tolist() == pytest.approx([-0.85, -5.05])
    assert group.fields["sampler_logps"].tolist() == [-2.5, -5.0]


def test_ten_or_more_responses_keep_their_order(tokenizer: Any, tmp_path: Path) -> None:
    group = a_group(*map(str, range(12)))
    for i, reply in enumerate(group["responses"]):
        reply |= dict(zip(steerlm2.SCORES, (0.0, 2.0 * i, float(i)), strict=True))
    path = write(tmp_path / "groups.jsonl", [group])
    (example,) = read_groups(path, tokenizer, steerlm2.Args())
    assert [example.fields[name].tolist() for name in steerlm2.GROUP_FIELDS] == [[*range(12)]] * 2


def no_score() -> dict:
    group = a_group("a", "b")
    del group["responses"][1]["log(P(y|x))"]
    return group


TWO_TURNS = [{"from": "User", "value": "a"}, {"from": "Assistant", "value": "b"}]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (a_group("a"), "found 1 responses; expected two or more"),
        (no_score(), r"log\(P\(y\|x\)\) None; expected a number"),
        (a_group("a", "b", label="verbosity:5"), "verbosity:5; expected a whole number from 0 to 4"),
        (a_group("a", "b", prompt_turns=TWO_TURNS), "an odd number"),
        (a_group("a", "b", prompt_turns=TWO_TURNS[1:]), "turns of assistant; expected user and assistant"),
        (a_group("a", "b" * 9000), "tokens of a response and its prompt; expected 2,048, the model's most"),
        (a_group("a", "b", responses=None), "expected responses"),
        (a_group("a", "b", responses=[{"from": "User", "value": "a"}] * 2), "a response from user"),
    ],
)
def test_a_wrong_group_is_named(tokenizer: Any, tmp_path: Path, group: dict, message: str) -> None:
    path = write(tmp_path / "groups.jsonl", [a_group("a", "b"), group])
    with pytest.raises(dist.RunError, match=f"groups.jsonl:2: .*{message}"):
        read_groups(path, tokenizer, steerlm2.Args())


def test_what_is_in_groups_is_said(tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of sizes that differ, without a label, all alike, and with the weight on one response."""
    alike = a_group("a", "a")
    for reply in alike["responses"]:
        reply |= dict(zip(steerlm2.SCORES, (-1.0, -3.0, -2.0), strict=True))
    sure = a_group("a", "b", "c")
    sure["responses"][0]["log(P(a|x,y))"] = 90.0
    groups = [alike, sure, a_group("a", "b", "c", label=None)]
    found = read_groups(write(tmp_path / "groups.jsonl", groups), tokenizer, steerlm2.Args())
    steerlm2.describe("some", found)
    # log w of the last: -2, -1 and 0, so ESS = (e^-2 + e^-1 + 1)^2 / (e^-4 + e^-2 + 1)
    ess = (math.exp(-2) + math.exp(-1) + 1) ** 2 / (math.exp(-4) + math.exp(-2) + 1)
    out = capsys.readouterr().out
    assert f"some: 3, effective sample size {(2 + 1 + ess) / 3:.2f} of 2.7 responses; 1 below 1.5" in out
    assert "; 1 uniform, without a gradient; 1 without a label" in out and "warning" not in out
    steerlm2.describe("some", found[1:2])
    assert "warning: raise weight_temperature or num_responses" in capsys.readouterr().out


def scripted(monkeypatch: pytest.MonkeyPatch, ended: list[bool], n: int = 3) -> None:
    samples = [Sample(i // n, i % n, [1], [2], [0.0], end, f"reply {i}") for i, end in enumerate(ended)]
    monkeypatch.setattr(steerlm2, "generate", lambda *args, **kwargs: samples)


def test_responses_cut_off_are_left_out_and_groups_of_fewer_than_two_others(
    tokenizer: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    system = {"role": "system", "content": "Be kind."}
    prompts = [
        packed.Example([], [system, {"role": "user", "content": f"{i}?"}], label="toxicity:0\n")
        for i in range(3)
    ]
    args = args_of(steerlm2.Args, num_responses=3, batch_size=2)
    scripted(monkeypatch, [True, False, True, True, False, False, True, True, True])
    first, last = steerlm2.sample_groups(None, tokenizer, prompts, 0, args, Path())
    out = capsys.readouterr().out
    assert (
        "2 of 3 groups have two responses of at most 512 tokens; 3 of 9 were cut off and are left out" in out
    )
    assert first["system"] == "Be kind." and first["prompt_turns"] == [{"from": "User", "value": "0?"}]
    assert [reply["value"] for reply in first["responses"]] == ["reply 0", "reply 2"]
    assert [reply["value"] for reply in last["responses"]] == ["reply 6", "reply 7", "reply 8"]
    assert last["label"] == "toxicity:0"
    scripted(monkeypatch, [True, False, False] * 3)
    with pytest.raises(
        dist.RunError, match="0 of 3 groups have two .* batch_size, 2, or more; raise max_new"
    ):
        steerlm2.sample_groups(None, tokenizer, prompts, 0, args, Path())


def test_a_group_that_lost_a_response_is_one_of_the_others(
    tiny_model: str, device: torch.device, tmp_path: Path
) -> None:
    """Loss, metrics and gradients of groups of 3 and 2 are those of each alone."""
    whole, rest = (json.loads(line) for line in made_up(tmp_path, 2).read_text().splitlines())
    del rest["responses"][1]
    path, tokenizer = write(tmp_path / "uneven.jsonl", [whole, rest]), data.load_tokenizer(tiny_model)
    args = args_of(steerlm2.Args, model=tiny_model)
    policy, groups = models.load(tiny_model, device, args.system), read_groups(path, tokenizer, args)
    found = []
    for limit, parts in ((0, [groups]), (10, [groups]), (0, [groups[:1], groups[1:]])):
        settings = args_of(steerlm2.Args, model=tiny_model, micro_batch_tokens=limit)
        sums: dict[str, float] = {}
        for part in parts:
            totals = steerlm2.backward(policy, part, settings, device).reduce()
            sums = {name: sums.get(name, 0) + x * len(part) / 2 for name, x in totals.items()}
        grads = torch.cat([p.grad.flatten() for p in policy.parameters()]) / len(parts)
        policy.zero_grad()
        found.append((sums, grads))
    for sums, grads in found[:2]:
        assert sums == pytest.approx(found[2][0], rel=1e-5)
        assert grads.isfinite().all() and (grads - found[2][1]).norm() <= 1e-5 * found[2][1].norm()
    held = steerlm2.group_loss(*steerlm2.group_logps(policy, groups, args, device))
    assert held.mean().item() == pytest.approx(found[2][0]["loss"], rel=1e-5)


def test_steps_and_passes_are_counted_from_what_is_kept() -> None:
    args = args_of(steerlm2.Args, batch_size=4, num_epochs=2, num_iterations=3)
    assert steerlm2.count_steps([], 12, args) == 18
    assert steerlm2.count_steps([5, 12], 12, args) == 3 + 6 + 6  # 2 passes over 5 groups: steps of 4, 4 and 2
    groups = data.Dataset([([packed.Example([], str(i)) for i in range(5)], 1.0)])
    seen = [[e.prompt for e in data.batch(groups, k, 4, 1, 2, first_epoch=2)] for k in (1, 2, 3)]
    assert [len(batch) for batch in seen] == [4, 4, 2]
    visits = [prompt for batch in seen for prompt in batch]
    assert sorted(visits[:5]) == sorted(visits[5:]) == [str(i) for i in range(5)]
    assert steerlm2.count_steps([5], 12, args_of(steerlm2.Args, batch_size=4, max_steps=7)) == 7


# through the model

TEXTS = [
    "one",
    "the cat lives in the house",
    "you can feed the horse some hay. happy to help",
    "no",
    "a cow says moo",
]


def made_up(folder: Path, count: int = 6) -> Path:
    """Groups of three responses, of very different lengths."""
    groups = []
    for i in range(count):
        replies = [" and ".join([TEXTS[(i + k) % 5]] * (1 + 3 * (i % 2))) for k in range(3)]
        groups.append(a_group(*replies, prompt_turns=[{"from": "User", "value": TEXTS[i % 5] + "?"}]))
    return write(folder / "groups.jsonl", groups)


def test_a_dummy_row_has_no_loss_and_a_zero_gradient(
    tiny_model: str, device: torch.device, tmp_path: Path
) -> None:
    args = args_of(steerlm2.Args, model=tiny_model)
    policy = models.load(tiny_model, device, args.system)
    groups = read_groups(made_up(tmp_path), data.load_tokenizer(tiny_model), args)
    loss, metrics = steerlm2.loss_and_metrics(policy, packed.make_micro_batch(groups, [], device), args)
    loss.backward()
    assert loss.item() == 0.0 and all(total.item() == count == 0 for total, count in metrics.values())
    assert models.clip_grad_norm(policy, 1.0).item() == 0.0


def test_a_group_larger_than_a_micro_batch_has_the_same_gradient(
    tiny_model: str, device: torch.device, tmp_path: Path
) -> None:
    args = args_of(steerlm2.Args, model=tiny_model, micro_batch_tokens=100_000)
    policy = models.load(tiny_model, device, args.system)
    groups = read_groups(made_up(tmp_path), data.load_tokenizer(tiny_model), args)
    sizes = sorted(group.num_tokens for group in groups)
    found = []
    for limit in (100_000, sizes[3] - 1, 20):  # none, some and all are larger
        changed = args_of(steerlm2.Args, model=tiny_model, micro_batch_tokens=limit)
        totals = steerlm2.backward(policy, list(groups), changed, device)
        grads = torch.cat([p.grad.flatten() for p in policy.parameters()])
        policy.zero_grad()
        found.append((totals.reduce(), grads))
    assert sizes[0] < sizes[3] - 1 < sizes[-1]
    for metrics, grads in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=1e-5)
        assert (grads - found[0][1]).norm() <= 1e-5 * found[0][1].norm()
        torch.testing.assert_close(grads, found[0][1], rtol=1e-4, atol=1e-5)


# runs

GIVEN = {
    "batch_size": 3,
    "learning_rate": 3e-3,
    "warmup_steps": 1,
    "num_samples": 0,
    "micro_batch_tokens": 100_000,
}
TINY = {**GIVEN, "attribute_model": "toy/attribute_model", "attributes": "helpfulness:4,verbosity:1"}


@pytest.fixture(scope="module")
def prompts(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The toy's first prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    for split in ("train", "test"):
        lines = (toy / "prompts" / f"{split}.jsonl").read_text().splitlines(keepends=True)[:64]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return str(folder)


def run(folder: str, **settings: Any) -> list[tuple[float, float]]:
    """(loss, gradient norm) after each step of a run; called here and on the two ranks."""
    steerlm2.main(args_of(steerlm2.Args, **settings, output_dir=folder))
    return [(row["train/loss"], row["train/grad_norm"]) for row in read_metrics(folder) if row["step"]]


def assert_same(ours: list, theirs: list, steps: int) -> None:
    assert len(ours) == len(theirs) == steps
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5), f"{ours}\n{theirs}"


def test_runs_on_a_file_of_groups_do_not_depend_on_ranks_or_micro_batches(
    tiny_model: str, tmp_path: Path, two_ranks: Any
) -> None:
    groups = str(made_up(tmp_path, 7))  # steps of 3, 3 and 1
    settings = {**GIVEN, "model": tiny_model, "groups": groups, "eval_dataset": groups, "num_epochs": 1}
    alone = run(str(tmp_path / "one"), **settings)
    assert abs(alone[0][0] - alone[-1][0]) > 0.01
    adapted = run(str(tmp_path / "adapted"), **settings, lora_rank=4)
    for name, rank, expected in (("one", 0, alone), ("adapted", 4, adapted)):  # saving changes nothing
        assert (
            run(str(tmp_path / "often"), **settings, lora_rank=rank, save_every=1, overwrite=True) == expected
        )
        saved = [next((tmp_path / x / "model").glob("*.safetensors")) for x in (name, "often")]
        assert saved[0].read_bytes() == saved[1].read_bytes()
    for limit in (100_000, 150):
        limited = {**settings, "micro_batch_tokens": limit}
        ours, also = two_ranks("test_steerlm2:run", folder=str(tmp_path / f"two_{limit}"), **limited)
        assert ours == also
        assert_same(ours, [list(x) for x in alone], 3)


def test_a_file_of_groups_is_enough_and_held_out_groups_give_a_distance(
    tiny_model: str, tmp_path: Path
) -> None:
    """Neither prompts nor an attribute model; answers are to the prompts of the held-out groups."""
    groups = str(made_up(tmp_path, 12))
    changed = {"model": tiny_model, "groups": groups, "num_epochs": 3, "batch_size": 4, "num_samples": 4}
    folder = tmp_path / "run"
    losses = [loss for loss, _ in run(str(folder), **{**GIVEN, **changed}, max_new_tokens=4)]
    # 2 or 3 groups have one of the five prompts, more than 5 %: the smallest prompt is held out
    assert len(losses) == -(-3 * 10 // 4)
    rows = read_metrics(folder)
    assert rows[0]["step"] == 0 and rows[0]["eval/distance"] > rows[-1]["eval/distance"]
    sample = json.loads((folder / "samples.jsonl").read_text().split("\n")[0])
    assert sample["label"] == "helpfulness:4,verbosity:1\n" and not list(folder.glob("groups*"))
    judged = run(
        str(tmp_path / "b"), **{**GIVEN, **changed}, attribute_model="toy/attribute_model", max_steps=1
    )
    assert judged and "eval/follow/mae/helpfulness" in read_metrics(tmp_path / "b")[-1]
    with pytest.raises(dist.RunError, match="attributes is .*, which --groups ignores"):
        run(str(tmp_path / "c"), **{**GIVEN, **changed}, attributes="toxicity:0")


def test_nemo_aligners_record_is_trained_on(tiny_model: str, tmp_path: Path) -> None:
    """The distance by hand at step 0, where Q is not Q': KL(w' || b') of one group, w' = (.99978, .00022)."""
    path = write(tmp_path / "groups.jsonl", [nemo_record()] * 2)
    changed = {"batch_size": 2, "model": tiny_model, "groups": str(path), "eval_dataset": str(path)}
    losses = [loss for loss, _ in run(str(tmp_path / "run"), **{**GIVEN, **changed}, num_epochs=3)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert read_metrics(tmp_path / "run")[0]["eval/distance"] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attribute_model": ""}, "attribute_model is not set"),
        ({"temperature": 0.0, "plan": "1x80"}, "temperature 0 is greedy"),
        ({"num_prompts": 2}, "found 2 an iteration; expected batch_size, 3, or more"),
    ],
)
def test_settings_that_cannot_be_run(
    tiny_model: str, prompts: str, tmp_path: Path, changed: dict, message: str
) -> None:
    with pytest.raises(dist.RunError, match=message):
        run(str(tmp_path), **{**TINY, "model": tiny_model, "dataset": prompts, **changed})


def test_prompts_must_alternate(tiny_model: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "3+4?"}, {"role": "user", "content": "Well?"}]
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in (turns, "3+4?", "2+2?", "1+1?")]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    with pytest.raises(dist.RunError, match="expected turns of user and assistant in turn"):
        path = str(tmp_path / "prompts.jsonl")
        run(str(tmp_path / "run"), **TINY, model=tiny_model, dataset=path, eval_dataset=path)


SAMPLED = {
    "attribute_model": "toy/attribute_model",
    "attributes": "toxicity:0,verbosity:1;toxicity:4,verbosity:1",
    "num_prompts": 12,
    "num_responses": 4,
    "num_epochs": 1,
    "batch_size": 4,
    "learning_rate": 3e-4,
    "warmup_steps": 1,
    "max_new_tokens": 48,
    "num_samples": 0,
}


@pytest.fixture(scope="module")
def sampled(prompts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations of three steps, in a folder where a run without a checkpoint left a file of groups."""
    folder = tmp_path_factory.mktemp("sampled")
    write(folder / "groups_1.jsonl", [a_group("stale")] * 12)
    run(str(folder), **SAMPLED, dataset=prompts)
    return folder


def test_every_response_is_scored_by_the_three_models(sampled: Path, device: torch.device) -> None:
    lines = [json.loads(line) for line in (sampled / "groups_1.jsonl").read_text().splitlines()]
    assert {line["label"] for line in lines} == {"verbosity:1,toxicity:0", "verbosity:1,toxicity:4"}
    args, tokenizer = steerlm2.Args(), data.load_tokenizer("toy")
    policy = models.load("toy", device, args.system, trainable=False)
    scorer = models.load_scorer("toy/attribute_model", device, args.system, trainable=False)
    names = models.output_names(scorer)
    for line in lines[:2]:
        found = {name: torch.tensor([reply[name] for reply in line["responses"]]) for name in steerlm2.SCORES}
        plain = steerlm2.read_group(tokenizer, line, "", labelled=False)
        predicted = models.score(scorer, [packed.Example(plain, "")], 0, device)
        expected = torch.zeros(len(plain))
        for item in line["label"].split(","):
            name, value = item.split(":")
            expected += steerlm2.beta_logprobs(predicted[:, names.index(name)])[:, int(value)]
        torch.testing.assert_close(found["log(P(a|x,y))"], expected, rtol=1e-4, atol=1e-4)
        for name, sequences in (
            ("log(P(y|x))", plain),
            ("log(Q(y|a,x))", steerlm2.read_group(tokenizer, line, "")),
        ):
            expected = steerlm2.sequence_logps(policy, [[x] for x in sequences], args, device)
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-4)


def test_the_stored_logps_of_the_sampler_are_those_of_the_training_forward(
    sampled: Path, device: torch.device
) -> None:
    args = steerlm2.Args()
    policy = models.load("toy", device, args.system)
    groups = read_groups(sampled / "groups_1.jsonl", data.load_tokenizer("toy"), args)
    for micro_batch in packed.micro_batches(list(groups), 0, device):
        sampler = micro_batch.fields["sampler_logps"]
        logps = steerlm2.response_logps(policy, micro_batch, args).view(sampler.shape)
        assert ((logps - sampler).abs() <= 1e-5 * sampler.abs().clamp(min=1)).all()


def test_an_iteration_starts_at_its_sampler(sampled: Path) -> None:
    rows = {row["step"]: row for row in read_metrics(sampled)}
    settings = args_of(steerlm2.Args, **SAMPLED, max_steps=6)
    for number, step in ((1, 1), (2, 4)):
        groups = read_groups(sampled / f"groups_{number}.jsonl", data.load_tokenizer("toy"), settings)
        batch = data.batch(data.Dataset([(groups, 1.0)]), 1, 4, 1, 1, first_epoch=number - 1)
        log_w = torch.tensor(np.stack([e.fields["log_weights"] for e in batch]))
        entropy = torch.distributions.Categorical(logits=log_w).entropy().mean().item()
        assert rows[step]["train/kl"] == pytest.approx(0, abs=1e-5)
        assert rows[step]["train/epoch"] == pytest.approx(step / 3)
        assert rows[step]["train/loss"] == pytest.approx(math.log(4) - entropy, abs=1e-5)
    assert abs(rows[2]["train/kl"]) > 1e-4  # and moves away from it


def test_a_run_stopped_within_an_iteration_resumes_on_its_groups(
    sampled: Path, prompts: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(str(folder), **SAMPLED, dataset=prompts, max_steps=2)
    written = (folder / "groups_1.jsonl").stat().st_mtime_ns
    ours = run(str(folder), **SAMPLED, dataset=prompts)
    assert (folder / "groups_1.jsonl").stat().st_mtime_ns == written
    straight = [(row["train/loss"], row["train/grad_norm"]) for row in read_metrics(sampled) if row["step"]]
    assert ours == straight and len(ours) == 6
    with pytest.raises(dist.RunError, match="num_epochs"):
        run(str(folder), **{**SAMPLED, "num_epochs": 2}, dataset=prompts)


class Killed(BaseException):
    """What a kill leaves is what this leaves: nothing is caught, nothing is written after it."""


@pytest.mark.parametrize("iteration", [1, 2])
def test_sampling_goes_on_after_a_kill(
    sampled: Path, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iteration: int
) -> None:
    """Killed after 20 replies, and again in scoring: no reply is sampled twice, the numbers are the same."""
    folder, honest, drawn = tmp_path / "run", files.Journal.add, []

    def killed(self: Any, key: str, record: dict) -> None:
        honest(self, key, record)
        drawn.append((str(self.folder), key))
        if sum(f"groups_{iteration}" in folder for folder, _ in drawn) == 20:
            raise Killed

    monkeypatch.setattr(files.Journal, "add", killed)
    with pytest.raises(Killed):
        run(str(folder), **SAMPLED, dataset=prompts)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(steerlm2, "score_groups", lambda *rest: (_ for _ in ()).throw(Killed))
        run(str(folder), **SAMPLED, dataset=prompts)
    ours = run(str(folder), **SAMPLED, dataset=prompts)
    assert len(drawn) == len(set(drawn)) and not list(folder.glob("groups*replies"))
    straight = [(row["train/loss"], row["train/grad_norm"]) for row in read_metrics(sampled) if row["step"]]
    assert ours == straight


def test_a_stop_is_looked_at_while_sampling(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, count = files.Journal.add, []

    def stopped(self: Any, key: str, record: dict) -> None:
        honest(self, key, record)
        count.append(key)
        if len(count) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(files.Journal, "add", stopped)
    monkeypatch.setattr(dist, "POLL_SECONDS", 0.0)
    with pytest.raises(dist.Stopped, match="stopped while generating; the same command goes on"):
        run(str(tmp_path / "run"), **SAMPLED, dataset=prompts)
    assert len(count) < 48


def test_groups_of_other_settings_are_sampled_anew_and_those_of_the_run_are_not_lost_in_silence(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(steerlm2, "backward", lambda *rest: (_ for _ in ()).throw(Killed))
        run(str(folder), **SAMPLED, dataset=prompts)
    first = (folder / "groups_1.jsonl").read_text()
    run(str(folder), **{**SAMPLED, "seed": 2}, dataset=prompts, max_steps=1)
    assert (folder / "groups_1.jsonl").read_text() != first
    (folder / "groups_1.jsonl").unlink()
    with pytest.raises(dist.RunError, match=r"groups_1.jsonl: cannot be read: .*No such file"):
        run(str(folder), **{**SAMPLED, "seed": 2}, dataset=prompts, max_steps=2)


def test_a_run_that_lost_responses_ends_and_is_finished(prompts: str, tmp_path: Path) -> None:
    """Replies of at most 9 tokens: groups of uneven size, fewer steps than were planned."""
    short = {**SAMPLED, "max_new_tokens": 9, "num_prompts": 16, "num_iterations": 1, "num_epochs": 2}
    losses = run(str(tmp_path / "run"), **short, dataset=prompts)
    groups = [json.loads(x) for x in (tmp_path / "run" / "groups_1.jsonl").read_text().splitlines()]
    sizes = [len(group["responses"]) for group in groups]
    assert len({*sizes}) > 1 and len(groups) >= 4 and min(sizes) >= 2
    assert len(losses) == -(-2 * len(groups) // 4) and read_metrics(tmp_path / "run")[-1]["train/epoch"] == 2
    stamp = (tmp_path / "run" / "model" / "config.json").stat().st_mtime_ns
    assert run(str(tmp_path / "run"), **short, dataset=prompts) == losses
    assert (tmp_path / "run" / "model" / "config.json").stat().st_mtime_ns == stamp


def test_two_ranks_sample_score_and_train_alike(
    sampled: Path, prompts: str, tmp_path: Path, two_ranks: Any
) -> None:
    folder = tmp_path / "run"
    ours, also = two_ranks("test_steerlm2:run", folder=str(folder), **SAMPLED, dataset=prompts)
    straight = [[row["train/loss"], row["train/grad_norm"]] for row in read_metrics(sampled) if row["step"]]
    assert ours == also
    assert_same(ours, straight, 6)


# learning


def following(folder: Path, **settings: Any) -> tuple[dict, dict]:
    """The first and the last evaluation, on the same prompts."""
    steerlm2.main(args_of(steerlm2.Args, **{**steerlm2.TOY, **settings}, output_dir=str(folder)))
    rows = [row for row in read_metrics(folder) if "eval/follow/mae/toxicity" in row]
    return rows[0], rows[-1]


def test_a_run_on_the_toy_world_follows_toxicity_better(tmp_path: Path) -> None:
    settings = {
        "num_prompts": 96,
        "num_responses": 8,
        "batch_size": 16,
        "num_iterations": 1,
        "num_samples": 96,
    }
    judge = "toy.language:judge"
    before, after = following(tmp_path, **settings, judge=judge, max_steps=10)
    assert after["eval/follow/mae/toxicity"] < before["eval/follow/mae/toxicity"]


@pytest.mark.slow
def test_three_seeds_follow_better_than_their_starting_policy(tmp_path: Path) -> None:
    gains = []
    for seed in (1, 2, 3):
        before, after = following(tmp_path / str(seed), num_iterations=1, seed=seed)
        for name in ("toxicity", "verbosity"):
            gains.append(before[f"eval/follow/mae/{name}"] - after[f"eval/follow/mae/{name}"])
    print(f"gain in mean absolute error: {gains}")
    assert sum(gains) / len(gains) > 0.1
