"""The nine default runs on three seeds: what each changes, mean and standard deviation, in docs/.

    python benchmarks/seeds.py --output runs/seeds            # an hour on one core, resumable
    python benchmarks/seeds.py --output runs/seeds --write    # and the tables of docs/ from what is there

Each run is one process with no options but a seed and a folder. A run that is finished is not run again. A
table stands in the script's page between two comments, `<!-- seeds -->` and `<!-- end -->`.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("sft", "dpo", "spin", "reward_model", "ppo", "steerlm", "steerlm2", "cai", "draftp")
STAGES = {"cai": ("before", "SL-CAI", "RL-CAI"), "steerlm": ("before", "SFT")}
ABOUT = (
    "`python benchmarks/seeds.py`: `python {script}.py` on seeds {seeds}, one process, float32. Means on\n"
    "held-out data, and +- the standard deviation over the seeds."
)


def run(script: str, seed: int, folder: Path) -> None:
    """Run a script to its end, or find that it is there."""
    command = [sys.executable, f"{script}.py", "--seed", str(seed), "--output_dir", str(folder)]
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode
    print(f"{script} seed {seed}: exit code {code}", flush=True)
    if code:
        sys.exit(f"see {log.name}")


def evaluations(folder: Path) -> list[dict[str, float]]:
    """The rows of a run that have held-out metrics."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if any(name.startswith("eval/") for name in row)]


def table(script: str, runs: list[list[dict[str, float]]]) -> str:
    """Markdown: a line a metric, a column an evaluation; of more than four the first, middle and last."""
    steps = [row["step"] for row in runs[0]]
    places = range(len(steps)) if len(steps) <= 4 else (0, len(steps) // 2, len(steps) - 1)
    titles = STAGES.get(script) or [f"step {steps[i]}" for i in places]
    names = list(dict.fromkeys(name for row in runs[0] for name in row if name.startswith("eval/")))
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---:|' * len(places)}"]
    for name in names:
        cells = []
        for i in places:
            found = [row[i][name] for row in runs if name in row[i] and math.isfinite(row[i][name])]
            spread = f" +- {statistics.stdev(found):.3f}" if len(found) > 1 and i else ""
            cells.append(f"{statistics.mean(found):.3f}{spread}" if found else "")
        lines.append(f"| `{name[5:]}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    """Put a text between the two comments of a page."""
    before, rest = page.read_text().split("<!-- seeds -->\n")
    page.write_text(f"{before}<!-- seeds -->\n{text}\n<!-- end -->{rest.split('<!-- end -->')[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument("--write", action="store_true", help="write the tables of docs/")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    output = args.output.resolve()
    for seed in args.seeds:
        for script in args.scripts:
            run(script, seed, output / f"{script}_{seed}")
    seeds = ", ".join(map(str, args.seeds))
    for script in args.scripts:
        runs = [evaluations(output / f"{script}_{seed}") for seed in args.seeds]
        text = f"{ABOUT.format(script=script, seeds=seeds)}\n\n{table(script, runs)}"
        print(f"{text}\n")
        if args.write:
            write(ROOT / "docs" / f"{script}.md", text)


if __name__ == "__main__":
    main()
