"""What every mixer that chooses keys must hold, beside what every mixer must."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from support.mixer_contract import MixerContract
from terrazzo.kernels.block_sparse_attention import block_sparse_attention, plan_to_mask


class SelectorContract(MixerContract):
    """Tests of one selector.

    Attributes:
        everything: options with which it selects all keys; None if that is not softmax attention.
        edge: patches on a side of a tile in these tests; 1 if it has no tiles.
        one_softmax: whether a query's keys share one softmax.
    """

    everything: dict[str, Any] | None = {}
    edge = 4
    one_softmax = True

    def make(self, dtype=torch.float64, **more):
        """The same random parameters in every dtype."""
        return super().make(**more).to(dtype)

    def planned(self, grid, prefix, dtype=torch.float64, **options):
        mixer = self.make(dtype, **options)
        given = self.given(grid, prefix, dtype)
        tokens = mixer.tokens(*given)
        return mixer, given, tokens, mixer.plan(tokens)

    @pytest.mark.parametrize("grid", [(8, 8), (7, 11)])
    @torch.no_grad()
    def test_everything_selected_is_softmax_attention(self, grid):
        if self.everything is None:
            pytest.skip("the mixer is not softmax attention when it selects all keys")
        for prefix, dtype, tolerance in (
            (0, torch.float64, 1e-12),
            (5, torch.float64, 1e-12),
            (1, torch.float32, 1e-6),
        ):
            q, k, v, place = self.given(grid, prefix, dtype)
            out = self.make(dtype, **self.everything)(q, k, v, place)
            torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=4 * tolerance)

    @torch.no_grad()
    def test_permutation_inside_a_tile(self):
        """Tokens that change places inside a tile change places in the output."""
        if self.edge == 1:
            pytest.skip("the mixer has no tiles")
        q, k, v, place = self.given((16, 16), 1)
        order = torch.arange(257)
        first, second = 1 + torch.arange(self.edge), 1 + 16 + torch.arange(self.edge).flip(0)
        order[first], order[second] = second, first
        moved = [t[:, :, order] for t in (q, k, v)]
        mixer = self.make()
        found = mixer(*moved, place._replace(x=place.x[:, order], raw_key=moved[1]))
        torch.testing.assert_close(found, mixer(q, k, v, place)[:, :, order])

    @torch.no_grad()
    def test_lse_and_output_are_over_the_selected_keys(self):
        """The operator on the plan gives softmax attention with the plan's mask, and its sums."""
        if not self.one_softmax:
            pytest.skip("the mixer merges several softmaxes")
        _mixer, _given, tokens, plan = self.planned((10, 13), 2)
        out, lse = block_sparse_attention(tokens.query, tokens.key, tokens.value, plan)
        keys, values, shifts = [], [], []
        for segment in plan.segments:
            key, value = (tokens.key, tokens.value) if segment.key is None else (segment.key, segment.value)
            shift = segment.key_bias(key.shape[2], plan.key_tile, key.dtype)
            shift = key.new_zeros(1, 1, key.shape[2]) if shift is None else shift
            keys.append(key)
            values.append(value)
            shifts.append((shift + segment.shift()).expand(*key.shape[:3]))
        mask = plan_to_mask(plan, tokens.query, tokens.key)
        logit = tokens.query @ torch.cat(keys, 2).transpose(-1, -2) * tokens.query.shape[-1] ** -0.5
        logit = (logit + torch.cat(shifts, 2).unsqueeze(2)).masked_fill(~mask, -torch.inf)
        real = tokens.tiles.order() >= 0
        torch.testing.assert_close(lse[:, :, real], logit.logsumexp(-1)[:, :, real])
        wanted = logit.softmax(-1).nan_to_num() @ torch.cat(values, 2)
        torch.testing.assert_close(out[:, :, real], wanted[:, :, real])

    def test_gradcheck_with_the_plan_of_the_values(self):
        """With a frozen choice, gradients of queries, keys and values agree with finite differences."""
        mixer = self.make()
        q, k, v, place = self.given((5, 6), 1, batch=1)
        leaves = [t.requires_grad_() for t in (q, k, v)]

        def mixed(*leaves):  # steps of 1e-6 change no choice
            return mixer(*leaves, place._replace(raw_key=leaves[1]))

        torch.autograd.gradcheck(mixed, leaves, fast_mode=True, nondet_tol=1e-10)

    def test_density(self):
        """The mixer computes less than everything, and all of it where the map is small."""
        mixer, given = self.make(), self.given((16, 24), 1)
        assert 0 < mixer.density(*given) < 1
        if self.everything is not None:
            assert self.make(**self.everything).density(*given) == pytest.approx(1)
        assert self.make(dense_up_to=16 * 24).density(*given) == 1
        assert "no more than 384 patches" in self.make(dense_up_to=16 * 24).dense((16, 24), 1)
