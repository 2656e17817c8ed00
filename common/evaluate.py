"""Answers to held-out prompts: generated, judged, described, and compared with what was asked for."""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from common import dist
from common.args import Sampling, load_function, what_happened
from common.data import Dataset, encode_prompt
from common.formats import Messages, wrong
from common.generate import generate
from common.packed import Example, position_limit
from common.rewards import as_real, undisturbed

Judge = Callable[[str, str], dict[str, float]]  # (prompt, response) -> scores


@dataclass
class Answer:
    """What a policy answered to the prompt of an example."""

    example: Example
    text: str
    ended: bool  # False: cut off at max_new_tokens
    scores: dict[str, float] = field(default_factory=dict)  # of a judge, by name
    reward: float | None = None  # what training is after

    @property
    def prompt(self) -> str:
        """The prompt, of a conversation its last turn."""
        return last_turn(self.example.prompt)

    def row(self) -> dict[str, Any]:
        """A line of samples.jsonl, without its step."""
        asked = {"prompt": self.prompt, "label": self.example.label}
        if not isinstance(self.example.prompt, str) and len(self.example.prompt) > 1:
            asked["history"] = self.example.prompt[:-1]
        row = asked | {"response": self.text, "ended": self.ended} | self.scores
        return row if self.reward is None else row | {"reward": self.reward}


def last_turn(prompt: Messages | str) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def load_judge(spec: str, dataset: str, toy: str = "toy.language:judge") -> Judge | None:
    """The function that --judge names; by default the toy world's exact one for its data, else none.

    Raises:
        RunError: there is no such function; later, it raises or returns neither a number nor a dict of them.
    """
    spec = spec or (toy if dataset == "toy" else "")
    return functools.partial(scores_of, load_function(spec), spec) if spec else None


def scores_of(judge: Callable, name: str, prompt: str, response: Any) -> dict[str, float]:
    """A judge's scores of a response, or an image; a number alone is called score."""
    try:
        with undisturbed():
            found = judge(prompt, response)
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        raise dist.RunError(f"judge {name} raised {what_happened(error)}; it was asked {prompt!r}") from error
    given = found if isinstance(found, dict) else {"score": found}
    scores = {k: as_real(x) for k, x in given.items()}
    if not all(score is not None and math.isfinite(score) for score in scores.values()):
        raise wrong(f"judge {name}", repr(found), "a finite number, or a dict of them")
    return scores


def answer(
    policy: nn.Module,
    tokenizer: Any,
    dataset: Dataset | list[Example],
    num_samples: int,
    sampling: Sampling,
    seed: int,
    step: int,
    judge: Judge | None = None,
    reward: Callable[[list[Example], list[str]], list[float]] | None = None,
) -> list[Answer]:
    """Answers to the first num_samples distinct prompts, alike on every rank; a collective.

    Args:
        seed, step: what the samples are a function of, besides the weights.
        judge: called on rank 0 only, which others wait for: it may be slow, or behind a server.
        reward: a collective, (examples, texts) -> a number for each.
    """
    chosen: dict[str, Example] = {}
    for example in dataset:
        if len(chosen) == num_samples:
            break
        if example.prompt:
            chosen.setdefault(json.dumps([example.prompt, example.label]), example)
    asked = [(e, encode_prompt(tokenizer, e.prompt, e.label)) for e in chosen.values()]
    short = [(e, tokens) for e, tokens in asked if len(tokens) < position_limit(policy.config)]
    if dist.is_main() and len(short) < len(asked):
        left_out = len(asked) - len(short)
        print(f"{left_out} of {len(asked)} held-out prompts are too long to be answered", flush=True)
    if not short:
        return []
    examples = [e for e, _ in short]
    samples = generate(
        policy,
        tokenizer,
        [tokens for _, tokens in short],
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=seed,
        step=step,
    )
    answers = [Answer(e, sample.text, sample.ended) for e, sample in zip(examples, samples, strict=True)]
    if reward:
        for a, value in zip(answers, reward(examples, [a.text for a in answers]), strict=True):
            a.reward = value
    if judge:
        shown = dist.progress(answers, "answers judged", len(answers))
        found = dist.from_main(lambda: [judge(a.prompt, a.text) for a in shown])
        for a, scores in zip(answers, found, strict=True):
            a.scores = scores
    return answers


def answer_metrics(answers: list[Answer]) -> dict[str, float]:
    """Means over the answers.

    Returns:
        eval/ended, the share that stopped by itself; eval/judge/<score>; eval/reward if there are rewards;
        eval/follow/mae/<score> and eval/follow/pearson/<score> of those that the examples' labels ask for,
        eval/follow/mae and eval/follow/pearson their means.
    """
    if not answers:
        return {}
    metrics = {"eval/ended": sum(a.ended for a in answers) / len(answers)}
    metrics |= {f"eval/judge/{name}": x for name, x in mean_scores([a.scores for a in answers]).items()}
    if answers[0].reward is not None:
        metrics["eval/reward"] = sum(a.reward for a in answers) / len(answers)
    return metrics | {f"eval/follow/{name}": value for name, value in following(answers).items()}


def mean_scores(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each score; all have the same names."""
    for found in scores:
        if found.keys() != scores[0].keys():
            raise wrong("judge", [*found], f"the names it gave before, {[*scores[0]]}")
    return {name: sum(found[name] for found in scores) / len(scores) for name in scores[0]} if scores else {}


# -------------------------------------------------------------------------------------------------- agreement


def agreement(asked: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    """How far numbers are what they should be: mae, and Pearson's and Spearman's correlation.

    A pair with a NaN is left out; where all are, there is nothing to say. A constant correlates with nothing:
    where either side is one, the two correlations are left out.
    """
    import pandas as pd

    both = pd.DataFrame({"asked": asked, "found": found}, dtype=float).dropna()
    if both.empty:
        return {}
    metrics = {"mae": float((both.asked - both.found).abs().mean())}
    if both.asked.nunique() > 1 and both.found.nunique() > 1:
        metrics["pearson"] = float(both.corr().iloc[0, 1])
        metrics["spearman"] = float(both.corr("spearman").iloc[0, 1])
    return metrics


def following(answers: list[Answer]) -> dict[str, float]:
    """mae/<score> and pearson/<score> of each score that a label asks for, and their means mae, pearson."""
    asked = [dict(item.split(":") for item in a.example.label.strip().split(",") if item) for a in answers]
    metrics = {}
    for name in dict.fromkeys(name for values in asked for name in values):
        if name in answers[0].scores:
            wanted = [float(values.get(name, "nan")) for values in asked]
            found = agreement(wanted, [a.scores[name] for a in answers])
            metrics |= {f"{kind}/{name}": found[kind] for kind in ("mae", "pearson") if kind in found}
    for kind in ("mae", "pearson"):
        if own := [value for name, value in metrics.items() if name.startswith(f"{kind}/")]:
            metrics[kind] = sum(own) / len(own)
    return metrics


# ------------------------------------------------------------------------------- what no judge is needed for

REFUSAL = re.compile(r"\b(I (cannot|can't|won't|will not)|I('m| am) (sorry|unable)|as an AI)\b", re.I)


def refuses(text: str) -> bool:
    """Whether a text has a phrase of those that decline."""
    return bool(REFUSAL.search(text.replace("\u2019", "'")))


def stock_shares(texts: list[str], n: int = 4, common: float = 0.1) -> list[float]:
    """For each text, the share of its n-grams of words that at least `common` of all texts contain.

    Rises when a policy gives the same reassurance whatever it was asked; 0 for texts of fewer words.
    """
    grams = [[tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for words in map(str.split, texts)]
    counts = Counter(gram for found in grams for gram in set(found))
    least = max(2, common * len(texts))
    return [sum(counts[gram] >= least for gram in found) / max(1, len(found)) for found in grams]


def describe(texts: list[str]) -> list[dict[str, float]]:
    """Scores of texts by themselves: length in words, whether it refuses, share of stock phrases."""
    return [
        {"words": len(text.split()), "refusals": float(refuses(text)), "stock_phrases": stock}
        for text, stock in zip(texts, stock_shares(texts), strict=True)
    ]
