"""docs/hacking.md: each edit applies to its script, runs, does what the page says; README.md quotes truly."""

import importlib.util
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT, args_of, read_metrics

from common import data, models, packed
from common.args import System

PAGE = ROOT / "docs" / "hacking.md"
NO_SAMPLES = ["--max_steps=2", "--num_samples=0"]
DRAWN_FAST = ["--num_samples=1", "--images_per_prompt=2", "--num_inference_steps=4", "--batch_size=4"]


class Edit(NamedTuple):
    """A section of the page."""

    title: str
    copies: list[tuple[str, str]]  # (script, its copy)
    files: dict[str, str]  # modules that the section shows in full
    diffs: list[str]
    command: str


def read_edit(section: str) -> Edit:
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    shell = [line for kind, text in blocks if kind == "bash" for line in text.splitlines()]
    (command,) = (line for line in shell if line.startswith("python "))
    return Edit(
        section.partition("\n")[0],
        [tuple(line.split()[1:]) for line in shell if line.startswith("cp ")],
        {text.split()[1]: text for kind, text in blocks if kind == "python"},
        [text for kind, text in blocks if kind == "diff"],
        command,
    )


EDITS = {
    edit.title: edit for edit in map(read_edit, re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:])
}
HINGE, FULL_KL, RANKS, CALCULATOR, WARMTH = EDITS


def prepare(edit: Edit, folder: Path) -> None:
    """Make the copies and files of a section in a folder; a diff that does not fit is named."""
    for script, copy in edit.copies:
        shutil.copy(ROOT / script, folder / copy)
    for name, text in edit.files.items():
        (folder / name).write_text(text)
    # wherever the folder is, git is to take it as no part of a repository
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    for diff in edit.diffs:
        done = subprocess.run(
            ["git", "apply"], input=diff, cwd=folder, env=environment, capture_output=True, text=True
        )
        where = f'{PAGE.name}, "{edit.title}": the diff no longer applies'
        assert done.returncode == 0, f"{where}\n{done.stderr}"


def run(title: str, folder: Path, *flags: str) -> list[dict]:
    """The rows of metrics of an edit, run by the page's command and flags that make it short."""
    edit = EDITS[title]
    prepare(edit, folder)
    _, script, *options = shlex.split(edit.command)
    path = folder / script if (folder / script).exists() else ROOT / script
    done = subprocess.run(
        [sys.executable, str(path), *options, *flags],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{title}\n{done.stderr}"
    (run_folder,) = (folder / "runs").iterdir()
    rows = read_metrics(run_folder)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return rows


def load_copy(title: str, folder: Path) -> Any:
    """The edited script as a module."""
    prepare(EDITS[title], folder)
    ((_, copy),) = EDITS[title].copies
    spec = importlib.util.spec_from_file_location(copy.removesuffix(".py"), folder / copy)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look names up
    spec.loader.exec_module(module)
    return module


def test_a_new_loss_runs(few: Path, tmp_path: Path) -> None:
    rows = run(HINGE, tmp_path, *NO_SAMPLES, f"--dataset={few}/pairs", "--batch_size=8")
    # at step 0 policy and reference are one: every margin is 0 and lacks all of the 1 asked for
    assert rows[0]["eval/loss"] == rows[0]["eval/hinge/active"] == 1
    assert [row["train/hinge/active"] for row in rows[1:]] == [1, 1]
    margin = rows[2]["eval/rewards/margins"]
    assert margin > 0 and rows[2]["eval/loss"] == pytest.approx(1 - margin, rel=1e-5)


def test_the_new_loss_by_hand(tmp_path: Path) -> None:
    losses = load_copy(HINGE, tmp_path).hinge_loss(torch.tensor([1.0, 20.0, -5.0]), beta=0.1)
    torch.testing.assert_close(losses, torch.tensor([0.9, 0.0, 1.5]))


def test_a_full_kl_is_0_until_the_policy_moves(few: Path, tmp_path: Path) -> None:
    flags = [f"--dataset={few}/sft", "--batch_size=8", "--warmup_steps=0", "--micro_batch_tokens=300"]
    rows = run(FULL_KL, tmp_path, *NO_SAMPLES, *flags)
    assert abs(rows[0]["eval/ref_kl"]) < 1e-7 and abs(rows[1]["train/ref_kl"]) < 1e-7
    assert rows[2]["eval/ref_kl"] > 1e-3
    for row, split in zip(rows, ("eval", "train", "eval"), strict=True):
        parts = row[f"{split}/nll"] + 0.1 * row[f"{split}/ref_kl"]
        assert row[f"{split}/loss"] == pytest.approx(parts, rel=1e-5)


def test_a_new_advantage_runs(tmp_path: Path) -> None:
    rows = run(RANKS, tmp_path, *NO_SAMPLES, "--rollout_size=8", "--batch_size=16")
    for row in rows[1:]:
        assert 0 < row["train/advantages_mean_abs"] <= 1
    assert rows[-1]["train/episode"] == 32  # rloo's four responses to a prompt: the preset is still read


def test_the_new_advantage_by_hand(tmp_path: Path) -> None:
    group_advantages = load_copy(RANKS, tmp_path).group_advantages
    returns = torch.tensor([[3.0, -100.0, 2.0, 2.0], [9.0, 1.0, 7.0, 2.0]])
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    # the second prompt's first response does not count, so 7 beats both of the others, 2 one of them
    expected = [[1.0, -1.0, 0.0, 0.0], [0.0, -1.0, 1.0, 0.0]]
    torch.testing.assert_close(group_advantages(returns, valid, "ranks"), torch.tensor(expected))


def test_a_tool_in_the_rollout_runs(tmp_path: Path) -> None:
    rows = run(CALCULATOR, tmp_path, *NO_SAMPLES, "--rollout_size=64", "--batch_size=32")
    for row in rows[1:]:
        assert 0 < row["train/tool_calls"] < 1
        assert row["train/sampler_logp_gap_max"] < 1e-4  # each scored token is one that was sampled


def test_what_the_tool_says_carries_no_loss(tmp_path: Path, tokenizer: Any, device: torch.device) -> None:
    my_ppo = load_copy(CALCULATOR, tmp_path)
    args = args_of(my_ppo.Args, max_new_tokens=48)
    policy = models.load("toy", device, System(), trainable=False)
    prompts = data.load_prompts(tokenizer, "toy", "", args.max_prompt_length)[0][:64]
    heard = []

    def score(examples: list, texts: list[str]) -> list[float]:
        heard.extend(texts)
        return [0.0] * len(texts)

    examples, _, _ = my_ppo.sample_and_score(policy, tokenizer, prompts, score, 1, args)
    said = 0
    for i, (prompt, example, text) in enumerate(zip(prompts, examples, heard, strict=True)):
        ((tokens, mask),) = example.sequences
        start = len(prompt.sequences[0][0])
        assert not mask[:start].any() and mask.sum() == len(example.fields["sampler_logps"])
        unscored = start + (~mask[start:]).nonzero()[0]
        if len(unscored):  # a call, the calculator's answer, and a turn that goes on
            a, b = re.search(r"(\d+) \+ (\d+) makes$", tokenizer.decode(tokens[start : unscored[0]])).groups()
            total = str(int(a) + int(b))
            assert tokenizer.decode(tokens[unscored]).strip() == total
            assert f"{a} + {b} makes {total}" in text  # and the reward function reads all of it
            micro_batch = packed.make_micro_batch(examples, [i], device)
            assert not set(unscored) & set(micro_batch.targets.tolist())
            said += 1
    assert said >= 3


def test_a_new_image_reward_runs(tmp_path: Path) -> None:
    rows = run(WARMTH, tmp_path, "--max_steps=2", *DRAWN_FAST)
    assert all(abs(row["eval/reward"]) <= 1 for row in (rows[0], rows[2]))  # the toy's own is above 10
    assert rows[1]["train/grad_norm"] > 0
    assert rows[0]["eval/reward/gain"] == 0 != rows[2]["eval/reward/gain"]


def test_a_diff_that_no_longer_applies_is_named(tmp_path: Path) -> None:
    stale = EDITS[HINGE]._replace(copies=[("sft.py", "my_dpo.py")])
    with pytest.raises(AssertionError, match=f'hacking.md, "{HINGE}": the diff no longer applies'):
        prepare(stale, tmp_path)


def test_the_lines_that_the_readme_quotes_are_those_of_the_script() -> None:
    (quote,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    source = (ROOT / "dpo.py").read_text()
    parts = re.split(r"^ *\.\.\.\n", quote, flags=re.MULTILINE)
    assert len(parts) > 1 and all(f"\n{part.strip(chr(10))}\n" in source for part in parts)
