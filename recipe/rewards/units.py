"""Words that may stand behind a number and leave it the number it is.

The list is closed: whatever it lacks may change the value (`73 \\text{ tenths}`, `73\\mathrm{i}`, `73 \\sin x`), so an
answer with another word is not that number.
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LENGTHS = _words(
    """
    mm cm dm m km in inch inches ft foot feet yd yard yards mi mile miles meter meters metre metres millimeter
    millimeters centimeter centimeters centimetre centimetres kilometer kilometers kilometre kilometres unit
    units
    """
)
"""They may be squared or cubed: `cm^2`."""

_MEASURES = _words(
    """
    degree degrees deg radian radians rad percent percentage points pct dollar dollars cent cents usd euro euros
    s sec secs second seconds min mins minute minutes h hr hrs hour hours day days week weeks month months year
    years mg g kg gram grams kilogram kilograms lb lbs pound pounds oz ounce ounces ton tons l ml liter liters
    litre litres gallon gallons mph kmh rpm st nd rd th
    """
)
_COUNTED = _words(
    """
    answer answers apple apples arrangement arrangements ball balls bead beads block blocks book books box boxes
    boy boys candy candies card cards case cases chair chairs child children choice choices circle circles coin
    coins coloring colorings colouring colourings combination combinations configuration configurations cubes
    diagonal diagonals digit digits divisor divisors dot dots edge edges element elements face faces factor
    factors figure figures function functions game games girl girls grid grids group groups integer integers
    intersection intersections item items jump jumps letter letters line lines list lists marble marbles match
    matches matrices member members men move moves number numbers object objects ordering orderings outcome
    outcomes pair pairs partition partitions path paths people permutation permutations person persons piece
    pieces player players points polygon polygons polynomial polynomials possibilities possibility primes
    quadruples quadruplet quadruplets rectangle rectangles region regions roots row rows segment segments
    sequence sequences set sets side sides solution solutions square squares state states step steps stone
    stones string strings student students subset subsets team teams term terms tile tiles tiling tilings time
    times token tokens tree trees triangle triangles triples triplet triplets tuple tuples value values vertex
    vertices way ways women word words zeros zeroes
    """
)
_JOINING = _words(
    """
    a an the of in per to total altogether sq square cu cubic ordered unordered distinct different possible
    positive real complex valid such area volume length consecutive
    """
)
GLUED = _words(
    """
    mm cm km kg ft th st nd rd
    """
)
"""They may follow a number without a blank or a font of their own."""

_ALL = LENGTHS | _MEASURES | _COUNTED | _JOINING


def is_unit(words: list[str], *, in_font: bool) -> bool:
    r"""Whether the words say what was counted or measured. A single letter is a unit only in a font (`\text{m}`), for
    elsewhere it is a variable, and words that only join others say nothing."""
    lower = [word.lower() for word in words]
    if not in_font and any(len(word) == 1 for word in lower if word != "a"):
        return False
    return all(word in _ALL for word in lower) and any(word not in _JOINING or word == "total" for word in lower)
