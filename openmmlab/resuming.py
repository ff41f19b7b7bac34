"""Checks that a checkpoint fits the run that resumes from it: mmengine loads what fits and ignores the rest."""

import ast
import itertools
from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

from terrazzo.checkpoints.records import arguments, check_changes, recorded
from terrazzo.errors import InputError

NEXT = "leave --resume out and name another --work-dir, or go back to the config that it was trained with"


def check_resumable(runner: Runner, saved: Any, checkpoint: str) -> None:
    """Compares a checkpoint with the model and the optimizer of a runner.

    Args:
        runner: a runner with its optimizer built.
        saved: the content of the checkpoint.
        checkpoint: the file of the checkpoint.

    Raises:
        InputError: if the training state is missing, or weights, optimizer or its parameter groups do not fit.
    """
    state = saved.get("state_dict") if isinstance(saved, dict) else None
    if not isinstance(state, dict) or "optimizer" not in saved:
        raise InputError(
            f"checkpoint {checkpoint} has no {'optimizer' if isinstance(state, dict) else 'state_dict'} to resume; "
            "to start a new run from its weights, leave --resume out and set load_from=FILE"
        )
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    check_changes(model, recorded(saved, checkpoint), checkpoint, arguments)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items() if hasattr(value, "shape")}
    kept = {name.removeprefix("module."): tuple(v.shape) for name, v in state.items() if hasattr(v, "shape")}
    for name in itertools.chain(own, kept):
        if own.get(name) != kept.get(name):
            raise InputError(
                f"checkpoint {checkpoint} has another model: {name} is {_sizes(kept.get(name))} there and "
                f"{_sizes(own.get(name))} in the config; {NEXT}"
            )
    if isinstance(runner.optim_wrapper, OptimWrapper):
        _check_optimizer(runner.optim_wrapper.optimizer, saved, checkpoint)


def _check_optimizer(optimizer: Any, saved: dict, checkpoint: str) -> None:
    own, name = optimizer.param_groups, type(optimizer).__name__
    kept = saved["optimizer"].get("param_groups") or []
    before = _optimizer_of((saved.get("meta") or {}).get("cfg"))
    if before is not None and before != name:
        raise InputError(f"checkpoint {checkpoint} has another optimizer, {before}; the config has {name}; {NEXT}")
    # Between versions, PyTorch adds only flags to its optimizers.
    needed = [key for key, value in own[0].items() if isinstance(value, (float, tuple)) and key != "initial_lr"]
    lacking = [key for key in needed if kept and key not in kept[0]]
    if lacking:
        raise InputError(
            f"checkpoint {checkpoint} has another optimizer: its state has no {' and no '.join(lacking)}, which "
            f"{name} has; {NEXT}"
        )
    counts = [[len(group["params"]) for group in groups] for groups in (kept, own)]
    if counts[0] != counts[1]:
        texts = [f"{len(groups)} group{'s' * (len(groups) != 1)} of {sum(groups)} parameters" for groups in counts]
        raise InputError(
            f"the optimizer in checkpoint {checkpoint} has {texts[0]} and the config's has {texts[1]}; {NEXT}"
        )


def _optimizer_of(text: Any) -> str | None:
    """The type of the optimizer in the text of a config, without running it; None if the text does not name it."""
    try:
        tree = ast.parse(text)
    except (TypeError, ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", None) == "optim_wrapper":
            settings = _argument(_argument(statement.value, "optimizer"), "type")
            return settings.value if isinstance(settings, ast.Constant) and isinstance(settings.value, str) else None
    return None


def _argument(node: ast.AST | None, name: str) -> ast.AST | None:
    """An entry of a dict that is written as `dict(...)` or `{...}`."""
    if isinstance(node, ast.Call):
        return next((keyword.value for keyword in node.keywords if keyword.arg == name), None)
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values)
        return next((value for key, value in pairs if isinstance(key, ast.Constant) and key.value == name), None)
    return None


def _sizes(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a number"
