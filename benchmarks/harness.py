"""What the benchmarks share: processes of their own, peak memory, models and texts, the record."""

import functools
import gzip
import importlib.metadata
import json
import os
import random
import re
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
HH = ROOT.parent / "shared" / "data" / "hh_harmless.jsonl.gz"
# freed blocks of 16 MiB go back to the system, where glibc would keep those below 32 MiB; pages of 2 MiB
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=16777216:glibc.malloc.trim_threshold=2000000000"
PACKAGES = ("torch", "transformers", "trl", "accelerate")
CHARACTERS_PER_TOKEN = 4.3
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)


# ------------------------------------------------------------------------------------------------- processes


def in_process(script: str, worker: str, settings: dict, threads: int, ranks: int = 1) -> dict[str, Any]:
    """What a worker of a script answers in a process of its own; of several ranks, what rank 0 answers."""
    job = json.dumps({"worker": worker, "settings": settings, "started": time.time()})
    environment = worker_environment(threads)
    if ranks > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        command = [sys.executable, script, "--job", job]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment | own, stdout=pipe, stderr=pipe, text=True))
    outputs = [process.communicate() for process in started]
    answers = [line[7:] for line in outputs[0][0].splitlines() if line.startswith("ANSWER ")]
    if not answers or any(process.returncode for process in started):
        sys.exit(f"{worker} failed:\n" + "\n".join(errors[-4000:] for _, errors in outputs))
    return json.loads(answers[0])


def worker_environment(threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # threads that spin take the cores from each other on a busy machine
        "GLIBC_TUNABLES": MALLOC,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


class Worker:
    """A process that has imported everything and waits for one job; the next one starts meanwhile."""

    def __init__(self, script: str, threads: int):
        environment = worker_environment(threads)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the worker
        self.process = subprocess.Popen(
            [sys.executable, script, "--wait"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def ask(self, worker: str, settings: dict, limit: float) -> dict[str, Any]:
        """Its answer within `limit` seconds, else {"error": why}; the process is gone after it."""
        job = json.dumps({"worker": worker, "settings": settings, "started": time.time()})
        timer = threading.Timer(limit, self.process.kill)
        timer.start()
        try:
            out, _ = self.process.communicate(job + "\n")
        finally:
            timed_out = not timer.is_alive()
            timer.cancel()
        answers = [line[7:] for line in out.splitlines() if line.startswith("ANSWER ")]
        if answers:
            return json.loads(answers[0])
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        return {"error": f"no answer in {limit:.0f} s" if timed_out else " | ".join(lines[-12:])[-2000:]}


def did_job(workers: dict[str, Callable[..., dict]]) -> bool:
    """In a process that `in_process` or `Worker` started: do the job and say True."""
    if sys.argv[1:2] not in (["--job"], ["--wait"]):
        return False
    if sys.argv[1] == "--wait":
        import peft  # noqa: F401, as long to import as all else
        from transformers import LlamaForCausalLM  # noqa: F401

        line = sys.stdin.readline()
        if not line:
            return True  # no job came
    else:
        line = sys.argv[2]
    job = json.loads(line)
    print("\nANSWER " + json.dumps(workers[job["worker"]](job["started"], **job["settings"])), flush=True)
    return True


def peak_mib() -> float:
    """Most memory of this process so far: of the GPU if there is one, else resident in RAM."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ----------------------------------------------------------------------------------------- models and texts


@functools.cache
def turn_lengths() -> list[list[list[int]]]:
    """[prompt turns, then chosen and rejected] in tokens, of pairs: HH-RLHF's, or drawn like them."""
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


def documents(count: int, vocab_size: int, max_length: int = 8192, whole: bool = False) -> list:
    """Random tokens in the lengths of HH-RLHF; the last reply is scored, or (whole) everything."""
    import numpy as np

    from common import packed

    rng, examples = np.random.default_rng(0), []
    lengths = [(sum(prompt), reply[0]) for prompt, reply, _ in turn_lengths()]
    lengths = [(p, r) for p, r in lengths if p + r <= max_length]
    for prompt, reply in (lengths[i] for i in rng.permutation(len(lengths))[:count]):
        tokens = rng.integers(vocab_size, size=prompt + reply, dtype=np.int32)
        mask = np.arange(len(tokens)) >= (1 if whole else prompt)
        examples.append(packed.Example([(tokens, mask)], prompt=""))
    return examples


def fixed_documents(count: int, length: int, vocab_size: int) -> list:
    """Examples of one length with random tokens, all but the first scored."""
    import numpy as np

    from common import packed

    rng = np.random.default_rng(0)
    tokens = rng.integers(vocab_size, size=(count, length), dtype=np.int32)
    return [packed.Example([(row, np.arange(length) >= 1)], prompt="") for row in tokens]


def llama(vocab_size: int, hidden: int, layers: int, heads: int, kv_heads: int = 0, **more: Any) -> Any:
    """The config of a Llama."""
    from transformers import LlamaConfig

    settings = {
        "intermediate_size": hidden * 11 // 4,
        "max_position_embeddings": 131_072,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        **settings | more,
    )


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """One word a token: <pad>, the marks of a turn, the roles, then w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>", "user", "assistant", "system"]
    words += [f"w{i}" for i in range(vocab_size - len(words))]
    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


class NoText:
    """A tokenizer for tokens that stand for nothing; its end token is outside the vocabulary."""

    chat_template, eos_token_id = None, -1

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return ""


def random_policy(
    config: Any, device: Any, trainable: bool = True, init_device: Any = None, **options: Any
) -> Any:
    """A random model as `models.load` makes it of a folder, without writing the folder.

    init_device draws the weights, which are other ones on a CPU than on a GPU; default: device.
    """
    from unittest import mock

    import torch
    import transformers

    from common import models
    from common.args import System

    def read(*_: Any) -> Any:
        torch.manual_seed(0)
        with torch.device(init_device or device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.dtype_on_disk, model.wide, model.lost = torch.float32, {}, 0.0
        return model

    system = System(**{"activation_checkpointing": "off", **options})
    with (
        mock.patch.object(models, "read_pretrained", read),
        mock.patch.object(models, "model_folder", lambda name: (name, None)),
    ):
        return models.load("random", device, system, trainable)


# ------------------------------------------------------------------------------------------------ the record


def machine() -> dict[str, Any]:
    """Where and with what a figure came about."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs")
    commit = git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    found = {"date": time.strftime("%Y-%m-%d"), "commit": commit}
    found |= {"cpu": names[0].split(":")[1].strip() if names else "", "cores": os.cpu_count()}
    found["load"] = round(os.getloadavg()[0], 1)
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return found | {"versions": versions}


def record(file: str, task: str, figures: dict[str, Any]) -> None:
    """Append a JSON line to results/<file>.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{file}.jsonl").open("a") as lines:
        lines.write(json.dumps({"task": task, **machine(), **figures}) + "\n")


# --------------------------------------------------------------------------------------------------- training


def sft_step(policy: Any, optimizer: Any, batch: list, row_tokens: int, device: Any) -> float:
    """The update of sft.py on these examples. -> the loss, a mean over scored tokens"""
    import sft
    from common import dist, models, packed

    num_targets, totals = sum(example.num_targets for example in batch), dist.Totals()
    for row in packed.micro_batches(batch, row_tokens, device):
        loss, metrics = sft.loss_and_metrics(policy, row)
        (loss / num_targets).backward()
        totals.update(metrics)
    totals.update({"grad_norm": (models.clip_grad_norm(policy, 1.0), 1)})
    optimizer.step()
    optimizer.zero_grad()
    return totals.reduce()["loss"]


def kindness(prompts: list, responses: list[str], examples: list) -> list[float]:
    """A reward for `ppo.py --reward harness:kindness` that any model can earn."""
    return [len(set(response.split())) / 100 for response in responses]
