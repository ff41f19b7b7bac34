"""Attention within sequences of different lengths that are packed one after another (varlen attention)."""

import itertools

import torch

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments, opaque
from terrazzo.kernels.varlen_attention import op

__all__ = ["first_weights", "varlen_attention"]


def _check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int | None = None
) -> None:
    """Raise `InputError` for arguments that the definition does not allow."""
    arguments.check_tensors({"query": query, "key": key, "value": value})
    if query.dim() != 3 or not query.shape == key.shape == value.shape:
        raise InputError(
            "query, key and value must be (sum of lengths, heads, head_dim), all of one shape, "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if arguments.any_empty(*query.shape[1:]):
        raise InputError(f"there must be at least 1 head and a head_dim of at least 1, got {tuple(query.shape)}")
    arguments.check_one_dtype(query=query, key=key, value=value)
    _check_lengths(cu_seqlens, query, max_seqlen)


def _check_lengths(cu_seqlens: torch.Tensor, query: torch.Tensor, max_seqlen: int | None) -> None:
    arguments.check_together({"query": query, "cu_seqlens": cu_seqlens})
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise InputError(
            f"cu_seqlens must be (B + 1,) whole numbers, got {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}"
        )
    # On a GPU they are not checked, since reading them would synchronize.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        found = cu_seqlens.tolist()
        if found[0] != 0 or found[-1] != len(query) or found != sorted(found):
            raise InputError(f"cu_seqlens must rise from 0 to the {len(query)} tokens, got {found}")
        needed = max((end - begin for begin, end in itertools.pairwise(found)), default=0)
        if max_seqlen is not None and max_seqlen < needed:
            raise InputError(
                f"max_seqlen must be at least {needed}, the length of the longest sequence, got {max_seqlen}"
            )


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of every token to the tokens of its sequence; the scale is 1 / sqrt(head_dim).

    Args:
        query, key, value: (sum of lengths, heads, head_dim), any strides.
        cu_seqlens: (B + 1,) int32 or int64, where each sequence begins, and the sum of lengths. Not checked on a GPU.
        max_seqlen: an upper bound of the sequence lengths, if the host knows one; None reads it from the device.
        backend: "auto", "fused", "portable" or "reference"; see `terrazzo.kernels.use_backend`.

    Returns:
        (sum of lengths, heads, head_dim), equal to the attention of each sequence alone.

    Raises:
        InputError: A shape, dtype or offset that the definition does not allow.
        BackendError: `backend` names a form that cannot run here.
    """
    max_seqlen = None if max_seqlen is None else arguments.whole(max_seqlen, "max_seqlen", 0)
    _check(query, key, value, cu_seqlens, max_seqlen)
    return op.run(query, key, value, cu_seqlens, max_seqlen, backend)


def first_weights(query: torch.Tensor, key: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Attention weights of each sequence's first token to all tokens of the sequence: (sum of lengths, heads).

    The result is the first row of each weight matrix, a softmax over the tokens of a sequence, in float32 at least. It
    is computed by standard operations on any device, without a loop over sequences.

    Args: as in `varlen_attention`.
    """
    _check(query, key, key, cu_seqlens)
    lengths = cu_seqlens.diff().long()
    # The sequence of each token. The number of tokens is given, so the host does not wait for a GPU.
    of = torch.repeat_interleave(torch.arange(len(lengths), device=query.device), lengths, output_size=len(query))
    if not torch.compiler.is_compiling() and not len(query):  # the sequences have no first token
        return (query * key).sum(-1, dtype=torch.promote_types(query.dtype, torch.float32))
    first = query[cu_seqlens[:-1].long().clamp(max=len(query) - 1)] * query.shape[-1] ** -0.5
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = (first[of].to(dtype) * key.to(dtype)).sum(-1)
    # unsafe=True skips a check of the lengths, for which the host would wait.
    highest = torch.segment_reduce(logits.detach(), "max", lengths=lengths, unsafe=True)
    part = (logits - highest[of]).exp()
    # segment_reduce has only one gradient. index_add has all derivatives, but on a GPU no fixed order of summation.
    if query.device.type == "cpu" or opaque.needs_more():
        return part / part.new_zeros(len(lengths), part.shape[1]).index_add(0, of, part)[of]
    return part / torch.segment_reduce(part, "sum", lengths=lengths, unsafe=True)[of]
