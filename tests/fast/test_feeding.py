"""Batches from pixels on a device are those of the processor, and a training notices no difference."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smfnet.data.patches import LoadedPair, PatchSet
from smfnet.fast import feeding
from smfnet.fast.feeding import ResidentPatches, feed
from smfnet.network.model import SMFNet
from smfnet.training.recipes import recipe
from smfnet.training.trainer import Speed, Trainer


def pairs(*shapes) -> list[LoadedPair]:
    """Noise of several sizes."""
    draw = lambda i, shape: np.random.default_rng(i).random((2, *shape), np.float32)
    return [LoadedPair(f"n{i}", *draw(i, shape)) for i, shape in enumerate(shapes)]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(0, 3000),
    st.booleans(),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from([(0, 1), (0, 2), (1, 2)]),
    st.integers(0, 3),
)
def test_every_batch_is_the_processors(seed, epoch, flips, gain, share, start):
    """For any seed, epoch, place in it and process, with mirrors and gains or without."""
    data = PatchSet(pairs((40, 29), (24, 56)), patch=16, stride=5, flips=flips, gain=gain, seed=seed)
    resident = ResidentPatches(data, "cpu")
    options = {"start": start, "share": share}
    count = 0
    for a, b in zip(data.batches(epoch, 4, **options), resident.batches(epoch, 4, **options), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
        count += 1
    assert count == len(data) // 4 - start


def test_a_training_notices_no_difference(tmp_path):
    """Weights and log to the last bit, also from the middle of an epoch."""
    runs = {}
    for resident in (False, True):
        folder = tmp_path / str(resident)
        for steps in (5, 0):
            torch.manual_seed(0)
            data = PatchSet(pairs((40, 29), (24, 56)), patch=16, stride=8, gain=0.2, seed=0)
            r = recipe("demo", patch=16, stride=8, batch=4, epochs=(2, 1), gain=0.2)
            run = Trainer(SMFNet("tiny"), data, r, folder, speed=Speed(resident=resident))
            run.resume()
            run.fit(steps=steps, progress=False)
        lines = map(json.loads, run.log.read_text().splitlines())
        log = [{k: v for k, v in x.items() if k != "images_per_second"} for x in lines]
        runs[resident] = log, run.model.state_dict(), type(run.source)
    (log, weights, kind), (other_log, other_weights, other_kind) = runs.values()
    assert log == other_log and all(torch.equal(v, other_weights[k]) for k, v in weights.items())
    assert (kind, other_kind) == (PatchSet, ResidentPatches)


class Described:
    """A pair that is read when it is needed."""

    stem = "described"

    def __init__(self, pair):
        self.ir, self.vis = pair.ir, pair.vis


@pytest.mark.parametrize(
    ("room", "device", "wanted", "found"),
    [
        (10**9, "cpu", None, False),
        (10**9, "cpu", True, True),
        (10**4, "cpu", True, False),  # a quarter of what is free would not do
        (10**9, "cpu", False, False),
    ],
)
def test_it_falls_back_when_memory_is_short(monkeypatch, room, device, wanted, found):
    """And stays away where nobody asked."""
    monkeypatch.setattr(feeding, "free_memory", lambda device: room)
    data = PatchSet(pairs((40, 40)), patch=16, stride=8)
    assert isinstance(feed(data, device, wanted), ResidentPatches) == found


def test_pairs_that_are_read_when_needed_stay_on_disk():
    """So does a data set of another class."""
    data = PatchSet([Described(p) for p in pairs((40, 40))], patch=16, stride=8)
    assert feed(data, "cpu", True) is data

    class Own(PatchSet):
        """With batches of its own."""

    own = Own(pairs((40, 40)), patch=16, stride=8)
    assert feed(own, "cpu", True) is own
