"""Softmax-free attention in Triton: how a call is cut into blocks, and the launches.

The kernels are in fused_kernels.py and fused_newton.py, which import triton; this file does so at the first launch.
Every launch is decided by shapes and types alone, never by timing, so the same call gives the same bits. Products are
IEEE float32 even if the user allowed TF32: rows of the inverse nearly cancel, and Newton's steps double errors.
"""

from dataclasses import dataclass

import torch

from terrazzo.kernels.softmax_free_attention import middle
from terrazzo.kernels.softmax_free_attention.portable import empty_tokens
from terrazzo.kernels.softmax_free_attention.reference import STEPS
from terrazzo.kernels.triton_host.blocks import Blocks
from terrazzo.kernels.triton_host.machine import interpreted, on_device

# The number of programs that fill a large GPU a few times over. With fewer blocks of rows, the others are split.
_PROGRAMS = 512
_LEAST_ROWS = 256
_MOST_LANDMARKS = 64  # a larger matrix does not stay on the chip; PyTorch's products take its steps
PRECISION = "ieee"
CHUNK = 16  # columns and rows of factors that a product of Newton's kernels reads at a time
WARPS = 8  # that work on one matrix


def blocks(kernel: str, head_dim: int) -> Blocks:
    """The blocks of a kernel ("sums", "gradients"): a rule, not an autotuner.

    Found by compiling for compute capabilities 8.0, 9.0 and 10.0 and for gfx942 (README.md), not by timing.
    """
    return Blocks(32, 16 if kernel == "gradients" and head_dim > 64 else 32, 4, 2)


def newton_block(size: int) -> int:
    """The block that holds a matrix of Newton's iteration. Blocks of 32 spill registers."""
    return 16 if size <= 16 else 64


def splits(programs: int, others: int) -> tuple[int, int]:
    """The number of parts into which the others of a block of rows are cut, and the length of a part.

    Args:
        programs: the number of blocks of rows of all images and heads.
    """
    count = max(1, min(_PROGRAMS // programs, others // _LEAST_ROWS))
    length = -(-others // count)
    length = -(-length // 32) * 32  # whole blocks
    return -(-others // length), length


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]


def _packed(x: torch.Tensor) -> torch.Tensor:
    """Tensors of any strides are read in place if their vectors are contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class _Launch:
    """How a kernel runs for the rows of `own`, which take something from `others` rows."""

    kernel: str
    own: torch.Tensor
    others: int

    @property
    def cut(self) -> Blocks:
        return blocks(self.kernel, self.own.shape[3])

    @property
    def parts(self) -> int:
        return -(-self.own.shape[2] // self.cut.queries)

    @property
    def split(self) -> tuple[int, int]:
        return splits(self.own.shape[0] * self.own.shape[1] * self.parts, self.others)

    @property
    def grid(self) -> tuple[int]:
        return (self.own.shape[0] * self.own.shape[1] * self.parts * self.split[0],)

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.own.shape[2], self.others, self.own.shape[1], self.parts, *self.split

    def results(self, like: torch.Tensor) -> torch.Tensor:
        """Fresh results, in front the axis of splits: `like` itself if there is a single split."""
        count = self.split[0]
        if count == 1:
            return like.unsqueeze(0)
        return torch.empty(count, *like.shape, dtype=torch.float32, device=like.device)

    def constants(self, function) -> dict[str, object]:
        constants = self.cut.constants(function, self.own.shape[3], torch.float32)
        return {**constants, "PRECISION": PRECISION}


def _joined(found: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Add up the splits, in float32."""
    return like if found.shape[0] == 1 else like.copy_(found.sum(0))


def _sums(own: torch.Tensor, other: torch.Tensor, vector: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out_i = sum_j w_ij vector_j, into `out`."""
    from terrazzo.kernels.softmax_free_attention import fused_kernels

    own, other, vector = map(_packed, (own, other, vector))
    launch = _Launch("sums", own, other.shape[2])
    found = launch.results(out)
    strides = (*map(_strides, (own, other, vector)), found.stride()[:4])
    with on_device(own.device):
        fused_kernels.sums[launch.grid](
            own, other, vector, found, *launch.lengths, *sum(strides, ()), **launch.constants(fused_kernels.sums)
        )
    return _joined(found, out)


def _gradients(
    own: torch.Tensor,
    mine: torch.Tensor,
    other: torch.Tensor,
    vector: torch.Tensor,
    outs: list[torch.Tensor],
) -> None:
    """The gradient by `own`, into the first of `outs`, and the sums of `_sums` into the second if there is one."""
    from terrazzo.kernels.softmax_free_attention import fused_kernels

    own, mine, other, vector = map(_packed, (own, mine, other, vector))
    launch = _Launch("gradients", own, other.shape[2])
    found = [launch.results(out) for out in outs]
    strides = (*map(_strides, (own, mine, other, vector)), found[0].stride()[:4])
    with on_device(own.device):
        fused_kernels.gradients[launch.grid](
            own,
            mine,
            other,
            vector,
            found[0],
            found[-1],
            *launch.lengths,
            *sum(strides, ()),
            WITH_SUMS=len(outs) > 1,
            **launch.constants(fused_kernels.gradients),
        )
    for parts, out in zip(found, outs):
        _joined(parts, out)


def write(token: torch.Tensor, landmark: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """As `portable.write`."""
    return _sums(landmark, token, value, torch.empty_like(landmark))


def read(token: torch.Tensor, landmark: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `portable.read`."""
    return _sums(token, landmark, rows, empty_tokens(token, dtype))


def gradients(
    token: torch.Tensor, values: torch.Tensor, landmark: torch.Tensor, rows: torch.Tensor, to_tokens: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `portable.gradients`. Deterministic: there are no atomics."""
    by_token = [empty_tokens(token, torch.float32) for _ in range(1 + to_tokens)]
    by_landmark = [torch.empty_like(landmark) for _ in range(2 - to_tokens)]
    _gradients(token, values, landmark, rows, by_token)
    _gradients(landmark, rows, token, values, by_landmark)
    return by_token[0], by_landmark[0], (by_token if to_tokens else by_landmark)[1]


def _constants(function, size: int) -> dict[str, object]:
    own = dict(STEPS=STEPS, BLOCK=newton_block(size), CHUNK=CHUNK)
    return dict(own, PRECISION=PRECISION, INTERPRETED=interpreted(function), num_warps=WARPS, num_stages=1)


def _newton(matrix: torch.Tensor, alpha: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The iteration's result, and the last matrices before it, (slots, B, heads, m, m), in turns."""
    from terrazzo.kernels.softmax_free_attention import fused_newton

    size, count = matrix.shape[3], matrix.shape[0] * matrix.shape[1]
    matrix, alpha = matrix.contiguous(), alpha.expand(*matrix.shape[:2], 1, 1).contiguous()
    path = torch.empty(slots, *matrix.shape, dtype=matrix.dtype, device=matrix.device)
    left, out = torch.empty_like(matrix), torch.empty_like(matrix)
    constants = _constants(fused_newton.newton, size)
    with on_device(matrix.device):
        fused_newton.newton[(count,)](matrix, alpha, path, left, out, size, count, SLOTS=slots, **constants)
    return out, path


def newton(matrix: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """As `middle.newton`."""
    if matrix.shape[3] > _MOST_LANDMARKS:
        return middle.newton(matrix, alpha)
    return _newton(matrix, alpha, 2)[0]


def newton_backward(grad: torch.Tensor, matrix: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `middle.newton_backward`."""
    if matrix.shape[3] > _MOST_LANDMARKS:
        return middle.newton_backward(grad, matrix, alpha)
    from terrazzo.kernels.softmax_free_attention import fused_newton

    _, path = _newton(matrix, alpha, STEPS)
    grad, matrix = grad.contiguous(), matrix.contiguous()
    work = torch.empty(4, *matrix.shape, dtype=matrix.dtype, device=matrix.device)
    found = torch.empty_like(matrix), torch.empty_like(matrix)
    size, count = matrix.shape[3], matrix.shape[0] * matrix.shape[1]
    constants = _constants(fused_newton.newton_backward, size)
    with on_device(matrix.device):
        fused_newton.newton_backward[(count,)](grad, matrix, path, work, *found, size, count, **constants)
    return found
