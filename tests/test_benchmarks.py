from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
import torch.distributed as dist

from benchmarks import base, execution, links, memory, network, training
from benchmarks.__main__ import COMMANDS, main
from benchmarks.bound import Arithmetic, Use, multiply_adds, uses
from benchmarks.namespaces import bits_per_second
from benchmarks.released import ReleasedLinear, as_released
from benchmarks.subject import Subject
from benchmarks.table import HEADER, Row, table
from benchmarks.times import IN_A_ROW, LEAD, Seconds, in_a_row, timed
from examples.demo import hardware
from lightning_lte import Explorer, LTEConfig
from lightning_lte.product import product
from lightning_lte.transport import Transport
from tests.processes import run

MODEL = "test_vit"


@pytest.fixture
def settings_of_torch() -> Iterator[None]:
    """Commands set threads and compile; what comes after them is to find torch as they did."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def bytes_of_a_merge(choices: dict[str, Any]) -> int:
    transport = Transport(dist.get_world_size(), dist.get_rank())
    torch.manual_seed(0)
    module = timm.create_model(MODEL)
    config = LTEConfig(heads=transport.world_size, merge_every=1, **choices)
    explorer = Explorer(module, torch.optim.AdamW(module.parameters()), config, transport)
    # One that is due: one that is asked for travels in full precision.
    record = explorer.step(measure=False)
    assert record is not None
    return record.bytes_sent


@pytest.mark.parametrize("payload", ["dense", "factors", "auto"])
def test_what_links_computes_is_what_a_merge_sends(payload: Any) -> None:
    model = links.described(MODEL, rank=4)
    for wire in links.WIRES:
        for counted in run(bytes_of_a_merge, 2, {"wire": wire, "payload": payload, "rank": 4}):
            # Which heads are good, one byte, is not in the formula.
            assert counted - 1 == pytest.approx(model.merge(2, wire, payload).bytes, rel=0.01)


def test_the_table_of_links_has_a_row_for_each_and_longer_periods_for_slower_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    links.main(["--model", MODEL, "--step-s", "0.01", "--devices", "8", "512", "--rank", "4"])
    text = capsys.readouterr().out
    assert links.FORMULA in text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if "bit/s |" in line or "NVLink" in line]
    assert len(rows) == 2 * len(links.LINKS)
    periods = [[int(cell.replace(",", "")) for cell in row[2:5]] for row in rows]
    assert periods[0][0] > periods[0][1] > periods[0][2] > 1
    assert periods[0] > periods[4] > periods[6] and periods[-1] == [1, 1, 1]


def test_a_period_keeps_communication_under_its_share() -> None:
    T = links.period(sent=10**6, rate=8e6, step_s=0.5, share=0.05)
    assert T == 40 and links.period(sent=1, rate=1e12, step_s=1, share=0.05) == 1


def test_rates_are_read_as_tc_does() -> None:
    assert bits_per_second("100mbit") == 1e8 and bits_per_second("1.5gbit") == 1.5e9
    with pytest.raises(ValueError, match="Give 100mbit"):
        bits_per_second("fast")


def test_the_table_of_the_network_comes_from_readings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"ddp": (1.0, 800), "lte-int8": (0.25, 20)}
    runs = []
    for key, (seconds, sent) in rows.items():
        row = next(r for r in training.ROWS if r.key == key)
        steps = row.warm_up(10) + 10
        keys = ("s", "own_cpu_s", "busy_cpu_s", "sent", "received", "packets", "computed", "stood_s", "waited_s")
        readings = [{k: i * (seconds if k.endswith("s") else sent) for k in keys} for i in range(steps)]
        runs.append({"row": key, "devices": [{"readings": readings, "parameters": 200}] * 2})
    setup = {"rate": "1gbit", "model": "m", "batch": 4, "steps": 10, "period": 10, "rank": 16, "seed": 0}
    setup |= {"hardware": "h", "versions": {"torch": "2"}, "shaping": "tbf"}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"setup": setup, "runs": runs}))
    network.main(["--table", str(path)])
    text = capsys.readouterr().out
    ddp, lte = (line.split(" | ") for line in text.splitlines() if line.startswith(("| DDP", "| LTE")))
    assert (ddp[1], ddp[4], ddp[5]) == ("8.00", "800", "800")
    assert (lte[1], lte[3], lte[7]) == ("32.00", "4.00", "1/40.0")
    assert ddp[8] == "–" and "%" in lte[8]


def test_the_table_of_memory_counts_what_is_there() -> None:
    explorer = Explorer(
        model := timm.create_model(MODEL),
        torch.optim.AdamW(model.parameters()),
        LTEConfig(1, rank=4, base="int8"),
    )
    factors = explorer.injection.factors.values()
    numbers = sum(f.weight.numel() for f in factors if explorer.injection.roles[f.weight].rounds)
    rows = sum(f.weight.shape[0] for f in factors if explorer.injection.roles[f.weight].rounds)
    others = sum(f.weight.nbytes for f in factors) - 4 * numbers
    assert numbers and others  # the patches' convolution
    plain = base.held_bytes(explorer, "float32", "cpu", 8)
    assert plain["read"] == others + 4 * numbers and plain["kept"] == plain["cpu"] == 0
    whole = base.held_bytes(explorer, "int8", "cpu", 8)
    assert (whole["read"], whole["kept"], whole["cpu"]) == (others + numbers + 4 * rows, 0, 4 * numbers)
    sharded = base.held_bytes(explorer, "int8", "sharded", 8)
    assert (sharded["read"], sharded["kept"], sharded["cpu"]) == (whole["read"], numbers // 2, 0)
    fed_back = base.held_bytes(explorer, "bfloat16", "error-feedback", 8)
    assert (fed_back["read"], fed_back["kept"]) == (others + 2 * numbers, numbers + 4 * rows)
    for held in (plain, whole, sharded, fed_back):
        assert held["factors"] == plain["factors"] > 0 and held["replicas"] == plain["replicas"] > 0


def test_the_released_formulation_leaves_attention_s_own_layer_to_it() -> None:
    """nn.MultiheadAttention reads the weight of its output and never calls the layer."""

    def make() -> torch.nn.Module:
        return torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    model = make()
    explorer = Explorer(model, torch.optim.AdamW(model.parameters()), LTEConfig(2, rank=2))
    released = as_released(make, explorer, 2, 2.0)
    kinds = {name for name, layer in released.named_modules() if isinstance(layer, ReleasedLinear)}
    assert kinds == {"linear1", "linear2"}
    released(torch.randn(4, 3, 16)).sum().backward()


SEVERAL = """
import torch
from torch import nn


def model():
    return nn.Sequential(nn.Conv2d(4, 16, 3), nn.NORM(16), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 4, 3))


def batch(samples):
    return torch.randn(samples, 4, 8, 8)


def loss(model, x):
    return model(x).square().mean()
"""


@pytest.mark.parametrize("norm", ["Identity", "BatchNorm2d"])
def test_copies_for_each_head_count_as_weights_and_none_is_as_large_as_a_weight(norm: str, tmp_path: Path) -> None:
    """Also where heads take turns, as with batch norm."""
    path = tmp_path / "several.py"
    path.write_text(SEVERAL.replace("NORM", norm))
    names = {"model": str(path), "batch": 32, "heads": 8, "rank": 3, "devices": 1, "seed": 0}
    options = argparse.Namespace(**names)
    full, own = (memory.count(way, options) for way in ("full rank", "reset"))
    replicas = sum(p.numel() for p in Subject.of(str(path)).model(torch.device("cpu"), 0).parameters())
    replicas -= 2 * 16 * 4 * 9  # of which heads have factors: the first and the last
    assert own["weights"] - full["weights"] == 4 * 8 * replicas
    assert own["largest of a head over its weight"] == 3 * 16 * 9 / (16 * 4 * 9)
    assert own["in turns"] == (norm == "BatchNorm2d")
    within = full["activations"] + own["rank-sized activations"]
    # In turns batch norm keeps its statistics once for each head.
    assert own["activations"] <= within + (0 if norm == "Identity" else 8 * 2 * 16 * 4)


def test_the_table_of_accuracy_compares_runs_of_the_same_seed() -> None:
    setup = {"epochs": 2, "dim": 8, "depth": 1, "limit": None}
    accuracies = {("float32", "cpu"): [80.0, 84.0], ("int8", "cpu"): [80.5, 83.0]}
    lines = [
        {"base": b, "base_copy": c, "seed": seed, "accuracy": a, "rounded_accuracy": a - 1}
        for (b, c), own in accuracies.items()
        for seed, a in enumerate(own)
    ]
    text = base.quality_table(lines, setup)
    assert "2 epochs of all batches, seeds 0, 1;" in text
    assert "| float32 |  | 2 | 82.00 (80.00 to 84.00) |  |  |" in text
    assert "| int8 | cpu | 2 | 81.75 (80.50 to 83.00) | -0.25 (-1.00 to +0.50) | 80.75 (79.50 to 82.00) |" in text


def test_the_bound_is_the_sum_of_its_formula_over_layers_and_of_the_rest() -> None:
    inner = Use(out_features=8, in_features=4, rank=2, tokens=10)
    assert inner.full_rank == 10 * 3 * 32
    assert inner.heads(anchors=False) == 10 * (2 * 32 + 3 * 2 * 12)
    assert inner.heads(anchors=True) == 10 * (2 * 32 + 5 * 2 * 12)
    # The first layer's input wants no gradient: neither W nor A has a product for it.
    first = Use(out_features=8, in_features=4, rank=2, tokens=10, inner=False)
    assert first.full_rank == 10 * 2 * 32
    assert first.heads(anchors=False) == 10 * (32 + 2 * (3 * 8 + 2 * 4))
    assert first.heads(anchors=True) == 10 * (32 + 2 * (3 * 8 + 2 * 4) + 2 * 12)
    whole = 1000 + first.full_rank + inner.full_rank
    bound = Arithmetic((first, inner), whole).bound(anchors=True)
    assert bound == (1000 + first.heads(True) + inner.heads(True)) / whole


def test_the_bound_knows_what_a_model_computes() -> None:
    model = timm.create_model(MODEL)
    x = torch.randn(2, 3, 160, 160)
    explorer = Explorer(model, torch.optim.AdamW(model.parameters()), LTEConfig(1, rank=4))
    found = uses(explorer.injection, model, lambda: model(x).sum())
    assert len(found) == len(explorer.injection.factors)
    patch, *others = found
    # 100 patches, and a class token in all layers but the first and the last.
    assert (patch.tokens, patch.inner) == (200, False)
    assert {use.tokens for use in others} == {202, 2} and all(use.inner for use in others)
    plain = timm.create_model(MODEL)
    whole = multiply_adds(lambda: plain(x).sum().backward())
    factored = sum(use.full_rank for use in found)
    attention = 3 * 2 * 202 * 101 * plain.embed_dim * len(plain.blocks)
    assert whole == factored + attention


@pytest.mark.parametrize("autocast", [False, True])
def test_the_bound_counts_products_wherever_they_are_made(autocast: bool) -> None:
    """Attention reads both of its weights in a function and not in a layer's forward; convolutions have groups."""
    model = torch.nn.ModuleDict(
        {
            "first": torch.nn.Conv2d(4, 8, 3, padding=1, bias=False),
            "grouped": torch.nn.Conv2d(8, 8, 3, padding=1, groups=4),
            "up": torch.nn.ConvTranspose2d(8, 16, 2, stride=2),
            "attention": torch.nn.MultiheadAttention(16, 4, batch_first=True),
        }
    )
    plain = copy.deepcopy(model)
    image = torch.randn(2, 4, 5, 6)

    def forward() -> torch.Tensor:
        x = plain["up"](plain["grouped"](plain["first"](image))).flatten(2).transpose(1, 2)
        some = x[:, :3]
        return plain["attention"](x, some, some)[0]  # type: ignore[no-any-return]

    explorer = Explorer(model, torch.optim.AdamW(model.parameters()), LTEConfig(1, rank=1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = uses(explorer.injection, plain, forward)
    assert [(u.out_features, u.in_features, u.tokens, u.inner) for u in found] == [
        (8, 36, 60, False),
        (2, 18, 4 * 60, True),
        (4 * 16, 8, 60, True),
        (16, 16, 240 + 6 + 6, True),  # queries, keys and values
        (16, 16, 240, True),
    ]
    whole = multiply_adds(lambda: forward().sum().backward())
    attention = 3 * 2 * (2 * 120 * 3 * 16)
    assert whole == sum(use.full_rank for use in found) + attention


@pytest.mark.parametrize("kind", [torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM])
def test_the_bound_counts_recurrent_layers(kind: Any) -> None:
    """On CPUs, torch's counter knows nothing of the one operation that an LSTM is."""
    layer = kind(6, 8, num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, 6, requires_grad=True)
    matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    found = multiply_adds(lambda: layer(x)[0].sum().backward())
    # The gradient of a first state, which is zero, is left out by some.
    first = sum(p.numel() for name, p in layer.named_parameters() if name.startswith("weight_hh")) * 3
    assert found in (3 * 15 * matrices, 3 * 15 * matrices - first)


def test_all_that_the_released_formulation_computes_is_what_lte_does() -> None:
    layer = torch.nn.Linear(6, 5).double()
    released = ReleasedLinear(layer, heads=2, rank=3, scale=0.5)
    for tensor in (released.A, released.B, released.old_A, released.old_B):
        torch.nn.init.normal_(tensor)
    x = torch.randn(4, 6, dtype=torch.float64)
    y = product(x.view(2, 2, 6), layer.weight, layer.bias, released.A, released.B, released.old_A, released.old_B, 0.5)
    torch.testing.assert_close(released(x), y.view(4, 5))


def test_a_row_says_whether_its_goals_are_met() -> None:
    row = Row("c", "f", [1.0, 3.0, 1.2], "1.0 s", bound=1.0, goal=1.5, within=1.1)
    assert (row.median, row.met) == (1.2, False)
    assert Row("c", "f", [1.0], bound=1.0, within=1.1).met and Row("c", "f", [1.0]).met is None
    assert table([row]).endswith("| c | f | 1.0 s | 1.200 | 1.000 to 3.000 | 1.000 | 1.20 | 1.5, 1.1 × bound | no |")


class Event:
    """One of a GPU that this machine has not: its clock is `now`, in milliseconds."""

    now = 0.0
    waits: ClassVar[list[float]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        self.waits.append(self.at)

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_steps_on_a_gpu_are_timed_in_a_row_and_without_a_wait_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, done = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("waited"))
    monkeypatch.setattr(Event, "waits", [])

    def step() -> Seconds:
        done.append("step")
        with timed(gpu) as forward:
            Event.now += 2000.0 if len(done) <= 1 + LEAD else 500.0
        with timed(gpu) as backward:
            Event.now += 250.0
        return Seconds([forward], [backward])

    seconds = in_a_row(step, gpu)
    assert done == ["waited", *["step"] * (LEAD + IN_A_ROW)] and not Event.waits
    assert (seconds.forward, seconds.backward, seconds.step, seconds.whole) == (0.5, 0.25, 0.0, 0.75)
    assert Event.waits


@pytest.mark.usefixtures("settings_of_torch")
@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_quick_benchmarks_print_one_table(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([name, "--quick", "--threads", "1"])
    text = capsys.readouterr().out
    assert text.count(f"| {' | '.join(HEADER)} |") == 1
    assert f"torch {torch.__version__}" in text and "Seed 0" in text and hardware().split(",")[0] in text
    if name == "memory":
        # Counted, not timed.
        for line in text.splitlines():
            assert "factored weights" not in line or line.endswith("| yes |")


@pytest.mark.usefixtures("settings_of_torch")
@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_quick_benchmark_takes_what_it_is_given(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    option = "--models" if name == "step" else "--model"
    model = Path(__file__).parents[1] / "benchmarks" / "models" / "mlp.py"
    main([name, "--quick", "--threads", "1", option, str(model), "--batch", "8"])
    text = capsys.readouterr().out
    assert "| mlp, batch 8, " in text and "test_vit" not in text


@pytest.mark.timeout(600)  # twelve processes start one after the other
@pytest.mark.usefixtures("settings_of_torch")
def test_the_benchmark_of_memory_trains_in_several_processes(capsys: pytest.CaptureFixture[str]) -> None:
    rows = memory.main(["--quick", "--threads", "1", "--devices", "2"])
    text = capsys.readouterr().out
    assert text.count(f"| {' | '.join(HEADER)} |") == 1
    ratios = {(row.configuration.split("2 devices, ")[1], row.figure): row.median for row in rows}
    each, shared = "keep, a head on each device", "keep, one head that all share out"
    assert {way for way, _ in ratios} == {"full rank, under DDP", "full rank, under FSDP2", each, shared}
    for way in (each, shared):
        assert f"- {way}: " in text
        for figure in ("peak of starting up", "peak of steps and merges"):
            assert all(ratios[way, f"{figure} / full rank's {how}"] > 0 for how in ("under DDP", "under FSDP2"))
    # Counted. Weights, gradients and two moments, of each a half in whole rows, over the same and the buckets.
    held = "all but activations / full rank's"
    assert 0.4 <= ratios["full rank, under FSDP2", f"{held} under DDP"] < 0.45
    assert 0.5 <= ratios[shared, f"{held} under DDP"] / ratios[each, f"{held} under DDP"] < 0.6


@pytest.mark.usefixtures("settings_of_torch")
def test_the_benchmark_of_a_step_prints_the_speed_up_of_torch_compile(capsys: pytest.CaptureFixture[str]) -> None:
    # A backend that takes no time to compile.
    main(["step", "--quick", "--fused", "--threads", "1", "--compile", "eager", "--after-merge", "reset"])
    text = capsys.readouterr().out
    for heads in (1, 2):
        what = f"heads {heads}, rank 4, reset, AdamW(fused=True)"
        for figure in ("LTE's step / the same", "full rank's step / the same", "LTE's step / full rank's, both"):
            assert text.count(f"{what} | {figure} compiled") == 1


@pytest.mark.usefixtures("settings_of_torch")
@pytest.mark.parametrize("precision", ["64-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_the_benchmark_of_a_step_takes_a_precision(capsys: pytest.CaptureFixture[str], precision: str) -> None:
    main(["step", "--quick", "--threads", "1", "--after-merge", "keep", "--precision", precision])
    text = capsys.readouterr().out
    for heads in (1, 2):
        assert text.count(f"heads {heads}, rank 4, keep, {precision} | LTE's step / full rank's") == 1


OWN = """
import torch
from lightning.pytorch import LightningModule
from torch.nn.functional import cross_entropy


class Reader(LightningModule):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(40, 16)
        self.norm = torch.nn.NORM(16)
        self.out = torch.nn.Linear(16, 40)

    def training_step(self, batch, batch_idx):
        y = self.out(self.norm(self.words(batch["ids"]).flatten(0, 1)))
        loss = cross_entropy(y, batch["next"].flatten())
        self.log("loss", loss)
        return loss


def model():
    return Reader()


def batch(samples):
    return {"ids": torch.randint(0, 40, (samples, 6)), "next": torch.randint(0, 40, (samples, 6))}


def loss(model, batch):
    return model.training_step(batch, 0)
"""


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.usefixtures("settings_of_torch")
@pytest.mark.parametrize(("name", "more"), [
    ("step", ["--ranks", "2", "--rounds", "1", "--precision", "bf16-mixed"]),
    ("merge", ["--rank", "2", "--rounds", "1"]),
    ("startup", ["--rank", "2", "--rounds", "1"]),
    ("memory", ["--rank", "2", "--after-merge", "reset"]),
])  # fmt: skip
def test_a_model_of_ones_own_is_measured(
    name: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "reader.py"
    path.write_text(OWN.replace("NORM", "LayerNorm"))
    model = "--models" if name == "step" else "--model"
    main([name, model, str(path), "--batch", "4", "--heads", "2", "--threads", "1", *more])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| reader, batch 4, heads 2")]
    assert rows and not any("in turns" in row for row in rows)
    if name == "startup":
        assert any("samples through the model in the proof / batch |  | 2.000 |" in row for row in rows)
    if name == "memory":
        assert any("rank 2, reset | gradients of factored weights / all of" in row for row in rows)


def test_a_step_says_where_heads_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "reader.py"
    path.write_text(OWN.replace("NORM", "BatchNorm1d"))
    choices = ["--batch", "4", "--heads", "2", "--ranks", "2", "--rounds", "1", "--after-merge", "reset"]
    main(["step", "--models", str(path), *choices])
    assert "| reader, batch 4, heads 2, rank 2, reset, in turns | LTE's step" in capsys.readouterr().out


def test_a_model_of_ones_own_has_three_functions(tmp_path: Path) -> None:
    path = tmp_path / "reader.py"
    path.write_text("def model(): ...\nloss = 1\n")
    with pytest.raises(ValueError, match=r"has the functions model, batch, loss.*has no batch, loss"):
        Subject.of(str(path))
    with pytest.raises(ValueError, match=r"there is none at .*other.py"):
        Subject.of(str(tmp_path / "other.py"))
    with pytest.raises(ValueError, match="--depth is for models of timm's; received 2"):
        Subject.of(str(path), depth=2)


IN_MAPPINGS = """
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Batch:
    x: Tensor


def model():
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))


def batch(samples):
    return Batch(torch.randn(samples, 16))


def loss(model, batch):
    return {"loss": model(batch.x).square().mean(), "samples": len(batch.x)}
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_of_ones_own_may_have_batches_of_its_own_class_and_its_loss_in_a_mapping(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mappings.py"
    path.write_text(IN_MAPPINGS)
    step, timed = name == "step", [] if name == "memory" else ["--rounds", "1"]
    choices = ["--batch", "4", "--heads", "2", "--ranks" if step else "--rank", "2", *timed]
    COMMANDS[name](["--models" if step else "--model", str(path), *choices])
    assert "| mappings, batch 4, heads 2, rank 2" in capsys.readouterr().out


@pytest.mark.parametrize("found", ["model(batch.x)", "None", "{'other': 1}"])
def test_a_loss_that_is_none_is_named(found: str, tmp_path: Path) -> None:
    path = tmp_path / "mappings.py"
    path.write_text(IN_MAPPINGS.rpartition("return")[0] + f"return {found}\n")
    subject, device = Subject.of(str(path)), torch.device("cpu")
    with pytest.raises(ValueError, match=r"`loss` of .*mappings.py must return a tensor with one number.*; received"):
        subject.loss(subject.model(device, 0), subject.batch(2, device, 0))


def test_a_subject_is_the_same_for_the_same_seed() -> None:
    subject, device = Subject.of("test_vit"), torch.device("cpu")
    one, same, other = (subject.model(device, seed) for seed in (0, 0, 1))
    assert torch.equal(one.head.weight, same.head.weight) and not torch.equal(one.head.weight, other.head.weight)
    one, same, other = (subject.batch(2, device, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_an_unknown_benchmark_is_answered_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["speed"])
    assert "step, memory, merge, startup" in capsys.readouterr().out


TIMED = [*COMMANDS, "execution"]


@pytest.mark.parametrize(
    ("commands", "arguments", "message"),
    [
        (["step", "merge", "startup", "execution"], ["--batch", "4", "--heads", "3"], "a multiple of all --heads"),
        (["step", "merge", "startup", "execution"], ["--heads", "0"], "--heads must be at least 1; received 0"),
        (["step", "merge", "startup", "execution"], ["--rounds", "0"], "--rounds must be at least 1; received 0"),
        (["step", "merge", "startup"], ["MODEL", "resnet18", "--depth", "2"], "--depth is for models that take one"),
        (["memory"], ["--devices", "0"], "--devices must be at least 1; received 0"),
        (["memory"], ["--heads", "3"], "a multiple of all --heads"),
        (["memory"], ["--heads", "2", "--devices", "2"], "--heads is for one device; received 2 with --devices 2"),
        (TIMED, ["--batch", "0"], "--batch must be at least 1; received 0"),
        (TIMED, ["MODEL", "vit_tiny"], "no model of timm's has the name 'vit_tiny'"),
    ],
)
def test_choices_that_leave_nothing_to_measure_are_refused(
    commands: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in commands:
        model = "--models" if command in ("step", "execution") else "--model"
        own = [model if argument == "MODEL" else argument for argument in arguments]
        with pytest.raises(SystemExit, match="2"):
            execution.main(own) if command == "execution" else COMMANDS[command](own)
        assert message in capsys.readouterr().err, command
