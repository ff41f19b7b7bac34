"""Whether an exporter is tracing, and which sizes it leaves open. Exported operators consist of standard operations."""

import torch


def is_exporting() -> bool:
    """Whether an exporter is tracing; torch 2.8 and 2.11 say so in `torch.compile`, too.

    Adds `torch.jit.trace` to `torch.compiler.is_exporting`, and with it the older ONNX exporter. Both record the
    operations of one size.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def is_open(length: int) -> bool:
    """Whether an exporter leaves a size open."""
    return isinstance(length, torch.SymInt)


def is_open_from_one(length: int) -> bool:
    """Whether an exporter leaves a size open that is 1 in the example. Most reshapes then treat the size as 1."""
    return isinstance(length, torch.SymInt) and length.node.has_hint() and length.node.hint == 1


# Dynamo evaluates these functions while tracing and does not trace into them. Inside them an open size looks like any
# int, and would silently become fixed. Dynamo refuses a constant that depends on an open size.
is_exporting._dynamo_marked_constant = True
is_open._dynamo_marked_constant = True
is_open_from_one._dynamo_marked_constant = True


def pieces(length: int, size: int) -> int:
    """How many pieces of `size` steps hold `length` steps; one more where an exporter leaves the length open.

    An exporter fixes a size that is 1 in its example, and with a piece more there are at least 2.
    """
    count = (length + size - 1) // size
    return count + 1 if is_exporting() and is_open(length) else count
