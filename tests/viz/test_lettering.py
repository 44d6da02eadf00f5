"""Names in pictures: whatever their characters, pictures are drawn without a warning, and the letters are visible."""

import warnings
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from segjax.data import specs
from segjax.viz import lettering, overlay, pictures

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
# A letter that DejaVu Sans has not, and a font of matplotlib's that has it.
RARE, ITS_FONT = "\u2a03", FONTS / "STIXGeneral.ttf"
NAMES = (
    *("US$ or A$", "$x^$", "$\\frac{a}", "a_b^{c}", "\\alpha", "100 %", "_hidden", "", " "),
    *("a\nof two", "tab\there\r", "\x1b[2Jred", "\udc80bytes", "\u202eevil", "zero\u200bwidth", "\ud800"),
    *("道路", "🚗 car", "طريق", "मार्ग", "Straße", "x" * 3000, "道" * 3000, "</script>&\u2028"),
)


def make_spec(names):
    colors = [tuple(color) for color in np.random.default_rng(0).integers(0, 255, (len(names), 3)).tolist()]
    return specs.DatasetSpec("$noise\n", tuple(names), tuple(colors), 255)


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def only_matplotlibs_fonts(monkeypatch):
    """As on a machine without fonts of other scripts."""
    monkeypatch.setattr(lettering, "_installed", lambda: (FONTS / "DejaVuSerif.ttf", ITS_FONT))
    lettering._found.cache_clear()
    yield
    lettering._found.cache_clear()


def images(seed, names):
    rng = np.random.default_rng(seed)
    labels = (np.arange(3 * 50 * 110).reshape(3, 50, 110) % len(names)).astype(np.uint8)
    return rng.integers(0, 256, (3, 50, 110, 3), dtype=np.uint8), labels


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.usefixtures("only_matplotlibs_fonts")
def test_pictures_are_drawn_for_any_names_of_classes_and_images(name, tmp_path):
    spec = make_spec([name, "car"])
    pixels, labels = images(1, spec.label_names)
    pictures.save_prediction(tmp_path / "p.png", pixels[0], labels[0], labels[1], spec, title=name)
    pictures.save_samples(tmp_path / "s.png", pixels, labels, spec, titles=[name, f"{name}   50x110", "other"])
    pictures.save_confusion(tmp_path / "c.png", np.array([[5, 1], [2, 3]]), spec)
    widths = [cv2.imread(str(tmp_path / file)).shape[1] for file in ("p.png", "s.png", "c.png")]
    assert widths[0] == 1260 and widths[1] == 1728 and widths[2] < 1000
    for still in (True, False):
        assert overlay.over(pixels[0], labels[0], spec, still=still).shape[1] == overlay.NARROWEST
        assert overlay.side_by_side(pixels[0], labels[0], spec, still=still).shape[1] == overlay.NARROWEST


@pytest.mark.usefixtures("only_matplotlibs_fonts")
def test_every_text_of_a_figure_is_drawn_in_a_font_that_has_its_letters(tmp_path, monkeypatch):
    figures, save = [], pictures._save
    monkeypatch.setattr(pictures, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    spec = make_spec([*NAMES, RARE])
    pixels, labels = images(2, spec.label_names)
    pictures.save_samples(tmp_path / "s.png", pixels, labels, spec, titles=["$x^$", "a\nb", f"{RARE} 道"])
    pictures.save_confusion(tmp_path / "c.png", np.eye(len(spec.label_names), dtype=int), spec)
    pictures.save_curves(tmp_path / "l.png", [{"step": 1, "loss": 1e-9}, {"step": 2, "loss": 2e-9, "mean_iou": 0.5}])
    texts = [text for figure in figures for text in figure.findobj(Text) if text.get_text()]
    assert len(texts) > 3 * len(NAMES)
    for text in texts:
        assert not text.get_parse_math() and not text.get_usetex()
        assert lettering._has_all(Path(text.get_fontproperties().get_file()), text.get_text()), text
    drawn = {text.get_text() for text in texts}
    assert {"US$ or A$", "$x^$", "a\\nof two", "\\x1b[2Jred", "_hidden", "Straße", RARE} <= drawn
    # No font has both letters, and the common one has neither.
    assert "\\u2a03 \\u9053" in drawn


@pytest.mark.usefixtures("only_matplotlibs_fonts")
def test_only_a_name_without_a_font_is_replaced_by_its_number():
    assert not FT2Font(str(FONTS / "DejaVuSans.ttf")).get_char_index(ord(RARE))
    assert lettering.class_names(make_spec(["road", "道路", RARE, ""])) == ["road", "class 1", RARE, "class 3"]
    assert lettering.font_of(RARE) == ITS_FONT and lettering.font_of("road").name == "DejaVuSans.ttf"


def test_fonts_of_boxes_and_symbols_are_never_used():
    installed = {font.name for font in lettering._installed()}
    assert "DejaVuSerif.ttf" in installed
    assert not installed & {"LastResortHE-Regular.ttf", "cmsy10.ttf", "cmmi10.ttf", "STIXNonUni.ttf"}


@pytest.mark.usefixtures("only_matplotlibs_fonts")
def test_the_legend_of_an_overlay_draws_the_letters_of_its_names():
    """A legend differs from that of a blank name, and not from that of the text that is drawn instead."""

    def legend(name):
        pixels, labels = images(3, ["one"])
        return overlay.over(pixels[0], labels[0], make_spec([name, "car"]))

    np.testing.assert_array_equal(legend("a\nb"), legend("a\\nb"))
    np.testing.assert_array_equal(legend("道路"), legend("class 0"))
    assert (legend("$x$") != legend("class 0")).any() and (legend(RARE) != legend("road")).any()
