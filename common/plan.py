"""What a training run needs: bytes of memory on a rank, operations for a token."""

from typing import Any, NamedTuple


class Memory(NamedTuple):
    """Bytes on one rank, by what holds them."""

    weights: float  # float32 masters of what is trained, the compute dtype of what is frozen
    gradients: float
    optimizer: float  # two moments of AdamW
    gathered: float  # whole weights in the compute dtype while a block, the embedding and the head work
    activations: float  # of one micro-batch
    head: float  # buffers of the chunked head and its float32 gradient

    @property
    def total(self) -> float:
        return sum(self)


def training_memory(
    config: Any,
    trained: int,
    frozen: int,
    *,
    num_tokens: int,
    num_shards: int,
    itemsize: int,
    recompute: bool,
) -> Memory:
    """An estimate for a dense decoder in packed micro-batches; measured ones were within a tenth on an H200.

    A token leaves, in each layer, 7 vectors of the width (inputs of norms and products, q, k, v, attention)
    and 4 of the width inside the MLP; recomputed, one vector in each layer and all of these in a single one.

    Args:
        config: of the transformers model.
        trained, frozen: parameters.
        num_tokens: of a micro-batch.
        num_shards: ranks that share one copy of the model.
        itemsize: bytes of a number of the compute dtype.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    inside = getattr(config, "intermediate_size", None) or 4 * width
    table = config.vocab_size * width
    a_layer = itemsize * (7 * width + 4 * inside)
    kept = itemsize * width * layers + a_layer if recompute else a_layer * layers
    block = max(0, trained + frozen - 2 * table) / layers
    return Memory(
        weights=(4 * trained + itemsize * frozen) / num_shards,
        gradients=4 * trained / num_shards,
        optimizer=8 * trained / num_shards,
        gathered=itemsize * 2 * (block + table) if itemsize < 4 or num_shards > 1 else 0.0,
        activations=num_tokens * kept,
        head=4 * (table if trained else 0) + 2 * 4 * min(num_tokens, 2048) * config.vocab_size,
    )


def training_flops(model: Any, lengths: list[int]) -> float:
    """FLOPs of forward and backward over sequences of these lengths, recomputation not counted.

    A token costs 6 for each parameter outside an untied input embedding, 4 if it is frozen (LoRA); the causal
    attention of a sequence 6 x layers x heads x head width x length^2. Every expert of a mixture is counted.
    """
    config = model.config
    table = model.model.get_input_embeddings().weight
    table = None if model.head.weight is table else table
    per_token = sum((6 if p.requires_grad else 4) * p.numel() for p in model.parameters() if p is not table)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * head_dim
    return float(per_token * sum(lengths) + attention * sum(n * n for n in lengths))
