"""Labels: the attributes of replies, as ratings to learn and as the line that a reply is conditioned on."""

import difflib
import math
from collections.abc import Iterable, Iterator
from typing import Any

from common import dist, formats
from common.formats import ATTRIBUTES, CONVERSATIONS, ROLES, LeftOut, Messages, Record, first, number, wrong
from common.streams import read_records, read_sources

LABELS = ("label", "attributes")
NULLS = ("none", "null")  # in a line of attributes: not known, not asked for


def read_label(value: dict, where: str) -> dict[str, float]:
    """The attributes of a reply: a label (a dict, NeMo-Aligner's list or line), or columns by their names."""
    turns = first(value, CONVERSATIONS)
    label = first(value, LABELS)
    if label is None and isinstance(turns, list):
        label = first(turns[-1], LABELS)
    if label is None:
        label = {name: value[name] for name in ATTRIBUTES if name in value}
        if not label and isinstance(turns, list) and ("mask" in value or any("label" in x for x in turns)):
            label = ""  # a thread of NeMo-Aligner's that nobody rated
    if label == "":
        raise LeftOut("no label")
    if isinstance(label, str):
        line, items = label, [item.split(":") for item in label.split(",")]
        try:
            label = {name.strip(): None if x.strip().lower() in NULLS else float(x) for name, x in items}
        except ValueError as error:
            raise wrong(where, f"the label {line!r}", "name:value joined by commas") from error
        if len(label) < len(items):
            raise wrong(where, f"the label {line!r}", "each name once")
    if isinstance(label, list) and len(label) == len(ATTRIBUTES):
        label = dict(zip(ATTRIBUTES, label, strict=True))
    if not isinstance(label, dict) or not label:
        found = value if label in (None, {}) else label
        raise wrong(where, found, f"a label, or columns, of {', '.join(ATTRIBUTES)}")
    for name in label.keys() | (value.keys() if label.keys() <= value.keys() else set()):
        own = name.lower()
        near = [x for x in ATTRIBUTES if formats.is_slip(own, x)]
        near = near or difflib.get_close_matches(own, ATTRIBUTES, 1, 0.85)
        if near and name not in ATTRIBUTES:
            raise wrong(where, f"the attribute {name}", near[0])
    return {name: number(score, where, name) for name, score in label.items() if score not in (None, -100)}


def is_rated(turn: Any) -> bool:
    """Whether this is a reply of the assistant with a label of its own."""
    role = ROLES.get(str(first(turn, ("role", "from"))).lower()) if isinstance(turn, dict) else ""
    return role == "assistant" and first(turn, LABELS) not in formats.ABSENT


def rated_records(records: list[Record]) -> Iterator[Record]:
    """A record for each rated reply: the turns up to it, where turns and not the record have labels."""
    for value, where in records:
        name = next((name for name in CONVERSATIONS if isinstance(value.get(name), list)), "")
        turns = value[name] if name and first(value, LABELS) is None else []
        ends = [i for i, turn in enumerate(turns, 1) if is_rated(turn)]
        yield from (Record({**value, name: turns[:end]}, where) for end in ends)
        if not ends:
            yield Record(value, where)


def label_line(attributes: dict[str, float]) -> str:
    """The line before a conditioned reply: name:value of each attribute that is known, joined by commas."""
    known = {name: value for name, value in attributes.items() if not math.isnan(value)}
    return ",".join(f"{name}:{value:.0f}" for name, value in known.items()) + "\n" * bool(known)


def read_line(label: str | dict | None, where: str, names: Iterable[str] = ()) -> str:
    """A label line from NeMo-Aligner's string or a dict; "" without a label.

    Raises:
        RunError: a value outside 0 to 4, or an attribute that is none of `names`, where these are given.
    """
    if label in formats.ABSENT:
        return ""
    attributes = read_label({"label": label}, where)
    if isinstance(label, dict):  # a dict has no order of its own
        known = [*names] or [*ATTRIBUTES, *sorted(attributes.keys() - set(ATTRIBUTES))]
        attributes = {name: attributes.pop(name) for name in known if name in attributes} | attributes
    for name, value in attributes.items():
        if value not in range(5):
            raise wrong(where, f"{name}:{value:g}", "a whole number from 0 to 4")
        if names and name not in names:
            raise wrong(where, f"the attribute {name}", f"one of {', '.join(names)}")
    return label_line(attributes)


def read_wanted(text: str, names: list[str] | None = None) -> dict[str, float]:
    """The attributes of an option, in the order of `names`; NaN for one that has a place but no value, null.

    Args:
        names: those that the attribute model has; None where it is not known yet, for any.

    Raises:
        RunError: none is there, one is none of `names`, or a value is not 0 to 4.
    """
    given = [item.partition(":")[0].strip() for item in text.split(",") if item.strip()]
    names = given if names is None else names
    if not given:
        known = ", ".join(names or ATTRIBUTES)
        raise wrong("attributes", "none", f"name:value of some of {known}, joined by commas")
    if unknown := next((name for name in given if name not in names), None):
        raise wrong("attributes", f"the attribute {unknown}", f"one of {', '.join(names)}")
    read_line(text, "attributes")  # refuses other values
    values = read_label({"label": text}, "attributes")
    return {name: values.get(name, math.nan) for name in names if name in given}


def attach_labels(value: dict, turns: Messages, where: str) -> None:
    """Put the label line of each reply with it, in a record that NeMo-Aligner calls VALUE_TO_TEXT."""
    given, kind = first(value, CONVERSATIONS), value.get("type")
    if isinstance(given, list) and not isinstance(kind, str | None) and any(first(t, LABELS) for t in given):
        raise wrong(where, f"type {kind!r}", "VALUE_TO_TEXT, of which labels are context, or none")
    if kind != "VALUE_TO_TEXT" or not isinstance(given, list):
        return
    for turn, source in zip(turns[len(turns) - len(given) :], given, strict=True):
        line = read_line(first(source, LABELS), where)
        if line and turn["role"] == "assistant":
            turn["label"] = line


def check_labels(dataset: str) -> None:
    """Count the replies of annotated data that have no label, and are trained without one.

    Raises:
        RunError: labels that nothing would read, or no label at all.
    """
    given = []
    for source, _ in read_sources(dataset):
        for record, where in read_records(source, "train", "sft") or ():
            turns = first(record, CONVERSATIONS) or ()
            roles = [ROLES.get(str(first(turn, ("role", "from"))).lower()) for turn in turns]
            own = [first(t, LABELS) for t, role in zip(turns, roles, strict=True) if role == "assistant"]
            if any(own) and record.get("type") != "VALUE_TO_TEXT":
                raise wrong(where, f"labels and type {record.get('type')}", "type VALUE_TO_TEXT")
            given += own
    if not any(given):
        raise wrong(f"annotated {dataset}", "no reply with a label", "some, and type VALUE_TO_TEXT")
    num_bare = sum(not label for label in given)
    if dist.is_main() and num_bare:
        print(f"{dataset}: {num_bare:,} of {len(given):,} replies have no label, trained without one")
