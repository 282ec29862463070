"""transformers' VideoMAE, `VideoMAEForPreTraining` and `VideoMAEModel`: queries, keys and values apart, keys unbiased.

Version 5 calls the biases `query.bias` in memory and `q_bias` on disk, as version 4 did. Positions are computed.
"""

from __future__ import annotations

from typing import Any

from m3.config import M3Config
from m3.errors import M3Error
from m3.foreign import hugging, vision
from m3.foreign.checkpoint import Foreign
from m3.foreign.format import Format, ratio_of
from m3.foreign.rows import Left, Row, one, permuted, same, shaped
from m3.formats.videomae import DECODER, parts_of, video_config
from m3.formats.vit_mae import LAYERS, QKV

EPS = 1e-5
"""Of the norm before the head, which theirs leaves at PyTorch's own; all others follow the config."""


class VideoMae(Format):
    """transformers' VideoMAE."""

    title = "transformers' VideoMAE"
    left = (Left(r"(classifier|fc_norm)\..*", "a classifier of the task it was tuned for"),)

    def tidy(self, foreign: Foreign) -> Foreign:
        """Bring the variants to one: a model that is saved alone, and names in memory."""
        return foreign.renamed(
            (r"^(embeddings|encoder|layernorm)\.", r"videomae.\1."),
            (r"\.attention\.attention\.(q|v)(uery|alue)\.bias$", r".attention.attention.\1_bias"),
        )

    def fits(self, foreign: Foreign) -> bool:
        """Know it by its config, or by its names."""
        told = foreign.settings.get("model_type")
        return told == "videomae" or (
            not told and "videomae.encoder.layer.0.attention.attention.q_bias" in foreign.shapes
        )

    def config(self, foreign: Foreign, given: dict[str, Any]) -> dict[str, Any]:
        """Translate its config.

        Raises:
            M3Error: there is none, or it asks for what ours has not.
        """
        theirs = hugging.settings_of(foreign)
        if theirs["hidden_act"] != "gelu" or not theirs.get("qkv_bias", theirs.get("qv_bias")):
            raise M3Error("only GELU and biases of queries and values are read.")
        width, ratio = theirs["hidden_size"], ratio_of(theirs["intermediate_size"], theirs["hidden_size"])
        video = {"size": theirs["image_size"], "channels": theirs["num_channels"], "frames": theirs["num_frames"]}
        tokenizer = {"type": "tube", "size": theirs["patch_size"], "frames": theirs["tubelet_size"]}
        video |= {**hugging.colours_of(foreign), "tokenizer": tokenizer}
        backbone = {
            "width": width,
            "depth": theirs["num_hidden_layers"],
            "heads": theirs["num_attention_heads"],
            "mlp_ratio": ratio,
            "norm_eps": theirs["layer_norm_eps"],
            "final_norm": "videomae.layernorm.weight" in foreign.shapes,
        }
        if "encoder_to_decoder.weight" not in foreign.shapes:
            return video_config(video, backbone)
        if not theirs["norm_pix_loss"]:
            raise M3Error("it predicts pixels in [0, 1] (`norm_pix_loss` false), and ours normalised ones.")
        width, hidden = theirs["decoder_hidden_size"], theirs["decoder_intermediate_size"]
        if int(width * ratio) != hidden:
            raise M3Error(f"the decoder's MLP is {hidden} wide, but ours has the encoder's ratio {ratio:g}.")
        decoder = {"width": width, "depth": theirs["decoder_num_hidden_layers"], "norm_eps": EPS}
        return video_config(video, backbone, decoder | {"heads": theirs["decoder_num_attention_heads"]})

    def rows(self, config: M3Config) -> list[Row]:
        """Return the rows of the encoder, and of the decoder where there is one."""
        spec, cut, decoder = parts_of(config, self.title)
        kernel, theirs = (cut.channels, *cut.patch), "videomae.embeddings.patch_embeddings.projection"
        rows = [
            *vision.patches(theirs, "tokenizers.video.projection", spec.width, kernel),
            *_blocks("videomae.encoder.layer.{}", "backbone.blocks.{}", spec.depth),
            *(same("videomae.layernorm", "backbone.norm") if spec.final_norm else []),
        ]
        if decoder is None:
            return rows
        if (decoder.norm_eps or spec.norm_eps) != EPS:
            raise M3Error(
                f"the eps of the norm before its head is always {EPS:g}, and ours is not; give "
                f"objectives.reconstruct.decoder.norm_eps={EPS:g} if that is near enough."
            )
        order, width = vision.values_order(cut.patch, cut.channels), decoder.width
        return [
            *rows,
            shaped("mask_token", f"{DECODER}.mask_token", (1, 1, width), (1, width)),
            one("encoder_to_decoder.weight", f"{DECODER}.embed.weight"),
            *_blocks("decoder.decoder_layers.{}", f"{DECODER}.blocks.{{}}", decoder.depth),
            *same("decoder.norm", f"{DECODER}.norm"),
            *(permuted(f"decoder.head.{part}", f"{DECODER}.output.{part}", order) for part in ("weight", "bias")),
        ]

    def settings(self, config: M3Config) -> dict[str, Any]:
        """Return what `AutoModel` opens."""
        spec, cut, decoder = parts_of(config, self.title)
        if cut.size[1] != cut.size[2] or cut.patch[1] != cut.patch[2]:
            raise M3Error("its pictures and patches are square.")
        found = {
            "model_type": "videomae",
            "architectures": ["VideoMAEForPreTraining" if decoder else "VideoMAEModel"],
            "image_size": cut.size[1],
            "patch_size": cut.patch[1],
            "num_channels": cut.channels,
            "num_frames": cut.size[0],
            "tubelet_size": cut.patch[0],
            "hidden_size": spec.width,
            "num_hidden_layers": spec.depth,
            "num_attention_heads": spec.heads,
            "intermediate_size": int(spec.width * spec.mlp_ratio),
            "layer_norm_eps": spec.norm_eps,
            "qkv_bias": True,
            "qv_bias": True,
            "hidden_act": "gelu",
            "use_mean_pooling": not spec.final_norm,
        }
        if decoder is None:
            return found
        return found | {
            "decoder_hidden_size": decoder.width,
            "decoder_num_hidden_layers": decoder.depth,
            "decoder_num_attention_heads": decoder.heads,
            "decoder_intermediate_size": int(decoder.width * spec.mlp_ratio),
            "norm_pix_loss": True,
        }


def _blocks(theirs: str, ours: str, depth: int) -> list[Row]:
    own = f"{theirs}.attention.attention"
    return [
        *vision.blocks(theirs, ours, depth, LAYERS),
        *vision.split(tuple(f"{own}.{name}" for name in QKV), ours, depth, ("weight",)),
        *vision.unbiased_keys(f"{own}.q_bias", f"{own}.v_bias", ours, depth),
    ]
