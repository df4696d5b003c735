"""Natural endings of responses: answers as models write them, in eight languages, with the label that each must equal
and another one that it must not."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from recipe.rewards import RewardType

Draw = random.Random


@dataclass(frozen=True)
class Ending:
    kind: str
    """Of value."""
    language: str
    rule: RewardType
    response: str
    label: str
    other: str
    """Another label of the same kind."""


SENTENCES = {
    "English": (
        "Therefore, the answer is $\\boxed{%s}$.",
        "**Final Answer**\n\n$$\\boxed{%s}$$",
        "Thus\n\\[\n\\boxed{%s}\n\\]",
        "So we get \\(\\boxed{%s}\\)<|endoftext|>",
        "The answer is \\fbox{%s}, as desired.",
    ),
    "Chinese": ("所以答案是 $\\boxed{%s}$。", "综上,\\[\\boxed{%s}\\]", "**答案**:$\\boxed{%s}$"),
    "Spanish": ("Por lo tanto, la respuesta es $\\boxed{%s}$.", "Respuesta final: \\[\\boxed{%s}\\]"),
    "German": ("Die Antwort ist also $\\boxed{%s}$.", "Damit folgt \\(\\boxed{%s}\\)."),
    "French": ("La réponse est donc $\\boxed{%s}$.", "On obtient $$\\boxed{%s}$$"),
    "Portuguese": ("Portanto, a resposta é $\\boxed{%s}$.",),
    "Russian": ("Итак, ответ: $\\boxed{%s}$.",),
    "Japanese": ("したがって、答えは $\\boxed{%s}$ です。",),
}
LINES = {
    "English": (
        "Answer: %s",
        "**Answer:** %s",
        "**Answer: %s**",
        "Answer: $%s$",
        "**Answer: $%s$**",
        "Final Answer: \\(%s\\)",
        "Answer: $\\boxed{%s}$",
        "**Answer:**\n\n$$\\boxed{%s}$$",
        "Answer: %s.",
        "Answer: %s<|im_end|>",
        "The final answer is below.\n\nAnswer: `%s`",
    ),
    "Chinese": ("答案:%s", "**答案\uff1a** $%s$", "答案\uff1a%s。"),
    "Spanish": ("Respuesta: %s", "**Respuesta:** $%s$"),
    "German": ("Antwort: %s",),
    "French": ("Réponse : %s",),
    "Portuguese": ("Resposta: %s",),
    "Russian": ("Ответ: %s",),
    "Japanese": ("答え:%s",),
}
UNITS = {
    "English": (
        *(
            r"%s \text{ ways}",
            r"%s\text{ lattice points}",
            r"%s \text{ residents}",
            r"%s\text{ ordered pairs}",
            r"%s^\circ",
        ),
        *(
            r"%s\text{ cm}^2",
            r"%s \text{ square units}",
            r"%s\ \mathrm{km}",
            r"%s\%%",
            r"%s\text{ red marbles}",
            r"\$%s",
        ),
        *(r"%s \text{ miles per hour}", r"%s\text{ m/s}", r"%s \text{ (ways)}", r"%s \text{ distinct triangles}"),
    ),
    "Chinese": (r"%s个", "\\text{答案\uff1a}%s", r"%s \text{ 种}", r"%s\text{ 平方厘米}", r"共%s种", r"\text{答案:}%s"),
    "Spanish": (r"%s \text{ maneras}", r"\text{Respuesta: }%s"),
    "German": (r"%s \text{ Möglichkeiten}", r"\text{Antwort: }%s"),
    "French": (r"%s \text{ façons}", r"\text{Réponse : }%s"),
    "Portuguese": (r"%s \text{ maneiras}",),
    "Russian": (r"%s \text{ способов}", r"\text{Ответ: }%s"),
    "Japanese": (r"%s \text{ 通り}", r"%s個"),
}
ORNAMENTS = (
    *(
        "%s",
        "%s",
        "%s",
        r"\mathbf{%s}",
        r"\displaystyle %s",
        r"{%s}",
        "$%s$",
        r"\;%s\;",
        "= %s",
        "**%s**",
        "%s.",
        r"%s\checkmark",
    ),
    *(r"\textcolor{blue}{%s}", r"\text{Answer: }%s", r"\textbf{(C) } %s", r"\text{(B) }%s"),
)
NAMES = (
    "x",
    "N",
    "m+n",
    "f(3)",
    "S",
    r"\angle ABC",
    "a_{10}",
    r"|AB|",
    r"\text{Area}",
    "P",
    r"\lfloor T \rfloor",
    "AB^2",
)


def _integer(draw: Draw, language: str) -> tuple[str, str, str]:
    value = draw.choice(
        [draw.randrange(1000), draw.randrange(1000), draw.randrange(-500, 0), draw.randrange(1000, 90_000)]
    )
    part = draw.randrange(1, 400)
    written = str(value) if value >= 0 else draw.choice(["-", "\u2013", "\u2212"]) + str(-value)
    if value >= 1000 and draw.random() < 0.5:
        written = f"{value:,}".replace(",", draw.choice([",", "{,}", r",\!", r"\,"]))
    ends = draw.choice(["=", "name", "ornament", "unit", "arithmetic", "remainder", "plain"])
    if ends == "=":
        written = rf"{value - part} + {part} = {written}"
    elif ends == "name":
        written = f"{draw.choice(NAMES)} = {written}"
    elif ends == "ornament":
        written = draw.choice(ORNAMENTS) % written
    elif ends == "unit":
        written = draw.choice(UNITS[language]) % written
    elif ends == "arithmetic":
        written = draw.choice(
            [rf"\frac{{{value * 3}}}{{3}}", f"{value}.0", rf"{value - part}+{part}", rf"\text{{{value}}}"]
        )
    elif ends == "remainder" and 0 <= value < 1000:
        written = (
            draw.choice([r"%s \pmod{1000}", r"N \equiv %s \pmod{1000}", r"%s \text{ (mod 1000)}", r"N \bmod 1000 = %s"])
            % value
        )
    return written, str(value), str(value + draw.choice([-10, -1, 1, 7]))


def _fraction(draw: Draw, language: str) -> tuple[str, str, str]:
    value = Fraction(draw.randrange(1, 60), draw.randrange(2, 30)) + Fraction(1, 97)
    value = Fraction(value.numerator, draw.choice([7, 8, 12, 25, 90])) if draw.random() < 0.7 else value
    p, q = value.numerator, value.denominator
    k = draw.randrange(2, 5)
    spellings = [
        rf"\frac{{{p}}}{{{q}}}",
        rf"\dfrac{{{p}}}{{{q}}}",
        f"{p}/{q}",
        rf"\frac{{{k * p}}}{{{k * q}}}",
        rf"\tfrac{{{p}}}{{{q}}}",
    ]
    if p > q > 1:
        spellings += [rf"{p // q}\frac{{{p % q}}}{{{q}}}", f"{p // q} {p % q}/{q}"]
    if 10**6 % q == 0:
        spellings.append(f"{float(value)}")
    written = draw.choice(spellings)
    if draw.random() < 0.6:
        written = draw.choice((*ORNAMENTS, *UNITS[language], *(f"{name} = %s" for name in NAMES))) % written
    sign = draw.choice(["", "", "-"])
    if sign and written == spellings[0]:
        return sign + written, f"-{p}/{q}", f"{p}/{q}"
    return written, draw.choice([rf"\frac{{{p}}}{{{q}}}", f"{p}/{q}"]), rf"\frac{{{p + 1}}}{{{q}}}"


def _root(draw: Draw, language: str) -> tuple[str, str, str]:
    a, b = draw.randrange(2, 12), draw.choice([2, 3, 5, 6, 7, 10, 11])
    spellings = [
        rf"{a}\sqrt{{{b}}}",
        rf"\sqrt{{{a * a * b}}}",
        f"{a}√{b}",
        rf"{a} \cdot \sqrt{{{b}}}",
        rf"\frac{{{a * b}}}{{\sqrt{{{b}}}}}",
    ]
    written = draw.choice(spellings)
    if draw.random() < 0.5:
        written = draw.choice([*ORNAMENTS, *(f"{name} = %s" for name in NAMES), r"%s\text{ cm}"]) % written
    return written, rf"{a}\sqrt{{{b}}}", rf"{a + 1}\sqrt{{{b}}}"


def _pi(draw: Draw, language: str) -> tuple[str, str, str]:
    a, b = draw.randrange(1, 40), draw.choice([1, 2, 3, 7])
    label = rf"\frac{{{a}\pi}}{{{b}}}"
    written = draw.choice(
        [label, rf"\frac{{{a}}}{{{b}}}\pi", rf"{a}\pi/{b}", f"{a}π/{b}", rf"\dfrac{{{2 * a}\pi}}{{{2 * b}}}"]
    )
    if draw.random() < 0.5:
        written = draw.choice([*ORNAMENTS, r"V = %s", r"%s \text{ square units}"]) % written
    return written, label, rf"\frac{{{a}\pi}}{{{b + 1}}}"


def _tuple(draw: Draw, language: str) -> tuple[str, str, str]:
    a, b = draw.randrange(-9, 10), draw.randrange(10, 30)
    written = draw.choice(
        ["(%d,%d)", "(%d, %d)", r"\left(%d,%d\right)", "(x,y)=(%d,%d)", r"\left( %d, %d \right)", "P=(%d,%d)"]
    )
    return written % (a, b), f"({a},{b})", f"({b},{a})"


def _set(draw: Draw, language: str) -> tuple[str, str, str]:
    a, b = draw.sample(range(-20, 20), 2)
    written = draw.choice(
        [
            r"\{%d, %d\}",
            "%d, %d",
            "%d,%d",
            r"%d \text{ and } %d",
            "x=%d, x=%d",
            r"x = %d \text{ or } x = %d",
            "%d or %d",
        ]
    )
    return written % draw.choice([(a, b), (b, a)]), draw.choice([rf"\{{{a},{b}\}}", f"{a}, {b}"]), f"{a}, {b + 1}"


def _interval(draw: Draw, language: str) -> tuple[str, str, str]:
    a, b = draw.randrange(-9, 5), draw.randrange(5, 12)
    written = draw.choice(
        [r"[%d,%d)", r"\left[%d, %d\right)", r"%d \le x < %d", r"%d\leq t<%d", r"x \in [%d,%d)", "%d ≤ x < %d"]
    )
    return written % (a, b), f"[{a},{b})", f"({a},{b}]"


def _polynomial(draw: Draw, language: str) -> tuple[str, str, str]:
    a, b = draw.sample(range(1, 10), 2)
    label = f"x^2+{a + b}x+{a * b}"
    spellings = [
        label,
        f"(x+{a})(x+{b})",
        f"{a * b} + {a + b}x + x^{{2}}",
        f"f(x) = x^2+{a + b}x+{a * b}",
        f"x²+{a + b}x+{a * b}",
    ]
    return draw.choice(spellings), label, f"x^2+{a + b}x-{a * b}"


def _words(draw: Draw, language: str) -> tuple[str, str, str]:
    word, other = draw.sample(["even", "odd", "Monday", "isosceles", "Marta", "no solution", "parabola", "blue"], 2)
    return (
        draw.choice(["%s", r"\text{%s}", r"\textbf{%s}", r"\text{%s.}", r"\mathrm{%s}"]) % word,
        rf"\text{{{word}}}",
        other,
    )


def _choice(draw: Draw, language: str) -> tuple[str, str, str]:
    letter, other = draw.sample("ABCDE", 2)
    return (
        draw.choice(["%s", "(%s)", r"\text{(%s)}", r"\textbf{(%s)}", r"\text{%s}", r"\textbf{(%s) } 17"]) % letter,
        letter,
        other,
    )


KINDS: dict[str, Callable[[Draw, str], tuple[str, str, str]]] = {
    "integer": _integer,
    "fraction": _fraction,
    "root": _root,
    "pi": _pi,
    "tuple": _tuple,
    "set": _set,
    "interval": _interval,
    "polynomial": _polynomial,
    "words": _words,
    "choice": _choice,
}


def endings(count: int, seed: int = 1) -> list[Ending]:
    """So many different endings; half of them of integers, and a third of those on DAPO's lines."""
    draw = random.Random(seed)
    found: dict[tuple[str, str], Ending] = {}
    others: Sequence[str] = [kind for kind in KINDS if kind != "integer"]
    while len(found) < count:
        language = draw.choice([*SENTENCES, "English", "English", "Chinese"])
        kind = "integer" if draw.random() < 0.5 else draw.choice(others)
        written, label, other = KINDS[kind](draw, language)
        on_line = kind == "integer" and draw.random() < 0.35 and "$" not in written and "**" not in written
        rule = RewardType.DAPO if on_line else draw.choice([RewardType.MATH, RewardType.DEEPSCALER])
        sentence = draw.choice(LINES[language] if on_line else SENTENCES[language])
        response = "some thoughts</think>\n\n" + sentence % written
        found[response, label] = Ending(kind, language, rule, response, label, other)
    return list(found.values())
