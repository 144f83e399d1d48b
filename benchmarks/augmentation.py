"""Everything that is claimed of made photos: what they look like, how fast they come, what the distances are worth,
whether they help, and what an interruption costs"""
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

SIDE = 224
RESULTS = Path(__file__).parent/'results'

def photos(data, name='amulet6', count=40):
    "Some real photos of a set, at 224 x 224"
    from amulet_hybrid.data.images import read_image, resize_image
    paths = sorted((Path(data)/name).rglob('*.jpg'))
    return [resize_image(read_image(p), SIDE, 'fit') for p in paths[::max(1, len(paths)//count)][:count]]

def sheets(args):
    "A contact sheet of every operation on a real photo, and of each preset on several: to be looked at"
    from amulet_hybrid.augment.transforms import OPERATIONS, PRESETS, AugmentationConfig, apply_steps, augment
    from amulet_hybrid.data.samples import contact_sheet
    out = Path(args.sheets or tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    for name in ('amulet6', 'coins', 'magtile'):
        some = photos(args.data, name)
        every = [some[8], *(apply_steps(some[8], [(n, o.draw(np.random.default_rng(7), 1))])
                            for n,o in OPERATIONS.items())]
        drawn = [augment(some[i%len(some)], AugmentationConfig(preset), i) for preset in PRESETS for i in range(16)]
        sheet = np.vstack([contact_sheet(every, ['photo', *OPERATIONS], 8, 110),
                           contact_sheet(drawn, [p for p in PRESETS for _ in range(16)], 8, 110)])
        cv2.imwrite(str(out/f'{name}.png'), sheet[...,::-1])
        grey = [p.mean() for p in drawn]
        print(f'{name}: the darkest has a mean grey of {min(grey):.0f}, the lightest of {max(grey):.0f}; the flattest '
              f'a deviation of {min(p.std() for p in drawn):.0f}')
    print(f'sheets in {out}')

# One operation at a time, one thread; the rivals draw their own parameters, in the same ranges, as they do in a policy
OURS = '''
import sys, json, time, cv2, numpy as np
from amulet_hybrid.augment.transforms import OPERATIONS, apply_steps
rng = np.random.default_rng(0)
todo = {name: (lambda p, name=name: apply_steps(p, [(name, OPERATIONS[name].draw(rng, .7))])) for name in OPERATIONS}
'''
ALBUMENTATIONS = '''
import sys, json, time, cv2, numpy as np, albumentations as A
R = cv2.BORDER_REFLECT_101
ops = {'flip': A.HorizontalFlip(p=1), 'rotation': A.Rotate(17, border_mode=R, p=1),
       'shift': A.Affine(translate_percent=(-.07, .07), border_mode=R, p=1),
       'scale': A.Affine(scale=(.82, 1.21), border_mode=R, p=1),
       'perspective': A.Perspective((.02, .08), border_mode=R, p=1),
       'light': A.Illumination(mode='linear', intensity_range=(.1, .2), p=1),
       'shadow': A.RandomShadow(num_shadows_limit=(1, 1), shadow_dimension=4, p=1),
       'brightness': A.RandomBrightnessContrast(.3, (0, 0), p=1),
       'contrast': A.RandomBrightnessContrast((0, 0), .4, p=1),
       'colour': A.HueSaturationValue(10, 60, 0, p=1), 'motion_blur': A.MotionBlur((3, 7), p=1),
       'defocus': A.Defocus((1, 2), p=1),
       'noise': A.GaussNoise((.01, .04), p=1), 'cutout': A.CoarseDropout((1, 2), (.1, .22), (.1, .22), p=1),
       'jpeg': A.ImageCompression(quality_range=(48, 91), p=1)}
todo = {name: (lambda p, op=op: op(image=p)['image']) for name,op in ops.items()}
'''
TORCHVISION = '''
import sys, json, time, cv2, numpy as np, torch
from torchvision.transforms import v2
from torchvision.transforms import InterpolationMode as I
torch.set_num_threads(1)
B = I.BILINEAR
ops = {'flip': v2.RandomHorizontalFlip(1), 'rotation': v2.RandomRotation(17, B),
       'shift': v2.RandomAffine(0, (.07, .07), interpolation=B),
       'scale': v2.RandomAffine(0, scale=(.82, 1.21), interpolation=B),
       'perspective': v2.RandomPerspective(.15, 1, B), 'brightness': v2.ColorJitter(brightness=.35),
       'contrast': v2.ColorJitter(contrast=.4),
       'colour': v2.ColorJitter(saturation=.35, hue=.03), 'defocus': v2.GaussianBlur(5, (.5, 2)),
       'cutout': v2.RandomErasing(1, (.02, .05)), 'jpeg': v2.JPEG((48, 91))}
todo = {name: (lambda p, op=op: op(p)) for name,op in ops.items()}
'''
TIMING = '''
cv2.setNumThreads(1)
some = list(np.load(sys.argv[1]))
if 'torch' in sys.modules: some = [torch.from_numpy(np.ascontiguousarray(p.transpose(2, 0, 1))) for p in some]
best = {}
for name,op in todo.items():
    for p in some[:10]: op(p)
for _ in range(int(sys.argv[2])): # turn by turn, so that a busy moment of the machine does not fall on one alone
    for name,op in todo.items():
        start = time.process_time() # of the processor, so that other work on the machine does not count
        for p in some: op(p)
        best[name] = min(best.get(name, 9e9), (time.process_time()-start)/len(some))
print(json.dumps({'ms': {k: 1000*v for k,v in best.items()}, 'cv2': cv2.__version__}))
'''

def child(python, program, *words):
    "What a fresh process prints as JSON in its last line"
    env = {**os.environ, 'AMULET_PROGRESS': 'off', 'OMP_NUM_THREADS': '1', 'NO_ALBUMENTATIONS_UPDATE': '1'}
    done = subprocess.run([python, '-c', program, *map(str, words)], capture_output=True, text=True, env=env)
    if done.returncode: raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])

def speed(args):
    "Milliseconds of each operation at 224 x 224 on one thread, ours and theirs in turn, the best of several rounds"
    with tempfile.TemporaryDirectory() as folder:
        np.save(file := Path(folder)/'photos.npy', np.stack(photos(args.data)))
        rounds:dict[str,list] = {'ours': [], 'albumentations': [], 'torchvision': []}
        for _ in range(args.rounds):
            rounds['ours'].append(child(sys.executable, OURS+TIMING, file, 5))
            if args.albumentations_python:
                rounds['albumentations'].append(child(args.albumentations_python, ALBUMENTATIONS+TIMING, file, 5))
            rounds['torchvision'].append(child(sys.executable, TORCHVISION+TIMING, file, 5))
    table = pd.DataFrame({who: pd.DataFrame([f['ms'] for f in found]).min()
                          for who,found in rounds.items() if found}).reindex(list(rounds['ours'][0]['ms']))
    for who in table.columns[1:]: table[f'{who}_ratio'] = table[who]/table['ours']
    print(table.round(3).to_string(), '\ncv2:', {who: found[0]['cv2'] for who,found in rounds.items() if found})
    table.round(4).rename_axis('operation').to_csv(RESULTS/'augmentation_speed.csv')

POLICY_OURS = '''
import sys, json, time, os
from pathlib import Path
from concurrent.futures import ProcessPoolExecutor
import cv2, numpy as np
from amulet_hybrid.augment.transforms import AugmentationConfig, augment
from amulet_hybrid.data.images import read_image
out = Path(sys.argv[2])
def work(task):
    path,n = task
    cv2.setNumThreads(1)
    rgb = read_image(path)
    for i in range(n):
        made = augment(rgb, AugmentationConfig('medium'), hash((path, i)) & 0xffffffff)
        data = cv2.imencode('.jpg', cv2.cvtColor(made, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, 95))[1].tobytes()
        (out/f'{Path(path).stem}-{i}.jpg').write_bytes(data)
    return n
'''
POLICY_ALBUMENTATIONS = '''
import sys, json, time, os
from pathlib import Path
from concurrent.futures import ProcessPoolExecutor
import cv2, numpy as np, albumentations as A
R = cv2.BORDER_REFLECT_101
policy = A.Compose([A.HorizontalFlip(p=.5), A.Rotate(17, border_mode=R, p=.6),
                    A.Affine(translate_percent=(-.07, .07), border_mode=R, p=.5),
    A.Affine(scale=(.82, 1.21), border_mode=R, p=.5), A.Perspective((.02, .08), border_mode=R, p=.4),
                    A.Illumination(mode='linear', intensity_range=(.1, .2), p=.25),
    A.RandomShadow(num_shadows_limit=(1, 1), shadow_dimension=4, p=.2), A.RandomBrightnessContrast(.3, (0, 0), p=.5),
                    A.RandomBrightnessContrast((0, 0), .4, p=.4),
    A.HueSaturationValue(10, 60, 0, p=.3), A.MotionBlur((3, 7), p=.1), A.Defocus((1, 2), p=.1),
    A.GaussNoise((.01, .04), p=.25), A.CoarseDropout((1, 2), (.1, .22), (.1, .22), p=.1),
                    A.ImageCompression(quality_range=(48, 91), p=.25)])
out = Path(sys.argv[2])
def work(task):
    path,n = task
    cv2.setNumThreads(1)
    rgb = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
    for i in range(n):
        made = policy(image=rgb)['image']
        data = cv2.imencode('.jpg', cv2.cvtColor(made, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, 95))[1].tobytes()
        (out/f'{Path(path).stem}-{i}.jpg').write_bytes(data)
    return n
'''
POLICY_TORCHVISION = '''
import sys, json, time, os
from pathlib import Path
from concurrent.futures import ProcessPoolExecutor
import cv2, torch
from torchvision.io import read_image, write_jpeg
from torchvision.transforms import v2, InterpolationMode
torch.set_num_threads(1)
B = InterpolationMode.BILINEAR
def some(op, p): return v2.RandomApply([op], p)
policy = v2.Compose([v2.RandomHorizontalFlip(.5), some(v2.RandomAffine(17, (.07, .07), (.82, 1.21), interpolation=B),
                                                       .9), v2.RandomPerspective(.15, .4, B),
    some(v2.ColorJitter(.35, .4, .35, .03), .6),
    some(v2.GaussianBlur(5, (.5, 2)), .2), v2.RandomErasing(.1, (.02, .05)), some(v2.JPEG((48, 91)), .25)])
out = Path(sys.argv[2])
def work(task):
    path,n = task
    torch.set_num_threads(1)
    rgb = read_image(path)
    for i in range(n): write_jpeg(policy(rgb), str(out/f'{Path(path).stem}-{i}.jpg'), 95)
    return n
'''
POLICY_TIMING = '''
def cpu(): # seconds of the processor that the worker processes used
    import multiprocessing
    tick = os.sysconf('SC_CLK_TCK')
    return sum(sum(map(int, Path(f'/proc/{p.pid}/stat').read_text().rpartition(')')[2].split()[11:13]))/tick
               for p in multiprocessing.active_children())

if __name__=='__main__':
    paths = [str(p) for p in sorted(Path(sys.argv[1]).rglob('*.jpg'))]
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(work, [(p, 1) for p in paths[:8]]))
        start,before = time.perf_counter(),cpu()
        n = sum(pool.map(work, [(p, 4) for p in paths], chunksize=8))
        seconds,used = time.perf_counter()-start,cpu()-before
        print(json.dumps({'a second': n/seconds, 'cpu ms': 1000*used/n}))
'''

def policy(args):
    """Photos a second of the whole medium policy, read, made and written as JPEG on 2 cores; and of our pipeline, which
    also checks and records each"""
    from amulet_hybrid.augment.folder import AugmentationPipeline, AugmentFolderConfig
    from amulet_hybrid.data.manifest import make_manifest
    found:dict[str,list] = {}
    with tempfile.TemporaryDirectory() as folder:
        def script(text): # worker processes need a file
            (file := Path(folder)/'script.py').write_text(text+POLICY_TIMING, encoding='utf-8')
            return f'import runpy, sys\nsys.argv[0] = {str(file)!r}\nrunpy.run_path({str(file)!r}, run_name="__main__")'
        contenders = {'ours': (sys.executable, POLICY_OURS),
                      'albumentations': (args.albumentations_python, POLICY_ALBUMENTATIONS),
                      'torchvision': (sys.executable, POLICY_TORCHVISION)}
        for r in range(args.rounds):
            for who,(python,text) in contenders.items():
                if not python: continue
                (out := Path(folder)/f'{who}{r}').mkdir()
                found.setdefault(who, []).append(child(python, script(text), Path(args.data)/'amulet6', out))
            manifest,root = make_manifest(Path(args.data)/'amulet6')
            start,before = time.perf_counter(),time.process_time()
            pipeline = AugmentationPipeline(AugmentFolderConfig(preset='medium', augmentation_factor=5), jobs=2)
            made = pipeline.run(manifest.assign(split='train'), root, Path(folder)/f'checked{r}', originals=False)
            n = int(made.manifest['made'].sum())
            now = {'a second': n/(time.perf_counter()-start), 'cpu ms': 1000*(time.process_time()-before)/n}
            found.setdefault('ours, checked and recorded', []).append(now)
    table = pd.DataFrame({'photos a second': {who: max(f['a second'] for f in v) for who,v in found.items()},
                          'processor ms a photo': {who: min(f['cpu ms'] for f in v)
                                                   for who,v in found.items()}}).reindex(list(found))
    table['ours is faster by'] = table['photos a second']['ours']/table['photos a second']
    table['by processor time'] = table['processor ms a photo']/table['processor ms a photo']['ours']
    print(table.round(2).to_string())
    table.round(3).rename_axis('policy').to_csv(RESULTS/'augmentation_policy.csv')

FID = '''
import sys, json, numpy as np, torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from cleanfid.fid import frechet_distance, kernel_distance
out = {}
with np.load(sys.argv[1]) as sets:
    for name in sorted({k.rpartition('|')[0] for k in sets.files}):
        a,b = sets[name+'|a'],sets[name+'|b']
        s,t = (fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b))
        n = min(len(a), len(b))
        kid = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), kid_subsets=20, kid_subset_size=n//2,
                                     rng_seed=2020, verbose=False,
                                     kid_kernel='poly', kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None,
                                     kid_kernel_poly_coef0=1)
        out[name] = {'torch-fidelity FID': fid_statistics_to_metric(s, t, False)['frechet_inception_distance'],
                     'torch-fidelity KID': kid['kernel_inception_distance_mean'],
                     'clean-fid FID': float(frechet_distance(s['mu'], s['sigma'], t['mu'], t['sigma'])),
                     'clean-fid KID': kernel_distance(a[:n], b[:n], 1, n)}
print(json.dumps(out))
'''

def cnn_rows(args, name, blocks=('cnn:mobilenet_v2:side=224',)):
    "Features of a set's photos, and its manifest"
    from amulet_hybrid.augment.label_safety import with_digests
    from amulet_hybrid.data.manifest import make_manifest
    from amulet_hybrid.features.config import FeatureConfig
    from amulet_hybrid.features.extractor import HybridFeatureExtractor
    manifest,root = make_manifest(Path(args.data)/name)
    extractor = HybridFeatureExtractor(FeatureConfig(blocks=tuple(blocks), weights=args.weights), args.cache, 2)
    return np.hstack(list(extractor.extract_manifest(with_digests(manifest, root), root).values())),manifest

def fidelity(args):
    """FID and KID from the same arrays as torch-fidelity and clean-fid; real against real at n = 50; what FID of few
    photos is worth"""
    from amulet_hybrid.augment.fidelity import compute_fid, compute_kid, fid_infinity, kid_test
    X,manifest = cnn_rows(args, 'coins')
    X = X.astype(np.float64)
    y,rng = manifest['label'].to_numpy(),np.random.default_rng(0)
    mixed = (X-X.mean(0))@rng.normal(size=(X.shape[1], 64))/8
    sets = {'noise, 64 numbers, 500 and 400 rows': (rng.normal(size=(500,64)), rng.normal(.1, 1.1, (400,64))),
            'coins, 64 mixed numbers': (mixed[:1400], mixed[1400:]),
            'coins, 2c and 5c, 64 mixed numbers': (mixed[y=='2c'], mixed[y=='5c']),
            'coins, halves, 256 numbers': (X[::2,:256], X[1::2,:256])}
    if args.fidelity_python:
        with tempfile.TemporaryDirectory() as folder:
            np.savez(file := Path(folder)/'sets.npz',
                     **{f'{k}|{s}': v for k,ab in sets.items() for s,v in zip('ab', ab)})
            theirs = child(args.fidelity_python, FID, file)
        rows = []
        for name,(a,b) in sets.items():
            n = min(len(a), len(b))
            fid = compute_fid(a, b)
            ours = {'torch-fidelity FID': fid, 'clean-fid FID': fid, 'torch-fidelity KID': compute_kid(a, b, 20, n//2),
                    'clean-fid KID': compute_kid(a[:n], b[:n])}
            rows += [{'set': name, 'figure': k, 'theirs': theirs[name][k], 'ours': v,
                      'relative difference': abs(v/theirs[name][k]-1)} for k,v in ours.items()]
        table = pd.DataFrame(rows)
        print(table.to_string(index=False, float_format=lambda v: f'{v:.9g}'))
        table.to_csv(RESULTS/'augmentation_fidelity.csv', index=False)
    tests = []
    for i in range(args.draws):
        some = rng.choice(len(X), 100, replace=False)
        tests.append(kid_test(X[some[:50]], X[some[50:]], permutations=400, seed=i))
    print(f'\nKID of 50 against 50 real photos, {args.draws} draws: the interval holds 0 in '
          f'{np.mean([0 in t for t in tests]):.3f};',
          f'p <= 0.05 in {np.mean([t.p_value <= .05 for t in tests]):.3f}')
    few = [fid_infinity(X[s[:30]], X[s[30:]], seed=i) for i in range(20)
           for s in [rng.choice(len(X), 60, replace=False)]]
    print(f'FID of 30 against 30 real photos, {few[0].axes} directions: plain {np.mean([f.plain for f in few]):.2f},',
          f'at infinity {np.mean([f.value for f in few]):.2f} (0 is true), between 5c and 10c '
          f'{fid_infinity(X[y=="5c"], X[y=="10c"], axes=few[0].axes).value:.2f}')

STUDIES = {'amulet6': {'augmentation_factor': 4., 'study_repeats': 3}, 'coins': {'leak_preset': ''},
           'magtile': {'leak_preset': ''}}

def study(args):
    """Grouped folds with no balancing, class weights, balanced draws and each preset; what augmenting before splitting
    would report"""
    from amulet_hybrid.augment.ablation import StudyConfig, evaluate_augmentation
    from amulet_hybrid.data.manifest import make_manifest
    from amulet_hybrid.features.config import FeatureConfig
    from amulet_hybrid.features.extractor import HybridFeatureExtractor
    for name in args.sets.split(','):
        groups = Path(args.data)/f'{name}_groups.csv'
        manifest,root = make_manifest(Path(args.data)/name, groups if groups.is_file() else None)
        extractor = HybridFeatureExtractor(FeatureConfig(preset='fast', weights=args.weights), args.cache, 2)
        start = time.perf_counter()
        found = evaluate_augmentation(manifest, root, extractor, StudyConfig(**STUDIES[name], seed=0))
        print(f'\n## {name}: {found.n} photos in {found.n_groups} groups, smallest class {found.smallest} '
              f'({time.perf_counter()-start:.0f} s)')
        print(f'{found.shown().to_string()}\n{found.per_class.T.to_string()}', flush=True)
        for note in found.notes: print(f'- {note}', flush=True)
        leak = found.leak
        table = found.table.assign(set=name, smallest=found.smallest, choice=found.choice,
                                   pretended=leak.get('leaky', np.nan), honest=leak.get('grouped', np.nan))
        table.round(4).to_csv(RESULTS/f'augmentation_study_{name}.csv')

KILL = '''
import sys, json
from pathlib import Path
from amulet_hybrid.augment.folder import AugmentationPipeline, AugmentFolderConfig
from amulet_hybrid.data.manifest import make_manifest
manifest,root = make_manifest(sys.argv[1])
AugmentationPipeline(AugmentFolderConfig(preset='medium', augmentation_factor=4),
                     jobs=2).run(manifest.assign(split='train'), root, sys.argv[2])
print(json.dumps({}))
'''

def digests(folder):
    from amulet_hybrid.core import file_digest
    return {p.relative_to(folder).as_posix(): file_digest(p)
            for p in sorted(folder.rglob('*')) if p.is_file() and p.suffix in ('.jpg', '.csv')}

def resume(args):
    "Killed half way and started again: the same files as an uninterrupted run, and the memory that a run takes"
    with tempfile.TemporaryDirectory() as folder:
        data = Path(args.data)/'amulet6'
        whole = Path(folder)/'whole'
        cut = Path(folder)/'cut'
        child(sys.executable, KILL, data, whole)
        total = len((whole/'made.jsonl').read_text().splitlines())
        running = subprocess.Popen([sys.executable, '-c', KILL, str(data), str(cut)], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while running.poll() is None and (not (cut/'made.jsonl').is_file()
                                          or len((cut/'made.jsonl').read_text().splitlines()) < total//2):
            time.sleep(.005)
        running.kill(); running.wait()
        done = len((cut/'made.jsonl').read_text().splitlines())
        child(sys.executable, KILL, data, cut)
        same = digests(whole)==digests(cut)
        print(f'killed after {done} of {total} sources; afterwards {len(digests(cut))} files, '
              f'{"all equal" if same else "NOT equal"} to those of an uninterrupted run')
        program = KILL.replace("print(json.dumps({}))",
                               "import resource\nprint(json.dumps({'mb': "
                               "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024}))")
        for factor in (2, 16):
            used = child(sys.executable, program.replace('augmentation_factor=4', f'augmentation_factor={factor}'),
                         data, Path(folder)/f'memory{factor}')
            print(f'{factor} times as many photos: {used["mb"]:.0f} MB at most')
        if not same: raise SystemExit(1)

PARTS = {'sheets': sheets, 'speed': speed, 'policy': policy, 'fidelity': fidelity, 'study': study, 'resume': resume}

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('parts', nargs='*', default=list(PARTS), help=f'{", ".join(PARTS)}; default: all')
    parser.add_argument('--data', default=os.environ.get('AMULET_DATA', '../shared/data'))
    parser.add_argument('--weights', default=os.environ.get('AMULET_WEIGHTS', '../shared/weights'))
    parser.add_argument('--cache', help='folder in which features of real photos are kept')
    parser.add_argument('--sheets', help='folder for the contact sheets; default: a new one')
    parser.add_argument('--sets', default='amulet6,coins,magtile', help='of the study')
    parser.add_argument('--rounds', type=int, default=3, help='of the timings; the best counts')
    parser.add_argument('--draws', type=int, default=200, help='of real against real')
    parser.add_argument('--albumentations-python', help='a Python that has albumentations')
    parser.add_argument('--fidelity-python', help='a Python that has torch-fidelity and clean-fid')
    args = parser.parse_args()
    for part in args.parts:
        if part not in PARTS: parser.error(f'no part is called {part!r}')
        print(f'\n# {part}', flush=True)
        PARTS[part](args)

if __name__=='__main__': main()
