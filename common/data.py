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
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tyro

from common import dist, encoded, formats, packed
from common.encoded import Encoded, Made
from common.formats import LeftOut, Messages, as_turns, first, read_exchange, read_pair, read_prompt, wrong
from common.labels import attach_labels, rated_records, read_label
from common.loading import config_of
from common.packed import Example, Tokens
from common.templates import (  # noqa: F401, all that scripts need to encode
    encode_chat,
    encode_prompt,
    encode_response,
    end_token,
    load_tokenizer,
    refuse_rendered,
    template_notes,
)
from common.tokenizing import encoding


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
        found = np.full(len(self), math.nan)
        for start, part in zip(self.starts, self.sources, strict=False):
            is_encoded = isinstance(part, Encoded)
            values = part.columns.get(name) if is_encoded else [e.fields.get(name, math.nan) for e in part]
            if values is not None:
                found[start : start + len(part)] = values
        return found

    def field_names(self) -> list[str]:
        """The fields that any example has, in the order in which they appear."""
        found = dict.fromkeys(self.columns)
        for part in self.sources:
            found |= dict.fromkeys(
                part.columns if isinstance(part, Encoded) else (n for e in part for n in e.fields)
            )
        return [*found]

    @property
    def num_sequences(self) -> np.ndarray:
        """Of each example. (len(self),)"""
        found = np.zeros(len(self), int)
        for start, part in zip(self.starts, self.sources, strict=False):
            is_encoded = isinstance(part, Encoded)
            found[start : start + len(part)] = (
                part.num_sequences if is_encoded else [len(e.sequences) for e in part]
            )
        return found

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
    given, field = first(value, formats.CONVERSATIONS), "train_roles"
    whole = given is not None and (turns[-1]["role"] == "assistant" or first(value, formats.CHOSEN) is None)
    if not whole and first(value, (*formats.RESPONSES, *formats.CHOSEN)) is not None:
        return None
    if value.get("train_roles") is None and value.get("mask") not in formats.ABSENT:
        field = "mask"
    names = ["assistant"] if value.get(field) is None else value[field]
    if names in ([], ""):
        expected = "at least one role; a weight of 0 on a message leaves it out"
        raise wrong(where, f"{field} {names!r}", expected)
    if isinstance(names, str):
        names = re.split(r"\s*,\s*", names.strip())  # whole names: User is not in Users
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise wrong(where, f"{field} {names!r}", "names of roles")
    speakers = [first(turn, ("role", "from")) for turn in given] if isinstance(given, list) else []
    speakers = [""] * (len(turns) - len(speakers)) + speakers
    unknown = [
        *{*names}
        - {*speakers, *(m["role"] for m in turns), *formats.ROLES, *map(str.capitalize, formats.ROLES)}
    ]
    if unknown:  # of a mask a typo would train the user's turns
        raise wrong(where, f"{field} {unknown[0]!r}", f"some of {speakers}")
    # a name that no speaker has is of a role, in any case
    roles = {formats.ROLES.get(name.lower()) for name in names if name not in speakers}
    named = [s in names or m["role"] in roles for s, m in zip(speakers, turns, strict=True)]
    if field == "mask":
        named = [not n and m["role"] != "system" for n, m in zip(named, turns, strict=True)]
    lead = len(formats.lead_of(value, where))  # a history is context, as it is before a prompt
    named = [n and (i >= lead or turns[i]["role"] == "system") for i, n in enumerate(named)]
    return [m.get("trained", n) for n, m in zip(named, turns, strict=True)]


MASKS = ("attention_mask", "completion_mask", "assistant_masks", "loss_mask")  # beside input_ids; 1 is used


def read_tokens(tokenizer: Any, value: dict, where: str) -> Tokens | None:
    """Token ids with labels, -100 where not trained; or a text alone, trained as a whole; else None."""
    if value.get("input_ids") is not None:
        ids = value["input_ids"]
        if not isinstance(ids, list) or any(isinstance(x, list | bool) for x in ids):
            raise wrong(where, f"input_ids {ids!r}", "a list of token ids")
        if value.get("labels") is None and isinstance(value.get("label"), list):
            raise wrong(where, "the field label beside input_ids", "labels; else another name for it")
        names = [name for name in ("input_ids", "labels", *MASKS) if value.get(name) is not None]
        try:
            given = dict(zip(names, np.array([value[name] for name in names]), strict=True))
            tokens = given.pop("input_ids")
            fits = tokens.dtype.kind == "i" and tokens.min() >= 0 and tokens.max() < len(tokenizer)
            labels = given.pop("labels", tokens)
            fits &= all(np.isin(mask, (0, 1)).all() for mask in given.values())
        except ValueError:  # lists of several lengths, or none
            fits = False
        if not fits:
            expected = f"ids below {len(tokenizer)}, as many labels, and masks of 0 and 1"
            raise wrong(where, "other input_ids or labels", expected)
        if ((labels != tokens) & (labels != -100)).any():
            expected = "-100 or the same id at each place"
            raise wrong(where, "labels that are other tokens than input_ids", expected)
        used = given.get("attention_mask", np.ones(len(tokens))) != 0
        mask = np.logical_and.reduce([labels != -100, *given.values()])
        return Tokens(tokens.astype(np.int32)[used], mask[used])
    text_only = (
        isinstance(value.get("text"), str) and first(value, formats.CONVERSATIONS + formats.RESPONSES) is None
    )
    if text_only and not formats.is_transcript(value["text"]):
        formats.as_messages(value["text"], where)  # refuses a mark of a turn elsewhere
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
        formats.refuse_fields(value, where)
        if value.get("responses") is not None:
            prompt = read_prompt(tokenizer, value, where)
            sides = [as_turns(tokenizer, response, where, "assistant") for response in value["responses"]]
        elif first(value, (*formats.CHOSEN, *formats.REJECTED, "preference_strength")) is not None:
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
    tokenizer: Any, dataset: str, eval_dataset: str | None, max_length: int, train_on_prompt: bool = False
) -> tuple[Dataset, Dataset]:
    """(train, eval) demonstrations; train_on_prompt scores all tokens.

    An example is one sequence, or one for each trained turn where the template rewrites earlier turns.
    """

    def encode(value: dict, where: str) -> Example:
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
        if any(trained) and not any(
            t and formats.says_something(m) for t, m in zip(trained, turns, strict=True)
        ):
            raise LeftOut("an empty reply")
        trained = [t and formats.says_something(m) for t, m in zip(trained, turns, strict=True)]
        sequences, seen = encode_chat(tokenizer, turns, trained), ()
        for tokens, mask in sequences if train_on_prompt else ():
            mask[formats.common_prefix(seen, tokens) :] = True  # what several have is scored once
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
    tokenizer: Any, dataset: str, eval_dataset: str | None, max_length: int, cut: str = "end"
) -> tuple[Dataset, Dataset]:
    """(train, eval) preferences: chosen, rejected, PAIR_FIELDS as fields; cut: "end", "start" or "drop"."""

    def encode(value: dict, where: str) -> Example:
        prompt, chosen, rejected, numbers = read_pair(tokenizer, value, where)
        if chosen != rejected and not formats.says_something(chosen[-1]):
            raise LeftOut("an empty chosen reply")
        sides = [encode_response(tokenizer, prompt, side, True) for side in (chosen, rejected)]
        return Example(sides, prompt, numbers)

    return load(tokenizer, "pairs", encode, dataset, eval_dataset, max_length, cut)


def load_ranked(
    tokenizer: Any, dataset: str, eval_dataset: str | None, max_length: int
) -> tuple[Dataset, Dataset]:
    """(train, eval) ranked responses, never cut: a sequence each, with the field ranks.

    Rank 1 is best and equal ranks are ties. A preference pair counts as two responses.
    """

    def encode(value: dict, where: str) -> Example:
        if value.get("responses") is None:
            prompt, *sides, numbers = read_pair(tokenizer, value, where)
            if numbers["label_prob"] < 1:
                expected = "a ranking that is certain, or a loss of pairs, as bt"
                raise wrong(where, "label_prob below 1", expected)
            ranks = [1.0, 2.0]
        else:
            responses, ranks = value["responses"], value.get("ranks")
            ranks = (
                [formats.number(rank, where, "ranks") for rank in ranks] if isinstance(ranks, list) else []
            )
            if not isinstance(responses, list) or len(responses) != len(ranks) or len(set(ranks)) < 2:
                raise wrong(where, value, "responses and as many ranks, not all equal")
            prompt = read_prompt(tokenizer, value, where)
            sides = [as_turns(tokenizer, response, where, "assistant") for response in responses]
        fields = {"ranks": np.array(ranks, np.float32)}
        return Example([encode_response(tokenizer, prompt, side, True) for side in sides], prompt, fields)

    return load(tokenizer, "ranked", encode, dataset, eval_dataset, max_length, "drop")


def fill_fields(datasets: tuple[Dataset, Dataset]) -> tuple[Dataset, Dataset]:
    """Give every example all fields that any has, NaN where it has none."""
    names = dict.fromkeys(name for dataset in datasets for name in dataset.field_names())
    train, evaluation = (d.with_fields({name: d.field(name) for name in names}) for d in datasets)
    return train, evaluation


def load_ratings(
    tokenizer: Any, dataset: str, eval_dataset: str | None, max_length: int
) -> tuple[Dataset, Dataset]:
    """(train, eval) rated replies, never cut: one sequence each, attributes as fields, NaN if missing."""

    def encode(value: dict, where: str) -> Example:
        prompt, response = read_exchange(tokenizer, value, where)
        sequence = encode_response(tokenizer, prompt, response, True)
        label = read_label(value, where)
        if not label:
            raise LeftOut("no label that is known")
        return Example([sequence], prompt, label)

    return fill_fields(load(tokenizer, "ratings", encode, dataset, eval_dataset, max_length, "drop"))


def load_prompts(
    tokenizer: Any, dataset: str, eval_dataset: str | None, max_prompt_length: int, kind: str = "prompts"
) -> tuple[Dataset, Dataset]:
    """(train, eval) prompts, never cut: one sequence each, which generations start from, nothing scored.

    kind: the toy world's folder.
    """

    def encode(value: dict, where: str) -> Example:
        prompt = read_prompt(tokenizer, value, where)
        tokens = np.array(encode_prompt(tokenizer, prompt), np.int32)
        return Example([Tokens(tokens, np.zeros(len(tokens), bool))], prompt)

    return load(tokenizer, kind, encode, dataset, eval_dataset, max_prompt_length, "drop", scored=False)


def load(
    tokenizer: Any,
    kind: str,
    encode: Callable[[dict, str], Example],
    dataset: str,
    eval_dataset: str | None,
    max_length: int,
    cut: str = "end",
    scored: bool = True,
    apart: bool = False,
) -> tuple[Dataset, Dataset]:
    """(train, eval): read, encode, fit; once, then from the cache.

    What is cut and what is left out, and why, is counted and printed, and kept as `notes` of train.

    Args:
        kind: the toy world's folder, which for "ranked" is that of pairs.
        encode: (record, where) -> its example. It may use the tokenizer, and of what stands around it values
            that JSON takes: they are a part of the cache's key, as is the file it is in.
        eval_dataset: "" holds out, as in `mix`; None reads nothing to evaluate on.
        cut: what a sequence of more than max_length tokens loses, its "end" or its "start"; "drop" leaves
            the example out.
        scored: False for prompts, in which no token is scored.
        apart: an example goes on without a sequence that has lost its scored tokens.
    """
    option = "max_length" if scored else "max_prompt_length"  # what the user would change
    # a prompt needs room for one token of a reply
    config = config_of(getattr(tokenizer, "name_or_path", ""))
    most = packed.position_limit(config) - (not scored)
    notes: list[str] = []
    folder = "pairs" if kind == "ranked" else kind

    def tell(text: str) -> None:
        notes.append(text)
        if dist.is_main():
            print(f"{kind}: {text}", flush=True)

    if max_length > most:
        takes = getattr(config, "max_position_embeddings", None) in (None, most + (not scored))
        why = (
            "the model takes" if takes else "its rotary frequencies are alike for, whatever it is packed with"
        )
        tell(f"{option} {max_length} is more than {why}; it is {most} now")
        max_length = most
    for line in template_notes(tokenizer):
        tell(line)
    key = dist.from_main(lambda: encoded.key_of(tokenizer, encode, kind, max_length, cut, scored, apart))

    def attempt(record: formats.Record, text: bytes) -> Made:
        with encoding(record.where):
            strength = record.value.get("preference_strength")
            if folder == "pairs" and strength == 0 and strength is not False:
                raise LeftOut("no preference")
            formats.refuse_fields(*record)
            refuse_rendered(tokenizer, *record)
            example = encode(*record)
        is_cut = fit(example, folder, max_length, cut, option, apart)
        return Made(example, text, question(example), is_cut)

    @functools.cache  # what is both trained and evaluated on is told of once
    def read(source: str, split: str) -> Encoded | None:
        dist.from_main(lambda: bool(formats.open_records(source, split, folder)))  # others find what it found
        stream = formats.open_records(source, split, folder)
        if stream is None:
            return None
        if not len(stream):
            raise wrong(f"dataset {source}", "nothing", "one JSON object a line, or a table with rows")
        two_lined = formats.is_two_lined(stream, folder)
        by_kind = functools.partial(formats.regroup, two_lined=two_lined)
        by_kind = rated_records if kind == "ratings" else by_kind
        rows = functools.partial(encoded.encode_rows, stream, 1 + two_lined, by_kind, attempt)
        name = hashlib.sha256(f"{key} {stream.digest} {stream.split}".encode()).hexdigest()[:32]
        found = encoded.make(dist.from_main(lambda: name), len(stream), rows, f"{kind}: {source}")
        for line in formats.unread(found[0].record, scored) if len(found) else ():
            tell(f"{source}: {line}")
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
        return found

    train, evaluation = mix(kind, dataset, eval_dataset, read)
    train.notes = notes
    return train, evaluation


def mix(kind: str, dataset: str, eval_dataset: str | None, read: Callable) -> tuple[Dataset, Dataset]:
    """(train, eval) of the sources that are named; for "" their test splits, or what is held out.

    Args:
        read: (source, split) -> its examples, None if there is no such split.
    """
    train_parts, eval_parts = [], []
    for source, weight in formats.read_sources(dataset):
        examples = read(source, "train")
        if examples is None:
            raise wrong(f"dataset {source}", "records of other splits only", "some to train on")
        if eval_dataset == "":
            test = read(source, "test")
            examples, test = hold_out(examples, source) if test is None else (examples, test)
            eval_parts.append((test, 1.0))
        train_parts.append((examples, weight))
    for source, _ in formats.read_sources(eval_dataset) if eval_dataset else ():
        with formats.told_as("eval_dataset"):
            eval_parts.append((read(source, "test") or read(source, "train"), 1.0))
    train, evaluation = Dataset(train_parts), Dataset(eval_parts)
    if dist.is_main():
        others = f" to train on, {len(evaluation):,} to evaluate on" if eval_parts else ""
        print(f"{kind}: {len(train):,} examples{others}", flush=True)
    return train, evaluation


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
    ranked = zip(kept, example.fields.get("ranks", ()), strict=False)
    for (one, rank), (other, other_rank) in itertools.combinations(ranked, 2):
        if rank != other_rank and np.array_equal(one.ids, other.ids):  # rounding would decide between them
            raise LeftOut(f"one response at two ranks{f' within {limit}' * is_long}")
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

    dist.run(preview.main, tyro.cli(preview.Args, prog="python -m common.data", use_underscores=True))
