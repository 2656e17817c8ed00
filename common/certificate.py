"""--check: what should hold of a model, its data and a loss before a run, tried on the user's own.

Each line has a bound. A script says which lines it has; those here know examples and packed models only.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import checkpoint, data, dist, files, formats, loading, models, packed
from common.args import Training
from common.generate import generate, sampled_logps, to_example
from common.packed import Example, MicroBatch

LABEL_LINE = re.compile(r"\s*(\S*:\d+,?)+\s*")  # what may stand between a prompt and what is scored
NUM_LOOKED_AT = 512  # examples whose text is looked at


class Line(NamedTuple):
    """One thing that was tried."""

    name: str
    value: Any
    bound: str  # in words
    holds: bool


def at_most(name: str, value: float, most: float) -> Line:
    return Line(name, float(value), f"at most {most:g}", bool(value <= most))  # NaN is not


def near(name: str, value: float, expected: float, tolerance: float) -> Line:
    return Line(
        name, float(value), f"{expected:.6g} +- {tolerance:g}", bool(abs(value - expected) <= tolerance)
    )


def run(run: Any, lines: Iterator[Line]) -> None:
    """With --check try the lines, print them and write check.json; ends the process, 0 if all hold."""
    from rich.console import Console
    from rich.table import Table

    if not run.check:
        return
    file, found = Path(run.output_dir) / "check.json", []
    dist.from_main(lambda: file.parent.mkdir(parents=True, exist_ok=True))
    table = Table("", "what", "found", "bound")
    for line in lines:
        found.append(line)
        if not isinstance(line.value, str):
            table.add_row("ok" if line.holds else "FAILS", line.name, f"{line.value:.4g}", line.bound)
        elif dist.is_main():
            print(f"{line.name}: {line.value}", flush=True)
    num_held = sum(line.holds for line in found)
    if dist.is_main():
        files.write(file, json.dumps([line._asdict() for line in found], indent=2) + "\n")
        Console().print(table)
        print(f"{num_held} of {len(found)} lines hold: {file}", flush=True)
    dist.barrier()
    sys.exit(int(num_held < len(found)))


# ------------------------------------------------------------------------------------------------------ data


def of_data(tokenizer: Any, dataset: data.Dataset) -> Iterator[Line]:
    """An example as it is scored, where masks begin, what was left out or cut, duplicates."""
    looked_at = dataset[:: max(1, len(dataset) // NUM_LOOKED_AT)]
    text = marked(tokenizer, looked_at[0].sequences[0])
    yield Line("an example, [[what is scored]]", text, "to be read", True)
    begins = [found for e in looked_at if (found := begins_right(tokenizer, e)) is not None]
    if begins:
        wrong = 1 - sum(begins) / len(begins)
        yield at_most("share that is not scored from where a reply would begin", wrong, 0.0)
    notes = "; ".join(getattr(dataset, "notes", ())) or "none"
    yield Line("left out or cut while reading", notes, "to be read", True)
    last = [ids[mask][-1] for e in dataset for ids, mask in e.sequences if mask.any()]
    if last:
        share = sum(token != data.end_token(tokenizer) for token in last) / len(last)
        yield at_most("share of replies without their end", share, 0.5)
    yield of_duplicates([e.sequences for e in dataset])


def of_duplicates(items: Sequence) -> Line:
    """Items that occur before."""
    known = {repr([ids.tobytes() for ids, _ in x]) if isinstance(x, list) else x for x in items}
    return at_most("share of duplicates", 1 - len(known) / len(items), 0.5)


def marked(tokenizer: Any, sequence: packed.Tokens) -> str:
    """The text of a sequence, what is scored in [[ ]]."""
    ids, mask = sequence
    edges = [0, *(i for i in range(1, len(ids)) if mask[i] != mask[i - 1]), len(ids)]
    parts = [(tokenizer.decode(ids[a:b]), mask[a]) for a, b in zip(edges, edges[1:], strict=False)]
    return "".join(f"[[{text}]]" if is_scored else text for text, is_scored in parts)


def begins_right(tokenizer: Any, example: Example) -> bool | None:
    """Whether what is scored begins where a generation for this prompt would; None if that cannot be said."""
    if not example.prompt or isinstance(example.prompt, str):
        return None
    expected = data.encode_prompt(tokenizer, example.prompt, example.label)
    # a template that rewrites earlier turns gives a sequence for each; the last one has the whole prompt
    sides = example.sequences if {"label_prob", "ranks"} & example.fields.keys() else example.sequences[-1:]
    for ids, mask in sides:
        begin = formats.common_prefix(expected, ids)
        if mask[1:].all() or not mask[begin:].any():
            return None  # scored whole, or cut before the reply
        first = begin + int(mask[begin:].argmax())
        between = tokenizer.decode(ids[begin:first])
        if mask[begin - 1] or (between and not LABEL_LINE.fullmatch(between)):
            return False
    return True


def of_pairs(dataset: data.Dataset) -> Iterator[Line]:
    """Pairs that say nothing, and whether their order is mostly that of lengths."""
    known = {tuple(ids.tobytes() for ids, _ in e.sequences) for e in dataset}
    swapped = sum(sides[::-1] in known for sides in known) / len(known)
    yield at_most("share of pairs that stand in both orders", swapped, 0.1)
    even = sum(e.fields.get("label_prob", 1.0) == 0.5 for e in dataset) / len(dataset)
    yield at_most("share of pairs with an even label", even, 0.1)
    lengths = [[int(mask.sum()) for _, mask in e.sequences] for e in dataset]
    longer = [a > b for a, b in lengths if a != b]
    share = sum(longer) / max(1, len(longer))
    yield Line("share won by the longer side", share, "0.05 to 0.95", 0.05 <= share <= 0.95 or not longer)


# ------------------------------------------------------------------------------------------ models and losses


Loss = Callable[[MicroBatch], tuple[Tensor, Mapping[str, tuple]]]


def few(examples: Sequence[Example], count: int = 4) -> list[Example]:
    """The shortest of the first examples: what is tried with a model should take seconds."""
    return sorted(examples[:256], key=lambda e: e.num_tokens)[:count]


def one_row(examples: list[Example], device: torch.device) -> MicroBatch:
    return packed.make_micro_batch(examples, [*range(len(examples))], device)


@torch.no_grad()
def of_loss(
    loss: Loss, examples: list[Example], device: torch.device, expected: Mapping[str, float] | None = None
) -> Iterator[Line]:
    """Whether a loss depends on how its batch is split, and metrics whose value is known before a step.

    Args:
        loss: loss of a micro-batch, a sum that the caller divides, and metrics as (sum, count).
    """
    found = []
    for limit in (sum(e.num_tokens for e in examples), 1):  # one row for each rank; one for each example
        totals = dist.Totals()
        for row in packed.micro_batches(examples, limit, device):
            value, metrics = loss(row)
            totals.update({"the sum": (value, 0), **metrics})
        found.append(totals.reduce())
    one, other = (x["the sum"] for x in found)
    most = 1e-2 if device.type == "cuda" else 1e-4
    yield at_most("loss of one row against one a row, relative", abs(one - other) / max(0.1, abs(one)), most)
    for name, value in (expected or {}).items():
        yield near(f"{name} before a step", found[0][name], value, most)


@torch.no_grad()
def of_model(
    run: Training, model: models.PackedModel, tokenizer: Any, examples: Sequence[Example], source: str
) -> Iterator[Line]:
    """Packed against alone, the sampler against training, and the export against what it was made from.

    Args:
        source: what the model started from.
    """
    is_low, is_policy = model.compute_dtype != torch.float32, isinstance(model, models.Policy)
    device = next(model.parameters()).device
    chosen = [scored_whole(ids, e) for e in few(examples) for ids, _ in e.sequences]
    score = models.token_logps if is_policy else models.rewards
    packed_so = [*chosen, *(e for e in few(examples) if len(e.sequences) > 1)]  # the latter share beginnings
    together = score(model, one_row(packed_so, device))
    sequences = [Example([sequence], "") for e in packed_so for sequence in e.sequences]
    alone = torch.cat([score(model, one_row([e], device)) for e in sequences])
    yield at_most("packed against alone, most of a token", largest(together - alone), 0.2 if is_low else 1e-3)
    if is_policy:
        prompts = [data.encode_prompt(tokenizer, e.prompt, e.label) for e in chosen]
        prompts = [p for p in prompts if p] or [chosen[0].sequences[0].ids[:1].tolist()]
        samples = generate(model, tokenizer, prompts, max_new_tokens=16)
        row = one_row([to_example(sample) for sample in samples], device)
        gap = (models.token_logps(model, row) - sampled_logps(samples, row)).abs().mean().item()
        yield at_most("sampler against training, mean of a token", gap, 0.05 if is_low else 1e-3)
    row, ids = one_row(chosen[:1], device), torch.from_numpy(chosen[0].sequences[0].ids).long()[None]
    ours = model.logits(row) if is_policy else models.rewards(model, row)

    def read(path: str) -> float:
        if is_policy:
            theirs = loading.read_pretrained(path).float()(ids).logits[0, :-1]
        else:
            plain = loading.read_scorer(path, None, (), False).float()
            theirs = plain.score(plain.base_model(ids)[0][:, -1])
        return largest(ours.cpu().float() - theirs)

    with files.beside(run.output_dir) as folder:
        checkpoint.export(replace(run, output_dir=folder), model, tokenizer, source)
        far = dist.from_main(lambda: read(f"{folder}/model"))
    yield at_most("export, loaded again, most of a logit", far, 0.5 if is_low else 1e-2)


def scored_whole(ids: np.ndarray, example: Example) -> Example:
    """A sequence of an example alone, with all tokens scored that can be."""
    return Example([packed.Tokens(ids, np.arange(len(ids)) >= 1)], example.prompt, label=example.label)


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def slope_over_norm(loss: Callable[[], Tensor], model: nn.Module, share: float) -> float:
    """Slope of a loss along its gradient by finite differences, over the gradient's norm: 1 if it is right.

    Args:
        loss: alike on every rank, so that the gradients that FSDP adds up are so many times one.
        share: of the loss, by which it is changed: more than its rounding, less than its curvature matters.
    """
    value = loss()
    value.backward()
    norm = models.clip_grad_norm(model, 0).item()
    moved = [p for p in model.parameters() if p.grad is not None]
    size, found = share * abs(value.item()) / norm, []
    with torch.no_grad():
        for move in (size, -2 * size, size):
            for parameter in moved:
                parameter.add_(parameter.grad, alpha=move / norm)
            found.append(loss().item())
    model.zero_grad()
    return (found[0] - found[1]) / (2 * size) * dist.world_size() / norm


def of_training(
    args: Any,
    model: models.PackedModel,
    tokenizer: Any,
    dataset: data.Dataset,
    loss: Loss,
    expected: Mapping[str, float] | None = None,
    examples: list[Example] | None = None,
) -> Iterator[Line]:
    """All lines of a script that learns from examples, by default a few of its data; see `of_loss`."""
    yield from of_data(tokenizer, dataset)
    if "label_prob" in dataset[0].fields:
        yield from of_pairs(dataset)
    yield from of_loss(loss, examples or few(dataset), next(model.parameters()).device, expected)
    yield from of_model(args.run, model, tokenizer, dataset, args.model)


def training(args: Any, *what: Any) -> None:
    """`run` with the lines of `of_training`, which says what is given."""
    run(args.run, of_training(args, *what))
