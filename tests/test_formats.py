"""Files to records, conversations and labels; what needs a tokenizer is in tests/test_data.py."""

import gzip
import json
from pathlib import Path

import pytest

from common import dist, formats


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


def test_a_dict_of_attributes_has_one_order_and_values_from_0_to_4() -> None:
    assert formats.read_line({"verbosity": 1, "quality": 4}, "x") == "quality:4,verbosity:1\n"
    assert formats.read_line({"quality": 4, "verbosity": 1}, "x") == "quality:4,verbosity:1\n"
    assert formats.read_line("", "x") == ""
    for label, message in (
        ("quality:5", "found quality:5; expected a whole number from 0 to 4"),
        ("quality:1.5", "found quality:1.5; expected a whole number"),
        ("quality", "found the label 'quality'; expected name:value joined by commas"),
        ("quality:4:1", "found the label"),
        ("wit:1", "found the attribute wit; expected one of quality"),
    ):
        with pytest.raises(dist.RunError, match=message):
            formats.read_line(label, "x", ["quality"])


def test_names_and_weights_of_a_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert formats.read_sources(" a.jsonl*2, me/it:c:s*.5 ,toy") == [
        ("a.jsonl", 2.0),
        ("me/it:c:s", 0.5),
        ("toy", 1.0),
    ]
    monkeypatch.chdir(tmp_path)
    Path("odd*2").touch()
    assert formats.read_sources("odd*2,odd*2*3") == [("odd*2", 1.0), ("odd*2", 3.0)]
