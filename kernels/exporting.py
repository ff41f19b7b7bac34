"""Whether an exporter traces, for which operators are made of standard operations."""

import torch


def is_exporting() -> bool:
    """As `torch.compiler.is_exporting`, which torch 2.8 to 2.11 at least take for true in `torch.compile`, too."""
    return torch.compiler.is_exporting()


# Dynamo takes its value when tracing, and does not read what is inside.
is_exporting._dynamo_marked_constant = True
