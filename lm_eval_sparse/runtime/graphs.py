"""Steps of decoding as CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .memory import out_of_memory

logger = logging.getLogger(__name__)


class Graphs:
    """A step that is captured once for each number of rows, and replayed.

    Args:
        step: runs it; reads and writes nothing but static tensors.
        written: gives those that it goes on from, so that capturing leaves no trace.
        refused: why steps must not be captured, if so.
    """

    def __init__(self, step: Callable[[], None], written: Callable[[], Sequence[Tensor]], refused: str | None):
        self._step, self._written, self.refused = step, written, refused
        self._graphs: dict[int, Any] = {}
        self._memory: Any = None

    def get(self, rows: int) -> Any:
        """The captured step for so many rows, which are loaded, or None where it cannot be captured."""
        if rows not in self._graphs and self.refused is None:
            try:
                self._graphs[rows] = self._capture()
            except Exception as error:  # modelling code of any kind
                if out_of_memory(error):
                    raise
                lines = str(error).strip().splitlines() or [""]
                self.refused = f"the step cannot be captured ({type(error).__name__}: {lines[0]})"
                logger.warning("decoding runs without CUDA graphs: %s", self.refused)
        return self._graphs.get(rows)

    def clear(self) -> None:
        """Drop what was captured. The memory pool ends with its last graph: the next one begins another."""
        self._graphs.clear()
        self._memory = None

    def _capture(self) -> Any:
        statics = self._written()
        before = [tensor.clone() for tensor in statics]

        def again() -> None:
            for tensor, value in zip(statics, before, strict=True):
                tensor.copy_(value)

        mode = torch.cuda.get_sync_debug_mode()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self._step()  # kernels are compiled and tensors made
                again()
                # A step that waits for the device would break the capture, and what comes after it.
                torch.cuda.set_sync_debug_mode("error")
                self._step()
                again()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream().wait_stream(stream)
            again()
        graph = torch.cuda.CUDAGraph()
        if self._memory is None:
            # One step runs at a time and leaves its results in static tensors: what is in between can share memory.
            self._memory = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._memory):
            self._step()
        return graph
