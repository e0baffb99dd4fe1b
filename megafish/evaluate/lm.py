"""A run's model as lm-eval asks for it.

The rules are those of lm-eval's own class for Hugging Face models (HFLM) on the run's export, so that the figures are
the same: how a context and its continuation are encoded and parted, which token an empty context is read as, what is
cut when a text is too long, where a continuation ends. The work is done in another way. Requests are packed without
padding, and logits are computed for the scored tokens alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.functional import linear

from megafish.config import Config
from megafish.data.tokenizer import Tokenizer
from megafish.decode.generate import Ending, Sampler, generate_batch
from megafish.decode.stepping import Stepper
from megafish.errors import InputError
from megafish.model.load import LoadedRun
from megafish.model.transformer import Transformer
from megafish.processes import ALONE, Processes, batched
from megafish.progress import Track, track

T = TypeVar("T")
Encoded = tuple[Any, list[int], list[int]]
"""What a request is known by, its context and its continuation [ids]."""

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Logits that are held at one time: 256 MiB in fp32.
_LOGITS = 1 << 26
# What a sampled continuation is limited to where a task names no top_k: the default of transformers' generate().
_TOP_K = 50
# Settings of transformers' generate() that change nothing with these values.
_NEUTRAL: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True}


class RunLM(TemplateLM):
    """The model of a run, scoring and continuing texts for lm-eval.

    batch_size: requests in one forward pass. max_gen_toks: tokens of a continuation where a task names no number.
    Every process is given all requests and returns all answers: each computes some of the batches, which are the same
    ones whatever the number of processes. So lm-eval sees one process (rank 0 of 1) and all its figures, bootstrapped
    ones too, are those of one.
    """

    def __init__(
        self,
        loaded: LoadedRun,
        *,
        batch_size: int = 16,
        processes: Processes = ALONE,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.run = loaded
        self.batch_size = batch_size
        self.processes = processes
        self.max_length = max_length(loaded.config)
        self.max_gen_toks = 256
        self._progress = progress and processes.is_main
        self._ids = loaded.tokenizer
        self._decoder = _Decoder(loaded.tokenizer)
        self._before, self._after = added_ids(loaded.tokenizer)
        self._device = loaded.model.embedding.weight.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._ids.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is read after."""
        return self._ids.eos_id if self._ids.bos_id is None else self._ids.bos_id

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return self._ids.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text. With add_special_tokens, those of its tokenizer.json around it; None: unless the text begins
        with the prefix token, spelled out."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self._ids.token_name(self.prefix_token_id))
        ids = self._ids.encode(string)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the continuation's log-probability [nats], and whether every token of it is
        the most probable one."""
        for request in requests:
            if "".join(request.args) == "":
                raise InputError(f"task {request.task_name}: a request has neither a context nor a continuation")
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability [nats] of each text, whole: what does not fit the model is read in windows, of which each
        has as much context as fits and scores the tokens that come after the window before it."""
        windows: list[Encoded] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of the texts that end it."""
        settings: list[Generation] = []
        prompts: list[list[int]] = []
        for request in requests:
            context, options = request.args
            chosen = self._generation(options, request.task_name)
            room = self.max_length - chosen.max_new_tokens
            if room < 1:
                raise InputError(
                    f"task {request.task_name}: max_gen_toks={chosen.max_new_tokens} (in its generation_kwargs) leaves "
                    f"no room for a context: the model reads {self.max_length} tokens in all"
                )
            settings.append(chosen)
            prompts.append(self._prompt(context)[-room:])
        alike: dict[Generation, list[int]] = {}
        for number, chosen in enumerate(settings):
            alike.setdefault(chosen, []).append(number)
        batches = [
            rows
            for members in alike.values()
            for rows in batched(sorted(members, key=lambda number: -len(prompts[number])), self.batch_size)
        ]

        results: list[list[int]] = [[] for _ in prompts]
        stepper = Stepper(self.run.model)

        def continue_batch(rows: Sequence[int], bar: Track) -> list[tuple[int, str]]:
            chosen = settings[rows[0]]
            self._continue(stepper, prompts, list(rows), chosen, results, bar)
            return [(number, self._text(results[number], chosen)) for number in rows]

        answers = dict(self._shared("generate_until", batches, continue_batch))
        return [answers[number] for number in range(len(requests))]

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: Any) -> list[tuple[float, bool]]:
        """Requests that read the same tokens and score other ones (the answers of a multiple choice, where they are one
        token each) share a place in a batch."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, (name, context, continuation) in enumerate(requests):
            if not continuation:
                raise InputError(
                    f"a continuation adds no token to its context ({_shown(name)}): the task has to part its texts "
                    "where tokens are parted, as a space before the continuation does"
                )
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens, but the model reads {self.max_length} "
                    f"({_shown(name)})"
                )
            # A context of white space alone has gone to the continuation whole (lm-eval's own class fails on it).
            context = context or [self.prefix_token_id]
            alike.setdefault(tuple((context + continuation)[-(self.max_length + 1) : -1]), []).append(number)
        # The longest ones first: what does not fit into memory fails at once, and the time left is never too short.
        batches = batched(sorted(alike, key=lambda read: (-len(read), read)), self.batch_size)

        def score_batch(batch: Sequence[tuple[int, ...]], bar: Track) -> list[tuple[int, tuple[float, bool]]]:
            numbers = [number for read in batch for number in alike[read]]
            wanted = [[requests[number][2] for number in alike[read]] for read in batch]
            answers = score(self.run.model, batch, wanted)
            bar.advance(len(numbers))
            return list(zip(numbers, answers, strict=True))

        found = dict(self._shared("loglikelihood", batches, score_batch, lambda read: len(alike[read])))
        return [found[number] for number in range(len(requests))]

    def _shared(
        self,
        what: str,
        batches: Sequence[Sequence[T]],
        work: Callable[[Sequence[T], Track], list[tuple[int, Any]]],
        weight: Callable[[T], int] = lambda _: 1,
    ) -> list[tuple[int, Any]]:
        """The answers of all batches, of which this process does every size-th. weight: requests of an item."""
        own = self.processes.own(batches)
        answers: list[tuple[int, Any]] = []
        total = sum(weight(item) for batch in own for item in batch)
        with track(total, what, "request", enabled=self._progress) as bar:
            for batch in own:
                answers += work(batch, bar)
        return [answer for part in self.processes.gather(answers) for answer in part]

    def _generation(self, options: Any, task: str | None) -> Generation:
        """A task's generation_kwargs."""
        values: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        until = tuple(handle_stop_sequences(values.pop("until"), self._ids.token_name(self._ids.eos_id)))
        sampled, max_new_tokens = values.pop("do_sample"), values.pop("max_gen_toks")
        temperature = values.pop("temperature", 0.0) if sampled else 0.0
        top_k, top_p = values.pop("top_k", _TOP_K), values.pop("top_p", None)
        values.pop("temperature", None)
        for name, value in values.items():
            if name not in _NEUTRAL or value != _NEUTRAL[name]:
                raise InputError(f"task {task}: {name}={value} in its generation_kwargs is not supported")
        if max_new_tokens < 1:
            raise InputError(f"task {task}: max_gen_toks={max_new_tokens} in its generation_kwargs: at least 1")
        if sampled and not temperature:
            raise InputError(f"task {task}: do_sample=true in its generation_kwargs needs a temperature above 0")
        if not sampled:
            return Generation(until, max_new_tokens)
        return Generation(until, max_new_tokens, temperature, top_k or None, top_p)

    def _prompt(self, context: str) -> list[int]:
        """Ids of a context to continue."""
        begin = None if self._ids.bos_id is None else self._ids.token_name(self._ids.bos_id)
        ids = self.tok_encode(context, add_special_tokens=not has_bos_prefix(context, begin))
        return ids or [self.prefix_token_id]

    @torch.inference_mode()
    def _continue(
        self,
        stepper: Stepper,
        prompts: Sequence[Sequence[int]],
        rows: list[int],
        chosen: Generation,
        results: list[list[int]],
        bar: Track,
    ) -> None:
        """Continue the prompts `rows` into `results`."""
        sampler = Sampler(chosen.temperature, chosen.top_k, chosen.top_p)
        ending = _Until(self._decoder, chosen.until)
        limits = [chosen.max_new_tokens] * len(prompts)
        logits = stepper.begin([prompts[i] for i in rows], chosen.max_new_tokens)
        generate_batch(stepper, logits, prompts, rows, limits, sampler, ending, 0, results, bar)

    def _text(self, tokens: list[int], chosen: Generation) -> str:
        text: str = postprocess_generated_text(self._decoder.decode(tokens), list(chosen.until), None)
        return text


class Generation(NamedTuple):
    """How a continuation is made and what ends it. temperature 0 takes the most probable token."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


class _Decoder:
    """Text of ids as the export's tokenizer.json gives it.

    Of bytes in a row (what the vocabulary has no piece for) it makes text only where all of them are UTF-8, and
    else one U+FFFD for each; sentencepiece keeps those that are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        names = [tokenizer.token_name(token) for token in range(tokenizer.vocab_size)]
        data = tokenizer.path.read_bytes()
        # A model that puts a space before every text has no tokenizer.json (export refuses), and drops that space.
        own = data.lstrip()[:1] == b"{" or tokenizer.piece(tokenizer.encode("a")[0])[:1] == b" "
        self.bytes = frozenset() if own else frozenset(t for t, name in enumerate(names) if _BYTE.fullmatch(name))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens stand for nothing."""
        if not self.bytes:
            return self.tokenizer.decode(ids)
        kept = [token for token in ids if token not in self.tokenizer.special_ids]
        parts: list[str] = []
        for are_bytes, group in groupby(kept, key=self.bytes.__contains__):
            text = b"".join(map(self.tokenizer.piece, group))
            try:
                parts.append(text.decode("utf-8"))
            except UnicodeDecodeError:
                assert are_bytes
                parts.append("\ufffd" * len(text))
        return "".join(parts)

    def tail(self, ids: Sequence[int], count: int) -> str:
        """Text of the last `count` ids and those before them that it depends on."""
        start = max(0, len(ids) - count)
        while start and (ids[start] in self.bytes or ids[start] in self.tokenizer.special_ids):
            start -= 1
        return self.decode(ids[start:])


class _Until(Ending):
    """Ends a continuation after the token that completes one of the texts: of a token that is partly before it, that
    part belongs to the answer."""

    def __init__(self, decoder: _Decoder, until: Sequence[str]) -> None:
        super().__init__(decoder.tokenizer, [text for text in until if text])
        self.decoder = decoder

    def cut(self, prompt: Sequence[int], tokens: list[int]) -> int | None:
        """See Ending."""
        if tokens[-1] in self.ids:
            return len(tokens) - 1
        recent = self.decoder.tail(tokens, self.tail)
        return len(tokens) if any(text in recent for text in self.strings) else None


@torch.inference_mode()
def score(
    model: Transformer, sequences: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
) -> list[tuple[float, bool]]:
    """Log-probability [nats] of continuations, and whether each of their tokens is the most probable one.

    sequences: what the model reads, without the last token of a continuation. continuations: of each sequence those
    that it scores, each of at most its length; the last token of them follows the last token read. One answer for each,
    in their order.
    """
    device = model.embedding.weight.device
    rows: list[int] = []  # where a token is scored, in the sequences put end to end
    places: list[int] = []  # of every scored token, the place of its row in `rows`
    targets: list[int] = []
    counts: list[int] = []
    end = 0
    for read, wanted in zip(sequences, continuations, strict=True):
        end += len(read)
        rows.extend(range(end - max(map(len, wanted)), end))
        for continuation in wanted:
            places.extend(range(len(rows) - len(continuation), len(rows)))
            targets.extend(continuation)
            counts.append(len(continuation))
    lengths = torch.tensor([0, *map(len, sequences)])
    hidden = model.hidden_rows(
        torch.tensor([[token for read in sequences for token in read]], device=device),
        torch.tensor(rows, device=device),
        cu_seqlens=lengths.cumsum(0).to(device, torch.int32),
        max_seqlen=int(lengths.max()),
    )
    place, target = torch.tensor(places, device=device), torch.tensor(targets, device=device)
    place, order = place.sort(stable=True)
    target = target[order]
    values = torch.empty(len(target), dtype=torch.float32, device=device)
    greedy = torch.empty(len(target), dtype=torch.bool, device=device)
    size = max(1, _LOGITS // model.vocab_size)
    head = model.head.weight[: model.vocab_size]  # the other rows stand for no token
    starts = range(0, len(hidden), size)
    cuts = torch.searchsorted(place, torch.tensor([*starts, len(hidden)], device=device)).tolist()
    for number, start in enumerate(starts):
        some = slice(cuts[number], cuts[number + 1])
        logits = linear(hidden[start : start + size], head).float()
        row = place[some] - start
        values[some] = logits[row, target[some]] - logits.logsumexp(-1)[row]
        greedy[some] = logits.argmax(-1)[row] == target[some]
    back = order.argsort()
    parts = zip(values[back].double().cpu().split(counts), greedy[back].cpu().split(counts), strict=True)
    return [(float(value.sum()), bool(hit.all())) for value, hit in parts]


def _shown(pair: Any) -> str:
    """Where a context and its continuation meet."""
    return f"{pair[0][-20:]!r} + {pair[1][:20]!r}" if pair is not None else "of a whole text"


def max_length(config: Config) -> int:
    """Tokens that the model of a run reads at most: what its export says in config.json."""
    scaling = config.model.rope_scaling
    if scaling is not None and scaling.type != "linear":
        return round(scaling.factor * scaling.original_max_position)
    return config.data.sequence_length


def added_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after a text by default: tokenizer.json may say so, a sentencepiece model (as
    exported) adds nothing."""
    data = tokenizer.path.read_bytes()
    if data.lstrip()[:1] != b"{":
        return [], []
    import tokenizers

    model = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    bare = model.encode("a", add_special_tokens=False).ids
    whole = model.encode("a", add_special_tokens=True).ids
    start = next(start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]
