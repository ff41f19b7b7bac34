"""The mixer `linear_infsa`."""

import pytest
import torch
import torch.nn.functional as F
from support.infsa_packs import check_pack
from support.mixer_contract import MixerContract, MixerPack, place_of

from terrazzo.backbones.mixers.linear_infsa import central
from terrazzo.errors import InputError


class TestLinearInfSA(MixerContract):
    mixer = "linear_infsa"
    averages = False
    permutes = True
    refused = None

    @pytest.mark.parametrize("name", ["linear_fn", "linear_fn_negative", "linear_module"])
    def test_golden(self, name):
        pack = MixerPack("infsa", name)
        mixer = self.make()
        q, k = check_pack(mixer, pack)
        if "scores" in pack.arrays:
            torch.testing.assert_close(pack.meta["rho"] * central(q, k), pack["scores"], rtol=0, atol=1e-9)

    @torch.no_grad()
    def test_all_tokens_are_equal(self):
        """All tokens get the same result; with equal values it is rho times the value."""
        q, k, v, place = self.given((7, 11), 1)
        mixer = self.make(rho=0.7)
        out = mixer(q, k, v, place)
        assert torch.equal(out, out[:, :, :1].expand_as(out))
        v = v[:, :, :1].expand_as(v)
        torch.testing.assert_close(mixer(q, k, v, place), 0.7 * v, rtol=1e-4, atol=0)
        torch.testing.assert_close(central(q, k).sum(2), torch.ones(2, 2, 1, dtype=torch.float64), rtol=1e-4, atol=0)

    @torch.no_grad()
    def test_by_hand(self):
        q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 1, 2, 1) for x in ((1, 2), (1, -1), (3, 5)))
        out = self.make(rho=0.5, heads=1, head_dim=1)(q, k, v, place_of((2, 1), 0, q, k))
        torch.testing.assert_close(out.flatten(), torch.tensor([1.5, 1.5], dtype=torch.float64), rtol=1e-6, atol=0)

    @torch.no_grad()
    def test_scale_does_not_matter(self):
        q, k, v, place = self.given((8, 8), 1)
        mixer = self.make()
        torch.testing.assert_close(mixer(3 * q, 7 * k, v, place), mixer(q, k, v, place), rtol=1e-5, atol=1e-6)

    @torch.no_grad()
    def test_approximates_the_dominant_eigenvector(self):
        q = self.given((8, 8), 0)[0].abs()
        vector = torch.linalg.eigh(q @ q.transpose(2, 3)).eigenvectors[..., -1].abs()
        assert F.cosine_similarity(central(q, q).squeeze(3), vector, dim=-1).min() > 0.9

    def test_gradients_of_all_inputs(self):
        q, k, v, place = self.given((3, 3), 1, batch=1, head_dim=4)
        mixer = self.make(head_dim=4)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch.autograd.gradcheck(lambda *x: mixer(*x, place), leaves, fast_mode=True)
        mixer(q, k, v, place).square().sum().backward()
        assert mixer.rho_logit.grad.abs().sum() > 0

    @torch.no_grad()
    def test_local(self):
        """The convolution moves with the patches, leaves tokens in front alone, and needs a grid."""
        q, k, v, place = self.given((6, 5), 2)
        mixer = self.make(local=True)
        added = mixer(q, k, v, place) - self.make()(q, k, v, place)
        assert added[:, :, :2].abs().max() == 0
        maps = v[:, :, 2:].transpose(2, 3).reshape(2, 16, 6, 5)
        wanted = mixer.dwc(maps).flatten(2).unflatten(1, (2, 8)).transpose(2, 3)
        torch.testing.assert_close(added[:, :, 2:], wanted)
        with pytest.raises(InputError, match="needs tokens on a grid"):
            mixer(q, k, v, place._replace(grid=None))

    def test_options(self):
        assert not self.make(rho_trainable=False).rho_logit.requires_grad
        mixer = self.make()
        mixer.load_state_dict({"rho_logit": torch.tensor(1.5)})
        assert mixer.rho_logit.item() == 1.5
        for rho in (0, 1, 1.5):
            with pytest.raises(InputError, match=f"rho must be between 0 and 1, got {rho}"):
                self.make(rho=rho)
