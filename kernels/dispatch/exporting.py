"""Whether an exporter traces, for which operators are made of standard operations, and what it leaves open."""

import torch


def is_exporting() -> bool:
    """As `torch.compiler.is_exporting`, which torch 2.8 and 2.11 take for true in `torch.compile`, too.

    Also where `torch.jit.trace` runs, and so the older ONNX exporter: both write down what they see at one size.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def is_open(length: int) -> bool:
    """Whether an exporter leaves a number open."""
    return isinstance(length, torch.SymInt)


def is_open_from_one(length: int) -> bool:
    """Whether an exporter leaves a number open that is 1 in its example. torch then takes it for 1 in most reshapes."""
    return isinstance(length, torch.SymInt) and length.node.has_hint() and length.node.hint == 1


# Dynamo takes their values when tracing, and does not read what is inside: there an open number is an int like others,
# and would be fixed silently. A constant that depends on an open number it refuses.
is_exporting._dynamo_marked_constant = True
is_open._dynamo_marked_constant = True
is_open_from_one._dynamo_marked_constant = True
