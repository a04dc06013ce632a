"""Read YAML that a person wrote for a program: plain values, each key once, nothing that refers to something else."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """A loader of strings, numbers, booleans, lists and mappings; a date is the string that is written."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (it has the type of the base class)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse an alias: a few of them, each of a list of others, stand for more than the memory holds."""
        if self.check_event(yaml.AliasEvent):
            event: Any = self.get_event()  # type: ignore[no-untyped-call]
            where = f"*{event.anchor} in line {event.start_mark.line + 1}"
            raise yaml.YAMLError(f"{where} refers to &{event.anchor}; write out what it stands for")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping whose keys are all different."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, (list, dict)):
                raise yaml.YAMLError(f"a key is a list or a mapping in line {line}")
            if key in lines:
                raise yaml.YAMLError(f"{key!r} stands in line {lines[key]} and again in line {line}")
            lines[key] = line
        return super().construct_mapping(node, deep)


def read_plain_yaml(text: str) -> Any:
    """Return what the text says.

    Raises:
        yaml.YAMLError: The text is not YAML, has a key twice, a reference, or a value of another type.
        RecursionError: Lists or mappings are nested too deeply.
    """
    return yaml.load(text, Loader=_Loader)
