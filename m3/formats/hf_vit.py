"""transformers' ViT, `ViTModel` and `ViTForImageClassification`: ViTMAE's names without a decoder."""

from __future__ import annotations

from typing import Any

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import hugging, vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import SHOWN, Format, backbone_of
from m3.foreign.rows import Left, Row, same
from m3.formats.vit_mae import OLD, encoder_rows

TITLE = "transformers' ViT"
HALF = (0.5, 0.5, 0.5)
HEAD = "classifier.weight"


class HfVit(Format):
    """transformers' ViT."""

    title = TITLE
    left = (
        Left(r"(vit\.pooler|pooler)\..*", "a layer behind the class token that no published task uses"),
        Left(r"vit\.embeddings\.mask_token", "a mask token of its pretraining, which the encoder does not use"),
    )

    def tidy(self, foreign: Foreign) -> Foreign:
        """Bring the layouts of all versions to one."""
        return foreign.renamed(*OLD)

    def fits(self, foreign: Foreign) -> bool:
        """Know it by the names of the first block, and that no config says otherwise."""
        needed = {"vit.embeddings.cls_token", "vit.encoder.layer.0.layernorm_before.weight"}
        is_alone = not any(name.startswith("decoder.") or name.endswith(".lambda_1") for name in foreign.shapes)
        return needed <= foreign.shapes.keys() and is_alone and foreign.settings.get("model_type", "vit") == "vit"

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Translate its config."""
        theirs = hugging.settings_of(foreign)
        if not theirs["qkv_bias"]:
            raise M3Error("its queries, keys and values have no bias, which is not read.")
        image = hugging.image_of(foreign, theirs, HALF, HALF)
        backbone = hugging.tower_of(theirs) | {"class_tokens": 1, "class_positions": True}
        found: dict[str, Any] = {"modalities": {"image": image}, "backbone": backbone, "objectives": {}}
        if HEAD in foreign.shapes:
            several = theirs.get("problem_type") == "multi_label_classification"
            sections = vision.classifier_sections(foreign.shapes[HEAD][0], "class", several)
            found["modalities"] |= sections["modalities"]
            found["objectives"] |= sections["objectives"]
        return found

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of the encoder, and of the classifier where there is one."""
        image, backbone, found = _parts(config)
        rows = encoder_rows(image, backbone)
        return rows if found is None else [*rows, *same("classifier", f"objectives.{found.name}.head")]

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return what `AutoModel` and `AutoModelForImageClassification` open; classes are called by their numbers."""
        image, backbone, classifier = _parts(config)
        found = hugging.tower_settings(backbone) | hugging.image_settings(image)
        found = {"model_type": "vit", "architectures": ["ViTModel"], "qkv_bias": True, **found}
        if classifier is None:
            return found
        names = {str(number): f"LABEL_{number}" for number in range(classifier.classes)}
        found |= {"architectures": ["ViTForImageClassification"], "id2label": names}
        found["label2id"] = {name: int(number) for number, name in names.items()}
        return found | ({"problem_type": "multi_label_classification"} if classifier.several else {})


def _parts(config: M3Config) -> tuple[dict[str, Any], dict[str, Any], vision.Classifier | None]:
    """Return the modality `image`, the backbone, and the classifier if there is one.

    Raises:
        M3Error: the model holds anything else.
    """
    found = vision.classifier_of(config, TITLE)
    backbone = backbone_of(config, TITLE, free=(*SHOWN, "mlp", "final_norm")).model_dump()
    if found and (found.pool != "class" or not backbone["final_norm"]):
        raise M3Error(f"{TITLE} classifies by the class token behind `final_norm`; this model does it otherwise.")
    return (config.modalities or {})["image"], backbone, found
