"""What --plan says against what a run holds, on a CPU in float32: whole runs of the scripts, a process each.

    OMP_NUM_THREADS=1 python benchmarks/plan.py sft_100M            # or other names of CASES; all
    OMP_NUM_THREADS=1 python benchmarks/plan.py all --small
    python benchmarks/plan.py table                                # of large models, planned only

Weights are random and written for the run, as are its data. Measured is the largest resident set over two
optimizer steps, evaluations, checkpoint and export, above what the process held with all libraries imported.
Prints a line a case and appends it to benchmarks/results/plan.jsonl, but not with --small.
"""

import contextlib
import importlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import did_job, in_process, llama, peak_mib, record, write_tokenizer

SHAPES = {
    "40M": {"vocab_size": 16_000, "hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4},
    "tiny": {"vocab_size": 2000, "hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2},
    "100M": {"vocab_size": 32_000, "hidden": 640, "layers": 12, "heads": 10, "kv_heads": 5},
    "300M": {"vocab_size": 32_000, "hidden": 1024, "layers": 20, "heads": 16, "kv_heads": 8},
}
CASES = {
    "sft_100M": ("sft", "100M"),
    "sft_300M": ("sft", "300M"),
    "dpo_100M": ("dpo", "100M"),
    "ppo_100M": ("ppo", "100M"),
    "draftp_100M": ("draftp", "100M"),
}
UNETS = {"tiny": (32, 64, 64), "100M": (160, 320, 640)}  # channels of its three levels


def write_data(folder: Path, kind: str, vocab_size: int) -> None:
    """Prompts, replies and pairs of words that the tokenizer has, of 200 tokens or so; 24 and 2 held out."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(vocab_size - 100)}" for _ in range(count))

    for split, count in (("train", 24), ("test", 2)):
        rows = []
        for _ in range(count):
            row: dict[str, Any] = {"prompt": words(40)}
            row |= {"sft": {"response": words(200)}, "ppo": {}, "draftp": {}}.get(
                kind, {"chosen": words(200), "rejected": words(200)}
            )
            rows.append(row)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path, shape: str) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(llama(**SHAPES[shape])).save_pretrained(folder)
    write_tokenizer(folder, SHAPES[shape]["vocab_size"])


def write_pipeline(folder: Path, shape: str) -> None:
    """A Stable Diffusion pipeline with a U-Net of this size, drawing 64 x 64 images on 32 x 32 latents."""
    import diffusers

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tiny_diffusion import make_pipeline

    make_pipeline(folder)
    levels = len(UNETS[shape])
    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=UNETS[shape],
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    unet.save_pretrained(folder / "unet")


def arguments(script: str, folder: Path) -> Any:
    """(its module, its Args) of a run of two steps."""
    from common.args import with_fields

    module = importlib.import_module(script)
    options = {
        "model": str(folder / "model"),
        "dataset": str(folder / "data"),
        "max_steps": 2,
        "batch_size": 12,
    }
    options |= {"output_dir": str(folder / "run"), "num_samples": 0}
    own = {
        "sft": {"micro_batch_tokens": 1024, "max_length": 512},
        "dpo": {"micro_batch_tokens": 1024, "max_length": 512},
        "ppo": {"micro_batch_tokens": 1024, "max_prompt_length": 128, "max_new_tokens": 96}
        | {"rollout_size": 24, "reward": "harness:kindness"},
        "draftp": {"reward": "brightness", "lora_rank": 0, "num_inference_steps": 3, "batch_size": 4}
        | {"num_samples": 1, "images_per_prompt": 2, "schedules": "draft"},
    }
    return module, with_fields(module.Args(), **options | own[script])


def run_case(started: float, script: str, shape: str) -> dict[str, float]:
    """MiB of a run above the libraries, and what its plan says."""
    import peft  # noqa: F401

    importlib.import_module(script)
    import matplotlib.pyplot  # noqa: F401
    import rich.table  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    from common import plan
    from common.args import with_fields

    if script == "draftp":
        from diffusers import StableDiffusionPipeline  # noqa: F401
        from transformers import CLIPModel  # noqa: F401
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "data").mkdir()
        command = [sys.executable, __file__, "--write", script, shape, str(folder)]
        subprocess.run(command, check=True, capture_output=True)
        module, args = arguments(script, folder)
        machine = plan.Machine(1, float(64 * 2**30))
        options = {"dtype": "float32"}
        beside = getattr(module, "beside", lambda _: {})(args)
        need = plan.image_need if script == "draftp" else plan.text_need
        how = {"sequences": 2} if script == "dpo" else {}
        needed = need(with_fields(args, **options), machine, beside, **how)
        before = peak_mib()
        module.main(args)
    parts = {name: x / 2**20 for group in needed[:3] for name, x in group.items()}
    measured = peak_mib() - before
    return {"planned_mib": needed.total / 2**20, "measured_mib": measured, "parts": parts}


MODES = {
    "SFT": ("sft", {}),
    "SFT, LoRA of rank 16": ("sft", {"lora_rank": 16}),
    "DPO": ("dpo", {}),
    "DPO, LoRA": ("dpo", {"lora_rank": 16}),
    "PPO with a critic": ("ppo", {"reward": "a.b:c"}),
    "GRPO, LoRA": ("ppo", {"reward": "a.b:c", "lora_rank": 16, "advantage": "grpo", "samples_per_prompt": 8}),
}


def table() -> None:
    """GiB on each GPU by size and mode, from the plan alone: defaults of the scripts, Llama's shapes."""
    import gpu

    from common import plan
    from common.args import with_fields

    shapes = {name: gpu.SHAPES[name] for name in ("1B", "8B")}
    shapes["70B"] = {"vocab_size": 128_256, "hidden": 8192, "layers": 80, "heads": 64, "kv_heads": 8}
    shapes["70B"] |= {"intermediate_size": 28_672}
    print("|  |", " | ".join(f"{n} on {c}" for n in shapes for c in (1, 8)), "|\n" + "|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in shapes.items():
            llama(**shape).save_pretrained(f"{folder}/{name}")
        for mode, (script, options) in MODES.items():
            cells, module = [], importlib.import_module(script)
            for name in shapes:
                args = with_fields(module.Args(), model=f"{folder}/{name}", **options)
                beside = getattr(module, "beside", lambda _: {})(args)
                how = {"sequences": 2} if script == "dpo" else {}
                for count in (1, 8):
                    need = plan.text_need(args, plan.Machine(count, 80 * 2.0**30), beside, **how)
                    cells.append(f"{need.total / 2**30:.0f}")
            print(f"| {mode} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    if "table" in sys.argv:
        return table()
    if sys.argv[1:2] == ["--write"]:
        script, shape, folder = sys.argv[2:]
        if script == "draftp":
            write_pipeline(Path(folder) / "model", shape)
        else:
            write_model(Path(folder) / "model", shape)
        return write_data(Path(folder) / "data", script, SHAPES[shape]["vocab_size"])
    if did_job({"case": run_case}):
        return None
    small = "--small" in sys.argv
    for name in CASES if "all" in sys.argv else [x for x in sys.argv[1:] if x in CASES]:
        script, shape = CASES[name]
        if small and shape == "300M":
            continue
        found = in_process(__file__, "case", {"script": script, "shape": "tiny" if small else shape}, 1)
        planned, measured = found["planned_mib"], found["measured_mib"]
        print(f"{name:<12} planned {planned:6.0f} MiB  measured {measured:6.0f}  {planned / measured:.2f}")
        if not small:
            record("plan", name, found)
    return None


if __name__ == "__main__":
    main()
