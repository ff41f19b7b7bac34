"""The losses of short trainings, in this process or in several."""

import json
from collections.abc import Callable
from pathlib import Path

from support import distributed_worker
from support.processes import forks


def losses(
    config: str,
    root: Path,
    work_dir: Path,
    options: dict,
    processes: int = 1,
    launch: Callable[[Path, int], None] = forks,
    **arguments,
) -> list[list[float]]:
    """For each process, the loss of each iteration; one process is this one.

    Args:
        config, root, options: as `load_config` takes them.
        work_dir: a folder of its own; it is made.
        launch: given a file of settings and a number, starts so many processes of `distributed_worker.py`.
        arguments: of `build_runner`.
    """
    work_dir.mkdir(exist_ok=True)
    content = {"config": config, "root": str(root), "work_dir": str(work_dir), "options": options}
    content["arguments"] = {"seed": 4, **arguments}
    if processes == 1:
        return [distributed_worker.train(**content)]
    content["arguments"]["launcher"] = "pytorch"
    settings = work_dir / "settings.json"
    settings.write_text(json.dumps(content))
    launch(settings, processes)
    return [json.loads((work_dir / f"losses_{rank}.json").read_text()) for rank in range(processes)]
