"""Continues three texts by 30 greedy tokens each, the classic first look at an OPT model.

python examples/greedy_30_tokens.py [--model facebook/opt-125m]
"""

from __future__ import annotations

import argparse

import minopt

PROMPTS = [
    "Natural language processing is a subfield of",
    "Today is a beautiful day and I want to",
    "Text classification is a machine learning technique",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=minopt.DEMO, help="name or folder (default: the model that minopt carries)")
    args = parser.parse_args()
    lm = minopt.load(args.model)
    for text in lm.generate(PROMPTS, max_new_tokens=30, echo=True):
        print(text, end="\n\n")


if __name__ == "__main__":
    main()
