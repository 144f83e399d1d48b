"A bundle served where there is neither torch nor scikit-learn: the wheel without its dependencies, and the few packages that the bundle names"
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from amulet_hybrid.bundle import REQUIREMENTS, HeldOut, save_bundle, sign_bundle
from amulet_hybrid.cascade import fit_cascade
from amulet_hybrid.classifier import HybridClassifier
from amulet_hybrid.features.hybrid import FeatureConfig, HybridFeatureExtractor
from amulet_hybrid.samples import LOGOS, draw_logo
from amulet_hybrid.signatures import make_keys
from amulet_hybrid.trainer import HybridTrainer, TrainingConfig

ROOT = Path(__file__).resolve().parent.parent
SKIP = shutil.ignore_patterns('.*', '*.egg-info', '__pycache__', 'build', 'dist', '_proc', '_docs', 'samples', 'runs')
HEAVY = ('torch', 'sklearn', 'scipy', 'pandas', 'matplotlib', 'joblib')

@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    "Folder of a signed bundle with three tiers, and a photo"
    folder = tmp_path_factory.mktemp('trained')
    photos = [draw_logo(kind, seed=piece, view=view, side=96) for kind in LOGOS for piece in range(10) for view in range(2)]
    labels,groups = np.repeat(list(LOGOS), 20),np.repeat(np.arange(10*len(LOGOS)), 2)
    extractor = HybridFeatureExtractor(FeatureConfig(blocks=('colour', 'lbp', 'dense_sift', 'cnn:squeezenet1_1'), weights='random', cnn_side=64), folder/'cache')
    features = extractor.extract_batch(photos)
    models = ('logistic_balanced', 'lda_balanced', 'svm', 'cosine_knn', 'extra_trees')
    trainer = HybridTrainer(TrainingConfig(cv_folds=3, models=models, jobs=1)).fit(features, labels, groups, extractor.encoders())
    cascade = fit_cascade(trainer, features, groups, extractor.extractors)
    save_bundle(folder/'bundle', trainer.model_, extractor, cascade=cascade, held_out=HeldOut(features, photos))
    make_keys(folder/'key.pem')
    sign_bundle(folder/'bundle', folder/'key.pem')
    Image.fromarray(photos[3]).save(folder/'photo.png')
    return folder

@pytest.fixture(scope='module')
def python(bundle, tmp_path_factory):
    "Python of an environment with the wheel (--no-deps) and what the bundle asks for"
    tree,env = tmp_path_factory.mktemp('tree')/'amulet_hybrid',tmp_path_factory.mktemp('production')/'venv'
    shutil.copytree(ROOT, tree, symlinks=True, ignore=lambda folder, names: SKIP(folder, names) if Path(folder)==ROOT else set())
    done = subprocess.run([sys.executable, '-m', 'build', '--wheel', '--outdir', tree/'dist', tree], capture_output=True, text=True)
    assert done.returncode==0, done.stdout[-2000:]+done.stderr[-2000:]
    venv.create(env, with_pip=True)
    python = env/('Scripts' if os.name=='nt' else 'bin')/'python'
    pip = [python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
    done = subprocess.run([*pip, '--no-deps', next((tree/'dist').glob('*.whl'))], capture_output=True, text=True)
    assert done.returncode==0, done.stderr[-2000:]
    done = subprocess.run([*pip, '-r', bundle/'bundle'/REQUIREMENTS], capture_output=True, text=True)
    if done.returncode and any(words in done.stderr for words in ('Connection', 'Temporary failure', 'No matching distribution', 'Network is unreachable')):
        pytest.skip(f'no packages can be had here: {done.stderr.splitlines()[-1][:200]}')
    assert done.returncode==0, done.stderr[-2000:]
    return python

def run(python, code, *args):
    env = {k: v for k,v in os.environ.items() if k!='PYTHONPATH'}
    done = subprocess.run([python, '-c', code, *map(str, args)], cwd=python.parent, capture_output=True, text=True, env=env)
    assert done.returncode==0, done.stderr[-3000:]
    return json.loads(done.stdout)

def test_answers_are_those_of_training(bundle, python):
    "All routes, in an environment in which nothing heavy can be imported"
    code = f'''import json, sys, importlib.util
assert not [m for m in {HEAVY!r} if importlib.util.find_spec(m)]
from amulet_hybrid.classifier import HybridClassifier
c = HybridClassifier(sys.argv[1])
print(json.dumps({{r: c.classify(sys.argv[2], route=r).probabilities for r in ('cascade', *(t.name for t in c.bundle.tiers))}}))'''
    found,here = run(python, code, bundle/'bundle', bundle/'photo.png'),HybridClassifier(bundle/'bundle')
    assert list(found)[0]=='cascade' and 'rules' in found
    for route,proba in found.items():
        want = here.classify(bundle/'photo.png', route=route).probabilities
        assert list(proba)==list(want)
        np.testing.assert_allclose(list(proba.values()), list(want.values()), atol=1e-4)

def test_it_is_small(bundle, python):
    "Memory, and processor time from the folder to a classifier that is ready"
    code = '''import json, sys, time
from amulet_hybrid.classifier import HybridClassifier, resident_mb
start = time.process_time(); HybridClassifier(sys.argv[1]); print(json.dumps([time.process_time()-start, resident_mb()]))'''
    seconds,mb = run(python, code, bundle/'bundle')
    assert mb < 150 and seconds < .6 # the machine may be busy; benchmarks/classifier.py tells the true figure

def test_command_line(bundle, python):
    amulet = python.parent/'amulet'
    def call(*words): return subprocess.run([amulet, *map(str, words)], cwd=bundle, capture_output=True, text=True, env={k: v for k,v in os.environ.items() if k!='PYTHONPATH'})
    named = call('predict', 'photo.png', '--model-dir', 'bundle')
    assert named.returncode==0 and named.stdout.startswith('photo.png\t'), named.stderr
    assert call('predict', '.', '--model-dir', 'bundle', '--output', 'out.jsonl').returncode==0
    rows = [json.loads(line) for line in (bundle/'out.jsonl').read_text().splitlines()]
    assert [r['success'] for r in rows if r['path']=='photo.png']==[True]
    checked = call('bundle', 'verify', '--model-dir', 'bundle')
    assert checked.returncode==0 and checked.stdout.startswith('Good'), checked.stderr

def test_it_serves(bundle, python):
    with socket.create_server(('127.0.0.1', 0)) as free: port = free.getsockname()[1]
    process = subprocess.Popen([python.parent/'amulet', 'serve', '--model-dir', bundle/'bundle', '--port', str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=bundle, env={k: v for k,v in os.environ.items() if k!='PYTHONPATH'})
    try:
        for _ in range(600):
            try: httpx.get(f'http://127.0.0.1:{port}/health'); break
            except httpx.TransportError:
                assert process.poll() is None, process.stderr.read()
                time.sleep(.1)
        data = base64.b64encode((bundle/'photo.png').read_bytes()).decode()
        got = httpx.post(f'http://127.0.0.1:{port}/predict', json={'image_data': data}, timeout=60).json()
        assert got['success'] and got['top_class']==HybridClassifier(bundle/'bundle').classify(bundle/'photo.png').top
    finally:
        process.kill()
        process.communicate()
