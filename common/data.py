"""Data: files and hub data sets -> conversations -> token sequences with masks -> packed rows.

Every format listed in docs/data.md becomes one of a few dicts of messages; a chat template turns those into tokens;
`rows` deals a batch out to the ranks and packs each share. A mask is True on the tokens that are scored.
"""

import bisect
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import dist

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Messages = list[dict[str, str]]
Sequence = tuple[np.ndarray, np.ndarray]  # tokens (n,) int32 and mask (n,) bool


@dataclass
class Example:
    """One item of a batch: the sequences scored together (one for SFT, chosen and rejected for a pair)."""

    sequences: list[Sequence]
    prompt: Messages | str
    """what a generation for this example starts from"""
    fields: dict[str, float] = field(default_factory=dict)
    """numbers that travel with the example into Row.fields"""
    record: dict = field(default_factory=dict)
    """the record as it was read, for judges and reward functions"""

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


def num_steps(dataset: Dataset, args: Any) -> int:
    """Optimizer steps of a run: max_steps if set, else enough to see num_epochs; the last batch may be smaller."""
    return (
        args.max_steps if args.max_steps >= 0 else -(-args.num_epochs * dataset.epoch_size // args.batch_size)
    )


def batch(dataset: Dataset, step: int, args: Any) -> list[Example]:
    """The examples of optimizer step `step`, counted from 1: a function of (seed, step), alike on every rank."""
    size = dataset.epoch_size
    end = step * args.batch_size
    if args.max_steps < 0:
        end = min(end, args.num_epochs * size)
    positions = range((step - 1) * args.batch_size, end)
    return [dataset[dataset.order(args.seed, p // size)[p % size]] for p in positions]


# --------------------------------------------------------------------------------------------------- packed rows


@dataclass
class Row:
    """Sequences end to end: what one forward pass sees. A row without examples only keeps collectives matched."""

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
    """This rank's share of the examples as packed rows of at most micro_batch_tokens; equally many on every rank.

    Examples go to ranks by tokens, longest first. One longer than micro_batch_tokens gets a row of its own; a
    rank with fewer rows ends with dummy rows.
    """
    lengths = [example.num_tokens for example in examples]
    limit = micro_batch_tokens or (8192 if device.type == "cuda" else 2048)
    plans = [pack(share, lengths, limit) for share in dist.shares(lengths, dist.world_size())]
    mine = plans[dist.rank()]
    for i in range(max(map(len, plans))):
        yield make_row(examples, mine[i] if i < len(mine) else [], device)


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
    sequences = [s for i in chosen for s in examples[i].sequences] or [
        (np.zeros(1, np.int32), np.zeros(1, bool))
    ]
    lengths = np.array([len(tokens) for tokens, _ in sequences])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    masks = np.concatenate([mask for _, mask in sequences])
    segment_ids = np.repeat(np.arange(len(lengths)), lengths)
    names = examples[0].fields if examples else {}
    arrays = {
        "tokens": np.concatenate([tokens for tokens, _ in sequences]).astype(np.int64),
        "position_ids": np.arange(starts[-1]) - starts[segment_ids],
        "segment_ids": segment_ids,
        "cu_seqlens": starts.astype(np.int32),
        "targets": np.flatnonzero(masks),
        "example_ids": np.array(chosen, dtype=np.int64),
        **{
            f"fields.{name}": np.array([examples[i].fields[name] for i in chosen], np.float32)
            for name in names
        },
    }
    tensors = {name: _to(torch.from_numpy(array), device) for name, array in arrays.items()}
    fields = {name: tensors.pop(f"fields.{name}") for name in names}
    return Row(
        **tensors, max_seqlen=int(lengths.max()), num_segments=len(lengths) if chosen else 0, fields=fields
    )


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


# ----------------------------------------------------------------------------------------- tokenizer and template


def model_folder(model: str) -> tuple[str, str | None]:
    """(folder or hub id, GGUF file name or None) for the `model` field: toy, run folder, folder, hub id, .gguf."""
    if model == "toy":
        return str(toy_folder() / "model"), None
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


def toy_folder() -> Path:
    """The toy world's files, built on first use."""
    from toy import language

    try:
        return language.ensure()
    except OSError as error:
        raise dist.RunError(f"cannot build the toy world: {error}") from error


def load_tokenizer(model: str, chat_template: str = "") -> Any:
    """The model's tokenizer; chat_template (a Jinja file, or "chatml") replaces the one it comes with."""
    from transformers import AutoTokenizer

    folder, gguf = model_folder(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
    except (OSError, ValueError, KeyError) as error:
        raise dist.RunError(f"cannot load the tokenizer of {model}: {str(error).splitlines()[0]}") from error
    if chat_template == "chatml":
        tokenizer.chat_template = CHATML
    elif chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text()
        except OSError as error:
            raise dist.RunError(
                f"chat_template {chat_template}: {error.strerror}; give a Jinja file or chatml"
            ) from error
    return tokenizer


def render(tokenizer: Any, messages: Messages, for_reply: bool) -> list[int]:
    """Tokens of a conversation under the chat template; for_reply adds the header of the assistant's next turn."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_reply)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes its own BOS


def end_token(tokenizer: Any) -> int:
    """The token that ends an assistant turn: trained once per turn, and where generation stops."""
    if getattr(tokenizer, "end_token_", None) is None:
        tokenizer.end_token_ = tokenizer.eos_token_id
        if tokenizer.chat_template:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
            tail = render(tokenizer, probe, False)[len(render(tokenizer, probe[:1], True)) :]
            special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
            ends = [token for token in tail if token in special]
            tokenizer.end_token_ = ends[0] if ends else tokenizer.eos_token_id
        if tokenizer.end_token_ is None:
            raise dist.RunError("the tokenizer has no end token: set eos_token in its tokenizer_config.json")
    return tokenizer.end_token_


def encode_chat(tokenizer: Any, messages: Messages, trained: list[bool]) -> Sequence:
    """Tokens of a conversation and the mask of its trained turns, each up to and including its end token.

    The span of a turn is what rendering it adds to the tokens of the conversation before it, so no markers in
    the template are needed; a template that rewrites earlier turns is refused.
    """
    last = max((i for i, t in enumerate(trained) if t), default=-1)
    tokens = render(tokenizer, messages[: last + 1], False) if last >= 0 else []
    mask = np.zeros(len(tokens), bool)
    end = end_token(tokenizer)
    stop = 0
    for i in range(last + 1):
        if not trained[i]:
            continue
        is_reply = messages[i]["role"] == "assistant"
        before = render(tokenizer, messages[:i], is_reply) if i else []
        turn = tokens if i == last else render(tokenizer, messages[: i + 1], False)
        start = common_prefix(before, turn)
        if tokens[: len(turn)] != turn or start < len(before) - 1:  # a merge may take the header's last token
            raise ValueError(
                "the chat template changes earlier turns when later ones follow; use another chat_template"
            )
        stop = len(turn)
        if is_reply and end in turn[start:]:
            stop = start + turn[start:].index(end) + 1
        mask[start:stop] = True
    if last >= 0 and messages[last]["role"] == "assistant" and tokens[stop - 1] != end:
        return np.array([*tokens[:stop], end], np.int32), np.append(mask[:stop], True)
    return np.array(tokens[:stop], np.int32), mask[:stop]  # what follows the last end token is never scored


def encode_text(tokenizer: Any, prompt: str, response: str) -> Sequence:
    """Tokens of prompt and response without a template, the end token appended; only the response is trained."""
    head = encode_prompt(tokenizer, prompt)
    body = tokenizer(response, add_special_tokens=False)["input_ids"] + [end_token(tokenizer)]
    return np.array(head + body, np.int32), np.array([False] * len(head) + [True] * len(body))


def encode_prompt(tokenizer: Any, prompt: Messages | str) -> list[int]:
    """Tokens a generation starts from."""
    if not isinstance(prompt, str):
        return render(tokenizer, prompt, True)
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return [bos, *tokens] if adds_bos and tokens[:1] != [bos] else tokens


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix of two token lists."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ------------------------------------------------------------------------------------------------- reading files


@dataclass
class Record:
    """One line of a data set and where it stands, for error messages."""

    value: dict
    where: str


def read_records(source: str, split: str, kind: str) -> list[Record] | None:
    """The records of one data set's split ("train" or "test"); None if it has no such split."""
    if source == "toy":
        source = str(toy_folder() / kind)
    path = Path(source).expanduser()
    if path.is_dir():
        names = {"train": ("train",), "test": ("test", "validation", "val", "eval")}[split]
        files = sorted(f for f in path.iterdir() if f.name.split(".")[0].split("-")[0] in names)
        if not files and split == "train":
            raise dist.RunError(f"dataset {source}: no train.* file (.jsonl, .json, .parquet) in this folder")
        return [record for f in files for record in read_file(f)] if files else None
    if path.is_file():
        return read_file(path) if split == "train" else None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]*)?(:[\w.\[\]%:-]*)?", source):
        raise dist.RunError(f"dataset {source}: no such file, and not of the form hub/name[:config[:split]]")
    return read_hub(source, split)


def read_hub(source: str, split: str) -> list[Record] | None:
    import datasets

    name, config, chosen = (*source.split(":", 2), "", "")[:3]
    if chosen and split == "test":
        return None
    try:
        splits = datasets.get_dataset_split_names(name, config or None)
        if split == "test":
            chosen = next((s for s in ("test", "validation") if s in splits), "")
            if not chosen:
                return None
        table = datasets.load_dataset(name, config or None, split=chosen or "train")
    except Exception as error:  # the hub client raises many kinds
        raise dist.RunError(
            f"dataset {source}: cannot be loaded from the hub: {str(error).splitlines()[0]}"
        ) from error
    return [Record(value, f"{source} row {i}") for i, value in enumerate(table)]


def read_file(path: Path) -> list[Record]:
    """Records of a .jsonl, .json or .parquet file, the first two also gzipped."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".parquet":
        import pyarrow.parquet

        return [
            Record(v, f"{path} row {i}") for i, v in enumerate(pyarrow.parquet.read_table(path).to_pylist())
        ]
    if suffix not in (".jsonl", ".json"):
        raise dist.RunError(
            f"dataset {path}: unknown file type {suffix!r}; expected .jsonl, .json, .parquet or .gz of them"
        )
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise dist.RunError(f"dataset {path}: {error}") from error
    if suffix == ".json" and text.lstrip().startswith("["):
        lines = [(f"{path} item {i}", item) for i, item in enumerate(_parse(text, str(path)))]
    else:
        numbered = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        lines = [(f"{path}:{n}", _parse(line, f"{path}:{n}")) for n, line in numbered]
    if not lines:
        raise dist.RunError(f"dataset {path}: the file is empty; expected one JSON object a line")
    for where, value in lines:
        if not isinstance(value, dict):
            raise dist.RunError(f"{where}: found {type(value).__name__}, expected a JSON object")
    return [Record(value, where) for where, value in lines]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise dist.RunError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error


def split_records(
    args: Any, kind: str
) -> tuple[list[tuple[list[Record], float]], list[tuple[list[Record], float]]]:
    """The parts (records, weight) to train on and to evaluate on: a test split, else a share held out by prompt."""
    train_parts, eval_parts = [], []
    for spec in args.dataset.split(","):
        source, _, weight = spec.strip().partition("*")
        try:
            times = float(weight or 1)
        except ValueError:
            raise dist.RunError(f"dataset {spec}: the weight {weight!r} after * is not a number") from None
        train, test = read_records(source, "train", kind), None
        if not args.eval_dataset:
            test = read_records(source, "test", kind)
            if test is None:
                train, test = hold_out(train)
            eval_parts.append((test, 1.0))
        train_parts.append((train, times))
    for spec in args.eval_dataset.split(",") if args.eval_dataset else ():
        source = spec.strip().partition("*")[0]
        found = read_records(source, "test", kind) or read_records(source, "train", kind)
        eval_parts.append((found, 1.0))
    return train_parts, eval_parts


def hold_out(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Split off 5 % (1 to 512 records) by hash of the prompt, so that one prompt never lands on both sides."""

    def key(record: Record) -> str:
        value = record.value
        first = value.get("prompt") or value.get("messages") or value.get("input") or value.get("instruction")
        first = first or value.get("conversations") or value.get("chosen") or value
        text = first[:1] if isinstance(first, list) else first
        return hashlib.sha256(json.dumps(text, sort_keys=True, default=str).encode()).hexdigest()

    keys = [key(record) for record in records]
    sizes = Counter(keys)
    if len(sizes) == 1:
        raise dist.RunError(
            "the data set holds a single prompt, so nothing can be held out; set eval_dataset"
        )
    share, held = min(512, max(1, round(0.05 * len(records)))), set()
    for k in sorted(sizes):
        if sum(sizes[h] for h in held) >= share:
            break
        held.add(k)
    pairs = list(zip(records, keys, strict=True))
    return [r for r, k in pairs if k not in held], [r for r, k in pairs if k in held]


# ------------------------------------------------------------------------------------------------- record formats


def as_messages(value: Any, where: str, role: str = "user") -> Messages:
    """Messages of whatever stands for a conversation: a list of turns, one turn, a transcript or a string."""
    if isinstance(value, str):
        if "\n\nHuman:" in value:  # Anthropic HH
            turns = re.split(r"\n\n(Human|Assistant):", value)[1:]
            pairs = zip(turns[::2], turns[1::2], strict=True)
            return [{"role": ROLES[r.lower()], "content": text.strip()} for r, text in pairs]
        if "<extra_id_1>" in value:  # NeMo-Aligner, already rendered
            turns = re.findall(r"<extra_id_[01]>(\w+)\n(.*?)\n?(?=<extra_id_|$)", value, re.DOTALL)
            messages = [{"role": _role(r, where), "content": text} for r, text in turns]
            return [
                m for m in messages if m["content"] or m["role"] == "user"
            ]  # empty system, open last turn
        return [{"role": role, "content": value}]
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise dist.RunError(
            f"{where}: found {str(value)[:60]!r}, expected a string or a list of role/content messages"
        )
    messages = []
    for turn in turns:
        speaker, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(text, str):
            raise dist.RunError(
                f"{where}: a message needs role and content strings; found {str(turn)[:60]!r}"
            )
        messages.append({"role": _role(speaker, where), "content": text})
    return messages


def _role(speaker: Any, where: str) -> str:
    role = ROLES.get(str(speaker).lower())
    if role is None:
        raise dist.RunError(f"{where}: unknown role {speaker!r}; expected one of {', '.join(ROLES)}")
    return role


def _first(value: dict, *names: str) -> Any:
    return next((value[name] for name in names if value.get(name) is not None), None)


def read_sft(record: Record) -> tuple[Messages | tuple[str, str], list[bool]]:
    """A demonstration as (messages, which of them are trained), or ((prompt, response), []) for plain text.

    `train_roles` names the trained roles; NeMo's `mask` names the speakers that are not. Default: the assistant.
    """
    value, where = record.value, record.where
    system = [{"role": "system", "content": value["system"]}] if value.get("system") else []
    turns = _first(value, "messages", "conversations")
    if turns is not None:
        messages = system + as_messages(turns, where)
        if value.get("train_roles"):
            roles = _names(value["train_roles"])
            trained = [m["role"] in roles for m in messages]
        elif value.get("mask"):
            masked = _names(value["mask"])  # exact names: "Use" is not masked by "User"
            speakers = ["system"] * len(system) + [str(t.get("from", t.get("role"))) for t in turns]
            trained = [
                name not in masked and m["role"] != "system"
                for name, m in zip(speakers, messages, strict=True)
            ]
        else:
            trained = [m["role"] == "assistant" for m in messages]
        return messages, trained
    if "instances" in value:  # Self-Instruct seeds
        value = {**value, **value["instances"][0]}
    prompt = _first(value, "instruction", "prompt", "question")
    if value.get("instruction") and value.get("input"):  # alpaca: the input is material for the instruction
        prompt = f"{prompt}\n\n{value['input']}"
    prompt = _first(value, "input") if prompt is None else prompt
    response = _first(value, "response", "completion", "output", "answer")
    if response is None and isinstance(value.get("text"), str):
        return ("", value["text"]), []
    if prompt is None or response is None:
        raise dist.RunError(
            f"{where}: found the fields {', '.join(value)}; expected messages, conversations, prompt + response, "
            "input + output, instruction + output, or text"
        )
    if isinstance(prompt, str) and isinstance(response, str) and "<extra_id_1>" not in prompt and not system:
        return (prompt, response), []
    before, after = system + as_messages(prompt, where), as_messages(response, where, "assistant")
    return before + after, [False] * len(before) + [m["role"] == "assistant" for m in after]


def _names(value: Any) -> list[str]:
    return [n.strip() for n in value.split(",")] if isinstance(value, str) else list(value)


PAIR_FIELDS = {"chosen_reward": 1.0, "rejected_reward": 0.0, "margin": 0.0, "label_prob": 1.0}


def read_pair(record: Record) -> tuple[Messages | str, Messages | str, Messages | str, dict[str, float]]:
    """A preference as (prompt, chosen, rejected, numbers): messages each, or strings when all three are plain text."""
    value, where = record.value, record.where
    chosen, rejected = (
        _first(value, "chosen", "chosen_response"),
        _first(value, "rejected", "rejected_response"),
    )
    if chosen is None or rejected is None:
        raise dist.RunError(f"{where}: found the fields {', '.join(value)}; expected chosen and rejected")
    numbers = {}
    for name, default in PAIR_FIELDS.items():
        number = default if value.get(name) is None else value[name]
        if isinstance(number, bool) or not isinstance(number, (int, float)) or number != number:
            raise dist.RunError(f"{where}: {name} is {number!r}; expected a number")
        numbers[name] = float(number)
    if not 0 <= numbers["label_prob"] <= 1:
        raise dist.RunError(f"{where}: label_prob is {numbers['label_prob']}; expected a probability")
    prompt = value.get("prompt")
    texts = (prompt, chosen, rejected)
    if all(isinstance(x, str) and "\n\nHuman:" not in x and "<extra_id_1>" not in x for x in texts):
        return prompt, chosen, rejected, numbers
    if isinstance(prompt, str) and "<extra_id_1>" in prompt:  # the response's turn was opened by the prompt
        chosen, rejected = (
            re.sub(r"\n?<extra_id_1>\s*$", "", x) if isinstance(x, str) else x for x in (chosen, rejected)
        )
    sides = [as_messages(x, where, "assistant") for x in (chosen, rejected)]
    before = as_messages(prompt, where) if prompt is not None else []
    if before and before[-1]["role"] == "assistant" and not before[-1]["content"]:
        before = before[:-1]
    if not before:  # whole conversations: what they share is the prompt
        shared = next(
            (i for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b), min(map(len, sides))
        )
        before, sides = sides[0][:shared], [side[shared:] for side in sides]
    if not before or not all(side and side[-1]["role"] == "assistant" for side in sides):
        raise dist.RunError(
            f"{where}: chosen and rejected must share a prompt and each end with an assistant turn"
        )
    return before, *sides, numbers


# ------------------------------------------------------------------------------------------------------ data sets


def encode_response(tokenizer: Any, prompt: Messages | str, response: Messages | str) -> Sequence:
    """Tokens of prompt and response, the mask on the response's assistant turns."""
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        return encode_text(tokenizer, prompt, response)
    before = as_messages(prompt, "prompt") if isinstance(prompt, str) else prompt
    after = as_messages(response, "response", "assistant") if isinstance(response, str) else response
    return encode_chat(
        tokenizer, before + after, [False] * len(before) + [m["role"] == "assistant" for m in after]
    )


def load_sft(args: Any, tokenizer: Any) -> tuple[Dataset, Dataset]:
    """(train, eval) demonstrations: one sequence an example. Reads dataset, eval_dataset, max_length, train_on_prompt."""

    def encode(record: Record) -> Example:
        if "input_ids" in record.value:
            labels = record.value.get("labels", record.value["input_ids"])
            tokens = np.array(record.value["input_ids"], np.int32)
            return Example([(tokens, np.array(labels) != -100)], prompt="", record=record.value)
        content, trained = read_sft(record)
        if isinstance(content, tuple):  # prompt and response as strings
            prompt = content[0] if tokenizer.chat_template is None else as_messages(content[0], record.where)
            as_text = tokenizer.chat_template is None or not content[0]
            tokens, mask = (encode_text if as_text else encode_response)(tokenizer, *content)
        else:
            need_template(tokenizer, record)
            tokens, mask = encode_chat(tokenizer, content, trained)
            replies = [i for i, m in enumerate(content) if m["role"] == "assistant"]
            prompt = content[: replies[-1]] if replies else content
        if args.train_on_prompt:
            mask = np.ones(len(tokens), bool)
        return Example([(tokens, mask)], prompt=prompt, record=record.value)

    return load(args, "sft", encode)


def load_pairs(args: Any, tokenizer: Any) -> tuple[Dataset, Dataset]:
    """(train, eval) preference pairs: chosen, then rejected. Reads dataset, eval_dataset, max_length."""

    def encode(record: Record) -> Example:
        prompt, chosen, rejected, numbers = read_pair(record)
        if isinstance(chosen, list):
            need_template(tokenizer, record)
        elif tokenizer.chat_template is not None:
            prompt = as_messages(prompt, record.where)
        sides = [encode_response(tokenizer, prompt, side) for side in (chosen, rejected)]
        return Example(sides, prompt=prompt, fields=numbers, record=record.value)

    return load(args, "pairs", encode)


def need_template(tokenizer: Any, record: Record) -> None:
    if tokenizer.chat_template is None:
        raise dist.RunError(
            f"{record.where}: chat messages, but the tokenizer has no chat template; set one with --chat_template "
            "(chatml, or a Jinja file)"
        )


def load(args: Any, kind: str, encode: Callable[[Record], Example]) -> tuple[Dataset, Dataset]:
    """Read, encode (the work is shared between ranks), cut to max_length, and say what was cut or dropped.

    An example longer than max_length is cut at the end; where that leaves a sequence without a scored token the
    example is dropped. Both are counted and printed.
    """

    def convert(record: Record) -> Example:
        try:
            example = encode(record)
            for _, mask in example.sequences:
                mask[:1] = False  # nothing comes before a first token
            return example
        except dist.RunError:
            raise
        except Exception as error:  # a template may raise anything about a conversation it does not like
            raise dist.RunError(f"{record.where}: cannot be encoded: {str(error).splitlines()[0]}") from error

    datasets = []
    for name, parts in zip(("train on", "evaluate on"), split_records(args, kind), strict=True):
        cut = dropped = 0
        kept_parts = []
        for records, weight in parts:
            examples = dist.parallel_map(convert, records)
            for example in examples:
                cut += any(len(tokens) > args.max_length for tokens, _ in example.sequences)
                example.sequences = [
                    (t[: args.max_length], m[: args.max_length]) for t, m in example.sequences
                ]
            kept = [e for e in examples if all(mask.any() for _, mask in e.sequences)]
            dropped += len(examples) - len(kept)
            kept_parts.append((kept, weight))
        dataset = Dataset(kept_parts)
        datasets.append(dataset)
        if not dataset:
            raise dist.RunError(
                f"no example to {name} has a token to train within max_length {args.max_length}"
            )
        if dist.is_main():
            notes = f"; {cut} cut to max_length {args.max_length}" if cut else ""
            notes += f"; {dropped} dropped, no response token left" if dropped else ""
            print(f"{kind}: {len(dataset):,} examples to {name}{notes}", flush=True)
    train, evaluation = datasets
    if train.epoch_size < args.batch_size:
        raise dist.RunError(
            f"dataset {args.dataset}: {train.epoch_size} examples are fewer than batch_size {args.batch_size}"
        )
    return train, evaluation
