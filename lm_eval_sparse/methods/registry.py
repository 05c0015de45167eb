"""The registry of methods: a new method of this package is one file and one line here.

Methods are imported when they are asked for. Those of other packages come by entry points (`plugins`), those of the
user's own by the path of a file (`files`).
"""

from __future__ import annotations

import importlib
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..errors import UserError
from ..spelling import file_of
from . import files, plugins
from .base import DecodeMethod, EvictionMethod, Mass, Method, PrefillMethod
from .files import Origin
from .presets import Parameters

#: Name -> module and class.
BUILT_IN = {
    "dense": "dense:Dense",
    "vertical_slash": "prefill.vertical_slash:VerticalSlash",
    "flexprefill": "prefill.flexprefill:FlexPrefill",
    "flexprefill_vs": "prefill.flexprefill_vs:FlexPrefillVS",
    "block_sparse": "prefill.block_sparse:BlockSparse",
    "snapkv": "eviction.snapkv:SnapKV",
    "ada_snapkv": "eviction.ada_snapkv:AdaSnapKV",
    "quest": "decode.quest:Quest",
    "oracle_blocks": "prefill.oracle_blocks:OracleBlocks",
    "oracle_topk": "decode.oracle:OracleTopK",
    "oracle_topp": "decode.oracle:OracleTopP",
    "xattention": "prefill.xattention:XAttention",
    "a_shape": "streaming:AShape",
    "streaming_llm": "streaming:StreamingLLM",
    "knorm": "eviction.knorm:KNorm",
    "tova": "eviction.tova:TOVA",
    "h2o": "eviction.h2o:H2O",
    "pyramidkv": "eviction.pyramidkv:PyramidKV",
    "twilight": "wrappers.twilight:Twilight",
    "magicpig": "decode.magicpig:MagicPIG",
}

#: Phases in the order in which they come, and the model argument that asks for a sparsity in each.
PHASE_ARGUMENTS: dict[str, str] = {
    "prefill": "prefill_sparsity",
    "eviction": "kv_sparsity",
    "decode": "decode_sparsity",
}


class Registry(Mapping[str, "type[Method]"]):
    """Methods by name: those of this package, what was added, plug-ins of other packages, and files of the user's own.

    Iterating gives those that are at hand: the built-in ones, and what this process has used or added. Plug-ins are
    imported when they are asked for by name; `names` has theirs, too. A built-in method cannot be replaced.
    """

    def __init__(self, places: dict[str, str]):
        self._places = dict(places)
        self._found: dict[str, type[Method]] = {}
        self._origins: dict[type[Method], Origin] = {}

    def __getitem__(self, name: str) -> type[Method]:
        if name not in self._found:
            if name in self._places:
                module, _, attribute = self._places[name].partition(":")
                self._found[name] = getattr(importlib.import_module(f"{__package__}.{module}"), attribute)
            elif name in plugins.found():
                self._plug_in(name)
            else:
                raise KeyError(name)
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._found or name in plugins.found()

    def __iter__(self) -> Iterator[str]:
        return iter({**self._places, **self._found})

    def __len__(self) -> int:
        return len({**self._places, **self._found})

    def names(self) -> list[str]:
        """All names that can be typed, those of plug-ins that nobody has imported yet included."""
        return list({**self._places, **self._found, **plugins.found()})

    def wrappers(self) -> list[str]:
        """Names of the methods at hand that go around another one."""
        return [name for name, cls in self.items() if cls.phase == "wrapper"]

    def shadowed(self, names: Collection[str] | None = None) -> list[str]:
        """Lines on plug-ins that have one of these names, which is that of a built-in method, and are not used."""
        return [
            f"method={name} is the built-in method; the plug-in {plugins.who(point)} of the same name is not used"
            for name, points in plugins.found().items()
            if name in self._places and (names is None or name in names)
            for point in points
        ]

    def origin(self, method: type[Method]) -> Origin | None:
        """Where the code of a method comes from that is none of this package's; None where that is not known."""
        return self._origins.get(method)

    def add(self, method: type[Method]) -> None:
        """Take in a method under its name, in this process.

        Raises:
            ValueError: what is no whole method, or has the name of another one.
        """
        check_class(method)
        if method.name in self._places:
            raise ValueError(
                f"{method.__name__}: {method.name!r} is the name of a built-in method; give it another one"
            )
        self._found[method.name] = method

    def add_file(self, part: str) -> type[Method]:
        """Take in the method that `path/to/file.py:Class` names, under its own name and for the rest of this process.

        Raises:
            UserError: there is no such file or class, or it is no whole method.
        """
        path, attribute = file_of(part) or (part, "")
        typed = f"method={part}"
        method, origin = files.load(typed, path, attribute)
        try:
            self.add(method)
        except ValueError as error:
            raise UserError(f"{typed}: {error}") from error
        self._origins[method] = origin
        return method

    def _plug_in(self, name: str) -> None:
        method, origin = plugins.load(name)
        try:
            check_class(method)
        except ValueError as error:
            raise plugins.broken(name, str(error)) from error
        if method.name != name:
            raise plugins.broken(name, f"{method.__name__} calls itself {method.name!r}, and its entry point {name!r}")
        self._found[name] = method
        self._origins[method] = origin

    def discard(self, name: str) -> None:
        """Forget a method that was added."""
        if name not in self._places:
            self._found.pop(name, None)


METHODS = Registry(BUILT_IN)


#: One of these makes a scored method.
SCORING = ("score", "factors", "choose", "select")
#: Arguments that are no knobs.
RESERVED = (
    "method", "sparsity", *PHASE_ARGUMENTS.values(), "preset", "backend", "stats", "debug", "diagnose", "resume",
)  # fmt: skip
#: Arguments of the model, which a knob of the same name would take from it.
MODEL_ARGUMENTS = (
    "pretrained", "revision", "subfolder", "tokenizer", "dtype", "device", "batch_size", "max_batch_size", "max_length",
    "trust_remote_code", "peft", "delta", "parallelize", "truncation", "add_bos_token", "prefix_token_id", "gguf_file",
    "token", "device_map", "max_memory", "quantization_config", "think_end_token", "enable_thinking",
    "softmax_dtype", "mixed_precision_dtype", "use_fast_tokenizer", "logits_cache", "offload_folder", "autogptq",
    "gptqmodel", "chat_template_args", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
    "cache_dir", "distributed_config", "force_download", "ignore_mismatched_sizes", "key_mapping",
    "llm_int8_enable_fp32_cpu_offload", "llm_int8_threshold", "load_in_4bit", "load_in_8bit", "local_files_only",
    "low_cpu_mem_usage", "max_cpu_memory", "max_memory_per_gpu", "offload_buffers", "proxies", "state_dict",
    "torch_dtype", "tp_plan", "use_safetensors", "variant", "weights_only",
)  # fmt: skip
#: What a method says of itself: a row of the table.
ROW = ("name", "phase", "unit", "importance", "allocation", "kv", "reference")
#: What may stand there.
EXAMPLES = {
    "name": 'name: ClassVar[str] = "my_method"',
    "phase": 'phase: ClassVar[str] = "eviction"',
    "unit": 'unit: ClassVar[str] = "tokens"',
    "importance": 'importance: ClassVar[str] = "norm of the key"',
    "allocation": 'allocation: ClassVar[str] = "uniform"',
    "kv": 'kv: ClassVar[str] = "evicted"',
    "reference": 'reference: ClassVar[str] = "Me et al., 2026"',
    "wraps": 'wraps: ClassVar[tuple[str, ...]] = ("decode",)',
}
#: Of what kind some of it is.
SAYS: tuple[tuple[str, Any, str], ...] = (
    *((name, str, "a text") for name in ("phase", "unit", "importance", "kv", "reference")),
    *((name, Mapping, "knobs and their values") for name in ("tiny", "whole")),
    ("paper", Parameters | None, "presets.Parameters, or None"),
)
#: Bases whose `select` has to be written.
FREE = (Method, PrefillMethod, EvictionMethod, DecodeMethod)


def check_class(method: Any) -> None:
    """Raise ValueError for a class that is no whole method: what it lacks would be found in the middle of a run."""
    try:
        _check_class(method)
    except ValueError:
        raise
    except Exception as error:  # written by anybody
        raise ValueError(f"{method!r} cannot be looked at ({type(error).__name__}: {error})") from error


def _check_class(method: Any) -> None:
    who = getattr(method, "__name__", repr(method))
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise ValueError(
            f"{who} is no subclass of Method; derive it from the base class of its phase, such as "
            "lm_eval_sparse.methods.ScoredEviction"
        )
    own = [name for name, kind in vars(method).get("__annotations__", {}).items() if "ClassVar" not in str(kind)]
    plain = "__dataclass_fields__" not in vars(method)
    if not method.__dataclass_params__.frozen or (own and plain):
        raise ValueError(f"{who} is no frozen dataclass; write @dataclass(frozen=True) above it")
    missing = [name for name in ROW if not said(method, name)]
    if said(method, "phase") and method.phase == "wrapper" and not said(method, "wraps"):
        missing.append("wraps")
    if missing:
        raise ValueError(
            f"{who} does not say its {', '.join(missing)}; give it as a class attribute, such as "
            f"{EXAMPLES.get(missing[0], EXAMPLES['unit'])}"
        )
    if not isinstance(method.name, str) or not re.fullmatch(r"[a-z0-9_]+", method.name):
        raise ValueError(f"{who}: its name {method.name!r} cannot be typed; use lower-case letters, digits and _")
    for name, kind, words in SAYS:
        if not isinstance(getattr(method, name, None), kind):
            raise ValueError(f"{who}: {name} is {getattr(method, name, None)!r}; expected {words}")
    taken = [name for name in method.knobs() if name in RESERVED]
    if taken:
        raise ValueError(f"{who} has a knob {taken[0]!r}, which is an argument of every method; give it another name")
    taken = [name for name in method.knobs() if name in MODEL_ARGUMENTS]
    if taken:
        raise ValueError(f"{who} has a knob {taken[0]!r}, which is an argument of the model; give it another name")
    if method.phase not in (*PHASE_ARGUMENTS, "any", "wrapper"):
        raise ValueError(f"{who} is of phase {method.phase!r}; expected one of {', '.join(PHASE_ARGUMENTS)}")
    for name in ("budget_knobs", "wraps"):
        value = getattr(method, name, ())
        if isinstance(value, str):
            raise ValueError(f"{who}: {name} is a text; expected a tuple, such as ({value!r},)")
        if not isinstance(value, tuple | list) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{who}: {name} is {value!r}; expected a tuple of names")
    strange = [phase for phase in getattr(method, "wraps", ()) if phase not in PHASE_ARGUMENTS]
    if strange and method.phase == "wrapper":
        raise ValueError(f"{who} goes around methods of phase {strange[0]!r}; expected of {', '.join(PHASE_ARGUMENTS)}")
    for name in method.budget_knobs:
        if name not in method.knobs():
            raise ValueError(f"{who} says that a sparsity decides {name!r}, which is none of its knobs")
    if method.select in {vars(base).get("select") for base in FREE}:
        raise ValueError(f"{who} does not select: write select(self, call), as its base class says")
    allocations = getattr(method, "allocations", None)
    if allocations is None:
        return
    scored = next(base for base in method.__mro__ if "allocations" in vars(base))
    if all(getattr(method, name, None) is getattr(scored, name, None) for name in SCORING):
        raise ValueError(f"{who} does not score: write score(self, call, ...), as its base class says")
    if not isinstance(method.allocation, allocations):
        kinds = ", ".join(kind.__name__ for kind in allocations)
        raise ValueError(f"{who} divides its budget by {type(method.allocation).__name__}; here are {kinds}")
    floor = getattr(method.allocation, "floor", None)
    if floor is not None and floor not in method.knobs():
        raise ValueError(f"{who} pools its budget and has no knob {floor!r}")
    by_mass = type(method.allocation).__name__ == "TopP"
    if by_mass != (method.native is Mass):
        raise ValueError(f"{who}: native is {method.native.__name__}; TopP goes with Mass, every other one with Count")


def said(method: type, name: str) -> bool:
    """Whether a method says this of itself; a property is for its instances to say."""
    return bool(getattr(method, name, None))


def table() -> str:
    """A markdown table of all built-in methods: phase, place in the taxonomy, knobs with defaults, paper."""
    lines = [
        "| method | phase | unit | importance | budget | KV cache | knobs (default) | paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cls in (METHODS[name] for name in BUILT_IN):
        knobs = ", ".join(f"`{name}` ({default})" for name, default in cls.knobs().items()) or "-"
        lines.append(
            f"| `{cls.name}` | {cls.phase} | {cls.unit} | {cls.importance} | {cls.allocation} | {cls.kv} "
            f"| {knobs} | {cls.reference} |"
        )
    return "\n".join(lines)


def listing(width: int) -> str:
    """The same as text of at most `width` columns: a paragraph per method, knobs as they are typed."""

    def wrapped(text: str, name: str | None = None) -> str:
        first, later = ("", "") if name is None else (f"  {name:<9}", " " * 11)
        return textwrap.fill(text, width, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)

    head = "Sparse-attention methods by phase. Knobs are model arguments, here with their defaults."
    paragraphs = [wrapped(head)]
    for name in METHODS.names():
        try:
            cls = METHODS[name]
        except UserError as error:  # a plug-in of another package
            paragraphs.append(f"{name} (cannot be used)\n{wrapped(str(error), 'wrong')}")
            continue
        allocation = "" if cls.allocation == "-" else f"{cls.allocation}; "
        fields = {
            "selects": "all keys" if cls.unit == "-" else f"{cls.unit}, by {cls.importance}",
            "budget": f"{allocation}KV: {cls.kv}",
            "knobs": "  ".join(f"{knob}={default}" for knob, default in cls.knobs().items()) or "none",
            "paper": cls.reference,
        }
        if (origin := METHODS.origin(cls)) is not None:
            fields["package"] = origin.place
        title = f"{cls.name} ({'any phase' if cls.phase == 'any' else cls.phase})"
        paragraphs.append("\n".join([title, *(wrapped(value, field) for field, value in fields.items())]))
    paragraphs += [wrapped(line) for line in METHODS.shadowed()]
    return "\n\n".join(paragraphs)
