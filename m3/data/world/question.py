"""Questions about a scene, as visual question answering asks them, with what people answer."""

from __future__ import annotations

from typing import Any

import numpy as np

PEOPLE = 10
"""Answers to each question, all of them right."""

QUESTIONS = {
    "color": "what color is the main object",
    "shape": "what shape is the main object",
    "count": "how many objects are there",
}
"""Label of a scene -> a question that it answers; the main object is the one with the most pixels."""


def question(labels: dict[str, str], random: np.random.Generator) -> dict[str, Any]:
    """Draw a question: its `text`, and `answers`, how many people gave each.

    Args:
        labels: label -> its name in words, of the scene.
        random: numbers of this scene and use.
    """
    asked = list(QUESTIONS)[random.integers(len(QUESTIONS))]
    return {"text": QUESTIONS[asked], "answers": {labels[asked]: PEOPLE}}
