"""What a cascade saves and what it costs in accuracy, how fast one photo is, and what a bundle and a classifier
withstand.

    AMULET_WEIGHTS=../shared/weights python benchmarks/classifier.py tiers --data ../shared/data
    python benchmarks/classifier.py checks            (--long: 60 threads for 2 minutes, 100,000 classifications)

`tiers` trains on each set, holds whole sources out, and judges every tier, the cascade and chance deferral of equal
cost on them. Costs are processor milliseconds of one
thread, so that a busy machine does not show. `checks` measures latency, many threads, growth, 200 changed bundles and
2,000 hostile photos.
Writes benchmarks/results/classifier_tiers.csv and classifier_checks.csv.
"""
import argparse
import io
import json
import os
import pickle
import random
import shutil
import statistics
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from amulet_hybrid.core import BundleError, bytes_digest
from amulet_hybrid.data.manifest import make_manifest
from amulet_hybrid.data.samples import LOGOS, draw_logo
from amulet_hybrid.data.split import holdout
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.extractor import HybridFeatureExtractor
from amulet_hybrid.learn.config import TrainingConfig
from amulet_hybrid.learn.trainer import HybridTrainer
from amulet_hybrid.model.bundle import HeldOut, load_bundle, save_bundle
from amulet_hybrid.model.bundle_files import MANIFEST, file_entry, write_manifest
from amulet_hybrid.model.cascade import fit_cascade, route_of
from amulet_hybrid.model.classifier import HybridClassifier
from amulet_hybrid.model.prediction import Failure, Prediction
from amulet_hybrid.model.usage import resident_mb


def load(name: str, data: Path, work: Path):
    "Manifest, root and groups of a set; 'logos' are drawn"
    if name == 'logos':
        for kind in LOGOS:
            for piece in range(40):
                for view in range(2):
                    path = work/'logos'/kind/f'{piece}_{view}.jpg'
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if not path.exists():
                        Image.fromarray(draw_logo(kind, seed=piece, view=view, side=320)).save(path, quality=92)
        manifest, root = make_manifest(work/'logos')
        groups = manifest['label']+manifest['path'].str.extract(r'/(\d+)_')[0].to_numpy()
    else:
        csv = data/f'{name}_groups.csv'
        manifest, root = make_manifest(data/name, csv if csv.exists() else None)
        groups = manifest['group'].where(manifest['group'] != '', manifest['path'])
    manifest['sha256'] = [bytes_digest((root/p).read_bytes()) for p in manifest['path']]
    return manifest, root, groups.to_numpy(str)


def build(name: str, args, preset: str, out: Path):
    "Train, fit the cascade and save; what the held-out photos need to be judged"
    manifest, root, groups = load(name, args.data, args.work)
    test = np.asarray(holdout(manifest['label'], groups, args.test_size, args.seed)) == 'test'
    extractor = HybridFeatureExtractor(FeatureConfig(preset=preset, weights=args.weights), args.cache)
    blocks = extractor.extract_manifest(manifest, root)
    seen, held = {b: X[~test] for b, X in blocks.items()}, {b: X[test] for b, X in blocks.items()}
    config = TrainingConfig(quick=True, jobs=args.jobs, novelty=not args.no_novelty)
    trainer = HybridTrainer(config, checkpoint_dir=args.cache/'training').fit(seen, manifest['label'][~test],
            groups[~test], extractor.encoders(), extractor.block_info)
    cascade = fit_cascade(trainer, seen, groups[~test], extractor.extractors)
    paths = [root/p for p in manifest['path'][test]]
    save_bundle(out, trainer.model_, extractor, cascade=cascade, held_out=HeldOut(held, paths))
    return load_bundle(out), held, np.searchsorted(trainer.classes_, manifest['label'][test].to_numpy(str)), paths


def judged(bundle, held, y, name, preset):
    "A row a tier, one for the cascade and one for chance deferral of the same cost"
    measured, n = bundle.manifest['measured'], len(y)
    proba = [t.model.predict_proba(held) for t in bundle.tiers]
    strange = [t.model.novelty.score(held) > t.model.novelty.threshold_ if t.model.novelty is not None else np.zeros(n,
            bool) for t in bundle.tiers]
    names, thresholds = [t.name for t in bundle.tiers], [t.threshold for t in bundle.tiers[:-1]]
    right = [p.argmax(1) == y for p in proba]
    added = [measured['tiers'][t]['added_cpu'] for t in names]
    alone = [measured['decode']+measured['tiers'][t]['alone_cpu'] for t in names]
    asked = [t <= 1 for t in thresholds]+[True]
    confident = [np.where(s, 0, p.max(1)) for p, s in zip(proba, strange)]
    route = route_of(confident, thresholds)
    cost = measured['decode']+sum(c*(route >= k).mean() for k, c in enumerate(added) if asked[k])
    accuracy = float(np.choose(route, right).mean())
    oof = {r['tier']: r for r in bundle.table}
    rows = [{'method': t, 'accuracy': float(r.mean()), 'cpu_ms': c, 'share': float((route == k).mean()),
             'threshold': [*thresholds, 0.][k],
             'oof_accuracy': oof.get(t, {}).get('accuracy')}
            for k, (t, r, c) in enumerate(zip(names, right, alone))]
    rows.append({'method': 'cascade', 'accuracy': accuracy, 'cpu_ms': cost, 'share': 1.,
                 'oof_accuracy': oof.get('cascade', {}).get('accuracy')})
    below = max((k for k in range(len(names)-1) if asked[k]), default=None)
    if below is not None:
        defer = float(np.clip((cost-alone[below])/max(added[-1], 1e-9), 0, 1))
        rows.append({'method': 'chance deferral, same cost', 'accuracy': float((1-defer)*right[below].mean()
                +defer*right[-1].mean()), 'cpu_ms': alone[below]+defer*added[-1],
                     'share': 1.})
    ratio = alone[-1]/alone[names.index('neural')] if 'neural' in names else float('nan')
    low = accuracy-float(right[-1].mean())
    verdict = ('not at least 3 times as dear as the neural tier: no claim' if not ratio >= 3 else 'kept'
               if low >= -.005 and cost <= alone[-1]/3 else 'missed')
    return [{'set': name, 'preset': preset, 'photos': n, **r, 'cost_of_ensemble': r['cpu_ms']/alone[-1],
             'ensemble_to_neural': ratio, 'claim': verdict} for r in rows]


def tiers(args):
    rows = []
    for name in args.sets:
        for preset in args.presets:
            with tempfile.TemporaryDirectory() as folder:
                start = time.time()
                bundle, held, y, _ = build(name, args, preset, Path(folder)/'bundle')
                rows += judged(bundle, held, y, name, preset)
                print(pd.DataFrame(rows[-5:]).round(3).to_string(index=False), *bundle.notes,
                      f'{time.time()-start:.0f} s', sep='\n', flush=True)
                pd.DataFrame(rows).round(4).to_csv(args.output/'classifier_tiers.csv', index=False)


def photo_bytes(width=966, height=724, seed=0):
    "A JPEG of 0.7 megapixel"
    out = io.BytesIO()
    Image.fromarray(draw_logo('complex', seed=seed, view=seed % 3, side=724)).resize((width, height)).save(out, 'JPEG',
            quality=90)
    return out.getvalue()


def own_photos(paths, count=100):
    "The set's own photos, held out, as JPEGs of 0.7 megapixel"
    out = []
    for path in paths[:count]:
        file = io.BytesIO()
        with Image.open(path) as image: image.convert('RGB').resize((966, 724)).save(file, 'JPEG', quality=90)
        out.append(file.getvalue())
    return [out[i % len(out)] for i in range(count)]


def batch_time(classifier, photos, rounds=3):
    "Seconds for all of them, median: wall, and processor of all threads"
    wall, cpu = [], []
    for _ in range(rounds):
        start, busy = time.perf_counter(), time.process_time()
        assert all(p.top for p in classifier.classify_batch(photos))
        wall.append(time.perf_counter()-start); cpu.append(time.process_time()-busy)
    return statistics.median(wall), statistics.median(cpu)


def latency(classifier, own, times=60):
    "Median milliseconds of one photo by each route: wall, and processor of the calling thread"
    data, found = photo_bytes(), {}
    fresh = HybridClassifier(classifier.bundle, enable_caching=False)
    for route in [t.name for t in classifier.bundle.tiers]:
        wall, cpu = [], []
        for i in range(times+5):
            start, busy = time.perf_counter(), time.thread_time()
            fresh.classify(data, route=route)
            if i >= 5: wall.append(1000*(time.perf_counter()-start)); cpu.append(1000*(time.thread_time()-busy))
        found |= {f'{route}: wall ms, median': statistics.median(wall), f'{route}: wall ms, least': min(wall),
                  f'{route}: cpu ms, median': statistics.median(cpu)}
    classifier.classify(data)
    hits = []
    for _ in range(200):
        start = time.perf_counter()
        assert classifier.classify(data).cached; hits.append(1000*(time.perf_counter()-start))
    found['known photo: wall ms, median'] = statistics.median(hits)
    for what, many in (('photos of the set', own),
                       ('drawn photos, which are novel', [photo_bytes(seed=i) for i in range(100)])):
        found[f'batch of 100, {what}: wall s'], found[f'batch of 100, {what}: cpu s, all threads'] = batch_time(fresh,
                many)
    return found


def many_threads(bundle, seconds, threads=60, photos=40):
    "Errors, answers that differ from the serial ones, and growth of memory"
    data = [photo_bytes(320, 240, seed=i) for i in range(photos)]
    classifier = HybridClassifier(bundle, enable_caching=8)
    serial = [classifier.classify(d) for d in data]
    errors = []
    differ = []
    count = [0]
    until = time.monotonic()+seconds
    sizes = []

    def work(seed):
        draw = random.Random(seed)
        while time.monotonic() < until:
            i = draw.randrange(photos)
            try:
                if classifier.classify(data[i]) != serial[i]: differ.append(i)
            except Exception as error: errors.append(repr(error))
            count[0] += 1
    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for w in workers: w.start()
    time.sleep(seconds/4)
    sizes.append(resident_mb())
    while any(w.is_alive() for w in workers): sizes.append(resident_mb()); time.sleep(min(1, seconds/20))
    return {'threads': threads, 'seconds': seconds, 'answers': count[0], 'errors': len(errors),
            'answers that differ': len(differ),
            'growth MB, last quarter over second': sizes[-1]-sizes[0]}


def growth(times):
    "Megabytes that a classifier gains over very many photos that it has not seen"
    photos = [draw_logo(kind, seed=p, view=v, side=48) for kind in ('simple', 'gradient') for p in range(8)
              for v in range(2)]
    extractor = HybridFeatureExtractor(FeatureConfig(blocks=('moments',), weights='none'))
    seen = extractor.extract_batch(photos)
    model = HybridTrainer(TrainingConfig(quick=True, jobs=1)).fit(seen, ['simple']*16+['gradient']*16,
                                                                  np.repeat(np.arange(16), 2)).model_
    with tempfile.TemporaryDirectory() as folder:
        save_bundle(Path(folder)/'bundle', model, extractor)
        classifier = HybridClassifier(Path(folder)/'bundle', enable_caching=500)
    base, sizes = photos[0].copy(), []
    for i in range(times):
        base[0, 0] = i >> 16 & 255, i >> 8 & 255, i & 255
        classifier.classify(base)
        if i == times//5: sizes.append(resident_mb())
    return {'classifications': times, 'growth MB after the first fifth': resident_mb()-sizes[0],
            'milliseconds each': 1000*classifier.get_performance_stats()['seconds']/times}


class _Attack:
    def __init__(self, path): self.path = path
    def __reduce__(self): return eval, (f"open({self.path!r}, 'w').close()",)


def tricks(source: Path, seed=0, count=200):
    "Ways to change a copy of a bundle, as (name, function of its folder); most put all digests in order again"
    draw, manifest = random.Random(seed), json.loads((source/MANIFEST).read_text())
    files, marker = list(manifest['files']), str(source.parent/'owned')
    arrays = [f for f in files if f.endswith('.npz')]

    def again(folder, **changes):
        now = {**manifest, 'files': {p.name: file_entry(p)
                                     for p in sorted(folder.iterdir()) if p.is_file() and p.name in files}, **changes}
        write_manifest(folder, now)

    def flip(file, at):
        def change(folder):
            data = bytearray((folder/file).read_bytes())
            data[at % len(data)] ^= 1 << at % 8; (folder/file).write_bytes(data)
        return change

    def put(file, data):
        def change(folder): (folder/file).write_bytes(data); again(folder)
        return change

    def rewrite(file, name, content):
        "One array of a file replaced, digests in order"
        def change(folder):
            with zipfile.ZipFile(folder/file) as old: parts = {i.filename: old.read(i) for i in old.infolist()}
            with zipfile.ZipFile(folder/file, 'w') as new:
                for k, v in parts.items(): new.writestr(k, content if k == name else v)
            again(folder)
        return change

    def header(shape, kind='<f8'):
        text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
        return b'\x93NUMPY\x01\x00'+len(text).to_bytes(2,
                                 'little')+text

    def link(file, to):
        def change(folder): (folder/file).unlink(); (folder/file).symlink_to(to)
        return change

    def swap(a, b):
        def change(folder):
            (folder/a).rename(folder/'tmp'); (folder/b).rename(folder/a); (folder/'tmp').rename(folder/b)
        return change

    def listed(name):
        def change(folder):
            write_manifest(folder, {**manifest, 'files': {**manifest['files'], name: {'sha256': '0'*64, 'bytes': 1}}})
        return change

    objects = io.BytesIO()
    np.save(objects, np.array([_Attack(marker)], dtype=object), allow_pickle=True)
    out = [(f'a flipped bit in {f}', flip(f, draw.randrange(10**9))) for f in [*files, MANIFEST] for _ in range(5)]
    out += [(f'{f} cut short', lambda d, f=f: os.truncate(d/f, (d/f).stat().st_size//2)) for f in [*files, MANIFEST]]
    out += [(f'{f} removed', lambda d, f=f: (d/f).unlink()) for f in [*files, MANIFEST]]
    out += [(f'{f} is a link', link(f, str(source/f))) for f in files]
    out += [(f'{a} and {b} swapped', swap(a, b)) for a, b in zip(files, files[1:])]
    out += [(f'a pickle as {f}', put(f, pickle.dumps(_Attack(marker))))
            for f in [f for f in files if f.endswith(('.json', '.npz', '.onnx')) and f != 'training_config.json']]
    out += [(f'the name {n!r}', listed(n)) for n in ('../escape', '/etc/passwd', 'a/b', '..', '', 'C:\\x', 'x'*300,
                                                     '.hidden', '~/x', '%2e%2e/x', 'a\0b', '…')]
    out += [(f'{k} is {v!r}', lambda d, k=k, v=v: again(d, **{k: v}))
            for k in ('classes', 'features', 'blocks', 'files', 'format', 'measured') for v in (None, 7.5, 'x', [[]])]
    out += [(f'format {v}', lambda d, v=v: again(d, format=v)) for v in (-1, 0, 2, 4, 10**9, True)]
    for f in arrays:
        with zipfile.ZipFile(source/f) as file: names = file.namelist()
        for n in draw.sample(names, min(3, len(names))):
            out += [(f'objects in {f}', rewrite(f, n, objects.getvalue())),
                    (f'a terabyte promised in {f}', rewrite(f, n, header((10**6, 10**6)))),
                    (f'a negative shape in {f}', rewrite(f, n, header((-1, 4)))),
                    (f'code as header in {f}',
                     rewrite(f, n, b'\x93NUMPY\x01\x00\x20\x00__import__("os").getcwd()#######')),
                    (f'objects promised in {f}', rewrite(f, n, header((1,), '|O')+b'0'*8))]
        out.append((f'compressed zeros in {f}', put(f, _bomb())))
    deep, huge = b'['*10**5+b']'*10**5, b'{"tiers": ['+b'0,'*10**6+b'0]}'
    out += [('deep JSON', put('model.json', deep)), ('large JSON', put('model.json', huge)),
            ('JSON with NaN', put('model.json', b'{"tiers": NaN}')),
            ('a manifest of 20 MB', lambda d: (d/MANIFEST).write_bytes(b' '*20*2**20)),
            ('a file too many', lambda d: (d/'x.txt').write_text('')),
            ('a manifest that is a list', lambda d: (d/MANIFEST).write_text('[]'))]
    while len(out) < count:
        f = draw.choice(files); out.append((f'a flipped bit in {f}', flip(f, draw.randrange(10**9))))
    return out[:count] if len(out) > count and count < 200 else out


def _bomb():
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as file: file.writestr('x.npy', bytes(30*2**20))
    return out.getvalue()


def tampering(source: Path, count=200):
    """Codes by which changed copies were refused; 'read' where one was not, 'raised ...' where it was for no stated
    reason"""
    found: list[tuple[str, str]] = []
    for name, change in tricks(source, count=count):
        copy = source.parent/'changed'
        shutil.copytree(source, copy, symlinks=True, ignore=shutil.ignore_patterns('training'))
        try: change(copy); load_bundle(copy); found.append((name, 'read'))
        except BundleError as error: found.append((name, error.code))
        except Exception as error: found.append((name, f'raised {type(error).__name__}'))
        finally: shutil.rmtree(copy)
    return found, (source.parent/'owned').exists()


def hostile_photos(count=2000, seed=0):
    "Things that are no photos, or only nearly"
    draw, good = random.Random(seed), [photo_bytes(120, 90), *(_saved(kind) for kind in ('PNG', 'GIF', 'BMP', 'WEBP'))]
    odd = [None, 3, -1.5, {}, [], (), object(), 'x', '/', '\0', b'', bytearray(), memoryview(b''), np.zeros(0),
           np.zeros((0, 0, 3), np.uint8), np.zeros((5, 5, 3), np.uint8),
           np.full((40, 40, 3), np.nan),
           np.zeros((40, 40), complex), np.zeros((40, 40, 5), np.uint8), np.zeros((1, 40, 40, 3), np.uint8),
           np.array('x'), [None], [b'', b''], Path('.'), Image.new('1', (1, 1)),
           range(3), print, float('nan'), 10**400]
    for i in range(count):
        if i < len(odd): yield odd[i]; continue
        data = bytearray(draw.choice(good))
        kind = draw.randrange(6)
        if kind == 0: data = data[:draw.randrange(len(data))]
        elif kind == 1:
            for _ in range(draw.randrange(1, 30)): data[draw.randrange(len(data))] = draw.randrange(256)
        elif kind == 2: data = bytearray(draw.randbytes(draw.randrange(3000)))
        elif kind == 3: data = data[:20]+draw.randbytes(200)+data[20:]
        elif kind == 4: at = draw.randrange(10, 30); data[at:at+4] = b'\xff\xff\xff\x7f'
        else: data = data+data
        yield bytes(data)


def _saved(kind):
    out = io.BytesIO(); Image.fromarray(draw_logo('simple', side=64)).save(out, kind); return out.getvalue()


def hostile(classifier, count=2000):
    "Structured answers, refusals among them, and the longest time that one took"
    structured, refused, longest = 0, 0, 0.
    for photo in hostile_photos(count):
        start = time.perf_counter()
        try: answer = classifier.classify_safe(photo)
        except BaseException as error: print('raised', type(error), error); continue  # noqa: BLE001
        longest = max(longest, time.perf_counter()-start)
        json.dumps(answer.to_dict())
        structured += isinstance(answer, Prediction) or (isinstance(answer, Failure) and bool(answer.error_code))
        refused += not answer.success
    return {'photos': count, 'structured answers': structured, 'refused': refused, 'longest s': longest}


def checks(args):
    rows: list[dict] = []

    def tell(check, found):
        for what, value in found.items():
            rows.append({'check': check, 'what': what, 'value': round(value, 3) if isinstance(value, float) else value})
        print(check, {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
        pd.DataFrame(rows).to_csv(args.output/'classifier_checks.csv', index=False)
    with tempfile.TemporaryDirectory() as folder:
        for preset in args.presets:
            path = Path(folder)/preset
            bundle, *_, paths = build(args.sets[0], args, preset, path)
            start = time.perf_counter()
            load_bundle(path)
            tell(f'latency, {preset}, 0.7 megapixel', {'load_bundle: wall ms': 1000*(time.perf_counter()-start),
                                                       **latency(HybridClassifier(bundle), own_photos(paths))})
        tell('many threads', many_threads(bundle, 120 if args.long else 10))
        tell('growth', growth(100_000 if args.long else 3000))
        found, owned = tampering(path)
        tell('changed bundles', {'ways': len(found),
                                 'refused with a code': sum(c != 'read' and not c.startswith('raised')
                                                            for _, c in found), 'code that ran': int(owned),
                                 'not refused': '; '.join(f'{n}: {c}' for n, c in found if c == 'read'
                                                          or c.startswith('raised')) or 'none'})
        tell('hostile photos', hostile(HybridClassifier(bundle)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=['tiers', 'checks'])
    parser.add_argument('--data', type=Path, default=Path('../shared/data'))
    parser.add_argument('--weights', default='auto', help='auto: also those of AMULET_WEIGHTS')
    parser.add_argument('--sets', nargs='+', default=[])
    parser.add_argument('--presets', nargs='+', default=[])
    parser.add_argument('--test-size', type=float, default=.3)
    parser.add_argument('--seed', type=int, default=42)
    parser.add_argument('--jobs', type=int, default=0)
    parser.add_argument('--long', action='store_true')
    parser.add_argument('--no-novelty', action='store_true')
    parser.add_argument('--cache', type=Path, default=Path('.cache'))
    parser.add_argument('--work', type=Path, default=Path('.cache'))
    parser.add_argument('--output', type=Path, default=Path(__file__).parent/'results')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    args.presets = args.presets or (['balanced', 'rich'] if args.part == 'tiers' else ['fast', 'balanced'])
    args.sets = args.sets or (['amulet6', 'coins', 'magtile', 'logos'] if args.part == 'tiers' else ['amulet6'])
    (tiers if args.part == 'tiers' else checks)(args)


if __name__ == '__main__': main()
