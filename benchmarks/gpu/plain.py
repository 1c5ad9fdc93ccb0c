"""The same training in plain PyTorch, as a good script does it: the peer of the step benchmark. Imports nothing of ours."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional


def rotations(head_width: int, length: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, head_width] of rotary position embedding (Su et al. 2021), halves side by side."""
    frequencies = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        cos, sin = rotations(width // heads, length)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """From [N, T, width] to [N, T, width]."""
        n, length, width = x.shape
        query, key, value = (
            layer(x).view(n, length, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(self._rotate(query), self._rotate(key), value, is_causal=True)
        out: Tensor = self.output(mixed.transpose(1, 2).reshape(n, length, width))
        return out

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[-2]].to(x.dtype), self.sin[: x.shape[-2]].to(x.dtype)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """From [N, T, width] to [N, T, width]."""
        out: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """A layer of Llama."""

    def __init__(self, width: int, heads: int, inner: int, length: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.attention, self.mlp = Attention(width, heads, length), FeedForward(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        """From [N, T, width] to [N, T, width]."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


def build(layers: int, heads: int, width: int, inner: int, length: int, vocab_size: int) -> nn.Sequential:
    """The model: token ids [N, T] to logits [N, T, vocabulary]."""
    parts: list[tuple[str, nn.Module]] = [("embedding", nn.Embedding(vocab_size, width))]
    parts += [(f"block_{number}", Block(width, heads, inner, length)) for number in range(layers)]
    parts += [("norm", nn.RMSNorm(width, eps=1e-6)), ("head", nn.Linear(width, vocab_size, bias=False))]
    return nn.Sequential(OrderedDict(parts))


class PlainTraining:
    """A training loop without any framework: autocast, fused AdamW, clipping.

    Args:
        model: on its device.
        ids: token ids [N, T], pinned if the device is a GPU.
        targets: the following ones [N, T].
        rows: rows of a step.
        precision: `bf16` or `fp32`.
    """

    def __init__(self, model: nn.Module, ids: Tensor, targets: Tensor, rows: int, precision: str) -> None:
        self.model, self._ids, self._targets, self._rows = model, ids, targets, rows
        self._is_bf16 = precision == "bf16"
        self._device = next(model.parameters()).device
        decayed = [weight for weight in model.parameters() if weight.dim() > 1]
        others = [weight for weight in model.parameters() if weight.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=3e-4, fused=True)
        self._done = 0

    def advance(self, steps: int) -> None:
        """Trains on."""
        for _ in range(steps):
            first = self._done * self._rows % len(self._ids)
            ids = self._ids[first : first + self._rows].to(self._device, non_blocking=True)
            targets = self._targets[first : first + self._rows].to(self._device, non_blocking=True)
            self._optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_bf16):
                logits = self.model(ids)
            loss = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()
            self._done += 1
