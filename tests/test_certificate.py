"""--check: every line holds for what is right, and fails when its fault is put in."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, args_of, read_metrics
from test_layout import SCRIPTS

from common import certificate, checkpoint, data, dist, generate, models, packed
from common.args import Run, System
from common.packed import Example

# ------------------------------------------------------------------------------------------------------ data


def pair(prompt: str, chosen: str, rejected: str, tokenizer: Any, **fields: float) -> Example:
    turns = [{"role": "user", "content": prompt}]
    sides = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    sequences = [data.encode_response(tokenizer, turns, side) for side in sides]
    return Example(sequences, turns, {"label_prob": 1.0, **fields})


@pytest.fixture
def pairs(tokenizer: Any) -> data.Dataset:
    texts = [
        ("What does the bee say?", "buzz.", "Happy to help. Have fun!"),
        ("Hi.", "Hello. Have fun!", "meat."),
    ]
    texts += [("What does the owl eat?", "The owl eats mice.", "meat.")]
    return data.Dataset([([pair(*text, tokenizer) for text in texts], 1.0)])


def by_name(lines: Any) -> dict[str, certificate.Line]:
    return {line.name: line for line in lines}


def test_a_mask_off_by_one_is_found(tokenizer: Any, pairs: data.Dataset) -> None:
    name = "share that is not scored from where a reply would begin"
    assert all(line.holds for line in certificate.of_data(tokenizer, pairs))
    for shift in (1, -1):
        for example in pairs:
            example.sequences = [packed.Tokens(x.ids, np.roll(x.mask, shift)) for x in example.sequences]
        assert not by_name(certificate.of_data(tokenizer, pairs))[name].holds
        for example in pairs:
            example.sequences = [packed.Tokens(x.ids, np.roll(x.mask, -shift)) for x in example.sequences]


def test_masks_that_say_nothing_of_a_beginning_are_left_alone(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "Hi."}]
    tokens, mask = data.encode_response(tokenizer, turns, [{"role": "assistant", "content": "Hello."}])
    whole = Example([packed.Tokens(tokens, np.arange(len(tokens)) >= 1)], turns)
    assert certificate.begins_right(tokenizer, whole) is None  # as with train_on_prompt
    assert certificate.begins_right(tokenizer, Example([packed.Tokens(tokens, mask)], "Hi.")) is None
    earlier = packed.Tokens(tokens[:3], np.arange(3) >= 2)  # of a template that rewrites turns
    assert certificate.begins_right(tokenizer, Example([earlier, packed.Tokens(tokens, mask)], turns))
    labelled = [{"role": "assistant", "content": "Hello.", "label": "toxicity:0,verbosity:1\n"}]
    assert certificate.begins_right(
        tokenizer, Example([data.encode_response(tokenizer, turns, labelled)], turns)
    )


def test_an_example_is_shown_with_what_is_scored(tokenizer: Any, pairs: data.Dataset) -> None:
    text = certificate.marked(tokenizer, pairs[0].sequences[0])
    assert text.endswith("<|assistant|>[[buzz.<|end|>]]") and text.count("[[") == 1


def test_data_without_signal_is_found(tokenizer: Any, pairs: data.Dataset) -> None:
    found = by_name(certificate.of_pairs(pairs))
    assert all(line.holds for line in found.values())
    # buzz. is shorter than Happy to help.; the two others are longer than what they beat
    assert found["share won by the longer side"].value == pytest.approx(2 / 3)
    swapped = [pair("Hi.", "meat.", "Hello. Have fun!", tokenizer, label_prob=0.5)]
    found = by_name(certificate.of_pairs(data.Dataset([([*pairs, *swapped], 1.0)])))
    assert found["share of pairs that stand in both orders"] == (
        "share of pairs that stand in both orders",
        0.5,
        "at most 0.1",
        False,
    )
    assert found["share of pairs with an even label"].value == 0.25
    longest = data.Dataset([([pairs[1]] * 2, 1.0)])
    assert not by_name(certificate.of_pairs(longest))["share won by the longer side"].holds
    assert certificate.of_duplicates(["a", "b", "a", "a", "a"]).value == 0.6
    cut = [Example([packed.Tokens(x.ids[:-1], x.mask[:-1]) for x in e.sequences], e.prompt) for e in pairs]
    found = by_name(certificate.of_data(tokenizer, data.Dataset([(cut, 1.0)])))
    assert not found["share of replies without their end"].holds


# ------------------------------------------------------------------------------------------ models and losses


@pytest.fixture
def policy(tiny_model: str, device: torch.device) -> models.Policy:
    return models.load(tiny_model, device, System())


@pytest.fixture
def lines(policy: models.Policy, tokenizer: Any, pairs: data.Dataset, tiny_model: str, tmp_path: Path) -> Any:
    run = Run(output_dir=str(tmp_path))
    return lambda: by_name(certificate.of_model(run, policy, tokenizer, pairs, tiny_model))


def test_the_lines_of_a_model_hold_and_leave_nothing_behind(lines: Any, tmp_path: Path) -> None:
    found = lines()
    assert len(found) == 3 and all(line.holds for line in found.values())
    assert not list(tmp_path.iterdir())


def test_attention_across_sequences_is_found(lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make = packed.make_micro_batch

    def joined(*args: Any) -> packed.MicroBatch:
        row = make(*args)
        whole, length = torch.tensor([0, len(row.tokens)], dtype=torch.int32), len(row.tokens)
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        row.attention = dict(zip(names, (whole, whole, length, length), strict=True))
        return row

    monkeypatch.setattr(packed, "make_micro_batch", joined)
    assert not lines()["packed against alone, most of a token"].holds


def test_a_beginning_that_is_not_looked_at_is_found(lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make = packed.make_micro_batch

    def cut(*args: Any) -> packed.MicroBatch:
        row = make(*args)
        given = row.attention
        given.pop("kv_indices", None)
        given |= {"cu_seq_lens_k": given["cu_seq_lens_q"], "max_length_k": given["max_length_q"]}
        return row

    monkeypatch.setattr(packed, "make_micro_batch", cut)
    assert not lines()["packed against alone, most of a token"].holds


def test_a_sampler_of_another_temperature_is_found(lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = generate.Replica.logits
    monkeypatch.setattr(generate.Replica, "logits", lambda self, hidden: 1.1 * logits(self, hidden))
    assert not lines()["sampler against training, mean of a token"].holds


def test_a_head_scaled_on_export_is_found(lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = models.full_weights

    def scaled(model: Any) -> Any:
        yield from ((name, x * (1.05 if "lm_head" in name else 1)) for name, x in weights(model))

    monkeypatch.setattr(models, "full_weights", scaled)
    assert checkpoint.models is models
    assert not lines()["export, loaded again, most of a logit"].holds


def test_a_loss_that_depends_on_the_split_or_a_wrong_start_is_found(
    policy: models.Policy, pairs: data.Dataset, device: torch.device
) -> None:
    def loss(row: packed.MicroBatch, mean: bool = False) -> tuple:
        logps = models.token_logps(policy, row)
        total = -logps.mean() if mean else -logps.sum()
        return total, {"margins": (torch.zeros(()), row.num_segments // 2)}

    right = [*certificate.of_loss(loss, list(pairs), device, {"margins": 0.0})]
    assert len(right) == 2 and all(line.holds for line in right)
    assert not next(certificate.of_loss(lambda row: loss(row, mean=True), list(pairs), device)).holds
    assert not [*certificate.of_loss(loss, list(pairs), device, {"margins": 0.1})][1].holds
    assert not certificate.near("x", float("nan"), 0.0, 1.0).holds


def test_a_gradient_that_is_not_the_slope_is_found(device: torch.device) -> None:
    dist.init(1)
    model = torch.nn.Linear(3, 1, bias=False)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    before = model.weight.detach().clone()
    assert certificate.slope_over_norm(lambda: model(x).exp().mean(), model, 2e-3) == pytest.approx(
        1, abs=0.01
    )
    assert torch.allclose(model.weight, before, atol=1e-6)  # where it was
    half = lambda: (model(x).exp() / 2 + model(x).exp().detach() / 2).mean()  # noqa: E731
    assert certificate.slope_over_norm(half, model, 2e-3) == pytest.approx(2, abs=0.02)


# ---------------------------------------------------------------------------------------- whole scripts


def options_of(few: Path, model: str, folder: Path) -> dict[str, Any]:
    small = {"max_steps": 1, "batch_size": 8, "num_samples": 0, "max_length": 128}
    return {"model": model, "dataset": f"{few}/pairs", "output_dir": str(folder), **small}


def test_a_folder_that_was_checked_can_be_run_in(few: Path, tiny_model: str, tmp_path: Path) -> None:
    import dpo

    options = options_of(few, tiny_model, tmp_path / "run")
    with pytest.raises(SystemExit) as done:
        dpo.main(args_of(dpo.Args, **options, check=True))
    assert done.value.code == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["check.json"]
    found = {line["name"]: line for line in json.loads((tmp_path / "run" / "check.json").read_text())}
    assert (
        found["loss before a step"]["bound"] == "0.693147 +- 0.0001" and found["loss before a step"]["holds"]
    )
    dpo.main(args_of(dpo.Args, **options))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1]


def test_a_line_that_fails_ends_the_process_with_1(tmp_path: Path, capsys: Any) -> None:
    run = SimpleNamespace(check=True, output_dir=str(tmp_path))
    with pytest.raises(SystemExit) as done:
        certificate.run(run, iter([certificate.at_most("a", 0.5, 1.0), certificate.at_most("b", 2.0, 1.0)]))
    assert done.value.code == 1 and "1 of 2 lines hold" in capsys.readouterr().out
    certificate.run(SimpleNamespace(check=False), iter(()))  # without --check nothing happens


def check_on_two_ranks(few: str, model: str, folder: str) -> int:
    import sft

    try:
        sft.main(
            args_of(
                sft.Args, **options_of(Path(few), model, Path(folder)) | {"dataset": f"{few}/sft"}, check=True
            )
        )
    except SystemExit as done:
        return done.code
    return -1


@pytest.mark.slow
def test_two_ranks_agree(few: Path, tiny_model: str, tmp_path: Path, two_ranks: Any) -> None:
    given = {"few": str(few), "model": tiny_model, "folder": str(tmp_path)}
    assert two_ranks("test_certificate:check_on_two_ranks", **given) == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["check.json"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_holds_on_the_toy(script: str, tmp_path: Path) -> None:
    command = [sys.executable, f"{script}.py", "--check", f"--output_dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["check.json"]
