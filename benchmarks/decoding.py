"""What the bounds on a photo's work and memory cost the usual photo: this code and that of an earlier commit, in turns.

    python benchmarks/decoding.py --before e702e41 --data ../shared/data

e702e41 is the commit before those bounds. Each kind of photo is read by both, photo by photo, in two processes of
which one works at a time; which of them is first changes at random. `read` is `read_image` of a file's content,
`answer` is a whole classification without a cache by a small bundle that the earlier code trains. The ratio
is after/before of each photo's fastest of several turns; the table has its median over the photos and where the middle
half of them lies. Writes benchmarks/results/decoding.csv.
"""
import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def serve():
    "Read requests line by line, answer each with nanoseconds of processor and wall"
    from amulet_hybrid.data.images import read_image
    from amulet_hybrid.model.classifier import HybridClassifier
    classifiers, files = {}, {}
    for line in sys.stdin:
        request = json.loads(line)
        data = files.setdefault(request['path'], Path(request['path']).read_bytes())
        if request['bundle']:
            if request['bundle'] not in classifiers:
                classifiers[request['bundle']] = HybridClassifier(request['bundle'], enable_caching=False)
            work = classifiers[request['bundle']].classify
        else: work = read_image
        wall = time.perf_counter_ns()
        work(data)
        print(time.perf_counter_ns()-wall, flush=True)


class Revision:
    "A process with the package of one commit"

    def __init__(self, folder):
        env = {**os.environ, 'PYTHONPATH': str(folder), 'AMULET_PROGRESS': 'off', 'OMP_NUM_THREADS': '1'}
        self.process = subprocess.Popen([sys.executable, '-P', __file__, '--serve'], cwd=folder, env=env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def time(self, path, bundle=''):
        print(json.dumps({'path': str(path), 'bundle': str(bundle)}), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def photos(data, folder, number, seed=0):
    "Files of each kind"
    from PIL import Image
    pick = random.Random(seed)
    sets = {name: pick.sample(sorted(p for p in (data/name).rglob('*') if p.suffix.lower() in ('.jpg', '.png', '.jpeg',
                                                                                          '.webp')), number)
            for name in ('amulet6', 'coins', 'magtile')}
    kinds = {f'{name}, as they are': files for name, files in sets.items()}
    sizes = {'JPEG 224 px': (224, 'JPEG', {'quality': 88}), 'JPEG 12 MP': (4000, 'JPEG', {'quality': 88}),
             'progressive JPEG 12 MP': (4000, 'JPEG', {'quality': 88, 'progressive': True}),
             'progressive JPEG 2 MP': (1600, 'JPEG', {'quality': 85, 'progressive': True}),
             'PNG 1 MP': (1000, 'PNG', {}), 'WEBP 1 MP': (1000, 'WEBP', {'quality': 80})}
    for kind, (side, format, options) in sizes.items():
        kinds[kind] = []
        for i, path in enumerate(sets['coins'][:max(number//3, 8) if side > 500 else number]):
            out = folder/f'{kind.replace(" ", "_")}_{i}.{format.lower()}'
            with Image.open(path) as image: image.convert('RGB').resize((side, 3*side//4)).save(out, format, **options)
            kinds[kind].append(out)
    return kinds


def main(args):
    import pandas as pd
    from hostile import make_bundle
    with tempfile.TemporaryDirectory(prefix='amulet-decoding-') as work:
        work = Path(work)
        archive = subprocess.run(['git', '-C', ROOT, 'archive', args.before, 'amulet_hybrid'], check=True,
                                 capture_output=True).stdout
        (work/'before').mkdir()
        with tarfile.open(fileobj=io.BytesIO(archive)) as tree: tree.extractall(work/'before', filter='data')
        # by the older code, for the newer reads what the older wrote, not the other way round
        bundle = make_bundle(work, {**os.environ, 'PYTHONPATH': str(work/'before')})
        rows, sides = [], {'before': Revision(work/'before'), 'after': Revision(ROOT)}
        for kind, files in photos(args.data, work, args.photos).items():
            if args.only and args.only not in kind: continue
            for door, turns, asked in (('read', args.turns, ''), ('answer', max(args.turns//3, 3), bundle)):
                best = {side: [float('inf')]*len(files) for side in sides}
                for _ in range(turns+1):
                    for i, path in enumerate(files):
                        for side in random.sample(list(sides), 2):
                            best[side][i] = min(best[side][i], sides[side].time(path, asked))
                times = pd.DataFrame(best)/1e6
                ratio = times['after']/times['before']
                rows.append({'photos': kind, 'door': door, 'n': len(files), 'before_ms': times['before'].median(),
                             'after_ms': times['after'].median(), 'ratio': ratio.median(),
                             'ratio_q25': ratio.quantile(.25), 'ratio_q75': ratio.quantile(.75)})
                print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False, header=len(rows)==1), flush=True)
        for side in sides.values(): side.end()
        if args.output: pd.DataFrame(rows).round(3).to_csv(args.output, index=False)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--before', default='e702e41')
    parser.add_argument('--data', type=Path, default=ROOT.parent/'shared'/'data')
    parser.add_argument('--photos', type=int, default=60)
    parser.add_argument('--turns', type=int, default=15)
    parser.add_argument('--output', type=Path, default=ROOT/'benchmarks'/'results'/'decoding.csv')
    parser.add_argument('--only', default='', help='kinds of photos whose name has this in it')
    parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve: serve()
    else: main(args)
