"""Do the sentences of a report hold? Simulations in which the truth is known: how often an interval holds it, how often
a verdict is right, what a threshold lets through. Minutes on two cores, no photos needed.

    python benchmarks/truth.py                     # all of them
    python benchmarks/truth.py figures sets        # some topics
    python benchmarks/truth.py --scale 4           # four times the repeats
    python benchmarks/truth.py --list

Writes benchmarks/results/truth.csv: a row a figure, with what is promised, what was measured here, and what was
measured before the code was changed, where that is known.
"""
import argparse
import importlib
import time
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
COLUMNS = ['topic', 'point', 'case', 'figure', 'promised', 'before', 'measured', 'repeats']


def row(point: int, case: str, figure: str, promised, before, measured: float, repeats: int) -> dict:
    "A row of the table, for the topics"
    return dict(zip(COLUMNS[1:], (point, case, figure, promised, before, round(float(measured), 4), repeats)))


def topics() -> list[str]:
    "Names of the topics: modules `truth_TOPIC` beside this one"
    return sorted(p.stem.removeprefix('truth_') for p in HERE.glob('truth_*.py'))


def simulate(topic: str, scale: float, seed: int) -> pd.DataFrame:
    "All cases of a topic"
    module = importlib.import_module(f'truth_{topic}')
    rows: list[dict] = []
    for name, case in module.CASES.items():
        start = time.perf_counter()
        found = case(max(2, round(scale*module.DEFAULT_REPEATS)), seed)
        rows += [{'topic': topic, **row} for row in found]
        print(f'{topic}: {name}, {time.perf_counter()-start:.0f} s', flush=True)
    return pd.DataFrame(rows, columns=COLUMNS).round({'before': 4, 'measured': 4})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('topics', nargs='*', help='Default: all')
    parser.add_argument('--scale', type=float, default=1., help='Of the repeats of each case')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--list', action='store_true', help='Name the topics and their cases')
    parser.add_argument('--output', type=Path, default=HERE/'results'/'truth.csv')
    args = parser.parse_args()
    if unknown := set(args.topics)-set(topics()): parser.error(f'unknown: {", ".join(sorted(unknown))}')
    if args.list:
        for topic in topics(): print(topic, *importlib.import_module(f'truth_{topic}').CASES, sep='\n    ')
        return
    table = pd.concat([simulate(topic, args.scale, args.seed) for topic in args.topics or topics()])
    kept = pd.read_csv(args.output) if args.output.exists() else table.iloc[:0]
    table = pd.concat([kept[~kept['topic'].isin(table['topic'].unique())], table]) if len(kept) else table
    table.sort_values(['point', 'topic'], kind='stable').to_csv(args.output, index=False)
    print(table.to_string(index=False))


if __name__ == '__main__': main()
