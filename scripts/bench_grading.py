"""How long grading a stored evaluation takes: 30 problems x 16 responses, through `python -m evaluation.grade`.

    python scripts/bench_grading.py [--cores 2] [--characters 60000] [--rounds 3]

The responses are made up: thoughts of so many characters (60,000 are about 16,384 tokens), then an answer as models
write them, two in three a plain integer, the rest units, fractions and expressions that take algebra; every 8th is cut
off.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter

PROBLEMS, SAMPLES = 30, 16
PLAIN = ("{0}", "{0}", "0{0}", "{0}")
WRITTEN = (
    r"{0}^\circ",
    r"m+n={0}",
    r"\frac{{{1}}}{{2}}",
    r"\sqrt{{{2}}}",
    r"{0} \text{{ ways}}",
    r"x = \binom{{{0}}}{{1}}",
)


def response(label: int, number: int, characters: int, draw: random.Random) -> dict[str, str]:
    """One made-up response."""
    thoughts = "".join(draw.choices("abcdefgh {}\\$^_=+0123456789\n", k=characters))
    answer = label if draw.random() < 0.6 else draw.randrange(1000)
    form = draw.choice(PLAIN if number % 3 else WRITTEN).format(answer, 2 * answer, answer * answer)
    cut = number % 8 == 7
    text = thoughts if cut else f"{thoughts}</think>The answer is $\\boxed{{{form}}}$."
    return {"response": text, "label": str(label), "finish_reason": "length" if cut else "stop"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that grading may use")
    parser.add_argument("--characters", type=int, default=60_000, help="length of the thoughts of a response")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    draw = random.Random(1)
    labels = [draw.randrange(1000) for _ in range(PROBLEMS)]
    responses = [response(label, number, arguments.characters, draw) for label in labels for number in range(SAMPLES)]
    lines = "".join(json.dumps(line) + "\n" for line in responses).encode()
    for _ in range(arguments.rounds):
        began = time.perf_counter()
        graded = subprocess.run([sys.executable, "-m", "evaluation.grade"], input=lines, stdout=-1, check=True)
        seconds = time.perf_counter() - began
        verdicts = Counter(json.loads(line)["verdict"] for line in graded.stdout.splitlines())
        print(
            f"{len(responses)} responses, {len(lines) / 1e6:.0f} MB, {arguments.cores} cores: {seconds:.2f} s",
            dict(verdicts),
        )


if __name__ == "__main__":
    main()
