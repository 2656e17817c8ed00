"""docs/benchmarks.png from the newest lines in benchmarks/results/.

python benchmarks/plot.py
"""

import json
from typing import Any

import matplotlib
from harness import RESULTS, ROOT

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def newest(file: str) -> dict[str, Any]:
    """Task -> its last record in results/<file>.jsonl."""
    return {line["task"]: line for line in map(json.loads, (RESULTS / f"{file}.jsonl").open())}


def main() -> None:
    against, own = newest("vs_trl"), newest("cpu")
    figure, (bars, heads, lengths) = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")

    tasks = ("sft", "dpo", "reward")
    for i, (key, label) in enumerate(
        (("tokens_per_cpu_second", "tokens per CPU second"), ("peak_rss_mib", "peak memory"))
    ):
        at = [k + 0.4 * i for k in range(len(tasks))]
        drawn = bars.bar(at, [against[task]["ratios"][key] for task in tasks], 0.4, label=label)
        bars.bar_label(drawn, fmt="%.2f", fontsize=8)
    bars.axhline(1, color="black", linewidth=0.8)
    bars.set_xticks([k + 0.2 for k in range(len(tasks))], tasks)
    bars.set(title="ours / TRL 1.16", ylabel="ratio")
    bars.legend(fontsize=8)
    bars.margins(y=0.6)  # room for the legend

    figures = own["head"]["figures"]
    for kind in ("chunked", "dense"):
        shown = [f for f in figures if f["num_tokens"] == 2048 and kind in f]
        sizes = [f["vocab_size"] / 1000 for f in shown]
        heads.plot(sizes, [f[kind]["added_mib"] for f in shown], "o-", label=kind)
    heads.set(title="memory of the head, 2048 tokens", xlabel="vocabulary, thousands", ylabel="MiB", ylim=0)
    heads.legend(fontsize=8)

    found = own["length"]
    cost = [1e6 * s / found["tokens"] for s in found["seconds"]]
    line = [f / found["flops"][0] * cost[0] for f in found["flops"]]
    lengths.plot(found["lengths"], cost, "o-", label="measured")
    lengths.plot(found["lengths"], line, "--", label="FLOPs, from the first point")
    lengths.set(title="cost of a token", xlabel="tokens of a document", ylabel="CPU us", ylim=0)
    lengths.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "benchmarks.png", dpi=80)


if __name__ == "__main__":
    main()
