"What is acknowledged is kept: a full disk, the size limit of the journal, feedback that counts once"
import errno
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

import pytest

for name in ('sqlalchemy', 'alembic', 'fastapi', 'httpx', 'pydantic_settings', 'prometheus_client'):
    pytest.importorskip(name, reason=f"{name} is not installed; pip install 'amulet_hybrid[serve,store]'")

import sqlalchemy as sa  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402
from test_serving import SECONDS, get, photo, post, running, until  # noqa: E402
from test_store import ANSWER, schema, url  # noqa: E402, F401

from amulet_hybrid.core import ConfigError, StoreError  # noqa: E402
from amulet_hybrid.data.images import read_image  # noqa: E402
from amulet_hybrid.model.prediction import Prediction  # noqa: E402
from amulet_hybrid.serve.app import create_app  # noqa: E402
from amulet_hybrid.serve.settings import Settings, load_settings  # noqa: E402
from amulet_hybrid.store.database import Database, feedback_key, metadata  # noqa: E402
from amulet_hybrid.store.journal import Journal  # noqa: E402
from amulet_hybrid.store.predictions import PredictionLog  # noqa: E402
from amulet_hybrid.store.segments import JournalRecord, read_segment  # noqa: E402

HOME = 'http://127.0.0.1'
DOWN = 'postgresql://ann:hush@127.0.0.1:1/db' # nobody is there

class Bright:
    "Names a photo by its brightness"
    classes,model_version = ('clay', 'gold'),'bright-1'
    def classify(self, photo, confidence_threshold=None):
        gold = float(read_image(photo).mean()/255)
        return Prediction('gold' if gold > .7 else None, 'gold', gold, {'clay': 1-gold, 'gold': gold})

@contextmanager
def full_disk(what='write'):
    "A disk without room, for what the journal does with `os.write` or `os.fsync`"
    error = OSError(errno.ENOSPC, 'No space left on device')
    with mock.patch.object(os, what, side_effect=error), mock.patch.object(os, 'pwrite', side_effect=error): yield

@contextmanager
def service(database, folder, **settings):
    "A client of an app that records, and its log"
    with PredictionLog(database, folder/'journal', interval=.01, patience=.1,
                       durability=settings.get('durability', 'second')) as log:
        log.keeper.stop() # the tests ask for themselves
        with TestClient(create_app(Bright(), Settings(workers=2, **settings), recorder=log), HOME) as client:
            client.log = log
            yield client

def ask(client, grey=230): return client.post('/predict/file', files={'files': photo(grey)})

def say(client, prediction_id, label='gold', **more):
    return client.post('/feedback', json={'prediction_id': prediction_id, 'true_label': label, **more})

def rows(database, table='predictions'):
    with Database(database).read() as db:
        return [dict(row) for row in db.execute(sa.select(metadata().tables[table])).mappings()]

# A disk that is full

def test_full_disk_is_told(url, tmp_path): # noqa: F811
    "Predictions are given and say that they are not on record; feedback is refused; room again, all is as before"
    with service(url, tmp_path) as client:
        kept = [ask(client).json()]
        with full_disk():
            lost = ask(client)
            assert lost.status_code==200 and lost.json()['recorded'] is False and lost.json()['predicted_class']=='gold'
            refused = say(client, kept[0]['prediction_id'])
            assert refused.status_code==507 and refused.json()['error_code']=='journal_full'
            assert refused.headers['retry-after'] and 'feedback_id' not in refused.json()
            # the answer that nobody wrote down has nothing that feedback could be about
            assert say(client, lost.json()['prediction_id']).json()['error_code']=='unknown_prediction'
            client.log.journal.check()
            health,ready = client.get('/health').json(),client.get('/health/ready')
            assert health['status']=='degraded' and health['records']['journal']=='down'
            assert ready.status_code==200 and ready.json()=={'status': 'ready', 'records': 'failing'}
            shown = client.get('/metrics').text
            assert 'record_failures_total 2.0' in shown and 'records_failing 1.0' in shown
        client.log.journal.check()
        assert client.get('/health').json()['status']=='ok'
        assert client.get('/health/ready').json()['records']=='ok'
        kept.append(ask(client).json())
        said = say(client, kept[0]['prediction_id']).json()
        assert all(k['recorded'] for k in kept) and said['recorded']
        assert client.log.flush(30)
    assert {r['prediction_id'] for r in rows(url)}=={k['prediction_id'] for k in kept}
    assert [r['feedback_id'] for r in rows(url, 'feedback')]==[said['feedback_id']]

def test_full_disk_where_records_are_required(tmp_path):
    with service(f'{tmp_path}/amulet.db', tmp_path, record='required') as client:
        assert ask(client).json()['recorded'] and client.get('/health/ready').status_code==200
        with full_disk():
            for refused in (ask(client), ask(client, 99), client.get('/health/ready')): # a cached answer is one, too
                assert (refused.status_code, refused.json()['error_code'])==(507, 'journal_full')
            batch = client.post('/predict-batch', files=[('files', photo(9)), ('files', photo(230))]).json()
            assert [r['error_code'] for r in batch['results']]==['journal_full']*2 and not batch['answered']
            assert client.get('/health/live').status_code==200
        client.log.journal.check()
        assert client.get('/health/ready').status_code==200 and ask(client).json()['recorded']
        assert client.log.flush(30)
    assert len(rows(f'{tmp_path}/amulet.db'))==2

def test_a_log_that_is_closed_keeps_nothing(tmp_path):
    with service(f'{tmp_path}/amulet.db', tmp_path) as client:
        told = ask(client).json()
        client.log.close()
        refused = say(client, told['prediction_id'])
        assert (refused.status_code, refused.json()['error_code'])==(503, 'not_recorded')
        assert ask(client).json()['recorded'] is False

def test_recording_that_is_off_is_told():
    client = TestClient(create_app(Bright(), Settings(workers=1)), HOME)
    told = ask(client).json()
    said = say(client, told['prediction_id']).json()
    assert told['recorded'] is False and said['recorded'] is False and said['right'] is True
    assert client.get('/health/ready').json()['records']=='off'
    with pytest.raises(ConfigError, match='required'): load_settings(record='required', database_url='off')

LIMITED = '''
import resource, sys
from test_records import Bright
from amulet_hybrid.serve.app import _recorder
from amulet_hybrid.serve.app import create_app, serve
from amulet_hybrid.serve.settings import load_settings
if int(sys.argv[1]): resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
settings = load_settings()
serve(create_app(Bright(), settings, recorder=_recorder(settings)))
'''

@pytest.mark.parametrize('disk,journal', [(20_000, 2**30), (0, 20_000)])
def test_a_process_without_room_loses_nothing_that_it_acknowledged(disk, journal, tmp_path):
    "Files may be no longer, or no more may wait: what was acknowledged is in the database after a kill -9, once"
    command = [sys.executable, '-c', LIMITED, str(disk)]
    env = {'PYTHONPATH': f'{os.getcwd()}:{os.path.dirname(__file__)}', 'AMULET_JOURNAL_DIR': tmp_path/'journal'}
    with running(command, tmp_path/'log', **env, AMULET_DATABASE_URL=DOWN, AMULET_JOURNAL_MAX_BYTES=journal,
                 AMULET_RECORD='required') as process:
        answers = [post(f'{process.url}/predict/file', files={'files': photo()}) for _ in range(60)]
        kept = [a.json()['prediction_id'] for a in answers if a.status_code==200]
        codes = {a.json()['error_code'] for a in answers if a.status_code!=200}
        assert 10 < len(kept) < 60 and codes=={'journal_full'} and {a.status_code for a in answers}=={200, 507}
        if journal==20_000: # which stays full
            assert get(f'{process.url}/health/ready').status_code==507
            refused = post(f'{process.url}/feedback', json={'prediction_id': kept[0], 'true_label': 'gold'})
            assert refused.status_code==507
    with PredictionLog(f'{tmp_path}/amulet.db', tmp_path/'journal') as log: assert log.flush(SECONDS)
    found = [r['prediction_id'] for r in rows(f'{tmp_path}/amulet.db')]
    assert set(kept) <= set(found) and len(found)==len(set(found))

def test_what_cannot_be_set_aside_stays(tmp_path):
    "A record that no database takes is not thrown away because the disk has no room for it in `rejected.jsonl`"
    with PredictionLog(f'{tmp_path}/amulet.db', tmp_path/'journal', interval=.01, patience=.1) as log:
        full = StoreError('cannot be written to', code='journal_full')
        with mock.patch.object(log.journal.rejected, 'add', side_effect=full) as add:
            log.record('prediction', {**ANSWER, 'confidence': 'high'})
            assert log.upload.wait_for(lambda: add.call_count > 1, SECONDS)
            assert log.stats()['journaled']==1
        assert log.flush(SECONDS) and log.stats()['rejected']==1
    assert 'high' in (tmp_path/'journal'/'rejected.jsonl').read_text()

# When the disk has it

def synced_files():
    "Patched `os.fsync`, and the inodes that it was called for"
    seen = set()
    def fsync(file): seen.add(os.fstat(file).st_ino)
    return mock.patch.object(os, 'fsync', side_effect=fsync),seen

@pytest.mark.parametrize('durability', ['second', 'full'])
def test_closed_segments_are_synced_too(durability, tmp_path):
    patched,seen = synced_files()
    with patched:
        journal = Journal(tmp_path, segment_bytes=50, durability=durability)
        for n in range(7): journal.append({'text': 'x'*20, 'n': n})
        if durability=='second': journal.sync()
        there = [*tmp_path.glob('pid-*/*.jsonl'), *tmp_path.glob('pid-*')]
        assert len(there) > 3 and {p.stat().st_ino for p in there} <= seen
        journal.close()

def test_full_durability_answers_after_the_disk(tmp_path):
    "Each answer, cached ones too, waits in a thread of its own; one that the disk did not take is not acknowledged"
    loop,threads,real = [],[],os.fsync
    def fsync(file): threads.append(threading.get_ident()); real(file)
    with service(f'{tmp_path}/amulet.db', tmp_path, durability='full') as client:
        client.portal.call(lambda: loop.append(threading.get_ident()))
        with mock.patch.object(os, 'fsync', side_effect=fsync):
            for cached in (False, True):
                threads.clear()
                told = ask(client).json()
                assert told['recorded'] and told['cached']==cached and threads and loop[0] not in threads
        with full_disk('fsync'):
            assert ask(client).json()['recorded'] is False
            assert say(client, told['prediction_id']).json()['error_code']=='journal_full'
        assert say(client, told['prediction_id']).json()['recorded']

def test_a_failed_sync_fails_for_all_who_waited(tmp_path):
    journal = Journal(tmp_path, durability='full')
    gate,calls,real = threading.Event(),[],os.fsync
    def fsync(file):
        calls.append(file)
        if len(calls) > 1: return real(file)
        assert gate.wait(SECONDS)
        raise OSError(errno.EIO, 'Input/output error')
    def append(n):
        try: journal.append({'n': n}); return True
        except StoreError as error: return error.code
    with mock.patch.object(os, 'fsync', side_effect=fsync), ThreadPoolExecutor(4) as pool:
        first = pool.submit(append, 0)
        until(lambda: calls, 'the first sync')
        more = [pool.submit(append, n) for n in range(1, 4)]
        until(lambda: journal.rows==4, 'the other rows')
        gate.set()
        assert first.result(SECONDS)=='bad_journal' and [m.result(SECONDS) for m in more]==[True]*3
    journal.close()

# Feedback counts once a prediction

def test_feedback_counts_once(url, tmp_path): # noqa: F811
    "Sent again, nothing changes; corrected, it is replaced: in the database, the answer and the metrics"
    with service(url, tmp_path) as client:
        told = ask(client).json()['prediction_id']
        said = [say(client, told, label, comment=label).json() for label in ('clay', 'clay', 'gold')]
        assert {s['feedback_id'] for s in said}=={feedback_key(told)}
        assert [s['right'] for s in said]==[False, False, True]
        shown = client.get('/metrics').text
        assert 'feedback_accuracy 1.0' in shown and 'feedback_total{verdict="wrong"} 1.0' in shown
        assert 'verdict="right"' not in shown and client.log.flush(30)
    found = [(r['prediction_id'], r['true_label'], r['comment']) for r in rows(url, 'feedback')]
    assert found==[(told, 'gold', 'gold')]

def test_feedback_of_many_at_once(url, tmp_path): # noqa: F811
    "Two processes' worth of apps over one database: what was said last is what is there, once"
    with service(url, tmp_path/'a') as one, service(url, tmp_path/'b') as other:
        told = [ask(one, 200+n).json()['prediction_id'] for n in range(3)]
        assert one.log.flush(30)
        def send(n): return say((one, other)[n%2], told[n%3], 'clay' if n < 30 else 'gold').json()
        with ThreadPoolExecutor(4) as pool: early = list(pool.map(send, range(30)))
        last = [send(n) for n in range(30, 36)]
        assert all(s['recorded'] for s in early+last) and one.log.flush(30) and other.log.flush(30)
    found = {r['prediction_id']: r['true_label'] for r in rows(url, 'feedback')}
    assert found==dict.fromkeys(told, 'gold') and len(rows(url, 'feedback'))==3

def test_a_torn_row_does_not_spoil_the_next(tmp_path):
    "A disk that takes half a line, and does not let it be cut off: the next row has a segment of its own"
    journal,real = Journal(tmp_path),os.write
    journal.append({'n': 0})
    with (mock.patch.object(os, 'write', side_effect=lambda file, line: real(file, line[:9])),
          mock.patch.object(os, 'ftruncate', side_effect=OSError(errno.EIO, 'Input/output error')),
          pytest.raises(StoreError)):
        journal.append({'n': 1})
    journal.append({'n': 2})
    found = [line for path in sorted(tmp_path.glob('pid-*/*.jsonl')) for line in read_segment(path)]
    assert [line.record for line in found if line.record]==[{'n': 0}, {'n': 2}] and isinstance(found[1], JournalRecord)
    journal.close()
