"""What the tests share: the toy world, tiny models made on the spot, and a session of two ranks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)

from common import data, dist  # noqa: E402
from common.args import with_fields  # noqa: E402
from toy import language  # noqa: E402

DATA = ROOT.parent / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """All tests but those marked gpu are of a CPU, on a machine with a GPU too: `-m gpu` runs the others."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def no_stop() -> Any:
    """No test sees the stop that another asked for, and pytest keeps its own answers to signals."""
    handlers = {number: signal.getsignal(number) for number in dist.STOP_SIGNALS}
    dist._stop.update(signal=0, time=0.0, agreed=False)
    dist.stop_after(0)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def toy() -> Path:
    return language.ensure()


@pytest.fixture(scope="session")
def few(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first lines of the toy's data sets: few/sft and few/pairs, for runs of a second."""
    folder = tmp_path_factory.mktemp("few")
    for kind in ("sft", "pairs"):
        (folder / kind).mkdir()
        for split, count in (("train", 128), ("test", 48)):
            lines = (toy / kind / f"{split}.jsonl").read_text().splitlines(keepends=True)
            (folder / kind / f"{split}.jsonl").write_text("".join(lines[:count]))
    return folder


@pytest.fixture(scope="session")
def device() -> torch.device:
    return dist.init(seed=1)


@pytest.fixture(scope="session")
def tokenizer(toy: Path) -> Any:

    return data.load_tokenizer("toy")


def args_of(Args: type, **options: Any) -> Any:
    """Args with options by the names of the command line, whatever block they are in."""
    return with_fields(Args(), **options)


def means(metrics: dict[str, tuple]) -> dict[str, float]:
    """The metrics that a `loss_and_metrics` returns, of its row alone."""
    totals = dist.Totals()
    totals.update(metrics)
    return totals.reduce()


def make_tiny_model(folder: Path, tokenizer: Any, seed: int = 0, **config: Any) -> Path:
    """A random Llama of a few thousand parameters with the toy's tokenizer, saved in Hugging Face form."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.1,  # wide, so that losses and gradients are not all alike
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny"), tokenizer))


def read_metrics(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


class Ranks:
    """Two gloo processes that stay up for the whole session and run functions of the tests on request."""

    def __init__(self) -> None:
        environment = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "worker.py")],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for rank in range(2)
        ]

    def __call__(self, target: str, **kwargs: Any) -> list[Any]:
        """The JSON results of "module:function"(**kwargs) on rank 0 and 1; an error there is raised here."""
        for process in self.processes:
            process.stdin.write(json.dumps({"target": target, "kwargs": kwargs}) + "\n")
            process.stdin.flush()
        answers = [self._answer(process) for process in self.processes]
        for answer in answers:
            assert "error" not in answer, answer["error"]
        return [answer["result"] for answer in answers]

    @staticmethod
    def _answer(process: subprocess.Popen) -> dict:
        for line in process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line[7:])
        return {"error": f"a rank ended with exit code {process.wait()}"}

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            process.wait(timeout=30)


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def two_ranks() -> Any:
    ranks = Ranks()
    yield ranks
    ranks.close()
