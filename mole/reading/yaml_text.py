"""YAML from texts of any origin: plain values, no duplicate keys, no anchors that unfold without end."""

import re
from typing import Any

import yaml

MOST_NODES = 100_000
"""Of one text, anchors unfolded."""


MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads `1e-3` as the number it looks like."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == MERGE:
                continue
            name = repr(self.construct_object(key, deep=True))
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name} appears twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        value = self.construct_yaml_int(node)
        if value.bit_length() > 256:
            raise yaml.constructor.ConstructorError(None, None, "a number of too many digits", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """The value in a YAML text.

    Raises:
        ValueError: it is not YAML, says a key twice, refers to itself, or unfolds to more than a configuration has.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, TypeError, OverflowError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def _check_nodes(root: yaml.Node) -> None:
    """Count nodes as often as anchors repeat them, each anchor looked into once."""
    sizes: dict[int, int] = {}
    above: set[int] = set()

    def size(node: yaml.Node) -> int:
        key = id(node)
        if key in above:
            raise ValueError(f"an anchor that holds itself (line {node.start_mark.line + 1})")
        if key not in sizes:
            above.add(key)
            parts: list[yaml.Node] = []
            if isinstance(node, yaml.SequenceNode):
                parts = node.value
            elif isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            if len(above) > 100:
                raise ValueError("nested more than 100 deep")
            sizes[key] = 1 + sum(size(part) for part in parts)
            above.remove(key)
        if sizes[key] > MOST_NODES:
            raise ValueError(f"unfolds to more than {MOST_NODES:,} values")
        return sizes[key]

    size(root)
