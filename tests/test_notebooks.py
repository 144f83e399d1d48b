"Every notebook, executed from top to bottom in a process of its own"
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from notebook import run_in_fork

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('[!_.]*.ipynb') if not any(part.startswith(('.', '_'))
        for part in p.parts))
# Imported once; each notebook begins as a fork that has them (on Linux), so importing is not paid 124 times
PRELOADED = ['numpy', 'pandas', 'scipy.stats', 'sklearn.ensemble', 'sklearn.svm', 'sklearn.linear_model',
             'matplotlib.pyplot', 'PIL.Image', 'onnx', 'torch', 'torchvision', 'sqlalchemy', 'fastapi.testclient',
             'execnb.shell', 'nbdev.process', 'nbdev.showdoc', 'notebook']

@pytest.fixture(scope='session')
def run(tmp_path_factory):
    "Execute a notebook: exit code and output"
    if not sys.platform.startswith('linux'):
        def run_alone(path):
            done = subprocess.run([sys.executable, ROOT/'tests'/'notebook.py', path], cwd=ROOT,
                                  env={**os.environ, 'AMULET_PROGRESS': 'off'}, capture_output=True, text=True)
            return done.returncode,done.stdout+done.stderr
        return run_alone
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    output = tmp_path_factory.mktemp('notebooks')/'output.txt'
    def run_forked(path):
        process = context.Process(target=run_in_fork, args=(str(path), str(output)))
        process.start()
        process.join()
        return process.exitcode,output.read_text(errors='replace')
    return run_forked

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_notebook_runs(notebook, run):
    code,output = run(notebook)
    assert code==0, output[-8000:]
