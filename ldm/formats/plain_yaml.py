"""Read a mapping from a YAML file that somebody else may have made: plain values only, within limits.

The safe loader runs no code, but it has no limits: aliases of aliases multiply, and values that look like dates or that
have a tag raise any error.
"""

from pathlib import Path
from typing import Any

import yaml

from ldm.errors import UserError, one_line
from ldm.files import read_regular

_LARGEST_FILE = 2**17  # bytes
_MOST_VALUES = 100_000  # where each alias counts as a copy
_DEEPEST = 50  # nested lists and mappings
_LARGEST_INTEGER = 2**64
_INVALID = (ValueError, TypeError, LookupError, AttributeError, OverflowError)
"""Errors of PyYAML for a value that doesn't fit its tag."""


class _Loader(yaml.SafeLoader):
    """YAML loader that rejects deep nesting, duplicate keys and huge integers."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth > _DEEPEST:
            raise yaml.YAMLError(f"lists and mappings are nested more than {_DEEPEST} deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if duplicates := [key for k, key in enumerate(keys) if key in keys[:k]]:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {duplicates[0]!r}", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except _INVALID:  # e.g. 2001-99-99, !!int x
            raise self._refused(node, f"isn't a valid {node.tag.rpartition(':')[2]}") from None
        if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
            raise self._refused(node, "is too large an integer")
        return value

    def _refused(self, node: yaml.Node, reason: str) -> yaml.YAMLError:
        shown = repr(node.value[:80]) if isinstance(node.value, str) else "the value"
        return yaml.constructor.ConstructorError(None, None, f"{shown} {reason}", node.start_mark)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file with the safe loader, so that a file can't run code."""
    try:
        values = _load(read_regular(path, _LARGEST_FILE, pipe=True).decode())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the configuration can't be read: {getattr(error, 'strerror', error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} isn't plain YAML: {one_line(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: contains a {type(values).__name__}; a configuration must be a mapping of names to values"
        )
    return values


def _load(text: str) -> Any:
    loader = _Loader(text)
    try:
        if (node := loader.get_single_node()) is None:
            return None
        _require_few(node, {})
        return loader.construct_document(node)
    except _INVALID:  # lists and mappings are filled after `construct_object`
        raise yaml.YAMLError("a list or mapping doesn't fit its tag") from None
    finally:
        loader.dispose()


def _require_few(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return the number of values in a node, with aliases written out. counts: results of earlier calls, by node.

    Raises YAMLError for too many values, or if a node contains itself.
    """
    if id(node) not in counts:
        counts[id(node)] = 0
        parts = [part for entry in node.value for part in entry] if isinstance(node, yaml.MappingNode) else node.value
        inside = () if isinstance(node, yaml.ScalarNode) else parts
        counts[id(node)] = 1 + sum(_require_few(part, counts) for part in inside)
    if not 0 < counts[id(node)] <= _MOST_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {_MOST_VALUES:,} values")
    return counts[id(node)]
