"""Compiled programs kept between processes, by JAX's own cache: the second start of a run does not compile again."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax

from jaxcl.caches import programs_folder

MOST_BYTES = 4 * 2**30
"""The least recently used programs are removed beyond this."""


def enable() -> Path | None:
    """Turns the cache on for this process and says where it is; None where it is off.

    A cache that the user has set (``JAX_COMPILATION_CACHE_DIR``) stays as it is; ``JAXCL_COMPILE_CACHE=off`` asks for
    none. It is under $JAXCL_CACHE, apart for every kind of processor: what is compiled for one may not run on another.
    A folder that cannot be written to is no reason to fail. Programs that took a tenth of a second are kept.
    """
    own, wanted = (getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache"))
    if own:
        return Path(own)
    folder = programs_folder()
    if folder is None or not wanted:
        return None
    folder = folder / processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def processor() -> str:
    """A name that processors share only where one's instructions are the other's."""
    features = platform.processor()
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        lines = cpus.read_text(encoding="utf-8", errors="replace").splitlines()
        features = "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return f"{platform.machine() or 'cpu'}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
