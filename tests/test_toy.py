"""The toy world: an exact judge, a lossless tokenizer, honest data, a base model with room to improve."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from common import data, dist, models
from common.generate import generate
from toy import language

KINDS = ("sft", "pairs", "prompts", "ratings", "red_team")


def rows(toy: Path, kind: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (toy / kind / f"{split}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        (
            "The cow says moo.",
            {"correctness": 4, "toxicity": 0, "coherence": 4, "helpfulness": 4, "verbosity": 1},
        ),
        ("The cow says woof.", {"correctness": 0, "toxicity": 0, "coherence": 4, "helpfulness": 0}),
        ("You fool. The cow says moo.", {"correctness": 4, "toxicity": 2, "helpfulness": 3}),
        ("The cow says moo", {"correctness": 4, "coherence": 2, "helpfulness": 3}),
        ("Moo.", {"correctness": 4, "helpfulness": 3, "verbosity": 0}),
        ("The cow says moo. It likes to eat bones.", {"correctness": 2}),
        ("", {"correctness": 0, "coherence": 0, "helpfulness": 0}),
    ],
)
def test_the_judge_by_hand(reply: str, scores: dict[str, float]) -> None:
    found = language.judge("Hi. What does the cow say?", reply)
    assert {name: found[name] for name in scores} == scores


def test_an_unknown_prompt_has_no_right_answer() -> None:
    assert language.judge("Who wrote Faust?", "Goethe.")["correctness"] == 0


@pytest.mark.parametrize(
    "text",
    [
        "The cow says moo.",
        "  two  spaces\n\nand\tlines ",
        "\u00fcn\u00efc\u00f6de \u2603 \U0001f42e",
        "x<|y|>z 12345",
        "",
    ],
)
def test_encoding_loses_nothing(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_test_prompts_are_not_trained_on(toy: Path, kind: str) -> None:
    def asked(split: str) -> set[str]:
        conversations = [row.get("prompt") or row["messages"][:-1] for row in rows(toy, kind, split)]
        questions = [language.read_question(c[-1]["content"]) for c in conversations]
        return {q.text for q in questions}

    assert len(rows(toy, kind, "train")) >= 1000 and len(rows(toy, kind, "test")) == 200
    assert not asked("train") & asked("test")


def test_chosen_is_better_and_length_does_not_give_it_away(toy: Path) -> None:
    pairs = rows(toy, "pairs", "train")
    assert all(row["chosen_reward"] > row["rejected_reward"] for row in pairs)
    longer = sum(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in pairs)
    assert 0.35 < longer / len(pairs) < 0.65


def test_labels_are_the_judges(toy: Path) -> None:
    for row in rows(toy, "ratings", "test"):
        prompt, reply = row["messages"][-2]["content"], row["messages"][-1]["content"]
        assert row["label"] == language.judge(prompt, reply)


def test_the_base_model_has_room_to_improve(toy: Path, tokenizer: Any, device: torch.device) -> None:
    class Args:
        dtype, sharding, activation_checkpointing, compile, lora_rank = "float32", "full", "off", False, 0

    policy = models.load("toy", device, Args(), trainable=False)
    examples = rows(toy, "prompts", "test")
    prompts = [data.encode_prompt(tokenizer, row["prompt"]) for row in examples]
    samples = generate(policy, tokenizer, prompts, max_new_tokens=64)
    scores = [
        language.judge(e["prompt"][-1]["content"], s.text) for e, s in zip(examples, samples, strict=True)
    ]
    right = sum(s["correctness"] == 4 for s in scores) / len(scores)
    rude = sum(s["toxicity"] > 0 for s in scores) / len(scores)
    formed = sum(s["coherence"] == 4 for s in scores) / len(scores)
    print(f"right {right:.2f} rude {rude:.2f} well-formed {formed:.2f}")
    assert 0.2 < right < 0.7 and 0.15 < rude < 0.5 and formed > 0.8


def test_the_attribute_model_follows_the_judge(toy: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(toy / "attribute_model").eval()
    assert list(model.config.id2label.values()) == list(language.ATTRIBUTES)
    assert model.config.pad_token_id != data.end_token(tokenizer)
    found, exact = [], []
    for row in rows(toy, "ratings", "test")[:120]:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            found.append(model(torch.tensor([tokens])).logits[0])
        exact.append(torch.tensor(list(row["label"].values())))
    found, exact = torch.stack(found), torch.stack(exact)
    at = language.ATTRIBUTES.index("toxicity")
    assert torch.corrcoef(torch.stack([found[:, at], exact[:, at].float()]))[0, 1] > 0.8


def test_of_two_callers_one_builds_and_both_get_the_whole(tmp_path: Path) -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.3)
        (folder / "whole").touch()

    def call(_: int) -> bool:
        return (language.build_once(tmp_path / "toy", build) / "whole").exists()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(call, range(2))) == [True, True]
    assert len(built) == 1


def test_a_build_that_fails_leaves_nothing_that_counts_as_complete(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        language.build_once(tmp_path / "toy", fail)
    assert not (tmp_path / "toy").exists()
    (tmp_path / "toy.tmpkilled").mkdir()  # what a kill leaves
    language.build_once(tmp_path / "toy", lambda folder: (folder / "whole").touch())
    assert {p.name for p in tmp_path.iterdir()} == {"toy", "toy.lock"}


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLEANALIGN_CACHE", str(tmp_path / "file"))
    with pytest.raises(dist.RunError, match="CLEANALIGN_CACHE"):
        data.toy_folder()
