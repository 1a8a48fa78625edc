"""Real architectures as they are.

Run `pytest -m slow tests/test_models.py`; `python -m tests.test_models` prints the table of docs/models.md.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torchvision
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, softplus
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from lightning_lte import LTEStrategy
from lightning_lte.report import Report
from tests.modules import trainer

SAMPLES = 8
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Case:
    """A model with data and a loss.

    Attributes:
        make: the model.
        samples: `SAMPLES` of them.
        loss: of the model on a batch.
        collate: samples into a batch; None for torch's own way.
        double: whether it also runs in float64.
        module: what trains it.
    """

    make: Callable[[], nn.Module]
    samples: list[Any]
    loss: Loss
    collate: Callable[[list[Any]], Any] | None = None
    double: bool = True
    module: type[Lit] | None = None


class Repeated(torch.utils.data.Dataset[Any]):
    """The same samples in every batch."""

    def __init__(self, samples: list[Any], batches: int) -> None:
        self.samples, self.batches = samples, batches

    def __len__(self) -> int:
        return len(self.samples) * self.batches

    def __getitem__(self, index: int) -> Any:
        return self.samples[index % len(self.samples)]


class Lit(LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case, self.net = case, case.make()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.case.loss(self.net, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(high: int, *shape: int, seed: int = 1, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def images(size: int) -> list[Any]:
    return list(zip(random(SAMPLES, 3, size, size), torch.arange(SAMPLES), strict=True))


def classified(net: nn.Module, batch: Any) -> Tensor:
    output = net(batch[0])
    output = output.logits if hasattr(output, "logits") else output
    return cross_entropy(output[0] if isinstance(output, tuple) else output, batch[1])


def of_timm(name: str, size: int = 32, **choices: Any) -> Callable[[], Case]:
    return lambda: Case(lambda: timm.create_model(name, num_classes=10, **choices), images(size), classified)


CASES: dict[str, Callable[[], Case]] = {
    "vit_tiny_patch16_224": of_timm("vit_tiny_patch16_224", img_size=32, depth=4),
    "deit_tiny_distilled": of_timm("deit_tiny_distilled_patch16_224", img_size=32, depth=4),
    "swin_tiny": of_timm("swin_tiny_patch4_window7_224", 56, img_size=56, depths=(1, 2, 1, 1), drop_path_rate=0.2),
    "swinv2_tiny": of_timm("swinv2_tiny_window8_256", 64, img_size=64, window_size=4, depths=(1, 2, 1, 1)),
    "convnext_atto": of_timm("convnext_atto"),
    "resnet18": of_timm("resnet18"),
    "efficientnet_b0": of_timm("efficientnet_b0"),
    "mixer_s32": of_timm("mixer_s32_224", 64, img_size=64),
    "maxvit_rmlp_pico": of_timm("maxvit_rmlp_pico_rw_256", 64, img_size=64),
    "eva02_tiny": of_timm("eva02_tiny_patch14_224", 28, img_size=28),
    "coat_lite_tiny": of_timm("coat_lite_tiny", img_size=32),
    "regnety_002": of_timm("regnety_002"),
    "mobilenetv3_small": of_timm("mobilenetv3_small_100"),
    "levit_128s": of_timm("levit_128s", 64, img_size=64),
    "cait_xxs24": of_timm("cait_xxs24_224", img_size=32, depth=4),
    "xcit_nano": of_timm("xcit_nano_12_p16_224", img_size=32),
    "poolformer_s12": of_timm("poolformer_s12"),
    "edgenext_xx_small": of_timm("edgenext_xx_small", 64),
    "mobilevit_xxs": of_timm("mobilevit_xxs", 64),
    "twins_svt_small": of_timm("twins_svt_small", 64, img_size=64),
    "pvt_v2_b0": of_timm("pvt_v2_b0", 64),
    "visformer_tiny": of_timm("visformer_tiny", 64, img_size=64),
    "beit": of_timm("beit_base_patch16_224", img_size=32, depth=2, embed_dim=96, num_heads=3),
    "tnt_s": of_timm("tnt_s_patch16_224", img_size=32, depth=2),
    "gmlp_ti16": of_timm("gmlp_ti16_224", img_size=32),
    "resmlp_12": of_timm("resmlp_12_224", img_size=32),
    "hrnet_w18_small": of_timm("hrnet_w18_small", 64),
    "nf_regnet_b0": of_timm("nf_regnet_b0"),
    "focalnet_tiny": of_timm("focalnet_tiny_srf"),
    "hiera_tiny": of_timm("hiera_tiny_224", 64, img_size=64, stages=(1, 1, 2, 1)),
}


def case(function: Callable[[], Case]) -> Callable[[], Case]:
    CASES[function.__name__] = function
    return function


# ---- torchvision


@case
def torchvision_resnet18() -> Case:
    return Case(lambda: torchvision.models.resnet18(num_classes=10), images(32), classified)


@case
def torchvision_vit() -> Case:
    def make() -> nn.Module:
        return torchvision.models.VisionTransformer(32, 8, 3, 4, 64, 128, num_classes=10)

    return Case(make, images(32), classified)


@case
def torchvision_swin() -> Case:
    def make() -> nn.Module:
        return torchvision.models.SwinTransformer([4, 4], 48, [1, 1, 2, 1], [2, 4, 8, 16], [7, 7], num_classes=10)

    return Case(make, images(64), classified)


@case
def torchvision_googlenet() -> Case:
    def make() -> nn.Module:
        return torchvision.models.googlenet(num_classes=10, init_weights=False, aux_logits=False)

    return Case(make, images(64), classified)


@case
def torchvision_segmentation() -> Case:
    def make() -> nn.Module:
        return torchvision.models.segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=5
        )

    samples = list(zip(random(SAMPLES, 3, 64, 64), whole(5, SAMPLES, 64, 64), strict=True))
    return Case(make, samples, lambda net, batch: cross_entropy(net(batch[0])["out"], batch[1]))


@case
def torchvision_detection() -> Case:
    def make() -> nn.Module:
        return torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None, weights_backbone=None, num_classes=5, min_size=96, max_size=128
        )

    samples = []
    for i in range(SAMPLES):
        corner = random(2 + i % 2, 2, seed=i).sigmoid() * 40
        boxes = torch.cat([corner, corner + 10 + random(2 + i % 2, 2, seed=i + 50).sigmoid() * 30], 1)
        target = {"boxes": boxes, "labels": whole(5, len(boxes), low=1)}
        samples.append((random(3, 96 + 8 * (i % 3), 128, seed=i).sigmoid(), target))

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return torch.stack(list(net(list(batch[0]), list(batch[1])).values())).sum()

    return Case(make, samples, loss, lambda rows: tuple(map(list, zip(*rows, strict=True))), double=False)


# ---- transformers


def of_transformers(kind: str, config: str, samples: Callable[[], list[Any]], **choices: Any) -> Callable[[], Case]:
    def make_case() -> Case:
        library = pytest.importorskip("transformers")

        def collate(rows: list[Any]) -> Any:
            return library.BatchEncoding({key: torch.stack([row[key] for row in rows]) for key in rows[0]})

        def make() -> nn.Module:
            return getattr(library, kind)(getattr(library, config)(**choices))

        return Case(make, samples(), lambda net, batch: net(**batch).loss, collate)

    return make_case


def text(labels: str) -> list[Any]:
    rows = []
    for i in range(SAMPLES):
        ids, mask = whole(97, 12, seed=i, low=3), torch.ones(12, dtype=torch.long)
        row = {"input_ids": ids, "attention_mask": mask}
        row["labels"] = {"class": torch.tensor(i % 3), "same": ids, "other": whole(97, 7, seed=i + 50, low=3)}[labels]
        rows.append(row)
    return rows


_SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
CASES |= {
    "transformers_bert": of_transformers(
        "BertForSequenceClassification", "BertConfig", lambda: text("class"), max_position_embeddings=32, num_labels=3,
        **_SMALL,
    ),
    "transformers_gpt2": of_transformers(
        "GPT2LMHeadModel", "GPT2Config", lambda: text("same"), vocab_size=97, n_positions=32, n_embd=48, n_layer=2,
        n_head=4, bos_token_id=1, eos_token_id=2,
    ),
    "transformers_t5": of_transformers(
        "T5ForConditionalGeneration", "T5Config", lambda: text("other"), vocab_size=97, d_model=48, d_kv=12, d_ff=96,
        num_layers=2, num_heads=4, decoder_start_token_id=0,
    ),
    "transformers_llama": of_transformers(
        "LlamaForCausalLM", "LlamaConfig", lambda: text("same"), num_key_value_heads=2, max_position_embeddings=32,
        **_SMALL,
    ),
    "transformers_vit": of_transformers(
        "ViTForImageClassification", "ViTConfig",
        lambda: [{"pixel_values": random(3, 32, 32, seed=i), "labels": torch.tensor(i % 5)} for i in range(SAMPLES)],
        image_size=32, patch_size=8, num_labels=5, **{k: v for k, v in _SMALL.items() if k != "vocab_size"},
    ),
    "transformers_wav2vec2": of_transformers(
        "Wav2Vec2ForCTC", "Wav2Vec2Config",
        lambda: [{"input_values": random(2000, seed=i), "labels": whole(20, 4, seed=i, low=1)} for i in range(SAMPLES)],
        ctc_loss_reduction="mean", mask_time_prob=0.0, conv_dim=(32, 32, 32), conv_stride=(5, 4, 4),
        conv_kernel=(10, 4, 4), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        **{**_SMALL, "vocab_size": 20},
    ),
}  # fmt: skip


# ---- torch's own


class SequenceFirst(nn.Module):
    """nn.Transformer as it is by default, with time outermost."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(50, 48), nn.Linear(48, 50)
        self.transformer = nn.Transformer(48, 4, 2, 2, 96, dropout=0.1)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        inputs = self.embedding(source).transpose(0, 1), self.embedding(target).transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=inputs[0].dtype)
        return self.out(self.transformer(*inputs, tgt_mask=mask)).transpose(0, 1)


@case
def transformer_sequence_first() -> Case:
    def loss(net: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(net(batch[0], batch[1][:, :-1]).flatten(0, 1), batch[1][:, 1:].flatten())

    return Case(SequenceFirst, list(zip(whole(50, SAMPLES, 9), whole(50, SAMPLES, 7), strict=True)), loss)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(50, 32), nn.Linear(96, 7)
        self.lstm = nn.LSTM(32, 48, 2, batch_first=True, bidirectional=True, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.embedding(x))[0])


@case
def lstm_tagger() -> Case:
    samples = list(zip(whole(50, SAMPLES, 9), whole(7, SAMPLES, 9), strict=True))
    return Case(Tagger, samples, lambda net, batch: cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten()))


# ---- in manual optimization


class Gan(nn.Module):
    """The generator and the discriminator of DCGAN, small, for images of 16 x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(16, 64, 4, 1, 0, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.ConvTranspose2d(32, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.LeakyReLU(0.2),
            nn.Conv2d(64, 1, 4, 1, 0, bias=False), nn.Flatten(0),
        )  # fmt: skip

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise[..., None, None])


class GanLit(Lit):
    """As in PyTorch's tutorial: gradients are zeroed through the networks."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        d, g = self.optimizers()
        real, noise = batch
        judge = self.net.discriminator
        judge.zero_grad()
        fake = self.net(noise)
        self.manual_backward(softplus(-judge(real)).mean())
        self.manual_backward(softplus(judge(fake.detach())).mean())
        d.step()
        self.net.generator.zero_grad()
        self.manual_backward(softplus(-judge(fake)).mean())
        g.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.999))
            for net in (self.net.discriminator, self.net.generator)
        ]


@case
def gan_manual() -> Case:
    def distance(net: nn.Module, batch: Any) -> Tensor:
        return (net(batch[1]).mean(0) - batch[0].mean(0)).square().mean()

    real = 0.5 + 0.1 * random(SAMPLES, 3, 16, 16)
    return Case(Gan, list(zip(real, random(SAMPLES, 16, seed=2), strict=True)), distance, module=GanLit)


class Byol(nn.Module):
    """An encoder, its momentum teacher and a predictor."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Flatten(), nn.Linear(192, 96), nn.LayerNorm(96), nn.GELU(), nn.Linear(96, 48))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.predictor = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.predictor(self.student(x)), self.teacher(x).detach()


class ByolLit(Lit):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.case.loss(self.net, batch))
        opt.step()

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for teacher, student in zip(self.net.teacher.parameters(), self.net.student.parameters(), strict=True):
                teacher.lerp_(student, 0.05)


@case
def byol_manual() -> Case:
    def loss(net: nn.Module, batch: Any) -> Tensor:
        first, second = net(batch[0]), net(batch[1])
        return 2 - cosine_similarity(first[0], second[1]).mean() - cosine_similarity(second[0], first[1]).mean()

    views = random(SAMPLES, 3, 8, 8)
    samples = list(zip(views, views + 0.1 * random(SAMPLES, 3, 8, 8, seed=2), strict=True))
    return Case(Byol, samples, loss, module=ByolLit)


def lit(own: Case) -> Lit:
    return (own.module or Lit)(own)


# ---- what must hold


def fit(own: Case, steps: int, double: bool = False, **choices: Any) -> tuple[Lit, Report]:
    module, samples = lit(own), own.samples
    if double:
        _without_chance(module.double())
        samples = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, samples)
    strategy = LTEStrategy(**{"heads": 4, "merge_every": 3, "rank": 4, **choices})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = DataLoader(Repeated(samples, steps), SAMPLES, collate_fn=own.collate)
        trainer(strategy, max_steps=steps).fit(module, data)
    return module, strategy.report()


def _without_chance(module: nn.Module) -> None:
    for layer in module.modules():
        for holder in (layer, getattr(layer, "config", None)):
            for name in ("p", "drop_prob", "dropout", "layerdrop", "activation_dropout"):
                if isinstance(getattr(holder, name, None), float):
                    setattr(holder, name, 0.0)


def loss_of(own: Case, module: Lit) -> float:
    torch.manual_seed(0)
    batch = next(iter(DataLoader(Repeated(own.samples, 1), SAMPLES, collate_fn=own.collate)))
    with torch.no_grad():
        return float(own.loss(copy.deepcopy(module).train().net, batch))


@dataclass
class Row:
    factored: float
    execution: str
    why: str
    difference: float | None
    before: float
    after: float
    seconds: float


def examine(own: Case) -> Row:
    """Train a model and look at what must hold; AssertionError where it does not."""
    fresh, start = lit(own), time.perf_counter()
    module, report = fit(own, 20)
    seconds = time.perf_counter() - start
    kinds = [[(name, type(m).__qualname__) for name, m in each.named_modules()] for each in (fresh, module)]
    assert kinds[0] == kinds[1]
    assert list(module.state_dict()) == list(fresh.state_dict())
    assert not any("_lte" in m.__dict__ for m in module.modules())
    assert all(p.isfinite().all() for p in module.parameters())
    note = next(n for n in report.notes if "share this device" in n)
    execution = "batched" if "(batched)" in note else "sequential"
    difference = None
    if execution == "batched" and own.double:
        # Batched execution has the heads share such layers; sequential execution gives each head its own.
        shared = [e.name.rpartition(".")[0] for e in report.entries if e.reason == "its layer's input is not the batch"]
        choices = {"replicas": "freeze", "exclude_modules": shared}
        pair = [fit(own, 7, True, execution=e, **choices) for e in ("auto", "sequential")]
        assert any("(batched)" in note for note in pair[0][1].notes)
        values = [dict(m.named_parameters()) for m, _ in pair]
        start_values = dict(Lit(own).double().named_parameters())
        assert any((values[0][n] - start_values[n]).abs().max() > 1e-5 for n in start_values)
        difference = max(float((values[0][n] - values[1][n]).detach().abs().max()) for n in values[0])
        assert difference < 1e-9
    fit(own, 4, heads=1)
    sizes = {e.name: torch.Size(e.shape).numel() for e in report.entries}
    factored = sum(sizes[e.name] for e in report.entries if e.role == "factored") / sum(sizes.values())
    return Row(
        factored, execution, note.partition("): ")[2], difference, loss_of(own, fresh), loss_of(own, module), seconds
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CASES)
def test_an_architecture_that_was_never_written_for_heads_trains_through_them(name: str) -> None:
    row = examine(CASES[name]())
    # Batch norm over the two samples of a head is no measure of learning.
    assert row.after < row.before or "statistics over the batch" in row.why


def table() -> Iterator[str]:
    yield "| model | factored | execution | why | batched − sequential | loss before | after 20 steps | s |"
    yield "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: |"
    for name, make in CASES.items():
        try:
            row = examine(make())
        except pytest.skip.Exception:
            continue
        difference = "" if row.difference is None else f"{row.difference:.0e}"
        why = row.why.rstrip(".")
        losses = f"{row.before:.2f} | {row.after:.2f} | {row.seconds:.0f}"
        yield f"| {name} | {row.factored:.1%} | {row.execution} | {why} | {difference} | {losses} |"


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for line in table():
        print(line, flush=True)
