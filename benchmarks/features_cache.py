"""What the feature cache gains and costs, on real photos and on 10,000 rows: python benchmarks/features_cache.py"""
import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from amulet_hybrid.core import file_digest
from amulet_hybrid.data.images import read_image
from amulet_hybrid.features import classical  # noqa: F401 (it registers its blocks)
from amulet_hybrid.features.cache import FeatureCache, block_key
from amulet_hybrid.features.contract import Photo, make_extractor

BLOCKS = ('colour', 'hog', 'lbp')


def best(work, times=5):
    "Seconds of the fastest of several runs"
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter()-start)
    return min(taken)


def measure_hits(folder, data, photos=400):
    "Milliseconds a photo: computed, and read back in three ways"
    paths = sorted(p for p in (Path(data)/'coins').rglob('*') if p.suffix.lower() in ('.jpg', '.png'))[:photos]
    extractors = {name: make_extractor(name) for name in BLOCKS}
    names = {name: block_key(e.fingerprint(), mode='stretch', decode_at=320) for name,e in extractors.items()}
    decoded = [read_image(p) for p in paths]
    keys = [file_digest(p) for p in paths]

    def compute(rgb):
        photo = Photo(rgb)
        return {name: e.extract_features(photo) for name,e in extractors.items()}

    cache, rows = FeatureCache(folder), [compute(rgb) for rgb in decoded]
    start = time.perf_counter()
    for name in BLOCKS: cache.store(names[name], {k: row[name] for k,row in zip(keys, rows)})
    stored = time.perf_counter()-start
    for name in BLOCKS:
        for k,row in zip(keys, rows): assert np.array_equal(cache.load(names[name], [k])[k], row[name])
    n = len(keys)
    whole = best(lambda: [compute(read_image(p)) for p in paths], 3)/n
    seconds = {
        'decode and compute': whole,
        'compute, decoded beforehand': best(lambda: [compute(rgb) for rgb in decoded], 3)/n,
        'sha256 of the file': best(lambda: [file_digest(p) for p in paths])/n,
        'store': stored/n,
        'hit, all photos at once': best(lambda: [cache.load(names[name], keys) for name in BLOCKS])/n,
        'hit, one photo at a time': best(lambda: [cache.load(names[name], [k]) for k in keys for name in BLOCKS])/n,
    }
    cache.enable_cache()
    for name in BLOCKS: cache.load(names[name], keys)
    seconds['hit, one at a time, in memory'] = best(lambda: [cache.load(names[name], [k]) for k in keys
                                                             for name in BLOCKS])/n
    cache.file.close()
    table = pd.DataFrame({'ms a photo': {what: 1000*s for what,s in seconds.items()}})
    table['times as fast as computing, decoded'] = (seconds['compute, decoded '
            'beforehand']/np.array(list(seconds.values())))
    table['as decode and compute'] = whole/np.array(list(seconds.values()))
    table.attrs['floats'] = sum(len(rows[0][name]) for name in BLOCKS)
    return table, n


def measure_rows(folder, photos=10_000, width=4000):
    "A block of many rows: written, read whole and in part, on disk"
    rng, cache = np.random.default_rng(0), FeatureCache(folder)
    keys = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(photos)]
    rows = {k: rng.random(width, dtype=np.float32) for k in keys}
    start = time.perf_counter()
    cache.store('many', rows)
    stored = time.perf_counter()-start
    cache.file.use(lambda db: db.execute('pragma wal_checkpoint(truncate)').fetchall())
    cache.file.close()

    def load(some=None):
        cache.file.close()
        return cache.load('many', some)

    found = load()
    assert all(np.array_equal(found[k], rows[k]) for k in keys)
    del found
    some = keys[::20]
    ones = [best(lambda k=k: cache.load('many', [k]), 1) for k in keys[:1000]]
    return pd.Series({
        'MB of numbers': photos*width*4/1e6, 'MB on disk': cache.cache_stats()['bytes_on_disk']/1e6, 'store, s': stored,
        'load all, s': best(load), 'load all into a matrix, s': best(lambda: np.stack(list(load().values()))),
        f'load {len(some)} of them, s': best(lambda: load(some)),
        'load one, ms (median)': 1000*statistics.median(ones)})


CHILD = '''
import sys, hashlib
from pathlib import Path
from amulet_hybrid.features.cache import FeatureCache
# Linux; what `resource` says may be the parent's
peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])
before,cache = peak(),FeatureCache(sys.argv[1])
for i in range(0, int(sys.argv[2]), 500):
    assert len(cache.load('many', [hashlib.sha256(str(j).encode()).hexdigest() for j in range(i, i+500)]))==500
print((peak()-before)/1024)
'''


def measure_memory(folder, photos=10_000):
    "MB that a stream over all rows, 500 at a time, adds to a process"
    return float(subprocess.run([sys.executable, '-c', CHILD, str(folder), str(photos)], capture_output=True,
                                text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--data', default=os.environ.get('AMULET_DATA', '../shared/data'),
                        help='folder that holds coins/')
    parser.add_argument('--photos', type=int, default=400, help='of coins')
    parser.add_argument('--rows', type=int, default=10_000)
    parser.add_argument('--width', type=int, default=4000, help='floats a row')
    args = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        table, n = measure_hits(Path(folder)/'coins', args.data, args.photos)
        print(f'{n} photos of coins, blocks {", ".join(BLOCKS)}: {table.attrs["floats"]} floats a photo, one '
              f'thread\n{table.round(4).to_string()}\n')
        print(f'{args.rows} rows of {args.width} '
              f'floats\n{measure_rows(Path(folder)/"rows", args.rows, args.width).round(3).to_string()}')
        print(f'MB added by a stream over them, 500 at a time: {measure_memory(Path(folder)/"rows", args.rows):.0f}')


if __name__ == '__main__': main()
