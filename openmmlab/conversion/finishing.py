"""The end of a stage: stop when the stage is done, and write the student that it leaves."""

from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from terrazzo.backbones._hosts import record_of
from terrazzo.checkpoints.records import meta_of
from terrazzo.openmmlab.checkpoint import save_checkpoint
from terrazzo.openmmlab.saving import unwrapped

STUDENT = "student.pth"


@HOOKS.register_module()
class StudentHook(Hook):
    """Writes `student.pth` into the work dir at the end of a conversion's stage that trains more than the student.

    The stage "select" runs two branches in each layer, and adapters stand beside weights. So the checkpoints of these
    trainings serve to resume them. `student.pth` has the plain student, and the record of its mixers: `load_from` of
    the next stage, and `checkpoint` of `TerrazzoBackbone`, take it. With an EMAHook it is the averaged student.

    The hook also ends a training whose stage is done early.
    """

    priority = "LOW"

    def before_train(self, runner: Runner) -> None:
        """Ends a training at once that is resumed after its end."""
        self._end_if_done(runner, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Ends the training after this step if the stage is done."""
        self._end_if_done(runner, runner.iter + 1)

    def after_train(self, runner: Runner) -> None:
        """Writes the student."""
        averaged = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
        model = averaged[0] if averaged else unwrapped(runner.model)
        student = model.stage.finished(model)
        if student is None:
            return
        path = Path(runner.work_dir) / STUDENT
        if is_main_process():
            state = {f"backbone.{name}": value.cpu() for name, value in student.state_dict().items()}
            save_checkpoint({"meta": meta_of(record_of(student)), "state_dict": state}, str(path))
        report = model.stage.report(model)
        print_log(f"{path} has the student{f': {report}' if report else ''}", logger="current")

    def _end_if_done(self, runner: Runner, steps: int) -> None:
        model = unwrapped(runner.model)
        if model.stage.done(model, steps / runner.max_iters):
            runner.train_loop.stop_training = True
