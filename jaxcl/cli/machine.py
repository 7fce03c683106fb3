"""What `jaxcl doctor` finds out. The only command here that may import jax to answer."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxcl.caches import cache_folder, programs_folder

Finding = dict[str, str]
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"),
    *("tensorflow-datasets", "tokenizers", "safetensors", "gguf", "numpy"),
)
EXTRAS = {
    "oracle": ("torch", "transformers", "peft"),
    "hub": ("huggingface_hub", "datasets"),
    "tpu": ("libtpu",),
    "tracking": ("tensorboardX", "wandb"),
}


def findings() -> Iterator[Finding]:
    """{"what", "found", "note"} rows; never raises: a broken machine is what it is asked about."""
    yield _row("python", platform.python_version(), sys.executable)
    yield _row("system", f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} CPU cores")
    yield from _packages()
    yield _devices()
    yield from _folders()
    yield from _extras()


def _row(what: str, found: str, note: str = "") -> Finding:
    return {"what": what, "found": found, "note": note}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    own = _version("jaxcl")
    yield _row("jaxcl", own or "not installed", "" if own else "run: pip install .")
    for p in PACKAGES:
        version = _version(p)
        yield _row(p, version or "missing", "" if version else f"run: pip install {p}")


def _devices() -> Finding:
    try:
        import jax

        devices = jax.devices()
    except Exception as e:
        return _row("devices", "none", f"{type(e).__name__}: {' '.join(str(e).split())[:200]}")
    kinds = ", ".join(sorted({d.device_kind for d in devices}))
    return _row("devices", f"{len(devices)} {devices[0].platform}", kinds)


def _folders() -> Iterator[Finding]:
    cache = cache_folder()
    where = "$JAXCL_CACHE" if os.environ.get("JAXCL_CACHE") else "user cache; $JAXCL_CACHE moves it"
    if cache.is_dir():
        files = [f for f in cache.rglob("*") if f.is_file()]
        size = sum(f.stat().st_size for f in files) / 2**20
        where += f"; {len(files)} files, {size:.0f} MiB"
        where += "" if os.access(cache, os.W_OK) else "; not writable"
    else:
        where += "; empty: jaxcl fetch fills it"
    yield _row("model cache", str(cache), where)
    data = os.environ.get("JAXCL_DATA")
    if not data:
        yield _row("data", "not set", "set $JAXCL_DATA or use --data for benchmark data")
    else:
        yield _row("data", data, "$JAXCL_DATA" + ("" if Path(data).is_dir() else ": no such directory"))
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or programs_folder() or "off"
    note = "$JAX_COMPILATION_CACHE_DIR moves it, JAXCL_COMPILE_CACHE=off stops it"
    yield _row("compiled programs", str(compiled), note)


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        note = f"optional; pip install 'jaxcl[{extra}]'" if missing else ""
        yield _row(f"extra {extra}", f"missing {', '.join(missing)}" if missing else "complete", note)
