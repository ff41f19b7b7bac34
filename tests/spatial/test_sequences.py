"""Scans and attention over ranks equal one process in float64: values, and all gradients."""

import pytest
import torch
import torch.nn.functional as F
from support.shared_rows import assert_same

from terrazzo import kernels
from terrazzo.spatial import LocalGroup, Part, _attention, _scans

COUNTS = ((5, 4), (1, 7, 3), (3, 1, 2, 4, 2))


def tensors(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def check(whole, local, shared, common, counts, dim):
    """Compare `whole(**inputs)` with `local(part, **inputs)`, whose tensors `shared` are cut in dimension `dims[name]`.

    Args:
        shared: For each tensor that is cut, its dimension.
        common: Names of tensors that all ranks have.
        dim: The dimension of the result that is cut.
    """
    results = []
    for over_ranks in (False, True):
        given = {
            name: x.clone().requires_grad_() for name, x in {**common, **{n: x for n, (x, _) in shared.items()}}.items()
        }
        if over_ranks:
            pieces = {name: given[name].split(counts, at) for name, (_, at) in shared.items()}

            def run(group, given=given, pieces=pieces):
                part = Part(group, 32 * group.size, 32)
                own = {name: found[group.rank] for name, found in pieces.items()}
                return local(part, **{**given, **own})

            out = torch.cat(LocalGroup(len(counts)).run(run), dim)
        else:
            out = whole(**given)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        (out * weight + out.square() * 0.1).sum().backward()
        results.append({"results": out.detach(), **{f"gradients of {name}": x.grad for name, x in given.items()}})
    for name, wanted in results[0].items():
        assert_same(results[1][name], wanted, name)


def scan_inputs(length, channels=4, states=3, groups=2):
    x = tensors(
        u=(2, channels, length),
        delta=(2, channels, length),
        A=(channels, states),
        B=(2, groups, states, length),
        C=(2, groups, states, length),
        D=(channels,),
        z=(2, channels, length),
        delta_bias=(channels,),
    )
    x["A"] = -x["A"].exp()
    shared = {name: (x[name], x[name].dim() - 1) for name in ("u", "delta", "B", "C", "z")}
    return shared, {name: x[name] for name in ("A", "D", "delta_bias")}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_selective_scan(counts, reverse):
    options = dict(delta_softplus=True, reverse=reverse, backend="reference")
    shared, common = scan_inputs(sum(counts))
    check(
        lambda **x: kernels.selective_scan(**x, **options),
        lambda part, **x: _scans.selective_scan(part, **x, **options),
        shared,
        common,
        counts,
        2,
    )


def ssd_inputs(length):
    x = tensors(
        x=(2, length, 4, 3),
        dt=(2, length, 4),
        A=(4,),
        B=(2, length, 2, 5),
        C=(2, length, 2, 5),
        D=(4,),
        z=(2, length, 4, 3),
        dt_bias=(4,),
    )
    x["A"] = -x["A"].exp()
    return {name: (x[name], 1) for name in ("x", "dt", "B", "C", "z")}, {
        name: x[name] for name in ("A", "D", "dt_bias")
    }


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_ssd(counts, reverse):
    options = dict(dt_softplus=True, reverse=reverse, backend="portable")
    shared, common = ssd_inputs(sum(counts))
    check(
        lambda **x: kernels.ssd(**x, **options),
        lambda part, **x: _scans.ssd(part, **x, **options),
        shared,
        common,
        counts,
        1,
    )


def scan_2d_inputs(height, width, separate, states):
    scans, channels = 4, 3
    x = tensors(
        u=(2, height, width, scans, channels) if separate else (2, height, width, channels),
        delta=(2, height, width, scans, channels),
        A=(scans, channels, states),
        B=(2, height, width, scans, states),
        C=(2, height, width, scans, states),
        D=(scans, channels),
        delta_bias=(scans, channels),
    )
    x["A"] = -x["A"].exp()
    return x


def scan_2d(size, separate=False, states=3):
    """Compare the cross-scan of a map."""
    height, width, ranks, stride = size
    inputs = scan_2d_inputs(height, width, separate, states)
    options = dict(delta_softplus=True, backend="reference")
    results = []
    for over_ranks in (False, True):
        given = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        if over_ranks:

            def run(group, given=given):
                part = Part(group, height, width, stride)
                start, end = part.image.rows[group.rank]
                cut = {name: given[name][:, start:end] for name in ("u", "delta", "B", "C")}
                return _scans.selective_scan_2d(part, lambda: tuple({**given, **cut}.values()), **options)

            out = torch.cat(LocalGroup(ranks).run(run), 1)
        else:
            out = kernels.selective_scan_2d(**given, **options)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        (out * weight).sum().backward()
        results.append({"results": out.detach(), **{f"gradients of {name}": x.grad for name, x in given.items()}})
    for name, wanted in results[0].items():
        assert_same(results[1][name], wanted, name)


@pytest.mark.parametrize("size", [(6, 5, 2, 2), (7, 3, 3, 1), (5, 9, 5, 1)], ids=str)
def test_scans_of_a_map(size):
    scan_2d(size, separate=size[2] == 3, states=1 if size[2] == 2 else 4)


def test_a_dropped_state_is_found(monkeypatch):
    monkeypatch.setattr(_scans, "_entering", lambda found, own, reverse: torch.zeros_like(found[0, 0]))
    for test in (test_selective_scan, test_ssd):
        with pytest.raises(AssertionError, match="differ"):
            test(COUNTS[1], False)
    with pytest.raises(AssertionError, match="differ"):
        scan_2d((6, 5, 2, 2))


def attention_inputs(length, width=5):
    x = tensors(query=(2, 3, length, width), key=(2, 3, length, width), value=(2, 3, length, 4))
    return {name: (x[name], 2) for name in x}


def check_attention(counts):
    check(
        lambda query, key, value: F.scaled_dot_product_attention(query, key, value, scale=0.7),
        lambda part, **x: _attention.attention(part, **x, counts=counts, scale=0.7),
        attention_inputs(sum(counts)),
        {},
        counts,
        2,
    )


@pytest.mark.parametrize("ranks_at_once", [0, 4])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_softmax_attention(counts, ranks_at_once, monkeypatch):
    monkeypatch.setattr(_attention, "FEW", ranks_at_once)
    monkeypatch.setattr(_attention, "QUERIES", 2)
    check_attention(counts)


def test_a_softmax_that_is_not_merged_is_found(monkeypatch):
    monkeypatch.setattr(_attention, "FEW", 0)
    monkeypatch.setattr(torch, "logaddexp", torch.maximum)
    with pytest.raises(AssertionError, match="differ"):
        check_attention(COUNTS[1])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_gradients_of_the_second_ring(counts, monkeypatch):
    """The fast backward pass, which processes use, called by each rank."""
    monkeypatch.setattr(_attention, "QUERIES", 2)
    leaves = {name: x.requires_grad_() for name, (x, _) in attention_inputs(sum(counts)).items()}
    wanted = F.scaled_dot_product_attention(*leaves.values(), scale=0.7)
    grad = torch.linspace(-1, 1, wanted.numel(), dtype=wanted.dtype).view(wanted.shape)
    wanted.backward(grad)
    cut = {name: x.detach().split(counts, 2) for name, x in {**leaves, "grad": grad}.items()}

    def run(group):
        part = Part(group, 32 * group.size, 32)
        own = {name: found[group.rank] for name, found in cut.items()}
        given = (own["query"], own["key"], own["value"])
        out, log = _attention.ring(part, *given, counts, 0.7)
        return _attention.ring_gradients(part, own["grad"], *given, out, log, counts, 0.7)

    for i, (name, leaf) in enumerate(leaves.items()):
        found = torch.cat([grads[i] for grads in LocalGroup(len(counts)).run(run)], 2)
        assert_same(found, leaf.grad, f"gradients of {name}")


def linear(query, key, value):
    weights = query @ key.transpose(2, 3)
    return weights @ value / weights.sum(3, keepdim=True)


def check_linear(counts):
    shared = {name: (x.exp() if name != "value" else x, at) for name, (x, at) in attention_inputs(sum(counts)).items()}
    check(linear, lambda part, **x: _attention.linear_attention(part, **x), shared, {}, counts, 2)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_linear_attention(counts):
    check_linear(counts)


def test_a_missing_sum_of_linear_attention_is_found(monkeypatch):
    monkeypatch.setattr(Part, "total", lambda self, x: x)
    with pytest.raises(AssertionError, match="differ"):
        check_linear(COUNTS[0])
