"""Data: files and hub data sets -> tokens and masks of sequences; what an epoch and a batch are made of.

Every format of docs/data.md becomes turns of a conversation (common/formats.py); a chat template makes text
of them and the tokenizer tokens. A mask is True on the tokens that are scored.

    python -m common.data FILE --kind sft --model MODEL        shows sequences as training will see them
"""

import bisect
import copy
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import tyro

from common import dist, encoded, packed
from common.encoded import Encoded, Made
from common.formats import (
    CHOSEN,
    CONVERSATIONS,
    REJECTED,
    RESPONSES,
    ROLES,
    LeftOut,
    Messages,
    Record,
    as_messages,
    as_turns,
    common_prefix,
    first,
    is_transcript,
    is_two_lined,
    lead_of,
    number,
    open_records,
    read_exchange,
    read_pair,
    read_prompt,
    read_sources,
    refuse_fields,
    regroup,
    says_something,
    wrong,
)
from common.labels import attach_labels, rated_records, read_label
from common.loading import config_of
from common.packed import Example, Tokens
from common.templates import (  # noqa: F401, all that scripts need to encode
    chat_steps,
    encode_chat,
    encode_prompt,
    encode_response,
    end_token,
    load_tokenizer,
    prompt_steps,
    refuse_rendered,
    response_steps,
    template_notes,
)
from common.tokenizing import Steps, encoding, in_turn


class Dataset(Sequence):
    """Examples, not to be changed, in parts that an epoch visits `weight` times each."""

    def __init__(self, parts: list[tuple[Sequence[Example], float]]):
        """parts: folders of encoded examples, or lists of examples."""
        self.sources = [examples for examples, _ in parts]
        self.parts = [(len(examples), weight) for examples, weight in parts]
        self.starts = [*itertools.accumulate((size for size, _ in self.parts), initial=0)]
        self.columns: dict[str, np.ndarray] = {}
        self._order: tuple = (None, None)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        part = bisect.bisect_right(self.starts, i) - 1
        example = self.sources[part][i - self.starts[part]]
        if self.columns:
            own = {name: float(values[i]) for name, values in self.columns.items()}
            example = copy.copy(example)
            example.fields = own | {name: x for name, x in example.fields.items() if name not in own}
        return example

    def with_fields(self, columns: dict[str, np.ndarray]) -> "Dataset":
        """The same examples with more fields, a number of each example in each column (len(self),)."""
        found = copy.copy(self)
        found.columns = self.columns | columns
        return found

    def field(self, name: str) -> np.ndarray:
        """A field that is a number, of all examples, NaN where one has none. (len(self),) float64"""
        if name in self.columns:
            return self.columns[name]
        columns = [
            part.column(name) if isinstance(part, Encoded) else [e.fields.get(name, math.nan) for e in part]
            for part in self.sources
        ]
        return np.concatenate([np.zeros(0), *columns])

    def field_names(self) -> list[str]:
        """The fields that any example has, in the order in which they appear."""
        named = [
            p.names() if isinstance(p, Encoded) else (n for e in p for n in e.fields) for p in self.sources
        ]
        return [*dict.fromkeys(itertools.chain(self.columns, *named))]

    @property
    def num_sequences(self) -> np.ndarray:
        """Of each example. (len(self),)"""
        of = [
            p.num_sequences if isinstance(p, Encoded) else [len(e.sequences) for e in p] for p in self.sources
        ]
        return np.concatenate([np.zeros(0, int), *of])

    def fingerprint(self) -> str:
        """A digest of the examples: tokens, masks, prompts, fields and records."""
        digest = hashlib.sha256()
        for part in self.sources:
            if isinstance(part, Encoded):
                digest.update(part.fingerprint().encode())
                continue
            for e in part:
                digest.update(b"".join(ids.tobytes() + mask.tobytes() for ids, mask in e.sequences))
                digest.update(json.dumps([e.prompt, e.fields, e.record], default=str).encode())
        return digest.hexdigest()

    @property
    def epoch_size(self) -> int:
        return sum(round(size * weight) for size, weight in self.parts)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The indices of one epoch, in the order they are seen: a function of (seed, epoch) only."""
        if self._order[0] != (seed, epoch):
            rng, start, chosen = np.random.default_rng([seed, epoch]), 0, []
            for size, weight in self.parts:
                whole, rest = divmod(round(size * weight), size)
                chosen += [np.tile(np.arange(size), whole) + start, rng.permutation(size)[:rest] + start]
                start += size
            self._order = ((seed, epoch), rng.permutation(np.concatenate(chosen)))
        return self._order[1]


def num_steps(dataset: Dataset, batch_size: int, num_epochs: int, max_steps: int = -1) -> int:
    """Optimizer steps of a run: max_steps if set, else to the end of num_epochs; the last may be small.

    Raises:
        RunError: an epoch has fewer examples than a batch.
    """
    if dataset.epoch_size < batch_size:
        found = f"{dataset.epoch_size} examples an epoch"
        raise wrong("dataset", found, f"batch_size, {batch_size}, or more")
    in_epochs = -(-num_epochs * dataset.epoch_size // batch_size)  # rounded up
    return in_epochs if max_steps < 0 else max_steps


def batch(dataset: Dataset, step: int, *how: Any, **more: Any) -> list[Example]:
    """The examples of an optimizer step, as `places` finds them."""
    return [dataset[i] for i in places(dataset, step, *how, **more)]


def places(
    dataset: Dataset,
    step: int,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    max_steps: int = -1,
    first_epoch: int = 0,
) -> list[int]:
    """The indices of a step's examples, counted from 1: a function of (seed, step), alike on every rank.

    The data end after num_epochs, if that and not max_steps is the end of the run; else they begin anew.
    """
    size = dataset.epoch_size
    end = step * batch_size
    if num_epochs is not None and max_steps < 0:
        end = min(end, num_epochs * size)
    positions = (divmod(p, size) for p in range((step - 1) * batch_size, end))
    return [int(dataset.order(seed, first_epoch + epoch)[place]) for epoch, place in positions]


# -------------------------------------------------------------------------------------------------- data sets


def trained_turns(value: dict, turns: Messages, where: str) -> list[bool] | None:
    """Turns of `train_roles`, or of whom NeMo-Aligner's `mask` does not name, or of the assistant.

    What a turn says of itself, as `weight` or `train`, comes first. None for a prompt and its response, of
    which only the latter is trained.
    """
    given, chosen, masked = first(value, CONVERSATIONS), value.get("train_roles"), value.get("mask")
    whole = given is not None and (turns[-1]["role"] == "assistant" or first(value, CHOSEN) is None)
    if not whole and first(value, (*RESPONSES, *CHOSEN)) is not None:
        return None
    if chosen in ([], ""):
        raise wrong(
            where, f"train_roles {chosen!r}", "at least one role; a weight of 0 on a message leaves it out"
        )
    names = chosen or masked or ["assistant"]
    if isinstance(names, str):
        names = re.split(r"\s*,\s*", names.strip())  # whole names: User is not in Users
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise wrong(where, f"{'train_roles' if chosen else 'mask'} {names!r}", "names of roles")
    speakers = [first(turn, ("role", "from")) for turn in given] if isinstance(given, list) else []
    speakers = [""] * (len(turns) - len(speakers)) + speakers
    unknown = [*{*names} - {*speakers, *(m["role"] for m in turns), *ROLES, *map(str.capitalize, ROLES)}]
    if unknown:  # of a mask a typo would train the user's turns
        raise wrong(where, f"{'train_roles' if chosen else 'mask'} {unknown[0]!r}", f"some of {speakers}")
    # a name that no speaker has is of a role, in any case
    roles = {ROLES.get(name.lower()) for name in names if name not in speakers}
    named = [s in names or m["role"] in roles for s, m in zip(speakers, turns, strict=True)]
    if masked and not chosen:
        named = [not n and m["role"] != "system" for n, m in zip(named, turns, strict=True)]
    lead = len(lead_of(value, where))  # a history is context, as it is before a prompt
    named = [n and (i >= lead or turns[i]["role"] == "system") for i, n in enumerate(named)]
    return [m.get("trained", n) for n, m in zip(named, turns, strict=True)]


MASKS = ("attention_mask", "completion_mask", "assistant_masks", "loss_mask")  # beside input_ids; 1 is used


def read_tokens(tokenizer: Any, value: dict, where: str) -> Tokens | None:
    """Token ids with labels, -100 where not trained; or a text alone, trained as a whole; else None."""
    if value.get("input_ids") is not None:
        if not isinstance(value["input_ids"], list) or any(isinstance(x, list) for x in value["input_ids"]):
            raise wrong(where, f"input_ids {value['input_ids']!r}", "a list of token ids")
        given = {name: value[name] for name in ("labels", *MASKS) if value.get(name) is not None}
        try:
            tokens, columns = np.asarray(value["input_ids"]), {n: np.asarray(x) for n, x in given.items()}
            fits = tokens.dtype.kind == "i" and tokens.size > 0
            fits &= all(x.dtype.kind in "ib" and x.shape == tokens.shape for x in columns.values())
            fits = fits and all(np.isin(x, (0, 1)).all() for n, x in columns.items() if n != "labels")
        except ValueError:  # lists of several lengths
            fits = False
        if not fits or tokens.min() < 0 or tokens.max() >= len(tokenizer):
            expected = f"ids below {len(tokenizer)}, as many labels, and masks of 0 and 1"
            raise wrong(where, "other input_ids or labels", expected)
        labels = np.asarray(tokens if value.get("labels") is None else value["labels"])
        if ((labels != tokens) & (labels != -100)).any():
            raise wrong(
                where, "labels that are other tokens than input_ids", "-100 or the same id at each place"
            )
        masks = [np.asarray(value[name]) != 0 for name in MASKS if value.get(name) is not None]
        used = masks[0] if value.get("attention_mask") is not None else np.ones(len(tokens), bool)
        mask = np.logical_and.reduce([labels != -100, *masks])
        return Tokens(tokens.astype(np.int32)[used], mask[used])
    text_only = isinstance(value.get("text"), str) and first(value, CONVERSATIONS + RESPONSES) is None
    if text_only and not is_transcript(value["text"]):
        as_messages(value["text"], where)  # refuses a mark of a turn elsewhere
        tokens = encode_prompt(tokenizer, value["text"])
        tokens += [end_token(tokenizer)] if tokens[-1:] != [end_token(tokenizer)] else []
        return Tokens(np.array(tokens, np.int32), np.ones(len(tokens), bool))
    return None


def read_responses(tokenizer: Any, value: dict, where: str, max_length: float = math.inf) -> list[Tokens]:
    """The responses of a record of any kind, each after its prompt: one, two of a pair, or `responses`.

    None is cut, which would remove the token that is scored: a longer one ends the run.
    """
    most = min(max_length, packed.position_limit(config_of(getattr(tokenizer, "name_or_path", ""))))
    with encoding(where):
        refuse_fields(value, where)
        if value.get("responses") is not None:
            prompt = read_prompt(tokenizer, value, where)
            sides = [as_turns(tokenizer, response, where, "assistant") for response in value["responses"]]
        elif first(value, (*CHOSEN, *REJECTED, "preference_strength")) is not None:
            prompt, *sides, _ = read_pair(tokenizer, value, where)
        else:
            prompt, response = read_exchange(tokenizer, value, where)
            if not response or response[-1]["role"] != "assistant":
                raise wrong(where, value, "a reply at the end")
            sides = [response]
        found = [encode_response(tokenizer, prompt, side) for side in sides]
        if (longest := max(len(tokens) for tokens, _ in found)) > most:
            raise wrong(where, f"{longest} tokens", f"at most {most}, by max_length or the model")
        return found


def load_sft(
    tokenizer: Any, dataset: str, eval_dataset: str, max_length: int, train_on_prompt: bool = False
) -> tuple[Dataset, Dataset]:
    """(train, eval) demonstrations; train_on_prompt scores all tokens.

    An example is one sequence, or one for each trained turn where the template rewrites earlier turns.
    """

    def encode(value: dict, where: str) -> Steps:
        sequence = read_tokens(tokenizer, value, where)
        if sequence is not None:
            return Example([sequence], prompt="")
        if isinstance(value.get("label"), bool | int | float):  # as in data for KTO
            raise wrong(where, f"label {value['label']!r}", "demonstrations; attributes are names and values")
        prompt, response = read_exchange(tokenizer, value, where)
        turns, trained = prompt + response, trained_turns(value, prompt + response, where)
        attach_labels(value, turns, where)
        if trained is None:
            trained = [False] * len(prompt) + [m.get("trained", m["role"] == "assistant") for m in response]
        if any(trained) and not any(t and says_something(m) for t, m in zip(trained, turns, strict=True)):
            raise LeftOut("an empty reply")
        trained = [t and says_something(m) for t, m in zip(trained, turns, strict=True)]
        sequences, seen = (yield from chat_steps(tokenizer, turns, trained)), ()
        for tokens, mask in sequences if train_on_prompt else ():
            mask[common_prefix(seen, tokens) :] = True  # what several have is scored once
            seen = tokens
        return Example(sequences, prompt)

    datasets = load(tokenizer, "sft", encode, dataset, eval_dataset, max_length, apart=True)
    split = np.concatenate([dataset.num_sequences for dataset in datasets])
    split = split[split > 1]
    if dist.is_main() and len(split):
        print(
            f"sft: {len(split):,} conversations became {split.sum():,} sequences, one a reply: the chat "
            "template changes earlier turns as a conversation grows",
            flush=True,
        )
    return datasets


def load_pairs(
    tokenizer: Any, dataset: str, eval_dataset: str, max_length: int, cut: str = "end"
) -> tuple[Dataset, Dataset]:
    """(train, eval) preferences: chosen, rejected, PAIR_FIELDS as fields; cut: "end", "start" or "drop"."""

    def encode(value: dict, where: str) -> Steps:
        prompt, chosen, rejected, numbers = read_pair(tokenizer, value, where)
        if chosen != rejected and not says_something(chosen[-1]):
            raise LeftOut("an empty chosen reply")
        sides = [response_steps(tokenizer, prompt, side, True) for side in (chosen, rejected)]
        return Example((yield from in_turn(sides)), prompt, numbers)

    return load(tokenizer, "pairs", encode, dataset, eval_dataset, max_length, cut)


def load_ranked(tokenizer: Any, dataset: str, eval_dataset: str, max_length: int) -> tuple[Dataset, Dataset]:
    """(train, eval) ranked responses, never cut: a sequence each, with the field ranks.

    Rank 1 is best and equal ranks are ties. A preference pair counts as two responses.
    """

    def encode(value: dict, where: str) -> Steps:
        if value.get("responses") is None:
            prompt, *sides, _ = read_pair(tokenizer, value, where)
            ranks = [1.0, 2.0]
        else:
            responses, ranks = value["responses"], value.get("ranks")
            ranks = [number(rank, where, "ranks") for rank in ranks] if isinstance(ranks, list) else []
            if not isinstance(responses, list) or len(responses) != len(ranks) or len(set(ranks)) < 2:
                raise wrong(where, value, "responses and as many ranks, not all equal")
            prompt = read_prompt(tokenizer, value, where)
            sides = [as_turns(tokenizer, response, where, "assistant") for response in responses]
        fields = {"ranks": np.array(ranks, np.float32)}
        sides = [response_steps(tokenizer, prompt, side, True) for side in sides]
        return Example((yield from in_turn(sides)), prompt, fields)

    return load(tokenizer, "pairs", encode, dataset, eval_dataset, max_length, "drop")


def fill_fields(datasets: tuple[Dataset, Dataset]) -> tuple[Dataset, Dataset]:
    """Give every example all fields that any has, NaN where it has none."""
    names = dict.fromkeys(name for dataset in datasets for name in dataset.field_names())
    train, evaluation = (d.with_fields({name: d.field(name) for name in names}) for d in datasets)
    return train, evaluation


def load_ratings(tokenizer: Any, dataset: str, eval_dataset: str, max_length: int) -> tuple[Dataset, Dataset]:
    """(train, eval) rated replies, never cut: one sequence each, attributes as fields, NaN if missing."""

    def encode(value: dict, where: str) -> Steps:
        prompt, response = read_exchange(tokenizer, value, where)
        sequence = yield from response_steps(tokenizer, prompt, response, True)
        label = read_label(value, where)
        if not label:
            raise LeftOut("no label that is known")
        return Example([sequence], prompt, label)

    return fill_fields(load(tokenizer, "ratings", encode, dataset, eval_dataset, max_length, "drop"))


def load_prompts(
    tokenizer: Any, dataset: str, eval_dataset: str, max_prompt_length: int, kind: str = "prompts"
) -> tuple[Dataset, Dataset]:
    """(train, eval) prompts, never cut: one sequence each, which generations start from, nothing scored.

    kind: the toy world's folder.
    """

    def encode(value: dict, where: str) -> Steps:
        prompt = read_prompt(tokenizer, value, where)
        tokens = np.array((yield from prompt_steps(tokenizer, prompt)), np.int32)
        return Example([Tokens(tokens, np.zeros(len(tokens), bool))], prompt)

    return load(tokenizer, kind, encode, dataset, eval_dataset, max_prompt_length, "drop", scored=False)


def load(
    tokenizer: Any,
    kind: str,
    encode: Callable[[dict, str], Example | Steps],
    dataset: str,
    eval_dataset: str,
    max_length: int,
    cut: str = "end",
    scored: bool = True,
    apart: bool = False,
) -> tuple[Dataset, Dataset]:
    """(train, eval): read, encode, fit, hold out where there is no test split; once, then from the cache.

    What is cut and what is left out, and why, is counted and printed.

    Args:
        kind: the toy world's folder.
        encode: (record, where) -> its example, or steps to it. It may use the tokenizer, and of what stands
            around it values that JSON takes: they are a part of the cache's key, as is the file it is in.
        cut: what a sequence of more than max_length tokens loses, its "end" or its "start"; "drop" leaves
            the example out.
        scored: False for prompts, in which no token is scored.
        apart: an example goes on without a sequence that has lost its scored tokens.
    """
    option = "max_length" if scored else "max_prompt_length"  # what the user would change
    # a prompt needs room for one token of a reply
    most = packed.position_limit(config_of(getattr(tokenizer, "name_or_path", ""))) - (not scored)
    notes: list[str] = []  # what was cut and left out
    tell = functools.partial(note, kind, notes)
    if max_length > most:
        tell(f"{option} {max_length} is more than the model takes; it is {most} now")
        max_length = most
    for line in template_notes(tokenizer):
        tell(line)
    key = dist.from_main(lambda: encoded.key_of(tokenizer, encode, kind, max_length, cut, scored, apart))

    def attempt(record: Record, text: bytes) -> Steps:
        """What is kept of a record, or LeftOut."""
        with encoding(record.where):
            if record.value.get("preference_strength") == 0 or record.value.get("tie"):
                raise LeftOut("no preference")
            refuse_fields(*record)
            refuse_rendered(tokenizer, *record)
            example = encode(*record)
            if isinstance(example, Generator):
                example = yield from example
        is_cut = fit(example, kind, max_length, cut, option, apart)
        return Made(example, text, question(example), is_cut)

    def read(source: str, split: str) -> Encoded | None:
        dist.from_main(lambda: bool(open_records(source, split, kind)))  # others then find what it found
        stream = open_records(source, split, kind)
        if stream is None:
            return None
        if not len(stream):
            raise wrong(f"dataset {source}", "nothing", "one JSON object a line, or a table with rows")
        two_lined = is_two_lined(stream, kind)
        split = rated_records if kind == "ratings" else functools.partial(regroup, two_lined=two_lined)
        rows = functools.partial(encoded.encode_rows, stream, 1 + two_lined, split, tokenizer, attempt)
        name = hashlib.sha256(f"{key} {stream.digest} {stream.split}".encode()).hexdigest()[:32]
        found = encoded.make(dist.from_main(lambda: name), len(stream), rows, f"{kind}: {source}")
        tell_counts(found, source, option, max_length, cut, tell)
        return found

    train_parts, eval_parts = [], []
    for source, weight in read_sources(dataset):
        examples = read(source, "train")
        if examples is None:
            raise wrong(f"dataset {source}", "records of other splits only", "some to train on")
        if not eval_dataset:
            test = read(source, "test")
            examples, test = hold_out(examples, source) if test is None else (examples, test)
            eval_parts.append((test, 1.0))
        train_parts.append((examples, weight))
    for source, _ in read_sources(eval_dataset) if eval_dataset else ():
        eval_parts.append((read(source, "test") or read(source, "train"), 1.0))
    train, evaluation = Dataset(train_parts), Dataset(eval_parts)
    train.notes = notes
    if dist.is_main():
        print(f"{kind}: {len(train):,} examples to train on, {len(evaluation):,} to evaluate on", flush=True)
    return train, evaluation


def note(kind: str, notes: list[str], text: str) -> None:
    """Keep a note of what was read, and print it."""
    notes.append(text)
    if dist.is_main():
        print(f"{kind}: {text}", flush=True)


def tell_counts(found: Encoded, source: str, option: str, max_length: int, cut: str, tell: Callable) -> None:
    """Tell how many records of a source were cut or left out, and why.

    Raises:
        RunError: all are left out.
    """
    num_cut, reasons = found.contents["num_cut"], found.contents["reasons"]
    whys = ", ".join(f"{count:,} with {reason}" for reason, count in reasons.items())
    if num_cut:
        tell(f"{source}: {num_cut:,} cut at the {cut}, by {option} {max_length}")
    if whys:
        tell(f"{source}: dropped {whys}")
    if not len(found):
        is_long = any(option in reason for reason in reasons)
        expected = f"a larger {option} than {max_length}" if is_long else "replies to train on"
        raise wrong(f"dataset {source}", f"nothing to train on, {whys}", expected)


def fit(example: Example, kind: str, max_length: int, cut: str, option: str, apart: bool) -> bool:
    """Cut an example to sequences of at most max_length tokens. -> whether that was needed

    Raises:
        LeftOut: it is left without a scored token, or a pair without a difference.
    """
    limit, scored = f"{option} {max_length}", option == "max_length"
    for _, mask in example.sequences:
        mask[:1] = False  # nothing comes before a first token
    if scored and not any(mask.any() for _, mask in example.sequences):
        raise LeftOut("no reply to train on")
    is_long = any(len(tokens) > max_length for tokens, _ in example.sequences)
    if is_long and cut == "drop":
        raise LeftOut(f"more tokens than {limit}")
    part = slice(None, max_length) if cut == "end" else slice(-max_length, None)
    for _, mask in example.sequences if is_long else ():
        mask[part][:1] = False
    sequences = [Tokens(tokens[part], mask[part]) for tokens, mask in example.sequences]
    kept = [sequence for sequence in sequences if sequence.mask.any() or not scored]
    if not kept or (len(kept) < len(sequences) and not apart):
        raise LeftOut(f"no scored token within {limit}" if is_long else "no reply to train on")
    if kind == "pairs" and all(np.array_equal(kept[0].ids, other.ids) for other in kept[1:]):
        raise LeftOut(f"sides that are alike{f' within {limit}' * is_long}")
    example.sequences = kept
    return is_long


def num_kept(size: int) -> int:
    """How many of `size` examples are trained on where some are held out."""
    return max(0, size - min(512, max(1, round(0.05 * size))))


def question(example: Example) -> int:
    """A number that examples have in common which open with the same words of the user."""
    opening = [m["content"] for m in example.prompt if m["role"] == "user"][:1]
    opening = opening or example.prompt or example.sequences[0][0].tolist()
    return int.from_bytes(hashlib.sha256(json.dumps(opening).encode()).digest()[:8], "big")


def hold_out(examples: Sequence[Example], source: str) -> tuple[Sequence[Example], Sequence[Example]]:
    """(kept, held out): 5 % of the examples, 1 to 512, by hash of the question a conversation opens with.

    All examples of one question land on one side, whatever their order in the file.
    """
    is_encoded = isinstance(examples, Encoded)
    keys = examples.keys if is_encoded else np.array([question(e) for e in examples], np.uint64)
    names, sizes = (found.tolist() for found in np.unique(keys, return_counts=True))
    held, room = [], len(examples) - num_kept(len(examples))
    if len(names) == 1:
        raise wrong(f"dataset {source}", "a single prompt, none to hold out", "eval_dataset to be set")
    for name, size in zip(names, sizes, strict=True):
        if size <= room:
            held.append(name)
            room -= size
    if not held:  # every prompt has more examples than the share
        held = [min(zip(sizes, names, strict=True))[1]]
    is_held = np.isin(keys, np.array(held, np.uint64))
    if is_encoded:
        return examples.take(~is_held), examples.take(is_held)
    sides = [[e for e, h in zip(examples, is_held, strict=True) if h == side] for side in (False, True)]
    return sides[0], sides[1]


if __name__ == "__main__":
    from common import preview

    dist.run(preview.main, tyro.cli(preview.Args, use_underscores=True))
