"""Formats: files and hub data sets -> records -> conversations, pairs, prompts and ratings.

What docs/data.md lists is read here and becomes turns of a conversation, or an error that names file, line,
what was found and what was expected. Nothing here makes tokens: a tokenizer is only asked whether it has a
template.
"""

import codecs
import difflib
import functools
import gzip
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from common import dist
from common.files import toy_folder

# role and content of each turn, and what else a template reads of it; the first turn of a conversation also
# carries what the record says about all of it, `tools` and `chat_template_kwargs`
Messages = list[dict[str, Any]]

# ---------------------------------------------------------------------------------------------- reading files


class Record(NamedTuple):
    """One line of a data set and where it stands, for error messages."""

    value: dict
    where: str


def wrong(where: str, found: Any, expected: str) -> dist.RunError:
    if isinstance(found, dict):
        found = "the fields " + ", ".join(k if v is not None else f"{k} (null)" for k, v in found.items())
    else:
        found = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(found)[:80])
    return dist.RunError(f"{where}: found {found}; expected {expected}")


class LeftOut(Exception):
    """A record that is counted, by this reason, and not used."""


def first_line(error: Exception) -> str:
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first


def read_sources(names: str, what: str = "dataset") -> list[tuple[str, float]]:
    """(source, weight) of each part of a,b*2; a * in the name of an existing file is part of the name."""
    if not names:
        raise dist.RunError(f"{what} is not set; with a model of your own say which, or --{what} toy")
    sources = []
    whole = Path(names).expanduser().exists()  # a comma in the name of a file separates nothing
    for name in [names] if whole else map(str.strip, names.split(",")):
        source, star, weight = name.rpartition("*")
        if not star or Path(name).expanduser().exists():
            source, weight = name, "1"
        if not source or not re.fullmatch(r"\d*\.?\d+", weight) or float(weight) == 0:
            raise wrong(what, names, "names joined by commas, each with an optional *weight above 0")
        sources.append((source, float(weight)))
    return sources


SPLITS = {"train": ("train",), "test": ("test", "validation", "val", "eval", "dev")}


def read_records(source: str, split: str, kind: str) -> list[Record] | None:
    """The records of one data set's split ("train" or "test"); None if it has no such split.

    Where a data set is a single file, a field `split` tells the records of one split from those of others.
    """
    path = toy_folder() / kind if source == "toy" else Path(source).expanduser()
    if path.is_dir():
        return read_folder(path, source, SPLITS[split])
    if path.is_file():
        records = read_file(path)
        if not any("split" in value for value, _ in records):
            return records if split == "train" else None
        return [record for record in records if split_of(*record) == split] or None
    if path.suffix in (".jsonl", ".json", ".parquet", ".gz") or not re.match(r"[\w.-]+/[\w.-]+(:|$)", source):
        raise wrong(f"dataset {source}", "no such file", "a file, a folder, or hub/name[:config[:split]]")
    return read_hub(source, SPLITS[split])


def split_of(value: dict, where: str) -> str:
    """The split that a record of a single file names."""
    own = str(value.get("split")).lower()
    for split, names in SPLITS.items():
        if own.startswith(names):  # train_sft, test_prefs
            return split
    raise wrong(
        where, f"split {value.get('split')!r}", "train, test or validation; else another name for the field"
    )


def read_folder(path: Path, source: str, names: tuple[str, ...]) -> list[Record] | None:
    """The first of the splits `names` in a folder: of files, cloned from the hub, or by save_to_disk."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        table = load_table(source, "load_from_disk", str(path))
        tables = table if isinstance(table, dict) else {"train": table}
        return next((as_records(tables[name], f"{source} {name}") for name in names if name in tables), None)
    places = [*path.iterdir(), *(path / "data").glob("*")]
    for name in names:
        if found := sorted(f for f in places if re.match(rf"{name}[.-]", f.name)):
            refuse_twice(found, path)
            return [record for f in found for record in read_file(f)]
    if "train" in names:
        raise wrong(f"dataset {source}", "no train.* file", "train.jsonl, .json or .parquet in it or data/")
    return None


def refuse_twice(found: list[Path], folder: Path) -> None:
    """End the run if the files of a split are the same one twice, or lack a shard of name-00000-of-00003."""
    stems = [f.name.removesuffix(".gz").rpartition(".")[0] for f in found]
    shards = [m for stem in stems if (m := re.search(r"-(\d+)-of-(\d+)$", stem))]
    shown = ", ".join(str(f.relative_to(folder)) for f in found[:4])
    is_mixed = len({f.parent for f in found}) > 1 or 0 < len(shards) < len(found)
    if is_mixed or len({*stems}) < len(stems) or len({m[2] for m in shards}) > 1:
        raise wrong(f"dataset {folder}", shown, "one of them: the records would be read twice")
    missing = {*range(int(shards[0][2]))} - {int(m[1]) for m in shards} if shards else ()
    if missing:
        raise wrong(f"dataset {folder}", shown, f"number {min(missing)} of {shards[0][2]} too")


def read_hub(source: str, names: tuple[str, ...]) -> list[Record] | None:
    """The rows of the split that source names, else of the first of `names` that the data set has.

    Some keep their parts in folders: hub/name:data_dir=folder, as Anthropic/hh-rlhf:data_dir=harmless-base.
    """
    name, config, chosen = (*source.split(":", 2), "", "")[:3]
    inside = {"data_dir": config[len("data_dir=") :]} if config.startswith("data_dir=") else {}
    if chosen and "train" not in names:
        return None
    own = None if inside else config or None
    table = load_table(source, "load_dataset", name, own, split=chosen or None, **inside)
    if not chosen:
        split = next((n for n in names if n in table), None)
        if split is None and "train" in names:
            example = ":".join((name, config, *table)[:3])
            raise wrong(f"dataset {source}", f"the splits {', '.join(table)}", example)
        table = table[split] if split else None
    return None if table is None else as_records(table, source)


def load_table(source: str, how: str, *given: Any, **options: Any) -> Any:
    import datasets

    try:
        return getattr(datasets, how)(*given, **options)
    except Exception as error:  # the library raises many kinds
        raise dist.RunError(f"dataset {source}: cannot be loaded: {first_line(error)}") from error


def as_records(rows: Iterable[dict], where: str) -> list[Record]:
    return [Record(value, f"{where} row {i}") for i, value in enumerate(rows)]


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
        records = as_records(table, str(path))
    elif re.match(rb"\s*\[\s*\{" if suffix == ".jsonl" else rb"\s*\[", text):  # as red-team data of HH
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
    except (ValueError, RecursionError) as error:
        raise wrong(where, f"no valid JSON ({first_line(error)})", "one object a line") from error


# --------------------------------------------------------------------------------------------- record formats

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user"}
ROLES |= {"assistant": "assistant", "gpt": "assistant", "model": "assistant"}
ROLES |= dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "tool")
ROLES |= dict.fromkeys(("function_call", "tool_call"), "assistant")  # the text of these turns is the call
CONVERSATIONS = ("messages", "conversations")
PROMPTS = ("prompt", "instruction", "question", "query", "input", "text")
RESPONSES = ("completion", "response", "output", "answer")
CHOSEN = ("chosen", "chosen_response")
REJECTED = ("rejected", "rejected_response", "rejected_messages")
# of a pair: its numbers, each as it is where there is none, and the other names that two of them go by
PAIR_FIELDS = {"chosen_reward": 1.0, "rejected_reward": 0.0, "margin": 0.0, "label_prob": 1.0}
ALSO = {f"{s}_reward": (f"score_{s}", f"{s}_score", f"{s}_rating") for s in ("chosen", "rejected")}
LARGEST = 1e15  # a number, of which float32 must hold sums and squares
ATTRIBUTES = ("quality", "toxicity", "humor", "creativity")  # in the order of NeMo-Aligner's lists
ATTRIBUTES += ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# of a message: its thoughts, whether it is trained, and what else a template may read
REASONING = ("reasoning_content", "thinking", "reasoning")
TRAINED = ("trained", "weight", "train", "training", "loss")
KEPT = ("tool_calls", "tool_call_id", "name")
SHOWN = ("content", "reasoning_content", *KEPT)
# of a record: what would change its meaning and cannot be followed, with what to do
REFUSED = dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), "text, all that is read")
REFUSED |= {"documents": "documents in the text of a turn", "kto_tag": "chosen and rejected of a prompt"}
REFUSED |= dict.fromkeys(("loss_scale", "weight"), "a weight of 0 or 1 on each message, or dataset*weight")
REFUSED |= dict.fromkeys(("system_message", "system_msg", "system_instruction"), "the name system")
REFUSED |= {"winner": "chosen and rejected"}
# all that is read, here and in data.py, of a record and of a turn
READ = (*CONVERSATIONS, *PROMPTS, *RESPONSES, *CHOSEN, *REJECTED, *PAIR_FIELDS, *sum(ALSO.values(), ()))
OTHERS = "content system system_prompt history tools functions context label attributes chat_template_kwargs "
OTHERS += "train_roles mask type split responses ranks instances transcript preference_strength response_1 "
OTHERS += "response_2 input_ids labels attention_mask completion_mask assistant_masks loss_mask"
READ += (*REASONING, *OTHERS.split())
LISTS = (*CONVERSATIONS, "tools", "tool_calls")  # whose singular is a slip too
READ_OF_TURNS = ("role", "from", "content", "value", *REASONING, *TRAINED, *KEPT, "function_call", "label")


def first(value: dict, names: Iterable[str]) -> Any:
    """The first of these fields that is there and not null."""
    return next((value[name] for name in names if value.get(name) is not None), None)


def number(value: Any, where: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST:
        raise wrong(where, f"{name} {value!r}", "a number below 1e15")
    return float(value)


@functools.lru_cache(maxsize=4096)
def meant(name: str, known: tuple[str, ...]) -> list[str]:
    """The names that this one is a slip of: `choosen`. prompt_id and answers are names of the user's own."""
    own = name.lower().replace("-", "_")
    near = difflib.get_close_matches(own, [x for x in known if ("_" in x) == ("_" in own)], 2, 0.83)
    near = [x for x in near if abs(len(x) - len(name)) <= 1 + len(name) // 8]
    return [x for x in near if (x not in name and name not in x) or (name + "s" == x and x in LISTS)]


def refuse_slips(value: dict, where: str, known: tuple[str, ...]) -> None:
    """End the run for a name that is nearly one of `known`, which the record does not have."""
    for name, found in value.items():
        near = [x for x in meant(name, known) if value.get(x) is None] if name not in known else []
        if near and found is not None and (name + "s" not in LISTS or isinstance(found, list | dict)):
            raise wrong(where, f"the field {name}", f"{' or '.join(near)}; else another name for it")


def refuse_fields(value: dict, where: str) -> None:
    """End the run if a record says what cannot be followed, or nearly says what would be."""
    refuse_slips(value, where, READ)
    for name, expected in REFUSED.items():
        if value.get(name) not in (None, "", [], {}, 1):
            raise wrong(where, f"the field {name}", expected)
    if value.get("type") == "TEXT_TO_VALUE":
        raise wrong(where, "type TEXT_TO_VALUE", "VALUE_TO_TEXT, with the label before its reply")


def without_nulls(value: Any) -> Any:
    """A value without the nulls that a table fills into the fields its other rows have."""
    if isinstance(value, dict):
        return {name: without_nulls(x) for name, x in value.items() if x is not None}
    return [without_nulls(x) for x in value] if isinstance(value, list) else value


def from_json(value: Any, where: str, name: str, kind: type) -> Any:
    """A list or a dict, or the JSON text of one."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise wrong(where, f"{name} {value!r}", "JSON") from error
    if not isinstance(found, kind):
        raise wrong(where, f"{name} {value!r}", "a list" if kind is list else "an object of name: value")
    return without_nulls(found)


def read_functions(value: Any, where: str, name: str) -> list[dict]:
    """Tools, or calls of them, as {type, function: {...}} each; arguments as an object where they are one."""
    if isinstance(value, str) and value.lstrip()[:1] == "{":
        value = f"[{value}]"
    items, found = from_json(value, where, name, list), []
    for item in items:
        if not isinstance(item, dict) or "name" not in (item.get("function") or item):
            raise wrong(where, f"{name} {item!r}", "objects with a name, or a function that has one")
        item = item if "function" in item else {"type": "function", "function": item}
        function = dict(item["function"])
        if isinstance(function.get("arguments"), str) and function["arguments"].lstrip()[:1] == "{":
            function["arguments"] = from_json(function["arguments"], where, "arguments", dict)
        found.append({**item, "function": function})
    return found


def as_message(turn: dict, where: str) -> dict[str, Any]:
    """A turn by its role, its content as one text, and beside it what templates read."""
    refuse_slips(turn, where, READ_OF_TURNS)
    speaker, text = str(first(turn, ("role", "from"))).lower(), first(turn, ("content", "value"))
    kept = {name: turn[name] for name in KEPT if turn.get(name)}
    if thoughts := first(turn, REASONING):
        kept["reasoning_content"] = thoughts
    for name in ("reasoning_content", "tool_call_id", "name"):
        if not isinstance(kept.get(name, ""), str):
            raise wrong(where, f"{name} {kept[name]!r} of a message", "a text")
    if speaker in ("function_call", "tool_call"):
        kept["tool_calls"], text = text, ""
    if turn.get("function_call"):  # OpenAI's older name for one call
        kept["tool_calls"] = [turn["function_call"]]
    if refused := first(turn, ("loss_scale", "loss_weight", "train_detail", "reasoning_details")):
        raise wrong(
            where, f"the message {turn}", f"a weight of 0 or 1 and reasoning_content, not {refused!r}"
        )
    if "tool_calls" in kept:
        kept["tool_calls"] = read_functions(kept["tool_calls"], where, "tool_calls")
    if isinstance(text, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in text]
        text = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    text = "" if text is None and kept.keys() - {"name"} else text
    if speaker not in ROLES:
        raise wrong(where, f"the message of {speaker}, {turn}", f"a role of {', '.join(ROLES)}")
    if not isinstance(text, str):
        content = first(turn, ("content", "value"))
        raise wrong(where, f"the message of {speaker} with {content!r}", "a content of text")
    channels = read_channels(text, where) if ROLES[speaker] == "assistant" else {}
    if channels and "reasoning_content" in kept:
        raise wrong(where, f"reasoning_content beside the content {text!r}", "one of them with the thoughts")
    text, kept = channels.pop("content", text), kept | {k: v for k, v in channels.items() if v}
    flag = first(turn, TRAINED)
    if isinstance(flag, str | list | dict) or flag not in (None, 0, 1):
        raise wrong(where, f"the message {turn}", "a weight of 0 or 1")
    kept |= {} if flag is None else {"trained": bool(flag)}
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):  # kept with the first turn
        kept |= {name: from_json(turn[name], where, name, kind)} if turn.get(name) else {}
    return {"role": ROLES[speaker], "content": text, **kept}


def read_channels(text: str, where: str) -> dict[str, str]:
    """Content and thoughts of a reply in gpt-oss's raw format; {} without channels, others are refused."""
    pieces = re.split(r"(?:<\|start\|>assistant)?<\|channel\|>(.*?)<\|message\|>", text)
    if len(pieces) == 1:
        return {}
    names = [name.strip() for name in pieces[1::2]]
    said = [re.sub(r"\s*<\|(?:end|return)\|>\s*$", "", piece) for piece in pieces[2::2]]
    if pieces[0].strip() or "<|" in "".join(said) or names not in (["final"], ["analysis", "final"]):
        expected = "an analysis, then a final channel; or reasoning_content, content and tool_calls"
        raise wrong(where, f"the channels {', '.join(names)} in a content", expected)
    return dict(zip(("content", "reasoning_content"), reversed(said), strict=False))


def says_something(message: dict) -> bool:
    return bool(message["content"].strip() or message.keys() & {"tool_calls", "reasoning_content"})


def as_messages(value: Any, where: str, role: str = "user") -> Messages:
    """Messages of whatever stands for turns: a list of them, a single one, a transcript, or a text by `role`.

    White space at the ends of a text only separates it from its neighbours, so a turn made of one loses it.
    """
    if is_transcript(value):
        return split_transcript(value, where, role)
    if isinstance(value, str):
        if "<extra_id_1>" in value:
            raise wrong(where, repr(value), "the mark <extra_id_1> at the start of a line, for a turn")
        return [as_message({"role": role, "content": value.strip()}, where)]
    turns = value if isinstance(value, list) else [value]
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise wrong(where, repr(value), "a string or a list of role/content messages")
    return [as_message(turn, where) for turn in turns]


def is_transcript(value: Any) -> bool:
    """Whether a string holds marked turns: those of Anthropic HH, or of NeMo-Aligner, a mark to a line."""
    return isinstance(value, str) and bool(re.match(r"\n\nHuman:|(?s:.*\n)?<extra_id_1>\w*(\n|$)", value))


def split_transcript(text: str, where: str, role: str) -> Messages:
    """The turns of a transcript; text before the first mark is by `role`, adjoining turns are joined."""
    if text.startswith("\n\nHuman:"):
        parts = re.split(r"\n\n(Human|Assistant):", text)
    else:
        text = re.sub(r"<extra_id_2>.*\n?", "", text)  # a line of attributes
        text = text if text.startswith("<extra_id_") else f"<extra_id_1>{role}\n{text}"
        parts = re.split(r"(?:^|\n)<extra_id_[01]>(\w*)(?:\n|$)", text)
    turns = [{"role": s, "content": c.strip()} for s, c in zip(parts[1::2], parts[2::2], strict=True)]
    turns = [turn for turn in turns if turn["role"]]  # a mark at the end opens a turn of nobody
    messages: Messages = []
    for turn in as_messages(turns, where):
        if messages and messages[-1]["role"] == turn["role"]:
            messages[-1]["content"] += "\n\n" + turn["content"]
        elif turn["content"] or turn["role"] != "system":
            messages.append(turn)
    return messages


def as_turns(tokenizer: Any, value: Any, where: str, role: str = "user", lead: Messages = ()) -> Messages:
    """as_messages for this tokenizer, after `lead`; without a template only plain text, as it stands."""
    messages = [*lead, *as_messages(value, where, role)]
    if tokenizer.chat_template is not None:
        return messages
    if isinstance(value, str) and not is_transcript(value) and not lead:
        return [{"role": role, "content": value}]
    raise wrong(where, "chat messages", "a chat template in the tokenizer; set --chat_template")


def lead_of(value: dict, where: str) -> Messages:
    """The turns before a record's own: its system text, and a history of [question, reply] each."""
    system, history = first(value, ("system", "system_prompt")), value.get("history") or []
    lead = as_messages({"role": "system", "content": system}, where) if system else []
    if not isinstance(history, list):
        raise wrong(where, f"history {history!r}", "a list of [question, reply]")
    for item in history:
        if isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item):
            item = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), item, strict=True)]
        lead += as_messages(item, where)
    return lead


def with_context(value: dict, turns: Messages, where: str) -> Messages:
    """The turns, the first of them with the record's tools and template variables."""
    own = {}
    if tools := first(value, ("tools", "functions")):
        own["tools"] = read_functions(tools, where, "tools")
    if given := value.get("chat_template_kwargs"):
        own["chat_template_kwargs"] = from_json(given, where, "chat_template_kwargs", dict)
    own = {name: x for name, x in own.items() if x}
    return [{**turns[0], **own}, *turns[1:]] if turns and own else turns


def given_turns(value: dict, where: str) -> Any:
    """What a record has as `messages` or `conversations`, a list or a transcript; None without."""
    turns = first(value, CONVERSATIONS)
    if turns is not None and not isinstance(turns, list) and not is_transcript(turns):
        raise wrong(where, f"messages {turns!r}", "a list of role/content messages")
    return turns


def conversation(tokenizer: Any, value: dict, where: str) -> Messages | None:
    """The turns of a record that holds a whole conversation, else None."""
    turns = given_turns(value, where)
    if turns is None and is_transcript(value.get("text")):
        turns = value["text"]
    if turns is None:
        return None
    return with_context(value, as_turns(tokenizer, turns, where, lead=lead_of(value, where)), where)


def read_prompt(tokenizer: Any, value: dict, where: str) -> Messages:
    """What the model is asked, without a conversation's last reply or the turn a transcript opens for it."""
    prompt, material = first(value, PROMPTS), first(value, ("input", "context"))
    prompt = given_turns(value, where) if prompt is None else prompt
    if prompt is None and is_transcript(value.get("transcript")):  # a red-team attempt: its first turn
        return as_turns(tokenizer, value["transcript"], where)[:1]
    if prompt is None and first(value, CHOSEN) is not None:
        return read_pair(tokenizer, value, where)[0]
    if prompt is None:
        raise wrong(where, value, f"one of {', '.join(PROMPTS + CONVERSATIONS)}")
    if material and isinstance(prompt, str) and prompt == value.get("instruction"):
        prompt = f"{prompt}\n\n{as_message({'role': 'user', 'content': material}, where)['content']}"
    turns = as_turns(tokenizer, prompt, where, lead=lead_of(value, where))
    if turns[-1]["role"] == "assistant" and (first(value, PROMPTS) is None or not turns[-1]["content"]):
        turns = turns[:-1]
    if not turns or turns[-1]["role"] == "assistant":
        raise wrong(where, repr(prompt), "a prompt that ends with a turn of the user")
    return with_context(value, turns, where)


def read_exchange(tokenizer: Any, value: dict, where: str) -> tuple[Messages, Messages]:
    """A prompt and the turns from the response to it on."""
    turns, is_pair = conversation(tokenizer, value, where), first(value, CHOSEN) is not None
    if turns is not None and (turns[-1]["role"] == "assistant" or not is_pair):
        last = max((i for i, m in enumerate(turns) if m["role"] == "assistant"), default=len(turns))
        return turns[:last], turns[last:]
    if first(value, RESPONSES) is None and is_pair:
        return read_pair(tokenizer, value, where)[:2]
    if not isinstance(value.get("text", ""), str | None):
        raise wrong(where, f"text {value['text']!r}", "a text")
    if first(value, PROMPTS) is None or first(value, RESPONSES) is None:
        raise wrong(where, value, "messages, conversations, prompt + completion, input + output, or text")
    prompt = read_prompt(tokenizer, value, where)
    response = as_turns(tokenizer, first(value, RESPONSES), where, "assistant")
    if thoughts := first(value, REASONING):
        response[0] = as_message({**response[0], "reasoning_content": thoughts}, where)
    if tokenizer.chat_template is None and value.get("completion") is None:
        text = response[0]["content"]  # only a completion continues plain text as it stands
        if prompt[-1]["content"][-1:].strip() and text[:1].strip():
            response = [{"role": "assistant", "content": " " + text}]
    return prompt, response


def read_pair(tokenizer: Any, value: dict, where: str) -> tuple[Messages, Messages, Messages, dict]:
    """(prompt, chosen, rejected, numbers) of a preference; what two conversations share is the prompt."""
    if value.get("preference_strength") is not None:  # HelpSteer2: negative if the first is better
        strength = number(value["preference_strength"], where, "preference_strength")
        sides = [value.get(f"response_{n}") for n in ((1, 2) if strength < 0 else (2, 1))]
        value = {**value, "chosen": sides[0], "rejected": sides[1], "margin": abs(strength)}
    sides = [first(value, CHOSEN), first(value, REJECTED)]
    if sides[0] is None and sides[1] is not None:  # the chosen one is the reply that ends the conversation
        turns = conversation(tokenizer, value, where) or []
        ends = turns and turns[-1]["role"] == "assistant"
        sides[0] = turns[-1:] if ends else first(value, RESPONSES)
    if None in sides:
        raise wrong(where, value, "chosen and rejected")
    given = {name: first(value, (name, *ALSO.get(name, ()))) for name in PAIR_FIELDS}
    given = PAIR_FIELDS | {name: x for name, x in given.items() if x is not None}
    numbers = {name: number(x, where, name) for name, x in given.items()}
    if not 0 <= numbers["label_prob"] <= 1:
        raise wrong(where, f"label_prob {numbers['label_prob']}", "a probability")
    chosen, rejected = (as_turns(tokenizer, side, where, "assistant") for side in sides)
    lead = lead_of(value, where)
    prompt = [] if first(value, PROMPTS + CONVERSATIONS) is None else read_prompt(tokenizer, value, where)
    # a side that does not open with the assistant is a whole conversation, even if the prompt is given too
    chosen, rejected = (
        prompt + s if s[0]["role"] == "assistant" else s if s[0]["role"] == "system" else lead + s
        for s in (chosen, rejected)
    )
    shared = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if not shared or not chosen[-1]["role"] == rejected[-1]["role"] == "assistant":
        raise wrong(where, value, "a prompt for both, and both to end with an assistant turn")
    return with_context(value, chosen[:shared], where), chosen[shared:], rejected[shared:], numbers


def reward_names(value: dict) -> str:
    """The fields that have the rewards of a preference; "" without."""
    groups = [(name, *others) for name, others in ALSO.items()]
    found = [next((n for n in group if value.get(n) is not None), "") for group in groups]
    return " and ".join(found) if all(found) else ""


def common_prefix(a: Any, b: Any) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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
            label = {name.strip(): float(x) for name, x in (item.split(":") for item in label.split(","))}
        except ValueError as error:
            raise wrong(where, f"the label {label!r}", "name:value joined by commas") from error
    if isinstance(label, list) and len(label) == len(ATTRIBUTES):
        label = dict(zip(ATTRIBUTES, label, strict=True))
    if not isinstance(label, dict) or not label:
        raise wrong(where, label or value, f"a label, or columns, of {', '.join(ATTRIBUTES)}")
    for name in label.keys() | (value.keys() if label.keys() <= value.keys() else set()):
        meant = difflib.get_close_matches(name, ATTRIBUTES, 1, 0.85)
        if meant and name not in ATTRIBUTES:
            raise wrong(where, f"the attribute {name}", meant[0])
    return {name: number(score, where, name) for name, score in label.items() if score not in (None, -100)}


def label_line(attributes: dict[str, float]) -> str:
    """The line before a conditioned reply: name:value of each attribute that is known, joined by commas."""
    known = {name: value for name, value in attributes.items() if not math.isnan(value)}
    return ",".join(f"{name}:{value:.0f}" for name, value in known.items()) + "\n"


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
