"""Prepared, tiled, memory-bounded inference gives the image of the network it was made from."""

import json
import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

from smfnet.core.checks import InputError, golden_file, toy_pair
from smfnet.fast import prepared as inference
from smfnet.fast import tiles as streaming
from smfnet.fast.prepared import Prepared, Schedule, choose_schedule, prepare_for_inference
from smfnet.fast.tiles import (
    Box,
    Convolution,
    FeatureMap,
    Gram,
    Sweep,
    free_memory,
    parse_memory,
    show_memory,
    worker_threads,
)
from smfnet.fusion.files import fuse_pair
from smfnet.network.model import SMFNet
from smfnet.network.released import load_released

GATINGS = ("neighbour", "channel_interleaved")


def trained(preset="tiny", seed=0, **options):
    """A network whose every parameter and statistic has moved off its initial value; its outputs vary."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = SMFNet(preset, **options).eval().requires_grad_(False)
    for t in (*model.parameters(), *model.buffers()):
        scale = t.abs().float().mean() if t.any() else 1
        if t.is_floating_point():
            t += 0.3 * scale * (2 * torch.rand(t.shape, generator=g) - 1)
    return model


@pytest.fixture(scope="module")
def tiny():
    return trained()


def pair(h, w, batch=1, seed=0, dtype=torch.float32):
    images = [toy_pair(h, w, seed=seed + i) for i in range(batch)]
    return {k: torch.cat([i[k] for i in images]).to(dtype) for k in ("vis", "ir")}


def difference(model, prepared, images):
    expected, fused = model.fuse(**images), prepared.fuse(**images)
    assert fused.shape == expected.shape and fused.dtype == expected.dtype and not fused.requires_grad
    assert expected.std() > 1e-3  # an image that is flat would hide mistakes
    return (fused - expected).abs().max().item()


# --- the same image -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize(("h", "w"), [(16, 16), (17, 23), (31, 48), (64, 16)])
def test_tiny_in_default_tiles(gating, h, w):
    model = trained(edge_gating=gating)
    assert difference(model, prepare_for_inference(model), pair(h, w)) < 1e-5


@pytest.mark.parametrize("tile", [(8, 61), (37, 8), (8, 8), (16, 20), (37, 61), (1, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_tiles_of_every_shape(tiny, tile, threads):
    assert difference(tiny, prepare_for_inference(tiny, tile=tile, threads=threads), pair(37, 61)) < 1e-5


@pytest.mark.parametrize("gating", GATINGS)
def test_paper_size(gating):
    model = trained("paper", edge_gating=gating)
    assert difference(model, prepare_for_inference(model, tile=(16, 24), threads=2), pair(33, 50)) < 1e-5


def test_float64_shows_that_the_algebra_is_exact():
    model = trained("paper", edge_gating="channel_interleaved").double()
    assert (
        difference(
            model,
            prepare_for_inference(model, dtype=torch.float64, tile=(12, 18)),
            pair(24, 36, dtype=torch.float64),
        )
        < 1e-12
    )


def test_other_depth_and_width():
    model = trained(dim=8, heads=2, groups=3, depth=2)
    assert difference(model, prepare_for_inference(model, tile=(16, 16)), pair(40, 33)) < 1e-5


def test_batch_is_fused_picture_by_picture(tiny):
    prepared, images = prepare_for_inference(tiny, tile=(24, 24), threads=1), pair(24, 40, batch=2)
    assert difference(tiny, prepared, images) < 1e-5
    each = [prepared.fuse(**{k: v[i : i + 1] for k, v in images.items()}) for i in range(2)]
    assert_close(prepared.fuse(**images), torch.cat(each), atol=0, rtol=0)


@settings(max_examples=5, deadline=None)
@given(st.integers(16, 70), st.integers(16, 70), st.integers(8, 80), st.integers(8, 80), st.integers(0, 99))
def test_any_size_in_any_tiles(h, w, tile_h, tile_w, seed):
    model = trained(seed=1)
    assert (
        difference(
            model, prepare_for_inference(model, tile=(tile_h, tile_w), threads=1), pair(h, w, seed=seed)
        )
        < 1e-5
    )


def test_tall_and_flat(tiny):
    for h, w in ((16, 300), (300, 16)):
        assert difference(tiny, prepare_for_inference(tiny, tile=(64, 64)), pair(h, w)) < 1e-5


def test_three_maps_give_the_image_of_five(tiny):
    images = pair(60, 70)
    fused = {}
    for maps in (3, 5):
        need = streaming_need((60, 70), maps) * (1 if maps == 3 else 2)
        prepared = prepare_for_inference(tiny, tile=(16, 16), threads=1, max_memory=need)
        assert prepared.schedule((60, 70)).maps == maps
        fused[maps] = prepared.fuse(**images)
    assert_close(fused[3], fused[5], atol=1e-6, rtol=0)


def streaming_need(plane, maps):
    """Bytes that a schedule with this many maps asks for."""
    from smfnet.fast.prepared import _memory

    return _memory(plane, 16 * 4, maps, (16, 16), 1)


def test_without_fused_convolutions(tiny, monkeypatch):
    monkeypatch.setattr(streaming, "fused_convolutions", lambda: False)
    prepared = prepare_for_inference(tiny, tile=(16, 16))
    assert prepared.steps.embed.packed is None
    assert difference(tiny, prepared, pair(33, 40)) < 1e-5


def test_golden_activations():
    weights, activations = (
        golden_file("released_weights_seed7.safetensors"),
        golden_file("released_activations_seed7.safetensors"),
    )
    if not weights or not activations:
        pytest.skip("SMFNET_GOLDEN does not lead to the golden files")
    model, golden = load_released(load_file(weights), verbose=False), load_file(activations)
    fused = prepare_for_inference(model, tile=(8, 16)).fuse(vis=golden["vis"], ir=golden["ir"])
    assert_close(fused, golden["fused"], atol=1e-4, rtol=0)


def seam(error, side):
    """How much larger the error's jumps are where tiles meet than within tiles; 1 where no tile shows."""
    jumps = torch.stack([x.diff(dim=0).abs().mean(1) for x in (error, error.T)])
    meet = torch.arange(1, len(error)) % side == 0
    return (jumps[:, meet].mean() / jumps[:, ~meet].mean()).item()


def attend_by_tile(run, block, source, target, *, add=False):
    """In place of the two passes: each tile with an attention of its own, as if it were the whole picture."""

    def work(box):
        kernel = block.kernel(block.sums(source.read(box.grow(1, source.plane)), box))
        return block.apply(source.read(box.grow(block.reach, source.plane)), kernel)

    run.sweep.write(work, target, add=add)


def test_seams_are_absent(tiny, monkeypatch):
    """The error is rounding and shows no tiles; with an attention for each tile it is larger and does."""
    images, prepared = pair(96, 96), prepare_for_inference(tiny, tile=(16, 16), threads=1)
    error = lambda: (prepared.fuse(**images) - tiny.fuse(**images))[0, 0]
    exact = error()
    monkeypatch.setattr(inference._Run, "attend", attend_by_tile)
    approximate = error()
    assert seam(exact, 16) < 1.2 < 1.4 < seam(approximate, 16)
    assert exact.abs().max() < 1e-5 and approximate.abs().max() > 1e-3


# --- what it leaves alone, and what it refuses --------------------------------------------------------------


def test_model_and_inputs_stay_as_they_are(tiny):
    model, images = trained(seed=3), pair(20, 20)
    state, before = (
        {k: v.clone() for k, v in model.state_dict().items()},
        {k: v.clone() for k, v in images.items()},
    )
    prepared, threads = model.prepare_for_inference(threads=2, tile=(8, 8)), torch.get_num_threads()
    first = prepared.fuse(**images)
    assert torch.get_num_threads() == threads
    for k, v in model.state_dict().items():
        assert_close(v, state[k], atol=0, rtol=0)
    for k, v in images.items():
        assert_close(v, before[k], atol=0, rtol=0)
    for p in model.parameters():
        p.zero_()
    assert_close(prepared.fuse(**images), first, atol=0, rtol=0)


def fuse_at_once(prepared, images):
    """Fuse in three threads that start together; results, and the number of threads of each afterwards."""
    start = threading.Barrier(3)

    def fuse(_):
        start.wait()
        return prepared.fuse(**images), torch.get_num_threads()

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(fuse, range(3)))


def test_overlapping_calls_leave_the_number_of_threads(tiny):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        prepared, images = prepare_for_inference(tiny, tile=(16, 16)), pair(40, 50)
        alone = prepared.fuse(**images)
        for fused, threads in fuse_at_once(prepared, images):
            assert_close(fused, alone, atol=0, rtol=0)
            assert threads == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_threads_are_those_of_the_preparation(tiny):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    prepared = prepare_for_inference(tiny)
    torch.set_num_threads(before)
    assert (
        prepared.schedule((20, 20)).threads == 3
        and prepare_for_inference(tiny, threads=2).schedule((20, 20)).threads == 2
    )


def test_result_is_an_ordinary_tensor_also_under_inference_mode(tiny):
    prepared, images = prepare_for_inference(tiny, threads=2, tile=(8, 8)), pair(20, 20)
    with torch.inference_mode():
        inside = prepared.fuse(**images).clone()
    assert_close(prepared.fuse(**images), inside, atol=0, rtol=0)
    assert not prepared.fuse(**images).is_inference()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"graph": False}, "graph=False"),
        ({"base": "stacked"}, "base='stacked'"),
        ({"detail": "inn"}, "detail='inn'"),
        ({"exchange": True}, "exchange=True"),
    ],
)
def test_variants_of_the_ablation_are_refused_by_name(options, word):
    with pytest.raises(InputError, match=word):
        prepare_for_inference(SMFNet("tiny", **options).eval())


def test_variants_of_the_ablation_still_fuse_files(tmp_path):
    from PIL import Image

    model = SMFNet("tiny", graph=False)
    model.save(tmp_path / "w.safetensors")
    for name in ("ir", "vis"):
        Image.linear_gradient("L").resize((20, 16)).save(tmp_path / f"{name}.png")
    files = {"ir": tmp_path / "ir.png", "vis": tmp_path / "vis.png", "model": tmp_path / "w.safetensors"}
    assert fuse_pair(**files).shape == (16, 20)
    with pytest.raises(InputError, match="graph=False"):
        fuse_pair(**files, max_memory="1GB")


def test_wrong_arguments(tiny):
    with pytest.raises(InputError, match="training mode"):
        prepare_for_inference(SMFNet("tiny"))
    with pytest.raises(InputError, match="expected an SMFNet"):
        prepare_for_inference(torch.nn.Identity())
    with pytest.raises(InputError, match="dtype"):
        prepare_for_inference(tiny, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="too small"):
        prepare_for_inference(tiny).fuse(**pair(15, 20))
    with pytest.raises(InputError, match="differ"):
        prepare_for_inference(tiny).fuse(vis=torch.rand(1, 1, 20, 20), ir=torch.rand(1, 1, 20, 21))


# --- memory -------------------------------------------------------------------------------------------------


def test_impossible_budget_names_a_possible_one(tiny):
    images = pair(80, 110)
    with pytest.raises(InputError, match="max_memory: 2MB is too little for 110×80") as e:
        prepare_for_inference(tiny, max_memory="2MB").fuse(**images)
    possible = str(e.value).split("needs ")[1].split(",")[0]
    assert difference(tiny, prepare_for_inference(tiny, max_memory=possible), images) < 1e-5


def test_schedule_grows_with_the_budget():
    options = dict(channels=64, tiles=[(64, 64), (32, 32), (16, 16)], threads=2)
    plans = [choose_schedule((1440, 2560), budget=b * 10**9, **options) for b in (3, 6, 11)]
    assert [p.maps for p in plans] == [3, 3, 5] and all(isinstance(p, Schedule) for p in plans)
    assert all(p.memory <= b * 10**9 for p, b in zip(plans, (3, 6, 11)))
    assert choose_schedule((2160, 3840), budget=12 * 10**9, **options).memory <= 8 * 10**9


def test_fewer_threads_where_memory_is_short(tiny):
    options = dict(channels=64, tiles=[(64, 64), (16, 16)])
    least = lambda threads: choose_schedule(
        (480, 640), budget=10**12, channels=64, tiles=[(16, 16)], threads=threads
    )
    need = {n: inference._memory((480, 640), 256, 3, (16, 16), n) for n in (1, 4, 8)}
    plan = choose_schedule((480, 640), budget=need[4], threads=8, **options)
    assert (plan.threads, plan.tile) == (4, (16, 16)) and least(8).threads == 8  # none fewer without need
    with pytest.raises(InputError, match=f"needs {show_memory(need[1])},"):
        choose_schedule((480, 640), budget=need[1] - 1, threads=8, **options)
    assert choose_schedule((480, 640), budget=need[1], threads=8, **options).threads == 1


MEMORY = """
import sys, torch
from smfnet.network.model import SMFNet
from smfnet.fast.prepared import prepare_for_inference
torch.set_num_threads(1)
prepared = prepare_for_inference(SMFNet("tiny").eval(), max_memory=sys.argv[1], threads=2)
small = torch.rand(1, 1, 32, 32)
prepared.fuse(vis=small, ir=small)  # loads what is loaded once
def peak():
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before, x = peak(), torch.rand(1, 1, 400, 500)
prepared.fuse(vis=x, ir=x)
plan = prepared.schedule((400, 500))
print(plan.maps, plan.threads, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it")
@pytest.mark.parametrize(("budget", "maps", "threads"), [("115MB", 3, 1), ("310MB", 3, 2), ("900MB", 5, 2)])
def test_budget_is_kept(budget, maps, threads):
    done = subprocess.run([sys.executable, "-c", MEMORY, budget], capture_output=True, text=True, check=True)
    *used, grown = map(int, done.stdout.split())
    assert used == [maps, threads] and maps * 400 * 500 * 64 < grown <= parse_memory(budget)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("4GB", 4e9),
        ("500mb", 5e8),
        (" 1.5 GiB ", 1.5 * 2**30),
        ("2k", 2000),
        (12345, 12345),
        ("7", 7),
        ("3T", 3e12),
    ],
)
def test_amounts_of_memory(text, amount):
    assert parse_memory(text) == amount


@pytest.mark.parametrize(
    "text", ["", "GB", "4 apples", "-1GB", "0", 0, -5, "1e9", None, True, "4GBB", "1.2.3", "i"]
)
def test_amounts_that_are_none(text):
    with pytest.raises(InputError, match="max_memory"):
        parse_memory(text)


@given(st.integers(1, 10**14))
def test_shown_amounts_are_sufficient_and_close(amount):
    assert amount <= parse_memory(show_memory(amount)) <= max(1.02 * amount, amount + 10**7)


def test_limits_of_a_control_group(tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert streaming._cgroup_free(tmp_path) <= 600000
    (tmp_path / "memory.max").write_text("max\n")
    assert streaming._cgroup_free(tmp_path) > 600000


@pytest.mark.parametrize(
    ("limit", "usage"),
    [("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")],
    ids=["version 2", "version 1"],
)
@pytest.mark.parametrize("group", ["", "memory", "slice/container"])
def test_a_limit_anywhere_above_the_process_counts(tmp_path, monkeypatch, limit, usage, group):
    """Of the root, of version 1's controller, or of the process's own group; less what is used."""
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("1:name=systemd:/elsewhere\n0::/slice/container\n")
    (root / group).mkdir(parents=True)
    real = streaming.Path
    monkeypatch.setattr(streaming, "Path", lambda p: own if str(p) == "/proc/self/cgroup" else real(p))
    assert streaming._cgroup_free(root) == float("inf")
    (root / group / limit).write_text("1000000\n")
    assert streaming._cgroup_free(root) == float("inf")  # the use is unknown
    (root / group / usage).write_text("400000\n")
    assert streaming._cgroup_free(root) == 600_000
    (root / group / limit).write_text("max\n")
    assert streaming._cgroup_free(root) == float("inf")


@pytest.mark.parametrize("smallest", range(3))
def test_the_narrowest_limit_is_what_is_free(monkeypatch, smallest):
    """Machine, container or address space; what is used beyond a limit leaves nothing, not less."""
    amounts = [5_000_000.0, 6_000_000.0, 7_000_000.0]
    amounts[smallest] = 4_000_000.0
    machine = type("Memory", (), {"available": amounts[0]})
    monkeypatch.setattr(streaming.psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(streaming, "_cgroup_free", lambda: amounts[1])
    monkeypatch.setattr(streaming, "_address_space_free", lambda: amounts[2])
    assert free_memory() == 4_000_000
    amounts[smallest] = machine.available = -1.0
    assert free_memory() == 0


def test_four_fifths_of_what_is_free_are_used(tiny, monkeypatch):
    """Unless an amount is given, which is then used whole."""
    asked = []
    monkeypatch.setattr(inference, "free_memory", lambda device: 10**9)
    monkeypatch.setattr(inference, "choose_schedule", lambda plane, budget, **rest: asked.append(budget))
    prepare_for_inference(tiny).schedule((40, 50))
    prepare_for_inference(tiny, max_memory="300MB").schedule((40, 50))
    assert asked == [800_000_000, 300_000_000]


def test_limit_of_the_address_space():
    program = "from smfnet.fast.tiles import free_memory; print(free_memory())"

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (6 * 10**9, resource.getrlimit(resource.RLIMIT_AS)[1]))

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, preexec_fn=limit
    )
    assert 0 < int(done.stdout) < 6 * 10**9


# --- the machinery ------------------------------------------------------------------------------------------


@given(st.integers(16, 300), st.integers(16, 300), st.integers(1, 400), st.integers(1, 400))
def test_tiles_cover_the_picture_once(h, w, tile_h, tile_w):
    seen = torch.zeros(h, w)
    for b in Sweep((h, w), (tile_h, tile_w)).boxes:
        assert b.bottom - b.top >= streaming.MIN_TILE and b.right - b.left >= streaming.MIN_TILE
        seen[b.top : b.bottom, b.left : b.right] += 1
    assert seen.eq(1).all()


def test_in_place_pass_with_delayed_threads():
    """Results that arrive late do not spoil the neighbours of tiles still to be computed."""
    import time

    plane, blur = (40, 40), Convolution(torch.full((1, 1, 3, 3), 1 / 9))
    start = torch.rand(1, 1, *plane, generator=torch.Generator().manual_seed(0))
    kept = FeatureMap(plane, 1)
    kept.write(streaming.Patch(start, Box(0, 40, 0, 40), plane))

    def work(box):
        time.sleep(0.002 * ((box.top * 7 + box.left * 3) % 5))
        return blur(kept.read(box.grow(1, plane)))

    with worker_threads(4) as run:
        Sweep(plane, (8, 8), run).write(work, kept)
    assert_close(
        kept.data[..., 0],
        torch.nn.functional.conv2d(start, torch.full((1, 1, 3, 3), 1 / 9), padding=1)[0, 0],
        atol=1e-6,
        rtol=0,
    )


def test_errors_in_threads_arrive():
    def work(box):
        raise ZeroDivisionError("in a thread")

    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), worker_threads(2) as run:
        list(run(work, [1, 2, 3]))
    assert torch.get_num_threads() == threads


def test_sums_add_up():
    a, b = (Gram(torch.full((2, 2), x), torch.full((2,), x), torch.full((2,), x)) for x in (1.0, 2.0))
    assert (a + b).cross.eq(3).all() and (a + b).q.eq(3).all() and (a + b).k.eq(3).all()


def test_prepared_is_importable_by_its_class(tiny):
    assert isinstance(prepare_for_inference(tiny), Prepared) and free_memory() > 0


# --- the benchmark ------------------------------------------------------------------------------------------


def bench(folder, line):
    """`python -m bench.inference` with a folder for its results."""
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", "bench.inference", "--out", "out", *line.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def test_the_tiny_network_is_timed(tmp_path):
    done = bench(tmp_path, "--preset tiny --sizes 48x32 --methods literal prepared --repeats 1 --threads 1")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/inference-tiny.json").read_text())
    assert (
        found["preset"] == "tiny"
        and found["methods"] == ["prepared"]
        and found["fuse"]["48x32"]["prepared"]["seconds"] > 0
    )
    shares = found["shares"]["shares"]
    assert (
        0.2 < shares["convolutions"] < 1
        and abs(sum(shares.values()) - 1) < 0.2
        and "time of the prepared network: convolutions" in done.stdout
    )
    paper = json.loads(bench(tmp_path, "--cell count prepared 48x32").stdout)["gflop_per_megapixel"]
    assert 0 < found["gflop_per_megapixel"]["prepared"] < paper / 10


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
def test_a_limit_too_small_for_anything_is_said(tmp_path):
    done = bench(tmp_path, "--limit 30MB")
    assert (
        done.returncode == 2
        and done.stderr.startswith("bench: error: ")
        and "30MB" in done.stderr
        and "--limit" in done.stderr
    )
