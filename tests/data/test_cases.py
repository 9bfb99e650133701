"""Small inputs from the field, each with its right result. Files: tests/cases; those of videos, weights and
terminals are tested beside their own rooms."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from smfnet.cli import main
from smfnet.core.checks import same_name
from smfnet.data.images import read_image
from smfnet.data.pixels import read_pixels, read_size
from smfnet.metrics import evaluate_folder

CASES = Path(__file__).parents[1] / "cases"


@pytest.fixture
def case(tmp_path, monkeypatch, request):
    "A copy of one case as the current folder."
    place = tmp_path / request.param
    shutil.copytree(CASES / request.param, place)
    monkeypatch.chdir(place)
    return place


def inside(name):
    return pytest.mark.parametrize("case", [name], indirect=True)


@inside("tiff_white_is_zero_16bit")
def test_white_is_zero_reads_like_black_is_zero(case):
    right = read_pixels("ir_right/a.tif").values
    assert_array_equal(read_pixels("ir/a.tif").values, right)
    a, b = (read_image(p, modality="ir").luminance for p in ("ir/a.tif", "ir_right/a.tif"))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] == pytest.approx(1)
    assert main("fuse --ir ir --vis vis --out out".split()) == 0
    assert main("fuse --ir ir_right --vis vis --out out_right".split()) == 0
    assert_array_equal(read_pixels("out/a.png").values, read_pixels("out_right/a.png").values)


@inside("tiff_separate_planes_16bit")
def test_separate_planes_read_like_chunky_ones(case):
    assert_array_equal(read_pixels("planar.tif").values, read_pixels("chunky.tif").values)


@inside("tiff_orientation_evaluate")
def test_an_orientation_means_the_same_to_every_command(case, capsys):
    assert main("evaluate --fused fused --ir ir --vis vis --csv t.csv".split()) == 0
    assert len(Path("t.csv").read_text().splitlines()) == 2
    assert read_size("ir/a.tif") == read_size("vis/a.png") == read_pixels("ir/a.tif").values.shape
    assert main("fuse --ir ir --vis vis --out out".split()) == 0


@inside("tiff_kinds")
@pytest.mark.parametrize(
    ("name", "dtype", "channels"),
    [
        ("celsius_float64.tif", np.float32, 1),
        ("celsius_float16.tif", np.float32, 1),
        ("gray16alpha.tif", np.uint16, 1),
        ("rgba16.tif", np.uint16, 3),
        ("packed14.tif", np.uint16, 1),
        ("rgb_zstd.tif", np.uint16, 3),
    ],
)
def test_kinds_of_tiff_are_read(case, name, dtype, channels):
    found = read_pixels(name)
    assert found.values.dtype == dtype and found.values.shape == (60, 80, 3)[: 2 + (channels > 1)]
    thermal = np.float32([28.94, 100.94]) if dtype == np.float32 else None
    if thermal is not None:  # what the case's author stored, degrees
        assert np.allclose([found.values.min(), found.values.max()], thermal, atol=0.02)
    if name in ("rgba16.tif", "gray16alpha.tif"):
        assert found.notes == ("alpha channel ignored",)


@inside("evaluate_14bit_infrared")
def test_deep_infrared_is_measured_in_its_range_and_said_so(case, capsys):
    def table(ir, **options):
        return evaluate_folder(fused="fused", vis="vis", ir=ir, progress=False, **options)

    eight, fourteen = table("ir8"), table("ir14")
    assert fourteen["VIF"].iloc[0] < 0.5 and fourteen.attrs["notes"][0].startswith("a.png: infrared range")
    # the camera's own mapping to 8 bits, found by a straight line, gives the same numbers within its rounding
    deep, flat = (read_pixels(f"{d}/a.png").values.astype(float) for d in ("ir14", "ir8"))
    slope, offset = np.polyfit(deep.ravel(), flat.ravel(), 1)
    mapped = table("ir14", range=(-offset / slope, (255 - offset) / slope))
    for metric in ("MI", "VIF", "Qabf", "SSIM", "SCD"):
        assert mapped[metric].iloc[0] == pytest.approx(eight[metric].iloc[0], rel=0.02), metric
    assert main("evaluate --fused fused --vis vis --ir ir14".split()) == 0
    assert "note: a.png: infrared range" in capsys.readouterr().err


@inside("names_composed_decomposed")
def test_two_spellings_of_one_name_pair(case):
    assert main("fuse --ir ir --vis vis --out out".split()) == 0
    (written,) = Path("out").iterdir()
    assert same_name(written.name) == same_name(next(Path("vis").iterdir()).name)
    assert main("evaluate --fused out --ir ir --vis vis".split()) == 0


@inside("out_is_a_file_name")
def test_a_file_name_is_the_file(case, capsys):
    assert main("fuse --ir a_ir.png --vis a_vis.png --out fused.png".split()) == 0
    assert Path("fused.png").is_file() and read_size("fused.png") == read_size("a_vis.png")
    assert main("fuse --ir a_ir.png --vis a_vis.png --out fused.jpg".split()) == 2
    assert "ends in .png" in capsys.readouterr().err and not Path("fused.jpg").exists()


@inside("evaluate_one_bad_pair")
def test_one_bad_pair_does_not_end_the_folder(case, capsys):
    assert main("evaluate --fused fused --ir ir --vis vis --csv t.csv".split()) == 1
    rows = Path("t.csv").read_text().splitlines()
    assert [r.split(",")[2] for r in rows] == ["stem", "1", "3"]
    assert rows[2].count("undefined") == 1 and rows[2].split(",")[8] == "undefined"  # VIF
    assert "2.png: damaged or truncated" in capsys.readouterr().err


@inside("names_with_prefixes")
def test_names_with_prefixes_pair(case, capsys):
    assert main("fuse --ir ir --vis vis --out out".split()) == 0
    assert sorted(p.name for p in Path("out").iterdir()) == ["VIS01.png", "VIS02.png", "VIS03.png"]
    assert main("evaluate --fused out --ir ir --vis vis".split()) == 0
    for i in (1, 2, 3):
        Path(f"ir/IR0{i}.png").rename(f"ir/left{i}of3.png")
    capsys.readouterr()
    assert main("fuse --ir ir --vis vis --out again".split()) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and "--names" in message
    assert main(["fuse", "--ir", "ir", "--vis", "vis", "--out", "o3", "--names", "left*of3", "VIS0*"]) == 0
