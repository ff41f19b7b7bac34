"""The data loaders' worker processes at the end of a run."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


def end_workers(runner: Runner) -> None:
    """Ends the worker processes that loaders keep from epoch to epoch; a loader that is used again starts new ones.

    The garbage collector would wait five seconds for each worker: it collects a whole runner, and closes the queues
    that tell workers to end before PyTorch writes to them.
    """
    for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
        loader = getattr(loop, "dataloader", None)  # a loop that never ran is a dict of settings
        for holder in (loader, getattr(loop, "dataloader_iterator", None)):
            if getattr(holder, "_iterator", None) is not None:
                holder._iterator = None


@HOOKS.register_module()
class WorkersHook(Hook):
    """Ends worker processes when a run is over; see `end_workers`."""

    priority = "LOWEST"

    def after_run(self, runner: Runner) -> None:
        end_workers(runner)
