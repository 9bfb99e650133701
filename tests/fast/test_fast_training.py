"""A network prepared for training computes what it computes as written; nothing else about it changes."""

import copy
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from smfnet.core.checks import toy_pair
from smfnet.fast.prepared import prepare_for_inference
from smfnet.fast.training import FAST, as_written, joined_kernel, prepare_for_training
from smfnet.fusion.onnx import ExportableFusion
from smfnet.losses.stages import stage2_loss
from smfnet.network.attention import MDTA, DenseMDTA, TransformerBlock
from smfnet.network.cai import CrossAttention
from smfnet.network.model import SMFNet

VARIANTS = [
    {},
    {"edge_gating": "channel_interleaved"},
    {"base": "stacked"},
    {"detail": "inn"},
    {"graph": False},
    {"exchange": True},
]
name = lambda options: "-".join(map(str, options.values())) or "published"


def network(seed=0, preset="tiny", **options):
    """A network in training mode in which nothing is zero, with statistics that have moved."""
    torch.manual_seed(seed)
    model = SMFNet(preset, **options).train()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.fill_(0.3)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.uniform_(-0.2, 0.2)
                m.running_var.uniform_(0.5, 2)
    return model


def pair(h=20, w=26, batch=2, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.rand(batch, 1, h, w, generator=g, dtype=torch.float64).to(dtype) for k in ("vis", "ir")}


def step(model, images, stage=2):
    """All outputs, and the gradient of every parameter of a randomly weighted sum of them."""
    g = torch.Generator().manual_seed(1)
    outs = model(**images, stage=stage)
    weights = {k: torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for k, x in outs.items()}
    model.zero_grad()
    sum((weights[k] * x).sum() for k, x in outs.items()).backward()
    return outs, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def distance(found, expected):
    """Largest difference of two dictionaries of tensors, each relative to its largest value."""
    assert found.keys() == expected.keys()
    return max(((found[k] - x).abs().max() / x.abs().max()).item() for k, x in expected.items())


def classes(model):
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize("options", VARIANTS, ids=name)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_float64_outputs_and_gradients(options, stage, training):
    plain = network(**options).double().train(training)
    fast = prepare_for_training(copy.deepcopy(plain))
    assert classes(fast) != classes(plain)
    outs, gradients = (distance(a, b) for a, b in zip(step(fast, pair(), stage), step(plain, pair(), stage)))
    assert outs < 1e-12 and gradients < 1e-10  # a gradient sums over pixels and layers, with cancellation


def test_statistics_move_alike():
    plain = network().double()
    fast = prepare_for_training(copy.deepcopy(plain))
    for model in (plain, fast):
        model(**pair())
    for (key, a), b in zip(plain.named_buffers(), fast.buffers()):
        assert_close(b, a, atol=1e-12, rtol=1e-12, msg=key)


def own_error_decides(step, plain, images):
    """Rounding decides what differs in float32: ours is not much further from float64 than the network."""
    fast, exact = prepare_for_training(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    reference = step(exact, images)
    images = {k: x.float() for k, x in images.items()}
    for ours, its, true in zip(step(fast, images), step(plain, images), reference):
        assert distance(ours, true) < 4 * distance(its, true) + 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_float32_outputs(seed):
    """Outputs only: the slope of a LeakyReLU jumps at 0, so a gradient need not be near that of float64."""
    outputs = lambda model, images: [{k: x.detach() for k, x in model(**images).items()}]
    own_error_decides(outputs, network(seed), pair(seed=seed))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [MDTA, DenseMDTA, CrossAttention])
def test_float32_gradients(kind, seed):
    """The exchanged modules themselves are smooth, so their gradients can be compared."""

    class Named(nn.Module):
        """The module with a named input and output."""

        def __init__(self):
            super().__init__()
            self.module = kind(16, 4)

        def forward(self, x, stage):
            return {"y": self.module(x)}

    torch.manual_seed(seed)
    own_error_decides(
        step, Named(), {"x": torch.randn(2, 32 if kind is CrossAttention else 16, 20, 26).double()}
    )


def test_paper_size():
    plain = network(preset="paper").double()
    fast = prepare_for_training(copy.deepcopy(plain))
    images = pair(16, 19, batch=1)
    outs, gradients = (distance(a, b) for a, b in zip(step(fast, images), step(plain, images)))
    assert outs < 1e-12 and gradients < 1e-10


def test_channels_last_in_memory():
    plain = network().double()
    fast = prepare_for_training(copy.deepcopy(plain)).to(memory_format=torch.channels_last)
    outs, gradients = (distance(a, b) for a, b in zip(step(fast, pair()), step(plain, pair())))
    assert outs < 1e-12 and gradients < 1e-10
    shallow = fast(**pair())["ir_shallow"]
    assert shallow.is_contiguous(memory_format=torch.channels_last)


def test_what_stays():
    model = network()
    names, parameters = [n for n, _ in model.named_modules()], dict(model.named_parameters())
    state, plain = copy.deepcopy(model.state_dict()), classes(model)
    assert prepare_for_training(model) is model
    assert [n for n, _ in model.named_modules()] == names and model.state_dict().keys() == state.keys()
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert isinstance(model, SMFNet) and type(model) is SMFNet
    fast = classes(model)
    assert classes(prepare_for_training(model)) == fast
    assert all(issubclass(b, a) for a, b in zip(plain, fast))
    assert classes(as_written(model)) == plain == classes(as_written(model))


def test_every_fast_class_is_used():
    assert set(FAST.values()) <= set(classes(prepare_for_training(network())))


def test_what_is_unknown_stays_plain():
    stranger = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert classes(prepare_for_training(stranger)) == [nn.Sequential, nn.Conv2d, nn.BatchNorm2d]

    class Own(MDTA):
        "A subclass has a reason to compute in its own way."

    assert type(prepare_for_training(Own(8, 2))) is Own


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(copied):
    model = prepare_for_training(network())
    twin = copied(model)
    assert classes(twin) == classes(model)
    images = pair(dtype=torch.float32)
    assert_close(twin(**images)["fused"], model(**images)["fused"], atol=0, rtol=0)


def test_weights_go_both_ways(tmp_path):
    fast, plain = prepare_for_training(network(0)), network(1)
    plain.load_state_dict(fast.state_dict())
    fast.eval().save(tmp_path / "w.safetensors")
    loaded, images = SMFNet.load(tmp_path / "w.safetensors"), toy_pair()
    assert classes(loaded) == classes(plain)  # a file knows nothing of how its network was computed
    for model in (plain.eval(), loaded):
        assert_close(model.fuse(**images), fast.fuse(**images), atol=1e-5, rtol=0)  # as for the golden files
    fast.load_state_dict(network(1).state_dict())
    assert_close(fast.fuse(**images), network(1).eval().fuse(**images), atol=1e-5, rtol=0)


def test_it_trains_alike():
    """Three steps of plain gradient descent in float64 lead to the same weights."""
    plain = network().double()
    fast = prepare_for_training(copy.deepcopy(plain))
    for model in (plain, fast):
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
        for i in range(3):
            images = pair(seed=i)
            optimiser.zero_grad()
            stage2_loss(model(**images, stage=2), **images)[0].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimiser.step()
    assert distance(fast.state_dict(), plain.state_dict()) < 1e-9  # small differences grow from step to step


def test_under_autocast_and_frozen():
    """bfloat16 has 8 bits: both forms are close to float32 by that. Frozen parameters get no gradient."""
    plain = network().eval()
    fast, images = prepare_for_training(copy.deepcopy(plain)), pair(dtype=torch.float32)
    exact = plain.fuse(**images)
    with torch.autocast("cpu", torch.bfloat16):
        for model in (plain, fast):
            assert (model.fuse(**images).float() - exact).abs().max() < 0.05
    fast.train().encoder.requires_grad_(False)
    _, gradients = step(fast, images)
    assert gradients and not any(k.startswith("encoder.") for k in gradients)


def test_compiled_like_any_module():
    """`torch.compile` traces it without a break; the compiler itself is left out of this."""
    for block in (MDTA(8, 2), DenseMDTA(8, 2)):
        fast, x = prepare_for_training(block), torch.randn(1, 8, 9, 7)
        compiled = torch.compile(fast, backend="eager", fullgraph=True)
        assert_close(compiled(x), fast(x))


def test_prepared_inference_reads_either_form():
    plain = network().eval()
    fused = prepare_for_inference(plain, tile=(16, 16)).fuse(**toy_pair(33, 20))
    fast = prepare_for_training(copy.deepcopy(plain))
    assert_close(prepare_for_inference(fast, tile=(16, 16)).fuse(**toy_pair(33, 20)), fused, atol=0, rtol=0)


def test_export_reads_either_form():
    plain = network().eval()
    fast = prepare_for_training(copy.deepcopy(plain))
    before = classes(fast)
    with torch.no_grad():
        a, b = (ExportableFusion(m)(**toy_pair(17, 24)) for m in (plain, fast))
    assert_close(a, b, atol=0, rtol=0)
    assert classes(fast) == before


def test_joined_kernel_is_both_convolutions():
    torch.manual_seed(0)
    attention = TransformerBlock(8, 2, "T2").attention.double()
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    for size in (1, 2):  # also for a padded map of one row
        y = x[:, :, :size]
        joined = nn.functional.conv2d(y, joined_kernel(attention), padding=1)
        assert_close(joined, attention.local(attention.qkv(y)), atol=1e-12, rtol=0)


ALLOCATOR = """
import sys
from smfnet.network import SMFNet
model = SMFNet("tiny")
assert not any(name.startswith("smfnet.fast") for name in sys.modules), "the network room leans on fast"
from smfnet.fast.training import prepare_for_training
prepare_for_training(model)
from smfnet.fast.memory import keep_freed_memory
assert keep_freed_memory.cache_info().misses == 0, "somebody changed the allocator"
"""


def test_building_and_preparing_leave_the_allocator_alone():
    done = subprocess.run([sys.executable, "-c", ALLOCATOR], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_ask_for_the_allocator(monkeypatch, tmp_path):
    """`smfnet fuse` and `smfnet video` do, `smfnet evaluate` does not."""
    from smfnet import cli

    asked = []
    monkeypatch.setattr(cli, "keep_freed_memory", partial(asked.append, True))
    missing = str(tmp_path / "missing")
    for command in ("fuse", "video", "evaluate"):
        before = len(asked)
        options = [
            f"--ir={missing}",
            f"--vis={missing}",
            f"--{'fused' if command == 'evaluate' else 'out'}={missing}",
        ]
        assert cli.main([command, *options]) == 2
        assert len(asked) - before == (command != "evaluate")


def test_the_trainer_asks_for_it(tmp_path):
    from smfnet.data.patches import LoadedPair, PatchSet
    from smfnet.training.recipes import recipe
    from smfnet.training.trainer import Trainer

    noise = np.random.default_rng(0).random((2, 40, 56), np.float32)
    data = PatchSet([LoadedPair("noise", *noise)], patch=16, stride=8)
    model = network()
    Trainer(model, data, recipe("demo", patch=16, stride=8), tmp_path)
    assert set(FAST.values()) <= set(classes(model))
