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
from typing import Any, NamedTuple

import numpy as np

from common import dist, formats, tokenizing
from common.files import model_folder
from common.formats import SHOWN, Messages, common_prefix, first_line, wrong
from common.packed import Tokens
from common.tokenizing import BREAK, common_start, encoding, special_ids, special_tokens, tokenize

CHATML = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
DAY = "2026-01-01"  # what a template that writes the date is told, so that tokens are the same on every day
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "zebra"}]


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
    own_file = Path(chat_template).expanduser() if chat_template not in ("", "chatml") else None
    if own_file and not own_file.is_file():
        raise dist.RunError(f"chat_template {chat_template}: no such file; expected chatml or a Jinja file")
    template = f"chat_template {chat_template}" if chat_template else "its own chat template"
    with encoding(f"the tokenizer of {model} with {template}"):
        if chat_template == "chatml":
            end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token or ""
            begin = "{{ bos_token }}" if tokenizing.adds_bos(tokenizer) else ""
            tokenizer.chat_template = begin + CHATML.replace("<|im_end|>", end)
        elif own_file:
            tokenizer.chat_template = own_file.read_text(encoding="utf-8")
        if "strftime_now(" in str(tokenizer.chat_template):
            tokenizer.day = DAY
        if chat_template_kwargs:
            set_defaults(tokenizer, chat_template_kwargs)
        end_token(tokenizer)  # a template that fails does so here
        generation_ends(tokenizer)
    return tokenizer


def set_defaults(tokenizer: Any, chat_template_kwargs: str) -> None:
    """Write variables into the chat template, as what they are where nobody sets them."""
    given = formats.from_json(chat_template_kwargs, "chat_template_kwargs", "the option", dict)
    refuse_unknown(tokenizer, given)
    if "strftime_now" in given:
        tokenizer.day = given.pop("strftime_now")
    own, start = tokenizer.chat_template, ""
    for name, value in given.items():
        start += f"{{%- if {name} is not defined %}}{{%- set {name} = {json.dumps(value)} %}}{{%- endif %}}"
    if isinstance(own, dict):  # several by name, of which the call chooses one
        tokenizer.chat_template = {name: start + text for name, text in own.items()}
    elif not own.startswith(start):
        tokenizer.chat_template = start + own


def refuse_unknown(tokenizer: Any, given: dict) -> None:
    """End the run for a variable that the template does not name."""
    text = str(tokenizer.chat_template or "")
    for name, value in given.items():
        if value not in ("", [], {}) and not re.search(rf"\b{re.escape(name)}\b", text):
            raise wrong("chat_template_kwargs", name, "a variable that the chat template reads")


# ------------------------------------------------------------------------------------------------- renderings


def fill(
    tokenizer: Any, turns: list[dict], for_reply: bool, tools: Any = None, given: dict | None = None
) -> str:
    """What `apply_chat_template` writes of turns, of which it would make copies that take as long.

    Args:
        given: variables of the template; strftime_now is the day.
    """
    from transformers.utils import chat_template_utils

    template = chat_template_utils._compile_jinja_template(tokenizer.get_chat_template(tools=tools))
    seen = tokenizer.special_tokens_map | (given or {})
    day = datetime.date.fromisoformat(seen.get("strftime_now") or getattr(tokenizer, "day", DAY))
    seen |= {"messages": turns, "tools": tools, "documents": None, "strftime_now": day.strftime}
    return template.render(**seen, add_generation_prompt=for_reply)


def render(tokenizer: Any, messages: Messages, for_reply: bool) -> str:
    """A conversation under the chat template; for_reply adds the header of the assistant's next turn.

    A special token that a message spells out stays text. Without a template the turns are plain text and
    joined as they stand.

    Raises:
        RunError: the template does not take the conversation.
    """
    if tokenizer.chat_template is None:
        return "".join(m.get("label", "") + m["content"] for m in messages)
    with encoding():
        turns = []
        for m in messages:
            turn = {name: hidden(tokenizer, m[name], m["role"] == "assistant") for name in SHOWN if name in m}
            text = labelled(tokenizer, m.get("label", "")) + turn["content"]
            content = [{"type": "text", "text": text}] if takes_parts(tokenizer) else text
            thoughts = {"thinking": turn["reasoning_content"]} if "reasoning_content" in turn else {}
            turns.append({**turn, "role": m["role"], "content": content, **thoughts})  # thinking: of gpt-oss
        tools, given = hidden(tokenizer, messages[0].get("tools")), messages[0].get("chat_template_kwargs")
        return fill(tokenizer, turns, for_reply, tools, given)


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
    pattern = turn_marks(tokenizer) if is_own else special_tokens(tokenizer)
    return pattern.sub(lambda m: m[0][0] + BREAK + m[0][1:], value)


@functools.lru_cache(maxsize=4)
def turn_marks(tokenizer: Any) -> re.Pattern:
    """Matches the special tokens that begin and end turns."""
    probe = render(tokenizer, PROBE, False)
    ends = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    marks = special_ids(tokenizer).keys()
    names = [name for name in marks if (name in probe or name in ends) and "think" not in name]
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


@functools.lru_cache(maxsize=4)
def takes_parts(tokenizer: Any) -> bool:
    """Whether the template shows a content only as a list of parts, as those of models that see do."""
    for content in ("zebra", [{"type": "text", "text": "zebra"}]):
        with contextlib.suppress(Exception):  # a template may raise anything
            shown = fill(tokenizer, [{"role": "user", "content": content}], False)
            if "zebra" in shown and "'type'" not in shown:  # no list written out as Python does
                return not isinstance(content, str)
    return False


def labelled(tokenizer: Any, line: str) -> str:
    """A label line as it stands before a reply: after the template's label_token, where it sets one."""
    token = re.search(r"set label_token = '(.*?)'", str(tokenizer.chat_template)) if line else None
    return token[1] + line if token else line


@functools.lru_cache(maxsize=2)
def end_token(tokenizer: Any) -> int:
    """The token that ends an assistant turn: trained once per turn, and where generation stops."""
    end = tokenizer.eos_token_id
    if tokenizer.chat_template:
        _, reply, tail = render(tokenizer, PROBE, False).rpartition("zebra")
        if not reply:
            raise dist.RunError("cannot be encoded: the chat template does not show what the assistant says")
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        ends = [token for token in tokenize(tokenizer, tail).tolist() if token in special]
        if not ends:  # GLM's turns end where the next begins, with a token that its generation stops at
            tail = render(tokenizer, [*PROBE, PROBE[0]], False).partition("zebra")[2]
            ends = [t for t in tokenize(tokenizer, tail).tolist() if t in generation_ends(tokenizer)]
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


# ----------------------------------------------------------------------------------------------------- turns


class Turn(NamedTuple):
    """A trained turn as generation would write it."""

    before: str  # what generation would see: the turns before, its header and its label
    text: str
    is_reply: bool


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
    places = [i for i, t in enumerate(trained) if t]
    if not places:
        return [Tokens(np.zeros(0, np.int32), np.zeros(0, bool))]
    messages = messages[: places[-1] + 1]
    refuse_unseen(tokenizer, messages)
    whole = render(tokenizer, messages, False)
    refuse_changed(tokenizer, [m for m in messages if lossless or m["role"] == "user"], whole)
    turns = []
    for i in places:
        upto = messages[: i + 1]
        turns.append(find_turn(tokenizer, upto, whole if i == places[-1] else render(tokenizer, upto, False)))
        thoughts = said(tokenizer, messages[i])[:-1] if lossless else []
        if not all(text in turns[-1].text for text in thoughts):
            reason = "the chat template leaves out the thoughts of a trained reply"
            raise dist.RunError(f"cannot be encoded: {reason}")
    together = mask_turns(tokenizer, whole, turns)
    return [together] if together else [by_itself(tokenizer, turn) for turn in turns]


def mask_turns(tokenizer: Any, text: str, turns: list[Turn]) -> Tokens | None:
    """The tokens of a text, up to the end of its last trained turn, and the mask of these turns.

    None if what generation would see before a reply is no beginning of it, or what comes later changes one.
    """
    tokens, end = tokenize(tokenizer, text), end_token(tokenizer)
    mask = np.zeros(len(tokens) + 1, bool)  # one more: a template may have no end tokens
    for turn in turns:
        if not text.startswith(turn.before):
            return None
        before = tokenize(tokenizer, turn.before)
        start = common_start(before, tokens)
        if turn.is_reply and start < len(before):
            return None
        # of another turn a token across the boundary belongs to the turn that completes it
        is_last, after = turn is turns[-1], turn.before + turn.text
        stop = len(tokens) if is_last else common_start(tokenize(tokenizer, after), tokens)
        if (is_end := tokens[start:stop] == end).any():
            stop = start + int(is_end.argmax()) + 1
        elif not is_last and not text.startswith(after):
            return None
        elif tokens[stop : stop + 1].tolist() == [end]:  # the next turn begins with it
            stop += 1
        mask[start:stop] = True
    tokens = tokens[:stop]  # what follows the last end token is never scored
    if turn.is_reply and tokens[-1] != end and tokens[-1] not in special_ids(tokenizer).values():  # <|call|>
        tokens, mask[stop] = np.append(tokens, end), True
    return Tokens(np.array(tokens, np.int32), mask[: len(tokens)])


def by_itself(tokenizer: Any, turn: Turn) -> Tokens:
    """A trained turn after what generation sees; a BREAK parts them where a token would join them."""
    found = mask_turns(tokenizer, turn.before + turn.text, [turn])
    return found or mask_turns(tokenizer, turn.before + BREAK + turn.text, [turn])


def find_turn(tokenizer: Any, messages: Messages, full: str) -> Turn:
    """The last turn in the rendering of a conversation, after what generation would start it from."""
    *context, last = messages
    is_reply, label = last["role"] == "assistant", labelled(tokenizer, last.get("label", ""))
    before = render(tokenizer, context, is_reply) + label if context else opening(tokenizer, messages)
    text = full[len(before) :] if full.startswith(before) else rewritten(tokenizer, messages, before, full)
    return Turn(before, text, is_reply)


def opening(tokenizer: Any, messages: Messages) -> str:
    """What the template puts before the content of the last turn: what its rendering shares with another."""
    *before, last = messages
    other = {**last, "content": "b" if last["content"].startswith("a") else "a"}
    return os.path.commonprefix([render(tokenizer, [*before, x], False) for x in (last, other)])


def rewritten(tokenizer: Any, messages: Messages, before: str, full: str) -> str:
    """The last turn where its rendering changes the turns before it, or the header that it is asked for with.

    It is found by the content of the turn before it, and by what the two headers share.

    Raises:
        RunError: it cannot be found; says what the template changes.
    """
    *context, last = messages
    start, history = len(opening(tokenizer, messages)), render(tokenizer, context, False)
    at = len(history)
    if not full.startswith(history):
        content = hidden(tokenizer, context[-1]["content"].strip())
        kept = history[history.rfind(content) :] if content and content in history else ""
        at = full.rfind(kept, 0, start) + len(kept)
        if not kept or at < len(kept):
            system = ", the system turn too" * (messages[0]["role"] == "system")
            raise dist.RunError(f"cannot be encoded: the chat template changes earlier turns{system}")
    if not before.startswith(history):
        raise dist.RunError("cannot be encoded: the header of a reply changes what is before it")
    header = before[len(history) :]
    same = common_prefix(header, full[at:start])
    if cut := re.search(r"[<\[][^<>\[\]]*$", header[:same]):  # not within a mark: <think>, </think>
        same = cut.start()
    label = labelled(tokenizer, last.get("label", ""))
    left, tail = header[same:].replace(label, "", 1), full[at + same :]
    if re.sub(A_MARK, "", left).strip():
        begins = f"{header.strip()!r} when it is asked for, with {full[at:start].strip()!r} when it is there"
        raise dist.RunError(f"cannot be encoded: the chat template begins a reply with {begins}")
    marks, thoughts = re.findall(A_MARK, left), thought_marks(tokenizer)
    if thoughts.close in marks and thoughts.close in tail:
        raise dist.RunError("cannot be encoded: a reply has thoughts after a header that ends them")
    if thoughts.open in marks and thoughts.close not in marks:
        tail = with_thoughts(tokenizer, last["content"], tail)
    return tail.replace(label, "", 1)


# --------------------------------------------------------------------------------------------------- thoughts

A_MARK = r"<[^<>\s]+>|\[/?[A-Z_]+\]"  # <think>, <|end|>, [/THINK]


class Thoughts(NamedTuple):
    open: str
    close: str
    ending: str  # close, and the white space around it


@functools.lru_cache(maxsize=4)
def thought_marks(tokenizer: Any) -> Thoughts:
    """What the template writes around a reply's reasoning_content; if it takes none, what a reply's header
    opens and template or vocabulary can close.

    Raises:
        RunError: the header opens a mark that nothing closes.
    """
    reply = {"role": "assistant", "content": "yak", "reasoning_content": "zebra"}
    with contextlib.suppress(dist.RunError):  # it may refuse what it does not know
        before, shown, after = render(tokenizer, [PROBE[0], reply], False).partition("zebra")
        opened = re.search(rf"({A_MARK})\s*(\w+\s*)?$", before)  # Gemma 4: <|channel>thought
        closed = re.match(rf"\s*({A_MARK})\s*", after) if shown else None
        if opened and closed and not (opened[2] and turn_marks(tokenizer).fullmatch(opened[1])):
            return Thoughts(opened[1], closed[1], closed[0])
    known = f"{tokenizer.chat_template} {' '.join(tokenizer.get_added_vocab())}"
    for mark in re.findall(A_MARK, header_only(tokenizer)):
        ends = re.sub(r"(begin|start)(?=_)", "end", mark)  # <|end_of_thought|> of <|begin_of_thought|>
        close = ends if ends != mark else mark[0] + "/" + mark[1:]
        if close in known:
            return Thoughts(mark, close, f"\n{close}\n\n")
        if not special_tokens(tokenizer).fullmatch(mark) and "/" not in mark:  # else alone, or another's end
            raise dist.RunError(
                f"cannot be encoded: the header of a reply opens {mark}, which replies leave out, and the "
                f"template has no {close} to close it with"
            )
    return Thoughts("<think>", "</think>", "\n</think>\n\n")


def header_only(tokenizer: Any) -> str:
    """What the header of a reply has where it is asked for, and not where the reply is there."""
    asked, full = render(tokenizer, PROBE[:1], True), render(tokenizer, PROBE, False)
    return asked[common_prefix(asked, full) :]


def with_thoughts(tokenizer: Any, content: str, tail: str) -> str:
    """A rendered reply after a header that opens its thoughts: with these, or closed at once."""
    mark, close, ending = thought_marks(tokenizer)
    thoughts, closed, answer = hidden(tokenizer, content, True).rpartition(close)
    if close in tail:
        return tail
    if closed and answer.strip() in tail:
        rest = tail[tail.find(answer.strip()) + len(answer.strip()) :]
        return thoughts.removeprefix(mark).lstrip("\n") + closed + answer + rest
    return ending + tail


def said(tokenizer: Any, message: dict) -> list[str]:
    """The texts that the rendering of a turn has to hold; of a reply its thoughts, and last its answer."""
    is_own = message["role"] == "assistant"
    content = hidden(tokenizer, message["content"], is_own)
    marks = (*thought_marks(tokenizer)[:2], "<think>", "</think>") if is_own else ()
    around = "|".join(re.escape(mark) for mark in marks if mark in content)
    return [piece.strip() for piece in re.split(around or "(?!)", content)]


# -------------------------------------------------------------------------------------- what would be lost


def refuse_changed(tokenizer: Any, messages: Messages, text: str) -> None:
    """End the run if the rendering lacks what a user or the assistant says; thoughts are left to others."""
    at = 0
    for m in messages if tokenizer.chat_template is not None else ():
        mark, close, _ = thought_marks(tokenizer) if m["role"] == "assistant" else ("", "", "")
        if mark and m["content"].lstrip().startswith(mark) and close not in m["content"]:
            raise dist.RunError(f"cannot be encoded: a reply opens {mark}, and nothing closes it")
        answer = said(tokenizer, m)[-1] if m["role"] in ("user", "assistant") else ""
        at = text.find(answer, at)
        if at < 0:
            reason = "the chat template changes or leaves out a text of"
            raise dist.RunError(f"cannot be encoded: {reason} {m['role']}: {answer[:60]!r}")
        at += len(answer)


def refuse_unseen(tokenizer: Any, messages: Messages) -> None:
    """End the run if the template shows nothing of something that a message says."""
    if tokenizer.chat_template is None:
        names = ("tools", "tool_calls", "reasoning_content", "chat_template_kwargs")
        for name in (name for m in messages for name in names if m.get(name)):
            raise dist.RunError(f"cannot be encoded: there is no chat template that shows the {name}")
        return
    refuse_unknown(tokenizer, messages[0].get("chat_template_kwargs", {}))
    ask = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    for i, m in enumerate(messages):
        upto = messages[: max(i + 1, ask)]
        for name, other in with_less(m):
            if render(tokenizer, upto, False) == render(tokenizer, [*upto[:i], other, *upto[i + 1 :]], False):
                what = name if name == "tools" else f"{name} of a turn of {m['role']}"
                raise dist.RunError(f"cannot be encoded: the chat template does not show the {what}")


def with_less(message: dict) -> Iterator[tuple[str, dict]]:
    """What a template may not show of a message, and the message without it, or with another content."""
    calls = message.get("tool_calls", [])
    less: list = [(name, None) for name in ("tools", "reasoning_content") if name in message]
    less += [("tool_calls", [*calls[:k], *calls[k + 1 :]] or None) for k in range(len(calls))]  # each
    if message["content"] and (less or message["role"] in ("tool", "system")):
        less.append(("content", "zebra " + message["content"]))
    for name, value in less:
        yield name, {key: x for key, x in {**message, name: value}.items() if x is not None}


# ----------------------------------------------------------------------------------- prompts and responses


def encode_response(tokenizer: Any, prompt: Messages, response: Messages, lossless: bool = False) -> Tokens:
    """Tokens of both; the mask is on the response's turns of the assistant. lossless: as in `encode_chat`.

    Raises:
        RunError: the response has several, and the template rewrites the first of them.
    """
    trained = [False] * len(prompt) + [m.get("trained", m["role"] == "assistant") for m in response]
    tokens, *others = encode_chat(tokenizer, prompt + response, trained, lossless)
    if others:
        raise dist.RunError("cannot be encoded: the chat template changes a response of several turns")
    return tokens


def encode_prompt(tokenizer: Any, prompt: Messages | str, label: str = "") -> list[int]:
    """Tokens to generate from: messages under the template, a string as plain text; then the label."""
    if isinstance(prompt, str):
        return tokenize(tokenizer, prompt + labelled(tokenizer, label), True).tolist()
    refuse_unseen(tokenizer, prompt)
    text = render(tokenizer, prompt, True)
    refuse_changed(tokenizer, [m for m in prompt if m["role"] == "user"], text)
    return tokenize(tokenizer, text + labelled(tokenizer, label)).tolist()


def check_prompts(tokenizer: Any, prompts: list[Messages], what: str) -> None:
    """End the run now if the chat template does not take a reply after one of the prompts."""

    def check(prompt: Messages) -> None:
        with encoding(f"{what}: after the prompt {str(prompt)[:80]}"):
            encode_response(tokenizer, prompt, [{"role": "assistant", "content": "a"}])

    dist.parallel_map(check, prompts)


# how families in wide use begin a rendered conversation
COMMON = r"(?:<s>|<bos>)?\s*(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\])"


@functools.lru_cache(maxsize=4)
def beginnings(tokenizer: Any) -> re.Pattern:
    """Matches a text that begins as a chat template begins one."""
    start = special_tokens(tokenizer).sub("", opening(tokenizer, PROBE[:1])).strip()
    own = [re.escape(start)] if start[:1] in ("[", "<", "#", "|") else []
    return re.compile("|".join([COMMON, turn_marks(tokenizer).pattern, *own]))


def refuse_rendered(tokenizer: Any, value: dict, where: str) -> None:
    """End the run for a text that has been through a chat template: it would go through it twice."""
    if tokenizer.chat_template is None:
        return
    begins, end = beginnings(tokenizer), tokenizer.decode([end_token(tokenizer)])
    for name, given in value.items():
        for turn in (given if isinstance(given, list) else [given]) if name in formats.TEXTS else ():
            role = str(formats.first(turn, ("role", "from"))).lower() if isinstance(turn, dict) else ""
            is_own = formats.ROLES.get(role) == "assistant"
            text = formats.first(turn, ("content", "value")) if is_own else turn
            text = text.strip() if isinstance(text, str) and "<|message|>" not in text else ""
            if begins.match(text) or text.endswith(end):
                expected = "a text without the chat template's own marks, or messages"
                if is_own:
                    expected = "a reply without the chat template's own marks at its beginning and end"
                raise wrong(where, f"{name} {text!r}", expected)


def template_notes(tokenizer: Any) -> Iterator[str]:
    """What to know about a template before it is trained with."""
    if "strftime_now(" in str(tokenizer.chat_template):
        day = getattr(tokenizer, "day", DAY)
        yield f"the chat template writes the date, always {day}; strftime_now in chat_template_kwargs sets it"
    if tokenizer.chat_template is None:
        yield (
            "no chat template: a completion, chosen, rejected or responses follow the prompt as they stand, "
            "white space or none between, as in TRL; a response, output or answer after a space"
        )
    elif extra := header_only(tokenizer):
        yield (
            f"the chat template ends the header of a reply with {extra!r}, but leaves it out of replies; "
            "they are trained after that header, as they are generated"
        )
