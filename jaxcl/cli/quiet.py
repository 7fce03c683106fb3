"""Keeps other libraries' chatter (absl, jax, orbax, grain, XLA's C++ log) away from standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GRPC_VERBOSITY": "ERROR",
    "GLOG_minloglevel": "3",
    "PYTHONWARNINGS": "ignore",  # for the workers of data pipelines
    "TOKENIZERS_PARALLELISM": "false",
}


@contextlib.contextmanager
def quiet(*, enabled: bool = True) -> Iterator[None]:
    """Silences logging and warnings inside the block. Must be entered before jax is imported: XLA reads
    its log level once. What a user has set in the environment wins. ``enabled=False`` changes nothing."""
    if not enabled:
        yield
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
