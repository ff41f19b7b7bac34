"""Whether pictures that are degraded on the fly can be read, and are as large as what is made of them."""

from terrazzo.errors import InputError
from terrazzo.tools.data.checks.folders import built
from terrazzo.tools.data.checks.pictures import Sample, check_pictures
from terrazzo.tools.data.checks.source import Source, and_more

SSIM_WINDOW = 11
"""Pixels on a side of the window of `terrazzo.degradations.quality`, which lies inside the picture."""


def check_degraded(source: Source) -> None:
    """Check the settings and the pictures of a `DegradedPictures`.

    Raises:
        InputError: the degradation or the crop has no meaning, or a picture is damaged or too small.
    """
    dataset = built(source)
    scale, crop = dataset.degradation.scale, dataset.crop
    measured = _measured(scale) if source.evaluated else 0
    if crop is not None and crop < measured:
        raise InputError(f"{source.key}.crop is {crop}, and SSIM needs {measured} pixels on a side; make it larger")
    facts = check_pictures(source, [Sample(path) for path in dataset.files])
    least = max(crop or scale, measured)
    small = [
        (path, fact)
        for path, fact in zip(dataset.files, facts)
        if min(side // scale * scale for side in fact.upright) < least
    ]
    if small:
        path, fact = small[0]
        width, height = fact.upright
        if crop is not None:
            reason = f"less than the crop of {crop}; take it out, or set {source.key}.crop"
        elif measured:
            reason = f"and SSIM needs {measured} on a side; take it out"
        else:
            reason = f"less than the scale of {scale}; take it out"
        raise InputError(
            f"the {source.split} picture {path}{and_more(len(small))} has {width}x{height} pixels, {reason}"
        )


def _measured(scale: int) -> int:
    """The shortest side that PSNR and SSIM are measured on, a multiple of the scale.

    For super-resolution, as many pixels as the scale are left out at each border.
    """
    side = SSIM_WINDOW + (2 * scale if scale > 1 else 0)
    return -(-side // scale) * scale
