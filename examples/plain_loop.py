"""The core in a plain PyTorch loop, without Lightning: `python -m examples.plain_loop`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_lte import Explorer, LTEConfig
from lightning_lte.execution import run


def main(args: Sequence[str] | None = None) -> float:
    """Train a ViT on scikit-learn's digits through 8 heads and return its accuracy on data it has not seen."""
    parser = argparse.ArgumentParser("python -m examples.plain_loop", description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)

    torch.manual_seed(options.seed)
    digits = load_digits()
    images = (torch.from_numpy(digits.images).float().unsqueeze(1) - 4.9) / 6.0
    train, test = random_split(TensorDataset(images, torch.from_numpy(digits.target).long()), [1437, 360])
    loader = DataLoader(train, batch_size=128, shuffle=True)

    model = VisionTransformer(img_size=8, in_chans=1, num_classes=10, patch_size=2, embed_dim=64, depth=4, num_heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=options.epochs * len(loader), pct_start=0.1, cycle_momentum=False
    )
    explorer = Explorer(model, optimizer, LTEConfig(heads=8, merge_every=10, seed=options.seed))
    print(explorer.report.summary())

    def step(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = batch
        return functional.cross_entropy(model(x), y)

    for epoch in range(options.epochs):
        for batch in loader:
            # Slice h of the batch goes through head h: in one forward, if the first batch shows that this is right.
            loss = run(explorer, step, batch)
            with explorer.backward():
                loss.backward()
            explorer.after_backward()  # checks that gradients reached the heads, and no base weight
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            record = explorer.step()  # merges when it is time
            if record is not None:
                print(f"epoch {epoch}, step {record.step}: loss {loss:.3f}, delta of norm {record.delta_norm:.3f}")
    explorer.finish()  # the last merge; from here on the model is an ordinary one

    model.eval()
    x, y = next(iter(DataLoader(test, batch_size=len(test))))
    with torch.no_grad():
        accuracy = (model(x).argmax(dim=-1) == y).float().mean().item()
    print(f"accuracy on the {len(test)} test images: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
