"""Runs side by side: do they have the same metrics and samples, and if not, where do they part first?

    python -m common.compare runs/before runs/after [runs/other ...] [--tolerance 1e-6]

Rows of metrics.jsonl are matched by step, those of samples.jsonl by step and place, values by name; stages
of a pipeline are compared as well, and every run with the first. Speed, times and memory differ from run to
run and are left out. Then come the settings, versions and fingerprints that differ, and the first and last
evaluation of each run; where only seeds differ, the mean over runs and its standard error. The exit code is
that of diff: 0 for equal runs, 1 for different ones, 2 if a folder is no run.
"""

import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tyro

IGNORED = re.compile(r"train/((tokens|images)_per_second|time/.*|mfu|max_memory_\w+)")
FREE = {"output_dir", "overwrite", "accept_changes", "track", "wandb_project", "run_name", "plan", "check"}
FREE |= {"max_minutes", "finished_at", "accepted_changes"}  # in args.json, and of no weight
Rows = dict[tuple[int, int], dict[str, Any]]  # (step, place among the rows of that step) -> name -> value


@dataclass
class Args:
    """Compare metrics, samples and settings of runs; exit code 0 if they are equal, 1 if they differ."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """the run folders, two or more"""
    tolerance: float = 0.0
    """numbers a and b count as equal if |a - b| <= tolerance * max(1, |b|); 0: equal to the last bit"""


class Difference(NamedTuple):
    place: str  # file, step and name
    one: Any
    other: Any


@dataclass
class Comparison:
    """What comparing two runs has found."""

    num_rows: int = 0  # compared
    names: set[str] = field(default_factory=set)  # compared
    differences: list[Difference] = field(default_factory=list)
    only: tuple[Counter, Counter] = field(default_factory=lambda: (Counter(), Counter()))
    """how often each run has a name, or a row, that the other lacks there"""


def read_run(folder: Path) -> dict[str, Rows]:
    """File -> rows: metrics.jsonl and samples.jsonl of a run and of the stages in it.

    Raises:
        ValueError: this folder is no run, or a line in it is no JSON object with a step.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} is no run folder: no metrics.jsonl in it")
    found = {}
    for path in sorted((*folder.rglob("metrics.jsonl"), *folder.rglob("samples.jsonl"))):
        rows: Rows = {}
        places: Counter[int] = Counter()
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                step = row.pop("step")
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: no JSON object with a step") from error
            rows[step, places[step]] = row
            places[step] += 1
        found[str(path.relative_to(folder))] = rows
    return found


def are_equal(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two values are the same; NaN is equal to NaN, and only numbers have a tolerance."""
    if a == b or (a != a and b != b):
        return True
    numbers = all(isinstance(x, (int, float)) for x in (a, b))
    return numbers and abs(a - b) <= tolerance * max(1.0, abs(b)) < float("inf")


def in_order(one: dict[str, Rows], other: dict[str, Rows]) -> Iterator[tuple[str, tuple[int, int]]]:
    """(file, key) of all rows of both runs, step by step, so that the first difference is the earliest."""
    files = [*dict.fromkeys((*one, *other))]
    keys = {(file, key) for file in files for key in (*one.get(file, {}), *other.get(file, {}))}
    stages = {file: str(Path(file).parent) for file in files}
    yield from sorted(keys, key=lambda item: (stages[item[0]], item[1][0], item[0], item[1][1]))


def compare(one: dict[str, Rows], other: dict[str, Rows], tolerance: float = 0.0) -> Comparison:
    """The differences of two runs, the earliest first."""
    found = Comparison()
    for file, key in in_order(one, other):
        rows = [run.get(file, {}).get(key) for run in (one, other)]
        if None in rows:  # this step was not reached, or not evaluated
            found.only[rows[0] is None][f"{file}: rows"] += 1
            continue
        found.num_rows += 1
        a, b = ({name: x for name, x in row.items() if not IGNORED.fullmatch(name)} for row in rows)
        for name in dict.fromkeys((*a, *b)):
            if name not in a or name not in b:
                found.only[name not in a][f"{file}: {name}"] += 1
                continue
            found.names.add(f"{file}: {name}")
            if not are_equal(a[name], b[name], tolerance):
                place = f"{file}: step {key[0]}: {name}" + (f" of row {key[1]}" if key[1] else "")
                found.differences.append(Difference(place, a[name], b[name]))
    return found


def report(found: Comparison, runs: tuple[Path, Path]) -> str:
    """What a person reads of a comparison."""
    lines = [f"{found.num_rows:,} rows and {len(found.names):,} names compared"]
    for run, names in zip(runs, found.only, strict=True):
        lines += [f"only {run} has {name} ({count:,} times)" for name, count in names.items()]
    if found.differences:
        place, one, other = found.differences[0]
        lines += [f"{len(found.differences):,} values differ, the first at {place}"]
        lines += [f"  {run}: {value!r}" for run, value in zip(runs, (one, other), strict=True)]
    return "\n".join(lines if len(lines) > 1 else [*lines, "equal"])


def read_settings(folder: Path) -> dict[str, Any]:
    """What args.json says that decides a run: options, versions, fingerprints; nothing without that file."""
    path = folder / "args.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    settings = {name: value for name, value in found.items() if name not in FREE}
    for group, words in (("versions", "version of"), ("inputs", "fingerprint of")):
        settings |= {f"{words} {name}": value for name, value in settings.pop(group, {}).items()}
    return settings


def differing(settings: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Name -> the values of all runs, of the settings that are not the same in all."""
    names = dict.fromkeys(name for one in settings for name in one)
    values = {name: [one.get(name, "-") for one in settings] for name in names}
    return {name: found for name, found in values.items() if any(x != found[0] for x in found)}


def evaluations(runs: list[dict[str, Rows]], as_one: bool) -> list[list[str]]:
    """A line of cells for each eval/ metric: of each run its first and last value.

    Args:
        as_one: also the mean over runs and its standard error.
    """
    ends = []
    for run in runs:
        rows = [
            row for row in run.get("metrics.jsonl", {}).values() if any(k.startswith("eval/") for k in row)
        ]
        ends.append((rows[0], rows[-1]) if rows else ({}, {}))
    lines = []
    for name in dict.fromkeys(name for _, last in ends for name in last if name.startswith("eval/")):
        pairs = [[end.get(name) for end in both] for both in ends]
        cells = [" -> ".join("-" if x is None else f"{x:.4g}" for x in pair) for pair in pairs]
        if as_one and all(None not in pair for pair in pairs):
            columns = [*zip(*pairs, strict=True)]
            errors = [statistics.stdev(column) / len(column) ** 0.5 for column in columns]
            means = [statistics.fmean(column) for column in columns]
            cells.append(" -> ".join(f"{m:.4g} +- {e:.2g}" for m, e in zip(means, errors, strict=True)))
        lines.append([name[5:], *cells])
    return lines


def in_columns(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main(args: Args) -> int:
    """Compare and print. -> the exit code"""
    try:
        if len(args.runs) < 2:
            raise ValueError(f"{len(args.runs)} run folders; expected two or more")
        first, *others = runs = [*map(read_run, args.runs)]
        changed = differing([*map(read_settings, args.runs)])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    is_different = False
    for folder, other in zip(args.runs[1:], others, strict=True):
        found = compare(first, other, args.tolerance)
        print(report(found, (args.runs[0], folder)))
        is_different |= bool(found.differences or any(found.only))
    for name, values in changed.items():
        print(f"{name}: {' | '.join(map(str, values))}")
    of_seeds = [*changed] == ["seed"]
    if is_different and (lines := evaluations(runs, of_seeds)):
        heads = ["evaluation", *map(str, args.runs), *(["mean +- standard error"] if of_seeds else [])]
        print(in_columns([heads, *lines]))
    return int(is_different)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, use_underscores=True)))
