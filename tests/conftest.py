"""Before torch is imported: tests share their cores with others, and use several processes at once."""

import os
import time

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as a run sets it; without it cuBLAS has no fixed bits
# A step that torch compiles takes 20 s for its first shape; the one test of that sets its own environment.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

settings.register_profile("stowage", deadline=None)  # by default an example of 0.2 s fails: a busy machine takes that
settings.load_profile("stowage")

BEGAN = time.monotonic()
WORKERS = 8
"""At most; each takes 1 GB, and its tests start up to four ranks."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run folders on all cores, whole files at a time since their tests share what was expensive to make; run single
    files here, where a debugger works and nothing has to start. `-n` decides otherwise."""
    cores, option = len(os.sched_getaffinity(0)), config.option
    folders = all((config.invocation_params.dir / name).is_dir() for name in config.args)
    here = "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.hasplugin("xdist")
    if folders and cores > 1 and not here and option.numprocesses is None and not option.usepdb:
        option.numprocesses, option.dist = min(cores, WORKERS), "loadfile"
        option.loadscopereorder = False  # the files of few tests take longest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="begin no test after so many minutes; those left out are listed")


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() > BEGAN + 60 * minutes:
        pytest.skip(f"{item.nodeid}: not begun within --minutes={minutes:g}")
