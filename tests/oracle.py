"""LoRA-the-Explorer, slow and literal: Algorithm 1 and appendix A.2 of the paper with a loop over workers.

Every worker has a whole copy of the model and an optimizer of its own. Nothing here comes from `lightning_lte`: what
the package computes with batched products and bookkeeping, this file computes as the paper writes it, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.optim import Optimizer

Loss = Callable[[Tensor, Tensor], Tensor]


class LoRALinear(nn.Module):
    """f(x) = (W - s V) x + s B A x + b, with W and V fixed."""

    def __init__(self, linear: nn.Linear, A: Tensor, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.W = linear.weight.detach().clone()
        self.bias = linear.bias
        self.A = nn.Parameter(A.double().clone())
        self.B = nn.Parameter(torch.zeros(linear.out_features, A.shape[0], dtype=torch.float64))
        self.V = torch.zeros_like(self.W)
        self.refreshed = 0

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.W - self.scale * self.V).T + self.scale * (x @ self.A.T @ self.B.T)
        return y if self.bias is None else y + self.bias

    def product(self) -> Tensor:
        """B A."""
        return self.B @ self.A

    @torch.no_grad()
    def delta(self) -> Tensor:
        """s (B A - V), what this worker learned since the last merge."""
        return self.scale * (self.B @ self.A - self.V)


class LoRAWeight(nn.Module):
    """W - s V + s B A in place of a weight of any layer, with W and V fixed; the layer computes with it as always.

    B A is put into the weight's shape matrix by matrix, as the paper has it for linear layers, and for convolutions as
    a convolution with A followed by one of kernel 1 with B.
    """

    def __init__(self, layer: nn.Module, weight: Tensor, A: Tensor, scale: float) -> None:
        super().__init__()
        self.scale, self.transposed = scale, isinstance(layer, TRANSPOSED)
        self.W = weight.detach().clone()
        self.V = torch.zeros_like(self.W)
        self.A = nn.Parameter(A.double().clone())
        matrices = 1 if A.dim() == 2 else len(A)
        self.refreshed = 0
        rows = self.W.numel() // matrices // A.shape[-1]
        self.B = nn.Parameter(torch.zeros(*A.shape[:-2], rows, A.shape[-2], dtype=torch.float64))

    def product(self) -> Tensor:
        """B A in the weight's shape."""
        pairs = [(self.B, self.A)] if self.A.dim() == 2 else list(zip(self.B, self.A, strict=True))
        rows = []
        for B, A in pairs:
            matrix = B @ A
            rows.append(matrix.T if self.transposed else matrix)
        return torch.cat([row.reshape(-1, *self.W.shape[1:]) for row in rows])

    def forward(self, _: Tensor) -> Tensor:
        return self.W - self.scale * self.V + self.scale * self.product()

    @torch.no_grad()
    def delta(self) -> Tensor:
        return self.scale * (self.product() - self.V)


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The layer and the parameter that a factored weight's name means: "layer" is short for "layer.weight"."""
    try:
        return model.get_submodule(name), "weight"
    except AttributeError:
        layer, _, key = name.rpartition(".")
        return model.get_submodule(layer), key


class Worker:
    """One worker: a model of its own in which the factored layers are `LoRALinear`, and an optimizer of its own."""

    def __init__(
        self,
        model: nn.Module,
        first_A: Mapping[str, Tensor],
        scale: float,
        optimizer: Callable,
        freeze: bool,
        freeze_a: bool = False,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.layers: dict[str, LoRALinear | LoRAWeight] = {}
        for name, A in first_A.items():
            layer, key = place(self.model, name)
            if type(layer) is nn.Linear and A.dim() == 2:
                parent, _, child = name.rpartition(".")
                self.layers[name] = LoRALinear(layer, A, scale)
                setattr(self.model.get_submodule(parent), child, self.layers[name])
            else:
                self.layers[name] = LoRAWeight(layer, getattr(layer, key), A, scale)
                getattr(layer, key).requires_grad_(False)
                register_parametrization(layer, key, self.layers[name], unsafe=True)
        if freeze_a:
            for layer in self.layers.values():
                layer.A.requires_grad_(False)
        hidden = {id(p) for layer in self.layers.values() for p in (layer.A, layer.B)}
        self.replicas = {n: p for n, p in self.model.named_parameters() if id(p) not in hidden and p.requires_grad}
        self.trained = [p for p in self.model.parameters() if p.requires_grad and (id(p) in hidden or not freeze)]
        self.optimizer: Optimizer = optimizer(self.trained)


class Oracle:
    """All workers.

    Args:
        model: the plain model; it is copied and stays as it is.
        factored: name of each factored weight -> first A of every worker, (N, r, in), or (N, g, r, in) for g matrices.
        scale: s.
        period: T, optimizer steps between two merges.
        after_merge: "keep" is appendix A.2, "reset" Algorithm 1 with B <- 0 and A and the moments kept.
        replicas: "merge" averages all other trainable parameters at merges, "step" averages their gradients at every
            step, "freeze" doesn't train them.
        optimizer: makes a worker's optimizer from its parameters.
        clip: the largest norm of a worker's gradient.
        accumulate: calls of `step` for one step of the optimizers, each with its share of the loss.
        outer: makes the outer optimizer over the merged weights; None for the plain sum.
        overlap: steps from the start of a merge to its landing.
        freeze_a: workers train B alone (LoRA-FA).
        rounded: what the workers read of a linear layer's W, once two steps are done; None for W itself. Merges add to
            W.
        decay: lr * weight_decay of the workers' optimizers, if it is to pull W towards zero, at merges, and not A and
            B: what a step has taken off these is given back.
        refresh: how many vectors of a worker start anew at each merge of their weight, one after the other.
        fresh_vectors: rows of A for them, by the factored weight's name, the worker's number and that of the merge.
        groups: names of parameters that merge together, and how many steps after a merge is due; None for all at once.
        grow: optimizer step -> number of workers from that step on.
        fresh_A: first A of a worker that comes later, by the factored weight's name, the worker's number, and how many
            there are then.

    Attributes:
        merged: a plain model with W and the replicas as of the last merge.
        steps: optimizer steps done.
        merges: merges done.
    """

    def __init__(
        self,
        model: nn.Module,
        factored: Mapping[str, Tensor],
        *,
        scale: float,
        period: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        after_merge: Literal["keep", "reset"] = "keep",
        replicas: Literal["merge", "step", "freeze"] = "merge",
        clip: float | None = None,
        accumulate: int = 1,
        outer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        overlap: int = 0,
        freeze_a: bool = False,
        decay: float = 0.0,
        refresh: int = 0,
        fresh_vectors: Callable[[str, int, int], Tensor] | None = None,
        groups: Mapping[int, Iterable[str]] | None = None,
        grow: Mapping[int, int] | None = None,
        fresh_A: Callable[[str, int, int], Tensor] | None = None,
        rounded: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.rounded, self.decay = rounded, decay
        # Step at which a merge last took the decay of a weight.
        self._decayed = dict.fromkeys(factored, 0)
        self.scale, self.optimizer = scale, optimizer
        self.refresh, self.fresh_vectors = refresh, fresh_vectors
        self.grow, self.fresh_A, self.freeze_a = dict(grow or {}), fresh_A, freeze_a
        self.period, self.after_merge, self.replicas = period, after_merge, replicas
        self.clip, self.accumulate = clip, accumulate
        self.merged = copy.deepcopy(model).double()
        workers = len(next(iter(factored.values())))
        self.workers = [
            Worker(
                self.merged,
                {name: A[n] for name, A in factored.items()},
                scale,
                optimizer,
                replicas == "freeze",
                freeze_a,
            )
            for n in range(workers)
        ]
        self.steps = self.merges = self._calls = self._last_merge = 0
        # The step at which groups began to merge in turn; None where all is merged.
        self._round: int | None = None
        self.overlap = overlap
        everything = [*self.workers[0].layers, *self.workers[0].replicas]
        self.groups = {0: everything} if groups is None else {delay: list(names) for delay, names in groups.items()}
        self._outer: dict[str, Optimizer] = {}
        if outer is not None:
            for name in self.workers[0].layers:
                layer, key = place(self.merged, name)
                self._outer[name] = outer([getattr(layer, key)])
        # Merges that have started: the step when they land, what each worker had, and what decay has left of weights.
        self._flights: list[tuple[int, dict[str, list[Tensor]], dict[str, float]]] = []

    def step(self, slices: Sequence[tuple[Tensor, Tensor]], loss: Loss) -> None:
        """Train every worker on its own slice (x, y) with `loss(model(x), y)`, and merge if that is due."""
        for step in [step for step in self.grow if step <= self.steps]:
            self._grow(self.grow.pop(step))
        for worker, (x, y) in zip(self.workers, slices, strict=True):
            (loss(worker.model(x), y) / self.accumulate).backward()
        self._calls += 1
        if self._calls % self.accumulate:
            return
        if self.replicas == "step":
            self._average_gradients()
        if self.clip is not None:
            for worker in self.workers:
                torch.nn.utils.clip_grad_norm_(worker.trained, self.clip)
            if self.replicas == "step":
                # Each worker clipped its copy of the same gradient by a norm of its own; they have to agree again.
                self._average_gradients()
        for worker in self.workers:
            worker.optimizer.step()
            worker.optimizer.zero_grad()
            for p in (p for layer in worker.layers.values() for p in (layer.A, layer.B) if p.requires_grad):
                p.data /= 1 - self.decay
        self.steps += 1
        if self.steps == 2:
            for name in self.workers[0].layers:
                self._show(name)
        for flight in [f for f in self._flights if f[0] <= self.steps]:
            self._land(flight)
        if self.steps - self._last_merge >= self.period:
            self._last_merge = self._round = self.steps
        for delay, names in self.groups.items():
            if self._round is not None and self.steps - self._round == delay:
                self._start(names, self.overlap)

    def _grow(self, number: int) -> None:
        """Merge what is not merged; then let new workers stand behind each worker, so many that there are `number`.

        A new worker starts from the merged model, with B = 0 and A drawn for it. Its optimizer takes over that of the
        worker before which it stands, but for the first moments of A and B, which are zero.
        """
        if self._flights or len(self.groups) > 1 or self.steps > self._last_merge:
            self.merge()
        assert self.fresh_A is not None
        each = number // len(self.workers)
        workers: list[Worker] = []
        for worker in self.workers:
            workers.append(worker)
            for n in range(len(workers), len(workers) + each - 1):
                A = {name: self.fresh_A(name, n, number) for name in worker.layers}
                new = Worker(self.merged, A, self.scale, self.optimizer, self.replicas == "freeze", self.freeze_a)
                for name, layer in new.layers.items():
                    layer.refreshed = worker.layers[name].refreshed
                factors = {id(p) for layer in new.layers.values() for p in (layer.A, layer.B)}
                for own, others in zip(new.trained, worker.trained, strict=True):
                    state = copy.deepcopy(worker.optimizer.state.get(others, {}))
                    for key in ("exp_avg", "momentum_buffer"):
                        if id(own) in factors and isinstance(state.get(key), Tensor):
                            state[key].zero_()
                    if state:
                        new.optimizer.state[own] = state
                workers.append(new)
        self.workers = workers
        for name in workers[0].layers:
            self._show(name)

    def merge(self) -> None:
        """Merge everything now; what is on its way lands before."""
        for flight in list(self._flights):
            self._land(flight)
        self._start([name for names in self.groups.values() for name in names], 0)
        self._last_merge, self._round = self.steps, None

    @torch.no_grad()
    def _start(self, names: Iterable[str], overlap: int) -> None:
        """Note what every worker has: B_n A_n, or its replica."""
        taken = {
            name: [
                (w.layers[name].product() if name in w.layers else w.replicas[name]).detach().clone()
                for w in self.workers
            ]
            for name in names
        }
        left = {n: (1 - self.decay) ** (self.steps - self._decayed[n]) for n in names if n in self._decayed}
        self._decayed.update(dict.fromkeys(left, self.steps))
        flight = (self.steps + overlap, taken, left)
        self._flights.append(flight)
        if not overlap:
            self._land(flight)

    @torch.no_grad()
    def _land(self, flight: tuple[int, dict[str, list[Tensor]], dict[str, float]]) -> None:
        """W <- W + 1/N sum_n s (P_n - V_n), then V_n <- P_n, where P_n is B_n A_n at the start; or B_n <- 0."""
        self._flights.remove(flight)
        for name, taken in flight[1].items():
            if name not in self.workers[0].layers:
                mean = sum(taken) / len(taken)
                self.merged.get_parameter(name).copy_(mean)
                for worker, own in zip(self.workers, taken, strict=True):
                    worker.replicas[name].add_(mean - own)
                continue
            layers = [worker.layers[name] for worker in self.workers]
            pairs = zip(layers, taken, strict=True)
            delta = sum(layer.scale * (product - layer.V) for layer, product in pairs) / len(layers)
            layer, key = place(self.merged, name)
            weight = getattr(layer, key)
            weight.mul_(flight[2][name])
            if name in self._outer:
                weight.grad = -delta
                self._outer[name].step()
                weight.grad = None
            else:
                weight.add_(delta)
            self._show(name)
            for layer, product in zip(layers, taken, strict=True):
                if self.after_merge == "keep":
                    layer.V = product
                else:
                    layer.B.zero_()
            for n in range(len(self.workers) if self.refresh else 0):
                self._refresh(name, n)
        for name, buffer in self.merged.named_buffers():
            own = [dict(worker.model.named_buffers())[name] for worker in self.workers]
            buffer.copy_(sum(own) / len(own) if buffer.is_floating_point() else own[0])
            for other in own:
                other.copy_(buffer)
        self.merges += 1

    def _refresh(self, name: str, n: int) -> None:
        """Let vectors of a worker's layer start from W: a row of A drawn anew, a column of zeros in B, no moments."""
        assert self.fresh_vectors is not None
        layer, state = self.workers[n].layers[name], self.workers[n].optimizer.state
        rows = self.fresh_vectors(name, n, self.merges + 1).double()
        rank = layer.A.shape[-2]
        for i in range(min(self.refresh, rank - 1)):
            vector = layer.refreshed % rank
            layer.A[..., vector, :] = rows[..., i, :]
            layer.B[..., :, vector] = 0
            for moment in (m for m in state.get(layer.A, {}).values() if m is not None and m.shape == layer.A.shape):
                moment[..., vector, :] = 0
            for moment in (m for m in state.get(layer.B, {}).values() if m is not None and m.shape == layer.B.shape):
                moment[..., :, vector] = 0
            layer.refreshed += 1
        if self.after_merge == "keep":
            layer.V = layer.product()

    def _show(self, name: str) -> None:
        """Let the workers read W, or W rounded."""
        layer, key = place(self.merged, name)
        weight = getattr(layer, key).detach()
        for worker in self.workers:
            own = worker.layers[name]
            rounds = self.rounded is not None and self.steps >= 2 and isinstance(own, LoRALinear)
            own.W = self.rounded(weight) if rounds else weight.clone()

    def finish(self) -> nn.Module:
        """Merge what was learned since the last merge; returns the plain model."""
        if self._flights or len(self.groups) > 1 or self.steps > self._last_merge:
            self.merge()
        return self.merged

    def worker_weight(self, worker: int, name: str) -> Tensor:
        """The effective weight of a worker's layer, W + s (B A - V)."""
        layer = self.workers[worker].layers[name]
        return layer.W + layer.delta()

    def _average_gradients(self) -> None:
        for name in self.workers[0].replicas:
            gradients = [worker.replicas[name].grad for worker in self.workers]
            mean = torch.stack([g for g in gradients if g is not None]).mean(0)
            for worker in self.workers:
                worker.replicas[name].grad = mean.clone()
