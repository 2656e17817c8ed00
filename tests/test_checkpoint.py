"""Exports that plain transformers and peft load, and checkpoints that fit or say why not."""

import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import args_of, make_tiny_model
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import sft
from common import checkpoint, data, dist, files, lora, models, packed
from common.args import Run, System


def train(folder: str, few: str, **settings: Any) -> None:
    """Four steps of sft.py; called here and on the two ranks."""
    base = {**sft.TOY, "dataset": f"{few}/sft", "output_dir": folder, "max_steps": 4, "batch_size": 8}
    sft.main(args_of(sft.Args, **{**base, "num_samples": 0, "learning_rate": 1e-2, **settings}))


def our_logps(folder: str, tokens: list[int], device: torch.device, resumed: sft.Args) -> torch.Tensor:
    """Log-probs of tokens under the policy as it was trained: base model plus the newest checkpoint."""
    policy = models.load(resumed.model, device, resumed.system)
    optimizer = torch.optim.AdamW(models.parameter_groups(policy, 0.0))
    assert checkpoint.resume(resumed.run.output_dir, {"policy": (policy, optimizer)})["step"] == 4
    mask = torch.ones(len(tokens), dtype=torch.bool).numpy()
    mask[0] = False
    example = packed.Example([(torch.tensor(tokens, dtype=torch.int32).numpy(), mask)], "")
    return models.token_logps(policy, packed.make_micro_batch([example], [0], device)).detach()


def plain_logps(model: Any, tokens: list[int]) -> torch.Tensor:
    """The same through transformers alone."""
    with torch.no_grad():
        logps = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    return logps[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0]


TOKENS = [5, 80, 44, 130, 7, 9, 200, 3]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_export_is_the_trained_policy_in_plain_transformers(
    few: Path, tmp_path: Path, tokenizer: Any, device: torch.device, two_ranks: Any, tied: bool, ranks: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = str(make_tiny_model(tmp_path / "base", tokenizer, tie_word_embeddings=tied))
    folder = str(tmp_path / "run")
    if ranks == 2:
        two_ranks("test_checkpoint:train", folder=folder, few=str(few), model=base)
    else:
        train(folder, str(few), model=base)
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
    ours = our_logps(folder, TOKENS, device, args_of(sft.Args, model=base, output_dir=folder))
    torch.testing.assert_close(plain_logps(model, TOKENS), ours, atol=1e-5, rtol=1e-5)
    untrained = AutoModelForCausalLM.from_pretrained(base)
    assert (plain_logps(untrained, TOKENS) - ours).abs().max() > 0.1
    config = json.loads(Path(folder, "model", "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] == tied
    assert model.generation_config.eos_token_id == data.end_token(tokenizer)
    assert AutoTokenizer.from_pretrained(f"{folder}/model").chat_template == tokenizer.chat_template
    assert ("lm_head.weight" in load_file(f"{folder}/model/model.safetensors")) != tied


def move(model: models.PackedModel, size: float) -> None:
    """Change what adapters do, by an amount that grows with size."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                noise = torch.randn(parameter.shape) * size
                getattr(parameter, "_local_tensor", parameter).copy_(noise)


def adapted(
    base: str, device: torch.device, size: float, dtype: str = "float32", rank: int = 4
) -> models.Policy:
    """A policy whose adapters change it."""
    system = System(dtype=dtype, lora_rank=rank, activation_checkpointing="off")
    policy = models.load(base, device, system)
    move(policy, size)
    return policy


def row_of(tokens: list[int], device: torch.device) -> packed.MicroBatch:
    ids = np.array(tokens, np.int32)
    return packed.make_micro_batch(
        [packed.Example([packed.Tokens(ids, np.arange(len(ids)) > 0)], "")], [0], device
    )


def logps_of(policy: models.Policy, device: torch.device) -> torch.Tensor:
    with torch.no_grad():
        return policy(row_of(TOKENS, device)).logps


@pytest.mark.parametrize(("size", "least", "most"), [(0.3, -0.1, 0.1), (1e-4, 0.3, 1.0)])
def test_a_merge_adds_in_float32_and_says_what_rounding_loses(
    size: float, least: float, most: float, tmp_path: Path, tokenizer: Any, device: torch.device, capsys: Any
) -> None:
    """A base in bfloat16: a small change is less than its last bit, and only float32 can hold the sum."""
    from transformers import AutoModelForCausalLM

    base = make_tiny_model(tmp_path / "base", tokenizer)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    policy = adapted(str(base), device, size)
    for merge_dtype in ("auto", "float32"):
        run = Run(output_dir=str(tmp_path), merge_lora=True, merge_dtype=merge_dtype)
        checkpoint.export(run, policy, tokenizer, str(base))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
        out = capsys.readouterr().out
        if merge_dtype == "float32":
            assert model.dtype == torch.float32 and "rounding" not in out
            torch.testing.assert_close(
                plain_logps(model, TOKENS), logps_of(policy, device), atol=1e-5, rtol=0
            )
        else:
            assert model.dtype == torch.bfloat16
            assert least < float(re.search(r"rounding loses (-?\d\.\d+) of their change", out)[1]) < most


@pytest.mark.parametrize(("size", "is_said"), [(1e-4, True), (0.3, False)])
def test_first_adapters_that_rounding_loses_are_told_once(
    size: float,
    is_said: bool,
    tmp_path: Path,
    tokenizer: Any,
    device: torch.device,
    capsys: Any,
    recwarn: Any,
) -> None:
    """Of frozen models and LoRA policies in bfloat16, by the share that the weights they hold have lost."""
    from transformers import AutoModelForCausalLM

    base, first = make_tiny_model(tmp_path / "base", tokenizer), str(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    checkpoint.export(Run(output_dir=first), adapted(str(base), device, size), tokenizer, str(base))

    def weights(folder: str, dtype: str, rank: int = 0, trainable: bool = True) -> torch.Tensor:
        policy = models.load(folder, device, System(dtype=dtype, lora_rank=rank), trainable)
        found = [t.float().flatten() for n, t in models.full_weights(policy.model) if ".lora_" not in n]
        return torch.cat(found)

    exact, before = weights(first, "float32"), weights(str(base), "float32")
    whole = weights(first, "bfloat16")  # float32 masters
    torch.testing.assert_close(whole, exact, atol=0, rtol=0)
    capsys.readouterr()
    change = exact - before
    for rank, trainable in ((4, True), (4, True), (0, False)):
        kept = ((weights(first, "bfloat16", rank, trainable) - before) * change).sum() / change.square().sum()
    said = re.findall(r"first: .* rounding loses (\d\.\d+) of their change", capsys.readouterr().out)
    lost = [float(share) for share in said]
    assert lost == ([pytest.approx(1 - kept.item(), abs=0.02)] if is_said else [])
    assert not [w for w in recwarn if "is_gradient_checkpointing" in str(w.message)]  # of peft, on reading


def test_a_share_lost_is_never_minus_zero() -> None:
    sums = ([3.0, 4.0], [4.001, 4.0], [0.0, 0.0])  # rounding may also add a little
    assert [f"{lora.share_lost(torch.tensor(x)):.2f}" for x in sums] == ["0.25", "0.00", "0.00"]


def stops_after(model: Any, end: int, **how: Any) -> int:
    """How many tokens plain generate writes when the third it can draw is the end token."""

    def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, end] = 1e4 if ids.shape[1] == 6 else -1e4
        return scores

    prompt = torch.tensor([TOKENS[:4]])
    written = model.generate(prompt, max_new_tokens=6, do_sample=False, logits_processor=[force], **how)
    return written.shape[1] - 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["full", "merged", "adapters", "adapters on adapters"])
def test_others_load_an_export_from_elsewhere(
    kind: str, dtype: str, tmp_path: Path, tokenizer: Any, device: torch.device, monkeypatch: Any, capsys: Any
) -> None:
    """Logits, stopping, tokenizer and template, of a base with another end token than is trained."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    make_tiny_model(tmp_path / "base", tokenizer, eos_token_id=5)
    end = data.end_token(tokenizer)
    monkeypatch.chdir(tmp_path)  # paths as users give them, from where they are
    policy, model = adapted("base", device, 0.3, dtype, rank=0 if kind == "full" else 4), "base"
    if kind == "adapters on adapters":
        checkpoint.export(Run(output_dir="first"), policy, tokenizer, model)
        policy, model = adapted("first", device, 0.2, dtype), "first"
    run = Run(output_dir="run", merge_lora=kind == "merged", merge_dtype="auto")
    checkpoint.export(run, policy, tokenizer, model)
    said = capsys.readouterr().out
    ours, limit = logps_of(policy, device), 1e-5 if dtype == "float32" else 0.1
    untrained = plain_logps(AutoModelForCausalLM.from_pretrained("base"), TOKENS)
    assert kind == "full" or (untrained - ours).abs().max() > 3 * limit
    monkeypatch.chdir("/")
    found = tmp_path / "run" / "model"
    # adapters on adapters are merged: what they stand on is nothing that peft could load
    for loader in (AutoModelForCausalLM, *([AutoPeftModelForCausalLM] if kind == "adapters" else [])):
        plain = loader.from_pretrained(found, dtype=getattr(torch, dtype))
        assert (plain_logps(plain, TOKENS) - ours).abs().max() < limit
        if kind == "adapters":  # on a model of others, which goes on
            assert stops_after(plain, end) == 6 and f"stops at 5, they at {end}" in said
            assert stops_after(plain, end, generation_config=GenerationConfig.from_pretrained(found)) == 3
        else:
            assert stops_after(plain, end) == 3
    assert AutoTokenizer.from_pretrained(found).chat_template == tokenizer.chat_template
    (tmp_path / "run").rename(tmp_path / "moved")
    again = models.read_pretrained(*files.model_folder(str(tmp_path / "moved")))
    assert (plain_logps(again, TOKENS) - ours).abs().max() < limit
    if kind == "adapters":
        (tmp_path / "base").rename(tmp_path / "gone")
        with pytest.raises(dist.RunError, match=r"moved/model holds adapters of .*/base, which is not there"):
            models.read_pretrained(*files.model_folder(str(tmp_path / "moved")))


@pytest.mark.parametrize("rank", [0, 4])
def test_others_load_a_reward_model_from_elsewhere(
    rank: int, tmp_path: Path, tokenizer: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapters are always merged, its head is its own."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    make_tiny_model(tmp_path / "base", tokenizer)
    monkeypatch.chdir(tmp_path)
    system = System(dtype="float32", lora_rank=rank, activation_checkpointing="off")
    scorer = models.load_scorer("base", device, system, ["good", "short"])
    move(scorer, 0.3)
    checkpoint.export(Run(output_dir="run"), scorer, tokenizer, "base")
    with torch.no_grad():
        ours = models.rewards(scorer, row_of(TOKENS, device))
    monkeypatch.chdir("/")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "base").rename(tmp_path / "gone")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moved" / "model")
    with torch.no_grad():
        torch.testing.assert_close(plain(torch.tensor([TOKENS])).logits, ours, atol=1e-5, rtol=1e-5)
    assert list(plain.config.id2label.values()) == ["good", "short"]
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "moved" / "model").chat_template == tokenizer.chat_template
    )


def test_saving_leaves_an_optimizer_that_has_not_begun_alone(
    tmp_path: Path, tiny_model: str, device: torch.device
) -> None:
    """As a policy's while its critic warms up: after a save, and a resume, its first step is its first."""
    run = Run(output_dir=str(tmp_path), keep_checkpoints=1)

    def fresh() -> dict[str, Any]:
        policy = models.load(tiny_model, device, System(activation_checkpointing="off"))
        return {"policy": (policy, torch.optim.AdamW(models.parameter_groups(policy, 0.0), lr=0.01))}

    def step(parts: dict[str, Any]) -> torch.Tensor:
        policy, optimizer = parts["policy"]
        ids = np.array(TOKENS, np.int32)
        example = packed.Example([packed.Tokens(ids, np.arange(len(ids)) > 0)], "")
        (-policy(packed.make_micro_batch([example], [0], device)).logps.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return logps_of(policy, device)

    expected, saved, resumed = step(fresh()), fresh(), fresh()
    checkpoint.save(run, 1, saved)
    assert not saved["policy"][1].state and torch.equal(step(saved), expected)
    assert checkpoint.resume(run.output_dir, resumed)["step"] == 1
    assert not resumed["policy"][1].state and torch.equal(step(resumed), expected)
    checkpoint.save(run, 2, saved)  # from here on it has begun
    again = fresh()
    checkpoint.resume(run.output_dir, again)
    torch.testing.assert_close(step(again), step(saved), atol=1e-6, rtol=0)


@pytest.mark.parametrize("merge", [False, True])
def test_lora_exports_a_peft_folder_or_a_merged_model(
    few: Path, tmp_path: Path, tiny_model: str, device: torch.device, merge: bool
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    folder = str(tmp_path / "run")
    train(folder, str(few), model=tiny_model, lora_rank=4, merge_lora=merge)
    assert Path(folder, "model", "adapter_config.json").exists() != merge
    loader = AutoModelForCausalLM if merge else AutoPeftModelForCausalLM
    ours = our_logps(
        folder, TOKENS, device, args_of(sft.Args, model=tiny_model, output_dir=folder, lora_rank=4)
    )
    theirs = plain_logps(loader.from_pretrained(f"{folder}/model"), TOKENS)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    again = plain_logps(
        models.read_pretrained(*files.model_folder(folder)), TOKENS
    )  # as the next script's --model
    torch.testing.assert_close(again, ours, atol=1e-5, rtol=1e-5)


def test_the_export_keeps_the_dtype_of_the_model_on_disk(few: Path, tmp_path: Path, tiny_model: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    train(str(tmp_path / "run"), str(few), model=str(base))
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {t.dtype for t in exported.values()} == {torch.bfloat16}


def test_a_checkpoint_of_another_shape_is_refused(
    few: Path, tmp_path: Path, tokenizer: Any, tiny_model: str
) -> None:
    folder = tmp_path / "run"
    train(str(folder), str(few), model=tiny_model)
    wide = make_tiny_model(tmp_path / "wide", tokenizer, hidden_size=48)
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({**args, "model": str(wide)}))
    with pytest.raises(dist.RunError, match=r"is \[.*\] there and \[.*\] in this model.*--overwrite"):
        train(str(folder), str(few), model=str(wide), max_steps=5, accept_changes=True)


def test_only_the_newest_checkpoints_are_kept(few: Path, tmp_path: Path, tiny_model: str) -> None:
    train(str(tmp_path), str(few), model=tiny_model, save_every=1, keep_checkpoints=2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000004"]


def test_a_tensor_that_is_wider_on_disk_stays_so_in_the_export(
    few: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """As the bias of DeepSeek's router, which in bfloat16 would choose other experts."""
    from safetensors.torch import load_file, save_file

    folder = make_tiny_model(tmp_path / "model", tokenizer)
    weights = load_file(folder / "model.safetensors")
    held = {name: t if name == "model.norm.weight" else t.bfloat16() for name, t in weights.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    train(str(tmp_path / "run"), str(few), model=str(folder))
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in held.items()}


@pytest.fixture(scope="module")
def stepped(few: Path, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stepped") / "run"
    train(str(folder), str(few), model=tiny_model, max_steps=1)
    return folder


def of_others(folder: Path, ran: Path) -> None:
    """A checkpoint whose description of itself is a pickle that calls open."""

    class Evil:
        def __reduce__(self) -> tuple:
            return open, (str(ran), "w")

    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))


def of_others_in_a_part(folder: Path, ran: Path) -> None:
    """The same where a number of the optimizer should be."""

    class Evil:
        def __reduce__(self) -> tuple:
            return open, (str(ran), "w")

    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(i for i in metadata.storage_data if i.fqn.endswith("step"))
    torch.save(Evil(), folder / "__0_9.distcp")
    metadata.storage_data[index].relative_path = "__0_9.distcp"
    metadata.storage_data[index].offset = 0
    metadata.storage_data[index].length = (folder / "__0_9.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def said_to_be_no_tensor(folder: Path, ran: Path) -> None:
    """Then torch would unpickle it as it stands."""
    of_others_in_a_part(folder, ran)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    name = next(name for name in metadata.state_dict_metadata if name.endswith("step"))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def elsewhere(folder: Path, ran: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder, ran: (folder / ".metadata").unlink(),
        lambda folder, ran: (folder / ".metadata").write_bytes(b""),
        lambda folder, ran: (folder / "numbers.json").unlink(),
        lambda folder, ran: (folder / "numbers.json").write_text(""),
        lambda folder, ran: next(folder.glob("*.distcp")).unlink(),
        lambda folder, ran: next(folder.glob("*.distcp")).write_bytes(b""),
        lambda folder, ran: os.truncate(next(folder.glob("*.distcp")), 5000),
        of_others,
        of_others_in_a_part,
        said_to_be_no_tensor,
        elsewhere,
    ],
)
def test_a_checkpoint_that_is_damaged_or_runs_code_is_one_line_and_runs_none(
    spoil: Callable, stepped: Path, few: Path, tiny_model: str, tmp_path: Path
) -> None:
    shutil.copytree(stepped, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step_00000001"
    spoil(folder, tmp_path / "ran")
    said = r"step_00000001: (damaged, .*; delete it to go on|policy.* is missing there)"
    with pytest.raises(dist.RunError, match=said) as error:
        train(str(tmp_path / "run"), str(few), model=tiny_model, max_steps=2)
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()
    assert "you have two options" not in str(error.value)  # torch tells how to load it all the same
    assert not re.search("damaged, .?;", str(error.value))


def test_what_is_not_finite_is_neither_saved_nor_exported(few: Path, tmp_path: Path, tiny_model: str) -> None:
    """A step of 1e30 gives weights that are finite and whose squares are not."""
    with pytest.raises(dist.RunError, match=r"eval/loss is nan|is not finite, or too large to compute with"):
        train(str(tmp_path / "a"), str(few), model=tiny_model, max_steps=1, learning_rate=1e30, eval_every=9)
    train(str(tmp_path / "b"), str(few), model=tiny_model, max_steps=1)
    policy = models.load(str(tmp_path / "b"), torch.device("cpu"), System(activation_checkpointing="off"))
    run, tokenizer = Run(output_dir=str(tmp_path / "b")), data.load_tokenizer(tiny_model)
    weight = policy.model.model.norm.weight
    for value in (math.nan, math.inf, 1e30):
        with torch.no_grad():
            getattr(weight, "_local_tensor", weight)[0] = value
        with pytest.raises(
            dist.RunError,
            match=r"norm.weight is not finite, .* after step 2, which is not saved; the last good .*01",
        ):
            checkpoint.save(run, 2, {"policy": (policy, None)})
        before = (tmp_path / "b" / "model" / "model.safetensors").read_bytes()
        with pytest.raises(
            dist.RunError, match="model: not written, .*norm.weight is not finite in torch.float32"
        ):
            checkpoint.export(run, policy, tokenizer, tiny_model)
        assert (tmp_path / "b" / "model" / "model.safetensors").read_bytes() == before
    assert [p.name for p in (tmp_path / "b" / "checkpoints").iterdir()] == ["step_00000001"]
    assert not (tmp_path / "a" / "model").exists() and not checkpoint.newest(tmp_path / "a")


def test_what_kills_left_of_other_checkpoints_is_cleared(
    few: Path, tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(str(tmp_path), str(few), model=tiny_model, max_steps=1)
    for name in ("step_00000007.tmp", "step_00000003.old.tmp"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "part").touch()
    train(str(tmp_path), str(few), model=tiny_model, max_steps=2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]

    def killed(path: Path) -> None:
        if path.is_dir():
            next(path.rglob("*.distcp")).unlink()  # half of it
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "remove", killed)
        train(str(tmp_path), str(few), model=tiny_model, max_steps=3)
    assert [*checkpoint.complete(tmp_path)] == [3]


# the best one, one of a step, and a later merge


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_best_checkpoint_is_kept_and_exported_and_any_other_can_be(
    few: Path, tmp_path: Path, tiny_model: str, capsys: Any
) -> None:
    """By the highest loss here, so that the best is not the last."""
    more = dict(model=tiny_model, save_every=1, eval_every=1)
    train(str(tmp_path), str(few), **more, keep_best="+eval/loss")
    losses = {row["step"]: row["eval/loss"] for row in files.read_rows(tmp_path / "metrics.jsonl")}
    best = max((1, 2, 3, 4), key=losses.get)
    assert best < 4 and [*checkpoint.complete(tmp_path)] == [best, 4]
    checkpoint.export_step(tmp_path, best)
    checkpoint.export_step(tmp_path, 4)
    assert "of the highest eval/loss" in capsys.readouterr().out
    found = {name: weights_of(tmp_path / name) for name in ("model", "model_best", f"model_step_{best}")}
    found["model_step_4"] = weights_of(tmp_path / "model_step_4")
    for name, tensor in found["model"].items():
        assert torch.equal(tensor, found["model_step_4"][name])
        assert torch.equal(found["model_best"][name], found[f"model_step_{best}"][name])
    assert not torch.equal(found["model"]["lm_head.weight"], found["model_best"]["lm_head.weight"])
    for name in ("model_best", f"model_step_{best}"):
        card = (tmp_path / name / "README.md").read_text()
        assert f" to step {best}" in card and f"| loss | {losses[0]:.3f} | {losses[best]:.3f} |" in card
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~files.UMASK for path in (tmp_path / "model").iterdir())
    with pytest.raises(dist.RunError, match=rf"no checkpoint of step 7; found \[{best}, 4\]"):
        checkpoint.export_step(tmp_path, 7)
    for metric, said in (("eval/los", "found no such metric; expected one of eval/loss"), ("", "")):
        with pytest.raises(dist.RunError, match=said or "save_every is 3; expected a multiple of eval_every"):
            options = more if metric else more | dict(save_every=3, eval_every=2)
            train(str(tmp_path / "b"), str(few), **options, keep_best=metric or "eval/loss")


@pytest.mark.parametrize(
    ("metric", "lower"),
    [("eval/loss", True), ("eval/judge/correctness", False), ("eval/judge/toxicity", True)]
    + [("-eval/reward", True), ("+eval/loss", False), ("eval/rewards/accuracies", False), ("eval/kl", True)]
    + [("eval/pearson/toxicity", False), ("eval/mae/toxicity", True), ("eval/calibration_error", True)]
    + [("eval/judge/glossy", False), ("eval/judge/quickly", False)],
)
def test_which_way_is_better_follows_from_the_name_or_its_sign(metric: str, lower: bool) -> None:
    assert checkpoint.is_lower_better(metric) == lower


def test_no_checkpoint_stays_if_none_is_wanted(
    few: Path, tmp_path: Path, tiny_model: str, capsys: Any
) -> None:
    more = dict(model=tiny_model, save_every=1, keep_checkpoints=0)
    train(str(tmp_path), str(few), **more)
    train(str(tmp_path), str(few), **more)
    assert "is finished at step 4" in capsys.readouterr().out and not checkpoint.newest(tmp_path)
    with pytest.raises(dist.RunError, match="finished at step 4 and kept no checkpoint to go on from"):
        train(str(tmp_path), str(few), **more, max_steps=5)


def test_adapters_are_merged_later_and_never_in_silence(few: Path, tmp_path: Path, tiny_model: str) -> None:
    from transformers import AutoModelForCausalLM

    more = dict(model=tiny_model, lora_rank=4)
    train(str(tmp_path), str(few), **more)
    adapted = plain_logps(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), TOKENS)
    with pytest.raises(dist.RunError, match=f"common.checkpoint merge {tmp_path} merges those"):
        train(str(tmp_path), str(few), **more, merge_lora=True)
    checkpoint.merge(tmp_path, "auto")
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    assert "library_name: transformers" in (tmp_path / "model" / "README.md").read_text()
    merged = plain_logps(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), TOKENS)
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-5)
    with pytest.raises(dist.RunError, match="found no adapters"):
        checkpoint.merge(tmp_path, "auto")
    checkpoint.export_step(tmp_path, 4)  # from which they come again
    assert (tmp_path / "model_step_4" / "adapter_config.json").exists()
    checkpoint.export_step(tmp_path, 4, "float32")
    exported = plain_logps(AutoModelForCausalLM.from_pretrained(tmp_path / "model_step_4"), TOKENS)
    assert not (tmp_path / "model_step_4" / "adapter_config.json").exists()
    torch.testing.assert_close(exported, adapted, atol=1e-5, rtol=1e-5)
    chain = {**more, "model": str(tmp_path / "model_step_4"), "merge_lora": True}
    train(str(tmp_path / "chain"), str(few), **chain)
    with pytest.raises(dist.RunError, match="export .*chain --step 4 --merge_dtype float32"):
        train(str(tmp_path / "chain"), str(few), **chain, merge_dtype="float32")
    train(str(tmp_path / "all"), str(few), model=tiny_model)
    with pytest.raises(dist.RunError, match="it has no adapters to merge"):
        checkpoint.export_step(tmp_path / "all", 4, "float32")


def test_nothing_is_exported_onto_a_model_that_has_changed(
    few: Path, tmp_path: Path, tiny_model: str
) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_model, base)
    train(str(run), str(few), model=str(base), lora_rank=4)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")  # trained again
    with pytest.raises(dist.RunError, match="is not what the run began from"):
        checkpoint.export_step(run, 4)
    with pytest.raises(dist.RunError, match="is not what the run began from"):
        checkpoint.merge(run, "auto")
    assert (run / "model" / "adapter_config.json").exists()


def number_of_words(prompts: list, responses: list[str], records: list[dict]) -> list[float]:
    return [float(len(response.split())) for response in responses]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_policy_trained_with_a_critic_is_exported_and_merged(
    tmp_path: Path, tiny_model: str, lora_rank: int
) -> None:
    """The critic's head is in the checkpoint too."""
    from transformers import AutoModelForCausalLM

    import ppo

    more = {"rollout_size": 16, "batch_size": 16, "max_new_tokens": 8, "num_samples": 0, "max_steps": 1}
    more |= {"model": tiny_model, "reward": "test_checkpoint:number_of_words"}
    ppo.main(args_of(ppo.Args, **ppo.TOY | more, lora_rank=lora_rank, output_dir=str(tmp_path)))
    checkpoint.export_step(tmp_path, 1)
    if lora_rank:
        checkpoint.merge(tmp_path, "auto")
    steps = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "model_step_1")]
    last, again = (plain_logps(model, TOKENS) for model in steps)
    torch.testing.assert_close(last, again, atol=1e-5, rtol=1e-5)


def test_a_reward_model_of_a_step_has_its_outputs_and_no_centre(
    few: Path, tmp_path: Path, tiny_model: str
) -> None:
    from transformers import AutoModelForSequenceClassification

    import reward_model

    options = {**reward_model.TOY, "model": tiny_model, "dataset": f"{few}/pairs", "max_steps": 2}
    options |= {"output_dir": str(tmp_path), "batch_size": 8}
    reward_model.main(args_of(reward_model.Args, **options))
    with pytest.raises(SystemExit) as done:
        checkpoint.main(["export", str(tmp_path), "--step=2"])
    assert done.value.code == 0
    last, again = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        for name in ("model", "model_step_2")
    )
    assert torch.equal(last.score.weight, again.score.weight)
    assert again.config.pad_token_id == last.config.pad_token_id and again.config.id2label == {0: "reward"}
    assert again.config.reward_mean is None and last.config.reward_mean is not None
