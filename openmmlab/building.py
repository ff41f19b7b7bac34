"""Building the parts of a runner: wrong settings give one line, and nothing is left behind."""

import contextlib
import difflib
import importlib.util
import inspect
import io
import re
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import mmengine.registry
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.registry import OPTIMIZERS, Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader, IterableDataset

from terrazzo.errors import InputError, TerrazzoError
from terrazzo.openmmlab.seeding import seeded

GIVEN = "_given_options"
"""The attribute of a config that holds the options which `load_config` applied to it."""

PARTS = {
    "setup_env": "env_cfg",
    "set_randomness": "randomness",
    "build_log_processor": "log_processor",
    "build_logger": "log_level",
    "build_visualizer": "visualizer",
    "build_model": "model",
    "wrap_model": "model_wrapper_cfg",
    "register_default_hooks": "default_hooks",
    "register_custom_hooks": "custom_hooks",
    "build_train_loop": "train_cfg",
    "build_val_loop": "val_cfg",
    "build_test_loop": "test_cfg",
    "build_dataloader": "{split}_dataloader",
    "build_evaluator": "{split}_evaluator",
    "build_optim_wrapper": "optim_wrapper",
    "scale_lr": "auto_scale_lr",
    "_check_scheduler_cfg": "param_scheduler",
    "build_param_scheduler": "param_scheduler",
}
"""The setting that each of the runner's methods builds from."""

SETTINGS = {name.format(split=split) for name in PARTS.values() for split in ("train", "val", "test")}

PACKAGES = {
    "AimVisBackend": ("aim",),
    "ClearMLVisBackend": ("clearml",),
    "DVCLiveVisBackend": ("dvclive",),
    "MLflowVisBackend": ("mlflow",),
    "NeptuneVisBackend": ("neptune",),
    "TensorboardVisBackend": ("tensorboard", "tensorboardX"),
    "WandbLog": ("wandb",),
    "WandbVisBackend": ("wandb",),
}
"""For each backend of the visualizer, packages; it needs any of them, and looks for it when it first logs a value."""

LONGEST = 400
"""How many characters of a cause are shown: some texts hold whole settings."""

_RUNNER_METHOD = re.compile(r"^Runner\.(\w+)\(\) ")
_UNKNOWN_TYPE = re.compile(r"^(\S+) is not in the (\S+)::(.+?) registry\. .*")
_UNKNOWN_ARGUMENT = re.compile(r"unexpected keyword argument '(\w+)'")


@contextlib.contextmanager
def building(cfg: Config, part: str = "runner") -> Iterator[None]:
    """Turns whatever goes wrong while parts of a config are built into one line.

    Args:
        cfg: the config.
        part: what is built, if the runner's methods do not say so.

    Raises:
        InputError: it names the setting, the cause, names close to an unknown name, and the options given for the
            setting.
    """
    try:
        yield
    except TerrazzoError:
        raise
    except Exception as error:  # a registry's look-ups and the parts' constructors fail in every way
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        methods = [frame.f_code.co_name for frame in frames] + _RUNNER_METHOD.findall(str(error))
        part = _part(methods) or part
        options = _blamed(vars(cfg).get(GIVEN) or {}, part, str(error))
        raise InputError(
            f"the {part} of {cfg.filename} cannot be built: {named(error)}{_hint(error, frames)}"
            + (f"; the options say {options}" if options else "")
        ) from error


def named(error: BaseException) -> str:
    """The type of an error and its text, in one line and without mmengine's advice."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split())
    text = _UNKNOWN_TYPE.sub(r"'\1' is not in the registry \2::\3", text)
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def check_visualizer(cfg: Config) -> None:
    """Checks that the packages of the visualizer's backends are installed.

    Raises:
        InputError: if a package is missing; the message names it.
    """
    for backend in (cfg.get("visualizer") or {}).get("vis_backends") or []:
        kind = backend.get("type") if isinstance(backend, Mapping) else None
        names = PACKAGES.get(kind, ())
        if names and not any(importlib.util.find_spec(name) for name in names):
            raise InputError(
                f"visualizer.vis_backends names {kind}, and the package {' or '.join(names)} is not installed; "
                f"install it with: pip install {names[0]}, or leave the backend out"
            )


def build_parts(runner: Runner, training: bool) -> None:
    """Builds the parts that mmengine builds when a run starts: loops, data, evaluators, optimizer, schedules.

    Args:
        runner: it is changed in place, so that `runner.train()` or `runner.test()` goes on from there.
        training: whether it will train; if not, it will test.
    """
    if not training:
        runner._test_loop = runner.build_test_loop(runner._test_loop)
        _prepare_one(runner, "test", runner.test_dataloader)
        return
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    _check_optimizer(runner.optim_wrapper, runner.cfg)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    for wrapper in runner.optim_wrapper.values() if isinstance(runner.optim_wrapper, dict) else [runner.optim_wrapper]:
        with building(runner.cfg, "optim_wrapper.clip_grad"):
            if getattr(wrapper, "clip_grad_kwargs", None):
                arguments = inspect.signature(wrapper.clip_func)
                arguments.bind_partial([], **wrapper.clip_grad_kwargs)  # this raises for unknown arguments first
                arguments.bind([], **wrapper.clip_grad_kwargs)
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    runner.auto_scale_lr = None  # otherwise mmengine would scale it again
    if runner.param_schedulers is not None:
        runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    if runner._val_loop is not None:
        runner._val_loop = runner.build_val_loop(runner._val_loop)
        _prepare_one(runner, "val", runner.val_dataloader)
    _prepare_one(runner, "train", runner.train_dataloader)


def _check_optimizer(settings: Any, cfg: Config) -> None:
    """Looks the optimizer up: mmengine would only say that None cannot be called."""
    optimizer = settings.get("optimizer") if isinstance(settings, dict) else None
    kind = optimizer.get("type") if isinstance(optimizer, dict) else None
    if isinstance(kind, str) and registered_class(OPTIMIZERS, optimizer, cfg) is None:
        raise InputError(f"optim_wrapper.optimizer.type '{kind}' is unknown{_close(kind, _registered('optimizer'))}")


def _prepare_one(runner: Runner, split: str, loader: DataLoader) -> None:
    """Prepares a sample, because the steps of a pipeline check some of their arguments only then."""
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset) and len(loader.dataset):
        with building(runner.cfg, f"first sample of {split}_dataloader"), seeded(0):
            loader.dataset[0]


def registered_class(registry: Registry, settings: Mapping, cfg: Config) -> type | None:
    """The class that settings name in `type`, in their scope or the config's; None if no registry has it.

    Args:
        registry: a root of mmengine's registries, such as `DATASETS`; it leads to mmdet's and mmseg's.
        settings: the settings of what the registry builds.
        cfg: the config that holds them.
    """
    kind = settings.get("type")
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(settings.get("_scope_") or cfg.get("default_scope", "mmengine")) as scoped:
        return scoped.get(kind)


@contextlib.contextmanager
def undone_on_failure(work_dir: Path) -> Iterator[None]:
    """Holds back the block's output until it ends, and restores the work dir after a failure.

    mmengine makes the folder, begins a log in it and writes the config before it builds most parts.
    """
    there = {path: path.read_bytes() if path.suffix == ".py" else None for path in _entries(work_dir)}
    made = next((path for path in (*reversed(work_dir.parents), work_dir) if not path.exists()), None)
    held = _Held(sys.stdout)
    try:
        with contextlib.redirect_stdout(held):
            yield
    except BaseException:
        if is_main_process():
            for path in _entries(work_dir):
                if path not in there:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                elif there[path] is not None:
                    path.write_bytes(there[path])
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
        raise
    held.release()


class _Held(io.TextIOBase):
    """Text that waits until it is released; later text passes through, because a logger keeps its stream."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.waiting: list[str] | None = []

    def write(self, text: str) -> int:
        if self.waiting is None:
            return self.stream.write(text)
        self.waiting.append(text)
        return len(text)

    def flush(self) -> None:
        if self.waiting is None:
            self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def release(self) -> None:
        """Writes the waiting text."""
        waiting, self.waiting = self.waiting or [], None
        self.stream.write("".join(waiting))


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _part(methods: list[str]) -> str | None:
    """The setting that the innermost method of the runner builds from; None if there is no method."""
    split = next((name.split("_")[1] for name in reversed(methods) if re.fullmatch(r"build_\w+_loop", name)), "train")
    return next((PARTS[name].format(split=split) for name in reversed(methods) if name in PARTS), None)


def _hint(error: BaseException, frames: list[Any]) -> str:
    """Close names of a type or an argument that is unknown."""
    text = " ".join(str(error.args[0] if error.args else "").split())
    if found := _UNKNOWN_TYPE.match(text):
        name, known = found.group(1), _registered(found.group(3))
    elif isinstance(error, TypeError) and (found := _UNKNOWN_ARGUMENT.search(text)):
        name, known = found.group(1), _arguments(frames)
    else:
        return ""
    return _close(name, known)


def _close(name: str, known: Mapping[str, str] | set[str]) -> str:
    """A clause with the names of `known` close to a name, or with the scope in which `known` has the name."""
    if name in known and isinstance(known, Mapping):
        return f"; {known[name]} has it: set default_scope={known[name]}, or write {known[name]}.{name}"
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _registered(kind: str) -> dict[str, str]:
    """The names in all registries of a kind, such as "optimizer", and the scope of each."""

    def names(registry: Registry) -> dict[str, str]:
        found = dict.fromkeys(registry._module_dict, registry.scope)
        for child in registry._children.values():
            found = names(child) | found
        return found

    found: dict[str, str] = {}
    for root in vars(mmengine.registry).values():
        if isinstance(root, Registry) and root.name == kind:
            found |= names(root)
    return found


def _blamed(given: Mapping[str, Any], part: str, text: str) -> str:
    """The options that may have caused an error in a part of a config: the options in the error's text, or else all."""
    # A variable of the config, such as train_pipeline, can be anywhere.
    tops = {key: key.split(".")[0] for key in given}
    near = [key for key, top in tops.items() if top in part]
    near += [key for key, top in tops.items() if top not in SETTINGS and key not in near]
    spoken = [key for key in near if key.split(".")[-1] in text or str(given[key]) in text]
    return " ".join(f"{key}={given[key]}" for key in spoken or near)


def _arguments(frames: list[Any]) -> set[str]:
    """The arguments of the class that was being built last."""
    kind: Any = Runner.set_randomness
    for frame in frames:
        if frame.f_code.co_name == "build_dataloader":
            kind = DataLoader
        elif frame.f_code.co_name == "build_from_cfg":
            kind = frame.f_locals.get("obj_cls", kind)
        elif frame.f_code.co_name == "bind_partial":
            kind = frame.f_locals["self"]
    if isinstance(kind, inspect.Signature):
        return set(kind.parameters)
    bases = inspect.getmro(kind) if inspect.isclass(kind) else (kind,)
    found: set[str] = set()
    for base in bases:
        with contextlib.suppress(TypeError, ValueError):
            found |= set(inspect.signature(base.__init__ if inspect.isclass(base) else base).parameters)
    return found - {"self", "args", "kwargs"}
