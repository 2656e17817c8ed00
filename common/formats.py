"""Formats: files and hub data sets -> records -> conversations, pairs, prompts and ratings.

What docs/data.md lists becomes turns of a conversation, or an error that names file, line,
what was found and what was expected. Nothing here makes tokens: a tokenizer is only asked whether it has a
template.
"""

import contextlib
import difflib
import functools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from common import dist
from common.streams import (  # noqa: F401, some of them for scripts
    LeftOut,
    Record,
    Stream,
    first_line,
    open_records,
    read_file,
    read_records,
    read_sources,
    told_as,
    wrong,
)

# role and content of each turn, and what else a template reads of it; the first turn of a conversation also
# carries what the record says about all of it, `tools` and `chat_template_kwargs`
Messages = list[dict[str, Any]]

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
TEXTS = (*CONVERSATIONS, *PROMPTS[:-1], *RESPONSES, *CHOSEN, *REJECTED)
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
# all names that mean something here or in data.py, of a record and of a turn
KNOWN = (*CONVERSATIONS, *PROMPTS, *RESPONSES, *CHOSEN, *REJECTED, *PAIR_FIELDS, *sum(ALSO.values(), ()))
OTHERS = "content system system_prompt history tools functions context label attributes chat_template_kwargs "
OTHERS += "train_roles mask type split responses ranks instances transcript preference_strength response_1 "
OTHERS += "response_2 input_ids labels attention_mask completion_mask assistant_masks loss_mask"
KNOWN += (*REASONING, *REFUSED, *OTHERS.split())
LISTS = (*CONVERSATIONS, "tools", "tool_calls", "instances")  # whose singular is a slip too
# whose plural is one too: without them a record is read as another
NO_PLURAL = (*LISTS, "margin", "mask", "split", "system", "type", "labels")
SHORT = ("mask", "type", "loss")  # a letter for another in so short a name makes others: task
ABSENT = (None, "")
TEXT_PARTS = (None, "text", "input_text", "output_text")  # of a content in parts, their type
READ_OF_TURNS = ("role", "from", "content", "value", *REASONING, *TRAINED, *KEPT, "function_call", "label")


def first(value: dict, names: Iterable[str]) -> Any:
    """The first of these fields that is there and not null."""
    return next((value[name] for name in names if value.get(name) is not None), None)


def agreed(value: dict, names: Iterable[str], where: str) -> Any:
    """The first of these fields that is there, all names of one thing.

    Raises:
        RunError: two of them say different things.
    """
    found = [(name, value[name]) for name in names if value.get(name) is not None]
    for name, other in found[1:]:
        if other != found[0][1]:
            raise wrong(where, f"{found[0][0]} {found[0][1]!r} beside {name} {other!r}", "one of them")
    return found[0][1] if found else None


def unread(value: dict, has_replies: bool) -> Iterator[str]:
    """Lines for a record with several fields that could be its prompt, or its reply: the first one is."""
    replies = {"reply": CONVERSATIONS + RESPONSES, "chosen": CHOSEN, "rejected": REJECTED}
    prompts = {} if has_replies and first(value, CONVERSATIONS) else {"prompt": PROMPTS}
    for what, names in (prompts | replies if has_replies else prompts).items():
        taken, *others = [name for name in names if value.get(name) is not None] or [""]
        others = [name for name in others if (taken, name) != ("instruction", "input")]  # which are joined
        if others:
            yield f"{taken} is read as the {what}, and beside it not {', '.join(others)}"


def number(value: Any, where: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST:
        raise wrong(where, f"{name} {value!r}", "a number below 1e15")
    return float(value)


@functools.lru_cache(maxsize=4096)
def meant(name: str, known: tuple[str, ...]) -> list[str]:
    """The names that this one is a slip of: `choosen`. prompt_id and answers are names of the user's own."""
    own = name.lower().replace("-", "_")
    if own[-1:].isdigit():  # response_3 is a name of its own
        return []
    plurals = {own + "s", own[:-1] if own.endswith("s") else ""} - {*NO_PLURAL}
    near = [x for x in known if x == own or (is_slip(own, x) and (len(x) > 4 or is_short_slip(own, x)))]
    return near if "_" in own or known is READ_OF_TURNS else [x for x in near if x not in plurals]


def is_slip(name: str, other: str) -> bool:
    """Whether a letter more, less or another, or two that changed places, is all that two names differ in."""
    same = common_prefix(name, other)
    a, b = name[same:], other[same:]
    swapped = a[1::-1] + a[2:]
    return b in (a[1:], swapped) or b[1:] in (a, a[1:])


def is_short_slip(name: str, other: str) -> bool:
    return other in SHORT and name[0] == other[0] and (len(name) != 4 or sorted(name) == sorted(other))


def could_be(name: str, value: Any, near: list[str]) -> bool:
    """Whether a field that others use too, as `tool` or `types`, has a value that would have been read."""
    if name + "s" in LISTS:
        return isinstance(value, list | dict) or (isinstance(value, str) and value.lstrip()[:1] in ("[", "{"))
    return near != ["type"] or (isinstance(value, str) and is_type_of_labels(value))


@functools.lru_cache(maxsize=4096)
def is_type_of_labels(value: str) -> bool:
    """Whether this is nearly one of NeMo-Aligner's types; other values of `type` are the user's own."""
    said = re.sub(r"[\W_]", "", value).upper()
    return bool(difflib.get_close_matches(said, ("VALUETOTEXT", "TEXTTOVALUE"), 1, 0.85))


def refuse_slips(value: dict, where: str, known: tuple[str, ...]) -> None:
    """End the run for a name that is nearly one of `known`, which the record does not have."""
    for name, found in value.items():
        near = [x for x in meant(name, known) if value.get(x) is None] if name not in known else []
        if near and found is not None and could_be(name, found, near):
            raise wrong(where, f"the field {name}", f"{' or '.join(near)}; else another name for it")


def refuse_fields(value: dict, where: str) -> None:
    """End the run if a record says what cannot be followed, or nearly says what would be."""
    refuse_slips(value, where, KNOWN)
    for name, expected in REFUSED.items():
        if value.get(name) not in (None, "", [], {}, 1):
            raise wrong(where, f"the field {name}", expected)
    kind = value.get("type")
    if isinstance(kind, str) and kind != "VALUE_TO_TEXT" and is_type_of_labels(kind):
        raise wrong(where, f"type {kind}", "VALUE_TO_TEXT, with the label before its reply")
    if value.get("instruction") is not None and first(value, ("input", "context")) is None:
        for name in ("inputs", "contexts"):  # elsewhere a user's own
            if isinstance(value.get(name), str):
                raise wrong(where, f"the field {name}", f"{name[:-1]}; else another name for it")


def from_json(value: Any, where: str, name: str, kind: type) -> Any:
    """A list or a dict, or the JSON text of one."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise wrong(where, f"{name} {value!r}", "JSON") from error
    if not isinstance(found, kind):
        raise wrong(where, f"{name} {value!r}", "a list" if kind is list else "an object of name: value")
    return found


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
    refused = first(turn, ("loss_scale", "loss_weight", "train_detail", "reasoning_details"))
    if refused not in (*ABSENT, []):
        expected = f"a weight of 0 or 1 and reasoning_content, not {refused!r}"
        raise wrong(where, f"the message {turn}", expected)
    speaker, text = read_speaker(turn, where), agreed(turn, ("content", "value"), where)
    given = {name: turn.get(name) for name in KEPT} | {"reasoning_content": first(turn, REASONING)}
    kept = {name: x for name, x in given.items() if x not in ABSENT}
    for name in ("reasoning_content", "tool_call_id", "name"):
        if not isinstance(kept.get(name, ""), str):
            raise wrong(where, f"{name} {kept[name]!r} of a message", "a text")
    if speaker in ("function_call", "tool_call"):
        kept["tool_calls"], text = text, ""
    if turn.get("function_call") not in (*ABSENT, {}):  # OpenAI's older name for one call
        kept["tool_calls"] = [turn["function_call"]]
    if "tool_calls" in kept:
        kept["tool_calls"] = read_functions(kept["tool_calls"], where, "tool_calls")
    kept = {name: x for name, x in kept.items() if x != []}
    text = "" if text in (None, []) and kept.keys() - {"name"} else join_parts(text)
    if not isinstance(text, str):
        content = first(turn, ("content", "value"))
        raise wrong(where, f"the message of {speaker} with {content!r}", "a content of text")
    channels = read_channels(text, where) if ROLES[speaker] == "assistant" else {}
    if "reasoning_content" in kept and (channels or text.lstrip().startswith("<think>")):
        raise wrong(where, f"reasoning_content beside the content {text!r}", "one of them with the thoughts")
    flag = agreed(turn, TRAINED, where)
    if isinstance(flag, str | list | dict) or flag not in (None, 0, 1):
        raise wrong(where, f"the message {turn}", "a weight of 0 or 1")
    kept |= {} if flag is None else {"trained": bool(flag)}
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):  # kept with the first turn
        is_given = turn.get(name) not in (*ABSENT, [], {})
        kept |= {name: from_json(turn[name], where, name, kind)} if is_given else {}
    return {"role": ROLES[speaker], "content": text, **kept, **channels}


def read_speaker(turn: dict, where: str) -> str:
    """The name of a turn's role, one of ROLES; a `from` beside `role` may be the name of somebody."""
    speaker, other = str(first(turn, ("role", "from"))).lower(), str(turn.get("from")).lower()
    if speaker not in ROLES:
        raise wrong(where, f"the message of {speaker}, {turn}", f"a role of {', '.join(ROLES)}")
    if ROLES.get(other, ROLES[speaker]) != ROLES[speaker]:
        raise wrong(where, f"role {turn['role']!r} beside from {turn['from']!r}", "one of them")
    return speaker


def join_parts(content: Any) -> Any:
    """The text of a content in parts of text; any other content as it is."""
    parts = content if isinstance(content, list) else []
    texts = [x.get("text") for x in parts if isinstance(x, dict) and x.get("type") in TEXT_PARTS]
    is_text = parts and len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return "".join(texts) if is_text else content


def read_channels(text: str, where: str) -> dict[str, str]:
    """Content and thoughts of a reply in gpt-oss's raw format; {} without channels, others are refused."""
    marks = r"(?:<\|start\|>assistant)?<\|channel\|>(.*?)<\|message\|>"
    if "<|channel|>" not in text or len(pieces := re.split(marks, text)) == 1:
        return {}
    names = [name.strip() for name in pieces[1::2]]
    said = [re.sub(r"\s*<\|(?:end|return)\|>\s*$", "", piece) for piece in pieces[2::2]]
    if pieces[0].strip() or "<|" in "".join(said) or names not in (["final"], ["analysis", "final"]):
        expected = "an analysis, then a final channel; or reasoning_content, content and tool_calls"
        raise wrong(where, f"the channels {', '.join(names)} in a content", expected)
    return {"content": said[-1]} | ({"reasoning_content": said[0]} if said[1:] and said[0] else {})


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
        # a line of attributes
        text = re.sub(r"<extra_id_2>(\w+:-?[\d.]+(,\w+:-?[\d.]+)*)? *(\n|$)", "", text)
        if not text.startswith("<extra_id_"):
            first_mark = re.search(r"\n<extra_id_[01]>(\w*)", text)
            if first_mark and first_mark[1].lower() == role:
                expected = f"no text before its first mark, as that opens a turn by {role} too"
                raise wrong(where, repr(text), expected)
            text = f"<extra_id_1>{role}\n{text}"
        parts = re.split(r"(?:^|\n)<extra_id_[01]>(\w*)(?:\n|$)", text)
        if re.search("<extra_id_[012]>", "".join(parts)):
            expected = (
                "the marks <extra_id_0> and <extra_id_1> at the start of a line, and after <extra_id_2> "
            )
            raise wrong(where, repr(text), expected + "attributes, such as quality:4,toxicity:0")
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
    system, history = first(value, ("system", "system_prompt")), value.get("history")
    lead = as_messages({"role": "system", "content": system}, where) if system not in ABSENT else []
    history = [] if history in ABSENT else history
    if not isinstance(history, list):
        raise wrong(where, f"history {history!r}", "a list of [question, reply]")
    for item in history:
        if isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item):
            item = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), item, strict=True)]
        lead += as_messages(item, where)
    return lead


def with_context(value: dict, turns: Messages, where: str) -> Messages:
    """The turns, the first of them with the record's tools and template variables."""
    tools, given = first(value, ("tools", "functions")), value.get("chat_template_kwargs")
    own = {"tools": tools not in ABSENT and read_functions(tools, where, "tools")}
    own["chat_template_kwargs"] = given not in ABSENT and from_json(
        given, where, "chat_template_kwargs", dict
    )
    return [{**turns[0], **{name: x for name, x in own.items() if x}}, *turns[1:]]


def given_turns(value: dict, where: str) -> Any:
    """A record's whole conversation, a list or a transcript, which may stand in its text; None without."""
    turns = first(value, CONVERSATIONS)
    if turns is None and is_transcript(value.get("text")):
        return value["text"]
    if turns is not None and not isinstance(turns, list) and not is_transcript(turns):
        raise wrong(where, f"messages {turns!r}", "a list of role/content messages")
    return turns


def conversation(tokenizer: Any, value: dict, where: str) -> Messages | None:
    """The turns of a record that holds a whole conversation, else None."""
    turns = given_turns(value, where)
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
    if material not in ABSENT and isinstance(prompt, str) and prompt == value.get("instruction"):
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
    thoughts = first(
        {name: value.get(name) for name in REASONING if not is_switch(value.get(name))}, REASONING
    )
    if thoughts not in ABSENT:
        response[0] = as_message({**response[0], "reasoning_content": thoughts}, where)
    if tokenizer.chat_template is None and value.get("completion") is None:
        text = response[0]["content"]  # only a completion continues plain text as it stands
        if prompt[-1]["content"][-1:].strip() and text[:1].strip():
            response = [{"role": "assistant", "content": " " + text}]
    return prompt, response


def is_switch(value: Any) -> bool:
    """Whether this says if there was reasoning, as `reasoning: off` beside a reply, and is none."""
    return value is True or value is False or value in ("on", "off")


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
    given = {name: agreed(value, (name, *ALSO.get(name, ())), where) for name in PAIR_FIELDS}
    numbers = {name: number(x, where, name) for name, x in given.items() if x is not None}
    if ("chosen_reward" in numbers) != ("rejected_reward" in numbers):  # beside a default it would be none
        one, other = given["chosen_reward"], given["rejected_reward"]
        raise wrong(where, f"chosen_reward {one} and rejected_reward {other}", "both, or none")
    numbers = PAIR_FIELDS | numbers
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


def is_two_lined(stream: Stream, kind: str) -> bool:
    """Whether two lines make a pair, as in NeMo-Aligner's comparisons."""
    if kind != "pairs" or stream.split:
        return False
    ((raw, where),) = stream.rows(0, 1)
    with contextlib.suppress(dist.RunError):  # told with the other errors
        return set(stream.record(raw, where).value) in ({"text"}, {"text", "label"})
    return False


def regroup(records: list[Record], two_lined: bool) -> Iterator[Record]:
    """A record for each example: of two lines that are compared, or of each instance of a task."""
    if two_lined:
        one, two = records[0], records[-1]
        texts, numbers = [record.value.get("text") for record in records], {}
        if len(texts) < 2 or None in texts or {**one.value, "text": ""} != {**two.value, "text": ""}:
            expected = "the other, alike but for its text, in the line after"
            raise wrong(one.where, "one text of a pair", expected)
        if "label" in one.value:  # the sign tells the side, negative the first; the size the strength
            given = one.value["label"] if isinstance(one.value["label"], list) else [one.value["label"]]
            strength = next((number(x, one.where, "label") for x in given if x not in (None, -100)), 0)
            texts, numbers = texts[:: 1 if strength <= 0 else -1], {"margin": abs(strength)}
            numbers = numbers if strength else {"preference_strength": 0}
        yield Record({"chosen": texts[0], "rejected": texts[1], **numbers}, one.where)
        return
    for value, where in records:
        given = value.get("instances")
        if given in (*ABSENT, []):
            yield Record(value, where)
            continue
        for instance in given if isinstance(given, list) else [str(given)]:
            if not isinstance(instance, dict):
                raise wrong(where, f"the instance {instance!r}", "a JSON object")
            yield Record({**value, **instance}, where)
