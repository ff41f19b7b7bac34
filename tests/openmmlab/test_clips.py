"""Axial-VS in mmdet: the pixel decoder against the official code's packs, both heads, and the packaged configs."""

import functools
import math

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from support.golden_packs import ROOT, Pack, normal, sampled

from terrazzo.errors import InputError
from terrazzo.openmmlab.config import build_runner, load_config, packaged_configs

CONFIGS = [name for name, path in packaged_configs().items() if path.parent.name == "video"]
NEAR, OFFLINE = (
    f"mask2former-axialvs{kind}_8xb1-1{n}k_youtubevis2021" for kind, n in (("_r50", 5), ("-offline_r50", 0))
)
WITHIN = ("T1", "T2", "T3_B2_small", "gamma0")
DECODERS = ("pixel_decoder_T2", pytest.param("pixel_decoder_T2_full", marks=pytest.mark.slow))


def encoder(dim, heads, hidden, layers):
    attention = dict(embed_dims=dim, num_heads=heads, num_levels=3, num_points=4, dropout=0.0, batch_first=True)
    activation = dict(type="ReLU", inplace=True)
    perceptron = dict(embed_dims=dim, feedforward_channels=hidden, num_fcs=2, ffn_drop=0.0, act_cfg=activation)
    return ConfigDict(num_layers=layers, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=perceptron))


def pixel_decoder(dim=32, heads=4, hidden=64, layers=2, channels=(8, 16, 24, 32), **options):
    if options.get("type", "Axial").startswith("Axial"):
        options = dict(type="AxialTrajectoryPixelDecoder", num_frames=2, num_temporal_dim=hidden) | options
    positions = dict(num_feats=dim // 2, normalize=True)
    given = dict(in_channels=list(channels), feat_channels=dim, out_channels=dim, positional_encoding=positions)
    return MODELS.build(dict(encoder=encoder(dim, heads, hidden, layers), _scope_="mmdet", **given, **options)).eval()


def maps(count, channels=(8, 16, 24, 32), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = ((16, 24), (8, 12), (4, 6), (2, 3))
    return [torch.randn(count, c, *size, generator=generator, dtype=dtype) for c, size in zip(channels, sizes)]


def lively(module):
    """Weights that leave nothing at 0."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


@pytest.mark.parametrize("name", WITHIN)
def test_within_clip(name):
    """The attention of an encoder layer: outputs and gradients, with and without gamma."""
    from terrazzo.openmmlab.clips.deformable import AxialTrajectoryDeformableAttention

    pack = Pack(ROOT / "axialvs" / f"within_clip_{name}.npz")
    meta = pack.meta
    keys = ("embed_dims", "num_heads", "num_levels", "num_points", "skip_connect")
    temporal = ("num_temporal_levels", "num_temporal_layers", "num_temporal_dim")
    options = {key: meta[key] for key in (*keys, *temporal)}
    layer = AxialTrajectoryDeformableAttention(dropout=0.0, **options).double().eval()
    weights = pack.weights()
    if meta["gamma_zeroed"]:
        weights["gamma"] = torch.zeros_like(weights["gamma"])
    layer.load_state_dict(weights)
    assert list(layer.state_dict()) == list(weights)
    frames, batch, sizes, dim = meta["frames"], meta["batch"], meta["spatial_shapes"], meta["embed_dims"]
    shape = (sum(h * w for h, w in sizes), batch * frames, dim)
    query, position = normal("query", shape).requires_grad_(), normal("query_pos", shape)
    positions = [normal(f"query_pos3d.{i}", (batch, frames, *sizes[i], dim)) for i in range(2)]
    points = _exact(sizes).expand(batch * frames, -1, -1)[:, :, None].expand(-1, -1, len(sizes), -1)
    shapes = torch.tensor(sizes)
    out = layer(
        query.transpose(0, 1),
        query_pos=position.transpose(0, 1),
        query_pos3d=positions,
        reference_points=points,
        spatial_shapes=shapes,
        level_start_index=torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]]),
    ).transpose(0, 1)
    assert list(out.shape) == meta["out_shape"]
    found = {"out": out}
    (out * normal("grad", out.shape)).sum().backward()
    found |= {"dquery": query.grad, **{f"dw.{key}": value.grad for key, value in layer.named_parameters()}}
    for key, wanted in pack.arrays.items():
        torch.testing.assert_close(sampled(key, found[key]), torch.from_numpy(wanted), rtol=1e-8, atol=1e-8)


def _exact(sizes):
    """Pixel centres (N, 2) of all levels, x and y from 0 to 1."""
    centres = []
    for height, width in sizes:
        y, x = ((torch.arange(side, dtype=torch.float64) + 0.5) / side for side in (height, width))
        centres.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1))
    return torch.cat(centres)


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_pixel_decoder(name):
    """Official names load as they are. mmdet's sine positions have the precision of float32."""
    pack = Pack(ROOT / "axialvs" / f"{name}.npz")
    meta = pack.meta
    given = (meta["feat_channels"], meta["num_heads"], meta["ffn"], meta["layers"], meta["in_channels"])
    decoder = pixel_decoder(*given, num_frames=meta["frames"]).double()
    assert sum(p.numel() for p in decoder.parameters()) == meta["parameters"]
    decoder.load_state_dict(pack.weights())
    centres = decoder.point_generator.single_level_grid_priors
    decoder.point_generator.single_level_grid_priors = functools.partial(centres, dtype=torch.float64)
    count = meta["frames"] * meta["batch"]
    feats = [normal(f"feat.{i}", (count, c, *size)) for i, (c, size) in enumerate(zip(given[-1], meta["sizes"]))]
    mask_feature, outs = decoder(feats)
    for key, x, stage in zip(("mask_feature", "out0", "out1", "out2"), (mask_feature, *outs), meta["stages"]):
        assert list(x.shape) == stage["shape"]
        wanted = torch.from_numpy(pack.arrays[key])
        torch.testing.assert_close(sampled(key, x), wanted, rtol=0, atol=2e-6)


def test_parameters_and_initial_weights():
    torch.manual_seed(0)
    shared = dict(dim=256, heads=8, hidden=1024, layers=6, channels=(256, 512, 1024, 2048))
    decoder, plain = pixel_decoder(**shared), pixel_decoder(**shared, type="MSDeformAttnPixelDecoder")
    own, base = (sum(p.numel() for p in module.parameters()) for module in (decoder, plain))
    assert (own, own - base) == (14_724_032, 8_688_128)
    decoder.init_weights()
    attention = decoder.encoder.layers[0].self_attn
    assert torch.equal(attention.gamma, torch.full((256,), 1e-6))
    # As the official code's: the packs store the spread of its initial weights.
    observed = Pack(ROOT / "axialvs" / "pixel_decoder_T2_full.npz").meta["init_observed"]
    assert attention.sampling_offsets.weight.std().item() == pytest.approx(
        observed["sampling_offsets_weight_std"], rel=0.02
    )
    assert attention.attention_weights.weight.std().item() == pytest.approx(
        observed["attention_weights_weight_std"], rel=0.02
    )
    assert attention.sampling_offsets.bias[:4].tolist() == observed["sampling_offsets_bias_first"]


@torch.no_grad()
def test_gamma_0_is_the_plain_decoder():
    """The weights of mmdet's decoder for single images give identical maps."""
    plain, decoder = pixel_decoder(type="MSDeformAttnPixelDecoder"), lively(pixel_decoder())
    missing, unexpected = decoder.load_state_dict(lively(plain).state_dict(), strict=False)
    assert not unexpected
    assert all(key.endswith(".gamma") or "temporal_layer" in key or "level_3d" in key for key in missing)
    for layer in decoder.encoder.layers:
        layer.self_attn.gamma.zero_()
    wanted, found = plain(maps(4)), decoder(maps(4))
    torch.testing.assert_close(found[0], wanted[0])
    for a, b in zip(found[1], wanted[1]):
        torch.testing.assert_close(a, b)
    decoder.encoder.layers[0].self_attn.gamma.fill_(1)
    assert not torch.allclose(decoder(maps(4))[0], wanted[0], atol=1e-3)


@torch.no_grad()
def test_clips_are_apart():
    """Clips of a batch do not mix, and frames beyond the last full clip are a clip."""
    decoder = lively(pixel_decoder())
    for layer in decoder.encoder.layers:
        layer.self_attn.gamma.fill_(1)
    mask_feature, outs = decoder(maps(5))
    parts = [decoder([x[start : start + 2] for x in maps(5)], 2) for start in (0, 2, 4)]
    torch.testing.assert_close(mask_feature, torch.cat([part[0] for part in parts]))
    for level, x in enumerate(outs):
        torch.testing.assert_close(x, torch.cat([part[1][level] for part in parts]))
    together, apart = (decoder(maps(4), frames)[1][0] for frames in (4, 2))
    assert (together - apart).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_frames=0), "num_frames must be at least 1, got 0"),
        (dict(num_temporal_levels=4), "num_temporal_levels must be 0 to 3, the decoder's levels, got 4"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(InputError, match=message):
        pixel_decoder(**options)


def small(name, root="/elsewhere", **options):
    """A packaged config with a small head, for one step on tiny data."""
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    given = {f"{loader}.{key}": value for loader in loaders for key, value in dict(num_workers=0).items()}
    given |= {f"{loader}.persistent_workers": False for loader in loaders}
    given |= {"train_cfg.max_iters": 1, "train_cfg.val_interval": 1, "default_hooks.checkpoint.save_optimizer": False}
    given |= {"val_evaluator.format_only": False, "load_from": None, "model.init_cfg": None}
    cfg = load_config(name, root, given | options)
    head = cfg.model.track_head
    head.num_queries, head.train_cfg.num_points = 10, 256
    head.pixel_decoder.encoder.num_layers, head.transformer_decoder.num_layers = 1, 3
    if cfg.model.backbone.type == "TerrazzoBackbone":
        cfg.model.backbone.update(pretrained=False, name="resnet10t", out_indices=(1, 2, 3, 4))
        cfg.model.backbone.pop("drop_path_rate", None)
        head.in_channels = [64, 128, 256, 512]
    else:
        cfg.model.backbone.update(init_cfg=None, depth=18)
        head.in_channels = [64, 128, 256, 512]
    for loader in loaders:
        for step in cfg[loader].dataset.pipeline:
            for transform in step.get("transforms", ()):
                if transform.type == "RandomChoiceResize":
                    transform.scales = [(72, 48), (96, 64)]
                if transform.type == "Resize":
                    transform.scale = (96, 64)
    return cfg


def head_of(name, **options):
    cfg = small(name).model.track_head
    cfg.update(options)
    return MODELS.build(ConfigDict(cfg, in_channels=[8, 16, 24, 32])).eval()


@pytest.mark.long
@torch.no_grad()
def test_near_online_head():
    """A clip is decoded as in mmdet; in a longer video, queries in another order are put back in order."""
    from mmdet.models.tracking_heads.mask2former_track_head import Mask2FormerTrackHead

    head = lively(head_of(NEAR))
    for mode, frames in ((True, 10), (False, 5)):
        head.train(mode)
        head.pixel_decoder.eval()
        wanted, found = Mask2FormerTrackHead.forward(head, maps(frames), []), head(maps(frames), [])
        for a, b in zip(wanted, found):
            torch.testing.assert_close(a[-1], b[-1])
            assert len(b) == (len(a) if mode else 1)
    video = maps(8)
    (classes,), (masks,) = head(video)
    assert (classes.shape, masks.shape) == ((1, 10, 41), (1, 10, 8, 16, 24))
    first, second = (head.decode([x[part] for x in video], 4) for part in (slice(4), slice(4, 8)))
    torch.testing.assert_close(masks[:, :, :4], first.masks[-1])
    # The second clip's queries are the first one's, in another order.
    order = torch.randperm(10)
    later = second._replace(queries=first.queries[:, order])
    decoded = iter([first, later])
    head.decode = lambda x, frames: next(decoded)
    (classes,), (masks,) = head(video)
    torch.testing.assert_close(masks[0, order, 4:], later.masks[-1][0])
    torch.testing.assert_close(classes[0, order], (first.classes[-1][0, order] + later.classes[-1][0]) / 2)


@torch.no_grad()
@pytest.mark.parametrize(("frames", "wanted"), [(4, [4]), (6, [3, 3]), (11, [4, 4, 3])])
def test_lengths_of_clips(frames, wanted):
    """A video is cut into as few clips of 5 frames at most as possible, with lengths that differ by one at most."""
    head, found = head_of(NEAR), []
    decode = head.decode

    def counted(x, length):
        found.append(length)
        return decode(x, length)

    head.decode = counted
    assert head(maps(frames))[1][0].shape == (1, 10, frames, 16, 24)
    assert found == wanted


@pytest.mark.long
def test_offline_head():
    """Only the tracker and the prediction heads learn; a short last clip is filled, and cut off again.

    In evaluation the logits are those of the tracker's last layer.
    """
    decoder = small(OFFLINE).model.track_head.pixel_decoder
    decoder.num_frames = 2
    head = head_of(OFFLINE, num_frames=4, num_clips=2, pixel_decoder=decoder).train()
    assert not head.pixel_decoder.training
    assert not head.transformer_decoder.training
    classes, masks = head(maps(8), [])
    assert len(classes) == len(masks) == 4
    assert (classes[-1].shape, masks[-1].shape) == ((2, 10, 41), (2, 10, 4, 16, 24))
    (sum(x.square().sum() for x in (*classes, *masks))).backward()
    learned = {name.split(".")[0] for name, p in head.named_parameters() if p.grad is not None}
    assert learned == {"tracker", "activation_proj", "cls_embed", "mask_embed"}
    assert learned == {name.split(".")[0] for name, p in head.named_parameters() if p.requires_grad}
    head.eval()
    video = maps(5)
    with torch.no_grad():
        (classes,), (masks,) = head(video)
        assert (classes.shape, masks.shape) == ((1, 10, 41), (1, 10, 5, 16, 24))
        filled = [torch.cat([x, x[-1:]]) for x in video]
        (filled_classes,), (filled_masks,) = head(filled)
        torch.testing.assert_close(filled_masks[:, :, :5], masks)
        torch.testing.assert_close(filled_classes, classes)
        # In training a video has 4 frames. The head's parts stay in evaluation here, so that there is no dropout.
        short = [x[:4] for x in video]
        (classes,), (masks,) = head(short)
        head.training = True
        all_classes, all_masks = head(short)
        assert len(all_classes) == len(all_masks) == 4
        torch.testing.assert_close(classes, all_classes[-1])
        torch.testing.assert_close(masks, all_masks[-1])


def test_offline_parameters():
    with torch.device("meta"):
        head = head_of(OFFLINE)
    own = sum(p.numel() for part in (head.tracker, head.activation_proj) for p in part.parameters())
    assert own == 4_997_377


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (NEAR, dict(num_frames=3), "clips of the head have 3 frames, pixel_decoder.num_frames is 5"),
        (OFFLINE, dict(num_frames=8, num_clips=2), "clips of the head have 4 frames, pixel_decoder.num_frames is 5"),
        (OFFLINE, dict(num_clips=4), "num_clips must divide num_frames=15, got 4"),
    ],
)
def test_refused_lengths(name, options, message):
    with pytest.raises(InputError, match=message):
        head_of(name, **options)


def test_the_plain_head_takes_the_pixel_decoder():
    """The pixel decoder alone, in mmdet's head: it trains on clips and predicts a video of any length."""
    head = head_of(NEAR, type="Mask2FormerTrackHead").train()
    assert head(maps(10), [])[1][-1].shape == (2, 10, 5, 16, 24)
    assert head.eval()(maps(7), [])[1][-1].shape == (1, 10, 7, 16, 24)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_size_model(name):
    cfg = load_config(name, "/elsewhere")
    assert "data/" not in cfg.pretty_text.replace("/elsewhere/", "")
    if cfg.model.backbone.type == "TerrazzoBackbone":
        cfg.model.backbone.pretrained = False
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    head = cfg.model.track_head
    assert len(cfg.model.track_head.loss_cls.class_weight) == head.num_classes + 1 == 41
    frames = 1 + cfg.train_dataloader.dataset.pipeline[0].num_ref_imgs
    assert frames == model.track_head.num_frames
    assert any(p.requires_grad for p in model.backbone.parameters()) == (head.type == "ClipTrackHead")


@pytest.mark.long
@pytest.mark.parametrize("name", [NEAR, OFFLINE.replace("r50", "dinat-mini")])
def test_trains_validates_and_predicts(name, tiny_data, tmp_path):
    runner = build_runner(small(name, tiny_data("youtube_vis_2021")), tmp_path, seed=0)
    before = {key: value.clone() for key, value in runner.model.named_parameters()}
    runner.train()
    assert math.isfinite(runner.message_hub.get_scalar("train/loss").current())
    after = dict(runner.model.named_parameters())
    assert all(torch.isfinite(value).all() for value in after.values())
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == ({"backbone", "track_head"} if name == NEAR else {"track_head"})
    # Parallel processes would wait forever for a missing gradient.
    reached = runner.optim_wrapper.optimizer.state.keys()
    assert all((value in reached) == value.requires_grad for value in after.values())
    assert "val/youtube_vis/segm_mAP" in runner.message_hub.log_scalars
    runner.model.eval()
    batch = list(runner.val_dataloader)[1]
    (result,) = runner.model.val_step(batch)
    frames = [sample.pred_track_instances for sample in result.video_data_samples]
    assert len(frames) == 7
    assert frames[0].masks.shape == (10, 64, 96)
    assert all(torch.equal(frame.instances_id, torch.arange(10)) for frame in frames)
