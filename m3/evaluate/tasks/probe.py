"""A linear probe: how well a label can be read off frozen features, beside the same probe on something simpler.

Letters: n samples, F features, K classes.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from m3.errors import M3Error
from m3.evaluate.features import LabelSpec, LabelTask, tower_of
from m3.evaluate.linear import Attentive, train_linear
from m3.model import M3Model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Values of scikit-learn's C that are tried, the strongest regularisation first."""


class Probe(LabelTask):
    """Accuracy on held-out samples of a linear classifier that was fitted on training samples.

    `logistic` and `svm`: features are standardised; the regularisation is the best of `STRENGTHS` on the last fifth of
    the training samples, for the model's features and for the baseline's alike. `sgd`: the protocol of published
    numbers (He et al. 2022, A.1), which reports the best learning rate on the held-out samples themselves.
    """

    class Spec(LabelSpec):
        """Settings of `type: probe`.

        Attributes:
            classifier: `logistic` regression; linear `svm`, as is usual for point clouds; `sgd`: BatchNorm without
                scale and shift, then a linear layer, trained by `optimizer`.
            optimizer: of `sgd`.
            rates: learning rates that `sgd` tries, each for a batch of 256.
            epochs: of `sgd`; a tenth of them warms up, then half a cosine.
            batch_size: of `sgd`.
        """

        classifier: Literal["logistic", "svm", "sgd"] = "logistic"
        optimizer: Literal["lars", "sgd", "adamw"] = "lars"
        rates: tuple[PositiveFloat, ...] = Field(default=(0.01, 0.1, 1.0, 10.0), min_length=1)
        epochs: PositiveInt = 90
        batch_size: PositiveInt = 256

    def __init__(self, spec: Spec, name: str, model: M3Model, seed: int) -> None:
        super().__init__(spec, name, model, seed)
        if spec.pool == "attentive" and (wrong := {"raw", "pca"} & set(spec.baseline)):
            raise M3Error(
                f"evaluate.tasks.{name}.baseline: `{wrong.pop()}` has no tokens to attend to; set baseline: random."
            )

    def guess(
        self, features: dict[str, np.ndarray], labels: np.ndarray, truth: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Fit the classifier on training samples and classify the held-out ones."""
        spec = self.spec
        if spec.classifier == "sgd":
            tried = {rate: self._trained(features, labels, rate) for rate in spec.rates}
            scores = {str(rate): float((guesses == truth).mean()) for rate, guesses in tried.items()}
            best = max(tried, key=lambda rate: scores[str(rate)])
            return tried[best], {"learning rates tried": scores, "learning rate": best}
        strength = best_strength(features["train"], labels, spec.classifier)
        guesses = classify(features["train"], labels, features["held_out"], spec.classifier, strength)
        return guesses, {"C": strength}

    def _trained(self, features: dict[str, np.ndarray], labels: np.ndarray, rate: float) -> np.ndarray:
        spec = self.spec
        pool = Attentive(tower_of(self.model, self.inputs), self.seed) if spec.pool == "attentive" else None
        return train_linear(features, labels, spec.optimizer, rate, spec.epochs, spec.batch_size, self.seed, pool)

    def figures(self) -> dict[str, Figure]:
        """Return the confusion matrix of the model's probe."""
        return {f"{self.name}: what is taken for what": confusion(self.truth, self.guesses)}


def best_strength(train: np.ndarray, labels: np.ndarray, kind: str) -> float:
    """Return the value of C that is best on the last fifth of the training samples (n, F)."""
    cut = len(labels) * 4 // 5

    def on_the_rest(strength: float) -> float:
        return float((classify(train[:cut], labels[:cut], train[cut:], kind, strength) == labels[cut:]).mean())

    return max(STRENGTHS, key=on_the_rest) if cut else STRENGTHS[0]


def classify(train: np.ndarray, labels: np.ndarray, others: np.ndarray, kind: str, strength: float) -> np.ndarray:
    """Return the class (m,) of `others` (m, F); a fit that has not settled after 1000 iterations is taken as it is."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC
    from threadpoolctl import threadpool_limits

    if len(np.unique(labels)) == 1:
        return np.full(len(others), labels[0])
    # Where it draws, it must not draw from numpy's common generator: measuring would change the training that follows.
    linear: Any = LogisticRegression(C=strength, max_iter=1000)
    if kind == "svm":
        linear = LinearSVC(C=strength, dual="auto", random_state=0)
    # One thread: those of products this small wait for each other ten times as long as they compute.
    with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the strength is chosen by what it reaches
        return make_pipeline(StandardScaler(), linear).fit(train, labels).predict(others)


def confusion(truth: np.ndarray, guesses: np.ndarray) -> Figure:
    """Draw how often each class (rows) is taken for each (columns), in shares of the row."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    count = len(np.union1d(truth, guesses))
    side = min(8.0, 2.2 + 0.45 * count)
    figure = Figure(figsize=(side, side), layout="constrained", dpi=110)
    ConfusionMatrixDisplay.from_predictions(
        truth,
        guesses,
        normalize="true",
        ax=figure.subplots(),
        cmap="Blues",
        colorbar=False,
        values_format=".2f",
        include_values=count <= 12,
    )
    return figure
