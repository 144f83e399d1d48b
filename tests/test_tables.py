"""Tables from files and databases to a bundle: what is kept, what is refused, and that nothing is learned from held-out
rows"""
import json
import sqlite3
from contextlib import closing

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_breast_cancer, load_iris, load_wine

from amulet_hybrid.core import BundleError, ConfigError, DatasetError, FeatureError, SplitError, hide_password
from amulet_hybrid.data.tables import read_table
from amulet_hybrid.features.table import TableEncoder, TableExtractor
from amulet_hybrid.jobs.table import TableConfig, TableRun, predict_table, table_block
from amulet_hybrid.model.bundle import load_bundle
from amulet_hybrid.model.bundle_files import verify_bundle


def holes(load, share=.05, seed=0):
    "A toy table with gaps, its labels as words"
    bunch,rng = load(as_frame=True),np.random.default_rng(seed)
    names = [str(c) for c in bunch.data.columns]
    table = bunch.data.set_axis(names, axis=1).mask(rng.random(bunch.data.shape) < share)
    return table.assign(kind=[str(bunch.target_names[i]) for i in bunch.target])

@pytest.fixture(scope='module')
def iris():
    "Flowers of which three each grow in one pot, with words, a leak, a row number, and a flower without a name"
    rng,table = np.random.default_rng(1),holes(load_iris)
    table = table.assign(number=range(150), leak=table['kind'].map({'setosa': 7, 'versicolor': 3, 'virginica': 5}),
                         soil=rng.choice(['clay','sand',None], 150),
                         pot=[f'p{i//3}' for i in range(150)], seen=pd.Timestamp('2024-01-01'),
                         said=[f'flower of {rng.random()}' for _ in range(150)], always=1.)
    table.loc[4, 'kind'] = None
    return table

@pytest.fixture(scope='module')
def done(iris, tmp_path_factory):
    "A finished run: its result, the run, and its folder"
    folder = tmp_path_factory.mktemp('table')
    iris.to_csv(folder/'iris.csv', index=False)
    run = TableRun(folder/'iris.csv', target='kind', group='pot', output_dir=str(folder/'out'), quick=True, jobs=1,
                   seed=3)
    return run.run(),run,folder/'out'

def test_columns_are_sorted(iris):
    data = read_table(iris, 'kind', 'pot')
    assert dict(zip(data.left_out['column'], data.left_out['reason'])).keys()=={'number', 'leak', 'seen', 'said',
            'always'}
    assert data.words==['soil'] and len(data)==149 and data.features.shape[1]==5
    told = '\n'.join(text for _,text in data.notes)
    assert '1 rows have no kind' in told and 'leak says the same' in told and 'free text' in told

def test_named_leak_stays_with_a_warning(iris):
    data = read_table(iris, 'kind', columns=['leak', 'petal width (cm)'])
    assert list(data.features)==['leak', 'petal width (cm)']
    assert any(level=='warning' and 'leak' in text and '100.0%' in text for level,text in data.notes)

@pytest.mark.parametrize('url', ['sqlite', 'sqlite+pysqlite'])
def test_database_gives_the_same(iris, tmp_path, url):
    if '+' in url: pytest.importorskip('sqlalchemy', reason='SQLAlchemy is not installed')
    with closing(sqlite3.connect(tmp_path/'lab.db')) as db:
        iris.to_sql('flowers', db, index=False); pd.DataFrame({'x': [1]}).to_sql('other', db, index=False)
    source = f'{url}:///{tmp_path}/lab.db'
    want = read_table(iris, 'kind', 'pot')
    for query in ('flowers', 'SELECT * FROM flowers'):
        data = read_table(source, 'kind', 'pot', query=query)
        assert data.labels.tolist()==want.labels.tolist() and data.groups.tolist()==want.groups.tolist()
        pd.testing.assert_frame_equal(data.features[want.features.columns.drop('soil')],
                                      want.features.drop(columns='soil'))
    for query,says in ((None, 'flowers, other'), ('flower', 'flowers, other'),
                       ('SELECT nothing FROM flowers', 'bad_query')):
        with pytest.raises(DatasetError, match=says): read_table(source, 'kind', query=query)

def test_parquet_and_semicolons(iris, tmp_path):
    iris.to_parquet(tmp_path/'iris.parquet')
    iris.to_csv(tmp_path/'iris.csv', sep=';', index=False, encoding='utf-8-sig')
    a,b = (read_table(tmp_path/name, 'kind', 'pot') for name in ('iris.parquet', 'iris.csv'))
    pd.testing.assert_frame_equal(a.features, b.features, rtol=1e-5)
    assert a.name=='iris' and len(a)==149

@pytest.mark.parametrize('change,code', [({'target': 'sort'}, 'no_such_column'), ({'group': 'sort'}, 'no_such_column'),
                                         ({'columns': ['x']}, 'no_such_column'),
    ({'target': 'petal width (cm)'}, 'target_not_classes'),
    ({'target': 'said'}, 'target_not_classes'), ({'columns': ['always']}, 'no_features'),
                                         ({'group': 'kind'}, 'bad_columns')])
def test_refusals_of_a_table(iris, change, code):
    with pytest.raises(DatasetError) as caught: read_table(iris, **{'target': 'kind', **change})
    assert caught.value.code==code

def test_refusals_of_a_file(tmp_path):
    (tmp_path/'empty.csv').write_text('')
    (tmp_path/'bytes.csv').write_bytes(b'\xff\xfe\x00'); (tmp_path/'no.parquet').write_text('x')
    (tmp_path/'not.db').write_text('x'*2000)
    for name in ('empty.csv', 'bytes.csv', 'no.parquet'):
        with pytest.raises(DatasetError, match='bad_table'): read_table(tmp_path/name, 'kind')
    with pytest.raises(DatasetError, match='bad_query'): read_table(f'sqlite:///{tmp_path}/not.db', 'kind')
    with pytest.raises(DatasetError, match='no_such_file'): read_table(f'sqlite:///{tmp_path}/none.db', 'kind')

def test_password_stays_at_home():
    pytest.importorskip('sqlalchemy', reason='SQLAlchemy is not installed')
    url = 'nosuchbase://ann:hush@host/lab'
    with pytest.raises(DatasetError) as caught: read_table(url, 'kind')
    assert 'hush' not in str(caught.value) and hide_password(url)=='nosuchbase://ann:***@host/lab'
    config = TableConfig(url, 'kind')
    assert 'hush' not in json.dumps(config.to_dict()) and config.replace(seed=2).data_dir==url

def test_numbers_as_people_write_them():
    n = 40
    table = pd.DataFrame({'a': [*map(str, np.arange(n)/7)], 'b': [True, None]*(n//2), 'c': [1., np.inf]*(n//2),
                          'd': np.arange(n)*1., 'e': np.arange(n)/9, 'y': [0., 1.]*(n//2)})
    table.loc[3, 'a'] = '?'
    data = read_table(table, 'y')
    assert set(data.labels)=={'0', '1'} and list(data.features)==['a', 'e'] and data.features['a'].isna().sum()==1
    assert dict(zip(data.left_out['column'], data.left_out['reason']))['d'].startswith('a number of the row')

def test_copies_are_never_parted():
    X = pd.DataFrame(np.random.default_rng(0).random((60, 3)), columns=list('abc'))
    X.loc[59] = X.loc[0]
    data = read_table(X.assign(y=['p','q']*30), 'y')
    assert data.groups[0]==data.groups[59] and len(set(data.groups))==59

def test_encoder_learns_from_training_rows_only():
    X = np.array([[0., 0], [1, 1], [2, 0], [9, 5]], np.float32)
    encoder = TableEncoder(categories=(1,)).fit(X[:3])
    assert encoder.code_.tolist()==[0, 1] and encoder.transform(X[3:])[0,1:].tolist()==[0, 0]
    again = TableEncoder.from_arrays({k: np.asarray(v) for k,v in encoder.to_arrays().items()})
    assert again.get_params()==encoder.get_params() and (again.transform(X)==encoder.transform(X)).all()

def test_words_are_learned_from_training_rows_only(done):
    _,run,_ = done
    data = read_table(pd.DataFrame({'w': ['a','b','c']*4, 'x': np.arange(12)/7, 'y': ['p','q']*6}), 'y')
    train = np.arange(12)%3!=2
    block = TableExtractor.of(data, train)
    assert json.loads(block.levels)=={'w': ['a', 'b']} and (block.rows(data.features)[~train,0]==-1).all()

def test_run_leaves_what_a_run_leaves(done):
    result,run,output = done
    assert {p.name for p in output.iterdir()} >= {'bundle', 'config.json', 'figures.json', 'manifest.csv',
                                                  'report.html', 'result.json'}
    assert run.manifest.groupby('group')['split'].nunique().max()==1
    assert result['figures']['balanced_accuracy']['value'] > .8
    page = (output/'report.html').read_text(encoding='utf-8')
    for words in ('What each column brings', 'says the same as the target', 'petal width'): assert words in page
    assert verify_bundle(output/'bundle')['blocks']['table']['params']['columns']==list(run.table.features)

def test_bundle_answers_as_the_model(done, iris):
    _,run,output = done
    loaded = load_bundle(output/'bundle')
    answers = predict_table(loaded, iris)
    assert len(answers)==150 and np.allclose(answers.filter(like='p_').sum(axis=1), 1)
    test = (run.manifest['split']=='test').to_numpy()
    want = run.model.predict_proba({'table': run.features.blocks['table'][test]})
    rows = [int(p.split()[1])-1 for p in run.manifest['path'][test]]
    assert np.abs(answers.filter(like='p_').to_numpy()[rows]-want).max() < 1e-5
    strange = predict_table(loaded, iris.assign(soil='lava', **{'petal width (cm)': np.nan}))
    assert strange.filter(like='p_').notna().all().all()

@pytest.mark.parametrize('features,code', [({'colour': 1}, 'unknown_feature'), ({'petal width (cm)': 'wide'},
        'bad_feature'), ({'petal width (cm)': [1]}, 'bad_feature'),
    ({'petal width (cm)': 1e400}, 'bad_feature'), ({'petal width (cm)': 10**400}, 'bad_feature'),
    ({}, 'no_features'), ({'petal width (cm)': None}, 'no_features'), ([1, 2], 'bad_features')])
def test_refusals_of_a_row(done, features, code):
    with pytest.raises(FeatureError) as caught: table_block(load_bundle(done[2]/'bundle')).row(features)
    assert caught.value.code==code

def test_a_table_bundle_takes_no_photo(done):
    loaded = load_bundle(done[2]/'bundle')
    with pytest.raises(FeatureError, match='needs_features'):
        loaded.extractor.extract(loaded.extractor.read(np.zeros((64, 64, 3), np.uint8)))

def test_same_seed_same_bundle(done, tmp_path):
    result,run,output = done
    again = TableRun(run.config, output_dir=str(tmp_path/'again')).run()
    assert again['digest']==result['digest']

def test_changed_bundle_is_refused(done, tmp_path):
    import shutil
    shutil.copytree(done[2]/'bundle', tmp_path/'bundle')
    with (tmp_path/'bundle'/'ensemble.npz').open('ab') as file: file.write(b'0')
    with pytest.raises(BundleError, match='changed_file'): load_bundle(tmp_path/'bundle')

def test_settings_and_small_classes(iris, tmp_path):
    with pytest.raises(ConfigError, match='target'): TableConfig('iris.csv')
    few = iris[(iris['kind']!='virginica') | (iris.index > 146)]
    few.to_csv(tmp_path/'few.csv', index=False)
    run = TableRun(tmp_path/'few.csv', target='kind', group='pot', output_dir=str(tmp_path/'out'))
    run.inspect()
    with pytest.raises(SplitError, match='class_too_small'): run.split()
    run = TableRun(run.config, min_groups=5)
    run.inspect()
    assert set(run.manifest['label'])=={'setosa', 'versicolor'} and len(run.split())==2

@pytest.mark.parametrize('load,least', [(load_wine, .88), (load_breast_cancer, .88)])
def test_known_tables_with_gaps(load, least, tmp_path):
    holes(load).to_csv(tmp_path/'data.csv', index=False)
    figures = TableRun(tmp_path/'data.csv', target='kind', output_dir=str(tmp_path/'out'), quick=True,
                       jobs=1).run()['figures']
    assert figures['balanced_accuracy']['value'] > least
