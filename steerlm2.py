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

Shapes: G groups, n responses each; A attributes; a micro-batch packs whole groups, n sequences each.

Metrics, results and departures from the papers: docs/steerlm2.md
"""

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from tyro.conf import OmitArgPrefixes

from common import certificate, checkpoint, data, dist, files, formats, models, packed, plan, templates
from common.args import Optimization, Run, Sampling, System, block, parse, snapshot
from common.evaluate import answer, answer_metrics, load_judge
from common.generate import generate, to_example
from common.log import Log
from common.packed import Example, MicroBatch
from common.rewards import read_where_trained

SHOWN = ("loss", "ess", "w_max", "grad_norm")
GROUP_FIELDS = ("sampler_logps", "log_weights")  # of an example: log Q' and log w of its n responses
SCORES = ("log(P(a|x,y))", "log(P(y|x))", "log(Q(y|a,x))")  # what NeMo-Aligner's files call them


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
    chat_template: str = ""
    """chat template that replaces the tokenizer's: a Jinja file, or chatml"""
    chat_template_kwargs: str = ""
    """variables of the chat template, as JSON: {"enable_thinking": false}; the export has them as defaults"""

    # algorithm
    attribute_model: str = ""
    """regression model of the attributes: a run of reward_model.py or its model folder"""
    sft_model: str = ""
    """model that gives log P(y|x), to prompts without attributes; default: model"""
    attributes: str = "helpfulness:4,correctness:4,coherence:4,complexity:2,verbosity:2"
    """wanted attributes and values, 0 to 4; several sets, which prompts take in turn, are joined by ;"""
    groups: str = ""
    """file of groups scored before, NeMo-Aligner's records, instead of sampling; one iteration"""
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

    optimization: OmitArgPrefixes[Optimization] = block(Optimization, learning_rate=1e-6, batch_size=128)
    system: OmitArgPrefixes[System] = block(System)
    run: OmitArgPrefixes[IteratedRun] = block(IteratedRun, output_dir=f"runs/{Path(__file__).stem}")


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
    """Eq. 12: KL(w' || b') of each group; all (G, n). -> (G,)"""
    log_w, log_b = log_weights.log_softmax(1), (logps - sampler_logps).log_softmax(1)
    return (log_w.exp() * (log_w - log_b)).sum(1)


def response_logps(policy: models.Policy, micro_batch: MicroBatch, args: Args) -> Tensor:
    """log pi(y|x) of each sequence of a micro-batch, its end token included. -> (num_segments,)"""
    logps = policy(micro_batch, args.temperature).logps
    return packed.segment_sum(logps, micro_batch.target_segments, micro_batch.num_segments)


def loss_and_metrics(
    policy: models.Policy, micro_batch: MicroBatch, args: Args
) -> tuple[Tensor, dict[str, tuple]]:
    """Loss of a micro-batch, a sum over its groups that the caller divides, and metrics as (sum, count)."""
    sampler_logps, log_weights = (micro_batch.fields[name] for name in GROUP_FIELDS)  # (G, n) each
    logps = response_logps(policy, micro_batch, args).view(log_weights.shape)  # a dummy has G = 0
    loss = group_loss(logps, sampler_logps, log_weights).sum()
    return loss, group_metrics(loss, logps, sampler_logps, log_weights)


def group_metrics(
    loss: Tensor, logps: Tensor, sampler_logps: Tensor, log_weights: Tensor
) -> dict[str, tuple]:
    """Metrics of groups as (sum, count); all but the loss, which is summed, (G, n)."""
    weights, num_groups = log_weights.softmax(1), len(log_weights)
    metrics = {
        "loss": (loss, num_groups),
        "ess": ((1 / weights.square().sum(1)).sum(), num_groups),
        "w_max": (weights.amax(1).sum(), num_groups),
        "logps/mean": (logps.mean(1).sum(), num_groups),
        "kl": ((logps - sampler_logps).mean(1).sum(), num_groups),
    }
    return metrics


def backward(policy: models.Policy, batch: list[Example], args: Args, device: torch.device) -> dist.Totals:
    """Add the gradients of the mean loss over a batch of groups. -> this rank's part of the metrics

    A group longer than micro_batch_tokens is run twice, a response at a time: for b', then with the gradient
    of Eq. 11, -sum_i (w'_i - b'_i) grad log Q(y_i|a, x). The two forms have the same gradient.
    """
    totals, micro_batch_tokens = dist.Totals(), args.system.micro_batch_tokens
    limit = packed.token_limit(micro_batch_tokens, device)
    small = [group for group in batch if group.num_tokens <= limit]
    large = [group for group in batch if group.num_tokens > limit]
    for micro_batch in packed.micro_batches(small, micro_batch_tokens, device) if small else ():
        loss, metrics = loss_and_metrics(policy, micro_batch, args)
        (loss / len(batch)).backward()  # gradients add over micro-batches and ranks
        totals.update(metrics)
    if large:
        sequences = [sequence for group in large for sequence in group.sequences]
        alone = [Example([sequence], "") for sequence in sequences]
        sampler_logps, log_weights = (
            torch.from_numpy(np.stack([group.fields[name] for group in large])).to(device)
            for name in GROUP_FIELDS
        )
        logps = sequence_logps(policy, sequences, args, device).view(log_weights.shape).requires_grad_()
        loss = group_loss(logps, sampler_logps, log_weights).sum()
        # -(w' - b') / groups: known before any activation is kept, so responses can go one by one
        (gradient,) = torch.autograd.grad(loss / len(batch), logps)
        for micro_batch in packed.micro_batches(alone, micro_batch_tokens, device):
            coefficients = gradient.flatten()[micro_batch.example_ids]
            (response_logps(policy, micro_batch, args) * coefficients).sum().backward()
        size = dist.world_size()  # every rank has all the large groups: a share of each sum and count
        metrics = group_metrics(loss, logps, sampler_logps, log_weights)
        totals.update({name: (total / size, count / size) for name, (total, count) in metrics.items()})
    return totals


def wanted_sets(args: Args, names: list[str]) -> list[dict[str, float]]:
    """The sets of wanted attributes, each of them an output of the attribute model, in its order."""
    sets = []
    for text in args.attributes.split(";"):
        if not text.strip():
            raise formats.wrong("attributes", repr(args.attributes), "name:value joined by commas")
        line = formats.read_line(text.strip(), "attributes", names)
        given = dict(item.split(":") for item in line.strip().split(","))
        sets.append({name: float(given[name]) for name in names if name in given})
    return sets


def sample_groups(
    policy: models.Policy, tokenizer: Any, prompts: list[Example], number: int, args: Args
) -> list[dict]:
    """num_responses of the policy to each prompt after its label, in NeMo-Aligner's records, not yet scored.

    A group with a response cut off at max_new_tokens is dropped: its log P(y|x) would be that of a prefix.
    """
    tokens = [data.encode_prompt(tokenizer, prompt.prompt, prompt.label) for prompt in prompts]
    length, sampling = args.max_new_tokens, {"samples_per_prompt": args.num_responses, "seed": args.seed}
    samples = generate(
        policy,
        tokenizer,
        tokens,
        max_new_tokens=length,
        temperature=args.temperature,
        step=number,
        **sampling,
    )
    groups = []
    for i, prompt in enumerate(prompts):
        replies = samples[i * args.num_responses : (i + 1) * args.num_responses]
        if not all(reply.ended for reply in replies):
            continue
        turns = [{"from": m["role"].capitalize(), "value": m["content"]} for m in prompt.prompt]
        system = turns.pop(0)["value"] if turns[0]["from"] == "System" else ""
        responses = [{"from": "Assistant", "value": reply.text} for reply in replies]
        groups.append(
            {"system": system, "prompt_turns": turns, "label": prompt.label.strip(), "responses": responses}
        )
    if dist.is_main() and len(groups) < len(prompts):
        print(f"groups: {len(prompts) - len(groups):,} dropped, a response was cut off", flush=True)
    if not groups:
        raise dist.RunError(f"no group is left: every one has a response longer than max_new_tokens {length}")
    return groups


def read_group(tokenizer: Any, group: dict, where: str, labelled: bool = True) -> list[packed.Tokens]:
    """The responses of a group after its prompt, with or without the label line; one span, the response's."""
    turns, replies = group.get("prompt_turns"), group.get("responses")
    if not isinstance(turns, list) or not isinstance(replies, list) or len(turns) % 2 == 0:
        raise formats.wrong(where, group, "prompt_turns, an odd number of them, and responses")
    turns = [{"role": "system", "content": group["system"]}] * bool(group.get("system")) + turns
    prompt = formats.as_messages(turns, where)
    label = formats.read_line(group.get("label"), where) if labelled else ""
    sequences = []
    for reply in formats.as_messages(replies, where):
        if reply["role"] != "assistant":
            raise formats.wrong(where, f"a response from {reply['role']}", "responses from Assistant")
        with data.encoding(where):
            sequences.append(data.encode_response(tokenizer, prompt, [{**reply, "label": label}]))
    return sequences


def sequence_logps(
    policy: models.Policy, sequences: list[packed.Tokens], args: Args, device: torch.device
) -> Tensor:
    """log pi(y|x) of each sequence, on every rank. -> (sequences,)"""
    examples, table = [Example([s], "") for s in sequences], torch.zeros(len(sequences), device=device)
    with torch.no_grad():
        for micro_batch in packed.micro_batches(examples, args.system.micro_batch_tokens, device):
            table[micro_batch.example_ids] = response_logps(policy, micro_batch, args)
    return dist.sum_over_ranks(table)


def score_groups(
    policy: models.Policy, tokenizer: Any, groups: list[dict], args: Args, device: torch.device
) -> None:
    """Write into the groups log P(a|x,y), log P(y|x) and log Q'(y|a,x), all over the same tokens."""
    scorer = models.load_scorer(args.attribute_model, device, args.system, trainable=False)
    theirs, names = data.load_tokenizer(args.attribute_model), models.output_names(scorer)
    read_where_trained(scorer, theirs)
    sft_policy = models.load(args.sft_model or args.model, device, args.system, trainable=False)

    def encode(using: Any, labelled: bool) -> list[packed.Tokens]:
        parts = dist.parallel_map(lambda group: read_group(using, group, "groups", labelled), groups)
        return [sequence for part in parts for sequence in part]

    plain = [Example([sequence], "") for sequence in encode(theirs, False)]
    # (responses, A), on the scale of the labels
    predicted = models.score(scorer, plain, args.system.micro_batch_tokens, device, centred=False)
    n = args.num_responses
    attribute = torch.zeros(len(groups), n, device=device)
    for i, (group, outputs) in enumerate(zip(groups, predicted.view(len(groups), n, -1), strict=True)):
        given = dict(item.split(":") for item in group["label"].split(","))
        chosen = [names.index(name) for name in given]
        wanted = torch.tensor([float(x) for x in given.values()], device=device).expand(n, -1)
        attribute[i] = attribute_logps(outputs[:, chosen], wanted, args)
    sft_logps = sequence_logps(sft_policy, encode(tokenizer, False), args, device)
    sampler_logps = sequence_logps(policy, encode(tokenizer, True), args, device)
    scores = torch.stack([attribute, sft_logps.view(-1, n), sampler_logps.view(-1, n)], 2)  # (groups, n, 3)
    for group, rows in zip(groups, scores.tolist(), strict=True):
        for reply, row in zip(group["responses"], rows, strict=True):
            reply |= dict(zip(SCORES, row, strict=True))


def read_groups(path: Path, tokenizer: Any, args: Args) -> data.Dataset:
    """A file of groups as examples of n sequences, with the fields of GROUP_FIELDS.

    Raises:
        RunError: a group without its scores or its label, or of another size than the first.
    """
    records = formats.read_file(path)
    any_label = any(record.value.get("label") for record in records)

    def encode(record: formats.Record) -> Example:
        group, where = record
        sequences = read_group(tokenizer, group, where)
        if any_label and not group.get("label"):
            raise formats.wrong(where, "no label", "one, as in other groups")
        found = [
            [formats.number(reply.get(name), where, name) for name in SCORES] for reply in group["responses"]
        ]
        attribute, plain, sampler = np.array(found).reshape(-1, 3).T  # (n,) float64 each
        log_weights = (attribute + plain - sampler) / args.weight_temperature
        arrays = (sampler.astype(np.float32), log_weights.astype(np.float32))
        size = len(records[0].value.get("responses") or ())
        if len(sequences) != size:
            raise formats.wrong(where, f"{len(sequences)} responses", f"{size}, as in the first group")
        return Example(sequences, "", dict(zip(GROUP_FIELDS, arrays, strict=True)))

    return data.Dataset([(dist.parallel_map(encode, records), 1.0)])


def check(args: Args) -> None:
    """Refuse settings that cannot go together, before any work starts."""
    if args.temperature <= 0:
        raise dist.RunError("temperature 0 is greedy and has no probabilities to weigh; expected more than 0")
    if not args.attribute_model:
        raise dist.RunError(
            "attribute_model is not set: a run of reward_model.py --loss regression, or its folder"
        )


def load_prompts(args: Args, tokenizer: Any) -> tuple[data.Dataset, data.Dataset]:
    """(train, eval) prompts that NeMo-Aligner's records can hold.

    Raises:
        RunError: a prompt that ends with a turn of the assistant.
    """
    datasets = data.load_prompts(tokenizer, args.dataset, args.eval_dataset, args.max_prompt_length)
    for example in datasets[0]:
        if sum(turn["role"] != "system" for turn in example.prompt) % 2 == 0:
            raise formats.wrong(
                "dataset", f"the prompt {example.prompt}", "turns of user and assistant in turn"
            )
        if any(turn.keys() - {"role", "content"} for turn in example.prompt):
            raise formats.wrong(
                "dataset", f"the prompt {example.prompt}", "turns of text alone, without tools"
            )
    return datasets


def checks(
    policy: models.Policy, tokenizer: Any, prompts: data.Dataset, args: Args, device: torch.device
) -> Iterator[certificate.Line]:
    """What --check tries, on groups of short samples that all weigh alike."""
    chosen, n = certificate.few(prompts), args.num_responses
    tokens = [data.encode_prompt(tokenizer, e.prompt, e.label) for e in chosen]
    how = {"max_new_tokens": 16, "temperature": args.temperature, "samples_per_prompt": n}
    sequences = [to_example(s).sequences[0] for s in generate(policy, tokenizer, tokens, **how)]
    logps = sequence_logps(policy, sequences, args, device).view(-1, n).cpu().numpy()
    groups = [
        Example(sequences[i * n : (i + 1) * n], "", dict(zip(GROUP_FIELDS, (own, 0 * own), strict=True)))
        for i, own in enumerate(logps)
    ]
    loss = functools.partial(loss_and_metrics, policy, args=args)
    known = {"kl": 0.0, "loss": 0.0}
    yield from certificate.of_training(args, policy, tokenizer, prompts, loss, known, groups)


def beside(args: Args) -> dict[str, str]:
    """The models that a run holds beside the policy while it scores, and where they are."""
    return {"reward": args.attribute_model, "SFT model": args.sft_model or args.model}


def count_groups(prompts: data.Dataset, args: Args) -> int:
    """Groups of an iteration, before any is dropped.

    Raises:
        RunError: there are fewer than a batch.
    """
    given, batch_size = args.groups, args.optimization.batch_size
    num_groups = len(formats.read_file(Path(given))) if given else min(args.num_prompts, len(prompts))
    if num_groups < batch_size:
        raise formats.wrong("groups", f"{num_groups} an iteration", f"batch_size, {batch_size}, or more")
    return num_groups


TOY = dict(
    attribute_model="toy/attribute_model",
    attributes="toxicity:0,verbosity:1;toxicity:4,verbosity:1;toxicity:0,verbosity:3",
    num_prompts=192,
    learning_rate=3e-4,
    warmup_steps=3,
    batch_size=32,
    max_new_tokens=48,
    eval_every=12,
    num_samples=200,
)


def main(args: Args) -> None:
    # setup
    device = dist.init(args.seed)
    plan.show(args, beside)
    check(args)
    optimization, system, run = args.optimization, args.system, args.run
    log = Log(run, __file__, SHOWN, snapshot(args, TOY))

    # data
    tokenizer = data.load_tokenizer(args.model, args.chat_template, args.chat_template_kwargs)
    prompts, eval_set = load_prompts(args, tokenizer)
    num_iterations = 1 if args.groups else run.num_iterations
    num_groups = count_groups(prompts, args)
    steps_each = run.num_epochs * -(-num_groups // optimization.batch_size)
    num_steps = num_iterations * steps_each if run.max_steps < 0 else run.max_steps
    judge = load_judge(run.judge, args.dataset)
    if log.is_finished(num_steps, files.inputs(args.model, tokenizer, prompts, eval_set)):
        return
    log.start(num_steps, optimization)

    # models
    policy = models.load(args.model, device, system)
    names = models.output_names(models.load_scorer(args.attribute_model, device, system, trainable=False))
    reader = data.load_tokenizer(args.attribute_model)
    templates.check_prompts(reader, [e.prompt for e in prompts], f"attribute_model {args.attribute_model}")
    wanted = [formats.label_line(attributes) for attributes in wanted_sets(args, names)]
    for i, example in enumerate(eval_set):
        example.label = wanted[i % len(wanted)]
    trained = models.parameter_groups(policy, optimization.weight_decay)
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95))
    certificate.run(run, checks(policy, tokenizer, prompts, args, device))
    parts = {"policy": (policy, optimizer)}
    resumed = checkpoint.resume(run.output_dir, parts)
    start_step, num_tokens = resumed["step"], resumed["num_tokens"]

    def evaluate(step: int) -> dict[str, float]:
        sampling = Sampling(args.max_new_tokens, args.temperature)
        answers = answer(policy, tokenizer, eval_set, run.num_samples, sampling, args.seed, step, judge)
        log.samples(step, [a.row() for a in answers])
        return answer_metrics(answers)

    def make_groups(number: int) -> Path:
        """Sample and score an iteration's groups with the policy as it is; a file that exists is kept."""
        path = Path(args.groups or f"{run.output_dir}/groups_{number + 1}.jsonl")
        if dist.from_main(lambda: path.exists() and bool(args.groups or start_step)):
            return path  # one without a checkpoint may be of other settings
        drawn = data.batch(prompts, number + 1, num_groups, args.seed)
        chosen = [replace(e, label=wanted[i % len(wanted)]) for i, e in enumerate(drawn)]
        groups = sample_groups(policy, tokenizer, chosen, number, args)
        score_groups(policy, tokenizer, groups, args, device)
        if dist.is_main():
            files.write(path, files.as_lines(groups))
        dist.barrier()
        return path

    if start_step == 0:
        log(0, num_steps, evaluate(step=0))

    iteration = None
    for step in range(start_step + 1, num_steps + 1):
        number = (step - 1) // steps_each
        if number != iteration:  # Q' <- Q
            iteration, groups = number, read_groups(make_groups(number), tokenizer, args)

        # update
        step_start = time.perf_counter()
        batch = data.batch(groups, step, optimization.batch_size, args.seed)  # the same on every rank
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
        metrics |= {
            "train/epoch": step / steps_each * run.num_epochs,
            "train/num_tokens": num_tokens,
            "train/learning_rate": lr,
        }
        metrics |= models.speed(policy, batch, seconds)
        stop = dist.stop_requested()
        if step % run.eval_every == 0 or step == num_steps:
            metrics |= evaluate(step)

        # log and save: always before the policy becomes the sampler
        log(step, num_steps, metrics)
        if step % run.save_every == 0 or step % steps_each == 0 or step == num_steps or stop:
            checkpoint.save(run, step, parts, num_tokens=num_tokens)
        if stop and step < num_steps:
            return log.finish(stopped_at=step)

    checkpoint.export(run, policy, tokenizer, args.model)
    log.finish()


if __name__ == "__main__":
    dist.run(main, parse(Args, TOY))
