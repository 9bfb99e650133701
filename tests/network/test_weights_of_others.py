"""Weights as other people have them: in any usual wrapping, and files that hold no weights at all.

Whatever is given, there are two ends: the network, exactly, or one line that names the file. Nothing runs
code, nothing builds a network that the file does not hold.
"""

import argparse
import collections
import datetime
import gzip
import itertools
import json
import os
import pathlib
import pickle
import resource
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from smfnet.cli import main
from smfnet.core import tensor_files
from smfnet.core.checks import InputError
from smfnet.core.tensor_files import read_tensors
from smfnet.fusion.files import load_model
from smfnet.network.model import FORMAT, SMFNet
from smfnet.network.weights import load_weights

CASES = Path(__file__).resolve().parents[1] / "cases" / "weights_that_are_not"


@pytest.fixture(scope="module")
def net():
    """A tiny network with random weights."""
    torch.manual_seed(3)
    return SMFNet("tiny").eval()


@pytest.fixture(scope="module")
def state(net):
    """Its state."""
    return net.state_dict()


def silent(text):
    """A listener that does not listen."""


def refused(path, words=""):
    """One line that names the file."""
    with pytest.raises(InputError) as e:
        load_model(path, device="cpu")
    text = str(e.value)
    assert text.startswith(str(path)) and "\n" not in text.removeprefix(str(path)) and len(text) < 1200
    assert words in text, text
    return text


# --- the files from the field -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what", "fix"),
    [
        ("lfs.pth", "is a Git-LFS pointer", "git lfs pull"),
        ("html.pth", "is a web page", "download the file again"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors", "onnx", "ckpt"])
def test_pointers_and_pages_are_called_so(tmp_path, monkeypatch, capsys, name, what, fix, suffix):
    """Under every ending, by both commands that take weights, in one line with status 2."""
    monkeypatch.chdir(tmp_path)
    given = Path(f"{Path(name).stem}.{suffix}")
    shutil.copy(CASES / name, given)
    assert main(["fuse", "--ir", "a", "--vis", "b", "--out", "o", "--weights", str(given)]) == 2
    assert main(["export-onnx", "--weights", str(given), "--out", "o.onnx"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(x.startswith("smfnet: error: ") for x in lines)
    assert what in lines[1] and fix in lines[1] and not Path("o.onnx").exists()


@pytest.mark.parametrize("command", ["fuse --ir a --vis b --out o", "export-onnx --out o.onnx"])
@pytest.mark.parametrize("given", ["", " "])
def test_an_empty_name_is_an_error(tmp_path, monkeypatch, capsys, command, given):
    """It does not mean the shipped model."""
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "--weights", given]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
    with pytest.raises(InputError):
        load_model(given)


def test_threads_are_capped_with_a_remark(tmp_path, monkeypatch, capsys):
    """A million threads would end the process."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    try:
        assert main("fuse --ir a --vis b --out o --threads 1000000".split()) == 2
        assert torch.get_num_threads() <= os.cpu_count()
    finally:
        torch.set_num_threads(before)
    assert f"--threads 1000000: there are {os.cpu_count()} processors" in capsys.readouterr().err


# --- every wrapping × prefix × way of writing ---------------------------------------------------------------

WRAPPINGS = {
    "plain": lambda s: s,
    "model": lambda s: {"model": s},
    "training": lambda s: {
        "epoch": 7,
        "optimizer": {
            "state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(2.0)}},
            "param_groups": [{}],
        },
        "model_state_dict": s,
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs/x")),
        "best": np.float64(31.5),
        "history": np.arange(5.0),
        "when": datetime.datetime(2024, 5, 1),
        "log": collections.defaultdict(list, loss=[1.0]),
    },
    "deep": lambda s: {"checkpoint": {"nets": {"fusion": s}}},
    "beside": lambda s: {**s, "epoch": torch.tensor(3), "lr": 0.1, "criterion.weight": torch.ones(2)},
}
PREFIXES = ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "net.generator.module."]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def zipped(content, path):
    """The format of `torch.save` today."""
    torch.save(content, path)


def legacy(content, path):
    """The format of `torch.save` before 1.6."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("write", [zipped, legacy])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_gives_the_same_network(tmp_path, state, wrapping, prefix, write, suffix):
    """Exactly: every tensor is equal. The ending of the name does not matter."""
    path = tmp_path / f"w.{suffix}"
    write(WRAPPINGS[wrapping]({prefix + k: v for k, v in state.items()}), path)
    twin = load_weights(path, log=silent)
    assert not twin.training and all(torch.equal(v, state[k]) for k, v in twin.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_precision(tmp_path, state, prefix, dtype):
    """Read into single precision, as rounded."""
    changed = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    save_file({prefix + k: v for k, v in changed.items()}, tmp_path / "w.bin")
    twin = load_weights(tmp_path / "w.bin", log=silent).state_dict()
    assert all(torch.equal(twin[k], v.to(twin[k].dtype)) for k, v in changed.items())


VARIANTS = [
    dict(zip(("base", "detail", "graph", "exchange", "edge_gating"), values))
    for values in itertools.product(
        ("residual", "stacked"),
        ("cai", "inn"),
        (True, False),
        (False, True),
        ("neighbour", "channel_interleaved"),
    )
] + [{"dim": 24, "heads": 3, "groups": 3, "depth": 2}, {"dim": 8, "heads": 1}, {"heads": 8}]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_configuration_is_found(tmp_path, options):
    """Noted by the state dictionary, also in a wrapping; from shapes alone, all but the edges' gating."""
    net = SMFNet("tiny", **options)
    torch.save({"model": nn.DataParallel(net).state_dict()}, tmp_path / "noted.pth")
    assert load_weights(tmp_path / "noted.pth", log=silent).config == net.config
    save_file(net.state_dict(), tmp_path / "shapes.safetensors")
    remarks = []
    found = load_weights(tmp_path / "shapes.safetensors", log=remarks.append).config
    expected = SMFNet("tiny", **{**options, "edge_gating": "neighbour"}).config
    assert found == expected and len(remarks) == (1 if expected.graph else 0)


def test_paper_sized_networks(tmp_path):
    """Half a minute of training is not lost because of its size."""
    net = SMFNet("paper")
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "p.pth")
    assert load_weights(tmp_path / "p.pth", log=silent).config == net.config


def test_averages_compiled_and_lightning(tmp_path, net, state):
    """The wrappers themselves, not imitations, where PyTorch has them."""
    torch.save(torch.optim.swa_utils.AveragedModel(net).state_dict(), tmp_path / "swa.pth")
    torch.save(torch.compile(net).state_dict(), tmp_path / "compiled.pth")
    torch.save(nn.ModuleDict({"fusion": net, "loss": nn.Linear(2, 2)}).state_dict(), tmp_path / "lit.ckpt")
    parts = {n: m.state_dict() for n, m in net.named_children()} | {"epoch": 1}
    torch.save(parts, tmp_path / "parts.pth")
    torch.save({"ema": state}, tmp_path / "ema.pth")
    both = {"a": dict(state), "b": {k: v.clone() for k, v in state.items()}}
    torch.save(both, tmp_path / "twice.pth")
    for path in tmp_path.iterdir():
        twin = load_weights(path, log=silent).state_dict()
        assert all(torch.equal(twin[k], v) for k, v in state.items()), path.name


def test_an_average_beside_the_weights_is_told(tmp_path, state):
    """The weights themselves are used; without knowing which is which, nothing is."""
    other = {k: v * 1.01 for k, v in state.items()}
    torch.save({"model": state, "model_ema": other}, tmp_path / "ema.pth")
    remarks = []
    twin = load_weights(tmp_path / "ema.pth", log=remarks.append).state_dict()
    assert torch.equal(twin["encoder.embed.weight"], state["encoder.embed.weight"])
    assert any("of model, model_ema, model is used" in r for r in remarks)
    torch.save({"first": state, "second": other}, tmp_path / "two.pth")
    refused(tmp_path / "two.pth", "holds several networks (first, second)")


def test_released_checkpoints_with_bookkeeping(tmp_path):
    """The authors' five entries beside an epoch and optimisers, and one level down."""
    from smfnet.core.checks import golden_file
    from smfnet.network.released import ENTRIES, load_released

    path = golden_file("released_weights_seed7.safetensors")
    if path is None:
        pytest.skip("SMFNET_GOLDEN has no released weights")
    flat = read_tensors(path)
    nested = {e: {k[len(e) + 1 :]: v for k, v in flat.items() if k.startswith(f"{e}/")} for e in ENTRIES}
    expected = load_released(path, verbose=False).state_dict()
    for content in (
        {**nested, "epoch": 3, "optimizer1": {"state": {0: {"step": 1}}}, "args": argparse.Namespace(a=1)},
        {"state": {**nested, "lr": 0.1}},
    ):
        torch.save(content, tmp_path / "r.pth")
        twin = load_model(tmp_path / "r.pth", device="cpu").state_dict()
        assert all(torch.equal(twin[k], v) for k, v in expected.items())


# --- files of something else --------------------------------------------------------------------------------


class Runs:
    """A pickle that would leave a file behind if it were run."""

    def __init__(self, function, *args):
        self.parts = function, args

    def __reduce__(self):
        return self.parts


def in_zip(path, inside, content=b"x"):
    """A zip archive with one entry."""
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(inside, content)


def in_tar(path):
    """A tar archive with one entry."""
    (path.parent / "inside").write_bytes(b"x")
    with tarfile.open(path, "w") as t:
        t.add(path.parent / "inside", "inside")


def headed(path, header, content=b"\0" * 4):
    """A safetensors file with any header."""
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
STRANGERS = {
    "empty": (lambda p: p.touch(), "is an empty file"),
    "folder": (lambda p: p.mkdir(), "is no regular file"),
    "pipe": (os.mkfifo, "is no regular file"),
    "zeros": (lambda p: p.write_bytes(bytes(10**5)), "nothing but zeros"),
    "random": (lambda p: p.write_bytes(np.random.default_rng(0).bytes(10**5)), "it begins with b"),
    "text": (lambda p: p.write_text("hello world\n"), "it begins with b'hello world"),
    "page": (lambda p: p.write_text("\n <!-- x -->\n<HTML lang=en>"), "is a web page"),
    "page16": (lambda p: p.write_text("<html>hello", "utf-16"), "is a web page"),
    "denied": (lambda p: p.write_text('<?xml version="1.0"?><Error/>'), "the answer of a server"),
    "json": (lambda p: p.write_text('{"error": {"code": 404}}'), "is JSON"),
    "pointer_bom": (lambda p: p.write_bytes(b"\xef\xbb\xbfversion https://git-lfs.x/v1"), "Git-LFS pointer"),
    "annex": (lambda p: p.write_text("/annex/objects/MD5-s5--x\n"), "git-annex pointer"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x" * 99)), "is compressed (gzip)"),
    "tar": (in_tar, "is a tar archive"),
    "docx": (lambda p: in_zip(p, "word/document.xml"), "zip archive of other things (word/document.xml)"),
    "npz": (lambda p: np.savez(p.open("wb"), a=np.ones(3)), "is a NumPy archive"),
    "npy": (lambda p: np.save(p.open("wb"), np.ones(3)), "is a NumPy array"),
    "hdf5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "HDF5"),
    "onnx": (lambda p: p.write_bytes(b"\x08\x0a\x12\x07pytorch" + bytes(99)), "an ONNX network"),
    "picture": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "a picture (PNG)"),
    "script": (lambda p: torch.jit.save(torch.jit.script(nn.ReLU()), p), "is a TorchScript program"),
    "whole": (lambda p: torch.save(SMFNet("tiny"), p), "more than tensors (smfnet.network.model.SMFNet)"),
    "system": (lambda p: torch.save({"a": Runs(os.mkdir, "trace")}, p), "may run code when loaded"),
    "evaluate": (lambda p: p.write_bytes(pickle.dumps(Runs(eval, "open('trace', 'w')"))), "may run code"),
    "nested": (
        lambda p: p.write_bytes(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
        "not a readable",
    ),
    "list": (lambda p: torch.save([1, 2], p), "found list"),
    "tensor": (lambda p: torch.save(torch.ones(3), p), "found Tensor"),
    "other_network": (lambda p: torch.save(nn.Linear(2, 2).state_dict(), p), "not weights of smfnet"),
    "optimiser": (lambda p: torch.save(torch.optim.Adam([torch.ones(1)]).state_dict(), p), "not weights"),
    "relative": (
        lambda p: torch.save({"DIDF_Encoder": {}, "DIDF_Decoder": {}, "BaseFuseLayer": {}}, p),
        "no DetailFuseLayer, GraphModel, as in a related network",
    ),
    "huge_header": (lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b'{"a"'), "not a"),
    "lying_header": (lambda p: headed(p, {"a": {**ONE, "shape": [10**12]}}), "not a safetensors file"),
    "overlap": (lambda p: headed(p, {"a": ONE, "b": ONE}), "not a safetensors file"),
    "deep_header": (lambda p: headed(p, b'{"a":' + b"[" * 10**5), "not a safetensors file"),
    "future": (lambda p: save_file({"a": torch.ones(1)}, p, {"format": "smfnet-9"}), "smfnet-9"),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_are_called_by_their_name(tmp_path, monkeypatch, name, suffix):
    """One line, whatever the name says, and nothing was run."""
    monkeypatch.chdir(tmp_path)
    make, words = STRANGERS[name]
    path = tmp_path / f"{name}.{suffix}"
    make(path)
    refused(path, words if suffix == "pth" or "begins" not in words else "")
    assert not (tmp_path / "trace").exists()


CHANGED = {
    "part missing": (lambda s: {k: v for k, v in s.items() if "decoder" not in k}, "missing decoder"),
    "parameters only": (lambda s: {k: v for k, v in s.items() if "running" not in k}, "running_mean"),
    "another width": (lambda s: {**s, "encoder.embed.weight": torch.ones(32, 1, 3, 3)}, "do not fit"),
    "transposed": (lambda s: {k: v.mT.contiguous() if v.ndim == 4 and v.shape[2:] != (3, 3) else v
                              for k, v in s.items()} | {"encoder.embed.weight": torch.ones(1, 16, 3, 3)},
                   "no network of this project has these shapes"),
    "scalar": (lambda s: {**s, "encoder.embed.weight": torch.tensor(1.0)}, "these shapes"),
    "integers": (lambda s: {k: v.to(torch.int8) for k, v in s.items()}, "whole numbers (torch.int8)"),
    "complex": (lambda s: {k: v.to(torch.complex64) for k, v in s.items()}, "is complex"),
    "sparse": (lambda s: {k: v.to_sparse() if v.ndim else v for k, v in s.items()}, "is sparse"),
    "no content": (lambda s: {k: v.to("meta") for k, v in s.items()}, "has no content"),
    "repeated": (lambda s: {**s, "encoder.embed.weight": torch.ones(1).expand(10**9, 1, 3, 3)}, "repeats"),
    "not finite": (lambda s: {**s, "decoder.convs.0.weight": s["decoder.convs.0.weight"] / 0}, "NaN"),
    "other numbers": (lambda s: {**s, "module.encoder.embed.weight": torch.ones(16, 1, 3, 3)}, "there twice"),
    "many groups": (
        lambda s: s
        | {f"encoder.base.groups.{i}.blocks.{j}.x": torch.ones(1) for i in range(2000) for j in (0, 1)},
        "are too few for 2000 groups",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_states_that_cannot_be_are_refused(tmp_path, state, name):
    """The message names the tensor."""
    change, words = CHANGED[name]
    torch.save(change(dict(state)), tmp_path / "w.pth")
    refused(tmp_path / "w.pth", words)


@pytest.mark.parametrize("field", ["dim", "heads", "groups", "depth"])
@pytest.mark.parametrize("size", [3, 64, 4 * 10**5, 2**60, 10**400])
def test_monsters_are_refused_before_they_are_built(tmp_path, state, field, size):
    """A header that asks for more than the file holds costs neither memory nor time."""
    config = json.dumps(SMFNet("tiny").config.stored() | {field: size})
    save_file(state, tmp_path / "m.safetensors", {"format": FORMAT, "config": config})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "m.safetensors")
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    )  # kB; dim 4·10⁵ has 10¹³ numbers


@pytest.mark.parametrize(
    "config", ["", "[1]", "[" * 10**5, "3", "{}x", '{"dim": "16"}', '{"width": 3}', "null"]
)
def test_headers_that_are_no_configuration(tmp_path, state, config):
    """Whatever JSON makes of it, deep nesting included."""
    save_file(state, tmp_path / "c.safetensors", {"format": FORMAT, "config": config})
    refused(tmp_path / "c.safetensors", "configuration in its header")


def test_dictionaries_that_hold_themselves(tmp_path, state):
    """Each level is looked at once: twenty levels of two references each are no million."""
    loop = {"model": state}
    loop["again"] = loop
    torch.save(loop, tmp_path / "loop.pth")
    assert load_weights(tmp_path / "loop.pth", log=silent).config == SMFNet("tiny").config
    level = {"x": torch.ones(1)}
    for _ in range(40):
        level = {"a": level, "b": level}
    torch.save(level, tmp_path / "wide.pth")
    refused(tmp_path / "wide.pth", "not weights of smfnet")


class Panic(BaseException):
    """As Rust's panics arrive in Python."""


@pytest.mark.parametrize(
    "error", [Panic("x"), RecursionError(), MemoryError(), KeyError(3), SystemError("x"), StopIteration(),
              UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), OSError(5, "Input/output error")],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
@pytest.mark.parametrize("reader", ["torch.load", "safetensors"])
def test_whatever_a_reader_raises_is_one_line(tmp_path, monkeypatch, state, reader, error):
    """Readers of other versions may raise anything."""

    def fail(*args, **kwargs):
        raise error

    torch.save(dict(state), tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr(tensor_files.safetensors.torch, "load_file", fail)
    refused(tmp_path / ("w.pth" if reader == "torch.load" else "w.safetensors"))


def test_an_interruption_stays_one(tmp_path, monkeypatch, state):
    """Ctrl-C while a file is read is no damaged file."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    torch.save(dict(state), tmp_path / "w.pth")
    monkeypatch.setattr(torch, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model(tmp_path / "w.pth", device="cpu")


@pytest.mark.parametrize(
    "write", [zipped, legacy, lambda s, p: save_file(s, p)], ids=["zip", "legacy", "rust"]
)
def test_damage_anywhere_is_one_line(tmp_path, state, write):
    """Cut at thirty places, and a byte changed at sixty: a network, or one line; never anything else."""
    path, rng, refusals = tmp_path / "w.pth", np.random.default_rng(0), 0
    write(dict(state), path)
    whole = path.read_bytes()
    cuts = [whole[:n] for n in (*range(1, 12), *rng.integers(12, len(whole), 19))]
    flips = []
    for place in (*rng.integers(0, 2000, 40), *rng.integers(len(whole) - 2000, len(whole), 20)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        flips.append(bytes(damaged))
    for content in (*cuts, *flips):
        path.write_bytes(content)
        try:
            load_weights(path, log=silent)
        except InputError as e:
            assert str(e).startswith(str(path))
            refusals += 1
    assert refusals >= len(cuts)


def test_a_flipped_bit_is_found(tmp_path):
    model = SMFNet("tiny")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    whole = bytearray((tmp_path / "w.pt").read_bytes())
    whole[len(whole) // 3] ^= 255
    (tmp_path / "w.pt").write_bytes(whole)
    with pytest.raises(InputError, match="w.pt: (damaged|not a readable)"):
        load_model(tmp_path / "w.pt")
