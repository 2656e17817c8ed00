"""Formats, masks, templates, mixing, splits and packing: everything between a file and a Row."""

import gzip
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, make_tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from common import data, dist, formats, loading, packed, preview, templates

CPU = torch.device("cpu")
TURNS = ["Is it so?", "Yes.", "Are you sure?", "No."]
CHAT = [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(TURNS)]
REPLIES = [message["role"] == "assistant" for message in CHAT]
CORPUS = ["user assistant model [INST] [/INST] Yes. No. Is it so? Are you sure? 3+4? 7 8 \n"] * 4


def write(folder: Path, *records: dict, name: str = "data.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / name)


def load_both(kind: str, source: Any, tokenizer: Any, **changes: Any) -> tuple[data.Dataset, data.Dataset]:
    limit = "max_prompt_length" if kind == "prompts" else "max_length"
    options = {"dataset": str(source), "eval_dataset": str(source), limit: 512, **changes}
    return getattr(data, f"load_{kind}")(tokenizer, **options)


def load(kind: str, source: str, tokenizer: Any, **changes: Any) -> data.Dataset:
    return load_both(kind, source, tokenizer, **changes)[0]


def scored(tokenizer: Any, sequence: packed.Tokens) -> list[str]:
    """The runs of scored tokens, decoded."""
    tokens, mask = sequence
    runs = itertools.groupby(zip(mask, tokens, strict=True), key=lambda pair: pair[0])
    return [tokenizer.decode([int(t) for _, t in run]) for on, run in runs if on]


# ----------------------------------------------------------------------------------------- tokenizer families


def make_tokenizer(kind: str, special: list[str], template: str | None, **settings: Any) -> Any:
    """A byte-pair tokenizer trained on the spot: of bytes like GPT-2's, or of words like Llama's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if kind == "words" else None, fuse_unk=True))
    alphabet = []
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        special = ["<unk>", *special]
        alphabet = [chr(c) for c in range(33, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if settings.pop("add_bos", False):
        bos = settings["bos_token"]
        pairs = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=pairs)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=special,
        **settings,
    )
    made.chat_template = template
    return made


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# removes the reasoning of all turns but the last, and gives the last an empty one, as Qwen3's does
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# no special tokens at all: the last token of a header merges with what follows
ROLE_LINES = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def family(name: str) -> Any:
    if name == "chatml":
        return make_tokenizer(
            "bytes", ["<|im_start|>", "<|im_end|>"], templates.CHATML, eos_token="<|im_end|>"
        )
    if name == "llama2":
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
        return make_tokenizer("words", ["<s>", "</s>"], LLAMA2, add_bos=True, **tokens)
    if name == "llama3":
        special = [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ]
        tokens = {"bos_token": special[0], "eos_token": special[1]}
        return make_tokenizer("bytes", special, LLAMA3, add_bos=True, **tokens)
    if name == "gemma":
        special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
        return make_tokenizer("words", special, GEMMA, add_bos=True, bos_token="<bos>", eos_token="<eos>")
    if name == "thinking":
        made = make_tokenizer("bytes", ["<|im_start|>", "<|im_end|>"], THINKING, eos_token="<|im_end|>")
        made.add_tokens(["<think>", "</think>"])  # tokens of their own, but not special
        return made
    end = "<|endoftext|>"  # gpt2: one special token, no template, BOS = EOS but none is added
    return make_tokenizer("bytes", [end], None, bos_token=end, eos_token=end, pad_token=end)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Any]:
    found = {name: family(name) for name in ("chatml", "llama2", "llama3", "gemma", "gpt2", "thinking")}
    folder = tmp_path_factory.mktemp("gpt2")
    found["gpt2"].save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return found | {"toy": tokenizer, "gpt2+chatml": data.load_tokenizer(str(folder), "chatml")}


NAMES = ["chatml", "llama2", "llama3", "gemma", "toy", "gpt2+chatml"]
GOLDEN = {
    "chatml": ["Yes.<|im_end|>", "No.<|im_end|>"],
    "llama2": ["Yes. </s>", "No. </s>"],
    "llama3": ["Yes.<|eot_id|>", "No.<|eot_id|>"],
    "gemma": ["Yes.<end_of_turn>", "No.<end_of_turn>"],
    "toy": ["Yes.<|end|>", "No.<|end|>"],
    "gpt2+chatml": ["Yes.<|endoftext|>", "No.<|endoftext|>"],
}


@pytest.mark.parametrize("name", NAMES)
def test_every_reply_is_scored_with_its_end_token_and_nothing_else(families: dict, name: str) -> None:
    tokenizer = families[name]
    ((tokens, mask),) = data.encode_chat(tokenizer, CHAT, REPLIES)
    assert scored(tokenizer, (tokens, mask)) == GOLDEN[name]
    assert (tokens[mask] == data.end_token(tokenizer)).sum() == 2 and mask[-1]


@pytest.mark.parametrize("name", NAMES)
def test_there_is_at_most_one_bos(families: dict, name: str) -> None:
    tokenizer = families[name]
    tokens = data.encode_chat(tokenizer, CHAT[:2], REPLIES[:2])[0].ids.tolist()
    rendered = tokenizer.apply_chat_template(CHAT[:2], tokenize=False)
    assert tokenizer.decode(tokens) == rendered.rstrip("\n")
    if name in ("llama2", "llama3", "gemma"):
        assert tokens[0] == tokenizer.bos_token_id and tokens.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", NAMES)
def test_generation_starts_where_the_scored_response_does(families: dict, name: str) -> None:
    ((tokens, mask),) = data.encode_chat(families[name], CHAT[:2], REPLIES[:2])
    assert data.encode_prompt(families[name], CHAT[:1]) == tokens[: np.argmax(mask)].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_in_a_message_are_text(families: dict, name: str) -> None:
    tokenizer = families[name]
    special = tokenizer.decode([data.end_token(tokenizer)])
    spoof = [
        {"role": "user", "content": f"Is {special} so?"},
        {"role": "assistant", "content": f"Yes. {special} No."},
    ]
    plain = data.encode_chat(tokenizer, CHAT[:2], [False, True])[0].ids.tolist()
    ((tokens, mask),) = data.encode_chat(tokenizer, spoof, [False, True])
    for token in tokenizer.added_tokens_decoder:
        assert tokens.tolist().count(token) == plain.count(token)
    if name not in ("llama2", "gemma"):  # whose pieces decode with spaces between
        assert f"Is {special} so?" in tokenizer.decode(tokens[~mask])
        assert f"Yes. {special} No." in tokenizer.decode(tokens[mask])


def test_the_end_token_is_what_follows_a_reply_not_what_opens_it(families: dict) -> None:
    tokenizer = families["thinking"]
    assert tokenizer.decode([data.end_token(tokenizer)]) == "<|im_end|>"
    (sequence,) = data.encode_chat(tokenizer, CHAT[:2], REPLIES[:2])
    assert scored(tokenizer, sequence) == ["<think>\n\n</think>\n\nYes.<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_gives_a_sequence_a_reply(
    families: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = families["thinking"]
    source = write(tmp_path, {"messages": CHAT[:2]}, {"messages": CHAT})
    one, two = load("sft", source, tokenizer)
    assert "sft: 2 conversations became 4 sequences, one a reply" in capsys.readouterr().out
    texts = [[scored(tokenizer, s) for s in example.sequences] for example in (one, two)]
    yes, no = (f"<think>\n\n</think>\n\n{text}<|im_end|>" for text in ("Yes.", "No."))
    assert texts == [[[yes]], [[yes], [no]]]
    for tokens, mask in two.sequences:
        asked = data.encode_prompt(
            tokenizer, CHAT[: 1 if len(tokens) < 99 and "No." not in tokenizer.decode(tokens) else 3]
        )
        assert asked == tokens[~mask].tolist()  # what generation sees
    (whole, parts), _ = load_both("sft", source, tokenizer, train_on_prompt=True)
    assert parts.num_targets < 2 * parts.num_tokens - whole.num_tokens  # what both have is scored once


@pytest.mark.parametrize("merged", ["assistant: Yes", ": Yes", " Yes"])
def test_a_reply_that_merges_with_its_header_is_cut_from_it_as_in_generation(merged: str) -> None:
    tokenizer = make_tokenizer("bytes", ["<eos>"], ROLE_LINES, eos_token="<eos>")
    tokenizer.backend_tokenizer.add_tokens([merged])  # stands for a merge across the boundary
    (sequence,) = data.encode_chat(tokenizer, CHAT[:2], REPLIES[:2])
    assert scored(tokenizer, sequence) == ["Yes.\n<eos>"]
    assert sequence.ids[~sequence.mask].tolist() == data.encode_prompt(tokenizer, CHAT[:1])
    (opened,) = data.encode_chat(tokenizer, CHAT[1:2], [True])  # nothing comes before it but its header
    assert scored(tokenizer, opened) == ["Yes.\n<eos>"]


def test_a_turn_whose_last_token_merges_with_the_next_is_not_taken_for_a_rewrite() -> None:
    template = ROLE_LINES.replace("\n", "\n\n").replace(": '", ":|'")
    tokenizer = make_tokenizer("bytes", ["<eos>", "|"], template, eos_token="<eos>")
    tokenizer.backend_tokenizer.add_tokens(["\n\nuser:"])
    (sequence,) = data.encode_chat(tokenizer, CHAT, [False, False, False, True])
    assert scored(tokenizer, sequence) == ["No.\n\n<eos>"]


def test_the_end_token_is_scored_though_it_is_the_padding_token_too(families: dict) -> None:
    tokenizer = families["llama2"]
    assert tokenizer.pad_token_id == data.end_token(tokenizer)
    ((tokens, mask),) = data.encode_chat(tokenizer, CHAT[:2], REPLIES[:2])
    assert mask[-1] and tokens[-1] == tokenizer.pad_token_id


def test_without_a_template_strings_are_plain_text(families: dict, tmp_path: Path, capsys: Any) -> None:
    tokenizer = families["gpt2"]
    records = [
        {"prompt": "Is it", "completion": "so?"},
        {"prompt": "Is it", "completion": " so?<|endoftext|>"},
        {"input": "Is it", "output": "so?"},
        {"text": "Yes. No."},
    ]
    found = [e.sequences[0] for e in load("sft", write(tmp_path, *records), tokenizer)]
    assert [tokenizer.decode(tokens) for tokens, _ in found] == [
        "Is itso?<|endoftext|>",
        "Is it so?<|endoftext|>",
        "Is it so?<|endoftext|>",
        "Yes. No.<|endoftext|>",
    ]
    assert [scored(tokenizer, sequence)[0][-13:] for sequence in found] == ["<|endoftext|>"] * 4
    assert scored(tokenizer, found[1]) == scored(tokenizer, found[2]) == [" so?<|endoftext|>"]
    assert scored(tokenizer, found[3]) == ["s. No.<|endoftext|>"]  # nothing comes before the first token
    pair = load("pairs", write(tmp_path, {"prompt": "Is it", "chosen": "so?", "rejected": " so?"}), tokenizer)
    assert [tokenizer.decode(x.ids) for x in pair[0].sequences] == [
        t + "so?<|endoftext|>" for t in ("Is it", "Is it ")
    ]
    assert "follow the prompt as they stand" in capsys.readouterr().out


def test_plain_text_has_one_bos_if_the_tokenizer_adds_one(families: dict, tmp_path: Path) -> None:
    tokenizer = family("llama2")
    tokenizer.chat_template = None
    pair = {"prompt": "Is it", "chosen": " so?", "rejected": " sure?"}
    chosen, rejected = load("pairs", write(tmp_path, pair), tokenizer)[0].sequences
    assert tokenizer.decode(chosen[0]) == "<s> Is it so?</s>" and scored(tokenizer, rejected) == ["sure?</s>"]
    assert data.encode_prompt(tokenizer, "Is it") == chosen[0][: np.argmax(chosen[1])].tolist()
    assert data.encode_prompt(tokenizer, "<s>Is it").count(tokenizer.bos_token_id) == 1
    assert data.encode_prompt(families["gpt2"], "Is it")[0] != families["gpt2"].bos_token_id


# ---------------------------------------------------------------------------------------------------- formats

USER, SYSTEM, END = "<|im_start|>user\n", "<|im_start|>system\n", "<|im_end|>"
QUESTION, REPLY = f"{USER}3+4?{END}\n<|im_start|>assistant\n", f"7{END}"
BRIEF = f"{SYSTEM}Be brief.{END}\n"
DEMONSTRATIONS = [
    ({"prompt": "3+4?", "completion": " 7"}, QUESTION, [REPLY]),
    ({"input": "3+4?\n", "output": "7"}, QUESTION, [REPLY]),
    ({"question": "3+4?", "answer": "7", "system": "Be brief."}, BRIEF + QUESTION, [REPLY]),
    ({"prompt": None, "question": "3+4?", "response": "7"}, QUESTION, [REPLY]),
    (
        {"instruction": "Add.", "input": "3, 4", "output": "7"},
        QUESTION.replace("3+4?", "Add.\n\n3, 4"),
        [REPLY],
    ),
    ({"instruction": "3+4?", "context": "", "response": "7"}, QUESTION, [REPLY]),
    (
        {"conversations": [{"from": "Human", "value": "3+4?"}, {"from": "GPT", "value": "7"}]},
        QUESTION,
        [REPLY],
    ),
    (
        {"text": "<extra_id_0>System\n\n<extra_id_1>User\n3+4?\n<extra_id_1>Assistant\n7\n<extra_id_1>"},
        QUESTION,
        [REPLY],
    ),
    ({"prompt": "3+4?\n<extra_id_1>Assistant\n7\n<extra_id_1>User\nSure?", "response": "7"}, None, [REPLY]),
    ({"messages": CHAT}, None, ["Yes." + END, "No." + END]),
    (
        {"messages": CHAT, "train_roles": "user"},
        "",
        [f"Is it so?{END}", f"{USER}Are you sure?{END}"],
    ),
    ({"messages": [*CHAT[:2], CHAT[2]]}, None, ["Yes." + END]),  # ends after the last scored turn
    ({"messages": CHAT[1:2]}, "<|im_start|>assistant\n", ["Yes." + END]),  # opened by the assistant
]


@pytest.mark.parametrize(("record", "context", "targets"), DEMONSTRATIONS)
def test_demonstrations(
    families: dict, tmp_path: Path, record: dict, context: str | None, targets: list
) -> None:
    (example,) = load("sft", write(tmp_path, record), families["chatml"])
    tokens, mask = example.sequences[0]
    assert scored(families["chatml"], (tokens, mask))[-1] == targets[-1]
    assert len(scored(families["chatml"], (tokens, mask))) == len(targets)
    assert context in (None, "") or families["chatml"].decode(tokens[~mask]) == context
    assert example.record == record


def test_nemo_masks_match_whole_names(families: dict, tmp_path: Path) -> None:
    turns = [("Human", "a"), ("Assistant", "b"), ("User", "c"), ("Model", "d")]
    record = {"conversations": [{"from": name, "value": text} for name, text in turns], "system": "s"}
    masks = ["User", "Human, User", "user", "Assistant,Model,Human,User"]
    source = write(tmp_path, *({**record, "mask": mask} for mask in masks))
    found = {}
    for example in load("sft", source, families["chatml"]):
        text = "".join(scored(families["chatml"], example.sequences[0]))
        found[example.record["mask"]] = "".join(re.findall(r"\b[abcd](?=<)", text))
    assert found == {
        "User": "abd",
        "Human, User": "bd",
        "user": "bd",
    }  # the last one is dropped
    for name in ("Users", "Usr"):  # masks nobody: the user's turns would be trained
        with pytest.raises(dist.RunError, match=rf"data.jsonl:1: found mask '{name}'; expected some of"):
            load("sft", write(tmp_path, {**record, "mask": name}), families["chatml"])


def test_every_instance_of_a_task_is_an_example(families: dict, tmp_path: Path) -> None:
    task = {
        "instruction": "Add.",
        "instances": [{"input": "3, 4", "output": "7"}, {"input": "", "output": "8"}],
    }
    found = load("sft", write(tmp_path, task), families["chatml"])
    assert [scored(families["chatml"], e.sequences[0]) for e in found] == [[f"7{END}"], [f"8{END}"]]


def test_token_ids_are_taken_as_they_are(families: dict, tmp_path: Path) -> None:
    source = write(tmp_path, {"input_ids": [5, 8, 2], "labels": [-100, 8, 2]}, {"input_ids": [5, 8, 2]})
    for example in load("sft", source, families["chatml"]):
        assert example.sequences[0][0].tolist() == [5, 8, 2]
        assert example.sequences[0][1].tolist() == [False, True, True]


ASK, SEVEN, EIGHT = (
    {"role": "user", "content": "3+4?"},
    {"role": "assistant", "content": "7"},
    {"role": "assistant", "content": "8"},
)
NEMO = "<extra_id_0>System\n\n<extra_id_1>User\n3+4?\n<extra_id_1>Assistant\n"
PAIRS = [
    {"prompt": "3+4?", "chosen": "7", "rejected": "8"},
    {"prompt": [ASK], "chosen": [SEVEN], "rejected": [EIGHT]},
    {"prompt": "3+4? ", "chosen": [ASK, SEVEN], "rejected": [ASK, EIGHT]},  # as UltraFeedback has it
    {"chosen": [ASK, SEVEN], "rejected": [ASK, EIGHT]},
    {"question": "3+4?", "chosen": "7", "rejected": "8"},
    {"chosen": "\n\nHuman: 3+4?\n\nAssistant: 7", "rejected": "\n\nHuman: 3+4?\n\nAssistant: 8"},
    {"prompt": "\n\nHuman: 3+4?\n\nAssistant:", "chosen": " 7", "rejected": " 8"},
    {"prompt": NEMO, "chosen_response": "7\n<extra_id_1>", "rejected_response": "8\n<extra_id_1>"},
    {"prompt": [ASK], "chosen_response": SEVEN, "rejected_response": EIGHT},
]


@pytest.mark.parametrize("record", PAIRS)
def test_pairs(families: dict, tmp_path: Path, record: dict) -> None:
    (example,) = load("pairs", write(tmp_path, record), families["chatml"])
    assert example.prompt == [ASK] and example.fields == formats.PAIR_FIELDS
    for sequence, reply in zip(example.sequences, "78", strict=True):
        assert families["chatml"].decode(sequence[0]) == f"{QUESTION}{reply}{END}"
        assert scored(families["chatml"], sequence) == [f"{reply}{END}"]


def test_comparisons_in_pairs_of_lines(families: dict, tmp_path: Path) -> None:
    lines = [{"text": f"{NEMO}{reply}\n<extra_id_1>"} for reply in "7887"]
    one, two = load("pairs", write(tmp_path, *lines), families["chatml"])
    assert [scored(families["chatml"], s) for s in one.sequences] == [[f"7{END}"], [f"8{END}"]]
    assert [scored(families["chatml"], s) for s in two.sequences] == [[f"8{END}"], [f"7{END}"]]
    with pytest.raises(dist.RunError, match=r"odd.jsonl:3: found one text of a pair; expected the other"):
        load("pairs", write(tmp_path, *lines[:3], name="odd.jsonl"), families["chatml"])


def test_the_sign_of_a_strength_tells_the_side_and_its_size_is_the_margin(
    families: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def helpsteer(one: str, two: str, strength: float) -> list[dict]:
        return [{"prompt": "3+4?", "response_1": one, "response_2": two, "preference_strength": strength}]

    def nemo(one: str, two: str, strength: float) -> list[dict]:
        label = [strength, -100, -100] if one == "7" else [-100, strength, -100]  # the first known value
        return [{"text": f"{NEMO}{reply}\n<extra_id_2>", "label": label} for reply in (one, two)]

    for name, make in (("columns", helpsteer), ("lines", nemo)):
        records = [*make("7", "8", -2), *make("8", "7", 3), *make("7", "8", 0)]  # negative: the first
        source = write(tmp_path, *records, name=f"{name}.jsonl")
        for example, margin in zip(load("pairs", source, families["chatml"]), (2.0, 3.0), strict=True):
            texts = [scored(families["chatml"], s) for s in example.sequences]
            assert texts == [[f"7{END}"], [f"8{END}"]] and example.prompt == [ASK]
            assert example.fields["margin"] == margin
        assert f"{name}.jsonl: dropped 1 with no preference" in capsys.readouterr().out


def test_lines_of_a_pair_with_other_labels_are_refused(families: dict, tmp_path: Path) -> None:
    lines = [{"text": f"{NEMO}{reply}\n<extra_id_2>", "label": [-int(reply)]} for reply in "78"]
    with pytest.raises(dist.RunError, match="data.jsonl:1: found one text of a pair; expected the other"):
        load("pairs", write(tmp_path, *lines), families["chatml"])
    mixed = [{"text": f"{NEMO}{reply}\n"} for reply in "78"] + [PAIRS[0]] * 2
    with pytest.raises(dist.RunError, match="data.jsonl:3: found one text of a pair; expected the other"):
        load("pairs", write(tmp_path, *mixed), families["chatml"])


def test_rankings_have_a_rank_for_each_response(families: dict, tmp_path: Path) -> None:
    records = [
        {"prompt": "3+4?", "responses": ["8", "7", [SEVEN]], "ranks": [2, 1, 1]},
        {"prompt": [ASK], "chosen": [SEVEN], "rejected": [EIGHT]},
        {"prompt": "3+4?", "response_1": "8", "response_2": "7", "preference_strength": 1},
    ]
    three, two, turned = load("ranked", write(tmp_path, *records), families["chatml"])
    replies = [[scored(families["chatml"], s) for s in e.sequences] for e in (three, two, turned)]
    assert replies == [[[f"{x}{END}"] for x in texts] for texts in ("877", "78", "78")]
    assert three.fields["ranks"].tolist() == [2, 1, 1] and two.fields["ranks"].tolist() == [1, 2]
    long = {"prompt": "3+4?", "responses": ["7", "8 " * 200], "ranks": [1, 2]}
    kept = load("ranked", write(tmp_path, records[0], long), families["chatml"], max_length=100)
    assert len(kept) == 1  # never cut


def test_responses_of_any_record_can_be_scored(families: dict) -> None:
    records = [
        ({"prompt": "3+4?", "responses": ["7", "8", "9"]}, "789"),
        ({"prompt": "3+4?", "response_1": "8", "response_2": "7", "preference_strength": 1}, "78"),
        *((record, "78") for record in PAIRS),
        ({"text": f"{NEMO}7\n<extra_id_2>", "label": [-2, -100]}, "7"),
        ({"messages": [ASK, SEVEN]}, "7"),
        ({"prompt": "3+4?", "response": "7"}, "7"),
    ]
    for record, replies in records:
        found = data.read_responses(families["chatml"], record, "here")
        assert [scored(families["chatml"], s) for s in found] == [[f"{reply}{END}"] for reply in replies]


def test_pairs_keep_their_numbers_those_alike_are_left_out_and_branching_ones_load(
    families: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    numbers = {"chosen_reward": 4, "rejected_reward": 1.5, "margin": None, "label_prob": 0.25}
    records = [
        {"prompt": "3+4?", "chosen": "7", "rejected": "8", **numbers},
        {"chosen": [ASK, SEVEN], "rejected": [ASK, SEVEN]},
        {"chosen": [ASK, SEVEN, *CHAT[:2]], "rejected": [ASK, EIGHT]},
    ]
    first, branching = load("pairs", write(tmp_path, *records), families["chatml"])
    assert "dropped 1 with sides that are alike" in capsys.readouterr().out
    assert first.fields == {"chosen_reward": 4.0, "rejected_reward": 1.5, "margin": 0.0, "label_prob": 0.25}
    assert scored(families["chatml"], branching.sequences[0]) == [f"7{END}", f"Yes.{END}"]


def test_prompts_keep_their_record_and_score_nothing(families: dict, tmp_path: Path) -> None:
    records = [
        {"prompt": "3+4?", "answer": "7", "level": 1},
        {"question": "3+4?", "answer": "7"},
        {"messages": [ASK, SEVEN]},
        {"prompt": [ASK]},
        {"text": NEMO},
    ]
    found = load("prompts", write(tmp_path, *records), families["chatml"])
    for example, record in zip(found, records, strict=True):
        assert (example.prompt, example.record, example.num_targets) == ([ASK], record, 0)
        assert families["chatml"].decode(example.sequences[0][0]) == QUESTION
    assert (
        len(
            load(
                "prompts",
                write(tmp_path, records[0], {"prompt": "a" * 99}),
                families["chatml"],
                max_prompt_length=60,
            )
        )
        == 1
    )


def test_ratings_of_every_format_share_their_attributes(families: dict, tmp_path: Path) -> None:
    label = {"helpfulness": 4, "verbosity": 0}
    records = [
        {"messages": [ASK, SEVEN], "label": {"helpfulness": 4, "verbosity": None}},
        {"messages": [ASK, {**SEVEN, "attributes": label}]},
        {"prompt": "3+4?", "response": "7", **label},
        {"text": f"{NEMO}7\n<extra_id_2>", "label": [-100, -100, -100, -100, 4, -100, -100, -100, 0]},
        {
            "conversations": [
                {"from": "User", "value": "3+4?"},
                {"from": "Assistant", "value": "7", "label": "helpfulness:4, verbosity:0"},
            ]
        },
    ]
    found = load("ratings", write(tmp_path, *records), families["chatml"])
    assert found[0].fields["helpfulness"] == 4 and math.isnan(found[0].fields["verbosity"])
    assert [example.fields for example in found[1:]] == [{"helpfulness": 4.0, "verbosity": 0.0}] * 4
    for example in found:
        assert scored(families["chatml"], example.sequences[0]) == [REPLY] and example.prompt == [ASK]
    unrated = {"messages": [ASK], "label": label}  # has no reply, so it is dropped
    assert len(load("ratings", write(tmp_path, records[0], unrated), families["chatml"])) == 1
    row = packed.make_micro_batch(found, [0, 1], CPU)
    assert row.fields["verbosity"].isnan().tolist() == [True, False]


HH = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"}
HH["rejected"] = HH["chosen"][:-1] + "e"
ATTEMPT = {"transcript": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "rating": 1.0}


def test_a_preference_gives_its_prompt_and_as_a_demonstration_its_chosen_response(
    families: dict, tmp_path: Path
) -> None:
    source, tokenizer = write(tmp_path, HH, HH), families["chatml"]
    for example in load("prompts", source, tokenizer):
        assert [m["content"] for m in example.prompt] == ["a", "b", "c"]
    for example in load("sft", source, tokenizer):
        assert scored(tokenizer, example.sequences[0]) == [f"d{END}"]  # not "b", which both sides have


def test_of_a_red_team_attempt_the_first_turn_is_the_prompt(families: dict, tmp_path: Path) -> None:
    path = tmp_path / "red_team_attempts.jsonl"
    path.write_text(json.dumps([ATTEMPT, ATTEMPT], indent=1))  # the file is one list
    for example in load("prompts", str(path), families["chatml"]):
        assert example.prompt == [{"role": "user", "content": "a"}]


def test_files_as_their_repositories_have_them(families: dict, tmp_path: Path) -> None:
    """A clone of HH-RLHF and of HelpSteer2, and the latter's preference subset, one file with its split."""
    tokenizer = families["chatml"]
    rated = {"prompt": "3+4?", "response": "7", "helpfulness": 3, "correctness": 4, "coherence": 4}
    rated |= {"complexity": 1, "verbosity": 1}
    judged = {
        "split": "train",
        "prompt": "3+4?",
        "response_1": "8",
        "response_2": "7",
        "preference_strength": 2,
    }
    judged |= {
        "preference_statement": "@Response 2 is right.",
        "preference_elaboration": "",
        "all_preferences_unprocessed": [],
    }
    held_out, tie = judged | {"split": "validation"}, judged | {"preference_strength": 0}
    shapes = {
        "hh-rlhf/harmless-base/train.jsonl.gz": [HH] * 3,
        "hh-rlhf/harmless-base/test.jsonl.gz": [HH],
        "HelpSteer2/train.jsonl.gz": [rated] * 3,
        "HelpSteer2/validation.jsonl.gz": [rated],
        "HelpSteer2/preference/preference.jsonl.gz": [judged, judged, tie, held_out],
    }
    for name, records in shapes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(tmp_path / name, "wt") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
    sources = {"hh-rlhf/harmless-base": ("pairs", 3), "HelpSteer2": ("ratings", 3)}
    sources |= {"HelpSteer2/preference/preference.jsonl.gz": ("pairs", 2)}
    for name, (kind, count) in sources.items():
        train, test = load_both(kind, str(tmp_path / name), tokenizer, eval_dataset="")
        assert (len(train), len(test)) == (count, 1), name
    assert train[0].fields["margin"] == 2 and scored(tokenizer, train[0].sequences[0]) == [f"7{END}"]


def test_fields_of_others_are_no_thoughts_and_no_ties(tmp_path: Path) -> None:
    """`reasoning: off` says that there is none, as in sets of NVIDIA's; a `tie` may be one to wear."""
    tokenizer = tool_tokenizer()
    for record in ({"reasoning": "off"}, {"thinking": True}, {"tie": "silk"}, {"tie": 1}, {"split": None}):
        (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"} | record) + "\n")
        path = str(tmp_path / "x.jsonl")
        train, _ = load_both("sft", path, tokenizer, eval_dataset=path)
        (tokens, mask) = train[0].sequences[0]
        assert tokenizer.decode(tokens[mask]) == "b<|im_end|>"


def tool_tokenizer() -> Any:
    """A template that shows tools, calls and thoughts."""
    template = (
        "{{ tools if tools }}{{ enable_thinking }}{% for m in messages %}{{ '<|im_start|>' + m.role }}"
        "{{ m.reasoning_content }}{{ m.content }}{{ m.tool_calls }}{{ '<|im_end|>' }}{% endfor %}"
        "{{ '<|im_start|>assistant' if add_generation_prompt }}"
    )
    return make_tokenizer("bytes", ["<|im_start|>", "<|im_end|>"], template, eos_token="<|im_end|>")


def blocks() -> list[tuple[str, str]]:
    return re.findall(r"```jsonl (\w+)\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)


@pytest.mark.parametrize(("kind", "text"), blocks())
def test_the_examples_of_the_docs_page_load(families: dict, tmp_path: Path, kind: str, text: str) -> None:
    (tmp_path / "page.jsonl").write_text(text)
    tokenizer = families["chatml"]
    if kind == "tools":
        kind, tokenizer = "sft", tool_tokenizer()
    found = load(kind, str(tmp_path / "page.jsonl"), tokenizer)
    lines = [json.loads(line) for line in text.splitlines()]
    per_line = 0.5 if kind == "pairs" and "text" in lines[0] else 1
    assert len(found) == per_line * len(lines) + sum(len(line.get("instances", [0])) - 1 for line in lines)


def test_the_docs_page_has_examples_of_every_kind() -> None:
    assert [kind for kind, _ in blocks()] == [
        "sft",
        "tools",
        "pairs",
        "pairs",
        "pairs",
        "ranked",
        "prompts",
        "ratings",
    ]


def test_turns_say_whether_they_are_trained_and_empty_ones_are_not(
    families: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = {"weight": (0, 1), "train": (False, True), "loss": (False, None)}
    for name, values in flags.items():
        turns = [{**m, name: values[i // 2]} if i % 2 else m for i, m in enumerate(CHAT)]
        (example,) = load("sft", write(tmp_path, {"messages": turns}), families["chatml"])
        assert scored(families["chatml"], example.sequences[0]) == [f"No.{END}"]
    silent = [{**m, "content": ""} if i == 1 else m for i, m in enumerate(CHAT)]
    source = write(tmp_path, {"messages": silent}, {"prompt": "a", "response": " "})
    (example,) = load("sft", source, families["chatml"])
    assert scored(families["chatml"], example.sequences[0]) == [f"No.{END}"]
    assert f"{source}: dropped 1 with an empty reply" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "record", "lines"),
    [
        (
            "sft",
            {"prompt": "a", "response": "b", "answer": "c"},
            ["response is read as the reply, and beside it not answer"],
        ),
        (
            "sft",
            {"messages": CHAT, "prompt": "a", "output": "c"},
            ["messages is read as the reply, and beside it not output"],
        ),
        ("sft", {"instruction": "a", "input": "b", "output": "c"}, []),
        (
            "prompts",
            {"prompt": "a", "question": "b", "answer": "c"},
            ["prompt is read as the prompt, and beside it not question"],
        ),
        ("prompts", {"prompt": "a", "answer": "c", "response": "b"}, []),
    ],
)
def test_a_field_that_another_is_read_instead_of_is_named(
    kind: str, record: dict, lines: list, families: dict, tmp_path: Path, capsys: Any
) -> None:
    source = write(tmp_path, record)
    load(kind, source, families["chatml"])
    assert re.findall(r".*: (.* beside it .*)", capsys.readouterr().out) == lines


def test_records_tell_their_split_and_a_file_is_read_by_it(tokenizer: Any, tmp_path: Path) -> None:
    records = [{"text": f"a {i}", "split": s} for i, s in enumerate(("train", "validation", "train"))]
    train, test = load_both("sft", write(tmp_path, *records), tokenizer, eval_dataset="")
    assert [len(train), len(test)] == [2, 1] and test[0].record["text"] == "a 1"


def test_folders_of_the_datasets_library_and_clones_of_the_hub_are_read(
    tokenizer: Any, tmp_path: Path
) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"prompt": f"{i}?", "response": "yes"} for i in range(4)])
    rows.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "dict")
    (tmp_path / "clone" / "data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "clone" / "data" / "train-00000-of-00001.parquet")
    sizes = [
        [*map(len, load_both("sft", tmp_path / x, tokenizer, eval_dataset=""))]
        for x in ("disk", "dict", "clone")
    ]
    assert sizes == [[3, 1], [4, 1], [3, 1]]


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    ("kind", "name", "count"),
    [
        ("pairs", "hh_harmless.jsonl.gz", 1696),  # 4 have an empty chosen reply
        ("sft", "self_instruct_seeds.jsonl", 175),
        ("sft", "gsm8k_train.jsonl.gz", 3000),
        ("prompts", "gsm8k_train.jsonl.gz", 3000),
    ],
)
def test_real_files_load(families: dict, kind: str, name: str, count: int) -> None:
    limit = {"max_prompt_length" if kind == "prompts" else "max_length": 10**6}
    train, held_out = load_both(kind, DATA / name, families["gemma"], eval_dataset="", **limit)
    assert len(train) + len(held_out) == count and len(held_out) == round(0.05 * count)


# ------------------------------------------------------------------------------------------- files and errors


GOOD = '{"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}\n'
TURN = '{"role": "assistant", "content": "b"}'
EMPTY = {("history", "[]"), ("tools", "[]"), ("chat_template_kwargs", "{}"), ("instances", "[]")}
BAD = [
    ("sft", '{"instruction": "a", "instances": ["b"]}', r":2: found the instance 'b'; expected a JSON"),
    ("sft", '{"prompt": "a"', r":2: found no valid JSON \(.*\); expected one object a line"),
    ("sft", "[1, 2]", r":2: found list; expected a JSON object"),
    ("sft", '{"prompt": "a"}', r":2: found the fields prompt; expected messages, .*prompt \+ completion"),
    ("sft", '{"prompt": 3, "completion": "b"}', r":2: found 3; expected a string or a list of role/content"),
    ("sft", '{"prompt": "a", "completion": []}', r":2: found \[\]; expected a string"),
    (
        "sft",
        '{"messages": [{"role": "nurse", "content": "b"}]}',
        r":2: found .*nurse.* expected .*a role of system",
    ),
    ("sft", '{"messages": [{"content": "b"}]}', r":2: found the message .* expected"),
    (
        "sft",
        '{"messages": [{"role": "user", "content": null}]}',
        r":2: found the message .* expected a content",
    ),
    ("sft", '{"messages": ["hello"]}', r":2: found \['hello'\]; expected a string or a list of role"),
    (
        "sft",
        '{"system": 1, "prompt": "a", "completion": "b"}',
        r":2: found the message .* expected a content",
    ),
    (
        "sft",
        '{"input_ids": [1, 2], "labels": [1]}',
        r":2: found other input_ids or labels; expected ids below",
    ),
    ("sft", '{"input_ids": [1, 999999]}', r":2: found other input_ids or labels; expected ids below"),
    ("sft", '{"input_ids": [true, 5]}', r":2: found input_ids .*; expected a list of token ids"),
    ("sft", '{"input_ids": ["a"]}', r":2: found other input_ids or labels; expected ids below"),
    ("sft", '{"prompt": "a", "completion": "\\ud800"}', r":2: cannot be encoded: "),
    (
        "pairs",
        '{"prompt": "a", "chosen": "b"}',
        r":2: found the fields prompt, chosen; expected chosen and rejected",
    ),
    ("pairs", '{"chosen": "b", "rejected": "c"}', r":2: found .*; expected a prompt for both"),
    ("pairs", GOOD[:-2] + ', "label_prob": 1.5}', r":2: found label_prob 1.5; expected a probability"),
    ("pairs", GOOD[:-2] + ', "margin": "2"}', r":2: found margin '2'; expected a number"),
    ("pairs", GOOD[:-2] + ', "margin": true}', r":2: found margin True; expected a number"),
    ("pairs", GOOD[:-2] + ', "chosen_reward": NaN}', r":2: found chosen_reward nan; expected a number"),
    (
        "pairs",
        '{"chosen": "\\n\\nHuman: a", "rejected": "\\n\\nHuman: a"}',
        r":2: found .*end with an assistant turn",
    ),
    ("sft", '{"prompt": "a", "response": null}', r":2: found the fields prompt, response \(null\); expected"),
    (
        "sft",
        '{"prompt": "a", "response": "b", "label": false}',
        ":2: found label False; expected demonstrations",
    ),
    (
        "sft",
        '{"prompt": "a", "response": "b", "images": ["c.png"]}',
        ":2: found the field images; expected text",
    ),
    (
        "sft",
        '{"prompt": "a", "response": "b", "weight": 0.5}',
        ":2: found the field weight; expected a weight",
    ),
    ("sft", '{"prompt": "a", "response": "b", "history": [["c"]]}', ":2: found "),
    ("sft", '{"messages": [{"role": "user", "content": "a", "train": 2}]}', ":2: .*a weight of 0 or 1"),
    ("sft", '{"messages": "a", "type": "TEXT_TO_VALUE"}', ":2: found type TEXT_TO_VALUE"),
    (
        "sft",
        '{"messages": [{"role": "function_call", "value": "b"}]}',
        ":2: found tool_calls 'b'; expected JSON",
    ),
    (
        "sft",
        '{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]}',
        ":2: found the fields prompt, responses",
    ),
    ("sft", '{"input_ids": [1, 2], "labels": [-100, 3]}', ":2: found labels that are other tokens"),
    *[
        ("sft", f'{{"input_ids": [1, 2], {given}}}', ":2: found (other input_ids or labels|labels that)")
        for given in (
            '"labels": ["-100", "2"]',
            '"labels": [null, 2]',
            '"labels": [-1, 2]',
            '"labels": [0, 1]',
            '"labels": [[1], [2]]',
            '"labels": [[1], [2, 3]]',
            '"loss_mask": ["0", "1"]',
            '"loss_mask": [2, 1]',
            '"loss_mask": [0, null]',
        )
    ],
    (
        "sft",
        '{"instruction": "a", "input": NaN, "output": "b"}',
        ":2: found the message of user with nan; exp",
    ),
    (
        "sft",
        '{"instruction": "a", "input": ["c"], "output": "b"}',
        r":2: found the message of user with \['c'\]; exp",
    ),
    ("sft", '{"prompt": "a", "reasoning": {"b": 1}, "response": "c"}', ":2: found .*; expected a text"),
    (
        "pairs",
        '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": 9}',
        ":2: found chosen_reward 9 and rejected_reward None; expected both, or none",
    ),
    (
        "sft",
        '{"prompt": "what is <extra_id_1> here?", "response": "b"}',
        ":2: found .*the mark <extra_id_1> at",
    ),
    ("sft", '{"text": "what is <extra_id_1> here?"}', ":2: found .*expected the mark <extra_id_1> at"),
    ("prompts", '{"instruction": {"a": 1}, "input": "b"}', ":2: found the message of none"),
    ("sft", "[" * 100_000, ":2: found no valid JSON"),
    ("pairs", GOOD[:-2] + ', "margin": 1e300}', ":2: found margin 1e\\+300; expected a number below 1e15"),
    ("sft", '{"messages": "hello"}', ":2: found messages 'hello'; expected a list of role/content messages"),
    (
        "sft",
        '{"conversations": {"from": "human", "value": "a"}}',
        ":2: found messages {'from.*; expected a list",
    ),
    ("prompts", '{"messages": "hello"}', ":2: found messages 'hello'; expected a list"),
    ("sft", '{"messages": [{"role": "user", "content": 3}]}', ":2: found the message of user with 3; exp"),
    ("sft", '{"messages": [{"content": "b"}]}', ":2: found the message of none, {'content"),
    (
        "sft",
        '{"messages": [{"role": "assistant", "content": "b", "thinking": ["c"]}]}',
        ":2: found reasoning_con",
    ),
    (
        "sft",
        '{"messages": [{"role": "user", "content": "b"}], "train_roles": 5}',
        ":2: found train_roles 5; exp",
    ),
    (
        "sft",
        '{"messages": [{"role": "user", "content": "b"}], "mask": [["c"]]}',
        ":2: found mask .*names of rol",
    ),
    (
        "sft",
        '{"messages": [{"role": "gpt", "content": [{"type": "image"}], "tool_calls": [{"name": "f"}]}]}',
        ":2: found the message of gpt with .*image.*; expected a content of text",
    ),
    ("sft", '{"input_ids": 5}', ":2: found input_ids 5; expected a list of token ids"),
    ("sft", '{"input_ids": [1, [2]]}', r":2: found input_ids \[1, \[2\]\]; expected a list of token ids"),
    ("sft", '{"input_ids": []}', ":2: found other input_ids"),
    ("sft", '{"text": 5}', ":2: found text 5; expected a text"),
    ("sft", '{"instruction": "a", "instances": 5}', ":2: found the instance '5'; expected a JSON object"),
    (
        "sft",
        GOOD[:-2] + ', "system_message": "e"}',
        ":2: found the field system_message; expected the name sy",
    ),
    ("sft", GOOD[:-2] + ', "winner": "model_a"}', ":2: found the field winner; expected chosen and rejected"),
    (
        "pairs",
        '{"prompt": "a", "choosen": "b", "rejected": "c"}',
        ":2: found the field choosen; expected chosen",
    ),
    (
        "sft",
        '{"mesages": [{"role": "user", "content": "b"}]}',
        ":2: found the field mesages; expected messages;",
    ),
    ("sft", '{"prompt": "a", "respones": "b"}', ":2: found the field respones; expected response"),
    ("sft", GOOD[:-2] + ', "tool": [{"name": "f"}]}', ":2: found the field tool; expected tools;"),
    ("sft", '{"messages": [{"role": "user", "content": "a", "wieght": 0}]}', ":2: .*wieght; expected weight"),
    ("ranked", '{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1.0]}', r":2: found .*not all equal"),
    ("ranked", '{"prompt": "a", "responses": ["b", "c"], "ranks": [1]}', r":2: found .*as many ranks"),
    ("ranked", '{"prompt": "a", "responses": ["b", "c"]}', r":2: found .*as many ranks"),
    ("ranked", '{"prompt": "a", "responses": ["b", "c"], "ranks": [1, null]}', r":2: found ranks None"),
    ("sft", '{"prompt": "a", "completion": "b", "label": 1}', r":2: found label 1; expected demonstrations"),
    (
        "sft",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1, '
        '"train": false}]}',
        r":2: found weight 1 beside train False; expected one of them",
    ),
    (
        "sft",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
        '"train_roles": []}',
        r":2: found train_roles \[\]; expected at least one role",
    ),
    (
        "pairs",
        '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_reward": 1, "score_chosen": 5}',
        r":2: found chosen_reward 1 beside score_chosen 5; expected one of them",
    ),
    # nothing of a type that the field has not stands for an absent field
    *[
        ("sft", f'{{"instruction": "a", "output": "b", "{name}": {value}}}', f":2: found .*{re.escape(said)}")
        for name in ("input", "context", "system", "history", "tools", "chat_template_kwargs", "instances")
        for value, said in (("0", "0"), ("0.0", "0.0"), ("false", "False"), ("[]", "[]"), ("{}", "{}"))
        if (name, value) not in EMPTY
    ],
    *[
        ("sft", f'{{"messages": [{TURN}], "{name}": {value}}}', f":2: found {name} .*names? of rol|one role")
        for name in ("mask", "train_roles")
        for value in ("0", "false", "[]", "{}")
    ],
    *[
        (
            "sft",
            f'{{"conversations": [{TURN[:-1]}, "label": "quality:4"}}], "type": {value}}}',
            ":2: found type ",
        )
        for value in ("0", "[]", "false", '"Value_To_Text"', '"VALUE_TO_TXT"', '"text_to_value"')
    ],
    *[
        ("pairs", GOOD[:-2] + f', "{name}": {value}}}', f":2: found the field {name}; expected ")
        for name, value in (
            ("margins", 2),
            ("masks", '"User"'),
            ("msk", '"User"'),
            ("mas", '"User"'),
            ("systems", '"e"'),
            ("typ", '"VALUE_TO_TEXT"'),
            ("types", '"VALUE_TO_TEXT"'),
            ("splits", '"test"'),
            ("tool", '"[{}]"'),
            ("instance", '[{"input": "e"}]'),
        )
    ],
    (
        "sft",
        '{"instruction": "a", "inputs": "b", "output": "c"}',
        ":2: found the field inputs; expected input",
    ),
    ("sft", '{"instruction": "a", "contexts": "b", "output": "c"}', ":2: found the field contexts; exp"),
    ("sft", '{"input_ids": [1, 2], "labelss": [1, -100]}', ":2: found the field labelss; expected labels"),
    ("sft", '{"input_ids": [1, 2], "label": [1, -100]}', ":2: found the field label beside input_ids; exp"),
    ("prompts", '{"answer": "7"}', r":2: found the fields answer; expected one of prompt, instruction"),
    ("prompts", '{"prompt": [{"role": "assistant", "content": "b"}]}', r":2: .*ends with a turn of the user"),
]


@pytest.mark.parametrize(("kind", "line", "message"), BAD)
def test_a_bad_line_stops_with_its_place(
    tokenizer: Any, tmp_path: Path, kind: str, line: str, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(GOOD + line)
    with pytest.raises(dist.RunError, match=r"bad\.jsonl" + message) as error:
        load(kind, str(tmp_path / "bad.jsonl"), tokenizer)
    assert "\n" not in str(error.value)


def test_a_label_is_context_before_its_reply_and_only_where_the_type_says_so(
    families: dict, tmp_path: Path
) -> None:
    label = "quality:4,toxicity:0"
    turns = [
        {"from": "User", "value": "3+4?", "label": None},
        {"from": "Assistant", "value": "7", "label": label},
    ]
    more = [{"from": "User", "value": "So?"}, {"from": "Assistant", "value": "Seven."}]  # a reply without one
    record = {"mask": "User", "conversations": turns + more, "type": "VALUE_TO_TEXT"}
    tokenizer = families["chatml"]
    (example,) = load("sft", write(tmp_path, record), tokenizer)
    assert scored(tokenizer, example.sequences[0]) == [f"7{END}", f"Seven.{END}"]
    assert f"{label}\n7{END}" in tokenizer.decode(example.sequences[0][0])
    (plain,) = load("sft", write(tmp_path, {**record, "type": None}, name="plain.jsonl"), tokenizer)
    assert scored(tokenizer, plain.sequences[0]) == [f"7{END}", f"Seven.{END}"]
    assert label not in tokenizer.decode(plain.sequences[0][0])
    # a generation starts after the same tokens
    asked = data.encode_prompt(tokenizer, [{"role": "user", "content": "3+4?"}], f"{label}\n")
    assert asked == example.sequences[0][0][: len(asked)].tolist()


def test_names_of_the_users_own_pass(tokenizer: Any, tmp_path: Path) -> None:
    own = "id source prompt_id question_id answers inputs chosen_model chosen_avg_rating category score tool"
    own += (
        " rank title task language topic content queries response_length conversation_id system_fingerprint"
    )
    own += " tags label_text types type contexts ask document weights function names form tasks model_name"
    record = {"prompt": "3+4?", "response": "7", **dict.fromkeys(own.split(), "x"), "input_ids": None}
    turns = [{**turn, "id": 1, "model": "x", "turn": 1, "roles": "x"} for turn in (ASK, SEVEN)]
    for value in (record, {"messages": turns, "choosen_by": "x"}):
        assert len(load("sft", write(tmp_path, value), tokenizer)) == 1


def test_a_history_before_messages_is_context(tokenizer: Any, tmp_path: Path) -> None:
    record = {"system": "Be brief.", "history": [["1+1?", "2"]], "messages": [ASK, SEVEN]}
    ((example,)) = load("sft", write(tmp_path, record), tokenizer)
    (found,) = scored(tokenizer, example.sequences[0])
    assert found.startswith("7") and "2" in tokenizer.decode(example.sequences[0].ids)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.jsonl", "train.jsonl.gz"], "found train.jsonl, train.jsonl.gz; expected one of them"),
        (["train.jsonl", "data/train.jsonl"], "expected one of them: the records would be read twice"),
        (["train.jsonl", "train-00000-of-00001.jsonl"], "expected one of them"),
        (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], "expected number 1 of 00003 too"),
        (["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl"], "expected one of them"),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], ""),
        (["train-a.jsonl", "train-b.jsonl"], ""),
    ],
)
def test_a_split_that_is_there_twice_or_in_part_is_refused(
    tokenizer: Any, tmp_path: Path, names: list[str], message: str
) -> None:
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(gzip.compress(GOOD.encode()) if name.endswith("gz") else GOOD.encode())
    if not message:
        assert len(load("sft", str(tmp_path), tokenizer)) == 2
        return
    with pytest.raises(dist.RunError, match=message):
        load("sft", str(tmp_path), tokenizer)


def test_end_tokens_that_are_no_ids_are_named(tiny_model: str, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        folder = shutil.copytree(tiny_model, tmp_path / name)
        found = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(found | {"eos_token_id": "</s>"}))
        with pytest.raises(dist.RunError, match=r"eos_token_id.*</s>") as error:
            data.load_tokenizer(str(folder)), loading.config_of(str(folder))
        assert "\n" not in str(error.value)


def test_ratings_of_which_no_value_is_known_are_left_out(tokenizer: Any, tmp_path: Path, capsys: Any) -> None:
    good, unknown = ({"messages": [ASK, SEVEN], "label": [x] * 9} for x in (3, -100))
    assert len(load("ratings", write(tmp_path, good, unknown, {**good, "correctness": None}), tokenizer)) == 2
    assert "dropped 1 with no label that is known" in capsys.readouterr().out


def test_bad_ratings_and_bad_bytes_stop_too(tokenizer: Any, tmp_path: Path) -> None:
    good = {"messages": [ASK, SEVEN]}
    for label in ([4, 4], {"helpfulness": "high"}, 3, {}):
        with pytest.raises(dist.RunError, match="data.jsonl:1: found "):
            load("ratings", write(tmp_path, {**good, "label": label}), tokenizer)
    for more in ({"label": {"correctnes": 4}}, {"correctness": 1, "correctnes": 4}):
        with pytest.raises(dist.RunError, match="found the attribute correctnes; expected correctness"):
            load("ratings", write(tmp_path, {**good, **more}), tokenizer)
    (tmp_path / "bytes.jsonl").write_bytes(GOOD.encode() + b'{"prompt": "\xff"}')
    with pytest.raises(dist.RunError, match=r"bytes.jsonl:2: found no valid JSON \('utf-8' codec"):
        load("sft", str(tmp_path / "bytes.jsonl"), tokenizer)


def test_bad_sources_stop_with_their_name(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 99)[:-20])
    (tmp_path / "table.parquet").write_text("no")
    (tmp_path / "notes.txt").write_text("no")
    expected = {
        "empty.jsonl": "found nothing; expected one JSON object a line",
        "torn.jsonl.gz": "cannot be read: Compressed file ended",
        "table.parquet": "cannot be read: ",
        "notes.txt": "found a .txt file; expected .jsonl, .json or .parquet",
        "absent.jsonl": "found no such file; expected a file, a folder, or hub/name",
        "": "found no train.* file; expected train.jsonl",
    }
    for name, message in expected.items():
        with pytest.raises(dist.RunError, match=re.escape(name) + ".*" + re.escape(message)):
            load("sft", str(tmp_path / name), tokenizer)
    for names in ("a*x.jsonl", "a.jsonl*0", "a.jsonl*-1", "a.jsonl*nan", "a.jsonl,", "*2"):
        with pytest.raises(
            dist.RunError, match=f"dataset: found {re.escape(names)}; expected names joined by commas"
        ):
            load("sft", names, tokenizer)


def test_chat_data_without_a_template_name_the_option(families: dict, tmp_path: Path) -> None:
    for record in ({"messages": CHAT}, {"prompt": "a", "response": "b", "system": "c"}):
        with pytest.raises(dist.RunError, match=r"data.jsonl:1: .*set --chat_template"):
            load("sft", write(tmp_path, record), families["gpt2"])
    with pytest.raises(dist.RunError, match=r"data.jsonl:1: .*set --chat_template"):
        load("pairs", write(tmp_path, PAIRS[3]), families["gpt2"])
    with pytest.raises(dist.RunError, match=r"data.jsonl:1: cannot be encoded: roles must alternate"):
        load("sft", write(tmp_path, {"messages": [ASK, ASK, SEVEN]}), families["gemma"])


def test_a_chat_template_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}")
    with pytest.raises(dist.RunError, match="the tokenizer of toy with chat_template .*broken.jinja: "):
        data.load_tokenizer("toy", str(tmp_path / "broken.jinja"))


def test_splits_that_nobody_knows_and_files_of_test_records_only_are_refused(
    tokenizer: Any, tmp_path: Path
) -> None:
    good = {"prompt": "q", "response": "a"}
    named = [{**good, "split": x} for x in ("train_sft", "test_sft", "Train", "dev")]
    train, held_out = data.load_sft(tokenizer, write(tmp_path, *named), "", 99)
    assert (len(train), len(held_out)) == (2, 2)
    for split, said in (
        ("part 1", r"data.jsonl:1: found split 'part 1'"),
        ("test", "records of other splits"),
    ):
        with pytest.raises(dist.RunError, match=said):
            data.load_sft(tokenizer, write(tmp_path, {**good, "split": split}), "", 99)


def test_a_comma_in_the_name_of_a_file_is_part_of_it(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "with,comma.jsonl"
    path.write_text(json.dumps({"prompt": "q", "response": "a"}) + "\n")
    assert len(data.load_sft(tokenizer, str(path), str(path), 99)[0]) == 1


@pytest.mark.parametrize("name", ["loss_scale", "train_detail", "reasoning_details"])
def test_a_key_of_a_message_that_cannot_be_followed_is_refused(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", name: [0.5]}]
    with pytest.raises(dist.RunError, match=r"data.jsonl:1: found the message .*a weight of 0 or 1"):
        data.load_sft(tokenizer, write(tmp_path, {"messages": turns}), "", 99)


def test_hub_data_sets_are_read_by_their_splits(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    import datasets

    good = json.loads(GOOD)
    splits = {"train": [good] * 3, "test": [good], "extra": [good] * 2}

    def fake(name: str, config: str | None, split: str | None, data_dir: str = "") -> Any:
        if data_dir == "harmless-base":
            assert config is None
            return {"train": [good] * 4, "test": [good] * 2}
        if name == "me/none":
            raise FileNotFoundError("not there\nreally")
        found = {"train_prefs": [good]} if config == "odd" else splits
        return found[split] if split else found

    monkeypatch.setattr(datasets, "load_dataset", fake)
    train, test = load_both("sft", "me/it", tokenizer, eval_dataset="")
    assert (len(train), len(test)) == (3, 1)
    assert len(load("sft", "me/it::extra", tokenizer)) == 2
    train, test = load_both("sft", "Anthropic/hh-rlhf:data_dir=harmless-base", tokenizer, eval_dataset="")
    assert (len(train), len(test)) == (4, 2)
    with pytest.raises(
        dist.RunError, match=r"me/it:odd: found the splits train_prefs; .* me/it:odd:train_prefs"
    ):
        load("sft", "me/it:odd", tokenizer)
    with pytest.raises(dist.RunError, match=r"dataset me/none: cannot be loaded: not there$"):
        load("sft", "me/none", tokenizer)


# ------------------------------------------------------------------------------------------------ over-length


def test_long_examples_are_cut_and_those_left_without_a_target_are_dropped(
    families: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = families["toy"]
    fits = {"prompt": "a b", "completion": "c"}
    long_reply = {"prompt": "a b", "completion": "c " * 30}
    long_prompt = {"prompt": "a " * 30, "completion": "c"}
    source = write(tmp_path, fits, long_reply, long_prompt, {"messages": CHAT[:1]})
    kept = load("sft", source, tokenizer, max_length=20)
    assert [example.record for example in kept] == [fits, long_reply]
    tokens, mask = kept[1].sequences[0]
    assert len(tokens) == len(mask) == 20 and mask[-1]
    assert data.end_token(tokenizer) not in tokens[mask]  # no end of turn is made up
    out = capsys.readouterr().out
    assert f"{source}: 1 cut at the end, by max_length 20" in out
    assert "dropped 1 with no scored token within max_length 20, 1 with no reply to train on" in out
    with pytest.raises(dist.RunError, match=r"nothing to train on, 3 with .*; expected a larger max_length"):
        load("sft", source, tokenizer, max_length=3)
    unanswered = write(tmp_path, {"messages": CHAT[:1]}, name="unanswered.jsonl")
    with pytest.raises(dist.RunError, match="1 with no reply to train on; expected replies to train on"):
        load("sft", unanswered, tokenizer)


def test_a_pair_goes_if_one_side_loses_its_target_and_whole_pairs_are_never_cut(
    tokenizer: Any, tmp_path: Path
) -> None:
    fits = {"prompt": "a b", "chosen": "c", "rejected": "d"}
    one_long = {"prompt": "a b", "chosen": "c", "rejected": "d " * 30}
    no_room = {"prompt": "a " * 30, "chosen": "c", "rejected": "d"}
    late = {"chosen": [ASK, SEVEN], "rejected": [ASK, {**ASK, "content": "a " * 30}, EIGHT]}
    source = write(tmp_path, fits, one_long, no_room, late)
    assert [e.record for e in load("pairs", source, tokenizer, max_length=20)] == [fits, one_long]
    whole, _ = load_both("pairs", source, tokenizer, max_length=20, cut="drop")
    assert [example.record for example in whole] == [fits]


def test_a_pair_keeps_its_end_or_its_start_and_is_left_out_where_nothing_differs(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    same = "the cow eats grass. " * 6
    source = write(tmp_path, PAIRS[0], {"prompt": "a", "chosen": same + "moo", "rejected": same + "b"})
    assert len(load("pairs", source, tokenizer, max_length=20)) == 1
    assert "dropped 1 with sides that are alike within max_length 20" in capsys.readouterr().out
    _, late = load("pairs", source, tokenizer, max_length=20, cut="start")
    assert [len(tokens) for tokens, _ in late.sequences] == [20, 20]
    assert [scored(tokenizer, s)[0][-14:] for s in late.sequences] == [
        "grass. moo<|end|>"[-14:],
        "grass. b<|end|>"[-14:],
    ]


def test_the_first_token_is_never_a_target(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path, {"messages": CHAT}, {"text": "a b c"}, {"input_ids": [5, 6]})
    for example in load("sft", source, tokenizer, train_on_prompt=True):
        tokens, mask = example.sequences[0]
        assert not mask[0] and mask[1:].all() and example.num_targets == len(tokens) - 1


# ----------------------------------------------------------------------------------- mixing, order and splits


def numbered(count: int, start: int = 0) -> list[packed.Example]:
    """Examples that are told apart by their length."""
    return [
        packed.Example([(np.zeros(n, np.int32), np.ones(n, bool))], "")
        for n in range(start + 1, start + count + 1)
    ]


def epoch(dataset: data.Dataset, number: int) -> list[int]:
    batch = data.batch(dataset, number, dataset.epoch_size, seed=1)
    return [example.num_tokens for example in batch]


def test_weights_say_how_often_an_epoch_visits() -> None:
    dataset = data.Dataset([(numbered(5), 2.0), (numbered(10, 5), 0.5), (numbered(4, 15), 1.25)])
    first, second = epoch(dataset, 1), epoch(dataset, 2)
    for seen in (first, second):
        counts = {n: seen.count(n) for n in range(1, 20)}
        assert all(counts[n] == 2 for n in range(1, 6))
        assert sum(counts[n] for n in range(6, 16)) == 5 and max(counts[n] for n in range(6, 16)) == 1
        assert sorted(counts[n] for n in range(16, 20)) == [1, 1, 1, 2]
    assert first != second and sorted(first) != sorted(second)  # another order, and another half


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    dataset, again = (data.Dataset([(numbered(20), 1.0)]) for _ in range(2))
    steps = [[e.num_tokens for e in data.batch(dataset, step, 7, seed=1)] for step in range(1, 11)]
    for step in (10, 3, 7, 1):  # in any order, as after a resume
        assert [e.num_tokens for e in data.batch(again, step, 7, seed=1)] == steps[step - 1]
    assert [e.num_tokens for e in data.batch(dataset, 1, 7, seed=2)] != steps[0]
    flat = sum(steps, [])
    assert sorted(flat[:20]) == sorted(flat[20:40]) == list(range(1, 21))  # epochs follow without a gap


def test_the_last_batch_of_a_run_by_epochs_is_partial() -> None:
    dataset = data.Dataset([(numbered(20), 1.0)])
    assert data.num_steps(dataset, 16, num_epochs=2) == 3
    assert [len(data.batch(dataset, step, 16, seed=1, num_epochs=2)) for step in (1, 2, 3)] == [16, 16, 8]
    assert data.num_steps(dataset, 16, num_epochs=1, max_steps=4) == 4
    assert len(data.batch(dataset, 4, 16, seed=1, num_epochs=1, max_steps=4)) == 16
    assert data.num_steps(dataset, 20, num_epochs=1, max_steps=0) == 0


def test_fewer_examples_than_a_batch_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path, {"messages": CHAT})
    with pytest.raises(dist.RunError, match="found 1 examples an epoch; expected batch_size, 2, or more"):
        data.num_steps(load("sft", source, tokenizer), batch_size=2, num_epochs=1)
    assert data.num_steps(load("sft", f"{source}*2", tokenizer), batch_size=2, num_epochs=1) == 1


def test_a_folder_brings_its_test_split_and_so_does_the_toy(tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, {"text": "a b"}, name="train-00000-of-00002.jsonl")
    write(tmp_path, {"text": "a c"}, name="train-00001-of-00002.jsonl")
    write(tmp_path, {"text": "a d"}, name="validation.jsonl")
    train, test = load_both("sft", tmp_path, tokenizer, eval_dataset="")
    assert [e.record["text"] for e in train] == ["a b", "a c"] and [e.record["text"] for e in test] == ["a d"]
    for kind in ("prompts", "ratings"):
        train, test = load_both(kind, "toy", tokenizer, eval_dataset="")
        assert len(train) >= 1000 and len(test) == 200


def chats(count: int) -> list[packed.Example]:
    """Two replies to each of `count` questions, in conversations that all begin with the same system turn."""
    system = {"role": "system", "content": "Be brief."}
    prompts = [[system, {"role": "user", "content": f"Question {i}?"}] for i in range(count)]
    longer = [[*prompt, SEVEN, ASK] for prompt in prompts]
    return [packed.Example(numbered(1)[0].sequences, prompt) for prompt in prompts + longer]


@pytest.mark.parametrize(("count", "share"), [(2, 2), (30, 2), (100, 10), (6000, 512)])
def test_the_held_out_share_is_kept_apart_by_question_whatever_the_order(count: int, share: int) -> None:
    examples = chats(count)
    kept, held = data.hold_out(examples, "x")
    questions = [{e.prompt[1]["content"] for e in side} for side in (kept, held)]
    assert len(held) == share and len(kept) + len(held) == len(examples)
    assert not questions[0] & questions[1]
    again = data.hold_out(examples[::-1], "x")[1]
    assert {e.prompt[1]["content"] for e in again} == questions[1]


def test_a_single_prompt_cannot_be_held_out() -> None:
    with pytest.raises(dist.RunError, match="dataset x: found a single prompt, .*eval_dataset"):
        data.hold_out(chats(1), "x")


# ------------------------------------------------------------------------------------------------ packed rows


def ranks_share(dataset: str, cases: list[list[int]]) -> dict[str, Any]:
    """What one rank sees of pairs that both ranks encode together. Runs on the session of two ranks."""
    train = load("pairs", dataset, data.load_tokenizer("toy"))
    found = [list(packed.micro_batches(train[:size], limit, CPU)) for limit, size in cases]
    ids = [[row.example_ids.tolist() for row in rows] for rows in found]
    return {"ids": ids, "tokens": [[tokens.tolist() for tokens, _ in e.sequences] for e in train]}


def ranks_fail(dataset: str) -> str:
    try:
        load("pairs", dataset, data.load_tokenizer("toy"))
    except dist.RunError as error:
        return str(error)
    return "no error"


def test_two_ranks_share_a_batch_in_equally_many_rows(two_ranks: Any, tokenizer: Any, tmp_path: Path) -> None:
    words = ["the lion eats meat. " * n for n in range(1, 41)]
    records = [{"prompt": f"{i}?", "chosen": w, "rejected": "8"} for i, w in enumerate(words)]
    dataset = write(tmp_path, *records)
    cases = [[256, 40], [64, 40], [10**6, 1]]
    one, two = two_ranks("test_data:ranks_share", dataset=dataset, cases=cases)
    alone = ranks_share(dataset, cases)
    assert one["tokens"] == two["tokens"] == alone["tokens"]
    for mine, other, (_, size) in zip(one["ids"], two["ids"], cases, strict=True):
        assert len(mine) == len(other)
        assert sorted(sum(mine + other, [])) == list(range(size))
    assert [one["ids"][-1], two["ids"][-1]] == [
        [[0]],
        [[]],
    ]  # of one example the second rank gets a dummy row


def test_a_bad_line_stops_both_ranks_with_the_same_words(two_ranks: Any, tmp_path: Path) -> None:
    source = write(tmp_path, PAIRS[0], {"prompt": "a", "chosen": "b"}, PAIRS[0], {"prompt": "a"})
    one, two = two_ranks("test_data:ranks_fail", dataset=source)
    assert one == two and "data.jsonl:2: found the fields prompt, chosen" in one


def test_a_reply_that_opens_a_conversation_is_scored_without_its_header(toy: Path) -> None:
    messages = [{"role": "assistant", "content": "a moo."}, {"role": "user", "content": "Hi."}]
    tokenizer = data.load_tokenizer("toy", "chatml")
    ((tokens, mask),) = data.encode_chat(tokenizer, messages, [True, False])
    assert tokenizer.decode(tokens[mask]) == "a moo." + tokenizer.eos_token


# ------------------------------------------------------------------------------------ what training will see


def show(source: Any, kind: str, **options: Any) -> None:
    preview.main(preview.Args(str(source), kind, **options))


@pytest.mark.parametrize("kind", ["sft", "pairs", "prompts", "ratings"])
def test_every_sequence_is_written_as_training_sees_it(
    tmp_path: Path, tokenizer: Any, toy: Path, kind: str
) -> None:
    lines = (toy / kind / "train.jsonl").read_text().splitlines(keepends=True)[:40]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    show(tmp_path / "data.jsonl", kind, output=str(tmp_path / "shown.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "shown.jsonl").read_text().splitlines()]
    examples = load(kind, str(tmp_path / "data.jsonl"), tokenizer)
    assert [(row["record"], row["sequence"]) for row in rows] == [
        (i, k) for i, example in enumerate(examples) for k in range(len(example.sequences))
    ]
    for row in rows:
        ids, mask = examples[row["record"]].sequences[row["sequence"]]
        assert row["text"] == tokenizer.decode(ids.tolist()) and row["text"].startswith("<|")
        assert row["trained"] == "".join(scored(tokenizer, (ids, mask)))
        assert row["trained"].endswith("<|end|>") != (kind == "prompts")


def test_a_few_are_printed_under_another_template_and_fitted_to_a_length(tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path, *({"messages": [ASK, {**SEVEN, "content": f"7 {i}"}]} for i in range(5)))
    show(source, "sft", chat_template="chatml", max_length=64)
    printed = capsys.readouterr().out
    assert "record 2, sequence 0\n  text:\n    <|im_start|>user\n    3+4?" in printed
    assert "  trained:\n    7 2<|end|>" in printed and "record 3" not in printed
    with pytest.raises(dist.RunError, match="expected a larger max_length than 4"):
        show(source, "sft", max_length=4)
    with pytest.raises(dist.RunError, match=r"shown.jsonl: cannot be written \(No such file"):
        show(source, "sft", output=str(tmp_path / "absent" / "shown.jsonl"))


def test_rankings_and_prompts_are_shown_by_their_own_limits(tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path, {"prompt": "3+4?", "responses": ["7", "8"], "ranks": [1, 2]})
    for kind in ("ranked", "prompts"):
        show(source, kind, max_length=10**6 if kind == "prompts" else 64)
        printed = capsys.readouterr().out
        assert ("sequence 1" in printed) == (kind == "ranked") and "more than the model takes" not in printed
    with pytest.raises(dist.RunError, match="more tokens than max_prompt_length 2; expected a larger max_p"):
        show(source, "prompts", max_prompt_length=2)


def test_the_preview_replaces_neither_its_data_nor_another_file(tmp_path: Path) -> None:
    source = write(tmp_path, {"messages": [ASK, SEVEN]})
    before = Path(source).read_text()
    (tmp_path / "train.jsonl").write_text(before)
    (tmp_path / "mine").write_text("notes")
    (tmp_path / "folder").mkdir()
    for read, name, overwrite, message in (
        (source, "data.jsonl", True, "found data that are read; expected a new name$"),
        (f"{source}*2,toy", "data.jsonl", True, "found data that are read; expected a new name$"),
        (str(tmp_path), "train.jsonl", True, "found data that are read; expected a new name$"),
        (source, "mine", False, "found something there; expected a new name, or --overwrite"),
        (source, "folder", True, "found something there; expected a new name$"),
    ):
        with pytest.raises(dist.RunError, match=message):
            show(read, "sft", output=str(tmp_path / name), overwrite=overwrite)
    assert (tmp_path / "mine").read_text() == "notes" and Path(source).read_text() == before
    show(source, "sft", output=str(tmp_path / "mine"), overwrite=True)
    assert json.loads((tmp_path / "mine").read_text())["record"] == 0


def test_the_command_refuses_with_one_line_and_writes_nothing(tmp_path: Path) -> None:
    source = write(tmp_path, {"a": 1})
    command = [sys.executable, "-m", "common.data", source, "--kind", "sft", "--output", f"{tmp_path}/shown"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "shown").exists()
    assert done.stderr.startswith(f"error: {source}:1: found the fields a; expected ")
    assert done.stderr.count("\n") == 1


def test_a_limit_beyond_the_models_positions_is_lowered_and_said(tmp_path: Path, tokenizer: Any, capsys: Any):
    """GPT-2 has a table of positions: what is longer would be an IndexError in the middle of a run."""
    make_tiny_model(tmp_path / "base", tokenizer, max_position_embeddings=40)
    own = data.load_tokenizer(str(tmp_path / "base"))
    train, _ = data.load_sft(own, "toy", "toy", 2048)
    out = capsys.readouterr().out
    assert "max_length 2048 is more than the model takes; it is 40 now" in out
    assert max(example.num_tokens for example in train) <= 40
    prompts, _ = data.load_prompts(own, "toy", "toy", 1024)
    assert "max_prompt_length 1024 is more than the model takes; it is 39 now" in capsys.readouterr().out
    assert max(example.num_tokens for example in prompts) <= 39


def test_a_turn_that_ends_where_the_next_begins_is_trained_to_end(tmp_path: Path) -> None:
    """GLM's template writes no end: its generation stops at the header of the user's next turn."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens(["<|endoftext|>", "<|user|>", "<|assistant|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    made.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    made.save_pretrained(tmp_path)
    talk = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
    for ends, expected in (([256, 257], "b<|user|>b<|user|>"), (256, "bb<|endoftext|>")):
        GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        [(tokens, mask)] = data.encode_chat(tokenizer, talk, [False, True] * 2)
        assert "".join(tokenizer.convert_ids_to_tokens(tokens[mask].tolist())) == expected
