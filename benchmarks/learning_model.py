"""The small language model and the real text that `benchmarks/learning.py` trains on.

A byte-level decoder (RMSNorm, rotary attention, SwiGLU), 4.9M parameters. Its linear layers update
themselves during their own backward pass, as hogwild's trainer does, so what is measured here is the update
as it is used.
"""

from __future__ import annotations

import hashlib
import math
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

PACKAGES = {"perl-doc": "usr/share/perl/*/pod/*.pod", "fortunes": "usr/share/games/fortunes/*"}
"""Debian packages of English prose: 8 MB of manuals to learn from, 2 MB of quotations to move on to."""

TABLES = {"perluniprops.pod", "perltoc.pod"}
"""Generated lists in perl-doc, not prose."""

BLOCK = 1 << 14
"""Every twentieth block of this many bytes is for validation."""


@dataclass(frozen=True)
class Shape:
    width: int = 256
    ffn: int = 688
    layers: int = 6
    heads: int = 4
    context: int = 128


UpdateHook = Callable[["Linear", Tensor, Tensor, Any], None]


class Linear(nn.Module):
    """y = x W^T. With a `hook`, the backward pass hands (layer, X, D, tag) to it and computes no weight
    gradient."""

    def __init__(self, n: int, m: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, n) * gain / math.sqrt(n))
        self.name = ""
        self.hook: UpdateHook | None = None
        self.tag: Callable[[], Any] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        if self.hook is None or not torch.is_grad_enabled():
            return F.linear(x, self.weight.to(x.dtype))
        return _UpdatingLinear.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]


class _UpdatingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear) -> Tensor:
        ctx.x, ctx.layer, ctx.tag = x.detach(), layer, layer.tag()
        return F.linear(x, layer.weight.detach().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        layer, x = ctx.layer, ctx.x
        below = d @ layer.weight.detach().to(
            d.dtype
        )  # before the update: with the weight that the forward pass read
        layer.hook(layer, x.reshape(-1, x.shape[-1]), d.reshape(-1, d.shape[-1]), ctx.tag)
        return below, None


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), 1e-6)


class Block(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        deep = 1 / math.sqrt(2 * s.layers)
        self.heads = s.heads
        self.norm1, self.norm2 = RMSNorm(s.width), RMSNorm(s.width)
        self.q, self.k, self.v = (Linear(s.width, s.width) for _ in range(3))
        self.o = Linear(s.width, s.width, deep)
        self.gate, self.up = Linear(s.width, s.ffn), Linear(s.width, s.ffn)
        self.down = Linear(s.ffn, s.width, deep)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x (B, L, width)
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(-2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Model(nn.Module):
    def __init__(self, shape: Shape, activations: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.shape, self.activations = shape, activations
        self.embed = nn.Embedding(256, shape.width)
        nn.init.normal_(self.embed.weight, std=1.0)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width)
        self.head = Linear(shape.width, 256, 0.1)
        half = shape.width // shape.heads // 2
        angle = torch.arange(shape.context)[:, None] * 10000 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.name = name

    def linears(self) -> list[Linear]:
        return [m for m in self.modules() if isinstance(m, Linear)]

    def rest(self) -> list[tuple[str, nn.Parameter]]:
        """Everything that is not a linear weight: embedding and norms."""
        own = {id(m.weight) for m in self.linears()}
        return [(name, p) for name, p in self.named_parameters() if id(p) not in own]

    def forward(self, tokens: Tensor) -> Tensor:  # (B, L + 1) -> mean loss in nats per byte
        x = self.embed(tokens[:, :-1]).to(self.activations)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@dataclass(frozen=True)
class Text:
    train: Tensor  # uint8
    valid: Tensor  # (count, context + 1) int64, from a part of the text that is never trained on
    digest: str

    def batch(self, size: int, context: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(self.train) - context - 1, (size,), generator=generator)
        return torch.stack([self.train[s : s + context + 1] for s in starts.tolist()]).long()


def load_text(package: str, context: int, valid_count: int) -> Text:
    """The prose of one Debian package, fetched with `apt-get download` (no root, nothing is installed)."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
        (archive,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), folder], check=True)
        found = sorted(f for f in Path(folder).glob(PACKAGES[package]) if f.is_file() and not f.is_symlink())
        data = b"\n".join(
            f.read_bytes() for f in found if f.suffix not in (".dat", ".u8") and f.name not in TABLES
        )
    blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
    train = b"".join(block for i, block in enumerate(blocks) if i % 20 != 19)
    held = torch.frombuffer(bytearray(b"".join(blocks[19::20])), dtype=torch.uint8)
    stride = (len(held) - context - 1) // valid_count
    valid = torch.stack([held[i * stride : i * stride + context + 1] for i in range(valid_count)]).long()
    return Text(
        torch.frombuffer(bytearray(train), dtype=torch.uint8), valid, hashlib.sha256(data).hexdigest()[:12]
    )
