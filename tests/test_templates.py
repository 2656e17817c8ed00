"""Chat templates: every reply is trained after what generation would start it from, and nothing is lost."""

import contextlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_data import ASK, CHAT, PAIRS, SEVEN, load, scored, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common import data, dist, files, formats, rewards, templates

SPEC = importlib.util.find_spec("trl")
FOLDER = Path(SPEC.origin).parent / "chat_templates" if SPEC else Path("absent")
FILES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
MARK = re.compile(
    r"<[|｜][^<>\s{}'\"]+?[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>"
    r"|</?(?:s|bos|eos|start_of_turn|end_of_turn|end_of_utterance|fake_token_around_image|image)>|\[/?[A-Z_]{3,}\]"
)


def tokenizer_for(template: str, *more: str) -> Any:
    """Bytes; the marks that a template writes are special tokens, and two newlines one token, as often."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<bos0>", "<eos0>", *more, *sorted(set(MARK.findall(template)))])
    core.add_tokens(["<think>", "</think>", "\n\n"])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos0>", eos_token="<eos0>")
    made.chat_template = template
    return made


def family(name: str) -> Any:
    if not FILES:
        pytest.skip("needs the template files of trl")
    return tokenizer_for((FOLDER / f"{name}.jinja").read_text())


def texts(tokenizer: Any, sequences: list) -> list[tuple[str, str]]:
    """(context, what is trained) of each sequence with one trained turn, decoded."""
    return [(tokenizer.decode(ids[~mask]), tokenizer.decode(ids[mask])) for ids, mask in sequences]


def sft(tokenizer: Any, folder: Path, record: dict) -> list[tuple[str, str]]:
    return texts(tokenizer, load("sft", write(folder, record), tokenizer, max_length=4096)[0].sequences)


# ------------------------------------------------------------------------------------------- many templates


@pytest.mark.parametrize("name", FILES)
def test_both_replies_of_a_chat_are_trained_as_they_are_generated(name: str) -> None:
    tokenizer = family(name)
    sequences = data.encode_chat(tokenizer, CHAT, [False, True] * 2)
    runs = [run for sequence in sequences for run in scored(tokenizer, sequence)]
    assert len(runs) == 2 and "Yes." in runs[0] and "No." in runs[1]
    assert sequences[-1].ids[-1] == data.end_token(tokenizer)
    for turns in (1, 3):
        asked = data.encode_prompt(tokenizer, CHAT[:turns])
        tokens = sequences[turns // 2 if len(sequences) == 2 else 0].ids.tolist()
        assert tokens[: len(asked)] == asked
    pair = [data.encode_response(tokenizer, CHAT[:3], [{**CHAT[3], "content": text}]) for text in ("a", "b")]
    assert [text.count("a") for _, text in texts(tokenizer, pair)][0] >= 1 and len({*map(len, pair)}) == 1


# headers that open thoughts which the template leaves out of replies
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% else %}{{ '<|assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("content", "trained"),
    [
        ("4", "\n</think>\n\n4<|end|>"),
        ("<b>4</b>", "\n</think>\n\n<b>4</b><|end|>"),  # begins as the header does
        ("<think>\nwhy\n</think>\n\n4", "why\n</think>\n\n4<|end|>"),
        ("why\n</think>\n\n4", "why\n</think>\n\n4<|end|>"),
    ],
)
def test_a_reply_stands_after_the_thoughts_that_the_header_opens(
    tmp_path: Path, content: str, trained: str, capsys: Any
) -> None:
    tokenizer = tokenizer_for(R1)
    turns = [ASK, {**SEVEN, "content": content}]
    assert sft(tokenizer, tmp_path, {"messages": turns}) == [
        ("<bos0><|user|>3+4?<|assistant|><think>\n", trained)
    ]
    assert r"ends the header of a reply with '<think>\n'" in capsys.readouterr().out
    (first, second) = sft(tokenizer, tmp_path, {"messages": turns + turns})
    assert first[1] == second[1] == trained and "why" not in second[0]


# the system text stands in the last turn of the user, if that ends the conversation
MISTRAL = (
    "{{ bos_token }}{% set rest = messages %}{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set rest = messages[1:] %}{% set first = messages[0].content + '\n\n' %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (first if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def test_a_system_text_that_moves_is_where_generation_sees_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_for(MISTRAL)
    found = sft(tokenizer, tmp_path, {"system": "Be brief.", "messages": CHAT})
    assert found == [
        ("<bos0>[INST] Be brief.\n\nIs it so?[/INST]", " Yes.<eos0>"),
        ("<bos0>[INST] Is it so?[/INST] Yes.<eos0>[INST] Be brief.\n\nAre you sure?[/INST]", " No.<eos0>"),
    ]
    with pytest.raises(dist.RunError, match=r"data.jsonl:1: cannot be encoded: must alternate$"):
        sft(tokenizer, tmp_path, {"messages": [ASK, ASK, SEVEN]})


def plain(content: str = "m.content") -> str:
    """A template that writes this of every turn."""
    turn = "{% for m in messages %}{{ m.role + ':' + " + content + " + '<|end|>' }}{% endfor %}"
    return turn + "{{ 'assistant:' if add_generation_prompt }}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (plain("(m.content if m.role != 'system' else '')"), "does not show the content of a turn of system"),
        (plain("m.content.split('</think>')[-1]"), "leaves out the thoughts of a trained reply"),
        (plain("m.content + ('' if loop.last else '!')"), "changes earlier turns, the system turn too"),
        (plain("(m.content | replace('+', '-'))"), r"changes or leaves out a text of user: '3\+4\?'"),
        (plain("(m.content[:2] if m.role == 'user' else m.content)"), "changes or leaves out a text of user"),
        (plain("(m.content | e if m.role != 'system' else m.content)"), None),  # nothing there to escape
        (
            plain().replace("'assistant:' if", "'bot:' if"),
            "begins a reply with 'bot:' when it is asked for, with",
        ),
    ],
)
def test_what_a_template_loses_or_turns_over_is_refused(
    tmp_path: Path, template: str, reason: str | None
) -> None:
    turns = [{"role": "system", "content": "Be brief."}, ASK, {**SEVEN, "content": "<think>why</think>7"}]
    tokenizer = tokenizer_for(template)
    if reason is None and "| e" in template:
        assert sft(tokenizer, tmp_path, {"messages": turns[:2] + [SEVEN]})
        turns[1] = {**ASK, "content": "3 < 4?"}
        reason = "changes or leaves out a text of user: '3 < 4"
    with pytest.raises(dist.RunError, match=f"data.jsonl:1: cannot be encoded: the chat template {reason}"):
        sft(tokenizer, tmp_path, {"messages": turns})


# ----------------------------------------------------------------------------------------- tools and thoughts

WEATHER = {
    "name": "weather",
    "description": "d",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
SUN = {"role": "tool", "content": "sunny"}
LAST = {"role": "assistant", "content": "It is sunny."}
TOOLS = [
    {
        "tools": [{"type": "function", "function": WEATHER}],
        "messages": [
            ASK,
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
            SUN,
            LAST,
        ],
    },
    {
        "tools": json.dumps([WEATHER]),
        "messages": [
            ASK,
            {"role": "assistant", "content": None, "name": None, "tool_calls": json.dumps([CALL])},
            SUN,
            LAST,
        ],
    },
    {
        "tools": [{"type": "function", "function": WEATHER}],
        "messages": [
            ASK,
            {"role": "assistant", "tool_calls": [{"function": {**CALL, "arguments": '{"city": "Oslo"}'}}]},
            SUN,
            LAST,
        ],
    },
    {
        "tools": json.dumps([WEATHER]),
        "conversations": [
            {"from": "human", "value": "3+4?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "It is sunny."},
        ],
    },
]


@pytest.mark.parametrize("record", TOOLS)
def test_tools_and_calls_of_every_spelling_reach_the_template(tmp_path: Path, record: dict) -> None:
    (call, reply) = sft(family("qwen3"), tmp_path, record)
    assert json.dumps({"type": "function", "function": WEATHER}) in call[0]
    assert call[1].endswith(
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    )
    assert "<tool_response>\nsunny\n</tool_response>" in reply[0] and reply[1].endswith(
        "It is sunny.<|im_end|>"
    )


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_are_trained_by_any_name(tmp_path: Path, name: str) -> None:
    for template, thoughts in (
        ("qwen3", "<think>\nwhy\n</think>\n\n7<|im_end|>"),
        ("gptoss", "analysis<|message|>why<|end|>"),
    ):
        ((_, trained),) = sft(family(template), tmp_path, {"messages": [ASK, {**SEVEN, name: "why"}]})
        assert thoughts in trained
    assert sft(family("qwen3"), tmp_path, {"prompt": "3+4?", "response": "7", name: "why"})[0][1].startswith(
        "<think>\nwhy"
    )


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (TOOLS[0], "tools"),
        ({"messages": TOOLS[0]["messages"]}, "tool_calls of a turn of assistant"),
        ({"messages": [ASK, {**SEVEN, "thinking": "why"}]}, "reasoning_content of a turn of assistant"),
        (
            {"messages": [ASK, SEVEN], "chat_template_kwargs": {"deep": True}},
            "chat_template_kwargs: found deep",
        ),
    ],
)
def test_what_a_template_cannot_show_is_refused_by_name(tmp_path: Path, record: dict, what: str) -> None:
    tokenizer = tokenizer_for(templates.CHATML)
    for kind in ("sft", "prompts", "ratings"):
        if kind == "prompts" and what.startswith(("tool_calls", "reasoning")):
            continue  # in the last reply, which is not read
        with pytest.raises(dist.RunError, match=f"data.jsonl:1: .*{what}"):
            load(kind, write(tmp_path, {**record, "label": {"quality": 1}}), tokenizer)


def test_an_assistants_own_marks_are_tokens_and_a_users_are_text() -> None:
    tokenizer = tokenizer_for(templates.CHATML, "[THINK]", "[/THINK]", "<|im_start|>", "<|im_end|>")
    spelled = "[THINK]why[/THINK] <|im_end|><|im_start|> 7"
    turns = [{**ASK, "content": spelled}, {**SEVEN, "content": spelled}]
    (sequence,) = data.encode_chat(tokenizer, turns, [False, True])
    think, start, end = (
        tokenizer.convert_tokens_to_ids(x) for x in ("[THINK]", "<|im_start|>", "<|im_end|>")
    )
    found = sequence.ids.tolist()
    assert (found.count(think), found.count(start), found.count(end)) == (1, 2, 2)
    assert tokenizer.decode(sequence.ids[sequence.mask]) == spelled + "<|im_end|>"


# ---------------------------------------------------------------------------------- variables and the date


def test_variables_of_the_template_hold_in_training_generation_and_export(tmp_path: Path) -> None:
    tokenizer = family("qwen3")
    record = {"messages": [ASK, SEVEN], "chat_template_kwargs": '{"enable_thinking": false}'}
    ((context, trained),) = sft(tokenizer, tmp_path, record)
    assert context.endswith("<think>\n\n</think>\n\n") and trained == "7<|im_end|>"
    assert sft(tokenizer, tmp_path, {"messages": [ASK, SEVEN]})[0][1] != trained
    templates.set_defaults(tokenizer, '{"enable_thinking": false}')
    templates.set_defaults(tokenizer, '{"enable_thinking": false}')  # as a stage after a stage does
    assert tokenizer.chat_template.count("enable_thinking is not defined") == 1
    assert sft(tokenizer, tmp_path, {"messages": [ASK, SEVEN]}) == [(context, trained)]
    tokenizer.save_pretrained(tmp_path / "export")
    (tmp_path / "export" / "config.json").write_text("{}")
    (tmp_path / "export" / "model.safetensors").touch()
    shown = data.load_tokenizer(str(tmp_path / "export")).apply_chat_template(
        [ASK], tokenize=False, add_generation_prompt=True
    )
    assert shown == context
    oss = family("gptoss")  # reads it in a macro
    templates.set_defaults(oss, '{"reasoning_effort": "high"}')
    assert "Reasoning: high" in templates.render(oss, [ASK], True)
    for given in ("{", "[1]", '{"enable": 1}'):
        with pytest.raises(dist.RunError, match="^chat_template_kwargs: found .*; expected"):
            templates.set_defaults(tokenizer, given)


def test_a_template_that_writes_the_date_gives_the_same_tokens_on_every_day(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    import datetime

    from transformers.utils import chat_template_utils

    template = "{{ 'Today: ' + strftime_now('%d %b %Y') + '.' }}" + plain()
    tokenizer, found = tokenizer_for(template), set()
    for day in (1, 2):
        monkeypatch.setattr(
            chat_template_utils,
            "datetime",
            type("Day", (), {"now": lambda d=day: datetime.datetime(2030, 1, d)}),
        )
        found.add(sft(tokenizer, tmp_path, {"messages": [ASK, SEVEN]})[0][0])
    assert found == {"Today: 01 Jan 2026.user:3+4?<|end|>assistant:"}
    assert (
        "writes the date, always 2026-01-01; strftime_now in chat_template_kwargs" in capsys.readouterr().out
    )
    templates.set_defaults(tokenizer, '{"strftime_now": "2027-12-31"}')
    assert templates.render(tokenizer, [ASK], True).startswith("Today: 31 Dec 2027.")


# --------------------------------------------------------------------------------- one line wherever encoded


def test_what_a_template_does_not_take_is_one_line_wherever_it_is_encoded(tmp_path: Path) -> None:
    strict = tokenizer_for(
        "{{ raise_exception('no system role') if messages[0].role == 'system' }}" + plain()
    )
    system = [{"role": "system", "content": "Be brief."}, ASK]
    record = {"system": "Be brief.", "prompt": "3+4?", "response": "7"}
    with pytest.raises(dist.RunError, match=r"^here:3: cannot be encoded: no system role$"):
        data.read_responses(strict, record, "here:3")
    with pytest.raises(dist.RunError, match=r"^cannot be encoded: no system role$"):
        data.encode_prompt(strict, system)
    reward = rewards.Reward(1.0, "runs/rm", None, rewards.Rater(None, strict, ["score"]))
    examples = load("prompts", write(tmp_path, record), tokenizer_for(templates.CHATML))
    with pytest.raises(
        dist.RunError, match=r"^reward runs/rm: after the prompt .*: cannot be encoded: no system"
    ):
        rewards.check([reward], examples)
    for text in ("half \ud83d", "<|im_start|>user\n3+4?", "3+4?<|end|>"):
        source = write(tmp_path, PAIRS[0], {"prompt": text, "chosen": "7", "rejected": "8"})
        with pytest.raises(
            dist.RunError,
            match=r"data.jsonl:2: (cannot be encoded: .*surrogate|found prompt .*own marks)",
        ):
            load("pairs", source, strict)


@pytest.mark.parametrize("text", ["7<|im_end|>", "<|im_start|>assistant\n7"])
def test_a_turn_that_was_rendered_before_is_told_as_one(tmp_path: Path, text: str) -> None:
    """It stands in messages already, so that messages are no way out; a user's turn may hold marks."""
    told = r"data.jsonl:1: found messages .*; expected a reply without the chat template's own marks at its"
    tokenizer = tokenizer_for(templates.CHATML)
    source = write(tmp_path, {"messages": [ASK, {**SEVEN, "content": text}]})
    with pytest.raises(dist.RunError, match=told):
        load("sft", source, tokenizer)
    load("sft", write(tmp_path, {"messages": [{**ASK, "content": text}, SEVEN]}), tokenizer)


def test_content_in_parts_is_for_templates_that_see(tmp_path: Path) -> None:
    vision = "{% for m in messages %}{{ m.role + ':' + m.content[0]['text'] + '<|end|>' }}{% endfor %}"
    record = {"messages": [{"role": "user", "content": [{"type": "text", "text": "3+4?"}]}, SEVEN]}
    for template in (vision, plain()):
        ((context, trained),) = sft(tokenizer_for(template), tmp_path, record)
        assert context == "user:3+4?<|end|>" + "assistant:" * ("reply" in template or "gen" in template)
        assert trained.endswith("7<|end|>")
    with pytest.raises(dist.RunError, match=r"data.jsonl:1: found the message .*image"):
        sft(
            tokenizer_for(vision),
            tmp_path,
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, SEVEN]},
        )


# ----------------------------------------------------------------------------- thoughts, labels, calls: traps

THINKS = (  # replies in a block of thoughts; the header of one opens it, or closes it at once
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and m.reasoning_content %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nHEADER{% endif %}"
)
CLOSED = THINKS.replace("HEADER", "<think>\n\n</think>\n\n")


def test_a_header_that_closes_its_thoughts_is_not_closed_again(tmp_path: Path) -> None:
    tokenizer = tokenizer_for(CLOSED)
    ((before, trained),) = sft(
        tokenizer, tmp_path, {"messages": [ASK, {"role": "assistant", "content": "7"}]}
    )
    assert before.endswith("assistant\n<think>\n\n</think>\n\n") and trained == "7<|im_end|>"
    reply = {"role": "assistant", "content": "7", "reasoning_content": "3 and 4"}
    with pytest.raises(dist.RunError, match="has thoughts after a header that ends them"):
        sft(tokenizer, tmp_path, {"messages": [ASK, reply]})


def test_what_a_header_and_a_reply_share_ends_before_a_mark(tmp_path: Path) -> None:
    """<think> of the header and </think> of the reply have a < in common."""
    text = THINKS.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}</think>{% endif %}{{ m.content }}"
    )
    tokenizer = tokenizer_for(text.replace("HEADER", "<think>"))
    ((before, trained),) = sft(
        tokenizer, tmp_path, {"messages": [ASK, {"role": "assistant", "content": "7"}]}
    )
    assert before.endswith("assistant\n<think>") and trained == "</think>7<|im_end|>"


def test_a_label_stands_once_and_is_never_trained_under_a_template_with_thoughts(tmp_path: Path) -> None:
    block = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    tokenizer = tokenizer_for(THINKS.replace("{{ m.content }}", block).replace("HEADER", ""))
    turns = [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "a", "label": "quality:4"}]
    ((before, trained),) = sft(tokenizer, tmp_path, {"type": "VALUE_TO_TEXT", "conversations": turns})
    assert before.endswith("assistant\nquality:4\n") and trained == "<think>\n\n</think>\n\na<|im_end|>"


def test_each_of_several_calls_and_system_turns_must_be_shown(tmp_path: Path) -> None:
    one = "{{ m.content }}{% if m.tool_calls %}<call>{{ m.tool_calls[0].function.name }}{% endif %}"
    tokenizer = tokenizer_for(THINKS.replace("{{ m.content }}", one).replace("HEADER", ""))
    calls = [{"name": name, "arguments": {}} for name in ("f", "g")]
    assert sft(tokenizer, tmp_path, {"messages": [ASK, {"role": "assistant", "tool_calls": calls[:1]}]})
    with pytest.raises(dist.RunError, match="does not show the tool_calls"):
        sft(tokenizer, tmp_path, {"messages": [ASK, {"role": "assistant", "tool_calls": calls}]})
    first = "{% if m.role != 'system' or loop.first %}{{ m.content }}{% endif %}"
    tokenizer = tokenizer_for(THINKS.replace("{{ m.content }}", first).replace("HEADER", ""))
    system = [{"role": "system", "content": text} for text in ("one", "two")]
    assert sft(tokenizer, tmp_path, {"messages": [system[0], *CHAT]})
    with pytest.raises(dist.RunError, match="does not show the content of a turn of system"):
        sft(tokenizer, tmp_path, {"messages": [*system, *CHAT]})


def test_without_a_template_nothing_but_text_can_be_trained(tmp_path: Path) -> None:
    tokenizer = tokenizer_for("")
    tokenizer.chat_template = None
    with pytest.raises(dist.RunError, match="no chat template that shows the tools"):
        sft(tokenizer, tmp_path, {"prompt": "q", "completion": "a", "tools": [{"name": "f"}]})


def test_a_template_that_shows_no_reply_is_refused(tmp_path: Path) -> None:
    """It would train end tokens only."""
    template = "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% endfor %}"
    (tmp_path / "mine.jinja").write_text(template)
    with pytest.raises(
        dist.RunError, match="mine.jinja: cannot be encoded: the chat template does not show what"
    ):
        templates.load_tokenizer("toy", str(tmp_path / "mine.jinja"))


# ------------------------------------------------------------------- marks of other families, in what is said


@pytest.mark.parametrize(
    ("mark", "close", "template"),
    [
        ("<seed:think>", "</seed:think>", R1.replace("think>", "seed:think>")),
        ("<reasoning>", "</reasoning>", R1.replace("think>", "reasoning>")),
        ("[THINK]", "[/THINK]", R1.replace("</think>", "[/THINK]").replace("<think>", "[THINK]")),
        ("<|begin_of_thought|>", "<|end_of_thought|>", R1.replace("</think>", "<|end_of_thought|>")),
    ],
)
def test_thoughts_that_a_header_opens_by_any_mark_are_closed_or_kept(
    tmp_path: Path, mark: str, close: str, template: str
) -> None:
    tokenizer = tokenizer_for(template.replace("<think>", mark))
    for content, trained in (
        ("4", f"\n{close}\n\n4<|end|>"),
        (f"{mark}\nwhy\n{close}\n\n4", f"why\n{close}\n\n4<|end|>"),
        (f"{close}\n4", f"{close}\n4<|end|>"),
    ):
        ((before, found),) = sft(tokenizer, tmp_path, {"messages": [ASK, {**SEVEN, "content": content}]})
        assert before.endswith(f"<|assistant|>{mark}\n") and found == trained


def test_how_thoughts_end_is_seen_in_a_rendering_that_has_some(tmp_path: Path) -> None:
    block = "{% if m.reasoning_content %}<musing>{{ m.reasoning_content }}<done>{% endif %}{{ m.content }}"
    tokenizer = tokenizer_for(
        plain("''").replace("{{ m.role + ':' + '' +", "{{ m.role + ':' }}" + block + "{{")
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("'assistant:' if", "'assistant:<musing>' if")
    ((before, trained),) = sft(tokenizer, tmp_path, {"messages": [ASK, SEVEN]})
    assert before.endswith("assistant:<musing>") and trained == "<done>7<|end|>"


def test_thoughts_in_a_content_that_a_template_takes_out_are_missed(tmp_path: Path) -> None:
    turns = [ASK, {**SEVEN, "content": "<|channel>thought\nwhy\n<channel|>7"}]
    with pytest.raises(dist.RunError, match="leaves out the thoughts of a trained reply"):
        sft(family("gemma4_v5"), tmp_path, {"messages": turns})
    data.encode_response(family("gemma4_v5"), turns[:1], turns[1:])  # a reply that a reward model reads
    later = [*turns, ASK, SEVEN]  # of an earlier reply they may go
    later[1] = {**later[1], "weight": 0}
    assert sft(family("gemma4_v5"), tmp_path, {"messages": later})[0][1].startswith("7")


def test_a_header_that_opens_what_nothing_closes_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_for(plain().replace("'assistant:' if", "'assistant:<ponder>' if"))
    with pytest.raises(dist.RunError, match="header of a reply opens <ponder>, which replies leave out"):
        sft(tokenizer, tmp_path, {"messages": [ASK, SEVEN]})


def test_thoughts_that_nothing_closes_are_refused(tmp_path: Path) -> None:
    cut = {"role": "assistant", "content": "<think>\n3 and"}
    for header in ("", "<think>"):
        with pytest.raises(dist.RunError, match=r"data.jsonl:1: .*opens <think>, and nothing closes it"):
            sft(tokenizer_for(THINKS.replace("HEADER", header)), tmp_path, {"messages": [ASK, cut]})
    both = {"role": "assistant", "content": "<think>a</think>7", "reasoning_content": "3 and 4"}
    with pytest.raises(dist.RunError, match="reasoning_content beside the content"):
        sft(tokenizer_for(THINKS.replace("HEADER", "")), tmp_path, {"messages": [ASK, both]})


def test_a_header_that_replies_do_not_have_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_for(THINKS.replace("|>assistant\nHEADER", "|>bot\n"))
    with pytest.raises(dist.RunError, match=r"data.jsonl:1: .*begins a reply with .*bot' when .*assistant'"):
        sft(tokenizer, tmp_path, {"messages": [ASK, SEVEN]})


def test_a_template_that_cuts_texts_is_not_given_lists_of_parts(tmp_path: Path) -> None:
    tokenizer = tokenizer_for(plain().replace("m.content", "m.content[:3]"))
    long = {"role": "assistant", "content": "seven"}
    with pytest.raises(dist.RunError, match="does not show what the assistant says"):
        sft(tokenizer, tmp_path, {"messages": [ASK, long]})


RAW = "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>7"


@pytest.mark.parametrize("content", [RAW, "<|start|>assistant" + RAW + "<|return|>"])
def test_channels_in_a_content_are_its_thoughts_and_its_answer(tmp_path: Path, content: str) -> None:
    tokenizer, turns = family("gptoss"), [ASK, {**SEVEN, "content": content}]
    apart = [ASK, {**SEVEN, "reasoning_content": "why"}]
    assert sft(tokenizer, tmp_path, {"messages": turns}) == sft(tokenizer, tmp_path, {"messages": apart})
    assert sft(tokenizer, tmp_path, {"prompt": "3+4?", "response": content}) == sft(
        tokenizer, tmp_path, {"messages": apart}
    )
    chatml = tokenizer_for(templates.CHATML, "<|im_start|>", "<|im_end|>")
    with pytest.raises(dist.RunError, match="does not show the reasoning_content"):
        sft(chatml, tmp_path, {"messages": turns})
    for text in ("<|im_start|>assistant\n7", "7<|im_end|>\n"):  # it would be between these marks twice
        with pytest.raises(dist.RunError, match="data.jsonl:1: found messages .*; expected a reply without"):
            sft(chatml, tmp_path, {"messages": [ASK, {**SEVEN, "content": text}]})
    for text in (RAW.replace("analysis", "commentary to=f"), "Hm." + RAW, RAW + RAW):
        with pytest.raises(dist.RunError, match="data.jsonl:1: found the channels .*; expected an analysis"):
            sft(tokenizer, tmp_path, {"messages": [ASK, {**SEVEN, "content": text}]})


@pytest.mark.parametrize("name", FILES[::6])
def test_a_conversation_is_rendered_as_the_library_renders_it(name: str) -> None:
    tokenizer = family(name)
    if templates.takes_parts(tokenizer) or "strftime_now(" in tokenizer.chat_template:
        pytest.skip("is told another day, or takes no plain texts")
    tools = formats.with_context(TOOLS[0], formats.as_messages(TOOLS[0]["messages"], ""), "")
    for turns in (CHAT, [ASK, {**SEVEN, "reasoning_content": "why"}], tools):
        expected = None
        with contextlib.suppress(Exception):  # it may not take tools
            expected = tokenizer.apply_chat_template(turns, turns[0].get("tools"), tokenize=False)
        assert expected is None or templates.render(tokenizer, turns, False) == expected


def test_several_templates_by_name_take_labels_and_tools(tmp_path: Path) -> None:
    tokenizer = tokenizer_for(plain())
    tokenizer.chat_template = {"default": plain(), "tool_use": "{{ tools }}" + plain()}
    asked = tokenizer.decode(data.encode_prompt(tokenizer, [ASK], "quality:4\n"))
    assert asked == "user:3+4?<|end|>assistant:quality:4\n"
    tools = formats.with_context({"tools": [WEATHER]}, [ASK], "")
    assert "weather" in tokenizer.decode(data.encode_prompt(tokenizer, tools))


def test_a_run_writes_the_day_of_its_template_down() -> None:
    dated = tokenizer_for("{{ strftime_now('%Y') }}" + plain())
    record = {**ASK, "chat_template_kwargs": {"strftime_now": "2031-05-06"}}
    assert templates.render(dated, [record], True).startswith("2031user")
    dated.day = templates.DAY
    assert files.inputs("toy", dated)["day of the chat template"] == "2026-01-01"
    assert "day of the chat template" not in files.inputs("toy", tokenizer_for(plain()))


def test_a_template_that_is_no_file_is_said_to_be_none(tiny_model: str) -> None:
    with pytest.raises(dist.RunError, match="chat_template chatm: no such file; expected chatml or"):
        templates.load_tokenizer(tiny_model, "chatm")
