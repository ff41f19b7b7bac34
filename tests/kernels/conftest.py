"""A process in which Triton interprets its kernels."""

import concurrent.futures
import importlib
import multiprocessing
import os

import pytest


@pytest.fixture(scope="session")
def interpreted():
    """Calls a function in a process that had TRITON_INTERPRET=1 before it imported triton.

    The function is named as "module.function", a module of `support`; without one it is of `triton_neighborhood`.
    """
    before = {name: os.environ.get(name) for name in ("TRITON_INTERPRET", "OMP_NUM_THREADS")}
    os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            pool.submit(int).result()  # the process starts here, with this environment
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

            def call(name, *args, **kwargs):
                module, _, function = name.rpartition(".")
                function = getattr(importlib.import_module(f"support.{module or 'triton_neighborhood'}"), function)
                return pool.submit(function, *args, **kwargs).result()

            yield call
    finally:
        for name, value in before.items():
            if value is not None:
                os.environ[name] = value
