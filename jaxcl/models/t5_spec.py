"""The static description of a T5 encoder-decoder, and the table of its parameters.

Raffel et al. 2020 (arXiv 1910.10683, section 2.1); v1.1 as in the T5 code: gated GELU (Shazeer 2020), own head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..errors import RequestError, nearest, unknown
from .bottleneck import PARALLEL, SCALE, SEQUENTIAL
from .layout import Axes, Leaf, axes_by, plain
from .prefix import MAP, NAMES, NETWORK
from .segments import Layered, Segments, checked
from .spec import CHOICES, MOST_LAYERS

KINDS = ("block",)
SIZES = ("vocab", "width", "layers", "heads", "head_dim", "mlp", "nll_chunk")
SIDES = ("encoder", "decoder")
OURS = ("encoder/", "decoder/", "prefix/")
"""Where keys belong to a model: of these it has to know every one that stands at no dense site."""


@dataclasses.dataclass(frozen=True)
class T5Spec(Layered):
    """A T5. Hashable, so it may be a static argument of jit.

    vocab, width, heads, head_dim, mlp: sizes. layers: of the encoder, and as many of the decoder. gated: the
    feed-forward layers have gelu(gate) * up (v1.1) or relu(up) (v1.0). tied: the head is the embedding (v1.0). scaled:
    what the head reads is divided by sqrt(width); None is as ``tied``. buckets, distance: of relative positions, see
    `jaxcl.models.t5_positions`. start: id that the decoder begins with. end: id that is put behind every source, None
    for nothing.
    dropout: the model's own in training, on embeddings, attention weights, hidden units and what each part adds, and
    behind the last norms, as in the T5 code.
    dtype, param_dtype, adapter_dropout, remat, nll_chunk: as in `jaxcl.models.spec.DecoderSpec`. init_scale: times the
    deviations of the T5 code's initial weights. segments: as there, the same for both stacks; the only kind is 'block'.

    Raises RequestError on values that do not fit.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    head_dim: int
    mlp: int
    gated: bool = False
    tied: bool = True
    scaled: bool | None = None
    buckets: int = 32
    distance: int = 128
    norm_eps: float = 1e-6
    start: int = 0
    end: int | None = 1
    dtype: str = "float32"
    param_dtype: str = "float32"
    dropout: float = 0.0
    adapter_dropout: float = 0.0
    remat: str = "none"
    nll_chunk: int = 512
    init_scale: float = 1.0
    segments: Segments = ()

    def __post_init__(self) -> None:
        for name in SIZES:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise self._refused(name, "a whole number above 0")
        if self.layers > MOST_LAYERS:
            raise self._refused("layers", f"up to {MOST_LAYERS}")
        if self.buckets < 4 or self.buckets % 4:
            raise self._refused("buckets", "a multiple of 4")
        if self.distance <= self.buckets // 2:
            raise self._refused("distance", f"above half of the buckets, {self.buckets // 2}")
        for name in ("start", "end"):
            value = getattr(self, name)
            if (value is not None or name == "start") and value not in range(self.vocab):
                raise self._refused(name, f"0 to {self.vocab - 1}" + (" or None" if name == "end" else ""))
        for name in ("dropout", "adapter_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise self._refused(name, "0 up to below 1")
        if not 0.0 <= self.norm_eps < math.inf:
            raise self._refused("norm_eps", "a number from 0 on")
        for name in ("dtype", "param_dtype", "remat"):
            if getattr(self, name) not in CHOICES[name]:
                raise unknown(name, str(getattr(self, name)), CHOICES[name], where="t5")
        object.__setattr__(self, "scaled", self.tied if self.scaled is None else self.scaled)
        object.__setattr__(self, "segments", checked(self.segments, self.layers, KINDS, "t5"))

    def _refused(self, name: str, accepted: str) -> RequestError:
        return RequestError(f"t5: {name} is {getattr(self, name)!r}; accepted: {accepted}")

    @property
    def stacks(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"{side}/" for side in SIDES)

    @property
    def attentions(self) -> dict[str, int]:
        """Those inside the stacks, and the decoder's to the source."""
        crossed = {f"{path}/cross/attn": n for path, n in self.blocks.items() if path.startswith("decoder/")}
        return {**super().attentions, **crossed}

    @property
    def kv_width(self) -> int:
        """Units of all keys of a token."""
        return self.heads * self.head_dim

    @property
    def encodes(self) -> bool:
        """That a prompt is read as a whole, every token in the light of all: no part of one can be run ahead."""
        return True


def layout(spec: T5Spec) -> dict[str, Leaf]:
    """{path: Leaf} with every layer on its own, whatever ``spec.segments`` says; deviations are the T5 code's."""
    d, h, s = spec.width, spec.heads, spec.init_scale
    table = {"embed/kernel": Leaf((spec.vocab, d), ("vocab", "embed"), s)}
    for side in SIDES:
        table[f"{side}/relative/table"] = Leaf((spec.buckets, h), (None, "heads"), s * d**-0.5)
        for i in range(spec.layers):
            table |= {f"{side}/layers/{i}/{path}": leaf for path, leaf in _layer(spec, side == "decoder").items()}
        table[f"{side}/final_norm/scale"] = Leaf((d,), ("embed",), None)
    if not spec.tied:
        table["head/kernel"] = Leaf((d, spec.vocab), ("embed", "vocab"), s)
    return table


def _layer(spec: T5Spec, crossed: bool) -> dict[str, Leaf]:
    """{path below ``layers/{i}``: Leaf}. Attention to the source is ``cross/attn``, so that a pattern ``attn/q`` names
    the queries of every attention."""
    d, inner, s = spec.width, spec.heads * spec.head_dim, spec.init_scale
    attention = {
        "attn/q/kernel": Leaf((d, inner), ("embed", "heads"), s * (d * spec.head_dim) ** -0.5),
        "attn/k/kernel": Leaf((d, inner), ("embed", "kv"), s * d**-0.5),
        "attn/v/kernel": Leaf((d, inner), ("embed", "kv"), s * d**-0.5),
        "attn/o/kernel": Leaf((inner, d), ("heads", "embed"), s * inner**-0.5),
        "attn_norm/scale": Leaf((d,), ("embed",), None),
    }
    table = dict(attention)
    if crossed:
        table |= {f"cross/{path}": leaf for path, leaf in attention.items()}
    table["mlp_norm/scale"] = Leaf((d,), ("embed",), None)
    for name in ("gate", "up") if spec.gated else ("up",):
        table[f"mlp/{name}/kernel"] = Leaf((d, spec.mlp), ("embed", "mlp"), s * d**-0.5)
    table["mlp/down/kernel"] = Leaf((spec.mlp, d), ("mlp", "embed"), s * spec.mlp**-0.5)
    return table


def axes(spec: T5Spec, params: Mapping[str, Any]) -> dict[str, Axes]:
    """{path: logical axis name or None per dimension} for every key of ``params``, see `jaxcl.models.layout.axes`.

    RequestError on a key that nothing here reads: a method would train it in vain.
    """
    table, more = layout(spec), added(spec)
    table = table | {"value_head/kernel": Leaf((spec.width, 1), ("embed", None), 0.0)}
    if spec.tied:
        table["head/kernel"] = Leaf((spec.width, spec.vocab), ("embed", "vocab"), None)
    for path in params:
        one = plain(path)
        site = one.rpartition("/")[0]
        known = one in table or f"{site}/kernel" in table or one.removesuffix("_bank") in more
        if one.startswith(OURS) and not known:
            raise RequestError(f"T5 has no {path!r}; {nearest(one, table)}")
    return axes_by(table, params)


def added(spec: T5Spec) -> set[str]:
    """Paths, with every layer on its own, that methods may add beside dense sites: prefixes and bottlenecks."""
    single = dataclasses.replace(spec, segments=())
    prefixes = {f"{path}/{name}" for path in single.attentions for name in (*NAMES, *MAP)}
    names = [f"{part}/{name}" for part in ("attn", "mlp") for name in (*SEQUENTIAL, *PARALLEL, SCALE)]
    norms = {f"{path}_delta" for path in layout(spec) if path.endswith("_norm/scale")}
    return prefixes | norms | {f"{path}/{name}" for path in single.blocks for name in names} | {*NETWORK}


def tap_names(spec: T5Spec) -> tuple[str, ...]:
    """All taps: ``encoder/layers/{i}/{site}:in`` of every dense site, ``encoder/layers/{i}:out``, and the decoder's."""
    kernels = (path for path in layout(spec) if "/layers/" in path and path.endswith("/kernel"))
    sites = tuple(path.removesuffix("/kernel") + ":in" for path in kernels)
    return sites + tuple(f"{side}/layers/{i}:out" for side in SIDES for i in range(spec.layers))


def tiny_t5(vocab: int = 259, layers: int = 2, width: int = 32, **overrides: Any) -> T5Spec:
    """A byte model that trains in seconds; `ByteTokenizer`'s pad begins a target, its eos ends a source."""
    sizes = {"heads": 4, "head_dim": max(2, width // 4), "mlp": 2 * width}
    special = {"start": vocab - 1, "end": vocab - 2}
    return T5Spec(vocab=vocab, width=width, layers=layers, **{**sizes, **special, **overrides})
