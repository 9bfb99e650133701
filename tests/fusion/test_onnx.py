"""Exported networks: variants of the network, the contract of a model, bad files, the commands.

The export itself is tested in its notebook.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from smfnet.cli import main
from smfnet.core.checks import InputError, toy_pair
from smfnet.fusion import files as fusion
from smfnet.fusion import onnx as onnx_export
from smfnet.fusion.onnx import FORMAT, ExportableFusion, OnnxModel, export_onnx
from smfnet.network.model import SMFNet

WHY = "ONNX is not installed: pip install 'smfnet[export]'"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"edge_gating": "channel_interleaved"},
        {"groups": 2, "depth": 2},
        {"base": "stacked"},
        {"detail": "inn"},
        {"graph": False},
        {"exchange": True},
    ],
)
@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 21, 34)])
def test_the_exported_route_is_the_network(options, shape):
    torch.manual_seed(1)
    net = SMFNet("tiny", **options).eval()
    for m in net.modules():
        if hasattr(m, "gamma"):
            nn.init.constant_(m.gamma, 0.5)
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.2, 0.2)
            m.running_var.uniform_(0.5, 2)
    pair = {k: torch.cat([toy_pair(*shape[1:], seed=s)[k] for s in range(shape[0])]) for k in ("vis", "ir")}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        found = ExportableFusion(net)(**pair)
    torch.testing.assert_close(found, net.fuse(**pair), atol=1e-5, rtol=0)  # float32 sums in another order
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(
        p.requires_grad for p in net.parameters()
    )


def graph(
    path, *, form=FORMAT, weight=0.5, names=("vis", "ir", "fused"), shape=("b", 1, "h", "w"), kind="FLOAT"
):
    "A hand-made graph with the names of an exported network: weight · vis + (1 − weight) · ir."
    onnx = pytest.importorskip("onnx", reason=WHY)
    pytest.importorskip("onnxruntime", reason=WHY)
    from onnx import TensorProto, helper

    vis, ir, fused = names
    value = lambda name: helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape)
    number = lambda name, x: helper.make_tensor(name, getattr(TensorProto, kind), [], [x])
    nodes = [
        helper.make_node("Mul", [vis, "p"], ["a"]),
        helper.make_node("Mul", [ir, "q"], ["c"]),
        helper.make_node("Add", ["a", "c"], [fused]),
    ]
    g = helper.make_graph(
        nodes,
        "mean",
        [value(vis), value(ir)],
        [value(fused)],
        [number("p", weight), number("q", 1 - weight)],
    )
    model = helper.make_model(g, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if form:
        helper.set_model_props(model, {"format": form})
    onnx.save(model, str(path))
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    "Two pairs, and files that are or are not exported networks."
    (
        graph(tmp_path / "mean.onnx"),
        graph(tmp_path / "foreign.onnx", form=None),
        graph(tmp_path / "future.onnx", form="smfnet-onnx-9"),
    )
    (tmp_path / "text.onnx").write_text("not a graph")
    rng = np.random.default_rng(0)
    for side, channels in (("ir", ()), ("vi", (3,))):
        (tmp_path / side).mkdir()
        for name in "ab":
            Image.fromarray(rng.integers(20, 220, (33, 47, *channels)).astype(np.uint8)).save(
                tmp_path / side / f"{name}.png"
            )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_exported_file_is_a_model(place):
    model, pair = OnnxModel("mean.onnx", threads=1), toy_pair(17, 23)
    torch.testing.assert_close(model.fuse(**pair), (pair["vis"] + pair["ir"]) / 2)
    three = {k: torch.cat([x, x.flip(3), x.flip(2)]) for k, x in pair.items()}
    torch.testing.assert_close(model.fuse(**three)[1], (three["vis"] + three["ir"])[1] / 2)
    torch.testing.assert_close(
        model.fuse(**{k: x.double() for k, x in pair.items()}), (pair["vis"] + pair["ir"]) / 2
    )
    strided = {k: x.transpose(2, 3) for k, x in pair.items()}
    torch.testing.assert_close(model.fuse(**strided), (strided["vis"] + strided["ir"]) / 2)
    assert fusion.fuse_folder(ir="ir", vis="vi", out="out", model=model, progress=False).ok


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.onnx", "no such file"),
        ("text.onnx", "cannot read it"),
        ("ir", "no such file"),
        ("foreign.onnx", "not written by"),
        ("future.onnx", "smfnet-onnx-9"),
    ],
)
def test_other_files_are_refused(place, name, words):
    with pytest.raises(InputError, match=words) as e:
        OnnxModel(name)
    assert str(e.value).startswith(name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ("input", "ir", "fused")}, "its inputs are input"),
        ({"names": ("vis", "ir", "output")}, "its outputs are output"),
        ({"shape": ("b", 3, "h", "w")}, "not ir, vis of B×1×H×W"),
        ({"shape": ("b", 1, 480, 640)}, "its inputs are"),
        ({"shape": ("b", "h", "w")}, "its inputs are"),
        ({"kind": "DOUBLE"}, r"tensor\(double\)"),
        ({"kind": "FLOAT16"}, r"tensor\(float16\)"),
    ],
)
def test_the_signature_is_checked(tmp_path, changes, words):
    "A file that claims to be ours, whose inputs or outputs are others."
    graph(tmp_path / "odd.onnx", **changes)
    with pytest.raises(InputError, match=words) as e:
        OnnxModel(tmp_path / "odd.onnx")
    assert str(e.value).startswith(str(tmp_path / "odd.onnx")) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git-LFS pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"", "is an empty file"),
        (b"PK\x03\x04", "zip archive that is cut off"),
        (b"\x08\x0a\x12\x07pytorch" + bytes(50), "ONNX Runtime cannot read it"),
    ],
)
def test_what_is_no_graph_is_called_so(tmp_path, content, words):
    "By the first bytes, or by the runtime."
    pytest.importorskip("onnxruntime", reason=WHY)
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(InputError, match=words):
        OnnxModel(tmp_path / "x.onnx")


def test_damaged_graphs_are_one_line(tmp_path):
    "A byte changed at fifty places: a model, or one line."
    whole, rng = graph(tmp_path / "x.onnx").read_bytes(), np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 50):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        (tmp_path / "x.onnx").write_bytes(damaged)
        try:
            OnnxModel(tmp_path / "x.onnx", threads=1).fuse(**toy_pair(17, 23))
        except InputError as e:
            assert str(e).startswith(str(tmp_path / "x.onnx")) and "\n" not in str(e)


def test_threads_have_a_bound(place):
    "A million threads are as many as there are processors."
    model = OnnxModel("mean.onnx", threads=10**6)
    assert model.session.get_session_options().intra_op_num_threads <= os.cpu_count()


def test_bad_pairs_are_refused(place):
    model, pair = OnnxModel("mean.onnx"), toy_pair(20, 20)
    with pytest.raises(InputError, match="vis: 12×20 is too small"):
        model.fuse(vis=pair["vis"][..., :12, :], ir=pair["ir"])
    with pytest.raises(InputError, match="differ"):
        model.fuse(vis=pair["vis"], ir=toy_pair(20, 24)["ir"])


def test_a_lack_of_memory_is_bad_input_of_files(place, monkeypatch):
    class Full:
        def run(self, *args):
            raise RuntimeError(
                "[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 9"
            )

    model = OnnxModel("mean.onnx")
    monkeypatch.setattr(model, "session", Full())
    with pytest.raises(InputError, match="47×33 pixels do not fit"):
        fusion.fuse_pair(ir="ir/a.png", vis="vi/a.png", model=model)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_names_the_command(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    for other in {"onnx", "onnxscript", "onnxruntime"} - {package}:
        try:
            __import__(other)
        except ImportError:
            monkeypatch.setitem(sys.modules, other, sys)  # absent here as well: this test needs none of them
    with pytest.raises(InputError, match=rf"{package}.*pip install 'smfnet\[export\]'"):
        export_onnx(SMFNet("tiny").eval(), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("weight", "accepted"), [(0.5, True), (0.4, False)])
def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch, weight, accepted):
    "The check after writing: the recorded program is replaced by a hand-made graph, the network by a mean."
    graph(tmp_path / "made.onnx", weight=weight)

    class Program:
        class model:
            metadata_props = {}

        def save(self, path):
            Path(path).write_bytes((tmp_path / "made.onnx").read_bytes())

    net = SMFNet("tiny").eval()
    monkeypatch.setattr(SMFNet, "fuse", lambda self, *, vis, ir: (vis + ir) / 2)
    monkeypatch.setattr(onnx_export, "_recorded", lambda model: Program())
    pytest.importorskip("onnxscript", reason=WHY)
    if accepted:
        assert export_onnx(net, tmp_path / "x.onnx", weights="w") < 1e-6
        assert (
            Program.model.metadata_props["weights"] == "w"
            and '"dim": 16' in Program.model.metadata_props["config"]
        )
    else:
        with pytest.raises(InputError, match="x.onnx: the exported network differs by"):
            export_onnx(net, tmp_path / "x.onnx")
    assert (tmp_path / "x.onnx").exists() == accepted


FUSE = "fuse --ir ir --vis vi --out out --weights mean.onnx"


def test_the_command_runs_an_exported_network(place, capsys):
    assert main(f"{FUSE} --device cpu --threads 1".split()) == 0
    assert "2 of 2 pairs fused" in capsys.readouterr().out

    class Mean:
        def fuse(self, *, vis, ir):
            return (vis + ir) / 2

    expected = fusion.fuse_pair(ir="ir/a.png", vis="vi/a.png", model=Mean()).astype(int)
    assert np.abs(np.asarray(Image.open("out/a.png")).astype(int) - expected).max() <= 1
    assert main("video --ir ir --vis vi --out film --weights mean.onnx".split()) == 0
    np.testing.assert_array_equal(np.asarray(Image.open("film/a.png")), np.asarray(Image.open("out/a.png")))


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (f"{FUSE} --device cuda", "run on the CPU"),
        (f"{FUSE} --max-memory 1GB", "no --max-memory"),
        (FUSE.replace("mean", "none"), "none.onnx: no such file"),
        (FUSE.replace("mean", "text"), "text.onnx: ONNX Runtime cannot read"),
        ("export-onnx --weights none.safetensors --out x.onnx", "none.safetensors"),
        ("export-onnx --out x.pt", "x.pt: let the name end"),
        ("export-onnx --weights mean.onnx --out x.onnx", "mean.onnx"),
    ],
)
def test_bad_commands_are_one_line_and_two(place, capsys, line, word):
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("smfnet: error: ") and err.count("\n") == 1 and word in err and out == ""
    assert not Path("out").exists() and not Path("x.onnx").exists()
