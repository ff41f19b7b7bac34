"""What `mmcv.ops` reports about the compiler of its operators."""

import torch


def get_compiler_version() -> str:
    """Says that no compiler was involved."""
    return "none (PyTorch operators of terrazzo.openmmlab)"


def get_compiling_cuda_version() -> str:
    """The CUDA version of PyTorch, because its operators replace compiled operators."""
    return torch.version.cuda or "not available"
