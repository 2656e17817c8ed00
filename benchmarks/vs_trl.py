"""CleanAlign and TRL side by side: speed, memory, time to the first step, losses, lines that run.

    python benchmarks/vs_trl.py all         the three below
    python benchmarks/vs_trl.py sft         packed on both sides
    python benchmarks/vs_trl.py dpo         TRL pads, as it has no padding-free DPO
    python benchmarks/vs_trl.py reward      TRL pads
    python benchmarks/vs_trl.py all --small --rounds 1

Both sides get the same weights (a random Llama of 19M parameters, written once), the same conversations in
the same order, AdamW in float32 (on a GPU bfloat16 compute on float32 weights) and two threads, and run in
turn, each in a process of its own. Conversations have the turns and lengths of HH-RLHF if ../shared/data
holds it, else drawn ones like it, and random words. A JSON line with all figures is appended to
benchmarks/results/vs_trl.jsonl, but not with --small.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from harness import ROOT, did_job, in_process, llama, peak_mib, record, turn_lengths, write_tokenizer


@dataclass
class Work:
    """One comparison: the model's shape, the examples of a step and how each side cuts them up."""

    task: str
    vocab_size: int = 32_000
    hidden_size: int = 256
    num_layers: int = 4
    head_width: int = 32
    warmup_steps: int = 3
    num_steps: int = 8
    row_tokens: int = 2048
    """tokens of a packed row: of ours for all tasks, of TRL's for SFT"""
    rows_per_step: int = 2
    """sft: TRL takes one row a micro-batch, its fastest"""
    pairs_per_step: int = 8
    """dpo, reward: pairs of an optimizer step"""
    trl_pairs: int = 1
    """dpo, reward: pairs in one padded micro-batch of TRL; with one it is fastest, as little is padded"""
    max_length: int = 1024
    learning_rate: float = 1e-4
    beta: float = 0.1
    threads: int = 2


# shorter rows where logits take no memory: less than TRL's, at nearly the same speed
OF_TASK: dict[str, dict[str, int]] = {"sft": {}, "dpo": {}, "reward": {"row_tokens": 1280}}
SMALL = dict(vocab_size=1000, hidden_size=64, num_layers=2, num_steps=5, row_tokens=1024, rows_per_step=1)


# ------------------------------------------------------------------------------------------------- the work


def make_pairs(work: Work) -> list[dict]:
    """Preference pairs of random words, common ones more often."""
    rng = random.Random(0)

    def turn(length: int, role: str) -> dict[str, str]:
        words = (int(work.vocab_size * rng.random() ** 3) for _ in range(length))
        return {"role": role, "content": " ".join(f"w{min(w, work.vocab_size - 8)}" for w in words)}

    pairs = []
    for prompt, chosen, rejected in turn_lengths():
        if sum(prompt) + max(chosen[0], rejected[0]) + 5 * (len(prompt) + 1) > work.max_length:
            continue
        before = [turn(n, ("user", "assistant")[i % 2]) for i, n in enumerate(prompt)]
        pairs.append(
            {
                "prompt": before,
                "chosen": [turn(*chosen, "assistant")],
                "rejected": [turn(*rejected, "assistant")],
            }
        )
    rng.shuffle(pairs)
    return pairs


def count_tokens(messages: list[dict]) -> int:
    return sum(len(m["content"].split()) + 3 for m in messages)


def example_tokens(example: dict) -> int:
    if "messages" in example:
        return count_tokens(example["messages"])
    return sum(count_tokens(example["prompt"] + example[side]) for side in ("chosen", "rejected"))


def prepare(work: Work, folder: Path) -> None:
    """Write the model, the tokenizer and the examples of every step, for SFT in packed rows."""
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    write_tokenizer(folder, work.vocab_size)
    torch.manual_seed(0)
    size = work.hidden_size
    config = llama(work.vocab_size, size, work.num_layers, size // work.head_width)
    if work.task == "reward":
        config.num_labels = 1
        LlamaForSequenceClassification(config).save_pretrained(folder)
    else:
        LlamaForCausalLM(config).save_pretrained(folder)

    pairs = make_pairs(work)
    if work.task != "sft":
        steps = [
            [pairs[s * work.pairs_per_step + i] for i in range(work.pairs_per_step)]
            for s in range(work.num_steps)
        ]
        lines = [{"examples": step, "rows": []} for step in steps]
    else:
        from common.packed import pack

        chats = [pair["prompt"] + pair["chosen"] for pair in pairs]
        lengths = [count_tokens(chat) for chat in chats]
        rows = [row for row in pack(range(len(chats)), lengths, work.row_tokens)]
        random.Random(1).shuffle(rows)
        lines = []
        for s in range(work.num_steps):
            chosen = rows[s * work.rows_per_step : (s + 1) * work.rows_per_step]
            examples = [{"messages": chats[i]} for row in chosen for i in row]
            lines.append({"examples": examples, "rows": [len(row) for row in chosen]})
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    examples = [example for line in lines for example in line["examples"]]
    (folder / "train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))


def read_steps(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- the two sides


class Meter:
    """When each optimizer step ended, the memory of the process, the files that ran in the second step."""

    def __init__(self, started: float):
        self.started = started
        self.ends: list[float] = []
        self.cpu: list[float] = []
        self.files: set[str] = set()
        self.before = peak_mib()

    def step_begins(self) -> None:
        if len(self.ends) == 1:  # in warm-up, as being watched is slow
            sys.setprofile(lambda frame, event, _: self.files.add(frame.f_code.co_filename))

    def step_ended(self) -> None:
        sys.setprofile(None)
        self.ends.append(time.time())
        self.cpu.append(time.process_time())

    def report(self, losses: list[float]) -> dict[str, Any]:
        files = sorted(f for f in self.files if is_to_read(f))
        return {
            "losses": losses,
            "bfloat16": sys.modules["torch"].cuda.is_available(),
            "step_seconds": [b - a for a, b in zip([self.started, *self.ends], self.ends, strict=False)],
            "cpu_seconds": [b - a for a, b in zip([0.0, *self.cpu], self.cpu, strict=False)],
            "peak_rss_mib": peak_mib(),
            "rss_before_training_mib": self.before,
            "files": {short_name(f): len(Path(f).read_text().splitlines()) for f in files},
        }


def is_to_read(file: str) -> bool:
    """The training code of either side; not torch, the model's own code or this file."""
    if Path(file).parent == Path(__file__).parent or not file.endswith(".py"):
        return False
    ours = file.startswith(str(ROOT)) and "site-packages" not in file
    return ours or any(
        f"/site-packages/{name}" in file for name in ("trl/", "accelerate/", "transformers/trainer")
    )


def short_name(file: str) -> str:
    return file.split("/site-packages/")[-1].removeprefix(f"{ROOT}/")


def run_ours(started: float, work: dict, folder: str) -> dict[str, Any]:
    """The functions and the update of sft.py, dpo.py or reward_model.py."""
    import torch

    from common import data, dist, models, packed
    from common.args import with_fields

    work = Work(**work)
    script = __import__({"reward": "reward_model"}.get(work.task, work.task))
    source = str(Path(folder) / "train.jsonl")
    args = with_fields(
        script.Args(),
        model=folder,
        dataset=source,
        eval_dataset=source,
        micro_batch_tokens=work.row_tokens,
        max_length=work.max_length,
        activation_checkpointing="off",
        **({"beta": work.beta} if work.task == "dpo" else {}),
    )
    device = dist.init(args.seed)
    tokenizer = data.load_tokenizer(args.model)
    load_examples = data.load_sft if work.task == "sft" else data.load_pairs
    examples, _ = load_examples(tokenizer, source, source, args.max_length)
    load = models.load_scorer if work.task == "reward" else models.load
    policy = load(args.model, device, args.system)
    before: tuple = ()  # what loss_and_metrics takes between the policy and the row
    if work.task == "dpo":
        before = (models.load(args.model, device, args.system, trainable=False),)
    after = () if work.task == "sft" else (args,)
    optimizer = torch.optim.AdamW(
        models.parameter_groups(policy, 0.0), lr=work.learning_rate, betas=(0.9, 0.95)
    )

    meter, losses, start = Meter(started), [], 0
    for step in read_steps(Path(folder)):
        meter.step_begins()
        batch = examples[start : start + len(step["examples"])]
        start += len(batch)
        count = sum(e.num_targets for e in batch) if work.task == "sft" else len(batch)
        totals = dist.Totals()
        for row in packed.micro_batches(batch, work.row_tokens, device):
            loss, metrics = script.loss_and_metrics(policy, *before, row, *after)
            (loss / count).backward()
            totals.update(metrics)
        totals.update({"grad_norm": (models.clip_grad_norm(policy, 1.0), 1)})
        optimizer.step()
        optimizer.zero_grad()
        losses.append(totals.reduce()["loss"])
        meter.step_ended()
    return meter.report(losses)


def run_trl(started: float, work: dict, folder: str) -> dict[str, Any]:
    """TRL's trainer with the settings that are its fastest on a CPU."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )

    work, folder, gpu = Work(**work), Path(folder), torch.cuda.is_available()

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.step_begins()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.step_ended()

    settings = {
        "output_dir": str(folder / "trl"),
        "use_cpu": not gpu,
        "bf16": gpu,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "max_steps": work.num_steps,
        "max_length": work.max_length,
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    steps = read_steps(folder)

    def load() -> Any:
        auto = AutoModelForSequenceClassification if work.task == "reward" else AutoModelForCausalLM
        return auto.from_pretrained(folder, dtype=torch.float32)

    if work.task == "sft":
        args = trl.SFTConfig(
            **settings | {"max_length": work.row_tokens},
            packing=True,
            packing_strategy="bfd",
            dataset_kwargs={"skip_prepare_dataset": True},  # packed by the same rule, but step by step
            per_device_train_batch_size=1,
            gradient_accumulation_steps=work.rows_per_step,
        )
        rows = [row for step in steps for row in trl_rows(tokenizer, step)]
        dataset = Dataset.from_list(rows)
        trainer = trl.SFTTrainer(load(), args=args, train_dataset=dataset, processing_class=tokenizer)
    else:
        settings["per_device_train_batch_size"] = work.trl_pairs
        settings["gradient_accumulation_steps"] = work.pairs_per_step // work.trl_pairs
        dataset = Dataset.from_list([pair for step in steps for pair in step["examples"]])
        sides = {"train_dataset": dataset, "processing_class": tokenizer}
        if work.task == "dpo":
            args = trl.DPOConfig(**settings, beta=work.beta)
            trainer = trl.DPOTrainer(load(), ref_model=load(), args=args, **sides)
        else:
            trainer = trl.RewardTrainer(load(), args=trl.RewardConfig(**settings), **sides)
    meter = Meter(started)
    trainer.add_callback(Watch())
    trainer.train()
    return meter.report([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def trl_rows(tokenizer: Any, step: dict) -> list[dict]:
    """The rows of a step in the columns TRL's packing makes."""
    documents = []
    for example in step["examples"]:
        chat = tokenizer.apply_chat_template(
            example["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        pairs = zip(chat["input_ids"], chat["assistant_masks"], strict=True)
        documents.append((chat["input_ids"], [t if m else -100 for t, m in pairs]))
    rows, start = [], 0
    for size in step["rows"]:
        row = documents[start : start + size]
        start += size
        rows.append(
            {
                "input_ids": sum((ids for ids, _ in row), []),
                "labels": sum((labels for _, labels in row), []),
                "seq_lengths": [len(ids) for ids, _ in row],
            }
        )
    return rows


# ------------------------------------------------------------------------------------------------- comparison


def compare(work: Work, rounds: int, keep: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(work, folder)
        tokens = [sum(map(example_tokens, step["examples"])) for step in read_steps(folder)]
        runs: dict[str, list[dict]] = {"ours": [], "trl": []}
        for i in range(rounds):
            for side, results in runs.items():
                result = in_process(__file__, side, {"work": asdict(work), "folder": name}, work.threads)
                seconds, cpu = result.pop("step_seconds"), result.pop("cpu_seconds")
                timed = slice(work.warmup_steps, None)
                result["tokens_per_second"] = sum(tokens[timed]) / sum(seconds[timed])
                result["tokens_per_cpu_second"] = sum(tokens[timed]) / sum(cpu[timed])
                result["first_step_seconds"] = seconds[0]
                results.append(result)
                print(
                    f"round {i + 1} {side:4}  {result['tokens_per_second']:6.0f} tokens/s  "
                    f"{result['peak_rss_mib']:6.0f} MiB",
                    flush=True,
                )

    table = {side: summary(results) for side, results in runs.items()}
    ratios = {
        key: statistics.median(a[key] / b[key] for a, b in zip(runs["ours"], runs["trl"], strict=True))
        for key in ("tokens_per_second", "tokens_per_cpu_second", "peak_rss_mib", "first_step_seconds")
    }
    gap = max(
        abs(a - b)
        for x, y in zip(runs["ours"], runs["trl"], strict=True)
        for a, b in zip(x["losses"], y["losses"], strict=True)
    )
    print(f"\n{work.task}, {sum(tokens)} useful tokens, medians of {rounds}")
    rows = [
        ("useful tokens/s", "tokens_per_second", "{:.0f}"),
        ("  per CPU second", "tokens_per_cpu_second", "{:.0f}"),
        ("peak RSS, MiB", "peak_rss_mib", "{:.0f}"),
        ("  of it before training", "rss_before_training_mib", "{:.0f}"),
        ("first step after, s", "first_step_seconds", "{:.1f}"),
        ("final loss", "final_loss", "{:.5f}"),
        ("files that ran in a step", "num_files", "{}"),
        ("lines in them", "num_lines", "{}"),
    ]
    print(f"{'':26}{'ours':>10}{'TRL':>10}{'ratio':>8}")
    for title, key, form in rows:
        ratio = f"{ratios[key]:.2f}" if key in ratios else ""
        print(
            f"{title:26}{form.format(table['ours'][key]):>10}{form.format(table['trl'][key]):>10}{ratio:>8}"
        )
    print(f"largest difference of a step's loss: {gap:.1e}")
    if keep:
        details = {key: {side: r[0][key] for side, r in runs.items()} for key in ("losses", "files")}
        record(
            "vs_trl",
            work.task,
            {"work": asdict(work), "rounds": rounds, "ratios": ratios, **table, **details},
        )
    limit = 1e-3 if not table["ours"]["bfloat16"] else 0.05  # both round, each in its own places
    if gap > limit:
        sys.exit(f"the losses differ by more than {limit}: the two sides did not do the same work")


def summary(results: list[dict]) -> dict[str, Any]:
    keys = ("tokens_per_second", "tokens_per_cpu_second", "peak_rss_mib", "rss_before_training_mib")
    keys += ("first_step_seconds",)
    return {
        **{key: statistics.median(r[key] for r in results) for key in keys},
        "final_loss": results[0]["losses"][-1],
        "bfloat16": results[0]["bfloat16"],
        "num_files": len(results[0]["files"]),
        "num_lines": sum(results[0]["files"].values()),
    }


def main() -> None:
    if did_job({"ours": run_ours, "trl": run_trl}):
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=(*OF_TASK, "all"))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--small", action="store_true", help="a model of 0.2M parameters and five steps")
    for field in fields(Work)[1:]:
        if field.type is int:
            parser.add_argument(f"--{field.name}", type=int, help=f"default {field.default}")
    options = parser.parse_args()
    given = {k: v for k, v in vars(options).items() if v is not None and k in Work.__annotations__}
    for task in OF_TASK if options.task == "all" else (options.task,):
        work = Work(task, **(SMALL if options.small else OF_TASK[task]))
        compare(replace(work, **given | {"task": task}), options.rounds, keep=not options.small)


if __name__ == "__main__":
    main()
