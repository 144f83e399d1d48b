"The store on both databases: nothing that was recorded is lost, and nothing is there twice"
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

for name in ('sqlalchemy', 'alembic'):
    pytest.importorskip(name, reason=f"{name} is not installed; pip install 'amulet_hybrid[store]'")

import sqlalchemy as sa  # noqa: E402

from amulet_hybrid.core import StoreError  # noqa: E402
from amulet_hybrid.store.database import (  # noqa: E402
    HEAD,
    Database,
    feedback_key,
    metadata,
    migrate,
    open_database,
    revision,
    shape_row,
)
from amulet_hybrid.store.datasets import export_table, get_training_data, load_csv_to_db  # noqa: E402
from amulet_hybrid.store.journal import Journal, journal_status  # noqa: E402
from amulet_hybrid.store.predictions import PredictionLog, prune, save_prediction, store_status  # noqa: E402
from amulet_hybrid.store.segments import pack_line, read_segment  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
POSTGRES = os.environ.get('AMULET_TEST_POSTGRES', 'postgresql://postgres@127.0.0.1:5432/test')
ANSWER = {'label': 'gold', 'top': 'gold', 'confidence': .93, 'probabilities': {'gold': .93, 'clay': .07},
          'prediction_set': ['gold', 'clay'], 'coverage': .9,
          'novelty': .2, 'reason': '', 'route': 'neural', 'duration_ms': 4.5, 'cached': False,
          'model_version': 'bright-1',
          'endpoint': '/predict', 'request_id': 'r', 'api_key': '', 'sha256': 'ab'*32}

def postgres():
    "An engine on the server of the tests, or a skip that says how to get one"
    pytest.importorskip('psycopg', reason="psycopg is not installed; pip install 'amulet_hybrid[postgres]'")
    engine = sa.create_engine(POSTGRES.replace('postgresql://', 'postgresql+psycopg://'),
                              connect_args={'connect_timeout': 3}, isolation_level='AUTOCOMMIT')
    try: engine.connect().close()
    except sa.exc.OperationalError:
        pytest.skip('no PostgreSQL at AMULET_TEST_POSTGRES (default: database test at 127.0.0.1:5432); '
                    'try: initdb -D /tmp/pg && pg_ctl -D /tmp/pg -o "-p 5433 -k /tmp" start, '
                    'then AMULET_TEST_POSTGRES=postgresql://127.0.0.1:5433/postgres pytest tests/test_store.py')
    return engine

@pytest.fixture
def schema():
    "Address of a schema of our own on PostgreSQL, gone afterwards"
    engine,name = postgres(),f'amulet_{uuid.uuid4().hex[:12]}'
    with engine.connect() as db: db.exec_driver_sql(f'CREATE SCHEMA {name}')
    yield f'{POSTGRES}{"&" if "?" in POSTGRES else "?"}options=-csearch_path%3D{name}'
    with engine.connect() as db: db.exec_driver_sql(f'DROP SCHEMA {name} CASCADE')
    engine.dispose()

@pytest.fixture(params=['sqlite', 'postgresql'])
def url(request, tmp_path):
    "Address of an empty database of each kind"
    return f'sqlite:///{tmp_path}/amulet.db' if request.param=='sqlite' else request.getfixturevalue('schema')

class Door:
    "A port before PostgreSQL that can be shut, as when a server goes down"
    def __init__(self):
        with socket.socket() as free: free.bind(('127.0.0.1', 0)); self.port = free.getsockname()[1]
        self.server,self.ends = None,[]

    def open(self):
        self.server = socket.create_server(('127.0.0.1', self.port), reuse_port=True)
        threading.Thread(target=self._accept, args=(self.server,), daemon=True).start()

    def _accept(self, server):
        with suppress(OSError):
            while True:
                near,_ = server.accept()
                url = sa.engine.make_url(POSTGRES)
                far = socket.create_connection((url.host or '127.0.0.1', url.port or 5432))
                self.ends += [near, far]
                for a,b in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(a, b), daemon=True).start()

    def _carry(self, a, b):
        with suppress(OSError):
            while data := a.recv(65536): b.sendall(data)
        for end in (a, b):
            with suppress(OSError): end.shutdown(socket.SHUT_RDWR)

    def shut(self):
        if self.server:
            # a thread that waits in `accept` would take one more
            with suppress(OSError): self.server.shutdown(socket.SHUT_RDWR)
            self.server.close()
        for end in self.ends:
            with suppress(OSError): end.shutdown(socket.SHUT_RDWR)
        for end in self.ends: end.close()
        self.ends = []

    def url(self, schema):
        return sa.engine.make_url(schema).set(host='127.0.0.1', port=self.port).render_as_string(hide_password=False)

@pytest.fixture
def door():
    door = Door()
    yield door
    door.shut()

def ids_in(url, table='predictions', key='prediction_id'):
    with closing(Database(url)) as database, database.read() as db:
        return [r[0] for r in db.execute(sa.select(metadata().tables[table].c[key]))]

def failed(kept, times=1):
    "Wait until the database was asked in vain"
    assert kept.upload.wait_for(lambda: kept.upload.backoff.failures >= times, 30)

def child(program, *words, **more):
    return subprocess.Popen([sys.executable, '-c', program, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **more)

# Tables

def test_tables_go_up_and_down(url):
    with closing(Database(url)) as database:
        assert revision(database)==''
        assert migrate(database)==('', HEAD) and migrate(database)==(HEAD, HEAD)
        save_prediction(ANSWER, database)
        assert migrate(database, 'base')==(HEAD, '') and revision(database)==''
        with database.read() as db: assert set(sa.inspect(db).get_table_names()) <= {'alembic_version'}
        assert migrate(database)==('', HEAD)

def test_the_steps_lead_to_the_tables_of_the_code(url):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    with closing(open_database(url)) as database, database.read() as db:
        assert compare_metadata(MigrationContext.configure(db, opts={'compare_type': True}), metadata())==[]
    assert ScriptDirectory(ROOT/'amulet_hybrid'/'store'/'migrations').get_heads()==[HEAD]

def test_a_failed_step_changes_nothing(url):
    with closing(Database(url)) as database:
        # in the way of the last table
        with database.write() as db: db.exec_driver_sql('CREATE TABLE feedback (x INTEGER)')
        with pytest.raises(StoreError, match='feedback'): migrate(database)
        with database.read() as db: assert set(sa.inspect(db).get_table_names()) <= {'feedback', 'alembic_version'}
        assert revision(database)==''

def test_tables_of_a_newer_version(url, tmp_path, caplog):
    "Plain calls stop, a service that is rolled back goes on"
    with closing(open_database(url)) as database, database.write() as db:
        db.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError) as caught: save_prediction(ANSWER, url)
    assert caught.value.code=='database_too_new'
    with PredictionLog(url, tmp_path/'journal') as kept: kept.record('prediction', ANSWER); assert kept.flush()
    assert len(ids_in(url))==1 and '9999' in caplog.text

PROGRAM = ('import sys\nfrom amulet_hybrid.store.predictions import save_prediction\nprint(save_prediction({"label": '
           'sys.argv[2]}, sys.argv[1]))')

def test_all_who_start_together_find_the_tables(url):
    started = [child(PROGRAM, url, i) for i in range(2)]
    told = [p.communicate(timeout=60) for p in started]
    assert [p.returncode for p in started]==[0]*2, told
    assert sorted(out.strip() for out,_ in told)==sorted(ids_in(url))

# Plain calls

def test_rows_come_back_as_they_were(url):
    when = datetime(2026, 1, 31, 12, tzinfo=UTC)
    key = save_prediction({**ANSWER, 'created_at': when, 'reason': 'zero \0, half \ud800, 😀'}, url)
    with closing(Database(url)) as database, database.read() as db:
        row = dict(db.execute(metadata().tables['predictions'].select()).mappings().one())
    assert row=={**ANSWER, 'features': None, 'prediction_id': key, 'created_at': when,
                 'reason': 'zero \ufffd, half \ufffd, 😀'}

@pytest.mark.parametrize('row', [{'colour': 1}, {'confidence': 'high'}, {'created_at': 'soon'},
                                 {'probabilities': 'gold'}, {'cached': 'maybe'}, {'label': object()},
                                 {'label': ['gold']}])
def test_bad_rows_are_refused(tmp_path, row):
    with pytest.raises(StoreError) as caught: save_prediction({**ANSWER, **row}, f'{tmp_path}/a.db')
    assert caught.value.code=='bad_row'

def test_datasets_have_versions(url, tmp_path):
    table = pd.DataFrame({'a': [1., 2.5, None], 'word': ['x', None, 'ü'], 'n': [1, 2, 3], 'flag': [True, False, True],
                          'kind': ['p', 'q', 'p'], 'pot': ['1', '1', '2']})
    table.to_csv(tmp_path/'t.csv', index=False)
    first = load_csv_to_db(tmp_path/'t.csv', 'pots', url, target='kind', group='pot')
    assert (first.version, first.rows, first.kind, first.new)==(1, 3, 'table', True)
    same,other = (load_csv_to_db(t, 'pots', url, target='kind', group='pot')
                  for t in (tmp_path/'t.csv', table.iloc[:2]))
    assert (same.version, same.new, same.dataset_id)==(1, False, first.dataset_id) and (other.version, other.new)==(2,
            True)
    back = get_training_data('pots', 1, url)
    pd.testing.assert_frame_equal(back, table, check_dtype=False)
    assert len(get_training_data('pots', database=url))==2
    for ask,says in ((('pot',), 'There are: pots'), (('pots', 7), 'versions 1, 2')):
        with pytest.raises(StoreError, match=says): get_training_data(*ask, database=url)
    with pytest.raises(StoreError, match='no column'): load_csv_to_db(table, 'pots', url, target='sort')

def test_photos_are_known_by_digest(url):
    photos = pd.DataFrame({'path': ['a/1.jpg', 'b/2.jpg'], 'label': ['a', 'b'], 'sha256': ['0'*64, '1'*64],
                           'width': [3, 4]})
    assert load_csv_to_db(photos, 'photos', url).kind=='photos'
    pd.testing.assert_frame_equal(get_training_data('photos', database=url), photos, check_dtype=False)

def test_two_imports_at_once_are_two_versions(url):
    def keep(x): return load_csv_to_db(pd.DataFrame({'x': [x], 'label': ['a']}), 'd', url).version
    with ThreadPoolExecutor(6) as pool: assert set(pool.map(keep, [1, 2, 2, 3, 3, 3]))=={1, 2, 3}

@pytest.mark.parametrize('ending', ['csv', 'jsonl', 'parquet'])
def test_export(url, tmp_path, ending):
    start = datetime(2026, 1, 1, tzinfo=UTC)
    with closing(open_database(url)) as database:
        label = ('gold,"x"\n', None)
        rows = [shape_row('predictions', {**ANSWER, 'prediction_id': f'{i:05d}', 'created_at': start
                                          +timedelta(hours=i), 'label': label[i%2]}) for i in range(2345)]
        database.insert('predictions', rows)
        assert export_table(tmp_path/f'all.{ending}', database=database)==2345
        assert export_table(tmp_path/f'late.{ending}', since='2026-01-02T00:00:00', database=database)==2345-24
        assert export_table(tmp_path/f'none.{ending}', 'feedback', database=database)==0
    text = {'dtype': {'prediction_id': str}}
    read = {'csv': lambda p: pd.read_csv(p, **text), 'jsonl': lambda p: pd.read_json(p, lines=True,
            **text), 'parquet': pd.read_parquet}[ending]
    table = read(tmp_path/f'all.{ending}')
    assert list(table['prediction_id'])==[r['prediction_id'] for r in rows] and list(table.columns)==list(rows[0])
    assert list(pd.to_datetime(table['created_at'], format='ISO8601'))==[r['created_at'] for r in rows]
    assert table['label'].isna().sum()==1172 and table['label'][0]=='gold,"x"\n'
    told = table['probabilities'][0]
    assert (json.loads(told) if isinstance(told, str) else told)==ANSWER['probabilities']
    assert {p.name for p in tmp_path.iterdir() if p.suffix==f'.{ending}'}=={f'{n}.{ending}'
            for n in ('all', 'late', 'none')}

def test_refusals_of_export(tmp_path):
    wrong = {'bad_format': ('a.xls',), 'no_such_table': ('a.csv', 'users'),
             'bad_setting': ('a.csv', 'training_data', '2026-01-01'), 'bad_row': ('a.csv', 'predictions', 'soon')}
    for code,words in wrong.items():
        with pytest.raises(StoreError) as caught:
            export_table(tmp_path/words[0], *words[1:], database=f'{tmp_path}/a.db')
        assert caught.value.code==code
    assert not list(tmp_path.glob('*.csv'))

def test_retention(url):
    now = datetime.now(UTC)
    with closing(open_database(url)) as database:
        ages = [0]*10+[100]*4500
        database.insert('predictions',
                        [shape_row('predictions', {'prediction_id': str(i), 'created_at': now-timedelta(days=d)})
                         for i,d in enumerate(ages)])
        database.insert('feedback', [shape_row('feedback',
                                               {'feedback_id': str(d), 'prediction_id': '1', 'true_label': 'x',
                                                'created_at': now-timedelta(days=d)}) for d in (1, 99)])
        load_csv_to_db(pd.DataFrame({'x': [1], 'label': ['a']}), 'd', database)
        assert prune(90, database)=={'predictions': 4500, 'feedback': 1}
        assert prune(90, database)=={'predictions': 0, 'feedback': 0}
        assert store_status(database)['tables']=={'datasets': 1, 'training_data': 1, 'predictions': 10, 'feedback': 1}

# The log

def test_rows_of_both_kinds(url, tmp_path):
    with PredictionLog(url, tmp_path/'journal') as kept:
        kept.record('prediction', {**ANSWER, 'prediction_id': 'p1'})
        kept.record('feedback', {'prediction_id': 'p1', 'true_label': 'clay', 'comment': '\0'})
        assert kept.find('p1')['label']=='gold' # journaled or written
        assert kept.flush()
        assert (kept.find('p1')['probabilities']==ANSWER['probabilities'] and kept.find('f1') is None
                and kept.find('"') is None)
        for bad in ({'colour': 1}, {'label': object()}):
            with pytest.raises(StoreError, match='bad_row'): kept.record('prediction', bad)
        with pytest.raises(StoreError, match='bad_row'): kept.record('query', {})
        assert {k: kept.stats()[k] for k in ('journaled', 'written', 'rejected', 'database')}=={'journaled': 0,
                'written': 2, 'rejected': 0, 'database': 'up'}
    with pytest.raises(StoreError, match='closed'): kept.record('prediction', ANSWER)
    assert ids_in(url)==['p1'] and ids_in(url, 'feedback', 'feedback_id')==[feedback_key('p1')]
    assert list((tmp_path/'journal').iterdir())==[]

def test_recording_waits_for_nobody(schema, door, tmp_path):
    "A database that takes connections and never answers: rows are kept meanwhile, one `write` each"
    with socket.create_server(('127.0.0.1', door.port)) as silent:
        silent.listen(5)
        kept = PredictionLog(door.url(schema), tmp_path/'journal', patience=.1)
        for _ in range(3000): kept.record('prediction', ANSWER)
        assert kept.stats()['journaled']==3000 and kept.stats()['written']==0
        kept.close(.1)
    door.open()
    with PredictionLog(door.url(schema), tmp_path/'journal') as kept: assert kept.flush(30)
    assert len(ids_in(schema))==3000

RECORDER = '''
import sys
from amulet_hybrid.store.predictions import PredictionLog
kept,i = PredictionLog(sys.argv[1], sys.argv[2], interval=.02),0
while len(sys.argv) < 5 or i < int(sys.argv[4]):
    key = f'{sys.argv[3]}-{i:06d}'
    kept.record('prediction', {'prediction_id': key, 'label': 'gold', 'probabilities': {'gold': 1.}})
    sys.stdout.write(key+'\\n')
    sys.stdout.flush()
    i += 1
kept.close(20)
'''

def test_kill_9_loses_nothing(url, tmp_path):
    told,rng = [],random.Random(0)
    for turn in range(3):
        process = child(RECORDER, url, tmp_path/'journal', turn)
        told += [process.stdout.readline().strip() for _ in range(rng.randrange(50, 2000))]
        process.kill()
        told += process.stdout.read().split()
        assert process.wait()==-signal.SIGKILL
    assert journal_status(tmp_path/'journal')['rows'] > 0
    with PredictionLog(url, tmp_path/'journal') as kept: assert kept.flush(30)
    told = [t for t in told if len(t)==8] # the last name may be cut by the kill
    found = ids_in(url)
    assert len(told) > 100 and set(told) <= set(found) and len(found)==len(set(found)) <= len(told)+8
    assert [p.name for p in (tmp_path/'journal').iterdir()]==[]

def test_processes_share_a_journal(url, tmp_path):
    started = [child(RECORDER, url, tmp_path/'journal', i, 400) for i in range(2)]
    for p in started: assert (p.communicate(timeout=60), p.returncode)[1]==0
    assert sorted(ids_in(url))==[f'{p}-{i:06d}' for p in range(2) for i in range(400)]
    assert list((tmp_path/'journal').iterdir())==[]

def test_database_that_comes_later(schema, door, tmp_path, caplog):
    url = door.url(schema)
    with PredictionLog(url, tmp_path/'journal', patience=.3) as kept:
        for i in range(700): kept.record('prediction', {**ANSWER, 'prediction_id': f'{i:04d}'})
        failed(kept)
        assert kept.stats()['database']=='down' and kept.stats()['journaled']==700 and kept.stats()['lag_seconds'] > 0
        assert kept.find('0003')['label']=='gold'
        with pytest.raises(StoreError) as caught: kept.find('nobody')
        assert caught.value.code=='database_down'
        door.open()
        assert kept.flush(15) and kept.stats()['database']=='up' and kept.find('nobody') is None
    assert sorted(ids_in(url))==[f'{i:04d}' for i in range(700)]
    assert caplog.text.count('does not answer')==1 and 'answers again' in caplog.text

def test_connections_cut_while_writing(schema, door, tmp_path):
    "Whether a batch that was under way is there or not, it is there once in the end"
    door.open()
    with PredictionLog(door.url(schema), tmp_path/'journal', batch=50, interval=.01, patience=.1) as kept:
        for i in range(3000):
            kept.record('prediction', {**ANSWER, 'prediction_id': f'{i:04d}'})
            if i%500==250: # some rows of this turn are there, most are not
                assert kept.upload.wait_for(lambda: kept.stats()['written'] > i-240, 30) # noqa: B023
                door.shut()
            if i%500==400:
                failed(kept)
                door.open()
        assert kept.flush(30)
    assert sorted(ids_in(schema))==[f'{i:04d}' for i in range(3000)]

def test_sqlite_file_that_cannot_be_opened(tmp_path):
    (tmp_path/'data').write_text('a file where a folder should be')
    with PredictionLog(f'sqlite:///{tmp_path}/data/amulet.db', tmp_path/'journal', patience=.1) as kept:
        kept.record('prediction', ANSWER)
        failed(kept)
        assert kept.stats()['database']=='down'
        (tmp_path/'data').unlink(); (tmp_path/'data').mkdir()
        assert kept.flush(10)
    assert len(ids_in(f'{tmp_path}/data/amulet.db'))==1

def test_locked_sqlite_waits(tmp_path):
    "Another one holds the file for a while: nobody who records notices"
    with closing(open_database(f'{tmp_path}/amulet.db')) as other, PredictionLog(f'{tmp_path}/amulet.db',
            tmp_path/'journal') as kept:
        with other.write():
            for _ in range(100): kept.record('prediction', ANSWER) # none waits for the lock
            assert kept.stats()['written']==0
        assert kept.flush(30)
    assert len(ids_in(f'{tmp_path}/amulet.db'))==100

def test_rows_that_nobody_takes_are_set_aside(url, tmp_path, caplog):
    home = tmp_path/'journal'/'pid-1-dead'
    home.mkdir(parents=True)
    def line(key, **more):
        return pack_line({'kind': 'prediction', 'id': key,
                          'row': {'prediction_id': key, 'created_at': '2026-01-31T00:00:00+00:00', **more}})
    damaged = line('damaged').replace(b'2026', b'1926')
    nul = line('nul').decode()[9:].replace('"nul"', '"n\\u0000l"').encode()[:-1]
    lines = [line('good'), damaged, line('bad', confidence='high'), line('odd', colour='red'),
             b'%08x %s\n' % (zlib.crc32(nul), nul), line(random.randbytes(9000).hex()),
             pack_line({'kind': 'query', 'row': {}}), pack_line(['no', 'row']), line('last'), line('torn')[:40]]
    (home/'0000000000001-dead-000001.jsonl').write_bytes(b''.join(lines))
    with PredictionLog(url, tmp_path/'journal') as kept:
        kept.record('prediction', {**ANSWER, 'prediction_id': 'new'})
        assert kept.flush()
        rejected = kept.stats()['rejected']
    assert {'good', 'last', 'new'} <= set(ids_in(url))
    if url.startswith('postgresql'): assert sorted(ids_in(url))==['good', 'last', 'new'] and rejected==7
    else: assert rejected==5 # SQLite takes a zero byte, and long keys
    aside = [json.loads(r) for r in (tmp_path/'journal'/'rejected.jsonl').read_text().splitlines()]
    assert len(aside)==rejected==journal_status(tmp_path/'journal')['rejected'] and all(r['reason'] for r in aside)
    assert any('high' in r['reason'] for r in aside) and any('damaged' in r['reason'] for r in aside)
    assert caplog.text.count('was set aside')==rejected and 'was not whole' in caplog.text

def test_full_journal_says_so_and_recovers(schema, door, tmp_path):
    with PredictionLog(door.url(schema), tmp_path/'journal', patience=.2, max_bytes=5*2**20) as kept:
        with pytest.raises(StoreError) as caught:
            for _ in range(20_000): kept.record('prediction', ANSWER)
        size = sum(p.stat().st_size for p in (tmp_path/'journal').rglob('*.jsonl'))
        assert caught.value.code=='journal_full' and 4*2**20 < size <= 5*2**20
        n = kept.stats()['journaled']
        door.open()
        assert kept.flush(30)
        kept.record('prediction', ANSWER)
    assert len(ids_in(schema))==n+1

FULL = '''
import resource, sys
from amulet_hybrid.core import StoreError
from amulet_hybrid.store.journal import Journal
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
journal,n = Journal(sys.argv[1]),0
try:
    while True: journal.append({'text': 'x'*50, 'n': n}); n += 1
except StoreError as error: print(n, error.code)
try: journal.append({'n': 0})
except StoreError as error: print(error.code)
'''

def test_a_disk_that_is_full(tmp_path):
    "The line that it took by half is cut off again"
    quiet = {k: v for k,v in os.environ.items() if not k.startswith('COV')} # what measures coverage writes files too
    process = child(FULL, tmp_path, env=quiet)
    out,err = process.communicate(timeout=30)
    n,code,*_ = out.split()
    assert code=='journal_full' and not err, err
    journal = Journal(tmp_path)
    rows = journal.recover()
    lines = [line.record for line in read_segment(journal.oldest_segment())]
    assert rows >= int(n) and lines[:int(n)]==[{'text': 'x'*50, 'n': i} for i in range(int(n))] and None not in lines

def test_a_fork_is_told(tmp_path):
    journal = Journal(tmp_path)
    if not (pid := os.fork()):
        try: journal.append({}); os._exit(1)
        except StoreError as error: os._exit(0 if error.code=='forked' else 2)
    assert os.waitpid(pid, 0)[1]==0
    journal.close()

def test_close_does_not_wait_for_a_server(tmp_path):
    "One that takes connections and never answers: close returns, hours before the connection would give up"
    pytest.importorskip('psycopg')
    with socket.create_server(('127.0.0.1', 0)) as silent:
        silent.listen(5)
        port = silent.getsockname()[1]
        kept = PredictionLog(f'postgresql://ann:hush@127.0.0.1:{port}/x?connect_timeout=7200', tmp_path/'journal')
        kept.record('prediction', ANSWER)
        kept.close(seconds=.5)
        assert journal_status(tmp_path/'journal')['rows']==1

# Addresses

def test_set_aside_once(schema, door, tmp_path, caplog):
    "Not at each try while the database is away"
    with PredictionLog(door.url(schema), tmp_path/'journal', patience=.05, interval=.01) as kept:
        for label in ('gold', 'clay'):
            kept.record('prediction', {**ANSWER, 'label': label, 'confidence': 'high' if label=='clay' else .5})
        failed(kept, 3)
        assert kept.stats()['rejected']==0
        door.open()
        assert kept.flush(10)
    assert (caplog.text.count('was set aside')==1
            and len((tmp_path/'journal'/'rejected.jsonl').read_text().splitlines())==1 and len(ids_in(schema))==1)

@pytest.mark.parametrize('url', ['mysql://ann:hush@host/db', 'postgresql://ann:hush@127.0.0.1:1/db',
                                 'postgresql://ann:hush@127.0.0.1:1/db?password=hush',
                                 'postgresql://ann:hush@host:port/db'])
def test_no_message_holds_a_password(url, tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(StoreError) as caught: save_prediction(ANSWER, url)
    told = f'{caught.value} {caught.value.to_dict()}'
    with suppress(StoreError):
        kept = PredictionLog(url, tmp_path/'journal')
        kept.record('prediction', ANSWER)
        failed(kept)
        told += f'{kept!r} {kept.stats()}'
        kept.close(.1)
    assert 'hush' not in told+caplog.text+str(capsys.readouterr()) and 'ann' in str(caught.value)

def test_command_line_hides_it_too(tmp_path):
    env = {**os.environ, 'AMULET_DATABASE_URL': 'postgresql://ann:hush@127.0.0.1:1/db'}
    done = subprocess.run([sys.executable, '-c', 'from amulet_hybrid.cli.app import main; main()', 'store', 'status'],
                          cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode==1 and '[database_down]' in done.stderr and 'ann:***@' in done.stderr
            and 'hush' not in done.stderr+done.stdout)

def test_status_makes_nothing(tmp_path):
    assert store_status(f'{tmp_path}/none.db', tmp_path/'journal')['tables']=={} and list(tmp_path.iterdir())==[]
