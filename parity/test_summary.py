"""The counts of `segjax.summary` against torch's FLOP counter and hooks on PyTorch models."""

from collections import Counter

import pytest
import torch
from segformer_pytorch import Segformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segjax.models.summary import modelsummary, summarise
from segjax.torch_reference import (
    hrnet,
    segformer,
    segformer_mmseg,
    segformer_plain,
    segformer_simple,
    segformer_zuppichini,
    segnext,
)

NUM_CLASSES = 7
MIT = dict(dims=(8, 16, 20, 32), depths=(2, 1, 3, 1), decoder_dim=24)
STAGED = dict(stage_modules=(1, 1, 2, 1), stage_blocks=(2, 1, 1, 2))
# Size, settings that both sides take alike, and the reference. Odd sizes where the model has no say in them.
FAMILIES = {
    "segformer_b0": ((65, 97), MIT, segformer.SegFormer),
    "segformer_plain_b0": ((65, 97), MIT, segformer_plain.SegFormerPlain),
    "segformer_mmseg_b0": ((40, 136), MIT, segformer_mmseg.SegFormerMMSeg),
    "segformer_simple": ((64, 96), MIT, segformer_simple.SegFormerSimple),
    "segformer_zuppichini": ((64, 96), MIT | dict(num_heads=(1, 2, 5, 8)), segformer_zuppichini.SegFormerZuppichini),
    "hrnet_w18": ((65, 97), STAGED | dict(width=6), hrnet.HRNet),
    "hrnet_w18_ocr": ((65, 97), STAGED | dict(width=6, ocr_channels=24, ocr_key_channels=10), hrnet.HRNetOCR),
    "segnext_t": (
        (65, 97),
        dict(dims=(8, 16, 20, 32), depths=(2, 1, 3, 1), ham_channels=64, ham_rank=12),
        segnext.SegNeXt,
    ),
}


def on_meta(make, size, **settings):
    """An evaluating model and an image of `size`, of shapes alone."""
    with torch.device("meta"):
        return make(num_classes=NUM_CLASSES, **settings).eval(), torch.zeros(1, 3, *size)


def flops_by_operator(network, image):
    counter = FlopCounterMode(display=False)
    with counter:
        network(image)
    counts = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    assert sum(counts.values()) == counter.get_total_flops()
    return counts


@pytest.mark.parametrize("name", FAMILIES)
def test_multiply_adds_are_half_the_flops_that_torch_counts(name):
    size, settings, make = FAMILIES[name]
    flops = flops_by_operator(*on_meta(make, size, **settings))
    ours = summarise(name, size, NUM_CLASSES, **settings)
    assert sum(flops.values()) == 2 * ours.total_multiply_adds
    # And kind by kind, as far as torch's operators tell them apart; a linear layer of a view becomes mm, not addmm.
    counted = ours.multiply_adds
    convolutions = sum(counted[kind] for kind in counted if kind.endswith("convolution"))
    products = counted["attention"] + counted["object_gathering"] + counted["nmf"]
    assert flops.pop("aten.convolution") == 2 * convolutions
    assert flops.pop("aten.addmm", 0) + flops.pop("aten.mm", 0) == 2 * counted["linear"]
    assert flops.pop("aten.bmm", 0) == 2 * products
    assert not flops


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_those_of_the_reference(name):
    size, settings, make = FAMILIES[name]
    network, _ = on_meta(make, size, **settings)
    assert summarise(name, size, NUM_CLASSES, **settings).parameters == sum(p.numel() for p in network.parameters())


def published_tool(network, image, names):
    """jo-jstrm/segmentation_pytorch's summary as its figures show it to be: calls, parameters, multiply-adds.

    Args:
      names: what that repository calls a class of `network`; None for one that it does not have.
    """
    calls, totals = Counter(), Counter()

    def note(module, inputs, output):
        called = names.get(type(module).__name__, type(module).__name__)
        if called is None:
            return
        calls[called] += 1
        if any(part in called for part in ("Conv", "BatchNorm", "Linear")):
            totals["parameters"] += sum(p.numel() for p in module.parameters())
        if isinstance(module, nn.Conv2d):
            totals["multiply_adds"] += module.weight.numel() * output.shape[2] * output.shape[3]
        elif isinstance(module, nn.Linear):
            totals["multiply_adds"] += output.numel() * inputs[0].size(1)

    for module in network.modules():
        if module is not network and not isinstance(module, nn.Sequential | nn.ModuleList):
            module.register_forward_hook(note)
    network(image)
    return calls, totals


def assert_published(ours, calls, totals, *, without=()):
    assert {name: count for name, count in ours.layers.items() if name not in without} == calls
    assert (ours.parameters, ours.multiply_adds) == (totals["parameters"], totals["multiply_adds"])


@pytest.mark.parametrize("fuse", ["conv", "conv_bn"])
def test_the_published_counts_of_the_plain_segformer_are_those_of_hooks(fuse):
    names = {
        "MixTransformer": None,
        "PlainHead": None,
        "EfficientSelfAttention": "Attention",
        "DepthwiseConv": "DWConv",
        "MixFFN": "Mlp",
        "Projection": "LinearMLP",
    }
    size, settings = (65, 97), dict(MIT, depths=(3, 6, 10, 3), fuse=fuse)
    network, image = on_meta(segformer_plain.SegFormerPlain, size, **settings)
    calls, totals = published_tool(network, image, names)
    # The published code has an Identity for a drop path of rate 0; the reference has the first two of them as DropPath.
    calls["Identity"] = sum(2 for m in network.modules() if isinstance(m, segformer.DropPath) and m.rate == 0)
    calls["DropPath"] -= calls["Identity"]
    ours = modelsummary("segformer_plain_b5", size, NUM_CLASSES, **settings)
    assert_published(ours, calls, totals, without=("Dropout", "GELU"))  # functions, or absent, in the reference
    assert (ours.layers["Dropout"], ours.layers["GELU"]) == (4 * 22, 22)


def test_the_published_counts_of_the_simple_segformer_are_the_packages():
    size = (64, 96)
    settings = dict(dims=(8, 16, 20, 32), decoder_dim=24, num_classes=NUM_CLASSES)
    network = Segformer(heads=(1, 2, 5, 8), ff_expansion=(8, 8, 4, 4), num_layers=2, **settings).eval()
    calls, totals = published_tool(network, torch.zeros(1, 3, *size), {})
    ours = modelsummary("segformer_simple", size, depths=(2, 2, 2, 2), **settings)
    assert_published(ours, calls, totals)


def test_the_published_counts_of_hrnet_are_those_of_hooks():
    size, settings, make = FAMILIES["hrnet_w18"]
    network, image = on_meta(make, size, **settings)
    calls, totals = published_tool(network, image, {"Identity": None, "ReLU": None})
    ours = modelsummary("hrnet_w18", size, NUM_CLASSES, **settings)
    assert_published(ours, calls, totals, without=("ReLU",))  # mostly a function in the reference
