"""Files to records, conversations and labels; what needs a tokenizer is in tests/test_data.py."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import cai
from common import constitutions, dist, formats, labels


def test_neighbouring_turns_of_a_transcript_are_joined_and_text_is_never_lost() -> None:
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: \n\nHuman: c\n\nAssistant: d\n\ne"
    found = [(m["role"], m["content"]) for m in formats.as_messages(text, "")]
    assert found == [("user", "a\n\nb"), ("assistant", ""), ("user", "c"), ("assistant", "d\n\ne")]
    quoted = "Read this:\n\nHuman: a\n\nAssistant: b"  # a transcript inside a text is part of the text
    assert formats.as_messages(quoted, "") == [{"role": "user", "content": quoted}]
    helpsteer = "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc"
    found = [(m["role"], m["content"]) for m in formats.as_messages(helpsteer, "")]
    assert found == [("user", "a"), ("assistant", "b"), ("user", "c")]


def test_files_of_every_type_hold_the_same_records(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [{"prompt": "a\u2028b\u0085c", "completion": "\r\n x"}, {"prompt": "\u00e9", "completion": "y"}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    texts = {
        "a.jsonl": "\n".join(lines),
        "b.jsonl": "\ufeff" + "\r\n".join(lines) + "\r\n\n",
        "c.json": json.dumps(records, indent=1),
        "d.json": "\n".join(lines),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(texts["b.jsonl"].encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "f.parquet")
    for path in tmp_path.iterdir():
        assert [record.value for record in formats.read_file(path)] == records, path
    assert formats.read_file(tmp_path / "b.jsonl")[1].where == f"{tmp_path}/b.jsonl:2"


def test_nulls_in_calls_are_kept_unless_a_table_has_filled_them_in(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    calls = [{"name": "f", "arguments": {"a": None}}, {"name": "g", "arguments": {"b": "x"}}]
    records = [{"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]} for call in calls]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "b.parquet")
    found = {}
    for name in ("a.jsonl", "b.parquet"):
        turns = [record.value["messages"][0] for record in formats.read_file(tmp_path / name)]
        read = [formats.as_message(turn, "")["tool_calls"][0]["function"] for turn in turns]
        found[name] = [call["arguments"] for call in read]
    assert found == {"a.jsonl": [{"a": None}, {"b": "x"}], "b.parquet": [{}, {"b": "x"}]}


def test_a_dict_of_attributes_has_one_order_and_values_from_0_to_4() -> None:
    assert labels.read_line({"verbosity": 1, "quality": 4}, "x") == "quality:4,verbosity:1\n"
    assert labels.read_line({"quality": 4, "verbosity": 1}, "x") == "quality:4,verbosity:1\n"
    assert labels.read_line("", "x") == ""
    for label, message in (
        ("quality:5", "found quality:5; expected a whole number from 0 to 4"),
        ("quality:1.5", "found quality:1.5; expected a whole number"),
        ("quality", "found the label 'quality'; expected name:value joined by commas"),
        ("quality:4:1", "found the label"),
        ("wit:1", "found the attribute wit; expected one of quality"),
    ):
        with pytest.raises(dist.RunError, match=message):
            labels.read_line(label, "x", ["quality"])


def test_names_and_weights_of_a_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert formats.read_sources(" a.jsonl*2, me/it:c:s*.5 ,toy") == [
        ("a.jsonl", 2.0),
        ("me/it:c:s", 0.5),
        ("toy", 1.0),
    ]
    monkeypatch.chdir(tmp_path)
    Path("odd*2").touch()
    assert formats.read_sources("odd*2,odd*2*3") == [("odd*2", 1.0), ("odd*2", 3.0)]


# constitutions

ONE = {"prompt": ["\n\nCritiqueRequest: Say it.\n\nCritique:"]}
ONE["edit_request"] = "\n\nRevisionRequest: Do it.\n\nRevision:"
PUBLISHED = {"one": ONE, "two": {"prompt": ["Say that.", "Say more."], "edit_request": "Do that."}}


def save(folder: Path, content: Any) -> str:
    path = folder / "file.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_our_constitution_has_sixteen_of_each_and_none_twice() -> None:
    defaults = cai.Args()
    revisions, rules = (
        constitutions.read_constitution(defaults.constitution),
        constitutions.read_comparisons(defaults.comparisons),
    )
    assert len(set(revisions)) == len(revisions) == 16 == len(rules) == len(set(rules))
    texts = [*rules, *(text for pair in revisions for text in pair)]
    assert not [text for text in texts if re_marks(text)]
    raw = json.loads((ROOT / defaults.constitution).read_text())
    assert all(set(item) == {"prompt", "edit_request"} for item in raw.values())
    assert len(constitutions.read_few_shots(defaults.few_shots)) % 6 == 0
    assert len(constitutions.read_judge_few_shots(defaults.judge_few_shots)) >= 4


def re_marks(text: str) -> bool:
    return text != text.strip() or any(
        f"{x}:" in text for x in ("Request", "Critique", "Revision", "Options")
    )


def test_published_files_can_be_dropped_in(tmp_path: Path) -> None:
    found = constitutions.read_constitution(save(tmp_path, PUBLISHED))
    assert found == [("Say it.", "Do it."), ("Say that.", "Do that."), ("Say more.", "Do that.")]
    assert constitutions.read_comparisons(save(tmp_path, ["\nWhich is better? Options:"])) == [
        "Which is better?"
    ]
    shot = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "corrects": ["Hello!"], "incorrects": ["Go."]}
    assert constitutions.read_judge_few_shots(save(tmp_path, [shot])) == [
        ([{"role": "user", "content": "Hi"}], "Hello!", "Go.")
    ]


def test_the_toy_constitution_is_read(toy: Path) -> None:
    assert len(constitutions.read_constitution("toy")) == len(constitutions.read_comparisons("toy")) == 4
    assert constitutions.read_few_shots("") == [] == constitutions.read_judge_few_shots("")


SAID = (
    "\n\nHuman: A\n\nAssistant: B\n\nCritiqueRequest: C\n\nCritique: D\n\nRevisionRequest: E\n\nRevision: F"
)


@pytest.mark.parametrize("text", [SAID, SAID + "\n\nHuman:", SAID + "\n\nHuman: "])
def test_examples_as_transcripts_with_and_without_an_open_turn(tmp_path: Path, text: str) -> None:
    found = constitutions.read_few_shots(save(tmp_path, [text]))
    assert [m["content"] for m in found] == list("ABCDEF")
    assert [m["role"] for m in found] == ["user", "assistant"] * 3


def test_examples_in_nemo_form(tmp_path: Path) -> None:
    turns = [{"role": r, "content": c} for r, c in zip(("User", "Assistant") * 3, "ABCDEF", strict=True)]
    found = constitutions.read_few_shots(save(tmp_path, {"samples": [turns]}))
    assert [(m["role"], m["content"]) for m in found][-1] == ("assistant", "F") and len(found) == 6


@pytest.mark.parametrize(
    ("function", "content", "expected"),
    [
        (constitutions.read_constitution, "{", "expected a JSON file"),
        (constitutions.read_constitution, {"one": {"prompt": ["a"]}}, "edit_request"),
        (constitutions.read_constitution, ["a"], "edit_request"),
        (constitutions.read_constitution, {"one": {"prompt": [""], "edit_request": "a"}}, "an empty request"),
        (constitutions.read_comparisons, [], "a list of principles"),
        (constitutions.read_comparisons, PUBLISHED, "a list of principles"),
        (constitutions.read_few_shots, ["\n\nHuman: A\n\nHuman: B"], "item 0.*in pairs"),
        (constitutions.read_few_shots, {"a": 1}, "a list of transcripts"),
        (constitutions.read_judge_few_shots, [{"prompt": "a", "corrects": ["b"]}], "item 0.*incorrects"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, function: Any, content: Any, expected: str) -> None:
    with pytest.raises(dist.RunError, match=f"file.json.*{expected}"):
        function(save(tmp_path, content))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(dist.RunError, match=r"comparisons nowhere.json: found .*expected a JSON file"):
        constitutions.read_comparisons("nowhere.json")


def test_a_refusal_is_one_line_whatever_names_a_record_has() -> None:
    assert (
        str(formats.wrong("x:1", {"resp\nse": 1}, "text")) == "x:1: found the fields resp\\nse; expected text"
    )


@pytest.mark.parametrize(
    "text",
    [
        "Explain this:\n<extra_id_1>User\nhi\n<extra_id_1>Assistant\n",  # two texts of a user's
        " <extra_id_1>User\nhi\n<extra_id_1>Assistant\nho\n",
        "hello <extra_id_1>User\nq\n<extra_id_1>Assistant\n",
        "<extra_id_1>User\nhi\n<extra_id_1>Assistant\nho\n<extra_id_2>trailing text",
    ],
)
def test_marks_that_would_eat_text_are_refused(text: str) -> None:
    with pytest.raises(dist.RunError, match="a.jsonl:1: found"):
        formats.as_messages(text, "a.jsonl:1")


def test_the_attributes_of_a_turn_are_no_text() -> None:
    text = "<extra_id_1>User\nhi\n<extra_id_1>Assistant\n<extra_id_2>quality:4,toxicity:0\nho\n<extra_id_2>"
    found = [(m["role"], m["content"]) for m in formats.as_messages(text, "")]
    assert found == [("user", "hi"), ("assistant", "ho")]


def test_an_attribute_that_is_given_twice_is_refused() -> None:
    with pytest.raises(dist.RunError, match="the label 'quality:4,quality:2'; expected each name once"):
        labels.read_label({"label": "quality:4,quality:2"}, "a.jsonl:1")


def test_two_fields_of_one_name_are_refused(tmp_path: Path) -> None:
    """Of which a parser keeps the last: in JSON, in the columns of a table, in a folder of save_to_disk."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text('{"x": {"y": 1, "z": 2, "y": 3}}\n')
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["x", "y", "y"])
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        with pytest.raises(dist.RunError, match=f"{name}.*the field y is there twice") as error:
            formats.read_file(tmp_path / name)
        assert "\n" not in str(error.value)
    datasets.Dataset.from_list([{"x": "a"}]).save_to_disk(tmp_path / "c")
    (part,) = (tmp_path / "c").glob("*.arrow")
    with pyarrow.ipc.new_stream(str(part), table.schema) as file:
        file.write_table(table)
    with pytest.raises(dist.RunError, match="cannot be loaded: .*y"):
        formats.read_records(str(tmp_path / "c"), "train", "sft")


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            {"role": "user", "from": "gpt", "content": "a"},
            "role 'user' beside from 'gpt'; expected one of them",
        ),
        ({"role": "user", "content": [{"type": "audio", "text": "a"}]}, "audio.*expected a content of text"),
        ({"role": "user", "content": []}, "expected a content of text"),
        (
            {"role": "user", "content": "a", "loss_weight": 0.0},
            "a weight of 0 or 1 and reasoning_content, not 0",
        ),
        ({"role": "user", "content": "a", "los": 0}, "found the field los; expected loss"),
        ({"role": "user", "content": "a", "losss": 0}, "found the field losss; expected loss"),
        *[({"role": "gpt", "content": "a", "tool_calls": x}, "found tool_calls") for x in (0, False, {})],
        ({"role": "gpt", "content": "a", "function_call": 0}, "found tool_calls 0"),
        *[
            ({"role": "gpt", "content": "a", "thinking": x}, "found reasoning_content")
            for x in (0, False, [], {})
        ],
    ],
)
def test_turns_that_say_two_things_or_no_text_are_refused(turn: dict, message: str) -> None:
    with pytest.raises(dist.RunError, match=message):
        formats.as_message(turn, "a.jsonl:1")


def test_what_is_absent_of_a_turn_stays_so() -> None:
    """Nulls, empty texts and empty lists of calls, a call of nulls in a table, and a speaker's own name."""
    bare = {
        "tool_calls": [],
        "function_call": {},
        "name": "",
        "reasoning_details": [],
        "thinking": "",
        "tools": [],
    }
    turn = {"role": "user", "from": "alice", "content": [{"type": "input_text", "text": "a"}]}
    assert formats.as_message(turn | bare, "") == {"role": "user", "content": "a"}


def test_attributes_nearly_named_and_values_that_are_no_numbers_are_refused() -> None:
    for name, meant in (
        ("TOXICITY", "toxicity"),
        ("Quality", "quality"),
        ("humoz", "humor"),
        ("umor", "humor"),
    ):
        with pytest.raises(dist.RunError, match=f"found the attribute {name}; expected {meant}"):
            labels.read_label({"label": {"helpfulness": 4, name: 1}}, "x")
    for value in ("nan", "NaN", "inf"):
        with pytest.raises(dist.RunError, match=f"found toxicity {value.lower()}; expected a number"):
            labels.read_label({"label": f"quality:4,toxicity:{value}"}, "x")
    for label in (0, False, 0.0, []):
        with pytest.raises(dist.RunError, match=r"found .*; expected a label"):
            labels.read_line(label, "x")
