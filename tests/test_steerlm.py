"""SteerLM: labels, conditioned text, stages that run once, and replies that follow what is asked."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import args_of, read_metrics

import sft
import steerlm
from common import checkpoint, data, dist, files, formats, labels, log, packed, rewards, templates
from common.args import with_fields

NAMES = ["helpfulness", "verbosity", "toxicity"]
ASK = {"role": "user", "content": "3+4?"}


# labels


@pytest.mark.parametrize(
    ("score", "value"), [(4.7, 4), (-0.3, 0), (2.5, 2), (3.5, 4), (3.49, 3), (0.5, 0), (1.0, 1)]
)
def test_scores_are_clamped_then_rounded_halves_to_even(score: float, value: int) -> None:
    assert steerlm.clamp_and_round(score) == value


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ("wit:4", "found the attribute wit; expected one of helpfulness, verbosity, toxicity"),
        ("verbosity:5", "found verbosity:5; expected a whole number from 0 to 4"),
        ("verbosity:1.5", "found verbosity:1.5; expected a whole number"),
        ("verbosity", "expected name:value joined by commas"),
        ("", "found none; expected name:value of some of helpfulness"),
    ],
)
def test_attributes_that_cannot_be_asked_for(attributes: str, message: str) -> None:
    with pytest.raises(dist.RunError, match=message):
        labels.read_wanted(attributes, NAMES)


def test_the_default_attributes_are_helpsteer2s() -> None:
    assert list(labels.read_wanted(steerlm.Args().attributes, [*formats.ATTRIBUTES])) == [
        *formats.ATTRIBUTES[4:]
    ]


def labelled(label: str | None) -> packed.Example:
    record = {"messages": [ASK, {"role": "assistant", "content": "7", "label": label}]}
    return packed.Example([], "", record=record)


def test_high_quality_is_the_best_there_is_and_then_the_least_toxic() -> None:
    lines = ["quality:3,toxicity:0,verbosity:1", "quality:3,toxicity:0,verbosity:4", "quality:3,toxicity:2"]
    others = ["quality:2,toxicity:0", "quality:1,toxicity:0"]
    examples = [labelled(line) for line in [*others, *lines, *lines, None]]
    assert steerlm.high_quality(examples) == [lines[0] + "\n", lines[1] + "\n"]
    assert steerlm.high_quality([labelled("helpfulness:1"), labelled("helpfulness:4")]) == ["helpfulness:4\n"]
    asked = packed.Example(
        [], "", record={"messages": [{**ASK, "label": "quality:4"}], "conversations": None}
    )
    assert steerlm.high_quality([*examples, asked])[0] == lines[0] + "\n"  # what a user says is no reply
    reply = {"role": "assistant", "content": "7", "attributes": {"quality": 4}}
    rated = packed.Example([], "", record={"messages": [ASK, reply]})
    assert steerlm.high_quality([*examples, rated]) == ["quality:4\n"]
    with pytest.raises(dist.RunError, match="no label on a reply"):
        steerlm.high_quality([labelled(None)])


def test_nemo_aligners_form_of_a_labelled_conversation_is_read_alike(tokenizer: Any, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, ASK]
    turns.append({"role": "assistant", "content": "7", "label": "verbosity:1"})
    twin = steerlm.in_nemo_form(turns)
    assert twin == {
        "system": "Be brief.",
        "mask": "User",
        "type": "VALUE_TO_TEXT",
        "conversations": [
            {"from": "User", "value": "3+4?", "label": None},
            {"from": "Assistant", "value": "7", "label": "verbosity:1"},
        ],
    }
    for more in ({"trained": False}, {"reasoning_content": "3 and 4"}):
        assert steerlm.in_nemo_form([*turns[:2], turns[2] | more]) is None
    assert steerlm.in_nemo_form([turns[1], turns[2], turns[0], turns[1], turns[2]]) is None
    sets = []
    for record in ({"messages": turns, "type": "VALUE_TO_TEXT"}, twin):
        (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record) + "\n")
        path = str(tmp_path / "data.jsonl")
        labels.check_labels(path)
        sets.append(data.load_sft(tokenizer, path, path, 512)[0][0].sequences[0])
    for ours, theirs in zip(*sets, strict=True):
        assert ours.tolist() == theirs.tolist()


# conditioned text

EXTRA_ID = (
    "{%- set label_token = '<extra_id_2>' -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{{- '<extra_id_0>System\\n' + m.content + '\\n' -}}"
    "{%- else -%}{{- '<extra_id_1>' + m.role | capitalize + '\\n' + m.content + '\\n' -}}{%- endif -%}"
    "{%- if loop.last and m.role == 'assistant' -%}{{- '<extra_id_1>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<extra_id_1>Assistant\\n' -}}{%- endif -%}"
)


@pytest.fixture
def nemo_tokenizer(tiny_model: str, tmp_path: Path) -> Any:
    """A tokenizer with NeMo-Aligner's template and its special tokens."""
    tokenizer = data.load_tokenizer(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<extra_id_{i}>" for i in range(3)]})
    config = json.loads((Path(tiny_model) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer)}))
    shutil.copy(Path(tiny_model) / "model.safetensors", tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "extra_id.jinja").write_text(EXTRA_ID)
    return data.load_tokenizer(str(tmp_path), str(tmp_path / "extra_id.jinja"))


def test_the_label_line_stands_after_the_header_and_is_never_trained(tokenizer: Any) -> None:
    turns = [ASK, {"role": "assistant", "content": "7", "label": "verbosity:1\n"}]
    turns += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    tokens, mask = data.encode_response(tokenizer, turns[:1], turns[1:])
    text = tokenizer.decode(tokens).replace(" ", "")
    assert text.endswith("<|assistant|>verbosity:1\n7<|end|><|user|>Sure?<|end|><|assistant|>Yes.<|end|>")
    assert tokenizer.decode(tokens[mask]).replace(" ", "") == "7<|end|>Yes.<|end|>"


def test_a_template_may_put_a_token_before_the_label(nemo_tokenizer: Any) -> None:
    turns = [{"role": "system", "content": "Be brief."}, ASK]
    asked = nemo_tokenizer.decode(data.encode_prompt(nemo_tokenizer, turns, "quality:4,toxicity:0\n"))
    expected = "<extra_id_0>System\nBe brief.\n<extra_id_1>User\n3+4?\n<extra_id_1>Assistant\n"
    expected += "<extra_id_2>quality:4,toxicity:0\n"
    assert asked.replace(" ", "") == expected.replace(" ", "")
    reply = {"role": "assistant", "content": "7", "label": "quality:4,toxicity:0\n"}
    tokens, mask = data.encode_response(nemo_tokenizer, turns, [reply])
    assert nemo_tokenizer.decode(tokens).replace(" ", "") == (expected + "7\n<extra_id_1>").replace(" ", "")
    assert nemo_tokenizer.decode(tokens[mask]).replace(" ", "") == "7\n<extra_id_1>"


@pytest.mark.parametrize("which", ["tokenizer", "nemo_tokenizer"])
def test_plain_transformers_asks_with_the_same_tokens(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(which)
    ours = data.encode_prompt(tokenizer, [ASK], "verbosity:1\n")
    template = tokenizer.chat_template + steerlm.EXTENSION
    ask = {"tokenize": False, "add_generation_prompt": True, "chat_template": template}
    theirs = tokenizer.apply_chat_template([ASK], attributes="verbosity:1", **ask)
    assert tokenizer(theirs, add_special_tokens=False)["input_ids"] == ours
    assert tokenizer.apply_chat_template([ASK], **ask) == templates.render(tokenizer, [ASK], True)


def test_a_label_in_the_text_of_a_user_stays_text(nemo_tokenizer: Any) -> None:
    label = nemo_tokenizer.convert_tokens_to_ids("<extra_id_2>")
    turns = [{"role": "user", "content": "Say <extra_id_2>quality:4"}]
    assert label not in data.encode_prompt(nemo_tokenizer, turns)


# following


def row(asked: int, found: float, varied: str = "verbosity") -> dict:
    return {"varied": varied, "asked": asked, varied: found, "response": "a b", "ended": True}


def test_following_by_hand() -> None:
    # errors 0, 1, 1; deviations -1, 0, 1 and -1, 0, 1 of the found 0, 1, 2 shifted by one
    metrics = steerlm.follow_metrics([row(0, 1.0), row(1, 2.0), row(2, 2.0)])
    assert metrics["eval/follow/mae/verbosity"] == pytest.approx(2 / 3)
    assert metrics["eval/follow/pearson/verbosity"] == pytest.approx(math.sqrt(3) / 2)
    assert metrics["follow/found/verbosity/0"] == 1.0
    assert metrics["eval/follow/mae"] == metrics["eval/follow/mae/verbosity"]
    assert metrics["eval/follow/mean_words"] == 2 and metrics["eval/follow/ended"] == 1


def test_answers_all_alike_follow_nothing() -> None:
    metrics = steerlm.follow_metrics([row(value, 2.0) for value in range(5)])
    assert metrics["eval/follow/pearson/verbosity"] == 0 and metrics["eval/follow/mae/verbosity"] == 1.2


def test_an_attribute_is_measured_where_it_was_varied() -> None:
    rows = [row(0, 0.0), row(4, 4.0), {**row(0, 4.0, "toxicity"), "verbosity": 4.0}]
    metrics = steerlm.follow_metrics([*rows, {**row(4, 0.0, "toxicity"), "verbosity": 0.0}])
    assert metrics["eval/follow/mae/verbosity"] == 0 and metrics["eval/follow/pearson/toxicity"] == -1


# the pipeline


@pytest.fixture(scope="module")
def ratings(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rated conversations, two of them equal."""
    folder = tmp_path_factory.mktemp("ratings")
    for split, count in (("train", 40), ("test", 12)):
        lines = (toy / "ratings" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join([*lines[:count], lines[0]]))
    return folder


SHORT = "--max_steps 2 --batch_size 8 --eval_every 2 --learning_rate 1e-3"


def settings(folder: Path, ratings: Path, **more: Any) -> steerlm.Args:
    base = {
        "output_dir": str(folder),
        "dataset": str(ratings),
        "attribute_model": "toy/attribute_model",
        "judge": "toy.language:judge",
        "attributes": "toxicity:0,verbosity:1",
        "num_bootstrap_rounds": 1,
        "num_bootstrap_prompts": 6,
        "num_samples": 2,
        "max_new_tokens": 32,
        "sft": f"{SHORT} --num_samples 0",
    }
    return args_of(steerlm.Args, **{**base, **more})


def run(folder: str, ratings: str, **more: Any) -> dict[str, str]:
    """What a run wrote, by file; called here and on the two ranks."""
    steerlm.main(settings(Path(folder), Path(ratings), **more))
    files = ["2_annotated/train.jsonl", "2_annotated/nemo/test.jsonl", "4_bootstrap_1/train.jsonl"]
    return {name: (Path(folder) / name).read_text() for name in [*files, "samples.jsonl", "metrics.jsonl"]}


@pytest.fixture(scope="module")
def whole(ratings: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("steerlm") / "run"
    return folder, run(str(folder), str(ratings))


def test_every_reply_is_labelled_and_equal_conversations_stay(whole: tuple, ratings: Path) -> None:
    records = [json.loads(line) for line in whole[1]["2_annotated/train.jsonl"].splitlines()]
    replies = [turn for record in records for turn in record["messages"] if turn["role"] == "assistant"]
    given = [json.loads(line) for line in (ratings / "train.jsonl").read_text().splitlines()]
    assert len(records) == len(given) == 41 and records[-1] == records[0]
    said = [turn["content"] for record in given for turn in record["messages"] if turn["role"] == "assistant"]
    assert [turn["content"] for turn in replies] == said
    assert all(turn["label"].startswith("verbosity:") for turn in replies)  # the model's order
    assert {record["type"] for record in records} == {"VALUE_TO_TEXT"}


def test_labels_are_those_of_the_judge_mostly(whole: tuple) -> None:
    from toy.language import judge

    records = [json.loads(line)["messages"] for line in whole[1]["2_annotated/train.jsonl"].splitlines()]
    pairs = [(turns[i - 1]["content"], turns[i]) for turns in records for i in range(1, len(turns))]
    right = [
        abs(float(reply["label"].split(":")[-1]) - judge(question, reply["content"])["toxicity"]) < 1
        for question, reply in pairs
        if "label" in reply
    ]
    assert sum(right) / len(right) > 0.8


def test_a_run_leaves_its_stages_a_table_and_a_model(whole: tuple) -> None:
    folder = whole[0]
    assert {p.name for p in folder.iterdir()} >= {"2_annotated", "3_sft", "4_bootstrap_1", "5_sft_1", "model"}
    assert (folder / "curves.png").exists()
    rows = read_metrics(folder)
    assert [r["step"] for r in rows] == [0, 1, 2] and "eval/follow/spearman/toxicity" in rows[-1]
    samples = [json.loads(line) for line in whole[1]["samples.jsonl"].splitlines()]
    assert len(samples) == 3 * 2 * 5 * 2  # evaluations, attributes, values, prompts
    asked = [s["label"] for s in samples[:10:2]]
    assert asked == [f"verbosity:{value},toxicity:0\n" for value in range(5)]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    last = AutoModelForCausalLM.from_pretrained(folder / "5_sft_1" / "model")
    for ours, theirs in zip(model.parameters(), last.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "attributes is defined" in data.load_tokenizer(str(folder)).chat_template


def test_bootstrap_asks_for_the_best_lines_and_labels_what_came(whole: tuple) -> None:
    records = [json.loads(line) for line in whole[1]["4_bootstrap_1/train.jsonl"].splitlines()]
    assert 0 < len(records) <= 6
    assert all("label" in turn for r in records for turn in r["messages"] if turn["role"] == "assistant")
    metrics = read_metrics(whole[0] / "5_sft_1")
    assert metrics[0]["eval/loss"] != read_metrics(whole[0] / "3_sft")[0]["eval/loss"]


def test_two_ranks_write_the_same_files(whole: tuple, ratings: Path, tmp_path: Path, two_ranks: Any) -> None:
    ours, _ = two_ranks("test_steerlm:run", folder=str(tmp_path / "run"), ratings=str(ratings))
    for name in ("2_annotated/train.jsonl", "2_annotated/nemo/test.jsonl", "4_bootstrap_1/train.jsonl"):
        assert ours[name] == whole[1][name]
    for a, b in zip(ours["metrics.jsonl"].splitlines(), whole[1]["metrics.jsonl"].splitlines(), strict=True):
        assert json.loads(a) == pytest.approx(json.loads(b), abs=1e-5)


@pytest.mark.parametrize("stage", ["2_annotated", "3_sft", "4_bootstrap_1", "5_sft_1", "model"])
def test_a_run_cut_off_goes_on_where_it_was(whole: tuple, ratings: Path, tmp_path: Path, stage: str) -> None:
    """What an earlier kill leaves: the stages before, without the rows of what came after."""
    order = ["2_annotated", "3_sft", "4_bootstrap_1", "5_sft_1", "model"]
    folder = shutil.copytree(whole[0], tmp_path / "run")
    for later in order[order.index(stage) :]:
        shutil.rmtree(folder / later)
    kept = {"2_annotated": 0, "3_sft": 1, "4_bootstrap_1": 2, "5_sft_1": 2, "model": 3}[stage]
    lines = whole[1]["metrics.jsonl"].splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:kept]))
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("[2-5]*/*") if p.is_file()}
    again = run(str(folder), str(ratings))
    assert again["metrics.jsonl"] == whole[1]["metrics.jsonl"]
    assert again["samples.jsonl"] == whole[1]["samples.jsonl"]
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_artefacts_replace_stages(whole: tuple, ratings: Path, tmp_path: Path) -> None:
    done = whole[0]
    more = {"annotated": str(done / "2_annotated"), "conditioned_model": str(done / "3_sft")}
    steerlm.main(settings(tmp_path / "run", ratings, **more, num_bootstrap_rounds=0))
    assert not list((tmp_path / "run").glob("[1-5]_*"))
    ours, theirs = read_metrics(tmp_path / "run")[-1], read_metrics(done)[1]
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_the_attribute_model_is_trained_on_the_ratings(ratings: Path, tmp_path: Path) -> None:
    args = settings(tmp_path / "run", ratings, attribute_model="", num_bootstrap_rounds=0)
    args = with_fields(args, ratings=str(ratings), reward_model=SHORT)
    args.attributes = "helpfulness:4,correctness:4,coherence:4,complexity:2,verbosity:2"
    steerlm.main(args)
    config = json.loads((tmp_path / "run" / "1_attribute_model" / "model" / "config.json").read_text())
    assert list(config["id2label"].values())[:5] == [*formats.ATTRIBUTES[4:]]
    label = json.loads((tmp_path / "run" / "2_annotated" / "train.jsonl").read_text().split("\n")[0])
    assert label["messages"][-1]["label"].startswith("helpfulness:")


def test_without_a_judge_the_attribute_model_scores(whole: tuple, ratings: Path, tmp_path: Path) -> None:
    more = {"annotated": str(whole[0] / "2_annotated"), "conditioned_model": "toy", "judge": ""}
    steerlm.main(settings(tmp_path / "run", ratings, **more, num_bootstrap_rounds=0))
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().split("\n")[0])
    assert sample["toxicity"] != int(sample["toxicity"])  # a prediction, not a count


def test_a_stop_while_annotating_ends_the_run_and_nothing_is_asked_twice(
    whole: tuple, ratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (ratings / "train.jsonl").read_text().splitlines(keepends=True)
    many = tmp_path / "many"
    many.mkdir()
    (many / "train.jsonl").write_text("".join(lines[:30] * 10))
    honest, counts = rewards.Rater.__call__, []

    def interrupted(self: Any, replies: list, *rest: Any) -> Any:
        counts.append(len(replies))
        if len(counts) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, replies, *rest)

    monkeypatch.setattr(rewards.Rater, "__call__", interrupted)
    args = settings(tmp_path / "run", many, conditioned_model="toy", num_bootstrap_rounds=0)
    with pytest.raises(dist.RunError, match="stopped after 256 records; the same command goes on"):
        steerlm.main(args)
    steerlm.main(args)
    written = (tmp_path / "run" / "2_annotated" / "train.jsonl").read_text()
    assert len(written.splitlines()) == 300
    assert len(counts) == 2 and sum(counts) == written.count('"role": "assistant"')


def test_a_stop_in_a_stage_ends_the_run(
    ratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = log.Log.__call__

    def interrupted(self: Any, step: int, *rest: Any) -> None:
        honest(self, step, *rest)
        if self.pipeline and step == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(log.Log, "__call__", interrupted)
    with pytest.raises(dist.Stopped, match="stopped in or after 3_sft"):
        steerlm.main(settings(tmp_path / "run", ratings))
    assert checkpoint.newest(str(tmp_path / "run" / "3_sft"))
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "4_bootstrap_1").exists()


def test_stages_keep_no_weights_alive(
    ratings: Path, whole: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each stage, and after the last, no FSDP module of an earlier one is left."""
    import gc

    from torch.distributed.fsdp import FSDPModule

    found, honest = [], sft.main

    def count() -> int:
        return sum(isinstance(x, FSDPModule) for x in gc.get_objects())

    def counted(*rest: Any) -> None:
        found.append(count())
        honest(*rest)

    gc.collect()
    before = count()
    monkeypatch.setattr(sft, "main", counted)
    steerlm.main(settings(tmp_path / "run", ratings))
    gc.collect()
    assert len(found) == 2 and {*found, count()} == {before}


# bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": None}, r"train.jsonl:1: found labels and type None; expected type VALUE_TO_TEXT"),
        ({"type": "TEXT_TO_VALUE"}, r"train.jsonl:1: found labels and type TEXT_TO_VALUE"),
        ({"label": None}, r"annotated .*train.jsonl: found no reply with a label"),
        ({"label": ""}, r"annotated .*train.jsonl: found no reply with a label"),
    ],
)
def test_annotated_data_whose_labels_nothing_would_read(
    whole: tuple, ratings: Path, tmp_path: Path, change: dict, message: str
) -> None:
    records = [json.loads(line) for line in whole[1]["2_annotated/train.jsonl"].splitlines()]
    for record in records:
        record.update({name: x for name, x in change.items() if name == "type"})
        for turn in record["messages"]:
            turn.update({name: x for name, x in change.items() if name == "label"})
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(dist.RunError, match=message):
        steerlm.main(settings(tmp_path / "run", ratings, annotated=str(path)))


# files as NeMo-Aligner's preprocessing writes them

SYSTEM = "A chat between a curious user and an artificial intelligence assistant."


def thread(*turns: tuple[str, str | None], **more: Any) -> dict:
    """A record of preprocess_openassistant_data.py: user and assistant in turn, null for labels of users."""
    said = [
        {"value": text, "from": ("User", "Assistant")[i % 2], "label": x} for i, (text, x) in enumerate(turns)
    ]
    for turn in said:
        if turn["label"] == "absent":
            del turn["label"]
    return {"conversations": said, "system": SYSTEM, "mask": "User", "type": "VALUE_TO_TEXT", **more}


GOOD, BAD = "quality:4,toxicity:0,humor:1,creativity:2", "quality:1,toxicity:3"
HELPSTEER = "helpfulness:3,correctness:4,coherence:4,complexity:2,verbosity:1"
LINES = [
    thread(("What does a cow eat?", None), ("grass", GOOD), ("Sure?", None), ("go away", BAD)),
    thread(("What does a cow eat?", None), ("grass", GOOD), ("Thanks!", None)),  # ends with the user
    thread(("3+4?", None), ("7", ""), ("Why?", None), ("because", "absent")),  # nobody rated these
    thread(("2+2?", None), ("4", HELPSTEER)),  # preprocess_helpsteer_data.py
    thread(("1+1?", None), ("2", "helpfulness:2,correctness:None")),
]


@pytest.fixture
def nemo_folder(tmp_path: Path) -> Path:
    """train.jsonl and val.jsonl, as the guide names them."""
    folder = tmp_path / "oasst"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (folder / "val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES[:4]))
    return folder


def test_every_rated_reply_of_a_thread_is_a_rating(
    nemo_folder: Path, tokenizer: Any, capsys: pytest.CaptureFixture
) -> None:
    """What process_to_regression_format.py makes of the same file; a thread without labels is counted."""
    train, held_out = data.load_ratings(tokenizer, str(nemo_folder), "", 512)
    assert "dropped 1 with no label" in capsys.readouterr().out
    found = []
    for example in train:
        (ids, mask), known = (
            example.sequences[0],
            {k: v for k, v in example.fields.items() if not math.isnan(v)},
        )
        found.append((tokenizer.decode(ids[mask]).removesuffix("<|end|>").strip(), known))
        assert "quality" not in tokenizer.decode(ids)  # no label is read
    good = {"quality": 4, "toxicity": 0, "humor": 1, "creativity": 2}
    helpsteer = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}
    rows = [("grass", good), ("go away", {"quality": 1, "toxicity": 3}), ("grass", good), ("4", helpsteer)]
    assert found == [*rows, ("2", {"helpfulness": 2})] and len(held_out) == 4
    assert [*train[0].fields] == [*formats.ATTRIBUTES] and len(train[1].prompt) == 4  # system, three turns


def test_annotated_files_keep_what_has_no_label(
    nemo_folder: Path, tokenizer: Any, capsys: pytest.CaptureFixture
) -> None:
    """Trained without a line, as NeMo-Aligner trains a turn whose label is null, and counted."""
    labels.check_labels(str(nemo_folder))
    assert "2 of 7 replies have no label, trained without one" in capsys.readouterr().out
    train, _ = data.load_sft(tokenizer, str(nemo_folder), "", 512)
    texts = [
        [tokenizer.decode(x).replace(" ", "") for x in (ids, ids[mask])]
        for e in train
        for ids, mask in e.sequences
    ]
    assert f"<|assistant|>{GOOD}\ngrass<|end|>" in texts[0][0] and texts[0][1] == "grass<|end|>goaway<|end|>"
    assert texts[1][0].endswith(f"{GOOD}\ngrass<|end|>") and texts[1][1] == "grass<|end|>"
    assert texts[2][0].endswith("<|assistant|>7<|end|><|user|>Why?<|end|><|assistant|>because<|end|>")
    assert texts[4][0].endswith("<|assistant|>helpfulness:2\n2<|end|>")  # without the one that is not known


def test_the_pipeline_runs_on_nemo_aligners_files(nemo_folder: Path, tmp_path: Path) -> None:
    """Ratings, conversations and attributes of the guide; every reply is labelled, also in held-out data."""
    args = settings(tmp_path / "run", nemo_folder, attribute_model="", judge="", num_bootstrap_rounds=0)
    short = "--max_steps 1 --batch_size 2 --learning_rate 1e-3"
    attributes = ",".join(f"{name}:{4 if name == 'quality' else 'null'}" for name in formats.ATTRIBUTES)
    args = with_fields(args, ratings=f"{nemo_folder}*4", reward_model=short, sft=short, attributes=attributes)
    args.run.num_samples = 1
    steerlm.main(args)
    records = [json.loads(x) for x in (tmp_path / "run/2_annotated/train.jsonl").read_text().splitlines()]
    replies = [t for r in records for t in r["messages"] if t["role"] == "assistant"]
    assert len(records) == 5 and len(replies) == 7
    assert all([x.split(":")[0] for x in t["label"].split(",")] == [*formats.ATTRIBUTES] for t in replies)
    assert records[1]["messages"][-1] == {"role": "user", "content": "Thanks!"}
    asked = [json.loads(x)["label"] for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert asked[:2] == ["quality:0\n", "quality:1\n"] and asked[5] == "quality:4,toxicity:0\n"


def test_who_is_trained_survives_annotation(tokenizer: Any) -> None:
    said = thread(("a", None), ("b", None), ("c", None), ("d", None))
    said["conversations"][1]["weight"] = 0
    own = formats.Record({**said, "mask": "Assistant"}, "x")
    for record, expected in (
        (formats.Record(said, "x"), [None, None, False, None, None]),
        (own, [None, True, False, True, False]),
        (formats.Record({"prompt": [{"role": "user", "content": "a"}], "response": "b"}, "x"), [None, None]),
    ):
        turns, replies = steerlm.read_replies(tokenizer, tokenizer, record)
        assert [turn.get("trained") for turn in turns] == expected
        assert all(mask.any() for _, mask in replies)


def test_an_unknown_attribute_ends_the_run_before_work_starts(ratings: Path, tmp_path: Path) -> None:
    with pytest.raises(dist.RunError, match="found the attribute wit; expected one of"):
        steerlm.main(settings(tmp_path / "run", ratings, attributes="wit:4"))
    assert not (tmp_path / "run" / "2_annotated").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"attributes": "wit:4"}, "found the attribute wit; expected one of"),
        ({"ratings": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"dataset": "{bad}"}, "bad.jsonl:2"),
        ({"attributes": "wit:4", "judge": ""}, "found the attribute wit; expected one of"),
        (
            {"judge": "test_steerlm:verbosity_only", "attributes": "toxicity:0"},
            "found no toxicity in its scores",
        ),
        ({"ratings": "{high}"}, "ratings .*: found quality 9; expected values from 0 to 4"),
        ({"dataset": "{few}", "sft": "--batch_size 6"}, "sft: --batch_size: found 6; expected at most 5"),
        ({"dataset": "{value}"}, "value.jsonl:1: found type TEXT_TO_VALUE"),
        ({"reward_model": "--batch_size 42"}, "reward_model: --batch_size: found 42; expected at most 41"),
        ({"sft": "--batch_size 42"}, "sft: --batch_size: found 42; expected at most 41"),
        ({"sft": "--max_step 2"}, "sft: Unrecognized options: --max_step, 2; perhaps you meant --max_steps"),
        ({"reward_model": "--loss bt"}, "reward_model: --loss is set by the pipeline"),
        ({"judge": "nowhere:at_all"}, "package.module:function"),
    ],
)
def test_what_a_later_stage_would_refuse_is_said_before_the_first(
    ratings: Path, tmp_path: Path, change: dict, expected: str
) -> None:
    record = json.dumps({"prompt": "3+4?", "response": "7"})
    (tmp_path / "bad.jsonl").write_text(f'{record}\n{{"prompt": "3+4?"}}\n')
    replies = [
        json.dumps({"messages": [{**ASK, "content": f"{i}?"}, {"role": "assistant", "content": "7"}]})
        for i in range(6)
    ]
    (tmp_path / "few.jsonl").write_text("\n".join(replies))  # of six one is held out
    rated = [json.dumps(thread((f"{i}?", None), ("7", "quality:9"))) for i in range(9)]
    (tmp_path / "high.jsonl").write_text("\n".join(rated))
    (tmp_path / "value.jsonl").write_text(json.dumps(thread(("a", None), ("b", GOOD), type="TEXT_TO_VALUE")))
    for name in ("bad", "few", "high", "value"):
        path = str(tmp_path / f"{name}.jsonl")
        change = {option: value.replace(f"{{{name}}}", path) for option, value in change.items()}
    if "high" in str(change):
        change = {**change, "attributes": "quality:4", "judge": ""}
    base = {"attribute_model": "", "ratings": str(ratings), "reward_model": SHORT}
    with pytest.raises(dist.RunError, match=expected):
        steerlm.main(with_fields(settings(tmp_path / "run", ratings), **{**base, **change}))
    assert not list((tmp_path / "run").glob("[1-5]_*"))


def verbosity_only(prompt: str, response: str) -> dict[str, float]:
    return {"verbosity": float(len(response.split()))}


def test_a_conditioned_model_is_a_folder(ratings: Path, tmp_path: Path) -> None:
    with pytest.raises(
        dist.RunError, match=r"conditioned_model: found nowhere/x; expected a run or a model's"
    ):
        steerlm.main(settings(tmp_path / "run", ratings, conditioned_model="nowhere/x"))
    assert not (tmp_path / "run" / "2_annotated").exists()


# options of stages that have not begun, weights, prompts


class Killed(BaseException):
    """What a kill leaves is what this leaves."""


def test_options_may_change_until_their_stage_begins(
    ratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the attribute model: its options stay, those of annotation, data too, may be corrected."""
    args = settings(tmp_path / "run", ratings, attribute_model="", num_bootstrap_rounds=0)
    args = with_fields(args, ratings=str(ratings), reward_model=SHORT, num_samples=0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(steerlm, "annotate", lambda *rest: (_ for _ in ()).throw(Killed))
        steerlm.main(args)
    with pytest.raises(dist.RunError, match="holds a run with ratings"):
        steerlm.main(with_fields(args, ratings=f"{ratings}*2"))
    other = tmp_path / "other.jsonl"
    other.write_text((ratings / "test.jsonl").read_text())
    args = with_fields(
        args, attributes="verbosity:2", dataset=f"{other}*2,{ratings}", num_bootstrap_prompts=5
    )
    steerlm.main(args)
    with pytest.raises(dist.RunError, match="holds a run with attributes"):
        steerlm.main(with_fields(args, attributes="toxicity:0"))
    more = with_fields(args, num_bootstrap_rounds=1, num_bootstrap_prompts=4)
    steerlm.main(more)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]
    with pytest.raises(dist.RunError, match="holds a run with num_bootstrap_rounds"):
        steerlm.main(with_fields(more, num_bootstrap_rounds=0))


def test_weights_of_data_sets_count(ratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = settings(tmp_path / "run", ratings, num_bootstrap_rounds=0)
    given, seen = with_fields(args, dataset=f"{ratings}*3,{ratings / 'test.jsonl'}*.5"), []
    honest = data.load_sft

    def load(*rest: Any) -> tuple:
        seen.append((rest[1], honest(*rest)))
        return seen[-1][1]

    monkeypatch.setattr(data, "load_sft", load)
    monkeypatch.setattr(steerlm, "evaluate", lambda *rest: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        steerlm.main(given)
    for name, (train, held_out) in seen:  # what the check counts, and what is trained on
        assert [weight for _, weight in train.parts] == [3.0, 0.5], name
        assert train.epoch_size == 3 * 41 + round(0.5 * (len(train) - 41)) and len(held_out) == 13 + 13 - (
            len(train) - 41
        )
    assert "2_annotated/1*3" in seen[-1][0] and (tmp_path / "run/2_annotated/2/nemo/train.jsonl").exists()


def test_the_attribute_model_judges_without_the_labels_of_earlier_replies(
    toy: Path, device: torch.device, tokenizer: Any
) -> None:
    args = settings(toy, toy, judge="")
    rater = rewards.load_rater("toy/attribute_model", device, args.system)
    plain = [ASK, {"role": "assistant", "content": "7"}, {"role": "user", "content": "Sure?"}]
    labelled = [plain[0], {**plain[1], "label": "toxicity:4,verbosity:0\n"}, plain[2]]
    exchanges = [(turns, "Yes.") for turns in (plain, labelled)]
    first, second = rater.judge(exchanges, 0, device)
    assert first == pytest.approx(second, abs=1e-6)
    with_line = data.encode_response(rater.tokenizer, labelled, [{"role": "assistant", "content": "Yes."}])
    assert rater([with_line], 0, device)[0].tolist() != pytest.approx(list(first.values()), abs=1e-3)


def test_prompts_without_room_for_a_reply_are_left_out(
    tiny_model: str, ratings: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A thread longer than the model is annotated and trained, cut; nobody asks for more of it."""
    long = thread((" a" * 1100, None), ("7", GOOD))
    few = [thread((f"{i}?", None), ("7", GOOD)) for i in range(4)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in [long, *few]))
    more = {"model": tiny_model, "annotated": str(path), "conditioned_model": tiny_model, "max_new_tokens": 2}
    args = settings(tmp_path / "run", ratings, **more, num_bootstrap_rounds=0, judge="")
    args = with_fields(args, sft=f"--eval_dataset {path} --max_length 4096", num_samples=9)
    steerlm.main(args)
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 2 * 2 * 5 * 4


def test_a_run_without_prompts_to_ask_ends_too(whole: tuple, ratings: Path, tmp_path: Path) -> None:
    more = {"annotated": str(whole[0] / "2_annotated"), "conditioned_model": "toy", "num_samples": 0}
    steerlm.main(settings(tmp_path / "run", ratings, **more, num_bootstrap_rounds=0))
    assert (tmp_path / "run" / "model").is_dir()


def test_bootstrap_goes_on_from_its_replies_after_a_kill(
    whole: tuple, ratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, honest, drawn = shutil.copytree(whole[0], tmp_path / "run"), files.Journal.add, []
    annotate = steerlm.annotate
    for later in ("4_bootstrap_1", "5_sft_1", "model"):
        shutil.rmtree(folder / later)
    (folder / "metrics.jsonl").write_text("".join(whole[1]["metrics.jsonl"].splitlines(keepends=True)[:2]))

    def killed(self: Any, key: str, record: dict) -> None:
        honest(self, key, record)
        drawn.append(key)
        if len(drawn) == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files.Journal, "add", killed)
        run(str(folder), str(ratings))

    def killed_at_the_end(*rest: Any) -> None:
        annotate(*rest)
        if rest[3].parent.name == "4_bootstrap_1":
            raise Killed

    def dies(*rest: Any) -> None:
        raise Killed

    for name, deed in (("in_nemo_form", dies), ("annotate", killed_at_the_end)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(files.Journal, "add", lambda *record: drawn.append(record[1]) or honest(*record))
            patch.setattr(steerlm, name, deed)
            run(str(folder), str(ratings))
        twin = folder / "4_bootstrap_1" / "nemo" / "train.jsonl"
        assert twin.exists() == (deed is killed_at_the_end)
    assert list(folder.glob("4_*/*.replies"))
    again = run(str(folder), str(ratings))
    assert len(drawn) == len(set(drawn)) == 6 and not list(folder.glob("4_*/*.replies"))
    assert again["4_bootstrap_1/train.jsonl"] == whole[1]["4_bootstrap_1/train.jsonl"]
    assert again["metrics.jsonl"] == whole[1]["metrics.jsonl"]


# learning


@pytest.mark.slow
def test_the_default_run_follows_what_is_asked(tmp_path: Path) -> None:
    args = args_of(steerlm.Args, output_dir=str(tmp_path / "run"), **steerlm.TOY)
    steerlm.main(args)
    rows = read_metrics(tmp_path / "run")
    for name in ("verbosity", "toxicity"):
        assert rows[-1][f"eval/follow/pearson/{name}"] > 0.8
        assert rows[-1][f"eval/follow/mae/{name}"] < rows[0][f"eval/follow/mae/{name}"]

    # with the labels of other conversations the model learns to ignore them
    records = [
        json.loads(line) for line in (tmp_path / "run/2_annotated/train.jsonl").read_text().splitlines()
    ]
    turns = [t for record in records for t in record["messages"] if "label" in t]
    for turn, other in zip(turns, turns[len(turns) // 2 :] + turns[: len(turns) // 2], strict=True):
        turn["shuffled"] = other["label"]
    for turn in turns:
        turn["label"] = turn.pop("shuffled")
    (tmp_path / "shuffled.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    more = {
        "annotated": str(tmp_path / "shuffled.jsonl"),
        "num_bootstrap_rounds": 0,
        "output_dir": str(tmp_path / "no"),
    }
    more["attribute_model"] = str(tmp_path / "run" / "1_attribute_model")
    steerlm.main(with_fields(args, **more))
    assert read_metrics(tmp_path / "no")[-1]["eval/follow/pearson"] < 0.5


def test_ratings_that_cannot_be_read_are_told_by_their_option(tiny_model: str, tmp_path: Path) -> None:
    options = {"model": tiny_model, "dataset": "toy", "output_dir": str(tmp_path)}
    with pytest.raises(dist.RunError, match="^ratings nvidia/HelpSteer2: cannot be loaded"):
        steerlm.main(args_of(steerlm.Args, **options))
    with pytest.raises(dist.RunError, match="^eval_dataset none.jsonl: found no such file"):
        data.load_sft(data.load_tokenizer(tiny_model), "toy", "none.jsonl", 64)
