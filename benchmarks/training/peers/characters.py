"""A language model over characters in one file of PyTorch: nanoGPT's CPU recipe with a Llama-shaped decoder.

    python benchmarks/training/peers/characters.py --text input.txt --out out.json

4 layers, 4 heads, 128 wide, 64 characters, batches of 12, 2,000 steps, AdamW 1e-3 to 1e-4 by a cosine after 100 steps
of warm-up, betas 0.9 and 0.99, weight decay 0.1, gradients clipped to 1, float32, one process. RMSNorm, rotary
embedding and SwiGLU as in the family `decoder`, with the same number of weights. The last tenth of the text validates.
Imports torch alone; writes the wall times and the mean loss over all of the validation text.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

LAYERS, HEADS, WIDTH, LENGTH, BATCH = 4, 4, 128, 64, 12
MLP_WIDTH = -(-8 * WIDTH // (3 * 64)) * 64
WARMUP, LR, MIN_LR = 100, 1e-3, 1e-4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, MLP_WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(MLP_WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.norm_1(x)
        query, key, value = (
            layer(normed).view(len(x), -1, HEADS, WIDTH // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(
            turned(query, cos, sin), turned(key, cos, sin), value, is_causal=True
        )
        x = x + self.output(mixed.transpose(1, 2).reshape(x.shape))
        normed = self.norm_2(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class Decoder(nn.Module):
    def __init__(self, num_ids: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_ids, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, num_ids, bias=False)
        half = WIDTH // HEADS // 2
        angles = torch.outer(torch.arange(LENGTH), 10_000.0 ** (-torch.arange(half) / half)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                is_last = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * LAYERS) if is_last else 0.02)

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embedding(token_ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    course = (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))) / 2
    return MIN_LR + (LR - MIN_LR) * course


@torch.no_grad()
def validate(model: Decoder, token_ids: Tensor) -> float:
    rows = (len(token_ids) - 1) // LENGTH
    inputs, targets = token_ids[: rows * LENGTH].view(rows, LENGTH), token_ids[1 : rows * LENGTH + 1].view(rows, LENGTH)
    total = 0.0
    for start in range(0, rows, 256):
        logits = model(inputs[start : start + 256])
        total += float(functional.cross_entropy(logits.flatten(0, 1), targets[start : start + 256].flatten(), reduction="sum"))  # fmt: skip
    return total / (rows * LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    text = options.text.read_text()
    alphabet = {character: token_id for token_id, character in enumerate(sorted(set(text)))}
    token_ids = torch.tensor([alphabet[character] for character in text])
    train, held_out = token_ids[: int(0.9 * len(token_ids))], token_ids[int(0.9 * len(token_ids)) :]
    model = Decoder(len(alphabet))
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    rest = [weight for weight in model.parameters() if weight.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=LR, betas=(0.9, 0.99)
    )
    done: dict[int, float] = {}
    place = torch.arange(LENGTH + 1)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, options.steps)
        rows = train[torch.randint(len(train) - LENGTH, (BATCH, 1)) + place]
        loss = functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step == 0 or (step + 1) % options.log_every == 0:
            loss.item()
            done[step + 1] = time.time()
    trained = time.time()
    found = validate(model, held_out)
    num_weights = sum(weight.numel() for weight in model.parameters())
    options.out.write_text(
        json.dumps({"done": done, "trained": trained, "validation_loss": found, "weights": num_weights})
    )


if __name__ == "__main__":
    main()
