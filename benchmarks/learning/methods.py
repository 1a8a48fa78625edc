"""How the study trains: full rank, through heads, and what others do. One process plays all devices.

Every method takes the same batches. N heads are N devices with one head, or one replica, each: head h has slice h of
the batch, an optimizer of its own, and for all that it trains a copy of its own.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from benchmarks.learning import candidates
from benchmarks.learning.settings import LTE as LTE_SETTINGS
from benchmarks.learning.settings import Settings
from benchmarks.learning.tasks import Batch
from benchmarks.links import Model
from lightning_lte import Explorer, LTEConfig
from lightning_lte.execution import run
from lightning_lte.transport import Transport

Loss = Callable[[nn.Module, Batch], Tensor]


class Method:
    """Trains a model at full rank: the control.

    Args:
        model: what `evaluated` shows.
        settings: of the run, in full.
        loss: of a model on a batch.
        seed: of what the method draws.

    Attributes:
        sent: bytes that each device has sent so far, computed as in `benchmarks.links`.
        notes: what a reader of the result has to know.
    """

    def __init__(self, model: nn.Module, settings: Settings, loss: Loss, seed: int) -> None:
        self.model, self.settings, self.loss, self.seed = model, settings, loss, seed
        self.choices: Settings = settings["method"]
        self.steps = 0
        self.sent = 0
        self.notes: list[str] = []
        self.optimizer = self.make_optimizer()
        self.lrs = [group["lr"] for group in self.optimizer.param_groups]
        ring = Transport(self.devices)
        self.ddp_bytes = ring.bytes_of_sum(sum(4 * p.numel() for p in model.parameters() if p.requires_grad))

    @property
    def devices(self) -> int:
        """Among which the batch is dealt out."""
        return self.settings["devices"]

    def make_optimizer(self) -> Optimizer:
        """AdamW, without weight decay for biases and norms."""
        return self.adamw(self.model)

    def adamw(self, model: nn.Module) -> Optimizer:
        groups = param_groups_weight_decay(model, self.settings["weight_decay"])
        return torch.optim.AdamW(groups, lr=self.settings["lr"], betas=tuple(self.settings["betas"]))

    def set_lr(self, factor: float) -> None:
        """Scale all learning rates."""
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = lr * factor

    def step(self, batch: Batch) -> Tensor:
        """Learn from a batch; returns the loss, detached."""
        loss = self.loss(self.model, batch)
        loss.backward()
        if self.settings["clip"]:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self.sent += self.ddp_bytes
        return loss.detach()

    def finish(self) -> None:
        """Put all that was learned into the model."""

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The model as a user would evaluate it now, merged as of the last merge."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        yield self.model
        for module, training in modes.items():
            module.training = training


class Heads(Method):
    """LTE, by the package's own core."""

    def __init__(self, model: nn.Module, settings: Settings, loss: Loss, seed: int) -> None:
        super().__init__(model, settings, loss, seed)
        choices = {k: v for k, v in self.choices.items() if k in LTE_SETTINGS}
        scale, outer = choices.pop("scale"), choices.pop("outer")
        if outer is not None:
            choices["outer_optimizer"] = functools.partial(torch.optim.SGD, **outer)
        self.candidates = candidates.made(settings["extra"])
        for candidate in self.candidates:
            candidate.configure(choices, model)
        # Without alpha each weight's scale is its own, whatever its rank; see `_alphas`.
        alone = LTEConfig(seed=seed, **{**choices, "heads": 1, "execution": "auto"})
        known = self._described(alone)
        choices["alpha_pattern"] = {**_alphas(known, scale), **choices.get("alpha_pattern", {})}
        self.explorer = Explorer(model, self.optimizer, LTEConfig(seed=seed, **choices))
        for candidate in self.candidates:
            candidate.start(self.explorer, self.optimizer)
        self.lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.merge_bytes = known.merge(self.devices).bytes
        self.replica_bytes = Transport(self.devices).bytes_of_sum(known.replica_bytes)
        self.synchronised_bytes = self._synchronised(known)

    @property
    def devices(self) -> int:
        return self.choices["heads"]

    def _described(self, config: LTEConfig) -> Model:
        """What of the model travels; one head's factors."""
        model = copy.deepcopy(self.model)
        explorer = Explorer(model, self.adamw(model), config)
        replicas = sum(4 * r.param.numel() for r in explorer.injection.replicas)
        factors = list(explorer.injection.factors.values())
        explorer.close()
        return Model("", factors, replicas, 0)

    def _synchronised(self, known: Model) -> int:
        """Bytes that a device sends at every step between merges."""
        return self.replica_bytes if self.choices["replicas"] == "step" else 0

    def step(self, batch: Batch) -> Tensor:
        explorer, optimizer = self.explorer, self.optimizer
        full_rank = self.steps < self.choices["full_rank_steps"]
        for candidate in self.candidates:
            batch = candidate.arrange(batch, explorer.count)
        loss = run(explorer, lambda own: self.loss(self.model, own), batch)
        with explorer.backward():
            loss.backward()
        explorer.after_backward()
        if self.settings["clip"]:
            explorer.clip_grad_norm_(self.settings["clip"])
        for candidate in self.candidates:
            candidate.before_step(explorer, optimizer, self.steps)
        optimizer.step()
        optimizer.zero_grad()
        self.steps += 1
        record = explorer.step(measure=False)
        self.sent += self.ddp_bytes if full_rank else self.synchronised_bytes
        if record is not None:
            self.merged()
        for candidate in self.candidates:
            candidate.after_step(explorer, optimizer, record)
        return loss.detach()

    def merged(self) -> None:
        """Called after a merge."""
        self.sent += self.merge_bytes

    def finish(self) -> None:
        explorer = self.explorer
        shared = [r.name for r in explorer.injection.replicas if r.stack is None and r.param.requires_grad]
        if explorer.count > 1 and shared and self.choices["replicas"] == "merge":
            self.notes.append(f"heads share {shared}, which devices of their own would not")
        self.notes.append(f"{explorer.count} heads, {explorer.execution}")
        if explorer.unmerged:
            self.merged()
        explorer.finish()


class ReLoRA(Heads):
    """One head, as on `devices` data-parallel devices, merged and drawn anew now and then, with a short warm-up."""

    def __init__(self, model: nn.Module, settings: Settings, loss: Loss, seed: int) -> None:
        self.restarted = -(10**9)
        super().__init__(model, settings, loss, seed)

    @property
    def devices(self) -> int:
        return self.settings["devices"]

    def _synchronised(self, known: Model) -> int:
        trained = known.replica_bytes + sum(f.A.nbytes + f.B.nbytes for f in known.factors)
        return Transport(self.devices).bytes_of_sum(trained)

    def merged(self) -> None:
        self.restarted = self.steps

    def set_lr(self, factor: float) -> None:
        since = self.steps - self.restarted + 1
        super().set_lr(factor * min(1.0, since / max(1, self.choices["restart_warmup"])))


class LocalSteps(Method):
    """Full-rank replicas that meet now and then: post-local SGD, or with an outer optimizer DiLoCo.

    All parameters are stacked, (N, *shape), and the optimizer, which works on elements, holds the stacks.
    """

    def __init__(self, model: nn.Module, settings: Settings, loss: Loss, seed: int) -> None:
        self.stacks: dict[str, nn.Parameter] = {}
        super().__init__(model, settings, loss, seed)
        count = self.choices["heads"]
        self.buffers = {
            name: b.detach().clone().unsqueeze(0).repeat(count, *[1] * b.dim()) for name, b in model.named_buffers()
        }
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        outer = self.choices["outer"]
        self.outer = None if outer is None else torch.optim.SGD(self.trained.values(), **outer)
        self.buffer_bytes = Transport(count).bytes_of_sum(
            sum(4 * b.numel() for b in model.buffers() if b.is_floating_point())
        )

    @property
    def devices(self) -> int:
        return self.choices["heads"]

    def make_optimizer(self) -> Optimizer:
        count = self.choices["heads"]
        optimizer = self.adamw(self.model)
        stacks = {}
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                stacks[param] = self.stacks[name] = nn.Parameter(
                    param.detach().unsqueeze(0).repeat(count, *[1] * param.dim())
                )
        for group in optimizer.param_groups:
            group["params"] = [stacks[param] for param in group["params"]]
        return optimizer

    def step(self, batch: Batch) -> Tensor:
        count = self.choices["heads"]
        slices = list(zip(*(t.chunk(count) for t in batch), strict=True))
        own = {name: stack.unbind() for name, stack in self.stacks.items()}
        losses = []
        for h in range(count):
            state = {name: tensors[h] for name, tensors in own.items()} | {
                name: b[h] for name, b in self.buffers.items()
            }
            losses.append(self.loss(_Called(self.model, state), slices[h]))
        together = torch.stack(losses)
        # Each worker has the gradient of its own loss.
        together.sum().backward()
        synchronous = self.steps < self.choices["full_rank_steps"]
        with torch.no_grad():
            gradients = [stack.grad for stack in self.stacks.values() if stack.grad is not None]
            if synchronous:
                for gradient in gradients:
                    gradient.copy_(gradient.mean(0, keepdim=True).expand_as(gradient))
            if self.settings["clip"]:
                norms = sum(g.flatten(1).square().sum(1) for g in gradients).sqrt()  # type: ignore[union-attr]
                factor = (self.settings["clip"] / (norms + 1e-6)).clamp(max=1)
                for gradient in gradients:
                    gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        since = self.steps - self.choices["full_rank_steps"]
        if synchronous:
            self.sent += self.ddp_bytes
            # All are alike; who evaluates the model is to see them.
            self._average(None)
        elif since % self.choices["merge_every"] == 0:
            self.merge()
        return together.detach().mean()

    def merge(self) -> None:
        """Average replicas, and take the outer step."""
        self._average(self.outer)
        self.sent += self.ddp_bytes + self.buffer_bytes

    @torch.no_grad()
    def _average(self, outer: Optimizer | None) -> None:
        for name, param in self.trained.items():
            mean = self.stacks[name].mean(0)
            if outer is None:
                param.copy_(mean)
            else:
                param.grad = param - mean
        if outer is not None:
            outer.step()
            outer.zero_grad()
        for name, param in self.trained.items():
            self.stacks[name].copy_(param.expand_as(self.stacks[name]))
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point():
                self.buffers[name].copy_(self.buffers[name].mean(0, keepdim=True).expand_as(self.buffers[name]))
            buffer.copy_(self.buffers[name][0])

    def finish(self) -> None:
        since = self.steps - self.choices["full_rank_steps"]
        if since > 0 and since % self.choices["merge_every"]:
            self.merge()
        elif since < 0:
            self._average(None)
        self.notes.append(f"{self.choices['heads']} replicas, one after the other")


class GaLore(Method):
    """GaLore, by its authors' package: gradients of matrices are projected, and moments kept in the small space."""

    def make_optimizer(self) -> Optimizer:
        try:
            from galore_torch import GaLoreAdamW
        except ImportError as error:
            raise ImportError(
                "The method galore needs the package galore-torch, and what that needs; received"
                f" '{error}'. Run pip install galore-torch, or leave the method out."
            ) from error
        layers = {
            m.weight
            for m in self.model.modules()
            if isinstance(m, nn.Linear) and min(m.weight.shape) > self.choices["rank"]
        }
        groups = []
        for group in param_groups_weight_decay(self.model, self.settings["weight_decay"]):
            projected = [p for p in group["params"] if p in layers]
            groups.append({**group, "params": [p for p in group["params"] if p not in layers]})
            if projected:
                groups.append({**group, "params": projected, **{k: v for k, v in self.choices.items() if k != "name"}})
        groups = [group for group in groups if group["params"]]
        return GaLoreAdamW(
            groups, lr=self.settings["lr"], betas=tuple(self.settings["betas"]), no_deprecation_warning=True
        )


class _Called(nn.Module):
    """A model with other parameters and buffers."""

    def __init__(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        super().__init__()
        self._call = functools.partial(functional_call, model, state)

    def forward(self, x: Tensor) -> Any:
        return self._call((x,))


def _alphas(known: Model, scale: float | str) -> dict[str, float]:
    """alpha = s r for each weight, by its module's name; s is a number, or "width": sqrt(in / r)."""
    if isinstance(scale, str) and scale != "width":
        raise ValueError(f"scale must be a number or 'width'; received {scale!r}.")
    alphas = {}
    for f in known.factors:
        s = math.sqrt(f.matrices.in_features / f.rank) if scale == "width" else float(scale)
        alphas[re.escape(f.name)] = s * f.rank
    return alphas


METHODS: dict[str, type[Method]] = {
    "full": Method,
    "lte": Heads,
    "relora": ReLoRA,
    "local": LocalSteps,
    "galore": GaLore,
}
