"""Where jaxcl keeps what it can make again: weights and compiled programs. Importing this imports no jax."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$JAXCL_CACHE, else the platform's user cache."""
    if os.environ.get("JAXCL_CACHE"):
        return Path(os.environ["JAXCL_CACHE"]).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("jaxcl"))


def programs_folder() -> Path | None:
    """Where compiled programs are kept, None where $JAXCL_COMPILE_CACHE is ``off``; see `jaxcl.core.compile_cache`."""
    return None if os.environ.get("JAXCL_COMPILE_CACHE", "").lower() == "off" else cache_folder() / "compiled"
