"""recipes/: the shell scripts parse, and the verifiable rewards by hand."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from recipes import rewards


@pytest.mark.parametrize(
    ("response", "reward"),
    [("So 48 + 24 = 72.", 1), ("72 clips", 1), ("1,072", 0), ("72.0", 1), ("-72", 0), ("none", 0), ("", 0)],
)
def test_the_last_number_counts(response: str, reward: float) -> None:
    assert rewards.final_number(["?"], [response], [{"answer": "<<48/2=24>> ...\n#### 72"}]) == [reward]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.sh")), ids=lambda p: p.stem)
def test_shell_scripts_parse(path) -> None:
    assert subprocess.run(["bash", "-n", path]).returncode == 0


SMOKED = [path for path in sorted((ROOT / "recipes").glob("*.sh")) if "SMOKE" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("path", SMOKED, ids=lambda p: p.stem)
def test_smoke_forms_run_to_their_end(path: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "SMOKE": "1", "RUNS": str(tmp_path)}
    done = subprocess.run(["bash", path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all((folder.parent / "model").is_dir() for folder in tmp_path.glob("*/args.json"))
