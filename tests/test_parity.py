"""The same weights and examples give the same masks, losses, gradients and metrics as TRL.

TRL replaces the forward of the model it is given, so each side loads its own copy.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import args_of, make_tiny_model, means

import dpo
import reward_model
import sft
import spin
from common import data, models, packed

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl", reason="trl is not installed: nothing to compare with")
datasets = pytest.importorskip("datasets", reason="datasets is not installed; trl needs it")

STEPS, BATCHES = 20, 5  # optimizer steps, over so many batches again and again
ONE_ROW = 10**9  # micro_batch_tokens
CONVERSATIONS = [  # beside the toy's own: several turns, unknown words, nothing
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What does the dog say?"},
        {"role": "assistant", "content": "Woof."},
        {"role": "user", "content": "And the bee?"},
        {"role": "assistant", "content": "Buzz."},
    ],
    [{"role": "user", "content": "Zymurgy?"}, {"role": "assistant", "content": "Qu'est-ce que c'est ?"}],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
]


def read_lines(path: Path, count: int) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()[:count]]


def write_lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def trl_settings(folder: Path, **settings: Any) -> dict[str, Any]:
    """What every TRL trainer here is told: float32 on CPU, nothing written, the data in the order given."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }


def plain_model(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def whole_batch(trainer: Any) -> dict[str, torch.Tensor]:
    """All training examples of a TRL trainer as the one batch its collator makes of them."""
    trainer._set_signature_columns_if_needed()
    columns = set(trainer._signature_columns)
    return trainer.data_collator([{k: e[k] for k in columns & e.keys()} for e in trainer.train_dataset])


def grad_norm(model: torch.nn.Module) -> float:
    norm = models.clip_grad_norm(model, 0).item()
    model.zero_grad()
    return norm


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    ours, theirs = (x.item() if isinstance(x, torch.Tensor) else x for x in (ours, theirs))
    assert abs(ours - theirs) <= tolerance * max(1.0, abs(theirs))


# ------------------------------------------------------------------------------------------------------ masks


def test_the_mask_of_a_chat_is_trls_assistant_mask(toy: Path, tokenizer: Any) -> None:
    chats = [record["messages"] for record in read_lines(toy / "sft" / "train.jsonl", 200)] + CONVERSATIONS
    for messages in chats:
        replies = [m["role"] == "assistant" for m in messages]
        [(tokens, mask)] = data.encode_chat(tokenizer, messages, replies)
        theirs = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, assistant = theirs["input_ids"], theirs["assistant_masks"]
        assert tokens.tolist() == ids[: len(tokens)]
        assert mask.tolist() == [bool(m) for m in assistant[: len(tokens)]]
        assert not any(assistant[len(tokens) :])  # what ours leaves out follows the last trained token


def test_the_mask_of_a_pair_is_trls_completion_mask(toy: Path, tokenizer: Any) -> None:
    for record in read_lines(toy / "pairs" / "train.jsonl", 200):
        prompt = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True)["input_ids"]
        for side in ("chosen", "rejected"):
            tokens, mask = data.encode_response(tokenizer, record["prompt"], record[side])
            whole = tokenizer.apply_chat_template(record["prompt"] + record[side])["input_ids"]
            assert tokens.tolist() == whole
            assert mask.tolist() == [i >= len(prompt) for i in range(len(whole))]


# -------------------------------------------------------------------------------------------------------- sft


def sft_sides(
    records: list[dict], tokenizer: Any, model: str, device: torch.device, folder: Path, **settings: Any
) -> tuple[Any, data.Dataset, torch.nn.Module]:
    """TRL's trainer, and our examples and policy, on the same records and weights."""
    trainer = trl.SFTTrainer(
        model=plain_model(model),
        args=trl.SFTConfig(**trl_settings(folder / "trl", **settings)),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer,
    )
    source = write_lines(folder / "train.jsonl", records)
    examples, _ = data.load_sft(tokenizer, source, source, 2048)
    return trainer, examples, models.load(model, device, sft.Args().system)


@pytest.mark.parametrize("kind", ["messages", "prompt and completion", "plain text"])
def test_the_sft_loss_is_trls(
    kind: str, toy: Path, tokenizer: Any, device: torch.device, tmp_path: Path
) -> None:
    records = read_lines(toy / "sft" / "train.jsonl", 12)
    # TRL trains the end of an empty reply; ours leaves one out, and says so
    records += [{"messages": messages} for messages in CONVERSATIONS if messages[-1]["content"]]
    if kind != "messages":
        records = [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in records]
    if kind == "plain text":
        tokenizer = data.load_tokenizer("toy")
        tokenizer.chat_template = None
        records = [
            {"prompt": r["prompt"][-1]["content"], "completion": " " + r["completion"][0]["content"]}
            for r in records
            if r["completion"][0]["content"]
        ]
    model = str(toy / "model")  # trained, so that its accuracy is not that of a random one, zero
    trainer, examples, policy = sft_sides(
        records, tokenizer, model, device, tmp_path, assistant_only_loss=kind == "messages"
    )
    batch = whole_batch(trainer)
    their_loss = trainer.compute_loss(trainer.model, dict(batch))
    their_loss.backward()
    theirs = {name: values[-1] for name, values in trainer._metrics["train"].items()}

    (micro_batch,) = packed.micro_batches(examples, ONE_ROW, device)
    assert len(micro_batch.targets) == (batch["labels"][:, 1:] != -100).sum() > 50
    assert theirs["mean_token_accuracy"] > 0.1
    loss, metrics = sft.loss_and_metrics(policy, micro_batch)
    (loss / len(micro_batch.targets)).backward()
    close(loss / len(micro_batch.targets), their_loss)
    close(grad_norm(policy), grad_norm(trainer.model))
    ours = means(metrics)
    close(ours["entropy"], theirs["entropy"])
    close(ours["mean_token_accuracy"], theirs["mean_token_accuracy"])


def test_twenty_sft_steps_are_trls(
    toy: Path, tokenizer: Any, tiny_model: str, device: torch.device, tmp_path: Path
) -> None:
    size, learning_rate = 4, 0.3
    records = read_lines(toy / "sft" / "train.jsonl", size * BATCHES)
    trainer, examples, policy = sft_sides(
        records,
        tokenizer,
        tiny_model,
        device,
        tmp_path,
        assistant_only_loss=True,
        **sgd_settings(size, learning_rate),
    )
    theirs = train_losses(trainer)
    optimizer = torch.optim.SGD(policy.parameters(), lr=learning_rate)
    ours = []
    for batch in in_turn(examples, size):
        (micro_batch,) = packed.micro_batches(batch, ONE_ROW, device)
        loss = sft.loss_and_metrics(policy, micro_batch)[0] / sum(example.num_targets for example in batch)
        ours.append(step(loss, optimizer))
    assert_same_course(ours, theirs)


def sgd_settings(batch_size: int, learning_rate: float) -> dict[str, Any]:
    return {
        "optim": "sgd",
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": batch_size,
        "max_steps": STEPS,
        "logging_steps": 1,
    }


def in_turn(examples: list[packed.Example], size: int) -> Iterator[list[packed.Example]]:
    for i in range(STEPS):
        start = i % BATCHES * size
        yield examples[start : start + size]


def train_losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def step(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def assert_same_course(ours: list[float], theirs: list[float]) -> None:
    assert len(ours) == len(theirs) == STEPS
    gain = sum(ours[:BATCHES]) - sum(ours[-BATCHES:])
    assert gain > 0.1 * BATCHES, "the weights hardly moved, so their course shows nothing"
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-4)


# -------------------------------------------------------------------------------------------------------- dpo


@pytest.fixture(scope="module")
def tiny_reference(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("reference"), tokenizer, seed=1))


def dpo_sides(
    records: list[dict],
    tokenizer: Any,
    model: str,
    reference: str,
    device: torch.device,
    folder: Path,
    settings: dict[str, Any],
    **ours: Any,
) -> tuple[Any, data.Dataset, torch.nn.Module, torch.nn.Module, dpo.Args]:
    """TRL's trainer, and our pairs, policy, reference and arguments, on the same records and weights."""
    keys = ("prompt", "chosen", "rejected")
    trainer = trl.DPOTrainer(
        model=plain_model(model),
        ref_model=plain_model(reference),
        args=trl.DPOConfig(**trl_settings(folder / "trl", **settings)),
        train_dataset=datasets.Dataset.from_list([{k: r[k] for k in keys} for r in records]),
        processing_class=tokenizer,
    )
    source = write_lines(folder / "train.jsonl", records)
    args = args_of(dpo.Args, **ours)
    pairs, _ = data.load_pairs(tokenizer, source, source, args.max_length)
    ref_policy = models.load(reference, device, args.system, trainable=False)
    return trainer, pairs, models.load(model, device, args.system), ref_policy, args


# ours, TRL's settings, pairs. TRL has cDPO only as aot, which sorts the pairs of a batch: alike for one pair.
# So is its sft term, a mean over the tokens of a batch where ours averages within each response first.
LOSSES = {
    "dpo": (dict(loss="dpo", beta=0.3), dict(loss_type=["sigmoid"], beta=0.3), 12),
    "ipo": (dict(loss="ipo", beta=0.3), dict(loss_type=["ipo"], beta=0.3), 12),
    "robust": (
        dict(loss="robust", beta=0.3, label_smoothing=0.2),
        dict(loss_type=["robust"], beta=0.3, label_smoothing=0.2),
        12,
    ),
    "cdpo": (
        dict(loss="dpo", beta=0.3, label_smoothing=0.2),
        dict(loss_type=["aot"], beta=0.3, label_smoothing=0.2),
        1,
    ),
    "dpo and sft": (
        dict(loss="dpo", beta=0.3, sft_coef=0.5),
        dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], beta=0.3),
        1,
    ),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_dpo_loss_is_trls(
    name: str,
    toy: Path,
    tokenizer: Any,
    tiny_model: str,
    tiny_reference: str,
    device: torch.device,
    tmp_path: Path,
) -> None:
    ours, theirs, count = LOSSES[name]
    records = read_lines(toy / "pairs" / "train.jsonl", 12)[-count:]
    trainer, pairs, policy, ref_policy, args = dpo_sides(
        records, tokenizer, tiny_model, tiny_reference, device, tmp_path, theirs, **ours
    )
    their_loss = trainer._compute_loss(trainer.model, whole_batch(trainer), return_outputs=False)
    their_loss.backward()
    (micro_batch,) = packed.micro_batches(pairs, ONE_ROW, device)
    loss, _ = dpo.loss_and_metrics(policy, ref_policy, micro_batch, args)
    (loss / count).backward()
    close(loss / count, their_loss)
    close(grad_norm(policy), grad_norm(trainer.model))


def test_the_simpo_loss_is_trls() -> None:
    from trl.experimental.cpo import CPOTrainer

    mean_logps = torch.tensor([[-1.2, -1.5], [-0.7, -0.6], [-3.0, -0.1]])
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=1.0,
        label_smoothing=0.0,
        loss_type="simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs = CPOTrainer.cpo_loss(trainer, *mean_logps.unbind(1))[0]
    torch.testing.assert_close(dpo.simpo_loss(mean_logps, beta=2.0, gamma=1.0), theirs)


def test_the_dpo_metrics_are_trls(
    toy: Path, tokenizer: Any, tiny_reference: str, device: torch.device, tmp_path: Path
) -> None:
    records = read_lines(toy / "pairs" / "train.jsonl", 12)
    model = str(toy / "model")  # trained: a random one's accuracy is zero
    trainer, pairs, policy, ref_policy, args = dpo_sides(
        records, tokenizer, model, tiny_reference, device, tmp_path, {"beta": 0.3}, beta=0.3
    )
    trainer._compute_loss(trainer.model, whole_batch(trainer), return_outputs=False)
    theirs = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    (micro_batch,) = packed.micro_batches(pairs, ONE_ROW, device)
    ours = means(dpo.loss_and_metrics(policy, ref_policy, micro_batch, args)[1])
    same = ["entropy", *(f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies"))]
    for name in [*same, "logps/chosen", "logps/rejected"]:
        close(ours[name], theirs[name])

    # defined otherwise: TRL's token accuracy leaves out rejected responses, its mean logits weigh a response
    # by its tokens where ours average within each response first
    assert theirs["mean_token_accuracy"] > 0.1
    stats = policy(micro_batch)
    chosen = micro_batch.target_segments % 2 == 0
    close(stats.accuracy[chosen].mean(), theirs["mean_token_accuracy"])
    close(stats.accuracy.mean(), ours["mean_token_accuracy"])
    for side, tokens in (("chosen", chosen), ("rejected", ~chosen)):
        close(stats.mean_logit[tokens].mean(), theirs[f"logits/{side}"])


def test_twenty_dpo_steps_are_trls(
    toy: Path,
    tokenizer: Any,
    tiny_model: str,
    tiny_reference: str,
    device: torch.device,
    tmp_path: Path,
) -> None:
    size, learning_rate = 4, 0.02
    records = read_lines(toy / "pairs" / "train.jsonl", size * BATCHES)
    settings = {"beta": 0.3, **sgd_settings(size, learning_rate)}
    trainer, pairs, policy, ref_policy, args = dpo_sides(
        records, tokenizer, tiny_model, tiny_reference, device, tmp_path, settings, beta=0.3
    )
    theirs = train_losses(trainer)
    optimizer = torch.optim.SGD(policy.parameters(), lr=learning_rate)
    ours = []
    for batch in in_turn(pairs, size):
        (micro_batch,) = packed.micro_batches(batch, ONE_ROW, device)
        ours.append(
            step(dpo.loss_and_metrics(policy, ref_policy, micro_batch, args)[0] / len(batch), optimizer)
        )
    assert_same_course(ours, theirs)


# ------------------------------------------------------------------------------------------------------- spin


@pytest.mark.parametrize(("loss", "theirs"), [("logistic", "sigmoid"), ("hinge", "hinge")])
def test_the_spin_loss_and_metrics_are_trls_dpo_on_real_and_generated(
    loss: str,
    theirs: str,
    toy: Path,
    tokenizer: Any,
    tiny_model: str,
    tiny_reference: str,
    device: torch.device,
    tmp_path: Path,
) -> None:
    records = read_lines(toy / "pairs" / "train.jsonl", 12)
    settings = {"beta": 0.3, "loss_type": [theirs]}
    trainer, pairs, policy, opponent, _ = dpo_sides(
        records, tokenizer, tiny_model, tiny_reference, device, tmp_path, settings
    )
    their_loss = trainer._compute_loss(trainer.model, whole_batch(trainer), return_outputs=False)
    their_loss.backward()
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}

    pairs = [
        spin.make_pair(packed.Example(pair.sequences[:1], ""), spin.response_tokens(pair.sequences[1]))
        for pair in pairs
    ]
    for pair, logps in zip(pairs, spin.opponent_logps(opponent, pairs, 0, device), strict=True):
        pair.fields = logps
    (micro_batch,) = packed.micro_batches(pairs, ONE_ROW, device)
    ours, metrics = spin.loss_and_metrics(policy, micro_batch, beta=0.3, ell=loss)
    (ours / len(pairs)).backward()
    close(ours / len(pairs), their_loss)
    close(grad_norm(policy), grad_norm(trainer.model))
    found = means(metrics)
    words = {"chosen": "real", "rejected": "generated"}
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "entropy"):
        group, _, side = name.partition("/")
        close(found[f"{group}/{words.get(side, side)}" if side else name], logged[name])
    for side, word in words.items():
        close(found[f"logps/{word}"], logged[f"logps/{side}"])


# ----------------------------------------------------------------------------------------------- reward model


@pytest.fixture(scope="module")
def tiny_scorer(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, tokenizer: Any) -> str:
    """A random model with a score head, as both sides load it."""
    torch.manual_seed(2)
    scorer = models.read_scorer(tiny_model, None, ["reward"], zero_head=False)
    assert tokenizer.pad_token_id != data.end_token(tokenizer)  # else TRL reads one token early
    folder = tmp_path_factory.mktemp("scorer")
    scorer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def reward_sides(
    records: list[dict], tokenizer: Any, model: str, device: torch.device, folder: Path, **ours: Any
) -> tuple[Any, data.Dataset, torch.nn.Module, reward_model.Args]:
    """TRL's trainer, and our pairs, scorer and arguments, on the same records and weights."""
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    keys = ("prompt", "chosen", "rejected", "margin")
    trainer = trl.RewardTrainer(
        model=plain.train(),
        args=trl.RewardConfig(
            **trl_settings(folder / "trl"), center_rewards_coefficient=ours.get("center_coef")
        ),
        train_dataset=datasets.Dataset.from_list([{k: r[k] for k in keys if k in r} for r in records]),
        processing_class=tokenizer,
    )
    source = write_lines(folder / "train.jsonl", records)
    args = args_of(reward_model.Args, **ours)
    pairs, _ = data.load_pairs(tokenizer, source, source, args.max_length, "drop")
    return trainer, pairs, models.load_scorer(model, device, args.system, ["reward"]), args


@pytest.mark.parametrize("name", ["plain", "margin", "centred"])
def test_the_reward_model_loss_and_metrics_are_trls(
    name: str, toy: Path, tokenizer: Any, tiny_scorer: str, device: torch.device, tmp_path: Path
) -> None:
    records = read_lines(toy / "pairs" / "train.jsonl", 12)
    if name == "margin":
        records = [record | {"margin": 0.5 * (i % 4)} for i, record in enumerate(records)]
    ours = {"margin": {"loss": "margin_bt"}, "centred": {"center_coef": 0.3}}.get(name, {})
    trainer, pairs, scorer, args = reward_sides(records, tokenizer, tiny_scorer, device, tmp_path, **ours)
    batch = whole_batch(trainer)
    assert ("margin" in batch) == (name == "margin")
    tokens = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert tokens == [pair.sequences[side][0].tolist() for side in (0, 1) for pair in pairs]
    their_loss = trainer.compute_loss(trainer.model, dict(batch))
    their_loss.backward()
    theirs = {key: values[-1] for key, values in trainer._metrics["train"].items()}

    (micro_batch,) = packed.micro_batches(pairs, ONE_ROW, device)
    loss, metrics = reward_model.loss_and_metrics(scorer, micro_batch, args)
    (loss / len(pairs)).backward()
    close(loss / len(pairs), their_loss)
    close(grad_norm(scorer), grad_norm(trainer.model))
    ours = means(metrics)
    for key in ("mean_reward", "accuracy", "margin"):
        close(ours[key], theirs[key])
    evaluation = reward_model.evaluation(
        models.rewards(scorer, micro_batch).detach(), in_order(pairs, micro_batch), args
    )
    close(evaluation["min_reward"], theirs["min_reward"])
    close(evaluation["max_reward"], theirs["max_reward"])
    close(evaluation["loss"], their_loss)


def in_order(pairs: list[packed.Example], micro_batch: packed.MicroBatch) -> list[packed.Example]:
    return [pairs[i] for i in micro_batch.example_ids.tolist()]
