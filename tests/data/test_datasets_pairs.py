"""Lazy pairs, patches in workers and processes, restarts, and the checker of pairs."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from datasets_toys import png, real, scenes, toy  # noqa: F401  (fixtures)
from PIL import Image

from smfnet.core.checks import InputError
from smfnet.data import pairs as pairs_module
from smfnet.data.pair_check import check_pairs, estimate_shift, overlap
from smfnet.data.pairs import PixelCache, get_pairs, patch_loader, read_boxes, read_mask
from smfnet.data.patches import PatchSet, load_pairs


@pytest.fixture
def folder(tmp_path):
    """Five pairs of 64×80 pixels."""
    for i, s in enumerate(scenes(5)):
        png(tmp_path / f"ir/{i}.png", s.ir)
        png(tmp_path / f"vi/{i}.png", s.vis)
    return tmp_path


def equal(a, b) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x[k], y[k]) for x, y in zip(a, b) for k in ("ir", "vis"))


# --- laziness -------------------------------------------------------------------------------------


def test_nothing_is_decoded_before_it_is_asked_for(folder, monkeypatch):
    read, seen = pairs_module.read_pair, []
    monkeypatch.setattr(pairs_module, "read_pair", lambda **k: seen.append(k["ir"].stem) or read(**k))
    pairs = get_pairs(folder)
    assert not seen and len(pairs) == 5
    pairs[3].ir, pairs[3].vis, pairs[3].chroma  # noqa: B018
    assert seen == ["3"]
    small = get_pairs(folder, memory=0)
    for p in small:
        p.ir, p.vis  # noqa: B018
    assert seen[1:] == list("01234") and len(small.cache.kept) == 1


def test_a_damaged_image_is_an_error_when_it_is_read(folder):
    (folder / "vi/2.png").write_bytes(b"x")
    pairs = get_pairs(folder)
    assert pairs[1].ir.shape == (64, 80)
    with pytest.raises(InputError, match="2.png: not a readable image"):
        pairs[2].ir  # noqa: B018


def test_pickled_pairs_carry_no_pixels(folder):
    pairs = get_pairs(folder)
    [p.ir for p in pairs]
    assert pairs.cache.used > 0 and len(pickle.dumps(pairs)) < 20_000
    copy = pickle.loads(pickle.dumps(pairs))
    assert copy.cache.used == 0 and all(np.array_equal(a.vis, b.vis) for a, b in zip(pairs, copy))


def test_cache_counts_bytes():
    cache = PixelCache(10_000)
    for key in range(50):
        cache.get(
            key,
            lambda: pairs_module.Content(
                np.zeros((10, 10), np.float32), np.zeros((10, 10), np.float32), None
            ),
        )
        assert cache.used == sum(c.bytes for c in cache.kept.values()) <= 10_000


def test_a_set_and_a_folder_of_the_same_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TNO").mkdir()
    for side in ("ir", "vi"):
        (tmp_path / side).rename(tmp_path / "TNO" / side)
    with pytest.raises(InputError, match="TNO test: no folder"):
        get_pairs("TNO", "test", root=tmp_path / "data")
    assert len(get_pairs("./TNO")) == 5 == len(get_pairs(tmp_path / "TNO"))
    with pytest.raises(InputError, match="belongs to sets of the registry"):
        get_pairs(tmp_path / "TNO", "test")


def test_partial_set_is_an_error(toy, tmp_path):  # noqa: F811
    (tmp_path / "home/toy/train/vi/1.png").unlink()
    with pytest.raises(InputError, match="train/vi/1.png: missing"):
        get_pairs(toy, "train", root=tmp_path / "home")
    loose = get_pairs(toy, "train", root=tmp_path / "home", strict=False)
    assert loose.stems == ["0", "2"] and list(loose.problems) == ["1"]


@pytest.mark.parametrize(
    "text", ["", "<annotation>", "{}", "<annotation><object><name>car</name></object></annotation>"]
)
def test_damaged_annotations(tmp_path, text):
    for suffix in ("xml", "json"):
        (tmp_path / f"a.{suffix}").write_text(text)
        with pytest.raises(InputError, match="not a readable annotation"):
            read_boxes(tmp_path / f"a.{suffix}", classes=["car"])


def test_masks(tmp_path):
    values = np.arange(400).reshape(20, 20).astype(np.uint8) % 9
    palette = Image.fromarray(values, "P")
    palette.putpalette(list(range(27)))
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "p.png", classes=list("abcdefghi")), values)
    png(tmp_path / "c.png", np.zeros((20, 20, 3), np.uint8))
    with pytest.raises(InputError, match="stored as RGB"):
        read_mask(tmp_path / "c.png", classes=["a"])


# --- patches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_same_batches(folder, context):
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform cannot {context} processes")
    eager = PatchSet(load_pairs(folder, progress=False), patch=32, stride=16, seed=3)
    lazy = PatchSet(get_pairs(folder, memory=0), patch=32, stride=16, seed=3)
    loader = patch_loader(lazy, 4, workers=2, multiprocessing_context=context)
    for epoch in (0, 1):
        loader.batch_sampler.set_epoch(epoch)
        assert equal(list(loader), list(eager.batches(epoch, 4)))


def test_a_stopped_epoch_continues(folder):
    lazy = PatchSet(get_pairs(folder), patch=32, stride=16)
    loader = patch_loader(lazy, 4)
    loader.batch_sampler.set_epoch(5)
    whole = list(loader)
    for start in (1, len(whole) - 1):
        fresh = patch_loader(PatchSet(get_pairs(folder), patch=32, stride=16), 4)
        fresh.batch_sampler.set_epoch(5, start)
        assert len(fresh) == len(whole) - start and equal(list(fresh), whole[start:])


def test_shares_of_two_processes_make_the_batch(folder):
    lazy = PatchSet(get_pairs(folder), patch=32, stride=16)
    whole, shares = list(patch_loader(lazy, 6)), [list(patch_loader(lazy, 6, share=(r, 2))) for r in (0, 1)]
    assert equal([{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(*shares)], whole)
    for bad in ((0, 4), (2, 2), (-1, 2)):
        with pytest.raises(InputError, match="process"):
            patch_loader(lazy, 6, share=bad)


def test_real_patches(real):  # noqa: F811
    """RoadScene's scene-disjoint part, read lazily with a small memory, gives the patches of loaded pairs."""
    few = dict(patch=128, stride=128)
    keep = set(get_pairs("RoadScene", "train-disjoint", root=real).stems[:12])
    out = [s for s in get_pairs("RoadScene", "train", root=real).stems if s not in keep]
    eager = PatchSet(load_pairs(real / "RoadScene/train", leave_out=out, progress=False), **few)
    lazy = PatchSet(get_pairs("RoadScene", "train", root=real, leave_out=out, memory=1 << 20), **few)
    assert eager.fingerprint() == lazy.fingerprint()


# --- the checker ----------------------------------------------------------------------------------


def test_checker_finds_a_known_shift(tmp_path):
    for i, pair in enumerate(list(get_pairs("scenes", "test"))[:2]):
        ir, vis = overlap(pair.ir, pair.vis, -7, 5)
        shift = estimate_shift(ir=ir, vis=vis)
        assert (
            (shift.rows, shift.columns) == (7, -5)
            and shift.likely()
            and not estimate_shift(ir=pair.ir, vis=pair.vis).likely()
        )
        for side, x in (("ir", ir), ("vi", vis)):
            png(tmp_path / f"{side}/{i}.png", np.rint(x * 255).astype(np.uint8))
    report = check_pairs(get_pairs(tmp_path), pictures=tmp_path / "pictures", progress=False)
    assert [f.fault for f in report.findings] == [
        "shift",
        "shift",
    ] and "7 pixels lower and 5 further left" in report.findings[0].text
    assert len(list((tmp_path / "pictures").iterdir())) == 2
    assert not check_pairs(get_pairs(tmp_path), tolerance=20, progress=False).findings


def test_checker_on_small_and_odd_images(tmp_path):
    rng = np.random.default_rng(0)
    for i, (h, w) in enumerate([(16, 16), (17, 90), (33, 31)]):
        for side in ("ir", "vi"):
            png(tmp_path / f"{side}/{i}.png", rng.integers(0, 250, (h, w)).astype(np.uint8))
    assert not [f for f in check_pairs(get_pairs(tmp_path), progress=False).findings if f.fault != "shift"]


def test_checker_finds_what_the_registry_lists(real):  # noqa: F811
    """21 PET images are used twice."""
    found = check_pairs(get_pairs("MRI-PET", "test", root=real), progress=False).findings
    assert sum(f.fault == "duplicate" and "visible image is that of" in f.text for f in found) == 21


def test_benchmark_of_loading(folder):
    """The benchmark reads a folder of its own and counts."""
    from argparse import Namespace

    from bench.loading import measure

    found = measure(
        Namespace(set=str(folder), split="", root=None, memory=0, patch=32, batch=4, workers=0, seconds=0.2)
    )
    assert found["pairs_per_second"] > 0 and found["patches"] > 4 and found["epochs"] >= 1
