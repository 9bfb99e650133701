"""One page for each module, from the docstrings and the comments beside the parameters (docments)."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from fastcore.docments import docments

from smfnet._modidx import d as INDEX

ROOT = Path(__file__).resolve().parents[1]
EMPTY = inspect.Parameter.empty


def modules() -> list[str]:
    """Modules that have public names, in the order of the rooms' names."""
    return sorted(m for m in INDEX["syms"] if getattr(importlib.import_module(m), "__all__", ()))


def notebook_of(module: str) -> str:
    """The notebook that defines a module, relative to the project."""
    text = Path(importlib.import_module(module).__file__).read_text(encoding="utf-8")
    return "nbs/" + re.search(r"File to edit: (?:\.\./)*nbs/(\S+)\.$", text, re.M)[1]


def plain(value: Any) -> str:
    """A default or a kind on one line of a table."""
    name = getattr(value, "__name__", None) if inspect.isclass(value) or callable(value) else None
    text = " ".join((name or str(value) if not isinstance(value, str) else repr(value)).split())
    text = re.sub(r"\b(?:pathlib|typing|collections\.abc|smfnet(?:\.\w+)*)\.(?=\w)", "", text)
    return text if len(text) <= 60 else f"{text[:57]}…"


def cell(text: str) -> str:
    """Text inside a table."""
    return " ".join(str(text).split()).replace("|", r"\|")


def signature(thing: Any) -> inspect.Signature | None:
    """The signature without what cannot be known."""
    try:
        return inspect.signature(thing)
    except (TypeError, ValueError):
        return None


def head(name: str, found: inspect.Signature | None) -> str:
    """Name and parameters; defaults that are long or no literal are an ellipsis."""
    if found is None:
        return name
    short = []
    for p in found.parameters.values():
        literal = p.default is EMPTY or isinstance(p.default, int | float | bool | type(None))
        brief = isinstance(p.default, str) and len(p.default) < 20
        default = p.default if literal or brief else ...
        short.append(p.replace(annotation=EMPTY, default=default))
    return name + str(inspect.Signature(short)).replace("Ellipsis", "...").replace("\\", "\\\\")


def parameters(thing: Any, found: inspect.Signature | None) -> list[str]:
    """The table of parameters and the result, where comments say something."""
    try:
        docs = docments(thing, full=True, returns=True)
    except Exception:
        return []  # builtins and enumerations have no source
    rows = []
    for key, doc in docs.items():
        kind, note = doc.get("anno", EMPTY), doc.get("docment") or ""
        if key in ("self", "cls") or (kind is EMPTY and not note):
            continue
        known = found.parameters[key].default if found and key in found.parameters else EMPTY
        default = "" if known is EMPTY else f"`{plain(known)}`"
        kind = "" if kind is EMPTY else f"`{plain(kind)}`"
        name = "*returns*" if key == "return" else f"`{key}`"
        rows.append(f"| {name} | {cell(kind)} | {cell(default)} | {cell(note)} |")
    return ["| name | kind | default | meaning |", "|---|---|---|---|", *rows] if rows else []


def docstring(thing: Any) -> str:
    """A docstring as Markdown; without one, nothing."""
    text = inspect.getdoc(thing) or ""
    if dataclasses.is_dataclass(thing) and text.startswith(f"{thing.__name__}("):
        return ""
    return text.replace("<", r"\<")


def described(kind: str, name: str, thing: Any, inner: list[str] = ()) -> list[str]:
    """One entry of a page."""
    found = signature(thing)
    fence = "::::" if inner else ":::"
    title = head(name, found)
    return [
        f"{fence}{{py:{kind}}} {title}",
        "",
        docstring(thing),
        "",
        *parameters(thing, found),
        "",
        *inner,
        fence,
        "",
    ]


def methods(thing: type) -> list[str]:
    """Entries for the public methods that a class defines itself and describes."""
    lines = []
    for name, member in vars(thing).items():
        member = getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(member) or not inspect.getdoc(member):
            continue
        lines += described("method", name, member)
    return lines


def entry(module: str, name: str) -> list[str]:
    """A public name of a module."""
    thing = getattr(importlib.import_module(module), name)
    if inspect.isclass(thing):
        return described("class", name, thing, methods(thing))
    if callable(thing) and signature(thing) is not None:
        return described("function", name, thing)
    value = plain(thing) if isinstance(thing, int | float | str | tuple) else type(thing).__name__
    return [f":::{{py:data}} {name}", "", f"`` {value} ``", ":::", ""]


def page(module: str) -> str:
    """The page of a module, as MyST Markdown."""
    loaded = importlib.import_module(module)
    source = notebook_of(module)
    lines = [
        f"# {module}",
        "",
        f"{docstring(loaded)}",
        "",
        f"Explained and defined in [the notebook](../{source}).",
        "",
        f":::{{py:module}} {module}",
        ":::",
        "",
    ]
    for name in loaded.__all__:
        lines += entry(module, name)
    return "\n".join(lines)


def write_pages(out: Path) -> list[str]:
    """Write all pages and their index below `out`/api; returns the names of the modules."""
    folder, names = out / "api", modules()
    folder.mkdir(parents=True, exist_ok=True)
    for module in names:
        (folder / f"{module}.md").write_text(page(module).replace(f"{ROOT}/", ""), encoding="utf-8")
    rows = [f"| [{m}]({m}.md) | {cell(docstring(importlib.import_module(m)))} |" for m in names]
    index = [
        "# Modules",
        "",
        "Every public name, with its parameters. What is behind it is told in the notebooks.",
        "",
        "| module | what is in it |",
        "|---|---|",
        *rows,
        "",
        "```{toctree}",
        ":hidden:",
        ":titlesonly:",
        "",
        *names,
        "```",
        "",
    ]
    (folder / "index.md").write_text("\n".join(index), encoding="utf-8")
    return names
