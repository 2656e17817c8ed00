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

Shapes: G groups, n responses each; A attributes; a row packs whole groups, n sequences each.

Metrics, results and departures from the papers: docs/steerlm2.md
"""

import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common import checkpoint, data, dist, files, models
from common.generate import generate
from common.log import Log, parse

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
SHOWN = ("loss", "ess", "w_max", "grad_norm")
SCORES = ("log(P(a|x,y))", "log(P(y|x))", "log(Q(y|a,x))")  # what NeMo-Aligner's files call them


@dataclass
class Args:
    """SteerLM 2.0."""

    model: str = "toy"
    """policy to start from: toy, a run folder, a Hugging Face folder, a hub id, a .gguf file"""
    dataset: str = "toy"
    """prompts: toy, .jsonl/.json/.parquet file, folder, hub/name[:config[:split]]; a,b*2 mixes"""
    eval_dataset: str = ""
    """held-out data; default: the data set's test split, else 5 % of its prompts"""
    output_dir: str = f"runs/{Path(__file__).stem}"
    """the run folder: checkpoints, metrics.jsonl, samples.jsonl, model/; a run found there is resumed"""
    overwrite: bool = False
    """start anew in output_dir instead of resuming the run there"""
    seed: int = 1
    """orders data and samples"""
    chat_template: str = ""
    """replaces the tokenizer's chat template: a Jinja file, or chatml"""

    # algorithm
    attribute_model: str = ""
    """regression model of the attributes: a run of reward_model.py or its model folder"""
    sft_model: str = ""
    """gives log P(y|x), to prompts without attributes; default: model"""
    attributes: str = "helpfulness:4,correctness:4,coherence:4,complexity:2,verbosity:2"
    """wanted values, 0 to 4; several sets, which prompts take in turn, are joined by ;"""
    groups: str = ""
    """file of groups scored before, NeMo-Aligner's records, instead of sampling; one iteration"""
    num_responses: int = 10
    """responses to each prompt"""
    num_prompts: int = 20000
    """prompts sampled in an iteration"""
    num_iterations: int = 2
    """times that the policy becomes the sampler"""
    num_epochs: int = 2
    """passes over the groups of an iteration"""
    beta_concentration: float = 24.0
    """alpha + beta of the Beta distribution around the attribute model's value"""
    bin_edges: Literal["nearest", "fifths"] = "nearest"
    """which part of [0, 1] is a value: what rounds to it, which is calibrated, or a fifth each"""
    weight_temperature: float = 1.0
    """divides log w; above 1 flattens weights that are nearly one-hot"""
    max_prompt_length: int = 1024
    """most tokens of a prompt; one with more is dropped, and counted"""
    max_new_tokens: int = 512
    """most tokens of a response"""
    temperature: float = 1.0
    """of sampling, and of every log-probability"""

    # optimization
    learning_rate: float = 1e-6
    """peak learning rate"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """after warm-up: constant, or down to min_lr_ratio at the last step"""
    warmup_steps: int = 10
    """steps of linear warm-up"""
    min_lr_ratio: float = 0.1
    """the last step's share of the peak learning rate, for linear and cosine"""
    weight_decay: float = 0.0
    """AdamW's, on matrices only"""
    max_grad_norm: float = 1.0
    """clip the global gradient norm to this; 0 never clips"""
    max_steps: int = -1
    """optimizer steps; -1: as many as num_epochs takes"""
    batch_size: int = 128
    """groups per optimizer step, over all ranks"""
    micro_batch_tokens: int = 0
    """most tokens of one forward on one rank, memory not result; 0: 8192 on GPU, 2048 on CPU"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """of compute, auto is bfloat16 on GPU; master weights, gradients and optimizer state are float32"""
    lora_rank: int = 0
    """rank of LoRA adapters; 0 trains all weights"""
    lora_alpha: float = 16.0
    """LoRA's scale is lora_alpha / lora_rank"""
    lora_target: str = "all-linear"
    """modules that get adapters: all-linear, or names joined by commas"""
    merge_lora: bool = False
    """fold the adapters into the exported model instead of writing a peft folder"""
    sharding: Literal["full", "hybrid", "none"] = "full"
    """FSDP2: shard over all ranks, within a node and replicate across (hybrid), or replicate (none)"""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """recompute activations in backward; auto: for models of a billion parameters or more"""
    compile: bool = False
    """torch.compile each decoder block"""

    # bookkeeping
    eval_every: int = 100
    """optimizer steps between evaluations"""
    save_every: int = 500
    """optimizer steps between checkpoints"""
    keep_checkpoints: int = 1
    """how many of the newest checkpoints stay on disk"""
    num_samples: int = 16
    """prompts answered and judged at each evaluation"""
    judge: str = ""
    """package.module:function, (prompt, response) -> dict of scores; default: exact for toy, else none"""
    track: bool = False
    """log to Weights & Biases too: online if logged in, else offline"""
    wandb_project: str = "cleanalign"
    """W&B project"""
    run_name: str = ""
    """W&B run name"""


# ------------------------------------------------------------------------------------------------- the maths


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


def tables(fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(log w, log Q') of the groups of a row, (G, n) each."""
    log_w = torch.stack([v for k, v in fields.items() if k.startswith("log_w")], 1)
    return log_w, torch.stack([v for k, v in fields.items() if k.startswith("log_q")], 1)


def response_logps(policy: nn.Module, row: data.Row, args: Args) -> Tensor:
    """log pi(y|x) of each sequence of a row, its end token included. -> (num_segments,)"""
    logps = models.token_logps(policy, row, args.temperature)
    return models.segment_sum(logps, row.target_segments, row.num_segments)


def loss_and_metrics(policy: nn.Module, row: data.Row, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of a row, both summed over its groups; the caller picks the denominator."""
    log_w, sampler_logps = tables(row.fields)
    logps = response_logps(policy, row, args).view(log_w.shape)  # (G, n); a dummy row has G = 0
    loss = group_loss(logps, sampler_logps, log_w).sum()
    return loss, group_metrics(loss, logps, sampler_logps, log_w)


def group_metrics(loss: Tensor, logps: Tensor, sampler_logps: Tensor, log_w: Tensor) -> dict[str, Tensor]:
    """Sums over groups; all but the loss (G, n)."""
    weights, logps = log_w.softmax(1), logps.detach()
    metrics = {
        "loss": loss.detach(),
        "ess": (1 / weights.square().sum(1)).sum(),
        "w_max": weights.amax(1).sum(),
        "logps/mean": logps.mean(1).sum(),
        "kl": (logps - sampler_logps).mean(1).sum(),
    }
    return metrics


def backward(policy: nn.Module, batch: list[data.Example], args: Args, device: torch.device) -> Counter:
    """Add the gradients of the mean loss over a batch of groups. -> sums of the metrics

    A group longer than micro_batch_tokens is run twice, a response at a time: for b', then with the gradient
    of Eq. 11, -sum_i (w'_i - b'_i) grad log Q(y_i|a, x). The two forms have the same gradient.
    """
    totals = Counter()
    limit = data.row_limit(args.micro_batch_tokens, device)
    small = [group for group in batch if group.num_tokens <= limit]
    large = [group for group in batch if group.num_tokens > limit]
    for row in data.rows(small, args.micro_batch_tokens, device) if small else ():
        loss, metrics = loss_and_metrics(policy, row, args)
        (loss / len(batch)).backward()  # gradients add over rows and ranks: the mean over the batch
        totals.update(metrics)
    if large:
        n = len(large[0].sequences)
        sequences = [sequence for group in large for sequence in group.sequences]
        logps = sequence_logps(policy, sequences, args, device).view(-1, n).requires_grad_()  # (G, n)
        fields = {k: torch.tensor([g.fields[k] for g in large], device=device) for k in large[0].fields}
        log_w, sampler_logps = tables(fields)
        loss = group_loss(logps, sampler_logps, log_w).sum()
        (gradient,) = torch.autograd.grad(loss / len(batch), logps)  # -(w' - b') / groups
        for row in data.rows([data.Example([s], "") for s in sequences], args.micro_batch_tokens, device):
            (response_logps(policy, row, args) * gradient.flatten()[row.example_ids]).sum().backward()
        for name, total in group_metrics(loss, logps, sampler_logps, log_w).items():
            totals[name] += total / dist.world_size()  # every rank has the same
    return totals


# --------------------------------------------------------------------------------------------------- groups


def wanted_sets(args: Args, names: list[str]) -> list[dict[str, float]]:
    """The sets of wanted attributes, each of them an output of the attribute model, in its order."""
    sets = []
    for text in args.attributes.split(";"):
        if not text.strip():
            raise data.wrong("attributes", repr(args.attributes), "name:value joined by commas")
        line = data.read_line(text.strip(), "attributes", names)
        given = dict(item.split(":") for item in line.strip().split(","))
        sets.append({name: float(given[name]) for name in names if name in given})
    return sets


def sample_groups(
    policy: nn.Module, tokenizer: Any, prompts: list[data.Example], number: int, args: Args
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


def read_group(tokenizer: Any, group: dict, where: str, labelled: bool = True) -> list[data.Sequence]:
    """The responses of a group after its prompt, with or without the label line; one span, the response's."""
    turns, replies = group.get("prompt_turns"), group.get("responses")
    if not isinstance(turns, list) or not isinstance(replies, list) or len(turns) % 2 == 0:
        raise data.wrong(where, group, "prompt_turns, an odd number of them, and responses")
    turns = [{"role": "system", "content": group["system"]}] * bool(group.get("system")) + turns
    prompt = data.as_messages(turns, where)
    label = data.read_line(group.get("label"), where) if labelled else ""
    sequences = []
    for reply in data.as_messages(replies, where):
        if reply["role"] != "assistant":
            raise data.wrong(where, f"a response from {reply['role']}", "responses from Assistant")
        sequences.append(data.encode_response(tokenizer, prompt, [{**reply, "label": label}]))
    return sequences


def sequence_logps(
    policy: nn.Module, sequences: list[data.Sequence], args: Args, device: torch.device
) -> Tensor:
    """log pi(y|x) of each sequence, on every rank. -> (sequences,)"""
    examples, table = [data.Example([s], "") for s in sequences], torch.zeros(len(sequences), device=device)
    with torch.no_grad():
        for row in data.rows(examples, args.micro_batch_tokens, device):
            table[row.example_ids] = response_logps(policy, row, args)
    return dist.sum_over_ranks(table)


def score_groups(
    policy: nn.Module, tokenizer: Any, groups: list[dict], args: Args, device: torch.device
) -> None:
    """Write into the groups log P(a|x,y), log P(y|x) and log Q'(y|a,x), all over the same tokens."""
    scorer = models.load_scorer(args.attribute_model, device, args, trainable=False)
    theirs, names = data.load_tokenizer(args.attribute_model), models.output_names(scorer)
    sft_policy = models.load(args.sft_model or args.model, device, args, trainable=False)

    def encode(using: Any, labelled: bool) -> list[data.Sequence]:
        parts = dist.parallel_map(lambda group: read_group(using, group, "groups", labelled), groups)
        return [sequence for part in parts for sequence in part]

    plain = [data.Example([sequence], "") for sequence in encode(theirs, False)]
    scorer.config.reward_mean = None  # the scale of the labels
    predicted = models.score(scorer, plain, args, device)  # (responses, A)
    n = args.num_responses
    attr_logps = []
    for group, outputs in zip(groups, predicted.view(len(groups), n, -1), strict=True):
        given = dict(item.split(":") for item in group["label"].split(","))
        chosen = [names.index(name) for name in given]
        wanted = torch.tensor([float(x) for x in given.values()], device=device).expand(n, -1)
        attr_logps += attribute_logps(outputs[:, chosen], wanted, args).tolist()
    sft_logps = sequence_logps(sft_policy, encode(tokenizer, False), args, device).tolist()
    sampler_logps = sequence_logps(policy, encode(tokenizer, True), args, device).tolist()
    scores = iter(zip(attr_logps, sft_logps, sampler_logps, strict=True))
    for group in groups:
        for reply in group["responses"]:
            reply |= dict(zip(SCORES, next(scores), strict=True))


def read_groups(path: Path, tokenizer: Any, args: Args) -> data.Dataset:
    """A file of groups as examples of n sequences, with log w and log Q' as fields.

    Raises:
        RunError: a group without its scores or its label, or of another size than the first.
    """
    records = data.read_file(path)
    any_label = any(record.value.get("label") for record in records)

    def encode(record: data.Record) -> data.Example:
        group, where = record
        sequences = read_group(tokenizer, group, where)
        if any_label and not group.get("label"):
            raise data.wrong(where, "no label", "one, as in other groups")
        fields = {}
        for i, reply in enumerate(group["responses"]):
            found = [data.number(reply.get(name), where, name) for name in SCORES]
            fields[f"log_w{i}"] = (found[0] + found[1] - found[2]) / args.weight_temperature
            fields[f"log_q{i}"] = found[2]
        size = len(records[0].value.get("responses") or ())
        if len(sequences) != size:
            raise data.wrong(where, f"{len(sequences)} responses", f"{size}, as in the first group")
        return data.Example(sequences, "", fields)

    return data.Dataset([(dist.parallel_map(encode, records), 1.0)])


def main(args: Args) -> None:
    # setup
    device = dist.init(args.seed)
    log = Log(args, __file__, SHOWN, TOY, fixed=("max_new_tokens", "temperature", "num_epochs"))
    if args.temperature <= 0:
        raise dist.RunError("temperature 0 is greedy and has no probabilities to weigh; expected more than 0")
    if not args.attribute_model:
        raise dist.RunError(
            "attribute_model is not set: a run of reward_model.py --loss regression, or its folder"
        )

    # data
    tokenizer = data.load_tokenizer(args.model, args.chat_template)
    prompts, eval_set = data.load_prompts(args, tokenizer)
    for example in prompts:
        if sum(turn["role"] != "system" for turn in example.prompt) % 2 == 0:
            raise data.wrong("dataset", f"the prompt {example.prompt}", "turns of user and assistant in turn")
    num_iterations = 1 if args.groups else args.num_iterations
    num_groups = (
        len(data.read_file(Path(args.groups))) if args.groups else min(args.num_prompts, len(prompts))
    )
    if num_groups < args.batch_size:
        raise data.wrong("groups", f"{num_groups} an iteration", f"batch_size, {args.batch_size}, or more")
    steps_each = args.num_epochs * -(-num_groups // args.batch_size)
    num_steps = num_iterations * steps_each if args.max_steps < 0 else args.max_steps
    if not log.begin(num_steps):
        return

    # models
    policy = models.load(args.model, device, args)
    names = models.output_names(models.load_scorer(args.attribute_model, device, args, trainable=False))
    wanted = [data.label_line(attributes) for attributes in wanted_sets(args, names)]
    for i, example in enumerate(eval_set):
        example.label = wanted[i % len(wanted)]
    optimizer = torch.optim.AdamW(models.parameter_groups(policy, args.weight_decay), betas=(0.9, 0.95))
    parts = {"policy": (policy, optimizer)}
    resumed = checkpoint.resume(args, parts)
    start_step, num_tokens = resumed["step"], resumed["num_tokens"]

    def evaluate(step: int) -> dict[str, float]:
        return log.samples(step, policy, tokenizer, eval_set)

    def make_groups(number: int) -> Path:
        """Sample and score an iteration's groups with the policy as it is; a file that exists is kept."""
        path = Path(args.groups or f"{args.output_dir}/groups_{number + 1}.jsonl")
        if dist.from_main(lambda: path.exists() and bool(args.groups or start_step)):
            return path  # one without a checkpoint may be of other settings
        sampled = replace(args, batch_size=num_groups, max_steps=num_iterations)
        chosen = [
            replace(e, label=wanted[i % len(wanted)])
            for i, e in enumerate(data.batch(prompts, number + 1, sampled))
        ]
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
        batch = data.batch(groups, step, replace(args, max_steps=num_steps))  # the same on every rank
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * models.lr_factor(step, num_steps, args)
        totals = backward(policy, batch, args, device)
        grad_norm = models.clip_grad_norm(policy, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        sums = dist.all_sum(totals, same={"grad_norm": grad_norm})  # the step's one synchronisation
        seconds = time.perf_counter() - step_start

        # evaluate
        num_tokens += sum(example.num_tokens for example in batch)
        metrics = {
            "train/epoch": step / steps_each * args.num_epochs,
            "train/num_tokens": num_tokens,
            "train/learning_rate": optimizer.param_groups[0]["lr"],
            "train/grad_norm": sums.pop("grad_norm"),
        }
        metrics |= {f"train/{name}": total / len(batch) for name, total in sums.items()}
        metrics |= models.speed(policy, batch, seconds)
        stop = dist.stop_requested()
        if step % args.eval_every == 0 or step == num_steps:
            metrics |= evaluate(step)

        # log and save: always before the policy becomes the sampler
        log(step, num_steps, metrics)
        if step % args.save_every == 0 or step % steps_each == 0 or step == num_steps or stop:
            checkpoint.save(args, step, parts, num_tokens=num_tokens)
        if stop and step < num_steps:
            return log.finish(stopped_at=step)

    checkpoint.export(args, policy, tokenizer)
    log.finish()


if __name__ == "__main__":
    dist.run(main, parse(Args, TOY))
