"""Continuous batching: prompts of waiting sequences are read, then every running sequence gets its next token.

A prompt is read once for all sequences that wait with it. Everything here belongs to the engine's thread, which runs
in torch's inference mode.

Letters: R rows, P prompts, V vocabulary, H hidden.
"""

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.engines.embedded.forward import CHUNK, RowModel
from recipe.engines.embedded.probe import measure_granule
from recipe.engines.embedded.rows import Rows
from recipe.engines.embedded.running_sequence import RunningSequence
from recipe.engines.embedded.sampling import sample, scaled_log_probs, uniforms
from recipe.generation.continuation import stop_window

Prompt = tuple[tuple[int, ...], list[RunningSequence]]
"""Token ids, a response begun among them, and the sequences that go on from them."""

ABORTED: dict[str, object] = {"type": "abort"}


class Generation:
    """The running and the waiting sequences of an engine. Sequences that end are handed to `on_finish`."""

    def __init__(
        self,
        model: RowModel,
        rows: int,
        version: str,
        decode: Callable[[list[int]], str],
        on_finish: Callable[[RunningSequence], None],
    ) -> None:
        self.version = version
        """Of the weights."""
        self.waiting: deque[RunningSequence] = deque()
        self._model = model
        self._size = -(-rows // CHUNK) * CHUNK
        self._granule = measure_granule(model, self._size)
        self._prompts_at_once = self._size // CHUNK
        self._cache = model.new_cache(self._size + self._prompts_at_once)
        self._rows = Rows(self._size, self._cache)
        self._decode = decode
        self._on_finish = on_finish

    @property
    def running(self) -> int:
        """Sequences that have a row."""
        return self._rows.count

    def admit(self) -> None:
        """Reads the prompts of waiting sequences, as many as there are rows for, and samples their next tokens."""
        prompts: dict[tuple[int, ...], list[RunningSequence]] = {}
        for _ in range(min(len(self.waiting), self._size - self.running)):
            sequence = self.waiting.popleft()
            prompts.setdefault(sequence.known_ids, []).append(sequence)
        longest_first = sorted(prompts.items(), key=lambda prompt: -len(prompt[0]))
        for start in range(0, len(longest_first), self._prompts_at_once):
            self._begin(longest_first[start : start + self._prompts_at_once])

    def decode(self) -> None:
        """Makes the next token of every running sequence."""
        rows, count = self._rows, self._rows.count
        padded = _round_up(count, self._granule)
        rows.token[count:padded] = rows.position[count:padded] = 0
        tokens_R1 = torch.from_numpy(rows.token[:padded])[:, None]
        starts_R = torch.from_numpy(rows.position[:padded])
        hidden_R1H = self._model.forward(tokens_R1, starts_R, self._cache, first_row=0)
        rows.position[:count] += 1
        self._sample(slice(0, count), self._model.logits(hidden_R1H[:, 0])[:count])

    def abort(self, matches: Callable[[RunningSequence], bool]) -> None:
        """Ends sequences early, with the tokens they have."""
        kept = [sequence for sequence in self.waiting if not matches(sequence)]
        aborted = [sequence for sequence in self.waiting if matches(sequence)]
        self.waiting = deque(kept)
        for sequence in aborted:
            sequence.finish(ABORTED, self.version)
            self._on_finish(sequence)
        gone = [row for row, sequence in enumerate(self._rows.sequences) if matches(sequence)]
        self._end(dict.fromkeys(gone, ABORTED))

    def retract(self) -> None:
        """Running sequences wait, before all others, to be read again with the tokens that they have."""
        for row in range(self.running):
            self._rows.collect(row)
        self.waiting.extendleft(reversed(self._rows.sequences))
        self._rows.remove(np.arange(self.running))

    def change_version(self, version: str) -> None:
        """The weights are replaced by those of `version`; sequences that are under way keep the tokens that they
        have."""
        if version != self.version:
            for row, sequence in enumerate(self._rows.sequences):
                sequence.outlive(self.version, int(self._rows.generated[row]))
            for sequence in self.waiting:
                sequence.outlive(self.version, len(sequence.output_ids))
            self.version = version

    def free_cache(self) -> None:
        """Gives the cache's memory back, until the next prompt; only without running sequences."""
        self._cache.free()

    def _begin(self, prompts: list[Prompt]) -> None:
        """Reads prompts (longest first) into the cache's spare rows and deals them out to their sequences' rows."""
        hidden_PH = self._read(prompts)
        first = self._rows.count
        sources: list[int] = []
        for number, (_, sequences) in enumerate(prompts):
            for sequence in sequences:
                self._rows.add(sequence)
                sources.append(number)
        rows = slice(first, self._rows.count)
        sources_R = torch.tensor(sources)
        self._cache.copy(sources_R + self._size, torch.arange(rows.start, rows.stop), len(prompts[0][0]))
        self._sample(rows, self._logits(hidden_PH)[sources_R])

    def _read(self, prompts: list[Prompt]) -> Tensor:
        """[P, H]: the hidden state at the last token of each prompt."""
        longest = len(prompts[0][0])
        lengths = [len(ids) for ids, _ in prompts]
        tokens = torch.zeros(self._prompts_at_once, _round_up(longest, CHUNK), dtype=torch.long)
        for number, (ids, _) in enumerate(prompts):
            tokens[number, : len(ids)] = torch.tensor(ids)
        pieces: list[Tensor] = []
        for start in range(0, longest, CHUNK):
            reading = sum(length > start for length in lengths)
            padded = _round_up(reading, max(1, self._granule // CHUNK))
            starts = torch.full((padded,), start)
            piece = tokens[:padded, start : start + CHUNK]
            pieces.append(self._model.forward(piece, starts, self._cache, first_row=self._size)[:reading])
        for number, (ids, sequences) in enumerate(prompts):
            if any(sequence.returns_input_log_probs for sequence in sequences):
                hidden_QH = torch.cat([piece[number] for piece in pieces if len(piece) > number])
                told = self._input_log_probs(hidden_QH, ids)
                for sequence in sequences:
                    sequence.input_log_probs = told[: len(sequence.prompt_ids) - 1]
        return torch.stack([pieces[(n - 1) // CHUNK][i, (n - 1) % CHUNK] for i, n in enumerate(lengths)])

    def _input_log_probs(self, hidden_QH: Tensor, ids: tuple[int, ...]) -> list[float]:
        """Of a prompt's tokens but the first, from the hidden states at all of them (and more)."""
        if len(ids) == 1:
            return []
        log_probs_QV = self._logits(hidden_QH[: len(ids) - 1]).log_softmax(-1)
        told: list[float] = log_probs_QV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        return told

    def _logits(self, hidden_RH: Tensor) -> Tensor:
        """[R, V], computed over a multiple of the granule."""
        count = len(hidden_RH)
        padded = F.pad(hidden_RH, (0, 0, 0, _round_up(count, self._granule) - count))
        return self._model.logits(padded)[:count]

    def _sample(self, span: slice, logits_RV: Tensor) -> None:
        """Draws the next token of the rows in `span` and ends those that are complete."""
        rows = self._rows
        log_probs_RV = scaled_log_probs(logits_RV, rows.temperature[span])
        draws_R = uniforms(rows.seed[span], rows.position[span])
        tokens_R = sample(log_probs_RV, rows.greedy[span], rows.top_k[span], rows.top_p[span], draws_R)
        rows.record(span, tokens_R.numpy(), log_probs_RV.gather(1, tokens_R[:, None])[:, 0].numpy())
        self._end(self._endings(span))

    def _endings(self, span: slice) -> dict[int, dict[str, object]]:
        """Rows of `span` that are complete -> why, in SGLang's words and order: string, then token, then length."""
        rows = self._rows
        endings: dict[int, dict[str, object]] = {}
        for row in span.start + np.flatnonzero(rows.generated[span] >= rows.limit[span]):
            endings[int(row)] = {"type": "length"}
        for row in span.start + np.flatnonzero(rows.stopped(span)):
            endings[int(row)] = {"type": "stop", "matched": int(rows.token[row])}
        for row in span.start + np.flatnonzero(rows.has_stop_strings[span]):
            matched = self._matched_string(int(row))
            if matched is not None:
                endings[int(row)] = {"type": "stop", "matched": matched}
        return endings

    def _matched_string(self, row: int) -> str | None:
        """The first stop string that the newest tokens of a row complete."""
        stops = self._rows.sequences[row].sampling.stop
        text = self._decode(self._rows.newest(row, stop_window(stops)))
        return next((stop for stop in stops if stop in text), None)

    def _end(self, endings: dict[int, dict[str, object]]) -> None:
        for row, reason in endings.items():
            sequence = self._rows.sequences[row]
            self._rows.collect(row)
            self._rows.collect_experts(row)
            sequence.finish(reason, self.version)
            self._on_finish(sequence)
        if endings:
            self._rows.remove(np.array(sorted(endings)))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
