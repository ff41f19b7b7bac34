"""The mixer `soft`."""

import pytest
import torch
import torch.nn.functional as F
from support.mixer_contract import MixerContract, MixerPack, packs, place_of

from terrazzo.backbones._place import Place
from terrazzo.errors import InputError
from terrazzo.kernels.softmax_free_attention.reference import gaussian, normalised_inverse, regular_inverse


class TestSoft(MixerContract):
    mixer = "soft"
    options = dict(ratio=3)
    averages = False
    reads_keys = False

    @pytest.mark.parametrize("name", packs("soft_operator"))
    def test_golden(self, name):
        pack = MixerPack("soft_operator", name)
        meta = pack.meta
        x = pack["x"].requires_grad_()
        weights = {key[2:]: pack[key].requires_grad_() for key in pack.arrays if key.startswith("w.")}
        q, v = (
            F.linear(x, weights[f"{part}.weight"], weights[f"{part}.bias"])
            .unflatten(2, (meta["heads"], -1))
            .transpose(1, 2)
            for part in ("W_q", "W_v")
        )
        options = dict(norm=meta["normalised"], ratio=meta["ratio"], kernel=meta["conv_size"], alpha_scope="global")
        mixer = self.make(heads=meta["heads"], head_dim=q.shape[3], **options)
        own = {key.removeprefix("attn."): value for key, value in weights.items() if key.startswith("attn.")}
        mixer.load_state_dict(own, strict=True)
        place = place_of((meta["height"], meta["width"]), 0, x, q)
        out = mixer(q, torch.full_like(q, torch.nan), v, place)
        torch.testing.assert_close(out, pack["operator_out"], rtol=0, atol=1e-9)
        landmarks = mixer.landmarks(q * q.shape[3] ** -0.25, place)
        torch.testing.assert_close(landmarks, pack["landmark"], rtol=0, atol=1e-9)
        middle = gaussian(landmarks, landmarks)
        inverse = normalised_inverse(middle, "global") if meta["normalised"] else regular_inverse(middle)
        torch.testing.assert_close(inverse, pack["pinv"], rtol=1e-9, atol=1e-9)
        F.linear(out.transpose(1, 2).flatten(2), weights["ff.weight"], weights["ff.bias"]).backward(pack["grad"])
        grads = {f"dw.attn.{key}": parameter.grad for key, parameter in mixer.named_parameters()}
        grads |= {f"dw.{key}": value.grad for key, value in weights.items() if not key.startswith("attn.")}
        for key, grad in {"dx": x.grad, **grads}.items():
            rounding = 1e-6 if meta["arrays"][key][1] == "float32" else 1e-9
            torch.testing.assert_close(grad, pack[key], rtol=0, atol=rounding * max(1, pack[key].abs().max().item()))

    def test_newton_by_hand(self):
        matrix = torch.tensor([[1, 0.5], [0.5, 1]], dtype=torch.float64)[None, None]
        wanted = torch.tensor([[1.311518, -0.649266], [-0.649266, 1.311518]], dtype=torch.float64)[None, None]
        torch.testing.assert_close(regular_inverse(matrix), wanted, rtol=0, atol=1e-6)

    def test_equal_landmarks(self):
        """All results are finite in float32, too; SOFT++ finds the pseudo-inverse of a matrix of ones."""
        for dtype in (torch.float32, torch.float64):
            ones = torch.ones(1, 1, 49, 49, dtype=dtype)
            assert torch.isfinite(regular_inverse(ones)).all()
            found = normalised_inverse(ones, "matrix")
            torch.testing.assert_close(found, ones / 49**3, rtol=1e-3, atol=0)

    @pytest.mark.parametrize("norm", [False, True])
    @torch.no_grad()
    def test_nearly_equal_landmarks(self, norm):
        """Newton's iteration does not diverge in float32 where the matrix is nearly singular."""
        landmarks = 1 + 0.01 * torch.randn(1, 2, 100, 8, generator=torch.Generator().manual_seed(0))
        middle = gaussian(landmarks, landmarks)
        inverse = normalised_inverse(middle, "matrix") if norm else regular_inverse(middle)
        wanted = middle.double()
        wanted = normalised_inverse(wanted, "matrix") if norm else regular_inverse(wanted)
        assert (inverse - wanted).norm() < 0.01 * wanted.norm()

    @torch.no_grad()
    def test_scope_of_alpha(self):
        """With "matrix" an image's result does not depend on its neighbours in the batch; with "global" it does."""
        q, k, v, place = self.given((8, 8), 1)
        q = torch.cat([q[:1], 0.01 * q[1:]])  # the second image is flat
        single = [x[:1] for x in (q, k, v)]
        for scope, equal in (("matrix", True), ("global", False)):
            mixer = self.make(norm=True, ratio=2, alpha_scope=scope)
            mixer.Qnorm_act[0].weight.fill_(0.3)
            mixer.Qnorm_act[0].bias.copy_(torch.linspace(-1, 1, 8))
            mixer.Qlandmark_op.weight.mul_(3)
            both, alone = mixer(q, k, v, place)[:1], mixer(*single, place)
            assert torch.allclose(both, alone, rtol=0, atol=1e-9) == equal

    @torch.no_grad()
    def test_heads_can_change_places(self):
        q, k, v, place = self.given((6, 7), 1, heads=3)
        mixer = self.make(heads=3)
        wanted = mixer(q, k, v, place)
        mixer.conv.weight.copy_(mixer.conv.weight[[2, 0, 1]])
        found = mixer(*(x[:, [2, 0, 1]] for x in (q, k, v)), place)
        torch.testing.assert_close(found, wanted[:, [2, 0, 1]])

    @torch.no_grad()
    def test_landmarks_see_scaled_queries(self):
        q, k, v, place = self.given((6, 6), 0)
        mixer = self.make()
        wanted = mixer.Qnorm_act(
            mixer.Qlandmark_op((q[0] * 8**-0.25).transpose(1, 2).unflatten(2, (6, 6))).flatten(2).transpose(1, 2)
        )
        torch.testing.assert_close(mixer.landmarks(q * 8**-0.25, place)[0], wanted)
        assert not torch.allclose(mixer(q + 1, k, v, place), mixer(q, k, v, place))

    @torch.no_grad()
    def test_own_keys(self):
        """With keys equal to the queries and a matrix that can be inverted, the result hardly differs."""
        q, k, v, place = self.given((4, 4), 1)
        mixer = self.make(ratio=2, shared=False)
        assert not torch.allclose(mixer(q, k, v, place), mixer(q, q, v, place))
        every = [mixer.landmarks(x * 8**-0.25, place) for x in (q, k)]
        middle = gaussian(torch.cat(every, 2), torch.cat(every, 2))
        read, write = (gaussian(x * 8**-0.25, torch.cat(every, 2)) for x in (q, k))
        mixer.conv.weight.zero_()
        wanted = read @ torch.linalg.solve(middle + 0.01 * torch.eye(8, dtype=torch.float64), write.transpose(2, 3) @ v)
        torch.testing.assert_close(mixer(q, k, v, place), wanted, rtol=1e-4, atol=1e-4)

    def test_landmarks_are_means(self):
        """With sampling "mean" the convolution of values is the only parameter."""
        q, k, v, place = self.given((7, 6), 1)
        mixer = self.make(norm=True, ratio=3, sampling="mean")
        assert list(mixer.state_dict()) == ["conv.weight"]
        cell = q[:, :, 1:].unflatten(2, (7, 6))[:, :, 3:6, :3].mean((2, 3))
        torch.testing.assert_close(mixer.landmarks(q, place)[:, :, 2], cell)
        q.requires_grad_()
        mixer(q, k, v, place).square().sum().backward()
        assert q.grad.abs().min() > 0

    def test_small_maps(self):
        mixer = self.make(ratio=4)
        assert mixer.dense((3, 9), 1) == "a side of the map is less than ratio 4"
        assert mixer.dense((4, 9), 1) is None
        q, k, v, _ = self.given((3, 9), 1)
        wanted = F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(mixer(q, k, v, Place((3, 9), 1)), wanted)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(ratio=0), "ratio must be at least 1, got 0"),
            (dict(kernel=4), "kernel must be an odd number, got 4"),
            (dict(sampling="random"), "sampling must be 'conv' or 'mean', got 'random'"),
            (dict(alpha_scope="batch"), "alpha_scope must be 'matrix' or 'global', got 'batch'"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(InputError, match=message):
            self.make(**options)
