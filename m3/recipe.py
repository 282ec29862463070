"""Recipes: a YAML file read into strict typed settings, refused with a sentence before any work is done.

`base: other.yaml` inherits (a null removes a key; an entry with another `type` replaces the base's instead of
mixing with it), `a.b=c` on the command line overrides, and what comes out is saved beside the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from m3.backbone import BackboneSpec, TowerSpec
from m3.errors import M3Error, explain, nearest
from m3.overrides import NoDuplicates, merge, with_overrides
from m3.plugins import Strict

PACKAGED = Path(__file__).parent / "recipes"


Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class AugmentSpec(Strict):
    """One entry of `data.augment`; its other settings are those of the transform.

    Attributes:
        type: of pictures a transform in torchvision.transforms.v2, e.g. `color_jitter` for ColorJitter, or
            `rand_augment` or `random_erasing`, see `m3.data.policies`; of points `scale_translate`, see
            `m3.data.augment.ScaleTranslate`.
        chance: probability that it is applied at all.
    """

    type: str
    chance: Share = 1.0


class MixupSpec(Strict):
    """`data.mixup`: pairs of training samples become two mixtures of both, with their labels; see `m3.data.mixup`.

    Attributes:
        mixup: alpha of Beta(alpha, alpha), from which the share of a sample comes where values are added up (Zhang et
            al. 2018); 0: never.
        cutmix: alpha where a box of the picture is exchanged (Yun et al. 2019); 0: never.
        chance: probability that a pair is mixed at all.
        switch: probability of cutmix where both are possible.
    """

    mixup: NonNegativeFloat = 0.8
    cutmix: NonNegativeFloat = 1.0
    chance: Share = 1.0
    switch: Share = 0.5

    @model_validator(mode="after")
    def _something(self) -> MixupSpec:
        if not self.mixup and not self.cutmix:
            raise ValueError("`mixup` and `cutmix` are both 0, so nothing is mixed; remove `data.mixup`")
        return self


class BucketSpec(Strict):
    """`data.bucket`: batches of samples of similar length, so that little of them is padding.

    Attributes:
        by: the modality whose length counts.
        batches: of this many batches at a time, the samples are sorted by length; then all batches are shuffled.
    """

    by: str
    batches: PositiveInt = 16


class DataSpec(Strict):
    """The `data` section.

    Attributes:
        source: where samples come from: `world` (embedded scenes), `digits` (scikit-learn's), `folder`, `shards`,
            `hub`, `mixture`, or a plugin.
        root: folder or manifest of the data, for `folder`; folder or address (s3://...) of the tars, for `shards`.
        options: settings of the source, for `world`, `hub`, `mixture` and plugins.
        missing: `error`: every sample has every modality; `allow`: a sample may lack some.
        samples: at most this many training samples; the world makes this many scenes.
        labelled: only so many training samples are used, as even over the classes as can be: a whole number, or (with a
            point) a share; to see how few labels do, see `m3 labels`. A smaller choice is part of every larger one.
        held_out: samples kept for evaluation, never trained on.
        crop: smallest and largest share of the area of a random crop; null: no random crop.
        flip: probability of a horizontal flip.
        augment: modality of pictures or points -> random changes of their colours, or of the cloud, in training, each
            an `AugmentSpec`.
        mixup: mix training samples and their labels with each other, for fine-tuning; null: they stay as they are.
        repeats: crops of a sample that are used in a row, from one reading (repeated augmentation).
        keep: samples that each worker keeps in memory as they were read, before crops, so that the next epoch need not
            read them again; for data that are small, and slow to read or to render.
        bucket: sort samples of similar length into a batch; null: batches are drawn at random.
        drop: probability that a training sample loses a modality, for all or for each by name; one always stays.
        workers: processes that load data; 0 loads in the training process.
        max_unreadable: share of samples that may be unreadable (ten are always forgiven).
    """

    source: str = "world"
    root: str | None = None
    options: dict[str, Any] = Field(default={})
    missing: Literal["error", "allow"] = "error"
    samples: PositiveInt | None = None
    labelled: PositiveInt | PositiveShare | None = None
    held_out: NonNegativeInt = 256
    crop: tuple[PositiveShare, PositiveShare] | None = None
    flip: float = Field(default=0.0, ge=0, le=1)
    augment: dict[str, list[dict[str, Any]]] = Field(default={})
    mixup: MixupSpec | None = None
    repeats: PositiveInt = 1
    keep: NonNegativeInt = 0
    bucket: BucketSpec | None = None
    drop: Share | dict[str, Share] = 0.0
    workers: NonNegativeInt = 2
    max_unreadable: float = Field(default=0.01, ge=0, le=1)

    @field_validator("root")
    @classmethod
    def _absolute(cls, root: str | None) -> str | None:
        """A saved recipe must find its data from every folder; an address is already complete."""
        return root if root is None or "://" in root else str(Path(root).expanduser().resolve())

    @model_validator(mode="after")
    def _no_contradiction(self) -> DataSpec:
        if self.crop and self.crop[0] > self.crop[1]:
            raise ValueError(f"`crop` is smallest, then largest: write [{self.crop[1]}, {self.crop[0]}]")
        if self.source == "world" and self.root is not None:
            raise ValueError("source `world` makes its own scenes and reads no `root`; add data.source=folder")
        return self


class Momentum(Strict):
    """How slowly an average follows: average <- m average + (1 - m) weights, m moving from `start` to `end`.

    Attributes:
        start: m of the first step.
        end: m once it has arrived; 1 stands still.
        steps: that it takes; null: all of the run.
        curve: `linear` (I-JEPA, data2vec) or half a `cosine`.
    """

    start: float = Field(gt=0, lt=1)
    end: float = Field(gt=0, le=1)
    steps: PositiveInt | None = None
    curve: Literal["linear", "cosine"] = "linear"


class TrainSpec(Strict):
    """The `train` section.

    Attributes:
        steps: optimizer steps; give this or `epochs`.
        epochs: passes over the training samples.
        batch_size: samples per optimizer step over all processes and micro-batches.
        micro_batch: samples per process and forward pass; null: as many as make one pass per step.
        lr: base learning rate.
        lr_per: the learning rate is lr * batch_size / lr_per (MAE: 256); null: lr is used as it is.
        min_lr: where the schedule ends, scaled like `lr`.
        schedule: of the learning rate after the warm-up: half a `cosine` or `linear` down to `min_lr`, or `constant`.
        warmup: linear warm-up from 0, in the unit of the run's length (steps or epochs).
        milestones: when the learning rate falls to a tenth, in the same unit, instead of a cosine (SimMIM).
        weight_decay: AdamW's.
        weight_decay_end: where half a cosine takes it over the run (I-JEPA); null: it stays.
        decay: `matrices`: no decay of biases and other 1-D parameters (MAE); `weights`: nor of class tokens and learned
            positions (timm, MAE's fine-tuning); `all` (MultiMAE).
        layer_decay: factor on the learning rate from each block to the one before it, for fine-tuning, see
            `m3.schedule.layer_scales`; null: one learning rate for all.
        betas: AdamW's.
        eps: AdamW's.
        clip: largest gradient norm; null: no clipping.
        mix: objective -> weight; one of them is drawn for each step, on all processes (UNITER), beside those that are
            not named, which take part in all steps; null: all take part.
        precision: `bf16`, `fp32`, or `auto`: bf16 where the device computes it natively.
        threads: CPU threads per process, on a run without GPU; null: the cores shared out among the processes.
        compile: run the network through torch.compile.
        checkpoint_activations: keep only what goes into each block of a transformer, and compute what is in it again in
            the backward pass: less memory for a third more work, and the same gradients.
        ema: momentum of an averaged copy of the weights: one number, or a `Momentum`; null: none. It is saved beside
            the model as `model_ema` and is the teacher of objectives that learn from one (`latent`).
        log_every: steps between two lines of metrics.
        save_every: steps between two checkpoints; null: ten in a run.
        keep: newest checkpoints that are kept.
        keep_every: checkpoints of the steps that are multiples of it are written and never removed; null: none.
        keep_best: name of what is measured on held-out samples (`evaluate.tasks`); a checkpoint is written whenever it
            is better than ever after `evaluate.every` steps, and the best one is kept; null: none.
        save_in_background: training only waits until a checkpoint is copied in memory, not until it is written.
        on_save_error: a checkpoint that can't be written, e.g. because the disk is full, is a warning (`warn`) or ends
            the run (`stop`); at the end of the run it is an error.
        max_skipped: steps in a row that may be skipped because their loss or gradient is not finite.
        timeout: seconds after which a process or a loader of data that does not answer counts as dead; processes wait
            that long for one that measures or saves.
        trackers: Accelerate's trackers by name, e.g. tensorboard, wandb.
    """

    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    batch_size: PositiveInt = 64
    micro_batch: PositiveInt | None = None
    lr: PositiveFloat = 1.5e-4
    lr_per: PositiveInt | None = None
    min_lr: NonNegativeFloat = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: NonNegativeFloat = 0.0
    milestones: tuple[PositiveFloat, ...] = ()
    weight_decay: NonNegativeFloat = 0.05
    weight_decay_end: PositiveFloat | None = None
    decay: Literal["matrices", "weights", "all"] = "matrices"
    layer_decay: PositiveShare | None = None
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    clip: PositiveFloat | None = None
    mix: dict[str, PositiveFloat] | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    threads: PositiveInt | None = None
    compile: bool = False
    checkpoint_activations: bool = False
    ema: Momentum | None = None
    log_every: PositiveInt = 10
    save_every: PositiveInt | None = None
    keep: PositiveInt = 2
    keep_every: PositiveInt | None = None
    keep_best: str | None = None
    save_in_background: bool = False
    on_save_error: Literal["warn", "stop"] = "warn"
    max_skipped: NonNegativeInt = 10
    timeout: PositiveInt = 1800
    trackers: tuple[str, ...] = ("tensorboard",)

    @field_validator("ema", mode="before")
    @classmethod
    def _constant(cls, ema: Any) -> Any:
        """One number stands for a momentum that stays."""
        return {"start": ema, "end": ema} if isinstance(ema, int | float) else ema

    @model_validator(mode="after")
    def _one_length(self) -> TrainSpec:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`, not both and not neither")
        return self


class EvaluateSpec(Strict):
    """The `evaluate` section.

    Attributes:
        every: steps between evaluations with a picture; null: only at the end.
        samples: held-out samples that are used.
        fit_samples: training samples that baselines and probes are fitted on.
        tasks: name -> what is measured; `type: predict` where it has none.
        preview_rows: samples in the picture.
        weights: which are measured: the `model`'s, or their average (`train.ema`), beside which the figures are saved.
            Only features that a teacher gives come from the average either way.
    """

    every: PositiveInt | None = None
    samples: PositiveInt = 256
    fit_samples: PositiveInt = 512
    tasks: dict[str, dict[str, Any]] = Field(default={})
    preview_rows: PositiveInt = 6
    weights: Literal["model", "ema"] = "model"


class Recipe(Strict):
    """A whole run.

    Attributes:
        name: of the run; its folder is `runs/NAME` unless `out` says otherwise.
        out: run folder.
        seed: of weights, data order, masks and crops.
        modalities: name -> settings of the modality with its tokenizer.
        backbone: the shared transformer.
        towers: name -> a transformer of its own for some modalities; all others are read by `backbone`.
        objectives: name -> settings of the objective.
        init: folder or Hub id of a trained model to start from; null: fresh weights.
        data: where samples come from.
        train: how long and how.
        evaluate: what is measured on held-out samples.
    """

    name: str
    out: str | None = None
    seed: NonNegativeInt = 0
    modalities: dict[str, dict[str, Any]] = Field(min_length=1)
    backbone: BackboneSpec = BackboneSpec()
    towers: dict[str, TowerSpec] = Field(default={})
    objectives: dict[str, dict[str, Any]] = Field(min_length=1)
    init: str | None = None
    data: DataSpec = DataSpec()
    train: TrainSpec
    evaluate: EvaluateSpec = EvaluateSpec()

    @model_validator(mode="after")
    def _best_is_measured(self) -> Recipe:
        if self.train.keep_best and not self.evaluate.every:
            raise ValueError("`train.keep_best` needs measures during the run; set `evaluate.every`")
        return self

    @model_validator(mode="after")
    def _average_is_there(self) -> Recipe:
        if self.evaluate.weights == "ema" and not self.train.ema:
            raise ValueError("`evaluate.weights: ema` measures an average, and the run keeps none; set `train.ema`")
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out or f"runs/{self.name}")


def load_recipe(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: path of a YAML file, or the name of a packaged recipe such as `mae_vit_b`.
        overrides: `a.b=c`, applied in order.

    Raises:
        M3Error: no such recipe, unknown key, wrong type or contradiction, with file, key path and remedy.
    """
    path = find_recipe(source)
    return recipe_from(with_overrides(_read(path), overrides), path.name, default_name=path.stem)


def recipe_from(settings: dict[str, Any], where: str, default_name: str = "run") -> Recipe:
    """Check settings that were read elsewhere; `where` names their origin in error messages."""
    settings = {"name": default_name, **settings}
    try:
        return Recipe(**settings)
    except ValidationError as error:
        raise M3Error(f"{where}: {explain(error, Recipe, '')}") from error


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe out in full, as YAML that can itself be run."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def find_recipe(source: str | Path) -> Path:
    """Return the file of a recipe given by path or packaged name."""
    for path in (Path(source), PACKAGED / f"{source}.yaml"):
        if path.is_file():
            return path
    names = [path.stem for path in PACKAGED.glob("*.yaml")]
    raise M3Error(
        f"there is no recipe `{source}`, neither a file nor a packaged one.{nearest(Path(source).stem, names)}"
    )


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise M3Error(f"{path.name}: `base` leads back to itself; break the circle.")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=NoDuplicates)
    except yaml.YAMLError as error:
        raise M3Error(f"{path.name}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise M3Error(f"{path.name}: a recipe is a set of keys and values, got {type(settings).__name__}.")
    base = settings.pop("base", None)
    if base is None:
        return settings
    beside = path.parent / base
    parent = _read(beside if beside.is_file() else find_recipe(base), (*seen, path.resolve()))
    parent.pop("name", None)
    return merge(parent, settings)
