"""What the feature blocks are worth and what they cost, beside a straightforward script and beside the limit of the
machine.

    # dimension, milliseconds and accuracy of every block
    python benchmarks/features.py blocks
    # photos a second of a preset, and of decoding and its nets alone (the limit); of features_rival.py too, which
    # runs one net at one size
    python benchmarks/features.py rivals --preset fast [--rival-python VENV/python]
    # memory and throughput over many photos, and a run that is killed
    python benchmarks/features.py large --photos 100000
    # photos a second of each backbone, where there is CUDA
    python benchmarks/features.py gpu

Each writes its table to benchmarks/results/features_*.csv. What a feature cache gains is measured by features_cache.py.
"""
import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import joblib
import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from amulet_hybrid.audit.inspection import InspectionConfig
from amulet_hybrid.audit.inspector import DatasetInspector
from amulet_hybrid.core import AmuletError, file_digest
from amulet_hybrid.data.images import read_image, resize_image
from amulet_hybrid.data.manifest import make_manifest
from amulet_hybrid.data.split import folds
from amulet_hybrid.evaluate.metrics import evaluate_predictions, paired_difference
from amulet_hybrid.features.cnn import CNNFeatures
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.contract import EXTRACTORS, Photo, join_blocks, make_extractor
from amulet_hybrid.features.extractor import HybridFeatureExtractor
from amulet_hybrid.features.weights import BACKBONES, find_weights

HERE = Path(__file__).parent
NET = 'cnn:mobilenet_v2'
CORES = 2
LITE = 'cnn:efficientnet_lite0'
NETS = (NET, f'{NET}@max', f'{NET}@texture', f'{NET}@stages', f'{NET}@second', f'{NET}@tiles',
        'cnn:squeezenet1_1', LITE, f'{LITE}@max', f'{LITE}@stages', f'{LITE}@second', f'{LITE}@tiles',
        'cnn:efficientnet_lite2', 'cnn:efficientnet_lite2@second')
SIDE = 320 # Pixels, of decoding and of nets in `blocks` and `gpu`; the others do as their preset does


def show(title, table, output=None, digits=3):
    "Print a table as Markdown, and keep it"
    shown = table.round(digits).astype(object)
    cells = [list(table.columns), *shown.where(shown.notna(), '').to_numpy().tolist()]
    width = [max(len(str(row[i])) for row in cells) for i in range(table.shape[1])]
    lines = ['| '+' | '.join(str(c).rjust(w) for c,w in zip(row, width))+' |' for row in cells]
    print('\n'.join(['', f'## {title}', '', lines[0], '|'+'|'.join('-'*(w+1)+':' for w in width)+'|', *lines[1:]]),
          flush=True)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        table.round(digits).to_csv(output, index=False)


def load(data, name, limit=None):
    """Usable photos with their groups: those that are given, or near duplicates where none are; at most `limit`, by
    whole groups"""
    csv = data/f'{name}_groups.csv'
    manifest, root = make_manifest(data/name, csv if csv.exists() else None)
    table = DatasetInspector(InspectionConfig(quick_mode=True, check_duplicates=not csv.exists())).inspect(manifest,
            root=root).usable
    table['given'] = table['group'].where(table['group']!='', table['path'])
    if limit and limit < len(table):
        order = np.random.default_rng(0).permutation(table['given'].unique())
        sizes = table['given'].value_counts()[order].cumsum()
        table = table[table['given'].isin(sizes.index[:max(10, int((sizes <= limit).sum()))])]
    return table.reset_index(drop=True), root


# Accuracy: a plain logistic regression on grouped folds

def fold_proba(X, y, train):
    "Probabilities of the held-out photos"
    with threadpool_limits(1):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(X[train], y[train])
        proba = np.zeros(((~train).sum(), y.max()+1))
        proba[:,model.classes_] = model.predict_proba(X[~train])
    return proba


def encode(encoder, rows, train):
    "Rows of all photos by what the training photos taught"
    with threadpool_limits(1): return clone(encoder).fit(rows[train]).transform(rows)


def out_of_fold(joins, y, fold, encoders=None):
    """Probabilities of each join (name -> {block: rows}) from 5 grouped folds; raw keypoint rows are encoded anew
    inside each"""
    encoders = encoders or {}
    parallel = joblib.Parallel(n_jobs=CORES)
    proba = {}
    raw = {b: rows for blocks in joins.values() for b,rows in blocks.items() if b in encoders}
    jobs = [(b, f) for b in raw for f in np.unique(fold)]
    coded = dict(zip(jobs, parallel(joblib.delayed(encode)(encoders[b], raw[b], fold!=f) for b,f in jobs)))
    seen = lambda blocks, f: np.hstack([coded.get((b, f), rows) for b,rows in blocks.items()])
    jobs = [(name, f) for name in joins for f in np.unique(fold)]
    for (name, f),found in zip(jobs, parallel(joblib.delayed(fold_proba)(seen(joins[name], f), y, fold!=f)
                                              for name,f in jobs)):
        proba.setdefault(name, np.zeros((len(y), y.max()+1)))[fold==f] = found
    return proba


# blocks: every block alone and beside the net

def interval(name, found): return {name: found.value, f'{name}_low': found.low, f'{name}_high': found.high}


def milliseconds(extractor, photos, encoder=None, warm=5, looks=3):
    """Processor time of a photo, decoded, nothing shared with other blocks: median over photos, each the best of
    some looks; for keypoints with the encoding, once its
    vocabulary is learned. On a machine of one's own this is what a clock on the wall says of one thread; elsewhere
    it leaves out the time that others had."""
    def once(rgb):
        start = time.process_time()
        row = extractor.extract_features(Photo(rgb))
        if encoder is not None: encoder.transform(row[None])
        return time.process_time()-start

    for rgb in photos[:warm]: once(rgb)
    return 1000*statistics.median(min(once(rgb) for _ in range(looks)) for rgb in photos)


def block_extractors(weights, blocks=()):
    "Every block that can be computed here, or those that are named and the net, by name"
    made = {}
    known = [n for n in EXTRACTORS if n not in ('cnn', 'onnx')] + list(NETS)
    for name in dict.fromkeys([NET, *blocks]) if blocks else known:
        try:
            made[name] = make_extractor(name, **({'weights': weights, 'side': SIDE} if name.startswith('cnn') else {}))
            made[name].extract_features(np.zeros((64,64,3), np.uint8))
        except AmuletError as error:
            made.pop(name, None)
            print(f'{name} is left out: {error}', flush=True)
    return made


def time_blocks(table, root, extractors, photos=60):
    "Milliseconds of each block"
    decoded = [read_image(root/p, at_least=SIDE) for p in table['path'].iloc[::max(1, len(table)//photos)][:photos]]
    with threadpool_limits(1):
        taught = {b: encoder.fit(e.transform(decoded))
                  for b,e in extractors.items() if (encoder := e.encoder()) is not None}
        return {b: milliseconds(e, decoded, taught.get(b)) for b,e in extractors.items()}


def judge_blocks(name, table, root, extractors, times):
    "One row a block"
    paths = [root/p for p in table['path']]

    def rows(path):
        photo = Photo(read_image(path, at_least=SIDE))
        return {b: e.extract_features(photo) for b,e in extractors.items()}

    with ThreadPoolExecutor(CORES) as pool: found = list(pool.map(rows, paths))
    blocks = {b: np.stack([r[b] for r in found]) for b in extractors}
    encoders = {b: encoder for b,e in extractors.items() if (encoder := e.encoder()) is not None}
    classes, y = np.unique(table['label'], return_inverse=True)
    groups = table['given'].to_numpy(str)
    fold = folds(table['label'], groups, 5)
    about = {'set': name, 'photos': len(y), 'classes': len(classes), 'groups': len(set(groups)),
             'folds': int(fold.max())+1}
    print(', '.join(f'{k} {v}' for k,v in about.items()), flush=True)
    joins = {(b,): {b: blocks[b]} for b in blocks} | {(NET, b): {NET: blocks[NET], b: blocks[b]}
                                                      for b in blocks if b!=NET}
    proba = out_of_fold(joins, y, fold, encoders)
    for b in blocks:
        row = {**about, 'block': b, 'numbers': encoders[b].width() if b in encoders else blocks[b].shape[1],
               'ms': times[b]}
        for what,join in (('alone', (b,)), ('joined', (NET, b))):
            if join in proba:
                row |= interval(what, evaluate_predictions(y, proba[join], classes,
                                                           groups).interval('balanced_accuracy'))
        if (NET, b) in proba: row |= interval('gain', paired_difference(y, proba[NET, b], proba[NET,], groups=groups))
        yield row


def blocks(args):
    "The table of blocks"
    start = time.perf_counter()
    extractors = block_extractors(args.weights, args.blocks)
    sets = {name: load(args.data, name, args.photos) for name in args.sets}
    # before anything else is busy
    times = {name: time_blocks(table, root, extractors) for name,(table,root) in sets.items()}
    table = pd.DataFrame([row for name,(table,root) in sets.items()
                          for row in judge_blocks(name, table, root, extractors, times[name])])
    show('Blocks: numbers a photo (of keypoints: once encoded), milliseconds (one thread, decoded photo), balanced '
         'accuracy (5 grouped folds, plain logistic regression)',
         block_table(table), digits=2)
    if args.blocks and (path := args.output/'features_blocks.csv').exists(): # the others as they are
        before,key = pd.read_csv(path),['set', 'photos', 'block']
        again = set(table[key].itertuples(index=False, name=None))
        table = pd.concat([before[[k not in again for k in before[key].itertuples(index=False, name=None)]], table])
    show('The same with 95 % intervals (groups drawn anew); gain is joined less the net alone, paired', table,
         args.output/'features_blocks.csv')
    print(f'{time.perf_counter()-start:.0f} s')


def block_table(table):
    "One row a block, the sets side by side"
    figures = ['ms', 'alone', 'joined', 'gain']
    wide = table.pivot(index='block', columns='set',
                       values=figures)[[(what, s) for what in figures for s in table['set'].unique()]]
    wide.columns = [f'{what} {name}' for what,name in wide.columns]
    wide.insert(0, 'numbers', table.groupby('block')['numbers'].first())
    return wide.loc[table['block'].unique()].reset_index()


# rivals: photos a second, side by side

def enlarge(job):
    "A real photo enlarged to `size`, with a little noise, as a JPEG of quality 92"
    source, target, size, seed = job
    photo = cv2.resize(cv2.imread(str(source)), size, interpolation=cv2.INTER_CUBIC).astype(np.int16)
    noise = np.random.default_rng(seed).integers(-4, 5, photo.shape, np.int8)
    cv2.imwrite(str(target), (photo+noise).clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 92])


def enlarged(data, folder, count, size=(1600, 1200)):
    "Photos of two megapixels made from real ones"
    sources = [p for name in ('coins', 'amulet6') for p in sorted((data/name).rglob('*.jpg'))]
    sources = sources[::max(1, len(sources)//count)][:count]
    targets = [folder/f'{i:05}.jpg' for i in range(len(sources))]
    with ProcessPoolExecutor(CORES) as pool:
        list(pool.map(enlarge, [(s, t, size, i) for i,(s,t) in enumerate(zip(sources, targets))], chunksize=8))
    return targets


def child(*words, python=sys.executable):
    "What a fresh process prints as JSON in its last line"
    done = subprocess.run([str(python), *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, 'AMULET_PROGRESS': 'off'})
    if done.returncode: raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def preset_nets(extractors):
    "Those of a preset's blocks that are nets"
    return {name: e for name,e in extractors.items() if isinstance(e, CNNFeatures)}


def rival_spec(preset, weights, paths, workers):
    "The same blocks in the rival's words, and those that it goes without"
    extractors = HybridFeatureExtractor(FeatureConfig(preset=preset, weights=weights)).extractors
    nets = preset_nets(extractors)
    parts = [e.backbone.partition('@') for e in nets.values()]
    asked = {(net, e.side or 320, e.layer, e.mirror) for (net,_,_),e in zip(parts, nets.values())}
    plain = all(isinstance(side, int) and side and not layer and not mirror for _,side,layer,mirror in asked) and {pool
            for *_,pool in parts} <= {'', 'max', 'texture'}
    if len(asked) > 1 or not plain:
        raise SystemExit(f'the rival runs one net at one size, the preset {preset!r} has {", ".join(nets)}')
    by_hand = {e.name: e.get_params() for name,e in extractors.items() if name not in nets}
    known = {k: v for k,v in by_hand.items() if k in ('colour', 'hog', 'lbp', 'haralick')}
    net = parts[0][0] if nets else ''
    spec = {'photos': list(map(str, paths)), 'blocks': known, 'cores': CORES, 'workers': workers,
            'side': (next(iter(nets.values())).side or 320) if nets else 0,
            'backbone': net, 'pools': [pool or 'mean' for *_,pool in parts],
            'weights': str(find_weights(net, weights)) if nets else ''}
    return spec, list(extractors), sorted(set(by_hand)-set(known))


def run_ours(args):
    "One process of ours: `HybridFeatureExtractor` over a manifest, no cache"
    manifest = pd.read_csv(args.manifest)
    extractor = HybridFeatureExtractor(FeatureConfig(preset=args.preset, weights=args.weights), jobs=CORES)
    extractor.extract_manifest(manifest[:32], '/')
    start, busy = time.perf_counter(), time.process_time()
    blocks = extractor.extract_manifest(manifest, '/')
    seconds, busy = time.perf_counter()-start, time.process_time()-busy
    if args.rows: np.savez(args.rows, rows=join_blocks(blocks, blocks))
    print(json.dumps({'photos': len(manifest), 'seconds': seconds, 'processor': busy}))


def run_limit(args):
    """One process that decodes at reduced scale, resizes, and runs the very files of our nets, two threads with a
    session of each net each, and nothing else"""
    import onnxruntime as ort
    extractor = HybridFeatureExtractor(FeatureConfig(preset=args.preset, weights=args.weights), jobs=CORES)
    paths = pd.read_csv(args.manifest)['path'].tolist()
    nets = {(str(e.onnx_path()), e.side or 320) for e in preset_nets(extractor.extractors).values()}
    decode_at = extractor.config.decode_at
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = [[(ort.InferenceSession(path, options, providers=['CPUExecutionProvider']), side)
                 for path,side in sorted(nets)] for _ in range(CORES)]
    cv2.setNumThreads(1)

    def some(job):
        mine, paths = job
        for path in paths:
            rgb = read_image(path, at_least=decode_at)
            for session,side in mine: session.run(None, {session.get_inputs()[0].name: resize_image(rgb, side)[None]})

    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(some, [(s, paths[:16]) for s in sessions]))
        start, busy = time.perf_counter(), time.process_time()
        list(pool.map(some, [(s, paths[i::CORES]) for i,s in enumerate(sessions)]))
        seconds, busy = time.perf_counter()-start, time.process_time()-busy
    print(json.dumps({'photos': len(paths), 'seconds': seconds, 'processor': busy}))


def race(args, name, paths, folder, keep_rows):
    "Rounds of ours, the rival and the limit, one after the other; the rows that the first two found"
    pd.DataFrame({'path': list(map(str, paths)),
                  'sha256': [file_digest(p) for p in paths]}).to_csv(folder/'manifest.csv', index=False)
    extractors = HybridFeatureExtractor(FeatureConfig(preset=args.preset, weights=args.weights)).extractors
    print(f'{name}: {len(paths)} photos, blocks {", ".join(extractors)}', flush=True)
    if args.rival_python:
        spec, _, without = rival_spec(args.preset, args.weights, paths, args.rival_workers)
        (folder/'spec.json').write_text(json.dumps(spec))
        if without: print(f'The rival goes without {", ".join(without)}', flush=True)
    ours, theirs = folder/'ours.npz', folder/'rival.npz'
    one = (__file__, '--preset', args.preset, '--weights', args.weights, '--manifest', folder/'manifest.csv')
    runs = {'ours': lambda last: child(*one, *(['--rows', ours] if last and keep_rows else []), '_ours')}
    if args.rival_python:
        runs['rival'] = lambda last: child(HERE/'features_rival.py', folder/'spec.json',
                                           *([theirs] if last and keep_rows else []), python=args.rival_python)
    if preset_nets(extractors): runs['limit'] = lambda _: child(*one, '_limit')
    rounds = []
    for i in range(args.rounds):
        # others at work here count against all three, and most against those that wait for their own threads
        load = os.getloadavg()[0]
        found = {who: run(i==args.rounds-1) for who,run in runs.items()}
        rounds.append({'set': name, 'round': i+1, 'load before': load,
                       **{who: f['photos']/f['seconds'] for who,f in found.items()},
                       **{f'{who}, processor ms': 1000*f['processor']/f['photos'] for who,f in found.items()}})
        print('   ', {k: round(v, 1) for k,v in rounds[-1].items() if k.partition(',')[0] in runs}, flush=True)
    return rounds, [np.load(p)['rows'] for p in (ours, theirs) if p.exists()]


def rivals(args):
    "Ours against the straightforward script and against the limit"
    table, root = load(args.data, 'coins', args.photos)
    rounds, accuracy = [], []
    with tempfile.TemporaryDirectory(dir=args.temp) as temp:
        found, rows = race(args, 'coins', [(root/p).resolve() for p in table['path']], Path(temp), True)
        rounds += found
        if len(rows)==2:
            classes, y = np.unique(table['label'], return_inverse=True)
            groups = table['given'].to_numpy(str)
            proba = out_of_fold({who: {who: r} for who,r in zip(('ours', 'rival'), rows)}, y,
                                folds(table['label'], groups, 5))
            for who,p in proba.items():
                accuracy.append({'who': who, **vars(evaluate_predictions(y, p, classes,
                        groups).interval('balanced_accuracy'))})
            accuracy.append({'who': 'ours less rival, paired',
                             **vars(paired_difference(y, *proba.values(), groups=groups))})
        large = Path(temp)/'large'
        large.mkdir()
        rounds += race(args, '2 megapixels (enlarged)', enlarged(args.data, large, args.large_photos), Path(temp),
                       False)[0]
    table = pd.DataFrame(rounds)
    for who,name in (('rival', 'times the rival'), ('limit', 'of the limit')):
        if who in table: table[name] = table['ours']/table[who]
    name = 'features_rivals.csv' if args.rival_python else f'features_limit_{args.preset}.csv'
    show(f'Photos a second, {CORES} cores, preset {args.preset}', table, args.output/name, 2)
    show('Median of the rounds', table.drop(columns='round').groupby('set', sort=False).median().reset_index(),
         digits=2)
    if accuracy:
        show('Balanced accuracy on coins, all blocks joined, plain logistic regression, 5 grouped folds',
             pd.DataFrame(accuracy), args.output/'features_rivals_accuracy.csv')


# large: many photos, little memory

def perturb(sources, folder, start, stop):
    "Photos that are all different, made from a few: cropped, brighter or darker, saved anew; path and sha256 of each"
    rows, pictures = [], {}
    for i in range(start, stop):
        rng, source = np.random.default_rng(i), sources[i%len(sources)]
        if source not in pictures: pictures[source] = cv2.imread(str(source))
        photo = pictures[source]
        h, w = (int(n*rng.uniform(.85, 1)) for n in photo.shape[:2])
        y, x = (int(rng.integers(0, n-m+1)) for n,m in zip(photo.shape[:2], (h, w)))
        photo = cv2.convertScaleAbs(cv2.resize(photo[y:y+h, x:x+w], (150, 150)), alpha=rng.uniform(.8, 1.2),
                                    beta=rng.uniform(-15, 15))
        data = cv2.imencode('.jpg', photo, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(75, 93))])[1].tobytes()
        path = f'{i//1000:04}/{i:06}.jpg'
        (folder/path).parent.mkdir(parents=True, exist_ok=True)
        (folder/path).write_bytes(data)
        rows.append((path, hashlib.sha256(data).hexdigest()))
    return rows


def perturbed(data, folder, count):
    "A manifest of `count` photos"
    sources = sorted((data/'coins').rglob('*.jpg'))
    starts = range(0, count, 1000)
    with ProcessPoolExecutor(CORES) as pool:
        rows = [row for some in pool.map(partial(perturb, sources, folder), starts,
                                         [min(s+1000, count) for s in starts]) for row in some]
    manifest = pd.DataFrame(rows, columns=['path', 'sha256'])
    manifest.to_csv(folder/'manifest.csv', index=False)
    return manifest


def in_kb(path, what):
    return next((int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(what)), 0)


def run_large(args):
    """One process that writes the features of a manifest to a folder, counts the photos it reads, and looks at its
    memory once a second"""
    from amulet_hybrid.features import extractor as extraction
    from amulet_hybrid.features.folder import write_features
    manifest = pd.read_csv(args.manifest)
    read = []
    lock = threading.Lock()
    anonymous = []
    over = threading.Event()
    original = extraction.read_image

    def counted(*words, **more):
        with lock:
            read.append(time.perf_counter())
            if len(read)%100==0: print(len(read), flush=True)
        return original(*words, **more)

    def watch():
        while not over.wait(1): anonymous.append(in_kb('/proc/self/smaps_rollup', 'Anonymous:'))

    extraction.read_image = counted
    extractor = HybridFeatureExtractor(FeatureConfig(preset=args.preset, weights=args.weights), jobs=CORES)
    extractor.extract(Photo(np.zeros((150,150,3), np.uint8)))
    before = in_kb('/proc/self/status', 'VmHWM:') # what `resource` says may be the parent's
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    write_features(extractor, manifest, Path(args.manifest).parent, args.folder)
    seconds = time.perf_counter()-start
    over.set()
    anonymous.append(in_kb('/proc/self/smaps_rollup', 'Anonymous:'))
    ends = np.array([start, *read[999::1000]])
    print(json.dumps({'read': len(read), 'seconds': seconds, 'rates': (1000/np.diff(ends)).tolist(),
                      'anonymous_mb': max(anonymous)/1024,
                      'peak_mb': in_kb('/proc/self/status', 'VmHWM:')/1024, 'before_mb': before/1024}))


def one_large(args, folder, manifest):
    return [__file__, '--preset', args.preset, '--weights', args.weights, '--manifest', manifest, '--folder', folder,
            '_large']


def killed_run(args, folder, manifest, after):
    "Photos read until a run was killed"
    command = [sys.executable, *map(str, one_large(args, folder, manifest))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          env={**os.environ, 'AMULET_PROGRESS': 'off'}) as running:
        for line in running.stdout:
            if line.strip().isdigit() and int(line) >= after:
                running.send_signal(signal.SIGKILL)
                return int(line)
    raise SystemExit(f'the run ended before it could be killed after {after} photos')


def same_files(a, b):
    "Arrays of two folders that are the same, byte for byte, of how many"
    names = sorted({p.relative_to(root) for root in (a, b) for p in root.rglob('*.npy')})
    return sum((a/n).exists() and (b/n).exists() and (a/n).read_bytes()==(b/n).read_bytes() for n in names), len(names)


def large(args):
    "Many photos to a folder of memory-mapped arrays"
    with tempfile.TemporaryDirectory(dir=args.temp) as temp:
        few, many = Path(temp)/'few', Path(temp)/'many'
        for folder,count in ((few, args.killed_photos), (many, args.photos or 100_000)):
            start = time.perf_counter()
            folder.mkdir()
            perturbed(args.data, folder, count)
            print(f'{count} photos made in {time.perf_counter()-start:.0f} s', flush=True)
        killed = killed_run(args, few/'killed', few/'manifest.csv', args.killed_photos//2)
        again = child(*one_large(args, few/'killed', few/'manifest.csv'))
        whole = child(*one_large(args, few/'whole', few/'manifest.csv'))
        same, arrays = same_files(few/'killed', few/'whole')
        show('A run killed half way and started again, against one that was not',
             pd.DataFrame([{'photos': args.killed_photos, 'killed after': killed, 'read again': again['read'],
             'read by the whole run': whole['read'], 'same arrays': f'{same} of {arrays}'}]),
             args.output/'features_large_killed.csv')
        found = child(*one_large(args, many/'features', many/'manifest.csv'))
        if found['read'] < (args.photos or 100_000):
            print(f'only {found["read"]} reads were seen: the rates below are not to be trusted')
        on_disk = sum(p.stat().st_size for p in (many/'features').rglob('*') if p.is_file())/1e6
    rates = np.array(found.pop('rates'))
    show('Many photos', pd.DataFrame([{'preset': args.preset, 'photos': found['read'], 'seconds': found['seconds'],
                                       'photos a second': found['read']/found['seconds'],
         'first thousand': rates[0], 'last thousand': rates[-1], 'last/first': rates[-1]/rates[0],
                                       'slowest thousand': rates.min(), 'peak resident MB': found['peak_mb'],
         'of which anonymous at most MB': found['anonymous_mb'], 'resident before MB': found['before_mb'],
                                       'features on disk MB': on_disk}]), args.output/'features_large.csv', 2)
    tenths = pd.DataFrame({'photos a second': [part.mean() for part in np.array_split(rates, min(10, len(rates)))]})
    show('Each tenth of the run', tenths.rename_axis('tenth').reset_index(), digits=1)


# gpu: each backbone, where there is CUDA

def gpu(args):
    "Photos a second of each backbone with random weights, in float32 and half precision"
    import onnxruntime as ort
    import torch
    if not torch.cuda.is_available():
        print(f'There is no CUDA device that torch sees here (onnxruntime has '
              f'{", ".join(ort.get_available_providers())}): nothing was measured.')
        return
    photos, rows = np.random.default_rng(0).integers(0, 256, (args.photos or 512, SIDE, SIDE, 3), np.uint8), []
    for net in BACKBONES:
        for half in (False, True):
            extractor = make_extractor(f'cnn:{net}:engine=torch:half={str(half).lower()}', weights='random', side=SIDE)
            taken = []
            for _ in range(4): # the first one warms up
                start = time.perf_counter()
                for i in range(0, len(photos), 64): extractor.measure_many([Photo(rgb) for rgb in photos[i:i+64]])
                taken.append(time.perf_counter()-start)
            about = {'device': torch.cuda.get_device_name(), 'backbone': net, 'side': SIDE,
                     'precision': 'half' if half else 'float32'}
            rows.append({**about, 'photos a second': len(photos)/min(taken[1:])})
    show('Photos a second on the GPU, 64 at a time, decoded and resized beforehand, random weights',
         pd.DataFrame(rows), args.output/'features_gpu.csv', 0)


# with a stroke: what the others start
PARTS = {'blocks': blocks, 'rivals': rivals, 'large': large, 'gpu': gpu, '_ours': run_ours, '_limit': run_limit,
         '_large': run_large}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=list(PARTS), metavar='{blocks,rivals,large,gpu}')
    parser.add_argument('--data', type=Path, default=Path(os.environ.get('AMULET_DATA', '../shared/data')))
    parser.add_argument('--weights', default=os.environ.get('AMULET_WEIGHTS', '../shared/weights'))
    parser.add_argument('--sets', nargs='+', default=['amulet6', 'coins', 'magtile'], help='for `blocks`')
    parser.add_argument('--photos', type=int,
                        help='at most (blocks, rivals: of a set, by whole groups; large: how many, 100000 if not said)')
    parser.add_argument('--blocks', nargs='+', default=(), help='for `blocks`: measure these anew, keep the other rows')
    parser.add_argument('--preset', help='default: balanced, for `large` fast')
    parser.add_argument('--rival-python',
                        help='for `rivals`: a Python that has opencv, scikit-image, torch and torchvision')
    parser.add_argument('--rival-workers', type=int, default=1,
                        help='for `rivals`: processes that describe photos for the rival')
    parser.add_argument('--rounds', type=int, default=3, help='for `rivals`')
    parser.add_argument('--large-photos', type=int, default=240, help='for `rivals`: of two megapixels')
    parser.add_argument('--killed-photos', type=int, default=3000, help='for `large`: in the run that is killed')
    parser.add_argument('--temp', help='for `rivals` and `large`: where photos and features are written for the while')
    parser.add_argument('--output', type=Path, default=HERE/'results', help='folder of the tables')
    for hidden in ('--manifest', '--rows', '--folder'): parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.preset = args.preset or ('fast' if args.part=='large' else 'balanced')
    cv2.setNumThreads(1)
    PARTS[args.part](args)


if __name__ == '__main__': main()
