r"""SteerLM: fine-tuning conditioned on attributes, which users then ask for

Dong et al. 2023, https://arxiv.org/abs/2310.05344. Every response of the training data is preceded by a line
of attribute values, v, that a model predicts; bad responses stay, with honest labels:

    1. attribute model: regression on rated responses (reward_model.py)
    2. annotate:        v = attribute model(x, y), clamped and rounded, for each response           Eq. 2
    3. fine-tune:       loss = -(1/N) sum_t log pi(y_t | v, x, y_<t), the line is context (sft.py)
    4. bootstrap:       y' ~ pi(. | x, v'), v' a line of high quality; annotate y', train again      Eq. 3, 4
    5. ask:             for each attribute and value 0-4, what the responses score

    python steerlm.py --help
    torchrun --nproc_per_node=8 steerlm.py --model meta-llama/Llama-3.1-8B --chat_template chatml \
        --ratings nvidia/HelpSteer2 --dataset chats.jsonl

Each stage has its folder in output_dir; one that is complete is not run again.

Metrics, results and departures from the papers: docs/steerlm.md
"""

import gc
import json
import random
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from tyro.conf import OmitArgPrefixes

import reward_model
import sft
from common import data, dist, files, formats, models, packed, stages
from common.args import Inference, PipelineRun, block, parse, snapshot, with_fields
from common.evaluate import agreement, load_judge
from common.generate import generate
from common.log import Log
from common.rewards import read_where_trained
from common.stages import stage

SHOWN = ("follow/mae", "follow/pearson")
STAGES = {"reward_model": reward_model.Args, "sft": sft.Args}
RESERVED = stages.RESERVED | {"loss", "score"}  # options of stages that the pipeline sets or does not offer
EXTENSION = (
    "{%- if add_generation_prompt and attributes is defined -%}"
    "{{- (label_token | default('')) + attributes + '\\n' -}}{%- endif -%}"
)


@dataclass
class Stages:
    """Options of the stages, each one string as on the command line of the script."""

    fixed: ClassVar[tuple[str, ...]] = ()  # those of a stage that has begun are compared with its own run

    reward_model: str = "--learning_rate 2e-6 --num_epochs 2"
    """options of reward_model.py, as --reward_model "--num_epochs 2"; --reward_model --help lists them"""
    sft: str = "--learning_rate 5e-6 --num_epochs 2 --num_samples 0"
    """options of fine-tuning by sft.py, as --sft "--lora_rank 16"; --sft --help lists them"""


@dataclass
class Args:
    """SteerLM, all stages."""

    model: str = "toy"
    """policy to start from: toy, a run folder, a Hugging Face folder, a hub id, a .gguf file"""
    dataset: str = "toy"
    """conversations to annotate and train on: toy, .jsonl/.json/.parquet file, folder, hub/name"""
    ratings: str = "nvidia/HelpSteer2"
    """rated responses, to train the attribute model on"""
    seed: int = 1
    """seed of the order of data and of samples"""
    chat_template: str = ""
    """chat template that replaces the tokenizer's: a Jinja file, or chatml"""
    chat_template_kwargs: str = ""
    """variables of the chat template, as JSON: {"enable_thinking": false}; the export has them as defaults"""

    # stages made before, and what a stage does
    attribute_model: str = ""
    """regression model of the attributes: a run of reward_model.py or its model folder"""
    annotated: str = ""
    """folder or file annotated before; its lines replace stage 2"""
    conditioned_model: str = ""
    """policy that follows label lines already, a run or a model folder; replaces stage 3"""
    attributes: str = "helpfulness:4,correctness:4,coherence:4,complexity:2,verbosity:2"
    """attributes to condition on, and the values that a question about another one keeps, 0 to 4"""
    num_bootstrap_rounds: int = 0
    """bootstrap rounds: times to sample from the model, annotate and train again"""
    num_bootstrap_prompts: int = 20000
    """prompts sampled in a bootstrap round"""
    bootstrap_top_k: int = 50
    """a bootstrap round samples from this many likeliest tokens"""
    max_new_tokens: int = 512
    """most tokens of a response"""
    temperature: float = 1.0
    """temperature of sampling in a bootstrap round; the following table is greedy, as in the paper"""

    stages: OmitArgPrefixes[Stages] = block(Stages)
    system: OmitArgPrefixes[Inference] = block(Inference)
    run: OmitArgPrefixes[PipelineRun] = block(
        PipelineRun, output_dir=f"runs/{Path(__file__).stem}", num_samples=32
    )


class Scorer(NamedTuple):
    """The attribute model, its own tokenizer, and the names of its outputs."""

    model: nn.Module
    tokenizer: Any
    names: list[str]

    def __call__(self, replies: list[packed.Tokens], args: Args, device: torch.device) -> list[dict]:
        """Attribute values of encoded replies, before rounding; a collective."""
        examples = [packed.Example([reply], "") for reply in replies]
        outputs = models.score(self.model, examples, args.system.micro_batch_tokens, device, centred=False)
        return [dict(zip(self.names, output, strict=True)) for output in outputs.tolist()]


def load_attribute_model(path: str, args: Args, device: torch.device) -> Scorer:
    """A regression model of the attributes, whose outputs are on the scale of the labels."""
    gc.collect()  # FSDP's modules refer to themselves: what came before is freed here, not by counting
    model = models.load_scorer(path, device, args.system, trainable=False)
    tokenizer = data.load_tokenizer(path)
    read_where_trained(model, tokenizer)
    return Scorer(model, tokenizer, models.output_names(model))


def load_policy(path: str, args: Args, device: torch.device) -> nn.Module:
    gc.collect()  # as above
    return models.load(path, device, args.system, trainable=False)


# ---------------------------------------------------------------------------------------------- annotation


def clamp_and_round(score: float) -> int:
    """A value of the scale 0 to 4; halves go to the even neighbour, as Python and NeMo-Aligner round."""
    return round(min(4.0, max(0.0, score)))


def wanted(args: Args, names: list[str]) -> dict[str, float]:
    """`attributes` as numbers, in the order of the attribute model's outputs.

    Raises:
        RunError: one is no output of the model, or its value is not 0 to 4.
    """
    line = formats.read_line(args.attributes, "attributes", names).strip()
    if not line:
        raise formats.wrong(
            "attributes", "none", f"name:value of some of {', '.join(names)}, joined by commas"
        )
    given = dict(item.split(":") for item in line.split(","))
    return {name: float(given[name]) for name in names if name in given}


def annotate(
    attribute_model: str,
    tokenizer: Any,
    records: list[formats.Record],
    target: Path,
    args: Args,
    device: torch.device,
) -> None:
    """Write conversations with a label on every reply of the assistant, in our form and in NeMo-Aligner's.

    A reply is scored after the turns before it, without labels. Interrupted, the next call goes on.

    Args:
        target: the file to write; NeMo-Aligner's twin goes into the folder nemo beside it.
    """
    if dist.from_main(target.exists):
        return
    scorer = load_attribute_model(attribute_model, args, device)
    kept = wanted(args, scorer.names)
    key = (args.attributes, files.fingerprint(attribute_model))  # what labels depend on besides the records

    def read(record: formats.Record) -> tuple[list[dict], list[packed.Tokens]]:
        with data.encoding(record.where):
            prompt, response = formats.read_exchange(tokenizer, *record)
            turns = prompt + response
            replies = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
            return turns, [data.encode_response(scorer.tokenizer, turns[:i], [turns[i]]) for i in replies]

    def label(chunk: list[formats.Record]) -> list[dict]:
        conversations = dist.parallel_map(read, chunk)
        said = [turn for turns, _ in conversations for turn in turns if turn["role"] == "assistant"]
        found = scorer([reply for _, replies in conversations for reply in replies], args, device)
        for turn, values in zip(said, found, strict=True):
            rounded = {name: clamp_and_round(values[name]) for name in kept}
            turn["label"] = formats.label_line(rounded).strip()
        return [{"messages": turns, "type": "VALUE_TO_TEXT"} for turns, _ in conversations]

    if dist.is_main():
        target.parent.mkdir(exist_ok=True)
    dist.barrier()
    files.write_lines(target, records, key, label)
    if dist.is_main():
        written = [record.value["messages"] for record in formats.read_file(target)]
        twin = target.parent / "nemo" / target.name
        twin.parent.mkdir(exist_ok=True)
        twin.write_text("".join(json.dumps(in_nemo_form(messages)) + "\n" for messages in written))
        labels = [turn["label"].split(",") for messages in written for turn in messages if "label" in turn]
        counts = Counter(item for items in labels for item in items)
        for name in kept:
            histogram = "  ".join(f"{value}: {counts[f'{name}:{value}']:,}" for value in range(5))
            print(f"annotated {target.parent.name}/{target.name}  {name:<12} {histogram}", flush=True)


def in_nemo_form(messages: list[dict]) -> dict:
    """A labelled conversation as NeMo-Aligner's chat data has it."""
    turns = [m for m in messages if m["role"] != "system"]
    system = "".join(m["content"] for m in messages if m["role"] == "system")
    said = [{"from": m["role"].capitalize(), "value": m["content"], "label": m.get("label")} for m in turns]
    return {"system": system, "mask": "User", "type": "VALUE_TO_TEXT", "conversations": said}


def load_annotated(options: sft.Args, tokenizer: Any) -> tuple[data.Dataset, data.Dataset]:
    """(train, eval) conversations to condition on.

    Raises:
        RunError: a reply without a label; it would be trained without the line that users ask with.
    """
    for record, where in formats.read_records(options.dataset, "train", "sft"):
        turns = next((record[name] for name in formats.CONVERSATIONS if name in record), [])
        replies = [t for t in turns if str(t.get("role", t.get("from"))).lower() in ("assistant", "gpt")]
        if record.get("type") != "VALUE_TO_TEXT" or not all(turn.get("label") for turn in replies):
            raise formats.wrong(
                where, "a reply without label", "type VALUE_TO_TEXT and a label on each reply"
            )
    return data.load_sft(tokenizer, options.dataset, options.eval_dataset, options.max_length)


# ------------------------------------------------------------------------------------------------ sampling


def high_quality(examples: list[packed.Example]) -> list[str]:
    """Distinct label lines of the data with the best quality (helpfulness), of these the least toxicity."""
    turns = [turn for e in examples for name in formats.CONVERSATIONS for turn in e.record.get(name, ())]
    lines = sorted({formats.read_line(turn["label"], "label") for turn in turns if turn.get("label")})

    def goodness(line: str) -> tuple[int, int]:
        values = dict(item.split(":") for item in line.strip().split(","))
        return int(values.get("quality", values.get("helpfulness", 0))), -int(values.get("toxicity", 0))

    best = max(map(goodness, lines))
    return [line for line in lines if goodness(line) == best]


def sample_best(
    model: str, examples: list[packed.Example], tokenizer: Any, number: int, args: Args, device: torch.device
) -> list[formats.Record]:
    """New replies to prompts of the data, each asked for by one of its lines of high quality.       Eq. 3"""
    lines, rng = high_quality(examples), random.Random(f"{args.seed} {number}")
    examples = [example for example in examples if example.prompt]
    chosen = rng.sample(examples, min(len(examples), args.num_bootstrap_prompts))
    tokens = [data.encode_prompt(tokenizer, e.prompt, rng.choice(lines)) for e in chosen]
    samples = generate(
        load_policy(model, args, device),
        tokenizer,
        tokens,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.bootstrap_top_k,
        seed=args.seed,
        step=number,
    )
    records = []
    for example, sample in zip(chosen, samples, strict=True):
        turns = [*example.prompt, {"role": "assistant", "content": sample.text}]
        records += [formats.Record({"messages": turns}, "bootstrap")] if sample.ended else []
    if dist.is_main():
        print(
            f"bootstrap {number}: {len(chosen) - len(records):,} of {len(chosen):,} replies cut off, left out"
        )
    return records


# -------------------------------------------------------------------------------------- following


def follow(
    policy: nn.Module,
    scorer: Scorer,
    tokenizer: Any,
    examples: list[packed.Example],
    args: Args,
    device: torch.device,
) -> list[dict]:
    """Ask for every value of every attribute, the others as in `attributes`, and score the greedy answers.

    Returns:
        rows of what was asked and what was found, by the judge if there is one, else by the attribute model.
    """
    usual = wanted(args, scorer.names)
    asked = [(name, value, example) for name in usual for value in range(5) for example in examples]
    lines = [formats.label_line({**usual, name: float(value)}) for name, value, _ in asked]
    tokens = [
        data.encode_prompt(tokenizer, e.prompt, line) for (_, _, e), line in zip(asked, lines, strict=True)
    ]
    samples = generate(policy, tokenizer, tokens, max_new_tokens=args.max_new_tokens, temperature=0)
    exchanges = [
        (example.prompt, sample.text) for (_, _, example), sample in zip(asked, samples, strict=True)
    ]
    if judge := load_judge(args.run.judge, args.dataset):
        found = [judge(prompt[-1]["content"], text) for prompt, text in exchanges]
        if missing := usual.keys() - found[0].keys():
            where, lacking = f"judge {args.run.judge}", f"no {', '.join(missing)} in its scores"
            raise formats.wrong(where, lacking, "all of `attributes`")
    else:
        replies = [(prompt, [{"role": "assistant", "content": text}]) for prompt, text in exchanges]
        found = scorer([data.encode_response(scorer.tokenizer, *reply) for reply in replies], args, device)
    rows = []
    for (name, value, example), line, sample, scores in zip(asked, lines, samples, found, strict=True):
        row = {"prompt": example.prompt[-1]["content"], "label": line, "response": sample.text}
        rows.append(row | {"ended": sample.ended, "varied": name, "asked": value, **scores})
    return rows


def follow_metrics(rows: list[dict]) -> dict[str, float]:
    """For each attribute, over the answers in which its value was varied: MAE, Pearson's and Spearman's r."""
    metrics, names = {}, [*dict.fromkeys(row["varied"] for row in rows)]
    for name in names:
        part = [row for row in rows if row["varied"] == name]
        found = agreement([row["asked"] for row in part], [row[name] for row in part])
        for kind in ("mae", "pearson", "spearman"):
            metrics[f"eval/follow/{kind}/{name}"] = found.get(kind, 0.0)  # answers all alike follow nothing
        for value in sorted({row["asked"] for row in part}):
            scores = [row[name] for row in part if row["asked"] == value]
            metrics[f"follow/found/{name}/{value}"] = sum(scores) / len(scores)
    for kind in ("mae", "pearson", "spearman"):
        own = [metrics[f"eval/follow/{kind}/{name}"] for name in names]
        metrics[f"eval/follow/{kind}"] = sum(own) / len(own)
    metrics["eval/follow/mean_words"] = sum(len(row["response"].split()) for row in rows) / len(rows)
    metrics["eval/follow/ended"] = sum(row["ended"] for row in rows) / len(rows)
    return metrics


def save_heat_map(rows: list[dict], path: Path) -> None:
    """Heat map: mean score of the answers, for each attribute and value asked for."""
    import matplotlib
    import pandas as pd

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = pd.DataFrame(rows).groupby("varied", sort=False)
    means = {name: part.groupby("asked")[name].mean() for name, part in parts}
    table = pd.DataFrame(means).T  # attributes x values
    figure, axis = plt.subplots(figsize=(6, 0.6 * len(table) + 1.4))
    image = axis.imshow(table, vmin=0, vmax=4, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(table.columns)), table.columns)
    axis.set_yticks(range(len(table)), table.index)
    axis.set_xlabel("value asked for")
    for y, x in [(y, x) for y in range(len(table)) for x in range(len(table.columns))]:
        value = table.iloc[y, x]
        axis.text(x, y, f"{value:.1f}", ha="center", va="center", color="white" if value < 2.5 else "black")
    figure.colorbar(image, label="mean score of the answers")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# -------------------------------------------------------------------------------------------------- pipeline


def stage_folders(args: Args) -> dict[Path, str]:
    """The folders of the stages that are run, and which script's options each has."""
    folder = Path(args.run.output_dir)
    rounds = {folder / f"5_sft_{k}": "sft" for k in range(1, args.num_bootstrap_rounds + 1)}
    return {folder / "1_attribute_model": "reward_model", folder / "3_sft": "sft", **rounds}


def read_to_annotate(args: Args, split: str) -> list[formats.Record]:
    """The conversations of a split of the data; none if there is no such split."""
    # of the toy world its ratings: their replies are good and bad
    parts = [formats.read_records(name, split, "ratings") for name, _ in formats.read_sources(args.dataset)]
    return [record for part in parts for record in part or ()]


def check_stages(
    args: Args, options: dict[str, Any], records: dict[str, list], tokenizer: Any, device: torch.device
) -> None:
    """Refuse what a later stage would refuse, as far as it can be known before the first begins.

    That is an attribute that the attribute model will not have, a model that is not there, data that cannot
    be read or have no labels, and a batch larger than the data.
    """
    given, folder = args.conditioned_model, Path(args.run.output_dir)
    if given and not dist.from_main(lambda: Path(files.model_folder(given)[0]).is_dir()):
        raise formats.wrong("conditioned_model", given, "a run or a model's folder")
    load_judge(args.run.judge, args.dataset)
    trained = args.attribute_model or str(folder / "1_attribute_model")
    if args.attribute_model or stages.is_complete(Path(trained)):
        wanted(args, load_attribute_model(trained, args, device).names)
    else:
        own = options["reward_model"]
        ratings, _ = data.load_ratings(tokenizer, args.ratings, own.eval_dataset, own.max_length)
        wanted(args, list(ratings[0].fields))
        stages.refuse_large_batch("reward_model", own, ratings.epoch_size)
    if stages.is_complete(folder / "3_sft"):
        return
    if args.annotated:
        num = load_annotated(with_fields(options["sft"], dataset=args.annotated), tokenizer)[0].epoch_size
    else:
        reader = data.load_tokenizer(args.attribute_model) if args.attribute_model else tokenizer
        both = [record for split in records.values() for record in split]
        dist.parallel_map(lambda record: data.read_responses(reader, *record), both)
        num = len(records["train"])
    if not args.conditioned_model:
        stages.refuse_large_batch("sft", options["sft"], num)


def evaluate(
    step: int,
    model: str,
    attribute_model: str,
    tokenizer: Any,
    prompts: list[packed.Example],
    log: Log,
    args: Args,
    device: torch.device,
) -> None:
    """The following table of a model: a row of metrics, lines of samples.jsonl and a picture."""
    if step in log.steps:
        return
    scorer = load_attribute_model(attribute_model, args, device)
    rows = follow(load_policy(model, args, device), scorer, tokenizer, prompts, args, device)
    log.samples(step, rows)
    if dist.is_main():
        save_heat_map(rows, log.folder / "follow.png")
    log(step, args.num_bootstrap_rounds + 1, follow_metrics(rows))


def export(args: Args, last: str) -> None:
    """model/: the last stage's; its chat template takes `attributes` from users of apply_chat_template."""
    if dist.is_main():
        target = Path(args.run.output_dir) / "model"
        with files.whole(target) as unfinished:
            shutil.copytree(files.model_folder(last)[0], unfinished)
            tokenizer = data.load_tokenizer(str(unfinished))
            if tokenizer.chat_template:
                tokenizer.chat_template += EXTENSION
                tokenizer.save_pretrained(unfinished)
    dist.barrier()


TOY = dict(
    ratings="toy",
    attributes="verbosity:1,toxicity:0",
    num_bootstrap_rounds=1,
    num_bootstrap_prompts=256,
    max_new_tokens=48,
    num_samples=32,
    reward_model="--learning_rate 1e-3 --warmup_steps 5 --batch_size 64 --max_steps 40 --eval_every 40",
    sft="--learning_rate 1e-3 --warmup_steps 5 --batch_size 64 --max_steps 120 --eval_every 120 "
    "--num_samples 0",
)


def main(args: Args) -> None:
    # setup
    device = dist.init(args.seed)
    options = stages.read_all(args.stages, STAGES, RESERVED)
    shared = {name: getattr(args, name) for name in ("seed", "chat_template", "chat_template_kwargs")}
    rated = dict(model=args.model, dataset=args.ratings, loss="regression", **shared)
    fine_tuned = dict(model=args.model, dataset=args.dataset, **shared)  # before it is annotated
    todo = [("reward_model", reward_model.main, reward_model.Args, rated, args.stages.reward_model)]
    stages.before(args.run, [*todo, ("sft", sft.main, sft.Args, fine_tuned, args.stages.sft)])
    log = Log(args.run, __file__, SHOWN, snapshot(args, TOY), is_pipeline=True)
    folder, num_rounds = Path(args.run.output_dir), args.num_bootstrap_rounds
    begun = {path: options[name] for path, name in stage_folders(args).items()}
    stages.refuse_changed_stages(begun, RESERVED, args.run.accept_changes)
    tokenizer = data.load_tokenizer(args.model, args.chat_template, args.chat_template_kwargs)
    splits = () if args.annotated else ("train", "test")
    records = {split: read_to_annotate(args, split) for split in splits}
    values = [record.value for split in records.values() for record in split]
    if log.is_finished(num_rounds + 1, files.inputs(args.model, tokenizer, values)):
        return
    check_stages(args, options, records, tokenizer, device)
    log.start(num_rounds + 1)

    # 1. attribute model
    attribute_model = args.attribute_model or str(folder / "1_attribute_model")
    if not args.attribute_model:
        own = args.stages.reward_model
        stage(reward_model.main, reward_model.Args, Path(attribute_model), rated, own, log)

    # 2. annotate
    annotated = Path(args.annotated or folder / "2_annotated")
    for split, found in records.items():
        if found:
            annotate(attribute_model, tokenizer, found, annotated / f"{split}.jsonl", args, device)
    train_set, eval_set = load_annotated(with_fields(options["sft"], dataset=str(annotated)), tokenizer)
    prompts = [example for example in eval_set if example.prompt][: args.run.num_samples]
    asked = (attribute_model, tokenizer, prompts, log, args, device)
    evaluate(0, args.model, *asked)

    # 3. fine-tune
    last = args.conditioned_model or str(folder / "3_sft")
    if not args.conditioned_model:
        overrides = dict(model=args.model, dataset=str(annotated), **shared)
        stage(sft.main, sft.Args, Path(last), overrides, args.stages.sft, log)
    evaluate(1, last, *asked)

    # 4. bootstrap
    for number in range(1, num_rounds + 1):
        sampled = folder / f"4_bootstrap_{number}"
        if not dist.from_main((sampled / "train.jsonl").exists):
            found = sample_best(last, train_set, tokenizer, number, args, device)
            annotate(attribute_model, tokenizer, found, sampled / "train.jsonl", args, device)
        before, last = last, str(folder / f"5_sft_{number}")
        overrides = dict(model=before, dataset=f"{annotated},{sampled}", **shared)
        stage(sft.main, sft.Args, Path(last), overrides, args.stages.sft, log)
        evaluate(number + 1, last, *asked)

    export(args, last)
    log.finish()


if __name__ == "__main__":
    dist.run(main, parse(Args, TOY, STAGES))
