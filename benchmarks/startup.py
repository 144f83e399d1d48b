"""How long a person waits for `amulet --help`, next to an empty Python: python benchmarks/startup.py"""
import statistics
import subprocess
import sys
import time
from pathlib import Path


def seconds(command, times=15):
    "Median wall time of a command"
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        taken.append(time.perf_counter()-start)
    return statistics.median(taken)


if __name__ == '__main__':
    empty = seconds([sys.executable, '-c', 'pass'])
    ours = seconds([str(Path(sys.executable).parent/'amulet'), '--help'])
    print(f'python -c pass {empty:.3f} s, amulet --help {ours:.3f} s, ratio {ours/empty:.1f}')
