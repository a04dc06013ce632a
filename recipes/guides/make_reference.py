"""The API reference, from the docstrings: python recipes/guides/make_reference.py writes REFERENCE.md beside it.

Needs griffelib, which reads docstrings and signatures without running the code (in the extra `test`).
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import timm
from timm.optim import get_optimizer_info, list_optimizers

import amp_plugin

PAGE = Path(__file__).with_name("REFERENCE.md")
MODULES = ("amp_plugin", "amp_plugin.ascent", "amp_plugin.data", "amp_plugin.flatness", "amp_plugin.hub")
HEAD = """\
# Reference

Made from the docstrings by `python recipes/guides/make_reference.py`; do not edit. The guides show it at work."""

_TITLES = {
    "parameters": "Arguments",
    "attributes": "Attributes",
    "returns": "Returns",
    "yields": "Yields",
    "raises": "Raises",
}


def page() -> str:
    """The whole reference."""
    package = griffe.load(
        "amp_plugin",
        search_paths=[Path(amp_plugin.__file__).parents[1]],
        docstring_parser="google",
        docstring_options={"warnings": False},
        resolve_aliases=True,
    )
    parts = [HEAD]
    for name in MODULES:
        if importlib.util.find_spec(name) is None:
            continue
        module = importlib.import_module(name)
        parts.append(f"## {name}\n\n{_text(inspect.getdoc(module) or '')}")
        parts += [part for public in sorted(module.__all__, key=str.lower) for part in _public(package, module, public)]
    return "\n\n".join([*parts, _optimizers(), _architectures()]) + "\n"


def _public(package: Any, module: Any, name: str) -> Iterator[str]:
    here = package if module is amp_plugin else package[module.__name__.removeprefix("amp_plugin.")]
    value = getattr(module, name)
    if hasattr(value, "__module__") and value.__module__.startswith("amp_plugin"):
        item = package[f"{value.__module__}.{value.__qualname__}".removeprefix("amp_plugin.")]
    else:  # an alias of types
        item = here[name].final_target if here[name].is_alias else here[name]
    yield f"### {name}"
    if item.is_attribute:
        yield f"```text\n{name} = {item.value}\n```"
        return
    constructor = item.members.get("__init__") if item.is_class else item
    if constructor is not None or (item.is_class and dataclasses.is_dataclass(value)):
        yield _signature(name, constructor, value)
    yield from _docstring(item)
    if not item.is_class:
        return
    if dataclasses.is_dataclass(value):
        yield from _options(value)
    for member in _members(item, module):
        if member.is_function:
            yield f"#### {name}.{member.name}"
            yield _signature(member.name, member, None)
            yield from _docstring(member)
        elif "property" in member.labels:
            yield f"#### {name}.{member.name}"
            yield f"Property, `{member.annotation}`. {_text(member.docstring.value)}"


def _members(item: Any, module: Any) -> Iterator[Any]:
    """Its documented ones, and those of the bases that have no entry of their own; not what a base's entry explains."""
    found = dict(item.members)
    explained: set[str] = set()
    for base in item.mro():
        if base.name in module.__all__:
            explained |= base.members.keys()
        else:
            found = {**base.members, **found}
    for name, member in found.items():
        if not (name.startswith("_") or name in explained or member.is_alias) and member.docstring:
            yield member


def _signature(name: str, function: Any, dataclass: Any) -> str:
    """As in the source, one parameter a line if it is long."""
    if function is None:
        own = dataclass.__annotations__ if dataclass.__module__.endswith("training_args") else None
        words = [
            f"{f.name}: {f.type}" + ("" if f.default is dataclasses.MISSING else f" = {f.default!r}")
            for f in dataclasses.fields(dataclass)
            if own is None or f.name in own
        ]
        words += [] if own is None else ["**those of transformers.TrainingArguments"]
        returns = ""
    else:
        words = []
        seen_star = False
        for p in function.parameters:
            if p.name == "self":
                continue
            kind = p.kind.value
            if kind == "keyword-only" and not seen_star:
                words.append("*")
                seen_star = True
            star = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
            seen_star = seen_star or star == "*"
            shown = f"{star}{p.name}" + (f": {p.annotation}" if p.annotation is not None else "")
            words.append(shown + (f" = {p.default}" if p.default is not None and not star else ""))
        returns = f" -> {function.returns}" if function.returns is not None and function.name != "__init__" else ""
    line = f"{name}({', '.join(words)}){returns}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){returns}"
    return f"```text\n{line}\n```"


def _docstring(item: Any) -> Iterator[str]:
    if not item.docstring:
        return
    for section in item.docstring.parsed:
        kind = section.kind.value
        if kind == "text":
            yield _text(section.value)
        elif kind == "admonition":  # "Example:", which the style guide does not list
            yield f"{section.title}:\n\n```pycon\n{section.value.description}\n```"
        elif kind in _TITLES:
            yield f"{_TITLES[kind]}:\n\n" + "\n".join(_entry(kind, entry) for entry in section.value)
        else:
            raise ValueError(f"{item.path}: a docstring section of kind {kind!r}, which the reference cannot show")


def _entry(kind: str, entry: Any) -> str:
    name = "" if kind in ("returns", "yields") else f"`{entry.annotation if kind == 'raises' else entry.name}`: "
    return f"- {name}{' '.join(_text(entry.description).split())}"


def _options(dataclass: Any) -> Iterator[str]:
    """The help of options that a command line can set."""
    fields = [f for f in dataclasses.fields(dataclass) if f.name in dataclass.__annotations__ and "help" in f.metadata]
    if fields:
        rows = [f"| `{f.name}` | `{f.default!r}` | {f.metadata['help']} |" for f in fields]
        yield "\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows])


def _text(text: str) -> str:
    """Markdown from what the docstrings have of reStructuredText: roles, double backquotes, code after ``::``."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    lines: list[str] = []
    fenced = pending = False
    for line in text.splitlines():
        if pending and line.startswith("    ") and not fenced:
            lines.append("```text")
            fenced = True
        if fenced and line and not line.startswith("    "):
            while not lines[-1]:
                lines.pop()
            lines += ["```", ""]
            fenced = pending = False
        if line.endswith("::"):
            pending, line = True, line[:-1]
        lines.append(line[4:] if fenced else line)
    return "\n".join([*lines, "```"] if fenced else lines)


def _optimizers() -> str:
    rows = [f"| `{name}` | {get_optimizer_info(str(name)).description} |" for name in list_optimizers("amp*")]
    return "\n".join(["## Optimizers in timm's factory", "", "| name | what it is |", "| --- | --- |", *rows])


def _architectures() -> str:
    """Every architecture that importing the package registers."""
    rows = []
    for name in timm.list_models():
        entry = timm.model_entrypoint(name)
        if entry.__module__.startswith("amp_plugin."):
            rows.append(f"| `{name}` | {(inspect.getdoc(entry) or '').splitlines()[0]} |")
    head = [
        "## Architectures",
        "",
        "`timm.create_model(name)` after `import amp_plugin`. Parameters are counted at 10 classes.",
        "",
    ]
    return "\n".join([*head, "| name | what it is |", "| --- | --- |", *rows])


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
