"""transformers' Data2VecVision, `Data2VecVisionModel`: BEiT's transformer under another name."""

from __future__ import annotations

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign.rows import Left, Row
from m3.formats import beit, hf_beit


class HfData2vecVision(hf_beit.HfBeit):
    """transformers' Data2VecVision."""

    title = "transformers' Data2VecVision"
    kind = "data2vec-vision"
    prefix = "data2vec_vision"
    model = "Data2VecVisionModel"
    left = (
        beit.INDEX,
        Left(r"(classifier|data2vec_vision\.pooler)\..*", "a layer of the task it was tuned for"),
        Left(
            r"data2vec_vision\.embeddings\.mask_token",
            "a mask token of its pretraining, which the encoder does not use",
        ),
    )

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of the encoder."""
        if config.objectives:
            raise M3Error(f"{self.title} is one encoder of images without objectives; choose a format that holds more.")
        return super().rows(config)
