"""Groups: several responses to one prompt with their scores, in NeMo-Aligner's records.

A record has `system`, `prompt_turns`, a label line of attributes, and `responses`, each a text with SCORES.
"""

from typing import Any

import numpy as np

from common import data, dist
from common.formats import Messages, Record, as_messages, number, read_records, wrong
from common.labels import read_line
from common.loading import config_of
from common.packed import Example, Tokens, position_limit

# of a response: how likely the attributes are, how likely it is without asking for them, and to its sampler
SCORES = ("log(P(a|x,y))", "log(P(y|x))", "log(Q(y|a,x))")


def as_record(prompt: Example, texts: list[str]) -> dict:
    """A prompt with its label and responses, not scored yet.

    Raises:
        RunError: a prompt that the record cannot hold.
    """
    turns = [{"from": m["role"].capitalize(), "value": m["content"]} for m in prompt.prompt]
    system = turns.pop(0)["value"] if turns[0]["from"] == "System" else ""
    if len(turns) % 2 == 0 or any(m.keys() - {"role", "content"} for m in prompt.prompt):
        expected = "turns of user and assistant in turn, of text alone, without tools"
        raise wrong("dataset", f"the prompt {prompt.prompt}", expected)
    replies = [{"from": "Assistant", "value": text} for text in texts]
    return {"system": system, "prompt_turns": turns, "label": prompt.label.strip(), "responses": replies}


def prompt_of(group: dict, where: str) -> Messages:
    turns = group.get("prompt_turns")
    if not isinstance(turns, list) or len(turns) % 2 == 0:
        raise wrong(where, group, "prompt_turns, an odd number of them, and responses")
    system = [{"role": "system", "content": group["system"]}] * bool(group.get("system"))
    prompt = as_messages(system + turns, where)
    roles = [turn["role"] for turn in prompt[len(system) :]]
    if roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise wrong(where, f"turns of {', '.join(roles)}", "user and assistant in turn")
    return prompt


def read_group(tokenizer: Any, group: dict, where: str, labelled: bool = True) -> list[Tokens]:
    """The responses of a group after its prompt, with or without the label line; one span, the response's."""
    replies, prompt = group.get("responses"), prompt_of(group, where)
    if not isinstance(replies, list):
        raise wrong(where, group, "responses")
    label, sequences = read_line(group.get("label"), where) if labelled else "", []
    for reply in as_messages(replies, where):
        if reply["role"] != "assistant":
            raise wrong(where, f"a response from {reply['role']}", "responses from Assistant")
        with data.encoding(where):
            sequences.append(data.encode_response(tokenizer, prompt, [{**reply, "label": label}]))
    return sequences


def read_groups(records: list[Record], tokenizer: Any) -> list[Example]:
    """Groups as examples, a field of (n,) for each of SCORES.

    Raises:
        RunError: a group lacks a score, has a single response, or one longer than the model takes.
    """
    most = position_limit(config_of(getattr(tokenizer, "name_or_path", "")))

    def encode(record: Record) -> Example:
        group, where = record
        sequences = read_group(tokenizer, group, where)
        longest = max(map(len, (ids for ids, _ in sequences)), default=0)
        if longest > most:
            raise wrong(
                where, f"{longest:,} tokens of a response and its prompt", f"{most:,}, the model's most"
            )
        if len(sequences) < 2:
            raise wrong(where, f"{len(sequences)} responses", "two or more, of which to learn")
        replies, label = group["responses"], read_line(group.get("label"), where)
        fields = {x: np.array([number(reply.get(x), where, x) for reply in replies]) for x in SCORES}
        return Example(sequences, prompt_of(group, where), fields, label=label)

    return dist.parallel_map(encode, records)


def load_groups(tokenizer: Any, source: str, eval_dataset: str) -> tuple[list[Example], list[Example]]:
    """(train, eval) of a file or folder; held out is eval_dataset or a test split, else 5 % of prompts."""

    def read(name: str, split: str) -> list[Example]:
        return read_groups(read_records(name, split, "groups") or [], tokenizer)

    train = read(source, "train")
    if not train:
        raise wrong(f"groups {source}", "none to train on", "NeMo-Aligner's records")
    held_out = read(eval_dataset or source, "test") or (read(eval_dataset, "train") if eval_dataset else [])
    return (train, held_out) if held_out else data.hold_out(train, source)
