"""Make thousands of hostile photos, and see what they do to Python and to a service in a small container

    python benchmarks/hostile.py                                      # 5,000 files against Python
    python benchmarks/hostile.py --service --memory 512               # the worst 2,000 against `amulet serve`, 512 MB
    python benchmarks/hostile.py --estimate --memory 1024             # the same without the first part
    python benchmarks/hostile.py --files 300 --service --worst 100    # a small one
    python benchmarks/hostile.py --make corpus                        # write them into a folder

Each file goes through `read_image` in a process of its own kind: time, growth of memory and verdict are noted, also
those of the process that decodes what takes long. Then the worst are sent to a started service, whose memory is
limited by a control group of its own (version 1 or 2, where this user may make one; else by AMULET_MEMORY_LIMIT, which
the service keeps to by itself). Between them goes a usual photo, which has to be answered.

What has to hold: no process dies, no answer is a 5xx but an honest 503, and no file takes longer than `decode_seconds`.
"""
import argparse
import http.client
import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from PIL import Image

BIN = Path(sys.executable).parent


def encode(image, format='PNG', **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()

def scene(width=96, height=72, mode='RGB', seed=0):
    "Something with edges and slopes"
    slope = Image.linear_gradient('L').rotate(30*seed).resize((width, height))
    mirrored = slope.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return Image.merge('RGB', [slope, slope.rotate(180), mirrored]).convert(mode)

def segment(kind, body): return bytes((0xff, kind))+struct.pack('>H', len(body)+2)+body
def chunk(kind, body): return struct.pack('>I', len(body))+kind+body+struct.pack('>I', zlib.crc32(kind+body))

def png(width, height, bits=8, colour=2, rows=b'', interlace=0, extra=b'', level=9):
    "A PNG with a header of our choice, and rows as they are given"
    head = struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, interlace)
    palette = chunk(b'PLTE', bytes(range(256))*3) if colour==3 else b''
    return (b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', head)+palette+extra+chunk(b'IDAT', zlib.compress(rows, level))
            +chunk(b'IEND', b''))

def png_rows(width, height, bits, colour):
    return bytes(height*(1+(width*bits*{0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]+7)//8))

def riff(*chunks):
    body = b''.join(part+bytes(len(part)&1) for part in chunks)
    return b'RIFF'+struct.pack('<I', len(body)+4)+b'WEBP'+body

def part(name, body): return name+struct.pack('<I', len(body))+body
def u24(*values): return b''.join(v.to_bytes(3, 'little') for v in values)

def animation(width, height, frames, picture, flags=0x12, left=0, top=0, box=(1, 1)):
    "A WEBP with a canvas and frames of our choice"
    frame = part(b'ANMF', u24(left, top, box[0]-1, box[1]-1, 10)+b'\0'+picture)
    head = part(b'VP8X', bytes((flags, 0, 0, 0))+u24(width-1, height-1))
    return riff(head, part(b'ANIM', bytes(6)), *[frame]*frames)

def bmp(width, height, body, bits=8, coding=1):
    palette = bytes(1024) if bits <= 8 else b''
    head = struct.pack('<IiiHHIIiiII', 40, width, height, 1, bits, coding, len(body), 0, 0, 256 if palette else 0, 0)
    return b'BM'+struct.pack('<IHHI', 54+len(palette)+len(body), 0, 0, 54+len(palette))+head+palette+body

def with_exif(jpeg, block): return jpeg[:2]+segment(0xe1, b'Exif\0\0'+block[:65_000])+jpeg[2:]

def tiff(entries, order='<', first=8, count=None, tail=b''):
    "A TIFF block with one table: (tag, kind, count, value)"
    head = (b'II*\0' if order=='<' else b'MM\0*')+struct.pack(order+'I', first)
    rows = b''.join(struct.pack(order+'HHII', *entry) for entry in entries)
    return head+struct.pack(order+'H', len(entries) if count is None else count)+rows+bytes(4)+tail


class Corpus:
    "Hostile files, the same ones for the same seed"
    def __init__(self, seed=0):
        self.rng = random.Random(seed)
        self.kept = {}
        self.kinds = [name.removeprefix('make_') for name in dir(self) if name.startswith('make_')]

    def keep(self, key, make):
        "What takes long to make is made once"
        if key not in self.kept: self.kept[key] = make()
        return self.kept[key]

    def photo(self, format='JPEG', width=96, height=72, mode='RGB', **options):
        key = (format, width, height, mode, *sorted(options.items()))
        return self.keep(key, lambda: encode(scene(width, height, mode), format, **options))

    def side(self): return self.rng.choice((64, 500, 2000, 3000, 4096, 5000, 7000, 8000, 8190))

    def seeds(self):
        "One honest file of every kind"
        return [self.photo(), self.photo(progressive=True), self.photo(mode='L'), self.photo(mode='CMYK'),
                self.photo(restart_marker_rows=1), self.photo('PNG'), self.photo('PNG', mode='P'),
                self.photo('PNG', mode='RGBA'), self.photo('PNG', mode='I;16'), self.photo('GIF', mode='P'),
                self.photo('BMP'), self.photo('WEBP'), self.photo('WEBP', lossless=True),
                self.photo('WEBP', mode='RGBA'),
                self.keep('moving', lambda: encode(scene(), 'GIF', save_all=True, append_images=[scene(seed=1)]*5)),
                self.keep('apng', lambda: encode(scene(), 'PNG', save_all=True, append_images=[scene(seed=1)]*5)),
                self.keep('webp', lambda: encode(scene(), 'WEBP', save_all=True, append_images=[scene(seed=1)]*5)),
                self.photo('TIFF'), self.photo('TIFF', compression='tiff_lzw'), *self.boxed()]

    def make_repeated_scans(self):
        side = self.side()
        data = self.photo('JPEG', side, side//self.rng.choice((1, 2, 9)), self.rng.choice(('L', 'RGB', 'CMYK')),
                          progressive=True, quality=self.rng.choice((1, 50)))
        starts = [i for i in range(len(data)) if data.startswith(b'\xff\xda', i)]
        which = self.rng.randrange(len(starts))
        end = data.find(b'\xff\xc4', starts[which]) if which+1 < len(starts) else len(data)-2
        one = data[starts[which]:max(end, starts[which]+12)][:100_000]
        times = min(self.rng.choice((3, 30, 89, 99, 1000, 50_000)), 20_000_000//len(one))
        return data[:-2]+one*times+data[-2:]

    def make_scan_disguises(self):
        "Ends in comments, fill bytes before markers, tables between scans"
        data = self.photo('JPEG', 2000, 1500, 'L', progressive=True)
        last = data[data.rindex(b'\xff\xda'):-2]
        between = self.rng.choice((segment(0xfe, b'\xff\xd9'*9), b'\xff'*99, segment(0xc4, bytes(17)),
                                   segment(0xdd, b'\0\1'), b'\xff\xd9', segment(0xe1, b'Exif\0\0'+bytes(99))))
        return data[:-2]+(between+last)*self.rng.choice((5, 80, 5000))+data[-2:]

    def make_segment_floods(self):
        data = self.photo()
        one = self.rng.choice((segment(0xe1, b'Exif\0\0'+bytes(9)), segment(0xfe, b''), segment(0xdb, bytes(65)),
                               segment(0xe2, b'ICC_PROFILE\0\1\xff'+bytes(60)),
                               segment(0xed, b'Photoshop 3.0\0'+bytes(30)),
                               segment(0xe2, b'MPF\0'+tiff([(0xb001, 4, 1, 9)]*9)), b'\xff', b'\0',
                               segment(0xee, b'Adobe'+bytes(7))))
        return data[:2]+one*self.rng.choice((100, 5000, 2_000_000//len(one)))+data[2:]

    def make_jpeg_headers(self):
        "Sizes, sampling and precision that the data does not bear out"
        data = bytearray(self.photo(progressive=self.rng.random() < .5))
        at = next(i for i in range(len(data)) if data[i]==0xff and data[i+1] in (0xc0, 0xc2))
        width,height = self.rng.choice(((65_500, 1000), (8000, 8000), (0, 72), (96, 0), (65_535, 65_535),
                                        (12_000, 5500)))
        data[at+5:at+9] = struct.pack('>HH', height, width)
        if self.rng.random() < .5: data[at+11] = self.rng.choice((0x11, 0x44, 0x14, 0x41, 0x00, 0xff))
        if self.rng.random() < .2: data[at+1] = self.rng.choice((0xc1, 0xc3, 0xc5, 0xc9, 0xca, 0xcb))
        if self.rng.random() < .1: data[at+4] = 12
        return bytes(data)

    def make_large_jpegs(self):
        "Honest and large: the most that the limits let in"
        width,height = self.rng.choice(((8190, 8190), (11_000, 6000), (32_000, 2000), (5712, 4284)))
        return self.photo('JPEG', width, height, self.rng.choice(('L', 'RGB', 'CMYK')),
                          quality=self.rng.choice((5, 60)),
                          progressive=self.rng.random() < .5, subsampling=self.rng.choice((0, 2)))

    def make_png_floods(self):
        data = self.photo('PNG')
        one = self.rng.choice((chunk(b'IDAT', b''), chunk(b'tEXt', b'a\0b'), chunk(b'fcTL', bytes(26)),
                               chunk(b'PLTE', bytes(3)),
                               chunk(b'IHDR', data[16:29]), chunk(b'tRNS', bytes(6)), chunk(b'acTL', b'\xff'*8)))
        at = self.rng.choice((33, len(data)-12))
        return data[:at]+one*self.rng.choice((10, 5000, 2_000_000//len(one)))+data[at:]

    def make_zip_bombs(self):
        "Texts, profiles and EXIF that unpack to megabytes, hundreds of times"
        data = self.photo('PNG')
        packed = self.keep('packed', lambda: zlib.compress(bytes(20_000_000), 9))
        one = self.rng.choice((chunk(b'zTXt', b'Comment\0\0'+packed), chunk(b'iCCP', b'icc\0\0'+packed),
                               chunk(b'iTXt', b'XML:com.adobe.xmp\0\1\0\0\0'+packed),
                               chunk(b'eXIf', tiff([(0x112, 2, 2**31, 8)]))))
        return data[:33]+one*self.rng.choice((1, 30, 300))+data[33:]

    def make_png_surplus(self):
        "More rows than the header says"
        rows = png_rows(64, 64, 8, 2)+bytes(self.rng.choice((1000, 10**6, 10**8)))
        return png(64, 64, rows=rows)

    def make_png_headers(self):
        "Large and full, of every depth: what is small as a file and large as a picture"
        bits,colour = self.rng.choice(((1, 0), (8, 0), (16, 0), (8, 2), (16, 2), (8, 3), (4, 3), (16, 4), (8, 6),
                                       (16, 6)))
        width,height = self.rng.choice(((5000, 5000), (8190, 8190), (32_000, 2000), (2000, 32_000), (3000, 3000)))
        full = self.rng.random() < .6
        extra = self.rng.choice((b'', chunk(b'tRNS', bytes({0: 2, 2: 6, 3: 256}.get(colour, 0)))))
        key = ('png', bits, colour, width, height, full, extra)
        return self.keep(key,
                         lambda: png(width, height, bits, colour,
                                     png_rows(width, height, bits, colour) if full else bytes(999),
                                          0, extra))

    def make_png_interlaced(self):
        bits,colour = self.rng.choice(((8, 2), (16, 6), (1, 0), (8, 3)))
        side = self.rng.choice((500, 3000, 8000))
        return self.keep(('interlaced', bits, colour, side), lambda: png(side, side, bits, colour,
                         bytes(len(png_rows(side, side, bits, colour))*2+99), 1))

    def make_png_lies(self):
        width,height = self.rng.choice(((2**31-1, 10), (60_000, 60_000), (0, 0), (8000, 8300), (64*2**20, 1),
                                        (32_768, 100)))
        return png(width, height, rows=bytes(100))

    def make_gif_floods(self):
        data = self.photo('GIF', mode='P')
        at = 13+(3<<(data[10]&7)+1)
        one = self.rng.choice((b'!\xfe'+b'\1x'*200+b'\0', b'!\xf9\4\0\0\0\0\0', b'!\xff\x0bNETSCAPE2.0\3\1\0\0\0',
                               b'\0'*99))
        frame = data[data.index(b',', at):-1]
        way = self.rng.random()
        if way < .5: return data[:at]+one*self.rng.choice((9, 900, 2_000_000//len(one)))+data[at:]
        return data[:-1]+frame*self.rng.choice((3, 300, 3_000_000//len(frame)))+b';'

    def make_gif_lies(self):
        "Canvases, and frames that lie outside of them"
        data = bytearray(self.photo('GIF', mode='P'))
        at = data.index(b',', 13+(3<<(data[10]&7)+1))
        big = self.rng.choice((5000, 8100, 30_000, 65_535))
        if self.rng.random() < .5: data[6:10] = struct.pack('<HH', big, self.rng.choice((big, 100)))
        else: data[at+1:at+5] = struct.pack('<HH', big, self.rng.choice((big, 100)))
        if self.rng.random() < .3: data[at+5:at+9] = struct.pack('<HH', big, big)
        return bytes(data)

    def make_webp_animations(self):
        width,height = self.rng.choice(((5000, 5000), (8190, 8190), (16_383, 4000), (16_384, 16_384), (64, 64)))
        frames = self.rng.choice((1, 2, 100, 5000))
        if self.rng.random() < .5:
            picture = self.photo('WEBP', 2, 2, lossless=True)[12:]
            return animation(width, height, frames, picture, left=self.rng.choice((0, 9, 10**6)), box=(2, 2))
        side = self.rng.choice((2000, 5000))
        picture = self.photo('WEBP', side, side, lossless=self.rng.random() < .5, method=0)[12:]
        return animation(side, side, min(frames, 9), picture, box=(side, side))

    def make_webp_stills(self):
        side = self.rng.choice((2000, 5000, 8000))
        way = self.rng.choice(('flat', 'scene', 'alpha'))
        image = Image.new('RGB', (side, side), 'red') if way=='flat' else None
        make = (lambda: encode(image, 'WEBP', lossless=True)) if image else (
            lambda: encode(scene(side, side, 'RGBA' if way=='alpha' else 'RGB'), 'WEBP', method=0, quality=10))
        return self.keep(('webp', side, way), make)

    def make_webp_lies(self):
        data = bytearray(self.photo('WEBP', lossless=self.rng.random() < .5))
        way = self.rng.randrange(4)
        if way==0: data[21:25] = struct.pack('<I', self.rng.getrandbits(32))
        elif way==1: data[26:30] = struct.pack('<HH', 16_383, 16_383)
        elif way==2: data[4:8] = struct.pack('<I', self.rng.choice((0, 10, 2**32-1)))
        else: return riff(part(b'VP8X', b'\x10\0\0\0'+u24(4999, 4999)),
                          *[part(b'ALPH', b'\0'*9)]*self.rng.choice((1, 50_000)), bytes(data[12:]))
        return bytes(data)

    def make_bmp_runs(self):
        width,height = self.rng.choice(((2000, 2000), (5000, 5000), (8190, 8190), (64, 64)))
        one = self.rng.choice((b'\1\5', b'\0\5ABCDE\0', b'\0\2\1\1', b'\0\2\xff\xff', b'\xff\7', b'\0\0', b'\0\1',
                               b'\0\5'))
        return bmp(width, height, one*(self.rng.choice((1000, 200_000, 4_000_000))//len(one)), 8, 1)

    def make_bmp_lies(self):
        bits,coding = self.rng.choice(((24, 0), (32, 0), (32, 3), (1, 0), (4, 2), (8, 0), (16, 3), (64, 0), (8, 5)))
        size = self.rng.choice(((8000, 8000), (5000, -5000), (2**31-1, 2**31-1), (100, -2**31), (0, 9)))
        return bmp(*size, bytes(self.rng.choice((10, 10_000))), bits, coding)

    def boxed(self):
        "Honest AVIF files, and HEIC where it can be written"
        found = [self.photo('AVIF', speed=10), self.photo('AVIF', mode='RGBA', speed=10),
                 self.photo('AVIF', 1500, 1100, speed=10)]
        if find_spec('pillow_heif'):
            from pillow_heif import from_pillow
            def heic(image):
                from_pillow(image).save(out := io.BytesIO(), quality=50)
                return out.getvalue()
            found += [self.keep('heic', lambda: heic(scene())), self.keep('large heic', lambda: heic(scene(900, 700)))]
        return found

    def make_box_lies(self):
        data = bytearray(self.rng.choice(self.boxed()))
        way,end = self.rng.randrange(5),min(len(data)-8, 400)
        if way==0: # sizes that the picture does not have
            at = data.find(b'ispe')+8
            data[at:at+8] = struct.pack('>II', *self.rng.choice(((8000, 8000), (2**31, 2**31), (1, 1), (0, 9))))
        elif way==1: # a box that is larger than the file, or has no content
            at = data.find(self.rng.choice((b'meta', b'iprp', b'ipco', b'iloc', b'mdat', b'av1C')))
            if at > 4: data[at-4:at] = self.rng.choice((b'\xff\xff\xff\xff', bytes(4), b'\0\0\0\1', b'\0\0\0\x08'))
        elif way==2:
            for _ in range(self.rng.randrange(1, 9)): data[8+self.rng.randrange(end)] = self.rng.randrange(256)
        elif way==3: # in the coded picture
            for _ in range(self.rng.randrange(1, 30)):
                data[-1-self.rng.randrange(len(data)//2)] = self.rng.randrange(256)
        else: return bytes(data[:self.rng.randrange(len(data))])
        return bytes(data)

    def make_tiff_lies(self):
        rng,side = self.rng,self.side()
        size = rng.choice(((side, side), (8000, 8000), (2**31, 2**31), (0, 9), (32_000, 2000)))
        body = rng.choice((zlib.compress(bytes(20_000_000)), bytes(5000), rng.randbytes(5000), b'\x81\0'*5000))
        samples = rng.choice((1, 3, 4, 5, 60_000))
        rows = [(0x100, 4, 1, size[0]), (0x101, 4, 1, size[1]), (0x102, 3, 1, rng.choice((1, 8, 16, 32, 64))),
                (0x103, 3, 1, rng.choice((1, 3, 4, 5, 7, 8, 32773, 34712, 34925, 50000, 50001))),
                (0x106, 3, 1, rng.choice((0, 1, 2, 3, 5, 6, 8))), (0x112, 3, 1, rng.randrange(10)),
                (0x115, 3, 1, samples)]
        if rng.random() < .5: # strips
            rows += [(0x111, 4, 1, 200), (0x116, 4, 1, rng.choice((1, 64, 2**31, size[1]))),
                     (0x117, 4, 1, rng.choice((len(body), 0, 2**32-1)))]
        else: # tiles
            rows += [(0x142, 4, 1, rng.choice((16, 256, 65_536, 2**31))),
                     (0x143, 4, 1, rng.choice((16, 65_536, 2**31))),
                     (0x144, 4, 1, 200), (0x145, 4, 1, rng.choice((len(body), 2**32-1)))]
        head = tiff(sorted(rows))
        return head.ljust(200, b'\0')+body

    def make_exif_breakage(self):
        rng = self.rng
        pointing = self.keep('pointing', lambda: tiff([(i, 2, 60_000, 0) for i in range(5400)]))
        blocks = (b'', b'MM\0*', tiff([(0x112, 3, 1, 9)]), tiff([(0x8825, 4, 1, 0)]), tiff([(0x8769, 4, 1, 8)]),
                  pointing,
                  tiff([(0x112, 3, 1, 6)], count=65_535), tiff([], first=2**31), rng.randbytes(500),
                  tiff([(0x10f, 2, 2**32-1, 8)]), tiff([(0x112, 12, 1, 6), (0x112, 3, 2**31, 3)], '>'),
                  b'II*\0\x08\0\0\0')
        block = rng.choice(blocks)
        if rng.random() < .3: return self.photo('PNG')[:33]+chunk(b'eXIf', block)+self.photo('PNG')[33:]
        return with_exif(self.photo(), block)

    def make_polyglots(self):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, 'w') as z: z.writestr('a.exe', b'MZ'*999)
        other = self.rng.choice((archive.getvalue(), b'<html><script>alert(1)</script>', b'%PDF-1.7\n',
                                 b'<?php system($_GET[0]);',
                                 b'Rar!\x1a\7\1\0', b'#!/bin/sh\n', self.photo('PNG'), bytes(10**6)))
        data = self.rng.choice(self.seeds())
        if data[:2]==b'\xff\xd8' and self.rng.random() < .5: return data[:2]+segment(0xfe, other[:60_000])+data[2:]
        return data+other if self.rng.random() < .8 else other+data

    def make_icc_junk(self):
        icc = self.rng.choice((b'', bytes(128), self.rng.randbytes(5000), b'\xff'*65_000))
        return encode(scene(), self.rng.choice(('JPEG', 'PNG', 'WEBP')), icc_profile=icc or b'x')

    def make_truncated(self):
        data = self.rng.choice(self.seeds())
        return data[:self.rng.randrange(len(data))]

    def make_truncated_large(self):
        data = self.rng.choice((self.make_large_jpegs, self.make_png_headers, self.make_webp_stills))()
        return data[:int(len(data)*self.rng.random())]

    def make_mutated(self):
        data = bytearray(self.rng.choice(self.seeds()))
        for _ in range(self.rng.randrange(1, 20)):
            at = self.rng.randrange(200 if self.rng.random() < .6 else len(data))%max(1, len(data))
            way = self.rng.randrange(5)
            if way==0: del data[at:at+self.rng.randrange(1, 30)]
            elif way==1: data[at:at] = data[at:at+self.rng.randrange(1, 200)]
            elif way==2: data[at:at+4] = self.rng.choice((b'\xff\xff\xff\xff', bytes(4), b'\x7f\xff\xff\xff'))
            elif at < len(data): data[at] = self.rng.randrange(256)
        return bytes(data)

    def make_foreign(self):
        return self.rng.choice((b'', b'\0', b'BM', b'GIF89a', b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n',
                                b'RIFF\xff\xff\xff\xffWEBP',
                                b'II*\0'+self.rng.randbytes(900), b'\0\0\0\x18ftypheic'+bytes(99), b'%PDF-1.7',
                                b'PK\3\4',
                                self.rng.randbytes(self.rng.randrange(1, 9000))))

    def files(self, count):
        "(kind, content): every kind in turn"
        for n in range(count):
            kind = self.kinds[n%len(self.kinds)]
            yield kind,getattr(self, 'make_'+kind)()


DOOR = '''
import json, os, struct, sys, time
from amulet_hybrid.core import AmuletError
from amulet_hybrid.data import decoder
from amulet_hybrid.data.images import read_image
def status(pid, name):
    with open(f'/proc/{pid}/status') as file: return int(next(l for l in file if l.startswith(name)).split()[1])/1024
def forget(pid):
    with open(f'/proc/{pid}/clear_refs', 'w') as file: file.write('5')
while head := sys.stdin.buffer.read(8):
    data = sys.stdin.buffer.read(struct.unpack('>Q', head)[0])
    pids = [os.getpid(), *(d.process.pid for d in decoder._DECODERS)]
    for pid in pids: forget(pid)
    before,start = status('self', 'VmRSS'),time.perf_counter()
    try: code,_ = 'read',read_image(data, at_least=224)
    except AmuletError as error: code = error.code
    except BaseException as error: code = f'!{type(error).__name__}'
    ms = 1000*(time.perf_counter()-start)
    child = max((status(d.process.pid, 'VmHWM') for d in decoder._DECODERS), default=0)
    print(json.dumps({'verdict': code, 'ms': ms, 'mb': status('self', 'VmHWM')-before, 'decoder_mb': child,
                      'elsewhere': bool(decoder._DECODERS) or code=='decode_timeout'}), flush=True)
    for d in list(decoder._DECODERS): decoder._retire(d)
'''

def python_door(files):
    "A row for each file: verdict, milliseconds, MB; `died` where the process did"
    def begin(): return subprocess.Popen([sys.executable, '-c', DOOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process,rows = begin(),[]
    for n,(kind,data) in enumerate(files):
        try:
            process.stdin.write(struct.pack('>Q', len(data))+data)
            process.stdin.flush()
            found = json.loads(process.stdout.readline())
        except (ValueError, OSError):
            found = {'verdict': f'died ({process.wait()})', 'ms': 0, 'mb': 0, 'decoder_mb': 0, 'elsewhere': False}
            process = begin()
        rows.append({'kind': kind, 'bytes': len(data), 'n': n, **found})
    process.stdin.close()
    process.wait()
    return pd.DataFrame(rows)


def estimated_ranks(files):
    "Number of each file, the costliest first by what its container promises; no pixel is decoded"
    from amulet_hybrid.core import AmuletError
    from amulet_hybrid.data.container import image_cost
    from amulet_hybrid.data.images import open_image
    costs = {}
    for n,(_,data) in enumerate(files):
        try: cost = image_cost(open_image(data)._file, 224)
        except AmuletError: continue
        costs[n] = (cost.seconds, cost.memory)
    table = pd.DataFrame(costs, index=['seconds', 'memory']).T
    return table.rank().sum(axis=1).sort_values(ascending=False).index


class Container:
    "A control group with a limit of memory; without the right to make one, only the service's own limit"
    def __init__(self, megabytes):
        self.bytes,self.folder = megabytes*2**20,None
        lines = Path('/proc/self/cgroup').read_text().splitlines() if Path('/proc/self/cgroup').exists() else []
        for line in lines:
            _,kinds,path = line.split(':', 2)
            top,name = ('/sys/fs/cgroup/memory', 'memory.limit_in_bytes') if kinds else ('/sys/fs/cgroup', 'memory.max')
            if kinds not in ('', 'memory') or not (Path(top)/name).exists() and kinds: continue
            folder = Path(top+path)/f'amulet-hostile-{os.getpid()}'
            try:
                folder.mkdir()
                (folder/name).write_text(str(self.bytes))
                self.folder = folder
                break
            except OSError: folder.is_dir() and folder.rmdir()

    def enter(self):
        if self.folder: (self.folder/'cgroup.procs').write_text(str(os.getpid()))

    def peak(self):
        "MB at the most, page cache and all; nan where nobody counts"
        for name in ('memory.max_usage_in_bytes', 'memory.peak'):
            if self.folder and (self.folder/name).exists(): return int((self.folder/name).read_text())/2**20
        return float('nan')

    def kills(self):
        "Processes that the kernel ended for want of memory"
        for name in ('memory.oom_control', 'memory.events'):
            if self.folder and (self.folder/name).exists():
                words = (self.folder/name).read_text().split()
                return int(words[words.index('oom_kill')+1]) if 'oom_kill' in words else 0
        return 0

    def close(self):
        "Away with it, as soon as the last process has left"
        for _ in range(300):
            try: return self.folder and self.folder.rmdir()
            except OSError: time.sleep(.1)


def make_bundle(home, env=None):
    "A small bundle, trained on drawn photos"
    run = {'cwd': home, 'env': env, 'check': True, 'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
    subprocess.run([BIN/'amulet', 'samples', '--output-dir', 'photos', '--photos', '96', '--classes', '3', '--side',
                    '128'], **run)
    subprocess.run([BIN/'amulet', 'train', '--data-dir', 'photos', '--groups', 'photos/groups.csv', '--output-dir',
                    'run', '--quick', '--preset', 'fast', '--weights', 'none'], **run)
    return home/'run'/'bundle'

def ask(port, data, timeout=60):
    "Status, code and milliseconds of one request"
    body = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'+data+b'\r\n--x--\r\n'
    start,connection = time.perf_counter(),http.client.HTTPConnection('127.0.0.1', port, timeout=timeout)
    try:
        connection.request('POST', '/predict/file', body, {'Content-Type': 'multipart/form-data; boundary=x'})
        answer = connection.getresponse()
        said = json.loads(answer.read())
        return answer.status,said.get('error_code', 'answered'),1000*(time.perf_counter()-start)
    except (OSError, http.client.HTTPException, ValueError) as error: return 0,type(error).__name__,0.
    finally: connection.close()

def service_door(files, megabytes, bundle=None, clients=4):
    "Rows of answers, and what the container says"
    with tempfile.TemporaryDirectory(prefix='amulet-hostile-') as folder:
        home = Path(folder)
        bundle = Path(bundle).resolve() if bundle else make_bundle(home)
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        container = Container(megabytes)
        env = {**os.environ, **({} if container.folder else {'AMULET_MEMORY_LIMIT': str(container.bytes)})}
        command = [BIN/'amulet', 'serve', '--model-dir', bundle, '--port', str(port), '--database-url', 'off',
                   '--answer-cache', 'off']
        with (home/'log').open('w') as log:
            process = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=log, preexec_fn=container.enter)
        usual,rows,lock = encode(scene(640, 480), 'JPEG'),[],threading.Lock()
        todo = iter(files)
        try:
            for _ in range(300):
                if ask(port, usual)[0]==200: break
                time.sleep(.2)
            else: raise SystemExit('the service does not answer:\n'+(home/'log').read_text()[-2000:])
            def client():
                while True:
                    with lock: kind,data = next(todo, (None, None))
                    if kind is None: return
                    for name,photo in ((kind, data), ('usual', usual)):
                        status,code,ms = ask(port, photo)
                        with lock: rows.append({'kind': name, 'status': status, 'code': code, 'ms': ms})
            threads = [threading.Thread(target=client) for _ in range(clients)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            alive,peak,kills = process.poll() is None,container.peak(),container.kills()
        finally:
            process.send_signal(signal.SIGTERM)
            try: process.wait(40)
            except subprocess.TimeoutExpired: process.kill(); process.wait()
            container.close()
        return pd.DataFrame(rows),{'MB': megabytes, 'limited by': 'control group' if container.folder else 'itself',
                                   'alive': alive, 'peak MB': round(peak, 1), 'killed': kills}

def by_kind(rows):
    "A line a kind: files, verdicts, the slowest and the largest"
    return rows.groupby('kind').agg(
        files=('ms', 'size'), verdicts=('verdict', lambda v: ', '.join(f'{k} {n}' for k,n in v.value_counts().items())),
        worst_ms=('ms', 'max'), worst_mb=('mb', 'max'), decoder_mb=('decoder_mb', 'max'),
        elsewhere=('elsewhere', 'sum'), stopped=('verdict', lambda v: (v=='decode_timeout').sum())).round(0)

def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('--files', type=int, default=5000)
    options.add_argument('--seed', type=int, default=0)
    options.add_argument('--make', type=Path, help='only write the files into this folder')
    options.add_argument('--service', action='store_true', help='also against a service')
    options.add_argument('--estimate', action='store_true',
                         help='only the service, with the files that are costliest by their estimates')
    options.add_argument('--worst', type=int, default=2000, help='files that the service gets')
    options.add_argument('--memory', type=int, nargs='+', default=[512, 1024], help='MB of the container')
    options.add_argument('--bundle', type=Path, help='to serve; left out: a small one is trained')
    options.add_argument('--output', type=Path, help='CSV of the rows a kind')
    given = options.parse_args()
    if given.make:
        given.make.mkdir(parents=True, exist_ok=True)
        for n,(kind,data) in enumerate(Corpus(given.seed).files(given.files)):
            (given.make/f'{n:05d}_{kind}').write_bytes(data)
        return
    if given.estimate: return print_service(given, estimated_ranks(Corpus(given.seed).files(given.files)))
    start = time.perf_counter()
    rows = python_door(Corpus(given.seed).files(given.files))
    table = by_kind(rows)
    print(table.to_string())
    bad = rows[rows.verdict.str.startswith(('!', 'died'))]
    print(f'{len(rows)} files in {time.perf_counter()-start:.0f} s; faults: {len(bad)}; '
          f'slowest {rows.ms.max():.0f} ms; most memory {rows.mb.max():.0f} MB here, {rows.decoder_mb.max():.0f} MB in '
          'a decoder')
    if len(bad): print(bad.to_string())
    if given.output: table.to_csv(given.output)
    if not given.service: return
    rank = rows.ms.rank()+(rows.mb+rows.decoder_mb).rank()
    print_service(given, rows.loc[rank.sort_values(ascending=False).index, 'n'])

def print_service(given, ranked):
    "What a service makes of the first of these files, in each container"
    worst = set(ranked[:given.worst])
    for megabytes in given.memory:
        files = ((kind, data) for n,(kind,data) in enumerate(Corpus(given.seed).files(given.files)) if n in worst)
        answers,about = service_door(files, megabytes, given.bundle)
        usual = answers[answers.kind=='usual']
        odd = answers[(answers.status >= 500) & (answers.status!=503) | (answers.status==0)]
        print(about, f'answers: {answers[answers.kind!="usual"].code.value_counts().to_dict()}; usual photo: '
              f'{usual.code.value_counts().to_dict()}, median {usual.ms.median():.0f} ms, '
              f'worst {usual.ms.max():.0f} ms; 5xx but 503, or none: {len(odd)}')
        if len(odd): print(odd.value_counts(['kind', 'status', 'code']).to_string())

if __name__=='__main__': main()
