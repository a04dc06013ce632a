"""Read and write YAML of a person for a program: plain values, each key once, nothing that refers to something else."""

from __future__ import annotations

import re
from typing import Any

import yaml

# Numbers as people write them, and as YAML 1.2 reads them: for YAML 1.1, 010 is 8, 1:30 is 90 and 1e-3 is a word.
_NUMBERS = {
    "tag:yaml.org,2002:float": re.compile(
        r"(?:[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN))$"
    ),
    "tag:yaml.org,2002:int": re.compile(r"(?:[-+]?[0-9]+|0x[0-9a-fA-F]+)$"),
}


class _Loader(yaml.SafeLoader):
    """A loader of strings, numbers, booleans, lists and mappings; a date is the string that is written."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (it has the type of the base class)
        first: [
            (tag, _NUMBERS.get(tag, pattern)) for tag, pattern in rules if not tag.endswith((":timestamp", ":merge"))
        ]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
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
        if not isinstance(node, yaml.MappingNode):
            raise yaml.YAMLError(f"there is no mapping in line {node.start_mark.line + 1}")
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, (list, dict)):
                raise yaml.YAMLError(f"a key is a list or a mapping in line {line}")
            if key in lines:
                raise yaml.YAMLError(f"{key!r} stands in line {lines[key]} and again in line {line}")
            lines[key] = line
        return super().construct_mapping(node, deep)

    def construct_whole_number(self, node: Any) -> int:
        """Construct an integer without the bases of YAML 1.1, except that of 0x."""
        text = str(self.construct_scalar(node))
        return int(text, 16 if "x" in text else 10)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes a string wherever YAML 1.1 or the loader above would take it for something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [*rules, *_Loader.yaml_implicit_resolvers[first]]
        for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)


def read_plain_yaml(text: str) -> Any:
    """Return what the text says.

    Raises:
        yaml.YAMLError: The text is not YAML, has a key twice, a reference, or a value of another type.
        RecursionError: Lists or mappings are nested too deeply.
    """
    return yaml.load(text, Loader=_Loader)


def plain_yaml(values: Any) -> str:
    """Return a text of which `read_plain_yaml` makes the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
