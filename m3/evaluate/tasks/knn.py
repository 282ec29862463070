"""Nearest neighbours: how well a label can be told by the training samples whose frozen features are most alike.

Letters: n training samples, m held-out samples, F features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from m3.evaluate.features import LabelSpec, LabelTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN, BESIDE = 6, 5
"""Held-out samples in the picture, and neighbours beside each."""


class Knn(LabelTask):
    """Accuracy of the vote of the k training samples of highest cosine similarity (scikit-learn's classifier).

    The number of neighbours is the best of `k` on the last fifth of the training samples, for the model's features and
    for the baseline's alike.
    """

    PICTURES = 512

    class Spec(LabelSpec):
        """Settings of `type: knn`.

        Attributes:
            k: numbers of neighbours that are tried.
            weights: every neighbour's vote counts the same (`uniform`), or exp(similarity / temperature) (`softmax`;
                Wu et al. 2018, 3.4).
            temperature: of `softmax`.
        """

        k: tuple[PositiveInt, ...] = Field(default=(1, 5, 10, 20), min_length=1)
        weights: Literal["uniform", "softmax"] = "softmax"
        temperature: PositiveFloat = 0.07

    def guess(
        self, features: dict[str, np.ndarray], labels: np.ndarray, truth: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Let the nearest training samples vote."""
        train, cut = features["train"], len(labels) * 4 // 5
        tried = {}
        for k in self.spec.k if cut else self.spec.k[:1]:
            guesses = self._vote(train[:cut], labels[:cut], train[cut:], k) if cut else labels[:0]
            tried[str(k)] = float((guesses == labels[cut:]).mean()) if cut else 0.0
        best = max(tried, key=lambda k: tried[k])
        return self._vote(train, labels, features["held_out"], int(best)), {"k": int(best), "k tried": tried}

    def _vote(self, train: np.ndarray, labels: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
        from sklearn.neighbors import KNeighborsClassifier

        weights: Any = "uniform" if self.spec.weights == "uniform" else self._softmax
        return (
            KNeighborsClassifier(min(k, len(train)), weights=weights, metric="cosine")
            .fit(train, labels)
            .predict(others)
        )

    def _softmax(self, distance: np.ndarray) -> np.ndarray:
        """Return the weights of neighbours at cosine distances 1 - similarity."""
        return np.exp((1 - distance) / self.spec.temperature)

    def figures(self) -> dict[str, Figure]:
        """Return held-out samples with the training samples that are most like them."""
        from matplotlib.figure import Figure
        from sklearn.neighbors import NearestNeighbors

        shown, known = self.kept["held_out"].pictures[:SHOWN], self.kept["train"].pictures
        beside = min(BESIDE, len(known))
        search = NearestNeighbors(n_neighbors=beside, metric="cosine").fit(self.features["train"][: len(known)])
        nearest = search.kneighbors(self.features["held_out"][: len(shown)], return_distance=False)
        figure = Figure(figsize=(1.3 * (beside + 1), 1.3 * len(shown) + 0.3), layout="constrained", dpi=110)
        axes = figure.subplots(len(shown), beside + 1, squeeze=False)
        for row, line in enumerate(axes):
            pictures = [shown[row], *(known[i] for i in nearest[row])]
            for axis, picture in zip(line, pictures, strict=True):
                axis.imshow(picture, interpolation="nearest")
                axis.set_axis_off()
        axes[0][0].set_title("held out", fontsize=9)
        axes[0][1].set_title("most alike in training", fontsize=9, loc="left")
        return {f"{self.name}: nearest neighbours": figure}
