"""Fusing files and folders: what is written, what is refused, and what is never left behind."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from safetensors.torch import save_file

from smfnet.core.checks import InputError, data_dir, golden_file
from smfnet.data.images import read_image, read_pair, rgb_to_ycbcr, write_image
from smfnet.data.matching import find_pairs
from smfnet.data.pixels import read_pixels
from smfnet.fusion import files as fusion
from smfnet.fusion.files import fuse_folder, fuse_pair, fuse_pictures, load_model, pick_device
from smfnet.network.model import SMFNet


class Average:
    "Stand-in for the network whose result is known."

    def fuse(self, *, vis, ir):
        return (vis + ir) / 2


def noise(*shape, seed=0, lo=60, hi=190):
    return np.random.default_rng(seed).integers(lo, hi, shape).astype(np.uint8)


def save(path: Path, array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def pairs(tmp_path):
    "Three pairs: grey, colour, odd size."
    for name, size, channels in (("a", (32, 48), ()), ("b", (20, 30), (3,)), ("c", (17, 23), (3,))):
        save(tmp_path / f"ir/{name}.png", noise(*size, seed=1))
        save(tmp_path / f"vi/{name}.png", noise(*size, *channels, seed=2, lo=100, hi=130))
    return tmp_path


def run(root, out="out", model=None, **options):
    return fuse_folder(
        ir=root / "ir", vis=root / "vi", out=root / out, model=model or Average(), progress=False, **options
    )


# --- results ------------------------------------------------------------------------------------------------


def test_grey_pair_is_the_rounded_average(pairs):
    a, b = (np.asarray(Image.open(pairs / side / "a.png")).astype(float) for side in ("ir", "vi"))
    fused = fuse_pair(ir=pairs / "ir/a.png", vis=pairs / "vi/a.png", out=pairs / "x.png", model=Average())
    assert (
        fused.shape == (32, 48) and np.abs(fused - (a + b) / 2).max() <= 0.5 + 1e-4
    )  # half a level, and float32
    assert_array_equal(read_pixels(pairs / "x.png").values, fused)


def test_colour_pair_keeps_the_visible_chroma(pairs):
    files = {side: pairs / folder / "b.png" for side, folder in (("ir", "ir"), ("vis", "vi"))}
    fused = fuse_pair(**files, model=Average())
    ir, vis = read_pair(**files)
    y, cb, cr = rgb_to_ycbcr(fused / 255)
    assert 0 < fused.min() and fused.max() < 255  # nothing is clipped in this picture
    for found, expected in (
        (y, (ir.luminance + vis.luminance) / 2),
        (cb, vis.chroma[0]),
        (cr, vis.chroma[1]),
    ):
        assert_allclose(found, expected, atol=0.9 / 255)  # each channel is rounded by up to half a level


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize(("ir_bits", "vis_bits"), [(8, 8), (8, 16), (16, 8), (16, 16)])
def test_the_visible_file_decides_depth_and_colour(tmp_path, ir_bits, vis_bits, colour):
    rng = np.random.default_rng(0)
    chroma = tuple(rng.random((2, 20, 24)) * 0.05) if colour else None
    write_image(tmp_path / "ir.png", rng.random((20, 24)), bits=ir_bits)
    write_image(tmp_path / "vis.png", 0.3 + 0.3 * rng.random((20, 24)), chroma, bits=vis_bits)
    fuse_pair(ir=tmp_path / "ir.png", vis=tmp_path / "vis.png", out=tmp_path / "out", model=Average())
    found = read_pixels(tmp_path / "out/vis.png").values
    assert found.dtype == {8: np.uint8, 16: np.uint16}[vis_bits] and found.ndim == (3 if colour else 2)


def test_remarks_reach_the_log_once_for_a_folder(tmp_path, capsys):
    for name in "ab":
        save(tmp_path / f"ir/{name}.png", noise(20, 20).astype(np.uint16) + 7000)
        save(tmp_path / f"vi/{name}.png", noise(20, 20))
    said = []
    fuse_pair(ir=tmp_path / "ir/a.png", vis=tmp_path / "vi/a.png", model=Average(), log=said.append)
    assert len(said) == 1 and "a.png" in said[0] and "percentiles" in said[0]
    run(tmp_path, range=(7000, 7300))
    out = capsys.readouterr().out
    assert out.count("7000 to 7300 (given)") == 1


def test_stretch_is_off_by_default_and_affine(pairs):
    ir, vis = read_pair(ir=pairs / "ir/a.png", vis=pairs / "vi/a.png")
    plain, wide = (fuse_pictures(Average(), ir=ir, vis=vis, stretch=s) for s in (False, True))
    assert_array_equal(plain, (ir.luminance + vis.luminance) / 2)
    assert wide.min() == 0 and wide.max() == 1
    assert_allclose(wide * np.ptp(plain) + plain.min(), plain, atol=1e-6)
    flat = type("Flat", (), {"fuse": lambda self, vis, ir: torch.full_like(vis, 0.5)})()
    assert_array_equal(fuse_pictures(flat, ir=ir, vis=vis, stretch=True), np.full(vis.size, 0.5))


def test_the_network_fuses_files_and_knows_its_mode(pairs):
    files = {"ir": pairs / "ir/c.png", "vis": pairs / "vi/c.png"}
    model = SMFNet("tiny").eval()
    ir, vis = read_pair(**files)
    expected = model.fuse(
        vis=torch.from_numpy(vis.luminance)[None, None], ir=torch.from_numpy(ir.luminance)[None, None]
    )
    assert_array_equal(fuse_pictures(model, ir=ir, vis=vis), expected[0, 0].numpy())
    with pytest.raises(InputError, match="eval"):
        fuse_pair(**files, model=model.train())


# --- folders ------------------------------------------------------------------------------------------------


def test_a_folder_run_writes_every_pair(pairs):
    report = run(pairs)
    assert report.ok and [p.name for p in report.written] == ["a.png", "b.png", "c.png"]
    for p in report.written:
        assert read_image(p).size == read_image(pairs / "vi" / p.name).size
    assert "3 of 3" in report.summary()


def spoil(root: Path, kind: str, *sides: str) -> None:
    "Add one pair called z that is bad on some sides."
    for seed, side in enumerate(("ir", "vi")):
        save(root / side / "z.png", noise(20, 24, seed=seed))
    for path in (root / side / "z.png" for side in sides):
        if kind == "differ in size":
            save(path, noise(24, 20))
        elif kind == "too small":
            save(path, noise(15, 24))
        elif kind.startswith("no "):
            path.unlink()
        elif kind == "same name twice":
            save(path.with_suffix(".bmp"), noise(20, 24))
        elif kind == "truncated":
            path.write_bytes(path.read_bytes()[:300])
        elif kind == "not a readable":
            path.write_bytes(b"<html>404</html>")
        elif kind == "NaN":
            path.unlink()
            save(path.with_suffix(".tif"), np.where(np.eye(20, 24), np.nan, noise(20, 24)).astype(np.float32))
        elif kind == "same value":
            save(path, np.full((20, 24), 50, np.uint8))


@pytest.mark.parametrize(
    ("kind", "sides"),
    [
        ("too small", ("ir", "vi")),
        ("no infrared partner", ("ir",)),
        ("no visible partner", ("vi",)),
        ("differ in size", ("ir",)),
        ("differ in size", ("vi",)),
        *(
            (kind, sides)
            for kind in ("same name twice", "truncated", "not a readable", "NaN", "same value")
            for sides in (("ir",), ("vi",), ("ir", "vi"))
        ),
    ],
)
def test_one_bad_pair_does_not_stop_the_others(pairs, kind, sides):
    spoil(pairs, kind, *sides)
    report = run(pairs)
    assert [p.name for p in report.written] == ["a.png", "b.png", "c.png"] and not report.ok
    assert list(report.problems) == ["z"] and kind in report.problems["z"] and "z." in report.problems["z"]
    named = [side for side in ("ir", "vi") if str(pairs / side / "z.") in report.problems["z"]]
    if kind in ("truncated", "not a readable", "NaN", "same name twice", "same value"):
        assert named and set(named) <= set(sides)  # no side is blamed for the other
    assert "could not be fused" in report.summary() and kind in report.summary()
    assert sorted(os.listdir(pairs / "out")) == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize("kind", ["differ in size", "truncated", "same value"])
@pytest.mark.parametrize("side", ["ir", "vi"])
def test_an_older_result_outlives_a_failure(pairs, kind, side):
    save(pairs / "out/z.png", noise(20, 24))
    before = (pairs / "out/z.png").read_bytes()
    spoil(pairs, kind, side)
    assert list(run(pairs).problems) == ["z"]
    assert (pairs / "out/z.png").read_bytes() == before


def test_an_interrupted_run_leaves_whole_files_and_goes_on(pairs):
    class Interrupted(Average):
        left = 2

        def fuse(self, **pair):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().fuse(**pair)

    with pytest.raises(KeyboardInterrupt):
        run(pairs, model=Interrupted())
    assert sorted(os.listdir(pairs / "out")) == ["a.png", "b.png"]
    times = {p: p.stat().st_mtime_ns for p in (pairs / "out").iterdir()}
    report = run(pairs, skip_existing=True)
    assert [p.name for p in report.written] == ["c.png"] and len(report.skipped) == 2
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())


def test_a_full_disk_is_reported_for_each_pair(pairs, monkeypatch):
    from smfnet.data import images

    def full(path, levels):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images, "_save_png", full)
    report = run(pairs)
    assert len(report.problems) == 3 and not report.written and os.listdir(pairs / "out") == []


def test_sources_are_never_overwritten(pairs):
    listing = {p: p.read_bytes() for p in pairs.rglob("*.png")}
    for out in ("ir", "vi"):
        with pytest.raises(InputError, match="source"):
            run(pairs, out=out)
    for out in (pairs / "vi", pairs / "vi/a.png", pairs / "ir", pairs / "ir/a.png"):
        with pytest.raises(InputError, match="source image"):
            fuse_pair(ir=pairs / "ir/a.png", vis=pairs / "vi/a.png", out=out, model=Average())
    assert {p: p.read_bytes() for p in pairs.rglob("*.png")} == listing


@pytest.mark.parametrize("side", ["ir", "vi"])
@pytest.mark.parametrize(
    "given", [("ir/a.png", "vi/a.png"), ("ir/a.png", "vi"), ("ir", "vi/a.png"), ("ir", "vi")]
)
@pytest.mark.parametrize("option", ["out", "stretched"])
def test_no_folder_of_a_source_receives_an_image_of_its_name(pairs, side, given, option):
    """Neither the image nor the stretched one, whether a side was given as a file or as a folder."""
    listing = {p: p.read_bytes() for p in pairs.rglob("*.png")}
    places = {"out": pairs / "out", option: pairs / side}
    try:
        report = fuse_folder(
            ir=pairs / given[0], vis=pairs / given[1], model=Average(), progress=False, **places
        )
    except InputError as e:
        assert "is a source folder" in str(e)
    else:
        assert list(report.problems) == ["a"] and "is a source image" in report.problems["a"]
    assert {p: p.read_bytes() for p in pairs.rglob("*.png")} == listing


def test_a_missing_source_is_named_whatever_lies_at_the_target(pairs):
    for out in (pairs / "new.png", save(pairs / "old.png", noise(8, 8))):
        for files in ({"ir": "gone.png", "vis": "vi/a.png"}, {"ir": "ir/a.png", "vis": "gone.png"}):
            with pytest.raises(InputError, match="gone.png: no such file"):
                fuse_pair(**{side: pairs / name for side, name in files.items()}, out=out, model=Average())


def test_arguments_are_checked_before_the_first_pair(pairs):
    class Never:
        def fuse(self, **pair):
            raise AssertionError("a pair was fused")

    (pairs / "file").touch()
    (pairs / "empty").mkdir()
    base = {
        "ir": pairs / "ir",
        "vis": pairs / "vi",
        "out": pairs / "out",
        "model": Never(),
        "progress": False,
    }
    for change, word in (
        ({"ir": pairs / "empty"}, "empty.*no image"),
        ({"vis": pairs / "none"}, "none.*no such"),
        ({"out": pairs / "file"}, "file.*cannot be written"),
        ({"out": pairs / "file/deeper"}, "cannot be written"),
        ({"range": (5, 1)}, "range"),
        ({"model": pairs / "none.safetensors"}, "none.safetensors"),
        ({"vis": pairs / "ir"}, "infrared and as visible"),
    ):
        with pytest.raises(InputError, match=word):
            fuse_folder(**{**base, **change})


# --- methods that misbehave ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "word"), [(lambda x: x[..., ::2], "returned"), (lambda x: x / 0 - x / 0, "NaN")]
)
def test_damaged_results_are_not_saved(pairs, damage, word):
    model = type("Bad", (), {"fuse": lambda self, vis, ir: damage(vis)})()
    report = run(pairs, model=model)
    assert len(report.problems) == 3 and all(word in text for text in report.problems.values())
    assert os.listdir(pairs / "out") == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_lack_of_memory_is_named(pairs, error):
    def fuse(self, vis, ir):
        raise error

    report = run(pairs, model=type("Big", (), {"fuse": fuse})())
    assert (
        all("memory" in text and "pixels" in text for text in report.problems.values())
        and len(report.problems) == 3
    )


def test_defects_of_a_method_are_not_hidden(pairs):
    def fuse(self, vis, ir):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(pairs, model=type("Bug", (), {"fuse": fuse})())


# --- weights ------------------------------------------------------------------------------------------------


class Malicious:
    "A pickle that would leave a file behind if it were run."

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, suffix, protocol):
    weights = tmp_path / f"evil.{suffix}"
    weights.write_bytes(pickle.dumps({"DIDF_Encoder": Malicious(tmp_path / "trace")}, protocol))
    with pytest.raises(InputError, match="evil"):
        load_model(weights, device="cpu")
    torch.save({"DIDF_Encoder": Malicious(tmp_path / "trace")}, weights)
    with pytest.raises(InputError, match="evil"):
        load_model(weights, device="cpu")
    assert not (tmp_path / "trace").exists()


def test_weights_of_something_else_are_named(tmp_path):
    save_file({"conv.weight": torch.ones(3)}, tmp_path / "other.safetensors")
    torch.save({"state_dict": {"conv.weight": torch.ones(3)}}, tmp_path / "other.pth")
    torch.save([1, 2, 3], tmp_path / "list.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "folder.pth").mkdir()
    for name in (
        "other.safetensors",
        "other.pth",
        "list.pt",
        "text.safetensors",
        "text.pth",
        "empty.pth",
        "folder.pth",
        "none.safetensors",
    ):
        with pytest.raises(InputError, match=name):
            load_model(tmp_path / name, device="cpu")
    with pytest.raises(InputError, match="huge"):
        load_model("huge", device="cpu")


def test_own_weights_round_trip(tmp_path, pairs):
    model = SMFNet("tiny").eval()
    model.save(tmp_path / "w.safetensors")
    files = {"ir": pairs / "ir/a.png", "vis": pairs / "vi/a.png"}
    assert_array_equal(
        fuse_pair(**files, model=tmp_path / "w.safetensors", device="cpu"), fuse_pair(**files, model=model)
    )


def test_released_weights_are_recognised():
    path = golden_file("released_weights_seed7.safetensors")
    if path is None:
        pytest.skip("SMFNET_GOLDEN has no released weights")
    model = load_model(path, device="cpu")
    assert model.config.edge_gating == "channel_interleaved" and not model.training


def test_devices():
    assert pick_device("cpu").type == "cpu" and pick_device().type in ("cpu", "cuda")
    with pytest.raises(InputError, match="unknown"):
        pick_device("quantum")
    with pytest.raises(InputError, match="not available"):
        pick_device(f"cuda:{torch.cuda.device_count()}")


# --- real images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("TNO", 25), ("RoadScene", 50)])
def test_real_folders_give_images_of_the_sources_sizes(tmp_path, name, count):
    root = data_dir(name, "test")
    if root is None:
        pytest.skip(f"SMFNET_DATA has no {name}/test")
    report = fuse_folder(ir=root, vis=root, out=tmp_path, model=Average(), progress=False)
    assert report.ok and len(report.written) == count
    for pair in find_pairs(ir=root, vis=root):
        with Image.open(tmp_path / f"{pair.stem}.png") as fused, Image.open(pair.vis) as vis:
            assert fused.size == vis.size and fused.mode == ("RGB" if name == "RoadScene" else "L")


def test_stretching_is_not_the_default():
    assert (
        fusion.fuse_folder.__kwdefaults__["stretch"] is False
        and fusion.fuse_pair.__kwdefaults__["stretch"] is False
    )
