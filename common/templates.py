"""Templates: a conversation under a tokenizer's chat template -> tokens, and the mask of what is trained.

A reply is trained after exactly what generation would start it from. What a template cannot show, or changes
so that this cannot be, ends the run with one line. No markers in the template are needed: what a turn is
follows from renderings of the conversation with and without it.
"""

import contextlib
import datetime
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common import dist, tokenizing
from common.files import model_folder
from common.formats import (
    CHOSEN,
    CONVERSATIONS,
    PROMPTS,
    REJECTED,
    RESPONSES,
    ROLES,
    SHOWN,
    Messages,
    common_prefix,
    first,
    first_line,
    from_json,
    wrong,
)
from common.packed import Tokens
from common.tokenizing import BREAK, Marked, Steps, adds_bos, alone, encoding, shared, tokenize

CHATML = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
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
        file = {"gguf_file": gguf} if gguf else {}
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **file)
    except Exception as error:  # it has code of its own
        gone = "no such folder; as a hub id it could not be reached"
        problem = "its tokenizer cannot be read" if Path(folder).exists() else gone
        raise dist.RunError(f"model {model}: {problem}: {first_line(error)}") from error
    try:
        if chat_template == "chatml":
            end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token or ""
            begin = "{{ bos_token }}" if adds_bos(tokenizer) else ""
            tokenizer.chat_template = begin + CHATML.replace("<|im_end|>", end)
        elif chat_template:
            tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
        if "strftime_now(" in str(tokenizer.chat_template):
            tokenizer.day = DAY
        if chat_template_kwargs:
            set_defaults(tokenizer, chat_template_kwargs)
        end_token(tokenizer)  # a template that fails does so here
        generation_ends(tokenizer)
    except Exception as error:  # a template may raise anything
        if isinstance(error, dist.RunError) and "cannot be encoded" not in str(error):
            raise
        template = f"chat_template {chat_template}" if chat_template else "its own chat template"
        raise dist.RunError(f"the tokenizer of {model} with {template}: {first_line(error)}") from error
    return tokenizer


def set_defaults(tokenizer: Any, chat_template_kwargs: str) -> None:
    """Write variables into the chat template, as what they are where nobody sets them."""
    given = from_json(chat_template_kwargs, "chat_template_kwargs", "the option", dict)
    refuse_unknown(tokenizer, given)
    tokenizer.day = given.pop("strftime_now", getattr(tokenizer, "day", None))
    own, start = tokenizer.chat_template, ""
    for name, value in given.items():
        start += f"{{%- if {name} is not defined %}}{{%- set {name} = {json.dumps(value)} %}}{{%- endif %}}"
    if isinstance(own, dict):  # several by name, of which the call chooses one
        tokenizer.chat_template = {name: start + text for name, text in own.items()}
    elif not own.startswith(start):
        tokenizer.chat_template = start + own


def refuse_unknown(tokenizer: Any, given: dict) -> None:
    """End the run for a variable that the template does not name."""
    for name in (name for name, value in given.items() if value not in ("", [], {})):
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template or "")):
            raise wrong("chat_template_kwargs", name, "a variable that the chat template reads")


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer: Any, marks: bool = False) -> re.Pattern:
    """Matches the spelling of any special token; with `marks` of those alone that mark the turns."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if marks:
        probe = render(tokenizer, PROBE, False)
        ends = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
        names = [name for name in names if (name in probe or name in ends) and "think" not in name]
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
            shown = tokenizer.apply_chat_template(asked, tokenize=False)
            if "zebra" in shown and "'type'" not in shown:  # no list written out as Python does
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
            day = given.get("strftime_now", getattr(tokenizer, "day", None) or DAY)
            template = dated(template, day)
        is_plain = turns and not tools and not given and all(len(turn) == 2 for turn in turns)
        if is_plain and (found := compiled(tokenizer, template)):
            return found.render(**variables(tokenizer, turns, for_reply))
        how = {**given, "tools": tools, "chat_template": template}
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=for_reply, **how)


def variables(tokenizer: Any, turns: list[dict], for_reply: bool) -> dict[str, Any]:
    """What the library lets a template see of turns with nothing but a role and a content."""
    own = {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": for_reply}
    return tokenizer.special_tokens_map | own


@functools.lru_cache(maxsize=8)
def compiled(tokenizer: Any, template: str) -> Any:
    """The template as the library compiles it, without the copies that cost as much; None if unlike."""
    from transformers.utils import chat_template_utils

    try:
        found = chat_template_utils._compile_jinja_template(template)
        for for_reply in (False, True):
            how = {"chat_template": template, "add_generation_prompt": for_reply, "tokenize": False}
            shown = tokenizer.apply_chat_template(PROBE, **how)
            if found.render(**variables(tokenizer, PROBE, for_reply)) != shown:
                return None
    except Exception:  # a template may raise anything
        return None
    return found


@functools.lru_cache(maxsize=8)
def dated(template: str, day: str) -> str:
    """A template in which each call of strftime_now is what it gives on that day."""
    calls = r"strftime_now\(\s*(['\"])(.*?)\1\s*\)"
    date = datetime.date.fromisoformat(day)
    return re.sub(calls, lambda m: m[1] + date.strftime(m[2]) + m[1], template)


@functools.lru_cache(maxsize=2)
def end_token(tokenizer: Any) -> int:
    """The token that ends an assistant turn: trained once per turn, and where generation stops."""
    end = tokenizer.eos_token_id
    if tokenizer.chat_template:
        _, reply, tail = render(tokenizer, PROBE, False).rpartition("zebra")
        if not reply:
            raise dist.RunError("cannot be encoded: the chat template does not show what the assistant says")
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        ends = [token for token in tokenize(tokenizer, tail) if token in special]
        if not ends:  # GLM's turns end where the next begins, with a token that its generation stops at
            tail = render(tokenizer, [*PROBE, PROBE[0]], False).partition("zebra")[2]
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
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int for end in ends):
        place = f"generation_config.json of {tokenizer.name_or_path}"
        raise wrong(place, f"eos_token_id {ends}", "token ids")
    return ends


def encode_chat(
    tokenizer: Any, messages: Messages, trained: list[bool], lossless: bool = True
) -> list[Tokens]:
    """Tokens of a conversation and the mask of its trained turns, each up to and including its end token.

    One sequence where what generation would start a reply from is a beginning of it for every trained reply.
    A template that rewrites earlier turns gives one for each trained turn, after the turns before it as
    generation would see them.

    Args:
        lossless: refuse a template that leaves out the thoughts in the content of a trained reply, or changes
            what replies say. Those that are scored as they are generated may not end a run.

    Raises:
        RunError: the template does not take the conversation, or loses a part of it.
    """
    return alone(tokenizer, chat_steps(tokenizer, messages, trained, lossless))


def chat_steps(tokenizer: Any, messages: Messages, trained: list[bool], lossless: bool = True) -> Steps:
    """As `encode_chat`, for `together`."""
    spans = [i for i, t in enumerate(trained) if t]
    if not spans:
        return [Tokens(np.zeros(0, np.int32), np.zeros(0, bool))]
    messages = messages[: spans[-1] + 1]
    refuse_unseen(tokenizer, messages)
    text = render(tokenizer, messages, False)
    refuse_changed(tokenizer, [m for m in messages if lossless or m["role"] == "user"], text)
    whole = encode_whole(tokenizer, messages, spans, text, (yield text))
    return [whole] if whole else [encode_turn(tokenizer, messages[: i + 1], lossless) for i in spans]


def encode_whole(
    tokenizer: Any, messages: Messages, spans: list[int], text: str, found: Marked
) -> Tokens | None:
    """One sequence for all trained turns; None if what comes later changes a turn, or the header of a reply.

    The span of a turn is what rendering it adds to the conversation before it (and to a reply's header), so
    no markers in the template are needed.
    """
    tokens, end = tuple(found.tokens), end_token(tokenizer)
    mask = np.zeros(len(tokens), bool)
    for i in spans:
        is_reply = messages[i]["role"] == "assistant"
        before, turn = context_of(tokenizer, messages[: i + 1]), text
        if i < spans[-1]:
            turn = render(tokenizer, messages[: i + 1], False)
        # a token across the boundary belongs to the turn that completes it
        start, is_uncut = shared(tokenizer, text, found, before)
        stop = shared(tokenizer, text, found, turn)[0] if i < spans[-1] else len(tokens)
        has_end = end in tokens[start:stop]
        if (not is_uncut and is_reply and i > 0) or not (text.startswith(before) and turn.startswith(before)):
            return None
        if not (text.startswith(turn) or has_end) or not keeps_thoughts(tokenizer, messages[i], text):
            return None
        if has_end:
            stop = tokens.index(end, start) + 1
        elif tokens[stop : stop + 1] == (end,):  # the next turn begins with it
            stop += 1
        mask[start:stop] = True
    tokens, mask = tokens[:stop], mask[:stop]  # what follows the last end token is never scored
    # a template may have no end tokens
    if is_reply and tokens[-1] != end and not tokenizing.is_special(tokenizer, tokens[-1]):
        tokens, mask = (*tokens, end), np.append(mask, True)
    return Tokens(np.array(tokens, np.int32), mask)


def encode_turn(tokenizer: Any, messages: Messages, lossless: bool) -> Tokens:
    """A conversation of which the last turn is trained, after what generation sees of those before it."""
    before, end = context_of(tokenizer, messages), end_token(tokenizer)
    prompt, tail = tokenize(tokenizer, before), rendered_turn(tokenizer, messages, before)
    if lossless and not keeps_thoughts(tokenizer, messages[-1], tail):
        raise dist.RunError("cannot be encoded: the chat template leaves out the thoughts of a trained reply")
    tokens = tokenize(tokenizer, before + tail)
    if tokens[: len(prompt)] != prompt:  # a token across the boundary, which generation would not see
        tokens = tokenize(tokenizer, before + BREAK + tail)
    if end in tokens[len(prompt) :]:
        tokens = tokens[: tokens.index(end, len(prompt)) + 1]
    elif messages[-1]["role"] == "assistant" and not tokenizing.is_special(
        tokenizer, tokens[-1]
    ):  # as <|call|>
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
            system = ", the system turn too" * (messages[0]["role"] == "system")
            raise dist.RunError(f"cannot be encoded: the chat template changes earlier turns{system}")
    if not before.startswith(history):
        raise dist.RunError("cannot be encoded: the header of a reply changes what is before it")
    header = before[len(history) :]
    same = min(common_prefix(header, full[at:]), start - at)
    if cut := re.search(r"[<\[][^<>\[\]]*$", header[:same]):  # not within a mark: <think>, </think>
        same = cut.start()
    tail, marks = full[at + same :], re.findall(A_MARK, header[same:])
    label = labelled(tokenizer, last.get("label", ""))
    if re.sub(A_MARK, "", header[same:].replace(label, "", 1)).strip():
        begins = f"{header.strip()!r} when it is asked for, with {full[at:start].strip()!r} when it is there"
        raise dist.RunError(f"cannot be encoded: the chat template begins a reply with {begins}")
    mark, close = thought_marks(tokenizer)
    if close.strip() in marks and close.strip() in tail:
        raise dist.RunError("cannot be encoded: a reply has thoughts after a header that ends them")
    if mark in marks and close.strip() not in marks:
        tail = with_thoughts(tokenizer, last["content"], tail)
    return tail.replace(label, "", 1)


A_MARK = r"<[^<>\s]+>|\[/?[A-Z_]+\]"  # <think>, <|end|>, [/THINK]


@functools.lru_cache(maxsize=4)
def thought_marks(tokenizer: Any) -> tuple[str, str]:
    """The mark that opens thoughts, and the text that ends them: what the template writes around a reply's
    reasoning_content; if it takes none, what a reply's header opens and template or vocabulary can close.

    Raises:
        RunError: the header opens a mark that nothing closes.
    """
    reply = {"role": "assistant", "content": "yak", "reasoning_content": "zebra"}
    with contextlib.suppress(dist.RunError):  # it may refuse what it does not know
        before, shown, after = render(tokenizer, [PROBE[0], reply], False).partition("zebra")
        opened = re.search(rf"({A_MARK})\s*(\w+\s*)?$", before)  # Gemma 4: <|channel>thought
        closed = re.match(rf"\s*({A_MARK})\s*", after) if shown else None
        if opened and closed and not (opened[2] and special_tokens(tokenizer, True).fullmatch(opened[1])):
            return opened[1], closed[0]
    asked, full = render(tokenizer, PROBE[:1], True), render(tokenizer, PROBE, False)
    extra = re.findall(A_MARK, asked[common_prefix(asked, full) :])
    known = f"{tokenizer.chat_template} {' '.join(tokenizer.get_added_vocab())}"
    for mark in extra:
        if tokenizing.closing(mark) not in known:
            if special_tokens(tokenizer).fullmatch(mark) or "/" in mark:
                continue  # it stands alone, or ends another
            raise dist.RunError(
                f"cannot be encoded: the header of a reply opens {mark}, which replies leave out, and the "
                f"template has no {tokenizing.closing(mark)} to close it with"
            )
        return mark, f"\n{tokenizing.closing(mark)}\n\n"
    return "<think>", "\n</think>\n\n"


def with_thoughts(tokenizer: Any, content: str, tail: str) -> str:
    """A rendered reply after a header that opens its thoughts: with these, or closed at once."""
    mark, ending = thought_marks(tokenizer)
    thoughts, close, answer = hidden(tokenizer, content, True).rpartition(ending.strip())
    if ending.strip() in tail:
        return tail
    if close and answer.strip() in tail:
        rest = tail[tail.find(answer.strip()) + len(answer.strip()) :]
        return thoughts.removeprefix(mark).lstrip("\n") + close + answer + rest
    return ending + tail


def pieces(tokenizer: Any, message: dict) -> list[str]:
    """The texts that a rendering of a turn has to hold: its content, of a reply cut at marks of thoughts."""
    content = hidden(tokenizer, message["content"], message["role"] == "assistant")
    if message["role"] == "assistant":
        return [piece.strip() for piece in around_thoughts(tokenizer).split(content)]
    return [content.strip()]


@functools.lru_cache(maxsize=4)
def around_thoughts(tokenizer: Any) -> re.Pattern:
    mark, ending = thought_marks(tokenizer)
    return re.compile("|".join(map(re.escape, (mark, ending.strip(), "<think>", "</think>"))))


def keeps_thoughts(tokenizer: Any, message: dict, text: str) -> bool:
    """Whether the thoughts that a reply's content holds are in its rendering."""
    return all(piece in text for piece in pieces(tokenizer, message)[:-1])


def refuse_changed(tokenizer: Any, messages: Messages, text: str) -> None:
    """End the run if the rendering lacks what a user or the assistant says; thoughts are left to others."""
    at = 0
    for m in messages if tokenizer.chat_template is not None else ():
        said = pieces(tokenizer, m)[-1] if m["role"] in ("user", "assistant") else ""
        mark, ending = thought_marks(tokenizer) if m["role"] == "assistant" else ("", "")
        if mark and m["content"].lstrip().startswith(mark) and ending.strip() not in m["content"]:
            raise dist.RunError(f"cannot be encoded: a reply opens {mark}, and nothing closes it")
        at = text.find(said, at)
        if at < 0:
            reason = "the chat template changes or leaves out a text of"
            raise dist.RunError(f"cannot be encoded: {reason} {m['role']}: {said[:60]!r}")
        at += len(said)


@functools.lru_cache(maxsize=4)
def shows_system(tokenizer: Any) -> bool:
    texts = [render(tokenizer, [{"role": "system", "content": x}, *PROBE[:1]], True) for x in ("b", "zebra")]
    return texts[0] != texts[1]


def refuse_unseen(tokenizer: Any, messages: Messages) -> None:
    """End the run if the template shows nothing of something that a message says."""
    seen = {"tools", "tool_calls", "reasoning_content"}
    if tokenizer.chat_template is None:
        unseen = [name for m in messages for name in (*seen, "chat_template_kwargs") if m.get(name)]
        if unseen:
            raise dist.RunError(f"cannot be encoded: there is no chat template that shows the {unseen[0]}")
        return
    refuse_unknown(tokenizer, messages[0].get("chat_template_kwargs", {}))
    ask = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    for i, m in enumerate(messages):
        names = seen & m.keys()
        if m["content"] and (m["role"] == "tool" or names or (m["role"] == "system" and i > 0)):
            names.add("content")
        upto = messages[: max(i + 1, ask)]
        others = [(name, without(m, name)) for name in names]
        calls = m.get("tool_calls", [])  # of several each must be shown
        rests = [[*calls[:k], *calls[k + 1 :]] for k in range(len(calls))] if len(calls) > 1 else []
        for name, other in others + [("tool_calls", {**m, "tool_calls": rest}) for rest in rests]:
            if render(tokenizer, upto, False) == render(tokenizer, [*upto[:i], other, *upto[i + 1 :]], False):
                what = name if name == "tools" else f"{name} of a turn of {m['role']}"
                raise dist.RunError(f"cannot be encoded: the chat template does not show the {what}")
        if m["role"] == "system" and not shows_system(tokenizer):
            raise dist.RunError("cannot be encoded: the chat template does not show a system turn")


def without(message: dict, name: str) -> dict:
    """A message with another content, or without something else."""
    rest = {key: value for key, value in message.items() if key != name}
    return {**rest, "content": "zebra"} if name == "content" else rest


def encode_response(tokenizer: Any, prompt: Messages, response: Messages, lossless: bool = False) -> Tokens:
    """Tokens of both; the mask is on the response's turns of the assistant. lossless: as in `encode_chat`.

    Raises:
        RunError: the response has several, and the template rewrites the first of them.
    """
    return alone(tokenizer, response_steps(tokenizer, prompt, response, lossless))


def response_steps(tokenizer: Any, prompt: Messages, response: Messages, lossless: bool = False) -> Steps:
    """As `encode_response`, for `together`."""
    trained = [False] * len(prompt) + [m.get("trained", m["role"] == "assistant") for m in response]
    tokens, *others = yield from chat_steps(tokenizer, prompt + response, trained, lossless)
    if others:
        raise dist.RunError("cannot be encoded: the chat template changes a response of several turns")
    return tokens


def encode_prompt(tokenizer: Any, prompt: Messages | str, label: str = "") -> list[int]:
    """Tokens to generate from: messages under the template, a string as plain text; then the label."""
    return alone(tokenizer, prompt_steps(tokenizer, prompt, label))


def prompt_steps(tokenizer: Any, prompt: Messages | str, label: str = "") -> Steps:
    """As `encode_prompt`, for `together`."""
    if isinstance(prompt, str):
        return list(tokenize(tokenizer, prompt + labelled(tokenizer, label), True))
    refuse_unseen(tokenizer, prompt)
    text = render(tokenizer, prompt, True)
    refuse_changed(tokenizer, [m for m in prompt if m["role"] == "user"], text)
    return list((yield text + labelled(tokenizer, label)).tokens)


def check_prompts(tokenizer: Any, prompts: list[Messages], what: str) -> None:
    """End the run now if the chat template does not take a reply after one of the prompts."""

    def check(prompt: Messages) -> None:
        with encoding(f"{what}: after the prompt {str(prompt)[:80]}"):
            encode_response(tokenizer, prompt, [{"role": "assistant", "content": "a"}])

    dist.parallel_map(check, prompts)


def labelled(tokenizer: Any, line: str) -> str:
    """A label line as it stands before a reply: after the template's label_token, where it sets one."""
    token = re.search(r"set label_token = '(.*?)'", tokenizer.chat_template or "") if line else None
    return token[1] + line if token else line


# how families in wide use begin a rendered conversation
COMMON = r"(?:<s>|<bos>)?\s*(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\])"


@functools.lru_cache(maxsize=4)
def beginnings(tokenizer: Any) -> re.Pattern:
    """Matches a text that begins as a chat template begins one."""
    start = special_tokens(tokenizer).sub("", opening(tokenizer, PROBE[:1])).strip()
    own = [re.escape(start)] if start[:1] in ("[", "<", "#", "|") else []
    return re.compile("|".join([COMMON, special_tokens(tokenizer, True).pattern, *own]))


def refuse_rendered(tokenizer: Any, value: dict, where: str) -> None:
    """End the run for a text that has been through a chat template: it would go through it twice."""
    if tokenizer.chat_template is None:
        return
    begins, end = beginnings(tokenizer), tokenizer.decode([end_token(tokenizer)])
    names = (*CONVERSATIONS, *PROMPTS[:-1], *RESPONSES, *CHOSEN, *REJECTED)
    for name, given in ((name, value.get(name)) for name in names):
        for said in given if isinstance(given, list) else [given]:
            role = str(first(said, ("role", "from"))).lower() if isinstance(said, dict) else ""
            text = first(said, ("content", "value")) if ROLES.get(role) == "assistant" else said
            text = text.strip() if isinstance(text, str) and "<|message|>" not in text else ""
            if begins.match(text) or text.endswith(end):
                expected = "a text without the chat template's own marks, or messages"
                raise wrong(where, f"{name} {text!r}", expected)


def template_notes(tokenizer: Any) -> Iterator[str]:
    """What to know about a template before it is trained with."""
    if "strftime_now(" in str(tokenizer.chat_template):
        day = getattr(tokenizer, "day", None) or DAY
        yield f"the chat template writes the date, always {day}; strftime_now in chat_template_kwargs sets it"
    if tokenizer.chat_template is None:
        yield (
            "no chat template: a completion, chosen, rejected or responses follow the prompt as they stand, "
            "white space or none between, as in TRL; a response, output or answer after a space"
        )
    else:
        asked, full = render(tokenizer, PROBE[:1], True), render(tokenizer, PROBE, False)
        extra = asked[common_prefix(asked, full) :]
        if extra:
            yield (
                f"the chat template ends the header of a reply with {extra!r}, but leaves it out of replies; "
                "they are trained after that header, as they are generated"
            )
