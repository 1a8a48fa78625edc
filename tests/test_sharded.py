"""Checkpoints to which each device writes what it has: the same as one file, without gathering."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader

from lightning_lte import Explorer, LTEConfig, LTEStrategy, files, sharded
from lightning_lte.transport import Transport
from tests.modules import RANK, Module, Net, Recorder, Slices, adamw, clone, loader, make_net, train_step, trainer
from tests.processes import _context, run
from tests.test_checkpoint import EPOCH, Loadable, Noisy, assert_equal
from tests.test_resharding import DEVICES, HEADS, PAIRS, PERIOD, Normed, Shared

OUTER = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
ON_ITS_WAY = {"overlap": 2, "wire": "int8", "payload": "dense", "outer_optimizer": OUTER}
KINDS: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "shared": (Shared, {"execution": "batched"}),
    "in turn": (Normed, {"execution": "sequential"}),
    "on its way": (Net, {"execution": "batched", **ON_ITS_WAY}),
}
FORMS = ("gathered", "sharded")
SAVED = 4  # steps: in the middle of the second period, and before a merge that started after step 3 lands
LAST = 9


def other(form: str) -> str:
    return FORMS[form == "gathered"]


def save_both(t: Trainer, stem: str) -> None:
    """Write what is there now in both forms."""
    strategy: Any = t.strategy
    before = strategy._checkpoint
    for form in FORMS:
        strategy._checkpoint = form
        t.save_checkpoint(f"{stem}.{form}")
    strategy._checkpoint = before


@contextmanager
def reading() -> Iterator[list[str]]:
    """The names of all tensors that are read meanwhile."""
    names: list[str] = []
    read = sharded._Shards.read

    def noted(self: Any, wanted: list[str]) -> Any:
        names.extend(wanted)
        return read(self, wanted)

    sharded._Shards.read = noted  # type: ignore[method-assign, assignment]
    try:
        yield names
    finally:
        sharded._Shards.read = read  # type: ignore[method-assign]


# ---- the same as one file, on any number of devices


def fit(folder: str, kind: str, devices: int, resume: str | None = None, form: str = "gathered") -> dict[str, Any]:
    """Train, and say what was there when training began, what was said and read, and what came out."""
    rank = int(os.environ["RANK"]) if devices > 1 else 0
    start: list[Any] = []

    def save(t: Any, _: Any) -> None:
        if resume is None and t.global_step == SAVED:
            save_both(t, f"{folder}/{kind}-{devices}")

    look = Recorder(save)
    look.on_train_start = lambda t, m: start.append((t.strategy.explorer.state_dict(), clone(m.state_dict())))  # type: ignore[method-assign]
    net, choices = KINDS[kind]
    strategy = LTEStrategy(HEADS, PERIOD, rank=RANK, checkpoint=form, **choices)  # type: ignore[arg-type]
    t = trainer(strategy, devices=devices, max_steps=LAST, callbacks=[look])
    module = Module(make_net(net), adamw)
    with warnings.catch_warnings(record=True) as caught, reading() as read:
        warnings.simplefilter("always")
        t.fit(module, Slices(devices, rank), ckpt_path=resume)
    said = [str(w.message) for w in caught if "merged first" in str(w.message) or "buffers" in str(w.message)]
    state, weights = start[0]
    if state is not None:
        del state["generators"]
    return {"lte": state, "weights": weights, "said": said, "end": clone(module.state_dict()), "read": set(read)}


def save_all(folder: str, devices: int) -> dict[str, Any]:
    return {kind: fit(folder, kind, devices) for kind in KINDS}


def resume_all(folder: str, devices: int) -> dict[Any, Any]:
    """Each by a run that writes the other form."""
    return {
        (kind, saved, form): fit(folder, kind, devices, f"{folder}/{kind}-{saved}.{form}", other(form))
        for kind in KINDS
        for saved in DEVICES
        for form in FORMS
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def whole(folder: str) -> dict[int, list[dict[str, Any]]]:
    """The runs that were not interrupted, by number of devices: one result for each rank."""
    several = {w: run(save_all, w, folder, w, group=False, timeout_s=170) for w in DEVICES[1:]}
    return {1: [save_all(folder, 1)], **several}


@pytest.fixture(scope="module")
def resumed(folder: str, whole: Any) -> dict[int, list[dict[Any, Any]]]:
    several = {w: run(resume_all, w, folder, w, group=False, timeout_s=170) for w in DEVICES[1:]}
    return {1: [resume_all(folder, 1)], **several}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("saved", "then"), PAIRS)
def test_a_run_goes_on_as_from_one_file(whole: Any, resumed: Any, kind: str, saved: int, then: int) -> None:
    for number, rank in enumerate(resumed[then]):
        one_file, directory = rank[kind, saved, "gathered"], rank[kind, saved, "sharded"]
        for key in ("lte", "weights", "said", "end"):
            assert_equal(one_file[key], directory[key], key)
        assert not one_file["read"] and directory["read"]
        if saved == then:
            assert_equal(directory["end"], whole[saved][number][kind]["end"])
    first = resumed[then][0][kind, saved, "sharded"]
    assert len(first["lte"]["flights"]) == (kind == "on its way")
    assert bool(first["said"]) == (kind == "shared" and then < saved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("saved", "then"), PAIRS)
def test_a_device_reads_of_heads_what_it_needs(resumed: Any, kind: str, saved: int, then: int) -> None:
    for rank, result in enumerate(resumed[then]):
        heads = range(rank * HEADS // then, (rank + 1) * HEADS // then)
        holders = {str(head * saved // HEADS) for head in heads}
        read = [name.split(".") for name in result[kind, saved, "sharded"]["read"]]
        factors = {path[1] for path in read if path[0] == sharded.SHARDS and path[2] == "factors"}
        moments = {path[1] for path in read if path[0] == sharded.SHARDS and path[-3:-1] in (["A", "exp_avg"],)}
        assert factors == moments == holders


@pytest.mark.parametrize("kind", KINDS)
def test_each_device_writes_its_own_and_what_is_equal_is_written_once(folder: str, whole: Any, kind: str) -> None:
    metadata = FileSystemReader(f"{folder}/{kind}-4.sharded").read_metadata()
    writers: dict[str, str] = {}
    for index, stored in metadata.storage_data.items():
        assert index.fqn not in writers
        writers[index.fqn] = stored.relative_path
    assert writers.keys() == metadata.state_dict_metadata.keys()
    own = {name: name.split(".")[1] for name in writers if name.startswith(sharded.SHARDS)}
    for name, device in own.items():
        if device != "equal":
            assert writers[name] == f"__{device}_0.distcp", name
    assert {device for device in own.values()} >= {"0", "1", "2", "3"}
    weights = {writers[f"model.net.{layer}.weight"] for layer in ("first", "second")}
    assert weights != {"__0_0.distcp"}
    # What may differ between devices is rank 0's in the state_dict.
    assert writers["model.net.out.bias"] == "__0_0.distcp"


# ---- what devices tell each other


def count_bytes(folder: str, rank: int) -> dict[str, int]:
    """Bytes in the tensors that collectives are called with while checkpoints are written, and those of the heads."""
    counted: dict[str, int] = {}
    collectives = ("gather", "scatter", "broadcast", "all_gather", "all_reduce", "reduce", "all_to_all_single", "send")
    here = torch.distributed.distributed_c10d

    def nbytes(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.nbytes
        return sum(map(nbytes, value)) if isinstance(value, list | tuple) else 0

    def save(t: Any, _: Any) -> None:
        if t.global_step != 2:
            return
        for form in FORMS:
            total = 0

            def noted(real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*args: Any, **kwargs: Any) -> Any:
                    nonlocal total
                    total += nbytes(args) + nbytes(tuple(kwargs.values()))
                    return real(*args, **kwargs)

                return call

            before = {name: getattr(here, name) for name in collectives}
            for name, real in before.items():
                for module in (here, dist):
                    setattr(module, name, noted(real))
            t.strategy._checkpoint = form
            t.save_checkpoint(f"{folder}/{rank}-{form}")
            for name, real in before.items():
                for module in (here, dist):
                    setattr(module, name, real)
            counted[form] = total
        factors = t.strategy.explorer.local_state()["factors"].values()
        counted["heads"] = sum(rows.nbytes for own in factors for rows in own.values())

    strategy = LTEStrategy(2, PERIOD, rank=rank, target_modules="1")
    t = trainer(strategy, devices=2, max_steps=2, callbacks=[Recorder(save)])
    t.fit(Module(nn.Sequential(nn.Linear(10, 256), nn.Linear(256, 256), nn.Linear(256, 3)).double(), adamw), loader())
    return counted


def test_no_device_gathers_what_others_have_of_heads(tmp_path: Path) -> None:
    """What is told does not grow with the heads: those of rank 64 have 32 times the bytes of those of rank 2."""
    small, large = (run(count_bytes, 2, str(tmp_path), rank, group=False) for rank in (2, 64))
    for few, many in zip(small, large, strict=True):
        assert many["heads"] == 32 * few["heads"] > 500_000
        assert 0 < many["sharded"] < 100_000 and abs(many["sharded"] - few["sharded"]) < 0.1 * few["sharded"]
    # Gathering sends all of that: factors, anchors and two moments.
    assert large[1]["gathered"] - small[1]["gathered"] > large[1]["heads"] - small[1]["heads"]


# ---- one device, and all that there is to go on with


@pytest.mark.parametrize(
    ("heads", "choices"),
    [
        (4, {"execution": "batched"}),
        (4, {"execution": "sequential"}),
        (1, {}),
        (4, {"execution": "batched", "after_merge": "reset", "stagger": 2}),
        (4, {"execution": "batched", **ON_ITS_WAY, "stagger": 2}),
        (4, {"execution": "batched", "full_rank_steps": 7}),
        (4, {"execution": "batched", "replicas": "freeze"}),
        (4, {"execution": "batched", "freeze_a": True}),
        (4, {"execution": "batched", "weight_decay": "weights", "overlap": 3}),
    ],
)
def test_one_device_goes_on_bit_for_bit(tmp_path: Path, heads: int, choices: dict[str, Any]) -> None:
    def fit(epochs: int, resume: str | None = None) -> dict[str, Any]:
        seed_everything(7)
        if resume is not None:
            torch.manual_seed(1234)  # the streams are to come from the checkpoint
            random.seed(1234)
        strategy = LTEStrategy(heads, 3, rank=RANK, checkpoint="sharded", **choices)
        keep = ModelCheckpoint(tmp_path / str(epochs), filename="{epoch}", save_top_k=-1)
        t = trainer(strategy, max_epochs=epochs, callbacks=[keep], enable_checkpointing=True)
        module = Module(make_net(Noisy), adamw)
        t.fit(module, loader(16 * EPOCH, 16, shuffle=True), ckpt_path=resume)
        return {**sharded.load(keep.best_model_path), "after": clone(module.state_dict())}

    uninterrupted = fit(3)
    fit(1)
    resumed = fit(3, str(tmp_path / "1" / "epoch=0.ckpt"))
    assert list(uninterrupted["state_dict"]) == list(Module(make_net(Noisy)).state_dict())
    for key in ("state_dict", "after", "optimizer_states"):
        assert_equal(uninterrupted[key], resumed[key], key)
    assert_equal(read_all(uninterrupted["lte"]), read_all(resumed["lte"]))


def read_all(value: Any) -> Any:
    if isinstance(value, sharded.Rows):
        return value[:]
    if isinstance(value, dict | sharded.Lazy):
        return {key: read_all(inner) for key, inner in value.items()}
    return [read_all(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture
def fitted(tmp_path: Path) -> str:
    """The start of the names of a checkpoint in both forms."""
    stem = str(tmp_path / "five")
    t = trainer(LTEStrategy(4, 3, rank=RANK), max_steps=7)
    t.callbacks.append(Recorder(lambda t, _: save_both(t, stem) if t.global_step == 5 else None))  # type: ignore[attr-defined]
    t.fit(Module(), loader(160, 16))
    return stem


def test_it_has_what_the_file_has_and_plain_values_in_meta(fitted: str) -> None:
    one_file = torch.load(f"{fitted}.gathered", weights_only=True)
    directory = sharded.load(f"{fitted}.sharded", weights_only=True)
    assert one_file.keys() == directory.keys()
    for key in ("generators", "own"):
        one_file["lte"][key] = dict(enumerate(one_file["lte"][key]))
    for key in one_file:
        assert_equal(read_all(directory[key]), one_file[key], key)
    assert torch.load(f"{fitted}.sharded/meta.pt", weights_only=True)["lte"]["heads"] == 4
    assert "lte" not in sharded.load(f"{fitted}.sharded", heads=False)


@pytest.mark.parametrize("form", FORMS)
def test_heads_of_a_version_that_is_yet_to_come_are_refused(fitted: str, form: str) -> None:
    path = f"{fitted}.{form}"
    kept = f"{path}/meta.pt" if form == "sharded" else path
    checkpoint = torch.load(kept, weights_only=True)
    checkpoint["lte"] = {"version": 2, "all else": "of other names"}
    torch.save(checkpoint, kept)
    module = Module()
    with pytest.raises(ValueError, match=r"reads heads of version 1; .* has version 2\. Update lightning-lte\."):
        trainer(LTEStrategy(4, 3, rank=RANK), max_steps=8).fit(module, loader(160, 16), ckpt_path=path)
    assert all(type(m).__module__.startswith(("torch.nn", "tests")) for m in module.modules())


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_reads_weights_alone(fitted: str, verb: str) -> None:
    modules = [Module(), Module()]
    with reading() as read:
        for module, form in zip(modules, FORMS, strict=True):
            getattr(trainer("lte"), verb)(module, loader(), ckpt_path=f"{fitted}.{form}")
    assert_equal(dict(modules[0].state_dict()), dict(modules[1].state_dict()))
    assert read and all(name.startswith("model.") for name in read)


@pytest.mark.parametrize("form", FORMS)
def test_lightnings_command_makes_a_plain_file(fitted: str, tmp_path: Path, form: str) -> None:
    out = str(tmp_path / "plain.ckpt")
    command = [sys.executable, "-m", "lightning.pytorch.utilities.consolidate_checkpoint", f"{fitted}.sharded"]
    subprocess.run([*command, f"--output_file={out}"], check=True, capture_output=True)
    one_file = torch.load(f"{fitted}.gathered", weights_only=True)
    plain = torch.load(out, weights_only=True)
    assert_equal(plain["state_dict"], dict(one_file["state_dict"]))
    assert_equal(dict(Loadable.load_from_checkpoint(out, strict=True).state_dict()), dict(one_file["state_dict"]))
    ends = []
    for path in (out, f"{fitted}.gathered"):
        module = Module()
        strategy = LTEStrategy(4, 3, rank=RANK, checkpoint=form)  # type: ignore[arg-type]
        trainer(strategy, max_steps=9).fit(module, loader(160, 16), ckpt_path=path)
        ends.append(clone(module.state_dict()))
    assert_equal(*ends)
    assert not torch.equal(ends[0]["net.first.weight"], plain["state_dict"]["net.first.weight"])


def test_training_goes_on_from_one_saved_after_fit(tmp_path: Path) -> None:
    t = trainer(LTEStrategy(4, 3, rank=RANK), max_steps=7)
    t.fit(Module(), loader(160, 16))
    save_both(t, str(tmp_path / "after"))
    ends = []
    for form in FORMS:
        module = Module()
        again = trainer(LTEStrategy(4, 3, rank=RANK), max_steps=9)
        again.fit(module, loader(160, 16), ckpt_path=str(tmp_path / f"after.{form}"))
        assert again.global_step == 9
        ends.append(clone(module.state_dict()))
    assert_equal(*ends)


def save_untrained(path: str) -> None:
    t = trainer(LTEStrategy(2, checkpoint="sharded"), devices=2)
    t.validate(Module(), loader(), verbose=False)
    t.save_checkpoint(path)


def test_several_devices_save_a_module_that_was_not_trained(tmp_path: Path) -> None:
    run(save_untrained, 2, str(tmp_path / "untrained.ckpt"), group=False)
    found = sharded.load(str(tmp_path / "untrained.ckpt"))
    assert_equal(found["state_dict"], dict(Module().state_dict()))
    assert "lte" not in found


class Extra(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale: dict[str, Any] = {}

    def get_extra_state(self) -> dict[str, Any]:
        return {"history": [torch.ones(2), {3: "three"}], "empty": {}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.scale = state


def test_what_the_state_dict_has_besides_tensors_is_kept(tmp_path: Path) -> None:
    t = trainer(LTEStrategy(4, 3, rank=RANK, checkpoint="sharded"), max_steps=2)
    t.fit(Module(make_net(Extra)), loader())
    t.save_checkpoint(tmp_path / "extra.ckpt")
    module = Module(make_net(Extra))
    trainer("lte").validate(module, loader(), ckpt_path=str(tmp_path / "extra.ckpt"), verbose=False)
    assert_equal(module.net.scale, module.net.get_extra_state())  # type: ignore[operator]


def test_a_plain_loop_saves_and_goes_on_in_half_precision(tmp_path: Path) -> None:
    """In half precision W has a remainder, which is equal on all devices."""
    path, states = str(tmp_path / "half.ckpt"), []
    for resumes in (False, True):
        torch.manual_seed(int(resumes))
        net = make_net().to(torch.bfloat16)
        optimizer = adamw(net.parameters())
        explorer = Explorer(net, optimizer, LTEConfig(4, 2, rank=RANK, execution="batched", outer_optimizer=OUTER))
        if resumes:
            checkpoint = sharded.load(path)
            net.load_state_dict(checkpoint["state_dict"])
            explorer.load_state_dict(checkpoint["lte"])
        else:
            for batch in loader(48):
                train_step(explorer, net, optimizer, (batch[0].to(torch.bfloat16), batch[1]))
            own = explorer.local_state()
            sharded.save({"state_dict": net.state_dict()}, own, explorer.weight_names, path, Transport())
        states.append(explorer.local_state())
    assert states[0]["remainders"] and any(r.any() for r in states[0]["remainders"].values())
    for key in states[0].keys() - {"generators"}:
        assert_equal(states[0][key], states[1][key], key)


# ---- ModelCheckpoint, and what lies in the way


def test_the_best_and_the_last_are_kept_and_others_removed(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{step}", monitor="step", mode="max", save_top_k=2, save_last=True)
    keep._every_n_train_steps, keep._every_n_epochs = 2, 0
    strategy = LTEStrategy(4, 3, rank=RANK, checkpoint="sharded")
    t = trainer(strategy, max_steps=8, callbacks=[keep], enable_checkpointing=True)
    t.fit(Module(), loader(160, 16))
    assert {p.name for p in tmp_path.iterdir()} == {"step=6.ckpt", "step=8.ckpt", "last.ckpt"}
    assert all(files.is_directory_of_shards(str(p)) for p in tmp_path.iterdir())
    assert sharded.load(str(tmp_path / "last.ckpt"))["global_step"] == 8
    more = trainer(LTEStrategy(4, 3, rank=RANK), max_steps=10, callbacks=[keep], enable_checkpointing=True)
    more.fit(Module(), loader(160, 16), ckpt_path="last")
    assert more.global_step == 10 and (tmp_path / "last.ckpt").is_file()
    t.validate(Module(), loader(), ckpt_path=str(tmp_path / "step=8.ckpt"), verbose=False)


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("before", [None, "gathered", "sharded", "link"])
@pytest.mark.parametrize("now", FORMS)
def test_a_checkpoint_takes_the_place_of_one_of_any_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, now: str, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    path = str(tmp_path / "last.ckpt")
    if before == "link":
        write(str(tmp_path / "linked.ckpt"), 1.0)
        os.symlink("linked.ckpt", path)
    elif before is not None:
        write(path, 1.0, before)
    write(path, 2.0, now)
    assert value_of(path) == 2.0 and not os.path.islink(path)
    assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt"} | ({"linked.ckpt"} if before == "link" else set())
    assert before != "link" or value_of(str(tmp_path / "linked.ckpt")) == 1.0


def write(path: str, value: float, form: str = "sharded") -> None:
    checkpoint = {"state_dict": {name: torch.full((20_000,), value) for name in "abcdefgh"}, "global_step": int(value)}
    if form == "gathered":
        files.save(checkpoint, path)
    else:
        sharded.save(checkpoint, None, (), path, Transport())


def value_of(path: str) -> float:
    """What was written, which must be all of one."""
    found = torch.load(path, weights_only=True) if os.path.isfile(path) else sharded.load(path, weights_only=True)
    values = {float(v) for tensor in found["state_dict"].values() for v in tensor.unique()}
    assert len(found["state_dict"]) == 8 and values == {float(found["global_step"])}
    return values.pop()


@pytest.mark.parametrize("form", FORMS)
def test_a_directory_that_is_no_checkpoint_is_left_alone(tmp_path: Path, form: str) -> None:
    precious = tmp_path / "runs" / "notes.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(IsADirectoryError, match="Choose another name"):
        write(str(tmp_path / "runs"), 1.0, form)
    assert precious.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["runs"]
    with pytest.raises(ValueError, match=r"meta\.pt and \.metadata"):
        trainer("lte").validate(Module(), loader(), ckpt_path=str(tmp_path / "runs"))


def test_other_ways_to_write_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="received AsyncCheckpointIO"):
        trainer(LTEStrategy(4, checkpoint="sharded"), plugins=[AsyncCheckpointIO()])
    with pytest.raises(ValueError, match="received AsyncCheckpointIO"):
        LTEStrategy(4, checkpoint="sharded", checkpoint_io=AsyncCheckpointIO())
    with pytest.raises(ValueError, match="received 'both'"):
        LTEStrategy(4, checkpoint="both")  # type: ignore[arg-type]
    t = trainer(LTEStrategy(4, rank=RANK, checkpoint="sharded"), max_steps=1)
    t.fit(Module(), loader())
    for path, options in (("memory://somewhere/last.ckpt", None), (tmp_path / "last.ckpt", {"key": 1})):
        with pytest.raises(ValueError, match="a disk that all of them see"):
            t.save_checkpoint(path, storage_options=options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_directory_that_was_not_copied_as_a_whole_is_refused_at_once(fitted: str, damage: str) -> None:
    [shard] = Path(f"{fitted}.sharded").glob("*.distcp")
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size - 100)
    module = Module()
    before = clone(module.state_dict())
    with pytest.raises(ValueError, match="Copy the directory as a whole"):
        trainer(LTEStrategy(4, 3, rank=RANK), max_steps=9).fit(module, loader(), ckpt_path=f"{fitted}.sharded")
    assert_equal(dict(module.state_dict()), before)


def test_the_last_is_found_where_names_are_not_swapped_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=2)
    strategy = LTEStrategy(4, 3, rank=RANK, checkpoint="sharded")
    trainer(strategy, max_steps=2, callbacks=[keep], enable_checkpointing=True).fit(Module(), loader(160, 16))
    replace = os.replace

    def interrupted(old: str, new: str) -> None:
        if new.endswith("last.ckpt"):
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", interrupted)
        write(str(tmp_path / "last.ckpt"), 2.0)
    assert {p.name for p in tmp_path.iterdir()} == {"last.former.ckpt", "last.ckpt.partial"}
    again = trainer(LTEStrategy(4, 3, rank=RANK), max_steps=3, callbacks=[keep], enable_checkpointing=True)
    with reading() as read:
        again.fit(Module(), loader(160, 16), ckpt_path="last")
    assert read and again.global_step == 3


# ---- processes that are killed, and disks that fail


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(moment: str) -> None:
    """Kill this process at a moment of the next checkpoint."""
    if moment == "tensors":
        save = torch.save

        def half(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            save(value, file, *args, **kwargs)
            file.flush()
            die()

        torch.save = half  # type: ignore[assignment]
    elif moment == "index":
        sharded.FileSystemWriter.finish = die  # type: ignore[method-assign, assignment]
    elif moment == "meta":
        files.save = die
    elif moment == "before its name":
        files.place = die
    else:
        place = files.place

        def and_die(path: str) -> None:
            files.delete = die
            place(path)

        files.place = and_die


def save_and_die(path: str, moment: str) -> None:
    write(path, 1.0)
    kill_at(moment)
    write(path, 2.0)


@pytest.mark.parametrize("moment", ["tensors", "index", "meta", "before its name", "before the former is removed"])
def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_checkpoint(tmp_path: Path, moment: str) -> None:
    path = str(tmp_path / "last.ckpt")
    with pytest.raises(RuntimeError, match="died without a word"):
        run(save_and_die, 1, path, moment, group=False)
    assert value_of(path) == (2.0 if moment == "before the former is removed" else 1.0)
    # What it left has a name that no search for checkpoints finds, and the next one writes over it.
    assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt", "last.ckpt.partial"}
    write(path, 3.0)
    assert value_of(path) == 3.0 and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def save_for_ever(path: str) -> None:
    number = 0
    while True:
        number += 1
        write(path, float(number))


def test_a_checkpoint_is_whole_whenever_its_process_is_killed(tmp_path: Path) -> None:
    chance, path, seen = random.Random(0), str(tmp_path / "last.ckpt"), set()
    for _ in range(8):
        if os.path.exists(path):
            files.remove(path)
        process = _context.Process(target=save_for_ever, args=(path,), daemon=True)
        process.start()
        while not os.path.exists(path):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.join()
        seen.add(value_of(path))
    assert len(seen) > 1  # at different times


def remove_and_die(path: str) -> None:
    write(path, 1.0)
    files.shutil.rmtree = die  # type: ignore[assignment]
    files.remove(path)


def test_a_checkpoint_that_is_half_removed_is_none(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="died without a word"):
        run(remove_and_die, 1, str(tmp_path / "last.ckpt"), group=False)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt.partial"]


def lose_one(path: str, what: str) -> str:
    """Two devices save twice; the second time one of them is killed, or its disk is full."""

    def save(t: Any, _: Any) -> None:
        if t.global_step == 4 and t.global_rank == 1:
            if what == "killed":
                kill_at("tensors")
            else:
                sharded.FileSystemWriter.write_data = full  # type: ignore[method-assign, assignment]
        if t.global_step in (2, 4):
            t.save_checkpoint(path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    strategy = LTEStrategy(2, 3, rank=RANK, checkpoint="sharded")
    t = trainer(strategy, devices=2, max_steps=6, callbacks=[Recorder(save)])
    with pytest.raises(RuntimeError) as error:
        t.fit(Module(), loader(160, 16))
    return str(error.value)


def test_a_device_that_is_killed_while_all_write_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = str(tmp_path / "last.ckpt")
    with pytest.raises(RuntimeError, match=r"rank 1 died without a word|rank 0 raised"):
        run(lose_one, 2, path, "killed", group=False)
    assert sharded.load(path)["global_step"] == 2
    t = trainer(LTEStrategy(2, 3, rank=RANK), max_steps=3)
    t.fit(Module(), loader(160, 16), ckpt_path=path)
    assert t.global_step == 3


def test_a_disk_that_is_full_is_told_on_all_devices(tmp_path: Path) -> None:
    path = str(tmp_path / "last.ckpt")
    for told in run(lose_one, 2, path, "full", group=False):
        assert "could not be written" in told and "No space left" in told
    assert sharded.load(path)["global_step"] == 2
