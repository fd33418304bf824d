"""The architecture: no layer imports upwards, and `import hswq` stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import Tiny

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hswq"
LAYER = {
    "errors": 0,
    "config": 0,
    "processes": 0,
    "progress": 0,
    "strict_json": 0,
    "formats": 1,
    "kernels": 2,
    "models": 3,
    "calibration": 3,
    "search": 4,
    "plan": 5,
    "loader": 5,
    "quality": 5,
    "driver": 6,
    "compat": 6,
    "fast": 7,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported_parts(path: Path) -> set[str]:
    """Return the first-level parts of hswq that a file imports, also inside functions."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            names = [node.module or ""]
            if node.module == "hswq":
                names = [f"hswq.{alias.name}" for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("hswq.")}
    return parts


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layer_imports_nothing_above_it(path: Path) -> None:
    """A lower layer that needs a higher one can no longer be read or tested alone."""
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    # Calibration.measure_impact is a method for its users' sake, and the work is a plan's.
    excepted = {"plan"} if path == PACKAGE / "calibration/statistics.py" else set()
    parts = imported_parts(path) - {"__version__"} - excepted
    too_high = {part for part in parts if LAYER[part] > LAYER[own]}
    assert not too_high, f"{own} (layer {LAYER[own]}) imports {sorted(too_high)}"


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_importing_hswq_loads_no_torch() -> None:
    """Programs that only look at hswq's version or options must not pay for torch."""
    code = "import hswq, hswq.config, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert run_python(code) == "False False"


def test_driver_loads_no_diffusers() -> None:
    """Converting with given statistics must not pay three seconds for diffusers."""
    code = "import hswq.driver, sys; print({'diffusers', 'transformers'} & set(sys.modules))"
    assert run_python(code) == "set()"


def test_help_loads_no_torch() -> None:
    """Who asks for help must not wait for torch, nor for the progress bars."""
    code = (
        "import sys\nfrom hswq.fast.__main__ import main\n"
        "try: main(['quantize', '--help'])\n"
        "except SystemExit: print({'torch', 'numpy', 'tqdm'} & set(sys.modules))"
    )
    assert run_python(code).endswith("set()")


def test_conversion_with_given_statistics_loads_only_torch(tiny: Tiny, tmp_path: Path) -> None:
    """The command itself, not only its imports: seconds and half a gigabyte for nothing."""
    arguments = ["quantize", "--input", str(tiny.checkpoint), "--stats", str(tiny.stats)]
    arguments += ["--output", str(tmp_path / "out.safetensors"), "--quiet"]
    heavy = {"diffusers", "transformers", "triton", "safetensors", "accelerate"}
    unused = {"hswq.models.pipeline", "hswq.models.trace"}
    code = (
        f"import sys\nfrom hswq.fast.__main__ import main\nassert main({arguments!r}) == 0\n"
        f"print({heavy | unused!r} & set(sys.modules))"
    )
    assert run_python(code) == "set()"


PICKLES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
# torch.distributed pickles objects that pass between processes.
OBJECTS = re.compile(r"(all_gather|broadcast|gather|scatter|send|recv)_object(_list)?")


def unpickling(code: str) -> list[str]:
    """Return what unpickles: imports, loads without weights_only, exchanges of objects."""
    tree = ast.parse(code)
    safe, found = set(), []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Call):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if given.get("weights_only") == "True":
                safe.add(node.func)
            names += [f"allow_pickle={given[it]}" for it in given if it == "allow_pickle"]
            texts = [it.value for it in node.args if isinstance(it, ast.Constant)]
            if ast.unparse(node.func).endswith("import_module") or "__import__" in ast.dump(
                node.func
            ):
                names += [text for text in texts if str(text).split(".")[0] in PICKLES]
        elif isinstance(node, ast.Import):
            names = [it.name for it in node.names if it.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            whole = [f"{module}.{it.name}" for it in node.names]
            loads = ("torch.load", "torch.serialization.load", "torch.serialization")
            names = [
                it
                for it in whole
                if module.split(".")[0] in PICKLES
                or it in loads
                or OBJECTS.fullmatch(it.rpartition(".")[2])
            ]
        elif isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            is_load = whole in ("torch.load", "torch.serialization.load") and node not in safe
            names = [whole] if is_load or OBJECTS.fullmatch(node.attr) else []
        found += [f"{node.lineno}: {name}" for name in names]
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import os, dill as d",
        "from pickle import loads",
        "from shelve import open as o",
        "from torch import load",
        "from torch import serialization",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', None, True)",
        "load = torch.load",
        "torch.serialization.load('x')",
        "torch.distributed.all_gather_object(a, b)",
        "dist.broadcast_object_list([a])",
        "from torch.distributed import gather_object",
        "importlib.import_module('pickle')",
        "__import__('pickle')",
        "numpy.load('x', allow_pickle=True)",
    ],
)
def test_unpickling_is_found(code: str) -> None:
    """Each form that is overlooked is one in which a hole comes back."""
    assert unpickling(code)


def test_nothing_is_unpickled() -> None:
    """A pickle in a checkpoint's place runs its maker's code: torch.load only with weights_only."""
    assert not unpickling("import torch\ntorch.load('x', weights_only=True)")
    files = [
        path
        for part in ("hswq", "benchmarks", "examples", "kernels", ".ci")
        for path in (ROOT / part).rglob("*.py")
    ]
    assert len(files) > 100
    found = {str(path): unpickling(path.read_text(encoding="utf-8")) for path in files}
    assert not {path: lines for path, lines in found.items() if lines}


def test_every_public_name_resolves() -> None:
    """A name in __all__ that fails to import is a broken promise."""
    import hswq

    for name in hswq.__all__:
        assert getattr(hswq, name) is not None
