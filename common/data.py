"""Data: files and hub data sets -> tokens and masks of sequences; what an epoch and a batch are made of.

Every format of docs/data.md becomes turns of a conversation (common/formats.py); a chat template makes text
of them and the tokenizer tokens. A mask is True on the tokens that are scored.

    python -m common.data FILE --kind sft --model MODEL        shows sequences as training will see them
"""

import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from common import dist, files, packed
from common.files import model_folder
from common.formats import (
    CHOSEN,
    CONVERSATIONS,
    PROMPTS,
    REJECTED,
    RESPONSES,
    SHOWN,
    LeftOut,
    Messages,
    Record,
    as_turns,
    attach_labels,
    common_prefix,
    first,
    first_line,
    from_json,
    is_transcript,
    number,
    read_exchange,
    read_label,
    read_pair,
    read_prompt,
    read_records,
    read_sources,
    refuse_fields,
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
DAY = "2026-01-01"  # what a template that writes the date is told, so that tokens are the same on every day


def load_tokenizer(model: str, chat_template: str = "", chat_template_kwargs: str = "") -> Any:
    """The model's tokenizer; chat_template (a Jinja file, or "chatml") replaces the one it comes with.

    Args:
        chat_template_kwargs: a JSON object of variables of the template. They become its defaults, so that
            training, generation and the export all have them. strftime_now is the day, as 2026-01-31.
    """
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
        if chat_template_kwargs:
            set_defaults(tokenizer, chat_template_kwargs)
        end_token(tokenizer)  # a template that fails does so here
    except Exception as error:  # a template may raise anything
        if isinstance(error, dist.RunError) and "cannot be encoded" not in str(error):
            raise
        template = f"chat_template {chat_template}" if chat_template else "its own chat template"
        raise dist.RunError(f"the tokenizer of {model} with {template}: {first_line(error)}") from error
    return tokenizer


def set_defaults(tokenizer: Any, chat_template_kwargs: str) -> None:
    """Write variables into the chat template, as what they are where nobody sets them."""
    given = from_json(chat_template_kwargs, "chat_template_kwargs", "the option", dict)
    tokenizer.day = given.pop("strftime_now", DAY)
    refuse_unknown(tokenizer, given)
    start = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {json.dumps(value)} %}}{{%- endif %}}"
        for name, value in given.items()
    )
    if not tokenizer.chat_template.startswith(start):
        tokenizer.chat_template = start + tokenizer.chat_template


def refuse_unknown(tokenizer: Any, given: dict) -> None:
    """End the run for a variable that the template does not name."""
    for name in given:
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            raise wrong("chat_template_kwargs", name, "a variable of the chat template, which has no such")


def adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer: Any, marks: bool = False) -> re.Pattern:
    """Matches the spelling of any special token; with `marks` of those alone that mark the turns."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if marks:
        probe = render(tokenizer, PROBE, False)
        ends = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
        names = [name for name in names if name in probe or name in ends]
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "zebra"}]


def hidden(tokenizer: Any, value: Any, is_own: bool = False) -> Any:
    """Texts in which a special token that is spelled out stays text: a BREAK after its first character.

    is_own: of the assistant, whose marks for channels, thoughts and calls are special tokens; those that
        begin and end turns are text.
    """
    if isinstance(value, dict):
        return {name: hidden(tokenizer, x, is_own) for name, x in value.items()}
    if isinstance(value, list):
        return [hidden(tokenizer, x, is_own) for x in value]
    if not isinstance(value, str) or not special_tokens(tokenizer).search(value):
        return value
    return special_tokens(tokenizer, is_own).sub(lambda m: m[0][0] + BREAK + m[0][1:], value)


@functools.lru_cache(maxsize=4)
def takes_parts(tokenizer: Any) -> bool:
    """Whether the template shows a content only as a list of parts, as those of models that see do."""
    for content in ("zebra", [{"type": "text", "text": "zebra"}]):
        with contextlib.suppress(Exception):  # a template may raise anything
            asked = [{"role": "user", "content": content}]
            if "zebra" in tokenizer.apply_chat_template(asked, tokenize=False):
                return not isinstance(content, str)
    return False


def render(tokenizer: Any, messages: Messages, for_reply: bool) -> str:
    """A conversation under the chat template; for_reply adds the header of the assistant's next turn.

    A special token that a message spells out stays text. Without a template the turns are plain text and
    joined as they stand.

    Raises:
        RunError: the template, or the tokenizer, does not take the conversation.
    """
    labels = [labelled(tokenizer, m.get("label", "")) for m in messages]
    if tokenizer.chat_template is None:
        return "".join(label + m["content"] for label, m in zip(labels, messages, strict=True))
    turns, first_turn = [], messages[0] if messages else {}
    for m, label in zip(messages, labels, strict=True):
        turn = {name: hidden(tokenizer, m[name], m["role"] == "assistant") for name in SHOWN if name in m}
        text = label + turn["content"]
        turn |= {
            "role": m["role"],
            "content": [{"type": "text", "text": text}] if takes_parts(tokenizer) else text,
        }
        turn |= {"thinking": turn["reasoning_content"]} if "reasoning_content" in turn else {}  # of gpt-oss
        turns.append(turn)
    tools, given = hidden(tokenizer, first_turn.get("tools")), first_turn.get("chat_template_kwargs", {})
    with encoding():
        template = tokenizer.get_chat_template(tools=tools)
        if "strftime_now(" in template:
            given = {**given, "chat_template": dated(template, getattr(tokenizer, "day", DAY))}
        return tokenizer.apply_chat_template(
            turns, tools=tools, tokenize=False, add_generation_prompt=for_reply, **given
        )


@functools.lru_cache(maxsize=8)
def dated(template: str, day: str) -> str:
    """A template in which each call of strftime_now is what it gives on that day."""
    calls = r"strftime_now\(\s*(['\"])(.*?)\1\s*\)"
    date = datetime.date.fromisoformat(day)
    return re.sub(calls, lambda m: m[1] + date.strftime(m[2]) + m[1], template)


@contextlib.contextmanager
def encoding(where: str = "") -> Iterator[None]:
    """What a template or tokenizer raises about a conversation becomes one line, which begins with `where`."""
    try:
        yield
    except LeftOut:
        raise
    except dist.RunError as error:
        if not where or str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from error
    except Exception as error:  # a template may raise anything
        place = f"{where}: " if where else ""
        raise dist.RunError(f"{place}cannot be encoded: {first_line(error)}") from error


@functools.lru_cache(maxsize=16)  # chosen and rejected share a prompt
def tokenize(tokenizer: Any, text: str, plain: bool = False) -> tuple[int, ...]:
    """Tokens of a rendered conversation. Only plain text needs a BOS: a template writes its own."""
    with encoding():
        pieces = [
            tokenizer(s, add_special_tokens=False, verbose=False)["input_ids"] for s in text.split(BREAK)
        ]
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
        tail = render(tokenizer, PROBE, False).rpartition("zebra")[2]
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        end = next((token for token in tokenize(tokenizer, tail) if token in special), end)
    if end is None:
        raise dist.RunError("the tokenizer has no end token: set eos_token in its tokenizer_config.json")
    return end


def encode_chat(tokenizer: Any, messages: Messages, trained: list[bool]) -> list[Tokens]:
    """Tokens of a conversation and the mask of its trained turns, each up to and including its end token.

    One sequence where what generation would start a reply from is a beginning of it for every trained reply.
    A template that rewrites earlier turns gives one for each trained turn, after the turns before it as
    generation would see them.

    Raises:
        RunError: the template does not take the conversation, or loses a part of it.
    """
    spans = [i for i, t in enumerate(trained) if t]
    if not spans:
        return [Tokens(np.zeros(0, np.int32), np.zeros(0, bool))]
    refuse_unseen(tokenizer, messages[: spans[-1] + 1])
    whole = encode_whole(tokenizer, messages, spans)
    return [whole] if whole else [encode_turn(tokenizer, messages[: i + 1]) for i in spans]


def encode_whole(tokenizer: Any, messages: Messages, spans: list[int]) -> Tokens | None:
    """One sequence for all trained turns; None if what comes later changes a turn, or the header of a reply.

    The span of a turn is what rendering it adds to the conversation before it (and to a reply's header), so
    no markers in the template are needed.
    """
    text = render(tokenizer, messages[: spans[-1] + 1], False)
    tokens, end = tokenize(tokenizer, text), end_token(tokenizer)
    mask = np.zeros(len(tokens), bool)
    for i in spans:
        is_reply = messages[i]["role"] == "assistant"
        before, turn = context_of(tokenizer, messages[: i + 1]), text
        if i < spans[-1]:
            turn = render(tokenizer, messages[: i + 1], False)
        prompt = tokenize(tokenizer, before)
        # a token across the boundary belongs to the turn that completes it
        start, stop = common_prefix(prompt, tokens), common_prefix(tokenize(tokenizer, turn), tokens)
        is_cut = start < len(prompt) and is_reply and i > 0
        has_end = end in tokens[start:stop]
        if is_cut or not (text.startswith(before) and turn.startswith(before)):
            return None
        if not (text.startswith(turn) or has_end) or not keeps_thoughts(tokenizer, messages[i], text):
            return None
        if has_end:
            stop = tokens.index(end, start) + 1
        mask[start:stop] = True
    tokens, mask = tokens[:stop], mask[:stop]  # what follows the last end token is never scored
    if is_reply and tokens[-1:] != (end,):  # a rendering without end tokens
        tokens, mask = (*tokens, end), np.append(mask, True)
    return Tokens(np.array(tokens, np.int32), mask)


def encode_turn(tokenizer: Any, messages: Messages) -> Tokens:
    """A conversation of which the last turn is trained, after what generation sees of those before it."""
    before, end = context_of(tokenizer, messages), end_token(tokenizer)
    prompt, tail = tokenize(tokenizer, before), rendered_turn(tokenizer, messages, before)
    if not keeps_thoughts(tokenizer, messages[-1], tail):
        raise dist.RunError("cannot be encoded: the chat template leaves out the thoughts of a trained reply")
    tokens = tokenize(tokenizer, before + tail)
    if tokens[: len(prompt)] != prompt:  # a token across the boundary, which generation would not see
        tokens = tokenize(tokenizer, before + BREAK + tail)
    if end in tokens[len(prompt) :]:
        tokens = tokens[: tokens.index(end, len(prompt)) + 1]
    elif messages[-1]["role"] == "assistant":
        tokens = (*tokens, end)
    return Tokens(np.array(tokens, np.int32), np.arange(len(tokens)) >= len(prompt))


def context_of(tokenizer: Any, messages: Messages) -> str:
    """What is rendered before the last turn, a reply's header and label included."""
    *before, last = messages
    text = render(tokenizer, before, last["role"] == "assistant") if before else opening(tokenizer, messages)
    return text + labelled(tokenizer, last.get("label", ""))


def opening(tokenizer: Any, messages: Messages) -> str:
    """What the template puts before the content of the last turn: what its rendering shares with another."""
    *before, last = messages
    other = "b" if last["content"].startswith("a") else "a"
    both = [
        render(tokenizer, [*before, {**last, "content": text}], False) for text in (last["content"], other)
    ]
    return os.path.commonprefix(both)


def rendered_turn(tokenizer: Any, messages: Messages, before: str) -> str:
    """What follows `before` in the rendering of the last turn.

    Where the template changes the turns before a reply, or the header of the reply, once the reply is there,
    it is found by the content of the turn before it, and by what the two headers share.

    Raises:
        RunError: it cannot be found; says what the template changes.
    """
    full = render(tokenizer, messages, False)
    if full.startswith(before):
        return full[len(before) :]
    *context, last = messages
    start, history = len(opening(tokenizer, messages)), render(tokenizer, context, False)
    at = len(history)
    if not full.startswith(history):
        content = hidden(tokenizer, context[-1]["content"].strip()) if context else ""
        kept = history[history.rfind(content) :] if content in history else ""
        at = full.rfind(kept, 0, start) + len(kept)
        if not content or not kept or at < len(kept):
            raise dist.RunError(f"cannot be encoded: the chat template changes {what_changes(messages)}")
    if not before.startswith(history):
        raise dist.RunError(
            "cannot be encoded: the chat template's header for a reply changes what is before it"
        )
    header = before[len(history) :]
    same = min(common_prefix(header, full[at:]), start - at)
    tail = full[at + same :]
    if "<think>" in header[same:]:
        tail = with_thoughts(tokenizer, last["content"], tail)
    return tail.removeprefix(labelled(tokenizer, last.get("label", "")))


def what_changes(messages: Messages) -> str:
    has_system = messages[0]["role"] == "system"
    return f"earlier turns{', the system turn among them,' * has_system} as the conversation grows"


def with_thoughts(tokenizer: Any, content: str, tail: str) -> str:
    """A rendered reply after a header that opens <think>: with the thoughts that it has, or closed at once."""
    thoughts, close, answer = hidden(tokenizer, content, True).rpartition("</think>")
    if close and thoughts.strip() not in tail:
        answer_end = tail.find(answer.strip()) + len(answer.strip())
        return (
            thoughts.partition("<think>")[2 if "<think>" in thoughts else 0].lstrip("\n")
            + close
            + answer
            + tail[answer_end:]
        )
    return tail if close or "</think>" in tail else f"\n</think>\n\n{tail}"


def keeps_thoughts(tokenizer: Any, message: dict, text: str) -> bool:
    """Whether the thoughts that a reply's content holds are in its rendering."""
    thoughts, close, _ = hidden(tokenizer, message["content"], True).rpartition("</think>")
    return not close or message["role"] != "assistant" or thoughts.rpartition("<think>")[2].strip() in text


@functools.lru_cache(maxsize=4)
def shows_system(tokenizer: Any) -> bool:
    texts = [render(tokenizer, [{"role": "system", "content": x}, *PROBE[:1]], True) for x in ("b", "zebra")]
    return texts[0] != texts[1]


def refuse_unseen(tokenizer: Any, messages: Messages) -> None:
    """End the run if the template shows nothing of what a message says beside its content, or of its content."""
    if tokenizer.chat_template is None:
        return
    refuse_unknown(tokenizer, messages[0].get("chat_template_kwargs", {}))
    ask = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    for i, m in enumerate(messages):
        names = {"tools", "tool_calls", "reasoning_content"} & m.keys()
        if m["content"] and (m["role"] == "tool" or names):
            names.add("content")
        upto = messages[: max(i + 1, ask)]
        for name in names:
            other = {**m, name: "zebra"} if name == "content" else {k: x for k, x in m.items() if k != name}
            if render(tokenizer, upto, False) == render(tokenizer, [*upto[:i], other, *upto[i + 1 :]], False):
                raise dist.RunError(
                    f"cannot be encoded: the chat template does not show the {name} of a turn of {m['role']}"
                )
        if m["role"] == "system" and not shows_system(tokenizer):
            raise dist.RunError("cannot be encoded: the chat template does not show a system turn")


def encode_prompt(tokenizer: Any, prompt: Messages | str, label: str = "") -> list[int]:
    """Tokens to generate from: messages under the template, a string as plain text; then the label."""
    plain = isinstance(prompt, str)
    if not plain:
        refuse_unseen(tokenizer, prompt)
    text = prompt if plain else render(tokenizer, prompt, True)
    return list(tokenize(tokenizer, text + labelled(tokenizer, label), plain))


def labelled(tokenizer: Any, line: str) -> str:
    """A label line as it stands before a reply: after the template's label_token, where it sets one."""
    token = re.search(r"set label_token = '(.*?)'", tokenizer.chat_template or "") if line else None
    return token[1] + line if token else line


# -------------------------------------------------------------------------------------------------- data sets


MASKS = ("attention_mask", "completion_mask", "assistant_masks", "loss_mask")  # beside input_ids; 1 is used


def read_tokens(tokenizer: Any, value: dict, where: str) -> Tokens | None:
    """Token ids with labels, -100 where not trained; or a text alone, trained as a whole; else None."""
    if "input_ids" in value:
        tokens = np.asarray(value["input_ids"])
        columns = [np.asarray(value[name]) for name in ("labels", *MASKS) if value.get(name) is not None]
        fits = tokens.dtype.kind == "i" and all(tokens.shape == column.shape for column in columns)
        if not fits or tokens.min() < 0 or tokens.max() >= len(tokenizer):
            raise wrong(where, "other input_ids or labels", f"ids below {len(tokenizer)}, and as many labels")
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
        tokens = encode_prompt(tokenizer, value["text"])
        tokens += [end_token(tokenizer)] if tokens[-1:] != [end_token(tokenizer)] else []
        return Tokens(np.array(tokens, np.int32), np.ones(len(tokens), bool))
    return None


def encode_response(tokenizer: Any, prompt: Messages, response: Messages) -> Tokens:
    """Tokens of both; the mask is on the response's turns of the assistant.

    Raises:
        RunError: the response has several, and the template rewrites the first of them.
    """
    trained = [False] * len(prompt) + [m.get("trained", m["role"] == "assistant") for m in response]
    tokens, *others = encode_chat(tokenizer, prompt + response, trained)
    if others:
        raise dist.RunError(
            "cannot be encoded: the chat template changes earlier turns, and the response has several"
        )
    return tokens


def read_responses(tokenizer: Any, value: dict, where: str) -> list[Tokens]:
    """The responses of a record of any kind, each after its prompt: one, two of a pair, or `responses`."""
    with encoding(where):
        refuse_fields(value, where)
        if value.get("responses") is not None:
            prompt = read_prompt(tokenizer, value, where)
            sides = [as_turns(tokenizer, response, where, "assistant") for response in value["responses"]]
        elif first(value, (*CHOSEN, *REJECTED, "preference_strength")) is not None:
            prompt, *sides, _ = read_pair(tokenizer, value, where)
        else:
            prompt, response = read_exchange(tokenizer, value, where)
            sides = [response]
        return [encode_response(tokenizer, prompt, side) for side in sides]


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
        turns, trained = prompt + response, trained_turns(value, prompt + response)
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

    datasets = load(tokenizer, "sft", encode, dataset, eval_dataset, max_length)
    split = [len(e.sequences) for examples in datasets for e in examples if len(e.sequences) > 1]
    if dist.is_main() and split:
        print(
            f"sft: {len(split):,} conversations became {sum(split):,} sequences, one a reply: the chat "
            "template changes earlier turns as a conversation grows",
            flush=True,
        )
    return datasets


def says_something(message: dict) -> bool:
    return bool(message["content"].strip() or message.keys() & {"tool_calls", "reasoning_content"})


def load_pairs(
    tokenizer: Any, dataset: str, eval_dataset: str, max_length: int, cut: str = "end"
) -> tuple[Dataset, Dataset]:
    """(train, eval) preferences: chosen, rejected, PAIR_FIELDS as fields; cut: "end", "start" or "drop"."""

    def encode(value: dict, where: str) -> Example:
        prompt, chosen, rejected, numbers = read_pair(tokenizer, value, where)
        if not says_something(chosen[-1]) and not says_something(rejected[-1]) or chosen == rejected:
            raise LeftOut("chosen and rejected alike")
        if not says_something(chosen[-1]):
            raise LeftOut("an empty chosen reply")
        sequences = [encode_response(tokenizer, prompt, side) for side in (chosen, rejected)]
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
        return Example([encode_response(tokenizer, prompt, side) for side in sides], prompt, fields)

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
        return Example([encode_response(tokenizer, prompt, response)], prompt, read_label(value, where))

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


@functools.cache
def positions_of(folder: str) -> float:
    """`packed.position_limit` of the model in a folder or with a hub id; adapters have that of their base."""
    from transformers import AutoConfig

    try:
        adapter = Path(folder) / "adapter_config.json"
        if adapter.exists():
            folder = json.loads(adapter.read_text())["base_model_name_or_path"]
        return packed.position_limit(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError):  # a GGUF file, or a tokenizer alone
        return math.inf


def load(
    tokenizer: Any,
    kind: str,
    encode: Callable[[dict, str], Example],
    dataset: str,
    eval_dataset: str,
    max_length: int,
    cut: str = "end",
    scored: bool = True,
) -> tuple[Dataset, Dataset]:
    """(train, eval): read, encode (the ranks share the work), fit, hold out where there is no test split.

    What is cut and what is left out, and why, is counted and printed.

    Args:
        kind: the toy world's folder.
        cut: what a sequence of more than max_length tokens loses, its "end" or its "start"; "drop" leaves
            the example out.
        scored: False for prompts, in which no token is scored.
    """
    option = "max_length" if scored else "max_prompt_length"  # what the user would change
    # a prompt needs room for one token of a reply
    most = positions_of(getattr(tokenizer, "name_or_path", "")) - (not scored)
    tell = functools.partial(print, f"{kind}:", flush=True) if dist.is_main() else lambda *_: None
    if max_length > most:
        tell(f"{option} {max_length} is more than the model takes; it is {most} now")
        max_length = most
    for note in template_notes(tokenizer):
        tell(note)

    def attempt(record: Record) -> tuple[bool, Example] | str:
        """(whether it was cut, the example), or why it is left out."""
        try:
            with encoding(record.where):
                refuse_fields(*record)
                refuse_rendered(tokenizer, *record)
                example = encode(*record)
            return fit(example, kind, max_length, cut, option)
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
        for record, item in zip(records, found, strict=True):
            if not isinstance(item, str):
                item[1].record = record.value
        kept = [item for item in found if not isinstance(item, str)]
        reasons = Counter(reason for reason in found if isinstance(reason, str))
        whys = ", ".join(f"{count:,} with {reason}" for reason, count in reasons.items())
        num_cut = sum(is_cut for is_cut, _ in kept)
        if num_cut:
            tell(f"{source}: {num_cut:,} cut at the {cut}, by {option} {max_length}")
        if whys:
            tell(f"{source}: dropped {whys}")
        if not kept:
            is_long = any(option in reason for reason in reasons)
            expected = f"a larger {option} than {max_length}" if is_long else "replies to train on"
            raise wrong(f"dataset {source}", f"nothing to train on, {whys}", expected)
        return [example for _, example in kept]

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


def fit(example: Example, kind: str, max_length: int, cut: str, option: str) -> tuple[bool, Example]:
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
    if not kept or (len(kept) < len(sequences) and kind != "sft"):
        raise LeftOut(f"no scored token within {limit}" if is_long else "no reply to train on")
    if kind == "pairs" and all(np.array_equal(kept[0].ids, other.ids) for other in kept[1:]):
        raise LeftOut(f"sides that are alike{f' within {limit}' * is_long}")
    example.sequences = kept
    return is_long, example


def refuse_rendered(tokenizer: Any, value: dict, where: str) -> None:
    """End the run for a text that has been through a chat template: it would go through it twice."""
    if tokenizer.chat_template is None:
        return
    marks, start = special_tokens(tokenizer, True), opening(tokenizer, PROBE[:1])
    start = special_tokens(tokenizer).sub("", start).strip()
    end = tokenizer.decode([end_token(tokenizer)])
    for name in (*PROMPTS[:-1], *RESPONSES, *CHOSEN, *REJECTED):
        text = value.get(name)
        text = text.strip() if isinstance(text, str) else ""
        if (
            marks.match(text)
            or text.endswith(end)
            or (start[:1] in "[<#|" and start and text.startswith(start))
        ):
            raise wrong(
                where, f"{name} {text!r}", "a text without the chat template's own marks, or messages"
            )


def template_notes(tokenizer: Any) -> Iterator[str]:
    """What to know about a template before it is trained with."""
    if "strftime_now(" in str(tokenizer.chat_template):
        day = getattr(tokenizer, "day", DAY)
        yield f"the chat template writes the date, here always {day}; strftime_now in chat_template_kwargs sets it"
    if tokenizer.chat_template is not None:
        asked, full = render(tokenizer, PROBE[:1], True), render(tokenizer, PROBE, False)
        extra = asked[common_prefix(asked, full) :]
        if extra:
            yield (
                f"the chat template ends the header of a reply with {extra!r}, which it leaves out of a reply that "
                "is there: replies are trained after that header, as they are generated"
            )


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
