"""Two run folders: equal, equal but for rounding, and each way in which they can differ."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_cai import Stub, server  # noqa: F401

from common import compare

METRICS = [
    {"step": 0, "eval/loss": 0.5, "eval/judge/correctness": 1.25},
    {"step": 1, "train/loss": 0.4, "train/grad_norm": 2.0, "train/tokens_per_second": 100.0},
    {"step": 2, "train/loss": 0.3, "eval/loss": float("nan"), "train/time/rollout": 1.0, "train/mfu": 0.4},
]
SAMPLES = [
    {"step": 0, "prompt": "a?", "response": "a", "ended": True, "correctness": 4.0},
    {"step": 0, "prompt": "b?", "response": "b", "ended": False, "correctness": 0.0},
]


def write(folder: Path, metrics: list[dict] = METRICS, samples: list[dict] = SAMPLES) -> Path:
    folder.mkdir(parents=True)
    for name, rows in (("metrics", metrics), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def changed(rows: list[dict], index: int, **values: Any) -> list[dict]:
    return [{**row, **values} if i == index else row for i, row in enumerate(rows)]


def run(one: Path, other: Path, capsys: pytest.CaptureFixture, tolerance: float = 0.0) -> tuple[int, str]:
    code = compare.main(compare.Args((one, other), tolerance))
    return code, "".join(capsys.readouterr())


def test_equal_runs_differ_in_speed_times_and_memory_only(tmp_path: Path, capsys: Any) -> None:
    quicker = changed(METRICS, 1, **{"train/tokens_per_second": 200.0, "train/max_memory_gib": 3.0})
    quicker = changed(quicker, 2, **{"train/time/rollout": 2.0, "train/time/value": 2.0, "train/mfu": 0.1})
    code, text = run(write(tmp_path / "a"), write(tmp_path / "b", quicker), capsys)
    # names: eval/loss, eval/judge/correctness, train/loss, train/grad_norm; and 4 of samples
    assert code == 0 and text == "5 rows and 8 names compared\nequal\n"


def test_the_earliest_difference_is_named_with_both_values(tmp_path: Path, capsys: Any) -> None:
    late = changed(METRICS, 2, **{"train/loss": 0.31})
    both = changed(late, 1, **{"train/grad_norm": 2.0000000000000004})  # one bit
    code, text = run(write(tmp_path / "a"), write(tmp_path / "b", both), capsys)
    assert code == 1 and "2 values differ, the first at metrics.jsonl: step 1: train/grad_norm" in text
    assert f"{tmp_path}/a: 2.0\n" in text and f"{tmp_path}/b: 2.0000000000000004\n" in text


def test_a_sample_is_matched_by_step_and_place(tmp_path: Path, capsys: Any) -> None:
    code, text = run(write(tmp_path / "a"), write(tmp_path / "b", METRICS, SAMPLES[::-1]), capsys)
    assert code == 1 and "the first at samples.jsonl: step 0: prompt" in text
    other = write(tmp_path / "c", METRICS, changed(SAMPLES, 1, response="c"))
    code, text = run(tmp_path / "a", other, capsys)
    assert code == 1 and "1 values differ, the first at samples.jsonl: step 0: response of row 1" in text


@pytest.mark.parametrize(
    ("value", "tolerance", "code"),
    [(0.3 + 9e-7, 1e-6, 0), (0.3 + 2e-6, 1e-6, 1), (0.3 + 9e-7, 0.0, 1), (float("nan"), 1.0, 1)],
)
def test_a_tolerance_is_of_one_or_of_a_larger_value(
    tmp_path: Path, capsys: Any, value: float, tolerance: float, code: int
) -> None:
    one = write(tmp_path / "a", changed(METRICS, 2, **{"train/loss": value}))
    assert run(one, write(tmp_path / "b"), capsys, tolerance)[0] == code
    assert compare.are_equal(1e6 + 0.9, 1e6, 1e-6) and not compare.are_equal(1e6 + 1.1, 1e6, 1e-6)
    assert not compare.are_equal(float("inf"), 1.0, 1.0) and not compare.are_equal("0.3", 0.3, 1.0)


def test_names_and_rows_of_one_side_alone_are_listed(tmp_path: Path, capsys: Any) -> None:
    renamed = [{name.replace("grad_norm", "norm"): x for name, x in row.items()} for row in METRICS]
    other = write(tmp_path / "b", renamed + [{"step": 3, "train/loss": 0.2}])
    code, text = run(write(tmp_path / "a"), other, capsys)
    assert code == 1 and "values differ" not in text
    assert f"only {tmp_path}/a has metrics.jsonl: train/grad_norm (1 times)" in text
    assert f"only {other} has metrics.jsonl: train/norm (1 times)" in text
    assert f"only {other} has metrics.jsonl: rows (1 times)" in text


def test_the_stages_of_a_pipeline_are_compared(tmp_path: Path, capsys: Any) -> None:
    for name, metrics in (("a", METRICS), ("b", changed(METRICS, 1, **{"train/loss": 0.0}))):
        write(tmp_path / name)
        write(tmp_path / name / "2_sft", metrics)
    code, text = run(tmp_path / "a", tmp_path / "b", capsys)
    assert code == 1 and "10 rows" in text and "the first at 2_sft/metrics.jsonl: step 1: train/loss" in text


def settings(folder: Path, **changes: Any) -> Path:
    options = {"seed": 1, "beta": 0.1, "output_dir": folder.name, "run_name": folder.name}
    inputs = {"data": changes.pop("data", "d1"), "chat template": "t"}
    kept = {**options, **changes, "num_steps": 2, "inputs": inputs, "versions": {"torch": "2.13.0"}}
    (folder / "args.json").write_text(json.dumps(kept))
    return folder


def test_settings_and_fingerprints_that_differ_are_named(tmp_path: Path, capsys: Any) -> None:
    one = settings(write(tmp_path / "a"))
    other = settings(write(tmp_path / "b"), beta=0.3, data="d2")
    code, text = run(one, other, capsys)
    assert code == 0 and "\nbeta: 0.1 | 0.3\nfingerprint of data: d1 | d2\n" in text
    assert "output_dir" not in text and "standard error" not in text


def test_runs_of_several_seeds_have_a_mean_and_its_standard_error(tmp_path: Path, capsys: Any) -> None:
    runs = []
    for seed, last in ((1, 2.0), (2, 3.0), (3, 7.0)):
        rows = [METRICS[0], {"step": 1, "eval/loss": last}]
        runs.append(settings(write(tmp_path / f"s{seed}", rows), seed=seed))
    code = compare.main(compare.Args(tuple(runs)))
    text = capsys.readouterr().out
    # 2, 3 and 7: their mean is 4, their standard deviation sqrt(7), over sqrt(3) runs 1.5
    assert code == 1 and "seed: 1 | 2 | 3" in text
    assert "0.5 -> 2" in text and "0.5 -> 7" in text and "0.5 +- 0 -> 4 +- 1.5" in text
    settings(runs[0], seed=1, beta=0.2)
    compare.main(compare.Args(tuple(runs)))
    assert "+-" not in capsys.readouterr().out  # they differ by more than seeds


def test_one_run_is_nothing_to_compare(tmp_path: Path, capsys: Any) -> None:
    assert compare.main(compare.Args((write(tmp_path / "a"),))) == 2
    assert capsys.readouterr().err == "error: 1 run folders; expected two or more\n"


def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(tmp_path: Path, capsys: Any) -> None:
    one = write(tmp_path / "a")
    code, text = run(one, tmp_path / "none", capsys)
    assert code == 2 and text == f"error: {tmp_path}/none is no run folder: no metrics.jsonl in it\n"
    (one / "samples.jsonl").write_text('{"step": 0}\n{"st')
    code, text = run(one, one, capsys)
    assert code == 2 and text == f"error: {one}/samples.jsonl:2: no JSON object with a step\n"


@pytest.mark.parametrize("words", ["--help", "{0} {0}"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_that_nobody_reads_on_ends_without_a_word(
    words: str, unbuffered: str, tmp_path: Path
) -> None:
    write(tmp_path / "a")
    command = f"set -o pipefail; {sys.executable} -m common.compare {words.format(tmp_path / 'a')} | true"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 128 + signal.SIGPIPE if unbuffered else 0)


def test_the_command(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a"), write(tmp_path / "b", changed(METRICS, 1, **{"train/loss": 0.40001}))
    command = [sys.executable, "-m", "common.compare", str(one), str(other)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "step 1: train/loss" in done.stdout and not done.stderr
    done = subprocess.run([*command, "--tolerance", "1e-4"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("equal\n")


# whose answers win


def answered(folder: Path, step: int, texts: dict[str, str]) -> Path:
    samples = [{"step": 0, "prompt": "old", "response": "fool", "label": ""}]
    samples += [{"step": step, "prompt": p, "response": text, "label": ""} for p, text in texts.items()]
    return write(folder, METRICS, samples)


ONE = {"a?": "fool", "b?": "no", "c?": "fool", "d?": "yes, fool", "only here?": "x"}
OTHER = {"d?": "yes, longer", "c?": "fool", "b?": "fool", "a?": "kind"}


def test_answers_are_paired_by_the_whole_conversation(tmp_path: Path) -> None:
    asked = [[{"role": "user", "content": x}, {"role": "assistant", "content": "Go on?"}] for x in "xy"]
    runs = []
    for name, histories in (("a", asked), ("b", asked[::-1])):
        rows = [{"prompt": "Yes.", "history": h, "response": h[0]["content"], "label": ""} for h in histories]
        runs.append(write(tmp_path / name, METRICS, [{"step": 5, **row} for row in rows]))
    pairs = compare.answered_by_both((compare.read_run(runs[0]), compare.read_run(runs[1])))
    assert [(one, other) for _, one, other in pairs] == [("x", "x"), ("y", "y")]
    assert pairs[0][0] == [*asked[0], {"role": "user", "content": "Yes."}]


def judged(tmp_path: Path, capsys: Any, judge: str, model: str = "") -> str:
    runs = answered(tmp_path / "a", 5, ONE), answered(tmp_path / "b", 9, OTHER)
    assert compare.main(compare.Args(runs, 0.0, judge, model)) == 1
    text = capsys.readouterr().out
    assert "to 4 prompts" in text
    return re.sub(" +", " ", text.splitlines()[-1])


def kindness(prompt: str, response: str) -> float:
    return -float("fool" in response)


def test_the_last_answers_to_the_same_prompts_are_judged(tmp_path: Path, capsys: Any) -> None:
    """Two won, a tie and one lost: .625, and by hand (.625 + z^2 / 8) / (1 + z^2 / 4) = .564 +- .344."""
    assert judged(tmp_path, capsys, "test_compare:kindness") == "score 2 1 1 62.5% 21.9% to 90.8%"
    assert compare.win_rate("x", [1.0] * 100)[3:] == ["0", "100.0%", "96.3% to 100.0%"]
    assert compare.win_rate("x", [-1.0] * 2)[4:] == ["0.0%", "0.0% to 65.8%"]
    assert compare.main(compare.Args((tmp_path / "a", tmp_path / "b"), 0.0, "test_compare:none")) == 2
    assert "expected package.module:function" in capsys.readouterr().err


def test_a_server_is_asked_in_both_orders(
    server: str,  # noqa: F811
    tmp_path: Path,
    capsys: Any,
) -> None:
    """It names the other place where the first reply has a fool in it, and the second place for two fools."""
    assert judged(tmp_path, capsys, server, "m") == "m 2 1 1 62.5% 21.9% to 90.8%"
    asked = [body["messages"][-1]["content"] for body in Stub.bodies]
    assert len(set(asked)) == 7  # of the pair that is alike both orders are one request
    Stub.plan = ["length"] * 99
    assert compare.main(compare.Args((tmp_path / "a", tmp_path / "b"), 0.0, server, "other")) == 2
    assert "other has judged none of the answers" in capsys.readouterr().err


def test_a_reward_model_judges(tiny_model: str, tokenizer: Any, tmp_path: Path, capsys: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    name, *counts = judged(tmp_path, capsys, str(tmp_path / "judge")).split()[:4]
    assert name == str(tmp_path / "judge") and counts[1] == "1" and sum(map(int, counts)) == 4


@pytest.mark.parametrize(
    ("judge", "model", "said"),
    [
        ("ftp://x/v1", "m", "address: found 'ftp://x/v1'; expected http://"),
        ("http://127.0.0.1:9/v1", "", "address: found no model"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_at_once(
    judge: str, model: str, said: str, tmp_path: Path, capsys: Any
) -> None:
    runs = (write(tmp_path / "a"), write(tmp_path / "b"))
    assert compare.main(compare.Args(runs, judge=judge, judge_model=model)) == 2
    assert said in capsys.readouterr().err


def test_usage_names_the_command_that_works() -> None:
    """The path of a file of common/ cannot be run by itself."""
    for path in (ROOT / "common").glob("*.py"):
        called = path.read_text().partition('if __name__ == "__main__":')[2]
        assert "tyro.cli" not in called or f'prog="python -m common.{path.stem}"' in called, path
    bad = [sys.executable, "-m", "common.compare", "a", "--tolerance", "x"]
    done = subprocess.run(bad, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "python -m common.compare --help" in done.stderr
