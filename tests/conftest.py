"""Before jax starts: the CPU, no network, programs compiled fast rather than well, and one store of them a session.

The store is new for every session, and shared by its workers and their children: it only spares compiling the same tiny
step twice, and is still counted.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
_OURS = "JAXCL_TEST_STORE" not in os.environ  # not a worker, whose session has made it already
if _OURS:
    os.environ["JAXCL_TEST_STORE"] = tempfile.mkdtemp(prefix="jaxcl-tests-")
_STORE = os.environ["JAXCL_TEST_STORE"]
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_COMPILATION_CACHE_DIR"] = _STORE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_unconfigure() -> None:
    if _OURS:
        shutil.rmtree(_STORE, ignore_errors=True)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A command run in this process may set what libraries read (`plan`, `--data`): the next test finds none of it."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)
