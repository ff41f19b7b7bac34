"""What every mixer must hold: a test class of a mixer inherits `MixerContract` and sets a few attributes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers import Host, create_mixer
from terrazzo.errors import InputError

ROOT = Path(__file__).parents[1] / "golden" / "mixers"
GRIDS = ((8, 8), (14, 14), (7, 11), (32, 48))


class MixerPack:
    """A golden pack of an operator: `meta` and `arrays` (tests/golden/mixers/<operator>/<name>.npz)."""

    def __init__(self, operator: str, name: str):
        arrays = dict(np.load(ROOT / operator / f"{name}.npz"))
        self.meta: dict[str, Any] = json.loads(bytes(arrays.pop("meta")))
        self.arrays = {
            key: torch.from_numpy(a.astype(np.float64) if a.dtype.kind == "f" else a) for key, a in arrays.items()
        }

    def __getitem__(self, key: str) -> torch.Tensor:
        """An array; numbers with a fraction are float64."""
        return self.arrays[key]


def packs(operator: str) -> list[str]:
    """The names of an operator's packs."""
    return sorted(path.stem for path in (ROOT / operator).glob("*.npz"))


def place_of(grid: tuple[int, int], prefix: int, x: torch.Tensor, key: torch.Tensor, **more: Any) -> Place:
    """The place of tokens whose keys are neither normalised nor rotated."""
    return Place(grid, prefix, x=x, raw_key=key, keyed=lambda key, positions: key, **more)


class MixerContract:
    """Tests of one mixer.

    Attributes:
        mixer: Its name.
        options: Its options in these tests, small enough that it does not compute softmax attention on all grids.
        averages: Whether an output is a weighted mean of values, so that equal values give the same output.
        permutes: Whether tokens that change places change places in the output, too.
        reads_keys: Whether the host's keys have an influence.
        prefixes: Numbers of tokens in front.
        refused: An error text for tokens without a grid; None if the mixer needs no grid.
    """

    mixer: str
    options: dict[str, Any] = {}
    averages = True
    permutes = False
    reads_keys = True
    prefixes = (0, 1, 5)
    refused: str | None = "needs tokens on a grid"

    def make(self, dtype=torch.float64, heads=2, head_dim=8, layer=0, depth=4, **options):
        torch.manual_seed(0)
        host = Host(heads * head_dim, heads, head_dim, layer, depth)
        return create_mixer(self.mixer, host, dtype=dtype, **{**self.options, **options})

    def given(self, grid, prefix, dtype=torch.float64, batch=2, heads=2, head_dim=8):
        """Queries, keys, values and their place."""
        generator = torch.Generator().manual_seed(1)
        count = prefix + grid[0] * grid[1]
        x = torch.randn(batch, count, heads * head_dim, generator=generator, dtype=torch.float64).to(dtype)
        q, k, v = torch.randn(3, batch, heads, count, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        return q, k, v, self.place(grid, prefix, x, k)

    def place(self, grid, prefix, x, key):
        """Where the tokens stand; a mixer that projects tokens of its own gets more."""
        return place_of(grid, prefix, x, key)

    @pytest.mark.parametrize("grid", GRIDS)
    @torch.no_grad()
    def test_grids(self, grid):
        """Every grid and number of tokens in front, in float32 as in float64."""
        for prefix in self.prefixes:
            given = self.given(grid, prefix)
            wanted = self.make()(*given)
            assert wanted.shape == given[2].shape
            assert torch.isfinite(wanted).all()
            narrow = self.make(torch.float32)
            narrow.load_state_dict(self.make().state_dict())  # random numbers of float32 are others
            found = narrow(*self.given(grid, prefix, torch.float32))
            assert found.dtype == torch.float32
            # Where a selection is near a tie, float32 may select another token, so a few rows may differ.
            near = ((found - wanted).abs() < 1e-3).all(-1).double().mean()
            assert near > 0.97, f"{near:.3f} of the rows agree"

    @torch.no_grad()
    def test_equal_values(self):
        """If all values are equal, a mean of values is that value."""
        if not self.averages:
            pytest.skip("the mixer does not average values")
        q, k, v, place = self.given((14, 14), 1)
        v = v[:, :, :1].expand_as(v)
        torch.testing.assert_close(self.make()(q, k, v, place), v)

    def test_gradients(self):
        """Gradients reach queries, keys, values and all parameters, and agree with finite differences."""
        mixer = self.make().train()
        q, k, v, place = self.given((6, 5), 1, batch=1, head_dim=8)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        place = place._replace(raw_key=leaves[1])
        mixer(*leaves, place).square().sum().backward()
        read = leaves if self.reads_keys else [leaves[0], leaves[2]]
        assert all(torch.isfinite(t.grad).all() for t in read)
        assert v.grad.abs().sum() > 0
        for name, parameter in mixer.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name

        def mean(v):
            return mixer(q.detach(), k.detach(), v, place._replace(raw_key=k.detach())).square().sum()

        torch.autograd.gradcheck(mean, v.detach().requires_grad_(), fast_mode=True, nondet_tol=1e-10)

    @torch.no_grad()
    def test_is_deterministic(self):
        given, mixer = self.given((14, 14), 1, torch.float32), self.make(torch.float32).eval()
        assert torch.equal(mixer(*given), mixer(*given))

    @pytest.mark.slow  # `compiled` is quick for one selector and one linear mixer
    @torch.no_grad()
    def test_compiles(self):
        self.compiled()

    def compiled(self):
        """Dynamo traces the mixer without a break."""
        given, mixer = self.given((14, 14), 1, torch.float32), self.make(torch.float32).eval()
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="eager")(*given), mixer(*given))

    @torch.no_grad()
    def test_autocast(self):
        """Under autocast the host's projections are in bfloat16, and so is the output."""
        q, k, v, place = self.given((14, 14), 1, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            out = self.make(torch.float32)(q, k, v, place)
        assert out.dtype == torch.bfloat16
        assert torch.isfinite(out).all()

    @torch.no_grad()
    def test_permutations(self):
        """Without positions, the order of patches does not matter."""
        if not self.permutes:
            pytest.skip("the mixer knows where tokens stand")
        q, k, v, place = self.given((7, 11), 1)
        order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(77)])
        moved = (t[:, :, order] for t in (q, k, v))
        place_moved = place._replace(x=place.x[:, order], raw_key=k[:, :, order])
        mixer = self.make()
        torch.testing.assert_close(mixer(*moved, place_moved), mixer(q, k, v, place)[:, :, order])

    @torch.no_grad()
    def test_tokens_without_a_grid(self):
        """Merged tokens are refused, or count as often as the patches that they stand for."""
        q, k, v, place = self.given((6, 6), 1)
        mixer = self.make()
        if self.refused is not None:
            with pytest.raises(InputError, match=self.refused):
                mixer(q, k, v, place._replace(grid=None))
            return
        twice = [torch.cat([t, t[:, :, -1:]], 2) for t in (q, k, v)]
        size = torch.ones(2, 37, dtype=torch.float64)
        size[:, -1] = 2
        wanted = mixer(*twice, Place(None, 1, torch.ones(2, 38, dtype=torch.float64)))
        found = mixer(q, k, v, Place(None, 1, size))
        torch.testing.assert_close(found, wanted[:, :, :-1])

    @torch.no_grad()
    def test_meta(self):
        """Shapes and FLOPs are known without data."""
        with torch.device("meta"):
            given = tuple(torch.empty(1, 2, 1 + 14 * 14, 8) for _ in range(3))
            x = torch.empty(1, 197, 16)
        mixer = self.make(torch.float32).to("meta")
        with FlopCounterMode(display=False) as counter:
            out = mixer(*given, self.place((14, 14), 1, x, given[1]))
        assert out.shape == given[2].shape
        assert counter.get_total_flops() > 0
