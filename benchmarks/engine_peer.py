"""The other side of `engine.py`: llama.cpp through its batched API, one case for each line read.

Imports nothing of ours, so that it runs in any environment that has `llama-cpp-python`.
"""

from __future__ import annotations

import json
import random
import sys
import time

import llama_cpp as lib
import numpy as np

PROMPT, TEXT, STREAMS, NEW = 512, 64, 8, 32  # as in engine.py


class Peer:
    def __init__(self, path: str, threads: int) -> None:
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        wanted = lib.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = STREAMS * (TEXT + PROMPT), STREAMS
        wanted.n_batch = wanted.n_ubatch = PROMPT
        wanted.n_threads = wanted.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, wanted)
        self.memory = lib.llama_get_memory(self.context)
        self.batch = lib.llama_batch_init(PROMPT, 0, STREAMS)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def read(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Tokens at positions of sequences; the likeliest next token of each that is asked for."""
        self.batch.n_tokens = len(rows)
        for i, (token, position, sequence, asked) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, asked
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
        assert lib.llama_decode(self.context, self.batch) == 0
        asked = [i for i, row in enumerate(rows) if row[3]]
        return [int(self._logits(i).argmax()) for i in asked]

    def _logits(self, i: int) -> np.ndarray:
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, i), (self.vocabulary,))

    def prompt(self, sequence: int, length: int) -> int:
        source = random.Random(sequence)
        return self.read([(source.randrange(10, 40000), i, sequence, i == length - 1) for i in range(length)])[0]

    def time(self, case: str) -> tuple[float, float]:
        lib.llama_memory_clear(self.memory, True)
        if case.startswith("prefill"):
            return self._timed(lambda: self.prompt(0, PROMPT))
        tokens = [self.prompt(sequence, TEXT) for sequence in range(STREAMS if "8" in case else 1)]

        def go_on() -> None:
            last = tokens
            for step in range(NEW):
                last = self.read([(token, TEXT + step, sequence, True) for sequence, token in enumerate(last)])

        return self._timed(go_on)

    def _timed(self, work) -> tuple[float, float]:
        started, busy = time.perf_counter(), time.process_time()
        work()
        return time.perf_counter() - started, time.process_time() - busy


if __name__ == "__main__":
    peer = Peer(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(peer.time(line.strip())), flush=True)
