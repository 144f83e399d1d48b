"Tracking with the real packages: what is recorded, what is kept back, and servers that are down"
import json
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from amulet_hybrid.core import ConfigError, MissingExtraError
from amulet_hybrid.jobs.tracking import TRACKERS, Tracker, make_tracker, run_parameters, track_output

ROOT = Path(__file__).resolve().parent.parent
HINT = "not installed; pip install 'amulet_hybrid[tracking]'"
OWN = ('MLFLOW_', 'WANDB_', 'CI', 'GITHUB_', 'PYTEST_', 'DO_NOT_TRACK')
FIGURES = {'accuracy': {'value': .9, 'low': .8, 'high': 1.}, 'ece': float('nan'), 'loss': float('inf'),
           'test_photos': 27, 'random_split': {'block': 'hog', 'gap': .05}}

@pytest.fixture(autouse=True)
def clean(monkeypatch):
    "No tracker settings of whoever runs the tests, and none left behind"
    for name in list(os.environ):
        if name.startswith(('MLFLOW_', 'WANDB_')): monkeypatch.delenv(name)
    before = set(os.environ)
    yield
    for name in set(os.environ)-before: del os.environ[name]

@pytest.fixture
def mlflow():
    for name in ('sqlalchemy', 'alembic'): pytest.importorskip(name, reason=f'{name} is {HINT}')
    return pytest.importorskip('mlflow', reason=f'mlflow is {HINT}')

@pytest.fixture
def told(caplog):
    "Our warnings, when called"
    caplog.set_level(logging.WARNING, 'amulet_hybrid')
    return lambda: [r.getMessage() for r in caplog.records if r.name=='amulet_hybrid']

@pytest.fixture
def output(tmp_path):
    "What a training run leaves, in small"
    folder = tmp_path/'out'
    (folder/'bundle').mkdir(parents=True)
    config = {'data_dir': 'photos', 'output_dir': str(folder), 'groups': str(tmp_path/'groups.csv'),
              'blocks': ['hog', 'lbp'], 'seed': 7, 'cache_dir': '', 'jobs': 2}
    (folder/'config.json').write_text(json.dumps(config))
    result = {'report': str(folder/'report.html'), 'digest': 'ab12', 'figures': {'accuracy': FIGURES['accuracy']},
              'test_photos': 27, 'notes': ['few']}
    (folder/'result.json').write_text(json.dumps(result))
    (folder/'bundle'/'manifest.json').write_text(json.dumps({'data': {'fingerprint': 'f00d'}}))
    (folder/'report.html').write_text(f'<p>{folder} {Path.home()}/x')
    (folder/'train.ipynb').write_text(json.dumps({'cells': [f'output_dir = "{folder}"']}))
    (folder/'manifest.csv').write_text('path,label\nsecret.jpg,a\n')
    return folder,config

def other(program, **env):
    "A program in a process without the variables that switch things off by themselves"
    keep = {k: v for k,v in os.environ.items() if not k.startswith(OWN)}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, env={**keep, **env}, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode==0, done.stderr
    return done.stdout,done.stderr,time.perf_counter()-start

def files_of(client, run, under=None):
    for f in client.list_artifacts(run, under):
        if f.is_dir: yield from files_of(client, run, f.path)
        else: yield f.path

def test_none_needs_nothing(output):
    with make_tracker('').run('x', output[1]) as run: track_output(run, output[0])
    assert type(make_tracker('')) is Tracker

@pytest.mark.parametrize('spec', ['mlflow', 'wandb:offline'])
def test_missing_package_is_told(spec, monkeypatch):
    monkeypatch.setitem(sys.modules, spec.split(':')[0], None)
    with pytest.raises(MissingExtraError, match='tracking'): make_tracker(spec)

def test_wandb_without_key_is_refused(monkeypatch):
    monkeypatch.setattr(TRACKERS['wandb'], 'needs', ())
    with pytest.raises(ConfigError, match='WANDB_API_KEY'): make_tracker('wandb')

def test_mlflow_records(mlflow, tmp_path, told):
    tracker = make_tracker('mlflow', tmp_path/'runs')
    with tracker.run('first', {'seed': 42, 'cnn': {'side': None}, 'note': 'x'*9000, 'many': list(range(3)),
                               **{f'p{i}': i for i in range(150)}}) as run:
        run.figures(FIGURES)
        for step in range(3): run.figures({'train/loss': 1/(step+1)}, step)
        run.tag(kind='coins')
    assert not told() and (tmp_path/'runs'/'mlflow.db').is_file()
    found = tracker.client.get_run(run.handle)
    assert found.data.metrics=={'accuracy': .9, 'accuracy_low': .8, 'accuracy_high': 1, 'test_photos': 27,
                                'random_split.gap': .05, 'train_loss': pytest.approx(1/3)}
    assert [m.step for m in tracker.client.get_metric_history(run.handle, 'train_loss')]==[0, 1, 2]
    assert (len(found.data.params)==154 and found.data.params['seed']=='42' and found.data.params['cnn.side']==''
            and len(found.data.params['note']) <= 500)
    assert {k: v for k,v in found.data.tags.items() if not k.startswith('mlflow.')}=={'not_finite': 'ece, loss',
            'random_split.block': 'hog', 'kind': 'coins'}
    assert found.info.status=='FINISHED' and found.info.run_name=='first'
    assert str(ROOT) not in str(found.data) and str(Path.home()) not in str(found.data)

ENDS = [(ConfigError('no', code='why'), 'FAILED', 'why'), (ValueError('no'), 'FAILED', 'ValueError'),
        (KeyboardInterrupt(), 'KILLED', 'KeyboardInterrupt')]

def test_mlflow_records_how_it_ended(mlflow, tmp_path):
    tracker = make_tracker('mlflow', tmp_path)
    for error,status,tag in ENDS:
        with pytest.raises(type(error)), tracker.run('x') as run: raise error
        found = tracker.client.get_run(run.handle)
        assert (found.info.status, found.data.tags['error'])==(status, tag)

def test_mlflow_records_an_output(mlflow, tmp_path, output, told):
    folder,config = output
    tracker = make_tracker(f'mlflow:sqlite:///{tmp_path}/store/other.db')
    with tracker.run('out', run_parameters(config)) as run: sent = track_output(run, folder)
    assert not told()
    assert sorted(files_of(tracker.client, run.handle))==sorted(sent)==['bundle/manifest.json', 'config.json',
                                                                        'report.html', 'result.json', 'train.ipynb']
    found = tracker.client.get_run(run.handle)
    assert found.data.params=={'data_dir': 'photos', 'groups': 'groups.csv', 'blocks': '["hog", "lbp"]', 'seed': '7'}
    assert found.data.tags['data_fingerprint']=='f00d' and found.data.metrics['accuracy_low']==.8
    for name in sent:
        text = Path(tracker.client.download_artifacts(run.handle, name, str(tmp_path))).read_text()
        assert str(tmp_path) not in text and str(Path.home())+os.sep not in text

def test_mlflow_records_a_net(mlflow, tmp_path, told):
    "Curves, an epoch a step, figures, and the net itself, which comes back and answers as it did"
    torch = pytest.importorskip('torch')
    pytest.importorskip('timm')
    from amulet_hybrid.data.samples import NO_FAULTS, make_samples
    from amulet_hybrid.jobs.finetune import FinetuneRun
    from amulet_hybrid.learn.transfer_model import create_transfer_model, load_transfer_model
    make_samples(tmp_path/'photos', photos=36, classes=3, side=64, faults=NO_FAULTS)
    seen = create_transfer_model('timm/test_resnet', 3, pretrained=False, device='cpu')
    torch.save(seen.backbone.state_dict(), tmp_path/'seen.pth')
    run = FinetuneRun(tmp_path/'photos', output_dir=str(tmp_path/'out'), backbone='timm/test_resnet', image_size=64,
                      weights=str(tmp_path/'seen.pth'), device='cpu', batch_size=8, stage1_epochs=1, stage2_epochs=2,
                      unfreeze_layers=-1, groups=str(tmp_path/'photos'/'groups.csv'),
                      track=f'mlflow:sqlite:///{tmp_path}/runs.db')
    result = run.run()
    assert not [words for words in told() if 'the run goes on' in words]
    client = mlflow.MlflowClient(f'sqlite:///{tmp_path}/runs.db')
    found, = client.search_runs([e.experiment_id for e in client.search_experiments()])
    curve = client.get_metric_history(found.info.run_id, 'train_loss')
    assert [m.value for m in curve]==pytest.approx(run.trainer.history['train_loss'].tolist())
    assert found.data.tags['digest']==result['digest'] and found.data.params['backbone']=='timm/test_resnet'
    assert found.data.metrics['accuracy']==result['figures']['accuracy']['value']
    kept = Path(client.download_artifacts(found.info.run_id, 'model', str(tmp_path)))
    assert (kept/'model.onnx').read_bytes()==(tmp_path/'out'/'model'/'model.onnx').read_bytes()
    photos = torch.rand(2, 3, 64, 64)
    with torch.inference_mode(): assert torch.equal(load_transfer_model(kept).cpu().eval()(photos),
                                                    run.trainer.model.cpu().eval()(photos))

def test_mlflow_sends_nothing_home(mlflow, tmp_path):
    out,_,_ = other(f'from amulet_hybrid.jobs.tracking import make_tracker\nt = make_tracker("mlflow", '
                    f'{str(tmp_path)!r})\n'
                  'with t.run("x") as r: r.figures({"a": 1})\nfrom mlflow.telemetry.client import '
                  'get_telemetry_client\nprint(get_telemetry_client())')
    assert out.strip().endswith('None')

def test_two_runs_make_one_store(mlflow, tmp_path):
    program = (f'from amulet_hybrid.jobs.tracking import make_tracker\nwith make_tracker("mlflow", '
               f'{str(tmp_path)!r}).run("x") as r: pass\nprint(r.alive)')
    runs = [subprocess.Popen([sys.executable, '-c', program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for _ in range(3)]
    assert [r.communicate(timeout=120)[0].strip().split('\n')[-1] for r in runs]==['True', 'True', 'True']

@pytest.mark.parametrize('silent', [False, True])
def test_mlflow_server_down(mlflow, told, silent):
    "Refused at once, or taken and never answered: one warning, and the training has its result"
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        if silent: server.listen(50)
        start,done = time.perf_counter(),0
        with make_tracker(f'mlflow:http://127.0.0.1:{server.getsockname()[1]}', timeout=3).run('x', {'seed': 1}) as run:
            for step in range(100): run.figures({'loss': 1.}, step); done += 1
    assert done==100 and not run.alive and time.perf_counter()-start < 20
    assert len(told())==1 and 'the run goes on' in told()[0]

def test_full_disk_or_read_only_folder(mlflow, tmp_path, told):
    (tmp_path/'file').write_text('')
    with make_tracker('mlflow', tmp_path/'file').run('x') as run: run.figures({'a': 1})
    assert not run.alive and len(told())==1

def test_wandb_offline(tmp_path, output):
    pytest.importorskip('wandb', reason=f'wandb is {HINT}')
    folder,config = output
    out,err,_ = other(f'''
import json
from pathlib import Path
from amulet_hybrid.jobs.tracking import make_tracker, run_parameters, track_output
with make_tracker('wandb:offline', {str(tmp_path/"runs")!r}).run('first', run_parameters({config!r})) as run:
    run.figures({{'accuracy': {{'value': .9, 'low': .8, 'high': 1.}}, 'ece': float('nan')}})
    for step in range(3): run.figures({{'loss': 1/(step+1)}}, step)
    sent = track_output(run, {str(folder)!r})
print(run.alive, len(sent))''', HOME=str(tmp_path/'home'))
    assert out.strip().split('\n')[-1]=='True 5', err
    assert not err.strip()
    places = list((tmp_path/'runs'/'wandb').glob('offline-run-*'))
    assert len(places)==1 and (places[0]/'files'/'bundle'/'manifest.json').is_file()
    record = next(places[0].glob('*.wandb')).read_bytes()
    assert b'accuracy_low' in record and b'groups.csv' in record and b'not_finite' in record
    assert not [p for p in (str(ROOT), str(tmp_path), sys.prefix) if p.encode() in record]

def test_wandb_server_down(tmp_path):
    pytest.importorskip('wandb', reason=f'wandb is {HINT}')
    out,err,seconds = other(f'''
import logging
logging.basicConfig(level=logging.WARNING)
from amulet_hybrid.jobs.tracking import make_tracker
with make_tracker('wandb', {str(tmp_path)!r}, timeout=5).run('x', {{'seed': 1}}) as run:
    for step in range(100): run.figures({{'loss': 1.}}, step)
print('trained')''', WANDB_BASE_URL='http://127.0.0.1:9', WANDB_API_KEY='0'*40, HOME=str(tmp_path/'home'))
    assert out.strip().endswith('trained') and seconds < 60
    assert err.count('the run goes on')==1 and '0'*40 not in err
