"""Reading YAML that people write: settings, search spaces, and single values of ``--set``.

It differs from PyYAML in two points. ``1e-3`` is a number and ``off`` is a word, as in YAML 1.2;
PyYAML follows YAML 1.1, where it is the other way round. And a key that appears twice in a mapping
is refused, where PyYAML takes the last one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from clsnf.core.errors import SettingsError


class _Loader(yaml.SafeLoader):
    """A safe loader with YAML 1.2's floats and booleans, which refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise yaml.YAMLError(f"{repeated!r} stands there twice")
        return super().construct_mapping(node, deep)


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _BOOL, re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Args:
        text: the YAML.
        where: what error messages call it.

    Raises:
        SettingsError: the text is no YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SettingsError(f"{where} is no YAML: {' '.join(str(error).split())}") from error


def read_yaml_mapping(path: Path, example: str) -> dict[str, Any]:
    """The content of a YAML file that maps names to values.

    Args:
        path: of the file.
        example: a valid line, for error messages.

    Raises:
        SettingsError: the file can't be read, is no YAML, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"{path} can't be read ({error.strerror}): check the path and its permissions."
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is no YAML: it is no UTF-8 text.") from error
    content = parse_yaml(text, str(path))
    expected = f"expected lines such as {example}."
    if not isinstance(content, dict):
        raise SettingsError(f"{path} holds no names with values: {expected}")
    for name in content:
        if not isinstance(name, str):
            raise SettingsError(f"{path}: {name!r} is no name of a setting: {expected}")
    return content
