"""The selective scan: its definition by hand and by other formulas, its portable form, and the operator."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.triton_common import poisoned

from terrazzo.errors import BackendError, InputError
from terrazzo.kernels import selective_scan, selective_scan_2d, use_backend
from terrazzo.kernels.selective_scan import orders as scan_orders
from terrazzo.kernels.selective_scan.orders import CROSS, ORDERS

portable = importlib.import_module("terrazzo.kernels.selective_scan.portable")
NAMES = ("out", "u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def sequences(
    batch=2, channels=6, length=5, states=3, groups=1, extras=True, softplus=True, dtype=torch.float64, seed=0
):
    """u, delta, A, B, C, D, z and delta_bias that require gradients; decays are at most 1, also without softplus."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    given = [
        draw(batch, channels, length),
        draw(batch, channels, length) if softplus else draw(batch, channels, length).abs() / 3,
        -3 * draw(channels, states).abs(),
        draw(batch, groups, states, length),
        draw(batch, groups, states, length),
        draw(channels) if extras else None,
        draw(batch, channels, length) if extras else None,
        draw(channels) * (1 if softplus else 0) if extras else None,
    ]
    return [None if x is None else x.to(dtype).requires_grad_() for x in given]


def maps(batch=2, height=5, width=7, channels=6, states=3, scans=4, shared=True, dtype=torch.float64):
    """u, delta, A, B, C, D, delta_bias of `selective_scan_2d`."""
    generator = torch.Generator().manual_seed(0)
    size = (batch, height, width)
    shapes = [
        (*size, channels) if shared else (*size, scans, channels),
        (*size, scans, channels),
        (scans, channels, states),
        (*size, scans, states),
        (*size, scans, states),
        (scans, channels),
        (scans, channels),
    ]
    found = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    found[2] = -found[2].abs()
    return [x.to(dtype).requires_grad_() for x in found]


def run(arguments, backend, function=selective_scan, **options):
    """The output and all gradients."""
    out = function(*arguments, backend=backend, **options)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, [x for x in arguments if x is not None], grad)]


def assert_all_close(found, wanted, **tolerance):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, **tolerance)


def simple(u, delta, A, **options):
    """One channel with B = C = 1."""
    u, delta = (torch.tensor(x, dtype=torch.float64)[None, None] for x in (u, delta))
    A = torch.tensor(A, dtype=torch.float64)[None]
    ones = torch.ones(1, A.shape[1], u.shape[2], dtype=torch.float64)
    return selective_scan(u, delta, A, ones, ones, **options)[0, 0].tolist()


@pytest.mark.parametrize("backend", ["reference", "portable"])
class TestByHand:
    @pytest.mark.parametrize(
        ("u", "delta", "A", "wanted"),
        [
            ((1, 2, 3), (1, 1, 1), [0.0], (1, 3, 6)),
            ((1, 1, 1), (1, 1, 1), [-math.log(2)], (1, 1.5, 1.75)),
            ((1, 5, 1), (1, 0, 1), [-math.log(2)], (1, 1, 1.5)),  # a step of size 0 holds the state
            ((1, 2, 3), (1, 1, 1), [-1e4], (1, 2, 3)),
        ],
    )
    def test_sequences(self, backend, u, delta, A, wanted):
        assert simple(u, delta, A, backend=backend) == pytest.approx(wanted)
        backwards = simple(u[::-1], delta[::-1], A, reverse=True, backend=backend)
        assert backwards[::-1] == pytest.approx(wanted)

    def test_bias_softplus_and_skip(self, backend):
        one = torch.ones(1, dtype=torch.float64)
        options = dict(D=10 * one, delta_bias=one * math.log(math.e - 1), delta_softplus=True)
        assert simple((1, 1), (0, 0), [0.0, -math.log(2)], backend=backend, **options) == pytest.approx((12, 13.5))

    def test_map(self, backend):
        """The prefix sums of 1 to 6 on a 2 x 3 map, by rows, by columns, and both reversed."""
        ones = torch.ones(1, 2, 3, 4, 1, dtype=torch.float64)
        u, A = torch.arange(1.0, 7, dtype=torch.float64).reshape(1, 2, 3, 1), ones.new_zeros(4, 1, 1)
        wanted = {
            "rows": [[1, 3, 6], [10, 15, 21]],
            "columns": [[1, 7, 15], [5, 12, 21]],
            "rows_reversed": [[21, 20, 18], [15, 11, 6]],
            "columns_reversed": [[21, 16, 9], [20, 14, 6]],
        }
        for order, sums in wanted.items():
            one = ones[:, :, :, :1]
            found = selective_scan_2d(u, one, A[:1], one, one, orders=(order,), backend=backend)
            assert found[0, ..., 0].tolist() == sums, order
        found = selective_scan_2d(u, ones, A, ones, ones, backend=backend)
        assert found[0, ..., 0].tolist() == [[44, 46, 48], [50, 52, 54]]

    def test_steps_of_no_size(self, backend):
        u, delta, A, B, C, D, *_ = sequences()
        found = selective_scan(u, torch.zeros_like(delta), A, B, C, D, backend=backend)
        torch.testing.assert_close(found, D[:, None] * u)


class TestDefinition:
    def test_is_a_lower_triangular_matrix(self):
        u, delta, A, B, C, *_ = sequences(1, 1, 7, 3, extras=False)
        step = F.softplus(delta)[0, 0]
        total = step.cumsum(0)
        lower = torch.tril(torch.ones(7, 7, dtype=torch.bool))
        decay = torch.where(lower[..., None], torch.exp((total[:, None] - total[None, :])[..., None] * A[0]), 0)
        matrix = torch.einsum("nt,tsn,ns,s->ts", C[0, 0], decay, B[0, 0], step)
        found = selective_scan(u, delta, A, B, C, delta_softplus=True, backend="reference")
        torch.testing.assert_close(found[0, 0], matrix @ u[0, 0], rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("backend", ["reference", "portable"])
    def test_gradients(self, backend):
        def scan(*given):
            return selective_scan(*given, delta_softplus=True, backend=backend)

        assert torch.autograd.gradcheck(scan, sequences(1, 4, 5, 2, groups=2), fast_mode=True)

    def test_groups_are_scans_of_their_own(self):
        u, delta, A, B, C, D, z, bias = sequences(2, 6, 9, 3, groups=2)
        whole = selective_scan(u, delta, A, B, C, D, z, bias, True, backend="reference")
        for group, part in enumerate((slice(0, 3), slice(3, 6))):
            found = selective_scan(
                u[:, part], delta[:, part], A[part], B[:, group], C[:, group], D[part], z[:, part], bias[part], True,
                backend="reference",
            )  # fmt: skip
            torch.testing.assert_close(found, whole[:, part])

    @pytest.mark.parametrize("order", ORDERS)
    def test_orders_are_permutations(self, order):
        """Step t of an order reads pixel t of the map, if the map is turned so that the order is by rows."""
        (code,) = scan_orders.codes((order,))
        pixels = torch.arange(35).reshape(5, 7)
        turned = pixels.T if order.startswith("columns") else pixels
        wanted = turned.flip(0, 1) if order.endswith("reversed") else turned
        assert scan_orders.pixels(code, torch.arange(35), 35, 7).tolist() == wanted.flatten().tolist()

    @pytest.mark.parametrize("backend", ["reference", "portable"])
    def test_turned_maps(self, backend):
        """If both axes are flipped, each order becomes its reverse; if a map is transposed, rows become columns."""
        u, delta, A, B, C, D, bias = maps()
        wanted = selective_scan_2d(u, delta, A, B, C, D, bias, True, backend=backend)
        for orders, turn in (
            (("rows_reversed", "columns_reversed", "rows", "columns"), lambda x: x.flip(1, 2)),
            (("columns", "rows", "columns_reversed", "rows_reversed"), lambda x: x.transpose(1, 2)),
        ):
            turned = [turn(x) for x in (u, delta, B, C)]
            found = selective_scan_2d(*turned[:2], A, *turned[2:], D, bias, True, orders, backend=backend)
            torch.testing.assert_close(turn(found), wanted)


SIZES = [  # batch, channels, length, states, groups
    (1, 1, 1, 1, 1),
    (2, 6, 2, 3, 2),
    (1, 70, 49, 16, 1),
    (3, 4, 63, 5, 4),
    (1, 8, 64, 1, 1),
    (2, 3, 65, 8, 1),
    (1, 130, 129, 4, 1),
    (1, 2, 700, 64, 1),
]
# The numbers of state in a piece and in a step: the defaults; single steps; some runs; everything split.
CUTS = [(1 << 19, 1 << 14), (1 << 19, 1), (1 << 12, 1 << 9), (1, 1 << 14)]


class TestPortable:
    @pytest.mark.parametrize("cut", CUTS, ids=str)
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_float64(self, monkeypatch, size, cut):
        monkeypatch.setattr(portable, "_PIECE", cut[0])
        monkeypatch.setattr(portable, "_STEP", cut[1])
        for reverse, extras, softplus in ((False, True, True), (True, False, False), (True, True, False)):
            arguments = sequences(*size, extras=extras, softplus=softplus)
            options = dict(delta_softplus=softplus, reverse=reverse)
            with poisoned():
                found = run(arguments, "portable", **options)
            assert_all_close(found, run(arguments, "reference", **options), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("cut", CUTS, ids=str)
    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("orders", [CROSS, ("columns_reversed",), ("rows", "rows_reversed"), ("columns",) * 3])
    def test_maps(self, monkeypatch, orders, shared, cut):
        monkeypatch.setattr(portable, "_PIECE", cut[0])
        monkeypatch.setattr(portable, "_STEP", cut[1])
        arguments = maps(2, 9, 13, 5, 2, len(orders), shared)
        options = dict(function=selective_scan_2d, delta_softplus=True, orders=orders)
        with poisoned():
            found = run(arguments, "portable", **options)
        assert_all_close(found, run(arguments, "reference", **options), rtol=1e-9, atol=1e-9)

    def test_parts_of_channels(self, monkeypatch):
        """There are enough channels for several parts, and the parts' gradients of B and C add up."""
        arguments = maps(2, 3, 5, 160, 60, 2)
        parts, cut = [], portable._parts
        monkeypatch.setattr(portable, "_parts", lambda call: parts.extend(cut(call)) or cut(call))
        options = dict(function=selective_scan_2d, delta_softplus=True, orders=("rows", "columns"))
        assert_all_close(run(arguments, "portable", **options), run(arguments, "reference", **options))
        assert len({channels.start for _, _, channels in parts}) > 1

    @settings(max_examples=25, deadline=None)
    @given(
        st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 150), st.integers(1, 5)),
        st.booleans(),
        st.booleans(),
    )
    def test_any_size(self, size, reverse, extras):
        arguments = sequences(*size, extras=extras)
        options = dict(delta_softplus=True, reverse=reverse)
        found = run(arguments, "portable", **options)
        assert_all_close(found, run(arguments, "reference", **options), rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_error_is_no_worse_than_plain_pytorch(self, dtype):
        """The error is at most twice the definition's error; the definition also computes in float32."""
        arguments = sequences(2, 20, 200, 8, dtype=dtype)
        wanted = run([x.detach().double().requires_grad_() for x in arguments], "reference", delta_softplus=True)
        plain, found = (run(arguments, form, delta_softplus=True) for form in ("reference", "portable"))
        for name, e, p, f in zip(NAMES, wanted, plain, found):
            assert f.dtype == p.dtype
            error, limit = ((x.double() - e).square().mean().sqrt() for x in (f, p))
            assert error <= 2 * limit, f"{name}: {error:.2e} against {limit:.2e}"

    @pytest.mark.parametrize("length", [4096, pytest.param(65536, marks=pytest.mark.slow)])
    def test_strong_decays(self, length):
        """With step sizes up to 30 and decays down to exp(-16 x 30), nothing overflows; float32 is exact to 1e-6."""
        generator = torch.Generator().manual_seed(0)
        u, delta = (torch.randn(1, 4, length, generator=generator) for _ in range(2))
        B, C = (torch.randn(1, 16, length, generator=generator) for _ in range(2))
        A = -torch.arange(1.0, 17).repeat(4, 1)
        found = selective_scan(u, 8 * delta, A, B, C, delta_softplus=True)
        wanted = selective_scan(*(x.double() for x in (u, 8 * delta, A, B, C)), delta_softplus=True)
        assert found.isfinite().all()
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()

    def test_half_precision_is_summed_in_float32(self):
        """The output has the dtype of u; over a map it is float32, because a sum of scans may leave float16's range."""
        assert selective_scan(*sequences(dtype=torch.float16), delta_softplus=True).dtype == torch.float16
        arguments = maps(dtype=torch.float16)
        arguments[0] = torch.full_like(arguments[0], 6e4)
        arguments[5] = torch.ones_like(arguments[5])
        found = selective_scan_2d(*arguments, delta_softplus=True)
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        assert found.abs().max() > torch.finfo(torch.float16).max

    def test_mixed_dtypes(self):
        """Half precision with float32 parameters, as under autocast."""
        arguments = sequences(dtype=torch.float32)
        mixed = [x.detach().to(torch.bfloat16 if i in (0, 1, 3, 4) else x.dtype) for i, x in enumerate(arguments)]
        mixed = [x.requires_grad_() for x in mixed]
        plain, found = (run(mixed, form, delta_softplus=True) for form in ("reference", "portable"))
        assert [x.dtype for x in found] == [x.dtype for x in plain] == [torch.bfloat16, *(x.dtype for x in mixed)]
        assert_all_close(found, plain, rtol=2e-2, atol=2e-2)

    def test_nothing_to_do(self):
        found = run(sequences(0, 3, 5, 2), "portable", delta_softplus=True)
        assert found[0].shape == (0, 3, 5)
        assert not any(x.any() for x in found)

    @pytest.mark.parametrize("broken", ["wholes", "scan_back", "take"])
    def test_mutation(self, monkeypatch, broken):
        """Mistakes change results: a decay of 1 between runs, gradients without later steps, a wrong reversed order."""
        arguments = sequences(1, 4, 200, 2)
        options = dict(delta_softplus=True, reverse=True)
        wanted = run(arguments, "reference", **options)
        part = portable._Part
        changes = {
            "wholes": lambda self, dt: torch.ones_like(part_wholes(self, dt)),
            "scan_back": lambda self, dt, dy, C, after: part_scan_back(self, dt, dy, C, after * 0),
            "take": lambda self, x, first, *rest: part_take(self, x, first, *rest).flip(0),
        }
        part_wholes, part_scan_back, part_take = part.wholes, part.scan_back, part.take
        monkeypatch.setattr(part, broken, changes[broken])
        monkeypatch.setattr(portable, "_PIECE", 1024)
        found = run(arguments, "portable", **options)
        assert not all(torch.allclose(a, b) for a, b in zip(found, wanted))


class TestOperator:
    @pytest.mark.parametrize("extras", [True, False])
    def test_opcheck(self, extras):
        """The op's fake form and its gradient meet the rules of PyTorch's compiler."""
        u, delta, A, B, C, D, z, bias = sequences(2, 4, 9, 2, extras=extras)
        of_maps = [None if x is None else x.transpose(1, 2).unsqueeze(2) for x in (u, delta, z)]
        of_states = [x.permute(0, 3, 1, 2) for x in (B, C)]
        of_channels = [None if x is None else x.unsqueeze(0) for x in (A, D, bias)]
        for merge in (False, True) if not extras else (False,):
            given = (*of_maps[:2], of_channels[0], *of_states, of_channels[1], of_maps[2], of_channels[2])
            torch.library.opcheck(torch.ops.terrazzo.selective_scan.default, (*given, True, [2], 9, merge, "portable"))

    @pytest.mark.long
    def test_compiles_without_a_break(self):
        compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager", dynamic=True)
        for length in (30, 41):
            arguments = sequences(2, 4, length, 3)
            found = compiled(*arguments, delta_softplus=True)
            torch.testing.assert_close(found, selective_scan(*arguments, delta_softplus=True))
        compiled = torch.compile(selective_scan_2d, fullgraph=True, backend="aot_eager", dynamic=True)
        for size in ((5, 7), (8, 3)):
            arguments = maps(1, *size)
            torch.testing.assert_close(compiled(*arguments), selective_scan_2d(*arguments))

    def test_flop_formula(self):
        from torch.utils.flop_counter import FlopCounterMode

        arguments = [x.detach().to("meta").requires_grad_() for x in maps(2, 5, 7, 6, 3, 4)]
        with FlopCounterMode(display=False) as counter:
            out = selective_scan_2d(*arguments)
        forward = 2 * 9 * 2 * 35 * 4 * 6 * 3
        assert counter.get_total_flops() == forward
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 3 * forward

    def test_backends(self, monkeypatch):
        arguments = sequences(dtype=torch.float32)
        # On every machine, the portable form is the fastest without Numba.
        machine = importlib.import_module("terrazzo.kernels.numba_host.machine")
        monkeypatch.setattr(machine, "has_numba", lambda: False)
        with pytest.raises(BackendError, match=r"selective_scan: backend 'fused'.*needs the package numba"):
            selective_scan(*arguments, backend="fused")
        why = importlib.import_module("terrazzo.kernels.selective_scan.op").OPERATOR.why
        assert why("auto", *arguments).name == "portable"
        assert "fused" in why("auto", *arguments).reasons
        with use_backend("reference"):
            assert why("auto", *arguments).name == "reference"
        monkeypatch.setenv("TERRAZZO_BACKEND", "fused")
        with pytest.raises(BackendError, match="TERRAZZO_BACKEND"):
            selective_scan(*arguments)

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
    def test_two_hundred_steps_of_mixed_precision_training(self, dtype):
        """All losses, gradients and weights stay finite, and the loss falls."""
        torch.manual_seed(0)
        weights = [(torch.randn(8, 8) / 3).requires_grad_() for _ in range(3)]
        A_log = torch.arange(1.0, 5).log().repeat(8, 1).requires_grad_()
        x = torch.randn(4, 8, 70)
        target = x.cumsum(-1) / 10
        optimizer = torch.optim.AdamW([*weights, A_log], 1e-2)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        losses = []
        for _ in range(200):
            with torch.autocast("cpu", dtype):
                rows = x.transpose(1, 2)
                u, delta, states = (rows @ weight for weight in weights)
                B, C = states.chunk(2, -1)
                out = selective_scan(
                    u.transpose(1, 2), delta.transpose(1, 2), -A_log.exp(), B.transpose(1, 2), C.transpose(1, 2),
                    delta_softplus=True,
                )  # fmt: skip
                loss = (out.float() - target).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            assert math.isfinite(losses[-1])
            assert all(x.isfinite().all() for x in (*weights, A_log))
        assert losses[-1] < losses[0] / 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"u": torch.zeros(2, 6)}, r"u must be \(B, D, L\)"),
            ({"u": torch.zeros(2, 6, 0)}, "L at least 1"),
            ({"delta": torch.zeros(2, 6, 4)}, r"delta must be \(2, 6, 5\)"),
            ({"A": torch.zeros(6, 0)}, "N at least 1"),
            ({"A": torch.zeros(5, 3)}, r"A must be \(6, 3\)"),
            ({"B": torch.zeros(2, 4, 5)}, r"B must be \(2, 1, 3, 5\) or \(2, 3, 5\)"),
            ({"B": torch.zeros(2, 4, 3, 5)}, "do not divide into the 4 groups"),
            ({"C": torch.zeros(2, 2, 3, 5)}, "C must be"),
            ({"D": torch.zeros(5)}, r"D must be \(6,\)"),
            ({"z": torch.zeros(2, 6, 4)}, "z must be"),
            ({"delta_bias": torch.zeros(5)}, "delta_bias must be"),
            ({"A": torch.zeros(6, 3, dtype=torch.complex64)}, "A must be real numbers, got complex64"),
            ({"backend": "cuda"}, "not one of"),
        ],
    )
    def test_errors(self, change, message):
        names = ("u", "delta", "A", "B", "C")
        arguments = dict(zip(names, (x.detach() for x in sequences()[:5])))
        with pytest.raises(InputError, match=message):
            selective_scan(**{**arguments, **change})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"u": torch.zeros(2, 5, 7)}, r"u must be \(B, H, W, D\) or \(B, H, W, K, D\)"),
            ({"u": torch.zeros(2, 5, 7, 3, 6)}, r"u must be \(2, 5, 7, 4, 6\)"),
            ({"delta": torch.zeros(2, 5, 7, 3, 6)}, "delta must be"),
            ({"orders": ("rows", "diagonal")}, "orders must be among rows, columns.*got diagonal"),
            ({"orders": ()}, "got none"),
            ({"orders": ("rows",)}, r"delta must be \(2, 5, 7, 1, 6\)"),
        ],
    )
    def test_errors_of_maps(self, change, message):
        arguments = dict(zip(("u", "delta", "A", "B", "C"), (x.detach() for x in maps()[:5])))
        with pytest.raises(InputError, match=message):
            selective_scan_2d(**{**arguments, **change})


class TestLastState:
    """The last state, which mamba_ssm also returns, lets a decoder continue a sequence."""

    @pytest.mark.parametrize("backend", ["portable", "reference"])
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("reverse", [False, True])
    def test_is_that_of_the_recurrence(self, reverse, groups, backend):
        u, delta, A, B, C, D, z, bias = (x.detach() for x in sequences(groups=groups, length=70))
        out, last = selective_scan(u, delta, A, B, C, D, z, bias, True, reverse, backend, return_last_state=True)
        torch.testing.assert_close(out, selective_scan(u, delta, A, B, C, D, z, bias, True, reverse))
        dt = torch.nn.functional.softplus(delta + bias[:, None])
        state, into = torch.zeros_like(last), B.repeat_interleave(u.shape[1] // groups, 1)
        for t in range(u.shape[2])[:: -1 if reverse else 1]:
            step = dt[:, :, t, None]
            state = torch.exp(step * A) * state + step * u[:, :, t, None] * into[..., t]
        torch.testing.assert_close(last, state)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_keeps_the_precision_of_the_computation(self, dtype):
        arguments = [x.detach().to(dtype) for x in sequences()[:5]]
        out, last = selective_scan(*arguments, delta_softplus=True, return_last_state=True)
        assert out.dtype == dtype
        assert last.dtype == torch.float32
        wanted = selective_scan(*(x.double() for x in arguments), delta_softplus=True, return_last_state=True)[1]
        torch.testing.assert_close(last.double(), wanted, rtol=1e-4, atol=1e-5)

    def test_goes_on(self):
        """The first steps, then the other steps from the last state, give the same as all steps at once."""
        u, delta, A, B, C = (x.detach() for x in sequences()[:5])
        whole, wanted = selective_scan(u, delta, A, B, C, delta_softplus=True, return_last_state=True)
        cut = [(..., slice(0, 3)), (..., slice(3, None))]
        (_, first), (rest, last) = (
            selective_scan(u[at], delta[at], A, B[at], C[at], delta_softplus=True, return_last_state=True) for at in cut
        )
        decay = torch.exp(torch.nn.functional.softplus(delta[cut[1]]).cumsum(-1).unsqueeze(2) * A[:, :, None])
        torch.testing.assert_close(last + decay[..., -1] * first, wanted)
        torch.testing.assert_close(
            rest + torch.einsum("bnl,bdnl,bdn->bdl", C[:, 0][cut[1]], decay, first), whole[cut[1]]
        )

    def test_gradients(self):
        """The last state has a gradient; in mamba_ssm it has none."""
        tensors = sequences(batch=1, length=4)[:5]
        assert torch.autograd.gradcheck(
            lambda *x: selective_scan(*x, delta_softplus=True, return_last_state=True), tensors
        )

    @pytest.mark.long
    @pytest.mark.parametrize("strict", [True, False])
    def test_export(self, strict):
        class Layer(torch.nn.Module):
            def forward(self, *x):
                return selective_scan(*x, delta_softplus=True, return_last_state=True)

        arguments = tuple(x.detach() for x in sequences()[:5])
        program = torch.export.export(Layer(), arguments, strict=strict)
        torch.testing.assert_close(program.module()(*arguments), Layer()(*arguments))
        assert not any("terrazzo" in str(node.target) for node in program.graph.nodes)


class TestInitialState:
    """A scan of a part of a sequence continues from the last state of the part before."""

    @pytest.mark.parametrize("backend", ["portable", "reference"])
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("reverse", [False, True])
    def test_parts_are_the_whole(self, reverse, groups, backend):
        u, delta, A, B, C, D, z, bias = (x.detach() for x in sequences(groups=groups, length=11))
        A = A * torch.linspace(1, 1000, A.shape[1], dtype=A.dtype)  # also states that are gone after a step
        options = dict(delta_softplus=True, reverse=reverse, backend=backend, return_last_state=True)
        whole, wanted = selective_scan(u, delta, A, B, C, D, z, bias, **options)
        state, outs = None, {}
        for at in (slice(4), slice(4, 5), slice(5, None))[:: -1 if reverse else 1]:
            parts = u[..., at], delta[..., at], A, B[..., at], C[..., at], D, z[..., at], bias
            outs[at.start or 0], state = selective_scan(*parts, **options, initial_state=state)
        torch.testing.assert_close(torch.cat([outs[key] for key in sorted(outs)], 2), whole)
        torch.testing.assert_close(state, wanted)

    def test_keeps_the_precision_of_the_computation(self):
        arguments = [x.detach().float() for x in sequences()[:5]]
        state = torch.randn(*arguments[0].shape[:2], arguments[2].shape[1])
        found = selective_scan(*arguments, delta_softplus=True, initial_state=state)
        wanted = selective_scan(*(x.double() for x in arguments), delta_softplus=True, initial_state=state.double())
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)

    def test_gradients(self):
        *tensors, state = *sequences(batch=1, length=3)[:5], None
        state = torch.randn(1, *tensors[2].shape, dtype=torch.float64, requires_grad=True)

        def run(*x):
            return selective_scan(*x[:5], delta_softplus=True, return_last_state=True, initial_state=x[5])

        assert torch.autograd.gradcheck(run, (*tensors, state), atol=1e-4)  # differences of numbers times 2 ** 20

    def test_another_shape_is_refused(self):
        u, *others = (x.detach() for x in sequences()[:5])
        with pytest.raises(InputError, match="initial_state must be"):
            selective_scan(u, *others, initial_state=torch.zeros(1, 2, 3))
