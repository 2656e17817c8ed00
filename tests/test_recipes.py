"""recipes/: the shell scripts parse, and the verifiable rewards by hand."""

import json
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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "last"), [("cai", ""), ("hh_ppo", "ppo")])
def test_the_small_form_of_a_recipe_runs_to_its_end(name: str, last: str, tmp_path: Path) -> None:
    """The commands are those of the full size, with fewer steps on the toy; HH's data in their own shape."""
    texts = [f"\n\nHuman: What is {i} + 1?\n\nAssistant: " for i in range(40)]
    pairs = [
        {"chosen": f"{x}It is {i + 1}.", "rejected": f"{x}No idea, you fool."} for i, x in enumerate(texts)
    ]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    more = {"SMOKE": "1", "OUT": str(tmp_path / "out"), "SMOKE_DATA": str(tmp_path / "hh.jsonl")}
    done = subprocess.run(
        ["bash", f"recipes/{name}.sh"], cwd=ROOT, env=os.environ | more, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "out" / last / "model" / "model.safetensors").exists()
