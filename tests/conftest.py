"""Before jax starts: the CPU, no network, and one store of compiled programs for the session and its children.

The store is new for every session: it only spares compiling the same tiny step twice, and is still counted.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
_STORE = tempfile.mkdtemp(prefix="jaxcl-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _STORE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_unconfigure() -> None:
    shutil.rmtree(_STORE, ignore_errors=True)


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Compile fast rather than well, for modules that compile many tiny steps."""
    # jit does not ask how a program was compiled: without this, one compiled well before the module would be used in
    # it, and its last bits are not those of a child process that compiles fast from the start.
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
