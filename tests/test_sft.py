"""sft.py: its loss by hand and at its limits, and short runs on the toy world."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import args_of, read_metrics

import sft
from common import data, dist, generate, models, packed


def make_example(tokens: list[int], scored: int) -> packed.Example:
    """A sequence whose last `scored` tokens are trained."""
    mask = np.arange(len(tokens)) >= len(tokens) - scored
    return packed.Example([(np.array(tokens, np.int32), mask)], prompt="")


# by hand


def test_the_mean_is_over_tokens_not_over_micro_batches() -> None:
    # token losses {2} in one micro-batch and {1, 1, 1} in another: 5 / 4, where a mean of means would be 1.5
    totals = dist.Totals()
    for logps in (torch.tensor([-2.0]), torch.tensor([-1.0, -1.0, -1.0])):
        totals.update({"loss": (sft.sft_loss(logps), len(logps))})
    assert totals.reduce("train/") == {"train/loss": 1.25}


def test_the_gradient_of_the_logits_is_softmax_minus_onehot_over_n(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], requires_grad=True)
    targets = torch.tensor([2, 0])
    loss = sft.sft_loss(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]) / 2
    loss.backward()
    expected = (logits.detach().softmax(-1) - torch.eye(3)[targets]) / 2
    torch.testing.assert_close(logits.grad, expected)


# limits


def test_uniform_logits_give_log_v(tiny_model: str, tokenizer, device: torch.device) -> None:
    policy = models.load(tiny_model, device, sft.Args().system)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.zero_()
    micro_batch = packed.make_micro_batch([make_example([5, 6, 7, 8, 9], 4)], [0], device)
    loss, metrics = sft.loss_and_metrics(policy, micro_batch)
    assert loss.item() / 4 == pytest.approx(math.log(len(tokenizer)), abs=1e-5)
    assert metrics["entropy"][0].item() / 4 == pytest.approx(math.log(len(tokenizer)), abs=1e-5)


def test_a_dummy_row_has_no_loss_and_a_zero_gradient(tiny_model: str, device: torch.device) -> None:
    policy = models.load(tiny_model, device, sft.Args().system)
    loss, metrics = sft.loss_and_metrics(policy, packed.make_micro_batch([], [], device))
    loss.backward()
    assert loss.item() == 0.0 and all(total.item() == count == 0 for total, count in metrics.values())
    assert models.clip_grad_norm(policy, 1.0).item() == 0.0


# direction


def test_one_step_makes_the_scored_tokens_likelier_and_leaves_the_count_alone(
    tiny_model: str, device: torch.device
) -> None:
    policy = models.load(tiny_model, device, sft.Args().system)
    micro_batch = packed.make_micro_batch(
        [make_example([5, 6, 7, 8, 9], 2), make_example([9, 8, 7], 1)], [0, 1], device
    )
    assert len(micro_batch.targets) == 3
    before, _ = sft.loss_and_metrics(policy, micro_batch)
    before.backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter -= 1e-3 * parameter.grad
    after, _ = sft.loss_and_metrics(policy, micro_batch)
    assert after.item() < before.item()


# learning


def test_four_demonstrations_are_learnt_by_heart_and_end_by_themselves(
    tiny_model: str, tmp_path: Path, tokenizer, device: torch.device
) -> None:
    turns = [
        ("What does the cow say?", "Moo."),
        ("Hi.", "Hello."),
        ("What does the cat eat?", "Fish."),
        ("No.", "Yes."),
    ]
    lines = [f'{{"prompt": "{p}", "response": "{r}"}}\n' for p, r in turns]
    (tmp_path / "four.jsonl").write_text("".join(lines))
    args = args_of(
        sft.Args,
        model=tiny_model,
        dataset=str(tmp_path / "four.jsonl"),
        eval_dataset=str(tmp_path / "four.jsonl"),
        output_dir=str(tmp_path / "run"),
        max_steps=60,
        batch_size=4,
        learning_rate=1e-2,
        warmup_steps=2,
        num_samples=4,
        temperature=0.0,
        eval_every=60,
    )
    sft.main(args)
    last = read_metrics(args.run.output_dir)[-1]
    assert last["train/loss"] < 0.05 and last["eval/ended"] == 1.0
    policy = models.load(args.run.output_dir, device, args.system)  # the exported model
    prompts = [data.encode_prompt(tokenizer, [{"role": "user", "content": p}]) for p, _ in turns]
    samples = generate.generate(policy, tokenizer, prompts, max_new_tokens=20, temperature=0.0)
    assert [s.text.strip() for s in samples] == [r for _, r in turns]
    assert all(s.ended for s in samples)


def test_the_toy_run_raises_right_and_polite_answers(toy: Path, tmp_path: Path) -> None:
    settings = {**sft.TOY, "max_steps": 20, "eval_every": 20, "num_samples": 100}
    sft.main(args_of(sft.Args, **settings, output_dir=str(tmp_path)))
    first, last = read_metrics(tmp_path)[0], read_metrics(tmp_path)[-1]
    assert last["eval/loss"] < first["eval/loss"]
    assert last["eval/judge/correctness"] > first["eval/judge/correctness"] + 0.3
    assert last["eval/judge/toxicity"] < first["eval/judge/toxicity"] - 0.3


def test_train_on_prompt_scores_every_token_but_the_first(toy: Path, tokenizer) -> None:
    plain, _ = data.load_sft(tokenizer, "toy", "", 2048)
    whole, _ = data.load_sft(tokenizer, "toy", "", 2048, train_on_prompt=True)
    assert all(w.num_targets == w.num_tokens - 1 > p.num_targets for p, w in zip(plain, whole, strict=True))
