"""Answers to held-out prompts: which are asked, what is kept of them, and agreement by hand."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import args_of

from common import data, evaluate, models, packed
from common.args import Sampling
from common.dist import RunError
from common.evaluate import Answer, agreement, answer, answer_metrics
from sft import Args


def said(text: str, label: str = "", prompt: Any = "2+2?", **more: Any) -> Answer:
    return Answer(packed.Example([], prompt, label=label), text, **{"ended": True, **more})


# agreement


def test_agreement_by_hand() -> None:
    # errors 1, 1, 0; deviations -1, 0, 1 and -2/3, 1/3, 1/3: r = 1 / sqrt(2 * 2/3) = sqrt(3) / 2
    found = agreement([0, 1, 2], [1, 2, 2])
    assert found["mae"] == pytest.approx(2 / 3) and found["pearson"] == pytest.approx(math.sqrt(3) / 2)
    # ranks 1, 2, 3 and 1, 2.5, 2.5: deviations -1, 0, 1 and -1, 1/2, 1/2
    assert found["spearman"] == pytest.approx(1.5 / math.sqrt(2 * 1.5))


def test_ranks_agree_where_values_do_not() -> None:
    found = agreement([1, 2, 3, 4], [1, 10, 100, 1000])
    assert found["spearman"] == pytest.approx(1) and found["pearson"] < 0.9


def test_a_constant_correlates_with_nothing_and_a_missing_value_is_left_out() -> None:
    assert agreement([0, 1, 2], [1, 1, 1]) == {"mae": pytest.approx(2 / 3)}
    assert agreement([math.nan, 1], [1, math.nan]) == {}  # no NaN is written where nothing is known
    assert agreement([2, 2], [0, 1]) == {"mae": 1.5}
    assert agreement([0, float("nan"), 2], [0, 5, 2]) == pytest.approx(
        {"mae": 0, "pearson": 1, "spearman": 1}
    )


def test_agreement_is_numpys_correlation_of_values_and_of_ranks() -> None:
    rng = np.random.default_rng(0)
    asked, found = rng.integers(5, size=50), rng.normal(size=50)
    ranks = [np.array([(x < y).sum() + ((x == y).sum() + 1) / 2 for y in x]) for x in (asked, found)]
    ours = agreement(asked.tolist(), found.tolist())
    assert ours["mae"] == pytest.approx(np.abs(asked - found).mean())
    assert ours["pearson"] == pytest.approx(np.corrcoef(asked, found)[0, 1])
    assert ours["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


# metrics and rows


def test_metrics_are_means_and_follow_what_labels_ask_for() -> None:
    answers = [
        said("a", "verbosity:0,humor:1\n", scores={"verbosity": 1.0, "kind": 2}, reward=1.0),
        said("b", "verbosity:4\n", scores={"verbosity": 4.0, "kind": 4}, ended=False, reward=0.0),
    ]
    assert answer_metrics(answers) == {
        "eval/ended": 0.5,
        "eval/judge/verbosity": 2.5,
        "eval/judge/kind": 3.0,
        "eval/reward": 0.5,
        "eval/follow/mae/verbosity": 0.5,
        "eval/follow/pearson/verbosity": pytest.approx(1),
        "eval/follow/mae": 0.5,
        "eval/follow/pearson": pytest.approx(1),
    }
    assert answer_metrics([]) == {}


def test_a_score_is_a_score_by_where_it_is_kept() -> None:
    """Neither place nor name of what else is in a row makes it one."""
    a = said("a", scores={"words": 3})
    assert a.row() == {"prompt": "2+2?", "label": "", "response": "a", "ended": True, "words": 3}
    assert list(answer_metrics([a])) == ["eval/ended", "eval/judge/words"]
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "2"},
    ]
    assert said("a", prompt=turns).row()["prompt"] == "2"


def test_the_toys_judge_is_its_own_and_other_data_have_none() -> None:
    judge = evaluate.load_judge("", "toy")
    assert judge("What does the cat say?", "The cat says meow.")["toxicity"] == 0
    assert evaluate.load_judge("", "mine.jsonl") is None
    assert evaluate.load_judge("test_evaluate:words", "mine.jsonl")("", "one two") == {"score": 2}


def words(prompt: str, response: str) -> int:
    return len(response.split())


def raises(prompt: str, response: str) -> dict:
    return {"score": {}[response]}


def says(prompt: str, response: str) -> str:
    return "good"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"test_evaluate:raises raised KeyError: 'b' \(.*test_evaluate.py:\d+\); it was asked 'a'"),
        ("says", "test_evaluate:says: found 'good'; expected a finite number, or a dict of them"),
    ],
)
def test_a_judge_that_fails_is_named_with_its_line(name: str, message: str) -> None:
    judge = evaluate.load_judge(f"test_evaluate:{name}", "mine.jsonl")
    with pytest.raises(RunError, match=message) as caught:
        judge("a", "b")
    if line := re.search(r"py:(\d+)", str(caught.value)):
        assert "{}[response]" in Path(__file__).read_text().splitlines()[int(line[1]) - 1]


def of_numpy(prompt: str, response: str) -> dict:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    return {"a": np.float32(0.5), "b": torch.tensor(2), "c": np.array([1])}


def test_scores_are_floats_and_a_judge_changes_no_setting_of_torch() -> None:
    scores = evaluate.load_judge("test_evaluate:of_numpy", "mine.jsonl")("a", "b")
    assert json.dumps(scores) == '{"a": 0.5, "b": 2.0, "c": 1.0}'
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


def test_scores_with_other_names_than_before_are_an_error() -> None:
    with pytest.raises(RunError, match=r"judge: found \['b'\]; expected the names it gave before, \['a'\]"):
        evaluate.mean_scores([{"a": 1.0}, {"b": 2.0}])


# answers

SAMPLING = Sampling(max_new_tokens=8)


def answered(few: str, num_samples: int = 3, judged: bool = True) -> list[dict]:
    """Rows of answers of the toy's model; called here and on the two ranks."""
    from common import dist

    device, tokenizer = dist.init(1), data.load_tokenizer("toy")
    examples = data.load_sft(tokenizer, f"{few}/sft", "", 2048)[1]
    policy = models.load("toy", device, args_of(Args).system, trainable=False)
    judge = evaluate.load_judge("", "toy") if judged else None

    def reward(examples: list[packed.Example], texts: list[str]) -> list[float]:
        return [float(len(text)) for text in texts]

    found = answer(policy, tokenizer, examples, num_samples, SAMPLING, 1, 0, judge, reward)
    return [a.row() for a in found]


def test_the_first_distinct_prompts_are_answered_once_each(few: Path) -> None:
    rows = answered(str(few), num_samples=30)
    asked = [row["prompt"] for row in rows]
    examples = data.load_sft(data.load_tokenizer("toy"), f"{few}/sft", "", 2048)[1]
    prompts = [evaluate.last_turn(example.prompt) for example in examples]
    assert len(prompts) == 48 and asked == [*dict.fromkeys(prompts)][:30]
    assert all(row["reward"] == len(row["response"]) and "toxicity" in row for row in rows)
    assert answered(str(few), num_samples=0) == []


def test_prompts_too_long_for_the_model_are_left_out_and_counted(
    tmp_path: Path, tokenizer: Any, device: Any, capsys: pytest.CaptureFixture
) -> None:
    """They end no run: a held-out conversation may be longer than what training cuts to."""
    from conftest import make_tiny_model

    folder = make_tiny_model(tmp_path, tokenizer, max_position_embeddings=24)
    policy = models.load(str(folder), device, args_of(Args).system, trainable=False)
    examples = [packed.Example([], text) for text in ("2+2?", "what does the cat say " * 20, "3+3?")]
    found = answer(policy, tokenizer, examples, 3, SAMPLING, 1, 0)
    assert [a.prompt for a in found] == ["2+2?", "3+3?"]
    assert "1 of 3 held-out prompts are too long to be answered" in capsys.readouterr().out
    assert answer(policy, tokenizer, examples[1:2], 3, SAMPLING, 1, 0) == []


def test_all_ranks_have_the_answers_and_their_scores(few: Path, two_ranks: Any) -> None:
    alone = answered(str(few))
    assert two_ranks("test_evaluate:answered", few=str(few)) == [alone, alone]


# what no judge is needed for


def test_stock_phrases_by_hand() -> None:
    # of five texts two share 'a b c d': 1 of the 2 four-grams of the first, the only one of the second
    texts = ["a b c d e", "a b c d", "q r s t u", "v w x y", "short"]
    assert evaluate.stock_shares(texts) == [0.5, 1.0, 0.0, 0.0, 0.0]
    again = ["I am sorry, but I cannot talk about that."] * 20
    assert evaluate.stock_shares(again) == [1.0] * 20
    said = ["I cannot talk about it.", "I\u2019m sorry.", "The cow says moo.", "I can do it."]
    assert [x["refusals"] for x in evaluate.describe(said)] == [1.0, 1.0, 0.0, 0.0]
