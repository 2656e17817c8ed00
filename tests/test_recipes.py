"""recipes/: the shell scripts parse, and the verifiable rewards by hand."""

import os
import subprocess

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


@pytest.mark.parametrize(
    "kind",
    [pytest.param("sd35", marks=pytest.mark.slow)]
    + [pytest.param(kind, marks=pytest.mark.release) for kind in ("sd15", "sdxl", "flux")],
)
def test_the_image_recipe_runs_on_a_tiny_model(kind: str) -> None:
    script = ROOT / "recipes" / "draftp_8gpu.sh"
    done = subprocess.run(
        ["bash", script, kind], env={**os.environ, "SMOKE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "finished" in done.stdout or "model, metrics" in done.stdout, done.stdout[-2000:]
