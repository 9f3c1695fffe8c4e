"""YAML from a stranger: read with limits, so that no file of it hangs a command or fills the memory.

PyYAML lets a key be given twice, follows aliases that multiply or contain themselves, and recurses as deep as a file
asks. Files of settings do none of that: the largest that timm wrote has 4 KB, 200 values and three levels.

Refuses more than `MAX_BYTES`, `MAX_VALUES` (every alias counts as all it stands for), `MAX_DEPTH` levels, numbers of
more than `MAX_DIGITS` characters, duplicate keys, an alias inside what it stands for, and tags of Python objects.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 64 * 1024
MAX_VALUES = 2_000
MAX_DEPTH = 32
MAX_DIGITS = 100


def read_text(path: Path) -> str:
    """Read a file of settings, as much of it as may be.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or not UTF-8.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 1024} KiB, more than settings take")
    return content.decode("utf-8")


def load(text: str) -> Any:
    """Turn YAML into plain values.

    Raises:
        ValueError: it is no YAML, or breaks a rule of this module; the message says where.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        raise ValueError(", ".join(filter(None, (error.context, error.problem))) + place) from error
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A date such as 2026-02-30, or a value that is not what its tag says: the conversions raise what they meet.
        raise ValueError(f"a value cannot be read ({error})") from error


class _Loader(yaml.SafeLoader):
    """A safe loader with the limits of this module."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one value and what it holds, counting."""
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if node is not None and node not in self._values:  # it is not complete yet
                raise yaml.composer.ComposerError(None, None, "an alias inside of what it stands for", mark)
            return node
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None:
            self._count(node)
        return node

    def _count(self, node: yaml.Node) -> None:
        """Count what a value stands for, and refuse too much of it as early as it is seen."""
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        self._values[node] = 1 + sum(self._values[part] for part in parts)
        if max(self._values[node], len(self._values)) > MAX_VALUES:
            problem = f"more than {MAX_VALUES} values, counting each alias as what it stands for"
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping without a key that is given twice."""
        merge = "tag:yaml.org,2002:merge"  # `<<: *anchor`, whose keys those beside it may override
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True) if key_node.tag != merge else None
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if key_node.tag != merge and isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int:
        """Construct an integer that a setting can be."""
        if len(node.value) > MAX_DIGITS:
            problem = f"an integer of {len(node.value)} characters; no setting is as large"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(self.construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
