"""The text that the demo model learns: what ships inside Python's own standard library.

Read are the reference topics behind `help()` (`pydoc_data.topics`), the docstrings of the modules in
`Lib/` and of a few built-in ones, the module sources themselves, and the licence. Nothing outside the
standard library is read: no site-packages, no tests, no generated tables.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

END = "<|endoftext|>"
USER, ASSISTANT, TURN_END = "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (END, USER, ASSISTANT, TURN_END)

# Generated tables, foreign packages and files about the machine they were built on.
SKIPPED_PARTS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings",
    "pydoc_data", "ensurepip", "lib-dynload", "__pycache__", "turtledemo", "idlelib", "tkinter",
}  # fmt: skip
BUILT_IN = ("builtins", "math", "itertools", "functools", "collections", "sys", "time", "gc", "io")


@dataclass(frozen=True)
class Document:
    """One piece of text; `kind` is "topic", "docstring" or "source", `key` its stable name."""

    kind: str
    key: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether this document only measures the loss (about one in sixty) and is never learnt.

        All docstrings of a module go with its source, since the source contains them.
        """
        module = self.key.split(":")[0]
        return self.kind != "topic" and hashlib.sha256(module.encode()).digest()[0] < 4


def chat(question: str, answer: str) -> str:
    """A question and its answer as the tokenizer's chat template writes them."""
    return f"{USER}\n{question}{TURN_END}\n{ASSISTANT}\n{answer}{TURN_END}\n"


def sources(lib: Path) -> Iterator[tuple[str, str]]:
    """(dotted module name, source) of every module that is read, in a stable order."""
    for path in sorted(lib.rglob("*.py")):
        relative = path.relative_to(lib)
        if SKIPPED_PARTS & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        if relative.parts[0].startswith("config-"):
            continue
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        yield name, path.read_text(encoding="utf-8", errors="replace")


def described(qualified: str, what: str, signature: str, doc: str) -> Iterator[tuple[str, str]]:
    """A docstring as `help()` shows it, and as the answer to a question: (form, text)."""
    doc = doc.strip()
    indented = "\n".join("    " + line if line.strip() else "" for line in doc.split("\n"))
    yield "help", f"Help on {what} {qualified}:\n\n{signature}\n{indented}\n"
    yield "chat", chat(f"What does {qualified} do?", doc)


def docstrings(module: str, source: str) -> Iterator[Document]:
    """Every docstring of a module's source, once in each form of `described`."""
    tree = ast.parse(source)

    def visit(node: ast.AST, path: str) -> Iterator[Document]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            qualified = f"{path}.{child.name}"
            doc = ast.get_docstring(child)
            if doc and len(doc) > 40:
                is_class = isinstance(child, ast.ClassDef)
                arguments = "" if isinstance(child, ast.ClassDef) else ast.unparse(child.args)
                head = f"class {child.name}" if is_class else f"{child.name}({arguments})"
                what = "class" if is_class else "function"
                for form, text in described(qualified, what, head, doc):
                    yield Document("docstring", f"{module}:{qualified}:{form}", text)
            yield from visit(child, qualified)

    doc = ast.get_docstring(tree)
    if doc and len(doc) > 40:
        for form, text in described(module, "module", f"import {module}", doc):
            yield Document("docstring", f"{module}:{form}", text)
    yield from visit(tree, module)


def built_in(module_name: str) -> Iterator[Document]:
    """Docstrings of a module written in C, which has no source in `Lib/`."""
    module = importlib.import_module(module_name)
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or not callable(member) or inspect.isfunction(member):
            continue
        doc = inspect.getdoc(member)
        if not doc or len(doc) <= 40:
            continue
        signature = f"{name}{getattr(member, '__text_signature__', None) or '(...)'}"
        what = "class" if inspect.isclass(member) else "built-in function"
        for form, text in described(f"{module_name}.{name}", what, signature, doc):
            yield Document("docstring", f"{module_name}:{name}:{form}", text)


def topics() -> Iterator[Document]:
    """The reference topics, whole, and the licence."""
    from pydoc_data.topics import topics as texts

    for name, text in sorted(texts.items()):
        yield Document("topic", f"topic.{name}", text.strip() + "\n")
        yield Document("topic", f"topic.{name}.chat", chat(f"Explain {name}.", text.strip()))
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if licence.exists():
        yield Document("topic", "LICENSE", licence.read_text(encoding="utf-8"))


def documents() -> list[Document]:
    """All documents, in a stable order, each text once."""
    found = list(topics())
    for module in BUILT_IN:
        found += built_in(module)
    for name, source in sources(Path(sysconfig.get_path("stdlib"))):
        found.append(Document("source", name, source))
        found += docstrings(name, source)
    seen: set[str] = set()
    unique = []
    for document in found:
        if document.text not in seen:
            seen.add(document.text)
            unique.append(document)
    return unique


def digest(found: list[Document]) -> str:
    """Tells two corpora apart (another Python has other documentation): 16 hex digits."""
    total = hashlib.sha256()
    for document in found:
        total.update(document.key.encode() + b"\0" + document.text.encode() + b"\0")
    return total.hexdigest()[:16]
