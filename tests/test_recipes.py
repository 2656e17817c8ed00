"""recipes/: the shell scripts parse, and the verifiable rewards by hand."""

import json
import os
import signal
import subprocess
import time
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


SMOKED = [path for path in sorted((ROOT / "recipes").glob("*.sh")) if path.stem.startswith("steerlm")]


@pytest.mark.slow
@pytest.mark.parametrize("path", SMOKED, ids=lambda p: p.stem)
def test_smoke_forms_run_to_their_end(path: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "SMOKE": "1", "OUT": str(tmp_path)}
    done = subprocess.run(["bash", path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all((folder.parent / "model").is_dir() for folder in tmp_path.glob("*/args.json"))


@pytest.mark.parametrize(
    ("command", "told", "code", "queued"),
    [
        ("true", False, 0, False),
        ("exit 3", False, 3, False),  # a mistake would come again and again
        ('touch "$CLEANALIGN_STOPPED"', False, 0, True),  # its time was up
        (
            "touch ready; trap 'sleep 0.3; touch $CLEANALIGN_STOPPED; exit 1' TERM; sleep 60 & wait",
            True,
            0,
            True,
        ),
        ("touch ready; sleep 60; echo the next command", True, 0, True),  # nothing of ours ran
        ("trap '' TERM; touch ready; sleep 0.5", True, 0, False),  # it had almost finished
        ("starts slowly", True, 0, True),
    ],
)
def test_a_job_is_queued_again_if_it_was_stopped_and_not_if_it_failed(
    command: str, told: bool, code: int, queued: bool, tmp_path: Path
) -> None:
    """Slurm's part is played by a script that writes down how it was called."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/queued\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    if command == "starts slowly":  # has no group of its own yet
        (tmp_path / "bin" / "setsid").write_text("#!/bin/sh\ntouch ready\nsleep 60\n")
        (tmp_path / "bin" / "setsid").chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_SUBMIT_DIR": str(tmp_path)}
    job = subprocess.Popen(["bash", ROOT / "recipes/slurm.sh", "bash", "-c", command], env=environment)
    while told and not (tmp_path / "ready").exists():
        time.sleep(0.01)
    if told:
        job.send_signal(signal.SIGUSR1)
    assert job.wait() == code
    assert (tmp_path / "queued").exists() == queued
    assert not list(tmp_path.glob(".stopped*"))


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
