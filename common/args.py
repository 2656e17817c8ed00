"""Options: the blocks that scripts share, and the command line.

A script composes blocks into its Args without a prefix, with its own defaults:

    optimization: OmitArgPrefixes[Optimization] = field(default_factory=lambda: Optimization(batch_size=64))

In code an option is read where it stands, `args.optimization.batch_size`; on the command line, in sweeps and
in args.json the names are flat: `--batch_size`. What a resumed run must keep follows from where an option
stands: all of a script's own, and of a block those in its `fixed`, or all if it has none.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_type_hints

from tyro.conf import OmitArgPrefixes

# ------------------------------------------------------------------------------------------------- the blocks


@dataclass
class Optimization:
    """How AdamW is run."""

    learning_rate: float = 1e-5
    """peak learning rate"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """learning rate after warm-up: constant, or down to min_lr_ratio of the peak at the last step"""
    warmup_steps: int = 10
    """steps of linear warm-up"""
    min_lr_ratio: float = 0.1
    """the last step's share of the peak learning rate, for linear and cosine"""
    weight_decay: float = 0.0
    """weight decay of AdamW, on matrices only"""
    max_grad_norm: float = 1.0
    """the global gradient norm is clipped to this; 0 never clips"""
    batch_size: int = 64
    """examples (demonstrations, pairs, responses, ...) per optimizer step, over all ranks"""


@dataclass
class Weights:
    """How the weights are held, and which of them are trained."""

    # another dtype rounds otherwise, and a checkpoint of adapters fits no other adapters
    fixed: ClassVar[tuple[str, ...]] = ("dtype", "lora_rank", "lora_alpha", "lora_target")

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """dtype of compute, auto is bfloat16 on GPU; master weights, gradients and optimizer state are float32"""
    lora_rank: int = 0
    """rank of LoRA adapters; 0 trains all weights"""
    lora_alpha: float = 16.0
    """LoRA's scale is lora_alpha / lora_rank"""
    lora_target: str = "all-linear"
    """modules that get adapters: all-linear, or names joined by commas"""
    sharding: Literal["full", "hybrid", "none"] = "full"
    """FSDP2: shard over all ranks, within a node and replicate across (hybrid), or replicate (none)"""


@dataclass
class System(Weights):
    """How the model fits the machine: memory and speed, and with dtype and LoRA the numbers too."""

    micro_batch_tokens: int = 0
    """most tokens of one forward on one rank, memory not result; 0: 8192 on GPU, 2048 on CPU"""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """recompute activations in backward; auto: for models of a billion parameters or more"""
    compile: bool = False
    """torch.compile each decoder block"""


@dataclass
class Folder:
    """Where a run is kept."""

    fixed: ClassVar[tuple[str, ...]] = ()

    output_dir: str = "runs/run"
    """the run folder: checkpoints, metrics.jsonl, samples.jsonl, model/; a run found there is resumed"""
    overwrite: bool = False
    """start anew in output_dir instead of resuming the run there"""
    track: bool = False
    """log to Weights & Biases too: online if logged in, else offline"""
    wandb_project: str = "cleanalign"
    """W&B project"""
    run_name: str = ""
    """W&B run name"""


@dataclass
class Training(Folder):
    """Where a run is kept, how long it takes and what it records on the way."""

    num_epochs: int = 1
    """passes over the training data"""
    max_steps: int = -1
    """optimizer steps; -1: as many as num_epochs takes"""
    eval_every: int = 100
    """optimizer steps between evaluations"""
    save_every: int = 500
    """optimizer steps between checkpoints"""
    keep_checkpoints: int = 1
    """how many of the newest checkpoints stay on disk"""


@dataclass
class Run(Training):
    """Where a run is kept, how long it takes and what it records on the way."""

    num_samples: int = 16
    """prompts answered and judged at each evaluation"""
    judge: str = ""
    """package.module:function, (prompt, response) -> dict of scores; default: exact for toy, else none"""
    merge_lora: bool = False
    """fold the adapters into the exported model instead of writing a peft folder"""


@dataclass
class PipelineRun(Folder):
    """Where a pipeline is kept, its stages in folders of their own, and what it records."""

    num_samples: int = 16
    """prompts answered and judged at each evaluation"""
    judge: str = ""
    """package.module:function, (prompt, response) -> dict of scores; default: exact for toy, else none"""


@dataclass
class Sampling:
    """The answers to held-out prompts that each evaluation logs; nothing is trained on them."""

    fixed: ClassVar[tuple[str, ...]] = ()

    max_new_tokens: int = 128
    """most tokens of an answer that an evaluation logs"""
    temperature: float = 1.0
    """temperature of the answers that an evaluation logs; 0 is greedy"""


# -------------------------------------------------------------------------------------------- Args as a whole


def block_names(Args: type) -> set[str]:
    """The fields that are blocks; any other dataclass in Args holds the options of a stage."""
    hints = get_type_hints(Args, include_extras=True)
    return {name for name, hint in hints.items() if OmitArgPrefixes in getattr(hint, "__metadata__", ())}


def stage_names(args: Any) -> list[str]:
    blocks = block_names(type(args))
    return [f.name for f in fields(args) if is_dataclass(getattr(args, f.name)) and f.name not in blocks]


def flat(args: Any) -> dict[str, Any]:
    """Option -> value under the names of the command line; the options of a stage are a dict among them."""
    blocks, values = block_names(type(args)), {}
    for f in fields(args):
        value = getattr(args, f.name)
        if is_dataclass(value):
            values |= flat(value) if f.name in blocks else {f.name: flat(value)}
        else:
            values[f.name] = value
    return values


def fixed_names(args: Any) -> set[str]:
    """The options that decide numbers, which a resumed run must keep; those of a stage as stage.option."""
    blocks, names = block_names(type(args)), set()
    for f in fields(args):
        value = getattr(args, f.name)
        if f.name in blocks:
            names |= set(getattr(value, "fixed", flat(value)))
        elif is_dataclass(value):
            names |= {f"{f.name}.{name}" for name in fixed_names(value)}
        else:
            names.add(f.name)
    return names


def with_fields(args: Any, **changes: Any) -> Any:
    """A copy of args with options changed, by their flat names; a dict changes options of the stage it names.

    Raises:
        TypeError: no such option.
    """
    blocks, own = block_names(type(args)), {}
    for f in fields(args):
        value = getattr(args, f.name)
        if f.name in blocks and not is_dataclass(changes.get(f.name)):
            own[f.name] = replace(value, **{n: changes.pop(n) for n in flat(value) if n in changes})
        elif is_dataclass(value) and isinstance(changes.get(f.name), dict):
            own[f.name] = with_fields(value, **changes.pop(f.name))
    return replace(args, **own, **changes)


class Snapshot(NamedTuple):
    """What a run folder keeps of the options of its run."""

    values: dict[str, Any]
    fixed: set[str]
    toy: dict[str, Any]  # the script's settings for the toy world


def snapshot(args: Any, toy: dict[str, Any] | None = None) -> Snapshot:
    return Snapshot(flat(args), fixed_names(args), toy or {})


# ------------------------------------------------------------------------------------------- the command line


def parse(Args: type, toy: dict[str, Any], presets: dict[str, dict[str, Any]] | None = None) -> Any:
    """Args from the command line; `toy` replaces defaults while the model is "toy", explicit flags win.

    `presets` does the same with what --algorithm stands for; as these are defaults, a flag that is given wins
    whatever its value. A boolean is set by --flag, --no_flag or --flag=True; the options of a stage by
    --stage.option.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--model", default=Args.model)
    peek.add_argument("--algorithm", default=getattr(Args, "algorithm", ""))
    chosen = peek.parse_known_args()[0]
    asks_help = {"-h", "--help"} & set(sys.argv[1:])
    changes = (toy if chosen.model == "toy" else {}) | (presets or {}).get(chosen.algorithm, {})
    defaults = Args() if asks_help else with_fields(Args(), **changes)
    settings = " ".join(f"--{name} {value}" for name, value in dotted(toy).items())
    about = f"{Args.__doc__}\n\nWith --model toy (the default) the defaults become: {settings}"
    for name, values in (presets or {}).items():
        words = " ".join(f"--{option} {value}" for option, value in values.items())
        about += f"\n\n--algorithm {name} is: {words or 'the defaults'}"
    if stages := stage_names(Args()):
        about += f"\n\nThe options of {', '.join(stages)} are set as --{stages[0]}.learning_rate"
    args = parse_words(sys.argv[1:], defaults, about)
    if os.environ.get("RANK", "0") == "0" and (presets or {}).get(chosen.algorithm):
        print(describe_preset(chosen.algorithm, presets[chosen.algorithm], flat(args)), flush=True)
    if os.environ.get("WANDB_SWEEP_ID"):
        args = under_an_agent(args, Args().run.output_dir)
    return args


def describe_preset(name: str, preset: dict[str, Any], values: dict[str, Any]) -> str:
    """The options that --algorithm has set, and those that were given beside it."""
    used = "".join(f" {option}={x}" for option, x in preset.items() if values[option] == x)
    given = "".join(f" {option}={values[option]}" for option, x in preset.items() if values[option] != x)
    return f"algorithm {name}:{used}{'; but' if given else ''}{given}"


def parse_words(words: list[str], defaults: Any, about: str) -> Any:
    """The options that words set, over defaults. Those of a stage are not listed in --help but work."""
    import tyro

    stages = {name: [] for name in stage_names(defaults)}
    own = to = []
    for word in words:
        if word.startswith("--"):
            stage, dot, option = word[2:].partition(".")
            to = stages[stage.replace("-", "_")] if dot and stage.replace("-", "_") in stages else own
            word = f"--{option}" if to is not own else word
        to.append(word)
    parsed = {
        name: parse_words(given, getattr(defaults, name), f"Options of the stage {name}.")
        for name, given in stages.items()
    }
    own = [boolean_word(word, defaults) for word in own]
    args = tyro.cli(type(defaults), args=own, default=defaults, description=about, use_underscores=True)
    return replace(args, **parsed)


def boolean_word(word: str, defaults: Any) -> str:
    """--flag=True, which W&B agents write, as tyro takes it: --flag; --flag=False as --no_flag."""
    match = re.fullmatch(r"--([\w-]+)=(true|false)", word, re.IGNORECASE)
    if not match or not isinstance(flat(defaults).get(match[1].replace("-", "_")), bool):
        return word
    return f"--{'' if match[2].lower() == 'true' else 'no_'}{match[1]}"


def under_an_agent(args: Any, default_folder: str) -> Any:
    """As a W&B sweep agent needs it: tracked, and in a folder that no other run of the sweep shares."""
    folder = args.run.output_dir
    if folder == default_folder:
        folder += "-" + os.environ.get("WANDB_RUN_ID", "run")
    return with_fields(args, track=True, output_dir=folder)


def dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options of stages by the names they have on the command line: sft.learning_rate."""
    names = {}
    for name, value in values.items():
        names |= dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return names
