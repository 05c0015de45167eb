"""`sparse-hf`: lm-eval's Hugging Face model with sparse attention and measured sparsity.

In scoring as in generation, the context is the prefill phase and what follows is the decode phase. Requests that
share a context prefill it once. A rolling log-likelihood has no context: its windows are prefill throughout.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import platform
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any

import jinja2
import torch
import torch.nn.functional as F
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import clear_torch_cache, stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor
from tqdm import tqdm

from .. import __version__
from ..errors import UserError, install_excepthook, nearest
from ..kernels.backends import triton_unavailable
from ..methods import METHODS, PHASE_ARGUMENTS, presets
from ..methods.plan import OWN_ARGS, SparseConfig, argument_names, knob_names, parse, split
from ..protocol import (
    SKIPPED,
    MeasuredFloat,
    MeasuredLoglikelihood,
    MeasuredText,
    SharedPrompt,
    set_active_lm,
    window_of,
)
from ..runtime import probe
from ..runtime.accounting import COVERED, PHASES, Ledger, RowCounts
from ..runtime.cache import SparseCache, cache_argument, generation_argument
from ..runtime.decoder import Decoder, Row, undecodable
from ..runtime.interface import IMPLEMENTATION, calling, register
from ..runtime.memory import MemoryModel, out_of_memory
from ..runtime.positions import Stretch, stretches
from ..runtime.rounding import rows_alike
from ..runtime.session import Runtime
from . import adapters, arguments, embedded, response_cache
from .encoding import SharedEncoder
from .load import Whole, check_loaded, check_path, check_pretrained, explained, first_line
from .sampling import NEUTRAL, Sampling, Stop, generation_arguments
from .sampling import check as check_generation

logger = logging.getLogger(__name__)

register()
install_excepthook()

#: Answer tokens scored per forward pass: bounds the logits held at once.
SCORE_CHUNK = 1024

#: Tokens that answers get room for at first: more is made when they turn out longer.
RESERVE = 1024

#: lm-eval itself warns about a missing chat template when one of these occurs in the model arguments.
INSTRUCT_WORDS = ("inst", "chat")


@dataclass
class Target:
    """One scored request: the tokens after the shared prompt, of which the last `scored` count."""

    index: int
    tokens: list[int]
    scored: int
    key: tuple[str, str] | None


@dataclass
class Context:
    """A prompt and all requests that continue it."""

    prompt: list[int]
    targets: list[Target] = field(default_factory=list)
    task: str | None = None
    window: int | None = None
    counts: RowCounts = field(default_factory=RowCounts)

    def lengths(self) -> tuple[int, int]:
        """Tokens of the prompt, and of prompt and longest answer that a model reads."""
        return len(self.prompt), len(self.prompt) + max(len(target.tokens) for target in self.targets) - 1

    def sequences(self) -> list[list[int]]:
        """The token sequences to run, longest first: a sequence that another one begins with needs no run."""
        chosen: list[list[int]] = []
        for tokens in sorted((target.tokens for target in self.targets), key=len, reverse=True):
            if not any(other[: len(tokens)] == tokens for other in chosen):
                chosen.append(tokens)
        return chosen

    def answers(self, scored: dict[tuple, Tensor], hits: dict[tuple, Tensor]) -> list[tuple[float, bool]]:
        """`(logprob, is_greedy)` of each target, from the per-token results of the sequences that were run."""
        found = []
        for target in self.targets:
            whole = next(tokens for tokens in scored if list(tokens[: len(target.tokens)]) == target.tokens)
            span = slice(len(target.tokens) - target.scored, len(target.tokens))
            found.append((float(scored[whole][span].sum()), bool(hits[whole][span].all())))
        return found


class SparseHFLM(HFLM):
    """lm-eval model type `sparse-hf`.

    Takes every argument of lm-eval's `hf`, and:

    Args:
        method: a name from `lm-eval-sparse methods`; `dense` by default.
            One per phase, joined by `+`: `flexprefill+snapkv+quest`.
        sparsity: share to skip in every phase with a method, in [0, 1); met to within 0.01 from 4096 tokens on.
        prefill_sparsity, kv_sparsity, decode_sparsity: the same for one phase.
        preset: `paper` takes the knobs for `sparsity` from the tables of The Sparse Frontier.
        backend: kernel of the sparse calls: `auto`, `fa4`, `hopper`, `triton`, `flex`, `gather` or `naive`.
        stats: `full` keeps the figures of every layer and head, too.
        debug: `True` checks what methods select at once on a GPU, too, which is slower: mistakes show where they are
            made. Without it they show when a batch is done.
        gamma, tau, ...: native knobs of the methods, instead of a sparsity.
        pretrained: as in `hf`; without it the embedded SmolLM2-135M-Instruct is used.

    Raises:
        UserError: an argument that cannot work; see its message.
    """

    def __init__(self, pretrained: str | transformers.PreTrainedModel | None = None, **kwargs: Any) -> None:
        self.lm_eval_warns = False
        ours, rest = split(kwargs)
        check_pretrained(pretrained)
        refuse_attention_choice(rest)
        arguments.check_all(rest)
        adapters.check_given(rest, in_memory=pretrained is not None and not isinstance(pretrained, str))
        self.sparse: SparseConfig = parse(ours)
        self.runtime = Runtime(self.sparse.plan)
        #: Decodes answers; None until the first one, or where the model cannot be decoded by it (`_no_decoder`).
        self._decoder: Decoder | None = None
        self._no_decoder: str | None = None
        #: Masks that hide nothing, by the number of rows of a step of the decoder.
        self._no_padding: dict[int, Tensor] = {}
        #: Prompts decoded side by side at most, once memory has run out with more.
        self._fitting: int | None = None
        #: Batches that had to be halved because memory ran out.
        self.halved = 0
        self.full_stats = self.sparse.stats == "full"
        #: Fields of the model's own configuration among the arguments.
        self._typed: dict[str, Any] = {}
        self.model_label = pretrained if isinstance(pretrained, str) else getattr(pretrained, "name_or_path", None)
        self.is_embedded = pretrained is None or embedded.is_embedded(pretrained)
        if self.is_embedded:
            self.model_label = embedded.NAME
            check_known(rest, None)
            if rest.get("gguf_file") is not None:
                raise UserError(f"gguf_file={rest['gguf_file']} needs pretrained=: give the folder that holds the file")
            pretrained = str(embedded.ensure())
        elif isinstance(pretrained, str):
            pretrained = check_path(pretrained, rest.get("gguf_file"), rest.get("subfolder"))
            self._typed = check_known(rest, (pretrained, rest))
        else:
            check_known(rest, None)
        if rest.get("device") is None:
            rest["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        check_device(rest)
        check_backend(self.sparse.backend, str(rest["device"]))
        check_batch_size(rest)

        self.run_id = uuid.uuid4().hex[:12]
        self.ledgers: dict[str, Ledger] = defaultdict(self._new_ledger)
        self.skipped: dict[str, str] = {}
        #: Whether any prompt ran.
        self.begun = False
        self.templated = False
        self.warned_about_template = False
        self.model_args = rest
        # lm-eval gives a model's own beside what was typed.
        passed = {name: value for name, value in rest.items() if name != "quantization_config"}
        with explained(self._named, self._typed):
            super().__init__(pretrained=pretrained, **passed)
            self.tok_encode("Text of any kind.")  # a tokenizer may load from files that are not all there
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and accelerator.num_processes > 1 and self._world_size == 1:
            # lm-eval splits documents over processes on GPUs only, and takes the local rank for the global one.
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if not isinstance(pretrained, str):
            self.model.set_attn_implementation(IMPLEMENTATION)
        check_loaded(self.model, self.max_length, self.custom_prefix_token_id)
        self.runtime.attach(self.model)
        self._check_attention()
        self._check_preset()
        set_active_lm(self)

    # --- construction ----------------------------------------------------------------------------------------

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        """As lm-eval's, and name the embedded model in the logged arguments when no other is given."""
        # The same words in the same place as in lm-eval's own check.
        warns = any(word in str(value).lower() for value in arg_dict.values() for word in INSTRUCT_WORDS)
        for name in arg_dict.keys() & (additional_config or {}).keys():
            if additional_config[name] is not None:
                raise UserError(
                    f"{name}={arg_dict[name]} in --model_args, and {name}={additional_config[name]} beside it: leave "
                    f"it out of --model_args and type --{name} {arg_dict[name]}"
                )
        lm = super().create_from_arg_obj({"pretrained": None, **arg_dict}, additional_config)
        lm.lm_eval_warns = warns
        if arg_dict.get("pretrained") is None:
            arg_dict["pretrained"] = embedded.NAME
        return lm

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def _named(self) -> str:
        """The model as messages about its files name it."""
        return f"pretrained={self.model_label!r}"

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        with explained(self._named, self._typed):
            super()._get_config(pretrained, **kwargs)

    def _create_tokenizer(self, *args: Any, **kwargs: Any) -> None:
        own = self.model_args.get("tokenizer")
        with explained(self._named if own is None else f"tokenizer={own!r}"):
            super()._create_tokenizer(*args, **kwargs)

    def _get_backend(self, config: Any, backend: str = "default", trust_remote_code: bool | None = False) -> None:
        super()._get_backend(config, backend="default", trust_remote_code=trust_remote_code)
        if self.backend != "causal":
            raise UserError(
                f"pretrained={self.model_label!r} is an encoder-decoder model ({config.model_type}): sparse-hf "
                "evaluates decoder-only causal models; use --model hf for this one"
            )
        name = getattr(config, "model_type", None)
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        encoder = getattr(config, "is_decoder", None) is False and not getattr(config, "is_causal", True)
        architectures = getattr(config, "architectures", None) or []
        if encoder or (name in ENCODERS and not getattr(config, "is_decoder", False)):
            raise UserError(
                f"pretrained={self.model_label!r} ({name}) has no causal attention: sparse-hf evaluates decoder-only "
                "causal models"
            )
        if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not trust_remote_code:
            raise UserError(
                f"pretrained={self.model_label!r} ({name or architectures}) is not a causal language model that "
                "transformers knows: sparse-hf evaluates decoder-only causal models"
            )

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        """Load the model with our attention; image towers and the like keep their own."""
        parts = getattr(self.config, "sub_configs", None) or {}
        if "text_config" in parts:
            kwargs["attn_implementation"] = {
                name: IMPLEMENTATION if name == "text_config" else "sdpa" for name in parts
            }
        else:
            kwargs["attn_implementation"] = IMPLEMENTATION
        if (quantization := self.model_args.get("quantization_config")) is not None:
            kwargs["quantization_config"] = quantization
        with explained(self._named, self._typed):
            automatic, self.AUTO_MODEL_CLASS = self.AUTO_MODEL_CLASS, Whole(self.AUTO_MODEL_CLASS, self._typed)
            try:
                with adapters.loading(self, kwargs):
                    super()._create_model(pretrained, **kwargs)
            except (ValueError, KeyError) as error:
                # Models older than the interface look the name up in a table of their own.
                refused = isinstance(error, KeyError) and error.args == (IMPLEMENTATION,)
                if isinstance(error, UserError) or not (refused or "attention" in str(error).lower()):
                    raise
                raise UserError(self._no_interface()) from error
            finally:
                self.AUTO_MODEL_CLASS = automatic

    def _no_interface(self) -> str:
        return (
            f"{self._kind()} does not support registered attention functions in transformers "
            f"{transformers.__version__}: use --model hf for this model"
        )

    def _kind(self) -> str:
        """The model as messages name it."""
        name = f"pretrained={self.model_label!r}" if self.model_label else "the given model"
        return f"{name} ({self.config.model_type})"

    @torch.no_grad()
    def _check_attention(self) -> None:
        """Find out what each layer is, and whether it comes out of our runtime as it is, before any prompt."""
        text = self.config.get_text_config(decoder=True)
        self.runtime.longest = max(getattr(text, "max_position_embeddings", None) or 0, self.max_length)
        kind = self._kind()
        steps = 1 if self._is_recurrent else probe.STEPS
        try:
            self._trial = probe.check(self.model, self._forward, self.runtime, steps)
        except probe.CheckError as error:
            raise UserError(f"{kind} cannot be evaluated as asked: {error}; {error.instead}") from error
        except UserError as error:  # which says what to type
            raise UserError(f"{kind} cannot be evaluated: {error}") from error
        except Exception as error:  # modelling code of any age, with requirements of any kind
            if out_of_memory(error):
                raise
            raise UserError(
                f"{kind} does not run here ({type(error).__name__}: {first_line(error)}); sparse-hf evaluates "
                "decoder-only causal models that use transformers' attention interface: use --model hf for this one"
            ) from error

    def _check_preset(self) -> None:
        """Raise when no prompt that the model can read is long enough for the preset."""
        if self.sparse.preset is None:
            return
        shortest = max(presets.shortest(self.sparse.preset, type(method)) for method in self.sparse.methods.values())
        if shortest > self.max_length:
            raise UserError(
                f"preset={self.sparse.preset} has parameters for prompts from {shortest} tokens on, and {self._kind()} "
                f"takes {self.max_length}: leave preset out, and the knobs are solved for the sparsity"
            )

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        """Find prompts (tokens) at which what was asked cannot be done, before any run."""
        self.runtime.check_lengths(lengths)
        # Once some prompts ran, others that are all too short are dense beside them, and counted so.
        if self.begun or not any(assignment.window for assignment in self.runtime.plan.phases.values()):
            return
        ends = [-min(lengths, default=2**40), max(lengths, default=0)]
        if self.world_size > 1:  # another rank may have longer ones
            ends = self.all_gather(torch.tensor([ends], device=self.device)).amax(0).tolist()
        if ends[1]:
            self.runtime.check_windows(-ends[0], ends[1])

    # --- running the model -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _forward(
        self,
        ids: Tensor,
        *,
        cache: SparseCache | None,
        positions: Tensor | None = None,
        keep: int | None = None,
        step: bool = False,
    ) -> Tensor:
        """Logits `(B, keep or q_len, V)` of `(B, q_len)` token ids after what `cache` holds.

        Args:
            step: this is a step of the decoder, which must not wait for the device.
        """
        takes = inspect.signature(self.model.forward).parameters
        options: dict[str, Any] = {cache_argument(self.model): cache}
        if positions is not None and "position_ids" in takes:  # other models count what the cache holds
            options["position_ids"] = positions
        if step:
            # Models that get no mask look for padding themselves.
            if len(ids) not in self._no_padding:
                self._no_padding[len(ids)] = torch.ones(len(ids), 2, dtype=torch.bool, device=ids.device)
            options["attention_mask"] = self._no_padding[len(ids)]
        if keep is not None and "logits_to_keep" in takes:
            options["logits_to_keep"] = keep
        with (
            torch.autocast(
                device_type=self.device.type,
                dtype=self.mixed_precision_dtype,
                enabled=self.mixed_precision_dtype is not None,
            ),
            calling(self.runtime, unpadded=step),
        ):
            self.runtime.begin(ids.shape[1])
            logits = self.model(input_ids=ids, use_cache=cache is not None, **options).logits
        wanted = self.runtime.calls_of_a_pass
        if wanted not in (None, self.runtime.calls) and self.runtime.probe is None:
            raise UserError(
                f"{self._kind()} called attention {self.runtime.calls} times for {ids.shape[1]} tokens, and "
                f"{wanted} times when it was checked at start-up: use --model hf for this model"
            )
        return logits if keep is None else logits[:, -keep:]

    def _log_softmax(self, logits: Tensor) -> Tensor:
        """Log-probabilities, in fp32 unless `softmax_dtype` asks otherwise: bf16 would round them to steps of 1/16."""
        return F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype or torch.float32)

    def _new_ledger(self) -> Ledger:
        return Ledger(full=self.full_stats)

    def _detect_batch_size(self, requests: Sequence | None = None, pos: int = 0) -> int:
        """lm-eval probes with five forward passes of made-up full-length prompts; they would be counted as ours."""
        return 1

    # --- scoring ---------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's; every answer is a tuple that also carries its measured sparsity."""
        if self.enable_thinking:
            raise UserError("enable_thinking=True works with generated tasks only: leave it out for scored ones")
        self._before_requests()
        results: list[Any] = [None] * len(requests)
        contexts: dict[tuple, Context] = {}
        for index, request in enumerate(tqdm(requests, desc="Tokenizing inputs", disable=disable_tqdm)):
            if (reason := skip_reason(request)) is not None:
                self.skipped[request.task_name] = reason
                results[index] = MeasuredLoglikelihood(0.0, False, {})
                continue
            prompt, target, scored = self._tokenize_pair(*request.args, task=request.task_name)
            window = window_of(request.args[0])
            key = (request.task_name, window, *prompt)
            context = contexts.setdefault(key, Context(prompt, task=request.task_name, window=window))
            context.targets.append(Target(index, target, scored, tuple(map(str, request.args))))
        self._score(list(contexts.values()), results, len(requests), disable_tqdm)
        return results

    def _tokenize_pair(
        self, context: str, continuation: str, task: str | None = None
    ) -> tuple[list[int], list[int], int]:
        """Prompt tokens, tokens after it, and how many of those at the end are scored."""
        head, tail = self._encode_pair(context, continuation) if context else ([], [])
        if head:
            whole, scored, before = [*head, *tail], len(tail), len(head)
            if isinstance(context, SharedPrompt) and context.shared < len(context):
                before = common_prefix(self._shared_encoder.prompt(context[: context.shared]), head)
        else:  # no context, or one of nothing but space, which belongs to the continuation
            tokens = self.tok_encode(context + continuation, add_special_tokens=False)
            whole = tokens if tokens[:1] == [self.prefix_token_id] else [self.prefix_token_id, *tokens]
            before, scored = 1, len(whole) - 1
        if not scored:
            what = "is empty" if not continuation else f"{continuation!r} gives no token of its own"
            raise UserError(
                f"{f'task {task}: ' if task else ''}the continuation of a document {what}, so there is nothing to "
                f"score (its context ends in {context[-60:]!r}): give the document an answer (doc_to_target, "
                "doc_to_choice), or leave the task out"
            )
        if scored > self.max_length:
            raise UserError(
                f"a continuation of {scored} tokens cannot be scored (the model takes 1 to {self.max_length}): "
                f"{continuation[:60]!r}; leave this task out or raise max_length"
            )
        surplus = len(whole) - (self.max_length + 1)
        if surplus > 0:
            logger.warning(
                "context and continuation have %d tokens, the model takes %d: dropping %d tokens from the left",
                len(whole), self.max_length, surplus,
            )  # fmt: skip
            whole, before = whole[surplus:], before - surplus
        # Something has to be prefilled for the first scored token to be predicted from.
        before = max(1, min(before, len(whole) - scored))
        return whole[:before], whole[before:], scored

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval's; the requests of a shared prompt, which follow each other, read it once."""
        if not isinstance(context, SharedPrompt) or context.rstrip() != context:
            return super()._encode_pair(context, continuation)
        head = self._shared_encoder(str(context), context.shared)
        whole = self._shared_encoder(context + continuation, context.shared)
        return head, whole[len(head) :]

    @cached_property
    def _shared_encoder(self) -> SharedEncoder:
        return SharedEncoder(self.tok_encode)

    def _loglikelihood_tokens(
        self, requests: list[tuple], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """lm-eval's token-level entry point: `((context, continuation), context tokens, continuation tokens)`."""
        results: list[Any] = [None] * len(requests)
        contexts: dict[tuple, Context] = {}
        for index, (key, head, tail) in enumerate(requests):
            whole = [*head, *tail][-(self.max_length + 1) :]
            prompt = whole[: len(whole) - len(tail)]
            window = window_of(key[0]) if key else None
            context = contexts.setdefault((window, *prompt), Context(prompt, window=window))
            context.targets.append(Target(index, list(tail), len(tail), key))
        self._score(list(contexts.values()), results, len(requests), disable_tqdm)
        return results

    def _score(self, contexts: list[Context], results: list[Any], total: int, disable_tqdm: bool) -> None:
        """Fill `results` for all targets of all contexts, longest contexts first (an out-of-memory shows at once)."""
        contexts = sorted(contexts, key=lambda context: (-len(context.prompt), context.prompt))
        fresh: dict[str, Ledger] = defaultdict(self._new_ledger)
        later = [a.method.name for phase, a in self.runtime.plan.phases.items() if phase != "prefill"]
        if later and contexts and self._is_recurrent:
            raise UserError(
                f"{self._kind()} keeps a recurrent state, so answers are scored in one pass with their context and "
                f"{' and '.join(later)} cannot be applied: use generated tasks, or a prefill method"
            )
        whole = [self._is_recurrent or self._stretched(*context.lengths()) is not None for context in contexts]
        self._check_lengths([context.lengths()[in_one] for context, in_one in zip(contexts, whole, strict=True)])
        self._refuse_dynamic(max((context.lengths()[1] for context in contexts), default=0))
        if later and any(whole):
            prompt, length = contexts[whole.index(True)].lengths()
            raise UserError(
                f"{self._kind()} has {self._stretched(prompt, length)}: a prompt of {prompt} tokens with its answer "
                f"({length} in all) is scored in one pass, and {' and '.join(later)} cannot be applied: use prompts of "
                "another length, or a prefill method"
            )
        quiet = disable_tqdm or self.rank != 0
        with tqdm(total=total, disable=quiet, desc="Running loglikelihood requests") as bar:
            for context, in_one in zip(contexts, whole, strict=True):
                answers = (self._score_whole if in_one else self._score_context)(context)
                stats = self._stats(context.counts)
                fresh[context.task or ""].add(context.counts)
                for target, (logprob, greedy) in zip(context.targets, answers, strict=True):
                    results[target.index] = MeasuredLoglikelihood(logprob, greedy, stats)
                    if target.key is not None:
                        self.cache_hook.add_partial("loglikelihood", target.key, results[target.index])
                    bar.update(1)
        self._after_requests(fresh)

    def _score_context(self, context: Context) -> list[tuple[float, bool]]:
        """Prefill a context, then run its answers against the cache.

        Contexts run one at a time whatever the batch size: side by side they would be padded and round differently.
        """
        sequences = context.sequences()
        cache = self.runtime.new_cache(self.model.config, reserve=max(map(len, sequences)))
        with self.runtime.running(context.counts, cache, len(context.prompt), context.window):
            logits = self._forward(torch.tensor([context.prompt], device=self.device), cache=cache, keep=1)
            first = self._log_softmax(logits[:, -1])
            snapshot = cache.snapshot()
            scored: dict[tuple, Tensor] = {}
            hits: dict[tuple, Tensor] = {}
            for tokens in sequences:
                scored[tuple(tokens)], hits[tuple(tokens)] = self._score_tokens(tokens, first, cache)
                cache.restore(snapshot)
        return context.answers(scored, hits)

    def _score_tokens(self, tokens: list[int], first: Tensor, cache: SparseCache) -> tuple[Tensor, Tensor]:
        """Log-probability and greedy hit of each token of one answer; `first (1, V)` predicts its first token."""
        pieces: list[Tensor] = []
        greedy: list[Tensor] = []

        def note(logprobs: Tensor, tokens: list[int]) -> None:
            wanted = torch.tensor(tokens, device=logprobs.device)
            pieces.append(logprobs.gather(-1, wanted[:, None])[:, 0].float().cpu())
            greedy.append((logprobs.argmax(-1) == wanted).cpu())

        note(first, tokens[:1])
        steps = len(tokens) - 1
        for begin in range(0, steps, SCORE_CHUNK):
            end = min(begin + SCORE_CHUNK, steps)
            # Token i predicts token i + 1. Where it stands is told by the cache, as it is to `hf` by what came before.
            logits = self._forward(torch.tensor([tokens[begin:end]], device=self.device), cache=cache)
            note(self._log_softmax(logits[0]), tokens[begin + 1 : end + 1])
        return torch.cat(pieces).double(), torch.cat(greedy)

    @cached_property
    def _stretches(self) -> list[Stretch]:
        """The model's rotary embeddings that depend on the length of the text."""
        return stretches(self.model)

    def _stretched(self, prompt: int, total: int) -> Stretch | None:
        """What stretches between a prompt and the `total` tokens of prompt and answer, if anything."""
        return next((stretch for stretch in self._stretches if stretch.within(prompt, total)), None)

    def _refuse_dynamic(self, longest: int) -> None:
        """Raise `UserError` for a text of so many tokens whose positions would depend on what ran before it."""
        for stretch in self._stretches:
            if stretch.kind == "dynamic" and longest > stretch.bound:
                raise UserError(
                    f"{self._kind()} has {stretch}, and stay those of the longest text that ran: a text of {longest} "
                    f"tokens has no answer of its own; use texts of at most {stretch.bound} tokens, prompt and answer"
                )

    @property
    def _is_recurrent(self) -> bool:
        """Whether the model carries a state that cannot be rolled back to the end of the context."""
        return bool(getattr(self.model, "_is_stateful", False))

    def _score_whole(self, context: Context) -> list[tuple[float, bool]]:
        """For recurrent models: context and answer in one pass, which makes the answer part of the prefill."""
        scored: dict[tuple, Tensor] = {}
        hits: dict[tuple, Tensor] = {}
        for tokens in context.sequences():
            with self.runtime.running(context.counts, window=context.window):
                ids = torch.tensor([[*context.prompt, *tokens[:-1]]], device=self.device)
                logprobs = self._log_softmax(self._forward(ids, cache=None, keep=len(tokens))[0])
            wanted = torch.tensor(tokens, device=self.device)
            scored[tuple(tokens)] = logprobs.gather(-1, wanted[:, None])[:, 0].double().cpu()
            hits[tuple(tokens)] = (logprobs.argmax(-1) == wanted).cpu()
        return context.answers(scored, hits)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's: the sum over windows of at most `max_length` tokens, each run as one prefill."""
        self._before_requests()
        results: list[float] = []
        fresh: dict[str, Ledger] = defaultdict(self._new_ledger)
        cut = [self._rolling_windows(request.args[0]) for request in requests]
        self._check_lengths([len(head) + len(tail) - 1 for windows in cut for head, tail in windows])
        quiet = disable_tqdm or self.rank != 0
        for request, windows in zip(tqdm(requests, disable=quiet, desc="Running rolling requests"), cut, strict=True):
            (text,) = request.args
            counts, total = RowCounts(), 0.0
            with self.runtime.running(counts, window=window_of(text)):
                for head, tail in windows:
                    ids = torch.tensor([[*head, *tail][:-1]], device=self.device)
                    self._refuse_dynamic(ids.shape[1])
                    logits = self._forward(ids, cache=None, keep=len(tail))[0]
                    wanted = torch.tensor(tail, device=self.device)
                    for begin in range(0, len(tail), SCORE_CHUNK):
                        part = self._log_softmax(logits[begin : begin + SCORE_CHUNK])
                        total += float(part.gather(-1, wanted[begin : begin + SCORE_CHUNK, None]).double().sum())
            results.append(MeasuredFloat(total, self._stats(counts)))
            fresh[request.task_name or ""].add(counts)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        self._after_requests(fresh)
        return results

    def _rolling_windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Tokens to read and tokens to score, of each window of a text."""
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return list(map(make_disjoint_window, windows))

    # --- generation ------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's; every text is a `str` that also carries its measured sparsity."""
        self._before_requests()
        results: list[Any] = [None] * len(requests)
        queue = []
        for index, request in enumerate(requests):
            if (reason := skip_reason(request)) is not None:
                self.skipped[request.task_name] = reason
                results[index] = MeasuredText("", {})
            else:
                queue.append((index, *request.args))
        for gen_kwargs in {json.dumps(item[2], sort_keys=True, default=str): item[2] for item in queue}.values():
            self._check_generation(gen_kwargs)
        lengths = {context: len(self.tok_encode(context)) for _, context, _ in queue}
        self._check_prompt_lengths(queue, lengths)
        # The longest first: should memory run out, it does so at once, and storage made for them serves all others.
        order = Collator(
            queue,
            sort_fn=lambda item: (-lengths[item[1]], item[1]),
            group_by="gen_kwargs",
            group_fn=lambda item: item[2],
        )
        fresh: dict[str, Ledger] = defaultdict(self._new_ledger)
        quiet = disable_tqdm or self.rank != 0
        groups: dict[str, list[tuple]] = defaultdict(list)
        for item in order.get_batched(n=1):
            groups[json.dumps(item[0][2], sort_keys=True, default=str)].append(item[0])
        with tqdm(total=len(queue), disable=quiet, desc="Running generate_until requests") as bar:
            for group in groups.values():
                for (index, context, gen_kwargs), text, counts in self._generate(group, lengths):
                    results[index] = MeasuredText(text, self._stats(counts))
                    fresh[requests[index].task_name or ""].add(counts)
                    self.cache_hook.add_partial("generate_until", (context, gen_kwargs), results[index])
                    bar.update(1)
        if self._decoder is not None:
            self._decoder.release()
        self._after_requests(fresh)
        return results

    def _whole_lengths(self, context: str, gen_kwargs: dict[str, Any], lengths: dict[str, int]) -> tuple[int, int]:
        """Tokens of a prompt, and of prompt and longest answer."""
        answer = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)["max_gen_toks"]
        prompt = min(lengths[context], self.max_length - answer)
        return prompt, prompt + answer

    def _check_prompt_lengths(self, queue: list[tuple], lengths: dict[str, int]) -> None:
        """Find prompts at which a sparsity is out of reach, a preset has no knobs or no answer fits, before any run."""
        found = []
        for _, context, gen_kwargs in queue:
            kwargs = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
            room = self.max_length - kwargs["max_gen_toks"]
            found.append(min(lengths[context], room))
            if not lengths[context]:
                self._prompt(context, room)
            # A number of new tokens that the model's configuration gives comes before a length.
            limit = None if self.model.generation_config.max_new_tokens is not None else kwargs.get("max_length")
            if limit is not None and limit <= found[-1]:
                raise UserError(
                    f"--gen_kwargs max_length={limit} leaves a prompt of {found[-1]} tokens no room for an answer: it "
                    f"counts prompt and answer; give more than {found[-1]}, or max_gen_toks= instead"
                )
        self._check_lengths(found)
        for _, context, gen_kwargs in queue if self._stretches else ():
            prompt, whole = self._whole_lengths(context, gen_kwargs, lengths)
            self._refuse_dynamic(whole)
            if self.runtime.plan.phases and (stretch := self._stretched(prompt, whole)) is not None:
                raise UserError(
                    f"{self._kind()} has {stretch}: an answer of up to {whole - prompt} tokens to a prompt of {prompt} "
                    "may go there, where what was kept of the prompt is worth nothing; use prompts of another length, "
                    "fewer max_gen_toks, or method=dense"
                )

    def _generate(self, items: list[tuple], lengths: dict[str, int]) -> Iterator[tuple[tuple, str, RowCounts]]:
        """Answer requests `(index, context, generation arguments)` that share their arguments, the longest first."""
        kwargs = normalize_gen_kwargs(items[0][2], self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        room = self.max_length - kwargs["max_gen_toks"]
        sampling = Sampling.of(self.model, kwargs, self.device)
        decoder, reason = self._get_decoder()
        if isinstance(sampling, str):
            decoder, reason = None, sampling
        bent: list[tuple] = []
        if self._stretches:
            bent = [i for i in items if self._stretched(*self._whole_lengths(i[1], i[2], lengths)) is not None]
        for item in items if decoder is None else bent:
            ids, why = self._prompt(item[1], room), reason
            if item in bent:  # what the model then does with its cache is for it to say
                why = f"the model has {self._stretches[0]}"
            text, counts = self._generate_by_transformers(
                ids, kwargs, until, why, own_cache=item not in bent, window=window_of(item[1])
            )
            yield item, text, counts
        items = [item for item in items if item not in bent]
        if decoder is None or not items:
            return
        self._fitting = None
        waiting = items
        met: Counter[tuple[int, ...]] = Counter()  # a prompt that is sampled several times gets several answers
        while waiting:
            tokens = [min(lengths[item[1]], room) for item in waiting]
            some = self._some(tokens, sampling.limit(tokens[-1]), decoder)
            batch = waiting[:some]
            prompts = [self._prompt(item[1], room) for item in batch]
            failed, before = None, met.copy()
            try:
                answers = self._decode(decoder, prompts, sampling, until, met, [window_of(item[1]) for item in batch])
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                failed = first_line(error)
            if failed is not None:  # the error is gone, and with it what it kept alive
                met = before
                decoder.release()
                clear_torch_cache()
                self._fewer(len(batch), prompts[0].shape[1], failed)
                continue
            waiting = waiting[some:]
            yield from ((item, *answer) for item, answer in zip(batch, answers, strict=True))

    def _prompt(self, context: str, room: int) -> Tensor:
        """Token ids `(1, L)` of a prompt, as lm-eval makes and truncates them."""
        ids, _ = self.tok_batch_encode([context], left_truncate_len=room, truncation=self.truncation)
        if not ids.shape[1]:
            raise UserError(
                "a prompt is empty, so there is nothing to continue: give the task one, or type add_bos_token=True"
            )
        return ids.to(self.device)

    def _some(self, lengths: list[int], reserve: int, decoder: Decoder) -> int:
        """How many of the next prompts (tokens each, the longest first) to decode side by side."""
        plan = self.runtime.plan
        if str(self.batch_size).startswith("auto"):
            room = min(reserve, RESERVE)
            fitting = self.memory.rows(lengths, room, plan, decoder.held_bytes())
            most = min(int(self.max_batch_size or decoder.most), fitting)
        else:
            most = int(self.batch_size)
        decoder.ask(most)
        return max(1, min(most, decoder.most, len(lengths), self._fitting or len(lengths)))

    @cached_property
    def memory(self) -> MemoryModel:
        """What decides how many prompts `batch_size=auto` takes."""
        return MemoryModel(self.model, self.runtime, self.device)

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
        sampling: Sampling,
        until: list[str],
        met: Counter[tuple[int, ...]],
        windows: list[int | None],
    ) -> list[tuple[str, RowCounts]]:
        """Prefill prompts one after the other, decode them side by side; `windows` are what their tasks say."""
        limits = [sampling.limit(ids.shape[1]) for ids in prompts]
        decoder.start([ids.shape[1] for ids in prompts], min(max(limits), max(RESERVE, decoder.grown)))
        rows: list[Row] = []
        lookback = Stop.lookback(self.tokenizer, until)
        ends = {self.eot_token_id, *sampling.ends}
        for ids, limit, window in zip(prompts, limits, windows, strict=True):
            length = ids.shape[1]
            chooser = sampling.row(ids, met)
            row = Row(length, RowCounts(), Stop(self.tokenizer, lookback, ends, limit), chooser)
            cache = decoder.new_cache(length)
            with self.runtime.running(row.counts, cache, length, window):
                logits = self._prefill(ids, cache, sampling.chunk)[0, -1]
            decoder.adopt(row, cache)
            del cache  # window layers keep the whole prompt's keys and values alive
            row.take(int(logits.argmax()) if chooser is None else chooser(logits, row.tokens))
            rows.append(row)
        decoder.run(rows)
        return [(self._finish(row.tokens, until), row.counts) for row in rows]

    def _prefill(self, ids: Tensor, cache: SparseCache, chunk: int | None) -> Tensor:
        """Logits `(1, 1, V)` behind a prompt, read at once or in chunks of so many tokens."""
        length = ids.shape[1]
        for first in range(0, length, chunk or length):
            part = ids[:, first : first + (chunk or length)]
            positions = torch.arange(first, first + part.shape[1], device=self.device)[None]
            logits = self._forward(part, cache=cache, positions=positions, keep=1)
        return logits

    def _get_decoder(self) -> tuple[Decoder | None, str | None]:
        """What decodes answers, or why transformers has to."""
        if self._decoder is None and self._no_decoder is None:
            self._no_decoder = self._make_decoder()
            if self._no_decoder is not None:
                self._decoder = None
                logger.warning("answers are decoded by transformers: %s", self._no_decoder)
        return self._decoder, self._no_decoder

    @torch.no_grad()
    def _make_decoder(self) -> str | None:
        """Make the decoder and let it predict one token; returns why it cannot be used, or None."""
        if (reason := undecodable(self.model.config, self.runtime)) is not None:
            return reason
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            return "the model takes no positions"
        if len({parameter.device for parameter in self.model.parameters()}) > 1:
            return "the model is spread over several devices"

        def call(ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
            return self._forward(ids, cache=cache, positions=positions, step=True)[:, -1]

        mixed = None if self.mixed_precision_dtype is None else "mixed precision"
        multiple = None
        if self.device.type == "cpu" and self.model.dtype in (torch.bfloat16, torch.float16):
            multiple = rows_alike(self.model)
        decoder = Decoder(call, self.model.config, self.runtime, self.device, multiple, no_graph=mixed)
        for stretch in self._stretches:  # they stretch the positions of all rows by the longest one
            decoder.alone = f"positions of kind {stretch.kind!r} depend on the neighbours"
        ids, watch = self._trial, probe.Probe(self.runtime)
        plan, self.runtime.plan = self.runtime.plan, type(self.runtime.plan)()
        try:
            decoder.start([ids.shape[1] - 1], 2)
            cache = decoder.new_cache(ids.shape[1] - 1)
            row = Row(ids.shape[1] - 1, RowCounts(), lambda tokens: False, None)
            with watch.watching():
                with self.runtime.running(row.counts, cache, row.prompt):
                    self._prefill(ids[:, :-1], cache, None)
                decoder.adopt(row, cache)
                row.take(int(ids[0, -1]))
                watch.decodes = True
                found = decoder.try_one(row)
                if not torch.equal(found, decoder.try_one(row, claims=self.runtime.longest - 1)):
                    return "what the model computes depends on how long its cache says to be"
            wanted = self._forward(ids, cache=None, keep=1)[0, -1]
            if not probe.alike(self.model, self._forward, self.runtime, ids, found, wanted):
                return f"decoded logits are {probe.distance(found, wanted):.2g} off those of a pass without a cache"
        except Exception as error:  # modelling code of any age
            if out_of_memory(error):
                raise
            return first_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
        finally:
            self.runtime.plan = plan
        decoder.release()
        self._decoder = decoder
        return None

    def _generate_by_transformers(
        self,
        ids: Tensor,
        kwargs: dict[str, Any],
        until: list[str],
        reason: str | None,
        own_cache: bool = True,
        window: int | None = None,
    ) -> tuple[str, RowCounts]:
        """Answer one prompt by `generate`: beams, and whatever else the decoder does not know.

        Args:
            own_cache: whether in our cache; without it no method can evict or decode.
            window: what the prompt's task says.
        """
        kwargs = dict(kwargs)
        max_gen_toks = kwargs.pop("max_gen_toks")
        cache = self.runtime.new_cache(self.model.config, reserve=max_gen_toks) if own_cache else None
        counts, length = RowCounts(), ids.shape[1]
        with self.runtime.running(counts, cache, length, window):
            output = self._model_generate(
                context=ids,
                attention_mask=torch.ones_like(ids),
                stop=until,
                **{"max_length": length + max_gen_toks, **kwargs, **NEUTRAL},
                **({} if cache is None else {generation_argument(): cache}),
            )
        tokens = output[0, length:].tolist()
        phase = counts.phases["decode"]
        phase.loops["transformers"] += max(0, len(tokens) - 1)
        phase.loop_reasons[reason or ""] += max(0, len(tokens) - 1)
        return self._finish(tokens, until), counts

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """As lm-eval's."""
        stops = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
        hook = self.model.register_forward_pre_hook(self._pass_begins, with_kwargs=True)
        try:
            return self._generated(context, max_length, stops, generation_kwargs)
        finally:
            hook.remove()

    def _pass_begins(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the runtime what transformers' own loop is about to run."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.runtime.begin((kwargs["inputs_embeds"] if ids is None else ids).shape[1])

    def _generated(self, context: Tensor, max_length: int, stops: Any, generation_kwargs: dict[str, Any]) -> Tensor:
        with (
            calling(self.runtime),
            torch.autocast(
                device_type=self.device.type,
                dtype=self.mixed_precision_dtype,
                enabled=self.mixed_precision_dtype is not None,
            ),
        ):
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=stops,
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **generation_arguments(generation_kwargs),
            )

    def _check_generation(self, gen_kwargs: dict[str, Any]) -> None:
        """Raise `UserError` on generation arguments that cannot be followed, before any prompt runs."""
        given = " ".join(f"{name}={value}" for name, value in gen_kwargs.items())
        try:
            kwargs = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"--gen_kwargs {given} is not understood ({first_line(error)}): max_gen_toks takes a whole number, "
                "such as max_gen_toks=64, and temperature a number, such as temperature=0.7"
            ) from error
        if kwargs["max_gen_toks"] < 1:
            raise UserError(
                f"max_gen_toks={kwargs['max_gen_toks']} is no number of tokens to generate: type one of at least 1, "
                "such as --gen_kwargs max_gen_toks=64"
            )
        if kwargs["max_gen_toks"] >= self.max_length:
            raise UserError(
                f"max_gen_toks={kwargs['max_gen_toks']} leaves no room for a prompt: the model takes {self.max_length} "
                "tokens in all; type a smaller --gen_kwargs max_gen_toks="
            )
        check_generation(self.model, kwargs)
        chunk, typed = self.model.generation_config.prefill_chunk_size, "prefill_chunk_size" in kwargs
        chunk = kwargs["prefill_chunk_size"] if typed else chunk
        whole = [a.method.name for phase, a in self.runtime.plan.phases.items() if phase != "decode"]
        if whole and chunk is not None:
            source, way = "--gen_kwargs ", "leave prefill_chunk_size out"
            if not typed:
                source, way = "the model's generation_config.json sets ", "type --gen_kwargs prefill_chunk_size=None"
            raise UserError(
                f"{source}prefill_chunk_size={chunk}: {' and '.join(whole)} looks at the whole prompt at once; {way}, "
                "or use method=dense"
            )

    def _finish(self, tokens: list[int], until: list[str]) -> str:
        """Text of generated tokens without thinking and stop strings, as lm-eval cuts them."""
        by_id = isinstance(self.think_end_token, int)
        if by_id and self.think_end_token in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(self.think_end_token) :]
        text = self.tok_decode(tokens)
        return postprocess_generated_text(
            generation=text.lstrip() if by_id else text,
            stop=until,
            think_end_token=None if by_id else self.think_end_token,
        )

    # --- what was measured -----------------------------------------------------------------------------------

    def _stats(self, counts: RowCounts) -> dict[str, Any]:
        """What a response carries: the measured sparsity of the phases that methods fill, and the details.

        `sparsity` is that of the one phase with a method (of prefill when all is dense), `sparsities` those of all
        phases with a method, under the names of the arguments that ask for them.
        """
        figures = counts.figures()
        measured = {
            PHASE_ARGUMENTS[phase]: figures[phase]["executed_sparsity"] for phase in self.sparse.methods or ("prefill",)
        }
        return {
            "run": self.run_id,
            "sparsity": next(iter(measured.values())) if len(measured) == 1 else None,
            **({"sparsities": measured} if len(measured) > 1 else {}),
            "requested_sparsity": self.sparse.sparsity,
            **{
                name: {
                    **figures[name],
                    "calls": dict(counts.phase(name).calls),
                    "backends": dict(counts.phase(name).backends),
                    **self._window_told(name, counts),
                }
                for name in PHASES
            },
        }

    def _window_told(self, phase: str, counts: RowCounts) -> dict[str, Any]:
        """The window that a response was made with, where its task decided it."""
        assignment, used = self.runtime.plan.phases.get(phase), counts.phase(phase).knobs.get("window")
        return {"window": used[1]} if assignment is not None and assignment.window_by_task and used else {}

    def _before_requests(self) -> None:
        # Another SparseHFLM may have wrapped the same model in the meantime.
        self.runtime.attach(self.model)
        template = getattr(self.tokenizer, "chat_template", None)
        if template and not (self.templated or self.lm_eval_warns or self.warned_about_template):
            self.warned_about_template = True
            logger.warning(
                "%s is an instruct model (its tokenizer has a chat template), but prompts are sent without it; "
                "type --apply_chat_template to use it",
                self.model_label,
            )

    def _after_requests(self, fresh: dict[str, Ledger]) -> None:
        """Merge what this process counted, and on rank 0 what the others did."""
        self.begun = True
        parts = self.gather_object(dict(fresh), dst=0) if self.world_size > 1 else [dict(fresh)]
        for part in parts or []:
            for task, ledger in part.items():
                self.ledgers[task].merge(ledger)

    def count_restored(self, task: str, stats: dict[str, Any], window: int | None = None) -> None:
        """Count an answer that came from a response cache with what was measured when it was made.

        Raises `UserError` when its task said another window then than now (`window`): lm-eval's key for an answer does
        not hold it.
        """
        for phase, assignment in self.runtime.plan.phases.items():
            made, now = stats[phase].get("window"), presets.window(assignment.preset, type(assignment.method), window)
            if made is not None and made != now:
                raise UserError(
                    f"the --use_cache file holds answers of {task} that {assignment.method.name} made with window="
                    f"{made}, and the task says {now} now; give another file name, or delete that one"
                )
        self.ledgers[task].add_stats(stats)

    def report(self) -> dict[str, Any]:
        """The `sparse` block of the results file."""
        total = self._new_ledger()
        for ledger in self.ledgers.values():
            total.merge(ledger)
        untouched = {layer: reason for layer, reason in self.runtime.layers.items() if reason is not None}
        count = getattr(self.config.get_text_config(decoder=True), "num_hidden_layers", len(self.runtime.layers))
        untouched |= {n: "no softmax attention" for n in range(count) if n not in self.runtime.layers}

        def phases(ledger: Ledger) -> dict[str, Any]:
            methods = {
                name: self.sparse.methods[name].name if name in self.sparse.methods else "dense" for name in PHASES
            }
            return {
                name: {
                    "method": methods[name],
                    "requested_sparsity": self.sparse.sparsities.get(name),
                    **ledger.report(name),
                }
                for name in PHASES
            }

        return {
            **self.sparse.describe(),
            "phases": phases(total),
            "prompts": total.rows,
            "tasks": {task: phases(ledger) for task, ledger in self.ledgers.items() if task},
            "skipped": dict(self.skipped),
            "layers": {"sparse_eligible": sum(r is None for r in self.runtime.layers.values()), "untouched": untouched},
            "versions": {
                "lm_eval_sparse": __version__,
                "lm_eval": version("lm_eval"),
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "device": device_name(self.device),
            **({"batches_halved": self.halved} if self.halved else {}),
        }

    def detail_report(self) -> dict[str, Any]:
        """Figures per layer and query head of each phase that computed anything, by task, averaged over prompts.

        `prompts` are those averaged over: answers that came from a response cache carry no figures per layer.
        """
        return {
            task: {
                "prompts": ledger.rows - ledger.restored,
                **{name: ledger.detail_report(name) for name in PHASES if ledger.details[name]},
            }
            for task, ledger in self.ledgers.items()
        }

    def check_it_ran(self) -> None:
        """Raise when a sparse phase was requested, prompts were run, and none of its calls was sparse."""
        report = self.report()
        for phase, assignment in self.runtime.plan.phases.items():
            method, measured = assignment.method.name, report["phases"][phase]
            if measured["calls"]["sparse"]:
                continue
            reasons = set(measured.get("fallback_reasons", {}))
            if phase == "decode" and reasons == {COVERED} and report["phases"]["eviction"]["calls"]["sparse"]:
                continue  # eviction left no more than decoding may read: as requested, and in the results
            if report["prompts"]:
                reasons = "; ".join(measured.get("fallback_reasons", {})) or NEVER_CALLED[phase]
                calls = sum(measured["calls"].values())
                if not calls:
                    raise UserError(f"{method} never ran: {reasons}")
                raise UserError(
                    f"{method} never ran: all {calls} {phase} calls were dense ({reasons}); use longer prompts or "
                    "another sparsity, or type method=dense to mean dense"
                )
            if self.skipped:
                task, reason = next(iter(self.skipped.items()))
                raise UserError(f"{method} never ran: every task was skipped, such as {task} ({reason})")
        self._check_eviction_mattered()

    def _check_eviction_mattered(self) -> None:
        """Raise when nothing was decoded after eviction, warn when that is so in some tasks only."""
        if self.runtime.plan.eviction is None:
            return
        method = self.runtime.plan.eviction.method.name
        idle, busy = [], []
        for task, ledger in self.ledgers.items():
            if ledger.calls["eviction"]["sparse"]:
                (busy if sum(ledger.calls["decode"].values()) else idle).append(task)
        if idle and not busy:
            raise UserError(f"{method} could not change any answer: {NEVER_CALLED['decode']}")
        if idle:
            logger.warning(
                "%s could not change any answer of %s, whose scores are those of the prefill: no token was decoded "
                "against the evicted cache", method, ", ".join(idle),
            )  # fmt: skip

    def get_model_info(self) -> dict[str, Any]:
        """As lm-eval's, with the `sparse` block. lm-eval calls it once, after the last request."""
        self.check_it_ran()
        info = super().get_model_info()
        if self.is_embedded:
            info["model_sha"] = embedded.GGUF_SHA256
        return {**info, "sparse": self.report()}

    # --- lm-eval's caches ------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """What decides an answer besides the prompt: `--use_cache` must not mix answers of different ones."""
        sample = hashlib.sha256()
        for parameter in self.model.parameters():
            flat = parameter.detach().flatten()
            sample.update(str(flat[:: max(1, flat.numel() // 64)][:64].tolist()).encode())
        typed = {name: value for name, value in self.model_args.items() if name not in WITHOUT_EFFECT}
        return {
            **response_cache.public(typed),
            **self.sparse.describe(),
            "lm_eval_sparse": __version__,
            "pretrained": self.model_label,
            "dtype": str(self.model.dtype),
            "max_length": self.max_length,
            "weights": sample.hexdigest()[:16],
        }

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Accept a response cache only when it was written under the same configuration, or is new."""
        if (store := getattr(cache_hook, "dbdict", None)) is not None:
            response_cache.guard(store, self.fingerprint())
        super().set_cache_hook(cache_hook)

    # --- chat templates --------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self.templated = True
        check_template(self.tokenizer, True)
        try:
            return super().apply_chat_template(chat_history, add_generation_prompt)
        except jinja2.TemplateError as error:
            raise UserError(
                f"the chat template of the model's tokenizer cannot be rendered ({first_line(error)}); leave "
                "--apply_chat_template out, or give another tokenizer="
            ) from error

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """As lm-eval's; it asks before the first request. Raises `UserError` where there is no such template."""
        self.templated = self.templated or bool(chat_template)
        if chat_template:
            check_template(self.tokenizer, chat_template)
        return super().chat_template(chat_template)

    @property
    def tokenizer_name(self) -> str:
        # lm-eval asks for it only when the chat template is applied.
        self.templated = True
        return super().tokenizer_name


#: Why a phase had no call at all.
NEVER_CALLED = {
    "prefill": "no layer with full causal attention was called",
    "eviction": (
        "no prompt was put into a cache (perplexity tasks run each window as one prefill, and so do scored tasks on "
        "models with a recurrent state); use generated or scored tasks, or leave the method out"
    ),
    "decode": (
        "no token was decoded against a cache (answers of one token come from the prefill, perplexity tasks run each "
        "window as one prefill, and models with a recurrent state are scored in one pass); use tasks with longer "
        "answers, or leave the method out"
    ),
}

#: Model arguments that do not change an answer.
WITHOUT_EFFECT = ("device", "batch_size", "max_batch_size", "logits_cache", "parallelize", "token", "cache_dir")

#: Model types that transformers can load with a causal head although their attention looks both ways.
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "camembert", "megatron-bert", "roformer", "data2vec-text")


def refuse_attention_choice(model_args: dict[str, Any]) -> None:
    """Raise when the user names an attention implementation: that is what sparse-hf replaces."""
    if "attn_implementation" in model_args:
        raise UserError(
            f"attn_implementation={model_args['attn_implementation']} is not accepted: sparse-hf brings its own "
            "attention; leave it out (choose a kernel with backend=), or use --model hf"
        )


def check_known(model_args: dict[str, Any], source: tuple[str, dict[str, Any]] | None) -> dict[str, Any]:
    """Raise on a model argument that nothing would understand; returns those that are fields of the configuration.

    Fields of the model's own configuration (such as `rope_parameters`) are accepted; the configuration is only
    loaded when an argument is not known otherwise.
    """
    known = {name for name in inspect.signature(HFLM.__init__).parameters if name not in ("self", "kwargs")}
    known |= {*arguments.ARGUMENTS}
    fields = unknown = [name for name in model_args if name not in known]
    if unknown and source is not None:
        pretrained, args = source
        options = {
            name: args[name] for name in ("revision", "trust_remote_code", "gguf_file", "subfolder") if name in args
        }
        try:
            config = transformers.AutoConfig.from_pretrained(pretrained, **options)
        except Exception:  # a damaged configuration: what is wrong with it is said when the model is loaded
            config = None
        if config is not None:
            theirs = {*config.to_dict(), *config.get_text_config(decoder=True).to_dict()}
            unknown = [name for name in unknown if name not in theirs]
    if unknown:
        name = unknown[0]
        if name in METHODS:
            raise UserError(
                f"{name} stands alone among the model arguments: type method={name}, and join methods of several "
                "phases by a plus sign, as in method=flexprefill+snapkv+quest"
            )
        everything, own = {*known, *argument_names()}, ", ".join((*OWN_ARGS, *knob_names()))
        raise arguments.unknown(name, model_args[name], everything, own)
    return {name: model_args[name] for name in fields}


def check_device(model_args: dict[str, Any]) -> None:
    """Raise `UserError` for a device that there is not. `cuda:0`, lm-eval's default, then means the CPU, as for `hf`.

    lm-eval takes any name that it does not know for the CPU.
    """
    device = str(model_args["device"])
    kind, _, number = device.partition(":")
    there = {"cpu": True, "cuda": True, "mps": torch.backends.mps.is_available(), "xpu": torch.xpu.is_available()}
    if not arguments.is_device(device) or not there.get(kind, False):
        raise UserError(f"device={device} is not accepted: give cpu, cuda or cuda:N, such as --device cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        if device != "cuda:0":
            raise UserError(f"device={device}: torch sees no CUDA device here; leave it out, or type --device cpu")
        model_args["device"] = "cpu"
    elif kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise UserError(
            f"device={device}: torch sees {torch.cuda.device_count()} CUDA devices here, from cuda:0 on; give one of "
            "them, or type --device cpu"
        )


def check_backend(backend: str, device: str) -> None:
    """Raise `UserError` before a model is loaded for kernels that cannot run on its device."""
    kinds = {
        "triton": "a CUDA device",
        "hopper": "a CUDA device of the Hopper generation (H100, H200)",
        "fa4": "a CUDA device of the Hopper or Blackwell generation (H100, H200, B200)",
    }
    kind = device.split(":")[0]
    interpreted = backend != "fa4" and triton_unavailable(kind) is None  # Triton's kernels run in its interpreter
    if backend in kinds and not (kind == "cuda" and triton_unavailable(kind) is None) and not interpreted:
        raise UserError(
            f"backend={backend} needs {kinds[backend]}, and this run is on {device}: leave it out, or type "
            "backend=gather"
        )


def check_template(tokenizer: Any, asked: bool | str) -> None:
    """Raise `UserError` when the tokenizer has no chat template, or none of the name that was asked for."""
    there = getattr(tokenizer, "chat_template", None)
    if not there and getattr(tokenizer, "default_chat_template", None) is None:
        raise UserError(
            "--apply_chat_template: the model's tokenizer has no chat template; leave the option out, or give another "
            "tokenizer="
        )
    if isinstance(asked, str) and not isinstance(there, dict):
        raise UserError(
            f"--apply_chat_template {asked}: the model's tokenizer has one chat template, which has no name; type "
            "--apply_chat_template alone"
        )
    if isinstance(there, dict):
        names = ", ".join(there)
        if isinstance(asked, str) and asked not in there:
            raise UserError(
                f"--apply_chat_template {asked}: there is no such template{nearest(asked, there)}; there are {names}"
            )
        if not isinstance(asked, str) and "default" not in there:
            raise UserError(f"--apply_chat_template: the tokenizer has several chat templates; name one of {names}")


def check_batch_size(model_args: dict[str, Any]) -> None:
    """Raise `UserError` for numbers of prompts that are none; a batch_size of None is left out."""
    if model_args.get("batch_size", 1) is None:
        del model_args["batch_size"]
    for name in ("batch_size", "max_batch_size"):
        given = model_args.get(name)
        if given is None:
            continue
        kind, _, times = str(given).partition(":")
        if name == "batch_size" and kind == "auto":  # lm-eval's auto:N measures again N times, we measure each batch
            good = given == "auto" or (times.isdecimal() and int(times) > 0)
        else:
            good = isinstance(given, int | str) and str(given).isdecimal() and int(given) > 0
        if not good:
            accepted = f"{'auto or ' if name == 'batch_size' else ''}a whole number of at least 1"
            raise UserError(f"{name}={given} is not accepted: give {accepted}, such as --{name} 8")


def skip_reason(request: Instance) -> str | None:
    """Why the document of this request only stands for a leaf that cannot run, or None."""
    return request.doc.get(SKIPPED) if isinstance(request.doc, dict) else None


def common_prefix(left: list[int], right: list[int]) -> int:
    """Number of leading tokens that two sequences share."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def device_name(device: torch.device) -> str:
    """A name a reader of results understands: the card, or the processor with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} ({device.type}, {torch.get_num_threads()} threads)"


__all__ = ["SparseHFLM"]
