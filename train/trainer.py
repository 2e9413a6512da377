"""The training loop: from a data set on the device to trained weights."""

import contextlib
import inspect
import math
import os
import time
from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.nn.functional as F
from config import Config
from device_step import DeviceStep, EpochLosses, GraphedCount, GraphedStep
from errors import TrainError
from flat_gradients import FlatGradients
from image_view import ImageView
from micro_batches import MicroBatches
from networks import build_model, defers_statistics, to_half
from optimizers import build_optimizer, in_model_order, load_in_strides
from records import Progress, Record
from schedule import lr_factor, meprop_is_dense, to_fp32
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from workers import Workers

from fastres.amp import LossScaler
from fastres.data import ImageSet, Splits
from fastres.models import ResNet
from fastres.ops import StepGenerator, dry_run, shuffle, update_every_stats
from fastres.optim import YellowFin

# Images a process evaluates at once: enough to fill a GPU, little beside a training step's memory.
_EVAL_BATCH = 500
# Two stages halve an image, and its crop is padded by four pixels.
_SMALLEST_SIDE = 8

# DDP's name for copying the leading process's buffers at every forward changed in PyTorch 2.15.
_KEEP_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)

# One for all phases and steps: the same object may be entered while it is entered.
_NOTHING = contextlib.nullcontext()


def unmarked(phase: str) -> contextlib.AbstractContextManager[Any]:
    """What marks the phases of a step while nobody profiles: nothing."""
    return _NOTHING


def set_precision_and_determinism(config: Config) -> None:
    """fp32 is fp32: PyTorch would let convolutions round their inputs to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        # cuBLAS reads it when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # A debugging aid that comes with the flag and would fill every new tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set by a module class


def check_fits(config: Config, data: Splits) -> None:
    """See that there is a step to take.

    Raises:
        TrainError: the batch exceeds the training set, or the images are too small.
    """
    if config.batch_size > len(data.train):
        raise TrainError(
            f"--batch-size {config.batch_size}: more than the {len(data.train)} training "
            "images; choose a smaller one"
        )
    side = min(data.train.images.shape[2:])
    if side < _SMALLEST_SIDE:
        raise TrainError(
            f"{data.name}: images of {side} pixels a side are too small for this model; pass "
            f"--image-size {_SMALLEST_SIDE} or more"
        )


class Trainer(ImageView):
    """A model, its optimizer and the data, all on one device; one step at a time."""

    def __init__(self, config: Config, workers: Workers, data: Splits, **ddp: Any) -> None:
        """data: already on the workers' device, whose micro-batches share the batch evenly.

        ddp: further arguments of DistributedDataParallel, or others than ours.

        Raises:
            TrainError: the batch exceeds the training set, or the images are too small.
        """
        check_fits(config, data)
        self.steps_per_epoch = len(data.train) // config.batch_size
        self.config, self.workers, self.data = config, workers, data
        # Entered around "step", and within it "data", "forward", "loss", "backward" and "update".
        self.phase: Callable[[str], contextlib.AbstractContextManager[Any]] = unmarked
        device = workers.device
        super().__init__(config, data, device)
        self.model = self.make_model().to(device)
        if config.precision == "pure-fp16":
            to_half(self.model)
        self.model.to(memory_format=self.memory_format)
        self.drops = StepGenerator(config.seed, workers.rank)
        self.model.draw_from(self.drops)
        self.peak_lr = config.peak_lr
        self.optimizer = build_optimizer(config, self.model)
        self.scaler = self.make_scaler()
        self.epoch = 0
        self.losses = EpochLosses(self.steps_per_epoch, device)
        self._one = torch.ones((), device=device)
        self.meprop_dense = True
        self.network: nn.Module = self.model
        self.gradients: FlatGradients | None = None
        if workers.world_size > 1 and config.cuda_graph:
            self.gradients = FlatGradients(self.model, workers, config.gradient_buckets)
        elif workers.world_size > 1:
            self.network = DistributedDataParallel(
                self.model,
                device_ids=[device.index] if device.type == "cuda" else None,
                # Statistics stay each process's own; they are averaged before every evaluation.
                **{"gradient_as_bucket_view": True} | _KEEP_BUFFERS | ddp,
            )
            self._settle_buckets()
        self.micro_batches = MicroBatches(
            config.micro_batches, workers.rank, self.network, self.model, self.drops, self.scaler,
            watch=not defers_statistics(self.model, device, self.fused_loss),
        )  # fmt: skip
        self.device_step: DeviceStep | None = None
        self.count_correct = self.right_answers
        if config.cuda_graph:
            self.device_step = GraphedStep(self)
            self.count_correct = GraphedCount(self.right_answers)

    def make_model(self) -> ResNet:
        """The model to train, in fp32."""
        return build_model(self.config, len(self.data.classes))

    def make_scaler(self) -> LossScaler:
        """Loss scaling where gradients are fp16, which alone overflows."""
        return LossScaler(enabled=self.half == torch.float16)

    def _settle_buckets(self) -> None:
        """Two steps that change nothing, so that DDP's regrouping of gradients is behind us.

        It regroups after the first step; sums over three processes or more would otherwise be taken
        in one order before a resume and in another after it.
        """
        buffers = [b.clone() for b in self.model.buffers()]
        workers = self.workers.world_size * self.config.micro_batches
        index = torch.arange(self.config.batch_size // workers, device=self.workers.device)
        # What is to be built at once is not to be built here, as it comes.
        with dry_run() if self.config.prebuild else contextlib.nullcontext():
            for _ in range(2):
                self._loss(index, epoch=0)[0].backward()
                self.optimizer.zero_grad()
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _loss(self, index: Tensor, epoch: int | Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss over this process's share of a batch, and logits."""
        with self.phase("data"):
            x = self.inputs(index, epoch)
        with self._autocast():
            return self._outcome(x, index)

    def _outcome(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and logits of training images, given what the model sees of them."""
        if self.fused_loss:
            with self.phase("forward"):
                loss, logits = self.network(x, self.data.train.labels[index])
                return loss, logits
        with self.phase("forward"):
            logits = self.network(x).float()
        with self.phase("loss"):
            return self.criterion(logits, index), logits

    @property
    def fused_loss(self) -> bool:
        """Whether the network itself takes the criterion."""
        return self.model.fused_loss

    def inputs(self, index: Tensor, epoch: int | Tensor) -> Tensor:
        """What the model sees of training images in an epoch."""
        return self._images(self.data.train, index, seed=self.config.seed, epoch=epoch)

    def criterion(self, logits: Tensor, index: Tensor) -> Tensor:
        """The mean loss of training images."""
        return F.cross_entropy(logits, self.data.train.labels[index])

    def train_step(self, index: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """One update from this process's share of a global batch.

        Returns its loss, detached, and, with loss scaling, whether the update was made, a bool [].
        """
        with self.phase("step"):
            for group in self.optimizer.param_groups:
                group["lr"] = self.fp32_lr_of(step)
            self.drops.set_step(step)
            return self.update(index, step // self.steps_per_epoch)

    def lr_of(self, step: int) -> float:
        """The learning rate of a step of the run."""
        config = self.config
        return self.peak_lr * lr_factor(
            step,
            steps_per_epoch=self.steps_per_epoch,
            epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            schedule=config.schedule,
        )

    def fp32_lr_of(self, step: int) -> float:
        """The same as an optimizer is given it, on the host as in a graph."""
        return to_fp32(self.lr_of(step))

    def update(self, index: Tensor, epoch: int | Tensor) -> tuple[Tensor, Tensor | None]:
        """What train_step does once the learning rate and the draws' step are set.

        epoch: a tensor, int64 [], is read on the device.
        """
        losses: list[Tensor] = []
        for part in self.micro_batches.each(index):
            with self.micro_batches.deferred() as updates:
                loss, _ = self._loss(part, epoch)
            with self.phase("backward"):
                if self.gradients is not None and len(losses) == self.micro_batches.count - 1:
                    self.gradients.begin()
                self.backward(loss)
            losses.append(loss.detach())
        if self.gradients is not None:
            self.gradients.average()
        with self.phase("update"):
            stepped = self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.micro_batches.settle(stepped)
            update_every_stats(updates, stepped)
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean(), stepped

    def backward(self, loss: Tensor) -> None:
        """The gradients of a loss, scaled where losses are."""
        seed = self.scaler.seed(loss)
        loss.backward(self._one if seed is None else seed)

    def batches(self, epoch: int) -> Generator[Tensor, None, None]:
        """The images of each step of an epoch, this process's share of them, in turn."""
        config, workers = self.config, self.workers
        share = config.batch_size // workers.world_size
        order = shuffle(len(self.data.train), config.seed, epoch, workers.device)
        for i in range(self.steps_per_epoch):
            first = i * config.batch_size + workers.rank * share
            yield order[first : first + share]

    def _steps(self) -> Generator[None, None, None]:
        """The steps of this epoch, one taken at each turn."""
        if self.device_step is not None:
            self.device_step.begin_epoch(self.epoch)
            for _ in range(self.steps_per_epoch):
                self.device_step()
                yield
            self.device_step.end_epoch()
            return
        first = self.epoch * self.steps_per_epoch
        with contextlib.closing(self.batches(self.epoch)) as batches:
            for step, index in enumerate(batches):
                loss, _ = self.train_step(index, first + step)
                self.losses.put(step, loss)
                yield

    def train_epoch(self, progress: Progress) -> Record:
        """One pass over the training set.

        Raises:
            TrainError: the loss is not finite, or loss scaling skips every step, on every process
                at once.
        """
        config, workers = self.config, self.workers
        self.network.train()
        self.meprop_dense = meprop_is_dense(
            self.epoch,
            warmup_epochs=config.meprop_warmup_epochs,
            dense_every=config.meprop_dense_every,
        )
        self.model.set_meprop(sparse=not self.meprop_dense)
        start = time.perf_counter()
        skipped = self.scaler.skipped_in_all.clone()
        for i, _ in enumerate(self._steps(), start=1):
            if self.scaler.is_enabled() and (
                i % config.max_skipped_steps == 0 or i == self.steps_per_epoch
            ):
                self._see_that_steps_are_taken()
            progress.step()
        if self.gradients is not None:
            self.gradients.check()
        # The last update shows in the weights alone. Summed, a NaN on one process stops them all.
        total, counted = self.losses.total(finite=self.scaler.is_enabled())
        for t in (*self.model.parameters(), *self.model.buffers()):
            total += 0.0 * t.detach().double().sum()
        mean_loss = float(workers.sum_(total) / workers.sum_(counted))
        seconds = time.perf_counter() - start
        if not math.isfinite(mean_loss):
            raise TrainError(
                f"the loss of epoch {self.epoch + 1} is {mean_loss}: training diverged at "
                f"--lr {config.lr}; lower it or add --warmup-epochs (the last checkpoint is whole)"
            )
        self.epoch += 1
        images = self.steps_per_epoch * config.batch_size
        skipped = self.scaler.skipped_in_all - skipped.to(workers.device)
        scaling = {"skipped_steps": int(skipped), "loss_scale": self.scaler.get_scale()}
        return {
            "epoch": self.epoch,
            "loss": mean_loss,
            "lr": self.lr_of(self.epoch * self.steps_per_epoch - 1),
            "seconds": seconds,
            "images_per_second": images / seconds,
            "memory_bytes": workers.peak_memory(),
            **({} if config.meprop_ratio is None else {"meprop_dense": self.meprop_dense}),
            **(scaling if self.scaler.is_enabled() else {}),
            **self._tuned(),
        }

    def _tuned(self) -> Record:
        """What YellowFin has found, before the schedule's factor."""
        if not isinstance(self.optimizer, YellowFin):
            return {}
        lr, momentum = self.optimizer.tuned()
        return {"tuned_lr": float(lr), "tuned_momentum": float(momentum)}

    def _see_that_steps_are_taken(self) -> None:
        """Called at most every max_skipped_steps steps, since it waits for the device."""
        skipped, limit = int(self.scaler.skipped_in_a_row), self.config.max_skipped_steps
        if skipped >= limit:
            raise TrainError(
                f"{skipped} steps in a row were skipped: their gradients overflow --precision "
                f"{self.config.precision} at a loss scale of {self.scaler.get_scale():g}; lower "
                f"--lr {self.config.lr}, add --warmup-epochs or pass --precision bf16 (the last "
                "checkpoint is whole)"
            )

    def average_statistics(self) -> None:
        """Give every worker the mean of the workers' running statistics."""
        self.micro_batches.average()
        self.workers.average_(self.model.buffers())
        self.micro_batches.adopt()

    @torch.inference_mode()
    def evaluate(self, images: ImageSet) -> float:
        """Accuracy in % in eval mode, every image counted once whatever the number of processes."""
        self.model.eval()
        rank, world_size = self.workers.rank, self.workers.world_size
        # Contiguous, as a graph's copy of it is: kernels are built anew for another stride.
        mine = torch.arange(len(images), device=self.workers.device)[rank::world_size].contiguous()
        correct = torch.zeros((), dtype=torch.int64, device=self.workers.device)
        for index in mine.split(_EVAL_BATCH):
            correct += self.count_correct(images, index)
        return 100.0 * int(self.workers.sum_(correct)) / len(images)

    def right_answers(self, images: ImageSet, index: Tensor) -> Tensor:
        """int64 [], of these images, by the mode that the model is in."""
        with self._autocast():
            logits = self.predict(images, index)
        return (logits.argmax(1) == images.labels[index]).sum()

    def predict(self, images: ImageSet, index: Tensor) -> Tensor:
        """Logits of images as they are, in the mode that the model is in."""
        return self.model(self._images(images, index, padding=0, flip=False))

    def accuracies(self) -> Record:
        """Accuracy in % on train, dev and test."""
        splits = {"train": self.data.train, "dev": self.data.dev, "test": self.data.test}
        return {f"{name}_accuracy": self.evaluate(split) for name, split in splits.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs; the data's order and augmentation have no state."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer_state(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
        }

    def _optimizer_state(self) -> dict[str, Any]:
        return in_model_order(self.optimizer.state_dict(), self.optimizer, self.model)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; settings that the flags give anew stay as they are."""
        self.model.load_state_dict(state["model"])
        self.micro_batches.adopt()
        groups = self._optimizer_state()["param_groups"]
        load_in_strides(self.optimizer, state["optimizer"] | {"param_groups": groups})
        # Empty where the run before had no loss scaling.
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.epoch = state["epoch"]
