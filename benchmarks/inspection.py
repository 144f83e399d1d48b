"""Everything that is claimed of the inspection, beside its rivals: speed, a second look, real sets, and the scripts
inspection_*.py"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

CLEANVISION = '''
import json, sys, time
from cleanvision import Imagelab
lab = Imagelab(data_path=sys.argv[1])
start = time.perf_counter()
try: lab.find_issues(n_jobs=2, verbose=False); failed = ''
except Exception as error: failed = f'{type(error).__name__}: {error}'[:80]
print(json.dumps({'seconds': time.perf_counter()-start, 'failed': failed}))
'''
OURS = '''
import json, sys, time
from amulet_hybrid.audit.inspector import DatasetInspector, InspectionConfig
start = time.perf_counter()
found = DatasetInspector(InspectionConfig(quick_mode=True, check_duplicates=len(sys.argv)>2,
                                          jobs=2)).inspect(sys.argv[1])
found.manifest['phash'].duplicated().sum() # what cleanvision calls near duplicates
print(json.dumps({'seconds': time.perf_counter()-start, 'files': len(found.manifest), 'failed': ''}))
'''

def child(python, program, *words):
    "What a fresh process of `python` prints as JSON in its last line"
    done = subprocess.run([python, '-c', program, *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, 'AMULET_PROGRESS': 'off'})
    if done.returncode: raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])

def real_photos(data):
    return [p for name in ('coins', 'magtile', 'amulet6') for p in sorted((Path(data)/name).rglob('*.jpg'))]

def mosaics(data, folder, count, across, side, seed=0):
    """Photos that are all different: real ones side by side, `across` in a row; two rows of three for every four in a
    row"""
    rng = np.random.default_rng(seed)
    sources = real_photos(data)
    rows = max(1, across*3//4)
    for i in range(count):
        tiles = [cv2.resize(cv2.imread(str(sources[j])), (side, side))
                 for j in rng.integers(0, len(sources), across*rows)]
        photo = np.vstack([np.hstack(tiles[r*across:(r+1)*across]) for r in range(rows)])
        path = folder/f'class{i%8}'/f'{i:05}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), photo, [cv2.IMWRITE_JPEG_QUALITY, 92])

def speed(data, rivals_python, repeats=2):
    """Photos a second with two jobs, the best of some runs; CleanVision with its default checks, ours with the same and
    with verified near duplicates as well"""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        mosaics(data, Path(folder), 200, 4, 512)
        for name,photos in (('coins', Path(data)/'coins'), ('3 megapixels', Path(folder))):
            count = sum(1 for p in photos.rglob('*') if p.is_file())
            ours,verified = (min(child(sys.executable, OURS, photos, *words)['seconds'] for _ in range(repeats))
                             for words in ([], ['verified']))
            row = {'set': name, 'photos': count, 'ours a second': count/ours,
                   'with verified duplicates': count/verified}
            if rivals_python:
                theirs = min(child(rivals_python, CLEANVISION, photos)['seconds'] for _ in range(repeats))
                row |= {'cleanvision a second': count/theirs, 'ratio': theirs/ours}
            rows.append(row)
    return pd.DataFrame(rows)

def second_look(data, count=10_000):
    "Seconds of `amulet inspect`, the whole command, over new files and again over the same"
    amulet = Path(sys.executable).parent/'amulet'
    with tempfile.TemporaryDirectory() as folder:
        photos,rows = Path(folder)/'photos',[]
        mosaics(data, photos, count, 2, 112)
        time.sleep(3)
        for name,words in (('first look', []), ('second look', []), ('quick, other settings', ['--quick-mode'])):
            start = time.perf_counter()
            subprocess.run([amulet, 'inspect', '--data-dir', photos, '--output-dir', Path(folder)/'out', *words],
                           check=True, capture_output=True)
            rows.append({'command': name, 'files': count, 'seconds': time.perf_counter()-start})
    return pd.DataFrame(rows)

def facts(data):
    "What it says about each real set, with the groups that are known"
    from amulet_hybrid.audit.inspector import DatasetInspector
    for name in ('amulet6', 'coins', 'magtile', 'amulet6_leaky'):
        groups = Path(data)/f'{name}_groups.csv'
        for given in ([groups] if groups.is_file() else [])+[None]:
            start = time.perf_counter()
            found = DatasetInspector().inspect(Path(data)/name, given)
            print(f'\n== {name}{" with its groups" if given else ""} ({time.perf_counter()-start:.0f} '
                  f's)\n{found.verdict}')
            for i,finding in enumerate(found.findings, 1): print(f'  {i:2d}. {finding.level:7s} {finding}')

# Whether there is a rival in another environment
SCRIPTS = {'duplicates': True, 'labels': True, 'split': False, 'fuzz': False}

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('parts', nargs='*', default=['speed', 'second', 'facts', *SCRIPTS],
                        help=f'speed, second, facts, {", ".join(SCRIPTS)}; default: all')
    parser.add_argument('--data', default=os.environ.get('AMULET_DATA', '../shared/data'))
    parser.add_argument('--rivals-python', help='a Python that has cleanvision, imagededup and cleanlab')
    args = parser.parse_args()
    for part in args.parts:
        print(f'\n# {part}', flush=True)
        if part=='speed': print(speed(args.data, args.rivals_python).round(2).to_string(index=False))
        elif part=='second': print(second_look(args.data).round(2).to_string(index=False))
        elif part=='facts': facts(args.data)
        elif part in SCRIPTS:
            words = ['--rivals-python', args.rivals_python] if args.rivals_python and SCRIPTS[part] else []
            subprocess.run([sys.executable, Path(__file__).with_name(f'inspection_{part}.py'), '--data', args.data,
                            *words], check=True)
        else: parser.error(f'no part is called {part!r}')

if __name__=='__main__': main()
