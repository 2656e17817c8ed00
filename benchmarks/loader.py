"""From a file to the first batch: CPU, memory and restarts here, and in the datasets library and TRL.

    python benchmarks/loader.py [--chats 100000] [--examples 1000000] [--rounds 3] [--small]

Each figure that has a bound is printed beside it. At full size, with one round, about 12 minutes on two quiet
cores and 4 GB of disk, of which nothing is kept.

Chats are words drawn from a vocabulary of English-like ones, a user's turn and a reply of some 750 characters
each, under a byte-level BPE of 32,000 tokens that is trained on them. All sides read the same file with the
same tokenizer and template, each in a process of its own, in turn; what importing takes is not counted.
"""

import json
import os
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from harness import TEMPLATE, did_job, in_process, record


@dataclass
class Args:
    """Measure how data are prepared."""

    chats: int = 100_000
    """chats of the comparison with datasets and TRL"""
    examples: int = 1_000_000
    """examples of 1 kB whose memory is measured"""
    rounds: int = 3
    """of the comparison; the middle one counts"""
    small: bool = False
    """seconds; nothing is recorded"""


# ------------------------------------------------------------------------------------------------- files


def words(draw: random.Random, count: int) -> list[str]:
    letters = "etaoinshrdlucmfwypvbgk"
    return ["".join(draw.choices(letters, range(22, 0, -1), k=draw.randint(1, 9))) for _ in range(count)]


def write_chats(path: Path, count: int, characters: int) -> None:
    draw = random.Random(0)
    known, common = words(draw, 20_000), [1 / (i + 10) for i in range(20_000)]
    pool = draw.choices(known, common, k=1_000_000)

    def text() -> str:
        size = draw.randint(characters // 9, characters * 3 // 11)
        start = draw.randrange(len(pool) - size)
        return " ".join(pool[start : start + size]).capitalize() + "."

    with path.open("w") as file:
        for _ in range(count):
            turns = [{"role": role, "content": text()} for role in ("user", "assistant")]
            file.write(json.dumps({"messages": turns}) + "\n")


def write_model(folder: Path, source: Path) -> None:
    """A tokenizer trained on the chats, beside a tiny model that TRL's trainer wants."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    marks = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=marks, initial_alphabet=alphabet)
    with source.open() as lines:
        core.train_from_iterator([line for line, _ in zip(lines, range(5000), strict=False)], trainer)
    ends = {"pad_token": "<pad>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **ends)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **sizes)).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------- the sides


def clock() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def since(start: tuple[float, float]) -> dict[str, float]:
    return {"cpu": time.process_time() - start[0], "seconds": time.perf_counter() - start[1]}


def uss_mib() -> float:
    """Memory of this process that no other shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def run_ours(started: float, folder: str, source: str, num_batches: int = 0) -> dict[str, Any]:
    """load_sft, and num_batches batches of 128 after it."""
    from common import data, dist, packed

    device = dist.init(1)
    tokenizer, start = data.load_tokenizer(folder), clock()
    examples, _ = data.load_sft(tokenizer, source, source, 2048)
    found = since(start) | {"examples": len(examples)}
    for step in range(1, num_batches + 1):
        for micro_batch in packed.micro_batches(data.batch(examples, step, 128, 1), 8192, device):
            del micro_batch
    return found | {"uss_mib": uss_mib()}


def run_map(started: float, folder: str, source: str) -> dict[str, Any]:
    """datasets.map over apply_chat_template, which makes tokens too."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer, start = AutoTokenizer.from_pretrained(folder), clock()
    cache = Path(source).parent / "hf"
    table = datasets.load_dataset("json", data_files=source, split="train", cache_dir=str(cache))
    table.map(
        lambda row: tokenizer.apply_chat_template(row["messages"], return_dict=True),
        remove_columns=["messages"],
    )
    shutil.rmtree(cache)
    return since(start)


def run_trl(started: float, folder: str, source: str) -> dict[str, Any]:
    """What SFTTrainer does with its data, with a loss on the assistant's turns."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    cache, start = Path(source).parent / "hf", clock()
    table = datasets.load_dataset("json", data_files=source, split="train", cache_dir=str(cache))
    args = trl.SFTConfig(
        output_dir=str(cache / "run"),
        assistant_only_loss=True,
        max_length=2048,
        use_cpu=True,
        report_to="none",
        packing=True,
    )
    trl.SFTTrainer(model, args=args, train_dataset=table, processing_class=tokenizer)
    shutil.rmtree(cache)
    return since(start)


def run_pack(started: float, count: int) -> dict[str, Any]:
    import numpy as np

    from common import packed

    lengths = np.minimum(np.random.default_rng(0).lognormal(5.4, 0.9, count).astype(int) + 1, 8192).tolist()
    start = clock()
    packed.pack(range(count), lengths, 8192)
    return since(start)


# ------------------------------------------------------------------------------------------------ comparison


def speed(args: Args, folder: Path) -> dict[str, Any]:
    """CPU seconds of a first start, in turn with the others, and of a second one."""
    source, tiny = folder / "chats.jsonl", folder / "tiny.jsonl"
    write_chats(source, args.chats, 750)
    write_chats(tiny, 10, 750)
    write_model(folder, source)
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds):
        shutil.rmtree(os.environ["CLEANALIGN_CACHE"], ignore_errors=True)
        sides = {"ours": "run_ours", "map": "run_map", "trl": "run_trl"}
        given = {"folder": str(folder), "source": str(source)}
        found = {name: in_process(__file__, side, given, 1)["cpu"] for name, side in sides.items()}
        found["trl_empty"] = in_process(__file__, "run_trl", given | {"source": str(tiny)}, 1)["cpu"]
        found["trl"] -= found.pop("trl_empty")
        again = in_process(__file__, "run_ours", given, 1)
        in_process(__file__, "run_ours", given | {"source": str(tiny)}, 1)
        empty = in_process(__file__, "run_ours", given | {"source": str(tiny)}, 1)
        found["second"] = again["seconds"] - empty["seconds"]
        found |= {"to_map": found["ours"] / found["map"], "to_trl": found["ours"] / found["trl"]}
        rounds.append(found)
        print("  ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True)
    middle = {name: sorted(r[name] for r in rounds)[len(rounds) // 2] for name in rounds[0]}
    tell("CPU of a first start / datasets.map over apply_chat_template", middle["to_map"], 0.8)
    tell("CPU of a first start / TRL's whole preparation", middle["to_trl"], 0.5)
    tell("seconds of a second start above an empty run", middle["second"], 3)
    size = source.stat().st_size / 1e6
    source.unlink()  # room for the other file
    shutil.rmtree(os.environ["CLEANALIGN_CACHE"])
    return {"chats": args.chats, "megabytes": size, **middle}


def memory(args: Args, folder: Path) -> dict[str, Any]:
    """Memory of a rank that no other shares, above that of one with ten examples; first start, then again."""
    source, tiny = folder / "examples.jsonl", folder / "tiny.jsonl"
    write_chats(source, args.examples, 450)
    given = {"folder": str(folder), "source": str(source), "num_batches": 200}
    empty = in_process(__file__, "run_ours", given | {"source": str(tiny)}, 1)["uss_mib"]
    found = {}
    for name, ranks in (("built by two ranks", 2), ("mapped by one", 1), ("mapped by two", 2)):
        found[name] = in_process(__file__, "run_ours", given, 1, ranks)["uss_mib"] - empty
        tell(f"MiB of a rank above {empty:.0f} of an empty run, {args.examples:,} {name}", found[name], 400)
    ratio = (empty + found["mapped by two"]) / (empty + found["mapped by one"])
    tell("memory of one of two ranks / of one alone", ratio, 1.1)
    return {"examples": args.examples, "megabytes": source.stat().st_size / 1e6, "uss_mib": found}


def tell(what: str, found: float, most: float) -> None:
    """A line with a figure and its bound."""
    print(f"{what:<75}{found:8.2f}   asked: at most {most:g}", flush=True)


def main(args: Args) -> None:
    if args.small:
        args.chats, args.examples, args.rounds = min(args.chats, 300), min(args.examples, 300), 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["CLEANALIGN_CACHE"] = str(folder / "cache")
        found = speed(args, folder)
        found |= {"memory": memory(args, folder)}
    num_lengths = 1000 if args.small else 1_000_000
    found["pack_seconds"] = in_process(__file__, "run_pack", {"count": num_lengths}, 1)["cpu"]
    tell(f"seconds of CPU to pack {num_lengths:,} lengths", found["pack_seconds"], 5)
    if not args.small:
        record("loader", "loader", found)


if __name__ == "__main__" and not did_job(
    {"run_ours": run_ours, "run_map": run_map, "run_trl": run_trl, "run_pack": run_pack}
):
    main(tyro.cli(Args, use_underscores=True))
