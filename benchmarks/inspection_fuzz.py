"""What becomes of 1,000 malformed files, made from real photos: python benchmarks/inspection_fuzz.py"""
import argparse
import collections
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

SUFFIXES = ['.jpg', '.png', '.bmp', '.gif', '.webp', '.txt']
ENCODINGS = [('JPEG', {}), ('JPEG', {'progressive': True}), ('PNG', {}), ('BMP', {}), ('GIF', {}), ('WEBP', {}),
             ('WEBP', {'lossless': True})]


def encoded(photo, format, options):
    "A photo saved again, and the place of its sizes in the header"
    out = io.BytesIO()
    photo.save(out, format, **options)
    data = out.getvalue()
    sof = max(data.find(b'\xff\xc0'), data.find(b'\xff\xc2'))
    return data, {'JPEG': sof+5, 'PNG': 16, 'BMP': 18, 'GIF': 6, 'WEBP': 24}[format]


def cut(data, at, rng): return data[:rng.integers(1, len(data))]
def ends_short(data, at, rng): return data[:-int(rng.integers(1, 40))]
def concatenated(data, at, rng): return data+data[:rng.integers(1, len(data))]
def random_bytes(data, at, rng): return rng.bytes(int(rng.integers(1, 20_000)))
def magic_then_random(data, at, rng): return data[:int(rng.integers(4, 40))]+rng.bytes(5000)
def empty(data, at, rng): return b''
def swapped_extension(data, at, rng): return data


def bits_flipped(data, at, rng):
    "1 to 50 bits, a third of them in the header"
    out = bytearray(data)
    for _ in range(rng.integers(1, 51)):
        i = int(rng.integers(min(300, len(out)) if rng.random() < 1/3 else len(out)))
        out[i] ^= 1 << int(rng.integers(8))
    return bytes(out)


def zero_run(data, at, rng):
    "A lost block"
    i = int(rng.integers(len(data)))
    return data[:i]+bytes(min(4096, len(data)-i))+data[i+4096:]


def piece_removed(data, at, rng):
    "Bytes that were never sent"
    i = int(rng.integers(len(data)))
    return data[:i]+data[i+int(rng.integers(1, 2000)):]


def spliced(data, at, rng):
    "The head of one file on the body of another, part of it doubled"
    i, j = sorted(int(x) for x in rng.integers(len(data), size=2))
    return data[:j]+data[i:]


def wrong_size(data, at, rng):
    "A header that promises another size, often a huge one"
    return data[:at]+rng.bytes(4)+data[at+4:]


WAYS = [cut, ends_short, bits_flipped, zero_run, piece_removed, spliced, wrong_size, concatenated, magic_then_random,
        random_bytes, swapped_extension, empty]
SHARES = np.array([5, 2, 6, 3, 3, 4, 4, 2, 2, 1, 1, .3])


def make_files(photos, folder, count, seed):
    "Write `count` malformed files; returns one row a file"
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        photo = Image.open(photos[rng.integers(len(photos))]).convert('RGB')
        format, options = ENCODINGS[rng.integers(len(ENCODINGS))]
        data, at = encoded(photo, format, options)
        way = WAYS[rng.choice(len(WAYS), p=SHARES/SHARES.sum())]
        own = SUFFIXES[['JPEG', 'PNG', 'BMP', 'GIF', 'WEBP'].index(format)]
        path = folder/f'{i:04d}{rng.choice([s for s in SUFFIXES if s != own]) if way is swapped_extension else own}'
        path.write_bytes(way(data, at, rng))
        rows.append({'path': str(path), 'way': way.__name__, 'format': format})
    return pd.DataFrame(rows)


def child():
    "Measure the files that stdin names; runs in a process of its own, so that its memory is its own"
    from amulet_hybrid.data.quality import FATAL, measure_photo
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    out, slowest = [], 0.
    for path in json.load(sys.stdin):
        began = time.perf_counter()
        try:
            codes = measure_photo(path)[0]['issues'].split()
            verdict = next((c for c in codes if c in FATAL), 'noted' if codes else 'clean')
        except Exception as error: verdict = f'EXCEPTION {type(error).__name__}'
        out.append(verdict)
        slowest = max(slowest, time.perf_counter()-began)
    used = {'seconds': time.perf_counter()-start, 'slowest': slowest,
            'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024, 'import_mb': before/1024}
    json.dump({'verdicts': out, **used}, sys.stdout)


def measure(data, count=1000, seed=0):
    "A row a file with its verdict; what the child process used is in `attrs`"
    photos = sorted(p for p in Path(data).rglob('*') if p.suffix.lower() in SUFFIXES[:-1])
    if not photos: raise SystemExit(f'no photos below {data}: name a folder with --data')
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(photos, Path(folder), count, seed)
        done = subprocess.run([sys.executable, __file__, '--child'], input=json.dumps(files.path.tolist()),
                              stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout)
    files['verdict'] = result.pop('verdicts')
    files.attrs = result
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--data', default=os.environ.get('AMULET_DATA', '../shared/data'),
                        help='folder of real photos, also deeper')
    parser.add_argument('--files', type=int, default=1000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child: return child()
    files = measure(args.data, args.files, args.seed)
    used = files.attrs
    print(pd.crosstab(files.way, files.verdict, margins=True).to_string(), '\n')
    print(pd.crosstab(files.format, files.verdict).to_string(), '\n')
    kinds = collections.Counter('exceptions' if v.startswith('EXC') else v if v in ('noted', 'clean') else 'fatal'
                                for v in files.verdict)
    print(', '.join(f'{kinds[k]} {k}' for k in ('fatal', 'noted', 'clean', 'exceptions')))
    print(f'{used["seconds"]:.1f} s ({1000*used["seconds"]/len(files):.2f} ms a file, slowest '
          f'{1000*used["slowest"]:.0f} ms), '
          f'peak memory {used["peak_mb"]:.0f} MB ({used["import_mb"]:.0f} MB of it after the imports)')


if __name__ == '__main__':
    main()
