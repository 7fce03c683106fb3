"""The cache of compiled programs: where it is, what turns it off, and that a second process finds programs there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

OURS = ("JAX_COMPILATION", "JAX_PERSISTENT", "JAX_DISABLE_MOST")  # of the tests' own store
CODE = """
import jax
from jaxcl.core import compile_cache
hits = []
jax.monitoring.register_event_listener(lambda event, **kw: hits.append(event))
folder = compile_cache.enable()
def long(x):
    for i in range(300):
        x = jax.numpy.sin(x) * i
    return x
if folder:
    jax.jit(long)(1.0).block_until_ready()
found = hits.count('/jax/compilation_cache/cache_hits')
print('RESULT', folder, found, jax.config.jax_compilation_cache_dir)
"""


def process(tmp_path, **env: str) -> list[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
    env = kept | {"JAXCL_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"} | env
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("RESULT")[1].split()


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    first, second = process(tmp_path), process(tmp_path)
    assert first[0] == second[0] == first[2] and first[0].startswith(str(tmp_path / "cache" / "compiled"))
    assert first[1] == "0" and int(second[1]) >= 1


@pytest.mark.parametrize("env", [{"JAXCL_COMPILE_CACHE": "off"}, {"JAX_ENABLE_COMPILATION_CACHE": "false"}])
def test_it_can_be_turned_off(tmp_path, env):
    assert process(tmp_path, **env)[0] == "None" and not (tmp_path / "cache").exists()


def test_a_users_own_cache_stays(tmp_path):
    own = str(tmp_path / "own")
    assert process(tmp_path, JAX_COMPILATION_CACHE_DIR=own)[0] == own and not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_made_is_no_reason_to_fail(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert process(tmp_path)[0] == "None"
