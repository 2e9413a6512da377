"""Training one unit and its weak classifier, in front of units that are frozen."""

import contextlib
from collections.abc import Generator, Iterator
from functools import partial

import torch
from boost_config import BoostConfig
from config import Config
from errors import LoneError, TrainError
from image_view import ImageView
from torch import Tensor
from trainer import Trainer
from workers import Workers

from fastres.boost import (
    BoostError,
    FeatureCache,
    boosting_loss,
    chunks,
    features,
    fill,
    freeze,
    outputs,
)
from fastres.data import ImageSet, Splits
from fastres.models import ResNet

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@contextlib.contextmanager
def in_words(kind: type[TrainError] = TrainError) -> Iterator[None]:
    """What boosting refuses is an error for the person at the terminal."""
    try:
        yield
    except BoostError as error:
        raise kind(str(error)) from error


class Frozen(ImageView):
    """The parts that are grown, in eval mode for good, and what they make of the training images.

    Attributes:
        parts: each a unit and its classifier, the first with the stem.
        cache: their features of the training set; None where there are none yet, or where features
            are computed from the images each time.
    """

    def __init__(self, config: BoostConfig, workers: Workers, data: Splits) -> None:
        super().__init__(config, data, workers.device)
        self.config, self.workers, self.data = config, workers, data
        self.parts: list[ResNet] = []
        self.cache: FeatureCache | None = None
        precision = config.cache_precision
        self._stored = (self.half or torch.float32) if precision == "auto" else _DTYPES[precision]

    def add(self, part: ResNet) -> None:
        """Freeze a part for good; a cache is then one part behind until `advance`."""
        self.parts.append(freeze(part))

    def advance(self) -> None:
        """Replace the cache by the features that the last part hands on.

        Computed chunk by chunk from the part before, and rounded as they are stored, also where a
        resumed growth goes through all parts anew: so they are bitwise the same.

        Raises:
            TrainError: on every process at once; there is no room for them.
        """
        if self.config.features == "fresh":
            return
        for part in self.parts if self.cache is None else self.parts[-1:]:
            self.cache = self.workers.together(partial(self._pass, part))

    def _pass(self, part: ResNet) -> FeatureCache:
        train, device = self.data.train, self.workers.device

        def source(first: int, last: int) -> Tensor:
            x = self.plain(train, first, last) if self.cache is None else self.take(first, last)
            with self._autocast():
                return features(part, x)

        with in_words():
            return fill(source, len(train), self._stored, device, self.config.room, self.cache)

    def plain(self, images: ImageSet, first: int, last: int) -> Tensor:
        """Images first to last - 1 as they are."""
        index = torch.arange(first, last, device=self.workers.device)
        return self._images(images, index, padding=0, flip=False)

    def take(self, first: int, last: int) -> Tensor:
        """Cached features of images first to last - 1, as the next part takes them."""
        assert self.cache is not None
        return self.as_input(self.cache.chunk(first, last))

    def as_input(self, x: Tensor) -> Tensor:
        return x.to(self.half or torch.float32).contiguous(memory_format=self.memory_format)

    def through(self, x: Tensor) -> Tensor:
        """Images, normalised, to features."""
        with self._autocast():
            for part in self.parts:
                x = features(part, x)
        return x


class UnitTrainer(Trainer):
    """The usual trainer, of a part: it sees features for images, and costs for labels.

    Args:
        config: of this unit.
        frozen: the parts in front of it.
        part: the unit and its classifier.
        costs: fp32 [N, classes], scaled for training.
    """

    def __init__(self, config: Config, frozen: Frozen, part: ResNet, costs: Tensor) -> None:
        self._frozen, self._part, self._costs = frozen, part, costs
        # Of the images of this step, until they are taken.
        self._fetched: tuple[Tensor, Tensor] | None = None
        super().__init__(config, frozen.workers, frozen.data)

    def make_model(self) -> ResNet:
        return self._part

    def batches(self, epoch: int) -> Generator[Tensor, None, None]:
        indices, cache = super().batches(epoch), self._frozen.cache
        if cache is None:
            yield from indices
            return
        every = list(indices)
        with in_words(LoneError), contextlib.closing(cache.batches(every)) as fetched:
            for index in every:
                self._fetched = index, next(fetched)
                yield index

    def inputs(self, index: Tensor, epoch: int | Tensor) -> Tensor:
        frozen = self._frozen
        if frozen.cache is not None:
            # Given away: features live no longer than what is computed of them needs them.
            fetched, self._fetched = self._fetched, None
            if fetched is None or fetched[0] is not index:
                return frozen.as_input(frozen.cache.take(index))
            return frozen.as_input(fetched[1])
        if frozen.config.features == "fresh":
            return frozen.through(super().inputs(index, epoch))
        return frozen.through(self._images(self.data.train, index, padding=0, flip=False))

    @property
    def fused_loss(self) -> bool:
        return False  # boosting has another

    def criterion(self, logits: Tensor, index: Tensor) -> Tensor:
        labels, kind = self.data.train.labels[index], self._frozen.config.boost_loss
        return boosting_loss(logits, labels, self._costs[index], kind)

    def predict(self, images: ImageSet, index: Tensor) -> Tensor:
        x = self._images(images, index, padding=0, flip=False)
        return self.model(self._frozen.through(x))

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """fp64 [N, classes], of the whole training set in eval mode, alike on every process."""
        self.model.eval()
        frozen, train, workers = self._frozen, self.data.train, self.workers
        o = torch.zeros(self._costs.shape, dtype=torch.float64, device=workers.device)
        for first, last in chunks(len(train))[workers.rank :: workers.world_size]:
            with self._autocast():
                if frozen.cache is None:
                    x = frozen.through(frozen.plain(train, first, last))
                else:
                    x = frozen.take(first, last)
                logits = self.model(x)
            o[first:last] = outputs(logits)
        return workers.sum_(o)
