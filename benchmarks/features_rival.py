"""The straightforward script that `features.py rivals` is measured against: cv2 to read and resize, scikit-image to
describe, torch eager for the net.

    python benchmarks/features_rival.py spec.json features.npz

Needs opencv, scikit-image, torch and torchvision, and nothing of this package. `spec.json` names the photos, the
settings of the blocks (sides, cells, bins: the same as ours)
and the weights. Whole photos are read, as `cv2.imread` does; a batch of 32 goes through the net at once, on all of
torch's threads. Imports, the loading of the net and one
batch to warm up are not counted. The last line it prints is JSON: photos, seconds, seconds of processor time, numbers a
photo.
"""
import json
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from skimage.feature import graycomatrix, graycoprops, hog, local_binary_pattern

BATCH = 32


def colour(rgb, side, bins, grid):
    "HSV histogram of the photo, mean and deviation of Lab in each cell"
    small = cv2.resize(rgb, (side, side), interpolation=cv2.INTER_AREA)
    hist = cv2.calcHist([cv2.cvtColor(small, cv2.COLOR_RGB2HSV_FULL)], [0, 1, 2], None, list(bins), [0, 256]*3).ravel()
    lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB)/255.
    cells = [cell for row in np.array_split(lab, grid) for cell in np.array_split(row, grid, axis=1)]
    return np.concatenate([np.sqrt(hist/hist.sum())]
                          +[f(cell, axis=(0, 1)) for cell in cells for f in (np.mean, np.std)])


def grey(rgb, side):
    return cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), (side, side), interpolation=cv2.INTER_AREA)


def hogs(rgb, sides, cell, bins):
    "scikit-image's HOG at each size"
    return np.concatenate([hog(grey(rgb, s), orientations=bins, pixels_per_cell=(cell, cell), cells_per_block=(2, 2),
                               block_norm='L2-Hys') for s in sides])


def lbp(rgb, side, radii, grid):
    "Histograms of the 59 uniform patterns of 8 neighbours in each cell"
    photo, rows = grey(rgb, side), []
    for radius in radii:
        codes = local_binary_pattern(photo, 8, radius, method='nri_uniform')
        for row in np.array_split(codes, grid):
            rows += [np.histogram(cell, bins=59, range=(0, 59))[0]/cell.size
                     for cell in np.array_split(row, grid, axis=1)]
    return np.sqrt(np.concatenate(rows))


def haralick(rgb, side, levels, distances, grid):
    "What `graycoprops` knows of each cell: mean and range over four directions"
    photo, rows = (grey(rgb, side).astype(int)*levels//256).astype(np.uint8), []
    for row in np.array_split(photo, grid):
        for cell in np.array_split(row, grid, axis=1):
            table = graycomatrix(cell, distances, [0, np.pi/4, np.pi/2, 3*np.pi/4], levels, symmetric=True, normed=True)
            for what in ('contrast', 'dissimilarity', 'homogeneity', 'energy', 'correlation', 'ASM'):
                found = graycoprops(table, what)
                rows += [found.mean(1), np.ptp(found, axis=1)]
    return np.concatenate(rows)


BLOCKS = {'colour': colour, 'hog': hogs, 'lbp': lbp, 'haralick': haralick}


class Net(torch.nn.Module):
    "The backbone's last maps and those of the last finer stage, pooled"
    def __init__(self, backbone, weights, pools):
        super().__init__()
        self.pools = pools
        net = torchvision.models.get_model(backbone, weights=None)
        net.load_state_dict(torch.load(weights, map_location='cpu', weights_only=True))
        stages = list(net.children())[:-2] if backbone.startswith('resnet') else list(net.features)
        x, sizes = torch.zeros(1, 3, 128, 128), []
        for stage in stages: sizes.append((x := stage.eval()(x)).shape[-1])
        fine = max(i for i, s in enumerate(sizes) if s > sizes[-1])+1
        self.early, self.late = torch.nn.Sequential(*stages[:fine]), torch.nn.Sequential(*stages[fine:])
        self.eval()

    def forward(self, x):
        early = self.early(x)
        late = self.late(early)
        found = {'mean': lambda: late.mean((2, 3)), 'max': lambda: late.amax((2, 3)), 'texture': lambda: early.std((2,
                3))}
        return torch.cat([found[pool]() for pool in self.pools], 1)


def describe(job):
    "All that is measured by hand of one photo, and the picture for the net"
    path, blocks, side = job
    rgb = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
    row = np.concatenate([BLOCKS[name](rgb, **settings)
                          for name, settings in blocks.items()]) if blocks else np.zeros(0)
    return row, cv2.resize(rgb, (side, side), interpolation=cv2.INTER_AREA if min(rgb.shape[:2]) > side
                           else cv2.INTER_LINEAR) if side else None


def extract(paths, spec, net, mapper):
    "Rows of all photos"
    mean, std = torch.tensor([.485, .456, .406]).view(1, 3, 1, 1), torch.tensor([.229, .224, .225]).view(1, 3, 1, 1)
    rows = []
    for i in range(0, len(paths), BATCH):
        found = list(mapper(describe, [(p, spec['blocks'], spec['side']) for p in paths[i:i+BATCH]]))
        batch = np.stack([row for row, _ in found])
        if net is not None:
            x = torch.from_numpy(np.stack([small for _, small in found])).permute(0, 3, 1, 2).float()/255
            with torch.inference_mode(): batch = np.hstack([batch, net((x-mean)/std).numpy()])
        rows.append(batch.astype(np.float32))
    return np.concatenate(rows)


def main():
    spec = json.loads(Path(sys.argv[1]).read_text())
    workers = spec.get('workers', 1) # 1: as most people would write it
    # before torch has threads
    pool = get_context('fork').Pool(workers, cv2.setNumThreads, (1,)) if workers > 1 else None
    torch.set_num_threads(spec['cores'])
    net = Net(spec['backbone'], spec['weights'], spec['pools']) if spec['side'] else None
    mapper = pool.map if pool else map
    extract(spec['photos'][:BATCH], spec, net, mapper)
    start, busy = time.perf_counter(), time.process_time() # the latter without what a pool does
    rows = extract(spec['photos'], spec, net, mapper)
    seconds, busy = time.perf_counter()-start, time.process_time()-busy
    if pool: pool.terminate()
    if len(sys.argv) > 2: np.savez(sys.argv[2], rows=rows)
    print(json.dumps({'photos': len(rows), 'seconds': seconds, 'processor': busy, 'numbers': rows.shape[1]}))


if __name__ == '__main__': main()
