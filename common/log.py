"""What a run writes as it goes: args.json, its script, metrics, samples, the console, and W&B if asked.

Only rank 0 writes. Metrics go to the file in full and to the console in part, a few lines a minute; what is
made of them at the end is in report.py.
"""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import checkpoint, dist, files, formats, report
from common.args import Folder, Optimization, Snapshot, changes, refuse_changes

# what runs leave in their folders, which --overwrite removes; answers of a server, which were paid for, stay
WRITTEN = re.compile(
    r"((metrics|samples)\.jsonl|curves\.png|follow\.png|wandb|wandb_id|annealed|model|model_best|model_step_\d+"
    r"|checkpoints/step_\d+|images/step_\d+(_\w+)?\.png|(generated|held_out|groups)_\d+\.jsonl(\.[0-9a-f]+\.\w+)?)"
    r"(\.old)?(\.[0-9a-f]{32})?(\.tmp)?"
)
UNFINISHED = re.compile(r"\w+\.jsonl\.[0-9a-f]+\.(replies|part)")  # kept for a restart, or left by a kill
STAGES = "[0-5]_*"  # folders of a pipeline
ROOT = Path(__file__).resolve().parent.parent
SOURCES = (".ci", ".git", "benchmarks", "common", "docs", "recipes", "sweeps", "tests", "toy")
WANDB_SECONDS = 30  # of waiting for its server, before a run is tracked offline


class Log:
    """The run folder. `log(step, num_steps, metrics)` appends a row; numbers under eval/ make the table."""

    def __init__(
        self,
        run: Folder,
        script: str,
        show: tuple[str, ...],
        options: Snapshot,
        pipeline: "Log | None" = None,
        is_pipeline: bool = False,
        columns: tuple[str, ...] = ("before", "after"),
    ):
        """Make the folder, or open the run there.

        Args:
            show: metrics for the console and the curves, without train/ or eval/.
            pipeline: that of the pipeline which runs this as a stage.
            is_pipeline: a script that runs others as its stages; its steps are these.
            columns: of the table at the end; two are the first and the last evaluation, more are all of them.

        Raises:
            RunError: the folder cannot be written, or has a run with other options.
        """
        dist.outlive_readers()
        self.run, self.script, self.show, self.options = run, Path(script), show, options
        self.pipeline, self.is_pipeline, self.columns, self.wandb = pipeline, is_pipeline, columns, None
        self.folder = Path(run.output_dir)
        self.first_step: int | None = None  # of this process, for the time left
        self.called = time.perf_counter()
        self.warned, self.example = False, ""  # of what was answered since the last line
        self.before: dict[str, Any] = {}  # args.json of the run that goes on
        self.inputs: dict[str, str] = {}
        self.accepted: list[str] = []  # changes; of all calls from the start on
        if not pipeline:
            dist.stop_after(run.max_minutes)
        self.rows: list[dict] = [] if run.check else dist.from_main(self._open)
        values = options.values
        if dist.is_main() and values["model"] == "toy" and options.toy and not pipeline:
            # the user's options of a stage have changed the toy's, which are one string with them
            kept = [k for k, v in options.toy.items() if values[k] == v or str(v).startswith("--")]
            used = " ".join(f"{k}={shlex.quote(str(values[k]))}" for k in kept)
            print(f"toy world: {used}; for real: --model <hub id or folder> --dataset <file>", flush=True)

    def _open(self) -> list[dict]:
        """Make or reopen the folder. -> the rows that stay

        Steps after the newest checkpoint are done again, so their rows go; since a row is written before the
        checkpoint of its step, none up to there is missing. A pipeline has no checkpoint, and none of its
        evaluations is made again. Samples are written before the row of their evaluation: a kill between the
        two leaves those of a step that will be evaluated again.
        """
        folder, own = self.folder, self.folder / "args.json"
        if folder.resolve() in (self.script.resolve().parent, ROOT, *ROOT.parents):
            what = "the folder of the script, or one that holds the repository"
            raise formats.wrong(f"output_dir {folder}", what, "one of the run's own")
        if any(folder.resolve().is_relative_to(ROOT / name) for name in SOURCES):
            what = "a folder of the repository's own files"
            raise formats.wrong(f"output_dir {folder}", what, "another, such as runs/name")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files.lock(folder)  # before anything is deleted: another run may be writing there
            self._refuse_what_is_of_others(own)
            if self.run.overwrite and own.exists():
                for path in [*self._written(), own]:  # killed before the last, the next start goes on with it
                    files.remove(path)
            if not self.is_pipeline:
                (folder / "checkpoints").mkdir(exist_ok=True)
            for path in (folder / "checkpoints").glob("step_*.tmp"):  # what kills have left half written
                files.remove(path)
        except OSError as error:
            raise dist.RunError(f"output_dir {folder}: cannot be written ({error.strerror})") from error
        last, before = checkpoint.newest(folder), files.read_json(own) if own.exists() else {}
        finished_at = before.get("finished_at")  # which may have left no checkpoint
        finished_at = finished_at if isinstance(finished_at, int) else -1
        # where nothing can be resumed all may change, but for what stages are made of
        if last or self.is_pipeline or finished_at >= 0:
            self.before = before
            script = self.before.get("script", self.script.name)
            if script != self.script.name:
                what = f"a run of {script}"
                raise formats.wrong(f"output_dir {folder}", what, "another output_dir, or --overwrite")
            if own.exists() and not isinstance(before.get("inputs"), dict):
                raise files.damaged(own, "it does not say what the run was made from")
            self.accepted = changes(self.before, self.options.values, self.options.fixed)
            refuse_changes(folder, [] if self.run.accept_changes else self.accepted)
        rows = files.read_rows(folder / "metrics.jsonl", "step")  # without a line that a kill has torn
        if any(not isinstance(x, int | float) for row in rows for x in row.values()):
            raise files.damaged(folder / "metrics.jsonl", "not all of it is numbers")
        done = max((row["step"] for row in rows), default=-1)
        keep = max(finished_at, checkpoint.step_of(last))
        if done < keep and not self.is_pipeline:
            raise files.damaged(folder / "metrics.jsonl", f"no row of step {keep}, which the run has done")
        keep = done if self.is_pipeline else keep
        for name in ("samples.jsonl", "metrics.jsonl"):
            kept = [row for row in files.read_rows(folder / name, "step") if row["step"] <= keep]
            files.write(folder / name, files.as_lines(kept))
        return kept

    def _refuse_what_is_of_others(self, own: Path) -> None:
        """End where a run would write over files that are no run's, or through links out of its folder."""
        names = ("metrics.jsonl", "samples.jsonl", "curves.png", "model", self.script.name)
        for path in [self.folder / name for name in names] if not own.exists() else ():
            if path.is_dir() or (path.exists() and path.stat().st_size > 0):  # a run makes empty ones first
                what = f"{path.name}, which no run has written (there is no args.json)"
                raise formats.wrong(f"output_dir {self.folder}", what, "another folder")
        for path in self.folder.iterdir():
            if path.is_symlink() and not path.is_dir():
                raise formats.wrong(f"output_dir {self.folder}", f"{path.name}, a link to a file", "no link")

    def _written(self) -> list[Path]:
        """What runs have written into the folder, but args.json."""
        paths = [p for pattern in ("*", "checkpoints/*", "images/*") for p in self.folder.glob(pattern)]
        found = [p for p in paths if WRITTEN.fullmatch(p.relative_to(self.folder).as_posix())]
        found += [p for p in paths if p == self.folder / self.script.name]
        return found + ([*self.folder.glob(f"{STAGES}/")] if self.is_pipeline else [])

    @property
    def steps(self) -> set[int]:
        """The steps that have a row, on every rank."""
        return {row["step"] for row in self.rows}

    def fingerprint(self, *models: str) -> str:
        """Tells what this run makes, with the help of models, from what runs of others or otherwise make."""
        fixed = {name: x for name, x in self.options.values.items() if name in self.options.fixed}
        made_from = dist.from_main(lambda: repr((self.inputs, fixed, [*map(files.fingerprint, models)])))
        return hashlib.sha256(made_from.encode()).hexdigest()[:8]

    def is_finished(self, num_steps: int, inputs: dict[str, str]) -> bool:
        """Whether the run has all its steps and its model; if so, its table is printed again.

        What `finish` has written down is asked for, not model/ alone: that may be of a shorter run, whose
        continuation was killed before its export.

        Args:
            inputs: see files.inputs.

        Raises:
            RunError: the run was made from something else, by other code, or cannot go on any more.
        """
        if self.run.check:
            return False
        last = max(self.steps, default=0)

        def compare() -> bool:
            self.inputs = inputs | files.code(self.script)
            before, now = (
                {f"{name} of fingerprint": x for name, x in found.items()}
                for found in (self.before.get("inputs", {}), self.inputs)
            )
            is_done = last >= num_steps and self.before.get("finished_at") == last
            is_done = is_done and (self.folder / "model").is_dir()
            self.accepted += changes(before, now, now)
            if is_done or not self.run.accept_changes:
                refuse_changes(self.folder, self.accepted, is_done)
            self._refuse_what_is_over(last, is_done)
            return is_done

        found = dist.from_main(compare)
        if found and dist.is_main():
            print(f"{self.folder} is finished at step {last}; --overwrite starts anew", flush=True)
            report.print_table(self.rows, self.columns)
        return found

    def _refuse_what_is_over(self, last: int, is_done: bool) -> None:
        """End a call that asks a finished run for what it cannot give any more."""
        adapters = [
            path for name in ("adapter_config", "*_lora_") for path in self.folder.glob(f"model/{name}*")
        ]
        if is_done and adapters and getattr(self.run, "merge_lora", False):
            raise dist.RunError(
                f"{self.folder} is finished, with adapters in model/: python -m common.checkpoint merge "
                f"{self.folder} merges those of a text model"
            )
        was = self.before.get("merge_dtype", "auto")
        if is_done and getattr(self.run, "merge_dtype", was) != was:
            raise dist.RunError(
                f"{self.folder} is finished, with merge_dtype {was}: python -m common.checkpoint export "
                f"{self.folder} --step {last} --merge_dtype {self.run.merge_dtype}"
            )
        if not is_done and not self.is_pipeline and self.before and not checkpoint.newest(self.folder):
            raise dist.RunError(
                f"{self.folder} is finished at step {last} and kept no checkpoint to go on from: give "
                "another output_dir, or --overwrite to start anew"
            )

    def start(self, num_steps: int, optimization: Optimization | None = None) -> None:
        """Write args.json and the script, and begin to track; Stopped if that was asked for meanwhile.

        Called when the data has loaded: a run that a mistake in its data or options ends before its first
        step leaves nothing that a corrected one would be compared with.

        Args:
            optimization: None for a pipeline, whose stages have their own.
        """
        if dist.poll_stop():
            raise dist.Stopped(f"{self.folder}: stopped before a step; the same command goes on from there")
        if not dist.is_main() or self.run.check:
            return
        if any(self.steps):
            print(f"resuming {self.folder} from step {max(self.steps)}", flush=True)
        if optimization:
            planned = self.before.get("num_steps", num_steps)
            print(schedule(optimization, num_steps, planned), flush=True)
        if metric := getattr(self.run, "keep_best", ""):
            which = "lowest" if checkpoint.is_lower_better(metric) else "highest"
            print(f"the checkpoint of the {which} {metric.lstrip('+-')} is exported too", flush=True)
        self.accepted = [*self.before.get("accepted_changes", []), *self.accepted]
        self._write_args(num_steps)
        shutil.copyfile(self.script, self.folder / self.script.name)
        self._start_wandb()

    def _write_args(self, num_steps: int, **more: Any) -> None:
        self.num_steps = num_steps
        kept = {"script": self.script.name, "num_steps": num_steps, "inputs": self.inputs}
        kept |= {"versions": files.versions(), **more}
        kept |= {"accepted_changes": self.accepted} if self.accepted else {}
        files.write(self.folder / "args.json", json.dumps(self.options.values | kept, indent=2) + "\n")

    def __call__(self, step: int, num_steps: int, metrics: dict[str, float]) -> None:
        """Append a row for `step` completed optimizer steps; stop the run if its loss is not finite.

        Raises:
            RunError: a loss or gradient norm is NaN or infinite; an evaluation's loss sees the last update.
        """
        for name in [n for n in metrics if re.search("loss|grad_norm|eval/nll", n)]:
            if not math.isfinite(metrics[name]):
                untrained = step == 0 or (step == 1 and name.startswith("train/"))
                cure = "a lower learning_rate or max_grad_norm is the usual cure"
                if untrained:  # nothing has been learned yet that could be wrong
                    cure = "the model that training starts from, or the data, gives it"
                raise dist.RunError(
                    f"{name} is {metrics[name]} at step {step}; the run stops; "
                    f"{checkpoint.last_good(self.folder)}; {cure}"
                )
        wanted = getattr(self.run, "keep_best", "").lstrip("+-")
        if step == 0 and wanted and wanted not in metrics:
            raise formats.wrong(f"keep_best {wanted}", "no such metric", f"one of {', '.join(metrics)}")
        row = {"step": step, **metrics}
        self.rows.append(row)
        if not dist.is_main():
            return
        files.append(self.folder / "metrics.jsonl", row)
        self._track(step, metrics)
        now = time.perf_counter()
        if self.first_step is None:
            self.first_step, self.started, self.printed = step, now, now
        else:
            self._warn_of_torchrun(now - self.called)
        self.called = now
        evaluation = {name[5:]: value for name, value in metrics.items() if name.startswith("eval/")}
        if now - self.printed > 5 or evaluation or step == num_steps:
            self.printed = now
            head = f"step {step:>{len(str(num_steps))}}/{num_steps}"
            if self.is_pipeline and len(self.columns) == num_steps + 1:
                head = self.columns[step]
            if "train/loss" in metrics:
                training = {name[6:]: value for name, value in metrics.items() if name.startswith("train/")}
                pace = self._pace(step, num_steps, training, now)
                print(f"{head}  {self._brief(training)}{pace}", flush=True)
            if evaluation:
                print(f"{head}  held out: {self._brief(evaluation)}{self.example}", flush=True)
                self.example = ""

    def _warn_of_torchrun(self, seconds: float) -> None:
        """Say once that a stop could not save: torchrun kills its ranks 30 s after it was told to stop."""
        patience = int(os.environ.get(dist.PATIENCE, 30))
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if under_torchrun and seconds > max(10, patience / 2) and not self.warned:
            self.warned = True
            print(
                f"a step takes {seconds:.0f} s, and a stop saves at its end, but torchrun kills its ranks "
                f"{patience} s after a signal: set {dist.PATIENCE}=600 in its environment",
                flush=True,
            )

    def _brief(self, metrics: dict[str, float]) -> str:
        """The shown metrics, reward and the judge's scores on one line, by the last part of their names."""
        own = [name for name in (*self.show, "reward") if name in metrics]
        sets = [] if own else report.of_sets(metrics, self.show)  # by all of their names
        judged = [name for name in metrics if name.startswith("judge/")]
        names = [*sets, *own, *judged] or [*metrics][:4]
        parts = {name: name if name in sets else name.rsplit("/")[-1] for name in names}
        return "  ".join(f"{part} {metrics[name]:.3g}" for name, part in parts.items())

    def _pace(self, step: int, num_steps: int, metrics: dict[str, float], now: float) -> str:
        pace = f"  lr {metrics['learning_rate']:.2g}" if "learning_rate" in metrics else ""
        if "images_per_second" in metrics:
            pace += f"  {metrics['images_per_second']:.3g} images/s"
        else:
            pace += f"  {metrics.get('tokens_per_second', 0) / 1000:.1f}k tokens/s"
        if "mfu" in metrics:
            pace += f"  MFU {metrics['mfu']:.1%}  {metrics['max_memory_gib']:.1f} GiB"
        left = (now - self.started) / max(1, step - self.first_step) * (num_steps - step)
        return pace + f"  eta {int(left // 60)}:{int(left % 60):02d}"

    def samples(self, step: int, rows: list[dict]) -> None:
        """Append what was generated at an evaluation to samples.jsonl, and send it to W&B as a table."""
        if not dist.is_main() or not rows:
            return
        rows = [{"step": step, **row} for row in rows]
        files.append(self.folder / "samples.jsonl", *rows)
        if "response" in rows[0]:  # and no image
            prompt, response = (textwrap.shorten(str(rows[0][k]), 72) for k in ("prompt", "response"))
            self.example = f"\n    {prompt} -> {response or '(nothing)'}"
        if self.wandb:
            import wandb

            columns = [name for name in rows[0] if name != "history"]  # which not every prompt has
            values = [[row[name] for name in columns] for row in rows]
            table = self._wandb_does("takes no table", lambda: wandb.Table(columns, values))
            self._track(step, {"samples": table})

    def picture(self, step: int, path: Path) -> None:
        """Send a PNG to W&B, under its folder's name."""
        if self.wandb:
            import wandb

            self._track(step, {path.parent.name: wandb.Image(str(path))})

    def finish(self, stopped_at: int | None = None) -> None:
        """Draw the curves, and print the table, or how to resume a run that was stopped."""
        if not dist.is_main():
            return
        stages = self.columns if self.is_pipeline else ()
        report.draw(self.rows, self.folder / "curves.png", self.show, stages)
        if stopped_at is not None:
            print(f"stopped at step {stopped_at} and saved; the same command resumes there", flush=True)
        else:
            places = ("*", f"{STAGES}/**/*") if self.is_pipeline else ("*",)
            for path in [path for pattern in places for path in self.folder.glob(pattern)]:
                if UNFINISHED.fullmatch(path.name):
                    files.remove(path)
            self._write_cards()
            self._write_args(self.num_steps, finished_at=max(self.steps, default=0))
            if getattr(self.run, "keep_checkpoints", 1) == 0:
                files.remove(self.folder / "checkpoints")
            report.print_table(self.rows, self.columns)
            print(f"model, metrics, samples and curves are in {self.folder}", flush=True)
        files.unlock(self.folder)
        if self.wandb and not self.pipeline:
            self._wandb_does("has not finished", self.wandb.finish)

    def _write_cards(self) -> None:
        best = checkpoint.step_of(checkpoint.best(self.folder, getattr(self.run, "keep_best", "")))
        values = self.options.values | {"accepted_changes": self.accepted}
        for name, last, at in (("model", math.inf, ""), ("model_best", best, f" to step {best}")):
            if (self.folder / name).exists() and last >= 0:
                lines = report.table([row for row in self.rows if row["step"] <= last], self.columns)
                told = (self.script.name, values, lines, self.options.changed)
                report.write_card(self.folder / name, *told, at)

    # ---------------------------------------------------------------------------------------------------- W&B

    def _start_wandb(self) -> None:
        """Online if logged in and W&B can be reached, else offline; never asks, and its failures cost no run.

        The id of a run stays in its folder, so that a resumed run is the same one on W&B; a sweep agent gives
        the first. A stage has no run of its own: it logs into its pipeline's, which begins and ends it.
        """
        if self.pipeline and (shared := self.pipeline.wandb):  # whose steps begin anew with each stage
            self.wandb, name = shared, self.folder.name
            self._wandb_does("is off", lambda: shared.define_metric(f"{name}/*", step_metric=f"{name}/step"))
        if self.pipeline or not self.run.track:
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        id_file = self.folder / "wandb_id"

        def begin(mode: str) -> Any:
            import wandb

            if mode == "online" and not (os.environ.get("WANDB_SWEEP_ID") or wandb.login(prompt=False)):
                mode = "offline"
            if mode == "offline":
                later = f"wandb sync {self.folder}/wandb/offline-run-*"
                print(f"W&B is offline: after `wandb login`, `{later}` sends this run", flush=True)
            return wandb.init(
                project=self.run.wandb_project,
                name=self.run.run_name or None,
                id=id_file.read_text() if id_file.exists() else os.environ.get("WANDB_RUN_ID"),
                resume="allow",
                mode=mode,
                dir=self.folder,
                config=self.options.values,
                settings=wandb.Settings(init_timeout=WANDB_SECONDS),
            )

        for failing, mode in (
            ("is not reached", os.environ.get("WANDB_MODE", "online")),
            ("is off", "offline"),
        ):
            self.wandb = self.wandb or self._wandb_does(failing, lambda mode=mode: begin(mode))
        if self.wandb:
            files.write(id_file, self.wandb.id)

    def _wandb_does(self, failing: str, act: Callable[[], Any]) -> Any:
        """act(), or None where W&B fails, as when its own process has died: the run needs none of it."""
        try:
            return act()
        except Exception as error:
            self.wandb = None
            print(f"W&B {failing}: {formats.first_line(error)}", file=sys.stderr, flush=True)

    def _track(self, step: int, values: dict[str, Any]) -> None:
        """Send to W&B, whose own step only grows: those of a pipeline and its stages are metrics."""
        if not self.wandb:
            return
        if self.pipeline:
            values = {f"{self.folder.name}/{key}": value for key, value in {**values, "step": step}.items()}
        own = None if self.pipeline or self.is_pipeline else step
        self._wandb_does("is off", lambda: self.wandb.log(values, step=own))


def schedule(optimization: Optimization, num_steps: int, planned: int) -> str:
    """The learning rate of a run in words.

    Args:
        planned: steps of the run that goes on, which another number makes another schedule.
    """
    warmup, shape = optimization.warmup(num_steps), optimization.lr_schedule
    text = f"{num_steps} steps: learning rate {optimization.learning_rate}, {shape}"
    text += f" after {warmup} of warm-up" if warmup else ""
    if planned != num_steps and (shape != "constant" or warmup != optimization.warmup(planned)):
        text += f"; the run was {planned} steps long, so from here on the schedule is another"
    return text + ("; warning: most of the run is warm-up" if 2 * warmup > num_steps else "")
