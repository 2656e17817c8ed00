"""Self-Play Fine-Tuning (Chen et al., 2024), https://arxiv.org/abs/2401.01335

In each iteration the policy plays against the opponent pi_t, itself as it was when the iteration began. It
learns to tell the responses of the data (real, y) from those the opponent samples (generated, y'):

    r(x, y) = beta * log(pi(y|x) / pi_t(y|x))          Eq. 4.6; beta is the paper's lambda
    loss    = ell(r(x, y) - r(x, y')), ell(z) = log(1 + exp(-z))        Eq. 4.7

Minimised exactly, pi_(t+1) ~ pi_t^(1 - 1/beta) p_data^(1/beta) (Theorem 5.4): where policy and data agree,
nothing moves.

    python spin.py --help
    torchrun --nproc_per_node=8 spin.py --model runs/sft --dataset demonstrations.jsonl

Shapes: a micro-batch packs B pairs as 2B sequences end to end (real, generated, real, ...), N tokens
in all; N_targets of them are response tokens, the ones that are scored.

Metrics, results and departures from the paper: docs/spin.md
"""

import bisect
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import certificate, checkpoint, data, dist, files, formats, labels, models, packed, plan
from common.args import Chat, Optimization, Run, Sampling, System, block, parse, snapshot
from common.evaluate import Answer, Judge, answer, answer_metrics, load_judge
from common.generate import generate
from common.log import Log
from common.packed import Example, MicroBatch

SHOWN = ("iteration", "loss", "rewards/accuracies", "rewards/margins", "nll", "distance", "grad_norm")
LOGPS = ("ref_real_logps", "ref_generated_logps")  # log pi_t of the two sides of a pair


@dataclass
class IteratedOptimization(Optimization):
    """How AdamW is run, its state and its schedule begun anew in every iteration."""

    learning_rate: float | list[float] = 5e-7
    """peak learning rate, reached anew in every iteration; one value, or one for each iteration"""


@dataclass
class IteratedRun(Run):
    """Where a run is kept, how long it takes and what it records on the way."""

    fixed: ClassVar[tuple[str, ...]] = ("num_epochs",)  # it decides where the next iteration begins

    num_iterations: int = 3
    """times that the policy becomes the sampler"""
    num_epochs: int | list[int] = 2
    """passes over the pairs of an iteration; one value, or one for each iteration"""


@dataclass
class Args:
    """Self-Play Fine-Tuning."""

    model: str = "toy"
    """policy to start from: toy, a run folder, a Hugging Face folder, a hub id, a .gguf file"""
    dataset: str = "toy"
    """demonstrations: toy, .jsonl/.json/.parquet file, folder, hub/name[:config[:split]]; a,b*2 mixes"""
    eval_dataset: str = ""
    """held-out data; default: the data set's test split, else 5 % of its prompts"""
    seed: int = 1
    """seed of the order of data and of samples"""
    chat: Chat = block(Chat)
    max_length: int = 1024
    """tokens of prompt and response; a prompt without room for max_new_tokens more is dropped, and counted"""

    # algorithm
    loss: Literal["logistic", "hinge"] = "logistic"
    """the convex function ell of Eq. 4.7"""
    beta: float | list[float] = 0.1
    """pull towards the opponent; larger stays closer; one value, or one for each iteration"""
    num_prompts: int = 50000
    """prompts sampled in an iteration"""
    mix_previous: bool = True
    """train on the samples of the iteration before as well"""
    max_new_tokens: int = 512
    """most tokens of a response, real or generated; a longer one is cut, and counted"""
    temperature: float = 1.0
    """temperature at which the opponent samples"""
    top_p: float = 1.0
    """sample from the fewest tokens that hold this much of the mass"""

    optimization: IteratedOptimization = block(IteratedOptimization, lr_schedule="linear")
    system: System = block(System)
    run: IteratedRun = block(IteratedRun, output_dir=f"runs/{Path(__file__).stem}")


def spin_loss(h: Tensor, beta: float, ell: str = "logistic") -> Tensor:
    """Eq. 4.7 for each pair; h (B,) is log(pi/pi_t) of real minus that of generated, in nats. -> (B,)"""
    return -F.logsigmoid(beta * h) if ell == "logistic" else (1 - beta * h).relu()


def response_logps(token_logps: Tensor, micro_batch: MicroBatch) -> Tensor:
    """log pi(y|x) of every pair of a micro-batch: the sum of log p over response tokens. -> (B, 2)"""
    return packed.segment_sum(token_logps, micro_batch.target_segments, micro_batch.num_segments).view(-1, 2)


def opponent_logps(
    policy: models.Policy, pairs: list[Example], micro_batch_tokens: int, device: torch.device
) -> list[dict[str, float]]:
    """log pi_t(y|x) and log pi_t(y'|x) of each pair, by LOGPS, while the policy is the opponent."""

    def logps(micro_batch: MicroBatch) -> Tensor:
        return response_logps(policy(micro_batch).logps, micro_batch).flatten()

    found = packed.table(logps, pairs, micro_batch_tokens, device).view(-1, 2)
    return [dict(zip(LOGPS, both, strict=True)) for both in found.tolist()]


def loss_and_metrics(
    policy: models.Policy, micro_batch: MicroBatch, beta: float, ell: str = "logistic"
) -> tuple[Tensor, dict[str, tuple]]:
    """Loss of a micro-batch, a sum over its pairs that the caller divides, and metrics as (sum, count)."""
    stats = policy(micro_batch)  # (N_targets,) each
    logps = response_logps(stats.logps, micro_batch)  # (B, 2); a dummy has B = 0 and a loss of exactly zero
    lengths = response_logps(torch.ones_like(stats.logps), micro_batch)
    mean_logits = response_logps(stats.mean_logit, micro_batch) / lengths
    ref_logps = torch.stack([micro_batch.fields[name] for name in LOGPS], 1)
    ratios = logps - ref_logps
    loss = spin_loss(ratios[:, 0] - ratios[:, 1], beta, ell).sum()
    real, generated = (beta * ratios).unbind(1)
    num_pairs, num_targets = len(logps), len(stats.logps)
    metrics = {
        "loss": (loss, num_pairs),
        "rewards/real": (real.sum(), num_pairs),
        "rewards/generated": (generated.sum(), num_pairs),
        "rewards/margins": ((real - generated).sum(), num_pairs),
        "rewards/accuracies": ((real > generated).sum(), num_pairs),
        "logps/real": (logps[:, 0].sum(), num_pairs),
        "logps/generated": (logps[:, 1].sum(), num_pairs),
        "logits/real": (mean_logits[:, 0].sum(), num_pairs),
        "logits/generated": (mean_logits[:, 1].sum(), num_pairs),
        "nll": (-logps[:, 0].sum(), lengths[:, 0].sum()),
        "entropy": (stats.entropy.sum(), num_targets),
        "mean_token_accuracy": (stats.accuracy.sum(), num_targets),
    }
    return loss, metrics


def load_demonstrations(args: Args, tokenizer: Any) -> tuple[data.Dataset, data.Dataset]:
    """(train, eval): the last reply of each conversation after all that comes before it, one sequence.

    Real responses are cut where generated ones are, so that their length tells nothing.
    """
    most_new, most = args.max_new_tokens, args.max_length

    def encode(value: dict, where: str) -> Example:
        if value.get("real") is not None:  # a file of the release; what it holds as generated is not read
            value = {**value, "messages": value["real"]}
        prompt, response = formats.read_exchange(tokenizer, value, where)
        labels.attach_labels(value, prompt + response, where)
        if response and not formats.says_something(response[-1]):
            raise formats.LeftOut("an empty reply")
        tokens, mask = data.encode_response(tokenizer, prompt, response)
        end = int(mask.argmax()) + most_new if mask.any() else 0
        if end > most:
            raise formats.LeftOut("a prompt and max_new_tokens that are longer than max_length")
        label = response[0].get("label", "") if response else ""
        return Example([packed.Tokens(tokens[:end], mask[:end])], prompt, label=label)

    datasets = data.load(tokenizer, "sft", encode, args.dataset, args.eval_dataset, args.max_length)
    for name, examples in zip(("train on", "evaluate on"), datasets, strict=True):
        num_cut = sum(response_tokens(e.sequences[0])[-1] != data.end_token(tokenizer) for e in examples)
        if dist.is_main() and num_cut:
            print(f"sft: {num_cut:,} responses to {name} cut, by max_new_tokens {args.max_new_tokens}")
    return datasets


def prompt_tokens(sequence: packed.Tokens) -> list[int]:
    tokens, mask = sequence
    return tokens[: mask.argmax()].tolist()


def response_tokens(sequence: packed.Tokens) -> list[int]:
    tokens, mask = sequence
    return tokens[mask].tolist()


def response_text(tokenizer: Any, sequence: packed.Tokens) -> str:
    return tokenizer.decode(response_tokens(sequence), skip_special_tokens=True)


def make_pair(example: Example, generated: list[int], **logps: float) -> Example:
    """Real and generated after the same prompt tokens; `generated` as sampled, never text encoded anew."""
    prompt = prompt_tokens(example.sequences[0])
    tokens = np.array(prompt + generated, np.int32)
    sampled = (tokens, np.arange(len(tokens)) >= len(prompt))
    return Example([example.sequences[0], sampled], example.prompt, logps)


def play(
    policy: models.Policy,
    tokenizer: Any,
    examples: list[Example],
    earlier: list[dict],
    path: Path,
    origin: dict[str, Any],
    first: int,
    args: Args,
    device: torch.device,
) -> None:
    """Write the pairs of an iteration, one a line: a sample for each example, then those of `earlier` lines.

    All are scored by the policy as it is, the opponent: training needs no more of it. Stopped, the next call
    goes on where it was.

    Args:
        origin: iteration, opponent and seed of the samples.
        first: index of the first sample among all of the iteration, for its random numbers.
    """
    there = dist.from_main(lambda: next(iter(files.read_rows(path)), {}))
    if there | origin == there:
        return
    items, sides = [*range(len(examples) + len(earlier))], [example.sequences[0] for example in examples]
    samples = generate(
        policy,
        tokenizer,
        [prompt_tokens(side) for side in sides],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        step=origin["iteration"],
        first_index=first,
        keep=files.part_name(path, items, origin).with_suffix(".replies"),
    )

    def line(i: int) -> dict:
        if i >= len(examples):
            return earlier[i - len(examples)]
        prompt, real, sample = examples[i].prompt, sides[i], samples[i]
        texts = {"prompt": prompt, "real": response_text(tokenizer, real), "generated": sample.text}
        tokens = {"real_tokens": response_tokens(real), "generated_tokens": sample.tokens}
        return origin | texts | {"ended": sample.ended} | tokens

    def work(chunk: list[int]) -> list[dict]:
        lines = [line(i) for i in chunk]
        generated = [record["generated_tokens"] for record in lines]
        pairs = [make_pair(examples[i % len(examples)], g) for i, g in zip(chunk, generated, strict=True)]
        logps = opponent_logps(policy, pairs, args.system.micro_batch_tokens, device)
        return [record | own for record, own in zip(lines, logps, strict=True)]

    files.write_lines(path, items, origin, work)


def read_pairs(path: Path, examples: list[Example], origin: dict[str, Any]) -> data.Dataset:
    """The pairs that `play` wrote for these examples.

    Raises:
        RunError: the file is of another origin or other data; the opponent it would need is gone.
    """
    pairs = []
    for i, (record, where) in enumerate(formats.read_file(path)):
        example = examples[i % len(examples)]
        if i == 0 and record | origin != record:
            raise formats.wrong(where, f"a sample of {record['opponent']}", f"one of {origin['opponent']}")
        if record["real_tokens"] != response_tokens(example.sequences[0]):
            raise formats.wrong(where, "another response", "that of the data, which has changed; --overwrite")
        logps = {name: record[name] for name in LOGPS}
        pairs.append(make_pair(example, record["generated_tokens"], **logps))
    return data.Dataset([(pairs, 1.0)])


def describe(pairs: list[Example], tokenizer: Any) -> dict[str, float]:
    """What the two sides of an iteration's pairs look like apart from what they say."""
    end = data.end_token(tokenizer)
    real, generated = ([response_tokens(pair.sequences[side]) for pair in pairs] for side in (0, 1))
    return {
        "eval/generated/length": fmean(map(len, generated)),
        "eval/generated/max_length": max(map(len, generated)),
        "eval/generated/ended_frac": fmean(tokens[-1] == end for tokens in generated),
        "eval/generated/equals_real_frac": fmean(a == b for a, b in zip(real, generated, strict=True)),
        "eval/real/length": fmean(map(len, real)),
        "eval/real/ended_frac": fmean(tokens[-1] == end for tokens in real),
    }


def distances(scores: list[dict[str, float]], real_scores: list[dict[str, float]]) -> dict[str, float]:
    """Wasserstein-1 distance between two equally many scores, each name alone, and the mean over names."""
    found = {}
    for name in scores[0]:
        ours, theirs = (sorted(s[name] for s in side) for side in (scores, real_scores))
        found[f"distance/{name}"] = fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return {"distance": fmean(found.values()), **found}


def distances_to_real(answers: list[Answer], judge: Judge | None, tokenizer: Any) -> dict[str, float]:
    """Distances between the judge's scores of answers and those of the real responses to their prompts."""
    if not judge or not answers:
        return {}
    real = [response_text(tokenizer, a.example.sequences[0]) for a in answers]
    real_scores = [judge(a.prompt, text) for a, text in zip(answers, real, strict=True)]
    return distances([a.scores for a in answers], real_scores)


class Settings(NamedTuple):
    """Those of one iteration."""

    beta: float
    learning_rate: float
    num_epochs: int


def of_iteration(args: Args, number: int) -> Settings:
    """The settings of one iteration; the last value of a list serves all later ones."""
    given = Settings(args.beta, args.optimization.learning_rate, args.run.num_epochs)
    for name, values in given._asdict().items():
        if values == []:
            raise formats.wrong(name, "nothing", "one value, or one for each iteration")
    return Settings(*(x[min(number, len(x) - 1)] if isinstance(x, list) else x for x in given))


def iteration_boundaries(num_prompts: int, args: Args) -> list[int]:
    """The optimizer steps after which iterations 0, 1, ... begin, then that at which the last one ends."""
    steps = [0]
    for number in range(args.run.num_iterations):
        num_pairs = num_prompts * (2 if args.mix_previous and number > 0 else 1)
        num_examples = of_iteration(args, number).num_epochs * num_pairs
        steps.append(steps[-1] + -(-num_examples // args.optimization.batch_size))
    return steps


def check(args: Args) -> None:
    """Refuse settings that cannot go together, before any work starts."""
    if args.temperature <= 0:
        raise dist.RunError("temperature 0 is greedy; self-play samples, expected more than 0")
    if args.max_new_tokens >= args.max_length:
        raise formats.wrong("max_new_tokens", args.max_new_tokens, f"less than max_length, {args.max_length}")
    of_iteration(args, 0)


def checks(
    policy: models.Policy, tokenizer: Any, train_set: data.Dataset, args: Args, device: torch.device
) -> Iterator[certificate.Line]:
    """What --check tries, on pairs with short samples of the policy, its own opponent."""
    chosen = certificate.few(train_set)
    prompts = [prompt_tokens(example.sequences[0]) for example in chosen]
    samples = generate(policy, tokenizer, prompts, max_new_tokens=16, temperature=args.temperature)
    pairs = [make_pair(example, sample.tokens) for example, sample in zip(chosen, samples, strict=True)]
    found = opponent_logps(policy, pairs, args.system.micro_batch_tokens, device)
    for pair, logps in zip(pairs, found, strict=True):
        pair.fields = logps
    loss = functools.partial(loss_and_metrics, policy, beta=of_iteration(args, 0).beta, ell=args.loss)
    known = {"rewards/margins": 0.0, "loss": math.log(2) if args.loss == "logistic" else 1.0}
    yield from certificate.of_training(args, policy, tokenizer, train_set, loss, known, pairs)


TOY = dict(beta=1.0, num_iterations=3, num_epochs=1, num_prompts=576, learning_rate=5e-4, warmup_steps=2)
TOY |= dict(batch_size=64, max_new_tokens=48, num_samples=200)


def main(args: Args) -> None:
    # setup
    device = dist.init(args.seed)
    check(args)
    plan.show(args, sequences=2)
    optimization, system, run = args.optimization, args.system, args.run
    log = Log(run, __file__, SHOWN, snapshot(args, TOY))

    # data
    tokenizer = data.load_tokenizer(args.model, **vars(args.chat))
    train_set, eval_set = load_demonstrations(args, tokenizer)
    prompts = [train_set[i] for i in train_set.order(args.seed, 0)[: args.num_prompts]]  # of each iteration
    if len(prompts) < optimization.batch_size:
        raise formats.wrong("num_prompts", len(prompts), f"batch_size, {optimization.batch_size}, or more")
    boundaries = iteration_boundaries(len(prompts), args)
    num_steps = boundaries[-1] if run.max_steps < 0 else min(run.max_steps, boundaries[-1])
    judge = load_judge(run.judge, args.dataset)
    if log.is_finished(num_steps, files.inputs(args.model, tokenizer, train_set, eval_set)):
        return
    log.start(num_steps)

    # models
    policy = models.load(args.model, device, system)
    optimizer = models.adamw(policy, optimization)
    certificate.run(run, checks(policy, tokenizer, train_set, args, device))
    parts = {"policy": (policy, optimizer)}
    resumed = checkpoint.resume(run.output_dir, parts)
    start_step, num_tokens = resumed["step"], resumed["num_tokens"]
    run_id = resumed.get("run") or log.fingerprint()

    def start_iteration(number: int, step: int) -> tuple[Settings, data.Dataset, data.Dataset]:
        """An iteration's settings and its pairs, to train and to evaluate on."""
        folder, begin, earlier = Path(run.output_dir), boundaries[number], []
        origin = {"iteration": number, "opponent": f"step {begin} of {run_id}", "seed": args.seed}
        held_out, generated = (folder / f"{name}_{number}.jsonl" for name in ("held_out", "generated"))
        # only at its first step is the policy the opponent; resumed later, the files of then are all there is
        if step == begin:
            optimizer.state.clear()
            if args.mix_previous and number > 0:
                lines = formats.read_file(folder / f"generated_{number - 1}.jsonl")
                earlier = [line.value for line in lines if line.value["iteration"] == number - 1]
            play(policy, tokenizer, eval_set, [], held_out, origin, 0, args, device)
            play(policy, tokenizer, prompts, earlier, generated, origin, len(eval_set), args, device)
        pairs = (read_pairs(generated, prompts, origin), read_pairs(held_out, eval_set, origin))
        return of_iteration(args, number), *pairs

    # the last iteration that has begun; at a boundary, the one that begins there, but not beyond the run
    number = max(0, bisect.bisect_right(boundaries, min(start_step, num_steps - 1)) - 1)
    settings, train_pairs, eval_pairs = start_iteration(number, start_step)

    def evaluate(step: int) -> dict[str, float]:
        totals = dist.Totals()
        for micro_batch in packed.micro_batches(eval_pairs, system.micro_batch_tokens, device):
            with torch.no_grad():
                totals.update(loss_and_metrics(policy, micro_batch, settings.beta, args.loss)[1])
        metrics = totals.reduce("eval/") | describe(eval_pairs, tokenizer)
        sampling = Sampling(args.max_new_tokens, args.temperature)
        answers = answer(policy, tokenizer, eval_set, run.num_samples, sampling, args.seed, step, judge)
        log.samples(step, [a.row() for a in answers])
        apart = distances_to_real(answers, judge, tokenizer)
        return metrics | answer_metrics(answers) | {f"eval/{name}": value for name, value in apart.items()}

    if start_step == 0:
        log(0, num_steps, evaluate(step=0))

    for step in range(start_step + 1, num_steps + 1):
        # generate: the policy becomes the opponent
        if step > boundaries[number + 1]:
            number += 1
            settings, train_pairs, eval_pairs = start_iteration(number, step - 1)
        k, length = step - boundaries[number], boundaries[number + 1] - boundaries[number]
        is_last = step in (boundaries[number + 1], num_steps)

        # update
        step_start = time.perf_counter()
        how = (optimization.batch_size, args.seed, settings.num_epochs)
        batch = data.batch(train_pairs, k, *how)  # the same on every rank
        lr = settings.learning_rate * models.lr_factor(k, length, optimization)
        models.set_lr(optimizer, lr)
        totals = dist.Totals()
        for micro_batch in packed.micro_batches(batch, system.micro_batch_tokens, device):
            loss, metrics = loss_and_metrics(policy, micro_batch, settings.beta, args.loss)
            (loss / len(batch)).backward()  # gradients add over micro-batches and ranks
            totals.update(metrics)
        grad_norm = models.clip_grad_norm(policy, optimization.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        totals.update({"grad_norm": (grad_norm, 1)})
        metrics = totals.reduce("train/")  # the step's one synchronisation
        seconds = time.perf_counter() - step_start

        # evaluate
        num_tokens += sum(example.num_tokens for example in batch)
        metrics["train/iteration"] = number
        metrics["train/epoch"] = k * optimization.batch_size / train_pairs.epoch_size
        metrics |= {"train/num_tokens": num_tokens, "train/learning_rate": lr}
        metrics |= models.speed(policy, batch, seconds)
        stop = dist.stop_requested()
        if step % run.eval_every == 0 or is_last:
            metrics |= evaluate(step)

        # log and save: always before the policy becomes the opponent
        log(step, num_steps, metrics)
        if step % run.save_every == 0 or is_last or stop:
            checkpoint.save(run, step, parts, num_tokens=num_tokens, run=run_id)
        if stop and step < num_steps:
            return log.finish(stopped_at=step)

    checkpoint.export(run, policy, tokenizer, args.model)
    log.finish()


if __name__ == "__main__":
    dist.run(main, parse(Args, TOY))
