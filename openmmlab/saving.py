"""Checkpoints during training: an old file is removed after the new file is on disk; the newest whole file is found."""

import contextlib
import difflib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmengine.runner
import mmengine.runner.checkpoint
import mmengine.runner.runner
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from terrazzo._files import remove_partial
from terrazzo.backbones._hosts import record_of
from terrazzo.checkpoints.records import arguments, check_changes, meta_of, recorded
from terrazzo.errors import InputError
from terrazzo.openmmlab.checkpoint import check_weights


class _RemovingLater:
    """A file backend that only notes removals and does everything else at once."""

    def __init__(self, backend: Any):
        self.backend = backend
        self.removals: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.removals.append(("remove", path))

    def rmtree(self, path: str) -> None:
        self.removals.append(("rmtree", path))


@HOOKS.register_module(name="CheckpointHook", force=True)
class SafeCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, but it removes outdated checkpoints after it saves, and not before.

    Otherwise, with `max_keep_ckpts=1`, a full disk or a process that dies in between would leave no checkpoint at all.

    A checkpoint also gets the record of the model's mixers and token reduction, and a checkpoint whose record says that
    it is of another model is refused: mmengine would load what fits and ignore the rest.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        known = inspect.signature(Runner.save_checkpoint).parameters
        for name in self.args:  # mmengine's hook passes unknown arguments on at the first checkpoint
            if name not in known:
                names = sorted({*inspect.signature(CheckpointHook).parameters, *known} - {"self", "kwargs", "runner"})
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {close[0]}?" if close else f"its arguments are: {', '.join(names)}"
                raise InputError(f"CheckpointHook has no argument '{name}'; {hint}")

    def before_train(self, runner) -> None:
        """As in mmengine; also removes the partial files that a killed process left."""
        super().before_train(runner)
        if is_main_process():
            remove_partial(Path(self.out_dir))

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Adds the record of the model's mixers and token reduction to `meta`."""
        checkpoint.setdefault("meta", {}).update(meta_of(record_of(unwrapped(runner.model))))

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Compares the checkpoint's record and names with the model; called before the weights are loaded."""
        filename = runner._load_from or find_latest_checkpoint(runner.work_dir)
        check_changes(unwrapped(runner.model), recorded(checkpoint, filename), filename, arguments)
        check_weights(unwrapped(runner.model), checkpoint, filename)

    def _save_checkpoint_with_step(self, runner, step, meta):
        with self._removing_later():
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner, metrics):
        with self._removing_later():
            super()._save_best_checkpoint(runner, metrics)

    @contextlib.contextmanager
    def _removing_later(self) -> Iterator[None]:
        """Does the noted removals at the end, and none after an error."""
        backend, self.file_backend = self.file_backend, _RemovingLater(self.file_backend)
        try:
            yield
            removals = self.file_backend.removals
        finally:
            self.file_backend = backend
        best = [getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()]
        for kind, path in removals:
            if path not in (self.last_ckpt, *best):  # a step that is saved again keeps its name
                getattr(backend, kind)(path)


def unwrapped(model: Any) -> Any:
    """The model of a runner without the wrapper of distributed training."""
    return model.module if is_model_wrapper(model) else model


def find_latest_checkpoint(path: str) -> str | None:
    """The newest checkpoint of a work dir.

    The file `last_checkpoint` names it. If a kill or a full disk spoilt that file, it is the `epoch_N.pth` or
    `iter_N.pth` that was written last.

    Args:
        path: the work dir.

    Returns:
        A file, or None if there is none.
    """
    note = Path(path) / "last_checkpoint"
    named = note.read_text().strip() if note.is_file() else ""
    if named and ("://" in named or Path(named).exists()):
        return named
    found = [file for file in Path(path).glob("*.pth") if re.fullmatch(r"(epoch|iter)_\d+\.pth", file.name)]
    return str(max(found, key=lambda file: file.stat().st_mtime)) if found else None


def install() -> None:
    """Makes mmengine look for the latest checkpoint in this way."""
    for module in (mmengine.runner, mmengine.runner.runner, mmengine.runner.checkpoint):
        module.find_latest_checkpoint = find_latest_checkpoint
