"""The model that the wheel of mmaction2 1.2.0 names and lacks: with it in place, all other models can be imported."""

from mmengine.registry import MODELS

from terrazzo.errors import BackendError


@MODELS.register_module()
class DRN:
    """Refuses to be built."""

    def __init__(self, *args, **kwargs):
        raise BackendError(
            "the wheel of mmaction2 1.2.0 lacks the model DRN; install mmaction2 from its repository, or choose "
            "another model"
        )
