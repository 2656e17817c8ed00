"""Options: the blocks that scripts share, and the command line.

A script composes blocks into its Args without a prefix, with its own defaults:

    optimization: OmitArgPrefixes[Optimization] = field(default_factory=lambda: Optimization(batch_size=64))

In code an option is read where it stands, `args.optimization.batch_size`; on the command line, in sweeps and
in args.json the names are flat: `--batch_size`. What a resumed run must keep follows from where an option
stands: all of a script's own, and of a block those in its `fixed`, or all if it has none.
"""

import argparse
import importlib
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_type_hints

from tyro.conf import OmitArgPrefixes

from common import dist

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
class Placement:
    """Which numbers hold the weights, and where."""

    fixed: ClassVar[tuple[str, ...]] = ("dtype",)  # another dtype rounds otherwise

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """dtype of compute, auto is bfloat16 on GPU; master weights, gradients and optimizer state are float32"""
    sharding: Literal["full", "hybrid", "none"] = "full"
    """FSDP2: shard over all ranks, within a node and replicate across (hybrid), or replicate (none)"""


@dataclass
class Inference(Placement):
    """How models that only generate or score fit the machine."""

    micro_batch_tokens: int = 0
    """most tokens of one forward on one rank, memory not result; 0: 8192 on GPU, 2048 on CPU"""
    compile: bool = False
    """torch.compile each decoder block"""


@dataclass
class Weights(Placement):
    """How the weights are held, and which of them are trained."""

    # a checkpoint of adapters fits no other adapters
    fixed: ClassVar[tuple[str, ...]] = ("dtype", "lora_rank", "lora_alpha", "lora_target")

    lora_rank: int = 0
    """rank of LoRA adapters; 0 trains all weights"""
    lora_alpha: float = 16.0
    """LoRA's scale is lora_alpha / lora_rank"""
    lora_target: str = "all-linear"
    """modules that get adapters: all-linear, or names joined by commas"""


@dataclass
class System(Weights, Inference):
    """How the model fits the machine: memory and speed, and with dtype and LoRA the numbers too."""

    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """recompute activations in backward; auto: for models of a billion parameters or more"""


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
    merge_dtype: Literal["auto", "float32"] = "auto"
    """dtype of a model that adapters were folded into; auto is that on disk, which may round them away"""


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


def prefixes(Args: type) -> dict[str, str]:
    """Field that is a dataclass -> what stands before its options: nothing for a block, else "field."."""
    hints = get_type_hints(Args, include_extras=True)
    are_blocks = {name: OmitArgPrefixes in getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: "" if is_block else f"{name}." for name, is_block in are_blocks.items()}


def flat(args: Any) -> dict[str, Any]:
    """Option -> value under the names of the command line."""
    before, values = prefixes(type(args)), {}
    for f in fields(args):
        value = getattr(args, f.name)
        if is_dataclass(value):
            values |= {before[f.name] + name: x for name, x in flat(value).items()}
        else:
            values[f.name] = value
    return values


def fixed_names(args: Any) -> set[str]:
    """The options that decide numbers, which a resumed run must keep."""
    before, names = prefixes(type(args)), set()
    for f in fields(args):
        value = getattr(args, f.name)
        if is_dataclass(value):
            names |= {before[f.name] + name for name in getattr(value, "fixed", fixed_names(value))}
        else:
            names.add(f.name)
    return names


def with_fields(args: Any, **changes: Any) -> Any:
    """A copy of args with options changed, by their names on the command line.

    Raises:
        TypeError: no such option.
    """
    before, own = prefixes(type(args)), {}
    for f in fields(args):
        value = getattr(args, f.name)
        if is_dataclass(value) and f.name not in changes:
            inner = {name: before[f.name] + name for name in flat(value)}
            found = {name: changes.pop(option) for name, option in inner.items() if option in changes}
            own[f.name] = with_fields(value, **found) if found else value
    return replace(args, **own, **changes)


class Snapshot(NamedTuple):
    """What a run folder keeps of the options of its run."""

    values: dict[str, Any]
    fixed: set[str]
    toy: dict[str, Any]  # the script's settings for the toy world


def snapshot(args: Any, toy: dict[str, Any] | None = None) -> Snapshot:
    """The options as they are kept, after a look at their ranges.

    Raises:
        RunError: a number out of the range of its option, or one that another option leaves without effect.
    """
    values = flat(args)
    refuse_numbers(values)
    given = [x for x in ("merge_lora", "merge_dtype") if values.get(x, "auto") not in (False, "auto")]
    if given and values["lora_rank"] == 0:
        raise dist.RunError(f"{given[0]} is {values[given[0]]} and lora_rank 0: no adapters to merge")
    if given == ["merge_dtype"] and "merge_lora" in values:
        raise dist.RunError(f"merge_dtype is {values['merge_dtype']} without --merge_lora: nothing is merged")
    return Snapshot(values, fixed_names(args), toy or {})


# least value of options that several scripts have; below it a run would train nothing, or something else
LEAST = {"learning_rate": 0.0, "value_learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0}
LEAST |= {"warmup_steps": 0, "min_lr_ratio": 0.0, "batch_size": 1, "num_epochs": 1, "max_steps": -1}
LEAST |= {"eval_every": 1, "save_every": 1, "keep_checkpoints": 1, "num_samples": 0, "max_new_tokens": 1}
LEAST |= {
    "micro_batch_tokens": 0,
    "lora_rank": 0,
    "max_length": 2,
    "max_prompt_length": 1,
}
LEAST |= {"temperature": 0.0, "rollout_size": 1, "samples_per_prompt": 1, "num_ppo_epochs": 1}


POSITIVE = ("beta", "lora_alpha")


def refuse_numbers(values: dict[str, Any]) -> None:
    """End the run if an option, or one of its values, is below what it can be; NaN is in no range."""
    for name, value in values.items():
        found = value if isinstance(value, list | tuple) else [value]
        if name in LEAST and not all(LEAST[name] <= x < math.inf for x in found):
            raise dist.RunError(f"{name} is {value}; expected {LEAST[name]:g} or more")
        if name in POSITIVE and not all(0 < x < math.inf for x in found):
            raise dist.RunError(f"{name} is {value}; expected more than 0")


def refuse_changes(folder: Path, options: Snapshot, free: Collection[str] = ()) -> None:
    """End the run if an option that decides numbers is not what the run in `folder` began with.

    Args:
        free: options that are not compared.
    """
    before = json.loads((folder / "args.json").read_text())
    for name in options.values:
        now = json.loads(json.dumps(options.values[name]))  # as the file has it: a tuple is a list there
        if name in options.fixed and name in before and name not in free and before[name] != now:
            raise dist.RunError(
                f"output_dir {folder} holds a run with {name} {before[name]!r}, now {now!r}: "
                "give that value to resume it, another output_dir, or --overwrite to start anew"
            )


def load_function(spec: str) -> Callable:
    """The function named by "package.module:function", looked up from the current folder too."""
    module, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise dist.RunError(f"{spec!r}: {error}; expected package.module:function") from error


# ------------------------------------------------------------------------------------------- the command line


def parse(Args: type, toy: dict[str, Any], stages: Collection[str] = ()) -> Any:
    """Args from the command line; `toy` replaces defaults while the model is "toy", explicit flags win.

    A boolean is set by --flag, --no_flag or --flag=True.

    Args:
        stages: the fields that are the options of a stage, a string. What is given for one of them changes
            the default of the field option by option.
    """
    words, given = take_stages(sys.argv[1:], stages)
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--model", default=Args.model)
    peek.add_argument("--algorithm", default=getattr(Args, "algorithm", ""))
    chosen = peek.parse_known_args(words)[0]
    presets, preset = presets_of(Args), presets_of(Args).get(chosen.algorithm, {})
    asks_help = {"-h", "--help"} & set(words)
    changes = (toy if chosen.model == "toy" else {}) | preset
    defaults = Args() if asks_help else with_fields(Args(), **changes)
    settings = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in toy.items())
    about = f"{Args.__doc__}\n\nWith --model toy (the default) the defaults become: {settings}"
    for name, values in presets.items():
        meant = " ".join(f"--{option} {value}" for option, value in values.items())
        about += f"\n\n--algorithm {name} is: {meant or 'the defaults'}"
    args = parse_words(words, defaults, description=about)
    merged = {name: merge_options(flat(args)[name], more) for name, more in given.items() if more}
    args = with_fields(args, **merged)
    if os.environ.get("RANK", "0") == "0" and preset:
        print(describe_preset(chosen.algorithm, preset, flat(args)), flush=True)
    if os.environ.get("WANDB_SWEEP_ID"):
        args = under_an_agent(args, Args().run.output_dir)
    return args


def presets_of(Args: type) -> dict[str, dict[str, Any]]:
    """What each value of --algorithm stands for: defaults, so that an option that is given wins."""
    return getattr(Args, "presets", {})


def describe_preset(name: str, preset: dict[str, Any], values: dict[str, Any]) -> str:
    """The options that --algorithm has set, and those that were given beside it."""
    used = "".join(f" {option}={x}" for option, x in preset.items() if values[option] == x)
    given = "".join(f" {option}={values[option]}" for option, x in preset.items() if values[option] != x)
    return f"algorithm {name}:{used}{'; but' if given else ''}{given}"


def parse_words(words: list[str], defaults: Any, **how: Any) -> Any:
    """The options that words set, over defaults. how: passed to tyro"""
    import tyro

    words = [boolean_word(word, defaults) for word in joined_booleans(words, defaults)]
    return tyro.cli(type(defaults), args=words, default=defaults, use_underscores=True, **how)


def joined_booleans(words: list[str], defaults: Any) -> list[str]:
    """--flag True as --flag=True, for options that are booleans."""
    values, joined = flat(defaults), []
    for word in words:
        last = joined[-1].removeprefix("--").replace("-", "_") if joined else ""
        if word.lower() in ("true", "false") and isinstance(values.get(last), bool):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


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


# ----------------------------------------------------------------- the options of a stage, which are a string


def take_stages(words: list[str], stages: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """Take the options of stages out of a command line. -> (the other words, stage -> its options)

    --sft="--beta 1" and --sft "--beta 1" give them as they are; --sft.beta=1 and --sft.beta 1, which sweeps
    need, one at a time. Taken out here, since a parser would read the "--beta 1" of the second as an option.
    """
    others, given, i = [], {name: [] for name in stages}, 0
    while i < len(words):
        flag, equals, value = words[i].partition("=")
        name, dot, option = flag.removeprefix("--").partition(".")
        name = name.replace("-", "_")
        i += 1
        if not flag.startswith("--") or name not in given or (not dot and not equals and i == len(words)):
            others.append(flag + equals + value)
        elif dot:
            to_end = next((k for k in range(i, len(words)) if words[k].startswith("--")), len(words))
            given[name].append(shlex.join([f"--{option}{equals}{value}", *words[i:to_end]]))
            i = to_end
        elif equals:
            given[name].append(value)
        else:
            given[name].append(words[i])
            i += 1
    return others, {name: " ".join(options) for name, options in given.items()}


def split_options(options: str) -> dict[str, list[str]]:
    """Option -> the words that set it, of the last time that it is set.

    Raises:
        ValueError: what stands first is no option, or a quotation is not closed.
    """
    found: dict[str, list[str]] = {}
    for word in shlex.split(options):
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            found.pop(name, None)
            found[name] = [word]
        elif not found:
            raise ValueError(f"{word!r} is no option")
        else:
            found[name].append(word)
    return found


def merge_options(options: str, more: str) -> str:
    """The options of both; where both set one, as `more` sets it."""
    try:
        old, new = split_options(options), split_options(more)
    except ValueError:
        return f"{options} {more}"  # refused where it is read
    kept = {name: words for name, words in old.items() if name not in new}
    return " ".join(shlex.join(words) for words in (*kept.values(), *new.values()))
