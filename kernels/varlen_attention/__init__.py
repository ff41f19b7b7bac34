"""Attention within each of many sequences of unlike lengths that lie one after another in memory."""

import itertools

import torch

from terrazzo.errors import InputError
from terrazzo.kernels import arguments, attention_host, opaque
from terrazzo.kernels import backend as _backend
from terrazzo.kernels.varlen_attention import op
from terrazzo.kernels.varlen_attention.op import describe

__all__ = ["describe", "first_weights", "varlen_attention", "why"]


def _check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, longest: int | None = None
) -> None:
    """Raise `InputError` for what the definition does not allow."""
    arguments.check_tensors({"query": query, "key": key, "value": value})
    if query.dim() != 3 or not query.shape == key.shape == value.shape:
        raise InputError(
            "query, key and value must be (sum of lengths, heads, head_dim), all of one shape, "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if arguments.any_empty(*query.shape[1:]):
        raise InputError(f"there must be at least 1 head and a head_dim of at least 1, got {tuple(query.shape)}")
    arguments.check_one_dtype(query=query, key=key, value=value)
    _check_offsets(offsets, query, longest)


def _check_offsets(offsets: torch.Tensor, query: torch.Tensor, longest: int | None) -> None:
    arguments.check_together({"query": query, "offsets": offsets})
    if offsets.dim() != 1 or len(offsets) < 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise InputError(f"offsets must be (B + 1,) whole numbers, got {tuple(offsets.shape)} of {offsets.dtype}")
    # Those on a GPU are taken as they are: to look at them would be to wait for it.
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        found = offsets.tolist()
        if found[0] != 0 or found[-1] != len(query) or found != sorted(found):
            raise InputError(f"offsets must rise from 0 to the {len(query)} tokens, got {found}")
        needed = max((end - begin for begin, end in itertools.pairwise(found)), default=0)
        if longest is not None and longest < needed:
            raise InputError(f"longest must be at least {needed}, the length of the longest sequence, got {longest}")


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of every token to those of its own sequence; the scale is 1 / sqrt(head_dim).

    Args:
        query, key, value: (sum of lengths, heads, head_dim), any strides.
        offsets: (B + 1,) int32 or int64, where each sequence begins, and the sum of lengths ("cu_seqlens"). On a GPU
            they are not checked.
        longest: the length of the longest sequence, or more, where the host knows it; None asks the device.
        backend: "auto", "fused", "portable" or "reference"; see `terrazzo.kernels.use_backend`.

    Returns:
        (sum of lengths, heads, head_dim): what each sequence gives alone.

    Raises:
        InputError: A shape, dtype or offset that the definition does not allow.
        BackendError: `backend` names a form that cannot run here.
    """
    longest = None if longest is None else arguments.whole(longest, "longest", 0)
    _check(query, key, value, offsets, longest)
    _backend.check_name(backend)
    return op.attend(query, key, value, offsets, longest, backend)


def first_weights(query: torch.Tensor, key: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """What the first token of each sequence gives each of its tokens, by head: (sum of lengths, heads).

    That is a row of each matrix of weights, a softmax over the tokens of a sequence, in float32 at least. Standard
    operations on any device, without a loop over sequences.

    Args: as of `varlen_attention`.
    """
    _check(query, key, key, offsets)
    lengths = offsets.diff().long()
    # Which sequence a token is of; the number of tokens is known, so nobody waits for a GPU.
    of = torch.repeat_interleave(torch.arange(len(lengths), device=query.device), lengths, output_size=len(query))
    if not torch.compiler.is_compiling() and not len(query):  # the sequences have no first token
        return (query * key).sum(-1, dtype=torch.promote_types(query.dtype, torch.float32))
    first = query[offsets[:-1].long().clamp(max=len(query) - 1)] * query.shape[-1] ** -0.5
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = (first[of].to(dtype) * key.to(dtype)).sum(-1)
    # Unsafe is without a look at the lengths, for which the host would wait.
    highest = torch.segment_reduce(logits.detach(), "max", lengths=lengths, unsafe=True)
    part = (logits - highest[of]).exp()
    # The sum of segments has no derivative but one gradient; the other one has all, and on a GPU no fixed order.
    if query.device.type == "cpu" or opaque.needs_more():
        return part / part.new_zeros(len(lengths), part.shape[1]).index_add(0, of, part)[of]
    return part / torch.segment_reduce(part, "sum", lengths=lengths, unsafe=True)[of]


def why(backend: str = "auto", query: torch.Tensor | None = None) -> _backend.Choice:
    """Which backend a call would run with now, and why the others were refused.

    Without `query`, for float32 tensors on the default device.
    """
    if query is None:
        return op.choose(backend, torch.get_default_device(), torch.float32, True)
    return op.choose(backend, query.device, query.dtype, attention_host.HEAD_DIM.fits(query.shape[-1]))
