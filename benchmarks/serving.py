"""How the service does under load, next to others, and when things break around it.

    python benchmarks/serving.py throughput --data ../shared/data --weights ../shared/weights
    python benchmarks/serving.py overload | soak | kill | outage | replicas | hostile | all

throughput  requests a second and latency at 1, 8, 32 and 60 clients, beside LitServe (one and two workers) and plain
FastAPI handlers with the same
            bundle, with and without the cache; 60 clients for two minutes
overload    twice the capacity for a minute: what is answered, how fast the rest is turned away, memory, and how soon
all is as before
soak        a mix of everything for 30 minutes: errors, memory
kill        kill -9 ten times under load: every prediction that was answered is in the database once
outage      PostgreSQL (its own) stopped for two minutes under load: the same, and what an answer takes meanwhile
replicas    nginx before three: one killed, where only what it was working on fails; then a rolling reload of another
bundle, where no request does
hostile     2,000 uploads that mean harm: all refused, in bounded time and memory

Photos are JPEGs of 0.7 megapixel, each request another one. The bundles (MobileNetV2, HOG, LBP and colour on `amulet6`,
with a cascade) are trained once into --work.
LitServe gets an environment of its own there.
Client and service share the processors. `--smoke` makes everything short and writes nothing; otherwise rows go to
benchmarks/results/serving.csv, where those of an earlier run
of the same check are replaced.
"""
import argparse
import asyncio
import contextlib
import csv
import datetime
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from serving_hostile import ask_raw, clothed, harmful, multipart, raw_request, slow_ones, wrong

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
AMULET = [sys.executable, '-c', 'from amulet_hybrid.cli.app import main; main()']
ENVIRONMENT = {**os.environ, 'PYTHONPATH': str(ROOT), 'AMULET_PROGRESS': 'off'}
COLUMNS = ('date', 'commit', 'command', 'check', 'setting', 'figure', 'value', 'target', 'met')


class Table:
    "What was found: printed at once, written when a check is over"
    def __init__(self, args):
        commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True,
                                text=True).stdout.strip()
        words = [w for w in sys.argv[1:] if '/' not in w
                 and not w.startswith(('--work', '--data', '--weights', '--output'))]
        self.same = {'date': datetime.date.today().isoformat(), 'commit': commit,
                     'command': ' '.join(['python benchmarks/serving.py', *words])}
        self.output = None if args.smoke else args.output/'serving.csv'
        self.rows = []
        self.check = ''

    def note(self, setting, figure, value, target='', met=None):
        "A figure; with a target, whether it was met"
        value = round(value, 3) if isinstance(value, float) else value
        said = '' if met is None else 'yes' if met else 'no'
        self.rows.append({**self.same, 'check': self.check, 'setting': setting, 'figure': figure, 'value': value,
                          'target': target, 'met': said})
        print(f'{self.check:11s} {setting:34s} {figure:42s} {value!s:>12} '
              f'{target}{"" if met is None else " (met)" if met else " (MISSED)"}', flush=True)

    def write(self):
        "Into the file, instead of what this check said before"
        if self.output is None: return
        old = list(csv.DictReader(self.output.open())) if self.output.exists() else []
        rows = [r for r in old if r['check'] != self.check]+[r for r in self.rows if r['check'] == self.check]
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open('w', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader(); writer.writerows(rows)


# What is served, and to whom

def bundles(args):
    "Two bundles of the same kind, trained once"
    for name, seed in (('first', 0), ('second', 1)):
        if not (args.work/name/'bundle'/'manifest.json').exists():
            print(f'training the {name} bundle', flush=True)
            subprocess.run([*AMULET, 'train', '--data-dir', args.data/'amulet6', '--weights', args.weights, '--preset',
                            'fast', '--quick', '--seed', str(seed),
                            '--output-dir', args.work/name], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    return args.work/'first'/'bundle', args.work/'second'/'bundle'


def photos(args, count=60):
    "Real photos as a phone's small ones: 966 x 724, a JPEG of quality 90"
    folder = args.work/'photos'
    if len(list(folder.glob('*.jpg'))) < count:
        folder.mkdir(parents=True, exist_ok=True)
        for i, path in enumerate(sorted(p for p in (args.data/'amulet6').rglob('*.*') if p.suffix.lower() in ('.jpg',
                '.jpeg', '.png'))[:count*2:2]):
            with Image.open(path) as image:
                image.convert('RGB').resize((966, 724), Image.Resampling.BICUBIC).save(folder/f'{i:03d}.jpg',
                        quality=90)
    return folder


def rival_python(args):
    "Python of an environment with LitServe, which sees our packages behind its own"
    python = args.work/'litserve'/'bin'/'python'
    if not python.exists():
        print('installing LitServe', flush=True)
        venv.create(args.work/'litserve', with_pip=True)
        subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', 'litserve'],
                       check=True)
        place = subprocess.run([python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'],
                               capture_output=True, text=True, check=True).stdout.strip()
        import numpy
        Path(place, 'amulet.pth').write_text(str(Path(numpy.__file__).parent.parent)+'\n')
    return python


def free_port():
    with socket.socket() as free: free.bind(('127.0.0.1', 0)); return free.getsockname()[1]


def family(pid):
    "A process and those that it started"
    out = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f'/proc/{pid}/task').iterdir():
            out += [p for child in (task/'children').read_text().split() for p in family(int(child))]
    return out


def resident(pid):
    "Megabytes in memory"
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f'/proc/{pid}/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20
    return 0.


class Server:
    "A process that answers at a port"
    def __init__(self, command, port, log, ready='/health', **env):
        self.command = command
        self.port = port
        self.log = log
        self.ready = ready
        self.env = env
        self.start()

    def start(self):
        with open(self.log, 'ab') as log:
            self.process = subprocess.Popen(list(map(str, self.command)), env={**ENVIRONMENT, **self.env}, stdout=log,
                                            stderr=log)
        self.wait()
        return self

    def wait(self, seconds=120):
        until = time.monotonic()+seconds
        while True:
            with contextlib.suppress(OSError):
                if get(self.port, self.ready)[0] == 200: return
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f'the server did not start:\n{Path(self.log).read_text()[-2000:]}')
            time.sleep(.05)

    def megabytes(self):
        "Of the process and its children"
        return sum(resident(pid) for pid in family(self.process.pid))

    def kill(self): self.process.kill(); self.process.wait()

    def stop(self):
        children = family(self.process.pid)[1:]
        self.process.terminate()
        try: self.process.wait(40)
        except subprocess.TimeoutExpired: self.kill()
        for pid in children: # LitServe leaves some
            with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)

    def __enter__(self): return self
    def __exit__(self, *_): self.stop()


def get(port, path):
    "Status and JSON"
    try:
        with urllib.request.urlopen(f'http://127.0.0.1:{port}{path}', timeout=5) as answer:
            body = answer.read()
            return answer.status, json.loads(body) if body[:1] == b'{' else body
    except urllib.error.HTTPError as error: return error.code, {}


def amulet(bundle, folder, port=0, **settings):
    "The service; records go to SQLite beside its journal unless `database_url` says otherwise"
    port = port or free_port()
    words = {'model_dir': bundle, 'port': port, 'answer_cache': 'off', 'journal_dir': folder/'journal',
             'log_level': 'warning',
             **settings}
    return Server([*AMULET, 'serve', *(f'--{k.replace("_", "-")}={v}' for k, v in words.items())], port,
                  folder/f'server{port}.log', '/health/ready')


def begin_load(**spec):
    "The load, under way"
    process = subprocess.Popen([sys.executable, ROOT/'benchmarks'/'serving_load.py'], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in spec.items()}))
    process.stdin.close()
    return process


def end_load(process):
    out = process.stdout.read()
    if process.wait(): raise SystemExit('the load failed')
    return json.loads(out)


def stop_load(process):
    "It asks no more, and tells"
    process.terminate()
    return end_load(process)


def load(**spec): return end_load(begin_load(**spec))


def failures(told):
    "What was not answered, in words; '0' for nothing"
    return ', '.join(f'{n} {kind}' for kind, n in {**told['other'],
                                                   **({'busy': told['busy']} if told['busy'] else {})}.items()) or '0'


class Memory:
    "Megabytes of a server, looked at now and then"
    def __init__(self, server, every=1.):
        self.server = server
        self.every = every
        self.seen = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self):
        while not self.over.wait(self.every): self.seen.append(self.server.megabytes())

    def __enter__(self): return self
    def __exit__(self, *_): self.over.set(); self.thread.join()


# Checks

BARE = '''
import itertools, json, os, sys, time
from pathlib import Path
from amulet_hybrid.model.classifier import HybridClassifier
classifier = HybridClassifier(sys.argv[1], enable_caching=False)
jpegs = [p.read_bytes() for p in sorted(Path(sys.argv[2]).glob('*.jpg'))]
times,turn = [],itertools.count()
until = time.perf_counter()+float(sys.argv[3])+1
while (now := time.perf_counter()) < until:
    n = next(turn)
    photo = b'\\xff\\xd8\\xff\\xfe\\x00\\x12'+os.urandom(6)+n.to_bytes(10, 'big')+jpegs[n%len(jpegs)][2:]
    start = time.perf_counter()
    classifier.classify(photo)
    if now > until-float(sys.argv[3]): times.append(1000*(time.perf_counter()-start))
print(json.dumps(times))
'''


def throughput(args, table, folder):
    bundle, pictures = bundles(args)[0], photos(args)
    seconds, rounds, numbers = (2, 1, (1, 8)) if args.smoke else (args.seconds, args.rounds, (1, 8, 32, 60))
    rivals = {f'litserve{n}': [rival_python(args), ROOT/'benchmarks'/'serving_litserve.py', n, bundle] for n in (1, 2)}
    rivals |= {name: [sys.executable, ROOT/'benchmarks'/'serving_rivals.py', name, bundle]
               for name in ('naive', 'threads')}
    for name in ('off', 'memory'): (folder/name).mkdir()
    found, bare = {}, []
    with contextlib.ExitStack() as running:
        servers = {'amulet': running.enter_context(amulet(bundle, folder/'off'))}
        for name, command in rivals.items():
            port = free_port()
            servers[name] = running.enter_context(Server([*command, port], port, folder/f'{name}.log'))
        for server in servers.values(): load(port=server.port, photos=pictures, clients=4, seconds=2)
        for _ in range(rounds): # in turn, so that what else the machine does falls on all
            done = subprocess.run([sys.executable, '-c', BARE, bundle, pictures, str(seconds)], env=ENVIRONMENT,
                                  capture_output=True, text=True, check=True)
            bare += json.loads(done.stdout)
            for clients in numbers:
                for name, server in servers.items():
                    found.setdefault((name, clients),
                                     []).append(load(port=server.port, photos=pictures, clients=clients,
                                                     seconds=seconds))
    table.note('bare classifier, one thread', 'p50 ms', statistics.median(bare))
    for (name, clients), runs in found.items():
        setting = f'{name}, {clients} clients'
        table.note(setting, 'requests a second', statistics.median(r['per_second'] for r in runs))
        for q in ('p50', 'p99'): table.note(setting, f'{q} ms', statistics.median(r[q] or float('nan') for r in runs))
        if any(failures(r) != '0' for r in runs): table.note(setting, 'not answered', '; '.join(map(failures, runs)))
    for clients in numbers[1:]:
        best = {name: statistics.median(r['per_second'] for r in found[name, clients]) for name in servers}
        lit = max(best['litserve1'], best['litserve2'])
        table.note(f'{clients} clients', 'requests a second, to LitServe (the better)', best['amulet']/lit,
                   'at least 1', best['amulet'] >= lit)
        table.note(f'{clients} clients', 'requests a second, to naive', best['amulet']/best['naive'], 'at least 2',
                   best['amulet'] >= 2*best['naive'])
        table.note(f'{clients} clients', 'requests a second, to threads', best['amulet']/best['threads'])
    over = statistics.median(r['p50'] for r in found['amulet', 1])-statistics.median(bare)
    table.note('amulet, 1 client', 'p50 ms above the bare classifier', over, 'at most 3', over <= 3)
    with amulet(bundle, folder/'memory', answer_cache='memory') as server:
        load(port=server.port, photos=pictures, clients=2, seconds=1, kinds={'repeat': 1})
        for clients in numbers:
            told = load(port=server.port, photos=pictures, clients=clients, seconds=seconds, kinds={'repeat': 1})
            setting = f'amulet, repeated photos, {clients} clients'
            wanted = ('at least 1000', told['per_second'] >= 1000) if clients > 1 else ()
            table.note(setting, 'requests a second', told['per_second'], *wanted)
            table.note(setting, 'p99 ms', told['p99'])
    long = 4 if args.smoke else 120
    # fresh: all sixty come at once to a service that has answered nobody yet
    with amulet(bundle, folder/'off') as server:
        told = load(port=server.port, photos=pictures, clients=60, seconds=long)
        table.note(f'amulet, 60 clients, {long} s', 'requests', told['requests'])
        table.note(f'amulet, 60 clients, {long} s', 'not answered', failures(told), '0', failures(told) == '0')
        table.note(f'amulet, 60 clients, {long} s', 'p99 ms', told['p99'])


def overload(args, table, folder):
    bundle, pictures = bundles(args)[0], photos(args)
    seconds, warm = (6, 4) if args.smoke else (60, 20)
    with amulet(bundle, folder) as server:
        load(port=server.port, photos=pictures, clients=4, seconds=3)
        capacity = load(port=server.port, photos=pictures, clients=16, seconds=warm)['per_second']
        before = load(port=server.port, photos=pictures, clients=1, seconds=warm/2)
        with Memory(server) as memory:
            told = load(port=server.port, photos=pictures, rate=2*capacity, seconds=seconds,
                        records=folder/'overload.csv')
            time.sleep(1)
            after = load(port=server.port, photos=pictures, clients=1, seconds=warm/2)
    # those of the queue that are answered after the last was sent do not count
    good = sum(1 for r in csv.reader((folder/'overload.csv').open()) if r[2] == '200' and float(r[0])
               +float(r[1])/1000 <= seconds)/seconds
    setting = f'twice the capacity, {seconds} s'
    table.note('16 clients', 'capacity, requests a second', capacity)
    table.note(setting, 'requests sent a second', told['requests']/seconds)
    table.note(setting, 'answered a second, of capacity', good/capacity, 'at least 0.9', good >= .9*capacity)
    table.note(setting, 'told to come back', told['busy'])
    table.note(setting, 'refusal p50 ms', told['busy_p50'])
    table.note(setting, 'refusal p99 ms', told['busy_p99'])
    table.note(setting, 'slowest refusal ms', told['busy_max'], 'under 100', (told['busy_max'] or 0) < 100)
    table.note(setting, 'the load was late by ms, at most', 1000*told['late'])
    table.note(setting, 'answer p99 ms', told['p99'])
    table.note(setting, 'neither answered nor told', str(told['other'] or 0), '0', not told['other'])
    first, most = statistics.median(memory.seen[:3]), max(memory.seen)
    table.note(setting, 'MB at its start', first)
    table.note(setting, 'MB at most', most, 'flat: at most 10 % more', most <= 1.1*first)
    table.note('before, 1 client', 'p50 ms', before['p50'])
    table.note('a second later, 1 client', 'p50 ms', after['p50'], 'at most 1.2 of before',
               after['p50'] <= 1.2*before['p50'])


MIX = {'file': 60, 'base64': 10, 'repeat': 15, 'batch': 4, 'broken': 4, 'feedback': 7}


def soak(args, table, folder):
    bundle, pictures = bundles(args)[0], photos(args)
    minutes = .3 if args.smoke else args.minutes
    with amulet(bundle, folder, answer_cache='memory') as server, Memory(server, every=minutes*60/400) as memory:
        told = load(port=server.port, photos=pictures, clients=8, seconds=minutes*60, kinds=MIX,
                    labels=get(server.port, '/info')[1]['classes'])
        health = get(server.port, '/health')[1]
    tenth = len(memory.seen)//10
    warm, end = statistics.median(memory.seen[tenth:2*tenth]), statistics.median(memory.seen[-tenth:])
    setting = f'8 clients, a mix, {minutes:g} min'
    table.note(setting, 'requests', told['requests'])
    table.note(setting, 'answered a second', told['per_second'])
    table.note(setting, 'p99 ms', told['p99'])
    table.note(setting, 'errors', failures(told), '0', failures(told) == '0')
    table.note(setting, 'MB after a tenth of the time', warm)
    table.note(setting, 'MB at the end', end)
    table.note(setting, 'growth, percent', 100*(end/warm-1), 'under 5', end < 1.05*warm)
    table.note(setting, 'rows that still wait', health['records'].get('journaled', '-'))


# What was answered is in the database, once

def compare(table, setting, url, ids, folder):
    "Carry on what waits, then look for every answered prediction"
    import sqlalchemy as sa

    from amulet_hybrid.store.database import Database, metadata
    from amulet_hybrid.store.predictions import PredictionLog
    with PredictionLog(url, folder/'journal') as kept: kept.flush(120)
    told = ids.read_text().split()
    with Database(url, folder/'amulet.db').read() as db:
        found = [r[0] for r in db.execute(sa.select(metadata().tables['predictions'].c.prediction_id))]
    missing, double = len(set(told)-set(found)), len(found)-len(set(found))
    table.note(setting, 'predictions answered', len(told))
    table.note(setting, 'of these not in the database', missing, '0', missing == 0)
    table.note(setting, 'in the database twice', double, '0', double == 0)
    table.note(setting, 'in the database, answer lost on its way', len(set(found)-set(told)))
    rejected = folder/'journal'/'rejected.jsonl'
    table.note(setting, 'set aside', len(rejected.read_text().splitlines()) if rejected.exists() else 0, '0',
               not rejected.exists())


@contextlib.contextmanager
def own_schema():
    "A schema on the PostgreSQL of the tests, or None where there is none"
    import sqlalchemy as sa
    url = os.environ.get('AMULET_TEST_POSTGRES', 'postgresql://postgres@127.0.0.1:5432/test')
    name, driver = f'amulet_{os.getpid()}', url.replace('postgresql://', 'postgresql+psycopg://')
    engine = sa.create_engine(driver, isolation_level='AUTOCOMMIT', connect_args={'connect_timeout': 3})
    try:
        with engine.connect() as db: db.exec_driver_sql(f'CREATE SCHEMA {name}')
    except sa.exc.OperationalError: yield None; return
    try: yield f'{url}?options=-csearch_path%3D{name}'
    finally:
        with engine.connect() as db: db.exec_driver_sql(f'DROP SCHEMA {name} CASCADE')


def kill(args, table, folder):
    bundle = bundles(args)[0]
    pictures = photos(args)
    rng = random.Random(0)
    times = 2 if args.smoke else args.times
    with own_schema() as postgres:
        for name, url in (('SQLite', ''), ('PostgreSQL', postgres)):
            if url is None: print('no PostgreSQL (AMULET_TEST_POSTGRES): skipped'); continue
            place = folder/name
            place.mkdir()
            server = amulet(bundle, place, database_url=url)
            try:
                under_way = begin_load(port=server.port, photos=pictures, clients=8, seconds=3600, ids=place/'ids',
                                       timeout=20)
                for _ in range(times):
                    time.sleep(rng.uniform(.5, 3.5))
                    server.kill(); server.start()
                time.sleep(1)
                told = stop_load(under_way)
                server.kill()
            finally: server.stop()
            setting = f'{name}, kill -9 {times} times'
            table.note(setting, 'requests answered', told['answered'])
            table.note(setting, 'requests that met a dead server', sum(told['other'].values()))
            compare(table, setting, url, place/'ids', place)


class Postgres:
    "A server of our own, that may be stopped"
    def __init__(self, folder):
        found = shutil.which('pg_config')
        asked = subprocess.run([found, '--bindir'], capture_output=True, text=True).stdout.strip() if found else ''
        there = asked or max(map(str, Path('/usr/lib/postgresql').glob('*/bin')), default='')
        if not there: raise SystemExit('this needs the programs of PostgreSQL (initdb, pg_ctl)')
        self.bin = Path(there)
        self.folder = folder
        self.port = free_port()
        # PostgreSQL refuses to run as root
        self.who = {'user': 'postgres', 'group': 'postgres'} if os.geteuid() == 0 else {}
        folder.mkdir()
        if self.who: shutil.chown(folder, **self.who)
        self.run('initdb', '-D', folder/'data', '-U', 'postgres', '-A', 'trust', '--no-sync')
        self.start()
        self.url = f'postgresql://postgres@127.0.0.1:{self.port}/postgres'

    def run(self, program, *words):
        done = subprocess.run([self.bin/program, *map(str, words)], cwd=self.folder, stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              env={'PATH': os.environ['PATH'], 'LC_ALL': 'C.UTF-8'}, **self.who)
        if done.returncode: raise SystemExit(f'{program}: {done.stderr}')

    def start(self):
        self.run('pg_ctl', '-D', self.folder/'data', '-w', '-l', self.folder/'log', '-o',
                 f'-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1', 'start')
    def stop(self): self.run('pg_ctl', '-D', self.folder/'data', '-w', '-m', 'immediate', 'stop')


def outage(args, table, folder):
    bundle, pictures = bundles(args)[0], photos(args)
    away, calm = (6, 4) if args.smoke else (120, 30)
    folder.chmod(0o755)
    postgres = Postgres(folder/'postgres')
    (folder/'service').mkdir()
    try:
        with amulet(bundle, folder/'service', database_url=postgres.url) as server, Memory(server) as memory:
            load(port=server.port, photos=pictures, clients=2, seconds=2, ids=folder/'ids')
            under_way = begin_load(port=server.port, photos=pictures, clients=8, seconds=2*calm+away, ids=folder/'ids',
                                   records=folder/'records.csv')
            time.sleep(calm); postgres.stop()
            time.sleep(away)
            waiting = get(server.port, '/health')[1]['records']
            postgres.start()
            start, caught_up = time.monotonic(), None
            while time.monotonic()-start < calm+30:
                records = get(server.port, '/health')[1]['records']
                if records['database'] == 'up' and records['journaled'] < 100: caught_up = time.monotonic()-start; break
                time.sleep(.1)
            told = end_load(under_way)
        compare(table, f'{away} s without PostgreSQL', postgres.url, folder/'ids', folder/'service')
    finally: postgres.stop()
    rows = [(float(r[0]), float(r[1])) for r in csv.reader((folder/'records.csv').open()) if r[2] == '200']
    parts = {'before': (0, calm), 'without': (calm, calm+away), 'after': (calm+away, 2*calm+away)}
    for name, (low, high) in parts.items():
        times = sorted(ms for t, ms in rows if low <= t < high)
        table.note(f'{name}, 8 clients', 'requests a second', len(times)/(high-low))
        for q in (.5, .99): table.note(f'{name}, 8 clients', f'p{100*q:.0f} ms', times[int(q*len(times))])
    setting = f'{away} s without PostgreSQL'
    table.note(setting, 'requests that failed', failures(told), '0', failures(told) == '0')
    table.note(setting, 'rows that waited at its end', waiting['journaled'])
    table.note(setting, 'seconds until they were in the database', caught_up if caught_up is not None else 'never', '',
               caught_up is not None)
    table.note(setting, 'MB at most', max(memory.seen))


NGINX = '''
%(user)s
daemon off; worker_processes 1; pid nginx.pid; error_log nginx.log;
events { worker_connections 1024; }
http {
    access_log off; client_max_body_size 60m; client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    upstream amulet { least_conn; %(servers)s keepalive 32; }
    server {
        listen 127.0.0.1:%(port)d;
        location / {
            proxy_pass http://amulet; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_connect_timeout 1s; proxy_read_timeout 60s;
            proxy_request_buffering off; proxy_next_upstream error timeout; proxy_next_upstream_tries 3;
        }
    }
}
'''


def replicas(args, table, folder):
    first, second = bundles(args)
    pictures, seconds = photos(args), 8 if args.smoke else 30
    link, port = folder/'bundle', free_port()
    link.symlink_to(first)
    with contextlib.ExitStack() as running:
        servers = []
        for i in range(3):
            (folder/f'replica{i}').mkdir()
            servers.append(running.enter_context(amulet(link, folder/f'replica{i}', workers=1,
                                                        database_url=f'sqlite:///{folder}/amulet.db')))
        (folder/'nginx.conf').write_text(NGINX % {'user': 'user root;' if os.geteuid() == 0 else '', 'port': port,
                                                  'servers': ' '.join(f'server 127.0.0.1:{s.port} max_fails=1 '
                                                                      f'fail_timeout=2s;' for s in servers)})
        running.enter_context(Server(['nginx', '-p', folder, '-c', folder/'nginx.conf'], port, folder/'nginx.out',
                                     '/health/ready'))
        load(port=port, photos=pictures, clients=6, seconds=2, ids=folder/'ids')

        under_way = begin_load(port=port, photos=pictures, clients=12, seconds=seconds, ids=folder/'ids')
        time.sleep(seconds/3)
        servers[0].kill()
        told = end_load(under_way)
        failed = sum(told['other'].values())+told['busy']
        table.note('3 replicas, one killed', 'requests answered', told['answered'])
        table.note('3 replicas, one killed', 'failed, beyond those in flight on it (4)', max(0, failed-4), '0',
                   failed <= 4)
        table.note('3 replicas, one killed', 'failed at all', failures(told))
        servers[0].start()
        time.sleep(2.5)

        under_way = begin_load(port=port, photos=pictures, clients=12, seconds=seconds, ids=folder/'ids')
        time.sleep(seconds/4)
        before = get(servers[0].port, '/info')[1]['model_version']
        (folder/'next').symlink_to(second); (folder/'next').rename(link)
        versions = []
        for server in servers:
            server.process.send_signal(signal.SIGHUP)
            until = time.monotonic()+30
            while (now := get(server.port, '/info')[1]['model_version']) == before and time.monotonic() < until:
                time.sleep(.1)
            versions.append(now)
        told = end_load(under_way)
        table.note('3 replicas, rolling reload', 'requests answered', told['answered'])
        table.note('3 replicas, rolling reload', 'failed', failures(told), '0', failures(told) == '0')
        table.note('3 replicas, rolling reload', 'replicas with the new bundle', sum(v != before for v in versions),
                   '3', len(set(versions)) == 1 and before not in versions)
    compare(table, '3 replicas, killed and reloaded', f'sqlite:///{folder}/amulet.db', folder/'ids', folder/'replica0')


# Uploads that mean harm

def hostile(args, table, folder):
    bundle = bundles(args)[0]
    pictures = photos(args)
    rng = random.Random(0)
    count, patience = (150, 3) if args.smoke else (2000, 5)
    jpegs = [p.read_bytes() for p in sorted(pictures.glob('*.jpg'))]
    # the odd ones are honest, and come on top
    bad = int(count*.75)
    wrongs = int(count*.2)
    odd = count//20
    slow_count = count-int(count*.75)-int(count*.2)
    with amulet(bundle, folder, body_seconds=patience, header_seconds=patience) as server:
        load(port=server.port, photos=pictures, clients=4, seconds=3)
        calm = server.megabytes()
        with Memory(server, .2) as memory, ThreadPoolExecutor(8) as pool:
            kinds = list(harmful(jpegs[0], rng))
            asked = [(kinds[i % len(kinds)],
                      raw_request(multipart(harmful(rng.choice(jpegs), rng)[kinds[i % len(kinds)]]())))
                     for i in range(bad)]
            answers = {'photos that are none': [(k, *r) for (k, _), r in zip(asked,
                    pool.map(lambda a: ask_raw(server.port, a[1]), asked))]}
            lies = [rng.choice(list(wrong(rng.choice(jpegs), rng).items())) for _ in range(wrongs)]
            answers['requests that lie'] = [(k, *r) for (k, _), r in zip(lies,
                    pool.map(lambda a: ask_raw(server.port, a[1]), lies))]
            kinds = list(clothed(jpegs[0], rng))
            asked = [(kinds[i % len(kinds)],
                      raw_request(multipart(clothed(rng.choice(jpegs), rng)[kinds[i % len(kinds)]]())))
                     for i in range(odd)]
            answers['honest photos, oddly wrapped'] = [(k, *r) for (k, _), r in zip(asked,
                    pool.map(lambda a: ask_raw(server.port, a[1]), asked))]
            answers['slow senders'] = [(f'slow {i % 4}', *r)
                                       for i, r in enumerate(asyncio.run(slow_ones(server.port, jpegs[0], slow_count,
                    3*patience)))]
        told = load(port=server.port, photos=pictures, clients=4, seconds=3)
        after = server.megabytes()
    for setting, rows in answers.items():
        may = {'honest photos, oddly wrapped': lambda s: s == 200, 'slow senders': lambda s: s == 0
               or 400 <= s < 500}.get(setting, lambda s: 400 <= s < 500)
        strange = {}
        for kind, status, _ in rows:
            if not may(status): strange[f'{kind}: {status}'] = strange.get(f'{kind}: {status}', 0)+1
        table.note(f'{setting} ({len(rows)})', 'neither refused nor named as they should', str(strange or 0), '0',
                   not strange)
        table.note(f'{setting} ({len(rows)})', 'slowest s', max(s for _, _, s in rows), f'at most {2*patience+2}',
                   max(s for _, _, s in rows) <= 2*patience+2)
        for status in sorted({s for _, s, _ in rows}):
            table.note(f'{setting} ({len(rows)})', f'status {status}', sum(s == status for _, s, _ in rows))
    table.note('all', 'MB before', calm)
    table.note('all', 'MB at most', max(memory.seen), 'at most 300 more', max(memory.seen) <= calm+300)
    table.note('all', 'MB afterwards', after)
    table.note('afterwards, 4 clients', 'not answered', failures(told), '0', failures(told) == '0')


CHECKS = {f.__name__: f for f in (throughput, overload, soak, kill, outage, replicas, hostile)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checks', nargs='+', choices=[*CHECKS, 'all'], metavar='check',
                        help=', '.join([*CHECKS, 'all']))
    parser.add_argument('--data', type=Path, default=ROOT.parent/'shared'/'data')
    parser.add_argument('--weights', type=Path, default=ROOT.parent/'shared'/'weights')
    parser.add_argument('--work', type=Path, default=Path(tempfile.gettempdir())/'amulet_serving',
                        help='bundles, photos and LitServe are kept there')
    parser.add_argument('--output', type=Path, default=ROOT/'benchmarks'/'results')
    parser.add_argument('--seconds', type=float, default=10, help='of each measurement of throughput')
    parser.add_argument('--rounds', type=int, default=3, help='of throughput')
    parser.add_argument('--minutes', type=float, default=30, help='of soak')
    parser.add_argument('--times', type=int, default=10, help='that kill kills')
    parser.add_argument('--smoke', action='store_true', help='short, and nothing is written')
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    table = Table(args)
    for name in CHECKS if 'all' in args.checks else args.checks:
        table.check = name
        with tempfile.TemporaryDirectory(prefix=f'amulet-{name}-') as folder: CHECKS[name](args, table, Path(folder))
        table.write()
    missed = sum(r['met'] == 'no' for r in table.rows)
    print(f'{missed} targets missed' if missed else 'all targets met')
    sys.exit(missed > 0)


if __name__ == '__main__': main()
