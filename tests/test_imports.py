"""Imports go one way: a module imports from its own group and from those to its left."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import molehunt

GROUPS: tuple[str, ...] = (
    "datasets tasks triggers findings details strict_json files legible plugins tensor_file confinement",
    "networks metas meta_files meta_training zoo checkpoints conversion torch_file foreign suspect evidence",
    "engine",
    "training",
    "attacks defenses",
    "runner shadows meter untouched isolation aftermath zygote examination "
    "conformal calibration repair stacking fusion combine asking reliability power null_check "
    "testing figures charts report scanning",
    "game",
    "bank starter matrix matrix_tables inspection",
    "web client commands cli __main__",
)
PLACE = {module: place for place, group in enumerate(GROUPS) for module in group.split()}

# Packages of others, and the only parts of ours that may import them.
RULES: tuple[tuple[str, str], ...] = (
    ("matplotlib pylab", "figures"),
    ("fastapi starlette flask uvicorn aiohttp tornado django", "web"),
    ("timm torchvision", "zoo"),
    ("httpx requests socket socketserver urllib urllib3 http ssl ftplib smtplib", "datasets client engine web"),
    ("pickle cPickle dill cloudpickle joblib shelve marshal", ""),
    ("ray", "engine"),
    ("opacus torch_pruning", "defenses"),
    ("typer", "commands cli"),
)
RESERVED = {package: set(parts.split()) for packages, parts in RULES for package in packages.split()}
Tree = dict[str, set[str]]


def imports(path: Path, name: str) -> Iterator[str]:
    """Everything a file imports, wherever in the file, as dotted names: `from a import b` gives a.b."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *base.split(".")])
            yield from (f"{base}.{alias.name}".replace("..", ".") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield str(argument.value)


def walk(root: Path) -> Tree:
    """Every module below a package's folder with the dotted names that it imports."""
    tree = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        tree[name] = set(imports(path, name))
    return tree


def part(name: str) -> str:
    """The top-level module or package of ours: molehunt.game.seal is of game."""
    return name.split(".")[1] if "." in name else ""


def ours(tree: Tree, name: str) -> set[str]:
    """Our modules that a module imports directly; molehunt.a.b.function is module molehunt.a.b."""
    found = set()
    for target in tree[name]:
        while target not in tree and "." in target:
            target = target.rpartition(".")[0]
        if target in tree and target != name:
            found.add(target)
    return found


def reached(tree: Tree, start: str) -> set[str]:
    """Our modules that get imported when one is, with their parent packages, which Python imports too."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        todo += ours(tree, name)
        todo += [parent for parent in [name.rpartition(".")[0]] if parent in tree]
    return seen - {start}


def wrong_way(tree: Tree) -> list[str]:
    return [
        f"{name} imports {target}"
        for name in tree
        for target in sorted(ours(tree, name))
        if part(name) and part(target) and PLACE[part(target)] > PLACE[part(name)]
    ]


def reserved(tree: Tree) -> list[str]:
    return [
        f"{name} imports {target}"
        for name, targets in tree.items()
        for target in sorted(targets)
        if part(name) not in RESERVED.get(target.split(".")[0], {part(name)})
    ]


def reaching(tree: Tree, start: str, goal: str) -> list[str]:
    """Modules of a part from which a chain of imports leads to another part."""
    return [n for n in tree if part(n) == start and any(part(r) == goal for r in reached(tree, n))]


def loading(tree: Tree, start: str, package: str) -> list[str]:
    """Modules of a part that load a foreign package, themselves or through others."""
    return [
        n
        for n in tree
        if part(n) == start and any(t.split(".")[0] == package for r in {n, *reached(tree, n)} for t in tree[r])
    ]


@pytest.fixture(scope="module")
def tree() -> Tree:
    return walk(Path(molehunt.__file__).parent)


def test_every_module_has_its_place(tree: Tree) -> None:
    unplaced = {part(name) for name in tree if part(name)} - PLACE.keys()
    assert not unplaced, f"say in GROUPS where {sorted(unplaced)} belong"
    assert len(PLACE) == sum(len(group.split()) for group in GROUPS), "a module stands in two groups"


def test_the_package_itself_imports_nothing_heavy(tree: Tree) -> None:
    assert not ours(tree, "molehunt")


def test_imports_go_one_way(tree: Tree) -> None:
    assert not wrong_way(tree)


def test_some_packages_are_reserved(tree: Tree) -> None:
    assert not reserved(tree)


def test_defenses_never_reach_the_truth(tree: Tree) -> None:
    assert not reaching(tree, "defenses", "game")


def test_attacks_never_reach_defenses(tree: Tree) -> None:
    assert not reaching(tree, "attacks", "defenses")


def test_the_web_process_does_not_load_torch(tree: Tree) -> None:
    assert not loading(tree, "web", "torch")


class TestTheWalker:
    """On a small tree in which every rule is broken."""

    @pytest.fixture
    def broken(self, tmp_path: Path) -> Tree:
        root = tmp_path / "molehunt"
        for name, text in {
            "__init__.py": "",
            "tasks.py": "import molehunt.suspect\nimport torch",
            "suspect.py": "def f():\n    from molehunt.game import seal",
            "defenses/__init__.py": "from .deep import x",
            "defenses/deep.py": "from .. import suspect\nimport pickle",
            "attacks/__init__.py": "from molehunt import defenses",
            "game/__init__.py": "",
            "game/seal.py": "import os\nimport matplotlib.pyplot as plt",
            "figures.py": "import matplotlib",
            "web/__init__.py": "from molehunt.tasks import TASKS",
            "client.py": "import socket",
            "report.py": "import importlib\nimportlib.import_module('urllib.request')",
        }.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return walk(root)

    def test_sees_imports_to_the_right(self, broken: Tree) -> None:
        assert wrong_way(broken) == [
            "molehunt.suspect imports molehunt.game.seal",
            "molehunt.tasks imports molehunt.suspect",
        ]

    def test_sees_reserved_packages(self, broken: Tree) -> None:
        assert reserved(broken) == [
            "molehunt.defenses.deep imports pickle",
            "molehunt.game.seal imports matplotlib.pyplot",
            "molehunt.report imports urllib.request",
        ]

    def test_sees_chains(self, broken: Tree) -> None:
        assert reaching(broken, "defenses", "game") == ["molehunt.defenses", "molehunt.defenses.deep"]
        assert reaching(broken, "attacks", "defenses") == ["molehunt.attacks"]
        assert loading(broken, "web", "torch") == ["molehunt.web"]
