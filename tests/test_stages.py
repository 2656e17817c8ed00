"""Pipelines: options of a stage as one string, stages that run once, and what a stop or a change does."""

import json
import os
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import args_of, read_metrics

import ppo
import sft
from common import checkpoint, dist, files, log, stages
from common.args import Folder, flat, merge_options, parse, snapshot


@dataclass
class Stages:
    fixed: ClassVar[tuple[str, ...]] = ()

    sft: str = "--num_samples 0"
    other: str = ""


@dataclass
class Args:
    """A pipeline of two stages of one script."""

    model: str = "toy"
    dataset: str = "toy"
    seed: int = 1
    stages: Stages = field(default_factory=Stages)
    run: Folder = field(default_factory=lambda: Folder(output_dir="runs/pipeline"))


TOY = {"seed": 3, "sft": "--num_samples 0 --batch_size 8 --max_steps 5"}
SHORT = "--learning_rate 1e-3 --warmup_steps 5 --max_steps 3 --batch_size 8 --eval_every 2 --num_samples 2"


def pipeline(few: str, folder: str, num_stages: int = 2, options: str = SHORT, **more: Any) -> list[int]:
    """Trains in num_stages folders, one after the other. -> the steps its log knew when it began."""
    args = args_of(Args, output_dir=folder, sft=options, **more)
    dist.init(args.seed)
    own = stages.read_options("sft", sft.Args, args.stages.sft, stages.RESERVED)
    run = log.Log(args.run, __file__, (), snapshot(args), is_pipeline=True)
    folders = [Path(folder) / f"{number}_sft" for number in range(1, num_stages + 1)]
    stages.refuse_changed_stages(dict.fromkeys(folders, own), stages.RESERVED, args.run.accept_changes)
    known = sorted(run.steps)
    if run.is_finished(num_stages, {}):
        return known
    run.start(num_stages)
    overrides = dict(dataset=f"{few}/sft", seed=args.seed, max_new_tokens=8)
    for number, path in enumerate(folders, 1):
        stages.stage(sft.main, sft.Args, path, overrides, args.stages.sft, run)
        if number not in run.steps:
            run(number, num_stages, {"eval/number": float(number)})
    (Path(folder) / "model").mkdir(exist_ok=True)
    run.finish()
    return known


# options


def parsed(monkeypatch: pytest.MonkeyPatch, *words: str) -> Args:
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *words])
    return parse(Args, TOY, {"sft": sft.Args, "other": sft.Args})


@pytest.mark.parametrize(
    "words",
    [
        ["--sft=--max_steps 7 --lora_rank 16"],
        ["--sft", "--max_steps 7 --lora_rank 16"],
        ["--sft", "--max_steps=7", "--sft", "--lora_rank=16"],
        ["--sft.max_steps=7", "--sft.lora-rank", "16"],
        ["--sft=--max_steps 9", "--sft.max-steps=7", "--sft.lora_rank=16"],
    ],
)
def test_options_of_a_stage_are_one_string_or_come_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    args = parsed(monkeypatch, *words, "--seed=4")
    assert args.seed == 4 and args.stages.other == ""
    options = flat(stages.read_options("sft", sft.Args, args.stages.sft))
    assert (options["max_steps"], options["lora_rank"]) == (7, 16)
    assert (options["batch_size"], options["num_samples"]) == (8, 0)  # the toy's, which none has replaced
    assert flat(args)["sft"] == args.stages.sft and "max_steps" not in flat(args)


def test_the_toys_options_are_those_of_the_toy_and_a_real_model_has_the_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert parsed(monkeypatch).stages.sft == TOY["sft"] and parsed(monkeypatch).seed == 3
    assert parsed(monkeypatch, "--model=other", "--dataset=toy") == args_of(Args, model="other")
    assert parsed(monkeypatch, "--model=other", "--sft.beta=1").stages.sft == "--num_samples 0 --beta=1"


def test_a_flag_and_its_opposite_a_value_with_blanks_and_several_values() -> None:
    merged = merge_options("--cot --judge 'a b' --epochs 1 2", "--no_cot --epochs 3 4", sft.Args)
    assert shlex.split(merged) == ["--cot", "--judge", "a b", "--no_cot", "--epochs", "3", "4"]
    assert merge_options(merged, "--cot", sft.Args).endswith("--cot")
    for options, expected in (("--merge_lora --no_merge_lora", False), ("--merge_lora=True", True)):
        assert stages.read_options("sft", sft.Args, options).run.merge_lora == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            "--learning_rte 1",
            "sft: Unrecognized options: --learning_rte, 1; perhaps you meant --learning_rate",
        ),
        (
            "--learning_rate fast",
            "sft: Error parsing --learning_rate: could not convert string to float: 'fast'",
        ),
        ("--max_steps=1.5", "sft: Error parsing --max_steps: invalid literal for int() with base 10: '1.5'"),
        ("--max_steps", "sft: Missing value for argument '--max_steps'. Expected 1 values; --help lists all"),
        (
            "--lr_schedule up",
            "invalid choice 'up' for argument '--lr_schedule'. Expected one of ('constant', ",
        ),
        ("--merge_lora 7", "sft: Unrecognized options: 7; --help lists all, docs/migrating.md those of TRL"),
        ("--seed 1", "sft: --seed is set by the pipeline; leave it out"),
        ("--learning_rate -1", "sft: learning_rate is -1.0; expected 0 or more"),
        ("--no_overwrite", "sft: --no_overwrite is set by the pipeline"),
        ("learning_rate 1", "sft: Unrecognized options: learning_rate, 1; --help lists all"),
        ("--judge 'a", "No closing quotation"),
    ],
)
def test_a_bad_option_is_one_line_that_names_stage_and_option(
    options: str, expected: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(dist.RunError) as error:
        stages.read_options("sft", sft.Args, options, stages.RESERVED)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")


# stages


def test_a_finished_stage_is_not_run_again_and_its_row_is_kept(few: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert pipeline(str(few), str(folder), num_stages=1) == []
    assert json.loads((folder / "args.json").read_text())["sft"] == SHORT
    shutil.rmtree(folder / "model")
    stamp = (folder / "1_sft" / "metrics.jsonl").stat().st_mtime_ns
    assert pipeline(str(few), str(folder)) == [1]
    assert (folder / "1_sft" / "metrics.jsonl").stat().st_mtime_ns == stamp
    assert [row["step"] for row in read_metrics(folder)] == [1, 2]
    with pytest.raises(dist.RunError, match="with seed 1, now 2"):
        pipeline(str(few), str(folder), seed=2)


def test_what_was_made_with_another_option_is_removed_with_what_was_made_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, the next start removes the rest."""
    made = [tmp_path / "3_pairs" / f"{name}.jsonl" for name in ("comparisons", *range(12))]
    made[0].parent.mkdir()
    for path in made:
        path.write_text('{"max_new_tokens": 8}\n')
    honest, removed = files.remove, []

    def killed(path: Path) -> None:
        removed.append(path)
        if len(removed) == len(made):
            raise KeyboardInterrupt
        honest(path)

    dist.init(seed=1)
    ask = (made[0], tmp_path / "4_reward_model", "max_new_tokens", 16)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "remove", killed)
        stages.begin_again(*ask)
    assert made[0].exists()
    assert stages.begin_again(*ask) and not any(path.exists() for path in made)


def test_a_stage_killed_between_its_export_and_its_curves_draws_them(few: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pipeline(str(few), str(folder), num_stages=1)
    stage = folder / "1_sft"
    rows, end = read_metrics(stage), json.loads((stage / "args.json").read_text())
    assert end.pop("finished_at") == 3
    (stage / "args.json").write_text(json.dumps(end))
    (stage / "curves.png").unlink()
    pipeline(str(few), str(folder), num_stages=2)
    assert (stage / "curves.png").exists() and read_metrics(stage) == rows
    assert json.loads((stage / "args.json").read_text())["finished_at"] == 3


def test_what_decides_numbers_may_change_until_a_stage_has_begun(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def nothing(*rest: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "main", nothing)
        pipeline(str(few), str(folder), num_stages=1)
    changed = f"{SHORT} --learning_rate 1e-4 --save_every 1"
    with monkeypatch.context() as patch, pytest.raises(dist.Stopped):
        stop_at_step_one(patch)
        pipeline(str(few), str(folder), num_stages=1, options=changed)
    assert json.loads((folder / "1_sft" / "args.json").read_text())["learning_rate"] == 1e-4
    with pytest.raises(dist.RunError, match=r"1_sft holds a run with learning_rate 0.0001, now 0.001"):
        pipeline(str(few), str(folder), num_stages=1)  # it has begun
    free = f"{changed} --save_every 2 --eval_every 1 --micro_batch_tokens 300"
    pipeline(str(few), str(folder), num_stages=1, options=free)
    for accept in (False, True):
        with pytest.raises(dist.RunError, match=r"1_sft holds a run with learning_rate .* it is finished"):
            pipeline(str(few), str(folder), num_stages=1, accept_changes=accept)
    with pytest.raises(dist.RunError, match=r"1_sft holds a run with max_steps 3, now 5"):
        pipeline(str(few), str(folder), num_stages=1, options=f"{free} --max_steps 5")
    with pytest.raises(dist.RunError, match=r"1_sft holds a run with lora_rank 0, now 4"):
        pipeline(str(few), str(folder), num_stages=1, options=f"{free} --lora_rank 4")
    assert [row["step"] for row in read_metrics(folder / "1_sft")] == [0, 1, 2, 3]


def stop_at_step_one(patch: pytest.MonkeyPatch) -> None:
    """Let a signal come in a stage."""
    honest = log.Log.__call__

    def interrupted(self: Any, step: int, num_steps: int, metrics: dict) -> None:
        honest(self, step, num_steps, metrics)
        if self.pipeline and step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(log.Log, "__call__", interrupted)


def test_a_stop_in_a_stage_ends_the_pipeline(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(dist.Stopped, match="stopped in or after 1_sft"):
        stop_at_step_one(patch)
        pipeline(str(few), str(folder))
    assert checkpoint.newest(str(folder / "1_sft"))
    assert not (folder / "1_sft" / "model").exists() and not (folder / "2_sft").exists()
    pipeline(str(few), str(folder))
    assert [row["step"] for row in read_metrics(folder)] == [1, 2]


def test_the_stages_of_a_pipeline_share_its_wandb_run(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    sent = []

    class Run:
        id = "one"

        def log(self, values: dict, step: int | None) -> None:
            sent.append((step, {name: value for name, value in values.items() if "step" in name}))

        def define_metric(self, name: str, step_metric: str) -> None:
            assert name.removesuffix("*") == step_metric.removesuffix("step")

        def finish(self) -> None:
            sent.append("finish")

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    pipeline(str(few), str(tmp_path / "run"), num_stages=1, track=True)
    assert sent.pop() == "finish" and "finish" not in sent
    stage = [values["1_sft/step"] for _, values in sent if "1_sft/step" in values]
    assert sorted(set(stage)) == [0, 1, 2, 3] and {step for step, _ in sent} == {None}


def test_what_an_algorithm_stands_for_holds_in_a_stage_too() -> None:
    """--ppo="--algorithm grpo" is no mere name, and what is given beside it wins."""
    found = stages.read_options("ppo", ppo.Args, "--algorithm grpo --kl_coef=0.2 --clip_range 0.2")
    assert (found.algorithm, found.advantage, found.samples_per_prompt) == ("grpo", "grpo", 8)
    assert (found.kl_coef, found.clip_range, found.kl_placement) == (0.2, 0.2, "loss")
    assert stages.read_options("ppo", ppo.Args, "").advantage == "gae"
    default = "--kl_coef 0.05 --num_samples 0"  # of the pipeline: the algorithm that is given goes before it
    merged = merge_options(default, "--algorithm grpo", ppo.Args)
    assert stages.read_options("ppo", ppo.Args, merged).kl_coef == 0.04 and "--num_samples 0" in merged
