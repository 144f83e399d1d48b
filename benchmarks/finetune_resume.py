"""A training that is killed at random moments (SIGKILL) and taken up again, against one that is left alone:
python benchmarks/finetune_resume.py [--kills 20] [--rounds 3]"""
import argparse
import sys
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tests'))
from test_finetune import killed_and_resumed  # noqa: E402 (the same program as in the test)


def main():
    "A row a round: how often it was killed, and whether weights and history are the same to the last bit"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=20, help='of each round')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--most', type=int, default=40, help='photos that a process may ask for before it is killed')
    args = parser.parse_args()
    rows = []
    for seed in range(args.rounds):
        start = time.perf_counter()
        found = killed_and_resumed(args.kills, seed, args.most)
        rows.append({'seed': seed, 'killed': found['killed'], 'same': found['same'], 'digest': found['ends'][0][0][:12],
                     'seconds': round(time.perf_counter()-start, 1)})
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(ROOT/'benchmarks'/'results'/'finetune_resume.csv', index=False)
    print(f'{table["killed"].sum()} kills, the same end in {table["same"].sum()} of {len(table)} rounds')
    if not table['same'].all(): raise SystemExit(1)


if __name__=='__main__': main()
