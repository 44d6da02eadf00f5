"""A small model of every family, and the properties that tests need.

Sizes are such that a test takes seconds, and every stage, ratio and head count differs from its neighbours.
"""

import dataclasses
import re

import pytest

_MIT = dict(dims=(8, 16, 20, 32), depths=(2, 1, 1, 1))
_HRNET = dict(width=6, stage1_channels=8, stage_modules=(1, 1, 2, 1), stage_blocks=(2, 1, 1, 2))
# Batch and (height, width): wide, odd, and not even near a multiple of 32.
_ANY = ((2, (64, 96)), (3, (65, 97)), (2, (40, 136)))
_MULTIPLES = ((2, (64, 96)), (3, (96, 32)), (2, (32, 160)))
NUM_CLASSES = 7


@dataclasses.dataclass(frozen=True)
class Subject:
    """A narrow model.

    Attributes:
      name: in `segjax.MODELS`. sizes: overrides that make it narrow.
      inputs: batch and (height, width) of its inputs.
      still: overrides that switch off whatever is random in training.
      without_gradient: regular expression of parameters whose gradient in training is zero: what is added to whole
        channels in front of a BatchNorm, which takes it out again. What either side computes for it is rounding.
      without_gradient_ever: the same in evaluation too: what a softmax takes out, but for what a ReLU stops.
      many_relus: whether float32 trajectories part by themselves: a ReLU input within rounding of zero passes on one
        side only, and so many ReLUs meet one in a few steps.
      full: names whose full width is compared, in the plain tier and in the slow one.
    """

    name: str
    sizes: dict
    inputs: tuple = _ANY
    still: tuple[str, ...] = ("drop_path_rate", "dropout_rate")
    without_gradient: str = "(?!)"
    without_gradient_ever: str = "(?!)"
    many_relus: bool = False
    full: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()

    def is_idle(self, key: str, *, training: bool) -> bool:
        """Whether the true gradient of a parameter is zero."""
        patterns = [self.without_gradient_ever] + [self.without_gradient] * training
        return any(re.fullmatch(pattern, key) for pattern in patterns)

    @property
    def fixed(self) -> dict:
        """`sizes` and nothing random."""
        return self.sizes | dict.fromkeys(self.still, 0.0)


SUBJECTS = {
    "segformer": Subject(
        "segformer_b0",
        _MIT | dict(decoder_dim=24),
        without_gradient=r"decode_head\.linear_c\d\.proj\.bias|backbone\.norm4\.bias",
        full=("segformer_b0",),
        slow=("segformer_b2", "segformer_b5"),
    ),
    "plain, conv": Subject(
        "segformer_plain_b0", _MIT | dict(decoder_dim=24, fuse="conv"), slow=("segformer_plain_b5",)
    ),
    "plain, conv_bn": Subject(
        "segformer_plain_b0",
        _MIT | dict(decoder_dim=24, fuse="conv_bn"),
        without_gradient=r"decode_head\.linear_(c\d\.proj|fuse)\.bias|backbone\.norm4\.bias",
    ),
    "mmseg": Subject(
        "segformer_mmseg_b0",
        _MIT | dict(decoder_dim=24),
        without_gradient=r"backbone\.norm4\.bias",
        slow=("segformer_mmseg_b5",),
    ),
    "simple": Subject(
        "segformer_simple",
        _MIT | dict(mlp_ratios=(2, 3, 4, 5), decoder_dim=24),
        inputs=_MULTIPLES,
        still=(),
        full=("segformer_simple",),
    ),
    "zuppichini": Subject(
        "segformer_zuppichini",
        _MIT | dict(num_heads=(1, 2, 5, 8), mlp_ratios=(2, 3, 4, 5), decoder_dim=24),
        inputs=_MULTIPLES,
        still=("drop_path_rate",),
        slow=("segformer_zuppichini",),
    ),
    "hrnet": Subject(
        "hrnet_w18",
        _HRNET,
        still=(),
        without_gradient=r"last_layer\.0\.bias",
        many_relus=True,
        slow=("hrnet_w18", "hrnet_w48"),
    ),
    "hrnet, corners": Subject(
        "hrnet_w18", _HRNET | dict(align_corners=True), still=(), without_gradient=r"last_layer\.0\.bias"
    ),
    "ocr": Subject(
        "hrnet_w18_ocr",
        _HRNET | dict(ocr_channels=24, ocr_key_channels=12),
        still=("dropout_rate",),
        without_gradient=r"(aux_head|conv3x3_ocr)\.0\.bias",
        # Moves all keys alike.
        without_gradient_ever=r".*f_object\.3\.0\.bias",
        many_relus=True,
        slow=("hrnet_w48_ocr",),
    ),
    "segnext": Subject(
        "segnext_t",
        _MIT | dict(mlp_ratios=(2, 3, 4, 5), ham_channels=64, ham_rank=8),
        without_gradient=r"backbone\.patch_embed(1\.proj\.[03]|[234]\.proj)\.bias",
        full=("segnext_t",),
        slow=("segnext_l",),
    ),
}
# All but the one that differs from another by how it resizes alone.
FAMILIES = {name: subject for name, subject in SUBJECTS.items() if name != "hrnet, corners"}
# Compared with the reference at once; the others, which goldens hold to the original code at once, in the slow tier.
AT_ONCE = ("segformer", "mmseg", "hrnet", "segnext")


def each(subjects: dict[str, Subject], at_once: tuple[str, ...] = AT_ONCE):
    """Parametrises a test by subject."""
    marked = [
        pytest.param(subject, id=name, marks=[] if name in at_once else [pytest.mark.slow])
        for name, subject in subjects.items()
    ]
    return pytest.mark.parametrize("subject", marked)
