"""Settings over settings: what a recipe changes of its base, and `a.b=c` of the command line."""

from __future__ import annotations

from typing import Any

import yaml

from m3.errors import M3Error


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Put changes over a base: null removes a key, another `type` replaces the whole entry."""
    if changes.get("type", base.get("type")) != base.get("type"):
        base = {}
    merged = dict(base)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            old = merged.get(key)
            merged[key] = merge(old if isinstance(old, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def with_overrides(settings: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Put changes of the form `a.b=c`, with a value in YAML, over settings."""
    for override in overrides:
        path, sign, text = override.partition("=")
        if not sign or not path:
            raise M3Error(f"`{override}` is no override; write key.path=value, e.g. train.steps=1000.")
        try:
            value: Any = yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise M3Error(f"`{override}`: the value is not readable as YAML; write it as in a recipe.") from error
        *parents, last = path.split(".")
        if value == {} and _at(settings, path):
            raise M3Error(f"`{override}` changes nothing, since settings are merged; write `{path}=` to empty it.")
        change: dict[str, Any] = {last: value}
        for key in reversed(parents):
            change = {key: change}
        settings = merge(settings, change)
    return settings


def _at(settings: Any, path: str) -> Any:
    """Return what stands at a path of settings; None: nothing."""
    for key in path.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings


class NoDuplicates(yaml.SafeLoader):
    """YAML takes the last of two equal keys without a word; a recipe must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping whose keys are all different."""
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key `{key}` stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)
