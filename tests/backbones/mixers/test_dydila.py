"""The mixer `dydila`."""

import pytest
import torch
import torch.nn.functional as F
from support.golden_packs import ROOT, Pack, normal, sampled
from support.mixer_contract import MixerContract, packs, place_of

from terrazzo.backbones.mixers.dydila import START, Bank, Kernel, Router
from terrazzo.errors import InputError


class TestDyDiLA(MixerContract):
    mixer = "dydila"
    averages = False

    @pytest.mark.parametrize("name", packs("dydila"))
    def test_golden(self, name):
        """The oracle's results, with the host's projections around the mixer."""
        pack = Pack(ROOT / "mixers" / "dydila" / f"{name}.npz")
        options, weights = pack.meta["options"], pack.weights()
        dim, heads, grid = options["dim"], options["heads"], (options["height"], options["width"])
        own = ("q.", "k.", "v.", "proj.")
        host = {key: weights.pop(key).requires_grad_() for key in list(weights) if key.startswith(own)}
        names = ("n_proj", "n_kernel", "n_diff", "positive", "norm")
        mixer = self.make(heads=heads, head_dim=dim // heads, **{key: options[key] for key in names})
        mixer.load_state_dict(weights, strict=True)
        x = normal("x", (options["batch"], grid[0] * grid[1], dim)).requires_grad_()
        q, k, v = (F.linear(x, host[f"{p}.weight"]).unflatten(2, (heads, -1)).transpose(1, 2) for p in "qkv")
        place = place_of(grid, 0, x, k)
        out = mixer(q, k, v, place).transpose(1, 2).flatten(2)
        out = F.linear(out, host["proj.weight"], host["proj.bias"])
        torch.testing.assert_close(out, torch.from_numpy(pack.arrays["out"]), rtol=0, atol=1e-9)
        out.backward(normal("grad", out.shape))
        grads = {"dx": x.grad, **{f"dw.{key}": value.grad for key, value in host.items()}}
        grads |= {f"dw.{key}": parameter.grad for key, parameter in mixer.named_parameters()}
        assert grads.keys() == pack.arrays.keys() - {"out", "attention"}
        for key, grad in grads.items():
            wanted = torch.from_numpy(pack.arrays[key])
            found = grad if grad.shape == wanted.shape else sampled(key, grad)
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9, msg=key)
        with torch.no_grad():
            mixer.dwc.weight.zero_()
            mixer.dwc.bias.zero_()
            attention = mixer(q, k, v, place).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention, torch.from_numpy(pack.arrays["attention"]), rtol=0, atol=1e-9)

    @torch.no_grad()
    def test_kernel(self):
        """It keeps norms, scales with its input, is relu for an exponent of 1, and survives large numbers and zeros."""
        kernel = Kernel(8, 3, dtype=torch.float64)
        z = torch.randn(5, 7, 8, dtype=torch.float64)
        z[0, 0] = -1
        wanted = z.relu()
        found = kernel(z, "relu")
        torch.testing.assert_close(found.norm(dim=-1), wanted.norm(dim=-1))
        assert found[0, 0].abs().max() == 0
        torch.testing.assert_close(kernel(3 * z, "relu"), 3 * found)
        assert torch.isfinite(kernel(1e15 * z.float(), "relu")).all()
        assert 1 + F.softplus(torch.tensor(START)) == pytest.approx(3, abs=1e-6)
        kernel.gamma.fill_(-1e4)
        torch.testing.assert_close(kernel(z, "relu"), wanted)

    @torch.no_grad()
    def test_kernel_by_hand(self):
        kernel = Kernel(2, 1, dtype=torch.float64)
        kernel.gamma.fill_(0.541324854612918)  # softplus is 1, so the exponent is 2
        found = kernel(torch.tensor([3.0, 4.0], dtype=torch.float64), "relu")
        wanted = torch.tensor([2.451306, 4.357878], dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)

    def plain(self, **options):
        """A mixer whose exponents are 1, and without a convolution."""
        mixer = self.make(**options)
        with torch.no_grad():
            mixer.dwc.weight.zero_()
            mixer.dwc.bias.zero_()
            for kernel in mixer.kernel.values():
                kernel.gamma.fill_(-1e4)
        return mixer

    @torch.no_grad()
    def test_without_differences(self):
        """With factors of 0 and exponents of 1 it is linear attention; all norms have the same numerator."""
        q, k, v, place = self.given((6, 5), 1)
        wanted = q.relu() @ (k.relu().transpose(2, 3) @ v)
        total = q.relu() @ k.relu().sum(2).unsqueeze(3)
        for norm, divisor in (("none", 8**0.5), ("mean", 31), ("abs", total.clamp(min=1e-8))):
            mixer = self.plain(norm=norm)
            mixer.diff.lambda_bank.zero_()
            torch.testing.assert_close(mixer(q, k, v, place), wanted / divisor)

    @torch.no_grad()
    def test_difference_of_equals_is_nothing(self):
        """If q' is q and the factor 1, the convolution alone is left."""
        q, k, v, place = self.given((6, 5), 1)
        mixer = self.plain(n_proj=1)
        mixer.diff.lambda_bank.fill_(1)
        mixer.q_bank.weight.copy_(torch.eye(16))
        q = place.x.unflatten(2, (2, 8)).transpose(1, 2)
        assert mixer(q, k, v, place).abs().max() == 0

    @torch.no_grad()
    def test_order_does_not_matter_without_the_convolution(self):
        q, k, v, place = self.given((6, 5), 1)
        order = torch.randperm(31)
        mixer = self.plain()
        found = mixer(*(x[:, :, order] for x in (q, k, v)), place._replace(x=place.x[:, order]))
        torch.testing.assert_close(found, mixer(q, k, v, place)[:, :, order])

    def test_choices(self):
        """A choice is exact, as if a matrix were looked up; its gradient is that of the softmax and reaches all."""
        router, bank = Router(6, 3, dtype=torch.float64), Bank(3, 6, 4, dtype=torch.float64)
        x = torch.randn(2, 9, 6, dtype=torch.float64)
        out = bank(x, router(x))
        chosen = (x @ router.weight.T).argmax(2)
        every = F.linear(x, bank.weight.flatten(0, 1)).unflatten(2, (3, 4))
        assert torch.equal(out, every.take_along_dim(chosen[..., None, None], 2).squeeze(2))
        out.square().sum().backward()
        found = router.weight.grad.clone()
        assert (found.abs().sum(1) > 0).all()
        # The surrogate: with `soft` in place of the choice, and the gradient of the chosen output.
        soft = (x @ router.weight.T).softmax(2)
        (2 * out.detach() * (every.detach() * soft.unsqueeze(3)).sum(2)).sum().backward()
        torch.testing.assert_close(router.weight.grad - found, found)

    def test_parameters(self):
        """The paper's block for 384 channels, less the projections that the host has."""
        mixer = self.make(torch.float32, heads=6, head_dim=64)
        assert sum(p.numel() for p in mixer.parameters()) == 1_485_741 - (4 * 384 * 384 + 384)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(n_diff=0), "n_diff must be at least 1, got 0"),
            (dict(positive="gelu"), "positive must be 'relu' or 'softplus', got 'gelu'"),
            (dict(norm="sum"), "norm must be one of mean, none, abs, got 'sum'"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(InputError, match=message):
            self.make(**options)
