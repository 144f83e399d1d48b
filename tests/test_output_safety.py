"Names that others chose harm nobody who reads what is written: terminals, logs, spreadsheets, pages, file systems"
import csv
import json
import logging
import os
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from amulet_hybrid.augment.folder import AugmentationPipeline, AugmentFolderConfig
from amulet_hybrid.base.csv_files import csv_cell, csv_table, csv_value, csv_values
from amulet_hybrid.cli.app import app
from amulet_hybrid.core import ImageError, PrintableFormatter, printable
from amulet_hybrid.data.manifest import make_manifest

# Format strings of every kind, HTML, Markdown, mathematics, patterns, formulas, shells, terminals, words of pandas
NAMES = ['{{7*7}} {0} {', r'%s %(a)d [a-z]*? \d+(', r'$\frac{$', 'a|b `c` ~~d~~', '<script>alert(1)<%2f&amp;', '=1+1',
         '-rf', '\x1b[2Jred\nBundle  all good', "'\"; $(touch pwned) #", 'NA', '01', 'พระ \u202egpj.exe']
FILE = '{} %s {{1+1}} [1] =1 \x1b[1m\n{n}.png' # A photo

def draw(path, colour, noise):
    "A small photo of one colour, a little noise on it"
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(np.array(colour)+noise.integers(0, 60, (40, 40, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder for each name, four photos in it"
    folder,noise = tmp_path_factory.mktemp('names')/'photos',np.random.default_rng(0)
    for i,name in enumerate(NAMES):
        colour = [(i%4)*60, (i//4)*60, 120*(i%2)]
        for n in range(4): draw(folder/name/FILE.replace('{n}', str(n)), colour, noise)
    return folder

def amulet(*words, code=0):
    "What a command prints, after all that is no text was looked for"
    done = CliRunner().invoke(app, [str(w) for w in words])
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    assert done.exit_code==code, done.output
    assert not [c for c in done.output if c not in '\n\t' and c!=' ' and not c.isprintable()]
    assert not [line for line in done.output.splitlines() if line.startswith('Bundle  all good')]
    return done.output

def cells(path):
    "All cells of a CSV file, as they stand there"
    with path.open(encoding='utf-8', newline='') as file: return [cell for row in csv.reader(file) for cell in row]

def check_tables(folder):
    "No table below a folder has a cell that a spreadsheet would run"
    tables = sorted(p for p in folder.rglob('*.csv') if 'cache' not in p.parts)
    risky = [(p.name, cell) for p in tables for cell in cells(p) if csv_cell(cell)!=cell and cell[:1]!="'"]
    assert tables and not risky

def check_pages(folder):
    "No page below a folder has a tag that was a name, or a sum that was computed"
    pages = sorted(folder.rglob('*.html'))
    for page in pages:
        text = page.read_text(encoding='utf-8')
        assert '<script>alert(1)' not in text and '49' not in text.partition('7*7')[0][-9:], page
    assert pages

def test_names_from_inspection_to_prediction(photos, monkeypatch):
    home = photos.parent
    monkeypatch.chdir(home)
    amulet('inspect', '--data-dir', 'photos', '--output-dir', 'look', '--quick', '--fix')
    amulet('split', '--data-dir', 'photos', '--output-dir', 'split', '--test-size', .25)
    amulet('augment', '--input-dir', 'photos', '--output-dir', 'more', '--target-samples', 5, '--features', 'colour',
           '--test-size', .25)
    amulet('train', '--data-dir', 'more/photos.csv', '--output-dir', 'run', '--quick', '--blocks', 'colour',
           '--weights', 'none')
    amulet('evaluate', '--model-dir', 'run/bundle', '--output-dir', 'judged')
    told = amulet('predict', 'photos', '--model-dir', 'run/bundle')
    amulet('predict', 'photos', '--model-dir', 'run/bundle', '--output', 'told.csv')
    classes = json.loads((home/'run'/'bundle'/'manifest.json').read_text())['classes']
    assert sorted(classes)==sorted(NAMES) and len([line for line in told.splitlines() if '\t' in line])==4*len(NAMES)
    again = csv_values(pd.read_csv('told.csv', keep_default_na=False, dtype=str))
    assert set(again['path'])=={f'{name}/{FILE.replace("{n}", str(n))}' for name in NAMES for n in range(4)}
    assert set(again['label'])-{''} <= set(NAMES) and (again['label']==again['path'].str.split('/').str[0]).mean() > .7
    made = csv_values(pd.read_csv('more/photos.csv', keep_default_na=False, dtype=str))
    assert set(made['label'])==set(NAMES) and all((home/'more'/p).is_file() for p in made['path'])
    assert not list(home.rglob('pwned'))
    for folder in ('look', 'split', 'more', 'run'): check_tables(home/folder)
    for folder in ('look', 'more', 'run', 'judged'): check_pages(home/folder)
    card = (home/'run'/'bundle'/'MODEL_CARD.md').read_text(encoding='utf-8')
    assert '\x1b' not in card and '\u202e' not in card and '<script>' not in card and r'a\|b \`c\` \~\~d\~\~' in card

def test_labels_of_a_table_stay_below_the_output(tmp_path):
    "A label may name a folder above, be longer than a name of a file, or hold what no name of a file may"
    noise,labels = np.random.default_rng(0),['..', '.', '../../up', 'long '*99, 'a:b', 'plain']
    for n in range(12): draw(tmp_path/'photos'/f'{n} {"x"*230}.png', [40*(n%6), 99, 9], noise)
    rows = pd.DataFrame({'path': sorted(p.name for p in (tmp_path/'photos').iterdir())})
    rows['label'],rows['group'],rows['split'] = [labels[n%6] for n in range(12)],rows['path'],'train'
    config = AugmentFolderConfig(target_samples=3, preset='light', max_tries=20)
    made = AugmentationPipeline(config).run(rows, tmp_path/'photos', tmp_path/'deep'/'more').manifest
    assert made['made'].sum()==6 and set(made['label'])==set(labels)
    assert all((tmp_path/'deep'/'more'/p).is_file() for p in made['path'])
    assert {p.name for p in tmp_path.iterdir()}=={'photos', 'deep'} and len(list((tmp_path/'deep').iterdir()))==1

def test_photos_of_one_stem_give_different_copies(tmp_path):
    noise = np.random.default_rng(0)
    for name in ('1.png', '1.bmp', '2.png'): draw(tmp_path/'photos'/'gold'/name, [200, 90, 9], noise)
    rows = pd.DataFrame({'path': ['gold/1.png', 'gold/1.bmp', 'gold/2.png'], 'label': 'gold', 'group': '',
                         'split': 'train'})
    pipeline = AugmentationPipeline(AugmentFolderConfig(target_samples=9, preset='light'))
    made = pipeline.run(rows, tmp_path/'photos', tmp_path/'more').manifest
    assert made['path'].is_unique and made['made'].sum()==6

def test_a_name_that_is_no_text(tmp_path, caplog):
    "Bytes that are no UTF-8, as old file systems have them: listed, printed and written, not raised"
    from amulet_hybrid.model.batch import find_photos, write_answers
    from amulet_hybrid.model.prediction import Failure
    noise = np.random.default_rng(0)
    for label in 'ab':
        for n in range(4): draw(tmp_path/'photos'/label/f'{n}.png', [90*(label=='b'), 90, 90], noise)
    try: os.rename(os.fsencode(tmp_path/'photos'/'a'/'0.png'), os.fsencode(tmp_path/'photos'/'a')+b'/\xff\xfe.png')
    except OSError: pytest.skip('this file system has names of text only')
    amulet('inspect', '--data-dir', tmp_path/'photos', '--output-dir', tmp_path/'look', '--quick')
    assert r'such as a/\udcff\udcfe.png' in caplog.text
    assert any(r'a/\udcff\udcfe.png' in cell for cell in cells(tmp_path/'look'/'manifest.csv'))
    for ending in ('csv', 'jsonl'):
        named = [(name, Failure('empty_file', '')) for _,name in find_photos(tmp_path/'photos')]
        assert write_answers(named, tmp_path/f'told.{ending}', 'ab')['files']==8

# Terminals and logs

def test_errors_and_logs_are_lines():
    "An error has one line whatever the file is called; a record of the log, too, and its traceback is indented"
    evil = 'a\x1b[31m\nerror [good] all is well\r\u2028\x85.jpg'
    error = ImageError(f'{evil} is cut', where=evil, advice=evil)
    assert str(error).isprintable() and error.message==f'{evil} is cut'
    try: raise ValueError(evil)
    except ValueError: record = logging.LogRecord('x', logging.ERROR, '', 0, '%s failed', (evil,), sys.exc_info())
    lines = PrintableFormatter('%(message)s').format(record).split('\n')
    assert all(line.isprintable() for line in lines) and all(line.startswith('    ') for line in lines[1:])

def test_text_log_of_the_service():
    pytest.importorskip('prometheus_client', reason="pip install 'amulet_hybrid[serve]'")
    from amulet_hybrid.serve.telemetry import JsonFormatter, TextFormatter
    evil = 'a\x1b[31m\n{"level": "error"}'
    try: raise ValueError(evil)
    except ValueError: record = logging.LogRecord('x', logging.ERROR, '', 0, '%s failed', (evil,), sys.exc_info())
    record.path = evil
    text = TextFormatter().format(record).split('\n')
    assert all(line.isprintable() for line in text) and all(line.startswith('    ') for line in text[1:])
    assert JsonFormatter().format(record).isprintable()

@pytest.mark.parametrize('text', ['plain', 'พระสมเด็จ', '中文 éß', '😀', 'a b\u00a0c'])
def test_letters_of_every_language_stay(text): assert printable(text)==text

# Spreadsheets

@pytest.mark.parametrize('value', ['=1', '+a', '-a', '@a', '\ta', '\ra', '\na', "'=a", "''=a", '\uff1d1', '=', '-',
                                   "'"])
def test_cells_are_read_as_they_were(value):
    assert csv_value(csv_cell(value))==value and csv_cell(value)[0] not in '=+-@\t\r\n\uff1d'

@pytest.mark.parametrize('value', ['-1.5', '+2', '1e-5', '-1e5', 'a=b', "it's", '', None, -7, 2.5, float('inf')])
def test_numbers_and_other_text_stay(value): assert csv_cell(value) is value

def test_every_csv_writer(tmp_path):
    "Lists of photos, tables of answers, exports of the store: no cell begins as a formula"
    from amulet_hybrid.model.batch import write_answers
    from amulet_hybrid.model.prediction import Prediction
    names = ['=cmd|x', '@a', '-b']
    answers = [(f'{n}/1.png', Prediction(n, n, 1., dict.fromkeys(names, 1/3), prediction_set=(n,))) for n in names]
    write_answers(answers, tmp_path/'answers.csv', names)
    csv_table(pd.DataFrame({'path': names, '=x': [-1, 2, 3]})).to_csv(tmp_path/'table.csv', index=False)
    pytest.importorskip('sqlalchemy', reason="pip install 'amulet_hybrid[store]'")
    from amulet_hybrid.store.datasets import export_table
    from amulet_hybrid.store.predictions import save_prediction
    for n in names: save_prediction({'prediction_id': n, 'label': n, 'probabilities': {n: 1.}}, f'{tmp_path}/a.db')
    export_table(tmp_path/'store.csv', database=f'{tmp_path}/a.db')
    check_tables(tmp_path)
    assert sorted(csv_values(pd.read_csv(tmp_path/'store.csv'))['label'])==sorted(names)

def test_lists_of_photos_with_formulas_for_names(tmp_path):
    "Written, read again and found: the apostrophe is for the spreadsheet alone"
    noise = np.random.default_rng(0)
    for name in ('=a', '-b'): draw(tmp_path/name/'+1.png', [9, 9, 200], noise)
    rows = pd.DataFrame({'path': ['=a/+1.png', '-b/+1.png'], 'label': ['=a', '-b'], 'group': ['@1', '2']})
    csv_table(rows).to_csv(tmp_path/'photos.csv', index=False)
    found,root = make_manifest(tmp_path/'photos.csv')
    assert found['path'].tolist()==rows['path'].tolist() and found['label'].tolist()==['=a', '-b']
    assert all((root/p).is_file() for p in found['path'])
