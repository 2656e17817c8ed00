"""What a run needs: bytes of memory on a rank, operations for a token. --plan adds them up before the run.

The same functions decide while it runs: whether activations are recomputed, how many replies are decoded at
once. A plan reads config.json and builds models without numbers, so it needs neither weights nor a GPU.
"""

import copy
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from common import dist, files, formats, loading, lora
from common.args import flat, with_fields

PEAK_FLOPS = 989e12  # dense bfloat16 of an H100 or H200 SXM
MFU = 0.4  # share of these that a plan counts on
KEPT = 0.05  # share of what is held, see Need.kept
SMALL = 10_000_000  # parameters; the pace of a smaller model is not that of its operations
NODE = 8  # GPUs that --sharding hybrid shards over


class Memory(NamedTuple):
    """Bytes on one rank, by what holds them."""

    weights: float  # float32 masters of what is trained, the compute dtype of what is frozen
    gradients: float
    optimizer: float  # two moments of AdamW
    gathered: float  # whole weights in the compute dtype while a block, the embedding and the head work
    activations: float  # of one micro-batch
    head: float  # buffers of the chunked head and its float32 gradient


def attention_widths(config: Any) -> tuple[int, int]:
    """Numbers of a token in all query heads of a layer, and in its key heads; means where layers differ."""
    if getattr(config, "is_heterogeneous", False):
        layers = [attention_widths(config.per_layer_config[i]) for i in range(config.num_hidden_layers)]
        return sum(q for q, _ in layers) // len(layers), sum(k for _, k in layers) // len(layers)
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * width, (getattr(config, "num_key_value_heads", None) or heads) * width


def training_memory(
    config: Any,
    trained: int,
    frozen: int,
    *,
    num_tokens: int,
    num_shards: int,
    itemsize: int,
    recompute: bool,
    has_vocabulary: bool = True,
) -> Memory:
    """An estimate for a dense decoder in packed micro-batches, within a tenth on an H200 and on a CPU.

    A token leaves, in each layer, vectors of the width (inputs of norms and products, attention), queries,
    keys and values, and 4 of the width inside the MLP; recomputed, one vector in each layer and all of these
    in a single one. In float32 norms are not fused and each leaves another one, as does SDPA.

    Args:
        config: of the transformers model.
        trained, frozen: parameters.
        num_tokens: of a micro-batch.
        num_shards: ranks that share one copy of the model.
        itemsize: bytes of a number of the compute dtype.
        has_vocabulary: whether its head is one of words.
    """
    width, layers, is_low = config.hidden_size, config.num_hidden_layers, itemsize < 4
    inside = getattr(config, "intermediate_size", None) or 4 * width
    queries, keys = attention_widths(config)
    table = config.vocab_size * width
    a_layer = itemsize * (
        (4 if is_low else 6) * width + (2 if is_low else 3) * queries + 2 * keys + 4 * inside
    )
    kept = itemsize * width * layers + a_layer if recompute else a_layer * layers
    block = max(0, trained + frozen - (1 + has_vocabulary) * table) / layers
    chunk = 2048 if is_low else min(256, 2**22 // config.vocab_size)
    return Memory(
        weights=(4 * trained + itemsize * frozen) / num_shards,
        gradients=4 * trained / num_shards,
        optimizer=8 * trained / num_shards,
        gathered=itemsize * 2 * (block + table) if is_low or num_shards > 1 else 0.0,
        activations=num_tokens * kept,
        head=has_vocabulary
        * (4 * (table if trained else 0) + 2 * 4 * min(num_tokens, chunk) * config.vocab_size),
    )


class Share(NamedTuple):
    """Bytes that a model takes of a rank's."""

    at_rest: float  # weights and optimizer, all the time
    step: float = 0.0  # more, while it is trained


def choices(
    need: Callable[..., Memory],
    choice: str,
    whole: float,
    memory: float,
    held: list[Share],
    folded: float = 0,
) -> tuple[bool, bool, Share]:
    """(recompute activations, keep whole weights from forward to backward, its share), by what fits.

    Room is left to models that may follow, a critic and a reference like this one. What stays leaves a third
    of the memory to a step, however short its rows: they would else hold more than long ones.

    Args:
        need: `training_memory`, but for recompute.
        choice: on, off, or auto.
        whole: bytes of the whole weights in the compute dtype.
        memory: bytes of a rank.
        held: models that are there.
        folded: bytes that adapters of experts add, see `lora.num_folded`.
    """
    most = need(recompute=False)
    at_rest = most.weights + most.optimizer
    free = usable(memory) - sum(share.at_rest for share in held) - at_rest - most.optimizer / 4
    recompute = choice == "on" or (choice == "auto" and sum(most) + folded > min(2 / 3 * memory, free))
    found = need(recompute=recompute)
    step = sum(found) - at_rest
    keep = whole < free - at_rest - max(step, memory / 3)
    return recompute, keep, Share(at_rest, step + (whole - found.gathered) * (keep and found.gathered > 0))


def usable(memory: float) -> float:
    """Bytes beside what libraries and allocators keep, see Need.kept."""
    return (memory - 100 * 2**20) / (1 + KEPT)


def left_at_rest(held: list[Share], memory: float) -> float:
    """Bytes for a replica and its cache to stay in while one of these models is trained, see `choices`."""
    step = max(memory / 3, *(share.step for share in held))
    return usable(memory) - sum(share.at_rest for share in held) - step


def cache_bytes(config: Any, num_slots: int, itemsize: int) -> int:
    """Keys and values of one sequence of num_slots tokens."""
    return 2 * config.num_hidden_layers * attention_widths(config)[1] * itemsize * num_slots


def rows_that_fit(free: float, row: float) -> int:
    """Sequences of `row` bytes of cache that free memory holds, a fifth of it left to activations."""
    return int(0.8 * free // row)


def training_flops(model: Any, lengths: list[int]) -> float:
    """FLOPs of forward and backward over sequences of these lengths, recomputation not counted.

    A token costs 6 for each parameter outside an untied input embedding, 4 if it is frozen (LoRA); the causal
    attention of a sequence 6 x layers x heads x head width x length^2. Every expert of a mixture is counted.
    """
    config = model.config
    table = model.model.get_input_embeddings().weight
    table = None if model.head.weight is table else table
    per_token = sum((6 if p.requires_grad else 4) * p.numel() for p in model.parameters() if p is not table)
    attention = 6 * config.num_hidden_layers * attention_widths(config)[0]
    return float(per_token * sum(lengths) + attention * sum(n * n for n in lengths))


# ------------------------------------------------------------------------------------------------- the plan


# what may make a run smaller, that which changes no number first
CHANGES = (("activation_checkpointing", "on"), ("step_checkpointing", True), ("micro_batch_tokens", 1024))
CHANGES += (("micro_batch_size", 1), ("sharding", "hybrid"), ("sharding", "full"), ("num_samples", 0))
CHANGES += (("precompute_ref", True), ("lora_rank", 16))
LENGTHS = ("max_length", "max_prompt_length", "max_new_tokens")  # and after all of these half of each


class Machine(NamedTuple):
    """GPUs, and bytes of each."""

    count: int
    memory: float


class Need(NamedTuple):
    """Bytes on a rank by what holds them: all the time, while training, while generating."""

    always: dict[str, float]
    training: dict[str, float]
    generation: dict[str, float]
    flops: float  # of a trained token, or image
    unit: str  # of the pace, with the length that it is counted at
    size: int = 0  # parameters of the model that is trained

    @property
    def kept(self) -> float:
        """What libraries load with a first step and allocators keep of freed blocks, measured on CPUs."""
        return KEPT * self.held + 100 * 2**20

    @property
    def held(self) -> float:
        return sum(self.always.values()) + max(sum(x.values()) for x in (self.training, self.generation))

    @property
    def total(self) -> float:
        return self.held + self.kept


class Model(NamedTuple):
    """A model without numbers."""

    config: Any
    trained: int  # parameters
    frozen: int

    @property
    def size(self) -> int:
        return self.trained + self.frozen


@functools.cache
def count(model: str, rank: int = 0, target: str = "all-linear", has_vocabulary: bool = True) -> Model:
    """Parameters of a model by its config.json, with adapters of this rank.

    Raises:
        RunError: no such config, or one that transformers cannot build.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    def read() -> nn.Module:
        folder, gguf = files.model_folder(model, needs_weights=False)
        if gguf:
            config = AutoConfig.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False)
        else:
            config = loading.config_of(folder)
        if not gguf and not hasattr(config, "vocab_size"):
            raise ValueError("no config.json of a language model")
        config = copy.deepcopy(config)
        config.num_labels = 1
        with torch.device("meta"):
            make = AutoModelForCausalLM.from_config if has_vocabulary else loading.empty_scorer
            plain = make(config, dtype=torch.float32)
            if rank:
                lora.add(plain, rank, 1.0, target)
        return plain

    plain = built(f"model {model}", read)
    trained = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    return Model(plain.config, trained, sizes(plain) - trained)


def built(what: str, read: Callable[[], Any]) -> Any:
    """read(), a model without numbers; where its config cannot be read the run ends."""
    try:
        return read()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise dist.RunError(f"{what}: {formats.first_line(error)}") from error


def shards(sharding: str, num_gpus: int) -> int:
    return {"full": num_gpus, "hybrid": min(NODE, num_gpus), "none": 1}[sharding]


def text_need(args: Any, machine: Machine, beside: dict[str, str], sequences: int = 1) -> Need:
    """Of a script that trains a language model.

    Args:
        beside: models by what they are, "value" for one that is trained too.
        sequences: of an example, which one micro-batch holds.
    """
    options = flat(args)
    itemsize = 4 if options["dtype"] == "float32" else 2
    num_shards = shards(options["sharding"], machine.count)
    reply = options.get("max_new_tokens", 0)
    length = options.get("max_length") or options["max_prompt_length"] + reply
    tokens = max(options["micro_batch_tokens"] or (8192 if itemsize < 4 else 2048), sequences * length)
    adapters = (options["lora_rank"], options["lora_target"])
    always, steps, flops, held = {"weights": 0.0, "optimizer": 0.0}, [], 0.0, {}
    is_policy = "max_new_tokens" in options  # else what is trained is a scorer
    before = {name: path for name, path in beside.items() if name.startswith("reward")}
    for name, path in {**before, "policy": options["model"], **beside}.items():  # as they are loaded
        is_trained, has_words = name in ("policy", "value"), not name.startswith(("value", "reward"))
        has_words = has_words and (is_policy or name != "policy")
        model = count(path, *(adapters if is_trained else ()), has_vocabulary=has_words)
        config, table = model.config, model.config.vocab_size * model.config.hidden_size
        used = model.size - (0 if getattr(config, "tie_word_embeddings", False) and has_words else table)
        attention = 2 * config.num_hidden_layers * attention_widths(config)[0] * length  # a forward's
        if not is_trained:
            always[name] = itemsize * model.size / num_shards
            held[name] = Share(always[name])
            flops += 2 * used + attention
            continue
        how = {"num_tokens": tokens, "num_shards": num_shards, "itemsize": itemsize}
        need = functools.partial(training_memory, *model, **how, has_vocabulary=has_words)
        choice = options["activation_checkpointing"]
        whole, known = itemsize * model.size, (machine.memory, [*held.values()])
        recompute, keep, held[name] = choices(need, choice, whole, *known)
        step = need(recompute=recompute)._asdict()
        for kept in always.keys() & {"weights", "optimizer"}:
            always[kept] += step.pop(kept)
        if keep and step["gathered"]:
            step["gathered"] = whole
        steps.append(step)
        own = min(used, model.trained)  # as `training_flops`
        flops += (4 + 2 * recompute) * used + 2 * own + (3 + recompute) * attention
    training, generation = max(steps, key=lambda step: sum(step.values())), {}
    policy = count(options["model"], *adapters)
    replies = max(options.get(name, 0) for name in ("num_samples", "num_prompts"))
    replies = max(replies, options.get("rollout_size", 0) * options.get("samples_per_prompt", 1))
    if is_policy and replies:
        of_rank = -(-replies * options.get("num_responses", 1) // machine.count)
        own = policy.trained if num_shards == 1 and policy.frozen else policy.size
        copy = itemsize * own  # a frozen base that a rank holds whole is shared with it
        slots = length + (0 if "max_prompt_length" in options else reply)
        free = usable(machine.memory) - sum(always.values())
        generation = generation_need(policy.config, copy, slots, of_rank, itemsize, free)
        at_rest = sum(generation.values()) - generation["logits"]
        if itemsize < 4 and at_rest <= left_at_rest([*held.values()], machine.memory):
            training["replica at rest"] = at_rest
    return Need(always, training, generation, flops, f"tokens/s, in sequences of {length:,}", policy.size)


def generation_need(
    config: Any, copy: float, slots: int, replies: int, itemsize: int, free: float
) -> dict[str, float]:
    """Of a rank that generates with a copy of the weights: at most this many replies of `slots` tokens."""
    row = cache_bytes(config, slots, itemsize)
    rows = max(1, min(replies, 256 if itemsize < 4 else 64, rows_that_fit(free - copy, row)))
    cache = {f"K/V cache of {rows} replies": rows * row}
    return {"replica": copy, **cache, "logits": 4 * 4 * rows * config.vocab_size}


def speaking_need(args: Any, machine: Machine, beside: dict[str, str], slots: int) -> Need:
    """Of a stage that trains nothing: models held at once, of which one generates, at most `slots` tokens.

    Args:
        beside: models by what they are, "attribute model" for one that only rates.
    """
    options, work = flat(args), []
    itemsize = 4 if options["dtype"] == "float32" else 2
    num_shards = shards(options["sharding"], machine.count)
    models = {name: count(path, has_vocabulary=name != "attribute model") for name, path in beside.items()}
    always = {name: itemsize * model.size / num_shards for name, model in models.items()}
    free = usable(machine.memory) - sum(always.values())
    for model in (model for name, model in models.items() if name != "attribute model"):
        copy = itemsize * model.size * (num_shards > 1)  # a rank that holds it whole generates with it
        work.append(generation_need(model.config, copy, slots, 256, itemsize, free))
    return Need(always, {}, max(work, key=lambda parts: sum(parts.values())), 0.0, "")


def empty_clip(folder: str) -> nn.Module:
    """The CLIP model of a reward, as large as its config says."""
    from transformers import AutoConfig, CLIPModel

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type != "clip":
        raise ValueError(f"found a model of type {config.model_type}; expected a CLIP model")
    return CLIPModel(config)


def image_need(args: Any, machine: Machine, beside: dict[str, str]) -> Need:
    """Of a script that trains the denoiser of a diffusion pipeline through its images."""
    from common import diffusion, pipelines

    options, guidance = flat(args), args.guidance_scale
    dtype = torch.float32 if options["dtype"] == "float32" else torch.bfloat16
    itemsize, num_shards = dtype.itemsize, shards(options["sharding"], machine.count)
    toy = str(files.toy_folder("images") / "reward_model")
    sources = [toy if x == "toy" else x for x, _ in formats.read_sources(args.reward, "reward")]
    clips = [x for x in sources if x != "brightness" and ":" not in x]
    with torch.device("meta"):
        pipe = pipelines.empty(args.model).to(dtype)
        rewards = [built(f"reward {x}", lambda x=x: empty_clip(x)) for x in clips]
        denoiser, vae = pipelines.denoiser_of(pipe), pipe.vae
        for part in (*pipelines.modules(pipe).values(), *rewards):
            part.requires_grad_(part is denoiser and not options["lora_rank"])
        if options["lora_rank"]:
            pipelines.add_lora(denoiser, args.system, 1)
    pixels, images = diffusion.image_size(pipe, options["image_size"]), options["micro_batch_size"]
    side, channels = pixels // pipe.vae_scale_factor, vae.config.latent_channels
    size, trained = (sum(p.numel() for p in denoiser.parameters() if x or p.requires_grad) for x in (1, 0))
    choice, of_reward = options["activation_checkpointing"], 0.0
    recompute = choice == "on" or (choice == "auto" and size > 1.5e9)  # as pipelines.load on a GPU
    gathered = [sizes(block) for block in pipelines.blocks(denoiser)]
    with FakeTensorMode():
        text = {None: text_shapes(pipe, dtype), "": text_shapes(pipe, dtype)}
        given = diffusion.conditions(pipe, text, [""] * images, pixels, guidance, torch.device("cpu"))
        rows = images * (1 + diffusion.has_guidance(pipe, guidance))
        latents = torch.empty(rows, channels, side, side, dtype=dtype, requires_grad=True)
        a_step, step_flops = traced(
            lambda: diffusion.prediction(denoiser, latents, 1.0, given), denoiser, recompute
        )
        an_image, image_flops = traced(lambda: diffusion.decode(vae, latents[:1], False), vae, recompute)
        for model in rewards:
            crop = model.config.vision_config.image_size
            inputs = torch.empty(images, 3, crop, crop, requires_grad=True)
            of_reward += traced(functools.partial(model.get_image_features, inputs), model)[0]
    encoders = [part for name, part in pipelines.modules(pipe).items() if name.startswith("text_encoder")]
    K, S = options["num_grad_steps"] or options["num_inference_steps"], options["num_inference_steps"]
    is_kept = not options["step_checkpointing"]
    most = K * a_step + images * an_image + of_reward if is_kept else max(a_step, an_image, of_reward)
    always = {
        "weights": (4 * trained + itemsize * (size - trained)) / num_shards,
        "optimizer": 8 * trained / num_shards,
        "averaged weights": (4 * trained if options["ema_decay"] else 0) / num_shards,
        "VAE": itemsize * sizes(vae),
        "text encoders": itemsize * sum(map(sizes, encoders)),
        "reward": 4.0 * sum(map(sizes, rewards)),
        **{name: itemsize * size / num_shards for name in beside},
    }
    training = {
        "gradients": 4 * trained / num_shards,
        "gathered": itemsize * (2 * max(gathered) + size - sum(gathered)) * (itemsize < 4 or num_shards > 1),
        "activations": most,
        "latents by step": 4.0 * (K + 2) * images * channels * side**2,
        "images": 6 * 4.0 * images * 3 * pixels**2,
    }
    steps = S + K * (3 if is_kept else 4) - K + (K if options["kl_coef"] > 0 else 0)
    flops = step_flops / images * steps + 4 * image_flops
    return Need(always, training, {}, flops, "images/s", size)


def text_shapes(pipe: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What a pipeline's text encoders give for a prompt of the greatest length, see diffusion.encode."""
    from common import pipelines

    config = pipelines.denoiser_of(pipe).config
    width = getattr(config, "cross_attention_dim", None) or config.joint_attention_dim
    length = 512 if pipelines.is_flux(pipe) else 77 + 256 * hasattr(pipe, "text_encoder_3")
    pooled = pipe.text_encoder_2.config.projection_dim if pipelines.is_xl(pipe) else None
    pooled = pooled or getattr(config, "pooled_projection_dim", 0)
    shapes = [(length, width), *([(pooled,)] if pooled else [])]
    return tuple(torch.empty(shape, dtype=dtype) for shape in shapes)


def sizes(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def traced(forward: Callable, model: nn.Module, recompute: bool = False) -> tuple[float, float]:
    """(bytes that backward needs besides the weights, FLOPs) of a forward within FakeTensorMode.

    The model is put on a CPU of no numbers first: on the meta device attention would keep all scores.

    Args:
        recompute: of each of pipelines.PARTS keep the inputs, and of the largest one all.
    """
    from common.pipelines import PARTS

    for module in model.modules():
        for name, x in module._parameters.items():
            if x is not None:
                module._parameters[name] = nn.Parameter(torch.empty(x.shape, dtype=x.dtype), x.requires_grad)
        for name, x in module._buffers.items():
            module._buffers[name] = x if x is None else torch.empty(x.shape, dtype=x.dtype)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[Any, dict[int, torch.Tensor]] = {None: {}}  # part, or None for all others -> place -> tensor
    inside = [None]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage()._cdata) not in weights:
            kept[inside[-1]][place] = tensor  # alive, so that no other takes its place
        return tensor

    def enter(part: nn.Module, args: tuple, named: dict[str, Any]) -> None:
        for x in (*args, *named.values()):
            if isinstance(x, torch.Tensor):
                pack(x)
        kept[part] = {}
        inside.append(part)

    def leave(*_: Any) -> None:
        inside.pop()

    for part in model.modules():
        if recompute and type(part).__name__ in PARTS:
            part.register_forward_pre_hook(enter, with_kwargs=True)
            part.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), FlopCounterMode(display=False) as flops:
        out = forward()
    del out
    others, *parts = (sum(x.untyped_storage().nbytes() for x in held.values()) for held in kept.values())
    return float(others + max(parts, default=0)), float(flops.get_total_flops())


# -------------------------------------------------------------------------------------------------- --plan


def read_machine(spec: str) -> Machine:
    """8x80 as eight GPUs of 80 GiB."""
    found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", spec)
    if not found or not int(found[1]) or not float(found[2]):
        raise formats.wrong("plan", repr(spec), "GPUs x GiB of each, as 8x80")
    return Machine(int(found[1]), float(found[2]) * 2**30)


def show(
    args: Any, beside: Callable[[Any], dict[str, str]] = lambda _: {}, need: Callable = text_need, **how: Any
) -> None:
    """With --plan, print what a rank would hold, and what would fit; ends the process, 0 if it fits.

    Args:
        beside: of the options, the models that a run holds beside the policy and where they are.
        need, how: `text_need` or `image_need`, and what else it is told.
    """
    if not args.run.plan:
        return
    if args.run.check:
        raise dist.RunError("plan and check: give one of them at a time, as each ends when it has answered")
    machine = read_machine(args.run.plan)

    def of(**changes: Any) -> Need:
        changed = with_fields(args, **changes)
        return need(changed, machine, beside(changed), **how)

    found = of()
    if dist.is_main():
        name = Path(sys.modules[type(args).__module__].__file__).name
        print(
            f"{name} on {args.run.plan}: {unit_of(found)[0]} on each GPU", *as_lines(found, machine), sep="\n"
        )
        if found.total > machine.memory:
            print(*advice(flat(args), of, machine), sep="\n", flush=True)
    sys.exit(int(found.total > machine.memory))


def unit_of(need: Need) -> tuple[str, int]:
    """In which a need is told: the name and its bytes."""
    return ("GiB", 2**30) if need.total >= 2**30 else ("MiB", 2**20)


def as_lines(need: Need, machine: Machine) -> list[str]:
    """The rows of a plan."""
    lines, (_, unit) = [], unit_of(need)
    groups = {"": need.always, "training: ": need.training, "generating: ": need.generation}
    for head, parts in groups.items():
        lines += [f"  {head + name:<36}{size / unit:9.2f}" for name, size in parts.items() if size]
    lines.append(f"  {'libraries and allocator':<36}{need.kept / unit:9.2f}")
    verdict = "fits into" if need.total <= machine.memory else "does not fit into"
    lines.append(f"  {'most at once':<36}{need.total / unit:9.2f}, {verdict} {machine.memory / 2**30:g} GiB")
    if not need.flops or need.size < SMALL:
        return lines
    pace = float(f"{MFU * PEAK_FLOPS * machine.count / need.flops:.3g}")
    peak = f"{MFU:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s a GPU"
    return [*lines, f"training, by its operations at {peak}: about {pace:,.10g} {need.unit}"]


def changes(options: dict[str, Any]) -> list[tuple[str, Any]]:
    """What may still make a run smaller, in the order in which it is preferred."""

    def may_help(name: str, value: Any, now: Any) -> bool:
        if isinstance(value, str):
            return now not in (value, "full")
        return now != value and not 0 < now <= value and not (name == "lora_rank" and now)

    found = [
        (name, value) for name, value in CHANGES if name in options and may_help(name, value, options[name])
    ]
    return found + [(name, options[name] // 2) for name in LENGTHS if options.get(name, 0) > 1]


def advice(options: dict[str, Any], of: Callable[..., Need], machine: Machine) -> list[str]:
    """What each change that helps would make of it alone, and which of them together make it fit.

    Some help only after others, as no samples do once training needs less than they. So it begins with all,
    and gives up, the least preferred first, each without which it still fits, or is no larger.
    """

    name_of_unit, unit = unit_of(of())

    @functools.cache
    def total(made: tuple[tuple[str, Any], ...]) -> float:
        return of(**dict(made)).total

    def told(made: tuple[tuple[str, Any], ...]) -> str:
        words, size = " ".join(f"--{name} {value}" for name, value in dict(made).items()), total(made)
        halved = " and ".join(name for name in LENGTHS if name in dict(made))
        note = f" ({halved} halved: what is longer is cut or left out)" if halved else ""
        return f"  {words}: {size / unit:.2f} {name_of_unit}{', fits' * (size <= machine.memory)}{note}"

    possible = tuple(changes(options))
    helpful = [(change,) for change in possible if total((change,)) < total(())]
    kept = min((possible, *helpful), key=lambda made: max(total(made), machine.memory))
    most = max(total(kept), machine.memory)
    for change in reversed(kept):
        rest = tuple(x for x in kept if x != change)
        kept = rest if total(rest) <= most else kept
    if not kept:
        return ["no option that is tried here makes it smaller; more GPUs or a smaller model would"]
    lines = ["with one change it would be:", *map(told, helpful)] if helpful else []
    lines += [] if kept in helpful else ["together:", told(kept)]
    end = "these changes are not enough; what is left is more GPUs, a smaller model, or shorter texts still"
    return lines + [end] * (total(kept) > machine.memory)
