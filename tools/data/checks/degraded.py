"""Whether pictures that are degraded on the fly can be read, and are as large as their crops."""

from terrazzo.errors import InputError
from terrazzo.tools.data.checks.folders import built
from terrazzo.tools.data.checks.pictures import Sample, check_pictures
from terrazzo.tools.data.checks.source import Source, and_more


def check_degraded(source: Source) -> None:
    """Check the settings and the pictures of a `DegradedPictures`.

    Raises:
        InputError: the degradation or the crop has no meaning, or a picture is damaged or too small.
    """
    dataset = built(source)
    scale = dataset.degradation.scale
    least = dataset.crop or scale
    facts = check_pictures(source, [Sample(path) for path in dataset.files])
    small = [
        (path, fact)
        for path, fact in zip(dataset.files, facts)
        if min(side // scale * scale for side in fact.upright) < least
    ]
    if small:
        path, fact = small[0]
        width, height = fact.upright
        raise InputError(
            f"the {source.split} picture {path}{and_more(len(small))} has {width}x{height} pixels, less than the crop "
            f"of {least}; take it out, or set {source.key}.crop"
        )
