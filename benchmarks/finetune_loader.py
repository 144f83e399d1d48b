"""A training step on 32 photos through the loader, against its transforms plus forward and backward alone, in turn:
python benchmarks/finetune_loader.py [--data PHOTOS] [--net efficientnet_lite0]"""
import argparse
import statistics
import time
from pathlib import Path

import pandas as pd
import torch

from amulet_hybrid.augment.torch_dataset import PhotoDataset, create_amulet_dataset
from amulet_hybrid.augment.torch_transforms import create_pipeline_from_preset
from amulet_hybrid.learn.transfer_model import create_transfer_model

ROOT = Path(__file__).resolve().parent.parent


def main():
    "Median seconds of a step, both ways, and their quotient; pairs are measured in turn, for a busy machine"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--data', default='../shared/data/amulet6', help='folder of class folders')
    parser.add_argument('--net', default='efficientnet_lite0')
    parser.add_argument('--preset', default='medium')
    parser.add_argument('--photos', type=int, default=128)
    parser.add_argument('--pairs', type=int, default=8)
    parser.add_argument('--threads', type=int, default=0, help="torch's; 0: as it likes")
    args = parser.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    whole = create_amulet_dataset(args.data)
    some = whole.samples[::max(1, len(whole)//args.photos)][:args.photos]
    data = PhotoDataset([p for p,_ in some], [whole.classes[c] for _,c in some], whole.classes, cache='memory')
    pipeline = create_pipeline_from_preset(args.preset, batch_size=32, num_classes=len(data.classes))
    loader = pipeline.create_dataloader(data, 'train')
    net = create_transfer_model(args.net, len(data.classes), device='cpu').unfreeze(10).train()
    transform,loss = pipeline.get_transform('train'),torch.nn.functional.cross_entropy
    for i in range(len(data)): data.photo(i) # read once, as in every epoch after the first

    def learn(images, labels):
        net.zero_grad()
        loss(net(images), labels).backward()

    def alone(first):
        "What has to be done in any case: transforms, one after another, and the net"
        start,threads = time.perf_counter(),torch.get_num_threads()
        torch.set_num_threads(1) # faster for such small arrays
        rows = [(first+i)%len(data) for i in range(32)]
        images = torch.stack([transform(data.photo(i)) for i in rows])
        torch.set_num_threads(threads)
        learn(images, torch.tensor([data.targets[i] for i in rows]))
        return time.perf_counter()-start

    batches,pairs = iter(loader),[]
    for pair in range(args.pairs+1):
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        learn(*batch)
        through = time.perf_counter()-start
        if pair: pairs.append((through, alone(32*pair))) # the first one warms up
    through,bare = (statistics.median(column) for column in zip(*pairs))
    quotient = statistics.median(a/b for a,b in pairs)
    row = {'data': Path(args.data).name, 'net': args.net, 'preset': args.preset, 'threads': torch.get_num_threads(),
           'seconds_loader': round(through, 3), 'seconds_alone': round(bare, 3), 'quotient': round(quotient, 3)}
    pd.DataFrame([row]).to_csv(ROOT/'benchmarks'/'results'/'finetune_loader.csv', index=False)
    print(row)
    if quotient > 1.3: raise SystemExit(1)


if __name__=='__main__': main()
