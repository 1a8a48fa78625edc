"""A language model: a decoder of four blocks of width 256, for 128 tokens of a vocabulary of 4096."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WORDS, WIDTH, BLOCKS, TOKENS = 4096, 256, 4, 128


class Decoder(nn.Module):
    """Tokens (batch, tokens) to scores (batch, tokens, words) of the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        block = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, BLOCKS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        past = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        scores: Tensor = self.out(self.blocks(self.words(tokens) + self.places, mask=past, is_causal=True))
        return scores


def model() -> nn.Module:
    """With random weights."""
    return Decoder()


def batch(samples: int) -> Tensor:
    """Random tokens, (samples, tokens + 1)."""
    return torch.randint(0, WORDS, (samples, TOKENS + 1))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean cross entropy of the next tokens."""
    scores = model(batch[:, :-1])
    return functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
