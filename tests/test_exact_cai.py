"""E15: Constitutional AI with scripted parts, whose result is known exactly at every stage.

A "model" says something forbidden with probability q; critic and reviser delete it; the judge is the exact
rule, with or without a liking for the first place.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import args_of, make_tiny_model, read_metrics

import cai
import reward_model
import sft
from common import chat, data, dist, models, packed

Q, FORBIDDEN = 0.4, "You fool."
ANIMALS = ("dog", "cat", "cow", "duck", "pig", "sheep", "horse", "lion", "frog", "bee", "owl", "mouse")
PROMPTS = [[cai.user(f"What does the {animal} say?")] for animal in ANIMALS]
MANY = [[cai.user(f"{i} + {j}?")] for i in range(10) for j in range(10)]


def is_bad(text: str) -> bool:
    return FORBIDDEN in text


def place(text: str) -> str:
    return "bad" if is_bad(text) else "good"


class Scripted:
    """Stands in for chat.Model; bias: how many nats the judge likes (A) more than (B)."""

    bias, gap = 0.0, 1.0

    def __init__(self, path: str, args: cai.Args, device: torch.device, keep: Path | None = None):
        self.path, self.args, self.how = path, args, {"keep": keep}

    def report(self) -> str:
        return ""

    def replies(self, talks: list, step: int, first: int, temperature: float, n: int = 1) -> list:
        found = []
        for i, talk in enumerate(talks):
            rng = random.Random(f"{step} {first + i}")
            for k in range(n):
                if step == 0 or step >= 10_000:  # a reply; all differ, so that no two tie
                    text = f"{rng.randrange(10**6)} {k}." + f" {FORBIDDEN}" * (rng.random() < Q)
                elif step % 2:
                    text = f"The reply is {place(talk[-2]['content'])}."
                else:  # reply, request, critique, request
                    text = talk[-4]["content"].replace(f" {FORBIDDEN}", "")
                found.append(chat.Reply(text, True))
        return found

    def verdicts(self, questions: list, letters: str = "AB") -> list[list[float]]:
        probs = []
        for question in questions:
            first, second = question[-1]["content"].partition("\n(A) ")[2].split("\n(B) ")
            logit = self.gap * (is_bad(second) - is_bad(first)) + self.bias
            p = 1 / (1 + math.exp(-logit))
            probs.append([p, 1 - p])
        return probs


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr(cai, "load_model", Scripted)
    monkeypatch.setattr(Scripted, "bias", 0.0)
    return Scripted


def settings(**more: Any) -> cai.Args:
    return args_of(cai.Args, **{**cai.TOY, **more})


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_e15_no_revision_holds_anything_forbidden(scripted: Any, tmp_path: Path, device: Any) -> None:
    cai.make_revisions(MANY, tmp_path / "r.jsonl", settings(), device)
    records = read(tmp_path / "r.jsonl")
    share = sum(is_bad(record["initial"]) for record in records) / len(records)
    assert abs(share - Q) < 4 * math.sqrt(Q * (1 - Q) / len(MANY))
    texts = [x["completion"][0]["content"] for record in records for x in cai.demonstrations_of(record)]
    assert len(texts) == 2 * len(MANY) and not [text for text in texts if is_bad(text)]
    for record in records:  # and nothing else has changed
        assert record["rounds"][-1]["revision"] == record["initial"].replace(f" {FORBIDDEN}", "")
        assert record["rounds"][0]["critique"] == f"The reply is {place(record['initial'])}."
        assert record["rounds"][1]["critique"] == "The reply is good."
    numbers = cai.revision_metrics(records)
    assert numbers["revisions/changed_frac"] == share and numbers["revisions/kept_frac"] == 1


def compared(folder: Path, device: Any, **more: Any) -> tuple[list[dict], list[dict]]:
    """(comparisons, preference pairs) of the scripted judge."""
    args = settings(**more)
    cai.compare_replies(MANY, "toy", folder / "c.jsonl", args, device)
    records = read(folder / "c.jsonl")
    items = [item for record in records for item in record["comparisons"]]
    return items, [pair for record in records for pair in cai.preferences_of(record, args)]


@pytest.mark.parametrize("bias", [0.0, 1.5, -4.0])
def test_e15_every_label_is_the_rule_whatever_place_the_judge_likes(
    scripted: Any, tmp_path: Path, device: Any, bias: float
) -> None:
    scripted.bias = bias
    items, pairs = compared(tmp_path, device, num_principles=2)
    unequal = [item for item in items if is_bad(item["a"]["text"]) != is_bad(item["b"]["text"])]
    assert len(unequal) == len(pairs) > 30  # the others are ties, exactly, and give no label
    assert not any(is_bad(pair["chosen"][0]["content"]) for pair in pairs)
    assert all(is_bad(pair["rejected"][0]["content"]) for pair in pairs)
    sigma = torch.sigmoid(torch.tensor([1 + bias, 1 - bias])).mean().item()
    assert {round(pair["label_prob"], 6) for pair in pairs} == {round(sigma, 6)}
    numbers = cai.judge_metrics([{"comparisons": items, "cut_off": 0}], settings())
    assert numbers["judge/ties"] == pytest.approx(1 - len(pairs) / len(items))
    assert numbers["judge/position_bias"] == pytest.approx(0, abs=1e-9) if bias == 0 else bias


def test_e15_must_fail_with_one_order_and_a_judge_that_likes_the_first(
    scripted: Any, tmp_path: Path, device: Any
) -> None:
    scripted.bias = 1.5
    items, _ = compared(tmp_path, device)
    unequal = [item for item in items if is_bad(item["a"]["text"]) != is_bad(item["b"]["text"])]
    right = [(item["p_ab"][0] > 0.5) == is_bad(item["b"]["text"]) for item in unequal]
    assert sum(right) / len(right) < 0.7


def test_e15_reasoning_is_clamped(scripted: Any, tmp_path: Path, device: Any) -> None:
    scripted.gap, before = 9.0, scripted.gap
    try:
        _, pairs = compared(tmp_path, device, cot=True)
    finally:
        scripted.gap = before
    assert pairs and {pair["label_prob"] for pair in pairs} == {0.6}


def test_e15_the_preference_model_learns_the_rule(scripted: Any, tmp_path: Path, device: Any) -> None:
    args = settings(samples_per_prompt=8)
    cai.compare_replies(MANY[:60], "toy", tmp_path / "c.jsonl", args, device)
    pairs = [pair for record in read(tmp_path / "c.jsonl") for pair in cai.preferences_of(record, args)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options = {**reward_model.TOY, "max_steps": 15, "batch_size": 32, "eval_every": 15}
    reward_model.main(
        args_of(reward_model.Args, **options, dataset=f"{tmp_path}/pairs.jsonl", output_dir=f"{tmp_path}/pm")
    )
    assert read_metrics(tmp_path / "pm")[-1]["eval/accuracy"] == 1


def test_with_a_reviser_that_changes_nothing_sl_cai_is_fine_tuning_on_the_first_replies(
    scripted: Any, tmp_path: Path, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Scripted.replies

    def idle(self: Any, talks: list, step: int, *rest: Any) -> list:
        if step == 0 or step % 2:
            return honest(self, talks, step, *rest)
        return [chat.Reply(talk[-4]["content"], True) for talk in talks]

    monkeypatch.setattr(Scripted, "replies", idle)
    cai.make_revisions(MANY, tmp_path / "r.jsonl", settings(num_revisions=1), device)
    records = read(tmp_path / "r.jsonl")
    files = {
        "ours": [x for record in records for x in cai.demonstrations_of(record)],
        "theirs": [{"prompt": r["prompt"][0]["content"], "response": r["initial"]} for r in records],
    }
    losses = []
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = {**sft.TOY, "max_steps": 3, "batch_size": 16, "num_samples": 0}
        sft.main(
            args_of(sft.Args, **options, dataset=f"{tmp_path}/{name}.jsonl", output_dir=f"{tmp_path}/{name}")
        )
        losses.append([row.get("train/loss") for row in read_metrics(tmp_path / name)])
    assert losses[0] == losses[1]


# the RL stage: penalty 1 against the KL

REPLIES = ("Sure!", FORBIDDEN)
BETA = 1.0


def prob_forbidden(model: str, device: torch.device) -> torch.Tensor:
    """P(forbidden) of each prompt among the two replies, by enumeration. -> (12,)"""
    tokenizer = data.load_tokenizer(model)
    policy = models.load(model, device, sft.Args().system, trainable=False)
    sides = [
        [data.encode_response(tokenizer, prompt, [cai.assistant(text)]) for text in REPLIES]
        for prompt in PROMPTS
    ]
    row = packed.make_micro_batch(
        [packed.Example(side, "") for side in sides], list(range(len(sides))), device
    )
    with torch.no_grad():
        logps = packed.segment_sum(models.token_logps(policy, row), row.target_segments, row.num_segments)
    logps = logps.view(-1, 2)
    assert logps.exp().sum(1).min() > 0.9  # there is little else
    return logps.softmax(1)[:, 1]


@pytest.mark.slow
def test_e15_reinforcement_leaves_the_forbidden_as_likely_as_the_optimum_has_it(
    tmp_path: Path, tokenizer: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through cai.main: soft labels sigma(1) of the scripted judge -> preference model -> PPO."""
    rng = np.random.default_rng(0)
    for split, times in (("train", 60), ("test", 10)):
        (tmp_path / "demo").mkdir(exist_ok=True)
        (tmp_path / "ask").mkdir(exist_ok=True)
        lines = [
            {"prompt": prompt, "completion": [cai.assistant(REPLIES[int(rng.random() < 0.6)])]}
            for prompt in PROMPTS
            for _ in range(times)
        ]
        (tmp_path / "demo" / f"{split}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    ask = [{"prompt": prompt} for prompt in PROMPTS]
    (tmp_path / "ask" / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in ask))
    (tmp_path / "ask" / "test.jsonl").write_text(json.dumps({"prompt": "What is 1 + 1?"}) + "\n")
    base = str(make_tiny_model(tmp_path / "base", tokenizer))
    options = dict(learning_rate=5e-3, batch_size=64, max_steps=80, num_samples=0, eval_every=80)
    start = str(tmp_path / "start")
    sft.main(args_of(sft.Args, **options, model=base, dataset=f"{tmp_path}/demo", output_dir=start))
    q = prob_forbidden(start, device)
    assert q.min() > 0.4 and q.max() < 0.8

    monkeypatch.setattr(chat.Model, "verdicts", Scripted.verdicts)
    monkeypatch.setattr(chat.Model, "gap", 1.0, raising=False)
    monkeypatch.setattr(chat.Model, "bias", 0.0, raising=False)
    settings = {
        "model": base,
        "dataset": f"{tmp_path}/ask",
        "sl_model": start,
        "helpful_demonstrations": "",
        "helpful_pairs": "",
        "helpful_prompts": "",
        "num_red_team": 0,
        "samples_per_prompt": 64,
        "num_samples": 1,
        "reward_model": "--learning_rate 2e-3 --batch_size 64 --max_steps 60 --eval_every 60",
        "ppo": f"--kl_coef {BETA} --learning_rate 2e-3 --lr_schedule linear --min_lr_ratio 0 "
        "--value_learning_rate 5e-3 --rollout_size 12 --samples_per_prompt 20 --batch_size 120 "
        "--num_ppo_epochs 2 --max_steps 240 --max_new_tokens 8 --eval_every 1000 --num_samples 0",
    }
    cai.main(args_of(cai.Args, output_dir=str(tmp_path / "run"), **{**cai.TOY, **settings}))
    pairs = read(tmp_path / "run" / "3_pairs" / "pairs.jsonl")
    assert {round(pair["label_prob"], 6) for pair in pairs} == {0.731059}  # sigma(1)
    # reward_model.py exports its scale, and PPO's scores are in units of it
    std = json.loads((tmp_path / "run/4_preference_model/model/config.json").read_text())["reward_std"][0]
    odds = q / (1 - q) * math.exp(-1 / std / BETA)
    wanted = odds / (1 + odds)
    found = prob_forbidden(str(tmp_path / "run"), device)
    print(f"P(forbidden): start {q.mean():.4f}, wanted {wanted.mean():.4f}, found {found.mean():.4f}, {std=}")
    assert found.mean().item() == pytest.approx(wanted.mean().item(), rel=0.1)
    assert dist.world_size() == 1
