"""Code in a process of its own, which shares nothing with the tests but has PyTorch and timm already.

Importing both takes four seconds, so a server imports them once and each process is forked from it. A test about the
import of PyTorch or timm, or about a whole process, starts `sys.executable` instead.
"""

import atexit
import concurrent.futures
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path

PRELOADED = ["torch", "timm"]


def run_code(
    code: str,
    *arguments: object,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    stdin: str = "",
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """Like `subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)`.

    Args:
        env: the environment; PyTorch keeps what it read from this process's environment.
        stdin: what the code can read from its standard input.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    arguments = ["-c", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        files[0].write_text(stdin)
        process = context.Process(target=_run, args=(code, arguments, cwd, dict(env or os.environ), files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(code, timeout)
        output = [path.read_text() if path.exists() else "" for path in files[1:]]
        return subprocess.CompletedProcess(arguments, process.exitcode, *output)


def _run(code: str, arguments: list[str], cwd: Path | None, env: dict[str, str], files: list[Path]) -> None:
    """What `python -c` does, after PyTorch and timm were imported."""
    for number, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    sys.argv, sys.stdin = arguments, os.fdopen(0)
    sys.path[:] = ["", *(path for path in sys.path if not path.startswith(str(Path(__file__).parents[1])))]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def forks(settings: Path, processes: int) -> None:
    """Run `distributed_worker.py` in processes with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    code = Path(__file__).with_name("distributed_worker.py").read_text()
    environments = [
        {**os.environ, **address, "WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(processes)
    ]
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        for done in pool.map(lambda environment: run_code(code, settings, env=environment), environments):
            assert done.returncode == 0, done.stderr[-3000:]
