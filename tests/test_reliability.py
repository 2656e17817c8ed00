"""Kills and damaged files, a few of each by fixed seeds; docs/reliability.md has the long runs."""

import json
import subprocess
import sys
from pathlib import Path

import fuzz
import kills
import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    ("files", "seed"),
    [
        pytest.param(300, 1, marks=pytest.mark.slow),
        pytest.param(10_000, 2, marks=pytest.mark.release),
    ],
)
def test_a_damaged_file_gives_good_data_or_one_line(files: int, seed: int, tmp_path: Path) -> None:
    said: list[str] = []
    figures = fuzz.fuzz(files, seed, tmp_path, tell=said.append)
    assert not figures["not_held"], "\n".join([*said, json.dumps(figures)])


FEW = "--max_steps 4 --batch_size 8 --num_samples 2 --max_new_tokens 8 --eval_every 2 --save_every 2"
LONG = [(script, number, ranks) for script in kills.OPTIONS for number, ranks in ((6, 1), (3, 2))]


@pytest.mark.parametrize(
    ("script", "number", "ranks", "options"),
    [
        pytest.param("dpo.py", 2, 1, FEW, marks=pytest.mark.slow),
        *[pytest.param(*case, "", marks=pytest.mark.release) for case in LONG],
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(
    script: str, number: int, ranks: int, options: str, tmp_path: Path
) -> None:
    command = [sys.executable, ROOT / "tests" / "kills.py", script, str(number), "1", f"--ranks={ranks}"]
    done = subprocess.run(
        [*command, f"--out={tmp_path}", f"--options={options}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
