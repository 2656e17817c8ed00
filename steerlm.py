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
import math
import random
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import reward_model
import sft
from common import checkpoint, data, dist, files, formats, labels, models, packed, stages
from common.args import Chat, Inference, PipelineRun, Sampling, block, parse, snapshot
from common.evaluate import agreement, answer, load_judge
from common.generate import generate
from common.loading import config_of
from common.log import Log
from common.rewards import Rater, load_rater
from common.stages import stage

SHOWN = ("follow/mae", "follow/pearson")
STAGES = {"reward_model": reward_model.Args, "sft": sft.Args}
TRAINED = ("1_attribute_model", "3_sft")
LABELLING = ("dataset", "annotated", "attribute_model", "attributes")  # options that decide labels
RESERVED = stages.RESERVED | {"loss", "score"}  # options of stages that the pipeline sets or does not offer
EXTENSION = (
    "{%- if add_generation_prompt and attributes is defined -%}"
    "{{- (label_token | default('')) + attributes + '\\n' -}}{%- endif -%}"
)


@dataclass
class Stages:
    """Options of the stages, each one string as on the command line of the script."""

    fixed: ClassVar[tuple[str, ...]] = ()  # those of a stage that has begun are compared with its own run

    reward_model: str = (
        "--learning_rate 2e-6 --lr_schedule constant --warmup_steps 10 --num_epochs 2 --batch_size 128 "
        "--max_length 4096"
    )
    """options of reward_model.py, as --reward_model "--num_epochs 2"; --reward_model --help lists them"""
    sft: str = (
        "--learning_rate 5e-6 --lr_schedule constant --weight_decay 0.01 --num_epochs 2 --max_length 4096 "
        "--num_samples 0"
    )
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
    chat: Chat = block(Chat)

    # stages made before, and what a stage does
    attribute_model: str = ""
    """regression model of the attributes: a run of reward_model.py or its model folder"""
    annotated: str = ""
    """folder or file annotated before; its lines replace stage 2"""
    conditioned_model: str = ""
    """policy that follows label lines already, a run or a model folder; replaces stage 3"""
    attributes: str = "helpfulness:4,correctness:4,coherence:4,complexity:2,verbosity:2"
    """attributes to condition on, and the values that a question about another one keeps, 0 to 4 or null"""
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

    stages: Stages = block(Stages)
    system: Inference = block(Inference)
    run: PipelineRun = block(PipelineRun, output_dir=f"runs/{Path(__file__).stem}", num_samples=32)


def load_policy(path: str, args: Args, device: torch.device) -> nn.Module:
    gc.collect()  # FSDP's modules refer to themselves: what came before is freed here, not by counting
    return models.load(path, device, args.system, trainable=False)


def clamp_and_round(score: float) -> int:
    """A value of the scale 0 to 4; halves go to the even neighbour, as Python and NeMo-Aligner round."""
    return round(min(4.0, max(0.0, score)))


def read_replies(
    tokenizer: Any, reader: Any, record: formats.Record
) -> tuple[formats.Messages, list[packed.Tokens]]:
    """A conversation, and each reply of the assistant in it as the attribute model reads it, without labels.

    Args:
        reader: the attribute model's tokenizer.
    """
    value, where = record
    with data.encoding(where):
        formats.refuse_fields(value, where)
        prompt, response = formats.read_exchange(tokenizer, value, where)
        turns, is_reply = prompt + response, [turn["role"] == "assistant" for turn in prompt + response]
        trained = data.trained_turns(value, turns, where)
        trained = trained or [False] * len(prompt) + is_reply[len(prompt) :]
        for turn, is_trained, usual in zip(turns, trained, is_reply, strict=True):
            turn |= {"trained": is_trained} if is_trained != usual else {}
        replies = [(turns[:i], [turns[i] | {"trained": True}]) for i, found in enumerate(is_reply) if found]
        return turns, [data.encode_response(reader, *reply) for reply in replies]


def annotate(
    attribute_model: str, tokenizer: Any, records: list, target: Path, args: Args, device: torch.device
) -> None:
    """Write conversations with a label on every reply of the assistant, in our form and in NeMo-Aligner's.

    A reply is scored after the turns before it, without labels. Interrupted, the next call goes on.

    Args:
        target: the file to write; NeMo-Aligner's twin goes into the folder nemo beside it.
    """
    twin = target.parent / "nemo" / target.name
    if dist.from_main(twin.exists):  # it is written last
        return
    rater = load_rater(attribute_model, device, args.system)
    kept = labels.read_wanted(args.attributes, rater.names)
    key = (args.attributes, files.fingerprint(attribute_model))  # what labels depend on besides the records

    def label(chunk: list[formats.Record]) -> list[dict]:
        conversations = dist.parallel_map(lambda r: read_replies(tokenizer, rater.tokenizer, r), chunk)
        said = [turn for turns, _ in conversations for turn in turns if turn["role"] == "assistant"]
        replies = [reply for _, replies in conversations for reply in replies]
        outputs = rater(replies, args.system.micro_batch_tokens, device).tolist()
        for turn, values in zip(said, outputs, strict=True):
            rounded = {n: clamp_and_round(x) for n, x in zip(rater.names, values, strict=True) if n in kept}
            turn["label"] = labels.label_line(rounded).strip()
        return [{"messages": turns, "type": "VALUE_TO_TEXT"} for turns, _ in conversations]

    dist.from_main(lambda: twin.parent.mkdir(parents=True, exist_ok=True))
    if not dist.from_main(target.exists):
        files.write_lines(target, records, key, label)
    written = [conversation["messages"] for conversation in stages.read_lines(target)]
    if dist.is_main():
        twins = [in_nemo_form(turns) for turns in written]
        files.write(twin, files.as_lines(filter(None, twins)))
        if twins.count(None):
            print(f"{twins.count(None):,} conversations cannot be said in NeMo-Aligner's form: not in {twin}")
    lines = [turn["label"].split(",") for messages in written for turn in messages if "label" in turn]
    counts = Counter(item for items in lines for item in items)
    for name in kept:
        histogram = "  ".join(f"{value}: {counts[f'{name}:{value}']:,}" for value in range(5))
        stages.say(f"annotated {target.parent.name}/{target.name}  {name:<12} {histogram}")


def in_nemo_form(messages: list[dict]) -> dict | None:
    """A labelled conversation as NeMo-Aligner's chat data has it; None with tools, thoughts or masks."""
    has_system = messages[0]["role"] == "system"
    system, turns = messages[0]["content"] if has_system else "", messages[has_system:]
    if any(m["role"] not in ("user", "assistant") or m.keys() - {"role", "content", "label"} for m in turns):
        return None
    said = [{"from": m["role"].capitalize(), "value": m["content"], "label": m.get("label")} for m in turns]
    return {"system": system, "mask": "User", "type": "VALUE_TO_TEXT", "conversations": said}


def high_quality(examples: list[packed.Example]) -> list[str]:
    """Distinct label lines of replies with the best quality (helpfulness), of these the least toxicity."""
    turns = [turn for e in examples for name in formats.CONVERSATIONS for turn in e.record.get(name) or ()]
    rated = (formats.first(turn, labels.LABELS) for turn in turns if labels.is_rated(turn))
    lines = sorted({labels.read_line(label, "label") for label in rated} - {""})
    if not lines:
        raise formats.wrong(
            "data to bootstrap from", "no label on a reply", "labels, of which to ask the best"
        )

    def goodness(line: str) -> tuple[int, int]:
        values = dict(item.split(":") for item in line.strip().split(","))
        return int(values.get("quality", values.get("helpfulness", 0))), -int(values.get("toxicity", 0))

    best = max(map(goodness, lines))
    return [line for line in lines if goodness(line) == best]


def sample_best(
    model: str, examples: list, tokenizer: Any, number: int, keep: Path, args: Args, device: torch.device
) -> list[formats.Record]:
    """New replies to prompts of the data, each asked for by one of its lines of high quality.       Eq. 3

    Stopped, the same call goes on from the replies that are in the folder `keep`.
    """
    lines, rng = high_quality(examples), random.Random(f"{args.seed} {number}")
    examples = [example for example in examples if example.prompt]
    chosen = rng.sample(examples, min(len(examples), args.num_bootstrap_prompts))
    asked = [(e, data.encode_prompt(tokenizer, e.prompt, rng.choice(lines))) for e in chosen]
    limit = packed.position_limit(config_of(tokenizer.name_or_path))  # less would leave no room for a reply
    short = [(e, tokens) for e, tokens in asked if len(tokens) < limit]
    samples = generate(
        load_policy(model, args, device),
        tokenizer,
        [tokens for _, tokens in short],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.bootstrap_top_k,
        seed=args.seed,
        step=number,
        keep=keep,
    )
    records = []
    for (example, _), sample in zip(short, samples, strict=True):
        turns = [*example.prompt, {"role": "assistant", "content": sample.text}]
        records += [formats.Record({"messages": turns}, "bootstrap")] if sample.ended else []
    cut = f"{len(short) - len(records):,} of {len(chosen):,} replies cut off, left out"
    long = f"; {len(chosen) - len(short):,} prompts too long" * (len(short) < len(chosen))
    stages.say(f"bootstrap {number}: {cut}{long}")
    if not records:
        expected = "some; raise max_new_tokens, --accept_changes"
        raise formats.wrong(f"bootstrap {number}", "no reply that ended", expected)
    return records


def follow(
    policy: nn.Module, rater: Rater, tokenizer: Any, examples: list, args: Args, device: torch.device
) -> list[dict]:
    """Ask for every value of every attribute, the others as in `attributes`, and score the greedy answers.

    Returns:
        rows of what was asked and what was found, by the judge if there is one, else by the attribute model.
    """
    usual = labels.read_wanted(args.attributes, rater.names)
    asked = [
        (name, value, replace(example, label=labels.label_line({**usual, name: float(value)})))
        for name in usual
        for value in range(5)
        for example in examples
    ]
    judge, greedy = load_judge(args.run.judge, args.dataset), Sampling(args.max_new_tokens, temperature=0.0)
    questions = [example for _, _, example in asked]
    answers = answer(policy, tokenizer, questions, len(asked), greedy, args.seed, 0, judge)
    if answers and not judge:
        exchanges = [(a.example.prompt, a.text) for a in answers]
        scores = rater.judge(exchanges, args.system.micro_batch_tokens, device)
        answers = [replace(a, scores=found) for a, found in zip(answers, scores, strict=True)]

    def key(example: packed.Example) -> str:
        return json.dumps([example.prompt, example.label])

    rows = {key(a.example): a.row() for a in answers}  # equal questions are asked once, too long ones not
    return [rows[key(e)] | {"varied": name, "asked": value} for name, value, e in asked if key(e) in rows]


def follow_metrics(rows: list[dict]) -> dict[str, float]:
    """For each attribute, over the answers in which its value was varied: MAE, Pearson's and Spearman's r."""
    metrics, names = {}, [*dict.fromkeys(row["varied"] for row in rows)]
    if not rows:
        return metrics
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


def sources(args: Args) -> list[tuple[str, float]]:
    """The data sets to annotate and their weights; of the toy world its ratings, replies good and bad."""
    toy = str(files.toy_folder() / "ratings")
    return [(toy if name == "toy" else name, x) for name, x in formats.read_sources(args.dataset)]


def read_to_annotate(args: Args) -> dict[str, dict[Path, list[formats.Record]]]:
    """Each data set as it will be annotated, with its weight -> the files of that, and their conversations.

    Several data sets have folders of their own, so that each keeps its weight and its share to hold out.
    """
    given, folder, found = sources(args), Path(args.run.output_dir) / "2_annotated", {}
    for k, (name, weight) in enumerate(given, 1):
        place = folder / str(k) if len(given) > 1 else folder
        parts = {place / f"{s}.jsonl": formats.read_records(name, s, "ratings") for s in ("train", "test")}
        key = str(place) if weight == 1 else f"{place}*{weight:f}"
        found[key] = {path: records for path, records in parts.items() if records}
    return found


def may_change(args: Args) -> set[str]:
    """The options that decide numbers of nothing that is in the folder: of stages that have not begun."""
    folder = Path(args.run.output_dir)
    rows, rounds = files.read_rows(folder / "metrics.jsonl"), [*folder.glob("4_*")]
    first, second = (checkpoint.newest(folder / x) or (folder / x / "model").is_dir() for x in TRAINED)
    begun = dict.fromkeys(LABELLING, bool(rows or [*folder.glob("2_annotated/**/*.jsonl")]))
    begun |= dict.fromkeys(("num_bootstrap_prompts", "bootstrap_top_k", "temperature"), bool(rounds))
    begun |= {"ratings": first, "conditioned_model": second or len(rows) > 1, "max_new_tokens": bool(rows)}
    begun |= {"num_bootstrap_rounds": len(rounds) > args.num_bootstrap_rounds}
    return {name for name, is_begun in begun.items() if not is_begun}


def check_stages(args: Args, options: dict, found: dict, tokenizer: Any, device: torch.device) -> None:
    """Refuse what a later stage would refuse, as far as it can be known before the first begins.

    That is an attribute that the attribute model or the judge will not have, ratings on another scale than 0
    to 4, a model that is not there, data that cannot be read or have no labels, and a batch larger than them.
    """
    given, folder = args.conditioned_model, Path(args.run.output_dir)
    if given and not dist.from_main(lambda: Path(files.model_folder(given)[0]).is_dir()):
        raise formats.wrong("conditioned_model", given, "a run or a model's folder")
    trained = args.attribute_model or folder / "1_attribute_model"
    if args.attribute_model or stages.is_complete(trained):
        _, reader, names = load_rater(str(trained), device, args.system)
        for records in (records for parts in found.values() for records in parts.values()):
            dist.parallel_map(lambda record: read_replies(tokenizer, reader, record), records)
    else:
        own = options["reward_model"]
        with formats.told_as("ratings"):
            ratings, _ = data.load_ratings(tokenizer, args.ratings, own.eval_dataset, own.max_length)
        names = ratings.field_names()
        for name, value in ((n, x) for n in names for x in ratings.field(n).tolist()):
            if not (math.isnan(value) or 0 <= value <= 4):
                raise formats.wrong(f"ratings {args.ratings}", f"{name} {value:g}", "values from 0 to 4")
        stages.refuse_large_batch("reward_model", own, ratings.epoch_size)
    asked = labels.read_wanted(args.attributes, names).keys()
    judge = load_judge(args.run.judge, args.dataset)
    missing = asked - dist.from_main(lambda: judge("2+2?", "4")).keys() if judge else ()
    if missing:
        lacking = f"no {', '.join(missing)} in its scores"
        raise formats.wrong(f"judge {args.run.judge}", lacking, "all of `attributes`")
    own = options["sft"]
    for dataset in filter(None, (args.annotated, own.eval_dataset)):
        labels.check_labels(dataset)
    if not stages.is_complete(folder / "3_sft"):
        dataset = args.annotated or ",".join(f"{name}*{weight:f}" for name, weight in sources(args))
        num = data.load_sft(tokenizer, dataset, own.eval_dataset, own.max_length)[0].epoch_size
        stages.refuse_large_batch("sft", own, num if not args.conditioned_model else math.inf)


def evaluate(
    step: int, model: str, rated_by: str, tokenizer: Any, prompts: list, log: Log, args: Args, device: Any
) -> None:
    """The following table of a model: a row of metrics and lines of samples.jsonl."""
    if step in log.steps:
        return
    rows = []
    if prompts:
        rater = load_rater(rated_by, device, args.system)
        rows = follow(load_policy(model, args, device), rater, tokenizer, prompts, args, device)
    log.samples(step, rows)
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


TOY = dict(ratings="toy", attributes="complexity:0,verbosity:2,toxicity:0")
TOY |= dict(num_bootstrap_prompts=256, max_new_tokens=48, num_samples=32)
FEW_STEPS = "--learning_rate 1e-3 --warmup_steps 5 --batch_size 64 "
TOY["reward_model"] = FEW_STEPS + "--max_steps 30 --eval_every 30"
TOY["sft"] = FEW_STEPS + "--max_steps 60 --eval_every 60 --num_samples 0"


def main(args: Args) -> None:
    # setup
    device = dist.init(args.seed)
    labels.read_wanted(args.attributes)
    options = stages.read_all(args.stages, STAGES, RESERVED)
    shared = {"seed": args.seed, **vars(args.chat)}
    rated = dict(model=args.model, dataset=args.ratings, loss="regression", **shared)
    fine_tuned = dict(model=args.model, dataset=args.dataset, **shared)  # before it is annotated
    todo = [("reward_model", reward_model.main, reward_model.Args, rated, args.stages.reward_model)]
    todo.append(("sft", sft.main, sft.Args, fine_tuned, args.stages.sft))
    held = {"policy": args.conditioned_model or args.model}
    held["attribute model"] = args.attribute_model or args.model
    slots = options["sft"].max_length + args.max_new_tokens
    stages.before(args, todo, {"annotation and following": held}, slots)
    free, decided = dist.from_main(lambda: may_change(args)), snapshot(args, TOY)
    decided = decided._replace(fixed=decided.fixed - free)
    columns = ("before", "SFT", *(f"round {n}" for n in range(1, args.num_bootstrap_rounds + 1)))
    log = Log(args.run, __file__, SHOWN, decided, is_pipeline=True, columns=columns)
    if "dataset" in free:
        log.before.get("inputs", {}).pop("data", None)
    folder, num_rounds = Path(args.run.output_dir), args.num_bootstrap_rounds
    begun = {folder / "1_attribute_model": options["reward_model"], folder / "3_sft": options["sft"]}
    begun |= {folder / f"5_sft_{k}": options["sft"] for k in range(1, num_rounds + 1)}
    stages.refuse_changed_stages(begun, RESERVED, args.run.accept_changes)
    tokenizer = data.load_tokenizer(args.model, **vars(args.chat))
    found = {} if args.annotated else read_to_annotate(args)
    targets = {path: records for parts in found.values() for path, records in parts.items()}
    values = [record.value for records in targets.values() for record in records]
    if log.is_finished(num_rounds + 1, files.inputs(args.model, tokenizer, values)):
        return
    check_stages(args, options, found, tokenizer, device)
    log.start(num_rounds + 1)

    # 1. attribute model
    attribute_model = args.attribute_model or str(folder / "1_attribute_model")
    if not args.attribute_model:
        own = args.stages.reward_model
        stage(reward_model.main, reward_model.Args, Path(attribute_model), rated, own, log)

    # 2. annotate
    if not dist.from_main(lambda: all(target.exists() for target in targets)):
        stages.say("\nstage 2_annotated")
    for target, records in targets.items():
        annotate(attribute_model, tokenizer, records, target, args, device)
    annotated = args.annotated or ",".join(found)
    own = options["sft"]
    train_set, eval_set = data.load_sft(tokenizer, annotated, own.eval_dataset, own.max_length)
    prompts = [e for e in eval_set if e.prompt][: args.run.num_samples]
    asked = (attribute_model, tokenizer, prompts, log, args, device)
    evaluate(0, args.model, *asked)

    # 3. fine-tune
    last = args.conditioned_model or str(folder / "3_sft")
    if not args.conditioned_model:
        overrides = dict(model=args.model, dataset=annotated, **shared)
        stage(sft.main, sft.Args, Path(last), overrides, args.stages.sft, log)
    evaluate(1, last, *asked)

    # 4. bootstrap
    for number in range(1, num_rounds + 1):
        sampled = folder / f"4_bootstrap_{number}" / "train.jsonl"
        if not dist.from_main((sampled.parent / "nemo" / sampled.name).exists):
            stages.say(f"\nstage {sampled.parent.name}")
            keep = files.part_name(sampled, [], files.fingerprint(last)).with_suffix(".replies")
            records = sample_best(last, train_set, tokenizer, number, keep, args, device)
            annotate(attribute_model, tokenizer, records, sampled, args, device)
        # also what a start has left that was killed just here, which would be taken for data
        dist.from_main(lambda x=sampled.parent: [files.remove(kept) for kept in x.glob("*.replies")])
        before, last = last, str(folder / f"5_sft_{number}")
        overrides = dict(model=before, dataset=f"{annotated},{sampled.parent}", **shared)
        stage(sft.main, sft.Args, Path(last), overrides, args.stages.sft, log)
        evaluate(number + 1, last, *asked)

    export(args, last)
    log.finish()


if __name__ == "__main__":
    dist.run(main, parse(Args, TOY, STAGES))
