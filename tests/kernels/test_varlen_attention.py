"""Attention within sequences: all forms, one sequence compared with many, gradients, errors."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from terrazzo.errors import BackendError, InputError
from terrazzo.kernels import varlen_attention
from terrazzo.kernels.varlen_attention import first_weights

LENGTHS = (5, 1, 9, 5, 0, 2)


def inputs(lengths=LENGTHS, heads=2, dim=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(sum(lengths), heads, dim, dtype=dtype, generator=generator) for _ in range(3)]
    return tensors, torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("backend", ["portable", "reference"])
class TestForms:
    def test_a_sequence_is_what_it_is_alone(self, backend):
        """Each sequence's result equals PyTorch's attention of this sequence alone."""
        tensors, cu_seqlens = inputs()
        found = varlen_attention(*tensors, cu_seqlens, backend=backend)
        for begin, end in zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist()):
            q, k, v = (x[begin:end].transpose(0, 1) for x in tensors)
            wanted = F.scaled_dot_product_attention(q, k, v).transpose(0, 1)
            torch.testing.assert_close(found[begin:end], wanted, rtol=0, atol=1e-14)

    def test_gradients(self, backend):
        tensors, cu_seqlens = inputs((3, 1, 3))
        tensors = [x.requires_grad_() for x in tensors]
        assert torch.autograd.gradcheck(lambda *x: varlen_attention(*x, cu_seqlens, backend=backend), tensors)

    @pytest.mark.parametrize("lengths", [(), (0,)])
    def test_nothing_to_do(self, backend, lengths):
        tensors, cu_seqlens = inputs(lengths)
        assert varlen_attention(*tensors, cu_seqlens, backend=backend).shape == (0, 2, 4)


class TestFirstWeights:
    def test_definition(self):
        (q, k, _), cu_seqlens = inputs()
        found = first_weights(q, k, cu_seqlens)
        for begin, end in zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist()):
            if begin < end:
                wanted = (torch.einsum("hd,thd->th", q[begin], k[begin:end]) / 2).softmax(0)
                torch.testing.assert_close(found[begin:end], wanted, rtol=0, atol=1e-14)

    def test_large_scores_and_half_precision(self):
        (q, k, _), cu_seqlens = inputs(dtype=torch.float32)
        found = first_weights(q.bfloat16() * 300, k.bfloat16() * 300, cu_seqlens)
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        wanted = first_weights(q.bfloat16().double() * 300, k.bfloat16().double() * 300, cu_seqlens)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=5e-2)

    def test_gradients(self):
        (q, k, _), cu_seqlens = inputs((3, 1, 4))
        assert torch.autograd.gradcheck(
            lambda *x: first_weights(*x, cu_seqlens), [q.requires_grad_(), k.requires_grad_()]
        )


class TestOperator:
    def test_backends(self):
        tensors, cu_seqlens = inputs()
        with pytest.raises(BackendError, match="varlen_attention: backend 'fused'"):
            varlen_attention(*tensors, cu_seqlens, backend="fused")
        operator = importlib.import_module("terrazzo.kernels.varlen_attention.op").OPERATOR
        assert operator.why("auto", *tensors).name == "portable"
        described = operator.describe(*tensors, cu_seqlens, 9)
        assert described.shape == {"B": 6, "tokens": 22, "max_seqlen": 9, "heads": 2, "dim": 4}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(key=torch.zeros(22, 2, 3)), "all of one shape"),
            (dict(query=torch.zeros(22, 2, 4)), "one floating dtype"),
            (dict(cu_seqlens=torch.tensor([0.0, 22.0])), "whole numbers"),
            (dict(cu_seqlens=torch.tensor([[0, 22]])), "whole numbers"),
            (dict(cu_seqlens=torch.tensor([0, 21])), "from 0 to the 22 tokens, got"),
            (dict(cu_seqlens=torch.tensor([1, 22])), "from 0 to the 22 tokens"),
            (dict(cu_seqlens=torch.tensor([0, 9, 5, 22])), "from 0 to the 22 tokens"),
            (dict(cu_seqlens=torch.tensor([0, 22], device="meta")), "on the same device as query, cpu"),
            (dict(backend="cuda"), "not one of"),
        ],
    )
    def test_errors(self, change, message):
        tensors, cu_seqlens = inputs()
        arguments = dict(zip(("query", "key", "value"), tensors), cu_seqlens=cu_seqlens)
        with pytest.raises(InputError, match=message):
            varlen_attention(**{**arguments, **change})
