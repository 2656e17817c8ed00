"""Runs side by side: do they have the same metrics and samples, and if not, where do they part first?

    python -m common.compare runs/before runs/after [runs/other ...] [--tolerance 1e-6]
    python -m common.compare runs/a runs/b --judge my_judge:score    # whose answers are better?

Rows of metrics.jsonl are matched by step, those of samples.jsonl by step and place, values by name; stages
of a pipeline are compared as well, and every run with the first. Speed, times and memory differ from run to
run and are left out. Then come the settings, versions and fingerprints that differ, and the first and last
evaluation of each run; where only seeds differ, the mean over runs and its standard error. The exit code is
that of diff: 0 for equal runs, 1 for different ones, 2 if a folder is no run.
"""

import json
import math
import re
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from common import is_unread

IGNORED = re.compile(r"train/((tokens|images)_per_second|time/.*|mfu|max_memory_\w+)")
FREE = {"output_dir", "overwrite", "accept_changes", "track", "wandb_project", "run_name", "plan", "check"}
FREE |= {"max_minutes", "finished_at", "accepted_changes"}  # in args.json, and of no weight
QUESTION, REQUEST = "Which reply is better?", "Answer with the letter of that reply alone: (A) or (B)."


@dataclass
class Args:
    """Compare metrics, samples and settings of runs; exit code 0 if they are equal, 1 if they differ."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """the run folders, two or more"""
    tolerance: float = 0.0
    """numbers a and b count as equal if |a - b| <= tolerance * max(1, |b|); 0: equal to the last bit"""
    judge: str = ""
    """judges answers to the same prompts: package.module:function, a reward model, or a server's https://host/v1"""
    judge_model: str = ""
    """name of the model at the server"""


class Place(NamedTuple):
    """Of a row; they are in the order of training."""

    stage: str
    step: int
    file: str
    number: int  # among the rows of that step in this file


Run = dict[Place, dict[str, Any]]  # row -> name -> value


def read_run(folder: Path) -> Run:
    """The rows of metrics.jsonl and samples.jsonl, of a run and of the stages in it.

    Raises:
        ValueError: this folder is no run, or a line in it is no JSON object with a step.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} is no run folder: no metrics.jsonl in it")
    run: Run = {}
    for path in (*folder.rglob("metrics.jsonl"), *folder.rglob("samples.jsonl")):
        file, seen = path.relative_to(folder), Counter()
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                step = row.pop("step")
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: no JSON object with a step") from error
            place = Place(str(file.parent), step, str(file), seen[step])
            run[place] = {name: value for name, value in row.items() if not IGNORED.fullmatch(name)}
            seen[step] += 1
    return run


def are_equal(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two values are the same; NaN is equal to NaN, and only numbers have a tolerance."""
    if a == b or (a != a and b != b):
        return True
    numbers = all(isinstance(x, (int, float)) for x in (a, b))
    return numbers and abs(a - b) <= tolerance * max(1.0, abs(b)) < float("inf")


def compare(runs: tuple[Run, Run], folders: tuple[Path, Path], tolerance: float = 0.0) -> list[str]:
    """What differs between two runs, the earliest first, as lines for a person; the first line is a count."""
    names, lacks = set(), (Counter(), Counter())  # names that both have; that one has and the other lacks
    shared = sorted(runs[0].keys() & runs[1].keys())
    differences = []
    for mine, own, others in zip(lacks, runs, runs[::-1], strict=True):
        mine.update(f"{place.file}: rows" for place in sorted(own.keys() - others.keys()))
    for place in shared:
        rows = [run[place] for run in runs]
        for name in dict.fromkeys((*rows[0], *rows[1])):
            label = f"{place.file}: {name}"
            if name in rows[0] and name in rows[1]:
                names.add(label)
                values = [row[name] for row in rows]
                if not are_equal(*values, tolerance):
                    differences.append((place, name, values))
            else:
                lacks[name in rows[1]][label] += 1
    lines = [f"{len(shared):,} rows and {len(names):,} names compared"]
    for folder, found in zip(folders, lacks, strict=True):
        lines += [f"only {folder} has {label} ({count:,} times)" for label, count in found.items()]
    if differences:
        place, name, values = differences[0]
        of_row = f" of row {place.number}" if place.number else ""
        where = f"{place.file}: step {place.step}: {name}{of_row}"
        lines += [f"{len(differences):,} values differ, the first at {where}"]
        lines += [f"  {folder}: {value!r}" for folder, value in zip(folders, values, strict=True)]
    return lines


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


def evaluations(runs: list[Run], as_one: bool) -> list[list[str]]:
    """A line of cells for each eval/ metric: of each run its first and last value.

    Args:
        as_one: also the mean over runs and its standard error.
    """
    ends = []
    for run in runs:
        rows = [row for place, row in sorted(run.items()) if place.file == "metrics.jsonl"]
        rows = [row for row in rows if any(name.startswith("eval/") for name in row)] or [{}]
        ends.append((rows[0], rows[-1]))
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


def answered_by_both(runs: tuple[Run, Run]) -> list[tuple[list[dict], str, str]]:
    """(turns, answer of one, answer of the other) from the last evaluation in each run's samples.jsonl.

    Raises:
        ValueError: there are none.
    """
    found: list[dict] = []
    for run in runs:
        places = sorted(place for place in run if place.file == "samples.jsonl" and "response" in run[place])
        answers, seen = {}, Counter()
        for row in (run[place] for place in places if place.step == places[-1].step):
            asked = json.dumps([*row.get("history", ()), {"role": "user", "content": row["prompt"]}])
            asked = (asked, row.get("label"))
            answers[asked, seen[asked]] = row["response"]
            seen[asked] += 1
        found.append(answers)
    pairs = [
        (json.loads(key[0][0]), text, found[1][key]) for key, text in found[0].items() if key in found[1]
    ]
    if not pairs:
        raise ValueError("no prompt that both runs have answered; --num_samples logs answers")
    return pairs


def preferences(args: Args, folder: Path, pairs: list[tuple[list[dict], str, str]]) -> dict[str, list[float]]:
    """Score -> for each pair above 0 if the second answer is better, below if the first is, 0 for a tie.

    A server says which of two is better, and is asked in both orders: where it names the same place in both,
    that is a tie. Where it names none in one of them, the pair is left out.
    """
    from common import chat, constitutions, dist, evaluate, packed, rewards
    from common.args import System

    device, (turns, *sides) = dist.init(seed=1), zip(*pairs, strict=True)
    if "://" in args.judge:
        server = chat.Endpoint(args.judge, args.judge_model, chat.Server(), folder / "judged", 8)

        def verdicts(order: list[tuple[str, ...]]) -> list[list[float] | None]:
            asked = zip(turns, zip(*order, strict=True), strict=True)
            return server.verdicts(
                [constitutions.ask_judge(turn, QUESTION, pair, request=REQUEST) for turn, pair in asked]
            )

        both = zip(verdicts(sides), verdicts(sides[::-1]), strict=True)
        return {args.judge_model: [b[0] - a[0] for a, b in both if a and b]}
    if ":" in args.judge:
        judge = evaluate.load_judge(args.judge, "")
        found = [[*map(judge, map(evaluate.last_turn, turns), side)] for side in sides]
        evaluate.mean_scores([*found[0], *found[1]])  # refuses names that not all have
        return {name: [b[name] - a[name] for a, b in zip(*found, strict=True)] for name in found[0][0]}
    models, examples = (
        rewards.load(args.judge, device, System(), "judge"),
        [packed.Example([], x) for x in turns],
    )
    found = [rewards.score_replies(models, examples, [*side], 0, device) for side in sides]
    return {args.judge: [b - a for a, b in zip(*found, strict=True)]}


def win_rate(name: str, found: list[float]) -> list[str]:
    """Cells of a row: won, tied, lost; the share won, a tie as half, and Wilson's interval of it."""
    if not found:
        raise ValueError(f"{name} has judged none of the answers")
    count, z = len(found), statistics.NormalDist().inv_cdf(0.975)
    won, tied = sum(x > 0 for x in found), sum(x == 0 for x in found)
    share = (won + tied / 2) / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    rates = f"{share:.1%}", f"{max(0.0, middle - half):.1%} to {min(1.0, middle + half):.1%}"
    return [name, *map(str, (won, tied, count - won - tied)), *rates]


def report(args: Args) -> int:
    """Compare and print. -> the exit code"""
    if len(args.runs) < 2:
        raise ValueError(f"{len(args.runs)} run folders; expected two or more")
    first, *others = runs = [*map(read_run, args.runs)]
    changed = differing([*map(read_settings, args.runs)])
    is_different = False
    for folder, other in zip(args.runs[1:], others, strict=True):
        lines = compare((first, other), (args.runs[0], folder), args.tolerance)
        print(*lines, *([] if lines[1:] else ["equal"]), sep="\n")
        is_different |= len(lines) > 1
    for name, values in changed.items():
        print(f"{name}: {' | '.join(map(str, values))}")
    of_seeds = [*changed] == ["seed"]
    if is_different and (lines := evaluations(runs, of_seeds)):
        heads = ["evaluation", *map(str, args.runs), *(["mean +- standard error"] if of_seeds else [])]
        print(in_columns([heads, *lines]))
    for folder, other in zip(args.runs[1:], others, strict=True) if args.judge else ():
        pairs = answered_by_both((first, other))
        found = preferences(args, folder, pairs)
        heads = ["judged by", "won", "tied", "lost", "win rate", "95 % (Wilson, a tie as half)"]
        rows = [win_rate(name, values) for name, values in found.items()]
        print(f"answers of {folder} against those of {args.runs[0]} to {len(pairs):,} prompts")
        print(in_columns([heads, *rows]))
    return int(is_different)


def main(args: Args) -> int:
    """`report`, where a mistake is one line. -> the exit code"""
    try:
        return report(args)
    except (ValueError, OSError) as error:
        if is_unread():
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, prog="python -m common.compare", use_underscores=True)))
