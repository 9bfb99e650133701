"""What a GPU would do otherwise, tested on the CPU: reduced precision, results that repeat, free memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smfnet.data.scenes import render_scene
from smfnet.fast import tiles
from smfnet.fast.precision import arithmetic
from smfnet.fast.prepared import prepare_for_inference
from smfnet.fast.training import prepare_for_training
from smfnet.losses.stages import LossWeights
from smfnet.network.model import SMFNet
from smfnet.training.recipes import batch_loss, recipe

UNREPEATED = ("reflection_pad", "replication_pad", "median", "kthvalue")  # no form on GPUs that repeats


def scene(seed: int, size=(64, 96)) -> dict[str, torch.Tensor]:
    """A rendered pair, [0,1]."""
    found = render_scene(seed, size=size)
    grey = torch.tensor([0.299, 0.587, 0.114])
    images = {"ir": torch.tensor(found.ir) / 255, "vis": torch.tensor(found.vis) / 255 @ grey}
    return {k: v[None, None].float().clamp(0, 1) for k, v in images.items()}


@pytest.mark.parametrize("name", ["tiny", "paper"])
def test_autocast_stays_within_a_grey_level_and_without_bands(name):
    """Both stages of the shipped weights: no pixel off by a level, as many values as in float32.

    As the network's notebooks write it, stage I errs by up to 12 levels (tiny, here) and an image has a few
    hundred different values.
    """
    model, pair = SMFNet.from_pretrained(name), scene(3)
    prepare_for_training(model)
    for call in (lambda: model.reconstruct(**pair), lambda: {"fused": model.fuse(**pair)}):
        exact = call()
        with torch.autocast("cpu", torch.bfloat16):
            found = call()
        for k in exact:
            assert found[k].dtype == torch.float32
            assert 0 < 255 * (found[k] - exact[k]).abs().max() < 1
            assert found[k].unique().numel() > 0.98 * exact[k].unique().numel()


def test_the_residual_stream_is_float32_and_convolutions_are_not():
    """Every block adds to float32; most convolutions, dear as they are, still give bfloat16."""
    model, seen, wide = prepare_for_training(SMFNet("tiny")), [], []
    for m in model.modules():
        if type(m).__name__ == "TransformerBlock":
            m.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
        if isinstance(m, torch.nn.Conv2d):
            m.register_forward_hook(lambda _, __, out: wide.append(out.dtype == torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        model(**scene(0), stage=1)
    assert set(seen) == {torch.float32}
    assert 0.2 < sum(wide) / len(wide) < 0.8


class Watch(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reading", ["ordered_classes", "foreground"])
@pytest.mark.parametrize("stage", [1, 2])
def test_nothing_that_cannot_repeat_is_called(stage, reading):
    """Forward and backward, with every term: no padding by `F.pad`, no median."""
    torch.manual_seed(0)
    model, r = prepare_for_training(SMFNet("tiny")).train(), recipe("demo", reading=reading)
    assert LossWeights.preset(**r.weights).semantic > 0
    usual, repeated = Watch(), Watch()
    for watch, deterministic in ((usual, False), (repeated, True)):
        with arithmetic(deterministic=deterministic), watch:
            batch_loss(model, scene(1), r, stage)[0].backward()
    found = [[n for n in w.names if n.startswith(UNREPEATED)] for w in (usual, repeated)]
    assert found[0] and not found[1]


def test_running_totals_are_whole_numbers():
    """`cumsum` of floating-point numbers does not repeat on GPUs."""

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "cumsum":
                assert not args[0].is_floating_point()
                self.seen = True
            return func(*args, **(kwargs or {}))

    model = prepare_for_training(SMFNet("tiny"))
    with Dtypes() as watch:
        batch_loss(model, scene(1), recipe("demo"), 1)
    assert watch.seen


@pytest.mark.parametrize("stage", [1, 2])
def test_the_mode_that_repeats_computes_the_same(stage):
    """In float64 gradients differ by the order of sums alone."""
    batch = {k: v[..., :32, :48].double() for k, v in scene(2).items()}
    gradients = []
    for deterministic in (False, True):
        torch.manual_seed(0)
        model = prepare_for_training(SMFNet("tiny").double().train())
        with arithmetic(deterministic=deterministic):
            batch_loss(model, batch, recipe("demo"), stage)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 1e-12 * gradients[0].norm()


def test_fusing_never_uses_tf32(monkeypatch):
    """Whatever the process allows: inside `fuse` it is off, afterwards as before."""
    model, seen = prepare_for_inference(SMFNet.from_pretrained("tiny")), []
    norm = torch.nn.functional.layer_norm

    def watched(*args, **kwargs):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return norm(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", watched)
    with arithmetic(tf32=True):
        model.fuse(**scene(0))
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    assert set(seen) == {(False, False)}


def test_memory_that_pytorch_keeps_counts_as_free(monkeypatch):
    """Cached blocks can be used again without asking the driver."""
    numbers = {"memory_reserved": 700, "memory_allocated": 200, "mem_get_info": (1000, 9000)}
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert tiles.free_memory("cuda") == 1500
