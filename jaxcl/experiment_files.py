"""Finding experiment files: a path, a local experiments/ folder, or those that travel with the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from jaxcl.errors import RequestError, unknown


def packaged() -> Path:
    """The experiments that come with jaxcl: inside the wheel, or beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    inside = here / "_experiments"
    return inside if inside.is_dir() else here.parent / "experiments"


def _in(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    files = [*folder.glob("*.py"), *folder.glob("*/experiment.py")]
    named = {(f.parent.name if f.name == "experiment.py" else f.stem): f for f in files}
    return {n: f for n, f in sorted(named.items()) if not n.startswith("_")}


def known() -> dict[str, Path]:
    """{name: file} of all experiments; those in ./experiments win over the packaged ones."""
    return _in(packaged()) | _in(Path.cwd() / "experiments")


def find(name_or_path: str) -> Path:
    """The experiment's file. RequestError with the nearest names when there is none."""
    if name_or_path.endswith(".py") or "/" in name_or_path:
        path = Path(name_or_path)
        path = path / "experiment.py" if path.is_dir() else path
        if path.suffix != ".py" or not path.is_file():
            names = ", ".join(known())
            raise RequestError(f"no experiment file at {name_or_path!r}; give a Python file or one of: {names}")
        return path
    files = known()
    if name_or_path not in files:
        raise unknown("experiment", name_or_path, files)
    return files[name_or_path]


def load(name_or_path: str) -> ModuleType:
    """The experiment as a module with ``Config`` and ``build``. RequestError when it lacks them or does not import."""
    path = find(name_or_path).resolve()
    spec = importlib.util.spec_from_file_location(f"jaxcl_experiment_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))  # an experiment may have files of its own beside it
    try:
        spec.loader.exec_module(module)
    except SyntaxError as e:
        raise RequestError(f"{path}:{e.lineno}: {e.msg}; an experiment is a Python file") from e
    finally:
        sys.path.remove(str(path.parent))
    for name in ("Config", "build"):
        if not hasattr(module, name):
            raise RequestError(f"{path} has no {name!r}; an experiment has a frozen dataclass Config and build(cfg)")
    return module


def demo_main(out: str | None) -> int:
    """`jaxcl demo`: the embedded demonstration. Returns the exit status."""
    path = packaged() / "demo" / "main.py"
    spec = importlib.util.spec_from_file_location("jaxcl_demo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["jaxcl_demo"] = module
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module.main(out)
