"""Finds, reads and adjusts a config, and builds its runner; every training command needs this."""

import contextlib
import copy
import difflib
import importlib
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mmengine.utils
import torch
from mmengine.config import Config, ConfigDict
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import DATASETS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings

from terrazzo.errors import InputError
from terrazzo.openmmlab.building import (
    GIVEN,
    build_parts,
    building,
    check_visualizer,
    named,
    registered_class,
    undone_on_failure,
)
from terrazzo.openmmlab.checkpoint import load_file
from terrazzo.openmmlab.distributed import launch
from terrazzo.openmmlab.monitoring import check_formats, check_monitored, expected_metrics
from terrazzo.openmmlab.options import carry_options, merge_options
from terrazzo.openmmlab.options import parse_options as parse_options
from terrazzo.openmmlab.resuming import check_resumable
from terrazzo.openmmlab.saving import find_latest_checkpoint
from terrazzo.openmmlab.seeding import configured_ranks, seed_config

CONFIG_ROOT = Path(__file__).resolve().parent.parent / "configs"
"""The folder of the packaged configs."""

SPLITS = ("train", "val", "test")
LISTS = ("param_scheduler", "val_evaluator", "test_evaluator", "custom_hooks")
BUILT = (
    *("model", "train_cfg", "val_cfg", "test_cfg", "train_dataloader", "val_dataloader", "test_dataloader"),
    *("optim_wrapper", "default_hooks", "visualizer", "env_cfg", "randomness", *LISTS),
)
"""The parts that the runner builds from settings, and whether each may be a list of settings."""

OWN_HOOKS = ("SeedingHook", "FiniteLossHook", "ThroughputHook", "MonitoredMetricsHook", "WorkersHook")
HEADS = ("decode_head", "auxiliary_head", "bbox_head", "mask_head", "panoptic_head", "panoptic_fusion_head")

OTHER_CLASSES = ("STDCHead",)
"""Heads with other classes than the data set's: this head separates edges from the rest."""


def packaged_configs() -> dict[str, Path]:
    """Maps the bare name of every packaged config (its file name without `.py`) to its path."""
    return {path.stem: path for path in sorted(CONFIG_ROOT.rglob("*.py")) if "_base_" not in path.parts}


def find_config(path_or_name: str | Path) -> Path:
    """Resolves a config by its file path, by its bare name among the packaged configs, or as `mmdet::FOLDER/NAME.py`.

    Args:
        path_or_name: any of these; `mmseg::` and `terrazzo::` work, too, and `.py` may be left out.

    Raises:
        InputError: if neither a file nor a packaged config matches; the message lists close names.
    """
    if "::" in str(path_or_name):
        return _config_of_package(str(path_or_name))
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    known = packaged_configs()
    name = path.name.removesuffix(".py")
    if name in known and (str(path_or_name) in (name, f"{name}.py") or _is_tail(path, known[name])):
        return known[name]
    if path.is_dir():
        raise InputError(f"config '{path_or_name}' is a folder; name a file in it")
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(close)}?" if close else f"packaged configs are: {', '.join(known)}"
    raise InputError(f"there is no config file or packaged config '{path_or_name}'; {hint}")


def _config_of_package(address: str) -> Path:
    """Resolves `PACKAGE::PATH`, mmengine's way to name the configs of another package."""
    package, _, rest = address.partition("::")
    if package == "terrazzo":
        return find_config(rest)
    if package not in MODULE2PACKAGE:
        raise InputError(f"config '{address}': no package is called '{package}'; name mmdet, mmseg or terrazzo")
    try:
        folder = Path(mmengine.utils.get_installed_path(MODULE2PACKAGE[package])) / ".mim" / "configs"
    except Exception as error:  # it depends on who looks packages up
        raise InputError(f"config '{address}': {MODULE2PACKAGE[package]} is not installed; install it") from error
    path = folder / (rest if rest.endswith(".py") else f"{rest}.py")
    if path.is_file():
        return path
    known = {file.stem: file.relative_to(folder) for file in folder.rglob("*.py")}
    close = difflib.get_close_matches(path.stem, known, n=3)
    hint = f"did you mean {', '.join(f'{package}::{known[name]}' for name in close)}?" if close else f"see {folder}"
    raise InputError(f"{package} has no config '{rest}'; {hint}")


def _is_tail(path: Path, full: Path) -> bool:
    """Whether `full` ends with the parts of `path`, so that `configs/detection/x.py` is found from any folder."""
    return not path.is_absolute() and full.parts[-len(path.parts) :] == path.parts


def load_config(
    path_or_name: str | Path, data_root: str | Path | None = None, options: Mapping[str, Any] | None = None
) -> Config:
    """Reads a config, moves its data folder, applies options, checks class counts and sets the default scope.

    Args:
        path_or_name: a config file, or the bare name of a packaged config.
        data_root: the folder of the data set; replaces the config's folder at the start of every path.
        options: dotted keys to values, such as `{"train_dataloader.batch_size": 2}`; they are applied after
            `data_root`. The key `data_root` among them acts as the argument does.

    Raises:
        InputError: if the config is unknown or cannot be parsed, an option does not fit, or class counts disagree.
    """
    import terrazzo.openmmlab  # noqa: F401  prepares mmengine to read `_base_` of another package

    path = find_config(path_or_name)
    cfg = _read(path)
    options = dict(options or {})
    data_root = options.pop("data_root", None) if data_root is None else data_root
    cfg = carry_options(cfg, options, lambda: _read(path))
    if data_root is not None:
        set_data_root(cfg, str(data_root))
    merge_options(cfg, options)
    if "custom_imports" in {key.split(".")[0] for key in options}:
        with importable(path.parent):
            _import_custom(cfg)
    for key in list(cfg.keys()):
        cfg[key] = _map_leaves(cfg[key], _at_home)
    vars(cfg)[GIVEN] = options
    _settle_workers(cfg)
    _check_kinds(cfg)
    check_inference(cfg)
    check_class_counts(cfg)
    if cfg.get("default_scope"):
        init_default_scope(cfg.default_scope)
    return cfg


def _check_kinds(cfg: Config) -> None:
    """Checks that the parts that the runner builds have settings.

    Raises:
        InputError: if a part has a number or text instead.
    """
    for key in BUILT:
        value = cfg.get(key)
        if value is not None and not isinstance(value, (dict, list, tuple) if key in LISTS else dict):
            raise InputError(f"{key} of config '{cfg.filename}' is {value!r}; set {key}.KEY=VALUE")


def _read(path: Path) -> Config:
    """Reads a config file and imports what it names in `custom_imports`, also from the config's folder.

    Raises:
        InputError: if it cannot be read.
    """
    with importable(path.parent):
        try:
            cfg = Config.fromfile(path, import_custom_modules=False)
        except InputError:
            raise
        except Exception as error:  # a config is code: it can raise anything
            raise InputError(f"config '{path}' cannot be read: {named(error)}") from error
        _import_custom(cfg)
    return cfg


def _import_custom(cfg: Config) -> None:
    """Imports what a config names in `custom_imports`."""
    custom = cfg.get("custom_imports")
    if not custom:
        return
    try:
        import_modules_from_strings(**custom)
    except Exception as error:  # this runs the user's code
        cause = error.__context__ if type(error) is ImportError and error.__context__ else error
        raise InputError(
            f"custom_imports of config '{cfg.filename}' cannot be imported: {named(cause)}; put your module "
            "beside the config or in a folder of PYTHONPATH"
        ) from error


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Lets modules of a folder be imported, after all other modules.

    The folder stays in `sys.path` if one of its modules was imported: newly started worker processes import it again.
    """
    place = str(folder.resolve())
    if place in sys.path:
        yield
        return
    before = set(sys.modules)
    sys.path.append(place)
    importlib.invalidate_caches()  # the module may be younger than the last look into its folder
    try:
        yield
    finally:
        new = [sys.modules[name] for name in set(sys.modules) - before]
        if not any(Path(getattr(module, "__file__", None) or "/").is_relative_to(place) for module in new):
            sys.path.remove(place)


def check_inference(cfg: Config) -> None:
    """Checks the inference mode of an mmseg segmentor.

    Raises:
        InputError: if `model.test_cfg` has another mode than "whole" and "slide", or "slide" without a window.
    """
    model = cfg.get("model") or {}
    test = model.get("test_cfg") or {}
    if "decode_head" not in model or not isinstance(test, dict):
        return
    mode = test.get("mode", "whole")
    if mode not in ("whole", "slide"):
        raise InputError(f"model.test_cfg.mode is '{mode}'; choose whole or slide")
    if mode == "whole":
        return
    for key in ("crop_size", "stride"):
        value = test.get(key)
        pair = isinstance(value, (list, tuple)) and len(value) == 2
        if not pair or not all(isinstance(side, int) and side > 0 for side in value):
            raise InputError(
                f"model.test_cfg.mode=slide needs the height and width of its window and of its steps in pixels, and "
                f"model.test_cfg.{key} is {value}; set it, such as model.test_cfg.{key}=(512,512)"
            )
    if any(step > side for step, side in zip(test["stride"], test["crop_size"])):
        raise InputError(
            f"model.test_cfg.stride {tuple(test['stride'])} is larger than crop_size {tuple(test['crop_size'])}, so "
            "that the windows leave pixels out; make it smaller"
        )


def set_data_root(cfg: Config, data_root: str) -> None:
    """Replaces the data folder of a config, in place, at the start of every dataset and evaluator path.

    Raises:
        InputError: if the config has no top-level `data_root` and its datasets do not share one.
    """
    old = cfg.get("data_root")
    if old is None:
        found = {dataset["data_root"] for dataset in datasets(cfg) if dataset.get("data_root")}
        if len(found) != 1:
            raise InputError(
                f"config has no single data_root to replace (found {sorted(found)}); set the paths through options, "
                "such as train_dataloader.dataset.data_root=DIR"
            )
        old = found.pop()
    old, new = str(old).rstrip("/"), data_root.rstrip("/") or "/"

    def moved(value: Any) -> Any:
        if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
            return new + value[len(old) :]
        return value

    for key in list(cfg.keys()):
        cfg[key] = _map_leaves(cfg[key], moved)
    cfg.data_root = new


def check_class_counts(cfg: Config) -> None:
    """Compares every head's class count with the classes of the training set, from the config or the data set.

    Raises:
        InputError: if a head has another count; the message names both.
    """
    if "model" not in cfg or "language_model" in cfg.model:  # a language model gets the classes as words
        return
    metainfo = next((d["metainfo"] for d in datasets(cfg) if (d.get("metainfo") or {}).get("classes")), None)
    whose, step = "the data set has", "make them equal"
    if metainfo is None:
        key, settings = next(placed_datasets(cfg), ("", {}))
        metainfo = getattr(registered_class(DATASETS, settings, cfg), "METAINFO", None) or {}
        whose = f"{settings.get('type')} has, unless {key}.metainfo.classes names others,"
        step = "name the classes in metainfo of every data set, or change the head"
    for where, kind, count in _head_counts(cfg.model, "model"):
        names = metainfo.get(kind)
        if names is not None and count != len(names):
            raise InputError(
                f"{where} is {count}, but {whose} {len(names)} {kind.replace('_', ' ')} "
                f"({', '.join(map(str, names[:8]))}{', ...' if len(names) > 8 else ''}); {step}"
            )


def build_runner(
    cfg: Config,
    work_dir: str | Path,
    resume: bool | str | Path = False,
    load_from: str | Path | None = None,
    seed: int | None = None,
    amp: str | None = None,
    accumulate: int = 1,
    launcher: str = "none",
    sharded: bool = False,
    spatial: int = 1,
    scale_lr: bool = False,
    purpose: str | None = None,
) -> Runner:
    """Builds mmengine's runner for a config, with terrazzo's hooks.

    The hooks are for exact resuming, finite losses, images per second, and worker processes that end with the run. If
    building fails, `work_dir` stays unchanged.

    Args:
        cfg: what `load_config` returned; it is copied, not changed.
        work_dir: the folder for checkpoints and logs.
        resume: True continues from the last checkpoint in `work_dir`, if there is one; a path continues from that file.
        load_from: a checkpoint to load weights from before training or testing.
        seed: the seed for weights, data order and augmentation; a resumed run keeps the seed that it had.
        amp: "fp16" or "bf16" for automatic mixed precision.
        accumulate: how many batches go into one step of the optimizer.
        launcher: the launcher that started the processes; see `terrazzo.openmmlab.distributed.LAUNCHERS`.
        sharded: whether to divide the model among the processes, rather than copy it.
        spatial: how many consecutive processes share the rows of each training image.
        scale_lr: whether to scale the learning rate by the batch size, from the config's `auto_scale_lr`.
        purpose: "train" or "test" builds all parts for it at once, so that errors appear before it starts; None leaves
            it to mmengine, which builds each part when it is used.

    Raises:
        InputError: if a named checkpoint does not exist or does not fit the run, or a part cannot be built.
    """
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = str(work_dir)
    cfg.resume = bool(resume)
    source = load_from if isinstance(resume, bool) else resume
    if source is not None:
        cfg.load_from = str(source)
    elif resume and find_latest_checkpoint(str(work_dir)):
        cfg.load_from = None  # the run started from it; mmengine would load it again
    if cfg.get("load_from") and "://" not in cfg.load_from and not Path(cfg.load_from).is_file():
        raise InputError(f"checkpoint '{cfg.load_from}' does not exist; name a .pth file")
    saved = None
    latest = (source or find_latest_checkpoint(str(work_dir))) if resume else None
    if latest and "://" not in str(latest):
        # The data order is drawn before mmengine reads the checkpoint's seed; a damaged checkpoint is also refused
        # here.
        saved = load_file(latest, "cpu")
        meta = saved.get("meta") if isinstance(saved, dict) else None
        seed = (meta or {}).get("seed") if seed is None else seed
    if seed is not None:
        cfg.randomness = {**(cfg.get("randomness") or {}), "seed": seed}
    if "optim_wrapper" in cfg:
        _set_precision(cfg, amp)
        if accumulate > 1:
            cfg.optim_wrapper.accumulative_counts = accumulate
    if scale_lr:
        if not (cfg.get("auto_scale_lr") or {}).get("base_batch_size"):
            raise InputError("the config has no auto_scale_lr.base_batch_size to scale the learning rate from; add it")
        cfg.auto_scale_lr.enable = True
    check_visualizer(cfg)
    if purpose is not None:
        check_formats(cfg, "val_evaluator" if purpose == "train" else "test_evaluator")
    seed_config(cfg)
    hooks = list(cfg.get("custom_hooks") or [])
    present = [hook.get("type") for hook in hooks]
    cfg.custom_hooks = hooks + [dict(type=name) for name in OWN_HOOKS if name not in present]
    if spatial > 1:
        if sharded:
            raise InputError("--fsdp divides the model and --spatial divides images: leave one of them out")
        if launcher == "none":
            raise InputError(f"--spatial {spatial} needs several processes; add --launcher pytorch")
    if spatial > 1 or configured_ranks(cfg) > 1:
        from terrazzo.openmmlab.spatial import spatial_config

        spatial_config(cfg, spatial)
    if sharded:
        from terrazzo.openmmlab.sharded import shard_config

        shard_config(cfg)
    launch(cfg, launcher)
    # Runners share their histories and their visualizer by name, and mmengine's names repeat within a second.
    stem = cfg.get("experiment_name") or (Path(cfg.filename).stem if cfg.filename else "terrazzo")
    cfg.experiment_name = f"{stem}_{uuid.uuid4().hex[:8]}"
    if cfg.get("visualizer"):
        cfg.visualizer.name = cfg.experiment_name
    with undone_on_failure(Path(work_dir)), building(cfg):
        kind = cfg.get("runner_type", "Runner")
        if RUNNERS.get(kind) is None:
            raise InputError(f"runner_type '{kind}' is unknown; choose from {', '.join(RUNNERS.module_dict)}")
        runner = RUNNERS.get(kind).from_cfg(cfg)
        if purpose is not None:
            build_parts(runner, training=purpose == "train")
            _check_parts(runner, training=purpose == "train")
        if saved is not None and purpose == "train" and not sharded:
            check_resumable(runner, saved, str(latest))
    return runner


def _check_parts(runner: Runner, training: bool) -> None:
    """Checks the metrics of a runner after its parts are built."""
    if not training:
        expected_metrics(runner.test_evaluator)
    elif runner._val_loop is not None:
        check_monitored(runner)


def _set_precision(cfg: Config, amp: str | None) -> None:
    """Chooses the optimizer's wrapper for a precision.

    Raises:
        InputError: if the precision is unknown, or this machine does not have it.
    """
    if amp is None:
        return
    if amp == "bf16":
        cfg.optim_wrapper.type = "Bfloat16OptimWrapper"
        cfg.optim_wrapper.pop("loss_scale", None)
    elif amp == "fp16":
        if not torch.cuda.is_available():
            raise InputError("--amp fp16 needs a GPU, and PyTorch sees none here; use --amp bf16, or leave it out")
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.dtype = "float16"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    else:
        raise InputError(f"precision '{amp}' is unknown; choose fp16 or bf16")


def datasets(cfg: Config, *splits: str) -> Iterator[ConfigDict]:
    """Yields the settings of the innermost data sets of splits, inside RepeatDataset, ConcatDataset and similar.

    Args:
        cfg: a config.
        *splits: any of "train", "val" and "test"; all if empty.
    """
    for _, settings in placed_datasets(cfg, *splits):
        yield settings


def placed_datasets(cfg: Config, *splits: str) -> Iterator[tuple[str, ConfigDict]]:
    """Yields the same as `datasets`, each with its dotted key in the config."""
    for split in splits or SPLITS:
        yield from _innermost(f"{split}_dataloader.dataset", (cfg.get(f"{split}_dataloader") or {}).get("dataset"))


def _innermost(key: str, dataset: Any) -> Iterator[tuple[str, ConfigDict]]:
    if isinstance(dataset, (list, tuple)):
        for index, part in enumerate(dataset):
            yield from _innermost(f"{key}.{index}", part)
    elif isinstance(dataset, dict):
        inner = next((name for name in ("dataset", "datasets") if dataset.get(name)), None)
        if inner is None:
            yield key, dataset
        else:
            yield from _innermost(f"{key}.{inner}", dataset[inner])


def _head_counts(model: Mapping, where: str, kind: str = "classes") -> Iterator[tuple[str, str, int]]:
    """Yields, for every head of a model, the key of its class count, what it counts, and the count.

    Args:
        model: the settings of a model or of a part of it.
        where: their place in the config.
        kind: what `num_classes` counts there: "classes", or "thing_classes": the classes with boxes in panoptic data.
    """
    if model.get("type") == "Classifier" and isinstance(model.get("backbone"), dict):
        count = model["backbone"].get("num_classes")
        if count is not None:
            yield f"{where}.backbone.num_classes", kind, count
    for key in HEADS:
        heads = model.get(key)
        for index, head in enumerate(heads if isinstance(heads, (list, tuple)) else [heads]):
            if not isinstance(head, dict) or head.get("type") in OTHER_CLASSES:
                continue
            place = f"{where}.{key}[{index}]" if isinstance(heads, (list, tuple)) else f"{where}.{key}"
            if head.get("num_classes") is not None:
                yield f"{place}.num_classes", kind, head["num_classes"]
            if head.get("num_things_classes") is not None and head.get("num_stuff_classes") is not None:
                things, stuff = head["num_things_classes"], head["num_stuff_classes"]
                yield f"{place}.num_things_classes", "thing_classes", things
                yield f"{place}.num_things_classes + num_stuff_classes", "classes", things + stuff
    if isinstance(model.get("roi_head"), dict):
        boxes = "thing_classes" if "panoptic_fusion_head" in model else kind
        yield from _head_counts(model["roi_head"], f"{where}.roi_head", boxes)


def _at_home(value: Any) -> Any:
    """A path with a leading `~` expanded; any other value unchanged."""
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def _settle_workers(cfg: Config) -> None:
    """Turns off persistent workers if an option set `num_workers` to 0: PyTorch refuses both together."""
    for split in SPLITS:
        loader = cfg.get(f"{split}_dataloader")
        if loader and loader.get("num_workers") == 0:
            loader["persistent_workers"] = False


def _map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Applies a function to every leaf of nested dicts, lists and tuples; dicts and lists are changed in place."""
    if isinstance(value, dict):
        for key in list(value):
            value[key] = _map_leaves(value[key], function)
        return value
    if isinstance(value, list):
        value[:] = [_map_leaves(item, function) for item in value]
        return value
    if isinstance(value, tuple):
        return tuple(_map_leaves(item, function) for item in value)
    return function(value)
