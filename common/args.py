"""Options: the blocks that scripts share, and the command line.

A script composes blocks into its Args, with its own defaults:

    optimization: Optimization = block(Optimization, batch_size=32)

In code an option is read where it stands, `args.optimization.batch_size`; on the command line, in sweeps and
in args.json the names are flat: `--batch_size`. What a resumed run must keep follows from where an option
stands: all of a script's own, and of a block those in its `fixed`, or all if it has none.
"""

import contextlib
import functools
import importlib
import io
import json
import math
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path, PurePath
from typing import Any, ClassVar, Literal, NamedTuple

from common import dist

# ------------------------------------------------------------------------------------------------- the blocks


@dataclass
class Optimization:
    """How AdamW is run."""

    learning_rate: float = 1e-5
    """peak learning rate"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """learning rate after warm-up: constant, or down to min_lr_ratio of the peak at the last step"""
    warmup_steps: int | None = None
    """steps of linear warm-up; default: a tenth of the run, at most 150"""
    min_lr_ratio: float = 0.1
    """the last step's share of the peak learning rate, for linear and cosine"""
    weight_decay: float = 0.0
    """weight decay of AdamW, on matrices only"""
    max_grad_norm: float = 1.0
    """the global gradient norm is clipped to this; 0 never clips"""
    batch_size: int = 64
    """examples (demonstrations, pairs, responses, ...) per optimizer step, over all ranks"""

    def warmup(self, num_steps: int) -> int:
        """Steps of warm-up in a run of num_steps."""
        return min(150, num_steps // 10) if self.warmup_steps is None else self.warmup_steps


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
    """rank of LoRA adapters, on weights frozen in the dtype of compute; 0 trains all weights"""
    lora_alpha: float = 16.0
    """LoRA's scale is lora_alpha / lora_rank"""
    lora_target: str = "all-linear"
    """modules that get adapters: all-linear, or names joined by commas"""


@dataclass
class System(Weights, Inference):
    """How the model fits the machine: memory and speed, and with dtype and LoRA the numbers too."""

    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """recompute activations in backward; auto: where they would not fit into memory"""


@dataclass
class Folder:
    """Where a run is kept."""

    fixed: ClassVar[tuple[str, ...]] = ()

    output_dir: str = "runs/run"
    """the run folder: checkpoints, metrics.jsonl, samples.jsonl, model/; a run found there is resumed"""
    plan: str = ""
    """do not run: say what a rank would hold on so many GPUs of so many GiB, as 8x80, and whether it fits"""
    check: bool = False
    """do not train: try the model, the data and the loss, and write check.json into output_dir"""
    overwrite: bool = False
    """start anew in output_dir instead of resuming the run there"""
    accept_changes: bool = False
    """resume although options, data, model or code have changed since; args.json lists what has"""
    track: bool = False
    """log to Weights & Biases too: online if logged in, else offline"""
    wandb_project: str = "cleanalign"
    """W&B project"""
    run_name: str = ""
    """W&B run name"""
    max_minutes: float = 0.0
    """stop after so many minutes as after a signal: save, exit with code 0, to be resumed; 0: no limit"""


@dataclass
class Training(Folder):
    """Where a run is kept, how long it takes and what it records on the way."""

    # a run that goes on may have more steps and be exported otherwise; one that has finished stays as it is
    final: ClassVar[tuple[str, ...]] = ("num_epochs", "max_steps", "merge_dtype", "merge_lora")

    num_epochs: int = 1
    """passes over the training data"""
    max_steps: int = -1
    """optimizer steps; -1: as many as num_epochs takes"""
    eval_every: int = 100
    """optimizer steps between evaluations"""
    save_every: int = 500
    """optimizer steps between checkpoints"""
    keep_checkpoints: int = 1
    """how many of the newest checkpoints stay on disk; 0: one while training, none after the end"""
    keep_best: str = ""
    """keep and export the best checkpoint too, by this metric, as eval/loss; -NAME: lowest, +NAME: highest"""
    merge_dtype: Literal["auto", "float32"] = "auto"
    """dtype of a model that adapters were folded into; auto is that on disk, which may round them away"""


@dataclass
class Run(Training):
    """Where a run is kept, how long it takes and what it records on the way."""

    num_samples: int = 16
    """prompts answered and judged at each evaluation"""
    judge: str = ""
    """package.module:function, (prompt, response) -> a number or a dict; default: exact for toy, else none"""
    merge_lora: bool = False
    """fold the adapters into the exported model instead of writing a peft folder"""


@dataclass
class PipelineRun(Folder):
    """Where a pipeline is kept, its stages in folders of their own, and what it records."""

    num_samples: int = 16
    """prompts answered and judged at each evaluation"""
    judge: str = ""
    """package.module:function, (prompt, response) -> a number or a dict; default: exact for toy, else none"""


@dataclass
class Chat:
    """How conversations become text."""

    chat_template: str = ""
    """chat template that replaces the tokenizer's: a Jinja file, or chatml"""
    chat_template_kwargs: str = ""
    """variables of the chat template, as JSON: {"enable_thinking": false}; the export has them as defaults"""


@dataclass
class Sampling:
    """The answers to held-out prompts that each evaluation logs; nothing is trained on them."""

    fixed: ClassVar[tuple[str, ...]] = ()

    max_new_tokens: int = 128
    """most tokens of an answer that an evaluation logs"""
    temperature: float = 1.0
    """temperature of the answers that an evaluation logs; 0 is greedy"""


def block(kind: type, **defaults: Any) -> Any:
    """The default of a field of Args that is a block: with these defaults where the script has its own."""
    return field(default_factory=functools.partial(kind, **defaults))


# -------------------------------------------------------------------------------------------- Args as a whole


def flat(args: Any) -> dict[str, Any]:
    """Option -> value under the names of the command line."""
    values: dict[str, Any] = {}
    for f in fields(args):
        value = getattr(args, f.name)
        own = str(value) if isinstance(value, PurePath) else value  # as JSON has it
        values |= flat(value) if is_dataclass(value) else {f.name: own}
    return values


def fixed_names(args: Any) -> set[str]:
    """The options that decide numbers, which a resumed run must keep."""
    names: set[str] = set()
    for f in fields(args):
        value = getattr(args, f.name)
        names |= set(getattr(value, "fixed", fixed_names(value))) if is_dataclass(value) else {f.name}
    return names


def with_fields(args: Any, **changes: Any) -> Any:
    """A copy of args with options changed, by their names on the command line.

    Raises:
        TypeError: no such option.
    """
    blocks = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in changes}
    for name, value in blocks.items():
        if is_dataclass(value):
            own = changes.keys() & flat(value).keys()
            changes[name] = with_fields(value, **{option: changes.pop(option) for option in own})
    return replace(args, **changes)


class Snapshot(NamedTuple):
    """What a run folder keeps of the options of its run."""

    values: dict[str, Any]
    fixed: set[str]
    toy: dict[str, Any]  # the script's settings for the toy world
    changed: dict[str, Any]  # of the values, those that a command line has to give


def snapshot(args: Any, toy: dict[str, Any] | None = None) -> Snapshot:
    """The options as they are kept, after a look at their ranges.

    Raises:
        RunError: a number out of the range of its option, or one that another option leaves without effect.
    """
    values = flat(args)
    refuse_numbers(values)
    defaults = flat(type(args)())
    for name in ("lora_alpha", "lora_target"):
        if values.get("lora_rank") == 0 and values[name] != defaults[name]:
            raise dist.RunError(f"{name} is {values[name]} and lora_rank 0: there are no adapters")
    given = [x for x in ("merge_lora", "merge_dtype") if values.get(x, "auto") not in (False, "auto")]
    if given and values["lora_rank"] == 0:
        raise dist.RunError(f"{given[0]} is {values[given[0]]} and lora_rank 0: no adapters to merge")
    if given == ["merge_dtype"] and "merge_lora" in values:
        raise dist.RunError(f"merge_dtype is {values['merge_dtype']} without --merge_lora; add that to merge")
    if values.get("keep_best") and "micro_batch_tokens" not in values:
        raise dist.RunError(f"keep_best is {values['keep_best']}; expected none: it is of text models")
    best = values.get("keep_best")
    if best and not best.lstrip("+-").startswith("eval/"):
        raise dist.RunError(f"keep_best is {best}; expected a metric of evaluations, as eval/loss")
    if values.get("keep_best") and values["save_every"] % values["eval_every"]:
        raise dist.RunError(
            f"save_every is {values['save_every']}; expected a multiple of eval_every, "
            f"{values['eval_every']}: keep_best compares checkpoints that were evaluated"
        )
    return Snapshot(values, fixed_names(args), toy or {}, unlike_defaults(args, toy or {}))


def unlike_defaults(args: Any, toy: dict[str, Any]) -> dict[str, Any]:
    """The options that are not what `parse` sets by itself, for this model and the presets among them."""
    Args, values = type(args), flat(args)
    start = flat(with_fields(Args(), **defaults_for(Args, values["model"], toy)))
    given = {name: value for name, value in values.items() if value != start[name]}
    start |= preset_by(given, Args)
    return {name: value for name, value in values.items() if value != start[name]}


LEAST = math.ulp(0.0)  # of the numbers above 0
# (what is expected, least and most value) of options; one that is not here can be any finite number
RANGES = {
    ("0 or more, and finite", 0, math.inf): "seed learning_rate value_learning_rate weight_decay temperature "
    "max_grad_norm warmup_steps num_samples value_warmup_steps micro_batch_tokens lora_rank reward_clip "
    "kl_coef kl_target sft_coef center_coef clip_range clip_range_high clip_range_value entropy_coef "
    "guidance_scale image_size max_minutes num_grad_steps bootstrap_top_k num_bootstrap_rounds num_red_team "
    "judge_retries num_human_pairs copy_retries top_k judge_price lora_scale keep_checkpoints",
    ("1 or more, and finite", 1, math.inf): "batch_size num_epochs eval_every save_every "
    "max_new_tokens rollout_size max_prompt_length samples_per_prompt num_ppo_epochs num_prompts num_lv "
    "num_iterations num_bootstrap_prompts num_inference_steps micro_batch_size images_per_prompt "
    "num_revisions num_principles judge_threads",
    ("more than 0, and finite", LEAST, math.inf): "beta lora_alpha kl_horizon beta_concentration "
    "weight_temperature reward_scale judge_timeout repetition_penalty",
    ("2 or more, and finite", 2, math.inf): "max_length num_responses",
    ("-1 or more, and finite", -1, math.inf): "max_steps",
    ("0 to 1", 0, 1): "min_lr_ratio gamma gae_lambda ema_decay label_smoothing",
    ("more than 0, at most 1", LEAST, 1): "top_p",
    ("0.5 to 1", 0.5, 1): "cot_clamp",
}


def refuse_numbers(values: dict[str, Any]) -> None:
    """End the run if an option, or one of its values, is out of its range; NaN is in none."""
    ranges = {name: limits for limits, names in RANGES.items() for name in names.split()}
    for name, value in values.items():
        expected, least, most = ranges.get(name, ("a finite number", -math.inf, math.inf))
        for x in value if isinstance(value, list | tuple) else [value]:
            is_number = isinstance(x, int | float) and not isinstance(x, bool)
            if is_number and not (least <= x <= most and math.isfinite(x)):
                raise dist.RunError(f"{name} is {value}; expected {expected}")


def refuse_ignored(args: Any, toy: dict[str, Any], by: str, used: dict[str, bool]) -> None:
    """End the run if an option of a script's own is set that nothing reads.

    Args:
        by: what ignores it, in words.
        used: whether an option is read.
    """
    for name, is_used in used.items():
        value = getattr(args, name)
        if not is_used and value not in (getattr(type(args), name), toy.get(name)):
            raise dist.RunError(f"{name} is {value}, which {by} ignores: leave it out")


def changes(before: dict[str, Any], now: dict[str, Any], names: Collection[str]) -> list[str]:
    """What differs of `names`, as words for a person; a name that one side lacks is not compared."""
    now = json.loads(json.dumps(now))  # as the file has it: a tuple is a list there
    both = [name for name in now if name in names and name in before]
    return [f"{n} {before[n]!r}, now {now[n]!r}" for n in both if before[n] != now[n]]


def refuse_changes(folder: Path, found: list[str], is_over: bool = False) -> None:
    """End the run if something that decides numbers is not what the run in `folder` began with.

    is_over: all of it is done, and a change that is accepted would say of its numbers what is not true.
    """
    if found:
        last = "--overwrite to start anew, or --accept_changes to go on"
        if is_over:
            last = "or --overwrite to start anew: it is finished, and can accept no change any more"
        raise dist.RunError(
            f"output_dir {folder} holds a run with {found[0]}: resume it as it was, or give another "
            f"output_dir, {last}"
        )


def load_function(spec: str) -> Callable:
    """The function named by "package.module:function", looked up from the current folder too."""
    module, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise dist.RunError(f"{spec!r}: {what_happened(error)}; expected package.module:function") from error


def what_happened(error: Exception | SystemExit) -> str:
    """An exception of a user's function in one line, with the line of the user's file that it came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    own = [f for f in frames if Path(f.filename).parent != Path(__file__).parent]  # not of what calls it
    at = [f" ({f.filename}:{f.lineno})" for f in own if f.filename == own[0].filename]
    try:
        said = str(error)
    except Exception as reason:  # its own __str__ may fail too
        said = f"without a text ({type(reason).__name__} in its __str__)"
    return "".join([f"{type(error).__name__}: {said}".splitlines()[0], *at[-1:]])


# ------------------------------------------------------------------------------------------- the command line


def parse(Args: type, toy: dict[str, Any], stages: Mapping[str, type] | None = None) -> Any:
    """Args from the command line; `toy` replaces defaults while the model is "toy", explicit flags win.

    With another model the toy's data are used only if they are asked for, as in --dataset toy.
    A mistake ends the process with one line, from one rank.

    Args:
        stages: the fields that are the options of a stage, a string, and the Args of its script. What is
            given for one of them changes the default of the field option by option.
    """
    words, given = take_stages(sys.argv[1:], stages or {})
    is_main = os.environ.get("RANK", "0") == "0"
    model = values_of(words).get("model", Args.model)
    defaults = {} if asks_help(words) else defaults_for(Args, model, toy)
    try:
        args = parse_words(words, with_fields(Args(), **defaults), description=about(Args, toy))
    except dist.RunError as error:
        if is_main:
            dist.say_last(f"error: {error}", 2)
        sys.exit(2)
    merged = {n: merge_options(flat(args)[n], more, stages[n]) for n, more in given.items()}
    args = with_fields(args, **merged, output_dir=os.path.expanduser(args.run.output_dir))
    for option, presets in presets_of(Args).items() if is_main else ():
        value = getattr(args, option)
        if presets.get(value):
            print(describe_preset(f"{option} {value}", presets[value], flat(args)), flush=True)
    return under_an_agent(args, words) if os.environ.get("WANDB_SWEEP_ID") else args


def defaults_for(Args: type, model: str, toy: dict[str, Any]) -> dict[str, Any]:
    """What `parse` sets for this model; without data a run is refused where they are read."""
    others = {f.name: "" for f in fields(Args) if f.default == "toy" and f.name != "model"}
    return toy if model == "toy" else others


def about(Args: type, toy: dict[str, Any]) -> str:
    """What --help says first: what the script is, and what sets several options at once."""

    def as_words(values: dict[str, Any]) -> str:
        return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in values.items())

    lines = [Args.__doc__, f"With --model toy (the default) the defaults become: {as_words(toy)}"]
    for option, presets in presets_of(Args).items():
        lines += [f"--{option} {x} is: {as_words(meant) or 'the defaults'}" for x, meant in presets.items()]
    return "\n\n".join(lines)


def asks_help(words: list[str]) -> bool:
    return bool({"-h", "--help"} & set(words))


def presets_of(Args: type) -> dict[str, dict[str, dict[str, Any]]]:
    """Option -> its value -> the defaults that this value brings for others; what is given beside it wins."""
    return getattr(Args, "presets", {})


def preset_by(chosen: Mapping[str, Any], Args: type) -> dict[str, Any]:
    """The defaults that options of these values bring."""
    found = [presets.get(chosen.get(option), {}) for option, presets in presets_of(Args).items()]
    return {name: value for preset in found for name, value in preset.items()}


def describe_preset(name: str, preset: dict[str, Any], values: dict[str, Any]) -> str:
    """The options that a preset has set, and those that were given beside it."""
    used = "".join(f" {option}={x}" for option, x in preset.items() if values[option] == x)
    given = "".join(f" {option}={values[option]}" for option, x in preset.items() if values[option] != x)
    return f"{name}:{used}{'; but' if given else ''}{given}"


def parse_words(words: list[str], defaults: Any, **how: Any) -> Any:
    """The options that words set, over defaults and presets; of one that is set twice the last is used.

    Args:
        how: passed to tyro.

    Raises:
        RunError: an unknown option, or a value that cannot be read.
    """
    import tyro

    Args, said = type(defaults), io.StringIO()
    defaults = with_fields(defaults, **preset_by(values_of(words), Args))
    how |= {"use_underscores": True, "config": [tyro.conf.OmitArgPrefixes]}
    if asks_help(words):
        how["config"].append(tyro.conf.FlagCreatePairsOff)  # of a boolean the flag that changes it
    try:
        with contextlib.nullcontext() if asks_help(words) else contextlib.redirect_stderr(said):
            return tyro.cli(Args, args=as_flags(words, defaults), default=defaults, **how)
    except SystemExit:
        # tyro prints a box of parts between rules; its title stands in the upper edge, or is the first part
        box = re.sub(r"^\s*\u256d.*\n", "title\n---------\n", said.getvalue())
        _, *parts = re.split(r"\n\W*[-\u2500]{9,}\W*\n", box)
        if not parts:
            raise  # help was asked for
        reason = " ".join(parts[0].replace("\u2502", " ").split())
        near = re.search(r"--\w+", parts[1]) if "Perhaps" in parts[1] else None
        elsewhere = ", docs/migrating.md those of TRL and NeMo-Aligner" * reason.startswith("Unrecognized")
        hint = f"; perhaps you meant {near[0]}" if near else f"; --help lists all{elsewhere}"
        raise dist.RunError(reason.rstrip(".") + hint) from None


def as_flags(words: list[str], defaults: Any) -> list[str]:
    """The words with --flag=True and --flag True, as W&B agents write them, as --flag; False as --no_flag."""
    booleans = {name for name, value in flat(defaults).items() if isinstance(value, bool)}
    found: list[str] = []
    for word in words:
        if word.lower() in ("true", "false") and found and option_in(found[-1]) in booleans:
            word = f"{found.pop()}={word}"
        name, value = option_in(word).removeprefix("no_"), word.partition("=")[2].lower()
        if name in booleans and value in ("true", "false"):
            word = f"--{name}" if (value == "true") == (name == option_in(word)) else f"--no_{name}"
        found.append(word)
    return found


def under_an_agent(args: Any, words: list[str]) -> Any:
    """As a W&B sweep agent needs it: tracked, unless it says otherwise, and in a folder of its own."""
    says = any(re.match("--(no[-_])?track(=|$)", word) for word in words)
    folder = f"{args.run.output_dir.rstrip('/')}-{os.environ.get('WANDB_RUN_ID', 'run')}"
    return with_fields(args, track=args.run.track if says else True, output_dir=folder)


# ------------------------------------------------------------------------------------ words of a command line


def option_in(word: str) -> str:
    """The option that --option or --option=value sets; none if the word is no option."""
    return word.partition("=")[0][2:].replace("-", "_") if word.startswith("--") else ""


def split_options(words: list[str]) -> dict[str, list[str]]:
    """Option -> the words that set it, of the last time that it is set."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--") or not found:
            found.pop(option_in(word), None)
            found[option_in(word)] = []
        found[[*found][-1]].append(word)
    return found


def values_of(words: list[str]) -> dict[str, str]:
    """Option -> its value, a text."""
    return {
        name: " ".join(group).partition("=" if "=" in group[0] else " ")[2]
        for name, group in split_options(words).items()
    }


def take_stages(words: list[str], stages: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """Take the options of stages, which are one string each, out of a command line. -> (others, stage -> its)

    --sft="--beta 1" and --sft "--beta 1" give them as they are; --sft.beta=1 and --sft.beta 1, which sweeps
    need, one at a time. Taken out here, since a parser would read the "--beta 1" of the second as an option.
    """
    joined: list[str] = []
    for word in words:
        if joined and "=" not in joined[-1] and option_in(joined[-1]) in stages:
            word = f"{joined.pop()}={word}"
        joined.append(word)
    others: list[str] = []
    given: dict[str, list[str]] = {name: [] for name in stages}
    own: list[str] | None = None  # of the stage whose option came last, which may have more values
    for word in joined:
        flag, equals, value = word.partition("=")
        stage, dot, option = flag.partition(".")
        if word.startswith("--"):
            own = given.get(option_in(stage)) if dot or equals else None
        if own is None:
            others.append(word)
        elif word.startswith("--") and not dot:
            own.append(value)
        else:
            own.append(shlex.quote(f"--{option}{equals}{value}" if word.startswith("--") else word))
    return others, {name: " ".join(options) for name, options in given.items() if options}


def merge_options(options: str, more: str, Args: type) -> str:
    """The options of both, for a script with these Args; those of more win, and what its presets set."""
    try:
        old, new = shlex.split(options), shlex.split(more)
    except ValueError:
        return f"{options} {more}"  # refused where it is read
    replaced = split_options(new).keys() | preset_by(values_of(new), Args).keys()
    kept = [group for name, group in split_options(old).items() if name not in replaced]
    return " ".join(map(shlex.join, (*kept, *split_options(new).values())))
