"""Every choice of a run, as frozen dataclasses that are checked when they are made.

`Config` is what a preset is, what the command line overrides field by field, and what
`config.json` in a run directory holds (written and read by `jaxunet.config_json`). The
docstrings under the fields are the help texts of the command line.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxunet.augmentation_config import AugmentationConfig, Strength
from jaxunet.model_config import ModelConfig
from jaxunet.ranges import require, require_at_least, require_positive

MAX_MEGAPIXELS = 128
"""Largest image that is decoded unless another limit is given, in millions of pixels.
Telephones take 108, which decoded are 324 MB; the largest official ISIC 2018 image has 30."""

IGNORED = 128
"""What a pixel that doesn't count is in a mask once it is read, whatever it was in its file;
lesion is 255, background 0."""


@dataclass(frozen=True)
class DataConfig:
    """Which images, where they lie and how they are read."""

    name: Literal["synthetic", "isic2018", "folder"] = "synthetic"
    """Dataset: `synthetic` (drawn from a seed), `isic2018` (the challenge's Task 1), or
    `folder` (your own images and masks)."""
    dir: Path | None = None
    """Where the source files are: for `isic2018` a folder with the official zips or what
    they unpack to (none: TFDS downloads 13 GB), for `folder` the folder itself."""
    prepared_dir: Path | None = None
    """Where prepared datasets are kept (none: TFDS's own place, `~/tensorflow_datasets`
    or `$TFDS_DATA_DIR`)."""
    image_size: int = 256
    """Side in pixels of the square images that the model sees."""
    stored_size: int | Literal["native", "auto"] = "auto"
    """Side in pixels at which images are stored when the dataset is prepared; `native`
    keeps the original files, `auto` is 256 or 512, whichever holds `image_size`."""
    train_split: str = "train"
    """Split to train on; TFDS slices such as `train[:90%]` work."""
    validation_split: str = "validation"
    """Split to validate on."""
    loader: Literal["grain", "tfdata"] = "grain"
    """Input pipeline: Grain, or tf.data (needs the extra `[tf]`)."""
    cache: Literal["none", "host", "device"] = "none"
    """`host` keeps decoded images in memory after they are first read; `device` keeps each
    split in the memory of every device (2,594 images of 256 px are 680 MB)."""
    workers: int = 0
    """Worker processes that read and decode (0: threads of the main process). Grain only."""
    binarize: bool = False
    """Take masks of other values than 0 and 255, and grey ones saved in colour. One value
    beside 0 is the lesion; several are cut at half of their type's range (127 of 8 bits)."""
    ignore_value: int | None = None
    """Value of the pixels in masks that don't count (hair, rulers, uncertain rims): they are
    left out of the loss and of every score (none: all count)."""
    max_megapixels: int = MAX_MEGAPIXELS
    """Largest picture that is decoded, in millions of pixels. One of 128 takes up to 1 GB, and
    eight are prepared at once where there are as many cores."""
    images: str | None = None
    """`folder`: sub-folder of the images (none: `images`, `image`, `imgs` or `img`, or side
    by side with the masks)."""
    masks: str | None = None
    """`folder`: sub-folder of the masks (none: `masks`, `mask`, `labels`, `label`, `gt`,
    `groundtruth` or `annotations`, or side by side with the images)."""
    mask_suffix: str | None = None
    """`folder`: what a mask's name adds to its image's (none: nothing, `_segmentation`,
    `_mask`, `_lesion`, `_label` or `_gt`)."""
    folder_split: Literal["hash", "permutation"] = "hash"
    """`folder` without split sub-folders: how it is split 80/10/10. By a hash of each id, so
    that a picture that comes or goes moves no other; or by a permutation of their number, as
    before this option."""
    folder_split_seed: int = 0
    """`folder` without split sub-folders: seed of the split."""
    synthetic_train: int = 384
    """`synthetic`: number of training images."""
    synthetic_validation: int = 64
    """`synthetic`: number of validation images (as many again for test)."""
    synthetic_seed: int = 0
    """`synthetic`: seed the pictures are drawn from."""

    def __post_init__(self) -> None:
        require_at_least("data.image_size", self.image_size, 1)
        if isinstance(self.stored_size, int):
            require_at_least("data.stored_size", self.stored_size, 1)
        require_at_least("data.workers", self.workers, 0)
        require(
            not (self.cache != "none" and self.workers),
            "data.workers",
            self.workers,
            f"0 with data.cache {self.cache!r}, which reads in the main process",
        )
        require_at_least("data.synthetic_seed", self.synthetic_seed, 0)
        require_at_least("data.folder_split_seed", self.folder_split_seed, 0)
        require_at_least("data.max_megapixels", self.max_megapixels, 1)
        for name in ("images", "masks", "mask_suffix"):
            require(getattr(self, name) != "", f"data.{name}", "", "a name")
        require_at_least("data.synthetic_train", self.synthetic_train, 1)
        require_at_least("data.synthetic_validation", self.synthetic_validation, 1)
        require(
            self.name != "folder" or self.dir is not None,
            "data.dir",
            self.dir,
            "the folder that holds the images and masks when data.name is 'folder'",
        )
        require(
            not (self.loader == "tfdata" and self.workers),
            "data.workers",
            self.workers,
            "0 with data.loader 'tfdata', which has threads of its own",
        )
        if self.ignore_value is not None:
            require(
                0 < self.ignore_value <= 254 + self.binarize,
                "data.ignore_value",
                self.ignore_value,
                "from 1 to 254, or 255 with data.binarize (0 is background, and 255 is lesion "
                "unless data.binarize takes another value for it)",
            )
            require(
                self.name != "synthetic" and self.dir is not None,
                "data.ignore_value",
                self.ignore_value,
                "none where masks are drawn or downloaded and hold only 0 and 255; it is for "
                "files of your own in data.dir",
            )

    @property
    def resolved_stored_size(self) -> int | Literal["native"]:
        """`stored_size` with `auto` decided."""
        if self.stored_size != "auto":
            return self.stored_size
        for size in (256, 512):
            if self.image_size <= size:
                return size
        return "native"


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates (Optax)."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimizer."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or cosine to zero at the last step."""
    extend: Literal["hold", "cycle", "stretch"] | None = None
    """How a run with a cosine goes on when it is resumed with other train.epochs: `hold`, at
    its last rate; `cycle`, with a new cosine; `stretch`, on the cosine of the new length."""
    extended_at: tuple[int, ...] = ()
    """Updates at which the run was to end before it was made longer; --resume records them."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from zero."""
    warmup_fraction: float = 0.0
    """The same as a share of the run's updates, so that it fits any number of images."""
    clip_norm: float | None = None
    """Clip the gradient's global norm to this value."""
    accumulate_steps: int = 1
    """Parts of train.batch_size images that a step computes one after another for a single
    update: of accumulate_steps * train.batch_size images, with the loss and the gradient of
    one batch of so many, and batch norm's statistics of each part. An epoch has as many steps
    as there are such large batches; the last is filled up with padding, which has no weight."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights and of batch norm's statistics,
    used to evaluate; for the first updates it is less, (1 + n) / (10 + n) at the n-th."""
    encoder_rate: float = 1.0
    """The encoder's learning rate as a multiple of learning_rate."""
    freeze_epochs: int = 0
    """Epochs at the start in which the encoder's weights stay as they are; its batch norm's
    statistics move unless model.encoder_statistics is `frozen`."""

    def __post_init__(self) -> None:
        require_positive("optimizer.learning_rate", self.learning_rate)
        require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "in [0, 1)")
        require_at_least("optimizer.weight_decay", self.weight_decay, 0)
        require_at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        fraction = self.warmup_fraction
        require(0 <= fraction < 1, "optimizer.warmup_fraction", fraction, "in [0, 1)")
        require(
            not (fraction and self.warmup_steps),
            "optimizer.warmup_fraction",
            fraction,
            f"0 where optimizer.warmup_steps is given (it is {self.warmup_steps})",
        )
        require(
            all(a < b for a, b in itertools.pairwise((0, *self.extended_at))),
            "optimizer.extended_at",
            self.extended_at,
            "positive numbers that rise",
        )
        require_at_least("optimizer.accumulate_steps", self.accumulate_steps, 1)
        require_positive("optimizer.encoder_rate", self.encoder_rate)
        require_at_least("optimizer.freeze_epochs", self.freeze_epochs, 0)
        if self.clip_norm is not None:
            require_positive("optimizer.clip_norm", self.clip_norm)
        if self.ema_decay is not None:
            require(0 < self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "in (0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: int = 5
    """Passes over the training split."""
    batch_size: int = 8
    """Images in a global batch, all devices together; a step takes one such batch, or
    optimizer.accumulate_steps of them."""
    eval_batch_size: int | None = None
    """Images in a global batch of evaluation; scores don't depend on it (none: 4, and on a
    GPU as in training, whose algorithms are searched for by then)."""
    loss: Literal["bce", "dice", "bce_dice", "jaccard", "focal", "tversky", "lovasz"] = "bce"
    """Loss function."""
    augment: Strength = "flip"
    """How far each picture is varied, anew at each step, on the device.
    none: not at all.
    flip: flipped left to right with probability 0.5, as in the reference.
    standard: also turned by any angle, scaled by up to 1.25, shifted by up to 10%, its
    brightness, contrast and saturation changed by up to 20%, its hue by 10 degrees.
    strong: further (1.5, 15%, 30%, saturation 40%, 20 degrees), and blurred, with noise, and
    a square of it hidden."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    threshold: float = 0.5
    """Probability above which a pixel counts as lesion."""
    seed: int = 0
    """Seed of initial weights, order of examples and augmentation."""
    checkpoint_every: int = 0
    """Also save every so many steps (0: at the end of each epoch only)."""
    log_every: int = 10
    """Write the training loss to metrics.jsonl every so many steps."""
    best_metric: Literal["dice", "iou", "threshold_jaccard"] = "dice"
    """Per-image validation score by which the best checkpoint is kept."""
    patience: int = 0
    """End the run when best_metric has not risen for so many epochs, those before a resume
    counted (0: never)."""
    microbatch: int | None = None
    """Compute train.batch_size in parts of so many images, one after another, in less memory:
    the same loss and gradient to rounding, and batch norm's statistics of each part (none: in
    one). It must divide train.batch_size."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "log_every"):
            require_at_least(f"train.{name}", getattr(self, name), 1)
        if self.eval_batch_size is not None:
            require_at_least("train.eval_batch_size", self.eval_batch_size, 1)
        require_at_least("train.checkpoint_every", self.checkpoint_every, 0)
        require_at_least("train.patience", self.patience, 0)
        part = self.batch_size if self.microbatch is None else self.microbatch
        require(
            part > 0 and self.batch_size % part == 0,
            "train.microbatch",
            part,
            f"a divisor of train.batch_size ({self.batch_size})",
        )
        require(0 <= self.seed < 2**63, "train.seed", self.seed, "from 0 to 2**63 - 1")
        require(0 < self.threshold < 1, "train.threshold", self.threshold, "between 0 and 1")


@dataclass(frozen=True)
class Config:
    """Everything that determines a run's numbers.

    >>> config = jaxunet.Config(data=jaxunet.DataConfig(image_size=64))
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        require_at_least("data.image_size", self.data.image_size, self.model.least_image_size)

    @property
    def examples_per_step(self) -> int:
        """Images that one training step, which is one update, takes."""
        return self.train.batch_size * self.optimizer.accumulate_steps

    @property
    def parts_per_step(self) -> int:
        """In how many parts a step computes them, one after another."""
        return self.examples_per_step // (self.train.microbatch or self.train.batch_size)
