"""What a run leaves behind: args.json, its script, metrics, samples, curves.png, and W&B if asked.

Only rank 0 writes. Metrics go to the file in full and to the console in part, a few lines a minute.
"""

import contextlib
import gc
import importlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import checkpoint, data, dist, files
from common.args import Folder, Sampling, Snapshot, dotted
from common.generate import generate


def load_function(spec: str) -> Callable:
    """The function named by "package.module:function", looked up from the current folder too."""
    module, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise dist.RunError(f"{spec!r}: {error}; expected package.module:function") from error


class Log:
    """The run folder. `log(step, metrics)` appends a row; numbers under eval/ make the table at the end."""

    running: "Log | None" = None  # the pipeline a stage of which is running

    def __init__(
        self,
        run: Folder,
        script: str,
        show: tuple[str, ...],
        options: Snapshot,
        is_pipeline: bool = False,
        columns: tuple[str, ...] = ("before", "after"),
    ):
        """is_pipeline: a script that runs others as its stages; its steps are these.

        columns: of the table at the end; two are the first and the last evaluation, more are all of them.
        """
        self.run, self.script, self.show, self.options = run, script, show, options
        self.is_pipeline, self.columns, self.wandb = is_pipeline, columns, None
        self.outer = Log.running  # the pipeline that this run is a stage of
        self.first_step: int | None = None  # of this process, for the time left
        self.folder = Path(run.output_dir)
        self.rows: list[dict] = dist.from_main(self._open)
        values = options.values
        if dist.is_main() and values["model"] == "toy" and options.toy and not self.outer:
            used = " ".join(f"{k}={v}" for k, v in options.toy.items() if values[k] == v)
            print(f"toy world: {used}; for real: --model <hub id or folder> --dataset <file>", flush=True)

    def _open(self) -> list[dict]:
        """Make or reopen the folder. -> the rows up to the checkpoint the run will resume from."""
        folder = self.folder
        if self.run.overwrite and (folder / "args.json").exists():  # never a folder that is not a run's
            shutil.rmtree(folder, ignore_errors=True)
        try:
            (folder if self.is_pipeline else folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
        except OSError as error:
            raise dist.RunError(f"output_dir {folder}: cannot be written ({error.strerror})") from error
        last = checkpoint.newest(folder)
        # without a checkpoint there is nothing to resume, but for the stages of a pipeline
        if (last or self.is_pipeline) and (folder / "args.json").exists():
            self._compare(dotted(json.loads((folder / "args.json").read_text())))
        keep = int(last.name[5:]) if last else math.inf if self.is_pipeline else -1
        for name in ("metrics.jsonl", "samples.jsonl"):
            kept = [row for row in files.read_rows(folder / name) if row["step"] <= keep]
            files.write(folder / name, files.as_lines(kept))
            if self.is_pipeline:  # samples are written before their row of metrics
                keep = max((row["step"] for row in kept), default=-1)
        return files.read_rows(folder / "metrics.jsonl")

    def _compare(self, before: dict[str, Any]) -> None:
        """Refuse a change of what decides numbers; `before` are the options that the run began with."""
        for name, value in dotted(self.options.values).items():
            if name in self.options.fixed and name in before and before[name] != value:
                raise dist.RunError(
                    f"output_dir {self.folder} holds a run with {name} {before[name]!r}, now {value!r}: "
                    "give that value to resume it, another output_dir, or --overwrite to start anew"
                )

    def _start_wandb(self) -> None:
        """Online if logged in, else offline; never asks, and a failure to start only costs the tracking."""
        if self.outer:
            self.wandb = self.outer.wandb
        if self.outer or not self.run.track:
            return
        id_file = self.folder / "wandb_id"
        try:
            import wandb

            os.environ.setdefault("WANDB_SILENT", "true")
            online = os.environ.get("WANDB_SWEEP_ID") or wandb.login(prompt=False)
            run_id = id_file.read_text() if id_file.exists() else os.environ.get("WANDB_RUN_ID")
            self.wandb = wandb.init(
                project=self.run.wandb_project,
                name=self.run.run_name or None,
                id=run_id,
                resume="allow",
                mode=os.environ.get("WANDB_MODE") or ("online" if online else "offline"),
                dir=self.folder,
                config=self.options.values,
            )
            id_file.write_text(self.wandb.id)
        except Exception as error:
            print(f"W&B is off: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)

    def begin(self, num_steps: int) -> bool:
        """Write args.json and the script, now that the data has loaded; False if the run is finished."""
        last = max((row["step"] for row in self.rows), default=0)
        done = dist.from_main(lambda: last >= num_steps and (self.folder / "model").is_dir())
        if dist.is_main() and done:
            print(f"{self.folder} is finished at step {last}; --overwrite starts anew", flush=True)
            self._table()
        elif dist.is_main():
            if last:
                print(f"resuming {self.folder} from step {last}", flush=True)
            shutil.copyfile(self.script, self.folder / Path(self.script).name)
            files.write(self.folder / "args.json", json.dumps(self.options.values, indent=2) + "\n")
            self._start_wandb()
        return not done

    def stage(self, main: Callable, args: Any) -> bool:
        """Run the main of another script with its Args, in their folder, unless that is complete.

        Its metrics go into this run's W&B run, under the folder's name.

        Returns:
            False if a stop was asked for; the stage has saved and the pipeline must end too.
        """
        folder = Path(args.run.output_dir)
        if not dist.poll_stop() and not dist.from_main((folder / "model").is_dir):
            if dist.is_main():
                print(f"\nstage {folder.name}", flush=True)
            gc.collect()  # FSDP's modules refer to themselves
            Log.running, before = self, Log.running
            try:
                main(args)
            finally:
                Log.running = before
            gc.collect()
            dist.poll_stop()
        if dist.stop_requested() and dist.is_main():
            print(f"stopped in or after {folder.name}; the same command goes on from there", flush=True)
        return not dist.stop_requested() and dist.from_main((folder / "model").is_dir)

    def _track(self, step: int, values: dict[str, Any]) -> None:
        """Send to W&B. Stages count their steps anew, so these are a metric there and not W&B's own step."""
        if self.wandb and self.outer:
            values = {f"{self.folder.name}/{name}": value for name, value in {**values, "step": step}.items()}
            self.wandb.define_metric(f"{self.folder.name}/*", step_metric=f"{self.folder.name}/step")
        if self.wandb:
            self.wandb.log(values, step=None if self.outer or self.is_pipeline else step)

    def __call__(self, step: int, num_steps: int, metrics: dict[str, float]) -> None:
        """Append a row for `step` completed optimizer steps; stop the run if its loss is not finite.

        Raises:
            RunError: NaN or infinite train/loss or train/grad_norm; the newest checkpoint is from before it.
        """
        for name in ("train/loss", "train/grad_norm"):
            if not abs(metrics.get(name, 0.0)) < float("inf"):
                last = checkpoint.newest(self.folder)
                raise dist.RunError(
                    f"{name} is {metrics[name]} at step {step}; the run stops. "
                    + (f"The last good checkpoint is {last}" if last else "There is no checkpoint yet")
                    + "; a lower learning_rate or max_grad_norm is the usual cure"
                )
        if not dist.is_main():
            return
        row = {"step": step, **metrics}
        self.rows.append(row)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        self._track(step, metrics)
        now = time.perf_counter()
        if self.first_step is None:
            self.first_step, self.started, self.printed = step, now, now
        evaluation = {name[5:]: value for name, value in metrics.items() if name.startswith("eval/")}
        if now - self.printed > 5 or evaluation or step == num_steps:
            self.printed = now
            head = f"step {step:>{len(str(num_steps))}}/{num_steps}"
            if "train/loss" in metrics:
                training = {name[6:]: value for name, value in metrics.items() if name.startswith("train/")}
                print(
                    f"{head}  {self._brief(training)}{self._pace(step, num_steps, metrics, now)}", flush=True
                )
            if evaluation:
                print(f"{head}  held out: {self._brief(evaluation)}", flush=True)

    def _brief(self, metrics: dict[str, float]) -> str:
        """The shown metrics and the judge's scores on one line, by the last part of their names."""
        shown = [n for n in self.show if n in metrics] + [n for n in metrics if n.startswith("judge/")]
        return "  ".join(f"{name.rsplit('/')[-1]} {metrics[name]:.3g}" for name in shown)

    def _pace(self, step: int, num_steps: int, metrics: dict[str, float], now: float) -> str:
        pace = f"  {metrics.get('train/tokens_per_second', 0) / 1000:.1f}k tokens/s"
        if "train/images_per_second" in metrics:
            pace = f"  {metrics['train/images_per_second']:.3g} images/s"
        if "train/mfu" in metrics:
            pace += f"  MFU {metrics['train/mfu']:.1%}  {metrics['train/max_memory_gib']:.1f} GiB"
        left = (now - self.started) / max(1, step - self.first_step) * (num_steps - step)
        return pace + f"  eta {int(left // 60)}:{int(left % 60):02d}"

    def samples(
        self,
        step: int,
        policy: Any,
        tokenizer: Any,
        dataset: data.Dataset,
        sampling: Sampling,
        reward: Callable | None = None,
    ) -> dict[str, float]:
        """Answer the first num_samples distinct prompts, judge the answers and append both to samples.jsonl.

        Args:
            reward: a collective, (examples, texts) -> list of float, or of dicts of scores.

        Returns:
            eval/follow/mae/<score> and /pearson/ of the scores an example's label asks for and those found,
            eval/ended, the share that stopped by itself, eval/reward and eval/judge/<score>, on rank 0.
        """
        chosen: dict[str, data.Example] = {}
        for example in dataset:
            if len(chosen) == self.options.values["num_samples"]:
                break
            if example.prompt:
                chosen.setdefault(json.dumps([example.prompt, example.label]), example)
        if not chosen:
            return {}
        prompts = [data.encode_prompt(tokenizer, e.prompt, e.label) for e in chosen.values()]
        samples = generate(
            policy,
            tokenizer,
            prompts,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=self.options.values["seed"],
            step=step,
        )
        rewards = reward([*chosen.values()], [sample.text for sample in samples]) if reward else []
        if not dist.is_main():
            return {}
        judge, rows = self.judge(), []
        for example, sample in zip(chosen.values(), samples, strict=True):
            prompt = example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]
            scores = judge(prompt, sample.text) if judge else {}
            row = {"step": step, "prompt": prompt, "label": example.label, "response": sample.text}
            rows.append({**row, "ended": sample.ended, **scores})
        for row, value in zip(rows, rewards, strict=False):
            row |= {**value, **row} if isinstance(value, dict) else {"reward": value}
        self._write_samples(step, rows)
        means = {name: sum(row[name] for row in rows) / len(rows) for name in list(rows[0])[4:]}
        plain = ("ended", "reward")
        metrics = {f"eval/{'' if name in plain else 'judge/'}{name}": mean for name, mean in means.items()}
        return metrics | {f"eval/{name}": value for name, value in following(rows).items()}

    def _write_samples(self, step: int, rows: list[dict]) -> None:
        with open(self.folder / "samples.jsonl", "a") as file:
            file.write(files.as_lines(rows))
        if self.wandb:
            import wandb

            table = wandb.Table(list(rows[0]), [list(row.values()) for row in rows])
            self._track(step, {"samples": table})

    def write_samples(self, step: int, rows: list[dict]) -> dict[str, float]:
        """Append rows that another function has judged. -> means of the scores after `reward_base`"""
        if dist.is_main():
            self._write_samples(step, [{"step": step, **row} for row in rows])
        names = [*rows[0]][4:]
        return {f"eval/judge/{name}": sum(row[name] for row in rows) / len(rows) for name in names}

    def picture(self, step: int, path: Path) -> None:
        """Send a PNG to W&B, under its folder's name."""
        if self.wandb:
            import wandb

            self._track(step, {path.parent.name: wandb.Image(str(path))})

    def judge(self) -> Callable | None:
        """What scores a reply, if anything does."""
        values = self.options.values
        spec = values["judge"] or ("toy.language:judge" if values["dataset"] == "toy" else "")
        return load_function(spec) if spec else None

    def finish(self, stopped_at: int | None = None) -> None:
        """Draw the curves, and print the table, or how to resume a run that was stopped."""
        if not dist.is_main():
            return
        with contextlib.suppress(ImportError):
            _draw(self.rows, self.folder / "curves.png", self.show)
        if stopped_at is not None:
            print(f"stopped at step {stopped_at} and saved; the same command resumes there", flush=True)
        else:
            self._table()
            print(f"model, metrics, samples and curves are in {self.folder}", flush=True)
        if self.wandb and not self.outer:
            self.wandb.finish()

    def _table(self) -> None:
        """Evaluations side by side."""
        from rich.console import Console
        from rich.table import Table

        evals = [row for row in self.rows if any(k.startswith("eval/") for k in row)]
        if not evals:
            return
        shown = [evals[0], evals[-1]] if len(self.columns) == 2 else evals
        table = Table(title=f"step {shown[0]['step']} -> {shown[-1]['step']}")
        table.add_column("on held-out data")
        for heading, _ in zip(self.columns, shown, strict=False):
            table.add_column(heading, justify="right")
        names = [k for k in shown[-1] if k.startswith("eval/")]
        for name in sorted(names, key=lambda k: not k.startswith("eval/judge/")):
            table.add_row(name[5:], *(f"{row[name]:.3f}" if name in row else "" for row in shown))
        Console().print(table)


def following(rows: list[dict]) -> dict[str, float]:
    """How well scores follow the labels asked for: follow/mae/<score>, follow/pearson/ if these differ."""
    import pandas as pd

    metrics = {}
    items = [[item.split(":") for item in row["label"].strip().split(",") if item] for row in rows]
    asked = pd.DataFrame([dict(item) for item in items])
    for name in asked.columns.intersection(pd.DataFrame(rows).columns):
        both = pd.DataFrame({"asked": asked[name].astype(float), "found": [r[name] for r in rows]}).dropna()
        metrics[f"follow/mae/{name}"] = float((both.asked - both.found).abs().mean())
        if both.asked.nunique() > 1 and both.found.nunique() > 1:
            metrics[f"follow/pearson/{name}"] = float(both.corr().iloc[0, 1])
    return metrics


def _draw(rows: list[dict], path: Path, show: tuple[str, ...]) -> None:
    """Small panels of the shown metrics, training line and evaluation points, and of the judge's scores."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    judged = sorted({k[5:] for row in rows for k in row if k.startswith("eval/judge/")})
    names = [n for n in (*show, *judged) if any(f"train/{n}" in r or f"eval/{n}" in r for r in rows)]
    if not names:
        return
    columns = min(3, len(names))
    height = -(-len(names) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(4 * columns, 2.6 * height), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        for prefix, style in (("train", "-"), ("eval", "o-")):
            points = [(r["step"], r[f"{prefix}/{name}"]) for r in rows if f"{prefix}/{name}" in r]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=prefix, markersize=4, linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(fontsize=7, frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
