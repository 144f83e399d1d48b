"A bundle evaluated again by the command line: held-out photos, new ones, unknown classes, tables, what is refused"
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_iris
from typer.testing import CliRunner

from amulet_hybrid.cli.app import app
from amulet_hybrid.core import BundleError, ConfigError, DatasetError
from amulet_hybrid.data.samples import NO_FAULTS, make_samples
from amulet_hybrid.jobs.evaluate import evaluate_bundle, evaluate_table
from amulet_hybrid.jobs.table import TableRun
from amulet_hybrid.jobs.train import TrainingRun
from amulet_hybrid.model.cascade import fit_cascade
from amulet_hybrid.model.classifier import HybridClassifier


def call(*words): return CliRunner().invoke(app, ['evaluate', *map(str, words)])

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A finished run on photos of three classes, and its folder"
    folder = tmp_path_factory.mktemp('evaluate')
    make_samples(folder/'photos', photos=80, classes=3, side=96, faults=NO_FAULTS)
    result = TrainingRun(folder/'photos', groups=str(folder/'photos'/'groups.csv'), output_dir=str(folder/'run'),
                         blocks=('colour', 'lbp'), quick=True, jobs=1).run()
    return result,folder

@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    "A finished run on two kinds of iris, its folder, and the whole table"
    folder = tmp_path_factory.mktemp('evaluate_table')
    bunch = load_iris(as_frame=True)
    table = bunch.data.assign(kind=[str(bunch.target_names[i]) for i in bunch.target],
                              pot=[f'p{i//3}' for i in range(150)], soil=['clay', 'sand', None]*50)
    table[table['kind']!='setosa'].to_csv(folder/'iris.csv', index=False)
    return TableRun(folder/'iris.csv', target='kind', group='pot', output_dir=str(folder/'run'), quick=True,
                    jobs=1).run(),folder,table

def figures(folder): return json.loads((folder/'figures.json').read_text(encoding='utf-8'))

def test_held_out_photos_again(photos, tmp_path):
    result,_ = photos
    said = call('--model-dir', result['bundle'], '--output-dir', tmp_path)
    assert said.exit_code==0, said.output
    found = figures(tmp_path)
    for name,then in result['figures'].items():
        assert found['metrics']['overall'][name]['value']==pytest.approx(then['value'], abs=1e-6)
    assert 'as it was then' in said.output and f'Judged: {result["test_photos"]} photos' in said.output
    refused = found['refused'] # what the stored threshold comes to
    assert refused['verdict'] in ('kept', 'not_kept', 'unclear') and all(w in said.output for w in refused['words'])
    then = figures(Path(result['report']).parent)['refused']
    assert all(refused[k]==then[k] for k in ('threshold', 'unsure', 'novel', 'both', 'error_if_all_are_named'))
    page = (tmp_path/'report.html').read_text(encoding='utf-8')
    for words in ('Would more photos help?', 'nearest in training', 'Where the time goes',
                  'Does it know what it knows?', 'If it may refuse', 'Short lists instead of one name'):
        assert words in page, words
    assert (tmp_path/'figures'/'confusion.png').stat().st_size > 1000

def explained(folder): # Number of mistakes beside which the page says why
    return (folder/'report.html').read_text(encoding='utf-8').count('class="explained"')

def test_the_surest_mistakes_are_explained(photos, tmp_path):
    "Under exchanged labels nearly all is wrong: six mistakes get a map and training photos of both classes"
    result,folder = photos
    run = Path(result['report']).parent
    assert explained(run)==min(6, len(figures(run)['errors']))
    names = sorted(p.name for p in (folder/'photos').iterdir() if p.is_dir())
    for name,other in zip(names, names[1:]+names[:1]): shutil.copytree(folder/'photos'/name, tmp_path/'wrong'/other)
    assert call('--model-dir', result['bundle'], '--test-data-dir', tmp_path/'wrong', '--output-dir', tmp_path/'out',
                '--quick').exit_code==0
    assert len(figures(tmp_path/'out')['errors']) > 6 and explained(tmp_path/'out')==6
    page = (tmp_path/'out'/'report.html').read_text(encoding='utf-8')
    assert 'places that speak for what was said' in page and 'log odds of' in page and '://' not in page
    assert call('--model-dir', result['bundle'], '--test-data-dir', tmp_path/'wrong', '--output-dir',
                tmp_path/'out').exit_code==0 # the training photos are looked up, too
    page = (tmp_path/'out'/'report.html').read_text(encoding='utf-8').replace('<wbr>', '')
    assert len(re.findall(r'nearest of \S+ and \S+ in training', page))==6 and explained(tmp_path/'out')==6

def test_the_surest_wrong_rows_are_explained(rows, tmp_path):
    result,_,table = rows
    known = table[table['kind']!='setosa']
    wrong = known.assign(kind=np.where(known['kind']=='virginica', 'versicolor', 'virginica'))
    report = evaluate_table(result['bundle'], wrong, 'kind', output_dir=tmp_path, quick=True)
    assert len(report.reasons)==explained(tmp_path)==6
    why = next(iter(report.reasons.values()))
    assert {'column', 'value', 'adds'}==set(why.columns) and 'of its columns' in why.words

@pytest.mark.parametrize('broken', ['explain', 'similar', '__init__'])
def test_an_explanation_that_fails_never_costs_the_report(photos, tmp_path, monkeypatch, caplog, broken):
    result,folder = photos
    names = sorted(p.name for p in (folder/'photos').iterdir() if p.is_dir())
    for name,other in zip(names, names[1:]+names[:1]): shutil.copytree(folder/'photos'/name, tmp_path/'wrong'/other)
    def fail(*args, **kwargs): raise MemoryError('none left')
    monkeypatch.setattr(HybridClassifier, broken, fail)
    report = evaluate_bundle(result['bundle'], tmp_path/'wrong', tmp_path/'out', quick=True)
    assert not report.reasons and explained(tmp_path/'out')==0 and len(report.errors) > 6
    assert 'explained: none left' in caplog.text

def test_figures_are_of_what_is_served(tmp_path):
    "Where cheaper tiers answer, report, card and a later evaluation show the cascade, with the ensemble beside it"
    make_samples(tmp_path/'photos', photos=80, classes=3, side=96, faults=NO_FAULTS)
    run = TrainingRun(tmp_path/'photos', groups=str(tmp_path/'photos'/'groups.csv'), output_dir=str(tmp_path/'run'),
                      blocks=('colour', 'lbp'), quick=True, jobs=1, cost_wrong=1, cost_refuse=2) # all are named
    for step in (run.inspect, run.split, run.extract, run.train): step()
    known = run.data.part('train')
    run.cascade = fit_cascade(run.trainer, run.features.part(run.data.rows('train')), known['group'],
                              run.features.extractor.extractors, thresholds={'rules': .5, 'ensemble': .45})
    run.evaluate()
    result,test = run.save(),run.data.part('test')
    answers = [run.finished.predict(run.root/path) for path in test['path']]
    assert {a.route for a in answers}=={'rules', 'ensemble'}
    named = run.finished.classifier
    strict = [named.classify(run.root/path, confidence_threshold=.95) for path in test['path']]
    assert all(a.confidence >= .95 for a in strict if a.route=='rules') # what would be refused is passed on
    served = np.mean([a.top==label for a,label in zip(answers, test['label'])])
    assert result['figures']['accuracy']['value']==pytest.approx(served)
    found = figures(tmp_path/'run')
    assert found['metrics']['overall']['accuracy']['value']==pytest.approx(served)
    table = next(s['table'] for s in found['sections'] if s['title']=='What is served')
    (cascade,ensemble),at = table['data'],table['columns'].index('accuracy')
    alone = run.model.predict_proba(run.features.part(run.data.rows('test'))).argmax(1)
    share = (np.asarray(run.model.classes)[alone]==test['label'].to_numpy()).mean()
    assert cascade[at].startswith(f'{served:.3f} ') and ensemble[at].startswith(f'{share:.3f} ') and served!=share
    assert '| figure | as it is served | the ensemble alone |' in (run.output/'bundle'/'MODEL_CARD.md').read_text()
    said = call('--model-dir', result['bundle'], '--output-dir', tmp_path/'again')
    assert said.exit_code==0 and 'as it was then' in said.output, said.output
    assert figures(tmp_path/'again')['metrics']['overall']['accuracy']['value']==pytest.approx(served)

def test_new_photos_and_unknown_classes(photos, tmp_path):
    "A class that the bundle does not know is no mistake; its photos are what the detector must notice"
    result,_ = photos
    make_samples(tmp_path/'new', photos=48, classes=4, side=96, seed=5, faults=NO_FAULTS)
    said = call('--model-dir', result['bundle'], '--test-data-dir', tmp_path/'new', '--groups',
                tmp_path/'new'/'groups.csv', '--output-dir', tmp_path/'out', '--quick')
    assert said.exit_code==0, said.output
    found,labels = figures(tmp_path/'out'),pd.read_csv(tmp_path/'new'/'samples.csv')['label']
    strange = set(labels)-set(found['metrics']['per_class'])
    assert len(strange)==1 and 'does not know' in said.output and found['metrics']['n']==(~labels.isin(strange)).sum()
    section = next(s for s in found['sections'] if s['title']=='Strangers')['table']
    assert len(section['data'])==1 and section['data'][0][1]==labels.isin(strange).sum()
    if found['novelty']:
        assert {'false_alarms', 'found', 'auroc'} <= set(found['novelty']) and 'novelty: auroc' in said.output

def test_photos_trained_on_are_counted(photos, tmp_path):
    result,folder = photos
    said = call('--model-dir', result['bundle'], '--test-data-dir', folder/'photos', '--output-dir', tmp_path,
                '--quick')
    manifest = pd.read_csv(folder/'run'/'manifest.csv')
    assert f'{(manifest["split"]=="train").sum()} of these' in said.output and 'used in training' in said.output

def test_changed_and_lost_photos(photos, tmp_path):
    result,folder = photos
    shutil.copytree(folder/'run', tmp_path/'run')
    config = json.loads((tmp_path/'run'/'config.json').read_text())
    shutil.copytree(folder/'photos', tmp_path/'photos')
    (tmp_path/'run'/'config.json').write_text(json.dumps(config
                                                         | {'data_dir': str(tmp_path/'photos'), 'cache_dir': ''}))
    manifest = pd.read_csv(tmp_path/'run'/'manifest.csv').query('split=="test"')
    (tmp_path/'photos'/manifest.path.iloc[0]).unlink()
    with open(tmp_path/'photos'/manifest.path.iloc[1], 'ab') as file: file.write(b'0')
    said = call('--model-dir', tmp_path/'run'/'bundle', '--output-dir', tmp_path/'out', '--quick')
    assert said.exit_code==0 and f'2 of {len(manifest)} held-out photos are gone or changed' in said.output
    shutil.rmtree(tmp_path/'photos')
    lost = call('--model-dir', tmp_path/'run'/'bundle', '--output-dir', tmp_path/'out')
    assert isinstance(lost.exception, DatasetError) and lost.exception.code=='held_out_gone'
    assert '--test-data-dir' in lost.exception.advice
    (tmp_path/'run'/'manifest.csv').unlink()
    alone = call('--model-dir', tmp_path/'run'/'bundle', '--output-dir', tmp_path/'out')
    assert isinstance(alone.exception, BundleError) and alone.exception.code=='no_held_out'

def test_held_out_rows_again(rows, tmp_path):
    result,_,_ = rows
    said = call('--model-dir', result['bundle'], '--output-dir', tmp_path)
    assert said.exit_code==0, said.output
    found = figures(tmp_path)
    for name,then in result['figures'].items():
        # all rows are right, so the best temperature is 0: how near a search comes to that hangs on the last digits
        near = pytest.approx(then['value'], rel=.05) if name=='temperature' else pytest.approx(then['value'], abs=1e-6)
        assert found['metrics']['overall'][name]['value']==near
    assert 'as it was then' in said.output and f'Judged: {result["test_photos"]} rows' in said.output
    assert set(found['milliseconds']) >= {'row', 'model'} and [s['title']
                                                               for s in found['sections']][1]=='What each column brings'

def test_another_table(rows, tmp_path):
    "Same columns in another order, others beside them, a kind that was never seen, words as the bundle knows them"
    result,_,table = rows
    table[table.columns[::-1]].assign(more='x').to_csv(tmp_path/'new.csv', index=False)
    said = call('--model-dir', result['bundle'], '--table', tmp_path/'new.csv', '--target', 'kind', '--group', 'pot',
                '--output-dir', tmp_path/'out')
    assert said.exit_code==0, said.output
    assert 'does not know setosa; 50 rows' in said.output and 'used in training' in said.output
    found = figures(tmp_path/'out')
    assert found['metrics']['n']==100 and found['metrics']['n_groups']==34
    # the target is known from the run
    plain = call('--model-dir', result['bundle'], '--table', tmp_path/'new.csv', '--output-dir', tmp_path/'out',
                 '--quick')
    assert plain.exit_code==0 and 'No group column was named' in plain.output

def test_rows_from_a_database(rows, tmp_path):
    import sqlite3
    from contextlib import closing
    result,_,table = rows
    with closing(sqlite3.connect(tmp_path/'lab.db')) as db: table.to_sql('flowers', db, index=False)
    words = ('--model-dir', result['bundle'], '--table', f'sqlite:///{tmp_path}/lab.db', '--target', 'kind', '--quick',
             '--output-dir', tmp_path/'out')
    assert call(*words, '--query', "SELECT * FROM flowers WHERE kind <> 'setosa'").exit_code==0
    assert figures(tmp_path/'out')['metrics']['n']==100
    with pytest.raises(DatasetError, match='flowers'): raise call(*words, '--query', 'flower').exception

def test_each_kind_refuses_the_other(photos, rows, tmp_path):
    for words,code in ((('--model-dir', photos[0]['bundle'], '--table', rows[1]/'iris.csv', '--target', 'kind'),
                        'needs_photo'),
                       (('--model-dir', rows[0]['bundle'], '--test-data-dir', photos[1]/'photos'), 'needs_table')):
        error = call(*words, '--output-dir', tmp_path).exception
        assert isinstance(error, BundleError) and error.code==code
    for words in (('--target', 'kind'), ('--groups', photos[1]/'photos'/'groups.csv'),
                  ('--table', 'x.csv', '--test-data-dir', photos[1]/'photos')):
        assert call('--model-dir', rows[0]['bundle'], *words).exit_code==2

@pytest.mark.parametrize('kind,code', [('rose', 'no_rows'), (None, 'no_rows'),
                                       (np.arange(150)/7, 'target_not_classes')], ids=['unknown', 'empty', 'measured'])
def test_tables_that_cannot_be_evaluated(rows, tmp_path, kind, code):
    rows[2].assign(kind=kind).to_csv(tmp_path/'new.csv', index=False)
    found = call('--model-dir', rows[0]['bundle'], '--table', tmp_path/'new.csv', '--target', 'kind', '--output-dir',
                 tmp_path/'out').exception
    assert isinstance(found, DatasetError) and found.code==code

def test_target_must_be_named(rows, tmp_path):
    shutil.copytree(rows[1]/'run'/'bundle', tmp_path/'bundle')
    error = call('--model-dir', tmp_path/'bundle', '--table', rows[1]/'iris.csv', '--output-dir',
                 tmp_path/'out').exception
    assert isinstance(error, ConfigError) and '--target' in error.advice

def test_an_evaluation_is_recorded(rows, tmp_path, monkeypatch):
    "Figures, tags and the report, in any tracker"
    from amulet_hybrid.jobs.tracking import TRACKERS, Tracker
    book = {'files': [], 'tags': {}, 'figures': {}}
    class Book(Tracker):
        def start(self, name, parameters): book['parameters'] = parameters
        def figures(self, handle, numbers, step): book['figures'] |= numbers
        def tags(self, handle, tags): book['tags'] |= tags
        def artefact(self, handle, path, under): book['files'].append(path.name)
    monkeypatch.setitem(TRACKERS, 'book', Book)
    assert call('--model-dir', rows[0]['bundle'], '--output-dir', tmp_path, '--quick', '--track', 'book').exit_code==0
    assert book['figures']['balanced_accuracy']==pytest.approx(rows[0]['figures']['balanced_accuracy']['value'],
                                                               abs=1e-6)
    assert book['tags']['bundle']==rows[0]['digest'][:12] and {'report.html', 'figures.json',
                                                               'confusion.png'} <= set(book['files'])
