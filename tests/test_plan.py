"""The memory estimate: by hand, and against what was measured."""

import json
from types import SimpleNamespace

import pytest
from conftest import ROOT

from common.plan import training_memory

SMALL = SimpleNamespace(hidden_size=10, num_hidden_layers=3, intermediate_size=20, vocab_size=100)


def test_the_estimate_by_hand() -> None:
    """5,000 parameters of which two tables are 2 x 1,000, in bfloat16, on one rank."""
    found = training_memory(SMALL, 5000, 0, num_tokens=7, num_shards=1, itemsize=2, recompute=False)
    assert found.weights == found.gradients == 20_000 and found.optimizer == 40_000
    assert found.gathered == 2 * 2 * (3000 / 3 + 1000)  # two of a block and of a table
    assert found.activations == 7 * 3 * 2 * (7 * 10 + 4 * 20)
    assert found.head == 4 * 1000 + 2 * 4 * 7 * 100
    assert found.total == sum(found)


def test_what_changes_the_estimate() -> None:
    def need(trained: int = 5000, frozen: int = 0, **changes: int):
        usual = {"num_tokens": 7, "num_shards": 1, "itemsize": 2, "recompute": False}
        return training_memory(SMALL, trained, frozen, **usual | changes)

    assert need(recompute=True).activations == 7 * (2 * 10 * 3 + 2 * (7 * 10 + 4 * 20))
    assert need(num_shards=4).optimizer == need().optimizer / 4
    assert need(100, 4900).weights == 4 * 100 + 2 * 4900  # LoRA: the frozen base in the compute dtype
    assert need(itemsize=4).gathered == 0  # one process in float32 computes with the masters themselves


@pytest.mark.parametrize(("task", "cell"), [("sft", 0), ("sft_8b", 0)])
def test_the_estimate_is_near_what_was_measured(task: str, cell: int) -> None:
    """Peaks of benchmarks/gpu.py on one GPU, within a tenth, and above: what is estimated to fit does."""
    import sys

    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu
    import harness

    settings = gpu.CELLS[task][1][cell]
    lines = [json.loads(line) for line in (ROOT / "benchmarks/results/gpu.jsonl").read_text().splitlines()]
    measured = [x for x in lines if x["task"] == task and x["cell"] == settings and "peak_mib" in x]
    assert measured
    for line in measured:
        need = training_memory(
            harness.llama(**gpu.SHAPES[settings["shape"]]),
            line["parameters"],
            0,
            num_tokens=line["row_tokens"],
            num_shards=1,
            itemsize=2,
            recompute=settings.get("checkpointing") == "on",
        )
        assert 0.97 < need.total / 2**20 / line["peak_mib"] < 1.1
