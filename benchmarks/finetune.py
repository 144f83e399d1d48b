"""What a fine-tuned last stage brings to the vote, and what it takes; beside the recipe that people know.

    python benchmarks/finetune.py --data ../shared/data --weights ../shared/weights --sets amulet6 magtile

Everything is nested: in each of five outer folds (those of benchmarks/accuracy.py) the product's trainer learns from
the rest, with `finetune` never, always and auto. The rival is fastai's `fine_tune` on the same net, photos and folds:
three epochs of a new head on a frozen net, then eight of the whole net, one-cycle, discriminative rates, random crops
and mirror images; written in torch, so that it runs where fastai does not (`--rival`).

    python benchmarks/finetune.py --time 1000

takes the time of five folds on so many photos (maps made up, as their numbers do not change it).
Writes benchmarks/results/finetune.csv.
"""
import argparse
import tempfile
import time
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from accuracy import load
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from amulet_hybrid.core import file_digest
from amulet_hybrid.data.images import read_image, resize_image
from amulet_hybrid.data.manifest import make_manifest
from amulet_hybrid.evaluate.metrics import evaluate_predictions
from amulet_hybrid.features.backbone_export import make_backbone
from amulet_hybrid.features.config import FeatureConfig
from amulet_hybrid.features.extractor import HybridFeatureExtractor
from amulet_hybrid.features.weights import find_weights
from amulet_hybrid.learn.config import TrainingConfig
from amulet_hybrid.learn.ensemble import group_difference, photo_losses
from amulet_hybrid.learn.finetuned_member import MapRows, tail_logits
from amulet_hybrid.learn.finetuned_tail import FineTunedTail
from amulet_hybrid.learn.match_evidence import MatchRows
from amulet_hybrid.learn.out_of_fold import AugmentedRows
from amulet_hybrid.learn.trainer import HybridTrainer

NET = 'efficientnet_lite0'
MODES = ('never', 'auto', 'always')


def measure_maps(data: Path, name: str, cache: Path, side: int):
    "Maps of the photos and of their mirror images, half precision; labels and groups in the same order"
    csv = data/f'{name}_groups.csv'
    manifest, root = make_manifest(data/name, csv if csv.exists() else None)
    manifest = manifest.sort_values('path', ignore_index=True)
    manifest['sha256'] = [file_digest(root/p) for p in manifest['path']]
    block = f'cnn:{NET}@maps:side={side}'
    extractor = HybridFeatureExtractor(FeatureConfig(blocks=(block,)), cache)
    rows = extractor.extract_manifest(manifest, root)
    turned = extractor.extract_mirrored(manifest, root, rows)[block]
    return manifest, root, block, rows[block].astype(np.float16), turned.astype(np.float16), extractor.block_info[block]


def outer_folds(y, groups, seed: int):
    "As benchmarks/accuracy.py draws them"
    kind = StratifiedGroupKFold if len(set(groups)) < len(groups) else StratifiedKFold
    return kind(5, shuffle=True, random_state=seed).split(y, y, groups)


def nested(blocks, mirrored, points, about, labels, groups, maps, config):
    "Out-of-fold probabilities for each of `MODES`, and how often the fine-tuned net voted"
    block, rows, turned, info = maps
    classes, y = np.unique(labels, return_inverse=True)
    proba = {mode: np.zeros((len(y), len(classes))) for mode in MODES}
    votes, seconds = dict.fromkeys(MODES, 0), dict.fromkeys(MODES, 0.)
    kept = tempfile.TemporaryDirectory() # 'always' takes over the folds of 'auto'
    for train, test in outer_folds(y, groups, config.seed):
        known = MatchRows(points[train], train.astype(str))
        taught = MapRows(block, rows[train], FineTunedTail(NET),
                         AugmentedRows({block: turned[train]}, np.arange(len(train))), info)
        held_out = {k: v[test] for k, v in blocks.items()}
        held_out |= {block: rows[test].astype(np.float32), 'local': points[test]}
        for mode in MODES:
            start = time.process_time()
            trainer = HybridTrainer(config.replace(finetune=mode, seed=42), checkpoint_dir=kept.name).fit(
                {k: v[train] for k, v in blocks.items()}, labels[train], groups[train], *about,
                mirrored={k: v[train] for k, v in mirrored.items()}, points=known, maps=taught)
            proba[mode][test] = trainer.model_.predict_proba(held_out)
            seconds[mode] += time.process_time()-start
            votes[mode] += any(m.candidate.model == 'finetuned' for m in trainer.model_.members)
            for note in (text for _, text in trainer.notes_ if 'ine-tun' in text and mode != 'never'):
                print('   ', mode, note, flush=True)
    return classes.tolist(), y, proba, votes, seconds


def rival_fold(paths, y, train, test, side: int, seed: int):
    "fastai's recipe for one fold: probabilities of the held-out photos"
    import torch
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    found = make_backbone(NET, find_weights(NET), seed=seed)
    net, classes = found.net, int(y.max())+1
    head = torch.nn.Sequential(torch.nn.BatchNorm1d(1280), torch.nn.Dropout(.25),
                               torch.nn.Linear(1280, 512, bias=False), torch.nn.ReLU(),
                               torch.nn.BatchNorm1d(512), torch.nn.Dropout(.5),
                               torch.nn.Linear(512, classes, bias=False))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (found.mean, found.std))
    pixels = np.stack([resize_image(read_image(p), side+side//8) for p in paths])

    def tensor(photos):
        x = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).float()/255
        return ((x-mean)/std).contiguous(memory_format=torch.channels_last)

    def drawn(i):
        top, left = rng.integers(0, side//8+1, 2)
        view = pixels[i, top:top+side, left:left+side]
        return view[:, ::-1].copy() if rng.random() < .5 else view

    def run(parts, epochs, warm):
        steps = epochs*(len(train)//32 or 1)
        optimizer = torch.optim.AdamW([{'params': [p for p in m.parameters()], 'lr': r} for m, r in parts],
                                      betas=(.9, .99), weight_decay=.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [r for _, r in parts], steps, pct_start=warm)
        for _ in range(epochs):
            order = rng.permutation(train)
            for k in range(len(train)//32 or 1):
                some = order[32*k:32*k+32]
                out = head(net.forward_features(tensor([drawn(i) for i in some])).mean((2, 3)))
                loss = torch.nn.functional.cross_entropy(out, torch.from_numpy(y[some]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

    net.train()
    head.train()
    for p in net.parameters():
        p.requires_grad_(isinstance(p, torch.nn.Parameter) and p.ndim == 1) # fastai trains BatchNorm of a frozen body
    run([(net, 2e-3), (head, 2e-3)], 3, .99)
    for p in net.parameters():
        p.requires_grad_(True)
    stages = [*net.blocks]
    early = torch.nn.ModuleList([net.conv_stem, net.bn1, *stages[:3]])
    late = torch.nn.ModuleList([*stages[3:], net.conv_head, net.bn2])
    run([(early, 1e-5), (late, 1e-4), (head, 1e-3)], 8, .3)
    net.eval()
    head.eval()
    border = side//16
    with torch.inference_mode():
        views = [pixels[i, border:border+side, border:border+side] for i in test]
        out = [head(net.forward_features(tensor(views[k:k+32])).mean((2, 3))) for k in range(0, len(views), 32)]
        return torch.softmax(torch.cat(out), 1).numpy()


def rival(paths, labels, groups, side: int, seed: int):
    "Out-of-fold probabilities of fastai's recipe"
    y = np.unique(labels, return_inverse=True)[1]
    out = np.zeros((len(y), int(y.max())+1))
    for train, test in outer_folds(y, groups, seed):
        out[test] = rival_fold(paths, y, train, test, side, seed)
    return out


def take_time(photos: int, side: int, jobs: int):
    "Seconds of five folds on made-up maps"
    width = 192*(-(-side//32))**2
    rng = np.random.default_rng(0)
    rows, y = rng.random((photos, width), np.float32).astype(np.float16), np.arange(photos) % 6
    views = AugmentedRows({'maps': rows}, np.arange(photos))
    start, cpu = time.time(), time.process_time()
    tail_logits(MapRows('maps', rows, FineTunedTail(NET), views), y, rng.permutation(photos) % 5, jobs=jobs)
    return time.time()-start, time.process_time()-cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=Path('../shared/data'))
    parser.add_argument('--weights', default='../shared/weights')
    parser.add_argument('--sets', nargs='*', default=['amulet6', 'magtile'])
    parser.add_argument('--preset', default='rich', help='feature blocks of the vote')
    parser.add_argument('--side', type=int, default=224, help='at which the net sees a photo')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='of the outer folds')
    parser.add_argument('--rival', action='store_true', help="fastai's recipe, too")
    parser.add_argument('--time', type=int, default=0, help='photos whose five folds are timed, and nothing else')
    parser.add_argument('--jobs', type=int, default=0)
    parser.add_argument('--cache', type=Path, default=Path('.cache'))
    parser.add_argument('--output', type=Path, default=Path(__file__).parent/'results'/'finetune.csv')
    args = parser.parse_args()
    jobs = args.jobs or joblib.cpu_count()
    if args.time:
        seconds, cpu = take_time(args.time, args.side, jobs)
        print(f'{args.time} photos, 5 folds, {jobs} processes: {seconds:.0f} s')
        return
    rows = []
    for name in args.sets:
        found = load(args.data, name, args.weights, args.cache, args.preset)
        blocks, mirrored, points, about, labels, groups = found
        manifest, root, *maps = measure_maps(args.data, name, args.cache, args.side)
        assert manifest['label'].tolist() == labels.tolist(), 'both are in the order of their paths'
        for seed in args.seeds:
            config = TrainingConfig(quick=True, novelty=False, jobs=args.jobs, seed=seed)
            classes, y, proba, votes, seconds = nested(blocks, mirrored, points, about, labels, groups, maps, config)
            if args.rival:
                start = time.process_time()
                proba['fastai, 3+8 epochs'] = rival([root/p for p in manifest['path']], labels, groups, args.side, seed)
                seconds['fastai, 3+8 epochs'] = time.process_time()-start
            for mode, p in proba.items():
                overall = evaluate_predictions(y, p, classes, groups).overall['value']
                more, error = group_difference(photo_losses(p, y)-photo_losses(proba['never'], y), groups)
                rows.append({'set': name, 'fold_seed': seed, 'finetune': mode, 'side': args.side,
                             'balanced_accuracy': overall['balanced_accuracy'], 'macro_f1': overall['macro_f1'],
                             'log_loss': overall['log_loss'], 'extra_loss': more, 'extra_loss_low': more-1.96*error,
                             'extra_loss_high': more+1.96*error, 'folds_in_which_it_votes': votes.get(mode),
                             'cpu_seconds_a_fold': seconds[mode]/5})
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows).round(4)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.output, index=False)
    print(table.to_string(index=False))


if __name__ == '__main__': main()
