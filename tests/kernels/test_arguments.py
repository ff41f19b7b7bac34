"""Every operator refuses arguments that it cannot take, with one line that names the argument."""

import importlib
import math

import numpy as np
import pytest
import torch
from support.operator_calls import CALLS, several

from terrazzo.errors import InputError
from terrazzo.kernels import use_backend, varlen_attention

token_reduction = importlib.import_module("terrazzo.kernels.token_reduction")

WRONG = {
    "list": lambda x: x.tolist(),
    "array": lambda x: x.numpy(),
    "number": lambda x: 1.0,
    "ints": lambda x: x.long(),
    "bools": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex128),
    "meta": lambda x: x.to("meta"),
    "0-d": lambda x: x.sum(),
    "another axis": lambda x: x.unsqueeze(0),
    "one more": lambda x: torch.cat([x, x[..., :1]], -1),
}
# Wrong tensors that an operator accepts: a free size, a tensor whose dtype or rank is free, a tensor of a later call.
FREE = {
    "block_sparse_attention": {"value": ("one more",), "key_bias": tuple(WRONG)},
    "merge": {"x": ("one more",)},
    "unmerge": {"tokens": tuple(set(WRONG) - {"list", "array", "number", "meta"})},
    "ssd with its last states": {"x": ("one more",)},
    "strip_attention": {"value": ("one more",)},
    "attention": {"value": tuple(WRONG)},
}
# Tensors that may be None, beside tensors with the same name in several operators.
OPTIONAL = {"attention": FREE["attention"], "grouped_linear": ("bias",), "softmax_free_attention": ("key",)}


def refused(call):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", CALLS)
def test_each_tensor_is_checked(name, wrong):
    call = CALLS[name]
    tensors = call.tensors()
    for changed in tensors:
        if wrong in FREE.get(name, {}).get(changed, ()):
            continue
        arguments = [WRONG[wrong](x) if key == changed else x for key, x in tensors.items()]
        message = refused(lambda arguments=arguments: call.bound()(*arguments))
        if wrong in ("list", "array", "number"):
            assert f"{changed} must be a tensor" in message
        if wrong in ("ints", "bools", "complex"):
            assert f"{changed} must be real numbers" in message
        if wrong == "meta":
            assert "meta" in message


@pytest.mark.parametrize("name", CALLS)
def test_required_tensors_are_not_none(name):
    call = CALLS[name]
    tensors = call.tensors()
    free = {"D", "z", "delta_bias", "dt_bias", "key_bias", "rpb", *OPTIONAL.get(name, ())}
    for changed in tensors.keys() - free:
        arguments = [None if key == changed else x for key, x in tensors.items()]
        assert f"{changed} must be a tensor, got NoneType" in refused(lambda a=arguments: call.bound()(*a))


@pytest.mark.parametrize("name", CALLS)
def test_mixed_dtypes_are_refused_or_computed(name):
    """If an operator accepts parameters of another precision, its result equals the result for float32 inputs."""
    call = CALLS[name]
    tensors = call.tensors(dtype=torch.float32)
    wanted = several(call.bound()(*tensors.values()))
    for changed in tensors:
        arguments = [x.double() if key == changed else x for key, x in tensors.items()]
        try:
            found = several(call.bound()(*arguments))
        except InputError as error:
            found, message = None, str(error)
        if found is None:
            assert "one floating dtype" in message
        else:
            torch.testing.assert_close([x.float() for x in found], list(wanted), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CALLS)
def test_shapes_are_the_same_on_the_meta_device(name, device):
    call = CALLS[name]
    if call.operator in ("token_reduction_pool", "varlen_attention"):
        pytest.skip("the data sets the numbers of tokens")
    found = several(call.bound()(*(x.to(device) for x in call.tensors().values())))
    with use_backend("reference"):
        wanted = several(call.bound()(*call.tensors().values()))
    assert [x.shape for x in found] == [x.shape for x in wanted]


class TestReduction:
    x = torch.randn(3, 9, 4)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"r": "8"}, "r must be an int, got '8'"),
            ({"r": None}, "r must be an int, got None"),
            ({"r": math.nan}, "r must be an int, got nan"),
            ({"r": True}, "r must be an int, got True"),
            ({"protect": -1}, "protect must be 0 to"),
            ({"protect": 1.0}, "protect must be an int"),
            ({"window": 0, "grid": (2, 4)}, "window must be at least 1"),
            ({"window": 2, "grid": 8}, "grid must be rows and columns, got 8"),
            ({"window": 2, "grid": (-2, -4)}, "rows of the grid must be at least 1, got -2"),
            ({"criteria": None}, "criteria must be three numbers"),
            ({"criteria": (1.0, math.nan, 1.0)}, "criteria must be a finite number, got nan"),
            ({"criteria": ("a", 1.0, 1.0)}, "criteria must be a number, got 'a'"),
            ({"size": [1] * 9}, "size must be a tensor, got list"),
            ({"importance": torch.ones(3, 9, device="meta")}, "importance must be on the same device as metric, cpu"),
        ],
    )
    def test_plans(self, change, message):
        found = refused(lambda: token_reduction.plan(**{"metric": self.x, "r": 2, **change}))
        assert message in found

    def test_ints_of_numpy(self):
        found = token_reduction.plan(self.x, r=np.int64(2), protect=np.int32(1))
        assert torch.equal(found.map, token_reduction.plan(self.x, r=2).map)
        assert found.M == 7

    @pytest.mark.parametrize("threshold", [math.nan, torch.tensor(math.nan), torch.full((1, 1), math.nan), "a", None])
    def test_thresholds(self, threshold):
        score, offsets = torch.rand(1, 9), torch.tensor([0, 9], dtype=torch.int32)
        if threshold is not None:
            assert "threshold must be" in refused(lambda: token_reduction.prune(self.x[:1], score, threshold=threshold))
        assert "threshold must be" in refused(
            lambda: token_reduction.prune_packed(self.x[0], score[0], threshold, offsets)
        )

    def test_others(self):
        score = torch.rand(3, 9)
        assert "score" in refused(lambda: token_reduction.prune(self.x, score[:, :8], k=2))
        assert "k must be an int, got 2.0" in refused(lambda: token_reduction.prune(self.x, score, k=2.0))
        assert "a Plan" in refused(lambda: token_reduction.merge(self.x, token_reduction.plan(self.x, r=2).map))


class TestSequences:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"cu_seqlens": [0, 5]}, "cu_seqlens must be a tensor, got list"),
            ({"cu_seqlens": torch.tensor(5)}, "cu_seqlens must be (B + 1,)"),
            ({"cu_seqlens": torch.tensor([False, True])}, "whole numbers"),
            ({"max_seqlen": -1}, "max_seqlen must be at least 0"),
            ({"max_seqlen": 2.5}, "max_seqlen must be an int"),
            ({"max_seqlen": 3}, "max_seqlen must be at least 5"),
        ],
    )
    def test_cu_seqlens(self, change, message):
        x = torch.randn(5, 2, 3)
        found = refused(
            lambda: varlen_attention(
                **{**dict.fromkeys(("query", "key", "value"), x), "cu_seqlens": torch.tensor([0, 5]), **change}
            )
        )
        assert message in found
