"""What is made of a run for people: the table at its end, the curves, and the card of its model."""

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from common import files
from common.formats import ATTRIBUTES

SERIES = (("train", "-", "tab:blue"), ("eval", "o-", "tab:orange"))
LEAST_SPAN = 0.2  # of an axis, as a share of the largest value on it: less would make noise look like change


# scores of a judge whose scale is known: 0 to 4, or 0 to 1 of one that gives nothing above
RATED = re.compile(f"judge/(.*_)?({'|'.join(ATTRIBUTES)})")


def evaluations(rows: list[dict]) -> list[dict]:
    return [row for row in rows if any(name.startswith("eval/") for name in row)]


def table(rows: list[dict], columns: Sequence[str]) -> list[list[str]]:
    """Evaluations side by side: headings, and lines of a name and its values, a judge's scores first.

    Args:
        columns: two are the first and the last evaluation, more are all of them.
    """
    found = evaluations(rows)
    if not found:
        return []
    shown = [found[0], found[-1]] if len(columns) == 2 else found
    names = [name for name in shown[-1] if name.startswith("eval/")]
    names.sort(key=lambda name: not name.startswith("eval/judge/"))
    lines = [[name[5:], *(f"{row[name]:.3f}" if name in row else "" for row in shown)] for name in names]
    return [["on held-out data", *columns[: len(shown)]], *lines]


def print_table(rows: list[dict], columns: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    if lines := table(rows, columns):
        steps = [row["step"] for row in evaluations(rows)]
        first, *others = lines[0]
        headings = [first, *(Column(name, justify="right") for name in others)]
        title = f"step {steps[0]} -> {steps[-1]}" if columns[-1] == "after" else None  # else of stages
        shown = Table(*headings, title=title)
        for line in lines[1:]:
            shown.add_row(*line)
        Console().print(shown)


def of_sets(names: Iterable[str], show: Sequence[str]) -> list[str]:
    """Of evaluations on several data sets, which have a name each, the metrics that are shown."""
    return sorted(
        n for n in names if n.partition("/")[2] in show and not n.startswith("judge/") and n not in show
    )


def draw(rows: list[dict], path: Path, show: Sequence[str], stages: Sequence[str] = ()) -> None:
    """Small panels of the shown metrics and the judge's scores: training a line, evaluation points.

    A metric that never changes has none. The steps of a pipeline are its stages.
    """
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {}
    judged = sorted({k[5:] for row in rows for k in row if k.startswith("eval/judge/")})
    sets = of_sets({k[5:] for row in rows for k in row if k.startswith("eval/")}, show)
    for name in dict.fromkeys((*show, "reward", *sets, *judged)):
        series = {
            kind: [(r["step"], r[f"{kind}/{name}"]) for r in rows if f"{kind}/{name}" in r]
            for kind, *_ in SERIES
        }
        if len({value for points in series.values() for _, value in points}) > 1:
            panels[name] = series
    if not panels:
        return
    rated = [name for name in panels if RATED.fullmatch(name)]
    scale = 4 if max((y for name in rated for _, y in panels[name]["eval"]), default=0) > 1 else 1
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(4 * columns, 2.6 * height), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for i, (axis, (name, series)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        for kind, style, colour in SERIES:
            if series[kind]:
                axis.plot(*zip(*series[kind], strict=True), style, color=colour, label=kind, markersize=4)
        low, high = axis.dataLim.intervaly if name in rated else axis.get_ylim()
        more = LEAST_SPAN * max(abs(low), abs(high)) - (high - low)
        if name in rated:
            axis.set_ylim(min(low, -0.02 * scale), max(high, 1.02 * scale))
        elif more > 0:
            below = more / 2 if low < 0 else min(more / 2, low)  # no further than to 0
            axis.set_ylim(low - below, high + more - below)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
        axis.locator_params("x", integer=True)
        if stages:
            axis.set_xticks(range(len(stages)), stages)
        elif i + columns >= len(panels):
            axis.set_xlabel("optimizer step", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def as_words(options: dict) -> list[str]:
    """Options as they stand on a command line."""
    words = []
    for name, x in options.items():
        words += [f"--{name}", *map(str, x)] if isinstance(x, list | tuple) else [f"--{name}={x}"]
    return words


def write_card(
    folder: Path, script: str, values: dict, lines: list[list[str]], changed: dict | None, at: str = ""
) -> None:
    """README.md of a model's folder: what it was trained from, on what, by what command, its table.

    Args:
        values: args.json of the run; those that are `changed` make the command.
        at: which step it is of, if that is not the last one.
    """
    from huggingface_hub import ModelCardData

    dataset = values.get("dataset", "")

    def on_hub(name: str) -> bool:
        is_path = Path(name).exists() or name.startswith(("toy", ".", "/", "~"))
        return name.count("/") == 1 and not is_path

    kinds = {"adapter_config.json": "peft", "model_index.json": "diffusers", "config.json": "transformers"}
    library = next((kind for name, kind in kinds.items() if (folder / name).exists()), "diffusers")
    sources = [part.partition("*")[0].partition(":")[0] for part in dataset.split(",")]
    about = ModelCardData(
        library_name=library,
        base_model=values["model"] if on_hub(values["model"]) else None,
        datasets=[name for name in sources if on_hub(name)] or None,
        tags=["cleanalign", Path(script).stem, *(["lora"] if library == "peft" else [])],
    )
    lines = [*lines[:1], *[["---", *["---:"] * (len(line) - 1)] for line in lines[:1]], *lines[1:]]
    marked = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    words = shlex.join(["python", script, *as_words(changed or {})])
    command = "." if changed is None else f":\n\n```bash\n{words}\n```"
    if accepted := "; ".join(values.get("accepted_changes", [])):
        marked += f"\n\nIt went on although this had changed on the way: {accepted}."
    card = f"""---
{about.to_yaml()}
---

# {folder.resolve().parent.name}

`{values["model"]}`, trained by `{script}` of CleanAlign on `{dataset}`{at}{command}

{marked}

All settings: `args.json` of the run; versions: {", ".join(f"{k} {v}" for k, v in files.versions().items())}.
"""
    files.write(folder / "README.md", card)
