"""Reward models: Bradley-Terry on preferences, K-wise rankings, regression on attributes

A linear head, in float32, reads the hidden state of the last token of prompt and response. With r_c and r_r
the rewards of a chosen and a rejected response, p the probability that chosen is better, m the margin:

    bt          -p log sigmoid(r_c - r_r) - (1-p) log sigmoid(r_r - r_c)   InstructGPT Eq. 1, arXiv 2203.02155
    margin_bt   -log sigmoid(r_c - r_r - m)                     HelpSteer2-Preference, arXiv 2410.01257
    scaled_bt   -m log sigmoid(r_c - r_r)                       the same
    kwise       all pairs of one prompt's ranked responses      InstructGPT Eq. 1
    regression  (r_a - label_a)^2 for each known label          HelpSteer2 section 3, arXiv 2406.08673

    python reward_model.py --help
    torchrun --nproc_per_node=8 reward_model.py --model runs/sft --dataset pairs.jsonl
    python reward_model.py --model runs/reward_model --score responses.jsonl

Shapes: a micro-batch packs B examples, K sequences each (2 for pairs, 1 for ratings); A outputs of the head.

Metrics, results and departures from the papers: docs/reward_model.md
"""

import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common import certificate, checkpoint, data, dist, files, formats, models, packed, plan
from common.args import Chat, Optimization, System, Training, block, parse, refuse_ignored, snapshot
from common.evaluate import agreement
from common.loading import is_scorer
from common.log import Log
from common.packed import Example, MicroBatch, Tokens
from common.rewards import read_where_trained

SHOWN = ("loss", "accuracy", "margin", "grad_norm")
PAIRWISE = ("bt", "margin_bt", "scaled_bt")


@dataclass
class Args:
    """Reward model."""

    model: str = "toy"
    """policy to start from: toy, a run folder, a Hugging Face folder, a hub id, a .gguf file"""
    dataset: str = "toy"
    """preferences, rankings or ratings: toy, .jsonl/.json/.parquet file, folder, hub/name[:config[:split]]"""
    eval_dataset: str = ""
    """held-out data; default: the data set's test split, else 5 % of its prompts"""
    seed: int = 1
    """seed of the order of data and of samples"""
    chat: Chat = block(Chat)
    max_length: int = 2048
    """most tokens of prompt and response; a longer example is dropped, and counted; by --score refused"""
    score: str = ""
    """no training: score this file's responses with the model; goes on where it was stopped"""
    score_output: str = ""
    """the file that --score writes, a new one; default: in <output_dir>/scored, one for a file and model"""

    # algorithm
    loss: Literal["bt", "margin_bt", "scaled_bt", "kwise", "plackett_luce", "regression"] = "bt"
    """pairs: bt, margin_bt, scaled_bt; ranked responses: kwise, plackett_luce; ratings: regression"""
    attribute: str = ""
    """all but regression, on an attribute model: the output to go on from; its head weights are kept"""
    center_coef: float = 0.0
    """pairs: weight of (r_c + r_r)^2, which keeps rewards around 0; 0.01 is usual"""

    optimization: Optimization = block(Optimization, learning_rate=9e-6, lr_schedule="cosine")
    system: System = block(System)
    run: Training = block(Training, output_dir=f"runs/{Path(__file__).stem}")


def bt_loss(margins: Tensor, label_prob: Tensor | float = 1.0) -> Tensor:
    """Eq. 1 of InstructGPT for pairs, soft labels too; margins (B,) are r_chosen - r_rejected. -> (B,)"""
    return -label_prob * F.logsigmoid(margins) - (1 - label_prob) * F.logsigmoid(-margins)


def kwise_loss(rewards: Tensor, ranks: Tensor) -> Tensor:
    """Eq. 1 of InstructGPT: the mean over the pairs of one prompt's responses, which are one example. -> (B,)

    Both are (B, K); of ranks 1 is best, equal ones make no pair, NaN is no response.
    """
    better = ranks[:, :, None] < ranks[:, None, :]  # (B, K, K); False with NaN
    losses = -F.logsigmoid(rewards[:, :, None] - rewards[:, None, :])
    return (losses * better).sum((1, 2)) / better.sum((1, 2))


def plackett_luce_loss(rewards: Tensor, ranks: Tensor) -> Tensor:
    """-log P(ranking) where each place is a softmax over the responses not placed before it. -> (B,)

    Plackett 1975; equal ranks by Breslow's approximation. Shapes as in kwise_loss; K = 2 is Bradley-Terry.
    """
    left = ranks[:, None, :] >= ranks[:, :, None]  # (B, K, K): j competes for the place of i
    left = left | torch.eye(ranks.shape[1], dtype=torch.bool, device=ranks.device)  # no response: alone
    return (rewards[:, None, :].masked_fill(~left, -math.inf).logsumexp(-1) - rewards).sum(1)


def regression_loss(rewards: Tensor, labels: Tensor) -> Tensor:
    """Squared errors of the known labels; rewards and labels (B, A), unknown labels NaN. -> (B, A)"""
    return torch.where(labels.isnan(), 0.0, rewards - labels.nan_to_num()).square()


def arrange(rewards: Tensor, fields: dict[str, Tensor], args: Args) -> tuple[Tensor, Tensor]:
    """Outputs (sequences, A) as a table, and its labels (regression) or ranks, 1 best. -> (B, K or A) each"""
    if args.loss == "regression":
        return rewards, torch.stack(list(fields.values()), 1)
    if args.loss in ("kwise", "plackett_luce"):
        ranks = fields["ranks"]  # NaN where an example has fewer responses than another
        table = torch.zeros_like(ranks).index_put((~ranks.isnan()).nonzero(as_tuple=True), rewards[:, 0])
        return table, ranks
    pairs = rewards.view(-1, 2)
    return pairs, torch.arange(1.0, 3.0, device=rewards.device).expand_as(pairs)


def example_losses(table: Tensor, target: Tensor, fields: dict[str, Tensor], args: Args) -> Tensor:
    """The chosen loss of each example (B,); for regression of each entry (B, A)."""
    if args.loss == "regression":
        return regression_loss(table, target)
    if args.loss == "kwise":
        return kwise_loss(table, target)
    if args.loss == "plackett_luce":
        return plackett_luce_loss(table, target)
    margins = table[:, 0] - table[:, 1]
    shift = fields["margin"] if args.loss == "margin_bt" else 0.0
    scale = fields["margin"] if args.loss == "scaled_bt" else 1.0
    p = fields["label_prob"]  # the margin holds whichever is better: swapping the two changes nothing
    losses = scale * (p * bt_loss(margins - shift) + (1 - p) * bt_loss(-margins - shift))
    return losses + args.center_coef * table.sum(1).square()


def ordered_right(table: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Share of an example's pairs that are in the right order, and their mean margin. -> (B,), (B,)"""
    better = ranks[:, :, None] < ranks[:, None, :]
    margins = table[:, :, None] - table[:, None, :]
    pairs = better.sum((1, 2))
    return ((margins > 0) & better).sum((1, 2)) / pairs, (margins * better).sum((1, 2)) / pairs


def loss_and_metrics(
    scorer: models.Scorer, micro_batch: MicroBatch, args: Args
) -> tuple[Tensor, dict[str, tuple]]:
    """Loss of a micro-batch, a sum that the caller divides by `count_losses`, and metrics as (sum, count)."""
    rewards = models.rewards(scorer, micro_batch)  # (sequences, A); a dummy has none, and a loss of zero
    table, target = arrange(rewards, micro_batch.fields, args)
    loss = example_losses(table, target, micro_batch.fields, args).sum()
    if args.loss == "regression":
        num_losses = (~target.isnan()).sum()
        own = {"mae": (regression_loss(table, target).sqrt().sum(), num_losses)}
    else:
        num_losses, (right, margins) = len(table), ordered_right(table, target)
        own = {"accuracy": (right.sum(), num_losses), "margin": (margins.sum(), num_losses)}
    metrics = {
        "loss": (loss, num_losses),
        "mean_reward": (rewards.sum(), rewards.numel()),
        "reward_std": (rewards.square().sum(), rewards.numel()),  # made a standard deviation by `main`
        **own,
    }
    return loss, metrics


def count_losses(batch: list[Example], args: Args) -> int:
    """What divides a batch's loss, over all rows and ranks: its examples, or its known labels."""
    if args.loss != "regression":
        return len(batch)
    return max(1, sum(not math.isnan(label) for example in batch for label in example.fields.values()))


def evaluation(rewards: Tensor, examples: list[Example], args: Args) -> dict[str, float]:
    """Metrics of held-out examples from their rewards (sequences, A), on the host."""
    fields = packed.make_micro_batch(examples, [*range(len(examples))], rewards.device).fields
    table, target = arrange(rewards, fields, args)
    metrics = {
        "loss": example_losses(table, target, fields, args).sum().item() / count_losses(examples, args),
        "mean_reward": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        "min_reward": rewards.min().item(),
        "max_reward": rewards.max().item(),
    }
    if args.loss == "regression":
        for k, name in enumerate(fields):
            found = agreement(target[:, k].numpy(), table[:, k].numpy())  # a missing label is NaN
            metrics |= {f"{kind}/{name}": value for kind, value in found.items()}
        return metrics
    right, margins = ordered_right(table, target)
    low, high = wilson_interval(right.sum().item(), len(right))
    lengths = torch.tensor([float(mask.sum()) for e in examples for _, mask in e.sequences])
    lengths, _ = arrange(lengths[:, None], fields, args)
    return metrics | {
        "accuracy": right.mean().item(),
        "accuracy_low": low,
        "accuracy_high": high,
        "length_accuracy": length_accuracy(lengths, target),
        "margin": margins.mean().item(),
        "calibration_error": calibration_error(table, target),
    }


def length_accuracy(lengths: Tensor, ranks: Tensor) -> float:
    """Accuracy of the rule that the longer response is better, or of its opposite; all (B, K).

    Equal lengths are a coin flip.
    """
    longer, shorter = (ordered_right(x, ranks)[0].mean().item() for x in (lengths, -lengths))
    return (1 + abs(longer - shorter)) / 2


def wilson_interval(hits: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share, Wilson 1927."""
    share, spread = hits / count, z**2 / count
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


def calibration_error(table: Tensor, ranks: Tensor, num_bins: int = 10) -> float:
    """Expected |confidence - accuracy| of sigmoid(margin) over pairs, Guo et al. 2017, in equal bins."""
    i, j, k = (ranks[:, :, None] < ranks[:, None, :]).nonzero(as_tuple=True)
    margins = table[i, j] - table[i, k]
    confidence = torch.sigmoid(margins.abs())  # 1/2 to 1
    bins = ((confidence - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    gaps = torch.zeros(num_bins).index_add(0, bins, confidence - (margins > 0).float())
    return gaps.abs().sum().item() / len(margins)


def eval_sets(eval_set: data.Dataset, args: Args) -> dict[str, list[Example]]:
    """Held-out examples by the name of their file, which prefixes their metrics where there are several."""
    sources = formats.read_sources(args.eval_dataset or args.dataset)
    stems = [Path(source).name.split(".")[0] for source, _ in sources]
    names = [f"{x}/" if stems.count(x) == 1 else f"{x}_{i}/" for i, x in enumerate(stems, 1)]
    names, parts = names if len(names) > 1 else [""], itertools.pairwise(eval_set.starts)
    return {name: eval_set[start:end] for name, (start, end) in zip(names, parts, strict=True)}


def load_examples(args: Args, tokenizer: Any) -> tuple[data.Dataset, data.Dataset]:
    """(train, eval) in the form the loss needs."""
    sources = (tokenizer, args.dataset, args.eval_dataset, args.max_length)
    if args.loss == "regression":
        return data.load_ratings(*sources)
    if args.loss in ("kwise", "plackett_luce"):
        return data.load_ranked(*sources)
    datasets = data.load_pairs(*sources, cut="drop")
    positive = datasets[0].field("margin") > 0
    if args.loss == "scaled_bt" and not positive.all():
        raise formats.wrong("scaled_bt", "pairs without margin", "a margin above 0, their weight, in each")
    if args.loss == "margin_bt" and not positive.any():
        raise formats.wrong("margin_bt", "no pair with a margin", "the field margin; without it this is bt")
    return datasets


def score_file(args: Args, device: torch.device) -> None:
    """Write the records of a file again with the rewards of their responses; complete or not at all.

    A response gets `reward`, or from an attribute model `label`, so that the result is a file of ratings; a
    preference gets `chosen_reward` and `rejected_reward`, `responses` get `rewards`. Stopped, it goes on from
    the records done when called again with the same file and model. What is written never stands beside what
    is read: a data folder must not have its records twice.
    """
    path = Path(args.score).expanduser()
    origin = hashlib.sha256(f"{path.resolve()} {args.model}".encode()).hexdigest()[:8]
    default = Path(args.run.output_dir) / "scored" / f"{path.name.removesuffix('.jsonl')}-{origin}.jsonl"
    target = Path(args.score_output or default).expanduser()
    dist.outlive_readers()
    dist.from_main(lambda: check_target(target, path, args.run.overwrite or not args.score_output))
    tokenizer = data.load_tokenizer(args.model, **vars(args.chat))
    scorer = models.load_scorer(args.model, device, args.system, trainable=False)
    read_where_trained(scorer, tokenizer)
    names = models.output_names(scorer)
    records = formats.read_file(path)

    def encode(record: formats.Record) -> list[Tokens]:
        return data.read_responses(tokenizer, *record, args.max_length)

    def check(record: formats.Record) -> None:
        encode(record)
        try:
            json.dumps(record.value)
        except TypeError as error:  # dates and bytes of a table
            raise formats.wrong(record.where, error, "texts, numbers, lists and objects") from error

    dist.parallel_map(check, records)  # a bad one ends the run before the work

    def work(chunk: list[formats.Record]) -> list[dict]:
        found = dist.parallel_map(encode, chunk)
        examples = [Example(sequences, "") for sequences in found]
        outputs = iter(models.score(scorer, examples, args.system.micro_batch_tokens, device).tolist())
        scored = [[next(outputs) for _ in sequences] for sequences in found]
        return [r.value | with_rewards(r.value, own, names) for r, own in zip(chunk, scored, strict=True)]

    files.write_lines(target, records, (files.fingerprint(args.model), args.system.dtype, args.chat), work)
    if dist.is_main():
        print(f"{len(records):,} records scored: {target}", flush=True)
        print_accuracy(record.value for record in formats.read_file(target))


def print_accuracy(scored: Iterable[dict]) -> None:
    """Shares of pairs whose chosen response has the higher reward, by the field `subset` as in RewardBench.

    Equal rewards count as wrong; the mean over subsets gives each the same weight.
    """
    right: dict[str, list[bool]] = {}
    for record in scored:
        if isinstance(record.get("chosen_reward"), float):  # an attribute model gives several numbers
            subset = right.setdefault(str(record.get("subset", "")), [])
            subset.append(record["chosen_reward"] > record["rejected_reward"])
    shares = {name: (sum(found) / len(found), len(found)) for name, found in sorted(right.items())}
    for name, (share, count) in shares.items() if len(shares) > 1 else ():
        print(f"accuracy {share:.3f} of {count:,} pairs: {name or 'without subset'}", flush=True)
    if shares:
        mean = sum(share for share, _ in shares.values()) / len(shares)
        share = sum(share * count for share, count in shares.values()) / sum(n for _, n in shares.values())
        more = f", {mean:.3f} as the mean over {len(shares)} subsets" if len(shares) > 1 else ""
        print(f"accuracy {share:.3f} of {sum(n for _, n in shares.values()):,} pairs{more}", flush=True)


def check_target(target: Path, source: Path, overwrite: bool) -> None:
    """Make the folder of a file that is to be written; one that is there stays until the new one is whole."""
    name, is_there = f"score_output {target}", target.exists()
    if is_there and not target.is_file():
        raise formats.wrong(name, "a folder, or a device", "a file, which --score writes")
    if is_there and source.exists() and target.samefile(source):
        raise formats.wrong(name, "the file that is scored", "another one")
    if is_there and not overwrite:
        raise formats.wrong(name, "a file", "a new one, or --overwrite to replace it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise formats.wrong(name, error.strerror, "a folder to write in") from error


def with_rewards(value: dict, outputs: list[list[float]], names: list[str]) -> dict[str, Any]:
    """The fields that scoring adds to a record, from the outputs for each of its responses."""
    labels = [output[0] if len(names) == 1 else dict(zip(names, output, strict=True)) for output in outputs]
    if value.get("responses") is not None:
        return {"rewards": labels}
    if len(labels) == 2:
        return {"chosen_reward": labels[0], "rejected_reward": labels[1]}
    return {"reward" if len(names) == 1 else "label": labels[0]}


def check(args: Args) -> None:
    """Refuse settings that cannot go together, before any work starts."""
    if args.score:
        names = ("eval_dataset", "loss", "attribute", "center_coef")
        refuse_ignored(args, TOY, "--score", dict.fromkeys(names, False) | {"dataset": not args.dataset})
    used = {"attribute": args.loss != "regression", "center_coef": args.loss in PAIRWISE}
    refuse_ignored(args, TOY, f"loss {args.loss}", used)
    refuse_ignored(args, TOY, "a training run", {"score_output": args.score})
    folder = files.model_folder
    if args.attribute and not dist.from_main(lambda: is_scorer(folder(args.model, needs_weights=False)[0])):
        expected = f"a reward model with that output; {args.model} has none: leave it out"
        raise formats.wrong("attribute", args.attribute, expected)


TOY = dict(learning_rate=1e-3, warmup_steps=5, batch_size=64, max_steps=40, eval_every=20)


def main(args: Args, pipeline: Log | None = None) -> None:
    # setup
    device = dist.init(args.seed)
    check(args)
    plan.show(args, sequences=2)
    optimization, system, run = args.optimization, args.system, args.run
    if args.score:
        return score_file(args, device)
    log = Log(run, __file__, SHOWN, snapshot(args, TOY), pipeline)

    # data
    tokenizer = data.load_tokenizer(args.model, **vars(args.chat))
    train_set, eval_set = load_examples(args, tokenizer)
    num_steps = data.num_steps(train_set, optimization.batch_size, run.num_epochs, run.max_steps)
    how = (optimization.batch_size, args.seed, run.num_epochs, run.max_steps)  # batches are made
    if log.is_finished(num_steps, files.inputs(args.model, tokenizer, train_set, eval_set)):
        return
    log.start(num_steps, optimization)

    # models
    names = list(train_set[0].fields) if args.loss == "regression" else [args.attribute or "reward"]
    scorer = models.load_scorer(args.model, device, system, names)
    scorer.config.reward_mean = scorer.config.reward_std = None  # not those of the model it starts from
    scorer.config.score_at = "end"  # of the reply, whatever the template writes after it
    optimizer = models.adamw(scorer, optimization)
    loss = functools.partial(loss_and_metrics, scorer, args=args)
    certificate.training(args, scorer, tokenizer, train_set, loss)
    parts = {"policy": (scorer, optimizer)}
    resumed = checkpoint.resume(run.output_dir, parts)
    start_step, num_tokens = resumed["step"], resumed["num_tokens"]

    def rewards_of(examples: list[Example]) -> Tensor:
        return models.score(scorer, examples, system.micro_batch_tokens, device)

    def evaluate() -> dict[str, float]:
        metrics = {}
        for name, examples in eval_sets(eval_set, args).items():
            found = evaluation(rewards_of(examples).cpu(), examples, args)
            metrics |= {f"eval/{name}{metric}": value for metric, value in found.items()}
        return metrics

    if start_step == 0:
        log(0, num_steps, evaluate())

    for step in range(start_step + 1, num_steps + 1):
        # update
        step_start = time.perf_counter()
        batch = data.batch(train_set, step, *how)  # the same on every rank
        num_losses = count_losses(batch, args)
        lr = optimization.learning_rate * models.lr_factor(step, num_steps, optimization)
        models.set_lr(optimizer, lr)
        totals = dist.Totals()
        for micro_batch in packed.micro_batches(batch, system.micro_batch_tokens, device):
            loss, metrics = loss_and_metrics(scorer, micro_batch, args)
            (loss / num_losses).backward()  # gradients add over micro-batches and ranks
            totals.update(metrics)
        grad_norm = models.clip_grad_norm(scorer, optimization.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        totals.update({"grad_norm": (grad_norm, 1)})
        metrics = totals.reduce("train/")  # the step's one synchronisation
        seconds = time.perf_counter() - step_start

        # evaluate
        num_tokens += sum(example.num_tokens for example in batch)
        variance = metrics["train/reward_std"] - metrics["train/mean_reward"] ** 2
        metrics["train/reward_std"] = math.sqrt(max(0.0, variance))
        metrics["train/epoch"] = step * optimization.batch_size / train_set.epoch_size
        metrics |= {"train/num_tokens": num_tokens, "train/learning_rate": lr}
        metrics |= models.speed(scorer, batch, seconds)
        stop = dist.stop_requested()
        if step % run.eval_every == 0 or step == num_steps:
            metrics |= evaluate()

        # log and save
        log(step, num_steps, metrics)
        if step % run.save_every == 0 or step == num_steps or stop:
            checkpoint.save(run, step, parts, num_tokens=num_tokens)
        if stop and step < num_steps:
            return log.finish(stopped_at=step)

    # centre on training responses, at most 1,024 examples
    rewards = rewards_of(train_set[:: -(-len(train_set) // 1024)])
    scorer.config.reward_mean = rewards.mean(0).tolist()
    scorer.config.reward_std = rewards.std(0, correction=0).clamp(min=1e-6).tolist()
    # a padding token that cannot end a response: transformers reads the score at the last other token
    special = [tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.added_tokens_decoder, 0, 1]
    scorer.config.pad_token_id = next(x for x in special if x not in (None, data.end_token(tokenizer)))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(scorer.config.pad_token_id)
    checkpoint.export(run, scorer, tokenizer, args.model)
    log.finish()


if __name__ == "__main__":
    dist.run(main, parse(Args, TOY))
