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
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import tyro

from common import dist, files, packed
from common.files import model_folder
from common.formats import (
    CONVERSATIONS,
    RESPONSES,
    Messages,
    Record,
    as_turns,
    attach_labels,
    common_prefix,
    first,
    first_line,
    is_transcript,
    number,
    read_exchange,
    read_label,
    read_pair,
    read_prompt,
    read_records,
    read_sources,
    regroup,
    trained_turns,
    wrong,
)
from common.packed import Example, Tokens


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


# ------------------------------------------------------------------------------------- tokenizer and template

CHATML = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
BREAK = "\ufdd0"  # Unicode keeps this out of texts: where `tokenize` cuts


def load_tokenizer(model: str, chat_template: str = "") -> Any:
    """The model's tokenizer; chat_template (a Jinja file, or "chatml") replaces the one it comes with."""
    from transformers import AutoTokenizer

    folder, gguf = model_folder(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
        if chat_template == "chatml":
            end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token or ""
            begin = "{{ bos_token }}" if adds_bos(tokenizer) else ""
            tokenizer.chat_template = begin + CHATML.replace("<|im_end|>", end)
        elif chat_template:
            tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
        end_token(tokenizer)  # a template that fails does so here
    except dist.RunError:
        raise
    except Exception as error:  # a template may raise anything
        template = f"chat_template {chat_template}" if chat_template else "its own chat template"
        raise dist.RunError(f"the tokenizer of {model} with {template}: {first_line(error)}") from error
    return tokenizer


def adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


@functools.lru_cache(maxsize=2)
def special_tokens(tokenizer: Any) -> re.Pattern:
    """Matches the spelling of any special token."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def render(tokenizer: Any, messages: Messages, for_reply: bool) -> str:
    """A conversation under the chat template; for_reply adds the header of the assistant's next turn.

    A special token that a message spells out stays text: a BREAK after its first character hides it. Without
    a template the turns are plain text and joined as they stand.
    """
    labels = [labelled(tokenizer, m.get("label", "")) for m in messages]
    if tokenizer.chat_template is None:
        return "".join(label + m["content"] for label, m in zip(labels, messages, strict=True))
    plain = functools.partial(special_tokens(tokenizer).sub, lambda m: m[0][0] + BREAK + m[0][1:])
    turns = zip(labels, messages, strict=True)
    messages = [{"role": m["role"], "content": label + plain(m["content"])} for label, m in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_reply)


@functools.lru_cache(maxsize=16)  # chosen and rejected share a prompt
def tokenize(tokenizer: Any, text: str, plain: bool = False) -> tuple[int, ...]:
    """Tokens of a rendered conversation. Only plain text needs a BOS: a template writes its own."""
    pieces = [tokenizer(s, add_special_tokens=False, verbose=False)["input_ids"] for s in text.split(BREAK)]
    tokens = tuple(token for piece in pieces for token in piece)
    rows = getattr(config_of(getattr(tokenizer, "name_or_path", "")), "vocab_size", math.inf)
    if max(tokens, default=0) >= rows:
        token = tokenizer.convert_ids_to_tokens(max(tokens))
        raise dist.RunError(
            f"the tokenizer makes {token!r} token {max(tokens)}, but the model embeds {rows} tokens; "
            "enlarge it with resize_token_embeddings and save it, or leave the token out of the data"
        )
    bos = tokenizer.bos_token_id
    if (plain or tokenizer.chat_template is None) and tokens[:1] != (bos,) and adds_bos(tokenizer):
        tokens = (bos, *tokens)
    return tokens


@functools.lru_cache(maxsize=2)
def end_token(tokenizer: Any) -> int:
    """The token that ends an assistant turn: trained once per turn, and where generation stops."""
    end = tokenizer.eos_token_id
    if tokenizer.chat_template:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "zebra"}]
        tail = render(tokenizer, probe, False).rpartition("zebra")[2]
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        ends = [token for token in tokenize(tokenizer, tail) if token in special]
        if not ends:  # GLM's turns end where the next begins, with a token that its generation stops at
            tail = render(tokenizer, [*probe, probe[0]], False).partition("zebra")[2]
            ends = [token for token in tokenize(tokenizer, tail) if token in generation_ends(tokenizer)]
        end = next(iter(ends), end)
    if end is None:
        raise dist.RunError("the tokenizer has no end token: set eos_token in its tokenizer_config.json")
    return end


def generation_ends(tokenizer: Any) -> list[int]:
    """End tokens in the generation_config of the folder or hub id that the tokenizer came from."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(tokenizer.name_or_path).eos_token_id
    except (OSError, ValueError):
        return []
    return ends if isinstance(ends, list) else [ends]


def encode_chat(tokenizer: Any, messages: Messages, trained: list[bool]) -> Tokens:
    """Tokens of a conversation and the mask of its trained turns, each up to and including its end token.

    The span of a turn is what rendering it adds to the conversation before it (and to a reply's header), so
    no markers in the template are needed; a template that rewrites earlier turns is refused.
    """
    spans = [i for i, t in enumerate(trained) if t]
    if not spans:
        return Tokens(np.zeros(0, np.int32), np.zeros(0, bool))
    text = render(tokenizer, messages[: spans[-1] + 1], False)
    tokens, end = tokenize(tokenizer, text), end_token(tokenizer)
    mask = np.zeros(len(tokens), bool)
    for i in spans:
        is_reply = messages[i]["role"] == "assistant"
        before = render(tokenizer, messages[:i], is_reply) if i else opening(tokenizer, messages[0])
        before += labelled(tokenizer, messages[i].get("label", ""))  # context, never trained
        turn = text if i == spans[-1] else render(tokenizer, messages[: i + 1], False)
        if not (text.startswith(turn) and turn.startswith(before)):
            raise ValueError("the chat template rewrites earlier turns; set another one with --chat_template")
        # a token across the boundary belongs to the turn that completes it
        start = common_prefix(tokenize(tokenizer, before), tokens)
        stop = common_prefix(tokenize(tokenizer, turn), tokens)
        if end in tokens[start:stop]:
            stop = tokens.index(end, start) + 1
        elif tokens[stop : stop + 1] == (end,):  # the next turn begins with it
            stop += 1
        mask[start:stop] = True
    tokens, mask = tokens[:stop], mask[:stop]  # what follows the last end token is never scored
    if is_reply and tokens[-1:] != (end,):  # a rendering without end tokens
        tokens, mask = (*tokens, end), np.append(mask, True)
    return Tokens(np.array(tokens, np.int32), mask)


def opening(tokenizer: Any, message: dict[str, str]) -> str:
    """What the template puts before the content of a first turn: what its rendering shares with another."""
    other = "b" if message["content"].startswith("a") else "a"
    both = [render(tokenizer, [{**message, "content": text}], False) for text in (message["content"], other)]
    return os.path.commonprefix(both)


def encode_prompt(tokenizer: Any, prompt: Messages | str, label: str = "") -> list[int]:
    """Tokens to generate from: messages under the template, a string as plain text; then the label."""
    plain = isinstance(prompt, str)
    text = prompt if plain else render(tokenizer, prompt, True)
    return list(tokenize(tokenizer, text + labelled(tokenizer, label), plain))


def labelled(tokenizer: Any, line: str) -> str:
    """A label line as it stands before a reply: after the template's label_token, where it sets one."""
    token = re.search(r"set label_token = '(.*?)'", tokenizer.chat_template or "") if line else None
    return token[1] + line if token else line


# -------------------------------------------------------------------------------------------------- data sets


def read_tokens(tokenizer: Any, value: dict, where: str) -> Tokens | None:
    """Token ids with labels, -100 where not trained; or a text alone, trained as a whole; else None."""
    if "input_ids" in value:
        tokens, labels = np.asarray(value["input_ids"]), np.asarray(value.get("labels", value["input_ids"]))
        fits = tokens.dtype.kind == "i" and tokens.shape == labels.shape
        if not fits or tokens.min() < 0 or tokens.max() >= len(tokenizer):
            raise wrong(where, "other input_ids or labels", f"ids below {len(tokenizer)}, and as many labels")
        return Tokens(tokens.astype(np.int32), labels != -100)
    text_only = isinstance(value.get("text"), str) and first(value, CONVERSATIONS + RESPONSES) is None
    if text_only and not is_transcript(value["text"]):
        tokens = encode_prompt(tokenizer, value["text"])
        tokens += [end_token(tokenizer)] if tokens[-1:] != [end_token(tokenizer)] else []
        return Tokens(np.array(tokens, np.int32), np.ones(len(tokens), bool))
    return None


def encode_response(tokenizer: Any, prompt: Messages, response: Messages, trained: Any = None) -> Tokens:
    """Tokens of both; the mask is on the trained turns of both, by default the response's assistant turns."""
    replies = [False] * len(prompt) + [m["role"] == "assistant" for m in response]
    return encode_chat(tokenizer, prompt + response, replies if trained is None else trained)


def read_responses(tokenizer: Any, value: dict, where: str) -> list[Tokens]:
    """The responses of a record of any kind, each after its prompt: one, two of a pair, or `responses`."""
    if value.get("responses") is not None:
        prompt = read_prompt(tokenizer, value, where)
        sides = [as_turns(tokenizer, response, where, "assistant") for response in value["responses"]]
    elif first(value, ("chosen", "chosen_response", "preference_strength")) is not None:
        prompt, *sides, _ = read_pair(tokenizer, value, where)
    else:
        prompt, response = read_exchange(tokenizer, value, where)
        sides = [response]
    return [encode_response(tokenizer, prompt, side) for side in sides]


def load_sft(
    tokenizer: Any, dataset: str, eval_dataset: str, max_length: int, train_on_prompt: bool = False
) -> tuple[Dataset, Dataset]:
    """(train, eval) demonstrations: one sequence an example; train_on_prompt scores all of its tokens."""

    def encode(value: dict, where: str) -> Example:
        sequence = read_tokens(tokenizer, value, where)
        if sequence is not None:
            return Example([sequence], prompt="")
        prompt, response = read_exchange(tokenizer, value, where)
        trained = trained_turns(value, prompt + response)
        attach_labels(value, prompt + response, where)
        tokens, mask = encode_response(tokenizer, prompt, response, trained)
        return Example([(tokens, mask | train_on_prompt)], prompt)

    return load(tokenizer, "sft", encode, dataset, eval_dataset, max_length)


def load_pairs(
    tokenizer: Any, dataset: str, eval_dataset: str, max_length: int, whole: bool = False
) -> tuple[Dataset, Dataset]:
    """(train, eval) preferences: chosen, rejected, PAIR_FIELDS as fields. whole: drop what would be cut."""

    def encode(value: dict, where: str) -> Example:
        prompt, chosen, rejected, numbers = read_pair(tokenizer, value, where)
        sequences = [encode_response(tokenizer, prompt, side) for side in (chosen, rejected)]
        return Example(sequences, prompt, numbers)

    return load(tokenizer, "pairs", encode, dataset, eval_dataset, max_length, whole)


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
        return Example([encode_response(tokenizer, prompt, side) for side in sides], prompt, fields)

    return load(tokenizer, "pairs", encode, dataset, eval_dataset, max_length, whole=True)


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
        return Example([encode_response(tokenizer, prompt, response)], prompt, read_label(value, where))

    return fill_fields(load(tokenizer, "ratings", encode, dataset, eval_dataset, max_length, whole=True))


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

    return load(tokenizer, kind, encode, dataset, eval_dataset, max_prompt_length, whole=True, scored=False)


@functools.cache
def config_of(folder: str) -> Any:
    """The text config of the model in a folder or with a hub id; adapters have that of their base.

    One without fields for a GGUF file, or a tokenizer alone.
    """
    from transformers import AutoConfig

    try:
        adapter = Path(folder) / "adapter_config.json"
        if adapter.exists():
            folder = json.loads(adapter.read_text())["base_model_name_or_path"]
        return AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError, KeyError):
        return SimpleNamespace()


def load(
    tokenizer: Any,
    kind: str,
    encode: Callable[[dict, str], Example],
    dataset: str,
    eval_dataset: str,
    max_length: int,
    whole: bool = False,
    scored: bool = True,
) -> tuple[Dataset, Dataset]:
    """(train, eval): read, encode (the ranks share the work), fit, hold out where there is no test split.

    An example with a sequence of more than max_length tokens is cut at the end, and dropped if a sequence is
    left without a scored token; with `whole` it is always dropped. Both are counted and printed.

    Args:
        kind: the toy world's folder.
        scored: False for prompts, in which no token is scored.
    """
    option = "max_length" if scored else "max_prompt_length"  # what the user would change
    # a prompt needs room for one token of a reply
    most = packed.position_limit(config_of(getattr(tokenizer, "name_or_path", ""))) - (not scored)
    if max_length > most:
        if dist.is_main():
            print(f"{kind}: {option} {max_length} is more than the model takes; it is {most} now", flush=True)
        max_length = most

    def attempt(record: Record) -> Example:
        try:
            example = encode(*record)
        except dist.RunError:
            raise
        except Exception as error:  # a template may raise anything about a conversation it does not like
            raise dist.RunError(f"{record.where}: cannot be encoded: {first_line(error)}") from error
        for _, mask in example.sequences:
            mask[:1] = False  # nothing comes before a first token
        return example

    def read(source: str, split: str) -> list[Example] | None:
        records = read_records(source, split, kind)
        if records is None:
            return None
        if not records:
            raise wrong(f"dataset {source}", "nothing", "one JSON object a line, or a table with rows")
        records = regroup(records, kind)
        untied = [r for r in records if r.value.get("preference_strength") != 0 and not r.value.get("tie")]
        if dist.is_main() and len(untied) < len(records):
            print(
                f"{kind}: {source}: {len(records) - len(untied):,} pairs without a preference dropped",
                flush=True,
            )
        records, kept, num_cut = untied, [], 0
        for record, example in zip(records, dist.parallel_map(attempt, records), strict=True):
            example.record = record.value
            is_long = any(len(tokens) > max_length for tokens, _ in example.sequences)
            example.sequences = [
                (tokens[:max_length], mask[:max_length]) for tokens, mask in example.sequences
            ]
            is_scored = all(mask.any() for _, mask in example.sequences) or not scored
            if is_scored and not (whole and is_long):
                kept.append(example)
                num_cut += is_long
        num_dropped = len(records) - len(kept)
        if dist.is_main() and (num_cut or num_dropped):
            note = f"{num_cut:,} cut, {num_dropped:,} dropped{'' if whole else ' with no scored token left'}"
            print(f"{kind}: {source}: {note}, by {option} {max_length}", flush=True)
        if not kept:
            raise wrong(f"dataset {source}", "nothing to train on", f"a larger {option} than {max_length}")
        return kept

    train_parts, eval_parts = [], []
    for source, weight in read_sources(dataset):
        examples = read(source, "train")
        if not eval_dataset:
            test = read(source, "test")
            examples, test = hold_out(examples, source) if test is None else (examples, test)
            eval_parts.append((test, 1.0))
        train_parts.append((examples, weight))
    for source, _ in read_sources(eval_dataset) if eval_dataset else ():
        eval_parts.append((read(source, "test") or read(source, "train"), 1.0))
    train, evaluation = Dataset(train_parts), Dataset(eval_parts)
    if dist.is_main():
        print(f"{kind}: {len(train):,} examples to train on, {len(evaluation):,} to evaluate on", flush=True)
    return train, evaluation


def hold_out(examples: list[Example], source: str) -> tuple[list[Example], list[Example]]:
    """(kept, held out): 5 % of the examples, 1 to 512, by hash of the question a conversation opens with.

    All examples of one question land on one side, whatever their order in the file.
    """

    def key(example: Example) -> str:
        opening = [m["content"] for m in example.prompt if m["role"] == "user"][:1]
        opening = opening or example.prompt or example.sequences[0][0].tolist()
        return hashlib.sha256(json.dumps(opening).encode()).hexdigest()

    keys = [key(example) for example in examples]
    sizes, held, room = Counter(keys), set(), min(512, max(1, round(0.05 * len(examples))))
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
    kind: Literal["sft", "pairs", "prompts", "ratings"]
    """what the records are: demonstrations, preferences, prompts, or rated replies"""
    model: str = "toy"
    """the model whose tokenizer and template are used: toy, a run folder, a folder, a hub id, a .gguf file"""
    output: str = ""
    """JSON lines to write, one a sequence; without it the first few records are printed"""
    max_length: int = 2048
    """most tokens of a sequence; longer ones are cut or dropped as in training"""
    chat_template: str = ""
    """a Jinja file or "chatml" in place of the model's own chat template"""


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
    tokenizer = load_tokenizer(args.model, args.chat_template)
    loaders = {"sft": load_sft, "pairs": load_pairs, "prompts": load_prompts, "ratings": load_ratings}
    examples, _ = loaders[args.kind](tokenizer, args.file, args.file, args.max_length)  # nothing is held out
    if not args.output:
        print("\n".join(map(readable, describe(examples[:3], tokenizer))))
        return
    try:
        files.write(Path(args.output).expanduser(), files.as_lines(describe(examples, tokenizer)))
    except OSError as error:
        raise dist.RunError(f"output {args.output}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    dist.run(main, tyro.cli(Args, use_underscores=True))
