"""Modules that train, but that cannot be served, each for one reason; and some that only look like it."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Base(nn.Module):
    """Two layers, between which each module has its trouble."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(input_shape[0], 8), nn.Linear(8, num_outputs)


class Fine(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class Experts(Base):
    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__(input_shape, num_outputs)
        self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        chosen, result = self.gate(x).argmax(1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            if rows.numel():
                result[rows] = expert(x[rows])
        return self.last(result)


class EarlyExit(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.abs().mean() > 0.5:
            x = x.relu()
        return self.last(x)


class WithNumpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.from_numpy(self.first(x).detach().numpy() * 2))


class TwoRows(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).view(2, -1).view(-1, 8))


class Bessel(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.special.i1(self.first(x)))


class Packed(nn.Module):
    def __init__(self, vocab_size: int, num_outputs: int) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(vocab_size, 8), nn.LSTM(8, 8, batch_first=True)
        self.last = nn.Linear(8, num_outputs)

    def forward(self, ids: Tensor) -> Tensor:
        lengths = (ids != 0).sum(1).clamp(min=1).cpu()
        rows = self.embedding(ids)
        packed = nn.utils.rnn.pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False)
        _, (hidden, _) = self.lstm(packed)
        return self.last(hidden[-1])


class BatchMean(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x - x.mean(0))


class NoRunningStatistics(Base):
    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__(input_shape, num_outputs)
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


class AttendsToRows(Base):
    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__(input_shape, num_outputs)
        self.attention = nn.MultiheadAttention(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.attention(x, x, x)[0])


class AlwaysDropout(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.dropout(self.first(x)))


class Counting(Base):
    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__(input_shape, num_outputs)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.first(x) * self.calls)


class Codes(Base):
    """Looks up the last column, an ordinal code, and has no row for unknown categories."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, extra: int = 0) -> None:
        super().__init__(input_shape, num_outputs)
        self.extra, self.codes = extra, nn.Embedding(3 + extra, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + self.codes(x[:, -1].long() + self.extra))


class Tokens(nn.Module):
    """Logits per token."""

    def __init__(self, vocab_size: int, num_outputs: int) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(vocab_size, 8), nn.Linear(8, num_outputs)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.embedding(ids))
