"""Names in pictures: on one line, of limited length, in a font that has their letters.

Matplotlib and Pillow both draw text with fonts from files, so both use the same font for a name.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from segjax.data import specs
from segjax.runtime import console

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST = 32  # columns of the name of a class or an image; the middle of longer names is omitted
# Fonts without letters: symbols in other encodings, boxes or empty glyphs for every character, and coloured bitmaps.
_NO_LETTERS = ("cm", "stixsize", "stixnonunicode", "last resort", "adobe blank")


def class_names(spec: specs.DatasetSpec) -> list[str]:
    """The names of all labels, in order; "class K" replaces a blank name, or one with letters that no font has."""
    names = (console.one_line(name, most=LONGEST) for name in spec.label_names)
    return [name if name.strip() and _found(name) else f"class {label}" for label, name in enumerate(names)]


def one_line(text: str, *, most: int) -> str:
    """Text of at most `most` columns. If no font has all its letters, escapes replace those not in the default font."""
    text = console.one_line(text, most=most)
    if _found(text):
        return text
    return "".join(c if _has_all(_default(), c) else c.encode("unicode_escape").decode() for c in text)


def font_of(text: str) -> Path:
    """The file of the first font with every letter of a text: DejaVu Sans, or else an installed font.

    Without such a font it is DejaVu Sans. The results of `class_names` and `one_line` always have a font.
    """
    return _found(text) or _default()


@functools.lru_cache(maxsize=4096)
def _found(text: str) -> Path | None:
    if _has_all(_default(), text):
        return _default()
    return next((font for font in _installed() if _has_all(font, text)), None)


def letter(figure: Figure) -> None:
    """Makes a figure draw all its texts verbatim, without `$` as formulas, each in a font with its letters."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_usetex(False)
        text.set_fontproperties(FontProperties(fname=font_of(text.get_text()), size=text.get_fontsize()))


@functools.cache
def _default() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@functools.cache
def _installed() -> tuple[Path, ...]:
    """The fonts of matplotlib and of the system; upright sans-serif fonts of regular weight come first."""
    from matplotlib.font_manager import fontManager

    def order(font) -> tuple:
        weight = font.weight if isinstance(font.weight, int) else 400
        return font.style != "normal", abs(weight - 400), "sans" not in font.name.lower(), font.fname

    fonts = [
        font
        for font in fontManager.ttflist
        if not font.name.lower().startswith(_NO_LETTERS) and "color" not in font.name.lower()
    ]
    return tuple(dict.fromkeys(Path(font.fname) for font in sorted(fonts, key=order)))


def _has_all(font: Path, text: str) -> bool:
    opened = _opened(font)
    return opened is not None and all(map(opened.get_char_index, map(ord, text)))


@functools.cache
def _opened(font: Path):
    from matplotlib.ft2font import FT2Font

    try:
        return FT2Font(str(font))
    except (OSError, RuntimeError, ValueError):
        # The font is damaged, or was uninstalled after matplotlib listed it.
        return None
