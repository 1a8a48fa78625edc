"""A vision transformer as a LightningModule. Nothing in here knows of low-rank heads."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy


class ViTClassifier(LightningModule):
    """Classifies images with timm's VisionTransformer; AdamW with linear warm-up, then a cosine down to zero.

    Args:
        img_size: height and width of the images, in pixels.
        in_chans: colour channels of the images.
        num_classes: number of classes.
        patch_size: height and width of a patch, in pixels.
        dim: width of the transformer.
        depth: number of blocks.
        attention_heads: attention heads per block.
        lr: learning rate after the warm-up.
        weight_decay: of all parameters but biases and norms.
        warmup: share of all optimizer steps in which the learning rate rises.
    """

    def __init__(
        self,
        img_size: int = 8,
        in_chans: int = 1,
        num_classes: int = 10,
        patch_size: int = 2,
        dim: int = 64,
        depth: int = 4,
        attention_heads: int = 4,
        lr: float = 3e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = VisionTransformer(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            patch_size=patch_size,
            embed_dim=dim,
            depth=depth,
            num_heads=attention_heads,
        )
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = self._evaluate(batch, self.train_accuracy)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val/loss", self._evaluate(batch, self.val_accuracy), prog_bar=True, sync_dist=True)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("test/loss", self._evaluate(batch, self.test_accuracy), sync_dist=True)
        self.log("test/accuracy", self.test_accuracy)

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, _ = batch
        return self(images).argmax(dim=-1)

    def _evaluate(self, batch: tuple[Tensor, Tensor], accuracy: MulticlassAccuracy) -> Tensor:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        return functional.cross_entropy(logits, labels)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = param_groups_weight_decay(self.net, self.hparams["weight_decay"])
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["lr"])
        steps = self.trainer.estimated_stepping_batches
        warmup_steps = max(1, self.hparams["warmup"] * steps)

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            return 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup_steps) / max(1, steps - warmup_steps))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
