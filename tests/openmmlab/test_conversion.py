"""Conversion: what stages compare and train, teacher forcing, memory, and checkpoints that rebuild."""

import copy
import weakref

import pytest
import torch
from mmengine.registry import MODELS
from support.teachers import teacher_file

from terrazzo.backbones._hosts import record_of
from terrazzo.checkpoints.records import meta_of
from terrazzo.errors import InputError
from terrazzo.openmmlab import AttentionConversion, Pictures
from terrazzo.openmmlab.conversion.forcing import forced

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return teacher_file(tmp_path_factory.mktemp("teacher"), NAME, 8, **SMALL)


@pytest.fixture
def make(weights):
    def made(stage="hidden", mixer="hedgehog", layers="all", init="attention", options=None, **more):
        torch.manual_seed(1)
        teacher = dict(name=NAME, checkpoint=weights, **{**SMALL, **more})
        return AttentionConversion(teacher, dict(mixer=mixer, layers=layers, **(options or {})), stage, init).train()

    return made


def batch(count=4, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


def losses_of(model, images=None, targets=None):
    return model(batch() if images is None else images, targets, mode="loss")


def test_forcing_gives_what_the_teacher_has(make):
    model = make()
    teacher, x = model.teacher, batch()
    tokens = {}
    for layer, block in enumerate(teacher.blocks):
        block.register_forward_hook(lambda m, i, o, layer=layer: tokens.update({layer: o}))
    with torch.no_grad():
        teacher.forward_features(x)
    for given in forced(teacher, x, (0, 2), matrices=True):
        block = teacher.blocks[given.layer]
        torch.testing.assert_close(given.left, tokens[given.layer])
        torch.testing.assert_close(given.given, block.norm1(given.tokens))
        torch.testing.assert_close(given.attended, block.attn(given.given))
        value = block.attn.in_heads(block.attn.values(given.given))
        out = (given.matrix @ value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(block.attn.proj(out), given.attended)
    assert model.teacher.blocks[2].attn.mixer is None


@pytest.mark.parametrize("stage", ["matrix", "hidden", dict(type="hidden", target="block")])
def test_a_layerwise_stage_learns(make, stage):
    model = make(stage)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    seen = []
    for _ in range(20):
        losses = losses_of(model)
        seen.append(losses["loss"].item())
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert seen[-1] < 0.8 * seen[0]
    assert set(losses) == {"loss", *(f"{kind}{i}" for kind in ("error", "front") for i in range(3))}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(".attn." in name for name in changed)
    assert any("query_map" in name for name in changed)
    assert any(".attn.proj." in name for name in changed) == (stage != "matrix")


@pytest.mark.parametrize("stage", ["matrix", "hidden", "distil"])
def test_the_teacher_stays_as_it_is(make, stage):
    """No gradient reaches it, it stays in evaluation mode, no checkpoint has it, and a copy of the model shares it."""
    model = make(stage)
    before = copy.deepcopy(model.teacher.state_dict())
    sum(value for name, value in losses_of(model).items() if "loss" in name).backward()
    own = [p for p in model.backbone.parameters() if p.requires_grad]
    torch.optim.SGD(own, 0.1).step()
    assert all(p.grad is None or not p.requires_grad for p in model.teacher.parameters())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert not any(part.training for part in model.teacher.modules())
    torch.testing.assert_close(model.teacher.state_dict(), before, rtol=0, atol=0)
    assert all(name.startswith("backbone.") for name in model.state_dict())
    assert copy.deepcopy(model).teacher is model.teacher
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert ("backbone.blocks.0.mlp.fc1.weight" in trained) == (stage == "distil")
    assert ("backbone.blocks.0.attn.proj.weight" in trained) == (stage != "matrix")


def test_student_and_teacher_share_what_no_stage_trains(make):
    for stage, shared in (("hidden", True), ("distil", False)):
        model = make(stage, layers=[1])
        pairs = [(m.blocks[0].attn.qkv.weight, m.patch_embed.proj.weight) for m in (model.backbone, model.teacher)]
        assert [a is b for a, b in zip(*pairs)] == [shared, shared]
        assert model.backbone.blocks[1].attn.qkv.weight is not model.teacher.blocks[1].attn.qkv.weight


def test_a_loaded_student_leaves_the_teacher_alone(make):
    """A student whose every weight was trained goes into a stage that shares memory with the teacher."""
    model, images = make("hidden"), batch()
    with torch.no_grad():
        wanted = model.teacher(images)
        state = {name: value + 0.01 for name, value in make("distil").state_dict().items()}
        model.load_state_dict(state)
        torch.testing.assert_close(model.teacher(images), wanted, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("stage", ["matrix", "hidden"])
def test_the_order_of_layers_does_not_matter(make, stage):
    gradients = []
    for turned in (False, True):
        model = make(stage)
        given = list(forced(model.teacher, batch(), model.layers, stage == "matrix"))
        model.stage.compared(model, given[::-1] if turned else given, 0.0)["loss"].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_settled_gradients_are_those_of_the_loss(make):
    """The loss that hands out gradients gives those of the same loss in one graph, scaled as mmengine scales it."""
    model = make()
    (losses_of(model)["loss"] / 4).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    total = 0
    for given in forced(model.teacher, batch(), model.layers):
        out = model.backbone.blocks[given.layer].attn(given.given, attn_mask=given.place)
        total = total + ((out - given.attended).norm(dim=-1) / given.attended.norm(dim=-1)).mean() / 3
    (total / 4).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("stage", ["matrix", "hidden"])
def test_memory_is_that_of_one_layer(make, stage):
    """What graphs keep for gradients at the same time does not grow with the number of layers."""
    peaks = []
    for layers in ([1], "all"):
        model, live, peak = make(stage, layers=layers), [0], [0]

        class Kept:
            def __init__(self, tensor, live=live, peak=peak):
                self.tensor = tensor
                live[0] += tensor.nbytes
                peak[0] = max(peak[0], live[0])
                weakref.finalize(self, self.drop, live, tensor.nbytes)

            @staticmethod
            def drop(live, size):
                live[0] -= size

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            losses_of(model)
        assert live[0] == 0
        peaks.append(peak[0])
    assert peaks[0] == peaks[1] > 0


def test_distillation_by_hand(make):
    model, images, labels = make(dict(type="distil", taps=[0, 2])), batch(), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        losses = losses_of(model, images, labels)
        own, wanted = model.backbone(images), model.teacher(images)
        kl = torch.nn.functional.kl_div(own.log_softmax(1), wanted.softmax(1), reduction="batchmean")
        torch.testing.assert_close(losses["loss_kl"], kl)
        tokens = []
        for host in (model.backbone, model.teacher):
            maps = host.forward_intermediates(
                images, [0, 2], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
            )
            tokens.append([torch.nn.functional.layer_norm(torch.cat([p, m], 1), (32,)) for m, p in maps])
        cosines = [torch.cosine_similarity(a, b, -1).mean() for a, b in zip(*tokens)]
        torch.testing.assert_close(losses["loss_tokens"], 0.5 * (2 - sum(cosines)))
        task = torch.nn.functional.cross_entropy(own, labels)
        torch.testing.assert_close(losses["loss_task"], 0.1 * task)
        assert set(losses_of(model, images)) == {"loss_kl", "loss_tokens", "cosine0", "cosine2"}


def test_distillation_without_a_head(make):
    losses = losses_of(make("distil", num_classes=0))
    assert set(losses) == {"loss_kl", "loss_tokens", "cosine0", "cosine1", "cosine2"}
    assert losses["loss_kl"].requires_grad


def test_two_branches(make):
    """At first the scan and what mixes both branches learn; windows and projections, which both use, do not."""
    model = make(dict(type="hidden", branch="global"), mixer="mate")
    losses_of(model)["loss"].backward()
    moved = {name.split(".attn.")[1] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"mixer.fwd.conv.weight", "mixer.mix_proj.weight", "mixer.z_proj.bias"} < moved
    assert not any(name.startswith(("qkv", "proj", "mixer.relative")) for name in moved)


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        *((name, {}) for name in ("ssd", "linear_infsa", "retention", "dydila")),
        ("llsa", dict(dense_up_to=1, topk=1, edge=2, part=None)),  # by default, it is softmax attention on a small map
        ("na", dict(kernel=3)),
    ],
)
def test_other_mixers_learn(make, mixer, options):
    model = make(mixer=mixer, options=options)
    losses = losses_of(model)
    losses["loss"].backward()
    assert losses["loss"].item() > 0.01
    assert model.backbone.blocks[0].attn.proj.weight.grad.any()


def test_init_from_attention_is_nearer_than_a_random_start(make):
    errors = [losses_of(make(init=init))["loss"].item() for init in ("attention", "random")]
    assert errors[0] < 0.9 * errors[1]


def test_a_checkpoint_rebuilds_a_backbone(make, tmp_path):
    model = make(layers=[0, 2])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    file = str(tmp_path / "student.pth")
    torch.save({"state_dict": model.state_dict(), "meta": meta_of(record_of(model))}, file)
    settings = dict(type="TerrazzoBackbone", name=NAME, out_indices=(2,), checkpoint=file, **SMALL)
    settings.pop("num_classes")
    backbone = MODELS.build(dict(settings, convert=dict(mixer="hedgehog", layers=[0, 2])))
    with torch.no_grad():
        (wanted,) = model.eval().backbone.forward_intermediates(batch(), [2], intermediates_only=True)
        torch.testing.assert_close(backbone.eval()(batch())[0], wanted)
    with pytest.raises(InputError, match=r"pass convert=dict\(mixer='hedgehog', layers=\[0, 2\]\)"):
        MODELS.build(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(stage="hidde"), "stage must be one of matrix, hidden, .*got 'hidde'"),
        (dict(stage=dict(type="hidden", aim="block")), "stage 'hidden' does not fit: .*'aim'"),
        (dict(stage=dict(type="hidden", target="mlp")), "target must be 'attention' or 'block', got 'mlp'"),
        (dict(stage=dict(type="hidden", branch="global")), "layer 0 has the mixer 'hedgehog', which has one branch"),
        (dict(stage=dict(type="distil", taps=[9])), "taps must be blocks from 0 to 2"),
        (dict(stage="matrix", mixer="llsa"), "layer 0 has the mixer 'llsa', which has no matrix of weights"),
        (dict(layers=[]), "converts no layer; name layers from 0 to 2"),
        (dict(mixer="softmax"), "converts no layer"),
        (dict(layers=[3]), "layers must be some of 0 to 2"),
        (dict(init="zero"), "init must be 'attention' or 'random', got 'zero'"),
        (dict(drop_path_rate=0.1), "leave out drop_path_rate"),
    ],
)
def test_errors(make, change, message):
    with pytest.raises(InputError, match=message):
        make(**change)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (dict(name="resnet18", checkpoint="x.pth"), "only timm's plain VisionTransformer and Eva can be converted"),
        (dict(name=NAME), "teacher 'vit_tiny_patch16_224' has no weights: set pretrained=True, or name a file"),
        (dict(checkpoint="x.pth"), "it needs the name of a plain ViT"),
        (dict(name=NAME, checkpoint="/nowhere/x.pth", num_classes=5), "/nowhere/x.pth"),
    ],
)
def test_errors_of_teachers(teacher, message):
    with pytest.raises(InputError, match=message):
        AttentionConversion(teacher, dict(mixer="hedgehog"))


def test_large_images_in_the_first_stage(make):
    with pytest.raises(InputError, match="264x264 have 1090 tokens, and the stage 'matrix' takes at most 1024"):
        losses_of(make("matrix", dynamic_img_size=True), batch(1, 264))


def test_pictures(tiny_data, tmp_path):
    root = tiny_data("eurosat64")
    every = Pictures(str(root), dict(input_size=32), folders=["train", str(root / "val")])
    assert len(every) == 20
    assert set(every[3]) == {"inputs", "img_path"}
    some = Pictures(str(root), dict(input_size=32), folders=["train", "val"], most=3)
    assert len(some) == 6
    assert [file.parent.name for file in some.files[:3]] == ["AnnualCrop", "Highway", "PermanentCrop"]
    for options, message in (
        (dict(folders=["train", "none"]), "none' does not exist"),
        (dict(folders=[]), "folders is empty"),
        (dict(most=0), "most must be a number of images from 1"),
    ):
        with pytest.raises(InputError, match=message):
            Pictures(str(root), dict(input_size=32), **options)


def test_no_division_among_processes(make):
    from terrazzo.openmmlab.sharded import FullyShardedModel

    with pytest.raises(InputError, match="leave --fsdp out"):
        FullyShardedModel(make())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(make, dtype):
    """Under autocast, gradients are near those of float32; float16 loses no small ones."""
    model = make()
    losses_of(model)["loss"].backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = losses_of(model)["loss"]
    (loss / 2**10).backward()  # as a small factor of a gradient scaler or of accumulated batches
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found, wanted, 0) > 0.999
