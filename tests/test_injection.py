from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lte.config import LTEConfig
from lightning_lte.injection import Injection, inject
from lightning_lte.layers.base import HeadedLayer, state_of


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Model(nn.Module):
    """A parameter for every role."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.embedding = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)}) for _ in "ab")
        self.attention = nn.MultiheadAttention(8, 2)
        self.odd = Doubling(8, 8, bias=False)
        self.odd_attention = OwnAttention(8, 2, bias=False)
        self.still = nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.target = nn.Linear(8, 8, bias=False)
        self.thin = nn.Linear(8, 2)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight


def parameters(model: Model) -> list[nn.Parameter]:
    """All but those of `target`, as an optimizer holds them beside a target network."""
    return [p for name, p in model.named_parameters() if not name.startswith("target")]


def injected(model: Model, count: int = 1, heads: int = 4, **choices: Any) -> Injection:
    return inject(model, parameters(model), LTEConfig(heads=heads, rank=2, **choices), count=count)


def roles(injection: Injection) -> dict[str, tuple[str, str]]:
    return {e.name: (e.role, e.reason) for e in injection.report.entries}


ROLES = {
    "scale": ("replica", "Model is not a layer that can be factored"),
    "embedding.weight": ("replica", "tied: shared by embedding and head"),
    "norm.weight": ("replica", "LayerNorm is not a layer that can be factored"),
    "norm.bias": ("replica", "a bias"),
    "blocks.0.fc1.weight": ("factored", "rank 2, scale 2"),
    "blocks.0.fc1.bias": ("replica", "a bias"),
    "blocks.0.fc2.weight": ("factored", "rank 2, scale 2"),
    "blocks.0.fc2.bias": ("replica", "a bias"),
    "blocks.1.fc1.weight": ("factored", "rank 2, scale 2"),
    "blocks.1.fc1.bias": ("replica", "a bias"),
    "blocks.1.fc2.weight": ("factored", "rank 2, scale 2"),
    "blocks.1.fc2.bias": ("replica", "a bias"),
    "attention.in_proj_weight": ("factored", "rank 2, scale 2, in 3 parts"),
    "attention.in_proj_bias": ("replica", "a bias"),
    "attention.out_proj.weight": ("factored", "rank 2, scale 2"),
    "attention.out_proj.bias": ("replica", "a bias"),
    "odd.weight": ("replica", "Doubling computes otherwise than nn.Linear"),
    "odd_attention.in_proj_weight": ("replica", "OwnAttention computes otherwise than nn.MultiheadAttention"),
    "odd_attention.out_proj.weight": ("replica", "OwnAttention computes otherwise than nn.MultiheadAttention"),
    "still.weight": ("replica", "requires no gradient now; trained in place if that changes"),
    "target.weight": ("untouched", "no optimizer holds it"),
    "thin.weight": ("replica", "thin: factors of rank 2 would be no smaller"),
    "thin.bias": ("replica", "a bias"),
}


def test_every_parameter_has_a_role_and_a_reason_in_the_modules_order() -> None:
    model = Model()
    injection = injected(model)
    assert roles(injection) == ROLES
    assert list(roles(injection)) == [name for name, _ in model.named_parameters()]
    shapes = {e.name: e.shape for e in injection.report.entries}
    assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_what_is_frozen_by_the_policy_is_named_so() -> None:
    found = roles(injected(Model(), replicas="freeze"))
    assert found == {n: ("frozen" if role == "replica" else role, reason) for n, (role, reason) in ROLES.items()}


def test_targets_and_exclusions_choose_layers_and_the_reason_tells_which() -> None:
    model = Model()
    found = roles(injected(model, target_modules=["fc1", "odd|thin"], exclude_modules=[r"blocks\.1\..*"]))
    assert {n for n, (role, _) in found.items() if role == "factored"} == {"blocks.0.fc1.weight"}
    assert found["blocks.0.fc2.weight"] == ("replica", "not named by target_modules")
    assert found["blocks.1.fc1.weight"] == ("replica", "named by exclude_modules")
    assert not isinstance(model.blocks[1].fc1, HeadedLayer)


def test_patterns_choose_rank_and_scale() -> None:
    model = Model()
    injection = injected(model, alpha=6, rank_pattern={"fc2": 1}, alpha_pattern={r"blocks\.0\.fc1": 1})
    by_name = {f.name: (f.rank, f.scale) for f in injection.factors.values()}
    assert by_name["attention.in_proj_weight"] == by_name["attention.out_proj"] == (2, 3)
    assert by_name["blocks.0.fc1"] == (2, 0.5)
    assert by_name["blocks.1.fc1"] == (2, 3)
    assert by_name["blocks.0.fc2"] == by_name["blocks.1.fc2"] == (1, 6)


def test_the_report_has_a_line_for_each_parameter_and_the_summary_for_each_kind() -> None:
    report = injected(Model()).report
    report.notes.append("A note.")
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(ROLES) + 1 and lines[-1] == "A note."
    assert any(re.fullmatch(r"scale +scalar +replica +1 +Model is not .*", line) for line in lines)
    summary = report.summary().splitlines()
    assert any(
        re.fullmatch(r"blocks\.\*\.fc\*\.weight +2 +16x8 +factored +1 +rank 2, scale 2", line) for line in summary
    )
    assert any(re.fullmatch(r"odd\.weight +1 +8x8 +replica .*", line) for line in summary)


def test_only_layers_with_something_of_their_own_change_class() -> None:
    model = Model()
    injection = injected(model)
    assert {n for n, m in model.named_modules() if isinstance(m, HeadedLayer)} == {
        "attention",
        *(f"blocks.{i}.fc{j}" for i in (0, 1) for j in (1, 2)),
    }
    assert all(state_of(layer).switch is injection.switch for layer in injection.states)


def test_heads_that_share_a_device_have_their_own_replicas_where_a_layer_can_tell_them_apart() -> None:
    model = Model()
    injection = injected(model, count=2)
    split = {r.name for r in injection.replicas if r.stack is not None}
    known = {
        "norm.weight",
        "norm.bias",
        "thin.weight",
        "thin.bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
    }
    assert split == known | {f"blocks.{i}.fc{j}.bias" for i in (0, 1) for j in (1, 2)}
    assert set(state_of(model.thin).stacks) == {"weight", "bias"}
    assert set(state_of(model.attention).stacks) == {"in_proj_bias", "out_proj.bias"}
    assert set(state_of(model.attention).factors) == {"in_proj_weight", "out_proj.weight"}
    copies = {e.name: e.copies for e in injection.report.entries}
    assert all(copies[name] == 2 for name in split) and copies["scale"] == copies["embedding.weight"] == 1
    assert copies["blocks.0.fc1.weight"] == 2 and copies["target.weight"] == 0
    for replica in injection.replicas:
        if replica.stack is not None:
            assert torch.equal(replica.stack, torch.stack([replica.param] * 2))


@pytest.mark.parametrize("choices", [{"replicas": "step"}, {"replicas": "freeze"}, {"count": 1}], ids=str)
def test_replicas_are_shared_where_they_stay_equal_anyway(choices: dict[str, Any]) -> None:
    assert all(r.stack is None for r in injected(Model(), **{"count": 2, **choices}).replicas)


def test_in_sequential_execution_every_trained_replica_is_split() -> None:
    replicas = injected(Model(), count=2, execution="sequential").replicas
    assert {r.name for r in replicas if r.stack is None} == {"still.weight"}


def test_a_head_sees_its_own_replicas_under_every_name_they_are_tied_to() -> None:
    model = Model()
    injection = injected(model, count=2, execution="sequential")
    tied = next(r for r in injection.replicas if r.name == "embedding.weight")
    assert tied.stack is not None
    with torch.no_grad():
        tied.stack[1] += 1
    injection.replicas.select(1)
    assert torch.equal(model.embedding.weight, tied.stack[1])
    assert model.head.weight is model.embedding.weight
    assert isinstance(model.head.weight, nn.Parameter) and model.head.weight.is_leaf
    model.head(torch.ones(1, 8)).sum().backward()
    injection.replicas.select(None)
    injection.replicas.collect_gradients(2)
    assert model.head.weight is model.embedding.weight is tied.param
    assert tied.stack.grad is not None and tied.stack.grad[1].any() and not tied.stack.grad[0].any()
    assert tied.param.grad is None


def test_factors_are_no_parameters_of_the_module() -> None:
    model = Model()
    names, keys, flags = _names(model), list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    injection = injected(model)
    assert _names(model) == names and list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    own = {id(p) for p in model.parameters()}
    assert not any(id(p) in own for f in injection.factors.values() for p in (f.A, f.B))
    assert set(injection.factors) == {p for n, p in model.named_parameters() if ROLES[n][0] == "factored"}


def _names(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]


def _snapshot(model: nn.Module) -> list[Any]:
    layers = [(name, type(m), {k: id(v) for k, v in m.__dict__.items()}) for name, m in model.named_modules()]
    return [layers, _names(model), {k: v.clone().tolist() for k, v in model.state_dict().items()}]


def test_eject_is_the_inverse_of_inject() -> None:
    model = Model()
    before = _snapshot(model)
    injection = injected(model, count=2)
    assert _snapshot(model) != before
    injection.eject()
    assert _snapshot(model) == before
    injection.eject()  # again does no harm
    assert _snapshot(model) == before
    assert roles(injected(model)) == ROLES


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(8, 8), (3, 8)),
        (nn.Conv2d(8, 8, 3), (3, 8, 5, 5)),
        (nn.ConvTranspose2d(8, 8, 3), (3, 8, 5, 5)),
        (nn.Embedding(50, 8), None),
        (nn.LayerNorm(8), (3, 8)),
        (nn.MultiheadAttention(8, 2), (3, 3, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_forward_that_is_bound_while_a_layer_has_heads_computes_without_them_afterwards(
    layer: nn.Module, shape: tuple[int, ...] | None
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), layer)
    x = torch.arange(6) if shape is None else torch.randn(shape)
    args = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    expected = layer(*args)
    injection = inject(model, list(model.parameters()), LTEConfig(heads=3, rank=2), count=3)
    bound = layer.forward
    assert isinstance(layer, HeadedLayer)
    torch.testing.assert_close(bound(*args), expected, rtol=0, atol=0)
    injection.eject()
    torch.testing.assert_close(bound(*args), expected, rtol=0, atol=0)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "a target without a match": ({"target_modules": ["fc3"]}, r"target_modules 'fc3' matches no module"),
    "a target of another kind": (
        {"target_modules": ["norm", "fc1"]},
        r"target_modules 'norm' matches only LayerNorm, which can't be factored",
    ),
    "an exclusion without a match": ({"exclude_modules": ["gone"]}, r"exclude_modules 'gone' matches no module"),
    "a rank without a match": ({"rank_pattern": {"fc9": 1}}, r"rank_pattern 'fc9' matches no module"),
    "an alpha without a match": ({"alpha_pattern": {"blocks": 1}}, r"alpha_pattern 'blocks' matches only ModuleList"),
    "nothing left to factor": ({"target_modules": ["thin"]}, r"at least one weight .*found none.*Lower `rank`.*thin"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_names_its_cause_and_leaves_the_module_untouched(case: str) -> None:
    choices, message = ERRORS[case]
    model = Model()
    before, random = _snapshot(model), torch.get_rng_state()
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        injected(model, count=2, **choices)
    assert _snapshot(model) == before and torch.equal(torch.get_rng_state(), random)


def test_where_hooks_are_in_the_way_of_all_weights_their_removal_is_the_remedy() -> None:
    model = Model()
    hooks = [p.register_hook(lambda g: None) for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"Remove the hooks.*wandb\.watch.*give log=None") as caught:
        injected(model)
    assert "Lower `rank`" not in str(caught.value)
    for hook in hooks:
        hook.remove()
    injected(model)


def test_all_patterns_that_match_nothing_are_named_at_once_and_what_could_match_too() -> None:
    with pytest.raises(ValueError) as caught:
        injected(Model(), target_modules=["fc1", "nope"], exclude_modules=["gone"], rank_pattern={"lost": 1})
    message = str(caught.value)
    assert all(repr(p) in message for p in ("nope", "gone", "lost")) and "'fc1'" not in message
    assert "blocks.0.fc1" in message


def test_layers_of_every_kind_are_factored() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(8, 8, 3, padding=1),
            "groups": nn.Conv1d(16, 16, 5, groups=2),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "up": nn.ConvTranspose2d(8, 8, 3),
            "embedding": nn.Embedding(50, 16),
            "bounded": nn.Embedding(50, 16, max_norm=1.0),
            "batch_norm": nn.BatchNorm2d(8),
        }
    )
    found = roles(inject(model, set(model.parameters()), LTEConfig(heads=1, rank=2)))
    factored = {name for name, (role, _) in found.items() if role == "factored"}
    assert factored == {"conv.weight", "groups.weight", "up.weight", "embedding.weight"}
    assert found["groups.weight"][1] == "rank 2, scale 2, in 2 parts"
    assert found["depthwise.weight"][1].startswith("thin")
    assert found["bounded.weight"] == ("replica", "max_norm rewrites it in every forward")


def test_a_fused_projection_is_split_where_the_user_says_so() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(8, 24), "fc": nn.Linear(8, 24)})
    injection = inject(model, set(model.parameters()), LTEConfig(heads=1, rank=2, split={"qkv": 3}))
    assert {f.name: f.A.shape[1:] for f in injection.factors.values()} == {"qkv": (3, 2, 8), "fc": (2, 8)}
    injection.eject()
    with pytest.raises(ValueError, match="received 5 parts for a weight of shape"):
        inject(model, set(model.parameters()), LTEConfig(heads=1, rank=2, split={"qkv": 5}))
    with pytest.raises(ValueError, match="split 'kqv' matches no module"):
        inject(model, set(model.parameters()), LTEConfig(heads=1, rank=2, split={"kqv": 3}))


def test_fused_projections_of_q_k_and_v_are_found_by_name_and_shape() -> None:
    shapes = {
        "qkv": (8, 24),
        "to_qkv": (8, 24),
        "Wqkv": (8, 24),
        "c_attn": (8, 24),
        "cross": (8, 24),  # as large, by another name
        "query_key_value": (8, 24),  # interleaves q, k and v by attention heads
    }
    layers = {name: nn.Linear(*shape) for name, shape in shapes.items()}
    blocks = nn.ModuleDict({"attn": nn.ModuleDict(layers), "cross": nn.ModuleDict({"c_attn": nn.Linear(8, 16)})})
    injection = inject(blocks, set(blocks.parameters()), LTEConfig(heads=1, rank=2, split="qkv"))
    split = {f.name for f in injection.factors.values() if f.matrices.lead == (3,)}
    assert split == {f"attn.{name}" for name in ("qkv", "to_qkv", "Wqkv", "c_attn")}
    assert len(injection.factors) == len(shapes) + 1


def test_a_model_without_fused_projections_has_nothing_to_split() -> None:
    model = nn.Sequential(nn.Linear(8, 24))
    [factors] = inject(model, set(model.parameters()), LTEConfig(heads=1, rank=2, split="qkv")).factors.values()
    assert factors.matrices.lead == ()


def test_embeddings_are_replicas_where_the_user_says_so() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(40, 8), "fc": nn.Linear(8, 24)})
    found = roles(inject(model, set(model.parameters()), LTEConfig(heads=1, rank=2, embeddings="replica")))
    assert found["embedding.weight"] == ("replica", "an embedding") and found["fc.weight"][0] == "factored"


def test_sparse_parameters_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24))
    model.register_parameter("graph", nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False))
    injection = inject(model, [p for p in model.parameters() if p.requires_grad], LTEConfig(heads=2, rank=2))
    assert len(injection.factors) == 2


def test_two_parameters_on_one_storage_are_tied() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight)
    found = roles(inject(model, set(model.parameters()), LTEConfig(heads=1, rank=2)))
    assert found["0.weight"] == ("replica", "tied: shares its storage with 1.weight")
    assert found["2.weight"][0] == "factored"


@pytest.mark.parametrize(
    ("layer", "message"),
    [(lambda: nn.LazyLinear(8), "lazy parameters"), (lambda: nn.Linear(8, 8, device="meta"), "on the meta device")],
)
def test_parameters_without_values_are_refused(layer: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), layer())
    with pytest.raises(ValueError, match=message):
        inject(model, set(model.parameters()), LTEConfig(heads=1, rank=2))
    assert type(model[0]) is nn.Linear


def test_a_module_with_nothing_to_train_is_refused() -> None:
    model = Model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"none of the module's parameters requires a gradient.*configure_optimizers"):
        injected(model)
    with pytest.raises(ValueError, match="needs parameters to train"):
        inject(Model(), [], LTEConfig(heads=1, rank=2))


def test_a_module_that_is_itself_a_layer_can_be_factored() -> None:
    layer = nn.Linear(8, 8)
    injection = inject(layer, set(layer.parameters()), LTEConfig(heads=1, rank=2))
    assert roles(injection) == {"weight": ("factored", "rank 2, scale 2"), "bias": ("replica", "a bias")}
    injection.eject()
    assert type(layer) is nn.Linear


def test_a_layer_used_under_two_names_is_one_layer() -> None:
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"one": layer, "two": layer})
    assert roles(inject(model, set(model.parameters()), LTEConfig(heads=1, rank=2)))["one.weight"][0] == "factored"


@pytest.mark.parametrize(("in_features", "out_features", "rank"), [(8, 8, 4), (8, 8, 9), (4, 12, 3), (1, 50, 1)])
def test_factors_are_made_only_where_they_are_smaller(in_features: int, out_features: int, rank: int) -> None:
    model = nn.Sequential(nn.Linear(in_features, out_features), nn.Linear(64, 64))
    injection = inject(model, set(model.parameters()), LTEConfig(heads=1, rank=rank))
    role, reason = roles(injection)["0.weight"]
    assert role == "replica" and reason.startswith("thin")
