"""Which module may import what (design: imports go one way)."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_lte"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
KNOW_LIGHTNING = {"strategy", "resumable", "manual", "signals", "callback", "cli"}
KNOW_LIGHTNING |= {"lightning_pytorch", "pytorch_lightning", "__init__"}


def imports(name: str, types: bool = True) -> set[str]:
    """All modules that a module imports, anywhere in it, in full; `from a import b` counts as a and as a.b.

    Without `types`, what is imported for annotations alone is left out.
    """
    found: set[str] = set()
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if not types and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively, which this test does not follow"
            assert node.module is not None
            found.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return found


def below(found: set[str], *packages: str) -> set[str]:
    return {f for f in found if any(f == package or f.startswith(f"{package}.") for package in packages)}


def own(name: str, types: bool = True) -> set[str]:
    found = {f.removeprefix("lightning_lte.") for f in below(imports(name, types), "lightning_lte")}
    return found & MODULES.keys() - {name}


def test_the_modules_are_found() -> None:
    assert {"heads", "layers", "layers.linear", "transport", "strategy", "__init__"} <= MODULES.keys()
    assert "torch.distributed" in imports("transport") and below(imports("lightning_pytorch"), "lightning")
    assert {"heads", "layers.base"} <= own("layers.linear") | own("layers.base")


@pytest.mark.parametrize("name", sorted(MODULES.keys() - KNOW_LIGHTNING))
def test_the_core_knows_no_lightning(name: str) -> None:
    assert not below(imports(name), "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities")
    assert not own(name) & KNOW_LIGHTNING
    for found in below(imports(name), "lightning_lte") - {"lightning_lte"}:
        module = found.removeprefix("lightning_lte.")
        assert {module, module.rpartition(".")[0]} & MODULES.keys(), (
            f"{found} comes from __init__, which imports Lightning"
        )


# What devices share out by rows is FSDP2's business, which goes past the transport.
KNOW_FSDP = {"shards", "sharding"}


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"transport"} - KNOW_FSDP))
def test_one_module_alone_talks_to_other_devices(name: str) -> None:
    # torch's own way to write checkpoints from all devices has the devices meet by itself.
    written_together = below(imports(name), "torch.distributed.checkpoint") if name == "sharded" else set()
    assert below(imports(name), "torch.distributed") == written_together
    attributes = (node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.Attribute))
    assert not any(ast.unparse(attribute) == "torch.distributed" for attribute in attributes)


def test_the_cores_imports_go_one_way() -> None:
    TopologicalSorter({name: own(name, types=False) for name in MODULES.keys() - KNOW_LIGHTNING}).prepare()
