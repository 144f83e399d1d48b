"""Do we find the photos that show one picture, and only those? python benchmarks/inspection_duplicates.py [recall]
[real] [photos] [search] [--rivals-python PATH]"""
import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from amulet_hybrid.data.duplicates import (
    _looks,
    clusters,
    duplicate_table,
    duplicate_views,
    near_duplicates,
    near_hashes,
    photo_print,
)
from amulet_hybrid.data.images import read_image

RIVALS = r"""
import collections.abc, itertools, json, logging, sys
from pathlib import Path
folder, out = sys.argv[1:]
import numpy as np
name = lambda p: Path(p).name
found = {}
from cleanvision import Imagelab
for kind, size in [(k, s) for k in ('phash', 'dhash', 'ahash', 'whash')
                   for s in (2, 3, 4, 5, 6, 8, 12, 16) if k!='whash' or s in (2, 4, 8, 16)]:
    lab = Imagelab(data_path=folder)
    lab.find_issues({'exact_duplicates': {}, 'near_duplicates': {'hash_type': kind, 'hash_size': size}}, n_jobs=1,
                    verbose=False)
    sets = lab.info['near_duplicates']['sets'] + lab.info['exact_duplicates']['sets']
    if sum(len(s)**2 for s in sets) > 4_000_000: continue
    found[f'cleanvision {kind} {size}'] = sorted({tuple(sorted((name(a), name(b)))) for s in sets
                                                  for a, b in itertools.combinations(s, 2)})
from imagededup.methods import AHash, DHash, PHash, WHash
for method in (PHash, DHash, AHash, WHash):
    hasher = method(verbose=False)
    codes = hasher.encode_images(image_dir=folder, num_enc_workers=0)
    names = sorted(codes)
    bits = np.array([np.unpackbits(np.frombuffer(bytes.fromhex(codes[n].zfill(16)), np.uint8))
                     for n in names]).astype(np.int16)
    distance = bits@(1-bits).T
    distance = distance + distance.T
    default = hasher.find_duplicates(encoding_map=codes, max_distance_threshold=10, num_dist_workers=0)
    pairs = {tuple(sorted((a, b))) for a, others in default.items() for b in others}
    i, j = np.nonzero(np.triu(distance <= 10, 1))
    assert pairs == {(names[a], names[b]) for a, b in zip(i, j)}, 'the matrix must say what find_duplicates says'
    for most in range(0, 21):
        i, j = np.nonzero(np.triu(distance <= most, 1))
        if len(i) < 4_000_000:
            found[f'imagededup {method.__name__} {most}'] = [(names[a], names[b]) for a, b in zip(i, j)]
json.dump(found, open(out, 'w'))
"""
DEFAULTS = ['ours', 'cleanvision phash 8'] + [f'imagededup {m} 10' for m in ('PHash', 'DHash', 'AHash', 'WHash')]


def turned(rgb, angle, border):
    "Tilted in its frame"
    h, w = rgb.shape[:2]
    return cv2.warpAffine(rgb, cv2.getRotationMatrix2D((w/2-.5, h/2-.5), angle, 1), (w, h), flags=cv2.INTER_CUBIC,
                          borderMode=border)


def cut(rgb, rng):
    "5 % less on all sides, or on two"
    h, w = rgb.shape[:2]
    y, x = round(.05*h), round(.05*w)
    return [rgb[y:h-y, x:w-x], rgb[y:, x:], rgb[:h-y, :w-x], rgb[y:, :w-x]][rng.integers(4)]


def scaled(rgb, factor):
    return cv2.resize(rgb, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)


def lit(rgb, factor): return np.clip(rgb*factor, 0, 255).astype(np.uint8)


KINDS = { # name: (photo, chance) -> (changed photo, JPEG quality)
    'JPEG 40': lambda p, r: (p, 40), 'JPEG 70': lambda p, r: (p, 70), 'half': lambda p, r: (scaled(p, .5),
        90), 'double': lambda p, r: (scaled(p, 2), 90),
    'cut 5 %': lambda p, r: (cut(p, r), 90),
    'brighter 20 %': lambda p, r: (lit(p, 1.2), 90), 'darker 20 %': lambda p, r: (lit(p, .8), 90),
    'turned 3': lambda p, r: (turned(p, 3*r.choice([-1, 1]), cv2.BORDER_REFLECT), 90),
    'turned 5-15, black corners': lambda p, r: (turned(p, r.uniform(5, 15)*r.choice([-1, 1]), cv2.BORDER_CONSTANT), 90),
    'mirrored': lambda p, r: (p[:, ::-1], 90), 'cut, brighter, JPEG 60': lambda p, r: (cut(lit(p, 1.15), r), 60)}


def originals(data, rng):
    "Real photos: all amulets, one of each tile, coins; what is known of each"
    parts = []
    for name, count in (('amulet6', None), ('magtile', None), ('coins', 1000)):
        paths = sorted(p.relative_to(data/name).as_posix() for p in (data/name).rglob('*.jpg'))
        groups = (pd.read_csv(data/f'{name}_groups.csv').set_index('path')['group'].reindex(paths).to_numpy()
                  if (data/f'{name}_groups.csv').exists() else np.array(paths))
        part = pd.DataFrame({'set': name, 'path': paths, 'label': [p.split('/')[0] for p in paths], 'group': groups})
        if name=='magtile': part = part.drop_duplicates('group')
        parts.append(part if count is None else part.iloc[np.sort(rng.choice(len(part), count, replace=False))])
    return pd.concat(parts, ignore_index=True)


def judge(pairs, origin, table):
    """Of pairs of positions: injected twins found; pairs that are surely wrong; pairs that nobody has judged (strangers
    of one class, which may be shots of one thing)"""
    a, b = origin[pairs[:, 0]], origin[pairs[:, 1]]
    twin = a==b
    label, place, group = (table[c].to_numpy() for c in ('label', 'set', 'group'))
    one_class = (label[a]==label[b]) & (place[a]==place[b])
    known = (group[a]==group[b]) & (place[a]==place[b])
    wrong = ~twin & ~known & (~one_class | (place[a]=='magtile'))
    return twin, wrong, ~twin & ~known & ~wrong


def recall(data, rivals_python, each=60, seed=0):
    "Recall by kind of copy, for every tool at its defaults and tuned to the best recall at precision 0.99"
    rng = np.random.default_rng(seed)
    table = originals(data, rng)
    used = rng.permutation(len(table))[:each*len(KINDS)]
    origin = np.concatenate([np.arange(len(table)), used])
    kind = np.array(['']*len(table) + list(np.repeat(list(KINDS), each)), dtype=object)
    with tempfile.TemporaryDirectory() as folder:
        for i, (source, how) in enumerate(zip(origin, kind)):
            data_path = data/table['set'][source]/table['path'][source]
            if not how: (Path(folder)/f'{i:05d}.jpg').write_bytes(data_path.read_bytes())
            else:
                changed, quality = KINDS[how](read_image(data_path), rng)
                cv2.imwrite(f'{folder}/{i:05d}.jpg', np.ascontiguousarray(changed[..., ::-1]),
                            [cv2.IMWRITE_JPEG_QUALITY, quality])
        names = [f'{i:05d}.jpg' for i in range(len(origin))]
        start = time.perf_counter()
        ours = near_duplicates(prints_of([Path(folder)/n for n in names]))
        print(f'{len(origin)} photos, {len(used)} of them injected copies; ours: {time.perf_counter()-start:.1f} s '
              f'with decoding')
        found = {'ours': ours[['first', 'second']].to_numpy()}
        if rivals_python:
            with tempfile.NamedTemporaryFile(suffix='.json') as out:
                subprocess.run([rivals_python, '-c', RIVALS, folder, out.name], check=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
                found |= {tool: np.array([[int(a[:5]), int(b[:5])] for a, b in pairs], int).reshape(-1, 2)
                          for tool, pairs in json.loads(Path(out.name).read_text()).items()}
    rows = []
    for tool, pairs in found.items():
        twin, wrong, open_ = judge(pairs, origin, table)
        hit = pd.Series(kind[np.maximum(pairs[twin, 0], pairs[twin, 1])]).value_counts()
        rows.append({'tool': tool, 'recall': twin.sum()/len(used), 'precision': twin.sum()/max(1,
                (twin | wrong).sum()), 'strict': twin.sum()/max(1, (twin | wrong | open_).sum()),
                     'wrong': wrong.sum(), 'unjudged': open_.sum(), **{k: hit.get(k, 0)/each for k in KINDS}})
    rows = pd.DataFrame(rows).set_index('tool')
    good = rows[rows['precision'] >= .99]
    families = ['cleanvision', *[f'imagededup {m}' for m in ('PHash', 'DHash', 'AHash', 'WHash')]]
    tuned = [good[good.index.str.startswith(f)]['recall'].idxmax()
             for f in families if good.index.str.startswith(f).any()]
    return rows.loc[list(dict.fromkeys([*[d for d in DEFAULTS if d in rows.index], *tuned]))]


def prints_of(paths):
    with ThreadPoolExecutor(2) as pool:
        return np.array(list(pool.map(lambda p: photo_print(read_image(p, at_least=256)), paths)))


def real(data, sheets):
    "What is found in the real sets as they are"
    rows = []
    for name in ('amulet6', 'amulet6_leaky', 'magtile', 'coins'):
        paths = sorted(p.relative_to(data/name).as_posix() for p in (data/name).rglob('*.jpg'))
        prints = prints_of([data/name/p for p in paths])
        start = time.perf_counter()
        pairs = near_duplicates(prints)
        seconds = time.perf_counter()-start
        table = pd.DataFrame({'path': paths, 'label': [p.split('/')[-2] for p in paths], 'sha256': '', 'pixels': ''})
        found = duplicate_table(table, pairs)
        row = {'set': name, 'photos': len(paths), 'search_s': round(seconds, 1), 'pairs': len(pairs),
               'clusters': found['cluster'].nunique(), 'with_twin': len(found),
               'largest': found.groupby('cluster').size().max(),
               'conflict_clusters': found[found['conflict']]['cluster'].nunique()}
        labels = table['label'].to_numpy()
        row['conflict_pairs'] = int((labels[pairs['first']]!=labels[pairs['second']]).sum())
        if (file := data/f'{name}_groups.csv').exists():
            group = pd.read_csv(file).set_index('path')['group'].reindex(paths).to_numpy()
            across = pairs[group[pairs['first']]!=group[pairs['second']]]
            row |= {'pairs_across_groups': len(across),
                    'clusters_across_groups': int(found.assign(group=found['path'].map(dict(zip(paths,
                    group)))).groupby('cluster')['group'].nunique().gt(1).sum())}
            if name=='amulet6_leaky':
                cluster = clusters(len(paths), pairs[['first', 'second']].to_numpy())
                part = np.array([p.split('/')[0] for p in paths])
                in_train, test = set(cluster[part=='train']), part=='test'
                row |= {'test_sources': len(set(group[test])),
                        'test_sources_in_train': len(set(group[part=='train']) & set(group[test])),
                        'found_in_train': len({g for g, c in zip(group[test], cluster[test]) if c in in_train})}
                print('amulet6_leaky, sources joined:',
                      sorted({' + '.join(sorted({group[a], group[b]}))
                              for a, b in zip(across['first'], across['second'])}))
        if row["conflict_clusters"]:
            print(f'{name}, conflicts:\n' + found.loc[found['conflict'], ['cluster', 'path', 'similarity',
                    'weakest']].to_string(index=False))
        if sheets: contact_sheet(data/name, paths, pairs.sort_values('similarity').head(24), f'{sheets}/{name}.png')
        rows.append(row)
    return pd.DataFrame(rows).set_index('set').T


def contact_sheet(root, paths, pairs, file, side=128):
    "Pairs side by side, to be judged by eye"
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    tiles = [np.hstack([cv2.resize(read_image(root/paths[k]), (side, side), interpolation=cv2.INTER_AREA)
                        for k in pair]) for pair in pairs[['first', 'second']].to_numpy()]
    for tile, value in zip(tiles, pairs['similarity']):
        cv2.putText(tile, f'{value:.3f}', (3, 12), cv2.FONT_HERSHEY_SIMPLEX, .4, (255, 0, 255), 1)
    tiles += [np.zeros((side, 2*side, 3), np.uint8)]*(-len(tiles) % 6)
    cv2.imwrite(file, np.vstack([np.hstack([np.pad(t, ((2, 2), (3, 3), (0, 0))) for t in tiles[i:i+6]])
                                 for i in range(0, len(tiles), 6)])[..., ::-1])


def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024


def photos(data, count=10_000, seed=0):
    "Seconds for many photos: all real ones, and they again with their light and place changed so that few are copies"
    rng = np.random.default_rng(seed)
    files = [p for name in ('coins', 'magtile', 'amulet6') for p in sorted((data/name).rglob('*.jpg'))]
    rgb = [read_image(p, at_least=256) for p in files]
    start = time.perf_counter()
    first = [photo_print(p) for p in rgb]
    print(f'photo_print: {(time.perf_counter()-start)/len(rgb)*1e3:.2f} ms a photo')
    more = []
    for photo in itertools.islice(itertools.cycle(rgb), count-len(rgb)):
        h, w = photo.shape[:2]
        # a part of the photo, half as wide: another picture of like things
        y = int(h*rng.uniform(.15, .35))
        x = int(w*rng.uniform(.15, .35))
        more.append(photo_print(np.rot90(photo[y:y+h//2, x:x+w//2], rng.integers(4)).copy()))
    prints = np.array(first+more)
    rows = []
    for jobs in (1, 2):
        start = time.perf_counter()
        pairs = near_duplicates(prints, jobs=jobs)
        rows.append({'photos': len(prints), 'jobs': jobs, 'seconds': round(time.perf_counter()-start, 1),
                     'pairs': len(pairs), 'peak_mb': peak_mb()})
    return pd.DataFrame(rows)


def like_real(data, count, rng):
    """Hashes with the joint distribution of real ones: bits of a normal law fitted to the real bits, and 4,000 planted
    twins"""
    prints = np.concatenate([prints_of(sorted((data/n).rglob('*.jpg'))[::2]) for n in ('coins', 'magtile', 'amulet6')])
    bits = np.concatenate([np.unpackbits(_looks(prints, v)[0].astype('>u8').view(np.uint8).reshape(-1, 8), axis=1)
                           for v in duplicate_views()[:14]]).astype(np.float64)
    spread = np.sin(np.pi/2*np.corrcoef(bits.T)) # of the normal variables whose signs have this correlation, about
    values, axes = np.linalg.eigh(spread)
    root = (axes*np.sqrt(np.maximum(values, 0)))
    root /= np.linalg.norm(root, axis=1, keepdims=True)
    cuts = np.array([np.quantile(rng.standard_normal(20_000), 1-m) for m in bits.mean(0)])
    draw = [np.packbits(rng.standard_normal((min(50_000, count-s), 64))@root.T > cuts,
                        axis=1).view('>u8').ravel().astype(np.uint64) for s in range(0, count, 50_000)]
    hashes, distance = np.concatenate(draw), np.repeat([2, 4, 6, 8], 1000)
    of, to = np.split(rng.choice(count, 8000, replace=False), 2)
    flips = np.array([np.bitwise_or.reduce(np.uint64(1) << rng.choice(64, d, replace=False).astype(np.uint64))
                      for d in distance])
    hashes[to] = hashes[of]^flips
    return hashes, np.minimum(of, to)*count+np.maximum(of, to), distance


def search_one(data, count, exact):
    "One size, in this process"
    hashes, planted, distance = like_real(data, count, np.random.default_rng(0))
    before, start = peak_mb(), time.perf_counter()
    pairs = near_hashes(hashes, 8, exact=exact)
    seconds = time.perf_counter()-start
    hit = np.isin(planted, pairs[:, 0]*count+pairs[:, 1])
    return {'hashes': count, 'way': 'all pairs' if exact else 'sorted', 'seconds': round(seconds, 1),
            'peak_mb': peak_mb(), 'before_mb': before,
            'pairs': len(pairs), **{f'recall_{d}_bits': float(hit[distance==d].mean()) for d in (2, 4, 6, 8)}}


def search(data, sizes):
    "Each size in a fresh process"
    cases = [(n, exact) for n in sizes for exact in (True, False) if not exact or n <= 100_000]
    calls = [[sys.executable, __file__, '--data', str(data), '--one', str(n), str(int(exact))] for n, exact in cases]
    run = [subprocess.run(call, check=True, capture_output=True, text=True).stdout for call in calls]
    return pd.DataFrame([json.loads(text.splitlines()[-1]) for text in run])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('parts', nargs='*', help='recall, real, photos, search; default: all')
    parser.add_argument('--data', type=Path, default=Path(os.environ.get('AMULET_DATA', '../shared/data')))
    parser.add_argument('--rivals-python', help='Python that has cleanvision and imagededup')
    parser.add_argument('--sheets', help='folder for contact sheets of the least similar pairs')
    parser.add_argument('--sizes', type=int, nargs='+', default=[10_000, 100_000, 1_000_000])
    parser.add_argument('--one', type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print(json.dumps(search_one(args.data, args.one[0], bool(args.one[1]))))
    pd.set_option('display.width', 250, 'display.max_columns', 50)
    for part in args.parts or ['recall', 'real', 'photos', 'search']:
        print(f'\n{part}')
        if part=='recall': print(recall(args.data, args.rivals_python).T.round(3).to_string())
        elif part=='real': print(real(args.data, args.sheets).to_string())
        elif part=='photos': print(photos(args.data).to_string(index=False))
        elif part=='search': print(search(args.data, args.sizes).round(3).T.to_string(header=False))
        else: parser.error(f'no part is called {part!r}')


if __name__ == '__main__': main()
