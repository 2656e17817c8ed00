"""How a run is cut into processes and micro-batches, stopped or recomputed must not show in its numbers."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from conftest import args_of, read_metrics

from common.args import flat

STEPS = 6
BASE = {
    "sft": {"max_grad_norm": 0.5},
    "dpo": {"max_grad_norm": 0.5, "beta": 0.5, "sft_coef": 0.1},
    "reward_model": {"max_grad_norm": 0.5, "center_coef": 0.1},
    "ppo": {
        "max_grad_norm": 0.5,
        "reward": "test_equivalence:brevity",
        "missing_eos": "keep",
        "rollout_size": 16,
        "max_new_tokens": 24,
        "value_learning_rate": 5e-3,
        "kl_coef": 0.1,
    },
    "spin": {  # iterations of 2 and 4 steps
        "max_grad_norm": 0.5,
        "beta": 0.5,
        "num_iterations": 2,
        "num_epochs": 1,
        "num_prompts": 16,
        "max_new_tokens": 12,
    },
}
COMMON = {
    "max_steps": STEPS,
    "batch_size": 8,
    "learning_rate": 5e-3,
    "lr_schedule": "constant",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "eval_every": 3,
    "num_samples": 0,
    "micro_batch_tokens": 100_000,
}


COMPARED = [
    "train/loss",
    "train/grad_norm",
    "eval/loss",
    "train/objective/kl",
    "train/objective/scores",
    "train/loss/value_avg",
    "train/value_grad_norm",
    "train/num_tokens",
]


def brevity(prompts: list, responses: list[str], examples: list) -> list[float]:
    """A reward that differs from response to response."""
    return [-len(set(response)) / 10 for response in responses]


def run(script: str, folder: str, **settings: Any) -> list[dict[str, float]]:
    """What is compared after each step of a run; called here and on the two ranks."""
    module = importlib.import_module(script)
    common = {name: value for name, value in COMMON.items() if name in flat(module.Args())}
    module.main(args_of(module.Args, **{**common, **BASE[script], **settings}, output_dir=folder))
    rows = [row for row in read_metrics(folder) if row["step"] > 0]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [{name: row[name] for name in COMPARED if name in row} for row in rows]


def assert_same(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs) == STEPS
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert abs(a[name] - b[name]) <= 1e-5 * max(1.0, abs(b[name])), f"{name}\n{ours}\n{theirs}"


@pytest.fixture(scope="module", params=list(BASE))
def script(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(script: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the canonical run."""
    return str(tmp_path_factory.mktemp(script) / "run")


@pytest.fixture(scope="module")
def canonical(script: str, folder: str, tiny_model: str) -> list:
    """One process, one micro-batch a step."""
    return run(script, folder, model=tiny_model)


def test_the_run_moves_the_weights(script: str, canonical: list) -> None:
    measure = "train/objective/kl" if script == "ppo" else "eval/loss"
    assert abs(canonical[-1][measure] - canonical[2][measure]) > 0.01  # after steps 6 and 3


def test_a_gradient_twice_too_big_would_be_noticed(
    script: str, canonical: list, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common import models

    honest = models.clip_grad_norm

    def doubled(model: Any, max_norm: float) -> Any:
        for parameter in model.parameters():
            parameter.grad *= 2
        return honest(model, max_norm)

    monkeypatch.setattr(models, "clip_grad_norm", doubled)
    with pytest.raises(AssertionError):
        assert_same(run(script, str(tmp_path / "run"), model=tiny_model), canonical)


def test_many_micro_batches(script: str, canonical: list, tiny_model: str, tmp_path: Path) -> None:
    assert_same(run(script, str(tmp_path / "run"), model=tiny_model, micro_batch_tokens=100), canonical)


def test_activation_checkpointing(script: str, canonical: list, tiny_model: str, tmp_path: Path) -> None:
    ours = run(script, str(tmp_path / "run"), model=tiny_model, activation_checkpointing="on")
    assert_same(ours, canonical)


@pytest.mark.parametrize("settings", [{}, {"micro_batch_tokens": 100}, {"sharding": "none"}], ids=str)
def test_two_ranks(
    script: str, canonical: list, tiny_model: str, tmp_path: Path, two_ranks: Any, settings: dict
) -> None:
    folder = str(tmp_path / "run")
    ours, also = two_ranks("test_equivalence:run", script=script, folder=folder, model=tiny_model, **settings)
    assert ours == also
    assert_same(ours, canonical)


def test_a_rank_with_dummy_rows_only(script: str, tiny_model: str, tmp_path: Path, two_ranks: Any) -> None:
    settings = {"script": script, "model": tiny_model, "batch_size": 1}
    settings |= {"rollout_size": 2} if script == "ppo" else {}
    alone = run(folder=str(tmp_path / "one"), **settings)
    ours, _ = two_ranks("test_equivalence:run", folder=str(tmp_path / "two"), **settings)
    assert_same(ours, alone)


def test_stop_and_resume_on_another_number_of_ranks(
    script: str, canonical: list, tiny_model: str, tmp_path: Path, two_ranks: Any
) -> None:
    folder = str(tmp_path / "up")
    run(script, folder, model=tiny_model, max_steps=3)
    ours, _ = two_ranks("test_equivalence:run", script=script, folder=folder, model=tiny_model)
    assert_same(ours, canonical)
    folder = str(tmp_path / "down")
    two_ranks("test_equivalence:run", script=script, folder=folder, model=tiny_model, max_steps=3)
    ours = run(script, folder, model=tiny_model)
    assert_same(ours, canonical)


def assert_saving_changes_nothing(script: str, plain: list, seldom: str, often: str, **settings: Any) -> None:
    """To the last bit, numbers and weights, against a run that has saved once."""
    often_saved = {"save_every": 1, "keep_checkpoints": STEPS}
    assert run(script, often, **settings, **often_saved) == plain
    found = [sorted(Path(x, "model").glob("*.safetensors")) for x in (seldom, often)]
    assert found[0] and [x.read_bytes() for x in found[0]] == [x.read_bytes() for x in found[1]]
    saved = [len([*Path(x, "checkpoints").glob("step_*")]) for x in (seldom, often)]
    assert saved[0] < saved[1]


def test_saving_at_each_step(
    script: str, canonical: list, folder: str, tiny_model: str, tmp_path: Path
) -> None:
    assert_saving_changes_nothing(script, canonical, folder, str(tmp_path / "run"), model=tiny_model)


@pytest.mark.parametrize("script", ["ppo"], scope="module")
def test_saving_while_the_policy_waits_for_its_critic(script: str, tiny_model: str, tmp_path: Path) -> None:
    """With adapters too: its optimizer has no state yet, and must not be given one."""
    settings = {"model": tiny_model, "value_warmup_steps": 3, "lora_rank": 4, "lora_alpha": 8.0}
    plain = run(script, str(tmp_path / "one"), **settings)
    assert_saving_changes_nothing(script, plain, str(tmp_path / "one"), str(tmp_path / "other"), **settings)


@pytest.mark.parametrize("script", ["dpo"], scope="module")
def test_the_reference_by_copy_or_computed_before(
    script: str, canonical: list, tiny_model: str, tmp_path: Path
) -> None:
    assert_same(run(script, str(tmp_path / "run"), model=tiny_model, precompute_ref=True), canonical)
    again = run(script, str(tmp_path / "again"), model=tiny_model, precompute_ref=True)  # from the cache
    assert_same(again, canonical)


def test_lora_on_two_ranks_and_saved_at_each_step(
    script: str, tiny_model: str, tmp_path: Path, two_ranks: Any
) -> None:
    settings = {"script": script, "model": tiny_model, "lora_rank": 4, "lora_alpha": 8.0}
    alone = run(folder=str(tmp_path / "one"), **settings)
    ours, _ = two_ranks("test_equivalence:run", folder=str(tmp_path / "two"), **settings)
    assert_same(ours, alone)
    assert_saving_changes_nothing(
        plain=alone, seldom=str(tmp_path / "one"), often=str(tmp_path / "saved"), **settings
    )
