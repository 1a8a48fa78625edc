"""What an optimizer keeps in lists, or finds by itself, goes on on the device that had it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lte import LTEStrategy
from lightning_lte.device_state import device_state, goes_on, is_own, taken, with_own_settings
from tests.modules import RANK, Module, Slices, clone, kept, make_net, trainer
from tests.processes import run


class Past(torch.optim.Optimizer):
    """Steps along the mean of the last gradients, which it keeps in a list. Each element for itself."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state["past"] = [*state.get("past", [])[-2:], p.grad.clone()]
                state["scaled"] = {"last": p.grad * 2, "count": state.get("scaled", {}).get("count", 0) + 1}
                p.sub_(sum(state["past"]) / len(state["past"]) * self._rate(group, p))
        return loss

    def _rate(self, group: dict[str, Any], param: nn.Parameter) -> float:
        return float(group["lr"])


class Searching(Past):
    """Finds a rate by itself, from all gradients of the device: a number and a tensor in its param group."""

    def _rate(self, group: dict[str, Any], param: nn.Parameter) -> float:
        assert param.grad is not None
        group["found"] = 0.9 * group.get("found", 1.0) + 0.1 * float(param.grad.abs().mean())
        group["largest"] = torch.maximum(group.get("largest", torch.zeros(())), param.grad.abs().max().float())
        return float(group["lr"] * group["found"] / (1 + group["largest"]))


class Counting(Past):
    """Counts its steps in its state, under names, as MADGRAD and SPAM do; one of them from the start."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.state["steps"] = 0  # type: ignore[index, assignment]

    def step(self, closure: Any = None) -> Any:
        state: Any = self.state
        if "k" not in state:
            state["k"] = torch.zeros(1)
        loss = super().step(closure)
        state["k"] += 1
        state["steps"] += 1
        return loss

    def _rate(self, group: dict[str, Any], param: nn.Parameter) -> float:
        state: Any = self.state
        return float(group["lr"] / (1 + state["k"] + state["steps"]))


class Noting(Past):
    """Counts its steps in an attribute, which its own state_dict has, as that of StableSPAM does."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return super().step(closure)

    def _rate(self, group: dict[str, Any], param: nn.Parameter) -> float:
        return float(group["lr"] / (1 + self.steps))

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.steps = state_dict["steps"]


def hooked(params: Iterable[nn.Parameter]) -> Noting:
    """The same by hooks."""

    class Hooked(Noting):
        state_dict = Past.state_dict
        load_state_dict = Past.load_state_dict

    def add(own: Any, state: dict[str, Any]) -> None:
        state["steps"] = own.steps

    def take(own: Any, state: dict[str, Any]) -> None:
        own.steps = state["steps"]

    optimizer = Hooked(params)
    optimizer.register_state_dict_post_hook(add)
    optimizer.register_load_state_dict_pre_hook(take)
    return optimizer


class Summing(Past):
    """Keeps a tensor that is of another shape than the parameter and has as many dimensions less one."""

    def _rate(self, group: dict[str, Any], param: nn.Parameter) -> float:
        assert param.grad is not None
        sums = param.grad.abs().sum(-1)
        state = self.state[param]
        state["sums"] = sums + state["sums"] if "sums" in state else sums
        assert state["sums"].shape == sums.shape
        return float(group["lr"] / (1 + state["sums"].sum()))


class Mixing(Counting):
    """The same, and the heads of a device would train each other."""

    def _rate(self, group: dict[str, Any], param: nn.Parameter) -> float:
        assert param.grad is not None
        return super()._rate(group, param) / (1 + float(param.grad.norm()))


def fit(
    folder: str, optimizer: Any, devices: int, heads: int, resume: str | None = None, **choices: Any
) -> dict[str, Tensor]:
    keep = ModelCheckpoint(folder, filename=f"{{step}}-of-{devices}", every_n_train_steps=4, save_top_k=-1)
    strategy = LTEStrategy(heads, 3, rank=RANK, **choices)
    t = trainer(strategy, devices=devices, max_steps=7, callbacks=[keep], enable_checkpointing=True)
    module = Module(make_net(), optimizer)
    t.fit(module, Slices(devices, t.global_rank), ckpt_path=resume)
    kept(t)  # what a checkpoint after training would keep can be gathered
    return clone(module.state_dict())


@pytest.mark.parametrize("kind", ["gathered", "sharded"])
@pytest.mark.parametrize(
    ("optimizer", "devices", "heads"),
    [
        (Past, 1, 4),
        (Searching, 1, 1),
        (torch.optim.LBFGS, 1, 1),
        (Searching, 2, 2),
        (Counting, 1, 4),
        (Summing, 1, 1),
        (Summing, 2, 2),
        (Counting, 2, 2),
        (Noting, 1, 4),
        (Noting, 2, 2),
        (hooked, 1, 4),
    ],
)
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, optimizer: Any, devices: int, heads: int, kind: str) -> None:
    def fitted(resume: str | None = None) -> list[Any]:
        args = (str(tmp_path), optimizer, devices, heads, resume)
        return [fit(*args, checkpoint=kind)] if devices == 1 else run(_fit, devices, *args, kind, group=False)

    whole = fitted()
    for own, resumed in zip(whole, fitted(str(tmp_path / f"step=4-of-{devices}.ckpt")), strict=True):
        torch.testing.assert_close(resumed, own, rtol=0, atol=0)


def _fit(folder: str, optimizer: Any, devices: int, heads: int, resume: str | None, kind: Any) -> dict[str, Tensor]:
    return fit(folder, optimizer, devices, heads, resume, checkpoint=kind)


def test_on_another_number_of_devices_lists_of_tensors_start_anew_and_that_is_said(tmp_path: Path) -> None:
    run(_fit, 2, str(tmp_path), Past, 2, 4, None, "gathered", group=False)
    with pytest.warns(UserWarning, match=r"what they knew of net\.first\.weight\.A, .* was left out"):
        fit(str(tmp_path), Past, 1, 4, str(tmp_path / "step=4-of-2.ckpt"))


def test_what_an_optimizer_keeps_under_names_is_no_reason_to_believe_it() -> None:
    with pytest.raises(ValueError, match="received Mixing, which mixes them"):
        fit("", Mixing, 1, 4)


def test_numbers_go_on_anywhere_and_tensors_with_the_heads_they_belong_to() -> None:
    param = nn.Parameter(torch.ones(2, 3))
    states: Any = {param: {"moment": torch.ones(2, 3), "count": 3, "past": (torch.ones(2, 3), None), "odd": object()}}
    held = {"w": param, "b": nn.Parameter(torch.ones(2))}
    own = device_state(held, states, [{"params": [param], "lr": 0.1}], Past([param]))
    assert own["shapes"] == {"w": [2, 3]} and own["groups"] == [{"lr": 0.1}]
    assert taken(param, "w", own)["count"] == 3 and taken(param, "b", own) == {}
    torch.testing.assert_close(taken(param, "w", own)["past"], (torch.ones(2, 3), None))
    assert goes_on(param, "w", own, True) and not goes_on(param, "w", own, False)
    assert not goes_on(nn.Parameter(torch.ones(4, 2, 3)), "w", own, True)
    del own["states"]["w"]["past"]
    assert goes_on(param, "w", own, False)
    assert [is_own(value) for value in states[param].values()] == [False, True, True, False]
    assert with_own_settings([{"lr": 0.2, "params": [0]}], own) == [{"lr": 0.1, "params": [0]}]
