"""What every reducer of `terrazzo.reduce` must hold: its test class inherits `ReducerContract`."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch

import terrazzo
from support.module_contract import check_adapters, check_hooks
from support.seeded import build, image
from terrazzo.errors import InputError

# In turn: a class token; registers, positions without a class token, mean pooling, layer scale, norms of queries and
# keys; a distillation token; attention pooling without prefix tokens; rotary positions with registers (DINOv3); rotary
# positions with a gated MLP and separate projections (EVA-02). Each has 7 x 7 patches.
SMALL = dict(embed_dim=48, num_heads=3, depth=3, num_classes=10)
HOSTS = {
    "vit_tiny_patch16_224": dict(img_size=112),
    "vit_small_patch16_224": dict(
        img_size=112, global_pool="avg", reg_tokens=4, no_embed_class=True, init_values=0.1, qk_norm=True
    ),
    "deit_tiny_distilled_patch16_224": dict(img_size=112),
    "vit_base_patch16_siglip_224": dict(img_size=112),
    "vit_small_patch16_dinov3": dict(img_size=112),
    "eva02_tiny_patch14_224": dict(img_size=98),
}
QUICK = ("vit_tiny_patch16_224", "vit_small_patch16_dinov3")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in HOSTS]
WITHOUT_CLASS_TOKEN = "vit_base_patch16_siglip_224"
PATCHES = 49


@functools.cache
def _built(name: str) -> torch.nn.Module:
    return build(name, **SMALL | HOSTS[name])


def host(name: str = "vit_tiny_patch16_224") -> torch.nn.Module:
    """A small ViT, always with the same weights."""
    return copy.deepcopy(_built(name))


def picture(vit: torch.nn.Module, batch: int = 2) -> torch.Tensor:
    return image(vit.patch_embed.img_size, batch=batch)


def walked(vit: torch.nn.Module, x: torch.Tensor, maps: bool = True) -> tuple[torch.Tensor, Any]:
    """The tokens and the state after all blocks."""
    x, state = vit._begin(x, maps=maps)
    for block in vit.blocks:
        x = block(x, state)
    return x, state


class ReducerContract:
    """Tests of one method.

    Attributes:
        method: Its name.
        options: Options with which it reduces tokens of small hosts.
        nothing: Options with which it reduces nothing.
        left: Patches that are left of 7 x 7 with `options`.
        merges: Whether every token's size is the number of patches that it stands for.
    """

    method: str
    options: dict[str, Any] = {}
    nothing: dict[str, Any]
    left: int
    merges = True

    @property
    def by_class_token(self) -> bool:
        return terrazzo.reduce(host(), method=self.method, **self.options).reducer.by_class_token

    def tokens(self, prefix: int) -> int:
        """Tokens that are left with `options`, `prefix` tokens in front included."""
        return prefix + self.left

    def vit(self, name: str) -> torch.nn.Module:
        """A host; skips if the method does not take it."""
        if name == WITHOUT_CLASS_TOKEN and self.by_class_token:
            pytest.skip(f"{self.method} needs a class token: see test_class_token")
        return host(name)

    def reduced(self, vit: torch.nn.Module, **options: Any) -> torch.nn.Module:
        return terrazzo.reduce(vit, method=self.method, **self.options | options)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ALL)
    def test_nothing_is_reduced(self, name):
        """Outputs are the unchanged model's, to the bit."""
        vit = self.vit(name)
        x = picture(vit)
        wanted, maps = vit.forward_intermediates(x)
        terrazzo.reduce(vit, method=self.method, **self.nothing)
        found, own = vit.forward_intermediates(x)
        assert all(torch.equal(a, b) for a, b in zip((found, *own), (wanted, *maps)))

    @torch.no_grad()
    @pytest.mark.parametrize("name", ALL)
    def test_reduces(self, name):
        """Fewer tokens are left, maps have every position, and each image is reduced alone."""
        vit = self.vit(name)
        x = picture(vit)
        wanted = vit.forward_intermediates(x, intermediates_only=True)
        self.reduced(vit, full_last=0)
        tokens, state = walked(vit, x, maps=False)
        assert tokens.shape == (2, self.tokens(vit.num_prefix_tokens), 48)
        assert not state.levels, "maps were recorded, and nobody asked for them"
        assert vit(x).shape == (2, 10)
        features, maps = vit.forward_intermediates(x)
        torch.testing.assert_close(features, vit.forward_features(x))
        assert [tuple(found.shape) for found in maps] == [(2, 48, 7, 7)] * 3
        assert torch.cosine_similarity(maps[-1], wanted[-1], dim=1).mean() > 0.5
        assert not torch.equal(maps[-1], wanted[-1])
        alone = vit.forward_intermediates(x[1:], intermediates_only=True)
        for one, both in zip(alone, maps):
            torch.testing.assert_close(one, both[1:], rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
    def test_maps_of_tokens(self, name):
        """Each token in front stands for itself; the composed map equals a step at a time; sizes add up."""
        vit = self.reduced(self.vit(name))
        tokens, state = walked(vit, picture(vit))
        prefix, found = vit.num_prefix_tokens, vit.reducer.assignment(state)
        assert found.shape == (2, prefix + PATCHES)
        assert found[:, :prefix].tolist() == [list(range(prefix))] * 2
        for row in found:
            assert set(row.tolist()) - {-1} == set(range(tokens.shape[1]))
        steps = torch.arange(prefix + PATCHES).expand(2, -1)
        for level in state.levels:
            new = level.map if level.dropped is None else level.map.masked_fill(level.dropped, -1)
            steps = torch.where(steps < 0, -1, new.gather(1, steps.clamp(min=0)))
        assert torch.equal(steps, found)
        if self.merges:
            assert (found >= 0).all()
            counted = torch.stack([torch.bincount(row, minlength=tokens.shape[1]) for row in found])
            torch.testing.assert_close(state.size, counted.to(state.size.dtype))

    @pytest.mark.long
    @torch.no_grad()
    def test_blocks_that_do_nothing(self):
        """If no block changes its tokens, a restored map is the input's, exactly up to rounding in float64."""
        vit = self.reduced(host().double(), full_last=0)
        for block in vit.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
        x = picture(vit).double()
        tokens, _ = vit._begin(x, maps=True)
        (found,) = vit.forward_intermediates(x, 1, intermediates_only=True)
        wanted = tokens[:, 1:].transpose(1, 2).unflatten(2, (7, 7))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)

    @torch.no_grad()
    @pytest.mark.parametrize("restore", ["copy", "soft"])
    def test_other_restorations(self, restore):
        vit = self.reduced(host(), restore=restore)
        (found,) = vit.forward_intermediates(picture(vit), 1, intermediates_only=True)
        assert found.shape == (2, 48, 7, 7)
        assert found.isfinite().all()

    @torch.no_grad()
    def test_every_size(self):
        """An even number of patches, a rectangle, and two patches."""
        vit = build("vit_tiny_patch16_224", **SMALL, dynamic_img_size=True, dynamic_img_pad=True)
        self.reduced(vit)
        for size in ((64, 96), (70, 50), (16, 32)):
            x = image(size)
            assert vit(x).isfinite().all()
            (found,) = vit.forward_intermediates(x, 1, intermediates_only=True)
            assert found.shape[2:] == tuple(-(-side // 16) for side in size)
            assert found.isfinite().all()

    @torch.no_grad()
    def test_windows(self):
        """Blocks reduce within windows, padded ones, too, and maps have every position; class attention refuses."""
        if self.by_class_token:
            with pytest.raises(InputError, match="class attention over the whole image, so there can be no windows"):
                self.reduced(host(), window=4)
            return
        vit = self.reduced(host(), blocks=(0, 1), window=4, global_blocks=(2,), full_last=0)
        _, state = walked(vit, picture(vit))
        counts = [level.merged.shape[1] for level in state.levels]  # of 4 windows of 4 x 4, and the class token
        assert 1 + 64 > counts[0] > counts[1]
        for before, level in zip((1 + 64, *counts), state.levels):
            of_window = torch.arange(before - 1).div((before - 1) // 4, rounding_mode="floor").expand(2, -1)
            after = (level.map[:, 1:] - 1).div((level.merged.shape[1] - 1) // 4, rounding_mode="floor")
            assert torch.equal(after, of_window), "a token left its window"
        torch.testing.assert_close(state.size.sum(1), torch.full((2,), 1.0 + PATCHES))
        (found,) = vit.forward_intermediates(picture(vit), 1, intermediates_only=True)
        assert found.shape == (2, 48, 7, 7)
        assert found.isfinite().all()

    @pytest.mark.parametrize("name", QUICK)
    def test_trains(self, name):
        """Gradients are finite, and the same with gradient checkpointing."""
        vit = self.reduced(self.vit(name)).train()
        x = picture(vit)
        gradients = []
        for checkpointed in (False, True):
            vit.zero_grad()
            vit.set_grad_checkpointing(checkpointed)
            features, maps = vit.forward_intermediates(x)
            (features.square().mean() + maps[-1].square().mean()).backward()
            gradients.append({key: p.grad.clone() for key, p in vit.named_parameters() if p.grad is not None})
        assert "blocks.0.attn.qkv.weight" in gradients[0]
        assert all(grad.isfinite().all() for grad in gradients[0].values())
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)

    @torch.no_grad()
    def test_travels(self):
        """A copy, a pickle, and a model that the record of changes rebuilds have the same outputs."""
        vit = self.reduced(host())
        x, wanted = picture(vit), vit(picture(vit))
        record = pickle.loads(pickle.dumps(vit.changes))["reduce"]
        assert record["method"] == self.method
        again = terrazzo.reduce(host(), method=self.method, blocks=record["blocks"], **record["options"])
        assert again.changes == vit.changes
        for other in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit)), again):
            assert torch.equal(other(x), wanted)

    @torch.no_grad()
    def test_autocast(self):
        vit = self.reduced(host())
        x = picture(vit)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, maps = vit(x), vit.forward_intermediates(x, 1, intermediates_only=True)
        assert logits.isfinite().all()
        assert maps[0].isfinite().all()

    @pytest.mark.slow
    @torch.no_grad()
    def test_compiles(self):
        """In one graph. (The contract of backbones tests the compiler's own code for `mctf` and `asvit`.)"""
        vit = self.reduced(host())
        x = picture(vit)
        compiled = torch.compile(vit, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), vit(x), rtol=1e-4, atol=1e-4)

    def test_modules_are_called(self):
        vit = self.reduced(build("vit_tiny_patch16_224", **SMALL, dynamic_img_size=True, dynamic_img_pad=True))
        check_hooks(vit)

    @pytest.mark.slow
    def test_adapters(self):
        vit = self.reduced(build("vit_tiny_patch16_224", **SMALL, dynamic_img_size=True, dynamic_img_pad=True))
        check_adapters(vit)

    @pytest.mark.slow
    def test_onnx(self, tmp_path):
        onnx_export = pytest.importorskip("terrazzo.tools.export.formats.onnx", reason="needs the extra 'export'")
        vit = self.reduced(host())
        report = onnx_export.export_onnx(vit, picture(vit, 1), tmp_path / "model.onnx")
        assert report.passed, report
        assert report.worst <= 1e-4

    def test_class_token(self):
        """Without a class token, a method that needs class attention refuses the model in one line."""
        if not self.by_class_token:
            pytest.skip(f"{self.method} needs no class token: see test_reduces")
        wanted = f"'{self.method}' needs a class token's attention, and this model has no class token"
        with pytest.raises(InputError, match=f"^{wanted}$"):
            self.reduced(host(WITHOUT_CLASS_TOKEN))

    @torch.no_grad()
    def test_strength(self):
        """A strength of 0 reduces nothing, and more strength leaves fewer tokens."""
        vit, x = host(), picture(host())
        wanted, kind = vit(x), type(self.reduced(host()).reducer)
        terrazzo.reduce(vit, method=self.method, **kind.of_strength(0.0, 3))
        assert torch.equal(vit(x), wanted)
        left = []
        for strength in (0.2, 0.5, 0.8, 1.0):
            terrazzo.reduce(vit, method=self.method, **kind.of_strength(strength, 3))
            left.append(walked(vit, x, maps=False)[0].shape[1])
        assert left == sorted(left, reverse=True)
        assert left[0] > left[-1]
