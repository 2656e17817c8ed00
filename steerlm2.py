r"""SteerLM 2.0: a policy that follows attributes, trained towards the exact conditional distribution

Section 4.5 of HelpSteer2 (Wang et al., 2024), https://arxiv.org/abs/2406.08673. With x a prompt and a the
wanted attributes, the target is the posterior P(y|a, x) ~ P(a|x, y) P(y|x), Eq. 1. Of n responses sampled
from Q', the policy of the last iteration, each has the weight it should have and the one the policy gives:

    w'_i = softmax_i( log P(a|x, y_i) + log P(y_i|x) - log Q'(y_i|a, x) )      Eq. 6, 7
    b'_i = softmax_i( log Q(y_i|a, x) - log Q'(y_i|a, x) )                     Eq. 9, 10
    loss = sum_i w'_i log(w'_i / b'_i)                                         Eq. 12; its gradient is Eq. 11

    python steerlm2.py --help
    torchrun --nproc_per_node=8 steerlm2.py --model runs/steerlm --sft_model runs/sft \
        --attribute_model runs/reward_model --dataset prompts.jsonl
    torchrun --nproc_per_node=8 steerlm2.py --model runs/steerlm --groups groups.jsonl

Shapes: G groups of at most n responses, NaN in the place of one that a smaller group lacks; A attributes; a
micro-batch packs whole groups.

Metrics, results and departures from the papers: docs/steerlm2.md
"""

import functools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from common import certificate, checkpoint, data, dist, files, formats, labels, models, packed, plan
from common.args import Chat, Optimization, Run, Sampling, System, block, parse, refuse_ignored, snapshot
from common.evaluate import answer, answer_metrics, load_judge
from common.generate import generate, to_example
from common.groups import SCORES, as_record, load_groups, read_group, read_groups
from common.log import Log
from common.packed import Example, MicroBatch
from common.rewards import load_rater
from common.templates import check_prompts

SHOWN = ("loss", "ess", "w_max", "grad_norm", "follow/mae", "follow/pearson")
GROUP_FIELDS = ("sampler_logps", "log_weights")  # of an example: log Q' and log w of its n responses
OF_SAMPLING = ("dataset", "sft_model", "attributes", "num_responses", "num_prompts", "max_prompt_length")
OF_SAMPLING += ("beta_concentration", "bin_edges")


@dataclass
class IteratedRun(Run):
    """Where a run is kept, how long it takes and what it records on the way."""

    fixed: ClassVar[tuple[str, ...]] = ("num_epochs",)  # it decides where the next iteration begins

    num_iterations: int = 2
    """times that the policy becomes the sampler"""
    num_epochs: int = 2
    """passes over the groups of an iteration"""


@dataclass
class Args:
    """SteerLM 2.0."""

    model: str = "toy"
    """policy to start from: toy, a run folder, a Hugging Face folder, a hub id, a .gguf file"""
    dataset: str = "toy"
    """prompts: toy, .jsonl/.json/.parquet file, folder, hub/name[:config[:split]]; a,b*2 mixes"""
    eval_dataset: str = ""
    """held-out data; default: the data set's test split, else 5 % of its prompts"""
    seed: int = 1
    """seed of the order of data and of samples"""
    chat: Chat = block(Chat)

    # algorithm
    attribute_model: str = ""
    """regression model of the attributes: a run of reward_model.py or its model folder"""
    sft_model: str = ""
    """model that gives log P(y|x), to prompts without attributes; default: model"""
    attributes: str = "helpfulness:4,correctness:4,coherence:4,complexity:2,verbosity:2"
    """wanted attributes and values, 0 to 4; several sets, which prompts take in turn, are joined by ;"""
    groups: str = ""
    """groups scored before, in NeMo-Aligner's records: a file or a folder; nothing is sampled"""
    num_responses: int = 10
    """responses to each prompt"""
    num_prompts: int = 20000
    """prompts sampled in an iteration"""
    beta_concentration: float = 24.0
    """alpha + beta of the Beta distribution around the attribute model's value"""
    bin_edges: Literal["nearest", "fifths"] = "nearest"
    """which part of [0, 1] is a value: what rounds to it, which is calibrated, or a fifth each"""
    weight_temperature: float = 1.0
    """temperature of the weights, which divides log w; above 1 flattens weights that are nearly one-hot"""
    max_prompt_length: int = 1024
    """most tokens of a prompt; one with more is dropped, and counted"""
    max_new_tokens: int = 512
    """most tokens of a response"""
    temperature: float = 1.0
    """temperature of sampling and of every log-probability"""

    optimization: Optimization = block(Optimization, learning_rate=1e-6, batch_size=128)
    system: System = block(System)
    run: IteratedRun = block(IteratedRun, output_dir=f"runs/{Path(__file__).stem}")


def beta_logprobs(predicted: Tensor, concentration: float = 24.0, edges: str = "nearest") -> Tensor:
    """log P(a = 0..4 | r) of an attribute whose predicted value is r, HelpSteer2 section 4.5.

    A Beta distribution with mean r / 4 and alpha + beta = concentration, cut at the edges. Its log-density is
    integrated by logsumexp on a grid: a far bin has probability below 1e-20, where a difference of CDFs is 0.

    Args:
        predicted: (..., ) on the scale 0 to 4; outside of it the nearest end counts.

    Returns:
        (..., 5) whose exponentials sum to 1.
    """
    mean = (predicted.double() / 4).clamp(0.5 / concentration, 1 - 0.5 / concentration)[..., None]
    bounds = [0, 0.125, 0.375, 0.625, 0.875, 1] if edges == "nearest" else [0, 0.2, 0.4, 0.6, 0.8, 1]
    grid = (torch.arange(4000, dtype=torch.float64, device=predicted.device) + 0.5) / 4000
    density = (concentration * mean - 1) * grid.log() + (concentration * (1 - mean) - 1) * (-grid).log1p()
    bins = torch.bucketize(grid, grid.new_tensor(bounds[1:-1]))  # (4000,) 0 to 4
    masses = torch.stack([density[..., bins == k].logsumexp(-1) for k in range(5)], -1)
    return (masses - masses.logsumexp(-1, keepdim=True)).to(predicted.dtype)


def attribute_logps(predicted: Tensor, wanted: Tensor, args: Args) -> Tensor:
    """log P(a|x, y): the sum over attributes, taken as independent; predicted, wanted (..., A). -> (...,)"""
    logprobs = beta_logprobs(predicted, args.beta_concentration, args.bin_edges)  # (..., A, 5)
    return logprobs.gather(-1, wanted.long()[..., None])[..., 0].sum(-1)


def group_loss(logps: Tensor, sampler_logps: Tensor, log_weights: Tensor) -> Tensor:
    """Eq. 12: KL(w' || b') of each group; all (G, n), log_weights NaN where there is no response. -> (G,)"""
    missing = log_weights.isnan()
    log_w = log_weights.masked_fill(missing, -math.inf).log_softmax(1)
    log_b = (logps - sampler_logps).masked_fill(missing, -math.inf).log_softmax(1)
    return (log_w.exp() * (log_w - log_b).masked_fill(missing, 0)).sum(1)


def as_table(values: Tensor, log_weights: Tensor) -> Tensor:
    """Values of all responses in turn, 0 where log_weights (G, n) says that there is none. -> (G, n)"""
    present = ~log_weights.isnan()
    places = (present.flatten().cumsum(0) - 1).clamp(min=0)  # found without a wait for the device
    return torch.where(present, values[places].view(present.shape), 0)


def response_logps(policy: models.Policy, micro_batch: MicroBatch, args: Args) -> Tensor:
    """log pi(y|x) of each sequence of a micro-batch, its end token included. -> (num_segments,)"""
    logps = policy(micro_batch, args.temperature).logps
    return packed.segment_sum(logps, micro_batch.target_segments, micro_batch.num_segments)


def loss_and_metrics(policy: models.Policy, micro_batch: MicroBatch, args: Args) -> tuple[Tensor, dict]:
    """Loss of a micro-batch, a sum over its groups that the caller divides, and metrics as (sum, count)."""
    sampler_logps, log_weights = (micro_batch.fields[name] for name in GROUP_FIELDS)  # (G, n) each
    logps = as_table(response_logps(policy, micro_batch, args), log_weights)  # a dummy has G = 0
    return of_groups(logps, sampler_logps, log_weights)


def of_groups(logps: Tensor, sampler_logps: Tensor, log_weights: Tensor) -> tuple[Tensor, dict]:
    """The same from log-probabilities, (G, n) each."""
    loss, missing = group_loss(logps, sampler_logps, log_weights).sum(), log_weights.isnan()
    weights, num_groups = log_weights.masked_fill(missing, -math.inf).softmax(1), len(log_weights)
    ratios, counts = (logps - sampler_logps).masked_fill(missing, 0), (~missing).sum(1)
    metrics = {
        "loss": (loss, num_groups),
        "ess": ((1 / weights.square().sum(1)).sum(), num_groups),
        "w_max": (weights.amax(1).sum(), num_groups),
        "logps/mean": ((logps.sum(1) / counts).sum(), num_groups),
        "kl": ((ratios.sum(1) / counts).sum(), num_groups),
    }
    return loss, metrics


def backward(policy: models.Policy, batch: list[Example], args: Args, device: torch.device) -> dist.Totals:
    """Add the gradients of the mean loss over a batch of groups. -> this rank's part of the metrics

    A group longer than micro_batch_tokens is run twice, a response at a time: for b', then with the gradient
    of Eq. 11, -sum_i (w'_i - b'_i) grad log Q(y_i|a, x). The two forms have the same gradient.
    """
    totals, micro_batch_tokens = dist.Totals(), args.system.micro_batch_tokens
    limit = packed.token_limit(micro_batch_tokens, device)
    small = [group for group in batch if group.row_tokens <= limit]
    large = [group for group in batch if group.row_tokens > limit]
    for micro_batch in packed.micro_batches(small, micro_batch_tokens, device) if small else ():
        loss, metrics = loss_and_metrics(policy, micro_batch, args)
        (loss / len(batch)).backward()  # gradients add over micro-batches and ranks
        totals.update(metrics)
    if large:
        logps, sampler_logps, log_weights = group_logps(policy, large, args, device)
        alone = [Example([sequence], "") for group in large for sequence in group.sequences]
        loss, metrics = of_groups(logps.requires_grad_(), sampler_logps, log_weights)
        # -(w' - b') / groups: known before any activation is kept, so responses can go one by one
        (gradient,) = torch.autograd.grad(loss / len(batch), logps)
        gradient = gradient[~log_weights.isnan()]  # (responses,)
        for micro_batch in packed.micro_batches(alone, micro_batch_tokens, device):
            coefficients = gradient[micro_batch.example_ids]
            (response_logps(policy, micro_batch, args) * coefficients).sum().backward()
        size = dist.world_size()  # every rank has all the large groups: a share of each sum and count
        totals.update({name: (total / size, count / size) for name, (total, count) in metrics.items()})
    return totals


def group_logps(
    policy: models.Policy, groups: list[Example], args: Args, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """log Q(y|a, x) of groups, without gradient, log Q' and log w, alike on every rank. -> (G, n) each"""
    fields = packed.make_micro_batch(groups, [*range(len(groups))], device).fields
    sampler_logps, log_weights = (fields[name] for name in GROUP_FIELDS)
    logps = sequence_logps(policy, [group.sequences for group in groups], args, device)
    return as_table(logps, log_weights), sampler_logps, log_weights


def ask(prompts: list[Example], wanted: list[dict[str, float]]) -> list[Example]:
    """The prompts with the sets of wanted attributes as their labels, in turn."""
    lines = [labels.label_line(attributes) for attributes in wanted]
    return [replace(example, label=lines[i % len(lines)]) for i, example in enumerate(prompts)]


def sample_groups(
    policy: models.Policy, tokenizer: Any, prompts: list[Example], number: int, args: Args, keep: Path
) -> list[dict]:
    """num_responses of the policy to each prompt after its label, in NeMo-Aligner's records, not yet scored.

    A response cut off at max_new_tokens is left out, since its log P(y|x) would be that of a prefix, and a
    group of fewer than two others too: one response alone has no gradient. `keep` is a folder of these
    weights, from which the same call goes on if it was stopped.
    """
    n, length, groups = args.num_responses, args.max_new_tokens, []
    tokens = [data.encode_prompt(tokenizer, prompt.prompt, prompt.label) for prompt in prompts]
    sampling = {"temperature": args.temperature, "samples_per_prompt": n, "seed": args.seed, "step": number}
    samples = generate(policy, tokenizer, tokens, max_new_tokens=length, keep=keep, **sampling)
    for i, prompt in enumerate(prompts):
        texts = [reply.text for reply in samples[i * n : (i + 1) * n] if reply.ended]
        groups += [as_record(prompt, texts)] if len(texts) > 1 else []
    num_cut = sum(not reply.ended for reply in samples)
    found = f"{len(groups):,} of {len(prompts):,} groups have two responses of at most {length} tokens"
    if dist.is_main() and num_cut:
        print(f"{found}; {num_cut:,} of {len(samples):,} were cut off and are left out", flush=True)
    if len(groups) < args.optimization.batch_size:
        expected = f"batch_size, {args.optimization.batch_size}, or more; raise max_new_tokens"
        raise formats.wrong("groups", found, expected)
    return groups


def sequence_logps(
    policy: models.Policy, groups: list[list[packed.Tokens]], args: Args, device: torch.device
) -> Tensor:
    """log pi(y|x) of each sequence of groups, on every rank, without gradient. -> (sequences,)

    A group longer than micro_batch_tokens is run a response at a time, others as one, with the prompt once.
    """
    limit, examples = packed.token_limit(args.system.micro_batch_tokens, device), []
    for whole in (Example(group, "") for group in groups):
        fits = whole.row_tokens <= limit
        examples += [whole] if fits else [Example([sequence], "") for sequence in whole.sequences]
    return packed.table(lambda batch: response_logps(policy, batch, args), examples, limit, device)


def score_groups(groups: list[dict], scorers: tuple, tokenizer: Any, args: Args) -> list[dict]:
    """The groups with the SCORES of each response, all over the same tokens.

    Args:
        scorers: the attribute model, the SFT policy P, and the policy that was sampled, Q'.
    """
    rater, sft_policy, policy = scorers
    device = next(policy.parameters()).device

    def encode(using: Any, labelled: bool) -> list[list[packed.Tokens]]:
        return dist.parallel_map(lambda group: read_group(using, group, "groups", labelled), groups)

    attribute, sizes = [], [len(group["responses"]) for group in groups]
    # (responses, A), on the scale of the labels
    alone = [sequence for group in encode(rater.tokenizer, False) for sequence in group]
    predicted = rater(alone, args.system.micro_batch_tokens, device)
    for group, outputs in zip(groups, predicted.split(sizes), strict=True):
        given = dict(item.split(":") for item in group["label"].split(",") if item)  # none: log P is 0
        wanted = torch.tensor([float(x) for x in given.values()], device=device).expand(len(outputs), -1)
        attribute.append(attribute_logps(outputs[:, [rater.names.index(n) for n in given]], wanted, args))
    sft_logps = sequence_logps(sft_policy, encode(tokenizer, False), args, device)
    sampler_logps = sequence_logps(policy, encode(tokenizer, True), args, device)
    scores = torch.stack([torch.cat(attribute), sft_logps, sampler_logps], 1).tolist()  # (responses, 3)
    rows = iter(dict(zip(SCORES, row, strict=True)) for row in scores)
    return [g | {"responses": [reply | next(rows) for reply in g["responses"]]} for g in groups]


def weigh(groups: list[Example], args: Args) -> list[Example]:
    """The groups with GROUP_FIELDS instead of SCORES: log Q', and log w of Eq. 6."""

    def weighed(group: Example) -> Example:
        attribute, plain, sampler = group.fields.values()  # (n,) float64 each
        log_weights = (attribute + plain - sampler) / args.weight_temperature
        arrays = (sampler.astype(np.float32), log_weights.astype(np.float32))
        return replace(group, fields=dict(zip(GROUP_FIELDS, arrays, strict=True)))

    return [weighed(group) for group in groups]


def describe(name: str, groups: list[Example]) -> None:
    """Say how many responses count, and warn of groups that teach little."""
    weights = [torch.from_numpy(group.fields["log_weights"]).double().softmax(0) for group in groups]
    ess, size = [1 / w.square().sum().item() for w in weights], sum(map(len, weights)) / len(weights)
    few, bare = sum(x < 1.5 for x in ess), sum(not group.label for group in groups)
    alike = sum(len({ids.tobytes() for ids, _ in group.sequences}) == 1 for group in groups)
    text = f"{name}: {len(groups):,}, effective sample size {sum(ess) / len(ess):.2f} of {size:.1f} responses"
    text += f"; {few:,} below 1.5, nearly all weight on one response" * bool(few)
    text += f"; {alike:,} uniform, without a gradient" * bool(alike)
    text += f"; {bare:,} without a label, trained without one" * bool(bare)
    text += "; warning: raise weight_temperature or num_responses" * (2 * few > len(groups))
    if dist.is_main():
        print(text, flush=True)


def load_examples(args: Args, tokenizer: Any) -> tuple[Any, Any]:
    """(train, eval): groups, or prompts, of which one that groups cannot hold is an error."""
    if args.groups:
        train, held_out = load_groups(tokenizer, args.groups, args.eval_dataset)
        return weigh(train, args), weigh(held_out, args)
    datasets = data.load_prompts(tokenizer, args.dataset, args.eval_dataset, args.max_prompt_length)
    for prompt in datasets[0]:
        as_record(prompt, [])
    return datasets


def check(args: Args) -> None:
    """Refuse settings that cannot go together, before any work starts."""
    if args.temperature <= 0:
        raise dist.RunError("temperature 0 is greedy and has no probabilities to weigh; expected more than 0")
    refuse_ignored(args, TOY, "--groups", {x: not (args.groups and getattr(args, x)) for x in OF_SAMPLING})
    if not args.attribute_model and not args.groups:
        raise dist.RunError("attribute_model is not set: a run of reward_model.py --loss regression")
    for text in () if args.groups else args.attributes.split(";"):
        labels.read_wanted(text)


def steps_of(sizes: list[int], args: Args) -> int:
    """Optimizer steps of iterations with so many groups; the last step of each may be small."""
    return sum(-(-args.run.num_epochs * size // args.optimization.batch_size) for size in sizes)


def checks(
    policy: models.Policy, tokenizer: Any, prompts: data.Dataset, args: Args, device: torch.device
) -> Iterator[certificate.Line]:
    """What --check tries, on groups of short samples that all weigh alike."""
    chosen, n = certificate.few(prompts), args.num_responses
    tokens = [data.encode_prompt(tokenizer, e.prompt, e.label) for e in chosen]
    how = {"max_new_tokens": 16, "temperature": args.temperature, "samples_per_prompt": n}
    sequences = [to_example(s).sequences[0] for s in generate(policy, tokenizer, tokens, **how)]
    sampled = [sequences[i : i + n] for i in range(0, len(sequences), n)]
    logps = sequence_logps(policy, sampled, args, device).view(-1, n).cpu().numpy()
    groups = [
        Example(group, "", dict(zip(GROUP_FIELDS, (own, 0 * own), strict=True)))
        for group, own in zip(sampled, logps, strict=True)
    ]
    loss = functools.partial(loss_and_metrics, policy, args=args)
    known = {"kl": 0.0, "loss": 0.0}
    yield from certificate.of_training(args, policy, tokenizer, prompts, loss, known, groups)


def beside(args: Args) -> dict[str, str]:
    """The models that a run holds beside the policy while it scores, and where they are."""
    scorers = {"reward": args.attribute_model, "SFT model": args.sft_model or args.model}
    return {} if args.groups else scorers


def count_steps(sizes: list[int], num_groups: int, args: Args) -> int:
    """Steps of a run; an iteration that has not begun counts as if none of num_groups were left out.

    Raises:
        RunError: there are fewer than a batch.
    """
    run, size = args.run, args.optimization.batch_size
    if num_groups < size:
        raise formats.wrong("groups", f"{num_groups} an iteration", f"batch_size, {size}, or more")
    later = [num_groups] * ((1 if args.groups else run.num_iterations) - len(sizes))
    return steps_of(sizes + later, args) if run.max_steps < 0 else run.max_steps


def begun(output_dir: str) -> list[int]:
    """The number of groups of each iteration that the run in this folder has begun."""
    last = checkpoint.newest(output_dir)
    return json.loads((last / "numbers.json").read_text())["sizes"] if last else []


TOY = dict(attributes="toxicity:0,verbosity:1;toxicity:4,verbosity:1;toxicity:0,verbosity:3")
TOY |= dict(attribute_model="toy/attribute_model", num_prompts=160, learning_rate=3e-4, warmup_steps=3)
TOY |= dict(batch_size=32, max_new_tokens=48, eval_every=20, num_samples=200)


def main(args: Args) -> None:
    # setup
    device = dist.init(args.seed)
    check(args)
    plan.show(args, beside)
    optimization, system, run = args.optimization, args.system, args.run
    log = Log(run, __file__, SHOWN, snapshot(args, TOY))

    # data
    tokenizer = data.load_tokenizer(args.model, **vars(args.chat))
    train_set, eval_set = load_examples(args, tokenizer)
    num_groups = len(train_set) if args.groups else min(args.num_prompts, len(train_set))
    sizes = dist.from_main(lambda: begun(run.output_dir))  # groups of the iterations so far
    num_steps = count_steps(sizes, num_groups, args)
    judge = load_judge(run.judge, "" if args.groups else args.dataset)
    if log.is_finished(num_steps, files.inputs(args.model, tokenizer, train_set, eval_set)):
        return
    log.start(num_steps, optimization)

    # models
    policy = models.load(args.model, device, system)
    attribute_model = (args.attribute_model, device, system)
    if not args.groups:
        rater = load_rater(*attribute_model)
        prompts = [e.prompt for e in train_set]
        check_prompts(rater.tokenizer, prompts, f"attribute_model {args.attribute_model}")
        wanted = [labels.read_wanted(text, rater.names) for text in args.attributes.split(";")]
        eval_set = ask(eval_set, wanted)
        del rater  # until it is needed
    optimizer = models.adamw(policy, optimization)
    certificate.run(run, checks(policy, tokenizer, train_set, args, device))
    parts = {"policy": (policy, optimizer)}
    resumed = checkpoint.resume(run.output_dir, parts)
    start_step, num_tokens = resumed["step"], resumed["num_tokens"]

    def evaluate(step: int) -> dict[str, float]:
        sampling = Sampling(args.max_new_tokens, args.temperature)
        answers = answer(policy, tokenizer, eval_set, run.num_samples, sampling, args.seed, step, judge)
        if answers and args.attribute_model and not judge:
            exchanges, rater = [(a.example.prompt, a.text) for a in answers], load_rater(*attribute_model)
            scores = rater.judge(exchanges, system.micro_batch_tokens, device)
            answers = [replace(a, scores=found) for a, found in zip(answers, scores, strict=True)]
        log.samples(step, [a.row() for a in answers])
        metrics = answer_metrics(answers)
        if args.groups:
            metrics["eval/distance"] = group_loss(*group_logps(policy, eval_set, args, device)).mean().item()
        return metrics

    def make_groups(number: int) -> list[Example]:
        """The groups of an iteration: given, on file, or sampled and scored with the policy as it is."""
        path = Path(run.output_dir) / f"groups_{number + 1}.jsonl"
        if number == len(sizes) and not args.groups:
            prompts = ask(data.batch(train_set, number + 1, num_groups, args.seed), wanted)
            origin = log.fingerprint(*beside(args).values())
            keep = path.with_name(f"{path.name}.{origin}.replies")
            if dist.from_main(lambda: next(iter(files.read_rows(path)), {}).get("origin")) != origin:
                groups = sample_groups(policy, tokenizer, prompts, number, args, keep)
                groups = [{**group, "origin": origin} for group in groups]
                sft_policy = models.load(args.sft_model or args.model, device, system, trainable=False)
                scorers = (load_rater(*attribute_model), sft_policy, policy)
                files.write_lines(
                    path, groups, origin, lambda part: score_groups(part, scorers, tokenizer, args)
                )
            dist.from_main(lambda: files.remove(keep))
        return train_set if args.groups else weigh(read_groups(formats.read_file(path), tokenizer), args)

    if start_step == 0:
        log(0, num_steps, evaluate(step=0))

    while start_step < num_steps:
        # sample and score: Q' <- Q; where a run goes on within an iteration, its groups again
        number = len(sizes) - (start_step < steps_of(sizes, args))
        groups = data.Dataset([(make_groups(number), 1.0)])
        describe(f"groups of iteration {number + 1}", groups)
        sizes[number:] = [len(groups)]
        first, end = steps_of(sizes[:-1], args), steps_of(sizes, args)
        num_steps = count_steps(sizes, num_groups, args)
        how = (optimization.batch_size, args.seed, run.num_epochs)

        for step in range(start_step + 1, min(end, num_steps) + 1):
            # update
            step_start = time.perf_counter()
            # the same on every rank
            batch = data.batch(groups, step - first, *how, first_epoch=number * run.num_epochs)
            lr = optimization.learning_rate * models.lr_factor(step, num_steps, optimization)
            models.set_lr(optimizer, lr)
            totals = backward(policy, batch, args, device)
            grad_norm = models.clip_grad_norm(policy, optimization.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            totals.update({"grad_norm": (grad_norm, 1)})
            metrics = totals.reduce("train/")  # the step's one synchronisation
            seconds = time.perf_counter() - step_start

            # evaluate
            num_tokens += sum(example.num_tokens for example in batch)
            passes = min((step - first) * optimization.batch_size / len(groups), run.num_epochs)
            metrics["train/epoch"] = number * run.num_epochs + passes
            metrics |= {"train/num_tokens": num_tokens, "train/learning_rate": lr}
            metrics |= models.speed(policy, batch, seconds)
            stop = dist.stop_requested()
            if step % run.eval_every == 0 or step == num_steps:
                metrics |= evaluate(step)

            # log and save: always before the policy becomes the sampler
            log(step, num_steps, metrics)
            if step % run.save_every == 0 or step in (end, num_steps) or stop:
                checkpoint.save(run, step, parts, num_tokens=num_tokens, sizes=sizes)
            if stop and step < num_steps:
                return log.finish(stopped_at=step)
        start_step = end

    checkpoint.export(run, policy, tokenizer, args.model)
    log.finish()


if __name__ == "__main__":
    dist.run(main, parse(Args, TOY))
