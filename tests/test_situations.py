"""Situations that a new user gets into: every command answers with a result or with one line that says what to do,
never with a traceback"""
import contextlib
import io
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from amulet_hybrid.cli.app import main


def draw(path, colour, noise):
    "A small photo of one colour, a little noise on it"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(np.array(colour)+noise.integers(0, 60, (40, 40, 3)), 0, 255).astype(np.uint8)).save(path)

def photos(folder, names=('gold', 'clay'), number=8, seed=0):
    "A folder for each class"
    noise = np.random.default_rng(seed)
    for i,name in enumerate(names):
        for n in range(number): draw(Path(folder)/name/f'{n}.png', [180*(i%2), 60*(i//2), 90], noise)
    return Path(folder)

def amulet(*words, encoding='utf-8'):
    "Exit code of a command, and what it prints; anything but an exit is raised"
    out,err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    code = 0
    with patch.object(sys, 'argv', ['amulet', *map(str, words)]), contextlib.redirect_stdout(out), \
         contextlib.redirect_stderr(err):
        try: main()
        except SystemExit as end: code = end.code or 0
    for stream in (out, err): stream.flush()
    return code,(out.buffer.getvalue()+err.buffer.getvalue()).decode(encoding)

@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    home = tmp_path_factory.mktemp('bundle')
    code,said = amulet('train', '--data-dir', photos(home/'photos'), '--output-dir', home/'run', '--quick', '--blocks',
                       'colour', '--weights', 'none')
    assert code==0, said
    return home/'run' # the folder of the run does as well as the bundle in it

COMMANDS = {'inspect': ('inspect', '--quick', '--data-dir', 'DATA', '--output-dir', 'OUT'),
            'split': ('split', '--data-dir', 'DATA', '--output-dir', 'OUT'),
            'train': ('train', '--quick', '--blocks', 'colour', '--weights', 'none', '--data-dir', 'DATA',
                      '--output-dir', 'OUT'),
            'extract': ('extract', '--blocks', 'colour', '--data-dir', 'DATA', '--output-dir', 'OUT'),
            'augment': ('augment', '--target-samples', 9, '--features', 'colour', '--input-dir', 'DATA', '--output-dir',
                        'OUT'),
            'evaluate': ('evaluate', '--quick', '--model-dir', 'RUN', '--data-dir', 'DATA', '--output-dir', 'OUT'),
            'predict': ('predict', 'DATA', '--model-dir', 'RUN', '--output', 'OUT/told.csv')}

def call(command, data, out, run, **options):
    places = {'DATA': data, 'OUT': out, 'RUN': run, 'OUT/told.csv': Path(out)/'told.csv'}
    return amulet(*[places.get(word, word) for word in COMMANDS[command]], **options)

def in_file(data, tmp_path):
    (tmp_path/'file').write_text('mine')
    return tmp_path/'file'

BAD_PLACES = {'a file': (in_file, ('not_a_folder', 'bad_setting', 'not_empty')),
              'below a file': (lambda data, tmp_path: in_file(data, tmp_path)/'deep', ('not_a_folder',)),
              'nowhere': (lambda data, tmp_path: Path('/proc/nowhere/out'), ('no_such_file', 'no_access')),
              'a name of 300 letters': (lambda data, tmp_path: tmp_path/('n'*300), ('name_too_long',)),
              'the photos': (lambda data, tmp_path: data, ('bad_setting',)),
              'among the photos': (lambda data, tmp_path: data/'runs', ('bad_setting',))}

@pytest.mark.parametrize('place', BAD_PLACES)
@pytest.mark.parametrize('command', COMMANDS)
def test_an_output_where_none_can_be(command, place, bundle, tmp_path):
    where,codes = BAD_PLACES[place]
    data = photos(tmp_path/'photos')
    before = sorted(data.rglob('*'))
    code,said = call(command, data, where(data, tmp_path), bundle)
    if command=='predict' and 'photos' in place: # one file, where its owner wants it
        assert code==0
        return
    assert code==1 and any(f'[{c}]' in said for c in codes), said
    assert sorted(data.rglob('*'))==before

@pytest.mark.parametrize('command', COMMANDS)
def test_names_that_are_strange_and_right(command, bundle, tmp_path):
    "Braces, percent and question marks, Thai names as long as a file system takes, a terminal without Thai"
    names = ['พระสมเด็จ'*9, '{0}%s%41?#'] # 243 bytes
    data = photos(tmp_path/'{photos} 100% (1)?#'/'none', names if command!='evaluate' else ('gold', 'clay'))
    draw(data/(names[0] if command!='evaluate' else 'gold')/('ก'*83+'.png'), [9, 9, 90], np.random.default_rng(1))
    code,said = call(command, data, tmp_path/'{out} %41?#', bundle, encoding='cp1252')
    assert code==0, said
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('{out}')]==['{out} %41?#']

@pytest.mark.parametrize('command', COMMANDS)
def test_a_disk_that_is_full(command, bundle, tmp_path):
    small = tmp_path/'small'
    small.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8k', 'tmpfs', small], capture_output=True).returncode:
        pytest.skip('needs the right to mount a small disk')
    with contextlib.suppress(OSError): (small/'rest').write_bytes(bytes(2**14))
    try: code,said = call(command, photos(tmp_path/'photos'), small/'out', bundle)
    finally: subprocess.run(['umount', '-l', small], check=True)
    assert code==1 and '[disk_full]' in said, said

def test_a_class_that_is_called_nothing(tmp_path):
    "Labels are text"
    names = ['None', 'NA', 'null', 'nan', '01', '1', '001', '1e1']
    code,said = amulet('train', '--data-dir', photos(tmp_path/'photos', names), '--output-dir', tmp_path/'run',
                       '--quick', '--blocks', 'colour', '--weights', 'none')
    assert code==0, said
    from amulet_hybrid.model.bundle import load_bundle
    assert sorted(load_bundle(tmp_path/'run').classes)==sorted(names)
    rows = pd.DataFrame([(f'{name}/{i}.png', name) for name in names for i in range(8)])
    rows.to_csv(tmp_path/'photos'/'all.csv', sep=';', index=False, encoding='utf-8-sig', header=['File Name', 'CLASS'])
    code,said = amulet('split', '--data-dir', tmp_path/'photos'/'all.csv', '--output-dir', tmp_path/'split')
    assert code==0, said
    manifest = pd.read_csv(tmp_path/'split'/'manifest.csv', dtype=str, keep_default_na=False)
    assert sorted(set(manifest['label']))==sorted(names)

def test_groups_of_a_mac(tmp_path):
    "Paths in another Unicode form part no group; half a table is told in the terminal and in the report"
    data = photos(tmp_path/'photos', ['Caf\xe9', 'clay'], 12)
    rows = [(unicodedata.normalize('NFD', f'{name}/{i}.png'), i//3) for name in ('Caf\xe9', 'clay') for i in range(12)]
    table = pd.DataFrame(rows, columns=['path', 'group'])
    for part in (table, table.iloc[::2]):
        part.to_csv(tmp_path/'groups.csv', index=False)
        code,said = amulet('train', '--data-dir', data, '--groups', tmp_path/'groups.csv', '--output-dir',
                           tmp_path/'run', '--quick', '--blocks', 'colour', '--weights', 'none')
        assert code==0, said
        told = (tmp_path/'run'/'report.html').read_text(encoding='utf-8')
        assert ('12 of 24 photos' in said)==(len(part)==12)==('12 of 24 photos' in told)
        shutil.rmtree(tmp_path/'run')
    table.iloc[:9].to_csv(tmp_path/'groups.csv', index=False)
    words = ['split', '--data-dir', data, '--groups', tmp_path/'groups.csv', '--output-dir', tmp_path/'split']
    code,said = amulet(*words)
    assert code==1 and '[groups_mismatch]' in said
    assert amulet(*words, '--allow-partial-groups')[0]==0

def test_parts_of_a_split_and_another_folder(tmp_path):
    data = photos(tmp_path/'photos'/'train')
    photos(data.parent/'test', number=4, seed=1)
    photos(data.parent/'predict', ['all'], 3)
    code,said = amulet('split', '--data-dir', data.parent, '--output-dir', tmp_path/'split')
    manifest = pd.read_csv(tmp_path/'split'/'manifest.csv', dtype=str)
    assert code==0 and 'predict' in said and set(manifest['label'])=={'gold', 'clay'}
    assert (manifest['path'].str.split('/').str[0]==manifest['split']).all()

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs a system that knows links')
def test_class_folders_that_are_links(bundle, tmp_path):
    "One rule for all commands"
    photos(tmp_path/'elsewhere')
    (tmp_path/'photos').mkdir()
    for name in ('gold', 'clay'): (tmp_path/'photos'/name).symlink_to(tmp_path/'elsewhere'/name)
    for command in ('split', 'predict'):
        code,said = call(command, tmp_path/'photos', tmp_path/command, bundle)
        assert code==0, said
    assert len(pd.read_csv(tmp_path/'predict'/'told.csv'))==len(pd.read_csv(tmp_path/'split'/'manifest.csv'))==16

def test_several_sources(bundle, tmp_path):
    data = photos(tmp_path/'photos')
    code,said = amulet('predict', data/'gold'/'1.png', data/'clay', f'{data}/gold/[2-4].png', '--model-dir', bundle)
    assert code==0 and len([line for line in said.splitlines() if '.png\t' in line])==1+8+3

WINDOWS = """
import asyncio, multiprocessing, os, signal, subprocess, sys, tempfile
for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules[name] = None
for name in ('register_at_fork', 'sched_getaffinity', 'nice', 'pwrite', 'O_CLOEXEC'):
    if hasattr(os, name): delattr(os, name)
for name in ('SIGHUP', 'SIGPROF', 'setitimer', 'ITIMER_PROF'):
    if hasattr(signal, name): delattr(signal, name)
import importlib, pkgutil, amulet_hybrid
for module in pkgutil.walk_packages(amulet_hybrid.__path__, 'amulet_hybrid.'):
    if 'migrations' not in module.name: importlib.import_module(module.name)
from amulet_hybrid.cli.app import main
photos, run = sys.argv[1:]
for words in (['train', '--quick', '--blocks', 'colour', '--weights', 'none', '--data-dir', photos, '--output-dir',
               run], ['predict', photos, '--model-dir', run]):
    sys.argv = ['amulet', *words]
    try: main()
    except SystemExit as end: assert not end.code, end.code
"""

def test_a_system_without_what_only_unix_has(tmp_path):
    "Everything imports, and photos are learned and named"
    pytest.importorskip('fastapi', reason="fastapi is not installed; pip install 'amulet_hybrid[serve]'")
    done = subprocess.run([sys.executable, '-c', WINDOWS, photos(tmp_path/'photos'), tmp_path/'run'],
                          capture_output=True, text=True)
    assert done.returncode==0, done.stderr[-3000:]

def test_names_that_are_not_utf8(bundle, tmp_path):
    "They count as files that are not there, and the reason is told"
    data = photos(tmp_path/'photos')
    os.rename(data/'gold'/'1.png', os.path.join(os.fsencode(data/'gold'), b'caf\xe9.png'))
    for command in COMMANDS:
        code,said = call(command, data, tmp_path/command, bundle, encoding='cp1252')
        told = 'no UTF-8' in said or command in ('extract', 'predict', 'augment') # which say it elsewhere
        assert code==0 and told, (command, said)

def test_a_second_run_into_a_folder(tmp_path):
    "The same settings go on; other ones have to be asked for"
    words = ['train', '--data-dir', photos(tmp_path/'photos'), '--output-dir', tmp_path/'run', '--quick', '--blocks',
             'colour', '--weights', 'none']
    assert amulet(*words)[0]==0 and amulet(*words)[0]==0
    code,said = amulet(*words, '--seed', 7)
    assert code==1 and '[not_empty]' in said and 'seed' in said
    assert amulet(*words, '--seed', 7, '--overwrite')[0]==0
