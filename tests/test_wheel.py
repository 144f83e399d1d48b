"What `pip install` brings: built from a clean copy, installed with no extras, used from elsewhere"
import os
import re
import subprocess
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
@pytest.fixture(scope='session')
def python(built, tmp_path_factory):
    "Python of a new environment that has the wheel and no extras"
    env = tmp_path_factory.mktemp('bare')/'venv'
    venv.create(env, with_pip=True)
    python = env/('Scripts' if os.name=='nt' else 'bin')/'python'
    done = subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-compile',
                           next(built.glob('*.whl'))], capture_output=True, text=True)
    assert done.returncode==0, done.stderr[-2000:]
    return python

def run(*command):
    "The command, run where the repository is not in the way"
    return subprocess.run(command, cwd=Path(command[0]).parent, capture_output=True, text=True,
                          env={k: v for k,v in os.environ.items() if k!='PYTHONPATH'})

def test_wheel_holds_the_package_and_its_run(built):
    with zipfile.ZipFile(next(built.glob('*.whl'))) as wheel: names = wheel.namelist()
    assert {'amulet_hybrid/runs/train.ipynb', 'amulet_hybrid/py.typed', 'amulet_hybrid/_modidx.py'} <= set(names)
    assert {n for n in names if n.endswith('.j2')}=={p.relative_to(ROOT).as_posix()
                                                     for p in (ROOT/'amulet_hybrid').rglob('*.j2')}
    assert {n.split('/')[0] for n in names if '.dist-info' not in n}=={'amulet_hybrid'}
    assert not [n for n in names if 'test' in n.lower()]
    assert {n for n in names if n.endswith('.py')}=={p.relative_to(ROOT).as_posix()
                                                     for p in (ROOT/'amulet_hybrid').rglob('*.py')}

def test_sdist_holds_what_it_is_built_from(built):
    with tarfile.open(next(built.glob('*.tar.gz'))) as sdist: names = {n.partition('/')[2] for n in sdist.getnames()}
    assert {'setup.py', 'settings.ini', 'pyproject.toml', 'LICENSE', 'LICENSES/NOTICE.md', 'LICENSES/Apache-2.0.txt',
            'README.md', 'amulet_hybrid/runs/train.ipynb'} <= names
    assert not [n for n in names if n.startswith(('tests', 'nbs', 'samples', '.venv'))]

def test_installed_version(python):
    done = run(python, '-c', 'import amulet_hybrid; print(amulet_hybrid.__version__, amulet_hybrid.__file__)')
    version,file = done.stdout.split()
    assert re.fullmatch(r'\d+\.\d+\.\d+', version) and Path(file).is_relative_to(python.parent.parent)

def test_every_module_imports_without_extras(python):
    "All but the service, which is an extra as a whole, and what Alembic runs"
    files = [p.relative_to(ROOT) for p in sorted((ROOT/'amulet_hybrid').rglob('*.py')) if p.stem!='__init__']
    files = [p for p in files if 'serve' not in p.parts]
    names = ['.'.join(p.with_suffix('').parts) for p in files if 'migrations' not in p.parts]
    done = run(python, '-c', f'import importlib\nfor name in {names!r}: importlib.import_module(name)')
    assert done.returncode==0, done.stderr

def test_command_line(python):
    done = run(python.parent/'amulet', '--help')
    assert done.returncode==0, done.stderr
    assert 'run' in done.stdout

@pytest.mark.parametrize('extra,code', {
    'serve': 'from amulet_hybrid.serve.app import create_app; create_app(None)',
    'store': 'from amulet_hybrid.store.predictions import save_prediction; save_prediction({}, "amulet.db")',
    'cnn': 'from amulet_hybrid.features.backbone_export import export_backbone as export; '
           'export("mobilenet_v2", None, "net.onnx")',
}.items())
def test_missing_extra_is_named(python, extra, code):
    done = run(python, '-c', code)
    assert done.returncode==1 and f"pip install 'amulet_hybrid[{extra}]'" in done.stderr
