"""Load for benchmarks/serving.py, in a process of its own: it shares the processor with the service, so it does as
little as it can.

    echo '{"port": 8000, "photos": "folder", "clients": 8, "seconds": 5}' | python benchmarks/serving_load.py

Requests go over kept-alive connections, written as bytes. Photos are made distinct by a comment of sixteen bytes behind
the start of the JPEG: other bytes, the same pixels.
Either so many clients each ask again when they are answered (`clients`), or requests are sent at a rate whatever comes
back (`rate`). SIGTERM ends it early.
The answer is one JSON object on standard output.
"""
import asyncio
import base64
import contextlib
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

LENGTH = re.compile(rb'\r\ncontent-length: *(\d+)', re.I)
EDGE = b'amulet-load-edge'
DEFAULTS = {'host': '127.0.0.1', 'clients': 1, 'rate': 0, 'seconds': 5, 'kinds': {'file': 1}, 'timeout': 60, 'ids': '',
            'records': '', 'field': 'files', 'seed': 0, 'labels': ['?']}


class Connection(asyncio.Protocol):
    "One request at a time"
    def __init__(self): self.buffer, self.answer, self.transport, self.open = bytearray(), None, None, False

    def connection_made(self, transport): self.transport, self.open = transport, True

    def data_received(self, data):
        self.buffer += data
        head = self.buffer.find(b'\r\n\r\n')
        if head < 0 or self.answer is None: return
        found = LENGTH.search(self.buffer, 0, head+2)
        size = int(found[1]) if found else 0
        if len(self.buffer) < head+4+size: return
        status, body = int(self.buffer[9:12]), bytes(self.buffer[head+4:head+4+size])
        if b'connection: close' in self.buffer[:head].lower(): self.open = False; self.transport.close()
        self.buffer.clear()
        answer, self.answer = self.answer, None
        if not answer.done(): answer.set_result((status, body))

    def connection_lost(self, exc):
        self.open = False
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(exc or ConnectionResetError('closed before an answer'))

    async def ask(self, parts, timeout):
        "Status and body; raises OSError"
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.writelines(parts)
        try: return await asyncio.wait_for(self.answer, timeout)
        except BaseException: self.open = False; self.transport.abort(); raise


class Load:
    "What is asked, and what came back"
    def __init__(self, spec):
        unknown = set(spec)-set(DEFAULTS)-{'port', 'photos'}
        if unknown: raise SystemExit(f'unknown: {", ".join(sorted(unknown))}')
        self.__dict__.update({**DEFAULTS, **spec})
        folder = Path(self.photos)
        self.jpegs = [p.read_bytes() for p in sorted(folder.glob('*.jpg'))]
        if not self.jpegs: raise SystemExit(f'no .jpg in {folder}')
        self.draw = random.Random(self.seed)
        self.turn = itertools.count()
        self.told = []
        self.rows = []
        self.free = []
        self.late = 0.
        self.start = 0.
        self.until = 0.
        self.ids_file = open(self.ids, 'a') if self.ids else None # noqa: SIM115
        self.unique = os.urandom(6)

    def distinct(self):
        "A photo that nobody has seen, in two parts"
        n = next(self.turn)
        head = b'\xff\xd8\xff\xfe\x00\x12'+self.unique+n.to_bytes(10, 'big')
        return head, memoryview(self.jpegs[n % len(self.jpegs)])[2:]

    def request(self, kind):
        "Bytes to send"
        if kind == 'file': return self.form(self.distinct())
        if kind == 'repeat': return self.form((self.draw.choice(self.jpegs[:8]),))
        if kind == 'broken': return self.form((self.draw.choice(self.jpegs)[:9000],))
        if kind == 'base64':
            return self.json('/predict', {'image_data': base64.b64encode(b''.join(self.distinct())).decode(),
                                          'return_probabilities': False})
        if kind == 'batch':
            return self.json('/predict-batch',
                             {'images': [base64.b64encode(b''.join(self.distinct())).decode() for _ in range(3)]})
        if kind == 'feedback' and not self.told: return self.request('file')
        if kind == 'feedback':
            return self.json('/feedback', {'prediction_id': self.draw.choice(self.told),
                                           'true_label': self.draw.choice(self.labels)})
        raise SystemExit(f'no such kind of request: {kind}')

    def head(self, path, kind, size):
        return (f'POST {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: {kind}\r\nContent-Length: '
                f'{size}\r\n\r\n').encode()

    def form(self, parts):
        before = (b'--'+EDGE+b'\r\nContent-Disposition: form-data; name="'+self.field.encode()
                  +b'"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n')
        after = b'\r\n--'+EDGE+b'--\r\n'
        return [self.head('/predict/file', f'multipart/form-data; boundary={EDGE.decode()}',
                          len(before)+sum(map(len, parts))+len(after)), before, *parts, after]

    def json(self, path, value):
        body = json.dumps(value).encode()
        return [self.head(path, 'application/json', len(body)), body]

    async def one(self, connection):
        "Ask once, and note what came; the connection, if it can be used again"
        kind = self.draw.choices(list(self.kinds),
                                 list(self.kinds.values()))[0] if len(self.kinds) > 1 else next(iter(self.kinds))
        parts = self.request(kind)
        begun = time.perf_counter()
        status = 0
        code = ''
        try:
            if connection is None or not connection.open:
                connection = (await asyncio.get_running_loop().create_connection(Connection, self.host, self.port))[1]
            status, body = await connection.ask(parts, self.timeout)
            if status == 200: self.note(body)
            else: code = json.loads(body).get('error_code', '') if body[:1] == b'{' else ''
        except TimeoutError: code, connection = 'no answer', None
        except (OSError, ValueError) as error: code, connection = type(error).__name__, None
        self.rows.append((begun-self.start, 1000*(time.perf_counter()-begun), status, kind, code))
        return connection

    def note(self, body):
        "Names of the predictions that were answered"
        if self.ids_file is None and 'feedback' not in self.kinds: return
        answer = json.loads(body)
        for one in answer.get('results', [answer]):
            if (name := one.get('prediction_id')) and 'feedback_id' not in one:
                if self.ids_file: self.ids_file.write(name+'\n')
                if len(self.told) < 1000: self.told.append(name)
                else: self.told[self.draw.randrange(1000)] = name

    async def client(self):
        connection = None
        while time.perf_counter() < self.until:
            connection = await self.one(connection)
            if connection is None: await asyncio.sleep(.02)
        if connection is not None: connection.transport.close()

    async def at_a_rate(self):
        "Send when it is time, over any connection that is free"
        async def send():
            connection = self.free.pop() if self.free else None
            connection = await self.one(connection)
            if connection is not None and connection.open: self.free.append(connection)
        under_way, due = set(), time.perf_counter()
        while due < self.until:
            if (wait := due-time.perf_counter()) > 0: await asyncio.sleep(wait)
            else: self.late = max(self.late, -wait)
            task = asyncio.create_task(send())
            under_way.add(task); task.add_done_callback(under_way.discard)
            due += self.draw.expovariate(self.rate)
        if under_way: await asyncio.wait(under_way)
        for connection in self.free: connection.transport.close()

    async def run(self):
        self.start = time.perf_counter()
        self.until = self.start+self.seconds
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.stop)
        if self.rate: await self.at_a_rate()
        else: await asyncio.gather(*(self.client() for _ in range(self.clients)))
        return self.summary(time.perf_counter()-self.start)

    def stop(self): self.until = 0

    def summary(self, seconds):
        if self.ids_file: self.ids_file.close()
        if self.records:
            with open(self.records, 'w') as file:
                file.writelines(f'{t:.4f},{ms:.3f},{status},{kind},{code}\n' for t, ms, status, kind, code in self.rows)
        good, busy = ([r[1] for r in self.rows if r[2] == s] for s in (200, 503))
        other = counted(f'{kind} {status} {code}'.strip() for _, _, status, kind, code in self.rows
                        if status not in (200, 503) and not (kind == 'broken' and 400 <= status < 500))
        return {'seconds': seconds, 'requests': len(self.rows), 'answered': len(good),
                'per_second': len(good)/min(seconds, self.seconds), **quantiles('', good),
                'busy': len(busy), **quantiles('busy_', busy), 'other': other, 'late': self.late}


def quantiles(name, values):
    values = sorted(values)
    return {f'{name}{q}': values[min(len(values)-1, int(share*len(values)))] if values else None
            for q, share in (('p50', .5), ('p90', .9), ('p99', .99), ('max', 1))}


def counted(names):
    out = {}
    for name in names: out[name] = out.get(name, 0)+1
    return out


if __name__ == '__main__':
    with contextlib.suppress(ImportError):
        import uvloop
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    json.dump(asyncio.run(Load(json.load(sys.stdin)).run()), sys.stdout)
