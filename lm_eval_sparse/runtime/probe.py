"""The check at start-up: does this model's attention, layer by layer, come out of our runtime as it is?

A few tokens run through the model several times. Each attention call is compared with transformers' own function for
that layer on the same queries, keys and values and under the mask that transformers makes, so that what is left to
differ is the rounding of one layer: whole-model logits cannot tell rounding from a wrong attention. What a layer sees
beyond these tokens is read from its mask function. Every phase that a method is to fill runs on trial, too, with
selections that are known. Whatever cannot be compared is refused: this check fails closed. What is seen
and what is concluded from it stand in one file, since each is read beside the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import causal_mask_function

from ..errors import UserError
from ..kernels.cache.replace import turn
from ..kernels.dense import dense_attention
from ..methods.plan import Assignment, Plan
from .accounting import RowCounts
from .cache import CacheLayer
from .interface import CALL, IMPLEMENTATION, made_mask, own_function, run_mask
from .masks import Sight, sight_of
from .memory import out_of_memory
from .session import Runtime
from .trial import METHODS, Trial

#: Tokens of the trial prompt: several pages and blocks, the last ones partial.
PROMPT = 37
#: Tokens that follow it: given answers are scored several at once.
STEPS = 2
#: How far a layer's output may be off, relative to that of its values' magnitudes, by the dtype that computes it. Some
#: four roundings of scores, weights and sums; a wrong mask, scale or key is off by tenths.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
#: The same for our function in fp32 whatever the model computes in: there rounding hides nothing.
EXACT = 1e-3
#: How far logits may be off those of the model as transformers runs it, relative, where rounding does not add up; else
#: so many times what rounding alone does to them.
LOGITS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
NOISE = 10.0
#: By how many positions a prompt is moved, and how far keys may then be off those that are turned, relative: rounding
#: adds up from layer to layer, and keys that are not turned at all are about 1 off.
SHIFT, MOST_TURNED = 101, 0.15
#: Logits that have nothing to do with each other are 1.4 off.
MOST = 0.8

#: What to type where the phases that were asked for are the trouble.
DENSE, PREFILL = "type method=dense, or --model hf", "type method=dense, a prefill method, or --model hf"

Forward = Callable[..., Tensor]


class CheckError(UserError):
    """A layer that does not come out as it is, or cannot be compared.

    Attributes:
        instead: what to type.
    """

    def __init__(self, message: str, instead: str = "use --model hf for this model"):
        super().__init__(message)
        self.instead = instead


@dataclass
class Seen:
    """What was seen of one layer: its calls in a forward pass, and the keys and values of the prompt it was given."""

    calls: int = 0
    keys: Tensor | None = None
    values: Tensor | None = None


class Probe:
    """Stands between a model and its runtime while a forward pass runs on trial (`runtime.probe`).

    Args:
        runtime: of the model.
        looks: in the first pass nothing of ours runs: what each layer sees is noted, and transformers' own function in
            fp32 answers for it.
        jitter: relative size of the noise that is put on what answers, to learn what rounding does.
    """

    def __init__(self, runtime: Runtime, looks: bool = False, jitter: float = 0.0):
        self.runtime, self.looks, self.jitter = runtime, looks, jitter
        self._generator = torch.Generator().manual_seed(0)
        self.layers: dict[int, Seen] = {}
        self.sights: dict[int, Sight] = {}
        self.trial = Trial()
        #: What transformers' masks of the running pass show: by the memory that they lie in, and by what they show.
        self._made: dict[int, tuple[Sight, Tensor]] = {}
        self._shown: dict[Sight, Tensor] = {}
        #: Whether a decoder of ours runs: several rows, of which the first is compared.
        self.decodes = False

    @contextmanager
    def watching(self) -> Any:
        """Inside the block every call of the runtime's model is checked here."""
        self.runtime.probe, before = self, self.runtime.probe
        try:
            yield self
        finally:
            self.runtime.probe = before

    def forget_masks(self) -> None:
        """Before each forward pass."""
        self._made.clear()
        self._shown.clear()
        for seen in self.layers.values():
            seen.calls = 0

    # --- what transformers calls -------------------------------------------------------------------------------

    def mask(self, *, mask_function: Any, **kwargs: Any) -> Tensor | None:
        """See `interface.mask`; what transformers would make is kept to compare with."""
        device = torch.device(kwargs.get("device", "cpu"))
        sight = sight_of(mask_function, self.runtime.longest, device, mask_function is causal_mask_function)
        if self.looks:
            self.runtime.mask_sights.add(sight)
        made = None
        if not self.decodes:
            made = made_mask(mask_function=mask_function, **kwargs)
            self._shown[sight] = made
        if not self.looks:
            return run_mask(CALL.get(), mask_function=mask_function, **kwargs)
        dtype = kwargs.get("dtype", torch.float32)
        given = torch.zeros(made.shape, dtype=dtype, device=made.device).masked_fill(~made, torch.finfo(dtype).min)
        # Kept, so that its memory is not used again: a layer is told by it which mask it got, sliced or not.
        self._made[given.untyped_storage().data_ptr()] = sight, given
        return given

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        arguments: dict[str, Any],
        *,
        scale: float,
        softcap: float | None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """See `Runtime.attend`. `arguments` are those of the call beside states and mask."""
        index = module.layer_idx
        if not isinstance(index, int):
            raise CheckError(f"{type(module).__name__} does not say which layer it is in (several layers share it)")
        seen = self.layers.setdefault(index, Seen())
        seen.calls += 1
        if self.looks:
            return self._look(index, module, query, key, value, mask, arguments)
        runtime = self.runtime
        if not self.decodes and query.shape[2] == key.shape[2] and key.shape[2] == runtime.prompt:
            self._check_room(index)
            if runtime.sights[index].kind == "full" and not runtime.takes_mask(index):
                self._note_cache(index, key, value)
            seen.keys, seen.values = key, value
        self.trial.layer, self.trial.shown, self.trial.pages = index, None, None
        out = runtime.attend(module, query, key, value, mask, scale=scale, softcap=softcap, sink=sink)
        given = mask if runtime.takes_mask(index) else None
        self._compare(index, module, query, key, value, given, arguments, out, scale, softcap, sink)
        return out

    # --- what is found out -------------------------------------------------------------------------------------

    def _look(
        self,
        index: int,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        arguments: dict[str, Any],
    ) -> Tensor:
        """Note what a layer sees, and answer for it."""
        known = None if mask is None else self._made.get(mask.untyped_storage().data_ptr())
        if known is None:
            given = "no mask" if mask is None else "a mask that transformers' mask functions did not make"
            raise CheckError(
                f"{type(module).__name__} of layer {index} is handed {given}, so what it may see is not known"
            )
        sight, made = known
        future = torch.ones(made.shape[-2:], dtype=torch.bool, device=made.device).triu(1)
        if bool(((made == 0) & future).any()):
            raise CheckError(f"attention of layer {index} is not causal")
        if mask.shape[-1] != key.shape[2] or mask.shape[-2] != query.shape[2]:
            raise CheckError(
                f"{type(module).__name__} of layer {index} has {query.shape[2]} queries and {key.shape[2]} keys under "
                f"a mask of {mask.shape[-2]} and {mask.shape[-1]}"
            )
        before = self.sights.setdefault(index, sight)
        if before != sight:
            raise CheckError(f"layer {index} is called with several masks ({before}; {sight})")
        out = reference(module, query, key, value, mask == 0, arguments)
        if self.jitter:
            noise = torch.randn(out.shape, generator=self._generator).to(out)
            out = out * (1 + self.jitter * noise)
        return out.to(value.dtype)

    def _check_room(self, index: int) -> None:
        """Raise where a layer's cache forgets keys that its mask shows: then answers depend on how they are made."""
        layers, sight = self.runtime.cache.layers, self.runtime.sights[index]
        window = getattr(layers[index], "sliding_window", None) if index < len(layers) else None
        needed = {"full": self.runtime.longest, "other": 0}.get(sight.kind, sight.size)
        if isinstance(window, int) and window < needed:
            raise CheckError(
                f"the cache of layer {index} keeps {window} tokens while its mask shows more ({sight}), so its answers "
                "with a cache are not those without"
            )

    def _note_cache(self, index: int, key: Tensor, value: Tensor) -> None:
        """Note whether what attention is given is what our cache holds, or a layer before it lent."""
        runtime, layers = self.runtime, self.runtime.cache.layers
        runtime.uncached.pop(index, None)
        runtime.by_memory.discard(index)
        if index < 0:
            runtime.uncached[index] = "several layers share one attention module, which does not say in which it runs"
            return
        if (calls := self.layers[index].calls) > 1:
            runtime.uncached[index] = f"attention runs {calls} times in layer {index}"
            return
        own = layers[index] if index < len(layers) else None
        if not isinstance(own, CacheLayer) or not own.is_initialized:
            lender = self._lender(index, key, value)
            if lender is not None and isinstance(layers[lender], CacheLayer):
                runtime.lenders[index] = lender
            elif own is None or lender is not None:
                runtime.uncached[index] = f"the keys and values of layer {index} are in no cache layer of its own"
            else:
                runtime.uncached[index] = f"layer {index} keeps more than keys and values ({type(own).__name__})"
        elif not (same(own.keys, key) and same(own.values, value)):
            latent = (own.keys.shape[-1], own.values.shape[-1]) != (key.shape[-1], value.shape[-1])
            runtime.uncached[index] = (
                f"attention in layer {index} is given other keys and values ({shape(key)} and {shape(value)}) than its "
                f"cache holds ({shape(own.keys)} and {shape(own.values)}{', latent attention' if latent else ''})"
            )
        elif own.gave(key, value):
            runtime.by_memory.add(index)

    def _lender(self, index: int, key: Tensor, value: Tensor) -> int | None:
        """The layer before this one that was given the same keys and values, if any."""
        earlier = {n: seen for n, seen in self.layers.items() if n != index and seen.calls}
        return next((n for n, seen in earlier.items() if same(seen.keys, key) and same(seen.values, value)), None)

    def _compare(
        self,
        index: int,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        given: Tensor | None,
        arguments: dict[str, Any],
        out: Tensor,
        scale: float,
        softcap: float | None,
        sink: Tensor | None,
    ) -> None:
        """Compare what our runtime made with transformers' own function on the same queries, keys and values."""
        seen, sight = self.layers[index], self.runtime.sights[index]
        rows = slice(0, 1) if self.decodes else slice(None)
        query, key, value, out = query[rows], key[rows], value[rows], out[rows]
        steps = query.shape[2]
        # A decoder's steps are masked by positions alone: transformers' mask would be one for its own cache.
        mask = None if self.decodes else self._shown.get(sight) if given is None else given
        if seen.keys is not None and (self.decodes or (mask is not None and key.shape[2] < mask.shape[-1])):
            # Our caches hand over the new keys and values only: what came before is what the prompt was given.
            key, value = (torch.cat([old, new], 2) for old, new in ((seen.keys, key), (seen.values, value)))
        if mask is None and self.decodes:
            at = torch.arange(key.shape[2], device=key.device)
            mask = (at > at[-1] - sight.size if sight.kind == "window" else at >= 0)[None, None, None]
        if mask is None or mask.shape[-2:] != (steps, key.shape[2]):
            raise CheckError(
                f"layer {index} has {steps} queries and {key.shape[2]} keys, and transformers made no mask of that "
                "size for it"
            )
        shown = self.trial.shown
        if steps < key.shape[2] and self.runtime.ineligible(index, key, value) is None:
            shown = self.trial.later(self.runtime.lenders.get(index, index), key.shape[2])
        if shown is not None:
            mask = mask & shown.repeat_interleave(query.shape[1] // len(shown), 0)[None].to(mask.device)
        right = reference(module, query, key, value, mask, arguments)
        size = reference(module, query, key, value.abs(), mask, arguments)
        self._judge(index, out, right, size, TOLERANCE[query.dtype], "")
        if shown is None and not self.runtime.takes_mask(index) and not self.decodes:
            work = torch.float64 if query.dtype == torch.float64 else torch.float32
            window = sight.size if sight.kind == "window" else None
            states = (states.to(work) for states in (query, key, value))
            exact = dense_attention(*states, scale=scale, softcap=softcap, window=window, sink=sink)
            self._judge(index, exact, right, size, EXACT, " in full precision")

    def _judge(self, index: int, found: Tensor, right: Tensor, size: Tensor, tolerance: float, how: str) -> None:
        """Raise unless `found (B, H, q_len, D_v)` is right to within the tolerance, for every query."""
        off = (found.to(right.dtype) - right).norm(dim=-1) / size.norm(dim=-1).clamp(min=1e-30)
        worst = float(off.max())
        if not worst <= tolerance:
            raise CheckError(
                f"its attention in layer {index} ({self.runtime.sights[index]}) comes out{how} {worst:.2g} off "
                f"transformers' own, and {tolerance:.2g} is what rounding may do"
            )


def same(left: Tensor | None, right: Tensor) -> bool:
    """Whether these are the same numbers, or the same memory."""
    return left is not None and left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)


def shape(states: Tensor) -> str:
    """Heads and dimensions as messages name them."""
    return f"{states.shape[1]} heads of {states.shape[-1]}"


def reference(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, arguments: dict[str, Any]
) -> Tensor:
    """transformers' own function in fp32 (fp64 for fp64 states), under a mask `(B or 1, H or 1, q_len, kv_len)` bool.

    Returns:
        `(B, H, q_len, D_v)`.
    """
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    additive = torch.zeros(mask.shape, dtype=work, device=mask.device).masked_fill(~mask, torch.finfo(work).min)
    states = (states.to(work) for states in (query, key, value))
    out, _ = own_function(module)(module, *states, additive.to(query.device), **arguments)
    return out.transpose(1, 2)


# --- the check -------------------------------------------------------------------------------------------------


def check(model: PreTrainedModel, forward: Forward, runtime: Runtime, steps: int = STEPS) -> Tensor:
    """Check the layers of a model, and note in the runtime what it has to know of them.

    Args:
        forward: runs the model as evaluation does: `forward(ids, cache=…, positions=…)` to logits `(1, L, V)`.
        runtime: of the model, with the plan that will run.
        steps: tokens that follow the trial prompt in one pass; 1 for models whose state goes token by token.

    Returns:
        The ids `(1, PROMPT + 1)` of the trial.

    Raises:
        CheckError: what differs, and by how much; or what cannot be compared.
    """
    ids = trial_ids(model, PROMPT + steps)
    plan = runtime.plan
    try:
        runtime.plan, runtime.calls_of_a_pass = Plan(), None
        look = Probe(runtime, looks=True)
        with look.watching():
            forward(ids, cache=None)
        if not look.layers:
            raise CheckError("it has no attention layer that goes through transformers' attention interface")
        runtime.see(look.sights)
        calls = sum(seen.calls for seen in look.layers.values())
        dense, _ = trial_pass(model, forward, runtime, Probe(runtime), ids, steps)
        # A state that goes token by token is never scored from: what a step makes of it is the model's own affair.
        dense = dense[:, : PROMPT + (steps if steps > 1 else 0)]
        off = own_distance(model, forward, ids, dense)
        if not off <= LOGITS.get(precision(model, dense), 5e-2) and not off <= (
            limit := rounding(model, forward, runtime, ids, dense)
        ):
            raise CheckError(
                f"its logits come out {off:.2g} off those with transformers' own attention and no cache (relative), "
                f"and {limit:.2g} is what rounding may do"
            )
        if plan.phases:
            runtime.known.turned(turned_layers(model, forward, runtime, ids))
            _check_phases(model, forward, runtime, plan, ids, steps)
        runtime.calls_of_a_pass = calls
        runtime.known.sparse((n for n, reason in runtime.layers.items() if reason is None), runtime.lenders)
    finally:
        runtime.plan = plan
    return ids[:, : PROMPT + 1]


def trial_ids(model: PreTrainedModel, length: int) -> Tensor:
    """Token ids `(1, length)` that are none of those that a configuration gives a meaning."""
    text = model.config.get_text_config(decoder=True)
    special: set[int] = set()
    for config in (model.config, text):
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, list) else [value])
    size = min(text.vocab_size, 32 * length + 64)
    usual = [token for token in range(3, size) if token not in special] or list(range(text.vocab_size))
    return torch.tensor([[usual[(7 * place) % len(usual)] for place in range(length)]], device=model.device)


def trial_pass(
    model: PreTrainedModel, forward: Forward, runtime: Runtime, probe: Probe, ids: Tensor, steps: int
) -> tuple[Tensor, RowCounts]:
    """Run a prompt and the tokens behind it; returns all logits `(1, PROMPT + steps, V)`, and what was counted."""
    counts, cache = RowCounts(), runtime.new_cache(model.config, reserve=steps)
    with probe.watching(), runtime.running(counts, cache, PROMPT):
        logits: list[Tensor] = []
        for first, end in ((0, PROMPT), (PROMPT, PROMPT + steps)):
            probe.forget_masks()
            logits.append(forward(ids[:, first:end], cache=cache))
    return torch.cat(logits, 1), counts


def turned_layers(model: PreTrainedModel, forward: Forward, runtime: Runtime, ids: Tensor) -> list[int]:
    """Layers whose keys turn with the positions of a prompt as the rotary embedding that is known of them says.

    A layer may leave the embedding out, though its model has one.
    """
    known = runtime.known.with_rope()
    if not known or "position_ids" not in inspect.signature(model.forward).parameters:
        return []
    seen: list[dict[int, Seen]] = []
    for first in (0, SHIFT):
        probe, cache = Probe(runtime), runtime.new_cache(model.config, reserve=0)
        positions = torch.arange(first, first + PROMPT, device=ids.device)[None]
        try:
            with probe.watching(), runtime.running(RowCounts(), cache, PROMPT):
                forward(ids[:, :PROMPT], cache=cache, positions=positions)
        except Exception as error:  # modelling code of any kind, which need not take other positions
            if out_of_memory(error):
                raise
            return []
        seen.append(probe.layers)
    found = []
    for index, layer in known.items():
        here, there = (own[index].keys if index in own else None for own in seen)
        if here is None or there is None:
            continue
        try:
            cosines, sines = layer.rotary(torch.tensor([SHIFT], device=here.device))
            scale = layer.rotary(torch.zeros(1, dtype=torch.int64, device=here.device))[0]
        except (KeyError, AttributeError):  # an embedding that has nothing for layers of this kind
            continue
        turned = turn(here.float(), (cosines / scale).float(), (sines / scale).float())
        if distance(turned, there) < MOST_TURNED:
            found.append(index)
    return found


def distance(found: Tensor, right: Tensor) -> float:
    """How far logits are off others, relative to these."""
    return float((found.float() - right.float()).norm() / right.float().norm().clamp(min=1e-30))


def alike(
    model: PreTrainedModel, forward: Forward, runtime: Runtime, ids: Tensor, found: Tensor, right: Tensor
) -> bool:
    """Whether logits of the same tokens are as near to each other as rounding leaves them."""
    off = distance(found, right)
    return off <= LOGITS.get(precision(model, right), 5e-2) or off <= rounding(model, forward, runtime, ids, right)


def rounding(model: PreTrainedModel, forward: Forward, runtime: Runtime, ids: Tensor, logits: Tensor) -> float:
    """How far rounding may take logits in this model: in a deep one it may add up."""
    dtype, found = precision(model, logits), []
    for jitter in (0.0, torch.finfo(dtype).eps):
        with Probe(runtime, looks=True, jitter=jitter).watching():
            found.append(forward(ids, cache=None))
    return max(LOGITS.get(dtype, 5e-2), min(MOST, NOISE * distance(*found)))


def precision(model: PreTrainedModel, logits: Tensor) -> torch.dtype:
    """What a model computes in; under autocast its logits tell."""
    return min((model.dtype, logits.dtype), key=lambda kind: torch.finfo(kind).bits)


def own_distance(model: PreTrainedModel, forward: Forward, ids: Tensor, logits: Tensor) -> float:
    """How far logits are off those of the model as transformers runs it: code around attention may ask for its name.

    The nearest of its implementations counts: `sdpa` leaves out what it cannot compute in some releases.
    """
    offs, error = [], None
    for name in ("sdpa", "eager") if getattr(model, "_supports_sdpa", True) else ("eager",):
        try:
            offs.append(distance(logits, own_logits(model, forward, ids, name)[:, : logits.shape[1]]))
        except Exception as raised:  # modelling code of any age
            error = raised
            continue
        if offs[-1] <= LOGITS.get(precision(model, logits), 5e-2):
            break
    if not offs:
        raise CheckError(f"it does not run with transformers' own attention ({type(error).__name__}: {error})")
    return min(offs)


def own_logits(model: PreTrainedModel, forward: Forward, ids: Tensor, name: str) -> Tensor:
    """Logits `(1, L, V)` with transformers' own attention of this name."""
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    ours = [config for config in configs.values() if getattr(config, "_attn_implementation", None) == IMPLEMENTATION]
    for config in ours:
        config._attn_implementation = name
    try:
        return forward(ids, cache=None)
    finally:
        for config in ours:
            config._attn_implementation = IMPLEMENTATION


def _check_phases(
    model: PreTrainedModel, forward: Forward, runtime: Runtime, plan: Plan, ids: Tensor, steps: int
) -> None:
    """Run every phase that a method fills with selections that are known."""
    eligible = [index for index, reason in runtime.layers.items() if reason is None]
    names = {phase: assignment.method.name for phase, assignment in plan.phases.items()}
    if not eligible:
        reasons = ", ".join(sorted({reason for reason in runtime.layers.values() if reason}))
        raise CheckError(f"no method can be applied to any of its layers ({reasons})", DENSE)
    later = " and ".join(name for phase, name in names.items() if phase != "prefill")
    for index in eligible:
        if later and index in runtime.uncached:
            raise CheckError(f"{later} cannot be applied to it: {runtime.uncached[index]}", PREFILL)
    probe = Probe(runtime)
    filled = {phase: Assignment(METHODS[phase](trial=probe.trial), None) for phase in names}
    runtime.plan = Plan(**filled, backend="gather")
    _, counts = trial_pass(model, forward, runtime, probe, ids, steps)
    for phase, name in names.items():
        found = counts.phase(phase)
        if not found.calls["sparse"] or set(found.calls) - {"sparse"}:
            reasons = "; ".join(found.reasons) or ", ".join(f"{n} {kind}" for kind, n in found.calls.items())
            raise CheckError(f"{name} would not run in its {phase} phase ({reasons or 'no call'})", DENSE)
