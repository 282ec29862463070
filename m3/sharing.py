"""Who reads what: modalities that share a tokenizer (`tokenizer: {same_as: video}`), and the towers they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from m3.backbone import TowerSpec
from m3.errors import M3Error, nearest
from m3.plugins import Modality, Objective, Predictor, Tokenizer


def readers(settings: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return modality -> the one whose tokenizer and positions it has: its own name, or that after `same_as`.

    Args:
        settings: the `modalities` of a config.

    Raises:
        M3Error: another one that is not there or has none of its own, or further settings beside `same_as`.
    """
    found = dict.fromkeys(settings, "")
    for name, entry in settings.items():
        where, tokenizer = f"modalities.{name}.tokenizer", entry.get("tokenizer")
        if not isinstance(tokenizer, dict):
            raise M3Error(f"{where}: this key is required; add it, e.g. `tokenizer: {{type: patch, size: 16}}`.")
        found[name] = other = tokenizer.get("same_as", name)
        if other == name:
            continue
        if other not in settings:
            raise M3Error(f"{where}.same_as: there is no modality `{other}`.{nearest(str(other), settings)}")
        if "same_as" in settings[other].get("tokenizer", {}):
            raise M3Error(f"{where}.same_as: `{other}` has no tokenizer of its own; name the one that it has.")
        extra = [key for key in tokenizer if key != "same_as"] + [key for key in ("positions",) if key in entry]
        if extra:
            raise M3Error(f"{where}: with `same_as`, `{extra[0]}` is that of `{other}`; remove it here.")
    return found


def check_readers(
    reader: dict[str, str], tokenizers: Mapping[str, Tokenizer], modalities: dict[str, Modality], towers: dict[str, str]
) -> None:
    """Raise M3Error where a tokenizer can't read a modality that shares it, or another tower would read its tokens.

    Args:
        reader: what `readers` returns.
        tokenizers: those that are somebody's own.
        modalities: all.
        towers: modality -> name of its tower.
    """
    for name, other in reader.items():
        where = f"modalities.{name}.tokenizer.same_as"
        if name != other and not tokenizers[other].reads(modalities[name].signal):
            raise M3Error(f"{where}: the tokenizer of `{other}` can't read `{name}`; give it one of its own.")
        if towers[name] != towers[other]:
            raise M3Error(f"{where}: `{name}` and `{other}` are read by different towers; put them into one.")


def towers_of(towers: dict[str, TowerSpec], modalities: Iterable[str]) -> dict[str, str]:
    """Return modality -> name of its tower, empty for the shared backbone."""
    found = dict.fromkeys(modalities, "")
    for name, tower in towers.items():
        for modality in tower.modalities:
            if modality not in found:
                raise M3Error(f"towers.{name}.modalities: there is no modality `{modality}`.{nearest(modality, found)}")
            if found[modality]:
                raise M3Error(f"`{modality}` is in the towers {found[modality]} and {name}; leave it in one.")
            found[modality] = name
    return found


def only_targets(objectives: dict[str, Objective], seen: Iterable[str]) -> set[str]:
    """Return the modalities that are predicted but that no view and no autoencoder reads."""
    predictors = [part for part in objectives.values() if isinstance(part, Predictor)]
    read = {name for part in predictors if part.view is None for name in part.modality_of.values()}
    return {name for part in predictors for name in part.modality_of.values()} - read - set(seen)
