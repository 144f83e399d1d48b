"""Kill any process of a running service at random, under load, and count what was lost

    python benchmarks/chaos.py                # ten minutes
    python benchmarks/chaos.py --seconds 60 --output benchmarks/results/chaos.csv

Replicas of `amulet serve` over one journal, PostgreSQL and Redis, all started here, on free ports and in a folder of
its own: no server of the machine is touched. Every few seconds one of them, or a process that a replica has started, is
killed with SIGKILL, and started again as systemd or Kubernetes would. Clients ask for predictions meanwhile, send
feedback, and send what has to be refused.

At the end everything that a client was told is looked for in the database:
- nothing that was acknowledged is lost: each prediction that said `recorded`, each feedback that was answered by 200,
- nothing is there twice: one row a request, one feedback a prediction, the one that was sent last,
- 99 of 100 refusals came within 100 ms,
- whatever was killed was back within 10 s.

PostgreSQL refuses to run as root: there it runs as the user `postgres`, or `nobody`.
"""
import argparse
import contextlib
import glob
import http.client
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pandas as pd
from hostile import make_bundle
from PIL import Image

BIN = Path(sys.executable).parent
EDGE = 'amulet-chaos-edge'
REFUSAL_MS, BACK_SECONDS = 100, 10


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as free: return free.getsockname()[1]

def program(name):
    "A program of the machine, also where Debian hides PostgreSQL's"
    found = shutil.which(name) or max(glob.glob(f'/usr/lib/postgresql/*/bin/{name}'), default=None)
    if not found: raise SystemExit(f'{name} is not installed')
    return found


class Server:
    "A process that is started again whenever it ends"
    def __init__(self, name, command, ready, home, env=None, user=None):
        self.name, self.command, self.ready, self.user = name, list(map(str, command)), ready, user
        self.log, self.env, self.starts, self.ended = home/f'{name}.log', {**os.environ, **(env or {})}, 0, False
        self.process = None

    def start(self):
        self.starts += 1
        as_user = {'user': self.user.pw_uid, 'group': self.user.pw_gid, 'extra_groups': []} if self.user else {}
        with self.log.open('ab') as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.env, cwd=self.log.parent,
                                            start_new_session=True, **as_user)

    def supervise(self):
        "Start it again if it ended"
        if not self.ended and self.process.poll() is not None: self.start()

    def children(self):
        "Processes that it has started and that live: one that was killed stays listed until it is looked after"
        found = []
        for path in glob.glob(f'/proc/{self.process.pid}/task/*/children'):
            with contextlib.suppress(OSError): found += map(int, Path(path).read_text().split())
        return [pid for pid in found if self._lives(pid)]

    @staticmethod
    def _lives(pid):
        try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]!='Z'
        except OSError: return False

    def stop(self, seconds=30):
        "Ask it to end, and take care that it does"
        self.ended = True
        if self.process is None or self.process.poll() is not None: return
        self.process.send_signal(signal.SIGINT if self.name=='database' else signal.SIGTERM)
        try: self.process.wait(seconds)
        except subprocess.TimeoutExpired: self.process.kill(); self.process.wait()


def get(port, path, timeout=2):
    "JSON of a replica, {} where it does not answer well"
    try:
        asked = http.client.HTTPConnection('127.0.0.1', port, timeout=timeout)
        asked.request('GET', path)
        answer = asked.getresponse()
        return json.loads(answer.read()) if answer.status==200 else {}
    except (OSError, http.client.HTTPException, ValueError): return {}
    finally: asked.close()

def wait_for(check, seconds, what):
    end = time.monotonic()+seconds
    while not check():
        if time.monotonic() > end: raise SystemExit(f'{what} did not happen within {seconds} s')
        time.sleep(.05)


class System:
    "Replicas, a database and a cache"
    def __init__(self, home, bundle, replicas):
        self.home = home
        self.journal = home/'journal'
        self.database = self._database()
        self.redis = self._redis()
        env = {'AMULET_DATABASE_URL': self.url, 'AMULET_JOURNAL_DIR': str(self.journal), 'AMULET_QUEUE_SIZE': '4',
               'AMULET_ANSWER_CACHE': f'redis://127.0.0.1:{self.redis.port}/0', 'AMULET_CACHE_KEY': uuid.uuid4().hex*2,
               'AMULET_WORKERS': '2', 'AMULET_RECORD': 'required', 'AMULET_LOG_LEVEL': 'warning',
               'AMULET_PROGRESS': 'off'}
        self.replicas = []
        for number in range(replicas):
            port = free_port()
            command = [BIN/'amulet', 'serve', '--model-dir', bundle, '--port', port]
            server = Server(f'replica{number}', command, lambda port=port: bool(get(port, '/health/ready')), home, env)
            server.port = port
            self.replicas.append(server)
        self.servers = [self.database, self.redis, *self.replicas]

    def _database(self):
        port, data = free_port(), self.home/'postgres'
        self.url = f'postgresql://amulet@127.0.0.1:{port}/postgres'
        data.mkdir()
        user = None
        if os.geteuid()==0:
            known = {u.pw_name: u for u in pwd.getpwall()}
            user = known.get('postgres') or known['nobody']
            os.chown(data, user.pw_uid, user.pw_gid)
        as_user = {'user': user.pw_uid, 'group': user.pw_gid, 'extra_groups': []} if user else {}
        subprocess.run([program('initdb'), '-D', data/'data', '-U', 'amulet', '-A', 'trust', '-E', 'UTF8'], check=True,
                       stdout=subprocess.DEVNULL, cwd=data, **as_user)
        command = [program('postgres'), '-D', data/'data', '-p', port, '-k', data, '-c', 'listen_addresses=127.0.0.1']
        server = Server('database', command, self._database_answers, self.home, user=user)
        server.port = port
        return server

    def _database_answers(self):
        import psycopg
        try:
            with psycopg.connect(self.url, connect_timeout=2) as db: return db.execute('SELECT 1').fetchone()==(1,)
        except psycopg.Error: return False

    def _redis(self):
        port = free_port()
        def answers():
            try:
                with socket.create_connection(('127.0.0.1', port), 1) as asked:
                    asked.sendall(b'PING\r\n')
                    return asked.recv(7)==b'+PONG\r\n'
            except OSError: return False
        server = Server('redis', [program('redis-server'), '--port', port, '--bind', '127.0.0.1', '--save', '',
                                  '--dir', self.home], answers, self.home)
        server.port = port
        return server

    def start(self):
        for server in (self.database, self.redis): server.start()
        for server in (self.database, self.redis): wait_for(server.ready, 60, f'the start of {server.name}')
        for server in self.replicas: server.start()
        for server in self.replicas: wait_for(server.ready, 120, f'the start of {server.name}')

    def stop(self):
        for server in reversed(self.servers): server.stop()


class Chaos(threading.Thread):
    "Kills something every few seconds, and measures when it is back"
    def __init__(self, system, every, seed, over):
        super().__init__(daemon=True)
        self.system, self.every, self.draw, self.over = system, every, random.Random(seed), over
        self.kills = [] # what, seconds until it was back (None: it was not, within a minute)

    def run(self):
        while not self.over.wait(self.every*self.draw.uniform(.5, 1.5)): self.kill_one()

    def kill_one(self):
        replica = self.draw.choice(self.system.replicas)
        targets = {'database': self.system.database, 'redis': self.system.redis, 'replica': replica}
        if children := replica.children(): targets['decoder'] = replica
        kind = self.draw.choice(sorted(targets))
        server, start = targets[kind], time.monotonic()
        pid = self.draw.choice(children) if kind=='decoder' else server.process.pid
        before = server.starts
        with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        def back(): # a new process that answers; for the database, the replicas have to see it, too
            if kind=='decoder': return pid not in replica.children() and server.ready()
            if server.starts==before or not server.ready(): return False
            return kind!='database' or all(get(r.port, '/health').get('records', {}).get('database')=='up'
                                           for r in self.system.replicas)
        while not back() and time.monotonic()-start < 60: time.sleep(.05)
        took = time.monotonic()-start
        self.kills.append((kind, took if took < 60 else None))


class Client(threading.Thread):
    "Asks one replica or the other, as a proxy would choose, and remembers what it was told"
    def __init__(self, system, photos, large, number, seed, over):
        super().__init__(daemon=True)
        self.ports, self.photos, self.large = [r.port for r in system.replicas], photos, large
        self.draw = random.Random(f'{seed} {number}')
        self.over, self.connections = over, {}
        self.predictions = {} # id of a prediction that is recorded -> id of its request
        self.feedback = {} # id of a prediction -> label that was acknowledged last, labels that may have come later
        self.refusals = [] # status, code, milliseconds
        self.broken = 0 # connections that ended before an answer
        self.answers = [] # times of answers

    def run(self):
        while not self.over.is_set():
            chance = self.draw.random()
            if chance < .25 and self.predictions: self.say(self.draw.choice([*self.predictions][-50:]))
            elif chance < .29: self.ask(b'this is no photo')
            elif chance < .31: self.say(uuid.uuid4().hex)
            elif chance < .312: self.ask(self.large)
            else: self.ask(self.photo())
            self.over.wait(.02)

    def photo(self):
        "One of a few that are asked again and again, or one that nobody has seen: a comment makes it another file"
        data = self.draw.choice(self.photos)
        if self.draw.random() < .3: return data
        return data[:2]+b'\xff\xfe\x00\x12'+self.draw.randbytes(16)+data[2:]

    def ask(self, data):
        body = (f'--{EDGE}\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n'
                f'Content-Type: image/jpeg\r\n\r\n').encode()+data+f'\r\n--{EDGE}--\r\n'.encode()
        status, told, request_id = self.send('/predict/file', body, f'multipart/form-data; boundary={EDGE}')
        if status==200: self.answers.append(time.monotonic())
        if status==200 and told['recorded']: self.predictions[told['prediction_id']] = request_id

    def say(self, prediction_id):
        label = f'label {self.draw.randrange(10**9)}'
        status,*_ = self.send('/feedback', json.dumps({'prediction_id': prediction_id, 'true_label': label}).encode(),
                              'application/json')
        if status==200: self.feedback[prediction_id] = label, set()
        elif not status and prediction_id in self.feedback: self.feedback[prediction_id][1].add(label) # or not

    def send(self, path, body, kind):
        "Status (0: the connection broke off), JSON, id of the request"
        port, request_id, start = self.draw.choice(self.ports), uuid.uuid4().hex, time.perf_counter()
        try:
            asked = self.connections.get(port) or http.client.HTTPConnection('127.0.0.1', port, timeout=60)
            self.connections[port] = asked
            asked.request('POST', path, body, {'Content-Type': kind, 'X-Request-ID': request_id})
            answer = asked.getresponse()
            told = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError):
            self.connections.pop(port).close()
            self.broken += 1
            return 0, {}, request_id
        if answer.status >= 400:
            self.refusals.append((answer.status, told['error_code'], 1000*(time.perf_counter()-start)))
        return answer.status, told, request_id


def some_photos():
    "A few photos as JPEG"
    import io

    from amulet_hybrid.data.samples import draw_logo
    photos = []
    for kind in ('text', 'simple', 'gradient', 'complex'):
        out = io.BytesIO()
        Image.fromarray(draw_logo(kind)).save(out, 'JPEG')
        photos.append(out.getvalue())
    return photos

def large_photo():
    "A progressive JPEG of 48 megapixels: estimated at more than a second, so a decoder process gets it"
    import io
    out = io.BytesIO()
    Image.linear_gradient('L').resize((8000, 6000)).convert('RGB').save(out, 'JPEG', progressive=True, quality=60)
    return out.getvalue()

def look(system, clients):
    "What the database has of what the clients were told: rows of a table, and faults"
    import psycopg

    from amulet_hybrid.store.predictions import PredictionLog
    with PredictionLog(system.url, system.journal) as log: drained = log.flush(120)
    with psycopg.connect(system.url) as db:
        rows = dict(db.execute('SELECT prediction_id, request_id FROM predictions').fetchall())
        twice = db.execute('SELECT count(*) FROM (SELECT request_id FROM predictions GROUP BY request_id '
                           'HAVING count(*) > 1) AS t').fetchone()[0]
        said = db.execute('SELECT prediction_id, true_label FROM feedback').fetchall()
    told = {k: v for c in clients for k,v in c.predictions.items()}
    labels = dict(said)
    wrong = sum(labels.get(key) not in {last, *later} for c in clients for key,(last,later) in c.feedback.items())
    lost = sum(rows.get(key)!=request for key,request in told.items())
    return {'acknowledged predictions': len(told), 'lost': lost, 'twice': twice, 'rows': len(rows),
            'acknowledged feedback': sum(len(c.feedback) for c in clients), 'feedback lost or wrong': wrong,
            'feedback twice': len(said)-len(labels), 'journal drained': drained}

def run(seconds=600, clients=6, replicas=2, every=5, seed=0, bundle=None):
    "All of it: a table of figures"
    with tempfile.TemporaryDirectory(prefix='amulet-chaos-') as folder:
        home = Path(folder)
        home.chmod(0o755) # PostgreSQL's user has to pass
        system = System(home, Path(bundle).resolve() if bundle else make_bundle(home), replicas)
        over, load_over = threading.Event(), threading.Event()
        chaos = Chaos(system, every, seed, over)
        photos, large = some_photos(), large_photo()
        load = [Client(system, photos, large, n, seed, load_over) for n in range(clients)]
        try:
            system.start()
            start = time.monotonic()
            for thread in (chaos, *load): thread.start()
            while time.monotonic()-start < seconds:
                for server in system.servers: server.supervise()
                time.sleep(.2)
            over.set()
            while chaos.is_alive():
                for server in system.servers: server.supervise()
                chaos.join(.2)
            load_over.set()
            for thread in load: thread.join(90)
            took = time.monotonic()-start
            for server in system.replicas: server.stop()
            found = look(system, load)
        finally: system.stop()
        return {'seconds': round(took), **found, **measured(load, chaos.kills)}

def measured(load, kills):
    "Figures of the clients and of the kills"
    def p99(times): return round(sorted(times)[int(.99*len(times))], 1) if times else 0.
    refusals = [r for c in load for r in c.refusals]
    times = sorted(t for c in load for t in c.answers)
    figures = {'broken connections': sum(c.broken for c in load), 'refusals': len(refusals),
               'p99 of refusals, ms': p99([ms for *_,ms in refusals])}
    for code in sorted({code for _,code,_ in refusals}):
        some = [ms for _,c,ms in refusals if c==code]
        figures |= {f'{code}: refusals': len(some), f'{code}: p99, ms': p99(some)}
    figures['longest without an answer, s'] = round(max((b-a for a,b in zip(times, times[1:])), default=0), 2)
    figures['longest until back, s'] = round(max((t or 60 for _,t in kills), default=0), 2)
    for kind in sorted({k for k,_ in kills}):
        some = [t or 60 for k,t in kills if k==kind]
        figures |= {f'{kind}: kills': len(some), f'{kind}: longest until back, s': round(max(some), 2)}
    return figures

def faults(figures):
    "What was promised and not kept"
    bars = {'lost': 0, 'twice': 0, 'feedback lost or wrong': 0, 'feedback twice': 0, 'p99 of refusals, ms': REFUSAL_MS,
            'longest until back, s': BACK_SECONDS}
    return [f'{name}: {figures[name]} (at most {most})' for name,most in bars.items() if figures[name] > most]

def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument('--seconds', type=float, default=600)
    options.add_argument('--clients', type=int, default=6)
    options.add_argument('--replicas', type=int, default=2)
    options.add_argument('--every', type=float, default=5, help='seconds between two kills, on average')
    options.add_argument('--seed', type=int, default=0)
    options.add_argument('--bundle', help='a bundle that names photos; left out: one is trained')
    options.add_argument('--output', type=Path, help='CSV for the figures')
    given = vars(options.parse_args())
    output = given.pop('output')
    figures = run(**given)
    table = pd.Series(figures, dtype=object)
    print(table.to_string())
    if output: table.rename_axis('figure').rename('value').to_csv(output)
    if broken := faults(figures): raise SystemExit('not kept: '+'; '.join(broken))

if __name__=='__main__': main()
