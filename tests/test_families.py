"""Families of decoders, tiny and random: which are right, and what is said of those that are refused.

A family is right when its log-probs and gradients in packed rows are those of plain transformers for one
sequence alone, greedy replies are those of `generate`, one step of each script runs, exports reload as what
was trained, and adapters on all its linear layers and experts give one function in training, in the sampler,
in peft and merged. docs/models.md holds the table that `python tests/test_families.py` prints.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, args_of, read_metrics
from test_models import move_adapters
from torch import nn

import dpo
import ppo
import reward_model
import sft
from common import chat, checkpoint, data, dist, generate, loading, lora, models, packed
from common.args import Run, System, flat


class Family(NamedTuple):
    """A transformers model type: settings beside SIZES, and what today's answer to it is."""

    settings: dict[str, Any] = {}
    refused: str = ""  # said on loading
    wrong: str = ""  # known to be wrong today
    no_adapters: str = ""  # said of lora_target all-linear
    known_as: str = ""


V = 701  # odd, and more than the tokenizer knows
SIZES: dict[str, Any] = dict(vocab_size=V, hidden_size=64, intermediate_size=96, moe_intermediate_size=32)
SIZES |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
SIZES |= dict(max_position_embeddings=512, initializer_range=0.1, sliding_window=16, attention_dropout=0.0)
SIZES |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
SIZES |= dict(num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4)
SIZES |= dict(num_experts_per_tok=2, moe_k=2, n_group=2, topk_group=1, n_shared_experts=1)
SIZES |= dict(first_k_dense_replace=1, decoder_sparse_step=1, mlp_only_layers=[], num_nextn_predict_layers=0)
SIZES |= dict(shared_expert_intermediate_size=32, kv_lora_rank=16, q_lora_rank=32, qk_rope_head_dim=8)
SIZES |= dict(qk_nope_head_dim=16, v_head_dim=16)
LATENT = {"num_key_value_heads": 4, "head_dim": 8}  # attention through a latent: all heads have keys
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
TOWERS = {"vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}}
TOWERS["vision_config"] |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TOWERS["text_config"] = {x: y for x, y in SIZES.items() if "expert" not in x and "lora" not in x}
TOWERS |= {"mm_tokens_per_image": 4}

FAMILIES = {
    "llama": Family(known_as="Llama 2, 3, 3.1, 3.2; SmolLM2; Yi"),
    "qwen2": Family(known_as="Qwen2, Qwen2.5"),
    "qwen2_moe": Family(),
    "qwen3": Family(known_as="Qwen3"),
    "qwen3_moe": Family(known_as="Qwen3-30B-A3B, 235B-A22B"),
    "mistral": Family(known_as="Mistral 7B, Nemo, Small 3"),
    "ministral": Family(),
    "ministral3": Family(),
    "mixtral": Family(known_as="Mixtral 8x7B, 8x22B"),
    "gemma": Family(known_as="Gemma"),
    "gemma2": Family(CAPS, known_as="Gemma 2"),
    "gemma3_text": Family(
        {"layer_types": ["sliding_attention", "full_attention"]}, known_as="Gemma 3 270M, 1B"
    ),
    "phi": Family(known_as="Phi-1, 1.5, 2"),
    "phi3": Family(known_as="Phi-3, 3.5, 4"),
    "phimoe": Family({"sliding_window": 512}, known_as="Phi-3.5-MoE"),
    "gpt2": Family(known_as="GPT-2"),
    "gpt_neox": Family(known_as="Pythia"),
    "gpt_bigcode": Family(known_as="StarCoder"),
    "starcoder2": Family(known_as="StarCoder2"),
    "olmo": Family(known_as="OLMo"),
    "olmo2": Family(known_as="OLMo 2"),
    "olmo3": Family(known_as="OLMo 3"),
    "olmoe": Family(known_as="OLMoE"),
    "flex_olmo": Family(),
    "smollm3": Family(known_as="SmolLM3"),
    "glm": Family(known_as="GLM-4 9B"),
    "glm4": Family(known_as="GLM-4-0414"),
    "glm4_moe": Family(known_as="GLM-4.5, 4.6"),
    "glm4_moe_lite": Family(LATENT, known_as="GLM-4.7-Flash"),
    "exaone4": Family(known_as="EXAONE 4"),
    "exaone_moe": Family(),
    "seed_oss": Family(known_as="Seed-OSS"),
    "arcee": Family(known_as="AFM-4.5B"),
    "afmoe": Family(known_as="Trinity"),
    "minicpm3": Family({"num_key_value_heads": 4, "head_dim": 24}, known_as="MiniCPM3"),
    "minimax_m2": Family(known_as="MiniMax-M2"),
    "hunyuan_v1_dense": Family(known_as="Hunyuan dense"),
    "hunyuan_v1_moe": Family(known_as="Hunyuan-A13B"),
    "persimmon": Family(),
    "helium": Family(known_as="Helium"),
    "axk1": Family(LATENT),
    "jetmoe": Family(),
    "diffllama": Family(),
    "deepseek_v2": Family(LATENT, known_as="DeepSeek-V2"),
    "deepseek_v3": Family(LATENT, known_as="DeepSeek-V3, R1, Kimi K2"),
    "dots1": Family(known_as="dots.llm1"),
    "ernie4_5": Family(known_as="ERNIE 4.5 0.3B"),
    "ernie4_5_moe": Family(known_as="ERNIE 4.5"),
    "mellum": Family(),
    "solar_open": Family(known_as="Solar Open"),
    "granite": Family(known_as="Granite 3"),
    "granitemoe": Family(known_as="Granite 3 MoE"),
    "granitemoeshared": Family(),
    "granitemoehybrid": Family({"layer_types": ["attention"] * 2}),
    "cohere": Family(known_as="Command R, Aya"),
    "cohere2": Family(known_as="Command R7B"),
    "cohere2_moe": Family(),
    "apertus": Family(known_as="Apertus"),
    "hy_v3": Family(),
    "laguna": Family(no_adapters="peft does not read back the adapters"),
    "opt": Family({"ffn_dim": 96, "word_embed_proj_dim": 64}, known_as="OPT"),
    "hyperclovax": Family({"logits_scaling": 0.5}),
    "nanochat": Family({"final_logit_softcapping": 15.0}, known_as="nanochat"),
    "gpt_oss": Family(known_as="gpt-oss"),
    "mamba": Family(refused="has layers of type linear_attention", known_as="Mamba"),
    "bloom": Family(refused="has attention code of its own", known_as="BLOOM"),
    "falcon": Family(refused="has attention code of its own", known_as="Falcon"),
    "qwen3_next": Family(refused="has layers of type linear_attention", known_as="Qwen3-Next"),
    "llama4_text": Family(refused="has layers of type chunked_attention", known_as="Llama 4"),
    "gemma3": Family(TOWERS, known_as="Gemma 3 4B, 12B, 27B"),
}
QUICK = ["gemma3_text", "mixtral"]
SAMPLE = ["llama", "gpt2", "phi3", "olmo2", "deepseek_v3", "granite"]


def has_score(kind: str) -> bool:
    """Whether transformers has a sequence classifier of the family, which a reward model is."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def table() -> str:
    """The rows of docs/models.md."""
    lines = ["| type in config.json | known as | answer |", "|---|---|---|"]
    for kind, family in sorted(FAMILIES.items()):
        said = [f'refused: "{family.refused}"' if family.refused else family.wrong or "right"]
        said += [] if family.refused or has_score(kind) else ["no reward model"]
        said += ["LoRA: name layers in `--lora_target`"] if family.no_adapters else []
        lines.append(f"| `{kind}` | {family.known_as} | {'; '.join(said)} |")
    return "\n".join(lines) + "\n"


def save(kind: str, folder: Path, tokenizer: Any) -> nn.Module:
    """A random model of the family, its biases and norms moved so that they matter, read by transformers."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    known = CONFIG_MAPPING[kind]()
    fixed = {name for name, value in vars(type(known)).items() if isinstance(value, property)}
    sizes = {name: value for name, value in SIZES.items() if hasattr(known, name) and name not in fixed}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**sizes, **FAMILIES[kind].settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


EXAMPLES = [
    packed.Example(
        [packed.Tokens(np.random.default_rng(n).integers(4, V, n).astype(np.int32), np.arange(n) > 0)], ""
    )
    for n in (9, 33, 14)
]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [40, 41]]


def alone(model: nn.Module) -> torch.Tensor:
    """Log-probs of the examples' tokens, one sequence at a time, by transformers."""
    found = []
    for example in EXAMPLES:
        tokens = torch.from_numpy(example.sequences[0][0]).long()[None]
        logps = model(tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        found.append(logps.gather(1, tokens[0, 1:, None])[:, 0])
    return torch.cat(found)


def close(ours: torch.Tensor, theirs: torch.Tensor, limit: float = 1e-4) -> None:
    assert (ours - theirs).abs().max() < limit * max(1.0, theirs.abs().max().item())


def load(folder: Path, device: torch.device, **options: Any) -> models.Policy:
    return models.load(
        str(folder), device, System(dtype="float32", activation_checkpointing="off", **options)
    )


def check_function(folder: Path, plain: nn.Module, device: torch.device) -> None:
    """Log-probs, gradients and greedy replies are those of plain transformers."""
    tokenizer, policy = data.load_tokenizer(str(folder)), load(folder, device)
    ours = models.token_logps(policy, packed.make_micro_batch(EXAMPLES, [0, 1, 2], device))
    theirs = alone(plain)
    close(ours, theirs)
    (-ours.sum()).backward()
    (-theirs.sum()).backward()
    grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    expected = {name.replace(".language_model.", "."): grad for name, grad in grads.items()}
    for name, parameter in policy.model.named_parameters():
        assert (parameter.grad is None) == (name not in expected), name
        if name in expected:
            close(parameter.grad, expected[name])
    replies = generate.generate(policy, tokenizer, PROMPTS, max_new_tokens=16, temperature=0.0)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        tokens = torch.tensor([prompt])
        how = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
        written = plain.generate(tokens, attention_mask=torch.ones_like(tokens), **how)
        assert reply.tokens == written[0, len(prompt) :].tolist()[: len(reply.tokens)]
        assert len(reply.tokens) == 16 or reply.tokens[-1] in (2, data.end_token(tokenizer))
    rng, asked = np.random.default_rng(0), []
    beginning = rng.integers(4, V, chat.LEAST_SHARED)
    for n in (5, 9, 4):  # questions that begin alike are read together
        ids = np.append(beginning, rng.integers(4, V, n)).astype(np.int32)
        tokens = packed.Tokens(ids, np.arange(len(ids)) == len(ids) - 1)
        asked.append(packed.Example([tokens], "", {"letters": np.array([5.0, 6.0], np.float32)}))
    assert len(chat.beginning_alike(asked)) == 1
    each = [chat.letter_probs(policy, [question], 0, device, 2)[0] for question in asked]
    close(torch.tensor(chat.letter_probs(policy, asked, 0, device, 2)), torch.tensor(each))


def check_scripts(kind: str, folder: Path, few: Path, device: torch.device) -> None:
    """One step of each script, and its export in plain transformers."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    def run(module: Any, name: str, source: str, **options: Any) -> dict[str, float]:
        assert options.keys() <= flat(module.Args()).keys()
        options |= {"model": str(folder), "dataset": f"{few}/{source}", "output_dir": str(folder / name)}
        options |= {"eval_dataset": f"{few}/one_{source}", "num_samples": 0, "max_new_tokens": 8}
        options |= {"batch_size": 4, "max_steps": 1, "learning_rate": 1e-3, "warmup_steps": 0}
        known = flat(module.Args())
        module.main(args_of(module.Args, **{x: value for x, value in options.items() if x in known}))
        rows = read_metrics(folder / name)
        assert rows[-1]["step"] == 1 and np.isfinite(rows[-1]["train/grad_norm"])
        return rows[0]

    row = packed.make_micro_batch(EXAMPLES, [0, 1, 2], device)
    run(sft, "sft", "sft")
    assert abs(run(dpo, "dpo", "pairs")["eval/loss"] - np.log(2)) < 1e-5
    policy = load(folder, device)
    optimizer = torch.optim.AdamW(models.parameter_groups(policy, 0.0))
    checkpoint.resume(str(folder / "sft"), {"policy": (policy, optimizer)})
    trained = models.token_logps(policy, row).detach()
    exported = AutoModelForCausalLM.from_pretrained(folder / "sft" / "model", dtype=torch.float32)
    with torch.no_grad():
        close(alone(exported), trained)
    small = {"reward": "test_families:length", "rollout_size": 4}
    run(ppo, "rloo", "sft", **small | {"rollout_size": 2, "samples_per_prompt": 2, "advantage": "rloo"})
    run(ppo, "ppo", "sft", **small)
    if not has_score(kind):
        with pytest.raises(dist.RunError, match="with a score head"):
            run(reward_model, "reward_model", "pairs")
        return
    run(reward_model, "reward_model", "pairs")
    scorer = models.load_scorer(
        str(folder / "reward_model"), device, System(dtype="float32", activation_checkpointing="off")
    )
    found = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model" / "model")
    with torch.no_grad():
        scores = [found(torch.from_numpy(e.sequences[0][0]).long()[None]).logits for e in EXAMPLES]
        close(models.rewards(scorer, row), torch.cat(scores).float())


def length(prompts: list, responses: list[str], examples: list) -> list[float]:
    return [float(len(response)) for response in responses]


def check_adapters(folder: Path, device: torch.device) -> None:
    """One function in training, in the sampler, in peft and merged, and the base with adapters off."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    tokenizer, policy = data.load_tokenizer(str(folder)), load(folder, device, lora_rank=4)
    row = packed.make_micro_batch(EXAMPLES, [0, 1, 2], device)
    wrapped = {name.replace(".base_layer", "") for name, _ in lora.layers(policy.model)}
    plain = models.read_pretrained(str(folder))
    linear = {name for name, module in plain.named_modules() if type(module) is nn.Linear}
    experts = {name.rpartition(".")[0] for name, p in plain.named_parameters() if p.ndim == 3}
    assert linear | experts <= wrapped | {"lm_head", "embed_out"}
    with torch.no_grad():
        base = models.token_logps(policy, row)
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        ours = models.token_logps(policy, row)
        with lora.adapters_off(policy):
            assert torch.equal(models.token_logps(policy, row), base)
    assert (ours - base).abs().max() > 0.05
    models.token_logps(policy, row).sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)
    replies = generate.generate(policy, tokenizer, PROMPTS, max_new_tokens=8, seed=3)
    again = packed.make_micro_batch([generate.to_example(x) for x in replies], [0, 1, 2], device)
    close(models.token_logps(policy, again).detach(), generate.sampled_logps(replies, again))
    is_whole = loading.is_whole(str(folder), None)  # of a part there is no folder for adapters: it is merged
    for name, merge, loader in (
        ("peft", False, AutoPeftModelForCausalLM if is_whole else AutoModelForCausalLM),
        ("merged", True, AutoModelForCausalLM),
    ):
        run = Run(output_dir=str(folder / name), merge_lora=merge, merge_dtype="float32")
        checkpoint.export(run, policy, tokenizer, str(folder))
        with torch.no_grad():
            close(alone(loader.from_pretrained(folder / name / "model", dtype=torch.float32)), ours)
            close(alone(models.read_pretrained(str(folder / name / "model"))), ours)


def check(kind: str, folder: Path, few: Path, tokenizer: Any, device: torch.device) -> None:
    family = FAMILIES[kind]
    plain = save(kind, folder, tokenizer)
    if family.refused:
        with pytest.raises(dist.RunError, match=family.refused):
            load(folder, device)
        return
    check_function(folder, plain, device)
    if family.no_adapters:
        with pytest.raises(dist.RunError, match=family.no_adapters):
            load(folder, device, lora_rank=4)
    else:
        check_adapters(folder, device)


@pytest.fixture(scope="module")
def little(few: Path) -> Path:
    """few, with evaluation sets of two lines."""
    for kind in ("sft", "pairs"):
        lines = (few / kind / "test.jsonl").read_text().splitlines(keepends=True)[:2]
        (few / f"one_{kind}").mkdir(exist_ok=True)
        (few / f"one_{kind}" / "test.jsonl").write_text("".join(lines))
    return few


@pytest.mark.parametrize("kind", QUICK)
def test_families(kind: str, tmp_path: Path, little: Path, tokenizer: Any, device: torch.device) -> None:
    check(kind, tmp_path, little, tokenizer, device)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLE)
def test_a_sample_of_families(
    kind: str, tmp_path: Path, little: Path, tokenizer: Any, device: torch.device
) -> None:
    check(kind, tmp_path, little, tokenizer, device)
    check_scripts(kind, tmp_path, little, device)


def adapted(folder: str, out: str, dtype: str) -> dict[str, list]:
    """Run on each rank: what a policy whose experts have adapters says and samples."""
    device = dist.init(1)
    system = System(dtype=dtype, activation_checkpointing="on", lora_rank=4)
    policy, tokenizer = models.load(folder, device, system), data.load_tokenizer(folder)
    move_adapters(policy)
    replies = generate.generate(policy, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0)
    logps = models.token_logps(policy, packed.make_micro_batch(EXAMPLES, [0, 1, 2], device))
    checkpoint.export(Run(output_dir=out), policy, tokenizer, folder)
    (-logps.sum()).backward()
    norm = models.clip_grad_norm(policy, 0.0).item() / dist.world_size()  # each rank had all of the row
    return {"logps": logps.tolist(), "norm": [norm], "sampled": [x for r in replies for x in r.logps]}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_with_adapters_on_two_ranks(
    dtype: str, tmp_path: Path, tokenizer: Any, two_ranks: Any
) -> None:
    from peft import AutoPeftModelForCausalLM

    save("deepseek_v3", tmp_path / "base", tokenizer)
    settings = {"folder": str(tmp_path / "base"), "out": str(tmp_path / "run"), "dtype": dtype}
    one, two = adapted(**settings), two_ranks("test_families:adapted", **settings)
    limit = 1e-5 if dtype == "float32" else 0.1
    assert two[0] == two[1]
    for name in one:
        torch.testing.assert_close(
            torch.tensor(two[0][name]), torch.tensor(one[name]), atol=limit, rtol=limit
        )
    exported = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    with torch.no_grad():
        gaps = (alone(exported) - torch.tensor(one["logps"])).abs()
    assert (gaps.max() if dtype == "float32" else gaps.median()) < limit  # rounding may choose another expert


@pytest.mark.release
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.xfail(strict=True, reason=family.wrong) if family.wrong else ())
        for kind, family in FAMILIES.items()
    ],
)
def test_all_families(kind: str, tmp_path: Path, little: Path, tokenizer: Any, device: torch.device) -> None:
    check(kind, tmp_path, little, tokenizer, device)
    if not FAMILIES[kind].refused:
        check_scripts(kind, tmp_path, little, device)


def test_the_page_has_the_table() -> None:
    assert table() in (ROOT / "docs" / "models.md").read_text()


if __name__ == "__main__":
    print(table(), end="")
