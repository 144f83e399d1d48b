"""Each extra by its main command, as in an environment that holds what the extra brings and nothing else: packages of
other extras are hidden from the processes, for an environment of its own for each would take an hour"""
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
from configparser import ConfigParser
from contextlib import closing
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import httpx
import pytest
from conftest import free_ports
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
OTHERS = {'amulet-hybrid', 'pip', 'coverage'} # Ours, what every environment has, and what measures the tests
POSTGRES = os.environ.get('AMULET_TEST_POSTGRES', 'postgresql://postgres@127.0.0.1:5432/test')

# What a process sees. Python runs this by itself when it starts, in every process that has the folder on its path
HIDE = '''import json, sys
from importlib.machinery import PathFinder
from importlib.metadata import MetadataPathFinder
from pathlib import Path
hidden = json.loads(Path(__file__).with_name('hidden.json').read_text())
modules,packages = map(set, (hidden['modules'], hidden['packages']))
find_spec,find_distributions = PathFinder.find_spec,MetadataPathFinder.find_distributions
def spec(cls, name, path=None, target=None):
    if path is None and name in modules: # another package may bring a copy, in a folder of its own
        path = [p for p in sys.path if not p.endswith('-packages')]
    return find_spec(name, path, target)
def distributions(cls, *context):
    for found in find_distributions(*context):
        if (found.name or '').lower().replace('_', '-').replace('.', '-') not in packages: yield found
PathFinder.find_spec,MetadataPathFinder.find_distributions = classmethod(spec),classmethod(distributions)
'''
MAIN = 'from amulet_hybrid.cli.app import main; main()'
SEVERAL = '''import json, sys
from amulet_hybrid.cli.app import main
for words in json.loads(sys.argv.pop()):
    sys.argv[1:] = words
    print('$ amulet', *words, flush=True)
    try: main()
    except SystemExit as end: print('->', end.code or 0, flush=True)
'''

def settings():
    "settings.ini as setup.py reads it; what is installed may be older"
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']

def needed(lines):
    "Canonical names of these packages and of all that they need, and those of them that are not installed"
    found,missing = set(),set()
    def add(requirement, extras):
        if requirement.marker and not any(requirement.marker.evaluate({'extra': e}) for e in ('', *extras)): return
        name,wanted = canonicalize_name(requirement.name),frozenset(requirement.extras)
        if (name, wanted) in found: return
        found.add((name, wanted))
        try: lines = distribution(requirement.name).requires or ()
        except PackageNotFoundError: missing.add(requirement.name); return
        for line in lines: add(Requirement(line), wanted)
    for line in lines: add(Requirement(line), ())
    return {name for name,_ in found},missing

class Environment:
    "What a process sees where amulet_hybrid was installed with some extras"
    def __init__(self, folder, packages):
        self.folder,self.home = folder,folder/'home'
        self.home.mkdir(parents=True)
        owners = {module: {canonicalize_name(d) for d in of} for module,of in packages_distributions().items()}
        seen = packages|OTHERS
        hidden = {'modules': sorted(m for m,of in owners.items() if not of & seen),
                  'packages': sorted({d for of in owners.values() for d in of}-seen)}
        (folder/'hidden.json').write_text(json.dumps(hidden))
        (folder/'sitecustomize.py').write_text(HIDE)
        kept = {k: v for k,v in os.environ.items() if not k.startswith(('AMULET_', 'MLFLOW_', 'WANDB_'))}
        # nothing that was kept by others: a net that was exported once would need no exporter
        self.variables = kept|{'PYTHONPATH': f'{folder}{os.pathsep}{ROOT}', 'XDG_CACHE_HOME': str(self.home/'cache'),
                               'OMP_NUM_THREADS': '1', 'AMULET_PROGRESS': 'off'}

    def python(self, code, *words):
        return subprocess.run([sys.executable, '-c', code, *map(str, words)], cwd=self.home, env=self.variables,
                              capture_output=True, text=True, timeout=300)

    def amulet(self, *words):
        "What one command prints, if it ends well"
        done = self.python(MAIN, *words)
        assert done.returncode==0, done.stdout[-1000:]+done.stderr[-3000:]
        return done.stdout

    def several(self, *commands):
        "Exit code and output of each command, in one process; what is missing is said on the same page"
        text = json.dumps([[str(w) for w in words] for words in commands])
        done = self.python('import sys; sys.stderr = sys.stdout\n'+SEVERAL, text)
        pages = done.stdout.split('$ amulet ')[1:]
        assert len(pages)==len(commands), done.stdout[-1000:]+done.stderr[-3000:]
        return [(int(page.rstrip().rpartition('-> ')[2]), page) for page in pages]

@pytest.fixture(scope='module')
def environment(tmp_path_factory):
    "Of some extras, made once; a skip where a package of theirs is not installed here"
    made,cfg = {},settings()
    def make(*extras):
        packages,missing = needed(line for e in ('', *extras)
                                  for line in cfg[f'{e}_requirements' if e else 'requirements'].split())
        if missing: pytest.skip(f'not installed here: {", ".join(sorted(missing))} (extra {", ".join(extras)})')
        if extras not in made: made[extras] = Environment(tmp_path_factory.mktemp('environment')/'path', packages)
        return made[extras]
    return make

QUICK = ('--quick', '--blocks', 'colour', '--weights', 'none', '--jobs', 1)

@pytest.fixture(scope='module')
def plain(environment, tmp_path_factory):
    "Without extras: photos are drawn, inspected, learned from and named, in one process"
    here,folder = environment(),tmp_path_factory.mktemp('plain')
    photos,run = folder/'photos',folder/'run'
    done = here.several(
        ('samples', '--output-dir', photos, '--photos', 32, '--classes', 2, '--side', 64, '--no-faults'),
        ('inspect', '--data-dir', photos, '--groups', photos/'groups.csv', '--output-dir', folder/'look', '--quick'),
        ('train', '--data-dir', photos, '--groups', photos/'groups.csv', '--output-dir', run, *QUICK),
        ('predict', photos, '--model-dir', run/'bundle', '--output', folder/'named.csv'))
    return folder,done

@pytest.fixture
def photos(plain): return plain[0]/'photos'

@pytest.fixture
def bundle(plain): return plain[0]/'run'/'bundle'

def few(photos, folder):
    "Two of the photos"
    for path in sorted(photos.glob('*/*.*'))[::16][:2]:
        (folder/'few'/path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder/'few'/path.parent.name)
    return folder/'few'

def extract(here, photos, folder, block, *more):
    "The page of `amulet extract` for one block of two photos"
    page = here.amulet('extract', '--data-dir', few(photos, folder), '--output-dir', folder/'features',
                       '--blocks', block, '--jobs', 1, *more)
    assert page.startswith('2 photos in ') and list((folder/'features').glob('*.npy')), page
    return page

def test_other_packages_are_hidden(environment):
    "The tests below would prove nothing otherwise"
    code = '''import importlib.metadata, importlib.util
for name in ('torch', 'fastapi', 'sqlalchemy', 'pytest'):
    assert importlib.util.find_spec(name) is None, name
    try: importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: continue
    raise AssertionError(name)
import numpy, sklearn, typer, onnxruntime'''
    done = environment().python(code)
    assert done.returncode==0, done.stderr

def test_needed_follows_markers_and_extras():
    names,_ = needed(['psycopg[binary]', 'colorama; sys_platform=="nowhere"'])
    assert {'psycopg', 'psycopg-binary'} <= names and 'colorama' not in names

def test_all_is_what_the_first_page_says():
    "And every extra is tried here"
    source = (ROOT/'setup.py').read_text(encoding='utf-8')
    everyday = source.partition('everyday = (')[2].partition(')')[0].replace("'", '')
    assert f'| `all` | {everyday} |' in (ROOT/'README.md').read_text(encoding='utf-8')
    tried = Path(__file__).read_text(encoding='utf-8')
    extras = {k.removesuffix('_requirements') for k in settings() if k.endswith('_requirements')}
    assert not {e for e in extras-{'dev'} if f"environment('{e}')" not in tried}

def test_no_extra(plain):
    folder,done = plain
    assert [code for code,_ in done]==[0, 0, 0, 0], done[-1][1][-2000:]
    assert (folder/'look'/'inspection.html').is_file() and (folder/'named.csv').read_text().count('\n') > 30

def test_what_is_missing_is_named(environment, plain, tmp_path):
    "Every command that needs an extra says which one, in one line, and ends with 1"
    photos,bundle,lab = plain[0]/'photos',plain[0]/'run'/'bundle',tmp_path/'lab.db'
    lab.touch()
    train = ('train', '--data-dir', photos, *QUICK, '--output-dir', tmp_path/'out')
    take = ('extract', '--data-dir', photos, '--output-dir', tmp_path/'features', '--weights', 'random', '--blocks')
    lacking = {'cnn': (*take, 'cnn:squeezenet1_1'), 'timm': (*take, 'cnn:timm/test_resnet'), 'surf': (*take, 'surf'),
               'ray': (*take, 'colour', '--engine', 'ray'), 'search': (*train, '--search', 'bayes'),
               'tracking': (*train, '--track', 'mlflow'), 'notebooks': ('run', *train[1:]),
               'sql': ('train', '--table', f'sqlite+pysqlite:///{lab}', '--query', 'wine', '--target', 'kind'),
               'serve': ('serve', '--model-dir', bundle), 'store': ('store', 'status', '--journal-dir', tmp_path/'j'),
               'sign': ('bundle', 'keys', '--output', tmp_path/'key.pem')}
    for extra,(code,page) in zip(lacking, environment().several(*lacking.values())):
        assert code==1 and 'Traceback' not in page, page
        assert '[missing_extra]' in page and f"pip install 'amulet_hybrid[{extra}]'" in page, (extra, page)
    assert not (tmp_path/'out').exists() # before any work was done
    code,page = environment('store').several(('store', 'status', '--database-url', 'postgresql://a@127.0.0.1/b'))[0]
    assert code==1 and "pip install 'amulet_hybrid[postgres]'" in page, page

def test_a_missing_driver_is_named(environment):
    "Which SQLAlchemy imports by itself"
    done = environment('sql').python(MAIN, 'train', '--table', 'postgresql://a@127.0.0.1/b', '--query', 'wine',
                                     '--target', 'kind')
    assert done.returncode==1 and 'Traceback' not in done.stderr and '[missing_extra]' in done.stderr, done.stderr
    assert "'psycopg'" in done.stderr and 'pip install' in done.stderr

def answered(url, process, seconds=60):
    "The first answer of a service that is starting"
    end = time.monotonic()+seconds
    while time.monotonic() < end:
        try: return httpx.get(url)
        except httpx.TransportError: assert process.poll() is None, process.communicate()
        time.sleep(.1)
    raise AssertionError(f'no answer in {seconds} s')

def test_serve(environment, bundle, photos):
    "With its records, which go into SQLite where nothing else is said"
    here,port = environment('serve'),free_ports(1)
    photo = next(photos.glob('*/*.*'))
    process = subprocess.Popen([sys.executable, '-c', MAIN, 'serve', '--model-dir', bundle, '--port', str(port)],
                               cwd=here.home, env=here.variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    try:
        assert answered(f'http://127.0.0.1:{port}/health', process).status_code==200
        found = httpx.post(f'http://127.0.0.1:{port}/predict/file', files={'file': photo.read_bytes()}, timeout=60)
        assert found.status_code==200 and found.json()['recorded'] is True, found.text
    finally:
        process.terminate()
        said = ''.join(process.communicate(timeout=60))
    assert 'not recorded' not in said and 'missing_extra' not in said, said
    with closing(sqlite3.connect(here.home/'amulet.db')) as db:
        assert db.execute('select count(*) from predictions').fetchone()==(1,)

def test_cnn(environment, photos, tmp_path):
    extract(environment('cnn'), photos, tmp_path, 'cnn:squeezenet1_1', '--weights', 'random', '--cnn-side', 64)

def test_cnn_brings_pretrained_nets(environment):
    "Without a hub and without a folder of weights"
    here = environment('cnn')
    rows = json.loads(here.amulet('weights', 'efficientnet_lite0', 'efficientnet_lite2', '--verify', '--json'))
    assert [(row['place'], row['intact']) for row in rows]==[('package', True)]*2
    page = environment().several(('weights', 'efficientnet_lite0', '--verify'))[0]
    assert page[0]==1 and 'not here' in page[1], page

def test_timm(environment, photos, tmp_path):
    "By torch, for the exporter is tried above: the extra brings it, too"
    assert needed(settings()['timm_requirements'].split())[0] <= needed(settings()['cnn_requirements'].split())[0]
    extract(environment('timm'), photos, tmp_path, 'cnn:timm/test_resnet:engine=torch', '--weights', 'random',
            '--cnn-side', 64)

def test_surf(environment, photos, tmp_path): extract(environment('surf'), photos, tmp_path, 'surf')

def test_ray(environment):
    "A cluster is begun and used in test_ray.py; here it can be imported, and by whoever asks for it alone"
    done = environment('ray').python('import ray.data; from amulet_hybrid.base.parallel import ENGINES; ENGINES["ray"]')
    assert done.returncode==0, done.stderr

def test_heif(environment, photos, tmp_path):
    "A photo of a phone is measured as every other one"
    here,folder = environment('heif'),tmp_path/'few'/'a'
    folder.mkdir(parents=True)
    done = here.python('import sys, pillow_heif; from PIL import Image\nfor s in sys.argv[2:]: '
                       'pillow_heif.from_pillow(Image.open(s).convert("RGB")).save(f"{sys.argv[1]}/{s[-9:-4]}.heic")',
                       folder, *sorted(photos.glob('*/*.*'))[:2])
    assert done.returncode==0, done.stderr
    page = here.amulet('extract', '--data-dir', folder.parent, '--output-dir', tmp_path/'features', '--blocks',
                       'colour')
    assert page.startswith('2 photos in ') and '!' not in page, page

def test_store(environment, tmp_path):
    url = f'sqlite:///{tmp_path}/amulet.db'
    (tmp_path/'wine.csv').write_text('kind,ash\nred,1\nwhite,2\n')
    done = environment('store').several(
        ('store', 'migrate', '--database-url', url),
        ('store', 'import', tmp_path/'wine.csv', '--name', 'wine', '--target', 'kind', '--database-url', url),
        ('store', 'status', '--database-url', url),
        ('store', 'export', '--table', 'training_data', '--output', tmp_path/'out.parquet', '--database-url', url))
    assert [code for code,_ in done]==[0]*4, done
    assert '2 rows of training_data' in done[-1][1]

def test_sql(environment, tmp_path):
    "A table of a database is learned from, by SQLAlchemy, which knows more of them than SQLite"
    with closing(sqlite3.connect(tmp_path/'lab.db')) as db:
        db.execute('create table wine (kind text, ash real, cask integer)')
        rows = [('red' if i%2 else 'white', i%2+i/100, i) for i in range(40)]
        db.executemany('insert into wine values (?, ?, ?)', rows)
        db.commit()
    environment('sql').amulet('train', '--table', f'sqlite+pysqlite:///{tmp_path}/lab.db', '--query', 'wine',
                              '--target', 'kind', '--group', 'cask', '--quick', '--jobs', 1, '--output-dir',
                              tmp_path/'run')
    assert (tmp_path/'run'/'bundle'/'manifest.json').is_file()

def test_sign(environment, bundle, tmp_path):
    mine,key = shutil.copytree(bundle, tmp_path/'bundle'),tmp_path/'key.pem'
    done = environment('sign').several(
        ('bundle', 'keys', '--output', key), ('bundle', 'sign', '--model-dir', mine, '--key', key),
        ('bundle', 'verify', '--model-dir', mine, '--public-key', f'{key}.pub'))
    assert [code for code,_ in done]==[0]*3 and 'signed by' in done[-1][1], done

def train(here, photos, folder, *more):
    "The page of a small training run"
    return here.amulet('train', '--data-dir', photos, '--groups', photos/'groups.csv', '--output-dir', folder/'run',
                       *QUICK, *more)

def test_search(environment, photos, tmp_path):
    assert 'Bundle ' in train(environment('search'), photos, tmp_path, '--search', 'bayes', '--trials', 3)

def test_tracking(environment, photos, tmp_path):
    "The run, its figures and its bundle, which verifies as it lies there; the page that shows them is named"
    here = environment('tracking')
    page = train(here, photos, tmp_path, '--track', 'mlflow')
    assert re.search(r'pip install mlflow==[\d.]+ && mlflow ui --backend-store-uri sqlite:///.+/mlflow.db', page), page
    kept, = (p.parent for p in (tmp_path/'mlflow-artefacts').rglob('bundle/manifest.json'))
    assert here.amulet('bundle', 'verify', '--model-dir', kept).startswith('Good ')

def test_convert(environment, tmp_path):
    "A classifier that no converter of ours knows becomes ONNX, and answers alike"
    code = '''import numpy as np
from sklearn.naive_bayes import GaussianNB
from amulet_hybrid.model.export import convert_model
rng = np.random.default_rng(0)
X,y = rng.normal(size=(60, 4)),np.repeat([0, 1, 2], 20)
X[:,:3] += 2*np.eye(3)[y]
print(convert_model(GaussianNB().fit(X, y), X).kind)'''
    done = environment('convert').python(code)
    assert done.returncode==0 and done.stdout.strip()=='onnx', done.stderr

def test_notebooks(environment, photos, tmp_path):
    page = environment('notebooks').amulet('run', '--data-dir', photos, '--groups', photos/'groups.csv',
                                           '--output-dir', tmp_path/'run', *QUICK)
    assert 'Notebook ' in page and (tmp_path/'run'/'train.ipynb').is_file()

def test_redis(environment):
    "An answer is remembered; the server keeps it for ten seconds"
    try: socket.create_connection(('127.0.0.1', 6379), 1).close()
    except OSError: pytest.skip('no Redis at 127.0.0.1:6379; try: redis-server --port 6379')
    key = f'amulet-test-{uuid.uuid4().hex}'
    code = f'''from amulet_hybrid.model.answer_cache import RedisCache
cache = RedisCache('redis://127.0.0.1:6379/0', seconds=10, timeout=5, secret='s'*32)
cache.put({key!r}, b'gold')
print(cache.get({key!r}), cache.failures)'''
    done = environment('redis').python(code)
    assert done.returncode==0 and done.stdout.split()==["b'gold'", '0'], done.stdout+done.stderr

def test_postgres(environment):
    "The tables are made in a schema of our own"
    here,name = environment('postgres'),f'amulet_{uuid.uuid4().hex[:12]}'
    import psycopg
    try: server = psycopg.connect(POSTGRES, connect_timeout=3, autocommit=True)
    except psycopg.OperationalError:
        pytest.skip('no PostgreSQL at AMULET_TEST_POSTGRES (default: database test at 127.0.0.1:5432)')
    url = f'{POSTGRES}{"&" if "?" in POSTGRES else "?"}options=-csearch_path%3D{name}'
    with closing(server):
        server.execute(f'CREATE SCHEMA {name}')
        try: done = here.several(*(('store', what, '--database-url', url) for what in ('migrate', 'status')))
        finally: server.execute(f'DROP SCHEMA {name} CASCADE')
    assert [code for code,_ in done]==[0, 0] and 'predictions' in done[1][1], done
