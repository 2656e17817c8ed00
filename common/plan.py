"""What a training run needs, before it starts: bytes of memory on a rank."""

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
