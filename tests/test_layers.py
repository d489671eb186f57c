"""Imports point down the layers of the house only."""

from __future__ import annotations

import ast
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "weaveinf"
LAYERS = [
    {"config", "trace", "ops"},
    {"comm", "cache"},
    {"selectors"},
    {"models"},
    {"weave"},
    {"engine"},
    {"cluster"},
    {"llm", "server"},
    {"cli", "commands", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Of one level, and yet one of them stands on the other.
ALLOWED = {("commands", "cli"), ("cli", "commands"), ("__main__", "cli"), ("server", "llm")}
MAX_LINES = {"runtime": 12_000, "server": 1_720}
"""Of code, all told: of what runs a model, and of what speaks HTTP for it (`weaveinf/server`)."""
MAX_FILE = 500
"""Of a file, whatever they are."""


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part(module: str) -> str | None:
    names = module.split(".")
    return names[1] if names[0] == "weaveinf" and len(names) > 1 else None


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.append(node.module or "")
    return found


def test_imports_point_down() -> None:
    wrong = []
    for file in sources():
        relative = file.relative_to(PACKAGE.parent).with_suffix("")
        own = part(".".join(relative.parts))
        if own in (None, "__init__"):
            continue
        assert own in LEVEL, f"{file} belongs to no layer"
        for module in imports(ast.parse(file.read_text())):
            other = part(module)
            if other is None or other == own or (own, other) in ALLOWED:
                continue
            if LEVEL[other] >= LEVEL[own]:
                wrong.append(f"{relative} imports {module}")
    assert not wrong, wrong


def lines_of_code(file: Path) -> int:
    """Lines with anything but comments and docstrings: to say what a thing does costs nothing."""
    text = file.read_text()
    said: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            said.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    written: set[int] = set()
    with file.open("rb") as source:
        for token in tokenize.tokenize(source.readline):
            if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
                written.update(range(token.start[0], token.end[0] + 1))
    return len(written - said)


def test_the_package_stays_small() -> None:
    lines = dict.fromkeys(MAX_LINES, 0)
    for file in sources():
        lines["server" if file.parent.name == "server" else "runtime"] += lines_of_code(file)
    assert all(lines[part] <= most for part, most in MAX_LINES.items()), lines
    assert not [file.name for file in sources() if len(file.read_text().splitlines()) > MAX_FILE]


def test_only_seams_and_ranks_talk_to_other_ranks() -> None:
    """Blocks, the executor and the engine see votes, seams and channels; never torch.distributed."""
    users = {
        part(".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts))
        for file in sources()
        if any(module.startswith("torch.distributed") for module in imports(ast.parse(file.read_text())))
    }
    assert users <= {"comm", "cluster"}


def test_no_pickle_on_our_own_channels() -> None:
    calls = ("broadcast_object_list", "all_gather_object", "torch.load(", "send_object_list")
    modules = {"pickle", "cloudpickle", "dill", "marshal", "multiprocessing"}
    for file in sources():
        text = file.read_text()
        assert not [call for call in calls if call in text], file
        assert not modules & {module.split(".")[0] for module in imports(ast.parse(text))}, file
