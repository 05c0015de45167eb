"""What is recorded of one score of one task in one run, validated: the row that analyses, tables and the Hub share.

A record is made from a result file of lm-eval (`results.records`), or read from a line of `records.jsonl` as `analyze`
writes it. The JSON schema stands in docs/record.schema.json. Knows values only.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import UserError
from .files import brief
from .parts import LARGEST, MOST

#: Raised when a field changes its meaning or goes; a field that comes, with a default, does not raise it.
SCHEMA_VERSION = 1

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(ge=0, le=LARGEST)]
#: The largest whole number that a column of a table holds.
_COLUMN = 2**63 - 1
Count = Annotated[int, Field(ge=0, le=MOST)]
Name = Annotated[str, Field(min_length=1)]

#: By how much the mean of the documents' scores may miss the score, relative to it: lm-eval sums in another order.
_ROUNDING = 1e-6

#: Metrics that are shares of something, in whatever task they stand.
SHARES = ("acc", "acc_norm", "acc_mutual_info", "exact", "exact_match", "average_precision", "iou")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Shape(_Strict):
    """Sizes of a model that its costs follow from; None for what its configuration does not say.

    Attributes:
        layers, attention_layers: all of them, and those with full causal attention, where methods run.
        hidden: width of the residual stream.
        query_heads, kv_heads, head_dim, value_dim: of a layer of full attention.
        mlp: width of the gated MLP that a token passes, on average over layers; of experts those that are active,
            shared ones included.
        vocab: rows of the output matrix.
        window: tokens that the other layers see, where all of them have a sliding window of one size.
        experts: those that a token chooses from, 0 where there are none.
    """

    layers: Count | None = None
    attention_layers: Count | None = None
    hidden: Count | None = None
    query_heads: Count | None = None
    kv_heads: Count | None = None
    head_dim: Count | None = None
    value_dim: Count | None = None
    mlp: Count | None = None
    vocab: Count | None = None
    window: Count | None = None
    experts: Count | None = None


class Range(_Strict):
    """Mean, smallest and largest value of a knob over layers and prompts."""

    mean: float
    min: float
    max: float


class PhaseFigures(_Strict):
    """What was measured of a phase (docs/accounting.md); None where a file does not say it.

    Attributes:
        method: `dense` where the phase has none.
        requested, selected, executed: sparsities.
        bytes_read_fraction, kv_memory_fraction, estimator_flops_fraction: against dense attention.
        calls, backends: attention calls by how they ran, and by the kernel that computed them.
        solved: knobs as they were used.
        mass_kept, output_error, oracle_overlap, auxiliary_bits: means over heads and layers, with `diagnose=N`.
    """

    method: Name = "dense"
    requested: Share | None = None
    selected: Share | None = None
    executed: Share | None = None
    bytes_read_fraction: Positive | None = None
    kv_memory_fraction: Positive | None = None
    estimator_flops_fraction: Positive | None = None
    calls: dict[str, Count] = {}
    backends: dict[str, Count] = {}
    solved: dict[str, Range] = {}
    mass_kept: Positive | None = None
    output_error: Positive | None = None
    oracle_overlap: Positive | None = None
    auxiliary_bits: Positive | None = None


class Documents(_Strict):
    """Scores by document.

    Attributes:
        ids: of each document a hash of it, the same in every run of the task; unique, in the order of the task.
        scores: of each document the metric.
    """

    ids: Annotated[tuple[Name, ...], Field(min_length=1)]
    scores: tuple[float, ...]

    @model_validator(mode="after")
    def _as_many(self) -> Documents:
        if len(self.ids) != len(self.scores):
            raise ValueError(f"{len(self.ids)} documents with {len(self.scores)} scores")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("a document stands here twice")
        return self


class Record(_Strict):
    """One score of one task in one run.

    Attributes:
        model, model_revision, model_hash, model_dtype, model_parameters, model_shape: what answered.
        runner: lm-eval's name of the model type, such as `sparse-hf`.
        method: `dense` for other model types; methods of several phases are joined by `+`.
        phases: those that the method fills, joined by `+`; empty for dense attention.
        preset, knobs, code, backend: knobs of each method as given (with native knobs the budget's are among them), a
            hash of code from elsewhere, and the kernel that was asked for.
        budget_knobs: those of `knobs` that a sparsity would have solved.
        requested: sparsity asked for, in [0, 1]; of several phases the mean. None when native knobs ruled.
        measured: executed sparsity of the phase that the method fills; of several the mean.
        by_phase: the figures of every phase.
        task, task_version, task_hash: the hash is of what makes prompts and scores, not of where files lie.
        length: tokens that prompts of the task aim at.
        prompt_tokens: mean number of tokens of its prompts, measured.
        output_type, shots, chat_template, fewshot_as_multiturn, system_instruction, gen_kwargs: how it was asked; of
            the texts hashes.
        seed: what the task's documents are drawn with. `seeds`: those of lm-eval.
        metric: name; where several filters of answers give a score the filter's name stands behind a comma.
        score, stderr: as aggregated by lm-eval; `stderr` is None where it gave none.
        n: documents scored.
        higher_is_better: direction of the metric.
        chance: score without knowledge, None where it is not known.
        documents: None where no file has them, or the score is not their mean.
        seconds, seconds_by_phase, speed, peak_memory_bytes: of the whole run; `speed` in tokens a second.
        device, commit, versions, date, command, model_args: what ran, and the line that repeats it (secrets masked).
        source: the file; it is not written.
    """

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    model: Name
    model_revision: str | None = None
    model_hash: str | None = None
    model_dtype: str | None = None
    model_parameters: Count | None = None
    model_shape: Shape | None = None
    runner: Name = "?"
    method: Name
    phases: str = ""
    preset: str | None = None
    knobs: dict[str, Any] = {}
    budget_knobs: dict[str, tuple[str, ...]] = {}
    code: dict[str, Any] = {}
    backend: str | None = None
    requested: Share | None = None
    measured: Share
    by_phase: dict[str, PhaseFigures] = {}
    task: Name
    task_version: str | None = None
    task_hash: str | None = None
    length: Count | None = None
    prompt_tokens: Positive | None = None
    output_type: str | None = None
    shots: Count | None = None
    chat_template: str | None = None
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] = {}
    seed: Annotated[int, Field(ge=-_COLUMN, le=_COLUMN)] | None = None
    seeds: dict[str, int | None] = {}
    metric: Name
    score: float
    stderr: Positive | None = None
    n: Annotated[int, Field(ge=1, le=MOST)]
    higher_is_better: bool
    chance: Share | None = None
    documents: Documents | None = None
    seconds: Positive | None = None
    seconds_by_phase: dict[str, Positive] = {}
    speed: dict[str, Positive] = {}
    peak_memory_bytes: Count | None = None
    device: str | None = None
    commit: str | None = None
    versions: dict[str, str] = {}
    date: str | None = None
    command: str | None = None
    model_args: dict[str, Any] = {}
    source: str = Field(default="", exclude=True)

    @model_validator(mode="after")
    def _possible(self) -> Record:
        if self.documents is not None and not are_of(self.documents, self.score, self.n):
            raise ValueError("documents are not those of the score: their number or mean differs")
        if self.method == "dense" and (self.measured or self.requested):
            raise ValueError(f"a dense run with a sparsity of {self.measured or self.requested:g}")
        if abs(self.score) > LARGEST:
            raise ValueError(f"score is {self.score:g}, which nobody measures")
        if is_share(self.task, self.metric):
            scores = self.documents.scores if self.documents else ()
            for score in (self.score, min(scores, default=0.0), max(scores, default=0.0)):
                if not 0 <= score <= 1:
                    raise ValueError(f"{self.metric} is {score:g}, a number from 0 to 1 is expected")
        return self

    @property
    def bounded(self) -> bool:
        """Whether the metric is a share, and the higher the better: what losses may be certified of."""
        return self.higher_is_better and is_share(self.task, self.metric)


def are_of(documents: Documents, score: float, n: int) -> bool:
    """Whether a score is the mean of these documents' scores, and all of them are here.

    It is not for scores over a whole corpus, such as F1 or perplexity, nor where a file has lost lines.
    """
    if len(documents.scores) != n:
        return False
    mean = math.fsum(documents.scores) / n
    return abs(mean - score) <= _ROUNDING * max(1.0, abs(score))


def is_share(task: str, metric: str) -> bool:
    """Whether a metric is known to lie in [0, 1]: all of our tasks' but bits per character, and `SHARES` elsewhere."""
    name = metric.partition(",")[0]
    ours = task.startswith(("frontier_", "forced_frontier_"))
    return name in SHARES or (ours and not name.startswith("bits"))


def parse(line: str | bytes, where: str) -> Record:
    """A record from a line of `records.jsonl`.

    Args:
        where: what messages begin with.

    Raises:
        UserError: it is no record, or one of a newer schema.
    """
    try:
        record = Record.model_validate_json(line)
    except ValidationError as error:
        # What a newer schema has added would be called a mistake.
        version = _version(line)
        if version is None:
            what = f"{brief(line if isinstance(line, str) else line.decode(errors='replace'), 40)} is no record"
            raise UserError(f"{where}: {what}; a line of JSON as `analyze` writes it is expected") from None
        if version > SCHEMA_VERSION:
            raise _newer(where, version) from None
        raise UserError(f"{where}: {said(error)}") from None
    if record.schema_version > SCHEMA_VERSION:
        raise _newer(where, record.schema_version)
    return record.model_copy(update={"source": where})


def _version(line: str | bytes) -> int | None:
    """The schema that a line says it has; None where it is no record of any."""
    try:
        version = json.loads(line).get("schema_version")
    except (ValueError, AttributeError, RecursionError):
        return None
    return version if isinstance(version, int) else None


def _newer(where: str, version: int) -> UserError:
    return UserError(
        f"{where}: a record of schema {brief(version, 20)}, and this version reads up to {SCHEMA_VERSION}; upgrade "
        "lm-eval-sparse"
    )


def said(error: ValidationError) -> str:
    """The first thing that a validation found, in one line."""
    first = error.errors(include_url=False)[0]
    name = ".".join(map(str, first["loc"]))
    given = "" if first["type"] in ("missing", "value_error") else f" ({brief(first.get('input'), 40)})"
    return f"{name + ': ' if name else ''}{first['msg'].removeprefix('Value error, ')}{given}"


def json_schema() -> str:
    """The JSON schema of a record as text."""
    return json.dumps(Record.model_json_schema(), indent=2) + "\n"


def is_number(value: Any) -> bool:
    """A finite number; True is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


if __name__ == "__main__":
    print(json_schema(), end="")
