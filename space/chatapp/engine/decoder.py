"""An exported model in onnxruntime: it reads several conversations at once, each in a row of its own.

A row holds the keys and values of what its conversation has read. The graph's GroupQueryAttention reads and writes them
in place (past and present are one buffer), and takes each row's own length from the attention mask:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention

A step of one token a row gives the same bits for a row whatever the other rows are.
"""

import json
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

CGROUP_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
MAX_ROWS = 32
# Memory for the keys and values of all rows together, if one row does not need more alone.
CACHE_BYTES = 2_000_000_000
DTYPES: dict[str, np.dtype] = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}
PAST, PRESENT = "past_key_values.", "present."


def usable_cpus() -> int:
    """The number of CPUs that the process's affinity and its container's limit allow."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU_LIMIT.read_text().split()
        cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # there is no cgroup, or its quota is "max"
        pass
    return cpus


class Decoder:
    """The model in `folder`, computed on `threads` CPUs (None: all usable ones), with MAX_ROWS rows.

    `context_length`: tokens that a row has room for (None: all that the model can read). Memory is taken only for
    tokens that were read. Threads must not share it. A damaged model raises onnxruntime's own errors.
    """

    def __init__(self, folder: Path, threads: int | None = None, context_length: int | None = None) -> None:
        settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        config = settings["model"]
        self._in_place = bool(settings["search"]["past_present_share_buffer"])
        self.context_length = context_length or int(config["context_length"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or usable_cpus()
        options.enable_cpu_mem_arena = False  # it would keep what the longest prompt needed
        self._session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self._logits = next(output for output in self._session.get_outputs() if output.name == "logits")
        self.vocabulary = int(self._logits.shape[-1])
        self._takes_positions = "position_ids" in {each.name for each in self._session.get_inputs()}
        head = int(config["decoder"]["head_size"])
        self._caches = {
            each.name: _Cache(each.shape[1], self.context_length, head, DTYPES[each.type])
            for each in self._session.get_inputs()
            if each.name.startswith(PAST)
        }
        self.lengths = [0] * MAX_ROWS  # tokens that each row has read
        each_token = sum(cache.token_bytes for cache in self._caches.values())
        self.token_room = max(self.context_length, CACHE_BYTES // each_token)  # of all rows together

    def read(self, row: int, ids: Sequence[int]) -> np.ndarray:
        """Read `ids` after what the row has read. Logits of shape (len(ids), vocabulary): after each of them."""
        return self._run(row, np.array([ids], dtype=np.int64))[0]

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Read one token in each of the first len(tokens) rows. Logits of shape (len(tokens), vocabulary)."""
        return self._run(0, np.array(tokens, dtype=np.int64)[:, None])[:, 0]

    def copy(self, source: int, target: int, length: int) -> None:
        """Let the row `target` have read the first `length` tokens of the row `source`, and nothing else."""
        for cache in self._caches.values():
            cache.rows[target, :, :length] = cache.rows[source, :, :length]
        self.lengths[target] = length

    def swap(self, one: int, other: int) -> None:
        """Exchange what two rows have read."""
        first, second = self.lengths[one], self.lengths[other]
        for cache in self._caches.values():
            kept, moved = cache.rows[one, :, :first].copy(), cache.rows[other, :, :second].copy()
            cache.fill(one, moved)
            cache.fill(other, kept)
        self.lengths[one], self.lengths[other] = second, first

    def cut(self, row: int, length: int) -> None:
        """Let the row have read only the first `length` of its tokens."""
        if length < self.lengths[row]:
            for cache in self._caches.values():
                cache.fill(row, cache.rows[row, :, :length].copy())
        self.lengths[row] = length

    def clear(self, row: int) -> None:
        """Forget what the row has read, and give its memory back."""
        for cache in self._caches.values():
            cache.clear(row)
        self.lengths[row] = 0

    def _run(self, first: int, ids: np.ndarray) -> np.ndarray:
        rows, tokens = ids.shape
        lengths = np.array(self.lengths[first : first + rows]) + tokens
        if lengths.max() > self.context_length:
            raise ValueError(f"a row has room for {self.context_length} tokens, not {lengths.max()}")
        reads = {"input_ids": ids, "attention_mask": (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)}
        if self._takes_positions:
            reads["position_ids"] = (lengths - tokens)[:, None] + np.arange(tokens)
        if self._in_place:
            logits = self._run_in_place(slice(first, first + rows), reads)
        else:
            one_by_one = [{name: array[at : at + 1] for name, array in reads.items()} for at in range(rows)]
            logits = np.concatenate([self._run_copied(first + at, each) for at, each in enumerate(one_by_one)])
        self.lengths[first : first + rows] = lengths.tolist()
        return logits

    def _run_in_place(self, rows: slice, reads: dict[str, np.ndarray]) -> np.ndarray:
        logits = np.empty((*reads["input_ids"].shape, self.vocabulary), dtype=DTYPES[self._logits.type])
        binding = self._session.io_binding()
        for name, array in reads.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        for name, cache in self._caches.items():
            part = cache.rows[rows]
            place = ("cpu", 0, part.dtype, part.shape, part.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(name.replace(PAST, PRESENT), *place)
        self._session.run_with_iobinding(binding)
        return logits

    def _run_copied(self, row: int, reads: dict[str, np.ndarray]) -> np.ndarray:
        """For a graph of plain attention (fp16), which gives keys and values in new memory: one row."""
        length, total = self.lengths[row], reads["attention_mask"].sum()
        reads["attention_mask"] = reads["attention_mask"][:, :total]
        past = {name: cache.rows[row : row + 1, :, :length] for name, cache in self._caches.items()}
        logits, *present = self._session.run(
            ["logits", *(name.replace(PAST, PRESENT) for name in past)], {**reads, **past}
        )
        for cache, now in zip(self._caches.values(), present, strict=True):
            cache.rows[row, :, length:total] = now[0, :, length:]
        return np.asarray(logits)


class _Cache:
    """The keys or the values of one layer: `rows` has shape (MAX_ROWS, heads, context, head size)."""

    def __init__(self, heads: int, context_length: int, head_size: int, dtype: np.dtype) -> None:
        shape = (MAX_ROWS, heads, context_length, head_size)
        # The pages of a private map take memory when they are first written.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)}
        self._pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **private)
        self.rows = np.frombuffer(self._pages, dtype).reshape(shape)
        self.token_bytes = heads * head_size * dtype.itemsize

    def fill(self, row: int, content: np.ndarray) -> None:
        """Put `content` (heads, tokens, head size) into a row, and give back the memory that it does not need."""
        self.clear(row)
        self.rows[row, :, : content.shape[1]] = content

    def clear(self, row: int) -> None:
        size = self.rows[row].nbytes
        start = -(-row * size // mmap.PAGESIZE) * mmap.PAGESIZE  # the pages that lie in this row alone
        end = (row + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            self._pages.madvise(mmap.MADV_DONTNEED, start, end - start)
