"""Fonts for texts in any script: names of classes and folders may be in any language."""

from functools import lru_cache

from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, findfont, fontManager, get_font
from matplotlib.text import Text

from simclr_ddp.system import console

BOXES = "Last Resort"  # a font of matplotlib that has a box for every character


def fit_fonts(figure: Figure) -> None:
    r"""Draw each text of a figure in fonts that have its characters.

    Characters that no installed font has are replaced by escapes such as \u732b, with a warning.
    """
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        words = text.get_text()
        lacking = frozenset(words.replace("\n", "")) - characters(findfont(text.get_fontproperties()))
        if not lacking:
            continue
        families, escaped = fallback(lacking)
        text.set_fontfamily(list(dict.fromkeys([*text.get_fontfamily(), *families])))
        text.set_text("".join(f"\\u{ord(c):04x}" if c in escaped else c for c in words))


@lru_cache(256)
def characters(file: str) -> frozenset[str]:
    """Characters that a font file can draw; none if it can't be used."""
    try:
        font = get_font(file)
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (RuntimeError, OSError, ValueError):
        return frozenset()


@lru_cache(256)
def fallback(lacking: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Choose installed fonts that have these characters; return their names and the characters that none has."""

    def plain_first(entry: FontEntry) -> tuple[bool, bool, str]:
        return entry.style != "normal" or entry.weight not in (400, "normal"), "Sans" not in entry.name, entry.name

    families = []
    for entry in sorted(fontManager.ttflist, key=plain_first):
        found = lacking & characters(entry.fname) if lacking and not entry.name.startswith(BOXES) else frozenset()
        if found:
            families.append(entry.name)
            lacking -= found
    if lacking:
        shown = "".join(sorted(lacking)[:10]).encode(errors="backslashreplace").decode()
        console.warn(
            f"no installed font has the characters {shown}{' ...' * (len(lacking) > 10)}, which plots show as "
            f"{ascii(min(lacking))[1:-1]}; install one, such as fonts-noto-cjk for Chinese, Japanese and Korean"
        )
    return families, lacking
