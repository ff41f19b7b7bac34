"""The mixer `infsa`."""

import pytest
import torch
from support.infsa_packs import check_pack
from support.mixer_contract import MixerContract, MixerPack, place_of

from terrazzo.backbones.mixers import infsa


def matrix(q, k, rho):
    """The attention matrix (B, heads, N, N) by its definition."""
    scores = (q @ k.transpose(2, 3) / q.shape[3]).relu()
    return rho * scores / (torch.linalg.matrix_norm(scores, keepdim=True) + 1e-6)


class TestInfSA(MixerContract):
    mixer = "infsa"
    averages = False
    permutes = True
    refused = None

    @pytest.mark.parametrize("name", ["pure_fn_negative", "pure_module"])
    @pytest.mark.parametrize("scores", [2**24, 700])
    def test_golden(self, name, scores, monkeypatch):
        """The official numbers, with all queries at once and in pieces."""
        monkeypatch.setattr(infsa, "SCORES", scores)
        pack = MixerPack("infsa", name)
        mixer = self.make()
        q, k = check_pack(mixer, pack)
        if "scores" in pack.arrays:
            torch.testing.assert_close(matrix(q, k, pack.meta["rho"]), pack["scores"], rtol=0, atol=1e-9)

    @torch.no_grad()
    def test_matrix(self):
        """The mixer's matrix has the norm rho, however large queries and keys are."""
        q, k, v, place = self.given((5, 5), 1)
        mixer, eye = self.make(rho=0.7), torch.eye(26, dtype=torch.float64).expand(2, 2, 26, 26)
        found = mixer(q, k, eye, place)
        torch.testing.assert_close(found, matrix(q, k, 0.7))
        norm = torch.linalg.matrix_norm(found)
        torch.testing.assert_close(norm, torch.full_like(norm, 0.7), rtol=1e-6, atol=0)
        torch.testing.assert_close(mixer(3 * q, 7 * k, v, place), mixer(q, k, v, place), rtol=1e-6, atol=1e-7)

    @torch.no_grad()
    def test_by_hand(self):
        q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 1, 2, 1) for x in ((1, 2), (1, -1), (3, 5)))
        out = self.make(rho=0.5, heads=1, head_dim=1)(q, k, v, place_of((2, 1), 0, q, k))
        wanted = torch.tensor([0.670820, 1.341641], dtype=torch.float64)
        torch.testing.assert_close(out.flatten(), wanted, rtol=0, atol=1e-6)

    @torch.no_grad()
    def test_two_layers_are_a_product(self):
        """Without residual connections and projections, two layers multiply by the second matrix after the first."""
        q, k, v, place = self.given((4, 4), 0)
        first, second = self.make(rho=0.7), self.make(rho=0.8)
        x = first(q, k, v, place)
        wanted = matrix(k, q, 0.8) @ matrix(q, k, 0.7) @ v
        torch.testing.assert_close(second(k, q, x, place), wanted)

    @pytest.mark.parametrize("merged", [False, True])
    def test_gradients_of_all_inputs(self, merged, monkeypatch):
        monkeypatch.setattr(infsa, "SCORES", 2 * 10 * 4)
        q, k, v, place = self.given((3, 3), 1, batch=1, head_dim=4)
        if merged:
            sizes = torch.tensor([1, 1, 2, 1, 3, 1, 1, 4, 1, 0], dtype=torch.float64)
            place = place._replace(grid=None, size=sizes[None])
        mixer = self.make(head_dim=4)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch.autograd.gradcheck(lambda *x: mixer(*x, place), leaves, fast_mode=True)
        mixer(q, k, v, place).square().sum().backward()
        assert mixer.rho_logit.grad.abs().sum() > 0

    def test_memory(self):
        """No tensor has N x N numbers, in the backward pass neither."""
        q, k, v, place = self.given((48, 48), 1, torch.float32, batch=1, heads=1)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            self.make(torch.float32)(q.requires_grad_(), k, v, place).sum().backward()
        assert max(kept) <= 2305 * 8
        assert infsa._rows(q.expand(64, 16, -1, -1), k) < 8
