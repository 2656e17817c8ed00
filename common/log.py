"""What a run leaves behind: args.json, its script, metrics, samples, curves.png, and W&B if asked.

Only rank 0 writes. Metrics go to the file in full and to the console in part, a few lines a minute.
"""

import argparse
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
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from common import checkpoint, data, dist, files
from common.generate import generate

# a run may resume with these changed: they alter its length, what it records or how it fits, no number
CHANGEABLE = """
    output_dir overwrite max_steps num_epochs num_iterations eval_dataset eval_every save_every
    keep_checkpoints num_samples max_new_tokens temperature judge micro_batch_tokens activation_checkpointing
    compile sharding merge_lora precompute_ref track wandb_project run_name micro_batch_size
    step_checkpointing images_per_prompt sample weights
""".split()  # noqa: SIM905


def parse(Args: type, toy: dict[str, Any]) -> Any:  # noqa: N803
    """Args from the command line; `toy` replaces defaults while the model is "toy", explicit flags win."""
    import tyro

    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--model", default=Args.model)
    wants_toy = peek.parse_known_args()[0].model == "toy"
    asks_help = {"-h", "--help"} & set(sys.argv[1:])
    defaults = Args() if asks_help or not wants_toy else with_fields(Args(), toy)
    settings = " ".join(f"--{name} {value}" for name, value in _flat(toy).items())
    about = f"{Args.__doc__}\n\nWith --model toy (the default) the defaults become: {settings}"
    return tyro.cli(Args, default=defaults, description=about, use_underscores=True)


def with_fields(args: Any, changes: dict[str, Any]) -> Any:
    """A copy of args with fields changed; a dict changes fields of the stage options it names."""
    own = {k: with_fields(getattr(args, k), v) if isinstance(v, dict) else v for k, v in changes.items()}
    return replace(args, **own)


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
    """The run folder. `log(step, metrics)` appends a row; numbers under eval/ make the table at the end.

    A pipeline is a script with the Args of others among its own; its steps are its stages.
    """

    running: "Log | None" = None  # the pipeline a stage of which is running

    def __init__(
        self,
        args: Any,
        script: str,
        show: tuple[str, ...],
        toy: dict[str, Any] | None = None,
        fixed: tuple[str, ...] = (),
        columns: tuple[str, ...] = ("before", "after"),
    ):
        """fixed: fields of CHANGEABLE that do alter this script's numbers.

        columns: of the table at the end; two are the first and the last evaluation, more are all of them.
        """
        self.args, self.show, self.columns, self.wandb = args, show, columns, None
        self.outer = Log.running  # the pipeline that this run is a stage of
        self.is_pipeline = any(is_dataclass(getattr(args, f.name)) for f in fields(args))
        self.changeable = set(CHANGEABLE) - set(fixed)
        self.first_step: int | None = None  # of this process, for the time left
        if os.environ.get("WANDB_SWEEP_ID"):  # runs of a sweep must not share a folder
            args.track = True
            if args.output_dir == next(f.default for f in fields(args) if f.name == "output_dir"):
                args.output_dir += "-" + os.environ.get("WANDB_RUN_ID", "run")
        self.folder = Path(args.output_dir)
        self.rows: list[dict] = dist.from_main(self._open)
        self.script = script
        if dist.is_main() and args.model == "toy" and toy is not None and not self.outer:
            used = " ".join(f"{k}={v}" for k, v in toy.items() if getattr(args, k) == v)
            print(f"toy world: {used}; for real: --model <hub id or folder> --dataset <file>", flush=True)

    def _open(self) -> list[dict]:
        """Make or reopen the folder. -> the rows up to the checkpoint the run will resume from."""
        args, folder = self.args, self.folder
        if args.overwrite and (folder / "args.json").exists():  # never a folder that is not a run's
            shutil.rmtree(folder, ignore_errors=True)
        try:
            (folder if self.is_pipeline else folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
        except OSError as error:
            raise dist.RunError(f"output_dir {folder}: cannot be written ({error.strerror})") from error
        last = checkpoint.newest(args)
        # without a checkpoint there is nothing to resume, but for the stages of a pipeline
        if (last or self.is_pipeline) and (folder / "args.json").exists():
            before, now = _flat(json.loads((folder / "args.json").read_text())), _flat(asdict(args))
            for name, value in now.items():
                changeable = name.rsplit(".")[-1] in self.changeable
                if not changeable and name in before and before[name] != value:
                    raise dist.RunError(
                        f"output_dir {folder} holds a run with {name} {before[name]!r}, now {value!r}: "
                        "give that value to resume it, another output_dir, or --overwrite to start anew"
                    )
        keep = int(last.name[5:]) if last else math.inf if self.is_pipeline else -1
        for name in ("metrics.jsonl", "samples.jsonl"):
            kept = [row for row in files.read_rows(folder / name) if row["step"] <= keep]
            files.write(folder / name, files.as_lines(kept))
            if self.is_pipeline:  # samples are written before their row of metrics
                keep = max((row["step"] for row in kept), default=-1)
        return files.read_rows(folder / "metrics.jsonl")

    def _start_wandb(self) -> None:
        """Online if logged in, else offline; never asks, and a failure to start only costs the tracking."""
        if self.outer:
            self.wandb = self.outer.wandb
        if self.outer or not self.args.track:
            return
        id_file = self.folder / "wandb_id"
        try:
            import wandb

            os.environ.setdefault("WANDB_SILENT", "true")
            online = os.environ.get("WANDB_SWEEP_ID") or wandb.login(prompt=False)
            run_id = id_file.read_text() if id_file.exists() else os.environ.get("WANDB_RUN_ID")
            self.wandb = wandb.init(
                project=self.args.wandb_project,
                name=self.args.run_name or None,
                id=run_id,
                resume="allow",
                mode=os.environ.get("WANDB_MODE") or ("online" if online else "offline"),
                dir=self.folder,
                config=asdict(self.args),
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
            files.write(self.folder / "args.json", json.dumps(asdict(self.args), indent=2) + "\n")
            self._start_wandb()
        return not done

    def stage(self, main: Callable, args: Any) -> bool:
        """Run the main of another script in its own folder, unless that is complete.

        Its metrics go into this run's W&B run, under the folder's name.

        Returns:
            False if a stop was asked for; the stage has saved and the pipeline must end too.
        """
        folder = Path(args.output_dir)
        dist.all_sum({})
        if not dist.stop_requested() and not dist.from_main((folder / "model").is_dir):
            if dist.is_main():
                print(f"\nstage {folder.name}", flush=True)
            gc.collect()  # FSDP's modules refer to themselves
            Log.running, before = self, Log.running
            try:
                main(args)
            finally:
                Log.running = before
            gc.collect()
            dist.all_sum({})
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
                last = checkpoint.newest(self.args)
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
        self, step: int, policy: Any, tokenizer: Any, dataset: data.Dataset, reward: Callable | None = None
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
            if len(chosen) == self.args.num_samples:
                break
            if example.prompt:
                chosen.setdefault(json.dumps([example.prompt, example.label]), example)
        if not chosen:
            return {}
        prompts = [data.encode_prompt(tokenizer, e.prompt, e.label) for e in chosen.values()]
        settings = {"max_new_tokens": self.args.max_new_tokens, "temperature": self.args.temperature}
        samples = generate(policy, tokenizer, prompts, **settings, seed=self.args.seed, step=step)
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
        spec = self.args.judge or ("toy.language:judge" if self.args.dataset == "toy" else "")
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


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options of stages by the names they have on the command line: sft.learning_rate."""
    flat = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


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
