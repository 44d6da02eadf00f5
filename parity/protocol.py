"""mmsegmentation's test protocol in PyTorch, written from its documentation and its behaviour.

A test image goes through `Resize(scale_factor, keep_ratio=True)` of 1.x, or through 0.x's `MultiScaleFlipAug` with an
`img_scale`, which SegFormer's code on ADE20K has; `ResizeToMultiple` where a config has it, and `RandomFlip`; the data
preprocessor normalises it and pads it with zeros. `whole` and `slide` are the modes of
`EncoderDecoder`, `merge` is the test-time augmentation of `SegTTAModel`. Images are (H, W, 3) uint8 RGB, everything
after that (B, C, H, W).
"""

from __future__ import annotations

import math

import cv2
import torch
import torch.nn.functional as F

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def times(size, factor):
    """mmcv's size of an image times a factor."""
    width, height = size
    return int(width * float(factor) + 0.5), int(height * float(factor) + 0.5)


def rescale(image, factor):
    """`Resize(scale_factor=factor, keep_ratio=True)`.

    The factor gives a target size first; the image then becomes as large as that allows with its proportions kept.
    """
    height, width = image.shape[:2]
    return fit(image, times((width, height), factor))


def rescale_base(image, base, factor):
    """`MultiScaleFlipAug(img_scale=base, img_ratios=[factor], transforms=[Resize(keep_ratio=True)])`.

    The base, times the factor and cut to whole pixels, is how large the image may become; which of its two numbers
    comes first does not matter.
    """
    return fit(image, (int(base[0] * factor), int(base[1] * factor)))


def fit(image, target):
    """mmcv's `imrescale`: as large as a target of (long, short) or (short, long) allows, proportions kept."""
    height, width = image.shape[:2]
    long, short = max(height, width), min(height, width)
    new = times((width, height), min(max(target) / long, min(target) / short))
    return cv2.resize(image, new, interpolation=cv2.INTER_LINEAR)


def to_multiple(image, divisor):
    """`ResizeToMultiple(size_divisor=divisor)`, SegFormer's AlignedResize."""
    height, width = (math.ceil(side / divisor) * divisor for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def preprocess(image, dtype):
    pixels = torch.from_numpy(image.copy()).to(dtype)
    pixels = (pixels - torch.tensor(MEAN, dtype=dtype)) / torch.tensor(STD, dtype=dtype)
    return pixels.permute(2, 0, 1)[None]


def resize(x, size, align_corners):
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def whole(network, x, multiple, align_corners):
    """Logits at the size of the input, which is padded at the bottom and right for the network's sake."""
    height, width = x.shape[2:]
    padded = F.pad(x, (0, -width % multiple, 0, -height % multiple))
    with torch.no_grad():
        logits, _ = network(padded)
    return resize(logits, padded.shape[2:], align_corners)[:, :, :height, :width]


def slide(network, x, multiple, crop, stride, align_corners):
    """The mean of the logits of overlapping windows."""
    (crop_height, crop_width), (down, across) = crop, stride
    height, width = x.shape[2:]
    rows = max(height - crop_height + down - 1, 0) // down + 1
    columns = max(width - crop_width + across - 1, 0) // across + 1
    total, seen = None, torch.zeros((1, 1, height, width), dtype=x.dtype)
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * down + crop_height, height), min(column * across + crop_width, width)
            top, left = max(bottom - crop_height, 0), max(right - crop_width, 0)
            logits = whole(network, x[:, :, top:bottom, left:right], multiple, align_corners)
            if total is None:
                total = torch.zeros((1, logits.shape[1], height, width), dtype=x.dtype)
            total += F.pad(logits, (left, width - right, top, height - bottom))
            seen[:, :, top:bottom, left:right] += 1
    assert (seen > 0).all()
    return total / seen


def one_pass(
    network,
    image,
    *,
    align_corners,
    multiple,
    crop=None,
    stride=None,
    base_size=None,
    factor=1.0,
    divisor=1,
    flip=False,
):
    """Logits (1, K, H, W) at the image's own size; `align_corners` is that of the decode head, for both resizes."""
    near = rescale(image, factor) if base_size is None else rescale_base(image, base_size, factor)
    resized = to_multiple(near, divisor)
    dtype = next(network.parameters()).dtype
    x = preprocess(resized[:, ::-1] if flip else resized, dtype)
    if crop is None:
        logits = whole(network, x, multiple, align_corners)
    else:
        logits = slide(network, x, multiple, crop, stride, align_corners)
    return resize(logits.flip(3) if flip else logits, image.shape[:2], align_corners)


def merge(network, image, *, scales=(1.0,), flip=False, **settings):
    """Probabilities (K, H, W), averaged over scales and mirror images."""
    total, number = 0.0, 0
    for factor in scales:
        for flipped in (False, True) if flip else (False,):
            logits = one_pass(network, image, factor=factor, flip=flipped, **settings)[0]
            total = total + (logits.softmax(dim=0) if len(logits) > 1 else logits.sigmoid())
            number += 1
    return total / number


def labels(probabilities):
    """(K, H, W) -> (H, W), int64; of a single class, whether it is more probable than not."""
    return (probabilities[0] > 0.5).long() if len(probabilities) == 1 else probabilities.argmax(dim=0)


def confusion_matrix(truth, predicted, classes, ignore):
    """Counts (classes, classes) by truth and prediction, of torch integers of one shape."""
    valid = truth != ignore
    return torch.bincount(classes * truth[valid] + predicted[valid], minlength=classes**2).reshape(classes, classes)
