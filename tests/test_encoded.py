"""Encoded data sets: what is remembered makes the tokens of whole texts, and the cache is whole or absent."""

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data import ASK, GOOD, ROLE_LINES, SEVEN, family, load, load_both, make_tokenizer, write
from test_templates import FILES, TOOLS
from test_templates import family as template_family
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from common import data, dist, encoded, files, formats, packed, preview, templates, tokenizing

# ------------------------------------------------------------------------------------- pieces and whole texts

WORDS = [
    "Is it so?",
    "Yes.",
    " a",
    "b\n",
    "\n\nc",
    "",
    "<think>x</think>y",
    "<|im_start|>",
    "</s>",
    "[INST] q",
]
WORDS += [
    "<|im_end|>\n<|im_start|>user",
    "\u00e9 \u2192 \u65e5\u672c",
    "assistant:",
    "\t{{ x }}",
    "<|end|>",
    "\ufdd0",
]


def chat(draw: random.Random) -> tuple[list[dict], list[bool]]:
    """A conversation of strange texts, and which turns are trained."""

    def text() -> str:
        return draw.choice(["", " "]).join(draw.choices(WORDS, k=draw.randint(1, 4)))

    turns = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 3)):
        turns.append({"role": "user", "content": text()})
        turns.append({"role": "assistant", "content": text()})
        if draw.random() < 0.1:
            turns[-1]["reasoning_content"] = text()
    return turns, [m["role"] == "assistant" and draw.random() < 0.8 or draw.random() < 0.1 for m in turns]


def ways_agree(tokenizer: Any, chats: list[tuple[list[dict], list[bool]]]) -> None:
    """Encode all from pieces that are remembered, and each text as a whole."""

    def encode(chat: tuple[list[dict], list[bool]]) -> Any:
        tokenizing.tokenize.cache_clear()
        try:
            return [(x.ids.tolist(), x.mask.tolist()) for x in templates.encode_chat(tokenizer, *chat)]
        except dist.RunError as error:
            return str(error)

    found = [encode(chat) for chat in chats]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "pieces", Whole)
        for chat, remembered in zip(chats, found, strict=True):
            assert remembered == encode(chat), chat


class Whole:
    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def agree_under(name: str, count: int) -> None:
    draw, tokenizer = random.Random(name), template_family(name)
    tools = formats.with_context(TOOLS[0], formats.as_messages(TOOLS[0]["messages"], ""), "")
    ways_agree(tokenizer, [chat(draw) for _ in range(count)] + [(tools, [False, True, False, True])])


@pytest.mark.parametrize("name", FILES[::6])
def test_remembered_pieces_make_the_tokens_and_masks_of_whole_texts(name: str) -> None:
    agree_under(name, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_remembered_pieces_are_exact_under_every_template(name: str) -> None:
    agree_under(name, 24)


@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3", "gemma", "gpt2", "thinking", "lines", "toy"])
def test_remembered_pieces_are_exact_for_every_kind_of_tokenizer(name: str, tokenizer: Any) -> None:
    """Bytes, words as of sentencepiece, word-level; a template, one without marks, none."""
    made = tokenizer
    if name == "lines":
        made = make_tokenizer("bytes", ["<eos>"], ROLE_LINES, eos_token="<eos>")
        made.backend_tokenizer.add_tokens(["assistant: Yes", ": Yes"])  # merges across the boundary
    elif name != "toy":
        made = family(name)
    draw = random.Random(name)
    ways_agree(made, [chat(draw) for _ in range(40)])
    assert (tokenizing.Pieces(made).between.pattern != "(?!)") == (
        name not in ("llama2", "gemma", "lines", "toy")
    )


SPLIT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("how", "cuts"),
    [
        ({}, True),
        ({"split": SPLIT}, True),  # Llama 3, Qwen
        ({"split": r"\w+ \w+|\w+|\W"}, False),
        ({"split": r" ?\p{L}+| ?[.] \p{L}+|[^\p{L}]"}, False),
        ({"normalizer": normalizers.Replace(" b", "b")}, False),
        ({"added": AddedToken("b c")}, False),
        ({"added": AddedToken("<r>", rstrip=True)}, False),
        ({"added": AddedToken("<l>", lstrip=True, special=True)}, False),
        ({"added": AddedToken("b", single_word=True)}, False),
    ],
)
def test_a_text_is_cut_only_where_its_parts_do_not_see_each_other(how: dict, cuts: bool) -> None:
    tokenizer = make_tokenizer("bytes", ["<s>", "</s>"], None, eos_token="</s>")
    core = tokenizer.backend_tokenizer
    if "split" in how:
        split = pre_tokenizers.Split(Regex(how["split"]), "isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    core.normalizer = how.get("normalizer")
    core.add_tokens([how.get("added", "<x>")])
    pieces, draw = tokenizing.Pieces(tokenizer), random.Random(0)
    pieces.MOST = 20  # some are forgotten
    assert (pieces.between.pattern != "(?!)") == cuts
    words = [*WORDS, "<r>", "<l>", "b c", ". b", "  ", "it's b", "12 c"]
    for _ in range(300):
        text = draw.choice(["", " "]).join(draw.choices(words, k=6))
        assert pieces.encode(text).tolist() == Whole(tokenizer).encode(text).tolist(), text


# ------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLEANALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def folders(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.glob("*/contents.json"))


def pairs(count: int = 40) -> list[dict]:
    return [
        {"prompt": f"{i} + 1?", "chosen": f"{i + 1}", "rejected": "b " * i, "margin": i / 3}
        for i in range(count)
    ]


def test_what_is_encoded_once_is_mapped_again_and_tells_the_same(
    cache: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    tokenizer, source = family("chatml"), write(tmp_path, *pairs(), {**pairs(1)[0], "preference_strength": 0})
    first, first_eval = load_both("pairs", source, tokenizer, eval_dataset="", max_length=90)
    said = capsys.readouterr().out
    assert "cut at the end" in said and "dropped 1 with no preference" in said
    monkeypatch.setattr(encoded, "encode_rows", lambda *x: 1 / 0)
    again, again_eval = load_both("pairs", source, tokenizer, eval_dataset="", max_length=90)
    assert capsys.readouterr().out == said and len(folders(cache)) == 1
    assert (again.fingerprint(), again_eval.fingerprint()) == (first.fingerprint(), first_eval.fingerprint())
    for record, example in zip((r for r in pairs() if r in [e.record for e in first]), again, strict=True):
        assert example.record == record and example.prompt[0]["content"] == record["prompt"]
        assert example.fields == formats.PAIR_FIELDS | {"margin": record["margin"]}
    assert again.field("margin").tolist() == [e.fields["margin"] for e in again]


def test_all_that_decides_tokens_is_in_the_name_of_the_folder(cache: Path, tmp_path: Path) -> None:
    tokenizer, source = family("chatml"), write(tmp_path, *pairs())
    load("pairs", source, tokenizer)
    load("pairs", write(tmp_path, *pairs(), name="copy.jsonl"), tokenizer)  # the same content
    load("pairs", source, family("chatml"))  # the same tokenizer
    assert len(folders(cache)) == 1
    other = family("chatml")
    other.chat_template = other.chat_template.replace("\n", " ")
    for given in ({}, {"max_length": 100}, {"cut": "drop"}):
        load("pairs", source, other, **given)
    load("ranked", source, tokenizer)
    write(tmp_path, *pairs()[::-1])  # as long, at nearly the same time
    assert load("pairs", source, tokenizer)[0].record == pairs()[-1]
    assert len(folders(cache)) == 6


def test_an_option_that_encode_reads_is_in_the_name_too(cache: Path, tmp_path: Path) -> None:
    tokenizer, source, dropped = family("chatml"), write(tmp_path, *pairs()), {"0 + 1?"}

    def encode(value: dict, where: str) -> packed.Example:
        prompt, chosen, *_ = formats.read_pair(tokenizer, value, where)
        if value["prompt"] in dropped:
            raise formats.LeftOut("a question that is not wanted")
        return packed.Example([data.encode_response(tokenizer, prompt, chosen)], prompt)

    with pytest.raises(TypeError, match="dropped"):
        data.load(tokenizer, "sft", encode, source, source, 512)
    for dropped in ([], ["0 + 1?"]):
        assert len(data.load(tokenizer, "sft", encode, source, source, 512)[0]) == 40 - len(dropped)


@pytest.mark.parametrize("name", ["0.arrow", "contents.json"])
def test_a_damaged_folder_is_made_again(cache: Path, tmp_path: Path, capsys: Any, name: str) -> None:
    tokenizer, source = family("chatml"), write(tmp_path, *pairs())
    right = load("pairs", source, tokenizer).fingerprint()
    path, content = folders(cache)[0] / name, (folders(cache)[0] / name).read_bytes()
    middle = len(content) // 2
    for damaged in (content[:-8], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
        path.write_bytes(damaged)
        assert load("pairs", source, tokenizer).fingerprint() == right
        assert "damaged; it is made again" in capsys.readouterr().out
        assert path.read_bytes() == content
    load("pairs", source, tokenizer)
    assert "damaged" not in capsys.readouterr().out and not [*cache.glob("*.tmp")]


def test_a_build_that_is_killed_leaves_nothing_that_is_taken_for_data(cache: Path, tmp_path: Path) -> None:
    tokenizer, source = family("chatml"), write(tmp_path, *pairs(600))
    fork = multiprocessing.get_context("fork")

    def die() -> None:
        encoded.refuse = lambda *x: os.kill(os.getpid(), signal.SIGKILL)  # a part is on disk
        load("pairs", source, tokenizer)

    child = fork.Process(target=die)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and not folders(cache) and [*cache.glob("*.tmp/0.arrow")]
    children = [fork.Process(target=load, args=("pairs", source, tokenizer)) for _ in range(2)]
    for child in children:  # two runs at once
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0] and len(folders(cache)) == 1
    assert len(load("pairs", source, tokenizer)) == 600
    left = [cache.parent / "ref_logps-1.pt.2.tmp", cache / "files" / "3.json.4.tmp", cache / "5.seen"]
    for path in left:  # of other parts of the cache
        path.parent.mkdir(exist_ok=True)
        path.touch()
    encoded.remove_left(cache)
    assert all(path.exists() for path in left)  # of today: another run's
    for path in (*left, *cache.rglob("*")):
        os.utime(path, (0, 0))
    encoded.remove_left(cache)
    assert not [*cache.glob("*.tmp")] and folders(cache) and not any(path.exists() for path in left)


def ranks_encode(source: str, cache: str, apart: bool) -> list[Any]:
    """Fingerprint and number of folders. Runs on the session of two ranks."""
    before = dict(os.environ)
    os.environ["CLEANALIGN_CACHE"] = f"{cache}/{dist.rank() if apart else 0}"
    if apart:  # two nodes of one rank each
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    try:
        train, held_out = load_both("pairs", source, family("chatml"), eval_dataset="")
        return [train.fingerprint(), held_out.fingerprint(), len(folders(files.cache_folder() / "data"))]
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_ranks_make_one_folder_together_or_one_on_each_disk(
    two_ranks: Any, cache: Path, tmp_path: Path
) -> None:
    source = write(tmp_path, *pairs(300))
    train, held_out = load_both("pairs", source, family("chatml"), eval_dataset="")
    for apart in (False, True):
        given = {"source": source, "cache": str(tmp_path / f"apart{apart}"), "apart": apart}
        for found in two_ranks("test_encoded:ranks_encode", **given):
            assert found == [train.fingerprint(), held_out.fingerprint(), 1]


def test_a_share_of_the_lines_is_read_from_the_middle_of_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [{"text": f"a {i}"} for i in range(30)]
    write(tmp_path, *records[:10], name="train-0.jsonl")
    (tmp_path / "train-1.json").write_text(json.dumps(records[10:20]))
    table = pyarrow.Table.from_pylist(records[20:])
    pyarrow.parquet.write_table(table, tmp_path / "train-2.parquet", row_group_size=3)
    stream = formats.open_records(str(tmp_path), "train", "sft")
    assert [record.value for record in stream.records()] == records
    for start, stop in ((0, 30), (3, 9), (8, 12), (19, 27), (24, 30), (30, 30)):
        assert [stream.record(*row).value for row in stream.rows(start, stop)] == records[start:stop]


# ---------------------------------------------------------------------------------- errors, fields, progress


def test_all_bad_lines_are_named_up_to_ten(cache: Path, tmp_path: Path) -> None:
    lines = [GOOD, '{"prompt": "a"}\n'] * 3 + ["{\n", GOOD]
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(lines))
    with pytest.raises(dist.RunError) as caught:
        load("sft", str(path), family("chatml"))
    named = str(caught.value).splitlines()
    assert [line.split(": found")[0] for line in named] == [f"{path}:{n}" for n in (2, 4, 6, 7)]
    assert not [p for p in cache.iterdir() if p.name != "files"]
    path.write_text(lines[1] * 12)
    with pytest.raises(dist.RunError) as caught:
        load("sft", str(path), family("chatml"))
    named = str(caught.value).splitlines()
    assert len(named) == 11 and named[9].startswith(f"{path}:10: ") and named[10] == "and more"


def test_fields_are_added_to_a_data_set_and_not_to_its_examples() -> None:
    tokens = packed.Tokens(np.arange(3, dtype=np.int32), np.ones(3, bool))
    listed = data.Dataset([([packed.Example([tokens], "a", {"x": float(i)}) for i in range(3)], 1.0)])
    more = listed.with_fields({"y": np.array([4.0, 5.0, 6.0])})
    assert more[1].fields == {"y": 5.0, "x": 1.0} and listed[1].fields == {"x": 1.0}
    assert more.field("x").tolist() == [0, 1, 2] and more.field_names() == ["y", "x"]
    assert np.isnan(more.field("z")).all() and more.fingerprint() == listed.fingerprint()


def test_a_preview_counts_measures_and_marks_what_is_trained(tmp_path: Path, capsys: Any) -> None:
    records = [{"messages": [ASK, {**SEVEN, "content": "7 " * i}, ASK, SEVEN]} for i in range(1, 40)]
    preview.main(preview.Args(write(tmp_path, *records), "sft", chat_template="chatml", max_length=128))
    said = capsys.readouterr().out
    assert "cut at the end, by max_length 128" in said and "39 sequences, " in said and " 117 - 129 " in said
    assert "assistant\n    [[7<|end|>]]\n" in said and " of them trained" in said and "trained:" in said


@pytest.mark.parametrize("kind", ["ranked", "prompts"])
def test_a_preview_names_the_kind_and_only_what_it_has(tmp_path: Path, capsys: Any, kind: str) -> None:
    record = {"prompt": "3+4?", "responses": ["7", "8"], "ranks": [1, 2]}
    preview.main(preview.Args(write(tmp_path, record), kind, chat_template="chatml"))
    said = capsys.readouterr().out
    assert f"{kind}: 1 examples" in said and "pairs" not in said
    assert ("trained" in said) == (kind == "ranked")
