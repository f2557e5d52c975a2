"""Sentences as plain ASCII, whatever encoding or HTML they came in."""

import html
import re
import unicodedata

# Subj's tokeniser makes dashes and ellipses words of their own; 0x80-0x9f read as latin-1 are cp1252 characters.
_ASCII = {"'": "‘’‚‛´′‹›", '"': "“”„‟″«»", "-": "‐−", " -- ": "–—", " . . . ": "…", "/": "⁄", "ae": "æÆ", "oe": "œŒ"}

_ASCII |= {"o": "øØ", "ss": "ß"}

_FOLD = {ord(character): ascii_form for ascii_form, characters in _ASCII.items() for character in characters}

_FOLD |= {code: bytes([code]).decode("cp1252", "ignore").translate(_FOLD) for code in range(0x80, 0xA0)}

_ENTITY = re.compile(r"(\^ ?)?& ?(?:# ?(\d+)|([a-z](?:acute|grave|circ|uml|tilde|cedil))) ?;")


def to_ascii(text: str) -> str:
    """`text` in lower-case ASCII with single spaces, so that neither encoding nor HTML entities give the class away.

    UTF-8 read as cp1252 and entities (tokenised ones too: "&#233 ;") are decoded, cp1252 punctuation becomes what Subj
    writes for it, accents are dropped (NFKD). A character without an ASCII form is left out: a placeholder would mark
    the class, as Subj has such characters in one class only. A word that an entity broke in two stays broken.
    """
    try:
        text = text.encode("cp1252").decode("utf-8")
    except UnicodeError:
        pass  # not UTF-8 read as cp1252
    text = _ENTITY.sub(_entity, text).translate(_FOLD)
    text = unicodedata.normalize("NFKD", text).translate(_FOLD)
    return " ".join(text.encode("ascii", "ignore").decode().lower().split())


def _entity(match: re.Match) -> str:
    caret, code, name = match.groups()  # "^&#197 ;" is caret notation: byte 197 - 64
    return html.unescape(f"&#{int(code) - 64 * bool(caret)};" if code else f"&{name};")
