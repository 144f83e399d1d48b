"""Are maps faithful? Deletion and insertion on real photos, beside Grad-CAM, a fixed centre and chance.

    python benchmarks/explain.py --data ../shared/data --weights ../shared/weights

A model is trained on part of the photos (groups whole). Each held-out photo's map puts 8 x 8 tiles in an order: by
`classifier.explain` (the exact sum), by Grad-CAM of efficientnet_lite0 with a logistic head that was fitted on the same
photos, by nearness to the centre, and at random. Deletion covers tiles in this order (Petsiuk et al., BMVC 2018), with
a blurred copy of the photo: the area under the served probability of its class is to be small. Insertion uncovers
them: the area is to be large. Intervals: 1.96 standard errors, photos of one group vary together.

It also tells the largest difference of sum and margin, what an explanation takes beside the prediction, and how like
maps of the same photos are when the weights of all linear heads are shuffled (Adebayo et al., NeurIPS 2018), and how
long it takes to find the nearest of 100,000 photos.
Writes benchmarks/results/explain.csv.
"""
import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from amulet_hybrid.core import file_digest
from amulet_hybrid.data.images import read_image, resize_image
from amulet_hybrid.data.manifest import make_manifest
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.extractor import HybridFeatureExtractor
from amulet_hybrid.learn.config import TrainingConfig
from amulet_hybrid.learn.ensemble import group_difference
from amulet_hybrid.learn.net_explanations import grad_cam
from amulet_hybrid.learn.trainer import HybridTrainer
from amulet_hybrid.learn.transfer_model import IMAGENET_MEAN, IMAGENET_STD, create_transfer_model
from amulet_hybrid.model.bundle import HeldOut, save_bundle
from amulet_hybrid.model.classifier import HybridClassifier
from amulet_hybrid.model.similar_photos import PhotoIndex

TILES, STEP = 8, 8 # Along each side of a photo; that are covered at once


def split_photos(data: Path, name: str, most: int, asked: int, seed: int):
    "Photos that are learned from and photos that are asked about, groups whole"
    csv = data/f'{name}_groups.csv'
    manifest, root = make_manifest(data/name, csv if csv.exists() else None)
    manifest = manifest.sort_values('path', ignore_index=True)
    manifest['sha256'] = [file_digest(root/p) for p in manifest['path']]
    groups = manifest['group'].where(manifest['group'] != '', manifest['path'])
    train, test = next(GroupShuffleSplit(1, test_size=.3, random_state=seed).split(manifest, groups=groups))
    rng = np.random.default_rng(seed)
    train, test = (np.sort(rng.permutation(part)[:n]) for part, n in ((train, most), (test, asked)))
    return manifest.iloc[train], manifest.iloc[test], groups, root


def train_classifier(table, groups, root, args, folder: Path):
    "A served classifier of the photos of a table"
    extractor = HybridFeatureExtractor(FeatureConfig(preset=args.preset, weights=args.weights), args.cache)
    blocks = extractor.extract_manifest(table, root)
    mirrored = extractor.extract_mirrored(table, root, blocks)
    trainer = HybridTrainer(TrainingConfig(quick=True, novelty=False, jobs=1)).fit(
        blocks, table['label'].to_numpy(str), groups[table.index].to_numpy(str), extractor.encoders(),
        extractor.block_info, mirrored=mirrored)
    save_bundle(folder/'bundle', trainer.model_, extractor,
                held_out=HeldOut({k: v[:20] for k, v in blocks.items()}, [root/p for p in table['path'][:20]]))
    return HybridClassifier(folder/'bundle', enable_caching=False, confidence_threshold=0)


def as_tensor(rgb, side: int = 224):
    "A photo as nets of torchvision take it"
    x = torch.from_numpy(resize_image(rgb, side, 'stretch')).permute(2, 0, 1).float()/255
    return (x-torch.tensor(IMAGENET_MEAN).view(3, 1, 1))/torch.tensor(IMAGENET_STD).view(3, 1, 1)


def train_net(photos, labels, classes):
    "efficientnet_lite0 whose head is a logistic regression on its features"
    net = create_transfer_model('efficientnet_lite0', len(classes), device='cpu').eval()
    with torch.inference_mode():
        X = torch.cat([net.get_features(as_tensor(rgb)[None]) for rgb in photos]).numpy()
    scaler, head = make_pipeline(StandardScaler(), LogisticRegression(C=.01, max_iter=500)).fit(X, labels)
    weight = head.coef_/scaler.scale_
    bias = head.intercept_-weight@scaler.mean_
    if len(classes) == 2: weight, bias = np.vstack([-weight, weight])/2, np.hstack([-bias, bias])/2
    with torch.no_grad():
        net.head.weight[:] = torch.from_numpy(weight)
        net.head.bias[:] = torch.from_numpy(bias)
    net.classes = list(classes)
    return net


def tile_scores(values):
    "(TILES, TILES): a map summed over tiles"
    return cv2.resize(np.asarray(values, np.float64), (TILES, TILES), interpolation=cv2.INTER_AREA)


def areas(classifier, rgb, label: str, scores):
    "Mean served probability of a class while tiles are covered, and while they are uncovered, the highest score first"
    blurred = cv2.GaussianBlur(rgb, (0, 0), max(rgb.shape[:2])/20)
    order = np.argsort(-scores, axis=None, kind='stable')
    rows, columns = (np.linspace(0, n, TILES+1).astype(int) for n in rgb.shape[:2])
    found = []
    for start, other in ((rgb, blurred), (blurred, rgb)):
        now, seen = start.copy(), [classifier.classify(start).probabilities[label]]
        for k in range(0, TILES**2, STEP):
            for y, x in zip(*np.unravel_index(order[k:k+STEP], scores.shape)):
                part = np.s_[rows[y]:rows[y+1], columns[x]:columns[x+1]]
                now[part] = other[part]
            seen.append(classifier.classify(now).probabilities[label])
        found.append(float(np.trapezoid(seen, dx=1/(len(seen)-1))))
    return found


def shuffled(classifier, seed: int):
    "The same classifier with the weights of all linear heads dealt anew"
    rng = np.random.default_rng(seed)
    members = []
    for m in classifier.bundle.model.members:
        arrays = dict(m.head.arrays)
        if 'weight' in arrays: arrays['weight'] = rng.permuted(arrays['weight'], axis=1)
        members.append(replace(m, head=replace(m.head, arrays=arrays)))
    classifier.bundle.model.members[:] = members


def measure(name: str, args, folder: Path):
    "All of it on one set"
    train, test, groups, root = split_photos(args.data, name, args.photos, args.asked, args.seed)
    classifier = train_classifier(train, groups, root, args, folder)
    net = train_net([read_image(root/p) for p in train['path']], train['label'].to_numpy(str), classifier.classes)
    rng = np.random.default_rng(args.seed)
    centre = np.hypot(*(np.indices((TILES, TILES))-(TILES-1)/2))
    found, gaps, ratios, maps = [], [], [], []
    for i, p in zip(test.index, test['path']):
        rgb = read_image(root/p)
        times = []
        for work in (classifier.classify, classifier.explain)*3:
            start = time.thread_time()
            answer = work(rgb)
            times.append(time.thread_time()-start)
        ratios.append(np.median(times[3::2])/np.median(times[2::2]))
        gaps.append(abs(answer.check))
        maps.append(answer.places)
        ways = {'exact sum': tile_scores(answer.places),
                'Grad-CAM': tile_scores(grad_cam(net, as_tensor(rgb), answer.label)),
                'centre': -centre, 'random': rng.random((TILES, TILES))}
        for way, scores in ways.items():
            deletion, insertion = areas(classifier, rgb, answer.label, scores)
            found.append({'photo': i, 'way': way, 'deletion': deletion, 'insertion': insertion})
        print(f'{name} {len(maps)}/{len(test)}', end='\r', flush=True)
    shuffled(classifier, args.seed)
    alike = [spearmanr(a.ravel(), classifier.explain(read_image(root/p)).places.ravel())[0]
             for a, p in zip(maps, test['path'])]
    group = groups[test.index].to_numpy(str)
    table = pd.DataFrame(found).pivot(index='photo', columns='way').loc[test.index]
    rows = []
    for measure_, sign in (('deletion', -1), ('insertion', 1)):
        for way in ('exact sum', 'Grad-CAM', 'centre', 'random'):
            values = table[measure_, way].to_numpy()
            better = sign*(table[measure_, 'exact sum'].to_numpy()-values)
            more, error = group_difference(better, group)
            rows.append({'set': name, 'photos': len(test), 'figure': measure_, 'way': way, 'value': values.mean(),
                         'exact_sum_better_by': more, 'low': more-1.96*error, 'high': more+1.96*error})
    rows += [{'set': name, 'photos': len(test), 'figure': figure, 'way': 'exact sum', 'value': value}
             for figure, value in (('largest difference of sum and margin', max(gaps)),
                                   ('time of an explanation over a prediction, median', np.median(ratios)),
                                   ('rank correlation with shuffled heads, mean', np.mean(alike)))]
    return rows


def index_time(photos: int = 100_000, classes: int = 8, seed: int = 0):
    "Milliseconds to find five photos among many, once the photo in question is measured"
    rng = np.random.default_rng(seed)
    y = np.arange(1000) % classes
    rows = rng.normal(size=(1000, 2600)).astype(np.float32)
    index = PhotoIndex.fit({'made up': rows}, y, list(map(str, y)), trials=False)
    large = replace(index, rows=rng.integers(-127, 128, (photos, index.rows.shape[1])).astype(np.int8),
                    y=rng.integers(0, classes, photos).astype(np.int32), photos=np.arange(photos).astype(str),
                    digests=np.full(photos, ''))
    times = []
    for _ in range(31):
        start = time.perf_counter()
        large.nearest({'made up': rows[:1]}, list(map(str, range(classes))))
        times.append(1000*(time.perf_counter()-start))
    return {'set': 'made up', 'photos': photos, 'figure': 'milliseconds to find the nearest, median', 'way': 'index',
            'value': np.median(times[1:])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=Path('../shared/data'))
    parser.add_argument('--weights', default='../shared/weights')
    parser.add_argument('--sets', nargs='+', default=['amulet6', 'coins', 'magtile'])
    parser.add_argument('--preset', default='balanced', help='feature blocks')
    parser.add_argument('--photos', type=int, default=300, help='that are learned from, at most')
    parser.add_argument('--asked', type=int, default=40, help='held-out photos that are explained')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--cache', type=Path, default=Path('.cache'))
    parser.add_argument('--output', type=Path, default=Path(__file__).parent/'results'/'explain.csv')
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.sets:
        with tempfile.TemporaryDirectory() as folder: rows += measure(name, args, Path(folder))
        print(pd.DataFrame(rows).round(4).to_string(index=False), flush=True)
    rows.append(index_time())
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).round(4).to_csv(args.output, index=False)


if __name__ == '__main__': main()
