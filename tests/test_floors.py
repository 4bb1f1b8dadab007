"""Imports go only downward (DESIGN: the floors), and the light packages stay light."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FLOORS = {
    "pallas_kernels": 0,
    "seqjax.ops": 1,
    "seqjax.layers": 2,
    "seqjax.models": 3,
    "seqjax.data": 4,
    "seqjax.tasks": 4,
    "seqjax.interop": 4,
    "seqjax.train": 5,
    "seqjax.sample": 5,
    "seqjax.evaluate": 5,
    "seqjax.analyze": 5,
    "seqjax.cli": 6,
    "experiments": 6,
}
# Below the trainer nothing else may be imported from outside than this.
ALLOWED_OUTSIDE = {
    "pallas_kernels": {"jax"},
    "seqjax.ops": {"jax", "jaxtyping", "pallas_kernels", "numpy"},
}
SAME_FLOOR_FORBIDDEN = {"seqjax.data": {"seqjax.tasks", "seqjax.interop"}}


def package_of(module: str) -> str | None:
    return max((name for name in FLOORS if module == name or module.startswith(name + ".")), key=len, default=None)


def imports(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources():
    for top in ("pallas_kernels", "seqjax", "experiments"):
        for path in sorted((ROOT / top).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if package_of(module):
                yield module, path


def upward(module: str, names: set[str]) -> list[str]:
    here = package_of(module)
    bad = []
    for name in names:
        there = package_of(name)
        if there is None or there == here:
            continue
        if FLOORS[there] > FLOORS[here] or there in SAME_FLOOR_FORBIDDEN.get(here, ()):
            bad.append(f"{module} imports {name}")
    return bad


def test_no_module_imports_upward():
    assert [line for module, path in sources() for line in upward(module, imports(path))] == []


def test_the_check_itself_sees_an_upward_import():
    assert upward("seqjax.ops.attention", {"seqjax.layers.mlp"}) == ["seqjax.ops.attention imports seqjax.layers.mlp"]
    assert upward("seqjax.layers.mlp", {"seqjax.ops"}) == []


def test_ops_and_kernels_import_nothing_but_jax():
    standard = sys.stdlib_module_names
    bad = []
    for module, path in sources():
        allowed = ALLOWED_OUTSIDE.get(package_of(module))
        if allowed is not None:
            tops = {name.split(".")[0] for name in imports(path)} - standard - {module.split(".")[0], "seqjax"}
            bad += [f"{module} imports {name}" for name in tops - allowed]
    assert bad == []


@pytest.mark.parametrize("package", ["seqjax.ops", "pallas_kernels"])
def test_light_packages_load_no_flax_and_no_trainer(package):
    heavy = ["flax", "optax", "orbax", "grain", "tensorstore", "tokenizers", "tyro", "rich", "matplotlib"]
    code = f"import sys, {package}; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_import_seqjax_adds_under_a_second_to_jax_and_loads_no_trainer_dependency():
    code = (
        "import sys, time, jax; start = time.perf_counter(); import seqjax, seqjax.ops; spent = time.perf_counter() - start\n"
        "print(spent, [m for m in ('optax', 'orbax', 'grain', 'tensorstore', 'tyro') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, loaded = out.split(maxsplit=1)
    assert float(seconds) < 1.0
    assert loaded.strip() == "[]"
