"""Uploads that mean harm, for benchmarks/serving.py: files that are no photos, requests that lie about themselves, slow
senders; and honest photos in odd wrappings"""
import asyncio
import contextlib
import io
import socket
import struct
import time
import zipfile
import zlib


def png(width, height, data=b'', kind=2):
    "A PNG that says so"
    def chunk(name, body): return struct.pack('>I', len(body))+name+body+struct.pack('>I', zlib.crc32(name+body))
    return b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, kind, 0, 0, 0))+chunk(b'IDAT',
            data)+chunk(b'IEND', b'')


def gif(width, height):
    size = struct.pack('<HH', width, height)
    return b'GIF89a'+size+b'\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0'+size+b'\0\2\2D\1\0;'


def zipped(data):
    "An archive with one file"
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive: archive.writestr('a.exe', data)
    return out.getvalue()


def exif(jpeg, block): return jpeg[:2]+b'\xff\xe1'+struct.pack('>H', len(block)+8)+b'Exif\0\0'+block+jpeg[2:]


def harmful(jpeg, rng):
    "Kind -> a file that is to be refused"
    cut = rng.randrange(20, len(jpeg)-200)
    side = rng.randrange(6_000, 65_000)
    svg = (b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]><svg '
           b'xmlns="http://www.w3.org/2000/svg" onload="alert(1)">&b;</svg>')
    fits = b''.join(card.ljust(80) for card in (b'SIMPLE  = T', b'BITPIX  = 8', b'NAXIS   = 2', b'NAXIS1  = 999999'))
    return {
        'bomb png': lambda: png(side, side, zlib.compress(bytes(200_000), 9)), 'bomb png tall': lambda: png(20,
            2_000_000_000), 'bomb gif': lambda: gif(65_535, 65_535),
        'bomb bmp': lambda: b'BM'+struct.pack('<IHHI', 54, 0, 0, 54)+struct.pack('<IiiHHIIiiII', 40, side, -side, 1,
            24, 0, 0, 0, 0, 0, 0),
        'bomb jpeg': lambda: jpeg.replace(struct.pack('>HH', 724, 966), struct.pack('>HH', 65_500, 65_500), 1),
        'truncated': lambda: jpeg[:cut], 'truncated webp': lambda: b'RIFF'+struct.pack('<I', 900_000)+b'WEBPVP8 '
        +rng.randbytes(300), 'empty': lambda: b'',
        'one byte': lambda: b'\xff', 'only a head': lambda: jpeg[:rng.randrange(2,
            160)], 'noise': lambda: rng.randbytes(rng.randrange(1, 60_000)),
        'noise behind a head': lambda: jpeg[:3]+rng.randbytes(3000), 'svg': lambda: svg, 'fits': lambda: (fits
            +b'END'.ljust(80)).ljust(2880)+rng.randbytes(2880),
        'tiff': lambda: b'II*\0\x08\0\0\0\xff\xff'+rng.randbytes(2000), 'ico': lambda: b'\0\0\1\0\xff\xff'
        +rng.randbytes(2000), 'pdf': lambda: b'%PDF-1.7\n'+jpeg[:5000],
        'eps': lambda: b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nsystemdict /quit get exec\n',
        'elf': lambda: b'\x7fELF'+rng.randbytes(4000),
        'html that begins as gif': lambda: b'GIF89a/*<script>alert(1)</script>*/=1;',
        'zip before a photo': lambda: b'PK\3\4'+rng.randbytes(300)+jpeg,
        'heic': lambda: b'\0\0\0\x18ftypheic'+rng.randbytes(2000), 'avif': lambda: b'\0\0\0\x18ftypavif'
        +rng.randbytes(2000),
        'php in png': lambda: png(5, 5, b'<?php system($_GET[0]); ?>'), 'too small': lambda: png(3, 3,
            zlib.compress(bytes(30))),
        'exif alone': lambda: exif(b'\xff\xd8\xff\xd9', b'II*\0\x08\0\0\0\xff\xff'+rng.randbytes(100)),
    }


def clothed(jpeg, rng):
    "Kind -> a photo with odd or broken things around its pixels, which nobody runs or hands out: to be named"
    return {
        'zip behind a photo': lambda: jpeg+zipped(rng.randbytes(300)), 'script behind a photo': lambda: jpeg
        +b'<script>alert(1)</script>',
        'php in a comment': lambda: jpeg[:2]+b'\xff\xfe\0\x1e<?php system($_GET[0]); ?>'.ljust(32)+jpeg[2:],
        'pdf around a photo': lambda: jpeg[:2]+b'\xff\xfe\0\x0b%PDF-1.7\n'+jpeg[2:],
        'exif loop': lambda: exif(jpeg, b'II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0'),
        'exif orientation 9999': lambda: exif(jpeg, b'II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x0f\x27\0\0\0\0\0\0'),
        'exif noise': lambda: exif(jpeg, b'MM\0*'+rng.randbytes(rng.randrange(60_000))),
        'bomb behind the last row': lambda: png(1000, 1000, zlib.compress(bytes(100_000_000), 9)[:-8]),
        'long comment': lambda: jpeg[:2]+(b'\xff\xfe\xff\xff'+b'x'*65_533)*20
        +jpeg[2:], 'another photo behind': lambda: jpeg+jpeg,
            'film behind': lambda: jpeg+b'\0\0\0\x18ftypmp42'+rng.randbytes(9000),
            'odd maker notes': lambda: exif(jpeg, b'II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0'
                                            +rng.randbytes(2000))}


def multipart(photo, name='a.jpg', field='files'):
    return b'--e\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n' % (field.encode(),
            name.encode())+photo+b'\r\n--e--\r\n'


def raw_request(body, length=None, headers=b'', kind=b'multipart/form-data; boundary=e', path=b'/predict/file'):
    return b'POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %s\r\n%s\r\n' % (path, kind,
            str(len(body) if length is None else length).encode(), headers)+body


def wrong(jpeg, rng):
    "Kind -> bytes of a request that lies about itself"
    body, js = multipart(jpeg), {'kind': b'application/json', 'path': b'/predict'}
    chunked = (b'POST /predict/file HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; '
               b'boundary=e\r\nTransfer-Encoding: chunked\r\n\r\n')
    return {
        'length too short': raw_request(body, len(body)//2), 'length negative': raw_request(body, -5),
        'length no number': raw_request(body, 'many'),
        'length huge': raw_request(body[:100], 10**12),
        'length twice': raw_request(body, headers=b'Content-Length: 3\r\n'),
        'length and chunks': raw_request(body, headers=b'Transfer-Encoding: chunked\r\n'),
        'chunk too long': chunked+b'FFFFFFFFFFFFFFFFF\r\n'+body[:1000],
        'chunk that is none': chunked+b'many\r\n'+body[:1000],
        'head without end': b'POST /predict/file HTTP/1.1\r\nHost: x\r\nX-Long: '+b'a'*200_000,
        'no http': rng.randbytes(300)+b'\r\n\r\n',
        'json deep': raw_request(b'{"image_data":'+b'['*5000+b']'*5000+b'}', **js),
        'json cut': raw_request(b'{"image_data": "aaaa', **js),
        'json is a list': raw_request(b'[1,2]', **js),
        'json number': raw_request(b'{"image_data": '+b'9'*100_000+b'}', **js),
        'not base64': raw_request(b'{"image_data": "%%%%"}', **js),
        'not UTF-8': raw_request(b'{"image_data": "\xff\xfe"}', **js),
        'wrong kind': raw_request(jpeg, kind=b'image/jpeg'), 'no kind': raw_request(jpeg, kind=b''),
        'no edge': raw_request(jpeg), 'only an edge': raw_request(b'--e--\r\n'),
        'many photos': raw_request(b''.join(multipart(b'x')[:-7]+b'\r\n' for _ in range(500))+b'--e--\r\n'),
        'odd field': raw_request(multipart(jpeg, field='../../etc/passwd')),
        'photo in a field': raw_request(multipart(jpeg, field='confidence_threshold')),
    }


def ask_raw(port, data, limit=15):
    "Status (0: closed without one, -1: nothing within `limit`) and seconds"
    start = time.perf_counter()
    try:
        with socket.create_connection(('127.0.0.1', port), timeout=limit) as line:
            with contextlib.suppress(OSError): line.sendall(data)
            line.settimeout(max(.1, limit-(time.perf_counter()-start)))
            said = line.recv(4096)
    except TimeoutError: return -1, time.perf_counter()-start
    except OSError: said = b''
    return (int(said[9:12]) if said[:5] == b'HTTP/' else 0), time.perf_counter()-start


async def slow(port, data, step, pause, limit):
    "A sender that takes its time: status and seconds until it is turned away"
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    said = asyncio.ensure_future(reader.read(4096))
    with contextlib.suppress(OSError):
        for i in range(0, len(data), step):
            if said.done() or time.perf_counter()-start > limit: break
            writer.write(data[i:i+step]); await writer.drain()
            await asyncio.wait({said}, timeout=pause)
    with contextlib.suppress(TimeoutError, OSError): await asyncio.wait_for(asyncio.shield(said), 2)
    told = said.result() if said.done() and not said.cancelled() and not said.exception() else None
    said.cancel(); writer.close()
    return (-1 if told is None else int(told[9:12]) if told[:5] == b'HTTP/' else 0), time.perf_counter()-start


async def slow_ones(port, jpeg, count, limit):
    "Some send the head byte by byte, some the body a little at a time"
    data = raw_request(multipart(jpeg))
    head = data[:data.index(b'\r\n\r\n')+4]
    async def one(i):
        return await (slow(port, head[:-4], 1, .3, limit) if i % 2 else slow(port, data, len(head)+20, .4, limit))
    return await asyncio.gather(*(one(i) for i in range(count)))
