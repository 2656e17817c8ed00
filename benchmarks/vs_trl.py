"""CleanAlign and TRL side by side on a CPU: speed, memory, time to the first step, losses, lines that run.

    python benchmarks/vs_trl.py sft         packed on both sides
    python benchmarks/vs_trl.py dpo         TRL pads, as it has no padding-free DPO
    python benchmarks/vs_trl.py head        memory of the chunked head against dense logits

Both sides get the same weights (a random Llama of 19M parameters, written once), the same conversations in
the same order, AdamW in float32 and two threads, and run in turn, each in a process of its own. Conversations
have the turns and lengths of HH-RLHF if ../shared/data holds it, else drawn ones like it, and random words.
A JSON line with all figures is appended to benchmarks/results/vs_trl.jsonl, but not with --small.
"""

import argparse
import gzip
import importlib.metadata
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "vs_trl.jsonl"
HH = ROOT.parent / "shared" / "data" / "hh_harmless.jsonl.gz"
PACKAGES = ("torch", "transformers", "trl", "accelerate")
CHARACTERS_PER_TOKEN = 4.3
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)


@dataclass
class Work:
    """One comparison: the model's shape, the examples of a step and how each side cuts them up."""

    task: str
    vocab_size: int = 32_000
    hidden_size: int = 256
    num_layers: int = 4
    warmup_steps: int = 3
    num_steps: int = 8
    row_tokens: int = 2048
    """tokens of a packed row: of ours for both tasks, of TRL's for SFT"""
    rows_per_step: int = 2
    """sft: TRL takes one row a micro-batch, its fastest"""
    pairs_per_step: int = 8
    """dpo: pairs of an optimizer step"""
    trl_pairs: int = 1
    """dpo: pairs in one padded micro-batch of TRL; with one it is fastest, as little is padded"""
    max_length: int = 1024
    learning_rate: float = 1e-4
    beta: float = 0.1
    threads: int = 2


SMALL = dict(vocab_size=1000, hidden_size=64, num_layers=2, num_steps=5, row_tokens=1024, rows_per_step=1)


# ------------------------------------------------------------------------------------------------- the work


def turn_lengths() -> list[list[list[int]]]:
    """[prompt turns, then chosen and rejected] in tokens, of preference pairs."""
    if HH.exists():
        pairs = []
        with gzip.open(HH, "rt") as lines:
            for line in lines:
                sides = [
                    re.split(r"\n\n(?:Human|Assistant): ?", json.loads(line)[k])[1:]
                    for k in ("chosen", "rejected")
                ]
                if sides[0][:-1] == sides[1][:-1]:
                    parts = (sides[0][:-1], sides[0][-1:], sides[1][-1:])
                    pairs.append([[len(text) for text in part] for part in parts])
    else:  # mean 157 tokens a conversation, 95 % under 410
        draw = random.Random(0).lognormvariate
        pairs = []
        for _ in range(2000):
            turns = random.Random(len(pairs)).choice([1, 1, 3, 3, 5])
            pairs.append([[draw(4.6, 0.9) for _ in range(n)] for n in (turns, 1, 1)])
    return [[[max(1, round(n / CHARACTERS_PER_TOKEN)) for n in part] for part in pair] for pair in pairs]


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
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>", "user", "assistant", "system"]
    words += [f"w{i}" for i in range(work.vocab_size - len(words))]
    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_size,
        intermediate_size=work.hidden_size * 11 // 4,
        num_hidden_layers=work.num_layers,
        num_attention_heads=work.hidden_size // 32,
        num_key_value_heads=work.hidden_size // 32,
        max_position_embeddings=work.row_tokens,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)

    pairs = make_pairs(work)
    if work.task == "dpo":
        steps = [
            [pairs[s * work.pairs_per_step + i] for i in range(work.pairs_per_step)]
            for s in range(work.num_steps)
        ]
        lines = [{"examples": step, "rows": []} for step in steps]
    else:
        from common.data import pack

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
            "step_seconds": [b - a for a, b in zip([self.started, *self.ends], self.ends, strict=False)],
            "cpu_seconds": [b - a for a, b in zip([0.0, *self.cpu], self.cpu, strict=False)],
            "peak_rss_mib": peak_mib(),
            "rss_before_training_mib": self.before,
            "files": {short_name(f): len(Path(f).read_text().splitlines()) for f in files},
        }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def is_to_read(file: str) -> bool:
    """The training code of either side; not torch, the model's own code or this file."""
    if file == __file__ or not file.endswith(".py"):
        return False
    ours = file.startswith(str(ROOT)) and "site-packages" not in file
    return ours or any(
        f"/site-packages/{name}" in file for name in ("trl/", "accelerate/", "transformers/trainer")
    )


def short_name(file: str) -> str:
    return file.split("/site-packages/")[-1].removeprefix(f"{ROOT}/")


def run_ours(work: Work, folder: Path, started: float) -> dict[str, Any]:
    """The functions and the update of sft.py or dpo.py."""
    import torch

    from common import data, dist, models

    script = __import__(work.task)
    source = str(folder / "train.jsonl")
    args = script.Args(
        model=str(folder),
        dataset=source,
        eval_dataset=source,
        batch_size=1,
        micro_batch_tokens=work.row_tokens,
        max_length=work.max_length,
        dtype="float32",
        **({"beta": work.beta} if work.task == "dpo" else {}),
    )
    device = dist.init(args.seed)
    tokenizer = data.load_tokenizer(args.model)
    examples = (data.load_sft if work.task == "sft" else data.load_pairs)(args, tokenizer)[0]
    policy = models.load(args.model, device, args)
    inputs: tuple = ()
    if work.task == "dpo":
        inputs = (models.load(args.model, device, args, trainable=False),)
    optimizer = torch.optim.AdamW(
        models.parameter_groups(policy, 0.0), lr=work.learning_rate, betas=(0.9, 0.95)
    )

    meter, losses, start = Meter(started), [], 0
    for step in read_steps(folder):
        meter.step_begins()
        batch = examples[start : start + len(step["examples"])]
        start += len(batch)
        count = len(batch) if work.task == "dpo" else script.count_targets(batch)
        totals: dict[str, Any] = {}
        for row in data.rows(batch, args.micro_batch_tokens, device):
            loss, metrics = script.loss_and_metrics(policy, *inputs, row, *([args] if inputs else []))
            (loss / count).backward()
            totals = {k: totals.get(k, 0) + v for k, v in metrics.items()}
        grad_norm = models.clip_grad_norm(policy, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sums = dist.all_sum(totals, same={"grad_norm": grad_norm})
        losses.append(script.means(sums, batch, "train")["train/loss"])
        meter.step_ended()
    return meter.report(losses)


def run_trl(work: Work, folder: Path, started: float) -> dict[str, Any]:
    """TRL's trainer with the settings that are its fastest on a CPU."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.step_begins()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.step_ended()

    settings = {
        "output_dir": str(folder / "trl"),
        "use_cpu": True,
        "bf16": False,
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
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    if work.task == "sft":
        args = trl.SFTConfig(
            **settings | {"max_length": work.row_tokens},
            packing=True,
            packing_strategy="bfd",
            dataset_kwargs={"skip_prepare_dataset": True},  # packed by the same rule, but step by step
            per_device_train_batch_size=1,
            gradient_accumulation_steps=work.rows_per_step,
        )
        rows = [row for step in steps for row in packed(tokenizer, step)]
        dataset = Dataset.from_list(rows)
        trainer = trl.SFTTrainer(load(), args=args, train_dataset=dataset, processing_class=tokenizer)
    else:
        args = trl.DPOConfig(
            **settings,
            beta=work.beta,
            per_device_train_batch_size=work.trl_pairs,
            gradient_accumulation_steps=work.pairs_per_step // work.trl_pairs,
        )
        dataset = Dataset.from_list([pair for step in steps for pair in step["examples"]])
        trainer = trl.DPOTrainer(
            load(), ref_model=load(), args=args, train_dataset=dataset, processing_class=tokenizer
        )
    meter = Meter(started)
    trainer.add_callback(Watch())
    trainer.train()
    return meter.report([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def packed(tokenizer: Any, step: dict) -> list[dict]:
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


def in_process(worker: str, settings: dict, threads: int) -> dict[str, Any]:
    """The JSON result of a worker of this file in a process of its own."""
    job = json.dumps({"worker": worker, "settings": settings, "started": time.time()})
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # threads that spin take the cores from each other on a busy machine
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [sys.executable, __file__, "--job", job]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    answers = [line[7:] for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if not answers:
        sys.exit(f"{worker} failed:\n{done.stderr[-4000:]}")
    return json.loads(answers[0])


def compare(work: Work, rounds: int, keep: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(work, folder)
        tokens = [sum(map(example_tokens, step["examples"])) for step in read_steps(folder)]
        runs: dict[str, list[dict]] = {"ours": [], "trl": []}
        for i in range(rounds):
            for side, results in runs.items():
                result = in_process(side, {"work": asdict(work), "folder": name}, work.threads)
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
        record(work.task, {"work": asdict(work), "rounds": rounds, "ratios": ratios, **table, **details})
    if gap > 1e-3:
        sys.exit("the losses differ by more than 1e-3: the two sides did not do the same work")


def summary(results: list[dict]) -> dict[str, Any]:
    keys = ("tokens_per_second", "tokens_per_cpu_second", "peak_rss_mib", "rss_before_training_mib")
    keys += ("first_step_seconds",)
    return {
        **{key: statistics.median(r[key] for r in results) for key in keys},
        "final_loss": results[0]["losses"][-1],
        "num_files": len(results[0]["files"]),
        "num_lines": sum(results[0]["files"].values()),
    }


def record(task: str, figures: dict) -> None:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    cpu = next(
        (
            x.split(":")[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in x
        ),
        "",
    )
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    line = {
        "task": task,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "cpu": cpu,
        "cores": os.cpu_count(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps({**line, "versions": versions, **figures}) + "\n")


# ------------------------------------------------------------------------------------------------------- head


def run_head(kind: str, vocab_size: int, num_tokens: int, width: int = 256) -> dict[str, float]:
    """Memory that forward and backward of a language-model head add, for a loss on every token."""
    import torch
    import torch.nn.functional as F

    from common import models

    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocab_size, bias=False)
    h = torch.randn(num_tokens, width, requires_grad=True)
    y = torch.randint(vocab_size, (num_tokens,))
    head.weight.grad = torch.zeros_like(head.weight)
    before = peak_mib()
    start = time.time()
    logps = (
        models._head_forward(head, h, y, 1.0).logps
        if kind == "chunked"
        else -F.cross_entropy(head(h), y, reduction="none")
    )
    (-logps.sum()).backward()
    return {"added_mib": peak_mib() - before, "seconds": time.time() - start, "loss": -logps.mean().item()}


def compare_heads(small: bool) -> None:
    figures = []
    print(
        f"{'vocabulary':>10}{'tokens':>8}{'chunked MiB':>13}{'dense MiB':>11}{'ratio':>7}{'time ratio':>12}"
    )
    for vocab_size in (4_000,) if small else (32_000, 128_000):
        for num_tokens in (512, 2048):
            shape = {"vocab_size": vocab_size, "num_tokens": num_tokens}
            ours, dense = (in_process("head", {"kind": kind, **shape}, 2) for kind in ("chunked", "dense"))
            assert abs(ours["loss"] - dense["loss"]) < 1e-3
            ratio = ours["added_mib"] / dense["added_mib"]
            print(
                f"{vocab_size:10}{num_tokens:8}{ours['added_mib']:13.0f}{dense['added_mib']:11.0f}{ratio:7.2f}"
                f"{ours['seconds'] / dense['seconds']:12.2f}"
            )
            figures.append({**shape, "chunked": ours, "dense": dense})
    if not small:
        record("head", {"figures": figures})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", nargs="?", choices=("sft", "dpo", "head"))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--small", action="store_true", help="a model of 0.2M parameters and five steps")
    for field in fields(Work)[1:]:
        if field.type is int:
            parser.add_argument(f"--{field.name}", type=int, help=f"default {field.default}")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        settings = job["settings"]
        if job["worker"] == "head":
            answer = run_head(**settings)
        else:
            side: Callable = {"ours": run_ours, "trl": run_trl}[job["worker"]]
            answer = side(Work(**settings["work"]), Path(settings["folder"]), job["started"])
        print("\nANSWER " + json.dumps(answer), flush=True)
    elif options.task == "head":
        compare_heads(options.small)
    else:
        work = Work(options.task, **(SMALL if options.small else {}))
        given = {k: v for k, v in vars(options).items() if v is not None and hasattr(work, k) and k != "task"}
        compare(replace(work, **given), options.rounds, keep=not options.small)


if __name__ == "__main__":
    main()
