"""Data: files and hub data sets -> tokens and masks of sequences; what an epoch and a batch are made of.

Every format of docs/data.md becomes turns of a conversation (common/formats.py); a chat template makes text
of them and the tokenizer tokens. A mask is True on the tokens that are scored.

    python -m common.data FILE --kind sft --model MODEL        shows sequences as training will see them
"""

import functools
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from common import dist, files, packed
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
    attach_labels,
    common_prefix,
    first,
    is_transcript,
    lead_of,
    number,
    read_exchange,
    read_label,
    read_pair,
    read_prompt,
    read_records,
    read_sources,
    refuse_fields,
    says_something,
    wrong,
)
from common.loading import config_of
from common.packed import Example, Tokens
from common.templates import (
    encode_chat,
    encode_prompt,
    encode_response,
    encoding,
    end_token,
    load_tokenizer,
    refuse_rendered,
    template_notes,
)


class Dataset(list):
    """A list of examples in parts that an epoch visits `weight` times each."""

    def __init__(self, parts: list[tuple[list[Example], float]]):
        super().__init__(example for examples, _ in parts for example in examples)
        self.parts = [(len(examples), weight) for examples, weight in parts]
        self._order: tuple = (None, None)

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


def batch(
    dataset: Dataset,
    step: int,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    max_steps: int = -1,
) -> list[Example]:
    """The examples of an optimizer step, counted from 1: a function of (seed, step), alike on every rank.

    The data end after num_epochs, if that and not max_steps is the end of the run; else they begin anew.
    """
    size = dataset.epoch_size
    end = step * batch_size
    if num_epochs is not None and max_steps < 0:
        end = min(end, num_epochs * size)
    positions = range((step - 1) * batch_size, end)
    return [dataset[dataset.order(seed, p // size)[p % size]] for p in positions]


# -------------------------------------------------------------------------------------------------- data sets


def regroup(records: list[Record], kind: str) -> list[Record]:
    """One record an example: NeMo-Aligner compares two lines, a Self-Instruct task has many instances."""
    grouped = []
    if kind == "pairs" and set(records[0].value) in ({"text"}, {"text", "label"}):
        for one, two in itertools.zip_longest(records[::2], records[1::2]):
            if (
                two is None
                or set(one.value) != set(two.value)
                or one.value.get("label") != two.value.get("label")
            ):
                raise wrong(
                    one.where, "one text of a pair", "the other, alike but for its text, in the line after"
                )
            texts, numbers = [one.value["text"], two.value["text"]], {}
            if "label" in one.value:  # the sign tells the side, negative the first; the size the strength
                given = one.value["label"] if isinstance(one.value["label"], list) else [one.value["label"]]
                strength = next((number(x, one.where, "label") for x in given if x not in (None, -100)), 0)
                texts, numbers = texts[:: 1 if strength <= 0 else -1], {"margin": abs(strength)}
                numbers = numbers if strength else {"tie": True}
            grouped.append(Record({"chosen": texts[0], "rejected": texts[1], **numbers}, one.where))
        return grouped
    for value, where in records:
        given = value.get("instances") or [{}]
        for instance in given if isinstance(given, list) else [str(given)]:
            if not isinstance(instance, dict):
                raise wrong(where, f"the instance {instance!r}", "a JSON object")
            grouped.append(Record({**value, **instance}, where))
    return grouped


def trained_turns(value: dict, turns: Messages, where: str) -> list[bool] | None:
    """Turns of `train_roles`, or of whom NeMo-Aligner's `mask` does not name, or of the assistant.

    What a turn says of itself, as `weight` or `train`, comes first. None for a prompt and its response, of
    which only the latter is trained.
    """
    given, chosen, masked = first(value, CONVERSATIONS), value.get("train_roles"), value.get("mask")
    whole = given is not None and (turns[-1]["role"] == "assistant" or first(value, CHOSEN) is None)
    if not whole and first(value, (*RESPONSES, *CHOSEN)) is not None:
        return None
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

    def encode(value: dict, where: str) -> Example:
        sequence = read_tokens(tokenizer, value, where)
        if sequence is not None:
            return Example([sequence], prompt="")
        if value.get("label") is False:
            raise wrong(where, "label false, an undesirable response", "demonstrations")
        prompt, response = read_exchange(tokenizer, value, where)
        turns, trained = prompt + response, trained_turns(value, prompt + response, where)
        attach_labels(value, turns, where)
        if trained is None:
            trained = [False] * len(prompt) + [m.get("trained", m["role"] == "assistant") for m in response]
        if any(trained) and not any(t and says_something(m) for t, m in zip(trained, turns, strict=True)):
            raise LeftOut("an empty reply")
        trained = [t and says_something(m) for t, m in zip(trained, turns, strict=True)]
        sequences, seen = encode_chat(tokenizer, turns, trained), ()
        for tokens, mask in sequences if train_on_prompt else ():
            mask[common_prefix(seen, tokens) :] = True  # what several have is scored once
            seen = tokens
        return Example(sequences, prompt)

    datasets = load(tokenizer, "sft", encode, dataset, eval_dataset, max_length, apart=True)
    split = [len(e.sequences) for examples in datasets for e in examples if len(e.sequences) > 1]
    if dist.is_main() and split:
        print(
            f"sft: {len(split):,} conversations became {sum(split):,} sequences, one a reply: the chat "
            "template changes earlier turns as a conversation grows",
            flush=True,
        )
    return datasets


def load_pairs(
    tokenizer: Any, dataset: str, eval_dataset: str, max_length: int, cut: str = "end"
) -> tuple[Dataset, Dataset]:
    """(train, eval) preferences: chosen, rejected, PAIR_FIELDS as fields; cut: "end", "start" or "drop"."""

    def encode(value: dict, where: str) -> Example:
        prompt, chosen, rejected, numbers = read_pair(tokenizer, value, where)
        if chosen != rejected and not says_something(chosen[-1]):
            raise LeftOut("an empty chosen reply")
        sequences = [encode_response(tokenizer, prompt, side, True) for side in (chosen, rejected)]
        return Example(sequences, prompt, numbers)

    return load(tokenizer, "pairs", encode, dataset, eval_dataset, max_length, cut)


def load_ranked(tokenizer: Any, dataset: str, eval_dataset: str, max_length: int) -> tuple[Dataset, Dataset]:
    """(train, eval) ranked responses, never cut: a sequence each, with the field ranks.

    Rank 1 is best and equal ranks are ties. A preference pair counts as two responses.
    """

    def encode(value: dict, where: str) -> Example:
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
        return Example([encode_response(tokenizer, prompt, side, True) for side in sides], prompt, fields)

    return load(tokenizer, "pairs", encode, dataset, eval_dataset, max_length, "drop")


def fill_fields(datasets: tuple[Dataset, Dataset]) -> tuple[Dataset, Dataset]:
    """Give every example all fields that any has, NaN where it has none."""
    names = dict.fromkeys(name for dataset in datasets for example in dataset for name in example.fields)
    for example in itertools.chain(*datasets):
        example.fields = {name: example.fields.get(name, math.nan) for name in names}
    return datasets


def load_ratings(tokenizer: Any, dataset: str, eval_dataset: str, max_length: int) -> tuple[Dataset, Dataset]:
    """(train, eval) rated replies, never cut: one sequence each, attributes as fields, NaN if missing."""

    def encode(value: dict, where: str) -> Example:
        prompt, response = read_exchange(tokenizer, value, where)
        sequence = encode_response(tokenizer, prompt, response, True)
        return Example([sequence], prompt, read_label(value, where))

    return fill_fields(load(tokenizer, "ratings", encode, dataset, eval_dataset, max_length, "drop"))


def load_prompts(
    tokenizer: Any, dataset: str, eval_dataset: str, max_prompt_length: int, kind: str = "prompts"
) -> tuple[Dataset, Dataset]:
    """(train, eval) prompts, never cut: one sequence each, which generations start from, nothing scored.

    kind: the toy world's folder.
    """

    def encode(value: dict, where: str) -> Example:
        prompt = read_prompt(tokenizer, value, where)
        tokens = np.array(encode_prompt(tokenizer, prompt), np.int32)
        return Example([(tokens, np.zeros(len(tokens), bool))], prompt)

    return load(tokenizer, kind, encode, dataset, eval_dataset, max_prompt_length, "drop", scored=False)


def load(
    tokenizer: Any,
    kind: str,
    encode: Callable[[dict, str], Example],
    dataset: str,
    eval_dataset: str,
    max_length: int,
    cut: str = "end",
    scored: bool = True,
    apart: bool = False,
) -> tuple[Dataset, Dataset]:
    """(train, eval): read, encode (the ranks share the work), fit, hold out where there is no test split.

    What is cut and what is left out, and why, is counted and printed.

    Args:
        kind: the toy world's folder.
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

    def attempt(record: Record) -> tuple[bool, Example] | str:
        """(whether it was cut, the example), or why it is left out."""
        try:
            with encoding(record.where):
                if record.value.get("preference_strength") == 0 or record.value.get("tie"):
                    raise LeftOut("no preference")
                refuse_fields(*record)
                refuse_rendered(tokenizer, *record)
                example = encode(*record)
            return fit(example, kind, max_length, cut, option, apart)
        except LeftOut as reason:
            return str(reason)

    def read(source: str, split: str) -> list[Example] | None:
        records = read_records(source, split, kind)
        if records is None:
            return None
        if not records:
            raise wrong(f"dataset {source}", "nothing", "one JSON object a line, or a table with rows")
        records = regroup(records, kind)
        found = dist.parallel_map(attempt, records)
        return keep(source, records, found, option, max_length, cut, tell)

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


def keep(
    source: str, records: list[Record], found: list, option: str, max_length: int, cut: str, tell: Callable
) -> list[Example]:
    """The examples that were made of the records of a source; tells how many were cut or dropped, and why.

    Args:
        found: of each record (whether it was cut, the example), or why it is left out.

    Raises:
        RunError: all are left out.
    """
    reasons = Counter(item for item in found if isinstance(item, str))
    kept = [(*item, r) for r, item in zip(records, found, strict=True) if not isinstance(item, str)]
    for _, example, record in kept:
        example.record = record.value
    whys = ", ".join(f"{count:,} with {reason}" for reason, count in reasons.items())
    num_cut = sum(is_cut for is_cut, _, _ in kept)
    if num_cut:
        tell(f"{source}: {num_cut:,} cut at the {cut}, by {option} {max_length}")
    if whys:
        tell(f"{source}: dropped {whys}")
    if not kept:
        is_long = any(option in reason for reason in reasons)
        expected = f"a larger {option} than {max_length}" if is_long else "replies to train on"
        raise wrong(f"dataset {source}", f"nothing to train on, {whys}", expected)
    return [example for _, example, _ in kept]


def fit(
    example: Example, kind: str, max_length: int, cut: str, option: str, apart: bool
) -> tuple[bool, Example]:
    """(whether it was cut, the example) where no sequence is longer than max_length.

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
    return is_long, example


def num_kept(size: int) -> int:
    """How many of `size` examples are trained on where some are held out."""
    return max(0, size - min(512, max(1, round(0.05 * size))))


def hold_out(examples: list[Example], source: str) -> tuple[list[Example], list[Example]]:
    """(kept, held out): 5 % of the examples, 1 to 512, by hash of the question a conversation opens with.

    All examples of one question land on one side, whatever their order in the file.
    """

    def key(example: Example) -> str:
        opening = [m["content"] for m in example.prompt if m["role"] == "user"][:1]
        opening = opening or example.prompt or example.sequences[0][0].tolist()
        return hashlib.sha256(json.dumps(opening).encode()).hexdigest()

    keys = [key(example) for example in examples]
    sizes, held, room = Counter(keys), set(), len(examples) - num_kept(len(examples))
    if len(sizes) == 1:
        raise wrong(f"dataset {source}", "a single prompt, none to hold out", "eval_dataset to be set")
    for name in sorted(sizes):
        if sizes[name] <= room:
            held.add(name)
            room -= sizes[name]
    if not held:  # every prompt has more examples than the share
        held = {min(sizes, key=lambda name: (sizes[name], name))}
    pairs = list(zip(examples, keys, strict=True))
    return [e for e, k in pairs if k not in held], [e for e, k in pairs if k in held]


# ------------------------------------------------------------------------------- what training will see


@dataclass
class Args:
    """Show each sequence of a data set as training will see it, and which of its tokens are scored."""

    file: tyro.conf.Positional[str]
    """the data set: toy, a file, a folder or hub/name[:config[:split]]"""
    kind: Literal["sft", "pairs", "ranked", "prompts", "ratings"]
    """what the records are: demonstrations, preferences, rankings, prompts, or rated replies"""
    model: str = "toy"
    """the model whose tokenizer and template are used: toy, a run folder, a folder, a hub id, a .gguf file"""
    output: str = ""
    """JSON lines to write, one a sequence; without it the first few records are printed"""
    max_length: int = 2048
    """most tokens of a sequence; longer ones are cut or dropped as in training"""
    max_prompt_length: int = 1024
    """most tokens of a prompt, with --kind prompts; longer ones are dropped"""
    chat_template: str = ""
    """a Jinja file or "chatml" in place of the model's own chat template"""
    chat_template_kwargs: str = ""
    """variables of the chat template, as JSON: {"enable_thinking": false}"""


def describe(examples: list[Example], tokenizer: Any) -> list[dict]:
    """A row for each sequence, special tokens kept: `text`, and `trained`, the part of it that is scored.

    `record` counts the examples, `sequence` those of an example: 0 is chosen and 1 rejected of a pair.
    """

    def decode(ids: np.ndarray) -> str:
        return tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return [
        {"record": i, "sequence": k, "text": decode(ids), "trained": decode(ids[mask])}
        for i, example in enumerate(examples)
        for k, (ids, mask) in enumerate(example.sequences)
    ]


def readable(row: dict) -> str:
    """A row of `describe` for the terminal, its texts indented."""
    parts = [f"\nrecord {row['record']}, sequence {row['sequence']}"]
    for name in ("text", "trained"):
        parts += [f"  {name}:", *(f"    {line}" for line in row[name].splitlines() or ["-"])]
    return "\n".join(parts)


def main(args: Args) -> None:
    tokenizer = load_tokenizer(args.model, args.chat_template, args.chat_template_kwargs)
    loaders = {"sft": load_sft, "pairs": load_pairs, "ranked": load_ranked, "ratings": load_ratings}
    load_kind, limit = loaders.get(args.kind, load_prompts), args.max_length
    if args.kind == "prompts":
        limit = args.max_prompt_length
    examples, _ = load_kind(tokenizer, args.file, args.file, limit)  # nothing is held out
    if not args.output:
        print("\n".join(map(readable, describe(examples[:3], tokenizer))))
        return
    try:
        files.write(Path(args.output).expanduser(), files.as_lines(describe(examples, tokenizer)))
    except OSError as error:
        raise dist.RunError(f"output {args.output}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    dist.run(main, tyro.cli(Args, use_underscores=True))
