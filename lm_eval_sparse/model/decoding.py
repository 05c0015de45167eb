"""Answers decoded by our own decoder: made and tried once, then as many prompts side by side as memory takes."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.utils_hf import clear_torch_cache
from torch import Tensor

from ..errors import UserError
from ..protocol import window_of
from ..runtime import probe
from ..runtime.accounting import RowCounts
from ..runtime.cache import SparseCache
from ..runtime.decoder import Decoder
from ..runtime.memory import MemoryModel, out_of_memory
from ..runtime.rounding import rows_alike
from ..runtime.rows import Row, undecodable
from .load import first_line
from .sampling import Sampling, Stop

if TYPE_CHECKING:
    from .lm import SparseHFLM

logger = logging.getLogger(__name__)

#: Tokens that answers get room for at first: more is made when they turn out longer.
RESERVE = 1024


def prompt_ids(lm: SparseHFLM, context: str, room: int) -> Tensor:
    """Token ids `(1, L)` of a prompt, as lm-eval makes them and truncates them to `room`."""
    ids, _ = lm.tok_batch_encode([context], left_truncate_len=room, truncation=lm.truncation)
    if not ids.shape[1]:
        raise UserError(
            "a prompt is empty, so there is nothing to continue: give the task one, or type add_bos_token=True"
        )
    return ids.to(lm.device)


class Decoding:
    """Decodes the answers of a `SparseHFLM`.

    Attributes:
        decoder: decodes answers; None until the first one, or where the model cannot be decoded by it.
        reason: why it cannot.
        halved: batches that had to be halved because memory ran out.
    """

    def __init__(self, lm: SparseHFLM):
        self.lm = lm
        self.decoder: Decoder | None = None
        self.reason: str | None = None
        self.halved = 0
        self._said: set[str] = set()
        #: Prompts decoded side by side at most, once memory has run out with more.
        self._fitting: int | None = None

    def get(self, instead: str = "answers are decoded by transformers") -> tuple[Decoder | None, str | None]:
        """What decodes answers, or why it cannot; what happens `instead` is said once."""
        if self.decoder is None and self.reason is None:
            with self.lm.clock.checking():
                self.reason = self._make()
            if self.reason is not None:
                self.decoder = None
        if self.reason is not None and instead not in self._said:
            self._said.add(instead)
            logger.warning("%s: %s", instead, self.reason)
        return self.decoder, self.reason

    def release(self) -> None:
        """Let go of the storage of the rows that were decoded."""
        if self.decoder is not None:
            self.decoder.release()

    def answers(
        self,
        waiting: list[tuple],
        tokens: list[int],
        room: int,
        sampling: Sampling,
        until: list[str],
    ) -> Iterator[tuple[tuple, list[int], RowCounts]]:
        """Answer requests `(index, context, generation arguments)`, the longest first: each with the tokens generated.

        Args:
            tokens: of each prompt, cut to `room`.
            room: tokens that a prompt may have.
        """
        decoder = self.decoder
        self._fitting = None
        while waiting:
            some = self._some(tokens, sampling.limit(tokens[-1]), decoder)
            looked_at = [item[0] in self.lm.generator.diagnosed for item in waiting[:some]]
            if any(looked_at):  # one sample of `diagnose=N`, or those before it
                some = looked_at.index(True) or 1
            batch = waiting[:some]
            prompts = [prompt_ids(self.lm, item[1], room) for item in batch]
            failed = None
            try:
                counts = [self.lm.generator.new_counts(item[0]) for item in batch]
                windows = [window_of(item[1]) for item in batch]
                # A prompt that is sampled several times gets several answers.
                draws = [self.lm.generator.draws[item[0]] for item in batch]
                answers = self._decode(decoder, prompts, counts, sampling, until, draws, windows)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                failed = first_line(error)
            if failed is not None:  # the error is gone, and with it what it kept alive
                decoder.release()
                clear_torch_cache()
                self._fewer(len(batch), prompts[0].shape[1], failed)
                continue
            waiting, tokens = waiting[some:], tokens[some:]
            yield from ((item, *answer) for item, answer in zip(batch, answers, strict=True))

    def _some(self, lengths: list[int], reserve: int, decoder: Decoder) -> int:
        """How many of the next prompts (tokens each, the longest first) to decode side by side."""
        lm = self.lm
        plan = lm.runtime.plan
        if str(lm.batch_size).startswith("auto"):
            room = min(reserve, RESERVE)
            fitting = self.memory.rows(lengths, room, plan, decoder.held_bytes())
            most = min(int(lm.max_batch_size or decoder.most), fitting)
        else:
            most = int(lm.batch_size)
        decoder.ask(most)
        return max(1, min(most, decoder.most, len(lengths), self._fitting or len(lengths)))

    @cached_property
    def memory(self) -> MemoryModel:
        """What decides how many prompts `batch_size=auto` takes."""
        return MemoryModel(self.lm.model, self.lm.runtime, self.lm.device)

    def _fewer(self, rows: int, length: int, reason: str) -> None:
        """Go on with half as many rows after memory ran out, or say that not even one fits."""
        if rows == 1:
            raise UserError(
                f"memory ran out with a single prompt of {length} tokens ({reason}): evaluate shorter prompts, or give "
                "max_length= or dtype= to need less"
            )
        self._fitting = rows // 2
        self.halved += 1
        logger.warning(
            "memory ran out with %d prompts side by side, the longest of %d tokens: trying again with %d",
            rows, length, self._fitting,
        )  # fmt: skip

    def _decode(
        self,
        decoder: Decoder,
        prompts: list[Tensor],
        counts: list[RowCounts],
        sampling: Sampling,
        until: list[str],
        draws: list[int],
        windows: list[int | None],
    ) -> list[tuple[list[int], RowCounts]]:
        """Tokens generated after prompts, which are prefilled one after the other and decoded side by side.

        `counts` are where they are counted, `draws` how often each was asked before, `windows` what their tasks say.
        """
        lm = self.lm
        limits = [sampling.limit(ids.shape[1]) for ids in prompts]
        decoder.start([ids.shape[1] for ids in prompts], min(max(limits), max(RESERVE, decoder.grown)))
        rows: list[Row] = []
        lookback = Stop.lookback(lm.tokenizer, until)
        ends = {lm.eot_token_id, *sampling.ends}
        for ids, limit, draw, window, own in zip(prompts, limits, draws, windows, counts, strict=True):
            length = ids.shape[1]
            chooser = sampling.row(ids, Counter({tuple(ids[0].tolist()): draw} if draw else ()))
            row = Row(length, own, Stop(lm.tokenizer, lookback, ends, limit), chooser)
            cache = decoder.new_cache(length)
            with lm.runtime.running(row.counts, cache, length, window):
                logits = self._prefill(ids, cache, sampling.chunk)[0, -1]
            decoder.adopt(row, cache)
            del cache  # window layers keep the whole prompt's keys and values alive
            row.take(int(logits.argmax()) if chooser is None else chooser(logits, row.tokens))
            rows.append(row)
        lm.summary.expect([ids.shape[1] for ids in prompts], decoder.reserve)
        lm.clock.switch("decode")
        decoder.run(rows)
        return [(row.tokens, row.counts) for row in rows]

    def _prefill(self, ids: Tensor, cache: SparseCache, chunk: int | None) -> Tensor:
        """Logits `(1, 1, V)` behind a prompt, read at once or in chunks of so many tokens."""
        length = ids.shape[1]
        for first in range(0, length, chunk or length):
            part = ids[:, first : first + (chunk or length)]
            positions = torch.arange(first, first + part.shape[1], device=self.lm.device)[None]
            logits = self.lm.forward(part, cache=cache, positions=positions, keep=1)
        return logits

    @torch.no_grad()
    def _make(self) -> str | None:
        """Make the decoder and let it predict one token; returns why it cannot be used, or None."""
        lm = self.lm
        if (reason := undecodable(lm.model.config, lm.runtime)) is not None:
            return reason
        if "position_ids" not in inspect.signature(lm.model.forward).parameters:
            return "the model takes no positions"
        if len({parameter.device for parameter in lm.model.parameters()}) > 1:
            return "the model is spread over several devices"

        def call(ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
            return lm.forward(ids, cache=cache, positions=positions, step=True)[:, -1]

        mixed = None if lm.mixed_precision_dtype is None else "mixed precision"
        multiple = None
        if lm.device.type == "cpu" and lm.model.dtype in (torch.bfloat16, torch.float16):
            multiple = rows_alike(lm.model)
        decoder = Decoder(
            call, lm.model.config, lm.runtime, lm.device, multiple, no_graph=mixed, landed=lm.clock.landed
        )
        for stretch in lm.lengths.stretches:  # they stretch the positions of all rows by the longest one
            decoder.alone = f"positions of kind {stretch.kind!r} depend on the neighbours"
        ids, watch = lm.trial, probe.Probe(lm.runtime)
        plan, lm.runtime.plan = lm.runtime.plan, type(lm.runtime.plan)()
        try:
            decoder.start([ids.shape[1] - 1], 2)
            cache = decoder.new_cache(ids.shape[1] - 1)
            row = Row(ids.shape[1] - 1, RowCounts(), lambda tokens: False, None)
            with watch.watching():
                with lm.runtime.running(row.counts, cache, row.prompt):
                    self._prefill(ids[:, :-1], cache, None)
                decoder.adopt(row, cache)
                row.take(int(ids[0, -1]))
                watch.decodes = True
                found = decoder.try_one(row)
                if not torch.equal(found, decoder.try_one(row, claims=lm.runtime.longest - 1)):
                    return "what the model computes depends on how long its cache says to be"
            wanted = lm.forward(ids, cache=None, keep=1)[0, -1]
            if not probe.alike(lm.model, lm.forward, lm.runtime, ids, found, wanted):
                return f"decoded logits are {probe.distance(found, wanted):.2g} off those of a pass without a cache"
        except Exception as error:  # modelling code of any age
            if out_of_memory(error):
                raise
            return first_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
        finally:
            lm.runtime.plan = plan
        decoder.release()
        self.decoder = decoder
        return None


__all__ = ["Decoding", "prompt_ids"]
