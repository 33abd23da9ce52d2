"""Imports point one way; read from the source, so that no module is run."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sglang_rotatek"
MODULES_WITHOUT_THE_HOST = """
attention.workspace config memory.copy_slabs memory.host memory.layout memory.prefill
memory.requests memory.rows memory.segments requests.picture_key requests.placeholders
""".split()
WITHOUT_THE_HOST = sorted(
    [PACKAGE / f"{name.replace('.', '/')}.py" for name in MODULES_WITHOUT_THE_HOST]
    + list((PACKAGE / "basis").glob("*.py"))
    + list((ROOT / "kernels").glob("*.py"))
)
PURE = tuple(f"sglang_rotatek.{name}" for name in (*MODULES_WITHOUT_THE_HOST, "basis", "kernels"))

# All but kernels/ and patches/, which are links.
PLUGIN_MODULES = sorted(
    [
        *PACKAGE.glob("*.py"),
        *(path for path in PACKAGE.glob("*/*.py") if not path.parent.is_symlink()),
    ]
)


def imported_modules(path):
    """Absolute dotted names of every import in ``path``, also of those inside functions."""
    parts = (
        path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts
    )
    package = ("sglang_rotatek", *parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*origin, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def in_package(name, package):
    return name == package or name.startswith(package + ".")


def source_id(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", WITHOUT_THE_HOST, ids=source_id)
def test_the_core_never_imports_sglang(path):
    assert [name for name in imported_modules(path) if in_package(name, "sglang")] == []


@pytest.mark.parametrize("path", WITHOUT_THE_HOST, ids=source_id)
def test_the_core_imports_nothing_of_ours_but_the_core(path):
    ours = {name for name in imported_modules(path) if name.startswith("sglang_rotatek.")}
    packages = {pure.rsplit(".", 1)[0] for pure in PURE}  # `from . import x` names the package, too
    assert {
        name
        for name in ours
        if name not in packages and not any(in_package(name, pure) for pure in PURE)
    } == set()


@pytest.mark.parametrize("path", PLUGIN_MODULES, ids=source_id)
def test_only_the_plugin_imports_patches(path):
    patches = [
        name for name in imported_modules(path) if in_package(name, "sglang_rotatek.patches")
    ]
    if path.name == "plugin.py":
        assert patches != []
    else:
        assert patches == []


@pytest.mark.parametrize("folder", ["kernels", "patches"])
def test_linked_folders_are_no_top_level_packages(folder):
    # `import kernels` must keep meaning the Hugging Face package that SGLang imports.
    assert not (ROOT / folder / "__init__.py").exists()
    assert (PACKAGE / folder).resolve() == ROOT / folder


def test_a_wheel_has_every_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert listed == sorted(
        {"sglang_rotatek"}
        | {f"sglang_rotatek.{path.parent.name}" for path in PACKAGE.glob("*/*.py")}
    )


def test_relative_imports_are_resolved():
    assert "sglang_rotatek.config.RotateKConfig" in imported_modules(
        PACKAGE / "memory" / "layout.py"
    )
    assert "sglang_rotatek.basis.Basis" in imported_modules(PACKAGE / "basis" / "pca.py")
