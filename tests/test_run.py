"The command line as processes: a run, what it leaves, what serves it, and what an interruption leaves"
import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest

from amulet_hybrid.data.samples import make_samples
from amulet_hybrid.model.classifier import HybridClassifier

AMULET = Path(sys.executable).parent/'amulet'
BROKEN = ('truncated', 'empty', 'not_an_image')

def amulet(*words): return subprocess.run([AMULET, *map(str, words)], capture_output=True, text=True, timeout=300)

def settings(photos, output, seed=7):
    return ['--data-dir', photos, '--groups', photos/'groups.csv', '--output-dir', output, '--weights', 'none',
            '--quick', '--blocks', 'colour+lbp', '--seed', seed, '--test-size', .3]

def outputs(notebook):
    "Text of all outputs of a notebook, whatever their type"
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return '\n'.join(''.join(text) for cell in cells for out in cell.get('outputs', [])
                     for kind,text in out.get('data', {}).items() if kind.startswith('text/'))

def result_of(output): return json.loads((output/'result.json').read_text(encoding='utf-8'))

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('generated')/'photos'
    make_samples(folder, photos=60, classes=3, side=96)
    return folder

@pytest.fixture(scope='module')
def done(photos, tmp_path_factory):
    "A finished run: what it printed, and its folder"
    output = tmp_path_factory.mktemp('run')/'out'
    run = amulet('run', *settings(photos, output))
    assert run.returncode==0, run.stderr
    return run.stdout,output

@pytest.fixture(scope='module')
def broken(photos):
    "Paths of the files that cannot be read, as the generator knows them"
    truth = pd.read_csv(photos/'samples.csv', keep_default_na=False)
    return sorted(truth.path[truth.fault.isin(BROKEN)])

def test_parameters_arrive(done):
    _,output = done
    cells = json.loads((output/'train.ipynb').read_text(encoding='utf-8'))['cells']
    injected = [''.join(cell['source']) for cell in cells if 'injected-parameters' in cell['metadata'].get('tags', [])]
    assert len(injected)==1 and re.search(r'^seed = 7$', injected[0], re.M)
    shown = outputs(output/'train.ipynb')
    assert '| seed | `7` |' in shown and '| test_size | `0.3` |' in shown
    config = json.loads((output/'config.json').read_text(encoding='utf-8'))
    assert config==config | {'seed': 7, 'test_size': .3, 'quick': True, 'weights': 'none', 'blocks': ['colour', 'lbp']}

def test_everything_is_written(done):
    _,output = done
    assert {p.name for p in output.iterdir()} >= {'train.ipynb', 'report.html', 'figures.json', 'result.json',
                                                  'config.json', 'manifest.csv', 'inspection.json', 'bundle'}
    assert (output/'bundle'/'manifest.json').is_file()

def test_broken_files_are_listed(done, broken):
    _,output = done
    assert len(broken)==4
    listed = json.loads((output/'inspection.json').read_text(encoding='utf-8'))['tables']['unreadable']
    assert sorted(row['path'] for row in listed)==broken and all(row['code'] and row['reason'] for row in listed)
    report = (output/'report.html').read_text(encoding='utf-8').replace('<wbr>', '') # long names may break
    assert not [p for p in broken if p not in report]
    assert result_of(output)['left_out']==4

def test_summary_says_what_next(done):
    said,output = done
    assert 'No pretrained net will look at the photos: none was asked for.' in said.splitlines()[:3]
    for path in (output/'report.html', output/'train.ipynb', output/'bundle'): assert str(path) in said
    assert f'amulet serve --model-dir {output/"bundle"}' in said
    value,low,high = map(float, re.search(r'balanced accuracy +(\S+) +\[(\S+), (\S+)\]', said).groups())
    assert 0 <= low <= value <= high <= 1
    assert f'Held out: {result_of(output)["test_photos"]} photos' in said

def test_notebook_and_command_agree(done, photos, tmp_path):
    "`amulet train`, another process without papermill, makes the same model: same digest, same figures"
    _,output = done
    assert amulet('train', *settings(photos, tmp_path/'out')).returncode==0
    first,second = result_of(output),result_of(tmp_path/'out')
    assert first['digest']==second['digest'] and first['figures']==second['figures']

def test_seed_decides_the_split(done, photos, tmp_path):
    def parts(seed):
        trained = ('--weights', 'none', '--quick', '--blocks', 'colour+lbp')
        words = [w for w in settings(photos, tmp_path/str(seed), seed) if w not in trained]
        assert amulet('split', *words).returncode==0
        return pd.read_csv(tmp_path/str(seed)/'manifest.csv', keep_default_na=False).split.tolist()
    ours = pd.read_csv(done[1]/'manifest.csv', keep_default_na=False).split.tolist()
    assert parts(7)==ours and parts(8)!=ours

def test_service_answers_as_python_does(done, photos):
    "Every held-out photo through both doors of a real process; then Ctrl-C"
    _,output = done
    with socket.create_server(('127.0.0.1', 0)) as free: port = free.getsockname()[1]
    url,classifier = f'http://127.0.0.1:{port}',HybridClassifier(output/'bundle')
    held_out = pd.read_csv(output/'manifest.csv', keep_default_na=False).query('split=="test"').path[:100]
    assert len(held_out) >= 15
    command = [AMULET, 'serve', '--model-dir', output/'bundle', '--port', str(port), '--journal-dir',
               output/'served'/'journal', '--log-level', 'warning']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(300):
            try: health = httpx.get(f'{url}/health').json(); break
            except httpx.ConnectError:
                assert process.poll() is None, process.stderr.read()
                time.sleep(.1)
        assert health['model_loaded'] and health['model_version']==result_of(output)['digest'][:12]
        for path in held_out:
            data = (photos/path).read_bytes()
            want = classifier.classify(photos/path)
            as_json = httpx.post(f'{url}/predict', json={'image_data': base64.b64encode(data).decode()}).json()
            as_file = httpx.post(f'{url}/predict/file', files={'file': data}).json()
            for got in (as_json, as_file):
                assert got['predicted_class']==want.label and got['model_version']==want.model_version
                assert list(got['probabilities'])==classifier.classes
                np.testing.assert_allclose(list(got['probabilities'].values()), list(want.probabilities.values()),
                                           atol=1e-4)
        assert httpx.get(f'{url}/health').json()['predictions_count']==2*len(held_out)
        shown = httpx.post(f'{url}/predict/file', files={'file': data}, data={'explain': 'photos'}).json()['similar']
        own = classifier.classify(data, explain='photos').similar
        sent = {'image_data': base64.b64encode(data).decode(), 'k': 2, 'within': list(classifier.classes[:2])}
        alike = httpx.post(f'{url}/similar', json=sent).json()['photos']
        assert [p['digest'] for p in alike]==[p.digest for p in classifier.similar(data, 2, sent['within'])]
        label = own[0]['label']
        judged = httpx.post(f'{url}/verify', json={'image_data': sent['image_data'], 'label': label}).json()
        claim = classifier.verify(data, label)
        assert (judged['accepted'], judged['words'])==(claim.accepted, claim.words)
        assert [p['digest'] for p in judged['photos']]==[p.digest for p in claim.similar]
        summed = httpx.post(f'{url}/explain', files={'file': data}, data={'overlay': 'false'}).json()
        reason = classifier.explain(data)
        assert (summed['label'], summed['against'])==(reason.label, reason.against) and abs(summed['check']) < 1e-4
        np.testing.assert_allclose(np.sum(summed['places']), reason.placed, atol=.2) # they are rounded
        form = httpx.post(f'{url}/similar', files={'file': data}, data={'k': '3'}).json()
        assert [p['label'] for p in form['photos']]==[p.label for p in classifier.similar(data, 3)]
        refused = httpx.post(f'{url}/similar', files={'file': data}, data={'within': 'none'}).json()
        assert refused['error_code']=='unknown_label'
        assert [p['digest'] for p in shown]==[p['digest'] for p in own] and all('photo' not in p for p in shown)
        process.send_signal(signal.SIGINT)
        said,told = process.communicate(timeout=30)
    finally: process.kill()
    assert process.returncode==0 and 'Traceback' not in told and url in said

def test_predict_goes_on_past_a_broken_file(done, photos, broken, tmp_path):
    folder,model = tmp_path/'photos',('--model-dir', done[1]/'bundle')
    folder.mkdir()
    truth = pd.read_csv(photos/'samples.csv', keep_default_na=False)
    for i,path in enumerate(truth.path[truth.fault==''][:3]): shutil.copy(photos/path, folder/f'good{i}.jpg')
    shutil.copy(photos/truth.path[truth.fault=='truncated'].iloc[0], folder/'bad.jpg')
    named = amulet('predict', folder, *model)
    assert named.returncode==0 and re.search(r'^bad\.jpg\ttruncated: ', named.stdout, re.M)
    assert len(named.stdout.splitlines())==4
    assert "model's own threshold" in named.stderr and '--confidence-threshold 0' in named.stderr
    everything = amulet('predict', folder, *model, '--output', tmp_path/'named.csv', '--confidence-threshold', 0)
    assert everything.returncode==0 and 'threshold' not in everything.stderr
    table = pd.read_csv(tmp_path/'named.csv').set_index('path')
    assert table.error_code.dropna().to_dict()=={'bad.jpg': 'truncated'} and table.label.notna().sum()==3
    for good in folder.glob('good*'): good.unlink()
    assert amulet('predict', folder, *model).returncode==1

@pytest.mark.skipif(os.name!='posix', reason='sends Ctrl-C to a group of processes')
def test_interrupted_run_can_start_again(done, photos, tmp_path):
    "Ctrl-C in the middle leaves whole files only; the next start ends as if nothing had been"
    output = tmp_path/'out'
    process = subprocess.Popen([AMULET, 'run', *map(str, settings(photos, output))], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               # a test run in the background is born deaf to Ctrl-C
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        until = time.monotonic()+120
        while not (output/'inspection.json').exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(.05)
        os.killpg(process.pid, signal.SIGINT)
        _,told = process.communicate(timeout=60)
    finally:
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode==130 and told.splitlines()[-1].startswith('interrupted;') and 'Traceback' not in told
    assert not (output/'result.json').exists() and not (output/'bundle').exists()
    assert not [p.name for p in output.iterdir() if p.name.startswith('.') or p.suffix in ('.partial', '.tmp')]
    for path in output.glob('*.json'): json.loads(path.read_text(encoding='utf-8'))
    again = amulet('run', *settings(photos, output))
    assert again.returncode==0, again.stderr
    assert result_of(output)['digest']==result_of(done[1])['digest']
