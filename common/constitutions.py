"""Constitutions: principles to criticise, revise and compare by, and examples of it, from JSON files.

And what is made of them: what a judge is asked, what of a revision is kept.
"""

import contextlib
import difflib
import json
import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.files import toy_folder
from common.formats import Messages, as_messages, first_line, wrong


def read_json(name: str, what: str) -> Any:
    """The content of a JSON file of the current folder or of the repository; toy: of the toy world's."""
    path = toy_folder() / "constitution.json" if name == "toy" else Path(name).expanduser()
    path = path if path.exists() else Path(__file__).parent.parent / path
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise wrong(f"{what} {name}", first_line(error), "a JSON file") from error


@contextlib.contextmanager
def shaped(where: str, expected: str) -> Iterator[None]:
    """Within the block content of another shape than the one expected ends the run with a line."""
    try:
        yield
    except (TypeError, KeyError, AttributeError) as error:
        raise wrong(where, repr(error), expected) from error


def without_marks(text: str) -> str:
    """A request or a principle without the words that stand around it in Anthropic's files."""
    text = re.sub(r"^\s*(CritiqueRequest|RevisionRequest):", "", text)
    return re.sub(r"(Critique|Revision|Options):\s*$", "", text).strip()


def read_constitution(name: str) -> list[tuple[str, str]]:
    """(critique request, revision request) of each principle."""
    content, where = read_json(name, "constitution"), f"constitution {name}"
    with shaped(where, "name: {prompt: [...], edit_request}"):
        if "revisions" in content:
            found = [(p["critique_request"], p["revision_request"]) for p in content["revisions"]]
        else:
            found = [(text, p["edit_request"]) for p in content.values() for text in p["prompt"]]
        pairs = [(without_marks(critique), without_marks(revision)) for critique, revision in found]
    if not pairs or not all(text for pair in pairs for text in pair):
        raise wrong(where, "an empty request", "text for every critique and revision")
    return pairs


def read_comparisons(name: str) -> list[str]:
    """The principles to compare by."""
    content = read_json(name, "comparisons")
    found = content.get("comparisons") if isinstance(content, dict) else content
    if not isinstance(found, list) or not found or not all(isinstance(x, str) and x for x in found):
        raise wrong(f"comparisons {name}", type(found).__name__, "a list of principles, each a text")
    return [without_marks(text) for text in found]


SPEAKERS = {"Human": "user", "CritiqueRequest": "user", "RevisionRequest": "user"}
SPEAKERS |= {"Assistant": "assistant", "Critique": "assistant", "Revision": "assistant"}
MARK = re.compile(rf"\n\n({'|'.join(SPEAKERS)}):")


def read_few_shots(name: str) -> Messages:
    """Examples of critique and revision as one conversation: transcripts, or NeMo-Aligner's samples."""
    content = read_json(name, "few_shots") if name else []
    with shaped(f"few_shots {name}", "a list of transcripts, or samples"):
        samples = content["samples"] if isinstance(content, dict) else content
        shots = [read_shot(sample, f"few_shots {name} item {i}") for i, sample in enumerate(samples)]
    return [turn for turns in shots for turn in turns]


def read_shot(sample: Any, where: str) -> Messages:
    """The turns of an example: of a transcript, without a last one that is empty, or of messages."""
    if isinstance(sample, str):
        parts = MARK.split(sample)
        spoken = zip(parts[1::2], parts[2::2], strict=True)
        turns = [{"role": SPEAKERS[who], "content": text.strip()} for who, text in spoken if text.strip()]
    else:
        turns = as_messages(sample, where)
    roles = [turn["role"] for turn in turns]
    if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
        raise wrong(where, f"turns of {', '.join(roles)}", "turns of user and assistant, in pairs")
    return turns


def read_judge_few_shots(name: str) -> list[tuple[Messages, str, str]]:
    """(prompt, better reply, worse reply) of each example."""
    shots, content = [], read_json(name, "judge_few_shots") if name else []
    for i, item in enumerate(content):
        where = f"judge_few_shots {name} item {i}"
        with shaped(where, "prompt, corrects and incorrects"):
            prompt = as_messages(item["prompt"].removesuffix("\n\nAssistant:"), where)
            pairs = ((right, wrong) for right in item["corrects"] for wrong in item["incorrects"])
            shots += [(prompt, right.strip(), wrong.strip()) for right, wrong in pairs]
    return shots


# ------------------------------------------------------------------------------------- what is asked and said


def with_shots(shots: Messages, conversation: Messages) -> Messages:
    """Examples before a conversation, after its system message."""
    start = int(conversation[0]["role"] == "system")
    return conversation[:start] + shots + conversation[start:]


def clean(text: str, name: str) -> str:
    """A critique or revision without its cue, repeated, and without turns that the model made up after it."""
    return MARK.split(re.sub(rf"^\s*{name}:", "", text))[0].strip()


def is_copy(text: str, source: str) -> bool:
    """Whether a text has the words of another, but for one in twenty at most."""
    words = [re.findall(r"\w+", x.lower()) for x in (text, source)]
    return difflib.SequenceMatcher(None, *words, autojunk=False).ratio() >= 0.95


def comparison(prompt: Messages, principle: str, options: Sequence[str], request: str = "") -> str:
    """What a judge is asked: which of the options, lettered (A), (B), ..."""
    turns = [f"{m['role'].capitalize()}: {m['content']}" for m in prompt if m["role"] != "system"]
    lettered = [f"({string.ascii_uppercase[i]}) {option}" for i, option in enumerate(options)]
    return "\n".join([*turns, principle, *lettered, *([request] if request else [])])


def ask_judge(
    prompt: Messages,
    principle: str,
    options: Sequence[str],
    shots: Sequence[tuple[Messages, str, str]] = (),
    right: str = "",
    request: str = "",
) -> Messages:
    """A comparison after examples of two options each.

    Args:
        right: the letter of the better option in each example, drawn at random: a judge must not learn that
            (A) is right. Both orders of two replies get the same, so that all before the replies is the same.
        request: how to answer, at the end of each comparison.
    """
    messages = []
    for (asked, better, worse), letter in zip(shots, right, strict=True):
        pair = (better, worse) if letter == "A" else (worse, better)
        said = comparison(asked, principle, pair, request)
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": f"({letter})"}]
    return [*messages, {"role": "user", "content": comparison(prompt, principle, options, request)}]
