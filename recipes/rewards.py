"""Verifiable rewards for ppo.py: `--reward recipes.rewards:final_number`."""

import re
from fractions import Fraction

NUMBER = r"-?\d+(?:\.\d+)?"


def final_number(prompts: list, responses: list[str], examples: list[dict]) -> list[float]:
    """1 where the last number of a response is that of the record's `answer`, as in GSM8K; else 0.

    Args:
        prompts: messages or text; not looked at.
        responses: texts of the replies.
        examples: records of the data set, whose `answer` ends with the number ("... #### 72").
    """
    found = [last_number(response) for response in responses]
    right = [last_number(str(example["answer"])) for example in examples]
    return [float(a is not None and a == b) for a, b in zip(found, right, strict=True)]


def last_number(text: str) -> Fraction | None:
    """The last number of a text, without thousands separators."""
    numbers = re.findall(NUMBER, re.sub(r"(?<=\d),(?=\d)", "", text))
    return Fraction(numbers[-1]) if numbers else None
