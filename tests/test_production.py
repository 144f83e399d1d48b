"""A bundle served where there is neither torch nor scikit-learn: the wheel without its dependencies, and the few
packages that the bundle names"""
import base64
import json
import os
import socket
import subprocess
import time

import httpx
import numpy as np
import pytest

from amulet_hybrid.model.classifier import HybridClassifier

HEAVY = ('torch', 'sklearn', 'scipy', 'pandas', 'matplotlib', 'joblib')

@pytest.fixture
def bundle(trained): return trained

@pytest.fixture
def python(image):
    "Of the image that `amulet deploy` describes: the wheel (--no-deps) and what the bundle and its service ask for"
    return image.python

def run(python, code, *args):
    env = {k: v for k,v in os.environ.items() if k!='PYTHONPATH'}
    done = subprocess.run([python, '-c', code, *map(str, args)], cwd=python.parent, capture_output=True, text=True,
                          env=env)
    assert done.returncode==0, done.stderr[-3000:]
    return json.loads(done.stdout)

def test_answers_are_those_of_training(bundle, python):
    "All routes, in an environment in which nothing heavy can be imported"
    code = f'''import json, sys, importlib.util
assert not [m for m in {HEAVY!r} if importlib.util.find_spec(m)]
from amulet_hybrid.model.classifier import HybridClassifier
c = HybridClassifier(sys.argv[1])
routes = ('cascade', *(t.name for t in c.bundle.tiers))
print(json.dumps({{r: c.classify(sys.argv[2], route=r).probabilities for r in routes}}))'''
    found,here = run(python, code, bundle/'bundle', bundle/'photo.png'),HybridClassifier(bundle/'bundle')
    assert list(found)[0]=='cascade' and 'rules' in found
    for route,proba in found.items():
        want = here.classify(bundle/'photo.png', route=route).probabilities
        assert list(proba)==list(want)
        np.testing.assert_allclose(list(proba.values()), list(want.values()), atol=1e-4)

def test_nothing_is_reported_to_anybody(bundle, python, tmp_path):
    """onnxruntime keeps an identifier and a file of events in the user's cache, and sends them off, unless it is told
    not to"""
    code = f'''import json, os, sys
os.environ['HOME'] = {str(tmp_path)!r}
from amulet_hybrid.model.classifier import HybridClassifier
HybridClassifier(sys.argv[1]).classify(sys.argv[2])
print(json.dumps([os.path.join(place, f) for place,_,files in os.walk({str(tmp_path)!r}) for f in files]))'''
    assert run(python, code, bundle/'bundle', bundle/'photo.png')==[]

def test_it_is_small(bundle, python):
    "Memory, and processor time from the folder to a classifier that is ready"
    code = '''import json, sys, time
from amulet_hybrid.model.classifier import HybridClassifier
from amulet_hybrid.model.usage import resident_mb
start = time.process_time()
HybridClassifier(sys.argv[1]); print(json.dumps([time.process_time()-start, resident_mb()]))'''
    seconds,mb = run(python, code, bundle/'bundle')
    assert mb < 150 and seconds < .6 # the machine may be busy; benchmarks/classifier.py tells the true figure

def test_command_line(bundle, python):
    amulet = python.parent/'amulet'
    def call(*words):
        return subprocess.run([amulet, *map(str, words)], cwd=bundle, capture_output=True, text=True,
                              env={k: v for k,v in os.environ.items() if k!='PYTHONPATH'})
    named = call('predict', 'photo.png', '--model-dir', 'bundle')
    assert named.returncode==0 and named.stdout.startswith('photo.png\t'), named.stderr
    assert call('predict', '.', '--model-dir', 'bundle', '--output', 'out.jsonl').returncode==0
    alike = call('similar', 'photo.png', '--model-dir', 'bundle')
    assert alike.returncode==0 and len(alike.stdout.splitlines())==5, alike.stderr
    rows = [json.loads(line) for line in (bundle/'out.jsonl').read_text().splitlines()]
    assert [r['success'] for r in rows if r['path']=='photo.png']==[True]
    checked = call('bundle', 'verify', '--model-dir', 'bundle')
    assert checked.returncode==0 and checked.stdout.startswith('Good'), checked.stderr

def test_it_serves(bundle, python):
    with socket.create_server(('127.0.0.1', 0)) as free: port = free.getsockname()[1]
    process = subprocess.Popen([python.parent/'amulet', 'serve', '--model-dir', bundle/'bundle', '--port', str(port)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
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
