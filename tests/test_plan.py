"""The memory estimate: by hand, and against what was measured; and --plan, which adds it up."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, args_of
from test_layout import SCRIPTS

import cai
import dpo
import draftp
import ppo
import sft
from common import decode, models, plan
from common.args import System, flat, with_fields
from common.plan import training_memory

sys.path.insert(0, str(ROOT / "benchmarks"))
SMALL = SimpleNamespace(hidden_size=10, num_hidden_layers=3, intermediate_size=20, vocab_size=100)


def test_the_estimate_by_hand() -> None:
    """5,000 parameters of which two tables are 2 x 1,000, in bfloat16, on one rank."""
    found = training_memory(SMALL, 5000, 0, num_tokens=7, num_shards=1, itemsize=2, recompute=False)
    assert found.weights == found.gradients == 20_000 and found.optimizer == 40_000
    assert found.gathered == 2 * 2 * (3000 / 3 + 1000)  # two of a block and of a table
    # inputs of norms and of the products after them: 4; q, k, v and what attention gives: 4 more
    assert found.activations == 7 * 3 * 2 * (8 * 10 + 4 * 20)
    assert found.head == 4 * 1000 + 2 * 4 * 7 * 100


def test_what_changes_the_estimate() -> None:
    def need(trained: int = 5000, frozen: int = 0, **changes: int):
        usual = {"num_tokens": 7, "num_shards": 1, "itemsize": 2, "recompute": False}
        return training_memory(SMALL, trained, frozen, **usual | changes)

    assert need(recompute=True).activations == 7 * (2 * 10 * 3 + 2 * (8 * 10 + 4 * 20))
    assert need(num_shards=4).optimizer == need().optimizer / 4
    assert need(100, 4900).weights == 4 * 100 + 2 * 4900  # LoRA: the frozen base in the compute dtype
    assert need(itemsize=4).gathered == 0  # one process in float32 computes with the masters themselves


@pytest.mark.parametrize(("task", "cell"), [("sft", 0), ("sft_8b", 0)])
def test_the_estimate_is_near_what_was_measured(task: str, cell: int) -> None:
    """Peaks of benchmarks/gpu.py on one GPU, within a tenth, and above: what is estimated to fit does."""
    import gpu
    import harness

    settings = gpu.CELLS[task][1][cell]
    lines = [json.loads(line) for line in (ROOT / "benchmarks/results/gpu.jsonl").read_text().splitlines()]
    measured = [x for x in lines if x["task"] == task and x["cell"] == settings and "peak_mib" in x]
    assert measured
    for line in measured:
        need = training_memory(
            harness.llama(**gpu.SHAPES[settings["shape"]]),
            line["parameters"],
            0,
            num_tokens=line["row_tokens"],
            num_shards=1,
            itemsize=2,
            recompute=settings.get("checkpointing") == "on",
        )
        assert 0.97 < sum(need) / 2**20 / line["peak_mib"] < 1.1


# ----------------------------------------------------------------------------------------------------- --plan


def test_parameters_are_counted_without_weights(
    tiny_model: str, tmp_path: Path, device: torch.device
) -> None:
    (tmp_path / "config.json").write_bytes((Path(tiny_model) / "config.json").read_bytes())
    for rank in (0, 4):
        policy = models.load(tiny_model, device, System(lora_rank=rank))
        trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        found = plan.count(str(tmp_path), rank)
        assert (found.trained, found.size) == (trained, sum(p.numel() for p in policy.parameters()))
    scorer = models.load_scorer(tiny_model, device, System(), ["reward"])
    assert plan.count(str(tmp_path), has_vocabulary=False).size == sum(p.numel() for p in scorer.parameters())


def test_activations_of_float32_are_what_autograd_keeps(tiny_model: str, device: torch.device) -> None:
    """Bytes that two packed layers save, against the estimate, which leaves out a few vectors."""
    policy, kept = models.load(tiny_model, device, System()), {}
    row = make_row(policy.config.vocab_size, device)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        policy.hidden_states(row)
    found = sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in weights)
    how = {"num_tokens": len(row.tokens), "num_shards": 1, "itemsize": 4, "recompute": False}
    assert 0.8 < training_memory(policy.config, 1, 0, **how).activations / found < 1


def make_row(vocab_size: int, device: torch.device) -> Any:
    from harness import fixed_documents

    from common import packed

    return packed.make_micro_batch(fixed_documents(4, 64, vocab_size), [0, 1, 2, 3], device)


def test_the_cache_is_as_large_as_planned(tiny_model: str, device: torch.device) -> None:
    config = plan.count(tiny_model).config
    cache, (queries, keys) = decode.Cache(3, 20), plan.attention_widths(config)
    heads = config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        new = torch.zeros(1, heads, 2, keys // heads)
        cache.at(torch.zeros(2, dtype=torch.long), torch.arange(2), torch.arange(2)).update(new, new, layer)
    held = sum(x.nbytes for kept in cache.layers.values() for x in kept)
    assert queries == config.hidden_size and held == 3 * plan.cache_bytes(config, 20, 4)
    assert plan.rows_that_fit(100.0, 30.0) == 2  # 80 of 100


def machine(count: int = 1, gib: float = 16) -> plan.Machine:
    return plan.Machine(count, gib * 2**30)


def need(Args: type, beside: Any, count: int = 1, **options: Any) -> plan.Need:
    args = args_of(Args, **options)
    return plan.text_need(args, machine(count), beside(args))


def test_what_a_run_holds(tiny_model: str) -> None:
    """With P parameters in float32: weights 4 P and moments 8 P of what is trained, 4 P of a frozen copy."""
    usual, P = {"model": tiny_model, "dtype": "float32"}, plan.count(tiny_model).size
    own = need(dpo.Args, dpo.beside, **usual)
    assert own.always == {"weights": 4 * P, "optimizer": 8 * P, "reference": 4 * P}
    assert own.training["gradients"] == own.generation["replica"] == 4 * P
    alone = {"weights": 4 * P, "optimizer": 8 * P}
    for change in ({"loss": "simpo"}, {"precompute_ref": True}):
        assert need(dpo.Args, dpo.beside, **usual, **change).always == alone
    assert need(dpo.Args, dpo.beside, **usual, num_samples=0).generation == {}
    adapters = plan.count(tiny_model, 4).trained
    small = need(dpo.Args, dpo.beside, **usual, lora_rank=4)
    assert small.always == {"weights": 4 * P + 4 * adapters, "optimizer": 8 * adapters}
    assert small.generation["replica"] == 4 * adapters  # beside the policy's own base
    shared = need(dpo.Args, dpo.beside, count=4, **usual)
    assert shared.always["optimizer"] == 2 * P and shared.generation["replica"] == 4 * P
    critic = need(ppo.Args, ppo.beside, **usual, reward="a.b:c")
    V = plan.count(tiny_model, has_vocabulary=False).size
    assert critic.always["optimizer"] == 8 * (P + V) and critic.training["gradients"] == 4 * P
    assert "K/V cache of 64 replies" in critic.generation


@pytest.mark.parametrize("rank", [0, 4])
def test_the_pace_counts_a_sequence_as_the_throughput_of_a_run_does(
    tiny_model: str, device: torch.device, rank: int
) -> None:
    """Attention at the full length that memory is planned for, and adapters alone with all three passes."""
    own = need(sft.Args, lambda _: {}, model=tiny_model, dtype="float32", max_length=256, lora_rank=rank)
    policy = models.load(tiny_model, device, System(lora_rank=rank))
    assert own.flops * 256 == pytest.approx(plan.training_flops(policy, [256]), rel=1e-9)


def shown(capsys: Any, args: Any, *how: Any, **more: Any) -> tuple[int, str]:
    with pytest.raises(SystemExit) as done:
        plan.show(args, *how, **more)
    return done.value.code, capsys.readouterr().out


def test_a_plan_says_what_would_fit(tiny_model: str, capsys: Any) -> None:
    options = {"model": tiny_model, "dtype": "float32", "max_length": 256}
    args = args_of(dpo.Args, **options, plan="2x1")
    code, text = shown(capsys, args, dpo.beside, sequences=2)
    assert code == 0 and "most at once" in text and "fits into 1 GiB" in text
    assert (
        "MiB on each GPU" in text and " 0.00" not in text and "tokens/s" not in text
    )  # too small for a pace
    large = plan.Need({"weights": 2.0**31}, {}, {}, 1e12, "tokens/s", plan.SMALL)
    *_, most, pace = plan.as_lines(large, machine())
    assert "2.20, fits into 16 GiB" in most and pace.endswith("about 396 tokens/s")
    code, text = shown(capsys, args_of(dpo.Args, **options, plan="2x0.004"), dpo.beside, sequences=2)
    assert code == 1 and "does not fit into 0.004 GiB" in text
    print(text)
    for change in ("micro_batch_tokens 1024", "precompute_ref True", "together:"):
        assert change in text
    for machine_spec in ("8", "8x0", "0x80"):
        with pytest.raises(ValueError, match="GPUs x GiB"):
            plan.show(args_of(dpo.Args, plan=machine_spec), dpo.beside)
    plan.show(args_of(dpo.Args))  # without --plan nothing happens


def test_what_helps_only_after_another_change_is_found(tmp_path: Path) -> None:
    """Of an 8B model on 4 x 16 GiB: samples hold most; without them training does, but for LoRA."""
    from transformers import LlamaConfig

    shape = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336}
    LlamaConfig(num_hidden_layers=32, num_key_value_heads=8, **shape).save_pretrained(tmp_path)
    args = args_of(sft.Args, model=str(tmp_path))
    of = lambda **changes: plan.text_need(with_fields(args, **changes), machine(4), {})  # noqa: E731
    *singles, head, last = plan.advice(flat(args), of, machine(4))
    assert not any("num_samples" in line or "fits" in line for line in singles)
    assert head == "together:" and last.startswith("  --num_samples 0 --lora_rank 16: 14")
    assert last.endswith(" GiB, fits")  # half of max_length, fewer micro_batch_tokens: not needed
    # a cache that takes what is free leaves room for what libraries keep
    pair = {"SL-CAI": str(tmp_path), "judge": str(tmp_path)}
    assert plan.speaking_need(args_of(cai.Args), machine(8, 24), pair, 1536 + 1024).total < 24 * 2**30


def test_half_the_length_is_the_last_change_and_may_not_be_enough() -> None:
    """A model that needs a byte for each token, and ten for its weights, one with adapters."""

    def of(max_length: int = 8, lora_rank: int = 0, micro_batch_tokens: int = 0) -> plan.Need:
        tokens = max_length * (1 if micro_batch_tokens else 2)
        return plan.Need({"weights": 1 if lora_rank else 10}, {"activations": tokens}, {}, 1, "")

    def told(size: int, **options: Any) -> list[str]:
        usual = {"max_length": 8, "lora_rank": 0, "micro_batch_tokens": 0}
        return plan.advice(usual | options, functools.partial(of, **options), plan.Machine(1, size * 1.0))

    kept = plan.Need({}, {}, {}, 1, "").kept
    *_, last = told(kept + 7)
    assert last.startswith("  --micro_batch_tokens 1024 --lora_rank 16 --max_length 4: ")
    assert last.endswith(", fits (max_length halved: what is longer is cut or left out)")
    assert told(kept + 10)[-1].startswith("  --micro_batch_tokens 1024 --lora_rank 16: ")
    *_, before, last = told(5)
    assert "--max_length 4: " in before and "fits" not in before
    assert last.startswith("these changes are not enough; ")
    assert "lora_rank" not in str(told(5, lora_rank=8)) and "tokens" not in str(
        told(5, micro_batch_tokens=512)
    )


def test_images_are_planned_by_what_autograd_keeps(tmp_path: Path) -> None:
    from tiny_diffusion import make_clip, make_pipeline

    options = {"model": make_pipeline(tmp_path / "sd"), "reward": make_clip(tmp_path / "clip")}
    options |= {"dtype": "float32", "micro_batch_size": 2, "num_inference_steps": 4}

    def of(**changes: Any) -> plan.Need:
        args = args_of(draftp.Args, **options | changes)
        return plan.image_need(args, machine(), draftp.beside(args))

    whole, base = of(lora_rank=0), of(lora_rank=1)
    P = whole.always["reference"] / 4
    assert whole.always["weights"] == 4 * P and whole.always["optimizer"] == 8 * P
    assert base.always["optimizer"] < 2 * P and "reference" not in base.always  # adapters off, it is it
    steps = {"lora_rank": 1, "num_grad_steps": 4}
    kept, wide = of(**steps, step_checkpointing=False), of(lora_rank=1, micro_batch_size=4)
    once = base.training["activations"]
    assert kept.training["activations"] > 3 * once and wide.training["activations"] > 1.5 * once
    assert of(lora_rank=1, guidance_scale=1.0).flops < 0.6 * base.flops
    assert of(lora_rank=1, activation_checkpointing="on").training["activations"] < 0.7 * once
    xl = of(model=make_pipeline(tmp_path / "xl", "xl"))
    assert xl.always["text encoders"] > base.always["text encoders"]
    (tmp_path / "model_index.json").write_text('{"_class_name": "Other"}')
    with pytest.raises(ValueError, match="found a Other; expected one of StableDiffusionPipeline, "):
        of(model=str(tmp_path))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_flow_is_planned_as_it_is_loaded(kind: str, tmp_path: Path, device: torch.device) -> None:
    """Its parameters, what its text encoders give, and what a prediction and a decoded image keep."""
    from tiny_diffusion import make_pipeline

    from common import diffusion, pipelines

    options = {"model": make_pipeline(tmp_path, kind), "reward": "brightness", "dtype": "float32"}
    options |= {"lora_rank": 0, "micro_batch_size": 1, "guidance_scale": 1.0, "image_size": 16}
    need = plan.image_need(args_of(draftp.Args, **options), machine(), {})
    pipe = pipelines.read_pipeline(options["model"])
    for part in pipelines.modules(pipe).values():
        part.requires_grad_(part is pipe.transformer)
    assert need.always["weights"] == 4 * plan.sizes(pipe.transformer)
    encoded: Any = {}
    diffusion.encode_all(pipe, ["a"], encoded, 1, device)
    found = [part.shape for part in plan.text_shapes(pipe, torch.float32)]
    if kind == "flux":  # the CLIP tokenizer of this SD 3 is shorter than any real one
        assert found == [part.shape for part in encoded["a"]]
    encoded = {x: tuple(torch.zeros(shape) for shape in found) for x in (None, "a")}
    given = diffusion.conditions(pipe, encoded, ["a"], 16, 1.0, device)
    latents, kept = torch.randn(1, 4, 8, 8, requires_grad=True), {}
    weights = {
        p.untyped_storage().data_ptr() for p in (*pipe.transformer.parameters(), *pipe.vae.parameters())
    }

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    sizes = []
    for forward in (
        lambda: diffusion.prediction(pipe.transformer, latents, 1.0, given),
        lambda: diffusion.decode(pipe.vae, latents, False),
    ):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            forward()
        sizes.append(sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in weights))
    assert need.training["activations"] == pytest.approx(max(sizes), rel=0.02)


@pytest.mark.release
def test_a_run_holds_what_its_plan_says() -> None:
    """Weights, moments, gradients and activations of 40M parameters, 0.9 GiB, above the libraries.

    By hand: what is resident depends on what else the machine does.
    """
    import harness

    file = str(ROOT / "benchmarks" / "plan.py")
    found = harness.in_process(file, "case", {"script": "sft", "shape": "40M"}, 1)
    assert 0.85 < found["planned_mib"] / found["measured_mib"] < 1.15


def test_models_that_only_speak_or_judge_are_planned(tiny_model: str, tmp_path: Path, capsys: Any) -> None:
    """cai.py's of each stage, not one behind a server, with a cache; steerlm.py's beside its policy."""
    P, judge = plan.count(tiny_model).size, tmp_path / "judge"
    shutil.copytree(tiny_model, judge)
    usual = {"model": tiny_model, "dtype": "float32"}
    own = args_of(cai.Args, **usual, judge_model=str(judge))
    found = {"revisions": {"helpful model": tiny_model}}
    assert cai.speakers(own) == found | {"comparisons": {"SL-CAI": tiny_model, "judge": str(judge)}}
    asked = args_of(cai.Args, **usual, judge_model="name", judge_url="http://x", critic_model=str(judge))
    found["revisions"]["critic"] = str(judge)
    assert cai.speakers(asked) == found | {"comparisons": {"SL-CAI": tiny_model}}
    assert "revisions" not in cai.speakers(args_of(cai.Args, **usual, sl_model=str(judge)))
    need = plan.speaking_need(own, machine(2), cai.speakers(own)["comparisons"], 100)
    assert need.always == {"SL-CAI": 2 * P, "judge": 2 * P} and need.generation["replica"] == 4 * P
    rows = need.generation["K/V cache of 64 replies"]
    assert rows == 64 * plan.cache_bytes(plan.count(tiny_model).config, 100, 4)
    V, raters = plan.count(tiny_model, has_vocabulary=False).size, {"policy": tiny_model}
    need = plan.speaking_need(own, machine(), raters | {"attribute model": tiny_model}, 100)
    assert need.always == {"policy": 4 * P, "attribute model": 4 * V} and not need.generation["replica"]
    small = args_of(cai.Args, **usual, plan="1x0.001")
    code, text = shown(capsys, small, lambda _: raters, plan.speaking_need, slots=100)
    assert code == 1 and "K/V cache of" in text and "no option that is tried here makes it smaller" in text


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_a_plan(script: str, tmp_path: Path) -> None:
    command = [sys.executable, f"{script}.py", "--plan", "8x80", f"--output_dir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "fits into 80" in done.stdout, done.stderr
    assert not (tmp_path / "run").exists()


def test_shorter_rows_never_hold_more_for_what_stays_at_rest(tmp_path: Path) -> None:
    """8B policy, reference, critic and reward model on 8 x 80 GiB: rows of all lengths fit.

    With activations recomputed in any case shorter rows hold less; by choice they may fill what is there,
    but fit where longer ones do.
    """
    from transformers import LlamaConfig

    shape = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336}
    LlamaConfig(num_hidden_layers=32, num_key_value_heads=8, **shape).save_pretrained(tmp_path)
    usual = {"model": str(tmp_path), "reward": str(tmp_path)}

    def totals(count: int, gib: float, **more: Any) -> list[float]:
        rows = ({"micro_batch_tokens": n} for n in (1024, 4096, 8192, 16384))
        args = (args_of(ppo.Args, **usual, **row, **more) for row in rows)
        return [plan.text_need(x, machine(count, gib), ppo.beside(x)).total / 2**30 for x in args]

    assert max(totals(8, 80)) < 80
    for count, gib in ((8, 80), (4, 80), (2, 141), (16, 80), (8, 141)):
        recomputed = totals(count, gib, activation_checkpointing="on")
        assert recomputed == sorted(recomputed)
        fits = [total <= gib for total in totals(count, gib)]
        assert fits == sorted(fits, reverse=True), (count, gib)


def test_models_beside_a_policy_leave_its_replica_less_room(tiny_model: str, device: torch.device) -> None:
    """By their weights, 4 bytes of a frozen number and 12 of a trained one: as a plan counts them."""
    policy = models.load(tiny_model, device, System())
    size, rooms = sum(p.numel() for p in policy.parameters()), [policy.room]
    others = []
    for trainable in (False, True):
        others.append(models.load(tiny_model, device, System(), trainable=trainable))
        rooms.append(policy.room)
    assert [rooms[i] - rooms[i + 1] for i in (0, 1)] == pytest.approx([4 * size, 12 * size], abs=2)
    assert others[1].room == policy.room
