"""The oldest and the newest torch and transformers that work: the core tests in an environment of each pair.

    python -m pytest -m release tests/test_versions.py

An environment takes 6 GB of disk, for these torch come with CUDA; pip or uv must reach a package index.
"""

import os
import re
import subprocess
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PAIRS = {"oldest": ("2.11.0", "5.17.0"), "newest": ("2.15.0", "5.24.0")}
CORE = [
    f"tests/test_{name}.py" for name in ("equivalence", "generate", "models", "data", "packed", "checkpoint")
]
CORE += [  # sft, dpo, reward_model, ppo and spin are in test_equivalence.py
    "tests/test_steerlm2.py::test_two_ranks_sample_score_and_train_alike",
    "tests/test_steerlm.py::test_a_run_leaves_its_stages_a_table_and_a_model",
    "tests/test_cai.py::test_a_run_leaves_the_artefacts_of_every_stage",
    "tests/test_draftp.py::test_cuts_into_micro_batches_and_ranks_do_not_show",
    "tests/test_reward_model.py::test_a_model_of_trl_is_read_where_it_was_trained",
]


def install(folder: Path, torch_version: str, transformers_version: str) -> Path:
    """An environment with the requirements, but these two versions. -> its python"""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    text = (ROOT / "requirements.txt").read_text()
    for name, version in (("torch", torch_version), ("transformers", transformers_version)):
        text, count = re.subn(rf"^{name}==\S+", f"{name}=={version}", text, flags=re.M)
        assert count == 1
    wanted = folder / "requirements.txt"
    wanted.write_text(text)
    subprocess.run([python, "-m", "pip", "install", "-q", "uv"], check=True)
    uv = [
        folder / "bin" / "uv",
        "pip",
        "install",
        "-q",
        "--compile-bytecode",
        "--python",
        python,
        "-r",
        wanted,
    ]
    subprocess.run(uv, check=True, env={**os.environ, "UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "")})
    return python


@pytest.fixture
def folder() -> Iterator[Path]:
    """For an environment, which is not left behind."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.release
@pytest.mark.parametrize("pair", PAIRS)
def test_the_core_tests_pass_with(pair: str, folder: Path) -> None:
    python = install(folder, *PAIRS[pair])
    found = "import torch, transformers; print(torch.__version__.split('+')[0], transformers.__version__)"
    versions = subprocess.run([python, "-c", found], capture_output=True, text=True, check=True).stdout
    assert tuple(versions.split()) == PAIRS[pair]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CORE]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path})
    assert done.returncode == 0
