"""Which backbones are measured end to end, against which peers and on which images: one entry per family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from terrazzo import backbones
from terrazzo.tools.models import registered_models, require_model


@dataclass(frozen=True)
class Images:
    """A batch of images."""

    height: int
    width: int
    batch: int = 1


@dataclass(frozen=True)
class Target:
    """The target for a family's forward pass against one peer.

    Attributes:
        device: type of the device, "cpu" or "cuda".
        peer: one of the family's peers.
        bound: the largest ratio of our time to the peer's; with `throughput`, the smallest ratio of our images per
            second to the peer's.
    """

    device: str
    peer: str
    bound: float
    throughput: bool = False


_CPU = (Images(224, 224), Images(512, 512))
_GPU = (Images(224, 224, 128), Images(512, 512, 16), Images(800, 1344, 2), Images(1024, 2048))
# 0.22, 0.52 and 1.41 G multiply-adds at 224 around the 0.44 to 0.50 of our smallest models.
_MOBILE = ("mobilenetv3_large_100", "efficientvit_b1", "mobilevitv2_100")
_DEIT = "deit_small_patch16_224"  # takes only its own size
_VIT = (Images(224, 224), Images(224, 224, 16))
_SWIN, _CONVNEXT = "swin_tiny_patch4_window7_224", "convnext_tiny"
# 1.8 to 2.5 G multiply-adds at 224 around RaftMLP-S, with the same order of blocks or as many stages.
_METAFORMER = ("poolformer_s12", "pvt_v2_b1", "convnext_nano")
# 4.5 G multiply-adds each at 224, like the smallest Mamba hybrids; the last is a hybrid without its scans.
_HYBRID = (_SWIN, _CONVNEXT, "mambaout_tiny")


@dataclass(frozen=True)
class Family:
    """One model of a family, timm models of its size, and the images they see.

    Attributes:
        model: ours.
        peers: names that timm knows.
        cpu: images on a CPU; a quick run takes the first.
        gpu: images on a GPU; a quick run takes the first two.
        targets: what the model should reach.
        training: images of training steps (forward, backward, AdamW), which a full run measures on a CPU, too.
        variants: for names that are not models, timm's name and arguments.
    """

    model: str
    peers: tuple[str, ...]
    cpu: tuple[Images, ...] = _CPU
    gpu: tuple[Images, ...] = _GPU
    targets: tuple[Target, ...] = ()
    training: tuple[Images, ...] = ()
    variants: Mapping[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)

    def model_of(self, name: str) -> tuple[str, dict[str, Any]]:
        """timm's name, and arguments."""
        return self.variants.get(name, (name, {}))


# The backbone of a detector: one map with every position.
_DENSE = dict(features_only=True, norm_outputs=True, out_indices=(11,))
_DEIT_MAP = ("mctf_deit_tiny", dict(r=0, blocks=(), **_DENSE))
_MERGED_MAP = ("mctf_deit_tiny_fast", dict(criteria=(1, 0, 40), cells_first=True, multiple=8, **_DENSE))


def _windows(model: tuple[str, dict[str, Any]], window: int) -> tuple[str, dict[str, Any]]:
    return model[0], dict(window=window, **model[1])


FAMILIES = {
    "asvit": Family(
        "asvit_deit_small",
        ("70, 50 and 35 % kept", _DEIT),
        _VIT,
        variants={"70, 50 and 35 % kept": ("asvit_deit_small", dict(form="fixed"))},
    ),
    "attnet": Family("attnet_xxs", _MOBILE),
    "dinat": Family(
        "dinat_tiny",
        (_SWIN, _CONVNEXT),
        targets=(
            Target("cpu", _SWIN, 0.6),
            Target("cpu", _CONVNEXT, 1.2),
            Target("cuda", _SWIN, 1.15, throughput=True),
        ),
    ),
    "dualtokenvit": Family("dualtokenvit_tiny_mix", _MOBILE),
    "fmvit": Family("fmvit_tiny", _MOBILE),
    # A plain ViT of as many channels and blocks has softmax attention.
    "infvit": Family(
        "infvit_linear_4l_patch16_224",
        ("infvit_pure_4l_patch16_224", "ViT, 4 layers"),
        (*_CPU, Images(1024, 1024)),
        variants={"ViT, 4 layers": ("vit_large_patch16_224", dict(depth=4, dynamic_img_size=True))},
    ),
    # A plain ViT of that width; both take 1.3 G multiply-adds at 224.
    "m3vit": Family("m3vit_tiny", ("deit_tiny_patch16_224",), _VIT),
    # The classifiers' windows of 14 and 7 pad a map of 32 x 32 to 42 x 42; the authors' windows for 512 are 32 and 16.
    "mambavision": Family(
        "mambavision_t",
        (*_HYBRID, "windows of the map"),
        targets=(Target("cuda", _SWIN, 1.1, throughput=True),),
        variants={"windows of the map": ("mambavision_t", dict(window_size=(32, 16), fit_windows=True))},
    ),
    "mctf": Family("mctf_deit_small", ("mctf_deit_small_fast", _DEIT), _VIT),
    "mctf_windows": Family(
        "merging in windows of 16",
        ("merging in windows of 14", "merging", "windows of 16", "windows of 14", "deit_tiny"),
        cpu=(Images(1024, 1024), Images(512, 512), Images(360, 480)),
        gpu=(Images(1024, 1024), Images(1024, 1024, 8), Images(1024, 2048)),
        variants={
            "merging in windows of 16": _windows(_MERGED_MAP, 16),
            "merging in windows of 14": _windows(_MERGED_MAP, 14),
            "merging": _MERGED_MAP,
            "windows of 16": _windows(_DEIT_MAP, 16),
            "windows of 14": _windows(_DEIT_MAP, 14),
            "deit_tiny": _DEIT_MAP,
        },
    ),
    "medmamba": Family("medmamba_t", _HYBRID),
    "mixer_vit": Family("mixer_pyramid_tiny", ("pvt_v2_b1", "pvt_v2_b2_li", "edgenext_base")),
    "raftmlp": Family("raftmlp_s", _METAFORMER),
    "roma": Family("roma_tiny", _HYBRID),
    "s2aformer": Family("s2aformer_mini", _MOBILE),
    "soft": Family("soft_tiny", ("pvt_v2_b1", "resnet18")),
    "vir": Family(
        "vir_small_patch16_224",
        ("retention of maps", "vir_hybrid_tiny", "vit_small"),
        cpu=(*_CPU, Images(1024, 1024)),
        gpu=(Images(224, 224, 128), Images(512, 512, 16), Images(1024, 1024, 4), Images(1024, 2048)),
        variants={
            "retention of maps": ("vir_small_patch16_224", dict(dims=2, directions=4)),
            "vit_small": ("vit_small_patch16_224", dict(dynamic_img_size=True)),
        },
    ),
    "vmamba": Family("vmamba_tiny_s1l8", _HYBRID, training=(Images(224, 224, 8),)),
}


def representatives() -> tuple[str, ...]:
    """The model of each family that its benchmark measures, and Swin, ConvNeXt and DeiT."""
    ours = registered_models()
    found = (FAMILIES[name].model for name in backbones.FAMILIES if name in FAMILIES)
    return (*(name for name in found if name in ours), _SWIN, _CONVNEXT, "deit_tiny_patch16_224")


def requested(models: Sequence[str]) -> tuple[str, ...]:
    """The models that a user names, each once, or without names the representatives.

    Raises:
        InputError: timm knows no model of a name.
    """
    for name in models:
        require_model(name)
    return tuple(dict.fromkeys(models)) or representatives()
