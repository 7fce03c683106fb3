"""The static description of a decoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import RequestError, unknown
from .segments import Layered, checked
from .segments import Run as Run  # beside the spec that has them
from .segments import Segments as Segments

KINDS = ("block", "local")
DTYPES = ("float32", "bfloat16")
CHOICES = {
    "dtype": DTYPES,
    "param_dtype": DTYPES,
    "remat": ("none", "block", "dots"),
    "norms": ("pre", "post", "both"),
    "qk_norm": ("none", "head", "width"),
    "activation": ("silu", "gelu_tanh"),
}
QKV = ("attn/q", "attn/k", "attn/v")
SITES = (*QKV, "attn/o", "mlp/gate", "mlp/up", "mlp/down")
MOST_LAYERS = 4096  # a weight file that lies about its depth is refused before a table of it is made
SIZES = ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "mlp", "context", "nll_chunk")


class RopeScaling(NamedTuple):
    """How rotary angles are stretched for a longer context; see `jaxcl.models.rope.rates`. kind: 'linear' (only factor
    counts) or 'llama3', where pairs that turn fewer than ``low`` times over ``original`` tokens are slowed by
    ``factor``, those that turn more than ``high`` times are not, and the ones between by a mixture."""

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderSpec(Layered):
    """A decoder of Llama's type with the options that its relatives added. Hashable, so it may be a static argument
    of jit.

    vocab, width, layers, heads, kv_heads, head_dim, mlp: sizes. tied: the head is the embedding.
    context: longest sequence it was made for. dtype: what the blocks compute in; norms, softmax and nll are
    float32 always. adapter_dropout: rate on the input of LoRA adapters while training. remat: ``'block'``
    recomputes each block in the backward pass, ``'dots'`` all of it but products with weights. nll_chunk: targets
    whose logits exist at the same time.
    segments: ((kinds of layer, repeats), ...); a segment with more than one repeat is scanned, its layers
    stacked under one key; empty means every layer a ``'block'`` on its own.

    norms: before attention and MLP (Llama), after them (OLMo 2) or both (Gemma 3). qk_norm: of queries and keys, over
    each head (Qwen 3, Gemma 3) or over the projection's whole width (OLMo 2). biases: dense sites that have one.
    activation: of the MLP's gate. embed_scale: times the embedding's rows, rounded to dtype. attn_scale: times the
    attention scores; None is head_dim ** -0.5. window: tokens that a ``'local'`` layer sees, itself included.
    local_theta: local layers' own rope_theta, then without rope_scaling; None is that of the others.

    Raises RequestError on values that do not fit.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    rope_scaling: RopeScaling | None = None
    tied: bool = True
    norms: str = "pre"
    qk_norm: str = "none"
    biases: tuple[str, ...] = ()
    activation: str = "silu"
    embed_scale: float = 1.0
    attn_scale: float | None = None
    window: int | None = None
    local_theta: float | None = None
    context: int = 2048
    dtype: str = "float32"
    param_dtype: str = "float32"
    adapter_dropout: float = 0.0
    remat: str = "none"
    nll_chunk: int = 512
    init_std: float = 0.02
    segments: Segments = ()

    def __post_init__(self) -> None:
        for name in SIZES:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise _refused(self, name, "a whole number above 0")
        if self.layers > MOST_LAYERS:
            raise _refused(self, "layers", f"up to {MOST_LAYERS}")
        if self.heads % self.kv_heads:
            raise _refused(self, "kv_heads", f"a divisor of heads, {self.heads}")
        if self.head_dim % 2:
            raise _refused(self, "head_dim", "an even number (rotary pairs)")
        if not 0.0 <= self.adapter_dropout < 1.0:
            raise _refused(self, "adapter_dropout", "0 up to below 1")
        for name in ("rope_theta", "embed_scale", "attn_scale", "local_theta"):
            if getattr(self, name) is not None and not 0.0 < getattr(self, name) < math.inf:
                raise _refused(self, name, "a number above 0")
        if not 0.0 <= self.norm_eps < math.inf:
            raise _refused(self, "norm_eps", "a number from 0 on")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known, where="decoder")
        for site in self.biases:
            if site not in SITES:
                raise unknown("dense site", str(site), SITES, where="decoder biases")
        object.__setattr__(self, "biases", tuple(s for s in SITES if s in self.biases))  # what JSON made a list, too
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", _scaling(self.rope_scaling))
        object.__setattr__(self, "segments", checked(self.segments, self.layers, KINDS, "decoder"))
        self._check_window()

    @property
    def kv_width(self) -> int:
        """Units of all keys of a token."""
        return self.kv_heads * self.head_dim

    def _check_window(self) -> None:
        """A window without local layers, or the reverse, is a slip: it would be another function without a word."""
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise _refused(self, "window", "None or a whole number above 0")
        if (self.window is not None) != ("local" in self.kinds):
            raise _refused(self, "window", "a whole number where segments have 'local' layers, else None")
        if self.window is None and self.local_theta is not None:
            raise _refused(self, "local_theta", "None without a window")


def _refused(spec: DecoderSpec, name: str, accepted: str) -> RequestError:
    return RequestError(f"decoder: {name} is {getattr(spec, name)!r}; accepted: {accepted}")


def _scaling(value: Sequence) -> RopeScaling:
    made = RopeScaling(*value)
    if made.kind not in ("linear", "llama3"):
        raise unknown("rotary scaling", str(made.kind), ("linear", "llama3"), where="decoder rope_scaling")
    fits = made.factor > 0 and 0 < made.low < made.high and made.original > 0
    if not fits or not all(map(math.isfinite, made[1:])):
        accepted = "factor above 0, 0 < low < high, original above 0"
        raise RequestError(f"decoder: rope_scaling is {tuple(made)!r}; accepted: {accepted}")
    return made


def tiny(vocab: int = 259, layers: int = 4, width: int = 32, **overrides) -> DecoderSpec:
    """A byte model that trains in seconds: 256 bytes, bos, eos, pad. At this width 0.02 is too small an init:
    after 300 steps the loss is 2.00 instead of 1.66 nats a byte (best of three learning rates each)."""
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": max(2, width // 4), "mlp": 3 * width, "context": 1024}
    values = {**sizes, "init_std": 0.1, **overrides}
    return DecoderSpec(vocab=vocab, width=width, layers=layers, **values)
