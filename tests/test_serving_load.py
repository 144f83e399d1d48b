"The service and its store together: processes are killed, databases go away, and every answer is stored once"
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from PIL import Image

for name in ('sqlalchemy', 'alembic'):
    pytest.importorskip(name, reason=f"{name} is not installed; pip install 'amulet_hybrid[store]'")

import sqlalchemy as sa  # noqa: E402
from test_store import door, ids_in, schema  # noqa: E402, F401

from amulet_hybrid.store.database import Database, metadata  # noqa: E402
from amulet_hybrid.store.journal import journal_status  # noqa: E402
from amulet_hybrid.store.predictions import PredictionLog  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SERVER = '''
import sys
from amulet_hybrid.data.images import read_image
from amulet_hybrid.model.prediction import Prediction
from amulet_hybrid.serve.app import create_app, serve
from amulet_hybrid.serve.settings import Settings
from amulet_hybrid.store.predictions import PredictionLog

class Bright:
    classes,model_version = ['clay', 'gold'],'bright-1'
    def classify(self, photo, confidence_threshold=None):
        gold = float(read_image(photo).mean()/255)
        return Prediction('gold', 'gold', gold, {'clay': 1-gold, 'gold': gold})

settings = Settings(port=int(sys.argv[1]), answer_cache='off', grace_seconds=60)
serve(create_app(Bright(), settings, None, PredictionLog(sys.argv[2], sys.argv[3])), settings)
'''
SECONDS = 60 # After which what should happen is taken not to happen, however busy the machine is

def wait(check):
    "Wait for something to become true"
    end = time.monotonic()+SECONDS
    while not check():
        assert time.monotonic() < end
        time.sleep(.02)

class Answered:
    "Ids of answers, as they come"
    def __init__(self): self.ids,self._more = [],threading.Condition()

    def add(self, prediction_id):
        with self._more: self.ids.append(prediction_id); self._more.notify_all()

    def wait_for(self, n):
        with self._more: assert self._more.wait_for(lambda: len(self.ids) >= n, 2*SECONDS), f'{len(self.ids)} answers'

def photo(level):
    out = io.BytesIO()
    Image.new('L', (32, 32), level).save(out, 'PNG')
    return out.getvalue()

class Service:
    "A server that can be killed and started again"
    def __init__(self, url, folder):
        with socket.create_server(('127.0.0.1', 0)) as free: self.port = free.getsockname()[1]
        self.url,self.words = f'http://127.0.0.1:{self.port}',[str(self.port), url, str(folder/'journal')]

    def start(self):
        quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, '-c', SERVER, *self.words], cwd=ROOT,
                                        env={**os.environ, 'PYTHONPATH': str(ROOT)}, **quiet)
        def is_ready():
            assert self.process.poll() is None, 'the service did not start'
            with suppress(httpx.TransportError):
                return httpx.get(f'{self.url}/health/ready', timeout=SECONDS).status_code==200
        wait(is_ready)
        return self

    def kill(self): self.process.kill(); self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired): return self.process.wait(2*SECONDS)
        self.kill()

@contextmanager
def asking(service, clients=4):
    "Clients that ask as long as the block lasts; ids of what they were answered"
    told,over = Answered(),threading.Event()
    def client(number):
        with httpx.Client(timeout=SECONDS) as http:
            n = 0
            while not over.is_set():
                n += 1
                try: answer = http.post(f'{service.url}/predict/file', files={'files': photo((37*number+n)%256)})
                except httpx.TransportError: over.wait(.02); continue
                if answer.status_code==200: told.add(answer.json()['prediction_id'])
    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for t in threads: t.start()
    try: yield told
    finally:
        over.set()
        for t in threads: t.join()

def test_killed_under_load(tmp_path):
    url = f'sqlite:///{tmp_path}/amulet.db'
    service = Service(url, tmp_path).start()
    try:
        with asking(service) as told:
            for _ in range(2):
                told.wait_for(len(told.ids)+25)
                service.kill(); service.start()
    finally: service.kill()
    with PredictionLog(url, tmp_path/'journal') as kept: assert kept.flush(SECONDS)
    found = ids_in(url)
    assert len(told.ids) >= 50 and set(told.ids) <= set(found) and len(found)==len(set(found))
    assert not (tmp_path/'journal'/'rejected.jsonl').exists()

def test_stopped_under_load(tmp_path):
    "A stop that is asked for leaves nothing behind"
    url = f'sqlite:///{tmp_path}/amulet.db'
    service = Service(url, tmp_path).start()
    with asking(service) as told:
        told.wait_for(51)
        service.stop()
    assert set(told.ids) <= set(ids_in(url)) and journal_status(tmp_path/'journal')['rows']==0

def test_database_away_under_load(schema, door, tmp_path): # noqa: F811
    url = door.url(schema)
    service = Service(url, tmp_path).start() # it is away from the start
    def records(): return httpx.get(f'{service.url}/health', timeout=SECONDS).json()['records']
    try:
        with asking(service) as told:
            told.wait_for(51)
            assert records()['database']=='down' and records()['journaled'] > 0
            assert httpx.post(f'{service.url}/feedback',
                              json={'prediction_id': told.ids[0], 'true_label': 'clay'}).status_code==200
            door.open()
            wait(lambda: records()['database']=='up')
            door.shut()
            told.wait_for(len(told.ids)+51)
            door.open()
        wait(lambda: records()['journaled']==0)
    finally: service.stop()
    found = ids_in(schema)
    assert set(told.ids)==set(found) and len(found)==len(set(found))
    assert len(ids_in(schema, 'feedback', 'feedback_id'))==1

def test_feedback_after_a_restart(tmp_path):
    "The truth is told to another process than the one that answered"
    url = f'sqlite:///{tmp_path}/amulet.db'
    service = Service(url, tmp_path).start()
    try:
        key = httpx.post(f'{service.url}/predict/file', files={'files': photo(200)},
                         timeout=SECONDS).json()['prediction_id']
        service.kill(); service.start()
        told = httpx.post(f'{service.url}/feedback',
                          json={'prediction_id': key, 'true_label': 'clay', 'comment': 'seen by hand'}, timeout=SECONDS)
        assert (told.status_code, told.json()['right'])==(200, False)
        assert httpx.post(f'{service.url}/feedback',
                          json={'prediction_id': '0'*32, 'true_label': 'clay'}, timeout=SECONDS).status_code==404
    finally: service.stop()
    with closing(Database(url)) as database, database.read() as db:
        row = db.execute(sa.select(metadata().tables['feedback'])).mappings().one()
    assert (row['prediction_id'], row['true_label'])==(key, 'clay')
