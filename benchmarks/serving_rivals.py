"""The same bundle behind plain FastAPI, for benchmarks/serving.py: python benchmarks/serving_rivals.py naive|threads
BUNDLE PORT

naive:    a handler as it is often written: `async def`, and the model called in it
threads:  the same as `def`, which FastAPI runs in a pool of forty threads
"""
import sys

from amulet_hybrid.model.classifier import HybridClassifier


def plain(seen):
    return {'predicted_class': seen.label, 'top_class': seen.top, 'confidence': seen.confidence,
            'probabilities': dict(seen.probabilities)}


def naive(folder, threads):
    from fastapi import FastAPI, UploadFile
    app, classifier = FastAPI(), HybridClassifier(folder, enable_caching=False)
    if threads:
        @app.post('/predict/file')
        def predict(files: UploadFile): return plain(classifier.classify(files.file.read()))
    else:
        @app.post('/predict/file')
        async def predict_here(files: UploadFile): return plain(classifier.classify(await files.read()))

    @app.get('/health')
    async def health(): return {}
    return app


if __name__ == '__main__':
    import uvicorn
    uvicorn.run(naive(sys.argv[2], sys.argv[1] == 'threads'), host='127.0.0.1', port=int(sys.argv[3]),
                log_level='warning')
