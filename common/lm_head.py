"""The output head of a language model: log-probabilities and entropies of tokens, never all the logits.

Logits exist for a chunk of tokens at a time; gradients are written out by hand. Shapes: n tokens, D width, V
vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.packed import soft_cap, wide


class TokenStats(NamedTuple):
    """What one packed forward says about its N_targets scored tokens; all float32."""

    logps: Tensor  # (N_targets,) log p(token | tokens before it), nats
    entropy: Tensor  # (N_targets,) of the distribution the token was scored under, nats
    accuracy: Tensor  # (N_targets,) 1 where the token was the most likely one, no gradient
    mean_logit: Tensor  # (N_targets,) mean logit over the vocabulary, before any scale, no gradient


class ChunkedHead(nn.Linear):
    """The output head of a language model, put in its place by `set_output_embeddings`."""

    @classmethod
    def like(cls, head: nn.Linear) -> "ChunkedHead":
        """With the very weight of `head`, which may be tied to an embedding."""
        ours = cls(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        ours.weight, ours.bias = head.weight, head.bias
        ours.compiled, ours.cap = False, None
        return ours

    def forward(
        self, h: Tensor, tokens: Tensor | None = None, scale: float = 1.0, equal_weights: bool = False
    ) -> TokenStats | Tensor:
        """What (n, D) hidden states say of the (n,) tokens that come next; without tokens the logits (n, V).

        Logits are float32, capped at self.cap and multiplied by scale, in both cases with gradient.
        equal_weights: the loss is a multiple of logps.sum(), so forward can prepare its gradient.
        """
        if tokens is None:
            return soft_cap(_Logits.apply(h, self.weight, self.bias), self.cap) * scale
        learns = torch.is_grad_enabled() and h.requires_grad
        early = learns and (equal_weights or not self.weight.requires_grad)
        # a buffer is of 16 MiB at most, 1 GiB on GPU, whatever the vocabulary; of 8 beside an early dW
        room = 2**28 if h.is_cuda else 2**21 if early else 2**22
        most = min(2048 if h.is_cuda else 256, room // len(self.weight))
        numbers = (scale, most, self.compiled, self.cap, early)
        return TokenStats(*_TokenStats.apply(h, self.weight, self.bias, tokens, *numbers))


class _TokenStats(torch.autograd.Function):
    """Log-probabilities and entropies of tokens y (n,) from chunks of logits.

    h (n, D) hidden states, weight (V, D), bias (V,) or None; the numbers of TokenStats, (n,) each.
    All chunks share two buffers: fresh ones would be mapped and zeroed by the system chunk by chunk. Products
    of bfloat16 add up to float32 logits and dW: rounded to bfloat16, logits are .02 nats a token off.
    z = h W^T + b, lp = z_y - logsumexp z, H = -sum_v p_v log p_v;
    dz = g_lp (onehot(y) - p) - g_H p (log p + H), dh = dz W, dW = sum dz^T h.
    Capped logits c tanh(z / c) have the slope 1 - tanh(z / c)^2, which dz is multiplied by.

    backward computes the logits again, unless forward was `early` and made the gradient of sum lp while it
    had them (as in Liger, arXiv 2410.10989). Its dh is right for any g_lp, token by token, so that suffices
    for frozen weights; its dW is right where all tokens have one g_lp.
    """

    @staticmethod
    def forward(
        ctx,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
        scale: float,
        chunk: int,
        compiled: bool,
        cap: float | None = None,
        early: bool = False,
    ):
        ctx.numbers = numbers = (scale, chunk, compiled, cap)
        operands = _operands(h, weight, bias)
        columns = [h.new_empty(len(y), dtype=wide(h)) for _ in TokenStats._fields]
        ones = torch.ones_like(columns[0])
        sums = _zeros(operands, ctx.needs_input_grad) if early else ()
        for part, z, p, slope in _logit_chunks(operands, *numbers):
            for column, values in zip(columns, _describe(z, p, y[part]), strict=True):
                column[part] = values
            if early:
                known = (columns[0][part], columns[1][part])
                dz = _differentiate(z, p, y[part], known, ones[part], None, operands[0].dtype)
                _add_gradients(sums, operands, part, dz, slope)
        columns[3] /= scale
        ctx.save_for_backward(h, weight, bias, y, *columns[:2], *sums)
        ctx.mark_non_differentiable(*columns[2:])
        ctx.set_materialize_grads(False)
        return tuple(columns)

    @staticmethod
    def backward(ctx, g_logps: Tensor | None, g_entropy: Tensor | None, *_: Any):
        h, weight, bias, y, logps, entropy, *sums = ctx.saved_tensors
        scale, factors = ctx.numbers[0], (ctx.numbers[0],) * 3
        if sums and g_entropy is None:
            gradients, g = sums, g_logps[:1].sum()  # of no tokens 0
            factors = (g_logps[:, None] * scale, g * scale, g * scale)
            if any(d is not None for d in sums[1:]):
                told = "equal_weights=True, but the loss weighs tokens apart: leave it out"
                torch._assert_async((g_logps == g).all(), told)
        else:
            operands = _operands(h, weight, bias)
            gradients = _zeros(operands, ctx.needs_input_grad)
            for part, z, p, slope in _logit_chunks(operands, *ctx.numbers):
                if p is not None:
                    _probabilities(z, p)
                upstream = (None if g is None else g[part] for g in (g_logps, g_entropy))
                known = (logps.detach()[part], entropy.detach()[part])
                dz = _differentiate(z, p, y[part], known, *upstream, operands[0].dtype)
                _add_gradients(gradients, operands, part, dz, slope)
        # in place: dW is as large as the weights
        scaled = (
            None if d is None else d.mul_(factor).to(h.dtype)
            for d, factor in zip(gradients, factors, strict=True)
        )
        return *scaled, *[None] * 6


def _logit_chunks(
    operands: tuple, scale: float, chunk: int, compiled: bool, cap: float | None
) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor | None]]:
    """(tokens, their logits z, a buffer as large, slope of the cap) chunk by chunk.

    What is compiled needs no buffer, so that None says to use the compiled formulas.
    """
    h, weight, bias = operands
    buffers = h.new_empty(1 if compiled else 2, min(chunk, len(h)), len(weight), dtype=wide(h))
    for start in range(0, len(h), chunk):
        part = slice(start, start + chunk)
        z, *spare = buffers[:, : len(h[part])]
        z = float32_logits(h[part], weight, bias, z, cap)
        slope = 1 - (z / cap).square() if cap else None
        yield part, z if scale == 1.0 else z.mul_(scale), spare[0] if spare else None, slope


def _zeros(operands: tuple, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Places for dh, dW and db; sums over thousands of tokens are float32 whatever the compute dtype."""
    h, *others = operands
    wanted = zip(others, needed[1:3], strict=True)
    return torch.empty_like(h), *(torch.zeros_like(x, dtype=wide(h)) if yes else None for x, yes in wanted)


def _add_gradients(gradients: tuple, operands: tuple, part: slice, dz: Tensor, slope: Tensor | None) -> None:
    """What the gradient dz by the logits of these tokens makes of dh, dW and db."""
    (dh, dw, db), (h, weight, _) = gradients, operands
    dz = dz if slope is None else dz * slope
    low = dz.to(h.dtype)
    torch.mm(low, weight, out=dh[part])
    if dw is not None:
        _add_product(dw, low.T, h[part])
    if db is not None:
        db += dz.sum(0)


def _probabilities(z: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Logits z (n, V) become probabilities, and p their logarithms."""
    logp = torch.log_softmax(z, -1, out=p)
    return torch.exp(logp, out=z), logp


def _describe(z: Tensor, p: Tensor | None, y: Tensor) -> tuple[Tensor, ...]:
    """The columns of TokenStats from logits z (n, V), which become probabilities; p is overwritten."""
    if p is None:
        return _fused(_statistics)(_of_one_vocabulary(z), y)
    mean_logit, argmax = z.mean(-1), z.argmax(-1)
    z, logp = _probabilities(z, p)
    logps = logp.gather(1, y[:, None])[:, 0]
    return logps, -logp.mul_(z).sum(-1), argmax == y, mean_logit


def _differentiate(
    p: Tensor,
    logp: Tensor | None,
    y: Tensor,
    known: tuple[Tensor, Tensor],
    g_logps: Tensor | None,
    g_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient by logits (n, V), from those by log-probabilities and entropies, which are known; (n,) each.

    Overwrites p and logp, which are `_probabilities` (without g_entropy logp can be anything); or takes
    logits and None, and the result has dtype.
    """
    columns = (None if x is None else x[:, None] for x in (*known, g_logps, g_entropy))
    logps, entropy, g_logps, g_entropy = columns
    if logp is None:
        return _fused(_gradient)(_of_one_vocabulary(p), y, logps, entropy, g_logps, g_entropy, dtype)
    dz = None
    if g_entropy is not None:
        dz = logp.add_(entropy).mul_(p).mul_(-g_entropy)
    if g_logps is not None:
        p.mul_(-g_logps)
        dz = p if dz is None else dz.add_(p)
        dz.scatter_add_(1, y[:, None], g_logps)
    return dz


def _statistics(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """`_describe` as formulas, of which a compiler makes two passes over the logits instead of ten."""
    above = z - z.amax(-1, keepdim=True)
    weights = above.exp()
    total = weights.sum(-1)
    logps = above.gather(1, y[:, None])[:, 0] - total.log()
    entropy = total.log() - (weights * above).sum(-1) / total
    return logps, entropy, z.argmax(-1) == y, z.mean(-1)


def _gradient(
    z: Tensor,
    y: Tensor,
    logps: Tensor,
    entropy: Tensor,
    g_logps: Tensor | None,
    g_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`_differentiate` as formulas, from logits, rounded to dtype: one pass, as logsumexp z = z_y - lp."""
    logp = z - (z.gather(1, y[:, None]) - logps)
    p, dz = logp.exp(), torch.zeros_like(z)
    if g_logps is not None:
        is_y = torch.arange(z.shape[1], device=z.device) == y[:, None]
        dz = dz + g_logps * (is_y.to(p.dtype) - p)
    if g_entropy is not None:
        dz = dz - g_entropy * p * (logp + entropy)
    return dz.to(dtype)


@functools.cache
def _fused(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


def _of_one_vocabulary(z: Tensor) -> Tensor:
    """The logits with V constant for the compiler, which would divide each index by it; and as no view of the
    buffer, whose size it would look at as well.
    """
    z = z.detach()
    torch._dynamo.mark_static(z, 1)
    return z


def _operands(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What enters the head's products. A GPU adds up low precision in float32; a CPU gets float32 numbers."""
    return tuple(x if x is None or x.is_cuda else x.to(wide(x)) for x in tensors)


def float32_logits(
    h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """h W^T + b with float32 sums that are never rounded to h's precision. (n, D), (V, D), (V,) -> (n, V)"""
    h, weight, bias = _operands(h, weight, bias)
    kind = {} if h.dtype == wide(h) else {"out_dtype": torch.float32}
    out = torch.mm(h, weight.T, out=out, **kind)
    out = out if bias is None else out.add_(bias)
    return out.div_(cap).tanh_().mul_(cap) if cap else out


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b, accumulated in out's dtype."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


class _Logits(torch.autograd.Function):
    """`float32_logits` with gradient, for those who need a distribution: a full KL, distillation."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, bias: Tensor | None):
        ctx.save_for_backward(h, weight, bias)
        return float32_logits(h, weight, bias)

    @staticmethod
    def backward(ctx, dz: Tensor):
        h, weight, bias = ctx.saved_tensors
        low, dw = dz.to(h.dtype), None
        if ctx.needs_input_grad[1]:
            dw = _add_product(torch.zeros_like(weight, dtype=dz.dtype), *_operands(low.T, h)).to(h.dtype)
        return low @ weight, dw, None if bias is None else dz.sum(0).to(h.dtype)
