"""Keeps other libraries' chatter (absl, jax, orbax, grain, XLA's C++ log) away from standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GRPC_VERBOSITY": "ERROR",
    "GLOG_minloglevel": "3",
    "PYTHONWARNINGS": "ignore",  # for the workers of data pipelines
    "TOKENIZERS_PARALLELISM": "false",
}

_NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}
"""What libtpu, where it is installed but no TPU is, would complain in C++ that nobody told it. Compiles nothing."""
GOOGLE = "0x1ae0"  # of the PCI vendors; jax itself looks for TPUs so


@contextlib.contextmanager
def quiet(*, enabled: bool = True) -> Iterator[None]:
    """Silences logging and warnings inside the block, and what threads say of an exception that nobody awaits any more
    (of a failed save: dozens of tracebacks, while we have its reason). Must be entered before jax is imported: XLA
    reads its log level once. What a user has set in the environment wins. ``enabled=False`` changes nothing."""
    if not enabled:
        yield
        return
    for name, value in (_ENVIRONMENT | ({} if _tpu() else _NO_TPU)).items():
        os.environ.setdefault(name, value)
    before, hook = logging.root.manager.disable, sys.excepthook
    logging.disable(logging.CRITICAL)
    sys.excepthook = lambda *_: None  # an exception of the command itself goes up through the block
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        sys.excepthook = hook  # not after a failure: the threads of a failed save speak up as late as they like
    finally:
        logging.disable(before)


def _tpu() -> bool:
    """Whether this machine may have TPUs."""
    return any(file.read_text().strip() == GOOGLE for file in Path("/sys/bus/pci/devices").glob("*/vendor"))
