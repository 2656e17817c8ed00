"""Two runs side by side: do they have the same metrics and samples, and if not, where do they part first?

    python -m common.compare runs/before runs/after [--tolerance 1e-6]

Rows of metrics.jsonl are matched by step, those of samples.jsonl by step and place, values by name; stages
of a pipeline are compared as well. Speed, times and memory differ from run to run and are left out. The exit
code is that of diff: 0 for equal runs, 1 for different ones, 2 if a folder is no run.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tyro

IGNORED = re.compile(r"train/((tokens|images)_per_second|time/.*|mfu|max_memory_\w+)")
Rows = dict[tuple[int, int], dict[str, Any]]  # (step, place among the rows of that step) -> name -> value


@dataclass
class Args:
    """Compare the metrics and samples of two runs; exit code 0 if they are equal, 1 if they differ."""

    runs: tyro.conf.Positional[tuple[Path, Path]]
    """the two run folders"""
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


def main(args: Args) -> int:
    """Compare and print. -> the exit code"""
    try:
        one, other = map(read_run, args.runs)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = compare(one, other, args.tolerance)
    print(report(found, args.runs))
    return int(bool(found.differences or any(found.only)))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, use_underscores=True)))
