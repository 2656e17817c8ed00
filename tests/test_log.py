"""What a run writes, what it refuses, and how it stops."""

import importlib
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, args_of, read_metrics

import dpo
import sft
import steerlm
from common import checkpoint, data, dist, files, log, models, report
from common.args import Optimization, changes, flat, parse, snapshot, with_fields
from common.dist import RunError


def settings(few: Path, folder: Path, **more: Any) -> dict[str, Any]:
    """A run of six steps of dpo.py on the toy model, a second or two."""
    base = {
        **dpo.TOY,
        "dataset": str(few / "pairs"),
        "output_dir": str(folder),
        "max_steps": 6,
        "batch_size": 8,
    }
    return {**base, "eval_every": 3, "save_every": 2, "num_samples": 4, "max_new_tokens": 16, **more}


# the command line


def parsed(monkeypatch: pytest.MonkeyPatch, *argv: str) -> dpo.Args:
    monkeypatch.setattr(sys, "argv", ["dpo.py", *argv])
    return parse(dpo.Args, dpo.TOY)


def test_toy_sets_defaults_and_explicit_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed(monkeypatch).optimization.learning_rate == dpo.TOY["learning_rate"]
    assert parsed(monkeypatch, "--learning_rate", "3e-5").optimization.learning_rate == 3e-5
    assert parsed(monkeypatch, "--model=runs/sft").optimization == dpo.Args().optimization


def test_the_toys_data_stand_in_for_none_that_was_forgotten(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    for words, dataset in (([], "toy"), (["--model=runs/sft", "--dataset=toy"], "toy"), (["--model=x"], "")):
        assert parsed(monkeypatch, *words).dataset == dataset
    with pytest.raises(RunError, match="dataset is not set"):
        data.load_pairs(tokenizer, "", "", 99)


@pytest.mark.parametrize("model", ["runs/sftt", "SmolLM", "gpt2-typo"])
def test_a_model_that_is_not_there_is_named_so(model: str) -> None:
    with pytest.raises(RunError, match=f"model {model}: no such folder; as a hub id it could not be reached"):
        data.load_tokenizer(model)


def test_a_folder_without_a_tokenizer_is_named_so(tiny_model: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    with pytest.raises(RunError, match="its tokenizer cannot be read"):
        data.load_tokenizer(str(tmp_path / "model"))


def test_hyphens_underscores_and_equal_signs_all_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for argv in (["--batch-size", "7"], ["--batch_size", "7"], ["--batch_size=7"]):
        assert parsed(monkeypatch, *argv).optimization.batch_size == 7


def test_booleans_take_a_flag_its_opposite_and_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    for argv in ("--merge_lora", "--merge-lora", "--merge_lora=True", "--merge-lora=true"):
        assert parsed(monkeypatch, argv).run.merge_lora
    for argv in ("--no_merge_lora", "--no-merge-lora", "--merge_lora=False", "--merge-lora=false"):
        assert not parsed(monkeypatch, "--merge_lora", argv).run.merge_lora
    assert parsed(monkeypatch, "--judge=True").run.judge == "True"  # only booleans are read so
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--merge_lora=7")


@pytest.mark.parametrize("word", ["--merge_lora True", "--merge-lora true", "--merge_lora"])
def test_a_boolean_takes_its_value_after_a_space_too(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed(monkeypatch, *word.split()).run.merge_lora
    assert not parsed(monkeypatch, *word.split(), "--merge_lora", "False").run.merge_lora


ANY = {"missing_eos_penalty", "simpo_gamma"}  # can be below 0
SIGNED = {"max_steps": -5}


@pytest.mark.parametrize("script", ["sft", "dpo", "reward_model", "ppo", "spin", "draftp", "cai"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1])
def test_nonsense_in_any_number_of_any_script_is_refused_by_its_name(script: str, value: float) -> None:
    Args = importlib.import_module(script).Args
    options = flat(Args())
    numbers = [n for n, x in options.items() if isinstance(x, int | float) and not isinstance(x, bool)]
    assert len(numbers) > 5
    for name in numbers:
        if not (value == -1 and name in ANY):
            nonsense = SIGNED.get(name, value) if value == -1 else value
            with pytest.raises(dist.RunError, match=f"^{name} is .*; expected "):
                snapshot(args_of(Args, **{name: nonsense}))


@pytest.mark.parametrize(
    "option", ["batch_size", "num_epochs", "save_every", "eval_every", "beta", "lora_alpha"]
)
def test_a_number_that_would_train_nothing_is_refused(option: str) -> None:
    with pytest.raises(dist.RunError, match=f"{option} is .*; expected"):
        snapshot(args_of(dpo.Args, **{option: 0}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"merge_lora": True}, "merge_lora is True and lora_rank 0"),
        ({"lora_target": "q_proj"}, "lora_target is q_proj and lora_rank 0"),
        ({"lora_alpha": 99.0}, "lora_alpha is 99.0 and lora_rank 0"),
        ({"merge_dtype": "float32"}, "merge_dtype is float32 and lora_rank 0"),
        ({"merge_dtype": "float32", "lora_rank": 4}, "merge_dtype is float32 without --merge_lora"),
    ],
)
def test_merging_what_is_not_there_is_refused(options: dict, said: str) -> None:
    with pytest.raises(dist.RunError, match=said):
        snapshot(args_of(dpo.Args, **options))
    snapshot(args_of(dpo.Args, lora_rank=4, merge_lora=True, merge_dtype="float32"))


def test_options_that_json_writes_otherwise_are_no_change() -> None:
    """A tuple in a copy's Args comes back as a list."""
    assert not changes({"sizes": [1, 2]}, {"sizes": (1, 2), "new": 1}, {"sizes", "new"})
    assert changes({"sizes": [1, 2]}, {"sizes": (1, 3)}, {"sizes"}) == ["sizes [1, 2], now [1, 3]"]


def test_options_are_flat_and_change_wherever_they_stand() -> None:
    args = with_fields(dpo.Args(), beta=0.3, batch_size=7, judge="a:b", temperature=0.0)
    assert (args.optimization.batch_size, args.run.judge, args.sampling.temperature) == (7, "a:b", 0.0)
    values = flat(args)
    assert not [name for name, value in values.items() if isinstance(value, dict)]
    assert (values["beta"], values["batch_size"], values["judge"]) == (0.3, 7, "a:b")
    assert with_fields(dpo.Args(), **values) == args
    with pytest.raises(TypeError, match="no_such_option"):
        with_fields(args, no_such_option=1)


def test_what_a_resumed_run_must_keep_follows_from_the_block() -> None:
    free = set(flat(dpo.Args())) - snapshot(dpo.Args()).fixed
    run = set(flat(dpo.Args().run)) | {"max_new_tokens", "temperature"}
    system = {"micro_batch_tokens", "sharding", "activation_checkpointing", "compile"}
    assert free == run | system


# the run folder


@pytest.fixture(scope="module")
def finished(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    dpo.main(args_of(dpo.Args, **settings(few, folder)))
    return folder


def test_a_run_leaves_everything_named_in_the_design(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()} - {files.LOCK}
    expected = {"args.json", "dpo.py", "metrics.jsonl", "samples.jsonl", "curves.png", "checkpoints", "model"}
    assert expected == names
    assert [p.name for p in (finished / "checkpoints").iterdir()] == ["step_00000006"]
    assert (finished / "dpo.py").read_text() == (ROOT / "dpo.py").read_text()


def test_each_step_has_one_row_and_evaluations_share_it(finished: Path) -> None:
    rows = read_metrics(finished)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 3, 6]
    names = ["loss", "grad_norm", "learning_rate", "tokens_per_second", "num_tokens"]
    names += ["rewards/margins", "logps/chosen", "entropy"]
    assert {f"train/{name}" for name in names} <= set(rows[-1])
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0] * 4 + [3] * 4 + [6] * 4
    assert {"prompt", "response", "ended"} <= set(samples[0])


def test_a_finished_run_prints_its_table_and_changes_nothing(
    finished: Path, few: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.parent.name == "model"}
    dpo.main(args_of(dpo.Args, **settings(few, finished)))
    out = capsys.readouterr().out
    assert "is finished at step 6" in out and "rewards/margins" in out
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_changed_field_is_named(finished: Path, few: Path) -> None:
    with pytest.raises(dist.RunError, match=r"beta 0\.3, now 0\.2.*--overwrite"):
        dpo.main(args_of(dpo.Args, **settings(few, finished, beta=0.2)))


def test_overwrite_removes_what_the_run_wrote_and_nothing_else(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = (
        "thesis.txt",
        "data_1.jsonl",
        "photo.png",
        "1_data/notes",
        "other_run/metrics.jsonl",
        "other_run/generated_0.jsonl.0a1b.replies/rank_0.jsonl",
        "answers/rank_0.jsonl",  # answers were paid for
        "metrics.jsonl.bak",
        "generated_0.jsonl.old_one",
        "groups_1_mine.jsonl",
        "model_best_backup/config.json",
        "model_step_1_backup/config.json",
        "images/step_mine.png",
        "checkpoints/mine",
    )
    for name in users:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("years of work")
    dpo.main(args_of(dpo.Args, **settings(few, tmp_path, max_steps=1, overwrite=True)))
    written = {path.name for path in tmp_path.iterdir()} - {name.split("/")[0] for name in users}
    written |= {"checkpoints"}
    assert len(written) > 6
    again = args_of(dpo.Args, **settings(few, tmp_path, max_steps=1, beta=0.4, overwrite=True))
    honest = files.remove

    def killed(path: Path) -> None:
        if path.name == "step_00000001":
            raise KeyboardInterrupt
        honest(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # the next start goes on with it
        patch.setattr(files, "remove", killed)
        log.Log(again.run, dpo.__file__, dpo.SHOWN, snapshot(again))
    log.Log(again.run, dpo.__file__, dpo.SHOWN, snapshot(again))
    left = {path.name for path in tmp_path.iterdir()} & written
    assert left == {files.LOCK, "checkpoints", "metrics.jsonl", "samples.jsonl"}  # made anew, and empty
    assert not read_metrics(tmp_path) and not list((tmp_path / "checkpoints").glob("step_*"))
    assert all((tmp_path / name).read_text() == "years of work" for name in users)
    files.unlock(tmp_path)


@pytest.mark.parametrize("name", ["model/weights", "metrics.jsonl", "samples.jsonl", "curves.png", "dpo.py"])
def test_what_no_run_wrote_is_not_replaced(name: str, few: Path, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(dist.RunError, match=f"{name.split('/')[0]}, which no run has written"):
            dpo.main(args_of(dpo.Args, **settings(few, tmp_path, overwrite=overwrite)))
    assert (tmp_path / name).read_text() == "years of work"


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "curves.png"])
def test_a_link_in_a_run_folder_of_somebody_else_is_not_followed(
    name: str, few: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("years of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text("{}")
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    for overwrite in (False, True):
        with pytest.raises(dist.RunError, match=r"link|damaged"):
            dpo.main(args_of(dpo.Args, **settings(few, tmp_path / "run", overwrite=overwrite)))
    assert (tmp_path / "mine").read_text() == "years of work"
    files.unlock(tmp_path / "run")


def test_a_run_does_not_write_into_the_repositorys_own_folders(few: Path) -> None:
    for folder in (ROOT / "common", ROOT / "docs" / "new", ROOT / ".git"):
        with pytest.raises(dist.RunError, match="a folder of the repository's own files"):
            dpo.main(args_of(dpo.Args, **settings(few, folder)))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("args.json", "{}"),
        ("args.json", '{"script": "dpo.py", "inputs": 5}'),
        ("args.json", None),
        ("metrics.jsonl", ""),
        ("metrics.jsonl", '{"step": 1, "eval/loss": [1]}\n{"step": 1}\n'),
        ("metrics.jsonl", None),
    ],
)
def test_a_run_whose_files_are_damaged_is_not_gone_on_with(
    name: str, damage: str | None, few: Path, tmp_path: Path
) -> None:
    """None: a folder in the file's place."""
    dpo.main(args_of(dpo.Args, **settings(few, tmp_path, max_steps=1, num_samples=0)))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir() if damage is None else (tmp_path / name).write_text(damage)
    for steps in (1, 2):
        with pytest.raises(dist.RunError, match=f"{name}.*damaged"):
            dpo.main(args_of(dpo.Args, **settings(few, tmp_path, max_steps=steps, beta=0.3)))
    files.unlock(tmp_path)


def test_checkpoints_without_the_options_they_were_made_with_are_not_resumed(
    few: Path, tmp_path: Path
) -> None:
    dpo.main(args_of(dpo.Args, **settings(few, tmp_path, max_steps=1, num_samples=0)))
    (tmp_path / "args.json").unlink()
    with pytest.raises(dist.RunError, match="which no run has written"):
        dpo.main(args_of(dpo.Args, **settings(few, tmp_path, max_steps=2, beta=0.3)))


def test_a_damaged_file_of_options_is_said(few: Path, tmp_path: Path) -> None:
    dpo.main(args_of(dpo.Args, **settings(few, tmp_path, max_steps=1, num_samples=0)))
    (tmp_path / "args.json").write_text('{"beta": 0.')
    with pytest.raises(dist.RunError, match=r"args.json: damaged, .*--overwrite starts anew"):
        dpo.main(args_of(dpo.Args, **settings(few, tmp_path, max_steps=2)))


@pytest.mark.parametrize("text", ["", "[]", "5", "[" * 100_000])
def test_any_damage_to_the_file_of_options_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text(text)
    with pytest.raises(dist.RunError, match=r"args.json: damaged, .*--overwrite starts anew") as error:
        files.read_json(tmp_path / "args.json")
    assert "\n" not in str(error.value)


def test_a_run_does_not_live_beside_its_script_nor_around_the_repository(few: Path) -> None:
    for folder in (ROOT, ROOT.parent, Path("/")):
        with pytest.raises(dist.RunError, match="output_dir .*: found the folder of the script, or one that"):
            dpo.main(args_of(dpo.Args, **settings(few, folder)))


@pytest.mark.parametrize("name", ["nothing", "-loss", "+", "train/loss"])
def test_a_best_checkpoint_by_what_no_evaluation_has_is_refused_before_work(name: str) -> None:
    with pytest.raises(dist.RunError, match=r"keep_best is .*; expected a metric of evaluations"):
        snapshot(args_of(dpo.Args, keep_best=name))


@pytest.mark.slow
def test_a_closed_terminal_saves_and_resumes(few: Path, tmp_path: Path) -> None:
    """The kernel sends SIGHUP to all in it, and what is printed from then on fails."""
    more = {"save_every": 1000, "max_steps": 200, "num_samples": 0, "eval_every": 1000}
    flags = [f"--{k}={v}" for k, v in settings(few, tmp_path / "run", **more).items()]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "dpo.py", *flags])
    said = b""
    while b"resum" not in said and not re.search(rb"step +[1-9]", said):
        said += os.read(terminal, 65536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [*(tmp_path / "run" / "checkpoints").iterdir()]


def test_a_longer_run_that_was_killed_before_its_export_is_not_finished(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The model/ there is that of the shorter run."""
    dpo.main(args_of(dpo.Args, **settings(few, tmp_path, max_steps=1, num_samples=0)))
    weights = tmp_path / "model" / "model.safetensors"
    before = weights.read_bytes()

    def killed(*rest: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "export", killed)
        dpo.main(args_of(dpo.Args, **settings(few, tmp_path, max_steps=2, num_samples=0)))
    (tmp_path / "curves.png").unlink()
    files.unlock(tmp_path)
    assert weights.read_bytes() == before
    dpo.main(args_of(dpo.Args, **settings(few, tmp_path, max_steps=2, num_samples=0)))
    assert weights.read_bytes() != before and (tmp_path / "curves.png").exists()
    assert json.loads((tmp_path / "args.json").read_text())["finished_at"] == 2
    assert "is finished" not in capsys.readouterr().out


def test_rows_past_the_checkpoint_and_a_torn_line_are_dropped_on_resume(few: Path, tmp_path: Path) -> None:
    dpo.main(args_of(dpo.Args, **settings(few, tmp_path, max_steps=2)))
    straight = read_metrics(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train/loss": 99.0}\n{"step": 4, "train/lo')
    (tmp_path / "checkpoints" / "step_00000004.tmp").mkdir()  # what a kill while saving leaves
    dpo.main(args_of(dpo.Args, **settings(few, tmp_path, max_steps=4)))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[:3] == straight
    assert rows[3]["train/loss"] < 1


def test_a_folder_that_a_live_run_writes_to_is_refused(few: Path, tmp_path: Path) -> None:
    """Two runs would interleave their rows; --overwrite would delete under the other's feet."""
    dpo.main(args_of(dpo.Args, **settings(few, tmp_path / "ours", max_steps=1)))
    code = (
        "import time\nfrom pathlib import Path\nfrom common import files\n"
        f"files.lock(Path({str(tmp_path)!r}))\nprint('locked', flush=True)\ntime.sleep(600)\n"
    )
    (tmp_path / "args.json").write_text('{"inputs": {}}')
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    for overwrite in (False, True):
        with pytest.raises(dist.RunError, match=f"the run of process {other.pid} is still writing there"):
            dpo.main(args_of(dpo.Args, **settings(few, tmp_path, max_steps=1, overwrite=overwrite)))
    with pytest.raises(dist.RunError, match=f"the run of process {other.pid} is still writing there"):
        dpo.main(args_of(dpo.Args, **settings(few, tmp_path / "1_sft", max_steps=1)))  # a pipeline's stage
    assert (tmp_path / "args.json").exists()
    other.kill()
    other.wait()
    dpo.main(args_of(dpo.Args, **settings(few, tmp_path, max_steps=1)))


@pytest.mark.parametrize(
    ("seconds", "told", "said"), [(40, "30", True), (40, "600", False), (1, "30", False)]
)
def test_torchruns_deadline_is_said_when_a_step_takes_longer(
    seconds: float, told: str, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", told)
    args = args_of(dpo.Args, output_dir=str(tmp_path))
    run_log = log.Log(args.run, dpo.__file__, dpo.SHOWN, snapshot(args))
    now = time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: now + seconds)
    for step in (1, 2):
        run_log.called = now
        run_log(step, 9, {"train/loss": 1.0})
    assert capsys.readouterr().out.count("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600") == said


def test_an_unwritable_output_dir_is_refused(few: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(dist.RunError, match="cannot be written"):
        dpo.main(args_of(dpo.Args, **settings(few, tmp_path / "file" / "run")))


def test_a_missing_judge_is_named(few: Path, tmp_path: Path) -> None:
    with pytest.raises(dist.RunError, match="package.module:function"):
        dpo.main(args_of(dpo.Args, **settings(few, tmp_path, judge="nowhere:at_all")))


# resuming what has changed


def test_a_run_of_another_script_is_never_gone_on_with(few: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "run" / "args.json").write_text('{"script": "sft.py"}')
    with pytest.raises(
        dist.RunError, match="found a run of sft.py; expected another output_dir, or --overwrite"
    ):
        dpo.main(args_of(dpo.Args, **settings(few, tmp_path / "run", accept_changes=True)))


def test_other_data_another_model_or_other_code_is_refused_by_name_and_can_be_accepted(
    few: Path, tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Never of a finished run with nothing left to do: its table is of what it was made from."""
    shutil.copytree(few / "pairs", tmp_path / "pairs")
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copyfile(ROOT / "dpo.py", tmp_path / "edited_dpo.py")
    monkeypatch.syspath_prepend(tmp_path)
    edited = importlib.import_module("edited_dpo")
    options = settings(few, tmp_path / "run", num_samples=0, max_steps=2, beta=0.3)
    options |= {"dataset": str(tmp_path / "pairs"), "model": str(tmp_path / "model")}

    def run(**more: Any) -> None:
        edited.main(args_of(edited.Args, **options | more))

    def refused(name: str) -> None:
        """Once the run is finished for good; where it is made longer it is accepted, and written down."""
        before = (tmp_path / "run" / "args.json").read_bytes()
        for more in ({}, {"accept_changes": True}):
            with pytest.raises(dist.RunError, match=f"a run with {name} of fingerprint .*it is finished"):
                run(**more)
        assert (tmp_path / "run" / "args.json").read_bytes() == before
        options["max_steps"] += 1
        with pytest.raises(dist.RunError, match=f"run with {name} of fingerprint .*--accept_changes"):
            run()
        run(accept_changes=True)
        run()  # what was accepted is what the run is made from now
        assert (tmp_path / "run" / "edited_dpo.py").read_text() == (tmp_path / "edited_dpo.py").read_text()
        assert read()["inputs"]["script"] == files.syntax(tmp_path / "edited_dpo.py")
        assert "changed on the way: script of" in (tmp_path / "run" / "model" / "README.md").read_text()

    def read() -> dict:
        return json.loads((tmp_path / "run" / "args.json").read_text())

    run()
    assert "changed on the way" not in (tmp_path / "run" / "model" / "README.md").read_text()
    source = (tmp_path / "edited_dpo.py").read_text()
    (tmp_path / "edited_dpo.py").write_text(source.replace("# setup", "# the setup"))
    run()  # a comment
    (tmp_path / "edited_dpo.py").write_text(source.replace("beta * h) - (1 - l", "2 * beta * h) - (1 - l"))
    refused("script")
    lines = (tmp_path / "pairs" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs" / "train.jsonl").write_text("".join(lines[:-1]))
    refused("data")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    refused("starting model")
    assert "is finished at step 5" in capsys.readouterr().out
    accepted = read()["accepted_changes"]
    assert [change.split()[0] for change in accepted] == ["script", "data", "starting"]


def test_the_schedule_is_said_and_that_a_longer_run_has_another() -> None:
    short = Optimization(learning_rate=1e-3, warmup_steps=4)
    assert log.schedule(short, 8, 8) == (
        "8 steps: learning rate 0.001, constant after 4 of warm-up"
    ) and "most of the run is warm-up" in log.schedule(short, 7, 7)
    assert "schedule" not in log.schedule(short, 16, 8)
    decaying = Optimization(warmup_steps=2, lr_schedule="cosine")
    assert "the run was 8 steps long, so from here on the schedule is another" in log.schedule(
        decaying, 16, 8
    )


def test_warm_up_is_by_default_a_share_of_the_run_and_as_given_if_it_is() -> None:
    assert [Optimization().warmup(n) for n in (9, 40, 1000, 9000)] == [0, 4, 100, 150]
    assert Optimization(warmup_steps=150).warmup(40) == 150
    assert models.lr_factor(1, 40, Optimization()) == 1 / 5 and models.lr_factor(5, 40, Optimization()) == 1


# stopping


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = dpo.dpo_loss, []

    def poisoned(h: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(1)
        return honest(h, *rest) * (float("nan") if len(calls) > 3 and torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(dpo, "dpo_loss", poisoned)
    with pytest.raises(dist.RunError, match=r"train/loss is nan at step 3.*step_00000002"):
        dpo.main(args_of(dpo.Args, **settings(few, tmp_path, num_samples=0, micro_batch_tokens=100_000)))
    assert checkpoint.newest(str(tmp_path)).name == "step_00000002"
    assert not (tmp_path / "model").exists() and read_metrics(tmp_path)[-1]["step"] == 2


def test_what_gives_a_loss_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """Before the first update it cannot be the learning rate; the loss of the values counts as well."""
    args = args_of(dpo.Args, output_dir=str(tmp_path))
    run_log = log.Log(args.run, dpo.__file__, dpo.SHOWN, snapshot(args))
    for step, name in ((0, "eval/loss"), (1, "train/loss"), (1, "train/grad_norm")):
        with pytest.raises(dist.RunError, match=f"{name} is nan at step {step}; .*starts from, or the data"):
            run_log(step, 9, {name: math.nan})
    for step, name in ((1, "eval/loss"), (5, "train/loss/value_avg"), (5, "train/value_grad_norm")):
        with pytest.raises(dist.RunError, match=f"{name} is inf at step {step}; .*a lower learning_rate"):
            run_log(step, 9, {name: math.inf})
    run_log(1, 9, {"train/loss": 1.0, "eval/follow/pearson/verbosity": math.nan})
    files.unlock(tmp_path)


def test_a_run_whose_time_is_up_saves_and_goes_on(few: Path, tmp_path: Path, capsys: Any) -> None:
    options = settings(few, tmp_path, num_samples=0, eval_every=100, save_every=100)

    dpo.main(args_of(dpo.Args, **options, max_minutes=1e4))
    assert len(read_metrics(tmp_path)) == 7
    shutil.rmtree(tmp_path)
    with pytest.raises(dist.Stopped, match="stopped before a step; the same command goes on from there"):
        dpo.main(args_of(dpo.Args, **options, max_minutes=1e-9))
    files.unlock(tmp_path)
    dpo.main(args_of(dpo.Args, **options))
    assert "is finished" not in capsys.readouterr().out and (tmp_path / "model").exists()


def test_sigterm_saves_says_how_to_resume_and_resuming_changes_no_number(few: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    more = {"save_every": 1000, "max_steps": 14, "num_samples": 0, "eval_every": 1000}
    dpo.main(args_of(dpo.Args, **settings(few, whole, **more)))
    flags = [f"--{k}={v}" for k, v in settings(few, halves, **more).items()]
    process = subprocess.Popen(
        [sys.executable, "dpo.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for _ in range(2000):
        if process.poll() is not None or (
            (halves / "metrics.jsonl").exists() and len(read_metrics(halves)) > 3
        ):
            break
        import time

        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    stopped = int(re.search(r"stopped at step (\d+) and saved; the same command resumes there", out)[1])
    assert 3 <= stopped < 14
    dpo.main(args_of(dpo.Args, **settings(few, halves, **more)))
    for a, b in zip(read_metrics(whole), read_metrics(halves), strict=True):
        assert a.get("train/loss") == b.get("train/loss") and a.get("train/grad_norm") == b.get(
            "train/grad_norm"
        )


def test_a_mistake_is_one_line_under_torchrun_too(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "sft.py",
        "--dataset=nowhere.jsonl",
    ]
    done = subprocess.run(
        [*command, f"--output_dir={tmp_path}/run"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    ours = [n for n, line in enumerate(lines) if "error: " in line and "nowhere.jsonl" in line]
    assert len(ours) == 1 and "no such file" in lines[ours[0]]
    assert len(lines) - ours[0] == 2  # torchrun's frame alone is after it
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not read_metrics(tmp_path / "run")


# what people look at


def test_the_console_shows_the_learning_rate_and_an_answer_and_nothing_empty(
    tmp_path: Path, capsys: Any
) -> None:
    args = args_of(dpo.Args, output_dir=str(tmp_path))
    run_log = log.Log(args.run, dpo.__file__, dpo.SHOWN, snapshot(args))
    run_log.samples(0, [{"prompt": "2+2?\n" * 99, "response": "4"}, {"prompt": "b", "response": "c"}])
    run_log(0, 2, {"eval/unusual": 1.0})
    run_log(2, 2, {"train/loss": 0.5, "train/learning_rate": 3e-4, "eval/reward": 0.25})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 0/2  held out: unusual 1" and lines[1].endswith("2+2? [...] -> 4")
    assert "loss 0.5  lr 0.0003  " in lines[2] and lines[3] == "step 2/2  held out: reward 0.25"
    assert len(lines) == 4 and len(lines[1]) < 110
    files.unlock(tmp_path)


def test_evaluations_on_several_data_sets_have_the_names_of_these(tmp_path: Path, capsys: Any) -> None:
    args = args_of(dpo.Args, output_dir=str(tmp_path))
    run_log = log.Log(args.run, dpo.__file__, ("accuracy",), snapshot(args))
    run_log(0, 2, {"eval/hard/loss": 1.0, "eval/hard/accuracy": 0.25, "eval/easy/accuracy": 0.5})
    assert capsys.readouterr().out == "step 0/2  held out: easy/accuracy 0.5  hard/accuracy 0.25\n"
    assert report.of_sets(["judge/accuracy", "accuracy", "hard/accuracy"], ["accuracy"]) == ["hard/accuracy"]
    files.unlock(tmp_path)


def test_the_evaluations_of_a_pipeline_have_the_names_of_its_stages(tmp_path: Path, capsys: Any) -> None:
    args = args_of(steerlm.Args, output_dir=str(tmp_path))
    how = {"is_pipeline": True, "columns": ("before", "SFT", "round 1")}
    run_log = log.Log(args.run, steerlm.__file__, ("kl",), snapshot(args), **how)
    for step in range(3):
        run_log(step, 2, {"eval/kl": 0.5})
    assert capsys.readouterr().out.splitlines() == [f"{name}  held out: kl 0.5" for name in how["columns"]]
    report.print_table(run_log.rows, ("before", "SFT"))
    assert "step" not in capsys.readouterr().out
    files.unlock(tmp_path)


def test_curves_have_legends_names_and_axes_that_noise_does_not_fill(
    tmp_path: Path, monkeypatch: Any
) -> None:
    import matplotlib.pyplot as plt

    figures: list = []
    monkeypatch.setattr(plt, "close", figures.append)
    rows = [
        {"step": n, "train/loss": 1.0 / (n + 1), "train/kl": 0.0, "eval/judge/good": 4 - n / 100}
        for n in range(3)
    ]
    report.draw(rows, tmp_path / "curves.png", ("loss", "kl"), ("before", "SFT", "RL"))
    loss, judged = (axis for axis in figures[0].axes if axis.axison)
    assert [judged.get_title(), *(x.get_text() for x in judged.get_legend().get_texts())] == [
        "judge/good",
        "eval",
    ]
    assert judged.lines[0].get_color() != loss.lines[0].get_color()
    low, high = judged.get_ylim()
    assert (
        high - low > 0.7
        and low > 0
        and [x.get_text() for x in loss.get_xticklabels()] == ["before", "SFT", "RL"]
    )
    report.draw([{"step": 0, "train/loss": 1.0}], tmp_path / "none.png", ("loss",))
    assert not (tmp_path / "none.png").exists()


def test_scores_of_known_attributes_have_the_whole_of_their_scale(tmp_path: Path, monkeypatch: Any) -> None:
    """0 to 4, also of a score that stays below 1; 0 to 1 where no score is more; a score beyond is seen."""
    import matplotlib.pyplot as plt

    figures: list = []
    monkeypatch.setattr(plt, "close", figures.append)

    def limits(**scores: float) -> dict[str, list[float]]:
        rows = [{"step": n, **{f"eval/judge/{k}": x - 0.1 * n for k, x in scores.items()}} for n in range(3)]
        report.draw(rows, tmp_path / "curves.png", ())
        axes = [axis for axis in figures[-1].axes if axis.axison]
        return {x.get_title()[6:]: [round(y, 1) for y in x.get_ylim()] for x in axes}

    found = limits(complexity=0.9, red_team_coherence=3.9, own=3.0)
    assert found["complexity"] == found["red_team_coherence"] == [-0.1, 4.1] and found["own"][0] > 2
    assert limits(correctness=0.9, toxicity=0.3) == {"correctness": [0, 1], "toxicity": [0, 1]}
    assert limits(helpfulness=0.15, coherence=4.5) == {"helpfulness": [-0.1, 4.1], "coherence": [-0.1, 4.5]}


def test_a_model_comes_with_a_card(finished: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(finished / "model" / "README.md")
    assert card.data.library_name == "transformers" and card.data.tags == ["cleanalign", "dpo"]
    assert card.data.base_model is None  # the toy is on no hub
    assert "python dpo.py --" in card.text and "--max_steps=6" in card.text
    assert re.search(r"\| rewards/margins \| 0.000 \| \S+ \|", card.text)
    assert "README" not in repr(files.fingerprint(str(finished)))


# blocks of a script's own


EMA = """

@dataclass
class Ema:
    decay: float = 0.99
"""


@pytest.fixture
def with_ema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A copy of sft.py with a dataclass of its own among its options."""
    text = (ROOT / "sft.py").read_text()
    text = text.replace("\n\n@dataclass\nclass Args:", f"{EMA}\n\n@dataclass\nclass Args:")
    text = text.replace("    train_on_prompt: bool", "    ema: Ema = block(Ema)\n    train_on_prompt: bool")
    (tmp_path / "sft_with_ema.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("sft_with_ema")
    yield module
    del sys.modules["sft_with_ema"]


def test_a_dataclass_among_the_options_makes_no_pipeline(
    few: Path, tmp_path: Path, with_ema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its first checkpoint it begins anew, with other options if these are given."""

    class Killed(BaseException):
        pass

    def mortal(self: Any, step: int, *rest: Any) -> None:
        honest(self, step, *rest)
        if step == 2:
            raise Killed

    options = {**sft.TOY, "dataset": f"{few}/sft", "output_dir": str(tmp_path / "run"), "num_samples": 0}
    options |= {"max_steps": 4, "batch_size": 8, "eval_every": 100}
    honest = log.Log.__call__
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(log.Log, "__call__", mortal)
        with_ema.main(args_of(with_ema.Args, **options))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]
    with_ema.main(args_of(with_ema.Args, **options, decay=0.9))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / "args.json").read_text())["decay"] == 0.9
    with pytest.raises(dist.RunError, match=r"with decay 0.9, now 0.5"):
        with_ema.main(args_of(with_ema.Args, **options, decay=0.5))
    monkeypatch.setattr(sys, "argv", ["sft_with_ema.py", "--decay=0.7"])
    assert parse(with_ema.Args, sft.TOY).ema.decay == 0.7


# W&B


def tracked(folder: str, few: str) -> list[str]:
    """Run sft.py with tracking, no key and no network; called here and on the two ranks."""
    os.environ.pop("WANDB_API_KEY", None)
    more = {"max_steps": 2, "eval_every": 1, "num_samples": 2, "track": True}
    args = {**sft.TOY, "dataset": f"{few}/sft", "output_dir": folder, "batch_size": 8, **more}
    sft.main(args_of(sft.Args, **args))
    return sorted(p.name for p in Path(folder, "wandb").glob("offline-run-*"))


def test_tracking_without_a_key_is_offline_and_one_run_for_two_ranks(
    few: Path, tmp_path: Path, two_ranks: Any
) -> None:
    ours, _ = two_ranks("test_log:tracked", folder=str(tmp_path / "two"), few=str(few))
    assert len(ours) == 1
    assert (tmp_path / "two" / "wandb_id").read_text() in ours[0]


def test_a_sweep_agent_tracks_and_gets_folders_of_its_own(
    few: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "run7")
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ["--max_steps=1", "--num_samples=0", "--batch_size=8", f"--dataset={few}/sft"]
    monkeypatch.setattr(sys, "argv", ["sft.py", *flags])
    sft.main(parse(sft.Args, sft.TOY))
    assert (tmp_path / "runs" / "sft-run7" / "metrics.jsonl").exists()
    assert list((tmp_path / "runs" / "sft-run7" / "wandb").glob("offline-run-*"))
    monkeypatch.setattr(sys, "argv", ["sft.py", "--output_dir=~/disk/", "--track=False"])
    run = parse(sft.Args, sft.TOY).run  # each run of the sweep has a folder, wherever it was asked for
    assert (run.output_dir, run.track) == (f"{Path.home()}/disk-run7", False)


def fake_wandb(
    monkeypatch: pytest.MonkeyPatch, dies: str = "", key: bool = True, network: bool = True
) -> list:
    """Play W&B: `dies` raises, as all do when its own process is gone. -> what it was told"""
    import wandb

    told: list = []

    class Run:
        id = "one"

        def log(self, values: dict, step: int | None) -> None:
            told.append(step)
            if dies == "log":
                raise BrokenPipeError("the service has gone")

        def finish(self) -> None:
            told.append("finish")
            if dies == "finish":
                raise BrokenPipeError("the service has gone")

    def init(mode: str, **rest: Any) -> Run:
        told.append(mode)
        if mode == "online" and not network:
            raise wandb.errors.CommError("no route to api.wandb.ai\nmore")
        return Run()

    monkeypatch.setattr(wandb, "login", lambda **_: key)
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return told


@pytest.mark.parametrize(
    ("dies", "key", "network", "expected"),
    [
        ("", True, True, ["online", 0, 0, 1, 1, "finish"]),
        ("", False, True, ["offline", 0, 0, 1, 1, "finish"]),
        ("", True, False, ["online", "offline", 0, 0, 1, 1, "finish"]),
        ("log", True, True, ["online", 0]),
        ("finish", True, True, ["online", 0, 0, 1, 1, "finish"]),
    ],
)
def test_what_happens_to_wandb_costs_no_run(
    dies: str,
    key: bool,
    network: bool,
    expected: list,
    few: Path,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
) -> None:
    told = fake_wandb(monkeypatch, dies, key, network)
    dpo.main(args_of(dpo.Args, **settings(few, tmp_path, max_steps=1, track=True)))
    assert told == expected and (tmp_path / "model").exists()
    out, said = capsys.readouterr()
    assert ("wandb sync" in out) == ("offline" in expected)
    assert (("W&B is off: the service has gone" in said) == (dies == "log")) and said.count("W&B") <= 1
    assert ("W&B is not reached: no route to api.wandb.ai" in said) == (not network)


@pytest.mark.slow
def test_a_run_outlives_the_process_of_wandb(few: Path, tmp_path: Path) -> None:
    """Its own process is killed while the run goes on; the exit code and the model are as without it."""
    options = settings(few, tmp_path, max_steps=12, num_samples=0, save_every=100, track=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {
        "WANDB_MODE": "offline"
    }
    process = subprocess.Popen(
        [sys.executable, "dpo.py", *(f"--{k}={v}" for k, v in options.items())],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and (
        not (tmp_path / "metrics.jsonl").exists() or len(read_metrics(tmp_path)) < 3
    ):
        time.sleep(0.01)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for child in found:
        os.kill(int(child), signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    assert found and process.returncode == 0, out
    assert (tmp_path / "model").exists() and len(read_metrics(tmp_path)) == 13
