"""Words beside a number: those that multiply it, those that change or deny it, and units."""

import re
from dataclasses import dataclass


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SCALES = {
    word: value
    for value, words in (
        (12, "dozen dozens doz"),
        (100, "hundred 百"),
        (1000, "thousand thousands mil mille tausend тысяч 千"),
        (10**4, "万 萬"),
        (10**6, "million millions millionen millones миллионов"),
        (10**8, "亿 億"),
        (10**9, "billion"),
        (10**12, "trillion"),
    )
    for word in words.split()
}
"""What a word behind a number multiplies it by."""

CHANGES_THE_VALUE = _words(
    """
    or and not nor no if mod modulo base than less more most least about over minus plus point half third quarter twice
    thrice double triple factorial squared cubed root sqrt power inverse reciprocal negative negation complement
    one two three four five six seven eight nine ten eleven twelve twenty without except approximately approx roughly
    around nearly almost sin cos tan cot sec csc arcsin arccos arctan log ln exp abs floor ceil bound bounds estimate
    estimated guess wrong incorrect false other none nothing neither never cannot can't isn't but unless fewer under
    above below between unlike opposite halves thirds quarters fourths fifths sixths sevenths eighths ninths tenths
    hundredths thousandths millionths fourth fifth sixth seventh eighth ninth tenth hundredth thousandth millionth
    score scores teens is are was were be too small large primed choose divided divides
    multiplied subtracted added where when for with from until till through maybe perhaps possibly probably either both
    unknown undefined off short missing remaining infinity etc i e pi oder ou или または 또는
    """
)
"""Words that make another number, or no number, of the one beside them."""

_CHANGING_CHARACTERS = frozenset("或和不非约半倍点分成折负至到除余超少多第几无個几十打进進〇一二三四五六七八九零兆厘")
_SPOKEN = _words(
    """
    个 個 种 種 名 人 次 条 條 元 米 厘米 千米 公里 度 天 年 月 日 小时 小時 分钟 秒 分 块 本 只 岁
    平方厘米 平方米 立方厘米 円 通り 명 개 가지
    """
)
"""Units in which a changing character is none."""

_MEASURES = {
    alias: line.split()[0]
    for line in """
        mm millimeter millimeters millimetre millimetres
        cm centimeter centimeters centimetre centimetres 厘米
        dm decimeter decimeters
        m meter meters metre metres 米
        km kilometer kilometers kilometre kilometres 千米 公里
        inch in inches
        foot ft feet
        yard yd yards
        mile mi miles
        acre acres
        second s sec secs seconds 秒
        minute min mins minutes 分钟
        hour h hr hrs hours 小时 小時
        day days 天
        week weeks wk wks
        month months
        year years yr yrs 年
        degree degrees deg 度
        radian radians rad
        celsius c
        fahrenheit f
        percent percentage pct
        cent cents
        dollar dollars usd
        euro euros eur
        pound pounds lb lbs
        ounce ounces oz
        mg milligram milligrams
        gram g grams
        kilogram kg kilograms kgs
        ton tons tonne tonnes
        ml milliliter milliliters millilitre millilitres
        liter l liters litre litres
        gallon gallons
        hertz hz
        newton n newtons
        joule j joules
        watt w watts
        volt v volts
        ampere a amps
        kelvin k
    """.strip().splitlines()
    for alias in line.split()
}
_COMPOUND = {
    "mph": ("mile", "per", "hour"),
    "kmh": ("km", "per", "hour"),
    "kph": ("km", "per", "hour"),
    "rpm": ("rpm",),
}
LENGTHS = _words("mm cm dm m km inch foot yard mile unit")
"""They may be squared or cubed: `cm^2`."""
_POWERS = {"square": "^2", "squares": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
_NOTHING = _words(
    """
    a an the of in per to total altogether ordered unordered distinct different such unit units area volume length
    st nd rd th each respectively overall exactly answer answers u's le la les el los las de des du der die das
    """
)
_ONE_LETTER = frozenset("mshglNJWVKACFL")
_GLUED = _words("mm cm km kg ft th st nd rd")
_WORD = re.compile(r"[^\s/.,()\-\N{MIDDLE DOT}]+")
_POINTED = re.compile(r"\b([ap])\. ?m\.?", re.IGNORECASE)
_RAISED = re.compile(r"(?<![a-z])(mm|cm|dm|m|km|in|inch|ft|foot|feet|yd|mi|mile|s|units?)\^\{?[23]\}?")
_OVER = re.compile(r"(?:mm|cm|m|km|mi|ft|g|kg|l|ml)/(?:s|h|hr|min|l|ml)$")
_SHORT = _words(
    "men way box boy set sum row pen cat dog yen red old odd am pm rs gm lt bee ant egg pie cup jar bag car bus leg toe"
)
_LETTERS = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?")


@dataclass(frozen=True)
class Unit:
    """What was measured or counted."""

    measures: tuple[str, ...] = ()
    """Units of measurement, in one spelling: `mile per hour`, `^2 cm`."""
    things: frozenset[str] = frozenset()

    def agrees(self, other: "Unit") -> bool:
        """Whether two values may be compared as numbers: one has no unit, or both have the same."""
        if self == NO_UNIT or other == NO_UNIT:
            return True
        return self.measures == other.measures and (self.things <= other.things or other.things <= self.things)


NO_UNIT = Unit()
PERCENT = Unit(("percent",))
DEGREE = Unit(("degree",))
DOLLAR = Unit(("dollar",))


@dataclass(frozen=True)
class Tail:
    """What words behind a number make of it."""

    unit: Unit
    scale: int = 1


def read_tail(text: str, *, in_font: bool, glued: bool = False) -> Tail | None:
    r"""What words behind a number say: a unit, perhaps after words that multiply; None if they may change the number in
    another way.

    Every word that is not known to change the value is a unit, as to the graders that drop whatever `\text` holds.
    Outside of a font a single letter is a variable, and so are few letters without a known meaning.
    """
    text = _POINTED.sub(r"\1m", _RAISED.sub(r"square \1" if "2" in text else r"cubic \1", text))
    in_font = in_font or _OVER.match(text.strip()) is not None
    words = [word.lower() if len(word) > 1 else word for word in _WORD.findall(text)]
    if any(not _LETTERS.fullmatch(word) or word in CHANGES_THE_VALUE for word in words):
        return None
    if glued and not set(words) <= _GLUED and not any(not word.isascii() for word in words):
        return None
    scale = 1
    while words and words[0] in SCALES:
        scale *= SCALES[words.pop(0)]
    if words and scale == 1 and (words[0][0] in SCALES and not words[0].isascii()) and words[0] not in _MEASURES:
        scale, words[0] = SCALES[words[0][0]], words[0][1:]
    words = [word for word in words if word]
    if any(word in SCALES for word in words) or not all(_may_be_unit(word, in_font) for word in words):
        return None
    return Tail(_unit(words, "/" in text), scale)


def _may_be_unit(word: str, in_font: bool) -> bool:
    if not word.isascii():
        return word in _SPOKEN or not set(word) & _CHANGING_CHARACTERS
    if len(word) == 1:
        return word == "a" or (in_font and word in _ONE_LETTER)
    known = word in _MEASURES or word in _COMPOUND or word in _POWERS or word in _NOTHING
    return known or in_font or len(word) > 3 or word in _SHORT


def _unit(words: list[str], over: bool) -> Unit:
    measures: list[str] = []
    things = set()
    for place, word in enumerate(words):
        lower = word.lower()
        is_power = lower in _POWERS and place + 1 < len(words)
        if is_power and words[place + 1] in _MEASURES:
            measures.append(_POWERS[lower])
        elif lower in _COMPOUND:
            measures += _COMPOUND[lower]
        elif lower in _MEASURES:
            measures.append(_MEASURES[lower])
        elif lower == "per" and measures:
            measures.append("per")
        elif lower not in _NOTHING and not is_power:
            things.add(_singular(lower))
    if over and len(measures) == 2 and "per" not in measures:
        measures.insert(1, "per")
    return Unit(tuple(measures), frozenset(things))


def raised(unit: Unit, power: str, text: str) -> Unit | None:
    """The unit with a power behind it; None where it is no length."""
    words = _WORD.findall(text.lower())
    if not words or _MEASURES.get(words[-1], words[-1].removesuffix("s")) not in LENGTHS:
        return None
    return Unit((f"^{power}", *unit.measures), unit.things) if unit.measures else unit


def _singular(word: str) -> str:
    for ending, shorter in (("ies", "y"), ("ches", "ch"), ("xes", "x"), ("ices", "ex"), ("ss", "ss"), ("s", "")):
        if word.endswith(ending) and len(word) > 3:
            return word.removesuffix(ending) + shorter
    return word
