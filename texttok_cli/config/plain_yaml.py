"""YAML as people write recipes and specs: plain values, every key once, and one error for whatever can't be read."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

MAX_VALUES = 100_000  # of a text, those that aliases repeat counted each time: some lines of aliases could stand for any number
MAX_DIGITS = 1000  # Python writes no number of over 4300


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one takes the last of two equal keys without a word, and numbers that can't be written down again."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, f"a number of {len(node.value):,} digits", node.start_mark)
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, which can't run anything. ValueError, one line, for one that is none."""
    try:
        value = yaml.load(text, _Loader)
        _check_size(value)
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # A value that is not of its kind, such as the date 2024-13-45, is no YAMLError; nor is a number in base 60 (1:30:00.5) beyond float64.
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, OverflowError) as err:
        raise ValueError(" ".join(str(err).split())) from None


def _check_size(value: Any) -> None:
    left, count = [value], 1
    while left:
        part = left.pop()
        parts = part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()  # tuples: !!pairs
        count += len(parts)
        if count > MAX_VALUES:  # before they are taken in: a list that holds itself would be so again and again
            raise ValueError(f"over {MAX_VALUES:,} values, counting what aliases repeat")
        left += parts
