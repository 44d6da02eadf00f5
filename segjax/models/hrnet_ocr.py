"""HRNet with object-contextual representations: every pixel attends to a summary of each class.

Yuan, Chen, Wang: "Object-Contextual Representations for Semantic Segmentation", ECCV 2020, arXiv:1909.11065, on the
backbone of `hrnet.py`. A first, auxiliary classification locates each class; its softmax over all pixels gathers one
vector per class; attention from pixels to classes distributes these vectors to the pixels. Attribute names are the keys
of the published checkpoints (HRNet/HRNet-Semantic-Segmentation, branch HRNet-OCR). Logits and auxiliary logits
(`taps["aux_logits"]`) are trained together, the auxiliary loss with a weight of 0.4.

Initial weights: those of `hrnet.py` in the backbone, torch's defaults in the OCR layers.

Deviations: none in the results. The auxiliary head's 1x1 convolution over the concatenated branches runs in the
equal, cheaper order of `layers.conv1x1_of_resized`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from segjax import layers
from segjax.models import hrnet
from segjax.models.hrnet import HighResolutionNet, batch_norm

# The authors' OCR models align corners; mmsegmentation's do not.
VARIANTS = {name: sizes | dict(align_corners=True) for name, sizes in hrnet.VARIANTS.items()}

TORCH_INIT: dict[str, Any] = dict(kernel_init=layers.fan_in_init, bias_init=layers.fan_in_bias_init)


def conv_bn_relu(
    in_channels: int, out_channels: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
) -> tuple[layers.Conv, layers.Sequential]:
    """1x1 convolution without bias, then BatchNorm and ReLU in a Sequential, as the keys of checkpoints nest them."""
    kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
    convolution = layers.Conv(
        in_channels, out_channels, 1, use_bias=False, kernel_init=layers.fan_in_init, rngs=rngs, **kinds
    )
    return convolution, layers.Sequential([batch_norm(out_channels, **kinds), layers.ReLU()])


def gather_objects(features: jax.Array, aux_logits: jax.Array) -> jax.Array:
    """One vector per class, the mean of all pixels weighted by softmax over pixels (eq. 2): (B, K, 1, C)."""
    B, H, W, C = features.shape
    shares = jax.nn.softmax(aux_logits.reshape(B, H * W, -1), axis=1).astype(features.dtype)  # (B, N, K)
    return jnp.einsum("bnk,bnc->bkc", shares, features.reshape(B, H * W, C))[:, :, None, :]


class ObjectAttention(nnx.Module):
    """Attention of pixels (B, H, W, C) to classes (B, K, 1, C) -> context (B, H, W, C) (eq. 3 to 5)."""

    def __init__(self, channels: int, key_channels: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        def twice():
            return layers.Sequential(
                [*conv_bn_relu(channels, key_channels, **kinds), *conv_bn_relu(key_channels, key_channels, **kinds)]
            )

        self.f_pixel = twice()
        self.f_object = twice()
        self.f_down = layers.Sequential(conv_bn_relu(channels, key_channels, **kinds))
        self.f_up = layers.Sequential(conv_bn_relu(key_channels, channels, **kinds))

    def __call__(self, features: jax.Array, objects: jax.Array) -> jax.Array:
        B, H, W, _ = features.shape
        query = self.f_pixel(features).reshape(B, H * W, -1)[:, None]  # (B, 1, N, D)
        key, value = self.f_object(objects), self.f_down(objects)  # (B, K, 1, D)
        key, value = (x.transpose(0, 2, 1, 3) for x in (key, value))  # (B, 1, K, D)
        context = layers.attention(query, key, value)  # (B, 1, N, D)
        return self.f_up(context[:, 0].reshape(B, H, W, -1))


class SpatialOCR(nnx.Module):
    """Fuses the pixels' features with their context: (B, H, W, C), (B, K, 1, C) -> (B, H, W, C)."""

    def __init__(
        self,
        channels: int,
        key_channels: int,
        *,
        dropout_rate: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.object_context_block = ObjectAttention(channels, key_channels, rngs=rngs, **kinds)
        self.conv_bn_dropout = layers.Sequential(
            [*conv_bn_relu(2 * channels, channels, rngs=rngs, **kinds), layers.Dropout2d(dropout_rate, rngs=rngs)]
        )

    def __call__(self, features: jax.Array, objects: jax.Array) -> jax.Array:
        context = self.object_context_block(features, objects)
        return self.conv_bn_dropout(jnp.concatenate([context, features], axis=-1))


class HRNetOCR(HighResolutionNet):
    """HRNet with OCR: normalised images (B, H, W, C) -> logits (B, ⌈H/4⌉, ⌈W/4⌉, K) and taps.

    The taps are `feature0..feature3`, the branches, and `aux_logits`, of the shape of the logits.

    Args:
      num_classes: Number of classes K.
      width: Channels of the branch with the highest resolution.
      ocr_channels: Channels of the pixel features.
      ocr_key_channels: Channels of queries and keys.
      dropout_rate: Probability of dropping a channel before the classifier.
      dtype: Dtype of the computation.
      param_dtype: Dtype of the stored parameters.
      rngs: Random streams `params` and `dropout`.
      **settings: Other arguments of `hrnet.HRNet`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax import models
      >>> images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
      >>> logits, taps = jax.eval_shape(lambda x: models.create("hrnet_w18_ocr", num_classes=5)(x), images)
      >>> logits.shape, taps["aux_logits"].shape
      ((2, 16, 24, 5), (2, 16, 24, 5))
    """

    def __init__(
        self,
        *,
        num_classes: int,
        width: int,
        ocr_channels: int = 512,
        ocr_key_channels: int = 256,
        dropout_rate: float = 0.05,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        super().__init__(width=width, rngs=rngs, **kinds, **settings)
        total = 15 * width
        biased: dict[str, Any] = dict(rngs=rngs, **kinds, **TORCH_INIT)
        self.conv3x3_ocr = layers.Sequential(
            [layers.Conv(total, ocr_channels, 3, padding=1, **biased), batch_norm(ocr_channels, **kinds), layers.ReLU()]
        )
        self.ocr_distri_head = SpatialOCR(ocr_channels, ocr_key_channels, dropout_rate=dropout_rate, rngs=rngs, **kinds)
        self.cls_head = layers.Conv(ocr_channels, num_classes, 1, **biased)
        self.aux_head = layers.Sequential(
            [
                layers.Conv(total, total, 1, **biased),
                batch_norm(total, **kinds),
                layers.ReLU(),
                layers.Conv(total, num_classes, 1, **biased),
            ]
        )

    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        maps = self.branches(images)
        upsample = self.upsample_to(maps[0].shape[1:3])
        together = jnp.concatenate([upsample(x) for x in maps], axis=-1)  # (B, H/4, W/4, 15 * width)
        convolution, norm, relu, classifier = self.aux_head
        aux_logits = layers.classify(classifier, relu(norm(layers.conv1x1_of_resized(convolution, maps, upsample))))
        features = self.conv3x3_ocr(together)
        objects = gather_objects(features, aux_logits)
        logits = layers.classify(self.cls_head, self.ocr_distri_head(features, objects))
        return logits, layers.feature_taps(maps) | {"aux_logits": aux_logits}
