"""Pipelines: scripts that run the main of others as stages, each in a folder of its own.

A pipeline calls `stage` for each of them. What a stage is told by the user stands in one string, as on the
command line of its script, and is read, and refused, before any stage begins.
"""

import contextlib
import gc
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from common import args, checkpoint, dist, files, formats, plan
from common.log import Log

# of every stage: set by the pipeline, or left alone because it tracks its stages itself
RESERVED = {"model", "dataset", "output_dir", "overwrite", "seed", "chat_template", "chat_template_kwargs"}
RESERVED |= {"track", "wandb_project", "run_name", "accept_changes", "plan", "check", "max_minutes"}


def stage(
    main: Callable, Args: type, folder: Path, overrides: dict[str, Any], options: str, pipeline: Log
) -> None:
    """Run the main of another script, unless its folder has a model/, which is what a run writes last.

    A run that was interrupted goes on, since that is what the script does with its folder.

    Args:
        overrides: options that the pipeline sets.
        options: those of the user, a string.
        pipeline: the log of the pipeline, into whose W&B run the stage logs, under the folder's name.

    Raises:
        Stopped: a stop was asked for; the stage has saved, and the pipeline must end too.
    """
    if not dist.poll_stop() and not is_complete(folder):
        say(f"\nstage {folder.name}")
        given = read_options(folder.name, Args, options)
        gc.collect()  # FSDP's modules refer to themselves: what spoke before is freed here, not by counting
        own = {"output_dir": str(folder), "accept_changes": pipeline.run.accept_changes}
        try:
            main(args.with_fields(given, **overrides | own), pipeline)
        except dist.RunError as error:
            if isinstance(error, dist.Stopped) or has_begun(folder):
                raise
            hint = "its options may still change, what is done stays"
            raise dist.RunError(f"stage {folder.name}: {error}; {hint}") from error
        gc.collect()
        dist.poll_stop()  # a signal that came after the last step of the stage
    if dist.stop_requested():
        raise dist.Stopped(f"stopped in or after {folder.name}; the same command goes on from there")


def before(given: Any, stages: Iterable[tuple], speakers: dict[str, dict[str, str]], slots: int) -> None:
    """With --plan or --check, those of every stage by its own script; ends the process, 0 if all say yes.

    Args:
        given: the Args of the pipeline.
        stages: name, main and Args of each, what the pipeline sets and what the user does. A stage whose
            data others make first has the dataset "", and is not checked.
        speakers, slots: of stages that train nothing the models they hold, see `plan.speaking_need`.
    """
    run = given.run
    if not (run.plan or run.check):
        return
    codes, found, folder = [], {}, Path(run.output_dir)
    for name, models in speakers.items() if run.plan else ():
        say(f"\nstage {name}")
        try:
            plan.show(given, lambda _, models=models: models, plan.speaking_need, slots=slots)
        except SystemExit as done:
            codes.append(done.code)
    if run.check:
        dist.from_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    for name, main, Args, overrides, options in stages:
        say(f"\nstage {name}")
        if run.check and not overrides["dataset"]:
            say("not checked: its data are made by a stage before it")
            continue
        with files.beside(str(folder)) if run.check else contextlib.nullcontext("unused") as own:
            how = {"output_dir": own, "plan": run.plan, "check": run.check}
            try:
                main(args.with_fields(read_options(name, Args, options), **overrides | how))
            except SystemExit as done:
                codes.append(done.code)
            if run.check:
                found[name] = json.loads(dist.from_main((Path(own) / "check.json").read_text))
    if run.check and dist.is_main():
        files.write(folder / "check.json", json.dumps(found, indent=2) + "\n")
    dist.barrier()
    sys.exit(int(any(codes)))


def is_complete(folder: Path) -> bool:
    """Whether the stage in this folder is done; a kill after its export may have left it without curves."""

    def look() -> bool:
        own = folder / "args.json"
        return (folder / "model").is_dir() and (not own.exists() or "finished_at" in files.read_json(own))

    return dist.from_main(look)


def has_begun(folder: Path) -> bool:
    """Whether the stage in this folder has a checkpoint or a model/, which others must go on from."""
    return bool(checkpoint.newest(folder)) or (folder / "model").is_dir()


def read_all(strings: Any, stages: dict[str, type], reserved: Collection[str]) -> dict[str, Any]:
    """The Args of all stages, by name, from the strings in a block of the pipeline's Args."""
    return {name: read_options(name, Args, getattr(strings, name), reserved) for name, Args in stages.items()}


def read_options(name: str, Args: type, options: str, reserved: Collection[str] = ()) -> Any:
    """The Args of a stage from its string.

    Args:
        reserved: options that the pipeline sets itself.

    Raises:
        RunError: an unknown option, one that is reserved, or a value of another type.
    """
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise formats.wrong(f"{name} {options!r}", str(error), '"--option value --option value"') from error
    for option in args.split_options(words):
        if option.removeprefix("no_") in reserved:
            raise dist.RunError(f"{name}: --{option} is set by the pipeline; leave it out")
    try:
        found = args.parse_words(words, Args(), prog=name)
        args.refuse_numbers(args.flat(found))
    except dist.RunError as error:
        raise dist.RunError(f"{name}: {error}") from error
    return found


def refuse_changed_stages(folders: dict[Path, Any], reserved: Collection[str], accept: bool) -> None:
    """End the run if what decides numbers has changed in a stage that has begun.

    Begun is a stage with a checkpoint or a model/. The options of others may change, and so may those that
    never decide numbers; where an option stands in common/args.py says which. Of a finished stage, one with a
    model/, the number of steps and the form of the export are settled too. What the pipeline sets is
    compared by the stage itself where it goes on: paths into a finished run that was moved harm nothing.

    Args:
        folders: folder of a stage -> its Args.
        reserved: options that the pipeline sets.
        accept: stages that are not finished will take note of changes instead.
    """

    def compare() -> None:
        for folder, options in folders.items():
            is_finished = (folder / "model").is_dir()
            if has_begun(folder) and (folder / "args.json").exists() and (is_finished or not accept):
                before, now = files.read_json(folder / "args.json"), args.snapshot(options)
                names = now.fixed | set(args.Training.final if is_finished else ())
                found = args.changes(before, now.values, names - reserved)
                args.refuse_changes(folder, found, is_finished)

    dist.from_main(compare)


def refuse_large_batch(name: str, options: Any, size: int) -> None:
    """End the run now if a stage will refuse its batch size: its data will be `size` examples at most."""
    batch_size = options.optimization.batch_size
    if size < batch_size:
        raise formats.wrong(
            f"{name}: --batch_size", batch_size, f"at most {size:,}, the examples it will have"
        )


# ---------------------------------------------------------------------- stages of a pipeline's own, and files


def begin(path: Path) -> bool:
    """Whether a stage that writes this file has to run; a line of the console says so."""
    if dist.from_main(path.exists):
        return False
    say(f"\nstage {path.parent.name}")
    dist.from_main(lambda: path.parent.mkdir(exist_ok=True))
    return True


def begin_again(path: Path, later: Path, option: str, value: Any) -> bool:
    """`begin`, also where the file was made with another value of an option, which its records have.

    Its folder's files are then removed first, but not once the stage in the folder `later` has begun to
    train on them.
    """

    def set_aside() -> None:
        made = [record.get(option, value) for record in read_lines(path)[:1]] if path.exists() else []
        if made in ([], [value]):
            return
        if has_begun(later):
            say(f"{path.parent.name} stays as it was made, with {option} {made[0]}")
            return
        for old in sorted(path.parent.glob("*.jsonl"), key=lambda x: x == path):  # which says so, last
            files.remove(old)

    dist.from_main(set_aside)
    return begin(path)


def say(*lines: str) -> None:
    """Lines of the console."""
    for line in lines if dist.is_main() else ():
        print(line, flush=True)


def show(metrics: dict[str, float]) -> None:
    """A line of the console."""
    say("  ".join(f"{name} {value:.3g}" for name, value in metrics.items()))


def read_lines(path: str | Path) -> list[dict]:
    """The records of a file."""
    return [record.value for record in formats.read_file(Path(path).expanduser())]


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write records as JSON lines, complete or not at all; a file that is there stays."""

    def write() -> None:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, files.as_lines(records))

    dist.from_main(write)


def mixed(*sources: Any) -> str:
    """A data set of several, of those that are not empty."""
    return ",".join(str(source) for source in sources if source)


def export(last: Path, folder: Path) -> None:
    """model/ of a pipeline: a copy of its last stage's."""

    def copy() -> None:
        with files.whole(folder / "model") as unfinished:
            shutil.copytree(last / "model", unfinished)

    dist.from_main(copy)
