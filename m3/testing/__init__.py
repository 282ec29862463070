"""The conformance kit: what every modality, tokenizer, scorer, target, objective and position kind must keep.

The built-in parts and those of other packages pass the same functions. Three lines in a plugin's own tests:

    from m3.testing import check_modality

    def test_lidar() -> None:
        check_modality({"type": "lidar", "size": 32}, samples=my_samples, tokenizer={"type": "voxels"})

Parts are named as in a recipe. A contract that is not kept raises an `AssertionError` with one sentence that
names the contract and the remedy. It needs no pytest.
"""

from m3.testing.learning import check_objective
from m3.testing.modality import check_modality
from m3.testing.parts import check_positions, check_scorer, check_target, grid_tokens
from m3.testing.tokenizer import check_tokenizer

__all__ = [
    "check_modality",
    "check_objective",
    "check_positions",
    "check_scorer",
    "check_target",
    "check_tokenizer",
    "grid_tokens",
]
