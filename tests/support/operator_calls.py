"""A small call of every operator, for tests that all operators share."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from terrazzo.kernels import (
    attentive_conv,
    block_sparse_attention,
    grouped_linear,
    neighborhood_attention,
    selective_scan,
    selective_scan_2d,
    softmax_free_attention,
    ssd,
    strip_attention,
    use_backend,
    varlen_attention,
)

token_reduction = importlib.import_module("terrazzo.kernels.token_reduction")
plans = importlib.import_module("terrazzo.kernels.block_sparse_attention")
first_weights = importlib.import_module("terrazzo.kernels.varlen_attention").first_weights


@dataclass(frozen=True)
class OperatorCall:
    """A call of an operator: its tensors by name, and properties that tests need.

    Attributes:
        operator: the name of the op in `torch.ops.terrazzo`.
        weights: names of tensors that have no batch axis.
        constants: a function from the batch size to further arguments.
        opaque: whether the portable form is an opaque op.
        twice: whether it has second derivatives.
    """

    operator: str
    function: Callable
    shapes: dict[str, tuple[int, ...]]
    weights: tuple[str, ...] = ()
    constants: Callable[[int], dict] = lambda batch: {}
    opaque: bool = True
    twice: bool = False

    def tensors(self, batch: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        found = {}
        for name, shape in self.shapes.items():
            shape = shape if name in self.weights else (batch * shape[0], *shape[1:])
            found[name] = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) / 2
            if name == "A":
                found[name] = -found[name].abs()
        return found

    def bound(self, batch: int = 2) -> Callable:
        """A function of the tensors, in their order, that returns one tensor or a tuple of them."""
        constants = self.constants(batch)

        def call(*tensors):
            return self.function(**dict(zip(self.shapes, tensors)), **constants)

        return call


def _merge(x, weight, map, M):
    return token_reduction.merge(x, token_reduction.Plan(map, M), weight)[0]


def _attended(query, key, value):
    return token_reduction.attention(query, key)[1](value)


def _map(batch: int) -> dict:
    return {"map": torch.tensor([[0, 1, 2, 1, 0, 2]]).expand(batch, -1), "M": 3}


def _by_plan(query, key, value, key_bias):
    """Tiles of 3 queries attend to blocks of 2 of the 5 keys, and to single keys with a bias."""
    index = torch.tensor([[[[0, 2], [1, -1]], [[2, 1], [0, 0]]]])
    blocks = plans.Segment("block", index.to(getattr(query, "device", "cpu")))
    tokens = plans.Segment("token", index[:, :1, :1].to(blocks.index.device), bias=key_bias)
    return block_sparse_attention(query, key, value, plans.Plan([blocks, tokens], 3, 2))


def _grouped(x, weight, bias):
    """Two fifths of the rows in the first group, none in the second."""
    rows = len(x) if isinstance(x, torch.Tensor) and x.dim() else 5
    offsets = torch.tensor([0, rows * 2 // 5, rows * 2 // 5, rows], dtype=torch.int32)
    return grouped_linear(x, weight, bias, offsets.to(getattr(x, "device", "cpu")))


def _offsets(batch: int) -> dict:
    """Five tokens for each image, in two sequences of different lengths and an empty sequence."""
    cu_seqlens = [0] + [5 * i + at for i in range(batch) for at in (2, 2, 5)]
    return {"cu_seqlens": torch.tensor(cu_seqlens, dtype=torch.int32)}


_QKV = ("query", "key", "value")
_SEQUENCES = dict(u=(1, 4, 9), delta=(1, 4, 9), A=(4, 3), B=(1, 3, 9), C=(1, 3, 9))
_SOFT = dict(query=(1, 2, 6, 4), value=(1, 2, 6, 4), landmark=(1, 2, 3, 4))
_SSD = dict(x=(1, 7, 4, 3), dt=(1, 7, 4), A=(4,), B=(1, 7, 2, 5), C=(1, 7, 2, 5))
_ATTENTIVE = dict(
    x=(1, 3, 4, 5), value=(1, 3, 4, 5), weight=(3, 3), bias=(3,), mixing=(9, 9), mixing_bias=(9,), inhibition=(3,)
)

CALLS = {
    "attentive_conv": OperatorCall("attentive_conv", attentive_conv, _ATTENTIVE, tuple(_ATTENTIVE)[2:]),
    "block_sparse_attention": OperatorCall(
        "block_sparse_attention", _by_plan, dict.fromkeys(_QKV, (1, 2, 5, 4)) | {"key_bias": (1, 2, 5)}, ("key_bias",)
    ),
    "grouped_linear": OperatorCall(
        "grouped_linear", _grouped, dict(x=(5, 3), weight=(3, 4, 3), bias=(3, 4)), ("weight", "bias")
    ),
    "neighborhood_attention": OperatorCall(
        "neighborhood_attention",
        neighborhood_attention,
        dict.fromkeys(_QKV, (1, 7, 6, 2, 8)) | {"rpb": (2, 5, 5)},
        ("rpb",),
        lambda batch: {"kernel_size": 3, "dilation": (2, 1)},
    ),
    "neighborhood_attention of sequences": OperatorCall(
        "neighborhood_attention",
        neighborhood_attention,
        dict.fromkeys(_QKV, (1, 7, 2, 8)),
        constants=lambda batch: {"kernel_size": 4},
    ),
    "selective_scan": OperatorCall(
        "selective_scan",
        selective_scan,
        _SEQUENCES | dict(D=(4,), z=(1, 4, 9), delta_bias=(4,)),
        ("A", "D", "delta_bias"),
        lambda batch: {"delta_softplus": True},
    ),
    "selective_scan with its last state": OperatorCall(
        "selective_scan",
        selective_scan,
        _SEQUENCES | dict(B=(1, 2, 3, 9), C=(1, 2, 3, 9), D=(4,), delta_bias=(4,)),
        ("A", "D", "delta_bias"),
        lambda batch: {"delta_softplus": True, "reverse": True, "return_last_state": True},
    ),
    "selective_scan_2d": OperatorCall(
        "selective_scan",
        selective_scan_2d,
        dict(u=(1, 3, 4, 2), delta=(1, 3, 4, 4, 2), A=(4, 2, 3), B=(1, 3, 4, 4, 3), C=(1, 3, 4, 4, 3), D=(4, 2)),
        ("A", "D"),
        lambda batch: {"delta_softplus": True},
    ),
    "softmax_free_attention": OperatorCall(
        "softmax_free_attention", softmax_free_attention, _SOFT | dict(key=(1, 2, 6, 4))
    ),
    "softmax_free_attention, normalised": OperatorCall(
        "softmax_free_attention", softmax_free_attention, _SOFT, constants=lambda batch: {"normalised": True}
    ),
    "ssd": OperatorCall(
        "ssd",
        ssd,
        _SSD | dict(D=(4,), z=(1, 7, 4, 3), dt_bias=(4,)),
        ("A", "D", "dt_bias"),
        lambda batch: {"dt_softplus": True, "chunk": 4},
        opaque=False,
        twice=True,
    ),
    "ssd with its last states": OperatorCall(
        "ssd",
        ssd,
        _SSD,
        ("A",),
        lambda batch: {"dt_softplus": True, "reverse": True, "return_final_states": True},
        opaque=False,
        twice=True,
    ),
    "strip_attention": OperatorCall(
        "strip_attention", strip_attention, dict(query=(1, 5, 2), key=(1, 4, 2), value=(1, 4, 2, 3))
    ),
    "varlen_attention": OperatorCall(
        "varlen_attention", varlen_attention, dict.fromkeys(_QKV, (5, 2, 3)), (), _offsets, opaque=False
    ),
    "first_weights": OperatorCall(
        "varlen_attention", first_weights, dict.fromkeys(_QKV[:2], (5, 2, 3)), (), _offsets, opaque=False, twice=True
    ),
    "merge": OperatorCall(
        "token_reduction_pool",
        _merge,
        dict(x=(1, 6, 4)),
        (),
        lambda batch: _map(batch) | {"weight": None},
        opaque=False,
        twice=True,
    ),
    "unmerge": OperatorCall(
        "token_reduction_pool",
        token_reduction.unmerge,
        dict(tokens=(1, 3, 4)),
        (),
        lambda batch: {"map": _map(batch)["map"]},
        opaque=False,
        twice=True,
    ),
    "attention": OperatorCall(
        "token_reduction_weights", _attended, dict.fromkeys(_QKV, (1, 2, 6, 4)), opaque=False, twice=True
    ),
}


def several(out: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def total(out: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A number that depends on all elements of an output, and has a second derivative in each element."""
    return sum((x * x.detach().cos() + x.square() / 3).sum() for x in several(out))


def run_without_batch(name: str, backend: str, dtype: torch.dtype) -> tuple[list, list]:
    """The outputs of a call with an empty batch, and the gradients of all tensors."""
    call = CALLS[name]
    tensors = [x.requires_grad_() for x in call.tensors(0, dtype).values()]
    with use_backend(backend):
        out = several(call.bound(0)(*tensors))
    grads = torch.autograd.grad([x.sum() for x in out], tensors, allow_unused=True)
    return [x.detach() for x in out], list(grads)
