"""Data: files and hub data sets -> conversations -> token sequences with masks -> packed rows.

Every format of docs/data.md becomes turns of a conversation; a chat template makes tokens of them; `rows`
deals a batch out to the ranks and packs each share. A mask is True on the tokens that are scored.
"""

import bisect
import codecs
import functools
import gzip
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import dist

Messages = list[dict[str, str]]
Sequence = tuple[np.ndarray, np.ndarray]  # tokens (n,) int32 and mask (n,) bool


@dataclass
class Example:
    """One item of a batch: the sequences scored together, for a pair chosen and rejected."""

    sequences: list[Sequence]
    prompt: Messages | str
    """what a generation for this example starts from; a string is plain text"""
    fields: dict[str, float] = field(default_factory=dict)
    """numbers that travel with the example into Row.fields"""
    record: dict = field(default_factory=dict)
    """the record as it was read, for judges and reward functions"""
    label: str = ""
    """the line of attributes asked for, which a generation for this example starts after"""

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for tokens, _ in self.sequences)

    @property
    def num_targets(self) -> int:
        return sum(int(mask.sum()) for _, mask in self.sequences)


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


# ------------------------------------------------------------------------------------------------ packed rows


@dataclass
class Row:
    """Sequences end to end: what one forward sees. A row without examples only keeps collectives matched."""

    tokens: Tensor  # (N,)
    position_ids: Tensor  # (N,) restart at 0 with each sequence
    segment_ids: Tensor  # (N,) which of the num_segments sequences
    cu_seqlens: Tensor  # (S + 1,) int32
    max_seqlen: int
    targets: Tensor  # (N_targets,) positions of scored tokens; never the first of a sequence
    num_segments: int  # B x sequences per example
    example_ids: Tensor  # (B,) indices into the list given to `rows`
    fields: dict[str, Tensor]  # (B,) float32 each

    @property
    def target_segments(self) -> Tensor:
        """(N_targets,) the sequence each scored token belongs to."""
        return self.segment_ids[self.targets]


def rows(examples: list[Example], micro_batch_tokens: int, device: torch.device) -> Iterator[Row]:
    """This rank's share of the examples as rows of at most micro_batch_tokens; equally many on every rank.

    Examples go to ranks by tokens, longest first. One longer than micro_batch_tokens gets a row of its own; a
    rank with fewer rows ends with dummy rows.
    """
    lengths = [example.num_tokens for example in examples]
    limit = row_limit(micro_batch_tokens, device)
    plans = [pack(share, lengths, limit) for share in dist.shares(lengths, dist.world_size())]
    mine = plans[dist.rank()]
    for i in range(max(map(len, plans))):
        yield make_row(examples, mine[i] if i < len(mine) else [], device)


def row_limit(micro_batch_tokens: int, device: torch.device) -> int:
    """Most tokens of a row."""
    return micro_batch_tokens or (8192 if device.type == "cuda" else 2048)


def pack(indices: Iterable[int], lengths: list[int], limit: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest bin it fits."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        slot = bisect.bisect_left(free, (lengths[index], -1))
        if slot == len(free):
            bins.append([])
            left, target = limit, len(bins) - 1
        else:
            left, target = free.pop(slot)
        bins[target].append(index)
        bisect.insort(free, (left - lengths[index], target))
    return bins


def make_row(examples: list[Example], chosen: list[int], device: torch.device) -> Row:
    """Pack examples[i] for i in chosen into a row; nothing chosen makes a dummy row of one token."""

    def put(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    sequences = [sequence for i in chosen for sequence in examples[i].sequences]
    tokens, masks = zip(*sequences or [(np.zeros(1, np.int32), np.zeros(1, bool))], strict=True)
    lengths = np.array([len(t) for t in tokens])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    segment_ids = np.repeat(np.arange(len(lengths)), lengths)
    names = examples[0].fields if examples else {}
    return Row(
        tokens=put(np.concatenate(tokens).astype(np.int64)),
        position_ids=put(np.arange(starts[-1]) - starts[segment_ids]),
        segment_ids=put(segment_ids),
        cu_seqlens=put(starts.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        targets=put(np.flatnonzero(np.concatenate(masks))),
        num_segments=len(sequences),
        example_ids=put(np.array(chosen, np.int64)),
        fields={k: put(np.array([examples[i].fields[k] for i in chosen], np.float32)) for k in names},
    )


# ------------------------------------------------------------------------------------- tokenizer and template

CHATML = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
BREAK = "\ufdd0"  # Unicode keeps this out of texts: where `tokenize` cuts


def model_folder(model: str) -> tuple[str, str | None]:
    """(folder or hub id, GGUF file name or None) for `model`: toy, run folder, folder, hub id, .gguf file."""
    if model in ("toy", "toy/attribute_model"):
        return str(toy_folder() / (model.partition("/")[2] or "model")), None
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise dist.RunError(f"model {model}: no such file")
        return str(path.parent), path.name
    if (path / "args.json").exists() and not (path / "model").exists():
        raise dist.RunError(f"model {model}: a run folder without model/; that run has not finished")
    if (path / "model").is_dir():
        path = path / "model"
    if not path.exists():
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise dist.RunError(f"model {model}: no such folder")
        return model, None
    if not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
        raise dist.RunError(f"model {model}: no config.json in this folder; expected a Hugging Face model")
    if not any(f.suffix in (".safetensors", ".bin") for f in path.iterdir()):
        raise dist.RunError(f"model {model}: no weights (*.safetensors or *.bin) in this folder")
    return str(path), None


def toy_folder(world: str = "language") -> Path:
    """The files of a toy world, language or images, built on first use."""
    try:
        return importlib.import_module(f"toy.{world}").ensure()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise dist.RunError(f"cannot build the toy world: {error}") from error


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


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
        end = next((token for token in tokenize(tokenizer, tail) if token in special), end)
    if end is None:
        raise dist.RunError("the tokenizer has no end token: set eos_token in its tokenizer_config.json")
    return end


def encode_chat(tokenizer: Any, messages: Messages, trained: list[bool]) -> Sequence:
    """Tokens of a conversation and the mask of its trained turns, each up to and including its end token.

    The span of a turn is what rendering it adds to the conversation before it (and to a reply's header), so
    no markers in the template are needed; a template that rewrites earlier turns is refused.
    """
    spans = [i for i, t in enumerate(trained) if t]
    if not spans:
        return np.zeros(0, np.int32), np.zeros(0, bool)
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
        mask[start:stop] = True
    tokens, mask = tokens[:stop], mask[:stop]  # what follows the last end token is never scored
    if is_reply and tokens[-1:] != (end,):  # a rendering without end tokens
        tokens, mask = (*tokens, end), np.append(mask, True)
    return np.array(tokens, np.int32), mask


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


def common_prefix(a: Any, b: Any) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------------------------------------- reading files


class Record(NamedTuple):
    """One line of a data set and where it stands, for error messages."""

    value: dict
    where: str


def wrong(where: str, found: Any, expected: str) -> dist.RunError:
    found = f"the fields {', '.join(found)}" if isinstance(found, dict) else str(found)[:80]
    return dist.RunError(f"{where}: found {found}; expected {expected}")


def read_sources(names: str, what: str = "dataset") -> list[tuple[str, float]]:
    """(source, weight) of each part of a,b*2; a * in the name of an existing file is part of the name."""
    sources = []
    for name in map(str.strip, names.split(",")):
        source, star, weight = name.rpartition("*")
        if not star or Path(name).expanduser().exists():
            source, weight = name, "1"
        if not source or not re.fullmatch(r"\d*\.?\d+", weight) or float(weight) == 0:
            raise wrong(what, names, "names joined by commas, each with an optional *weight above 0")
        sources.append((source, float(weight)))
    return sources


def read_records(source: str, split: str, kind: str) -> list[Record] | None:
    """The records of one data set's split ("train" or "test"); None if it has no such split."""
    names = ("train",) if split == "train" else ("test", "validation", "val", "eval")
    path = toy_folder() / kind if source == "toy" else Path(source).expanduser()
    if path.is_dir():
        for name in names:
            if files := sorted(f for f in path.iterdir() if re.match(rf"{name}[.-]", f.name)):
                return [record for f in files for record in read_file(f)]
        if split == "train":
            raise wrong(f"dataset {source}", "no train.* file", "train.jsonl, .json or .parquet in it")
        return None
    if path.is_file():
        return read_file(path) if split == "train" else None
    if path.suffix in (".jsonl", ".json", ".parquet", ".gz") or not re.match(r"[\w.-]+/[\w.-]+(:|$)", source):
        raise wrong(f"dataset {source}", "no such file", "a file, a folder, or hub/name[:config[:split]]")
    return read_hub(source, names)


def read_hub(source: str, names: tuple[str, ...]) -> list[Record] | None:
    """The rows of the split that source names, else of the first of `names` that the data set has."""
    import datasets

    name, config, chosen = (*source.split(":", 2), "", "")[:3]
    if chosen and "train" not in names:
        return None
    try:
        table = datasets.load_dataset(name, config or None, split=chosen or None)
    except Exception as error:  # the hub client raises many kinds
        raise dist.RunError(f"dataset {source}: cannot be loaded: {first_line(error)}") from error
    if not chosen:
        split = next((n for n in names if n in table), None)
        if split is None and "train" in names:
            hint = f"the name of one, {name}:{config}:{[*table][0]}"
            raise wrong(f"dataset {source}", f"the splits {', '.join(table)}", hint)
        if split is None:
            return None
        table = table[split]
    return [Record(value, f"{source} row {i}") for i, value in enumerate(table)]


def read_file(path: Path) -> list[Record]:
    """Records of a .jsonl, .json or .parquet file, the first two also gzipped."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in (".jsonl", ".json", ".parquet"):
        raise wrong(f"dataset {path}", f"a {suffix or 'nameless'} file", ".jsonl, .json or .parquet")
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path).to_pylist()
        else:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                text = file.read().removeprefix(codecs.BOM_UTF8)
    except Exception as error:  # torn archives raise many kinds
        raise dist.RunError(f"dataset {path}: cannot be read: {first_line(error)}") from error
    if suffix == ".parquet":
        records = [Record(value, f"{path} row {i}") for i, value in enumerate(table)]
    elif re.match(
        rb"\s*\[\s*\{" if suffix == ".jsonl" else rb"\s*\[", text
    ):  # one list, as red-team data of HH
        records = [Record(value, f"{path} item {i}") for i, value in enumerate(parse(text, str(path)))]
    else:  # cut at line feeds only: JSON strings may hold other line separators
        lines = [(line, f"{path}:{n}") for n, line in enumerate(text.split(b"\n"), 1) if line.strip()]
        records = [Record(parse(line, where), where) for line, where in lines]
    for value, where in records:
        if not isinstance(value, dict):
            raise wrong(where, type(value).__name__, "a JSON object")
    return records


def parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode())
    except ValueError as error:
        raise wrong(where, f"no valid JSON ({first_line(error)})", "one object a line") from error


# --------------------------------------------------------------------------------------------- record formats

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user"}
ROLES |= {"assistant": "assistant", "gpt": "assistant", "model": "assistant", "tool": "tool"}
CONVERSATIONS = ("messages", "conversations")
PROMPTS = ("prompt", "instruction", "question", "input", "text")
RESPONSES = ("completion", "response", "output", "answer")
PAIR_FIELDS = {"chosen_reward": 1.0, "rejected_reward": 0.0, "margin": 0.0, "label_prob": 1.0}
ATTRIBUTES = ("quality", "toxicity", "humor", "creativity")  # in the order of NeMo-Aligner's lists
ATTRIBUTES += ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def first(value: dict, names: Iterable[str]) -> Any:
    """The first of these fields that is there and not null."""
    return next((value[name] for name in names if value.get(name) is not None), None)


def number(value: Any, where: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise wrong(where, f"{name} {value!r}", "a number")
    return float(value)


def as_messages(value: Any, where: str, role: str = "user") -> Messages:
    """Messages of whatever stands for turns: a list of them, a single one, a transcript, or a text by `role`.

    White space at the ends of a text only separates it from its neighbours, so a turn made of one loses it.
    """
    if is_transcript(value):
        return split_transcript(value, where, role)
    if isinstance(value, str):
        return [{"role": role, "content": value.strip()}]
    turns = value if isinstance(value, list) else [value]
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise wrong(where, repr(value), "a string or a list of role/content messages")
    messages = []
    for turn in turns:
        speaker, text = first(turn, ("role", "from")), first(turn, ("content", "value"))
        if str(speaker).lower() not in ROLES or not isinstance(text, str):
            raise wrong(where, f"the message {turn}", f"a content string, and a role of {', '.join(ROLES)}")
        messages.append({"role": ROLES[speaker.lower()], "content": text})
    return messages


def is_transcript(value: Any) -> bool:
    """Whether a string holds marked turns: those of Anthropic HH or of NeMo-Aligner."""
    return isinstance(value, str) and (value.startswith("\n\nHuman:") or "<extra_id_1>" in value)


def split_transcript(text: str, where: str, role: str) -> Messages:
    """The turns of a transcript; text before the first mark is by `role`, adjoining turns are joined."""
    if text.startswith("\n\nHuman:"):
        parts = re.split(r"\n\n(Human|Assistant):", text)
    else:
        text = re.sub(r"<extra_id_2>.*\n?", "", text)  # a line of attributes
        text = text if text.startswith("<extra_id_") else f"<extra_id_1>{role}\n{text}"
        parts = re.split(r"\n?<extra_id_[01]>(\w*)\n?", text)
    turns = [{"role": s, "content": c.strip()} for s, c in zip(parts[1::2], parts[2::2], strict=True)]
    turns = [turn for turn in turns if turn["role"]]  # a mark at the end opens a turn of nobody
    messages: Messages = []
    for turn in as_messages(turns, where):
        if messages and messages[-1]["role"] == turn["role"]:
            messages[-1]["content"] += "\n\n" + turn["content"]
        elif turn["content"] or turn["role"] != "system":
            messages.append(turn)
    return messages


def as_turns(tokenizer: Any, value: Any, where: str, role: str = "user", system: str = "") -> Messages:
    """as_messages for this tokenizer; without a chat template only plain text, and that as it stands."""
    messages = as_messages(value, where, role)
    if system:
        messages = as_messages({"role": "system", "content": system}, where) + messages
    if tokenizer.chat_template is not None:
        return messages
    if isinstance(value, str) and not is_transcript(value) and not system:
        return [{"role": role, "content": value}]
    raise wrong(where, "chat messages", "a chat template in the tokenizer; set --chat_template")


def conversation(tokenizer: Any, value: dict, where: str) -> Messages | None:
    """The turns of a record that holds a whole conversation, else None."""
    turns = first(value, CONVERSATIONS)
    if turns is None and is_transcript(value.get("text")):
        turns = value["text"]
    return None if turns is None else as_turns(tokenizer, turns, where, system=value.get("system") or "")


def read_prompt(tokenizer: Any, value: dict, where: str) -> Messages:
    """What the model is asked, without a conversation's last reply or the turn a transcript opens for it."""
    prompt, material = first(value, PROMPTS + CONVERSATIONS), first(value, ("input", "context"))
    if prompt is None and is_transcript(value.get("transcript")):  # a red-team attempt: its first turn
        return as_turns(tokenizer, value["transcript"], where)[:1]
    if prompt is None and first(value, ("chosen", "chosen_response")) is not None:
        return read_pair(tokenizer, value, where)[0]
    if prompt is None:
        raise wrong(where, value, f"one of {', '.join(PROMPTS + CONVERSATIONS)}")
    if material and prompt == value.get("instruction"):
        prompt = f"{prompt}\n\n{material}"
    turns = as_turns(tokenizer, prompt, where, system=value.get("system") or "")
    if turns[-1]["role"] == "assistant" and (first(value, PROMPTS) is None or not turns[-1]["content"]):
        turns = turns[:-1]
    if not turns or turns[-1]["role"] == "assistant":
        raise wrong(where, repr(prompt), "a prompt that ends with a turn of the user")
    return turns


def read_exchange(tokenizer: Any, value: dict, where: str) -> tuple[Messages, Messages]:
    """A prompt and the turns from the response to it on."""
    turns = conversation(tokenizer, value, where)
    if turns is not None:
        last = max((i for i, m in enumerate(turns) if m["role"] == "assistant"), default=len(turns))
        return turns[:last], turns[last:]
    if first(value, RESPONSES) is None and first(value, ("chosen", "chosen_response")) is not None:
        return read_pair(tokenizer, value, where)[:2]
    if first(value, PROMPTS) is None or first(value, RESPONSES) is None:
        raise wrong(where, value, "messages, conversations, prompt + completion, input + output, or text")
    prompt = read_prompt(tokenizer, value, where)
    response = as_turns(tokenizer, first(value, RESPONSES), where, "assistant")
    if tokenizer.chat_template is None and value.get("completion") is None:
        text = response[0]["content"]  # only a completion continues plain text as it stands
        if prompt[-1]["content"][-1:].strip() and text[:1].strip():
            response = [{"role": "assistant", "content": " " + text}]
    return prompt, response


def trained_turns(value: dict, turns: Messages) -> list[bool] | None:
    """Turns of `train_roles`, or of whom NeMo-Aligner's `mask` does not name, or of the assistant.

    None for a prompt and its response, of which only the latter is trained.
    """
    given, chosen, masked = first(value, CONVERSATIONS), value.get("train_roles"), value.get("mask")
    if given is None and first(value, (*RESPONSES, "chosen", "chosen_response")) is not None:
        return None
    names = chosen or masked or ["assistant"]
    if isinstance(names, str):
        names = re.split(r"\s*,\s*", names.strip())  # whole names: User is not in Users
    speakers = [first(turn, ("role", "from")) for turn in given] if isinstance(given, list) else []
    speakers = [""] * (len(turns) - len(speakers)) + speakers
    named = [s in names or m["role"] in names for s, m in zip(speakers, turns, strict=True)]
    if masked and not chosen:
        return [not n and m["role"] != "system" for n, m in zip(named, turns, strict=True)]
    return named


def read_tokens(tokenizer: Any, value: dict, where: str) -> Sequence | None:
    """Token ids with labels, -100 where not trained; or a text alone, trained as a whole; else None."""
    if "input_ids" in value:
        tokens, labels = np.asarray(value["input_ids"]), np.asarray(value.get("labels", value["input_ids"]))
        fits = tokens.dtype.kind == "i" and tokens.shape == labels.shape
        if not fits or tokens.min() < 0 or tokens.max() >= len(tokenizer):
            raise wrong(where, "other input_ids or labels", f"ids below {len(tokenizer)}, and as many labels")
        return tokens.astype(np.int32), labels != -100
    text_only = isinstance(value.get("text"), str) and first(value, CONVERSATIONS + RESPONSES) is None
    if text_only and not is_transcript(value["text"]):
        tokens = encode_prompt(tokenizer, value["text"])
        tokens += [end_token(tokenizer)] if tokens[-1:] != [end_token(tokenizer)] else []
        return np.array(tokens, np.int32), np.ones(len(tokens), bool)
    return None


def read_pair(tokenizer: Any, value: dict, where: str) -> tuple[Messages, Messages, Messages, dict]:
    """(prompt, chosen, rejected, numbers) of a preference; what two conversations share is the prompt."""
    if value.get("preference_strength") is not None:  # HelpSteer2: negative if the first is better
        strength = number(value["preference_strength"], where, "preference_strength")
        sides = [value.get(f"response_{n}") for n in ((1, 2) if strength < 0 else (2, 1))]
        value = {**value, "chosen": sides[0], "rejected": sides[1], "margin": abs(strength)}
    sides = [first(value, (name, name + "_response")) for name in ("chosen", "rejected")]
    if None in sides:
        raise wrong(where, value, "chosen and rejected")
    given = {name: value[name] for name in PAIR_FIELDS if value.get(name) is not None}
    numbers = {name: number(x, where, name) for name, x in (PAIR_FIELDS | given).items()}
    if not 0 <= numbers["label_prob"] <= 1:
        raise wrong(where, f"label_prob {numbers['label_prob']}", "a probability")
    prompt = [] if first(value, PROMPTS) is None else read_prompt(tokenizer, value, where)
    chosen, rejected = (as_turns(tokenizer, side, where, "assistant") for side in sides)
    # a side that does not open with the assistant is a whole conversation, even if the prompt is given too
    chosen, rejected = (s if s[0]["role"] != "assistant" else prompt + s for s in (chosen, rejected))
    shared = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if not shared or not chosen[-1]["role"] == rejected[-1]["role"] == "assistant":
        raise wrong(where, value, "a prompt for both, and both to end with an assistant turn")
    return chosen[:shared], chosen[shared:], rejected[shared:], numbers


def read_label(value: dict, where: str) -> dict[str, float]:
    """The attributes of a reply: a label (a dict, NeMo-Aligner's list or line), or columns by their names."""
    turns = first(value, CONVERSATIONS)
    label = first(value, ("label", "attributes"))
    if label is None and isinstance(turns, list):
        label = first(turns[-1], ("label", "attributes"))
    if label is None:
        label = {name: value[name] for name in ATTRIBUTES if name in value}
    if isinstance(label, str):
        try:
            items = [item.split(":") for item in label.split(",")]
            label = {name.strip(): float(score) for name, score in items}
        except ValueError as error:
            raise wrong(where, f"the label {label!r}", "name:value joined by commas") from error
    if isinstance(label, list) and len(label) == len(ATTRIBUTES):
        label = dict(zip(ATTRIBUTES, label, strict=True))
    if not isinstance(label, dict) or not label:
        raise wrong(where, label or value, f"a label, or columns, of {', '.join(ATTRIBUTES)}")
    return {name: number(score, where, name) for name, score in label.items() if score not in (None, -100)}


def label_line(attributes: dict[str, float]) -> str:
    """The line before a conditioned reply: name:value of each attribute that is known, joined by commas."""
    return (
        ",".join(f"{name}:{value:.0f}" for name, value in attributes.items() if not math.isnan(value)) + "\n"
    )


def read_line(label: str | dict | None, where: str, names: Iterable[str] = ()) -> str:
    """A label line from NeMo-Aligner's string or a dict; "" without a label.

    Raises:
        RunError: a value outside 0 to 4, or an attribute that is none of `names`, where these are given.
    """
    if not label:
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


def attach_labels(value: dict, turns: Messages, where: str) -> None:
    """Put the label line of each reply with it, in a record that NeMo-Aligner calls VALUE_TO_TEXT."""
    given = first(value, CONVERSATIONS)
    if value.get("type") != "VALUE_TO_TEXT" or not isinstance(given, list):
        return
    for turn, source in zip(turns[len(turns) - len(given) :], given, strict=True):
        line = read_line(first(source, ("label", "attributes")), where)
        if line and turn["role"] == "assistant":
            turn["label"] = line


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
                strength = next((x for x in one.value["label"] if x not in (None, -100)), 0)
                texts, numbers = texts[:: 1 if strength <= 0 else -1], {"margin": abs(strength)}
                numbers = numbers if strength else {"tie": True}
            grouped.append(Record({"chosen": texts[0], "rejected": texts[1], **numbers}, one.where))
        return grouped
    for value, where in records:
        for instance in value.get("instances") or [{}]:
            if not isinstance(instance, dict):
                raise wrong(where, f"the instance {instance!r}", "a JSON object")
            grouped.append(Record({**value, **instance}, where))
    return grouped


# -------------------------------------------------------------------------------------------------- data sets


def encode_response(tokenizer: Any, prompt: Messages, response: Messages, trained: Any = None) -> Sequence:
    """Tokens of both; the mask is on the trained turns of both, by default the response's assistant turns."""
    replies = [False] * len(prompt) + [m["role"] == "assistant" for m in response]
    return encode_chat(tokenizer, prompt + response, replies if trained is None else trained)


def read_responses(tokenizer: Any, value: dict, where: str) -> list[Sequence]:
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

    return load("sft", encode, dataset, eval_dataset, max_length)


def load_pairs(
    tokenizer: Any, dataset: str, eval_dataset: str, max_length: int, whole: bool = False
) -> tuple[Dataset, Dataset]:
    """(train, eval) preferences: chosen, rejected, PAIR_FIELDS as fields. whole: drop what would be cut."""

    def encode(value: dict, where: str) -> Example:
        prompt, chosen, rejected, numbers = read_pair(tokenizer, value, where)
        sequences = [encode_response(tokenizer, prompt, side) for side in (chosen, rejected)]
        return Example(sequences, prompt, numbers)

    return load("pairs", encode, dataset, eval_dataset, max_length, whole)


def load_ranked(tokenizer: Any, dataset: str, eval_dataset: str, max_length: int) -> tuple[Dataset, Dataset]:
    """(train, eval) ranked responses, never cut: a sequence each; fields rank_0, rank_1, ..., then NaN.

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
        fields = {f"rank_{k}": rank for k, rank in enumerate(ranks)}
        return Example([encode_response(tokenizer, prompt, side) for side in sides], prompt, fields)

    return fill_fields(load("pairs", encode, dataset, eval_dataset, max_length, whole=True))


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

    return fill_fields(load("ratings", encode, dataset, eval_dataset, max_length, whole=True))


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

    return load(kind, encode, dataset, eval_dataset, max_prompt_length, whole=True, scored=False)


def load(
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
