"What several tests stand on, made once a session: a trained bundle, a wheel, the image in which both are served"
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
SKIP = shutil.ignore_patterns('.*', '*.egg-info', '__pycache__', 'build', 'dist', '_proc', '_docs')

# These stand on the image, the wheel or the bundle of another file's tests: made once
SAME_WORKER = dict.fromkeys(('test_production.py', 'test_wheel.py', 'test_proxy.py'), 'test_deploy.py')

def pytest_configure(config):
    "Exported nets are shared by all tests of this run and by no other run; workers inherit the environment"
    if 'PYTEST_XDIST_WORKER' in os.environ: return
    folder = tempfile.mkdtemp(prefix='amulet-tests-')
    os.environ['AMULET_CACHE_DIR'] = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))

def pytest_collection_modifyitems(items):
    "Notebooks come last, those of the first folders at the end: small pieces of work fill all workers"
    notebooks = [item for item in items if item.path.name=='test_notebooks.py']
    notebooks.sort(key=lambda item: item.nodeid, reverse=True)
    items[:] = [item for item in items if item.path.name!='test_notebooks.py']+notebooks

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "The tests of a file share what they stand on, so one worker runs them; notebooks share nothing"
    from xdist.scheduler import LoadScopeScheduling
    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition('::')[0].rpartition('/')[2]
            return nodeid if file=='test_notebooks.py' else SAME_WORKER.get(file, file)
    return ByFile(config, log)

@pytest.fixture(scope='session')
def built(tmp_path_factory):
    "Folder with an sdist and the wheel that was built from it, of a clean copy"
    tree = tmp_path_factory.mktemp('tree')/'amulet_hybrid'
    left_out = {str(ROOT/'samples'), str(ROOT/'runs')}
    shutil.copytree(ROOT, tree, symlinks=True, ignore=lambda folder, names: SKIP(folder, names)
                    | {n for n in names if os.path.join(folder, n) in left_out})
    def build(*words):
        done = subprocess.run([sys.executable, '-m', 'build', '--outdir', tree/'dist', *words], capture_output=True,
                              text=True)
        assert done.returncode==0, done.stdout[-2000:]+done.stderr[-2000:]
    # what is needed to build is installed anew once; the wheel is made of what the sdist holds, by the same
    build('--sdist', tree)
    sdist = next((tree/'dist').glob('*.tar.gz'))
    shutil.unpack_archive(sdist, tree.parent/'unpacked', filter='data')
    build('--wheel', '--no-isolation', tree.parent/'unpacked'/sdist.name.removesuffix('.tar.gz'))
    return tree/'dist'

@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    "Folder of a signed bundle with three tiers, its keys, and a photo: made once for all workers, changed by none"
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get('PYTEST_XDIST_WORKER') else base)/'trained'
    with FileLock(f'{folder}.lock'):
        if not folder.exists():
            part = tmp_path_factory.mktemp('training')
            train_bundle(part)
            part.rename(folder)
    return folder

def train_bundle(folder):
    "What `trained` gives"
    from PIL import Image

    from amulet_hybrid.base.signing import make_keys
    from amulet_hybrid.data.samples import LOGOS, draw_logo
    from amulet_hybrid.features.config import FeatureConfig
    from amulet_hybrid.features.extractor import HybridFeatureExtractor
    from amulet_hybrid.learn.config import TrainingConfig
    from amulet_hybrid.learn.trainer import HybridTrainer
    from amulet_hybrid.model.bundle import HeldOut, save_bundle
    from amulet_hybrid.model.bundle_files import sign_bundle
    from amulet_hybrid.model.cascade import fit_cascade
    from amulet_hybrid.model.inference import THRESHOLDS
    from amulet_hybrid.model.similar_photos import PhotoIndex
    photos = [draw_logo(kind, seed=piece, view=view, side=96) for kind in LOGOS for piece in range(10)
              for view in range(2)]
    labels,groups = np.repeat(list(LOGOS), 20),np.repeat(np.arange(10*len(LOGOS)), 2)
    extractor = HybridFeatureExtractor(FeatureConfig(blocks=('colour', 'lbp', 'dense_sift:step=16',
                                                             'cnn:squeezenet1_1'), weights='random', cnn_side=64))
    features = extractor.extract_batch(photos)
    models = ('logistic_balanced', 'lda_balanced', 'svm', 'cosine_knn', 'extra_trees')
    config = TrainingConfig(cv_folds=3, cv_repeats=1, models=models, jobs=1)
    trainer = HybridTrainer(config).fit(features, labels, groups, extractor.encoders())
    cascade = fit_cascade(trainer, features, groups, extractor.extractors, thresholds=THRESHOLDS)
    known = np.searchsorted(trainer.classes_, labels)
    index = PhotoIndex.fit({'cnn:squeezenet1_1': features['cnn:squeezenet1_1']}, known,
                           [f'{label}/{i}.png' for i,label in enumerate(labels)], groups=groups)
    save_bundle(folder/'bundle', trainer.model_, extractor, cascade=cascade, held_out=HeldOut(features, photos),
                photos=index)
    make_keys(folder/'key.pem')
    sign_bundle(folder/'bundle', folder/'key.pem')
    Image.fromarray(photos[3]).save(folder/'photo.png')

def free_ports(number):
    "So many ports in a row that nobody has; each worker looks in a range of its own, so that none is taken meanwhile"
    worker = int(os.environ.get('PYTEST_XDIST_WORKER', 'gw0').removeprefix('gw')) % 4
    start = 20_000+3000*worker
    for first in range(start+os.getpid()%2000, start+3000-number, number):
        try:
            socks = [socket.create_server(('127.0.0.1', first+i)) for i in range(number)]
            for sock in socks: sock.close()
            return first
        except OSError: continue
    raise RuntimeError('no free ports')

@pytest.fixture(scope='session')
def image(built, trained, tmp_path_factory):
    "The image of `amulet deploy`, with the signed bundle and the wheel, built from a folder of wheels without an index"
    from dockerfile import Image, download

    from amulet_hybrid.deploy.packages import deployment_requirements
    from amulet_hybrid.deploy.rendering import deploy
    from amulet_hybrid.deploy.settings import DeploySettings
    folder,wheels = tmp_path_factory.mktemp('deployment'),tmp_path_factory.mktemp('wheels')
    bundle = trained/'bundle'
    download(deployment_requirements((bundle/'requirements_production.txt').read_text(), signed=True), wheels)
    settings = DeploySettings(service_port=free_ports(1))
    deploy(settings, folder, 'docker', bundle, next(built.glob('*.whl')), trained/'key.pem.pub', wheelhouse=wheels)
    made = Image(folder/'docker', settings.install_dir, settings.data_dir)
    yield made
    made.remove()
