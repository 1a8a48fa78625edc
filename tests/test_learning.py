from __future__ import annotations

import copy
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.learning import __main__ as study
from benchmarks.learning import report, steps, table
from benchmarks.learning.cache import Cache
from benchmarks.learning.methods import METHODS
from benchmarks.learning.settings import METHODS as METHOD_SETTINGS
from benchmarks.learning.settings import digest, resolved, with_changes
from benchmarks.learning.tasks import TASKS, Data
from benchmarks.learning.training import factor, trained

TINY: dict[str, Any] = {
    "task": {"name": "least-squares", "samples": 320},
    "batch": 32,
    "epochs": 1,
    "warmup": 2,
    "evaluations": 2,
}
CONTENT: dict[str, Any] = {
    "title": "Tiny",
    "base": TINY,
    "grids": [
        {"name": "full rank", "set": {"method": "full"}, "axes": {"lr": [0.001, 0.01]}},
        {"name": "LTE", "set": {"method": {"name": "lte", "rank": "1/8"}}, "axes": {"method.heads": [2, 4]}},
    ],
}


@pytest.fixture
def rows(tmp_path: Path) -> table.Table:
    return table.parsed(CONTENT)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def work(rows: table.Table, cache: Cache, seeds: int = 1) -> int:
    return study.work(rows, cache, range(seeds), Path("nowhere"))


def made(
    name: str, task: str = "least-squares", seed: int = 0, extra: dict[str, Any] | None = None, **choices: Any
) -> Any:
    method = {"name": name, **choices}
    settings = resolved({**TINY, "task": {"name": task}, "method": method, "lr": 0.01, "extra": extra or {}})
    torch.manual_seed(seed)
    return METHODS[name](TASKS[task].model(settings["task"]), settings, TASKS[task].loss, seed)


def batches(count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 32, generator=generator), torch.randn(32, 32, generator=generator)) for _ in range(count)]


def weights(method: Any) -> torch.Tensor:
    method.finish()
    return torch.cat([p.detach().flatten() for p in method.model.parameters()])


def test_a_table_runs_is_kept_and_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args = ["smoke", "--root", str(tmp_path), "--seeds", "2", "--threads", str(torch.get_num_threads())]
    assert study.main(args) == 0
    printed = capsys.readouterr().out
    runs = 2 * len(table.load("smoke").rows)
    assert printed.count("\n1/") + printed.startswith("1/") == 1 and f"{runs}/{runs}" in printed
    text = printed[printed.index("###") :]
    study.main([*args, "--print"])
    assert capsys.readouterr().out.strip() == text.strip()
    assert study.main([*args, "--plot", str(tmp_path / "pictures")]) == 0
    assert (tmp_path / "pictures" / "smoke-least-squares.png").stat().st_size > 1000
    kept = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(kept) == runs and not list(tmp_path.glob("*.lock")) and not list(tmp_path.glob("*.partial*"))
    for result in kept:
        assert len(result["curve"]) == 40 and result["curve"][-1]["samples"] == result["samples"] == 2560
        assert [point["samples"] for point in result["evaluations"]] == [1280, 2560]
        assert result["bytes"] > 0 and math.isfinite(result["metric"]) and result["versions"]["torch"]


def test_what_is_there_is_not_run_again(rows: table.Table, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    assert work(rows, cache) == 0
    cache.path(rows.rows[2], 0).unlink()
    done: list[Any] = []
    monkeypatch.setattr(study, "trained", lambda settings, *rest: done.append(settings) or trained(settings, *rest))
    assert work(rows, cache) == 0
    assert done == [rows.rows[2].settings]


def test_a_run_of_another_process_is_left_to_it(rows: table.Table, cache: Cache) -> None:
    with cache.lock(rows.rows[0], 0) as mine:
        assert mine
        # A lock is of an opened file, so another one in this process is as good as one in another process.
        assert work(rows, cache) == 0
    assert cache.get(rows.rows[0], 0) is None and cache.get(rows.rows[1], 0) is not None
    with cache.lock(rows.rows[0], 0) as mine:
        assert mine


def test_a_run_that_fails_is_not_kept_and_the_next_ones_go_on(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    content = copy.deepcopy(CONTENT)
    content["grids"].insert(0, {"name": "wrong", "set": {"method": {"name": "lte", "rank": 99}}})
    rows = table.parsed(content)
    assert work(rows, cache) == 1
    assert cache.get(rows.rows[0], 0) is None and cache.get(rows.rows[-1], 0) is not None
    assert "wrong" in capsys.readouterr().err


def test_a_run_that_diverges_is_a_result(cache: Cache) -> None:
    rows = table.parsed({"base": {**TINY, "lr": 1e30}, "grids": [{"set": {"method": "full"}}]})
    assert work(rows, cache) == 0
    result = cache.get(rows.rows[0], 0)
    assert result is not None and result["metric"] is None and "step" in result["diverged"]
    assert "(1 diverged)" in report.markdown(rows, report.lines(rows, cache, 1), 1)


def test_runs_are_told_by_what_they_do(rows: table.Table) -> None:
    assert len({row.digest for row in rows.rows}) == 4
    said = {"method": {"name": "lte", "heads": 8, "rank": 16}, "lr": 3e-3, **TINY}
    assert digest(said) == digest({"method": {"name": "lte"}, **TINY})
    assert digest({**said, "task": {**TINY["task"], "dim": 64}}) != digest(said)
    fraction = with_changes(said, {"method.rank": "1/4", "task.dim": 64})
    assert resolved(fraction)["method"]["rank"] == 16


def test_results_of_other_defaults_are_refused(
    rows: table.Table, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(rows, cache)
    monkeypatch.setitem(METHOD_SETTINGS["lte"], "merge_every", 11)
    now = table.parsed(CONTENT)
    with pytest.raises(ValueError, match=r"method\.merge_every"):
        cache.get(now.rows[2], 0)
    # A setting that is new does not touch what is kept.
    monkeypatch.setitem(METHOD_SETTINGS["lte"], "merge_every", 10)
    monkeypatch.setitem(METHOD_SETTINGS["lte"], "novel", 0)
    assert cache.get(table.parsed(CONTENT).rows[2], 0) is not None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task": {"name": "vitt"}}, "task.name must be one of"),
        ({"method": {"name": "lte", "head": 3}}, r"received \['head'\]"),
        ({"extra": {"same_start": True}}, "methods with heads"),
        ({"learning_rate": 3}, r"received \['learning_rate'\]"),
    ],
)
def test_what_is_not_known_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolved(settings)


def test_pictures_show_the_metric_over_a_setting(cache: Cache, tmp_path: Path) -> None:
    rows = table.parsed({**CONTENT, "over": "lr"})
    work(rows, cache)
    (path,) = report.plot(rows, report.lines(rows, cache, 1), tmp_path, "tiny")
    assert path.name == "tiny-least-squares.png" and path.stat().st_size > 1000


def test_the_difference_is_to_the_best_control_within_seeds(rows: table.Table, cache: Cache) -> None:
    metrics = {0: [0.5, 0.75], 1: [0.25, 0.5], 2: [0.375, 0.75], 3: [0.875, None]}
    kept = {"loss": 1.0, "bytes": 10, "cpu_seconds": 1, "notes": [], "hardware": "h", "versions": {}, "evaluations": []}
    for number, values in metrics.items():
        for seed, value in enumerate(values):
            row = rows.rows[number]
            diverged = None if value else "step 3"
            result = {**kept, "settings": row.settings, "metric": value, "diverged": diverged}
            cache.put(row, seed, result)
    text = report.markdown(rows, report.lines(rows, cache, 3), 3)
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][2:]
    # The lowest error is the best: 0.375 on average. Differences of the third row are 0.125 and 0.25.
    metric = cells[0].index("0.6250")
    assert cells[0][metric:][:4] == ["0.6250", "0.1768", "+0.2500", "0.000"]
    assert cells[1][metric:][:3] == ["0.3750", "0.1768", "control"]
    assert cells[2][metric:][:4] == ["0.5625", "0.2652", "+0.1875", "0.08839"]
    assert cells[3][metric:][:4] == ["0.8750", "", "+0.6250", ""] and cells[3][-1] == "2 (1 diverged)"
    assert "**4 of 12 runs are missing.**" in text


def test_one_replica_learns_as_full_rank_does() -> None:
    full, local = made("full"), made("local", heads=1, merge_every=3)
    for batch in batches():
        torch.testing.assert_close(full.step(batch), local.step(batch))
    torch.testing.assert_close(weights(full), weights(local))


def test_replicas_that_train_synchronously_learn_as_full_rank_does() -> None:
    full, local = made("full"), made("local", heads=4, full_rank_steps=6)
    for batch in batches():
        full.step(batch), local.step(batch)
    torch.testing.assert_close(weights(full), weights(local))
    assert local.sent == 6 * Ring.of(4) and full.sent == 6 * Ring.of(8)


class Ring:
    @staticmethod
    def of(devices: int) -> int:
        return 2 * 4 * 32 * 32 * (devices - 1) // devices


def test_replicas_learn_as_workers_of_their_own_and_take_the_outer_step() -> None:
    outer = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
    method = made("local", heads=2, merge_every=2, outer=outer)
    W = method.model.weight.detach().clone()
    workers = [copy.deepcopy(method.model) for _ in range(2)]
    optimizers = [torch.optim.AdamW(w.parameters(), 0.01, betas=(0.9, 0.999), weight_decay=0.05) for w in workers]
    shared = torch.nn.Parameter(W)
    step = torch.optim.SGD([shared], **outer)
    for number, (x, y) in enumerate(batches(), 1):
        method.step((x, y))
        for h, (worker, optimizer) in enumerate(zip(workers, optimizers, strict=True)):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(worker(x[16 * h :][:16]), y[16 * h :][:16]).backward()
            optimizer.step()
        if number % 2 == 0:
            shared.grad = shared.detach() - torch.stack([w.weight.detach() for w in workers]).mean(0)
            step.step()
            for worker in workers:
                worker.weight.data.copy_(shared)
    torch.testing.assert_close(weights(method), shared.detach().flatten())


@pytest.mark.parametrize("task", ["vit", "mixer", "gpt"])
def test_heads_share_nothing_that_devices_would_not(task: str) -> None:
    method = made("lte", task, heads=4, execution="batched")
    trained = [r for r in method.explorer.injection.replicas if r.param.requires_grad]
    assert trained and all(r.stack is not None for r in trained)
    assert any(f.count == 4 for f in method.explorer.injection.factors.values())


def test_scales_are_of_each_weight() -> None:
    by_width = made("lte", "vit", heads=2, scale="width", rank=8)
    found = {f.name: f.scale for f in by_width.explorer.injection.factors.values()}
    assert found["blocks.0.mlp.fc2"] == pytest.approx(math.sqrt(256 / 8))
    assert found["blocks.0.mlp.fc1"] == pytest.approx(math.sqrt(64 / 8))
    plain = made("lte", "vit", heads=2, scale=3.0, rank_pattern={"fc1": 4})
    assert all(f.scale == pytest.approx(3.0) for f in plain.explorer.injection.factors.values())


def test_orthogonal_heads_share_the_space() -> None:
    method = made("lte", heads=4, rank=8, extra={"orthogonal_heads": True})
    (f,) = method.explorer.injection.factors.values()
    A = f.A.detach().flatten(0, 1)
    torch.testing.assert_close(A @ A.T, torch.eye(32) * 4, atol=1e-5, rtol=0)


def test_adam_starts_anew_after_each_merge() -> None:
    method = made("lte", heads=4, rank=8, merge_every=2, extra={"fresh_adam": True})
    (f,) = method.explorer.injection.factors.values()
    counts = []
    for batch in batches(4):
        method.step(batch)
        counts.append([float(method.optimizer.state[p]["step"]) for p in (f.A, f.B)])
    assert counts == [[1, 1], [0, 0], [1, 1], [0, 0]]


def test_relora_warms_up_again_after_each_merge() -> None:
    method = made("relora", rank=4, merge_every=3, restart_warmup=2)
    lrs = []
    for batch in batches():
        method.set_lr(1.0)
        lrs.append(method.optimizer.param_groups[0]["lr"])
        method.step(batch)
    assert lrs == pytest.approx([0.01, 0.01, 0.01, 0.005, 0.01, 0.01])


def test_the_learning_rate_rises_and_falls() -> None:
    factors = [factor(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11) and factors[10] == 1 and factors[55] == pytest.approx(0.5)
    assert factors[9] < 1 and factors[-1] < 0.001 and sorted(factors[10:], reverse=True) == factors[10:]


def write_images(folder: Path, classes: int) -> None:
    """Files as Fashion-MNIST's, with images that are the brighter the higher their class."""
    for split, count in (("train", 64), ("t10k", 32)):
        of = [i % classes for i in range(count)]
        images = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        images += b"".join(bytes([25 * c]) * 784 for c in of)
        labels = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + bytes(of)
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def test_fine_tuning_starts_from_a_model_that_knows_other_classes(tmp_path: Path) -> None:
    write_images(tmp_path, classes=10)
    task = TASKS["fine-tuning"]
    options = {**task.options, "epochs_before": 4}
    data = task.data(options, tmp_path)
    assert data.train[1].unique().tolist() == data.test[1].unique().tolist() == [5, 6, 7, 8, 9]
    torch.manual_seed(0)
    model = task.model(options)
    images, labels = TASKS["vit"].data(options, tmp_path).train
    known = labels < 5

    def loss() -> float:
        return float(task.loss(model, (images[known], labels[known])))

    before = loss()
    assert task.start is not None
    task.start(model, options, tmp_path)
    assert loss() < 0.8 * before
    result = trained(resolved({**TINY, "task": {"name": "fine-tuning"}, "batch": 16}), 0, tmp_path)
    assert result["samples"] == 16  # of 30 with such classes


def test_fashion_mnist_is_read_and_asked_for(tmp_path: Path) -> None:
    write_images(tmp_path, classes=1)
    settings = resolved({**TINY, "task": {"name": "resnet", "dim": 64}, "method": {"name": "lte", "heads": 2}})
    result = trained(settings, 0, tmp_path)
    assert result["metric"] in (0, 100) and result["samples"] == 64 and "2 heads, sequential" in result["notes"]
    with pytest.raises(FileNotFoundError, match="--data"):
        TASKS["vit"].data({}, tmp_path / "elsewhere")


def test_all_tables_can_be_read() -> None:
    for name in table.names():
        assert table.load(name).rows


def test_heads_with_the_same_data_and_start_learn_as_one() -> None:
    same = made("lte", heads=4, rank=4, extra={"same_data": True, "same_start": True})
    for batch in batches():
        same.step(batch)
    for f in same.explorer.injection.factors.values():
        torch.testing.assert_close(f.B, f.B[:1].expand_as(f.B))
        assert f.B.any()


def test_effective_ranks_are_those_of_what_was_added_and_of_the_gradient(cache: Cache) -> None:
    content = copy.deepcopy(CONTENT)
    content["base"] = {**TINY, "ranks": True}
    content["grids"][1]["axes"] = {"method.heads": [1], "method.merge_every": [1000]}
    rows = table.parsed(content)
    assert work(rows, cache) == 0
    found = cache.get(rows.rows[2], 0)
    assert found is not None
    first, last = found["evaluations"]
    # One head of rank 4 that merges in the end has added that rank to W at most, and nothing before.
    assert first["learned_rank"] == 0 and 1 < last["learned_rank"] < 4.01
    # W starts at zero in this task.
    assert last["weight_rank"] == pytest.approx(last["learned_rank"]) and 4 < first["gradient_rank"] <= 32
    text = report.markdown(rows, report.lines(rows, cache, 1), 1)
    assert f"{first['learned_rank']:.1f}, {last['learned_rank']:.1f}" in text and "rank of W − W₀" in text


def test_heads_that_agree_on_the_sign_merge_the_mean_of_these() -> None:
    method = made("lte", heads=4, rank=4, extra={"sign_agreement": True})
    (f,) = method.explorer.injection.factors.values()
    before = f.weight.detach().clone()
    with torch.no_grad():
        f.B.copy_(torch.randn(f.B.shape))
    deltas = torch.stack([f.effective(h) for h in range(4)]) - before
    expected = torch.zeros_like(before)
    for place in torch.cartesian_prod(torch.arange(32), torch.arange(32)).tolist():
        own = deltas[:, place[0], place[1]]
        expected[place[0], place[1]] = own[own.sign() == own.sum().sign()].mean()
    method.explorer.merge()
    torch.testing.assert_close(f.weight.detach() - before, expected, rtol=1e-4, atol=1e-5)


def test_few_heads_at_first_become_those_of_the_end() -> None:
    method = made("lte", heads=4, rank=4, extra={"growing_heads": {"0": 1, "2": 2, "4": 4}})
    counts = []
    for batch in batches():
        method.step(batch)
        counts.append(method.explorer.count)
    assert counts == [1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize("kind", ["noise", "fisher"])
def test_heads_weigh_by_their_second_moments(kind: str) -> None:
    method = made("lte", heads=2, rank=4, extra={"weighted_heads": kind})
    (f,) = method.explorer.injection.factors.values()
    method.step(batches(1)[0])
    before = f.weight.detach().clone()
    deltas = [f.effective(h) - before for h in range(2)]
    of_A, of_B = (method.optimizer.state[p]["exp_avg_sq"] for p in (f.A, f.B))
    of_B[1] *= 9
    if kind == "noise":
        weights = [1 / v.mean() for v in of_B]
    else:
        of_A[0] += 1e-3
        weights = [torch.outer(b.mean(1), a.mean(0)) for a, b in zip(of_A, of_B, strict=True)]
    expected = (weights[0] * deltas[0] + weights[1] * deltas[1]) / (weights[0] + weights[1])
    method.explorer.merge()
    torch.testing.assert_close(f.weight.detach() - before, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(expected, (deltas[0] + deltas[1]) / 2)


def test_a_learning_rate_of_its_own_is_that_of_a_group_of_its_own() -> None:
    stretched = made("lte", heads=2, rank=4, merge_every=100, extra={"learning_rates": {"B": 3.0}})
    grouped = made("lte", heads=2, rank=4, merge_every=100)
    (f,) = grouped.explorer.injection.factors.values()
    (group,) = [g for g in grouped.optimizer.param_groups if any(p is f.B for p in g["params"])]
    optimizer = torch.optim.AdamW(
        [{"params": [f.A], "lr": 0.01}, {"params": [f.B], "lr": 0.03}], weight_decay=group["weight_decay"]
    )
    for batch in batches():
        stretched.step(batch)
        before = f.A.detach().clone(), f.B.detach().clone()
        grouped.step(batch)
        # The step that it made is undone, and made by the optimizer with two groups.
        with torch.no_grad():
            f.A.copy_(before[0]), f.B.copy_(before[1])
        f.A.grad, f.B.grad = grads_of(grouped, batch)
        optimizer.step()
    (g,) = stretched.explorer.injection.factors.values()
    torch.testing.assert_close(g.A, f.A)
    torch.testing.assert_close(g.B, f.B)


def grads_of(method: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of A and B on a batch, each head's of its own slice."""
    (f,) = method.explorer.injection.factors.values()
    x, y = (t.chunk(f.count) for t in batch)
    A, B = f.A.detach().requires_grad_(), f.B.detach().requires_grad_()
    losses = [
        torch.nn.functional.mse_loss(x[h] @ (f.weight.detach() + f.scale * B[h] @ A[h]).T, y[h]) for h in range(f.count)
    ]
    return list(torch.autograd.grad(torch.stack(losses).sum(), [A, B]))


def test_how_far_weights_move_is_measured_for_every_way() -> None:
    images, labels = torch.rand(640, 1, 28, 28), torch.arange(640) % 10
    found = {name: values for name, *values in steps.rows(Data((images, labels), (images, labels)), 1, 2, seed=0)}
    assert {name for name, _ in steps.WAYS} < found.keys()
    # A model that has hardly begun has gradients that are not large beside Adam's eps.
    assert found["full rank"][0] == pytest.approx(1, rel=0.05) and found["full rank"][2] == pytest.approx(1)
    for name, s in (("one head", 2), ("one head, rank 4", 2), ("one head, s = 4", 4)):
        assert found[name][0] == pytest.approx(s, rel=0.05)
    assert found["8 heads"][0] < found["8 heads of the whole batch each"][0] < 2
