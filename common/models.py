"""Models: any Hugging Face decoder in; out a `Policy` or a `Scorer` of packed micro-batches, sharded.

Every model is an FSDP2 module with float32 master weights and gradients summed, not averaged, over ranks; on
one process too, but there, and with sharding none, weights of float32 compute stay plain tensors. What a
forward computes, attention and head, is in packed.py.

Shapes: N tokens of a micro-batch, N_targets scored ones, D width, V vocabulary, A outputs of a scorer.
"""

import contextlib
import functools
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from common import dist, loading, lora, packed
from common.args import Inference, Optimization, System
from common.files import model_folder
from common.lm_head import ChunkedHead, TokenStats
from common.loading import check_packable, read_pretrained, read_scorer
from common.packed import Example, MicroBatch, table
from common.plan import PEAK_FLOPS, Share, choices, left_at_rest, training_flops, training_memory

# --------------------------------------------------------------------------------- models of packed sequences


class PackedModel(nn.Module):
    """A transformers model inside, whose trunk reads packed micro-batches. Calls go through this class:
    on its own the model inside has no weights to compute with while they are sharded.
    """

    auto_class: ClassVar[str]  # transformers' name for what is inside

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype):
        super().__init__()
        self.model, self.config, self.generation_config = model, model.config, model.generation_config
        self.compute_dtype, self.dtype_on_disk = compute_dtype, model.dtype_on_disk
        self.wide = model.wide  # names of tensors that have another dtype on disk, and these
        self.lora_config = getattr(model, "lora_config", None)
        # what FSDP would do after each row and only the last one of a step needs: see `once_a_step`
        self.switches: list[Callable[[bool], None]] = []

    @property
    def head(self) -> nn.Linear:
        return loading.output_head(self.model)

    def hidden_states(self, batch: MicroBatch) -> Tensor:
        """The trunk over a micro-batch. -> (N, D)"""
        for switch in self.switches if torch.is_grad_enabled() else ():
            switch(batch.is_last)
        trunk = getattr(self.model, self.model.base_model_prefix)
        return trunk(**batch.inputs, use_cache=False)[0][0]  # a cache would let it attend across sequences


class Policy(PackedModel):
    """A causal language model: `policy(batch)` scores the tokens that a micro-batch marks."""

    auto_class = "AutoModelForCausalLM"

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype):
        super().__init__(model, compute_dtype)
        factor, divisor = (getattr(self.config, x, None) or 1.0 for x in ("logit_scale", "logits_scaling"))
        if self.config.model_type == "hyperclovax":  # multiplies by what Granite divides by
            divisor = 1 / divisor
        self.logit_scale = factor / divisor  # Cohere's and Granite's logits have one
        self.replica, self.room = None, 0.0  # generate.py's plain copy, bytes it may keep beside training
        head = ChunkedHead.like(model.get_output_embeddings())
        head.cap = getattr(self.config, "final_logit_softcapping", None)
        model.set_output_embeddings(head)
        assert model.get_output_embeddings() is head

    def forward(
        self,
        batch: MicroBatch,
        temperature: float = 1.0,
        equal_weights: bool = False,
        as_logits: bool = False,
    ) -> TokenStats | Tensor:
        """What is known of each scored token under logits / temperature; as_logits: these, by `logits`.

        equal_weights: say that the loss is a multiple of logps.sum(), and the backward pass need not compute
        logits again. A loss that weighs the tokens otherwise then stops the run.
        """
        hidden = self.hidden_states(batch).index_select(0, batch.targets - 1)  # position t-1 scores token t
        tokens = None if as_logits else batch.tokens[batch.targets]
        return self.head(hidden, tokens, self.logit_scale / temperature, equal_weights)

    def logits(self, batch: MicroBatch) -> Tensor:
        """What each scored token was drawn from, with gradient, for a KL or distillation. -> (N_targets, V)

        N_targets x V float32 numbers: 2 GiB for 4096 tokens of 128k words, and as much again in backward.
        """
        return self(batch, as_logits=True)


class Scorer(PackedModel):
    """A linear head of A outputs, in float32, on the hidden states of a language model."""

    auto_class = "AutoModelForSequenceClassification"
    ending: tuple[int, ...] | None = None  # what it reads in place of an end token, set by rewards.py

    def forward(self, batch: MicroBatch, positions: Tensor) -> Tensor:
        """Outputs at these positions of the row. (n,) -> (n, A)"""
        return self.head(self.hidden_states(batch).index_select(0, positions).float())


def token_logps(policy: Policy, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """log p(token | the tokens before it in its sequence) of each scored token. -> (N_targets,) float32"""
    return policy(batch, temperature).logps


def rewards(scorer: Scorer, batch: MicroBatch) -> Tensor:
    """Outputs of a scorer at the last token of each sequence. -> (num_segments, A)"""
    return scorer(batch, batch.ends)


def values(scorer: Scorer, batch: MicroBatch) -> Tensor:
    """Value before each scored token, what is expected from there on. -> (N_targets,)"""
    return scorer(batch, batch.targets - 1)[:, 0]


def score(
    scorer: Scorer,
    examples: list[Example],
    micro_batch_tokens: int,
    device: torch.device,
    centred: bool = True,
) -> Tensor:
    """Outputs for every sequence, in order, on every rank. -> (sequences, A)

    centred: by the config's reward_mean and reward_std, if set."""
    examples = examples if scorer.ending is None else [e.end_with(scorer.ending) for e in examples]
    shape = (scorer.config.num_labels,)
    outputs = table(lambda row: rewards(scorer, row), examples, micro_batch_tokens, device, shape, "scoring")
    if centred and getattr(scorer.config, "reward_mean", None) is not None:
        mean, std = (outputs.new_tensor(getattr(scorer.config, x)) for x in ("reward_mean", "reward_std"))
        return (outputs - mean) / std
    return outputs


# --------------------------------------------------------------------------------------------- load and shard


def load(model: str, device: torch.device, system: System | Inference, trainable: bool = True) -> Policy:
    """A causal language model, sharded over all ranks.

    Only rank 0 reads the weights; the others receive their shards. Only a trainable model gets adapters.

    Raises:
        RunError: no such model, no weights in the folder, or an architecture that packing cannot serve.
    """
    return _load(Policy, read_pretrained, model, device, system, trainable)


def load_scorer(
    model: str,
    device: torch.device,
    system: System | Inference,
    names: Sequence[str] = (),
    trainable: bool = True,
    zero_head: bool = False,
) -> Scorer:
    """A model with a linear head of one output a name, for `rewards` or `values`; as `load` otherwise.

    A reward model's own head is kept, the named outputs of it, unless zero_head; without names, all of it.

    Raises:
        RunError: as `load`; the model lacks an output of that name; or, without names, is no reward model.
    """
    read = functools.partial(read_scorer, names=names, zero_head=zero_head)
    return _load(Scorer, read, model, device, system, trainable)


def output_names(scorer: Scorer) -> list[str]:
    """What the outputs of a scorer are called."""
    return [scorer.config.id2label[i] for i in range(scorer.config.num_labels)]


def _load(
    kind: type[PackedModel],
    read_plain: Callable,
    model: str,
    device: torch.device,
    system: System | Inference,
    trainable: bool,
) -> Any:
    """What `read_plain` gives on rank 0, as `kind`: built empty on every rank, sharded, then filled."""
    import transformers

    # no mask function: packed sequences need no mask
    transformers.AttentionInterface.register("packed", packed.packed_attention)
    packed.find_kernel(device)
    dtype = resolve_dtype(system.dtype, device)
    full: list[nn.Module] = []  # rank 0's; the others stay without a copy

    def with_lora(plain: nn.Module) -> nn.Module:
        if trainable and system.lora_rank > 0:
            held = {p: p.data for p in plain.parameters()}
            for p in held:  # peft draws adapters in the dtype of what they stand on, here float32 always
                p.data = p.new_empty((), dtype=torch.float32).expand(p.shape)
            lora.add(plain, system.lora_rank, system.lora_alpha, system.lora_target)
            for p, data in held.items():
                p.data = data
        return plain

    def read() -> tuple:
        with torch.random.fork_rng(devices=[]):  # ranks keep drawing alike
            folder, gguf = model_folder(model)
            try:
                plain = read_plain(folder, gguf)
            except dist.RunError as error:  # told by the name that the user gave
                raise dist.RunError(str(error).replace(folder, model)) from error
            check_packable(plain)
            if dtype != torch.float32 and not (trainable and system.lora_rank == 0):
                lora.say_what_is_lost(model, plain.lost, dtype)
            if trainable:
                loading.check_savable(plain)
            known = {"dtype_on_disk": plain.dtype_on_disk, "wide": plain.wide}
            full.append(with_lora(plain))
        return plain.config, known | {"generation_config": getattr(plain, "generation_config", None)}

    config, known = dist.from_main(read)
    plain_decoder = functools.partial(transformers.AutoModelForCausalLM.from_config, trust_remote_code=False)
    make = loading.empty_scorer if kind is Scorer else plain_decoder
    with torch.device("meta"):
        plain = with_lora(make(config, attn_implementation="packed", dtype=torch.float32))
        vars(plain).update(known)
        shell = kind(plain, dtype)
    if device.type == "cuda" and dtype != torch.float32:
        loading.fuse_norms(shell)
    shell.eval()  # no dropout, layer drop or router noise, ever: policy and reference are one function
    if not trainable:
        shell.requires_grad_(False)
    shard(shell, device, system)
    shell.to_empty(device=device)
    plain.tie_weights()  # to_empty makes two of each shared parameter that FSDP does not hold
    fill(plain, full.pop() if full else None)
    return shell


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the model's outermost list of modules."""
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList)))


def mesh(device: torch.device, sharding: str) -> DeviceMesh:
    """Ranks that share a copy of the model: all of them, those of a node (hybrid), or none."""
    world = dist.world_size()
    size = {"full": world, "hybrid": int(os.environ.get("LOCAL_WORLD_SIZE", world)), "none": 1}[sharding]
    return _make_mesh(device.type, world // size, size)


@functools.cache  # each one makes process groups of its own
def _make_mesh(kind: str, copies: int, size: int) -> DeviceMesh:
    if copies == 1:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (copies, size), mesh_dim_names=("replicate", "shard"))


# what a decoder layer is given in other sizes for each row, for the compiler. With dynamic=True the width of
# its heads would be a variable too, and rotary embeddings would spend their time on dividing by it
ROW_ARGUMENTS = r"L\['(args|kwargs|hidden_states|position_embeddings|position_ids)'\].*"


@functools.cache  # for all models of a process
def prepare_compiler() -> None:
    """Tell it what varies from row to row, and leave attention without a kernel out of its graphs."""
    torch.compiler.config.dynamic_sources = ROW_ARGUMENTS
    # its lengths are numbers of the host's, and would be compiled anew for each row
    packed.attend_by_part = torch.compiler.disable(packed.attend_by_part)


def shard(shell: PackedModel, device: torch.device, system: System) -> None:
    """Compile, activation checkpointing, then FSDP2, in that order, on a model without weights yet."""
    trainable = any(p.requires_grad for p in shell.parameters())
    head, embedding = shell.head, shell.model.get_input_embeddings()
    for name, parameter in shell.named_parameters():
        if not parameter.requires_grad and not name.endswith("score.weight"):
            parameter.data = parameter.data.to(shell.compute_dtype)  # frozen ones need no float32 master
    plan = fsdp_plan(shell, shell.compute_dtype, device, system.sharding)
    recompute, keep = memory_choices(shell, system, device)
    head.compiled = system.compile and device.type == "cuda"
    if system.compile:
        prepare_compiler()
    for block in blocks(shell):
        if system.compile:  # inside the recomputation: the same graph runs in forward and again in backward
            block.forward = torch.compile(block.forward)
        if recompute:
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
        # what forward gathered stays for backward if it fits; frozen weights have no backward to give it back
        fully_shard(block, **plan, reshard_after_forward=not keep)
    if head.weight is not embedding.weight:  # tied weights stay together in the root's group
        fully_shard(embedding, **plan)
        own = {"reshard_after_forward": not trainable}  # backward begins with it
        if isinstance(shell, Scorer):  # float32 in every compute dtype
            own["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        fully_shard(head, **plan | own)
    fully_shard(shell, **plan)
    sum_gradients(shell)
    shell.switches = once_a_step(shell, plan, keep)


def once_a_step(shell: PackedModel, plan: dict[str, Any], keep: bool) -> list[Callable[[bool], None]]:
    """What is switched off before every row and on before the last one of an optimizer step.

    Weights that stay whole from forward to backward stay whole until the next row. Of a model that is whole
    on each rank gradients add up in float32 and then become FSDP's; of one with copies in groups of ranks
    they go through the group for each row, as a rank has no room for all of them, but over the groups once.
    """
    if plan["ignored_params"] is not None:  # nothing is FSDP's
        return []
    switches = [shell.set_reshard_after_backward] if keep else []
    if plan["mesh"].size(-1) == 1:
        return [*switches, shell.set_requires_gradient_sync]
    return [*switches, shell.set_requires_all_reduce] if plan["mesh"].ndim == 2 else switches


def fsdp_plan(model: nn.Module, dtype: torch.dtype, device: torch.device, sharding: str) -> dict[str, Any]:
    """What `fully_shard` is told of every part of the model: ranks, compute dtype, float32 gradients."""
    low = None if dtype == torch.float32 else dtype
    whole = dist.world_size() == 1 or sharding == "none"
    return {
        "mesh": mesh(device, sharding),
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32),
        # whole float32 weights are neither gathered nor cast: FSDP would only copy them, row by row
        "ignored_params": set(model.parameters()) if whole and low is None else None,
    }


def sum_gradients(model: nn.Module) -> None:
    """Let FSDP add gradients over ranks instead of averaging them; gloo knows only the plain sum.

    Of one rank the sum is the mean, and FSDP does not even divide by 1.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule) and dist.world_size() > 1:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


HELD: weakref.WeakSet[PackedModel] = weakref.WeakSet()  # the models of this process


def memory_choices(shell: PackedModel, system: System, device: torch.device) -> tuple[bool, bool]:
    """(recompute activations, keep whole weights from forward to backward), by what the device can hold.

    The room for replicas, of this model and of those that are there, becomes what all of them leave.
    """
    trained = sum(p.numel() for p in shell.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in shell.parameters()) - trained
    need = functools.partial(
        training_memory,
        shell.config,
        trained,
        frozen,
        num_tokens=packed.token_limit(system.micro_batch_tokens, device),
        num_shards=mesh(device, system.sharding)["shard"].size(),
        itemsize=shell.compute_dtype.itemsize,
        has_vocabulary=isinstance(shell, Policy),
    )
    whole, folded = (shell.compute_dtype.itemsize * n for n in (trained + frozen, lora.num_folded(shell)))
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:  # this rank's share of the machine's
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size()))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    # rank 0's word: which models Python has not freed yet may differ
    held = dist.from_main(lambda: [model.share for model in HELD])
    recompute, keep, shell.share = False, False, Share(need(recompute=False).weights)
    if trained:
        how = (system.activation_checkpointing, whole, memory, held, folded)
        recompute, keep, shell.share = choices(need, *how)
    HELD.add(shell)
    left = left_at_rest([*held, shell.share], memory)
    for model in HELD:
        model.room = left if model.share.step else 0.0  # what only speaks keeps nothing between calls
    return recompute, keep


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The compute dtype that the `dtype` argument means on this device."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype)


@torch.no_grad()
def fill(module: nn.Module, full: nn.Module | None) -> None:
    """Copy what rank 0 holds in `full` into a module that is sharded already, a whole tensor at a time."""

    def tensors(model: nn.Module) -> dict[str, Tensor]:  # rotary frequencies are in no state dict
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    source, nothing = tensors(full) if full is not None else {}, torch.empty(0)
    targets = tensors(module)
    for name, target in dist.progress(targets.items(), "weights", len(targets)):
        whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        if full is not None:
            whole.copy_(source[name].to(target.device))  # sent in its own dtype
            source[name].data = nothing  # what has been read is given back
        if dist.world_size() > 1:
            torch.distributed.broadcast(whole, src=0)
        if isinstance(target, DTensor):  # every rank cuts its own part out
            whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(whole)


@contextlib.contextmanager
def reference(policy: nn.Module, ref_policy: nn.Module | None) -> Iterator[Any]:
    """The reference within the block: the frozen copy, or if there is none the policy without adapters."""
    with contextlib.nullcontext() if ref_policy is not None else lora.adapters_off(policy):
        yield policy if ref_policy is None else ref_policy


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, its own memory where that is all there is. A collective if it is sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    # not by the shape of the local part: of a head with one row the first rank has all, the others nothing
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return tensor.to_local() if all(p.is_replicate() or n == 1 for p, n in sizes) else tensor.full_tensor()


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of all weights, one at a time; a collective that all ranks must join."""
    for name, tensor in model.state_dict().items():
        yield name, whole_tensor(tensor)


# ----------------------------------------------------------------------------------------------- optimization


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The trainable parameters for AdamW: matrices decay, norms and biases do not; one kernel updates all."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay, "fused": True},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0, "fused": True},
    ]


def adamw(model: nn.Module, optimization: Optimization) -> torch.optim.AdamW:
    """AdamW of all that is trained; each step sets its own learning rate."""
    return torch.optim.AdamW(parameter_groups(model, optimization.weight_decay), betas=(0.9, 0.95))


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients to a global norm of at most max_norm (0: never). -> the norm before, a scalar.

    Before that, gradients FSDP does not hold are summed over ranks: call it once a step, after all its rows.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            dist.sum_over_ranks(parameter.grad)
    norm = nn.utils.clip_grad_norm_(trainable, max_norm or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def lr_factor(step: int, num_steps: int, optimization: Optimization) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 1.

    Linear warm-up, then constant, or linear or cosine down to min_lr_ratio at the last step.
    """
    warmup_steps, least = optimization.warmup(num_steps), optimization.min_lr_ratio
    if step <= warmup_steps:
        return step / (warmup_steps + 1)
    if optimization.lr_schedule == "constant":
        return 1.0
    done = (step - warmup_steps - 1) / max(1, num_steps - warmup_steps - 1)
    left = 1 - done if optimization.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return least + (1 - least) * left


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def speed(model: PackedModel, batch: list[Example], seconds: float) -> dict[str, float]:
    """Tokens per second over all ranks; on GPU also MFU, of 989 TFLOP/s a rank, and peak memory."""
    lengths = [len(tokens) for example in batch for tokens, _ in example.sequences]
    metrics = {"train/tokens_per_second": sum(lengths) / seconds}
    if torch.cuda.is_available():
        peak = PEAK_FLOPS * dist.world_size()
        shared = [example.num_shared for example in batch for _ in example.sequences[1:]]  # is run once
        flops = training_flops(model, lengths) - training_flops(model, shared)
        metrics["train/mfu"] = flops / seconds / peak
        metrics["train/max_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics
