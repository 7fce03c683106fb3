"""Checkpoints: flat dicts of arrays through Orbax, a manifest of hashes beside each, references to what did not change.

Orbax commits a save by a rename and loads a flipped byte without a word; so every committed entry gets a manifest
(size and SHA-256 of each file), written last, and an entry without one does not exist.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxcl.core.bucket import files, remote, remove, size
from jaxcl.core.files import HALF, walk, write_atomic
from jaxcl.core.processes import together
from jaxcl.errors import RunFailed

Arrays = Mapping[str, Any]
_MANIFEST = ".manifest.json"


def _digest(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def settle() -> None:
    """Waits for the threads of a save that failed: Orbax has several, and each would tell standard error of it."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            with contextlib.suppress(Exception):  # what it failed by, once more
                thread.join(timeout=10)


class Store:
    """Entries under one folder. An array already written (the same object) is stored as a reference.

    At most one save is under way; the next one, `wait` and `load` join it first, and raise RunFailed if it failed. Of
    several processes each writes its part of the arrays; process 0 writes the manifest and tidies up.
    """

    def __init__(self, root: Path, process: int = 0):
        self.root, self.process = root if remote(root) else root.absolute(), process  # Orbax takes no relative path
        self._known: dict[int, tuple[weakref.ref, str, str]] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._intact: dict[str, str] = {}  # entry -> '' or what is wrong with it

    # writing

    def adopt(self, entry: str, arrays: Arrays) -> None:
        """Declares that these arrays can be had as ``entry`` (of this store, or ``'source'``: the given weights)."""
        for key, a in arrays.items():
            if isinstance(a, jax.Array):
                self._known[id(a)] = (weakref.ref(a), entry, key)
        self._known = {i: v for i, v in self._known.items() if v[0]() is not None}

    def save(self, entry: str, arrays: Arrays, meta: Mapping[str, Any]) -> None:
        """Starts writing an entry: ``arrays`` (device or numpy) and ``meta`` (JSON). Collective."""
        self.wait()
        fresh, refs = {}, {}
        for key, a in arrays.items():
            known = self._known.get(id(a))
            if known is not None and known[0]() is a and known[1] != entry:
                refs[key] = [known[1], known[2]]
            else:
                fresh[key] = a
        parts: dict[str, Any] = {
            "arrays": {k: v for k, v in fresh.items() if isinstance(v, jax.Array)},
            "host": {k: v for k, v in fresh.items() if not isinstance(v, jax.Array)},
        }
        parts = {k: v for k, v in parts.items() if v}
        parts = parts or {"host": {"empty": np.zeros(1, np.int8)}}  # Orbax refuses to save nothing
        content = {"meta": dict(meta), "refs": refs, "parts": {k: sorted(v) for k, v in parts.items()}}
        path = self.root / entry
        if self.process == 0:
            self._manifest(entry).unlink(missing_ok=True)
        try:
            response = ocp.save_checkpointables_async(path, parts, overwrite=True)
        except Exception as e:
            self._give_up()
            raise RunFailed(f"could not save {path}: {e}") from e
        self._thread = threading.Thread(target=self._finish, args=(entry, response, content), daemon=True)
        self._thread.start()
        self.adopt(entry, fresh)
        self._intact.pop(entry, None)

    def _finish(self, entry: str, response: Any, content: dict) -> None:
        try:
            response.result()
            if self.process == 0:
                folder = self.root / entry
                sums = {str(f.relative_to(folder)): [size(f), _digest(f)] for f in sorted(files(folder))}
                body = json.dumps({**content, "files": sums}, sort_keys=True)
                seal = hashlib.sha256(body.encode()).hexdigest()
                write_atomic(self._manifest(entry), json.dumps({"sha256": seal, "body": body}))
        except BaseException as e:
            self._failure = e

    def wait(self) -> None:
        """Joins the save under way. Raises RunFailed when it failed, in whichever process. Collective."""
        if self._thread is None:
            return
        self._thread.join()
        failure, self._thread, self._failure = self._failure, None, None
        if not together(failure is None):
            self._give_up()
            why = failure or "another process says why"
            raise RunFailed(f"could not save a checkpoint under {self.root}: {why}") from failure

    def _give_up(self) -> None:
        """Lets a failed save come to rest, and gives back the room that it took."""
        settle()
        if self.process == 0:
            self.sweep()

    # reading

    def _manifest(self, entry: str) -> Path:
        return self.root / (entry + _MANIFEST)

    def entries(self) -> list[str]:
        """Names of all committed entries, sorted."""
        found = (f for f in files(self.root) if f.name.endswith(_MANIFEST))
        return sorted(str(f.relative_to(self.root))[: -len(_MANIFEST)] for f in found)

    def read(self, entry: str) -> dict[str, Any]:
        """The entry's manifest: meta, refs, files. Raises ValueError when it is unreadable."""
        outer = json.loads(self._manifest(entry).read_text(encoding="utf-8"))
        body = outer["body"]
        if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
            raise ValueError("its manifest was altered")
        return json.loads(body)

    def damage(self, entry: str) -> str:
        """'' when every file of the entry, and of the entries it refers to, is as written; else what is wrong."""
        if entry == "source":
            return ""
        if entry not in self._intact:
            self._intact[entry] = "it refers to itself"
            self._intact[entry] = self._examine(entry)
        return self._intact[entry]

    def _examine(self, entry: str) -> str:
        folder = self.root / entry
        try:
            content = self.read(entry)
            for name, (length, digest) in content["files"].items():
                file = folder / name
                if not file.is_file():
                    return f"{name} is missing"
                if size(file) != length or _digest(file) != digest:
                    return f"{name} is not what was written"
        except (OSError, ValueError, KeyError, TypeError) as e:
            return f"unreadable manifest: {e}"
        for other in sorted({ref[0] for ref in content["refs"].values()}):
            if why := self.damage(other):
                return f"it builds on {other}: {why}"
        return ""

    def load(
        self, entry: str, place: Callable[[str, tuple[int, ...]], Any], source: Arrays, prefix: str = ""
    ) -> dict[str, Any]:
        """All arrays of an entry (whose keys start with ``prefix``), references followed. ``place(key, shape)`` gives
        a device array's sharding."""
        self.wait()
        content = self.read(entry)
        own = (k for ks in content["parts"].values() for k in ks)
        by_entry: dict[str, dict[str, str]] = {entry: {k: k for k in own if k.startswith(prefix)}}
        for key, (other, theirs) in content["refs"].items():
            if key.startswith(prefix):
                by_entry.setdefault(other, {})[key] = theirs
        out: dict[str, Any] = {}
        for other, keys in by_entry.items():
            found = source if other == "source" else self._load_own(other, set(keys.values()), keys, place)
            for key, theirs in keys.items():
                out[key] = found[theirs]
            if other != "source":
                self.adopt(other, {theirs: found[theirs] for theirs in keys.values()})
        out.pop("empty", None)
        return out

    def _load_own(self, entry: str, wanted: set[str], keys: Mapping[str, str], place: Callable) -> dict[str, Any]:
        path = self.root / entry
        names = {theirs: key for key, theirs in keys.items()}
        found: dict[str, Any] = {}
        parts = self.read(entry)["parts"]
        if wanted & set(parts.get("arrays", ())):
            meta = ocp.metadata(path, checkpointable_name="arrays").metadata
            abstract: dict[str, Any] = dict.fromkeys(meta, ocp.PLACEHOLDER)
            for k in wanted & set(meta):
                sharding = place(names[k], meta[k].shape)
                abstract[k] = jax.ShapeDtypeStruct(meta[k].shape, meta[k].dtype, sharding=sharding)
            found |= ocp.load(path, abstract, checkpointable_name="arrays")
        if wanted & set(parts.get("host", ())):
            found |= {k: np.asarray(v) for k, v in ocp.load(path, checkpointable_name="host").items()}
        return found

    # tidying

    def delete(self, entry: str) -> None:
        """Removes an entry; the manifest first, so that a kill in between leaves nothing that looks whole."""
        if self.process == 0:
            self._manifest(entry).unlink(missing_ok=True)
            remove(self.root / entry)
        self._known = {i: v for i, v in self._known.items() if v[1] != entry}
        self._intact.pop(entry, None)

    def sweep(self) -> None:
        """Removes what a killed or failed save left behind: Orbax's temporary folders, half a manifest."""
        if remote(self.root):  # in a bucket Orbax writes a file when all the others are there
            return
        for tmp in list(walk(self.root)):
            if ".orbax-checkpoint-tmp" in tmp.name:
                remove(tmp)
            elif tmp.name.endswith(_MANIFEST + HALF):
                tmp.unlink(missing_ok=True)

    def closure(self, entries: set[str]) -> set[str]:
        """The entries together with all that they refer to, directly or not."""
        todo, seen = list(entries), set()
        while todo:
            entry = todo.pop()
            if entry in seen or entry == "source":
                continue
            seen.add(entry)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a manifest that is none of ours
                todo += [ref[0] for ref in self.read(entry)["refs"].values()]
        return seen
