r"""Constitutional AI: harmlessness from AI feedback (Bai et al., 2022), https://arxiv.org/abs/2212.08073

A model learns to be harmless from a list of principles, without human labels of harm, in two halves. It
answers red-team prompts, criticises and revises its answers, and is fine-tuned on the revisions (SL-CAI).
Then a judge compares two of its replies, a and b, by a principle; with l the log-probability of a letter,

    p_ab = e^l(A) / (e^l(A) + e^l(B)), a listed first;  p_ba the same, b listed first
    p_a  = (p_ab + 1 - p_ba) / 2                               orders averaged, so that a bias for (A) cancels
    loss = -p_a log sigmoid(r_a - r_b) - (1 - p_a) log sigmoid(r_b - r_a)       preference model, soft labels

and reinforcement learning against that preference model gives RL-CAI. The paper numbers no equation.

    1. reply, then num_revisions times critique and revision by a principle drawn for the prompt
    2. SL-CAI: fine-tuning on all revisions and helpful demonstrations (sft.py)
    3. pairs of replies of SL-CAI, and p_a by the judge
    4. preference model on these and on helpful pairs (reward_model.py)
    5. RL-CAI: PPO against it (ppo.py), or DPO on the same pairs (dpo.py)

    python cai.py --help
    torchrun --nproc_per_node=8 cai.py --model meta-llama/Llama-3.1-8B --chat_template chatml \
        --helpful_model meta-llama/Llama-3.1-8B-Instruct --dataset red_team.jsonl \
        --helpful_demonstrations helpful.jsonl --helpful_pairs pairs.jsonl --helpful_prompts prompts.jsonl

Each stage has its files in output_dir; one that is complete is not run again.

Metrics, results and departures from the paper: docs/cai.md
"""

import itertools
import json
import math
import random
import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

import dpo
import ppo
import reward_model
import sft
from common import chat, constitutions, data, dist, files, formats, stages, templates
from common.args import Inference, PipelineRun, Sampling, block, parse, snapshot
from common.chat import assistant, user
from common.constitutions import ask_judge, clean, is_copy, with_shots
from common.evaluate import answer, answer_metrics, describe, load_judge, refuses
from common.log import Log
from common.stages import stage

EXTREME = "Which reply is the {} by all of these? Answer with its letter alone."  # asked with hard_labels
SCRIPTS = {"sft": sft, "reward_model": reward_model, "ppo": ppo, "dpo": dpo}
STAGES = {name: script.Args for name, script in SCRIPTS.items()}
FOLDERS = {"sft": "2_sft", "reward_model": "4_preference_model", "ppo": "5_ppo", "dpo": "5_dpo"}
RESERVED = stages.RESERVED | {"reward", "score"}  # options of stages that the pipeline sets or does not offer


@dataclass
class Stages:
    """Options of the stages, each one string as on the command line of the script."""

    fixed: ClassVar[tuple[str, ...]] = ()  # those of a stage that has begun are compared with its own run

    sft: str = "--learning_rate 1e-6 --num_samples 0"
    """options of fine-tuning by sft.py, as --sft "--lora_rank 16"; --sft --help lists them"""
    reward_model: str = "--batch_size 512"
    """options of reward_model.py, as --reward_model "--num_epochs 2"; --reward_model --help lists them"""
    ppo: str = "--kl_coef 0.02 --num_samples 0"
    """options of ppo.py, as --ppo "--kl_coef 0.1"; --ppo --help lists them"""
    dpo: str = "--num_samples 0"
    """options of dpo.py, as --dpo "--beta 0.3"; --dpo --help lists them"""


@dataclass
class Args:
    """Constitutional AI, all stages."""

    model: str = "toy"
    """policy to start from: toy, a run folder, a Hugging Face folder, a hub id, a .gguf file"""
    dataset: str = "toy"
    """red-team prompts: toy, .jsonl/.json/.parquet file, folder, hub/name[:config[:split]]; a,b*2 mixes"""
    eval_dataset: str = ""
    """held-out data; default: the data set's test split, else 5 % of its prompts"""
    helpful_demonstrations: str = ""
    """demonstrations to mix with the revisions, as sft.py reads them; a,b*2 mixes; default: none"""
    helpful_pairs: str = ""
    """preferences to mix with those of the judge, as reward_model.py reads them; default: none"""
    helpful_prompts: str = ""
    """ordinary prompts to mix with the red team's in PPO and to evaluate on; default: none"""
    seed: int = 1
    """seed of the order of data and of samples"""
    chat_template: str = ""
    """chat template that replaces the tokenizer's: a Jinja file, or chatml"""
    chat_template_kwargs: str = ""
    """variables of the chat template, as JSON: {"enable_thinking": false}; the export has them as defaults"""

    # stages made before
    revisions: str = ""
    """a file of stage 1, which replaces it"""
    sl_model: str = ""
    """a model that replaces SL-CAI, and stages 1 and 2"""
    pairs: str = ""
    """preferences on red-team prompts that replace stage 3"""
    preference_model: str = ""
    """a reward model that replaces stage 4"""

    # critique, revision and judgement
    constitution: str = "constitutions/critique_revision.json"
    """requests for critique and revision, in Anthropic's shape; toy: those of the toy world"""
    comparisons: str = "constitutions/comparisons.json"
    """principles to compare by, a JSON list; toy: those of the toy world"""
    few_shots: str = "constitutions/few_shots.json"
    """examples that go before a critique or a revision; empty: none"""
    judge_few_shots: str = "constitutions/judge_few_shots.json"
    """examples that go before a comparison; empty: none"""
    judge_request: str = "Answer with the letter of that reply alone: (A) or (B)."
    """how the judge shall answer, at the end of a comparison; cot and hard_labels have words of their own"""
    helpful_model: str = ""
    """model that gives the first replies and writes the revisions; default: model"""
    critic_model: str = ""
    """model that criticises, or its name at critic_url; default: helpful_model"""
    judge_model: str = ""
    """model that compares replies, or its name at judge_url; default: model"""

    # algorithm
    num_red_team: int = 0
    """red-team prompts to use, drawn at random; 0: all"""
    num_revisions: int = 4
    """rounds of critique and revision; the revisions of all rounds are trained on"""
    use_critique: bool = True
    """ask for a critique before each revision; off: ask for the revision at once"""
    copy_retries: int = 1
    """times that a revision which copies its reply is asked for again; one that stays a copy is counted"""
    samples_per_prompt: int = 2
    """responses to each prompt"""
    temperatures: str = "1.0"
    """temperatures of the replies to compare, joined by commas; each gives samples_per_prompt replies"""
    num_principles: int = 1
    """principles drawn for a comparison; the judge's probabilities are averaged over them"""
    hard_labels: bool = False
    """NeMo-Aligner's judge: told all principles, it names the best and the worst of a prompt's replies"""
    num_human_pairs: int = 200
    """people's preferences in the red-team data, where it has any, that the judge is tried on"""
    cot: bool = False
    """the judge reasons before it answers"""
    cot_clamp: float = 0.6
    """with cot: probabilities are clamped to between 1 less this, and this"""
    rl: Literal["ppo", "dpo"] = "ppo"
    """stage 5: PPO against the preference model, or DPO on its pairs, which needs no stage 4"""
    max_prompt_length: int = 1024
    """most tokens of a prompt; one with more is dropped, and counted"""
    max_new_tokens: int = 512
    """most tokens of a reply, critique or revision"""
    temperature: float = 1.0
    """temperature of first replies, critiques, revisions, and answers at each evaluation"""

    decoding: chat.Decoding = block(chat.Decoding)
    stages: Stages = block(Stages)
    server: chat.Server = block(chat.Server)
    system: Inference = block(Inference)
    run: PipelineRun = block(PipelineRun, output_dir=f"runs/{Path(__file__).stem}")


# ------------------------------------------------------------------------------------------------- the maths


def average_orders(p_ab: float, p_ba: float) -> float:
    """P(a is better) from P(A) with a listed first and P(A) with b listed first."""
    return 0.5 + (p_ab - p_ba) / 2  # (p_ab + 1 - p_ba) / 2, and exactly 1/2 for equals


def position_bias(p_ab: float, p_ba: float) -> float:
    """How much more a reply gets for being listed first: 0 for a fair judge, 1 for one that always says A."""
    return p_ab - (1 - p_ba)


def ensemble(p_ab: list[float], p_ba: list[float], clamp: float = 1.0) -> float:
    """P(a is better), the mean over principles, kept between 1 - clamp and clamp."""
    averaged = [average_orders(ab, ba) for ab, ba in zip(p_ab, p_ba, strict=True)]
    return min(clamp, max(1 - clamp, sum(averaged) / len(averaged)))


def entropy(p: float) -> float:
    """Of a coin, in nats."""
    return -sum(x * math.log(x) for x in (p, 1 - p) if x > 0)


def random_for(seed: int, purpose: str, prompt: formats.Messages) -> random.Random:
    """Draws for a prompt: a function of these three, whatever its place in the data."""
    return random.Random(f"{seed} {purpose} {json.dumps(prompt)}")


# ------------------------------------------------------------------------- who replies, criticises and judges


def load_tokenizer(path: str, args: Args) -> Any:
    """The tokenizer of a model; args.chat_template is that of the policy, and of models that have none."""
    given = (args.chat_template, args.chat_template_kwargs)
    tokenizer = data.load_tokenizer(path, *(given if path == args.model else ()))
    if tokenizer.chat_template is None and args.chat_template:
        tokenizer = data.load_tokenizer(path, *given)
    if tokenizer.chat_template is None:
        raise formats.wrong(
            f"model {path}", "no chat template", "one; chatml or a Jinja file as chat_template"
        )
    return tokenizer


def load_model(path: str, args: Args, device: torch.device, keep: Path | None = None) -> chat.Model:
    """A model to ask for replies, which the folder `keep` keeps, and for verdicts."""
    tokenizer, how = load_tokenizer(path, args), (args.max_new_tokens, args.seed, args.decoding, args.cot)
    return chat.Model(path, tokenizer, device, args.system, *how, keep)


def name_of(role: str, args: Args) -> tuple[str, str]:
    """(url, model) of the critic or the judge; no url: a model in this process."""
    if role == "critic":
        return args.server.critic_url, args.critic_model or args.helpful_model or args.model
    return args.server.judge_url, args.judge_model or args.model


def load_other(role: str, own: chat.Model, args: Args, device: torch.device) -> chat.Model | chat.Endpoint:
    """The critic or the judge; `own`, the model that speaks anyway, where it is the same."""
    url, path = name_of(role, args)
    if url:
        folder = Path(args.run.output_dir) / "answers"
        return chat.Endpoint(url, path, args.server, folder, args.max_new_tokens, args.cot)
    return own if path == own.path else load_model(path, args, device, own.keep)


def stream_of(kind: str, number: int = 0) -> int:
    """Tells the random numbers of one kind of replies to a prompt from those of the others.

    number: round of a critique or revision, from 1, 1000 more with each try; temperature of a candidate for
        a pair, from 0.
    """
    streams = {"reply": 0, "critique": 2 * number - 1, "revision": 2 * number, "candidate": 10_000 + number}
    return streams[kind]


def key_of(speaker: str, role: str, args: Args, *texts: Any) -> tuple:
    """What replies and verdicts depend on besides prompts: two models, the options, and texts from files.

    All but max_new_tokens: a reply that has ended stays what it is.
    """
    (url, path), options = name_of(role, args), snapshot(args)
    given = [(name, options.values[name]) for name in sorted(options.fixed - {"max_new_tokens"})]
    return files.fingerprint(speaker), "" if url else files.fingerprint(path), repr((given, texts))


# -------------------------------------------------------------------------------- 1. critiques and revisions


def make_revisions(prompts: list[formats.Messages], path: Path, args: Args, device: torch.device) -> None:
    """Stage 1: a line for each prompt with the first reply, and critique and revision of every round.

    A round goes on from the last good revision; the conversation before it is the prompt and that reply, so
    it does not grow with the rounds. A revision that is empty, cut off, or a copy of the critique or of an
    example is not kept, nor one whose critique the server has refused.
    """
    constitution = constitutions.read_constitution(args.constitution)
    shots = constitutions.read_few_shots(args.few_shots)
    examples, speaker = {turn["content"] for turn in shots}, args.helpful_model or args.model
    key = key_of(speaker, "critic", args, constitution, shots)
    # replies stay here till the run ends, also for one with another max_new_tokens
    keep = files.part_name(path, prompts, key).with_suffix(".replies")
    helper = load_model(speaker, args, device, keep)
    critic = load_other("critic", helper, args, device)

    def revise(talks: list, current: list[str], number: int) -> list[chat.Reply]:
        """Revisions of the current replies; those that copy them are asked for again."""
        revised = helper.replies(talks, stream_of("revision", number), 0, args.temperature)
        for attempt in range(1, args.copy_retries + 1):
            again = [i for i, x in enumerate(revised) if is_copy(clean(x.text, "Revision"), current[i])]
            asked, stream = [talks[i] for i in again], stream_of("revision", number + 1000 * attempt)
            found = helper.replies(asked, stream, 0, args.temperature) if again else []
            for i, reply in zip(again, found, strict=True):
                revised[i] = reply
        return revised

    replies = helper.replies(prompts, stream_of("reply"), 0, args.temperature)
    current = [reply.text for reply in replies]
    rounds: list[list[dict]] = [[] for _ in prompts]
    for number in range(1, args.num_revisions + 1):
        rngs = [random_for(args.seed, f"round {number}", prompt) for prompt in prompts]
        drawn = [rng.randrange(len(constitution)) for rng in rngs]
        talks = [with_shots(shots, [*p, assistant(r)]) for p, r in zip(prompts, current, strict=True)]
        critiques = [chat.Reply("", True)] * len(talks)
        if args.use_critique:
            talks = [[*talk, user(constitution[k][0])] for talk, k in zip(talks, drawn, strict=True)]
            critiques = critic.replies(talks, stream_of("critique", number), 0, args.temperature)
            critiques = [x._replace(text=clean(x.text, "Critique")) for x in critiques]
            talks = [[*talk, assistant(x.text)] for talk, x in zip(talks, critiques, strict=True)]
        talks = [[*talk, user(constitution[k][1])] for talk, k in zip(talks, drawn, strict=True)]
        for i, reply in enumerate(revise(talks, current, number)):
            text, critique = clean(reply.text, "Revision"), critiques[i]
            kept = reply.ended and not critique.refused and text not in {"", critique.text, *examples}
            step = {"principle": drawn[i], "critique": critique.text, "revision": text, "kept": kept}
            step |= {"cue": text != reply.text, "ended": reply.ended, "copied": is_copy(text, current[i])}
            rounds[i].append(step | ({"refused": critique.refused} if critique.refused else {}))
            current[i] = text if kept else current[i]
    first = [{"initial": x.text, "ended": x.ended, "max_new_tokens": args.max_new_tokens} for x in replies]
    records = zip(prompts, first, rounds, strict=True)
    stages.write_lines(path, [{"prompt": p, **reply, "rounds": steps} for p, reply, steps in records])
    stages.say(*dict.fromkeys((helper.report(), critic.report())))


def demonstrations_of(record: dict) -> list[dict]:
    """What fine-tuning reads: each revision that was kept, after its prompt, trained alone."""
    kept = [step["revision"] for step in record["rounds"] if step["kept"]]
    return [{"prompt": record["prompt"], "completion": [assistant(text)]} for text in kept]


def revision_metrics(records: list[dict]) -> dict[str, float]:
    """Shares and means over prompts or over rounds."""
    steps = [step for record in records for step in record["rounds"]]
    each = max(1, len(steps))
    last = [next((s["revision"] for s in r["rounds"][::-1] if s["kept"]), r["initial"]) for r in records]
    changed = [text != record["initial"] for text, record in zip(last, records, strict=True)]
    metrics = {
        "revisions/kept_frac": sum(step["kept"] for step in steps) / each,
        "revisions/ended_frac": sum(step.get("ended", step["kept"]) for step in steps) / each,
        "revisions/copied_frac": sum(step.get("copied", False) for step in steps) / each,
        "revisions/changed_frac": sum(changed) / len(records),
        "revisions/refusal_frac": sum(map(refuses, last)) / len(records),
        "revisions/length_initial": sum(len(r["initial"].split()) for r in records) / len(records),
        "revisions/length_revised": sum(len(text.split()) for text in last) / len(records),
        "revisions/cue_frac": sum(step["cue"] for step in steps) / each,
    }
    return metrics


# --------------------------------------------------------------------------------------------- 3. AI feedback


def compare_replies(
    prompts: list[formats.Messages],
    sl_model: str,
    path: Path,
    args: Args,
    device: torch.device,
    human_pairs: list[tuple[formats.Messages, str, str]] = (),
) -> None:
    """Stage 3: a line for each prompt with replies of SL-CAI, compared two by two in random order.

    p_ab and p_ba have one number for each principle drawn. A reply that was cut off is not compared.

    Args:
        human_pairs: (prompt, chosen, rejected) by people, which the judge compares too, in human_pairs.jsonl.
    """
    principles = constitutions.read_comparisons(args.comparisons)
    shots = constitutions.read_judge_few_shots(args.judge_few_shots)
    key = key_of(sl_model, "judge", args, principles, shots)
    keep = files.part_name(path, prompts, key).with_suffix(".replies")
    policy = load_model(sl_model, args, device, keep)
    judge = load_other("judge", policy, args, device)

    def work(chunk: list[tuple[dict, list[dict]]]) -> list[dict]:
        records, groups = [], []
        for record, replies in chunk:
            rng = random_for(args.seed, "comparisons", record["prompt"])
            usable = [reply for reply in replies if reply["ended"] and reply["text"]]
            rng.shuffle(usable)
            records.append(record | {"cut_off": len(replies) - len(usable), "comparisons": []})
            size = max(2, len(usable)) if args.hard_labels else 2
            groups += [(records[-1], usable[i : i + size], rng) for i in range(0, len(usable) - 1, size)]
        for (record, *_), item in zip(groups, compare(judge, groups, principles, shots, args), strict=True):
            record["comparisons"].append(item)
        return records

    made = [{"prompt": prompt, "max_new_tokens": args.max_new_tokens} for prompt in prompts]
    replies = candidates(policy, prompts, args)
    tried = path.with_name("human_pairs.jsonl")  # first: with the other file the stage is complete
    if human_pairs and not dist.from_main(tried.exists):
        sides = [[{"text": text, "ended": True} for text in pair] for _, *pair in human_pairs]
        asked = [{"prompt": prompt, "chosen": chosen} for prompt, chosen, _ in human_pairs]
        files.write_lines(tried, [*zip(asked, sides, strict=True)], key, work)
    files.write_lines(path, [*zip(made, replies, strict=True)], (key, args.max_new_tokens), work)
    stages.say(*dict.fromkeys((policy.report(), judge.report())))


def compare(judge: Any, groups: list, principles: list[str], shots: list, args: Args) -> list[dict]:
    """A comparison of each group, (record with its prompt, replies, random numbers).

    Of two replies under drawn principles, in both orders; with hard_labels of the best with the worst of all.
    """
    items, asked = [], []
    for record, replies, rng in groups:
        item, texts = {"a": replies[0], "b": replies[1]}, [reply["text"] for reply in replies]
        if args.hard_labels:
            item |= {"principles": [*range(len(principles))], "candidates": replies}
            wanted = ("\n".join([*principles, EXTREME.format(x)]) for x in ("best", "worst"))
            questions = [ask_judge(record["prompt"], rules, texts) for rules in wanted]
        else:
            item["principles"] = rng.sample(range(len(principles)), args.num_principles)
            how = (shots, "".join(rng.choice("AB") for _ in shots), "" if args.cot else args.judge_request)
            orders = [(principles[k], order) for k in item["principles"] for order in (texts, texts[::-1])]
            questions = [ask_judge(record["prompt"], principle, order, *how) for principle, order in orders]
        items.append(item)
        asked.append(questions if len(set(texts)) > 1 else [])
    most = max([2, *(len(replies) for _, replies, _ in groups)])
    answers = judge.verdicts([*itertools.chain(*asked)], string.ascii_uppercase[:most])
    ends = itertools.accumulate(map(len, asked))
    for item, questions, end in zip(items, asked, ends, strict=True):
        settle(item, answers[end - len(questions) : end])
    return items


def settle(item: dict, answers: list[list[float] | None]) -> None:
    """Write what the judge said into a comparison: p_ab, p_ba, of each principle P(the first is better)."""
    if "candidates" in item and answers:
        count = range(len(item["candidates"]))
        best, worst = (max(count, key=p.__getitem__) if p else None for p in answers)
        if None in (best, worst):
            answers = [None, None]
        elif best == worst:
            answers = []
        else:
            item["a"], item["b"] = item["candidates"][best], item["candidates"][worst]
            answers = [[1.0], [0.0]]
    letters = [p and p[0] for p in answers]
    item["p_ab"], item["p_ba"] = letters[::2], letters[1::2]


def candidates(policy: chat.Model, prompts: list[formats.Messages], args: Args) -> list[list[dict]]:
    """For each prompt samples_per_prompt replies at each temperature."""
    found: list[list[dict]] = [[] for _ in prompts]
    for k, temperature in enumerate(read_temperatures(args)):
        stream = stream_of("candidate", k)
        replies = policy.replies(prompts, stream, 0, temperature, args.samples_per_prompt)
        for i, reply in enumerate(replies):
            candidate = {"text": reply.text, "temperature": temperature, "ended": reply.ended}
            found[i // args.samples_per_prompt].append(candidate)
    return found


def read_temperatures(args: Args) -> list[float]:
    texts = args.temperatures.split(",")
    if not all(re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*", text) for text in texts):
        raise formats.wrong("temperatures", repr(args.temperatures), "numbers of 0 or more, joined by commas")
    return [float(text) for text in texts]


def read_comparison(item: dict, args: Args) -> float | None:
    """P(a is better); 1/2 for a tie, of equal replies too; None where an answer could not be read."""
    if None in item["p_ab"] + item["p_ba"]:
        return None
    return ensemble(item["p_ab"], item["p_ba"], args.cot_clamp if args.cot else 1.0) if item["p_ab"] else 0.5


def labelled(items: list[dict], args: Args) -> list[tuple[dict, float]]:
    """The comparisons that give a label, neither ties nor unreadable, with P(a is better)."""
    found = [(item, read_comparison(item, args)) for item in items]
    return [(item, p) for item, p in found if p not in (None, 0.5)]


def preferences_of(record: dict, args: Args) -> list[dict]:
    """What the preference model and DPO read: the likelier winner as chosen, with its probability."""
    pairs = []
    for item, p_a in labelled(record["comparisons"], args):
        sides = zip(("chosen", "rejected"), "ab" if p_a > 0.5 else "ba", strict=True)
        pair = {"prompt": record["prompt"]} | {name: [assistant(item[x]["text"])] for name, x in sides}
        pair["label_prob"] = max(p_a, 1 - p_a)
        pairs.append(pair | {name: item[name] for name in ("p_ab", "p_ba", "principles")})
    return pairs


def judge_metrics(records: list[dict], args: Args) -> dict[str, float]:
    """Means over the comparisons that give a label; shares of all comparisons for those that give none."""
    items = [item for record in records for item in record["comparisons"]]
    found, labels = [read_comparison(item, args) for item in items], [p for _, p in labelled(items, args)]
    readable = (item for item, p in zip(items, found, strict=True) if p is not None)
    orders = [both for item in readable for both in zip(item["p_ab"], item["p_ba"], strict=True)]
    metrics = {
        "judge/num_pairs": float(len(labels)),
        "judge/p_a_mean": sum(labels) / max(1, len(labels)),
        "judge/label_prob": sum(max(p, 1 - p) for p in labels) / max(1, len(labels)),
        "judge/entropy": sum(map(entropy, labels)) / max(1, len(labels)),
        "judge/position_bias": sum(position_bias(*both) for both in orders) / max(1, len(orders)),
        "judge/ties": found.count(0.5) / max(1, len(items)),
        "judge/parse_failures": found.count(None) / max(1, len(items)),
        "judge/cut_off": float(sum(record["cut_off"] for record in records)),
    }
    return metrics


def agreement(records: list[dict], args: Args) -> dict[str, float]:
    """How often the judge prefers the reply that people chose, of those of their pairs it has a label for."""
    agrees, sure = [], []
    for record in records:
        for item, p in labelled(record["comparisons"], args):
            agrees.append(item["a" if p > 0.5 else "b"]["text"] == record["chosen"])
            sure.append(max(p, 1 - p))
    share, mean = (sum(x) / max(1, len(x)) for x in (agrees, sure))
    found = {"agreement_with_humans": share, "calibration_error": abs(share - mean)}
    return {f"judge/{k}": x for k, x in {**found, "num_human_pairs": float(len(sure))}.items()}


# -------------------------------------------------------------------------------------------------- pipeline


def check(args: Args) -> None:
    """Refuse settings that cannot go together, before any work starts."""
    for role in ("critic", "judge"):
        if url := getattr(args.server, f"{role}_url"):
            chat.check_server(f"{role}_url", url, getattr(args, f"{role}_model"))
    chat.read_body(args.server.judge_body)
    num_replies = args.samples_per_prompt * len(read_temperatures(args))
    if num_replies < 2 or (args.hard_labels and num_replies > 26):  # as there are letters
        expected = "2 or more replies to compare, with hard_labels at most 26"
        raise formats.wrong("samples_per_prompt", args.samples_per_prompt, expected)
    if args.hard_labels and (args.cot or args.num_principles != 1):
        raise dist.RunError(
            "hard_labels asks for letters, by all principles: leave out cot and num_principles"
        )
    constitutions.read_constitution(args.constitution)
    constitutions.read_few_shots(args.few_shots)
    constitutions.read_judge_few_shots(args.judge_few_shots)
    num = len(constitutions.read_comparisons(args.comparisons))
    if not 1 <= args.num_principles <= num:
        raise formats.wrong("num_principles", args.num_principles, f"1 to {num}, the principles there are")


def check_stages(args: Args, options: dict[str, Any], prompts: list[formats.Messages]) -> None:
    """Refuse what a later stage would refuse, as far as it can be known before the first begins.

    That is a model without a chat template, data that cannot be read, and a batch larger than the data.
    """
    others = [path for url, path in (name_of(role, args) for role in ("critic", "judge")) if not url]
    tokenizer = load_tokenizer(args.model, args)
    for path in {args.helpful_model, args.sl_model, *others} - {"", args.model}:
        templates.check_prompts(load_tokenizer(path, args), prompts, f"model {path}")
    load_judge(args.run.judge, args.dataset)
    if args.rl == "dpo":
        dpo.check(options["dpo"])
        if not (args.pairs or args.hard_labels or dpo.reads_label_prob(options["dpo"].loss)):
            expected = "dpo, robust or ipo, which read the probabilities of the judge"
            raise formats.wrong("dpo: loss", options["dpo"].loss, expected)
    if args.rl == "ppo":
        ppo.check(options["ppo"])
        loss = options["reward_model"].loss
        if not args.preference_model and loss not in reward_model.PAIRWISE:
            expected = f"one of pairs, {', '.join(reward_model.PAIRWISE)}"
            raise formats.wrong("reward_model: loss", loss, expected)
        if args.preference_model:
            reader = data.load_tokenizer(args.preference_model)
            templates.check_prompts(reader, prompts, f"model {args.preference_model}")
    each = 1 if args.hard_labels else args.samples_per_prompt * len(read_temperatures(args)) // 2
    num_pairs, num_revisions = 0 if args.pairs else len(prompts) * each, len(prompts) * args.num_revisions
    if args.revisions:
        num_revisions = sum(len(demonstrations_of(record)) for record in stages.read_lines(args.revisions))
    readers = dict.fromkeys(("reward_model", "dpo"), (data.load_pairs, num_pairs))
    readers["sft"] = data.load_sft, num_revisions
    for name, given in data_given(args).items():
        if name in readers and not stages.is_complete(Path(args.run.output_dir) / FOLDERS[name]):
            load, made = readers[name]
            train = load(tokenizer, given, "", options[name].max_length)[0] if given else data.Dataset([])
            stages.refuse_large_batch(name, options[name], data.num_kept(made) + train.epoch_size)


def data_given(args: Args) -> dict[str, str]:
    """Of each trained stage that is to come the data that the user adds to what stages before make."""
    todo = {} if args.sl_model else {"sft": args.helpful_demonstrations}
    pairs = stages.mixed(args.pairs, args.helpful_pairs)
    if args.rl == "dpo":
        return todo | {"dpo": pairs}
    return todo | ({} if args.preference_model else {"reward_model": pairs}) | {"ppo": args.helpful_prompts}


def load_red_team(args: Args, tokenizer: Any) -> tuple[list[formats.Messages], data.Dataset, list]:
    """num_red_team prompts to train on, held-out examples none of which is among the data's prompts, and
    num_human_pairs preferences of people, (prompt, chosen, rejected), where the data have them.
    """
    train, held_out = data.load_prompts(
        tokenizer, args.dataset, args.eval_dataset, args.max_prompt_length, "red_team"
    )
    known = dict.fromkeys(json.dumps(example.prompt) for example in train)
    prompts = [json.loads(text) for text in known]
    unseen = [example for example in held_out if json.dumps(example.prompt) not in known]
    if len(unseen) < len(held_out):
        num = len(held_out) - len(unseen)
        stages.say(f"red team: {num} held-out prompts left out, they are trained on too")
    if not unseen:
        raise formats.wrong("eval_dataset", "prompts of the training data only", "some that are not in it")
    draw = random.Random(args.seed)
    if args.num_red_team:
        prompts = draw.sample(prompts, min(len(prompts), args.num_red_team))
    having = [e for e in train if formats.first(e.record, formats.REJECTED) is not None]
    pairs = []
    for example in draw.sample(having, min(len(having), args.num_human_pairs)):
        prompt, *sides, _ = formats.read_pair(tokenizer, example.record, "a preference")
        if all(len(side) == 1 for side in sides):
            pairs.append((prompt, *(side[0]["content"] for side in sides)))
    return prompts, data.Dataset([(unseen, 1.0)]), pairs


def revise(
    prompts: list[formats.Messages], args: Args, device: torch.device
) -> tuple[Path, dict[str, float]]:
    """Stage 1, or the file that replaces it. -> (demonstrations for fine-tuning, metrics)"""
    folder = Path(args.run.output_dir) / "1_revisions"
    path = Path(args.revisions or folder / "revisions.jsonl")
    next_stage = Path(args.run.output_dir) / FOLDERS["sft"]
    if not args.revisions and stages.begin_again(path, next_stage, "max_new_tokens", args.max_new_tokens):
        make_revisions(prompts, path, args, device)
    records = stages.read_lines(path)
    metrics = revision_metrics(records)
    stages.show(metrics)
    if not metrics["revisions/kept_frac"]:
        more = "a better critic, or more max_new_tokens, which makes again only what was cut off"
        raise formats.wrong(str(path), "no revision to keep", more)
    stages.write_lines(folder / "sft.jsonl", [x for record in records for x in demonstrations_of(record)])
    return folder / "sft.jsonl", metrics


def ask_for_feedback(
    prompts: list[formats.Messages], sl_model: str, args: Args, device: torch.device, human_pairs: list
) -> tuple[Path, dict[str, float]]:
    """Stage 3. -> (preferences, metrics of the judge)"""
    folder = Path(args.run.output_dir) / "3_pairs"
    path = folder / "comparisons.jsonl"
    next_stage = Path(args.run.output_dir) / FOLDERS["dpo" if args.rl == "dpo" else "reward_model"]
    if stages.begin_again(path, next_stage, "max_new_tokens", args.max_new_tokens):
        compare_replies(prompts, sl_model, path, args, device, human_pairs)
    records = stages.read_lines(path)
    metrics = judge_metrics(records, args)
    if human_pairs:
        metrics |= agreement(stages.read_lines(folder / "human_pairs.jsonl"), args)
    stages.show(metrics)
    if not metrics["judge/num_pairs"]:
        more = "a judge that prefers one of two replies, or more max_new_tokens"
        raise formats.wrong(str(path), "no pair with a label", more)
    stages.write_lines(folder / "pairs.jsonl", [x for r in records for x in preferences_of(r, args)])
    return folder / "pairs.jsonl", metrics


def stages_before(args: Args, shared: dict[str, Any]) -> list[tuple]:
    """The stages for --plan and --check, with the data that the user gives them and a model that is there."""
    todo = []
    for name, dataset in data_given(args).items():
        model = args.model if name == "sft" else args.sl_model or args.model
        own = dict(model=model, dataset=dataset, **shared)
        if name == "ppo":  # a check needs a reward that is there
            own["dataset"] = args.dataset if args.preference_model or args.run.plan else ""
            own["reward"] = args.preference_model or args.model
        todo.append((name, SCRIPTS[name].main, STAGES[name], own, getattr(args.stages, name)))
    return todo


def speakers(args: Args) -> dict[str, dict[str, str]]:
    """For --plan: the models that a stage holds which trains nothing, by what they do, and where they are."""
    helper, sl_model = args.helpful_model or args.model, args.sl_model or args.model
    found = {} if args.revisions or args.sl_model else {"revisions": {"helpful model": helper}}
    found |= {} if args.pairs else {"comparisons": {"SL-CAI": sl_model}}
    for name, role, own in (("revisions", "critic", helper), ("comparisons", "judge", args.sl_model)):
        url, path = name_of(role, args)
        if name in found and not url and path != own:  # as `load_other`
            found[name][role] = path
    return found


TOY = dict(
    helpful_demonstrations="toy",
    helpful_pairs="toy",
    helpful_prompts="toy",
    constitution="toy",
    comparisons="toy",
    few_shots="",
    judge_few_shots="",
    num_red_team=384,
    num_revisions=2,
    copy_retries=0,  # where nothing is wrong with a reply, the toy's revision is the reply
    judge_request="",
    max_new_tokens=48,
    num_samples=128,
    sft="--learning_rate 1e-3 --warmup_steps 5 --batch_size 64 --max_steps 40 --eval_every 40 "
    "--num_samples 0",
    reward_model="--learning_rate 1e-3 --warmup_steps 5 --batch_size 64 --max_steps 30 --eval_every 30",
    ppo="--kl_coef 0.05 --learning_rate 3e-4 --value_learning_rate 1e-3 --warmup_steps 5 --rollout_size 128 "
    "--batch_size 64 --max_steps 18 --max_new_tokens 48 --eval_every 18 --num_samples 0",
    dpo="--beta 0.3 --learning_rate 3e-4 --warmup_steps 5 --batch_size 64 --max_steps 40 --eval_every 40 "
    "--num_samples 0",
)


def main(args: Args) -> None:
    # setup
    device = dist.init(args.seed)
    check(args)
    options = stages.read_all(args.stages, STAGES, RESERVED)
    common = {name: getattr(args, name) for name in ("seed", "chat_template", "chat_template_kwargs")}
    slots = args.max_prompt_length + 3 * args.max_new_tokens  # prompt, reply, critique, revision
    stages.before(args, stages_before(args, common), speakers(args), slots)
    folder, given = Path(args.run.output_dir), snapshot(args, TOY)
    later = [folder / FOLDERS[name] for name in ("reward_model", args.rl)]
    if not dist.from_main(lambda: any(map(stages.has_begun, later))):
        given.fixed.discard("max_new_tokens")  # see stages.begin_again
    log = Log(args.run, __file__, (), given, is_pipeline=True, columns=("before", "SL-CAI", "RL-CAI"))
    begun = {folder / FOLDERS[name]: own for name, own in options.items()}
    stages.refuse_changed_stages(begun, RESERVED, args.run.accept_changes)

    # data
    tokenizer = load_tokenizer(args.model, args)
    prompts, red_team, human_pairs = load_red_team(args, tokenizer)
    held_out = {"red_team": red_team, "ordinary": data.Dataset([])}
    if args.helpful_prompts:
        helpful = data.load_prompts(tokenizer, args.helpful_prompts, "", args.max_prompt_length)
        held_out["ordinary"] = helpful[1]
    if log.is_finished(2, files.inputs(args.model, tokenizer, prompts, *held_out.values())):
        return
    check_stages(args, options, prompts)
    log.start(2)
    asked_again = folder / ".asked_again"  # till the run ends: a restart keeps what it has paid
    if args.server.forget_answers and not dist.from_main(asked_again.exists):
        dist.from_main(lambda: [files.remove(folder / "answers"), files.write(asked_again, "")])
    stages.write_lines(folder / "0_prompts" / "train.jsonl", [{"prompt": prompt} for prompt in prompts])
    stages.write_lines(folder / "0_prompts" / "test.jsonl", [{"prompt": e.prompt} for e in red_team])

    def evaluate(step: int, model: str, metrics: dict[str, float]) -> None:
        """A row with these metrics and those of a model's answers, and the answers in samples.jsonl."""
        if step in log.steps:
            return
        speaker, sampling = load_model(model, args, device), Sampling(args.max_new_tokens, args.temperature)
        how = (args.run.num_samples, sampling, args.seed, step, load_judge(args.run.judge, args.dataset))
        for kind, examples in held_out.items():
            answers = answer(speaker.policy, speaker.tokenizer, examples, *how)
            for a, found in zip(answers, describe([a.text for a in answers]), strict=True):
                a.scores = found | a.scores
            log.samples(step, [a.row() for a in answers])
            means = {name.rpartition("/")[2]: mean for name, mean in answer_metrics(answers).items()}
            metrics = metrics | {f"eval/judge/{kind}_{name}": mean for name, mean in means.items()}
        log(step, 2, metrics)

    def run(name: str, model: str, *sources: Any, **own: Any) -> str:
        """Run a stage on a model and a mixture of data. -> its folder, which holds its model"""
        script, at = SCRIPTS[name], folder / FOLDERS[name]
        own |= dict(model=model, dataset=stages.mixed(*sources), **common)
        stage(script.main, script.Args, at, own, getattr(args.stages, name), log)
        return str(at)

    # 1. critiques and revisions, 2. SL-CAI
    evaluate(0, args.model, {})
    sl_model, metrics = args.sl_model, {}
    if not sl_model:
        demonstrations, metrics = revise(prompts, args, device)
        sl_model = run("sft", args.model, demonstrations, args.helpful_demonstrations)
    evaluate(1, sl_model, metrics)

    # 3. AI feedback
    pairs, metrics = args.pairs, {}
    if not pairs:
        pairs, metrics = ask_for_feedback(prompts, sl_model, args, device, human_pairs)

    # 4. preference model, 5. RL-CAI
    if args.rl == "dpo":
        last = run("dpo", sl_model, pairs, args.helpful_pairs)
    else:
        reward = args.preference_model or run("reward_model", sl_model, pairs, args.helpful_pairs)
        last = run("ppo", sl_model, folder / "0_prompts", args.helpful_prompts, reward=reward)
    evaluate(2, last, metrics)

    stages.export(Path(last), folder)
    log.finish()
    dist.from_main(lambda: files.remove(asked_again))


if __name__ == "__main__":
    dist.run(main, parse(Args, TOY, STAGES))
