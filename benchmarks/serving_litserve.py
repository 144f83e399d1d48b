"""The same bundle behind LitServe, for benchmarks/serving.py: python benchmarks/serving_litserve.py WORKERS BUNDLE
PORT. Its worker processes import this file again."""
import sys

import litserve as ls
from fastapi import Request
from serving_rivals import plain

from amulet_hybrid.model.classifier import HybridClassifier


class Photos(ls.LitAPI):
    def __init__(self, bundle):
        super().__init__(api_path='/predict/file')
        self.bundle = bundle

    def setup(self, device): self.classifier = HybridClassifier(self.bundle, enable_caching=False)
    def decode_request(self, request: Request): return request['files'].file.read()
    def predict(self, photo): return self.classifier.classify(photo)
    def encode_response(self, seen): return plain(seen)


if __name__ == '__main__':
    workers = int(sys.argv[1])
    folder = sys.argv[2]
    port = int(sys.argv[3])
    server = ls.LitServer(Photos(folder), accelerator='cpu', workers_per_device=workers)
    server.run(host='127.0.0.1', port=port, generate_client_file=False, num_api_servers=1, log_level='warning')
