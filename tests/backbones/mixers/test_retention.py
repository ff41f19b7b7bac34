"""The mixer `retention`."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.mixer_contract import MixerContract, MixerPack, packs, place_of

from terrazzo.backbones.mixers.retention import decays, retain_map, retain_sequence
from terrazzo.errors import InputError

FORMS = ("parallel", "chunked", "recurrent")


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


class TestRetention(MixerContract):
    mixer = "retention"
    averages = False

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("name", packs("vir_retention"))
    def test_golden(self, name, form):
        pack = MixerPack("vir_retention", name)
        names = ["q", "k", "v"] if "q" in pack.arrays else ["x", *(n for n in pack.arrays if n.startswith("w."))]
        leaves = [pack[name].requires_grad_() for name in names]
        if "q" in pack.arrays:
            # The class token comes last in the pack.
            front = int(pack.meta["class_token"])
            q, k, v = (x.roll(front, 2) for x in leaves)
            place = place_of((pack.meta["height"], pack.meta["width"]), front, q, k)
            mixer = self.make(heads=q.shape[1], head_dim=8, dims=2, directions=1, chunk=2, form=form)
            out = mixer(q, k, v, place).roll(-front, 2)
        else:
            x, qkv, bias, last, last_bias = leaves
            q, k, v = F.linear(x, qkv, bias).unflatten(2, (3, pack.meta["heads"], -1)).permute(2, 0, 3, 1, 4)
            mixer = self.make(heads=q.shape[1], dims=1, directions=1, chunk=7, form=form)
            out = mixer(q, k, v, place_of((q.shape[2], 1), 0, x, k))
            out = F.linear(out.transpose(1, 2).flatten(2), last, last_bias)
        torch.testing.assert_close(out, pack["out"], rtol=0, atol=1e-9)
        out.backward(pack["grad"])
        for name, leaf in zip(names, leaves):
            wanted = pack[f"d{name}"]
            rounding = 1e-6 * wanted.abs().max().item() if pack.meta["arrays"][f"d{name}"][1] == "float32" else 1e-9
            torch.testing.assert_close(leaf.grad, wanted, rtol=0, atol=rounding)

    @pytest.mark.long
    @torch.no_grad()
    @pytest.mark.parametrize("dims", [1, 2])
    def test_forms_are_equal(self, dims):
        """Also with chunks that divide nothing, tokens in front, and more directions than heads."""
        for prefix, directions in itertools.product((0, 3), (1, 2, 4)):
            q, k, v, place = self.given((7, 11), prefix, heads=6)
            options = dict(heads=6, dims=dims, directions=directions)
            wanted = self.make(form="parallel", **options)(q, k, v, place)
            for form, chunk in (("chunked", 1), ("chunked", 3), ("chunked", 100), ("recurrent", 1)):
                found = self.make(form=form, chunk=chunk, **options)(q, k, v, place)
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)

    def test_gradients_of_forms_are_equal(self):
        q, k, v, place = self.given((5, 4), 2, heads=4)
        leaves, grads = [x.requires_grad_() for x in (q, k, v)], []
        for form in FORMS:
            out = self.make(heads=4, form=form, chunk=2)(q, k, v, place)
            grads.append(torch.autograd.grad(out.square().sum(), leaves))
        for found, wanted in zip(grads[1] + grads[2], grads[0] * 2):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)

    @torch.no_grad()
    def test_inclusion_and_exclusion(self):
        """The state of a patch is its own, plus its neighbours', less what both of them hold."""
        q, k, v, _ = self.given((5, 6), 0)
        decay = decays(2, q)
        g = decay.exp()[:, None, None]
        state = torch.zeros(6, 7, 2, 2, 8, 8, dtype=torch.float64)
        for row, column in itertools.product(range(5), range(6)):
            n = row * 6 + column
            pair = k[:, :, n, :, None] * v[:, :, n, None]
            state[row + 1, column + 1] = (
                pair + g * state[row, column + 1] + g * state[row + 1, column] - g * g * state[row, column]
            )
        wanted = torch.einsum("bhrcd,rcbhde->bhrce", q.unflatten(2, (5, 6)), state[1:, 1:]).flatten(2, 3)
        for form in FORMS:
            torch.testing.assert_close(retain_map(q, k, v, decay, (5, 6), form, 2), wanted)

    def test_decays(self):
        like = numbers(0)
        torch.testing.assert_close(decays(1, like).exp(), numbers(0.96875))
        torch.testing.assert_close(decays(2, like).exp(), numbers(0.96875, 0.998046875))
        wanted = numbers(0.96875, 0.98205, 0.98969, 0.99408, 0.99660, 0.99805)
        torch.testing.assert_close(decays(6, like).exp(), wanted, rtol=0, atol=5e-6)

    @pytest.mark.parametrize("form", FORMS)
    def test_by_hand(self, form):
        decay, one = numbers(0.5).log(), torch.ones(1, 1, 3, 1, dtype=torch.float64)
        out = retain_sequence(one, one, numbers(1, 2, 4).view(1, 1, 3, 1), decay, form, 2)
        torch.testing.assert_close(out.flatten(), numbers(1, 2.5, 5.25))
        one = torch.ones(1, 1, 5, 1, dtype=torch.float64)
        out = retain_map(one, one, one, decay, (2, 2), form, 1)
        torch.testing.assert_close(out.flatten(), numbers(1, 1.5, 1.5, 2.25, 2.125))

    @torch.no_grad()
    @pytest.mark.parametrize("form", FORMS)
    def test_without_decay_and_without_memory(self, form):
        """A factor of 1 gives linear attention to all tokens before; a factor of 0 leaves a token alone."""
        q, k, v, _ = self.given((4, 5), 0)
        out = retain_sequence(q, k, v, torch.zeros(2, dtype=torch.float64), form)
        torch.testing.assert_close(out, (q @ k.transpose(2, 3)).tril() @ v)
        alone = (q * k).sum(3, keepdim=True) * v
        forgets = torch.full((2,), -1e3, dtype=torch.float64)
        torch.testing.assert_close(retain_sequence(q, k, v, forgets, form), alone)
        torch.testing.assert_close(retain_map(q, k, v, forgets, (4, 5), form), alone)

    @torch.no_grad()
    @pytest.mark.parametrize("dims", [1, 2])
    def test_causality(self, dims):
        """A patch is seen from below and from the right only, or by later patches; the class token sees all."""
        q, k, v, place = self.given((6, 5), 1)
        changed = v.clone()
        changed[:, :, 1 + 2 * 5 + 3] += 1  # row 2, column 3
        mixer = self.make(dims=dims, directions=1)
        seen = (mixer(q, k, changed, place) - mixer(q, k, v, place)).abs().amax((0, 1, 3)) > 1e-9
        rows, columns = torch.arange(30) // 5, torch.arange(30) % 5
        wanted = (rows >= 2) & (columns >= 3) if dims == 2 else torch.arange(30) >= 13
        assert seen[0]
        assert torch.equal(seen[1:], wanted)

    @torch.no_grad()
    def test_directions(self):
        """Flipping the map exchanges the heads' directions."""
        q, k, v, place = self.given((4, 5), 0, heads=4)
        plain, four = self.make(heads=4, directions=1), self.make(heads=4)
        wanted = four(q, k, v, place).unflatten(2, (4, 5))
        for head, flip in enumerate([(), (2, 3), (3,), (2,)]):
            flipped = [x.unflatten(2, (4, 5)).flip(flip).flatten(2, 3) for x in (q, k, v)]
            found = plain(*flipped, place).unflatten(2, (4, 5)).flip(flip)
            torch.testing.assert_close(found[:, head], wanted[:, head])

    @pytest.mark.long
    @pytest.mark.parametrize("dims", [1, 2])
    def test_memory(self, dims):
        """The chunked form keeps no tensor with N x N numbers."""
        q, k, v, place = self.given((90, 90), 1, torch.float32, batch=1, heads=1)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            self.make(torch.float32, heads=1, dims=dims)(q.requires_grad_(), k, v, place).sum().backward()
        assert max(kept) <= 8101**2 / 10

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(dims=3), "dims must be 1 or 2, got 3"),
            (dict(form="softmax"), "form must be one of parallel, chunked, recurrent, got 'softmax'"),
            (dict(directions=3), "directions must be 1, 2 or 4, got 3"),
            (dict(chunk=0), "chunk must be at least 1, got 0"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(InputError, match=message):
            self.make(**options)
